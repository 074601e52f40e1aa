// SPDX-License-Identifier: Apache-2.0
#include "world.cuh"

// Query gather and merge: every path against fp64 and, bitwise, against each other and the packed
// plan; the staged plan's correction; empty shards, both bases, layouts, unaligned partials.

namespace cohort::test {
namespace {

using cuda::PeerPath;

struct MergeCase {
  cuda::MergeShape shape;
  bool heads_first = false;  ///< partial as [H,B,D]
  int shift = 0;             ///< elements that the partial is off its alignment
  bool with_lse = true;
};

std::string name(const char* what, const MergeCase& c, int n) {
  return fmt::format("{} n={} B={} H={} D={} {} base={} heads_first={} shift={}", what, n,
                     c.shape.batch, c.shape.heads, c.shape.dim, to_string(c.shape.dtype),
                     c.shape.base == LseBase::e ? "e" : "2", c.heads_first, c.shift);
}

/// Every rank's partial, on the host and on the device. Rows of empty shards hold NaN.
class Partials {
 public:
  Partials(const MergeCase& c, int n, Random& random) : c_(c) {
    const std::int64_t rows = c.shape.batch * c.shape.heads;
    const std::size_t element = size_of(c.shape.dtype);
    const float specials[] = {-INFINITY, INFINITY, NAN, -INFINITY};
    for (int r = 0; r < n; ++r) {
      out_.push_back(random_elements(random, c.shape.dtype, rows * c.shape.dim, false));
      lse_.emplace_back(to_size(rows));
      for (std::size_t row = 0; row < to_size(rows); ++row) {
        const bool empty = random() % 4 == 0 || row % 13 == 5;  // some rows are empty everywhere
        lse_.back()[row] =
            empty ? specials[random() % 4] : static_cast<float>(random() % 4096) / 128.0F - 16.0F;
        if (empty) {
          std::memset(out_.back().data() + row * to_size(c.shape.dim) * element, 0xff,
                      to_size(c.shape.dim) * element);
        }
      }
      device_out_.emplace_back(out_.back().size() + 64);
      device_lse_.emplace_back(lse_.back().size() * 4 + 64);
      COHORT_CHECK(cudaMemcpy(device_out_.back().at(to_size(c.shift) * element), out_.back().data(),
                              out_.back().size(), cudaMemcpyHostToDevice));
      device_lse_.back().upload(lse_.back().data(), lse_.back().size() * 4);
    }
  }

  [[nodiscard]] cuda::Partial partial(int r) const {
    const auto& s = c_.shape;
    const std::size_t shift = to_size(c_.shift) * size_of(s.dtype);
    return {.out = device_out_[to_size(r)].at(shift),
            .out_batch_stride = c_.heads_first ? s.dim : s.heads * s.dim,
            .out_head_stride = c_.heads_first ? s.batch * s.dim : s.dim,
            .lse = device_lse_[to_size(r)].at<float>(),
            .lse_batch_stride = c_.heads_first ? 1 : s.heads,
            .lse_head_stride = c_.heads_first ? s.batch : 1};
  }
  [[nodiscard]] std::size_t row(std::int64_t b, std::int64_t h) const {
    return to_size(c_.heads_first ? h * c_.shape.batch + b : b * c_.shape.heads + h);
  }
  [[nodiscard]] float lse(int r, std::int64_t b, std::int64_t h) const {
    return lse_[to_size(r)][row(b, h)];
  }
  [[nodiscard]] double out(int r, std::int64_t b, std::int64_t h, std::int64_t d) const {
    const std::size_t index = row(b, h) * to_size(c_.shape.dim) + to_size(d);
    return decode(c_.shape.dtype, out_[to_size(r)].data() + index * size_of(c_.shape.dtype));
  }
  [[nodiscard]] int ranks() const { return static_cast<int>(out_.size()); }

