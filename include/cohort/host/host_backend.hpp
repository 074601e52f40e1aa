#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/host/host_ops.hpp"
#include "cohort/host/host_stream.hpp"
#include "cohort/host/host_transport.hpp"
#include "cohort/host/rendezvous.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/host/window.hpp"
#include "cohort/transport.hpp"

/// \file
/// The backend for tensors in host memory: CPU inference engines, tests, and every machine without
/// a GPU.

namespace cohort {

/// Must be equal on all ranks, except for the limits.
struct HostOptions {
  /// Bytes of each of the two inbox slots that a rank has in each group. Longer messages go through
  /// in pieces. Rounded up to a multiple of 4096.
  std::size_t slot_bytes = std::size_t{1} << 20;
  /// Whether ranks map each other's memory. `false`: the control plane carries everything, as
  /// between machines.
  bool map_peers = true;
  /// Most bytes of segments that this backend gives out; beyond, an allocation fails as the
  /// system's would.
  std::size_t segment_limit = std::numeric_limits<std::size_t>::max();
  /// Takes the place of the boot id: ranks with different names are on different machines. For
  /// rehearsing a layout of several machines on one.
  std::string machine = {};
};

namespace host {

/// What a rank tells its group when a transport is made.
struct Introduction {
  std::array<char, 64> machine{};
  MemoryHandle pad;
  std::uint64_t slot_bytes = 0;
  std::uint64_t has_pad = 0;
};
static_assert(std::is_trivially_copyable_v<Introduction>);

/// Ordinary memory of one tensor. A graph in whose capture it was allocated keeps it as well.
class HostBuffer : public MemoryOwner, public std::enable_shared_from_this<HostBuffer> {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit HostBuffer(std::size_t bytes)
      : data_(::operator new (std::max<std::size_t>(1, bytes), std::align_val_t{kAlignment})) {}
  ~HostBuffer() override { ::operator delete (data_, std::align_val_t{kAlignment}); }

  [[nodiscard]] void* data() const noexcept { return data_; }

  /// The last owner's destruction frees.
  void release(std::uint64_t) noexcept override {}
  void record_stream(std::uint64_t, StreamRef stream) override { retain_in(stream); }
  void retain_in(StreamRef stream) {
    if (stream.valid() && stream.capture_id() != 0) {
      stream.retain_in_capture(shared_from_this());
    }
  }

 private:
  void* data_;
};

/// Bytes of segments in use, so that a limit can be kept.
class SegmentBudget {
 public:
  explicit SegmentBudget(std::size_t limit) : left_(limit) {}

  [[nodiscard]] bool take(std::size_t bytes) noexcept {
    std::size_t left = left_.load(std::memory_order_relaxed);
    do {
      if (left < bytes) {
        return false;
      }
    } while (!left_.compare_exchange_weak(left, left - bytes, std::memory_order_relaxed));
    return true;
  }
  void give_back(std::size_t bytes) noexcept { left_.fetch_add(bytes, std::memory_order_relaxed); }

 private:
  std::atomic<std::size_t> left_;
};

class HostBackend final : public Backend {
 public:
  explicit HostBackend(HostOptions options)
      : options_(std::move(options)),
        budget_(std::make_shared<SegmentBudget>(options_.segment_limit)) {
    options_.slot_bytes = round_up(std::max<std::size_t>(1, options_.slot_bytes));
  }

  [[nodiscard]] BackendKind kind() const noexcept override { return BackendKind::host; }
  [[nodiscard]] Device device() const noexcept override { return {}; }
  [[nodiscard]] StreamDriver& streams() noexcept override { return host_stream_driver(); }
  [[nodiscard]] TensorOps& ops() noexcept override { return ops_; }
  [[nodiscard]] std::size_t segment_granularity() const noexcept override { return kPage; }

  /// Takes the pages at once: a machine without memory fails here, not at the first access.
  [[nodiscard]] std::unique_ptr<Segment> allocate_segment(std::size_t bytes) override {
    if (bytes == 0 || bytes % kPage != 0) {
      throw UsageError(
          fmt::format("segment: expected a positive multiple of {} bytes, got {}", kPage, bytes));
    }
    if (!budget_->take(bytes)) {
      throw TransportError({.call = "memfd_create", .native_code = ENOMEM},
                           fmt::format("{} bytes are more than what the segment limit of {} bytes "
                                       "leaves",
                                       bytes, options_.segment_limit));
    }
    std::shared_ptr<void> hold(nullptr,
                               [budget = budget_, bytes](void*) { budget->give_back(bytes); });
    return std::make_unique<HostSegment>(make_shared_memory(bytes, Commit::at_once),
                                         std::move(hold));
  }

  [[nodiscard]] Tensor allocate(const Dims& shape, DType dtype, StreamRef stream) override {
    const std::size_t bytes = static_cast<std::size_t>(numel(shape)) * size_of(dtype);
    std::shared_ptr<HostBuffer> buffer;
    try {
      buffer = std::make_shared<HostBuffer>(bytes);
    } catch (const std::bad_alloc&) {
      throw TransportError({.call = "operator new", .native_code = ENOMEM},
                           fmt::format("allocating {} bytes for a tensor", bytes));
    }
    buffer->retain_in(stream);
    const TensorView view(buffer->data(), dtype, shape, device());
    return {view, std::move(buffer), 0};
  }

