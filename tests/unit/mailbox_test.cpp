// SPDX-License-Identifier: Apache-2.0
#include "cohort/mailbox.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/forked.hpp"
#include "support/threads.hpp"

using namespace cohort;
using namespace cohort::detail;
using namespace std::chrono_literals;

namespace {

/// Rank 0 of three. What the test delivers comes in; nobody takes what goes out.
class DeliveringMessenger : public Messenger {
 public:
  [[nodiscard]] int rank() const noexcept override { return 0; }
  [[nodiscard]] int size() const noexcept override { return 3; }
  void send(int, Bytes) override {}
  std::optional<Bytes> receive(int from, Deadline deadline) override {
    ++asked;
    if (from == gone) {
      throw TransportError({.call = "receive"}, "the rank has left");
    }
    auto& queue = arrived.at(static_cast<std::size_t>(from));
    if (queue.empty()) {
      if (deadline - Clock::now() > 500us) {
        ++blocking;
        const Deadline patience = Clock::now() + 20s;
        while (stuck && Clock::now() < patience) {
          std::this_thread::sleep_for(100us);
        }
        std::this_thread::sleep_until(deadline);
      }
      if (const auto trailer = std::exchange(comes_then, std::nullopt)) {
        std::this_thread::sleep_for(stops_for);
        deliver(from, *trailer);
      }
      return std::nullopt;
    }
    std::this_thread::sleep_for(takes);
    Bytes message = std::move(queue.front());
    queue.erase(queue.begin());
    return message;
  }

  void deliver(int from, const FrameTrailer& trailer, std::size_t bytes = 1) {
    Bytes message(bytes + sizeof(trailer));
    std::memcpy(message.data() + bytes, &trailer, sizeof(trailer));
    arrived.at(static_cast<std::size_t>(from)).push_back(std::move(message));
  }

  std::vector<std::vector<Bytes>> arrived{3};
  std::atomic<int> blocking{0};
  std::atomic<bool> stuck{false};          // whoever waits inside stays there
  std::chrono::microseconds takes{0};      // each message
  std::optional<FrameTrailer> comes_then;  // while a caller stops behind a look that found nothing
  std::chrono::milliseconds stops_for{0};
  int asked = 0;
  int gone = -1;
};

struct Post {
  std::shared_ptr<DeliveringMessenger> messenger = std::make_shared<DeliveringMessenger>();
  Mailbox mailbox{messenger};

  std::optional<Mailbox::Frame> receive(int from, ControlCall call, const Watch& watch) {
    return mailbox.receive(from, call, watch, Clock::now());
  }
};

const std::vector<int> kOthers{1, 2};

}  // namespace

TEST_CASE("messages are sorted by sender, group and kind, and keep their order") {
  Post post;
  post.messenger->deliver(1, {7, ControlCall::barrier, 0});
  post.messenger->deliver(1, {8, ControlCall::barrier, 4});
  post.messenger->deliver(1, {7, ControlCall::exchange, 0});
  post.messenger->deliver(1, {7, ControlCall::all_gather, 1});
  post.messenger->deliver(2, {7, ControlCall::barrier, 9});
  const Watch seven{7, kOthers, 0};
  const Watch eight{8, kOthers, 0};
  CHECK(post.receive(1, ControlCall::exchange, seven).value().trailer.call ==
        ControlCall::exchange);
  CHECK(post.receive(2, ControlCall::barrier, seven).value().trailer.sequence == 9);
  CHECK(post.receive(1, ControlCall::barrier, eight).value().trailer.sequence == 4);
  CHECK(post.receive(1, ControlCall::barrier, seven).value().trailer.sequence == 0);
  CHECK(post.receive(1, ControlCall::barrier, seven).value().trailer.sequence == 1);
  CHECK_FALSE(post.receive(1, ControlCall::barrier, seven));
  CHECK(post.mailbox.held() == 0);
}

