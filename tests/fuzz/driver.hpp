// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>

#include "random.hpp"

/// \file
/// What every fuzzer's main is: rounds of one seed each, and how a failure can be had again.

namespace cohort::fuzz {

/// One round. Everything that it does follows from `random`. It says in `words` what it has drawn,
/// before it does it, and throws where a property does not hold.
using Round = std::function<void(Random& random, std::string& words)>;

/// Runs rounds as the command line says:
///
///     PROGRAM [--seed S] [--rounds N | --seconds T]
///
/// Round i has the seed S + i. Without `--seed` S is 1; `--seed date` takes the day's, so that a
/// long run draws other cases each day. Ends at the first round that fails, crashes or does not
/// return, with its seed, what was drawn and the command that repeats it. A program counts as one
/// test, however many rounds it had time for.
int drive(int argc, char** argv, const char* name, int rounds, const Round& round);

}  // namespace cohort::fuzz
