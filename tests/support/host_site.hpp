// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cohort/host/host_backend.hpp>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "support/threads.hpp"

/// \file
/// One rank's tensors and transport on the host, and collectives that are compared with an answer
/// computed apart. Every check is collective and throws on a wrong element.

namespace cohort::test {

/// How a test lays out a tensor.
enum class Form { contiguous, transposed, sliced };
inline constexpr Form kForms[] = {Form::contiguous, Form::transposed, Form::sliced};

/// Where a rank's tensors lie.
enum class Memory { ordinary, window, mixed };  // mixed: windows on even ranks
inline constexpr Memory kMemories[] = {Memory::ordinary, Memory::window, Memory::mixed};

inline Dims dims(std::vector<std::int64_t> values) {
  return Dims(std::span<const std::int64_t>(values));
}

/// A merge of one split a rank, [B, H, D] and [B, H], by head.
inline MergeArguments by_head(int ranks, const ConstTensorView& out, const ConstTensorView& lse,
                              const TensorView& merged, std::optional<TensorView> merged_lse = {},
                              LseBase base = LseBase::e) {
  return {.partials = {.out = out.unsqueeze(), .lse = lse.unsqueeze(), .base = base},
          .rows = {.batch = out.size(0), .heads = out.size(1), .ranks = ranks},
          .merged = merged,
          .lse = std::move(merged_lse)};
}

/// Peers read tensors of the sizes of tests in windows, unless a test says from which on.
inline HostOptions reading_windows(HostOptions options = {}) {
  if (options.window_bytes == HostOptions{}.window_bytes) {
    options.window_bytes = 2048;
  }
  return options;
}

/// One rank of a test: a transport, and memory for tensors, in a window where asked.
class Site {
 public:
  Site(ControlPlane& plane, HostOptions options, Memory memory,
       std::size_t bytes = std::size_t{4} << 20)
      : backend(host_backend(reading_windows(std::move(options)))),
        transport(backend->connect(plane)) {
    const bool windows = transport->capabilities().peer_import;
    const bool in_window =
        windows && (memory == Memory::window || (memory == Memory::mixed && plane.rank() % 2 == 0));
    segment = backend->allocate_segment(bytes);
    if (windows && memory != Memory::ordinary) {
      window = transport->register_segment(*segment);
    }
    if (!in_window) {
      other.resize(bytes);
    }
    base_ = in_window ? static_cast<std::byte*>(segment->data()) : other.data();
    left_ = bytes;
  }

  void* take(std::size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    check(bytes <= left_, "the test's memory suffices");
    left_ -= bytes;
    return std::exchange(base_, base_ + bytes);
  }

  /// A tensor of the shape with the form's strides, filled with bytes that no test writes.
  TensorView tensor(const Dims& shape, DType dtype, Form form) {
    Dims storage = shape;
    const int last = shape.size() - 1;
    if (form == Form::sliced) {
      storage[last] += 3;
    } else if (form == Form::transposed && last > 0) {
      std::swap(storage[0], storage[last]);
    }
    const auto count = static_cast<std::size_t>(numel(storage));
    void* memory = take(std::max<std::size_t>(1, count) * size_of(dtype));
    std::memset(memory, 0x5a, count * size_of(dtype));
    const TensorView all(memory, dtype, storage);
    if (form == Form::sliced) {
      return all.slice(last, 1, shape[last]);
    }
    return form == Form::transposed && last > 0 ? all.transpose(0, last) : all;
  }

  std::shared_ptr<Backend> backend;
  std::unique_ptr<Segment> segment;
  std::unique_ptr<Transport> transport;
  std::unique_ptr<Window> window;
  std::vector<std::byte> other;

