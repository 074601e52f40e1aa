// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine.hpp"
#include "options.hpp"

/// \file
/// What both measurements get, and what they give back.

namespace decode_engine {

/// A way with its groups.
struct Lane {
  const Way* way = nullptr;
  Place place;
  std::unique_ptr<Exchange> exchange;
};

/// The same on every rank; the first writes it.
struct Told {
  std::string text = {};
  std::vector<std::string> rows = {};  ///< of the result file
  bool passed = true;
};

struct Session {
  const Options& options;
  const Model& model;
  Device& device;
  cohort::ControlPlane& world;
  /// Takes what is found as it is found, so that a run that is ended keeps it.
  std::function<void(const Told&)> tell;
  std::vector<Lane> lanes = {};

  [[nodiscard]] Place place(bool dcp) const {
    return Place::of(world.rank(), options.tp, options.pp, dcp ? options.dcp : 1);
  }
  [[nodiscard]] int ranks() const { return world.size(); }
};

/// Collective. Every lane decodes the tokens that one rank alone chose. Whether all were right.
[[nodiscard]] bool measure_accuracy(Session& session);

/// Collective. The time of a token by every lane, in turns.
void measure_time(Session& session);

}  // namespace decode_engine
