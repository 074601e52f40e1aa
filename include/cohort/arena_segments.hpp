// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/agreement.hpp"
#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/give_up.hpp"
#include "cohort/hash.hpp"
#include "cohort/transport.hpp"

/// \file
/// The segments of an arena, and their windows in each group that it is for.

namespace cohort {

/// The groups that an arena's segments are registered with, and where their ranks agree.
struct Audience {
  /// Of a group that holds every rank of each of these groups; of the group itself where it is one.
  /// Its limit is that of the arena's waits; `kDefaultTimeLimit` where it is null.
  ControlPlane* control = nullptr;
  std::vector<Transport*> transports = {};  ///< In the same order on every rank.
  /// Of `control`, and of each of `transports`, so that a rank that was missed in a registration is
  /// named in the numbers of all; groups without them are told who missed it.
  detail::Numbering everyone = {};
  std::vector<detail::Numbering> groups = {};  ///< By transport.
};

/// Allocates segments, registers each with every group of an audience, and gives all their memory
/// one space of offsets. Without a group the segments are memory without windows.
class ArenaSegments {
 public:
  /// A part of the space of offsets.
  struct Range {
    std::uint64_t offset = 0;  ///< Its first byte.
    std::uint64_t bytes = 0;   ///< Its length.
  };

  /// Throws `UsageError` for groups without a control plane.
  ArenaSegments(Backend& backend, std::string arena, Audience audience)
      : backend_(&backend),
        arena_(std::move(arena)),
        audience_(with_control(std::move(audience), arena_)),
        needs_equal_offsets_(
            std::any_of(audience_.transports.begin(), audience_.transports.end(),
                        [](const Transport* group) { return group->needs_equal_offsets(); })) {}

  /// Whose memory it is.
  [[nodiscard]] Backend& backend() const noexcept { return *backend_; }
  /// How many there are.
  [[nodiscard]] std::size_t count() const noexcept { return segments_.size(); }
  /// Whether there are groups.
  [[nodiscard]] bool has_audience() const noexcept { return !audience_.transports.empty(); }
  /// Where the audience's ranks agree.
  [[nodiscard]] ControlPlane& control() const noexcept { return *audience_.control; }
  /// Of a wait.
  [[nodiscard]] std::chrono::milliseconds limit() const noexcept {
    return audience_.control != nullptr ? audience_.control->limit() : kDefaultTimeLimit;
  }
  /// Whether one of the groups takes equal offsets for granted.
  [[nodiscard]] bool needs_equal_offsets() const noexcept { return needs_equal_offsets_; }

  /// Where an offset lies in this process.
  [[nodiscard]] void* address(std::uint64_t offset) const noexcept {
    return bases_[index(offset)] + (offset & ((std::uint64_t{1} << kBits) - 1));
  }
  /// The offset of an address; nothing for memory of others.
  [[nodiscard]] std::optional<std::uint64_t> offset_of(const void* address) const noexcept {
    const auto target = reinterpret_cast<std::uintptr_t>(address);
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      const auto base = reinterpret_cast<std::uintptr_t>(segments_[i]->data());
      if (target >= base && target - base < segments_[i]->bytes()) {
        return (std::uint64_t{i} << kBits) + (target - base);
      }
    }
    return std::nullopt;
  }
  /// The segment that an offset lies in, for those who may outlive this.
  [[nodiscard]] const std::shared_ptr<Segment>& holding(std::uint64_t offset) const noexcept {
    return segments_[index(offset)];
  }

  /// `hash`, mixed with the sizes of all.
  [[nodiscard]] std::uint64_t mixed(std::uint64_t hash) const noexcept {
    for (const auto& segment : segments_) {
      hash = detail::mix(hash, segment->bytes());
    }
    return hash;
  }

  /// Throws `UsageError` where no segment could ever have so many bytes.
  void throw_if_too_large(std::size_t bytes) const {
    if (bytes > std::size_t{1} << (kBits - 1)) {
      throw UsageError(fmt::format("arena {}: a segment of {} bytes is too large", arena_, bytes));
    }
  }

  /// Collective. Compares what the ranks are about to do, so that one that is elsewhere is named
  /// with the place. Throws as `agree`; nothing happens without an audience.
  void agree_before(std::string_view what, std::size_t bytes, std::uint64_t history) {
    agree_on({.place = fmt::format("{} arena {}", what, arena_),
              .sequence = segments_.size(),
              .bytes = bytes,
              .history = history});
  }

