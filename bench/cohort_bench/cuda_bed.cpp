// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <utility>

#include "../timing_event.hpp"
#include "bed.hpp"
#include "cohort/cuda.hpp"
#include "cohort/nccl/communicator.hpp"
#include "cohort/nccl/machine_probe.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/nccl/nccl_window.hpp"
#include "cuda_facts.hpp"
#include "device_kernels.hpp"

namespace cohort::bench {

namespace {

/// Long enough for a host to enqueue a graph behind it.
constexpr double kHeadStartUs = 100;

/// NCCL as an engine would call it, on a communicator of its own.
class RawNccl final : public RawLibrary {
 public:
  RawNccl(ControlPlane& world, CudaBackend& backend, cudaStream_t stream)
      : control_(world.split(0, 0, "raw")), backend_(backend), stream_(stream) {
    if (control_->size() > 1) {
      communicator_ = Communicator::create(*control_, backend.device().index);
    }
  }

  [[nodiscard]] bool reduces(DType) const override { return true; }

  [[nodiscard]] Buffer allocate(const Dims& shape, DType dtype, bool registered) override {
    if (!registered || communicator_ == nullptr) {
      auto tensor =
          std::make_shared<Tensor>(backend_.allocate(shape, dtype, backend_.stream(stream_)));
      return {tensor->view(), tensor};
    }
    struct Registered {
      std::unique_ptr<NcclSegment> segment;
      std::unique_ptr<Window> window;  // goes first
    };
    const std::size_t bytes = static_cast<std::size_t>(numel(shape)) * size_of(dtype);
    const std::size_t unit = backend_.segment_granularity();
    auto owner = std::make_shared<Registered>();
    owner->segment = std::make_unique<NcclSegment>(
        backend_.device().index, std::max(unit, (bytes + unit - 1) / unit * unit));
    control_->barrier();
    owner->window = NcclWindow::create(communicator_, *owner->segment, *control_);
    return {TensorView(owner->segment->data(), dtype, shape, backend_.device()), owner};
  }

  void all_gather(const void* in, void* out, std::size_t share_bytes) override {
    check(ncclAllGather(in, out, share_bytes, ncclUint8, comm(), stream_), "ncclAllGather");
  }
  void reduce_scatter(const void* in, void* out, std::size_t count, DType dtype) override {
    check(ncclReduceScatter(in, out, count, nccl_type(dtype), ncclSum, comm(), stream_),
          "ncclReduceScatter");
  }
  void all_reduce(const void* in, void* out, std::size_t count, DType dtype) override {
    check(ncclAllReduce(in, out, count, nccl_type(dtype), ncclSum, comm(), stream_),
          "ncclAllReduce");
  }

 private:
  [[nodiscard]] ncclComm_t comm() const {
    if (communicator_ == nullptr) {
      throw UsageError("raw: one rank has no one to communicate with");
    }
    return communicator_->get();
  }
  static void check(ncclResult_t code, const char* call) { nccl_check(code, call); }

  std::unique_ptr<ControlPlane> control_;
  CudaBackend& backend_;
  cudaStream_t stream_;
  std::shared_ptr<Communicator> communicator_;
};

class CudaPeerMemory final : public PeerMemory {
 public:
  explicit CudaPeerMemory(std::unique_ptr<PeerMapping> mapping) : mapping_(std::move(mapping)) {}
  [[nodiscard]] std::span<void* const> peers() const override { return mapping_->peers(); }

 private:
  std::unique_ptr<PeerMapping> mapping_;
};

class CudaBed final : public Bed {
 public:
  // A forced limit takes the own kernels wherever an inbox has room, and none at all.
  CudaBed()
      : own_({.own_max_bytes = std::numeric_limits<std::int64_t>::max()}),
        comparing_({.device = own_.device().index, .own_max_bytes = 0}),
        library_({.device = own_.device().index, .peer_mapping = false, .own_max_bytes = 0}),
        device_(own_.device().index),
        stream_(make_stream(device_)),
        begin_(make_timing_event(device_)),
        end_(make_timing_event(device_)) {
    const DeviceGuard guard(device_);
    cuda_check(cudaDeviceGetAttribute(&clock_khz_, cudaDevAttrClockRate, device_),
               "cudaDeviceGetAttribute");
    cuda_check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device_),
               "cudaDeviceGetAttribute");
  }

