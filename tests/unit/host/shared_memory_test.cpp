#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cohort/host/shared_memory.hpp>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;
using namespace cohort::test;

namespace {

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
    go_on_ = FileDescriptor(to_child[1]);
    const FileDescriptor from(to_parent[0]);
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
  FileDescriptor go_on_;
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
  const FileDescriptor stranger(open("/dev/null", O_RDONLY | O_CLOEXEC));
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
