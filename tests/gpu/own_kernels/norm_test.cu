// SPDX-License-Identifier: Apache-2.0
#include "cohort/residual_norm.hpp"
#include "norm_tensors.cuh"

// The all-reduce with residual and RMS norm against the two calls that it stands for, bit by bit:
// rows around the boundaries of words, groups and blocks, aligned or not; graphs; few blocks and
// clusters; delays; ranks that differ.

namespace cohort::test {
namespace {

/// What an all-reduce and a norm behind it give on the rank.
std::vector<std::vector<std::byte>> results_of_two(World& world, std::vector<NormTensors>& tensors,
                                                   bool through_out) {
  const NormCase& c = tensors[0].c;
  const std::int64_t count = c.shape.rows * c.shape.hidden;
  std::vector<Buffer> sums;
  for (int r = 0; r < world.size(); ++r) {
    world.enter(r);
    sums.emplace_back(to_size(count) * size_of(c.shape.dtype));
  }
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    NormTensors& it = tensors[to_size(r)];
    void* const sum =
        through_out && !it.is_fp8() ? it.out.at(it.out_shift()) : sums[to_size(r)].at();
    cuda::peer_all_reduce(t, count, c.shape.dtype, it.x.at(it.shift()), sum, s);
    cuda::rms_norm(it.norm(sum), s);
  });
  std::vector<std::vector<std::byte>> all;
  for (NormTensors& it : tensors) {
    all.push_back(it.results());
    it.restore();
  }
  return all;
}

/// One launch against the two, on every rank.
void test_both(Tally& tally, World& world, const NormCase& c, PeerPath path, Random& random) {
  const int n = world.size();
  if (!cuda::choose_norm_plan(world.layout(), c.shape, path).fits) {
    return;
  }
  auto tensors = make_tensors(world, c, random);
  const auto wanted = results_of_two(world, tensors, random() % 2 == 0);
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    cuda::peer_all_reduce_rms_norm(t, tensors[to_size(r)].norm(), s, path);
  });
  bool good = true;
  bool alike = true;
  for (int r = 0; r < n; ++r) {
    const auto got = tensors[to_size(r)].results();
    good = good && got == wanted[to_size(r)];
    alike = alike && got == wanted[0];
  }
  tally.expect(good, norm_name(c, n, path) + " has the bits of two calls");
  tally.expect(alike, norm_name(c, n, path) + " has equal bits on all ranks");
}

constexpr PeerPath kNormPaths[] = {PeerPath::flag_word, PeerPath::flag_line, PeerPath::automatic};

void test_shapes(Tally& tally, World& world, Random& random) {
  constexpr DType kTypes[] = {DType::bf16, DType::f16, DType::f32};
  unsigned turn = 0;
  for (const std::int64_t hidden :
       {1, 2, 3, 4, 5, 7, 8, 60, 61, 120, 239, 240, 241, 1000, 2880, 7168, 7169, 16384}) {
    for (const std::int64_t rows : {1, 2, 5, 33}) {
      const DType dtype = kTypes[turn % 3];
      const bool fp8 = turn / 3 % 2 == 1;
      const NormCase c{.shape = {.rows = hidden > 8000 ? std::min<std::int64_t>(rows, 5) : rows,
                                 .hidden = hidden,
                                 .dtype = dtype,
                                 .out_dtype = fp8 ? DType::f8_e4m3 : dtype},
                       .shift = turn / 6 % 4 == 3 ? std::size_t{1} : std::size_t{0}};
      ++turn;
      for (const PeerPath path : kNormPaths) {
        test_both(tally, world, c, path, random);
      }
    }
  }
}

/// Rows of which some go in one launch by any path.
std::int64_t fitting_hidden(int n) { return n <= 8 ? 7168 : 1024; }

