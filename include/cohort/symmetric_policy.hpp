// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "cohort/topology.hpp"

/// \file
/// Whether a group gets symmetric memory, and why. A pure function of what the user asked for and
/// of what the backend found out; it neither probes nor logs.

namespace cohort {

/// A set of group kinds.
class GroupKindSet {
 public:
  constexpr GroupKindSet() noexcept = default;
  /// Exactly these kinds.
  constexpr GroupKindSet(std::initializer_list<GroupKind> kinds) noexcept {
    for (const GroupKind kind : kinds) {
      bits_ |= bit(kind);
    }
  }

  /// One more.
  constexpr void insert(GroupKind kind) noexcept { bits_ |= bit(kind); }
  /// Whether the kind is in the set.
  [[nodiscard]] constexpr bool contains(GroupKind kind) const noexcept {
    return (bits_ & bit(kind)) != 0;
  }

  friend constexpr bool operator==(const GroupKindSet&, const GroupKindSet&) noexcept = default;

 private:
  static constexpr std::uint32_t bit(GroupKind kind) noexcept {
    return std::uint32_t{1} << static_cast<unsigned>(kind);
  }

  std::uint32_t bits_ = 0;
};

/// Which kinds of groups the user wants in symmetric memory.
class Selection {
 public:
  /// DCP only when `dcp > 1`, TP, PP and DCP otherwise: a decode that shards its KV cache is bound
  /// by the latency of the DCP collectives, and each further kind costs registered memory.
  [[nodiscard]] static constexpr Selection automatic() noexcept {
    return Selection(true, GroupKindSet{});
  }
  /// TP, PP and DCP at once. The world carries no layer's data and needs naming in `of`.
  [[nodiscard]] static constexpr Selection all() noexcept { return Selection(false, kAll); }
  /// Windows nowhere.
  [[nodiscard]] static constexpr Selection none() noexcept {
    return Selection(false, GroupKindSet{});
  }
  /// Exactly these kinds.
  [[nodiscard]] static constexpr Selection of(GroupKindSet kinds) noexcept {
    return Selection(false, kinds);
  }

  /// Whether groups of the kind are selected under a layout.
  [[nodiscard]] constexpr bool selects(GroupKind kind,
                                       const ParallelLayout& layout) const noexcept {
    if (!automatic_) {
      return kinds_.contains(kind);
    }
    return layout.dcp > 1 ? kind == GroupKind::decode_context_parallel : kAll.contains(kind);
  }

  friend constexpr bool operator==(const Selection&, const Selection&) noexcept = default;

 private:
  static constexpr GroupKindSet kAll = {GroupKind::tensor_parallel, GroupKind::pipeline_parallel,
                                        GroupKind::decode_context_parallel};

  constexpr Selection(bool automatic, GroupKindSet kinds) noexcept
      : automatic_(automatic), kinds_(kinds) {}

  bool automatic_;
  GroupKindSet kinds_;
};

/// What the user asks for. Must be equal on all ranks.
struct SymmetricOptions {
  /// Whether callers' buffers may lie in windows. The library's own inboxes do not depend on it.
  bool enabled = false;
  /// Which groups get windows while `enabled`.
  Selection selection = Selection::automatic();
  /// `false` keeps groups from the one-kernel merge and the fused query gather. What a transport
  /// maps at all is its backend's option.
  bool peer_mapping = true;
};

/// Where a backend's tensors lie.
enum class BackendKind : std::uint8_t { host, cuda };

/// "host" or "cuda".
[[nodiscard]] constexpr std::string_view to_string(BackendKind kind) noexcept {
  return kind == BackendKind::host ? "host" : "cuda";
}

/// What the backend found out about one group. Facts must be agreed on by the group's ranks before
/// they come here (`true` where it holds on every rank, the smallest version, the largest count of
/// hosts), so that every rank decides alike. The defaults say "nothing is known to work".
struct SymmetricCapabilities {
  BackendKind backend = BackendKind::host;  ///< Whose capabilities these are.

  /// cuda: windows were compiled in and the NCCL that was loaded exports them. host: segments are
  /// memory files that other processes can map. A registration that returned a handle proves
  /// nothing and must not be used as evidence.
  bool transport_windows = false;

