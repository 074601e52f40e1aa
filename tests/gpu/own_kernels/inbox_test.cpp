#include "world.cuh"

// What needs no device: the inbox's layout, epochs, error words and the choice of paths.

namespace cohort::test {
namespace {

using cuda::InboxLayout;
using cuda::PeerPath;

void test_layout(Tally& tally) {
  for (const int n : {1, 2, 8, 32}) {
    const auto layout = InboxLayout::make(
        {.ranks = n, .flag_word_bytes = 1000, .flag_line_bytes = 5000, .max_blocks = 7});
    const std::int64_t lanes = 2 * n;
    tally.expect(layout.ll_offset >= 128 * (1 + cuda::kEpochRecords) &&
                     layout.line_offset >= layout.ll_offset + lanes * layout.ll_words * 16 &&
                     layout.bytes >= layout.line_offset + lanes * layout.lines * 128,
                 fmt::format("regions do not overlap, n={}", n));
    tally.expect(layout.ll_words == 128 && layout.lines == 42 && layout.ll_offset % 256 == 0 &&
                     layout.line_offset % 128 == 0,
                 fmt::format("regions have room and alignment, n={}", n));
  }
  for (const auto& wrong : {cuda::InboxOptions{.ranks = 0}, cuda::InboxOptions{.ranks = 33},
                            cuda::InboxOptions{.ranks = 2, .flag_line_bytes = -1},
                            cuda::InboxOptions{.ranks = 2, .max_blocks = 513}}) {
    bool refused = false;
    try {
      (void)InboxLayout::make(wrong);
    } catch (const ConfigError&) {
      refused = true;
    }
    tally.expect(refused, "an impossible inbox is refused");
  }
}

void test_epochs(Tally& tally) {
  bool alternates = true;
  bool valid = true;
  std::uint64_t epoch = (std::uint64_t{1} << 32) - 8;
  for (int i = 0; i < 20; ++i) {
    const std::uint64_t next = cuda::next_epoch(epoch);
    alternates = alternates && next > epoch && (next & 1) != (epoch & 1);
    valid = valid && static_cast<std::uint32_t>(next) != 0;
    epoch = next;
  }
  tally.expect(alternates, "slots alternate across 2^32");
  tally.expect(valid, "no epoch carries the flag of memory that was never written");
  tally.expect(cuda::next_epoch(0) == 1, "the first epoch is 1");
  const auto error = cuda::InboxError::decode(cuda::InboxError::encode(epoch, 31));
  tally.expect(error && error.epoch == epoch && error.missing_rank == 31, "error words round-trip");
  tally.expect(!cuda::InboxError::decode(0), "0 is no error");
}

void test_paths(Tally& tally) {
  const auto both = InboxLayout::make(
      {.ranks = 2, .flag_word_bytes = 1 << 20, .flag_line_bytes = 16 << 20, .max_blocks = 1});
  const auto words = InboxLayout::make(
      {.ranks = 2, .flag_word_bytes = 16 << 20, .flag_line_bytes = 0, .max_blocks = 1});
  const auto lines = InboxLayout::make(
      {.ranks = 2, .flag_word_bytes = 1 << 10, .flag_line_bytes = 16 << 20, .max_blocks = 1});
  const cuda::MergeShape small{1, 128, 512, DType::bf16};
  const cuda::MergeShape large{128, 128, 512, DType::bf16};
  tally.expect(cuda::choose_merge_path(both, small) == PeerPath::flag_word, "small: flag words");
  tally.expect(cuda::choose_merge_path(both, large) == PeerPath::flag_line, "large: flag lines");
  tally.expect(cuda::choose_merge_path(lines, small) == PeerPath::flag_line,
               "small, flag line room only");
  tally.expect(cuda::choose_merge_path(words, large) == PeerPath::flag_word,
               "large, flag word room only");
  bool refused = false;
  try {
    (void)cuda::choose_merge_path(lines, large);  // its LSEs travel as flag words
  } catch (const UsageError&) {
    refused = true;
  }
  tally.expect(refused, "large, no room for the LSEs");
  tally.expect(cuda::merge_lane_bytes(small, 2, PeerPath::flag_line) == 64 * 512 * 2,
               "flag line lane: payload alone");
  tally.expect(cuda::merge_lane_bytes(small, 2, PeerPath::flag_word) == 64 * 512 * 2 + 32 * 8,
               "flag word lane: payload and two LSEs a word");
  const cuda::MergeShape none{0, 128, 512, DType::bf16};
  tally.expect(cuda::merge_lane_bytes(none, 2, PeerPath::flag_word) == 8,
               "an empty call still signals");
}

}  // namespace

void test_inbox(Tally& tally) {
  test_layout(tally);
  test_epochs(tally);
  test_paths(tally);
}

}  // namespace cohort::test