/// Some ranks' tensors are off their alignment and others' are not: all speak one protocol.
void test_mixed_alignment(Tally& tally, World& world, Random& random) {
  const NormCase even{.shape = {.rows = 3, .hidden = fitting_hidden(world.size())}};
  NormCase odd = even;
  odd.shift = 1;
  for (const PeerPath path : kNormPaths) {
    auto tensors = make_tensors(world, even, random);
    const auto wanted = results_of_two(world, tensors, false);
    std::vector<NormTensors> moved;
    for (int r = 0; r < world.size(); ++r) {
      world.enter(r);
      NormTensors& it = tensors[to_size(r)];
      const auto bytes = to_size(even.shape.rows * even.shape.row_bytes());
      moved.emplace_back(r % 2 == 0 ? odd : even, it.x.download<std::byte>(bytes), it.old_residual,
                         it.weight.download<std::byte>(to_size(even.shape.row_bytes())), 1.0F);
    }
    world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
      cuda::peer_all_reduce_rms_norm(t, moved[to_size(r)].norm(), s, path);
    });
    bool good = true;
    for (int r = 0; r < world.size(); ++r) {
      const NormTensors& it = moved[to_size(r)];
      const auto got = it.residual.download<std::byte>(it.old_residual.size() + it.shift());
      good = good && std::equal(got.begin() + static_cast<long>(it.shift()), got.end(),
                                wanted[to_size(r)].begin());
    }
    tally.expect(good, fmt::format("ranks of different alignment, n={} {}", world.size(),
                                   cuda::to_string(path)));
  }
}

/// Replays of a graph with several calls whose residual goes from one to the next, as in a model.
void test_graph(Tally& tally, World& world, Random& random) {
  constexpr int kLayers = 5;
  constexpr int kReplays = 4;
  const NormCase c{.shape = {.rows = 3, .hidden = fitting_hidden(world.size())}};
  auto tensors = make_tensors(world, c, random);
  const auto layers = [&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    for (int layer = 0; layer < kLayers; ++layer) {
      cuda::peer_all_reduce_rms_norm(t, tensors[to_size(r)].norm(), s, kNormPaths[layer % 3]);
    }
  };
  for (int replay = 0; replay < kReplays; ++replay) {
    world.run(layers);
  }
  std::vector<std::vector<std::byte>> wanted;
  for (NormTensors& it : tensors) {
    wanted.push_back(it.results());
    it.restore();
  }
  std::vector<cudaGraphExec_t> graphs;
  world.each([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    COHORT_CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    layers(r, t, s);
    COHORT_CHECK(cudaStreamEndCapture(s, &graph));
    COHORT_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    COHORT_CHECK(cudaGraphDestroy(graph));
    graphs.push_back(exec);
  });
  for (int replay = 0; replay < kReplays; ++replay) {
    world.each([&](int r, const cuda::PeerTable&, cudaStream_t s) {
      COHORT_CHECK(cudaGraphLaunch(graphs[to_size(r)], s));
    });
  }
  world.finish_all();
  bool good = true;
  for (std::size_t r = 0; r < tensors.size(); ++r) {
    good = good && tensors[r].results() == wanted[r];
    cudaGraphExecDestroy(graphs[r]);
  }
  tally.expect(good,
               fmt::format("replays of norms have the bits of eager calls, n={}", world.size()));
}

/// As many blocks as rows or fewer, so that they have several rows, and blocks that come late.
void test_few_blocks(Tally& tally, World& world, Random& random) {
  for (const int blocks : {1, 2, 3, 7}) {
    world.limit_blocks(blocks);
    for (unsigned turn = 0; turn < 6; ++turn) {
      world.delay(turn == 0 ? 0 : random() | 1U);
      const NormCase c{.shape = {.rows = 1 + turn,
                                 .hidden = 1200,
                                 .out_dtype = turn % 2 == 0 ? DType::bf16 : DType::f8_e4m3}};
      test_both(tally, world, c, kNormPaths[turn % 3], random);
    }
  }
  world.limit_blocks(0);
  world.delay(0);
}

/// Cards that run clusters of some sizes alone, or none: the bits are the same.
void test_clusters(Tally& tally, World& world, Random& random) {
  const cuda::ClusterRoom all = world.table(0).max_clusters;
  tally.expect(all.of_8 >= 2, "this card has clusters");
  for (const cuda::ClusterRoom& room :
       {cuda::ClusterRoom{all.of_2, all.of_4, 0}, cuda::ClusterRoom{all.of_2, 0, 0},
        cuda::ClusterRoom{}, cuda::ClusterRoom{1, 1, 1}}) {
    world.allow_clusters(room);
    for (const std::int64_t rows : {1, 2, 5}) {
      for (const PeerPath path : kNormPaths) {
        test_both(tally, world, {.shape = {.rows = rows, .hidden = 7168}}, path, random);
      }
    }
  }
  world.allow_clusters(all);
}

