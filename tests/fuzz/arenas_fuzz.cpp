// SPDX-License-Identifier: Apache-2.0
// Random lives of arenas: what lives never overlaps, everything comes back, offsets stay alike.

#include <algorithm>
#include <array>
#include <cohort/cohort.hpp>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "setup.hpp"
#include "support/threads.hpp"

namespace cohort::fuzz::arenas {
namespace {

using test::u;

constexpr int kTargets = 4;  // DCP, TP, both, and none
constexpr int kPools = 2;

enum class Kind {
  allocate,
  release,
  release_two,  ///< In another order on every other rank.
  record_stream,
  capture,
  drop,     ///< A capture that throws.
  retried,  ///< A capture that throws on one rank alone, which tries again.
  launch,
  destroy_graph,
  reclaim,
  reserve,
};

struct Command {
  Kind kind = Kind::allocate;
  int target = 0;
  std::int64_t bytes = 0;
  int stream = 0;
  std::uint64_t which = 0;
  int pool = -1;
  int rank = 0;
  std::vector<Command> inner;  ///< Of a capture: allocate, release, and reserve for a check.
};

std::string to_string(const Command& c) {
  constexpr const char* kNames[] = {"allocate", "release", "release two",     "record stream",
                                    "capture",  "drop",    "retried",         "launch",
                                    "destroy",  "reclaim", "reserve or check"};
  std::string text = fmt::format("{} {} in {} on {}, {}", kNames[static_cast<int>(c.kind)], c.bytes,
                                 c.target, c.stream, c.which);
  if (!c.inner.empty()) {
    text += fmt::format(", pool {}, rank {} {{", c.pool, c.rank);
    for (const auto& inner : c.inner) {
      text += " " + to_string(inner) + ";";
    }
    text += " }";
  }
  return text;
}

Command draw_block(Random& random) {
  Command c;
  c.target = static_cast<int>(random.between(0, kTargets - 1));
  c.bytes = random.pick({0, 1, 255, 256, 257, 4096, 70'000}) + random.between(0, 5000);
  c.stream = random.one_in(3) ? 1 : 0;
  c.which = random.word() % 1000;
  return c;
}

Command draw_command(Random& random, int ranks) {
  Command c = draw_block(random);
  c.kind = random.pick({Kind::allocate, Kind::allocate, Kind::allocate, Kind::allocate,
                        Kind::release, Kind::release, Kind::release_two, Kind::record_stream,
                        Kind::capture, Kind::capture, Kind::drop, Kind::retried, Kind::launch,
                        Kind::launch, Kind::destroy_graph, Kind::reclaim, Kind::reserve});
  if (c.kind == Kind::capture || c.kind == Kind::drop || c.kind == Kind::retried) {
    c.pool = c.kind == Kind::capture ? static_cast<int>(random.between(-1, kPools - 1)) : -1;
    c.rank = static_cast<int>(random.between(0, ranks - 1));
    c.inner.resize(u(random.between(1, 12)));
    for (auto& inner : c.inner) {
      inner = draw_block(random);
      inner.kind = random.pick({Kind::allocate, Kind::allocate, Kind::release, Kind::reserve});
    }
  }
  return c;
}

/// Memory that should hold one byte everywhere.
struct Filled {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  int value = 0;

  void fill() const {
    if (bytes > 0) {
      std::memset(data, value, bytes);
    }
  }
  void check(const char* when) const {
    for (std::size_t i = 0; i < bytes; ++i) {
      if (data[i] != static_cast<std::byte>(value)) {
        throw std::runtime_error(fmt::format("{}: byte {} of a block of {} holds {}, not {}", when,
                                             i, bytes, static_cast<int>(data[i]), value));
      }
    }
  }
};

struct Block {
  Tensor tensor;
  Filled filled;
};

struct Thrown : std::exception {};

/// One rank that carries out the commands.
class Player {
 public:
  Player(ControlPlane& world, const Setup& setup)
      : state_(setup.create(world)), rank_(world.rank()) {
    targets_ = {state_.dcp(), state_.tp(), state_.audience({&state_.dcp(), &state_.tp()}),
                ScopeTarget{nullptr, &state_.backend()}};
  }

  void play(const Command& c) {
    switch (c.kind) {
      case Kind::allocate: {
        auto block = allocate(c);
        block.filled.fill();
        live_.push_back(std::move(block));
        break;
      }
      case Kind::release:
        release(c.which);
        break;
      case Kind::release_two:
        release_two(c.which);
        break;
      case Kind::record_stream:
        if (!live_.empty()) {
          live_[c.which % live_.size()].tensor.record_stream(streams_[1 - c.stream]);
        }
        break;
      case Kind::capture:
        graphs_.push_back(capture(c, false));
        break;
      case Kind::drop:
        fail_to_capture(c);
        break;
      case Kind::retried:
        make_room(c);
        if (c.rank == rank_) {
          fail_to_capture(c);
        }
        graphs_.push_back(capture(c, false));
        break;
      case Kind::launch:
        if (!graphs_.empty()) {
          graphs_[c.which % graphs_.size()].launch(streams_[c.stream]);
        }
        break;
      case Kind::destroy_graph:
        if (!graphs_.empty()) {
          graphs_.erase(graphs_.begin() + static_cast<std::ptrdiff_t>(c.which % graphs_.size()));
        }
        break;
      case Kind::reclaim:
        state_.reclaim_graphs();
        break;
      case Kind::reserve:
        if (targets_[u(c.target)].arena != nullptr) {
          targets_[u(c.target)].arena->reserve(u(c.bytes) * 4);
        }
        break;
    }
    check_live(to_string(c).c_str());
  }

  /// Leaves everything, or the groups first, and looks for what is left.
  void leave(bool groups_first) {
    const auto all =
        state_.groups()[0]->control().all_gather(std::as_bytes(std::span(&offsets_, 1)));
    for (const auto& theirs : all) {
      test::check(std::memcmp(theirs.data(), &offsets_, sizeof(offsets_)) == 0,
                  "every rank allocated at the same offsets");
    }
    if (groups_first) {
      state_.shutdown();
      check_live("after the shutdown");
      live_.clear();
      graphs_.clear();
      return;
    }
    live_.clear();
    graphs_.clear();
    pools_ = {};
    state_.reclaim_graphs();
    for (const auto& arena : state_.captures().arenas()) {
      const auto left = arena->statistics();
      test::check_equal(left.used, std::uint64_t{0}, "bytes used at the end of " + arena->name());
      test::check_equal(left.live_blocks, std::uint64_t{0}, "live at the end of " + arena->name());
    }
    state_.shutdown();
  }

 private:
  Block allocate(const Command& c) {
    const auto& target = targets_[u(c.target)];
    const SymmetricScope scope(target, streams_[c.stream]);
    Block block{.tensor = empty({c.bytes}, DType::u8), .filled = {}};
    block.filled = {static_cast<std::byte*>(block.tensor.data()), block.tensor.bytes(),
                    next_value_++ % 251};
    if (target.arena != nullptr) {
      const auto offset = target.arena->offset_of(block.tensor.data());
      test::check(offset.has_value(), "a block lies in its arena");
      if (!trying_) {
        offsets_ = detail::mix(offsets_, *offset);
      }
    }
    return block;
  }

  void release(std::uint64_t which) {
    if (!live_.empty()) {
      live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(which % live_.size()));
    }
  }

  void release_two(std::uint64_t which) {
    if (live_.size() < 2) {
      return;
    }
    const std::size_t first = which % (live_.size() - 1);
    auto& a = live_[first].tensor;
    auto& b = live_[first + 1].tensor;
    if (rank_ % 2 == 0) {
      a.reset();
      b.reset();
    } else {
      b.reset();
      a.reset();
    }
    const auto at = live_.begin() + static_cast<std::ptrdiff_t>(first);
    live_.erase(at, at + 2);
  }

  void check_live(const char* when) const {
    for (const auto& block : live_) {
      block.filled.check(when);
    }
  }

  /// Collective: what the capture needs fits without growth.
  void make_room(const Command& c) {
    std::size_t bytes = 0;
    for (const auto& inner : c.inner) {
      bytes += u(inner.bytes) + 4096;
    }
    for (int t = 0; t < kTargets; ++t) {
      if (targets_[u(t)].arena != nullptr) {
        targets_[u(t)].arena->reserve(2 * bytes);
      }
    }
  }

  void fail_to_capture(const Command& c) {
    const auto values = next_value_;
    trying_ = true;
    if (c.kind == Kind::drop) {
      make_room(c);
    }
    bool thrown = false;
    try {
      static_cast<void>(capture(c, true));
    } catch (const Thrown&) {
      thrown = true;
    }
    test::check(thrown, "the capture threw");
    trying_ = false;
    next_value_ = values;
  }

  CapturedGraph capture(const Command& c, bool throws) {
    if (!throws && c.kind == Kind::capture) {
      make_room(c);
    }
    std::vector<Block> kept;
    auto graph = state_.capture(
        streams_[0], [&] { kept = record(c, throws); }, c.pool < 0 ? nullptr : &pools_[u(c.pool)]);
    for (auto& block : kept) {
      if (c.pool < 0) {
        block.filled.fill();
      } else {
        block.filled = {};  // graphs of the pool that were captured before may write there
      }
      live_.push_back(std::move(block));
    }
    return graph;
  }

  /// Returns what outlives the capture.
  std::vector<Block> record(const Command& c, bool throws) {
    const StreamRef first = streams_[0];
    const StreamRef second = streams_[1];
    second.wait_for(first);
    std::vector<Block> blocks;
    for (const auto& inner : c.inner) {
      const StreamRef stream = streams_[inner.stream];
      if (inner.kind == Kind::allocate) {
        blocks.push_back(allocate(inner));
        const Filled filled = blocks.back().filled;
        stream.submit([filled] { filled.fill(); });
      } else if (!blocks.empty()) {
        const auto at = blocks.begin() + static_cast<std::ptrdiff_t>(inner.which % blocks.size());
        const Filled filled = at->filled;
        stream.submit([filled] { filled.check("in a graph"); });
        if (inner.kind == Kind::release) {
          blocks.erase(at);
        }
      }
    }
    first.wait_for(second);
    for (const auto& block : blocks) {
      first.submit([filled = block.filled] { filled.check("at the end of a graph"); });
    }
    if (throws) {
      throw Thrown();
    }
    blocks.resize(std::min<std::size_t>(blocks.size(), c.which % 3));
    return blocks;
  }

  HostStream streams_[2];  // outlive what was allocated on them
  ParallelState state_;
  int rank_;
  std::vector<ScopeTarget> targets_;
  std::array<GraphPool, kPools> pools_;
  std::vector<CapturedGraph> graphs_;
  std::vector<Block> live_;
  std::uint64_t offsets_ = detail::kHashSeed;
  int next_value_ = 1;
  bool trying_ = false;
};

void round(Random& random, std::string& words) {
  const Setup setup = draw_setup(random);
  words += to_string(setup);
  std::vector<Command> commands(u(random.between(5, 60)));
  for (auto& command : commands) {
    command = draw_command(random, setup.ranks);
    words += to_string(command) + "\n";
  }
  const bool groups_first = random.one_in(4);
  test::run_ranks(setup.ranks, [&](ControlPlane& world) {
    Player player(world, setup);
    for (std::size_t i = 0; i < commands.size(); ++i) {
      try {
        player.play(commands[i]);
      } catch (const std::exception& error) {
        throw std::runtime_error(fmt::format("command {}: {}", i, error.what()));
      }
    }
    player.leave(groups_first);
  });
}

}  // namespace
}  // namespace cohort::fuzz::arenas

int main(int argc, char** argv) {
  return cohort::fuzz::drive(argc, argv, "arenas", 150, cohort::fuzz::arenas::round);
}
