// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "cohort/call_time.hpp"
#include "cohort/error.hpp"

/// \file
/// Where work runs: a device, and a reference to one of its in-order streams. The core knows
/// streams only through `StreamDriver`; the backends for host and CUDA implement it.

namespace cohort {

/// Where memory lies.
enum class DeviceKind : std::uint8_t { host, cuda };

/// A place for memory and work. `index` is the CUDA ordinal; 0 on the host.
struct Device {
  DeviceKind kind = DeviceKind::host;  ///< Host or card.
  int index = 0;                       ///< Of the card; 0 on the host.

  friend constexpr bool operator==(const Device&, const Device&) = default;
};

/// Such as "cuda:1".
[[nodiscard]] inline std::string to_string(Device device) {
  return device.kind == DeviceKind::host
             ? "host"
             : std::string("cuda:").append(std::to_string(device.index));
}

/// Number of one capture; 0 means that the stream is not being captured.
using CaptureId = std::uint64_t;
/// The number of every capture that has failed already, where the device tells no other.
inline constexpr CaptureId kInvalidatedCapture = ~CaptureId{0};

/// Whether what is recorded in graphs may still be called. An engine's own graph may outlive the
/// object whose calls it holds; each of these keeps this instead.
class Lifeline {
 public:
  /// `owner` is named in the error.
  explicit Lifeline(std::string owner) : owner_(std::move(owner)) {}
  /// The owner goes. Its calls in graphs throw from here on.
  void end() noexcept { ended_ = true; }
  /// Throws `UsageError` where the owner is gone.
  void check() const {
    if (ended_) {
      throw UsageError("graph launch: " + owner_ + " was used after shutdown");
    }
  }

 private:
  std::string owner_;
  std::atomic<bool> ended_{false};
};

class StreamRef;

/// Captured work that can be launched again and again.
class ExecutableGraph {
 public:
  ExecutableGraph() = default;
  ExecutableGraph(const ExecutableGraph&) = delete;
  ExecutableGraph& operator=(const ExecutableGraph&) = delete;
  virtual ~ExecutableGraph() = default;

  /// Enqueues the captured work on a stream of the same backend.
  virtual void launch(StreamRef stream) = 0;
};

/// A place in the work of a stream, made and understood by the stream's driver.
class StreamEvent {
 public:
  StreamEvent() = default;
  StreamEvent(const StreamEvent&) = delete;
  StreamEvent& operator=(const StreamEvent&) = delete;
  virtual ~StreamEvent() = default;
};

/// What the library needs of a kind of stream. One object for each backend; it outlives every
/// stream and graph of that backend. `native` is the backend's own handle.
class StreamDriver {
 public:
  StreamDriver() = default;
  StreamDriver(const StreamDriver&) = delete;
  StreamDriver& operator=(const StreamDriver&) = delete;
  virtual ~StreamDriver() = default;

  /// Whether work that is not captured has run when its call returns, and captured work keeps the
  /// order of its calls. Nobody then waits for such a stream or remembers it.
  [[nodiscard]] virtual bool runs_at_once() const noexcept { return false; }

  /// Runs `work` on the host when the stream reaches it (at once on an idle host stream, at every
  /// replay when captured).
  virtual void submit(void* native, std::function<void()> work) = 0;

  /// Work enqueued on `waiter` from here on runs after all work enqueued on `signaller` so far.
  virtual void wait_for(void* waiter, void* signaller) = 0;

  /// An event that stands nowhere yet.
  [[nodiscard]] virtual std::unique_ptr<StreamEvent> make_event() = 0;
  /// Puts the event behind all work enqueued on the stream so far; behind what its capture has of
  /// the stream, where it is being captured. Earlier waits keep to where it stood.
  virtual void record(StreamEvent& event, void* native) = 0;
  /// Work enqueued on `waiter` from here on runs after what is before the event, and after nothing
  /// else. An event of a capture takes the stream into it.
  virtual void wait(void* waiter, StreamEvent& event) = 0;

  /// The capture that the stream takes part in, or 0. Two captures never share a number.
  [[nodiscard]] virtual CaptureId capture_id(void* native) const = 0;

