// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cohort/messenger.hpp"
#include "store_calls.hpp"

/// \file
/// Messages between ranks over a store of torch.distributed.

namespace cohort::python {

/// Each message is a key of its own, which its receiver deletes.
class StoreMessenger final : public Messenger {
 public:
  /// `name` is that of no other messenger that uses the store, or ever has.
  StoreMessenger(StoreCalls store, std::string name, int rank, int size)
      : store_(std::move(store)),
        name_(std::move(name)),
        rank_(rank),
        sent_(static_cast<std::size_t>(size)),
        received_(static_cast<std::size_t>(size)) {}

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return static_cast<int>(sent_.size()); }

  void send(int to, Bytes message) override {
    StoreCalls::Value value(message.size());
    if (!message.empty()) {
      std::memcpy(value.data(), message.data(), message.size());
    }
    store_.set(key(rank_, to, sent_[static_cast<std::size_t>(to)]++), value);
  }

  std::optional<Bytes> receive(int from, Deadline deadline) override {
    auto& number = received_[static_cast<std::size_t>(from)];
    const std::string next = key(from, rank_, number);
    if (!store_.arrives(next, deadline)) {
      return std::nullopt;
    }
    const auto value = store_.take(next);
    ++number;
    Bytes message(value.size());
    if (!value.empty()) {
      std::memcpy(message.data(), value.data(), value.size());
    }
    return message;
  }

 private:
  [[nodiscard]] std::string key(int from, int to, std::uint64_t number) const {
    return fmt::format("{}/{}/{}/{}", name_, from, to, number);
  }

  StoreCalls store_;
  std::string name_;
  int rank_;
  std::vector<std::uint64_t> sent_;
  std::vector<std::uint64_t> received_;
};

}  // namespace cohort::python
