# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of decode_engine's result files."""

KINDS = (("attention", "#1f77b4"), ("products", "#7f7f7f"), ("communication", "#d62728"), ("rest", "#bcbd22"))
WAYS = {
    "tp-raw": "tensor parallelism, {library}", "tp-cohort": "tensor parallelism, Cohort",
    "dcp-raw": "DCP, {library}, staged", "dcp-staged": "DCP, Cohort, staged",
    "dcp-packed": "DCP, Cohort, packed", "dcp-cohort": "DCP, Cohort, automatic",
}


SHOWN_EXCEPTIONS = 4


def is_decode(run):
    return any(row["bench"] in ("decode_engine", "decode_accuracy") for row in run.rows)


def label(run, way):
    return WAYS.get(way, way).format(library=run.library)


def tokens(count):
    """A context, in words."""
    return f"{count >> 10}K" if count >= 1024 and count % 1024 == 0 else str(count)


def accuracy(run, table):
    rows = [r for r in run.rows if r["bench"] == "decode_accuracy"]
    if not rows:
        return []
    lines = [[label(run, r["way"]), f"{r['samples'] - len(r['exceptions'])} of {r['samples']}",
              "-" if r["right"] is None else str(r["right"]), f"{r['least_margin']:.3f}",
              f"{r['logit_difference']:.4f}", f"{r['fp64_difference']:.4f}",
              f"{r['loss'] - r['loss_alone']:+.1e}", str(r["wrong"])] for r in rows]
    bound = rows[0]["margin_bound"] / 2
    out = [f"Decoded beside one rank alone, teacher-forced; logits may be off by {bound:.4f}, choices differ "
           f"up to margins of {2 * bound:.4f}:", ""]
    out += table(["way", "choices as one rank", "right", "least margin", "logits from one rank's",
                  "from fp64's", "mean loss off by", "faults"], lines) + [""]
    apart = [[label(run, r["way"]), str(e["prompt"]), str(e["position"]), str(e["chosen"]), str(e["expected"]),
              f"{e['margin']:.4f}"] for r in rows
             for e in sorted(r["exceptions"], key=lambda e: -e["margin"])[:SHOWN_EXCEPTIONS]]
    if any(len(r["exceptions"]) > SHOWN_EXCEPTIONS for r in rows):
        out += [f"Of choices that differ, those of the {SHOWN_EXCEPTIONS} largest margins of each way; the file has them all:", ""]
    return out + (table(["choices that differ", "prompt", "position", "chosen", "one rank", "margin"], apart) + [""]
                  if apart else [])


def times_of(run):
    """Rows of times by (context, batch), each by way."""
    points = {}
    for row in run.rows:
        if row["bench"] == "decode_engine":
            points.setdefault((row["context"], row["batch"]), {})[row["way"]] = row
    return dict(sorted(points.items()))


def point_name(point):
    return f"{tokens(point[0])}, {point[1]}"


def base_point(points):
    """Where ways are compared first: 8K tokens of one sequence, or the least that there is."""
    return (8 << 10, 1) if (8 << 10, 1) in points else next(iter(points))


def fullest_point(points):
    """The most tokens that fit without DCP."""
    fitting = [p for p, rows in points.items() if any(way.startswith("tp-") for way in rows)]
    return max(fitting or points, key=lambda p: p[0] * p[1])


def shown_points(points):
    return sorted({base_point(points), fullest_point(points), max(points, key=lambda p: p[0] * p[1])})


