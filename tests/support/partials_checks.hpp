// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "support/decode_cases.hpp"
#include "support/partials.hpp"
#include "support/skip.hpp"

/// \file
/// Merges of splits, with sinks and ranks without tokens, into every result, against a reference in
/// fp64, as bodies that every rank runs.

namespace cohort::test {

/// Merges one case with one plan, in both forms, and compares; returns the bits.
inline std::vector<std::byte> merge_partials_once(DecodeContextParallelGroup& dcp,
                                                  const PartialsCase& c, const std::string& what,
                                                  bool narrow = false, StreamRef stream = {}) {
  Site site(dcp, c.memory, stream);
  const PartialsSite it(dcp, site, c);
  dcp.merge_attention_into(it.into, it.partials, stream);
  it.check_merged(dcp.size(), it.into.merged, it.into.lse, narrow, what);
  auto bits = bits_of(it.into.merged);
  const Merged owned = dcp.merge_attention(it.partials, c.result, stream, c.counts);
  check(bits == bits_of(owned.out), what + ": the two forms give the same bits");
  if (it.into.lse) {
    const auto lse_bits = bits_of(*it.into.lse);
    check(lse_bits == bits_of(owned.lse), what + ": the two forms give the same LSEs");
    bits.insert(bits.end(), lse_bits.begin(), lse_bits.end());
  }
  return bits;
}

/// A plan and what its group was made with.
struct PartialsPlan {
  const char* name;
  MergeOptions merge;
  HostOptions host = {};
  bool narrow = false;      ///< Terms are rounded to the type before they are added.
  bool like_packed = true;  ///< Bit by bit.
};

/// All plans on the host: through windows, slots of any size, and beyond reach.
[[nodiscard]] inline std::vector<PartialsPlan> partials_plans() {
  return {{"packed", {.plan = MergePlan::packed}},
          {"one_kernel", {.plan = MergePlan::one_kernel}},
          {"small slots", {.plan = MergePlan::one_kernel}, {.slot_bytes = 4096 * 8}},
          {"automatic", {}},
          {"far", {}, {.map_peers = false}},
          {"staged", {.plan = MergePlan::staged}, {}, false, false},
          {"staged, narrow",
           {.plan = MergePlan::staged, .staged_precision = StagedPrecision::partial},
           {},
           true,
           false}};
}

/// Every combination by every plan; in the short run by one rank in every type, by two in two of
/// them, and by more ranks some of them, others by each number.
inline void check_partials(ControlPlane& world) {
  const int n = world.size();
  const std::size_t step = full_run() || n <= 2 ? 1 : n == 3 ? 5 : 23;
  for (int round = 0; round < (full_run() ? 6 : n < 3 ? 4 - n : 1); ++round) {
    const auto cases =
        partials_cases(n, static_cast<unsigned>(100 * n + round), n <= 2 || round % 2 == 0);
    std::vector<std::vector<std::byte>> packed(cases.size());
    for (const auto& plan : partials_plans()) {
      auto state = decode_state(world, plan.merge, plan.host);
      for (std::size_t i = (u(n) * 4 + u(round)) % step; i < cases.size(); i += step) {
        const std::string what = fmt::format("{}: {}", plan.name, to_string(cases[i]));
        auto bits = merge_partials_once(state.dcp(), cases[i], what, plan.narrow);
        if (packed[i].empty()) {
          packed[i] = std::move(bits);
        } else if (plan.like_packed) {
          check(bits == packed[i], what + ": as packed");
        }
      }
    }
  }
}

/// Equal masses, of which the sink has half: exact in every type, as is a sink alone.
inline void check_exact_partials(DecodeContextParallelGroup& dcp, StreamRef stream = {}) {
  const int n = dcp.size();
  if ((n & (n - 1)) != 0) {
    return;
  }
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::int64_t splits : {1, 2, 4}) {
      for (const bool empty : {false, true}) {
        Site site(dcp, Memory::ordinary, stream);
        const auto unit = static_cast<std::int64_t>(n) * splits * 2;
        const Dims shape{splits, 3, n, 24};
        const auto out = site.tensor(shape, dtype);
        const auto lse = site.tensor({splits, 3, n}, DType::f32);
        const auto tokens = site.tensor({3}, DType::i32);
        const auto sink = site.tensor({n}, DType::f32);
        const auto value = [&](int rank, std::int64_t flat) {
          return (flat * 7 + rank * 5 + flat / 24) % 4 * unit;
        };
        const int masses = std::countr_zero(static_cast<unsigned>(unit / 2));
        fill_with(out, [&](std::int64_t flat) { return value(dcp.rank(), flat); });
        fill_with(lse, [](std::int64_t) { return 3; });
        fill_with(tokens, [&](std::int64_t b) { return empty || b == 1 ? 0 : 5; });
        fill_with(sink, [&](std::int64_t) { return 3 + masses; });
        const Partials partials{out, lse, LseBase::two, sink, tokens};
        const Merged merged = dcp.merge_attention(partials, MergeResult::replicated, stream);
        check_values(merged.out, "half the mean", [&](std::int64_t flat) -> std::int64_t {
          if (empty || flat / (n * 24) == 1) {
            return 0;
          }
          std::int64_t sum = 0;
          for (int r = 0; r < n; ++r) {
            for (std::int64_t s = 0; s < splits; ++s) {
              sum += value(r, s * 3 * n * 24 + flat);
            }
          }
          return sum / unit;
        });
        check_values(merged.lse, "the sink counts once", [&](std::int64_t row) {
          return 3 + masses + (empty || row / n == 1 ? 0 : 1);
        });
      }
    }
  }
}

