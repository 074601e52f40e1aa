// SPDX-License-Identifier: Apache-2.0
#include <cohort/host/peer_access.hpp>
#include <vector>

#include "support/catch.hpp"

using namespace cohort;
using namespace cohort::host;

namespace {

/// Access of one rank to itself: what it shows, and where it would find it.
struct Alone {
  Alone() {
    const PadGeometry geometry{.ranks = 1, .slot_bytes = 4096};
    auto pad = make_shared_memory(geometry.bytes(), Commit::at_first_access);
    GroupPads::construct(*pad, geometry);
    access = std::make_unique<PeerAccess>(
        std::make_unique<Rendezvous>(std::vector{pad}, geometry, 0, "test",
                                     std::chrono::milliseconds(100)),
        table, 4096);
    memory = make_shared_memory(65536, Commit::at_once);
    window = std::make_unique<HostWindow>(table, table->next_number(), 0, std::vector{memory});
  }

  std::shared_ptr<WindowTable> table = std::make_shared<WindowTable>();
  std::unique_ptr<PeerAccess> access;
  std::shared_ptr<SharedMemory> memory;
  std::unique_ptr<HostWindow> window;
};

}  // namespace

TEST_CASE("a large tensor in a window is shown there, with its strides", "[host]") {
  Alone rank;
  const TensorView all(rank.memory->data(), DType::f32, Dims{128, 64});
  const auto slice = all.slice(1, 8, 32);
  const Showing showing = rank.access->show(slice, true);
  CHECK(showing.place == Place::direct);
  CHECK_FALSE(showing.dense);
  rank.access->meeting().enter(Call{}, showing);
  const Ticket& ticket = rank.access->await(0, Call{});
  CHECK(rank.access->peer_tensor(ticket, 0) == slice.data());
  CHECK(PeerAccess::peer_strides(ticket, slice.shape()) == Dims{64, 1});

  rank.access->meeting().enter(Call{}, rank.access->show(all, true));
  CHECK(PeerAccess::peer_strides(rank.access->await(0, Call{}), all.shape()) == Dims{64, 1});
}

TEST_CASE("small tensors and those elsewhere go through the slot", "[host]") {
  Alone rank;
  const TensorView large(rank.memory->data(), DType::u8, Dims{8192});
  CHECK(rank.access->show(large, true).place == Place::direct);
  CHECK(rank.access->show(large, false).place == Place::slot);
  CHECK(rank.access->reads_windows(4096));
  CHECK_FALSE(rank.access->reads_windows(4095));
  CHECK(rank.access->reads_parts(8192));
  CHECK_FALSE(rank.access->reads_parts(8191));
  std::vector<std::byte> elsewhere(8192);
  CHECK(rank.access->show(TensorView(elsewhere.data(), DType::u8, Dims{8192}), true).place ==
        Place::slot);
}

TEST_CASE("a window that this rank has given up is an error, not an access", "[host]") {
  Alone rank;
  const TensorView tensor(rank.memory->data(), DType::u8, Dims{8192});
  rank.access->meeting().enter(Call{}, rank.access->show(tensor, true));
  rank.window.reset();
  CHECK_THROWS_AS(rank.access->peer_tensor(rank.access->await(0, Call{}), 0), SymmetryError);
  CHECK(rank.access->meeting().departure().failed());
}

TEST_CASE("parts of a view start where they should", "[host]") {
  std::vector<float> memory(24);
  const TensorView view(memory.data(), DType::f32, Dims{2, 3, 4});
  const auto part = part_of(view, 1, 1, 2);
  CHECK(part.base == reinterpret_cast<std::byte*>(memory.data() + 4));
  CHECK(part.layout.numel == 16);
  CHECK(part_of(view, 1, 3, 0).layout.numel == 0);
  CHECK(whole(view).layout.contiguous());
}