/// Whatever ranks have to agree on, the last one has otherwise, in one launch and in two: all fail,
/// and say that one of a pair of ranks was that one, and which calls those were.
void test_differing(Tally& tally, int n, int cards) {
  World world(n, 256 << 10, 256 << 10, 0, cards);
  Random random(9);
  const NormCase common{.shape = {.rows = 4, .hidden = 512}};
  const auto with = [&](const auto& change) {
    NormCase c = common;
    change(c);
    return c;
  };
  const struct {
    const char* what;
    NormCase c;
    bool normed = true;
  } cases[] = {
      {"rows", with([](NormCase& c) { c.shape.rows = 3; })},
      {"hidden", with([](NormCase& c) { c.shape.hidden = 510; })},
      {"shapes of equal size", with([](NormCase& c) { c.shape.rows = 2, c.shape.hidden = 1024; })},
      {"types", with([](NormCase& c) { c.shape.dtype = c.shape.out_dtype = DType::f16; })},
      {"types of output", with([](NormCase& c) { c.shape.out_dtype = DType::f8_e4m3; })},
      {"epsilons", with([](NormCase& c) { c.epsilon = 1e-6F; })},
      {"sums without a norm", common, false}};
  for (const auto& differing : cases) {
    auto usual = make_tensors(world, common, random);
    auto other = make_tensors(world, differing.c, random);
    for (const bool one_launch : {true, false}) {
      world.reset(std::chrono::seconds(30));
      world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
        const bool differs = r == n - 1;
        NormTensors& it = (differs ? other : usual)[to_size(r)];
        const bool normed = !differs || differing.normed;
        if (normed && one_launch) {
          cuda::peer_all_reduce_rms_norm(t, it.norm(), s);
          return;
        }
        const TensorView out(it.out.at(), it.c.shape.out_dtype,
                             {it.c.shape.rows, it.c.shape.hidden});
        const NormArguments arguments{
            .x = TensorView(it.x.at(), it.c.shape.dtype, out.shape()),
            .norm = {.residual = {}, .weight = ConstTensorView(), .epsilon = it.c.epsilon},
            .out = out};
        cuda::peer_all_reduce(t, out.numel(), it.c.shape.dtype, it.x.at(), it.x.at(), s,
                              PeerPath::automatic, normed ? arguments.form() : 0);
      });
      const auto mine =
          one_launch ? cuda::PeerCall::all_reduce_rms_norm : cuda::PeerCall::all_reduce;
      const auto theirs = differing.normed ? mine : cuda::PeerCall::all_reduce;
      bool good = true;
      world.each([&](int /*rank*/, const cuda::PeerTable& t, cudaStream_t s) {
        // The first pair that was found is told to all.
        const cuda::InboxError error = cuda::read_inbox_error(t, s);
        const bool last_waits = error.waiting_rank == n - 1;
        good = good && error.missing_rank >= 0 && last_waits != (error.missing_rank == n - 1) &&
               error.mine == (last_waits ? theirs : mine) &&
               error.theirs == (last_waits ? mine : theirs);
      });
      tally.expect(good, fmt::format("norms with different {} are told from each other, n={} {}",
                                     differing.what, n, one_launch ? "in one launch" : "in two"));
    }
  }

  // A rank that never comes: the wait ends at its limit, and names it.
  auto tensors = make_tensors(world, common, random);
  world.reset(std::chrono::milliseconds(200));
  world.enter(0);
  cuda::peer_all_reduce_rms_norm(world.table(0), tensors[0].norm(), world.stream(0));
  finish(world.stream(0));
  const auto error = cuda::read_inbox_error(world.table(0), world.stream(0));
  tally.expect(error.missing_rank == 1 && error.mine == cuda::PeerCall::all_reduce_rms_norm,
               "a norm whose peer never comes ends");
}

}  // namespace

void test_norms(Tally& tally, int n, int cards) {
  World world(n, 768 << 10, 768 << 10, 0, cards);
  Random random(static_cast<unsigned>(700 + n));
  if (n == 2) {
    test_clusters(tally, world, random);
  }
  if (n <= 3) {
    test_differing(tally, n, cards);
  }
  test_shapes(tally, world, random);
  test_mixed_alignment(tally, world, random);
  test_graph(tally, world, random);
  world.delay(77U + static_cast<unsigned>(n));
  test_graph(tally, world, random);
  test_few_blocks(tally, world, random);
  tally.expect(world.healthy(), fmt::format("norms set no error word, n={}", n));
}

}  // namespace cohort::test
