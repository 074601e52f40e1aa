// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/error.hpp"
#include "cohort/process_state.hpp"
#include "cohort/stream.hpp"

/// \file
/// The host's streams. A host stream is an in-order executor: work runs on the calling thread
/// before `submit` returns, or is recorded while the stream captures and runs at every launch of
/// the graph. Engine code written for device streams therefore runs unchanged.

namespace cohort {

namespace host {

/// What one capture recorded: the work in submission order, what the work needs, and whose it is.
class Recording {
 public:
  /// Adds work to what a launch runs, as a step of the public call that this thread is in.
  void add(std::function<void()> work) {
    work_.push_back({cohort::detail::recorded_call(), std::move(work)});
  }
  /// Keeps the object as long as the recording.
  void retain(std::shared_ptr<void> object) { retained_.push_back(std::move(object)); }
  /// Every run checks `owner` before any of the work.
  void require(const std::shared_ptr<const Lifeline>& owner) {
    if (std::find(owners_.begin(), owners_.end(), owner) == owners_.end()) {
      owners_.push_back(owner);
    }
  }
  /// Of what was recorded.
  [[nodiscard]] const std::vector<std::shared_ptr<const Lifeline>>& owners() const noexcept {
    return owners_;
  }
  /// Checks the owners, then does the work in order. Calls have their time limit each, whatever
  /// their steps, as they do where they are not recorded.
  void run() const {
    for (const auto& owner : owners_) {
      owner->check();
    }
    for (auto step = work_.begin(); step != work_.end();) {
      const auto call = step->call;
      std::optional<cohort::detail::CallTime> time;
      if (call != 0) {
        time.emplace();
      }
      do {
        step->work();
        ++step;
      } while (call != 0 && step != work_.end() && step->call == call);
    }
  }

 private:
  struct Step {
    std::uint64_t call = 0;  // see `recorded_call`
    std::function<void()> work;
  };

  // Declared first, destroyed last: captured work may hold references into what is retained.
  std::vector<std::shared_ptr<void>> retained_;
  std::vector<std::shared_ptr<const Lifeline>> owners_;
  std::vector<Step> work_;
};

/// A capture in progress, shared by the streams that take part in it.
struct Capture {
  CaptureId id = 0;              ///< Never 0 while capturing.
  const void* origin = nullptr;  ///< The stream that began it.
  bool ended = false;            ///< Whether it is over.
  /// What was captured so far.
  std::shared_ptr<Recording> recording = std::make_shared<Recording>();
};

/// What a stream is to the driver.
struct StreamState {
  std::shared_ptr<Capture> capture;  ///< The last that it took part in.

  /// The capture that it takes part in, or null.
  [[nodiscard]] Capture* current() const noexcept {
    return capture != nullptr && !capture->ended ? capture.get() : nullptr;
  }
};

/// Work before it has run, or is recorded before whatever comes next: only the capture counts.
struct HostEvent final : StreamEvent {
  std::shared_ptr<Capture> capture;  ///< The one that the marked point belongs to, if any.
};

/// A recording that can be launched again and again.
class HostGraph : public ExecutableGraph {
 public:
  /// Of what was recorded.
  explicit HostGraph(std::shared_ptr<const Recording> recording)
      : recording_(std::move(recording)) {}

  /// Runs the captured work, or records its replay where `stream` is capturing. What a piece of
  /// work throws comes out of here; the rest of the work is then not run. Where a group whose calls
  /// it holds was shut down, `UsageError`, and none of it is run, nor of a graph that replays it.
  void launch(StreamRef stream) override {
    if (stream.valid()) {
      if (stream.capture_id() != 0) {
        for (const auto& owner : recording_->owners()) {
          stream.check_at_launch(owner);
        }
      }
      stream.submit([recording = recording_] { recording->run(); });
    } else {
      recording_->run();
    }
  }

