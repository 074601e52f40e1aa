// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <string_view>

#include "cohort/collective_arguments.hpp"
#include "cohort/dtype.hpp"
#include "cohort/error.hpp"
#include "cohort/residual_norm.hpp"
#include "cohort/tensor.hpp"

/// \file
/// What the arguments of an all-reduce with residual and RMS norm must be. Pure: every check throws
/// a `UsageError` that names the argument, what was expected and what came.

namespace cohort::detail {

/// Throws unless `x` is of that type and shape, on the device, and has no gaps.
template <class Void>
void check_rows_are(std::string_view argument, const Caller& caller, Device device, DType dtype,
                    const Dims& shape, const BasicTensorView<Void>& x) {
  check_on_device(argument, caller, device, x);
  if (x.dtype() != dtype || x.shape() != shape || !x.is_contiguous()) {
    throw UsageError(fmt::format("{}: expected {}{} without gaps, got {}{} with strides {}",
                                 argument, to_string(dtype), to_string(shape), to_string(x.dtype()),
                                 to_string(x.shape()), to_string(x.strides())));
  }
}

/// Throws unless `x` is something that is summed and normed by rows.
template <class Void>
void check_summed_rows(const BasicTensorView<Void>& x) {
  if (x.ndim() != 2 || x.shape()[1] < 1 || !is_attention_dtype(x.dtype()) || !x.is_contiguous()) {
    throw UsageError(
        fmt::format("all_reduce_rms_norm x: expected [B, hidden] of f32, f16 or bf16 with hidden "
                    ">= 1 and without gaps, got {}{} with strides {}",
                    to_string(x.dtype()), to_string(x.shape()), to_string(x.strides())));
  }
}

/// Throws where what is written would overwrite what is only read.
inline void check_not_read(std::string_view argument, const ConstTensorView& x,
                           const ResidualNorm& norm, const TensorView& written) {
  check_apart(argument, written, x);
  check_apart(argument, written, norm.weight);
  if (norm.scale) {
    check_apart(argument, written, *norm.scale);
  }
}

/// Throws unless they are what an all-reduce with residual and norm takes for an output of that
/// type, and the residual lies on nothing else.
inline void check_residual_norm(const Caller& caller, Device device, const ConstTensorView& x,
                                const ResidualNorm& norm, DType out) {
  check_on_device("all_reduce_rms_norm x", caller, device, x);
  check_summed_rows(x);
  const Dims& shape = x.shape();
  check_rows_are("all_reduce_rms_norm residual", caller, device, x.dtype(), shape, norm.residual);
  check_rows_are("all_reduce_rms_norm weight", caller, device, x.dtype(), {shape[1]}, norm.weight);
  if (!std::isfinite(norm.epsilon) || norm.epsilon < 0) {
    throw UsageError(
        fmt::format("all_reduce_rms_norm epsilon: expected a number >= 0, got {}", norm.epsilon));
  }
  if (norm.scale.has_value() != (out == DType::f8_e4m3)) {
    throw UsageError(fmt::format(
        "all_reduce_rms_norm scale: expected one for an out of f8_e4m3 and for no other, got {} "
        "for {}",
        norm.scale ? "one" : "none", to_string(out)));
  }
  if (norm.scale) {
    check_rows_are("all_reduce_rms_norm scale", caller, device, DType::f32, {1}, *norm.scale);
  }
  check_not_read("all_reduce_rms_norm residual", x, norm, norm.residual);
}

/// Throws unless all of them are what such a call takes, and nothing that is written lies on
/// anything else.
inline void check_norm(const Caller& caller, Device device, const NormArguments& arguments) {
  const TensorView& out = arguments.out;
  check_residual_norm(caller, device, arguments.x, arguments.norm, out.dtype());
  check_rows_are("all_reduce_rms_norm out", caller, device,
                 arguments.norm.scale ? DType::f8_e4m3 : arguments.x.dtype(), arguments.x.shape(),
                 out);
  check_not_read("all_reduce_rms_norm out", arguments.x, arguments.norm, out);
  check_apart("all_reduce_rms_norm out", out, arguments.norm.residual);
}

}  // namespace cohort::detail
