// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
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
#include "cohort/fixed_text.hpp"
#include "cohort/host/host_ops.hpp"
#include "cohort/host/host_stream.hpp"
#include "cohort/host/host_transport.hpp"
#include "cohort/host/rendezvous.hpp"
#include "cohort/host/shared_memory.hpp"
#include "cohort/host/slot_sizes.hpp"
#include "cohort/host/window.hpp"
#include "cohort/joined.hpp"
#include "cohort/transport.hpp"

/// \file
/// The backend for tensors in host memory: CPU inference engines, tests, and every machine without
/// a GPU.

namespace cohort {

/// Must be equal on all ranks, except for the limits and `window_bytes`.
struct HostOptions {
  /// Bytes of each of the two inbox slots that a rank has in each group. Longer messages go through
  /// in pieces. Rounded up to a multiple of 4096.
  std::size_t slot_bytes = std::size_t{1} << 20;
  /// From so many bytes on, peers read a rank's tensor in its window, where it lies in one, rather
  /// than in its slot; parts of a tensor from twice as many. Fewer pay where nobody writes to
  /// inputs between calls, or where the ranks' cores share a cache: bench/README.md, "The host
  /// beside its peers".
  std::size_t window_bytes = host::kWindowBytes;
  /// Whether ranks map each other's memory. `false`: the control plane carries everything, as
  /// between machines.
  bool map_peers = true;
  /// Most bytes of segments that this backend gives out; beyond, an allocation fails as the
  /// system's would.
  std::size_t segment_limit = std::numeric_limits<std::size_t>::max();
  /// Takes the place of the boot id: ranks with different names are on different machines. For
  /// rehearsing a layout of several machines on one.
  std::string machine = {};
  /// Arenas are kept as strictly alike as for transports that compute a peer's address from the own
  /// offset. For rehearsing a program that will run on such a one.
  bool needs_equal_offsets = false;
};

namespace host {

/// What a rank tells its group when a transport is made.
struct Introduction {
  std::uint64_t protocol = kPadProtocol;  ///< First in every version.
  std::array<char, 64> machine{};         ///< "" where this rank could not find out.
  std::array<char, 192> obstacle{};       ///< Why this rank offers no pad; "" where it does.
  MemoryHandle pad;                       ///< Where its signal pad lies.
  std::uint64_t has_memory_files = 0;     ///< 1 where this rank can share memory.
};
static_assert(std::is_trivially_copyable_v<Introduction> && offsetof(Introduction, protocol) == 0);

/// Ordinary memory of one tensor. A graph in whose capture it was allocated keeps it as well.
class HostBuffer : public MemoryOwner, public std::enable_shared_from_this<HostBuffer> {
 public:
  /// Of the first byte.
  static constexpr std::size_t kAlignment = 64;

  /// Throws `std::bad_alloc`.
  explicit HostBuffer(std::size_t bytes)
      : data_(::operator new (std::max<std::size_t>(1, bytes), std::align_val_t{kAlignment})) {}
  ~HostBuffer() override { ::operator delete (data_, std::align_val_t{kAlignment}); }

  /// The first byte.
  [[nodiscard]] void* data() const noexcept { return data_; }

  /// The last owner's destruction frees.
  void release(std::uint64_t) noexcept override {}
  void record_stream(std::uint64_t, StreamRef stream) override { retain_in(stream); }
  /// A graph that is being captured on the stream keeps the memory.
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
  /// `limit` is in bytes, for all segments.
  explicit SegmentBudget(std::size_t limit) : left_(limit) {}

  /// Whether so much was left; it is taken then.
  [[nodiscard]] bool take(std::size_t bytes) noexcept {
    std::size_t left = left_.load(std::memory_order_relaxed);
    do {
      if (left < bytes) {
        return false;
      }
    } while (!left_.compare_exchange_weak(left, left - bytes, std::memory_order_relaxed));
    return true;
  }
  /// What was taken.
  void give_back(std::size_t bytes) noexcept { left_.fetch_add(bytes, std::memory_order_relaxed); }

 private:
  std::atomic<std::size_t> left_;
};

/// Tensors in the host's memory; made by `host_backend`.
class HostBackend final : public Backend {
 public:
  /// With limits for its memory.
  explicit HostBackend(HostOptions options)
      : options_(std::move(options)),
        budget_(std::make_shared<SegmentBudget>(options_.segment_limit)) {
    options_.slot_bytes = round_up(std::max<std::size_t>(1, options_.slot_bytes));
  }

