// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/dcp/partials.hpp"
#include "cohort/float_mode.hpp"
#include "cohort/host/host_norm.hpp"
#include "cohort/host/host_stream.hpp"
#include "cohort/host/partial_rows.hpp"
#include "cohort/host/peer_access.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"

/// \file
/// The DCP step's local arithmetic on the host.

namespace cohort::host {

class HostOps final : public TensorOps {
 public:
  void copy(const ConstTensorView& from, const TensorView& to, StreamRef stream) override {
    enqueue(
        stream, [](const ConstTensorView& f, const TensorView& t) { copy_now(f, t); }, from, to);
  }

  void place_step(const dcp::KvRows& rows, StreamRef stream) override {
    enqueue(
        stream,
        [](const dcp::KvRows& step) {
          for (std::int64_t b = 0; b < step.batch; ++b) {
            for (std::int64_t j = 0; j < step.queries; ++j) {
              step.place(b, j);
            }
          }
        },
        rows);
  }

  void pack_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                  const TensorView& packed, StreamRef stream) override {
    enqueue(
        stream,
        [](const ConstTensorView& nope, const ConstTensorView& pe, const TensorView& to) {
          copy_now(nope, to.slice(2, 0, nope.shape()[2]));
          copy_now(pe, to.slice(2, nope.shape()[2], pe.shape()[2]));
        },
        q_nope, q_pe, packed);
  }

  void local_lse(const Partials& partials, const TensorView& lse, StreamRef stream) override {
    enqueue(
        stream,
        [](const Partials& from, const TensorView& to) {
          const DefaultFloatMode mode;
          PartialRows rows(from);
          for_each_row(to.shape(), [&](std::int64_t b, std::int64_t h) {
            *at<float>(to, {b, h}) = rows.lse(b, h);
          });
        },
        partials, lse);
  }

  void correct_partial(const Partials& partials, const ConstTensorView& lses, int rank,
                       const TensorView& corrected, StreamRef stream) override {
    enqueue(
        stream,
        [rank](const Partials& from, const ConstTensorView& all, const TensorView& to) {
          correct_now(from, all, rank, to);
        },
        partials, lses, corrected);
  }

  void merge_lse(const ConstTensorView& lses, const MergeArguments& arguments, int rank,
                 StreamRef stream) override {
    enqueue(
        stream,
        [rank](const ConstTensorView& all, const MergeArguments& given,
               std::span<const std::int64_t> counts) {
          with_counts(given, counts, [&](const MergeArguments& a) { merge_lse_now(all, a, rank); });
        },
        lses, arguments, arguments.rows.counts);
  }

  void pack_partial(const MergeArguments& arguments, const TensorView& pieces,
                    StreamRef stream) override {
    enqueue(
        stream,
        [](const MergeArguments& given, std::span<const std::int64_t> counts,
           const TensorView& to) {
          with_counts(given, counts, [&](const MergeArguments& a) { pack_now(a, to); });
        },
        arguments, arguments.rows.counts, pieces);
  }

  void merge_pieces(const ConstTensorView& pieces, const MergeArguments& arguments, int rank,
                    StreamRef stream) override {
    enqueue(
        stream,
        [rank](const ConstTensorView& from, const MergeArguments& given,
               std::span<const std::int64_t> counts) {
          with_counts(given, counts, [&](const MergeArguments& a) { merge_now(from, a, rank); });
        },
        pieces, arguments, arguments.rows.counts);
  }

  void rms_norm(const NormArguments& arguments, StreamRef stream) override {
    enqueue(
        stream, [](const NormArguments& given) { norm_rows(given); }, arguments);
  }

  [[nodiscard]] bool merge_alone(const MergeArguments& arguments, StreamRef stream) override {
    enqueue(
        stream, [](const MergeArguments& given) { alone_now(given); }, arguments);
    return true;
  }

 private:
  static std::size_t u(std::int64_t value) noexcept { return static_cast<std::size_t>(value); }
  static std::int64_t s(std::size_t value) noexcept { return static_cast<std::int64_t>(value); }

  /// The element at an index; further dimensions at 0.
  template <class T, class Void>
  static std::conditional_t<std::is_const_v<Void>, const T, T>* at(
      const BasicTensorView<Void>& view, std::initializer_list<std::int64_t> index) {
    std::int64_t offset = 0;
    int d = 0;
    for (const auto i : index) {
      offset += i * view.strides()[d++];
    }
    using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
    using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
    return reinterpret_cast<Element*>(static_cast<Byte*>(view.data()) +
                                      offset * static_cast<std::int64_t>(size_of(view.dtype())));
  }

