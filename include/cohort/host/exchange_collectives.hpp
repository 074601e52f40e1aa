// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/host/peer_access.hpp"
#include "cohort/host/reduce.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/transport.hpp"

/// \file
/// The collectives of ranks that cannot all map each other's memory: the control plane's `exchange`
/// carries the bytes. Results have the same bits as those of `PeerCollectives`, because both reduce
/// in rank order.

namespace cohort::host {

/// Calls run on the calling thread. Every message starts with a description of the call; a peer
/// that makes another call gives `SymmetryError`. Any error leaves the group unusable.
class ExchangeCollectives {
 public:
  explicit ExchangeCollectives(ControlPlane& control) : control_(control) {}

  [[nodiscard]] bool poisoned() const noexcept { return poisoned_ || control_.poisoned(); }

  void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                  std::span<const std::int64_t> sizes, std::int64_t form = 0) {
    Call call = call_of(Operation::all_gather, out, dim, sizes);
    call.mix(form);
    gather(call, in, out, dim, sizes);
  }

  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op) {
    Call call = call_of(Operation::reduce_scatter, in, dim, sizes);
    call.variant = static_cast<std::uint8_t>(op);
    scatter(call, in, out, dim, sizes, op);
  }

  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                  std::int64_t form = 0) {
    Call call = call_of(Operation::all_reduce, in, 0, {});
    call.variant = static_cast<std::uint8_t>(op);
    call.mix(form);
    // Parts of the elements in row-major order, so that any shape can be shared out.
    const std::int64_t part = (in.numel() + size() - 1) / size();
    std::vector<std::int64_t> sizes;
    for (int r = 0; r < size(); ++r) {
      sizes.push_back(std::clamp(in.numel() - r * part, std::int64_t{0}, part));
    }
    const std::size_t element = size_of(in.dtype());
    Bytes dense(in.bytes());
    const auto own = whole(in);
    copy(dense.data(), dense_layout(in.numel()), own.base, own.layout, element);
    Bytes reduced(u(sizes[u(rank())]) * element);
    const TensorView mine(reduced.data(), in.dtype(), Dims{sizes[u(rank())]});
    const TensorView row(dense.data(), in.dtype(), Dims{in.numel()});
    scatter(call, row, mine, 0, sizes, op);
    gather(call, mine, row, 0, sizes);
    const auto to = whole(out);
    copy(to.base, to.layout, dense.data(), dense_layout(in.numel()), element);
  }

  void broadcast(const TensorView& tensor, int root) {
    Call call = call_of(Operation::broadcast, tensor, 0, {});
    call.root = static_cast<std::uint32_t>(root);
    // From all to all, if only the description: otherwise the root could be in another call.
    const auto arrived = trade(
        call,
        [&](int) { return rank() == root ? pack(call, whole(tensor), tensor) : header(call); },
        everyone(), only(root, tensor.bytes()));
    if (rank() != root) {
      unpack(arrived[u(root)], whole(tensor), tensor.dtype());
    }
  }

  void all_to_all(const ConstTensorView& in, const TensorView& out, std::int64_t form = 0) {
    Call call = call_of(Operation::all_to_all, in, 0, {});
    call.mix(form);
    const std::int64_t extent = in.shape()[0] / size();
    const auto arrived = trade(
        call, [&](int r) { return pack(call, part_of(in, 0, r * extent, extent), in); }, everyone(),
        same(part_bytes(in, 0, extent)));
    for (int r = 0; r < size(); ++r) {
      const auto to = part_of(out, 0, r * extent, extent);
      if (r == rank()) {
        const auto own = part_of(in, 0, r * extent, extent);
        copy(to.base, to.layout, own.base, own.layout, size_of(in.dtype()));
      } else {
        unpack(arrived[u(r)], to, out.dtype());
      }
    }
  }

  void barrier() {
    const Call call;
    (void)trade(
        call, [&](int) { return header(call); }, everyone(), same(0));
  }

  void send(const ConstTensorView& tensor, int to) {
    std::vector<ControlPlane::Outgoing> outgoing;
    outgoing.push_back({to, pack(Message::of(tensor), whole(tensor), tensor)});
    guarded("send", [&] { (void)control_.exchange(std::move(outgoing), {}); });
  }

  void recv(const TensorView& tensor, int from) {
    guarded("recv", [&] {
      const ControlPlane::Incoming incoming{from, sizeof(Message) + tensor.bytes()};
      const auto arrived = control_.exchange({}, std::span(&incoming, 1));
      Message sent;
      std::memcpy(&sent, arrived.front().data(), sizeof(Message));
      if (const Message mine = Message::of(tensor); !is_expected(sent, mine, compares_shapes_)) {
        fail_message(sent, mine, control_.name(), from, rank());
      }
      unpack(arrived.front(), whole(tensor), tensor.dtype(), sizeof(Message));
    });
  }
  /// From here on `recv` compares shapes as well.
  void compare_shapes() noexcept { compares_shapes_ = true; }

 private:
  /// What both kinds of calls that share out a tensor, and the two steps of an all-reduce, do.
  void gather(const Call& call, const ConstTensorView& in, const TensorView& out, int dim,
              std::span<const std::int64_t> sizes) {
    std::vector<std::size_t> expected;
    for (const auto size : sizes) {
      expected.push_back(part_bytes(out, dim, size));
    }
    const auto arrived = trade(
        call, [&](int) { return pack(call, whole(in), in); }, everyone(), expected);
    std::int64_t first = 0;
    for (int r = 0; r < size(); ++r) {
      const auto to = part_of(out, dim, first, sizes[u(r)]);
      first += sizes[u(r)];
      if (r == rank()) {
        const auto own = whole(in);
        copy(to.base, to.layout, own.base, own.layout, size_of(in.dtype()));
      } else {
        unpack(arrived[u(r)], to, out.dtype());
      }
    }
  }

  void scatter(const Call& call, const ConstTensorView& in, const TensorView& out, int dim,
               std::span<const std::int64_t> sizes, ReduceOp op) {
    const auto firsts = prefix_sums(sizes);
    const auto arrived = trade(
        call, [&](int r) { return pack(call, part_of(in, dim, firsts[u(r)], sizes[u(r)]), in); },
        everyone(), same(part_bytes(in, dim, sizes[u(rank())])));
    const auto own = part_of(in, dim, firsts[u(rank())], sizes[u(rank())]);
    reduce_arrived(arrived, own, whole(out), in.dtype(), op);
  }

  static std::size_t u(std::int64_t value) noexcept { return static_cast<std::size_t>(value); }
  [[nodiscard]] int rank() const noexcept { return control_.rank(); }
  [[nodiscard]] int size() const noexcept { return control_.size(); }

  static Call call_of(Operation operation, const ConstTensorView& tensor, int dim,
                      std::span<const std::int64_t> sizes) {
    Call call{.operation = operation,
              .dtype = tensor.dtype(),
              .dim = static_cast<std::uint8_t>(dim),
              .bytes = tensor.bytes()};
    for (const auto extent : tensor.shape()) {
      call.mix(extent);
    }
    for (const auto extent : sizes) {
      call.mix(extent);
    }
    return call;
  }

  static std::size_t part_bytes(const ConstTensorView& tensor, int dim, std::int64_t extent) {
    const std::int64_t slab = tensor.numel() == 0 ? 0 : tensor.numel() / tensor.shape()[dim];
    return u(slab * extent) * size_of(tensor.dtype());
  }
  static std::vector<std::int64_t> prefix_sums(std::span<const std::int64_t> sizes) {
    std::vector<std::int64_t> sums(sizes.size());
    std::exclusive_scan(sizes.begin(), sizes.end(), sums.begin(), std::int64_t{0});
    return sums;
  }
  [[nodiscard]] std::vector<std::size_t> same(std::size_t bytes) const {
    return std::vector<std::size_t>(u(size()), bytes);
  }
  [[nodiscard]] std::vector<std::size_t> only(int from, std::size_t bytes) const {
    auto expected = same(0);
    expected[u(from)] = bytes;
    return expected;
  }
  [[nodiscard]] std::vector<int> everyone() const {
    std::vector<int> peers;
    for (int step = 1; step < size(); ++step) {
      peers.push_back((rank() + step) % size());
    }
    return peers;
  }

  static Bytes header(const Call& call) {
    Bytes bytes(sizeof(Call));
    std::memcpy(bytes.data(), &call, sizeof(Call));
    return bytes;
  }
  /// `Head` says what it is: a `Call`, or a `Message`.
  template <class Head, class Byte>
  static Bytes pack(const Head& head, const Part<Byte>& part, const ConstTensorView& tensor) {
    const std::size_t element = size_of(tensor.dtype());
    Bytes bytes(sizeof(Head) + u(part.layout.numel) * element);
    std::memcpy(bytes.data(), &head, sizeof(Head));
    copy(bytes.data() + sizeof(Head), dense_layout(part.layout.numel), part.base, part.layout,
         element);
    return bytes;
  }
  static void unpack(const Bytes& bytes, const Part<std::byte>& part, DType dtype,
                     std::size_t head = sizeof(Call)) {
    copy(part.base, part.layout, bytes.data() + head, dense_layout(part.layout.numel),
         size_of(dtype));
  }

  /// Of the calls of all ranks, which every rank has. The length of what came follows from the
  /// call.
  void compare(const std::vector<Call>& calls) const {
    fail_unless_same(
        size(), [&](int r) -> const Call& { return calls[u(r)]; },
        [this] { return fmt::format("exchange in group {}", control_.name()); });
  }
  static Call call_in(const Bytes& bytes) {
    Call call;
    std::memcpy(&call, bytes.data(), std::min(bytes.size(), sizeof(Call)));
    return call;
  }

  /// After an error the messages of a pair may be out of step, and who waits for another need not
  /// go on.
  template <class Body>
  void guarded(std::string_view call, const Body& body) {
    if (poisoned()) {
      throw TransportError({.call = std::string(call), .rank = rank(), .group = control_.name()},
                           "an earlier call of this group failed; form the group anew");
    }
    try {
      body();
    } catch (...) {
      poisoned_ = true;
      control_.give_up_because(std::current_exception());
      throw;
    }
  }

  /// Sends `make(r)` to each peer r, and returns what came from each, by rank. Whatever the
  /// lengths, all calls are there before they are compared, so that every rank blames the same
  /// ones.
  template <class Make>
  std::vector<Bytes> trade(const Call& call, const Make& make, const std::vector<int>& peers,
                           const std::vector<std::size_t>& expected) {
    std::vector<Bytes> arrived(u(size()));
    guarded(to_string(call.operation), [&] {
      std::vector<ControlPlane::Outgoing> outgoing;
      std::vector<ControlPlane::Incoming> incoming;
      for (const int r : peers) {
        outgoing.push_back({r, make(r)});
        incoming.push_back({r, ControlPlane::kAnyBytes});
      }
      auto payloads = control_.exchange(std::move(outgoing), incoming);
      std::vector<Call> calls(u(size()), call);
      for (std::size_t i = 0; i < peers.size(); ++i) {
        calls[u(peers[i])] = call_in(payloads[i]);
        arrived[u(peers[i])] = std::move(payloads[i]);
      }
      compare(calls);
      for (const int r : peers) {
        if (arrived[u(r)].size() != sizeof(Call) + expected[u(r)]) {
          throw SymmetryError(
              fmt::format("exchange in group {}: rank {} sent {} bytes where rank {} expected {}",
                          control_.name(), r, arrived[u(r)].size(), rank(),
                          sizeof(Call) + expected[u(r)]),
              {std::min(r, rank()), std::max(r, rank())});
        }
      }
    });
    return arrived;
  }

  void reduce_arrived(const std::vector<Bytes>& arrived, const Part<const std::byte>& own,
                      const Part<std::byte>& out, DType dtype, ReduceOp op) const {
    const std::size_t element = size_of(dtype);
    std::vector<ReadCursor> sources;
    for (int r = 0; r < size(); ++r) {
      sources.push_back(r == rank() ? own.cursor(element)
                                    : ReadCursor(arrived[u(r)].data() + sizeof(Call),
                                                 dense_layout(own.layout.numel), element));
    }
    auto writer = out.cursor(element);
    reduce(dtype, op, writer, sources, own.layout.numel);
  }

  ControlPlane& control_;
  bool poisoned_ = false;
  bool compares_shapes_ = false;
};

}  // namespace cohort::host
