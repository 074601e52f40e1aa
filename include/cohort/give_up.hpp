// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/joined.hpp"
#include "cohort/messenger.hpp"

/// \file
/// Why a rank left a call, as a message that the others of its group read.

namespace cohort::detail {

/// Whom a rank blames whose wait for `missing` is over. A rank that waits itself is at fault in
/// nothing: those for whom it waits are, in its stead, however long the chain. Nobody where each of
/// them waits, in a circle.
/// @param self     Who asks; it waits too.
/// @param waits_for  rank -> for whom it waits, as it has said; nothing where it has not.
template <class WaitsFor>
[[nodiscard]] std::vector<int> at_fault(int self, const std::vector<int>& missing,
                                        const WaitsFor& waits_for) {
  std::vector<int> asked = missing;  // in the order in which they are found
  std::vector<int> blamed;
  for (std::size_t i = 0; i < asked.size(); ++i) {
    const std::optional<std::vector<int>> others = waits_for(asked[i]);
    if (!others) {
      blamed.push_back(asked[i]);
      continue;
    }
    for (const int r : *others) {
      if (r != self && std::find(asked.begin(), asked.end(), r) == asked.end()) {
        asked.push_back(r);
      }
    }
  }
  std::sort(blamed.begin(), blamed.end());
  return blamed;
}

/// Whose fault it is that a rank's wait in a group is over.
struct Fault {
  std::vector<int> ranks;           ///< Of the group, in ascending order.
  std::vector<int> elsewhere = {};  ///< Of no rank of the group: those for whom its ranks wait.
  std::string home = {};            ///< The group whose numbers these are.
  bool in_world = false;            ///< Whether that is the one of which this group is a part.
  /// In which calls all of them wait for each other, where these differ; then `ranks` are those
  /// that are not with most, and the others are in these words alone.
  std::string difference = {};
};

/// Of a wait that is over because of ranks of other groups, at least.
class LateElsewhere : public TimeoutError {
 public:
  /// @param elsewhere  Those, in the numbers of the group of which this one is a part.
  LateElsewhere(const std::string& what, std::vector<int> missing, std::vector<int> elsewhere)
      : TimeoutError(what, std::move(missing)), elsewhere_(std::move(elsewhere)) {}

  [[nodiscard]] const std::vector<int>& elsewhere() const noexcept { return elsewhere_; }

 private:
  std::vector<int> elsewhere_;
};

/// What a rank throws whose wait for `missing` is over: `TimeoutError`, or `SymmetryError` where
/// the calls differ.
/// @param place   Where they were to come to.
/// @param within  How long that had.
[[nodiscard]] inline std::exception_ptr late_error(std::string_view place, std::string_view within,
                                                   const std::vector<int>& missing,
                                                   const Fault& fault) {
  if (!fault.difference.empty()) {
    return std::make_exception_ptr(
        SymmetryError(fmt::format("{}: ranks waited for each other for {} in calls that differ: {}",
                                  place, within, fault.difference),
                      fault.ranks));
  }
  std::string who = fault.ranks.empty() ? "" : "rank " + joined(fault.ranks, ", ");
  if (!fault.elsewhere.empty()) {
    who += fmt::format("{}rank {} of group {}", who.empty() ? "" : " and ",
                       joined(fault.elsewhere, ", "), fault.home);
  }
  std::vector<int> waiting;
  std::copy_if(missing.begin(), missing.end(), std::back_inserter(waiting),
               [&](int r) { return std::count(fault.ranks.begin(), fault.ranks.end(), r) == 0; });
  const std::string words = fmt::format(
      "{}: {} did not arrive within {}{}", place, who, within,
      waiting.empty() ? "" : fmt::format("; rank {} waited as well", joined(waiting, ", ")));
  return fault.elsewhere.empty()
             ? std::make_exception_ptr(TimeoutError(words, fault.ranks))
             : std::make_exception_ptr(LateElsewhere(
                   words, fault.ranks, fault.in_world ? fault.elsewhere : std::vector<int>{}));
}

/// A group by its name and its ranks' numbers in the world, by rank.
struct Numbering {
  std::string_view group;
  std::span<const int> world;
};

/// Why a rank gave up, as it tells the others: the first cause, whoever passes it on and through
/// however many groups. It keeps its kind, so that all throw an error of the same type.
struct GiveUp {
  enum class Kind : std::int32_t { timeout, symmetry, transport };

  Kind kind = Kind::symmetry;
  std::int32_t native_code = 0;
  std::int32_t finder = -1;     ///< In the group: who found it; -1 where that is none of its ranks.
  std::vector<int> ranks = {};  ///< In the group: who is missing or differs, of its ranks.
  std::string text = {};
  std::string origin = {};      ///< The group that failed first, where it was another.
  std::vector<int> world = {};  ///< Who is missing or differs, in the world: there, or elsewhere.

