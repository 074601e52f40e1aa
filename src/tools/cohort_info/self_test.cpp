// SPDX-License-Identifier: Apache-2.0
#include "self_test.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <span>
#include <string>

namespace cohort::info {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRepeats = 21;
constexpr std::int64_t kRows = 64;
constexpr std::int64_t kColumns = 256;

/// Small whole numbers, so that every sum over ranks is exact.
float value_at(int rank, std::int64_t flat) {
  return static_cast<float>((rank * 5 + flat * 7) % 11 - 3);
}

/// Tensors of the test, in ordinary memory of the device.
class Bench {
 public:
  Bench(ParallelState& state, Device& device)
      : state_(state), device_(device), group_(state.tp()), n_(group_.size()) {}

  std::vector<Check> run() {
    check(
        "barrier", [&] { group_.barrier(stream()); }, [] { return std::string(); });
    all_gather();
    reduce_scatter();
    all_reduce();
    broadcast();
    all_to_all();
    if (n_ > 1) {
      send_and_receive();
    }
    query_and_merge();
    captured();
    return std::move(checks_);
  }

 private:
  using Expected = std::function<float(std::int64_t)>;

  [[nodiscard]] StreamRef stream() { return device_.stream(); }

  Tensor tensor(const Dims& shape, const Expected& value) {
    Tensor tensor = device_.backend()->allocate(shape, DType::f32, stream());
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = value(static_cast<std::int64_t>(i));
    }
    device_.upload(values.data(), tensor);
    return tensor;
  }
  Tensor mine(const Dims& shape) {
    return tensor(shape, [rank = group_.rank()](std::int64_t i) { return value_at(rank, i); });
  }
  Tensor blank(const Dims& shape) {
    return tensor(shape, [](std::int64_t) { return -99.0F; });
  }

  /// Empty where every element is right, within `bound`.
  std::string compare(const ConstTensorView& got, const Expected& expected, float bound = 0) {
    std::vector<float> values(static_cast<std::size_t>(got.numel()));
    device_.download(got, values.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float right = expected(static_cast<std::int64_t>(i));
      if (!(std::abs(values[i] - right) <= bound)) {
        return fmt::format("element {} is {}, expected {}", i, values[i], right);
      }
    }
    return {};
  }

  /// Runs a call some times, then its check, and adds up what the ranks found. Nothing follows a
  /// call that threw.
  void check(const std::string& name, const std::function<void()>& call,
             const std::function<std::string()>& judge) {
    if (broken_) {
      return;
    }
    Check result{.name = name};
    std::vector<double> times;
    try {
      for (int i = 0; i < kRepeats; ++i) {
        const auto start = Clock::now();
        call();
        group_.synchronize(stream(), group_.control().limit());
        times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
      }
      std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
      result.median_us = times[kRepeats / 2];
      result.error = judge();
    } catch (const std::exception& error) {
      result.error = error.what();
      broken_ = true;
    }
    checks_.push_back(result);
    share(checks_.back());
  }

  /// The slowest rank's time, and the first rank's error.
  void share(Check& check) {
    const std::string mine = fmt::format("{} {}", check.median_us, check.error);
    try {
      const auto all = state_.world().control().all_gather(std::as_bytes(std::span(mine)));
      for (std::size_t r = 0; r < all.size(); ++r) {
        const std::string text(reinterpret_cast<const char*>(all[r].data()), all[r].size());
        const auto space = text.find(' ');
        check.median_us = std::max(check.median_us, std::stod(text));
        if (check.error.empty() && space + 1 < text.size()) {
          check.error = fmt::format("rank {}: {}", r, text.substr(space + 1));
        }
      }
    } catch (const std::exception& error) {
      check.error = check.error.empty() ? error.what() : check.error;
    }
    broken_ = broken_ || !check.error.empty();
  }

  void all_gather() {
    const Tensor x = mine({kRows, kColumns});
    const Tensor out = blank({kRows, kColumns * n_});
    check(
        "all_gather 64 KiB a rank", [&] { group_.all_gather_into(out, x, 1, stream()); },
        [&] {
          return compare(out, [&](std::int64_t i) {
            const std::int64_t row = i / (kColumns * n_);
            const std::int64_t column = i % (kColumns * n_);
            return value_at(static_cast<int>(column / kColumns),
                            row * kColumns + column % kColumns);
          });
        });
  }

  [[nodiscard]] float sum_at(std::int64_t flat) const {
    float sum = 0;
    for (int r = 0; r < n_; ++r) {
      sum += value_at(r, flat);
    }
    return sum;
  }

  void reduce_scatter() {
    const Tensor x = mine({kRows * n_, kColumns});
    const Tensor out = blank({kRows, kColumns});
    check(
        "reduce_scatter 64 KiB a rank", [&] { group_.reduce_scatter_into(out, x, 0, stream()); },
        [&] {
          const std::int64_t first = group_.rank() * kRows * kColumns;
          return compare(out, [&](std::int64_t i) { return sum_at(first + i); });
        });
  }