TEST_CASE("a notice ends the wait of those whom it concerns, after what was sent before it") {
  Post post;
  post.messenger->deliver(1, {7, ControlCall::barrier, 0});
  post.messenger->deliver(1, {7, ControlCall::gave_up, 1}, 5);
  const Watch first{7, kOthers, 0};
  const Watch second{7, kOthers, 1};
  // Rank 1 has finished call 0, so its notice does not concern that.
  CHECK(post.receive(1, ControlCall::barrier, first));
  CHECK_FALSE(post.mailbox.receive(1, ControlCall::barrier, first, Clock::now() + 5ms));
  CHECK_FALSE(post.mailbox.notices().first(first));
  // Call 1 it has not, and whoever waits for rank 2 need not go on.
  CHECK_FALSE(post.mailbox.receive(2, ControlCall::barrier, second, Clock::now() + 60s));
  const auto notice = post.mailbox.notices().first(second);
  REQUIRE(notice);
  CHECK(notice->from == 1);
  CHECK(notice->sequence == 1);
  CHECK(notice->reason.size() == 5);
  // Nor does it concern other groups, or pairs without rank 1.
  CHECK_FALSE(post.mailbox.notices().first({8, kOthers, 1}));
  CHECK_FALSE(post.mailbox.notices().first({7, std::span(kOthers).subspan(1), std::nullopt}));
  CHECK(post.mailbox.notices().first({7, kOthers, std::nullopt}));
}

TEST_CASE("a forked child neither calls its parent's messenger nor destroys it") {
  struct Counts {
    int calls = 0;
    int destroyed = 0;
  } counts;
  class CountingMessenger : public Messenger {
   public:
    explicit CountingMessenger(Counts& counts) : counts_(counts) {}
    ~CountingMessenger() override { ++counts_.destroyed; }
    [[nodiscard]] int rank() const noexcept override { return 0; }
    [[nodiscard]] int size() const noexcept override { return 2; }
    void send(int, Bytes) override { ++counts_.calls; }
    std::optional<Bytes> receive(int, Deadline) override {
      ++counts_.calls;
      return std::nullopt;
    }
    bool flush(int, Deadline) override { return ++counts_.calls > 0; }
    void abandon() noexcept override { ++counts_.calls; }

   private:
    Counts& counts_;
  };
  auto messenger = std::make_shared<CountingMessenger>(counts);
  auto mailbox = Mailbox::shared(messenger);
  const FrameTrailer trailer{7, ControlCall::barrier, 0};
  test::run_in_child([&] {
    const auto refused = [](const auto& call) {
      test::check_throws<UsageError>(call, "forked child of its owner");
    };
    const Watch watch{7, kOthers, 0};
    refused([&] { mailbox->send(1, trailer, {}); });
    refused([&] { (void)mailbox->receive(1, ControlCall::barrier, watch, Clock::now()); });
    refused([&] { (void)mailbox->flush(1, watch, Clock::now()); });
    refused([&] { mailbox->look(); });
    mailbox->look_now_and_then();
    mailbox->retire(7);
    mailbox->abandon();
    mailbox.reset();  // as the child's exit does
    messenger.reset();
    test::check_equal(counts.calls, 0, "calls of the messenger");
    test::check_equal(counts.destroyed, 0, "messengers destroyed");
  });
  mailbox->send(1, trailer, {});
  CHECK(counts.calls == 1);
  mailbox.reset();
  messenger.reset();
  CHECK(counts.destroyed == 1);
}

TEST_CASE("a goodbye ends the waits that need its rank, after what was sent before it") {
  Post post;
  post.messenger->deliver(2, {7, ControlCall::exchange, 0});
  post.messenger->deliver(2, {7, ControlCall::left, 1}, 0);
  const Watch pair{7, kOthers, std::nullopt, std::span(kOthers).subspan(1)};
  const Watch other{7, kOthers, std::nullopt, std::span(kOthers).first(1)};
  const Watch all{7, kOthers, std::nullopt, kOthers};
  post.mailbox.look();
  CHECK(post.mailbox.has_left(7, 2));
  CHECK_FALSE(post.mailbox.has_left(7, 1));
  CHECK_FALSE(post.mailbox.has_left(8, 2));
  // What rank 2 sent is there for who needs no more of it.
  CHECK_FALSE(post.mailbox.who_left(ControlCall::exchange, all));
  CHECK(post.mailbox.who_left(ControlCall::barrier, all) == 2);
  CHECK(post.receive(2, ControlCall::exchange, pair));
  CHECK(post.mailbox.who_left(ControlCall::exchange, all) == 2);
  CHECK_FALSE(post.mailbox.receive(2, ControlCall::exchange, pair, Clock::now() + 60s));
  CHECK_FALSE(post.mailbox.receive(1, ControlCall::exchange, all, Clock::now() + 60s));
  // Who needs rank 1 alone is not disturbed, nor is another group.
  CHECK_FALSE(post.mailbox.who_left(ControlCall::exchange, other));
  CHECK_FALSE(post.mailbox.who_left(ControlCall::exchange, {8, kOthers, std::nullopt, kOthers}));
  CHECK_FALSE(post.mailbox.notices().first(all));
  post.messenger->deliver(1, {7, ControlCall::exchange, 0});
  CHECK(post.receive(1, ControlCall::exchange, other));
  post.mailbox.retire(7);
  CHECK_FALSE(post.mailbox.has_left(7, 2));
  post.messenger->deliver(2, {7, ControlCall::left, 1}, 0);
  post.mailbox.look();
  CHECK_FALSE(post.mailbox.has_left(7, 2));
}