  [[nodiscard]] inline std::unique_ptr<Transport> connect(ControlPlane& group) override;

 private:
  static constexpr std::size_t kPage = 4096;

  static std::size_t round_up(std::size_t bytes) noexcept {
    return (bytes + kPage - 1) / kPage * kPage;
  }

  [[nodiscard]] Introduction introduce(const SharedMemory* pad) const;

  HostOptions options_;
  std::shared_ptr<SegmentBudget> budget_;
  HostOps ops_;
};

inline Introduction HostBackend::introduce(const SharedMemory* pad) const {
  Introduction mine;
  const std::string machine = options_.machine.empty() ? boot_id() : options_.machine;
  std::copy_n(machine.begin(), std::min(machine.size(), mine.machine.size() - 1),
              mine.machine.begin());
  mine.slot_bytes = options_.slot_bytes;
  mine.has_pad = pad != nullptr ? 1 : 0;
  if (pad != nullptr) {
    mine.pad = pad->handle();
  }
  return mine;
}

/// Every rank's pad, or why one could not be mapped.
struct PadImport {
  std::vector<std::shared_ptr<SharedMemory>> pads;
  std::string failure;
};

[[nodiscard]] inline PadImport import_pads(const std::vector<Introduction>& all, int rank) {
  PadImport result;
  const auto& mine = all[static_cast<std::size_t>(rank)];
  for (std::size_t r = 0; r < all.size() && result.failure.empty(); ++r) {
    if (all[r].has_pad == 0) {
      result.failure = fmt::format("rank {} offers no memory", r);
    } else if (all[r].machine != mine.machine) {
      result.failure = fmt::format("rank {} is on another machine", r);
    } else {
      try {
        result.pads.push_back(import_shared_memory(all[r].pad));
      } catch (const Error& error) {
        result.failure = fmt::format("rank {}: {}", r, error.what());
      }
    }
  }
  return result;
}

inline std::unique_ptr<Transport> HostBackend::connect(ControlPlane& group) {
  const auto n = static_cast<std::size_t>(group.size());
  PadGeometry geometry{.ranks = group.size(),
                       .slot_bytes = std::max(options_.slot_bytes, round_up(n * 256))};
  std::shared_ptr<SharedMemory> own;
  bool has_memory_files = true;
  try {
    if (group.size() > 1) {
      own = make_shared_memory(geometry.bytes(), Commit::at_first_access);
      Rendezvous::construct(*own, geometry);
    }
  } catch (const TransportError& error) {
    has_memory_files = false;  // a fact for the policy, which says so in the group's warning
    log(LogLevel::warning, error.what());
  }

  const Introduction mine = introduce(options_.map_peers ? own.get() : nullptr);
  std::vector<Introduction> all;
  for (const auto& bytes : group.all_gather(std::as_bytes(std::span(&mine, 1)))) {
    Introduction theirs;
    if (bytes.size() != sizeof(theirs)) {
      throw SymmetryError(fmt::format("connect in group {}: rank {} sent no introduction",
                                      group.name(), all.size()),
                          {static_cast<int>(all.size())});
    }
    std::memcpy(&theirs, bytes.data(), sizeof(theirs));
    all.push_back(theirs);
  }
  PadImport imported = group.size() > 1 ? import_pads(all, group.rank()) : PadImport{};

  // Reach counts only if every rank has it, so the verdicts are compared before anyone relies on
  // it.
  ControlPlane* only = &group;
  agree(std::span(&only, 1),
        {.place = "options of the host transport", .bytes = geometry.slot_bytes});
  const std::array<std::uint8_t, 2> verdict{imported.failure.empty(), has_memory_files};
  bool reach = true;
  for (const auto& theirs : group.all_gather(std::as_bytes(std::span(verdict)))) {
    reach = reach && theirs[0] == std::byte{1};
    has_memory_files = has_memory_files && theirs[1] == std::byte{1};
  }
  if (!reach && !imported.failure.empty()) {
    log(LogLevel::info,
        fmt::format("group {}: no peer mapping: {}", group.name(), imported.failure));
  }

  std::set<std::string> machines;
  for (const auto& introduction : all) {
    machines.insert(introduction.machine.data());
  }
  const SymmetricCapabilities capabilities{.backend = BackendKind::host,
                                           .transport_windows = has_memory_files,
                                           .machines = static_cast<int>(machines.size()),
                                           .peer_access = true,
                                           .peer_import = reach};
  auto windows = std::make_shared<WindowTable>();
  std::unique_ptr<PeerAccess> access;
  if (reach && group.size() > 1) {
    own->close_file();  // all have mapped it
    access = std::make_unique<PeerAccess>(
        std::make_unique<Rendezvous>(std::move(imported.pads), geometry, group.rank(), group.name(),
                                     group.limit()),
        windows);
  }
  return std::make_unique<HostTransport>(group, capabilities, std::move(access),
                                         std::move(windows));
}

}  // namespace host

/// The host backend. One for each rank; ranks that are threads have one each.
[[nodiscard]] inline std::shared_ptr<Backend> host_backend(HostOptions options = {}) {
  return std::make_shared<host::HostBackend>(std::move(options));
}

}  // namespace cohort