  /// Because of an error of its own: what another rank said is passed on as it is.
  /// @param self  The rank that gives up, to be blamed where the error blames nobody.
  [[nodiscard]] static GiveUp because(const std::exception_ptr& error, int self) {
    const auto say = [&](const std::exception& what) { return by(self, what.what()); };
    try {  // told apart by handlers, which sources without run-time type information have as well
      std::rethrow_exception(error);
    } catch (const LateElsewhere& late) {
      GiveUp why = say(late);
      why.kind = Kind::timeout;
      why.ranks = late.missing();
      why.world = late.elsewhere();
      return why;
    } catch (const TimeoutError& late) {
      GiveUp why = say(late);
      why.kind = Kind::timeout;
      blame(why, late.missing());
      return why;
    } catch (const SymmetryError& unlike) {
      GiveUp why = say(unlike);
      blame(why, unlike.ranks());
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

  /// The same for the ranks of another group, which have other numbers, or are not those at fault.
  [[nodiscard]] GiveUp across(const Numbering& from, const Numbering& to) const {
    if (from.group == to.group) {
      return *this;
    }
    GiveUp there = *this;
    if (origin.empty()) {
      there.origin = from.group;
      for (const int r : ranks) {
        if (r >= 0 && static_cast<std::size_t>(r) < from.world.size()) {
          there.world.push_back(from.world[static_cast<std::size_t>(r)]);
        }
      }
    }
    there.ranks.clear();
    for (const int r : there.world) {
      if (const int member = place_of(r, to.world); member >= 0) {
        there.ranks.push_back(member);
      }
    }
    there.finder = finder >= 0 && static_cast<std::size_t>(finder) < from.world.size()
                       ? place_of(from.world[static_cast<std::size_t>(finder)], to.world)
                       : -1;
    return there;
  }

  [[nodiscard]] Bytes serialize() const {
    constexpr std::size_t kLongest = 1500;  // within what messengers send without help
    const std::size_t length = std::min(text.size(), kLongest);
    std::vector<std::int32_t> words{static_cast<std::int32_t>(kind),
                                    native_code,
                                    finder,
                                    static_cast<std::int32_t>(ranks.size()),
                                    static_cast<std::int32_t>(world.size()),
                                    static_cast<std::int32_t>(origin.size())};
    words.insert(words.end(), ranks.begin(), ranks.end());
    words.insert(words.end(), world.begin(), world.end());
    const auto bytes = std::as_bytes(std::span(words));
    Bytes out(bytes.begin(), bytes.end());
    for (const std::string_view part :
         {std::string_view(origin), std::string_view(text).substr(0, length)}) {
      const auto characters = std::as_bytes(std::span(part));
      out.insert(out.end(), characters.begin(), characters.end());
    }
    return out;
  }

  [[nodiscard]] static GiveUp deserialize(std::span<const std::byte> in) {
    std::array<std::int32_t, 6> head{};
    GiveUp why;
    if (in.size() < sizeof(head)) {
      return why;
    }
    std::memcpy(head.data(), in.data(), sizeof(head));
    in = in.subspan(sizeof(head));
    why.kind = static_cast<Kind>(head[0]);
    why.native_code = head[1];
    why.finder = head[2];
    why.ranks = take_numbers(in, head[3]);
    why.world = take_numbers(in, head[4]);
    const auto name = in.first(std::min(in.size(), static_cast<std::size_t>(std::max(0, head[5]))));
    why.origin.assign(reinterpret_cast<const char*>(name.data()), name.size());
    in = in.subspan(name.size());
    why.text.assign(reinterpret_cast<const char*>(in.data()), in.size());
    return why;
  }

  /// Throws what the rank that found it threw, with its words.
  [[noreturn]] void raise(std::string_view call, const std::string& group) const {
    const std::string words = words_in(group);
    switch (kind) {
      case Kind::timeout:
        throw TimeoutError(words, ranks);
      case Kind::transport:
        throw TransportError::relayed(
            {.call = std::string(call), .native_code = native_code, .rank = finder, .group = group},
            words.find("group " + group) != std::string::npos
                ? words
                : fmt::format("group {}: {}", group, words));
      case Kind::symmetry:
        break;
    }
    throw SymmetryError(words, ranks);
  }

 private:
  /// Numbers of ranks are those of the group that stands before them.
  [[nodiscard]] std::string words_in(const std::string& group) const {
    if (origin.empty()) {
      return text;
    }
    const std::string who =
        world.empty() ? "" : fmt::format(" of rank {} of the world", joined(world, ", "));
    return fmt::format("group {}: behind a failure in group {}{}: {}", group, origin, who, text);
  }
  static void blame(GiveUp& why, const std::vector<int>& ranks) {
    if (!ranks.empty()) {
      why.ranks = ranks;
    }
  }
  static int place_of(int world_rank, std::span<const int> world) noexcept {
    const auto found = std::find(world.begin(), world.end(), world_rank);
    return found == world.end() ? -1 : static_cast<int>(found - world.begin());
  }
  static std::vector<int> take_numbers(std::span<const std::byte>& in, std::int32_t count) {
    std::vector<int> numbers(
        std::min(static_cast<std::size_t>(std::max(0, count)), in.size() / sizeof(std::int32_t)));
    const std::size_t bytes = numbers.size() * sizeof(std::int32_t);
    if (bytes > 0) {
      std::memcpy(numbers.data(), in.data(), bytes);
    }
    in = in.subspan(bytes);
    return numbers;
  }
};

}  // namespace cohort::detail
