// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cohort/host/peer_access.hpp"
#include "cohort/host/peer_steps.hpp"
#include "cohort/host/reduce.hpp"
#include "cohort/host/slot_copy.hpp"
#include "cohort/host/slot_sizes.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"

/// \file
/// The all-reduce of ranks that map each other's memory: each reduces all of a short tensor, and
/// its part of a long one.

namespace cohort::host {

/// Throws as `PeerCollectives`.
class PeerAllReduce {
 public:
  explicit PeerAllReduce(PeerSteps& steps)
      : steps_(steps),
        access_(steps.access),
        meeting_(steps.meeting),
        peer_outs_(to_size(steps.access.size())) {}

  /// @param form  What the ranks have to agree on besides.
  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op, std::int64_t form);

  /// Whether this rank's tensors allow an all_reduce that passes no slot. It takes place if those
  /// of every rank do.
  [[nodiscard]] bool passes_no_slot(const ConstTensorView& in, const TensorView& out) const {
    return !each_reduces_all(in.bytes()) && access_.reads_parts(in.bytes()) && in.is_contiguous() &&
           out.is_contiguous() && access_.window_of(in) && access_.window_of(out);
  }

 private:
  [[nodiscard]] bool each_reduces_all(std::size_t bytes) const noexcept {
    return is_reduced_by_all(bytes, access_.size(), access_.piece_bytes());
  }

  void reduce_all(const Call& call, const ConstTensorView& in, const TensorView& out, ReduceOp op);
  void reduce_parts(const Call& call, const ConstTensorView& in, const TensorView& out,
                    ReduceOp op);

  /// How a stretch is shared out: whole lines for each rank.
  struct Parts {
    Parts(std::int64_t elements, int ranks, std::size_t element_bytes) : count(elements) {
      const std::int64_t line = elements_in(64, element_bytes);
      each = ((count + ranks - 1) / ranks + line - 1) / line * line;
    }
    [[nodiscard]] std::int64_t begin(int rank) const noexcept {
      return std::min(count, rank * each);
    }
    [[nodiscard]] std::int64_t length(int rank) const noexcept {
      return begin(rank + 1) - begin(rank);
    }

    std::int64_t count;
    std::int64_t each;
  };

  static constexpr std::size_t kBatchBytes = 4 * 1024;
  // Beyond these, fetching the next slot is in the way of what is read.
  static constexpr std::size_t kFewBytes = 2048;
  static constexpr std::size_t kPreparedBytes = 4 * 1024;

  PeerSteps& steps_;
  PeerAccess& access_;
  Rendezvous& meeting_;
  std::vector<const std::byte*> peer_outs_;  // by rank; kept, so that calls do not allocate
};

inline void PeerAllReduce::all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                                      std::int64_t form) {
  Call call = call_of(Operation::all_reduce, in);
  call.variant = static_cast<std::uint8_t>(op);
  call.mix(form);
  if (each_reduces_all(in.bytes())) {
    reduce_all(call, in, out, op);
  } else {
    reduce_parts(call, in, out, op);
  }
}

/// Every rank reduces the whole tensor. `in`, which may be `out`, stays the caller's alone.
inline void PeerAllReduce::reduce_all(const Call& call, const ConstTensorView& in,
                                      const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const std::size_t bytes = in.bytes();
  const int rank = access_.rank();
  const auto* const own = static_cast<const std::byte*>(in.data());
  if (in.is_contiguous()) {
    steps_.fill_slot(own, bytes);
  } else {
    steps_.fill_slot(whole(in).cursor(element), in.numel());
  }
  meeting_.enter(call, kShowsSlot);
  for (int r = 0; r < access_.size(); ++r) {
    if (r != rank) {
      access_.await(r, call);
    }
    steps_.peer_ins[to_size(r)] = r == rank ? own : meeting_.slot_of(r);
  }
  // A few lines are in the way of those that are read; many take longer than what follows.
  const bool prepares = bytes <= kPreparedBytes;
  const bool few = bytes <= kFewBytes;
  if (prepares && !few) {
    meeting_.prepare_next(bytes);
  }
  if (in.is_contiguous() && out.is_contiguous()) {
    reduce(in.dtype(), op, static_cast<std::byte*>(out.data()), steps_.peer_ins, in.numel());
  } else {
    for (int r = 0; r < access_.size(); ++r) {
      steps_.sources[to_size(r)] =
          r == rank ? whole(in).cursor(element)
                    : ReadCursor(steps_.peer_ins[to_size(r)], dense_layout(in.numel()), element);
    }
    auto writer = whole(out).cursor(element);
    reduce(in.dtype(), op, writer, steps_.sources, in.numel());
  }
  if (prepares && few) {
    meeting_.prepare_next(bytes);
  }
}

