// SPDX-License-Identifier: Apache-2.0
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
#include "cohort/flight_recorder.hpp"
#include "cohort/give_up.hpp"
#include "cohort/joined.hpp"
#include "cohort/traced_agreement.hpp"

/// \file
/// Ranks agree before they do anything that would hang or go wrong silently if they did not: each
/// registration of memory and each creation of a transport; and after it, where it may have failed
/// on some.

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
  std::vector<int> ranks;  ///< Who differs, in ascending order.
  std::string text;        ///< What differs, for the error.
};

namespace detail {

/// Everything but the failure, as one line that people can compare.
[[nodiscard]] inline std::string describe(const Intent& intent) {
  return fmt::format("{} #{} with {} bytes, history {:016x}", intent.place, intent.sequence,
                     intent.bytes, intent.history);
}

}  // namespace detail

namespace detail {

/// "; rank 0, 2 failed: no memory; rank 1 failed: too many open files": ranks that failed alike are
/// told together. `blamed` grows by them.
[[nodiscard]] inline std::string tell_failures(std::span<const Intent> intents,
                                               std::span<const int> ranks,
                                               std::vector<int>& blamed) {
  std::vector<std::pair<const std::string*, std::vector<int>>> causes;
  for (const int rank : ranks) {
    const auto& failure = intents[static_cast<std::size_t>(rank)].failure;
    if (failure.empty()) {
      continue;
    }
    blamed.push_back(rank);
    const auto same = std::find_if(causes.begin(), causes.end(),
                                   [&](const auto& cause) { return *cause.first == failure; });
    if (same != causes.end()) {
      same->second.push_back(rank);
    } else {
      causes.emplace_back(&failure, std::vector<int>(1, rank));
    }
  }
  std::string text;
  for (const auto& [failure, who] : causes) {
    const bool all = who.size() > 1 && who.size() == intents.size();
    text += all ? fmt::format("; every rank failed: {}", *failure)
                : fmt::format("; rank {} failed: {}", joined(who, ", "), *failure);
  }
  return text;
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
  std::vector<int> all;
  for (std::size_t r = 0; r < intents.size(); ++r) {
    all.push_back(static_cast<int>(r));
    if (lines[r] != *majority) {
      found.ranks.push_back(all.back());
      found.text += fmt::format("; rank {} is at {}", r, lines[r]);
    }
  }
  const std::string failures = detail::tell_failures(intents, all, found.ranks);
  if (found.text.empty() && failures.empty()) {
    return std::nullopt;
  }
  found.text = found.text.empty() ? failures.substr(2)
                                  : fmt::format("ranks disagree: most are at {}{}{}", *majority,
                                                found.text, failures);
  std::sort(found.ranks.begin(), found.ranks.end());
  found.ranks.erase(std::unique(found.ranks.begin(), found.ranks.end()), found.ranks.end());
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

[[nodiscard]] inline std::string message_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  } catch (...) {
    return "an exception of an unknown type";
  }
}

[[nodiscard]] inline bool is_timeout(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const TimeoutError&) {
    return true;
  } catch (...) {
    return false;
  }
}

/// Throws the error with words before and after its own, where its type lets it have them.
[[noreturn]] inline void rethrow_with(const std::exception_ptr& error, const std::string& before,
                                      const std::string& after) {
  try {
    std::rethrow_exception(error);
  } catch (const TimeoutError& late) {
    throw TimeoutError(before + late.what() + after, late.missing());
  } catch (const SymmetryError& unlike) {
    throw SymmetryError(before + unlike.what() + after, unlike.ranks());
  }
}

/// What the other ranks that came say of their failures.
[[nodiscard]] inline std::string quotes(std::span<const Intent> intents,
                                        const std::vector<int>& absent, int self) {
  std::vector<int> others;
  for (int r = 0; r < static_cast<int>(intents.size()); ++r) {
    if (r != self && std::count(absent.begin(), absent.end(), r) == 0) {
      others.push_back(r);
    }
  }
  std::vector<int> blamed;
  return tell_failures(intents, others, blamed);
}

}  // namespace detail

/// For an agreement after a step that the ranks may have waited in for up to the time limit each:
/// those that had not to wait hear of it from those that had.
[[nodiscard]] inline std::chrono::milliseconds patience_after_a_wait(const ControlPlane& control) {
  return control.limit() + control.limit() / 8;
}

namespace detail {

/// Of a time-out that a rank brings into an agreement: in this group it has not waited yet, so the
/// ranks that it names have the numbers of another, and are named in its words alone.
[[nodiscard]] inline GiveUp foreign(const ControlPlane& control, const Intent& intent) {
  GiveUp why =
      GiveUp::by(control.rank(), fmt::format("group {}: {} #{}: {}", control.name(), intent.place,
                                             intent.sequence, intent.failure));
  why.kind = GiveUp::Kind::timeout;
  return why;
}

/// `cohort::agree`, without a record.
inline void agree(ControlPlane& control, Intent intent, const std::exception_ptr& own,
                  std::chrono::milliseconds patience, const std::optional<GiveUp>& told) {
  using std::chrono::milliseconds;
  std::optional<GiveUp> excuse;
  auto limit = patience == milliseconds(0) ? control.limit() : patience;
  if (own) {
    intent.failure = message_of(own);
    if (intent.failure.empty()) {
      intent.failure = "an error without words";
    }
    if (is_timeout(own)) {
      limit = milliseconds(0);
      excuse = told ? *told : foreign(control, intent);
    }
  }
  const auto arrivals =
      control.gather_arrivals(serialize(intent), limit, excuse ? &*excuse : nullptr);
  std::vector<Intent> intents;
  for (const auto& bytes : arrivals.payloads) {
    intents.push_back(deserialize(bytes));
  }
  const auto said = [&] { return quotes(intents, arrivals.absent, control.rank()); };
  if (own) {
    if (is_timeout(own)) {
      rethrow_with(own, {}, said());
    }
    std::rethrow_exception(own);
  }
  const auto place = [&] { return fmt::format("{} #{}: ", intent.place, intent.sequence); };
  if (arrivals.error) {
    rethrow_with(arrivals.error, place(), said());
  }
  if (const auto found = compare(intents)) {
    throw SymmetryError(fmt::format("{}group {}: {}", place(), control.name(), found->text),
                        found->ranks);
  }
}

}  // namespace detail

/// Collective. Throws on every rank unless all intend the same and none has failed: one exchange
/// with one deadline. For what concerns several groups `control` is that of a group that contains
/// them all, so that none goes on into a call that another will never make.
///
/// @param own       What this rank has failed with, if it has: it throws that, and the others quote
///                  it. After a time-out of its own it tells so and waits for nobody any more.
/// @param patience  Time limit; that of `control` where zero.
/// @param told      What the others learn of such a time-out, where its ranks are known in
/// `control`. Throws `own`; `SymmetryError` naming who differs or failed; `TimeoutError` naming who
/// did not come, with what those that came say; `TransportError`. The group works on after the
/// first two, where all have come.
inline void agree(ControlPlane& control, Intent intent, const std::exception_ptr& own = nullptr,
                  std::chrono::milliseconds patience = {},
                  const std::optional<detail::GiveUp>& told = std::nullopt) {
  FlightRecorder* const recorder = control.recorder();
  const detail::TracedAgreement traced(recorder, intent.place, intent.bytes);
  // A time-out that this rank brings along may be that of another group.
  detail::reporting(
      recorder, [&] { detail::agree(control, std::move(intent), own, patience, told); },
      own == nullptr);
}

}  // namespace cohort
