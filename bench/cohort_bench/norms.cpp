// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "benches.hpp"
#include "ways.hpp"

namespace cohort::bench {

namespace {

/// What a rank brings to one call, and where it goes. The ranks' sums are all 0, and nobody's part
/// is, so that a residual is the same after any number of calls: 1 or -1 everywhere, whose root
/// mean square is 1, so that the answer is the weight.
struct NormCall {
  Buffer x;
  Buffer residual;
  Buffer weight;
  Buffer scale;
  Buffer sum;
  Buffer out;
  ResidualNorm norm;

  NormCall(Session& session, const Way& way, std::int64_t rows, DType dtype, DType out_dtype)
      : x(filled(session, way, {rows, session.options.hidden}, dtype,
                 [&](std::int64_t i) {
                   const int n = session.ranks();
                   return input_value(session.rank(), i, n) -
                          input_value((session.rank() + 1) % n, i, n);
                 })),
        residual(filled(session, way, {rows, session.options.hidden}, dtype, &target_at)),
        weight(filled(session, way, {session.options.hidden}, dtype, &weight_at)),
        scale(filled(session, way, {1}, DType::f32, [](std::int64_t) { return 1; })),
        sum(allocate(way, {rows, session.options.hidden}, dtype)),
        out(allocate(way, {rows, session.options.hidden}, out_dtype)),
        norm{.residual = residual.view, .weight = weight.view, .epsilon = 0.0F} {
    if (out_dtype == DType::f8_e4m3) {
      norm.scale = scale.view;
    }
  }

  [[nodiscard]] static std::int64_t weight_at(std::int64_t i) { return 1 + i % 7; }
  [[nodiscard]] static std::int64_t target_at(std::int64_t i) { return i % 3 == 0 ? -1 : 1; }

  /// The residual before a call, and an output of NaN.
  void prepare(Session& session) const {
    session.bed.put(residual.view.data(),
                    encode(residual.view.dtype(), residual.view.numel(), &target_at));
    poison(session, out.view);
  }
  [[nodiscard]] std::int64_t wrong(Session& session) const {
    const std::int64_t hidden = session.options.hidden;
    const auto expected = [hidden](std::int64_t i) { return target_at(i) * weight_at(i % hidden); };
    const auto bytes = fetch(session, out.view);
    std::int64_t wrong =
        count_wrong(residual.view.dtype(), fetch(session, residual.view), &target_at);
    if (out.view.dtype() != DType::f8_e4m3) {
      return wrong + count_wrong(out.view.dtype(), bytes, expected);
    }
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const auto value = static_cast<float>(expected(static_cast<std::int64_t>(i)));
      wrong += static_cast<std::uint8_t>(bytes[i]) == float_to_f8_e4m3(value) ? 0 : 1;
    }
    return wrong;
  }
};

void norm_case(Session& session, const std::vector<Way>& found, DType dtype, std::int64_t rows,
               bool fp8) {
  const DType out_dtype = fp8 ? DType::f8_e4m3 : dtype;
  Case work{.bench = fp8 ? "all_reduce_norm8" : "all_reduce_norm",
            .dtype = std::string(to_string(dtype)),
            .bytes = rows * session.options.hidden * static_cast<std::int64_t>(size_of(dtype)),
            .batch = rows};
  for (const Way& way : found) {
    if (way.is_raw() && !way.library->reduces(dtype)) {
      leave_out(session, work.bench, way.path, fmt::format("MPI has no {}", to_string(dtype)));
      continue;
    }
    const NormCall data(session, way, rows, dtype, out_dtype);
    Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
    variant.poison = [&session, data] { data.prepare(session); };
    variant.wrong = [&session, data] { return data.wrong(session); };
    const auto norm_of_sum = [&session, data] {
      session.bed.backend().ops().rms_norm({data.sum.view, data.norm, data.out.view},
                                           session.bed.stream());
    };
    // As engines do without a fused call: an all-reduce, and the same norm kernel behind it.
    variant.plan = "two_calls";
    if (way.is_raw()) {
      variant.call = [library = way.library, data, norm_of_sum] {
        library->all_reduce(data.x.view.data(), data.sum.view.data(),
                            static_cast<std::size_t>(data.x.view.numel()), data.x.view.dtype());
        norm_of_sum();
      };
    } else {
      variant.call = [&session, data, norm_of_sum, group = &way.lane->group()] {
        group->all_reduce_into(data.sum.view, data.x.view, session.bed.stream());
        norm_of_sum();
      };
    }
    write_before(session, variant, {data.x.view});
    add_modes(session, work, variant);
    if (!way.is_raw()) {
      variant.plan = std::string(kNone);
      variant.call = [&session, data, group = &way.lane->group()] {
        group->all_reduce_rms_norm_into(data.out.view, data.x.view, data.norm,
                                        session.bed.stream());
      };
      write_before(session, variant, {data.x.view});
      add_modes(session, work, variant);
    }
  }
  session.runner.run(work);
}

}  // namespace

void bench_all_reduce_norm(Session& session) {
  const auto found = ways_with_loop(session);
  for (const DType dtype : session.options.dtypes) {
    for (const std::int64_t rows : session.options.batches) {
      for (const bool fp8 : {false, true}) {
        norm_case(session, found, dtype, rows, fp8);
        if (session.runner.stopped()) {
          return;
        }
      }
    }
  }
}

}  // namespace cohort::bench
