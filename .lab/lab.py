"""What the scripts here share: running a program in one thread, the record of runs, statistics."""

import functools
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".lab/results.jsonl"


def run(program, *flags, root=ROOT):
    """What `python PROGRAM --json FLAGS` prints last, as a dict. One thread, working directory
    `root`; root may be another checkout of the project. Exits with its error message on failure."""
    process = subprocess.run(
        [sys.executable, Path(root) / program, "--json", *map(str, flags)], cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def log_rows(folder):
    """The epochs' rows of a run's log.jsonl."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").open()]
    return [row for row in rows if "epoch" in row]


def commit(root=ROOT):
    """The short commit hash of a checkout, with + where its programs differ from it."""
    git = lambda *words: subprocess.run(["git", "-C", root, *words], capture_output=True,
                                        text=True).stdout.strip()
    changed = git("status", "--short", "-uno", ":(exclude).lab")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def record(key, **found):
    """Append a row, unless the record has one with the values of key."""
    if not recorded(**key):
        with RECORD.open("a") as file:
            file.write(json.dumps(key | found) + "\n")


def recorded(**wanted):
    """The rows of the record (lines of JSON) that have these values."""
    rows = [json.loads(line) for line in RECORD.open()] if RECORD.exists() else []
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def spread(values):
    """Mean ± standard deviation over seeds, in percent."""
    if None in values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


@functools.cache
def resamples(sentences, draws):
    """[draws, sentences] how often each sentence is drawn, in draws with replacement."""
    rng = random.Random(0)
    return np.array([np.bincount(rng.choices(range(sentences), k=sentences), minlength=sentences)
                     for _ in range(draws)])


def bootstrap(glosses, runs_a, runs_b, draws=10_000):
    """(difference of the WERs b - a, its 95% interval), resampling the sentences, the same ones for
    both, and each setting's seeds. One seed stands for itself: then the interval is of the
    sentences alone. glosses: one number per sentence. runs: errors per sentence, a list per seed.
    """
    rng, counts = np.random.default_rng(0), resamples(len(glosses), draws)

    def errors(runs):
        found = counts @ np.transpose(runs)                                 # [draws, seeds]
        chosen = rng.integers(len(runs), size=found.shape)
        return np.take_along_axis(found, chosen, axis=1).mean(axis=1)

    differences = np.sort((errors(runs_b) - errors(runs_a)) / (counts @ np.array(glosses)))
    whole = (np.mean(runs_b, axis=0) - np.mean(runs_a, axis=0)).sum() / sum(glosses)
    return whole, (differences[draws // 40], differences[-draws // 40])
