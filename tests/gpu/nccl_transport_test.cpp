// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/cuda.hpp"
#include "cohort/mpi.hpp"
#include "cohort/nccl/nccl_transport.hpp"
#include "gpu/device_tensor.hpp"
#include "gpu/graph_kernels.hpp"
#include "support/partials_checks.hpp"
#include "support/ranks.hpp"

// Every collective of the transport with inputs whose answers are known exactly. Runs with one card
// per rank, or with several ranks per card where each has an NCCL_HOSTID of its own (as_hosts.sh).

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

constexpr auto kLimit = 60s;

/// One backend and one transport for all test cases: NCCL takes seconds to connect over sockets.
struct Session {
  std::shared_ptr<CudaBackend> backend = cuda_backend({.environment = {.multicast = false}});
  UniqueStream stream = make_stream(backend->device().index);
  std::unique_ptr<Transport> transport = backend->connect(world());

  [[nodiscard]] StreamRef ref() { return backend->stream(stream.get()); }
  void wait() { transport->synchronize(ref(), kLimit); }
};

std::unique_ptr<Session>& slot() {
  static std::unique_ptr<Session>& session = *new std::unique_ptr<Session>;
  return session;
}

Session& session() {
  if (!slot()) {
    slot() = std::make_unique<Session>();
  }
  return *slot();
}

int ranks() { return world_size(); }
int rank() { return world_rank(); }

/// What rank r holds at element i in round `seed`. Small, so that all sums are exact in every type.
double value(int r, std::int64_t i, int seed = 0) {
  return static_cast<double>((i * 7 + r * 5 + seed * 3) % 12);
}
/// As above, for products.
double factor(int r, std::int64_t i) { return static_cast<double>(1 + (i + r) % 2); }

double input(ReduceOp op, int r, std::int64_t i, int seed = 0) {
  return op == ReduceOp::prod ? factor(r, i) : value(r, i, seed);
}

double reduced(ReduceOp op, std::int64_t i, int seed = 0) {
  double result = input(op, 0, i, seed);
  for (int r = 1; r < ranks(); ++r) {
    const double next = input(op, r, i, seed);
    switch (op) {
      case ReduceOp::sum:
        result += next;
        break;
      case ReduceOp::prod:
        result *= next;
        break;
      case ReduceOp::min:
        result = std::min(result, next);
        break;
      case ReduceOp::max:
        result = std::max(result, next);
        break;
    }
  }
  return result;
}

/// Row-major positions of a tensor split among the ranks along a dimension.
struct Split {
  Dims full;
  int dim;
  std::vector<std::int64_t> sizes;

  Split(Dims share, int d, std::vector<std::int64_t> s) : full(share), dim(d), sizes(std::move(s)) {
    full[dim] = std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
  }
  [[nodiscard]] Dims share(int r) const {
    Dims shape = full;
    shape[dim] = sizes[static_cast<std::size_t>(r)];
    return shape;
  }
  [[nodiscard]] std::int64_t inner() const {
    std::int64_t product = 1;
    for (int d = dim + 1; d < full.size(); ++d) {
      product *= full[d];
    }
    return product;
  }
  /// The rank that holds element i of the whole, and its number there.
  [[nodiscard]] std::pair<int, std::int64_t> owner(std::int64_t i) const {
    const std::int64_t in = i % inner();
    std::int64_t along = i / inner() % full[dim];
    const std::int64_t outer = i / inner() / full[dim];
    int r = 0;
    while (along >= sizes[static_cast<std::size_t>(r)]) {
      along -= sizes[static_cast<std::size_t>(r++)];
    }
    return {r, (outer * sizes[static_cast<std::size_t>(r)] + along) * inner() + in};
  }
  /// The element of the whole that is element i of rank r's share.
  [[nodiscard]] std::int64_t whole(int r, std::int64_t i) const {
    const std::int64_t size = sizes[static_cast<std::size_t>(r)];
    const std::int64_t begin = std::accumulate(sizes.begin(), sizes.begin() + r, std::int64_t{0});
    const std::int64_t outer = i / inner() / size;
    const std::int64_t along = i / inner() % size + begin;
    return (outer * full[dim] + along) * inner() + i % inner();
  }
};

std::vector<std::int64_t> equal_sizes(std::int64_t size) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(ranks()), size);
}
/// 2, 0, 3, 1, 2, 0, ...: one rank with nothing, if there are two ranks or more.
std::vector<std::int64_t> unequal_sizes() {
  constexpr std::int64_t kPattern[] = {2, 0, 3, 1};
  std::vector<std::int64_t> sizes;
  for (int r = 0; r < ranks(); ++r) {
    sizes.push_back(kPattern[r % 4]);
  }
  return sizes;
}

DeviceTensor tensor(DType dtype, Dims shape, Layout layout = Layout::contiguous) {
  return DeviceTensor(dtype, shape, layout, session().backend->device());
}

void check_all_gather(DType dtype, Dims share, int dim, std::vector<std::int64_t> sizes, Layout in,
                      Layout out) {
  const Split split(share, dim, std::move(sizes));
  auto from = tensor(dtype, split.share(rank()), in);
  auto to = tensor(dtype, split.full, out);
  from.fill([](std::int64_t i) { return value(rank(), i); });
  session().transport->all_gather(from.view(), to.view(), dim, split.sizes, session().ref());
  session().wait();
  CHECK(to.differs([&](std::int64_t i) {
    const auto [r, j] = split.owner(i);
    return value(r, j);
  }) == "");
}

void check_reduce_scatter(DType dtype, ReduceOp op, Dims share, int dim,
                          std::vector<std::int64_t> sizes, Layout in, Layout out) {
  const Split split(share, dim, std::move(sizes));
  auto from = tensor(dtype, split.full, in);
  auto to = tensor(dtype, split.share(rank()), out);
  from.fill([op](std::int64_t i) { return input(op, rank(), i); });
  session().transport->reduce_scatter(from.view(), to.view(), dim, split.sizes, op,
                                      session().ref());
  session().wait();
  CHECK(to.differs([&](std::int64_t i) { return reduced(op, split.whole(rank(), i)); }) == "");
}

constexpr DType kAllTypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16,    DType::i8,
                               DType::u8,  DType::i32, DType::i64, DType::f8_e4m3, DType::f8_e5m2};
constexpr ReduceOp kAllOps[] = {ReduceOp::sum, ReduceOp::prod, ReduceOp::min, ReduceOp::max};
constexpr Layout kLayouts[] = {Layout::contiguous, Layout::transposed, Layout::gapped};

/// A group of all ranks without windows, whose own kernels are not asked for queries and merges.
/// Collective.
GroupParts parts(const std::string& name) {
  GroupParts all;
  all.kind = GroupKind::decode_context_parallel;
  all.name = name;
  all.ranks.resize(static_cast<std::size_t>(ranks()));
  std::iota(all.ranks.begin(), all.ranks.end(), 0);
  all.control = world().split(0, rank(), name);
  all.backend = session().backend;
  all.transport = session().backend->connect(*all.control);
  return all;
}

/// Whether the world's ranks have a host each, for NCCL.
bool hosts_of_their_own() { return session().transport->capabilities().nccl_hosts == ranks(); }

