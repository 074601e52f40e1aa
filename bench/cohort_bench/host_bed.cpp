// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <mpi.h>

#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "bed.hpp"
#include "cohort/host/host_backend.hpp"
#include "cohort/mpi/mpi_control_plane.hpp"
#include "shared_loop.hpp"

namespace cohort::bench {

namespace {

[[nodiscard]] double now_us() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// What is called on this thread, in ordinary memory.
class HostLibrary : public RawLibrary {
 public:
  HostLibrary(Backend& backend, HostStream& stream) : backend_(backend), stream_(stream) {}

  [[nodiscard]] Buffer allocate(const Dims& shape, DType dtype, bool) override {
    auto tensor = std::make_shared<Tensor>(backend_.allocate(shape, dtype, {}));
    return {tensor->view(), tensor};
  }

 protected:
  /// Calls at once, without the cost of a stream, unless the stream is capturing.
  template <class Work>
  void run(const Work& work) {
    if (stream_.ref().capture_id() == 0) {
      work();
    } else {
      stream_.submit(work);
    }
  }

 private:
  Backend& backend_;
  HostStream& stream_;
};

/// MPI as an engine would call it, on the world's communicator.
class RawMpi final : public HostLibrary {
 public:
  using HostLibrary::HostLibrary;

  /// MPI has no 16-bit floating types.
  [[nodiscard]] bool reduces(DType dtype) const override { return dtype == DType::f32; }

  void all_gather(const void* in, void* out, std::size_t share_bytes) override {
    run([=, count = static_cast<int>(share_bytes)] {
      cohort::detail::mpi_check(
          MPI_Allgather(in, count, MPI_BYTE, out, count, MPI_BYTE, MPI_COMM_WORLD),
          "MPI_Allgather");
    });
  }
  void reduce_scatter(const void* in, void* out, std::size_t count, DType) override {
    run([=, elements = static_cast<int>(count)] {
      cohort::detail::mpi_check(
          MPI_Reduce_scatter_block(in, out, elements, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD),
          "MPI_Reduce_scatter_block");
    });
  }
  void all_reduce(const void* in, void* out, std::size_t count, DType) override {
    run([=, elements = static_cast<int>(count)] {
      cohort::detail::mpi_check(MPI_Allreduce(in == out ? MPI_IN_PLACE : in, out, elements,
                                              MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD),
                                "MPI_Allreduce");
    });
  }
};

/// A segment and its window, registered with a transport of their own.
class HostPeerMemory final : public PeerMemory {
 public:
  HostPeerMemory(Backend& backend, std::unique_ptr<ControlPlane> control, std::size_t bytes)
      : control_(std::move(control)), transport_(backend.connect(*control_)) {
    if (transport_->peer_kernels() != nullptr) {
      const std::size_t unit = backend.segment_granularity();
      segment_ = backend.allocate_segment((bytes + unit - 1) / unit * unit);
      window_ = transport_->register_segment(*segment_);
    }
  }
  [[nodiscard]] bool mapped() const noexcept { return window_ != nullptr; }
  [[nodiscard]] std::span<void* const> peers() const override { return window_->peers(); }

 private:
  std::unique_ptr<ControlPlane> control_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Segment> segment_;
  std::unique_ptr<Window> window_;
};

/// The loop over memory of its own.
class RawLoop final : public HostLibrary {
 public:
  RawLoop(Backend& backend, HostStream& stream, std::unique_ptr<PeerMemory> memory, int rank)
      : HostLibrary(backend, stream), memory_(std::move(memory)), loop_(parts(*memory_), rank) {}

  [[nodiscard]] bool reduces(DType) const override { return true; }

  void all_gather(const void* in, void* out, std::size_t share_bytes) override {
    run([=, this] { loop_.all_gather(bytes(in), bytes(out), share_bytes); });
  }
  void reduce_scatter(const void* in, void* out, std::size_t count, DType dtype) override {
    run([=, this] { loop_.reduce_scatter(bytes(in), bytes(out), count * size_of(dtype), dtype); });
  }
  void all_reduce(const void* in, void* out, std::size_t count, DType dtype) override {
    run([=, this] { loop_.all_reduce(bytes(in), bytes(out), count * size_of(dtype), dtype); });
  }

 private:
  static const std::byte* bytes(const void* memory) {
    return static_cast<const std::byte*>(memory);
  }
  static std::byte* bytes(void* memory) { return static_cast<std::byte*>(memory); }
  static std::vector<LoopPart*> parts(const PeerMemory& memory) {
    std::vector<LoopPart*> found;
    for (void* part : memory.peers()) {
      found.push_back(static_cast<LoopPart*>(part));
    }
    return found;
  }

  std::unique_ptr<PeerMemory> memory_;
  SharedLoop loop_;
};

class HostBed final : public Bed {
 public:
  [[nodiscard]] BackendKind kind() const noexcept override { return BackendKind::host; }
  [[nodiscard]] StreamRef stream() noexcept override { return stream_.ref(); }
  [[nodiscard]] Backend& backend(OwnKernels) override { return *backend_; }
  [[nodiscard]] std::string registration_obstacle() const override {
    return "MPI's collectives have no registered buffers";
  }
  [[nodiscard]] std::unique_ptr<RawLibrary> raw(ControlPlane&) override {
    return std::make_unique<RawMpi>(*backend_, stream_);
  }
  [[nodiscard]] std::unique_ptr<RawLibrary> shared_loop(ControlPlane& world) override {
    auto memory = peer_memory(world, sizeof(LoopPart));
    return memory == nullptr
               ? nullptr
               : std::make_unique<RawLoop>(*backend_, stream_, std::move(memory), world.rank());
  }
  [[nodiscard]] std::unique_ptr<PeerMemory> peer_memory(ControlPlane& world,
                                                        std::size_t bytes) override {
    auto memory =
        std::make_unique<HostPeerMemory>(*backend_, world.split(0, 0, "peer memory"), bytes);
    if (!memory->mapped()) {
      return nullptr;
    }
    return memory;
  }

  [[nodiscard]] double elapsed_us(const std::function<void()>& align,
                                  const std::function<void()>& work, Mode) override {
    align();
    const double start = now_us();
    work();
    return now_us() - start;
  }
  void synchronize() override {}

  void put(void* to, std::span<const std::byte> from) override {
    std::memcpy(to, from.data(), from.size());
  }
  void get(std::span<std::byte> to, const void* from) override {
    std::memcpy(to.data(), from, to.size());
  }
  void fill_bytes(void* to, std::size_t bytes, std::uint8_t value) override {
    std::memset(to, value, bytes);
  }

  void stand_in(bool /*next_waits*/) override {
    stream_.submit([] {
      constexpr double kAttentionUs = 2;
      const double start = now_us();
      while (now_us() - start < kAttentionUs) {
      }
    });
  }
  void enqueue_copy(void* to, const void* from, std::size_t bytes) override {
    if (stream_.ref().capture_id() == 0) {
      std::memcpy(to, from, bytes);
    } else {
      stream_.submit([=] { std::memcpy(to, from, bytes); });
    }
  }

  void describe(Meta&, ControlPlane&) override {}

 private:
  HostStream stream_;
  std::shared_ptr<Backend> backend_ = host_backend();
};

}  // namespace

std::unique_ptr<Bed> make_host_bed() { return std::make_unique<HostBed>(); }

}  // namespace cohort::bench
