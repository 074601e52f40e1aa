// SPDX-License-Identifier: Apache-2.0
#include "accuracy.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace decode_engine {

namespace {

/// -log of the softmax's share of a token.
double loss_of(std::span<const float> logits, std::int32_t token) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) {
    sum += std::exp(static_cast<double>(logit) - max);
  }
  return max + std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(token)]);
}

/// The largest distance; infinite where something is not a number.
template <class T>
double distance(std::span<const float> logits, std::span<const T> others) {
  double largest = 0;
  for (std::size_t i = 0; i < others.size(); ++i) {
    const double one = std::abs(static_cast<double>(logits[i]) - static_cast<double>(others[i]));
    largest = std::isnan(one) ? std::numeric_limits<double>::infinity() : std::max(largest, one);
  }
  return largest;
}

}  // namespace

double logit_bound(const Model& model) {
  constexpr double kUnit = 0x1p-8;
  const double roundings = 16.0 * static_cast<double>(model.sizes().layers) + 2;
  return 6 * kUnit * std::sqrt(roundings / 3) * model.largest_head_norm();
}

double loss_bound(std::int64_t tokens) {
  constexpr double kOfMany = 1e-3;
  constexpr double kMany = 16 * 256;
  return kOfMany *
         std::sqrt(std::max(1.0, kMany / static_cast<double>(std::max<std::int64_t>(tokens, 1))));
}

double margin_of(std::span<const float> logits) {
  float first = -std::numeric_limits<float>::infinity();
  float second = first;
  for (const float logit : logits) {
    second = std::max(second, std::min(first, logit));
    first = std::max(first, logit);
  }
  return static_cast<double>(first) - static_cast<double>(second);
}

std::uint64_t hash(std::uint64_t so_far, std::span<const std::byte> bytes) noexcept {
  for (const std::byte byte : bytes) {
    so_far = (so_far ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3ULL;
  }
  return so_far;
}

Judge::Judge()
    : found_{.least_margin = std::numeric_limits<double>::infinity(), .bits = kEmptyHash} {}

void Judge::add(const Decoded& t) {
  const double margin = margin_of(t.expected);
  ++found_.tokens;
  found_.right += t.chosen == t.next ? 1 : 0;
  found_.exact += t.exact.empty() ? 0 : 1;
  found_.least_margin = std::min(found_.least_margin, margin);
  found_.largest_difference = std::max(found_.largest_difference, distance(t.logits, t.expected));
  found_.largest_error = std::max(found_.largest_error, distance(t.logits, t.exact));
  found_.loss += loss_of(t.logits, t.next);
  found_.expected_loss += loss_of(t.expected, t.next);
  if (t.chosen != t.expected_choice) {
    found_.exceptions.push_back({t.prompt, t.position, t.chosen, t.expected_choice, margin});
  }
}

Findings Judge::findings() const {
  Findings found = found_;
  const auto tokens = static_cast<double>(std::max<std::int64_t>(1, found.tokens));
  found.loss /= tokens;
  found.expected_loss /= tokens;
  return found;
}

std::vector<std::string> faults(const Findings& f, double logit_bound, bool must_be_right,
                                bool must_be_exact) {
  std::vector<std::string> found;
  const auto judge = [&](bool holds, std::string text) {
    if (!holds) {
      found.push_back(std::move(text));
    }
  };
  for (const Exception& e : f.exceptions) {
    judge(e.margin <= margin_bound(logit_bound),
          fmt::format("prompt {}, position {}: chose {} instead of {}, which is ahead by {:.4f}",
                      e.prompt, e.position, e.chosen, e.expected, e.margin));
  }
  judge(f.tokens > 0 && (!must_be_exact || f.exact > 0), "nothing was judged");
  judge(f.largest_difference <= logit_bound,
        fmt::format("a logit is {:.4f} from one rank's", f.largest_difference));
  judge(f.largest_error <= logit_bound,
        fmt::format("a logit is {:.4f} from fp64's", f.largest_error));
  judge(std::abs(f.loss - f.expected_loss) <= loss_bound(f.tokens),
        fmt::format("a mean loss of {:.6f} instead of {:.6f}", f.loss, f.expected_loss));
  judge(f.same_on_all_ranks, "ranks have other bits than their peers");
  judge(!must_be_right || f.right == f.tokens,
        fmt::format("{} of {} tokens are right", f.right, f.tokens));
  return found;
}

}  // namespace decode_engine
