// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>

#include "cohort/dtype.hpp"
#include "cohort/tensor.hpp"
#if defined(__x86_64__) || defined(__i386__)
#include <x86intrin.h>
#endif

/// \file
/// The last calls of a group on one rank, as plain records in memory that the group's ranks on the
/// machine map: who survives can read what a rank did that is gone. One thread writes, any process
/// reads.

namespace cohort {

/// What a record is of.
enum class TraceCall : std::uint8_t {
  none,
  all_gather,
  reduce_scatter,
  all_reduce,
  broadcast,
  all_to_all,
  send,
  recv,
  barrier,
  gather_query,
  merge_attention,
  all_reduce_rms_norm,
  agreement,  ///< The ranks agree over the control plane; the record's note says on what.
  launch,     ///< Of a graph with calls of the group.
};

/// Such as "all_gather".
[[nodiscard]] constexpr std::string_view to_string(TraceCall call) noexcept {
  constexpr std::array<std::string_view, 14> kNames{"none",
                                                    "all_gather",
                                                    "reduce_scatter",
                                                    "all_reduce",
                                                    "broadcast",
                                                    "all_to_all",
                                                    "send",
                                                    "recv",
                                                    "barrier",
                                                    "gather_query",
                                                    "merge_attention",
                                                    "all_reduce_rms_norm",
                                                    "agreement",
                                                    "launch"};
  const auto index = static_cast<std::size_t>(call);
  return index < kNames.size() ? kNames[index] : "unknown";
}

/// Which way a call went, as coarsely as counters tell; `GroupCoordinator::path` says it exactly.
enum class CallPath : std::uint8_t {
  unknown,         ///< It has not come so far.
  local,           ///< A group of one.
  exchange,        ///< Over the control plane.
  mapped,          ///< Through the peers' memory, on the host.
  own,             ///< The library's kernels.
  nccl,            ///< NCCL.
  nccl_symmetric,  ///< NCCL, on its symmetric path for sure or perhaps.
};
/// How many there are.
inline constexpr std::size_t kCallPaths = 7;

/// Such as "own".
[[nodiscard]] constexpr std::string_view to_string(CallPath path) noexcept {
  constexpr std::array<std::string_view, kCallPaths> kNames{
      "unknown", "local", "exchange", "mapped", "own", "nccl", "nccl symmetric"};
  const auto index = static_cast<std::size_t>(path);
  return index < kNames.size() ? kNames[index] : "unknown";
}

/// One call.
struct TraceRecord {
  static constexpr std::uint8_t kCaptured = 1;  ///< It is of a graph's list.
  static constexpr std::uint8_t kNumbered = 2;  ///< All ranks make it: it has a number.
  static constexpr std::uint8_t kFailed = 4;    ///< It was left by an exception.
  static constexpr int kExtents = 5;            ///< That a record has room for.

