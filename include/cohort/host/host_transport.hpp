// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/host/exchange_collectives.hpp"
#include "cohort/host/host_norm.hpp"
#include "cohort/host/host_peer_kernels.hpp"
#include "cohort/host/host_steps.hpp"
#include "cohort/host/host_stream.hpp"
#include "cohort/host/peer_access.hpp"
#include "cohort/host/peer_collectives.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/host/slot_sizes.hpp"
#include "cohort/host/window.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/residual_norm.hpp"
#include "cohort/symmetric_policy.hpp"
#include "cohort/transport.hpp"

/// \file
/// The transport of one group of ranks whose tensors lie in host memory.

namespace cohort::host {

/// Ranks that all map each other's memory use it; otherwise the control plane carries the bytes of
/// every rank. Calls block the calling thread, as a host stream does. Captured calls of
/// a transport that is gone throw `UsageError`.
class HostTransport final : public Transport {
 public:
  /// @param access  Null where not every rank maps every other's memory, and for a group of one.
  HostTransport(ControlPlane& control, const SymmetricCapabilities& capabilities,
                std::unique_ptr<PeerAccess> access, std::shared_ptr<WindowTable> windows,
                bool needs_equal_offsets = false)
      : control_(control),
        capabilities_(capabilities),
        windows_(std::move(windows)),
        access_(std::move(access)),
        needs_equal_offsets_(needs_equal_offsets),
        exchange_(control),
        steps_(control, access_ != nullptr ? own_ring(*access_) : nullptr,
               control.size() == 1  ? CallPath::local
               : access_ != nullptr ? CallPath::mapped
                                    : CallPath::exchange),
        lifeline_(std::make_shared<Lifeline>(fmt::format("group {}", control.name()))) {
    if (access_ != nullptr) {
      access_->meeting().departure().end_with(control_);
      peers_.emplace(*access_);
      kernels_.emplace(*access_, lifeline_, steps_);
    }
  }

  ~HostTransport() override { lifeline_->end(); }

  [[nodiscard]] std::string_view name() const noexcept override { return "host"; }
  [[nodiscard]] const SymmetricCapabilities& capabilities() const noexcept override {
    return capabilities_;
  }
  [[nodiscard]] PeerKernels* peer_kernels() noexcept override {
    return kernels_ ? &*kernels_ : nullptr;
  }

  /// Ranks show each other where their tensors lie.
  [[nodiscard]] bool needs_equal_offsets() const noexcept override { return needs_equal_offsets_; }

  void agree_also(std::int64_t form) noexcept override { form_ = form; }
  void compare_shapes() noexcept override {
    exchange_.compare_shapes();
    if (access_ != nullptr) {
      access_->meeting().compare_shapes();
    }
  }

  [[nodiscard]] inline std::unique_ptr<Window> register_segment(Segment& segment) override;

