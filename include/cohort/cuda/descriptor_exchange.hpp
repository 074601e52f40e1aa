// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/cuda/process_identity.hpp"
#include "cohort/error.hpp"
#include "cohort/system_calls.hpp"

/// \file
/// File descriptors between the ranks of a group on one machine: taken over by `pidfd_getfd` where
/// the kernel permits it, otherwise passed over Unix sockets. They go only to and come only from
/// processes of the same user that the control plane named. Needs no CUDA.

namespace cohort {

/// How descriptors may travel. `automatic` tries pidfd_getfd first; `socket` is for tests and for
/// machines where taking descriptors over is audited.
enum class DescriptorRoute : std::uint8_t { automatic, socket };

/// Outcome of an exchange on this rank.
struct ReceivedDescriptors {
  std::vector<UniqueFd> descriptors;  ///< By rank; the own entry is empty.
  std::string refusal;                ///< Why some are missing; empty where all are there.
};

namespace detail {

/// A plain value from every rank. Collective.
template <class T>
[[nodiscard]] std::vector<T> gather_values(ControlPlane& group, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto all = group.all_gather(std::as_bytes(std::span(&mine, 1)));
  std::vector<T> values(all.size());
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].size() != sizeof(T)) {
      throw SymmetryError(fmt::format("group {}: rank {} sent {} bytes where {} were expected",
                                      group.name(), r, all[r].size(), sizeof(T)),
                          {static_cast<int>(r)});
    }
    std::memcpy(&values[r], all[r].data(), sizeof(T));
  }
  return values;
}

/// A text from every rank. Collective.
[[nodiscard]] inline std::vector<std::string> gather_texts(ControlPlane& group,
                                                           const std::string& mine) {
  std::vector<std::string> texts;
  for (const auto& bytes : group.all_gather(std::as_bytes(std::span(mine)))) {
    texts.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  return texts;
}

/// Takes a descriptor over from the process that `owner` names. Sets `problem` where it cannot.
[[nodiscard]] inline UniqueFd take_descriptor(const ProcessIdentity& owner, int descriptor,
                                              const ProcessIdentity& me, std::string& problem) {
#if defined(SYS_pidfd_open) && defined(SYS_pidfd_getfd)
  if (owner.pid_namespace != me.pid_namespace) {
    problem = "the processes have different process namespaces";
    return {};
  }
  const UniqueFd process = os::keep(
      static_cast<int>(os::repeat([&] { return ::syscall(SYS_pidfd_open, owner.pid, 0U); })));
  if (!process) {
    problem = os::error_text("pidfd_open", errno);
    return {};
  }
  // The descriptor of the process pins it, so what /proc says of the number is about the process.
  const std::string pid = std::to_string(owner.pid);
  struct stat entry {};
  if (::stat(("/proc/" + pid).c_str(), &entry) != 0 || entry.st_uid != ::geteuid() ||
      process_start_time(pid) != owner.start_time) {
    problem = fmt::format("process {} is not the one that the group named, or another user's", pid);
    return {};
  }
  UniqueFd taken = os::keep(static_cast<int>(
      os::repeat([&] { return ::syscall(SYS_pidfd_getfd, process.get(), descriptor, 0U); })));
  if (!taken) {
    problem = os::error_text("pidfd_getfd", errno);
  }
  return taken;
#else
  static_cast<void>(owner);
  static_cast<void>(descriptor);
  static_cast<void>(me);
  problem = "pidfd_getfd is not known on this system";
  return {};
#endif
}

/// Who is at the other end of a connected Unix socket, as the kernel knows it; nobody, with a user
/// that no process has, where it does not say.
[[nodiscard]] inline ucred peer_of(int socket) noexcept {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return {.pid = 0, .uid = static_cast<uid_t>(-1), .gid = static_cast<gid_t>(-1)};
  }
  return credentials;
}

/// Whether the peer is the process that was named. Its number compares only where both processes
/// count in the same namespace.
[[nodiscard]] inline bool is_peer(const ucred& peer, const ProcessIdentity& named,
                                  const ProcessIdentity& me) noexcept {
  return peer.uid == me.uid && named.uid == me.uid &&
         (named.pid_namespace != me.pid_namespace || peer.pid == named.pid);
}

