// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "cohort/cuda/handles.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/error.hpp"

/// \file
/// The words that a rank's host shares with the kernels of one group: see `cuda::HostWords`.

namespace cohort {

/// Owner of one group's words, in memory of the host that every card of the process has mapped.
/// What the host reads costs one load.
class GroupWords {
 public:
  /// Throws `TransportError`.
  explicit GroupWords(int device) {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    void* host = nullptr;
    cuda_check(
        cudaHostAlloc(&host, sizeof(cuda::HostWords), cudaHostAllocMapped | cudaHostAllocPortable),
        "cudaHostAlloc");
    words_ = ::new (host) cuda::HostWords;
    memory_ = UniqueHostMemory(host);
    void* card = nullptr;
    cuda_check(cudaHostGetDevicePointer(&card, host, 0), "cudaHostGetDevicePointer");
    card_ = static_cast<cuda::HostWords*>(card);
  }

  /// As the card sees them.
  [[nodiscard]] cuda::HostWords* on_card() const noexcept { return card_; }

  /// Tells every wait of the group's kernels to end.
  void give_up() noexcept { store(words_->give_up, std::uint64_t{1}); }

  [[nodiscard]] bool failed() const noexcept { return load(words_->failure) != 0; }
  [[nodiscard]] cuda::InboxError failure() const noexcept {
    return cuda::InboxError::decode(load(words_->failure));
  }
  /// The ranks that did not come, in order; empty without a failure.
  [[nodiscard]] std::vector<int> missing() const {
    std::vector<int> ranks;
    const int first = failure().missing_rank;
    for (int r = 0; r < cuda::kMaxPeers; ++r) {
      if (r == first || (first >= 0 && load(words_->missing[r]) != 0)) {
        ranks.push_back(r);
      }
    }
    return ranks;
  }

  /// A further inbox of the group, by rank. Failures reach it from here on. Throws `UsageError`
  /// where there is no room.
  void add(std::span<void* const> peers) {
    const std::uint64_t count = load(words_->inboxes);
    if (count >= cuda::kMaxInboxes) {
      throw UsageError("a group has no room for further inboxes: reserve the largest at once");
    }
    for (std::size_t r = 0; r < peers.size(); ++r) {
      words_->peers[count][r] = static_cast<std::byte*>(peers[r]);
    }
    store(words_->inboxes, count + 1);
  }

  /// Leaks the memory on purpose, for kernels that never end.
  void abandon() noexcept { static_cast<void>(memory_.release()); }

 private:
  template <class Word>
  static Word load(const Word& word) noexcept {
    return std::atomic_ref<Word>(const_cast<Word&>(word)).load(std::memory_order_acquire);
  }
  template <class Word>
  static void store(Word& word, Word value) noexcept {
    std::atomic_ref<Word>(word).store(value, std::memory_order_release);
  }

  UniqueHostMemory memory_;
  cuda::HostWords* words_ = nullptr;
  cuda::HostWords* card_ = nullptr;
};

}  // namespace cohort
