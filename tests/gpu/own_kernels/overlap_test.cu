// SPDX-License-Identifier: Apache-2.0
#include <functional>

#include "world.cuh"

// Kernels that wait for peers, several at once: of two groups on two streams, of a group on a card
// whose other multiprocessors are held, of ranks whose calls differ, and waits that the host ends.

namespace cohort::test {
namespace {

constexpr int kHeads = 128;
constexpr int kDim = 512;

__device__ std::uint64_t now_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void spin(std::uint64_t ns) {
  const std::uint64_t end = now_ns() + ns;
  while (now_ns() < end) {
  }
}

/// Each block fills a multiprocessor until the word is set, or for ten seconds, and says so.
__global__ void __launch_bounds__(1024, 1)
    occupy(const volatile int* release, volatile int* started) {
  const std::uint64_t end = now_ns() + 10'000'000'000ULL;
  if (threadIdx.x == 0) {
    started[blockIdx.x] = 1;
    while (*release == 0 && now_ns() < end) {
      __nanosleep(20'000);
    }
  }
  __syncthreads();
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// What a rank's call of either group needs.
struct Memory {
  explicit Memory(std::int64_t batch)
      : in(to_size(std::max<std::int64_t>(batch * kHeads * kDim * 2, 1 << 20))),
        lse(to_size(batch * kHeads * 4)),
        out(to_size(std::max<std::int64_t>(batch * kHeads * kDim * 2, 1 << 20))) {
    COHORT_CHECK(cudaMemset(in.at(), 0, 1 << 20));
    COHORT_CHECK(cudaMemset(lse.at(), 0, to_size(batch * kHeads * 4)));
    COHORT_CHECK(cudaDeviceSynchronize());
  }
  Buffer in;
  Buffer lse;
  Buffer out;
};

std::vector<Memory> memory_of(World& world, std::int64_t batch) {
  std::vector<Memory> all;
  for (int r = 0; r < world.size(); ++r) {
    world.enter(r);
    all.emplace_back(batch);
  }
  return all;
}

void merge(const cuda::PeerTable& t, const Memory& m, std::int64_t batch, cudaStream_t stream,
           cuda::PeerPath path = cuda::PeerPath::automatic) {
  cuda::peer_merge(t, {batch, kHeads, kDim, DType::bf16, LseBase::e},
                   {m.in.at(), kHeads * kDim, kDim, m.lse.at<float>(), kHeads, 1},
                   {m.out.at(), kHeads / t.size * kDim, kDim}, stream, path);
}

/// TP and DCP of the same ranks on two streams each, and each rank's streams get ready in another
/// order: on whole cards either group's kernels would keep the other's out.
void test_two_groups(Tally& tally, int n, int cards, int rounds) {
  World tp(n, 512 << 10, 1 << 20, 0, cards);
  World dcp(n, 512 << 10, 16 << 20, 0, cards);
  tp.reset(std::chrono::seconds(5));
  dcp.reset(std::chrono::seconds(5));
  auto reduced = memory_of(tp, 1);
  auto merged = memory_of(dcp, 128);
  const std::int64_t bytes[] = {132 << 10, 264 << 10, 512 << 10};
  const std::int64_t batches[] = {1, 8, 30, 64, 128};
  int round = 0;
  for (; round < rounds && (round % 100 != 0 || (tp.healthy() && dcp.healthy())); ++round) {
    const std::int64_t size = bytes[round % 3];
    const std::int64_t batch = batches[round / 3 % 5];
    for (int r = 0; r < n; ++r) {
      tp.enter(r);
      spin<<<1, 1, 0, (r + round) % 2 == 0 ? tp.stream(r) : dcp.stream(r)>>>(60'000);
      cuda::peer_all_reduce(tp.table(r), size / 2, DType::bf16, reduced[to_size(r)].in.at(),
                            reduced[to_size(r)].out.at(), tp.stream(r));
      merge(dcp.table(r), merged[to_size(r)], batch, dcp.stream(r));
    }
    if (round % 100 == 99) {
      tp.finish_all();
      dcp.finish_all();
    }
  }
  tp.finish_all();
  dcp.finish_all();
  tally.expect(
      round == rounds && tp.healthy() && dcp.healthy(),
      fmt::format("{} ranks: {} of {} rounds of two groups on two streams", n, round, rounds));
}

/// Whether calls pass while each card has `free` multiprocessors left.
void test_few_multiprocessors(Tally& tally, int n, int cards, std::int64_t batch, int free,
                              cuda::PeerPath path) {
  World world(n, 512 << 10, 64 << 20, 0, cards, World::multiprocessors());
  world.reset(std::chrono::seconds(3));
  auto memory = memory_of(world, batch);
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    merge(t, memory[to_size(r)], batch, s, path);
  });
  constexpr int kMostBlocks = 1024;
  int* words = nullptr;  // whether to go, then a word for each card's blocks
  const std::size_t count = to_size(1 + cards * kMostBlocks);
  COHORT_CHECK(cudaHostAlloc(&words, count * sizeof(int), cudaHostAllocPortable));
  std::fill(words, words + count, 0);
  std::vector<cudaStream_t> holders;
  const int held = World::multiprocessors() - free;
  for (int card = 0; card < cards; ++card) {
    COHORT_CHECK(cudaSetDevice(card));
    cudaStream_t stream = nullptr;
    COHORT_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    holders.push_back(stream);
    // Shared memory, too, so that no other block fits beside it.
    COHORT_CHECK(cudaFuncSetAttribute(occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, 200000));
    occupy<<<held, 1024, 200000, stream>>>(words, words + 1 + card * kMostBlocks);
    COHORT_CHECK(cudaGetLastError());
  }
  const auto start = std::chrono::steady_clock::now();
  const auto all_started = [&] {
    return std::count(static_cast<volatile int*>(words + 1),
                      static_cast<volatile int*>(words + count), 1) == held * cards;
  };
  while (!all_started() && seconds_since(start) < 5) {
  }
  const bool occupied = all_started();
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    merge(t, memory[to_size(r)], batch, s, path);
  });
  const double taken = seconds_since(start);
  const bool healthy = world.healthy();
  static_cast<volatile int*>(words)[0] = 1;
  for (cudaStream_t stream : holders) {
    finish(stream);
    cudaStreamDestroy(stream);
  }
  tally.expect(
      occupied && healthy && taken < 2.5,
      fmt::format("{} ranks: a merge of {} with {} multiprocessors left, {}: {} in {:.2f} s", n,
                  batch, free, cuda::to_string(path),
                  occupied ? healthy ? "healthy" : "failed" : "not occupied", taken));
  cudaFreeHost(words);
}

/// The host ends a wait long before its limit, and learns who was missing.
void test_give_up(Tally& tally, int n, int cards) {
  World world(n, 512 << 10, 1 << 20, 0, cards);
  world.reset(std::chrono::seconds(60));
  auto memory = memory_of(world, 1);
  const auto reduce = [&](int r) {
    world.enter(r);
    cuda::peer_all_reduce(world.table(r), 4096, DType::bf16, memory[to_size(r)].in.at(),
                          memory[to_size(r)].out.at(), world.stream(r));
  };
  const int absent = n - 1;
  for (int r = 0; r < absent; ++r) {
    reduce(r);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  tally.expect(!world.words(0).failed(), "a wait within its limit is no failure");
  const auto start = std::chrono::steady_clock::now();
  world.words(0).give_up();
  for (int r = 0; r < absent; ++r) {
    finish(world.stream(r));
  }
  const double taken = seconds_since(start);
  tally.expect(taken < 1.0,
               fmt::format("{} ranks: the wait ended {:.3f} s after it was told to", n, taken));
  for (int r = 0; r < absent; ++r) {  // the others were told by rank 0
    tally.expect(world.words(r).failed() && world.words(r).missing() == std::vector<int>{absent},
                 fmt::format("{} ranks: rank {} names the rank that did not come", n, r));
  }
  reduce(absent);  // late
  finish(world.stream(absent));
  tally.expect(world.words(absent).failed(), "the late rank learns that it was given up");
}

/// Calls that differ end at once and name the rank and its call.
void test_mismatch(Tally& tally, int n, int cards) {
  World world(n, 512 << 10, 1 << 20, 0, cards);
  auto memory = memory_of(world, 1);
  const auto reduce = [&](int r, std::int64_t count) {
    world.enter(r);
    cuda::peer_all_reduce(world.table(r), count, DType::bf16, memory[to_size(r)].in.at(),
                          memory[to_size(r)].out.at(), world.stream(r));
  };
  const auto gather = [&](int r, std::int64_t bytes) {
    world.enter(r);
    cuda::peer_all_gather(world.table(r), cuda::AlongDim::contiguous(1, bytes, n),
                          memory[to_size(r)].in.at(), memory[to_size(r)].out.at(), world.stream(r));
  };
  struct Difference {
    const char* name;
    std::function<void(int)> most;
    std::function<void(int)> last;
    cuda::PeerCall mine;
    cuda::PeerCall theirs;
  };
  const Difference differences[] = {
      {"another operation", [&](int r) { reduce(r, 512); }, [&](int r) { gather(r, 1024); },
       cuda::PeerCall::all_reduce, cuda::PeerCall::all_gather},
      {"another size", [&](int r) { gather(r, 2048); }, [&](int r) { gather(r, 1024); },
       cuda::PeerCall::all_gather, cuda::PeerCall::all_gather},
      {"another type of the same size", [&](int r) { reduce(r, 512); },
       [&](int r) {
         world.enter(r);
         cuda::peer_all_reduce(world.table(r), 512, DType::f16, memory[to_size(r)].in.at(),
                               memory[to_size(r)].out.at(), world.stream(r));
       },
       cuda::PeerCall::all_reduce, cuda::PeerCall::all_reduce},
      {"a call that was left out",
       [&](int r) {
         reduce(r, 512);
         cuda::peer_barrier(world.table(r), world.stream(r));
       },
       [&](int r) { cuda::peer_barrier(world.table(r), world.stream(r)); },
       cuda::PeerCall::all_reduce, cuda::PeerCall::barrier},
  };
  for (const Difference& difference : differences) {
    world.reset(std::chrono::seconds(30));
    world.run([&](int r, const cuda::PeerTable&, cudaStream_t) { reduce(r, 512); });
    const auto start = std::chrono::steady_clock::now();
    for (int r = 0; r < n; ++r) {
      world.enter(r);
      r == n - 1 ? difference.last(r) : difference.most(r);
    }
    world.finish_all();
    const double taken = seconds_since(start);
    tally.expect(taken < 5, fmt::format("{}: it took {:.2f} s", difference.name, taken));
    const cuda::InboxError error = world.words(0).failure();
    // The error that came first may be the last rank's, which names another.
    const bool first = error.waiting_rank != n - 1 && error.missing_rank == n - 1 &&
                       error.mine == difference.mine && error.theirs == difference.theirs;
    const bool last = error.waiting_rank == n - 1 && error.missing_rank != n - 1 &&
                      error.mine == difference.theirs && error.theirs == difference.mine;
    tally.expect(error.epoch == 2 && (first || last),
                 fmt::format("{}: rank 0 has epoch {}, rank {}, {} and {}", difference.name,
                             error.epoch, error.missing_rank, cuda::to_string(error.mine),
                             cuda::to_string(error.theirs)));
  }
}

/// A call may have fewer blocks, with the same results.
void test_block_limit(Tally& tally, int n, int cards) {
  World world(n, 512 << 10, 16 << 20, 0, cards);
  auto memory = memory_of(world, 64);
  for (const int blocks : {0, 16, 1}) {
    world.limit_blocks(blocks);
    for (const auto path : {cuda::PeerPath::flag_word, cuda::PeerPath::flag_line}) {
      const std::int64_t batch = path == cuda::PeerPath::flag_word ? 4 : 64;
      world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
        merge(t, memory[to_size(r)], batch, s, path);
      });
      tally.expect(world.healthy(), fmt::format("{} ranks: a merge with {} blocks, {}", n, blocks,
                                                cuda::to_string(path)));
    }
  }
}

}  // namespace

void test_overlap(Tally& tally, int cards, int rounds) {
  const int n = std::max(2, cards);
  test_give_up(tally, n, cards);
  test_mismatch(tally, n, cards);
  test_block_limit(tally, n, cards);
  if (cards < 2) {
    return;  // ranks of one card share its multiprocessors: the rest is about whole cards
  }
  for (const int free : {16, 4}) {
    test_few_multiprocessors(tally, n, cards, 512, free, cuda::PeerPath::flag_line);
    test_few_multiprocessors(tally, n, cards, 4, free, cuda::PeerPath::flag_word);
  }
  test_two_groups(tally, n, cards, rounds);
}

}  // namespace cohort::test
