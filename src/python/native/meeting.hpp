// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>

#include "cohort/cohort.hpp"
#include "store_meeting.hpp"
#include "store_messenger.hpp"
#if COHORT_TORCH_WITH_MPI
#include "cohort/mpi.hpp"
#endif

/// \file
/// How the ranks of a state meet: over a store, over MPI, or as one alone.

namespace cohort::python {

/// `control` is what the ranks call the store.
[[nodiscard]] inline std::shared_ptr<ControlPlane> over_store(c10::intrusive_ptr<c10d::Store> store,
                                                              std::string_view control, int rank,
                                                              int size,
                                                              std::chrono::milliseconds limit) {
  // The ranks that meet there make their states in the same order, so the number is the same on all
  // of them, whatever states some have made elsewhere.
  static std::mutex mutex;
  static std::map<std::string, std::int64_t, std::less<>> states;
  std::int64_t number = 0;
  {
    const std::lock_guard lock(mutex);
    number = states[std::string(control)]++;
  }
  const StoreCalls calls(std::move(store), rank);
  const std::string meeting =
      StoreMeeting(calls, fmt::format("cohort/{}", number), rank, size, limit).agree();
  return std::make_shared<MessageControlPlane>(
      std::make_shared<StoreMessenger>(calls, meeting, rank, size), limit);
}

[[nodiscard]] inline c10::intrusive_ptr<c10d::Store> connect_store(
    std::string_view address, int size, std::chrono::milliseconds limit) {
  const auto colon = address.rfind(':');
  if (colon == std::string_view::npos) {
    throw ConfigError(fmt::format("control: expected store://HOST:PORT, got store://{}", address));
  }
  c10d::TCPStoreOptions options;
  options.port =
      static_cast<std::uint16_t>(parse_env_integer("control", address.substr(colon + 1), 1, 65535));
  options.numWorkers = static_cast<std::size_t>(size);
  options.waitWorkers = false;
  options.timeout = limit;
  return c10::make_intrusive<c10d::TCPStore>(std::string(address.substr(0, colon)), options);
}

#if COHORT_TORCH_WITH_MPI
/// MPI's session of the process, which Python ends.
inline std::shared_ptr<MpiSession>& mpi_session() {
  static auto* const session = new std::shared_ptr<MpiSession>;
  return *session;
}
#endif

[[nodiscard]] inline std::shared_ptr<ControlPlane> over_mpi(std::chrono::milliseconds limit) {
#if COHORT_TORCH_WITH_MPI
  auto& session = mpi_session();
  if (session == nullptr) {
    session = std::make_shared<MpiSession>(MpiSessionOptions{.limit = limit});
  }
  return {session, &session->world()};
#else
  static_cast<void>(limit);
  throw ConfigError("control mpi: the package was built without MPI");
#endif
}

/// Collective. Ends MPI after the last state; `in_order` says that no rank has failed.
inline void finalize_mpi(bool in_order) {
#if COHORT_TORCH_WITH_MPI
  auto& session = mpi_session();
  if (session != nullptr && !in_order) {
    session->forsake();
  }
  session.reset();
#else
  static_cast<void>(in_order);
#endif
}

/// At the very end of the process, which tells its status: collective where that is 0, otherwise
/// this rank has failed. MPI that the engine has started is gone by then, so it is left in order
/// now.
inline void finalize_mpi_by_status() {
#if COHORT_TORCH_WITH_MPI
  const auto& session = mpi_session();
  if (session == nullptr || !session->owns_mpi() ||
      on_exit([](int status, void*) { finalize_mpi(status == 0); }, nullptr) != 0) {
    finalize_mpi(true);
  }
#endif
}

/// "single", "mpi", "store://HOST:PORT", or the name of a process group, whose store is used.
[[nodiscard]] inline std::shared_ptr<ControlPlane> meet(std::string_view control, int rank,
                                                        int size, std::chrono::milliseconds limit) {
  constexpr std::string_view kStore = "store://";
  if (control == "single") {
    return std::move(make_thread_control_planes(1, limit)[0]);
  }
  if (control == "mpi") {
    return over_mpi(limit);
  }
  if (control.substr(0, kStore.size()) == kStore) {
    return over_store(connect_store(control.substr(kStore.size()), size, limit), control, rank,
                      size, limit);
  }
  // A connection of its own: waits of the process group's must not hold up these.
  return over_store(c10d::resolve_process_group(std::string(control))->getStore()->clone(), control,
                    rank, size, limit);
}

}  // namespace cohort::python
