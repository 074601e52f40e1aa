// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/transport.hpp"
#include "options.hpp"
#include "rows.hpp"

/// \file
/// What the benchmarks need of a device: streams and clocks, memory that the host can fill and
/// read, and the bare library that Cohort is compared with.

namespace cohort::bench {

/// No wait of the benchmark is longer.
inline constexpr std::chrono::milliseconds kLimit{60'000};

/// What the library's own kernels do.
enum class OwnKernels : std::uint8_t {
  none,     ///< Peers' memory is not mapped.
  compare,  ///< They compare places before calls of the transport's library, and carry nothing.
  all,      ///< They carry whatever they can.
};

/// Memory and what keeps it.
struct Buffer {
  TensorView view;
  std::shared_ptr<void> owner;
};

/// The bare library, called the way an engine calls it without Cohort. Calls are enqueued on the
/// bed's stream. Every rank makes the same calls.
class RawLibrary {
 public:
  RawLibrary() = default;
  RawLibrary(const RawLibrary&) = delete;
  RawLibrary& operator=(const RawLibrary&) = delete;
  virtual ~RawLibrary() = default;

  /// Whether it can add elements of the type.
  [[nodiscard]] virtual bool reduces(DType dtype) const = 0;
  /// Collective. Memory as the library gives it out, registered where asked for.
  [[nodiscard]] virtual Buffer allocate(const Dims& shape, DType dtype, bool registered) = 0;

  virtual void all_gather(const void* in, void* out, std::size_t share_bytes) = 0;
  /// `count` elements for each rank.
  virtual void reduce_scatter(const void* in, void* out, std::size_t count, DType dtype) = 0;
  virtual void all_reduce(const void* in, void* out, std::size_t count, DType dtype) = 0;
};

/// Memory of every rank that this rank can load from and store to.
class PeerMemory {
 public:
  PeerMemory() = default;
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;
  virtual ~PeerMemory() = default;

  /// By rank, the own copy included.
  [[nodiscard]] virtual std::span<void* const> peers() const = 0;
};

class Bed {
 public:
  Bed() = default;
  Bed(const Bed&) = delete;
  Bed& operator=(const Bed&) = delete;
  virtual ~Bed() = default;

  [[nodiscard]] virtual BackendKind kind() const noexcept = 0;
  [[nodiscard]] virtual StreamRef stream() noexcept = 0;
  [[nodiscard]] virtual Backend& backend(OwnKernels kernels = OwnKernels::none) = 0;
  /// Why the library cannot register buffers, or "".
  [[nodiscard]] virtual std::string registration_obstacle() const = 0;
  [[nodiscard]] virtual std::unique_ptr<RawLibrary> raw(ControlPlane& world) = 0;
  /// Collective. The loop of shared_loop.hpp, or null where there is none.
  [[nodiscard]] virtual std::unique_ptr<RawLibrary> shared_loop(ControlPlane&) { return nullptr; }
  /// Null where not every rank can map every other's memory.
  [[nodiscard]] virtual std::unique_ptr<PeerMemory> peer_memory(ControlPlane& world,
                                                                std::size_t bytes) = 0;

  /// Microseconds from when all ranks are ready, which `align` enqueues, to the end of `work`; of
  /// `issue` to when it has returned.
  [[nodiscard]] virtual double elapsed_us(const std::function<void()>& align,
                                          const std::function<void()>& work, Mode mode) = 0;
  /// Waits for the stream.
  virtual void synchronize() = 0;

  // The stream is idle for these three.
  virtual void put(void* to, std::span<const std::byte> from) = 0;
  virtual void get(std::span<std::byte> to, const void* from) = 0;
  virtual void fill_bytes(void* to, std::size_t bytes, std::uint8_t value) = 0;

  /// Enqueues a fixed amount of work that communicates nothing: a layer's local attention.
  ///
  /// @param next_waits  What follows waits for the end of the kernel before it by itself: on a card
  ///                    it may be launched as soon as this has begun.
  virtual void stand_in(bool next_waits) = 0;
  /// Enqueues a copy by loads and stores; either side may be a peer's memory.
  virtual void enqueue_copy(void* to, const void* from, std::size_t bytes) = 0;

  /// Bytes of the device's memory that are in use, by whomever; 0 on the host.
  [[nodiscard]] virtual std::int64_t memory_used() const { return 0; }

  /// Device, driver and library versions, for the first line of the result file. Collective.
  virtual void describe(Meta& meta, ControlPlane& world) = 0;
};

/// Collective.
[[nodiscard]] std::unique_ptr<Bed> make_host_bed();
/// Throws `ConfigError` where the program was built without CUDA.
[[nodiscard]] std::unique_ptr<Bed> make_cuda_bed();

}  // namespace cohort::bench
