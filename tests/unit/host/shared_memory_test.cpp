// SPDX-License-Identifier: Apache-2.0
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cohort/host/shared_memory.hpp>
#include <csignal>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;

namespace {

/// Kernels that are not at hand, by what they answer.
enum class Kernel {
  this_one,
  before_6_3,      // does not know MFD_NOEXEC_SEAL
  noexec_required  // vm.memfd_noexec=2
};
Kernel kernel = Kernel::this_one;
/// Whether fallocate ends with any signal that could come, as older kernels do; and always where it
/// asks for more than 64 MiB.
bool interrupts = false;

}  // namespace

extern "C" int memfd_create(const char* name, unsigned flags) noexcept {
  constexpr unsigned kNoExecSeal = 8;
  if (kernel == Kernel::before_6_3 && (flags & kNoExecSeal) != 0) {
    errno = EINVAL;
    return -1;
  }
  if (kernel == Kernel::noexec_required && (flags & kNoExecSeal) == 0) {
    errno = EACCES;
    return -1;
  }
  return static_cast<int>(syscall(SYS_memfd_create, name, flags));
}

extern "C" int fallocate(int fd, int mode, off_t first, off_t bytes) {
  if (interrupts) {
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    if (sigismember(&blocked, SIGALRM) == 0 || bytes > off_t{64} << 20) {
      errno = EINTR;
      return -1;
    }
  }
  return static_cast<int>(syscall(SYS_fallocate, fd, mode, first, bytes));
}
extern "C" int posix_fallocate(int fd, off_t first, off_t bytes) {
  return fallocate(fd, 0, first, bytes) == 0 ? 0 : errno;
}

namespace {

/// What `body` returns in a process of its own; its signal, negative, where one ended it.
template <class Body>
int in_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    _exit(body());
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

std::ptrdiff_t open_files() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                       std::filesystem::directory_iterator{});
}

/// A process that owns a memory file, in namespaces of its own where asked.
class Owner {
 public:
  explicit Owner(int namespaces = 0) {
    int to_parent[2];
    int to_child[2];
    REQUIRE(pipe2(to_parent, O_CLOEXEC) == 0);
    REQUIRE(pipe2(to_child, O_CLOEXEC) == 0);
    child_ = fork();
    if (child_ == 0) {
      _exit(own(namespaces, to_parent[1], to_child[0]));
    }
    close(to_parent[1]);
    close(to_child[0]);
    go_on_ = UniqueFd(to_child[1]);
    const UniqueFd from(to_parent[0]);
    MemoryHandle handle;
    if (read(from.get(), &handle, sizeof(handle)) == static_cast<ssize_t>(sizeof(handle))) {
      handle_ = handle;
    }
  }

  /// Nothing where the namespaces were not granted.
  [[nodiscard]] const std::optional<MemoryHandle>& handle() const { return handle_; }

