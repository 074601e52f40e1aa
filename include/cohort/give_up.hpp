// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/messenger.hpp"

/// \file
/// Why a rank left a call, as a message that the others of its group read.

namespace cohort::detail {

/// Why a rank gave up, as it tells the others.
struct GiveUp {
  enum class Kind : std::int32_t { timeout, symmetry, transport };

  Kind kind = Kind::symmetry;
  std::int32_t native_code = 0;
  std::int32_t finder = -1;     ///< In the group: who found it.
  std::vector<int> ranks = {};  ///< In the group: who is missing or differs.
  std::string text = {};

  /// Because of an error of its own: what another rank said is passed on as it is.
  /// @param self  The rank that gives up, to be blamed where the error blames nobody.
  [[nodiscard]] static GiveUp because(const std::exception_ptr& error, int self) {
    const auto say = [&](const std::exception& what) { return by(self, what.what()); };
    try {  // told apart by handlers, which sources without run-time type information have as well
      std::rethrow_exception(error);
    } catch (const TimeoutError& late) {
      GiveUp why = say(late);
      why.kind = Kind::timeout;
      why.ranks = late.missing();
      return why;
    } catch (const SymmetryError& unlike) {
      GiveUp why = say(unlike);
      why.ranks = unlike.ranks();
      return why;
    } catch (const TransportError& broken) {
      GiveUp why = say(broken);
      why.kind = Kind::transport;
      why.native_code = static_cast<std::int32_t>(broken.site().native_code);
      return why;
    } catch (const std::exception& other) {
      return say(other);
    }
  }

  [[nodiscard]] static GiveUp by(int self, std::string_view why) {
    return {.finder = self, .ranks = {self}, .text = fmt::format("rank {} gave up: {}", self, why)};
  }

  [[nodiscard]] Bytes serialize() const {
    constexpr std::size_t kLongest = 1500;  // within what messengers send without help
    const std::size_t length = std::min(text.size(), kLongest);
    std::vector<std::int32_t> words{static_cast<std::int32_t>(kind), native_code, finder,
                                    static_cast<std::int32_t>(ranks.size())};
    words.insert(words.end(), ranks.begin(), ranks.end());
    Bytes out(words.size() * sizeof(std::int32_t) + length);
    std::memcpy(out.data(), words.data(), words.size() * sizeof(std::int32_t));
    std::copy_n(reinterpret_cast<const std::byte*>(text.data()), length,
                out.data() + words.size() * sizeof(std::int32_t));
    return out;
  }

  [[nodiscard]] static GiveUp deserialize(std::span<const std::byte> in) {
    std::array<std::int32_t, 4> head{};
    GiveUp why;
    if (in.size() < sizeof(head)) {
      return why;
    }
    std::memcpy(head.data(), in.data(), sizeof(head));
    in = in.subspan(sizeof(head));
    const auto count =
        std::min(static_cast<std::size_t>(std::max(0, head[3])), in.size() / sizeof(std::int32_t));
    why.kind = static_cast<Kind>(head[0]);
    why.native_code = head[1];
    why.finder = head[2];
    why.ranks.resize(count);
    if (count > 0) {
      std::memcpy(why.ranks.data(), in.data(), count * sizeof(std::int32_t));
    }
    in = in.subspan(count * sizeof(std::int32_t));
    why.text.assign(reinterpret_cast<const char*>(in.data()), in.size());
    return why;
  }

  /// Throws what the rank that found it threw, with its words.
  [[noreturn]] void raise(std::string_view call, const std::string& group) const {
    switch (kind) {
      case Kind::timeout:
        throw TimeoutError(text, ranks);
      case Kind::transport:
        throw TransportError(
            {.call = std::string(call), .native_code = native_code, .rank = finder, .group = group},
            text);
      case Kind::symmetry:
        break;
    }
    throw SymmetryError(text, ranks);
  }
};

}  // namespace cohort::detail