  void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                  std::span<const std::int64_t> sizes, StreamRef stream) override {
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, dim = from_front(dim, out.ndim()), form = std::exchange(form_, 0)](
            const ConstTensorView& from, const TensorView& to,
            std::span<const std::int64_t> parts) {
          dispatch(
              "all_gather", [&](auto& way) { way.all_gather(from, to, dim, parts, form); },
              [&] { copy_view(from, to); });
        },
        in, out, sizes);
  }

  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op, StreamRef stream) override {
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, dim = from_front(dim, in.ndim()), op](const ConstTensorView& from,
                                                     const TensorView& to,
                                                     std::span<const std::int64_t> parts) {
          dispatch(
              "reduce_scatter", [&](auto& way) { way.reduce_scatter(from, to, dim, parts, op); },
              [&] { copy_view(from, to); });
        },
        in, out, sizes);
  }

  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                  StreamRef stream) override {
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, op](const ConstTensorView& from, const TensorView& to) {
          dispatch(
              "all_reduce", [&](auto& way) { way.all_reduce(from, to, op); },
              [&] { copy_view(from, to); });
        },
        in, out);
  }

  /// The sum goes to the output, or, where that has another type, to memory of this transport's:
  /// the arena might grow for it, on this rank alone if the others' outputs have the sum's type.
  [[nodiscard]] bool all_reduce_rms_norm(const NormArguments& arguments,
                                         StreamRef stream) override {
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this](const NormArguments& given) {
          NormArguments summed = given;
          const TensorView sum = sum_of(given);
          dispatch(
              "all_reduce",
              [&](auto& way) { way.all_reduce(given.x, sum, ReduceOp::sum, given.form()); },
              [&] { copy_view(given.x, sum); });
          summed.x = sum;
          norm_rows(summed);
        },
        arguments);
    return true;
  }

  void broadcast(const TensorView& tensor, int root, StreamRef stream) override {
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, root](const TensorView& it) {
          dispatch(
              "broadcast", [&](auto& way) { way.broadcast(it, root); }, [] {});
        },
        tensor);
  }

  void all_to_all(const ConstTensorView& in, const TensorView& out, StreamRef stream) override {
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, form = std::exchange(form_, 0)](const ConstTensorView& from, const TensorView& to) {
          dispatch(
              "all_to_all", [&](auto& way) { way.all_to_all(from, to, form); },
              [&] { copy_view(from, to); });
        },
        in, out);
  }

  void send(const ConstTensorView& tensor, int to, StreamRef stream) override {
    check_peer("to", to);
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, to](const ConstTensorView& it) {
          dispatch(
              "send", [&](auto& way) { way.send(it, to); }, [] {});
        },
        tensor);
  }

  void recv(const TensorView& tensor, int from, StreamRef stream) override {
    check_peer("from", from);
    steps_.issue();
    enqueue_call(
        lifeline_, stream,
        [this, from](const TensorView& it) {
          dispatch(
              "recv", [&](auto& way) { way.recv(it, from); }, [] {});
        },
        tensor);
  }

  void barrier(StreamRef stream) override {
    steps_.issue();
    enqueue_call(lifeline_, stream, [this] {
      dispatch(
          "barrier", [](auto& way) { way.barrier(); }, [] {});
    });
  }

  /// "local" in a group of one; "exchange" over the control plane; "direct" where peers read this
  /// rank's input in its window, "slot" where it goes through the inbox slot.
  [[nodiscard]] inline std::string path(Collective collective, const ConstTensorView& in,
                                        const TensorView& out, int dim) const override;

  /// Host work is done when its call returns. Throws `TransportError` after a failed call of this
  /// rank, and what a peer said that has left.
  void synchronize(StreamRef stream, std::chrono::milliseconds limit) override {
    if (stream.valid()) {
      stream.synchronize(limit);
    }
    check_usable("synchronize");
    if (access_ != nullptr) {
      access_->meeting().departure().check_peers();
    } else {
      control_.check_peers();
    }
  }

  [[nodiscard]] TraceRings trace_rings() override {
    return access_ != nullptr ? access_->meeting().pads().trace_rings() : TraceRings{};
  }
  [[nodiscard]] TransportStand call_begins(TraceCall, StreamRef, CaptureId) noexcept override {
    return steps_.stand();
  }
  [[nodiscard]] TransportStand call_ends() noexcept override { return steps_.stand(); }

  void forsake_peers(const cohort::detail::GiveUp& why) noexcept override {
    if (access_ != nullptr) {  // ranks without one wait over the control plane
      access_->meeting().departure().give_up(why);
    }
  }
  [[nodiscard]] std::optional<cohort::detail::GiveUp> left_with() const override {
    return access_ != nullptr ? access_->meeting().departure().left_with() : std::nullopt;
  }

  [[nodiscard]] std::optional<cohort::detail::GiveUp> differed() const override {
    return steps_.differed();
  }

  [[nodiscard]] bool failed() const noexcept override {
    return access_ != nullptr ? access_->meeting().departure().failed() : exchange_.poisoned();
  }

 private:
  [[nodiscard]] static TraceRing* own_ring(const PeerAccess& access) {
    return access.meeting().pads().trace_rings().by_rank[static_cast<std::size_t>(access.rank())];
  }
  static int from_front(int dim, int ndim) noexcept { return dim < 0 ? dim + ndim : dim; }

  static void copy_view(const ConstTensorView& from, const TensorView& to) {
    const auto source = whole(from);
    const auto target = whole(to);
    copy(target.base, target.layout, source.base, source.layout, size_of(from.dtype()));
  }

  [[nodiscard]] TensorView sum_of(const NormArguments& arguments) {
    const ConstTensorView& x = arguments.x;
    if (arguments.out.dtype() == x.dtype()) {
      return arguments.out;
    }
    sum_.resize(std::max(sum_.size(), x.bytes()));
    return {sum_.data(), x.dtype(), x.shape()};
  }

  void check_usable(std::string_view call) const {
    if (access_ != nullptr) {
      access_->meeting().departure().check_usable(call);
      return;
    }
    owner_.check(control_.name());
    if (exchange_.poisoned()) {
      throw TransportError(
          {.call = std::string(call), .rank = control_.rank(), .group = control_.name()},
          "an earlier call of this group failed; form the group anew");
    }
  }

  void check_peer(std::string_view argument, int peer) const {
    if (peer < 0 || peer >= control_.size() || peer == control_.rank()) {
      throw UsageError(fmt::format("{}: expected another rank of the {} in group {}, got {}",
                                   argument, control_.size(), control_.name(), peer));
    }
  }

  /// Maps what a rank's handle says. Throws what a rank said that has left, or whose memory it is
  /// and what stood in the way.
  [[nodiscard]] inline std::shared_ptr<SharedMemory> import_from(int peer,
                                                                 std::span<const std::byte> said);

  /// Runs `collective` the group's way, or `alone` in a group of one.
  template <class Shared, class Alone>
  void dispatch(std::string_view call, const Shared& collective, const Alone& alone) {
    check_usable(call);
    const cohort::detail::CallTime time;
    steps_.run([&] {
      if (peers_) {
        collective(*peers_);
      } else if (control_.size() == 1) {
        alone();
      } else {
        collective(exchange_);
      }
    });
  }

  OwnerProcess owner_;
  ControlPlane& control_;
  SymmetricCapabilities capabilities_;
  std::shared_ptr<WindowTable> windows_;
  std::unique_ptr<PeerAccess> access_;
  bool needs_equal_offsets_;
  std::optional<PeerCollectives> peers_;
  std::optional<HostPeerKernels> kernels_;
  ExchangeCollectives exchange_;
  HostSteps steps_;
  std::int64_t form_ = 0;               // of the next all-gather or all-to-all
  std::vector<std::byte> sum_;          // of the norm under way
  std::shared_ptr<Lifeline> lifeline_;  // kept by recorded calls
};

