// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <string_view>

#include "cohort/collective_arguments.hpp"
#include "cohort/error.hpp"
#include "cohort/merge_arguments.hpp"
#include "cohort/tensor.hpp"
#include "cohort/transport.hpp"

/// \file
/// What the arguments of a query gather must be, and what follows from them. Pure: every check
/// throws a `UsageError` that names the argument, what was expected and what came.

namespace cohort::detail {

/// A rank's parts of a query as they are gathered: of one type, as bytes where theirs differ.
struct QueryParts {
  QueryTypes types;      ///< As they were given.
  ConstTensorView nope;  ///< [B, H/n, Dn]
  ConstTensorView pe;    ///< [B, H/n, Dr]

  /// Throws unless they have three dimensions, the last without gaps.
  QueryParts(const ConstTensorView& q_nope, const ConstTensorView& q_pe)
      : types{q_nope.dtype(), q_pe.dtype()}, nope(q_nope), pe(q_pe) {
    check_part("gather_query q_nope", "[B, H/n, Dn]", nope);
    check_part("gather_query q_pe", "[B, H/n, Dr]", pe);
    if (types.nope != types.pe) {
      nope = nope.reinterpret(DType::u8);
      pe = pe.reinterpret(DType::u8);
    }
  }

  /// [B, H, Dn + Dr] of all ranks. Throws for parts that differ in batch or heads.
  [[nodiscard]] Dims gathered_shape(const Caller& caller, Device device) const {
    check_on_device("gather_query q_nope", caller, device, nope);
    check_on_device("gather_query q_pe", caller, device, pe);
    check_alike("gather_query q_pe", pe, nope, {nope.size(0), nope.size(1), pe.size(2)});
    const Dims shape{nope.size(0), numel({nope.size(1), caller.size}, "gather_query heads"),
                     nope.size(2) + pe.size(2)};
    static_cast<void>(numel(shape, "gather_query q"));
    return shape;
  }

  /// Throws unless the query of all ranks can be written into `q`.
  void check_into(const TensorView& q, const Caller& caller, Device device) const {
    const Dims shape = gathered_shape(caller, device);
    check_on_device("gather_query q", caller, device, q);
    check_alike("gather_query q", q, nope, shape);
    check_rows("gather_query q", q);
    check_distinct("gather_query q", q);
    check_apart("gather_query q", q, nope);
    check_apart("gather_query q", q, pe);
  }

 private:
  static void check_part(std::string_view argument, std::string_view shape,
                         const ConstTensorView& part) {
    if (part.ndim() != 3) {
      throw UsageError(
          fmt::format("{}: expected {}, got {}", argument, shape, to_string(part.shape())));
    }
    check_dtype(argument, part.dtype());
    check_aligned(argument, part);  // while its type is known
    check_rows(argument, part);
  }
};

}  // namespace cohort::detail
