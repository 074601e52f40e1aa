// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cohort/cohort.hpp>
#include <cstddef>
#include <string>

#include "random.hpp"
#include "support/group_tensors.hpp"

/// \file
/// A world of ranks that are threads, as a fuzzer draws it.

namespace cohort::fuzz {

struct Setup {
  int ranks = 1;
  ParallelLayout layout;
  std::size_t slot_bytes = 4096;
  std::size_t window_bytes = 2048;
  bool map_peers = true;
  bool two_machines = false;
  bool symmetric = true;
  bool needs_equal_offsets = false;
  bool debug_checks = false;
  MergeOptions merge = {};

  [[nodiscard]] ParallelState create(ControlPlane& world) const {
    HostOptions host{
        .slot_bytes = slot_bytes, .window_bytes = window_bytes, .map_peers = map_peers};
    host.needs_equal_offsets = needs_equal_offsets;
    if (two_machines) {
      host.machine = world.rank() < ranks / 2 ? "one" : "other";
    }
    ParallelOptions options{.layout = layout, .backend = host_backend(std::move(host))};
    options.symmetric = {.enabled = symmetric, .selection = Selection::all()};
    options.merge = merge;
    options.debug_checks = debug_checks;
    options.arena.growth_bytes = std::size_t{1} << 18;
    return ParallelState::create(world, std::move(options));
  }
};

[[nodiscard]] inline std::string to_string(const Setup& setup) {
  return fmt::format(
      "{} ranks as {}, slots of {} bytes, windows from {} on{}{}{}{}{}\n", setup.ranks,
      to_string(setup.layout), setup.slot_bytes, setup.window_bytes,
      setup.map_peers ? "" : ", peers not mapped", setup.two_machines ? ", two machines" : "",
      setup.symmetric ? "" : ", symmetric off", setup.needs_equal_offsets ? ", equal offsets" : "",
      setup.debug_checks ? ", debug" : "");
}

[[nodiscard]] inline Setup draw_setup(Random& random) {
  Setup setup;
  setup.ranks = static_cast<int>(random.between(1, 5));
  auto& layout = setup.layout;
  layout.tp = setup.ranks;
  if (setup.ranks == 4 && random.one_in(2)) {
    layout.tp = random.pick({1, 2});
  } else if (random.one_in(4)) {
    layout.tp = 1;
  }
  layout.pp = setup.ranks / layout.tp;
  layout.dcp = layout.tp == 4 ? random.pick({1, 2, 4}) : random.one_in(4) ? 1 : layout.tp;
  setup.slot_bytes = random.pick<std::size_t>({4096, 4096, 8192, 65536, 1 << 20});
  setup.window_bytes = random.pick<std::size_t>({256, 2048, 1 << 23});
  setup.map_peers = !random.one_in(4);
  setup.two_machines = random.one_in(5);
  setup.symmetric = !random.one_in(4);
  setup.needs_equal_offsets = random.one_in(4);
  setup.debug_checks = random.one_in(6);
  return setup;
}

}  // namespace cohort::fuzz