  std::uint64_t sequence = 0;  ///< From 1 on; 0 in a record that is being written.
  std::uint64_t ticks = 0;     ///< See `trace_ticks`.
  std::uint64_t where = 0;     ///< The stream; of captured calls and launches the capture's number.
  std::uint32_t number = 0;    ///< With `kNumbered`: the same on all ranks; see `full_number`.
  std::uint32_t signature = 0;        ///< Of what has to be equal on all ranks.
  TraceCall call = TraceCall::none;   ///< What it is.
  DType dtype = DType::u8;            ///< Of the tensor that it was called with.
  CallPath path = CallPath::unknown;  ///< Known at its end.
  std::uint8_t flags = 0;             ///< Of `kCaptured`, `kNumbered` and `kFailed`.
  std::uint8_t ndim = 0;              ///< Dimensions of the tensor.
  std::uint8_t inbox = 0;             ///< Which of the group's inboxes counts its steps.
  std::uint16_t steps = 0;   ///< Of the transport: what the device counts. Known at its end.
  std::int32_t variant = 0;  ///< The op, root, peer or base; the number of an agreement's note.
  /// The first ones. Of a launch: the graph's calls, its steps, and the inboxes that count these.
  std::array<std::uint32_t, kExtents> extents{};
};
static_assert(sizeof(TraceRecord) == 64 && std::is_trivially_copyable_v<TraceRecord>);

/// A text that belongs to a record.
struct TraceNote {
  std::uint64_t sequence = 0;    ///< From 1 on.
  std::array<char, 120> text{};  ///< Up to the first zero.
};
static_assert(sizeof(TraceNote) == 128 && std::is_trivially_copyable_v<TraceNote>);

/// How far the work of one inbox has come. On the host the group has one.
struct TraceProgress {
  std::uint64_t issued = 0;   ///< Steps that were enqueued, launches of graphs counted in.
  std::uint64_t entered = 0;  ///< Steps that began to run.
  std::uint64_t left = 0;     ///< Steps that ended.
  /// Steps that may have ended: `left`, or more where the device does not say. Nothing of it where
  /// `left` is written as it happens.
  std::uint64_t perhaps_left = 0;
  /// Steps behind which a wait of the host came back, whatever the device says.
  std::uint64_t settled = 0;
};

/// What is known of a device that counts a step of an inbox when it begins it.
struct DeviceLook {
  std::uint64_t begun = 0;  ///< Steps that it has begun.
  bool over = false;        ///< All of them have ended, and none before its time.
  bool waits = false;       ///< The last one was given up because it waited for other ranks.
};

/// Calls that took one path. In one line of the cache.
struct alignas(32) PathCounters {
  std::uint64_t calls = 0;  ///< Eager ones, and those of graphs at each launch.
  std::uint64_t bytes = 0;  ///< Of the tensor that each was called with.
  std::uint64_t waits = 0;  ///< Times that the host waited in them for other ranks.
};

/// The clock of records: the processor's counter where it has one, which all its cores share.
[[nodiscard]] inline std::uint64_t trace_ticks() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  return __rdtsc();
#elif defined(__aarch64__)
  std::uint64_t ticks = 0;
  asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
  return ticks;
#else
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#endif
}

namespace detail {

/// Plain values that one thread writes word by word while others may read: a reader can take a
/// torn value, never cause a race.
template <class Value>
void store_words(Value& to, const Value& from) noexcept {
  static_assert(sizeof(Value) % sizeof(std::uint64_t) == 0 && std::is_trivially_copyable_v<Value>);
  constexpr std::size_t kWords = sizeof(Value) / sizeof(std::uint64_t);
  const auto words = std::bit_cast<std::array<std::uint64_t, kWords>>(from);
  auto* const target = reinterpret_cast<std::uint64_t*>(&to);
  for (std::size_t i = 0; i < kWords; ++i) {
    std::atomic_ref<std::uint64_t>(target[i]).store(words[i], std::memory_order_relaxed);
  }
}
template <class Value>
[[nodiscard]] Value load_words(const Value& from) noexcept {
  constexpr std::size_t kWords = sizeof(Value) / sizeof(std::uint64_t);
  std::array<std::uint64_t, kWords> words;
  auto* const source = const_cast<std::uint64_t*>(reinterpret_cast<const std::uint64_t*>(&from));
  for (std::size_t i = 0; i < kWords; ++i) {
    words[i] = std::atomic_ref<std::uint64_t>(source[i]).load(std::memory_order_relaxed);
  }
  return std::bit_cast<Value>(words);
}

}  // namespace detail

/// What a rank writes. Zeros are an empty ring.
struct TraceRing {
  static constexpr std::uint32_t kLayout = 5;  ///< Changes with what lies where.
  /// Changes with the layout, and with the numbers of the calls as their last one does.
  static constexpr std::uint32_t kProtocol =
      256 * kLayout + static_cast<std::uint32_t>(TraceCall::launch);
  static constexpr std::size_t kRecords = 1024;              ///< Of each kind.
  static constexpr std::size_t kNotes = 32;                  ///< The last ones.
  static constexpr std::size_t kInboxes = 64;                ///< That a group has at most.
  static constexpr std::uint64_t kLive = ~std::uint64_t{0};  ///< See `looked`.

  // Written once, by `begin`.
  std::uint32_t protocol = 0;           ///< `kProtocol` once the rank has begun.
  std::int32_t rank = 0;                ///< In the group.
  std::int64_t process = 0;             ///< Its number, in `process_namespace`.
  std::uint64_t process_namespace = 0;  ///< 0 where unknown.
  std::uint64_t process_start = 0;      ///< In ticks since the boot; 0 where unknown.

