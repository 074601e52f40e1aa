// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <chrono>
#include <cohort/host/host_transport.hpp>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/forked.hpp"
#include "support/host_site.hpp"

using namespace cohort;
using namespace cohort::test;

using namespace std::chrono_literals;

TEST_CASE("a group whose ranks are on two machines uses the control plane", "[host]") {
  run_ranks(4, [](ControlPlane& plane) {
    const HostOptions options{.machine = plane.rank() < 2 ? "left" : "right"};
    Site site(plane, options, Memory::ordinary);
    check_equal(site.transport->capabilities().machines, 2, "machines");
    check(!site.transport->capabilities().peer_import, "out of reach");
    check(site.transport->peer_kernels() == nullptr, "no peer kernels");
    check_all_gather(site, plane, Dims{3, 5}, -1, {1, 0, 4, 2}, DType::bf16, Form::transposed);
    check_throws<UsageError>([&] { (void)site.transport->register_segment(*site.segment); },
                             "register_segment");
  });
}

TEST_CASE("ranks of one process reach each other", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::window);
    const auto& found = site.transport->capabilities();
    check(found.transport_windows && found.peer_access && found.peer_import, "capabilities");
    check_equal(found.machines, 1, "machines");
    check(site.transport->peer_kernels() != nullptr, "peer kernels");
    // A peer's copy is its segment itself.
    const auto peers = site.window->peers();
    check_equal(peers.size(), std::size_t{3}, "peers");
    check(peers[static_cast<std::size_t>(plane.rank())] == site.segment->data(), "own copy");
  });
}

TEST_CASE("the path can be read back", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site inside(plane, {}, Memory::window);
    const auto path = [](Site& site, Collective collective, std::int64_t count) {
      const auto in = site.tensor(Dims{count}, DType::f32, Form::contiguous);
      return site.transport->path(collective, in, in, 0);
    };
    check(path(inside, Collective::all_gather, 4096) == "direct", "large, in a window");
    check(path(inside, Collective::all_gather, 16) == "slot", "small, in a window");
    const auto scattered = [&](Collective collective, std::int64_t count) {
      const auto in = inside.tensor(Dims{count}, DType::f32, Form::contiguous);
      const auto out = collective == Collective::all_to_all ? in : in.slice(0, 0, count / 2);
      return inside.transport->path(collective, in, out, 0);
    };
    for (const auto& [collective, count] :
         {std::pair{Collective::reduce_scatter, 2048}, std::pair{Collective::all_to_all, 1024}}) {
      check(scattered(collective, count) == "direct", "half of it is read");
      check(scattered(collective, count - 24) == "slot", "half of less is read");
    }
    check(path(inside, Collective::all_reduce, 300000) == "direct", "more than fits a slot");
    check(path(inside, Collective::all_reduce, 100000) == "slot", "reduced by each");
    Site outside(plane, {}, Memory::ordinary);
    check(path(outside, Collective::reduce_scatter, 4096) == "slot", "ordinary memory");
    Site exchanged(plane, apart(), Memory::ordinary);
    check(path(exchanged, Collective::broadcast, 4096) == "exchange", "not mapped");
  });
  run_ranks(1, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    const auto in = site.tensor(Dims{4}, DType::f32, Form::contiguous);
    check(site.transport->path(Collective::all_gather, in, in, 0) == "local", "alone");
  });
}

TEST_CASE("ranks that make different calls all learn who differs, and work on", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::window);
    const auto in = site.tensor(Dims{6000}, DType::f32, Form::contiguous);
    const auto out = site.tensor(Dims{18000}, DType::f32, Form::contiguous);
    const auto same_error = [&](auto&& call, std::string_view word) {
      try {
        call();
      } catch (const SymmetryError& error) {
        check(error.ranks() == std::vector<int>{1}, "rank 1 is named");
        check(std::string_view(error.what()).find(word) != std::string_view::npos, error.what());
        return;
      }
      check(false, "a SymmetryError is thrown");
    };
    for (int round = 0; round < 3; ++round) {
      same_error(
          [&] {  // another operation
            if (plane.rank() == 1) {
              site.transport->all_reduce(in, in, ReduceOp::sum, {});
            } else {
              site.transport->all_gather(in, out, 0, equal_sizes(3, 6000), {});
            }
          },
          "rank 1 calls all_reduce of 24000 bytes of f32");
      same_error(
          [&] {  // another size
            const std::int64_t each = plane.rank() == 1 ? 5 : 6;
            site.transport->all_gather(in.slice(0, 0, each), out.slice(0, 0, 3 * each), 0,
                                       equal_sizes(3, each), {});
          },
          "rank 1 calls all_gather of 60 bytes");
      same_error(
          [&] {  // another reduction, then another root
            site.transport->all_reduce(in, in, plane.rank() == 1 ? ReduceOp::max : ReduceOp::min,
                                       {});
          },
          "variant");
      same_error([&] { site.transport->broadcast(in, plane.rank() == 1 ? 1 : 0, {}); }, "root 1");
      check_all_gather(site, plane, Dims{5, 7}, 1, {1, 2, 3}, DType::f32, Form::sliced);
    }
  });
}

