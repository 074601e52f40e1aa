// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cohort/cohort.hpp>
#include <functional>
#include <memory>
#include <string>

#include "chaos/plan.hpp"

/// \file
/// What a rank of a round computes with.

namespace cohort::chaos {

class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  virtual ~Machine() = default;

  [[nodiscard]] virtual std::shared_ptr<Backend> backend() = 0;
  /// Whether the first state of a process takes seconds, as where code is loaded.
  [[nodiscard]] virtual bool starts_slowly() const { return false; }
  /// Whether a process has no more descriptors and threads after a state than before it. Drivers of
  /// cards open theirs when they like.
  [[nodiscard]] virtual bool leaves_nothing() const { return false; }
  /// That calls are made on.
  [[nodiscard]] virtual StreamRef stream() = 0;
  /// That they are captured on and launched on.
  [[nodiscard]] virtual StreamRef capture_stream() = 0;
  /// The group that the next results come from: what waits for them does so through it.
  virtual void follow(GroupCoordinator& group) = 0;
};

/// Of the rank, in its own process. `limit` is that of a wait.
using MakeMachine = std::function<std::unique_ptr<Machine>(const Plan& plan, int rank,
                                                           std::chrono::milliseconds limit)>;

/// What a kind of machine changes in a round.
struct Kind {
  MakeMachine make;
  /// Rounds that the machine cannot have become others.
  std::function<Plan(Plan)> adapt = [](Plan plan) { return plan; };
  /// Beyond 1.25 times the limit: what an oversubscribed machine takes to run a rank at all.
  std::chrono::milliseconds slack{};
  /// The same for forming and leaving a state, which are no single wait.
  std::chrono::milliseconds forming_slack{};
  /// Whether a time-out, by its text, was one that cannot know who was missing.
  std::function<bool(const std::string&)> cannot_name = [](const std::string&) { return false; };
};

}  // namespace cohort::chaos
