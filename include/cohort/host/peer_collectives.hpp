// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

#include "cohort/host/peer_access.hpp"
#include "cohort/host/reduce.hpp"
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
        places_(u(access.size())),
        sources_(u(access.size())),
        peer_ins_(u(access.size())),
        peer_outs_(u(access.size())) {}

  void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                  std::span<const std::int64_t> sizes);
  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op);
  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op);
  void broadcast(const TensorView& tensor, int root);
  void all_to_all(const ConstTensorView& in, const TensorView& out);
  void barrier();
  void send(const ConstTensorView& tensor, int to);
  /// Takes the message off the channel and throws `SymmetryError` where it has another size.
  void recv(const TensorView& tensor, int from);

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

  static std::size_t u(std::int64_t value) noexcept { return static_cast<std::size_t>(value); }

  [[nodiscard]] static Call call_of(Operation operation, const ConstTensorView& tensor) {
    Call call{.operation = operation, .dtype = tensor.dtype(), .bytes = tensor.bytes()};
    for (const auto extent : tensor.shape()) {
      call.mix(extent);
    }
    return call;
  }

  /// Elements of each rank's piece where a slot holds one piece for every rank.
  [[nodiscard]] std::int64_t piece_elements(std::size_t element_bytes) const noexcept {
    constexpr std::size_t kLine = 64;
    const std::size_t bytes = access_.piece_bytes() / u(access_.size()) / kLine * kLine;
    return static_cast<std::int64_t>(bytes / element_bytes);
  }

  /// Puts the next `count` elements into the slot of the next step, `skip` bytes into it.
  void fill_slot(ReadCursor from, std::int64_t count, std::size_t skip = 0) noexcept {
    WriteCursor writer(meeting_.next_slot() + skip, dense_layout(count), from.element_bytes());
    copy(writer, from, count);
  }
  /// Copies `count` elements from a peer's slot of the current step.
  void read_slot(int peer, WriteCursor to, std::int64_t count, std::size_t skip = 0) noexcept {
    ReadCursor reader(meeting_.slot_of(peer) + skip, dense_layout(count), to.element_bytes());
    copy(to, reader, count);
  }

  template <class Consume>
  void scatter(const Call& call, const ConstTensorView& in, int dim,
               std::span<const std::int64_t> sizes, const Consume& consume);
  [[nodiscard]] ReadCursor scatter_source(int peer, const ConstTensorView& in, int dim,
                                          std::int64_t first, std::int64_t extent,
                                          std::int64_t pitch);
  bool reduce_scatter_dense(const Call& call, const ConstTensorView& in, const TensorView& out,
                            int dim, std::span<const std::int64_t> sizes, ReduceOp op);
  void reduce_all(const Call& call, const ConstTensorView& in, const TensorView& out, ReduceOp op);
  void reduce_parts(const Call& call, const ConstTensorView& in, const TensorView& out,
                    ReduceOp op);

  PeerAccess& access_;
  Rendezvous& meeting_;
  // Kept from call to call, so that calls do not allocate; by rank.
  std::vector<Place> places_;
  std::vector<ReadCursor> sources_;
  std::vector<const std::byte*> peer_ins_;
  std::vector<const std::byte*> peer_outs_;
  std::vector<std::int64_t> sizes_;
};

