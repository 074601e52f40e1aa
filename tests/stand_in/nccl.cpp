// SPDX-License-Identifier: Apache-2.0
// NCCL. Calls move nothing: a collective is done once all ranks of the communicator came to it, a
// message once its other end did.
#include <nccl.h>

#include <algorithm>
#include <cstdio>

#include "stand_in/machine.hpp"

using namespace cohort::test::stand_in;

namespace {

/// A part of a call, as one rank makes it.
struct Part {
  /// The peer of a collective: all ranks.
  static constexpr int kAll = -1;

  int peer = kAll;
  bool sends = false;

  auto operator<=>(const Part&) const = default;
};

/// What the ranks of a communicator share, found by its unique id.
struct Clique {
  struct Rank {
    std::map<Part, std::uint64_t> reached = {};  ///< How many of these its streams have come to.
    bool gone = false;                           ///< Destroyed or aborted: nobody waits for it.
  };

  explicit Clique(int size) : ranks(static_cast<std::size_t>(size)) {}

  std::vector<Rank> ranks;
  std::size_t joined = 0;
  std::vector<std::size_t> registered = {};  ///< By number of the window, the ranks that came.
};

struct Communicator {
  std::shared_ptr<Clique> clique;
  std::size_t rank;
  std::size_t registered = 0;
  int windows = 0;
};

/// What this thread has put between ncclGroupStart and ncclGroupEnd: the library has one
/// communicator in a group.
struct Group {
  bool open = false;
  bool failed = false;  ///< A part was refused, so that the end enqueues nothing.
  ncclComm_t communicator = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<Part> parts = {};
};

thread_local Group group;

/// For calls that wait for the other ranks.
constexpr std::chrono::seconds kWaitForRanks{4};

std::map<std::string, std::shared_ptr<Clique>>& cliques() {
  static std::map<std::string, std::shared_ptr<Clique>> by_id;
  return by_id;
}

std::set<Communicator*>& communicators() {
  static std::set<Communicator*> all;
  return all;
}

/// Null where it is gone, which is a misuse.
Communicator* of(ncclComm_t handle) {
  auto* const communicator = reinterpret_cast<Communicator*>(handle);
  if (communicators().contains(communicator)) {
    return communicator;
  }
  misuse("a communicator that is gone");
  return nullptr;
}

/// Whether those that a rank's part waits for have come to theirs of that number.
bool met(Clique& clique, int rank, Part part, std::uint64_t number) {
  for (int peer = 0; peer < static_cast<int>(clique.ranks.size()); ++peer) {
    if (part.peer != Part::kAll && part.peer != peer) {
      continue;
    }
    const Part theirs = part.peer == Part::kAll ? part : Part{rank, !part.sends};
    Clique::Rank& other = clique.ranks[static_cast<std::size_t>(peer)];
    if (other.reached[theirs] < number && !other.gone) {
      return false;
    }
  }
  return true;
}

ncclResult_t enqueue_parts(ncclComm_t handle, const std::vector<Part>& parts, cudaStream_t stream) {
  const std::lock_guard lock(machine().mutex);
  const Communicator* const communicator = of(handle);
  if (communicator == nullptr) {
    return ncclInvalidArgument;
  }
  // Each launch of a graph is a call of its own: its numbers are taken when the stream comes to it.
  const auto numbers = std::make_shared<std::vector<std::uint64_t>>();
  const auto ready = [clique = communicator->clique, rank = communicator->rank, parts, numbers] {
    Clique::Rank& self = clique->ranks[rank];
    for (std::size_t i = numbers->size(); i < parts.size(); ++i) {
      numbers->push_back(++self.reached[parts[i]]);
    }
    for (std::size_t i = 0; i < parts.size() && !self.gone; ++i) {
      if (!met(*clique, static_cast<int>(rank), parts[i], (*numbers)[i])) {
        return false;
      }
    }
    return true;
  };
  return enqueue(stream_of(stream), {ready, [numbers] { numbers->clear(); }})
             ? ncclSuccess
             : ncclUnhandledCudaError;
}

ncclResult_t issue(const char* function, Part part, ncclComm_t communicator, cudaStream_t stream) {
  if (fails(function)) {
    group.failed = group.open;
    return ncclUnhandledCudaError;
  }
  if (!group.open) {
    return enqueue_parts(communicator, {part}, stream);
  }
  group.communicator = communicator;
  group.stream = stream;
  group.parts.push_back(part);
  return ncclSuccess;
}

ncclResult_t end(const char* function, ncclComm_t handle, bool abort) {
  return call(function, ncclSystemError, [&] {
    Communicator* const communicator = of(handle);
    if (communicator == nullptr) {
      return ncclInvalidArgument;
    }
    if (!abort && communicator->windows != 0) {
      misuse("a communicator is destroyed with windows");
    }
    communicator->clique->ranks[communicator->rank].gone = true;
    count("communicator", -1);
    count("window", -communicator->windows);
    communicators().erase(communicator);
    delete communicator;
    return ncclSuccess;
  });
}

}  // namespace

extern "C" {

// --- communicators ------------------------------------------------------------------------------

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t) { return "refused by the stand-in"; }

const char* ncclGetLastError(ncclComm_t) { return "none"; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  return call("ncclGetUniqueId", ncclSystemError, [&] {
    static long made = 0;
    *id = {};
    std::snprintf(id->internal, sizeof id->internal, "communicator %ld", ++made);
  });
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* handle, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t*) {
  return unlocked_call("ncclCommInitRankConfig", ncclSystemError, [&] {
    std::shared_ptr<Clique> clique;
    {
      const std::lock_guard lock(machine().mutex);
      auto& shared = cliques()[id.internal];
      if (!shared) {
        shared = std::make_shared<Clique>(size);
      }
      clique = shared;
      ++clique->joined;
    }
    if (!wait_until(kWaitForRanks, [&] { return clique->joined == clique->ranks.size(); })) {
      return ncclSystemError;
    }
    const std::lock_guard lock(machine().mutex);
    auto* const made = new Communicator{clique, static_cast<std::size_t>(rank)};
    communicators().insert(made);
    count("communicator", 1);
    *handle = reinterpret_cast<ncclComm_t>(made);
    return ncclSuccess;
  });
}

