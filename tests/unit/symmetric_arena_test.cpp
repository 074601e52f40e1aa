// SPDX-License-Identifier: Apache-2.0
#include "cohort/symmetric_arena.hpp"

#include <algorithm>
#include <cohort/graph_part.hpp>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "support/arena_checks.hpp"
#include "support/catch.hpp"
#include "support/stand_in_backend.hpp"
#include "support/threads.hpp"
#include "support/workspace.hpp"

using namespace cohort;
using namespace cohort::test;

TEST_CASE("an arena grows, reuses and counts", "[arena]") {
  Workspace work;
  auto& arena = *work.arena;
  CHECK(arena.statistics().reserved == 0);
  CHECK(arena.statistics().segments == 0);
  auto a = bytes_of(arena, 1000);
  auto b = bytes_of(arena, 1);
  CHECK(arena.statistics().reserved == kMiB);
  CHECK(arena.statistics().used == 1024 + 256);
  CHECK(arena.statistics().live_blocks == 2);
  CHECK(arena.statistics().largest_free == kMiB - 1280);
  CHECK(*arena.offset_of(a.data()) == 0);
  CHECK(*arena.offset_of(b.data()) == 1024);
  CHECK_FALSE(arena.offset_of(&arena));
  void* const first = a.data();
  a.reset();
  a = bytes_of(arena, 900);
  CHECK(a.data() == first);
  auto large = bytes_of(arena, 3 * static_cast<std::int64_t>(kMiB));
  CHECK(arena.statistics().segments == 2);
  CHECK(arena.statistics().reserved == 4 * kMiB);
  CHECK(*arena.offset_of(large.data()) == std::uint64_t{1} << 44);
  large.reset();
  a.reset();
  b.reset();
  CHECK(arena.statistics().used == 0);
  CHECK(arena.statistics().peak == 1280 + 3 * kMiB);
  CHECK(arena.statistics().largest_free == 3 * kMiB);
}

TEST_CASE("tensors of nothing are tensors", "[arena]") {
  Workspace work;
  const auto tensor = work.arena->empty({4, 0, 2}, DType::f32, {});
  CHECK(tensor.numel() == 0);
  CHECK(work.arena->statistics().live_blocks == 1);
}

