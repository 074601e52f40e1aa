// SPDX-License-Identifier: Apache-2.0
#include "analysis.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <utility>

namespace cohort::trace {
namespace {

using nlohmann::json;

std::string listed(std::vector<int> ranks) {
  std::sort(ranks.begin(), ranks.end());
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    text += fmt::format("{}{}", i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]);
  }
  return text;
}

std::string verb(const std::vector<int>& ranks, const char* one, const char* more) {
  return ranks.size() == 1 ? one : more;
}

std::string clock_time(std::int64_t ns) {
  const std::time_t seconds = ns / 1'000'000'000;
  std::tm broken{};
  gmtime_r(&seconds, &broken);
  return fmt::format("{:02}:{:02}:{:02}.{:03} UTC", broken.tm_hour, broken.tm_min, broken.tm_sec,
                     ns / 1'000'000 % 1000);
}

std::string duration(std::int64_t ns) {
  return ns < 1'000'000'000 ? fmt::format("{} ms", ns / 1'000'000)
                            : fmt::format("{:.1f} s", static_cast<double>(ns) / 1e9);
}

// ---- reading

Record record_of(const json& j) {
  Record record;
  record.sequence = j.at(0);
  record.ns = j.at(1);
  record.call = j.at(2);
  record.number = j.at(3);
  record.signature = j.at(4);
  record.dtype = j.at(5);
  record.path = j.at(6);
  record.captured = j.at(7).get<int>() != 0;
  record.inbox = j.at(8);
  record.steps = j.at(9);
  record.where = j.at(10);
  record.variant = j.at(11);
  record.ndim = j.at(12);
  record.extents = j.at(13).get<std::vector<std::uint32_t>>();
  return record;
}

Ring ring_of(const json& j, std::int64_t written) {
  Ring ring;
  ring.rank = j.at("rank");
  ring.own = j.at("own");
  ring.gone_at = j.at("gone").get<bool>() ? written : 0;
  ring.ended = j.at("ended");
  ring.open = j.at("open");
  ring.written = written;
  for (const auto& one : j.at("progress")) {
    ring.progress[one.at(0)] = {one.at(1), one.at(2), one.at(3)};
  }
  for (const auto& one : j.at("counters")) {
    ring.counters.push_back({one.at(0), one.at(1), one.at(2), one.at(3)});
  }
  for (const auto& one : j.at("notes")) {
    ring.notes[one.at(0)] = one.at(1);
  }
  for (const auto& one : j.at("records")) {
    ring.records.push_back(record_of(one));
  }
  for (const auto& one : j.at("captured")) {
    ring.captured.push_back(record_of(one));
  }
  return ring;
}

std::uint64_t last_sequence(const Ring& ring) {
  return ring.records.empty() ? 0 : ring.records.back().sequence;
}

/// Of two views of one ring, that which shows more of its end; of equal ones the rank's own.
void keep_better(std::map<int, Ring>& rings, Ring ring) {
  const auto found = rings.find(ring.rank);
  if (found == rings.end()) {
    rings.emplace(ring.rank, std::move(ring));
    return;
  }
  const std::int64_t gone_at = found->second.gone_at == 0 || ring.gone_at == 0
                                   ? std::max(found->second.gone_at, ring.gone_at)
                                   : std::min(found->second.gone_at, ring.gone_at);
  const auto worth = [](const Ring& one) { return std::pair(last_sequence(one), one.own); };
  if (worth(ring) > worth(found->second)) {
    found->second = std::move(ring);
  }
  found->second.gone_at = gone_at;
}

void cut(State& state) {
  constexpr std::int64_t kMoment = 1'000'000'000;  // between the time-outs of ranks
  for (Group& group : state.groups) {
    for (auto& [rank, ring] : group.rings) {
      // Ranks that failed leave, and those that write later see that.
      ring.gone = ring.gone_at != 0 && ring.gone_at <= state.end + kMoment;
      std::erase_if(ring.records, [&](const Record& record) { return record.ns > state.end; });
    }
  }
}

// ---- what a group did

