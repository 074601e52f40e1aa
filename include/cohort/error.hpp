// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

/// \file
/// The exceptions that Cohort throws. Every one derives from `cohort::Error`, so one handler can
/// catch the library's failures and nothing else.

namespace cohort {

/// Base of every exception that the library throws.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A layout, option or environment value that cannot work. Thrown before anything is created.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// A call whose arguments or moment are wrong: shape, dtype, dimension, rank, allocation inside a
/// stream capture without room, use after teardown. Thrown before anything is enqueued; the object
/// that was called works on afterwards.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// The system, MPI, CUDA or NCCL refused a call. Carries the native code and where it happened.
class TransportError : public Error {
 public:
  /// Where a native call failed.
  struct Site {
    std::string call;        ///< Name of the native function, such as "ncclAllGather".
    long native_code = 0;    ///< Its return value or `errno`.
    int rank = -1;           ///< Rank in the group, or -1 where no group is involved.
    std::string group = {};  ///< Name of the group, or empty.
  };

  /// The message names the call, its code, the rank and the group of `site`, then `detail`.
  TransportError(Site site, const std::string& detail)
      : TransportError(std::move(site), detail, {}) {}

  /// What another rank said, which has told already where it happened: the message is `words`.
  [[nodiscard]] static TransportError relayed(Site site, const std::string& words) {
    return {std::move(site), {}, words};
  }

  /// Where it happened.
  [[nodiscard]] const Site& site() const noexcept { return site_; }
  /// The end of the message, which says why; all of what was relayed.
  [[nodiscard]] const char* detail() const noexcept { return what() + before_detail_; }

 private:
  TransportError(Site site, const std::string& detail, const std::string& words)
      : Error(words.empty() ? describe(site, detail) : words),
        site_(std::move(site)),
        before_detail_(words.empty() ? std::char_traits<char>::length(what()) - detail.size() : 0) {
  }

  static std::string describe(const Site& site, const std::string& detail) {
    std::string text = site.call + " failed with code " + std::to_string(site.native_code);
    if (!site.group.empty()) {
      text += " in group " + site.group;
    }
    if (site.rank >= 0) {
      text += " on rank " + std::to_string(site.rank);
    }
    return text + ": " + detail;
  }

  Site site_;
  std::size_t before_detail_;
};

/// The ranks of a group disagree about something that must be the same on all of them: the
/// sequence of registrations, a size, an allocation history, the arguments of a collective.
class SymmetryError : public Error {
 public:
  /// Says `what`; `ranks` are those that differ or failed.
  SymmetryError(const std::string& what, std::vector<int> ranks)
      : Error(what), ranks_(std::move(ranks)) {}

  /// The ranks in the group that differ or failed.
  [[nodiscard]] const std::vector<int>& ranks() const noexcept { return ranks_; }

 private:
  std::vector<int> ranks_;
};

/// A wait ended at its time limit.
class TimeoutError : public Error {
 public:
  /// Says `what`; `missing` are those that did not arrive.
  TimeoutError(const std::string& what, std::vector<int> missing)
      : Error(what), missing_(std::move(missing)) {}

  /// The ranks in the group that did not arrive within the limit; empty where the wait was for
  /// local work, and where the ranks of the group waited for others, which the words name.
  [[nodiscard]] const std::vector<int>& missing() const noexcept { return missing_; }

 private:
  std::vector<int> missing_;
};

namespace detail {

/// Throws what `text()` says. The text is made here, out of line, so that a check which calls this
/// is a comparison and a jump where it is made.
template <class Which = UsageError, class Text>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Text& text) {
  throw Which(text());
}

}  // namespace detail
}  // namespace cohort
