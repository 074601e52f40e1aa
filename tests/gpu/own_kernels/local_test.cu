// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "cohort/cuda/support_kernels.hpp"
#include "world.cuh"

// Strided copy, fill, the sum of pieces and a step's counts and slots against the host.

namespace cohort::test {
namespace {

/// A random shape whose dimensions lie in a random order with gaps in memory.
struct Layout {
  std::vector<std::int64_t> strides;
  std::int64_t elements = 0;  ///< Span in memory.
};

Layout random_layout(Random& random, const std::vector<std::int64_t>& shape, bool gaps) {
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  if (random() % 2 == 0) {
    std::shuffle(order.begin(), order.end(), random);
  }
  Layout layout{std::vector<std::int64_t>(shape.size()), 1};
  for (std::size_t k = order.size(); k-- > 0;) {
    layout.strides[order[k]] = layout.elements;
    layout.elements *= shape[order[k]];
    layout.elements += gaps ? static_cast<std::int64_t>(random() % 3) * 8 : 0;
  }
  return layout;
}

bool copies_right(Random& random, DType dtype) {
  const auto ndim = 1 + random() % 5;
  std::vector<std::int64_t> shape;
  for (unsigned d = 0; d < ndim; ++d) {
    const std::int64_t choices[] = {1, 2, 3, 7, 8, 16, 33};
    shape.push_back(choices[random() % 7]);
  }
  const std::size_t element = size_of(dtype);
  const Layout in = random_layout(random, shape, random() % 2 == 0);
  const Layout out = random_layout(random, shape, random() % 2 == 0);
  const std::size_t shift = random() % 3 == 0 ? element : 0;  // unaligned bases
  Buffer from(to_size(in.elements) * element + 16);
  Buffer to(to_size(out.elements) * element + 16);
  std::vector<std::byte> source(to_size(in.elements) * element + 16);
  for (auto& byte : source) {
    byte = static_cast<std::byte>(random());
  }
  from.upload(source.data(), source.size());
  cuda::strided_copy(from.at(shift), in.strides, to.at(shift), out.strides, shape, dtype, nullptr);
  COHORT_CHECK(cudaDeviceSynchronize());
  const auto result = to.download<std::byte>(to_size(out.elements) * element + 16);
  std::vector<std::byte> want(result.size(), std::byte{0xff});
  std::vector<std::int64_t> index(shape.size(), 0);
  while (true) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    for (std::size_t d = 0; d < shape.size(); ++d) {
      a += index[d] * in.strides[d];
      b += index[d] * out.strides[d];
    }
    std::memcpy(want.data() + shift + to_size(b) * element,
                source.data() + shift + to_size(a) * element, element);
    std::size_t d = 0;
    while (d < shape.size() && ++index[d] == shape[d]) {
      index[d++] = 0;
    }
    if (d == shape.size()) {
      break;
    }
  }
  return want == result;  // gaps and borders must be untouched
}

void test_fill(Tally& tally) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32}) {
    for (const std::int64_t count : {1, 3, 7, 8, 9, 4095, 4097}) {
      const std::size_t element = size_of(dtype);
      Buffer out(to_size(count) * element + 32);
      cuda::fill(out.at(element), count, dtype, 3.0, nullptr);
      COHORT_CHECK(cudaDeviceSynchronize());
      const auto bytes = out.download<std::byte>(to_size(count) * element + 2 * element);
      bool good = bytes[element - 1] == std::byte{0xff} && bytes.back() == std::byte{0xff};
      for (std::int64_t i = 0; i < count; ++i) {
        const std::byte* at = bytes.data() + to_size(i + 1) * element;
        std::int32_t integer = 0;
        std::memcpy(&integer, at, std::min<std::size_t>(element, 4));
        good = good && (dtype == DType::i32 ? integer == 3 : decode(dtype, at) == 3.0);
      }
      tally.expect(good, fmt::format("fill {} of {}", count, to_string(dtype)));
    }
  }
}

void test_reduce(Tally& tally) {
  Random random(11);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int n : {1, 2, 5, 8, 11}) {
      for (const std::int64_t count : {1, 7, 8, 129, 5000}) {
        const std::size_t element = size_of(dtype);
        const auto in = random_elements(random, dtype, n * count, false);
        Buffer pieces(in.size());
        Buffer out(to_size(count) * element);
        pieces.upload(in.data(), in.size());
        cuda::reduce_pieces(pieces.at(), n, count, out.at(), count, dtype, nullptr);
        COHORT_CHECK(cudaDeviceSynchronize());
        const auto result = out.download<std::byte>(to_size(count) * element);
        bool good = true;
        for (std::int64_t i = 0; i < count; ++i) {
          float sum = -0.0F;  // the documented order, so the bits are known
          for (int p = 0; p < n; ++p) {
            sum += static_cast<float>(decode(dtype, in.data() + to_size(p * count + i) * element));
          }
          std::byte want[4];
          encode(dtype, sum, want);
          good = good && std::memcmp(want, result.data() + to_size(i) * element, element) == 0;
        }
        tally.expect(good,
                     fmt::format("reduce_pieces n={} count={} {}", n, count, to_string(dtype)));
      }
    }
  }
}

