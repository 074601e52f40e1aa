// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cohort/cohort.hpp"
#include "cohort/owner_process.hpp"
#include "cohort/torch.hpp"
#include "signals.hpp"

/// \file
/// The states that Python has made, and their groups by name: what operators know a group by.

namespace cohort::python {

/// A state with all that it needs. Members that are needed longer come first.
struct Engine {
  OwnerProcess owner;
  std::shared_ptr<Backend> backend;
  std::shared_ptr<ControlPlane> world;
  std::optional<ParallelState> state;
  GraphPool pool;  ///< Of all graphs that want it.
  std::map<CaptureId, std::unique_ptr<CaptureScope>>
      captures;                ///< Opened by the first call in each.
  int graph_captures = 0;      ///< Python's open `graph_capture`s.
  bool pooled = false;         ///< Of the innermost.
  std::string prefix;          ///< Of the groups' names.
  std::recursive_mutex mutex;  ///< Groups are for one thread at a time.
  /// A call waits, and what Python runs meanwhile on its thread must not come in.
  bool runs_handlers = false;

  void handlers_run(bool now) noexcept { runs_handlers = now; }
  /// Ends a call that waits, whose ranks are told; all groups, as their ranks may be in others.
  void give_up(std::string_view reason) noexcept {
    if (!state) {
      if (world != nullptr) {
        world->give_up(reason);
      }
      return;
    }
    for (GroupCoordinator* group : state->groups()) {
      group->control().give_up(reason);
    }
  }
};

/// All engines of the process.
class Engines {
 public:
  /// Never destroyed: an interpreter ends in an order of its own.
  static Engines& of_process() {
    static auto* const engines = new Engines;
    return *engines;
  }

  std::int64_t add(std::shared_ptr<Engine> engine) {
    const std::lock_guard lock(mutex_);
    const std::int64_t id = ++last_;
    engine->prefix = prefix_of(id);
    for (GroupCoordinator* group : engine->state->groups()) {
      groups_[name_of(*engine, *group)] = {engine, group};
    }
    engines_[id] = std::move(engine);
    return id;
  }

  /// Local: without the other ranks, unless the state was shut down before. A call that another
  /// thread is in, or this one below a signal's handler, ends early, with an error, and the others
  /// of its group are told. In a forked child the state stays: a thread that the child has not got
  /// may be in it.
  void drop(std::int64_t id) {
    std::shared_ptr<Engine> engine;
    {
      const std::lock_guard lock(mutex_);
      const auto found = engines_.find(id);
      if (found == engines_.end()) {
        return;
      }
      engine = std::move(found->second);
      engines_.erase(found);
      std::erase_if(groups_, [&](const auto& entry) { return entry.second.engine == engine; });
    }
    if (!engine->owner.is_here()) {
      static_cast<void>(new std::shared_ptr<Engine>(std::move(engine)));
      return;
    }
    std::unique_lock lock(engine->mutex, std::try_to_lock);
    if (!lock) {
      engine->give_up("left while another thread was in a call");
      lock.lock();
    }
    if (engine->runs_handlers) {
      engine->give_up("left by a signal's handler");
      return;  // the call that waits keeps it until it ends
    }
    engine->captures.clear();
    engine->state.reset();
  }

  /// Throws `UsageError` where it is gone.
  [[nodiscard]] std::shared_ptr<Engine> engine(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = engines_.find(id);
    if (found == engines_.end()) {
      throw UsageError(fmt::format("ParallelState {}: used after it was dropped", id));
    }
    return found->second;
  }

  /// A group and the engine that it lives in.
  struct Member {
    std::shared_ptr<Engine> engine;
    GroupCoordinator* group = nullptr;
  };
  /// Throws `UsageError` for a name that no group has.
  [[nodiscard]] Member group(std::string_view name) {
    const std::lock_guard lock(mutex_);
    const auto found = groups_.find(name);
    if (found == groups_.end()) {
      throw UsageError(fmt::format("group {}: no ParallelState of this process has it", name));
    }
    return found->second;
  }

  /// Ends with the number of ranks: what a compiler keeps of an operator's shapes, on disk too, it
  /// keeps by the arguments.
  [[nodiscard]] static std::string name_of(const Engine& engine, const GroupCoordinator& group) {
    return fmt::format("{}{}:{}", engine.prefix, to_string(group.kind()), group.size());
  }
  /// How the names of a state's groups begin, and no others.
  [[nodiscard]] static std::string prefix_of(std::int64_t id) {
    return fmt::format("cohort{}/", id);
  }

