"""Teachers over seeds on one corpus: run, record, print the table.

    $ python .lab/strategies.py --corpus built-in --seeds 0 1 2
    $ python .lab/strategies.py --corpus wlasl50 --data_dir DIR --strategies full -- --epochs 40
    $ python .lab/strategies.py --corpus built-in --seeds       # only the table

Each run is `python teacher.py` in a process with one thread; what follows -- goes to all of them. A
run that .lab/results.jsonl has already is not repeated. WER in percent, mean ± standard deviation
over seeds: on dev at the best epoch, which dev itself chose, and at the last epoch, which chose
nothing; on test with the best epoch's checkpoint.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab

STRATEGIES = {
    "from scratch": [],
    "full fine-tuning": lab.KINETICS,
    "progressive unfreezing": [*lab.KINETICS, "--progressive_unfreeze"],
    "top layers": [*lab.KINETICS, "--freeze_until_layer", "mixed_4f"],
    "feature extraction": [*lab.KINETICS, "--freeze_until_layer", "mixed_5c"],
}


def run(args, strategy, seed):
    """Train once and append what came out to the record."""
    key = {"corpus": args.corpus, "strategy": strategy, "flags": args.flags, "seed": seed,
           "commit": lab.commit(args.root)}
    if lab.recorded(**key):
        return
    data = ["--data_dir", Path(args.data_dir).resolve()] if args.data_dir else []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = lab.run("teacher.py", *data, *STRATEGIES[strategy], "--seed", seed, "--device",
                         "cpu", "--output_dir", folder, *args.flags, root=args.root)
        last = lab.log_rows(folder)[-1]
    row = {**key, "best_epoch": result["epoch"], "dev_best": result["dev_wer"],
           "dev_last": last["wer"], "test": result.get("test_wer"),
           "seconds": round(time.monotonic() - started)}
    lab.record(row)
    print(row, flush=True)


def table(corpus):
    rows = lab.recorded(corpus=corpus)
    print(f"| {corpus} | commit | seeds | dev, best epoch | dev, last epoch | test |")
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((r["strategy"], " ".join(r["flags"]), r["commit"]) for r in rows):
        some = [r for r in rows if (r["strategy"], " ".join(r["flags"]), r["commit"]) == key]
        cells = " | ".join(lab.spread([r[column] for r in some])
                           for column in ("dev_best", "dev_last", "test"))
        print(f"| {key[0]} {key[1]} | {key[2]} | {len(some)} | {cells} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="its name in record and table")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--root", default=lab.ROOT, help="checkout whose teacher.py runs")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    jobs = [(strategy, seed) for seed in args.seeds for strategy in args.strategies]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: run(args, *job), jobs))
    table(args.corpus)


if __name__ == "__main__":
    main()
