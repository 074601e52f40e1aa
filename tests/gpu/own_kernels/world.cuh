// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/cuda/block_budget.hpp"
#include "cohort/cuda/host_words.hpp"
#include "cohort/cuda/inbox.hpp"
#include "cohort/cuda/kernels.hpp"
#include "cohort/dtype.hpp"

// N ranks as N streams of one process over one pointer table, on one card or dealt out to several:
// every peer kernel end to end without MPI and without NCCL.

namespace cohort::test {

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(code));
    std::exit(3);
  }
}
#define COHORT_CHECK(call) ::cohort::test::check((call), #call)

/// Counts of test cases, and what failed.
struct Tally {
  int passed = 0;
  int failed = 0;
  int skipped = 0;

  void expect(bool good, const std::string& what) {
    if (good) {
      ++passed;
      return;
    }
    ++failed;
    if (failed <= 40) {
      std::fprintf(stderr, "FAIL %s\n", what.c_str());
    }
  }
};

/// Device memory that frees itself. Filled with 0xff bytes (NaN), so that what was not written
/// shows.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes) {
    COHORT_CHECK(cudaMalloc(&data_, std::max<std::size_t>(bytes, 256)));
    poison();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  ~Buffer() { cudaFree(data_); }

  void poison() {
    COHORT_CHECK(cudaMemset(data_, 0xff, std::max<std::size_t>(bytes_, 256)));
    COHORT_CHECK(cudaDeviceSynchronize());
  }
  template <class T = std::byte>
  [[nodiscard]] T* at(std::size_t byte = 0) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + byte);
  }
  void upload(const void* from, std::size_t bytes, std::size_t to_byte = 0) {
    COHORT_CHECK(cudaMemcpy(at(to_byte), from, bytes, cudaMemcpyHostToDevice));
    // From pageable memory cudaMemcpy may return before the bytes have arrived (CUDA Runtime API,
    // "API synchronization behavior"), and a world's streams do not wait for the legacy one.
    COHORT_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
  }
  template <class T>
  [[nodiscard]] std::vector<T> download(std::size_t count) const {
    std::vector<T> values(count);
    COHORT_CHECK(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

inline std::size_t to_size(std::int64_t value) { return static_cast<std::size_t>(value); }

/// A bounded wait for a stream; a hang is a failure, and the process leaves because it cannot go
/// on.
inline void finish(cudaStream_t stream, std::chrono::seconds limit = std::chrono::seconds(120)) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (true) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaSuccess) {
      return;
    }
    if (state != cudaErrorNotReady) {
      check(state, "cudaStreamQuery");
    }
    if (std::chrono::steady_clock::now() > end) {
      std::fprintf(stderr,
                   "FAIL a stream did not finish in time\ncohort-test: passed=0 failed=1 "
                   "skipped=0\n");
      std::_Exit(2);
    }
    std::this_thread::yield();
  }
}

/// Lets every card address the others' memory.
inline void connect_cards(int cards) {
  for (int from = 0; from < cards; ++from) {
    COHORT_CHECK(cudaSetDevice(from));
    for (int to = 0; to < cards; ++to) {
      if (to != from && cudaDeviceEnablePeerAccess(to, 0) != cudaSuccess) {
        const cudaError_t why = cudaGetLastError();
        check(why == cudaErrorPeerAccessAlreadyEnabled ? cudaSuccess : why,
              "cudaDeviceEnablePeerAccess");
      }
    }
  }
}

