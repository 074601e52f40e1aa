// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/loose_parts.hpp"
#include "cohort/nccl/bounded_call.hpp"
#include "cohort/nccl/cause_finder.hpp"
#include "cohort/nccl/known_faults.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/system_calls.hpp"

/// \file
/// An NCCL communicator of one group: made after the ranks agreed, bounded in time, watched for
/// asynchronous errors.
///
/// The communicator is a blocking one. A non-blocking one could be polled and aborted, but each of
/// its calls starts a thread and leaves its handles unwritten until that is done. So calls that
/// wait for peers run on a helper thread; one that does not come back cannot be ended, and is left
/// to its thread with all that it uses.

namespace cohort {

class Communicator {
 public:
  /// Collective over `group`, bounded by its time limit. The communicator outlives `group`.
  /// Throws `SymmetryError`, `TimeoutError` and `TransportError`.
  /// @param finder  Knows the ranks' processes, so that errors can name those that are gone.
  [[nodiscard]] static std::shared_ptr<Communicator> create(ControlPlane& group, int device,
                                                            detail::CauseFinder finder = {}) {
    ncclUniqueId id{};
    Intent intent{.place = fmt::format("creation of the NCCL communicator of {}", group.name())};
    if (group.rank() == 0) {
      if (const ncclResult_t code = ncclGetUniqueId(&id); code != ncclSuccess) {
        intent.failure = "ncclGetUniqueId: " + nccl_error_text(code);
      }
    }
    if (auto few = too_few_descriptors(group.size()); !few.empty()) {
      intent.failure = std::move(few);
    }
    agree(group, std::move(intent));
    const Bytes received = group.broadcast(std::as_bytes(std::span(&id, 1)), 0);
    if (received.size() != sizeof(id)) {
      throw SymmetryError("the unique id of rank 0 has another size than here", {0});
    }
    std::memcpy(&id, received.data(), sizeof(id));

    // Shared with the helper thread, which may outlive this call.
    const auto made = std::make_shared<Communicator>(Private{}, group, device, std::move(finder));
    made->run("ncclCommInitRankConfig", group, [made, id] {
      const DeviceGuard guard(made->device_);
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = 1;
      ncclComm_t comm = nullptr;
      made->check(ncclCommInitRankConfig(&comm, made->size_, id, made->rank_, &config),
                  "ncclCommInitRankConfig");
      made->comm_ = comm;  // only a whole one is ever torn down
    });
    return made;
  }

 private:
  struct Private {};

 public:
  /// For `create`.
  Communicator(Private, const ControlPlane& group, int device, detail::CauseFinder finder)
      : finder_(std::move(finder)),
        group_(group.name()),
        rank_(group.rank()),
        size_(group.size()),
        device_(device),
        limit_(group.limit()) {}
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  /// Graphs that captured calls of the communicator must be destroyed before: NCCL waits for them.
  ~Communicator() {
    if (comm_ == nullptr) {
      return;
    }
    const bool aborts = broken_;
    const char* const call = aborts ? "ncclCommAbort" : "ncclCommDestroy";
    try {
      if (aborts) {
        abort();
        if (end_ == nullptr) {
          return;  // no thread for it, as was said
        }
      } else {
        end_ = detail::DetachedCall::start([comm = comm_, device = device_] {
          const DeviceGuard guard(device);
          return ncclCommDestroy(comm);
        });
      }
      // All that go in one call share the time.
      const detail::LimitedWait wait(std::min(limit_, kTeardownLimit));
      const auto result = end_->result_by(wait.deadline());
      const auto code = static_cast<ncclResult_t>(result.value_or(ncclSuccess));
      if (!result) {
        log(LogLevel::error,
            "{} in group {} on rank {} did not return in time, and is left to itself: {}", call,
            group_, rank_, why_teardown_waits(nccl_runtime_version(), aborts));
      } else if (code != ncclSuccess) {
        log(LogLevel::error, "{} in group {} on rank {}: {}", call, group_, rank_,
            nccl_error_text(code));
      }
    } catch (const std::exception& error) {
      log(LogLevel::error, "{} in group {}: {}", call, group_, error.what());
    }
  }

  /// Has the communicator's kernels end, and begins to take it down, on a thread of its own: NCCL
  /// goes on waiting for graphs with its calls. Any thread may do so; where others are within a
  /// `use`, the last of them begins. No call may follow.
  void abort() noexcept {
    mark_broken();
    uses_.end();
  }

  /// What every call of NCCL with the communicator is made under: `abort` frees it. None once it is
  /// being taken down.
  [[nodiscard]] detail::UsedUntilEnded::Use use() noexcept {
    return detail::UsedUntilEnded::Use(uses_);
  }
  [[nodiscard]] ncclComm_t get() const noexcept { return comm_; }
  [[nodiscard]] int device() const noexcept { return device_; }
  [[nodiscard]] bool broken() const noexcept { return broken_; }

  /// From here on teardown aborts instead of waiting for peers.
  void mark_broken() noexcept { broken_ = true; }

  /// Throws `TransportError` naming call, rank and group unless `code` is success.
  void check(ncclResult_t code, const char* call) {
    if (code != ncclSuccess) {
      mark_broken();
    }
    nccl_check(code, call, rank_, group_);
  }

