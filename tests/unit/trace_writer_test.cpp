// SPDX-License-Identifier: Apache-2.0
#include "cohort/trace_writer.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cohort/error.hpp"
#include "cohort/log.hpp"
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
  /// Of rank 3 in run 17.
  [[nodiscard]] std::string file() const { return path_ + "/cohort.rank3.0000000000000011.json"; }
  [[nodiscard]] std::string content() const {
    std::ifstream file(this->file());
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  std::string path_;
};

constexpr std::uint64_t kRun = 17;

/// Of rank 3 of 5.
std::unique_ptr<StateTrace> make_trace(const TraceOptions& options) {
  auto trace = std::make_unique<StateTrace>(options, 3, 5);
  trace->belongs_to({.id = kRun, .hosts = {0, 0, 0, 1, 1}});
  return trace;
}

void call(FlightRecorder& recorder) {
  const TraceEntry entry = recorder.begin({.call = TraceCall::all_reduce}, 4, true, {}, 0, {}, 0);
  recorder.end(entry, {}, 0);
}

}  // namespace

TEST_CASE("the first failure is written, and the first time-out", "[trace_writer]") {
  const Folder folder;
  const auto recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{3, 4}, TraceRings{});
  {
    const auto trace = make_trace({.folder = folder.path()});
    trace->add(recorder);
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
  const auto trace = make_trace({});
  trace->add(recorder);
  recorder->failed("a cable", true);
  CHECK(std::filesystem::is_empty(folder.path()));
  trace->write(folder.file(), "on demand");
  CHECK_THAT(folder.content(),
             contains(R"({"cohort_trace":3,"run":"0000000000000011","rank":3,"ranks":5,)",
                      R"("hosts":[0,0,0,1,1],)", R"("name":"tp[0]")"));
  CHECK_THROWS_AS(trace->write(folder.path() + "/absent/file", "on demand"), TransportError);
}

TEST_CASE("when a group works again, its next failure is written", "[trace_writer]") {
  const Folder folder;
  const auto make = [](const char* name) {
    return std::make_shared<FlightRecorder>(name, 0, std::vector{3, 4}, TraceRings{});
  };
  const auto first = make("tp[0]");
  const auto second = make("dp[0]");
  const auto trace = make_trace({.folder = folder.path()});
  trace->add(first);
  trace->add(second);
  first->failed("a time-out", true);
  call(*second);
  second->failed("what follows", true);
  CHECK_THAT(folder.content(), contains("a time-out"));
  call(*first);
  first->failed("another day", false);
  CHECK_THAT(folder.content(), contains(R"("late":false,"reason":"another day")"));
}

TEST_CASE("before ranks have agreed on a run the file says so", "[trace_writer]") {
  const Folder folder;
  const auto recorder =
      std::make_shared<FlightRecorder>("forming", 0, std::vector{3, 4}, TraceRings{});
  StateTrace trace({.folder = folder.path()}, 3, 5);
  trace.add(recorder);
  recorder->failed("rank 1 did not come", true);
  const std::string path =
      folder.path() + "/cohort.rank3.forming." + std::to_string(::getpid()) + ".json";
  REQUIRE(std::filesystem::exists(path));
  trace.remove(*recorder);
  std::filesystem::remove(path);
  recorder->failed("nobody listens", true);
  CHECK(std::filesystem::is_empty(folder.path()));
}

TEST_CASE("what cannot be written leaves nothing, and what matters is in the log",
          "[trace_writer]") {
  const Folder folder;
  const auto recorder =
      std::make_shared<FlightRecorder>("tp[0]", 0, std::vector{3, 4}, TraceRings{});
  const auto trace = make_trace({.folder = folder.path()});
  trace->add(recorder);
  for (int i = 0; i < 500; ++i) {
    call(*recorder);
  }
  const TraceEntry entry = recorder->begin({.call = TraceCall::barrier}, 0, true, {}, 0, {}, 0);
  std::string said;
  const LogSink sink =
      set_log_sink([&said](LogLevel, std::string_view text) { said += std::string(text) + '\n'; });
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const rlimit small{.rlim_cur = 4096, .rlim_max = before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  recorder->failed("a time-out", true);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  set_log_sink(sink);
  recorder->end(entry, {}, 0);
  CHECK(std::filesystem::is_empty(folder.path()));
  CHECK_THAT(said, contains("write: File too large", "rank 3 is in barrier #501 of group tp[0]"));
}

TEST_CASE("of writers of one path at once each succeeds, and the file is one of theirs",
          "[trace_writer]") {
  const Folder folder;
  constexpr int kWriters = 4;
  std::vector<std::string> texts;
  for (int writer = 0; writer < kWriters; ++writer) {
    texts.emplace_back(100'000U + static_cast<unsigned>(writer), static_cast<char>('a' + writer));
  }
  std::vector<std::string> refused(kWriters);
  std::vector<std::thread> threads;
  for (std::size_t writer = 0; writer < kWriters; ++writer) {
    threads.emplace_back([&, writer] {
      try {
        for (int i = 0; i < 50; ++i) {
          detail::replace_file(folder.file(), texts[writer]);
        }
      } catch (const TransportError& error) {
        refused[writer] = error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(refused == std::vector<std::string>(kWriters));
  CHECK(std::count(texts.begin(), texts.end(), folder.content()) == 1);
  std::filesystem::remove(folder.file());
  CHECK(std::filesystem::is_empty(folder.path()));
  // What a process of another container left with this one's number is not written over.
  std::string name;
  const auto first = detail::open_unfinished(folder.file(), name);
  const auto at = name.rfind('-') + 1;
  const std::string next = name.substr(0, at) + std::to_string(std::stoi(name.substr(at)) + 1);
  static_cast<void>(std::ofstream(next + ".part"));
  detail::replace_file(folder.file(), texts[0]);
  CHECK(folder.content() == texts[0]);
  CHECK(std::filesystem::exists(next + ".part"));
}

TEST_CASE("a folder is made, and one that cannot be is refused at once", "[trace_writer]") {
  const Folder folder;
  const std::string absent = folder.path() + "/absent/deep";
  for (int rank = 0; rank < 2; ++rank) {  // the second finds it
    static_cast<void>(make_trace({.folder = absent}));
    CHECK(std::filesystem::is_directory(absent));
  }
  static_cast<void>(std::ofstream(folder.path() + "/file"));
  for (const auto* const path : {"/file", "/file/below"}) {
    CHECK_THROWS_MATCHES(make_trace({.folder = folder.path() + path}), ConfigError,
                         test::says("expected a folder"));
  }
}

TEST_CASE("a signal has the trace written", "[trace_writer]") {
  const Folder folder;
  const auto trace = make_trace({.folder = folder.path(), .signal = SIGUSR2});
  REQUIRE(::raise(SIGUSR2) == 0);
  for (int i = 0; i < 500 && !std::filesystem::exists(folder.file()); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CHECK_THAT(folder.content(), contains(R"("reason":"a signal")"));
}