  // What each call reads and writes; of a group with one inbox it is one line and its counters.
  alignas(64) std::uint64_t calls = 0;              ///< Sequence of the last record of `records`.
  std::uint64_t open = 0;                           ///< Of the record that the host is in, or 0.
  std::uint64_t numbered = 0;                       ///< The last number that a record got.
  std::array<TraceProgress, kInboxes> progress{};   ///< By inbox.
  std::array<PathCounters, kCallPaths> counters{};  ///< By path.

  std::uint64_t listed = 0;    ///< Sequence of the last record of `captured`.
  std::uint64_t captures = 0;  ///< Graphs that were captured with calls of the group.
  std::uint64_t noted = 0;     ///< Sequence of the last note.
  std::uint64_t ended = 0;     ///< 1 where the group was closed.
  /// When `progress` was last asked of the device, in ticks; `kLive` where it is written as it
  /// happens, 0 for never.
  std::uint64_t looked = 0;
  std::array<TraceNote, kNotes> notes{};  ///< Note n at n - 1 modulo their number.
  alignas(64) std::array<TraceRecord, kRecords> records{};   ///< Eager calls and launches.
  alignas(64) std::array<TraceRecord, kRecords> captured{};  ///< The lists of captured graphs.

  /// Where the record of that sequence lies.
  [[nodiscard]] static std::size_t slot(std::uint64_t sequence) noexcept {
    return static_cast<std::size_t>((sequence - 1) % kRecords);
  }

  /// A word that another process may write.
  static std::uint64_t load(const std::uint64_t& word) noexcept {
    return std::atomic_ref<std::uint64_t>(const_cast<std::uint64_t&>(word))
        .load(std::memory_order_acquire);
  }
  /// Two halves of a word, the lower first.
  [[nodiscard]] static constexpr std::uint64_t pair(std::uint32_t low,
                                                    std::uint32_t high) noexcept {
    return std::uint64_t{high} << 32 | low;
  }
  /// Writes a word that others may read; what was written before is seen by who sees it.
  static void store(std::uint64_t& word, std::uint64_t value) noexcept {
    std::atomic_ref<std::uint64_t>(word).store(value, std::memory_order_release);
  }
  /// Of a word that one thread writes.
  static void add(std::uint64_t& word, std::uint64_t more) noexcept {
    std::atomic_ref<std::uint64_t> shared(word);
    shared.store(shared.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
  }

  /// Writes what a look at the device says of an inbox. Steps of an inbox run one behind the other,
  /// so that all have ended but perhaps the last one that began.
  static void look(TraceProgress& progress, const DeviceLook& seen) noexcept {
    const std::uint64_t before = seen.begun == 0 ? 0 : seen.begun - 1;
    const bool ended = seen.over || load(progress.settled) >= seen.begun;
    store(progress.entered, seen.begun);
    store(progress.left, ended && !seen.waits ? seen.begun : before);
    store(progress.perhaps_left, seen.waits ? before : seen.begun);
  }

  /// Writes a record; `last` is the word that counts its kind.
  static void push(std::array<TraceRecord, kRecords>& to, std::uint64_t& last,
                   const TraceRecord& record) noexcept {
    push(to, last, record,
         {.sequence = record.sequence,
          .ticks = record.ticks,
          .where = record.where,
          .number = record.number,
          .flags = record.flags,
          .inbox = record.inbox});
  }
  /// What is known of a record last.
  struct Stamp {
    std::uint64_t sequence = 0;  ///< As in the record, each of them.
    std::uint64_t ticks = 0;     ///< When.
    std::uint64_t where = 0;     ///< Where.
    std::uint32_t number = 0;    ///< Among those that all ranks make.
    std::uint8_t flags = 0;      ///< Of the record's.
    std::uint8_t inbox = 0;      ///< That counts its steps.
  };
  /// The same with a stamp in place of the record's own, so that the record need not be copied.
  [[gnu::always_inline]] static void push(std::array<TraceRecord, kRecords>& to,
                                          std::uint64_t& last, const TraceRecord& record,
                                          const Stamp& stamp) noexcept {
    TraceRecord& at = to[slot(stamp.sequence)];
    auto* const words = reinterpret_cast<std::uint64_t*>(&at);
    const auto set = [words](std::size_t i, std::uint64_t word) {
      std::atomic_ref<std::uint64_t>(words[i]).store(word, std::memory_order_relaxed);
    };
    set(0, 0);
    std::atomic_thread_fence(std::memory_order_release);
    // Put together from the members: a processor cannot forward a load of a whole word from stores
    // of its parts.
    set(1, stamp.ticks);
    set(2, stamp.where);
    set(3, pair(stamp.number, record.signature));
    set(4, pair(static_cast<std::uint32_t>(record.call) |
                    static_cast<std::uint32_t>(record.dtype) << 8 |
                    static_cast<std::uint32_t>(record.path) << 16 |
                    static_cast<std::uint32_t>(stamp.flags) << 24,
                static_cast<std::uint32_t>(record.ndim) |
                    static_cast<std::uint32_t>(stamp.inbox) << 8 |
                    static_cast<std::uint32_t>(record.steps) << 16));
    set(5, pair(static_cast<std::uint32_t>(record.variant), record.extents[0]));
    set(6, pair(record.extents[1], record.extents[2]));
    set(7, pair(record.extents[3], record.extents[4]));
    store(at.sequence, stamp.sequence);
    store(last, stamp.sequence);
  }
  /// The whole number of a record that has the low half of one; 0 where it has none.
  [[nodiscard]] static std::uint64_t full_number(std::uint64_t last,
                                                 const TraceRecord& record) noexcept {
    // Signed: the record may be younger than `last`.
    const auto back = static_cast<std::int32_t>(static_cast<std::uint32_t>(last) - record.number);
    return (record.flags & TraceRecord::kNumbered) == 0
               ? 0
               : last - static_cast<std::uint64_t>(std::int64_t{back});
  }
  /// The record of that sequence, unless it was overwritten, then or meanwhile.
  [[nodiscard]] static std::optional<TraceRecord> at(const std::array<TraceRecord, kRecords>& from,
                                                     std::uint64_t sequence) noexcept {
    const TraceRecord& record = from[slot(sequence)];
    if (load(record.sequence) != sequence) {
      return std::nullopt;
    }
    TraceRecord copy = detail::load_words(record);
    std::atomic_thread_fence(std::memory_order_acquire);
    return load(record.sequence) == sequence && copy.sequence == sequence ? std::optional(copy)
                                                                          : std::nullopt;
  }
};
static_assert(std::is_trivially_copyable_v<TraceRing>);
static_assert(std::endian::native == std::endian::little, "`TraceRing::push` puts words together");

/// What has to be equal on all ranks of a call, as 32 bits: cheap, because it is made in each call.
class TraceSignature {
 public:
  constexpr TraceSignature() = default;
  /// Of a call, to which its arguments are to be added.
  constexpr explicit TraceSignature(TraceCall call) noexcept { mix(static_cast<int>(call)); }

