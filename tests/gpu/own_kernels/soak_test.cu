// SPDX-License-Identifier: Apache-2.0
#include <memory>

#include "world.cuh"

// Random sequences of calls, eager and in two graphs interleaved, with inputs that change at every
// call, delays of ranks and blocks, and a second load on the card. Everything is checked on the
// device: inputs and expectations follow from a call counter.

namespace cohort::test {
namespace {

/// What a call moves. Elements are bf16 and small integers, so sums are exact.
enum class Kind { gather, scatter, reduce, query, merge, barrier };

struct Step {
  Kind kind;
  std::int64_t outer = 1;
  std::int64_t inner = 0;  ///< elements of a share; all_reduce: of the whole
  std::int64_t batch = 0;
  std::int64_t heads = 0;  ///< of one rank
  std::int64_t dim = 0;
  std::int64_t pe = 0;
  cuda::PeerPath path = cuda::PeerPath::automatic;
};

__device__ float value_of(std::uint32_t counter, int rank, std::uint32_t i) {
  const std::uint32_t x =
      i * 7 + counter * 13 + static_cast<std::uint32_t>(rank) * 5 + (i >> 6) * 3;
  return static_cast<float>(static_cast<int>(x % 17) - 8);
}

__device__ bool empty_of(std::uint32_t counter, int rank, std::uint32_t row) {
  return (row + counter + static_cast<std::uint32_t>(rank)) % 5 == 0;
}

__device__ float lse_of(std::uint32_t counter, int rank, std::uint32_t row) {
  const std::uint32_t x = row * 3 + counter + static_cast<std::uint32_t>(rank) * 11;
  return empty_of(counter, rank, row) ? -INFINITY
                                      : static_cast<float>(static_cast<int>(x % 17) - 8);
}

__device__ std::uint16_t bf16_bits(float value) {  // exact for small integers
  return static_cast<std::uint16_t>(__float_as_uint(value) >> 16);
}

/// Writes this call's inputs. Triggers its dependents at its very start, as attention kernels do:
/// a peer kernel that read before its predecessor has completed would read the previous call's.
__global__ void produce(std::uint16_t* in, std::uint32_t count, float* lse, std::uint32_t rows,
                        std::uint32_t row_length, const std::uint32_t* counter, int rank) {
  cudaTriggerProgrammaticLaunchCompletion();
  const std::uint32_t c = *counter;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += gridDim.x * blockDim.x) {
    const bool hole = rows != 0 && empty_of(c, rank, i / row_length);
    in[i] = hole ? 0xffff : bf16_bits(value_of(c, rank, i));
  }
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rows;
       i += gridDim.x * blockDim.x) {
    lse[i] = lse_of(c, rank, i);
  }
}

__global__ void advance(std::uint32_t* counter) { *counter += 1; }

/// Holds a rank back by up to 30 microseconds, at some calls.
__global__ void hold(const std::uint32_t* counter, int rank, std::uint32_t seed) {
  std::uint32_t x = *counter * 0x9e3779b9U ^ static_cast<std::uint32_t>(rank) * 0x85ebca6bU ^ seed;
  x ^= x >> 15, x *= 0x2c1b3c6dU, x ^= x >> 13;
  if (x % 8 == 0) {
    const long long until = clock64() + (x >> 8) % 50000;
    while (clock64() < until) {
    }
  }
}

struct Check {
  int n;
  int rank;
  std::int64_t outer, inner, heads, dim, pe;
  Kind kind;
};

