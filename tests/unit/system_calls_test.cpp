// SPDX-License-Identifier: Apache-2.0
#include <cohort/system_calls.hpp>

#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::test;
using namespace std::chrono_literals;

namespace {

using Clock = std::chrono::steady_clock;

/// Signals at this process, one every so many microseconds, none of which restarts a call.
class Signals {
 public:
  explicit Signals(int microseconds) {
    struct sigaction action {};
    action.sa_handler = [](int) {};
    sigaction(SIGALRM, &action, &before_);
    const itimerval timer{{0, microseconds}, {0, microseconds}};
    setitimer(ITIMER_REAL, &timer, nullptr);
  }
  ~Signals() {
    const itimerval none{};
    setitimer(ITIMER_REAL, &none, nullptr);
    sigaction(SIGALRM, &before_, nullptr);
  }

 private:
  struct sigaction before_ {};
};

/// A listening socket with a queue of one, and its address.
struct Listener {
  Listener() {
    const std::string name = "cohort-test-" + std::to_string(getpid());
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path + 1, name.data(), name.size());
    size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    REQUIRE(bind(socket.get(), generic(), size) == 0);
    REQUIRE(listen(socket.get(), 0) == 0);
  }
  [[nodiscard]] const sockaddr* generic() const {
    return reinterpret_cast<const sockaddr*>(&address);
  }

  UniqueFd socket = os::unix_socket();
  sockaddr_un address{};
  socklen_t size = 0;
};

}  // namespace

TEST_CASE("descriptors are none of the standard streams'", "[system_calls]") {
  const pid_t child = fork();
  if (child == 0) {
    close(0);
    close(1);
    close(2);
    const UniqueFd opened = os::open_file("/dev/null", O_RDONLY);
    const UniqueFd copied = os::duplicate(opened.get());
    const UniqueFd socket = os::unix_socket();
    const UniqueFd memory = os::memory_file("cohort-test");
    const bool right = opened.get() > 2 && copied.get() > 2 && socket.get() > 2 &&
                       memory.get() > 2 && fcntl(0, F_GETFD) < 0 && fcntl(2, F_GETFD) < 0;
    _exit(right ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("descriptors close on exec, and failures keep errno", "[system_calls]") {
  CHECK((fcntl(os::open_file("/dev/null", O_RDONLY).get(), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK((fcntl(os::unix_socket().get(), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK((fcntl(os::unix_socket().get(), F_GETFL) & O_NONBLOCK) != 0);
  errno = 0;
  CHECK_FALSE(static_cast<bool>(os::open_file("/nowhere", O_RDONLY)));
  CHECK(errno == ENOENT);
}

TEST_CASE("descriptors that are left are counted up to what is enough", "[system_calls]") {
  CHECK(os::descriptors_left(0) == 0);
  CHECK(os::descriptors_left(5) == 5);
  rlimit limits{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &limits) == 0);
  const UniqueFd lowest = os::open_file("/dev/null", O_RDONLY);
  rlimit few = limits;
  few.rlim_cur = static_cast<rlim_t>(lowest.get()) + 1;
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
  const int left = os::descriptors_left(1000);
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &limits) == 0);
  CHECK(left <= lowest.get());  // the numbers below it that are free, if any
  CHECK(os::descriptors_left(5) == 5);
}

TEST_CASE("a file's text, or why there is none", "[system_calls]") {
  const auto limits = os::read_text("/proc/self/limits");
  CHECK(limits.error == 0);
  CHECK_THAT(limits.text, contains("Max open files"));
  CHECK(os::read_text("/nowhere").error == ENOENT);
  CHECK(os::read_text("/proc/self").error == EISDIR);
}

TEST_CASE("waits end at their deadline, however often signals come", "[system_calls]") {
  for (const int period : {50, 200, 5000}) {
    const Signals signals(period);
    const Listener listener;
    const auto start = Clock::now();
    CHECK_FALSE(os::wait_ready(listener.socket.get(), POLLIN, start + 100ms));
    CHECK(Clock::now() >= start + 100ms);
    CHECK(Clock::now() < start + 10s);
  }
}

TEST_CASE("a full queue of connections ends at the deadline", "[system_calls]") {
  const Listener listener;
  std::vector<UniqueFd> waiting;
  int code = 0;
  while (code == 0 && waiting.size() < 100) {
    waiting.push_back(os::unix_socket());
    code = os::connect_within(waiting.back().get(), listener.generic(), listener.size,
                              Clock::now() + 50ms);
  }
  CHECK(code == ETIMEDOUT);
  // And goes on where room is made meanwhile.
  const auto accepted = os::accept_now(listener.socket.get());
  CHECK(static_cast<bool>(accepted));
  CHECK(os::connect_within(waiting.back().get(), listener.generic(), listener.size,
                           Clock::now() + 10s) == 0);
  CHECK(os::connect_within(os::unix_socket().get(), nullptr, 0, Clock::now() + 1s) != 0);
}

TEST_CASE("nothing waits for bytes that do not come", "[system_calls]") {
  int pair[2];
  REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  const UniqueFd mine(pair[0]);
  const UniqueFd theirs(pair[1]);
  char bytes[8] = {};
  CHECK(os::receive_now(mine.get(), bytes, sizeof(bytes)) == -1);
  CHECK(errno == EAGAIN);
  CHECK(os::send_now(theirs.get(), "x", 1) == 1);
  CHECK(os::receive_now(mine.get(), bytes, sizeof(bytes)) == 1);
  const Listener listener;
  CHECK_FALSE(static_cast<bool>(os::accept_now(listener.socket.get())));
  CHECK(errno == EAGAIN);
}

TEST_CASE("a lock is held by one and given up at the deadline", "[system_calls]") {
  UniqueFd first = os::open_file("/tmp", O_RDONLY | O_DIRECTORY);
  const UniqueFd second = os::open_file("/tmp", O_RDONLY | O_DIRECTORY);
  if (skip_if(!os::lock_file(first.get(), Clock::now() + 10s), "/tmp is locked by others")) {
    return;
  }
  CHECK_FALSE(os::lock_file(second.get(), Clock::now() + 20ms));
  first.reset();
  CHECK(os::lock_file(second.get(), Clock::now() + 10s));
}

TEST_CASE("signals wait while they are blocked", "[system_calls]") {
  static volatile std::sig_atomic_t seen = 0;
  struct sigaction action {};
  struct sigaction before {};
  action.sa_handler = [](int) { seen = 1; };
  sigaction(SIGUSR1, &action, &before);
  {
    const os::SignalsBlocked blocked;
    pthread_kill(pthread_self(), SIGUSR1);
    CHECK(seen == 0);
  }
  CHECK(seen == 1);
  sigaction(SIGUSR1, &before, nullptr);
}

TEST_CASE("anonymous pages are taken at once", "[system_calls]") {
  constexpr std::size_t kBytes = std::size_t{4} << 20;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  CHECK(os::take_pages(static_cast<std::byte*>(memory), kBytes) == 0);
  std::vector<unsigned char> resident(kBytes / 4096);
  REQUIRE(mincore(memory, kBytes, resident.data()) == 0);
  CHECK(
      std::all_of(resident.begin(), resident.end(), [](unsigned char r) { return (r & 1) != 0; }));
  munmap(memory, kBytes);
}