  // NCCL's view; not read for the host backend.
  int nccl_header_version = 0;      ///< `NCCL_VERSION_CODE` that was compiled against.
  int nccl_runtime_version = 0;     ///< From `ncclGetVersion`.
  bool nccl_win_enable = true;      ///< `NCCL_WIN_ENABLE`, whose default is on.
  bool nccl_cumem_enabled = false;  ///< NCCL allocates by `cuMemCreate` (`NCCL_CUMEM_ENABLE`).
  int nccl_hosts = 0;               ///< Distinct hosts as NCCL counts them (`NCCL_HOSTID` counts).
  bool nvlink_reach = false;        ///< Every rank reaches every other inside one NVLink domain.

  // The machine's view, for peer mappings and for the host backend's windows.
  int machines = 0;          ///< Distinct boot ids; `NCCL_HOSTID` plays no part.
  bool peer_access = false;  ///< Every device can load from and store to every other; host: true.
  bool peer_import = false;  ///< Every rank imported a trial segment of every other.

  /// What stood in the way of `peer_import` or of the host's `transport_windows`: the first cause
  /// with its rank and native code, the same text on every rank; empty where nobody knows more.
  std::string obstacle = {};
};

/// Why windows or peer mapping are on or off.
enum class Reason : std::uint8_t {
  granted,
  disabled_by_user,
  single_rank,
  not_selected,
  no_window_support,
  nccl_too_old,
  out_of_nvlink_reach,
  out_of_peer_reach,
};

/// In words, as `describe` prints it.
[[nodiscard]] constexpr std::string_view to_string(Reason reason) noexcept {
  switch (reason) {
    case Reason::granted:
      return "granted";
    case Reason::disabled_by_user:
      return "disabled by user";
    case Reason::single_rank:
      return "single rank";
    case Reason::not_selected:
      return "not selected";
    case Reason::no_window_support:
      return "no window support";
    case Reason::nccl_too_old:
      return "NCCL too old";
    case Reason::out_of_nvlink_reach:
      return "ranks out of NVLink reach";
    case Reason::out_of_peer_reach:
      return "ranks out of peer reach";
  }
  return "unknown";
}

/// One yes or no. `on` holds exactly if `reason` is `granted`; `detail` names the fact behind the
/// reason and may be empty.
struct Answer {
  bool on = false;                       ///< Whether the group has it.
  Reason reason = Reason::not_selected;  ///< Why.
  std::string detail;                    ///< What the backend adds, such as a call and its errno.
};

/// The two independent answers for one group.
struct SymmetricDecision {
  GroupKind kind = GroupKind::world;  ///< Of the group that was decided about.
  int group_size = 1;                 ///< Its ranks.
  /// The user asked for symmetric memory in this group, and the group has peers to share it with.
  bool requested = false;
  /// Callers' buffers are registered: NCCL's windows, on the host backend the host's own.
  Answer nccl_windows;
  /// The library's kernels and inboxes may address peers' memory. Independent of `enabled` and of
  /// the selection, which concern callers' buffers.
  Answer peer_mapping;
};

/// The first NCCL with `ncclCommWindowRegister` and symmetric kernels, as a version code: 2.27.3.
/// Source: NCCL's release notes of 2.27.3-1.
inline constexpr int kMinNcclForWindows = 22703;

/// "2.28.3" for a version code of NCCL 2.9 or later, 10000 * major + 100 * minor + patch.
[[nodiscard]] inline std::string nccl_version_string(int code) {
  return fmt::format("{}.{}.{}", code / 10000, code / 100 % 100, code % 100);
}

namespace detail {

[[nodiscard]] inline Answer granted() { return {true, Reason::granted, {}}; }
[[nodiscard]] inline Answer refused(Reason reason, std::string text = {}) {
  return {false, reason, std::move(text)};
}

/// Whether every rank can address every other's memory by the machine's own means.
[[nodiscard]] inline Answer reach_peers(const SymmetricCapabilities& found) {
  if (found.machines != 1) {
    return refused(
        Reason::out_of_peer_reach,
        fmt::format("the ranks run on {} machines, told apart by boot id", found.machines));
  }
  if (!found.peer_import && !found.obstacle.empty()) {
    return refused(Reason::out_of_peer_reach, found.obstacle);
  }
  if (!found.peer_access) {
    return refused(Reason::out_of_peer_reach, "not every device can access every other's memory");
  }
  if (!found.peer_import) {
    return refused(Reason::out_of_peer_reach, "a rank could not import a segment of another rank");
  }
  return granted();
}

[[nodiscard]] inline Answer reach_windows_nccl(const SymmetricCapabilities& found) {
  if (found.nccl_header_version < kMinNcclForWindows) {
    return refused(Reason::no_window_support,
                   fmt::format("built with NCCL {}; windows need a build with {} or later",
                               nccl_version_string(found.nccl_header_version),
                               nccl_version_string(kMinNcclForWindows)));
  }
  if (found.nccl_runtime_version < kMinNcclForWindows) {
    return refused(Reason::nccl_too_old,
                   fmt::format("NCCL {} was loaded; windows need {} or later",
                               nccl_version_string(found.nccl_runtime_version),
                               nccl_version_string(kMinNcclForWindows)));
  }
  if (!found.transport_windows) {
    return refused(Reason::no_window_support,
                   fmt::format("the NCCL {} that was loaded cannot register windows",
                               nccl_version_string(found.nccl_runtime_version)));
  }
  if (!found.nccl_win_enable) {
    return refused(Reason::no_window_support, "NCCL_WIN_ENABLE=0 is set");
  }
  if (!found.nccl_cumem_enabled) {
    return refused(Reason::no_window_support,
                   "NCCL does not allocate by cuMem (NCCL_CUMEM_ENABLE=0 or no driver support)");
  }
  if (found.nccl_hosts != 1) {
    return refused(Reason::out_of_nvlink_reach,
                   fmt::format("NCCL counts {} hosts", found.nccl_hosts));
  }
  if (!found.nvlink_reach) {
    return refused(Reason::out_of_nvlink_reach, "the ranks share no NVLink domain");
  }
  return granted();
}

[[nodiscard]] inline Answer reach_windows(const SymmetricCapabilities& found) {
  if (found.backend == BackendKind::cuda) {
    return reach_windows_nccl(found);
  }
  if (!found.transport_windows) {
    return refused(Reason::no_window_support,
                   fmt::format("segments are not memory files here{}{}",
                               found.obstacle.empty() ? "" : ": ", found.obstacle));
  }
  return reach_peers(found);
}

}  // namespace detail

/// Decides for a group of the kind. Where several reasons hold, the answer carries the first of:
/// disabled by user, single rank, not selected, built without windows, NCCL too old, windows
/// missing or turned off at run time, out of reach.
///
/// @throw ConfigError if the layout cannot work (`world_size`).
[[nodiscard]] inline SymmetricDecision decide(const SymmetricOptions& options, GroupKind kind,
                                              const ParallelLayout& layout,
                                              const SymmetricCapabilities& capabilities) {
  const int size = group_size(layout, kind);
  const bool selected = options.selection.selects(kind, layout);
  SymmetricDecision decision{.kind = kind,
                             .group_size = size,
                             .requested = options.enabled && selected && size > 1,
                             .nccl_windows = {},
                             .peer_mapping = {}};

  if (!options.enabled) {
    decision.nccl_windows = detail::refused(Reason::disabled_by_user);
  } else if (size == 1) {
    decision.nccl_windows = detail::refused(Reason::single_rank);
  } else if (!selected) {
    decision.nccl_windows = detail::refused(Reason::not_selected);
  } else {
    decision.nccl_windows = detail::reach_windows(capabilities);
  }

  if (!options.peer_mapping) {
    decision.peer_mapping = detail::refused(Reason::disabled_by_user);
  } else if (size == 1) {
    decision.peer_mapping = detail::refused(Reason::single_rank);
  } else {
    decision.peer_mapping = detail::reach_peers(capabilities);
  }
  return decision;
}

/// Whether the group deserves its one warning: the user asked for symmetric memory in it, and the
/// machine, not the user, denies one of the two answers. A group of one loses nothing.
[[nodiscard]] inline bool warning_due(const SymmetricDecision& decision) noexcept {
  const auto denied = [](const Answer& answer) {
    return !answer.on && answer.reason != Reason::disabled_by_user;
  };
  return decision.requested && (denied(decision.nccl_windows) || denied(decision.peer_mapping));
}

/// Why: "ranks out of peer reach: a rank could not import a segment of another rank".
[[nodiscard]] inline std::string explain(const Answer& answer) {
  return answer.detail.empty() ? std::string(to_string(answer.reason))
                               : fmt::format("{}: {}", to_string(answer.reason), answer.detail);
}

/// One line: "dcp of 4 ranks: windows on; peer mapping off (ranks out of peer reach: ...)".
[[nodiscard]] inline std::string describe(const SymmetricDecision& decision) {
  const auto words = [](const Answer& answer) {
    return answer.on ? std::string("on") : fmt::format("off ({})", explain(answer));
  };
  return fmt::format("{} of {} rank{}: windows {}; peer mapping {}", to_string(decision.kind),
                     decision.group_size, decision.group_size == 1 ? "" : "s",
                     words(decision.nccl_windows), words(decision.peer_mapping));
}

}  // namespace cohort
