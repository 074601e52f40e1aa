// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/dcp/lse_merge.hpp"
#include "cohort/dcp/packed_piece.hpp"
#include "cohort/dcp/partials.hpp"
#include "cohort/float_mode.hpp"
#include "cohort/host/host_steps.hpp"
#include "cohort/host/host_stream.hpp"
#include "cohort/host/partial_rows.hpp"
#include "cohort/host/peer_access.hpp"
#include "cohort/host/slot_copy.hpp"
#include "cohort/transport.hpp"

/// \file
/// The DCP step on the host as single passes over the peers' memory: rows are merged where the
/// peers' partial attentions lie, and queries are gathered into their final layout.

namespace cohort::host {

/// Partial attentions and queries are read in windows of the group if they lie there and are large,
/// otherwise in the inbox slots, a stretch of rows at a time. A row is one (sequence, head) pair.
/// Rows that are combined of splits, or empty because a rank has no tokens, are not in memory as
/// they are to be read, and go through the slots.
class HostPeerKernels final : public PeerKernels {
 public:
  HostPeerKernels(PeerAccess& access, std::shared_ptr<Lifeline> lifeline, HostSteps& steps)
      : access_(access),
        lifeline_(std::move(lifeline)),
        steps_(steps),
        meeting_(access.meeting()),
        sources_(u(access.size())),
        lses_(u(access.size())),
        scales_(u(access.size())),
        rows_(u(access.size())),
        places_(u(access.size())) {}

  /// Does nothing: rows go through the slots of the transport in stretches, so no shape needs
  /// larger ones as long as one row fits.
  void reserve(std::size_t) override {}

  [[nodiscard]] inline std::string merge_obstacle(const MergeArguments& arguments) const override;
  /// A gather costs a rendezvous and a copy of what the ranks would merge several times over.
  [[nodiscard]] std::int64_t most_replicated_bytes() const noexcept override { return 16 * 1024; }
  inline void merge_attention(const MergeArguments& arguments, StreamRef stream) override;

  [[nodiscard]] inline std::string gather_obstacle(const ConstTensorView& q_nope,
                                                   const ConstTensorView& q_pe) const override;
  inline void gather_query(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                           const TensorView& q, QueryTypes types, StreamRef stream) override;

 private:
  /// Where a rank's partials of this rank's rows lie, in bytes.
  struct Source {
    const std::byte* out = nullptr;
    const std::byte* lse = nullptr;
    std::int64_t out_token = 0, out_head = 0;  ///< Strides.
    std::int64_t lse_token = 0, lse_head = 0;
    std::int64_t first_out = 0, first_lse = 0;  ///< Subtracted: a slot starts at a later row.
  };
  struct MergeShape {
    dcp::RowBlock<std::int64_t> own;  ///< The rows of this rank.
    std::int64_t widest;              ///< Most rows of a rank.
    std::int64_t dim;
    std::int64_t element;  ///< Bytes.

    [[nodiscard]] std::int64_t row_bytes() const noexcept { return dim * element; }
  };

  static std::size_t u(std::int64_t value) noexcept { return static_cast<std::size_t>(value); }
  static std::int64_t s(std::size_t value) noexcept { return static_cast<std::int64_t>(value); }

  [[nodiscard]] MergeShape shape_of(const MergeArguments& arguments) const {
    const ConstTensorView& out = arguments.partials.out;
    return {arguments.rows.of(access_.rank()), arguments.rows.widest(), out.shape()[3],
            s(size_of(out.dtype()))};
  }
  /// Rows of a piece for one rank that a slot has room for.
  [[nodiscard]] std::int64_t rows_of_piece(std::int64_t bytes_of_row) const noexcept {
    const std::int64_t room = s(access_.piece_bytes()) / access_.size() / 64 * 64;
    return std::max<std::int64_t>(0, (room - 2 * 16) / bytes_of_row);  // two parts, padded to 16
  }

  void merge(const MergeArguments& arguments);
  [[nodiscard]] Call merge_call(const MergeArguments& arguments) const;
  [[nodiscard]] Showing show_partial(const Partials& partials) const;
  void push_pieces(const MergeArguments& arguments, PartialRows& rows, const MergeShape& shape,
                   std::int64_t first, std::int64_t count, std::int64_t pitch_rows);
  [[nodiscard]] Source source_of(const std::byte* out, const std::byte* lse,
                                 std::span<const std::int64_t> strides,
                                 const MergeShape& shape) const;
  [[nodiscard]] Source exposed_source(const Ticket& ticket, int peer, const MergeShape& shape);
  [[nodiscard]] Source pushed_source(int peer, const MergeShape& shape, std::int64_t first,
                                     std::int64_t pitch_rows) const;
  void merge_rows(const MergeArguments& arguments, PartialRows& rows, const MergeShape& shape,
                  std::int64_t first, std::int64_t count);

