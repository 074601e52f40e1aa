// SPDX-License-Identifier: Apache-2.0
// Random merges of partial attentions, by every plan, against fp64; and gathered queries.

#include <algorithm>
#include <cmath>
#include <cohort/cohort.hpp>
#include <limits>
#include <string>
#include <vector>

#include "driver.hpp"
#include "merge_steps.hpp"
#include "setup.hpp"
#include "support/decode_cases.hpp"
#include "support/threads.hpp"
#include "tensors.hpp"

namespace cohort::fuzz::merges {
namespace {

void near(const char* what, std::int64_t flat, double got, double wanted, double bound) {
  if (!(std::abs(got - wanted) <= bound) && !(got == wanted)) {
    throw std::runtime_error(fmt::format("{}: element {} is {} instead of {}, off by more than {}",
                                         what, flat, got, wanted, bound));
  }
}

/// One rank's part in a step.
class Player {
 public:
  Player(ParallelState& state, const Step& step)
      : state_(state),
        dcp_(state.dcp()),
        step_(step),
        n_(dcp_.size()),
        share_(step.shares[u(dcp_.rank())]),
        heads_(step.own * n_),
        rows_(step.rows_of(dcp_.rank(), n_)) {
    add(&Step::Share::out, step.dtype, {step.splits, step.batch, heads_, step.value});
    add(&Step::Share::lse, DType::f32, {step.splits, step.batch, heads_});
    add(&Step::Share::merged, step.dtype, {rows_.tokens, rows_.heads, step.value});
    add(&Step::Share::merged_lse, DType::f32, {rows_.tokens, rows_.heads});
    add(&Step::Share::nope, step.nope, {step.batch, step.own, step.latent});
    add(&Step::Share::pe, step.pe, {step.batch, step.own, step.rope});
    add(&Step::Share::query, step.query(), {step.batch, heads_, step.query_extent()});
    add(&Step::Share::sink, DType::f32, {heads_});
    add(&Step::Share::tokens, DType::i32, {step.batch});
  }

  /// The bits of the merged result of every turn.
  std::vector<std::byte> play(bool narrow) {
    std::vector<std::byte> bits;
    HostStream stream;
    const auto after = [&](int turn) {
      check(turn, narrow);
      const auto merged = test::bits_of(share_.owning ? merged_.out.view() : cell(2).view());
      bits.insert(bits.end(), merged.begin(), merged.end());
    };
    if (step_.replays == 0) {
      prepare(0);
      call({});
      after(0);
      return bits;
    }
    dcp_.reserve_for({.batch = step_.batch,
                      .heads = heads_,
                      .latent = step_.latent,
                      .rope = step_.rope,
                      .value = step_.value,
                      .dtype = step_.dtype,
                      .query_dtype = step_.nope,
                      .rope_dtype = step_.pe,
                      .result = step_.result,
                      .tokens = dcp::MergeRows::widest_count(step_.counts)});
    CapturedGraph graph = state_.capture(stream, [&] { call(stream); });
    for (int turn = 1; turn <= step_.replays; ++turn) {
      prepare(turn);
      graph.launch(stream);
      after(turn);
    }
    merged_ = {};
    query_.reset();
    return bits;
  }

 private:
  void add(Layout Step::Share::*layout, DType dtype, const Dims& shape) {
    std::int64_t span = 0;
    for (const auto& share : step_.shares) {
      span = std::max(span, (share.*layout).span);
    }
    places_.push_back(std::make_unique<Place>(*dcp_.arena(), u(span) * size_of(dtype),
                                              share_.in_window[places_.size()]));
    cells_.push_back(
        std::make_unique<Cell>(places_.back()->memory(), dtype, shape, share_.*layout));
  }
  [[nodiscard]] Cell& cell(std::size_t i) const { return *cells_[i]; }

  void prepare(int turn) {
    for (const auto& cell : cells_) {
      cell->reset();
    }
    const int rank = dcp_.rank();
    test::walk(cell(0).view(), [&](std::int64_t flat, const std::byte* address) {
      test::store_float(step_.dtype, address,
                        element_of(step_, turn, n_, rank, flat / step_.value, flat % step_.value));
    });
    test::walk(cell(1).view(), [&](std::int64_t row, const std::byte* address) {
      const float lse = lse_of(step_, turn, rank, row);
      std::memcpy(const_cast<std::byte*>(address), &lse, sizeof(lse));
    });
    cell(4).fill([&](std::int64_t flat) { return test::value_at(rank + turn, flat); });
    cell(5).fill([&](std::int64_t flat) { return test::value_at(rank + turn + 50, flat); });
    test::walk(cell(7).view(), [&](std::int64_t head, const std::byte* address) {
      const float sink = sink_of(step_, turn, head);
      std::memcpy(const_cast<std::byte*>(address), &sink, sizeof(sink));
    });
    test::walk(cell(8).view(), [&](std::int64_t token, const std::byte* address) {
      const std::int32_t tokens = tokens_of(step_, turn, rank, token);
      std::memcpy(const_cast<std::byte*>(address), &tokens, sizeof(tokens));
    });
    for (const std::size_t i : {0U, 1U, 7U, 8U}) {
      cell(i).take_over();
    }
  }

