// SPDX-License-Identifier: Apache-2.0
#include "cohort/stream_order.hpp"

#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using cohort::test::says;

namespace {

/// Streams that keep what they get as a list, so that what a wait waits for can be told exactly.
class ListDriver final : public StreamDriver {
 public:
  struct State {
    int work = 0;  ///< Pieces that the stream has got.
    CaptureId capture = 0;
  };
  struct Event final : StreamEvent {
    const void* stream = nullptr;
    int work = 0;
  };
  /// `waiter` waits for the first `work` pieces of `stream`.
  struct Wait {
    const void* waiter = nullptr;
    const void* stream = nullptr;
    int work = 0;
    friend bool operator==(const Wait&, const Wait&) = default;
  };

  void submit(void* native, std::function<void()>) override { ++of(native).work; }
  void wait_for(void* waiter, void* signaller) override {
    waits.push_back({waiter, signaller, of(signaller).work});
  }
  [[nodiscard]] std::unique_ptr<StreamEvent> make_event() override {
    return std::make_unique<Event>();
  }
  void record(StreamEvent& event, void* native) override {
    ++records;
    static_cast<Event&>(event).stream = native;
    static_cast<Event&>(event).work = of(native).work;
  }
  void wait(void* waiter, StreamEvent& event) override {
    const auto& stands = static_cast<const Event&>(event);
    waits.push_back({waiter, stands.stream, stands.work});
  }
  [[nodiscard]] CaptureId capture_id(void* native) const override { return of(native).capture; }
  void retain_in_capture(void*, std::shared_ptr<void>) override {}
  void begin_capture(void*) override {}
  [[nodiscard]] std::unique_ptr<ExecutableGraph> end_capture(void*) override { return nullptr; }
  void synchronize(void*, std::chrono::milliseconds) override {}

  std::vector<Wait> waits;
  int records = 0;

 private:
  static State& of(void* native) { return *static_cast<State*>(native); }
};

struct Fixture {
  ListDriver driver;
  ListDriver::State a, b, c;
  StreamOrder order{"group test"};

  [[nodiscard]] StreamRef ref(ListDriver::State& state) { return {driver, &state}; }
  void work(ListDriver::State& state) {
    ref(state).submit([] {});
  }
  void call(ListDriver::State& state) {
    const auto call = order.before(ref(state));
    work(state);
    order.after(call);
  }
  [[nodiscard]] std::vector<ListDriver::Wait> waits() { return std::exchange(driver.waits, {}); }
};

using Waits = std::vector<ListDriver::Wait>;

}  // namespace

TEST_CASE("one stream needs no event and no wait", "[order]") {
  Fixture f;
  for (int i = 0; i < 5; ++i) {
    f.call(f.a);
  }
  static_cast<void>(f.order.before({}));
  f.order.after({});
  CHECK(f.driver.records == 0);
  CHECK(f.waits().empty());
}

TEST_CASE("a call waits for the call before it and nothing later", "[order]") {
  Fixture f;
  f.call(f.a);
  f.work(f.a);
  f.call(f.b);  // the first change of streams finds no event
  CHECK(f.waits() == Waits{{&f.b, &f.a, 2}});
  f.work(f.b);
  f.work(f.b);
  f.call(f.a);
  CHECK(f.waits() == Waits{{&f.a, &f.b, 1}});
  f.call(f.a);  // on the stream itself
  f.work(f.a);
  f.call(f.c);
  CHECK(f.waits() == Waits{{&f.c, &f.a, 4}});
  f.call(f.b);
  CHECK(f.waits() == Waits{{&f.b, &f.c, 1}});
}

TEST_CASE("calls in a capture wait for one another exactly, from the first", "[order]") {
  Fixture f;
  f.a.capture = f.b.capture = 7;
  f.call(f.a);
  f.work(f.a);
  f.call(f.b);
  CHECK(f.waits() == Waits{{&f.b, &f.a, 1}});
  f.work(f.b);
  f.call(f.a);
  CHECK(f.waits() == Waits{{&f.a, &f.b, 1}});
  // Eager calls between play no part.
  f.call(f.c);
  f.call(f.b);
  CHECK(f.waits() == Waits{{&f.b, &f.a, 3}});
}

TEST_CASE("captures that take turns keep their own order", "[order]") {
  Fixture f;
  ListDriver::State d;
  f.a.capture = f.b.capture = 3;
  f.c.capture = d.capture = 4;
  f.call(f.a);
  f.call(f.c);
  f.call(f.b);
  CHECK(f.waits() == Waits{{&f.b, &f.a, 1}});
  f.call(d);
  CHECK(f.waits() == Waits{{&d, &f.c, 1}});
}

TEST_CASE("a call that failed half way is waited for with its whole stream", "[order]") {
  Fixture f;
  f.call(f.a);
  f.call(f.b);
  static_cast<void>(f.waits());
  static_cast<void>(f.order.before(f.ref(f.b)));
  f.work(f.b);
  f.work(f.b);
  f.call(f.a);
  CHECK(f.waits() == Waits{{&f.a, &f.b, 3}});
}

TEST_CASE("an order that cannot be known is refused", "[order]") {
  Fixture f;
  f.call(f.a);
  f.a.capture = 9;  // no event stands behind the eager call
  CHECK_THROWS_MATCHES(f.order.before(f.ref(f.b)), UsageError,
                       says("group test", "begun to be captured"));
  f.a.capture = 0;
  f.call(f.b);
  f.call(f.a);
  static_cast<void>(f.waits());
  f.a.capture = 9;  // now one does
  f.call(f.b);
  CHECK(f.waits() == Waits{{&f.b, &f.a, 2}});

  // More captures than anyone has at a time: the first is forgotten, and says so.
  f.c.capture = 100;
  f.call(f.c);
  for (CaptureId capture = 101; capture < 120; ++capture) {
    f.a.capture = capture;
    f.call(f.a);
  }
  CHECK_THROWS_MATCHES(f.order.before(f.ref(f.c)), UsageError, says("captures at a time"));
  f.c.capture = 120;
  f.call(f.c);
}

TEST_CASE("a capture that has failed needs no order", "[order]") {
  Fixture f;
  f.a.capture = kInvalidatedCapture;
  f.b.capture = kInvalidatedCapture;
  f.call(f.a);
  f.call(f.b);
  CHECK(f.waits().empty());
  f.a.capture = 5;  // the next one is not taken for one that was forgotten
  f.call(f.a);
}
