// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/window.hpp>
#include <memory>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;

namespace {

struct Fixture {
  std::shared_ptr<WindowTable> table = std::make_shared<WindowTable>();
  std::vector<std::shared_ptr<SharedMemory>> files;

  std::unique_ptr<HostWindow> make() {
    auto own = make_shared_memory(4096, Commit::at_first_access);
    auto peer = make_shared_memory(4096, Commit::at_first_access);
    files = {own, peer};
    return std::make_unique<HostWindow>(table, table->next_number(), 0,
                                        std::vector<std::shared_ptr<SharedMemory>>{own, peer});
  }
};

TensorView floats(void* data, std::int64_t count) {
  return TensorView(data, DType::f32, Dims{count});
}

}  // namespace

TEST_CASE("a tensor is found in the window that holds all of it", "[host]") {
  Fixture fixture;
  std::vector<std::unique_ptr<HostWindow>> windows;
  for (int i = 0; i < 5; ++i) {
    windows.push_back(fixture.make());
  }
  for (std::uint32_t i = 0; i < 5; ++i) {
    auto* begin = static_cast<std::byte*>(windows[i]->peers()[0]);
    const auto found = fixture.table->find(floats(begin + 256, 64));
    REQUIRE(found);
    CHECK(found->window == i);
    CHECK(found->offset == 256);
    CHECK(fixture.table->at(*found, 1) == static_cast<std::byte*>(windows[i]->peers()[1]) + 256);
    CHECK(fixture.table->find(floats(begin, 1024)));
    CHECK_FALSE(fixture.table->find(floats(begin, 1025)));
    CHECK_FALSE(fixture.table->find(floats(begin, 0)));
    // A view that runs backwards out of the window.
    CHECK_FALSE(fixture.table->find(TensorView(begin + 8, DType::f32, Dims{4}, Dims{-1})));
    CHECK(fixture.table->find(TensorView(begin + 12, DType::f32, Dims{4}, Dims{-1})));
  }
  std::vector<float> ordinary(16);
  CHECK_FALSE(fixture.table->find(floats(ordinary.data(), 16)));
}

TEST_CASE("a destroyed window is found no more, the others are", "[host]") {
  Fixture fixture;
  auto first = fixture.make();
  auto second = fixture.make();
  auto third = fixture.make();
  void* gone = second->peers()[0];
  second.reset();
  CHECK_FALSE(fixture.table->find(floats(gone, 4)));
  CHECK(fixture.table->at({1, 0}, 0) == nullptr);
  CHECK(fixture.table->find(floats(third->peers()[0], 4))->window == 2);
  CHECK(fixture.make()->peers().size() == 2);
}

TEST_CASE("an offset outside the window is no address", "[host]") {
  Fixture fixture;
  const auto window = fixture.make();
  CHECK(fixture.table->at({0, 4095}, 1) != nullptr);
  CHECK(fixture.table->at({0, 4096}, 1) == nullptr);
  CHECK(fixture.table->at({0, ~std::uint64_t{0}}, 1) == nullptr);
}
