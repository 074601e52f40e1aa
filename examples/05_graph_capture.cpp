// SPDX-License-Identifier: Apache-2.0
// Captures collectives of two groups in one graph and launches it again and again with fresh
// inputs. On the host a stream is an in-order executor, so this runs everywhere.
//
//   mpirun -n 4 graph_capture

#include <fmt/format.h>

#include <string>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/mpi.hpp"
#include "support/in_rank_order.hpp"
#include "support/machine.hpp"

namespace {

using cohort::DType;

/// One layer's collectives: the sum over the DCP group of what the TP group gathers.
void layer(cohort::ParallelState& state, const example::Mirrored<float>& in,
           const example::Mirrored<float>& out, cohort::StreamRef stream) {
  in.upload();
  const cohort::Tensor gathered = state.tp().all_gather(in.view(), 0, stream);
  state.dcp().all_reduce_into(out.view(), gathered, stream);
  out.download();
}

}  // namespace

int main(int argc, char** argv) {
  const auto arguments =
      example::arguments(argc, argv,
                         "Captures collectives in graphs and launches them with fresh inputs.\n\n"
                         "  mpirun -n 4 graph_capture\n");
  cohort::MpiSession mpi(argc, argv);
  auto& world = mpi.world();
  const auto say = [&](const std::string& text) { example::print_in_rank_order(world, text); };
  const auto machine = example::make_machine(arguments.backend);
  const auto stream = machine->stream();
  auto state = cohort::ParallelState::create(
      world, {.layout = {.tp = world.size(), .pp = 1, .dcp = 2},
              .backend = machine->backend(),
              .symmetric = {.enabled = true, .selection = cohort::Selection::all()}});
  state.tp().reserve(1 << 20);  // an arena never grows while a stream is being captured
  {
    const auto ranks = static_cast<std::int64_t>(world.size());
    auto& backend = *machine->backend();
    const example::Mirrored<float> in(*machine, backend.allocate({1}, DType::f32, stream));
    const example::Mirrored<float> out(*machine, backend.allocate({ranks}, DType::f32, stream));

    cohort::CapturedGraph graph = state.capture(stream, [&] { layer(state, in, out, stream); });
    for (int launch = 1; launch <= 3; ++launch) {
      in[0] = static_cast<float>(launch * (world.rank() + 1));
      graph.launch(stream);
      state.tp().synchronize(stream, cohort::kDefaultTimeLimit);
      say(fmt::format("launch {}: last element {}", launch, out[out.size() - 1]));
    }

    // Graphs that are never in flight together share a pool, as an engine's batch sizes do.
    const auto leased = [&, before = state.tp().arena()->statistics().used] {
      return state.tp().arena()->statistics().used - before;
    };
    cohort::GraphPool pool;
    std::vector<cohort::CapturedGraph> graphs;
    for (int batch = 0; batch < 3; ++batch) {
      graphs.push_back(state.capture(
          stream, [&] { layer(state, in, out, stream); }, &pool));
      say(fmt::format("graphs of one pool: {}, {} bytes leased", graphs.size(), leased()));
    }

    // An engine that captures by itself opens a CaptureScope inside its capture.
    auto& driver = stream.driver();
    driver.begin_capture(stream.native());
    {
      const cohort::CaptureScope scope(state, stream);
      layer(state, in, out, stream);
    }
    const auto own = driver.end_capture(stream.native());
    own->launch(stream);
    state.tp().synchronize(stream, cohort::kDefaultTimeLimit);
    say(fmt::format("engine's own capture: last element {}", out[out.size() - 1]));

    try {
      const auto never = state.capture(stream, [&] {
        static_cast<void>(state.tp().arena()->empty({1 << 30}, DType::u8, stream));
      });
    } catch (const cohort::UsageError& error) {
      say(error.what());
    }
  }
  state.reclaim_graphs();
  say(fmt::format("all graphs gone: {} bytes used", state.tp().arena()->statistics().used));
  state.shutdown();
  return 0;
}
