// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cohort/cuda/cuda_stream.hpp"
#include "cohort/cuda/handles.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/tensor.hpp"

/// \file
/// Ordinary device memory in stream order, from a pool of the backend's own.

namespace cohort {

/// The pool of one device. It keeps what is freed, so that after the first calls an allocation
/// costs no driver call. Tensors keep it alive.
class CudaMemory : public std::enable_shared_from_this<CudaMemory> {
 public:
  /// Throws `TransportError`.
  explicit CudaMemory(int device) : device_(device), cleanup_(make_stream(device)) {
    const DeviceGuard guard(device_);
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device_;
    cudaMemPool_t pool = nullptr;
    cuda_check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
    pool_ = UniqueMemPool(pool);
    std::uint64_t keep = std::numeric_limits<std::uint64_t>::max();
    cuda_check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep),
               "cudaMemPoolSetAttribute");
  }

  /// A tensor that is usable in the order of `stream`, which is valid, and freed in it. Within a
  /// capture of the stream the memory belongs to the captured graph as well and is not reused
  /// inside it. Throws `TransportError`.
  [[nodiscard]] Tensor allocate(const Dims& shape, DType dtype, StreamRef stream) {
    const std::size_t bytes = bytes_of(shape, dtype);
    const Device device{DeviceKind::cuda, device_};
    if (bytes == 0) {
      return Tensor(TensorView(nullptr, dtype, shape, device), nullptr, 0);
    }
    const DeviceGuard guard(device_);
    const bool capturing = stream.capture_id() != 0;
    const RelaxedCapture relaxed;  // another stream's capture would forbid it as well
    const auto block = std::make_shared<Block>(shared_from_this());
    if (capturing) {
      block->allocate(bytes, cleanup_.get());
      cuda_check(cudaStreamSynchronize(cleanup_.get()), "cudaStreamSynchronize");
      stream.retain_in_capture(block);
    } else {
      block->allocate(bytes, static_cast<cudaStream_t>(stream.native()));
    }
    return Tensor(TensorView(block->data(), dtype, shape, device),
                  std::make_shared<Owner>(block, stream), 0);
  }

 private:
  /// One allocation. Freed in stream order by `free`, or at the end of the last that holds it.
  class Block {
   public:
    explicit Block(std::shared_ptr<CudaMemory> memory) : memory_(std::move(memory)) {}
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() {
      if (data_ == nullptr) {
        return;
      }
      // Whoever let go last is no longer using it: a graph that is destroyed has finished.
      try {
        const DeviceGuard guard(memory_->device_);
        const RelaxedCapture relaxed;
        cuda_report(cudaFreeAsync(data_, memory_->cleanup_.get()), "cudaFreeAsync");
      } catch (const std::exception& error) {
        log(LogLevel::error, error.what());
      }
    }

    void allocate(std::size_t bytes, cudaStream_t stream) {
      cuda_check(cudaMallocFromPoolAsync(&data_, bytes, memory_->pool_.get(), stream),
                 "cudaMallocFromPoolAsync");
    }
    void free(cudaStream_t stream) {
      cuda_check(cudaFreeAsync(std::exchange(data_, nullptr), stream), "cudaFreeAsync");
    }
    [[nodiscard]] void* data() const noexcept { return data_; }
    [[nodiscard]] int device() const noexcept { return memory_->device_; }

   private:
    std::shared_ptr<CudaMemory> memory_;
    void* data_ = nullptr;
  };

  class Owner final : public MemoryOwner {
   public:
    Owner(std::shared_ptr<Block> block, StreamRef stream)
        : block_(std::move(block)), stream_(stream), in_capture_(stream.capture_id() != 0) {}

    void release(std::uint64_t /*block*/) noexcept override {
      try {
        release_in_order();
      } catch (const std::exception& error) {
        log(LogLevel::error, error.what());
      }
      block_.reset();
    }

    void record_stream(std::uint64_t /*block*/, StreamRef stream) override {
      if (!(stream == stream_)) {
        recorded_.push_back(stream);
      }
    }

   private:
    void release_in_order() {
      if (in_capture_) {
        return;  // the graph holds the memory and frees it with itself
      }
      const DeviceGuard guard(block_->device());
      const RelaxedCapture relaxed;
      if (stream_.capture_id() != 0) {
        // What was captured so far may use the memory at every replay.
        stream_.retain_in_capture(block_);
        return;
      }
      for (const StreamRef& other : recorded_) {
        if (other.capture_id() != 0) {
          other.retain_in_capture(block_);
          return;
        }
        stream_.wait_for(other);
      }
      block_->free(static_cast<cudaStream_t>(stream_.native()));
    }

    std::shared_ptr<Block> block_;
    StreamRef stream_;
    bool in_capture_;
    std::vector<StreamRef> recorded_;
  };

  int device_;
  UniqueMemPool pool_;
  UniqueStream cleanup_;
};

}  // namespace cohort
