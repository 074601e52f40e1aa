// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/time.h>

#include <csignal>

namespace cohort::test {

/// While it lives, the process gets a signal every 20 µs: faster than the kernel's timer slack (50
/// µs), so that a sleep which goes on for its rest after each never ends.
class FastSignals {
 public:
  FastSignals() {
    struct sigaction action {};
    action.sa_handler = [](int) {};
    action.sa_flags = SA_RESTART;
    ::sigaction(SIGALRM, &action, &before_);
    const itimerval every{.it_interval = {.tv_sec = 0, .tv_usec = 20},
                          .it_value = {.tv_sec = 0, .tv_usec = 20}};
    ::setitimer(ITIMER_REAL, &every, nullptr);
  }
  FastSignals(const FastSignals&) = delete;
  FastSignals& operator=(const FastSignals&) = delete;
  ~FastSignals() {
    const itimerval never{};
    ::setitimer(ITIMER_REAL, &never, nullptr);
    ::sigaction(SIGALRM, &before_, nullptr);
  }

 private:
  struct sigaction before_ {};
};

}  // namespace cohort::test
