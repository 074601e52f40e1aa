# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of decode_engine's result files."""

KINDS = (("attention", "#1f77b4"), ("products", "#7f7f7f"), ("communication", "#d62728"), ("rest", "#bcbd22"))
WAYS = {
    "tp-raw": "tensor parallelism, {library}", "tp-cohort": "tensor parallelism, Cohort",
    "dcp-raw": "DCP, {library}, staged", "dcp-staged": "DCP, Cohort, staged",
    "dcp-packed": "DCP, Cohort, packed", "dcp-cohort": "DCP, Cohort, automatic",
}


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
              f"{e['margin']:.4f}"] for r in rows for e in r["exceptions"]]
    return out + (table(["choices that differ", "prompt", "position", "chosen", "one rank", "margin"], apart) + [""]
                  if apart else [])


def times(run, table, readable):
    rows = [r for r in run.rows if r["bench"] == "decode_engine"]
    if not rows:
        return []
    ways = [way for way in WAYS if any(r["way"] == way for r in rows)]
    by = {(r["context"], r["batch"], r["way"]): r for r in rows}
    lines = []
    for context, batch in sorted({key[:2] for key in by}):
        line = [f"{tokens(context)}, {batch}"]
        us = {way: by[context, batch, way]["us_p50"] for way in ways if (context, batch, way) in by}
        line += [f"{us[way]:.1f}" if way in us else "-" for way in ways]
        for other in ("tp-raw", "tp-cohort", "dcp-raw"):
            known = us.get(other) and us.get("dcp-cohort")
            line.append(f"**{us['dcp-cohort'] / us[other]:.2f}**" if known else "-")
        lines.append(line)
    out = ["The time of a token, us:", ""]
    out += table(["context, batch"] + [label(run, way) for way in ways] +
                 [f"DCP, Cohort / {label(run, other)}" for other in ("tp-raw", "tp-cohort", "dcp-raw")], lines) + [""]
    context, batch = max(key[:2] for key in by)
    last = [by[context, batch, way] for way in ways if (context, batch, way) in by]
    return out + table([f"context {tokens(context)}, batch {batch}"] + [f"{kind}, us" for kind, _ in KINDS] +
                       ["tokens a second", "KV cache a rank", "tokens that fit"],
                       [[label(run, r["way"])] + [f"{r[kind + '_us']:.1f}" for kind, _ in KINDS] +
                        [f"{r['tokens_a_second']:.0f}", readable(r["kv_bytes_per_rank"]), str(r["tokens_that_fit"])]
                        for r in last]) + [""]


def bars(run, path):
    """What a token's time goes into, a bar for each way, written without any library."""
    rows = [r for r in run.rows if r["bench"] == "decode_engine"]
    if not rows:
        return None
    context = max(r["context"] for r in rows)
    width, left, line, y, texts = 760, 250, 24, 30, []
    for batch in sorted({r["batch"] for r in rows}):
        mine = sorted((r for r in rows if (r["context"], r["batch"]) == (context, batch)),
                      key=lambda r: list(WAYS).index(r["way"]))
        total = {r["way"]: sum(r[kind + "_us"] for kind, _ in KINDS) for r in mine}
        longest = max(max(total.values(), default=1), 1e-9)
        texts.append(f'<text x="10" y="{y}" font-weight="bold">context {tokens(context)}, batch {batch}: '
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
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 4}" '
                   f'viewBox="0 0 {width} {y + 4}" font-family="sans-serif" font-size="13">\n'
                   f'<rect width="{width}" height="{y + 4}" fill="#ffffff"/>\n' + "\n".join(texts) + "\n</svg>\n")
    return path


def section(run, picture, table, readable):
    """The page's part on one file, as lines."""
    out = [f"### A whole decode: {run.title()}", "", f"{run.meta.get('model', '')}. {run.facts()}", ""]
    if picture:
        out += [f"![What a token's time goes into]({picture})", ""]
    return out + accuracy(run, table) + times(run, table, readable)