  void all_reduce() {
    const Tensor x = mine({kRows, kColumns});
    const Tensor out = blank({kRows, kColumns});
    check(
        "all_reduce 64 KiB", [&] { group_.all_reduce_into(out, x, stream()); },
        [&] { return compare(out, [&](std::int64_t i) { return sum_at(i); }); });
  }

  void broadcast() {
    const Tensor x = mine({kRows, kColumns});
    check(
        "broadcast 64 KiB", [&] { group_.broadcast(x, n_ - 1, stream()); },
        [&] { return compare(x, [&](std::int64_t i) { return value_at(n_ - 1, i); }); });
  }

  void all_to_all() {
    const Tensor x = mine({kRows * n_, kColumns});
    const Tensor out = blank({kRows * n_, kColumns});
    check(
        "all_to_all 64 KiB a pair", [&] { group_.all_to_all_into(out, x, stream()); },
        [&] {
          constexpr std::int64_t kPart = kRows * kColumns;
          return compare(out, [&](std::int64_t i) {
            return value_at(static_cast<int>(i / kPart), group_.rank() * kPart + i % kPart);
          });
        });
  }

  void send_and_receive() {
    const Tensor x = mine({kRows, kColumns});
    const Tensor y = blank({kRows, kColumns});
    const int next = (group_.rank() + 1) % n_;
    const int previous = (group_.rank() + n_ - 1) % n_;
    check(
        "send and recv, once around",
        [&] {
          if (group_.rank() == 0) {
            group_.send(x, next, stream());
            group_.recv(y, previous, stream());
          } else {
            group_.recv(y, previous, stream());
            group_.send(x, next, stream());
          }
        },
        [&] { return compare(y, [&](std::int64_t i) { return value_at(previous, i); }); });
  }

  /// Queries of all heads, and partial attentions of equal weight: the mean over the ranks.
  void query_and_merge() {
    auto& dcp = state_.dcp();
    const int n = dcp.size();
    constexpr std::int64_t kBatch = 4;
    constexpr std::int64_t kDim = 64;
    const std::int64_t heads = 4 * n;
    const Tensor nope = mine({kBatch, 4, kDim});
    const Tensor rope = mine({kBatch, 4, 16});
    const Tensor q = blank({kBatch, heads, kDim + 16});
    check(
        "gather_query, batch 4", [&] { dcp.gather_query_into(q, nope, rope, stream()); },
        [&] {
          return compare(q, [&](std::int64_t i) {
            const std::int64_t d = i % (kDim + 16);
            const std::int64_t h = i / (kDim + 16) % heads;
            const std::int64_t b = i / (kDim + 16) / heads;
            const int owner = dcp.ranks()[static_cast<std::size_t>(h / 4)];
            const int rank = group_rank(owner);
            const std::int64_t row = b * 4 + h % 4;
            return d < kDim ? value_at(rank, row * kDim + d) : value_at(rank, row * 16 + d - kDim);
          });
        });
    const Tensor out =
        tensor({kBatch, heads, kDim}, [&](std::int64_t) { return static_cast<float>(dcp.rank()); });
    const Tensor lse = tensor({kBatch, heads}, [](std::int64_t) { return 1.0F; });
    const Tensor merged = blank({kBatch, 4, kDim});
    const float mean = static_cast<float>(n - 1) / 2;
    check(
        "merge_attention, batch 4",
        [&] { dcp.merge_attention_into(merged, out, lse, LseBase::e, stream()); },
        [&] {
          return compare(
              merged, [&](std::int64_t) { return mean; }, 1e-5F * (1 + mean));
        });
  }

  /// The TP rank of a world rank of this rank's TP group.
  [[nodiscard]] int group_rank(int world_rank) const {
    const auto& ranks = group_.ranks();
    return static_cast<int>(std::find(ranks.begin(), ranks.end(), world_rank) - ranks.begin());
  }

  void captured() {
    const Tensor x = mine({kRows, kColumns});
    const Tensor out = blank({kRows, kColumns});
    std::optional<CapturedGraph> graph;
    check(
        "all_reduce in a graph",
        [&] {
          if (!graph) {
            graph.emplace(
                state_.capture(stream(), [&] { group_.all_reduce_into(out, x, stream()); }));
          }
          graph->launch(stream());
        },
        [&] { return compare(out, [&](std::int64_t i) { return sum_at(i); }); });
  }

  ParallelState& state_;
  Device& device_;
  TensorParallelGroup& group_;
  int n_;
  bool broken_ = false;
  std::vector<Check> checks_;
};

}  // namespace

std::vector<Check> self_test(ParallelState& state, Device& device) {
  return Bench(state, device).run();
}

}  // namespace cohort::info