  /// The host.
  [[nodiscard]] BackendKind kind() const noexcept override { return BackendKind::host; }
  /// The host.
  [[nodiscard]] Device device() const noexcept override { return {}; }
  /// In-order executors.
  [[nodiscard]] StreamDriver& streams() noexcept override { return host_stream_driver(); }
  /// Local work on the processor.
  [[nodiscard]] TensorOps& ops() noexcept override { return ops_; }
  /// A page.
  [[nodiscard]] std::size_t segment_granularity() const noexcept override { return kPage; }

  /// Takes the pages at once: a machine without memory fails here, not at the first access.
  [[nodiscard]] std::unique_ptr<Segment> allocate_segment(std::size_t bytes) override {
    auto hold = budgeted(bytes);
    return std::make_unique<HostSegment>(make_shared_memory(bytes, Commit::at_once),
                                         std::move(hold));
  }
  [[nodiscard]] std::unique_ptr<Segment> allocate_workspace(std::size_t bytes) override {
    return std::make_unique<PrivateSegment>(bytes, budgeted(bytes));
  }

  [[nodiscard]] Tensor allocate(const Dims& shape, DType dtype, StreamRef stream) override {
    const std::size_t bytes = bytes_of(shape, dtype);
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

  /// Checks a segment's size and takes it from the limit for as long as the result lives.
  [[nodiscard]] std::shared_ptr<void> budgeted(std::size_t bytes) const {
    if (bytes == 0 || bytes % kPage != 0) {
      throw UsageError(
          fmt::format("segment: expected a positive multiple of {} bytes, got {}", kPage, bytes));
    }
    if (!budget_->take(bytes)) {
      throw TransportError({.call = "segment", .native_code = ENOMEM},
                           fmt::format("{} bytes are more than what the segment limit of {} bytes "
                                       "leaves",
                                       bytes, options_.segment_limit));
    }
    return {nullptr, [budget = budget_, bytes](void*) { budget->give_back(bytes); }};
  }

  /// This rank's pad where it can offer one.
  [[nodiscard]] std::shared_ptr<SharedMemory> make_pad(const PadGeometry& geometry,
                                                       Introduction& mine) const;
  [[nodiscard]] Introduction introduce() const;

  HostOptions options_;
  std::shared_ptr<SegmentBudget> budget_;
  HostOps ops_;
};

inline Introduction HostBackend::introduce() const {
  Introduction mine;
  const BootId boot = read_boot_id();
  const std::string machine = options_.machine.empty() ? boot.text : options_.machine;
  cohort::detail::copy_text(machine, mine.machine);
  if (machine.empty()) {
    cohort::detail::copy_text(
        fmt::format("the boot id could not be read: {}", std::strerror(boot.error)), mine.obstacle);
  } else if (!options_.map_peers) {
    cohort::detail::copy_text("HostOptions::map_peers is false", mine.obstacle);
  }
  return mine;
}

inline std::shared_ptr<SharedMemory> HostBackend::make_pad(const PadGeometry& geometry,
                                                           Introduction& mine) const {
  try {
    auto pad = make_shared_memory(geometry.bytes(), Commit::at_first_access);
    GroupPads::construct(*pad, geometry);
    mine.pad = pad->handle();
    return pad;
  } catch (const TransportError& error) {
    mine.has_memory_files = 0;
    cohort::detail::copy_text(error.what(), mine.obstacle);
    return nullptr;
  }
}

/// Every rank's introduction, by rank. Collective.
/// @throw SymmetryError on every rank where one was built from another version of the protocol:
///        their files would not mean the same.
[[nodiscard]] inline std::vector<Introduction> exchange_introductions(ControlPlane& group,
                                                                      const Introduction& mine) {
  std::vector<Introduction> all;
  std::vector<int> others;
  for (const auto& bytes : group.all_gather(std::as_bytes(std::span(&mine, 1)))) {
    Introduction& theirs = all.emplace_back();
    if (bytes.size() == sizeof(theirs)) {
      std::memcpy(&theirs, bytes.data(), sizeof(theirs));
    }
    if (bytes.size() != sizeof(theirs) || theirs.protocol != mine.protocol) {
      others.push_back(static_cast<int>(all.size()) - 1);
    }
  }
  if (!others.empty()) {
    throw SymmetryError(
        fmt::format("connect in group {}: rank {} runs a build whose shared memory has another "
                    "layout than that of rank {}; use one version of the library on all ranks",
                    group.name(), cohort::detail::joined(others, ", "), group.rank()),
        others);
  }
  return all;
}

/// What the introductions say against mapping, the same text on every rank; empty where nothing.
[[nodiscard]] inline std::string obstacle_among(std::span<const Introduction> all) {
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].obstacle[0] != '\0') {
      return fmt::format("rank {}: {}", r, cohort::detail::text_of(all[r].obstacle));
    }
  }
  return "";
}

