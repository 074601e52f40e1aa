// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "cohort/host/peer_access.hpp"
#include "cohort/host/peer_all_reduce.hpp"
#include "cohort/host/peer_scatter.hpp"
#include "cohort/host/peer_steps.hpp"
#include "cohort/host/strided.hpp"
#include "cohort/transport.hpp"

/// \file
/// The collectives of ranks that map each other's memory. A rank's input is read by its peers where
/// it lies if it lies in a window and is large, otherwise from the rank's inbox slot; each rank
/// decides for itself and says so in its ticket. Whoever reads writes the final layout at once.

namespace cohort::host {

/// Calls run on the calling thread and return when this rank's result is complete and its input may
/// be written again. Throw `SymmetryError` (all ranks, nothing transferred), `TimeoutError` and
/// `TransportError`.
class PeerCollectives {
 public:
  explicit PeerCollectives(PeerAccess& access)
      : access_(access),
        meeting_(access.meeting()),
        steps_(access),
        scatter_(steps_),
        all_reduce_(steps_) {}
  PeerCollectives(const PeerCollectives&) = delete;
  PeerCollectives& operator=(const PeerCollectives&) = delete;
  ~PeerCollectives() = default;

  /// @param form  What the ranks have to agree on besides.
  void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                  std::span<const std::int64_t> sizes, std::int64_t form = 0);
  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op) {
    scatter_.reduce_scatter(in, out, dim, sizes, op);
  }
  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                  std::int64_t form = 0) {
    all_reduce_.all_reduce(in, out, op, form);
  }
  void broadcast(const TensorView& tensor, int root);
  void all_to_all(const ConstTensorView& in, const TensorView& out, std::int64_t form = 0) {
    scatter_.all_to_all(in, out, form);
  }
  void barrier();
  void send(const ConstTensorView& tensor, int to);
  /// Takes the message off the channel and throws `SymmetryError` where it has another size or
  /// type.
  void recv(const TensorView& tensor, int from);

  /// Whether this rank's tensors allow an all_reduce that passes no slot. It takes place if those
  /// of every rank do.
  [[nodiscard]] bool passes_no_slot(const ConstTensorView& in, const TensorView& out) const {
    return all_reduce_.passes_no_slot(in, out);
  }

 private:
  PeerAccess& access_;
  Rendezvous& meeting_;
  PeerSteps steps_;
  PeerScatter scatter_;
  PeerAllReduce all_reduce_;
};

inline void PeerCollectives::all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                                        std::span<const std::int64_t> sizes, std::int64_t form) {
  Call call = call_of(Operation::all_gather, out);
  call.dim = static_cast<std::uint8_t>(dim);
  call.mix(form);
  for (const auto size : sizes) {
    call.mix(size);
  }
  const std::size_t element = size_of(in.dtype());
  const auto piece = elements_in(access_.piece_bytes(), element);
  const int rank = access_.rank();
  const int n = access_.size();

  const Showing showing = access_.show(in, access_.reads_windows(in.bytes()));
  const bool exposed = showing.place == Place::direct;
  const auto own = whole(in);
  if (!exposed) {
    const std::int64_t count = std::min(piece, in.numel());
    if (in.is_contiguous()) {
      steps_.fill_slot(own.base, to_size(count) * element);
    } else {
      steps_.fill_slot(own.cursor(element), count);
    }
  }
  meeting_.enter(call, showing);

  std::int64_t longest = exposed ? 0 : in.numel();
  std::int64_t first = std::accumulate(sizes.begin(), sizes.begin() + rank, std::int64_t{0});
  for (int step = 0; step < n; ++step) {  // the own part while the peers arrive
    const int r = (rank + step) % n;
    first = r == 0 ? 0 : first;
    const auto to = part_of(out, dim, first, sizes[to_size(r)]);
    first += sizes[to_size(r)];
    if (r == rank) {
      copy(to.base, to.layout, own.base, own.layout, element);
      continue;
    }
    const Ticket& ticket = access_.await(r, call);
    if (step == n - 1) {
      meeting_.prepare_next(exposed ? 0 : to_size(std::min(piece, in.numel())) * element);
    }
    steps_.places[to_size(r)] = ticket.place;
    if (ticket.place == Place::direct) {
      Dims shape = out.shape();
      shape[dim] = sizes[to_size(r)];
      copy(to.base, to.layout, access_.peer_tensor(ticket, r),
           collapse(shape, PeerAccess::peer_strides(ticket, shape)), element);
    } else {
      const std::int64_t count = std::min(piece, to.layout.numel);
      copy(to.base, to.layout, meeting_.slot_of(r), dense_layout(count), element, count);
      longest = std::max(longest, to.layout.numel);
    }
  }
  if (longest <= piece) {
    access_.finish(exposed);
    return;
  }
  // Before a later step tells the peers that they were read: from the last one on they may be gone.
  access_.confirm_read();
  for (std::int64_t done = piece; done < longest; done += piece) {
    if (!exposed && done < in.numel()) {
      steps_.fill_slot(own.cursor(element, done), std::min(piece, in.numel() - done));
    }
    meeting_.enter();
    first = 0;
    for (int r = 0; r < n; ++r) {
      meeting_.await(r);
      const auto to = part_of(out, dim, first, sizes[to_size(r)]);
      first += sizes[to_size(r)];
      if (r != rank && steps_.places[to_size(r)] == Place::slot && done < to.layout.numel) {
        steps_.read_slot(r, to.cursor(element, done), std::min(piece, to.layout.numel - done));
      }
    }
  }
}