  /// Keeps `object` alive until the graph that is being captured on the stream, and every
  /// executable made of it, are destroyed. Throws `UsageError` where the stream is not capturing.
  virtual void retain_in_capture(void* native, std::shared_ptr<void> object) = 0;

  /// Each launch of the graph that is being captured on the stream checks `owner` before any of its
  /// work runs. Where launches do not pass through this library, as on devices, nothing happens.
  virtual void check_at_launch(void* /*native*/, const std::shared_ptr<const Lifeline>& /*owner*/) {
  }

  /// Starts and ends a capture of the stream by this thread. `end_capture` throws `UsageError`
  /// where nothing was being captured, `TransportError` where the capture was invalidated.
  virtual void begin_capture(void* native) = 0;
  /// Ends it; the graph is ready to be launched.
  [[nodiscard]] virtual std::unique_ptr<ExecutableGraph> end_capture(void* native) = 0;

  /// Waits until the stream is idle. Throws `TimeoutError` at the limit.
  virtual void synchronize(void* native, std::chrono::milliseconds limit) = 0;
};

/// A reference to a stream: cheap to copy, owns nothing. Streams of a
/// device must outlive the tensors that were allocated on them and the arenas that those came from;
/// host streams need not. One that refers to none is for
/// calls that take it as "without a stream"; its own calls throw `UsageError`.
class StreamRef {
 public:
  constexpr StreamRef() = default;
  /// A stream of the driver's; `native` is its handle, such as a cudaStream_t.
  constexpr StreamRef(StreamDriver& driver, void* native) noexcept
      : driver_(&driver), native_(native) {}

  /// Whether it refers to a stream.
  [[nodiscard]] constexpr bool valid() const noexcept { return driver_ != nullptr; }
  /// The driver's handle.
  [[nodiscard]] constexpr void* native() const noexcept { return native_; }
  /// The same reference by way of registers. g++ stores a parameter's two words and copies them as
  /// one of 16 bytes, for which a processor waits until all that it has stored before is in the
  /// cache.
  [[nodiscard]] StreamRef by_words() const noexcept {
    StreamRef same = *this;
    asm("" : "+r"(same.driver_), "+r"(same.native_));
    return same;
  }
  /// Who runs the stream.
  [[nodiscard]] constexpr StreamDriver& driver() const noexcept { return *driver_; }

  /// Throws `UsageError` for an empty function as well.
  void submit(std::function<void()> work) const {
    if (!work) {
      throw UsageError("submit work: expected a function, got an empty one");
    }
    checked("submit").submit(native_, std::move(work));
  }
  /// What follows here waits for what `signaller` has got so far.
  void wait_for(StreamRef signaller) const {
    (void)signaller.checked("wait_for signaller");
    checked("wait_for").wait_for(native_, signaller.native_);
  }
  /// Marks this point of the stream.
  void record(StreamEvent& event) const { checked("record").record(event, native_); }
  /// What follows waits for the marked point.
  void wait(StreamEvent& event) const { checked("wait").wait(native_, event); }
  /// 0 outside of captures.
  [[nodiscard, gnu::always_inline]] CaptureId capture_id() const {
    return checked("capture_id").capture_id(native_);
  }
  /// The graph that is being captured keeps the object.
  void retain_in_capture(std::shared_ptr<void> object) const {
    checked("retain_in_capture").retain_in_capture(native_, std::move(object));
  }
  /// Launches of the graph that is being captured throw once the owner is gone.
  void check_at_launch(const std::shared_ptr<const Lifeline>& owner) const {
    checked("check_at_launch").check_at_launch(native_, owner);
  }
  /// Waits until the stream is empty. Throws `TimeoutError` after `limit`, and `UsageError` where
  /// that is not positive; `kLongestTimeLimit` is the longest.
  void synchronize(std::chrono::milliseconds limit) const {
    checked("synchronize").synchronize(native_, checked_limit("synchronize", limit));
  }

  friend constexpr bool operator==(const StreamRef&, const StreamRef&) = default;

 private:
  [[nodiscard]] StreamDriver& checked(const char* call) const {
    if (driver_ == nullptr) {
      detail::refuse([=] { return std::string(call) + ": expected a stream, got none"; });
    }
    return *driver_;
  }

  StreamDriver* driver_ = nullptr;
  void* native_ = nullptr;
};

}  // namespace cohort
