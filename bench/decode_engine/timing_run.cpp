// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <array>
#include <chrono>
#include <cstring>
#include <optional>

#include "../cohort_bench/rows.hpp"
#include "session.hpp"

namespace decode_engine {

namespace {

using Clock = std::chrono::steady_clock;
using KindTimes = std::array<double, kKinds>;

/// Every rank's values, by rank.
std::vector<std::vector<double>> gather(cohort::ControlPlane& world, std::span<const double> mine) {
  std::vector<std::vector<double>> all;
  for (const auto& bytes : world.all_gather(std::as_bytes(mine))) {
    auto& theirs = all.emplace_back(bytes.size() / sizeof(double));
    if (!bytes.empty()) {
      std::memcpy(theirs.data(), bytes.data(), bytes.size());
    }
  }
  return all;
}

/// What a token of one sequence takes in the largest cache of a rank: that of the first or of the
/// last stage.
std::int64_t most_cache_bytes(const Sizes& sizes, Place place, std::int64_t batch,
                              std::int64_t tokens) {
  std::int64_t most = 0;
  for (place.pp_rank = 0; place.pp_rank < place.pp; ++place.pp_rank) {
    most = std::max(most, place.cache_bytes(sizes, batch, tokens));
  }
  return most;
}

/// The lanes with or without DCP: they share weights and a cache.
struct Family {
  Family(Session& session, bool dcp, std::int64_t batch, std::int64_t tokens,
         const Weights& shared_weights)
      : weights(shared_weights),
        cache(session.model.sizes(), session.device, session.place(dcp), batch, tokens) {}