TEST_CASE("a rank that never comes is named, and the group is unusable afterwards", "[host]") {
  const bool map_peers = GENERATE(true, false);
  run_ranks(
      3,
      [&](ControlPlane& plane) {
        Site site(plane, {.map_peers = map_peers}, Memory::ordinary);
        const auto tensor = site.tensor(Dims{4}, DType::f32, Form::contiguous);
        if (plane.rank() == 2) {
          std::this_thread::sleep_for(700ms);  // stays alive, and away
          return;
        }
        const auto start = Clock::now();
        try {
          site.transport->all_reduce(tensor, tensor, ReduceOp::sum, {});
          check(false, "a TimeoutError is thrown");
        } catch (const TimeoutError& error) {
          check(error.missing() == std::vector<int>{2}, error.what());
        }
        check(Clock::now() - start < 5s, "within the limit");
        check_throws<TransportError>([&] { site.transport->barrier({}); }, "earlier call");
        check_throws<TransportError>([&] { site.transport->synchronize({}, 10ms); },
                                     "earlier call");
      },
      300ms);
}

TEST_CASE("whoever comes late to memory that a peer gave up learns it, in every call", "[host]") {
  const auto call = GENERATE(values<void (*)(Transport&, const TensorView&, const TensorView&)>({
      [](Transport& it, const TensorView& in, const TensorView& out) {
        it.all_gather(in, out, 0, equal_sizes(2, in.shape()[0]), {});
      },
      [](Transport& it, const TensorView& in, const TensorView& out) {
        it.reduce_scatter(in, out.slice(0, 0, 32), 0, equal_sizes(2, 32), ReduceOp::sum, {});
      },
      [](Transport& it, const TensorView& in, const TensorView& out) {
        it.all_to_all(in, out.slice(0, 0, 64), {});
      },
      [](Transport& it, const TensorView& in, const TensorView&) { it.broadcast(in, 0, {}); },
      [](Transport& it, const TensorView& in, const TensorView& out) {
        const TensorView partial(in.data(), DType::f32, Dims{8, 4, 1024});
        const TensorView lse(in.data(), DType::f32, Dims{8, 4});
        const TensorView merged(out.data(), DType::f32, Dims{8, 2, 1024});
        it.peer_kernels()->merge_attention(by_head(2, partial, lse, merged), {});
      },
      [](Transport& it, const TensorView& in, const TensorView& out) {
        const TensorView nope(in.data(), DType::f32, Dims{8, 4, 512});
        const TensorView pe(in.data(), DType::f32, Dims{8, 4, 64});
        const TensorView q(out.data(), DType::f32, Dims{8, 8, 576});
        it.peer_kernels()->gather_query(nope, pe, q, {DType::f32, DType::f32}, {});
      },
  }));
  std::atomic<bool> gave_up{false};
  run_ranks(
      2,
      [&](ControlPlane& world) {
        const auto group = world.subgroup(std::vector{0, 1}, 1, "group");
        ControlPlane& plane = *group;
        Site site(plane, {}, Memory::mixed);  // rank 1's input passes the slot: it waits for nobody
        const auto in = site.tensor(Dims{64, 1024}, DType::f32, Form::contiguous);
        const auto out = site.tensor(Dims{128, 1024}, DType::f32, Form::contiguous);
        if (plane.rank() == 0) {
          check_throws<TimeoutError>([&] { call(*site.transport, in, out); }, "rank 1 did not");
          std::memset(in.data(), 0x77, in.bytes());  // the caller's again
          gave_up = true;
        } else {
          while (!gave_up) {
            std::this_thread::sleep_for(1ms);
          }
          check_throws<TimeoutError>([&] { call(*site.transport, in, out); }, "rank 0 gave up",
                                     "rank 1 did not");
          check_throws<TransportError>([&] { site.transport->barrier({}); }, "earlier call");
        }
        world.barrier();
      },
      300ms);
}

