// SPDX-License-Identifier: Apache-2.0
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "../cohort_bench/cuda_facts.hpp"
#include "../cublas_check.hpp"
#include "../timing_event.hpp"
#include "attention_splits.hpp"
#include "cohort/cuda.hpp"
#include "cohort/log.hpp"
#include "cuda_kernels.hpp"
#include "cuda_peak.hpp"
#include "device.hpp"

namespace decode_engine {

namespace {

using cohort::cuda_check;
using cohort::DType;
using cohort::bench::cublas_check;

cudaDataType_t type_of(DType type) { return type == DType::f32 ? CUDA_R_32F : CUDA_R_16BF; }

struct DestroyCublas {
  void operator()(cublasHandle_t handle) const noexcept {
    if (const cublasStatus_t code = cublasDestroy(handle); code != CUBLAS_STATUS_SUCCESS) {
      cohort::log(cohort::LogLevel::error, cublasGetStatusString(code));
    }
  }
};

class CudaDevice final : public Device {
 public:
  CudaDevice() : device_(backend_->device().index), stream_(cohort::make_stream(device_)) {
    const cohort::DeviceGuard guard(device_);
    cublasHandle_t handle = nullptr;
    cublas_check(cublasCreate(&handle), "cublasCreate");
    cublas_.reset(handle);
    cublas_check(cublasSetStream(handle, stream_.get()), "cublasSetStream");
    // Its own workspace is allocated in stream order, which a graph would have to hold.
    constexpr std::int64_t kWorkspaceBytes = std::int64_t{32} << 20;
    workspace_ = allocate({kWorkspaceBytes}, DType::u8);
    cublas_check(cublasSetWorkspace(handle, workspace_.data(), kWorkspaceBytes),
                 "cublasSetWorkspace");
  }

  std::shared_ptr<cohort::Backend> backend() override { return backend_; }
  cohort::StreamRef stream() override { return backend_->stream(stream_.get()); }
  void synchronize() override { stream().synchronize(cohort::kDefaultTimeLimit); }

  void put(void* to, std::span<const std::byte> from) override {
    copy(to, from.data(), from.size());
  }
  void get(std::span<std::byte> to, const void* from) override { copy(to.data(), from, to.size()); }
  void fill_with_noise(BFloat16* to, const Noise& noise, const Block& block) override {
    const cohort::DeviceGuard guard(device_);
    kernels::fill_with_noise(to, noise, block, stream_.get());
    synchronize();
  }

  void embed(const std::int32_t* tokens, const BFloat16* table, BFloat16* hidden,
             std::int64_t batch, std::int64_t width) override {
    const cohort::DeviceGuard guard(device_);
    kernels::embed(tokens, table, hidden, batch, width, stream_.get());
  }
  void add_and_normalize(BFloat16* hidden, const cohort::TensorView* sums, const BFloat16* gain,
                         BFloat16* y, std::int64_t rows, std::int64_t width) override {
    const cohort::DeviceGuard guard(device_);
    kernels::add_and_normalize(hidden, sums == nullptr ? nullptr : sums->data_as<BFloat16>(), gain,
                               y, rows, width, stream_.get());
  }
  void normalize_and_keep(BFloat16* x, const BFloat16* gain, BFloat16* y, std::int64_t width,
                          const CacheRow& row) override {
    const cohort::DeviceGuard guard(device_);
    kernels::normalize_and_keep(x, gain, y, width, row, stream_.get());
  }
  void rotate(const Rotation& rotation) override {
    const cohort::DeviceGuard guard(device_);
    kernels::rotate(rotation, stream_.get());
  }
  void keep(const CacheRow& row) override {
    const cohort::DeviceGuard guard(device_);
    kernels::keep(row, stream_.get());
  }
  void gate(const BFloat16* x, BFloat16* y, std::int64_t rows, std::int64_t width) override {
    const cohort::DeviceGuard guard(device_);
    kernels::gate(x, y, rows, width, stream_.get());
  }
  void choose(const float* logits, std::int64_t stride, std::int32_t* tokens, std::int64_t rows,
              std::int64_t vocabulary) override {
    const cohort::DeviceGuard guard(device_);
    kernels::choose(logits, stride, tokens, rows, vocabulary, stream_.get());
  }
  void lengthen(std::int32_t* lengths, Turn* turns, std::int64_t batch,
                std::int64_t rope) override {
    const cohort::DeviceGuard guard(device_);
    kernels::lengthen(lengths, turns, batch, rope, stream_.get());
  }

