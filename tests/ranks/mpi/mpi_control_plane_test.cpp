// SPDX-License-Identifier: Apache-2.0
#include "cohort/mpi/mpi_control_plane.hpp"

#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cohort/agreement.hpp>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "support/fast_signals.hpp"
#include "support/ranks.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

Bytes message_of(int rank, int round) {
  Bytes bytes(static_cast<std::size_t>(3 * rank + round));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(17 * rank + 5 * round + static_cast<int>(i));
  }
  return bytes;
}

void check_all_gather(ControlPlane& plane, int round) {
  const auto all = plane.all_gather(message_of(plane.rank(), round));
  REQUIRE(all.size() == static_cast<std::size_t>(plane.size()));
  for (int r = 0; r < plane.size(); ++r) {
    CHECK(all[static_cast<std::size_t>(r)] == message_of(r, round));
  }
}

// The duplicates of a test that ends in a time-out are its own, so that the session still ends in
// order: every rank does come, only late.
MpiControlPlane own_plane(std::chrono::milliseconds limit) {
  return MpiControlPlane(MPI_COMM_WORLD, limit, "own");
}

}  // namespace

TEST_CASE("the world has MPI's ranks") {
  CHECK(world().rank() == world_rank());
  CHECK(world().size() == world_size());
  CHECK(world().name() == "world");
  CHECK_FALSE(world().poisoned());
}

TEST_CASE("all_gather, broadcast and barrier over MPI") {
  auto& plane = world();
  for (int round = 0; round < 20; ++round) {
    check_all_gather(plane, round);
    const int root = round % plane.size();
    CHECK(plane.broadcast(message_of(plane.rank(), round), root) == message_of(root, round));
    plane.barrier();
  }
}

TEST_CASE("nobody leaves a barrier before everybody has entered it") {
  auto& plane = world();
  for (int late = 0; late < plane.size(); ++late) {
    const auto start = Clock::now();
    plane.barrier();
    if (plane.rank() == late) {
      std::this_thread::sleep_for(50ms);
    }
    plane.barrier();
    CHECK(Clock::now() - start >= 45ms);
  }
}

TEST_CASE("split and subgroup over MPI") {
  auto& plane = world();
  const int n = plane.size();
  const int rank = plane.rank();
  const auto parity = plane.split(rank % 2, -rank, "parity");
  REQUIRE(parity);
  CHECK(parity->size() == (n + 1 - rank % 2) / 2);
  CHECK(parity->rank() == parity->size() - 1 - rank / 2);
  check_all_gather(*parity, 2);

  std::vector<int> backwards(static_cast<std::size_t>(n));
  std::iota(backwards.rbegin(), backwards.rend(), 0);
  for (std::uint64_t generation = 0; generation < 3; ++generation) {
    const auto group = plane.subgroup(backwards, generation, "backwards");
    CHECK(group->rank() == n - 1 - rank);
    check_all_gather(*group, 3);
  }
  plane.barrier();
}

TEST_CASE("agreement over MPI names who differs") {
  auto& plane = world();
  const int n = plane.size();
  agree(plane, {.place = "test"});
  if (n < 3) {
    return;  // with two ranks there is no majority
  }
  const Intent intent{.place = "test", .bytes = plane.rank() == n - 1 ? 1U : 2U};
  CHECK_THROWS_MATCHES(agree(plane, intent), SymmetryError,
                       says("rank " + std::to_string(n - 1) + " is at test"));
  check_all_gather(plane, 1);
}

TEST_CASE("exchange moves bulk bytes, far beyond what MPI sends eagerly") {
  auto& plane = world();
  const int n = plane.size();
  const int rank = plane.rank();
  constexpr std::size_t kBulk = (std::size_t{4} << 20) + 13;
  const auto fill = [](int from, int to) { return static_cast<std::byte>(1 + 16 * from + to); };
  for (int round = 0; round < 3; ++round) {
    std::vector<ControlPlane::Outgoing> outgoing;
    std::vector<ControlPlane::Incoming> incoming;
    for (int r = 0; r < n; ++r) {
      Bytes bulk;
      bulk.reserve(kBulk + ControlPlane::kTrailerBytes);
      bulk.resize(kBulk, fill(rank, r));
      outgoing.push_back({r, std::move(bulk)});
      incoming.push_back({r, kBulk});
    }
    const auto got = plane.exchange(std::move(outgoing), incoming);
    for (int r = 0; r < n; ++r) {
      const auto& bulk = got[static_cast<std::size_t>(r)];
      REQUIRE(bulk.size() == kBulk);
      CHECK(std::all_of(bulk.begin(), bulk.end(), [&](auto b) { return b == fill(r, rank); }));
    }
  }
}

TEST_CASE("a run of bytes beyond MPI's counts arrives whole") {
  // A small chunk makes the types that a run beyond 1 GiB needs.
  const std::size_t bytes = GENERATE(as<std::size_t>(), 0, 1, 1000, 1001, 2000, 12345);
  Bytes sent(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    sent[i] = static_cast<std::byte>(i % 251);
  }
  Bytes got(bytes + 1, std::byte{0xee});
  const detail::MpiByteRun run(bytes, 1000);
  CHECK((run.type() == MPI_BYTE) == (bytes <= 1000));
  MPI_Sendrecv(sent.data(), run.count(), run.type(), 0, 1, got.data(), run.count(), run.type(), 0,
               1, MPI_COMM_SELF, MPI_STATUS_IGNORE);
  CHECK(std::equal(sent.begin(), sent.end(), got.begin()));
  CHECK(got.back() == std::byte{0xee});
}

