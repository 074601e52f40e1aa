// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "stand_in/stand_in.hpp"

/// \file
/// What the functions that stand in share: the devices' streams, and the books.

namespace cohort::test::stand_in {

inline constexpr int kDevices = 4;

/// Longer than the library waits for any stream. A wait that reaches it is a misuse.
inline constexpr std::chrono::seconds kLongestWait{8};

/// What a stream does once `ready` says so; at once where it is empty.
struct Work {
  std::function<bool()> ready = {};
  std::function<void()> run = {};
};

struct Capture;

/// A stream runs when it is asked how far it is.
struct Stream {
  int device = 0;
  std::deque<Work> queue = {};
  std::uint64_t enqueued = 0;
  std::uint64_t done = 0;
  bool runs = false;                           ///< `advance` is under way.
  std::shared_ptr<Capture> capture = nullptr;  ///< Nothing where the stream is not captured.
};

/// What a graph owns beside its work.
struct UserObject {
  void* object;
  void (*destroy)(void*);
  int references;
};

/// A graph or an executable one.
struct Graph {
  std::vector<Work> work = {};
  std::vector<UserObject*> objects = {};
};

struct Capture {
  unsigned long long id;
  std::unique_ptr<Graph> graph;
  bool invalid = false;
  std::vector<Stream*> streams = {};
};

/// All state; `mutex` guards it.
struct Machine {
  std::recursive_mutex mutex = {};
  std::optional<Refusal> refusal = {};
  Report books = {};
  std::array<Stream, kDevices> default_streams = {};
  /// With those that were destroyed: they finish what they have, and events look at them.
  std::map<void*, std::unique_ptr<Stream>> streams = {};
  std::set<void*> destroyed_streams = {};
  std::map<void*, std::size_t> memory = {};  ///< With its bytes.
  unsigned long long captures = 0;
};

/// The only one.
[[nodiscard]] Machine& machine();

/// The calling thread's current device.
[[nodiscard]] int& current_device();

/// Counts a call and says whether it fails.
[[nodiscard]] bool fails(const char* function, int device = current_device());

/// Books `change` things of a kind.
void count(const char* kind, long change);

/// Notes what no caller may do.
void misuse(const std::string& what);

/// The stream of a handle; the device's default stream for a null one, and where it is gone.
[[nodiscard]] Stream& stream_of(void* handle);

/// Runs what can run; true once the stream is empty.
bool advance(Stream& stream);

/// Appends to the stream, or to the graph of its capture. False where that has become invalid.
[[nodiscard]] bool enqueue(Stream& stream, Work work);

/// Memory of the host that takes the place of a device's.
[[nodiscard]] void* allocate(const char* kind, std::size_t bytes);
/// False where it is not there.
bool release(const char* kind, void* memory);

/// Polls, unlocked between polls, until `done` or the limit; true if done.
template <class Done>
[[nodiscard]] bool wait_until(std::chrono::milliseconds limit, Done done) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (true) {
    {
      const std::lock_guard lock(machine().mutex);
      if (done()) {
        return true;
      }
    }
    if (std::chrono::steady_clock::now() > end) {
      return false;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

/// A function that waits: `refusal` where this call fails, else what `body` returns, which locks
/// where it has to.
template <class Code, class Body>
[[nodiscard]] Code unlocked_call(const char* function, Code refusal, Body body) {
  return fails(function) ? refusal : body();
}

/// Any other function: `body` runs under the lock and returns a code, or nothing for success.
template <class Code, class Body>
[[nodiscard]] Code call(const char* function, Code refusal, Body body) {
  if (fails(function)) {
    return refusal;
  }
  const std::lock_guard lock(machine().mutex);
  if constexpr (std::is_void_v<decltype(body())>) {
    body();
    return Code{};
  } else {
    return body();
  }
}

}  // namespace cohort::test::stand_in
