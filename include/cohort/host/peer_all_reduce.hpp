// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cohort/host/peer_access.hpp"
#include "cohort/host/peer_steps.hpp"
#include "cohort/host/reduce.hpp"
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
  [[nodiscard]] bool reduces_in_place(const ConstTensorView& in, const TensorView& out) const {
    return !is_reduced_by_all(in.bytes()) && in.is_contiguous() && out.is_contiguous() &&
           access_.window_of(in) && access_.window_of(out);
  }

 private:
  // Each rank reduces all of a short tensor itself: one signal instead of three. Beyond, parts that
  // are read in windows win: two processes on two Zen 4 cores take 4.3 µs for 8 KiB in one step and
  // 1.9 µs in parts; at 4 KiB 2.1 and 1.8.
  static constexpr std::size_t kReduceAllBytes = 4 * 1024;

  [[nodiscard]] bool is_reduced_by_all(std::size_t bytes) const noexcept {
    return bytes <= std::min(access_.piece_bytes(), kReduceAllBytes);
  }

  void reduce_all(const Call& call, const ConstTensorView& in, const TensorView& out, ReduceOp op);
  void reduce_parts(const Call& call, const ConstTensorView& in, const TensorView& out,
                    ReduceOp op);

  static constexpr std::size_t kFewBytes = 2048;

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
  if (is_reduced_by_all(in.bytes())) {
    reduce_all(call, in, out, op);
  } else {
    reduce_parts(call, in, out, op);
  }
}

/// Every rank reduces the whole tensor, read from the slots: `in`, which may be `out`, stays the
/// caller's alone.
inline void PeerAllReduce::reduce_all(const Call& call, const ConstTensorView& in,
                                      const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const auto own = whole(in).cursor(element);
  steps_.fill_slot(own, in.numel());
  meeting_.enter(call, kShowsNothing);
  access_.await_all(call);
  // A few lines are in the way of those that are read; many take longer than what follows.
  const bool few = in.bytes() <= kFewBytes;
  if (!few) {
    meeting_.prepare_next(in.bytes());
  }
  const bool dense = in.is_contiguous() && out.is_contiguous();
  for (int r = 0; r < access_.size(); ++r) {
    const std::byte* theirs = r == access_.rank() ? own.at() : meeting_.slot_of(r);
    steps_.peer_ins[to_size(r)] = theirs;
    if (!dense) {
      steps_.sources[to_size(r)] =
          r == access_.rank() ? own : ReadCursor(theirs, dense_layout(in.numel()), element);
    }
  }
  if (dense) {
    reduce(in.dtype(), op, static_cast<std::byte*>(out.data()), steps_.peer_ins, in.numel());
  } else {
    auto writer = whole(out).cursor(element);
    reduce(in.dtype(), op, writer, steps_.sources, in.numel());
  }
  if (few) {
    meeting_.prepare_next(in.bytes());
  }
}

/// Rank r reduces part r, then all gather the parts. In place where every rank's tensors are dense
/// and in windows: part r of `out` is written when only rank r still needs part r of its `in`.
inline void PeerAllReduce::reduce_parts(const Call& call, const ConstTensorView& in,
                                        const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const int rank = access_.rank();
  const int n = access_.size();
  const std::int64_t line = elements_in(64, element);

  Showing showing;
  if (reduces_in_place(in, out)) {
    showing = access_.show(in);
    showing.second = *access_.window_of(out);
  }
  meeting_.enter(call, showing);
  access_.await_all(call);
  bool direct = true;
  for (int r = 0; r < n; ++r) {
    direct = direct && meeting_.ticket_of(r).place == Place::direct;
  }
  for (int r = 0; r < n; ++r) {
    const Ticket& ticket = meeting_.ticket_of(r);
    peer_outs_[to_size(r)] = direct ? access_.peer_memory(ticket.second, r) : nullptr;
    steps_.peer_ins[to_size(r)] = direct ? access_.peer_tensor(ticket, r) : nullptr;
  }

  const std::int64_t stretch = direct ? in.numel() : elements_in(access_.piece_bytes(), element);
  for (std::int64_t first = 0; first < in.numel(); first += stretch) {
    const std::int64_t count = std::min(stretch, in.numel() - first);
    const std::int64_t part = ((count + n - 1) / n + line - 1) / line * line;
    const auto begin = [&](int r) { return std::min(count, r * part); };
    const auto length = [&](int r) { return begin(r + 1) - begin(r); };
    const std::size_t skip = to_size(begin(rank)) * element;
    if (!direct) {
      steps_.fill_slot(whole(in).cursor(element, first), count);
      meeting_.enter();
      meeting_.await_all();
    }
    for (int r = 0; r < n; ++r) {
      const std::byte* theirs = direct ? steps_.peer_ins[to_size(r)] : meeting_.slot_of(r);
      steps_.sources[to_size(r)] =
          r == rank ? whole(in).cursor(element, first + begin(rank))
                    : ReadCursor(theirs + skip, dense_layout(length(rank)), element);
    }
    auto own_out = whole(out).cursor(element, first + begin(rank));
    if (direct) {
      reduce(in.dtype(), op, own_out, steps_.sources, length(rank));
    } else {
      std::byte* slot = meeting_.next_slot();
      const Layout dense = dense_layout(length(rank));
      WriteCursor writer(slot, dense, element);
      reduce(in.dtype(), op, writer, steps_.sources, length(rank));
      ReadCursor reader(slot, dense, element);
      copy(own_out, reader, length(rank));
    }
    meeting_.enter();
    for (int step = 1; step < n; ++step) {
      const int r = (rank + step) % n;
      meeting_.await(r);
      const std::byte* theirs =
          direct ? peer_outs_[to_size(r)] + to_size(begin(r)) * element : meeting_.slot_of(r);
      ReadCursor reader(theirs, dense_layout(length(r)), element);
      auto writer = whole(out).cursor(element, first + begin(r));
      copy(writer, reader, length(r));
    }
  }
  access_.finish(direct);
}

}  // namespace cohort::host
