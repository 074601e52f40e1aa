// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <type_traits>

namespace dcp_decode {

Summary summarize(const Options& options, cohort::ControlPlane& world, const Decoder& decoder) {
  static_assert(std::is_trivially_copyable_v<RankResult>);
  const RankResult mine{.deviation = decoder.deviation(),
                        .seconds = decoder.seconds(),
                        .hash = decoder.output_hash(),
                        .tokens = decoder.tokens(),
                        .own_tokens = decoder.own_tokens(),
                        .empty_shards = decoder.empty_shards()};
  Summary summary;
  summary.hash = 0xcbf29ce484222325ULL;
  summary.tokens = mine.tokens;
  summary.least_own_tokens = mine.own_tokens;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(&mine, 1)))) {
    RankResult theirs;
    std::memcpy(&theirs, bytes.data(), sizeof(theirs));
    summary.deviation.include(theirs.deviation);
    for (std::size_t phase = 0; phase < kPhases; ++phase) {
      summary.seconds[phase] = std::max(summary.seconds[phase], theirs.seconds[phase]);
    }
    summary.hash = (summary.hash ^ theirs.hash) * 0x100000001b3ULL;
    summary.least_own_tokens = std::min(summary.least_own_tokens, theirs.own_tokens);
    summary.most_own_tokens = std::max(summary.most_own_tokens, theirs.own_tokens);
    summary.empty_shards += theirs.empty_shards;
  }
  summary.bound = bounds(summary.deviation, options.width(), options.layout.dcp);
  summary.passed = summary.deviation.max_rel_error <= summary.bound.rel_error &&
                   summary.deviation.max_lse_error <= summary.bound.lse_error;
  return summary;
}

std::vector<std::string> describe_groups(cohort::ParallelState& state,
                                         cohort::ControlPlane& world) {
  std::string mine;
  for (const cohort::GroupCoordinator* group : state.groups()) {
    if (group->rank() == 0) {
      mine += fmt::format("{:<8} ranks {}: {}\n", group->name(), fmt::join(group->ranks(), ","),
                          cohort::describe(group->decision()));
    }
  }
  std::vector<std::string> lines;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(mine)))) {
    const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = text.find('\n', begin);
      lines.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  // By kind, in the order in which they were formed; within a kind in rank order already.
  const auto kind = [](const std::string& line) {
    constexpr std::array kOrder = {'w', 't', 'p', 'd'};
    return std::find(kOrder.begin(), kOrder.end(), line.front()) - kOrder.begin();
  };
  std::stable_sort(lines.begin(), lines.end(),
                   [&](const auto& a, const auto& b) { return kind(a) < kind(b); });
  return lines;
}

void print(const Options& options, const Summary& summary) {
  fmt::print("milliseconds a step, slowest rank:");
  for (std::size_t phase = 0; phase < kPhases; ++phase) {
    fmt::print(" {} {:.3f}", kPhaseNames[phase],
               1e3 * summary.seconds[phase] / static_cast<double>(options.steps));
  }
  fmt::print("\noutput_hash={:016x}\n", summary.hash);
  fmt::print("max_lse_error={:.2e} bound={:.2e}\n", summary.deviation.max_lse_error,
             summary.bound.lse_error);
  fmt::print("max_rel_error={:.2e} bound={:.2e} {}\n", summary.deviation.max_rel_error,
             summary.bound.rel_error, summary.passed ? "PASS" : "FAIL");
}

void write_json(const Options& options, const std::vector<std::string>& groups,
                const std::string& backend, const cohort::MergeChoice& choice,
                const Summary& summary) {
  nlohmann::ordered_json json;
  json["layout"] = {
      {"tp", options.layout.tp}, {"pp", options.layout.pp}, {"dcp", options.layout.dcp}};
  json["sizes"] = {{"batch", options.batch},
                   {"heads", options.heads},
                   {"latent_dim", options.latent_dim},
                   {"rope_dim", options.rope_dim},
                   {"value_dim", options.value_dim},
                   {"context", options.context},
                   {"steps", options.steps}};
  json["options"] = {{"merge", cohort::to_string(options.merge)},
                     {"symmetric", options.symmetric},
                     {"lse_base", options.lse_base == cohort::LseBase::e ? "e" : "2"},
                     {"graph", options.graph},
                     {"seed", options.seed}};
  json["backend"] = backend;
  json["merge_plan"] = cohort::to_string(choice.plan);
  json["merge_reason"] = choice.reason;
  json["groups"] = groups;
  for (std::size_t phase = 0; phase < kPhases; ++phase) {
    json["seconds"][std::string(kPhaseNames[phase])] = summary.seconds[phase];
  }
  json["output_hash"] = fmt::format("{:016x}", summary.hash);
  json["max_lse_error"] = summary.deviation.max_lse_error;
  json["lse_bound"] = summary.bound.lse_error;
  json["max_rel_error"] = summary.deviation.max_rel_error;
  json["bound"] = summary.bound.rel_error;
  json["passed"] = summary.passed;
  std::ofstream file(options.json);
  file << json.dump(2) << '\n';
  if (!file.flush()) {
    throw cohort::ConfigError(fmt::format("--json {}: cannot be written", options.json));
  }
}

}  // namespace dcp_decode
