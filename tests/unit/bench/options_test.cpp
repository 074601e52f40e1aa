// SPDX-License-Identifier: Apache-2.0
#include "../bench/cohort_bench/options.hpp"

#include <string>
#include <vector>

#include "support/catch.hpp"

using namespace cohort::bench;
using cohort::ConfigError;
using cohort::DType;
using cohort::test::says;

namespace {

Options parse(const std::vector<std::string>& arguments) { return parse_options(arguments); }

}  // namespace

TEST_CASE("without options everything is measured, in the type that the backend's library adds") {
  const Options options = parse({});
  CHECK(options.benches.size() == kBenches.size());
  CHECK(options.has(Path::raw));
  CHECK(options.has(Plan::one_kernel));
  CHECK(options.has(Mode::graph));
  CHECK_FALSE(options.has(Mode::issue));
  CHECK_FALSE(options.sample_calls);
  CHECK(parse({"--sample-calls", "8"}).sample_calls == 8);
  CHECK_FALSE(options.check);
  CHECK(options.inputs == Inputs::written);
  CHECK(parse({"--inputs", "kept"}).inputs == Inputs::kept);
  CHECK(parse({"--backend", "cuda"}).inputs == Inputs::kept);
  CHECK(options.dtypes == std::vector<DType>{DType::f32});
  CHECK(parse({"--backend", "cuda"}).dtypes == std::vector<DType>{DType::bf16});
  CHECK(parse({"--backend", "cuda", "--dtype", "f16"}).dtypes == std::vector<DType>{DType::f16});
}

TEST_CASE("lists are separated by commas, keep their order, and name a thing once") {
  const Options options = parse({"--bench=all_reduce,all_gather,all_reduce", "--batches", "8,1"});
  CHECK(options.benches == std::vector<Bench>{Bench::all_reduce, Bench::all_gather});
  CHECK(options.batches == std::vector<std::int64_t>{8, 1});
  CHECK(parse({"--bench", "all"}).benches.size() == kBenches.size());
}

TEST_CASE("sizes have binary suffixes and step by the factor up to the last that fits") {
  const Options options = parse({"--min-bytes", "2K", "--max-bytes", "1MiB", "--factor", "4"});
  CHECK(options.sizes() == std::vector<std::int64_t>{2048, 8192, 32768, 131072, 524288});
  CHECK(parse({"--min-bytes", "3", "--max-bytes", "3"}).sizes() == std::vector<std::int64_t>{3});
  const Options huge =
      parse({"--min-bytes", "1", "--max-bytes", "8589934591G", "--factor", "1024"});
  CHECK(huge.sizes().size() == 7);
}

TEST_CASE("a wrong argument is named with what was expected") {
  CHECK_THROWS_MATCHES(parse({"--bench", "all_gathr"}), ConfigError,
                       says("--bench", "all_gather", "all_gathr"));
  CHECK_THROWS_MATCHES(parse({"--bench", ""}), ConfigError, says("--bench"));
  CHECK_THROWS_MATCHES(parse({"--min-bytes", "2X"}), ConfigError, says("--min-bytes", "2X"));
  CHECK_THROWS_MATCHES(parse({"--min-bytes", "0"}), ConfigError, says("--min-bytes", "0"));
  CHECK_THROWS_MATCHES(parse({"--max-bytes", "99999999999G"}), ConfigError, says("--max-bytes"));
  CHECK_THROWS_MATCHES(parse({"--min-bytes", "4K", "--max-bytes", "2K"}), ConfigError,
                       says("--max-bytes", "4096", "2048"));
  CHECK_THROWS_MATCHES(parse({"--factor", "1"}), ConfigError, says("--factor", "2"));
  CHECK_THROWS_MATCHES(parse({"--modes", "eager,issue"}), ConfigError, says("--modes", "issue"));
  CHECK(parse({"--modes", "issue", "--backend", "cuda"}).modes == std::vector<Mode>{Mode::issue});
  CHECK_THROWS_MATCHES(parse({"--inputs", "new"}), ConfigError, says("--inputs", "written"));
  CHECK_THROWS_MATCHES(parse({"--inputs", "written", "--backend", "cuda"}), ConfigError,
                       says("--inputs", "kept"));
  CHECK_THROWS_MATCHES(parse({"--iters", "0"}), ConfigError, says("--iters"));
  CHECK_THROWS_MATCHES(parse({"--sample-calls", "0"}), ConfigError, says("--sample-calls"));
  CHECK_THROWS_MATCHES(parse({"--batches", "1,,2"}), ConfigError, says("--batches"));
  CHECK_THROWS_MATCHES(parse({"--bananas", "1"}), ConfigError, says("--bananas", "no such option"));
  CHECK_THROWS_MATCHES(parse({"--bakend", "host"}), ConfigError, says("did you mean --backend?"));
  CHECK_THROWS_MATCHES(parse({"--gaols"}), ConfigError, says("did you mean --goals?"));
  CHECK_THROWS_MATCHES(parse({"--json"}), ConfigError, says("--json: expected a value"));
}

TEST_CASE("an option is suggested where one is near") {
  using namespace cohort::tools;
  CHECK(edits("kitten", "sitting") == 3);
  CHECK(edits("", "abc") == 3);
  CHECK(options_in("mpirun x --b-c 3\n  --d=4, -e\n--") ==
        std::vector<std::string>{"--b-c", "--d", "--"});
  CHECK(nearest_option("--bananas", usage()).empty());
  CHECK(no_such_option("--bananas=3", usage()) == "--bananas: no such option; --help lists them");
  CHECK(no_such_option("--max-byte=3", usage()) ==
        "--max-byte: no such option; did you mean --max-bytes? --help lists them");
}

TEST_CASE("the help names every option's values") {
  const std::string text = usage();
  for (const auto& entry : kBenches) {
    CHECK(text.find(entry.name) != std::string::npos);
  }
  for (const auto& entry : kPlans) {
    CHECK(text.find(entry.name) != std::string::npos);
  }
}
