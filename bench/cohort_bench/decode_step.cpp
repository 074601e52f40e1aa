// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "benches.hpp"
#include "decode_calls.hpp"
#include "headline.hpp"
#include "statistics.hpp"

namespace cohort::bench {

namespace {

/// Bytes of the latent KV cache of all layers, the same in every rank without DCP.
[[nodiscard]] std::int64_t kv_bytes(const Options& options, const StepShape& shape) {
  return options.layers * options.context * shape.batch * (options.head_dim + options.rope) *
         static_cast<std::int64_t>(size_of(shape.dtype));
}

[[nodiscard]] Case token_case(Session& session, std::string_view bench, const StepShape& shape,
                              std::int64_t bytes) {
  return {.bench = std::string(bench),
          .dtype = std::string(to_string(shape.dtype)),
          .bytes = bytes,
          .batch = shape.batch,
          .bus_factor = gather_bus_factor(session.ranks()),
          .most_calls = 1,
          .warmup = 1};
}

/// Adds, for each mode, the local attention alone; its time is taken off the ways'.
[[nodiscard]] std::array<std::optional<std::size_t>, 2> add_stand_ins(Session& session,
                                                                      Case& work) {
  std::array<std::optional<std::size_t>, 2> index;
  for (const Mode mode : session.options.modes) {
    index[static_cast<std::size_t>(mode)] = work.variants.size();
    work.variants.push_back({.mode = mode,
                             .call =
                                 [&session] {
                                   for (std::int64_t l = 0; l < session.options.layers; ++l) {
                                     session.bed.stand_in(false);
                                   }
                                 },
                             .hidden = true});
  }
  return index;
}

/// Whether a path's kernels wait for the end of the kernel before them: Cohort's do, and NCCL's may
/// not.
[[nodiscard]] bool waits_itself(Path path) { return path == Path::own; }

/// What the calls of a layer write, in all layers; nothing where they do not.
[[nodiscard]] std::function<void()> in_all_layers(const Session& session,
                                                  std::vector<std::function<void()>> writing) {
  if (session.options.inputs != Inputs::written) {
    return {};
  }
  return [layers = session.options.layers, writing = std::move(writing)] {
    for (std::int64_t l = 0; l < layers; ++l) {
      for (const auto& write : writing) {
        write();
      }
    }
  };
}

/// One token through all layers, in one variant.
[[nodiscard]] Variant token_variant(Session& session, const MergeWay& way, const StepShape& shape) {
  const Variant gather = gather_variant(session, way.way, shape);
  const Variant merge = merge_variant(session, way, shape);
  Variant token = merge;
  token.call = [&session, gather, merge, waits = waits_itself(way.way.path)] {
    for (std::int64_t l = 0; l < session.options.layers; ++l) {
      gather.call();
      session.bed.stand_in(waits);
      merge.call();
    }
  };
  token.writing = in_all_layers(session, {gather.writing, merge.writing});
  token.poison = [gather, merge] {
    gather.poison();
    merge.poison();
  };
  token.wrong = [gather, merge] { return gather.wrong() + merge.wrong(); };
  token.kv_bytes_per_rank = kv_bytes(session.options, shape) / session.ranks();
  return token;
}

/// Eagerly only the staged merge is of interest: it is what engines without graphs run.
[[nodiscard]] bool is_wanted(const MergeWay& way, Mode mode) {
  const bool staged = way.plan == Plan::staged || way.plan == Plan::staged_fp32;
  const bool ordinary = way.way.path == Path::raw || way.way.path == Path::plain;
  return mode == Mode::graph || (staged && ordinary);
}

void dcp_case(Session& session, std::string_view bench, const StepShape& shape) {
  const auto& options = session.options;
  Case work =
      token_case(session, bench, shape,
                 options.layers * (query_bytes(options, shape) + partial_bytes(options, shape)));
  const auto stand_in = add_stand_ins(session, work);
  for (const MergeWay& way : merge_ways(session, shape)) {
    const Variant token = token_variant(session, way, shape);
    for (const Mode mode : options.modes) {
      if (is_wanted(way, mode)) {
        work.variants.push_back(token);
        work.variants.back().mode = mode;
        work.variants.back().subtract = stand_in[static_cast<std::size_t>(mode)];
      }
    }
  }
  session.runner.run(work);
}

/// Tensor parallelism without DCP: every rank holds the whole latent cache and attends for its own
/// heads, so that the attention communicates nothing. What remains is the reduce after the output
/// projection, which a model with DCP has as well.
void tensor_parallel_case(Session& session, const StepShape& shape) {
  const auto& options = session.options;
  const std::int64_t count = shape.batch * options.hidden;
  Case work = token_case(session, "decode_step", shape,
                         options.layers * count * static_cast<std::int64_t>(size_of(shape.dtype)));
  work.bus_factor = all_reduce_bus_factor(session.ranks());
  const auto stand_in = add_stand_ins(session, work);
  for (const Way& way : ways(session)) {
    const Variant reduce = all_reduce_variant(session, way, shape.dtype, count);
    if (!reduce.call) {
      continue;
    }
    Variant token = reduce;
    token.plan = kTensorParallelOnly;
    token.call = [&session, reduce, waits = waits_itself(way.path)] {
      for (std::int64_t l = 0; l < session.options.layers; ++l) {
        session.bed.stand_in(waits);
        reduce.call();
      }
    };
    token.writing = in_all_layers(session, {reduce.writing});
    token.kv_bytes_per_rank = kv_bytes(options, shape);
    const Mode mode = options.has(Mode::graph) ? Mode::graph : Mode::eager;
    token.mode = mode;
    token.subtract = stand_in[static_cast<std::size_t>(mode)];
    work.variants.push_back(std::move(token));
  }
  session.runner.run(work);
}

}  // namespace

void bench_decode_step(Session& session) {
  if (!divides_heads(session, "decode_step")) {
    return;
  }
  for (const DType dtype : session.options.dtypes) {
    for (const std::int64_t batch : session.options.batches) {
      const StepShape shape{batch, dtype, session.options.head_dim};
      dcp_case(session, "decode_step", shape);
      tensor_parallel_case(session, shape);
      // Queries before they are absorbed, and partials behind the up-projection of values.
      dcp_case(session, "decode_step_unabsorbed", {batch, dtype, session.options.unabsorbed});
      if (session.runner.stopped()) {
        return;
      }
      session.sink.print(
          headline(session.sink.rows(), to_string(dtype), batch, session.options.layers));
    }
  }
}

}  // namespace cohort::bench