  const Weights& weights;
  Cache cache;
};

/// A lane's measurement.
struct Timed {
  const Lane* lane = nullptr;
  std::unique_ptr<Engine> engine = {};
  std::vector<double> samples = {};  ///< Microseconds of a step, of this rank.
  KindTimes kinds{};                 ///< The same of marked steps, by kind, all of them together.
};

/// Collective. Microseconds of a step, from when all ranks are ready.
double sample(Session& session, Engine& engine, std::int64_t context) {
  engine.start(context);
  session.world.barrier();
  const auto begin = Clock::now();
  for (std::int64_t step = 0; step < session.options.steps; ++step) {
    engine.enqueue_step();
  }
  engine.synchronize();
  const std::chrono::duration<double, std::micro> elapsed = Clock::now() - begin;
  return elapsed.count() / static_cast<double>(session.options.steps);
}

/// Collective. What the time of steps goes into.
void sample_kinds(Session& session, Timed& timed, std::int64_t context) {
  timed.engine->start(context);
  session.world.barrier();
  for (std::int64_t step = 0; step < session.options.steps; ++step) {
    timed.engine->enqueue_marked_step();
    timed.engine->synchronize();
    const auto seconds = timed.engine->seconds_by_kind();
    for (std::size_t kind = 0; kind < kKinds; ++kind) {
      timed.kinds[kind] += seconds[kind] * 1e6 / static_cast<double>(session.options.steps);
    }
  }
}

/// Collective. The mean over the ranks, in turns of the ways' times.
KindTimes mean_kinds(Session& session, const Timed& timed) {
  KindTimes mean{};
  for (const auto& theirs : gather(session.world, timed.kinds)) {
    for (std::size_t kind = 0; kind < kKinds; ++kind) {
      mean[kind] += theirs[kind] / static_cast<double>(session.options.iters) /
                    static_cast<double>(session.ranks());
    }
  }
  return mean;
}

void tell(Session& session, const Timed& timed, std::int64_t context, std::int64_t batch,
          Told& told) {
  const Way& way = *timed.lane->way;
  const Place& place = timed.lane->place;
  const Sizes& sizes = session.model.sizes();
  const cohort::bench::Summary us =
      cohort::bench::summarize(cohort::bench::max_over_ranks(gather(session.world, timed.samples)));
  const KindTimes kinds = mean_kinds(session, timed);
  const std::int64_t kv = most_cache_bytes(sizes, place, batch, context);
  const std::int64_t fit =
      session.options.room * place.dcp / most_cache_bytes(sizes, place, 1, place.dcp);
  const double tokens_a_second = us.p50 > 0 ? static_cast<double>(batch) * 1e6 / us.p50 : 0;
  const cohort::bench::Row row{.bench = "decode_engine",
                               .path = std::string(way.path),
                               .plan = std::string(way.plan),
                               .mode = session.options.graph ? "graph" : "eager",
                               .dtype = "bf16",
                               .ranks = session.ranks(),
                               .bytes = Place{}.cache_bytes(sizes, batch, context),
                               .batch = batch,
                               .us = us,
                               .calls = session.options.steps,
                               .samples = session.options.iters,
                               .kv_bytes_per_rank = kv};
  std::string json = to_json(row);
  json.pop_back();
  told.rows.push_back(
      json +
      fmt::format(R"(, "way": "{}", "tp": {}, "pp": {}, "dcp": {}, "context": {}, )"
                  R"("tokens_a_second": {:.1f}, "tokens_that_fit": {}, "attention_us": {:.2f}, )"
                  R"("products_us": {:.2f}, "communication_us": {:.2f}, "rest_us": {:.2f}}})",
                  way.name, place.tp, place.pp, place.dcp, context, tokens_a_second, fit, kinds[0],
                  kinds[1], kinds[2], kinds[3]));
  told.text += fmt::format(
      "{:<11}{:>9}{:>6}{:>12.1f}{:>12.1f}{:>12.1f}{:>11.1f}{:>11.1f}{:>11.1f}{:>11.1f}{:>14}{:>14}"
      "\n",
      way.name, context, batch, us.p50, us.p95, tokens_a_second, kinds[0], kinds[1], kinds[2],
      kinds[3], kv, fit);
}

void measure(Session& session, const std::array<std::optional<Weights>, 2>& weights,
             std::int64_t context, std::int64_t batch, Told& told) {
  const Options& options = session.options;
  std::array<std::optional<Family>, 2> families;
  std::vector<Timed> all;
  for (const Lane& lane : session.lanes) {
    const std::size_t number = lane.way->dcp ? 1 : 0;
    auto& family = families[number];
    if (!family) {
      family.emplace(session, lane.way->dcp, batch, context + options.steps, *weights[number]);
    }
    all.push_back(
        {&lane, std::make_unique<Engine>(session.model.sizes(), family->weights, family->cache,
                                         session.device, *lane.exchange, lane.place, batch)});
    if (options.graph) {
      all.back().engine->capture();
    }
    static_cast<void>(sample(session, *all.back().engine, context));  // warms up
  }
  for (std::int64_t round = 0; round < options.iters; ++round) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      // Each round begins with another way, so that none always follows the same neighbour.
      Timed& timed = all[(i + static_cast<std::size_t>(round)) % all.size()];
      timed.samples.push_back(sample(session, *timed.engine, context));
      sample_kinds(session, timed, context);
    }
  }
  for (const Timed& timed : all) {
    tell(session, timed, context, batch, told);
  }
}

}  // namespace

Told measure_time(Session& session) {
  Told told{.text = fmt::format(
                "{:<11}{:>9}{:>6}{:>12}{:>12}{:>12}{:>11}{:>11}{:>11}{:>11}{:>14}{:>14}\n", "way",
                "context", "batch", "us/token", "p95", "tokens/s", "attention", "products",
                "communic.", "rest", "KV B/rank", "tokens fit")};
  std::array<std::optional<Weights>, 2> weights;
  for (const Lane& lane : session.lanes) {
    if (auto& one = weights[lane.way->dcp ? 1 : 0]; !one) {
      one.emplace(session.model, session.device, lane.place);
    }
  }
  for (const std::int64_t context : session.options.contexts) {
    for (const std::int64_t batch : session.options.batches) {
      measure(session, weights, context, batch, told);
    }
  }
  return told;
}

}  // namespace decode_engine
