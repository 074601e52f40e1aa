// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "benches.hpp"
#include "cohort/flight_recorder.hpp"
#include "cohort/symmetric_scope.hpp"
#include "over_ranks.hpp"
#include "statistics.hpp"
#include "ways.hpp"

namespace cohort::bench {

namespace {

constexpr int kPairs = 1024;

/// Sizes that look random and are the same on every rank (Knuth's MMIX generator).
class Sizes {
 public:
  [[nodiscard]] std::int64_t next() {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return 256 + static_cast<std::int64_t>((state_ >> 33) % 3841);
  }

 private:
  std::uint64_t state_ = 42;
};

/// An arena with many live blocks between holes, and blocks that come and go.
struct ArenaLoad {
  static constexpr int kLive = 10'000;

  ArenaLoad(SymmetricArena& a, StreamRef s) : arena(a), stream(s) {
    Sizes sizes;
    arena.reserve(std::size_t{2} * kLive * 4096);
    std::vector<Tensor> all;
    for (int i = 0; i < 2 * kLive; ++i) {
      all.push_back(arena.empty({sizes.next()}, DType::u8, stream));
    }
    for (std::size_t i = 0; i < all.size(); i += 2) {  // the others leave holes
      live.push_back(std::move(all[i]));
    }
    for (auto& size : pending) {
      size = sizes.next();
    }
  }

  void pairs() {
    for (std::size_t i = 0; i < kPairs; ++i) {
      ring[i % ring.size()] = arena.empty({pending[i]}, DType::u8, stream);  // frees the old one
    }
  }

  /// Blocks that are misaligned or overlap, and whether the ranks' histories differ.
  [[nodiscard]] std::int64_t wrong(ControlPlane& world) const {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> blocks;
    const auto add = [&](const Tensor& tensor) {
      if (tensor.numel() > 0) {
        blocks.emplace_back(arena.offset_of(tensor.data()).value_or(1), tensor.bytes());
      }
    };
    std::for_each(live.begin(), live.end(), add);
    std::for_each(ring.begin(), ring.end(), add);
    std::sort(blocks.begin(), blocks.end());
    std::int64_t bad = 0;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const bool overlaps = i > 0 && blocks[i - 1].first + blocks[i - 1].second > blocks[i].first;
      bad += overlaps || blocks[i].first % 256 != 0 ? 1 : 0;
    }
    const std::uint64_t mine = arena.history();
    for (const auto& theirs : gather<std::uint64_t>(world, std::span(&mine, 1))) {
      bad += theirs.at(0) == mine ? 0 : 1;
    }
    return bad;
  }

  SymmetricArena& arena;
  StreamRef stream;
  std::vector<Tensor> live;
  std::array<std::int64_t, kPairs> pending{};
  std::array<Tensor, 16> ring;
};

[[nodiscard]] std::string path_name(const Lane& lane) {
  return std::string(to_string(lane.obstacle().empty() ? Path::symmetric : Path::plain));
}

/// A fresh arena that grows once; growth is the registration.
struct Growth {
  Growth(Session& s, Lane& l, std::size_t b) : session(s), lane(l), bytes(b) {}

  void grow() {
    arena = SymmetricArena::create(session.bed.backend(), "registration",
                                   lane.obstacle().empty() ? lane.group().audience() : Audience{},
                                   {.growth_bytes = bytes});
    arena->reserve(bytes);
  }

  void drop() {
    if (arena != nullptr) {
      session.world.barrier();  // a peer may still be registering
      arena->close();
      arena.reset();
    }
  }

  /// Gathers from memory of the fresh arena.
  [[nodiscard]] std::int64_t wrong() {
    grow();
    const int n = session.ranks();
    std::int64_t bad = 0;
    {
      constexpr std::int64_t kShare = 256;
      const StreamRef stream = session.bed.stream();
      const Tensor in = arena->empty({kShare}, DType::f32, stream);
      const Tensor out = arena->empty({kShare * n}, DType::f32, stream);
      session.bed.put(in.data(), encode(DType::f32, kShare, [&](std::int64_t i) {
                        return input_value(session.rank(), i, n);
                      }));
      poison(session, out.view());
      session.world.barrier();
      lane.group().all_gather_into(out.view(), in.view(), 0, stream);
      session.bed.synchronize();
      session.world.barrier();
      bad = count_wrong(DType::f32, fetch(session, out.view()), [&](std::int64_t i) {
        return input_value(static_cast<int>(i / kShare), i % kShare, n);
      });
    }
    drop();
    return bad;
  }