  /// The first byte that the owner finds in its file.
  [[nodiscard]] int finish() {
    const char go = 1;
    REQUIRE(write(go_on_.get(), &go, 1) == 1);
    int status = -1;
    waitpid(child_, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  static int own(int namespaces, int out, int in) {
    if (namespaces != 0 && unshare(namespaces) != 0) {
      return 0;
    }
    // A new PID namespace holds children only.
    if ((namespaces & CLONE_NEWPID) != 0) {
      const pid_t inner = fork();
      if (inner != 0) {
        int status = 0;
        waitpid(inner, &status, 0);
        return WEXITSTATUS(status);
      }
    }
    const auto memory = make_shared_memory(4096, Commit::at_once);
    MemoryHandle handle = memory->handle();
    char go = 0;
    if (write(out, &handle, sizeof(handle)) != static_cast<ssize_t>(sizeof(handle)) ||
        read(in, &go, 1) != 1) {
      return 0;
    }
    return std::to_integer<int>(memory->data()[0]);
  }

  pid_t child_ = -1;
  UniqueFd go_on_;
  std::optional<MemoryHandle> handle_;
};

}  // namespace

TEST_CASE("a memory file starts as zeros and closes on exec", "[host]") {
  const auto memory = make_shared_memory(8192, Commit::at_once);
  CHECK(memory->bytes() == 8192);
  CHECK(std::all_of(memory->data(), memory->data() + 8192,
                    [](std::byte b) { return b == std::byte{0}; }));
  CHECK((fcntl(static_cast<int>(memory->handle().fd), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("its size cannot change, so peers never fault", "[host]") {
  const auto memory = make_shared_memory(8192, Commit::at_first_access);
  CHECK(ftruncate(static_cast<int>(memory->handle().fd), 4096) != 0);
  CHECK(errno == EPERM);
}

TEST_CASE("an allocation that the system refuses says how much and why", "[host]") {
  CHECK_THROWS_MATCHES(make_shared_memory(std::size_t{1} << 62, Commit::at_once), TransportError,
                       says("4611686018427387904 bytes"));
}

TEST_CASE("memory files work where they must not be executable, and before that was known",
          "[host]") {
  for (const Kernel each : {Kernel::before_6_3, Kernel::noexec_required}) {
    kernel = each;
    const auto memory = make_shared_memory(4096, Commit::at_once);
    CHECK(memory->bytes() == 4096);
    CHECK(ftruncate(static_cast<int>(memory->handle().fd), 0) != 0);
  }
  kernel = Kernel::this_one;
}

TEST_CASE("pages are taken however often signals come", "[host]") {
  constexpr std::size_t kBytes = std::size_t{160} << 20;
  interrupts = true;
  {
    const auto memory = make_shared_memory(kBytes, Commit::at_once);
    struct stat status {};
    REQUIRE(fstat(static_cast<int>(memory->handle().fd), &status) == 0);
    CHECK(static_cast<std::size_t>(status.st_blocks) * 512 == kBytes);
  }
  interrupts = false;
}

TEST_CASE("a limit of file sizes is an error, not the end of the process", "[host]") {
  CHECK(in_child([] {
          const rlimit limit{4096, 4096};
          setrlimit(RLIMIT_FSIZE, &limit);
          try {
            (void)make_shared_memory(8192, Commit::at_once);
          } catch (const TransportError& error) {
            return error.site().native_code == EFBIG ? 0 : 1;
          }
          return 2;
        }) == 0);
}

TEST_CASE("memory that a limit of the process refuses is told with that limit", "[host]") {
  const auto refused = [](int resource, const std::string& name, const auto& allocate) {
    const rlimit limit{std::size_t{1} << 40, std::size_t{1} << 40};
    setrlimit(resource, &limit);
    try {
      allocate(std::size_t{1} << 41);
    } catch (const TransportError& error) {
      const std::string words = error.what();
      return words.find("(of this process " + name + " is 1099511627776 bytes)") != words.npos &&
                     words.find("bytes left") == words.npos
                 ? 0
                 : 1;
    }
    return 2;
  };
  const auto in_private = [](std::size_t bytes) { PrivateMemory memory(bytes); };
  const auto in_file = [](std::size_t bytes) {
    (void)make_shared_memory(bytes, Commit::at_first_access);
  };
  CHECK(in_child([&] { return refused(RLIMIT_AS, "RLIMIT_AS", in_private); }) == 0);
  CHECK(in_child([&] { return refused(RLIMIT_AS, "RLIMIT_AS", in_file); }) == 0);
  CHECK(in_child([&] { return refused(RLIMIT_DATA, "RLIMIT_DATA", in_private); }) == 0);
}

TEST_CASE("a memory file takes no standard stream's number", "[host]") {
  CHECK(in_child([] {
          close(0);
          close(1);
          close(2);
          const auto memory = make_shared_memory(4096, Commit::at_once);
          return memory->handle().fd > 2 && fcntl(0, F_GETFD) < 0 && fcntl(1, F_GETFD) < 0 &&
                         fcntl(2, F_GETFD) < 0
                     ? 0
                     : 1;
        }) == 0);
}

TEST_CASE("private memory starts as zeros and needs no file", "[host]") {
  const auto before = open_files();
  const PrivateMemory memory(8192);
  CHECK(open_files() == before);
  CHECK(std::all_of(memory.data(), memory.data() + 8192,
                    [](std::byte b) { return b == std::byte{0}; }));
  CHECK_THROWS_MATCHES(PrivateMemory(std::size_t{1} << 50), TransportError,
                       says("1125899906842624 bytes", "Cannot allocate memory"));
}

TEST_CASE("one process maps a file once, and nothing is left", "[host]") {
  const auto before = open_files();
  {
    const auto memory = make_shared_memory(4096, Commit::at_once);
    CHECK(import_shared_memory(memory->handle()) == memory);
    CHECK(open_files() == before + 1);
    memory->close_file();
    CHECK(open_files() == before);
    memory->data()[0] = std::byte{1};  // the mapping stays
  }
  CHECK(open_files() == before);
}

TEST_CASE("another process maps the same pages", "[host]") {
  Owner owner;
  REQUIRE(owner.handle());
  const auto before = open_files();
  const auto memory = import_shared_memory(*owner.handle());
  CHECK(open_files() == before);
  memory->data()[0] = std::byte{42};
  CHECK(owner.finish() == 42);
}

TEST_CASE("whatever is not the file is refused", "[host]") {
  Owner owner;
  REQUIRE(owner.handle());
  const auto refused = [&](auto change, const std::string& why) {
    MemoryHandle handle = *owner.handle();
    change(handle);
    CHECK_THROWS_MATCHES(import_shared_memory(handle), TransportError, says(why));
  };
  refused([](MemoryHandle& h) { h.machine[0] = h.machine[0] == 'x' ? 'y' : 'x'; },
          "another machine");
  refused([](MemoryHandle& h) { ++h.pid_namespace; }, "another PID namespace");
  refused([](MemoryHandle& h) { ++h.cookie[1]; }, "not the memory file");
  refused([](MemoryHandle& h) { ++h.inode; }, "not the memory file");
  refused([](MemoryHandle& h) { h.bytes += 4096; }, "not the memory file");
  refused([](MemoryHandle& h) { h.fd = 999; }, "No such file");
  const UniqueFd stranger(open("/dev/null", O_RDONLY | O_CLOEXEC));
  refused(
      [&](MemoryHandle& h) {
        h.pid = getpid();
        h.fd = stranger.get();
      },
      "found /dev/null there");
  CHECK(owner.finish() == 0);
}

TEST_CASE("a process behind other network and host names is in reach", "[host]") {
  Owner owner(CLONE_NEWNET | CLONE_NEWUTS);
  if (skip_if(!owner.handle(), "needs the right to make namespaces")) {
    return;
  }
  import_shared_memory(*owner.handle())->data()[0] = std::byte{43};
  CHECK(owner.finish() == 43);
}

TEST_CASE("a process in another PID namespace is out of reach", "[host]") {
  Owner owner(CLONE_NEWPID);
  if (skip_if(!owner.handle(), "needs the right to make namespaces")) {
    return;
  }
  CHECK_THROWS_MATCHES(import_shared_memory(*owner.handle()), TransportError,
                       says("PID namespace"));
  MemoryHandle posing = *owner.handle();  // its pid names another process here
  posing.pid_namespace = pid_namespace();
  CHECK_THROWS_AS(import_shared_memory(posing), TransportError);
  CHECK(owner.finish() == 0);
}
