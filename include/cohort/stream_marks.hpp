// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cohort/call_time.hpp"
#include "cohort/error.hpp"
#include "cohort/offset_allocator.hpp"
#include "cohort/stream.hpp"

/// \file
/// Which streams memory was used on, as a set that fits into a word.

namespace cohort {

/// Marks for the streams that blocks of memory are used on, and the waits for what a set of marks
/// stands for. Streams whose work runs at once need none: nobody has to wait for them.
///
/// As many streams as there are bits have a mark of their own. When one more comes, those that are
/// not being captured give theirs up: an event behind all that they have so far takes their place,
/// under the one mark that stands for the past. So whoever takes a block waits for streams that
/// used it and for past work, and never for a stream that it has nothing to do with. One thread at
/// a time.
class StreamMarks {
 public:
  /// A set of streams.
  using Marks = OffsetAllocator::Marks;

  /// How many streams have a mark of their own at a time.
  static constexpr std::size_t kStreams = 63;
  /// Marks that streams have given up.
  struct GivenUp {
    Marks gone = 0;                                ///< Nobody's any more.
    Marks by = 0;                                  ///< What stands for them now.
    std::array<StreamRef, kStreams> streams = {};  ///< Whose they were, by bit.

    /// `marks` without those that are gone.
    [[nodiscard]] Marks replaced(Marks marks) const noexcept {
      return OffsetAllocator::replaced(marks, gone, by);
    }
    /// Calls `visit` with every stream that gave up one of `marks`.
    template <class Visit>
    void for_each(Marks marks, const Visit& visit) const {
      for (marks &= gone; marks != 0; marks &= marks - 1) {
        visit(streams[static_cast<std::size_t>(std::countr_zero(marks))]);
      }
    }
  };

  /// @param owner  Whose memory it is, for messages.
  /// @param limit  Of the waits that are made here, for all streams together.
  StreamMarks(std::string owner, std::chrono::milliseconds limit)
      : owner_(std::move(owner)), limit_(limit) {}

  /// The stream's mark; 0 for none, and for one that nobody has to wait for. Where marks are given
  /// up, `replace(const GivenUp&)` is called: whoever holds one that is gone holds what stands for
  /// it from there on, which does for memory that is free. Memory in use also notes the streams,
  /// and asks for their marks `anew` when it is released. Throws `UsageError` where every mark is
  /// that of a stream that is being captured.
  template <class Replace>
  [[nodiscard]] Marks of(StreamRef stream, const Replace& replace) {
    if (streams_[last_] == stream && stream.valid()) [[likely]] {
      return mark(last_);
    }
    return of_another(stream, replace);
  }

  /// A mark for all that the stream has so far: the stream's own, if it has one, or that of the
  /// past. Throws as `of`.
  template <class Replace>
  [[nodiscard]] Marks anew(StreamRef stream, const Replace& replace) {
    const bool has_one = std::find(streams_.begin(), streams_.end(), stream) != streams_.end();
    if (has_one || stream.capture_id() != 0) {
      return of(stream, replace);
    }
    remember(stream);
    return kPast;
  }

  /// Orders what `stream` gets next after what these users have so far; without a stream it waits
  /// here, for all of them within the limit. Throws `UsageError` where one of them is being
  /// captured, for which nothing outside of its capture can wait, and `TimeoutError`.
  void order_behind(Marks users, StreamRef stream) {
    if (!stream.valid()) {
      wait_here(users);
      return;
    }
    if ((users & kPast) != 0) {
      for (const auto& past : past_) {
        stream.wait(*past.event);
      }
    }
    for_each(users, stream, [&](StreamRef user, Marks) {
      check_not_capturing(user);
      stream.wait_for(user);
    });
  }

  /// The same for `stream` within a capture: it waits for streams of the capture. Returns the
  /// others, which the graph's launch has to wait for.
  [[nodiscard]] Marks order_within(CaptureId capture, Marks users, StreamRef stream) const {
    Marks others = users & kPast;
    for_each(users, stream, [&](StreamRef user, Marks mark) {
      if (user.capture_id() == capture) {
        stream.wait_for(user);
      } else {
        others |= mark;
      }
    });
    return others;
  }

