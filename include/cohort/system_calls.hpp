// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "cohort/log.hpp"
#include "cohort/poll_pause.hpp"

/// \file
/// The system calls of the library that a signal can interrupt or that could wait: repeated where
/// they were interrupted, and never waiting beyond a deadline. Descriptors that they return close
/// on exec and are none of 0 to 2. Failures are `errno` values, for the caller to make errors of.

namespace cohort {

/// Owns a file descriptor.
class UniqueFd {
 public:
  UniqueFd() = default;
  /// Owns the descriptor; negative for none.
  explicit UniqueFd(int descriptor) noexcept : descriptor_(descriptor) {}
  /// Takes it over.
  UniqueFd(UniqueFd&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  /// Closes what it had and takes the other's.
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      reset();
      descriptor_ = std::exchange(other.descriptor_, -1);
    }
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  /// The descriptor, negative for none.
  [[nodiscard]] int get() const noexcept { return descriptor_; }
  /// Whether there is one.
  [[nodiscard]] explicit operator bool() const noexcept { return descriptor_ >= 0; }

  /// Not repeated when interrupted: Linux has let the number go by then, and another thread may
  /// have it already (close(2)).
  void reset() noexcept {
    if (const int code = close(); code != 0) {
      log(LogLevel::warning, "close of a descriptor failed: {}", strerror(code));
    }
  }
  /// The same for a file that was written, where a full one may say so only now: 0 or errno.
  [[nodiscard]] int close() noexcept {
    const bool closed =
        descriptor_ < 0 || ::close(std::exchange(descriptor_, -1)) == 0 || errno == EINTR;
    return closed ? 0 : errno;
  }

 private:
  int descriptor_ = -1;
};

namespace os {

/// Of deadlines.
using TimePoint = std::chrono::steady_clock::time_point;

/// "connect: Connection refused".
[[nodiscard]] inline std::string error_text(const char* call, int code) {
  return fmt::format("{}: {}", call, std::generic_category().message(code));
}

/// Calls until no signal interrupts it. For calls that do not wait, so that this ends.
template <class Call>
auto repeat(const Call& call) {
  while (true) {
    const auto result = call();
    if (result != -1 || errno != EINTR) {
      return result;
    }
  }
}

/// Owns what a call returned. A process that closed its standard streams gets their numbers for
/// whatever is opened next, and what it prints would then go there: such a number is changed.
/// Keeps `errno` where the call failed.
[[nodiscard]] inline UniqueFd keep(int descriptor) noexcept {
  UniqueFd owned(descriptor);
  if (descriptor < 0 || descriptor > STDERR_FILENO) {
    return owned;
  }
  UniqueFd moved(repeat([&] { return ::fcntl(descriptor, F_DUPFD_CLOEXEC, STDERR_FILENO + 1); }));
  const int code = errno;
  owned.reset();
  errno = code;
  return moved;
}

/// Another descriptor of the same file.
[[nodiscard]] inline UniqueFd duplicate(int descriptor) noexcept {
  return UniqueFd(repeat([&] { return ::fcntl(descriptor, F_DUPFD_CLOEXEC, STDERR_FILENO + 1); }));
}

/// open(2) with O_CLOEXEC, again where a signal came between; errno where it fails. `mode` is that
/// of a file which it makes.
[[nodiscard]] inline UniqueFd open_file(const std::string& path, int flags,
                                        mode_t mode = 0) noexcept {
  return keep(repeat([&] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); }));
}

/// How many descriptors the process may still open, counted up to `enough`. Another thread may take
/// them meanwhile.
[[nodiscard]] inline int descriptors_left(int enough) {
  std::vector<UniqueFd> taken;
  taken.reserve(static_cast<std::size_t>(enough));
  while (static_cast<int>(taken.size()) < enough) {
    UniqueFd next = taken.empty() ? open_file("/dev/null", O_RDONLY) : duplicate(taken[0].get());
    if (!next) {
      break;
    }
    taken.push_back(std::move(next));
  }
  return static_cast<int>(taken.size());
}

