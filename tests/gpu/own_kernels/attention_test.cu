// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/shapes.hpp"
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
  bool local_tokens = false;
  std::vector<std::int64_t> counts = {};  ///< By token.

  /// With the counts, which move with the case.
  [[nodiscard]] cuda::MergeShape with_counts() const {
    cuda::MergeShape all = shape;
    all.counts = counts;
    return all;
  }
};

std::string name(const char* what, const MergeCase& c, int n) {
  return fmt::format("{} n={} S={} B={} H={} D={} {} base={} heads_first={} shift={} {}{}{}{} [{}]",
                     what, n, c.shape.splits, c.shape.batch, c.shape.heads, c.shape.dim,
                     to_string(c.shape.dtype), c.shape.base == LseBase::e ? "e" : "2",
                     c.heads_first, c.shift, to_string(c.shape.result),
                     c.shape.whole ? " whole" : "", c.shape.sink ? " sink" : "",
                     c.local_tokens ? " tokens" : "", fmt::join(c.counts, ","));
}

/// Every rank's partials, on the host and on the device. Rows of empty shards hold NaN, and those
/// that are empty because the rank has no tokens a finite LSE.
class Partials {
 public:
  Partials(const MergeCase& c, int n, Random& random)
      : c_(c), device_sinks_(to_size(c.shape.heads) * 4 + 64) {
    const std::int64_t heads = c.shape.heads;
    const std::int64_t rows = c.shape.splits * c.shape.batch * heads;
    const std::size_t element = size_of(c.shape.dtype);
    const float specials[] = {-INFINITY, INFINITY, NAN, -INFINITY};
    for (std::int64_t h = 0; h < heads; ++h) {
      sinks_.push_back(h % 5 == 3 ? -INFINITY : static_cast<float>(random() % 64) / 4.0F - 8.0F);
    }
    device_sinks_.upload(sinks_.data(), sinks_.size() * 4);
    for (int r = 0; r < n; ++r) {
      out_.push_back(random_elements(random, c.shape.dtype, rows * c.shape.dim, false));
      lse_.emplace_back(to_size(rows));
      tokens_.emplace_back();
      for (std::int64_t b = 0; b < c.shape.batch; ++b) {
        tokens_.back().push_back(random() % 3 == 0 ? -static_cast<int>(b % 2) : 7);
      }
      for (std::size_t row = 0; row < to_size(rows); ++row) {
        const bool empty = random() % 4 == 0 || row % 13 == 5;  // some rows are empty everywhere
        const std::int64_t b = token_of(static_cast<std::int64_t>(row));
        const bool no_tokens = c.local_tokens && tokens_.back()[to_size(b)] <= 0;
        lse_.back()[row] = no_tokens ? -1e30F
                           : empty   ? specials[random() % 4]
                                     : static_cast<float>(random() % 4096) / 128.0F - 16.0F;
        if (empty || no_tokens) {
          std::memset(out_.back().data() + row * to_size(c.shape.dim) * element, 0xff,
                      to_size(c.shape.dim) * element);
        }
      }
      device_out_.emplace_back(out_.back().size() + 64);
      device_lse_.emplace_back(lse_.back().size() * 4 + 64);
      device_tokens_.emplace_back(tokens_.back().size() * 4 + 64);
      device_out_.back().upload(out_.back().data(), out_.back().size(), to_size(c.shift) * element);
      device_lse_.back().upload(lse_.back().data(), lse_.back().size() * 4);
      device_tokens_.back().upload(tokens_.back().data(), tokens_.back().size() * 4);
    }
  }

