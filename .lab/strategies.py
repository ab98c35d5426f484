"""The README's table of training strategies: run them over seeds, record, print the table.

    $ python .lab/strategies.py --data_dir DIR --name boston104 --epochs 60 150 --seeds 0 1 2
    $ python .lab/strategies.py --name boston104             # only the table, from what is recorded

Each run is `python teacher.py` in a process with one thread; --workers of them at a time. A run
that is recorded in .lab/results.jsonl is not repeated. WER in percent: the best epoch's on dev,
which also chose the epoch; the last epoch's on dev, which chose nothing; the best epoch's on test.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".lab/results.jsonl"
KINETICS = ["--pretrained_weights", "i3d_kinetics400"]
STRATEGIES = {
    "from scratch": [],
    "full fine-tuning": KINETICS,
    "progressive unfreezing": [*KINETICS, "--progressive_unfreeze"],
    "top layers (frozen to mixed_4f)": [*KINETICS, "--freeze_until_layer", "mixed_4f"],
    "feature extraction (frozen to mixed_5c)": [*KINETICS, "--freeze_until_layer", "mixed_5c"],
}


def run(name, data_dir, strategy, epochs, seed, extra):
    """Train once and append what came out to the record."""
    flags = [*STRATEGIES[strategy], "--epochs", str(epochs), "--seed", str(seed), *extra]
    if data_dir:
        flags = ["--data_dir", str(Path(data_dir).resolve()), *flags]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, ROOT / "teacher.py", "--output_dir", folder, "--json", *flags],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        result = json.loads(process.stdout.splitlines()[-1])
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").open()][1:]
    row = {"name": name, "strategy": strategy, "epochs": epochs, "seed": seed, "extra": extra,
           "best_epoch": result["epoch"],
           "dev_best": result["dev_wer"], "dev_last": rows[-1]["wer"],
           "test": result.get("test_wer"), "seconds": round(time.monotonic() - started)}
    with RECORD.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def recorded(name, record=RECORD):
    """The rows of a record (lines of JSON) that have this name."""
    rows = [json.loads(line) for line in record.open()] if record.exists() else []
    return [row for row in rows if row["name"] == name]


def table(name):
    rows = recorded(name)
    print(f"| {name} | epochs | seeds | dev WER, best epoch | dev WER, last epoch | test WER |")
    print("|---|---|---|---|---|---|")
    for epochs, extra in sorted({(row["epochs"], " ".join(row["extra"])) for row in rows}):
        for strategy in STRATEGIES:
            some = [r for r in rows if (r["strategy"], r["epochs"], " ".join(r["extra"]))
                    == (strategy, epochs, extra)]
            if some:
                cells = " | ".join(spread([r[key] for r in some])
                                   for key in ("dev_best", "dev_last", "test"))
                print(f"| {strategy} {extra} | {epochs} | {len(some)} | {cells} |")


def spread(values):
    """Mean ± standard deviation over seeds, in percent."""
    if None in values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True, help="of the data, in record and table")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--epochs", type=int, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--workers", type=int, default=2)
    args, extra = parser.parse_known_args()
    done = {(r["strategy"], r["epochs"], r["seed"]) for r in recorded(args.name)
            if r["extra"] == extra}
    jobs = [(strategy, epochs, seed) for epochs in args.epochs for seed in args.seeds
            for strategy in args.strategies if (strategy, epochs, seed) not in done]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: run(args.name, args.data_dir, *job, extra), jobs))
    table(args.name)


if __name__ == "__main__":
    main()
