// SPDX-License-Identifier: Apache-2.0
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include <cohort/cuda/cuda_check.hpp>
#include <cohort/cuda/handles.hpp>
#include "command_line/command_line.hpp"
#include "cublas_check.hpp"
#include "timing_event.hpp"

// What the products of the heads take in multi-head latent attention, by cuBLAS on one card:
// queries up to the latent, [B, H, 128] times [H, 512, 128], and outputs down to values, [B, H,
// 512] times [H, 128, 512], in bf16 with sums in fp32. A rank that absorbs behind the gather and
// comes down before the merge has those of all heads, otherwise those of its own. Weights are a
// layer's and cold, as in a model: graphs of 32 products go through 16 layers of them. Medians
// of 25.

namespace {

using cohort::cuda_check;
using cohort::bench::cublas_check;
using cohort::bench::make_timing_event;

constexpr std::string_view kHelp =
    "What the products of 128 heads and of a share of them take on one card, in us.\n\n"
    "  head_products --json FILE\n\n"
    "  --json FILE  write rows as JSON lines\n"
    "  --help       this text\n";

constexpr int kHeads = 128;
constexpr int kLatent = 512;
constexpr int kNope = 128;
constexpr int kLayers = 16;
constexpr int kProducts = 32;
constexpr int kSamples = 25;
constexpr std::array kBatches = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128};
constexpr std::size_t kElement = 2;

/// One product of each head.
struct Shape {
  std::string_view name;
  int in = 0;
  int out = 0;
};
constexpr std::array kShapes = {Shape{"queries", kNope, kLatent}, Shape{"values", kLatent, kNope}};

class Card {
 public:
  Card() {
    cublas_check(cublasCreate(&cublas_), "cublasCreate");
    cublas_check(cublasSetStream(cublas_, stream_.get()), "cublasSetStream");
    // Its own workspace is allocated in stream order, which a graph would have to hold.
    cublas_check(cublasSetWorkspace(cublas_, workspace_.get(), kWorkspace), "cublasSetWorkspace");
    fill();
  }
  Card(const Card&) = delete;
  Card& operator=(const Card&) = delete;
  ~Card() { static_cast<void>(cublasDestroy(cublas_)); }

