// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "cohort/error.hpp"
#include "cohort/fixed_text.hpp"
#include "cohort/host/memory_limits.hpp"
#include "cohort/log.hpp"
#include "cohort/machine.hpp"
#include "cohort/process_state.hpp"
#include "cohort/system_calls.hpp"

/// \file
/// Memory that several processes of one user map: an anonymous memory file (memfd_create(2)), found
/// by peers through /proc/<pid>/fd. It has no name in any file system, so nothing is left behind
/// when its processes end, however they end.

namespace cohort::host {

/// Random bytes that tell one memory file from all others, and stand in its name in /proc.
using Cookie = std::array<std::uint64_t, 2>;

/// Where a peer finds a memory file. Sent over the control plane as it is.
struct MemoryHandle {
  std::array<char, 64> machine{};   ///< Boot id, zero-terminated.
  std::uint64_t pid_namespace = 0;  ///< Inode of /proc/self/ns/pid: what `pid` is valid in.
  std::int64_t pid = 0;
  std::int64_t fd = -1;
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::uint64_t bytes = 0;
  Cookie cookie{};
};
static_assert(std::is_trivially_copyable_v<MemoryHandle>);

/// Throws `TransportError` with errno where it cannot be read: that is no other machine.
[[nodiscard]] inline std::string known_boot_id() {
  BootId id = read_boot_id();
  if (id.text.empty()) {
    throw TransportError({.call = "read", .native_code = id.error},
                         fmt::format("the boot id could not be read: {}", std::strerror(id.error)));
  }
  return std::move(id.text);
}

[[nodiscard]] inline Cookie make_cookie() {
  Cookie cookie{};
  if (const int code = os::random_bytes(std::as_writable_bytes(std::span(cookie))); code != 0) {
    throw TransportError({.call = "getrandom", .native_code = code}, std::strerror(code));
  }
  return cookie;
}

namespace detail {

/// What an error says of address space that did not suffice: the process's own limits, where it has
/// some (setrlimit(2)).
[[nodiscard]] inline std::string process_limits_text(int code) {
  std::string text;
  if (code == ENOMEM) {
    for (const auto& [name, resource] :
         {std::pair("RLIMIT_AS", RLIMIT_AS), std::pair("RLIMIT_DATA", RLIMIT_DATA)}) {
      rlimit limit{};
      if (::getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        text += fmt::format("{}{} is {} bytes", text.empty() ? "" : ", ", name, limit.rlim_cur);
      }
    }
  }
  return text.empty() ? text : fmt::format(" (of this process {})", text);
}

}  // namespace detail

/// One mapping of a memory file, made or imported. Unmapped on destruction.
class SharedMemory {
 public:
  SharedMemory(UniqueFd fd, std::size_t bytes, const Cookie& cookie)
      : fd_(std::move(fd)), bytes_(bytes), cookie_(cookie) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    if (memory == MAP_FAILED) {
      const int code = errno;
      throw TransportError({.call = "mmap", .native_code = code},
                           fmt::format("mapping a memory file of {} bytes: {}{}", bytes,
                                       std::strerror(code), detail::process_limits_text(code)));
    }
    data_ = static_cast<std::byte*>(memory);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() {
    if (munmap(data_, bytes_) != 0) {
      log(LogLevel::warning, "munmap of a memory file failed: {}", strerror(errno));
    }
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] const Cookie& cookie() const noexcept { return cookie_; }

  /// What peers need to import it, while this object lives and `close_file` was not called.
  [[nodiscard]] MemoryHandle handle() const {
    struct stat status {};
    if (fstat(fd_.get(), &status) != 0) {
      throw TransportError({.call = "fstat", .native_code = errno}, std::strerror(errno));
    }
    MemoryHandle handle{.machine = {},
                        .pid_namespace = pid_namespace(),
                        .pid = getpid(),
                        .fd = fd_.get(),
                        .device = status.st_dev,
                        .inode = status.st_ino,
                        .bytes = bytes_,
                        .cookie = cookie_};
    cohort::detail::copy_text(known_boot_id(), handle.machine);
    return handle;
  }

  /// Gives up the descriptor; mappings stay, imports are over.
  void close_file() noexcept { fd_.reset(); }

 private:
  UniqueFd fd_;
  std::size_t bytes_;
  Cookie cookie_;
  std::byte* data_ = nullptr;
};

namespace detail {

/// What an error says of memory that did not suffice.
[[nodiscard]] inline std::string left_text(const CommitResult& result) {
  return result.error == ENOMEM && result.left != kNoLimit
             ? fmt::format(" (this machine or its container has {} bytes left)", result.left)
             : "";
}

[[nodiscard]] inline std::string memory_file_name(const Cookie& cookie) {
  return fmt::format("cohort.{:016x}{:016x}", cookie[0], cookie[1]);
}

/// The memory files of this process, so that ranks that are threads share one mapping: it lives
/// until the last of them is done, and each process maps a peer's file once.
class MemoryRegistry {
 public:
  static MemoryRegistry& instance() {
    return cohort::detail::process_wide<MemoryRegistry>("host memory files 1");
  }

  void add(const std::shared_ptr<SharedMemory>& memory) {
    const std::lock_guard lock(mutex_);
    std::erase_if(known_, [](const auto& entry) { return entry.second.expired(); });
    known_[memory->cookie()] = memory;
  }

  [[nodiscard]] std::shared_ptr<SharedMemory> find(const Cookie& cookie) {
    const std::lock_guard lock(mutex_);
    const auto it = known_.find(cookie);
    return it == known_.end() ? nullptr : it->second.lock();
  }