  /// Throws `TransportError` where NCCL noticed a failure since the last call, such as a peer that
  /// is gone.
  void check_asynchronous() {
    const auto use = usable();
    ncclResult_t state = ncclSuccess;
    check(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
    if (state != ncclSuccess && state != ncclInProgress) {
      check(state, "ncclCommGetAsyncError");
    }
  }

  /// The same as `use`, and throws `TransportError` where it is being taken down.
  [[nodiscard]] detail::UsedUntilEnded::Use usable() {
    auto used = use();
    if (!used) {
      throw TransportError({.call = "ncclCommAbort", .rank = rank_, .group = group_},
                           "an earlier call of this group failed; form the group anew");
    }
    return used;
  }

  /// Why NCCL cannot connect to `ranks` ranks, or "". Without a descriptor it waits, or lets its
  /// peers wait, without an end: it does not tell a peer that it failed. What it needs at once is
  /// a few for its own threads and for each rank; over sockets of its own, more for each channel.
  [[nodiscard]] static std::string too_few_descriptors(int ranks) {
    const int needed = 48 + 4 * ranks;
    const int left = os::descriptors_left(needed);
    return left >= needed ? std::string()
                          : fmt::format(
                                "only {} more descriptors can be opened, and NCCL may need "
                                "{}; see ulimit -n",
                                left, needed);
  }

  /// Runs a call that waits for peers, within the limit of `group`, whose other ranks may end it
  /// by what they say, and learn why it has failed, which is thrown: see `first_cause`.
  void run(const char* call, ControlPlane& group, std::function<void()> work,
           const std::function<void()>& look = {}) {
    const auto latest = detail::deadline_after(group.limit() + group.limit() / 4);
    try {
      const auto look_around = [&] {
        group.check_peers();
        if (look) {
          look();
        }
      };
      if (!detail::call_within(group.limit(), std::move(work), look_around)) {
        throw TimeoutError(
            fmt::format(
                "{} in group {} on rank {} did not return within {} ms: NCCL waits for a rank and "
                "does not say for which; it cannot be ended, and its thread is left to itself",
                call, group_, rank_, group.limit().count()),
            {});
      }
    } catch (const Error&) {
      mark_broken();
      std::rethrow_exception(finder_.leave(group, std::current_exception(), latest).error);
    }
  }

  /// A registration begins; collective, so the count is equal on all ranks whatever comes of it.
  void count_registration() noexcept { ++registrations_; }
  /// Whether there may be windows. Equal on all ranks, while they lose windows at their own times.
  [[nodiscard]] bool has_registered() const noexcept { return registrations_ > 0; }
  /// Memory whose window belongs to this communicator: of the last registration. `loose`: of the
  /// segment, which outlives the window.
  void add_window(const void* base, std::size_t bytes, const LooseParts& loose) {
    windows_.push_back({static_cast<const std::byte*>(base), bytes, registrations_, &loose});
  }
  void remove_window(const void* base) noexcept {
    const auto same = [base](const Range& range) { return range.base == base; };
    windows_.erase(std::remove_if(windows_.begin(), windows_.end(), same), windows_.end());
  }
  /// Which window the bytes lie in, by the number of its registration, and where; equal on all
  /// ranks for buffers that NCCL takes for each other's. 0 outside.
  [[nodiscard]] std::uint64_t place(const void* data, std::size_t bytes) const noexcept {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    for (const Range& range : windows_) {
      const auto base = reinterpret_cast<std::uintptr_t>(range.base);
      if (begin >= base && bytes <= range.bytes && begin - base <= range.bytes - bytes) {
        return (range.number << 48) + (begin - base);
      }
    }
    return 0;
  }
  /// Whether the bytes lie in one window of this communicator.
  [[nodiscard]] bool in_window(const void* data, std::size_t bytes) const noexcept {
    return place(data, bytes) != 0;
  }
  /// Whether the bytes lie in a window at an offset that need not be the same on all ranks; whether
  /// they do is.
  [[nodiscard]] bool loose(const void* data, std::size_t bytes) const noexcept {
    return std::any_of(windows_.begin(), windows_.end(),
                       [&](const Range& range) { return range.loose->hold(data, bytes); });
  }

 private:
  // Teardown waits for local work and, at most, for peers that tear down as well.
  static constexpr std::chrono::milliseconds kTeardownLimit{10'000};

  /// Once, while nobody uses it.
  void begin_abort() noexcept {
    if (comm_ == nullptr) {
      return;
    }
    try {
      end_ = detail::DetachedCall::start([comm = comm_, device = device_] {
        const DeviceGuard guard(device);
        return ncclCommAbort(comm);
      });
    } catch (const std::exception& error) {
      log(LogLevel::error, "ncclCommAbort in group {}: {}", group_, error.what());
    }
  }

  struct Range {
    const std::byte* base = nullptr;
    std::size_t bytes = 0;
    std::uint64_t number = 0;  ///< Of its registration, from 1 on.
    const LooseParts* loose = nullptr;
  };

  detail::CauseFinder finder_;
  std::string group_;
  int rank_;
  int size_;
  int device_;
  std::chrono::milliseconds limit_;
  ncclComm_t comm_ = nullptr;
  std::atomic<bool> broken_ = false;
  std::shared_ptr<detail::DetachedCall> end_;  // once it is being taken down; for the destructor
  detail::UsedUntilEnded uses_{[this] { begin_abort(); }};
  std::vector<Range> windows_;
  std::uint64_t registrations_ = 0;
};

}  // namespace cohort
