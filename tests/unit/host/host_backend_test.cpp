// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cohort/host/host_backend.hpp>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;

namespace {

std::ptrdiff_t open_files() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                       std::filesystem::directory_iterator{});
}

/// Mappings of the library's memory files.
int mapped_files() {
  std::ifstream maps("/proc/self/maps");
  int found = 0;
  for (std::string line; std::getline(maps, line);) {
    found += line.find("memfd:cohort.") != std::string::npos ? 1 : 0;
  }
  return found;
}

}  // namespace

TEST_CASE("ordinary tensors are aligned and belong to whoever holds them", "[host]") {
  auto backend = host_backend();
  CHECK(backend->kind() == BackendKind::host);
  CHECK(backend->device() == Device{});
  auto tensor = backend->allocate(Dims{3, 5}, DType::bf16, {});
  CHECK(reinterpret_cast<std::uintptr_t>(tensor.data()) % 64 == 0);
  CHECK(tensor.bytes() == 30);
  CHECK(backend->allocate(Dims{0}, DType::f32, {}).numel() == 0);
}

TEST_CASE("memory allocated in a capture lives as long as the graph", "[host]") {
  auto backend = host_backend();
  HostStream stream;
  std::vector<float> result(1);
  stream.begin_capture();
  {
    const auto temporary = backend->allocate(Dims{1}, DType::f32, stream);
    float* memory = temporary.data_as<float>();
    stream.submit([memory] { *memory = 42; });
    backend->ops().copy(temporary, TensorView(result.data(), DType::f32, Dims{1}), stream);
  }
  auto graph = stream.end_capture();
  graph->launch(stream);  // address sanitizer watches
  CHECK(result[0] == 42);
}

TEST_CASE("segments come in pages and within the limit", "[host]") {
  auto backend = host_backend({.segment_limit = 16384});
  CHECK_THROWS_MATCHES(backend->allocate_segment(100), UsageError, says("4096", "100"));
  CHECK_THROWS_AS(backend->allocate_segment(0), UsageError);
  auto first = backend->allocate_segment(12288);
  CHECK(first->bytes() == 12288);
  CHECK_THROWS_MATCHES(backend->allocate_segment(8192), TransportError,
                       says("8192 bytes", "limit of 16384"));
  first.reset();
  CHECK(backend->allocate_segment(16384)->data() != nullptr);
}

TEST_CASE("a workspace is memory of the process alone, within the same limit", "[host]") {
  auto backend = host_backend({.segment_limit = 16384});
  const auto files = open_files();
  const auto first = backend->allocate_workspace(12288);
  CHECK(first->bytes() == 12288);
  CHECK(static_cast<const char*>(first->data())[12287] == 0);
  CHECK(open_files() == files);
  CHECK(mapped_files() == 0);
  CHECK_THROWS_MATCHES(backend->allocate_workspace(8192), TransportError, says("limit of 16384"));
  CHECK_THROWS_MATCHES(backend->allocate_workspace(100), UsageError, says("4096", "100"));
}

TEST_CASE("options that differ are named before anyone relies on them", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    auto backend =
        host_backend({.slot_bytes = plane.rank() == 2 ? std::size_t{4096} : std::size_t{8192}});
    check_throws<SymmetryError>([&] { (void)backend->connect(plane); }, "rank 2", "4096 bytes");
  });
}

TEST_CASE("a rank of another build is refused on all ranks", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    Introduction mine;
    (void)exchange_introductions(plane, mine);
    mine.protocol += plane.rank() == 1 ? 1U : 0U;
    check_throws<SymmetryError>(
        [&] { (void)exchange_introductions(plane, mine); },
        plane.rank() == 1 ? "rank 0, 2 runs a build" : "rank 1 runs a build", "another layout");
    if (plane.rank() == 1) {  // an introduction of another size
      (void)plane.all_gather(std::as_bytes(std::span(&mine, 1)).first(8));
    } else {
      check_throws<SymmetryError>([&] { (void)exchange_introductions(plane, mine); },
                                  "rank 1 runs a build");
    }
  });
}

TEST_CASE("what a rank says of itself is read within its bounds", "[host]") {
  std::vector<Introduction> all(2);
  all[0].machine.fill('m');  // no zero ends it
  all[1].machine.fill('m');
  all[1].obstacle.fill('o');
  CHECK(count_machines(all) == 1);
  CHECK(obstacle_among(all) == "rank 1: " + std::string(all[1].obstacle.size(), 'o'));

  const PadGeometry geometry{.ranks = 1, .slot_bytes = 4096};
  const auto small = make_shared_memory(4096, Commit::at_first_access);
  all.resize(1);
  all[0].pad = small->handle();
  CHECK_THAT(import_pads(all, geometry).failure, contains("rank 0", "4096 bytes"));
}

TEST_CASE("one rank that maps nobody takes the whole group over the control plane", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    Site site(plane, {.map_peers = plane.rank() != 1}, Memory::ordinary);
    check(!site.transport->capabilities().peer_import, "no reach");
    check(site.transport->capabilities().transport_windows, "memory files work");
    check(site.transport->capabilities().obstacle == "rank 1: HostOptions::map_peers is false",
          "the cause");
    check_all_gather(site, plane, Dims{2, 3}, 0, {1, 2, 3}, DType::f32, Form::contiguous);
  });
}

TEST_CASE("a thousand transports and windows leave nothing", "[host]") {
  const auto files = open_files();
  const auto maps = mapped_files();
  run_ranks(2, [&](ControlPlane& plane) {
    for (int round = 0; round < 1000; ++round) {
      auto backend = host_backend({.slot_bytes = 4096});
      auto transport = backend->connect(plane);
      auto segment = backend->allocate_segment(4096);
      auto window = transport->register_segment(*segment);
      if (round % 100 == 0) {
        transport->barrier({});
      }
      plane.barrier();  // nobody leaves while a peer still connects
    }
  });
  CHECK(open_files() == files);
  CHECK(mapped_files() == maps);
}
