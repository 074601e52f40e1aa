// SPDX-License-Identifier: Apache-2.0
#include "../bench/cohort_bench/written_inputs.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "support/catch.hpp"

using namespace cohort::bench;

TEST_CASE("written inputs keep their values, and their neighbours theirs") {
  for (const std::size_t bytes : {0U, 1U, 63U, 64U, 65U, 1000U, 4096U}) {
    std::vector<std::byte> memory(4200);
    for (std::size_t i = 0; i < memory.size(); ++i) {
      memory[i] = static_cast<std::byte>(i * 11);
    }
    const auto before = memory;
    rewrite(std::span(memory).subspan(3, bytes));
    CHECK(memory == before);
  }
}

TEST_CASE("written inputs are written, to the last byte") {
  // Of a private mapping a page that was written to is a copy, which the file no longer changes.
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t bytes = 3 * page;
  const int file = memfd_create("written", 0);
  REQUIRE(file >= 0);
  REQUIRE(ftruncate(file, static_cast<off_t>(bytes)) == 0);
  const auto map = [&](int flags) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, 0);
    REQUIRE(memory != MAP_FAILED);
    return std::span(static_cast<std::byte*>(memory), bytes);
  };
  const auto shared = map(MAP_SHARED);
  const auto own = map(MAP_PRIVATE);
  std::fill(shared.begin(), shared.end(), std::byte{1});
  rewrite(own.first(2 * page + 1));  // one byte of the last page
  std::fill(shared.begin(), shared.end(), std::byte{2});
  CHECK(std::all_of(own.begin(), own.end(), [](std::byte b) { return b == std::byte{1}; }));

  const auto untouched = map(MAP_PRIVATE);  // the file does show through where nobody wrote
  CHECK(untouched[0] == std::byte{2});
  for (const auto memory : {shared, own, untouched}) {
    munmap(memory.data(), bytes);
  }
  close(file);
}
