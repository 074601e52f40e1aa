// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/quick_questions.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/stream.hpp"

/// \file
/// CUDA streams behind the library's `StreamDriver`, captures and graphs included.

namespace cohort {

namespace detail {

/// What graphs held and hold no longer. CUDA calls a user object's destructor on a thread of its
/// own from which no CUDA function may be called, so what the graph held is handed to a thread of
/// ours, which lets go of it. Nobody can wait for CUDA's thread: a graph's callback may come when
/// the driver of its streams is gone, so our thread stays until no graph holds anything.
class Releases {
 public:
  /// What one CUDA user object keeps.
  class Retained;

  Releases() : state_(std::make_shared<State>()) {
    std::thread thread([state = state_] { run(*state); });
    state_->thread = thread.get_id();
    thread.detach();
  }
  Releases(const Releases&) = delete;
  Releases& operator=(const Releases&) = delete;
  /// Returns when everything that was handed over is let go of, unless it is our thread itself that
  /// lets go of this.
  ~Releases() {
    std::unique_lock lock(state_->mutex);
    state_->ending = true;
    state_->changed.notify_all();
    if (state_->thread != std::this_thread::get_id()) {
      state_->changed.wait(lock, [this] { return state_->objects.empty() && !state_->busy; });
    }
  }

  [[nodiscard]] inline std::unique_ptr<Retained> retain(std::shared_ptr<void> object);

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<void>> objects;  ///< To be let go of.
    std::size_t held = 0;                        ///< By graphs.
    bool busy = false;
    bool ending = false;
    std::thread::id thread;
  };

  static void run(State& state) {
    std::unique_lock lock(state.mutex);
    const auto is_over = [&] { return state.ending && state.held == 0; };
    while (true) {
      state.changed.wait(lock, [&] { return !state.objects.empty() || is_over(); });
      if (state.objects.empty()) {
        return;
      }
      std::vector<std::shared_ptr<void>> objects;
      objects.swap(state.objects);
      state.busy = true;
      lock.unlock();
      objects.clear();
      lock.lock();
      state.busy = false;
      state.changed.notify_all();
    }
  }

  std::shared_ptr<State> state_;
};

class Releases::Retained {
 public:
  Retained(std::shared_ptr<State> state, std::shared_ptr<void> object)
      : state_(std::move(state)), object_(std::move(object)) {
    const std::lock_guard lock(state_->mutex);
    ++state_->held;
  }
  Retained(const Retained&) = delete;
  Retained& operator=(const Retained&) = delete;
  ~Retained() {
    const std::lock_guard lock(state_->mutex);
    --state_->held;
    try {
      state_->objects.push_back(std::move(object_));
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
    }
    state_->changed.notify_all();
  }

  static void CUDART_CB release(void* self) noexcept { delete static_cast<Retained*>(self); }