__device__ float from_bits(std::uint16_t bits) {
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

__device__ bool merged_right(const Check& k, std::uint32_t c, std::uint32_t i, float got) {
  const auto dim = static_cast<std::uint32_t>(k.dim);
  const auto heads = static_cast<std::uint32_t>(k.heads);
  const std::uint32_t row = i / dim;
  const std::uint32_t global_row = row / heads * heads * static_cast<std::uint32_t>(k.n) +
                                   static_cast<std::uint32_t>(k.rank) * heads + row % heads;
  float max = -INFINITY;
  for (int r = 0; r < k.n; ++r) {
    max = fmaxf(max, lse_of(c, r, global_row));
  }
  float sum = 0;
  float total = 0;
  for (int r = 0; r < k.n && max > -INFINITY; ++r) {
    const float weight = expf(lse_of(c, r, global_row) - max);
    sum += weight;
    total += weight > 0 ? weight * value_of(c, r, global_row * dim + i % dim) : 0.0F;
  }
  const float want = sum > 0 ? total / sum : 0.0F;
  return fabsf(got - want) <= 0.005F * fabsf(want) + 0.0005F;  // false for NaN
}

/// Counts wrong elements of `out` and poisons it for the next call. May be launched early, as
/// attention is behind a query gather.
__global__ void verify(std::uint16_t* out, std::uint32_t count, Check k,
                       const std::uint32_t* counter, unsigned long long* wrong) {
  cudaGridDependencySynchronize();
  const std::uint32_t c = *counter;
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += gridDim.x * blockDim.x) {
    const float got = from_bits(out[i]);
    const auto inner = static_cast<std::uint32_t>(k.inner);
    const auto n = static_cast<std::uint32_t>(k.n);
    const auto rank = static_cast<std::uint32_t>(k.rank);
    bool good = true;
    if (k.kind == Kind::gather) {
      const std::uint32_t o = i / inner / n;
      good = got == value_of(c, static_cast<int>(i / inner % n), o * inner + i % inner);
    } else if (k.kind == Kind::scatter || k.kind == Kind::reduce) {
      const std::uint32_t at =
          k.kind == Kind::reduce ? i : (i / inner * n + rank) * inner + i % inner;
      float want = 0;
      for (int r = 0; r < k.n; ++r) {
        want += value_of(c, r, at);
      }
      good = got == want;
    } else if (k.kind == Kind::query) {
      const auto row_length = static_cast<std::uint32_t>(k.dim + k.pe);
      const auto heads = static_cast<std::uint32_t>(k.heads);
      const std::uint32_t row = i / row_length;
      const std::uint32_t b = row / (heads * n);
      const std::uint32_t h = row % (heads * n);
      const std::uint32_t d = i % row_length;
      const std::uint32_t source_row = b * heads + h % heads;
      const auto nope = static_cast<std::uint32_t>(k.dim);
      const auto rows = count / row_length / n;
      const std::uint32_t at =
          d < nope ? source_row * nope + d
                   : rows * nope + source_row * static_cast<std::uint32_t>(k.pe) + d - nope;
      good = got == value_of(c, static_cast<int>(h / heads), at);
    } else {
      good = merged_right(k, c, i, got);
    }
    if (!good) {
      atomicAdd(wrong, 1ULL);
    }
    out[i] = 0xffff;
  }
}

__global__ void other_load(float* memory, std::uint32_t count) {
  for (std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
       i += gridDim.x * blockDim.x) {
    memory[i] = memory[i] * 0.5F + 1.0F;
  }
}

/// Elements that a step reads and writes on one rank.
std::int64_t input_of(const Step& s, int n) {
  switch (s.kind) {
    case Kind::gather:
    case Kind::reduce:
      return s.outer * s.inner;
    case Kind::scatter:
      return s.outer * s.inner * n;
    case Kind::query:
      return s.batch * s.heads * (s.dim + s.pe);
    case Kind::merge:
      return s.batch * s.heads * n * s.dim;
    case Kind::barrier:
      return 0;
  }
  return 0;
}

std::int64_t output_of(const Step& s, int n) {
  switch (s.kind) {
    case Kind::gather:
      return s.outer * s.inner * n;
    case Kind::scatter:
    case Kind::reduce:
      return s.outer * s.inner;
    case Kind::query:
      return s.batch * s.heads * n * (s.dim + s.pe);
    case Kind::merge:
      return s.batch * s.heads * s.dim;
    case Kind::barrier:
      return 0;
  }
  return 0;
}