/// The three results have the same rows, bit by bit, whatever merges them.
inline void check_results_agree(ControlPlane& world) {
  const int n = world.size();
  for (const auto& plan : partials_plans()) {
    auto state = decode_state(world, plan.merge, plan.host);
    auto& dcp = state.dcp();
    for (const std::int64_t dim : {8, 640}) {  // merged by all, and by head and gathered
      const std::int64_t batch = 7;
      Site site(dcp, Memory::mixed);
      const PartialsCase c{.splits = 2,
                           .batch = batch,
                           .own_heads = 2,
                           .dim = dim,
                           .dtype = DType::bf16,
                           .sink = true,
                           .local_tokens = true};
      const PartialsSite it(dcp, site, c);
      const Merged all = dcp.merge_attention(it.partials, MergeResult::replicated);
      const Merged heads = dcp.merge_attention(it.partials, MergeResult::by_head);
      const Merged tokens = dcp.merge_attention(it.partials, MergeResult::by_token);
      std::int64_t first = 0;
      for (int r = 0; r < dcp.rank(); ++r) {
        first += dcp::MergeRows::even_count(batch, n, r);
      }
      if (plan.like_packed) {  // a reduction adds by pieces whose bounds depend on the result
        const std::int64_t head = 2 * dcp.rank();
        check(bits_of(all.out.view().slice(1, head, 2)) == bits_of(heads.out), "by head");
        check(bits_of(all.out.view().slice(0, first, tokens.out.size(0))) == bits_of(tokens.out),
              "by token");
      }
      check(bits_of(all.lse.view().slice(1, 2 * dcp.rank(), 2)) == bits_of(heads.lse),
            "LSEs by head");
      check(bits_of(all.lse.view().slice(0, first, tokens.out.size(0))) == bits_of(tokens.lse),
            "LSEs by token");
    }
  }
}

