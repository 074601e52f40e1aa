// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>

#include "../cohort_bench/rows.hpp"
#include "accuracy.hpp"
#include "dcp_decode/numbers.hpp"
#include "reference.hpp"
#include "session.hpp"

namespace decode_engine {

namespace {

using Tokens = std::vector<std::int32_t>;

/// The prompts, and from when on a prompt's tokens are judged.
class Task {
 public:
  explicit Task(const Session& session)
      : known_(session.options.copies), tokens_(session.options.tokens) {
    const Sizes& s = session.model.sizes();
    const std::uint64_t seed = session.options.seed;
    for (std::int64_t b = 0; b < session.options.prompts; ++b) {
      if (known_) {
        copies_.emplace_back(s, seed, b);
      }
      const dcp_decode::Numbers numbers(seed, 0x9209, static_cast<std::uint64_t>(b));
      auto& prompt = prompts_.emplace_back();
      const std::int64_t length = known_ ? copies_.back().prompt_length() : 8 + b;
      for (std::int64_t p = 0; p < length; ++p) {
        const double share = (numbers(static_cast<std::uint64_t>(p)) + 1) / 2;
        prompt.push_back(static_cast<std::int32_t>(
            known_ ? copies_.back().token(p)
                   : std::min(s.vocabulary - 1, static_cast<std::int64_t>(
                                                    share * static_cast<double>(s.vocabulary)))));
      }
      longest_ = std::max(longest_, length);
    }
    positions_ = longest_ - 1 + session.options.tokens;
  }

  [[nodiscard]] std::int64_t prompts() const { return static_cast<std::int64_t>(prompts_.size()); }
  [[nodiscard]] std::int64_t positions() const { return positions_; }
  [[nodiscard]] bool known() const { return known_; }
  /// What stands at a position, where the prompt says so.
  [[nodiscard]] std::optional<std::int32_t> given(std::int64_t prompt,
                                                  std::int64_t position) const {
    const auto& tokens = prompts_[index(prompt)];
    return position < static_cast<std::int64_t>(tokens.size())
               ? std::optional(tokens[index(position)])
               : std::nullopt;
  }
  /// What must follow a position, where that is known.
  [[nodiscard]] std::optional<std::int32_t> next(std::int64_t prompt, std::int64_t position) const {
    return known_ ? std::optional(
                        static_cast<std::int32_t>(copies_[index(prompt)].token(position + 1)))
                  : std::nullopt;
  }
  [[nodiscard]] bool judged(std::int64_t prompt, std::int64_t position) const {
    const auto length = static_cast<std::int64_t>(prompts_[index(prompt)].size());
    return position + 1 >= length && position + 1 < length + tokens_;
  }

 private:
  bool known_;
  std::int64_t tokens_;
  std::vector<CopyTask> copies_;
  std::vector<Tokens> prompts_;
  std::int64_t longest_ = 0;
  std::int64_t positions_ = 0;
};

/// What one rank alone takes in and chooses; the rest is on the judging rank only.
struct Transcript {
  std::vector<Tokens> inputs;              ///< by position
  std::vector<Tokens> choices;             ///< by position
  std::vector<std::vector<float>> logits;  ///< by position
  std::vector<std::vector<double>> exact;  ///< of the first positions
};

Tokens to_tokens(const cohort::Bytes& bytes) {
  Tokens tokens(bytes.size() / sizeof(std::int32_t));
  std::memcpy(tokens.data(), bytes.data(), bytes.size());
  return tokens;
}

/// The first rank of the last stage judges: it has logits.
int judging_rank(const Session& session) { return (session.options.pp - 1) * session.options.tp; }

/// The decode by one rank alone.
struct Alone {
  Alone(Session& session, cohort::ControlPlane& plane, std::int64_t prompts, std::int64_t positions)
      : exchange(make_cohort_exchange(plane, session.device, session.model.sizes(), {},
                                      cohort::MergePlan::automatic)),
        weights(session.model, session.device, {}),
        cache(session.model.sizes(), session.device, {}, prompts, positions),
        engine(session.model.sizes(), weights, cache, session.device, *exchange, {}, prompts) {}