  void gather(const ConstTensorView& q_nope, const ConstTensorView& q_pe, const TensorView& q,
              QueryTypes types);
  [[nodiscard]] Showing show_query(const ConstTensorView& q_nope,
                                   const ConstTensorView& q_pe) const;

  PeerAccess& access_;
  std::shared_ptr<Lifeline> lifeline_;
  HostSteps& steps_;
  Rendezvous& meeting_;
  // Kept from call to call, so that calls do not allocate; by rank.
  std::vector<Source> sources_;
  std::vector<float> lses_;
  std::vector<float> scales_;
  std::vector<const void*> rows_;
  std::vector<Place> places_;
  std::vector<std::byte> own_row_;  ///< Where this rank's have to be combined.
};

inline std::string HostPeerKernels::merge_obstacle(const MergeArguments& arguments) const {
  const auto shape = shape_of(arguments);
  const std::int64_t row = shape.row_bytes() + s(sizeof(float));
  if (rows_of_piece(row) > 0) {
    return {};
  }
  return fmt::format(
      "a row of {} bytes does not fit into the {} bytes of an inbox slot for each "
      "of {} ranks",
      row, access_.piece_bytes() / u(access_.size()), access_.size());
}

inline std::string HostPeerKernels::gather_obstacle(const ConstTensorView& q_nope,
                                                    const ConstTensorView& q_pe) const {
  const std::int64_t row = (q_nope.shape()[2] + q_pe.shape()[2]) * s(size_of(q_nope.dtype()));
  if (row <= s(access_.piece_bytes())) {
    return {};
  }
  return fmt::format("a row of {} bytes does not fit into an inbox slot of {} bytes", row,
                     access_.piece_bytes());
}

inline void HostPeerKernels::merge_attention(const MergeArguments& arguments, StreamRef stream) {
  steps_.issue();
  enqueue_call(
      lifeline_, stream,
      [this](const MergeArguments& given, std::span<const std::int64_t> counts) {
        with_counts(given, counts,
                    [this](const MergeArguments& all) { steps_.run([&] { merge(all); }); });
      },
      arguments, arguments.rows.counts);
}

/// `out` and `lse` in their windows, if rows can be read there as they are and are large.
inline Showing HostPeerKernels::show_partial(const Partials& partials) const {
  Showing showing;
  showing.place = Place::slot;
  if (!partials.is_plain()) {
    return showing;
  }
  const auto out =
      access_.reads_parts(partials.out.bytes()) ? access_.window_of(partials.out) : std::nullopt;
  const auto lse = access_.window_of(partials.lse);
  if (!out || !lse) {
    return showing;
  }
  showing.place = Place::direct;
  showing.first = *out;
  showing.second = *lse;
  showing.dense = false;
  const auto& out_strides = partials.out.strides();
  const auto& lse_strides = partials.lse.strides();
  showing.strides = {out_strides[1], out_strides[2], lse_strides[1], lse_strides[2]};
  return showing;
}

/// This rank's rows of partials that begin there; strides of out and then of lse, by token and by
/// head.
inline HostPeerKernels::Source HostPeerKernels::source_of(const std::byte* out,
                                                          const std::byte* lse,
                                                          std::span<const std::int64_t> strides,
                                                          const MergeShape& shape) const {
  const std::int64_t word = s(sizeof(float));
  const Source steps{.out_token = strides[0] * shape.element,
                     .out_head = strides[1] * shape.element,
                     .lse_token = strides[2] * word,
                     .lse_head = strides[3] * word};
  const auto& own = shape.own;
  if (own.rows() == 0) {
    return steps;
  }
  Source source = steps;
  source.out = out + own.first_token * steps.out_token + own.first_head * steps.out_head;
  source.lse = lse + own.first_token * steps.lse_token + own.first_head * steps.lse_head;
  return source;
}

inline HostPeerKernels::Source HostPeerKernels::exposed_source(const Ticket& ticket, int peer,
                                                               const MergeShape& shape) {
  return source_of(access_.peer_tensor(ticket, peer), access_.peer_memory(ticket.second, peer),
                   std::span(ticket.strides).first(4), shape);
}

inline HostPeerKernels::Source HostPeerKernels::pushed_source(int peer, const MergeShape& shape,
                                                              std::int64_t first,
                                                              std::int64_t pitch_rows) const {
  const auto piece = dcp::packed_piece(pitch_rows, 1, shape.dim, u(shape.element));
  const std::byte* base = meeting_.slot_of(peer) + u(access_.rank()) * piece.bytes;
  const std::int64_t word = s(sizeof(float));
  return {.out = base,
          .lse = base + piece.lse_offset,
          .out_token = shape.own.heads * shape.row_bytes(),
          .out_head = shape.row_bytes(),
          .lse_token = shape.own.heads * word,
          .lse_head = word,
          .first_out = first * shape.row_bytes(),
          .first_lse = first * word};
}

/// Puts rows [first, first + count) of what every other rank merges into the next slot.
inline void HostPeerKernels::push_pieces(const MergeArguments& arguments, PartialRows& rows,
                                         const MergeShape& shape, std::int64_t first,
                                         std::int64_t count, std::int64_t pitch_rows) {
  const Partials& partials = arguments.partials;
  const auto piece = dcp::packed_piece(pitch_rows, 1, shape.dim, u(shape.element));
  for (int r = 0; r < access_.size(); ++r) {
    const auto block = arguments.rows.of(r);
    const std::int64_t end = std::min(block.rows(), first + count);
    if (r == access_.rank() || first >= end) {
      continue;
    }
    std::byte* base = meeting_.next_slot() + u(r) * piece.bytes;
    if (partials.is_plain()) {
      auto out = part_of_block(partials.out, block).cursor(u(shape.element), first * shape.dim);
      copy_to_slot(base, out, (end - first) * shape.dim);
      auto lse = part_of_block(partials.lse, block).cursor(sizeof(float), first);
      copy_to_slot(base + piece.lse_offset, lse, end - first);
      continue;
    }
    const DefaultFloatMode mode;
    for (std::int64_t i = first; i < end; ++i) {
      const auto place = block.place(i, i / block.heads);
      const float lse =
          rows.read(place.token, place.head, base + u((i - first) * shape.row_bytes()));
      std::memcpy(base + piece.lse_offset + u(i - first) * sizeof(float), &lse, sizeof(float));
    }
  }
}

/// Merges rows [first, first + count) of this rank's from `sources_`.
inline void HostPeerKernels::merge_rows(const MergeArguments& arguments, PartialRows& rows,
                                        const MergeShape& shape, std::int64_t first,
                                        std::int64_t count) {
  const DefaultFloatMode mode;
  const int n = access_.size();
  const Partials& partials = arguments.partials;
  const bool plain = partials.is_plain();
  const auto& merged = arguments.merged.strides();
  auto* merged_base = static_cast<std::byte*>(arguments.merged.data());
  const std::int64_t heads = std::max<std::int64_t>(1, shape.own.heads);
  std::int64_t b = first / heads;
  std::int64_t j = first - b * heads;
  for (std::int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < n; ++r) {
      if (r == access_.rank() && !plain) {
        const auto place = shape.own.place(first + i, b);
        const auto own = rows.at(place.token, place.head, own_row_.data());
        lses_[u(r)] = own.lse;
        rows_[u(r)] = own.out;
        continue;
      }
      const Source& source = sources_[u(r)];
      std::memcpy(&lses_[u(r)],
                  source.lse + (b * source.lse_token + j * source.lse_head - source.first_lse),
                  sizeof(float));
      rows_[u(r)] = source.out + (b * source.out_token + j * source.out_head - source.first_out);
    }
    float merged_lse = 0.0F;
    dcp::merge_weights(lses_.data(), n, partials.base, scales_.data(), &merged_lse,
                       sink_of(partials, shape.own.first_head + j));
    dcp::merge_row(partials.out.dtype(), rows_.data(), scales_.data(), n,
                   merged_base + (b * merged[0] + j * merged[1]) * shape.element, shape.dim);
    if (arguments.lse) {
      const auto& strides = arguments.lse->strides();
      static_cast<float*>(arguments.lse->data())[b * strides[0] + j * strides[1]] = merged_lse;
    }
    if (++j == heads) {
      j = 0;
      ++b;
    }
  }
}

