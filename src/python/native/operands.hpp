// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "cohort/cohort.hpp"

/// \file
/// What operators are given and give back, as torch's schemas know it.

namespace cohort::python {

using Name = c10::string_view;
using Names = std::vector<std::string>;
using Sizes = std::vector<std::int64_t>;

/// A dimension or a rank: Python's numbers have no end, and what is beyond every one stays so.
[[nodiscard]] inline int as_int(std::int64_t number) {
  return static_cast<int>(std::clamp<std::int64_t>(number, std::numeric_limits<int>::min(),
                                                   std::numeric_limits<int>::max()));
}

[[nodiscard]] inline ReduceOp op_of(std::string_view name) {
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max}) {
    if (name == to_string(op)) {
      return op;
    }
  }
  throw UsageError(fmt::format("op: expected sum, prod, min or max, got {}", name));
}

/// The extents of `x` with that of `dim` made `times` as large, or divided where `times` is
/// negative. What does not divide is found by the call.
[[nodiscard]] inline Sizes scaled(const at::Tensor& x, std::int64_t dim, int times,
                                  std::string_view argument) {
  Sizes shape = x.sizes().vec();
  auto& extent = shape[static_cast<std::size_t>(
      normalize_dim(as_int(dim), static_cast<int>(shape.size()), argument))];
  extent = times > 0 ? extent * times : extent / -times;
  return shape;
}

}  // namespace cohort::python
