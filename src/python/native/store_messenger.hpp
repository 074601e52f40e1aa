// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/intrusive_ptr.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/messenger.hpp"

/// \file
/// Messages between ranks over a store of torch.distributed.

namespace cohort::python {

/// Each message is a key of its own, which its receiver deletes.
class StoreMessenger final : public Messenger {
 public:
  /// `name` is that of no other messenger that uses the store.
  StoreMessenger(c10::intrusive_ptr<c10d::Store> store, std::string name, int rank, int size)
      : store_(std::move(store)),
        name_(std::move(name)),
        rank_(rank),
        sent_(static_cast<std::size_t>(size)),
        received_(static_cast<std::size_t>(size)) {}

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return static_cast<int>(sent_.size()); }

  void send(int to, Bytes message) override {
    std::vector<std::uint8_t> value(message.size());
    if (!message.empty()) {
      std::memcpy(value.data(), message.data(), message.size());
    }
    of_store("set", [&] {
      store_->set(key(rank_, to, sent_[static_cast<std::size_t>(to)]++), value);
      return true;
    });
  }

  std::optional<Bytes> receive(int from, Deadline deadline) override {
    auto& number = received_[static_cast<std::size_t>(from)];
    const std::string next = key(from, rank_, number);
    if (!arrives(next, deadline)) {
      return std::nullopt;
    }
    const auto value = of_store("get", [&] { return store_->get(next); });
    of_store("deleteKey", [&] { return store_->deleteKey(next); });
    ++number;
    Bytes message(value.size());
    if (!value.empty()) {
      std::memcpy(message.data(), value.data(), value.size());
    }
    return message;
  }

 private:
  /// What `call` gives; what it throws as a `TransportError`.
  template <class Call>
  std::invoke_result_t<Call> of_store(const char* name, const Call& call) const {
    try {
      return call();
    } catch (const std::exception& error) {
      throw TransportError({.call = std::string("c10d::Store::") + name, .rank = rank_},
                           error.what());
    }
  }

  /// A store's wait that runs out throws what a store that is gone throws as well; so waits are
  /// short, and a question between them tells which it was. Torch warns of each that runs out, so
  /// the last moments before the deadline are questions alone.
  [[nodiscard]] bool arrives(const std::string& next, Deadline deadline) {
    while (true) {
      if (of_store("check", [&] { return store_->check({next}); })) {
        return true;
      }
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      if (left.count() <= 0) {
        return false;
      }
      if (left < kLastMoments) {
        std::this_thread::sleep_for(std::min(left, std::chrono::milliseconds(1)));
        continue;
      }
      try {
        store_->wait({next}, std::min(left, kSlice));
        return true;
      } catch (const std::exception&) {  // asked above
      }
    }
  }

  [[nodiscard]] std::string key(int from, int to, std::uint64_t number) const {
    return fmt::format("{}/{}/{}/{}", name_, from, to, number);
  }

  static constexpr std::chrono::milliseconds kSlice{5'000};
  static constexpr std::chrono::milliseconds kLastMoments{100};

  c10::intrusive_ptr<c10d::Store> store_;
  std::string name_;
  int rank_;
  std::vector<std::uint64_t> sent_;
  std::vector<std::uint64_t> received_;
};

}  // namespace cohort::python
