// SPDX-License-Identifier: Apache-2.0
// What this machine and these ranks can do, and why not; then a self-test of every collective.
//
//   cohort_info                      one rank
//   mpirun -n 8 cohort_info          the ranks of a job
//   mpirun -n 8 cohort_info --json   for programs

#include <fmt/format.h>

#include <cohort/cohort.hpp>
#include <cohort/mpi.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "command_line/cli11.hpp"
#include "command_line/command_line.hpp"
#include "device.hpp"
#include "machine_facts.hpp"
#include "report.hpp"
#include "self_test.hpp"

namespace cohort::info {
namespace {

struct Options {
  std::string backend = "automatic";
  int tp = 0;
  int pp = 1;
  int dcp = 0;
  bool windows = true;
  bool self_test = true;
  bool json = false;
};

/// True where the program ends at once, with `status`.
bool parse(int argc, char** argv, bool prints, Options& options, int& status) {
  CLI::App app(
      "Shows what this machine and these ranks can do and why not, then tests every collective.\n"
      "Exit status 1 where something that was asked for is off or a check fails.\n\n"
      "  mpirun -n 8 cohort_info --tp 8 --dcp 4");
  app.add_option("--backend", options.backend, "host, cuda, or automatic: cuda where a card is")
      ->check(CLI::IsMember({"automatic", "host", "cuda"}))
      ->capture_default_str();
  app.add_option("--tp", options.tp, "Ranks of a TP group; all by default");
  app.add_option("--pp", options.pp, "Pipeline stages")->capture_default_str();
  app.add_option("--dcp", options.dcp, "Ranks of a DCP group; the TP group's by default");
  app.add_flag("!--no-windows", options.windows, "Do not ask for windows");
  app.add_flag("!--no-self-test", options.self_test, "Only look");
  app.add_flag("--json", options.json, "JSON instead of a page of text");
  try {
    app.parse(argc, argv);
    return false;
  } catch (const CLI::ParseError& error) {
    const tools::Refusal refusal = tools::refusal(app, error);
    status = refusal.status;
    if (prints) {
      fmt::print(status == 0 ? stdout : stderr, "{}", refusal.text);
    }
    return true;
  }
}

std::unique_ptr<Device> choose(const std::string& backend) {
  if (backend == "cuda" || (backend == "automatic" && cuda_obstacle().empty())) {
    return cuda_device();
  }
  return host_device();
}

/// Collective. The facts of all ranks, those that agree together.
std::vector<Section> facts_of_all(ControlPlane& world) {
  std::vector<Section> mine{machine_facts()};
  for (auto& section : cuda_facts()) {
    mine.push_back(std::move(section));
  }
  mine.push_back(environment_facts());
  std::vector<std::vector<Section>> by_rank;
  const std::string packed = pack(mine);
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(packed)))) {
    by_rank.push_back(
        unpack(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())));
  }
  return merged(by_rank);
}

std::string on_or_off(const Answer& answer) {
  return answer.on ? "on" : fmt::format("off ({})", explain(answer));
}

/// Collective. Every group of the job once, as its first rank sees it.
std::vector<Group> groups_of_all(ParallelState& state) {
  std::vector<Group> all;
  for (GroupCoordinator* group : state.groups()) {
    const auto& decision = group->decision();
    const std::string line =
        group->rank() == 0
            ? fmt::format("{}\t{}\t{}\t{}", group->name(), on_or_off(decision.nccl_windows),
                          on_or_off(decision.peer_mapping), warning_due(decision) ? 1 : 0)
            : "";
    const auto lines = state.world().control().all_gather(std::as_bytes(std::span(line)));
    for (std::size_t r = 0; r < lines.size(); ++r) {
      std::string text(reinterpret_cast<const char*>(lines[r].data()), lines[r].size());
      if (text.empty()) {
        continue;
      }
      std::vector<std::string> fields(1);
      for (const char c : text) {
        if (c == '\t') {
          fields.emplace_back();
        } else {
          fields.back() += c;
        }
      }
      all.push_back({.name = fields.at(0),
                     .ranks = group_ranks(state.layout(), group->kind(), static_cast<int>(r)),
                     .windows = fields.at(1),
                     .peer_mapping = fields.at(2),
                     .denied = fields.at(3) == "1"});
    }
  }
  return all;
}

Report make_report(ControlPlane& world, const Options& options) {
  Report report;
  report.version = COHORT_VERSION;
  report.ranks = world.size();
  report.sections = facts_of_all(world);
  const auto device = choose(options.backend);
  report.backend = to_string(device->backend()->kind());
  ParallelLayout layout{.tp = options.tp, .pp = options.pp, .dcp = options.dcp};
  layout.tp = layout.tp > 0 ? layout.tp : world.size() / std::max(1, layout.pp);
  layout.dcp = layout.dcp > 0 ? layout.dcp : layout.tp;
  // The page says what a warning would.
  const LogSink sink = set_log_sink([](LogLevel, std::string_view) {});
  auto state = ParallelState::create(
      world, {.layout = layout,
              .backend = device->backend(),
              .symmetric = {.enabled = options.windows, .selection = Selection::all()}});
  set_log_sink(sink);
  report.groups = groups_of_all(state);
  if (options.self_test) {
    report.checks = self_test(state, *device);
  }
  if (is_well(report)) {
    state.shutdown();
  }
  return report;
}

/// False where it cannot be written, of which it speaks: the session ends in order all the same.
bool print(const std::string& text) {
  try {
    tools::write_all(stdout, text);
    return true;
  } catch (const std::system_error& error) {
    fmt::print(stderr, "cohort_info: {}\n", error.what());
    return false;
  }
}

}  // namespace
}  // namespace cohort::info

int main(int argc, char** argv) {
  using namespace cohort;
  try {
    MpiSession mpi(argc, argv);
    const bool prints = mpi.world().rank() == 0;
    info::Options options;
    int status = EXIT_SUCCESS;
    if (info::parse(argc, argv, prints, options, status)) {
      return status;
    }
    const info::Report report = info::make_report(mpi.world(), options);
    if (prints &&
        !info::print(options.json ? info::to_json(report) + '\n' : info::to_text(report))) {
      return EXIT_FAILURE;
    }
    return info::is_well(report) ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& error) {
    fmt::print(stderr, "cohort_info: {}\n", error.what());
    return EXIT_FAILURE;
  }
}
