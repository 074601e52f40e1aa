// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "peer_group.cuh"

// Bounded waits of peer kernels: polls, and what ends them.

namespace cohort::cuda::detail {

// What waits do beyond polling is rare. What ends them is out of line, and nothing lives across it;
// what lets them go on is not, because registers that live across a call would be spilled. Both
// take the ranks that a thread misses as bits.

inline constexpr std::uint64_t kWaitIsOver = ~std::uint64_t{0};

/// How often the host's words are looked at, by one thread of the card: each look crosses the bus.
inline constexpr std::uint64_t kHostLookNs = 100'000;

/// Tells the host of the group's first error.
static __device__ __forceinline__ void tell_host(InboxControl* own, std::uint64_t error) {
  HostWords* const words = own->words;
  if (words == nullptr || atomicExch(&own->told, 1U) != 0) {
    return;
  }
  volatile std::uint64_t* const failure = &words->failure;
  if (*failure == 0) {  // another inbox of the group may have been first
    *failure = error;
  }
}

/// Tells the host of ranks that are missed.
static __device__ __forceinline__ void tell_missing(InboxControl* own, std::uint32_t missing) {
  HostWords* const words = own->words;
  if (words == nullptr || missing == 0 ||
      (*const_cast<volatile std::uint32_t*>(&own->missing) & missing) == missing) {
    return;
  }
  const std::uint32_t before = atomicOr(&own->missing, missing);
  for (std::uint32_t left = missing & ~before; left != 0; left &= left - 1) {
    *const_cast<volatile std::uint32_t*>(&words->missing[__ffs(static_cast<int>(left)) - 1]) = 1;
  }
}

/// Sets the own error word, unless it is set, and pushes it to every rank, into all inboxes of the
/// group: late ones then leave at entry, and those that wait leave at their next look.
template <int kRanks>
static __device__ __forceinline__ void fail(const Group<kRanks>& g, std::uint64_t word) {
  InboxControl* const own = control(g.own());
  if (atomicCAS_system(reinterpret_cast<unsigned long long*>(&own->error), 0ULL,
                       static_cast<unsigned long long>(word)) != 0) {
    return;
  }
  const auto set = [word](std::uint64_t* to) {
    asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(to), "l"(word) : "memory");
  };
  const auto set_all = [&](std::byte* inbox) {
    set(&control(inbox)->error);
    for (std::uint32_t i = 0; i < kEpochRecords; ++i) {
      set(&record(inbox, i)->error);
    }
  };
  for (int k = 0; k < g.size(); ++k) {
    set_all(g.peers[k]);
  }
  const HostWords* const words = own->words;
  if (words != nullptr) {
    const auto inboxes = *const_cast<const volatile std::uint64_t*>(&words->inboxes);
    for (std::uint64_t i = 0; i < inboxes && i < kMaxInboxes; ++i) {
      for (int r = 0; r < g.size(); ++r) {
        set_all(words->peers[i][r]);
      }
    }
  }
  tell_host(own, word);
}

/// Whether the host tells waits to end; asked now and then.
static __device__ __forceinline__ bool host_gave_up(InboxControl* own, std::uint64_t now) {
  const HostWords* const words = own->words;
  const std::uint64_t due = *const_cast<volatile std::uint64_t*>(&own->next_look);
  if (words == nullptr || now < due) {
    return false;
  }
  const auto before = atomicCAS(reinterpret_cast<unsigned long long*>(&own->next_look),
                                static_cast<unsigned long long>(due),
                                static_cast<unsigned long long>(now + kHostLookNs));
  return before == due && *const_cast<const volatile std::uint64_t*>(&words->give_up) != 0;
}

/// Tells all peers which call this rank is in. Where ranks make different calls, each waits for
/// words with flags that never come. So whoever has waited for a while announces its call, once a
/// thread, and finds in the own inbox what the others are in; a call that gets on announces
/// nothing.
template <int kRanks>
static __device__ __forceinline__ void announce(const Group<kRanks>& g, std::uint64_t epoch) {
  const std::uint64_t call = g.signature.announcement(epoch);
#pragma unroll 1
  for (int k = 1; k < g.size(); ++k) {
    asm volatile("st.volatile.global.u64 [%0],%1;" ::"l"(announcement(g.peers[k], g.rank)),
                 "l"(call)
                 : "memory");
  }
}

/// What the announcements in the own inbox say of the ranks that a thread misses.
struct Whereabouts {
  std::uint32_t away = 0;   ///< Have not come to this call.
  std::uint32_t other = 0;  ///< Are in another one.
};
template <int kRanks>
static __device__ __forceinline__ Whereabouts look_for(const Group<kRanks>& g, std::uint64_t epoch,
                                                       std::uint32_t missing) {
  Whereabouts found;
  const std::uint64_t mine = g.signature.announcement(epoch);
#pragma unroll 1
  for (std::uint32_t left = missing; left != 0; left &= left - 1) {
    const std::uint32_t bit = left & (0U - left);
    const std::uint64_t theirs = *const_cast<const volatile std::uint64_t*>(
        announcement(g.own(), __ffs(static_cast<int>(left)) - 1));
    const bool here =
        CallSignature::announced_epoch(theirs) == CallSignature::announced_epoch(mine);
    found.away |= here ? 0U : bit;
    found.other |= here && theirs != mine ? bit : 0U;
  }
  return found;
}

