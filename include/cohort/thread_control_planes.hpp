// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/message_control_plane.hpp"
#include "cohort/messenger.hpp"

/// \file
/// Control planes of ranks that are threads of one process.

namespace cohort {

namespace detail {

/// The queues that connect the ranks of one process.
class ThreadHub {
 public:
  explicit ThreadHub(int size) : size_(size), queues_(static_cast<std::size_t>(size * size)) {}

  [[nodiscard]] int size() const noexcept { return size_; }

  void push(int from, int to, Bytes message) {
    auto& queue = at(from, to);
    {
      const std::lock_guard lock(queue.mutex);
      queue.messages.push_back(std::move(message));
    }
    queue.arrived.notify_one();
  }

  std::optional<Bytes> pop(int from, int to, Deadline deadline) {
    auto& queue = at(from, to);
    std::unique_lock lock(queue.mutex);
    const auto there = [&] { return !queue.messages.empty(); };
    // A poll does not go through the kernel: that costs as much as fifty messages.
    if (!there() &&
        (Clock::now() >= deadline || !queue.arrived.wait_until(lock, deadline, there))) {
      return std::nullopt;
    }
    Bytes message = std::move(queue.messages.front());
    queue.messages.pop_front();
    return message;
  }

 private:
  struct Queue {
    std::mutex mutex;
    std::condition_variable arrived;
    std::deque<Bytes> messages;
  };

  Queue& at(int from, int to) {
    const auto row = static_cast<std::size_t>(from) * static_cast<std::size_t>(size_);
    return queues_[row + static_cast<std::size_t>(to)];
  }

  int size_;
  std::deque<Queue> queues_;
};

class ThreadMessenger : public Messenger {
 public:
  ThreadMessenger(std::shared_ptr<ThreadHub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return hub_->size(); }
  void send(int to, Bytes message) override { hub_->push(rank_, to, std::move(message)); }
  std::optional<Bytes> receive(int from, Deadline deadline) override {
    return hub_->pop(from, rank_, deadline);
  }

 private:
  std::shared_ptr<ThreadHub> hub_;
  int rank_;
};

}  // namespace detail

/// Control planes for `size` ranks that are threads of this process; element r is for rank r's
/// thread. Throws `ConfigError` where `size` is not positive.
[[nodiscard]] inline std::vector<std::unique_ptr<ControlPlane>> make_thread_control_planes(
    int size, std::chrono::milliseconds limit = kDefaultTimeLimit) {
  if (size < 1) {
    throw ConfigError(
        fmt::format("make_thread_control_planes: expected a positive size, got {}", size));
  }
  const auto hub = std::make_shared<detail::ThreadHub>(size);
  std::vector<std::unique_ptr<ControlPlane>> planes;
  for (int r = 0; r < size; ++r) {
    planes.push_back(std::make_unique<MessageControlPlane>(
        std::make_shared<detail::ThreadMessenger>(hub, r), limit));
  }
  return planes;
}

}  // namespace cohort
