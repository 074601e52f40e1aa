# SPDX-License-Identifier: Apache-2.0
"""What the own kernels take, from a fit to measured rows, the link, and the bytes that they send.

    time = start + rank * (n - 2) + moved / link + what the kernel adds

`moved` is what a rank sends to all its peers together, times what the path puts around it: a flag
for each word doubles it, one for each line of 128 bytes adds a fifteenth. `start` is everything else
of one exchange, words 1.75 us and lines 2.0; each rank beyond two costs `rank` more, and a second
exchange in the same launch costs `flight`, and as much more for each of them. A merge computes, and
a query gather addresses rows; what that adds does not depend on the payload.

The constants lie in own_model.json. `rank` and `flight` show with three cards and more only: until
such rows are there, they are assumptions (a flag there and back takes 1.44 us of which an empty
kernel is 0.57; bench/README.md). `fit` derives all that the rows tell. Microseconds, bytes, and
bytes a nanosecond.
"""

import json
import os

HERE = os.path.dirname(os.path.abspath(__file__))
CONSTANTS = os.path.join(HERE, "own_model.json")
NAMES = ("words", "lines", "link", "rank", "flight", "merge", "query")
WIRE = {"words": 2.0, "lines": 16 / 15}
# The shapes that own_kernels and cohort_bench measure, in bf16.
HEADS, VALUE, QUERY, HIDDEN, LAYERS = 128, 512, 576, 7168, 61
# The same where all ranks absorb every head's query, and bring every head's output down to values.
NARROW_VALUE, NARROW_QUERY = 128, 192


def sent(call, ranks, size):
    """Bytes of payload that a rank sends to all peers; `size` is the total, or a batch."""
    peers = ranks - 1
    if call in ("all_gather", "reduce_scatter"):
        return size * peers / ranks
    if call == "all_reduce":
        return size * peers
    if call == "all_reduce in two steps":
        return 2 * size * peers / ranks
    if call in ("gather_query", "narrow gather_query"):
        return size * HEADS // ranks * (QUERY if call == "gather_query" else NARROW_QUERY) * 2 * peers
    if call in ("merge", "narrow merge"):
        return size * HEADS // ranks * ((VALUE if call == "merge" else NARROW_VALUE) * 2 + 4) * peers
    raise ValueError(call)


def terms(call, path, ranks, size):
    """What each constant counts in a call's time; the link's counts 1 / link."""
    found = {path: 1.0, "link": WIRE[path] * sent(call, ranks, size) / 1e3, "rank": float(ranks - 2)}
    if call == "all_reduce in two steps":
        found["flight"] = 1.0
        found["rank"] *= 2
    if call.endswith("merge"):
        found["merge"] = 1.0
    if call.endswith("gather_query"):
        found["query"] = 1.0
    return found


class OwnModel:
    """The constants, and times from them."""

    def __init__(self, constants):
        self.constants = constants

    @staticmethod
    def stored():
        with open(CONSTANTS, encoding="utf-8") as file:
            return OwnModel(json.load(file))

    def store(self):
        with open(CONSTANTS, "w", encoding="utf-8") as file:
            values = ", ".join(f'"{name}": {self.constants[name]:g}' if self.constants[name] % 1 else
                               f'"{name}": {self.constants[name]:.1f}' for name in NAMES)
            file.write(f'{{\n  {values},\n  "source": {json.dumps(self.constants["source"])}\n}}\n')

    def path_us(self, call, path, ranks, size):
        """The time by a path, "words" or "lines"."""
        return sum(count / self.constants["link"] if name == "link" else count * self.constants[name]
                   for name, count in terms(call, path, ranks, size).items())

    def us(self, call, ranks, size):
        """The time of the path that `automatic` takes."""
        steps = [call, "all_reduce in two steps"] if call == "all_reduce" and ranks > 2 else [call]
        return min(self.path_us(one, path, ranks, size) for one in steps for path in WIRE)

    def one_step_bytes(self, ranks, path="words"):
        """Bytes that a rank sends to all peers, below which an all-reduce in one step is the faster."""
        second = self.constants["flight"] + self.constants["rank"] * (ranks - 2)
        return second * self.constants["link"] * 1e3 / (WIRE[path] * (1 - 2 / ranks))


def _solve(matrix, vector):
    """Gauss with pivots; None where the rows do not determine all."""
    size = len(vector)
    rows = [list(line) + [value] for line, value in zip(matrix, vector)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(rows[r][column]))
        if abs(rows[pivot][column]) < 1e-9:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for r in range(size):
            if r != column:
                factor = rows[r][column] / rows[column][column]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[column])]
    return [rows[r][size] / rows[r][r] for r in range(size)]


def fit(measured, known):
    """The model with the least squares of relative errors over (call, path, ranks, size, us). What no
    row tells keeps its value in `known`. None where the rows do not determine the rest."""
    found = [(terms(*row[:4]), row[4]) for row in measured]
    told = [name for name in NAMES if any(counts.get(name) for counts, _ in found)]
    fixed = [name for name in NAMES if name not in told]
    lines, values = [], []
    for counts, us in found:
        lines.append([counts.get(name, 0.0) / us for name in told])
        values.append(1.0 - sum(counts.get(name, 0.0) * known[name] for name in fixed) / us)
    normal = [[sum(line[i] * line[j] for line in lines) for j in range(len(told))] for i in range(len(told))]
    right = [sum(line[i] * value for line, value in zip(lines, values)) for i in range(len(told))]
    solved = _solve(normal, right)
    if solved is None:
        return None
    constants = dict(known)
    for name, value in zip(told, solved):
        constants[name] = round(1 / value if name == "link" else value, 1 if name == "link" else 3)
    return OwnModel(constants)