  /// Collective. A new segment of at least `bytes`, rounded up to what the backend allocates, and
  /// its windows. Returns its offsets. Throws `UsageError` where it would be too large, and on
  /// every rank what failed on any; nothing has changed then.
  Range add(std::size_t bytes, std::uint64_t history) {
    const std::size_t unit = backend_->segment_granularity();
    const std::size_t size = (bytes + unit - 1) / unit * unit;
    if (size >> kBits != 0 || segments_.size() >> (60 - kBits) != 0) {
      throw UsageError(fmt::format("arena {}: a segment of {} bytes is too large", arena_, size));
    }
    Intent intent{.place = fmt::format("allocation of a segment of arena {}", arena_),
                  .sequence = segments_.size(),
                  .bytes = size,
                  .history = history};
    std::unique_ptr<Segment> segment;
    std::exception_ptr failure;
    try {
      segment =
          has_audience() ? backend_->allocate_segment(size) : backend_->allocate_workspace(size);
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    agree_on(intent, failure);
    register_with_all(*segment, intent);
    bases_.push_back(static_cast<std::byte*>(segment->data()));
    segments_.push_back(std::move(segment));
    return {.offset = std::uint64_t{segments_.size() - 1} << kBits, .bytes = size};
  }

  /// Ends every window, the newest first.
  void deregister() noexcept {
    while (!windows_.empty()) {
      windows_.pop_back();
    }
  }
  /// Frees the memory that nobody else holds.
  void free() noexcept {
    segments_.clear();
    bases_.clear();
  }

 private:
  // A segment's bytes are numbered from its own multiple of 2^44, so that no block spans two
  // segments and one allocator serves them all.
  static constexpr unsigned kBits = 44;

  [[nodiscard]] static Audience with_control(Audience audience, const std::string& arena) {
    if (!audience.transports.empty() && audience.control == nullptr) {
      throw UsageError(
          fmt::format("arena {}: expected a control plane for its audience, got null", arena));
    }
    return audience;
  }

  [[nodiscard]] static constexpr std::size_t index(std::uint64_t offset) noexcept {
    return static_cast<std::size_t>(offset >> kBits);
  }

  /// Throws `own`, this rank's failure, as every agreement does, and alone where there is nobody to
  /// agree with.
  void agree_on(const Intent& intent, const std::exception_ptr& own = nullptr,
                std::chrono::milliseconds patience = {},
                const std::optional<detail::GiveUp>& told = std::nullopt) const {
    if (has_audience()) {
      cohort::agree(*audience_.control, intent, own, patience, told);
    } else if (own) {
      std::rethrow_exception(own);
    }
  }

  /// Registers with every group, in the audience's order. After each the whole audience makes sure
  /// that all could: a registration that a peer never joins may not end.
  void register_with_all(Segment& segment, Intent intent) {
    std::vector<std::unique_ptr<Window>> windows;
    for (std::size_t i = 0; i < audience_.transports.size(); ++i) {
      std::exception_ptr failure;
      try {
        windows.push_back(audience_.transports[i]->register_segment(segment));
      } catch (const std::exception&) {
        failure = std::current_exception();
      }
      intent.place = fmt::format("registration of a segment of arena {} with group {} of {}",
                                 arena_, i + 1, audience_.transports.size());
      agree_on(intent, failure, patience_after_a_wait(*audience_.control), cause(failure, i));
    }
    std::move(windows.begin(), windows.end(), std::back_inserter(windows_));
  }

  /// What the audience learns of a failure of the registration with a group, in its own numbers.
  [[nodiscard]] std::optional<detail::GiveUp> cause(const std::exception_ptr& failure,
                                                    std::size_t group) const {
    if (!failure || group >= audience_.groups.size()) {
      return std::nullopt;
    }
    const detail::Numbering& there = audience_.groups[group];
    const int self = audience_.everyone.world[static_cast<std::size_t>(audience_.control->rank())];
    const auto place = std::find(there.world.begin(), there.world.end(), self);
    return detail::GiveUp::because(failure, static_cast<int>(place - there.world.begin()))
        .across(there, audience_.everyone);
  }

  Backend* backend_;
  std::string arena_;
  Audience audience_;
  bool needs_equal_offsets_;
  std::vector<std::byte*> bases_;  // of the segments
  std::vector<std::shared_ptr<Segment>> segments_;
  std::vector<std::unique_ptr<Window>> windows_;  // destroyed before the segments
};

}  // namespace cohort
