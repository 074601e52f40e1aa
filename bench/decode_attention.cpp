// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <cohort/cuda/cuda_check.hpp>
#include <cohort/cuda/handles.hpp>
#include "command_line/command_line.hpp"
#include "decode_attention/exact.hpp"
#include "decode_engine/attention_splits.hpp"
#include "decode_engine/cuda_kernels.hpp"
#include "decode_engine/cuda_peak.hpp"
#include "timing_event.hpp"

// What decode_engine's attention takes on one card, by itself, beside its roofline, for the widths
// of DeepSeek-V3. Caches are cold, as in a model: a sample is a graph of calls that have a cache
// each, behind a write that fills the card's own. Divisions of the work take turns; medians of 7.
// Each is held to fp64 first, with sequences of unequal lengths.

namespace {

using cohort::cuda_check;
using cohort::bench::make_timing_event;
using decode_engine::Attention;
using decode_engine::AttentionSplits;

constexpr std::string_view kHelp =
    "What attention over a latent cache of 512+64 takes on one card, in us, beside its "
    "roofline.\n\n"
    "  decode_attention --json FILE --sweep\n\n"
    "  --json FILE  write rows as JSON lines\n"
    "  --sweep      the eight divisions of the work that are predicted to take least, not only "
    "one\n"
    "  --help       this text\n";

constexpr std::int64_t kLatent = 512;
constexpr std::int64_t kRope = 64;
constexpr std::int64_t kRow = kLatent + kRope;
constexpr std::array<std::int64_t, 2> kHeads = {64, 128};
constexpr std::array<std::int64_t, 3> kBatches = {1, 8, 64};
constexpr std::array<std::int64_t, 5> kTokens = {512, 1024, 2048, 4096, 8192};
constexpr std::int64_t kMostRows = kHeads.back() * kBatches.back();
constexpr int kSamples = 7;
constexpr std::size_t kMostWays = 8;

struct Size {
  std::int64_t heads = 0, batch = 0, tokens = 0;

  [[nodiscard]] std::int64_t cache_elements() const { return batch * tokens * kRow; }
  /// Calls of a sample.
  [[nodiscard]] int calls() const { return batch * tokens <= 65536 ? 16 : 5; }
  /// Microseconds that attention takes at least.
  [[nodiscard]] double roofline(const decode_engine::Peak& peak) const {
    const double flops = 2.0 * static_cast<double>(batch * tokens * heads * (kRow + kLatent));
    return 1e6 *
           std::max(2.0 * static_cast<double>(cache_elements()) / peak.bytes, flops / peak.flops);
  }
};

struct Timed {
  AttentionSplits splits;
  unsigned long long wrong = 0;
  cohort::UniqueGraphExec calls = {};
  std::vector<double> us = {};
};

class Card {
 public:
  Card() {
    decode_engine::kernels::prepare_attention(kLatent, kRope);
    fill(cache_.get(), kCacheElements / kRow, 1);
    fill(queries_.get(), kMostRows, 2);
    cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
  }

  [[nodiscard]] const decode_engine::Peak& peak() const { return peak_; }
  [[nodiscard]] std::vector<AttentionSplits> divisions(const Size& size, bool all) const {
    auto divisions =
        decode_engine::attention_divisions({size.heads, size.batch, size.tokens, multiprocessors_});
    std::erase_if(divisions, [&](const AttentionSplits& splits) {
      return room(size, splits) > kRoomElements;
    });
    divisions.resize(std::min<std::size_t>(divisions.size(), all ? kMostWays : 1));
    return divisions;
  }

  /// How many results of each way are wrong, with all tokens and with fewer of most sequences.
  void check(const Size& size, std::vector<Timed>& ways) {
    for (const bool all : {true, false}) {
      std::vector<std::int32_t> counts;
      for (std::int64_t b = 0; b < size.batch; ++b) {
        const std::int64_t fewer = b % 5 == 3 ? size.tokens : (b * 977 + 37) % size.tokens;
        counts.push_back(static_cast<std::int32_t>(size.tokens - (all ? 0 : fewer)));
      }
      put(counts);
      decode_attention::attend_exactly(attention(size, 0), exact_, stream_.get());
      for (Timed& way : ways) {
        way.wrong += wrong_of(size, way.splits);
      }
    }
    put(std::vector<std::int32_t>(static_cast<std::size_t>(size.batch),
                                  static_cast<std::int32_t>(size.tokens)));
  }

  void capture(const Size& size, Timed& way) {
    cuda_check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
    for (int i = 0; i < size.calls(); ++i) {
      attend(attention(size, i), way.splits);
    }
    cudaGraph_t captured = nullptr;
    cuda_check(cudaStreamEndCapture(stream_.get(), &captured), "cudaStreamEndCapture");
    const cohort::UniqueGraph graph(captured);
    cudaGraphExec_t instantiated = nullptr;
    cuda_check(cudaGraphInstantiate(&instantiated, captured, 0), "cudaGraphInstantiate");
    way.calls = cohort::UniqueGraphExec(instantiated);
  }

