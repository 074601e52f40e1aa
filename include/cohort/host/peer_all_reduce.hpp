// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
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
  /// of every rank do; a short tensor of this rank is then read where it lies in any case.
  [[nodiscard]] bool passes_no_slot(const ConstTensorView& in, const TensorView& out) const {
    return is_reduced_by_all(in.bytes()) ? shown_in(in, out.data()).has_value()
                                         : in.is_contiguous() && out.is_contiguous() &&
                                               access_.window_of(in) && access_.window_of(out);
  }
  /// The same where the sum goes to memory of the transport's.
  [[nodiscard]] bool passes_no_slot(const ConstTensorView& in) const {
    return is_reduced_by_all(in.bytes()) && shown_in(in, nullptr);
  }

 private:
  // Each rank reduces all of a short tensor itself: one signal, or two where it is read in a
  // window, for three. Two ranks send each other as many bytes that way as in parts; more of them
  // send fewer in parts.
  static constexpr std::size_t kReduceAllBytes = 4 * 1024;

  [[nodiscard]] bool is_reduced_by_all(std::size_t bytes) const noexcept {
    return bytes <= (access_.size() == 2 ? access_.piece_bytes()
                                         : std::min(access_.piece_bytes(), kReduceAllBytes));
  }

  /// The window in which the peers read a short tensor, if they do: the result is written
  /// elsewhere, because each of them reads all of it.
  [[nodiscard]] std::optional<WindowOffset> shown_in(const ConstTensorView& in,
                                                     const void* out) const {
    const bool may_be_read =
        in.bytes() >= kShownBytes && access_.size() == 2 && in.is_contiguous() && in.data() != out;
    return may_be_read ? access_.window_of(in) : std::nullopt;
  }

  void reduce_all(const Call& call, const ConstTensorView& in, const TensorView& out, ReduceOp op);
  void reduce_parts(const Call& call, const ConstTensorView& in, const TensorView& out,
                    ReduceOp op);

  // Two threads on two Zen 5 cores: through the slots 0.68 µs for 2 KiB, 0.82 for 4 KiB and 1.07
  // for 8 KiB, in windows 0.61 to 0.63; in parts 1.85 for 8 KiB.
  static constexpr std::size_t kShownBytes = 4 * 1024;
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
  if (is_reduced_by_all(in.bytes())) {
    reduce_all(call, in, out, op);
  } else {
    reduce_parts(call, in, out, op);
  }
}

/// Every rank reduces the whole tensor. `in`, which may be `out`, stays the caller's alone, or is
/// read by the peers where `out` lies elsewhere.
inline void PeerAllReduce::reduce_all(const Call& call, const ConstTensorView& in,
                                      const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const std::size_t bytes = in.bytes();
  const int rank = access_.rank();
  const auto* const own = static_cast<const std::byte*>(in.data());
  const auto window = shown_in(in, out.data());
  const bool exposed = window.has_value();
  if (exposed) {
    meeting_.enter(call, {.place = Place::direct, .first = *window, .second = {}, .strides = {}});
  } else {
    if (in.is_contiguous() && bytes > 0) {  // without cursors, which take as long as a short copy
      std::memcpy(meeting_.next_slot(), own, bytes);
    } else {
      steps_.fill_slot(whole(in).cursor(element), in.numel());
    }
    meeting_.enter(call, kShowsSlot);
  }
  for (int r = 0; r < access_.size(); ++r) {
    if (r == rank) {
      steps_.peer_ins[to_size(r)] = own;
      continue;
    }
    const Ticket& ticket = access_.await(r, call);
    steps_.peer_ins[to_size(r)] =
        ticket.place == Place::direct ? access_.peer_tensor(ticket, r) : meeting_.slot_of(r);
  }
  // A few lines are in the way of those that are read; many take longer than what follows.
  const bool prepares = !exposed && bytes <= kPreparedBytes;
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
  access_.finish(exposed);
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
  if (passes_no_slot(in, out)) {
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
