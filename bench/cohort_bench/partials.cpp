// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "benches.hpp"
#include "decode_calls.hpp"
#include "statistics.hpp"

/// \file
/// Merges beyond one partial a rank whose heads are scattered, queries in 8 bits, and the tokens of
/// a step.

namespace cohort::bench {

namespace {

/// What a merge takes and gives.
struct Form {
  MergeResult result = MergeResult::by_head;
  std::int64_t splits = 1;
  bool sink = false;
  bool combined = false;  ///< The splits are combined by a kernel of their own before the merge.
  bool gathered = false;  ///< Replicated by a merge by head and a gather, as two calls.
};

[[nodiscard]] dcp::MergeRows rows_of(const Session& session, const StepShape& shape,
                                     MergeResult result) {
  return {result, shape.batch, session.options.heads, session.ranks()};
}

/// The rows that this rank gets, as the group shares out tokens of which nothing is said.
[[nodiscard]] dcp::RowBlock<std::int64_t> own_rows(const Session& session, const StepShape& shape,
                                                   MergeResult result) {
  dcp::MergeRows rows = rows_of(session, shape, result);
  rows.whole = true;
  std::vector<std::int64_t> counts;
  for (int r = 0; r < session.ranks(); ++r) {
    counts.push_back(dcp::MergeRows::even_count(shape.batch, session.ranks(), r));
  }
  rows.counts = counts;
  return rows.of(session.rank());
}

void reserve(const Session& session, const StepShape& shape, MergeResult result, Lane& lane) {
  lane.group().reserve_for({.batch = shape.batch,
                            .heads = session.options.heads,
                            .value = session.options.head_dim,
                            .dtype = shape.dtype,
                            .result = result});
}

/// The tensors of one merge. Equal splits, whose LSEs are lower by the logarithm of their number,
/// together are the one partial of `dcp_merge`. A sink weighs as much as all ranks, and partials
/// are twice as large beside it. So the answer is always that of `dcp_merge`.
struct FormMerge {
  FormMerge(Session& s, const MergeWay& merge, const StepShape& step, const Form& asked)
      : session(s), shape(step), form(asked), group(&merge.way.lane->group()) {
    const Way& way = merge.way;
    const auto& o = session.options;
    const int n = session.ranks();
    const std::int64_t rows = shape.batch * o.heads;
    out = filled(session, way, {form.splits, shape.batch, o.heads, o.head_dim}, shape.dtype,
                 [&](std::int64_t i) {
                   const std::int64_t of_split = i % (rows * o.head_dim);
                   return partial_value(session.rank(), of_split, n) * (form.sink ? 2 : 1);
                 });
    const int lower = std::countr_zero(static_cast<unsigned>(form.splits));
    lse =
        filled(session, way, {form.splits, shape.batch, o.heads}, DType::f32, [&](std::int64_t i) {
          return partial_lse(session.rank(), i % rows, n) - static_cast<float>(lower);
        });
    partials = {.out = out.view, .lse = lse.view, .base = LseBase::two};
    if (form.sink) {
      sink = filled(session, way, {o.heads}, DType::f32, [&](std::int64_t) {
        return std::countr_zero(static_cast<std::uint64_t>(weight_unit(n)));
      });
      partials.sink = sink.view;
    }
    if (form.combined) {
      const auto piece = dcp::packed_piece(shape.batch, o.heads, o.head_dim, size_of(shape.dtype));
      pieces = allocate(way, {1, static_cast<std::int64_t>(piece.bytes)}, DType::u8);
      auto* const bytes = static_cast<std::byte*>(pieces.view.data());
      whole = partials;
      whole.out =
          TensorView(bytes, shape.dtype, {shape.batch, o.heads, o.head_dim}, pieces.view.device());
      whole.lse = TensorView(bytes + piece.lse_offset, DType::f32, {shape.batch, o.heads},
                             pieces.view.device());
    }
    if (form.gathered) {
      part = allocate(way, {o.heads / n, shape.batch, o.head_dim}, shape.dtype);
    }
    const auto own = own_rows(session, shape, form.result);
    // By token a rank's rows lie batch first, otherwise heads first, so that every plan can write
    // what arrives in its place.
    const bool by_token = form.result == MergeResult::by_token;
    const std::int64_t most =
        by_token ? dcp::MergeRows::even_count(shape.batch, n, 0) : own.tokens;  // as on all ranks
    result = allocate(
        way, by_token ? Dims{most, own.heads, o.head_dim} : Dims{own.heads, most, o.head_dim},
        shape.dtype);
    if (by_token) {
      result.view = result.view.slice(0, 0, own.tokens);
    }
  }

