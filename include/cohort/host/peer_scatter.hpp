// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "cohort/host/peer_access.hpp"
#include "cohort/host/peer_steps.hpp"
#include "cohort/host/reduce.hpp"
#include "cohort/host/slot_sizes.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"

/// \file
/// Collectives in which every rank gets its part of every rank's tensor: reduce-scatter and
/// all-to-all.

namespace cohort::host {

/// Throws as `PeerCollectives`.
class PeerScatter {
 public:
  explicit PeerScatter(PeerSteps& steps)
      : steps_(steps), access_(steps.access), meeting_(steps.meeting) {}

  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op);
  void all_to_all(const ConstTensorView& in, const TensorView& out, std::int64_t form);

 private:
  template <class Consume>
  void scatter(const Call& call, const Showing& showing, const ConstTensorView& in, int dim,
               std::span<const std::int64_t> sizes, const Consume& consume);
  [[nodiscard]] ReadCursor scatter_source(int peer, const ConstTensorView& in, int dim,
                                          std::int64_t first, std::int64_t extent,
                                          std::int64_t pitch);
  bool reduce_scatter_dense(const Call& call, const Showing& showing, const ConstTensorView& in,
                            const TensorView& out, int dim, std::span<const std::int64_t> sizes,
                            ReduceOp op);
  /// Which of the parts in a rank's slot a peer's is: its own is not among them.
  [[nodiscard]] static std::size_t part_in_slot(int owner, int peer) noexcept {
    return to_size(peer < owner ? peer : peer - 1);
  }

  static constexpr std::size_t kFewBytes = 1024;

  PeerSteps& steps_;
  PeerAccess& access_;
  Rendezvous& meeting_;
  std::vector<std::int64_t> sizes_;  // kept, so that calls do not allocate
};

/// Where this rank finds its part of a peer's input, in the current step.
inline ReadCursor PeerScatter::scatter_source(int peer, const ConstTensorView& in, int dim,
                                              std::int64_t first, std::int64_t extent,
                                              std::int64_t pitch) {
  const std::size_t element = size_of(in.dtype());
  if (peer == access_.rank()) {
    return part_of(in, dim, first, extent).cursor(element);
  }
  if (const Ticket& ticket = meeting_.ticket_of(peer); ticket.place == Place::direct) {
    return part_of(access_.peer_tensor(ticket, peer), in.shape(),
                   PeerAccess::peer_strides(ticket, in.shape()), element, dim, first, extent)
        .cursor(element);
  }
  return {meeting_.slot_of(peer) + part_in_slot(peer, access_.rank()) * to_size(pitch) * element,
          dense_layout(pitch), element};
}

/// Every rank gets its part of every rank's `in` along `dim`: calls `consume(first, count)` for
/// stretches of the part, with `steps_.sources` standing at it in every rank's input.
template <class Consume>
void PeerScatter::scatter(const Call& call, const Showing& showing, const ConstTensorView& in,
                          int dim, std::span<const std::int64_t> sizes, const Consume& consume) {
  const std::size_t element = size_of(in.dtype());
  const int rank = access_.rank();
  const int n = access_.size();
  const std::int64_t slab = in.numel() == 0 ? 0 : in.numel() / in.shape()[dim];
  const std::int64_t longest = slab * *std::max_element(sizes.begin(), sizes.end());
  const std::int64_t pitch = std::min(longest, steps_.piece_elements(element));
  const std::int64_t own_count = slab * sizes[to_size(rank)];

  const auto fill = [&](std::int64_t done) {
    std::int64_t first = 0;
    for (int r = 0; r < n; ++r) {
      const std::int64_t count = std::min(pitch, slab * sizes[to_size(r)] - done);
      if (r != rank && count > 0) {
        steps_.fill_slot(part_of(in, dim, first, sizes[to_size(r)]).cursor(element, done), count,
                         part_in_slot(rank, r) * to_size(pitch) * element);
      }
      first += sizes[to_size(r)];
    }
  };

  const bool exposed = showing.place == Place::direct;
  if (!exposed) {
    fill(0);
  }
  meeting_.enter(call, showing);
  access_.await_all(call);
  meeting_.prepare_next(exposed ? 0 : to_size((n - 1) * pitch) * element);
  const std::int64_t own_first =
      std::accumulate(sizes.begin(), sizes.begin() + rank, std::int64_t{0});
  bool through_slots = !exposed;
  for (int r = 0; r < n; ++r) {
    steps_.places[to_size(r)] = meeting_.ticket_of(r).place;
    through_slots |= steps_.places[to_size(r)] == Place::slot;
    steps_.sources[to_size(r)] = scatter_source(r, in, dim, own_first, sizes[to_size(rank)], pitch);
  }
  if (!through_slots || longest <= pitch) {
    consume(0, own_count);
    access_.finish(exposed);
    return;
  }
  for (std::int64_t done = 0; done < longest; done += pitch) {
    if (done > 0) {
      if (!exposed) {
        fill(done);
      }
      meeting_.enter();
      meeting_.await_all();
      for (int r = 0; r < n; ++r) {
        if (r != rank && steps_.places[to_size(r)] == Place::slot) {
          steps_.sources[to_size(r)] = {
              meeting_.slot_of(r) + part_in_slot(r, rank) * to_size(pitch) * element,
              dense_layout(pitch), element};
        }
      }
    }
    if (done < own_count) {
      consume(done, std::min(pitch, own_count - done));
    }
  }
  access_.finish(exposed);
}

