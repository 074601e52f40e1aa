// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cohort/cohort.hpp>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "support/divergence_checks.hpp"
#include "support/group_tensors.hpp"

/// \file
/// The all-reduce with residual and RMS norm, as bodies that every rank runs.

namespace cohort::test {

/// Elements as numbers.
[[nodiscard]] inline std::vector<double> numbers_of(const ConstTensorView& view) {
  std::vector<double> numbers;
  read_elements(view, [&](std::int64_t, const std::byte* address) {
    if (view.dtype() == DType::f8_e4m3) {
      numbers.push_back(
          static_cast<double>(f8_e4m3_to_float(std::to_integer<std::uint8_t>(*address))));
      return;
    }
    with_type(view.dtype(), [&](auto type) {
      using T = decltype(type);
      T x;
      std::memcpy(&x, address, sizeof(x));
      numbers.push_back(static_cast<double>(static_cast<float>(x)));
    });
  });
  return numbers;
}

inline void fill_numbers(const TensorView& view, const std::vector<float>& numbers) {
  with_type(view.dtype(), [&](auto type) {
    using T = decltype(type);
    write_elements(view, [&](std::int64_t flat, std::byte* address) {
      const T x = static_cast<T>(numbers[u(flat)]);
      std::memcpy(address, &x, sizeof(x));
    });
  });
}

/// Half a unit in the last place, at most, over the number.
[[nodiscard]] inline double roundoff_of(DType dtype) {
  return dtype == DType::f8_e4m3 ? 0x1p-4
         : dtype == DType::bf16  ? 0x1p-8
         : dtype == DType::f16   ? 0x1p-11
                                 : 0x1p-24;
}

/// One call of a group.
struct NormCase {
  std::int64_t rows = 3;
  std::int64_t hidden = 40;
  DType dtype = DType::bf16;
  bool fp8 = false;
  Memory memory = Memory::arena;
  unsigned seed = 1;

  [[nodiscard]] DType out_dtype() const { return fp8 ? DType::f8_e4m3 : dtype; }
  [[nodiscard]] Dims shape() const { return {rows, hidden}; }
};

/// A rank's tensors of one call.
struct NormTensors {
  TensorView x;
  TensorView residual;
  TensorView weight;
  TensorView scale;
  TensorView out;

  NormTensors(Site& site, const NormCase& c)
      : NormTensors(c, [&](const Dims& shape, DType dtype) { return site.tensor(shape, dtype); }) {}
  /// @param make  `make(shape, dtype)` gives memory.
  template <class Make>
  NormTensors(const NormCase& c, const Make& make)
      : x(make(c.shape(), c.dtype)),
        residual(make(c.shape(), c.dtype)),
        weight(make({c.hidden}, c.dtype)),
        scale(make({1}, DType::f32)),
        out(make(c.shape(), c.out_dtype())) {}