ncclResult_t ncclCommDestroy(ncclComm_t communicator) {
  return end("ncclCommDestroy", communicator, false);
}

ncclResult_t ncclCommAbort(ncclComm_t communicator) {
  return end("ncclCommAbort", communicator, true);
}

/// The call that is to fail reports an error of the communicator. Threads of the library's own ask
/// as well, so the rank says which device counts.
ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
  const std::lock_guard lock(machine().mutex);
  const Communicator* const communicator = of(handle);
  if (communicator == nullptr) {
    return ncclInvalidArgument;
  }
  const int device = static_cast<int>(communicator->rank);
  *error = fails("ncclCommGetAsyncError", device) ? ncclRemoteError : ncclSuccess;
  return ncclSuccess;
}

// --- collectives --------------------------------------------------------------------------------

ncclResult_t ncclAllReduce(const void*, void*, std::size_t, ncclDataType_t, ncclRedOp_t,
                           ncclComm_t communicator, cudaStream_t stream) {
  return issue("ncclAllReduce", {}, communicator, stream);
}

ncclResult_t ncclAllGather(const void*, void*, std::size_t, ncclDataType_t, ncclComm_t communicator,
                           cudaStream_t stream) {
  return issue("ncclAllGather", {}, communicator, stream);
}

ncclResult_t ncclReduceScatter(const void*, void*, std::size_t, ncclDataType_t, ncclRedOp_t,
                               ncclComm_t communicator, cudaStream_t stream) {
  return issue("ncclReduceScatter", {}, communicator, stream);
}

ncclResult_t ncclBroadcast(const void*, void*, std::size_t, ncclDataType_t, int,
                           ncclComm_t communicator, cudaStream_t stream) {
  return issue("ncclBroadcast", {}, communicator, stream);
}

ncclResult_t ncclReduce(const void*, void*, std::size_t, ncclDataType_t, ncclRedOp_t, int,
                        ncclComm_t communicator, cudaStream_t stream) {
  return issue("ncclReduce", {}, communicator, stream);
}

ncclResult_t ncclSend(const void*, std::size_t, ncclDataType_t, int peer, ncclComm_t communicator,
                      cudaStream_t stream) {
  return issue("ncclSend", {peer, true}, communicator, stream);
}

ncclResult_t ncclRecv(void*, std::size_t, ncclDataType_t, int peer, ncclComm_t communicator,
                      cudaStream_t stream) {
  return issue("ncclRecv", {peer, false}, communicator, stream);
}

ncclResult_t ncclGroupStart() {
  return call("ncclGroupStart", ncclSystemError, [] { group.open = true; });
}

ncclResult_t ncclGroupEnd() {
  const bool refused = fails("ncclGroupEnd");  // which ends the group all the same
  const Group ended = std::exchange(group, Group{});
  if (!ended.open) {
    return ncclInvalidUsage;
  }
  if (refused || ended.failed) {
    return ncclSystemError;
  }
  if (ended.parts.empty()) {
    return ncclSuccess;
  }
  return enqueue_parts(ended.communicator, ended.parts, ended.stream);
}

// --- memory and windows -------------------------------------------------------------------------

ncclResult_t ncclMemAlloc(void** memory, std::size_t bytes) {
  return call("ncclMemAlloc", ncclUnhandledCudaError,
              [&] { *memory = allocate("ncclMemAlloc", bytes); });
}

ncclResult_t ncclMemFree(void* memory) {
  return call("ncclMemFree", ncclUnhandledCudaError,
              [&] { return release("ncclMemAlloc", memory) ? ncclSuccess : ncclInvalidArgument; });
}

ncclResult_t ncclCommWindowRegister(ncclComm_t handle, void*, std::size_t, ncclWindow_t* window,
                                    int) {
  return unlocked_call("ncclCommWindowRegister", ncclSystemError, [&] {
    std::shared_ptr<Clique> clique;
    std::size_t number = 0;
    {
      const std::lock_guard lock(machine().mutex);
      Communicator* const communicator = of(handle);
      if (communicator == nullptr) {
        return ncclInvalidArgument;
      }
      clique = communicator->clique;
      number = communicator->registered++;
      clique->registered.resize(std::max(clique->registered.size(), number + 1));
      ++clique->registered[number];
    }
    if (!wait_until(kWaitForRanks,
                    [&] { return clique->registered[number] == clique->ranks.size(); })) {
      return ncclSystemError;
    }
    const std::lock_guard lock(machine().mutex);
    Communicator* const communicator = of(handle);
    if (communicator == nullptr) {
      return ncclSystemError;
    }
    ++communicator->windows;
    count("window", 1);
    *window = reinterpret_cast<ncclWindow_t>(new std::size_t(number));
    return ncclSuccess;
  });
}

ncclResult_t ncclCommWindowDeregister(ncclComm_t handle, ncclWindow_t window) {
  return call("ncclCommWindowDeregister", ncclSystemError, [&] {
    Communicator* const communicator = of(handle);
    if (communicator == nullptr) {
      return ncclInvalidArgument;
    }
    --communicator->windows;
    count("window", -1);
    delete reinterpret_cast<std::size_t*>(window);
    return ncclSuccess;
  });
}

}  // extern "C"