/// All ranks of one group; rank r on card r mod `cards`.
class World {
 public:
  World(int n, std::int64_t flag_word_bytes, std::int64_t flag_line_bytes,
        std::uint64_t after_epoch = 0, int cards = 1, int blocks = 0)
      : n_(n), cards_(cards) {
    if (blocks == 0) {
      blocks = cuda::block_budget(
          {.multiprocessors = multiprocessors(), .ranks_per_card = (n + cards - 1) / cards});
    }
    layout_ = cuda::InboxLayout::make({.ranks = n,
                                       .flag_word_bytes = flag_word_bytes,
                                       .flag_line_bytes = flag_line_bytes,
                                       .max_blocks = blocks});
    connect_cards(cards);
    for (int r = 0; r < n; ++r) {
      enter(r);
      inboxes_.emplace_back(static_cast<std::size_t>(layout_.bytes));
      cudaStream_t stream = nullptr;
      COHORT_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams_.push_back(stream);
    }
    for (int r = 0; r < n; ++r) {
      cuda::PeerTable table;
      for (int p = 0; p < n; ++p) {
        table.peers[p] = inboxes_[static_cast<std::size_t>(p)].at();
      }
      table.layout = layout_;
      table.rank = r;
      table.size = n;
      table.max_clusters = clusters(n, cards);
      tables_.push_back(table);
    }
    reset(std::chrono::seconds(30), after_epoch);
  }
  [[nodiscard]] static int multiprocessors() {
    int count = 0;
    COHORT_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
    return count;
  }
  [[nodiscard]] static cuda::ClusterRoom clusters(int n, int cards) {
    return cuda::cluster_budget(cuda::norm_cluster_room(n),
                                {.ranks_per_card = (n + cards - 1) / cards});
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() {
    for (cudaStream_t stream : streams_) {
      cudaStreamDestroy(stream);
    }
  }

  void reset(std::chrono::nanoseconds limit, std::uint64_t after_epoch = 0) {
    words_.clear();
    each([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
      auto& words = words_.emplace_back(std::make_unique<GroupWords>(r % cards_));
      void* peers[cuda::kMaxPeers];
      std::copy(std::begin(t.peers), std::end(t.peers), peers);
      words->add(std::span(peers, to_size(n_)));
      cuda::initialize_inbox(t, s, limit, after_epoch, words->on_card());
    });
    finish_all();
  }
  /// What the rank's host shares with its kernels.
  [[nodiscard]] GroupWords& words(int r) const { return *words_[static_cast<std::size_t>(r)]; }
  /// Most blocks of the calls that follow; 0 for the layout's.
  void limit_blocks(int blocks) {
    for (auto& table : tables_) {
      table.block_limit = blocks;
    }
  }
  /// Most clusters of the calls that follow.
  void allow_clusters(const cuda::ClusterRoom& room) {
    for (auto& table : tables_) {
      table.max_clusters = room;
    }
  }
  void finish_all() {
    for (cudaStream_t stream : streams_) {
      finish(stream);
    }
  }
  /// Different seeds for delays inside the kernels; 0 for none.
  void delay(std::uint32_t seed) {
    for (auto& table : tables_) {
      table.delay_seed = seed;
    }
  }
  /// Makes the rank's card the current one.
  void enter(int r) const { COHORT_CHECK(cudaSetDevice(r % cards_)); }
  template <class Call>
  void each(const Call& call) {
    for (int r = 0; r < n_; ++r) {
      enter(r);
      call(r, table(r), stream(r));
    }
  }
  /// `each`, then waits.
  template <class Call>
  void run(const Call& call) {
    each(call);
    finish_all();
  }
  [[nodiscard]] bool healthy() {
    bool good = true;
    each([&](int, const cuda::PeerTable& t, cudaStream_t s) {
      good = good && !cuda::read_inbox_error(t, s);
    });
    return good;
  }
  /// The epoch that all records agree on, or 0.
  [[nodiscard]] std::uint64_t epoch(int rank) const {
    struct Head {
      cuda::InboxControl control;
      cuda::EpochRecord records[cuda::kEpochRecords];
    };
    const Head head = inboxes_[static_cast<std::size_t>(rank)].download<Head>(1).front();
    const std::uint64_t first = head.records[0].epoch;
    const bool equal = std::all_of(std::begin(head.records), std::end(head.records),
                                   [first](const auto& record) { return record.epoch == first; });
    return equal ? first : 0;
  }

  [[nodiscard]] int size() const { return n_; }
  [[nodiscard]] const cuda::InboxLayout& layout() const { return layout_; }
  [[nodiscard]] const cuda::PeerTable& table(int r) const {
    return tables_[static_cast<std::size_t>(r)];
  }
  [[nodiscard]] cudaStream_t stream(int r) const { return streams_[static_cast<std::size_t>(r)]; }

 private:
  int n_;
  int cards_;
  cuda::InboxLayout layout_;
  std::vector<Buffer> inboxes_;
  std::vector<cudaStream_t> streams_;
  std::vector<cuda::PeerTable> tables_;
  std::vector<std::unique_ptr<GroupWords>> words_;
};

using Random = std::mt19937;

/// Host values of an element type.
inline double decode(DType dtype, const std::byte* at) {
  std::uint16_t half = 0;
  float single = 0;
  switch (dtype) {
    case DType::f16:
      std::memcpy(&half, at, 2);
      return f16_to_float(half);
    case DType::bf16:
      std::memcpy(&half, at, 2);
      return bf16_to_float(half);
    default:
      std::memcpy(&single, at, 4);
      return single;
  }
}

inline void encode(DType dtype, float value, std::byte* at) {
  std::uint16_t half = 0;
  switch (dtype) {
    case DType::f16:
      half = float_to_f16(value);
      std::memcpy(at, &half, 2);
      return;
    case DType::bf16:
      half = float_to_bf16(value);
      std::memcpy(at, &half, 2);
      return;
    default:
      std::memcpy(at, &value, 4);
  }
}

/// Unit roundoff of a type.
inline double roundoff(DType dtype) {
  return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
}

/// Bytes of `count` elements: small integers, whose sums are exact, or uniform in [-2, 2).
inline std::vector<std::byte> random_elements(Random& random, DType dtype, std::int64_t count,
                                              bool exact) {
  const std::size_t element = size_of(dtype);
  std::vector<std::byte> bytes(to_size(count) * element);
  for (std::size_t i = 0; i < to_size(count); ++i) {
    const float value = exact ? static_cast<float>(static_cast<int>(random() % 15) - 7)
                              : static_cast<float>(random() % 65536) / 16384.0F - 2.0F;
    encode(dtype, value, bytes.data() + i * element);
  }
  return bytes;
}

// The parts of the program; each in a file of its own.
void test_local(Tally& tally);
void test_division(Tally& tally);
void test_collectives(Tally& tally, int n, int cards);
void test_attention(Tally& tally, int n);
void test_norms(Tally& tally, int n, int cards);
void test_norms_alone(Tally& tally);
void test_failures(Tally& tally);
void test_overlap(Tally& tally, int cards, int rounds);
void soak(Tally& tally, int n, int cards, std::int64_t calls, std::uint32_t seed);

}  // namespace cohort::test