TEST_CASE("reserving makes room, freezing keeps it", "[arena]") {
  Workspace work(4096);
  auto& arena = *work.arena;
  arena.reserve(100'000);
  CHECK(arena.statistics().segments == 1);
  CHECK(arena.statistics().largest_free >= 100'000);
  arena.reserve(100'000);
  CHECK(arena.statistics().segments == 1);
  arena.freeze();
  CHECK(arena.statistics().frozen);
  const auto reserved = arena.statistics().reserved;
  const auto half = bytes_of(arena, 51'200);
  CHECK_THROWS_MATCHES(
      bytes_of(arena, 102'400), UsageError,
      says("arena work is frozen and exhausted", "102400 bytes are needed",
           fmt::format("{} of {} are free", reserved - 51'200, reserved),
           fmt::format("at most {}", reserved - 51'200), "the peak so far is 51200"));
  CHECK_THROWS_MATCHES(arena.reserve(1'000'000), UsageError, says("frozen", "1000192"));
  arena.reserve(1000);  // fits
  CHECK(bytes_of(arena, 1000).numel() == 1000);
}

TEST_CASE("memory beyond the address space is refused", "[arena]") {
  Workspace work;
  CHECK_THROWS_MATCHES(bytes_of(*work.arena, std::int64_t{1} << 50), UsageError,
                       says("arena work", "too large"));
  CHECK_THROWS_AS(work.arena->empty({std::int64_t{1} << 62, 4}, DType::f64, {}), UsageError);
  CHECK_THROWS_AS(work.arena->empty({-1}, DType::f64, {}), UsageError);
  for (const std::size_t bytes : {~std::size_t{0}, ~std::size_t{0} - 511, std::size_t{1} << 61}) {
    CHECK_THROWS_MATCHES(work.arena->reserve(bytes), UsageError, says("arena work", "too large"));
  }
  CHECK(work.arena->statistics().segments == 0);
  CHECK(bytes_of(*work.arena, 10).numel() == 10);
}

TEST_CASE("a wait that fails loses no memory", "[arena][streams]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[2];
  bytes_of(*work.arena, 4096, {driver, &states[0]}).reset();
  driver.failing = true;
  CHECK_THROWS_AS(bytes_of(*work.arena, 4096, {driver, &states[1]}), TimeoutError);
  CHECK(work.arena->statistics().used == 0);
  driver.failing = false;
  CHECK(bytes_of(*work.arena, 4096, {driver, &states[1]}).numel() == 4096);
  CHECK(driver.waits.size() == 1);  // the user is remembered

  states[0].capture = 1;
  states[1].capture = 1;
  const auto part = GraphPart::create(work.arena);
  part->empty({4096}, DType::u8, {driver, &states[0]}, 1).reset();
  driver.failing = true;
  CHECK_THROWS_AS(part->empty({4096}, DType::u8, {driver, &states[1]}, 1), TimeoutError);
  driver.failing = false;
  CHECK(part->empty({4096}, DType::u8, {driver, &states[1]}, 1).numel() == 4096);
  CHECK(work.arena->statistics().used == 4096);
}

TEST_CASE("an allocation without a stream waits for the limit of its control plane",
          "[arena][streams]") {
  const auto planes = make_thread_control_planes(1, std::chrono::milliseconds(700));
  const auto backend = host_backend();
  const auto arena = SymmetricArena::create(*backend, "work", {planes[0].get()});
  RecordingDriver driver;
  RecordingDriver::State state;
  bytes_of(*arena, 4096, {driver, &state}).reset();
  bytes_of(*arena, 4096).reset();
  REQUIRE(driver.limits.size() == 1);
  CHECK(driver.limits[0] <= std::chrono::milliseconds(700));
}

TEST_CASE("a backend without memory says so", "[arena]") {
  Workspace work(kMiB, {.segment_limit = 2 * kMiB});
  const auto first = bytes_of(*work.arena, 10);
  CHECK_THROWS_AS(bytes_of(*work.arena, 2 * static_cast<std::int64_t>(kMiB)), TransportError);
  CHECK(bytes_of(*work.arena, 10).numel() == 10);
}

TEST_CASE("one stream needs no driver call", "[arena][streams]") {
  Workspace work;
  RecordingDriver driver;
  RecordingDriver::State state;
  const StreamRef stream(driver, &state);
  std::mt19937 random(3);
  std::vector<Tensor> live;
  for (int i = 0; i < 5000; ++i) {
    if (live.size() < 50 || random() % 2 == 0) {
      live.push_back(bytes_of(*work.arena, static_cast<std::int64_t>(random() % 20'000), stream));
    } else {
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(random() % live.size()));
    }
  }
  CHECK(driver.waits.empty());
  CHECK(driver.synchronized.empty());
}

TEST_CASE("reuse on another stream waits for the users", "[arena][streams]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[3];
  const StreamRef a(driver, &states[0]);
  const StreamRef b(driver, &states[1]);
  const StreamRef c(driver, &states[2]);

  auto tensor = bytes_of(*work.arena, 4096, a);
  tensor.record_stream(b);
  tensor.record_stream(b);
  tensor.reset();
  tensor = bytes_of(*work.arena, 4096, a);  // a is the block's own stream; b is not
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[0], &states[1]}});
  driver.waits.clear();

  tensor.reset();  // only a has used it since
  tensor = bytes_of(*work.arena, 4096, c);
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[2], &states[0]}});
  driver.waits.clear();

  // Two blocks of two streams become one; whoever takes it waits for both.
  tensor.reset();
  auto left = bytes_of(*work.arena, 2048, c);
  auto right = bytes_of(*work.arena, 2048, c);
  left.record_stream(a);
  right.record_stream(b);
  driver.waits.clear();
  left.reset();
  right.reset();
  tensor = bytes_of(*work.arena, 4096, c);
  CHECK(driver.waits ==
        std::vector<RecordingDriver::Wait>{{&states[2], &states[0]}, {&states[2], &states[1]}});
  CHECK(driver.synchronized.empty());
}

TEST_CASE("an allocation without a stream waits on the host", "[arena][streams]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State state;
  bytes_of(*work.arena, 4096, {driver, &state}).reset();
  const auto tensor = bytes_of(*work.arena, 4096);
  CHECK(driver.waits.empty());
  CHECK(driver.synchronized == std::vector<void*>{&state});
}

TEST_CASE("more streams than marks still wait for one another", "[arena][streams]") {
  Workspace work(4096);
  RecordingDriver driver;
  std::vector<RecordingDriver::State> states(100);
  const auto stream = [&](std::size_t i) { return StreamRef(driver, &states[i]); };
  auto tensor = bytes_of(*work.arena, 4096, stream(0));
  for (std::size_t i = 0; i < 100; ++i) {
    tensor.record_stream(stream(i));
  }
  tensor.reset();
  tensor = bytes_of(*work.arena, 4096, stream(0));
  // 63 gave up their marks, the first too, whose event no harm comes of.
  CHECK(std::set(driver.behind.begin(), driver.behind.end()).size() == 63);
  CHECK(driver.waits.size() == 37);
  driver.waits.clear();
  driver.behind.clear();
  tensor.reset();
  tensor = bytes_of(*work.arena, 4096, stream(80));
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[80], &states[0]}});
  tensor.reset();
  driver.waits.clear();
  tensor = bytes_of(*work.arena, 4096, stream(90));
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[90], &states[80]}});
  CHECK(driver.behind.empty());
}

