// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "cohort/error.hpp"

/// \file
/// Byte messages between pairs of ranks, which an engine may bring.

namespace cohort {

/// A message.
using Bytes = std::vector<std::byte>;
/// The clock of all limits.
using Clock = std::chrono::steady_clock;
/// When a wait ends.
using Deadline = Clock::time_point;

/// Ordered byte messages between pairs of ranks: all that an engine has to bring. Messages to the
/// own rank never reach it. Calls are made by one thread at a time.
class Messenger {
 public:
  Messenger() = default;
  Messenger(const Messenger&) = delete;
  Messenger& operator=(const Messenger&) = delete;
  virtual ~Messenger() = default;

  /// This rank.
  [[nodiscard]] virtual int rank() const noexcept = 0;
  /// Ranks that can be reached, this one included.
  [[nodiscard]] virtual int size() const noexcept = 0;

  /// Hands a message over. Must not wait for the receiver to ask for it. Messages from one rank
  /// to another arrive in order. Throws `TransportError`.
  virtual void send(int to, Bytes message) = 0;

  /// The next message from `from`, or nothing at the deadline. A deadline in the past polls.
  /// Throws `TransportError`, also where the peer is known to be gone.
  virtual std::optional<Bytes> receive(int from, Deadline deadline) = 0;

  /// A message that has arrived.
  struct Arrival {
    int from = 0;   ///< Its sender.
    Bytes message;  ///< What it sent.
  };
  /// The next message that has arrived, from whomever, or nothing; waits for none. Passes over
  /// ranks that are gone, and keeps the messages of each in order. Asked once for each step of an
  /// engine: a messenger that can ask for all ranks at once does better than this, which polls
  /// each.
  virtual std::optional<Arrival> receive_any() {
    for (int step = 0; step < size(); ++step) {
      const int from = next_;
      next_ = (next_ + 1) % size();
      if (from == rank()) {
        continue;
      }
      try {
        if (auto message = receive(from, Clock::now())) {
          return Arrival{from, std::move(*message)};
        }
      } catch (const TransportError&) {
        continue;  // those who wait for it learn it
      }
    }
    return std::nullopt;
  }

  /// Waits until the messages to `to` arrive without this rank's help: after a call in which both
  /// take part, it may be long in waits that the messenger knows nothing of. False at the deadline.
  /// For messengers whose messages are on their own once handed over there is nothing to do.
  virtual bool flush(int to, Deadline deadline) {
    static_cast<void>(to);
    static_cast<void>(deadline);
    return true;
  }

  /// A wait timed out or a call failed, so messages may stay in flight for good: what is torn down
  /// later must not wait for them. The messenger works on for groups without the missing ranks.
  virtual void abandon() noexcept {}

 private:
  int next_ = 0;  // whom `receive_any` asks first: none keeps it from the others
};

}  // namespace cohort
