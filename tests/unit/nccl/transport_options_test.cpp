// SPDX-License-Identifier: Apache-2.0
#include <cohort/nccl/transport_options.hpp>

#include <chrono>
#include <cohort/cuda/kernels.hpp>
#include <cohort/cuda/path_sizes.hpp>
#include <cohort/error.hpp>
#include <cohort/nccl/cuda_backend.hpp>
#include <cstddef>

#include "support/catch.hpp"

// What needs no GPU. The own tests of the transport are in tests/gpu.

using namespace cohort;

TEST_CASE("the own kernels take sums and gathers alone, in lines up to the sizes of the table",
          "[nccl]") {
  constexpr std::size_t kKiB = 1024;
  for (const int ranks : {2, 3, 8, 16}) {
    CAPTURE(ranks);
    const auto sizes = cuda::path_sizes(ranks);
    for (const auto collective : {Collective::all_gather, Collective::reduce_scatter}) {
      CHECK(default_own_max_bytes(collective, ranks, true) ==
            static_cast<std::size_t>(sizes.share_total));
      CHECK(default_own_max_bytes(collective, ranks, false) == 64 * kKiB);  // over PCIe
    }
    CHECK(default_own_max_bytes(Collective::all_reduce, ranks, true) ==
          static_cast<std::size_t>(sizes.all_reduce_total));
    CHECK(default_own_max_bytes(Collective::all_reduce, ranks, false) == 64 * kKiB);
    for (const auto collective : {Collective::all_to_all, Collective::broadcast}) {
      CHECK(default_own_max_bytes(collective, ranks, true) == 0);
    }
    // The smallest inbox has room for half a MiB a peer, and so for a small all-reduce.
    const auto layout = cuda::InboxLayout::make({.ranks = ranks});
    CHECK(cuda::max_share_bytes(layout) == 512 * 1024);
    CHECK(cuda::choose_all_reduce_plan(layout, 256 * 1024).fits);
  }
}

TEST_CASE("a transport's own options that cannot be are refused", "[nccl]") {
  CHECK_NOTHROW(check_options({}));
  CHECK_NOTHROW(check_options({.kernel_limit = kLongestTimeLimit, .own_max_bytes = 0}));
  for (const auto limit : {std::chrono::milliseconds(0), std::chrono::milliseconds(-1),
                           std::chrono::milliseconds::min(), std::chrono::milliseconds::max()}) {
    CHECK_THROWS_AS(check_options({.kernel_limit = limit}), ConfigError);
  }
  CHECK_THROWS_AS(check_options({.kernels_at_once = 0}), ConfigError);
  CHECK_THROWS_AS(check_options({.ranks_per_card = -1}), ConfigError);
  CHECK_THROWS_WITH(check_options({.own_max_bytes = -5}),
                    "NcclTransportOptions.own_max_bytes: expected at least 0, got -5");
}

TEST_CASE("a time limit of the kernels that cannot be is refused before anything starts",
          "[nccl]") {
  for (const auto limit : {std::chrono::milliseconds(0), std::chrono::milliseconds(-1),
                           std::chrono::milliseconds(kLongestTimeLimit.count() + 1),
                           std::chrono::milliseconds::max()}) {
    CAPTURE(limit.count());
    CHECK_THROWS_AS(cuda_backend({.kernel_limit = limit}), ConfigError);
  }
}
