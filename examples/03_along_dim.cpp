// SPDX-License-Identifier: Apache-2.0
// Collectives along any dimension, of any strides: the result has its final layout, and no call
// site permutes or copies.
//
//   mpirun -n 2 along_dim

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <string>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/mpi.hpp"
#include "support/in_rank_order.hpp"
#include "support/machine.hpp"

namespace {

using cohort::Dims;
using cohort::DType;
using example::Mirrored;

/// A matrix row by row.
std::string rows(const Mirrored<float>& x) {
  const auto columns = static_cast<std::size_t>(x.view().size(1));
  std::string text;
  for (std::size_t i = 0; i < x.size(); i += columns) {
    text += fmt::format("\n    {}", fmt::join(x.host() + i, x.host() + i + columns, " "));
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const auto arguments = example::arguments(
      argc, argv,
      "Runs collectives along any dimension, of strided inputs and unequal shares.\n\n"
      "  mpirun -n 2 along_dim\n");
  cohort::MpiSession mpi(argc, argv);
  auto& world = mpi.world();
  const auto machine = example::make_machine(arguments.backend);
  const auto stream = machine->stream();
  auto state =
      cohort::ParallelState::create(world, {.layout = {.tp = world.size(), .pp = 1, .dcp = 1},
                                            .backend = machine->backend(),
                                            .symmetric = {.enabled = true}});
  auto& tp = state.tp();
  const auto show = [&](const std::string& title, const Mirrored<float>& x) {
    x.download();
    tp.synchronize(stream, cohort::kDefaultTimeLimit);
    example::print_in_rank_order(world,
                                 fmt::format("{} on rank {}:{}", title, world.rank(), rows(x)));
  };
  {
    const cohort::SymmetricScope scope(tp, stream);
    const auto matrix = [&](const Dims& shape) {
      return Mirrored<float>(*machine, cohort::empty(shape, DType::f32));
    };

    // x on rank r holds 100 r + 10 row + column.
    const auto x = matrix({2, 2});
    for (std::size_t i = 0; i < 4; ++i) {
      const std::size_t place = 10 * (i / 2) + i % 2;
      x[i] = static_cast<float>(100 * world.rank()) + static_cast<float>(place);
    }
    x.upload();
    show("x", x);

    const Mirrored<float> columns(*machine, tp.all_gather(x.view(), -1, stream));
    show("all_gather(x, -1)", columns);

    // A transposed view is as good an input as any.
    const Mirrored<float> transposed(*machine, tp.all_gather(x.view().transpose(0, 1), 0, stream));
    show("all_gather(transpose(x), 0)", transposed);

    const Mirrored<float> sums(*machine, tp.reduce_scatter_along_dim(columns.view(), 1, stream));
    show("reduce_scatter_along_dim(columns, 1)", sums);

    // Unequal shares: rank r brings r + 1 columns.
    std::vector<std::int64_t> shares;
    for (int r = 0; r < world.size(); ++r) {
      shares.push_back(r + 1);
    }
    const std::int64_t mine = world.rank() + 1;
    const auto share = matrix({2, mine});
    std::fill_n(share.host(), share.size(), static_cast<float>(world.rank()));
    share.upload();
    const Mirrored<float> all(*machine, tp.all_gatherv(share.view(), shares, 1, stream));
    show("all_gatherv(share, 1)", all);

    // A wrong argument is an error before anything is sent, and the group works on.
    try {
      tp.reduce_scatter_into(sums.view(), x.view(), 2, stream);
    } catch (const cohort::UsageError& error) {
      example::print_in_rank_order(world, error.what());
    }
  }
  state.shutdown();
  return 0;
}
