// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cohort/host/host_peer_kernels.hpp>
#include <cstring>
#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

struct Shape {
  std::int64_t batch, heads, dim;  // heads of one rank
};

/// Partial attentions that differ by rank; some rows of some ranks are empty and hold NaN.
void fill_partial(const TensorView& out, const TensorView& lse, int rank) {
  std::int64_t row = 0;
  for_each(lse, [&](const auto&, const std::byte* address) {
    const bool empty = (row + rank) % 5 == 0 || row % 11 == 3;
    const float value = empty ? -std::numeric_limits<float>::infinity()
                              : static_cast<float>((row * 3 + rank * 7) % 13) / 4.0F - 1.0F;
    std::memcpy(const_cast<std::byte*>(address), &value, sizeof(value));
    ++row;
  });
  std::int64_t flat = 0;
  const std::int64_t dim = out.shape()[2];
  for_each(out, [&](const auto&, const std::byte* address) {
    const std::int64_t at = flat++ / dim;
    const bool empty = (at + rank) % 5 == 0 || at % 11 == 3;
    auto* to = const_cast<std::byte*>(address);
    if (empty) {
      std::memset(to, 0xff, size_of(out.dtype()));  // NaN in every float type
    } else {
      store(out.dtype(), to, value_at(rank, flat));
    }
  });
}

/// One rank's merge by packing, exchanging and merging: the other plan, through other code.
void merge_packed(Site& site, ControlPlane& plane, const MergeArguments& arguments) {
  auto& ops = site.backend->ops();
  const auto& out = arguments.partials.out;
  const auto piece =
      dcp::packed_piece(arguments.rows.widest(), 1, out.shape()[3], size_of(out.dtype()));
  const Dims pieces{plane.size(), static_cast<std::int64_t>(piece.bytes)};
  const auto mine = site.backend->allocate(pieces, DType::u8, {});
  const auto theirs = site.backend->allocate(pieces, DType::u8, {});
  std::memset(mine.data(), 0, mine.bytes());
  ops.pack_partial(arguments, mine, {});
  site.transport->all_to_all(mine, theirs, {});
  ops.merge_pieces(theirs, arguments, plane.rank(), {});
}

void check_merge(Site& site, ControlPlane& plane, const Shape& shape, DType dtype, LseBase base,
                 bool heads_first) {
  const int n = plane.size();
  const Dims all{shape.batch, shape.heads * n, shape.dim};
  TensorView out =
      heads_first
          ? site.tensor(Dims{all[1], all[0], all[2]}, dtype, Form::contiguous).transpose(0, 1)
          : site.tensor(all, dtype, Form::contiguous);
  const auto lse = site.tensor(Dims{all[0], all[1]}, DType::f32,
                               heads_first ? Form::transposed : Form::contiguous);
  fill_partial(out, lse, plane.rank());
  const Dims own{shape.batch, shape.heads, shape.dim};
  const auto merged = site.tensor(own, dtype, Form::contiguous);
  const auto expected = site.tensor(own, dtype, Form::contiguous);
  const auto merged_lse = site.tensor(Dims{own[0], own[1]}, DType::f32, Form::contiguous);
  const auto expected_lse = site.tensor(Dims{own[0], own[1]}, DType::f32, Form::contiguous);
  auto& kernels = *site.transport->peer_kernels();
  const MergeArguments arguments = by_head(n, out, lse, merged, merged_lse, base);
  check(kernels.merge_obstacle(arguments).empty(), "no obstacle");
  kernels.merge_attention(arguments, {});
  merge_packed(site, plane, by_head(n, out, lse, expected, expected_lse, base));
  check(std::memcmp(merged.data(), expected.data(), merged.bytes()) == 0, "bits of packed");
  check(std::memcmp(merged_lse.data(), expected_lse.data(), merged_lse.bytes()) == 0, "lse");
  for_each(merged, [&](const auto&, const std::byte* address) {
    check(load(dtype, address) > -1000 && load(dtype, address) < 1000, "no NaN came through");
  });
}