 private:
  std::shared_ptr<State> state_;
  std::shared_ptr<void> object_;
};

inline std::unique_ptr<Releases::Retained> Releases::retain(std::shared_ptr<void> object) {
  return std::make_unique<Retained>(state_, std::move(object));
}

/// Host work of a stream. An exception has nowhere to go on CUDA's thread.
inline void run_host_work(const std::function<void()>& work) noexcept {
  try {
    work();
  } catch (const std::exception& error) {
    log(LogLevel::error, error.what());
  } catch (...) {
    log(LogLevel::error, "host work of a stream threw something that is no std::exception");
  }
}

inline void CUDART_CB run_once(void* data) noexcept {
  const std::unique_ptr<std::function<void()>> work(static_cast<std::function<void()>*>(data));
  run_host_work(*work);
}

inline void CUDART_CB run_again(void* data) noexcept {
  run_host_work(*static_cast<std::function<void()>*>(data));
}

/// Whether the handle names a stream of whichever device is current.
[[nodiscard]] inline bool is_default_stream(cudaStream_t stream) noexcept {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

/// Throws `UsageError` for the legacy default stream while another capture forbids its use,
/// `TransportError` for any other failure of a question about a stream's capture.
inline void check_capture_question(cudaError_t code, const char* call) {
  if (code == cudaErrorStreamCaptureImplicit) {
    static_cast<void>(cudaGetLastError());
    throw UsageError(
        "stream: the legacy default stream cannot be used while a capture is under way that it "
        "would have to join; pass a stream of your own");
  }
  cuda_check(code, call);
}

/// Throws as `check_capture_question`.
[[nodiscard]] inline cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_capture_question(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status;
}

/// State of a stream's capture.
struct CaptureInfo {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
};

/// Throws as `check_capture_question`.
[[nodiscard]] inline CaptureInfo capture_info(cudaStream_t stream) {
  CaptureInfo info;
#if CUDART_VERSION >= 13000
  const cudaError_t code = cudaStreamGetCaptureInfo(stream, &info.status, &info.id, &info.graph,
                                                    nullptr, nullptr, nullptr);
#else
  const cudaError_t code =
      cudaStreamGetCaptureInfo_v2(stream, &info.status, &info.id, &info.graph, nullptr, nullptr);
#endif
  check_capture_question(code, "cudaStreamGetCaptureInfo");
  return info;
}

}  // namespace detail

/// A captured graph, instantiated.
class CudaExecutableGraph final : public ExecutableGraph {
 public:
  /// Instantiates the graph. Throws `TransportError` with CUDA's code.
  CudaExecutableGraph(int device, UniqueGraph graph) : device_(device), graph_(std::move(graph)) {
    const DeviceGuard guard(device_);
    cudaGraphExec_t exec = nullptr;
    cuda_check(cudaGraphInstantiate(&exec, graph_.get(), 0), "cudaGraphInstantiate");
    exec_ = UniqueGraphExec(exec);
  }
  void launch(StreamRef stream) override {
    const DeviceGuard guard(device_);
    cuda_check(cudaGraphLaunch(exec_.get(), static_cast<cudaStream_t>(stream.native())),
               "cudaGraphLaunch");
  }

  /// The captured graph, for looking at its nodes.
  [[nodiscard]] cudaGraph_t graph() const noexcept { return graph_.get(); }

 private:
  int device_;
  UniqueGraph graph_;
  UniqueGraphExec exec_;
};

/// A CUDA event.
class CudaStreamEvent final : public StreamEvent {
 public:
  /// Owns the event.
  explicit CudaStreamEvent(UniqueEvent event) : event_(std::move(event)) {}
  /// CUDA's handle.
  [[nodiscard]] cudaEvent_t get() const noexcept { return event_.get(); }

 private:
  UniqueEvent event_;
};

/// Whoever enqueues work that waits for other ranks. It may hold up any stream of the device.
class RankWaits {
 public:
  RankWaits() = default;
  RankWaits(const RankWaits&) = delete;
  RankWaits& operator=(const RankWaits&) = delete;
  virtual ~RankWaits() = default;

  /// Has them end, without waiting for it. `reason` is what the group has failed with then, where
  /// it has not failed before.
  virtual void end_waits(std::string_view reason) noexcept = 0;
  /// Why they have failed, or "".
  [[nodiscard]] virtual std::string failure() const = 0;
};

/// The streams of one device. Thread-safe.
class CudaStreamDriver final : public StreamDriver {
 public:
  /// Of one card.
  explicit CudaStreamDriver(int device) : device_(device), event_(cohort::make_event(device)) {}
  /// For calls of groups.
  [[nodiscard]] StreamRef ref(cudaStream_t stream) noexcept { return {*this, stream}; }

  /// `work` must make no CUDA call.
  void submit(void* native, std::function<void()> work) override {
    const DeviceGuard guard(device_);
    const auto stream = static_cast<cudaStream_t>(native);
    if (capture_id(native) != 0) {
      const auto kept = std::make_shared<std::function<void()>>(std::move(work));
      retain_in_capture(native, kept);
      cuda_check(cudaLaunchHostFunc(stream, &detail::run_again, kept.get()), "cudaLaunchHostFunc");
      return;
    }
    auto once = std::make_unique<std::function<void()>>(std::move(work));
    cuda_check(cudaLaunchHostFunc(stream, &detail::run_once, once.get()), "cudaLaunchHostFunc");
    static_cast<void>(once.release());  // run_once owns it
  }