  void operator()() const {
    const StreamRef stream = session.bed.stream();
    const bool by_token = form.result == MergeResult::by_token;
    if (form.combined) {
      // Rows and LSEs without gaps, one kernel: what an engine's own would write.
      dcp::MergeRows one = rows_of(session, shape, MergeResult::by_head);
      one.ranks = 1;
      session.bed.backend().ops().pack_partial({.partials = partials, .rows = one}, pieces.view,
                                               stream);
    }
    const Partials& from = form.combined ? whole : partials;
    if (form.gathered) {
      group->merge_attention_into({.merged = part.view.transpose(0, 1)}, from, stream);
      group->all_gather_into(result.view, part.view, 0, stream);
      return;
    }
    group->merge_attention_into(
        {.merged = by_token ? result.view : result.view.transpose(0, 1), .result = form.result},
        from, stream);
  }

  [[nodiscard]] std::int64_t wrong() const {
    const auto own = own_rows(session, shape, form.result);
    const std::int64_t dim = session.options.head_dim;
    const bool by_token = form.result == MergeResult::by_token;
    return count_wrong(shape.dtype, fetch(session, result.view), [&](std::int64_t i) {
      const std::int64_t d = i % dim;
      const std::int64_t block = i / dim;
      const std::int64_t token = by_token ? block / own.heads : block % own.tokens;
      const std::int64_t head = by_token ? block % own.heads : block / own.tokens;
      const std::int64_t row =
          (own.first_token + token) * session.options.heads + own.first_head + head;
      return merged_value(row * dim + d, row, session.ranks());
    });
  }

