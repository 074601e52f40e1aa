// SPDX-License-Identifier: Apache-2.0
#include "stand_in/machine.hpp"

#include <sys/mman.h>

#include <algorithm>

namespace cohort::test::stand_in {

Machine& machine() {
  static Machine& instance = *new Machine;  // outlives whatever still calls at the exit
  return instance;
}

int& current_device() {
  static thread_local int device = 0;
  return device;
}

void begin(std::optional<Refusal> refusal) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  all.refusal = std::move(refusal);
  all.books = {};
  all.streams.clear();
  all.destroyed_streams.clear();
  for (int device = 0; device < kDevices; ++device) {
    all.default_streams[static_cast<std::size_t>(device)] = Stream{.device = device};
  }
}

Report report() {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  for (std::size_t i = 0; i <= all.streams.size(); ++i) {  // a stream may wait for a later one
    for (auto& [handle, stream] : all.streams) {
      advance(*stream);
    }
    for (Stream& stream : all.default_streams) {
      advance(stream);
    }
  }
  Report result = all.books;
  std::erase_if(result.alive, [](const auto& kind) { return kind.second == 0; });
  return result;
}

bool fails(const char* function, int device) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  const long made = ++all.books.calls[{function, device}];
  const bool hit = all.refusal && all.refusal->function == function &&
                   all.refusal->device == device && all.refusal->call == made;
  all.books.refused = all.books.refused || hit;
  return hit;
}

void count(const char* kind, long change) {
  const std::lock_guard lock(machine().mutex);
  machine().books.alive[kind] += change;
}

void misuse(const std::string& what) {
  const std::lock_guard lock(machine().mutex);
  machine().books.misuses.push_back(what);
}

Stream& stream_of(void* handle) {
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  Stream& by_default = all.default_streams[static_cast<std::size_t>(current_device())];
  // The legacy stream and the thread's own are the handles 1 and 2.
  if (reinterpret_cast<std::uintptr_t>(handle) <= 2) {
    return by_default;
  }
  const auto found = all.streams.find(handle);
  if (found == all.streams.end() || all.destroyed_streams.contains(handle)) {
    misuse("a stream that is gone");
    return by_default;
  }
  return *found->second;
}

bool advance(Stream& stream) {
  if (stream.runs) {
    return false;
  }
  stream.runs = true;
  while (!stream.queue.empty()) {
    Work& next = stream.queue.front();
    if (next.ready && !next.ready()) {
      break;
    }
    const std::function<void()> run = std::move(next.run);
    stream.queue.pop_front();
    ++stream.done;
    if (run) {
      run();
    }
  }
  stream.runs = false;
  return stream.queue.empty();
}

bool enqueue(Stream& stream, Work work) {
  if (stream.capture) {
    if (!stream.capture->invalid) {
      stream.capture->graph->work.push_back(std::move(work));
    }
    return !stream.capture->invalid;
  }
  ++stream.enqueued;
  stream.queue.push_back(std::move(work));
  advance(stream);
  return true;
}

void* allocate(const char* kind, std::size_t bytes) {
  // Zeros, that take no time where nobody looks.
  const std::size_t mapped = std::max<std::size_t>(bytes, 1);
  void* const memory =
      ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const std::lock_guard lock(machine().mutex);
  machine().memory[memory] = mapped;
  count(kind, 1);
  return memory;
}

bool release(const char* kind, void* memory) {
  const std::lock_guard lock(machine().mutex);
  const auto found = machine().memory.find(memory);
  if (found == machine().memory.end()) {
    misuse(std::string("memory of ") + kind + " that is not there is freed");
    return false;
  }
  ::munmap(memory, found->second);
  machine().memory.erase(found);
  count(kind, -1);
  return true;
}

}  // namespace cohort::test::stand_in
