// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "world.cuh"

// All-gather, reduce-scatter, all-reduce and the barrier: sizes around every vector and block
// boundary, along dimensions, aligned or not, exact and random inputs, epochs across 2^32.

namespace cohort::test {
namespace {

using cuda::PeerPath;

constexpr PeerPath kPaths[] = {PeerPath::flag_word, PeerPath::flag_line};

/// One side of `AlongDim` with `gap` bytes after each outer index, at `shift` bytes of a buffer.
struct Case {
  std::int64_t outer;
  std::int64_t inner;  ///< elements
  std::int64_t gap;    ///< elements
  std::int64_t shift;  ///< elements
  DType dtype;
};

cuda::AlongDim dims_of(const Case& c, int n) {
  const auto element = static_cast<std::int64_t>(size_of(c.dtype));
  const std::int64_t inner = c.inner * element;
  const std::int64_t gap = c.gap * element;
  return {c.outer, inner, inner + gap, n * (inner + gap), inner + gap};
}

std::string name(const char* op, const Case& c, int n, PeerPath path) {
  return fmt::format("{} {} n={} outer={} inner={} gap={} shift={} {}", op, cuda::to_string(path),
                     n, c.outer, c.inner, c.gap, c.shift, to_string(c.dtype));
}

struct Sides {
  std::size_t element;
  std::size_t shift;       ///< bytes
  std::size_t share_span;  ///< elements in memory
  std::size_t full_span;
};

Sides sides_of(const Case& c, int n) {
  const std::size_t element = size_of(c.dtype);
  return {element, to_size(c.shift) * element, to_size(c.outer * (c.inner + c.gap)),
          to_size(c.outer * (c.inner + c.gap) * n)};
}

/// One for each rank, on its card.
std::vector<Buffer> make_buffers(const World& world, std::size_t bytes) {
  std::vector<Buffer> buffers;
  for (int r = 0; r < world.size(); ++r) {
    world.enter(r);
    buffers.emplace_back(bytes + 64);
  }
  return buffers;
}

bool all_gather_right(World& world, const Case& c, PeerPath path, Random& random) {
  const int n = world.size();
  const Sides s = sides_of(c, n);
  std::vector<std::vector<std::byte>> in;
  auto from = make_buffers(world, s.shift + s.share_span * s.element);
  auto to = make_buffers(world, s.shift + s.full_span * s.element);
  for (int r = 0; r < n; ++r) {
    in.push_back(random_elements(random, c.dtype, static_cast<std::int64_t>(s.share_span), false));
    from[to_size(r)].upload(in.back().data(), in.back().size(), s.shift);
  }
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
    cuda::peer_all_gather(t, dims_of(c, n), from[to_size(r)].at(s.shift),
                          to[to_size(r)].at(s.shift), stream, path);
  });
  const std::size_t row = to_size(c.inner + c.gap) * s.element;
  std::vector<std::byte> want(s.full_span * s.element, std::byte{0xff});
  for (std::int64_t o = 0; o < c.outer; ++o) {
    for (int r = 0; r < n; ++r) {
      std::memcpy(want.data() + (to_size(o * n + r)) * row,
                  in[to_size(r)].data() + to_size(o) * row, to_size(c.inner) * s.element);
    }
  }
  for (int r = 0; r < n; ++r) {
    const auto all = to[to_size(r)].download<std::byte>(s.shift + want.size());
    const auto begin = all.begin() + static_cast<long>(s.shift);
    const auto [wanted, got] = std::mismatch(want.begin(), want.end(), begin);
    if (wanted != want.end()) {
      fmt::print(stderr, "rank {} byte {}: {:#x} for {:#x}\n", r, wanted - want.begin(),
                 static_cast<unsigned>(*got), static_cast<unsigned>(*wanted));
      return false;
    }
  }
  return true;
}

