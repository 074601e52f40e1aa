// SPDX-License-Identifier: Apache-2.0
#include "cohort/symmetric_scope.hpp"

#include <optional>
#include <thread>
#include <type_traits>

#include "cohort/host/host_backend.hpp"
#include "support/catch.hpp"
#include "support/group_tensors.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

struct Fixture {
  std::shared_ptr<Backend> backend = host_backend();
  std::shared_ptr<SymmetricArena> outer = SymmetricArena::create(*backend, "outer", {});
  std::shared_ptr<SymmetricArena> inner = SymmetricArena::create(*backend, "inner", {});

  [[nodiscard]] ScopeTarget target(const std::shared_ptr<SymmetricArena>& arena) const {
    return {arena.get(), backend.get()};
  }
};

}  // namespace

TEST_CASE("allocation needs a scope", "[scope]") {
  CHECK(SymmetricScope::current() == nullptr);
  CHECK_THROWS_MATCHES(empty({1}, DType::f32), UsageError, says("no SymmetricScope"));
}

TEST_CASE("the innermost scope counts", "[scope]") {
  Fixture f;
  const SymmetricScope scope(f.target(f.outer));
  const auto a = empty({10}, DType::f32);
  CHECK(f.outer->offset_of(a.data()));
  {
    const SymmetricScope nested(f.target(f.inner));
    CHECK(SymmetricScope::current() == &nested);
    const auto b = empty({10}, DType::f32);
    CHECK(f.inner->offset_of(b.data()));
    {
      const SymmetricScope off(f.target(f.outer), {}, ScopeMode::disabled);
      CHECK(off.is_null());
      const auto c = empty({10}, DType::f32);
      CHECK(c.numel() == 10);
      CHECK_FALSE(f.inner->offset_of(c.data()));
      CHECK_FALSE(f.outer->offset_of(c.data()));
    }
    CHECK(f.inner->offset_of(empty({10}, DType::f32).data()));
  }
  CHECK(SymmetricScope::current() == &scope);
  CHECK(f.outer->offset_of(empty({10}, DType::f32).data()));
}

TEST_CASE("a scope ends with an exception", "[scope]") {
  Fixture f;
  CHECK_THROWS_AS(
      [&] {
        const SymmetricScope scope(f.target(f.outer));
        throw UsageError("anything");
      }(),
      UsageError);
  CHECK(SymmetricScope::current() == nullptr);
}

TEST_CASE("scopes may end in any order", "[scope]") {
  Fixture f;
  std::optional<SymmetricScope> scopes[3];
  for (auto& scope : scopes) {
    scope.emplace(f.target(f.outer));
  }
  scopes[1].reset();
  CHECK(SymmetricScope::current() == &*scopes[2]);
  scopes[0].reset();
  CHECK(SymmetricScope::current() == &*scopes[2]);
  CHECK(empty({4}, DType::f32).numel() == 4);
  scopes[2].reset();
  CHECK(SymmetricScope::current() == nullptr);
}

TEST_CASE("a scope of nothing refuses to allocate", "[scope]") {
  const SymmetricScope scope(ScopeTarget{});
  CHECK(scope.is_null());
  CHECK_THROWS_MATCHES(empty({1}, DType::f32), UsageError, says("SymmetricScope target"));
}

TEST_CASE("tensors may leave their scope", "[scope]") {
  Fixture f;
  Tensor kept;
  {
    const SymmetricScope scope(f.target(f.outer));
    kept = empty({1000}, DType::u8);
  }
  CHECK(f.outer->statistics().live_blocks == 1);
  kept.reset();
  CHECK(f.outer->statistics().live_blocks == 0);
}

TEST_CASE("a scope belongs to its thread", "[scope]") {
  Fixture f;
  const SymmetricScope scope(f.target(f.outer));
  const SymmetricScope* seen = &scope;
  std::thread([&] { seen = SymmetricScope::current(); }).join();
  CHECK(seen == nullptr);
  STATIC_REQUIRE_FALSE(std::is_copy_constructible_v<SymmetricScope>);
  STATIC_REQUIRE_FALSE(std::is_move_constructible_v<SymmetricScope>);
  STATIC_REQUIRE_FALSE(std::is_copy_assignable_v<SymmetricScope>);
}

TEST_CASE("groups are targets; without windows their scope is null", "[scope]") {
  run_ranks(2, [](ControlPlane& world) {
    HostStream stream;
    auto state = make_state(world, {.tp = 2, .dcp = 2});
    {
      const SymmetricScope scope(state.dcp(), stream);
      check(!scope.is_null(), "symmetric");
      check(scope.stream() == stream.ref(), "stream");
      const Tensor x = empty({4}, DType::f32);
      check(state.dcp().arena()->offset_of(x.data()).has_value(), "in the arena");
    }
    const SymmetricScope scope(state.world(), stream);  // not selected
    check(scope.is_null(), "null scope");
    const Tensor x = empty({4}, DType::f32);
    check(!state.world().arena()->offset_of(x.data()).has_value(), "ordinary memory");
  });
}
