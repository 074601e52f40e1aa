// SPDX-License-Identifier: Apache-2.0
#include "decode_calls.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace cohort::bench {

namespace {

[[nodiscard]] MergeOptions merge_options(Plan plan) {
  switch (plan) {
    case Plan::staged:
      return {.plan = MergePlan::staged, .staged_precision = StagedPrecision::partial};
    case Plan::staged_fp32:
      return {.plan = MergePlan::staged, .staged_precision = StagedPrecision::f32};
    case Plan::packed:
      return {.plan = MergePlan::packed};
    case Plan::one_kernel:
      return {.plan = MergePlan::one_kernel};
  }
  return {};
}

[[nodiscard]] bool runs(Path path, Plan plan) {
  switch (path) {
    case Path::raw:
    case Path::shared_loop:
    case Path::raw_symmetric:
      return plan == Plan::staged || plan == Plan::staged_fp32;
    case Path::plain:
    case Path::symmetric:
      return plan != Plan::one_kernel;
    case Path::compared:
      return false;  // of single collectives only
    case Path::own:
      return plan == Plan::one_kernel;
  }
  return false;
}

/// Room for the step in the lane's arena and inboxes.
void reserve(const Options& options, const StepShape& shape, Lane& lane) {
  lane.group().reserve_for({.batch = shape.batch,
                            .heads = options.heads,
                            .latent = shape.width,
                            .rope = options.rope,
                            .value = shape.width,
                            .dtype = shape.dtype});
}

/// Every element's row: one for each query and head.
[[nodiscard]] float lse_value(const Session& session, std::int64_t row) {
  return partial_lse(session.rank(), row, session.ranks());
}

/// The staged merge as engines call the bare library: LSEs gathered, the correction written with
/// the heads outermost, so that the reduce-scatter needs no further copy.
struct RawMerge {
  RawMerge(Session& s, const Way& way, Plan plan, const StepShape& step, const Buffer& partial,
           const Buffer& partial_lse)
      : session(s),
        out(partial),
        lse(partial_lse),
        dtype(plan == Plan::staged_fp32 ? DType::f32 : step.dtype),
        converts(dtype != step.dtype) {
    const auto& o = session.options;
    const std::int64_t n = session.ranks();
    lses = allocate(way, {n, step.batch, o.heads}, DType::f32);
    corrected = allocate(way, {o.heads, step.batch, step.width}, dtype);
    sums = allocate(way, {o.heads / n, step.batch, step.width}, dtype);
    merged = converts ? allocate(way, sums.view.shape(), step.dtype) : sums;
  }

  void operator()() const {
    TensorOps& ops = session.bed.backend().ops();
    const StreamRef stream = session.bed.stream();
    session.raw.all_gather(lse.view.data(), lses.view.data(), lse.view.bytes());
    ops.correct_partial(
        {.out = out.view.unsqueeze(), .lse = lse.view.unsqueeze(), .base = LseBase::two}, lses.view,
        session.rank(), corrected.view.transpose(0, 1), stream);
    session.raw.reduce_scatter(corrected.view.data(), sums.view.data(),
                               static_cast<std::size_t>(sums.view.numel()), dtype);
    if (converts) {
      ops.copy(sums.view, merged.view, stream);
    }
  }

  Session& session;
  Buffer out;
  Buffer lse;
  Buffer lses;
  Buffer corrected;
  Buffer sums;
  Buffer merged;  ///< [H/n, B, D]
  DType dtype;
  bool converts;
};

// Results lie heads first in every way, so that all do the same work.

/// Wrong elements of merged heads [H/n, B, D].
[[nodiscard]] std::int64_t wrong_merged(Session& session, const TensorView& merged,
                                        const StepShape& shape) {
  const auto& o = session.options;
  const int n = session.ranks();
  const std::int64_t own = o.heads / n;
  return count_wrong(shape.dtype, fetch(session, merged), [&](std::int64_t i) {
    const std::int64_t d = i % shape.width;
    const std::int64_t block = i / shape.width;
    const std::int64_t b = block % shape.batch;
    const std::int64_t h = block / shape.batch;
    const std::int64_t row = b * o.heads + session.rank() * own + h;
    return merged_value(row * shape.width + d, row, n);
  });
}

/// Wrong elements of gathered queries [H, B, W].
[[nodiscard]] std::int64_t wrong_queries(Session& session, const TensorView& q,
                                         const StepShape& shape) {
  const auto& o = session.options;
  const int n = session.ranks();
  const std::int64_t own = o.heads / n;
  const std::int64_t width = shape.width + o.rope;
  return count_wrong(shape.dtype, fetch(session, q), [&](std::int64_t i) {
    const std::int64_t d = i % width;
    const std::int64_t block = i / width;
    const std::int64_t b = block % shape.batch;
    const std::int64_t h = block / shape.batch;
    const std::int64_t local = b * own + h % own;  // row of the sender's inputs
    const auto sender = static_cast<int>(h / own);
    return d < shape.width ? input_value(sender, local * shape.width + d, n)
                           : input_value(sender, local * o.rope + d - shape.width + 1, n);
  });
}

}  // namespace