  [[nodiscard]] cuda::Partial partial(int r) const {
    const auto& s = c_.shape;
    const std::size_t shift = to_size(c_.shift) * size_of(s.dtype);
    return {
        .out = device_out_[to_size(r)].at(shift),
        .out_batch_stride = c_.heads_first ? s.dim : s.heads * s.dim,
        .out_head_stride = c_.heads_first ? s.batch * s.dim : s.dim,
        .lse = device_lse_[to_size(r)].at<float>(),
        .lse_batch_stride = c_.heads_first ? 1 : s.heads,
        .lse_head_stride = c_.heads_first ? s.batch : 1,
        .out_split_stride = s.batch * s.heads * s.dim,
        .lse_split_stride = s.batch * s.heads,
        .sink = s.sink ? device_sinks_.at<float>() : nullptr,
        .local_tokens = c_.local_tokens ? device_tokens_[to_size(r)].at<std::int32_t>() : nullptr};
  }
  [[nodiscard]] float lse(int r, std::int64_t split, std::int64_t b, std::int64_t h) const {
    return lse_[to_size(r)][row(split, b, h)];
  }
  [[nodiscard]] bool counts(int r, std::int64_t split, std::int64_t b, std::int64_t h) const {
    return std::isfinite(lse(r, split, b, h)) &&
           !(c_.local_tokens && tokens_[to_size(r)][to_size(b)] <= 0);
  }
  [[nodiscard]] double out(int r, std::int64_t split, std::int64_t b, std::int64_t h,
                           std::int64_t d) const {
    const std::size_t index = row(split, b, h) * to_size(c_.shape.dim) + to_size(d);
    return decode(c_.shape.dtype, out_[to_size(r)].data() + index * size_of(c_.shape.dtype));
  }
  /// -inf where there is none.
  [[nodiscard]] double sink(std::int64_t h) const {
    return c_.shape.sink ? sinks_[to_size(h)] : -INFINITY;
  }
  /// Of a rank's splits together, by the host's arithmetic.
  [[nodiscard]] float lse_of_rank(int r, std::int64_t b, std::int64_t h) const {
    std::vector<float> lses;
    for (std::int64_t s = 0; s < splits(); ++s) {
      lses.push_back(counts(r, s, b, h) ? lse(r, s, b, h) : dcp::kEmptyLse);
    }
    float merged = lses[0];
    if (splits() > 1) {
      dcp::merge_weights(lses.data(), static_cast<int>(splits()), c_.shape.base, lses.data(),
                         &merged);
    }
    return merged;
  }
  [[nodiscard]] int ranks() const { return static_cast<int>(out_.size()); }
  [[nodiscard]] std::int64_t splits() const { return c_.shape.splits; }

 private:
  [[nodiscard]] std::size_t row(std::int64_t split, std::int64_t b, std::int64_t h) const {
    const auto& s = c_.shape;
    return to_size(split * s.batch * s.heads +
                   (c_.heads_first ? h * s.batch + b : b * s.heads + h));
  }
  [[nodiscard]] std::int64_t token_of(std::int64_t row) const {
    const auto& s = c_.shape;
    const std::int64_t in_split = row % (s.batch * s.heads);
    return c_.heads_first ? in_split % s.batch : in_split / s.heads;
  }

  MergeCase c_;
  std::vector<std::vector<std::byte>> out_;
  std::vector<std::vector<float>> lse_;
  std::vector<std::vector<std::int32_t>> tokens_;
  std::vector<float> sinks_;
  std::vector<Buffer> device_out_;
  std::vector<Buffer> device_lse_;
  std::vector<Buffer> device_tokens_;
  Buffer device_sinks_;
};

/// fp64 weights of one row, of every rank's splits.
struct Weights {
  std::vector<double> scales;
  double lse = -INFINITY;
};

