// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_writer.hpp"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cohort/error.hpp"
#include "support/catch.hpp"

using namespace cohort;
using cohort::test::contains;

namespace {

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "traces-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { std::filesystem::remove_all(path_); }

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  /// Of rank 3's state 17.
  [[nodiscard]] std::string file() const {
    return path_ + "/cohort.rank3." + std::to_string(::getpid()) + ".17.json";
  }
  [[nodiscard]] std::string content() const {
    std::ifstream file(this->file());
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  std::string path_;
};

std::atomic<int> engines_handler_ran{0};

}  // namespace

TEST_CASE("the first failure is written, and the first time-out", "[trace_writer]") {
  const Folder folder;
  const auto recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{3, 4}, TraceRings{});
  {
    StateTrace trace({.folder = folder.path()}, 3, 17);
    trace.add(recorder);
    CHECK(folder.content().empty());
    recorder->failed("a cable", false);
    CHECK_THAT(folder.content(), contains(R"("late":false,"reason":"a cable")"));
    recorder->failed("what follows", false);
    CHECK_THAT(folder.content(), contains("a cable"));
    recorder->failed("rank 1 did not arrive", true);
    CHECK_THAT(folder.content(), contains(R"("late":true,"reason":"rank 1 did not)"));
    recorder->failed("what follows", true);
    CHECK_THAT(folder.content(), contains("rank 1 did not"));
  }
  std::filesystem::remove(folder.file());
  recorder->failed("nobody listens", true);
  CHECK(folder.content().empty());
}

TEST_CASE("without a folder nothing is written, but on demand", "[trace_writer]") {
  const Folder folder;
  const auto recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{3, 4}, TraceRings{});
  StateTrace trace({}, 3, 17);
  trace.add(recorder);
  recorder->failed("a cable", true);
  CHECK(std::filesystem::is_empty(folder.path()));
  trace.write(folder.file(), "on demand");
  CHECK_THAT(folder.content(),
             contains(R"({"cohort_trace":1,"rank":3,)", R"("state":17,)", R"("name":"tp[0]")"));
  CHECK_THROWS_AS(trace.write(folder.path() + "/absent/file", "on demand"), TransportError);
}

TEST_CASE("a signal has the trace written, and the engine's handler runs", "[trace_writer]") {
  const Folder folder;
  struct sigaction engines {};
  engines.sa_handler = [](int) { ++engines_handler_ran; };
  REQUIRE(::sigaction(SIGUSR2, &engines, nullptr) == 0);
  StateTrace trace({.folder = folder.path(), .signal = SIGUSR2}, 3, 17);
  REQUIRE(::raise(SIGUSR2) == 0);
  CHECK(engines_handler_ran == 1);
  for (int i = 0; i < 500 && !std::filesystem::exists(folder.file()); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CHECK_THAT(folder.content(), contains(R"("reason":"a signal")"));
}

TEST_CASE("what is no signal to be caught is refused", "[trace_writer]") {
  CHECK_THROWS_AS(StateTrace({.signal = -1}, 3, 17), ConfigError);
  CHECK_THROWS_AS(StateTrace({.signal = 1000}, 3, 17), ConfigError);
  CHECK_THROWS_AS(StateTrace({.signal = SIGKILL}, 3, 17), ConfigError);
}
