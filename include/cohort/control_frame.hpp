// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>

#include "cohort/messenger.hpp"

/// \file
/// What a message of the control plane carries beside its payload.

namespace cohort::detail {

/// What a message is part of. The last four are no calls: a rank tells the others that it has
/// left, because of an error or in good order; it asks one for whom that waits, and is told.
enum class ControlCall : std::uint32_t {
  all_gather,
  barrier,
  broadcast,
  exchange,
  gave_up,
  left,
  asks,
  waits
};

[[nodiscard]] constexpr std::string_view to_string(ControlCall call) noexcept {
  switch (call) {
    case ControlCall::all_gather:
      return "all_gather";
    case ControlCall::barrier:
      return "barrier";
    case ControlCall::broadcast:
      return "broadcast";
    case ControlCall::exchange:
      return "exchange";
    case ControlCall::gave_up:
      return "notice";
    case ControlCall::left:
      return "goodbye";
    case ControlCall::asks:
      return "question";
    case ControlCall::waits:
      return "answer";
  }
  return "unknown call";
}

/// What each payload carries at its end, where adding and removing it moves no byte of the payload:
/// the group, the call and its number in that group.
struct FrameTrailer {
  std::uint64_t channel = 0;
  ControlCall call = ControlCall::all_gather;
  std::uint32_t sequence = 0;
};

/// A payload that becomes a message without being moved.
[[nodiscard]] inline Bytes copy_with_room(std::span<const std::byte> payload) {
  Bytes message;
  message.reserve(payload.size() + sizeof(FrameTrailer));
  message.assign(payload.begin(), payload.end());
  return message;
}

/// A payload becomes a message.
inline void append(Bytes& payload, const FrameTrailer& trailer) {
  std::array<std::byte, sizeof(trailer)> bytes{};
  std::memcpy(bytes.data(), &trailer, sizeof(trailer));
  payload.insert(payload.end(), bytes.begin(), bytes.end());
}

/// Of a message; nothing where it is too short to be one.
[[nodiscard]] inline std::optional<FrameTrailer> trailer_of(std::span<const std::byte> message) {
  FrameTrailer trailer;
  if (message.size() < sizeof(trailer)) {
    return std::nullopt;
  }
  std::memcpy(&trailer, message.last(sizeof(trailer)).data(), sizeof(trailer));
  return trailer;
}

}  // namespace cohort::detail
