// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/host/host_backend.hpp>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "support/group_tensors.hpp"

/// \file
/// A host backend some of whose steps a test replaces, so that one rank can fail in them as the
/// libraries of other backends do.

namespace cohort::test {

/// What replaces a step; nothing where it stays as it is.
struct StandIns {
  /// Instead of registering with the group; calls `go_on` for the real thing.
  using Register = std::function<std::unique_ptr<Window>(
      ControlPlane& group, const std::function<std::unique_ptr<Window>()>& go_on)>;
  /// Before connecting the group.
  using Connect = std::function<void(ControlPlane& group)>;

  /// When a transport shall no longer wait for peers.
  using Forsake = std::function<void(const ControlPlane& group)>;

  Register register_segment = {};
  Connect connect = {};
  Forsake forsake_peers = {};

  /// When another group's thread asks, and when the transport goes.
  using Check = std::function<void(const ControlPlane& group)>;
  Check check = {};
  Check end = {};

  /// Before a reduce-scatter is issued, and a wait.
  Check reduce_scatter = {};
  Check synchronize = {};
  /// When the device has refused something.
  Check refused = {};

  /// What an arena has got.
  std::function<void(Segment& segment)> allocated = {};
};

class StandInTransport final : public Transport {
 public:
  StandInTransport(std::unique_ptr<Transport> real, ControlPlane& group, StandIns steps)
      : real_(std::move(real)), group_(group), steps_(std::move(steps)) {}
  ~StandInTransport() override {
    if (steps_.end) {
      steps_.end(group_);
    }
  }

  [[nodiscard]] std::string_view name() const noexcept override { return real_->name(); }
  [[nodiscard]] const SymmetricCapabilities& capabilities() const noexcept override {
    return real_->capabilities();
  }
  [[nodiscard]] PeerKernels* peer_kernels() noexcept override { return real_->peer_kernels(); }
  [[nodiscard]] bool needs_equal_offsets() const noexcept override {
    return real_->needs_equal_offsets();
  }
  void compare_places() noexcept override { real_->compare_places(); }
  void compare_shapes() noexcept override { real_->compare_shapes(); }
  void agree_also(std::int64_t form) noexcept override { real_->agree_also(form); }
  [[nodiscard]] std::unique_ptr<Window> register_segment(Segment& segment) override {
    const auto go_on = [&] { return real_->register_segment(segment); };
    return steps_.register_segment ? steps_.register_segment(group_, go_on) : go_on();
  }
  void all_gather(const ConstTensorView& in, const TensorView& out, int dim,
                  std::span<const std::int64_t> sizes, StreamRef stream) override {
    real_->all_gather(in, out, dim, sizes, stream);
  }
  void reduce_scatter(const ConstTensorView& in, const TensorView& out, int dim,
                      std::span<const std::int64_t> sizes, ReduceOp op, StreamRef stream) override {
    if (steps_.reduce_scatter) {
      steps_.reduce_scatter(group_);
    }
    real_->reduce_scatter(in, out, dim, sizes, op, stream);
  }
  void all_reduce(const ConstTensorView& in, const TensorView& out, ReduceOp op,
                  StreamRef stream) override {
    real_->all_reduce(in, out, op, stream);
  }
  void broadcast(const TensorView& tensor, int root, StreamRef stream) override {
    real_->broadcast(tensor, root, stream);
  }
  void all_to_all(const ConstTensorView& in, const TensorView& out, StreamRef stream) override {
    real_->all_to_all(in, out, stream);
  }
  void send(const ConstTensorView& tensor, int to, StreamRef stream) override {
    real_->send(tensor, to, stream);
  }
  void recv(const TensorView& tensor, int from, StreamRef stream) override {
    real_->recv(tensor, from, stream);
  }
  void barrier(StreamRef stream) override { real_->barrier(stream); }
  [[nodiscard]] std::string path(Collective collective, const ConstTensorView& in,
                                 const TensorView& out, int dim) const override {
    return real_->path(collective, in, out, dim);
  }
  void synchronize(StreamRef stream, std::chrono::milliseconds limit) override {
    if (steps_.synchronize) {
      steps_.synchronize(group_);
    }
    real_->synchronize(stream, limit);
  }
  void check(StreamRef stream, PeerLook look) override {
    if (steps_.check) {
      steps_.check(group_);
    }
    real_->check(stream, look);
  }
  [[nodiscard]] bool failed() const noexcept override { return real_->failed(); }
  [[nodiscard]] std::optional<cohort::detail::GiveUp> differed() const override {
    return real_->differed();
  }
  void refused(const std::exception_ptr& error) noexcept override {
    if (steps_.refused) {
      steps_.refused(group_);
    }
    real_->refused(error);
  }
  void forsake_peers(const cohort::detail::GiveUp& why) noexcept override {
    if (steps_.forsake_peers) {
      steps_.forsake_peers(group_);
    }
    real_->forsake_peers(why);
  }

 private:
  std::unique_ptr<Transport> real_;
  ControlPlane& group_;
  StandIns steps_;
};

class StandInBackend final : public Backend {
 public:
  explicit StandInBackend(StandIns steps, HostOptions options = {})
      : real_(host_backend(std::move(options))), steps_(std::move(steps)) {}

  [[nodiscard]] BackendKind kind() const noexcept override { return real_->kind(); }
  [[nodiscard]] Device device() const noexcept override { return real_->device(); }
  [[nodiscard]] StreamDriver& streams() noexcept override { return real_->streams(); }
  [[nodiscard]] TensorOps& ops() noexcept override { return real_->ops(); }
  [[nodiscard]] std::unique_ptr<Segment> allocate_segment(std::size_t bytes) override {
    return shown(real_->allocate_segment(bytes));
  }
  [[nodiscard]] std::unique_ptr<Segment> allocate_workspace(std::size_t bytes) override {
    return shown(real_->allocate_workspace(bytes));
  }
  [[nodiscard]] std::size_t segment_granularity() const noexcept override {
    return real_->segment_granularity();
  }
  [[nodiscard]] Tensor allocate(const Dims& shape, DType dtype, StreamRef stream) override {
    return real_->allocate(shape, dtype, stream);
  }
  [[nodiscard]] std::unique_ptr<Transport> connect(ControlPlane& group) override {
    if (steps_.connect) {
      steps_.connect(group);
    }
    return std::make_unique<StandInTransport>(real_->connect(group), group, steps_);
  }

 private:
  [[nodiscard]] std::unique_ptr<Segment> shown(std::unique_ptr<Segment> segment) const {
    if (steps_.allocated) {
      steps_.allocated(*segment);
    }
    return segment;
  }

  std::shared_ptr<Backend> real_;
  StandIns steps_;
};

/// Of all ranks of two stages of two; `steps` replaces parts of the backend.
[[nodiscard]] inline ParallelState two_by_two(ControlPlane& world, StandIns steps) {
  return make_state(world, {.tp = 2, .pp = 2, .dcp = 1},
                    {.backend = std::make_shared<StandInBackend>(std::move(steps))});
}

/// What a registration throws.
inline const TransportError kNoMemory({.call = "ncclCommWindowRegister", .native_code = 2},
                                      "out of memory");

}  // namespace cohort::test