/// Machines that the ranks name; a rank that could not find out is counted with the others.
[[nodiscard]] inline int count_machines(std::span<const Introduction> all) {
  std::set<std::string> machines;
  for (const auto& introduction : all) {
    if (introduction.machine[0] != '\0') {
      machines.emplace(cohort::detail::text_of(introduction.machine));
    }
  }
  return std::max(1, static_cast<int>(machines.size()));
}

/// Every rank's pad, or why one could not be mapped.
struct PadImport {
  std::vector<std::shared_ptr<SharedMemory>> pads;  ///< Of all ranks, or none.
  std::string failure;                              ///< Why there are none.
};

/// Opens the signal pads of all ranks that could share memory.
[[nodiscard]] inline PadImport import_pads(std::span<const Introduction> all,
                                           const PadGeometry& geometry) {
  PadImport result;
  for (std::size_t r = 0; r < all.size() && result.failure.empty(); ++r) {
    try {
      auto pad = import_shared_memory(all[r].pad);
      if (pad->bytes() != geometry.bytes()) {
        throw TransportError(
            {.call = "import", .native_code = EBADF},
            fmt::format("its memory file has {} bytes, not {}", pad->bytes(), geometry.bytes()));
      }
      result.pads.push_back(std::move(pad));
    } catch (const Error& error) {
      result.failure = fmt::format("with rank {}: {}", r, error.what());
    }
  }
  return result;
}

/// The first text that is not empty, with its rank; the same on every rank. Collective.
[[nodiscard]] inline std::string first_text(ControlPlane& group, const std::string& mine) {
  std::string first;
  int rank = 0;
  for (const auto& bytes : group.all_gather(std::as_bytes(std::span(mine)))) {
    if (first.empty() && !bytes.empty()) {
      first =
          fmt::format("rank {} {}", rank,
                      std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
    }
    ++rank;
  }
  return first;
}

inline std::unique_ptr<Transport> HostBackend::connect(ControlPlane& group) {
  const auto n = static_cast<std::size_t>(group.size());
  const PadGeometry geometry{.ranks = group.size(),
                             .slot_bytes = std::max(options_.slot_bytes, round_up(n * 256))};
  Introduction mine = introduce();
  mine.has_memory_files = 1;
  std::shared_ptr<SharedMemory> own;
  if (group.size() > 1) {
    own = make_pad(geometry, mine);
  }
  const auto all = exchange_introductions(group, mine);
  agree(group, {.place = "options of the host transport", .bytes = geometry.slot_bytes});

  SymmetricCapabilities found{
      .backend = BackendKind::host,
      .transport_windows = std::all_of(all.begin(), all.end(),
                                       [](const auto& rank) { return rank.has_memory_files != 0; }),
      .machines = count_machines(all),
      .peer_access = true,
      .obstacle = obstacle_among(all)};
  auto windows = std::make_shared<WindowTable>();
  std::unique_ptr<PeerAccess> access;
  if (group.size() == 1) {
    found.peer_import = found.obstacle.empty();
  } else if (found.machines == 1 && found.obstacle.empty()) {
    // Reach counts only if every rank has it, so the ranks compare before anyone relies on it.
    auto imported = import_pads(all, geometry);
    found.obstacle = first_text(group, imported.failure);
    found.peer_import = found.obstacle.empty();
    if (found.peer_import) {
      own->close_file();  // all have mapped it
      access = std::make_unique<PeerAccess>(
          std::make_unique<Rendezvous>(std::move(imported.pads), geometry, group.rank(),
                                       group.name(), group.limit()),
          windows, options_.window_bytes);
    }
  }
  return std::make_unique<HostTransport>(group, found, std::move(access), std::move(windows),
                                         options_.needs_equal_offsets);
}

}  // namespace host

/// The host backend. One for each rank; ranks that are threads have one each.
[[nodiscard]] inline std::shared_ptr<Backend> host_backend(HostOptions options = {}) {
  return std::make_shared<host::HostBackend>(std::move(options));
}

}  // namespace cohort
