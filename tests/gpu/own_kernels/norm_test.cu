// SPDX-License-Identifier: Apache-2.0
#include <bit>

#include "world.cuh"

// The all-reduce with residual and RMS norm: against the two calls that it stands for, bit by bit;
// the norm alone against the order of its sums as documented, bit by bit, and against fp64. Rows
// around the boundaries of words, groups and blocks, aligned or not; graphs; few blocks; delays.

namespace cohort::test {
namespace {

using cuda::NormShape;
using cuda::PeerPath;

struct NormCase {
  NormShape shape;
  std::size_t shift = 0;  ///< Elements that every tensor is off its alignment.
  float epsilon = 1e-5F;
};

std::string name(const NormCase& c, int n, PeerPath path) {
  return fmt::format("all_reduce_rms_norm {} n={} rows={} hidden={} {} to {} shift={}",
                     cuda::to_string(path), n, c.shape.rows, c.shape.hidden,
                     to_string(c.shape.dtype), to_string(c.shape.out_dtype), c.shift);
}

/// Of outputs in f8_e4m3.
constexpr float kNormScale = 0.013F;

/// A rank's tensors, each beginning `shift` elements into its memory.
struct NormTensors {
  NormCase c;
  Buffer x;
  Buffer residual;
  Buffer weight;
  Buffer out;
  Buffer scale;
  std::vector<std::byte> old_residual;

  NormTensors(const NormCase& norm, const std::vector<std::byte>& first,
              const std::vector<std::byte>& rest, const std::vector<std::byte>& weights,
              float factor)
      : c(norm),
        x(first.size() + shift()),
        residual(rest.size() + shift()),
        weight(weights.size() + shift()),
        out(to_size(c.shape.rows * c.shape.hidden) * size_of(c.shape.out_dtype) + out_shift()),
        scale(sizeof(float)),
        old_residual(rest) {
    x.upload(first.data(), first.size(), shift());
    weight.upload(weights.data(), weights.size(), shift());
    scale.upload(&factor, sizeof(factor));
    restore();
  }

  void restore() {
    residual.upload(old_residual.data(), old_residual.size(), shift());
    out.poison();
  }
  [[nodiscard]] std::size_t shift() const { return c.shift * size_of(c.shape.dtype); }
  [[nodiscard]] std::size_t out_shift() const { return c.shift * size_of(c.shape.out_dtype); }
  [[nodiscard]] bool is_fp8() const { return c.shape.out_dtype != c.shape.dtype; }
  [[nodiscard]] cuda::Norm norm(const void* sum) const {
    return {.shape = c.shape,
            .x = sum,
            .residual = residual.at(shift()),
            .weight = weight.at(shift()),
            .out = out.at(out_shift()),
            .scale = is_fp8() ? scale.at<float>() : nullptr,
            .epsilon = c.epsilon};
  }
  [[nodiscard]] cuda::Norm norm() const { return norm(x.at(shift())); }
  /// Everything in the memory of the new residual, then of the output, what lies beside them too.
  [[nodiscard]] std::vector<std::byte> results() const {
    auto all = residual.download<std::byte>(old_residual.size() + shift());
    const auto bytes = out.download<std::byte>(
        to_size(c.shape.rows * c.shape.hidden) * size_of(c.shape.out_dtype) + out_shift());
    all.insert(all.end(), bytes.begin(), bytes.end());
    return all;
  }
};

std::vector<NormTensors> make_tensors(World& world, const NormCase& c, Random& random) {
  const std::int64_t count = c.shape.rows * c.shape.hidden;
  const auto rest = random_elements(random, c.shape.dtype, count, false);
  const auto weights = random_elements(random, c.shape.dtype, c.shape.hidden, false);
  std::vector<NormTensors> tensors;
  for (int r = 0; r < world.size(); ++r) {
    world.enter(r);
    tensors.emplace_back(c, random_elements(random, c.shape.dtype, count, false), rest, weights,
                         kNormScale);
  }
  return tensors;
}

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

/// What a row is multiplied with, by the documented order of its sums: what the residual becomes is
/// `y`. But for the reciprocal root, which the card takes within two units in the last place.
float norm_factor(const NormShape& shape, const std::vector<float>& y, float epsilon) {
  const auto per_word = static_cast<std::int64_t>(8 / size_of(shape.dtype));
  std::vector<float> groups;
  const auto butterfly = [](std::vector<float> values) {
    for (std::size_t distance = 16; distance > 0; distance /= 2) {
      const std::vector<float> before = values;
      for (std::size_t i = 0; i < 32; ++i) {
        values[i] = before[i] + before[i ^ distance];
      }
    }
    return values[0];
  };
  for (std::int64_t group = 0; group < shape.groups(); ++group) {
    std::vector<float> threads(32, 0.0F);
    for (std::int64_t t = 0; t < 32; ++t) {
      const std::int64_t first = (group * 4 + t / 8) * 15 + t % 8 * 2;
      for (std::int64_t word = first; word < first + (t % 8 == 7 ? 1 : 2); ++word) {
        for (std::int64_t e = word * per_word; e < (word + 1) * per_word; ++e) {
          const float value = e < shape.hidden ? y[to_size(e)] : 0.0F;
          threads[to_size(t)] = std::fma(value, value, threads[to_size(t)]);
        }
      }
    }
    groups.push_back(butterfly(threads));
  }
  std::vector<float> lanes(32, 0.0F);
  for (std::size_t i = 0; i < groups.size(); ++i) {
    lanes[i % 32] += groups[i];
  }
  const float mean = butterfly(lanes) * (1.0F / static_cast<float>(shape.hidden));
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(mean + epsilon)));
}