/// Compares one element with a sum in fp64.
bool is_sum(DType dtype, double got, const std::vector<double>& terms) {
  double sum = 0;
  double magnitude = 0;
  for (const double term : terms) {
    sum += term;
    magnitude += std::abs(term);
  }
  return std::abs(got - sum) <=
         roundoff(dtype) * std::abs(sum) + static_cast<double>(terms.size()) * 0x1p-23 * magnitude;
}

bool reduce_scatter_right(World& world, const Case& c, PeerPath path, Random& random, bool exact) {
  const int n = world.size();
  const Sides s = sides_of(c, n);
  std::vector<std::vector<std::byte>> in;
  auto from = make_buffers(world, s.shift + s.full_span * s.element);
  auto to = make_buffers(world, s.shift + s.share_span * s.element);
  for (int r = 0; r < n; ++r) {
    in.push_back(random_elements(random, c.dtype, static_cast<std::int64_t>(s.full_span), exact));
    from[to_size(r)].upload(in.back().data(), in.back().size(), s.shift);
  }
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
    cuda::peer_reduce_scatter(t, dims_of(c, n), c.dtype, from[to_size(r)].at(s.shift),
                              to[to_size(r)].at(s.shift), stream, path);
  });
  bool good = true;
  for (int r = 0; r < n; ++r) {
    const auto all = to[to_size(r)].download<std::byte>(s.shift + s.share_span * s.element);
    for (std::int64_t o = 0; o < c.outer; ++o) {
      for (std::int64_t k = 0; k < c.inner; ++k) {
        const std::size_t row = to_size(c.inner + c.gap);
        std::vector<double> terms;
        for (const auto& input : in) {
          terms.push_back(
              decode(c.dtype, input.data() + (to_size(o * n + r) * row + to_size(k)) * s.element));
        }
        const double got =
            decode(c.dtype, all.data() + s.shift + (to_size(o) * row + to_size(k)) * s.element);
        good = good && (exact ? got == std::accumulate(terms.begin(), terms.end(), 0.0)
                              : is_sum(c.dtype, got, terms));
      }
    }
  }
  return good;
}

bool all_reduce_right(World& world, std::int64_t count, DType dtype, PeerPath path, bool in_place,
                      Random& random, bool exact) {
  const int n = world.size();
  const std::size_t element = size_of(dtype);
  std::vector<std::vector<std::byte>> in;
  auto from = make_buffers(world, to_size(count) * element);
  auto to = make_buffers(world, to_size(count) * element);
  for (int r = 0; r < n; ++r) {
    in.push_back(random_elements(random, dtype, count, exact));
    from[to_size(r)].upload(in.back().data(), in.back().size());
  }
  auto& result = in_place ? from : to;
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
    cuda::peer_all_reduce(t, count, dtype, from[to_size(r)].at(), result[to_size(r)].at(), stream,
                          path);
  });
  const auto first = result[0].download<std::byte>(to_size(count) * element);
  bool good = true;
  for (int r = 1; r < n; ++r) {
    good = good && first == result[to_size(r)].download<std::byte>(first.size());
  }
  for (std::int64_t i = 0; i < count; ++i) {
    std::vector<double> terms;
    for (const auto& input : in) {
      terms.push_back(decode(dtype, input.data() + to_size(i) * element));
    }
    const double got = decode(dtype, first.data() + to_size(i) * element);
    good = good && (exact ? got == std::accumulate(terms.begin(), terms.end(), 0.0)
                          : is_sum(dtype, got, terms));
  }
  return good;
}

/// Elements around the boundaries of words (8 bytes), lines (15 words), groups of lines, blocks and
/// grids.
std::vector<std::int64_t> counts_of(const World& world, DType dtype) {
  const auto per_word = 8 / static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t grid = std::int64_t{512} * world.layout().max_blocks;
  std::vector<std::int64_t> counts = {0, 1, 2, 3, 4, 5, 7, 8, 9};
  for (const std::int64_t words : {std::int64_t{15}, std::int64_t{60}, std::int64_t{64},
                                   std::int64_t{128}, std::int64_t{512}, grid}) {
    for (const std::int64_t delta : {-1, 0, 1}) {
      counts.push_back(words * per_word + delta);
    }
    counts.push_back((words + 1) * per_word);
  }
  return counts;
}