/// Content of a small file such as those of /proc, or why it cannot be read.
struct TextFile {
  std::string text;  ///< What the file holds.
  int error = 0;     ///< errno where it could not be read.
};

/// A whole small file.
[[nodiscard]] inline TextFile read_text(const std::string& path) {
  TextFile file;
  const UniqueFd descriptor = open_file(path, O_RDONLY);
  if (!descriptor) {
    file.error = errno;
    return file;
  }
  std::array<char, 4096> piece{};
  while (true) {
    const ssize_t size =
        repeat([&] { return ::read(descriptor.get(), piece.data(), piece.size()); });
    if (size < 0) {
      file.error = errno;
    }
    if (size <= 0) {
      return file;
    }
    file.text.append(piece.data(), static_cast<std::size_t>(size));
  }
}

/// Fills `out` with random bytes; 0 or errno.
[[nodiscard]] inline int random_bytes(std::span<std::byte> out) noexcept {
  while (!out.empty()) {
    const ssize_t size = repeat([&] { return ::getrandom(out.data(), out.size(), 0); });
    if (size < 0) {
      return errno;
    }
    out = out.subspan(static_cast<std::size_t>(size));
  }
  return 0;
}

// --- waits ---------------------------------------------------------------------------------------

/// Waits until one of the descriptors is ready, but not beyond the deadline. False at the deadline
/// or with `errno`.
[[nodiscard]] inline bool wait_ready(std::span<pollfd> entries, TimePoint deadline) noexcept {
  while (true) {
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now())
            .count();
    const int ready = ::poll(entries.data(), entries.size(),
                             static_cast<int>(std::clamp<long long>(left, 0, 1000)));
    if (ready > 0) {
      return true;
    }
    if ((ready < 0 && errno != EINTR) || left <= 0) {
      errno = ready < 0 ? errno : ETIMEDOUT;
      return false;
    }
  }
}

/// poll(2) for `events` until the deadline; false when it passed.
[[nodiscard]] inline bool wait_ready(int descriptor, short events, TimePoint deadline) noexcept {
  pollfd entry{.fd = descriptor, .events = events, .revents = 0};
  return wait_ready(std::span(&entry, 1), deadline);
}

/// An exclusive lock of a file, held until the descriptor closes; an unlocked one at the deadline.
[[nodiscard]] inline bool lock_file(int descriptor, TimePoint deadline) noexcept {
  constexpr std::chrono::milliseconds kNap{1};
  while (repeat([&] { return ::flock(descriptor, LOCK_EX | LOCK_NB); }) != 0) {
    if (errno != EWOULDBLOCK || std::chrono::steady_clock::now() >= deadline) {
      return false;
    }
    detail::nap(kNap);
  }
  return true;
}

// --- sockets, all of them non-blocking -----------------------------------------------------------

/// A stream socket of this machine, not yet connected.
[[nodiscard]] inline UniqueFd unix_socket() noexcept {
  return keep(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
}

/// Connects within the deadline; 0 or errno. A Unix socket connects at once or, where the other
/// end's queue is full, not yet, which nothing but trying again can find out (unix(7)).
[[nodiscard]] inline int connect_within(int socket, const sockaddr* address, socklen_t size,
                                        TimePoint deadline) noexcept {
  constexpr std::chrono::milliseconds kNap{1};
  while (repeat([&] { return ::connect(socket, address, size); }) != 0) {
    if (errno == EISCONN) {
      return 0;  // the call before, which was interrupted, had got that far
    }
    if (errno != EAGAIN) {
      return errno;
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      return ETIMEDOUT;
    }
    detail::nap(kNap);
  }
  return 0;
}

/// The next connection that waits, or none with `errno`: EAGAIN where nobody waits.
[[nodiscard]] inline UniqueFd accept_now(int listener) noexcept {
  return keep(
      repeat([&] { return ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK); }));
}

