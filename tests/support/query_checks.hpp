// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cohort/cohort.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "support/decode_cases.hpp"
#include "support/group_tensors.hpp"
#include "support/skip.hpp"

/// \file
/// The gather of a decode step's query, as bodies that every rank runs.

namespace cohort::test {

/// Queries of every type and layout, with windows and without.
inline void check_gather_query(ControlPlane& world) {
  const int n = world.size();
  auto near = decode_state(world, {});
  auto far = decode_state(world, {}, {.map_peers = false});
  auto small = decode_state(world, {}, {.slot_bytes = 4096});
  for (ParallelState* state : {&near, &far, &small}) {
    auto& dcp = state->dcp();
    dcp.attention_waits(state == &near);
    for (const Memory memory : {Memory::arena, Memory::ordinary, Memory::mixed}) {
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        for (const auto& [batch, own, latent, rope] : std::vector<std::array<std::int64_t, 4>>{
                 {3, 3, 5, 2}, {16, 4, 512, 64}, {0, 2, 8, 4}, {1, 1, 16, 0}}) {
          if (batch == 16 && n > 3 && dtype != DType::f16 && !full_run()) {
            continue;  // large for the sake of windows, where types are bytes
          }
          for (const Form form : {Form::contiguous, Form::sliced}) {
            Site site(dcp, memory);
            const auto nope = site.filled({batch, own, latent}, dtype, form);
            const auto pe = site.tensor({own, batch, rope}, dtype).transpose(0, 1);
            fill(pe, dcp.rank() + 50);
            const std::int64_t dim = latent + rope;
            const auto expected = [&, own = own, latent = latent, rope = rope](std::int64_t flat) {
              const std::int64_t d = flat % dim;
              const std::int64_t h = flat / dim % (own * n);
              const std::int64_t b = flat / dim / (own * n);
              const std::int64_t row = b * own + h % own;
              const auto r = static_cast<int>(h / own);
              return d < latent ? value_at(r, row * latent + d)
                                : value_at(r + 50, row * rope + d - latent);
            };
            const auto q = dcp.gather_query(nope, pe);
            check(q.shape() == Dims{batch, own * n, dim}, "shape of the query");
            check_values(q, "gather_query", expected);
            const auto into = site.tensor({batch, own * n, dim}, dtype, form);
            dcp.gather_query_into(into, nope, pe);
            check_values(into, "gather_query_into", expected);
            const auto heads_first = site.tensor({own * n, batch, dim}, dtype, form);
            dcp.gather_query_into(heads_first.transpose(0, 1), nope, pe);
            check_values(heads_first.transpose(0, 1), "heads first", expected);
            // The ranks need not agree on it.
            const auto mixed = dcp.rank() % 2 == 0 ? into : heads_first.transpose(0, 1);
            fill(mixed, -1);
            dcp.gather_query_into(mixed, nope, pe);
            check_values(mixed, "heads first on odd ranks", expected);
          }
        }
      }
    }
  }
}

/// 8-bit floats and their scales, in rows of bytes, eagerly and in a graph; the room is that which
/// was reserved for them.
inline void check_gather_quantised(ControlPlane& world) {
  const int n = world.size();
  constexpr std::int64_t kOwn = 3;
  constexpr std::int64_t kBatch = 5;
  constexpr std::int64_t kWidth = 576;
  constexpr std::int64_t kScales = 4;
  constexpr std::int64_t kRow = kWidth + 4 * kScales;
  for (const bool map_peers : {true, false}) {
    auto state = decode_state(world, {}, {.map_peers = map_peers});
    auto& dcp = state.dcp();
    HostStream stream;
    Site site(dcp, Memory::mixed, stream);
    const auto nope = site.filled({kBatch, kOwn, kWidth}, DType::f8_e4m3, Form::sliced);
    const auto scales = site.tensor({kOwn, kBatch, kScales}, DType::f32).transpose(0, 1);
    fill(scales, dcp.rank() + 50);
    const auto into = site.tensor({kBatch, kOwn * n, kRow}, DType::u8, Form::sliced);
    dcp.reserve_for({.batch = kBatch,
                     .heads = kOwn * n,
                     .latent = kWidth,
                     .rope = kScales,
                     .query_dtype = DType::f8_e4m3,
                     .rope_dtype = DType::f32});
    const auto segments = dcp.arena()->statistics().segments;
    dcp.freeze();
    const auto part = [&](int first, std::int64_t extent) {
      return [=](std::int64_t flat) {
        const std::int64_t h = flat / extent % (kOwn * n);
        const std::int64_t row = flat / extent / (kOwn * n) * kOwn + h % kOwn;
        return value_at(static_cast<int>(h / kOwn) + first, row * extent + flat % extent);
      };
    };
    const auto check_rows = [&](const TensorView& q, int replay, const std::string& what) {
      check(q.dtype() == DType::u8 && q.shape() == Dims{kBatch, kOwn * n, kRow}, what);
      check_values(q.slice(2, 0, kWidth).reinterpret(DType::f8_e4m3), what, part(replay, kWidth));
      std::vector<std::byte> packed;
      read_elements(q.slice(2, kWidth, 4 * kScales),
                    [&](std::int64_t, const std::byte* byte) { packed.push_back(*byte); });
      check_values(TensorView(packed.data(), DType::f32, {kBatch, kOwn * n, kScales}), what,
                   part(50, kScales));
    };
    const Tensor q = dcp.gather_query(nope, scales, stream);
    check_rows(q, 0, "rows of bytes");
    check_values(q.view().slice(2, kWidth, 4 * kScales).reinterpret(DType::f32), "scales",
                 part(50, kScales));
    dcp.gather_query_into(into, nope, scales, stream);
    check_rows(into, 0, "rows of bytes into");
    Tensor kept;
    auto graph = state.capture(stream, [&] {
      kept = dcp.gather_query(nope, scales, stream);
      dcp.gather_query_into(into, nope, scales, stream);
    });
    for (int replay = 1; replay < 3; ++replay) {
      fill(nope, dcp.rank() + replay);
      graph.launch(stream);
      check_rows(kept, replay, "captured");
      check_rows(into, replay, "captured into");
    }
    check_equal(dcp.arena()->statistics().segments, segments, "segments");

    check_throws<UsageError>(
        [&] { dcp.gather_query_into(into.reinterpret(DType::f8_e4m3), nope, scales, stream); },
        "gather_query q:", "expected u8", "got f8_e4m3");
    check_throws<UsageError>([&] { (void)dcp.gather_query(nope, scales.slice(0, 0, 4), stream); },
                             "gather_query q_pe");
    check_throws<UsageError>(
        [&] { (void)dcp.gather_query(nope, TensorView(scales.data(), DType::f32, {60}), stream); },
        "gather_query q_pe", "[B, H/n, Dr]");
  }
  // Room for rows of so many bytes, whatever they hold.
  const auto room = [&](const DecodeShape& shape) {
    auto state = decode_state(world, {});
    state.dcp().reserve_for(shape);
    return state.dcp().arena()->statistics().reserved;
  };
  DecodeShape shape{.batch = 64, .heads = 8 * n, .latent = 288, .value = 8};
  const auto bytes = room(shape);
  shape.query_dtype = DType::f8_e5m2;
  check(room(shape) < bytes, "half the bytes take less room");
  shape.latent = 576;
  check_equal(room(shape), bytes, "twice as many elements of half the size");
  shape.latent = 512;
  shape.rope = 16;
  shape.rope_dtype = DType::f32;
  check_equal(room(shape), bytes, "scales");
}

}  // namespace cohort::test