def times(run, table, readable):
    points = times_of(run)
    if not points:
        return []
    ways = [way for way in WAYS if any(way in rows for rows in points.values())]
    lines = []
    for point, rows in points.items():
        us = {way: rows[way]["us_p50"] for way in ways if way in rows}
        line = [point_name(point)] + [f"{us[way]:.1f}" if way in us else "-" for way in ways]
        for other in ("tp-raw", "tp-cohort", "dcp-raw"):
            known = us.get(other) and us.get("dcp-cohort")
            line.append(f"**{us['dcp-cohort'] / us[other]:.2f}**" if known else "-")
        lines.append(line)
    out = ["The time of a token, us:", ""]
    out += table(["context, batch"] + [label(run, way) for way in ways] +
                 [f"DCP, Cohort / {label(run, other)}" for other in ("tp-raw", "tp-cohort", "dcp-raw")], lines) + [""]
    out += goals(run, points, table)
    for point in shown_points(points):
        last = [points[point][way] for way in ways if way in points[point]]
        out += table([f"context {tokens(point[0])}, batch {point[1]}"] + [f"{kind}, us" for kind, _ in KINDS] +
                     ["tokens a second", "KV cache a rank", "tokens that fit"],
                     [[label(run, r["way"])] + [f"{r[kind + '_us']:.1f}" for kind, _ in KINDS] +
                      [f"{r['tokens_a_second']:.0f}", readable(r["kv_bytes_per_rank"]), str(r["tokens_that_fit"])]
                      for r in last]) + [""]
    return out + rooflines(run, points, table)


def rooflines(run, points, table):
    """Attention beside what the hardware allows at best, where a file says that."""
    lines = []
    for point, rows in points.items():
        for way in ("tp-cohort", "dcp-cohort"):
            best = rows.get(way, {}).get("attention_roofline_us")
            if best:
                us = rows[way]["attention_us"]
                lines.append([f"{point_name(point)}: {label(run, way)}", f"{us:.1f}", f"{best:.1f}", f"{us / best:.1f}"])
    return table(["attention of a token", "us", "its roofline, us", "times it"], lines) + [""] if lines else []


# What DCP on Cohort may take of another way's time, at 8K tokens of one sequence and at the most that fits.
GOALS = ((base_point, "tp-raw", 1.00), (base_point, "tp-cohort", 1.02), (fullest_point, "tp-raw", 0.80),
         (base_point, "dcp-raw", 0.90))


def goals(run, points, table):
    """The goals on cards with what was reached, and what it were if attention took its roofline's time."""
    if run.backend != "cuda" or base_point(points)[0] != 8 << 10:
        return []
    lines = []
    for choose, other, most in GOALS:
        point = choose(points)
        pair = [points[point].get(way) for way in ("dcp-cohort", other)]
        if None in pair:
            continue
        ratio = pair[0]["us_p50"] / pair[1]["us_p50"]
        best = [r["us_p50"] - r["attention_us"] + (r.get("attention_roofline_us") or r["attention_us"]) for r in pair]
        lines.append([f"over {label(run, other)}, context {tokens(point[0])}, batch {point[1]}", f"{most:.2f}",
                      f"**{ratio:.3f}**", "met" if ratio <= most else "UNMET", f"{best[0] / best[1]:.3f}"])
    return table(["time of DCP, Cohort", "goal", "reached", "", "with attention at its roofline"], lines) + [""] if lines else []


def svg(path, width, height, texts):
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                   f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">\n'
                   f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(texts) + "\n</svg>\n")
    return path


def bars(run, path):
    """What a token's time goes into, a bar for each way, written without any library."""
    points = times_of(run)
    if not points:
        return None
    width, left, line, y, texts = 760, 250, 24, 30, []
    for point in shown_points(points):
        mine = [points[point][way] for way in WAYS if way in points[point]]
        total = {r["way"]: sum(r[kind + "_us"] for kind, _ in KINDS) for r in mine}
        longest = max(max(total.values(), default=1), 1e-9)
        texts.append(f'<text x="10" y="{y}" font-weight="bold">context {tokens(point[0])}, batch {point[1]}: '
                     'microseconds a token, less is better</text>')
        y += 10
        for r in mine:
            x = left
            texts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{label(run, r["way"])}</text>')
            for kind, colour in KINDS:
                length = (width - left - 80) * r[kind + "_us"] / longest
                texts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{line - 6}" '
                             f'fill="{colour}"/>')
                x += length
            texts.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{total[r["way"]]:.0f}</text>')
            y += line
        y += 34
    x = 10
    for kind, colour in KINDS:
        texts.append(f'<rect x="{x}" y="{y - 18}" width="12" height="12" fill="{colour}"/>'
                     f'<text x="{x + 18}" y="{y - 8}">{kind}</text>')
        x += 130
    return svg(path, width, y + 4, texts)


