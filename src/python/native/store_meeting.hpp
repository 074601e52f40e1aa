// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/joined.hpp"
#include "cohort/messenger.hpp"
#include "cohort/wait_look.hpp"
#include "signals.hpp"
#include "store_calls.hpp"

/// \file
/// How the ranks that live now find each other in a store that outlives processes.

namespace cohort::python {

/// Ranks that have died may have left anything under the names that those that live now use, so a
/// rank trusts what was written for it alone: each other one says hello by a word that it has just
/// drawn, rank 0 answers that word with the meeting's, and the rank comes there. A hello of the
/// dead gets an answer that nobody reads.
class StoreMeeting {
 public:
  /// `name` is what all ranks call it, those of earlier attempts too.
  StoreMeeting(const StoreCalls& store, std::string name, int rank, int size,
               std::chrono::milliseconds limit)
      : store_(store), name_(std::move(name)), rank_(rank), size_(size), limit_(limit) {}

  /// Collective. What the ranks that have met call it, and nobody else ever. Throws `TimeoutError`
  /// naming those that did not come, `TransportError`.
  [[nodiscard]] std::string agree() const { return rank_ == 0 ? welcome() : say_hello(); }

 private:
  [[nodiscard]] std::string welcome() const {
    const Deadline deadline = Clock::now() + limit_;
    const std::string meeting = key(drawn());
    std::vector<StoreCalls::Value> answered(static_cast<std::size_t>(size_));
    std::vector<int> missing(static_cast<std::size_t>(size_ - 1));
    std::iota(missing.begin(), missing.end(), 1);
    while (true) {
      std::erase_if(missing, [&](int rank) { return has_come(meeting, rank, answered); });
      const bool late = !missing.empty() && Clock::now() >= deadline;
      if (missing.empty() || late) {
        for (int rank = 1; rank < size_; ++rank) {
          store_.set(last_word(meeting, rank), value(detail::joined(missing, " ")));
        }
      }
      if (late) {
        fail(missing);
      }
      if (missing.empty()) {
        return meeting;
      }
      std::this_thread::sleep_for(kBetweenLooks);
      look();
    }
  }
  [[nodiscard]] bool has_come(const std::string& meeting, int rank,
                              std::vector<StoreCalls::Value>& answered) const {
    const std::string here = fmt::format("{}/{}", meeting, rank);
    const std::string hello = key("hello", rank);
    if (store_.has(here)) {
      store_.remove(here);
      store_.remove(hello);
      return true;
    }
    auto& last = answered[static_cast<std::size_t>(rank)];
    if (store_.has(hello)) {
      if (auto word = store_.get(hello); word != last) {
        if (!last.empty()) {
          store_.remove(key("to", text(last)));
        }
        store_.set(key("to", text(word)), value(meeting));
        last = std::move(word);
      }
    }
    return false;
  }

  [[nodiscard]] std::string say_hello() const {
    const Deadline deadline = Clock::now() + limit_ + kPatience;
    const std::string word = drawn();
    store_.set(key("hello", rank_), value(word));
    const std::string answer = key("to", word);
    if (!arrives(answer, deadline)) {
      fail({0});
    }
    const std::string meeting = text(store_.take(answer));
    store_.set(fmt::format("{}/{}", meeting, rank_), value("here"));
    const std::string last = last_word(meeting, rank_);
    if (!arrives(last, deadline)) {
      fail({0});
    }
    std::istringstream words(text(store_.take(last)));
    const std::vector<int> missing(std::istream_iterator<int>(words), {});
    if (!missing.empty()) {
      fail(missing);
    }
    return meeting;
  }
  [[nodiscard]] bool arrives(const std::string& key, Deadline deadline) const {
    while (!store_.arrives(key, std::min(deadline, Clock::now() + 2 * WaitLook::kEvery))) {
      if (Clock::now() >= deadline) {
        return false;
      }
      look();
    }
    return true;
  }
  /// Nobody is to be told yet where a signal's handler ends it.
  static void look() {
    WaitLook::pass(Clock::now());
    Interruption::raise();
  }
  /// Where rank 0 says who has not come.
  [[nodiscard]] static std::string last_word(const std::string& meeting, int rank) {
    return fmt::format("{}/{}/all", meeting, rank);
  }

  [[noreturn]] void fail(const std::vector<int>& missing) const {
    throw TimeoutError(fmt::format("meeting {} of {} ranks: rank {} did not arrive within {} ms",
                                   name_, size_, detail::joined(missing, ", "), limit_.count()),
                       missing);
  }

  template <class... Parts>
  [[nodiscard]] std::string key(const Parts&... parts) const {
    std::string key = name_;
    ((key += fmt::format("/{}", parts)), ...);
    return key;
  }
  [[nodiscard]] static std::string drawn() {
    std::random_device device;
    return fmt::format("{:08x}{:08x}{:08x}", device(), device(), device());
  }
  [[nodiscard]] static StoreCalls::Value value(std::string_view text) {
    return {text.begin(), text.end()};
  }
  [[nodiscard]] static std::string text(const StoreCalls::Value& value) {
    return {value.begin(), value.end()};
  }

  static constexpr std::chrono::milliseconds kBetweenLooks{2};
  /// Of the others, whom rank 0 tells at its own limit who is missing.
  static constexpr std::chrono::milliseconds kPatience{500};

  const StoreCalls& store_;
  std::string name_;
  int rank_;
  int size_;
  std::chrono::milliseconds limit_;
};

}  // namespace cohort::python
