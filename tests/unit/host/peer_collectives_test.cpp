// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/peer_collectives.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("collectives in shared memory are exact", "[host]") {
  using Shapes = std::vector<std::vector<std::int64_t>>;
  const int n = GENERATE(1, 2, 3, 4, 8);
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  const bool small = GENERATE(false, true);
  // The largest takes several of the small slots, and its parts are read in windows.
  const Shapes shapes =
      n < 8 ? Shapes{{8}, {3, 5}, {8, 16, 32}, {3, 5, 7}, {2, 3, 4, 5}, {2, 3, 2, 3, 2}}
            : Shapes{{3, 5, 7}, {4, 16, 24}};
  run_ranks(n, [&](ControlPlane& plane) {
    for (const auto& shape : shapes) {
      for (const Form form : kForms) {
        check_shape(plane, small ? small_slots() : HostOptions{}, memory, shape, form);
      }
    }
  });
}

TEST_CASE("tensors larger than the slots pass in pieces", "[host]") {
  const int n = GENERATE(2, 3);
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  run_ranks(n, [&](ControlPlane& plane) {
    const Dims shape{4, 1024, 512};  // 8 MiB of f32, 2 MiB of i8
    Site site(plane, {}, memory, std::size_t{64} << 20);
    check_all_gather(site, plane, shape, 1, equal_sizes(n, 300), DType::i8, Form::contiguous);
    check_reduce_scatter(site, plane, Dims{3 * 70001}, 0, equal_sizes(n, 70001), DType::f32,
                         ReduceOp::sum, Form::contiguous);
    check_reduce_scatter(site, plane, Dims{7, 20000}, 1, ragged_sizes(n), DType::f32, ReduceOp::max,
                         Form::transposed);
    check_all_reduce(site, plane, Dims{333, 1001}, DType::f32, ReduceOp::sum, Form::contiguous,
                     true);
    check_all_reduce(site, plane, Dims{333, 1001}, DType::f32, ReduceOp::sum, Form::transposed,
                     false);
    check_broadcast(site, plane, Dims{700, 1000}, DType::u8, Form::contiguous, 1);
    check_all_to_all(site, plane, Dims{300, 1000}, DType::u8, Form::contiguous);
    if (n == 2) {
      check_ring(site, plane, Dims{300, 1001}, DType::f32, Form::transposed);
    }
  });
}

TEST_CASE("8-bit floats are moved as bytes", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    for (const DType dtype : {DType::f8_e4m3, DType::f8_e5m2}) {
      Site site(plane, {}, Memory::mixed);
      check_all_gather(site, plane, Dims{4, 8192}, 0, equal_sizes(3, 4), dtype, Form::contiguous);
      check_all_to_all(site, plane, Dims{4, 9}, dtype, Form::transposed);
      check_broadcast(site, plane, Dims{77}, dtype, Form::contiguous, 1);
      const auto tensor = site.tensor(Dims{4}, dtype, Form::contiguous);
      check_throws<UsageError>(
          [&] { site.transport->all_reduce(tensor, tensor, ReduceOp::sum, {}); }, "dtype");
    }
  });
}

TEST_CASE("an all-gather and a reduce-scatter may be in place", "[host]") {
  const Memory memory = GENERATE(Memory::ordinary, Memory::window, Memory::mixed);
  run_ranks(3, [&](ControlPlane& plane) {
    Site site(plane, {}, memory);
    for (const std::int64_t each : {7, 5000, 200000}) {
      const auto all = site.tensor(Dims{3 * each}, DType::i8, Form::contiguous);
      const auto mine = all.slice(0, plane.rank() * each, each);
      fill(mine, plane.rank());
      site.transport->all_gather(mine, all, 0, equal_sizes(3, each), {});
      for (std::int64_t i = 0; i < 3 * each; ++i) {
        check_equal(load(DType::i8, all.slice(0, i, 1).data()),
                    value_at(static_cast<int>(i / each), i % each), "in place");
      }
      site.transport->reduce_scatter(all, mine, 0, equal_sizes(3, each), ReduceOp::sum, {});
      for (std::int64_t i = 0; i < each; ++i) {
        check_equal(load(DType::i8, mine.slice(0, i, 1).data()), 3 * value_at(plane.rank(), i),
                    "in place");
      }
    }
  });
}