  [[nodiscard]] BackendKind kind() const noexcept override { return BackendKind::cuda; }
  [[nodiscard]] StreamRef stream() noexcept override { return own_.stream(stream_.get()); }
  [[nodiscard]] Backend& backend(OwnKernels kernels) override {
    return kernels == OwnKernels::all       ? own_
           : kernels == OwnKernels::compare ? comparing_
                                            : library_;
  }
  /// The policy's answer for a symmetric group decides; what is known here is the library alone.
  [[nodiscard]] std::string registration_obstacle() const override {
    return nccl_has_windows() ? "" : "this NCCL has no windows";
  }
  [[nodiscard]] std::unique_ptr<RawLibrary> raw(ControlPlane& world) override {
    return std::make_unique<RawNccl>(world, library_, stream_.get());
  }
  [[nodiscard]] std::unique_ptr<PeerMemory> peer_memory(ControlPlane& world,
                                                        std::size_t bytes) override {
    auto outcome = PeerMapping::create(world, device_, bytes);
    if (!outcome.mapping) {
      return nullptr;
    }
    return std::make_unique<CudaPeerMemory>(std::move(outcome.mapping));
  }

  /// By the device's clock, as events. In graph mode the stream is held back until the host has
  /// enqueued everything, so that only the device's time counts; eagerly the host's time to issue
  /// the calls counts as well, because an eager engine waits for it. The host's time alone is by
  /// its own clock.
  [[nodiscard]] double elapsed_us(const std::function<void()>& align,
                                  const std::function<void()>& work, Mode mode) override {
    const DeviceGuard guard(device_);
    if (mode == Mode::graph) {
      spin(kHeadStartUs);
      align();
    } else {
      align();
      synchronize();
    }
    if (mode == Mode::issue) {
      const auto begin = std::chrono::steady_clock::now();
      work();
      const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - begin;
      synchronize();
      return us.count();
    }
    cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
    work();
    cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
    synchronize();
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin_.get(), end_.get()), "cudaEventElapsedTime");
    return static_cast<double>(ms) * 1e3;
  }
  void synchronize() override { stream().synchronize(kLimit); }

  void put(void* to, std::span<const std::byte> from) override {
    copy(to, from.data(), from.size());
  }
  void get(std::span<std::byte> to, const void* from) override { copy(to.data(), from, to.size()); }
  void fill_bytes(void* to, std::size_t bytes, std::uint8_t value) override {
    const DeviceGuard guard(device_);
    cuda_check(cudaMemsetAsync(to, value, bytes, stream_.get()), "cudaMemsetAsync");
    synchronize();
  }

  void stand_in(bool next_waits) override {
    constexpr double kAttentionUs = 5;  // a layer's local attention at small batches
    const DeviceGuard guard(device_);
    spin(kAttentionUs, next_waits);
  }
  void enqueue_copy(void* to, const void* from, std::size_t bytes) override {
    const DeviceGuard guard(device_);
    launch_copy(to, from, bytes, multiprocessors_ * 2, stream_.get());
  }

  [[nodiscard]] std::int64_t memory_used() const override {
    const DeviceGuard guard(device_);
    std::size_t free = 0;
    std::size_t all = 0;
    cuda_check(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
    return static_cast<std::int64_t>(all - free);
  }

  void describe(Meta& meta, ControlPlane& world) override { describe_cuda(meta, world, device_); }

 private:
  void spin(double us, bool next_waits = false) {
    launch_spin(static_cast<long long>(us * clock_khz_ * 1e-3), next_waits, stream_.get());
  }
  void copy(void* to, const void* from, std::size_t bytes) {
    const DeviceGuard guard(device_);
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_.get()),
               "cudaMemcpyAsync");
    synchronize();
  }

  CudaBackend own_;
  CudaBackend comparing_;
  CudaBackend library_;
  int device_;
  UniqueStream stream_;
  UniqueEvent begin_;
  UniqueEvent end_;
  int clock_khz_ = 0;
  int multiprocessors_ = 0;
};

}  // namespace

std::unique_ptr<Bed> make_cuda_bed() { return std::make_unique<CudaBed>(); }

}  // namespace cohort::bench