 private:
  MergeCase c_;
  std::vector<std::vector<std::byte>> out_;
  std::vector<std::vector<float>> lse_;
  std::vector<Buffer> device_out_;
  std::vector<Buffer> device_lse_;
};

/// fp64 weights of one row.
struct Weights {
  std::vector<double> scales;
  double lse = -INFINITY;
};

Weights weights_of(const Partials& p, LseBase base, std::int64_t b, std::int64_t h) {
  Weights w;
  double max = -INFINITY;
  for (int r = 0; r < p.ranks(); ++r) {
    if (std::isfinite(p.lse(r, b, h))) {
      max = std::max(max, static_cast<double>(p.lse(r, b, h)));
    }
  }
  double sum = 0;
  for (int r = 0; r < p.ranks(); ++r) {
    const double x = p.lse(r, b, h) - max;
    const bool counts = std::isfinite(p.lse(r, b, h));
    w.scales.push_back(!counts ? 0 : base == LseBase::e ? std::exp(x) : std::exp2(x));
    sum += w.scales.back();
  }
  if (sum > 0) {
    for (double& scale : w.scales) {
      scale /= sum;
    }
    w.lse = max + (base == LseBase::e ? std::log(sum) : std::log2(sum));
  }
  return w;
}

struct Result {
  std::vector<std::byte> out;
  std::vector<float> lse;
  // Compared as bytes, because merged LSEs may be infinite and outputs of a failed run NaN.
  friend bool operator==(const Result& a, const Result& b) {
    return a.out == b.out && a.lse.size() == b.lse.size() &&
           (a.lse.empty() || std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * 4) == 0);
  }
};

/// Runs `call(rank, table, stream, merged)` on every rank and fetches the results.
template <class Call>
std::vector<Result> merge_on_all(World& world, const MergeCase& c, const Call& call) {
  const auto& s = c.shape;
  const std::int64_t heads = s.heads / world.size();
  const std::size_t bytes = to_size(s.batch * heads * s.dim) * size_of(s.dtype);
  std::vector<Buffer> out;
  std::vector<Buffer> lse;
  for (int r = 0; r < world.size(); ++r) {
    out.emplace_back(bytes);
    lse.emplace_back(to_size(s.batch * heads) * 4);
  }
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
    const cuda::Merged merged{.out = out[to_size(r)].at(),
                              .out_batch_stride = heads * s.dim,
                              .out_head_stride = s.dim,
                              .lse = c.with_lse ? lse[to_size(r)].at<float>() : nullptr,
                              .lse_batch_stride = heads,
                              .lse_head_stride = 1};
    call(r, t, stream, merged);
  });
  std::vector<Result> results;
  for (int r = 0; r < world.size(); ++r) {
    results.push_back({out[to_size(r)].download<std::byte>(bytes),
                       c.with_lse ? lse[to_size(r)].download<float>(to_size(s.batch * heads))
                                  : std::vector<float>()});
  }
  return results;
}

bool matches_reference(const MergeCase& c, const Partials& p, const std::vector<Result>& results) {
  const auto& s = c.shape;
  const int n = p.ranks();
  const std::int64_t heads = s.heads / n;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const Weights w = weights_of(p, s.base, b, h);
      const Result& result = results[to_size(h / heads)];
      const std::size_t row = to_size(b * heads + h % heads);
      if (c.with_lse) {
        const double got = result.lse[row];
        if (std::isinf(w.lse) ? got != -INFINITY : !(std::abs(got - w.lse) < 1e-5)) {
          return false;
        }
      }
      for (std::int64_t d = 0; d < s.dim; ++d) {
        double want = 0;
        double magnitude = 0;
        for (int r = 0; r < n; ++r) {
          if (w.scales[to_size(r)] != 0) {
            want += w.scales[to_size(r)] * p.out(r, b, h, d);
            magnitude += std::abs(w.scales[to_size(r)] * p.out(r, b, h, d));
          }
        }
        const std::size_t index = row * to_size(s.dim) + to_size(d);
        const double got = decode(s.dtype, result.out.data() + index * size_of(s.dtype));
        if (!(std::abs(got - want) <= roundoff(s.dtype) * std::abs(want) + 4e-6 * magnitude +
                                          (s.dtype == DType::f16 ? 0x1p-24 : 0.0))) {
          return false;
        }
      }
    }
  }
  return true;
}

