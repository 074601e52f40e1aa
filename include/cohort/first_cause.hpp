// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/joined.hpp"

/// \file
/// Whose fault it is that a wait for other ranks failed, decided once for what a rank throws and
/// what it tells.

namespace cohort::detail {

/// Of whom an error speaks, before anything else is known.
enum class Suspect : std::uint8_t {
  named,   ///< Those whom it names, or this rank.
  self,    ///< This rank, unless the process of another has ended.
  others,  ///< Another, of which it does not say which one.
};

/// What a rank knows of a wait that has failed.
struct FailedWait {
  std::exception_ptr error;          ///< What it has met with itself.
  Suspect suspect = Suspect::named;  ///< Of whom that speaks.
  std::optional<GiveUp> said = {};   ///< With what this rank, or another, has left the group.
  std::vector<int> gone = {};        ///< Ranks whose processes have ended, in ascending order.
};

/// What a rank throws, and what it tells the others of its groups: the same.
struct FirstCause {
  std::exception_ptr error;  ///< To be thrown.
  GiveUp why;                ///< To be told.
};

/// An error's words.
[[nodiscard]] inline std::string words_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& what) {
    return what.what();
  }
}

/// The first that is known of: what has been said, passed on as it is, before what a library found
/// out later, because a rank tells why it leaves and then closes its connections; then the ranks
/// that are gone; then the error itself.
/// @param self   This rank in the group.
/// @param call   That has failed.
/// @param group  Its name.
[[nodiscard]] inline FirstCause first_cause(const FailedWait& failed, int self,
                                            std::string_view call, const std::string& group) {
  if (failed.said) {
    try {
      failed.said->raise(call, group);
    } catch (const Error&) {
      return {std::current_exception(), *failed.said};
    }
  }
  std::exception_ptr error = failed.error;
  if (failed.suspect != Suspect::named && !failed.gone.empty()) {
    const std::string words = fmt::format("{}; the process of rank {} is gone", words_of(error),
                                          joined(failed.gone, ", "));
    error = std::make_exception_ptr(TimeoutError(words, failed.gone));
  }
  FirstCause first{error, GiveUp::because(error, self)};
  if (failed.suspect == Suspect::others && failed.gone.empty()) {
    first.why.ranks.clear();
  }
  return first;
}

}  // namespace cohort::detail