 private:
  std::shared_ptr<const Recording> recording_;
};

}  // namespace host

/// The driver of all host streams of the process.
class HostStreamDriver final : public StreamDriver {
 public:
  [[nodiscard]] bool runs_at_once() const noexcept override { return true; }
  inline void submit(void* native, std::function<void()> work) override;
  /// A stream that waits for a capturing one joins its capture, as on a device.
  /// Throws `UsageError` where both take part in different captures.
  inline void wait_for(void* waiter, void* signaller) override;
  [[nodiscard]] inline std::unique_ptr<StreamEvent> make_event() override;
  inline void record(StreamEvent& event, void* native) override;
  inline void wait(void* waiter, StreamEvent& event) override;
  [[nodiscard]] inline CaptureId capture_id(void* native) const override;
  inline void retain_in_capture(void* native, std::shared_ptr<void> object) override;
  /// Throws `UsageError` where the stream is not capturing.
  inline void check_at_launch(void* native, const std::shared_ptr<const Lifeline>& owner) override;
  /// Throws `UsageError` where the stream is capturing already.
  inline void begin_capture(void* native) override;
  /// Ends the capture for every stream that joined it. Throws `UsageError` where `native` did not
  /// begin it.
  [[nodiscard]] inline std::unique_ptr<ExecutableGraph> end_capture(void* native) override;
  /// Returns at once: submitted work has run. Throws `UsageError` while capturing.
  inline void synchronize(void* native, std::chrono::milliseconds limit) override;

 private:
  static host::StreamState& stream(void* native);
  static void join(host::StreamState& waiting, const std::shared_ptr<host::Capture>& capture);

  std::atomic<CaptureId> next_capture_{1};
};

/// The driver object; it outlives everything.
[[nodiscard]] inline HostStreamDriver& host_stream_driver() {
  static HostStreamDriver& driver = detail::process_wide<HostStreamDriver>("host streams 4");
  return driver;
}

/// An in-order executor on the calling thread. Used by one thread at a time. Where it is destroyed
/// before a capture that it began has ended, what was captured is dropped, and the streams that
/// joined no longer capture. May be destroyed
/// before the groups, arenas, tensors and graphs that it was used with, other than streams of a
/// device.
class HostStream {
 public:
  HostStream() = default;
  HostStream(const HostStream&) = delete;
  HostStream& operator=(const HostStream&) = delete;
  /// Nobody else can end a capture that it began, and streams that joined would record for ever
  /// what nothing runs.
  ~HostStream() {
    if (auto* capture = state_.current(); capture != nullptr && capture->origin == &state_) {
      capture->ended = true;
      capture->recording.reset();
    }
  }

  /// For calls of groups.
  [[nodiscard]] StreamRef ref() noexcept { return {host_stream_driver(), &state_}; }
  /// As `ref`.
  operator StreamRef() noexcept { return ref(); }  // NOLINT(google-explicit-constructor)

  /// Runs `work`, or records it while capturing.
  void submit(std::function<void()> work) { ref().submit(std::move(work)); }

