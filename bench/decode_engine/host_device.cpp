// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "cohort/host/host_backend.hpp"
#include "cohort/vectorised.hpp"
#include "dcp_decode/attention.hpp"
#include "device.hpp"
#include "rotation.hpp"

namespace decode_engine {

namespace {

using Clock = std::chrono::steady_clock;

float wide(BFloat16 x) { return static_cast<float>(x); }

/// A constant number of sums, which compilers vectorise, added up in order.
constexpr std::int64_t kLanes = 16;

/// y[o] = w[o] x for `out` rows of `in` elements.
struct Rows {
  [[gnu::always_inline]] static inline void run(const float* x, const std::uint16_t* w, float* y,
                                                std::int64_t in, std::int64_t out) {
    for (std::int64_t o = 0; o < out; ++o) {
      const std::uint16_t* row = w + o * in;
      float sums[kLanes] = {};
      std::int64_t i = 0;
      for (; i + kLanes <= in; i += kLanes) {
        for (std::int64_t j = 0; j < kLanes; ++j) {
          const auto bits = static_cast<std::uint32_t>(row[i + j]) << 16;
          sums[j] += x[i + j] * __builtin_bit_cast(float, bits);
        }
      }
      float total = 0;
      for (; i < in; ++i) {
        total += x[i] * __builtin_bit_cast(float, static_cast<std::uint32_t>(row[i]) << 16);
      }
      for (const float sum : sums) {
        total += sum;
      }
      y[o] = total;
    }
  }
};

void multiply_now(const Product& p) {
  std::vector<float> x(static_cast<std::size_t>(p.in));
  std::vector<float> y(static_cast<std::size_t>(p.out));
  for (std::int64_t g = 0; g < p.groups; ++g) {
    const auto* w = reinterpret_cast<const std::uint16_t*>(p.w + g * p.out * p.in);
    for (std::int64_t r = 0; r < p.rows; ++r) {
      const BFloat16* from = p.x + g * p.x_group + r * p.x_row;
      std::transform(from, from + p.in, x.begin(), wide);
      cohort::detail::vectorised<Rows, const float*, const std::uint16_t*, float*, std::int64_t,
                                 std::int64_t>(x.data(), w, y.data(), p.in, p.out);
      const std::int64_t place = g * p.y_group + r * p.y_row;
      if (p.y_type == cohort::DType::f32) {
        std::copy(y.begin(), y.end(), static_cast<float*>(p.y) + place);
      } else {
        std::transform(y.begin(), y.end(), static_cast<BFloat16*>(p.y) + place,
                       [](float sum) { return BFloat16(sum); });
      }
    }
  }
}

/// Rounded once for each element.
void add(BFloat16* hidden, const cohort::TensorView& sums) {
  const auto each = [&](const auto* from) {
    for (std::int64_t i = 0; i < sums.numel(); ++i) {
      hidden[i] = BFloat16(wide(hidden[i]) + static_cast<float>(from[i]));
    }
  };
  if (sums.dtype() == cohort::DType::f32) {
    each(sums.data_as<float>());
  } else if (sums.numel() > 0) {
    each(sums.data_as<BFloat16>());
  }
}

float scale_to_one(const BFloat16* row, std::int64_t width) {
  float squares = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    squares += wide(row[i]) * wide(row[i]);
  }
  return 1 / std::sqrt(squares / static_cast<float>(width) + static_cast<float>(kNormEpsilon));
}

void rotate_row(const BFloat16* from, BFloat16* to, std::int64_t rope, const Turn* turns) {
  for (std::int64_t i = 0; i < rope; i += 2) {
    const auto [cos, sin] = turns[i / 2];
    const float a = wide(from[i]);
    const float b = wide(from[i + 1]);
    to[i] = BFloat16(a * cos - b * sin);
    to[i + 1] = BFloat16(a * sin + b * cos);
  }
}

void attend_now(const Attention& a) {
  const std::int64_t row = a.latent + a.rope;
  for (std::int64_t b = 0; b < a.batch; ++b) {
    const auto rows = static_cast<std::size_t>(a.counts[b] * row);
    dcp_decode::local_attention({{a.cache + b * a.capacity * row, rows}, row},
                                {a.q + b * row, a.batch * row}, a.heads, a.latent, a.scale,
                                cohort::LseBase::e, {a.out + b * a.latent, a.batch * a.latent},
                                a.lse + b * a.heads);
  }
}

class HostDevice final : public Device {
 public:
  std::shared_ptr<cohort::Backend> backend() override { return backend_; }
  cohort::StreamRef stream() override { return stream_.ref(); }
  void synchronize() override {}