TEST_CASE("what a stream does after it gave up its mark is waited for all the same",
          "[arena][streams]") {
  // Streams whose work is counted; an event stands behind what its stream had.
  struct Counting final : RecordingDriver {
    struct Event final : StreamEvent {
      void* stream = nullptr;
      int behind = 0;
    };
    std::unique_ptr<StreamEvent> make_event() override { return std::make_unique<Event>(); }
    void record(StreamEvent& event, void* stream) override {
      static_cast<Event&>(event).stream = stream;
      static_cast<Event&>(event).behind = work[stream];
    }
    void wait(void*, StreamEvent& event) override {
      auto& waited_for = seen[static_cast<Event&>(event).stream];
      waited_for = std::max(waited_for, static_cast<Event&>(event).behind);
    }
    void wait_for(void*, void* other) override { seen[other] = work[other]; }
    std::map<void*, int> work;
    std::map<void*, int> seen;  // by whoever took the memory
  };
  const bool recorded = GENERATE(false, true);
  const std::size_t others = GENERATE(as<std::size_t>(), 10, 62, 63, 64, 130);
  CAPTURE(recorded, others);
  Workspace work(kMiB);
  Counting driver;
  std::vector<RecordingDriver::State> states(200);
  const auto stream = [&](std::size_t i) { return StreamRef(driver, &states[i]); };
  auto tensor = bytes_of(*work.arena, 65536, stream(recorded ? 1 : 0));
  if (recorded) {
    tensor.record_stream(stream(0));
  }
  for (std::size_t i = 2; i < 2 + others; ++i) {
    bytes_of(*work.arena, 256, stream(i)).reset();
  }
  driver.work[&states[0]] = 7;  // it goes on with the tensor
  tensor.reset();
  driver.work[&states[0]] = 8;  // which concerns nobody
  driver.seen.clear();
  bytes_of(*work.arena, static_cast<std::int64_t>(kMiB), stream(199)).reset();
  CHECK(driver.seen[&states[0]] >= 7);
}