const Record* numbered(const Ring& ring, std::uint32_t number) {
  const auto found =
      std::find_if(ring.records.rbegin(), ring.records.rend(),
                   [number](const Record& record) { return record.number == number; });
  return found == ring.records.rend() ? nullptr : &*found;
}
const Record* last_numbered(const Ring& ring) {
  const auto found = std::find_if(ring.records.rbegin(), ring.records.rend(),
                                  [](const Record& record) { return record.number != 0; });
  return found == ring.records.rend() ? nullptr : &*found;
}
std::uint32_t last_number(const Ring& ring) {
  const Record* const last = last_numbered(ring);
  return last == nullptr ? 0 : last->number;
}
const Record* open_record(const Ring& ring) {
  const auto found =
      std::find_if(ring.records.begin(), ring.records.end(),
                   [&ring](const Record& record) { return record.sequence == ring.open; });
  return ring.open == 0 || found == ring.records.end() ? nullptr : &*found;
}

std::string variant_name(const std::string& call) {
  return call == "broadcast"                ? "root"
         : call == "send" || call == "recv" ? "peer"
         : call == "merge_attention"        ? "base"
         : call == "gather_query"           ? "extent of q_pe"
                                            : "op";
}

/// What differs between two calls of one kind.
std::string differences(const Record& mine, const Record& theirs) {
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : ", ") + what; };
  if (mine.dtype != theirs.dtype) {
    add(fmt::format("the type, {} and {}", mine.dtype, theirs.dtype));
  }
  if (mine.ndim != theirs.ndim) {
    add(fmt::format("the number of dimensions, {} and {}", mine.ndim, theirs.ndim));
  }
  for (std::size_t d = 0; d < std::min(mine.extents.size(), theirs.extents.size()); ++d) {
    if (mine.extents[d] != theirs.extents[d] && mine.call != "launch" && mine.call != "agreement") {
      add(fmt::format("extent {} of x, {} and {}", d, mine.extents[d], theirs.extents[d]));
    }
  }
  if (mine.call == "agreement" && mine.extents != theirs.extents) {
    add(fmt::format("the bytes, {} and {}", mine.extents.at(0), theirs.extents.at(0)));
  }
  if (mine.variant != theirs.variant && mine.call != "launch" && mine.call != "agreement") {
    add(fmt::format("the {}, {} and {}", variant_name(mine.call), mine.variant, theirs.variant));
  }
  return text;
}

std::string with_differences(const Ring& mine, const Record& a, const Ring& theirs,
                             const Record& b) {
  const std::string what = a.call == b.call ? differences(a, b) : "";
  return fmt::format("{} where the others made {}{}", describe(mine, a), describe(theirs, b),
                     what.empty() ? "" : "; what differs: " + what);
}

/// The rank whose signature most have, the lowest of them.
int majority(const std::map<int, const Record*>& records) {
  int best = records.begin()->first;
  std::ptrdiff_t most = 0;
  for (const auto& [rank, record] : records) {
    const std::uint32_t wanted = record->signature;
    const auto votes = std::count_if(records.begin(), records.end(), [wanted](const auto& other) {
      return other.second->signature == wanted;
    });
    if (votes > most) {
      most = votes;
      best = rank;
    }
  }
  return best;
}

/// Calls of one place that are not alike; nothing where they are.
std::optional<Finding> compare(const Group& group, const std::map<int, const Record*>& records) {
  if (records.size() < 2) {
    return std::nullopt;
  }
  const int like = majority(records);
  Finding found{.kind = Finding::Kind::differs, .group = group.name};
  const Record* other = nullptr;
  int other_rank = 0;
  for (const auto& [rank, record] : records) {
    const auto world = group.ranks.at(static_cast<std::size_t>(rank));
    if (record->signature == records.at(like)->signature) {
      found.waiting.push_back(world);
    } else {
      found.ranks.push_back(world);
      other = other == nullptr ? record : other;
      other_rank = other == record ? rank : other_rank;
    }
  }
  if (other == nullptr) {
    return std::nullopt;
  }
  found.since = other->ns;
  const std::string in_graph =
      other->captured ? fmt::format(", in the list of graph {}", other->where) : "";
  found.text = fmt::format("{} {} in {}{}: {} made {}", listed(found.ranks),
                           verb(found.ranks, "differs", "differ"), group.name, in_graph,
                           verb(found.ranks, "it", "they"),
                           with_differences(group.rings.at(other_rank), *other,
                                            group.rings.at(like), *records.at(like)));
  return found;
}

