// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <utility>

#include "benches.hpp"
#include "ways.hpp"

namespace cohort::bench {

namespace {

/// Memory of all ranks: a part that this rank fills, and a part that a peer writes.
struct PeerCopy {
  PeerCopy(Session& s, std::unique_ptr<PeerMemory> m, std::int64_t c)
      : session(s),
        memory(std::move(m)),
        count(c),
        local(session.raw.allocate({c}, DType::f32, false)) {
    session.bed.synchronize();
    const auto mine =
        encode(DType::f32, count, [&](std::int64_t i) { return value(session.rank(), i); });
    session.bed.put(source(session.rank()), mine);
    session.world.barrier();
  }

  [[nodiscard]] std::int64_t value(int rank, std::int64_t i) const {
    return input_value(rank, i, session.ranks()) + 1;
  }
  [[nodiscard]] std::size_t bytes() const { return local.view.bytes(); }
  [[nodiscard]] std::byte* source(int rank) const {
    return static_cast<std::byte*>(memory->peers()[static_cast<std::size_t>(rank)]);
  }
  [[nodiscard]] std::byte* landing(int rank) const { return source(rank) + bytes(); }
  [[nodiscard]] int neighbour(int step) const {
    return (session.rank() + session.ranks() + step) % session.ranks();
  }

  void read() const { session.bed.enqueue_copy(local.view.data(), source(neighbour(1)), bytes()); }
  void write() const {
    session.bed.enqueue_copy(landing(neighbour(1)), source(session.rank()), bytes());
  }
  [[nodiscard]] std::int64_t wrong(const void* data, int from) const {
    std::vector<std::byte> got(bytes());
    session.bed.get(got, data);
    return count_wrong(DType::f32, got, [&](std::int64_t i) { return value(from, i); });
  }

  Session& session;
  std::unique_ptr<PeerMemory> memory;
  std::int64_t count;
  Buffer local;
};

void copy_case(Session& session, const std::shared_ptr<PeerCopy>& copy) {
  Case work{.bench = "ceiling", .bytes = static_cast<std::int64_t>(copy->bytes()), .bus_factor = 1};
  add_modes(session, work,
            {.path = "peer_read",
             .call = [copy] { copy->read(); },
             .poison = [copy] { poison(copy->session, copy->local.view); },
             .wrong = [copy] { return copy->wrong(copy->local.view.data(), copy->neighbour(1)); }});
  add_modes(session, work,
            {.path = "peer_write",
             .call = [copy] { copy->write(); },
             .poison =
                 [copy] {
                   copy->session.bed.fill_bytes(copy->landing(copy->session.rank()), copy->bytes(),
                                                0xff);
                 },
             .wrong =
                 [copy] {
                   return copy->wrong(copy->landing(copy->session.rank()), copy->neighbour(-1));
                 }});
  session.runner.run(work);
}

/// Rounds in which what a rank wrote before the barrier must be there for its neighbour after it.
[[nodiscard]] std::int64_t wrong_barriers(const PeerCopy& copy, GroupCoordinator& group) {
  constexpr int kRounds = 8;
  Session& session = copy.session;
  const StreamRef stream = session.bed.stream();
  std::int64_t wrong = 0;
  for (int round = 0; round < kRounds; ++round) {
    session.bed.fill_bytes(copy.landing(session.rank()), copy.bytes(), 0xff);
    session.world.barrier();
    copy.write();
    group.barrier(stream);
    session.bed.enqueue_copy(copy.local.view.data(), copy.landing(session.rank()), copy.bytes());
    session.bed.synchronize();
    wrong += copy.wrong(copy.local.view.data(), copy.neighbour(-1));
    session.world.barrier();
  }
  return wrong;
}

void barrier_case(Session& session, const std::shared_ptr<PeerCopy>& copy) {
  Lane& lane = session.lanes.get({.own = OwnKernels::all});
  Case work{.bench = "ceiling"};
  Variant variant{.path = "barrier",
                  .call = [&lane, &session] { lane.group().barrier(session.bed.stream()); }};
  if (copy != nullptr) {
    variant.wrong = [copy, &lane] { return wrong_barriers(*copy, lane.group()); };
  }
  add_modes(session, work, variant);
  session.runner.run(work);
}

}  // namespace

void bench_ceiling(Session& session) {
  if (session.ranks() < 2) {
    session.sink.note("no ceiling rows: needs at least two ranks");
    return;
  }
  const auto make = [&](std::int64_t bytes) -> std::shared_ptr<PeerCopy> {
    auto memory = session.bed.peer_memory(session.world, static_cast<std::size_t>(2 * bytes));
    return memory == nullptr ? nullptr
                             : std::make_shared<PeerCopy>(session, std::move(memory), bytes / 4);
  };
  const auto words = make(1024);
  if (words == nullptr) {
    session.sink.note("no peer_read and peer_write rows: the ranks cannot map each other's memory");
  }
  barrier_case(session, words);
  for (const std::int64_t bytes : {64 << 10, 1 << 20, 16 << 20}) {
    if (words != nullptr && (bytes == 64 << 10 || bytes / 4 <= session.options.max_bytes)) {
      copy_case(session, make(bytes));
    }
  }
}

}  // namespace cohort::bench