/// Captured and replayed on other inputs, with counts that their caller forgets; what was reserved
/// suffices in a frozen arena, eagerly as well.
inline void check_reserved_partials(ControlPlane& world) {
  const int n = world.size();
  for (const auto& plan : partials_plans()) {
    for (const MergeResult result :
         {MergeResult::by_head, MergeResult::by_token, MergeResult::replicated}) {
      for (const std::int64_t dim : {16, 512}) {
        auto state = decode_state(world, plan.merge, plan.host);
        auto& dcp = state.dcp();
        HostStream stream;
        std::mt19937 random(static_cast<unsigned>(7 * n + dim));
        Site site(dcp, Memory::ordinary, stream);
        std::vector<PartialsCase> cases;
        std::int64_t tokens = 0;
        for (const std::int64_t batch : {9, 1, 0, 5, 9}) {
          PartialsCase c{.splits = 1 + batch % 3,
                         .batch = batch,
                         .own_heads = 2,
                         .dim = dim,
                         .dtype = DType::bf16,
                         .result = result,
                         .sink = batch % 2 == 0,
                         .local_tokens = batch % 3 == 0};
          if (result == MergeResult::by_token) {
            c.counts = draw_counts(random, batch, n);
            tokens = std::max(tokens, dcp::MergeRows::widest_count(c.counts));
          }
          cases.push_back(c);
        }
        if (result == MergeResult::replicated) {
          tokens = 9;  // all of them on one rank
        }
        std::vector<PartialsSite> sites;
        for (const auto& c : cases) {
          sites.emplace_back(dcp, site, c);
        }
        // There is room for the results before it as well.
        std::vector<PartialsCase> lesser;
        for (const MergeResult before : {MergeResult::by_head, MergeResult::by_token}) {
          if (before < result) {
            lesser.push_back(cases.front());
            lesser.back().result = before;
            lesser.back().counts.clear();
            if (before == MergeResult::by_token) {
              lesser.back().counts.assign(u(n), 0);
              lesser.back().counts.back() = lesser.back().batch;
            }
          }
        }
        std::vector<PartialsSite> lesser_sites;
        for (const auto& c : lesser) {
          lesser_sites.emplace_back(dcp, site, c);
        }
        dcp.reserve_for({.batch = 9,
                         .heads = 2 * n,
                         .latent = 16,
                         .rope = 16,
                         .value = dim,
                         .dtype = DType::bf16,
                         .result = result,
                         .tokens = tokens});
        dcp.freeze();
        const auto segments = dcp.arena()->statistics().segments;
        GraphPool pool;
        std::vector<Merged> captured(cases.size());
        std::vector<CapturedGraph> graphs;
        for (std::size_t i = 0; i < cases.size(); ++i) {
          graphs.push_back(state.capture(
              stream,
              [&] {
                captured[i > 0 ? i - 1 : 0] = {};
                auto counts = cases[i].counts;
                captured[i] = dcp.merge_attention(sites[i].partials, result, stream, counts);
                std::fill(counts.begin(), counts.end(), 1000);
              },
              &pool));
          const Merged eager =
              dcp.merge_attention(sites[i].partials, result, stream, cases[i].counts);
          graphs[i].launch(stream);
          const std::string what = fmt::format("{}: {}", plan.name, to_string(cases[i]));
          sites[i].check_merged(n, captured[i].out, captured[i].lse.view(), plan.narrow, what);
          check(bits_of(eager.out) == bits_of(captured[i].out), what + ": eager and captured");
        }
        for (const PartialsSite& it : lesser_sites) {
          const std::string what = fmt::format("{}: {}, with room for {}", plan.name,
                                               to_string(it.c), to_string(result));
          const Merged merged = dcp.merge_attention(it.partials, it.c.result, stream, it.c.counts);
          it.check_merged(n, merged.out, merged.lse.view(), plan.narrow, what);
        }
        check_equal(dcp.arena()->statistics().segments, segments, "segments");
      }
    }
  }
}