TEST_CASE("an input may be written again as soon as the call returns", "[host]") {
  const int n = GENERATE(2, 3);
  run_ranks(n, [&](ControlPlane& plane) {
    const std::int64_t each = 100'000;
    Site site(plane, {}, Memory::window, std::size_t{16} << 20);
    const auto in = site.tensor(Dims{n * each}, DType::f32, Form::contiguous);
    const auto out = site.tensor(Dims{n * each}, DType::f32, Form::contiguous);
    const auto sizes = equal_sizes(n, each);
    auto* values = in.data_as<float>();
    const auto expect = [&](std::int64_t count, float value, std::string_view what) {
      const auto* found = out.data_as<float>();
      for (std::int64_t i = 0; i < count; ++i) {
        check_equal(found[i], value, what);
      }
    };
    const auto round_of = [&](auto&& call) {
      std::fill_n(values, n * each, 1.0F);
      call();
      std::fill_n(values, n * each, -1000.0F);  // while slower ranks may still be reading
    };
    const auto sum = static_cast<float>(n);
    for (int round = 0; round < 30; ++round) {
      round_of([&] { site.transport->all_gather(in.slice(0, 0, each), out, 0, sizes, {}); });
      expect(n * each, 1, "all_gather");
      round_of([&] {
        site.transport->reduce_scatter(in, out.slice(0, 0, each), 0, sizes, ReduceOp::sum, {});
      });
      expect(each, sum, "reduce_scatter");
      round_of([&] { site.transport->all_to_all(in, out, {}); });
      expect(n * each, 1, "all_to_all");
      round_of([&] { site.transport->all_reduce(in, out, ReduceOp::sum, {}); });
      expect(n * each, sum, "all_reduce");
    }
  });
}

TEST_CASE("a rank may go as soon as its call returns", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    constexpr std::int64_t kLong = 512 * 1024;  // two pieces
    for (int round = 0; round < 10; ++round) {
      Site site(plane, {}, Memory::mixed);  // rank 0 shows its window, rank 1 its slots
      const std::vector<std::int64_t> sizes{4096, kLong, 4096};
      const auto mine = site.tensor(Dims{sizes[static_cast<std::size_t>(plane.rank())]}, DType::u8,
                                    Form::contiguous);
      fill(mine, plane.rank());
      // Rank 2 is still writing when rank 0, which it has read, has gone.
      const std::int64_t stride = plane.rank() == 2 ? 16 : 1;
      std::vector<std::byte> memory(static_cast<std::size_t>((kLong + 8192) * stride));
      const TensorView out(memory.data(), DType::u8, Dims{kLong + 8192}, Dims{stride});
      plane.barrier();
      site.transport->all_gather(mine, out, 0, sizes, {});
      if (plane.rank() == 0) {
        site.window.reset();
        site.transport.reset();
      }
      check_element(DType::u8, memory.data() + stride * 4095, value_at(0, 4095), "rank 0's");
      check_element(DType::u8, memory.data() + stride * (4095 + kLong), value_at(1, kLong - 1),
                    "rank 1's");
      plane.barrier();
    }
  });
}

TEST_CASE("small messages do not wait for their receivers", "[host]") {
  run_ranks(4, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    const auto ring = [&](std::int64_t count) {
      const auto mine = site.tensor(Dims{count}, DType::u8, Form::contiguous);
      const auto theirs = site.tensor(Dims{count}, DType::u8, Form::contiguous);
      fill(mine, plane.rank());
      site.transport->send(mine, (plane.rank() + 1) % 4, {});  // all send first
      site.transport->recv(theirs, (plane.rank() + 3) % 4, {});
      for (std::int64_t i = 0; i < count; ++i) {
        check_element(DType::u8, static_cast<const std::byte*>(theirs.data()) + i,
                      value_at((plane.rank() + 3) % 4, i), "ring");
      }
    };
    for (const std::int64_t count : {0, 1, 1000, 256 * 1024}) {
      ring(count);
    }
  });
}

TEST_CASE("messages of another type or shape are refused, and the channel works on", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    const auto words = site.tensor(Dims{2, 3}, DType::i32, Form::contiguous);
    const auto floats = site.tensor(Dims{2, 3}, DType::f32, Form::contiguous);
    fill(floats, plane.rank());
    if (plane.rank() == 0) {
      for (int i = 0; i < 4; ++i) {
        site.transport->send(floats, 1, {});
      }
      return;
    }
    const std::int32_t before = words.data_as<std::int32_t>()[5];
    check_throws<SymmetryError>([&] { site.transport->recv(words, 0, {}); }, "rank 0 sent 24",
                                "of f32", "expected 24 bytes of i32");
    check_equal(words.data_as<std::int32_t>()[5], before, "what was there");
    site.transport->recv(floats.reshape({3, 2}), 0, {});  // shapes count where it is asked for
    site.transport->compare_shapes();
    check_throws<SymmetryError>(
        [&] {
          site.transport->recv(floats.reshape({3, 2}), 0, {});
        },
        "rank 0", "another shape");
    fill(floats, 1);
    site.transport->recv(floats, 0, {});
    check_element(DType::f32, static_cast<const std::byte*>(floats.data()) + 20, value_at(0, 5),
                  "recv");
  });
}

TEST_CASE("messages of another size are refused, and the channel works on", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    const auto large = site.tensor(Dims{300000}, DType::u8, Form::contiguous);
    const auto small = site.tensor(Dims{3}, DType::u8, Form::contiguous);
    if (plane.rank() == 0) {
      fill(small, 0);
      site.transport->send(large, 1, {});
      site.transport->send(small, 1, {});
    } else {
      check_throws<SymmetryError>([&] { site.transport->recv(small, 0, {}); }, "300000 bytes",
                                  "expected 3");
      site.transport->recv(small, 0, {});
      check_element(DType::u8, static_cast<const std::byte*>(small.data()) + 1, value_at(0, 1),
                    "message after a refused one");
    }
  });
}