TEST_CASE("synchronize tells of a peer that gave up, and not of one that has left", "[host]") {
  const bool fails = GENERATE(true, false);
  const bool mapped = GENERATE(true, false);
  std::atomic<bool> over{false};
  run_ranks(
      2,
      [&](ControlPlane& world) {
        const auto group = world.subgroup(std::vector{0, 1}, 1, "group");
        ControlPlane& plane = *group;
        std::optional<Site> site(std::in_place, plane, mapped ? HostOptions{} : apart(),
                                 Memory::ordinary);
        site->transport->barrier({});
        if (plane.rank() == 0) {
          if (fails) {
            check_throws<TimeoutError>([&] { site->transport->barrier({}); }, "rank 1");
          } else {
            site.reset();
          }
          over = true;
        } else {
          while (!over) {
            std::this_thread::sleep_for(1ms);
          }
          const auto synchronize = [&] { site->transport->synchronize({}, 10ms); };
          if (!fails) {
            synchronize();
          } else {
            check_throws<TimeoutError>(synchronize, "rank 0 gave up", "rank 1 did not arrive");
          }
          check_equal(site->transport->failed(), fails, "failed");
        }
        world.barrier();
      },
      300ms);
}

TEST_CASE("what ends a group over shared memory ends its agreements, and the reverse", "[host]") {
  const bool agreement_fails = GENERATE(true, false);
  const auto at_once = [](const auto& call) {
    const auto start = Clock::now();
    check_throws<TimeoutError>(call, "rank 0 gave up", "rank 1 is nowhere");
    check(Clock::now() - start < kRanksTimeLimit / 2, "before the limit");
  };
  run_ranks(2, [&](ControlPlane& world) {
    const auto group = world.subgroup(std::vector{0, 1}, 1, "group");
    Site site(*group, {}, Memory::ordinary);
    site.transport->barrier({});
    const auto own = std::make_exception_ptr(TimeoutError("rank 1 is nowhere", {1}));
    if (group->rank() == 0) {
      std::this_thread::sleep_for(50ms);  // the other waits by then
      if (agreement_fails) {
        check_throws<TimeoutError>([&] { agree(*group, {.place = "here"}, own); }, "nowhere");
        check(site.transport->failed(), "failed");
        check_throws<TransportError>([&] { site.transport->barrier({}); }, "earlier call");
      } else {
        site.transport->forsake_peers(detail::GiveUp::because(own, 0));
        check(group->poisoned(), "the control plane has ended");
      }
    } else if (agreement_fails) {
      at_once([&] { site.transport->barrier({}); });
      check(group->poisoned() && site.transport->failed(), "both have ended");
    } else {
      at_once([&] { agree(*group, {.place = "here"}); });
      check(site.transport->failed(), "both have ended");
    }
    world.barrier();
  });
}

TEST_CASE("a late rank does not send to a group that has ended over its control plane", "[host]") {
  run_ranks(2, [&](ControlPlane& world) {
    const auto group = world.subgroup(std::vector{0, 1}, 1, "group");
    Site site(*group, {}, Memory::ordinary);
    site.transport->barrier({});
    if (group->rank() == 1) {
      group->give_up("it is over");
    }
    world.barrier();
    std::this_thread::sleep_for(20ms);  // behind the last look
    if (group->rank() == 0) {
      const auto in = site.tensor(Dims{4}, DType::i32, Form::contiguous);
      check_throws<SymmetryError>([&] { site.transport->send(in, 1, {}); }, "rank 1 gave up",
                                  "it is over");
    }
    world.barrier();
  });
}

