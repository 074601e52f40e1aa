// SPDX-License-Identifier: Apache-2.0
#include "cohort/wait_look.hpp"

#include <chrono>
#include <string>
#include <thread>

#include "cohort/error.hpp"
#include "cohort/thread_control_planes.hpp"
#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

void count_look(void* looks) noexcept { ++*static_cast<int*>(looks); }
void leave_group(void* plane) noexcept {
  static_cast<ControlPlane*>(plane)->give_up("looked and left");
}

}  // namespace

TEST_CASE("a wait looks now and then, with what was made last", "[wait_look]") {
  const WaitLook::Clock::time_point start = WaitLook::Clock::now();
  WaitLook::pass(start + 1h);  // nobody looks
  int outer = 0;
  int inner = 0;
  const WaitLook look(&count_look, &outer);
  WaitLook::pass(start);
  WaitLook::pass(start + WaitLook::kEvery - 1ms);
  CHECK(outer == 0);
  WaitLook::pass(start + WaitLook::kEvery);
  CHECK(outer == 1);
  {
    const WaitLook last(&count_look, &inner);
    WaitLook::pass(start + 1h);
    WaitLook::pass(start + 2h);
    const WaitLook nothing;
    WaitLook::pass(start + 3h);
  }
  CHECK(inner == 1);
  CHECK(outer == 1);
  std::thread([&] { WaitLook::pass(start + 4h); }).join();
  CHECK(outer == 1);
  WaitLook::pass(start + 4h);
  CHECK(outer == 2);
}

TEST_CASE("a look ends a wait, and the others are told", "[wait_look]") {
  const auto planes = make_thread_control_planes(2, 30s);
  const auto began = WaitLook::Clock::now();
  {
    const WaitLook look(&leave_group, planes[0].get());
    CHECK_THROWS_MATCHES(planes[0]->barrier(), SymmetryError, says("rank 0", "looked and left"));
  }
  CHECK_THROWS_AS(planes[1]->barrier(), SymmetryError);
  CHECK(WaitLook::Clock::now() - began < 10s);
}
