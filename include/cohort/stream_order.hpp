// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/stream.hpp"

/// \file
/// The order of calls that come on different streams.

namespace cohort {

/// Orders calls, and launches of graphs with calls, behind one another on whichever streams they
/// come, and behind nothing else that those streams get: what a call waits for is an event right
/// behind the one before it. Calls of one capture are ordered among themselves; their place among
/// eager calls is where the graph is launched.
///
/// An eager event costs a call into the driver, so none is recorded as long as all calls come on
/// one stream. The first call on a second stream therefore waits, once, for all that the first
/// stream has. One thread at a time.
class StreamOrder {
 public:
  /// @param owner  Whose calls these are, for messages.
  explicit StreamOrder(std::string owner) : owner_(std::move(owner)) {}

  /// A call under way. A stream is asked for its capture once in each call, because devices answer
  /// slowly; within the call the answer cannot change.
  struct Call {
    StreamRef stream;       ///< Where the call is enqueued.
    CaptureId capture = 0;  ///< The capture it belongs to, 0 if none.
  };

  /// A call begins: what `stream` gets from here on comes after the calls so far. Without a stream
  /// there is nothing to order. Throws `UsageError` where the order cannot be known: the last
  /// call's stream is being captured now and no event stands behind the call, or the call belongs
  /// to a capture whose earlier calls have been forgotten over those of many others.
  [[nodiscard]] Call before(StreamRef stream) {
    if (!stream.valid()) {
      return {};
    }
    const CaptureId capture = stream.capture_id();
    if (capture == 0 && eager_.stream == stream) [[likely]] {
      eager_.stands = false;
    } else if (!stream.driver().runs_at_once()) {
      if (capture == 0) {
        follow(eager_, stream, capture);
      } else if (capture != kInvalidatedCapture) {  // nothing of that one will ever run
        follow(captured(capture), stream, capture);
      }
    }
    return {stream, capture};
  }

  /// The call that `before` began has been enqueued. Until then, and where it is left out, the next
  /// call on another stream waits for everything that the stream has.
  void after(const Call& call) {
    if (!call.stream.valid() || call.capture == kInvalidatedCapture) {
      return;
    }
    if (call.capture != 0) {
      if (!call.stream.driver().runs_at_once()) {
        mark(captured(call.capture), call.stream);
      }
    } else if (several_streams_) {
      mark(eager_, call.stream);
    }
  }

 private:
  /// Where the last call ends: behind the event, or where that does not stand, behind all that the
  /// stream has.
  struct Place {
    CaptureId capture = 0;
    StreamRef stream;
    std::unique_ptr<StreamEvent> event;
    bool stands = false;
  };

  /// Captures whose calls are remembered. An engine has one under way, or one for each thread.
  static constexpr std::size_t kCaptures = 16;

  void follow(Place& last, StreamRef stream, CaptureId capture) {
    if (last.stream != stream && last.stream.valid()) {
      if (last.stands && &last.stream.driver() == &stream.driver()) {
        stream.wait(*last.event);
      } else {
        if (last.stream.capture_id() != capture) {
          throw UsageError(fmt::format(
              "{}: the last call's stream has {} since; a call on another stream cannot be ordered "
              "behind it",
              owner_, capture == 0 ? "begun to be captured" : "left the capture"));
        }
        stream.wait_for(last.stream);
      }
      several_streams_ = true;
    }
    last.stream = stream;
    last.stands = false;
  }

  static void mark(Place& place, StreamRef stream) {
    if (place.event == nullptr) {
      place.event = stream.driver().make_event();
    }
    stream.record(*place.event);
    place.stands = true;
  }

  /// The place of a capture; new ones push out the one that was used longest ago.
  [[nodiscard]] Place& captured(CaptureId capture) {
    const auto found = std::find_if(captures_.begin(), captures_.end(),
                                    [&](const Place& place) { return place.capture == capture; });
    if (found != captures_.end()) {
      std::rotate(found, found + 1, captures_.end());
      return captures_.back();
    }
    if (capture <= forgotten_) {
      throw UsageError(fmt::format(
          "{}: more than {} captures at a time; the order of their calls cannot be known", owner_,
          kCaptures));
    }
    if (captures_.size() == kCaptures) {
      forgotten_ = std::max(forgotten_, captures_.front().capture);
      captures_.erase(captures_.begin());
    }
    captures_.emplace_back().capture = capture;
    return captures_.back();
  }

  std::string owner_;
  Place eager_;
  std::vector<Place> captures_;
  CaptureId forgotten_ = 0;
  bool several_streams_ = false;
};

}  // namespace cohort