Step random_step(Random& random, int n) {
  const auto pick = [&](std::initializer_list<std::int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  const auto path = static_cast<cuda::PeerPath>(random() % 3);
  Step s{};
  s.kind = static_cast<Kind>(random() % 6);
  s.outer = pick({1, 1, 2, 5});
  s.inner = pick({0, 1, 3, 4, 8, 60, 256, 1021, 2048, 8192});
  if (s.kind == Kind::reduce) {
    s.inner *= n;
  }
  s.batch = pick({0, 1, 2, 5, 16});
  s.heads = pick({1, 2, 5, 8});
  s.dim = pick({8, 64, 512});
  s.pe = s.kind == Kind::query ? pick({0, 64}) : 0;
  s.path = path;
  return s;
}

constexpr std::int64_t kMostElements = std::int64_t{1} << 20;

/// All ranks' buffers, counters and error counts, and how a step is enqueued on all of them.
class Soak {
 public:
  Soak(int n, int cards, std::uint32_t seed)
      : world_(n, 320 << 10, 320 << 10, kFirstEpoch, cards), random_(seed), alone_(cards >= n) {
    world_.delay(seed | 1U);
    for (int r = 0; r < n; ++r) {
      world_.enter(r);
      in_.emplace_back(to_size(kMostElements) * 2);
      lse_.emplace_back(to_size(kMostElements) / 8 * 4);
      out_.emplace_back(to_size(kMostElements) * 2 * 2);
      counters_.emplace_back(16);
      COHORT_CHECK(cudaMemset(counters_.back().at(), 0, 16));
      COHORT_CHECK(cudaDeviceSynchronize());
    }
    world_.enter(0);
    COHORT_CHECK(cudaStreamCreateWithFlags(&load_stream_, cudaStreamNonBlocking));
  }
  Soak(const Soak&) = delete;
  Soak& operator=(const Soak&) = delete;
  ~Soak() {
    for (auto& graph : graphs_) {
      for (cudaGraphExec_t exec : graph.execs) {
        cudaGraphExecDestroy(exec);
      }
    }
    cudaStreamDestroy(load_stream_);
  }

  /// Enqueues one step with its producer and check. `repeat` issues the call that many times in a
  /// row, so that peer kernels follow each other directly.
  void enqueue(const Step& s, int repeat) {
    world_.each([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
      enqueue_on(s, repeat, r, t, stream);
    });
  }

  /// Captures `steps` random steps, the same on every rank.
  void add_graph(int steps) {
    std::vector<std::pair<Step, int>> chosen;
    Graph graph;
    for (int i = 0; i < steps; ++i) {
      chosen.emplace_back(random_step(random_, world_.size()), 1 + static_cast<int>(random_() % 3));
      graph.calls += chosen.back().second;
    }
    world_.each([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
      COHORT_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      for (const auto& [step, repeat] : chosen) {
        enqueue_on(step, repeat, r, t, stream);
      }
      cudaGraph_t captured = nullptr;
      COHORT_CHECK(cudaStreamEndCapture(stream, &captured));
      cudaGraphExec_t exec = nullptr;
      COHORT_CHECK(cudaGraphInstantiate(&exec, captured, 0));
      COHORT_CHECK(cudaGraphUpload(exec, stream));
      COHORT_CHECK(cudaGraphDestroy(captured));
      graph.execs.push_back(exec);
    });
    world_.finish_all();
    graphs_.push_back(std::move(graph));
  }

  /// Runs about `calls` calls and returns how many it was.
  std::int64_t run(std::int64_t calls) {
    std::int64_t done = 0;
    for (int turn = 0; done < calls; ++turn) {
      if (random_() % 4 == 0) {
        const int repeat = 1 + static_cast<int>(random_() % 3);
        enqueue(random_step(random_, world_.size()), repeat);
        done += repeat;
      } else {
        const Graph& graph = graphs_[random_() % graphs_.size()];
        world_.each([&](int r, const cuda::PeerTable&, cudaStream_t stream) {
          COHORT_CHECK(cudaGraphLaunch(graph.execs[to_size(r)], stream));
        });
        done += graph.calls;
      }
      if (turn % 4 == 0) {
        world_.enter(0);
        other_load<<<8, 256, 0, load_stream_>>>(load_.at<float>(), 1 << 20);
      }
      if (turn % 16 == 15) {
        world_.finish_all();
        finish(load_stream_);
      }
    }
    world_.finish_all();
    finish(load_stream_);
    return done;
  }

  [[nodiscard]] unsigned long long wrong() const {
    unsigned long long sum = 0;
    for (const Buffer& buffer : counters_) {
      sum += buffer.download<unsigned long long>(2)[1];
    }
    return sum;
  }
  [[nodiscard]] World& world() { return world_; }

 private:
  static constexpr std::uint64_t kFirstEpoch = (std::uint64_t{1} << 32) - 8;

  struct Graph {
    std::vector<cudaGraphExec_t> execs;
    int calls = 0;
  };

  void enqueue_on(const Step& s, int repeat, int r, const cuda::PeerTable& t, cudaStream_t stream) {
    const int n = world_.size();
    auto* counter = counters_[to_size(r)].at<std::uint32_t>();
    auto* in = in_[to_size(r)].at<std::uint16_t>();
    auto* out = out_[to_size(r)].at<std::uint16_t>();
    auto* lse = lse_[to_size(r)].at<float>();
    const bool merges = s.kind == Kind::merge;
    const auto rows = static_cast<std::uint32_t>(merges ? s.batch * s.heads * n : 0);
    const auto inputs = static_cast<std::uint32_t>(input_of(s, n));
    const auto outputs = static_cast<std::uint32_t>(output_of(s, n));
    if (inputs > kMostElements || outputs > 2 * kMostElements) {
      std::fprintf(stderr, "the soak's buffers are too small\n");
      std::exit(3);
    }
    advance<<<1, 1, 0, stream>>>(counter);
    hold<<<1, 1, 0, stream>>>(counter, r, 77);
    produce<<<8, 256, 0, stream>>>(in, inputs, lse, rows,
                                   static_cast<std::uint32_t>(std::max<std::int64_t>(s.dim, 1)),
                                   counter, r);
    for (int i = 0; i < repeat; ++i) {
      call(s, t, in, lse, out, stream);
    }
    if (s.kind != Kind::barrier) {
      const Check check{n,       r,     s.outer, std::max<std::int64_t>(s.inner, 1),
                        s.heads, s.dim, s.pe,    s.kind};
      cudaLaunchAttribute early{};
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = 8;
      config.blockDim = 256;
      config.stream = stream;
      config.attrs = &early;
      config.numAttrs = 1;
      COHORT_CHECK(cudaLaunchKernelEx(&config, verify, out, outputs, check,
                                      static_cast<const std::uint32_t*>(counter),
                                      counters_[to_size(r)].at<unsigned long long>(8)));
    }
    check(cudaGetLastError(), "launch");
  }

  void call(const Step& s, const cuda::PeerTable& t, std::uint16_t* in, float* lse,
            std::uint16_t* out, cudaStream_t stream) {
    const int n = world_.size();
    const auto dims = cuda::AlongDim::contiguous(s.outer, s.inner * 2, n);
    switch (s.kind) {
      case Kind::gather:
        return cuda::peer_all_gather(t, dims, in, out, stream, s.path);
      case Kind::scatter:
        return cuda::peer_reduce_scatter(t, dims, DType::bf16, in, out, stream, s.path);
      case Kind::reduce:
        return cuda::peer_all_reduce(t, s.outer * s.inner, DType::bf16, in, out, stream, s.path);
      case Kind::query:
        return cuda::peer_gather_query(t,
                                       {.nope = in,
                                        .nope_batch_stride = s.heads * s.dim,
                                        .nope_head_stride = s.dim,
                                        .pe = in + s.batch * s.heads * s.dim,
                                        .pe_batch_stride = s.heads * s.pe,
                                        .pe_head_stride = s.pe,
                                        .batch = s.batch,
                                        .heads = s.heads,
                                        .nope_dim = s.dim,
                                        .pe_dim = s.pe,
                                        .successor_waits = alone_},
                                       out, n * s.heads * (s.dim + s.pe), s.dim + s.pe, stream,
                                       s.path);
      case Kind::merge:
        return cuda::peer_merge(t, {s.batch, s.heads * n, s.dim, DType::bf16, LseBase::e},
                                {in, s.heads * n * s.dim, s.dim, lse, s.heads * n, 1},
                                {out, s.heads * s.dim, s.dim}, stream, s.path);
      case Kind::barrier:
        return cuda::peer_barrier(t, stream);
    }
  }

  World world_;
  Random random_;
  bool alone_;  ///< Whether each rank has a card: none takes the room of another's kernels.
  std::vector<Buffer> in_;
  std::vector<Buffer> lse_;
  std::vector<Buffer> out_;
  std::vector<Buffer> counters_;  ///< counter, wrong elements
  Buffer load_{std::size_t{4} << 20};
  cudaStream_t load_stream_ = nullptr;
  std::vector<Graph> graphs_;
};

}  // namespace

void soak(Tally& tally, int n, int cards, std::int64_t calls, std::uint32_t seed) {
  Soak work(n, cards, seed);
  work.add_graph(24);
  work.add_graph(7);
  const std::int64_t done = work.run(calls);
  const unsigned long long wrong = work.wrong();
  const bool healthy = work.world().healthy();
  bool even = true;
  for (int r = 1; r < n; ++r) {
    even = even && work.world().epoch(r) == work.world().epoch(0);
  }
  std::printf("soak n=%d on %d cards: %lld calls, %llu wrong elements\n", n, cards,
              static_cast<long long>(done), wrong);
  std::fflush(stdout);
  tally.expect(wrong == 0 && healthy && even,
               fmt::format("soak n={} cards={} calls={} wrong={} healthy={} epochs equal={}", n,
                           cards, done, wrong, healthy, even));
}

}  // namespace cohort::test