/// Skips on all ranks where a group of them all has no windows, with the policy's reason.
bool skip_all_without_windows() {
  const auto decision =
      decide({.enabled = true, .selection = Selection::all()}, GroupKind::tensor_parallel,
             {.tp = ranks(), .pp = 1, .dcp = 1}, session().transport->capabilities());
  return skip_all_if(!decision.nccl_windows.on, "no windows here: " + describe(decision));
}

}  // namespace

TEST_CASE("the environment that was set wins on every rank", "[nccl]") {
  static_cast<void>(session());
  const char* const nvls = std::getenv("NCCL_NVLS_ENABLE");
  REQUIRE(nvls != nullptr);  // set by the launcher or by the backend, which must not override it
  CHECK(std::string(nvls) == "0");
  // The backend wants 8; a launcher that set another number before keeps it.
  const char* const connections = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  const char* const launched_with = std::getenv("COHORT_TEST_CONNECTIONS");
  REQUIRE(connections != nullptr);
  CHECK(std::string(connections) == (launched_with == nullptr ? "8" : launched_with));
}

TEST_CASE("the caller's current device is restored", "[nccl]") {
  int devices = 0;
  cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  const int other = devices - 1;
  cuda_check(cudaSetDevice(other), "cudaSetDevice");
  check_all_gather(DType::f32, {2, 3}, 0, equal_sizes(2), Layout::contiguous, Layout::contiguous);
  int current = -1;
  cuda_check(cudaGetDevice(&current), "cudaGetDevice");
  CHECK(current == other);
}

TEST_CASE("all_gather: every type along every dimension", "[nccl]") {
  for (const DType dtype : kAllTypes) {
    for (const int dim : {0, 1, 2}) {
      CAPTURE(to_string(dtype), dim);
      check_all_gather(dtype, {3, 4, 5}, dim, equal_sizes(3), Layout::contiguous,
                       Layout::contiguous);
      check_all_gather(dtype, {3, 4, 5}, dim, unequal_sizes(), Layout::contiguous,
                       Layout::contiguous);
    }
  }
}

TEST_CASE("all_gather: any strides on either side", "[nccl]") {
  for (const Layout in : kLayouts) {
    for (const Layout out : kLayouts) {
      for (const int dim : {0, 1, 2}) {
        CAPTURE(static_cast<int>(in), static_cast<int>(out), dim);
        check_all_gather(DType::bf16, {2, 3, 8}, dim, equal_sizes(2), in, out);
        check_all_gather(DType::bf16, {2, 3, 8}, dim, unequal_sizes(), in, out);
      }
    }
  }
}

TEST_CASE("all_gather: nothing, one element, and megabytes", "[nccl]") {
  check_all_gather(DType::f32, {0, 4}, 1, equal_sizes(4), Layout::contiguous, Layout::contiguous);
  check_all_gather(DType::f32, {1}, 0, equal_sizes(1), Layout::contiguous, Layout::contiguous);
  for (const int dim : {0, 1}) {
    check_all_gather(DType::bf16, {257, 1031}, dim, equal_sizes(257), Layout::contiguous,
                     Layout::contiguous);
    check_all_gather(DType::f32, {128, 1024}, dim, equal_sizes(512), Layout::contiguous,
                     Layout::contiguous);
  }
}

TEST_CASE("reduce_scatter: every type and operation", "[nccl]") {
  for (const DType dtype : kAllTypes) {
    if (!is_reducible(dtype)) {
      continue;
    }
    for (const ReduceOp op : kAllOps) {
      for (const int dim : {0, 1}) {
        CAPTURE(to_string(dtype), to_string(op), dim);
        check_reduce_scatter(dtype, op, {3, 4, 5}, dim, equal_sizes(3), Layout::contiguous,
                             Layout::contiguous);
      }
    }
    check_reduce_scatter(dtype, ReduceOp::sum, {3, 4, 5}, 1, unequal_sizes(), Layout::contiguous,
                         Layout::contiguous);
  }
}

TEST_CASE("reduce_scatter: any strides on either side", "[nccl]") {
  for (const Layout in : kLayouts) {
    for (const Layout out : kLayouts) {
      for (const int dim : {0, 1, 2}) {
        CAPTURE(static_cast<int>(in), static_cast<int>(out), dim);
        check_reduce_scatter(DType::f32, ReduceOp::sum, {2, 3, 8}, dim, equal_sizes(2), in, out);
        check_reduce_scatter(DType::f16, ReduceOp::sum, {2, 3, 8}, dim, unequal_sizes(), in, out);
      }
    }
  }
}

TEST_CASE("reduce_scatter: nothing, one element, and megabytes", "[nccl]") {
  check_reduce_scatter(DType::f32, ReduceOp::sum, {0, 4}, 1, equal_sizes(4), Layout::contiguous,
                       Layout::contiguous);
  check_reduce_scatter(DType::f32, ReduceOp::sum, {1}, 0, equal_sizes(1), Layout::contiguous,
                       Layout::contiguous);
  for (const int dim : {0, 1}) {
    check_reduce_scatter(DType::bf16, ReduceOp::sum, {257, 1031}, dim, equal_sizes(257),
                         Layout::contiguous, Layout::contiguous);
  }
}

TEST_CASE("all_reduce: every type and operation, in place and not, any strides", "[nccl]") {
  for (const DType dtype : kAllTypes) {
    if (!is_reducible(dtype)) {
      continue;
    }
    for (const ReduceOp op : kAllOps) {
      CAPTURE(to_string(dtype), to_string(op));
      auto both = tensor(dtype, {3, 7});
      both.fill([op](std::int64_t i) { return input(op, rank(), i); });
      session().transport->all_reduce(both.view(), both.view(), op, session().ref());
      session().wait();
      CHECK(both.differs([op](std::int64_t i) { return reduced(op, i); }) == "");
    }
  }
  for (const Layout in : kLayouts) {
    for (const Layout out : kLayouts) {
      for (const std::int64_t rows : {3, 700}) {
        auto from = tensor(DType::bf16, {rows, 5, 64}, in);
        auto to = tensor(DType::bf16, {rows, 5, 64}, out);
        from.fill([](std::int64_t i) { return value(rank(), i); });
        session().transport->all_reduce(from.view(), to.view(), ReduceOp::sum, session().ref());
        session().wait();
        CHECK(to.differs([](std::int64_t i) { return reduced(ReduceOp::sum, i); }) == "");
      }
    }
  }
}

TEST_CASE("broadcast from every rank", "[nccl]") {
  for (int root = 0; root < ranks(); ++root) {
    for (const Layout layout : kLayouts) {
      auto both = tensor(DType::f16, {5, 9}, layout);
      both.fill([](std::int64_t i) { return value(rank(), i); });
      session().transport->broadcast(both.view(), root, session().ref());
      session().wait();
      CHECK(both.differs([root](std::int64_t i) { return value(root, i); }) == "");
    }
  }
}

TEST_CASE("all_to_all exchanges the parts", "[nccl]") {
  for (const Layout layout : kLayouts) {
    constexpr std::int64_t kPart = 2 * 6;
    auto from = tensor(DType::bf16, {2 * ranks(), 6}, layout);
    auto to = tensor(DType::bf16, {2 * ranks(), 6}, layout);
    from.fill([](std::int64_t i) { return value(rank(), i); });
    session().transport->all_to_all(from.view(), to.view(), session().ref());
    session().wait();
    CHECK(to.differs([](std::int64_t i) {
      return value(static_cast<int>(i / kPart), rank() * kPart + i % kPart);
    }) == "");
  }
}

