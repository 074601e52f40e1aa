// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/host/departure.hpp"
#include "cohort/host/group_pads.hpp"
#include "cohort/host/signal_pad.hpp"
#include "cohort/inquiry.hpp"
#include "cohort/joined.hpp"
#include "cohort/poll_pause.hpp"
#include "cohort/wait_notice.hpp"

/// \file
/// How a rank waits for words that its peers write into their pads: by polling, until a time limit
/// that the waits of a call share, and with an eye on who has left.

namespace cohort::host {

/// The waits of one rank in a group.
class PadWait {
 public:
  /// What a wait is for, in messages.
  struct Meeting {
    std::string_view place;  ///< Where the peer is to come to.
    std::uint64_t step = 0;
  };

  /// @param pads, departure  Outlive this.
  PadWait(const GroupPads& pads, Departure& departure, std::chrono::milliseconds limit)
      : pads_(pads),
        departure_(departure),
        limit_(limit),
        // With fewer processors than ranks, whoever is waited for is likely not running.
        spins_(pads.size() <= pads.processors() ? kSpins : 1) {}

  /// Throws `TimeoutError`, and what a rank gave up with that has, of whichever rank; where one has
  /// left in good order, if it has not arrived.
  /// @param ready    Whether the wait is over.
  /// @param arrived  rank -> whether that rank is not to blame; asked when the wait fails.
  /// @param peer     Whom the wait is for.
  /// @param meeting  Says to what; asked when the wait lasts.
  template <class Ready, class Arrived, class Meet>
  void wait(const Ready& ready, const Arrived& arrived, int peer, const Meet& meeting) {
    for (int i = 0; i < spins_; ++i) {
      if (ready()) {
        return;
      }
      cohort::detail::relax();
    }
    wait_long(ready, arrived, peer, meeting);
  }

 private:
  // A peer that runs answers within a few µs; 300 pauses are about 4 µs on Zen 4 and 13 µs on
  // Skylake and later, whose pause takes 140 cycles (Intel's optimization reference manual, 2.5.4).
  static constexpr int kSpins = 300;
  // How often a wait looks whether a rank has left over the control plane.
  static constexpr std::chrono::milliseconds kLookEvery{5};
  // After this long nobody is about to come; polling then leaves the processor to others.
  static constexpr std::chrono::milliseconds kYieldFor{200};

  template <class Ready, class Arrived, class Meet>
  [[gnu::noinline]] void wait_long(const Ready& ready, const Arrived& arrived, int peer,
                                   const Meet& meeting) {
    const cohort::detail::LimitedWait time(limit_);
    cohort::detail::WaitNotice notice(time.start(), time.deadline() - time.start());
    cohort::detail::PollPause pause(kYieldFor, 0);  // `wait` has spun
    std::unique_ptr<cohort::detail::LongWait> talk;
    auto next_look = time.start() + kLookEvery;
    int other = pads_.rank();
    while (true) {
      const auto now = Clock::now();  // before the look: this thread may not run in between
      if (ready()) {
        return;
      }
      other = other + 1 < pads_.size() ? other + 1 : 0;  // one at a time: each look costs the same
      for (const int r : {peer, other}) {
        const auto presence = pads_.presence_of(r);
        if (presence == Presence::here) {
          continue;
        }
        if (ready()) {  // after the look at the rank: the peer may have come before that left
          return;
        }
        if (presence == Presence::gave_up || !arrived(r)) {  // others may leave when they are done
          departure_.fail_departed(r, presence);
        }
      }
      const bool is_late = now > time.deadline();
      const bool looks = departure_.has_control() && now >= next_look;
      if (looks) {
        next_look = is_late ? now + kLookEvery : std::min(now + kLookEvery, time.deadline());
        departure_.fail_if_told();
        if (talk == nullptr) {
          talk = departure_.begin_long_wait(time, limit_);
        }
        if (talk != nullptr) {
          talk->look([&] { return missing_ranks(arrived); });
        }
      }
      if (is_late && (talk == nullptr || looks)) {
        const auto missing = missing_ranks(arrived);
        if (missing.empty()) {
          return;  // in this very moment
        }
        if (talk == nullptr || now > time.latest() || talk->is_settled(missing)) {
          fail_late(missing, talk.get(), time, meeting().step);
        }
      }
      notice.say(now, [&] {
        const Meeting where = meeting();
        return fmt::format("group {}: rank {} has waited for rank {} to come to {}, step {}",
                           departure_.group(), pads_.rank(),
                           cohort::detail::joined(missing_ranks(arrived), ", "), where.place,
                           where.step);
      });
      pause();
    }
  }

  template <class Arrived>
  [[nodiscard]] std::vector<int> missing_ranks(const Arrived& arrived) const {
    std::vector<int> missing;
    for (int r = 0; r < pads_.size(); ++r) {
      if (!arrived(r)) {
        missing.push_back(r);
      }
    }
    return missing;
  }

  [[noreturn]] void fail_late(const std::vector<int>& missing, cohort::detail::LongWait* talk,
                              const cohort::detail::LimitedWait& time, std::uint64_t step) {
    departure_.fail_with(cohort::detail::late_error(
        fmt::format("step {} of group {} ({} ranks)", step, departure_.group(), pads_.size()),
        time.describe(limit_), missing,
        talk != nullptr ? talk->at_fault(missing) : cohort::detail::Fault{missing}));
  }

  const GroupPads& pads_;
  Departure& departure_;
  std::chrono::milliseconds limit_;
  int spins_;
};

}  // namespace cohort::host