/// Ends a wait for the ranks `missing`: says why, unless the group has failed before.
template <int kRanks>
static __device__ __noinline__ void end_wait(const Group<kRanks>& g, std::uint64_t epoch,
                                             std::uint32_t missing) {
  InboxControl* const own = control(g.own());
  const Whereabouts found = look_for(g, epoch, missing);
  // Ranks that have come but do not go on count where no other is missing.
  const std::uint32_t named = found.away != 0 ? found.away : missing;
  if (found.other != 0) {
    const int rank = __ffs(static_cast<int>(found.other)) - 1;
    const std::uint64_t theirs =
        *const_cast<const volatile std::uint64_t*>(announcement(g.own(), rank));
    fail(g, InboxError::encode(epoch, g.rank, rank, g.signature.call(),
                               CallSignature::announced_call(theirs)));
  } else if (*const_cast<volatile std::uint64_t*>(&own->error) == 0) {
    tell_missing(own, named);
    fail(g,
         InboxError::encode(epoch, g.rank, __ffs(static_cast<int>(named)) - 1, g.signature.call()));
  } else {
    tell_missing(own, found.away);
  }
  tell_host(own, *const_cast<volatile std::uint64_t*>(&own->error));
}

/// Looks at the error word, the peers' announcements, the host's word and the clock. Returns when
/// the wait began, or kWaitIsOver. `missing` is 0 in a thread that misses nothing and polls with
/// its warp.
template <int kRanks>
__device__ __forceinline__ std::uint64_t look_around(const Group<kRanks>& g, std::uint64_t epoch,
                                                     std::uint32_t missing, std::uint64_t start) {
  InboxControl* const own = control(g.own());
  const volatile InboxControl* const seen = own;
  const std::uint64_t now = global_time();
  if (start == 0 && missing != 0) {
    announce(g, epoch);
  }
  const bool late = start != 0 && now - start >= seen->limit_ns;
  if (!late && seen->error == 0 &&
      (missing == 0 || (look_for(g, epoch, missing).other == 0 && !host_gave_up(own, now)))) {
    return start != 0 ? start : now;
  }
  if (missing != 0) {
    end_wait(g, epoch, missing);
  }
  return kWaitIsOver;
}

/// The same out of line, for warps that keep nothing across it.
template <int kRanks>
static __device__ __noinline__ std::uint64_t look_around_apart(const Group<kRanks>& g,
                                                               std::uint64_t epoch,
                                                               std::uint32_t missing,
                                                               std::uint64_t start) {
  return look_around(g, epoch, missing, start);
}

/// How long a thread goes on polling.
class Patience {
 public:
  /// Polls between two looks at the clock.
  static constexpr int kPolls = 256;

  /// After kPolls polls, the last of which missed the ranks `missing`. True if the wait is over:
  /// the limit is reached, or another thread or rank has failed, or the host gave up.
  template <int kRanks>
  __device__ __forceinline__ bool is_over(const Group<kRanks>& g, const Call& c,
                                          std::uint32_t missing) {
    start_ = look_around(g, c.epoch(), missing, start_);
    return start_ == kWaitIsOver;
  }
  /// The same for a warp after `poll_in_warp`; the answer is one for all of it.
  template <int kRanks>
  __device__ __forceinline__ bool is_over_in_warp(const Group<kRanks>& g, const Call& c,
                                                  std::uint32_t missing) {
    start_ = look_around_apart(g, c.epoch(), missing, start_);
    return __any_sync(kFullWarp, start_ == kWaitIsOver);
  }

 private:
  std::uint64_t start_ = 0;
};

/// Polls until `poll()`, the ranks whose words are not there yet, as bits, is 0. False if the wait
/// failed. Polls are a loop of their own, so that the rare look around is not in their way.
template <int kRanks, class Poll>
__device__ __forceinline__ bool await(const Group<kRanks>& g, const Call& c, Patience& patience,
                                      const Poll& poll) {
  std::uint32_t missing = 0;
  do {
#pragma unroll 1
    for (int i = 0; i < Patience::kPolls; ++i) {
      missing = poll();
      if (missing == 0) {
        return true;
      }
    }
  } while (!patience.is_over(g, c, missing));
  return false;
}

/// Polls for a while with all threads of a warp. True in all of them as soon as nothing is missing
/// in any; else `missing` has the ranks whose words this thread misses. Whoever misses something
/// looks around and begins anew: little lives in registers there, and nothing of the kind is in a
/// poll's way.
template <class Poll>
__device__ __forceinline__ bool poll_in_warp(std::uint32_t& missing, const Poll& poll) {
#pragma unroll 1
  for (int i = 0; i < Patience::kPolls; ++i) {
    missing = poll();
    if (__all_sync(kFullWarp, missing == 0)) {
      return true;
    }
  }
  return false;
}

}  // namespace cohort::cuda::detail