/// What is wrong is named before anything is enqueued, on every backend, and the group works on.
inline void check_wrong_partials(DecodeContextParallelGroup& dcp, StreamRef stream = {}) {
  const int n = dcp.size();
  Site site(dcp, Memory::ordinary, stream);
  const auto f32 = [&](const Dims& shape) { return site.tensor(shape, DType::f32); };
  const Partials p{f32({2, 3, 2 * n, 8}), f32({2, 3, 2 * n}), LseBase::e, f32({2 * n}),
                   site.tensor({3}, DType::i32)};
  const TensorView merged = f32({3, 2, 8});
  const TensorView lse = f32({3, 2});
  const auto refused = [&](const MergeInto& into, const Partials& partials, const auto&... words) {
    check_throws<UsageError>([&] { dcp.merge_attention_into(into, partials, stream); }, words...);
  };
  const auto with = [&](const auto& change) {
    Partials other = p;
    change(other);
    return other;
  };
  refused({merged}, with([&](Partials& x) { x.out = f32({0, 3, 2 * n, 8}); }), "out", "S >= 1");
  refused({merged}, with([&](Partials& x) { x.out = f32({2, 3, 2 * n, 0}); }), "out", "D >= 1");
  refused({merged}, with([&](Partials& x) { x.lse = f32({3, 2 * n}); }), "lse", "expected f32");
  refused({merged}, with([&](Partials& x) { x.lse = f32({1, 3, 2 * n}); }), "lse", "expected f32");
  refused({merged}, with([&](Partials& x) { x.sink = f32({n}); }), "sink", "expected f32");
  refused({merged}, with([&](Partials& x) { x.local_tokens = f32({3}); }), "local_tokens", "i32");
  refused({merged}, with([&](Partials& x) { x.local_tokens = site.tensor({2}, DType::i32); }),
          "local_tokens");
  const std::vector<std::int64_t> four(u(n), 4);
  const std::vector<std::int64_t> many(u(n) + 1, 0);
  refused({merged, {}, MergeResult::by_head, four}, p, "counts", "by_head");
  refused({merged, {}, MergeResult::replicated, four}, p, "counts", "replicated");
  refused({merged, {}, MergeResult::by_token, four}, p, "counts", "3 tokens");
  refused({merged, {}, MergeResult::by_token, many}, p, "counts", "sizes");
  refused({f32({3, 3, 8}), {}, MergeResult::replicated}, p, "merged", "expected f32");
  // Nothing may be written over what is read, or over the other result.
  const auto floats = [&](const ConstTensorView& of, const Dims& shape) {
    return TensorView(const_cast<void*>(of.data()), DType::f32, shape, of.device());
  };
  refused({floats(p.out, {3, 2, 8})}, p, "merge_attention merged", "the input");
  refused({floats(p.lse, {3, 2, 8}).slice(0, 0, 3)}, p, "merge_attention merged");
  refused({merged, floats(p.lse, {3, 2})}, p, "merge_attention merged_lse", "the input");
  refused({merged, floats(p.out, {3, 2})}, p, "merge_attention merged_lse", "the input");
  refused({merged, floats(merged, {3, 2})}, p, "merge_attention merged_lse");
  if (n >= 3) {
    refused({merged, floats(*p.sink, {3, 2})}, p, "merge_attention merged_lse", "the input");
  }
  fill_with(floats(p.out, {2, 3, 2 * n, 8}), [](std::int64_t) { return 2; });
  fill_with(floats(p.lse, {2, 3, 2 * n}), [](std::int64_t) { return 0; });
  dcp.merge_attention_into({merged, lse}, {p.out, p.lse}, stream);
  check_values(merged, "afterwards", [](std::int64_t) { return 2; });
}

/// A rank that asks for something else is found, whatever merges and carries its bytes.
inline void check_other_partials(ControlPlane& world, MergePlan plan, bool map_peers, bool debug) {
  const int last = world.size() - 1;
  const bool other = world.rank() == last;
  const int n = world.size();
  for (int kind = 0; kind < 7; ++kind) {
    auto state =
        make_state(world, {.tp = n, .dcp = n},
                   {.backend = host_backend({.window_bytes = 2048, .map_peers = map_peers}),
                    .merge = {.plan = plan},
                    .debug_checks = debug});
    auto& dcp = state.dcp();
    Site site(dcp, Memory::ordinary);
    const auto out = site.filled({2, 2 * n, 2 * n, 8}, DType::f32);
    const auto lse = site.filled({2, 2 * n, 2 * n}, DType::f32);
    const auto sink = site.filled({2 * n}, DType::f32);
    Partials p{out, lse};
    MergeResult result = MergeResult::by_head;
    std::vector<std::int64_t> counts;
    switch (kind) {
      case 0:
        p.base = other ? LseBase::two : LseBase::e;
        break;
      case 1:
        result = other ? MergeResult::by_token : MergeResult::by_head;
        break;
      case 2:
        result = other ? MergeResult::replicated : MergeResult::by_token;
        break;
      case 3:
        if (other) {
          p.sink = sink;
        }
        break;
      case 4:
        if (other) {
          p.out = out.slice(0, 0, 1);
          p.lse = lse.slice(0, 0, 1);
        }
        break;
      case 5:
        result = MergeResult::by_token;
        counts.assign(u(n), 2);
        if (other) {
          --counts[0];
          ++counts[u(n - 1)];
        }
        break;
      default:
        result = MergeResult::replicated;
    }
    const auto call = [&] {
      if (kind < 6) {
        (void)dcp.merge_attention(p, result, {}, counts);
        return;
      }
      MergeInto into{site.tensor({2 * n, 2 * n, 8}, DType::f32), {}, result};
      if (other) {
        into.lse = site.tensor({2 * n, 2 * n}, DType::f32);
      }
      dcp.merge_attention_into(into, p);
    };
    if (plan == MergePlan::one_kernel) {
      check_throws<SymmetryError>(call, "merge_attention");
    } else {
      check_throws<SymmetryError>(call);
    }
    if (map_peers) {  // over the control plane a group ends with its first error
      (void)dcp.merge_attention({out, lse, LseBase::e, sink}, MergeResult::by_token);
    }
  }
}

}  // namespace cohort::test
