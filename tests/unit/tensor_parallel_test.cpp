// SPDX-License-Identifier: Apache-2.0
#include "cohort/tensor_parallel.hpp"

#include "support/catch.hpp"
#include "support/group_tensors.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("partial products of a row-parallel layer are summed", "[tp]") {
  for (const int n : {1, 2, 3, 4}) {
    run_ranks(n, [n](ControlPlane& world) {
      auto state = make_state(world, {.tp = n});
      auto& tp = state.tp();
      // y = x W with W cut by rows: rank r has columns r of x, and rows r of W.
      constexpr std::int64_t kTokens = 12;
      constexpr std::int64_t kHidden = 10;
      const auto x = [](std::int64_t t, int r) { return (t + 2 * r) % 5 - 2; };
      const auto w = [](int r, std::int64_t h) { return (3 * r + h) % 7 - 3; };
      Site site(tp, Memory::arena);
      const auto partial = site.tensor({kTokens, kHidden}, DType::bf16);
      const auto product = [&](std::int64_t flat) {
        return x(flat / kHidden, tp.rank()) * w(tp.rank(), flat % kHidden);
      };
      const auto sum = [&](std::int64_t flat) {
        std::int64_t y = 0;
        for (int r = 0; r < n; ++r) {
          y += x(flat / kHidden, r) * w(r, flat % kHidden);
        }
        return y;
      };
      fill_with(partial, product);
      const auto mine = tp.row_parallel_reduce_scatter(partial);
      const std::int64_t first = kTokens / n * tp.rank();
      check(mine.shape() == Dims{kTokens / n, kHidden}, "shape of the shared rows");
      check_values(mine, "rows", [&](std::int64_t flat) { return sum(flat + first * kHidden); });
      tp.row_parallel_reduce(partial);
      check_values(partial, "row_parallel_reduce", sum);
    });
  }
}

TEST_CASE("logits are gathered over the vocabulary without the padding", "[tp]") {
  for (const int n : {1, 2, 3, 4, 8}) {
    run_ranks(n, [n](ControlPlane& world) {
      auto state = make_state(world, {.tp = n});
      auto& tp = state.tp();
      for (const std::int64_t vocabulary : {1, 5, 8, 10, 17, 1000}) {
        const std::int64_t share = (vocabulary + n - 1) / n;
        std::int64_t total = 0;
        for (int r = 0; r < n; ++r) {
          total += tp.vocabulary_extent(vocabulary, r);
        }
        check_equal(total, vocabulary, "extents add up");
        Site site(tp, Memory::mixed);
        const auto logits = site.tensor({3, 2, share}, DType::f32);
        fill_with(logits, [&](std::int64_t flat) {
          const std::int64_t token = tp.rank() * share + flat % share;
          return token < vocabulary ? flat / share * 10'000 + token : -7;
        });
        const auto expected = [&](std::int64_t flat) {
          return flat / vocabulary * 10'000 + flat % vocabulary;
        };
        const auto whole = tp.gather_vocabulary(logits, vocabulary);
        check(whole.shape() == Dims{3, 2, vocabulary}, "shape of the logits");
        check_values(whole, "gather_vocabulary", expected);
        const auto out = site.tensor({3, 2, vocabulary}, DType::f32);
        tp.gather_vocabulary_into(out, logits, vocabulary);
        check_values(out, "gather_vocabulary_into", expected);
      }
      const auto logits = tp.backend().allocate({3, 4}, DType::f32, {});
      check_throws<UsageError>([&] { (void)tp.gather_vocabulary(logits, 4 * n + 1); },
                               "gather_vocabulary logits", fmt::format("{}", 4 * n + 1));
      check_throws<UsageError>([&] { (void)tp.gather_vocabulary(logits, -1); },
                               "gather_vocabulary logits");
      check_throws<UsageError>([&] { (void)tp.gather_vocabulary(logits.view().slice(1, 0, 3), 4); },
                               "gather_vocabulary logits");
      tp.barrier();
    });
  }
}