TEST_CASE("messages go round a ring and keep their order", "[nccl]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const int next = (rank() + 1) % ranks();
  const int previous = (rank() + ranks() - 1) % ranks();
  for (const Layout layout : kLayouts) {
    auto first = tensor(DType::f32, {3, 4}, layout);
    auto second = tensor(DType::i64, {5});
    auto got_first = tensor(DType::f32, {3, 4}, layout);
    auto got_second = tensor(DType::i64, {5});
    first.fill([](std::int64_t i) { return value(rank(), i, 1); });
    second.fill([](std::int64_t i) { return value(rank(), i, 2); });
    const auto send = [&] {
      session().transport->send(first.view(), next, session().ref());
      session().transport->send(second.view(), next, session().ref());
    };
    const auto receive = [&] {
      session().transport->recv(got_first.view(), previous, session().ref());
      session().transport->recv(got_second.view(), previous, session().ref());
    };
    // A send may wait for its receive, so one rank must begin with receiving.
    if (rank() == 0) {
      receive();
      send();
    } else {
      send();
      receive();
    }
    session().wait();
    CHECK(got_first.differs([&](std::int64_t i) { return value(previous, i, 1); }) == "");
    CHECK(got_second.differs([&](std::int64_t i) { return value(previous, i, 2); }) == "");
  }
}

TEST_CASE("a call to oneself or nobody is refused, and the group works on", "[nccl]") {
  auto one = tensor(DType::f32, {4});
  CHECK_THROWS_AS(session().transport->send(one.view(), rank(), session().ref()), UsageError);
  CHECK_THROWS_AS(session().transport->recv(one.view(), ranks(), session().ref()), UsageError);
  session().transport->barrier(session().ref());
  session().wait();
}

TEST_CASE("captured collectives give fresh answers at every replay", "[nccl][graph]") {
  const bool large = GENERATE(false, true);
  const std::int64_t rows = large ? 300 : 4;
  const Split split({rows, 6, 128}, 1, equal_sizes(6));
  auto share = tensor(DType::bf16, split.share(rank()));
  auto gathered = tensor(DType::bf16, split.full);
  auto scattered = tensor(DType::bf16, split.share(rank()));
  auto summed = tensor(DType::bf16, split.share(rank()));
  const StreamRef stream = session().ref();
  const auto step = [&] {
    auto& transport = *session().transport;
    transport.all_gather(share.view(), gathered.view(), 1, split.sizes, stream);
    transport.reduce_scatter(gathered.view(), scattered.view(), 1, split.sizes, ReduceOp::sum,
                             stream);
    transport.all_reduce(share.view(), summed.view(), ReduceOp::sum, stream);
    transport.barrier(stream);
  };
  step();  // lets scratch memory grow
  session().wait();
  stream.driver().begin_capture(stream.native());
  step();
  const auto graph = stream.driver().end_capture(stream.native());
  for (int round = 0; round < 20; ++round) {
    share.fill([round](std::int64_t i) { return value(rank(), i, round); });
    graph->launch(stream);
    session().wait();
    const auto whole = [&](std::int64_t i) {
      const auto [r, j] = split.owner(i);
      return value(r, j, round);
    };
    CHECK(gathered.differs(whole) == "");
    CHECK(scattered.differs([&](std::int64_t i) { return ranks() * value(rank(), i, round); }) ==
          "");
    CHECK(summed.differs([round](std::int64_t i) { return reduced(ReduceOp::sum, i, round); }) ==
          "");
  }
}