  [[nodiscard]] Partials partials() const {
    Partials partials{.out = cell(0).view(), .lse = cell(1).view(), .base = step_.base};
    if (step_.sink) {
      partials.sink = cell(7).view();
    }
    if (share_.local_tokens) {
      partials.local_tokens = cell(8).view();
    }
    return partials;
  }

  void call(StreamRef stream) {
    if (share_.owning) {
      query_ = dcp_.gather_query(cell(4).view(), cell(5).view(), stream);
      merged_ = dcp_.merge_attention(partials(), step_.result, stream, step_.counts);
      return;
    }
    dcp_.gather_query_into(cell(6).view(), cell(4).view(), cell(5).view(), stream);
    if (step_.is_simple() && !share_.wants_lse && !share_.local_tokens) {
      const auto first = [](const TensorView& x) {
        return x.ndim() == 4 ? TensorView(x.data(), x.dtype(), {x.size(1), x.size(2), x.size(3)},
                                          {x.strides()[1], x.strides()[2], x.strides()[3]})
                             : TensorView(x.data(), x.dtype(), {x.size(1), x.size(2)},
                                          {x.strides()[1], x.strides()[2]});
      };
      dcp_.merge_attention_into(cell(2).view(), first(cell(0).view()), first(cell(1).view()),
                                step_.base, stream);
      return;
    }
    MergeInto into{.merged = cell(2).view(), .result = step_.result, .counts = step_.counts};
    if (share_.wants_lse) {
      into.lse = cell(3).view();
    }
    dcp_.merge_attention_into(into, partials(), stream);
  }

  void check(int turn, bool narrow) {
    check_query(turn);
    check_merged(turn, narrow);
    for (std::size_t i = 0; i < cells_.size(); ++i) {
      cell(i).check(kNames[i]);
    }
  }

  /// [B, H/n, extent] of a rank's part, without gaps.
  [[nodiscard]] std::vector<std::byte> part_of(DType dtype, std::int64_t extent, int rank) const {
    std::vector<std::byte> part(u(step_.batch * step_.own * extent) * size_of(dtype) + 1);
    test::fill_with(TensorView(part.data(), dtype, {step_.batch, step_.own, extent}),
                    [rank](std::int64_t flat) { return test::value_at(rank, flat); });
    return part;
  }

  /// Byte by byte, whatever the parts' types.
  void check_query(int turn) {
    const TensorView q = share_.owning ? query_.view() : cell(6).expected();
    test::check(
        q.dtype() == step_.query() && q.shape() == Dims{step_.batch, heads_, step_.query_extent()},
        "the query's type and shape");
    const std::size_t nope = u(step_.latent) * size_of(step_.nope);
    const std::size_t pe = u(step_.rope) * size_of(step_.pe);
    for (int from = 0; from < n_; ++from) {
      const auto nopes = part_of(step_.nope, step_.latent, from + turn);
      const auto pes = part_of(step_.pe, step_.rope, from + turn + 50);
      for (std::int64_t row = 0; row < step_.batch * step_.own; ++row) {
        auto* const at = static_cast<std::byte*>(q.data()) +
                         (row / step_.own * q.strides()[0] +
                          (from * step_.own + row % step_.own) * q.strides()[1]) *
                             static_cast<std::int64_t>(size_of(q.dtype()));
        const std::byte* const parts[] = {nopes.data() + u(row) * nope, pes.data() + u(row) * pe};
        if (share_.owning) {
          test::check(std::equal(parts[0], parts[0] + nope, at) &&
                          std::equal(parts[1], parts[1] + pe, at + nope),
                      "query: a row is wrong");
        } else {
          std::copy(parts[0], parts[0] + nope, at);
          std::copy(parts[1], parts[1] + pe, at + nope);
        }
      }
    }
  }

