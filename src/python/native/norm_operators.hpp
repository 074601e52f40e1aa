// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cohort/cohort.hpp"
#include "cohort/torch.hpp"
#include "engines.hpp"
#include "operands.hpp"

/// \file
/// The operators of what follows a row-parallel product: the sum, its residual and the norm.

namespace cohort::python {

[[nodiscard]] inline ResidualNorm residual_norm(const at::Tensor& residual,
                                                const at::Tensor& weight, double eps,
                                                const std::optional<at::Tensor>& scale) {
  ResidualNorm norm{.residual = view_of(residual),
                    .weight = const_view_of(weight),
                    .epsilon = static_cast<float>(eps)};
  if (scale) {
    norm.scale = const_view_of(*scale);
  }
  return norm;
}

inline void all_reduce_rms_norm_into(const at::Tensor& out, const at::Tensor& x,
                                     const at::Tensor& residual, const at::Tensor& weight,
                                     double eps, const std::optional<at::Tensor>& scale,
                                     Name group) {
  const GroupUse<> use(group);
  use->all_reduce_rms_norm_into(view_of(out), const_view_of(x),
                                residual_norm(residual, weight, eps, scale), use.stream());
}

inline at::Tensor all_reduce_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                      const at::Tensor& weight, double eps,
                                      const std::optional<at::Tensor>& scale, Name group) {
  GroupUse<> use(group);
  const auto in = const_view_of(x);
  const ResidualNorm norm = residual_norm(residual, weight, eps, scale);
  const at::Tensor out = use.result(x.sizes().vec(), scale ? at::kFloat8_e4m3fn : x.scalar_type());
  use->all_reduce_rms_norm_into(view_of(out), in, norm, use.stream());
  return out;
}

}  // namespace cohort::python