  void put(void* to, std::span<const std::byte> from) override {
    std::memcpy(to, from.data(), from.size());
  }
  void get(std::span<std::byte> to, const void* from) override {
    std::memcpy(to.data(), from, to.size());
  }
  void fill_with_noise(BFloat16* to, const Noise& noise, const Block& block) override {
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const dcp_decode::Numbers numbers = noise.row(block.first_row + r);
      for (std::int64_t i = 0; i < block.columns; ++i) {
        *to++ = BFloat16(noise.element(numbers, block.first_column + i));
      }
    }
  }

  void embed(const std::int32_t* tokens, const BFloat16* table, BFloat16* hidden,
             std::int64_t batch, std::int64_t width) override {
    stream().submit([=] {
      for (std::int64_t b = 0; b < batch; ++b) {
        std::copy_n(table + tokens[b] * width, width, hidden + b * width);
      }
    });
  }
  void add_and_normalize(BFloat16* hidden, const cohort::TensorView* sums, const BFloat16* gain,
                         BFloat16* y, std::int64_t rows, std::int64_t width) override {
    stream().submit([=, added = sums == nullptr ? cohort::TensorView() : *sums] {
      add(hidden, added);
      for (std::int64_t r = 0; r < rows; ++r) {
        const BFloat16* row = hidden + r * width;
        const float scale = scale_to_one(row, width);
        for (std::int64_t i = 0; i < width; ++i) {
          y[r * width + i] = BFloat16(wide(row[i]) * scale * wide(gain[i]));
        }
      }
    });
  }
  void multiply(const Product& product) override {
    stream().submit([product] { multiply_now(product); });
  }
  void rotate(const Rotation& r) override {
    stream().submit([r] {
      for (std::int64_t b = 0; b < r.batch; ++b) {
        for (std::int64_t h = 0; h < r.heads; ++h) {
          rotate_row(r.from + b * r.from_sequence + h * r.from_head,
                     r.to + b * r.to_sequence + h * r.to_head, r.rope, r.turns + b * r.rope / 2);
        }
      }
    });
  }
  void keep(const CacheRow& c) override {
    stream().submit([c] {
      const std::int64_t width = c.latent + c.rope;
      for (std::int64_t b = 0; b < c.batch; ++b) {
        if (c.slots[b] < 0) {
          continue;
        }
        const BFloat16* from = c.kv + b * width;
        BFloat16* to = c.cache + (b * c.capacity + c.slots[b]) * width;
        const float scale = scale_to_one(from, c.latent);
        for (std::int64_t i = 0; i < c.latent; ++i) {
          to[i] = BFloat16(wide(from[i]) * scale * wide(c.gain[i]));
        }
        rotate_row(from + c.latent, to + c.latent, c.rope, c.turns + b * c.rope / 2);
      }
    });
  }
  cohort::Tensor attention_room(const Attention&) override { return {}; }
  void attend(const Attention& attention) override {
    stream().submit([attention] { attend_now(attention); });
  }
  void gate(const BFloat16* x, BFloat16* y, std::int64_t rows, std::int64_t width) override {
    stream().submit([=] {
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t i = 0; i < width; ++i) {
          const float a = wide(x[r * 2 * width + i]);
          y[r * width + i] = BFloat16(a / (1 + std::exp(-a)) * wide(x[(r * 2 + 1) * width + i]));
        }
      }
    });
  }
  void choose(const float* logits, std::int64_t stride, std::int32_t* tokens, std::int64_t rows,
              std::int64_t vocabulary) override {
    stream().submit([=] {
      for (std::int64_t r = 0; r < rows; ++r) {
        const float* row = logits + r * stride;
        tokens[r] = static_cast<std::int32_t>(std::max_element(row, row + vocabulary) - row);
      }
    });
  }
  void lengthen(std::int32_t* lengths, Turn* turns, std::int64_t batch,
                std::int64_t rope) override {
    stream().submit([=] {
      for (std::int64_t i = 0; i < batch * rope / 2; ++i) {
        const std::int64_t pair = i % (rope / 2);
        const double angle = rotation_angle(pair, rope, lengths[i / (rope / 2)]);
        turns[i] = {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
      }
      std::for_each_n(lengths, batch, [](std::int32_t& l) { ++l; });
    });
  }

  void mark(std::size_t place) override {
    stream().submit([this, place] {
      marks_.resize(std::max(marks_.size(), place + 1));
      marks_[place] = Clock::now();
    });
  }
  bool marks_take_time() const override { return false; }
  std::vector<double> between_marks(std::size_t places) override {
    std::vector<double> seconds;
    for (std::size_t i = 0; i + 1 < places; ++i) {
      seconds.push_back(std::chrono::duration<double>(marks_.at(i + 1) - marks_.at(i)).count());
    }
    return seconds;
  }

  void describe(cohort::bench::Meta&, cohort::ControlPlane&) override {}

 private:
  std::shared_ptr<cohort::Backend> backend_ = cohort::host_backend();
  cohort::HostStream stream_;
  std::vector<Clock::time_point> marks_;
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace decode_engine