  void wait_for(void* waiter, void* signaller) override {
    if (waiter == signaller) {
      return;
    }
    const DeviceGuard guard(device_);
    // A wait takes the event's record as it is at the call, so one event serves all pairs.
    const std::lock_guard lock(event_mutex_);
    cuda_check(cudaEventRecord(event_.get(), static_cast<cudaStream_t>(signaller)),
               "cudaEventRecord");
    cuda_check(cudaStreamWaitEvent(static_cast<cudaStream_t>(waiter), event_.get(), 0),
               "cudaStreamWaitEvent");
  }

  [[nodiscard]] std::unique_ptr<StreamEvent> make_event() override {
    return std::make_unique<CudaStreamEvent>(cohort::make_event(device_));
  }

  /// Of a stream that is being captured, CUDA keeps the nodes that its next one will depend on.
  void record(StreamEvent& event, void* native) override {
    const DeviceGuard guard(device_);
    cuda_check(cudaEventRecord(static_cast<CudaStreamEvent&>(event).get(),
                               static_cast<cudaStream_t>(native)),
               "cudaEventRecord");
  }

  void wait(void* waiter, StreamEvent& event) override {
    const DeviceGuard guard(device_);
    cuda_check(cudaStreamWaitEvent(static_cast<cudaStream_t>(waiter),
                                   static_cast<CudaStreamEvent&>(event).get(), 0),
               "cudaStreamWaitEvent");
  }

  /// Every call of a group asks this, so eagerly it is one CUDA call, and the shortest that
  /// answers. A created stream belongs to a device whatever the current one is, and answers from
  /// any; only the default streams are those of the current device.
  [[nodiscard, gnu::hot]] CaptureId capture_id(void* native) const override {
    const auto stream = static_cast<cudaStream_t>(native);
    if (!detail::is_default_stream(stream) && detail::is_eager_quickly(stream)) [[likely]] {
      return 0;
    }
    return number_of_capture(stream);
  }

  void retain_in_capture(void* native, std::shared_ptr<void> object) override {
    const DeviceGuard guard(device_);
    const auto info = detail::capture_info(static_cast<cudaStream_t>(native));
    if (info.status != cudaStreamCaptureStatusActive) {
      throw UsageError("retain_in_capture: expected a stream that is being captured");
    }
    auto kept = releases_.retain(std::move(object));
    cudaUserObject_t user_object = nullptr;
    cuda_check(cudaUserObjectCreate(&user_object, kept.get(), &detail::Releases::Retained::release,
                                    1, cudaUserObjectNoDestructorSync),
               "cudaUserObjectCreate");
    static_cast<void>(kept.release());  // the user object owns it
    const cudaError_t code =
        cudaGraphRetainUserObject(info.graph, user_object, 1, cudaGraphUserObjectMove);
    if (code != cudaSuccess) {
      cuda_report(cudaUserObjectRelease(user_object, 1), "cudaUserObjectRelease");
    }
    cuda_check(code, "cudaGraphRetainUserObject");
  }