 private:
  std::mutex mutex_;
  std::map<std::int64_t, std::shared_ptr<Engine>> engines_;
  std::map<std::string, Member, std::less<>> groups_;
  std::int64_t last_ = 0;
};

/// The scopes that this thread has open: where results of calls come from.
struct SymmetricScopes {
  struct Open {
    std::shared_ptr<Engine> engine;
    ScopeTarget target;  ///< Without an arena, ordinary memory.
  };
  std::vector<Open> open;

  static SymmetricScopes& of_thread() {
    static thread_local SymmetricScopes scopes;
    return scopes;
  }
};

/// One operator's use of an engine: one at a time, on torch's current stream. What waits in it
/// looks for signals.
class Use {
 public:
  /// Throws `UsageError` where the state is gone: `named` is whose. Without `looks`, waits do not
  /// take the interpreter's lock: where another one is held that whoever has that may want.
  explicit Use(std::shared_ptr<Engine> engine, std::string_view named, bool looks = true)
      : engine_(std::move(engine)), named_(named), lock_(engine_->mutex), look_(*engine_, looks) {
    throw_if_gone();
    if (engine_->runs_handlers) {
      throw UsageError(fmt::format("{}: called by a signal's handler while a call waits", named_));
    }
    guard_.reset_device(device_to_torch(engine_->backend->device()));
    stream_ = current_torch_stream(*engine_->backend);
  }

  [[nodiscard]] Engine& engine() const noexcept { return *engine_; }
  [[nodiscard]] ParallelState& state() const noexcept { return *engine_->state; }
  [[nodiscard]] StreamRef stream() const noexcept { return stream_; }

  /// Inside `graph_capture`, what the library allocates on a stream that is being captured belongs
  /// to that graph from its first call on.
  void enter_capture() const {
    if (engine_->graph_captures == 0 || !stream_.valid()) {
      return;
    }
    const CaptureId id = stream_.capture_id();
    if (id == 0 || engine_->captures.contains(id)) {
      return;
    }
    engine_->captures[id] = std::make_unique<CaptureScope>(
        state().captures(), stream_, engine_->pooled ? &engine_->pool : nullptr);
  }

  /// Memory for a result: torch's own, unless a scope of this engine is the innermost on this
  /// thread. One of another engine does not count, whose turn this is not.
  [[nodiscard]] at::Tensor result(const std::vector<std::int64_t>& shape, c10::ScalarType dtype) {
    const auto& open = SymmetricScopes::of_thread().open;
    if (!open.empty() && open.back().engine == engine_ && open.back().target.arena != nullptr) {
      return to_torch(
          open.back().target.arena->empty(Dims(shape), dtype_from_torch(dtype), stream_),
          engine_->backend);
    }
    // Torch's allocator calls an engine under a lock of its own, where a pool of an arena grows.
    lock_.unlock();
    at::Tensor result = at::empty(shape, at::TensorOptions().dtype(dtype).device(
                                             device_to_torch(engine_->backend->device())));
    lock_.lock();
    throw_if_gone();
    return result;
  }

 private:
  void throw_if_gone() const {
    if (!engine_->state) {
      throw UsageError(fmt::format("{}: its ParallelState is gone", named_));
    }
  }

  std::shared_ptr<Engine> engine_;
  std::string_view named_;
  std::unique_lock<std::recursive_mutex> lock_;
  SignalLook<Engine> look_;
  c10::OptionalDeviceGuard guard_;
  StreamRef stream_;
};

/// The same of one group.
template <class Group = GroupCoordinator>
class GroupUse : public Use {
 public:
  explicit GroupUse(std::string_view name, bool looks = true)
      : GroupUse(Engines::of_process().group(name), name, looks) {}

  Group* operator->() const noexcept { return group_; }
  Group& operator*() const noexcept { return *group_; }

 private:
  GroupUse(Engines::Member member, std::string_view name, bool looks)
      : Use(std::move(member.engine), name, looks) {
    group_ = of_kind(*member.group, state(), name);
    enter_capture();
  }

  static Group* of_kind(GroupCoordinator& group, ParallelState& state, std::string_view name) {
    if constexpr (std::is_same_v<Group, GroupCoordinator>) {
      static_cast<void>(state);
      static_cast<void>(name);
      return &group;
    } else if constexpr (std::is_same_v<Group, DecodeContextParallelGroup>) {
      return same(group, state.dcp(), name, "dcp");
    } else {
      return same(group, state.pp(), name, "pp");
    }
  }
  template <class Known>
  static Known* same(GroupCoordinator& group, Known& known, std::string_view name,
                     std::string_view kind) {
    if (&group != &known) {
      throw UsageError(fmt::format("group {}: expected the {} group of its state", name, kind));
    }
    return &known;
  }

  Group* group_ = nullptr;
};

using DcpUse = GroupUse<DecodeContextParallelGroup>;
using PpUse = GroupUse<PipelineParallelGroup>;

}  // namespace cohort::python
