// SPDX-License-Identifier: Apache-2.0
#include "driver.hpp"

#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <limits>
#include <string>
#include <string_view>

#include "command_line/command_line.hpp"

namespace cohort::fuzz {
namespace {

// Longer than any round of ranks that wait for each other until their time limit.
constexpr unsigned kRoundSeconds = 120;
constexpr std::array kFatalSignals{SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};

// What a signal handler may read: how to repeat the round that is running.
std::array<char, 256> running{};
std::array<struct sigaction, kFatalSignals.size()> previous{};

/// Says which round it was and leaves the rest to whoever was there before, a sanitizer's report
/// or the end of the process.
extern "C" void on_fatal_signal(int signal) {
  constexpr char kCrashed[] = "\nthe round crashed: ";
  constexpr char kHung[] = "\nthe round did not return: ";
  const char* what = signal == SIGALRM ? kHung : kCrashed;
  static_cast<void>(!::write(STDERR_FILENO, what, std::strlen(what)));
  static_cast<void>(!::write(STDERR_FILENO, running.data(), std::strlen(running.data())));
  for (std::size_t i = 0; i < kFatalSignals.size(); ++i) {
    if (kFatalSignals[i] == signal) {
      ::sigaction(signal, &previous[i], nullptr);
    }
  }
  if (signal == SIGALRM) {
    std::abort();
  }
}

void watch_for_fatal_signals() {
  struct sigaction action {};
  action.sa_handler = on_fatal_signal;
  ::sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < kFatalSignals.size(); ++i) {
    ::sigaction(kFatalSignals[i], &action, &previous[i]);
  }
}

struct Arguments {
  std::uint64_t seed = 1;
  std::int64_t rounds = 0;
  double seconds = 0;
};

/// Days since 1970 as the upper digits, so that the seeds of two days do not overlap.
std::uint64_t seed_of_today() {
  return static_cast<std::uint64_t>(std::time(nullptr) / 86400) * 1'000'000;
}

constexpr std::string_view kOptionHelp =
    "  --seed S     of the first round, 1; \"date\" takes the day's\n"
    "  --rounds N   so many\n"
    "  --seconds T  as many as fit\n";

Arguments parse(int argc, char** argv, std::string_view help, int rounds) {
  cohort::tools::help_if_asked(argc, argv, help);
  Arguments arguments;
  arguments.rounds = rounds;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    const char* const value = i + 1 < argc ? argv[i + 1] : "";
    char* end = nullptr;
    if (option == "--seed" && std::strcmp(value, "date") == 0) {
      arguments.seed = seed_of_today();
      continue;
    }
    if (option == "--seed") {
      arguments.seed = std::strtoull(value, &end, 10);
    } else if (option == "--rounds") {
      arguments.rounds = std::strtoll(value, &end, 10);
    } else if (option == "--seconds") {
      arguments.seconds = std::strtod(value, &end);
      arguments.rounds = std::numeric_limits<std::int64_t>::max();
    } else {
      cohort::tools::refuse(cohort::tools::no_such_option(option, help));
    }
    if (end == value || *end != '\0' || arguments.rounds < 1) {
      cohort::tools::refuse(option + ": expected a number, got \"" + value + "\"");
    }
  }
  return arguments;
}

bool passes(const Round& round, std::uint64_t seed) {
  std::string words;
  try {
    Random random(seed);
    round(random, words);
    return true;
  } catch (const std::exception& error) {
    std::printf("seed %llu failed: %s\n%s\n", static_cast<unsigned long long>(seed), error.what(),
                words.c_str());
  }
  return false;
}

}  // namespace

int drive(int argc, char** argv, const char* name, int rounds, const Round& round) {
  const std::string help = std::string("Compares random ") + name +
                           " with a simple reference, a seed a round.\n\n  fuzz_" + name +
                           " --seed 17 --rounds 1\n\n" + std::string(kOptionHelp);
  const Arguments arguments = parse(argc, argv, help, rounds);
  watch_for_fatal_signals();
  std::printf("fuzz %s: from seed %llu\n", name, static_cast<unsigned long long>(arguments.seed));
  std::fflush(stdout);
  const auto begin = std::chrono::steady_clock::now();
  std::int64_t done = 0;
  bool failed = false;
  while (done < arguments.rounds && !failed) {
    const std::uint64_t seed = arguments.seed + static_cast<std::uint64_t>(done);
    std::snprintf(running.data(), running.size(), "repeat it with: %s --seed %llu --rounds 1\n",
                  argv[0], static_cast<unsigned long long>(seed));
    ::alarm(kRoundSeconds);
    failed = !passes(round, seed);
    ++done;
    if (failed) {
      std::printf("%s", running.data());
    }
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    if (arguments.seconds > 0 && spent.count() >= arguments.seconds) {
      break;
    }
  }
  ::alarm(0);
  std::printf("fuzz %s: %lld rounds\ncohort-test: passed=%d failed=%d skipped=0\n", name,
              static_cast<long long>(done), failed ? 0 : 1, failed ? 1 : 0);
  return failed ? 1 : 0;
}

}  // namespace cohort::fuzz
