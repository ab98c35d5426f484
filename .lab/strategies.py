"""Strategies over seeds on one corpus: run, record, print the table.

    $ python .lab/strategies.py --corpus built-in --seeds 0 1 2
    $ python .lab/strategies.py --corpus wlasl25b --data_dir wlasl25b --train_sentences 50 \\
          --weights wlasl25a=runs/a/best_i3d.pth --strategies full progressive -- --epochs 40
    $ python .lab/strategies.py --corpus built-in --strategies full --keep runs/built-in
    $ python .lab/strategies.py --corpus built-in --strategies full --teachers runs/built-in
    $ python .lab/strategies.py --corpus built-in --seeds       # only the table

Each run is `python teacher.py` in a process with one thread; what follows -- goes to all of them.
A run that .lab/results.jsonl has is not repeated, but for --keep, and never recorded twice. WER
in percent, mean ± standard deviation over seeds: on dev at the last epoch, which chose nothing,
and at the best one, which dev itself chose; on test with the best epoch's checkpoint.
--train_sentences: that many train sentences, drawn by the seed; dev stays whole. --teachers: the
students of the teachers that an earlier run with --keep left, each with its baseline, by
distill.py.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab

STRATEGIES = {  # flags beside those of the weights
    "from scratch": [],
    "full": [],
    "progressive": ["--progressive_unfreeze"],
    "progressive, by 0.3": ["--progressive_unfreeze", "--unfreeze_by", "0.3"],
    "progressive, by 0.15": ["--progressive_unfreeze", "--unfreeze_by", "0.15"],
    "top layers": ["--freeze_until_layer", "mixed_4f"],
    "feature extraction": ["--freeze_until_layer", "mixed_5c"],
}


def subset(source, count, seed, folder):
    """A corpus in `folder` with `count` of the train sentences of `source` and its whole dev."""
    os.symlink(source / "features", folder / "features")
    (folder / "dev.corpus.csv").write_bytes((source / "dev.corpus.csv").read_bytes())
    header, *lines = (source / "train.corpus.csv").read_text().splitlines()
    chosen = sorted(random.Random(seed).sample(range(len(lines)), count))
    (folder / "train.corpus.csv").write_text("\n".join([header, *(lines[k] for k in chosen)]))
    return folder


def run(args, strategy, seed):
    """Train once and append what came out to the record: a row, with --teachers one per network."""
    name, _, path = args.weights.partition("=")
    method = ["--adapt_method", args.adapt_method] if args.adapt_method else []
    key = {"corpus": args.corpus, "strategy": strategy, "flags": method + args.flags, "seed": seed,
           "weights": "random" if strategy == "from scratch" else name,
           "train_sentences": args.train_sentences}
    if not args.keep and lab.recorded(**key, network="student" if args.teachers else "teacher"):
        print(f"{key}: in the record already, and nothing is to be kept")
        return
    started, folder = time.monotonic(), f"{strategy}-{seed}"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(args.keep or scratch).resolve() / folder
        data = Path(args.data_dir).resolve() if args.data_dir else None
        if args.train_sentences:
            data = subset(data, args.train_sentences, seed, Path(scratch))
        flags = ["--data_dir", data] if data else []
        program, runs = "teacher.py", {"teacher": output}
        if args.teachers:
            teacher = Path(args.teachers).resolve() / folder
            program, runs = "distill.py", {"student": output, "baseline": output / "alone"}
            flags += ["--teacher_checkpoint", teacher / "best_i3d.pth"]
        else:
            flags += [] if strategy == "from scratch" else [
                "--pretrained_weights", os.path.abspath(path) if path else name]
            flags += STRATEGIES[strategy] + method
        result = lab.run(program, *flags, "--seed", seed, "--device", "cpu", "--output_dir",
                         output, *args.flags, root=args.root)
        for network, run in runs.items():
            curve = [row["wer"] for row in lab.log_rows(run)]
            found = result if network == "teacher" else result[network]
            lab.record({**key, "network": network}, commit=lab.commit(args.root),
                       dev_best=min(curve), dev_last=curve[-1], test=found.get("test_wer"),
                       seconds=round(time.monotonic() - started),
                       curve=[round(wer, 4) for wer in curve])
            print(f"{key}, {network}: {curve[-1]:.3f}, test {found.get('test_wer')}", flush=True)


def table(corpus):
    """Lines of Markdown: every setting recorded for this corpus."""
    lines = [f"| {corpus} | weights | train sentences | runs | dev, last epoch | dev, best epoch "
             "| test |", "|---|---|---|---|---|---|---|"]
    rows = [row for row in lab.recorded(corpus=corpus) if "network" in row]
    name = lambda r: (r["network"] if r["network"] == "baseline" else  # it has no teacher
                      " ".join((f"{r['network']}, {r['strategy']}", *r["flags"])),
                      r["weights"], r["train_sentences"] or "all")
    for key in sorted({*map(name, rows)}, key=lambda key: (str(key[2]).zfill(4), key[1], key)):
        some = {(row["seed"], row["dev_last"], row["test"]): row for row in rows
                if name(row) == key}.values()  # the same run under two names counts once
        cells = " | ".join(lab.spread([row[column] for row in some])
                           for column in ("dev_last", "dev_best", "test"))
        lines.append(f"| {' | '.join(map(str, key))} | {len(some)} | {cells} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="its name in record and table")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--weights", default="i3d_kinetics400", metavar="NAME[=FILE]",
                        help="their name in the record, and the file where it is not the same")
    parser.add_argument("--train_sentences", type=int)
    parser.add_argument("--adapt_method", help="of the teachers")
    parser.add_argument("--keep", help="directory for the runs, which are else thrown away")
    parser.add_argument("--teachers", help="a --keep of teachers: train their students")
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
    print("\n".join(table(args.corpus)))


if __name__ == "__main__":
    main()
