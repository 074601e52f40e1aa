#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"

/// \file
/// Ranks agree before they do anything that would hang or go wrong silently if they did not: each
/// registration of memory and each creation of a transport.

namespace cohort {

/// What a rank is about to do. All fields but `failure` must be equal on every rank.
struct Intent {
  std::string place;           ///< What is about to happen, such as "growth of arena dcp[0]".
  std::uint64_t sequence = 0;  ///< How many times it has happened before.
  std::uint64_t bytes = 0;     ///< Size of the memory concerned.
  std::uint64_t history = 0;   ///< Hash of everything that led here.
  std::string failure = {};    ///< Why this rank cannot go on; empty where it can.
};

/// Who is to blame, and the whole message.
struct Disagreement {
  std::vector<int> ranks;
  std::string text;
};

namespace detail {

/// Everything but the failure, as one line that people can compare.
[[nodiscard]] inline std::string describe(const Intent& intent) {
  return fmt::format("{} #{} with {} bytes, history {:016x}", intent.place, intent.sequence,
                     intent.bytes, intent.history);
}

}  // namespace detail

/// Compares the intents of all ranks of a group; pure. A rank differs if it is not with the
/// largest set of ranks that are alike (of equal sets, the one that holds the lowest rank).
[[nodiscard]] inline std::optional<Disagreement> compare(std::span<const Intent> intents) {
  std::vector<std::string> lines;
  for (const auto& intent : intents) {
    lines.push_back(detail::describe(intent));
  }
  const std::string* majority = nullptr;
  std::ptrdiff_t votes = 0;
  for (const auto& line : lines) {
    const auto count = std::count(lines.begin(), lines.end(), line);
    if (count > votes) {
      votes = count;
      majority = &line;
    }
  }
  Disagreement found;
  for (std::size_t r = 0; r < intents.size(); ++r) {
    const auto rank = static_cast<int>(r);
    if (!intents[r].failure.empty()) {
      found.ranks.push_back(rank);
      found.text += fmt::format("; rank {} failed in {}: {}", rank, lines[r], intents[r].failure);
    } else if (lines[r] != *majority) {
      found.ranks.push_back(rank);
      found.text += fmt::format("; rank {} is at {}", rank, lines[r]);
    }
  }
  if (found.ranks.empty()) {
    return std::nullopt;
  }
  found.text = fmt::format("ranks disagree: most are at {}{}", *majority, found.text);
  return found;
}

namespace detail {

[[nodiscard]] inline Bytes serialize(const Intent& intent) {
  Bytes out;
  const auto put = [&](const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    out.insert(out.end(), bytes, bytes + size);
  };
  for (const std::uint64_t word : {intent.sequence, intent.bytes, intent.history,
                                   static_cast<std::uint64_t>(intent.place.size())}) {
    put(&word, sizeof(word));
  }
  put(intent.place.data(), intent.place.size());
  put(intent.failure.data(), intent.failure.size());
  return out;
}

[[nodiscard]] inline Intent deserialize(std::span<const std::byte> in) {
  std::array<std::uint64_t, 4> words{};
  if (in.size() < sizeof(words)) {
    return {.place = "a message that is no intent"};
  }
  std::memcpy(words.data(), in.data(), sizeof(words));
  const auto* text = reinterpret_cast<const char*>(in.data()) + sizeof(words);
  const std::size_t length = in.size() - sizeof(words);
  const std::size_t place = std::min<std::size_t>(words[3], length);
  return {.place = std::string(text, place),
          .sequence = words[0],
          .bytes = words[1],
          .history = words[2],
          .failure = std::string(text + place, length - place)};
}

}  // namespace detail

namespace detail {

/// Waits of one agreement follow each other, and a rank may come late to one because it waited for
/// a missing rank in the one before. Each wait is a little longer than the one before, so that such
/// a rank can still tell what it knows and is not taken for the missing one.
[[nodiscard]] inline std::chrono::milliseconds staggered_limit(std::chrono::milliseconds limit,
                                                               int waits_before) {
  constexpr std::chrono::milliseconds kLeast{500};
  return limit + waits_before * std::max(limit / 8, kLeast);
}

/// The first thing that a rank found wrong in the course of an agreement.
using Verdict = std::exception_ptr;

/// Compares with one group; what is wrong becomes the verdict, if it is the first, and the failure
/// that the next exchanges tell.
inline void agree_within(ControlPlane& group, int waits_before, Intent& intent, Verdict& verdict) {
  std::string wrong;
  const auto blame = [&](const std::string& text, auto make_error) {
    wrong = fmt::format("{} #{}: {}", intent.place, intent.sequence, text);
    if (!verdict) {
      verdict = std::make_exception_ptr(make_error(wrong));
    }
  };
  try {
    std::vector<Intent> intents;
    for (const auto& bytes :
         group.all_gather_within(serialize(intent), staggered_limit(group.limit(), waits_before))) {
      intents.push_back(deserialize(bytes));
    }
    if (const auto found = compare(intents)) {
      blame(fmt::format("group {}: {}", group.name(), found->text),
            [&](const std::string& text) { return SymmetryError(text, found->ranks); });
    }
  } catch (const TimeoutError& error) {
    blame(error.what(),
          [&](const std::string& text) { return TimeoutError(text, error.missing()); });
  } catch (const SymmetryError& error) {
    blame(error.what(),
          [&](const std::string& text) { return SymmetryError(text, error.ranks()); });
  } catch (const Error& error) {
    wrong = fmt::format("{} #{}: {}", intent.place, intent.sequence, error.what());
    if (!verdict) {
      verdict = std::current_exception();
    }
  }
  if (intent.failure.empty()) {
    intent.failure = wrong;
  }
}

}  // namespace detail

/// Collective over every control plane given; ranks give the groups that they share in the same
/// order. Throws on every rank unless all intend the same and none has failed. With several groups
/// the verdict spreads over all ranks that one group of each kind connects, so none goes on into a
/// call that another will never make; a rank that learns of it from a peer names that peer, whose
/// own message is quoted.
///
/// Takes one exchange more than the verdict needs: a rank goes on only when its peers have heard
/// from everyone too, so one that comes after the others have given up does not go on alone.
/// Ends within a few eighths more than the groups' time limit.
/// Throws `SymmetryError` naming who differs or failed, `TimeoutError` naming who did not come,
/// `TransportError`.
inline void agree(std::span<ControlPlane* const> groups, Intent intent) {
  detail::Verdict verdict;
  // A verdict crosses one group a round; a path between two ranks needs each kind of group once.
  const auto kinds = static_cast<int>(groups.size());
  int waits = 0;
  for (int round = 0; round <= kinds; ++round) {
    for (ControlPlane* group : groups) {
      if (!group->poisoned() || round == 0) {
        detail::agree_within(*group, waits, intent, verdict);
      }
      ++waits;
    }
    if (kinds == 1 && verdict) {
      break;  // every rank of the only group has seen the same
    }
  }
  if (verdict) {
    std::rethrow_exception(verdict);
  }
}

}  // namespace cohort