void test_sizes(Tally& tally, World& world, Random& random) {
  const int n = world.size();
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const std::int64_t count : counts_of(world, dtype)) {
      const bool exact = random() % 2 == 0;
      const Case c{1, count, 0, 0, dtype};
      for (const PeerPath path : kPaths) {
        tally.expect(all_gather_right(world, c, path, random), name("all_gather", c, n, path));
        tally.expect(reduce_scatter_right(world, c, path, random, exact),
                     name("reduce_scatter", c, n, path));
      }
      for (const PeerPath path : kPaths) {
        tally.expect(all_reduce_right(world, count, dtype, path, random() % 2 == 0, random, exact),
                     fmt::format("all_reduce {} n={} count={} {}", cuda::to_string(path), n, count,
                                 to_string(dtype)));
      }
    }
  }
}

void test_strides(Tally& tally, World& world, Random& random) {
  const int n = world.size();
  for (const Case& c : {Case{3, 8, 0, 0, DType::bf16}, Case{5, 7, 0, 0, DType::bf16},
                        Case{16, 1, 0, 0, DType::bf16}, Case{9, 12, 4, 0, DType::bf16},
                        Case{4, 64, 0, 1, DType::bf16}, Case{6, 5, 3, 3, DType::f16},
                        Case{7, 6, 2, 0, DType::f32}, Case{33, 100, 0, 1, DType::f32}}) {
    for (const PeerPath path : kPaths) {
      tally.expect(all_gather_right(world, c, path, random), name("all_gather", c, n, path));
      tally.expect(reduce_scatter_right(world, c, path, random, true),
                   name("reduce_scatter", c, n, path));
    }
  }
}

/// All-reduces in lines in two steps, of shares around the boundaries of lines and groups, the last
/// ranks' shorter than the others'. The inbox has no room for one step.
void test_two_steps(Tally& tally, int n, int cards) {
  Random random(static_cast<unsigned>(300 + n));
  for (const std::int64_t share : {59, 60, 66, 75, 119, 120, 121, 1000}) {
    const std::int64_t lane = (share + 59) / 60 * 480 + share * 8;
    World world(n, 0, lane, 0, cards);
    for (const std::int64_t missing : {0, 1, n - 1}) {
      const std::int64_t bytes = (n * share - missing) * 8;
      const cuda::AllReducePlan plan =
          cuda::choose_all_reduce_plan(world.layout(), bytes, PeerPath::flag_line);
      tally.expect(plan == cuda::AllReducePlan{true, true, true},
                   fmt::format("n={} share={} takes two steps in lines", n, share));
      for (const bool in_place : {false, true}) {
        tally.expect(all_reduce_right(world, bytes / 2 - 1, DType::bf16, PeerPath::flag_line,
                                      in_place, random, true),
                     fmt::format("all_reduce in two steps n={} share={} missing={} in_place={}", n,
                                 share, missing, in_place));
        tally.expect(all_reduce_right(world, bytes / 4, DType::f32, PeerPath::flag_line, in_place,
                                      random, true),
                     fmt::format("all_reduce of f32 in two steps n={} share={} missing={}", n,
                                 share, missing));
      }
    }
    tally.expect(world.healthy(), fmt::format("two steps set no error word, n={}", n));
  }
}

/// All-reduces in lines by few blocks, so that some warps send and others receive, which in place
/// must not overwrite what is still to be sent; blocks of some ranks come late.
void test_in_place(Tally& tally, int n, int cards) {
  World world(n, 0, 512 << 10, 0, cards);
  Random random(static_cast<unsigned>(400 + n));
  for (const int blocks : {1, 3}) {
    world.limit_blocks(blocks);
    for (const std::int64_t bytes : {12 << 10, 40 << 10, 200 << 10}) {
      for (unsigned turn = 0; turn < 6; ++turn) {
        world.delay(turn == 0 ? 0 : random() | 1U);
        const bool in_place = turn % 3 != 2;
        tally.expect(all_reduce_right(world, bytes / 2 + turn % 2, DType::bf16, PeerPath::flag_line,
                                      in_place, random, true),
                     fmt::format("all_reduce n={} bytes={} blocks={} in_place={} turn={}", n, bytes,
                                 blocks, in_place, turn));
      }
    }
  }
  tally.expect(world.healthy(), fmt::format("all-reduces in place set no error word, n={}", n));
}

