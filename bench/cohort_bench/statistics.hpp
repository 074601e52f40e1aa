// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

/// \file
/// From samples to a row's numbers. Pure; README.md derives the formulas.

namespace cohort::bench {

/// The value below which a share `p` in [0, 1] of the samples lies, interpolated linearly between
/// neighbours. 0 without samples. Samples need not be sorted.
[[nodiscard]] inline double percentile(std::vector<double> samples, double p) {
  if (samples.empty()) {
    return 0;
  }
  std::sort(samples.begin(), samples.end());
  const double place = std::clamp(p, 0.0, 1.0) * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, samples.size() - 1);
  const double weight = place - static_cast<double>(below);
  return samples[below] + weight * (samples[above] - samples[below]);
}

/// The mean of the faster half: what disturbs fewer than half of the samples does not show, and it
/// is finer than the clock's ticks, unlike a median. 0 without samples.
[[nodiscard]] inline double mean_of_faster(std::vector<double> samples) {
  if (samples.empty()) {
    return 0;
  }
  std::sort(samples.begin(), samples.end());
  const auto half = static_cast<std::ptrdiff_t>((samples.size() + 1) / 2);
  return std::accumulate(samples.begin(), samples.begin() + half, 0.0) / static_cast<double>(half);
}

struct Summary {
  double p50 = 0;
  double p95 = 0;
  double min = 0;
};

[[nodiscard]] inline Summary summarize(const std::vector<double>& samples) {
  return {percentile(samples, 0.5), percentile(samples, 0.95), percentile(samples, 0)};
}

/// A call is over when its last rank is: the maximum over ranks, iteration by iteration.
/// `by_rank` holds each rank's samples; what the shortest list lacks is left out.
[[nodiscard]] inline std::vector<double> max_over_ranks(
    std::span<const std::vector<double>> by_rank) {
  if (by_rank.empty()) {
    return {};
  }
  std::size_t count = by_rank.front().size();
  for (const auto& samples : by_rank) {
    count = std::min(count, samples.size());
  }
  std::vector<double> slowest(by_rank.front().begin(),
                              by_rank.front().begin() + static_cast<std::ptrdiff_t>(count));
  for (const auto& samples : by_rank) {
    for (std::size_t i = 0; i < count; ++i) {
      slowest[i] = std::max(slowest[i], samples[i]);
    }
  }
  return slowest;
}

/// Calls that one sample batches, so that it lasts about `sample_us` and the clock's own cost does
/// not show. Between 1 and `most`.
[[nodiscard]] inline std::int64_t calls_per_sample(double call_us, double sample_us,
                                                   std::int64_t most) {
  if (call_us <= 0) {
    return std::max<std::int64_t>(1, most);
  }
  const double wanted = std::ceil(sample_us / call_us);
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(std::min(wanted, 1e9)), 1,
                                  std::max<std::int64_t>(1, most));
}

/// What has to cross a rank's link of a logical payload, as a share of that payload.
/// All-gather: every rank receives the shares of the n-1 others of the n that make up the payload.
/// Reduce-scatter, query gather and merge: the same count.
[[nodiscard]] constexpr double gather_bus_factor(int ranks) noexcept {
  return ranks < 1 ? 0 : static_cast<double>(ranks - 1) / ranks;
}
/// All-reduce: a reduce-scatter and an all-gather.
[[nodiscard]] constexpr double all_reduce_bus_factor(int ranks) noexcept {
  return 2 * gather_bus_factor(ranks);
}

/// GB/s (10^9 bytes) of a payload in a time.
[[nodiscard]] constexpr double bandwidth(std::int64_t bytes, double us) noexcept {
  return us > 0 ? static_cast<double>(bytes) / us * 1e-3 : 0;
}

}  // namespace cohort::bench
