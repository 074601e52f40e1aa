// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/cuda/block_budget.hpp>
#include <cohort/cuda/kernels.hpp>

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

/// \file
/// N ranks as N streams of this process: their inboxes and buffers, the time of a call that all of
/// them make, and the rows in which it is told.

namespace cohort::bench::own_kernels {

inline constexpr int kCalls = 50;
inline constexpr int kReplays = 15;

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    fmt::print(stderr, "{}: {}\n", what, cudaGetErrorString(code));
    std::exit(3);
  }
}

inline std::byte* device_memory(std::int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<std::size_t>(bytes)), "cudaMalloc");
  return static_cast<std::byte*>(memory);
}

/// Random bf16 values in (-2, 2): zeros would flatter the timings.
inline void randomize(std::byte* to, std::int64_t bytes) {
  std::mt19937 random(1);
  std::vector<std::uint32_t> words(1 << 18);
  for (auto& word : words) {
    word = static_cast<std::uint32_t>(random()) & 0xbfffbfffU;
  }
  for (std::int64_t at = 0; at < bytes; at += static_cast<std::int64_t>(words.size() * 4)) {
    const auto length =
        std::min<std::int64_t>(bytes - at, static_cast<std::int64_t>(words.size()) * 4);
    check(
        cudaMemcpy(to + at, words.data(), static_cast<std::size_t>(length), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  }
}

struct Rank {
  int card = 0;
  cuda::PeerTable table;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  std::byte* in = nullptr;
  std::byte* out = nullptr;
  float* lse = nullptr;
};

inline constexpr std::int64_t kBuffer = std::int64_t{40} << 20;

/// Where the ranks run.
struct Cards {
  int cards = 1;
  int max_blocks = 128;  ///< Of all ranks on one card together.
};

inline void make_current(const Rank& rank) { check(cudaSetDevice(rank.card), "cudaSetDevice"); }

inline void wait_for_all(const std::vector<Rank>& ranks) {
  for (const auto& rank : ranks) {
    check(cudaStreamSynchronize(rank.stream), "cudaStreamSynchronize");
  }
}

/// Lets every card address the others' memory. Asking twice is no error that matters.
inline void connect_cards(int cards) {
  for (int from = 0; from < cards; ++from) {
    check(cudaSetDevice(from), "cudaSetDevice");
    for (int to = 0; to < cards; ++to) {
      if (to != from && cudaDeviceEnablePeerAccess(to, 0) != cudaSuccess) {
        check(cudaGetLastError() == cudaErrorPeerAccessAlreadyEnabled
                  ? cudaSuccess
                  : cudaErrorPeerAccessUnsupported,
              "cudaDeviceEnablePeerAccess");
      }
    }
  }
}

inline std::vector<Rank> make_ranks(int n, const Cards& options) {
  const int ranks_per_card = (n + options.cards - 1) / options.cards;
  const auto layout = cuda::InboxLayout::make({.ranks = n,
                                               .flag_word_bytes = 4 << 20,
                                               .flag_line_bytes = 16 << 20,
                                               .max_blocks = options.max_blocks / ranks_per_card});
  connect_cards(options.cards);
  std::vector<Rank> ranks(static_cast<std::size_t>(n));
  std::vector<std::byte*> inboxes;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    auto& rank = ranks[r];
    rank.card = static_cast<int>(r) % options.cards;
    make_current(rank);
    inboxes.push_back(device_memory(layout.bytes));
    rank.in = device_memory(kBuffer);
    rank.out = device_memory(kBuffer);
    rank.lse = reinterpret_cast<float*>(device_memory(1 << 20));
    randomize(rank.in, kBuffer);
    randomize(reinterpret_cast<std::byte*>(rank.lse), 1 << 20);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&rank.begin), "cudaEventCreate");
    check(cudaEventCreate(&rank.end), "cudaEventCreate");
  }
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    auto& table = ranks[r].table;
    make_current(ranks[r]);
    std::copy(inboxes.begin(), inboxes.end(), table.peers);
    table.layout = layout;
    table.rank = static_cast<int>(r);
    table.size = n;
    table.max_clusters = cuda::cluster_budget(
        cuda::norm_cluster_room(n), {.ranks_per_card = ranks_per_card, .kernels_at_once = 1});
    cuda::initialize_inbox(table, ranks[r].stream, std::chrono::seconds(20));
  }
  wait_for_all(ranks);
  return ranks;
}

inline void free_ranks(std::vector<Rank>& ranks) {
  for (auto& rank : ranks) {
    make_current(rank);
    cudaFree(rank.table.peers[rank.table.rank]);
    cudaFree(rank.in);
    cudaFree(rank.out);
    cudaFree(rank.lse);
    cudaEventDestroy(rank.begin);
    cudaEventDestroy(rank.end);
    cudaStreamDestroy(rank.stream);
  }
}

using Call = std::function<void(const Rank&)>;

inline cudaGraphExec_t capture(const Rank& rank, const Call& call) {
  check(cudaStreamBeginCapture(rank.stream, cudaStreamCaptureModeThreadLocal), "begin capture");
  for (int i = 0; i < kCalls; ++i) {
    call(rank);
  }
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamEndCapture(rank.stream, &graph), "end capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphUpload(exec, rank.stream), "cudaGraphUpload");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return exec;
}

/// Microseconds per call.
inline double time_of(std::vector<Rank>& ranks, const Call& call) {
  std::vector<cudaGraphExec_t> graphs;
  for (const auto& rank : ranks) {
    make_current(rank);
    graphs.push_back(capture(rank, call));
  }
  wait_for_all(ranks);
  std::vector<double> times;
  for (int i = 0; i < kReplays + 3; ++i) {
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      make_current(ranks[r]);
      check(cudaEventRecord(ranks[r].begin, ranks[r].stream), "cudaEventRecord");
      check(cudaGraphLaunch(graphs[r], ranks[r].stream), "cudaGraphLaunch");
      check(cudaEventRecord(ranks[r].end, ranks[r].stream), "cudaEventRecord");
    }
    wait_for_all(ranks);
    // The last rank to be launched has waited for nobody: the launches of the others are not in it.
    float ms = 0;
    check(cudaEventElapsedTime(&ms, ranks.back().begin, ranks.back().end), "cudaEventElapsedTime");
    if (i >= 3) {
      times.push_back(ms * 1e3 / kCalls);
    }
  }
  for (cudaGraphExec_t graph : graphs) {
    cudaGraphExecDestroy(graph);
  }
  make_current(ranks[0]);
  if (cuda::read_inbox_error(ranks[0].table, ranks[0].stream)) {
    fmt::print(stderr, "a kernel timed out\n");
    std::exit(2);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// Results as JSON lines of one array.
class Report {
 public:
  void add(const std::string& fields) {
    rows_.push_back("    {" + fields + "}");
    fmt::print("{}\n", fields);
    std::fflush(stdout);
  }
  [[nodiscard]] std::string text(const std::string& head) const {
    std::string all = "{\n" + head + "  \"rows\": [\n";
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      all += rows_[i] + (i + 1 < rows_.size() ? ",\n" : "\n");
    }
    return all + "  ]\n}\n";
  }

 private:
  std::vector<std::string> rows_;
};

}  // namespace cohort::bench::own_kernels