/// An engine's kernel may ask where tokens live.
__global__ void placement_kernel(dcp::KvPlacement placement, std::int64_t rank, std::int64_t tokens,
                                 std::int64_t* answers) {
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < tokens) {
    answers[4 * t] = placement.owner(t);
    answers[4 * t + 1] = placement.local_index(t);
    answers[4 * t + 2] = placement.local_count(t, rank);
    answers[4 * t + 3] = placement.slot(t, rank);
  }
}

bool placement_right(const dcp::KvPlacement& placement, std::int64_t rank) {
  constexpr std::int64_t kTokens = 300;
  Buffer answers(kTokens * 4 * sizeof(std::int64_t));
  placement_kernel<<<3, 100>>>(placement, rank, kTokens, answers.at<std::int64_t>());
  COHORT_CHECK(cudaDeviceSynchronize());
  const auto got = answers.download<std::int64_t>(kTokens * 4);
  std::vector<std::int64_t> want;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    want.insert(want.end(), {placement.owner(t), placement.local_index(t),
                             placement.local_count(t, rank), placement.slot(t, rank)});
  }
  return got == want;
}

struct StepCase {
  std::int64_t batch, queries;
  bool whole;
  bool paged;
};

bool step_right(Random& random, const dcp::KvPlacement& placement, std::int64_t rank,
                const StepCase& c) {
  constexpr std::int64_t kPages = 40;
  const auto rows = to_size(c.batch * c.queries);
  std::vector<std::int32_t> lengths(to_size(c.batch));
  for (auto& length : lengths) {
    length = static_cast<std::int32_t>(random() % 4 == 0 ? random() % 4 : random() % 5000);
  }
  std::vector<std::int32_t> pages(to_size(c.batch * kPages));
  for (auto& page : pages) {
    page = static_cast<std::int32_t>(random() % 9 == 0 ? -1 : static_cast<int>(random() % 100000));
  }
  std::vector<std::int32_t> counts(rows, -7);
  std::vector<std::int64_t> slots(2 * rows, -7);
  dcp::KvRows step{.placement = placement,
                   .rank = rank,
                   .batch = c.batch,
                   .queries = c.queries,
                   .lengths = lengths.data(),
                   .counts = counts.data(),
                   .count_batch_stride = 1,
                   .count_query_stride = c.batch,
                   .whole_counts = c.whole,
                   .slots = slots.data(),
                   .slot_batch_stride = 2 * c.queries,
                   .slot_query_stride = 2};
  if (c.paged) {
    step.pages = pages.data();
    step.page_batch_stride = kPages;
    step.page_stride = 1;
    step.pages_of_sequence = kPages;
    step.page_tokens = 64;
  }
  const auto on_card = [](const auto& values) {
    Buffer buffer(values.size() * sizeof(values[0]));
    buffer.upload(values.data(), values.size() * sizeof(values[0]));
    return buffer;
  };
  const Buffer card_lengths = on_card(lengths);
  const Buffer card_pages = on_card(pages);
  const Buffer card_counts = on_card(counts);
  const Buffer card_slots = on_card(slots);
  dcp::KvRows card = step;
  card.lengths = card_lengths.at<std::int32_t>();
  card.pages = c.paged ? card_pages.at<std::int32_t>() : nullptr;
  card.counts = card_counts.at<std::int32_t>();
  card.slots = card_slots.at<std::int64_t>();
  cuda::place_step(card, nullptr);
  COHORT_CHECK(cudaDeviceSynchronize());
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t j = 0; j < c.queries; ++j) {
      step.place(b, j);
    }
  }
  return card_counts.download<std::int32_t>(rows) == counts &&
         card_slots.download<std::int64_t>(2 * rows) == slots;
}

void test_steps(Tally& tally) {
  Random random(13);
  for (const std::int64_t ranks : {1, 2, 3, 8}) {
    for (const std::int64_t interleave : {1, 3, 16, 64}) {
      const dcp::KvPlacement placement{ranks, interleave};
      const auto rank = static_cast<std::int64_t>(random() % static_cast<unsigned>(ranks));
      tally.expect(placement_right(placement, rank),
                   fmt::format("placement n={} interleave={} rank={}", ranks, interleave, rank));
      for (const StepCase& c :
           {StepCase{0, 1, false, false}, StepCase{1, 1, true, true}, StepCase{64, 4, false, true},
            StepCase{300, 3, true, false}, StepCase{700, 5, false, true}}) {
        tally.expect(
            step_right(random, placement, rank, c),
            fmt::format("place_step n={} interleave={} rank={} B={} q={} whole={} paged={}", ranks,
                        interleave, rank, c.batch, c.queries, c.whole, c.paged));
      }
    }
  }
}

}  // namespace

void test_local(Tally& tally) {
  Random random(7);
  for (const DType dtype : {DType::u8, DType::bf16, DType::f32, DType::f64}) {
    for (int i = 0; i < 60; ++i) {
      tally.expect(copies_right(random, dtype),
                   fmt::format("strided_copy number {} of {}", i, to_string(dtype)));
    }
  }
  test_fill(tally);
  test_reduce(tally);
  test_steps(tally);
}

}  // namespace cohort::test