/// The first calls that differ, of graphs' lists first, because launches differ where they do.
std::optional<Finding> difference(const Group& group) {
  std::map<std::pair<std::uint64_t, std::uint32_t>, std::map<int, const Record*>> lists;
  std::map<std::uint32_t, std::map<int, const Record*>> calls;
  for (const auto& [rank, ring] : group.rings) {
    for (const Record& record : ring.captured) {
      if (record.call != "send" && record.call != "recv") {
        lists[{record.where, record.number}][rank] = &record;
      }
    }
    for (const Record& record : ring.records) {
      if (record.number != 0) {
        calls[record.number][rank] = &record;
      }
    }
  }
  for (const auto& [place, records] : lists) {
    if (auto found = compare(group, records)) {
      return found;
    }
  }
  for (const auto& [number, records] : calls) {
    if (auto found = compare(group, records)) {
      return found;
    }
  }
  return std::nullopt;
}

/// The calls of a graph, in order.
std::vector<const Record*> list_of(const Ring& ring, std::uint64_t graph) {
  std::vector<const Record*> list;
  for (const Record& record : ring.captured) {
    if (record.where == graph) {
      list.push_back(&record);
    }
  }
  return list;
}

/// Steps that a record takes of an inbox.
std::uint64_t steps_of(const Record& record) {
  return record.call == "launch" && record.extents.size() > 1 ? record.extents[1] : record.steps;
}

/// Where the device, or the host in a replay, is: "" where all has run.
std::string place_on_device(const Ring& ring) {
  for (const auto& [inbox, progress] : ring.progress) {
    if (progress.left >= progress.issued) {
      continue;
    }
    const std::uint64_t pending = progress.issued - progress.left;
    std::uint64_t seen = 0;
    for (auto record = ring.records.rbegin(); record != ring.records.rend(); ++record) {
      const std::uint64_t steps = record->inbox == inbox ? steps_of(*record) : 0;
      if (steps == 0 || (seen += steps) < pending) {
        continue;
      }
      if (record->call != "launch") {
        return describe(ring, *record);
      }
      std::uint64_t done = seen - pending;
      const auto list = list_of(ring, record->where);
      for (const Record* const call : list) {
        if (call->inbox == inbox && call->steps > done) {
          return fmt::format("call {} of {} of graph {}, {}", call->number,
                             std::max<std::uint64_t>(list.size(), record->extents.at(0)),
                             record->where, describe(ring, *call));
        }
        done -= call->inbox == inbox ? call->steps : 0;
      }
      return fmt::format("graph {}", record->where);
    }
  }
  return "";
}

std::string whereabouts(const State& state, const Group& group, int world) {
  for (const Group& other : state.groups) {
    for (const auto& [rank, ring] : other.rings) {
      if (other.ranks.at(static_cast<std::size_t>(rank)) != world) {
        continue;
      }
      if (ring.gone) {
        return "its process is gone";
      }
      const Record* const open = open_record(ring);
      if (open != nullptr && &other != &group) {
        return fmt::format("it is in {} of {}", describe(ring, *open), other.name);
      }
    }
  }
  return "it is in no call of the library";
}

/// Ranks that have come to a call of a group to which others have not: they wait.
std::set<int> waiting_in(const Group& group) {
  std::uint32_t least = std::numeric_limits<std::uint32_t>::max();
  for (const auto& [rank, ring] : group.rings) {
    least = std::min(least, last_number(ring));
  }
  std::set<int> waiting;
  for (const auto& [rank, ring] : group.rings) {
    if (last_number(ring) > least) {
      waiting.insert(group.ranks.at(static_cast<std::size_t>(rank)));
    }
  }
  return waiting;
}

