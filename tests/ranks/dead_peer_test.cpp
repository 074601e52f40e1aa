// SPDX-License-Identifier: Apache-2.0
// One rank is killed while the others wait for it. Judged by dead_peer.sh, by the survivors' own
// lines: "survivor <rank>: TimeoutError after <ms> ms, missing <ranks>: <message>", then
// "survivor <rank>: leaves".
//
//   dead_peer MODE [VICTIM [LIMIT_MS]]     the modes are listed at the end of this file

#include <fmt/ranges.h>

#include <csignal>

#include <chrono>
#include <cohort/agreement.hpp>
#include <cohort/control_plane.hpp>
#include <cohort/error.hpp>
#include <cohort/mpi/mpi_session.hpp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace cohort;

namespace {

// What a mode gets. It works for a few rounds, calls `middle`, in which the victim dies, and goes
// on into the wait that has to end.
struct Scene {
  MpiSession& session;
  ControlPlane& world;
  int victim = 0;
  std::function<void()> middle;
};

using Mode = std::function<void(Scene&)>;

void all_gather(Scene& scene) {
  for (int round = 0; round < 10; ++round) {
    if (round == 5) {
      scene.middle();
    }
    scene.world.all_gather(Bytes(100));
  }
}

void barrier(Scene& scene) {
  scene.world.barrier();
  scene.middle();
  scene.world.barrier();
}

void broadcast(Scene& scene) {
  scene.world.broadcast(Bytes(10), scene.victim);
  scene.middle();
  scene.world.broadcast(Bytes(10), scene.victim);
}

// Long messages are under way to the victim when it dies.
void exchange(Scene& scene) {
  constexpr std::size_t kBulk = std::size_t{1} << 20;
  for (int round = 0; round < 2; ++round) {
    std::vector<ControlPlane::Outgoing> outgoing;
    std::vector<ControlPlane::Incoming> incoming;
    for (int r = 0; r < scene.world.size(); ++r) {
      outgoing.push_back({r, Bytes(kBulk)});
      incoming.push_back({r, kBulk});
    }
    if (round == 1) {
      scene.world.barrier();  // all have what the victim sent in the first round
      scene.middle();
    }
    scene.world.exchange(std::move(outgoing), incoming);
  }
}

void agreement(Scene& scene) {
  agree(scene.world, {.place = "growth of arena world", .sequence = 0, .bytes = 4096});
  scene.middle();
  agree(scene.world, {.place = "growth of arena world", .sequence = 1, .bytes = 4096});
}

// The victim dies after its last call: the end of the session has to notice.
void end_of_session(Scene& scene) {
  scene.world.barrier();
  scene.middle();
}

const std::vector<std::pair<std::string_view, Mode>> kModes{
    {"all_gather", all_gather}, {"barrier", barrier},     {"broadcast", broadcast},
    {"exchange", exchange},     {"agreement", agreement}, {"end_of_session", end_of_session},
};

void say(int rank, const std::string& text) {
  // One call, so that lines of ranks do not mix.
  std::fputs(fmt::format("survivor {}: {}\n", rank, text).c_str(), stdout);
  std::fflush(stdout);
}

void survive(int rank, Clock::time_point died, const std::function<void()>& body) {
  const auto waited = [&] {
    return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - died).count();
  };
  try {
    body();
    say(rank, "no error");
  } catch (const TimeoutError& error) {
    say(rank, fmt::format("TimeoutError after {} ms, missing {}: {}", waited(),
                          fmt::join(error.missing(), ","), error.what()));
  } catch (const Error& error) {
    say(rank, fmt::format("another error after {} ms: {}", waited(), error.what()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "";
  const int victim = argc > 2 ? std::atoi(argv[2]) : 1;
  const std::chrono::milliseconds limit(argc > 3 ? std::atoi(argv[3]) : 2000);
  Mode mode;
  for (const auto& [known, function] : kModes) {
    if (known == name) {
      mode = function;
    }
  }
  if (!mode) {
    std::puts("usage: dead_peer MODE [VICTIM [LIMIT_MS]], MODE one of:");
    for (const auto& [known, function] : kModes) {
      std::printf("  %s\n", known.data());
    }
    return 2;
  }

  MpiSession session(argc, argv, {.limit = limit});
  const int rank = session.world().rank();
  if (name == "end_of_session") {
    set_log_sink(
        [rank](LogLevel, std::string_view text) { say(rank, fmt::format("logs: {}", text)); });
  }
  auto died = Clock::now();
  Scene scene{session, session.world(), victim, [&] {
                // The others are surely inside their wait, not on the way to it.
                died = Clock::now();
                if (rank == victim) {
                  std::this_thread::sleep_for(std::chrono::milliseconds(200));
                  static_cast<void>(std::raise(SIGKILL));
                }
              }};
  survive(rank, died, [&] { mode(scene); });
  say(rank, "leaves");
  return EXIT_SUCCESS;  // the session turns it into an abort
}
