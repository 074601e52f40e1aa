// SPDX-License-Identifier: Apache-2.0
#include "runner.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <span>

#include "over_ranks.hpp"
#include "statistics.hpp"

namespace cohort::bench {

namespace {

volatile std::sig_atomic_t interrupt_flag = 0;

/// A sample should last this long, so that reading a clock, starting together and launching a graph
/// do not show: a graph's start costs some microseconds, which a call of two must not be charged.
constexpr double kSampleUs = 1000;

[[nodiscard]] double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

[[nodiscard]] std::int64_t sum_over_ranks(ControlPlane& world, std::int64_t mine) {
  std::int64_t sum = 0;
  for (const auto& theirs : gather<std::int64_t>(world, std::span(&mine, 1))) {
    sum += theirs.at(0);
  }
  return sum;
}

}  // namespace

bool interrupted() noexcept { return interrupt_flag != 0; }
void interrupt() noexcept { interrupt_flag = 1; }

/// What a variant's measurement gathers.
struct Runner::State {
  std::unique_ptr<ExecutableGraph> graph;
  std::unique_ptr<ExecutableGraph> writing;
  std::int64_t wrong = 0;
  double call_us = 0;
  std::vector<double> samples;  // of this rank
};

bool Runner::is_measured(const Case& work) const {
  const auto& rows = sink_.rows();
  return std::any_of(rows.begin(), rows.end(), [&](const Row& row) {
    return row.bench == work.bench && row.dtype == work.dtype && row.bytes == work.bytes &&
           row.batch == work.batch && row.path == work.variants.back().path &&
           row.plan == work.variants.back().plan;
  });
}

void Runner::align() { lanes_.get({.own = OwnKernels::all}).group().barrier(bed_.stream()); }

/// Runs `once` into poisoned memory and counts this rank's wrong elements.
std::int64_t Runner::check(const Variant& variant, const std::function<void()>& once) {
  if (!options_.check || !variant.wrong) {
    return 0;
  }
  if (variant.poison) {
    variant.poison();
  }
  world_.barrier();  // no rank poisons what a peer has written
  once();
  bed_.synchronize();
  world_.barrier();
  return variant.wrong();
}

/// Warms up, and finds how many calls a sample of this case batches, equal for all ways and ranks:
/// as many as the fastest way needs, or the options say, within what the case allows.
std::int64_t Runner::choose_calls(const Case& work, std::vector<State>& states) {
  std::vector<double> fastest{1e9};
  for (std::size_t v = 0; v < states.size(); ++v) {
    const Variant& variant = work.variants[v];
    states[v].wrong = check(variant, variant.call);
    for (int i = 0; i < std::min(work.warmup.value_or(options_.warmup), options_.warmup); ++i) {
      const double us = bed_.elapsed_us([this] { align(); }, variant.call, Mode::eager);
      fastest[0] = std::min(fastest[0], us);
      if (variant.after_sample) {
        variant.after_sample();
      }
    }
  }
  if (options_.sample_calls) {
    return std::clamp(*options_.sample_calls, work.least_calls,
                      std::max(work.least_calls, work.most_calls));
  }
  double slowest_rank = 0;
  for (const auto& theirs : gather<double>(world_, fastest)) {
    slowest_rank = std::max(slowest_rank, theirs.at(0));
  }
  return std::max(work.least_calls, calls_per_sample(slowest_rank, kSampleUs, work.most_calls));
}

std::unique_ptr<ExecutableGraph> Runner::capture(const Variant& variant,
                                                 const std::function<void()>& work,
                                                 std::int64_t calls) {
  const StreamRef stream = bed_.stream();
  auto& driver = stream.driver();
  driver.begin_capture(stream.native());
  {
    std::optional<CaptureScope> scope;
    if (variant.lane != nullptr) {
      scope.emplace(variant.lane->captures(), stream);
    }
    for (std::int64_t i = 0; i < calls; ++i) {
      work();
    }
  }
  return driver.end_capture(stream.native());
}

/// Whether all ranks go on. One exchange a round: it also keeps the ranks together.
bool Runner::another_round(double started, int round) {
  enum Wish : std::uint8_t { go_on, enough, stop };
  const bool late = round > 0 && now_s() - started > static_cast<double>(options_.max_seconds);
  const std::array<std::uint8_t, 1> mine{interrupted() ? stop : (late ? enough : go_on)};
  std::uint8_t strongest = go_on;
  for (const auto& theirs : gather<std::uint8_t>(world_, mine)) {
    strongest = std::max(strongest, theirs.at(0));
  }
  stopped_ = stopped_ || strongest == stop;
  return strongest == go_on;
}

void Runner::run(Case& work) {
  if (stopped_ || work.variants.empty() || is_measured(work) || !another_round(now_s(), 0)) {
    return;
  }
  const std::string what =
      fmt::format("{} {} {} bytes batch {}", work.bench, work.dtype, work.bytes, work.batch);
  sink_.progress(what + ": warming up");
  std::vector<State> states(work.variants.size());
  const std::int64_t calls = choose_calls(work, states);
  for (std::size_t v = 0; v < states.size(); ++v) {
    const Variant& variant = work.variants[v];
    if (variant.mode != Mode::graph) {
      continue;
    }
    if (variant.before_capture) {
      variant.before_capture();
    }
    State& state = states[v];
    state.graph = capture(variant, variant.call, calls);
    if (variant.writing) {
      state.writing = capture(variant, variant.writing, calls);
    }
    state.wrong += check(variant, [&] { state.graph->launch(bed_.stream()); });
  }

  const double started = now_s();  // warming up, checking and capturing do not count
  const int iters = std::min(work.iters.value_or(options_.iters), options_.iters);
  const double parts = static_cast<double>(calls) * work.parts_per_call;
  for (int round = 0; round < iters && another_round(started, round); ++round) {
    sink_.progress(fmt::format("{}: round {} of {}", what, round + 1, iters));
    for (std::size_t i = 0; i < states.size(); ++i) {
      // Each round begins with another way, so that none always follows the same neighbour.
      const std::size_t v = (i + static_cast<std::size_t>(round)) % states.size();
      const Variant& variant = work.variants[v];
      const auto time_of = [&](const std::function<void()>& each, ExecutableGraph* graph) {
        const auto body = [&] {
          if (graph != nullptr) {
            graph->launch(bed_.stream());
            return;
          }
          for (std::int64_t call = 0; call < calls; ++call) {
            each();
          }
        };
        return bed_.elapsed_us([this] { align(); }, body, variant.mode) / parts;
      };
      const State& state = states[v];
      const double writing = variant.writing ? time_of(variant.writing, state.writing.get()) : 0;
      states[v].samples.push_back(
          variant.sample ? variant.sample() : time_of(variant.call, state.graph.get()) - writing);
      if (variant.after_sample) {
        variant.after_sample();
      }
    }
  }
  if (stopped_) {
    return;  // a row of fewer rounds than the others would mislead
  }
  for (std::size_t v = 0; v < states.size(); ++v) {
    const Variant& variant = work.variants[v];
    states[v].wrong += check(variant, [&] {
      if (states[v].graph != nullptr) {
        states[v].graph->launch(bed_.stream());
      } else {
        variant.call();
      }
    });
  }
  finish(work, states, calls);
}

void Runner::finish(const Case& work, const std::vector<State>& states, std::int64_t calls) {
  std::vector<std::vector<double>> slowest;
  for (const State& state : states) {
    slowest.push_back(max_over_ranks(gather<double>(world_, state.samples)));
  }
  for (std::size_t v = 0; v < states.size(); ++v) {
    const Variant& variant = work.variants[v];
    const std::int64_t wrong = sum_over_ranks(world_, states[v].wrong);
    wrong_ += wrong;
    if (variant.hidden) {
      continue;
    }
    std::vector<double> samples = slowest[v];
    if (variant.subtract) {
      for (std::size_t i = 0; i < samples.size(); ++i) {
        samples[i] -= slowest[*variant.subtract][i];
      }
    }
    Row row{.bench = work.bench,
            .path = variant.path,
            .plan = variant.plan,
            .mode = std::string(to_string(variant.mode)),
            .dtype = work.dtype,
            .ranks = world_.size(),
            .bytes = work.bytes,
            .batch = work.batch,
            .us = summarize(samples),
            .calls = calls,
            .samples = static_cast<std::int64_t>(samples.size()),
            .kv_bytes_per_rank = variant.kv_bytes_per_rank};
    if (work.bus_factor > 0) {
      row.algbw = bandwidth(row.bytes, row.us.p50);
      row.busbw = row.algbw * work.bus_factor;
    }
    if (options_.check && variant.wrong) {
      row.wrong = wrong;
    }
    sink_.add(row);
  }
}

}  // namespace cohort::bench