TEST_CASE("looking for notices passes over a rank that is gone") {
  Post post;
  post.messenger->gone = 1;
  post.messenger->deliver(2, {7, ControlCall::barrier, 0});
  post.messenger->deliver(2, {7, ControlCall::gave_up, 1});
  post.mailbox.look();
  CHECK(post.mailbox.notices().first({7, kOthers, 1}).value().from == 2);
}

TEST_CASE("one look takes in what was said to any group, from the rank that has said least too") {
  Post post;
  for (int i = 0; i < 100; ++i) {
    post.messenger->deliver(1, {9, ControlCall::barrier, 0});
  }
  post.messenger->deliver(2, {7, ControlCall::gave_up, 1});
  post.messenger->deliver(2, {8, ControlCall::gave_up, 4});
  post.mailbox.look();
  CHECK(post.mailbox.notices().first({7, kOthers, std::nullopt}).value().sequence == 1);
  CHECK(post.mailbox.notices().first({8, kOthers, std::nullopt}).value().sequence == 4);
  CHECK(post.mailbox.held() == 102);
}

TEST_CASE("a look goes on until nothing more is there") {
  Post post;
  post.messenger->takes = 50us;
  for (int i = 0; i < 200; ++i) {
    post.messenger->deliver(1, {9, ControlCall::barrier, 0});
  }
  post.messenger->deliver(1, {7, ControlCall::gave_up, 1});
  post.mailbox.look();
  CHECK(post.mailbox.notices().first({7, kOthers, 1}));
  CHECK(post.mailbox.held() == 201);
}

TEST_CASE("what a thread of this rank says ends each of its waits in the group") {
  Post post;
  CHECK(post.mailbox.notices().note_own(7, Bytes(3)));
  CHECK_FALSE(post.mailbox.notices().note_own(7, Bytes(4)));  // the first cause stays
  CHECK(post.mailbox.notices().first({7, kOthers, 2}).value().reason.size() == 3);
  CHECK_FALSE(post.mailbox.receive(1, ControlCall::barrier, {7, kOthers, 2}, Clock::now() + 60s));
  CHECK_FALSE(post.mailbox.notices().first({8, kOthers, std::nullopt}));
  CHECK(post.mailbox.held() == 0);
}

TEST_CASE("who asks all the time looks once in a while, whichever group asks") {
  Post post;
  const auto start = Clock::now();
  for (int i = 0; i < 100'000; ++i) {
    post.mailbox.look_now_and_then();
  }
  const auto most = (Clock::now() - start) / 1ms + 2;
  CHECK(post.messenger->asked >= 2);
  CHECK(post.messenger->asked <= 2 * most);
}

TEST_CASE("it is calm behind a look, for some milliseconds and until somebody has left") {
  Post post;
  post.mailbox.look();
  const int asked = post.messenger->asked;
  bool was_calm = false;
  const auto end = Clock::now() + 60s;
  while (post.mailbox.is_calm() && Clock::now() < end) {
    was_calm = true;
  }
  CHECK(was_calm);
  CHECK_FALSE(post.mailbox.is_calm());    // the next look is due
  CHECK(post.messenger->asked == asked);  // and to ask for calm was none
  while (!post.mailbox.is_calm() && Clock::now() < end) {
    post.mailbox.look_now_and_then();
  }
  post.messenger->deliver(2, {8, ControlCall::gave_up, 4});
  do {
    post.mailbox.look();
    CHECK_FALSE(post.mailbox.is_calm());
  } while (!post.mailbox.notices().any() && Clock::now() < end);
}

