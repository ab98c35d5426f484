"""What the scripts here share: running a program, the record of runs, statistics.

Importing it puts the project's folder on the path, so that the scripts can import the
project's modules.
"""

import functools
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / ".lab/results.jsonl"
DRAWS = 10_000  # of the bootstrap

sys.path.insert(0, str(ROOT))


def split_flags(arguments):
    """Return a script's own arguments, and what follows "--", flags of its programs."""
    if "--" not in arguments:
        return arguments, []
    cut = arguments.index("--")
    return arguments[:cut], arguments[cut + 1 :]


def run(program, flags, root=ROOT):
    """Run `python PROGRAM --json FLAGS` in one thread.

    Args:
        program: teacher.py or another program of the project.
        flags: a list; its elements need not be text.
        root: a checkout of the project, also the working directory.

    Returns:
        The JSON object that the program prints last, a dict.

    Raises:
        OSError: the program failed; what it printed is on stderr.
    """
    command = [sys.executable, str(Path(root, program)), "--json"]
    command += [str(flag) for flag in flags]
    process = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        print(process.stderr, file=sys.stderr)  # it may be a traceback
        raise OSError(f"{' '.join(command)}: status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def read_rows(path):
    """Read a file of JSON lines, a list of dicts; a missing file has none."""
    if not Path(path).exists():
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def epoch_rows(folder):
    """Return the epochs' rows of a run's log.jsonl."""
    return [row for row in read_rows(Path(folder, "log.jsonl")) if "epoch" in row]


def git(root, arguments):
    """Return what a git command prints in a checkout."""
    command = ["git", "-C", str(root)] + arguments
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def commit(root=ROOT):
    """Return a checkout's short commit hash, with + where its programs differ."""
    changed = git(root, ["status", "--short", "-uno", "*.py"])
    short_hash = git(root, ["rev-parse", "--short", "HEAD"])
    return short_hash + "+" if changed else short_hash


def recorded(**wanted):
    """Return the rows of the record that have these values."""
    return [
        row
        for row in read_rows(RECORD)
        if all(row.get(key) == value for key, value in wanted.items())
    ]


def record(key, **results):
    """Append a row of key and results, unless the record has a row with this key."""
    if recorded(**key):
        print(f"{key}: in the record already, not recorded again")
        return
    with open(RECORD, "a") as file:
        file.write(json.dumps(key | results) + "\n")


def spread(fractions):
    """Return mean ± standard deviation in percent as text; "-" where one is None."""
    if None in fractions:
        return "-"
    mean = f"{100 * statistics.mean(fractions):.1f}"
    if len(fractions) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(fractions):.1f}"


@functools.cache
def resamples(sentences, draws):
    """Draw sentences with replacement: [draws, sentences] how often each is drawn."""
    generator = random.Random(0)
    counts = []
    for _ in range(draws):
        drawn = generator.choices(range(sentences), k=sentences)
        counts.append(np.bincount(drawn, minlength=sentences))
    return np.array(counts)


def drawn_errors(runs, counts, generator):
    """Return the errors of each draw, with seeds drawn anew.

    Args:
        runs: for each of S seeds the errors per sentence.
        counts: [draws, sentences], see resamples.
        generator: a numpy Generator.

    Returns:
        [draws] errors, mean over the S drawn seeds.
    """
    errors = counts @ np.transpose(runs)  # [draws, S]
    seeds = generator.integers(len(runs), size=errors.shape)
    return np.take_along_axis(errors, seeds, axis=1).mean(axis=1)


def bootstrap(glosses, runs_a, runs_b):
    """Compare the WERs of two settings by a bootstrap over sentences and seeds.

    Both settings get the same drawn sentences. One seed stands for itself, so that the
    interval then covers the sentences alone.

    Args:
        glosses: reference glosses of each sentence.
        runs_a: for each seed the errors per sentence.
        runs_b: likewise.

    Returns:
        The difference b - a of the WERs, and the ends of its 95% interval.
    """
    generator = np.random.default_rng(0)
    counts = resamples(len(glosses), DRAWS)
    errors_b = drawn_errors(runs_b, counts, generator)
    errors_a = drawn_errors(runs_a, counts, generator)
    differences = (errors_b - errors_a) / (counts @ np.array(glosses))
    low, high = np.quantile(differences, (0.025, 0.975))
    total = np.mean(runs_b, axis=0).sum() - np.mean(runs_a, axis=0).sum()
    return total / sum(glosses), low, high
