// SPDX-License-Identifier: Apache-2.0
#include "frames.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cohort/agreement.hpp>
#include <cohort/cuda/descriptor_exchange.hpp>
#include <cohort/give_up.hpp>
#include <cohort/mailbox.hpp>
#include <cohort/message_control_plane.hpp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace cohort::fuzz {
namespace {

void require(bool condition, const char* what) {
  if (!condition) {
    throw std::logic_error(what);
  }
}

/// Takes decisions off the front of the input; zeros once it is used up.
class Input {
 public:
  explicit Input(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::uint8_t byte() {
    if (bytes_.empty()) {
      return 0;
    }
    const auto first = static_cast<std::uint8_t>(bytes_.front());
    bytes_ = bytes_.subspan(1);
    return first;
  }
  Bytes take(std::size_t most) {
    const auto front = bytes_.first(std::min(most, bytes_.size()));
    bytes_ = bytes_.subspan(front.size());
    return {front.begin(), front.end()};
  }
  [[nodiscard]] bool empty() const { return bytes_.empty(); }
  [[nodiscard]] std::span<const std::byte> rest() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

/// A messenger whose peers answer with what they were sent, as peers in the same call do, until the
/// input says otherwise.
class FaultyMessenger : public Messenger {
 public:
  FaultyMessenger(Input& input, int size) : input_(input), size_(size) {}

  [[nodiscard]] int rank() const noexcept override { return 0; }
  [[nodiscard]] int size() const noexcept override { return size_; }

  void send(int to, Bytes message) override { arrived_[to].push_back(std::move(message)); }

  std::optional<Bytes> receive(int from, Deadline) override {
    if (flood_) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      return flood_;
    }
    auto& queue = arrived_[from];
    const std::uint8_t action = input_.byte();
    if (action % 16 < 8 && !queue.empty()) {
      Bytes message = std::move(queue.front());
      queue.pop_front();
      return message;
    }
    if (action != 0) {
      faulty_ = true;
    }
    return wrong(queue, action % 16);
  }

  /// The peers were only told something and say nothing in return.
  void forget() { arrived_.clear(); }
  /// Whether the input made a peer say something that a peer in step does not say.
  [[nodiscard]] bool faulty() const noexcept { return faulty_; }

 private:
  std::optional<Bytes> wrong(std::deque<Bytes>& queue, int action) {
    if (action == 15) {
      const std::size_t length = input_.byte();
      return input_.take(length);  // a stranger's
    }
    if (queue.empty()) {
      return std::nullopt;
    }
    Bytes message = queue.front();
    switch (action) {
      case 8:
        message = given_up(message);
        queue.pop_front();
        break;
      case 9:
        message.resize(std::min<std::size_t>(message.size(), input_.byte()));
        queue.pop_front();
        break;
      case 10:  // one byte is wrong, counted from the end, where the trailer is
        if (!message.empty()) {
          message[message.size() - 1 - input_.byte() % message.size()] ^= std::byte{1};
        }
        queue.pop_front();
        break;
      case 11:  // comes twice
        break;
      case 12:  // is overtaken
        message = queue.back();
        queue.pop_back();
        break;
      case 13:  // is lost
        queue.pop_front();
        return std::nullopt;
      case 14:  // without end, for a group that is not there
        if (message.size() >= ControlPlane::kTrailerBytes && input_.byte() % 8 == 0) {
          message[message.size() - ControlPlane::kTrailerBytes] ^= std::byte{1};
          flood_ = message;
        }
        queue.pop_front();
        break;
      default:
        break;
    }
    return message;
  }

  /// What a peer says that leaves the group of `message`: a reason of its own, some bytes of which
  /// are wrong, or no reason at all.
  Bytes given_up(const Bytes& message) {
    detail::FrameTrailer trailer;
    if (message.size() < sizeof(trailer)) {
      return message;
    }
    std::memcpy(&trailer, message.data() + message.size() - sizeof(trailer), sizeof(trailer));
    trailer.call = detail::ControlCall::gave_up;
    Bytes said;
    if (input_.byte() % 2 == 0) {
      said = detail::GiveUp::by(1, "no memory").serialize();
      for (int wrong = input_.byte() % 4; wrong > 0; --wrong) {
        said[input_.byte() % said.size()] = static_cast<std::byte>(input_.byte());
      }
    } else {
      said = input_.take(input_.byte() % 32);
    }
    const auto* end = reinterpret_cast<const std::byte*>(&trailer);
    said.insert(said.end(), end, end + sizeof(trailer));
    return said;
  }

  Input& input_;
  int size_;
  std::map<int, std::deque<Bytes>> arrived_;
  std::optional<Bytes> flood_;
  bool faulty_ = false;
};

/// Calls `call`; whether it returned. Typed errors are as good.
template <class Call>
bool returns(const Call& call) {
  try {
    call();
    return true;
  } catch (const Error&) {
    return false;
  }
}

void call_control_plane(ControlPlane& plane, FaultyMessenger& messenger, Input& input) {
  const Bytes mine = input.take(input.byte() % 32);
  const bool in_step = !messenger.faulty();
  bool right = true;
  const bool returned = returns([&] {
    switch (input.byte() % 5) {
      case 0: {
        const auto all = plane.all_gather(mine);
        right = all.size() == static_cast<std::size_t>(plane.size());
        for (const auto& theirs : all) {
          right = right && theirs == mine;
        }
        break;
      }
      case 1:
        plane.barrier();
        break;
      case 2:
        right = plane.broadcast(mine, 0) == mine;
        messenger.forget();
        break;
      case 3: {
        const ControlPlane::Incoming incoming{.from = 1, .bytes = mine.size()};
        const auto payloads = plane.exchange({{.to = 1, .payload = mine}}, {&incoming, 1});
        right = payloads.size() == 1 && payloads[0].size() == mine.size();
        break;
      }
      default: {
        // The peers answer with this rank's color and key, so all are in one group.
        const auto group = plane.split(input.byte() % 3, 0, "part");
        right = group != nullptr && group->size() >= 1;
        break;
      }
    }
  });
  require(!returned || right || messenger.faulty(), "a control plane gave a wrong answer");
  require(returned || messenger.faulty() || !in_step || plane.poisoned(),
          "a control plane failed without a cause");
}

void read_control_messages(Input& input) {
  const int size = 2 + input.byte() % 3;
  const auto messenger = std::make_shared<FaultyMessenger>(input, size);
  MessageControlPlane plane(messenger, std::chrono::milliseconds(1));
  for (int calls = 0; calls < 4 && !input.empty(); ++calls) {
    if (plane.poisoned()) {
      require(!returns([&] { plane.barrier(); }), "a poisoned control plane works");
      return;
    }
    call_control_plane(plane, *messenger, input);
  }
}

void read_intents(Input& input) {
  std::vector<Intent> intents;
  const int ranks = 1 + input.byte() % 4;
  for (int r = 0; r < ranks; ++r) {
    const Bytes message = input.take(input.byte());
    const Intent intent = detail::deserialize(message);
    require(intent.place.size() + intent.failure.size() <= message.size() + 64,
            "an intent is longer than its message");
    const Intent again = detail::deserialize(detail::serialize(intent));
    require(again.place == intent.place && again.failure == intent.failure &&
                again.sequence == intent.sequence && again.bytes == intent.bytes &&
                again.history == intent.history,
            "an intent changed on its way");
    intents.push_back(intent);
  }
  for (const Intent& intent : intents) {
    const bool alike = intent.failure.empty() && intent.place == intents[0].place &&
                       intent.sequence == intents[0].sequence && intent.bytes == intents[0].bytes &&
                       intent.history == intents[0].history;
    if (!alike) {
      require(compare(intents).has_value(), "a rank that differs was not noticed");
      return;
    }
  }
  require(!compare(intents), "ranks that are alike disagree");
}

/// A client of the exporter's socket that says what it likes.
struct Client {
  UniqueFd connection;
  bool genuine = false;
};

/// Strangers and a rank ask for a descriptor: the rank gets it and nobody else.
void read_requests(Input& input) {
  std::array<ProcessIdentity, 2> ranks{this_process(), this_process()};
  std::string problem;
  const std::uint64_t name = detail::random_word();
  const UniqueFd listener = detail::listen_for_requests(name, 16, problem);
  require(static_cast<bool>(listener), "no listener");
  socklen_t size = 0;
  const sockaddr_un address = detail::socket_address(name, size);
  const auto deadline = Clock::now() + std::chrono::seconds(5);
  const int strangers = input.byte() % 4;
  std::vector<Client> clients;
  for (int i = 0; i <= strangers; ++i) {
    Client client{os::unix_socket(), i == strangers};
    require(os::connect_within(client.connection.get(), reinterpret_cast<const sockaddr*>(&address),
                               size, deadline) == 0,
            "no connection");
    const detail::DescriptorRequest request{.secret = ranks[0].secret, .rank = 1};
    std::array<std::byte, sizeof(request)> right{};
    std::memcpy(right.data(), &request, sizeof(request.secret) + sizeof(request.rank));
    Bytes said(right.begin(), right.end());
    if (!client.genuine) {
      switch (input.byte() % 4) {
        case 0:
          said.resize(input.byte() % said.size());
          break;
        case 1:  // the secret or the rank is another
          said[input.byte() % (sizeof(request.secret) + sizeof(request.rank))] ^= std::byte{1};
          break;
        case 2:
          said = input.take(64);
          break;
        default:
          said.clear();
          break;
      }
      if (said.size() >= right.size() && std::equal(right.begin(), right.end(), said.begin())) {
        said.clear();
      }
    }
    if (!said.empty()) {
      require(os::send_now(client.connection.get(), said.data(), said.size()) ==
                  static_cast<ssize_t>(said.size()),
              "nothing sent");
    }
    clients.push_back(std::move(client));
  }
  detail::SocketExchange exchange(ranks, 0, deadline);
  exchange.serve(listener.get(), listener.get(), {1});
  require(exchange.problem().empty(), "the rank was not served");
  for (const Client& client : clients) {
    const auto wait = client.genuine ? deadline : Clock::now();
    const UniqueFd got = detail::receive_descriptor(client.connection.get(), wait);
    require(static_cast<bool>(got) == client.genuine, "a descriptor went astray");
  }
}

}  // namespace

void read_frames(std::span<const std::byte> bytes) {
  Input input(bytes);
  switch (input.byte() % 4) {
    case 0:
      return read_intents(input);
    case 1:
      return read_requests(input);
    default:
      return read_control_messages(input);
  }
}

}  // namespace cohort::fuzz