  /// Thread-local mode: other threads of the process, such as NCCL's, may go on calling CUDA.
  void begin_capture(void* native) override {
    const DeviceGuard guard(device_);
    cuda_check(
        cudaStreamBeginCapture(static_cast<cudaStream_t>(native), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  }

  /// Ends it and instantiates the graph.
  [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture(void* native) override {
    const DeviceGuard guard(device_);
    if (!may_be_captured(native)) {
      throw UsageError("end_capture: the stream is not being captured");
    }
    cudaGraph_t captured = nullptr;
    const cudaError_t code = cudaStreamEndCapture(static_cast<cudaStream_t>(native), &captured);
    UniqueGraph graph(captured);
    cuda_check(code, "cudaStreamEndCapture");
    return std::make_unique<CudaExecutableGraph>(device_, std::move(graph));
  }

  void synchronize(void* native, std::chrono::milliseconds limit) override {
    if (!idle_within(native, limit)) {
      throw TimeoutError(fmt::format("synchronize: a stream of cuda:{} was still busy after {} ms",
                                     device_, limit.count()),
                         {});
    }
  }

  /// Those whose work may hold up the device's streams, while they exist.
  void add(RankWaits& waits) {
    const std::lock_guard lock(waits_mutex_);
    waits_.push_back(&waits);
  }
  /// The group is gone.
  void remove(RankWaits& waits) noexcept {
    const std::lock_guard lock(waits_mutex_);
    waits_.erase(std::remove(waits_.begin(), waits_.end(), &waits), waits_.end());
  }
  /// Ends the waits of all of them.
  void end_all_waits(std::string_view reason) noexcept {
    const std::lock_guard lock(waits_mutex_);
    for (RankWaits* const waits : waits_) {
      waits->end_waits(reason);
    }
  }
  /// Why they failed, all but `but`; "" where none has.
  [[nodiscard]] std::string failures(const RankWaits& but) {
    const std::lock_guard lock(waits_mutex_);
    std::string text;
    for (const RankWaits* const waits : waits_) {
      if (const auto failure = waits != &but ? waits->failure() : ""; !failure.empty()) {
        text += (text.empty() ? "" : "; ") + failure;
      }
    }
    return text;
  }

  /// `idle`, asked until the limit.
  [[nodiscard]] bool idle_within(void* native, std::chrono::milliseconds limit) const {
    const auto deadline = detail::deadline_after(limit);
    detail::PollPause pause;
    while (true) {
      const bool is_late = std::chrono::steady_clock::now() >= deadline;  // before the last look
      if (idle(native)) {
        return true;
      }
      if (is_late) {
        return false;
      }
      pause();
    }
  }

  /// Whether all work of the stream is done. Throws `UsageError` on a capturing stream, whose
  /// capture the question would invalidate, and `TransportError` where the device failed.
  [[nodiscard]] bool idle(void* native) const {
    const DeviceGuard guard(device_);
    const auto stream = static_cast<cudaStream_t>(native);
    if (detail::capture_status(stream) != cudaStreamCaptureStatusNone) {
      throw UsageError("synchronize: the stream is being captured");
    }
    const RelaxedCapture relaxed;  // this thread may be capturing another stream
    const cudaError_t code = cudaStreamQuery(stream);
    if (code == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());
      return false;
    }
    cuda_check(code, "cudaStreamQuery");
    return true;
  }

 private:
  /// True as well where CUDA does not say, so that a capture comes to its end.
  [[nodiscard]] bool may_be_captured(void* native) const noexcept {
    try {
      return capture_id(native) != 0;
    } catch (const Error&) {
      return true;
    }
  }

  /// Asks the runtime.
  [[gnu::noinline]] CaptureId number_of_capture(cudaStream_t stream) const {
    std::optional<DeviceGuard> guard;
    if (detail::is_default_stream(stream)) {
      guard.emplace(device_);
    }
    switch (detail::capture_status(stream)) {
      case cudaStreamCaptureStatusNone:
        return 0;
      case cudaStreamCaptureStatusInvalidated:
        return kInvalidatedCapture;  // CUDA gives no number; whatever is enqueued will fail
      case cudaStreamCaptureStatusActive:
        break;
    }
    // The runtime numbers captures over the life of the process; 0 is ours for "none".
    return detail::capture_info(stream).id + 1;
  }

  int device_;
  std::mutex event_mutex_;
  UniqueEvent event_;
  detail::Releases releases_;
  OwnerMutex waits_mutex_;
  std::vector<RankWaits*> waits_;
};

}  // namespace cohort