  Session& session;
  Lane& lane;
  std::size_t bytes;
  std::shared_ptr<SymmetricArena> arena;
};

}  // namespace

void bench_arena(Session& session) {
  Lane& lane = session.lanes.get({.symmetric = true});
  const auto load = std::make_shared<ArenaLoad>(*lane.group().arena(), session.bed.stream());
  Case work{.bench = "arena",
            .bytes = 2176,  // mean of the sizes
            .batch = ArenaLoad::kLive,
            .most_calls = 10,
            .parts_per_call = kPairs};
  work.variants.push_back({.path = path_name(lane),
                           .call = [load] { load->pairs(); },
                           .wrong = [load, &session] { return load->wrong(session.world); }});
  session.runner.run(work);
}

void bench_scope(Session& session) {
  Lane& lane = session.lanes.get({.symmetric = true});
  const ScopeTarget target = lane.group();
  const StreamRef stream = session.bed.stream();
  Case work{.bench = "scope", .most_calls = 100, .parts_per_call = kPairs};
  work.variants.push_back({.path = path_name(lane),
                           .call =
                               [target, stream] {
                                 for (int i = 0; i < kPairs; ++i) {
                                   const SymmetricScope scope(target, stream);
                                   asm volatile("" : : "r"(&scope) : "memory");  // is not elided
                                 }
                               },
                           .wrong = [target, stream]() -> std::int64_t {
                             const SymmetricScope* const before = SymmetricScope::current();
                             bool right = true;
                             {
                               const SymmetricScope scope(target, stream);
                               right = SymmetricScope::current() == &scope &&
                                       scope.is_null() == (target.arena == nullptr);
                             }
                             return right && SymmetricScope::current() == before ? 0 : 1;
                           }});
  session.runner.run(work);
}

namespace {

/// Of differences: the greatest of several would be greater than what any rank has on average.
[[nodiscard]] double mean_over_ranks(ControlPlane& world, double mine) {
  double sum = 0;
  for (const auto& theirs : gather<double>(world, std::span(&mine, 1))) {
    sum += theirs.at(0);
  }
  return sum / world.size();
}

/// What a record adds to a call: the same call with its record and without, in turn, and of each
/// kind the mean of the faster half of the times that the host spends in it.
class RecordedCalls {
 public:
  /// @param others  What the caller reads and writes between two calls, in bytes.
  RecordedCalls(FlightRecorder& recorder, std::function<void()> call, std::size_t others)
      : recorder_(recorder), call_(std::move(call)), others_(others / sizeof(Line)) {}

  /// Enqueues one call.
  void call(bool recorded) {
    recorder_.turn(recorded);
    call_();
    recorder_.turn(true);
  }

  /// The difference of some calls, in us.
  [[nodiscard]] double difference() {
    std::array<std::vector<double>, 2> times;
    for (int pair = 0; pair < kPairsOfRuns; ++pair) {
      const bool first = sizes_.next() % 2 == 0;  // at random: slots and ranks take turns too
      for (const bool recorded : {first, !first}) {
        times[recorded ? 1 : 0].push_back(time_run(recorded) / kRun);
      }
    }
    return mean_of_faster(times[1]) - mean_of_faster(times[0]);
  }

 private:
  struct alignas(64) Line {
    std::uint64_t word = 0;
  };

  // Of some calls each, so that a processor foresees which kind the next one is; a card's queue has
  // room for them all.
  static constexpr int kRun = 4;
  static constexpr int kPairsOfRuns = 32;

  /// What the host spends in calls of one kind, in us.
  [[nodiscard]] double time_run(bool recorded) {
    std::chrono::duration<double, std::micro> time{};
    for (int i = 0; i < kRun; ++i) {
      for (Line& line : others_) {
        asm volatile("" : "+m"(line.word));  // is read and written
      }
      const auto before = std::chrono::steady_clock::now();
      call(recorded);
      time += std::chrono::steady_clock::now() - before;
    }
    return time.count();
  }

