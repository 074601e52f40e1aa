// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "analysis.hpp"

namespace cohort::trace {
namespace {

struct Drawn {
  const char* call;
  char letter;
  const char* colour;
};
constexpr std::array kDrawn{Drawn{"all_gather", 'G', "#4477aa"},
                            Drawn{"reduce_scatter", 'S', "#66ccee"},
                            Drawn{"all_reduce", 'R', "#228833"},
                            Drawn{"broadcast", 'B', "#ccbb44"},
                            Drawn{"all_to_all", 'X', "#ee6677"},
                            Drawn{"send", '>', "#888888"},
                            Drawn{"recv", '<', "#888888"},
                            Drawn{"barrier", '|', "#000000"},
                            Drawn{"gather_query", 'Q', "#aa3377"},
                            Drawn{"merge_attention", 'M', "#bb5500"},
                            Drawn{"all_reduce_rms_norm", 'N', "#117733"},
                            Drawn{"agreement", 'a', "#bbbbbb"},
                            Drawn{"launch", 'L', "#332288"}};

const Drawn& drawn(const std::string& call) {
  static constexpr Drawn kOther{"", '?', "#555555"};
  const auto found = std::find_if(kDrawn.begin(), kDrawn.end(),
                                  [&call](const Drawn& one) { return call == one.call; });
  return found == kDrawn.end() ? kOther : *found;
}

/// The latest end of a group's rings.
std::int64_t end_of(const State& state, const Group& group) {
  std::int64_t last = 0;
  for (const auto& [rank, ring] : group.rings) {
    const auto end = state.ends.find(ring.machine);
    last = std::max(last, end == state.ends.end() ? ring.written : end->second);
  }
  return last;
}

/// The moments of a group's last calls, in order, and the end: each gets as much room as any other,
/// because calls take microseconds and waits seconds.
std::vector<std::int64_t> moments(const Group& group, std::int64_t end) {
  constexpr std::size_t kLast = 24;
  std::vector<std::int64_t> all;
  for (const auto& [rank, ring] : group.rings) {
    const std::size_t skip = ring.records.size() - std::min(ring.records.size(), kLast);
    for (std::size_t i = skip; i < ring.records.size(); ++i) {
      all.push_back(ring.records[i].ns);
    }
  }
  all.push_back(end);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

/// Where a moment lies: 0 to 1.
double place_of(const std::vector<std::int64_t>& all, std::int64_t ns) {
  const auto index = std::lower_bound(all.begin(), all.end(), ns) - all.begin();
  return static_cast<double>(index) / static_cast<double>(std::max<std::size_t>(2, all.size()) - 1);
}

double span(const std::vector<std::int64_t>& all) {
  return static_cast<double>(all.back() - all.front()) / 1e6;
}

bool several_machines(const Group& group) {
  return std::any_of(group.rings.begin(), group.rings.end(), [&group](const auto& ring) {
    return ring.second.machine != group.rings.begin()->second.machine;
  });
}

bool is_open(const Ring& ring, const Record& record) {
  return ring.open != 0 && record.sequence == ring.open;
}

bool shown(const Group& group) { return group.ranks.size() > 1 && !group.rings.empty(); }

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  }
  return out;
}

}  // namespace

char letter(const std::string& call) { return drawn(call).letter; }

std::string to_text(const State& state, int width) {
  std::string out = verdict(state) + "\n";
  const auto found = findings(state);
  for (std::size_t i = 1; i < found.size(); ++i) {
    out += fmt::format("also: {}\n", found[i].text);
  }
  if (const auto unknown = unknown_ranks(state); !unknown.empty()) {
    out += fmt::format("no trace was found of rank{} {}\n", unknown.size() == 1 ? "" : "s",
                       fmt::join(unknown, ", "));
  }
  for (const auto& [rank, reason] : state.reasons) {
    out += fmt::format("rank {} wrote for: {}\n", rank, reason);
  }
  bool legend = false;
  for (const Group& group : state.groups) {
    const std::int64_t end = end_of(state, group);
    const auto all = moments(group, end);
    if (!shown(group) || all.size() < 2) {
      continue;
    }
    legend = true;
    out += fmt::format("\n{}, the last {:.3f} ms in order, not to scale\n", group.name, span(all));
    for (const auto& [rank, ring] : group.rings) {
      std::string line(static_cast<std::size_t>(width), ' ');
      const auto column = [&](std::int64_t ns) {
        return static_cast<std::size_t>(place_of(all, ns) * (width - 1));
      };
      for (const Record& record : ring.records) {
        if (record.ns < all.front()) {
          continue;
        }
        if (is_open(ring, record)) {
          std::fill(line.begin() + static_cast<std::ptrdiff_t>(column(record.ns)), line.end(), '-');
        }
        line[column(record.ns)] = drawn(record.call).letter;
      }
      out += fmt::format("  rank {:>3} {} {}\n", group.ranks.at(static_cast<std::size_t>(rank)),
                         line, ring.gone ? "gone" : "");
    }
    if (several_machines(group)) {
      out += "  clocks of different machines: only each rank's own order is certain\n";
    }
  }
  if (legend) {
    out += "\n ";
    for (const Drawn& one : kDrawn) {
      out += fmt::format(" {} {}", one.letter, one.call);
    }
    out += "  - waits in it\n";
  }
  return out;
}

std::string to_svg(const State& state) {
  constexpr int kWidth = 1000;
  constexpr int kLeft = 90;
  constexpr int kRow = 22;
  std::string body;
  int y = 40;
  for (const Group& group : state.groups) {
    const std::int64_t end = end_of(state, group);
    const auto all = moments(group, end);
    if (!shown(group) || all.size() < 2) {
      continue;
    }
    body += fmt::format(
        "<text x='10' y='{}' font-weight='bold'>{}, the last {:.3f} ms in order, not to scale"
        "</text>\n",
        y, escaped(group.name), span(all));
    y += kRow;
    for (const auto& [rank, ring] : group.rings) {
      body += fmt::format("<text x='10' y='{}'>rank {}{}</text>\n", y,
                          group.ranks.at(static_cast<std::size_t>(rank)), ring.gone ? " gone" : "");
      const auto place = [&](std::int64_t ns) {
        return kLeft + place_of(all, ns) * (kWidth - kLeft - 20);
      };
      for (const Record& record : ring.records) {
        if (record.ns < all.front()) {
          continue;
        }
        const double x = place(record.ns);
        const double wide = is_open(ring, record) ? std::max(4.0, place(end) - x) : 4.0;
        body += fmt::format(
            "<rect x='{:.1f}' y='{}' width='{:.1f}' height='14' fill='{}'><title>{}</title>"
            "</rect>\n",
            x, y - 12, wide, drawn(record.call).colour, escaped(describe(ring, record)));
      }
      y += kRow;
    }
    y += kRow / 2;
  }
  return fmt::format(
      "<svg xmlns='http://www.w3.org/2000/svg' width='{}' height='{}' "
      "font-family='sans-serif' font-size='12'>\n<text x='10' y='18'>{}</text>\n{}"
      "</svg>\n",
      kWidth, y, escaped(verdict(state)), body);
}

}  // namespace cohort::trace
