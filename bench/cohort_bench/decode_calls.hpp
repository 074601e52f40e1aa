// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>
#include <vector>

#include "ways.hpp"

/// \file
/// The two calls of a decode step's layer, by every path and plan.

namespace cohort::bench {

/// The sizes of a step: what the options say, in one type.
struct StepShape {
  std::int64_t batch = 0;
  DType dtype = DType::bf16;
  std::int64_t width = 0;  ///< Of a head's query but for its rotary part, and of its output.
};

/// Queries gathered: [B, H, Dn + Dr].
[[nodiscard]] std::int64_t query_bytes(const Options& options, const StepShape& shape);
/// Partial attentions merged, with their LSEs: [B, H, D] and [B, H] in f32.
[[nodiscard]] std::int64_t partial_bytes(const Options& options, const StepShape& shape);

/// A merge by a path: the bare library knows the staged plans, Cohort without its own kernels also
/// `packed`, and its kernels `one_kernel`.
struct MergeWay {
  Way way;
  Plan plan = Plan::staged;
};

/// Collective. Those among the paths and plans asked for that can be measured.
[[nodiscard]] std::vector<MergeWay> merge_ways(Session& session, const StepShape& shape);

/// Collective. One query gather; `call` is empty where heads cannot be shared out.
[[nodiscard]] Variant gather_variant(Session& session, const Way& way, const StepShape& shape);

/// Collective. One merge, with base-two LSEs whose weights are powers of two.
[[nodiscard]] Variant merge_variant(Session& session, const MergeWay& merge,
                                    const StepShape& shape);

/// Whether the ranks divide the heads; a note says so otherwise.
[[nodiscard]] bool divides_heads(Session& session, std::string_view bench);

}  // namespace cohort::bench