std::int64_t query_bytes(const Options& options, const StepShape& shape) {
  return shape.batch * options.heads * (shape.width + options.rope) *
         static_cast<std::int64_t>(size_of(shape.dtype));
}

std::int64_t partial_bytes(const Options& options, const StepShape& shape) {
  return shape.batch * options.heads *
         (shape.width * static_cast<std::int64_t>(size_of(shape.dtype)) +
          static_cast<std::int64_t>(sizeof(float)));
}

bool divides_heads(Session& session, std::string_view bench) {
  if (session.options.heads % session.ranks() == 0) {
    return true;
  }
  session.sink.note(fmt::format("no {} rows: {} ranks do not divide {} heads", bench,
                                session.ranks(), session.options.heads));
  return false;
}

std::vector<MergeWay> merge_ways(Session& session, const StepShape& shape) {
  std::vector<MergeWay> found;
  for (const Way& way : ways(session)) {
    for (const Plan plan : session.options.plans) {
      if (!runs(way.path, plan) || (plan == Plan::staged_fp32 && shape.dtype == DType::f32)) {
        continue;  // in f32 the two staged plans are one
      }
      const DType sums = plan == Plan::staged_fp32 ? DType::f32 : shape.dtype;
      if (way.is_raw() && !way.library->reduces(sums)) {
        leave_out(session, "dcp_merge", way.path, fmt::format("MPI has no {}", to_string(sums)));
        continue;
      }
      found.push_back(
          {{way.path, lane_of(session, way.path, merge_options(plan)), way.library}, plan});
    }
  }
  return found;
}

Variant gather_variant(Session& session, const Way& way, const StepShape& shape) {
  const auto& o = session.options;
  const int n = session.ranks();
  const std::int64_t own = o.heads / n;
  const std::int64_t width = shape.width + o.rope;
  if (way.lane != nullptr) {
    reserve(o, shape, *way.lane);
  }
  const Buffer nope = filled(session, way, {shape.batch, own, shape.width}, shape.dtype,
                             [&](std::int64_t i) { return input_value(session.rank(), i, n); });
  const Buffer pe = filled(session, way, {shape.batch, own, o.rope}, shape.dtype,
                           [&](std::int64_t i) { return input_value(session.rank(), i + 1, n); });
  Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
  const Buffer q = allocate(way, {o.heads, shape.batch, width}, shape.dtype);
  if (way.is_raw()) {
    const Buffer packed = allocate(way, {own, shape.batch, width}, shape.dtype);
    variant.call = [&session, nope, pe, packed, q] {
      session.bed.backend().ops().pack_query(nope.view, pe.view, packed.view.transpose(0, 1),
                                             session.bed.stream());
      session.raw.all_gather(packed.view.data(), q.view.data(), packed.view.bytes());
    };
  } else {
    variant.call = [&session, nope, pe, q, group = &way.lane->group()] {
      group->gather_query_into(q.view.transpose(0, 1), nope.view, pe.view, session.bed.stream());
    };
    variant.before_capture = [&session, shape, lane = way.lane] {
      reserve(session.options, shape, *lane);
    };
  }
  write_before(session, variant, {nope.view, pe.view});
  variant.poison = [&session, q] { poison(session, q.view); };
  variant.wrong = [&session, q, shape] { return wrong_queries(session, q.view, shape); };
  return variant;
}

Variant merge_variant(Session& session, const MergeWay& merge, const StepShape& shape) {
  const auto& o = session.options;
  const int n = session.ranks();
  const Way& way = merge.way;
  if (way.lane != nullptr) {
    reserve(o, shape, *way.lane);
  }
  const Buffer out = filled(session, way, {shape.batch, o.heads, shape.width}, shape.dtype,
                            [&](std::int64_t i) { return partial_value(session.rank(), i, n); });
  Buffer lse = allocate(way, {shape.batch, o.heads}, DType::f32);
  session.bed.synchronize();
  session.bed.put(lse.view.data(), encode(DType::f32, lse.view.numel(), [&](std::int64_t row) {
                    return lse_value(session, row);
                  }));
  Variant variant{.path = std::string(to_string(way.path)),
                  .plan = std::string(to_string(merge.plan)),
                  .lane = way.lane};
  TensorView merged;
  if (way.is_raw()) {
    const RawMerge raw(session, way, merge.plan, shape, out, lse);
    merged = raw.merged.view;
    variant.call = raw;  // keeps its buffers
  } else {
    const Buffer result = allocate(way, {o.heads / n, shape.batch, shape.width}, shape.dtype);
    merged = result.view;
    variant.call = [&session, out, lse, result, group = &way.lane->group()] {
      group->merge_attention_into(result.view.transpose(0, 1), out.view, lse.view, LseBase::two,
                                  session.bed.stream());
    };
    variant.before_capture = [&session, shape, lane = way.lane] {
      reserve(session.options, shape, *lane);
    };
  }
  write_before(session, variant, {out.view, lse.view});
  variant.poison = [&session, merged] { poison(session, merged); };
  variant.wrong = [&session, merged, shape] { return wrong_merged(session, merged, shape); };
  return variant;
}

}  // namespace cohort::bench