/// Ranks that have not made a call which others have; of those first that wait for nobody.
std::optional<Finding> behind(const State& state, const Group& group, const std::set<int>& waits) {
  std::uint32_t furthest = 0;
  std::uint32_t least = std::numeric_limits<std::uint32_t>::max();
  for (const auto& [rank, ring] : group.rings) {
    furthest = std::max(furthest, last_number(ring));
    least = std::min(least, last_number(ring));
  }
  if (group.rings.size() < 2 || least == furthest) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::behind,
                .group = group.name,
                .since = std::numeric_limits<std::int64_t>::max()};
  const Record* next = nullptr;
  const Ring* came = nullptr;
  const Ring* late = nullptr;
  for (const auto& [rank, ring] : group.rings) {
    const int world = group.ranks.at(static_cast<std::size_t>(rank));
    if (last_number(ring) == least) {
      found.ranks.push_back(world);
      late = late == nullptr ? &ring : late;
      continue;
    }
    found.waiting.push_back(world);
    if (const Record* const record = numbered(ring, least + 1)) {
      if (next == nullptr || record->ns < next->ns) {
        next = record;
        came = &ring;
      }
      found.since = std::min(found.since, record->ns);
    }
  }
  // Whoever waits in another group is late for a reason that is told there.
  std::vector<int> excused;
  const auto waits_too = [&waits](int rank) { return waits.count(rank) > 0; };
  if (!std::all_of(found.ranks.begin(), found.ranks.end(), waits_too)) {
    std::copy_if(found.ranks.begin(), found.ranks.end(), std::back_inserter(excused), waits_too);
    std::erase_if(found.ranks, waits_too);
    for (const auto& [rank, ring] : group.rings) {
      late = group.ranks.at(static_cast<std::size_t>(rank)) == found.ranks.front() ? &ring : late;
    }
  }
  const Record* const last = last_numbered(*late);
  found.text = fmt::format("{} {} behind in {}", listed(found.ranks),
                           verb(found.ranks, "is", "are"), group.name);
  if (next != nullptr) {
    std::string inside = next->call == "launch" ? place_on_device(*came) : "";
    found.text += fmt::format(": {} not come to {}, to which {} came at {}, {} before the end{}",
                              verb(found.ranks, "it has", "they have"), describe(*came, *next),
                              listed(found.waiting), clock_time(found.since),
                              duration(state.end - found.since),
                              inside.empty() ? "" : ", and wait in " + inside);
  } else {
    found.since = state.end;
  }
  found.text += fmt::format("; {} last call there is {}", verb(found.ranks, "its", "their"),
                            last == nullptr ? "none" : describe(*late, *last));
  if (found.ranks.size() == 1) {
    found.text += fmt::format(", and {}", whereabouts(state, group, found.ranks.front()));
  }
  if (!excused.empty()) {
    found.text += fmt::format("; {} {} not come either, but {} in another group", listed(excused),
                              verb(excused, "has", "have"), verb(excused, "waits", "wait"));
  }
  return found;
}

/// Ranks whose device has done less than that of others, all of which have made the same calls.
std::optional<Finding> behind_on_device(const State& state, const Group& group) {
  std::map<int, std::uint64_t> done;
  for (const auto& [rank, ring] : group.rings) {
    for (const auto& [inbox, progress] : ring.progress) {
      done[rank] += progress.left;
    }
  }
  if (done.size() < 2) {
    return std::nullopt;
  }
  const auto order = [](const auto& a, const auto& b) { return a.second < b.second; };
  const auto [least, most] = std::minmax_element(done.begin(), done.end(), order);
  if (least->second == most->second) {
    return std::nullopt;
  }
  Finding found{.kind = Finding::Kind::behind_on_device, .group = group.name, .since = state.end};
  for (const auto& [rank, steps] : done) {
    (steps == least->second ? found.ranks : found.waiting)
        .push_back(group.ranks.at(static_cast<std::size_t>(rank)));
  }
  const std::string at = place_on_device(group.rings.at(least->first));
  found.text = fmt::format(
      "{} {} behind in {}: {} made the same calls as {}, but ended {} {} fewer{}",
      listed(found.ranks), verb(found.ranks, "is", "are"), group.name,
      verb(found.ranks, "it has", "they have"), listed(found.waiting), most->second - least->second,
      most->second - least->second == 1 ? "step" : "steps",
      at.empty() ? "" : fmt::format(", and {} in {}", verb(found.ranks, "is", "are"), at));
  return found;
}

}  // namespace

std::string describe(const Ring& ring, const Record& record) {
  const std::string name =
      record.captured ? record.call : fmt::format("{} #{}", record.call, record.number);
  if (record.call == "agreement") {
    const auto note = ring.notes.find(record.variant);
    return note == ring.notes.end() ? name : fmt::format("{} on {}", name, note->second);
  }
  if (record.call == "launch") {
    return record.where == 0 ? fmt::format("{} of a graph", name)
                             : fmt::format("{} of graph {}", name, record.where);
  }
  if (record.call == "barrier") {
    return name;
  }
  std::string extents;
  for (const std::uint32_t extent : record.extents) {
    extents += fmt::format("{}{}", extents.empty() ? "" : ",", extent);
  }
  const bool more = record.ndim > static_cast<int>(record.extents.size());
  return fmt::format("{} of {}({}{})", name, record.dtype, extents, more ? ",..." : "");
}