  Session& session;
  StepShape shape;
  Form form;
  DecodeContextParallelGroup* group;
  Buffer out;
  Buffer lse;
  Buffer sink;
  Buffer pieces;
  Buffer part;
  Buffer result;
  Partials partials;
  Partials whole;  ///< Where the splits have been combined.
};

[[nodiscard]] Variant form_variant(Session& session, const MergeWay& merge, const StepShape& shape,
                                   const Form& form) {
  Lane* const lane = merge.way.lane;
  reserve(session, shape, form.result, *lane);
  const FormMerge call(session, merge, shape, form);
  Variant variant{.path = std::string(to_string(merge.way.path)),
                  .plan = fmt::format("{}{}", to_string(merge.plan),
                                      form.combined   ? "+combine"
                                      : form.gathered ? "+gather"
                                                      : ""),
                  .lane = lane,
                  .call = call,
                  .poison = [&session, result = call.result] { poison(session, result.view); },
                  .wrong = [call] { return call.wrong(); },
                  .before_capture = [&session, shape, form,
                                     lane] { reserve(session, shape, form.result, *lane); }};
  write_before(session, variant, {call.out.view, call.lse.view});
  return variant;
}

/// Rows of one bench: each form by every path and plan of Cohort's, side by side.
void bench_forms(Session& session, std::string_view bench, const std::vector<Form>& forms) {
  if (!divides_heads(session, bench)) {
    return;
  }
  for (const DType dtype : session.options.dtypes) {
    for (const std::int64_t batch : session.options.batches) {
      const StepShape shape{batch, dtype, session.options.head_dim};
      Case work{.bench = std::string(bench),
                .dtype = std::string(to_string(dtype)),
                .bytes = partial_bytes(session.options, shape) * forms.front().splits,
                .batch = batch};
      for (const MergeWay& merge : merge_ways(session, shape)) {
        if (merge.way.is_raw()) {
          continue;  // a library has no such calls
        }
        for (const Form& form : forms) {
          add_modes(session, work, form_variant(session, merge, shape, form));
        }
      }
      session.runner.run(work);
    }
  }
}

/// A query's parts in bytes: 8-bit elements of q_nope and q_pe in one row, and four scales.
constexpr std::int64_t kScaleBytes = 16;

[[nodiscard]] std::byte query_byte(int rank, std::int64_t i) {
  return static_cast<std::byte>((i * 7 + i / 128 + rank * 31) & 0x7f);
}

[[nodiscard]] Buffer filled_bytes(Session& session, const Way& way, const Dims& shape,
                                  std::int64_t first) {
  Buffer buffer = allocate(way, shape, DType::u8);
  std::vector<std::byte> bytes(buffer.view.bytes());
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = query_byte(session.rank(), first + static_cast<std::int64_t>(i));
  }
  session.bed.synchronize();
  session.bed.put(buffer.view.data(), bytes);
  return buffer;
}

[[nodiscard]] Variant quantised_variant(Session& session, const Way& way, std::int64_t batch) {
  const auto& o = session.options;
  const std::int64_t own = o.heads / session.ranks();
  const std::int64_t wide = o.head_dim + o.rope;
  const auto reserved = [&session, batch](Lane& lane) {
    lane.group().reserve_for({.batch = batch,
                              .heads = session.options.heads,
                              .latent = session.options.head_dim + session.options.rope,
                              .rope = kScaleBytes / 4,
                              .query_dtype = DType::f8_e4m3,
                              .rope_dtype = DType::f32});
  };
  if (way.lane != nullptr) {
    reserved(*way.lane);
  }
  const Buffer nope = filled_bytes(session, way, {batch, own, wide}, 0);
  const Buffer scales = filled_bytes(session, way, {batch, own, kScaleBytes}, 1);
  const Buffer q = allocate(way, {o.heads, batch, wide + kScaleBytes}, DType::u8);
  Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
  if (way.is_raw()) {
    const Buffer packed = allocate(way, {own, batch, wide + kScaleBytes}, DType::u8);
    variant.call = [&session, nope, scales, packed, q] {
      session.bed.backend().ops().pack_query(nope.view, scales.view, packed.view.transpose(0, 1),
                                             session.bed.stream());
      session.raw.all_gather(packed.view.data(), q.view.data(), packed.view.bytes());
    };
  } else {
    variant.call = [&session, nope, scales, q, group = &way.lane->group()] {
      group->gather_query_into(q.view.transpose(0, 1), nope.view.reinterpret(DType::f8_e4m3),
                               scales.view.reinterpret(DType::f32), session.bed.stream());
    };
    variant.before_capture = [reserved, lane = way.lane] { reserved(*lane); };
  }
  write_before(session, variant, {nope.view, scales.view});
  variant.poison = [&session, q] { poison(session, q.view); };
  variant.wrong = [&session, q, own, wide, batch] {
    const auto bytes = fetch(session, q.view);
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i) / (wide + kScaleBytes);
      const std::int64_t d = static_cast<std::int64_t>(i) % (wide + kScaleBytes);
      const std::int64_t h = at / batch;
      const std::int64_t local = at % batch * own + h % own;
      const auto sender = static_cast<int>(h / own);
      wrong += bytes[i] != (d < wide ? query_byte(sender, local * wide + d)
                                     : query_byte(sender, local * kScaleBytes + d - wide + 1))
                   ? 1
                   : 0;
    }
    return wrong;
  };
  return variant;
}

constexpr std::int64_t kDrafts = 4;  // rows of a sequence: up to so many new tokens
constexpr std::int64_t kPageTokens = 64;
constexpr std::int64_t kPages = 16;  // of a sequence's shard

template <class T, class Value>
[[nodiscard]] Buffer filled_words(Session& session, const Way& way, const Dims& shape, DType dtype,
                                  const Value& value) {
  Buffer buffer = allocate(way, shape, dtype);
  std::vector<T> words(static_cast<std::size_t>(buffer.view.numel()));
  for (std::size_t i = 0; i < words.size(); ++i) {
    words[i] = static_cast<T>(value(static_cast<std::int64_t>(i)));
  }
  session.bed.synchronize();
  session.bed.put(buffer.view.data(), std::as_bytes(std::span(words)));
  return buffer;
}

/// Wrong elements of an array of integers.
template <class T, class Value>
[[nodiscard]] std::int64_t wrong_words(Session& session, const TensorView& view,
                                       const Value& value) {
  const auto bytes = fetch(session, view);
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < bytes.size() / sizeof(T); ++i) {
    T word{};
    std::memcpy(&word, bytes.data() + i * sizeof(T), sizeof(T));
    wrong += word != static_cast<T>(value(static_cast<std::int64_t>(i))) ? 1 : 0;
  }
  return wrong;
}

