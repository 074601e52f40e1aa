// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

/// \file
/// Bytes from outside, against what reads them.

namespace cohort::fuzz {

/// Gives the bytes to the readers of control messages, agreements and descriptor requests. Throws
/// `std::logic_error` where a reader neither gave the right answer nor a typed error.
void read_frames(std::span<const std::byte> bytes);

}  // namespace cohort::fuzz
