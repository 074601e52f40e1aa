// SPDX-License-Identifier: Apache-2.0
// The groups of a layout, and what the policy decides for each.
//
//   mpirun -n 8 groups 4 2 2        tp pp dcp

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "cohort/cohort.hpp"
#include "cohort/mpi.hpp"
#include "support/in_rank_order.hpp"
#include "support/machine.hpp"

namespace {

int show(int argc, char** argv, cohort::ControlPlane& world) {
  const auto number = [&](int i) { return argc > i ? std::atoi(argv[i]) : 1; };
  const cohort::ParallelLayout layout{.tp = number(1), .pp = number(2), .dcp = number(3)};
  const auto machine = example::make_machine(example::backend_argument(argc, argv));

  // Collective over the world. TP, PP and DCP groups all get symmetric memory here.
  auto state = cohort::ParallelState::create(
      world, {.layout = layout,
              .backend = machine->backend(),
              .symmetric = {.enabled = true, .selection = cohort::Selection::all()}});

  auto& pp = state.pp();
  std::string text = fmt::format("rank {}:", world.rank());
  for (const cohort::GroupCoordinator* group :
       {static_cast<cohort::GroupCoordinator*>(&state.tp()),
        static_cast<cohort::GroupCoordinator*>(&pp),
        static_cast<cohort::GroupCoordinator*>(&state.dcp())}) {
    text += fmt::format(" {} {}/{}", group->name(), group->rank(), group->size());
  }
  text += pp.is_first() ? ", first stage" : "";
  text += pp.is_last() ? ", last stage" : "";
  example::print_in_rank_order(world, text);

  for (const cohort::GroupCoordinator* group : state.groups()) {
    example::print_in_rank_order(world, cohort::describe(group->decision()));
  }
  state.shutdown();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  cohort::MpiSession mpi(argc, argv);
  try {
    return show(argc, argv, mpi.world());
  } catch (const cohort::ConfigError& error) {  // the same on every rank, before anything is made
    if (mpi.world().rank() == 0) {
      fmt::print("{}\n", error.what());
    }
    return 2;
  }
}