  FlightRecorder& recorder_;
  std::function<void()> call_;
  std::vector<Line> others_;
  Sizes sizes_;
};

/// A whole call with its record and without, an all-gather of 2 KiB: what the record adds.
void bench_recorded_call(Session& session) {
  constexpr std::size_t kOthers = std::size_t{1} << 20;  // the caller's own work, of cold rows
  const int n = session.ranks();
  const DType dtype = session.options.dtypes.front();
  const bool is_host = session.bed.kind() == BackendKind::host;
  const bool is_own =
      !is_host && session.options.has(Path::own) && path_obstacle(session, Path::own).empty();
  const Path path = is_own ? Path::own : Path::plain;
  const Way way{.path = path, .lane = lane_of(session, path)};
  const std::int64_t share = 2048 / static_cast<std::int64_t>(size_of(dtype)) / n;
  const Buffer in = filled(session, way, {share}, dtype,
                           [&](std::int64_t i) { return input_value(session.rank(), i, n); });
  const Buffer out = allocate(way, {share * n}, dtype);
  Case work{.bench = "recorded_call",
            .dtype = std::string(to_string(dtype)),
            .bytes = static_cast<std::int64_t>(out.view.bytes()),
            .most_calls = 1};
  auto& group = way.lane->group();
  const auto recorder = group.recorder();
  for (const bool cold : {false, true}) {
    if (cold && is_host) {
      continue;  // a call would wait for what the others read and write
    }
    const auto calls = std::make_shared<RecordedCalls>(
        *recorder,
        [&session, &group, in, out] {
          group.all_gather_into(out.view, in.view, 0, session.bed.stream());
        },
        cold ? kOthers : 0);
    Variant variant{.path = std::string(to_string(path)),
                    .plan = cold ? "record, cold" : "record",
                    .mode = is_host ? Mode::eager : Mode::issue,
                    .lane = way.lane};
    variant.call = [calls] { calls->call(true); };
    variant.sample = [&session, calls] {
      session.world.barrier();
      const double us = calls->difference();
      session.bed.synchronize();
      return mean_over_ranks(session.world, us);
    };
    variant.poison = [&session, out] { poison(session, out.view); };
    variant.wrong = [&session, calls, recorder, out, dtype, share, n]() -> std::int64_t {
      const std::uint64_t before = recorder->own().calls;
      calls->call(true);
      calls->call(false);
      session.bed.synchronize();
      return (recorder->own().calls - before == 1 ? 0 : 1) +
             count_wrong(dtype, fetch(session, out.view), [&](std::int64_t i) {
               return input_value(static_cast<int>(i / share), i % share, n);
             });
    };
    work.variants.push_back(variant);
  }
  session.runner.run(work);
}

}  // namespace

void bench_recorder(Session& session) {
  struct Load {
    FlightRecorder recorder{"bench", 0, std::vector<int>(8), {}};
    alignas(64) std::array<std::byte, 64> place{};  // nobody looks into it
    ConstTensorView x{place.data(), DType::bf16, {64, 16, 512}};
    std::vector<std::int64_t> sizes = std::vector<std::int64_t>(8, 16);
    std::uint64_t steps = 0;
    TraceEntry entry;
  };
  const auto load = std::make_shared<Load>();
  Case work{.bench = "recorder", .most_calls = 100, .parts_per_call = kPairs};
  work.variants.push_back(
      {.path = "plain",
       .call =
           [load] {
             const auto record = [&]() __attribute__((always_inline)) {
               return trace_record(TraceCall::all_gather, load->x.shape(), load->x.dtype(), 1,
                                   load->sizes, 0);
             };
             for (int i = 0; i < kPairs; ++i) {
               load->recorder.begin_into(load->entry, record, load->x.bytes(), true, {}, 0,
                                         {.steps = load->steps}, 0);
               load->recorder.end(load->entry, {.steps = ++load->steps, .path = CallPath::mapped},
                                  0);
             }
           },
       .wrong = [load]() -> std::int64_t {
         const std::uint64_t calls = load->recorder.counters(CallPath::mapped).calls;
         return calls == load->steps && load->recorder.own().calls == calls ? 0 : 1;
       }});
  session.runner.run(work);
  bench_recorded_call(session);
}

void bench_registration(Session& session) {
  constexpr int kMostRegistrations = 20;
  Lane& lane = session.lanes.get({.symmetric = true});
  for (const std::size_t mebibytes : {2U, 8U, 32U}) {
    const std::size_t bytes = mebibytes << 20;
    const auto growth = std::make_shared<Growth>(session, lane, bytes);
    Case work{.bench = "registration",
              .bytes = static_cast<std::int64_t>(bytes),
              .most_calls = 1,
              .iters = kMostRegistrations,
              .warmup = 1};
    work.variants.push_back({.path = path_name(lane),
                             .call = [growth] { growth->grow(); },
                             .wrong =
                                 [growth] {
                                   growth->drop();
                                   return growth->wrong();
                                 },
                             .after_sample = [growth] { growth->drop(); }});
    session.runner.run(work);
  }
}

}  // namespace cohort::bench