void check_gather(Site& site, ControlPlane& plane, std::int64_t batch, std::int64_t heads,
                  std::int64_t nope, std::int64_t pe, DType dtype, Form form) {
  const auto q_nope = site.tensor(Dims{batch, heads, nope}, dtype, form);
  const auto q_pe = site.tensor(Dims{batch, heads, pe}, dtype, form);
  const auto q = site.tensor(Dims{batch, heads * plane.size(), nope + pe}, dtype, form);
  fill(q_nope, plane.rank());
  fill(q_pe, plane.rank() + 100);
  auto& kernels = *site.transport->peer_kernels();
  check(kernels.gather_obstacle(q_nope, q_pe).empty(), "no obstacle");
  kernels.gather_query(q_nope, q_pe, q, {q.dtype(), q.dtype()}, {});
  for_each(q, [&](const Dims& index, const std::byte* address) {
    const auto r = static_cast<int>(index[1] / heads);
    const std::int64_t row = index[0] * heads + index[1] % heads;
    const std::int64_t expected = index[2] < nope ? value_at(r, row * nope + index[2])
                                                  : value_at(r + 100, row * pe + index[2] - nope);
    check_element(dtype, address, expected, "gather_query");
  });
}

}  // namespace

TEST_CASE("one_kernel has the bits of packed", "[host]") {
  const int n = GENERATE(2, 3, 8);
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  const bool small = GENERATE(false, true);
  run_ranks(n, [&](ControlPlane& plane) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const LseBase base : {LseBase::e, LseBase::two}) {
        Site site(plane, small ? HostOptions{.slot_bytes = 8192} : HostOptions{}, memory);
        for (const Shape& shape :
             {Shape{1, 1, 64}, Shape{5, 3, 20}, Shape{16, 2, 128}, Shape{0, 2, 16}}) {
          check_merge(site, plane, shape, dtype, base, false);
          check_merge(site, plane, shape, dtype, base, true);
        }
      }
    }
  });
}

TEST_CASE("shapes larger than a slot are merged in stretches", "[host]") {
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  run_ranks(2, [&](ControlPlane& plane) {
    Site site(plane, {}, memory, std::size_t{16} << 20);
    check_merge(site, plane, {12, 64, 512}, DType::bf16, LseBase::e, false);
  });
}

TEST_CASE("a row that no slot can hold is an obstacle, not a hang", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, small_slots(), Memory::ordinary);
    const auto out = site.tensor(Dims{1, 2, 1024}, DType::f32, Form::contiguous);
    const auto lse = site.tensor(Dims{1, 2}, DType::f32, Form::contiguous);
    const auto merged = site.tensor(Dims{1, 1, 1024}, DType::f32, Form::contiguous);
    auto& kernels = *site.transport->peer_kernels();
    check(kernels.merge_obstacle(by_head(2, out, lse, merged)).find("row of 4100 bytes") !=
              std::string::npos,
          "the obstacle names the row");
    check_throws<UsageError>([&] { kernels.merge_attention(by_head(2, out, lse, merged), {}); },
                             "row");
    site.transport->barrier({});
  });
}

TEST_CASE("queries are gathered into their final layout", "[host]") {
  const int n = GENERATE(2, 3);
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  const bool small = GENERATE(false, true);
  run_ranks(n, [&](ControlPlane& plane) {
    Site site(plane, small ? small_slots() : HostOptions{}, memory);
    for (const Form form : kForms) {
      check_gather(site, plane, 1, 1, 8, 4, DType::bf16, form);
      check_gather(site, plane, 5, 3, 64, 16, DType::f32, form);
      check_gather(site, plane, 0, 3, 64, 16, DType::f32, form);
    }
  });
}

TEST_CASE("a captured merge is replayed on what the tensors then hold", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::window);
    HostStream stream;
    const auto out = site.tensor(Dims{4, 2, 32}, DType::f32, Form::contiguous);
    const auto lse = site.tensor(Dims{4, 2}, DType::f32, Form::contiguous);
    const auto merged = site.tensor(Dims{4, 1, 32}, DType::f32, Form::contiguous);
    const auto expected = site.tensor(Dims{4, 1, 32}, DType::f32, Form::contiguous);
    stream.begin_capture();
    {
      const TensorView no_longer_there = site.tensor(Dims{4, 1}, DType::f32, Form::contiguous);
      site.transport->peer_kernels()->merge_attention(by_head(2, out, lse, merged, no_longer_there),
                                                      stream);
    }
    const auto graph = stream.end_capture();
    for (int round = 0; round < 3; ++round) {
      fill_partial(out, lse, plane.rank() + round);
      graph->launch(stream);
      merge_packed(site, plane, by_head(2, out, lse, expected));
      check(std::memcmp(merged.data(), expected.data(), merged.bytes()) == 0, "replayed bits");
    }
  });
}