  /// To cuBLAS matrices are stored by columns: x is [in, rows], w is [in, out], y is [out, rows].
  void multiply(const Product& p) override {
    const cohort::DeviceGuard guard(device_);
    const auto size = [](std::int64_t extent) { return static_cast<int>(extent); };
    const float alpha = 1;
    const float beta = 0;
    cublas_check(cublasGemmStridedBatchedEx(
                     cublas_.get(), CUBLAS_OP_T, CUBLAS_OP_N, size(p.out), size(p.rows), size(p.in),
                     &alpha, p.w, CUDA_R_16BF, size(p.in), p.out * p.in, p.x, CUDA_R_16BF,
                     size(p.x_row), p.x_group, &beta, p.y, type_of(p.y_type), size(p.y_row),
                     p.y_group, size(p.groups), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                 "cublasGemmStridedBatchedEx");
  }

  /// Sums of all parts, then their LSEs.
  cohort::Tensor attention_room(const Attention& a) override {
    if (attribute_of(device_, cudaDevAttrComputeCapabilityMajor) != 9) {
      throw cohort::ConfigError("attention on cards is there for compute capability 9.0 alone");
    }
    const cohort::DeviceGuard guard(device_);
    kernels::prepare_attention(a.latent, a.rope);
    const std::int64_t parts = splits_of(a).parts();
    return parts > 1 ? allocate({parts * a.batch * a.heads * (a.latent + 1)}, DType::f32)
                     : cohort::Tensor();
  }
  void attend(const Attention& a) override {
    const cohort::DeviceGuard guard(device_);
    kernels::attend(a, kernels::Splits::in(static_cast<float*>(a.room), a, splits_of(a)),
                    stream_.get());
  }

  void mark(std::size_t place) override {
    const cohort::DeviceGuard guard(device_);
    while (marks_.size() <= place) {
      marks_.push_back(cohort::bench::make_timing_event(device_));
    }
    const bool captured = stream().capture_id() != 0;
    cuda_check(
        cudaEventRecordWithFlags(marks_[place].get(), stream_.get(),
                                 captured ? cudaEventRecordExternal : cudaEventRecordDefault),
        "cudaEventRecordWithFlags");
  }
  bool marks_take_time() const override { return true; }
  std::vector<double> between_marks(std::size_t places) override {
    std::vector<double> seconds;
    for (std::size_t i = 0; i + 1 < places; ++i) {
      float ms = 0;
      cuda_check(cudaEventElapsedTime(&ms, marks_.at(i).get(), marks_.at(i + 1).get()),
                 "cudaEventElapsedTime");
      seconds.push_back(static_cast<double>(ms) * 1e-3);
    }
    return seconds;
  }

  Peak peak() const override { return peak_of(device_); }

  void describe(cohort::bench::Meta& meta, cohort::ControlPlane& world) override {
    cohort::bench::describe_cuda(meta, world, device_);
  }

 private:
  /// Sizes are those of the cache, so that a graph serves every length that fits it.
  [[nodiscard]] AttentionSplits splits_of(const Attention& a) const {
    return split_attention(a.heads, a.batch, a.capacity, multiprocessors_);
  }
  [[nodiscard]] cohort::Tensor allocate(const cohort::Dims& shape, DType type) {
    return backend_->allocate(shape, type, stream());
  }
  void copy(void* to, const void* from, std::size_t bytes) {
    const cohort::DeviceGuard guard(device_);
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_.get()),
               "cudaMemcpyAsync");
    synchronize();
  }

  std::shared_ptr<cohort::CudaBackend> backend_ = cohort::cuda_backend();
  int device_;
  cohort::UniqueStream stream_;
  int multiprocessors_ = attribute_of(device_, cudaDevAttrMultiProcessorCount);
  cohort::Tensor workspace_;
  std::unique_ptr<cublasContext, DestroyCublas> cublas_;
  std::vector<cohort::UniqueEvent> marks_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device() { return std::make_unique<CudaDevice>(); }

}  // namespace decode_engine