TEST_CASE("who asks now and then waits for no thread that is inside") {
  Post post;
  post.messenger->deliver(2, {8, ControlCall::gave_up, 4});
  post.mailbox.look();
  post.messenger->stuck = true;
  std::thread inside([&] {
    (void)post.mailbox.receive(1, ControlCall::barrier, {7, kOthers, 0}, Clock::now() + 1ms);
  });
  while (post.messenger->blocking == 0) {
    std::this_thread::yield();
  }
  std::this_thread::sleep_for(20ms);  // a look is due
  const auto start = Clock::now();
  post.mailbox.look_now_and_then();
  const auto notice = post.mailbox.notices().first({8, kOthers, std::nullopt});
  const auto took = Clock::now() - start;
  post.messenger->stuck = false;
  inside.join();
  CHECK(took < 10s);
  CHECK(notice);
}

TEST_CASE("what comes for a group that has ended is dropped") {
  Post post;
  const Watch eight{8, kOthers, 0};
  for (const std::uint64_t channel : {6U, 7U, 8U}) {
    post.messenger->deliver(1, {channel, ControlCall::barrier, 0});
    post.messenger->deliver(2, {channel, ControlCall::exchange, 0});
    post.messenger->deliver(2, {channel, ControlCall::gave_up, 3});
  }
  post.mailbox.look();
  CHECK(post.mailbox.held() == 9);
  post.mailbox.retire(7);
  CHECK(post.mailbox.held() == 6);
  post.messenger->deliver(1, {7, ControlCall::barrier, 1});
  post.messenger->deliver(1, {7, ControlCall::gave_up, 1});
  post.mailbox.look();
  CHECK(post.mailbox.held() == 6);
  CHECK(post.receive(1, ControlCall::barrier, eight));
  CHECK(post.mailbox.notices().first({8, kOthers, 3}));
  // What is remembered of ended groups has a bound.
  for (std::uint64_t channel = 100; channel < 10'100; ++channel) {
    post.mailbox.retire(channel);
  }
  post.messenger->deliver(1, {10'099, ControlCall::barrier, 0});
  post.mailbox.look();
  CHECK(post.mailbox.held() == 5);
}

TEST_CASE("questions, answers and notices of other ranks go to their places, and are no messages") {
  Post post;
  const std::uint32_t number = post.mailbox.questions().begin_inquiry();
  post.messenger->deliver(1, {7, ControlCall::asks, 3}, 0);
  post.messenger->deliver(1, {7, ControlCall::waits, number}, 5 * sizeof(std::uint64_t));
  post.mailbox.look();
  const auto questions = post.mailbox.questions().take_questions(7);
  REQUIRE(questions.size() == 1);
  CHECK(questions.front().from == 1);
  CHECK(questions.front().trailer.sequence == 3);
  const auto answers = post.mailbox.questions().take_answers(number);
  REQUIRE(answers.size() == 1);
  CHECK(answers.front().from == 1);
  CHECK(answers.front().waits_for.empty());
  CHECK(post.mailbox.held() == 0);
  post.messenger->deliver(2, {7, ControlCall::gave_up, 5}, 4);
  post.mailbox.look();
  const auto notice = post.mailbox.notices().first({7, kOthers, std::nullopt});
  REQUIRE(notice);
  CHECK(notice->from == 2);
  CHECK(notice->sequence == 5);
  CHECK(notice->reason.size() == 4);
  CHECK(post.mailbox.held() == 1);  // nobody has asked for it
}

TEST_CASE("what comes while a waiting thread does not run counts, also behind the deadline") {
  Post post;
  post.messenger->stops_for = 60ms;
  post.messenger->comes_then = FrameTrailer{7, ControlCall::barrier, 0};
  CHECK(post.mailbox.receive(1, ControlCall::barrier, {7, kOthers, 0}, Clock::now() + 30ms));
}

TEST_CASE("a thread that waits does not keep the messenger from another") {
  Post post;
  std::thread waiting([&] {
    CHECK_FALSE(post.mailbox.receive(1, ControlCall::barrier, {7, kOthers, 0}, Clock::now() + 2s));
  });
  while (post.messenger->blocking == 0) {
    std::this_thread::yield();
  }
  // Each of these would have to wait for the other's turn to end.
  constexpr int kSends = 400;
  for (int i = 0; i < kSends; ++i) {
    post.mailbox.send(2, {8, ControlCall::exchange, 0}, Bytes(1));
    std::this_thread::sleep_for(500us);
  }
  const int blocking = post.messenger->blocking;
  waiting.join();
  // Once the two have met they share it for a second.
  CHECK(blocking < kSends / 4);
}