inline void PeerCollectives::broadcast(const TensorView& tensor, int root) {
  Call call = call_of(Operation::broadcast, tensor);
  call.root = static_cast<std::uint32_t>(root);
  const std::size_t element = size_of(tensor.dtype());
  const auto piece = elements_in(access_.piece_bytes(), element);
  const bool giver = access_.rank() == root;
  const auto own = whole(tensor);

  const Showing showing =
      giver ? access_.show(tensor, access_.reads_windows(tensor.bytes())) : kShowsNothing;
  bool direct = showing.place == Place::direct;
  for (std::int64_t done = 0;; done += piece) {
    const std::int64_t count = std::min(piece, tensor.numel() - done);
    if (giver && !direct) {
      steps_.fill_slot(ReadCursor(own.base, own.layout, element, done), count);
    }
    if (done > 0) {
      meeting_.enter();
      meeting_.await_all();
    } else {
      meeting_.enter(call, showing);
      access_.await_all(call);
      const Ticket& ticket = meeting_.ticket_of(root);
      direct = ticket.place == Place::direct;
      if (direct && !giver) {
        const auto strides = PeerAccess::peer_strides(ticket, tensor.shape());
        copy(own.base, own.layout, access_.peer_tensor(ticket, root),
             collapse(tensor.shape(), strides), element);
      }
    }
    if (!giver && !direct) {
      steps_.read_slot(root, own.cursor(element, done), count);
    }
    if (direct || done + piece >= tensor.numel()) {
      access_.finish(direct && giver);
      return;
    }
  }
}

inline void PeerCollectives::barrier() {
  const Call call;
  meeting_.enter(call, kShowsNothing);
  access_.await_all(call);
  meeting_.prepare_next(0);
}

inline void PeerCollectives::send(const ConstTensorView& tensor, int to) {
  const std::size_t element = size_of(tensor.dtype());
  auto reader = whole(tensor).cursor(element);
  meeting_.send(to, Message::of(tensor), [&](std::size_t, std::size_t bytes, std::byte* parcel) {
    const auto count = static_cast<std::int64_t>(bytes / element);
    WriteCursor writer(parcel, dense_layout(count), element);
    copy(writer, reader, count);
  });
}

inline void PeerCollectives::recv(const TensorView& tensor, int from) {
  const std::size_t element = size_of(tensor.dtype());
  auto writer = whole(tensor).cursor(element);
  meeting_.receive(from, Message::of(tensor),
                   [&](std::size_t, std::size_t bytes, const std::byte* parcel) {
                     const auto count = static_cast<std::int64_t>(bytes / element);
                     ReadCursor reader(parcel, dense_layout(count), element);
                     copy(writer, reader, count);
                   });
}

}  // namespace cohort::host
