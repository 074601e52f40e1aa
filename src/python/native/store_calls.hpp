// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/messenger.hpp"

/// \file
/// Calls of a store of torch.distributed, with the library's errors.

namespace cohort::python {

/// Its calls throw `TransportError`.
class StoreCalls {
 public:
  using Value = std::vector<std::uint8_t>;

  /// `rank` is for errors.
  StoreCalls(c10::intrusive_ptr<c10d::Store> store, int rank)
      : store_(std::move(store)), rank_(rank) {}

  void set(const std::string& key, const Value& value) const {
    of_store("set", [&] {
      store_->set(key, value);
      return true;
    });
  }
  /// Of a key that is there.
  [[nodiscard]] Value get(const std::string& key) const {
    return of_store("get", [&] { return store_->get(key); });
  }
  [[nodiscard]] bool has(const std::string& key) const {
    return of_store("check", [&] { return store_->check({key}); });
  }
  void remove(const std::string& key) const {
    of_store("deleteKey", [&] { return store_->deleteKey(key); });
  }
  /// Of a key that is there, which goes.
  [[nodiscard]] Value take(const std::string& key) const {
    Value value = get(key);
    remove(key);
    return value;
  }

  /// A store's wait that runs out throws what a store that is gone throws as well; so waits are
  /// short, and a question between them tells which it was. Torch warns of each that runs out, so
  /// the last moments before the deadline are questions alone. False at the deadline.
  [[nodiscard]] bool arrives(const std::string& key, Deadline deadline) const {
    std::chrono::milliseconds pause(1);
    while (true) {
      if (has(key)) {
        return true;
      }
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      if (left.count() <= 0) {
        return false;
      }
      if (left <= kLastMoments) {
        std::this_thread::sleep_for(std::min(left, pause));
        pause = std::min(2 * pause, kLongestPause);
        continue;
      }
      try {
        store_->wait({key}, std::min(left, kSlice));
        return true;
      } catch (const std::exception&) {  // asked above
      }
    }
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

  static constexpr std::chrono::milliseconds kSlice{5'000};
  static constexpr std::chrono::milliseconds kLastMoments{100};
  static constexpr std::chrono::milliseconds kLongestPause{16};

  c10::intrusive_ptr<c10d::Store> store_;
  int rank_;
};

}  // namespace cohort::python
