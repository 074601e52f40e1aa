// SPDX-License-Identifier: Apache-2.0
#include <functional>

#include "world.cuh"

// A rank that never comes: every waiting kernel ends at the limit, the error word names it on every
// rank, later kernels return at once, and fresh inboxes work again. And arguments that are refused.

namespace cohort::test {
namespace {

constexpr int kRanks = 4;
constexpr int kMissing = 2;

struct Operation {
  const char* name;
  std::function<void(const cuda::PeerTable&, std::byte* in, std::byte* out, cudaStream_t)> call;
};

cuda::MergeShape shape() { return {4, 32, 512, DType::bf16, LseBase::e}; }

void merge(const cuda::PeerTable& t, std::byte* in, std::byte* out, cudaStream_t stream,
           cuda::PeerPath path) {
  const auto s = shape();
  cuda::peer_merge(t, s, {in, s.heads * s.dim, s.dim, reinterpret_cast<float*>(in), s.heads, 1},
                   {out, s.heads / kRanks * s.dim, s.dim}, stream, path);
}

void gather(const cuda::PeerTable& t, std::byte* in, std::byte* out, cudaStream_t stream,
            cuda::PeerPath path) {
  cuda::peer_gather_query(t,
                          {.nope = in,
                           .nope_batch_stride = 8 * 512,
                           .nope_head_stride = 512,
                           .pe = in,
                           .pe_batch_stride = 8 * 64,
                           .pe_head_stride = 64,
                           .batch = 4,
                           .heads = 8,
                           .nope_dim = 512,
                           .pe_dim = 64},
                          out, kRanks * 8 * 576, 576, stream, path);
}

std::vector<Operation> operations() {
  using cuda::PeerPath;
  const auto dims = cuda::AlongDim::contiguous(1, 4096, kRanks);
  const auto reduces = [](std::int64_t count, PeerPath path) {
    return [=](const cuda::PeerTable& t, std::byte* in, std::byte* out, cudaStream_t s) {
      cuda::peer_all_reduce(t, count, DType::bf16, in, out, s, path);
    };
  };
  return {
      {"barrier", [](auto& t, auto*, auto*, auto s) { cuda::peer_barrier(t, s); }},
      {"all_gather flag_word",
       [=](auto& t, auto* in, auto* out, auto s) {
         cuda::peer_all_gather(t, dims, in, out, s, PeerPath::flag_word);
       }},
      {"all_gather flag_line",
       [=](auto& t, auto* in, auto* out, auto s) {
         cuda::peer_all_gather(t, dims, in, out, s, PeerPath::flag_line);
       }},
      {"reduce_scatter flag_word",
       [=](auto& t, auto* in, auto* out, auto s) {
         cuda::peer_reduce_scatter(t, dims, DType::bf16, in, out, s, PeerPath::flag_word);
       }},
      {"reduce_scatter flag_line",
       [=](auto& t, auto* in, auto* out, auto s) {
         cuda::peer_reduce_scatter(t, dims, DType::bf16, in, out, s, PeerPath::flag_line);
       }},
      {"all_reduce one step flag_word", reduces(1024, PeerPath::flag_word)},
      {"all_reduce one step flag_line", reduces(1024, PeerPath::flag_line)},
      {"all_reduce two steps flag_word", reduces(100000, PeerPath::flag_word)},
      {"all_reduce two steps flag_line", reduces(200000, PeerPath::flag_line)},
      {"merge flag_word",
       [](auto& t, auto* in, auto* out, auto s) { merge(t, in, out, s, PeerPath::flag_word); }},
      {"merge flag_line",
       [](auto& t, auto* in, auto* out, auto s) { merge(t, in, out, s, PeerPath::flag_line); }},
      {"gather_query flag_word",
       [](auto& t, auto* in, auto* out, auto s) { gather(t, in, out, s, PeerPath::flag_word); }},
      {"gather_query flag_line",
       [](auto& t, auto* in, auto* out, auto s) { gather(t, in, out, s, PeerPath::flag_line); }},
  };
}

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void test_missing_rank(Tally& tally, World& world, const Operation& op, std::vector<Buffer>& in,
                       std::vector<Buffer>& out) {
  constexpr double kLimit = 0.05;
  world.reset(std::chrono::milliseconds(50));
  const auto call = [&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    op.call(t, in[to_size(r)].at(), out[to_size(r)].at(), s);
  };
  world.run(call);  // one good call first
  tally.expect(world.healthy(), fmt::format("{}: a complete call succeeds", op.name));
  const double taken = seconds_of([&] {
    world.run([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
      if (r != kMissing) {
        call(r, t, s);
      }
    });
  });
  tally.expect(taken > kLimit * 0.9 && taken < 5.0,
               fmt::format("{}: the wait took {:.3f} s of {:.3f}", op.name, taken, kLimit));
  world.each([&](int r, const cuda::PeerTable& t, cudaStream_t s) {
    const cuda::InboxError error = cuda::read_inbox_error(t, s);
    tally.expect(error.missing_rank == kMissing && error.epoch == 2,
                 fmt::format("{}: rank {} names rank {} at epoch {}", op.name, r,
                             error.missing_rank, error.epoch));
  });
  const double after = seconds_of([&] {
    for (int i = 0; i < 10; ++i) {
      world.each(call);  // the late rank too
    }
    world.finish_all();
  });
  tally.expect(after < kLimit, fmt::format("{}: calls after it took {:.3f} s", op.name, after));
}

template <class Call>
bool is_refused(const Call& call) {
  try {
    call();
  } catch (const UsageError&) {
    return true;
  }
  return false;
}

void test_refusals(Tally& tally, World& world, std::byte* memory) {
  const auto& t = world.table(0);
  const auto refuses = [&](const char* what, const std::function<void()>& call) {
    tally.expect(is_refused(call), what);
  };
  refuses("an all-gather beyond the inbox is refused", [&] {
    const auto bytes = cuda::max_share_bytes(t.layout) + 8;
    cuda::peer_all_gather(t, cuda::AlongDim::contiguous(1, bytes, kRanks), memory, memory, nullptr);
  });
  refuses("an all-reduce beyond the inbox is refused", [&] {
    cuda::peer_all_reduce(t, std::int64_t{2} << 20, DType::bf16, memory, memory, nullptr);
  });
  refuses("an integer sum is refused",
          [&] { cuda::peer_all_reduce(t, 8, DType::i32, memory, memory, nullptr); });
  refuses("heads that n does not divide are refused", [&] {
    cuda::peer_merge(t, {1, 5, 64, DType::bf16}, {memory, 320, 64, nullptr, 5, 1}, {memory, 64, 64},
                     nullptr);
  });
  refuses("a dim that is no multiple of 8 is refused", [&] {
    (void)cuda::packed_piece_bytes({1, 4, 60, DType::bf16}, kRanks);
  });
  refuses("a merge beyond the inbox is refused", [&] {
    (void)cuda::choose_merge_path(t.layout, {4096, 32, 1024, DType::bf16});
  });
}

}  // namespace

void test_failures(Tally& tally) {
  World world(kRanks, 256 << 10, 1 << 20);
  std::vector<Buffer> in;
  std::vector<Buffer> out;
  for (int r = 0; r < kRanks; ++r) {
    in.emplace_back(1 << 20);
    out.emplace_back(4 << 20);
  }
  for (const Operation& op : operations()) {
    test_missing_rank(tally, world, op, in, out);
  }
  test_refusals(tally, world, in[0].at());
}

}  // namespace cohort::test