TEST_CASE("a capture of one of many streams concerns nobody who did not share its memory",
          "[arena][streams]") {
  Workspace work(kMiB);
  RecordingDriver driver;
  std::vector<RecordingDriver::State> states(200);
  const auto stream = [&](std::size_t i) { return StreamRef(driver, &states[i]); };
  auto& arena = *work.arena;
  const auto whole = static_cast<std::int64_t>(kMiB);
  bytes_of(arena, whole, stream(0)).reset();
  for (std::size_t i = 1; i < 100; ++i) {
    bytes_of(arena, whole, stream(i)).reset();  // each waits for the one before it
  }
  for (std::size_t i = 70; i < 98; ++i) {
    states[i].capture = i;
  }
  driver.waits.clear();
  bytes_of(arena, whole, stream(98)).reset();
  CHECK(driver.waits == std::vector<RecordingDriver::Wait>{{&states[98], &states[99]}});
  driver.waits.clear();

  // Those that are being captured keep their marks, and what they used is theirs.
  states[98].capture = 98;
  for (std::size_t i = 100; i < 200; ++i) {
    CHECK_THROWS_MATCHES(bytes_of(arena, whole, stream(i)), UsageError, says("being captured"));
  }
  CHECK(driver.waits.empty());
  states[98].capture = 0;
  bytes_of(arena, whole, stream(199)).reset();
  CHECK(driver.waits.size() + driver.behind.size() > 0);
  CHECK(arena.statistics().used == 0);
}

TEST_CASE("streams that run at once are neither waited for nor remembered", "[arena][streams]") {
  class AtOnce final : public RecordingDriver {
    [[nodiscard]] bool runs_at_once() const noexcept override { return true; }
  };
  Workspace work(4096);
  AtOnce driver;
  std::vector<RecordingDriver::State> states(200);
  for (auto& state : states) {
    auto tensor = bytes_of(*work.arena, 4096, {driver, &state});
    tensor.record_stream({driver, &states[0]});
    state.capture = 1;  // as another stream at the same address might be
  }
  CHECK(bytes_of(*work.arena, 4096).numel() == 4096);
  CHECK(driver.waits.empty());
  CHECK(driver.behind.empty());
  CHECK(driver.synchronized.empty());
}

TEST_CASE("memory of a stream that is being captured is not taken from outside", "[arena]") {
  Workspace work(4096);
  RecordingDriver driver;
  RecordingDriver::State states[2];
  bytes_of(*work.arena, 4096, {driver, &states[0]}).reset();
  states[0].capture = 5;
  CHECK_THROWS_MATCHES(bytes_of(*work.arena, 4096, {driver, &states[1]}), UsageError,
                       says("arena work", "being captured"));
  CHECK(work.arena->statistics().live_blocks == 0);
  states[0].capture = 0;
  CHECK(bytes_of(*work.arena, 4096, {driver, &states[1]}).numel() == 4096);
  CHECK(driver.waits.size() == 1);
}

TEST_CASE("tensors outlive the arena's owner", "[arena]") {
  Workspace work;
  auto tensor = bytes_of(*work.arena, 1000);
  work.arena->close();
  CHECK_THROWS_MATCHES(bytes_of(*work.arena, 1), UsageError, says("arena work", "shut down"));
  CHECK_THROWS_AS(work.arena->reserve(1), UsageError);
  CHECK_THROWS_AS(work.arena->reclaim(), UsageError);
  work.arena.reset();
  std::memset(tensor.data(), 1, 1000);
  tensor.reset();
}

TEST_CASE("an arena ends with its last user, whatever its tensors left it", "[arena]") {
  Workspace work;
  const std::weak_ptr<SymmetricArena> arena = work.arena->weak_from_this();
  const auto use = [&] {
    std::vector<Tensor> step;
    for (int i = 0; i < 40; ++i) {
      step.push_back(bytes_of(*work.arena, 256));
    }
  };
  use();
  use();
  SECTION("without a tensor") {
    SECTION("it is dropped where it was used") { work.arena.reset(); }
    SECTION("another thread drops it") {
      std::thread([&] { work.arena.reset(); }).join();
    }
    SECTION("it is closed before") {
      work.arena->close();
      work.arena.reset();
    }
    CHECK(arena.expired());
  }
  SECTION("with a tensor") {
    Tensor last = bytes_of(*work.arena, 256);
    work.arena.reset();
    CHECK_FALSE(arena.expired());
    std::memset(last.data(), 1, 256);
    SECTION("on the arena's thread") { last.reset(); }
    SECTION("on another thread") {
      std::thread([&] { last.reset(); }).join();
    }
    CHECK(arena.expired());
  }
  SECTION("while another thread drops tensors") {
    std::vector<Tensor> lot;
    for (int i = 0; i < 1000; ++i) {
      lot.push_back(bytes_of(*work.arena, 256));
    }
    std::thread dropper([&] { lot.clear(); });
    use();
    work.arena.reset();
    dropper.join();
    CHECK(arena.expired());
  }
}

