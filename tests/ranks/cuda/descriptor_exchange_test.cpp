#include "cohort/cuda/descriptor_exchange.hpp"

#include <sys/mman.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <string>

#include "support/ranks.hpp"

using namespace cohort;
using namespace cohort::test;

namespace {

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

TEST_CASE("a stranger on the socket gets nothing and stops nobody", "[descriptor_exchange]") {
  const ProcessIdentity me = this_process();
  const UniqueFd mine = file_of(world_rank());
  const std::uint64_t name = detail::random_word();
  std::string problem;
  const UniqueFd listener = detail::listen_for_requests(name, 4, problem);
  REQUIRE(static_cast<bool>(listener));

  const auto connect = [&](detail::DescriptorRequest request) {
    UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    socklen_t size = 0;
    const sockaddr_un address = detail::socket_address(name, size);
    REQUIRE(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0);
    REQUIRE(::send(socket.get(), &request, sizeof(request), MSG_NOSIGNAL) == sizeof(request));
    return socket;
  };
  const UniqueFd stranger = connect({.secret = {1, 2}, .rank = 0});
  const UniqueFd friendly = connect({.secret = me.secret, .rank = 0});

  const std::vector<ProcessIdentity> ranks{me};
  const Deadline deadline = Clock::now() + std::chrono::seconds(10);
  detail::SocketExchange exchange(ranks, 0, deadline);
  exchange.serve(listener.get(), mine.get(), {0});
  CHECK(exchange.problem() == "");
  const UniqueFd got = detail::receive_descriptor(friendly.get(), deadline);
  CHECK(content(got) == content(mine));
  CHECK_FALSE(static_cast<bool>(detail::receive_descriptor(stranger.get(), deadline)));
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