/// What the ranks compare of a merge.
inline Call HostPeerKernels::merge_call(const MergeArguments& arguments) const {
  const Partials& partials = arguments.partials;
  Call call{.operation = Operation::merge_attention,
            .dtype = partials.out.dtype(),
            .variant = static_cast<std::uint8_t>(partials.base),
            .bytes = partials.out.bytes()};
  call.mix(dcp::merge_form(arguments));
  return call;
}

inline void HostPeerKernels::merge(const MergeArguments& arguments) {
  meeting_.departure().check_usable("merge_attention");
  const cohort::detail::CallTime time;
  const MergeShape shape = shape_of(arguments);
  const Partials& partials = arguments.partials;
  const Call call = merge_call(arguments);
  const std::int64_t pitch =
      std::min(shape.widest, rows_of_piece(shape.row_bytes() + s(sizeof(float))));
  if (pitch == 0 && shape.widest > 0) {
    throw UsageError("merge_attention: " + merge_obstacle(arguments));
  }
  PartialRows rows(partials);
  if (!partials.is_plain()) {
    own_row_.resize(u(shape.row_bytes()));
  }
  const Showing showing = show_partial(partials);
  const bool exposed = showing.place == Place::direct;
  if (!exposed) {
    push_pieces(arguments, rows, shape, 0, pitch, pitch);
  }
  meeting_.enter(call, showing);
  access_.await_all(call);
  meeting_.prepare_next(
      exposed ? 0
              : u(access_.size()) * dcp::packed_piece(pitch, 1, shape.dim, u(shape.element)).bytes);

  bool through_slots = !exposed;
  for (int r = 0; r < access_.size(); ++r) {
    const Ticket& ticket = meeting_.ticket_of(r);
    places_[u(r)] = r == access_.rank() ? Place::nowhere : ticket.place;
    if (r == access_.rank()) {
      const Dims& out = partials.out.strides();
      const Dims& lse = partials.lse.strides();
      const std::array strides{out[1], out[2], lse[1], lse[2]};
      sources_[u(r)] =
          source_of(static_cast<const std::byte*>(partials.out.data()),
                    static_cast<const std::byte*>(partials.lse.data()), strides, shape);
    } else if (ticket.place == Place::direct) {
      sources_[u(r)] = exposed_source(ticket, r, shape);
    } else {
      through_slots = true;
    }
  }
  const std::int64_t stretch = through_slots ? pitch : shape.widest;
  for (std::int64_t first = 0; first < shape.widest; first += stretch) {
    const std::int64_t count = std::min(stretch, shape.widest - first);
    if (first > 0) {
      if (!exposed) {
        push_pieces(arguments, rows, shape, first, count, pitch);
      }
      meeting_.enter();
      meeting_.await_all();
    }
    for (int r = 0; r < access_.size(); ++r) {
      if (places_[u(r)] == Place::slot) {
        sources_[u(r)] = pushed_source(r, shape, first, pitch);
      }
    }
    merge_rows(arguments, rows, shape, first, std::min(count, shape.own.rows() - first));
  }
  access_.finish(exposed);
}