 private:
  std::mutex mutex_;
  std::map<Cookie, std::weak_ptr<SharedMemory>> known_;
};

}  // namespace detail

/// Whether the pages are taken at once. Later, a machine without memory kills the process at the
/// first access instead of failing the allocation.
enum class Commit : std::uint8_t { at_once, at_first_access };

/// Makes a memory file of `bytes` zeros. Local. Throws `TransportError` with errno.
[[nodiscard]] inline std::shared_ptr<SharedMemory> make_shared_memory(std::size_t bytes,
                                                                      Commit commit) {
  const Cookie cookie = make_cookie();
  const auto fail = [bytes](const char* call, int code, const std::string& more = {}) {
    throw TransportError({.call = call, .native_code = code},
                         fmt::format("allocating a memory file of {} bytes: {}{}", bytes,
                                     std::strerror(code), more));
  };
  UniqueFd fd = os::memory_file(detail::memory_file_name(cookie));
  if (!fd) {
    fail("memfd_create", errno);
  }
  if (const int code = os::set_length(fd.get(), bytes); code != 0) {
    fail("ftruncate", code);
  }
  // A file whose size cannot change spares peers a SIGBUS.
  if (os::repeat([&] {
        return fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
      }) != 0) {
    fail("fcntl(F_ADD_SEALS)", errno);
  }
  if (commit == Commit::at_once) {
    const auto result = detail::commit(bytes, [&](std::size_t first, std::size_t piece) {
      return os::take_pages(fd.get(), first, piece);
    });
    if (result.error != 0) {
      fail("fallocate", result.error, detail::left_text(result));
    }
  }
  auto memory = std::make_shared<SharedMemory>(std::move(fd), bytes, cookie);
  detail::MemoryRegistry::instance().add(memory);
  return memory;
}

/// Memory of this process alone, for what no peer maps: it needs no memory file, which a sandbox
/// may refuse. Its pages are taken at once. Unmapped on destruction.
class PrivateMemory {
 public:
  /// Zeros. Throws `TransportError` with errno.
  explicit PrivateMemory(std::size_t bytes) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      const int code = errno;
      fail("mmap", code, detail::process_limits_text(code));
    }
    data_ = static_cast<std::byte*>(memory);
    const auto result = detail::commit(bytes, [&](std::size_t first, std::size_t piece) {
      return os::take_pages(data_ + first, piece);
    });
    if (result.error != 0) {
      munmap(data_, bytes_);
      fail("madvise", result.error, detail::left_text(result));
    }
  }
  PrivateMemory(const PrivateMemory&) = delete;
  PrivateMemory& operator=(const PrivateMemory&) = delete;
  ~PrivateMemory() {
    if (munmap(data_, bytes_) != 0) {
      log(LogLevel::warning, "munmap of memory failed: {}", strerror(errno));
    }
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  [[noreturn]] void fail(const char* call, int code, const std::string& more) const {
    throw TransportError(
        {.call = call, .native_code = code},
        fmt::format("allocating {} bytes: {}{}", bytes_, std::strerror(code), more));
  }

  std::size_t bytes_;
  std::byte* data_ = nullptr;
};

/// Maps a peer's memory file. Local. Throws `TransportError` that says what stood in the way.
///
/// Opening /proc/<pid>/fd/<fd> needs the right to trace the peer for reading (proc(5), ptrace(2)),
/// so processes of other users are out of reach. The name, which holds a random cookie, is checked
/// before the file is opened, and with inode, size and owner again on the opened file: a number
/// that names another process in another PID namespace, or one that was reused, is refused.
[[nodiscard]] inline std::shared_ptr<SharedMemory> import_shared_memory(
    const MemoryHandle& handle) {
  if (auto own = detail::MemoryRegistry::instance().find(handle.cookie)) {
    return own;
  }
  const auto refuse = [&handle](const char* call, int code, const std::string& why) {
    throw TransportError(
        {.call = call, .native_code = code},
        fmt::format("importing descriptor {} of process {}: {}", handle.fd, handle.pid, why));
  };
  if (known_boot_id() != cohort::detail::text_of(handle.machine)) {
    refuse("import", EXDEV, "it runs on another machine");
  }
  if (handle.pid_namespace != pid_namespace()) {
    refuse("import", EXDEV, "it lives in another PID namespace");
  }
  const auto check_name = [&](const std::string& link) {
    std::array<char, 128> name{};
    if (os::repeat([&] { return readlink(link.c_str(), name.data(), name.size() - 1); }) < 0) {
      refuse("readlink", errno, std::strerror(errno));
    }
    if (name.data() !=
        fmt::format("/memfd:{} (deleted)", detail::memory_file_name(handle.cookie))) {
      refuse("readlink", EBADF, fmt::format("found {} there, not the memory file", name.data()));
    }
  };
  const std::string path = fmt::format("/proc/{}/fd/{}", handle.pid, handle.fd);
  check_name(path);  // first, because opening a stranger's file may have effects
  UniqueFd fd = os::open_file(path, O_RDWR);
  if (!fd) {
    refuse("open", errno, std::strerror(errno));
  }
  check_name(fmt::format("/proc/self/fd/{}", fd.get()));
  struct stat status {};
  if (fstat(fd.get(), &status) != 0) {
    refuse("fstat", errno, std::strerror(errno));
  }
  if (status.st_dev != handle.device || status.st_ino != handle.inode ||
      static_cast<std::uint64_t>(status.st_size) != handle.bytes || status.st_uid != geteuid()) {
    refuse("fstat", EBADF, "inode, size or owner differ: not the memory file");
  }
  auto memory = std::make_shared<SharedMemory>(std::move(fd), handle.bytes, handle.cookie);
  memory->close_file();
  detail::MemoryRegistry::instance().add(memory);
  return memory;
}

}  // namespace cohort::host
