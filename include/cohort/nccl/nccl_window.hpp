// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <nccl.h>

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <utility>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/device_drain.hpp"
#include "cohort/cuda/exportable_memory.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/nccl/communicator.hpp"
#include "cohort/nccl/nccl_check.hpp"
#include "cohort/transport.hpp"

/// \file
/// Segments of ncclMemAlloc, which NCCL has from 2.19 on, and their registration as symmetric
/// windows. NCCL has windows from 2.27.3 on. The two functions are referenced weakly, so that a
/// program that was built with them also starts with an older library, down to 2.19, and the policy
/// then says why there are none.

#if NCCL_VERSION_CODE >= 22700
extern "C" {
__attribute__((weak)) ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void* buff, size_t size,
                                                          ncclWindow_t* win, int winFlags);
__attribute__((weak)) ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t win);
}
#endif

namespace cohort {

/// Whether windows were compiled in and the library that was loaded exports them.
[[nodiscard]] inline bool nccl_has_windows() noexcept {
#if NCCL_VERSION_CODE >= 22700
  return &ncclCommWindowRegister != nullptr && &ncclCommWindowDeregister != nullptr;
#else
  return false;
#endif
}

/// Memory of ncclMemAlloc.
class NcclSegment final : public Segment {
 public:
  /// Throws `TransportError`.
  NcclSegment(int device, std::size_t bytes) : bytes_(bytes) {
    if (const auto few = Communicator::too_few_descriptors(1); !few.empty()) {
      throw TransportError({.call = "ncclMemAlloc"}, few);  // before the ranks register it
    }
    memory_ = std::make_shared<Memory>(device, bytes);
  }

  [[nodiscard]] void* data() const noexcept override { return memory_->data; }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }
  [[nodiscard]] bool registers_with(BackendKind kind) const noexcept override {
    return kind == BackendKind::cuda;
  }

  /// Whether other processes could map it. ncclMemAlloc falls back to cudaMalloc without cuMem, and
  /// says nothing.
  [[nodiscard]] bool exportable() const noexcept {
    try {
      return static_cast<bool>(DeviceMapping::export_descriptor(data()));
    } catch (const std::exception&) {
      return false;
    }
  }

  /// Keeps the memory, beyond the segment, for a registration that does not come back.
  [[nodiscard]] std::shared_ptr<void> memory() const noexcept { return memory_; }

 private:
  struct Memory {
    Memory(int of, std::size_t bytes) : device(of) {
      const DeviceGuard guard(device);
      nccl_check(ncclMemAlloc(&data, bytes), "ncclMemAlloc");
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() {
      try {
        // It is unmapped without waiting (NCCL, src/include/alloc.h, ncclCuMemFree).
        if (!device_idle_within(device, kDrainLimit)) {
          log(LogLevel::error, "cuda:{} does not become idle: a segment stays mapped", device);
          return;
        }
        const DeviceGuard guard(device);
        nccl_check(ncclMemFree(data), "ncclMemFree");
      } catch (const std::exception& error) {
        log(LogLevel::error, error.what());
      }
    }

    int device;
    void* data = nullptr;
  };
  static constexpr std::chrono::milliseconds kDrainLimit{500};

  std::size_t bytes_;
  std::shared_ptr<Memory> memory_;
};

/// A segment's window with one communicator.
class NcclWindow final : public Window {
 public:
  /// Collective over `group`; the ranks have agreed on sequence and size: NCCL itself does not
  /// notice different sizes, and waits without limit for a rank that never comes. A rank that fails
  /// leaves `group`, so that the others do not wait for it. Never during a capture.
  /// Throws `TransportError`, `TimeoutError` and what made another rank fail.
  [[nodiscard]] static std::unique_ptr<NcclWindow> create(
      const std::shared_ptr<Communicator>& communicator, const NcclSegment& segment,
      ControlPlane& group) {
#if NCCL_VERSION_CODE >= 22700
    communicator->count_registration();
    const auto window = std::make_shared<ncclWindow_t>(nullptr);
    communicator->run("ncclCommWindowRegister", group,
                      [communicator, window, memory = segment.memory(), data = segment.data(),
                       bytes = segment.bytes()] {
                        const DeviceGuard guard(communicator->device());
                        const auto use = communicator->usable();
                        communicator->check(
                            ncclCommWindowRegister(communicator->get(), data, bytes, window.get(),
                                                   NCCL_WIN_COLL_SYMMETRIC),
                            "ncclCommWindowRegister");
                        if (*window == nullptr) {
                          throw TransportError({.call = "ncclCommWindowRegister"},
                                               "it succeeded without a window: NCCL cannot "
                                               "register here, which the policy should have found "
                                               "out");
                        }
                      });
    return std::unique_ptr<NcclWindow>(new NcclWindow(communicator, *window, segment));
#else
    static_cast<void>(communicator);
    static_cast<void>(segment);
    static_cast<void>(group);
    throw TransportError({.call = "ncclCommWindowRegister"},
                         "the library was built with an NCCL that has no windows");
#endif
  }
  NcclWindow(const NcclWindow&) = delete;
  NcclWindow& operator=(const NcclWindow&) = delete;

  ~NcclWindow() override {
    communicator_->remove_window(base_);
#if NCCL_VERSION_CODE >= 22700
    const auto use = communicator_->use();
    if (communicator_->broken() || !use) {
      return;  // aborting the communicator takes its windows along
    }
    try {
      const DeviceGuard guard(communicator_->device());
      communicator_->check(ncclCommWindowDeregister(communicator_->get(), window_),
                           "ncclCommWindowDeregister");
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
    }
#endif
  }

  /// None: NCCL's kernels address the peers, and the library's own kernels touch inboxes alone.
  [[nodiscard]] std::span<void* const> peers() const noexcept override { return {}; }

 private:
#if NCCL_VERSION_CODE >= 22700
  NcclWindow(std::shared_ptr<Communicator> communicator, ncclWindow_t window,
             const NcclSegment& segment)
      : communicator_(std::move(communicator)), window_(window), base_(segment.data()) {
    communicator_->add_window(base_, segment.bytes(), segment.loose_parts());
  }
#endif

  std::shared_ptr<Communicator> communicator_;
#if NCCL_VERSION_CODE >= 22700
  ncclWindow_t window_ = nullptr;
#endif
  const void* base_ = nullptr;
};

/// The window of a group of one: its only copy.
class LocalWindow final : public Window {
 public:
  explicit LocalWindow(const Segment& segment) : peer_(segment.data()) {}
  [[nodiscard]] std::span<void* const> peers() const noexcept override { return {&peer_, 1}; }

 private:
  void* peer_;
};

}  // namespace cohort
