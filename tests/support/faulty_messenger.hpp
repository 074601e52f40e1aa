// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cohort/thread_control_planes.hpp>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

namespace cohort::test {

/// What happens to a rank at one of its messages, sent or received, and how many it had.
struct MessageTrap {
  int at = -1;                        ///< The number of the message; none where negative.
  std::chrono::milliseconds late{0};  ///< The first of them comes so late.
  std::function<void()> stop = {};    ///< Where given, the rank stops in it, and only then dies.

  std::atomic<bool> armed = false;
  std::atomic<int> messages = 0;

  /// A message passes, or the rank is dead and this throws.
  void pass(int rank) {
    if (!armed) {
      return;
    }
    const int number = messages++;
    if (number == 0) {
      std::this_thread::sleep_for(late);
    }
    if (at < 0 || number < at) {
      return;
    }
    if (number == at && stop) {
      stop();
    }
    throw TransportError({.call = "send", .native_code = 5, .rank = rank}, "injected");
  }
};

/// A rank that is a thread, with a trap in its way.
class FaultyMessenger final : public detail::ThreadMessenger {
 public:
  FaultyMessenger(std::shared_ptr<detail::ThreadHub> hub, int rank,
                  std::shared_ptr<MessageTrap> trap)
      : ThreadMessenger(std::move(hub), rank), trap_(std::move(trap)) {}

  void send(int to, Bytes message) override {
    trap_->pass(rank());
    ThreadMessenger::send(to, std::move(message));
  }
  std::optional<Bytes> receive(int from, Deadline deadline) override {
    auto message = ThreadMessenger::receive(from, deadline);
    if (message) {
      trap_->pass(rank());
    }
    return message;
  }

 private:
  std::shared_ptr<MessageTrap> trap_;
};

}  // namespace cohort::test