TEST_CASE("scratch memory does not grow within a capture", "[nccl][graph]") {
  if (skip_all_if(ranks() < 2, "a group of one packs nothing")) {
    return;
  }
  const auto transport = session().backend->connect(world());  // one without scratch memory
  const StreamRef stream = session().ref();
  auto from = tensor(DType::f32, {512, 512});
  auto to = tensor(DType::f32, {512, 512 * ranks()});
  const auto sizes = equal_sizes(512);
  stream.driver().begin_capture(stream.native());
  CHECK_THROWS_MATCHES(transport->all_gather(from.view(), to.view(), 1, sizes, stream), UsageError,
                       says("scratch", std::to_string(to.view().bytes()), "capture"));
  static_cast<void>(stream.driver().end_capture(stream.native()));  // still a valid capture

  dynamic_cast<NcclTransport&>(*transport).reserve_scratch(2 * to.view().bytes());
  stream.driver().begin_capture(stream.native());
  transport->all_gather(from.view(), to.view(), 1, sizes, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  from.fill([](std::int64_t i) { return value(rank(), i); });
  graph->launch(stream);
  transport->synchronize(stream, kLimit);
  const Split split({512, 512}, 1, sizes);
  CHECK(to.differs([&](std::int64_t i) {
    const auto [r, j] = split.owner(i);
    return value(r, j);
  }) == "");
}

TEST_CASE("a group's calls on two streams are ordered", "[nccl]") {
  GroupCoordinator group(parts("streams"));
  const UniqueStream second = make_stream(session().backend->device().index);
  const StreamRef other = session().backend->stream(second.get());
  auto a = tensor(DType::f32, {1 << 16});
  for (int round = 0; round < 20; ++round) {
    a.fill([](std::int64_t i) { return (i + rank()) % 2; });
    group.all_reduce(a.view(), session().ref(), ReduceOp::max);
    group.all_reduce(a.view(), other);
    group.synchronize(other, kLimit);
    CHECK(a.differs([](std::int64_t i) {
      const double highest = ranks() > 1 ? 1 : static_cast<double>(i % 2);
      return highest * ranks();
    }) == "");
  }
  group.synchronize(session().ref(), kLimit);
}

TEST_CASE("calls of one capture on two streams are ordered, and eager ones in between", "[nccl]") {
  GroupCoordinator group(parts("captured streams"));
  const StreamRef stream = session().ref();
  const UniqueStream second = make_stream(session().backend->device().index);
  const StreamRef other = session().backend->stream(second.get());
  constexpr std::int64_t kCount = 1 << 18;  // beyond the own kernels' threshold
  auto a = tensor(DType::f32, {kCount});
  auto b = tensor(DType::f32, {kCount});
  const auto bit = [](std::int64_t i) { return static_cast<double>((i + rank()) % 2); };
  const auto highest = [](std::int64_t i) {
    return ranks() > 1 ? 1.0 : static_cast<double>(i % 2);
  };
  b.fill(bit);
  stream.driver().begin_capture(stream.native());
  group.all_reduce(a.view(), stream, ReduceOp::max);
  other.wait_for(stream);  // joins the capture
  group.all_reduce(a.view(), other);
  stream.wait_for(other);
  const auto graph = stream.driver().end_capture(stream.native());
  for (int round = 0; round < 5; ++round) {
    a.fill(bit);
    b.fill(bit);
    group.order(stream);
    graph->launch(stream);
    group.all_reduce(b.view(), other, ReduceOp::max);  // waits for the graph
    group.all_reduce(b.view(), stream);
    group.synchronize(stream, kLimit);
    CHECK(a.differs([&](std::int64_t i) { return highest(i) * ranks(); }) == "");
    CHECK(b.differs([&](std::int64_t i) { return highest(i) * ranks(); }) == "");
  }
}

TEST_CASE("a query laid out heads first is gathered without a copy", "[nccl][graph]") {
  if (skip_all_if(ranks() < 2, "a group of one gathers nothing")) {
    return;
  }
  DecodeContextParallelGroup group(parts("queries"), {});
  const StreamRef stream = session().ref();
  constexpr std::int64_t kBatch = 16;  // beyond the own kernels' threshold
  constexpr std::int64_t kOwn = 32;
  constexpr std::int64_t kLatent = 512;
  constexpr std::int64_t kRope = 64;
  constexpr std::int64_t kWidth = kLatent + kRope;
  const std::int64_t heads = kOwn * ranks();
  group.reserve_for({.batch = kBatch, .heads = heads, .latent = kLatent, .rope = kRope});
  auto nope = tensor(DType::bf16, {kBatch, kOwn, kLatent});
  auto pe = tensor(DType::bf16, {kBatch, kOwn, kRope});
  auto heads_first = tensor(DType::bf16, {heads, kBatch, kWidth});
  auto batch_first = tensor(DType::bf16, {kBatch, heads, kWidth});
  const auto expected = [](std::int64_t b, std::int64_t h, std::int64_t d) {
    const int sender = static_cast<int>(h / kOwn);
    const std::int64_t row = b * kOwn + h % kOwn;
    return d < kLatent ? value(sender, row * kLatent + d)
                       : value(sender, row * kRope + d - kLatent, 1);
  };
  nope.fill([](std::int64_t i) { return value(rank(), i); });
  pe.fill([](std::int64_t i) { return value(rank(), i, 1); });
  const auto gathered = [&](const TensorView& q) {
    stream.driver().begin_capture(stream.native());
    std::unique_ptr<ExecutableGraph> graph;
    {
      CaptureDomain domain;
      domain.add(group.arena());
      const CaptureScope scope(domain, stream);
      group.gather_query_into(q, nope.view(), pe.view(), stream);
      graph = stream.driver().end_capture(stream.native());
    }
    graph->launch(stream);
    group.synchronize(stream, kLimit);
    return kernel_names(dynamic_cast<CudaExecutableGraph&>(*graph).graph());
  };

  const auto direct = gathered(heads_first.view().transpose(0, 1));
  const auto copied = gathered(batch_first.view());
  CHECK(count_with(direct, "pack_query") == 1);
  CHECK(count_with(direct, "copy_kernel") == 0);
  CHECK(count_with(copied, "pack_query") == 1);
  CHECK(count_with(copied, "copy_kernel") == 1);
  const auto by_heads = [&](std::int64_t i) {
    return expected(i / kWidth % kBatch, i / kWidth / kBatch, i % kWidth);
  };
  const auto by_batch = [&](std::int64_t i) {
    return expected(i / kWidth / heads, i / kWidth % heads, i % kWidth);
  };
  CHECK(heads_first.differs(by_heads) == "");
  CHECK(batch_first.differs(by_batch) == "");

  // The ranks need not agree on the layout.
  heads_first.fill([](std::int64_t) { return -1; });
  batch_first.fill([](std::int64_t) { return -1; });
  const bool odd = rank() % 2 == 1;
  group.gather_query_into(odd ? heads_first.view().transpose(0, 1) : batch_first.view(),
                          nope.view(), pe.view(), stream);
  group.synchronize(stream, kLimit);
  CHECK((odd ? heads_first.differs(by_heads) : batch_first.differs(by_batch)) == "");
}

TEST_CASE("a quantised query and its scales are gathered as rows of bytes", "[nccl][graph]") {
  constexpr std::int64_t kOwn = 4;
  constexpr std::int64_t kWidth = 576;
  constexpr std::int64_t kScales = 4;
  constexpr std::int64_t kRow = kWidth + 4 * kScales;
  const StreamRef stream = session().ref();
  for (const bool map_peers : {true, false}) {
    GroupParts of_group = parts("quantised");
    of_group.decision.peer_mapping.on =
        map_peers && ranks() > 1 && of_group.transport->peer_kernels() != nullptr;
    DecodeContextParallelGroup group(std::move(of_group), {});
    for (const std::int64_t batch : {1, 3, 64}) {
      CAPTURE(map_peers, batch);
      const std::int64_t heads = kOwn * ranks();
      group.reserve_for({.batch = batch,
                         .heads = heads,
                         .latent = kWidth,
                         .rope = kScales,
                         .query_dtype = DType::f8_e4m3,
                         .rope_dtype = DType::f32});
      const auto segments = group.arena()->statistics().segments;
      auto nope = tensor(DType::f8_e4m3, {batch, kOwn, kWidth});
      auto scales = tensor(DType::f32, {batch, kOwn, kScales});
      auto into = tensor(DType::u8, {batch, heads, kRow});
      nope.fill([](std::int64_t i) { return value(rank(), i); });
      scales.fill([](std::int64_t i) { return value(rank(), i, 1); });
      const auto expected = [&](std::int64_t i) {
        const std::int64_t h = i / kRow % heads;
        const std::int64_t row = i / kRow / heads * kOwn + h % kOwn;
        const int sender = static_cast<int>(h / kOwn);
        const std::int64_t byte = i % kRow - kWidth;
        if (byte < 0) {
          return value(sender, row * kWidth + i % kRow);
        }
        std::byte scale[sizeof(float)];
        encode(DType::f32, value(sender, row * kScales + byte / 4, 1), scale);
        return std::to_integer<int>(scale[byte % 4]) * 1.0;
      };
      group.gather_query_into(into.view(), nope.view(), scales.view(), stream);
      group.synchronize(stream, kLimit);
      CHECK(into.differs(expected) == "");

      into.fill([](std::int64_t) { return 255; });
      Tensor q;
      stream.driver().begin_capture(stream.native());
      std::unique_ptr<ExecutableGraph> graph;
      {
        CaptureDomain domain;
        domain.add(group.arena());
        const CaptureScope scope(domain, stream);
        q = group.gather_query(nope.view(), scales.view(), stream);
        CHECK(q.dtype() == DType::u8);
        session().backend->ops().copy(q, into.view(), stream);
        graph = stream.driver().end_capture(stream.native());
        q.reset();
      }
      graph->launch(stream);
      group.synchronize(stream, kLimit);
      CHECK(into.differs(expected) == "");
      CHECK(group.arena()->statistics().segments == segments);
    }
  }
}

TEST_CASE("a captured step finds its counts and slots from the lengths of each replay",
          "[nccl][graph]") {
  DecodeContextParallelGroup group(parts("placed"), {});
  const StreamRef stream = session().ref();
  constexpr std::int64_t kBatch = 33;
  constexpr std::int64_t kQueries = 3;
  const dcp::KvShard shard(ranks(), 2);
  auto lengths = tensor(DType::i32, {kBatch});
  auto counts = tensor(DType::i32, {kBatch, kQueries});
  auto slots = tensor(DType::i64, {kBatch, kQueries});
  const KvStep step{.lengths = lengths.view(), .counts = counts.view(), .slots = slots.view()};
  group.place_step(shard, step, stream);  // of no tokens
  session().wait();
  CHECK(counts.differs([](std::int64_t) { return 0; }) == "");
  CHECK(slots.differs([](std::int64_t) { return -1; }) == "");
  stream.driver().begin_capture(stream.native());
  group.place_step(shard, step, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  for (int round = 0; round < 3; ++round) {
    const auto length = [&](std::int64_t b) { return (b * 5 + round) % 19; };
    const auto visible = [&](std::int64_t i) {
      return std::max<std::int64_t>(length(i / kQueries) - (kQueries - 1 - i % kQueries), 0);
    };
    lengths.fill([&](std::int64_t b) { return length(b); });
    graph->launch(stream);
    session().wait();
    CHECK(counts.differs([&](std::int64_t i) { return shard.local_count(visible(i), rank()); }) ==
          "");
    CHECK(slots.differs([&](std::int64_t i) {
      const std::int64_t token = visible(i) - 1;
      return token >= 0 && shard.owner(token) == rank() ? shard.local_index(token) : -1;
    }) == "");
  }
}

TEST_CASE("shapes beyond the kernels are refused before anything is enqueued", "[nccl][graph]") {
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  auto memory = tensor(DType::bf16, {1 << 16});
  const auto view = [&](DType dtype, Dims shape, std::size_t byte = 0) {  // never touched
    return TensorView(static_cast<std::byte*>(memory.view().data()) + byte, dtype, shape, device);
  };
  for (const MergePlan plan :
       {MergePlan::automatic, MergePlan::staged, MergePlan::packed, MergePlan::one_kernel}) {
    CAPTURE(to_string(plan));
    GroupParts shapes = parts("shapes");
    if (plan == MergePlan::one_kernel) {
      if (ranks() > 1 && shapes.transport->peer_kernels() == nullptr) {
        continue;  // such a group cannot be formed where ranks cannot map each other
      }
      shapes.decision.peer_mapping.on = true;
    }
    DecodeContextParallelGroup group(std::move(shapes), {.plan = plan});
    const auto refused = [&](const auto& call, const std::string& word) {
      stream.driver().begin_capture(stream.native());
      CHECK_THROWS_MATCHES(call(), UsageError, says(word));
      const auto graph = stream.driver().end_capture(stream.native());
      std::size_t nodes = 1;
      cuda_check(
          cudaGraphGetNodes(dynamic_cast<CudaExecutableGraph&>(*graph).graph(), nullptr, &nodes),
          "cudaGraphGetNodes");
      CHECK(nodes == 0);
    };
    const auto merge = [&](std::int64_t batch, std::int64_t dim) {
      const std::int64_t heads = 128 * ranks();
      group.merge_attention_into(view(DType::bf16, {batch, 128, dim}),
                                 view(DType::bf16, {batch, heads, dim}),
                                 view(DType::f32, {batch, heads}), LseBase::e, stream);
    };
    refused([&] { merge(16384, 512); }, "less than 2147483648 bytes");
    refused([&] { merge(2, 12); }, "multiple of 8");
    refused([&] { merge(2, 1032); }, "at most 1024");
    refused(
        [&] {
          group.gather_query_into(view(DType::f8_e4m3, {2, 4 * ranks(), 24}, 1024),
                                  view(DType::f8_e4m3, {2, 4, 16}),
                                  view(DType::f8_e4m3, {2, 4, 8}, 512), stream);
        },
        "16 bytes");
    merge(0, 512);  // the group works on
  }
}

namespace {

/// The session's card, for checks that know host tensors.
class CardMemory final : public DeviceAccess {
 public:
  CardMemory() { device_access = this; }
  ~CardMemory() override { device_access = nullptr; }
  CardMemory(const CardMemory&) = delete;
  CardMemory& operator=(const CardMemory&) = delete;

  void read(void* to, const void* from, std::size_t bytes) override {
    session().wait();
    const DeviceGuard guard(session().backend->device().index);
    cuda_check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  void write(void* to, const void* from, std::size_t bytes) override {
    const DeviceGuard guard(session().backend->device().index);
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, session().stream.get()),
               "cudaMemcpyAsync");
    session().wait();
  }
};

}  // namespace

TEST_CASE("splits, sinks and ranks without tokens are merged exactly into every result", "[nccl]") {
  CardMemory memory;
  const StreamRef stream = session().ref();
  const auto cases = partials_cases(ranks(), 5);
  std::vector<std::vector<std::byte>> packed(cases.size());
  const std::size_t step = full_run() ? 1 : 2;
  for (const auto& plan : partials_plans()) {
    if (plan.host.slot_bytes != HostOptions{}.slot_bytes) {
      continue;  // of the host's backend
    }
    GroupParts of_group = parts("partials");
    const bool near = ranks() > 1 && of_group.transport->peer_kernels() != nullptr;
    of_group.decision.peer_mapping.on = near && plan.host.map_peers;
    if (plan.merge.plan == MergePlan::one_kernel && !near && ranks() > 1) {
      continue;
    }
    DecodeContextParallelGroup group(std::move(of_group), plan.merge);
    for (std::size_t i = 0; i < cases.size(); i += step) {
      const std::string what = fmt::format("{}: {}", plan.name, to_string(cases[i]));
      auto bits = merge_partials_once(group, cases[i], what, plan.narrow, stream);
      if (packed[i].empty()) {
        packed[i] = std::move(bits);
      } else if (plan.like_packed) {
        check(bits == packed[i], what + ": as packed");
      }
    }
    check_exact_partials(group, stream);
    check_wrong_partials(group, stream);
  }
}

TEST_CASE("the path can be read back", "[nccl]") {
  auto& transport = *session().transport;
  auto small = tensor(DType::f32, {64});
  auto small_all = tensor(DType::f32, {64 * ranks()});
  auto large = tensor(DType::f32, {5 << 20});
  auto large_all = tensor(DType::f32, {ranks(), 5 << 20});
  const auto path = [&](const DeviceTensor& in, const DeviceTensor& out, int dim) {
    return transport.path(Collective::all_gather, in.view(), out.view(), dim);
  };
  if (ranks() == 1) {
    CHECK(path(small, small_all, 0) == "copy");
    return;
  }
  const bool own = transport.peer_kernels() != nullptr && runtime_settings().own_max_bytes != 0;
  CHECK(path(small, small_all, 0) == (own ? "own" : "nccl"));
  CHECK(path(large, large_all, 0) == "nccl");
  auto wide = tensor(DType::f32, {1024, 5 << 10});
  auto wide_all = tensor(DType::f32, {1024, (5 << 10) * ranks()});
  CHECK(path(wide, wide_all, 1) == "nccl, packed");
  auto nothing = tensor(DType::f32, {0});
  CHECK(path(nothing, nothing, 0) == "none");
}

TEST_CASE("calls that were reserved for go through the inboxes", "[nccl]") {
  GroupParts of_group = parts("reserved");
  Transport* const transport = of_group.transport.get();
  DecodeContextParallelGroup group(std::move(of_group), {});
  constexpr std::int64_t kCount = 400'000;  // more than an inbox has room for at first
  auto x = tensor(DType::bf16, {kCount});
  auto sum = tensor(DType::bf16, {kCount});
  const std::vector<CollectiveShape> calls{
      {.collective = Collective::all_reduce, .shape = {kCount}, .dtype = DType::bf16}};
  group.reserve_for_calls(calls);
  if (ranks() > 1) {
    const bool own = transport->slot_bytes(Collective::all_reduce, x.view().bytes()) > 0;
    CHECK((transport->path(Collective::all_reduce, x.view(), sum.view(), 0) == "own") == own);
  }
  x.fill([](std::int64_t i) { return value(rank(), i); });
  group.all_reduce_into(sum.view(), x.view(), session().ref());
  group.synchronize(session().ref(), kLimit);
  CHECK(sum.differs([](std::int64_t i) { return reduced(ReduceOp::sum, i); }) == "");
}

TEST_CASE("the policy refuses windows for the right reason", "[nccl][policy]") {
  const auto& found = session().transport->capabilities();
  CHECK(found.backend == BackendKind::cuda);
  CHECK(found.nccl_runtime_version > 22000);
  CHECK(found.machines == 1);
  const SymmetricOptions options{.enabled = true, .selection = Selection::all()};
  const ParallelLayout layout{.tp = ranks(), .pp = 1, .dcp = ranks()};
  const auto decision = decide(options, GroupKind::decode_context_parallel, layout, found);
  INFO(describe(decision));
  if (ranks() == 1) {
    CHECK(decision.nccl_windows.reason == Reason::single_rank);
    return;
  }
  if (found.nccl_hosts != 1) {
    CHECK(decision.nccl_windows.reason == Reason::out_of_nvlink_reach);
    CHECK_THAT(decision.nccl_windows.detail, contains(std::to_string(found.nccl_hosts), "hosts"));
  } else if (found.nvlink_reach && found.nccl_cumem_enabled && found.nccl_win_enable) {
    CHECK(decision.nccl_windows.on);
  } else {
    CHECK_FALSE(decision.nccl_windows.on);
  }
  // NCCL's hosts play no part in peer mapping: the ranks share this machine.
  CHECK(decision.peer_mapping.on == (session().transport->peer_kernels() != nullptr));
  if (hosts_of_their_own()) {
    CHECK(decision.peer_mapping.on);
  }
}

TEST_CASE("segments can be exported", "[nccl]") {
  const auto segment = session().backend->allocate_segment(std::size_t{4} << 20);
  auto& memory = dynamic_cast<NcclSegment&>(*segment);
  CHECK(memory.bytes() == std::size_t{4} << 20);
  CHECK(memory.exportable() == session().transport->capabilities().nccl_cumem_enabled);
}

TEST_CASE("in windows NCCL takes its symmetric path, and the guard precedes it", "[nccl][window]") {
  if (skip_all_without_windows()) {
    return;
  }
  auto& transport = *session().transport;
  const auto& found = transport.capabilities();
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::size_t kBytes = std::size_t{16} << 20;
  const auto in_segment = session().backend->allocate_segment(kBytes);
  const auto out_segment = session().backend->allocate_segment(kBytes);
  const auto in_window = transport.register_segment(*in_segment);
  const auto out_window = transport.register_segment(*out_segment);
  constexpr std::int64_t kCount = 1 << 20;  // beyond the own kernels' threshold
  const TensorView in(in_segment->data(), DType::bf16, {kCount}, device);
  const TensorView out(out_segment->data(), DType::bf16, {kCount * ranks()}, device);
  const auto sizes = equal_sizes(kCount);
  CHECK(transport.path(Collective::all_gather, in, out, 0) == "nccl symmetric");

  stream.driver().begin_capture(stream.native());
  transport.all_gather(in, out, 0, sizes, stream);
  transport.reduce_scatter(out, in, 0, sizes, ReduceOp::sum, stream);
  transport.all_reduce(in, out.slice(0, 0, kCount), ReduceOp::sum, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  const auto names = kernel_names(dynamic_cast<CudaExecutableGraph&>(*graph).graph());
  for (const auto& name : names) {
    UNSCOPED_INFO(name);
  }
  CHECK(count_with(names, "ncclSym") == 3);
  CHECK(count_with(names, "visibility_guard") ==
        (has_trait(NcclTrait::early_start, found.nccl_runtime_version) ? 3 : 0));

  auto host = tensor(DType::bf16, {kCount});
  for (int round = 0; round < 5; ++round) {
    host.fill([round](std::int64_t i) { return value(rank(), i, round); });
    session().backend->ops().copy(host.view(), in, stream);
    graph->launch(stream);
    session().backend->ops().copy(out.slice(0, 0, kCount), host.view(), stream);
    session().wait();
    // The reduce-scatter of what was gathered is n times the own values; the sum over the ranks of
    // that is n times the reduction. At most 8 * 8 * 11, so only values up to 256 are exact.
    if (ranks() <= 4) {
      CHECK(host.differs([round](std::int64_t i) {
        return ranks() * reduced(ReduceOp::sum, i, round);
      }) == "");
    }
  }
}

namespace {

/// A transport all of whose calls NCCL takes, and memory in a window of its.
struct InWindow {
  std::unique_ptr<Segment> segment = session().backend->allocate_segment(std::size_t{8} << 20);
  std::unique_ptr<NcclTransport> transport = std::make_unique<NcclTransport>(
      world(), session().backend->streams(), session().backend->device().index,
      NcclTransportOptions{.own_max_bytes = 0});
  std::unique_ptr<Window> window = transport->register_segment(*segment);
};

}  // namespace

TEST_CASE("buffers at different places of a window cannot be captured, nor used under debug checks",
          "[nccl][window]") {
  if (skip_all_without_windows()) {
    return;
  }
  const InWindow memory;
  NcclTransport& transport = *memory.transport;
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::int64_t kCount = 4096;
  auto* const base = static_cast<BFloat16*>(memory.segment->data());
  const auto at = [&](std::int64_t offset, std::int64_t count) {
    return TensorView(base + offset, DType::bf16, {count}, device);
  };
  const bool debug_checks = GENERATE(false, true);
  if (debug_checks) {
    transport.compare_places();
  }
  const auto refused = [&](const auto& call) {
    if (!debug_checks) {
      stream.driver().begin_capture(stream.native());
    }
    std::string error;
    try {
      call();
    } catch (const SymmetryError& found) {
      error = found.what();
    }
    if (!debug_checks) {
      (void)stream.driver().end_capture(stream.native());
    }
    transport.synchronize(stream, kLimit);
    return error;
  };
  const auto sizes = equal_sizes(kCount);
  const std::int64_t own = rank() * kCount;
  const std::int64_t far = kCount * ranks();
  const auto differs = contains("places of its buffers");
  CHECK_THAT(
      refused([&] { transport.all_gather(at(0, kCount), at(far + own, far), 0, sizes, stream); }),
      differs);
  CHECK_THAT(refused([&] {
               transport.reduce_scatter(at(own, far), at(4 * far, kCount), 0, sizes, ReduceOp::sum,
                                        stream);
             }),
             differs);
  CHECK_THAT(refused([&] {
               transport.all_reduce(at(0, kCount), at(far + own, kCount), ReduceOp::sum, stream);
             }),
             differs);
  // What only this rank touches may lie anywhere: its share in the gathered whole, first of all.
  CHECK(refused([&] {
          transport.all_gather(at(far + own, kCount), at(far, far), 0, sizes, stream);
          transport.reduce_scatter(at(0, far), at(2 * far + own, kCount), 0, sizes, ReduceOp::sum,
                                   stream);
        }) == "");
  // Both ways are packed, of the same bytes: only the dimension tells them apart.
  transport.reserve_scratch(2 * sizeof(BFloat16) * kCount * static_cast<std::size_t>(ranks() + 1));
  const auto along = [&](int dim) {
    Dims full{2, 2, kCount / 4};
    full[dim] *= ranks();
    const TensorView joined(base + far, DType::bf16, full, device);
    return refused([&] {
      transport.all_gather(TensorView(base, DType::bf16, {2, 2, kCount / 4}, device), joined, dim,
                           equal_sizes(dim == 1 ? 2 : kCount / 4), stream);
    });
  };
  CHECK(along(1) == "");
  CHECK_THAT(along(rank() == ranks() - 1 ? 2 : 1), differs);
}

TEST_CASE("eager calls of buffers at different places of a window fail the group",
          "[nccl][window][errors]") {
  if (skip_all_without_windows() ||
      skip_all_if(session().transport->peer_kernels() == nullptr, "needs own kernels")) {
    return;
  }
  const auto collective =
      GENERATE(Collective::all_gather, Collective::reduce_scatter, Collective::all_reduce);
  CAPTURE(static_cast<int>(collective));
  const InWindow memory;
  NcclTransport& transport = *memory.transport;
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::int64_t kCount = 4096;
  const std::int64_t whole = kCount * ranks();
  const auto at = [&](std::int64_t offset, std::int64_t count) {
    return TensorView(static_cast<BFloat16*>(memory.segment->data()) + offset, DType::bf16, {count},
                      device);
  };
  const auto sizes = equal_sizes(kCount);
  const bool gathers = collective == Collective::all_gather;
  const bool scatters = collective == Collective::reduce_scatter;
  const TensorView in = at(0, scatters ? whole : kCount);
  const auto call = [&](const TensorView& from, const TensorView& to) {
    if (gathers) {
      transport.all_gather(from, to, 0, sizes, stream);
    } else if (scatters) {
      transport.reduce_scatter(from, to, 0, sizes, ReduceOp::sum, stream);
    } else {
      transport.all_reduce(from, to, ReduceOp::sum, stream);
    }
  };
  const TensorView out = at(2 * whole, gathers ? whole : kCount);
  auto source = tensor(DType::bf16, {in.numel()});
  auto result = tensor(DType::bf16, {out.numel()});
  for (int round = 0; round < 20; ++round) {
    source.fill([round](std::int64_t i) { return value(rank(), i, round); });
    session().backend->ops().copy(source.view(), in, stream);
    call(in, out);
    session().backend->ops().copy(out, result.view(), stream);
    transport.synchronize(stream, kLimit);
    CHECK(result.differs([&](std::int64_t i) {
      return gathers ? value(static_cast<int>(i / kCount), i % kCount, round)
                     : reduced(ReduceOp::sum, scatters ? rank() * kCount + i : i, round);
    }) == "");
  }
  // What only this rank touches may lie anywhere.
  if (gathers) {
    call(at(rank() * kCount, kCount), out);
  } else if (scatters) {
    call(in, at(2 * whole + rank() * kCount, kCount));
  }
  transport.synchronize(stream, kLimit);
  CHECK_FALSE(transport.failed());

  const std::int64_t own = rank() * kCount;
  scatters ? call(at(own, whole), out) : call(in, at(2 * whole + own, out.numel()));
  CHECK_THROWS_MATCHES(transport.synchronize(stream, kLimit), SymmetryError,
                       says("over NCCL", "other offsets of their windows"));
  CHECK(transport.failed());
  CHECK_THROWS_AS(call(in, out), TransportError);
  world().barrier();
}

TEST_CASE("what another allocator hands out of a window may lie anywhere", "[nccl][window]") {
  if (skip_all_without_windows()) {
    return;
  }
  const InWindow memory;
  NcclTransport& transport = *memory.transport;
  const StreamRef stream = session().ref();
  const Device device = session().backend->device();
  constexpr std::int64_t kCount = 4096;
  const std::int64_t whole = kCount * ranks();
  auto* const base = static_cast<float*>(memory.segment->data());
  memory.segment->loose_parts().add(base, std::size_t{4} << 20);
  const auto view = [&](std::int64_t at, std::int64_t count) {
    return TensorView(base + at, DType::f32, {count}, device);
  };
  // Loose ones at another offset on each rank.
  const TensorView loose = view(64 * rank(), whole);
  const TensorView even = view(1 << 20, whole);
  const TensorView loose_share = view((1 << 18) + 64 * rank(), kCount);
  const TensorView even_share = view((1 << 20) + (1 << 18), kCount);
  const auto fill = [&](const TensorView& tensor) {
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(i % 97) + 100.0F * static_cast<float>(rank());
    }
    cuda_check(cudaMemcpy(tensor.data(), values.data(), tensor.bytes(), cudaMemcpyHostToDevice),
               "cudaMemcpy");
    cuda_check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  };
  const auto wrong = [&](const TensorView& tensor, const auto& expected) {
    transport.synchronize(stream, kLimit);
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    cuda_check(cudaMemcpy(values.data(), tensor.data(), tensor.bytes(), cudaMemcpyDeviceToHost),
               "cudaMemcpy");
    int count = 0;
    for (std::int64_t i = 0; i < tensor.numel(); ++i) {
      count += values[static_cast<std::size_t>(i)] != expected(i) ? 1 : 0;
    }
    return count;
  };
  const auto of_ranks = static_cast<float>(100 * ranks() * (ranks() - 1) / 2);
  const auto sum = [&](std::int64_t i) {
    return static_cast<float>(i % 97) * static_cast<float>(ranks()) + of_ranks;
  };
  const auto own_sum = [&](std::int64_t i) { return sum(i + rank() * kCount); };
  const auto joined = [&](std::int64_t i) {
    return static_cast<float>(i % kCount % 97) + 100.0F * static_cast<float>(i / kCount);
  };
  const auto path = [&](Collective collective, const TensorView& in, const TensorView& out) {
    return transport.path(collective, in, out, 0);
  };
  const auto sizes = equal_sizes(kCount);

  fill(loose);
  transport.all_reduce(loose, even, ReduceOp::sum, stream);
  CHECK(wrong(even, sum) == 0);
  CHECK(path(Collective::all_reduce, loose, even) == "nccl, packed");
  fill(even);
  transport.all_reduce(even, loose, ReduceOp::sum, stream);
  CHECK(wrong(loose, sum) == 0);
  fill(loose);
  transport.all_reduce(loose, loose, ReduceOp::sum, stream);
  CHECK(wrong(loose, sum) == 0);
  fill(loose);
  transport.reduce_scatter(loose, even_share, 0, sizes, ReduceOp::sum, stream);
  CHECK(wrong(even_share, own_sum) == 0);
  CHECK(path(Collective::reduce_scatter, loose, even_share) == "nccl, packed");
  fill(even_share);
  transport.all_gather(even_share, loose, 0, sizes, stream);
  CHECK(wrong(loose, joined) == 0);
  CHECK(path(Collective::all_gather, even_share, loose) == "nccl, packed");
  // What no peer touches is taken where it lies.
  fill(loose_share);
  transport.all_gather(loose_share, even, 0, sizes, stream);
  CHECK(wrong(even, joined) == 0);
  CHECK(path(Collective::all_gather, loose_share, even) == "nccl symmetric");
  fill(even);
  transport.reduce_scatter(even, loose_share, 0, sizes, ReduceOp::sum, stream);
  CHECK(wrong(loose_share, own_sum) == 0);
  CHECK(path(Collective::reduce_scatter, even, loose_share) == "nccl symmetric");
}

TEST_CASE("pairs on two hosts: windows within a pair, none across", "[nccl][window]") {
  const bool pairs = ranks() == 4 && session().transport->capabilities().nccl_hosts == 2;
  if (skip_all_if(!pairs, "needs four ranks as two hosts of two cards")) {
    return;
  }
  const SymmetricOptions options{.enabled = true, .selection = Selection::all()};
  const ParallelLayout layout{.tp = 4, .pp = 1, .dcp = 2};
  const auto across =
      decide(options, GroupKind::tensor_parallel, layout, session().transport->capabilities());
  CHECK(across.nccl_windows.reason == Reason::out_of_nvlink_reach);

  const auto group = world().split(rank() / 2, rank(), "dcp");
  const auto transport = session().backend->connect(*group);
  const auto within =
      decide(options, GroupKind::decode_context_parallel, layout, transport->capabilities());
  INFO(describe(within));
  REQUIRE(within.nccl_windows.on);

  const StreamRef stream = session().ref();
  const auto segment = session().backend->allocate_segment(std::size_t{16} << 20);
  const auto window = transport->register_segment(*segment);
  constexpr std::int64_t kCount = 1 << 20;
  const TensorView both(segment->data(), DType::f32, {kCount}, session().backend->device());
  stream.driver().begin_capture(stream.native());
  transport->all_reduce(both, both, ReduceOp::sum, stream);
  const auto graph = stream.driver().end_capture(stream.native());
  CHECK(count_with(kernel_names(dynamic_cast<CudaExecutableGraph&>(*graph).graph()), "ncclSym") ==
        1);
  auto host = tensor(DType::f32, {kCount});
  host.fill([](std::int64_t i) { return value(rank(), i); });
  session().backend->ops().copy(host.view(), both, stream);
  graph->launch(stream);
  session().backend->ops().copy(both, host.view(), stream);
  transport->synchronize(stream, kLimit);
  const int first = rank() / 2 * 2;
  CHECK(host.differs([first](std::int64_t i) { return value(first, i) + value(first + 1, i); }) ==
        "");
}

TEST_CASE("ranks that were set up differently are told", "[nccl][errors]") {
  if (skip_all_if(ranks() < 2, "needs two ranks")) {
    return;
  }
  const bool last = rank() == ranks() - 1;
  NcclTransportOptions options;
  options.own_max_bytes = last ? 1234 : 4321;
  CHECK_THROWS_AS(NcclTransport(world(), session().backend->streams(),
                                session().backend->device().index, options),
                  SymmetryError);
}

TEST_CASE("options that cannot be are refused on the rank that has them, and quoted to the others",
          "[nccl][errors]") {
  const bool last = rank() == ranks() - 1;
  NcclTransportOptions options;
  options.kernel_limit = last ? std::chrono::milliseconds(-1) : 60s;
  try {
    const NcclTransport transport(world(), session().backend->streams(),
                                  session().backend->device().index, options);
    FAIL("expected an error");
  } catch (const ConfigError& error) {
    CHECK(last);
    CHECK_THAT(std::string(error.what()), contains("kernel_limit"));
  } catch (const SymmetryError& error) {
    CHECK_FALSE(last);
    CHECK(error.ranks() == std::vector<int>{ranks() - 1});
    CHECK_THAT(std::string(error.what()), contains("kernel_limit"));
  }
}

TEST_CASE("a rank that never comes to an own kernel is named", "[nccl][errors]") {
  if (skip_all_if(ranks() < 2 || session().transport->peer_kernels() == nullptr,
                  "needs own kernels")) {
    return;
  }
  NcclTransportOptions options;
  options.kernel_limit = 1500ms;
  std::vector<int> everyone(static_cast<std::size_t>(ranks()));
  std::iota(everyone.begin(), everyone.end(), 0);
  const auto first_group = world().subgroup(everyone, 1, "first");
  {
    NcclTransport transport(*first_group, session().backend->streams(),
                            session().backend->device().index, options);
    const int absent = ranks() - 1;
    if (rank() != absent) {
      transport.barrier(session().ref());
      try {
        transport.synchronize(session().ref(), 30s);
        FAIL("expected a TimeoutError");
      } catch (const TimeoutError& error) {
        CHECK(error.missing() == std::vector<int>{absent});
        CHECK_THAT(std::string(error.what()), contains("rank " + std::to_string(absent)));
      }
    }
    world().barrier();
  }
  // The process goes on with a group of a new generation.
  const auto second_group = world().subgroup(everyone, 2, "second");
  NcclTransport again(*second_group, session().backend->streams(),
                      session().backend->device().index, options);
  auto sum = tensor(DType::f32, {100});
  sum.fill([](std::int64_t i) { return value(rank(), i); });
  again.all_reduce(sum.view(), sum.view(), ReduceOp::sum, session().ref());
  again.synchronize(session().ref(), kLimit);
  CHECK(sum.differs([](std::int64_t i) { return reduced(ReduceOp::sum, i); }) == "");
}

TEST_CASE("a registration whose peer comes when the limit is over touches nobody's memory",
          "[nccl][window][errors]") {
  if (skip_all_without_windows()) {
    return;
  }
  constexpr std::size_t kBytes = std::size_t{8} << 20;
  const int device = session().backend->device().index;
  const DeviceGuard guard(device);
  std::vector<int> everyone(static_cast<std::size_t>(ranks()));
  std::iota(everyone.begin(), everyone.end(), 0);
  const auto group = world().subgroup(everyone, 21, "late registration");
  const auto communicator = Communicator::create(*group, device);
  MpiControlPlane impatient(MPI_COMM_WORLD, 1s, "late registration, impatient");
  auto segment = std::make_unique<NcclSegment>(device, kBytes);
  if (rank() != ranks() - 1) {
    try {
      static_cast<void>(NcclWindow::create(communicator, *segment, impatient));
      FAIL("registered without a peer");
    } catch (const TimeoutError&) {
    } catch (const SymmetryError& error) {  // another rank was out of patience sooner
      CHECK_THAT(std::string(error.what()), contains("gave up", "did not return within"));
    }
    segment.reset();
    world().barrier();
    // What has been given back would be here, under the registration that goes on.
    const NcclSegment next(device, kBytes);
    cuda_check(cudaMemset(next.data(), 0x5a, kBytes), "cudaMemset");
    world().barrier();
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    std::vector<unsigned char> bytes(kBytes);
    cuda_check(cudaMemcpy(bytes.data(), next.data(), kBytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    CHECK(std::count(bytes.begin(), bytes.end(), 0x5a) == static_cast<std::ptrdiff_t>(kBytes));
  } else {
    world().barrier();  // the others' limit is over
    try {
      static_cast<void>(NcclWindow::create(communicator, *segment, impatient));
    } catch (const Error&) {
      // whether a registration that some ranks have given up succeeds is NCCL's to say
    }
    world().barrier();
  }
  communicator->mark_broken();
}

TEST_CASE("a stream that stays busy ends in a time-out", "[nccl][errors]") {
  const StreamRef stream = session().ref();
  const auto release = std::make_shared<std::atomic<bool>>(false);
  stream.submit([release] {
    while (!*release) {
      std::this_thread::sleep_for(1ms);
    }
  });
  CHECK_THROWS_AS(stream.synchronize(100ms), TimeoutError);
  *release = true;
  stream.synchronize(10s);
}

TEST_CASE("teardown leaves nothing behind", "[nccl]") {
  world().barrier();
  slot().reset();
  CHECK(cudaGetLastError() == cudaSuccess);
  world().barrier();
}
