// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <exception>
#include <stdexcept>
#include <string>

/// \file
/// A part of a test that runs in a forked child of its process.

namespace cohort::test {

/// Runs `body` in a forked child, which then leaves without destructors. Throws what `body` threw
/// there, as text.
template <class Body>
void run_in_child(const Body& body) {
  int channel[2] = {-1, -1};
  if (pipe(channel) != 0) {
    throw std::runtime_error("pipe failed");
  }
  const pid_t child = fork();
  if (child == 0) {
    std::string failure;
    try {
      body();
    } catch (const std::exception& error) {
      failure = error.what();
    } catch (...) {
      failure = "an exception that is no std::exception";
    }
    const ssize_t written = write(channel[1], failure.data(), failure.size());
    _exit(failure.empty() && written == 0 ? 0 : 1);
  }
  close(channel[1]);
  std::string failure;
  char text[512];
  for (ssize_t count = 0; (count = read(channel[0], text, sizeof(text))) > 0;) {
    failure.append(text, static_cast<std::size_t>(count));
  }
  close(channel[0]);
  int status = -1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
    throw std::runtime_error("in the forked child, status " + std::to_string(status) + ": " +
                             failure);
  }
}

}  // namespace cohort::test