[[nodiscard]] Variant place_variant(Session& session, std::int64_t batch) {
  const Way way{Path::plain, lane_of(session, Path::plain)};
  const dcp::KvShard shard(session.ranks());
  const auto length = [n = session.ranks()](std::int64_t b) {
    return 1 + b * 7919 % (kPages * kPageTokens * n);
  };
  const auto fresh = [](std::int64_t b) { return 1 + b % kDrafts; };
  const auto page = [](std::int64_t i) { return i * 5 % 1021; };
  const Buffer lengths = filled_words<std::int32_t>(session, way, {batch}, DType::i32, length);
  const Buffer new_tokens = filled_words<std::int32_t>(session, way, {batch}, DType::i32, fresh);
  const Buffer pages = filled_words<std::int32_t>(session, way, {batch, kPages}, DType::i32, page);
  const Buffer counts = allocate(way, {batch, kDrafts}, DType::i32);
  const Buffer slots = allocate(way, {batch, kDrafts}, DType::i64);
  Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
  variant.call = [=, &session, group = &way.lane->group()] {
    group->place_step(shard,
                      {.lengths = lengths.view,
                       .new_tokens = new_tokens.view,
                       .counts = counts.view,
                       .slots = slots.view,
                       .pages = pages.view,
                       .page_tokens = kPageTokens},
                      session.bed.stream());
  };
  variant.poison = [&session, counts, slots] {
    poison(session, counts.view);
    session.bed.fill_bytes(slots.view.data(), slots.view.bytes(), 0x7f);  // -1 is an answer
  };
  variant.wrong = [=, &session] {
    const auto visible = [&](std::int64_t i) {
      const std::int64_t j = i % kDrafts;
      const std::int64_t k = fresh(i / kDrafts);
      return j < k ? std::max<std::int64_t>(length(i / kDrafts) - (k - 1 - j), 0) : 0;
    };
    const auto slot = [&](std::int64_t i) -> std::int64_t {
      const std::int64_t token = visible(i) - 1;
      if (token < 0 || shard.owner(token) != session.rank()) {
        return dcp::kNoSlot;
      }
      const std::int64_t local = shard.local_index(token);
      return page(i / kDrafts * kPages + local / kPageTokens) * kPageTokens + local % kPageTokens;
    };
    return wrong_words<std::int32_t>(
               session, counts.view,
               [&](std::int64_t i) { return shard.local_count(visible(i), session.rank()); }) +
           wrong_words<std::int64_t>(session, slots.view, slot);
  };
  return variant;
}

}  // namespace

void bench_merge_by_token(Session& session) {
  bench_forms(session, "merge_by_token", {{.result = MergeResult::by_token}});
}

void bench_merge_replicated(Session& session) {
  bench_forms(
      session, "merge_replicated",
      {{.result = MergeResult::replicated}, {.result = MergeResult::replicated, .gathered = true}});
}

void bench_merge_splits(Session& session) {
  bench_forms(session, "merge_splits", {{.splits = 4}, {.splits = 4, .combined = true}});
}

void bench_merge_sink(Session& session) { bench_forms(session, "merge_sink", {{.sink = true}}); }

void bench_gather_quantised(Session& session) {
  if (!divides_heads(session, "gather_quantised")) {
    return;
  }
  const auto& o = session.options;
  for (const std::int64_t batch : o.batches) {
    Case work{.bench = "gather_quantised",
              .dtype = "f8_e4m3",
              .bytes = batch * o.heads * (o.head_dim + o.rope + kScaleBytes),
              .batch = batch,
              .bus_factor = gather_bus_factor(session.ranks())};
    for (const Way& way : ways(session)) {
      add_modes(session, work, quantised_variant(session, way, batch));
    }
    session.runner.run(work);
  }
}

void bench_place_step(Session& session) {
  for (const std::int64_t batch : session.options.batches) {
    Case work{.bench = "place_step",
              .bytes = batch * kDrafts *
                       static_cast<std::int64_t>(sizeof(std::int32_t) + sizeof(std::int64_t)),
              .batch = batch};
    add_modes(session, work, place_variant(session, batch));
    session.runner.run(work);
  }
}

}  // namespace cohort::bench
