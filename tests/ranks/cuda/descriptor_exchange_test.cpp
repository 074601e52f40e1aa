// SPDX-License-Identifier: Apache-2.0
#include "cohort/cuda/descriptor_exchange.hpp"

#include <dlfcn.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <vector>

#include "support/ranks.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

/// The call that a signal interrupts next.
std::string interrupted;

bool interrupt(const char* call) {
  if (interrupted != call) {
    return false;
  }
  interrupted.clear();
  errno = EINTR;
  return true;
}

template <class Function>
Function* real(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {
int accept4(int socket, sockaddr* address, socklen_t* size, int flags) {
  return interrupt("accept4") ? -1 : real(&accept4, "accept4")(socket, address, size, flags);
}
int connect(int socket, const sockaddr* address, socklen_t size) {
  return interrupt("connect") ? -1 : real(&connect, "connect")(socket, address, size);
}
ssize_t recv(int socket, void* data, std::size_t size, int flags) {
  return interrupt("recv") ? -1 : real(&recv, "recv")(socket, data, size, flags);
}
ssize_t recvmsg(int socket, msghdr* message, int flags) {
  return interrupt("recvmsg") ? -1 : real(&recvmsg, "recvmsg")(socket, message, flags);
}
ssize_t send(int socket, const void* data, std::size_t size, int flags) {
  return interrupt("send") ? -1 : real(&send, "send")(socket, data, size, flags);
}
ssize_t sendmsg(int socket, const msghdr* message, int flags) {
  return interrupt("sendmsg") ? -1 : real(&sendmsg, "sendmsg")(socket, message, flags);
}
}

namespace {

/// A socket of this process under a name of its own, with a queue of a given length.
class Listening {
 public:
  explicit Listening(int backlog) {
    std::string problem;
    listener_ = detail::listen_for_requests(name_, backlog, problem);
    REQUIRE(problem == "");
  }

  [[nodiscard]] int get() const { return listener_.get(); }
  [[nodiscard]] std::uint64_t name() const { return name_; }

  /// A connection that says nothing yet; none where the queue is full.
  [[nodiscard]] UniqueFd dial() const {
    UniqueFd socket = os::unix_socket();
    socklen_t size = 0;
    const sockaddr_un address = detail::socket_address(name_, size);
    if (os::connect_within(socket.get(), reinterpret_cast<const sockaddr*>(&address), size,
                           Clock::now()) != 0) {
      socket.reset();
    }
    return socket;
  }

 private:
  std::uint64_t name_ = detail::random_word();
  UniqueFd listener_;
};

bool say(const UniqueFd& socket, const detail::DescriptorRequest& request) {
  return os::send_now(socket.get(), &request, sizeof(request)) == sizeof(request);
}

/// A memory file that holds one rank's number.
UniqueFd file_of(int rank) {
  UniqueFd file(::memfd_create("cohort-test", MFD_CLOEXEC));
  const std::string text = "rank " + std::to_string(rank);
  REQUIRE(::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  return file;
}

std::string content(const UniqueFd& file) {
  char text[32] = {};
  const auto size = ::pread(file.get(), text, sizeof(text) - 1, 0);
  return size < 0 ? "unreadable" : std::string(text, static_cast<std::size_t>(size));
}

}  // namespace

TEST_CASE("every rank gets every other rank's descriptor", "[descriptor_exchange]") {
  const auto route =
      GENERATE(DescriptorRoute::automatic, DescriptorRoute::socket, DescriptorRoute::automatic);
  const UniqueFd mine = file_of(world_rank());
  const auto received = exchange_descriptors(world(), mine.get(), route);
  CHECK(received.refusal == "");
  for (int r = 0; r < world_size(); ++r) {
    const auto& file = received.descriptors[static_cast<std::size_t>(r)];
    CHECK(static_cast<bool>(file) == (r != world_rank()));
    if (file) {
      CHECK(content(file) == "rank " + std::to_string(r));
    }
  }
  world().barrier();  // the own descriptor stays open until all have theirs
}

TEST_CASE("a rank without a descriptor is a refusal on every rank", "[descriptor_exchange]") {
  const UniqueFd mine = file_of(world_rank());
  const int last = world_size() - 1;
  const auto received = exchange_descriptors(world(), world_rank() == last ? -1 : mine.get());
  CHECK_THAT(received.refusal, contains("rank " + std::to_string(last), "no memory"));
  world().barrier();
}

TEST_CASE("signals interrupt no exchange", "[descriptor_exchange]") {
  for (const char* call : {"accept4", "connect", "recv", "recvmsg", "send", "sendmsg"}) {
    const UniqueFd mine = file_of(world_rank());
    world().barrier();
    if (world_rank() == 0) {
      interrupted = call;
    }
    const auto received = exchange_descriptors(world(), mine.get(), DescriptorRoute::socket);
    INFO(call);
    CHECK(received.refusal == "");
    if (world_rank() == 0) {
      CHECK(interrupted == "");
    }
    interrupted.clear();
    world().barrier();
  }
}

TEST_CASE("a stranger on the socket gets nothing and stops nobody", "[descriptor_exchange]") {
  const ProcessIdentity me = this_process();
  const UniqueFd mine = file_of(world_rank());
  const Listening listener(64);
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 40; ++i) {
    silent.push_back(listener.dial());
    REQUIRE(static_cast<bool>(silent.back()));
  }
  const UniqueFd brief = listener.dial();
  REQUIRE(os::send_now(brief.get(), "x", 1) == 1);
  const UniqueFd stranger = listener.dial();
  REQUIRE(say(stranger, {.secret = {1, 2}, .rank = 0}));
  const UniqueFd friendly = listener.dial();
  REQUIRE(say(friendly, {.secret = me.secret, .rank = 0}));

  const std::vector<ProcessIdentity> ranks{me};
  const auto start = Clock::now();
  const Deadline deadline = start + std::chrono::seconds(20);
  detail::SocketExchange exchange(ranks, 0, deadline);
  exchange.serve(listener.get(), mine.get(), {0});
  CHECK(Clock::now() - start < std::chrono::seconds(10));  // 40 that say nothing cost nothing
  CHECK(exchange.problem() == "");
  const UniqueFd got = detail::receive_descriptor(friendly.get(), deadline);
  CHECK(content(got) == content(mine));
  CHECK_FALSE(static_cast<bool>(detail::receive_descriptor(stranger.get(), deadline)));
  CHECK_FALSE(static_cast<bool>(detail::receive_descriptor(brief.get(), deadline)));
}

TEST_CASE("a request that does not come ends the service at its limit", "[descriptor_exchange]") {
  const ProcessIdentity me = this_process();
  const UniqueFd mine = file_of(world_rank());
  const Listening listener(4);
  const UniqueFd brief = listener.dial();
  REQUIRE(os::send_now(brief.get(), "x", 1) == 1);
  const std::vector<ProcessIdentity> ranks{me};
  const auto start = Clock::now();
  detail::SocketExchange exchange(ranks, 0, start + std::chrono::seconds(1));
  exchange.serve(listener.get(), mine.get(), {0});
  CHECK(Clock::now() - start < std::chrono::seconds(5));
  CHECK_THAT(exchange.problem(), contains("no request came within the time limit"));
}

TEST_CASE("a queue that strangers fill ends a request", "[descriptor_exchange]") {
  const std::vector<ProcessIdentity> ranks{this_process()};
  const Listening listener(1);
  std::vector<UniqueFd> queue;
  while (queue.empty() || queue.back()) {
    queue.push_back(listener.dial());
    REQUIRE(queue.size() < 100);
  }
  const auto start = Clock::now();
  detail::SocketExchange exchange(ranks, 0, start + std::chrono::seconds(4));
  CHECK_FALSE(exchange.request(0, listener.name()));
  CHECK(Clock::now() - start < std::chrono::seconds(4));
  CHECK_THAT(exchange.problem(), contains("connecting a Unix socket", "timed out"));
}

TEST_CASE("nothing of a process that the group did not name is read", "[descriptor_exchange]") {
  const ProcessIdentity me = this_process();
  const UniqueFd mine = file_of(world_rank());
  const Listening listener(4);
  const auto said_and_closed = [&](const ProcessIdentity& named, const UniqueFd& connection) {
    REQUIRE(say(connection, {.secret = me.secret, .rank = 0}));
    const std::vector<ProcessIdentity> ranks{named};
    detail::SocketExchange exchange(ranks, 0, Clock::now() + std::chrono::milliseconds(300));
    exchange.serve(listener.get(), mine.get(), {0});
    CHECK_THAT(exchange.problem(), contains("no request came"));
    // A socket that closes with bytes unread resets the connection (unix(7)'s ECONNRESET).
    char byte = 0;
    CHECK(os::receive_now(connection.get(), &byte, 1) == -1);
    CHECK(errno == ECONNRESET);
  };
  ProcessIdentity other = me;
  other.pid += 1;
  said_and_closed(other, listener.dial());

  // Connected by a process of another user, whose credentials the connection keeps.
  if (geteuid() == 0) {
    const UniqueFd connection = os::unix_socket();
    const pid_t child = fork();
    if (child == 0) {
      socklen_t size = 0;
      const sockaddr_un address = detail::socket_address(listener.name(), size);
      _exit(setuid(65534) == 0 && connect(connection.get(),
                                          reinterpret_cast<const sockaddr*>(&address), size) == 0
                ? 0
                : 1);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(status == 0);
    other = me;
    other.pid = child;
    said_and_closed(other, connection);
  }
}

// Changes the process for good.
TEST_CASE("ranks behind network names of their own refuse at once", "[.own_network]") {
  if (skip_all_if(unshare(CLONE_NEWNET) != 0, "needs the right to make network namespaces")) {
    return;
  }
  const UniqueFd mine = file_of(world_rank());
  const auto start = Clock::now();
  const auto received = exchange_descriptors(world(), mine.get(), DescriptorRoute::socket);
  CHECK(Clock::now() - start < world().limit() / 2);
  CHECK_THAT(received.refusal, contains("connecting a Unix socket", "refused"));
  world().barrier();
}

TEST_CASE("a process of another start, or another user, is not touched", "[descriptor_exchange]") {
  const ProcessIdentity me = this_process();
  const UniqueFd mine = file_of(world_rank());
  ProcessIdentity other = me;
  other.start_time += 1;
  std::string problem;
  CHECK_FALSE(static_cast<bool>(detail::take_descriptor(other, mine.get(), me, problem)));
  CHECK_THAT(problem, contains("not the one that the group named"));
  other = me;
  other.pid_namespace += 1;
  CHECK_FALSE(static_cast<bool>(detail::take_descriptor(other, mine.get(), me, problem)));
  CHECK_THAT(problem, contains("namespaces"));
}
