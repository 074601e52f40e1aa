// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

/// \file
/// CUDA's runtime, the driver's entry points and NCCL on the host, as far as the library calls
/// them. A program that links these sources in the libraries' place runs the host side of the
/// transport without a GPU, each rank a thread with a device of its own. Streams, events, captures,
/// graphs, mapped memory, communicators and windows keep their order and their lifetimes; kernels
/// do not run and collectives move nothing, but wait for every rank.

namespace cohort::test::stand_in {

/// The call of a function, counted from 1 on each device, that fails.
struct Refusal {
  std::string function;
  int device = 0;  ///< The calling thread's current one.
  long call = 1;
};

/// How often each function was called on each device.
using CallCounts = std::map<std::pair<std::string, int>, long>;

/// What happened since `begin`.
struct Report {
  std::map<std::string, long> alive;  ///< Kinds of things that were not given back, and how many.
  std::vector<std::string> misuses;   ///< What no caller may do, such as destroying a thing twice.
  CallCounts calls;
  bool refused = false;  ///< The call that was to fail was made.
};

/// Forgets all that was before. Not while another thread calls.
void begin(std::optional<Refusal> refusal = {});

/// Runs what streams can still do and reports.
[[nodiscard]] Report report();

}  // namespace cohort::test::stand_in
