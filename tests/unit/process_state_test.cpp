// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cohort/process_state.hpp>
#include <deque>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace cohort::detail;

namespace {

/// A registry that lives as long as the process, as real ones do: what it holds is never freed, and
/// a leak checker must find it reachable.
ProcessRegistry& new_registry() {
  static auto& registries = *new std::deque<ProcessRegistry>;
  return registries.emplace_back();
}

}  // namespace

TEST_CASE("an object is made once and found by its name", "[process_state]") {
  ProcessRegistry& registry = new_registry();
  int made = 0;
  const auto make = [&] { return std::make_unique<int>(++made); };
  int& first = object_of_process<int>(registry, "first", make);
  int& second = object_of_process<int>(registry, "second", make);
  CHECK(&object_of_process<int>(registry, "first", make) == &first);
  CHECK(first == 1);
  CHECK(second == 2);
  CHECK(made == 2);
}

TEST_CASE("what the maker throws comes out, and the next call tries again", "[process_state]") {
  ProcessRegistry& registry = new_registry();
  const auto fail = []() -> std::unique_ptr<int> { throw std::runtime_error("no"); };
  CHECK_THROWS_AS(object_of_process<int>(registry, "it", fail), std::runtime_error);
  CHECK(object_of_process<int>(registry, "it", [] { return std::make_unique<int>(3); }) == 3);
}

TEST_CASE("a maker may ask for other objects", "[process_state]") {
  ProcessRegistry& registry = new_registry();
  const auto four = [] { return std::make_unique<int>(4); };
  const int& five = object_of_process<int>(registry, "five", [&] {
    return std::make_unique<int>(object_of_process<int>(registry, "four", four) + 1);
  });
  CHECK(five == 5);
}

TEST_CASE("threads that ask at once get one object", "[process_state]") {
  for (int round = 0; round < 200; ++round) {
    ProcessRegistry& registry = new_registry();
    std::atomic<int> ready{0};
    std::vector<int*> found(4);
    std::vector<std::thread> threads;
    for (auto& place : found) {
      threads.emplace_back([&] {
        ++ready;
        while (ready < 4) {
          std::this_thread::yield();
        }
        place = &object_of_process<int>(registry, "it", [] { return std::make_unique<int>(1); });
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
    CHECK(found == std::vector<int*>(4, found[0]));
  }
}

TEST_CASE("a registry is found behind foreign notes, in both alignments", "[process_state]") {
  const std::size_t alignment = GENERATE(as<std::size_t>(), 4, 8);
  alignas(8) std::array<std::byte, 128> notes{};
  std::size_t at = 0;
  const auto put = [&](std::uint32_t type, std::string_view owner, std::int32_t content) {
    const ElfW(Nhdr) header{static_cast<ElfW(Word)>(owner.size()), sizeof(content), type};
    const auto padded = [&](std::size_t size) {
      return (size + alignment - 1) / alignment * alignment;
    };
    std::memcpy(notes.data() + at, &header, sizeof(header));
    std::memcpy(notes.data() + at + sizeof(header), owner.data(), owner.size());
    const std::size_t place = padded(at + sizeof(header) + owner.size());
    std::memcpy(notes.data() + place, &content, sizeof(content));
    at = padded(place + sizeof(content));
    return place;
  };
  const std::string_view cohort("Cohort\0\0\0\0\0\0", 12);
  put(kRegistryVersion, std::string_view("GNU\0", 4), 1);
  put(kRegistryVersion + 1, cohort, 2);
  CHECK(registry_in_notes(notes.data(), at, alignment) == nullptr);
  const std::size_t place = put(kRegistryVersion, cohort, -100);
  const auto* found = reinterpret_cast<std::byte*>(registry_in_notes(notes.data(), at, alignment));
  CHECK(found == notes.data() + place - 100);
  CHECK(registry_in_notes(notes.data(), at - 9, alignment) == nullptr);  // cut off
}

TEST_CASE("the program's registry is the process's", "[process_state]") {
  CHECK(&find_process_registry() == &module_registry);
}