/// Why nothing of a rank can be had, whatever the route; empty where it can.
[[nodiscard]] inline std::string obstacle_to(const ProcessIdentity& owner, int descriptor,
                                             const ProcessIdentity& me) {
  if (descriptor < 0) {
    return "has no memory that can be exported";
  }
  if (const auto error = owner.boot_id_error != 0 ? owner.boot_id_error : me.boot_id_error;
      error != 0) {
    return os::error_text("may be on another machine: a boot id could not be read",
                          static_cast<int>(error));
  }
  return owner.same_machine(me) ? "" : "runs on another machine";
}

/// What an importer says first on its connection.
struct DescriptorRequest {
  std::array<std::uint64_t, 2> secret{};  ///< The exporter's, as the control plane carried it.
  std::int32_t rank = -1;
};

/// The address of a rank's socket: in the abstract namespace, so nothing is left in the file
/// system, and under a name that cannot be guessed.
[[nodiscard]] inline sockaddr_un socket_address(std::uint64_t name, socklen_t& size) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string text = fmt::format("cohort-{:016x}", name);
  std::memcpy(address.sun_path + 1, text.data(), text.size());
  size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return address;
}

/// Listens under `name`; empty with `problem` where it cannot.
[[nodiscard]] inline UniqueFd listen_for_requests(std::uint64_t name, int backlog,
                                                  std::string& problem) {
  UniqueFd listener = os::unix_socket();
  socklen_t size = 0;
  const sockaddr_un address = socket_address(name, size);
  if (!listener || ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0 ||
      ::listen(listener.get(), backlog) != 0) {
    problem = os::error_text("listening on a Unix socket", errno);
    return {};
  }
  return listener;
}