Weights weights_of(const Partials& p, LseBase base, std::int64_t b, std::int64_t h) {
  const auto exp = [&](double x) { return base == LseBase::e ? std::exp(x) : std::exp2(x); };
  Weights w;
  double max = p.sink(h);
  for (int r = 0; r < p.ranks(); ++r) {
    for (std::int64_t s = 0; s < p.splits(); ++s) {
      if (p.counts(r, s, b, h)) {
        max = std::max(max, static_cast<double>(p.lse(r, s, b, h)));
      }
    }
  }
  double sum = std::isfinite(p.sink(h)) ? exp(p.sink(h) - max) : 0;
  for (int r = 0; r < p.ranks(); ++r) {
    for (std::int64_t s = 0; s < p.splits(); ++s) {
      w.scales.push_back(p.counts(r, s, b, h) ? exp(p.lse(r, s, b, h) - max) : 0);
      sum += w.scales.back();
    }
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
  const auto s = c.with_counts();
  const dcp::MergeRows rows = s.rows(world.size());
  const std::int64_t heads = rows.of(0).heads;
  const auto bytes_of = [&](int r) {
    return to_size(rows.of(r).rows() * s.dim) * size_of(s.dtype);
  };
  std::vector<Buffer> out;
  std::vector<Buffer> lse;
  for (int r = 0; r < world.size(); ++r) {
    out.emplace_back(bytes_of(r) + 16);
    lse.emplace_back(to_size(rows.of(r).rows()) * 4 + 16);
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
    results.push_back({out[to_size(r)].download<std::byte>(bytes_of(r)),
                       c.with_lse ? lse[to_size(r)].download<float>(to_size(rows.of(r).rows()))
                                  : std::vector<float>()});
  }
  return results;
}

/// The rows of one rank.
bool matches_reference(const MergeCase& c, const Partials& p, const Result& result,
                       const dcp::RowBlock<std::int64_t>& block) {
  const auto& s = c.shape;
  for (std::int64_t row = 0; row < block.rows(); ++row) {
    const auto at = block.place(row, row / block.heads);
    const Weights w = weights_of(p, s.base, at.token, at.head);
    if (c.with_lse) {
      const double got = result.lse[to_size(row)];
      if (std::isinf(w.lse) ? got != -INFINITY : !(std::abs(got - w.lse) < 1e-5)) {
        return false;
      }
    }
    for (std::int64_t d = 0; d < s.dim; ++d) {
      double want = 0;
      double magnitude = 0;
      for (int r = 0; r < p.ranks(); ++r) {
        for (std::int64_t split = 0; split < s.splits; ++split) {
          const double scale = w.scales[to_size(r * s.splits + split)];
          if (scale != 0) {
            const double term = scale * p.out(r, split, at.token, at.head, d);
            want += term;
            magnitude += std::abs(term);
          }
        }
      }
      const std::size_t index = to_size(row * s.dim + d);
      const double got = decode(s.dtype, result.out.data() + index * size_of(s.dtype));
      // A rank's splits are rounded once before.
      const double tiny = s.dtype == DType::f16 ? 0x1p-24 : 0.0;
      const double combined = s.splits > 1 ? roundoff(s.dtype) * magnitude + tiny : 0.0;
      if (!(std::abs(got - want) <=
            roundoff(s.dtype) * (std::abs(want) + combined) + 6e-6 * magnitude + combined + tiny)) {
        return false;
      }
    }
  }
  return true;
}

bool matches_reference(const MergeCase& c, const Partials& p, const std::vector<Result>& results) {
  const auto shape = c.with_counts();
  for (int r = 0; r < p.ranks(); ++r) {
    if (!matches_reference(c, p, results[to_size(r)], shape.rows(p.ranks()).of(r))) {
      return false;
    }
  }
  return true;
}

/// pack_partial on every rank, the all-to-all as copies, merge_pieces.
std::vector<Result> packed_plan(World& world, const MergeCase& c, const Partials& p) {
  const int n = world.size();
  const auto shape = c.with_counts();
  const std::size_t piece = cuda::packed_piece_bytes(shape, n);
  std::vector<Buffer> sent;
  std::vector<Buffer> received;
  for (int r = 0; r < n; ++r) {
    sent.emplace_back(piece * to_size(n));
    received.emplace_back(piece * to_size(n));
  }
  world.run([&](int r, const cuda::PeerTable&, cudaStream_t stream) {
    cuda::pack_partial(shape, n, p.partial(r), sent[to_size(r)].at(), stream);
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
        cuda::merge_pieces(shape, n, r, received[to_size(r)].at(), p.partial(r), merged, stream);
      });
}

void test_merge_case(Tally& tally, World& world, const MergeCase& c, Random& random) {
  const int n = world.size();
  const auto shape = c.with_counts();
  const Partials p(c, n, random);
  const std::vector<Result> packed = packed_plan(world, c, p);
  tally.expect(matches_reference(c, p, packed), name("packed", c, n));
  if (!cuda::peer_merge_obstacle(shape).empty()) {
    return;
  }
  for (const PeerPath path : {PeerPath::flag_word, PeerPath::flag_line}) {
    const bool fits =
        path == PeerPath::flag_word
            ? cuda::merge_lane_bytes(shape, n, path) <= world.layout().ll_words * 8
            : cuda::merge_lane_bytes(shape, n, path) <= world.layout().flag_line_capacity();
    if (!fits) {
      continue;
    }
    const auto one = merge_on_all(
        world, c, [&](int r, const cuda::PeerTable& t, cudaStream_t s, const cuda::Merged& merged) {
          cuda::peer_merge(t, shape, p.partial(r), merged, s, path);
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

/// Every combination of splits, result, sink and numbers of tokens, with a shape drawn for each.
void test_partials(Tally& tally, World& world, Random& random, bool few) {
  const std::int64_t n = world.size();
  const auto pick = [&](std::initializer_list<std::int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  const DType dtypes[] = {DType::bf16, DType::f16, DType::f32};
  for (const std::int64_t splits : {1, 2, 3, 4, 6}) {
    for (const MergeResult result :
         {MergeResult::by_head, MergeResult::by_token, MergeResult::replicated}) {
      for (unsigned flags = 0; flags < 4; ++flags) {
        if (few && (flags + static_cast<unsigned>(splits)) % 2 == 0) {
          continue;
        }
        MergeCase c{.shape = {.batch = pick({0, 1, 2, 3, 7, 16, 33}),
                              .heads = n * pick({1, 2, 3}),
                              .dim = pick({8, 64, 72, 512}),
                              .dtype = dtypes[random() % 3],
                              .base = random() % 2 == 0 ? LseBase::e : LseBase::two,
                              .splits = splits,
                              .result = result,
                              .whole = result == MergeResult::replicated,
                              .sink = (flags & 1) != 0},
                    .heads_first = random() % 2 == 0,
                    .shift = random() % 4 == 0 ? 1 : 0,
                    .with_lse = random() % 2 == 0,
                    .local_tokens = (flags & 2) != 0};
        if (result == MergeResult::by_token) {
          c.counts.assign(to_size(n), 0);
          for (std::int64_t b = 0; b < c.shape.batch; ++b) {
            ++c.counts[random() % (random() % 2 == 0 ? to_size(n) : 1)];
          }
        }
        test_merge_case(tally, world, c, random);
      }
    }
  }
}

/// The staged plan's correction, against fp64, on one rank at a time.
void test_correction(Tally& tally, int n) {
  Random random(static_cast<unsigned>(300 + n));
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const DType out_dtype : {dtype, DType::f32}) {
      const std::int64_t splits = 1 + static_cast<std::int64_t>(random() % 3);
      const MergeCase c{.shape = {.batch = 3,
                                  .heads = 4 * n,
                                  .dim = 72,
                                  .dtype = dtype,
                                  .splits = splits,
                                  .sink = random() % 2 == 0},
                        .with_lse = false,
                        .local_tokens = random() % 2 == 0};
      const Partials p(c, n, random);
      const auto rows = c.shape.batch * c.shape.heads;
      std::vector<float> lses;
      for (int r = 0; r < n; ++r) {
        for (std::int64_t row = 0; row < rows; ++row) {
          lses.push_back(p.lse_of_rank(r, row / c.shape.heads, row % c.shape.heads));
        }
      }
      Buffer device_lses(lses.size() * 4);
      device_lses.upload(lses.data(), lses.size() * 4);
      const int rank = static_cast<int>(random() % static_cast<unsigned>(n));
      const std::size_t element = size_of(out_dtype);
      Buffer out(to_size(rows * c.shape.dim) * element);
      // [H,B,D], the layout that a reduce-scatter over heads takes.
      cuda::correct_partial(c.shape, n, rank, p.partial(rank), device_lses.at<float>(), out.at(),
                            c.shape.dim, c.shape.batch * c.shape.dim, out_dtype, nullptr);
      COHORT_CHECK(cudaDeviceSynchronize());
      const auto got = out.download<std::byte>(to_size(rows * c.shape.dim) * element);
      bool good = true;
      for (std::int64_t b = 0; b < c.shape.batch; ++b) {
        for (std::int64_t h = 0; h < c.shape.heads; ++h) {
          const auto scales = weights_of(p, c.shape.base, b, h).scales;
          for (std::int64_t d = 0; d < c.shape.dim; ++d) {
            double want = 0;
            double magnitude = 0;
            for (std::int64_t s = 0; s < splits; ++s) {
              const double scale = scales[to_size(rank * splits + s)];
              const double term = scale == 0 ? 0 : scale * p.out(rank, s, b, h, d);
              want += term;
              magnitude += std::abs(term);
            }
            const auto at = to_size((h * c.shape.batch + b) * c.shape.dim + d) * element;
            const double value = decode(out_dtype, got.data() + at);
            good = good && std::abs(value - want) <=
                               (roundoff(out_dtype) + 6e-6) * std::abs(want) + 0x1p-24 +
                                   (splits > 1 ? 1.1 * roundoff(dtype) * magnitude : 0.0);
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
  test_partials(tally, world, random, n > 4);
  test_queries(tally, world, random);
  world.delay(7654321U + static_cast<unsigned>(n));
  test_merges(tally, world, random, true);
  test_partials(tally, world, random, true);
  test_queries(tally, world, random);
  tally.expect(world.healthy(), fmt::format("no error word set by attention, n={}", n));
  test_correction(tally, n);
  if (n == 2) {
    test_pack_query(tally);
  }
}

}  // namespace cohort::test