/// `scatter` and `reduce` for what a decode step sends: short tensors without gaps, whose parts
/// have none either. The same step as `scatter`'s, so ranks may differ in which one they take; it
/// spares the cursors, a third of the time at 2 KiB. Returns whether it applied.
inline bool PeerScatter::reduce_scatter_dense(const Call& call, const Showing& showing,
                                              const ConstTensorView& in, const TensorView& out,
                                              int dim, std::span<const std::int64_t> sizes,
                                              ReduceOp op) {
  if (!in.is_contiguous() || !out.is_contiguous()) {
    return false;
  }
  const int rank = access_.rank();
  const int n = access_.size();
  const std::size_t element = size_of(in.dtype());
  std::size_t row = element;  // bytes of an extent of `dim`
  for (int d = 0; d < in.ndim(); ++d) {
    if (d < dim && in.shape()[d] != 1) {
      return false;
    }
    row *= d > dim ? to_size(in.shape()[d]) : 1;
  }
  std::int64_t longest = 0;
  std::int64_t own_first = 0;
  for (int r = 0; r < n; ++r) {
    longest = std::max(longest, sizes[to_size(r)]);
    own_first += r < rank ? sizes[to_size(r)] : 0;
  }
  const std::size_t pitch = to_size(longest) * row;
  if (pitch > steps_.share_bytes) {
    return false;
  }
  const auto* own = static_cast<const std::byte*>(in.data());
  const std::size_t own_skip = to_size(own_first) * row;
  const bool exposed = showing.place == Place::direct;
  if (!exposed) {
    std::size_t skip = 0;
    const std::byte* from = own;
    for (int r = 0; r < n; ++r) {
      const std::size_t bytes = to_size(sizes[to_size(r)]) * row;
      if (r != rank) {
        steps_.fill_slot(from, bytes, skip);
        skip += pitch;
      }
      from += bytes;
    }
  }
  meeting_.enter(call, showing);
  bool dense = true;
  for (int r = 0; r < n; ++r) {
    if (r == rank) {
      steps_.peer_ins[to_size(r)] = own + own_skip;
      continue;
    }
    const Ticket& ticket = access_.await(r, call);
    const bool direct = ticket.place == Place::direct;
    dense = dense && (!direct || ticket.dense);
    steps_.peer_ins[to_size(r)] = direct ? access_.peer_tensor(ticket, r) + own_skip
                                         : meeting_.slot_of(r) + part_in_slot(r, rank) * pitch;
  }
  // A few lines are in the way of those that are read; many take longer than what follows.
  const std::size_t next = exposed ? 0 : to_size(n - 1) * pitch;
  const bool few = next <= kFewBytes;
  if (!few) {
    meeting_.prepare_next(next);
  }
  if (dense) {
    reduce(in.dtype(), op, static_cast<std::byte*>(out.data()), steps_.peer_ins, out.numel());
  } else {
    const auto pitch_elements = elements_in(pitch, element);
    for (int r = 0; r < n; ++r) {
      steps_.sources[to_size(r)] =
          scatter_source(r, in, dim, own_first, sizes[to_size(rank)], pitch_elements);
    }
    auto writer = whole(out).cursor(element);
    reduce(in.dtype(), op, writer, steps_.sources, out.numel());
  }
  if (few) {
    meeting_.prepare_next(next);
  }
  access_.finish(exposed);
  return true;
}

inline void PeerScatter::reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                                        std::span<const std::int64_t> sizes, ReduceOp op) {
  Call call = call_of(Operation::reduce_scatter, in);
  call.dim = static_cast<std::uint8_t>(dim);
  call.variant = static_cast<std::uint8_t>(op);
  for (const auto size : sizes) {
    call.mix(size);
  }
  // The own part stays here.
  const Showing showing = access_.show(in, access_.reads_parts(in.bytes() - out.bytes()));
  if (reduce_scatter_dense(call, showing, in, out, dim, sizes, op)) {
    return;
  }
  auto writer = whole(out).cursor(size_of(out.dtype()));
  scatter(call, showing, in, dim, sizes, [&](std::int64_t, std::int64_t count) {
    reduce(in.dtype(), op, writer, steps_.sources, count);
  });
}

inline void PeerScatter::all_to_all(const ConstTensorView& in, const TensorView& out,
                                    std::int64_t form) {
  const std::size_t element = size_of(in.dtype());
  const int n = access_.size();
  const std::int64_t extent = in.shape()[0] / n;
  sizes_.assign(to_size(n), extent);
  Call call = call_of(Operation::all_to_all, in);
  call.mix(form);
  const std::size_t own = in.bytes() / to_size(n);
  const Showing showing = access_.show(in, are_pieces_read_in_window(in.bytes() - own));
  scatter(call, showing, in, 0, sizes_, [&](std::int64_t first, std::int64_t count) {
    for (int r = 0; r < n; ++r) {
      auto writer = part_of(out, 0, r * extent, extent).cursor(element, first);
      copy(writer, steps_.sources[to_size(r)], count);
    }
  });
}

}  // namespace cohort::host