/// Sends one byte that carries the descriptor.
[[nodiscard]] inline bool send_descriptor(int socket, int descriptor) {
  char byte = 0;
  iovec payload{.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
  return os::send_now(socket, message) == 1;
}

[[nodiscard]] inline UniqueFd receive_descriptor(int socket, Deadline deadline) {
  if (!os::wait_ready(socket, POLLIN, deadline)) {
    return {};
  }
  char byte = 0;
  iovec payload{.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  if (os::receive_now(socket, message) != 1) {
    return {};
  }
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS ||
      header->cmsg_len != CMSG_LEN(sizeof(int))) {
    return {};
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
  return os::keep(descriptor);
}

/// One rank's part in passing descriptors over sockets. All ranks first connect and say with whom
/// they could, then serve, then receive; no step waits for a later one of another rank, so the
/// order cannot deadlock. No socket blocks, and every wait ends at the deadline.
class SocketExchange {
 public:
  SocketExchange(std::span<const ProcessIdentity> ranks, int rank, Deadline deadline)
      : ranks_(ranks),
        rank_(rank),
        deadline_(deadline),
        connect_deadline_(connect_deadline(deadline)),
        connections_(ranks.size()) {}

  /// Asks rank `from`, which listens under `name`. False where that is refused; the peers are to
  /// learn it, because the exporter would wait.
  bool request(int from, std::uint64_t name) {
    const auto index = static_cast<std::size_t>(from);
    UniqueFd connection = os::unix_socket();
    if (!connection) {
      fail(os::error_text("socket", errno), from);
      return false;
    }
    socklen_t size = 0;
    const sockaddr_un address = socket_address(name, size);
    if (const int code = os::connect_within(
            connection.get(), reinterpret_cast<const sockaddr*>(&address), size, connect_deadline_);
        code != 0) {
      fail(os::error_text("connecting a Unix socket", code), from);
      return false;
    }
    if (!is_peer(peer_of(connection.get()), ranks_[index], me())) {
      fail("the socket belongs to a process that the group did not name", from);
      return false;
    }
    const DescriptorRequest request{.secret = ranks_[index].secret, .rank = rank_};
    if (os::send_now(connection.get(), &request, sizeof(request)) !=
        static_cast<ssize_t>(sizeof(request))) {
      fail(os::error_text("send", errno), from);
      return false;
    }
    connections_[index] = std::move(connection);
    return true;
  }

  /// Answers the requests of `expected` ranks, and nobody else's. A connection of a process that is
  /// none of theirs is closed before anything of it is read; one that says nothing stays open
  /// beside the others, so that it costs them nothing.
  void serve(int listener, int descriptor, std::vector<int> expected) {
    std::vector<UniqueFd> silent;
    while (!expected.empty()) {
      std::vector<pollfd> entries{{.fd = listener, .events = POLLIN, .revents = 0}};
      for (const auto& connection : silent) {
        entries.push_back({.fd = connection.get(), .events = POLLIN, .revents = 0});
      }
      if (!os::wait_ready(entries, deadline_)) {
        fail(errno == ETIMEDOUT ? "no request came within the time limit"
                                : os::error_text("poll", errno),
             expected.front());
        return;
      }
      for (std::size_t i = silent.size(); i > 0; --i) {  // from behind, because some are removed
        if (entries[i].revents != 0) {
          const auto at = silent.begin() + static_cast<std::ptrdiff_t>(i - 1);
          answer(at->get(), descriptor, expected);
          silent.erase(at);
        }
      }
      if (entries[0].revents != 0 && !welcome(listener, expected, silent)) {
        return;
      }
    }
  }

  /// What was asked for.
  void receive(std::vector<UniqueFd>& descriptors) {
    for (std::size_t r = 0; r < connections_.size(); ++r) {
      if (connections_[r]) {
        descriptors[r] = receive_descriptor(connections_[r].get(), deadline_);
        if (!descriptors[r]) {
          fail("no descriptor came over the socket", static_cast<int>(r));
        }
      }
    }
  }

  [[nodiscard]] const std::string& problem() const noexcept { return problem_; }

 private:
  [[nodiscard]] const ProcessIdentity& me() const {
    return ranks_[static_cast<std::size_t>(rank_)];
  }

  /// Accepts the next connection. False where this process cannot.
  bool welcome(int listener, const std::vector<int>& expected, std::vector<UniqueFd>& silent) {
    UniqueFd connection = os::accept_now(listener);
    if (!connection) {
      if (errno == EAGAIN || errno == ECONNABORTED) {
        return true;
      }
      fail(os::error_text("accept", errno), expected.front());
      return false;
    }
    const ucred peer = peer_of(connection.get());
    const bool known = std::any_of(expected.begin(), expected.end(), [&](int rank) {
      return is_peer(peer, ranks_[static_cast<std::size_t>(rank)], me());
    });
    if (known) {
      if (silent.size() >= kMostSilent) {
        silent.erase(silent.begin());
      }
      silent.push_back(std::move(connection));
    }
    return true;
  }

  /// Gives the descriptor to whom it is meant for. A request comes in one piece, or it is none.
  void answer(int connection, int descriptor, std::vector<int>& expected) {
    DescriptorRequest request;
    if (os::receive_now(connection, &request, sizeof(request)) !=
            static_cast<ssize_t>(sizeof(request)) ||
        request.secret != me().secret) {
      return;
    }
    const auto from = std::find(expected.begin(), expected.end(), request.rank);
    if (from == expected.end() ||
        !is_peer(peer_of(connection), ranks_[static_cast<std::size_t>(*from)], me())) {
      return;
    }
    if (!send_descriptor(connection, descriptor)) {
      fail(os::error_text("sendmsg", errno), *from);
    }
    expected.erase(from);
  }

  void fail(const std::string& text, int peer) {
    if (problem_.empty()) {
      problem_ = fmt::format("rank {} with rank {}: {}", rank_, peer, text);
    }
  }

  /// The peers listen already, so only a queue that strangers fill makes a connection wait. Ends
  /// well before a peer's wait for this rank does.
  static Deadline connect_deadline(Deadline deadline) {
    constexpr std::chrono::seconds kPatience{1};
    const auto now = Clock::now();
    return now + std::min<Clock::duration>(kPatience, (deadline - now) / 4);
  }
  /// Processes of this user that are in other namespaces cannot be told from ranks by their number
  /// and may be silent; the eldest goes first.
  static constexpr std::size_t kMostSilent = 256;

  std::span<const ProcessIdentity> ranks_;
  int rank_;
  Deadline deadline_;
  Deadline connect_deadline_;
  std::vector<UniqueFd> connections_;
  std::string problem_;
};

}  // namespace detail

/// Gives every rank its own copy of every other rank's descriptor. Collective; `descriptor` must
/// stay open until all ranks are done, which is for the caller to find out. All waits end at the
/// group's time limit. A descriptor that cannot be had is a refusal, not an exception.
/// Throws what the control plane throws.
[[nodiscard]] inline ReceivedDescriptors exchange_descriptors(
    ControlPlane& group, int descriptor, DescriptorRoute route = DescriptorRoute::automatic) {
  struct Offer {
    ProcessIdentity identity;
    std::int32_t descriptor = -1;
    std::int32_t unused = 0;
  };
  const auto size = static_cast<std::size_t>(group.size());
  const auto self = static_cast<std::size_t>(group.rank());
  const auto offers = detail::gather_values(group, Offer{this_process(), descriptor, 0});
  std::vector<ProcessIdentity> identities;
  for (const auto& offer : offers) {
    identities.push_back(offer.identity);
  }

  ReceivedDescriptors received;
  received.descriptors.resize(size);
  for (std::size_t r = 0; r < size; ++r) {
    if (const auto why = detail::obstacle_to(identities[r], offers[r].descriptor, identities[self]);
        !why.empty()) {
      received.refusal = fmt::format("rank {} {}", r, why);
    }
  }
  // Every rank saw the same offers, but who is on whose machine may look different to each.
  std::string wanted(size, '0');  // '1' where this rank needs a rank's descriptor over a socket
  std::string problem;
  for (std::size_t r = 0; r < size && received.refusal.empty(); ++r) {
    if (r == self) {
      continue;
    }
    if (identities[r].same_process(identities[self])) {
      received.descriptors[r] = os::duplicate(offers[r].descriptor);
    } else if (route == DescriptorRoute::automatic) {
      received.descriptors[r] =
          detail::take_descriptor(identities[r], offers[r].descriptor, identities[self], problem);
    }
    wanted[r] = received.descriptors[r] ? '0' : '1';
  }

  const auto needs = detail::gather_texts(group, received.refusal.empty() ? wanted : "");
  std::vector<int> mine;  // ranks that want this rank's descriptor
  bool sockets = false;
  for (std::size_t r = 0; r < size; ++r) {
    sockets = sockets || needs[r].find('1') != std::string::npos;
    if (needs[r].size() == size && needs[r][self] == '1') {
      mine.push_back(static_cast<int>(r));
    }
  }
  if (!sockets) {
    return received;
  }

  const std::uint64_t name = detail::random_word();
  UniqueFd listener;
  if (!mine.empty()) {
    listener = detail::listen_for_requests(name, SOMAXCONN, problem);
  }
  // A rank that cannot listen announces no name, and its peers do not wait for it.
  const auto names = detail::gather_values(group, mine.empty() || !listener ? 0 : name);
  detail::SocketExchange exchange(identities, group.rank(), Clock::now() + group.limit());
  std::string asked(size, '0');  // '1' where this rank has connected to a rank
  for (std::size_t r = 0; r < size; ++r) {
    if (wanted[r] == '1' && received.refusal.empty() && names[r] != 0 &&
        exchange.request(static_cast<int>(r), names[r])) {
      asked[r] = '1';
    }
  }
  const auto connected = detail::gather_texts(group, asked);
  std::erase_if(mine, [&](int rank) {
    const auto& theirs = connected[static_cast<std::size_t>(rank)];
    return theirs.size() != size || theirs[self] != '1';
  });
  if (listener) {
    exchange.serve(listener.get(), descriptor, mine);
    listener.reset();  // who was not served learns it
  }
  exchange.receive(received.descriptors);
  for (std::size_t r = 0; r < size && received.refusal.empty(); ++r) {
    if (wanted[r] == '1' && !received.descriptors[r]) {
      received.refusal = fmt::format(
          "rank {} got no descriptor of rank {}: {}{}{}", self, r, problem,
          problem.empty() || exchange.problem().empty() ? "" : "; ", exchange.problem());
    }
  }
  return received;
}

}  // namespace cohort
