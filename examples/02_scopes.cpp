// SPDX-License-Identifier: Apache-2.0
// Scopes decide where cohort::empty allocates: in one group's symmetric arena, in an arena that is
// registered with several groups, or in ordinary memory.
//
//   mpirun -n 4 scopes

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "cohort/cohort.hpp"
#include "cohort/mpi.hpp"
#include "support/in_rank_order.hpp"
#include "support/machine.hpp"

namespace {

using cohort::DType;
using cohort::SymmetricScope;

/// Where a tensor lies: the arena and the offset in it, equal on every rank, or ordinary memory.
std::string place(const SymmetricScope& scope, const cohort::ScopeTarget& target,
                  const cohort::TensorView& tensor) {
  return scope.is_null() ? "ordinary memory"
                         : fmt::format("arena {} at offset {}", target.arena->name(),
                                       target.arena->offset_of(tensor.data()).value());
}

}  // namespace

int main(int argc, char** argv) {
  const auto arguments = example::arguments(argc, argv,
                                            "Shows where cohort::empty allocates under scopes.\n\n"
                                            "  mpirun -n 4 scopes\n");
  cohort::MpiSession mpi(argc, argv);
  auto& world = mpi.world();
  const auto say = [&](const std::string& text) { example::print_in_rank_order(world, text); };
  const auto machine = example::make_machine(arguments.backend);
  const auto stream = machine->stream();
  auto state = cohort::ParallelState::create(
      world, {.layout = {.tp = world.size(), .pp = 1, .dcp = std::max(1, world.size() / 2)},
              .backend = machine->backend(),
              .symmetric = {.enabled = true, .selection = cohort::Selection::all()}});

  // Room at a named point: within these 8 MiB no later allocation registers anything.
  state.dcp().reserve(8 << 20);
  {
    const SymmetricScope scope(state.dcp(), stream);
    const cohort::Tensor q = cohort::empty({8, 64}, DType::bf16);
    say("dcp scope:      " + place(scope, state.dcp(), q));

    // Scopes nest; the innermost counts. This audience's segments carry windows of two groups.
    const auto both = state.audience({&state.tp(), &state.dcp()});
    {
      const SymmetricScope inner(both, stream);
      example::Mirrored<float> x(*machine, cohort::empty({4}, DType::f32));
      say("two audiences:  " + place(inner, both, x.view()));

      // The same buffer takes the direct path in each of its groups.
      std::fill_n(x.host(), 4, 1.0F);
      x.upload();
      state.dcp().all_reduce(x.view(), stream);
      state.tp().all_reduce(x.view(), stream);
      x.download();
      state.tp().synchronize(stream, cohort::kDefaultTimeLimit);
      say(fmt::format("sum over dcp, then over tp: {}", x[0]));
    }

    const SymmetricScope off(state.dcp(), stream, cohort::ScopeMode::disabled);
    const cohort::Tensor scratch = cohort::empty({8, 64}, DType::bf16);
    say("disabled scope: " + place(off, state.dcp(), scratch));
  }

  // The blocks are free again and have coalesced.
  const auto statistics = state.dcp().arena()->statistics();
  say(fmt::format("dcp arena: {} segment, {} bytes used, {} at the peak", statistics.segments,
                  statistics.used, statistics.peak));
  try {
    static_cast<void>(cohort::empty({1}, DType::f32));
  } catch (const cohort::UsageError& error) {
    say(error.what());
  }
  state.shutdown();
  return 0;
}
