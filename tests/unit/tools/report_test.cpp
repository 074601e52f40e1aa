// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <sys/resource.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "command_line/command_line.hpp"
#include "support/catch.hpp"
#include "support/forked.hpp"
#include "support/threads.hpp"

namespace {

using namespace cohort::info;

Report small_report() {
  Report report;
  report.version = "1.2.3";
  report.backend = "host";
  report.ranks = 4;
  report.sections = {{"Machine", {0, 1, 2}, {{"cores", "8"}}},
                     {"Machine", {3}, {{"cores", "2", "few"}}}};
  report.groups = {{"tp[0]", {0, 1, 2, 3}, "on", "on", false}};
  report.checks = {{"all_gather", 1.25, ""}};
  return report;
}

}  // namespace

TEST_CASE("a write beyond a limit of the size of files throws, and is no signal", "[cohort_info]") {
  cohort::test::run_in_child([] {
    const rlimit limit{16, 16};
    setrlimit(RLIMIT_FSIZE, &limit);
    std::FILE* const file = std::tmpfile();
    cohort::tools::write_all(file, "sixteen letters!");
    cohort::test::check_throws<std::system_error>(
        [&] { cohort::tools::write_all(file, "and one more"); },
        "the output cannot be written: File too large");
  });
}

TEST_CASE("ranks are written as ranges", "[cohort_info]") {
  CHECK(ranges({}).empty());
  CHECK(ranges({5}) == "5");
  CHECK(ranges({0, 1, 2, 4, 6, 7}) == "0-2,4,6-7");
}

TEST_CASE("sections that several ranks found alike are shown once", "[cohort_info]") {
  const Section machine{"Machine", {}, {{"cores", "8"}}};
  const Section other{"Machine", {}, {{"cores", "2"}}};
  const Section variables{"Environment", {}, {{"A", "1"}}};
  const auto all = merged({{machine, variables}, {other, variables}, {machine, variables}});
  REQUIRE(all.size() == 3);
  CHECK(all[0].ranks == std::vector{0, 2});
  CHECK(all[1].title == "Machine");
  CHECK(all[1].ranks == std::vector{1});
  CHECK(all[2].ranks == std::vector{0, 1, 2});
}

TEST_CASE("facts arrive at other ranks as they left", "[cohort_info]") {
  const std::vector<Section> sections{{"Machine", {}, {{"a", "b", "c"}, {"\"quoted\"", "\n"}}}};
  const auto back = unpack(pack(sections));
  REQUIRE(back.size() == 1);
  CHECK(back[0].title == "Machine");
  CHECK(back[0].facts == sections[0].facts);
}

TEST_CASE("the page says which ranks differ and what stands in the way", "[cohort_info]") {
  const std::string page = to_text(small_report());
  CHECK(page.find("Machine (rank 0-2)") != std::string::npos);
  CHECK(page.find("Machine (rank 3)") != std::string::npos);
  CHECK(page.find("! few") != std::string::npos);
  CHECK(page.find("1.2 us") != std::string::npos);
  CHECK(page.find("All that was asked for works.") != std::string::npos);
}

TEST_CASE("JSON holds everything", "[cohort_info]") {
  const auto json = nlohmann::json::parse(to_json(small_report()));
  CHECK(json.at("ranks") == 4);
  CHECK(json.at("well") == true);
  CHECK(json.at("sections").at(1).at("facts").at(0).at("problem") == "few");
  CHECK(json.at("groups").at(0).at("windows") == "on");
  CHECK(json.at("self_test").at(0).at("median_us") == 1.25);
}

TEST_CASE("a group that was denied something, or a failed check, is not well", "[cohort_info]") {
  Report report = small_report();
  CHECK(is_well(report));
  report.groups[0].denied = true;
  CHECK_FALSE(is_well(report));
  report.groups[0].denied = false;
  report.checks[0].error = "rank 1: element 0 is 1, expected 2";
  CHECK_FALSE(is_well(report));
  CHECK(to_text(report).find("! rank 1: element 0") != std::string::npos);
}
