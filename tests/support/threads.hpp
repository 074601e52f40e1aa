// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cohort/thread_control_planes.hpp>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

/// \file
/// Ranks as threads of the test program. Catch's assertions are not thread-safe: a body uses
/// `check` and `check_throws`, and the test case sees the first failure as an exception.

namespace cohort::test {

/// For bounds on waits.
[[nodiscard]] inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// What a rank's body threw, with the rank; the exception itself is nested.
class RankFailure : public std::runtime_error {
 public:
  RankFailure(int rank, const std::string& what)
      : std::runtime_error("rank " + std::to_string(rank) + ": " + what), rank_(rank) {}

  [[nodiscard]] int rank() const noexcept { return rank_; }

 private:
  int rank_;
};

/// Throws when the condition is false.
inline void check(bool condition, std::string_view text) {
  if (!condition) {
    throw std::runtime_error("check failed: " + std::string(text));
  }
}

/// Throws with both values when they differ. Both must be arguments of `std::to_string`.
template <class A, class B>
void check_equal(const A& got, const B& expected, std::string_view text) {
  if (!(got == expected)) {
    throw std::runtime_error("check failed: " + std::string(text) + ": got " + std::to_string(got) +
                             ", expected " + std::to_string(expected));
  }
}

/// Throws unless `call` throws an `E` whose message contains every part; returns that message.
template <class E, class Call, class... Parts>
std::string check_throws(Call&& call, Parts&&... parts) {
  try {
    std::forward<Call>(call)();
  } catch (const E& error) {
    const std::string what = error.what();
    for (const std::string_view part : {std::string_view(parts)..., std::string_view()}) {
      check(what.find(part) != std::string::npos,
            "\"" + what + "\" contains \"" + std::string(part) + "\"");
    }
    return what;
  }
  throw std::runtime_error("check failed: no exception was thrown");
}

/// Longer than any wait of a correct test, shorter than a test's own limit.
inline constexpr std::chrono::milliseconds kRanksTimeLimit{20'000};

/// Runs `body(plane)` for each of `n` ranks on a thread of its own, joins them all and throws the
/// failure that came first, as a `RankFailure`. A rank that waits for a failed one is ended by
/// `limit`, the time limit of the control planes.
inline void run_ranks(int n, const std::function<void(ControlPlane&)>& body,
                      std::chrono::milliseconds limit = kRanksTimeLimit) {
  const auto planes = make_thread_control_planes(n, limit);
  std::atomic<int> failures{0};
  int first_rank = -1;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*planes[static_cast<std::size_t>(rank)]);
      } catch (...) {
        if (failures.fetch_add(1) == 0) {
          first_rank = rank;
          first = std::current_exception();
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  if (!first) {
    return;
  }
  try {
    std::rethrow_exception(first);
  } catch (const std::exception& error) {
    std::throw_with_nested(RankFailure(first_rank, error.what()));
  } catch (...) {
    std::throw_with_nested(RankFailure(first_rank, "an exception that is no std::exception"));
  }
}

}  // namespace cohort::test