/// pack_partial on every rank, the all-to-all as copies, merge_pieces.
std::vector<Result> packed_plan(World& world, const MergeCase& c, const Partials& p) {
  const int n = world.size();
  const std::size_t piece = cuda::packed_piece_bytes(c.shape, n);
  std::vector<Buffer> sent;
  std::vector<Buffer> received;
  for (int r = 0; r < n; ++r) {
    sent.emplace_back(piece * to_size(n));
    received.emplace_back(piece * to_size(n));
  }
  world.run([&](int r, const cuda::PeerTable&, cudaStream_t stream) {
    cuda::pack_partial(c.shape, n, p.partial(r), sent[to_size(r)].at(), stream);
  });
  for (int r = 0; r < n; ++r) {
    for (int q = 0; q < n; ++q) {
      COHORT_CHECK(cudaMemcpy(received[to_size(q)].at(piece * to_size(r)),
                              sent[to_size(r)].at(piece * to_size(q)), piece,
                              cudaMemcpyDeviceToDevice));
    }
  }
  COHORT_CHECK(cudaDeviceSynchronize());
  return merge_on_all(
      world, c,
      [&](int r, const cuda::PeerTable&, cudaStream_t stream, const cuda::Merged& merged) {
        cuda::merge_pieces(c.shape, n, received[to_size(r)].at(), merged, stream);
      });
}

void test_merge_case(Tally& tally, World& world, const MergeCase& c, Random& random) {
  const int n = world.size();
  const Partials p(c, n, random);
  const std::vector<Result> packed = packed_plan(world, c, p);
  tally.expect(matches_reference(c, p, packed), name("packed", c, n));
  for (const PeerPath path : {PeerPath::flag_word, PeerPath::flag_line}) {
    const bool fits = path == PeerPath::flag_word
                          ? cuda::merge_lane_bytes(c.shape, n, path) <= world.layout().ll_words * 8
                          : true;
    if (!fits) {
      continue;
    }
    const auto one = merge_on_all(
        world, c, [&](int r, const cuda::PeerTable& t, cudaStream_t s, const cuda::Merged& merged) {
          cuda::peer_merge(t, c.shape, p.partial(r), merged, s, path);
        });
    tally.expect(one == packed,
                 name(fmt::format("{} bitwise as packed", cuda::to_string(path)).c_str(), c, n));
  }
}

void test_merges(Tally& tally, World& world, Random& random, bool few) {
  const std::int64_t n = world.size();
  std::vector<MergeCase> cases;
  const DType dtypes[] = {DType::bf16, DType::f16, DType::f32};
  for (const std::int64_t batch : {0, 1, 2, 3, 7, 16, 33}) {
    for (const std::int64_t dim : {8, 64, 72, 512, 1024}) {
      if (few && dim != 64 && dim != 512) {
        continue;
      }
      const std::int64_t heads = n * (1 + static_cast<std::int64_t>(random() % 5));
      cases.push_back(
          {{batch, heads, dim, dtypes[random() % 3], random() % 2 == 0 ? LseBase::e : LseBase::two},
           random() % 2 == 0,
           static_cast<int>(random() % 4 == 0 ? 1 : 0),
           random() % 2 == 0});
    }
  }
  if (!few) {
    for (const DType dtype : dtypes) {
      cases.push_back({{5, 16 * n, 512, dtype, LseBase::e}, false, 0, true});
      cases.push_back({{5, 16 * n, 512, dtype, LseBase::two}, true, 0, true});
    }
    cases.push_back({{128, 128 / n * n, 512, DType::bf16, LseBase::e}, false, 0, true});
  }
  for (const MergeCase& c : cases) {
    test_merge_case(tally, world, c, random);
  }
}

