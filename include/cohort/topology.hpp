// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"

/// \file
/// Which ranks form which group: arithmetic on rank numbers, without communication and without
/// environment variables.
///
/// A world of `tp * pp` ranks is cut three ways. With tp=4, pp=2, dcp=2:
///
///     world                    0 1 2 3 4 5 6 7
///     tensor parallel          0 1 2 3 | 4 5 6 7         consecutive ranks
///     pipeline parallel        0 4 | 1 5 | 2 6 | 3 7     stride tp
///     decode context parallel  0 1 | 2 3 | 4 5 | 6 7     consecutive, inside one TP group
///
/// DCP adds no ranks: it shares out the KV cache among ranks that TP already has.

namespace cohort {

/// What a group is for.
enum class GroupKind : std::uint8_t {
  world,
  tensor_parallel,
  pipeline_parallel,
  decode_context_parallel,
};

/// The short name that group names and messages carry: "world", "tp", "pp", "dcp".
[[nodiscard]] constexpr std::string_view to_string(GroupKind kind) noexcept {
  switch (kind) {
    case GroupKind::world:
      return "world";
    case GroupKind::tensor_parallel:
      return "tp";
    case GroupKind::pipeline_parallel:
      return "pp";
    case GroupKind::decode_context_parallel:
      return "dcp";
  }
  return "unknown";
}

/// Sizes of the groups of each kind.
struct ParallelLayout {
  int tp = 1;   ///< Ranks of a tensor-parallel group.
  int pp = 1;   ///< Ranks of a pipeline-parallel group: the number of stages.
  int dcp = 1;  ///< Ranks of a decode-context-parallel group; divides `tp`.