/// Whether an element of the output is that of the residual, the factor and the weight.
bool is_normed(const NormTensors& it, const std::byte* there, float y, float factor, float weight) {
  const float normed = y * factor * weight;
  if (it.is_fp8()) {
    const float inverse = 1.0F / kNormScale;
    return static_cast<std::uint8_t>(*there) == float_to_f8_e4m3(normed * inverse);
  }
  std::byte want[4];
  encode(it.c.shape.dtype, normed, want);
  return std::memcmp(want, there, size_of(it.c.shape.dtype)) == 0;
}

std::vector<float> floats_of(DType dtype, const std::byte* from, std::int64_t count) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i) {
    values.push_back(static_cast<float>(decode(dtype, from + to_size(i) * size_of(dtype))));
  }
  return values;
}

/// The norm alone against its definition: bits of the residual and of every row of the output, and
/// the rows near what fp64 gives.
void test_alone(Tally& tally, World& world, const NormCase& c, Random& random) {
  const auto& shape = c.shape;
  auto tensors = make_tensors(world, c, random);
  NormTensors& it = tensors[0];
  world.enter(0);
  const auto x = it.x.download<std::byte>(to_size(shape.rows * shape.row_bytes()) + it.shift());
  const auto weights = it.weight.download<std::byte>(to_size(shape.row_bytes()) + it.shift());
  cuda::rms_norm(it.norm(), world.stream(0));
  finish(world.stream(0));
  const auto got = it.results();
  const std::byte* residual = got.data() + it.shift();
  const std::byte* out = got.data() + it.shift() * 1 + it.old_residual.size() + it.out_shift();
  const auto weight = floats_of(shape.dtype, weights.data() + it.shift(), shape.hidden);
  bool same_residual = true;
  bool same_bits = true;
  bool near_fp64 = true;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    const std::size_t at = to_size(row * shape.row_bytes());
    const auto a = floats_of(shape.dtype, x.data() + it.shift() + at, shape.hidden);
    const auto b = floats_of(shape.dtype, it.old_residual.data() + at, shape.hidden);
    const auto y = floats_of(shape.dtype, residual + at, shape.hidden);
    double squares = 0;
    for (std::int64_t i = 0; i < shape.hidden; ++i) {
      std::byte want[4];
      encode(shape.dtype, a[to_size(i)] + b[to_size(i)], want);
      same_residual =
          same_residual && std::memcmp(want, residual + at + to_size(i) * size_of(shape.dtype),
                                       size_of(shape.dtype)) == 0;
      squares += static_cast<double>(y[to_size(i)]) * static_cast<double>(y[to_size(i)]);
    }
    const double exact = 1.0 / std::sqrt(squares / static_cast<double>(shape.hidden) +
                                         static_cast<double>(c.epsilon));
    const float factor = norm_factor(shape, y, c.epsilon);
    const std::byte* const normed = out + to_size(row * shape.hidden) * size_of(shape.out_dtype);
    bool one_factor = false;
    for (std::uint32_t bits = std::bit_cast<std::uint32_t>(factor) - 2, i = 0; i < 5; ++i) {
      bool all = true;
      for (std::size_t k = 0; k < y.size(); ++k) {
        all = all && is_normed(it, normed + k * size_of(shape.out_dtype), y[k],
                               std::bit_cast<float>(bits + i), weight[k]);
      }
      one_factor = one_factor || all;
    }
    same_bits = same_bits && one_factor;
    for (std::size_t k = 0; k < y.size(); ++k) {
      const double wanted = exact * static_cast<double>(y[k]) * static_cast<double>(weight[k]);
      const std::byte* const there = normed + k * size_of(shape.out_dtype);
      if (it.is_fp8()) {
        const double scaled = std::clamp(wanted / static_cast<double>(kNormScale), -448.0, 448.0);
        const auto got_there =
            static_cast<double>(f8_e4m3_to_float(static_cast<std::uint8_t>(*there)));
        near_fp64 = near_fp64 &&
                    std::abs(got_there - scaled) <= std::abs(scaled) * 0x1p-4 * 1.001 + 0x1p-10;
      } else {
        near_fp64 = near_fp64 && std::abs(decode(shape.dtype, there) - wanted) <=
                                     std::abs(wanted) * (roundoff(shape.dtype) + 0x1p-18) + 1e-7;
      }
    }
  }
  const std::string what = name(c, 1, PeerPath::automatic);
  tally.expect(same_residual, "the residual of a norm: " + what);
  tally.expect(same_bits, "the documented order of a norm: " + what);
  tally.expect(near_fp64, "a norm beside fp64: " + what);
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
  tally.expect(good, name(c, n, path) + " has the bits of two calls");
  tally.expect(alike, name(c, n, path) + " has equal bits on all ranks");
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

