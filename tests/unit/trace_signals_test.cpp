// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_signals.hpp"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <functional>
#include <memory>
#include <thread>

#include "cohort/error.hpp"
#include "support/catch.hpp"

using namespace cohort;
using cohort::detail::SignalListener;
using cohort::detail::TraceSignals;

namespace {

/// Listens as long as it lives.
class Listener final : public SignalListener {
 public:
  explicit Listener(int signal) : signal_(signal) { TraceSignals::instance().add(signal, *this); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  ~Listener() override { TraceSignals::instance().remove(signal_, *this); }

  void heard() noexcept override { ++count; }
  /// Whether it has heard that many within some seconds.
  [[nodiscard]] bool hears(int wanted) const {
    for (int i = 0; i < 500 && count < wanted; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return count == wanted;
  }

  std::atomic<int> count{0};

 private:
  int signal_;
};

std::atomic<int> engine_ran{0};
struct sigaction chained {};

void engine(int) { ++engine_ran; }
void engine_with_chain(int signal, siginfo_t* info, void* context) {
  ++engine_ran;
  if ((chained.sa_flags & SA_SIGINFO) != 0) {
    chained.sa_sigaction(signal, info, context);
  }
}

/// Sets an action, and brings the old one back in the end.
class Action {
 public:
  Action(int signal, void (*handler)(int), int flags = 0) : signal_(signal) {
    struct sigaction action {};
    action.sa_handler = handler;
    action.sa_flags = flags;
    REQUIRE(::sigaction(signal, &action, &before_) == 0);
  }
  Action(const Action&) = delete;
  Action& operator=(const Action&) = delete;
  ~Action() { ::sigaction(signal_, &before_, nullptr); }

 private:
  int signal_;
  struct sigaction before_ {};
};

void (*handler_of(int signal))(int) {
  struct sigaction now {};
  REQUIRE(::sigaction(signal, nullptr, &now) == 0);
  return now.sa_handler;
}

/// How a child ends that does this.
int status_of(const std::function<void()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit no_core{};
    ::setrlimit(RLIMIT_CORE, &no_core);
    body();
    ::_exit(0);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}
#if defined(__SANITIZE_THREAD__)
constexpr bool kForks = false;
#else
constexpr bool kForks = true;
#endif
constexpr const char* kNoForks = "the thread sanitizer takes no signals in forked children";

bool ended_by(int status, int signal) { return WIFSIGNALED(status) && WTERMSIG(status) == signal; }

}  // namespace

TEST_CASE("a signal is heard beside the engine's handler, and given back", "[trace_signals]") {
  const Action engines(SIGUSR2, engine);
  engine_ran = 0;
  {
    const Listener first(SIGUSR2);
    {
      const Listener second(SIGUSR2);
      REQUIRE(::raise(SIGUSR2) == 0);
      CHECK(first.hears(1));
      CHECK(second.hears(1));
    }
    REQUIRE(::raise(SIGUSR2) == 0);
    CHECK(first.hears(2));
  }
  CHECK(engine_ran == 2);
  CHECK(handler_of(SIGUSR2) == engine);
}

TEST_CASE("what the engine sets between two states holds", "[trace_signals]") {
  const Action engines(SIGUSR2, SIG_DFL);
  { const Listener first(SIGUSR2); }
  CHECK(handler_of(SIGUSR2) == SIG_DFL);
  const Action ignored(SIGUSR2, SIG_IGN);
  {
    const Listener second(SIGUSR2);
    REQUIRE(::raise(SIGUSR2) == 0);
    CHECK(second.hears(1));
  }
  CHECK(handler_of(SIGUSR2) == SIG_IGN);
}

TEST_CASE("a handler on top that calls ours is not called for ever", "[trace_signals]") {
  const Action engines(SIGUSR2, engine);
  engine_ran = 0;
  auto first = std::make_unique<Listener>(SIGUSR2);
  struct sigaction on_top {};
  on_top.sa_sigaction = engine_with_chain;
  on_top.sa_flags = SA_SIGINFO;
  REQUIRE(::sigaction(SIGUSR2, &on_top, &chained) == 0);
  REQUIRE(::raise(SIGUSR2) == 0);
  CHECK(first->hears(1));
  CHECK(engine_ran == 2);
  first.reset();  // cannot be taken from below
  REQUIRE(::raise(SIGUSR2) == 0);
  CHECK(engine_ran == 4);
  const Listener second(SIGUSR2);
  REQUIRE(::raise(SIGUSR2) == 0);
  CHECK(second.hears(1));
  CHECK(engine_ran == 6);
}

TEST_CASE("a handler that was to run once runs once", "[trace_signals]") {
  if (test::skip_if(!kForks, kNoForks)) {
    return;
  }
  CHECK(ended_by(status_of([] {
                   engine_ran = 0;
                   const Action engines(SIGTERM, engine, static_cast<int>(SA_RESETHAND));
                   const Listener listener(SIGTERM);
                   ::raise(SIGTERM);
                   if (engine_ran == 1) {
                     ::raise(SIGTERM);
                   }
                 }),
                 SIGTERM));
}

TEST_CASE("a signal that ends a process still ends it once it was heard", "[trace_signals]") {
  if (test::skip_if(!kForks, kNoForks)) {
    return;
  }
  for (const int signal : {SIGSEGV, SIGABRT, SIGTERM, SIGINT, SIGHUP}) {
    int pipe[2];
    REQUIRE(::pipe(pipe) == 0);
    struct Told final : SignalListener {
      int to = -1;
      void heard() noexcept override { static_cast<void>(!::write(to, "h", 1)); }
    };
    const int status = status_of([&] {
      const Action engines(signal, SIG_DFL);
      Told told;
      told.to = pipe[1];
      TraceSignals::instance().add(signal, told);
      if (signal == SIGSEGV) {
        void* const page = ::mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        *static_cast<volatile int*>(page) = 1;
      } else {
        ::raise(signal);
      }
    });
    CHECK(ended_by(status, signal));
    ::close(pipe[1]);
    char heard = 0;
    CHECK(::read(pipe[0], &heard, 1) == 1);
    ::close(pipe[0]);
  }
}

TEST_CASE("in a forked child signals do what they did before", "[trace_signals]") {
  if (test::skip_if(!kForks, kNoForks)) {
    return;
  }
  const Action engines(SIGUSR2, SIG_DFL);
  Listener listener(SIGUSR2);
  CHECK(ended_by(status_of([] { ::raise(SIGUSR2); }), SIGUSR2));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(listener.count == 0);
  // It can listen itself.
  CHECK(status_of([] {
          const Listener own(SIGUSR2);
          ::raise(SIGUSR2);
          ::_exit(own.hears(1) ? 7 : 8);
        }) == 7 << 8);
  REQUIRE(::raise(SIGUSR2) == 0);
  CHECK(listener.hears(1));
}

TEST_CASE("what is no signal to be caught is refused", "[trace_signals]") {
  for (const int signal : {-1, 0, 1000, SIGKILL, SIGSTOP, SIGTSTP}) {
    CHECK_THROWS_AS(Listener(signal), ConfigError);
  }
}
