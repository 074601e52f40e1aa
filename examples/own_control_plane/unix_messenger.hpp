// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cohort/error.hpp>
#include <cohort/log.hpp>
#include <cohort/messenger.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

/// \file
/// What an engine brings to have its own control plane: a `cohort::Messenger`, here over Unix
/// sockets between the processes of one machine.

namespace own_control_plane {

using cohort::Bytes;
using cohort::Clock;
using cohort::Deadline;
using cohort::TransportError;

/// Throws the `TransportError` of a system call that failed.
[[noreturn]] inline void fail(const char* call, int rank, int error = errno) {
  throw TransportError({.call = call, .native_code = error, .rank = rank},
                       std::generic_category().message(error));
}

/// Waits until the descriptor is ready, or the deadline: false.
inline bool wait_for(int fd, short events, Deadline deadline) {
  pollfd entry{.fd = fd, .events = events, .revents = 0};
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    const int limit = static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 60'000));
    if (::poll(&entry, 1, limit) > 0) {
      return true;
    }
    if (Clock::now() >= deadline) {
      return false;
    }
  }
}

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
  }

  [[nodiscard]] int fd() const noexcept { return fd_; }
  [[nodiscard]] bool open() const noexcept { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

[[nodiscard]] inline Socket make_socket(int rank) {
  Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.open()) {
    fail("socket", rank);
  }
  return socket;
}

/// Address of a rank, in Linux's abstract name space: no file, so none is left after a kill -9.
/// Anyone on the machine can connect to such a name or take it, hence `check_same_user`.
struct Address {
  sockaddr_un name{};
  socklen_t length = 0;

  Address(const std::string& job, int rank) {
    const std::string text = fmt::format("{}-{}", job, rank);
    if (text.size() + 1 > sizeof(name.sun_path)) {
      throw cohort::ConfigError(
          fmt::format("name of the job: expected at most 90 characters, got "
                      "{}",
                      job.size()));
    }
    name.sun_family = AF_UNIX;
    std::copy(text.begin(), text.end(), name.sun_path + 1);  // the leading zero makes it abstract
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  }
  [[nodiscard]] const sockaddr* get() const noexcept {
    return reinterpret_cast<const sockaddr*>(&name);
  }
};

/// Both ends ask the kernel who is on the other: only processes of the same user talk.
inline void check_same_user(const Socket& socket, int rank) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  if (::getsockopt(socket.fd(), SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
    fail("getsockopt(SO_PEERCRED)", rank);
  }
  if (peer.uid != ::geteuid()) {
    throw TransportError(
        {.call = "getsockopt(SO_PEERCRED)", .native_code = EPERM, .rank = rank},
        fmt::format("process {} of user {} is at the other end", peer.pid, peer.uid));
  }
}

/// Messages between the processes of one job. Each pair of ranks has a connection; a message is its
/// length and its bytes. Sends never wait: what a socket does not take is kept and goes out during
/// later calls.
class UnixMessenger final : public cohort::Messenger {
 public:
  /// Connects all ranks of `job`; each passes the same name, which no other job on the machine has.
  /// Throws `TimeoutError` naming the ranks that did not come within the limit.
  UnixMessenger(const std::string& job, int rank, int size, std::chrono::milliseconds limit)
      : rank_(rank), limit_(limit), peers_(static_cast<std::size_t>(size)) {
    const Deadline deadline = Clock::now() + limit;
    const Socket listener = listen_at(Address(job, rank));
    for (int to = 0; to < rank; ++to) {
      connect_to(to, Address(job, to), deadline);
    }
    for (int higher = rank + 1; higher < size; ++higher) {
      accept_one(listener, deadline);
    }
  }

  /// Waits for what has not gone out, unless a wait has already failed.
  ~UnixMessenger() override {
    const Deadline deadline = Clock::now() + (abandoned_ ? std::chrono::milliseconds(0) : limit_);
    try {
      while (unsent() && Clock::now() < deadline) {
        progress(std::min(deadline, Clock::now() + std::chrono::milliseconds(10)));
      }
    } catch (const std::exception& error) {
      cohort::log(cohort::LogLevel::error, error.what());
    }
    if (unsent() && !abandoned_) {
      cohort::log(cohort::LogLevel::error, "rank {}: messages were lost", rank_);
    }
  }

  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int size() const noexcept override { return static_cast<int>(peers_.size()); }

