// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/float_mode.hpp"
#include "cohort/host/host_stream.hpp"
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

  void correct_partial(const ConstTensorView& out, const ConstTensorView& lses, int rank,
                       LseBase base, const TensorView& corrected, StreamRef stream) override {
    enqueue(
        stream,
        [rank, base](const ConstTensorView& from, const ConstTensorView& all,
                     const TensorView& to) { correct_now(from, all, rank, base, to); },
        out, lses, corrected);
  }

  void merge_lse(const ConstTensorView& lses, LseBase base, const TensorView& merged_lse,
                 StreamRef stream) override {
    enqueue(
        stream,
        [base](const ConstTensorView& all, const TensorView& merged) {
          const DefaultFloatMode mode;
          std::vector<float> row(u(all.shape()[0]));
          for_each_row(merged.shape(), [&](std::int64_t b, std::int64_t h) {
            dcp::merge_weights(read_lses(all, b, h, row), static_cast<int>(row.size()), base,
                               row.data(), at<float>(merged, {b, h}));
          });
        },
        lses, merged_lse);
  }

  void pack_partial(const ConstTensorView& out, const ConstTensorView& lse,
                    const TensorView& pieces, StreamRef stream) override {
    enqueue(
        stream,
        [](const ConstTensorView& from, const ConstTensorView& from_lse, const TensorView& to) {
          const std::int64_t n = to.shape()[0];
          const std::int64_t heads = from.shape()[1] / n;
          const auto piece =
              dcp::packed_piece(from.shape()[0], heads, from.shape()[2], size_of(from.dtype()));
          for (std::int64_t r = 0; r < n; ++r) {
            std::byte* base = at<std::byte>(to, {r});
            copy_dense(base, part_of(from, 1, r * heads, heads), size_of(from.dtype()));
            copy_dense(base + piece.lse_offset, part_of(from_lse, 1, r * heads, heads),
                       sizeof(float));
          }
        },
        out, lse, pieces);
  }

  void merge_pieces(const ConstTensorView& pieces, LseBase base, const TensorView& merged,
                    const TensorView* merged_lse, StreamRef stream) override {
    const std::optional<TensorView> lse =
        merged_lse == nullptr ? std::nullopt : std::optional(*merged_lse);
    enqueue(
        stream,
        [base](const ConstTensorView& from, const TensorView& to,
               const std::optional<TensorView>& to_lse) { merge_now(from, base, to, to_lse); },
        pieces, merged, lse);
  }

 private:
  static std::size_t u(std::int64_t value) noexcept { return static_cast<std::size_t>(value); }

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
  static void correct_now(const ConstTensorView& out, const ConstTensorView& lses, int rank,
                          LseBase base, const TensorView& corrected);
  static void merge_now(const ConstTensorView& pieces, LseBase base, const TensorView& merged,
                        const std::optional<TensorView>& merged_lse);
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

inline void HostOps::correct_now(const ConstTensorView& out, const ConstTensorView& lses, int rank,
                                 LseBase base, const TensorView& corrected) {
  const DefaultFloatMode mode;
  std::vector<float> row(u(lses.shape()[0]));
  for_each_row(out.shape(), [&](std::int64_t b, std::int64_t h) {
    dcp::merge_weights(read_lses(lses, b, h, row), static_cast<int>(row.size()), base, row.data(),
                       nullptr);
    dcp::correct_row(out.dtype(), at<std::byte>(out, {b, h}), row[u(rank)], corrected.dtype(),
                     at<std::byte>(corrected, {b, h}), out.shape()[2]);
  });
}

inline void HostOps::merge_now(const ConstTensorView& pieces, LseBase base,
                               const TensorView& merged,
                               const std::optional<TensorView>& merged_lse) {
  const DefaultFloatMode mode;
  const std::int64_t heads = merged.shape()[1];
  const std::int64_t dim = merged.shape()[2];
  const std::size_t element = size_of(merged.dtype());
  const auto piece = dcp::packed_piece(merged.shape()[0], heads, dim, element);
  const std::size_t n = u(pieces.shape()[0]);
  std::vector<float> row(n);
  std::vector<const void*> rows(n);
  for_each_row(merged.shape(), [&](std::int64_t b, std::int64_t h) {
    const std::size_t i = u(b * heads + h);
    for (std::size_t r = 0; r < n; ++r) {
      const std::byte* base_of_r = at<std::byte>(pieces, {static_cast<std::int64_t>(r)});
      std::memcpy(&row[r], base_of_r + piece.lse_offset + i * sizeof(float), sizeof(float));
      rows[r] = base_of_r + i * u(dim) * element;
    }
    float lse = 0.0F;
    dcp::merge_weights(row.data(), static_cast<int>(n), base, row.data(), &lse);
    dcp::merge_row(merged.dtype(), rows.data(), row.data(), static_cast<int>(n),
                   at<std::byte>(merged, {b, h}), dim);
    if (merged_lse) {
      *at<float>(*merged_lse, {b, h}) = lse;
    }
  });
}

}  // namespace cohort::host
