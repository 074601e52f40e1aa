// SPDX-License-Identifier: Apache-2.0
// The same for libFuzzer, which finds inputs by the code that they reach.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <span>

#include "frames.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  cohort::fuzz::read_frames(std::as_bytes(std::span(data, size)));  // what it throws ends the run
  return 0;
}