inline void HostPeerKernels::gather_query(const ConstTensorView& q_nope,
                                          const ConstTensorView& q_pe, const TensorView& q,
                                          QueryTypes types, StreamRef stream) {
  steps_.issue();
  enqueue_call(
      lifeline_, stream,
      [this, types](const ConstTensorView& nope, const ConstTensorView& pe, const TensorView& to) {
        steps_.run([&] { gather(nope, pe, to, types); });
      },
      q_nope, q_pe, q);
}

/// Both parts of the query in their windows, if both lie in one and are large.
inline Showing HostPeerKernels::show_query(const ConstTensorView& q_nope,
                                           const ConstTensorView& q_pe) const {
  Showing showing;
  const auto nope = access_.window_of(q_nope);
  const auto pe = access_.window_of(q_pe);
  if (!nope || !pe || !access_.reads_windows(q_nope.bytes() + q_pe.bytes())) {
    showing.place = Place::slot;
    return showing;
  }
  showing.place = Place::direct;
  showing.first = *nope;
  showing.second = *pe;
  showing.dense = false;
  for (int d = 0; d < 3; ++d) {
    showing.strides[u(d)] = q_nope.strides()[d];
    showing.strides[u(d + 3)] = q_pe.strides()[d];
  }
  return showing;
}

