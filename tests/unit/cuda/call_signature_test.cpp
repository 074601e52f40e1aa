// SPDX-License-Identifier: Apache-2.0
#include <cohort/cuda/call_signature.hpp>

#include <cohort/cuda/inbox.hpp>
#include <cohort/cuda/shapes.hpp>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string_view>
#include <vector>

#include "support/catch.hpp"

using namespace cohort::cuda;

TEST_CASE("a signature has the call's kind, and differs where anything else does",
          "[call_signature]") {
  std::set<std::uint32_t> words;
  for (const auto call : {PeerCall::all_gather, PeerCall::all_reduce, PeerCall::merge}) {
    for (std::int64_t bytes = 0; bytes < 4096; bytes += 8) {
      const auto signature = CallSignature::make(call, {1, 124, bytes, 0});
      CHECK(signature.call() == call);
      words.insert(signature.word);
    }
  }
  CHECK(words.size() == 3 * 512);
  CHECK(CallSignature::make(PeerCall::merge, {1, 2}) ==
        CallSignature::make(PeerCall::merge, {1, 2}));
  CHECK_FALSE(CallSignature::make(PeerCall::merge, {1, 2}) ==
              CallSignature::make(PeerCall::merge, {2, 1}));
}

TEST_CASE("every kind of call has a name of its own, and survives a signature and an error word",
          "[call_signature]") {
  std::set<std::string_view> names;
  for (int kind = 0; kind <= static_cast<int>(PeerCall::all_reduce_rms_norm); ++kind) {
    const auto call = static_cast<PeerCall>(kind);
    CAPTURE(kind);
    names.insert(to_string(call));
    CHECK(CallSignature::make(call, {7}).call() == call);
    const auto error = InboxError::decode(InboxError::encode(9, 1, 3, call, call));
    CHECK(error.mine == call);
    CHECK(error.theirs == call);
    CHECK(is_over_nccl(call) == (to_string(call).find("over NCCL") != std::string_view::npos));
  }
  CHECK(names.size() == static_cast<std::size_t>(PeerCall::all_reduce_rms_norm) + 1);
  CHECK_FALSE(names.contains("unknown"));
}

TEST_CASE("flags of all epochs that an inbox can hold at once differ, and none is 0",
          "[call_signature]") {
  for (const std::int64_t ll_words :
       {std::int64_t{32}, std::int64_t{1} << 16, std::int64_t{1} << 28}) {
    CAPTURE(ll_words);
    // A word is at most 2 * ll_words calls old.
    CHECK((std::int64_t{1} << flag_epoch_bits(ll_words)) > 2 * ll_words);
    const auto code = FlagCode::make(CallSignature::make(PeerCall::barrier, {}),
                                     static_cast<std::uint32_t>(ll_words));
    CHECK(std::int64_t{code.epoch_mask} + 1 == std::int64_t{1} << flag_epoch_bits(ll_words));
    const std::uint64_t epoch = (std::uint64_t{5} << 32) - 1;
    CHECK(code.word_flag(epoch) != code.word_flag(epoch + 1));
    CHECK(code.word_flag(epoch) !=
          code.word_flag(epoch + static_cast<std::uint64_t>(2 * ll_words)));
    CHECK(code.word_flag(0) != 0);
    CHECK(code.word_flag(epoch + 1) != 0);                // the lower half is 0
    CHECK((code.word_flag(epoch) & 1U) == (epoch & 1U));  // the slot
    CHECK((code.line_flag(epoch) & kLineEpochMask) == epoch);
    CHECK((code.line_flag(epoch) >> 48) == (code.line >> 16));
  }
}

TEST_CASE("flags of different calls of one epoch differ", "[call_signature]") {
  constexpr std::uint32_t kWords = 1 << 16;
  int equal_words = 0;
  int equal_lines = 0;
  const auto one = FlagCode::make(CallSignature::make(PeerCall::all_reduce, {1, 8}), kWords);
  for (std::int64_t bytes = 16; bytes < 16 + 8 * 2048; bytes += 8) {
    const auto other =
        FlagCode::make(CallSignature::make(PeerCall::all_reduce, {1, bytes}), kWords);
    equal_words += one.word_flag(7) == other.word_flag(7) ? 1 : 0;
    equal_lines += one.line_flag(7) == other.line_flag(7) ? 1 : 0;
  }
  CHECK(equal_words <= 2);  // 14 bits
  CHECK(equal_lines <= 2);  // 16 bits
}

TEST_CASE("how much of a call a line's flag carries does not depend on the flag words",
          "[call_signature]") {
  const auto call = [](std::int64_t bytes) {
    return CallSignature::make(PeerCall::all_reduce, {1, bytes});
  };
  for (const std::uint32_t ll_words : {32U, 1U << 16, 1U << 28}) {
    CAPTURE(ll_words);
    std::set<std::uint64_t> flags;
    for (std::int64_t bytes = 8; bytes <= 8 * 1024; bytes += 8) {
      flags.insert(FlagCode::make(call(bytes), ll_words).line_flag(7));
    }
    CHECK(flags.size() > 1024 - 24);  // 8 pairs are to be expected of 16 bits, 32 of 14
    CHECK(FlagCode::make(call(8), ll_words).line_flag(7) ==
          FlagCode::make(call(8), 64).line_flag(7));
  }
}

