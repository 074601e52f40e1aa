// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

/// \file
/// Random draws that are the same on every machine: the standard library's distributions are not.

namespace cohort::fuzz {

/// splitmix64 (G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom number generators",
/// OOPSLA 2014): any seed will do, neighbouring ones included.
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed) {}

  std::uint64_t word() noexcept {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }

  /// From `least` to `most`, both included. The bias of the remainder is of no concern here.
  std::int64_t between(std::int64_t least, std::int64_t most) noexcept {
    const auto values = static_cast<std::uint64_t>(most - least) + 1;
    return least + static_cast<std::int64_t>(word() % values);
  }

  /// True once in `n`.
  bool one_in(std::uint64_t n) noexcept { return word() % n == 0; }

  template <class T>
  T pick(std::initializer_list<T> values) noexcept {
    return values.begin()[word() % values.size()];
  }

  /// A generator of its own, so that what one part draws does not move what another does.
  Random split() noexcept { return Random(word()); }

 private:
  std::uint64_t state_;
};

}  // namespace cohort::fuzz