  [[nodiscard]] ResidualNorm norm(float epsilon = 1e-5F) const {
    ResidualNorm all{.residual = residual, .weight = weight, .epsilon = epsilon};
    if (out.dtype() == DType::f8_e4m3) {
      all.scale = scale;
    }
    return all;
  }
};

/// Sums that make the new residual 2 or -2 everywhere, whose root mean square is 2: the answer is
/// exact in every type.
inline void fill_exact(GroupCoordinator& group, const NormCase& c, const NormTensors& t) {
  fill(t.x, group.rank() + static_cast<int>(c.seed));
  fill_with(t.weight, [](std::int64_t i) { return 1 + i % 7; });
  fill_numbers(t.scale, {0.5F});
  fill_with(t.residual, [&](std::int64_t flat) {
    std::int64_t sum = 0;
    for (int r = 0; r < group.size(); ++r) {
      sum += value_at(r + static_cast<int>(c.seed), flat);
    }
    return ((flat + static_cast<std::int64_t>(c.seed)) % 3 == 0 ? -2 : 2) - sum;
  });
  fill_bytes(t.out, 0x5a);
}
inline void check_exact(const NormCase& c, const TensorView& residual, const TensorView& out) {
  const auto target = [&](std::int64_t flat) {
    return (flat + static_cast<std::int64_t>(c.seed)) % 3 == 0 ? -2 : 2;
  };
  check_values(residual, "the residual", target);
  const auto got = numbers_of(out);
  for (std::int64_t i = 0; i < out.numel(); ++i) {
    const auto wanted = static_cast<double>(target(i) / 2 * (1 + i % c.hidden % 7));
    check(got[u(i)] == (c.fp8 ? 2 * wanted : wanted),
          fmt::format("element {} of {} is {}, not {}", i, to_string(out), got[u(i)], wanted));
  }
}

inline void check_exact_norm(GroupCoordinator& group, const NormCase& c, StreamRef stream = {}) {
  Site site(group, c.memory, stream);
  const NormTensors t(site, c);
  fill_exact(group, c, t);
  group.all_reduce_rms_norm_into(t.out, t.x, t.norm(0.0F), stream);
  check_exact(c, t.residual, t.out);
  fill_exact(group, c, t);
  const Tensor returned = group.all_reduce_rms_norm(t.x, t.norm(0.0F), stream);
  check(returned.dtype() == c.out_dtype() && returned.shape() == c.shape(), "what is returned");
  check_exact(c, t.residual, returned);
}

/// Random rows: the residual has the bits of an all-reduce and an addition, rows are near what fp64
/// gives of it, and all ranks have the same bits.
inline void check_random_norm(GroupCoordinator& group, const NormCase& c) {
  Site site(group, c.memory);
  const NormTensors t(site, c);
  std::mt19937 random(c.seed);
  const auto uniform = [&](std::int64_t count) {
    std::vector<float> numbers(u(count));
    for (float& number : numbers) {
      number = static_cast<float>(random() % 65536) / 16384.0F - 2.0F;
    }
    return numbers;
  };
  fill_numbers(t.residual, uniform(c.rows * c.hidden));
  fill_numbers(t.weight, uniform(c.hidden));
  constexpr float kScale = 0.013F;
  fill_numbers(t.scale, {kScale});
  random.seed(c.seed * 100 + static_cast<unsigned>(group.rank()));
  fill_numbers(t.x, uniform(c.rows * c.hidden));

  const auto sum = site.tensor(c.shape(), c.dtype);
  group.all_reduce_into(sum, t.x);
  const auto sums = numbers_of(sum);
  auto wanted = numbers_of(t.residual);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const float added = static_cast<float>(sums[i]) + static_cast<float>(wanted[i]);
    with_type(c.dtype, [&](auto type) {
      wanted[i] = static_cast<double>(static_cast<float>(static_cast<decltype(type)>(added)));
    });
  }
  const float epsilon = 0.25F;
  group.all_reduce_rms_norm_into(t.out, t.x, t.norm(epsilon));
  check(numbers_of(t.residual) == wanted, "the residual has the bits of an all-reduce and a sum");

  const auto got = numbers_of(t.out);
  const auto weights = numbers_of(t.weight);
  for (std::int64_t row = 0; row < c.rows; ++row) {
    double squares = 0;
    for (std::int64_t i = 0; i < c.hidden; ++i) {
      squares += wanted[u(row * c.hidden + i)] * wanted[u(row * c.hidden + i)];
    }
    const double factor =
        1 / std::sqrt(squares / static_cast<double>(c.hidden) + static_cast<double>(epsilon));
    for (std::int64_t i = 0; i < c.hidden; ++i) {
      double exact = wanted[u(row * c.hidden + i)] * factor * weights[u(i)];
      if (c.fp8) {
        exact = std::clamp(exact / static_cast<double>(kScale), -448.0, 448.0);
      }
      const double error = std::abs(got[u(row * c.hidden + i)] - exact);
      check(
          error <= std::abs(exact) * (roundoff_of(c.out_dtype()) + 0x1p-18) +
                       (c.fp8 ? 0x1p-10 : 0x1p-24),
          fmt::format("row {} column {}: {} beside {}", row, i, got[u(row * c.hidden + i)], exact));
    }
  }
  std::vector<std::byte> mine(t.out.bytes());
  std::memcpy(mine.data(), HostImage(t.out).view().data(), mine.size());
  for (const auto& theirs : group.control().all_gather(mine)) {
    check(theirs == mine, "all ranks have the same bits");
  }
}

/// Every type, memory and way of a state.
inline void check_norms(ControlPlane& world) {
  for (const bool map_peers : {true, false}) {
    auto state =
        make_state(world, {.tp = world.size()},
                   {.backend = host_backend({.window_bytes = 2048, .map_peers = map_peers})});
    auto& group = state.tp();
    unsigned seed = 0;
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
      for (const bool fp8 : {false, true}) {
        for (const std::int64_t hidden : {1, 16, 37, 1000}) {
          const NormCase c{.rows = 1 + seed % 4,
                           .hidden = hidden,
                           .dtype = dtype,
                           .fp8 = fp8,
                           .memory = seed % 2 == 0 ? Memory::arena : Memory::mixed,
                           .seed = ++seed};
          check_exact_norm(group, c);
          check_random_norm(group, c);
        }
      }
    }
    check_exact_norm(group, {.rows = 0});
  }
}

