"""What the scripts here share: running a program in one thread, the record of runs, statistics."""

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".lab/results.jsonl"
KINETICS = ["--pretrained_weights", "i3d_kinetics400"]


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


def record(row, path=RECORD):
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def recorded(path=RECORD, **wanted):
    """The rows of a record (lines of JSON) that have these values."""
    rows = [json.loads(line) for line in path.open()] if path.exists() else []
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def spread(values):
    """Mean ± standard deviation over seeds, in percent."""
    if None in values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def bootstrap(glosses, errors_a, errors_b, draws=10_000):
    """(difference of the WERs b - a, its 95% interval), resampling sentences, paired.

    glosses, errors_a, errors_b: one number per sentence.
    """
    rng, n = random.Random(0), len(glosses)
    differences = []
    for _ in range(draws):
        chosen = rng.choices(range(n), k=n)
        total = sum(glosses[i] for i in chosen)
        differences.append(sum(errors_b[i] - errors_a[i] for i in chosen) / total)
    differences.sort()
    whole = (sum(errors_b) - sum(errors_a)) / sum(glosses)
    return whole, (differences[draws // 40], differences[-draws // 40])