  /// Microseconds of a call.
  [[nodiscard]] double sample(const Size& size, const Timed& way) {
    cuda_check(cudaMemsetAsync(other_.get(), 0, kOtherBytes, stream_.get()), "cudaMemsetAsync");
    cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
    cuda_check(cudaGraphLaunch(way.calls.get(), stream_.get()), "cudaGraphLaunch");
    cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
    cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, begin_.get(), end_.get()), "cudaEventElapsedTime");
    return static_cast<double>(ms) * 1e3 / size.calls();
  }

 private:
  static constexpr std::int64_t kCacheElements = (std::int64_t{4} << 30) / 2 / kRow * kRow;
  static constexpr std::int64_t kRoomElements = std::int64_t{64} << 20;
  static constexpr std::size_t kOtherBytes = std::size_t{192} << 20;

  template <class T>
  [[nodiscard]] static T* as(const cohort::UniqueMemory& memory) {
    return static_cast<T*>(memory.get());
  }
  [[nodiscard]] static std::int64_t room(const Size& size, const AttentionSplits& splits) {
    return splits.parts() * size.batch * size.heads * (kLatent + 1);
  }
  void fill(void* to, std::int64_t rows, std::uint64_t seed) {
    decode_engine::kernels::fill_with_noise(static_cast<cohort::BFloat16*>(to),
                                            {.seed = seed, .size = decode_engine::kUnitNoise},
                                            {.rows = rows, .columns = kRow}, stream_.get());
  }
  void put(const std::vector<std::int32_t>& counts) {
    cuda_check(cudaMemcpyAsync(counts_.get(), counts.data(), counts.size() * sizeof(std::int32_t),
                               cudaMemcpyHostToDevice, stream_.get()),
               "cudaMemcpyAsync");
    cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
  }
  /// With a cache of its own, as long as there are any.
  [[nodiscard]] Attention attention(const Size& size, int call) const {
    const std::int64_t caches = kCacheElements / size.cache_elements();
    return {.q = as<cohort::BFloat16>(queries_),
            .cache = as<cohort::BFloat16>(cache_) + call % caches * size.cache_elements(),
            .counts = as<std::int32_t>(counts_),
            .out = as<cohort::BFloat16>(out_),
            .lse = as<float>(lse_),
            .heads = size.heads,
            .batch = size.batch,
            .capacity = size.tokens,
            .latent = kLatent,
            .rope = kRope,
            .scale = 0.0721687836};  // of 192 elements
  }
  void attend(const Attention& a, const AttentionSplits& splits) {
    decode_engine::kernels::attend(
        a, decode_engine::kernels::Splits::in(as<float>(room_), a, splits), stream_.get());
  }
  [[nodiscard]] unsigned long long wrong_of(const Size& size, const AttentionSplits& splits) {
    const auto spoil = [this](const cohort::UniqueMemory& memory, std::int64_t bytes) {
      cuda_check(
          cudaMemsetAsync(memory.get(), 0xff, static_cast<std::size_t>(bytes), stream_.get()),
          "cudaMemsetAsync");
    };
    const Attention a = attention(size, 0);
    spoil(out_, a.batch * a.heads * kLatent * 2);
    spoil(lse_, a.batch * a.heads * 4);
    spoil(room_, room(size, splits) * 4);
    cuda_check(cudaMemsetAsync(wrong_.get(), 0, sizeof(unsigned long long), stream_.get()),
               "cudaMemsetAsync");
    attend(a, splits);
    decode_attention::count_wrong(a, exact_, as<unsigned long long>(wrong_), stream_.get());
    unsigned long long wrong = 0;
    cuda_check(
        cudaMemcpyAsync(&wrong, wrong_.get(), sizeof wrong, cudaMemcpyDeviceToHost, stream_.get()),
        "cudaMemcpyAsync");
    cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    return wrong;
  }

  static cohort::UniqueMemory memory(std::int64_t bytes) {
    return cohort::make_memory(0, static_cast<std::size_t>(bytes));
  }
  cohort::UniqueStream stream_ = cohort::make_stream(0);
  cohort::UniqueEvent begin_ = make_timing_event(0);
  cohort::UniqueEvent end_ = make_timing_event(0);
  cohort::UniqueMemory cache_ = memory(kCacheElements * 2);
  cohort::UniqueMemory queries_ = memory(kMostRows * kRow * 2);
  cohort::UniqueMemory out_ = memory(kMostRows * kLatent * 2);
  cohort::UniqueMemory lse_ = memory(kMostRows * 4);
  cohort::UniqueMemory room_ = memory(kRoomElements * 4);
  cohort::UniqueMemory counts_ = memory(kBatches.back() * 4);
  cohort::UniqueMemory other_ = memory(kOtherBytes);
  cohort::UniqueMemory wrong_ = memory(sizeof(unsigned long long));
  cohort::UniqueMemory exact_out_ = memory(kMostRows * kLatent * 8);
  cohort::UniqueMemory exact_magnitude_ = memory(kMostRows * kLatent * 8);
  cohort::UniqueMemory exact_lse_ = memory(kMostRows * 8);
  decode_attention::Exact exact_ = {.out = as<double>(exact_out_),
                                    .magnitude = as<double>(exact_magnitude_),
                                    .lse = as<double>(exact_lse_)};
  decode_engine::Peak peak_ = decode_engine::peak_of(0);
  std::int64_t multiprocessors_ = decode_engine::attribute_of(0, cudaDevAttrMultiProcessorCount);
};