TEST_CASE("who waits over shared memory is not blamed, but the one at the chain's end", "[host]") {
  run_ranks(
      4,
      [&](ControlPlane& world) {
        const auto group = world.subgroup(std::vector{0, 1, 2, 3}, 1, "group");
        Site site(*group, {}, Memory::ordinary);
        site.transport->barrier({});
        if (const int rank = world.rank(); rank < 3) {
          std::this_thread::sleep_for(200ms * rank);
          const auto out = site.tensor(Dims{4}, DType::i32, Form::contiguous);
          try {
            site.transport->recv(out, rank + 1, {});
            check(false, "a TimeoutError is thrown");
          } catch (const TimeoutError& error) {
            check(error.missing() == std::vector{3}, error.what());
          }
        } else {
          std::this_thread::sleep_for(1500ms);
        }
      },
      1s);
}

TEST_CASE("a forked child neither uses its parent's group nor ends it", "[host]") {
  const bool map_peers = GENERATE(true, false);
  run_ranks(2, [&](ControlPlane& plane) {
    std::optional<Site> site(std::in_place, plane, HostOptions{.map_peers = map_peers},
                             Memory::window);
    const auto tensor = site->tensor(Dims{4}, DType::f32, Form::contiguous);
    std::fill_n(tensor.data_as<float>(), 4, 1.0F);
    if (plane.rank() == 0) {
      run_in_child([&] {
        const auto refused = [](const auto& call) {
          check_throws<UsageError>(call, "forked child of its owner");
        };
        refused([&] { site->transport->all_reduce(tensor, tensor, ReduceOp::sum, {}); });
        refused([&] { site->transport->synchronize({}, 10ms); });
        refused([&] { plane.barrier(); });
        refused([&] { plane.subgroup(std::vector{0, 1}, 7, "again")->barrier(); });
        site->transport->forsake_peers(detail::GiveUp::by(plane.rank(), "a child ends"));
        site.reset();  // as the child's exit does
      });
    }
    site->transport->all_reduce(tensor, tensor, ReduceOp::sum, {});
    check_equal(tensor.data_as<float>()[3], 2.0F, "the parent's group works on");
    site->transport->synchronize({}, 10ms);
    plane.barrier();
  });
}

TEST_CASE("a rank that has left is noticed before the time limit", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    site.transport->barrier({});
    if (plane.rank() == 1) {
      return;
    }
    const auto start = Clock::now();
    check_throws<TransportError>([&] { site.transport->barrier({}); }, "rank 1 has destroyed");
    check(Clock::now() - start < kRanksTimeLimit / 2, "long before the limit");
  });
}

TEST_CASE("captured collectives run at every launch", "[host]") {
  const Memory memory = GENERATE(Memory::ordinary, Memory::window);
  run_ranks(2, [&](ControlPlane& plane) {
    Site site(plane, {}, memory);
    HostStream stream;
    auto in = site.tensor(Dims{3000}, DType::f32, Form::contiguous);
    auto out = site.tensor(Dims{6000}, DType::f32, Form::contiguous);
    auto sum = site.tensor(Dims{3000}, DType::f32, Form::contiguous);
    fill(in, plane.rank());
    stream.begin_capture();
    {
      const auto sizes = equal_sizes(2, 3000);  // the recorded call keeps its own
      site.transport->all_gather(in, out, 0, sizes, stream);
      site.transport->reduce_scatter(out, sum, 0, sizes, ReduceOp::sum, stream);
      site.transport->barrier(stream);
    }
    const auto graph = stream.end_capture();
    check(*reinterpret_cast<const std::uint32_t*>(out.data()) == 0x5a5a5a5aU, "nothing ran yet");
    for (int round = 0; round < 4; ++round) {
      for (int i = 0; i < 3000; ++i) {
        in.data_as<float>()[i] = static_cast<float>(value_at(plane.rank(), i) + round);
      }
      graph->launch(stream);
      for (int i = 0; i < 3000; ++i) {
        check_equal(out.data_as<float>()[3000 + i], static_cast<float>(value_at(1, i) + round),
                    "replayed all_gather");
        check_equal(sum.data_as<float>()[i],
                    2 * static_cast<float>(value_at(plane.rank(), i) + round),
                    "replayed reduce_scatter");
      }
    }
  });
}

