// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include "benches.hpp"
#include "over_ranks.hpp"
#include "ways.hpp"

namespace cohort::bench {

namespace {

/// A group that is formed anew each time, with its first call.
class Formation {
 public:
  Formation(Session& session, OwnKernels own)
      : session_(session),
        own_(own),
        in_(session.bed.backend(own).allocate({kShare}, DType::f32, session.bed.stream())),
        out_(session.bed.backend(own).allocate({kShare * session.ranks()}, DType::f32,
                                               session.bed.stream())) {
    const int n = session.ranks();
    session.bed.synchronize();
    session.bed.put(in_.data(), encode(DType::f32, kShare, [&](std::int64_t i) {
                      return input_value(session.rank(), i, n);
                    }));
  }

  void form() {
    lane_ = std::make_unique<Lane>(session_.bed, session_.world, LaneConfig{.own = own_},
                                   kFirstNumber + formed_++);
  }
  void call() {
    const StreamRef stream = session_.bed.stream();
    lane_->group().all_gather_into(out_.view(), in_.view(), 0, stream);
    lane_->group().synchronize(stream, kLimit);
  }
  void drop() {
    if (lane_ != nullptr) {
      lane_->group().shutdown();
      lane_.reset();
    }
  }

  /// Memory of the device that this takes, the most of any rank. Collective.
  [[nodiscard]] std::int64_t taken(bool with_call) {
    session_.world.barrier();
    const std::int64_t before = session_.bed.memory_used();
    session_.world.barrier();
    form();
    if (with_call) {
      call();
    }
    session_.world.barrier();
    const std::int64_t mine = session_.bed.memory_used() - before;
    std::int64_t most = 0;
    for (const auto& theirs : gather<std::int64_t>(session_.world, std::span(&mine, 1))) {
      most = std::max(most, theirs.at(0));
    }
    drop();
    return most;
  }

  [[nodiscard]] std::int64_t wrong() {
    poison(session_, out_.view());
    session_.world.barrier();
    call();
    session_.world.barrier();
    const int n = session_.ranks();
    return count_wrong(DType::f32, fetch(session_, out_.view()), [&](std::int64_t i) {
      return input_value(static_cast<int>(i / kShare), i % kShare, n);
    });
  }

 private:
  static constexpr std::int64_t kShare = 256;
  static constexpr std::uint64_t kFirstNumber = 1'000'000;  // beyond the session's own lanes

  Session& session_;
  OwnKernels own_;
  Tensor in_;
  Tensor out_;
  std::unique_ptr<Lane> lane_;
  std::uint64_t formed_ = 0;
};

}  // namespace

void bench_formation(Session& session) {
  constexpr int kMostFormations = 10;
  for (const Path path : {Path::plain, Path::own}) {
    if (const std::string why = path_obstacle(session, path); !why.empty()) {
      leave_out(session, "formation", path, why);
      continue;
    }
    const auto formation = std::make_shared<Formation>(
        session, path == Path::own ? OwnKernels::all : OwnKernels::none);
    static_cast<void>(formation->taken(true));  // what a process takes once
    for (const bool with_call : {false, true}) {
      Case work{.bench = "formation",
                .bytes = formation->taken(with_call),
                .most_calls = 1,
                .iters = kMostFormations,
                .warmup = 1};
      work.variants.push_back({.path = std::string(to_string(path)),
                               .plan = with_call ? "group+call" : "group",
                               .call =
                                   [formation, with_call] {
                                     formation->form();
                                     if (with_call) {
                                       formation->call();
                                     }
                                   },
                               .wrong =
                                   [formation] {
                                     const std::int64_t wrong = formation->wrong();
                                     formation->drop();
                                     return wrong;
                                   },
                               .after_sample = [formation] { formation->drop(); }});
      session.runner.run(work);
    }
  }
}

}  // namespace cohort::bench