inline void PeerCollectives::all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                                        std::span<const std::int64_t> sizes) {
  Call call = call_of(Operation::all_gather, out);
  call.dim = static_cast<std::uint8_t>(dim);
  for (const auto size : sizes) {
    call.mix(size);
  }
  const std::size_t element = size_of(in.dtype());
  const auto piece = static_cast<std::int64_t>(access_.piece_bytes() / element);
  const int rank = access_.rank();
  const int n = access_.size();

  const Showing showing = access_.show(in);
  const bool exposed = showing.place == Place::direct;
  const auto own = whole(in);
  if (!exposed) {
    copy(meeting_.next_slot(), dense_layout(std::min(piece, in.numel())), own.base, own.layout,
         element, std::min(piece, in.numel()));
  }
  meeting_.enter(call, showing);

  std::int64_t longest = exposed ? 0 : in.numel();
  std::int64_t first = std::accumulate(sizes.begin(), sizes.begin() + rank, std::int64_t{0});
  for (int step = 0; step < n; ++step) {  // the own part while the peers arrive
    const int r = (rank + step) % n;
    first = r == 0 ? 0 : first;
    const auto to = part_of(out, dim, first, sizes[u(r)]);
    first += sizes[u(r)];
    if (r == rank) {
      copy(to.base, to.layout, own.base, own.layout, element);
      continue;
    }
    const Ticket& ticket = access_.await(r, call);
    places_[u(r)] = ticket.place;
    if (ticket.place == Place::direct) {
      Dims shape = out.shape();
      shape[dim] = sizes[u(r)];
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
  for (std::int64_t done = piece; done < longest; done += piece) {
    if (!exposed && done < in.numel()) {
      fill_slot(own.cursor(element, done), std::min(piece, in.numel() - done));
    }
    meeting_.enter();
    first = 0;
    for (int r = 0; r < n; ++r) {
      meeting_.await(r);
      const auto to = part_of(out, dim, first, sizes[u(r)]);
      first += sizes[u(r)];
      if (r != rank && places_[u(r)] == Place::slot && done < to.layout.numel) {
        read_slot(r, to.cursor(element, done), std::min(piece, to.layout.numel - done));
      }
    }
  }
  access_.confirm_read();  // a later step tells the peers that they were read
}

/// Where this rank finds its part of a peer's input, in the current step.
inline ReadCursor PeerCollectives::scatter_source(int peer, const ConstTensorView& in, int dim,
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
  return {meeting_.slot_of(peer) + u(access_.rank()) * u(pitch) * element, dense_layout(pitch),
          element};
}

/// Every rank gets its part of every rank's `in` along `dim`: calls `consume(first, count)` for
/// stretches of the part, with `sources_` standing at it in every rank's input.
template <class Consume>
void PeerCollectives::scatter(const Call& call, const ConstTensorView& in, int dim,
                              std::span<const std::int64_t> sizes, const Consume& consume) {
  const std::size_t element = size_of(in.dtype());
  const int rank = access_.rank();
  const int n = access_.size();
  const std::int64_t slab = in.numel() == 0 ? 0 : in.numel() / in.shape()[dim];
  const std::int64_t longest = slab * *std::max_element(sizes.begin(), sizes.end());
  const std::int64_t pitch = std::min(longest, piece_elements(element));
  const std::int64_t own_count = slab * sizes[u(rank)];

  const auto fill = [&](std::int64_t done) {
    std::int64_t first = 0;
    for (int r = 0; r < n; ++r) {
      const std::int64_t count = std::min(pitch, slab * sizes[u(r)] - done);
      if (r != rank && count > 0) {
        fill_slot(part_of(in, dim, first, sizes[u(r)]).cursor(element, done), count,
                  u(r) * u(pitch) * element);
      }
      first += sizes[u(r)];
    }
  };

  const Showing showing = access_.show(in);
  const bool exposed = showing.place == Place::direct;
  if (!exposed) {
    fill(0);
  }
  meeting_.enter(call, showing);
  access_.await_all(call);
  const std::int64_t own_first =
      std::accumulate(sizes.begin(), sizes.begin() + rank, std::int64_t{0});
  bool through_slots = !exposed;
  for (int r = 0; r < n; ++r) {
    places_[u(r)] = meeting_.ticket_of(r).place;
    through_slots |= places_[u(r)] == Place::slot;
    sources_[u(r)] = scatter_source(r, in, dim, own_first, sizes[u(rank)], pitch);
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
        if (r != rank && places_[u(r)] == Place::slot) {
          sources_[u(r)] = {meeting_.slot_of(r) + u(rank) * u(pitch) * element, dense_layout(pitch),
                            element};
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
inline bool PeerCollectives::reduce_scatter_dense(const Call& call, const ConstTensorView& in,
                                                  const TensorView& out, int dim,
                                                  std::span<const std::int64_t> sizes,
                                                  ReduceOp op) {
  std::int64_t outer = 1;
  std::int64_t slab = 1;
  for (int d = 0; d < in.ndim(); ++d) {
    (d < dim ? outer : slab) *= d == dim ? 1 : in.shape()[d];
  }
  const std::size_t element = size_of(in.dtype());
  const std::int64_t longest = slab * *std::max_element(sizes.begin(), sizes.end());
  if (outer != 1 || longest > piece_elements(element) || !in.is_contiguous() ||
      !out.is_contiguous()) {
    return false;
  }
  const int rank = access_.rank();
  const int n = access_.size();
  const auto* own = static_cast<const std::byte*>(in.data());
  const Showing showing = access_.show(in);
  const bool exposed = showing.place == Place::direct;
  std::size_t own_skip = 0;
  std::size_t skip = 0;
  for (int r = 0; r < n; ++r) {
    const std::size_t bytes = u(sizes[u(r)] * slab) * element;
    if (r == rank) {
      own_skip = skip;
    } else if (!exposed && bytes > 0) {
      std::memcpy(meeting_.next_slot() + u(r) * u(longest) * element, own + skip, bytes);
    }
    skip += bytes;
  }
  meeting_.enter(call, showing);
  access_.await_all(call);
  bool dense = true;
  for (int r = 0; r < n; ++r) {
    const Ticket& ticket = meeting_.ticket_of(r);
    if (r == rank) {
      peer_ins_[u(r)] = own + own_skip;
    } else if (ticket.place == Place::direct) {
      peer_ins_[u(r)] = access_.peer_tensor(ticket, r) + own_skip;
      dense = dense && ticket.dense;
    } else {
      peer_ins_[u(r)] = meeting_.slot_of(r) + u(rank) * u(longest) * element;
    }
  }
  if (dense) {
    reduce(in.dtype(), op, static_cast<std::byte*>(out.data()), peer_ins_, out.numel());
  } else {
    const std::int64_t first =
        std::accumulate(sizes.begin(), sizes.begin() + rank, std::int64_t{0});
    for (int r = 0; r < n; ++r) {
      sources_[u(r)] = scatter_source(r, in, dim, first, sizes[u(rank)], longest);
    }
    auto writer = whole(out).cursor(element);
    reduce(in.dtype(), op, writer, sources_, out.numel());
  }
  access_.finish(exposed);
  return true;
}

inline void PeerCollectives::reduce_scatter(const ConstTensorView& in, const TensorView& out,
                                            int dim, std::span<const std::int64_t> sizes,
                                            ReduceOp op) {
  Call call = call_of(Operation::reduce_scatter, in);
  call.dim = static_cast<std::uint8_t>(dim);
  call.variant = static_cast<std::uint8_t>(op);
  for (const auto size : sizes) {
    call.mix(size);
  }
  if (reduce_scatter_dense(call, in, out, dim, sizes, op)) {
    return;
  }
  auto writer = whole(out).cursor(size_of(out.dtype()));
  scatter(call, in, dim, sizes, [&](std::int64_t, std::int64_t count) {
    reduce(in.dtype(), op, writer, sources_, count);
  });
}

inline void PeerCollectives::all_to_all(const ConstTensorView& in, const TensorView& out) {
  const std::size_t element = size_of(in.dtype());
  const int n = access_.size();
  const std::int64_t extent = in.shape()[0] / n;
  sizes_.assign(u(n), extent);
  scatter(call_of(Operation::all_to_all, in), in, 0, sizes_,
          [&](std::int64_t first, std::int64_t count) {
            for (int r = 0; r < n; ++r) {
              auto writer = part_of(out, 0, r * extent, extent).cursor(element, first);
              copy(writer, sources_[u(r)], count);
            }
          });
}

inline void PeerCollectives::all_reduce(const ConstTensorView& in, const TensorView& out,
                                        ReduceOp op) {
  Call call = call_of(Operation::all_reduce, in);
  call.variant = static_cast<std::uint8_t>(op);
  if (is_reduced_by_all(in.bytes())) {
    reduce_all(call, in, out, op);
  } else {
    reduce_parts(call, in, out, op);
  }
}

/// Every rank reduces the whole tensor, read from the slots: `in`, which may be `out`, stays the
/// caller's alone.
inline void PeerCollectives::reduce_all(const Call& call, const ConstTensorView& in,
                                        const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const auto own = whole(in).cursor(element);
  fill_slot(own, in.numel());
  meeting_.enter(call, {});
  access_.await_all(call);
  const bool dense = in.is_contiguous() && out.is_contiguous();
  for (int r = 0; r < access_.size(); ++r) {
    const std::byte* theirs = r == access_.rank() ? own.at() : meeting_.slot_of(r);
    peer_ins_[u(r)] = theirs;
    if (!dense) {
      sources_[u(r)] =
          r == access_.rank() ? own : ReadCursor(theirs, dense_layout(in.numel()), element);
    }
  }
  if (dense) {
    reduce(in.dtype(), op, static_cast<std::byte*>(out.data()), peer_ins_, in.numel());
  } else {
    auto writer = whole(out).cursor(element);
    reduce(in.dtype(), op, writer, sources_, in.numel());
  }
}

/// Rank r reduces part r, then all gather the parts. In place where every rank's tensors are dense
/// and in windows: part r of `out` is written when only rank r still needs part r of its `in`.
inline void PeerCollectives::reduce_parts(const Call& call, const ConstTensorView& in,
                                          const TensorView& out, ReduceOp op) {
  const std::size_t element = size_of(in.dtype());
  const int rank = access_.rank();
  const int n = access_.size();
  const std::int64_t line = static_cast<std::int64_t>(64 / element);

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
    peer_outs_[u(r)] = direct ? access_.peer_memory(ticket.second, r) : nullptr;
    peer_ins_[u(r)] = direct ? access_.peer_tensor(ticket, r) : nullptr;
  }

  const std::int64_t stretch =
      direct ? in.numel() : static_cast<std::int64_t>(access_.piece_bytes() / element);
  for (std::int64_t first = 0; first < in.numel(); first += stretch) {
    const std::int64_t count = std::min(stretch, in.numel() - first);
    const std::int64_t part = ((count + n - 1) / n + line - 1) / line * line;
    const auto begin = [&](int r) { return std::min(count, r * part); };
    const auto length = [&](int r) { return begin(r + 1) - begin(r); };
    const std::size_t skip = u(begin(rank)) * element;
    if (!direct) {
      fill_slot(whole(in).cursor(element, first), count);
      meeting_.enter();
      meeting_.await_all();
    }
    for (int r = 0; r < n; ++r) {
      const std::byte* theirs = direct ? peer_ins_[u(r)] : meeting_.slot_of(r);
      sources_[u(r)] = r == rank ? whole(in).cursor(element, first + begin(rank))
                                 : ReadCursor(theirs + skip, dense_layout(length(rank)), element);
    }
    auto own_out = whole(out).cursor(element, first + begin(rank));
    if (direct) {
      reduce(in.dtype(), op, own_out, sources_, length(rank));
    } else {
      std::byte* slot = meeting_.next_slot();
      const Layout dense = dense_layout(length(rank));
      WriteCursor writer(slot, dense, element);
      reduce(in.dtype(), op, writer, sources_, length(rank));
      ReadCursor reader(slot, dense, element);
      copy(own_out, reader, length(rank));
    }
    meeting_.enter();
    for (int step = 1; step < n; ++step) {
      const int r = (rank + step) % n;
      meeting_.await(r);
      const std::byte* theirs =
          direct ? peer_outs_[u(r)] + u(begin(r)) * element : meeting_.slot_of(r);
      ReadCursor reader(theirs, dense_layout(length(r)), element);
      auto writer = whole(out).cursor(element, first + begin(r));
      copy(writer, reader, length(r));
    }
  }
  access_.finish(direct);
}

inline void PeerCollectives::broadcast(const TensorView& tensor, int root) {
  Call call = call_of(Operation::broadcast, tensor);
  call.root = static_cast<std::uint32_t>(root);
  const std::size_t element = size_of(tensor.dtype());
  const auto piece = static_cast<std::int64_t>(access_.piece_bytes() / element);
  const bool giver = access_.rank() == root;
  const auto own = whole(tensor);

  const Showing showing = giver ? access_.show(tensor) : Showing{};
  bool direct = showing.place == Place::direct;
  for (std::int64_t done = 0;; done += piece) {
    const std::int64_t count = std::min(piece, tensor.numel() - done);
    if (giver && !direct) {
      fill_slot(ReadCursor(own.base, own.layout, element, done), count);
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
      read_slot(root, own.cursor(element, done), count);
    }
    if (direct || done + piece >= tensor.numel()) {
      access_.finish(direct && giver);
      return;
    }
  }
}

inline void PeerCollectives::barrier() {
  const Call call;
  meeting_.enter(call, {});
  access_.await_all(call);
}

inline void PeerCollectives::send(const ConstTensorView& tensor, int to) {
  const std::size_t element = size_of(tensor.dtype());
  auto reader = whole(tensor).cursor(element);
  meeting_.send(to, tensor.bytes(), [&](std::size_t, std::size_t bytes, std::byte* parcel) {
    const auto count = static_cast<std::int64_t>(bytes / element);
    WriteCursor writer(parcel, dense_layout(count), element);
    copy(writer, reader, count);
  });
}

inline void PeerCollectives::recv(const TensorView& tensor, int from) {
  const std::size_t element = size_of(tensor.dtype());
  auto writer = whole(tensor).cursor(element);
  meeting_.receive(from, tensor.bytes(),
                   [&](std::size_t, std::size_t bytes, const std::byte* parcel) {
                     const auto count = static_cast<std::int64_t>(bytes / element);
                     ReadCursor reader(parcel, dense_layout(count), element);
                     copy(writer, reader, count);
                   });
}

}  // namespace cohort::host
