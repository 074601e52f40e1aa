// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/world_ranks.hpp"
#include "support/catch.hpp"
#include "support/ranks.hpp"

/// \file
/// One backend and one transport over NCCL for many tests, and collectives whose answers are known
/// exactly.

namespace cohort::test {

inline constexpr std::chrono::seconds kLimit{60};

/// One backend and one transport for all test cases: NCCL takes seconds to connect over sockets.
struct Session {
  std::shared_ptr<CudaBackend> backend = cuda_backend({.environment = {.multicast = false}});
  UniqueStream stream = make_stream(backend->device().index);
  std::unique_ptr<Transport> transport = backend->connect(world());

  [[nodiscard]] StreamRef ref() { return backend->stream(stream.get()); }
  void wait() { transport->synchronize(ref(), kLimit); }
};

inline std::unique_ptr<Session>& slot() {
  static std::unique_ptr<Session>& session = *new std::unique_ptr<Session>;
  return session;
}

inline Session& session() {
  if (!slot()) {
    slot() = std::make_unique<Session>();
  }
  return *slot();
}

/// What rank r holds at element i in round `seed`. Small, so that all sums are exact in every type.
inline double value(int r, std::int64_t i, int seed = 0) {
  return static_cast<double>((i * 7 + r * 5 + seed * 3) % 12);
}
/// As above, for products.
inline double factor(int r, std::int64_t i) { return static_cast<double>(1 + (i + r) % 2); }

inline double input(ReduceOp op, int r, std::int64_t i, int seed = 0) {
  return op == ReduceOp::prod ? factor(r, i) : value(r, i, seed);
}

inline double reduced(ReduceOp op, std::int64_t i, int seed = 0) {
  double result = input(op, 0, i, seed);
  for (int r = 1; r < ranks(); ++r) {
    const double next = input(op, r, i, seed);
    switch (op) {
      case ReduceOp::sum:
        result += next;
        break;
      case ReduceOp::prod:
        result *= next;
        break;
      case ReduceOp::min:
        result = std::min(result, next);
        break;
      case ReduceOp::max:
        result = std::max(result, next);
        break;
    }
  }
  return result;
}

/// Row-major positions of a tensor split among the ranks along a dimension.
struct Split {
  Dims full;
  int dim;
  std::vector<std::int64_t> sizes;

  Split(Dims share, int d, std::vector<std::int64_t> s) : full(share), dim(d), sizes(std::move(s)) {
    full[dim] = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  }
  [[nodiscard]] Dims share(int r) const {
    Dims shape = full;
    shape[dim] = sizes[static_cast<std::size_t>(r)];
    return shape;
  }
  [[nodiscard]] std::int64_t inner() const {
    std::int64_t product = 1;
    for (int d = dim + 1; d < full.size(); ++d) {
      product *= full[d];
    }
    return product;
  }
  /// The rank that holds element i of the whole, and its number there.
  [[nodiscard]] std::pair<int, std::int64_t> owner(std::int64_t i) const {
    const std::int64_t in = i % inner();
    std::int64_t along = i / inner() % full[dim];
    const std::int64_t outer = i / inner() / full[dim];
    int r = 0;
    while (along >= sizes[static_cast<std::size_t>(r)]) {
      along -= sizes[static_cast<std::size_t>(r++)];
    }
    return {r, (outer * sizes[static_cast<std::size_t>(r)] + along) * inner() + in};
  }
  /// The element of the whole that is element i of rank r's share.
  [[nodiscard]] std::int64_t whole(int r, std::int64_t i) const {
    const std::int64_t size = sizes[static_cast<std::size_t>(r)];
    const std::int64_t begin = std::accumulate(sizes.begin(), sizes.begin() + r, std::int64_t{0});
    const std::int64_t outer = i / inner() / size;
    const std::int64_t along = i / inner() % size + begin;
    return (outer * full[dim] + along) * inner() + i % inner();
  }
};

inline std::vector<std::int64_t> equal_sizes(std::int64_t size) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(ranks()), size);
}
/// 2, 0, 3, 1, 2, 0, ...: one rank with nothing, if there are two ranks or more.
inline std::vector<std::int64_t> unequal_sizes() {
  constexpr std::int64_t kPattern[] = {2, 0, 3, 1};
  std::vector<std::int64_t> sizes;
  for (int r = 0; r < ranks(); ++r) {
    sizes.push_back(kPattern[r % 4]);
  }
  return sizes;
}

inline DeviceTensor tensor(DType dtype, Dims shape, Layout layout = Layout::contiguous) {
  return DeviceTensor(dtype, shape, layout, session().backend->device());
}

inline void check_all_gather(DType dtype, Dims share, int dim, std::vector<std::int64_t> sizes,
                             Layout in, Layout out) {
  const Split split(share, dim, std::move(sizes));
  auto from = tensor(dtype, split.share(rank()), in);
  auto to = tensor(dtype, split.full, out);
  from.fill([](std::int64_t i) { return value(rank(), i); });
  session().transport->all_gather(from.view(), to.view(), dim, split.sizes, session().ref());
  session().wait();
  CHECK(to.differs([&](std::int64_t i) {
    const auto [r, j] = split.owner(i);
    return value(r, j);
  }) == "");
}

inline void check_reduce_scatter(DType dtype, ReduceOp op, Dims share, int dim,
                                 std::vector<std::int64_t> sizes, Layout in, Layout out) {
  const Split split(share, dim, std::move(sizes));
  auto from = tensor(dtype, split.full, in);
  auto to = tensor(dtype, split.share(rank()), out);
  from.fill([op](std::int64_t i) { return input(op, rank(), i); });
  session().transport->reduce_scatter(from.view(), to.view(), dim, split.sizes, op,
                                      session().ref());
  session().wait();
  CHECK(to.differs([&](std::int64_t i) { return reduced(op, split.whole(rank(), i)); }) == "");
}

inline constexpr DType kAllTypes[] = {
    DType::f64, DType::f32,     DType::f16,     DType::bf16, DType::i8,  DType::u8, DType::i32,
    DType::i64, DType::f8_e4m3, DType::f8_e5m2, DType::b8,   DType::i16, DType::u16};
inline constexpr ReduceOp kAllOps[] = {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max};
inline constexpr Layout kLayouts[] = {Layout::contiguous, Layout::transposed, Layout::gapped};

/// A group of all ranks without windows, whose own kernels are not asked for queries and merges.
/// Collective.
inline GroupParts parts(const std::string& name) {
  GroupParts all;
  all.kind = GroupKind::decode_context_parallel;
  all.name = name;
  all.ranks.resize(static_cast<std::size_t>(ranks()));
  std::iota(all.ranks.begin(), all.ranks.end(), 0);
  all.control = world().split(0, rank(), name);
  all.backend = session().backend;
  all.transport = session().backend->connect(*all.control);
  return all;
}

/// Whether the world's ranks have a host each, for NCCL.
inline bool hosts_of_their_own() {
  return session().transport->capabilities().nccl_hosts == ranks();
}

/// Skips on all ranks where a group of them all has no windows, with the policy's reason.
inline bool skip_all_without_windows() {
  const auto decision =
      decide({.enabled = true, .selection = Selection::all()}, GroupKind::tensor_parallel,
             {.tp = ranks(), .pp = 1, .dcp = 1}, session().transport->capabilities());
  return skip_all_if(!decision.nccl_windows.on, "no windows here: " + describe(decision));
}

}  // namespace cohort::test