std::vector<State> read(const std::vector<std::pair<std::string, std::string>>& files) {
  std::map<std::uint64_t, State> states;
  std::map<std::uint64_t, std::int64_t> late;
  for (const auto& [name, text] : files) {
    try {
      const json j = json::parse(text);
      if (j.value("cohort_trace", 0) != 1) {
        throw std::runtime_error("no trace of a version that this program knows");
      }
      const std::uint64_t id = j.at("state");
      State& state = states[id];
      const std::int64_t written = j.at("written");
      state.id = id;
      state.end = state.end == 0 ? written : std::min(state.end, written);
      if (j.at("late").get<bool>()) {
        const auto [first, fresh] = late.emplace(id, written);
        first->second = std::min(first->second, written);
      }
      state.reasons[j.at("rank")] = j.at("reason");
      for (const auto& group : j.at("groups")) {
        const std::string label = group.at("name");
        const auto ranks = group.at("ranks").get<std::vector<int>>();
        auto found = std::find_if(state.groups.begin(), state.groups.end(), [&](const Group& one) {
          return one.name == label && one.ranks == ranks;
        });
        if (found == state.groups.end()) {
          state.groups.push_back({label, ranks, {}});
          found = state.groups.end() - 1;
        }
        for (const auto& ring : group.at("rings")) {
          keep_better(found->rings, ring_of(ring, written));
        }
      }
    } catch (const std::exception& error) {
      throw std::runtime_error(fmt::format("{}: {}", name, error.what()));
    }
  }
  std::vector<State> all;
  for (auto& [id, state] : states) {
    if (const auto found = late.find(id); found != late.end()) {
      state.end = found->second;
    }
    cut(state);
    all.push_back(std::move(state));
  }
  return all;
}

std::vector<Finding> findings(const State& state) {
  std::vector<Finding> all;
  std::set<int> waits;
  for (const Group& group : state.groups) {
    waits.merge(waiting_in(group));
  }
  for (const Group& group : state.groups) {
    const bool over = std::all_of(group.rings.begin(), group.rings.end(),
                                  [](const auto& ring) { return ring.second.ended; });
    if (group.ranks.size() < 2 || over) {
      continue;
    }
    auto found = difference(group);
    if (!found) {
      found = behind(state, group, waits);
    }
    if (!found) {
      found = behind_on_device(state, group);
    }
    if (found) {
      all.push_back(std::move(*found));
    }
  }
  // A rank for which others wait, and which waits itself, is no cause.
  const auto rank = [&waits](const Finding& finding) {
    const bool is_cause = std::any_of(finding.ranks.begin(), finding.ranks.end(),
                                      [&waits](int one) { return waits.count(one) == 0; });
    return std::tuple(static_cast<int>(finding.kind), !is_cause, finding.since);
  };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Finding& a, const Finding& b) { return rank(a) < rank(b); });
  return all;
}

std::string verdict(const State& state) {
  const auto found = findings(state);
  if (found.empty()) {
    return "no rank is behind another, and no calls differ, as far as is known";
  }
  const Finding& first = found.front();
  // Where every rank that is missed waits itself, they wait for one another.
  if (first.kind == Finding::Kind::behind) {
    for (const Finding& other : found) {
      const auto meets = [](const std::vector<int>& a, const std::vector<int>& b) {
        return std::any_of(a.begin(), a.end(), [&b](int rank) {
          return std::find(b.begin(), b.end(), rank) != b.end();
        });
      };
      if (other.kind == Finding::Kind::behind && other.group != first.group &&
          meets(other.ranks, first.waiting) && meets(first.ranks, other.waiting)) {
        return fmt::format("ranks wait for one another, in {} and {}: {}; {}", first.group,
                           other.group, first.text, other.text);
      }
    }
  }
  return first.text;
}

std::string to_json(const State& state) {
  static constexpr const char* kKinds[] = {"differs", "behind", "behind on the device"};
  json j{{"state", state.id}, {"verdict", verdict(state)}, {"findings", json::array()}};
  for (const Finding& finding : findings(state)) {
    j["findings"].push_back({{"kind", kKinds[static_cast<int>(finding.kind)]},
                             {"group", finding.group},
                             {"ranks", finding.ranks},
                             {"waiting", finding.waiting},
                             {"since_ns", finding.since},
                             {"text", finding.text}});
  }
  for (const auto& [rank, reason] : state.reasons) {
    j["reasons"][std::to_string(rank)] = reason;
  }
  return j.dump(2);
}

}  // namespace cohort::trace
