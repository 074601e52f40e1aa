// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/dtype.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"
#include "noise.hpp"
#include "operations.hpp"
#include "peak.hpp"

/// \file
/// What a decode needs of a device besides communication: all in bf16 with sums in fp32, enqueued
/// on one stream. Matrices have a row for each output, [out, in].

namespace cohort::bench {
class Meta;
}

namespace decode_engine {

using cohort::BFloat16;

/// What a step's time goes into.
enum class Kind : std::uint8_t { attention, products, communication, rest };
inline constexpr std::size_t kKinds = 4;

class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  [[nodiscard]] virtual std::shared_ptr<cohort::Backend> backend() = 0;
  [[nodiscard]] virtual cohort::StreamRef stream() = 0;
  virtual void synchronize() = 0;

  // The stream is idle for these three.
  virtual void put(void* to, std::span<const std::byte> from) = 0;
  virtual void get(std::span<std::byte> to, const void* from) = 0;
  virtual void fill_with_noise(BFloat16* to, const Noise& noise, const Block& block) = 0;

  /// hidden[b] = table[tokens[b]].
  virtual void embed(const std::int32_t* tokens, const BFloat16* table, BFloat16* hidden,
                     std::int64_t batch, std::int64_t width) = 0;
  /// hidden += sums [rows, width] where there are any, rounded; then y = hidden, normalized to a
  /// root mean square of 1, times the gain.
  virtual void add_and_normalize(BFloat16* hidden, const cohort::TensorView* sums,
                                 const BFloat16* gain, BFloat16* y, std::int64_t rows,
                                 std::int64_t width) = 0;
  /// `add_and_normalize` without sums of `row.batch` rows, and `keep`, at once where it can.
  virtual void normalize_and_keep(BFloat16* x, const BFloat16* gain, BFloat16* y,
                                  std::int64_t width, const CacheRow& row) {
    add_and_normalize(x, nullptr, gain, y, row.batch, width);
    keep(row);
  }
  virtual void multiply(const Product& product) = 0;
  virtual void rotate(const Rotation& rotation) = 0;
  virtual void keep(const CacheRow& row) = 0;
  /// What attention of these sizes needs besides its arguments, for `Attention::room`; empty where
  /// it needs nothing. Before it is captured. Local.
  [[nodiscard]] virtual cohort::Tensor attention_room(const Attention& attention) = 0;
  /// Counts and rows of the cache are not of the operation in front.
  virtual void attend(const Attention& attention) = 0;
  /// y[r][i] = silu(x[r][i]) x[r][width + i].
  virtual void gate(const BFloat16* x, BFloat16* y, std::int64_t rows, std::int64_t width) = 0;
  /// The first of the largest logits of each row.
  virtual void choose(const float* logits, std::int64_t stride, std::int32_t* tokens,
                      std::int64_t rows, std::int64_t vocabulary) = 0;
  /// One more token of every sequence; turns [batch, rope / 2] are those of its position.
  virtual void lengthen(std::int32_t* lengths, Turn* turns, std::int64_t batch,
                        std::int64_t rope) = 0;

  /// Notes when the stream gets here, in every launch of a graph as well.
  virtual void mark(std::size_t place) = 0;
  /// Whether a mark keeps the stream from going on at once.
  [[nodiscard]] virtual bool marks_take_time() const = 0;
  /// Seconds from each of the first `places` marks to the next.
  [[nodiscard]] virtual std::vector<double> between_marks(std::size_t places) = 0;

  /// What the hardware could reach at best; zeros where nobody knows.
  [[nodiscard]] virtual Peak peak() const { return {}; }
  /// Collective. Hardware, driver and libraries.
  virtual void describe(cohort::bench::Meta& meta, cohort::ControlPlane& world) = 0;
};

[[nodiscard]] std::unique_ptr<Device> make_host_device();
/// Throws `cohort::ConfigError` where the program was built without CUDA.
[[nodiscard]] std::unique_ptr<Device> make_cuda_device();

}  // namespace decode_engine
