// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <span>
#include <thread>
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
  explicit GroupWords(int device) : device_(device), stream_(make_stream(device)) {
    const DeviceGuard guard(device);
    const RelaxedCapture relaxed;
    void* copies = nullptr;
    cuda_check(cudaHostAlloc(&copies, cuda::kMaxInboxes * sizeof(std::uint64_t), 0),
               "cudaHostAlloc");
    copies_ = UniqueHostMemory(copies);
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

  /// The epoch of each inbox of a rank, as its card has it now. Any thread, while kernels run and
  /// inboxes are added. Throws `TransportError`, also where the card gives no answer at once.
  [[nodiscard]] std::vector<std::uint64_t> epochs(int rank) const {
    constexpr std::chrono::milliseconds kPatience{50};
    const std::lock_guard lock(looking_);
    const DeviceGuard guard(device_);
    const RelaxedCapture relaxed;
    const std::uint64_t count = load(words_->inboxes);
    auto* const copies = static_cast<std::uint64_t*>(copies_.get());
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::byte* const inbox = words_->peers[i][rank];
      cuda_check(
          cudaMemcpyAsync(copies + i, inbox + cuda::kLineBytes + offsetof(cuda::EpochRecord, epoch),
                          sizeof(std::uint64_t), cudaMemcpyDeviceToHost, stream_.get()),
          "cudaMemcpyAsync");
    }
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    cudaError_t code = cudaErrorNotReady;
    while ((code = cudaStreamQuery(stream_.get())) == cudaErrorNotReady &&
           std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    cuda_check(code, "cudaStreamQuery");
    return {copies, copies + count};
  }

  /// Leaks the memory on purpose, for kernels that never end.
  void abandon() noexcept {
    static_cast<void>(memory_.release());
    static_cast<void>(copies_.release());
    static_cast<void>(stream_.release());
  }

 private:
  template <class Word>
  static Word load(const Word& word) noexcept {
    return std::atomic_ref<Word>(const_cast<Word&>(word)).load(std::memory_order_acquire);
  }
  template <class Word>
  static void store(Word& word, Word value) noexcept {
    std::atomic_ref<Word>(word).store(value, std::memory_order_release);
  }

  int device_;
  mutable std::mutex looking_;  // at epochs
  UniqueStream stream_;         // for that
  UniqueHostMemory copies_;
  UniqueHostMemory memory_;
  cuda::HostWords* words_ = nullptr;
  cuda::HostWords* card_ = nullptr;
};

}  // namespace cohort
