// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/host/host_backend.hpp>
#include <cohort/symmetric_arena.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"

/// \file
/// An arena of one rank alone, and streams that record who waits for whom.

namespace cohort::test {

/// Streams that only record what is asked of them. A stream's handle is the address of its state.
class RecordingDriver : public StreamDriver {
 public:
  struct State {
    CaptureId capture = 0;
  };
  struct Event final : StreamEvent {
    void* stream = nullptr;
  };

  void submit(void*, std::function<void()> work) override { work(); }
  void wait_for(void* waiter, void* signaller) override {
    if (failing) {
      throw TimeoutError("the driver's own", {});
    }
    waits.emplace_back(waiter, signaller);
  }
  [[nodiscard]] std::unique_ptr<StreamEvent> make_event() override {
    return std::make_unique<Event>();
  }
  void record(StreamEvent& event, void* native) override {
    REQUIRE(capture_id(native) == 0);
    static_cast<Event&>(event).stream = native;
  }
  void wait(void* waiter, StreamEvent& event) override {
    behind.emplace_back(waiter, static_cast<Event&>(event).stream);
  }
  [[nodiscard]] CaptureId capture_id(void* native) const override {
    return static_cast<State*>(native)->capture;
  }
  void retain_in_capture(void*, std::shared_ptr<void>) override {}
  void begin_capture(void*) override {}
  [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture(void*) override { return nullptr; }
  void synchronize(void* native, std::chrono::milliseconds limit) override {
    std::this_thread::sleep_for(busy);
    synchronized.push_back(native);
    limits.push_back(limit);
  }

  bool failing = false;

  using Wait = std::pair<void*, void*>;
  std::vector<Wait> waits;
  std::vector<Wait> behind;  ///< An event of the second.
  std::vector<void*> synchronized;
  std::vector<std::chrono::milliseconds> limits;  ///< Of these waits.
  std::chrono::milliseconds busy{0};              ///< How long each stream is.
};

inline constexpr std::size_t kMiB = std::size_t{1} << 20;

/// An arena without an audience, on the host.
struct Workspace {
  explicit Workspace(std::size_t growth = kMiB, HostOptions options = {})
      : backend(host_backend(std::move(options))),
        arena(SymmetricArena::create(*backend, "work", {}, {.growth_bytes = growth})) {}

  std::shared_ptr<Backend> backend;
  std::shared_ptr<SymmetricArena> arena;
};

inline Tensor bytes_of(SymmetricArena& arena, std::int64_t bytes, StreamRef stream = {}) {
  return arena.empty({bytes}, DType::u8, stream);
}

}  // namespace cohort::test