  /// Adds a number.
  [[gnu::always_inline]] constexpr TraceSignature& mix(std::int64_t value) noexcept {
    // A multilinear hash: no product waits for another.
    sum_ +=
        (static_cast<std::uint64_t>(value) + 0x9e3779b97f4a7c15U) * kKeys[count_ % kKeys.size()];
    ++count_;
    return *this;
  }
  /// Adds a shape.
  constexpr TraceSignature& mix(const Dims& shape) noexcept {
    return mix(shape.size()).mix(std::span(shape.begin(), shape.end()));
  }
  /// Adds numbers.
  constexpr TraceSignature& mix(std::span<const std::int64_t> values) noexcept {
    TraceSignature here = *this;  // in registers
    for (const std::int64_t value : values) {
      here.mix(value);
    }
    return *this = here;
  }
  /// The signature.
  [[nodiscard]] constexpr std::uint32_t word() const noexcept {
    return static_cast<std::uint32_t>((sum_ ^ (sum_ >> 29)) * 0xff51afd7ed558ccdU >> 32);
  }

 private:
  /// Odd numbers that look random. Source: "splitmix64" by Vigna.
  static constexpr std::array<std::uint64_t, 32> kKeys = [] {
    std::array<std::uint64_t, 32> keys{};
    std::uint64_t state = 0;
    for (auto& key : keys) {
      std::uint64_t z = state += 0x9e3779b97f4a7c15U;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
      key = (z ^ (z >> 31)) | 1U;
    }
    return keys;
  }();

  std::uint64_t sum_ = 0;
  std::size_t count_ = 0;
};

}  // namespace cohort