  template <class Row>
  static void for_each_row(const Dims& shape, const Row& row) {
    for (std::int64_t b = 0; b < shape[0]; ++b) {
      for (std::int64_t h = 0; h < shape[1]; ++h) {
        row(b, h);
      }
    }
  }

  static void copy_dense(std::byte* to, const Part<const std::byte>& from, std::size_t element) {
    host::copy(to, dense_layout(from.layout.numel), from.base, from.layout, element);
  }

  /// The LSEs of all ranks for one row, from [n, B, h].
  static const float* read_lses(const ConstTensorView& lses, std::int64_t b, std::int64_t h,
                                std::vector<float>& row) {
    for (std::size_t r = 0; r < row.size(); ++r) {
      row[r] = *at<float>(lses, {static_cast<std::int64_t>(r), b, h});
    }
    return row.data();
  }

  static void copy_now(const ConstTensorView& from, const TensorView& to);
  template <class To>
  static void convert(const ConstTensorView& from, const TensorView& to);
  static void correct_now(const Partials& partials, const ConstTensorView& lses, int rank,
                          const TensorView& corrected);
  static void merge_lse_now(const ConstTensorView& lses, const MergeArguments& arguments, int rank);
  static void pack_now(const MergeArguments& arguments, const TensorView& pieces);
  static void merge_now(const ConstTensorView& pieces, const MergeArguments& arguments, int rank);
  static void alone_now(const MergeArguments& arguments);
};

inline void HostOps::copy_now(const ConstTensorView& from, const TensorView& to) {
  if (from.dtype() == to.dtype()) {
    const auto source = whole(from);
    const auto target = whole(to);
    host::copy(target.base, target.layout, source.base, source.layout, size_of(from.dtype()));
  } else if (from.dtype() == DType::f32 && to.dtype() == DType::bf16) {
    convert<BFloat16>(from, to);
  } else if (from.dtype() == DType::f32 && to.dtype() == DType::f16) {
    convert<Half>(from, to);
  } else {
    throw UsageError(fmt::format("copy: expected equal types, or f32 to f16 or bf16, got {} to {}",
                                 to_string(from.dtype()), to_string(to.dtype())));
  }
}

template <class To>
void HostOps::convert(const ConstTensorView& from, const TensorView& to) {
  constexpr std::int64_t kBlock = 64;
  const DefaultFloatMode mode;
  auto reader = whole(from).cursor(sizeof(float));
  auto writer = whole(to).cursor(sizeof(To));
  for (std::int64_t done = 0; done < from.numel(); done += kBlock) {
    const std::int64_t count = std::min(kBlock, from.numel() - done);
    float floats[kBlock] = {};
    To rounded[kBlock];
    WriteCursor gather(reinterpret_cast<std::byte*>(floats), dense_layout(count), sizeof(float));
    host::copy(gather, reader, count);
    for (std::int64_t i = 0; i < kBlock; ++i) {
      rounded[i] = To(floats[i]);
    }
    ReadCursor scatter(reinterpret_cast<const std::byte*>(rounded), dense_layout(count),
                       sizeof(To));
    host::copy(writer, scatter, count);
  }
}

inline void HostOps::correct_now(const Partials& partials, const ConstTensorView& lses, int rank,
                                 const TensorView& corrected) {
  const DefaultFloatMode mode;
  PartialRows rows(partials);
  const ConstTensorView& out = partials.out;
  const bool plain = partials.is_plain();
  std::vector<std::byte> combined(plain ? 0 : u(out.shape()[3]) * size_of(out.dtype()));
  std::vector<float> row(u(lses.shape()[0]));
  for_each_row(corrected.shape(), [&](std::int64_t b, std::int64_t h) {
    dcp::merge_weights(read_lses(lses, b, h, row), static_cast<int>(row.size()), partials.base,
                       row.data(), nullptr, sink_of(partials, h));
    const float scale = row[u(rank)];
    const std::byte* from = at<std::byte>(out, {0, b, h});
    if (!plain && scale != 0.0F) {
      static_cast<void>(rows.read(b, h, combined.data()));
      from = combined.data();
    }
    dcp::correct_row(out.dtype(), from, scale, corrected.dtype(), at<std::byte>(corrected, {b, h}),
                     out.shape()[3]);
  });
}