  std::unique_ptr<Exchange> exchange;
  Weights weights;
  Cache cache;
  Engine engine;
};

/// Collective. The judging rank decodes; the others hear what is decoded.
Transcript decode_alone(Session& session, const Task& task) {
  const int judging = judging_rank(session);
  const auto plane = session.world.split(session.world.rank(), 0, "alone");
  std::optional<Alone> alone;
  std::optional<Reference> reference;
  if (session.world.rank() == judging) {
    alone.emplace(session, *plane, task.prompts(), task.positions());
    if (session.options.fp64 > 0) {
      reference.emplace(session.model, task.prompts());
    }
  }
  Transcript found;
  for (std::int64_t p = 0; p < task.positions(); ++p) {
    Tokens input(index(task.prompts()));
    for (std::int64_t b = 0; b < task.prompts(); ++b) {
      const auto given = task.given(b, p);
      input[index(b)] = given ? *given : found.choices.back()[index(b)];
    }
    Tokens choice;
    if (alone) {
      alone->engine.set_tokens(input);
      alone->engine.enqueue_step();
      alone->engine.synchronize();
      choice = alone->engine.tokens();
      found.logits.push_back(alone->engine.logits());
      if (p < session.options.fp64) {
        found.exact.push_back(reference->step(input));
      }
    }
    found.inputs.push_back(std::move(input));
    found.choices.push_back(
        to_tokens(session.world.broadcast(std::as_bytes(std::span(choice)), judging)));
  }
  if (alone) {
    alone->exchange->synchronize();
  }
  return found;
}

/// One row of what a position's tensor has for each prompt.
template <class T>
std::span<const T> row(const std::vector<std::vector<T>>& rows, std::int64_t position,
                       std::int64_t prompt, std::int64_t width) {
  return position < static_cast<std::int64_t>(rows.size())
             ? std::span(rows[index(position)]).subspan(index(prompt * width), index(width))
             : std::span<const T>();
}

/// Collective. The findings count on the judging rank.
Findings decode(Session& session, const Lane& lane, const Weights& weights, const Cache& cache,
                const Task& task, const Transcript& alone) {
  const std::int64_t width = session.model.sizes().vocabulary;
  Engine engine(session.model.sizes(), weights, cache, session.device, *lane.exchange, lane.place,
                task.prompts());
  if (session.options.spoilt == lane.way) {
    engine.spoil();
  }
  if (session.options.graph) {
    engine.capture();
  }
  engine.start(0);
  Judge judge;
  std::array<std::uint64_t, 2> hashes{kEmptyHash, kEmptyHash};  // of choices and hidden states
  for (std::int64_t p = 0; p < task.positions(); ++p) {
    engine.set_tokens(alone.inputs[index(p)]);
    engine.enqueue_step();
    engine.synchronize();
    const Tokens choice = engine.tokens();
    hashes[0] = hash(hashes[0], std::as_bytes(std::span(choice)));
    const auto hidden = engine.hidden();
    hashes[1] = hash(hashes[1], std::as_bytes(std::span(hidden)));
    if (!lane.place.is_last()) {
      continue;
    }
    const std::vector<std::vector<float>> logits{engine.logits()};
    for (std::int64_t b = 0; b < task.prompts() && !alone.logits.empty(); ++b) {
      const auto mine = row(logits, 0, b, width);
      judge.add_bits(mine);
      if (task.judged(b, p)) {
        const std::int32_t choice_alone = alone.choices[index(p)][index(b)];
        judge.add({.prompt = b,
                   .position = p,
                   .logits = mine,
                   .expected = row(alone.logits, p, b, width),
                   .exact = row(alone.exact, p, b, width),
                   .chosen = choice[index(b)],
                   .expected_choice = choice_alone,
                   .next = task.next(b, p).value_or(choice_alone)});
      }
    }
  }
  Findings found = judge.findings();
  const auto all = session.world.all_gather(std::as_bytes(std::span(hashes)));
  for (std::size_t r = 0; r < all.size(); ++r) {
    std::array<std::uint64_t, 2> theirs{};
    std::memcpy(theirs.data(), all[r].data(), sizeof(theirs));
    // MPI promises no equal sums.
    const bool stage = !lane.way->raw && static_cast<int>(r) / lane.place.tp == lane.place.pp_rank;
    found.same_on_all_ranks =
        found.same_on_all_ranks && theirs[0] == hashes[0] && (!stage || theirs[1] == hashes[1]);
  }
  return found;
}

std::string to_text(const Lane& lane, const Findings& f, double bound, bool known) {
  std::string text = fmt::format(
      "{:<11} {} of {} as one rank alone, margins from {:.3f}{}; logits within {:.4f} of its, "
      "{:.4f} "
      "of {} of fp64's; mean loss {:.6f}, its {:.6f}; bits {:016x}\n",
      lane.way->name, f.tokens - static_cast<std::int64_t>(f.exceptions.size()), f.tokens,
      f.least_margin, known ? fmt::format(", {} right", f.right) : "", f.largest_difference,
      f.largest_error, f.exact, f.loss, f.expected_loss, f.bits);
  for (const Exception& e : f.exceptions) {
    text += fmt::format("{:<11} prompt {}, position {}: {} instead of {}, margin {:.4f}\n", "",
                        e.prompt, e.position, e.chosen, e.expected, e.margin);
  }
  return text + (f.exceptions.empty() ? ""
                                      : fmt::format("{:<11} margins up to {:.4f} may differ\n", "",
                                                    margin_bound(bound)));
}

std::string to_row(const Session& session, const Lane& lane, const Findings& f, double bound,
                   const std::vector<std::string>& faults) {
  cohort::bench::Row row{.bench = "decode_accuracy",
                         .path = std::string(lane.way->path),
                         .plan = std::string(lane.way->plan),
                         .mode = session.options.graph ? "graph" : "eager",
                         .dtype = "bf16",
                         .ranks = session.ranks(),
                         .batch = session.options.prompts,
                         .wrong = static_cast<std::int64_t>(faults.size()),
                         .samples = f.tokens};
  std::string exceptions;
  for (const Exception& e : f.exceptions) {
    exceptions += fmt::format(
        R"({}{{"prompt": {}, "position": {}, "chosen": {}, "expected": {}, "margin": {:.6f}}})",
        exceptions.empty() ? "" : ", ", e.prompt, e.position, e.chosen, e.expected, e.margin);
  }
  std::string json = to_json(row);
  json.pop_back();
  return json +
         fmt::format(R"(, "way": "{}", "tp": {}, "pp": {}, "dcp": {}, "right": {}, )"
                     R"("least_margin": {:.6f}, "margin_bound": {:.6f}, )"
                     R"("logit_difference": {:.6f}, "fp64_difference": {:.6f}, "fp64_tokens": {}, )"
                     R"("loss": {:.9f}, "loss_alone": {:.9f}, "bits": "{:016x}", )"
                     R"("exceptions": [{}]}})",
                     lane.way->name, lane.place.tp, lane.place.pp, lane.place.dcp,
                     session.options.copies ? fmt::format("{}", f.right) : "null", f.least_margin,
                     margin_bound(bound), f.largest_difference, f.largest_error, f.exact, f.loss,
                     f.expected_loss, f.bits, exceptions);
}

/// Collective. What the judging rank has to say, on every rank.
Told share(Session& session, const Told& mine) {
  const int judging = judging_rank(session);
  std::string text = fmt::format("{}\n{}", mine.passed ? 1 : 0, mine.rows.size());
  for (const auto& row : mine.rows) {
    text += "\n" + row;
  }
  text += "\n" + mine.text;
  const auto bytes = session.world.broadcast(std::as_bytes(std::span(text)), judging);
  std::string_view rest(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto line = [&rest] {
    const auto end = rest.find('\n');
    std::string first(rest.substr(0, end));
    rest.remove_prefix(end + 1);
    return first;
  };
  Told told;
  told.passed = line() == "1";
  for (int rows = std::stoi(line()); rows > 0; --rows) {
    told.rows.push_back(line());
  }
  told.text = rest;
  return told;
}

}  // namespace

bool measure_accuracy(Session& session) {
  const Task task(session);
  const double bound = logit_bound(session.model);
  session.tell(
      {.text = fmt::format(
           "accuracy: {} prompts, {} tokens each, teacher-forced; logits may be off by {:.4f}, "
           "choices differ up to margins of {:.4f}\n",
           task.prompts(), session.options.tokens, bound, margin_bound(bound))});
  const Transcript alone = decode_alone(session, task);
  const Weights weights(session.model, session.device, session.place(false));
  std::map<std::string_view, std::uint64_t> promised;
  bool passed = true;
  for (const bool dcp : {false, true}) {
    std::optional<Cache> cache;
    for (const Lane& lane : session.lanes) {
      if (lane.way->dcp != dcp) {
        continue;
      }
      if (!cache) {
        cache.emplace(session.model.sizes(), session.device, lane.place, task.prompts(),
                      task.positions());
      }
      const Findings f = decode(session, lane, weights, *cache, task, alone);
      auto wrong = faults(f, bound, task.known(), session.options.fp64 > 0);
      const auto [first, is_first] = promised.emplace(lane.way->order, f.bits);
      if (!is_first && first->second != f.bits) {
        wrong.emplace_back("other bits than a way that adds in the same order");
      }
      Told mine{.text = to_text(lane, f, bound, task.known()),
                .rows = {to_row(session, lane, f, bound, wrong)},
                .passed = wrong.empty()};
      for (const auto& fault : wrong) {
        mine.text += fmt::format("{:<11} WRONG: {}\n", "", fault);
      }
      const Told told = share(session, mine);
      session.tell(told);
      passed = passed && told.passed;
    }
  }
  return passed;
}

}  // namespace decode_engine