/// The number of wrong results.
unsigned long long measure(Card& card, const Size& size, bool all, std::FILE* json) {
  std::vector<Timed> ways;
  for (const AttentionSplits& splits : card.divisions(size, all)) {
    ways.push_back({.splits = splits});
  }
  card.check(size, ways);
  for (Timed& way : ways) {
    card.capture(size, way);
    static_cast<void>(card.sample(size, way));  // warms up
  }
  for (std::size_t round = 0; round < kSamples; ++round) {
    for (std::size_t i = 0; i < ways.size(); ++i) {
      Timed& way = ways[(i + round) % ways.size()];
      way.us.push_back(card.sample(size, way));
    }
  }
  const double roofline = size.roofline(card.peak());
  unsigned long long wrong = 0;
  for (Timed& way : ways) {
    std::sort(way.us.begin(), way.us.end());
    const double median = way.us[kSamples / 2];
    fmt::print("{:>5} {:>5} {:>6} {:>6} {:>8} {:>9.2f} {:>9.2f} {:>6.2f} {:>5}\n", size.heads,
               size.batch, size.tokens, way.splits.count, way.splits.together ? "true" : "false",
               median, roofline, median / roofline, way.wrong);
    if (json != nullptr) {
      fmt::print(
          json,
          R"({{"bench": "decode_attention", "heads": {}, "batch": {}, "tokens": {}, )"
          R"("splits": {}, "together": {}, "taken": {}, "us_p50": {:.3f}, "us_min": {:.3f}, )"
          R"("roofline_us": {:.3f}, "times_roofline": {:.3f}, "wrong": {}}})"
          "\n",
          size.heads, size.batch, size.tokens, way.splits.count, way.splits.together,
          &way == ways.data(), median, way.us.front(), roofline, median / roofline, way.wrong);
    }
    wrong += way.wrong;
  }
  return wrong;
}

unsigned long long measure(bool all, std::FILE* json) {
  cudaDeviceProp properties{};
  cuda_check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  if (json != nullptr) {
    fmt::print(json, "{{\"meta\": {{\"gpus\": \"{}\"}}}}\n", properties.name);
  }
  fmt::print("{}\n{:>5} {:>5} {:>6} {:>6} {:>8} {:>9} {:>9} {:>6} {:>5}\n", properties.name,
             "heads", "batch", "tokens", "splits", "together", "us", "roofline", "times", "wrong");
  Card card;
  unsigned long long wrong = 0;
  for (const std::int64_t heads : kHeads) {
    for (const std::int64_t batch : kBatches) {
      for (const std::int64_t tokens : kTokens) {
        wrong += measure(card, {heads, batch, tokens}, all, json);
      }
    }
  }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  cohort::tools::help_if_asked(argc, argv, kHelp);
  std::FILE* json = nullptr;
  bool all = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--sweep") {
      all = true;
    } else if (option != "--json") {
      cohort::tools::refuse(cohort::tools::no_such_option(option, kHelp));
    } else if (++i == argc) {
      cohort::tools::refuse(option + ": expected a value");
    } else if (json = std::fopen(argv[i], "w"); json == nullptr) {
      cohort::tools::refuse(fmt::format("cannot write {}", argv[i]));
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    fmt::print("skipped: no CUDA device\n");
    return 77;
  }
  unsigned long long wrong = 0;
  try {
    wrong = measure(all, json);
  } catch (const std::exception& error) {
    fmt::print(stderr, "decode_attention: {}\n", error.what());
    return 2;
  }
  if (json != nullptr) {
    std::fclose(json);
  }
  fmt::print("{}\n", wrong == 0 ? "PASS" : "FAILED");
  return wrong == 0 ? 0 : 1;
}