  /// Compares with fp64; what passed becomes what the memory should hold.
  void check_merged(int turn, bool narrow) {
    const auto global = [&](std::int64_t row) {
      const auto place = rows_.place(row, row / rows_.heads);
      return place.token * heads_ + place.head;
    };
    std::int64_t last = -1;
    Expected row;
    const TensorView merged = share_.owning ? merged_.out.view() : cell(2).view();
    test::walk(merged, [&](std::int64_t flat, const std::byte* address) {
      const std::int64_t at = global(flat / step_.value);
      if (at != last) {
        row = expected_row(step_, turn, n_, at);
        last = at;
      }
      double wanted = 0;
      for (int r = 0; r < n_; ++r) {
        for (std::int64_t s = 0; s < step_.splits; ++s) {
          const double weight = row.weights[u(r * step_.splits + s)];
          wanted += weight == 0
                        ? 0
                        : weight * element_of(step_, turn, n_, r, split_row(step_, n_, s, at),
                                              flat % step_.value);
        }
      }
      // fp32 arithmetic on values up to 2 and one rounding to the type; or terms that together
      // weigh 1, rounded one by one and again in each of up to n sums. And each rank's splits,
      // rounded once before that, and their LSE to fp32.
      const double epsilon = test::epsilon_of(step_.dtype);
      const double combined =
          step_.splits > 1 ? 1.02 * epsilon + 0x1p-22 * (std::abs(step_.offset) + step_.spread + 8)
                           : 0;
      const double rounding = 0.51 * epsilon * std::max(std::abs(wanted), 0x1p-14);
      near("merged", flat, test::load_float(step_.dtype, address), wanted,
           (narrow ? 2.1 * epsilon : rounding) + combined + 3e-6);
    });
    if (share_.owning) {
      return;
    }
    cell(2).accept();
    if (share_.wants_lse) {
      test::walk(cell(3).view(), [&](std::int64_t flat, const std::byte* address) {
        const double wanted = expected_row(step_, turn, n_, global(flat)).lse;
        near("merged_lse", flat, test::load_float(DType::f32, address), wanted,
             3e-6 * std::max(1.0, std::abs(wanted)));
      });
      cell(3).accept();
    }
  }

  ParallelState& state_;
  DecodeContextParallelGroup& dcp_;
  const Step& step_;
  int n_;
  const Step::Share& share_;
  std::int64_t heads_;
  std::vector<std::unique_ptr<Place>> places_;
  std::vector<std::unique_ptr<Cell>> cells_;
  dcp::RowBlock<std::int64_t> rows_;
  Merged merged_;
  Tensor query_;
};

/// A plan under test.
struct Plan {
  const char* name;
  MergeOptions options;
  bool narrow = false;
};
constexpr Plan kPlans[] = {
    {"packed", {.plan = MergePlan::packed}},
    {"automatic", {.plan = MergePlan::automatic}},
    {"one_kernel", {.plan = MergePlan::one_kernel}},
    {"staged", {.plan = MergePlan::staged}},
    {"staged, narrow",
     {.plan = MergePlan::staged, .staged_precision = StagedPrecision::partial},
     true}};

void play_all(ControlPlane& world, const Setup& setup, const std::vector<Step>& steps) {
  std::vector<std::vector<std::byte>> bits(steps.size());  // of packed
  for (const Plan& plan : kPlans) {
    Setup with_plan = setup;
    with_plan.merge = plan.options;
    if (plan.options.plan == MergePlan::one_kernel && (!setup.map_peers || setup.two_machines)) {
      continue;
    }
    auto state = with_plan.create(world);
    for (std::size_t i = 0; i < steps.size(); ++i) {
      try {
        auto merged = Player(state, steps[i]).play(plan.narrow);
        if (bits[i].empty()) {
          bits[i] = std::move(merged);
        } else if (plan.options.plan != MergePlan::staged) {
          test::check(merged == bits[i], "the same bits as packed");
        }
      } catch (const std::exception& error) {
        throw std::runtime_error(fmt::format("step {}, plan {}: {}", i, plan.name, error.what()));
      }
    }
    state.shutdown();
  }
}

void round(Random& random, std::string& words) {
  Setup setup = draw_setup(random);
  setup.layout = {.tp = setup.ranks, .pp = 1, .dcp = setup.ranks};
  setup.debug_checks = false;
  words += to_string(setup);
  std::vector<Step> steps(u(random.between(1, 4)));
  for (auto& step : steps) {
    step = draw_step(random.split(), setup.ranks);
    words += to_string(step, setup.ranks);
  }
  test::run_ranks(setup.ranks, [&](ControlPlane& world) { play_all(world, setup, steps); });
}

}  // namespace
}  // namespace cohort::fuzz::merges

int main(int argc, char** argv) {
  return cohort::fuzz::drive(argc, argv, "merges", 100, cohort::fuzz::merges::round);
}