  void send(int to, Bytes message) override {
    auto& peer = at(to);
    throw_if_gone(peer, to, "send");
    const std::uint64_t length = message.size();
    Bytes frame(sizeof(length) + message.size());
    std::memcpy(frame.data(), &length, sizeof(length));
    std::copy(message.begin(), message.end(), frame.begin() + sizeof(length));
    peer.outgoing.push_back(std::move(frame));  // whole, or nothing of it where memory is short
    write_some(peer);
  }

  std::optional<Bytes> receive(int from, Deadline deadline) override {
    auto& peer = at(from);
    cut_messages(peer);  // where there was no memory for them before
    while (true) {
      progress(peer.arrived.empty() ? deadline : Clock::now());
      if (!peer.arrived.empty()) {
        Bytes message = std::move(peer.arrived.front());
        peer.arrived.pop_front();
        return message;
      }
      throw_if_gone(peer, from, "recv");
      if (Clock::now() >= deadline) {
        return std::nullopt;
      }
    }
  }

  void abandon() noexcept override { abandoned_ = true; }

 private:
  struct Peer {
    Socket socket;
    std::deque<Bytes> outgoing;
    std::size_t written = 0;  // of the first of `outgoing`
    Bytes incoming;           // the message that is arriving, its length in front
    std::size_t cut = 0;      // of `incoming`, what is in `arrived` already
    std::deque<Bytes> arrived;
    bool gone = false;
  };

  // A stream out of step must not make this process allocate what a random length says.
  static constexpr std::uint64_t kLongest = std::uint64_t{1} << 34;

  Peer& at(int rank) { return peers_.at(static_cast<std::size_t>(rank)); }

  [[nodiscard]] bool unsent() const {
    return std::any_of(peers_.begin(), peers_.end(),
                       [](const Peer& p) { return !p.gone && !p.outgoing.empty(); });
  }

  void throw_if_gone(const Peer& peer, int rank, const char* call) const {
    if (peer.gone) {
      throw TransportError({.call = call, .native_code = EPIPE, .rank = rank_},
                           fmt::format("rank {} has left", rank));
    }
  }

  [[nodiscard]] Socket listen_at(const Address& address) const {
    Socket listener = make_socket(rank_);
    if (::bind(listener.fd(), address.get(), address.length) != 0) {
      fail("bind", rank_);
    }
    if (::listen(listener.fd(), size()) != 0) {
      fail("listen", rank_);
    }
    return listener;
  }