/// For a graph with norms as `NormCase` has them; nothing grows while it is captured.
inline void make_room_for_norms(GroupCoordinator& group) {
  const NormCase c;
  group.reserve_for_calls(std::vector<CollectiveShape>{
      {.collective = Collective::all_reduce_rms_norm, .shape = c.shape(), .dtype = c.dtype}});
}

/// Replays add to what the residual holds then.
inline void check_captured_norms(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size()});
  auto& group = state.tp();
  HostStream stream;
  make_room_for_norms(group);
  Site site(group, Memory::ordinary);
  const NormCase cases[] = {{}, {.fp8 = true}};
  const std::vector<NormTensors> tensors{{site, cases[0]}, {site, cases[1]}};
  group.freeze();
  for (const std::size_t i : {0U, 1U}) {
    const NormTensors& t = tensors[i];
    NormCase c = cases[i];
    auto graph = state.capture(
        stream, [&] { group.all_reduce_rms_norm_into(t.out, t.x, t.norm(0.0F), stream); });
    for (unsigned replay = 2; replay < 5; ++replay) {
      c.seed = replay;
      fill_exact(group, c, t);
      graph.launch(stream);
      check_exact(c, t.residual, t.out);
    }
  }
}

/// Not in the arena, whose growth the ranks would agree on.
[[nodiscard]] inline NormTensors ordinary_norm(GroupCoordinator& group, const NormCase& c,
                                               std::vector<Tensor>& kept) {
  return {c, [&](const Dims& shape, DType dtype) {
            return kept.emplace_back(group.backend().allocate(shape, dtype, {})).view();
          }};
}

/// Whatever ranks have to agree on, the last one has otherwise: every rank is told which one that
/// is, and neither residual nor output of any has changed.
inline void check_norms_that_differ(ControlPlane& world) {
  const int last = world.size() - 1;
  const NormCase common{.rows = 4, .hidden = 6};
  const auto with = [&](const auto& change) {
    NormCase c = common;
    change(c);
    return c;
  };
  const NormCase other_shape = with([](NormCase& c) { c.rows = 2, c.hidden = 12; });
  const struct {
    std::string_view what;
    NormCase c;
    float epsilon = 1e-5F;
    bool normed = true;
  } cases[] = {{"more rows", with([](NormCase& c) { c.rows = 5; })},
               {"no rows", with([](NormCase& c) { c.rows = 0; })},
               {"longer rows", with([](NormCase& c) { c.hidden = 7; })},
               {"as many elements in fewer rows", other_shape},
               {"another type", with([](NormCase& c) { c.dtype = DType::f16; })},
               {"another type of output", with([](NormCase& c) { c.fp8 = true; })},
               {"another epsilon", common, 1e-6F},
               {"no norm", common, 1e-5F, false}};
  for (const bool map_peers : {true, false}) {
    for (const auto& differing : cases) {
      auto state =
          make_state(world, {.tp = world.size()},
                     {.backend = host_backend({.window_bytes = 2048, .map_peers = map_peers})});
      auto& group = state.tp();
      const bool differs = group.rank() == last;
      std::vector<Tensor> kept;
      const NormTensors t = ordinary_norm(group, differs ? differing.c : common, kept);
      for (const TensorView& written : {t.residual, t.out}) {
        fill_bytes(written, 0x5a);
      }
      check_blames(
          last,
          [&] {
            if (differs && !differing.normed) {
              group.all_reduce_into(t.out, t.x);
            } else {
              group.all_reduce_rms_norm_into(t.out, t.x,
                                             t.norm(differs ? differing.epsilon : 1e-5F));
            }
          },
          "the ranks make different calls");
      for (const TensorView& written : {t.residual, t.out}) {
        std::vector<std::byte> bytes(written.bytes());
        if (!bytes.empty()) {  // a tensor without elements may lie nowhere
          std::memcpy(bytes.data(), written.data(), bytes.size());
        }
        check(bytes == std::vector<std::byte>(bytes.size(), std::byte{0x5a}),
              fmt::format("{}: nothing was written", differing.what));
      }
    }
  }
}

/// A graph's norm whose output has another type on the last rank.
inline void check_captured_norms_that_differ(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size()});
  auto& group = state.tp();
  HostStream stream;
  make_room_for_norms(group);
  const int last = group.size() - 1;
  const NormCase c{.fp8 = group.rank() == last};
  std::vector<Tensor> kept;
  const NormTensors t = ordinary_norm(group, c, kept);
  auto graph =
      state.capture(stream, [&] { group.all_reduce_rms_norm_into(t.out, t.x, t.norm(), stream); });
  check_blames(
      last, [&] { graph.launch(stream); }, "the ranks make different calls");
}