inline std::shared_ptr<SharedMemory> HostTransport::import_from(int peer,
                                                                std::span<const std::byte> said) {
  const auto refuse = [&](long code, std::string_view why) {
    control_.check_peers();  // memory goes with its rank: why that left is the cause
    throw TransportError({.call = "register_segment",
                          .native_code = code,
                          .rank = control_.rank(),
                          .group = control_.name()},
                         fmt::format("with rank {}: {}", peer, why));
  };
  MemoryHandle handle;
  if (said.size() != sizeof(handle)) {
    refuse(EBADMSG, "another message than a handle came");
  }
  std::memcpy(&handle, said.data(), sizeof(handle));
  std::shared_ptr<SharedMemory> memory;
  try {
    memory = import_shared_memory(handle);
  } catch (const TransportError& error) {
    refuse(error.site().native_code, error.what());
  }
  return memory;
}

inline std::unique_ptr<Window> HostTransport::register_segment(Segment& segment) {
  if (!segment.registers_with(BackendKind::host)) {
    throw UsageError("segment: expected one of the host backend");
  }
  if (access_ == nullptr && control_.size() > 1) {
    throw UsageError(fmt::format(
        "register_segment: the ranks of group {} cannot map each other's memory", control_.name()));
  }
  const cohort::detail::CallTime time;
  const std::uint32_t number = windows_->next_number();
  // A rank that fails on the way takes part all the same: the others are in these two exchanges.
  std::exception_ptr failure;
  Bytes mine;
  try {
    const MemoryHandle handle = static_cast<const HostSegment&>(segment).memory()->handle();
    const auto bytes = std::as_bytes(std::span(&handle, 1));
    mine.assign(bytes.begin(), bytes.end());
  } catch (const std::exception&) {
    failure = std::current_exception();
  }
  const auto all = control_.all_gather(mine);
  std::vector<std::shared_ptr<SharedMemory>> memory;
  for (std::size_t r = 0; r < all.size() && !failure; ++r) {
    try {
      if (all[r].empty()) {
        break;  // what it failed with it says in the agreement
      }
      memory.push_back(import_from(static_cast<int>(r), all[r]));
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
  }
  agree(control_,
        {.place = "registration of a host window", .sequence = number, .bytes = segment.bytes()},
        failure);
  return std::make_unique<HostWindow>(windows_, number, control_.rank(), std::move(memory));
}

inline std::string HostTransport::path(Collective collective, const ConstTensorView& in,
                                       const TensorView& out, int) const {
  if (control_.size() == 1) {
    return "local";
  }
  if (access_ == nullptr) {
    return "exchange";
  }
  if (collective == Collective::all_reduce || collective == Collective::all_reduce_rms_norm) {
    const bool sums_into_it = in.dtype() == out.dtype();  // see `all_reduce_rms_norm`
    return sums_into_it && peers_->passes_no_slot(in, out) ? "direct" : "slot";
  }
  bool reads = access_->reads_windows(in.bytes());
  if (collective == Collective::reduce_scatter) {  // of what is scattered the own part stays here
    reads = access_->reads_parts(in.bytes() - out.bytes());
  } else if (collective == Collective::all_to_all) {
    const std::size_t own = in.bytes() / static_cast<std::size_t>(control_.size());
    reads = are_pieces_read_in_window(in.bytes() - own);
  }
  return reads && access_->window_of(in) ? "direct" : "slot";
}

}  // namespace cohort::host