 private:
  std::byte* base_ = nullptr;
  std::size_t left_ = 0;
};

/// A small whole number that depends on the rank and on the place in the tensor.
inline std::int64_t value_at(int rank, std::int64_t flat) { return (rank * 5 + flat * 7) % 11 - 3; }

inline void store(DType dtype, void* to, std::int64_t value) {
  const auto put = [to](auto x) { std::memcpy(to, &x, sizeof(x)); };
  switch (dtype) {
    case DType::f64:
      return put(static_cast<double>(value));
    case DType::f32:
      return put(static_cast<float>(value));
    case DType::f16:
      return put(Half(static_cast<float>(value)));
    case DType::bf16:
      return put(BFloat16(static_cast<float>(value)));
    case DType::i32:
      return put(static_cast<std::int32_t>(value));
    case DType::i64:
      return put(value);
    default:
      return put(static_cast<std::uint8_t>(value));
  }
}

inline std::int64_t load(DType dtype, const void* from) {
  const auto get = [from](auto x) {
    std::memcpy(&x, from, sizeof(x));
    return x;
  };
  switch (dtype) {
    case DType::f64:
      return static_cast<std::int64_t>(get(double{}));
    case DType::f32:
      return static_cast<std::int64_t>(get(float{}));
    case DType::f16:
      return static_cast<std::int64_t>(static_cast<float>(get(Half{})));
    case DType::bf16:
      return static_cast<std::int64_t>(static_cast<float>(get(BFloat16{})));
    case DType::i32:
      return get(std::int32_t{});
    case DType::i64:
      return get(std::int64_t{});
    case DType::u8:
      return get(std::uint8_t{});
    default:
      return get(std::int8_t{});
  }
}

/// Calls `each(index, address)` for all elements in row-major order.
template <class Each>
inline void for_each(const ConstTensorView& view, const Each& each) {
  Dims index = view.shape();  // no allocation for each element, which sanitizers make slow
  for (std::int64_t flat = 0; flat < view.numel(); ++flat) {
    std::int64_t rest = flat;
    std::int64_t offset = 0;
    for (int d = view.ndim() - 1; d >= 0; --d) {
      index[d] = rest % view.shape()[d];
      rest /= view.shape()[d];
      offset += index[d] * view.strides()[d];
    }
    each(index, static_cast<const std::byte*>(view.data()) +
                    offset * static_cast<std::int64_t>(size_of(view.dtype())));
  }
}

inline std::int64_t flat_of(const Dims& index, const Dims& shape) {
  std::int64_t flat = 0;
  for (int d = 0; d < shape.size(); ++d) {
    flat = flat * shape[d] + index[d];
  }
  return flat;
}

inline void fill(const TensorView& view, int rank) {
  std::int64_t flat = 0;
  for_each(view, [&](const auto&, const std::byte* address) {
    store(view.dtype(), const_cast<std::byte*>(address), value_at(rank, flat++));
  });
}

/// Compares with what the element type can hold of the expected value.
inline void check_element(DType dtype, const std::byte* address, std::int64_t expected,
                          std::string_view what) {
  std::uint64_t image = 0;
  store(dtype, &image, expected);
  check_equal(load(dtype, address), load(dtype, &image), what);
}

inline std::int64_t combine(ReduceOp op, std::int64_t a, std::int64_t b) {
  switch (op) {
    case ReduceOp::sum:
      return a + b;
    case ReduceOp::prod:
      return a * b;
    case ReduceOp::min:
      return std::min(a, b);
    case ReduceOp::max:
      return std::max(a, b);
  }
  return 0;
}

/// u8 images of the values, so that min, max and wraparound are those of the type.
inline std::int64_t representable(DType dtype, std::int64_t value) {
  std::uint64_t image = 0;
  store(dtype, &image, value);
  return load(dtype, &image);
}

inline std::vector<std::int64_t> equal_sizes(int n, std::int64_t each) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(n), each);
}
inline std::vector<std::int64_t> ragged_sizes(int n) {
  std::vector<std::int64_t> sizes;
  for (int r = 0; r < n; ++r) {
    sizes.push_back(r % 3);  // rank 0, 3 and 6 have nothing
  }
  return sizes;
}

inline void check_all_gather(Site& site, ControlPlane& plane, const Dims& unit, int dim,
                             const std::vector<std::int64_t>& sizes, DType dtype, Form form,
                             StreamRef stream = {}) {
  const int d = dim < 0 ? dim + unit.size() : dim;
  Dims in_shape = unit;
  in_shape[d] = sizes[static_cast<std::size_t>(plane.rank())];
  Dims out_shape = unit;
  out_shape[d] = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  const auto in = site.tensor(in_shape, dtype, form);
  const auto out = site.tensor(out_shape, dtype, form);
  fill(in, plane.rank());
  site.transport->all_gather(in, out, dim, sizes, stream);
  for_each(out, [&](Dims index, const std::byte* address) {
    int r = 0;
    auto& along = index[d];
    while (along >= sizes[static_cast<std::size_t>(r)]) {
      along -= sizes[static_cast<std::size_t>(r++)];
    }
    Dims theirs = unit;
    theirs[d] = sizes[static_cast<std::size_t>(r)];
    check_element(dtype, address, value_at(r, flat_of(index, theirs)), "all_gather");
  });
}

inline void check_reduce_scatter(Site& site, ControlPlane& plane, const Dims& unit, int dim,
                                 const std::vector<std::int64_t>& sizes, DType dtype, ReduceOp op,
                                 Form form) {
  const int d = dim < 0 ? dim + unit.size() : dim;
  Dims in_shape = unit;
  in_shape[d] = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  Dims out_shape = unit;
  out_shape[d] = sizes[static_cast<std::size_t>(plane.rank())];
  const auto in = site.tensor(in_shape, dtype, form);
  const auto out = site.tensor(out_shape, dtype, form);
  fill(in, plane.rank());
  site.transport->reduce_scatter(in, out, dim, sizes, op, {});
  const std::int64_t first =
      std::accumulate(sizes.begin(), sizes.begin() + plane.rank(), std::int64_t{0});
  for_each(out, [&](Dims index, const std::byte* address) {
    index[d] += first;
    const std::int64_t flat = flat_of(index, in_shape);
    std::int64_t expected = representable(dtype, value_at(0, flat));
    for (int r = 1; r < plane.size(); ++r) {
      expected = combine(op, expected, representable(dtype, value_at(r, flat)));
    }
    check_element(dtype, address, expected, "reduce_scatter");
  });
}

