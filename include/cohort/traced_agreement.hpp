// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/flight_recorder.hpp"

/// \file
/// What a flight recorder is told of agreements and of failures, in whichever way they are left.

namespace cohort::detail {

/// An agreement, from its beginning until it is left in whichever way.
class TracedAgreement {
 public:
  TracedAgreement(FlightRecorder* recorder, std::string_view place, std::uint64_t bytes) noexcept
      : recorder_(recorder), before_(recorder != nullptr ? recorder->agree(place, bytes) : 0) {}
  TracedAgreement(const TracedAgreement&) = delete;
  TracedAgreement& operator=(const TracedAgreement&) = delete;
  ~TracedAgreement() {
    if (recorder_ != nullptr) {
      recorder_->agreed(before_);
    }
  }

 private:
  FlightRecorder* recorder_;
  std::uint64_t before_;
};

/// Runs `body`; what it throws other than for its arguments is reported to the recorder first.
/// @param others  Whether ranks that are missing in a time-out are those of the recorder's group.
template <class Body>
auto reporting(FlightRecorder* recorder, const Body& body, bool others = true) {
  try {
    return body();
  } catch (const UsageError&) {
    throw;
  } catch (const ConfigError&) {
    throw;
  } catch (const TimeoutError& error) {
    if (recorder != nullptr) {
      recorder->failed(error.what(), true, others ? error.missing() : std::vector<int>{});
    }
    throw;
  } catch (const Error& error) {
    if (recorder != nullptr) {
      recorder->failed(error.what(), false);
    }
    throw;
  }
}

}  // namespace cohort::detail