/// The staged plan's correction, against fp64, on one rank at a time.
void test_correction(Tally& tally, int n) {
  Random random(static_cast<unsigned>(300 + n));
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const DType out_dtype : {dtype, DType::f32}) {
      const MergeCase c{{3, 4 * n, 72, dtype, LseBase::e}, false, 0, false};
      const Partials p(c, n, random);
      const auto rows = c.shape.batch * c.shape.heads;
      std::vector<float> lses;
      for (int r = 0; r < n; ++r) {
        for (std::int64_t row = 0; row < rows; ++row) {
          lses.push_back(p.lse(r, row / c.shape.heads, row % c.shape.heads));
        }
      }
      Buffer device_lses(lses.size() * 4);
      device_lses.upload(lses.data(), lses.size() * 4);
      const int rank = static_cast<int>(random() % static_cast<unsigned>(n));
      const std::size_t element = size_of(out_dtype);
      Buffer out(to_size(rows * c.shape.dim) * element);
      // [H,B,D], the layout that a reduce-scatter over heads takes.
      cuda::correct_partial(c.shape, n, rank, p.partial(rank), device_lses.at<float>(), out.at(),
                            c.shape.dim, c.shape.batch * c.shape.dim, out_dtype, nullptr, nullptr);
      COHORT_CHECK(cudaDeviceSynchronize());
      const auto got = out.download<std::byte>(to_size(rows * c.shape.dim) * element);
      bool good = true;
      for (std::int64_t b = 0; b < c.shape.batch; ++b) {
        for (std::int64_t h = 0; h < c.shape.heads; ++h) {
          const double scale = weights_of(p, c.shape.base, b, h).scales[to_size(rank)];
          for (std::int64_t d = 0; d < c.shape.dim; ++d) {
            const double want = scale == 0 ? 0 : scale * p.out(rank, b, h, d);
            const auto at = to_size((h * c.shape.batch + b) * c.shape.dim + d) * element;
            const double value = decode(out_dtype, got.data() + at);
            good = good && std::abs(value - want) <=
                               (roundoff(out_dtype) + 4e-6) * std::abs(want) + 0x1p-24;
          }
        }
      }
      tally.expect(good, fmt::format("correct_partial n={} rank={} {} to {}", n, rank,
                                     to_string(dtype), to_string(out_dtype)));
    }
  }
}

struct QueryCase {
  std::int64_t batch, heads, nope, pe;
  DType dtype;
  bool sliced;  ///< nope and pe lie in one [B,h,Dn+Dr+8] tensor, off 16 bytes
};

bool query_right(World& world, const QueryCase& c, PeerPath path, Random& random) {
  const int n = world.size();
  const std::size_t element = size_of(c.dtype);
  const std::int64_t dim = c.nope + c.pe;
  const std::int64_t source_row = dim + 9;
  std::vector<std::vector<std::byte>> in;
  std::vector<Buffer> from;
  std::vector<Buffer> to;
  const std::int64_t shift = c.sliced ? 1 : 0;
  for (int r = 0; r < n; ++r) {
    in.push_back(random_elements(
        random, DType::f16, c.batch * c.heads * source_row * static_cast<long>(element) / 2 + 8,
        false));
    from.emplace_back(in.back().size());
    from.back().upload(in.back().data(), in.back().size());
    to.emplace_back(to_size(c.batch * c.heads * n * dim) * element);
  }
  // Not sliced: two dense tensors, one behind the other.
  const std::int64_t row = c.sliced ? source_row : c.nope;
  const std::int64_t pe_row = c.sliced ? source_row : c.pe;
  const std::int64_t pe_start = c.sliced ? shift + c.nope : c.batch * c.heads * c.nope;
  world.run([&](int r, const cuda::PeerTable& t, cudaStream_t stream) {
    const cuda::Query query{.nope = from[to_size(r)].at(to_size(shift) * element),
                            .nope_batch_stride = c.heads * row,
                            .nope_head_stride = row,
                            .pe = from[to_size(r)].at(to_size(pe_start) * element),
                            .pe_batch_stride = c.heads * pe_row,
                            .pe_head_stride = pe_row,
                            .batch = c.batch,
                            .heads = c.heads,
                            .nope_dim = c.nope,
                            .pe_dim = c.pe,
                            .dtype = c.dtype};
    cuda::peer_gather_query(t, query, to[to_size(r)].at(), n * c.heads * dim, dim, stream, path);
  });
  std::vector<std::byte> want(to_size(c.batch * c.heads * n * dim) * element);
  for (int r = 0; r < n; ++r) {
    for (std::int64_t i = 0; i < c.batch * c.heads; ++i) {
      const std::int64_t target = (i / c.heads * n * c.heads + r * c.heads + i % c.heads) * dim;
      std::memcpy(want.data() + to_size(target) * element,
                  in[to_size(r)].data() + to_size(shift + i * row) * element,
                  to_size(c.nope) * element);
      std::memcpy(want.data() + to_size(target + c.nope) * element,
                  in[to_size(r)].data() + to_size(pe_start + i * pe_row) * element,
                  to_size(c.pe) * element);
    }
  }
  bool good = true;
  for (int r = 0; r < n; ++r) {
    good = good && want == to[to_size(r)].download<std::byte>(want.size());
  }
  return good;
}