LINES = {"tp-raw": "#d62728", "tp-cohort": "#9467bd", "dcp-raw": "#ff7f0e", "dcp-staged": "#8c564b",
         "dcp-packed": "#17becf", "dcp-cohort": "#2ca02c"}


def curves(run, path):
    """The time of a token over the context, a panel for each batch, written without any library."""
    points = times_of(run)
    batches = [b for b in sorted({p[1] for p in points}) if len({p[0] for p in points if p[1] == b}) > 1]
    if not batches:
        return None
    ways = [way for way in WAYS if any(way in rows for rows in points.values())]
    panel, high, top, left, texts = 250, 240, 34, 56, []
    for place, batch in enumerate(batches):
        mine = {c: rows for (c, b), rows in points.items() if b == batch}
        x0 = left + place * (panel + left)
        most = max(r["us_p50"] for rows in mine.values() for r in rows.values()) * 1.05
        contexts = sorted(mine)

        def at(context, us, x0=x0, contexts=contexts, most=most):
            return (x0 + panel * contexts.index(context) / max(1, len(contexts) - 1), top + high * (1 - us / most))
        texts.append(f'<text x="{x0}" y="20" font-weight="bold">batch {batch}: us a token</text>')
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = top + high * (1 - share)
            texts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + panel}" y2="{y:.1f}" stroke="#dddddd"/>')
            texts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="11">{most * share:.0f}</text>')
        for context in contexts:
            texts.append(f'<text x="{at(context, 0)[0]:.1f}" y="{top + high + 18}" text-anchor="middle" '
                         f'font-size="11">{tokens(context)}</text>')
        for way in ways:
            line = [at(c, mine[c][way]["us_p50"]) for c in contexts if way in mine[c]]
            texts.append(f'<polyline fill="none" stroke="{LINES[way]}" stroke-width="2" points="' +
                         " ".join(f"{x:.1f},{y:.1f}" for x, y in line) + '"/>')
            texts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{LINES[way]}"/>' for x, y in line]
    y = top + high + 44
    for place, way in enumerate(ways):
        x, line = 10 + place % 3 * 270, y + place // 3 * 20
        texts.append(f'<rect x="{x}" y="{line - 10}" width="12" height="12" fill="{LINES[way]}"/>'
                     f'<text x="{x + 18}" y="{line}">{label(run, way)}</text>')
    return svg(path, max(840, left + len(batches) * (panel + left)), y + 8 + (len(ways) + 2) // 3 * 20, texts)


def headline(run, picture, table, readable):
    """The README's three figures of a whole decode, as lines: at 8K tokens of one sequence beside tensor
    parallelism, at the most tokens that fit without DCP, and beside DCP as engines run it."""
    points = times_of(run)
    if not points:
        return []
    lines = []
    for point, other in ((base_point(points), "tp-raw"), (fullest_point(points), "tp-raw"),
                         (base_point(points), "dcp-raw")):
        theirs, ours = points[point].get(other), points[point].get("dcp-cohort")
        if theirs and ours:
            lines.append([f"one token, context {tokens(point[0])}, batch {point[1]}",
                          f"{theirs['us_p50']:.1f} us ({label(run, other)}), {readable(theirs['kv_bytes_per_rank'])}",
                          f"{ours['us_p50']:.1f} us, {readable(ours['kv_bytes_per_rank'])}",
                          f"**{ours['us_p50'] / theirs['us_p50']:.2f}**"])
    shown = [f"![The time of a token over the context]({picture})", ""] if picture else []
    return shown + table(["a whole decode: median, slowest rank; KV cache a rank", run.library, "DCP, Cohort",
                          "ratio of times"], lines) + \
        ["", f"{run.title()}; {run.meta.get('model', '')}. {run.facts()}", ""] if lines else []


def section(run, pictures, table, readable):
    """The page's part on one file, as lines. `pictures` are pairs of a path and what it shows."""
    out = [f"### A whole decode: {run.title()}", "", f"{run.meta.get('model', '')}. {run.facts()}", ""]
    for picture, text in pictures:
        out += [f"![{text}]({picture})", ""]
    return out + accuracy(run, table) + times(run, table, readable)