  friend bool operator==(const ParallelLayout&, const ParallelLayout&) = default;
};

/// "tp=4 pp=2 dcp=2"
[[nodiscard]] inline std::string to_string(const ParallelLayout& layout) {
  return fmt::format("tp={} pp={} dcp={}", layout.tp, layout.pp, layout.dcp);
}

/// Number of ranks that the layout needs, `tp * pp`.
/// @throw ConfigError if a size is below 1, `tp` is no multiple of `dcp`, or the product does not
/// fit an `int`.
[[nodiscard]] inline int world_size(const ParallelLayout& layout) {
  if (layout.tp < 1 || layout.pp < 1 || layout.dcp < 1) {
    throw ConfigError(fmt::format("layout {}: every size must be at least 1", to_string(layout)));
  }
  if (layout.tp % layout.dcp != 0) {
    throw ConfigError(
        fmt::format("layout {}: tp={} must be a multiple of dcp={}, because DCP groups are cut out "
                    "of TP groups",
                    to_string(layout), layout.tp, layout.dcp));
  }
  const std::int64_t ranks = static_cast<std::int64_t>(layout.tp) * layout.pp;
  if (ranks > std::numeric_limits<int>::max()) {
    throw ConfigError(fmt::format("layout {}: tp*pp={} ranks are more than {} can number",
                                  to_string(layout), ranks, "an int"));
  }
  return static_cast<int>(ranks);
}

/// Checks a layout against the number of ranks that the world has.
/// @throw ConfigError as `world_size`, or if the world does not have `tp * pp` ranks.
inline void validate(const ParallelLayout& layout, int ranks_in_world) {
  const int needed = world_size(layout);
  if (ranks_in_world != needed) {
    throw ConfigError(fmt::format("layout {}: needs tp*pp={} ranks, but the world has {}",
                                  to_string(layout), needed, ranks_in_world));
  }
}

/// Number of ranks in a group of the kind.
/// @throw ConfigError as `world_size`.
[[nodiscard]] inline int group_size(const ParallelLayout& layout, GroupKind kind) {
  const int ranks = world_size(layout);
  switch (kind) {
    case GroupKind::world:
      return ranks;
    case GroupKind::tensor_parallel:
      return layout.tp;
    case GroupKind::pipeline_parallel:
      return layout.pp;
    case GroupKind::decode_context_parallel:
      return layout.dcp;
  }
  throw UsageError(fmt::format("kind: expected a GroupKind, got {}", static_cast<int>(kind)));
}

/// Number of groups of the kind; together they hold every rank of the world once.
/// @throw ConfigError as `world_size`.
[[nodiscard]] inline int group_count(const ParallelLayout& layout, GroupKind kind) {
  return world_size(layout) / group_size(layout, kind);
}

namespace detail {

inline void check_world_rank(const ParallelLayout& layout, int world_rank) {
  const int ranks = world_size(layout);
  if (world_rank < 0 || world_rank >= ranks) {
    throw UsageError(fmt::format("world_rank: expected 0 to {} for layout {}, got {}", ranks - 1,
                                 to_string(layout), world_rank));
  }
}

/// Distance in the world between neighbours of a group.
[[nodiscard]] constexpr int rank_stride(const ParallelLayout& layout, GroupKind kind) noexcept {
  return kind == GroupKind::pipeline_parallel ? layout.tp : 1;
}

}  // namespace detail

/// Which of the kind's groups holds the rank, from 0 in the order of their lowest ranks.
/// @throw ConfigError as `world_size`; UsageError if the rank is not in the world.
[[nodiscard]] inline int group_index(const ParallelLayout& layout, GroupKind kind, int world_rank) {
  detail::check_world_rank(layout, world_rank);
  return kind == GroupKind::pipeline_parallel ? world_rank % layout.tp
                                              : world_rank / group_size(layout, kind);
}

/// Position of the rank within its group of the kind, from 0.
/// @throw ConfigError as `world_size`; UsageError if the rank is not in the world.
[[nodiscard]] inline int rank_in_group(const ParallelLayout& layout, GroupKind kind,
                                       int world_rank) {
  detail::check_world_rank(layout, world_rank);
  return kind == GroupKind::pipeline_parallel ? world_rank / layout.tp
                                              : world_rank % group_size(layout, kind);
}

/// World ranks of the group with this index, ascending; the position is the rank in the group.
/// @throw ConfigError as `world_size`; UsageError if there is no such group.
[[nodiscard]] inline std::vector<int> group_ranks_of_index(const ParallelLayout& layout,
                                                           GroupKind kind, int index) {
  const int count = group_count(layout, kind);
  if (index < 0 || index >= count) {
    throw UsageError(fmt::format("index: expected 0 to {} for the {} groups of layout {}, got {}",
                                 count - 1, to_string(kind), to_string(layout), index));
  }
  const int size = group_size(layout, kind);
  const int stride = detail::rank_stride(layout, kind);
  const int first = stride == 1 && kind != GroupKind::pipeline_parallel ? index * size : index;
  std::vector<int> ranks(static_cast<std::size_t>(size));
  for (int position = 0; position < size; ++position) {
    ranks[static_cast<std::size_t>(position)] = first + position * stride;
  }
  return ranks;
}

/// World ranks of the kind's group that holds `world_rank`, ascending; the position is the rank in
/// the group.
/// @throw ConfigError as `world_size`; UsageError if the rank is not in the world.
[[nodiscard]] inline std::vector<int> group_ranks(const ParallelLayout& layout, GroupKind kind,
                                                  int world_rank) {
  return group_ranks_of_index(layout, kind, group_index(layout, kind, world_rank));
}

/// Every group of the kind, by index.
/// @throw ConfigError as `world_size`.
[[nodiscard]] inline std::vector<std::vector<int>> all_groups(const ParallelLayout& layout,
                                                              GroupKind kind) {
  const int count = group_count(layout, kind);
  std::vector<std::vector<int>> groups;
  groups.reserve(static_cast<std::size_t>(count));
  for (int index = 0; index < count; ++index) {
    groups.push_back(group_ranks_of_index(layout, kind, index));
  }
  return groups;
}

/// Name of a group in messages: "dcp[1]"; the one world is "world". Nothing reads it back.
[[nodiscard]] inline std::string group_name(GroupKind kind, int index) {
  return kind == GroupKind::world ? std::string(to_string(kind))
                                  : fmt::format("{}[{}]", to_string(kind), index);
}

}  // namespace cohort
