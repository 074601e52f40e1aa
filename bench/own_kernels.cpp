// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/kernels.hpp>

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "command_line/command_line.hpp"
#include "own_kernels/floor_kernels.hpp"
#include "own_kernels/ranks.hpp"

// The library's own kernels, N ranks as N streams of this process: what the kernels themselves
// cost. On one card every inbox is local and no link is involved; with `--cards` rank r runs on
// card r mod C, and the cards reach each other by peer access. Graph replays of 50 calls; medians
// of 15. With two ranks also the floors: kernels that do as little as an exchange allows. And the
// local kernels' bandwidth against cudaMemcpyAsync on 64 MiB.

namespace {

namespace cuda = cohort::cuda;
using cohort::DType;
using namespace cohort::bench::own_kernels;

/// What the command line asks for.
struct Options : Cards {
  std::vector<int> counts = {2, 4, 8};
  std::string only;  ///< One part; empty for all.
  std::string json;
};

constexpr std::array kPaths = {cuda::PeerPath::flag_word, cuda::PeerPath::flag_line};

/// Whether an inbox has room for a lane of so many bytes.
bool fits(const cuda::InboxLayout& layout, std::int64_t lane, cuda::PeerPath path) {
  return lane <= (path == cuda::PeerPath::flag_word ? layout.flag_word_capacity()
                                                    : layout.flag_line_capacity());
}

void time_collectives(Report& report, std::vector<Rank>& ranks) {
  const int n = static_cast<int>(ranks.size());
  const auto row = [&](const char* op, std::int64_t total, cuda::PeerPath path, double us) {
    report.add(
        fmt::format(R"("op": "{}", "ranks": {}, "total_bytes": {}, "path": "{}", "us": {:.3f})", op,
                    n, total, cuda::to_string(path), us));
  };
  row("barrier", 0, cuda::PeerPath::flag_word,
      time_of(ranks, [](const Rank& r) { cuda::peer_barrier(r.table, r.stream); }));
  for (std::int64_t total = 2 << 10; total <= 16 << 20; total *= 2) {
    const auto dims = cuda::AlongDim::contiguous(1, total / n, n);
    for (const auto path : kPaths) {
      if (fits(ranks[0].table.layout, total / n, path)) {
        row("all_gather", total, path, time_of(ranks, [&](const Rank& r) {
              cuda::peer_all_gather(r.table, dims, r.in, r.out, r.stream, path);
            }));
        row("reduce_scatter", total, path, time_of(ranks, [&](const Rank& r) {
              cuda::peer_reduce_scatter(r.table, dims, DType::bf16, r.in, r.out, r.stream, path);
            }));
      }
    }
    for (const auto path : kPaths) {
      if (!cuda::choose_all_reduce_plan(ranks[0].table.layout, total, path).fits) {
        continue;
      }
      row("all_reduce", total, path, time_of(ranks, [&](const Rank& r) {
            cuda::peer_all_reduce(r.table, total / 2, DType::bf16, r.in, r.out, r.stream, path);
          }));
      if (path == cuda::PeerPath::flag_line && total >= 1 << 20) {
        row("all_reduce in place", total, path, time_of(ranks, [&](const Rank& r) {
              cuda::peer_all_reduce(r.table, total / 2, DType::bf16, r.out, r.out, r.stream, path);
            }));
      }
    }
  }
}

/// An all-reduce with residual and RMS norm in one launch, beside the all-reduce and the norm as
/// two, and the norm alone: of a model with rows of 7168.
void time_norms(Report& report, std::vector<Rank>& ranks) {
  const int n = static_cast<int>(ranks.size());
  constexpr std::int64_t kHidden = 7168;
  constexpr std::int64_t kPart = std::int64_t{8} << 20;
  for (const std::int64_t batch : {1, 2, 4, 8, 16, 32, 64}) {
    for (const DType out : {DType::bf16, DType::f8_e4m3}) {
      const cuda::NormShape shape{.rows = batch, .hidden = kHidden, .out_dtype = out};
      const auto norm_of = [&](const Rank& r, const std::byte* x) {
        return cuda::Norm{.shape = shape,
                          .x = x,
                          .residual = r.in + 2 * kPart,
                          .weight = r.in + 3 * kPart,
                          .out = r.out,
                          .scale = out == DType::bf16 ? nullptr : r.lse,
                          .epsilon = 1e-6F};
      };
      const auto row = [&](const char* op, std::string_view path, double us) {
        report.add(
            fmt::format(R"("op": "{}{}", "ranks": {}, "batch": {}, "path": "{}", "us": {:.3f})", op,
                        out == DType::bf16 ? "" : " f8", n, batch, path, us));
      };
      for (const auto path : kPaths) {
        if (cuda::choose_norm_plan(ranks[0].table.layout, shape, path).fits) {
          row("all_reduce_rms_norm", cuda::to_string(path), time_of(ranks, [&](const Rank& r) {
                cuda::peer_all_reduce_rms_norm(r.table, norm_of(r, r.in), r.stream, path);
              }));
        }
      }
      row("all_reduce, then rms_norm", "automatic", time_of(ranks, [&](const Rank& r) {
            std::byte* const sum = r.out + kPart;
            cuda::peer_all_reduce(r.table, batch * kHidden, DType::bf16, r.in, sum, r.stream);
            cuda::rms_norm(norm_of(r, sum), r.stream);
          }));
      row("rms_norm", "local",
          time_of(ranks, [&](const Rank& r) { cuda::rms_norm(norm_of(r, r.in), r.stream); }));
    }
    report.add(fmt::format(
        R"("op": "all_reduce", "ranks": {}, "batch": {}, "path": "automatic", "us": {:.3f})", n,
        batch, time_of(ranks, [&](const Rank& r) {
          cuda::peer_all_reduce(r.table, batch * kHidden, DType::bf16, r.in, r.out, r.stream);
        })));
  }
}

/// What an exchange between two ranks cannot do without.
void time_floors(Report& report, std::vector<Rank>& ranks) {
  namespace bench = cohort::bench;
  if (ranks.size() != 2) {
    return;
  }
  std::array<bench::FloorRank, 2> floors;
  for (std::size_t r = 0; r < 2; ++r) {
    make_current(ranks[r]);
    floors[r] = {.own = device_memory(bench::kFloorBytes),
                 .in = ranks[r].in,
                 .out = ranks[r].out,
                 .rank = static_cast<int>(r)};
    check(cudaMemset(floors[r].own, 0, static_cast<std::size_t>(bench::kFloorBytes)), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  floors[0].peer = floors[1].own;
  floors[1].peer = floors[0].own;
  const auto row = [&](const char* op, bench::Floor floor, std::int64_t total) {
    std::array<std::uint32_t, 2> calls = {};
    const double us = time_of(ranks, [&](const Rank& rank) {
      const auto r = static_cast<std::size_t>(rank.table.rank);
      if (calls[r] % kCalls == 0) {
        bench::launch_floor_round(floors[r], rank.stream);
      }
      bench::launch_floor(floor, floors[r], total / 2, calls[r]++ % kCalls, rank.stream);
    });
    report.add(
        fmt::format(R"("op": "{}", "ranks": 2, "total_bytes": {}, "us": {:.3f})", op, total, us));
  };
  row("floor: empty kernel", bench::Floor::empty, 2 << 10);
  row("floor: send", bench::Floor::send, 2 << 10);
  row("floor: exchange", bench::Floor::exchange, 2 << 10);
  for (const std::int64_t total : {2 << 10, 8 << 10, 64 << 10, 256 << 10}) {
    row("floor: all_gather", bench::Floor::gather, total);
  }
  for (std::size_t r = 0; r < 2; ++r) {
    make_current(ranks[r]);
    cudaFree(floors[r].own);
  }
}

void time_attention(Report& report, std::vector<Rank>& ranks) {
  const int n = static_cast<int>(ranks.size());
  constexpr std::int64_t kHeads = 128;
  constexpr std::int64_t kDim = 512;
  constexpr std::int64_t kRope = 64;
  for (const std::int64_t batch : {1, 2, 4, 8, 16, 32, 64, 128}) {
    const cuda::MergeShape shape{batch, kHeads, kDim, DType::bf16};
    const auto query_of = [&](const Rank& r, std::int64_t nope, std::int64_t pe, DType dtype) {
      const std::int64_t heads = kHeads / n;
      const auto element = static_cast<std::int64_t>(size_of(dtype));
      return cuda::Query{.nope = r.in,
                         .nope_batch_stride = heads * nope,
                         .nope_head_stride = nope,
                         .pe = r.in + batch * heads * nope * element,
                         .pe_batch_stride = heads * pe,
                         .pe_head_stride = pe,
                         .batch = batch,
                         .heads = heads,
                         .nope_dim = nope,
                         .pe_dim = pe,
                         .dtype = dtype};
    };
    for (const auto path : kPaths) {
      const bool words = path == cuda::PeerPath::flag_word;
      const auto& layout = ranks[0].table.layout;
      const std::int64_t merge_lane = cuda::merge_lane_bytes(shape, n, path);
      const auto row = [&](const char* op, std::int64_t lane, double us) {
        const std::int64_t needed = lane * (n - 1);
        report.add(
            fmt::format(R"("op": "{}", "ranks": {}, "batch": {}, "path": "{}", "us": {:.3f}, )"
                        R"("bytes_needed": {}, "bytes_moved": {}, "needed_gb_s": {:.1f})",
                        op, n, batch, cuda::to_string(path), us, needed,
                        words ? needed * 2 : needed / cuda::kLinePayload * cuda::kLineBytes,
                        static_cast<double>(needed) / us / 1e3));
      };
      if (fits(layout, merge_lane, path)) {
        row("merge", merge_lane, time_of(ranks, [&](const Rank& r) {
              cuda::peer_merge(r.table, shape, {r.in, kHeads * kDim, kDim, r.lse, kHeads, 1},
                               {r.out, kHeads / n * kDim, kDim}, r.stream, path);
            }));
      }
      const auto query_row = [&](const char* op, std::int64_t nope, std::int64_t pe, DType dtype) {
        const std::int64_t lane = cuda::query_lane_bytes(query_of(ranks[0], nope, pe, dtype), path);
        if (fits(layout, lane, path)) {
          row(op, lane, time_of(ranks, [&](const Rank& r) {
                cuda::peer_gather_query(r.table, query_of(r, nope, pe, dtype), r.out,
                                        kHeads * (nope + pe), nope + pe, r.stream, path);
              }));
        }
      };
      query_row("gather_query", kDim, kRope, DType::bf16);
      query_row("gather_query f8", kDim + kRope, 16, DType::u8);  // with four scales of f32
    }
  }
}

/// What engines have beyond one partial a rank, and want beyond their heads: S splits combined
/// while they are merged, and by a kernel of its own before a merge; by token; and replicated, by
/// one launch and by a gather of the merged heads.
void time_partials(Report& report, std::vector<Rank>& ranks) {
  const int n = static_cast<int>(ranks.size());
  constexpr std::int64_t kHeads = 128;
  constexpr std::int64_t kDim = 512;
  constexpr std::int64_t kSink = 128;  // floats behind the LSEs
  for (const std::int64_t batch : {1, 4, 16}) {
    const std::int64_t rows = batch * kHeads;
    const auto partial_of = [&](const std::byte* in, const float* lse) {
      return cuda::Partial{.out = in,
                           .out_batch_stride = kHeads * kDim,
                           .out_head_stride = kDim,
                           .lse = lse,
                           .lse_batch_stride = kHeads,
                           .lse_head_stride = 1,
                           .out_split_stride = rows * kDim,
                           .lse_split_stride = rows};
    };
    const auto row = [&](const std::string& op, const Call& call) {
      report.add(fmt::format(R"("op": "{}", "ranks": {}, "batch": {}, "us": {:.3f})", op, n, batch,
                             time_of(ranks, call)));
    };
    cuda::MergeShape shape{batch, kHeads, kDim, DType::bf16};
    const auto merge = [&](const Rank& r, const cuda::MergeShape& s, const cuda::Partial& partial) {
      const std::int64_t heads = s.rows(n).of(0).heads;
      cuda::peer_merge(r.table, s, partial, {r.out, heads * kDim, kDim}, r.stream);
    };
    row("merge", [&](const Rank& r) { merge(r, shape, partial_of(r.in, r.lse)); });
    for (const std::int64_t splits : {2, 4}) {
      cuda::MergeShape split = shape;
      split.splits = splits;
      row(fmt::format("merge of {} splits", splits),
          [&](const Rank& r) { merge(r, split, partial_of(r.in, r.lse)); });
      // A piece for one rank is what such a kernel writes: rows, and their LSEs behind them.
      row(fmt::format("combine {} splits, then merge", splits), [&](const Rank& r) {
        std::byte* const combined = r.in + kBuffer / 2;
        cuda::pack_partial(split, 1, partial_of(r.in, r.lse), combined, r.stream);
        merge(r, shape,
              partial_of(combined, reinterpret_cast<const float*>(combined + rows * kDim * 2)));
      });
    }
    cuda::MergeShape sink = shape;
    sink.sink = true;
    row("merge with sinks", [&](const Rank& r) {
      cuda::Partial partial = partial_of(r.in, r.lse);
      partial.sink = r.lse + kSink;
      merge(r, sink, partial);
    });
    std::vector<std::int64_t> counts;
    for (int r = 0; r < n; ++r) {
      counts.push_back(cohort::dcp::MergeRows::even_count(batch, n, r));
    }
    cuda::MergeShape by_token = shape;
    by_token.result = cohort::MergeResult::by_token;
    by_token.counts = counts;
    row("merge by token", [&](const Rank& r) { merge(r, by_token, partial_of(r.in, r.lse)); });
    cuda::MergeShape whole = shape;
    whole.result = cohort::MergeResult::replicated;
    whole.whole = true;
    constexpr auto kLines = cuda::PeerPath::flag_line;
    if (fits(ranks[0].table.layout, cuda::merge_lane_bytes(whole, n, kLines), kLines)) {
      row("merge replicated", [&](const Rank& r) { merge(r, whole, partial_of(r.in, r.lse)); });
    }
    row("merge, then all_gather", [&](const Rank& r) {
      merge(r, shape, partial_of(r.in, r.lse));
      const auto dims = cuda::AlongDim::contiguous(1, rows / n * kDim * 2, n);
      cuda::peer_all_gather(r.table, dims, r.out, r.out + kBuffer / 2, r.stream);
    });
  }
}

/// Local kernels on 64 MiB, rotating among buffers that together exceed the second-level cache.
void time_local(Report& report) {
  constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  constexpr int kSets = 4;
  std::vector<Rank> one(1);
  check(cudaStreamCreateWithFlags(&one[0].stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaEventCreate(&one[0].begin), "cudaEventCreate");
  check(cudaEventCreate(&one[0].end), "cudaEventCreate");
  const auto layout = cuda::InboxLayout::make({.ranks = 1});
  one[0].table.peers[0] = device_memory(layout.bytes);
  one[0].table.layout = layout;
  one[0].table.size = 1;
  cuda::initialize_inbox(one[0].table, one[0].stream);
  std::vector<std::byte*> in;
  std::vector<std::byte*> out;
  for (int i = 0; i < kSets; ++i) {
    in.push_back(device_memory(kBytes + (1 << 20)));
    out.push_back(device_memory(kBytes + (1 << 20)));
    randomize(in.back(), kBytes);
  }
  std::size_t turn = 0;
  const auto next = [&] { return turn++ % kSets; };
  double copy_gb_s = 0;
  const auto row = [&](const std::string& op, double moved_bytes, double us) {
    const double gb_s = moved_bytes / us / 1e3;
    copy_gb_s = copy_gb_s == 0 ? gb_s : copy_gb_s;
    report.add(fmt::format(R"("op": "{}", "us": {:.2f}, "gb_s": {:.0f}, "of_copy": {:.3f})", op, us,
                           gb_s, gb_s / copy_gb_s));
  };
  row("cudaMemcpyAsync 64 MiB", 2.0 * kBytes, time_of(one, [&](const Rank& r) {
        const std::size_t i = next();
        check(cudaMemcpyAsync(out[i], in[i], kBytes, cudaMemcpyDeviceToDevice, r.stream), "copy");
      }));
  // [8][outer][inner] to [outer][8][inner]: unpacking an all-gather along a dimension.
  for (const std::int64_t inner : {8, 64, 512, 4096, 65536}) {
    const std::int64_t outer = kBytes / 2 / 8 / inner;
    const std::array<std::int64_t, 3> shape = {8, outer, inner};
    const std::array<std::int64_t, 3> from = {outer * inner, inner, 1};
    const std::array<std::int64_t, 3> to = {inner, 8 * inner, 1};
    row(fmt::format("strided_copy unpack, runs of {} bf16", inner), 2.0 * kBytes,
        time_of(one, [&](const Rank& r) {
          const std::size_t i = next();
          cuda::strided_copy(in[i], from, out[i], to, shape, DType::bf16, r.stream);
        }));
    row(fmt::format("strided_copy pack, runs of {} bf16", inner), 2.0 * kBytes,
        time_of(one, [&](const Rank& r) {
          const std::size_t i = next();
          cuda::strided_copy(in[i], to, out[i], from, shape, DType::bf16, r.stream);
        }));
  }
  // B=512, H=128, D=512 bf16: 64 MiB of partials. The LSEs are what follows, finite or not.
  const cuda::MergeShape shape{512, 128, 512, DType::bf16};
  for (const int n : {2, 8}) {
    const double piece = static_cast<double>(cuda::packed_piece_bytes(shape, n));
    row(fmt::format("pack_partial n={}", n), 2.0 * kBytes, time_of(one, [&](const Rank& r) {
          const std::size_t i = next();
          cuda::pack_partial(shape, n,
                             {in[i], 128 * 512, 512, reinterpret_cast<float*>(in[i]), 128, 1},
                             out[i], r.stream);
        }));
    row(fmt::format("merge_pieces n={}", n), piece * (n + 1), time_of(one, [&](const Rank& r) {
          const std::size_t i = next();
          cuda::merge_pieces(shape, n, 0, in[i], {}, {out[i], 128 / n * 512, 512}, r.stream);
        }));
    row(fmt::format("correct_partial n={} bf16", n), 2.0 * kBytes, time_of(one, [&](const Rank& r) {
          const std::size_t i = next();
          cuda::correct_partial(shape, n, 1, {in[i], 128 * 512, 512},
                                reinterpret_cast<float*>(in[i]), out[i], 512, 512 * 512,
                                DType::bf16, r.stream);
        }));
    row(fmt::format("reduce_pieces n={} bf16", n), static_cast<double>(kBytes) * (n + 1) / n,
        time_of(one, [&](const Rank& r) {
          const std::size_t i = next();
          cuda::reduce_pieces(in[i], n, kBytes / 2 / n, out[i], kBytes / 2 / n, DType::bf16,
                              r.stream);
        }));
  }
  for (int i = 0; i < kSets; ++i) {
    cudaFree(in[static_cast<std::size_t>(i)]);
    cudaFree(out[static_cast<std::size_t>(i)]);
  }
  free_ranks(one);
}

std::string head_of(int argc, char** argv, const Options& options) {
  cudaDeviceProp device{};
  int driver = 0;
  int runtime = 0;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  std::string command = "own_kernels";  // folders say nothing of what was measured
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    command += " " + (word.starts_with('/') ? word.substr(word.rfind('/') + 1) : word);
  }
  std::string kernels;
  for (const int n : {2, 8}) {
    for (const auto& k : cuda::kernel_report(n)) {
      kernels +=
          fmt::format(R"({}    {{"ranks": {}, "kernel": "{}", "registers": {}, "local_bytes": {}, )"
                      R"("shared_bytes": {}, "threads": {}, "blocks_per_sm": {}}})",
                      kernels.empty() ? "" : ",\n", n, k.name, k.registers, k.local_bytes,
                      k.shared_bytes, k.threads, k.blocks_per_sm);
    }
  }
  fmt::print("{}\n", kernels);
  return fmt::format(
      "  \"gpu\": \"{}\", \"multiprocessors\": {}, \"driver_api\": {}, \"cuda_runtime\": {},\n"
      "  \"command\": \"{}\",\n  \"setting\": \"{} card(s), graph replay of {} calls, median of "
      "{}\",\n  \"kernels\": [\n{}\n  ],\n",
      device.name, device.multiProcessorCount, driver, runtime, command, options.cards, kCalls,
      kReplays, kernels);
}

}  // namespace

int main(int argc, char** argv) {
  // One hardware queue per rank's stream, and all code loaded before any kernel waits.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  constexpr std::string_view kHelp =
      "Times the library's own kernels, N ranks as N streams of this process, and their floors.\n\n"
      "  own_kernels --ranks 2 --cards 2 --json own_kernels.json\n\n"
      "  --ranks N       that many; 2, 4 and 8 by default\n"
      "  --cards C       rank r runs on card r mod C, 1 by default\n"
      "  --max-blocks N  most thread blocks of a launch\n"
      "  --only NAME     floors, collectives, norms, attention, partials or local\n"
      "  --json FILE     where the figures go\n";
  cohort::tools::help_if_asked(argc, argv, kHelp);
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string key = argv[i];
    const auto known = cohort::tools::options_in(kHelp);
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      cohort::tools::refuse(cohort::tools::no_such_option(key, kHelp));
    }
    if (i + 1 == argc) {
      cohort::tools::refuse(key + ": expected a value");
    }
    if (key == "--ranks") {
      options.counts = {std::atoi(argv[i + 1])};
    } else if (key == "--cards") {
      options.cards = std::atoi(argv[i + 1]);
    } else if (key == "--max-blocks") {
      options.max_blocks = std::atoi(argv[i + 1]);
    } else if (key == "--only") {
      options.only = argv[i + 1];
    } else {
      options.json = argv[i + 1];
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    fmt::print("skipped: no CUDA device\n");
    return 77;
  }
  if (options.cards < 1 || options.cards > devices) {
    fmt::print(stderr, "--cards: expected 1 to {}, got {}\n", devices, options.cards);
    return 64;
  }
  const std::string head = head_of(argc, argv, options);
  Report report;
  for (const int n : options.counts) {
    auto ranks = make_ranks(n, options);
    const auto part = [&](const char* name, const auto& time) {
      if (options.only.empty() || options.only == name) {
        time(report, ranks);
      }
    };
    part("floors", time_floors);
    part("collectives", time_collectives);
    part("norms", time_norms);
    part("attention", time_attention);
    part("partials", time_partials);
    free_ranks(ranks);
  }
  check(cudaSetDevice(0), "cudaSetDevice");
  if (options.only.empty() || options.only == "local") {
    time_local(report);
  }
  if (!options.json.empty()) {
    std::FILE* file = std::fopen(options.json.c_str(), "w");
    if (file == nullptr) {
      fmt::print(stderr, "cannot write {}\n", options.json);
      return 1;
    }
    const std::string text = report.text(head);
    std::fwrite(text.data(), 1, text.size(), file);
    std::fclose(file);
  }
  return 0;
}
