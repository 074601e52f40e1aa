// SPDX-License-Identifier: Apache-2.0
// The groups of a layout, and what the policy decides for each.
//
//   mpirun -n 8 groups 4 2 2        tp pp dcp

#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <string>

#include "cohort/cohort.hpp"
#include "cohort/mpi.hpp"
#include "support/in_rank_order.hpp"
#include "support/machine.hpp"

namespace {

int show(example::Arguments arguments, cohort::ControlPlane& world) {
  arguments.numbers.resize(3, 1);
  const cohort::ParallelLayout layout{
      .tp = arguments.numbers[0], .pp = arguments.numbers[1], .dcp = arguments.numbers[2]};
  const auto machine = example::make_machine(arguments.backend);

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
  const auto arguments = example::arguments(
      argc, argv,
      "Forms the groups of a layout TP PP DCP and prints what the policy decides for each.\n\n"
      "  mpirun -n 8 groups 4 2 2\n",
      3);
  cohort::MpiSession mpi(argc, argv);
  try {
    return show(arguments, mpi.world());
  } catch (const cohort::ConfigError& error) {  // the same on every rank, before anything is made
    if (mpi.world().rank() == 0) {
      fmt::print("{}\n", error.what());
    }
    return 2;
  }
}