  void connect_to(int to, const Address& address, Deadline deadline) {
    Socket socket = make_socket(rank_);
    // Refused until the other rank listens; EAGAIN while its queue is full.
    while (::connect(socket.fd(), address.get(), address.length) != 0) {
      if (errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR) {
        fail("connect", rank_);
      }
      if (Clock::now() >= deadline) {
        time_out({to});
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    check_same_user(socket, rank_);
    const std::int32_t mine = rank_;
    if (::send(socket.fd(), &mine, sizeof(mine), MSG_NOSIGNAL) != sizeof(mine)) {
      fail("send", rank_);
    }
    at(to).socket = std::move(socket);
  }

  void accept_one(const Socket& listener, Deadline deadline) {
    while (true) {
      if (!wait_for(listener.fd(), POLLIN, deadline)) {
        time_out(missing());
      }
      Socket socket(::accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!socket.open()) {
        if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) {
          continue;
        }
        fail("accept4", rank_);
      }
      try {
        check_same_user(socket, rank_);
      } catch (const TransportError& error) {
        cohort::log(cohort::LogLevel::warning, error.what());  // a stranger must not end the job
        continue;
      }
      std::int32_t theirs = -1;
      if (!wait_for(socket.fd(), POLLIN, deadline)) {
        time_out(missing());
      }
      const bool whole = ::recv(socket.fd(), &theirs, sizeof(theirs), 0) == sizeof(theirs);
      if (!whole || theirs <= rank_ || theirs >= size() || at(theirs).socket.open()) {
        throw TransportError({.call = "accept4", .native_code = EPROTO, .rank = rank_},
                             fmt::format("a process introduces itself as rank {}", theirs));
      }
      at(theirs).socket = std::move(socket);
      return;
    }
  }

  [[nodiscard]] std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int r = rank_ + 1; r < size(); ++r) {
      if (!peers_[static_cast<std::size_t>(r)].socket.open()) {
        ranks.push_back(r);
      }
    }
    return ranks;
  }

  [[noreturn]] void time_out(const std::vector<int>& ranks) const {
    throw cohort::TimeoutError(fmt::format("connecting rank {}: rank {} did not come within {} ms",
                                           rank_, fmt::join(ranks, ", "), limit_.count()),
                               ranks);
  }

  /// Moves bytes both ways on all connections; waits for the first of them at most until then.
  void progress(Deadline deadline) {
    std::vector<pollfd> entries;
    std::vector<Peer*> owners;
    for (auto& peer : peers_) {
      if (peer.socket.open() && !peer.gone) {
        const auto events = static_cast<short>(peer.outgoing.empty() ? POLLIN : POLLIN | POLLOUT);
        entries.push_back({.fd = peer.socket.fd(), .events = events, .revents = 0});
        owners.push_back(&peer);
      }
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    const int limit = static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 60'000));
    if (::poll(entries.data(), entries.size(), limit) < 0 && errno != EINTR) {
      fail("poll", rank_);
    }
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if ((entries[i].revents & POLLOUT) != 0) {
        write_some(*owners[i]);
      }
      if ((entries[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
        read_some(*owners[i]);
      }
    }
  }

  void write_some(Peer& peer) {
    while (!peer.gone && !peer.outgoing.empty()) {
      const auto& front = peer.outgoing.front();
      const auto sent = ::send(peer.socket.fd(), front.data() + peer.written,
                               front.size() - peer.written, MSG_NOSIGNAL);
      if (sent < 0) {
        if (errno == EPIPE || errno == ECONNRESET) {
          peer.gone = true;  // what it sent before is still to be read
          drain(peer);
        } else if (errno != EAGAIN && errno != EINTR) {
          fail("send", rank_);
        }
        return;
      }
      peer.written += static_cast<std::size_t>(sent);
      if (peer.written == front.size()) {
        peer.outgoing.pop_front();
        peer.written = 0;
      }
    }
  }

  /// Reads what there is; false at the end of the connection. Nothing is lost where memory is
  /// short: the room comes before what is read into it.
  bool read_some(Peer& peer) {
    constexpr std::size_t kChunk = std::size_t{64} << 10;
    const std::size_t before = peer.incoming.size();
    peer.incoming.resize(before + kChunk);
    const auto got = ::recv(peer.socket.fd(), peer.incoming.data() + before, kChunk, 0);
    peer.incoming.resize(before + static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
      return true;
    }
    if (got < 0 && errno != ECONNRESET) {
      fail("recv", rank_);
    }
    if (got <= 0) {
      peer.gone = true;
      return false;
    }
    cut_messages(peer);
    return true;
  }

  void drain(Peer& peer) {
    while (wait_for(peer.socket.fd(), POLLIN, Clock::now()) && read_some(peer)) {
    }
  }

  void cut_messages(Peer& peer) {
    std::uint64_t length = 0;
    while (peer.incoming.size() - peer.cut >= sizeof(length)) {
      std::memcpy(&length, peer.incoming.data() + peer.cut, sizeof(length));
      if (length > kLongest) {
        fail("recv", rank_, EBADMSG);
      }
      const std::size_t body = peer.cut + sizeof(length);
      if (peer.incoming.size() - body < length) {
        break;
      }
      const auto first = peer.incoming.begin() + static_cast<std::ptrdiff_t>(body);
      peer.arrived.emplace_back(first, first + static_cast<std::ptrdiff_t>(length));
      peer.cut = body + length;
    }
    peer.incoming.erase(peer.incoming.begin(),
                        peer.incoming.begin() + static_cast<std::ptrdiff_t>(peer.cut));
    peer.cut = 0;
  }

  int rank_;
  std::chrono::milliseconds limit_;
  std::vector<Peer> peers_;  // by rank; the own entry stays empty
  bool abandoned_ = false;
};

}  // namespace own_control_plane
