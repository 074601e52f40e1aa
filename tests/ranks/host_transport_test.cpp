// SPDX-License-Identifier: Apache-2.0
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/host_site.hpp"
#include "support/ranks.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("processes of one machine map each other's memory") {
  Site site(world(), {}, Memory::window);
  CHECK(site.transport->capabilities().machines == 1);
  CHECK(site.transport->capabilities().peer_import);
  const auto peers = site.window->peers();
  REQUIRE(peers.size() == static_cast<std::size_t>(world_size()));
  *static_cast<int*>(site.segment->data()) = 1000 + world_rank();
  site.transport->barrier({});
  for (int r = 0; r < world_size(); ++r) {
    CHECK(*static_cast<const int*>(peers[static_cast<std::size_t>(r)]) == 1000 + r);
  }
  site.transport->barrier({});
}

TEST_CASE("collectives between processes are exact") {
  for (const Memory memory : kMemories) {
    for (const auto& options : {HostOptions{}, small_slots(), apart()}) {
      if (!options.map_peers && memory != Memory::ordinary) {
        continue;
      }
      for (const auto& shape :
           std::vector<std::vector<std::int64_t>>{{8}, {3, 5, 7}, {4, 96, 64}}) {
        for (const Form form : kForms) {
          check_shape(world(), options, memory, shape, form);
        }
      }
    }
  }
}

TEST_CASE("tensors larger than the slots pass between processes") {
  for (const Memory memory : kMemories) {
    Site site(world(), {}, memory, std::size_t{96} << 20);
    const int n = world_size();
    check_all_gather(site, world(), Dims{4, 1024, 512}, 0, equal_sizes(n, 1), DType::i8,
                     Form::contiguous);
    check_reduce_scatter(site, world(), Dims{1}, 0, equal_sizes(n, 70001), DType::f32,
                         ReduceOp::sum, Form::contiguous);
    check_all_reduce(site, world(), Dims{333, 1001}, DType::f32, ReduceOp::sum, Form::contiguous,
                     true);
  }
}

TEST_CASE("a thousand rounds of windows leave no descriptor and no mapping") {
  const auto count_files = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                         std::filesystem::directory_iterator{});
  };
  const auto count_maps = [] {
    std::ifstream maps("/proc/self/maps");
    int found = 0;
    for (std::string line; std::getline(maps, line);) {
      found += line.find("memfd:cohort.") != std::string::npos ? 1 : 0;
    }
    return found;
  };
  world().barrier();
  const auto files = count_files();
  const auto maps = count_maps();
  const int rounds = full_run() ? 1000 : 1000 / (world_size() * world_size());
  for (int round = 0; round < rounds; ++round) {
    auto backend = host_backend({.slot_bytes = 4096});
    auto transport = backend->connect(world());
    auto segment = backend->allocate_segment(4096);
    const auto window = transport->register_segment(*segment);
    transport->barrier({});
  }
  CHECK(count_files() == files);
  CHECK(count_maps() == maps);
}

// Hidden: the last rank kills itself; the survivors name it within the limit.
TEST_CASE("a killed rank is named", "[.killed]") {
  Site site(world(), {}, Memory::window);
  const auto in = site.tensor(Dims{4096}, DType::f32, Form::contiguous);
  const auto out = site.tensor(Dims{4096 * world_size()}, DType::f32, Form::contiguous);
  for (int i = 0; i < 100; ++i) {
    site.transport->all_gather(in, out, 0, equal_sizes(world_size(), 4096), {});
  }
  if (world_rank() == world_size() - 1) {
    std::raise(SIGKILL);
  }
  try {
    site.transport->all_gather(in, out, 0, equal_sizes(world_size(), 4096), {});
    std::printf("survivor: the call returned\n");
  } catch (const TimeoutError& error) {
    std::printf("survivor %d: %s\n", world_rank(), error.what());
  }
  std::fflush(stdout);
  std::_Exit(1);  // MPI_Finalize, and the ranks' agreement on the test, would wait for the dead one
}