/// What has arrived, up to `bytes` of it; 0 where the other end has closed, -1 with `errno`.
[[nodiscard]] inline ssize_t receive_now(int socket, void* data, std::size_t bytes) noexcept {
  return repeat([&] { return ::recv(socket, data, bytes, MSG_DONTWAIT); });
}
/// recvmsg(2) without waiting.
[[nodiscard]] inline ssize_t receive_now(int socket, msghdr& message) noexcept {
  return repeat([&] { return ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT); });
}

/// Sends what the socket takes at once; -1 with `errno`.
[[nodiscard]] inline ssize_t send_now(int socket, const void* data, std::size_t bytes) noexcept {
  return repeat([&] { return ::send(socket, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT); });
}
/// sendmsg(2) without waiting and without SIGPIPE.
[[nodiscard]] inline ssize_t send_now(int socket, const msghdr& message) noexcept {
  return repeat([&] { return ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT); });
}

// --- memory files --------------------------------------------------------------------------------

/// Keeps signals from this thread while it lives, except those of its own faults.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t all;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) {
      sigdelset(&all, fault);
    }
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

/// An anonymous memory file that nobody can execute. Systems with vm.memfd_noexec=2 refuse any
/// other; kernels before 6.3 do not know the flag (memfd_create(2)).
[[nodiscard]] inline UniqueFd memory_file(const std::string& name) noexcept {
  constexpr unsigned kNoExecSeal = 0x0008U;  // MFD_NOEXEC_SEAL
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  const int descriptor = ::memfd_create(name.c_str(), kFlags | kNoExecSeal);
  if (descriptor < 0 && errno == EINVAL) {
    return keep(::memfd_create(name.c_str(), kFlags));
  }
  return keep(descriptor);
}

/// Sets a file's length; 0 or errno. A length beyond the process's limit of file sizes is EFBIG
/// here, where the kernel would send SIGXFSZ, which ends the process (setrlimit(2)).
[[nodiscard]] inline int set_length(int descriptor, std::size_t bytes) noexcept {
  const auto length = static_cast<off_t>(bytes);
  rlimit most{};
  if (length < 0 || (::getrlimit(RLIMIT_FSIZE, &most) == 0 && most.rlim_cur != RLIM_INFINITY &&
                     bytes > most.rlim_cur)) {
    return EFBIG;
  }
  return repeat([&] { return ::ftruncate(descriptor, length); }) == 0 ? 0 : errno;
}

/// Takes the pages of a part of a memory file; 0 or errno. Older kernels give a part up for
/// any signal and take back what it had got, so a part that was interrupted is asked for again
/// where no signal reaches it.
[[nodiscard]] inline int take_pages(int descriptor, std::size_t first, std::size_t bytes) noexcept {
  const auto take = [&] {
    return ::fallocate(descriptor, 0, static_cast<off_t>(first), static_cast<off_t>(bytes));
  };
  if (take() == 0) {
    return 0;
  }
  if (errno != EINTR) {
    return errno;
  }
  const SignalsBlocked blocked;
  return repeat(take) == 0 ? 0 : errno;
}

/// Takes the pages of a part of an anonymous mapping; 0 or errno.
[[nodiscard]] inline int take_pages(std::byte* memory, std::size_t bytes) noexcept {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE of madvise(2), since Linux 5.14
  if (repeat([&] { return ::madvise(memory, bytes, kPopulateWrite); }) == 0) {
    return 0;
  }
  if (errno != EINVAL) {
    return errno;
  }
  constexpr std::size_t kPage = 4096;
  for (std::size_t at = 0; at < bytes; at += kPage) {
    *static_cast<volatile std::byte*>(memory + at) = std::byte{0};
  }
  return 0;
}

}  // namespace os
}  // namespace cohort