TEST_CASE("tensors may be dropped on any thread", "[arena]") {
  Workspace work;
  auto& arena = *work.arena;
  auto kept = bytes_of(arena, 512);
  auto a = bytes_of(arena, 1024);
  void* const place = a.data();
  std::thread([&] { a.reset(); }).join();
  CHECK(arena.statistics().live_blocks == 1);
  CHECK(bytes_of(arena, 1024).data() == place);
  // Many at once, while this thread goes on.
  constexpr int kDroppers = 3;
  std::vector<std::vector<Tensor>> lots(kDroppers);
  for (auto& lot : lots) {
    for (int i = 0; i < 1000; ++i) {
      lot.push_back(bytes_of(arena, 256));
    }
  }
  std::vector<std::thread> droppers;
  for (auto& lot : lots) {
    droppers.emplace_back([&lot] { lot.clear(); });
  }
  for (int i = 0; i < 3000; ++i) {
    auto x = bytes_of(arena, 256);
    std::memset(x.data(), i, 256);
  }
  for (auto& dropper : droppers) {
    dropper.join();
  }
  CHECK(arena.statistics().live_blocks == 1);
  CHECK(arena.statistics().used == 512);
}

TEST_CASE("a tensor keeps the backend of its memory, on whichever thread it goes", "[arena]") {
  std::weak_ptr<Backend> backend;
  Tensor last;
  {
    Workspace work;
    backend = work.backend;
    last = bytes_of(*work.arena, 16);
    work.arena->close();
  }
  CHECK_FALSE(backend.expired());
  std::memset(last.data(), 1, 16);
  std::thread([&] { last.reset(); }).join();
  CHECK(backend.expired());
}

TEST_CASE("arenas of all audiences keep equal offsets on every rank", "[arena]") {
  for (const int n : {1, 2, 4, 8}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_audiences); }
  }
}

TEST_CASE("peers see one another's blocks at equal offsets", "[arena]") {
  for (const int n : {1, 2, 3, 4}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_equal_offsets); }
  }
}

TEST_CASE("growth, reservation, freezing and exhaustion of a group's arena", "[arena]") {
  for (const int n : {1, 2, 3}) {
    DYNAMIC_SECTION(n << " ranks") { run_ranks(n, check_growth); }
  }
}

TEST_CASE("a tensor of DCP's arena is reduced over TP", "[arena]") {
  run_ranks(4, check_tensor_of_another_arena);
}

TEST_CASE("a block for another allocator is loose until it is released", "[arena]") {
  std::vector<Segment*> segments;
  StandInBackend backend({.allocated = [&](Segment& segment) { segments.push_back(&segment); }});
  const auto arena = SymmetricArena::create(backend, "work", {}, {.growth_bytes = kMiB});
  const auto before = bytes_of(*arena, 256);
  auto block = arena->empty_loose(1000, {});
  CHECK(block.view().numel() == 1000);
  CHECK(*arena->offset_of(block.data()) == 256);
  REQUIRE(segments.size() == 1);
  const LooseParts& loose = segments[0]->loose_parts();
  CHECK(loose.hold(block.data(), 1));
  CHECK_FALSE(loose.hold(before.data(), 256));
  const void* const place = block.data();
  SECTION("released here") { block.reset(); }
  SECTION("released elsewhere") {
    std::thread([&] { block.reset(); }).join();
  }
  CHECK_FALSE(loose.hold(place, 1000));
  const auto next = bytes_of(*arena, 1000);  // with equal offsets again
  CHECK(next.data() == place);
  CHECK_FALSE(loose.hold(next.data(), 1000));
  CHECK(arena->empty_loose(0, {}).numel() == 0);
}
