# SPDX-License-Identifier: Apache-2.0
"""Result files of cohort_bench and torch_baseline.py: JSON lines, the facts of the run first."""

import json
import os
import subprocess
import sys

KEY = ("bench", "path", "plan", "mode", "dtype", "ranks", "bytes", "batch")
COLUMNS = KEY + ("us_p50", "us_p95", "us_min", "algbw", "busbw", "wrong")


class ResultError(Exception):
    """A file that is not what it should be."""


def load(path):
    """(facts, rows) of a file. The last line of a killed run may be half a line; it is left out."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from error
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and number > 1:
                print(f"{path}: the last line is cut off and left out", file=sys.stderr)
                break
            raise ResultError(f"{path}:{number}: not JSON: {error}") from error
    if not objects or "meta" not in objects[0]:
        raise ResultError(f"{path}: the first line is not {{\"meta\": ...}}")
    rows = objects[1:]
    for number, row in enumerate(rows, 2):
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise ResultError(f"{path}:{number}: no {', '.join(missing)}")
    return objects[0]["meta"], rows


def key(row):
    return tuple(row[column] for column in KEY)


def describe(row):
    """The key in words."""
    text = " ".join(str(row[c]) for c in ("bench", "path", "plan", "mode", "dtype") if row[c] != "-")
    text += f" {row['ranks']} ranks"
    if row["bytes"]:
        text += f" {row['bytes']} B"
    return text + (f" batch {row['batch']}" if row["batch"] else "")


def commit():
    """Of the measured tree, or what COHORT_BENCH_COMMIT says."""
    here = os.path.dirname(os.path.abspath(__file__))
    given = os.environ.get("COHORT_BENCH_COMMIT")
    if given:
        return given
    try:
        return subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
                              capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