inline void HostOps::merge_lse_now(const ConstTensorView& lses, const MergeArguments& arguments,
                                   int rank) {
  const DefaultFloatMode mode;
  const auto block = arguments.rows.of(rank);
  std::vector<float> row(u(lses.shape()[0]));
  for_each_row(arguments.lse->shape(), [&](std::int64_t b, std::int64_t j) {
    const auto place = block.place(b * block.heads + j, b);
    dcp::merge_weights(read_lses(lses, place.token, place.head, row), static_cast<int>(row.size()),
                       arguments.partials.base, row.data(), at<float>(*arguments.lse, {b, j}),
                       sink_of(arguments.partials, place.head));
  });
}

inline void HostOps::pack_now(const MergeArguments& arguments, const TensorView& pieces) {
  const DefaultFloatMode mode;
  const ConstTensorView& out = arguments.partials.out;
  const std::int64_t dim = out.shape()[3];
  const std::size_t element = size_of(out.dtype());
  const auto piece = dcp::packed_piece(arguments.rows.widest(), 1, dim, element);
  PartialRows rows(arguments.partials);
  for (int r = 0; r < arguments.rows.ranks; ++r) {
    const auto block = arguments.rows.of(r);
    std::byte* to = at<std::byte>(pieces, {r});
    if (arguments.partials.is_plain()) {
      copy_dense(to, part_of_block(out, block), element);
      copy_dense(to + piece.lse_offset, part_of_block(arguments.partials.lse, block),
                 sizeof(float));
      continue;
    }
    for (std::int64_t i = 0; i < block.rows(); ++i) {
      const auto place = block.place(i, i / block.heads);
      const float lse = rows.read(place.token, place.head, to + u(i) * u(dim) * element);
      std::memcpy(to + piece.lse_offset + u(i) * sizeof(float), &lse, sizeof(float));
    }
  }
}

inline void HostOps::merge_now(const ConstTensorView& pieces, const MergeArguments& arguments,
                               int rank) {
  const DefaultFloatMode mode;
  const TensorView& merged = arguments.merged;
  const auto block = arguments.rows.of(rank);
  const std::int64_t dim = merged.shape()[2];
  const std::size_t element = size_of(merged.dtype());
  const auto piece = dcp::packed_piece(arguments.rows.widest(), 1, dim, element);
  const std::size_t n = u(pieces.shape()[0]);
  std::vector<float> row(n);
  std::vector<const void*> rows(n);
  for_each_row(merged.shape(), [&](std::int64_t b, std::int64_t j) {
    const std::size_t i = u(b * block.heads + j);
    for (std::size_t r = 0; r < n; ++r) {
      const std::byte* base_of_r = at<std::byte>(pieces, {static_cast<std::int64_t>(r)});
      std::memcpy(&row[r], base_of_r + piece.lse_offset + i * sizeof(float), sizeof(float));
      rows[r] = base_of_r + i * u(dim) * element;
    }
    float lse = 0.0F;
    dcp::merge_weights(row.data(), static_cast<int>(n), arguments.partials.base, row.data(), &lse,
                       sink_of(arguments.partials, block.place(s(i), b).head));
    dcp::merge_row(merged.dtype(), rows.data(), row.data(), static_cast<int>(n),
                   at<std::byte>(merged, {b, j}), dim);
    if (arguments.lse) {
      *at<float>(*arguments.lse, {b, j}) = lse;
    }
  });
}

inline void HostOps::alone_now(const MergeArguments& arguments) {
  const DefaultFloatMode mode;
  const Partials& partials = arguments.partials;
  const TensorView& merged = arguments.merged;
  const DType dtype = merged.dtype();
  const std::int64_t dim = merged.shape()[2];
  PartialRows rows(partials);
  std::vector<std::byte> room(partials.splits() == 1 ? 0 : u(dim) * size_of(dtype));
  for_each_row(merged.shape(), [&](std::int64_t b, std::int64_t h) {
    const auto row = rows.at(b, h, room.data());
    float scale = 0.0F;
    float lse = 0.0F;
    dcp::merge_weights(&row.lse, 1, partials.base, &scale, &lse, sink_of(partials, h));
    dcp::merge_row(dtype, &row.out, &scale, 1, at<std::byte>(merged, {b, h}), dim);
    if (arguments.lse) {
      *at<float>(*arguments.lse, {b, h}) = lse;
    }
  });
}

}  // namespace cohort::host