TEST_CASE("an error inside a replay comes out of launch", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    HostStream stream;
    const auto tensor = site.tensor(Dims{plane.rank() + 1}, DType::f32, Form::contiguous);
    stream.begin_capture();
    site.transport->all_reduce(tensor, tensor, ReduceOp::sum, stream);
    const auto graph = stream.end_capture();
    check_throws<SymmetryError>([&] { graph->launch(stream); }, "different calls");
    site.transport->barrier(stream);
  });
}

TEST_CASE("messages to oneself or to nobody are refused", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    Site site(plane, {}, Memory::ordinary);
    const auto tensor = site.tensor(Dims{1}, DType::f32, Form::contiguous);
    check_throws<UsageError>([&] { site.transport->send(tensor, plane.rank(), {}); }, "to:");
    check_throws<UsageError>([&] { site.transport->recv(tensor, 2, {}); }, "from:", "got 2");
    site.transport->barrier({});
  });
}

TEST_CASE("a window whose memory one rank lacks fails on every rank", "[host]") {
  run_ranks(3, [](ControlPlane& plane) {
    auto backend = host_backend();
    auto transport = backend->connect(plane);
    // Another size on one rank.
    auto segment = backend->allocate_segment(plane.rank() == 1 ? 8192 : 4096);
    check_throws<SymmetryError>([&] { (void)transport->register_segment(*segment); },
                                "rank 1 is at", "8192 bytes");
    auto equal = backend->allocate_segment(4096);
    const auto window = transport->register_segment(*equal);
    check_equal(window->peers().size(), std::size_t{3}, "works on");
  });
}

TEST_CASE("memory of a rank that is not there any more is named with its rank and cause",
          "[host]") {
  const bool leaves = GENERATE(true, false);
  /// Lets its rank take what has come only once the other has left.
  class HeldMessenger : public detail::ThreadMessenger {
   public:
    HeldMessenger(std::shared_ptr<detail::ThreadHub> hub, std::atomic<bool>& held)
        : ThreadMessenger(std::move(hub), 0), held_(held) {}
    bool flush(int, Deadline deadline) override {
      while (held_ && Clock::now() < deadline) {
        std::this_thread::sleep_for(1ms);
      }
      return !held_;
    }

   private:
    std::atomic<bool>& held_;
  };
  const auto hub = std::make_shared<detail::ThreadHub>(2);
  std::atomic<bool> held{false};
  run_ranks(2, [&](ControlPlane& outside) {
    const int rank = outside.rank();
    MessageControlPlane plane(
        rank == 0 ? std::shared_ptr<Messenger>(std::make_shared<HeldMessenger>(hub, held))
                  : std::make_shared<detail::ThreadMessenger>(hub, 1),
        5s);
    auto backend = host_backend();
    auto transport = backend->connect(plane);
    auto segment = backend->allocate_segment(4096);
    outside.barrier();
    held = leaves;
    outside.barrier();
    if (rank == 0) {
      const auto call = [&] { (void)transport->register_segment(*segment); };
      if (leaves) {
        check_throws<SymmetryError>(call, "rank 1 gave up: group world: its own trouble");
      } else {
        check_throws<TransportError>(
            call, "in group world on rank 0: with rank 1: ", "importing descriptor");
      }
      return;
    }
    const auto handle = static_cast<host::HostSegment&>(*segment).memory()->handle();
    segment.reset();
    (void)plane.all_gather(std::as_bytes(std::span(&handle, 1)));
    if (leaves) {
      plane.give_up("its own trouble");
      held = false;
    } else {
      check_throws<SymmetryError>(
          [&] { agree(plane, {.place = "registration of a host window", .bytes = 4096}); },
          "rank 0 failed: ", "with rank 1: ");
    }
  });
}

TEST_CASE("memory that cannot be shared is refused as a window before anyone waits", "[host]") {
  run_ranks(2, [](ControlPlane& plane) {
    auto backend = host_backend();
    auto transport = backend->connect(plane);
    auto workspace = backend->allocate_workspace(4096);
    check_throws<UsageError>([&] { (void)transport->register_segment(*workspace); },
                             "expected one of the host backend");
    check(!workspace->registers_with(BackendKind::host), "private memory");
    auto segment = backend->allocate_segment(4096);
    check(segment->registers_with(BackendKind::host) && !segment->registers_with(BackendKind::cuda),
          "the host's own");
  });
}
