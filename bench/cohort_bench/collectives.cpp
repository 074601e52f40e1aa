// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "benches.hpp"
#include "cohort/host/host_stream.hpp"
#include "cohort/host/reduce.hpp"
#include "statistics.hpp"
#include "ways.hpp"

namespace cohort::bench {

namespace {

/// Elements of each rank's share of a payload; whole 16-byte words where the payload is that large.
[[nodiscard]] std::int64_t share_of(std::int64_t bytes, int ranks, DType dtype) {
  const auto width = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t share = bytes / (ranks * width);
  const std::int64_t word = 16 / width;
  return std::max<std::int64_t>(1, share < word ? share : share / word * word);
}

/// Whether the library's own kernels take the call, which is what an `own` row is about.
[[nodiscard]] bool is_carried(Session& session, const Way& way, std::string_view bench,
                              Collective collective, const TensorView& in, const TensorView& out,
                              int dim) {
  if (way.path != Path::own) {
    return true;
  }
  if (session.bed.kind() == BackendKind::host) {
    leave_out(session, bench, way.path, "on the host the transport itself moves the bytes");
    return false;
  }
  const std::string path = way.lane->group().path(collective, in, out, dim);
  if (!path.starts_with("own")) {
    leave_out(session, bench, way.path,
              fmt::format("an inbox has no room for {} bytes", std::max(in.bytes(), out.bytes())));
    return false;
  }
  return true;
}

[[nodiscard]] Case make_case(Session& session, Bench bench, DType dtype, std::int64_t bytes) {
  const int n = session.ranks();
  return {
      .bench = std::string(to_string(bench)),
      .dtype = std::string(to_string(dtype)),
      .bytes = bytes,
      .bus_factor = bench == Bench::all_reduce ? all_reduce_bus_factor(n) : gather_bus_factor(n)};
}

/// Sizes and types of a collective, each with every way that can carry it.
template <class AddVariant>
void for_each_payload(Session& session, Bench bench, const AddVariant& add) {
  const auto found = ways_with_loop(session);
  for (const DType dtype : session.options.dtypes) {
    for (const std::int64_t wanted : session.options.sizes()) {
      add(found, dtype, wanted, bench);
      if (session.runner.stopped()) {
        return;
      }
    }
  }
}

void all_gather_case(Session& session, const std::vector<Way>& found, DType dtype,
                     std::int64_t wanted, Bench bench) {
  const int n = session.ranks();
  const std::int64_t share = share_of(wanted, n, dtype);
  const auto share_bytes = static_cast<std::size_t>(share) * size_of(dtype);
  Case work = make_case(session, bench, dtype, n * static_cast<std::int64_t>(share_bytes));
  for (const Way& way : found) {
    const Buffer in = filled(session, way, {share}, dtype,
                             [&](std::int64_t i) { return input_value(session.rank(), i, n); });
    const Buffer out = allocate(way, {share * n}, dtype);
    if (!is_carried(session, way, work.bench, Collective::all_gather, in.view, out.view, 0)) {
      continue;
    }
    Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
    if (way.is_raw()) {
      variant.call = [library = way.library, in, out, share_bytes] {
        library->all_gather(in.view.data(), out.view.data(), share_bytes);
      };
    } else {
      variant.call = [&session, in, out, group = &way.lane->group()] {
        group->all_gather_into(out.view, in.view, 0, session.bed.stream());
      };
    }
    write_before(session, variant, {in.view});
    variant.poison = [&session, out] { poison(session, out.view); };
    variant.wrong = [&session, out, dtype, share, n] {
      return count_wrong(dtype, fetch(session, out.view), [&](std::int64_t i) {
        return input_value(static_cast<int>(i / share), i % share, n);
      });
    };
    add_modes(session, work, variant);
  }
  session.runner.run(work);
}

/// The sum alone, of shares that are all this rank's own: what a reduce-scatter of the payload
/// cannot do without, whoever carries it. On the host only.
void add_local_sum(Session& session, Case& work, DType dtype, std::int64_t share) {
  const int n = session.ranks();
  const Way local{.path = Path::raw, .library = &session.raw};
  const Buffer in = filled(session, local, {n, share}, dtype, [&](std::int64_t i) {
    return input_value(static_cast<int>(i / share), i % share, n);
  });
  const Buffer out = allocate(local, {share}, dtype);
  std::vector<const std::byte*> shares;
  for (int r = 0; r < n; ++r) {
    shares.push_back(static_cast<const std::byte*>(in.view.slice(0, r, 1).data()));
  }
  const auto sum = [in, out, shares, dtype] {
    host::reduce(dtype, ReduceOp::sum, static_cast<std::byte*>(out.view.data()), shares,
                 out.view.numel());
  };
  Variant variant{.path = "local_sum",
                  .call = [&session, sum] { host::enqueue(session.bed.stream(), sum); }};
  variant.poison = [&session, out] { poison(session, out.view); };
  variant.wrong = [&session, out, dtype, n] {
    return count_wrong(dtype, fetch(session, out.view),
                       [&](std::int64_t i) { return summed_value(i, n); });
  };
  add_modes(session, work, variant);
}

void reduce_scatter_case(Session& session, const std::vector<Way>& found, DType dtype,
                         std::int64_t wanted, Bench bench) {
  const int n = session.ranks();
  const std::int64_t share = share_of(wanted, n, dtype);
  const auto count = static_cast<std::size_t>(share);
  Case work =
      make_case(session, bench, dtype, n * share * static_cast<std::int64_t>(size_of(dtype)));
  for (const Way& way : found) {
    if (way.is_raw() && !way.library->reduces(dtype)) {
      leave_out(session, work.bench, way.path, fmt::format("MPI has no {}", to_string(dtype)));
      continue;
    }
    const Buffer in = filled(session, way, {share * n}, dtype,
                             [&](std::int64_t i) { return input_value(session.rank(), i, n); });
    const Buffer out = allocate(way, {share}, dtype);
    if (!is_carried(session, way, work.bench, Collective::reduce_scatter, in.view, out.view, 0)) {
      continue;
    }
    Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
    if (way.is_raw()) {
      variant.call = [library = way.library, in, out, count, dtype] {
        library->reduce_scatter(in.view.data(), out.view.data(), count, dtype);
      };
    } else {
      variant.call = [&session, in, out, group = &way.lane->group()] {
        group->reduce_scatter_into(out.view, in.view, 0, session.bed.stream());
      };
    }
    write_before(session, variant, {in.view});
    variant.poison = [&session, out] { poison(session, out.view); };
    variant.wrong = [&session, out, dtype, share, n] {
      const std::int64_t first = session.rank() * share;
      return count_wrong(dtype, fetch(session, out.view),
                         [&](std::int64_t i) { return summed_value(first + i, n); });
    };
    add_modes(session, work, variant);
  }
  if (session.bed.kind() == BackendKind::host) {
    add_local_sum(session, work, dtype, share);
  }
  session.runner.run(work);
}

void all_reduce_case(Session& session, const std::vector<Way>& found, DType dtype,
                     std::int64_t wanted, Bench bench) {
  const int n = session.ranks();
  const std::int64_t count = share_of(wanted, n, dtype) * n;
  for (const bool in_place : {false, true}) {
    Case work = make_case(session, bench, dtype, count * static_cast<std::int64_t>(size_of(dtype)));
    if (in_place) {
      if (session.bed.kind() != BackendKind::host || !session.options.has(Mode::eager)) {
        continue;  // a check is of one call, not of a graph's
      }
      work.bench += "_in_place";
    }
    for (const Way& way : found) {
      const Variant variant = all_reduce_variant(session, way, dtype, count, in_place);
      if (!variant.call) {
        continue;
      }
      if (in_place) {
        work.variants.push_back(variant);
      } else {
        add_modes(session, work, variant);
      }
    }
    session.runner.run(work);
  }
}

/// Gathers [outer, rows, inner] along the middle, as a query's heads are.
void all_gather_dim_case(Session& session, const std::vector<Way>& found, DType dtype,
                         std::int64_t wanted, Bench bench) {
  constexpr std::int64_t kOuter = 8;
  constexpr std::int64_t kInner = 32;
  const int n = session.ranks();
  const auto width = static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t rows = std::max<std::int64_t>(1, wanted / (n * kOuter * kInner * width));
  const Dims share{kOuter, rows, kInner};
  Case work = make_case(session, bench, dtype, n * numel(share) * width);
  for (const Way& way : found) {
    const Buffer in = filled(session, way, share, dtype,
                             [&](std::int64_t i) { return input_value(session.rank(), i, n); });
    const Buffer out = allocate(way, {kOuter, rows * n, kInner}, dtype);
    if (!is_carried(session, way, work.bench, Collective::all_gather, in.view, out.view, 1)) {
      continue;
    }
    Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
    if (way.is_raw()) {
      // The bare library gathers along the first dimension only; a copy puts the rows in place.
      const Buffer scratch = allocate(way, {n, kOuter, rows, kInner}, dtype);
      const TensorView target = out.view.reshape({kOuter, n, rows, kInner});
      variant.call = [&session, library = way.library, in, out, scratch, target,
                      bytes = in.view.bytes()] {
        library->all_gather(in.view.data(), scratch.view.data(), bytes);
        session.bed.backend().ops().copy(scratch.view.transpose(0, 1), target,
                                         session.bed.stream());
      };
    } else {
      variant.call = [&session, in, out, group = &way.lane->group()] {
        group->all_gather_into(out.view, in.view, 1, session.bed.stream());
      };
    }
    write_before(session, variant, {in.view});
    variant.poison = [&session, out] { poison(session, out.view); };
    variant.wrong = [&session, out, dtype, rows, n] {
      return count_wrong(dtype, fetch(session, out.view), [&](std::int64_t i) {
        const std::int64_t row = i / kInner % (rows * n);
        const std::int64_t source = i / (kInner * rows * n) * rows + row % rows;
        return input_value(static_cast<int>(row / rows), source * kInner + i % kInner, n);
      });
    };
    add_modes(session, work, variant);
  }
  session.runner.run(work);
}

}  // namespace

Variant all_reduce_variant(Session& session, const Way& way, DType dtype, std::int64_t count,
                           bool in_place) {
  const int n = session.ranks();
  Variant variant{.path = std::string(to_string(way.path)), .lane = way.lane};
  if (way.is_raw() && !way.library->reduces(dtype)) {
    leave_out(session, "all_reduce", way.path, fmt::format("MPI has no {}", to_string(dtype)));
    return variant;
  }
  const auto value = [n, rank = session.rank()](std::int64_t i) { return input_value(rank, i, n); };
  const Buffer in = filled(session, way, {count}, dtype, value);
  const Buffer out = in_place ? in : allocate(way, {count}, dtype);
  if (!is_carried(session, way, "all_reduce", Collective::all_reduce, in.view, out.view, 0)) {
    return variant;
  }
  if (way.is_raw()) {
    variant.call = [library = way.library, in, out, count, dtype] {
      library->all_reduce(in.view.data(), out.view.data(), static_cast<std::size_t>(count), dtype);
    };
  } else {
    variant.call = [&session, in, out, group = &way.lane->group()] {
      group->all_reduce_into(out.view, in.view, session.bed.stream());
    };
  }
  write_before(session, variant, {in.view});
  variant.poison = [&session, out, in_place, value] {
    if (in_place) {  // a sum is the next call's input: it grows, to infinity, until it is put back
      session.bed.put(out.view.data(), encode(out.view.dtype(), out.view.numel(), value));
    } else {
      poison(session, out.view);
    }
  };
  variant.wrong = [&session, out, dtype, n] {
    return count_wrong(dtype, fetch(session, out.view),
                       [&](std::int64_t i) { return summed_value(i, n); });
  };
  return variant;
}

void bench_all_gather(Session& session) {
  for_each_payload(session, Bench::all_gather,
                   [&](const auto&... arguments) { all_gather_case(session, arguments...); });
}
void bench_reduce_scatter(Session& session) {
  for_each_payload(session, Bench::reduce_scatter,
                   [&](const auto&... arguments) { reduce_scatter_case(session, arguments...); });
}
void bench_all_reduce(Session& session) {
  for_each_payload(session, Bench::all_reduce,
                   [&](const auto&... arguments) { all_reduce_case(session, arguments...); });
}
void bench_all_gather_dim(Session& session) {
  for_each_payload(session, Bench::all_gather_dim,
                   [&](const auto&... arguments) { all_gather_dim_case(session, arguments...); });
}

}  // namespace cohort::bench