/// A sum lies in a window where the output does and is of its type. Each of two ranks sums all of
/// what fits a slot.
inline void check_norm_paths(ControlPlane& world) {
  for (const bool map_peers : {true, false}) {
    auto state =
        make_state(world, {.tp = world.size()},
                   {.backend = host_backend({.window_bytes = 2048, .map_peers = map_peers}),
                    .symmetric = {.enabled = true, .selection = Selection::all()}});
    auto& group = state.tp();
    for (const Memory memory : {Memory::arena, Memory::ordinary}) {
      for (const std::int64_t hidden : {40, 4096}) {
        for (const bool fp8 : {false, true}) {
          const NormCase c{.rows = 3, .hidden = hidden, .fp8 = fp8, .memory = memory};
          Site site(group, memory);
          const NormTensors t(site, c);
          const auto got = group.path(Collective::all_reduce_rms_norm, t.x, t.out);
          const bool direct = memory == Memory::arena && hidden == 4096 && !fp8 && group.size() > 2;
          check(got == (group.size() == 1 ? "single rank"
                        : !map_peers      ? "exchange"
                        : direct          ? "direct"
                                          : "slot"),
                got);
        }
      }
    }
  }
}

/// What is wrong is named before anything moves, and the group works on.
inline void check_norm_errors(ControlPlane& world) {
  auto state = make_state(world, {.tp = world.size()});
  auto& group = state.tp();
  const NormCase c{.rows = 4, .hidden = 6, .dtype = DType::f32};
  Site site(group, Memory::arena);
  const NormTensors t(site, c);
  const auto fp8 = site.tensor(c.shape(), DType::f8_e4m3);
  const auto half = site.tensor(c.shape(), DType::f16);
  const auto integers = site.tensor(c.shape(), DType::i32);
  const auto wide = site.tensor({4, 12}, DType::f32);
  const auto refused = [&](const TensorView& out, const TensorView& x, const ResidualNorm& norm,
                           std::string_view argument, std::string_view part) {
    check_throws<UsageError>([&] { group.all_reduce_rms_norm_into(out, x, norm); },
                             "all_reduce_rms_norm", argument, part);
  };
  const auto with = [&](const auto& change) {
    ResidualNorm norm = t.norm();
    change(norm);
    return norm;
  };
  const TensorView elsewhere(t.x.data(), DType::f32, c.shape(), {DeviceKind::cuda, 0});
  refused(t.out, elsewhere, t.norm(), "x", "cuda:0");
  refused(t.out, integers, t.norm(), "x", "f32, f16 or bf16");
  refused(t.out, wide.slice(1, 0, 6), t.norm(), "x", "without gaps");
  refused(t.out, TensorView(t.x.data(), DType::f32, {24}), t.norm(), "x", "[B, hidden]");
  refused(t.out, TensorView(t.x.data(), DType::f32, {4, 0}), t.norm(), "x", "hidden >= 1");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.residual = half; }), "residual", "got f16");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.residual = wide; }), "residual", "(4,12)");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.residual = t.x; }), "residual", "itself");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.weight = t.x; }), "weight", "(6)");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.epsilon = -1; }), "epsilon", "-1");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.epsilon = NAN; }), "epsilon", "nan");
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.scale = t.scale; }), "scale",
          "got one for f32");
  refused(fp8, t.x, t.norm(), "scale", "got none for f8_e4m3");
  refused(fp8, t.x, with([&](ResidualNorm& n) { n.scale = t.weight; }), "scale", "(1)");
  refused(half, t.x, t.norm(), "out", "expected f32");
  refused(t.x, t.x, t.norm(), "out", "itself");
  refused(t.residual, t.x, t.norm(), "out", "itself");
  refused(wide.slice(1, 0, 6), t.x, t.norm(), "out", "without gaps");
  const TensorView row(t.out.data(), DType::f32, {6});
  refused(t.out, t.x, with([&](ResidualNorm& n) { n.weight = row; }), "out", "overlap");
  check_throws<UsageError>([&] { (void)group.all_reduce_rms_norm(integers, t.norm()); }, "x",
                           "f32, f16 or bf16");
  check_throws<UsageError>(
      [&] {
        group.reserve_for_calls(std::vector<CollectiveShape>{
            {.collective = Collective::all_reduce_rms_norm, .shape = {4}}});
      },
      "[B, hidden]");
  check_exact_norm(group, c);
}

}  // namespace cohort::test