  /// Microseconds of a product of so many heads.
  [[nodiscard]] double time_of(const Shape& shape, int heads, int batch) {
    cuda_check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal),
               "cudaStreamBeginCapture");
    for (int i = 0; i < kProducts; ++i) {
      multiply(shape, heads, batch, i % kLayers);
    }
    cudaGraph_t captured = nullptr;
    cuda_check(cudaStreamEndCapture(stream_.get(), &captured), "cudaStreamEndCapture");
    const cohort::UniqueGraph graph(captured);
    cudaGraphExec_t instantiated = nullptr;
    cuda_check(cudaGraphInstantiate(&instantiated, captured, 0), "cudaGraphInstantiate");
    const cohort::UniqueGraphExec exec(instantiated);
    std::vector<float> samples;
    for (int i = 0; i < kSamples + 2; ++i) {
      cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
      cuda_check(cudaGraphLaunch(exec.get(), stream_.get()), "cudaGraphLaunch");
      cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
      cuda_check(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
      float ms = 0;
      cuda_check(cudaEventElapsedTime(&ms, begin_.get(), end_.get()), "cudaEventElapsedTime");
      if (i >= 2) {  // warm
        samples.push_back(ms);
      }
    }
    std::nth_element(samples.begin(), samples.begin() + kSamples / 2, samples.end());
    return static_cast<double>(samples[kSamples / 2]) * 1e3 / kProducts;
  }

 private:
  static constexpr std::size_t kWorkspace = std::size_t{32} << 20;
  static constexpr std::size_t kWeights = std::size_t{kHeads} * kLatent * kNope;  // a layer's
  static constexpr std::size_t kRows = std::size_t{kBatches.back()} * kHeads * kLatent;

  static cohort::UniqueMemory memory(std::size_t elements) {
    return cohort::make_memory(0, elements * kElement);
  }

  /// Zeros take less power than numbers do, and the clock follows.
  void fill() {
    std::mt19937 random(1);
    std::vector<std::uint16_t> numbers(std::max(kWeights, kRows));
    for (auto& number : numbers) {  // between 2^-8 and 2^-6, of either sign
      number = static_cast<std::uint16_t>((random() & 0x80ffU) | 0x3b80U);
    }
    const auto put = [&](void* to, std::size_t elements) {
      cuda_check(cudaMemcpy(to, numbers.data(), elements * kElement, cudaMemcpyHostToDevice),
                 "cudaMemcpy");
    };
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      put(static_cast<std::byte*>(weights_.get()) + layer * kWeights * kElement, kWeights);
    }
    put(x_.get(), kRows);
  }

  /// To cuBLAS matrices are stored by columns: x is [in, B], w is [in, out], y is [out, B].
  void multiply(const Shape& shape, int heads, int batch, int layer) {
    const float alpha = 1;
    const float beta = 0;
    const auto* const w = static_cast<const std::byte*>(weights_.get()) +
                          static_cast<std::size_t>(layer) * kWeights * kElement;
    cublas_check(cublasGemmStridedBatchedEx(
                     cublas_, CUBLAS_OP_T, CUBLAS_OP_N, shape.out, batch, shape.in, &alpha, w,
                     CUDA_R_16BF, shape.in, std::int64_t{shape.out} * shape.in, x_.get(),
                     CUDA_R_16BF, heads * shape.in, shape.in, &beta, y_.get(), CUDA_R_16BF,
                     heads * shape.out, shape.out, heads, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                 "cublasGemmStridedBatchedEx");
  }

  cohort::UniqueStream stream_ = cohort::make_stream(0);
  cohort::UniqueEvent begin_ = make_timing_event(0);
  cohort::UniqueEvent end_ = make_timing_event(0);
  cohort::UniqueMemory workspace_ = memory(kWorkspace / kElement);
  cohort::UniqueMemory weights_ = memory(kLayers * kWeights);
  cohort::UniqueMemory x_ = memory(kRows);
  cohort::UniqueMemory y_ = memory(kRows);
  cublasHandle_t cublas_ = nullptr;
};

void measure(std::FILE* json) {
  cudaDeviceProp card{};
  cuda_check(cudaGetDeviceProperties(&card, 0), "cudaGetDeviceProperties");
  if (json != nullptr) {
    fmt::print(json, "{{\"meta\": {{\"gpus\": \"{}\"}}}}\n", card.name);
  }
  fmt::print("{}\n{:<8} {:>6}", card.name, "product", "heads");
  for (const int batch : kBatches) {
    fmt::print("{:>8}", fmt::format("B={}", batch));
  }
  fmt::print("\n");
  Card products;
  for (const Shape& shape : kShapes) {
    for (const int heads : {kHeads, kHeads / 2, kHeads / 4, kHeads / 8}) {
      fmt::print("{:<8} {:>6}", shape.name, heads);
      for (const int batch : kBatches) {
        const double us = products.time_of(shape, heads, batch);
        fmt::print("{:>8.2f}", us);
        if (json != nullptr) {
          fmt::print(json,
                     "{{\"bench\": \"head_products\", \"product\": \"{}\", \"heads\": {}, "
                     "\"batch\": {}, \"us\": {:.3f}}}\n",
                     shape.name, heads, batch, us);
        }
      }
      fmt::print("\n");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  cohort::tools::help_if_asked(argc, argv, kHelp);
  std::FILE* json = nullptr;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    if (option != "--json") {
      cohort::tools::refuse(cohort::tools::no_such_option(option, kHelp));
    }
    if (i + 1 == argc) {
      cohort::tools::refuse(option + ": expected a value");
    }
    json = std::fopen(argv[i + 1], "w");
    if (json == nullptr) {
      cohort::tools::refuse(fmt::format("cannot write {}", argv[i + 1]));
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    fmt::print("skipped: no CUDA device\n");
    return 77;
  }
  try {
    measure(json);
  } catch (const std::exception& error) {
    fmt::print(stderr, "head_products: {}\n", error.what());
    return 1;
  }
  if (json != nullptr) {
    std::fclose(json);
  }
  return 0;
}