TEST_CASE("calls whose payloads have one size differ where their words lie otherwise",
          "[call_signature]") {
  using cohort::DType;
  constexpr int kBlocks = 128;
  // [8,8] of bf16 by two ranks: shares of 64 bytes, along the first dimension and along the last.
  for (const auto call : {PeerCall::reduce_scatter, PeerCall::all_gather}) {
    const auto first = AlongDim::contiguous(1, 64, 2);
    const auto last = AlongDim::contiguous(8, 8, 2);
    CHECK_FALSE(signature_of(call, DType::bf16, first, kBlocks) ==
                signature_of(call, DType::bf16, last, kBlocks));
    // A rank that has to pack its tensor makes the same call as those that do not.
    CHECK(signature_of(call, DType::bf16, AlongDim::packed(64, 2, 8), kBlocks) ==
          signature_of(call, DType::bf16, last, kBlocks));
    CHECK(signature_of(call, DType::bf16, AlongDim::packed(64, 2, 1), kBlocks) ==
          signature_of(call, DType::bf16, first, kBlocks));
  }
  const auto query = [](std::int64_t heads, std::int64_t nope, std::int64_t pe) {
    return signature_of(Query{.batch = 4, .heads = heads, .nope_dim = nope, .pe_dim = pe}, kBlocks);
  };
  CHECK_FALSE(query(8, 512, 64) == query(16, 224, 64));
  CHECK_FALSE(query(8, 512, 64) == query(8, 448, 128));
  // Parts of other types with as many bytes.
  CHECK_FALSE(signature_of(Query{.batch = 4, .nope_dim = 64, .types = 1}, kBlocks) ==
              signature_of(Query{.batch = 4, .nope_dim = 64, .types = 2}, kBlocks));
  const auto merge = [](std::int64_t batch, std::int64_t heads, std::int64_t dim) {
    return signature_of(MergeShape{.batch = batch, .heads = heads, .dim = dim}, kBlocks);
  };
  CHECK_FALSE(merge(4, 128, 512) == merge(8, 64, 512));
  CHECK_FALSE(merge(4, 128, 512) == merge(4, 256, 256));
  CHECK(merge(4, 128, 512) == merge(4, 128, 512));
  // Merges of one size that combine or place their rows otherwise.
  const std::int64_t counts[] = {1, 3};
  const std::int64_t other_counts[] = {3, 1};
  const MergeShape plain{.batch = 4, .heads = 128, .dim = 512};
  std::vector<MergeShape> forms(8, plain);
  using cohort::MergeResult;
  forms[1].base = cohort::LseBase::two;
  forms[2].splits = 2;
  forms[3].sink = true;
  forms[4].result = MergeResult::replicated;
  forms[5] = forms[4];
  forms[5].gathers_lse = true;
  forms[6].result = MergeResult::by_token;
  forms[6].counts = counts;
  forms[7] = forms[6];
  forms[7].counts = other_counts;
  for (std::size_t i = 0; i < forms.size(); ++i) {
    for (std::size_t j = 0; j < forms.size(); ++j) {
      CHECK((signature_of(forms[i], kBlocks) == signature_of(forms[j], kBlocks)) == (i == j));
    }
  }
}

TEST_CASE(
    "an announcement has the kind of call, differs from another call's, and keeps its epoch apart",
    "[call_signature]") {
  const auto mine = CallSignature::make(PeerCall::all_gather, {1, 8});
  const auto other = CallSignature::make(PeerCall::all_gather, {1, 16});
  for (const std::uint64_t epoch :
       {std::uint64_t{1}, std::uint64_t{0xffffffff}, std::uint64_t{1} << 32, kLineEpochMask}) {
    CAPTURE(epoch);
    const std::uint64_t announced = mine.announcement(epoch);
    CHECK(CallSignature::announced_call(announced) == PeerCall::all_gather);
    CHECK(announced != other.announcement(epoch));
    CHECK(CallSignature::announced_epoch(announced) ==
          CallSignature::announced_epoch(other.announcement(epoch)));
    // What was announced long ago is not taken for this call: also not where 32 bits come around.
    for (const std::uint64_t ago : {std::uint64_t{1}, std::uint64_t{1} << 32}) {
      CHECK(CallSignature::announced_epoch(announced) !=
            CallSignature::announced_epoch(mine.announcement(epoch + ago)));
    }
  }
  // Memory that was never written announces no epoch that a call can have: the first one is 1.
  CHECK(CallSignature::announced_epoch(0) != CallSignature::announced_epoch(mine.announcement(1)));
}
