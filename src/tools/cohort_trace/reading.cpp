// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "analysis.hpp"

namespace cohort::trace {
namespace {

using nlohmann::json;

Record record_of(const json& j) {
  Record record;
  record.sequence = j.at(0);
  record.ns = j.at(1);
  record.call = j.at(2);
  record.number = j.at(3);
  record.signature = j.at(4);
  record.dtype = j.at(5);
  record.path = j.at(6);
  record.captured = j.at(7).get<int>() != 0;
  record.inbox = j.at(8);
  record.steps = j.at(9);
  record.where = j.at(10);
  record.variant = j.at(11);
  record.ndim = j.at(12);
  record.extents = j.at(13).get<std::vector<std::uint32_t>>();
  return record;
}

Ring ring_of(const json& j, std::int64_t written) {
  Ring ring;
  ring.rank = j.at("rank");
  ring.own = j.at("own");
  ring.gone_at = j.at("gone").get<bool>() ? written : 0;
  ring.ended = j.at("ended");
  ring.open = j.at("open");
  ring.written = written;
  for (const auto& one : j.at("progress")) {
    ring.progress[one.at(0)] = {one.at(1), one.at(2), one.at(3)};
  }
  for (const auto& one : j.at("counters")) {
    ring.counters.push_back({one.at(0), one.at(1), one.at(2), one.at(3)});
  }
  for (const auto& one : j.at("notes")) {
    ring.notes[one.at(0)] = one.at(1);
  }
  for (const auto& one : j.at("records")) {
    ring.records.push_back(record_of(one));
  }
  for (const auto& one : j.at("captured")) {
    ring.captured.push_back(record_of(one));
  }
  return ring;
}

std::uint64_t last_sequence(const Ring& ring) {
  return ring.records.empty() ? 0 : ring.records.back().sequence;
}

/// Of two views of one ring, that which shows more of its end; of equal ones the rank's own.
void keep_better(std::map<int, Ring>& rings, Ring ring) {
  const auto found = rings.find(ring.rank);
  if (found == rings.end()) {
    rings.emplace(ring.rank, std::move(ring));
    return;
  }
  const std::int64_t gone_at = found->second.gone_at == 0 || ring.gone_at == 0
                                   ? std::max(found->second.gone_at, ring.gone_at)
                                   : std::min(found->second.gone_at, ring.gone_at);
  const auto worth = [](const Ring& one) { return std::pair(last_sequence(one), one.own); };
  if (worth(ring) > worth(found->second)) {
    found->second = std::move(ring);
  }
  found->second.gone_at = gone_at;
}

void cut(State& state) {
  constexpr std::int64_t kMoment = 1'000'000'000;  // between the time-outs of ranks
  for (Group& group : state.groups) {
    for (auto& [rank, ring] : group.rings) {
      // Ranks that failed leave, and those that write later see that.
      ring.gone = ring.gone_at != 0 && ring.gone_at <= state.end + kMoment;
      std::erase_if(ring.records, [&](const Record& record) { return record.ns > state.end; });
    }
  }
}

}  // namespace

std::vector<State> read(const std::vector<std::pair<std::string, std::string>>& files) {
  std::map<std::uint64_t, State> states;
  std::map<std::uint64_t, std::int64_t> late;
  for (const auto& [name, text] : files) {
    try {
      const json j = json::parse(text);
      if (j.value("cohort_trace", 0) != 1) {
        throw std::runtime_error("no trace of a version that this program knows");
      }
      const std::uint64_t id = j.at("state");
      State& state = states[id];
      const std::int64_t written = j.at("written");
      state.id = id;
      state.end = state.end == 0 ? written : std::min(state.end, written);
      if (j.at("late").get<bool>()) {
        const auto [first, fresh] = late.emplace(id, written);
        first->second = std::min(first->second, written);
      }
      state.reasons[j.at("rank")] = j.at("reason");
      for (const auto& group : j.at("groups")) {
        const std::string label = group.at("name");
        const auto ranks = group.at("ranks").get<std::vector<int>>();
        auto found = std::find_if(state.groups.begin(), state.groups.end(), [&](const Group& one) {
          return one.name == label && one.ranks == ranks;
        });
        if (found == state.groups.end()) {
          state.groups.push_back({label, ranks, {}});
          found = state.groups.end() - 1;
        }
        for (const auto& ring : group.at("rings")) {
          keep_better(found->rings, ring_of(ring, written));
        }
      }
    } catch (const std::exception& error) {
      throw std::runtime_error(fmt::format("{}: {}", name, error.what()));
    }
  }
  std::vector<State> all;
  for (auto& [id, state] : states) {
    if (const auto found = late.find(id); found != late.end()) {
      state.end = found->second;
    }
    cut(state);
    all.push_back(std::move(state));
  }
  return all;
}

}  // namespace cohort::trace