void test_queries(Tally& tally, World& world, Random& random) {
  for (const QueryCase& c :
       {QueryCase{0, 2, 512, 64, DType::bf16, false}, QueryCase{1, 1, 8, 8, DType::bf16, false},
        QueryCase{1, 16, 512, 64, DType::bf16, false}, QueryCase{3, 5, 64, 0, DType::f16, false},
        QueryCase{2, 3, 16, 8, DType::f32, true}, QueryCase{33, 4, 512, 64, DType::bf16, true},
        QueryCase{64, 8, 512, 64, DType::bf16, false}, QueryCase{5, 2, 32, 16, DType::u8, false},
        QueryCase{33, 4, 576, 16, DType::u8, false}, QueryCase{5, 3, 592, 0, DType::f8_e4m3, true},
        QueryCase{3, 2, 6, 2, DType::f64, false}}) {
    for (const PeerPath path : {PeerPath::flag_word, PeerPath::flag_line}) {
      tally.expect(
          query_right(world, c, path, random),
          fmt::format("gather_query {} n={} B={} h={} {}+{} {} sliced={}", cuda::to_string(path),
                      world.size(), c.batch, c.heads, c.nope, c.pe, to_string(c.dtype), c.sliced));
    }
  }
}

/// pack_query of rank 0's part.
void test_pack_query(Tally& tally) {
  std::vector<std::uint16_t> nope(6 * 32);
  std::vector<std::uint16_t> pe(6 * 8);
  for (std::size_t i = 0; i < nope.size(); ++i) {
    nope[i] = static_cast<std::uint16_t>(i);
  }
  for (std::size_t i = 0; i < pe.size(); ++i) {
    pe[i] = static_cast<std::uint16_t>(1000 + i);
  }
  Buffer a(nope.size() * 2);
  Buffer b(pe.size() * 2);
  Buffer out(6 * 40 * 2);
  a.upload(nope.data(), nope.size() * 2);
  b.upload(pe.data(), pe.size() * 2);
  cuda::pack_query({.nope = a.at(),
                    .nope_batch_stride = 96,
                    .nope_head_stride = 32,
                    .pe = b.at(),
                    .pe_batch_stride = 24,
                    .pe_head_stride = 8,
                    .batch = 2,
                    .heads = 3,
                    .nope_dim = 32,
                    .pe_dim = 8,
                    .dtype = DType::bf16},
                   out.at(), 120, 40, nullptr);
  COHORT_CHECK(cudaDeviceSynchronize());
  const auto got = out.download<std::uint16_t>(240);
  bool good = true;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const std::size_t d = i % 40;
    good = good && got[i] == (d < 32 ? nope[i / 40 * 32 + d] : pe[i / 40 * 8 + d - 32]);
  }
  tally.expect(good, "pack_query");
}

}  // namespace

void test_attention(Tally& tally, int n) {
  World world(n, 640 << 10, n > 4 ? 1 << 20 : 10 << 20);
  Random random(static_cast<unsigned>(200 + n));
  test_merges(tally, world, random, n > 4);
  test_queries(tally, world, random);
  world.delay(7654321U + static_cast<unsigned>(n));
  test_merges(tally, world, random, true);
  test_queries(tally, world, random);
  tally.expect(world.healthy(), fmt::format("no error word set by attention, n={}", n));
  test_correction(tally, n);
  if (n == 2) {
    test_pack_query(tally);
  }
}

}  // namespace cohort::test