/// Rank r reduces part r, then all gather the parts. In place where every rank's tensors are dense
/// and in windows: part r of `out` is written when only rank r still needs part r of its `in`.
inline void PeerAllReduce::reduce_parts(const Call& call, const ConstTensorView& in,
                                        const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const int rank = access_.rank();
  const int n = access_.size();
  const auto piece = elements_in(access_.piece_bytes(), element);
  const auto fill = [&](std::int64_t first, const Parts& parts) {  // what the peers reduce
    const auto put = [&](std::int64_t begin, std::int64_t end) {
      steps_.fill_slot(whole(in).cursor(element, first + begin), end - begin,
                       to_size(begin) * element);
    };
    put(0, parts.begin(rank));
    put(parts.begin(rank + 1), parts.count);
  };

  Showing showing = kShowsSlot;
  if (passes_no_slot(in, out)) {
    showing = access_.show(in, true);
    showing.second = *access_.window_of(out);
  } else {
    fill(0, Parts(std::min(piece, in.numel()), n, element));
  }
  meeting_.enter(call, showing);
  access_.await_all(call);
  bool direct = true;
  bool filled = true;
  for (int r = 0; r < n; ++r) {
    const bool shows = meeting_.ticket_of(r).place == Place::direct;
    direct = direct && shows;
    filled = filled && !shows;
  }
  for (int r = 0; r < n; ++r) {
    const Ticket& ticket = meeting_.ticket_of(r);
    peer_outs_[to_size(r)] = direct ? access_.peer_memory(ticket.second, r) : nullptr;
    steps_.peer_ins[to_size(r)] = direct ? access_.peer_tensor(ticket, r) : nullptr;
  }

  const std::int64_t stretch = direct ? in.numel() : piece;
  for (std::int64_t first = 0; first < in.numel(); first += stretch) {
    const Parts parts(std::min(stretch, in.numel() - first), n, element);
    if (!direct && (first > 0 || !filled)) {
      fill(first, parts);
      meeting_.enter();
      meeting_.await_all();
    }
    const std::size_t skip = to_size(parts.begin(rank)) * element;
    const std::int64_t own = parts.length(rank);
    for (int r = 0; r < n; ++r) {
      const std::byte* theirs = direct ? steps_.peer_ins[to_size(r)] : meeting_.slot_of(r);
      steps_.sources[to_size(r)] = r == rank
                                       ? whole(in).cursor(element, first + parts.begin(rank))
                                       : ReadCursor(theirs + skip, dense_layout(own), element);
    }
    auto sums = whole(out).cursor(element, first + parts.begin(rank));
    if (direct) {
      reduce(in.dtype(), op, sums, steps_.sources, own);
    } else {
      // While they are in the nearest cache.
      auto reader = whole(ConstTensorView(out)).cursor(element, first + parts.begin(rank));
      const std::int64_t batch = elements_in(kBatchBytes, element);
      for (std::int64_t i = 0; i < own; i += batch) {
        const std::int64_t count = std::min(batch, own - i);
        reduce(in.dtype(), op, sums, steps_.sources, count);
        copy_to_slot(meeting_.next_slot() + to_size(i) * element, reader, count);
      }
    }
    meeting_.enter();
    for (int step = 1; step < n; ++step) {
      const int r = (rank + step) % n;
      meeting_.await(r);
      const std::byte* theirs =
          direct ? peer_outs_[to_size(r)] + to_size(parts.begin(r)) * element : meeting_.slot_of(r);
      ReadCursor reader(theirs, dense_layout(parts.length(r)), element);
      auto writer = whole(out).cursor(element, first + parts.begin(r));
      copy(writer, reader, parts.length(r));
    }
  }
  access_.finish(direct);
}

}  // namespace cohort::host