TEST_CASE("a communicator of some ranks makes a control plane of those") {
  MPI_Comm half = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, world_rank() % 2, world_rank(), &half);
  {
    MpiControlPlane plane(half, 10s, "half");
    MPI_Comm_free(&half);  // the plane has its own
    CHECK(plane.rank() == world_rank() / 2);
    CHECK(plane.name() == "half");
    check_all_gather(plane, 1);
  }
  world().barrier();
}

TEST_CASE("the library's communicator returns errors, and the engine's is left alone") {
  auto plane = own_plane(10s);
  MPI_Errhandler handler = MPI_ERRHANDLER_NULL;
  MPI_Comm_get_errhandler(plane.messenger().communicator(), &handler);
  CHECK(handler == MPI_ERRORS_RETURN);
  MPI_Errhandler_free(&handler);
  MPI_Comm_get_errhandler(MPI_COMM_WORLD, &handler);
  CHECK(handler == MPI_ERRORS_ARE_FATAL);
  MPI_Errhandler_free(&handler);
  // The code of an MPI error and MPI's own words for it.
  CHECK_THROWS_MATCHES(plane.messenger().send(world_size(), Bytes(1)), TransportError,
                       says("MPI_Isend failed with code", "MPI_ERR_RANK"));
  check_all_gather(plane, 0);
}

TEST_CASE("a time-out over MPI names the rank that is late, and survivors go on") {
  if (skip_all_if(world_size() < 2, "needs two ranks")) {
    return;
  }
  const int late = world_size() - 1;
  auto plane = own_plane(300ms);
  if (world_rank() == late) {
    std::this_thread::sleep_for(700ms);
  } else {
    const auto start = Clock::now();
    try {
      plane.all_gather(message_of(1, 1));
      FAIL("all_gather returned without a rank");
    } catch (const TimeoutError& error) {
      CHECK(error.missing() == std::vector{late});
      CHECK_THAT(std::string(error.what()),
                 contains("all_gather #0 of group own", "rank " + std::to_string(late), "300 ms"));
    }
    const auto waited = Clock::now() - start;
    CHECK(waited >= 200ms);  // a peer that gives up a little earlier tells it
    CHECK(waited < 5s);
    CHECK(plane.poisoned());
    CHECK(plane.messenger().abandoned());
    CHECK_THROWS_MATCHES(plane.barrier(), TransportError, says("an earlier call"));
    std::vector<int> survivors(static_cast<std::size_t>(late));
    std::iota(survivors.begin(), survivors.end(), 0);
    check_all_gather(*plane.subgroup(survivors, 1, "survivors"), 1);
    CHECK_FALSE(plane.messenger().close());
    survivors.push_back(late);
    CHECK_THROWS_MATCHES(plane.subgroup(survivors, 2, "closed")->all_gather({}), TransportError,
                         says("the MPI session of this control plane has ended"));
  }
  world().barrier();
}

TEST_CASE("a time-out over MPI ends at its limit under signals that come faster than naps end") {
  if (skip_all_if(world_size() < 2, "needs two ranks")) {
    return;
  }
  const int late = world_size() - 1;
  auto plane = own_plane(1s);
  if (world_rank() == late) {
    std::this_thread::sleep_for(3s);
  } else {
    const FastSignals signals;
    const auto start = Clock::now();
    CHECK_THROWS_AS(plane.all_gather(message_of(1, 1)), TimeoutError);
    CHECK(Clock::now() - start < 3s);
  }
  world().barrier();
}

TEST_CASE("what a rank said before a sign that can be seen here is found, for all groups at once") {
  if (skip_all_if(world_size() < 2, "needs two ranks")) {
    return;
  }
  MPI_Comm near = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &near);
  int here = 0;
  MPI_Comm_size(near, &here);
  if (skip_all_if(here < world_size(), "needs all ranks on one machine")) {
    MPI_Comm_free(&near);
    return;
  }
  void* words = nullptr;
  MPI_Win window = MPI_WIN_NULL;
  MPI_Win_allocate_shared(world_rank() == 0 ? sizeof(std::atomic<int>) : 0, 1, MPI_INFO_NULL, near,
                          &words, &window);
  MPI_Aint bytes = 0;
  int unit = 0;
  MPI_Win_shared_query(window, 0, &bytes, &unit, &words);
  auto& sign = *static_cast<std::atomic<int>*>(words);
  if (world_rank() == 0) {
    sign = 0;
  }
  {
    auto plane = own_plane(20s);
    std::vector<int> all(static_cast<std::size_t>(world_size()));
    std::iota(all.begin(), all.end(), 0);
    for (int round = 1; round <= 50; ++round) {
      const auto tp = plane.subgroup(all, plane.new_generations(2), "tp");
      const auto dcp = plane.subgroup(all, plane.new_generations(1), "dcp");
      plane.barrier();
      if (world_rank() == 0) {
        dcp->give_up("its stream stood still");
        sign.store(round);
      } else {
        while (sign.load() < round) {
          std::this_thread::yield();
        }
        tp->check_peers();
        CHECK_THROWS_MATCHES(dcp->check_peers(PeerLook::heard), SymmetryError,
                             says("its stream stood still"));
      }
      plane.barrier();
    }
  }
  MPI_Win_free(&window);
  MPI_Comm_free(&near);
  world().barrier();
}

TEST_CASE("destroying a control plane waits for what it has sent") {
  constexpr std::size_t kBulk = std::size_t{1} << 20;
  const int n = world_size();
  {
    auto plane = own_plane(10s);
    if (world_rank() == 0) {
      plane.broadcast(Bytes(kBulk, std::byte{7}), 0);  // and goes, while the others come late
    } else {
      std::this_thread::sleep_for(100ms);
      CHECK(plane.broadcast({}, 0) == Bytes(kBulk, std::byte{7}));
    }
  }
  CHECK(n == world().size());
  world().barrier();
}