  /// From here on work is recorded instead of run.
  void begin_capture() { host_stream_driver().begin_capture(&state_); }
  /// Ends it; the graph is ready to be launched.
  [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture() {
    return host_stream_driver().end_capture(&state_);
  }

 private:
  host::StreamState state_;
};

inline host::StreamState& HostStreamDriver::stream(void* native) {
  if (native == nullptr) {
    throw UsageError("stream: expected a HostStream, got a null handle");
  }
  return *static_cast<host::StreamState*>(native);
}

inline void HostStreamDriver::submit(void* native, std::function<void()> work) {
  if (auto* capture = stream(native).current()) {
    capture->recording->add(std::move(work));
  } else {
    work();
  }
}

inline void HostStreamDriver::wait_for(void* waiter, void* signaller) {
  join(stream(waiter), stream(signaller).capture);
}

inline void HostStreamDriver::join(host::StreamState& waiting,
                                   const std::shared_ptr<host::Capture>& capture) {
  if (capture == nullptr || capture->ended || capture.get() == waiting.current()) {
    return;  // the work has run, or is recorded before whatever comes next
  }
  if (waiting.current() != nullptr) {
    throw UsageError(fmt::format("wait_for: the streams take part in different captures, {} and {}",
                                 waiting.current()->id, capture->id));
  }
  waiting.capture = capture;
}

inline std::unique_ptr<StreamEvent> HostStreamDriver::make_event() {
  return std::make_unique<host::HostEvent>();
}

inline void HostStreamDriver::record(StreamEvent& event, void* native) {
  static_cast<host::HostEvent&>(event).capture = stream(native).capture;
}

inline void HostStreamDriver::wait(void* waiter, StreamEvent& event) {
  join(stream(waiter), static_cast<host::HostEvent&>(event).capture);
}

inline CaptureId HostStreamDriver::capture_id(void* native) const {
  const auto* capture = stream(native).current();
  return capture == nullptr ? 0 : capture->id;
}

inline void HostStreamDriver::retain_in_capture(void* native, std::shared_ptr<void> object) {
  auto* capture = stream(native).current();
  if (capture == nullptr) {
    throw UsageError("retain_in_capture: the stream is not capturing");
  }
  capture->recording->retain(std::move(object));
}

inline void HostStreamDriver::check_at_launch(void* native,
                                              const std::shared_ptr<const Lifeline>& owner) {
  auto* capture = stream(native).current();
  if (capture == nullptr) {
    throw UsageError("check_at_launch: the stream is not capturing");
  }
  capture->recording->require(owner);
}

inline void HostStreamDriver::begin_capture(void* native) {
  auto& captured = stream(native);
  if (captured.current() != nullptr) {
    throw UsageError(fmt::format("begin_capture: the stream already takes part in capture {}",
                                 captured.current()->id));
  }
  captured.capture = std::make_shared<host::Capture>();
  captured.capture->id = next_capture_.fetch_add(1, std::memory_order_relaxed);
  captured.capture->origin = native;
}

inline std::unique_ptr<ExecutableGraph> HostStreamDriver::end_capture(void* native) {
  auto& captured = stream(native);
  if (captured.current() == nullptr) {
    throw UsageError("end_capture: the stream is not capturing");
  }
  if (captured.current()->origin != native) {
    throw UsageError(
        fmt::format("end_capture: capture {} was begun on another stream", captured.current()->id));
  }
  const auto capture = std::exchange(captured.capture, nullptr);
  capture->ended = true;
  // Streams that joined still refer to the capture; what it recorded is the graph's alone.
  return std::make_unique<host::HostGraph>(std::move(capture->recording));
}

inline void HostStreamDriver::synchronize(void* native, std::chrono::milliseconds) {
  if (stream(native).current() != nullptr) {
    throw UsageError("synchronize: the stream is capturing; captured work runs at launch");
  }
}

namespace host {

/// What a recorded call keeps of an argument: views by value, the elements of a span.
template <class T>
[[nodiscard]] T keep(const T& value) {
  return value;
}
/// A copy that recorded work may keep.
template <class T>
[[nodiscard]] std::vector<std::remove_const_t<T>> keep(std::span<T> values) {
  return {values.begin(), values.end()};
}

/// Whether work for the stream runs before the call returns.
[[nodiscard]] inline bool runs_at_once(StreamRef stream) {
  return !stream.valid() || (&stream.driver() == &host_stream_driver() &&
                             host_stream_driver().capture_id(stream.native()) == 0);
}

/// Has `body(arguments...)` recorded, with copies of the arguments.
template <class Body, class... Arguments>
void record(StreamRef stream, const Body& body, const Arguments&... arguments) {
  stream.submit([body, kept = std::make_tuple(keep(arguments)...)] { std::apply(body, kept); });
}

/// Runs `body(arguments...)` in stream order. Without a stream, and on a host stream that is not
/// capturing, that is at once, without a copy of the arguments or an allocation.
template <class Body, class... Arguments>
void enqueue(StreamRef stream, const Body& body, const Arguments&... arguments) {
  if (runs_at_once(stream)) {
    body(arguments...);
  } else {
    record(stream, body, arguments...);
  }
}

/// The same for a body that refers to an owner: once that has ended, a launch of the graph throws
/// `UsageError` before any of its work. The owner's pointer is taken as it is, because one of
/// another type is made anew in each call, and counts.
template <class Owner, class Body, class... Arguments>
void enqueue_call(const std::shared_ptr<Owner>& owner, StreamRef stream, const Body& body,
                  const Arguments&... arguments) {
  if (runs_at_once(stream)) {
    body(arguments...);
  } else {
    stream.check_at_launch(owner);
    record(stream, body, arguments...);
  }
}

}  // namespace host
}  // namespace cohort