/// More groups of lines than warps, so that some warps send and others receive.
void test_large(Tally& tally, int n, int cards) {
  constexpr std::int64_t kWarps = 31;
  constexpr std::int64_t kGroupBytes = 480;
  const std::int64_t blocks = World(n, 0, 0, 0, cards).layout().max_blocks;
  const std::int64_t bytes = 2 * blocks * kWarps * kGroupBytes;
  World world(n, 8 << 10, bytes + 1024, 0, cards);
  Random random(static_cast<unsigned>(n));
  for (const Case& c :
       {Case{1, bytes / 2 + 1, 0, 0, DType::bf16}, Case{2, bytes / 8, 4, 0, DType::f32}}) {
    tally.expect(all_gather_right(world, c, PeerPath::automatic, random),
                 name("large all_gather", c, n, PeerPath::automatic));
    tally.expect(reduce_scatter_right(world, c, PeerPath::automatic, random, true),
                 name("large reduce_scatter", c, n, PeerPath::automatic));
    for (const bool in_place : {false, true}) {
      tally.expect(all_reduce_right(world, c.outer * c.inner, c.dtype, PeerPath::automatic,
                                    in_place, random, true),
                   name("large all_reduce", c, n, PeerPath::automatic));
    }
  }
  tally.expect(world.healthy(), fmt::format("large payloads set no error word, n={}", n));
}

/// Calls whose grids differ, across a wrap of what flags carry of the epoch.
void test_wrap(Tally& tally, int n, int cards) {
  const std::uint64_t start = (std::uint64_t{1} << 32) - 8;
  World world(n, 64 << 10, 64 << 10, start, cards);
  Random random(static_cast<unsigned>(n));
  std::uint64_t epoch = start;
  bool good = true;
  for (int i = 0; i < 24; ++i) {
    const Case c{1, i % 3 == 0 ? 8 : 3000, 0, 0, DType::bf16};
    const PeerPath path = kPaths[i / 2 % 2];
    good = good && (i % 2 == 0 ? all_gather_right(world, c, path, random)
                               : reduce_scatter_right(world, c, path, random, true));
    epoch = epoch + 1;
    for (int r = 0; r < n; ++r) {
      good = good && world.epoch(r) == epoch;
    }
  }
  tally.expect(good && world.healthy(), fmt::format("epochs across 2^32, n={}", n));
}

void test_barrier(Tally& tally, World& world) {
  for (int i = 0; i < 20; ++i) {
    world.each([](int, const cuda::PeerTable& t, cudaStream_t s) { cuda::peer_barrier(t, s); });
  }
  world.finish_all();
  tally.expect(world.healthy(), fmt::format("barrier n={}", world.size()));
}

}  // namespace

void test_collectives(Tally& tally, int n, int cards) {
  World world(n, 768 << 10, 768 << 10, 0, cards);
  Random random(static_cast<unsigned>(100 + n));
  test_sizes(tally, world, random);
  test_strides(tally, world, random);
  test_barrier(tally, world);
  world.delay(1234567U + static_cast<unsigned>(n));
  test_strides(tally, world, random);
  test_barrier(tally, world);
  tally.expect(world.healthy(), fmt::format("no error word set, n={}", n));
  test_wrap(tally, n, cards);
  if (n > 2) {
    test_two_steps(tally, n, cards);
  }
  test_in_place(tally, n, cards);
  test_large(tally, n, cards);
}

}  // namespace cohort::test