/// NaN and infinity come out where they belong, and fp8 keeps within its numbers.
void test_special_values(Tally& tally, World& world) {
  const NormCase c{.shape = {.rows = 2, .hidden = 8, .out_dtype = DType::f8_e4m3}};
  std::vector<std::byte> x(32);
  std::vector<std::byte> zero(32);
  std::vector<std::byte> ones(16);
  for (std::size_t i = 0; i < 16; ++i) {
    encode(DType::bf16, i == 9 ? NAN : i < 8 ? 1.0F : 2.0F, x.data() + 2 * i);
    encode(DType::bf16, 0.0F, zero.data() + 2 * i);
  }
  for (std::size_t i = 0; i < 8; ++i) {
    encode(DType::bf16, i == 0 ? 1000.0F : i == 1 ? -1000.0F : 1.0F, ones.data() + 2 * i);
  }
  world.enter(0);
  NormTensors it(c, x, zero, ones, 1.0F);
  cuda::rms_norm(it.norm(), world.stream(0));
  finish(world.stream(0));
  const auto out = it.out.download<std::uint8_t>(16);
  bool good = out[0] == 0x7e && out[1] == 0xfe;
  for (std::size_t i = 2; i < 8; ++i) {
    good = good && out[i] == 0x38;
  }
  for (std::size_t i = 8; i < 16; ++i) {
    good = good && (out[i] & 0x7f) == 0x7f;
  }
  tally.expect(good, "large values and NaN in f8_e4m3");
}

/// Ranks whose calls differ fail, and say which calls those were.
void test_differing(Tally& tally, int cards) {
  World world(2, 256 << 10, 256 << 10, 0, cards);
  Random random(9);
  auto tensors = make_tensors(world, {.shape = {.rows = 2, .hidden = 512}}, random);
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    cuda::Norm norm = tensors[to_size(r)].norm();
    norm.epsilon = r == 0 ? 1e-5F : 1e-6F;
    cuda::peer_all_reduce_rms_norm(t, norm, s);
  });
  bool good = true;
  world.each([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    const cuda::InboxError error = cuda::read_inbox_error(t, s).seen_by(r);
    good = good && error.missing_rank == 1 - r &&
           error.mine == cuda::PeerCall::all_reduce_rms_norm &&
           error.theirs == cuda::PeerCall::all_reduce_rms_norm;
  });
  tally.expect(good, "norms with different epsilons are told from each other");

  // A rank that never comes: the wait ends at its limit, and names it.
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
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
      for (const std::int64_t hidden : {1, 7, 64, 241, 2880, 7168, 16384}) {
        for (const std::size_t shift : {0, 1}) {
          test_alone(tally, world, {.shape = {3, hidden, dtype, dtype}, .shift = shift}, random);
          test_alone(tally, world, {.shape = {3, hidden, dtype, DType::f8_e4m3}, .shift = shift},
                     random);
        }
      }
    }
    test_special_values(tally, world);
    test_differing(tally, cards);
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
