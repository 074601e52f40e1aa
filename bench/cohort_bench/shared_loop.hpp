// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cohort/dtype.hpp"
#include "cohort/host/reduce.hpp"
#include "cohort/poll_pause.hpp"

/// \file
/// The loop by which engines do tensor parallelism between the processors of one machine, written
/// anew after what DeepSpeed (csrc/cpu/comm/shm.cpp) and vLLM (csrc/cpu/shm.cpp) do: copy into
/// shared memory, say so, spin until all have, and add straight into the result. As theirs it has
/// no limit on waits and checks nothing.

namespace cohort::bench {

/// Where a rank says how far it is, and its two buffers, which alternate: who says that it has come
/// to a call has done with the one before the last.
struct LoopPart {
  static constexpr std::size_t kBuffer = std::size_t{1} << 20;

  alignas(128) std::uint64_t arrived = 0;
  alignas(128) std::byte buffers[2][kBuffer];
};

/// One rank's end, over every rank's part. Collective calls in one order.
class SharedLoop {
 public:
  SharedLoop(std::vector<LoopPart*> parts, int rank) : parts_(std::move(parts)), rank_(rank) {}

  void all_gather(const std::byte* in, std::byte* out, std::size_t share) {
    in_pieces(share, LoopPart::kBuffer, [&](std::size_t first, std::size_t bytes) {
      std::memcpy(next(), in + first, bytes);
      meet();
      for (std::size_t step = 0; step < parts_.size(); ++step) {
        const std::size_t r = peer(step);
        std::memcpy(out + r * share + first, buffer(r), bytes);
      }
    });
  }

  /// `share` bytes of the sum for each rank. Each rank's share passes through every buffer.
  void reduce_scatter(const std::byte* in, std::byte* out, std::size_t share, DType dtype) {
    const std::size_t n = parts_.size();
    in_pieces(share, LoopPart::kBuffer / n / kLine * kLine,
              [&](std::size_t first, std::size_t bytes) {
                for (std::size_t step = 1; step < n; ++step) {
                  const std::size_t r = peer(step);
                  std::memcpy(next() + r * bytes, in + r * share + first, bytes);
                }
                meet();
                sum(out + first, to_size(rank_) * bytes, in + to_size(rank_) * share + first, bytes,
                    dtype);
              });
  }

  /// Small payloads are added by every rank; of large ones each adds a part, and all copy the sums.
  void all_reduce(const std::byte* in, std::byte* out, std::size_t total, DType dtype) {
    in_pieces(total, LoopPart::kBuffer, [&](std::size_t first, std::size_t bytes) {
      std::memcpy(next(), in + first, bytes);
      meet();
      if (bytes < LoopPart::kBuffer) {
        sum(out + first, 0, in + first, bytes, dtype);
        return;
      }
      const std::size_t part = bytes / parts_.size() / kLine * kLine;
      const auto begin = [&](std::size_t r) { return r * part; };
      const auto end = [&](std::size_t r) { return r + 1 == parts_.size() ? bytes : begin(r + 1); };
      const std::size_t mine = begin(to_size(rank_));
      sum(next(), mine, in + first + mine, end(to_size(rank_)) - mine, dtype);
      meet();
      for (std::size_t step = 0; step < parts_.size(); ++step) {
        const std::size_t r = peer(step);
        std::memcpy(out + first + begin(r), buffer(r), end(r) - begin(r));
      }
    });
  }

 private:
  static constexpr std::size_t kLine = 64;
  static constexpr int kSpins = 20'000;  // about a millisecond
  static std::size_t to_size(int rank) noexcept { return static_cast<std::size_t>(rank); }

  template <class Piece>
  static void in_pieces(std::size_t bytes, std::size_t most, const Piece& piece) {
    for (std::size_t first = 0; first < bytes; first += most) {
      piece(first, std::min(most, bytes - first));
    }
  }

  /// The own rank first, then those behind it, so that not all read one rank's memory at once.
  [[nodiscard]] std::size_t peer(std::size_t step) const noexcept {
    return (to_size(rank_) + step) % parts_.size();
  }
  /// The own buffer of the meeting to come, and a rank's of the one that has been.
  [[nodiscard]] std::byte* next() noexcept {
    return parts_[to_size(rank_)]->buffers[(meetings_ + 1) % 2];
  }
  [[nodiscard]] const std::byte* buffer(std::size_t r) const noexcept {
    return parts_[r]->buffers[meetings_ % 2];
  }

  void meet() {
    ++meetings_;
    std::atomic_ref(parts_[to_size(rank_)]->arrived).store(meetings_, std::memory_order_release);
    for (LoopPart* part : parts_) {
      // Theirs spin for good. Ranks that share a core would then wait for their turns.
      cohort::detail::PollPause pause(std::chrono::microseconds(500), kSpins);
      while (std::atomic_ref(part->arrived).load(std::memory_order_acquire) < meetings_) {
        pause();
      }
    }
  }

  /// The ranks' sum of what their buffers have from `offset` on; this rank's is at `own`.
  void sum(std::byte* out, std::size_t offset, const std::byte* own, std::size_t bytes,
           DType dtype) {
    sources_.clear();
    for (std::size_t r = 0; r < parts_.size(); ++r) {
      sources_.push_back(r == to_size(rank_) ? own : buffer(r) + offset);
    }
    host::reduce(dtype, ReduceOp::sum, out, sources_,
                 static_cast<std::int64_t>(bytes / size_of(dtype)));
  }

  std::vector<LoopPart*> parts_;
  int rank_;
  std::uint64_t meetings_ = 0;
  std::vector<const std::byte*> sources_;  // kept, so that calls do not allocate
};

}  // namespace cohort::bench
