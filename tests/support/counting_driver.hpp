// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/host/host_stream.hpp>
#include <functional>
#include <memory>
#include <utility>

/// \file
/// A driver of host streams that counts what the library asks of it: on a device each question is a
/// call into the driver, and an eager collective cannot afford many.

namespace cohort::test {

class CountingDriver : public StreamDriver {
 public:
  [[nodiscard]] StreamRef ref(HostStream& stream) noexcept {
    return {*this, stream.ref().native()};
  }

  /// Questions for the capture since the last call of this function.
  [[nodiscard]] int asked() noexcept { return std::exchange(asked_, 0); }
  /// Waits of one stream for another since the last call of this function.
  [[nodiscard]] int waits() noexcept { return std::exchange(waits_, 0); }

  void submit(void* native, std::function<void()> work) override {
    host_stream_driver().submit(native, std::move(work));
  }
  void wait_for(void* waiter, void* signaller) override {
    ++waits_;
    host_stream_driver().wait_for(waiter, signaller);
  }
  [[nodiscard]] std::unique_ptr<StreamEvent> make_event() override {
    return host_stream_driver().make_event();
  }
  void record(StreamEvent& event, void* native) override {
    host_stream_driver().record(event, native);
  }
  void wait(void* waiter, StreamEvent& event) override {
    ++waits_;
    host_stream_driver().wait(waiter, event);
  }
  [[nodiscard]] CaptureId capture_id(void* native) const override {
    ++asked_;
    return host_stream_driver().capture_id(native);
  }
  void retain_in_capture(void* native, std::shared_ptr<void> object) override {
    host_stream_driver().retain_in_capture(native, std::move(object));
  }
  void begin_capture(void* native) override { host_stream_driver().begin_capture(native); }
  [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture(void* native) override {
    return host_stream_driver().end_capture(native);
  }
  void synchronize(void* native, std::chrono::milliseconds limit) override {
    host_stream_driver().synchronize(native, limit);
  }

 private:
  mutable int asked_ = 0;
  int waits_ = 0;
};

}  // namespace cohort::test
