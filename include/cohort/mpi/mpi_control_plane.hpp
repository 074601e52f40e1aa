// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cohort/control_plane.hpp"
#include "cohort/error.hpp"
#include "cohort/log.hpp"
#include "cohort/message_control_plane.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/poll_pause.hpp"

/// \file
/// The control plane of ranks that meet over MPI: tagged point-to-point messages on a communicator
/// of the library's own. Only point-to-point calls, because a collective of MPI can neither be
/// given up at a time limit nor say who is missing.

namespace cohort {

namespace detail {

[[nodiscard]] inline std::string mpi_error_text(int code) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  if (MPI_Error_string(code, text.data(), &length) != MPI_SUCCESS) {
    return "unknown MPI error";
  }
  return {text.data(), static_cast<std::size_t>(length)};
}

/// Throws `TransportError` unless `code` is `MPI_SUCCESS`.
inline void mpi_check(int code, const char* call, int rank = -1, const std::string& about = {}) {
  if (code != MPI_SUCCESS) {
    throw TransportError({.call = call, .native_code = code, .rank = rank},
                         mpi_error_text(code) + (about.empty() ? "" : " (" + about + ")"));
  }
}

[[nodiscard]] inline bool mpi_is_up() noexcept {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

/// Ranks that wait for messages often share a core with those that are to send them, and MPI moves
/// messages only while it is called: napping begins early.
inline constexpr std::chrono::microseconds kMpiYieldFor{50};

/// Datatype and count for a run of bytes whose number may exceed an `int`: MPI 3 counts in `int`.
class MpiByteRun {
 public:
  explicit MpiByteRun(std::size_t bytes, std::size_t chunk = std::size_t{1} << 30) {
    if (bytes <= chunk) {
      count_ = static_cast<int>(bytes);
      return;
    }
    const std::array<int, 2> blocks{static_cast<int>(bytes / chunk),
                                    static_cast<int>(bytes % chunk)};
    const std::array<MPI_Aint, 2> offsets{0, static_cast<MPI_Aint>(bytes - bytes % chunk)};
    std::array<MPI_Datatype, 2> types{MPI_DATATYPE_NULL, MPI_BYTE};
    mpi_check(MPI_Type_contiguous(static_cast<int>(chunk), MPI_BYTE, types.data()),
              "MPI_Type_contiguous");
    const int made = MPI_Type_create_struct(2, blocks.data(), offsets.data(), types.data(), &type_);
    MPI_Type_free(types.data());
    mpi_check(made, "MPI_Type_create_struct");
    owned_ = true;
    count_ = 1;
    if (const int code = MPI_Type_commit(&type_); code != MPI_SUCCESS) {
      MPI_Type_free(&type_);
      mpi_check(code, "MPI_Type_commit");
    }
  }
  MpiByteRun(const MpiByteRun&) = delete;
  MpiByteRun& operator=(const MpiByteRun&) = delete;
  ~MpiByteRun() {
    if (owned_) {
      MPI_Type_free(&type_);  // MPI keeps it for the requests that use it
    }
  }

  [[nodiscard]] MPI_Datatype type() const noexcept { return type_; }
  [[nodiscard]] int count() const noexcept { return count_; }

 private:
  MPI_Datatype type_ = MPI_BYTE;
  int count_ = 0;
  bool owned_ = false;
};

/// A duplicate of `parent` that returns errors instead of aborting. Collective over `parent`.
/// Throws `TimeoutError` at the limit; MPI cannot say who is missing from a duplication.
[[nodiscard]] inline MPI_Comm duplicate_communicator(MPI_Comm parent,
                                                     std::chrono::milliseconds limit) {
  MPI_Comm copy = MPI_COMM_NULL;
  MPI_Request request = MPI_REQUEST_NULL;
  // MPI writes the handle when the request completes, so it must outlive a wait that is given up.
  auto target = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
  mpi_check(MPI_Comm_idup(parent, target.get(), &request), "MPI_Comm_idup");
  const Deadline deadline = deadline_after(limit);
  PollPause pause(kMpiYieldFor);
  for (int done = 0;;) {
    const bool is_late = Clock::now() >= deadline;  // before the look, which then is the last
    mpi_check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Test");
    if (done != 0) {
      break;
    }
    if (is_late) {
      static_cast<void>(target.release());
      throw TimeoutError(fmt::format("MPI_Comm_idup: not every rank of the communicator arrived "
                                     "within {} ms",
                                     limit.count()),
                         {});
    }
    pause();
  }
  copy = *target;
  mpi_check(MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  return copy;
}

}  // namespace detail

/// Messages between the ranks of a communicator. Sends are non-blocking from buffers that the
/// messenger owns; receives poll, so both end at a time limit.
///
/// Messages beyond MPI's eager limit (some KiB) move while the sender is inside the control plane
/// or another call of MPI. Calls in which every rank sends and receives end when the messages have
/// left; a rank that broadcasts or only sends much, and then computes for longer than its peers'
/// time limit, makes them time out.
///
/// After `abandon` the buffers of unfinished messages are kept until the process ends, because MPI
/// may still write them, and the communicator is not freed.
class MpiMessenger : public Messenger {
 public:
  /// Collective over `parent`, which is duplicated and may be freed afterwards. `limit` bounds the
  /// duplication, and the wait for unfinished messages in `close`.
  /// Throws `UsageError` where MPI is not running, `TimeoutError`, `TransportError`.
  explicit MpiMessenger(MPI_Comm parent, std::chrono::milliseconds limit = kDefaultTimeLimit)
      : limit_(limit) {
    if (!detail::mpi_is_up()) {
      throw UsageError("MpiMessenger: expected MPI between MPI_Init and MPI_Finalize");
    }
    comm_ = detail::duplicate_communicator(parent, limit);
    detail::mpi_check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    detail::mpi_check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
    arriving_.resize(static_cast<std::size_t>(size_));
  }

  ~MpiMessenger() override {
    if (std::uncaught_exceptions() > exceptions_) {
      abandon();  // peers may be anywhere: waiting for them would only hide the exception
    }
    close();
  }

  /// This rank in the communicator.
  [[nodiscard]] int rank() const noexcept override { return rank_; }
  /// Ranks of the communicator.
  [[nodiscard]] int size() const noexcept override { return size_; }

  void send(int to, Bytes message) override {
    check_open("MPI_Isend");
    if (!detail::mpi_is_up()) {  // a group may end behind MPI_Finalize, and say so
      throw TransportError({.call = "MPI_Isend", .rank = rank_}, "MPI has been finalized");
    }
    reap();
    auto& sent = sent_.emplace_back();
    sent.to = to;
    sent.message = std::move(message);
    const detail::MpiByteRun run(sent.message.size());
    const int code =
        MPI_Isend(sent.message.data(), run.count(), run.type(), to, kTag, comm_, &sent.request);
    if (code != MPI_SUCCESS) {
      sent_.pop_back();
      detail::mpi_check(code, "MPI_Isend", rank_, fmt::format("to rank {}", to));
    }
  }

  std::optional<Bytes> receive(int from, Deadline deadline) override {
    check_open("MPI_Improbe");
    reap();
    detail::PollPause pause(detail::kMpiYieldFor);
    for (int polls = 1;; ++polls) {
      match_any();
      if (auto message = take(from)) {
        return message;
      }
      if (polls >= kFewestPolls && Clock::now() >= deadline) {
        return std::nullopt;
      }
      pause();
    }
  }

  /// One question for all ranks.
  std::optional<Arrival> receive_any() override {
    check_open("MPI_Improbe");
    reap();
    for (int polls = 0; polls < kFewestPolls;) {
      polls += match_any() ? 0 : 1;  // a long message is not there yet: another may be
      for (std::size_t step = 0; step < arriving_.size(); ++step) {
        const auto from = static_cast<int>(next_++ % arriving_.size());
        if (auto message = take(from)) {
          return Arrival{from, std::move(*message)};
        }
      }
    }
    return std::nullopt;
  }

  /// Beyond the eager limit MPI moves a message only while both ends are inside of MPI.
  bool flush(int to, Deadline deadline) override {
    check_open("MPI_Test");
    detail::PollPause pause(detail::kMpiYieldFor);
    for (reap(); has_unfinished(to); reap()) {
      if (Clock::now() >= deadline) {
        return false;
      }
      match_any();  // the peer's own message may have to arrive first
      pause();
    }
    return true;
  }

  void abandon() noexcept override { abandoned_ = true; }
  /// Whether a wait timed out and its buffers were left to MPI.
  [[nodiscard]] bool abandoned() const noexcept { return abandoned_; }

  /// The library's communicator, which returns errors; null once closed.
  [[nodiscard]] MPI_Comm communicator() const noexcept { return comm_; }

  /// Waits until all messages have left this rank, then frees the communicator; later calls of the
  /// messenger throw. False where messages were abandoned: `MPI_Finalize` might hang then.
  /// @param all_are_here  All ranks are known to close, and to have taken what this one sent: then
  ///                      it counts whether messages are under way, not whether they were
  ///                      abandoned.
  bool close(bool all_are_here = false) noexcept {
    if (!owner_.is_here()) {
      comm_ = MPI_COMM_NULL;  // MPI's state and its messages are the parent's
    }
    if (comm_ == MPI_COMM_NULL) {
      return !abandoned_;
    }
    if (!detail::mpi_is_up()) {
      abandoned_ = true;
      log(LogLevel::error, "an MPI control plane outlives MPI_Finalize");
    }
    if ((abandoned_ && !all_are_here) || !drain()) {
      abandoned_ = true;
      keep_forever();
      comm_ = MPI_COMM_NULL;
      return false;
    }
    if (MPI_Comm_free(&comm_) != MPI_SUCCESS) {
      log(LogLevel::error, "MPI_Comm_free failed on the control plane's communicator");
    }
    comm_ = MPI_COMM_NULL;
    return true;
  }

 private:
  static constexpr int kTag = 0;  // the communicator is our own
  // A probe that finds nothing lets MPI look at its network, so the next may find something.
  static constexpr int kFewestPolls = 3;

  struct Transfer {
    Bytes message;
    MPI_Request request = MPI_REQUEST_NULL;
    int to = -1;  // of a message sent
  };

  void check_open(const char* call) const {
    owner_.check("control plane over MPI");
    if (comm_ == MPI_COMM_NULL) {
      throw TransportError({.call = call, .rank = rank_},
                           "the MPI session of this control plane "
                           "has ended");
    }
  }

  static bool finished(Transfer& transfer) {
    int done = 0;
    detail::mpi_check(MPI_Test(&transfer.request, &done, MPI_STATUS_IGNORE), "MPI_Test");
    return done != 0;
  }

  void reap() { sent_.remove_if(finished); }

  [[nodiscard]] bool has_unfinished(int to) const noexcept {
    return std::any_of(sent_.begin(), sent_.end(),
                       [to](const Transfer& transfer) { return transfer.to == to; });
  }

  /// The next message of a rank, if it is whole.
  std::optional<Bytes> take(int from) {
    auto& arriving = arriving_[static_cast<std::size_t>(from)];
    if (arriving.empty() || !finished(arriving.front())) {
      return std::nullopt;
    }
    Bytes message = std::move(arriving.front().message);
    arriving.pop_front();
    return message;
  }

  /// Starts to receive the next message from whomever it comes: the body of a long message moves
  /// only once it is asked for, and its sender is not late because this rank waits for another.
  /// Not MPI_Mrecv, which would wait for the body. Whether there was one.
  bool match_any() {
    int found = 0;
    MPI_Message handle = MPI_MESSAGE_NULL;
    MPI_Status status{};
    detail::mpi_check(MPI_Improbe(MPI_ANY_SOURCE, kTag, comm_, &found, &handle, &status),
                      "MPI_Improbe", rank_);
    if (found == 0) {
      return false;
    }
    MPI_Count bytes = 0;
    detail::mpi_check(MPI_Get_elements_x(&status, MPI_BYTE, &bytes), "MPI_Get_elements_x", rank_);
    auto& queue = arriving_[static_cast<std::size_t>(status.MPI_SOURCE)];
    auto& transfer = queue.emplace_back();
    transfer.message.resize(static_cast<std::size_t>(bytes));
    const detail::MpiByteRun run(transfer.message.size());
    const int code =
        MPI_Imrecv(transfer.message.data(), run.count(), run.type(), &handle, &transfer.request);
    if (code != MPI_SUCCESS) {
      queue.pop_back();
      detail::mpi_check(code, "MPI_Imrecv", rank_, fmt::format("from rank {}", status.MPI_SOURCE));
    }
    return true;
  }

  bool drain() noexcept {
    try {
      const Deadline deadline = detail::deadline_after(limit_);
      detail::PollPause pause(detail::kMpiYieldFor);
      while (true) {
        const bool is_late = Clock::now() >= deadline;  // before the look, which then is the last
        reap();
        std::size_t arriving = 0;
        for (auto& from_rank : arriving_) {
          from_rank.remove_if(finished);  // what nobody asked for
          arriving += from_rank.size();
        }
        if (sent_.empty() && arriving == 0) {
          return true;
        }
        if (is_late) {
          log(LogLevel::error,
              "rank {}: {} control messages were not received within {} ms, and {} did not come "
              "whole",
              rank_, sent_.size(), limit_.count(), arriving);
          return false;
        }
        pause();
      }
    } catch (const std::exception& error) {
      log(LogLevel::error, error.what());
      return false;
    }
  }

  /// MPI may still write to the buffers of unfinished transfers.
  void keep_forever() noexcept {
    static auto& kept = *new std::list<Transfer>;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    kept.splice(kept.end(), sent_);
    for (auto& arriving : arriving_) {
      kept.splice(kept.end(), arriving);
    }
  }

  OwnerProcess owner_;
  std::chrono::milliseconds limit_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  int exceptions_ = std::uncaught_exceptions();
  bool abandoned_ = false;
  std::list<Transfer> sent_;
  std::vector<std::list<Transfer>> arriving_;  // by sender, in order
  std::size_t next_ = 0;                       // whose messages `receive_any` takes first
};

/// A control plane over all ranks of a communicator, for engines that keep the start and end of MPI
/// to themselves; `MpiSession` makes one otherwise. After a time-out such an engine must leave by
/// `MPI_Abort`.
class MpiControlPlane : public MessageControlPlane {
 public:
  /// Collective over `ranks`, which is duplicated. Throws as `MpiMessenger`.
  explicit MpiControlPlane(MPI_Comm ranks, std::chrono::milliseconds limit = kDefaultTimeLimit,
                           std::string name = "world")
      : MpiControlPlane(std::make_shared<MpiMessenger>(ranks, limit), limit, std::move(name)) {}

  /// Over a messenger that exists.
  MpiControlPlane(std::shared_ptr<MpiMessenger> messenger, std::chrono::milliseconds limit,
                  std::string name = "world")
      : MessageControlPlane(messenger, limit, std::move(name)), messenger_(std::move(messenger)) {}

  /// What carries the messages.
  [[nodiscard]] MpiMessenger& messenger() noexcept { return *messenger_; }

 private:
  std::shared_ptr<MpiMessenger> messenger_;
};

}  // namespace cohort