inline void HostPeerKernels::gather(const ConstTensorView& q_nope, const ConstTensorView& q_pe,
                                    const TensorView& q, QueryTypes types) {
  meeting_.departure().check_usable("gather_query");
  const cohort::detail::CallTime time;
  Call call{.operation = Operation::gather_query, .dtype = q.dtype(), .bytes = q.bytes()};
  for (const std::int64_t word : {q.shape()[0], q.shape()[1], q_nope.shape()[2], types.number()}) {
    call.mix(word);
  }
  const std::size_t element = size_of(q.dtype());
  const std::int64_t heads = q_nope.shape()[1];
  const std::int64_t rows = q_nope.shape()[0] * heads;
  const std::int64_t nope_dim = q_nope.shape()[2];
  const std::int64_t pe_dim = q_pe.shape()[2];
  const std::int64_t row_bytes = std::max<std::int64_t>(1, (nope_dim + pe_dim) * s(element));
  const std::int64_t pitch = std::min(rows, s(access_.piece_bytes()) / row_bytes);
  if (pitch == 0 && rows > 0) {
    throw UsageError("gather_query: " + gather_obstacle(q_nope, q_pe));
  }
  const std::size_t pe_offset = u(pitch * nope_dim) * element;

  const auto push = [&](std::int64_t first, std::int64_t count) {
    auto nope = whole(q_nope).cursor(element, first * nope_dim);
    auto pe = whole(q_pe).cursor(element, first * pe_dim);
    copy_to_slot(meeting_.next_slot(), nope, count * nope_dim);
    copy_to_slot(meeting_.next_slot() + pe_offset, pe, count * pe_dim);
  };
  // The heads of rank r in `q`: one part for q_nope, one for q_pe.
  const auto target = [&](int r, std::int64_t skip, std::int64_t dim) {
    const auto& strides = q.strides();
    return Part<std::byte>{static_cast<std::byte*>(q.data()) +
                               (r * heads * strides[1] + skip * strides[2]) * s(element),
                           collapse(Dims{q.shape()[0], heads, dim}, strides)};
  };
  const auto place = [&](int r, std::int64_t first, std::int64_t count, ReadCursor nope,
                         ReadCursor pe) {
    auto nope_to = target(r, 0, nope_dim).cursor(element, first * nope_dim);
    auto pe_to = target(r, nope_dim, pe_dim).cursor(element, first * pe_dim);
    copy(nope_to, nope, count * nope_dim);
    copy(pe_to, pe, count * pe_dim);
  };

  const Showing showing = show_query(q_nope, q_pe);
  const bool exposed = showing.place == Place::direct;
  if (!exposed) {
    push(0, pitch);
  }
  meeting_.enter(call, showing);
  const int rank = access_.rank();
  place(rank, 0, rows, whole(q_nope).cursor(element), whole(q_pe).cursor(element));
  bool through_slots = !exposed;
  for (int step = 1; step < access_.size(); ++step) {
    const int r = (rank + step) % access_.size();
    const Ticket& ticket = access_.await(r, call);
    if (step == access_.size() - 1) {
      meeting_.prepare_next(exposed ? 0 : pe_offset + u(pitch * pe_dim) * element);
    }
    places_[u(r)] = ticket.place;
    if (ticket.place == Place::direct) {
      const Dims strides{std::span(ticket.strides).first(3)};
      const Dims pe_strides{std::span(ticket.strides).subspan(3, 3)};
      place(r, 0, rows,
            {access_.peer_tensor(ticket, r), collapse(q_nope.shape(), strides), element},
            {access_.peer_memory(ticket.second, r), collapse(q_pe.shape(), pe_strides), element});
    } else {
      through_slots = true;
    }
  }
  for (std::int64_t first = 0; through_slots && first < rows; first += pitch) {
    const std::int64_t count = std::min(pitch, rows - first);
    if (first > 0) {
      if (!exposed) {
        push(first, count);
      }
      meeting_.enter();
      meeting_.await_all();
    }
    for (int step = 1; step < access_.size(); ++step) {
      const int r = (rank + step) % access_.size();
      if (places_[u(r)] == Place::slot) {
        place(r, first, count, {meeting_.slot_of(r), dense_layout(count * nope_dim), element},
              {meeting_.slot_of(r) + pe_offset, dense_layout(count * pe_dim), element});
      }
    }
  }
  access_.finish(exposed);
}

}  // namespace cohort::host