  /// Those of `marks` whose streams are in a capture.
  [[nodiscard]] Marks captured_by(CaptureId capture, Marks marks) const {
    Marks captured = 0;
    for_each(marks, {}, [&](StreamRef user, Marks mark) {
      captured |= user.capture_id() == capture ? mark : 0;
    });
    return captured;
  }

 private:
  static constexpr Marks kPast = Marks{1} << kStreams;

  /// What a stream had when it last gave up its mark.
  struct Past {
    StreamRef stream;
    std::unique_ptr<StreamEvent> event;
  };

  /// `of` a stream other than that of the last call.
  template <class Replace>
  [[nodiscard, gnu::noinline]] Marks of_another(StreamRef stream, const Replace& replace) {
    if (!stream.valid()) {
      return 0;
    }
    if (stream.driver().runs_at_once()) {
      return 0;
    }
    auto found = std::find(streams_.begin(), streams_.end(), stream);
    if (found == streams_.end()) {
      found = std::find(streams_.begin(), streams_.end(), StreamRef());
    }
    if (found == streams_.end()) {
      replace(give_up());
      found = std::find(streams_.begin(), streams_.end(), StreamRef());
    }
    *found = stream;
    last_ = static_cast<std::size_t>(found - streams_.begin());
    return mark(last_);
  }

  [[nodiscard]] static constexpr Marks mark(std::size_t place) noexcept {
    return Marks{1} << place;
  }

  /// Calls `visit` with every stream that has one of the marks, and the mark; `self` left out.
  template <class Visit>
  void for_each(Marks marks, StreamRef self, const Visit& visit) const {
    for (marks &= ~kPast; marks != 0; marks &= marks - 1) {
      const StreamRef user = streams_[static_cast<std::size_t>(std::countr_zero(marks))];
      if (user.valid() && !(user == self)) {
        visit(user, marks & -marks);
      }
    }
  }

  void check_not_capturing(StreamRef user) const {
    if (user.capture_id() != 0) {
      throw UsageError(
          fmt::format("{}: memory was last used on a stream that is being captured, which nothing "
                      "outside of the capture can wait for",
                      owner_));
    }
  }

  void wait_here(Marks users) {
    const detail::LimitedWait time(limit_);
    const auto wait = [&](StreamRef user) {
      check_not_capturing(user);
      user.synchronize(detail::left_until(time.deadline()));
    };
    if ((users & kPast) != 0) {
      for (const auto& past : past_) {
        wait(past.stream);
      }
      past_.clear();  // all of it is over
    }
    for_each(users, {}, [&](StreamRef user, Marks) { wait(user); });
  }

  /// Frees places.
  [[nodiscard]] GivenUp give_up() {
    GivenUp given_up{.by = kPast, .streams = streams_};
    for (std::size_t place = 0; place < kStreams; ++place) {
      if (streams_[place].capture_id() == 0) {
        remember(streams_[place]);
        given_up.gone |= mark(place);
      }
    }
    if (given_up.gone == 0) {
      throw UsageError(
          fmt::format("{}: more than {} streams are being captured at once", owner_, kStreams));
    }
    // Not before all events stand: where one cannot be recorded nothing has changed.
    for (Marks left = given_up.gone; left != 0; left &= left - 1) {
      streams_[static_cast<std::size_t>(std::countr_zero(left))] = {};
    }
    return given_up;
  }

  void remember(StreamRef stream) {
    auto found = std::find_if(past_.begin(), past_.end(),
                              [&](const Past& past) { return past.stream == stream; });
    if (found == past_.end()) {
      past_.push_back({stream, stream.driver().make_event()});
      found = past_.end() - 1;
    }
    stream.record(*found->event);
  }

  std::string owner_;
  std::chrono::milliseconds limit_;
  std::array<StreamRef, kStreams> streams_;
  std::size_t last_ = 0;  // the place that was asked for last
  std::vector<Past> past_;
};

}  // namespace cohort