inline void check_all_reduce(Site& site, ControlPlane& plane, const Dims& shape, DType dtype,
                             ReduceOp op, Form form, bool in_place) {
  const auto in = site.tensor(shape, dtype, form);
  const auto out = in_place ? in : site.tensor(shape, dtype, form);
  fill(in, plane.rank());
  site.transport->all_reduce(in, out, op, {});
  std::int64_t flat = 0;
  for_each(out, [&](const auto&, const std::byte* address) {
    std::int64_t expected = representable(dtype, value_at(0, flat));
    for (int r = 1; r < plane.size(); ++r) {
      expected = combine(op, expected, representable(dtype, value_at(r, flat)));
    }
    check_element(dtype, address, expected, "all_reduce");
    ++flat;
  });
}

inline void check_broadcast(Site& site, ControlPlane& plane, const Dims& shape, DType dtype,
                            Form form, int root) {
  const auto tensor = site.tensor(shape, dtype, form);
  fill(tensor, plane.rank());
  site.transport->broadcast(tensor, root, {});
  std::int64_t flat = 0;
  for_each(tensor, [&](const auto&, const std::byte* address) {
    check_element(dtype, address, value_at(root, flat++), "broadcast");
  });
}

inline void check_all_to_all(Site& site, ControlPlane& plane, Dims shape, DType dtype, Form form) {
  const std::int64_t each = shape[0];
  shape[0] *= plane.size();
  const auto in = site.tensor(shape, dtype, form);
  const auto out = site.tensor(shape, dtype, form);
  fill(in, plane.rank());
  site.transport->all_to_all(in, out, {});
  for_each(out, [&](Dims index, const std::byte* address) {
    const auto from = static_cast<int>(index[0] / each);
    index[0] = index[0] % each + plane.rank() * each;
    check_element(dtype, address, value_at(from, flat_of(index, shape)), "all_to_all");
  });
}

inline void check_ring(Site& site, ControlPlane& plane, const Dims& shape, DType dtype, Form form) {
  const int n = plane.size();
  const auto mine = site.tensor(shape, dtype, form);
  const auto theirs = site.tensor(shape, dtype, form);
  fill(mine, plane.rank());
  // Large messages wait for their receivers: even ranks send first.
  const auto send = [&] { site.transport->send(mine, (plane.rank() + 1) % n, {}); };
  const auto receive = [&] { site.transport->recv(theirs, (plane.rank() + n - 1) % n, {}); };
  if (plane.rank() % 2 == 0) {
    send();
    receive();
  } else {
    receive();
    send();
  }
  std::int64_t flat = 0;
  for_each(theirs, [&](const auto&, const std::byte* address) {
    check_element(dtype, address, value_at((plane.rank() + n - 1) % n, flat++), "ring");
  });
}

inline constexpr DType kReducible[] = {DType::f64, DType::f32, DType::f16, DType::bf16,
                                       DType::i8,  DType::u8,  DType::i32, DType::i64};

/// Small slots, so that the shapes of tests take several pieces.
inline HostOptions small_slots() { return {.slot_bytes = 4096}; }
/// Ranks that do not map each other's memory.
inline HostOptions apart() { return {.map_peers = false}; }

/// Every collective on one shape, along every dimension from both ends.
inline void check_shape(ControlPlane& plane, const HostOptions& options, Memory memory,
                        const std::vector<std::int64_t>& shape, Form form) {
  const int n = plane.size();
  Site site(plane, options, memory, std::size_t{16} << 20);
  const auto ndim = static_cast<int>(shape.size());
  for (int dim = -ndim; dim < ndim; ++dim) {
    const auto d = static_cast<std::size_t>(dim < 0 ? dim + ndim : dim);
    const auto sizes = dim < 0 ? ragged_sizes(n) : equal_sizes(n, shape[d]);
    check_all_gather(site, plane, dims(shape), dim, sizes, DType::f32, form);
    check_reduce_scatter(site, plane, dims(shape), dim, sizes, DType::bf16, ReduceOp::sum, form);
  }
  check_all_reduce(site, plane, dims(shape), DType::f32, ReduceOp::sum, form, false);
  check_all_reduce(site, plane, dims(shape), DType::f16, ReduceOp::sum, form, true);
  check_broadcast(site, plane, dims(shape), DType::f32, form, n - 1);
  check_all_to_all(site, plane, dims(shape), DType::i32, form);
  site.transport->barrier({});
  if (n % 2 == 0) {
    check_ring(site, plane, dims(shape), DType::i64, form);
  }
}

}  // namespace cohort::test
