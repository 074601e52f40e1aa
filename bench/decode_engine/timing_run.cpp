// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>

#include "../cohort_bench/rows.hpp"
#include "session.hpp"

namespace decode_engine {

namespace {

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

/// The most that a stage has: the first or the last one.
template <class Count>
auto most(Place place, Count count) {
  decltype(count(place)) most = 0;
  for (place.pp_rank = 0; place.pp_rank < place.pp; ++place.pp_rank) {
    most = std::max(most, count(place));
  }
  return most;
}
std::int64_t cache_bytes(const Sizes& sizes, const Place& place, std::int64_t batch,
                         std::int64_t tokens) {
  return most(place, [&](const Place& stage) { return stage.cache_bytes(sizes, batch, tokens); });
}

/// Microseconds that attention takes at least, by the hardware's peaks; 0 where nobody knows them.
double attention_roofline(const Session& session, const Place& place, std::int64_t batch,
                          std::int64_t tokens) {
  const Sizes& sizes = session.model.sizes();
  const Peak peak = session.device.peak();
  if (peak.bytes <= 0 || peak.flops <= 0) {
    return 0;
  }
  return 1e6 * most(place, [&](const Place& stage) {
           return std::max(
               static_cast<double>(stage.cache_bytes(sizes, batch, tokens)) / peak.bytes,
               stage.attention_flops(sizes, batch, tokens) / peak.flops);
         });
}

/// A lane's measurement.
struct Timed {
  const Lane* lane = nullptr;
  std::unique_ptr<Engine> engine = {};
  std::vector<double> samples = {};  ///< Microseconds of a step, of this rank.
  KindTimes kinds{};                 ///< The same of marked steps, by kind, all of them together.
};

/// Collective. Microseconds of a step, behind a first one that brings the ranks together.
double sample(Session& session, Engine& engine, std::int64_t context) {
  engine.start(context);
  session.world.barrier();
  engine.enqueue_step();
  session.device.mark(0);
  for (std::int64_t step = 0; step < session.options.steps; ++step) {
    engine.enqueue_step();
  }
  session.device.mark(1);
  engine.synchronize();
  return session.device.between_marks(2).front() * 1e6 / static_cast<double>(session.options.steps);
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

/// Without what the marks take: as much for each stretch, so that kinds add up to a step without.
KindTimes without_marks(KindTimes kinds, const KindTimes& stretches, double step) {
  const double all = std::accumulate(stretches.begin(), stretches.end(), 0.0);
  const double mark =
      (std::accumulate(kinds.begin(), kinds.end(), 0.0) - step) / std::max(1.0, all);
  for (std::size_t kind = 0; kind < kKinds; ++kind) {
    kinds[kind] = std::max(0.0, kinds[kind] - std::max(0.0, mark) * stretches[kind]);
  }
  return kinds;
}

void tell(Session& session, const Timed& timed, std::int64_t context, std::int64_t batch) {
  const Way& way = *timed.lane->way;
  const Place& place = timed.lane->place;
  const Sizes& sizes = session.model.sizes();
  const cohort::bench::Summary us =
      cohort::bench::summarize(cohort::bench::max_over_ranks(gather(session.world, timed.samples)));
  KindTimes kinds = mean_kinds(session, timed);
  if (session.device.marks_take_time()) {
    kinds = without_marks(kinds, timed.engine->stretches(), us.p50);
  }
  const double roofline = attention_roofline(session, place, batch, context);
  const std::int64_t kv = cache_bytes(sizes, place, batch, context);
  const std::int64_t fit =
      session.options.room * place.dcp / cache_bytes(sizes, place, 1, place.dcp);
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
  json += fmt::format(
      R"(, "way": "{}", "tp": {}, "pp": {}, "dcp": {}, "context": {}, )"
      R"("tokens_a_second": {:.1f}, "tokens_that_fit": {}, "attention_roofline_us": {}, )"
      R"("attention_us": {:.2f}, "products_us": {:.2f}, "communication_us": {:.2f}, )"
      R"("rest_us": {:.2f}}})",
      way.name, place.tp, place.pp, place.dcp, context, tokens_a_second, fit,
      roofline > 0 ? fmt::format("{:.2f}", roofline) : "null", kinds[0], kinds[1], kinds[2],
      kinds[3]);
  session.tell(
      {.text = fmt::format("{:<11}{:>8}{:>6}{:>12.1f}{:>12.1f}{:>11.1f}{:>11.1f}{:>10.1f}{:>11.1f}"
                           "{:>10.1f}{:>10.1f}{:>13}{:>11}\n",
                           way.name, context, batch, us.p50, us.p95, tokens_a_second, kinds[0],
                           roofline, kinds[1], kinds[2], kinds[3], kv, fit),
       .rows = {json}});
}

/// Collective. Lanes whose cache has no room are left out.
void measure(Session& session, const Weights& weights, std::int64_t context, std::int64_t batch) {
  const Options& options = session.options;
  std::array<std::optional<Cache>, 2> caches;  // without DCP, and with it
  std::vector<Timed> all;
  for (const Lane& lane : session.lanes) {
    if (cache_bytes(session.model.sizes(), lane.place, batch, context) > options.room) {
      continue;
    }
    auto& cache = caches[lane.way->dcp ? 1 : 0];
    if (!cache) {
      cache.emplace(session.model.sizes(), session.device, lane.place, batch,
                    context + 1 + options.steps);
    }
    all.push_back(
        {&lane, std::make_unique<Engine>(session.model.sizes(), weights, *cache, session.device,
                                         *lane.exchange, lane.place, batch)});
    if (options.graph) {
      all.back().engine->capture();
    }
    static_cast<void>(sample(session, *all.back().engine, context));  // warms up
  }
  if (all.empty()) {
    session.tell(
        {.text = fmt::format("# no room for {} sequences of {} tokens\n", batch, context)});
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
    tell(session, timed, context, batch);
  }
}

/// The most sequences of so many tokens that fit: without DCP, and with it.
std::vector<std::int64_t> largest_batches(const Session& session, std::int64_t context) {
  std::vector<std::int64_t> batches;
  for (const bool dcp : {false, true}) {
    const std::int64_t one = cache_bytes(session.model.sizes(), session.place(dcp), 1, context);
    const std::int64_t batch = session.options.room / one;
    batches.push_back(batch < 8 ? batch : batch / 8 * 8);
  }
  batches.erase(std::unique(batches.begin(), batches.end()), batches.end());
  batches.erase(std::remove(batches.begin(), batches.end(), 0), batches.end());
  return batches;
}

}  // namespace

void measure_time(Session& session) {
  session.tell(
      {.text = fmt::format(
           "{:<11}{:>8}{:>6}{:>12}{:>12}{:>11}{:>11}{:>10}{:>11}{:>10}{:>10}{:>13}{:>11}\n", "way",
           "context", "batch", "us/token", "p95", "tokens/s", "attention", "roofline", "products",
           "communic.", "rest", "KV B/rank", "tokens fit")});
  const Weights weights(session.model, session.device, session.place(false));
  for (const std::int64_t context : session.options.contexts) {
    for (const std::int64_t batch : session.options.batches) {
      measure(session, weights, context, batch);
    }
  }
  for (const std::int64_t context : session.options.fill) {
    for (const std::int64_t batch : largest_batches(session, context)) {
      measure(session, weights, context, batch);
    }
  }
}

}  // namespace decode_engine
