"""Cross-validation: every sentence is held out once, a setting's WER is over all of them.

    $ python .lab/crossvalidate.py fold boston104 folds/boston104 --folds 7
    $ python .lab/crossvalidate.py run folds/boston104 --setting full --seeds 0 1 -- \\
          --pretrained_weights i3d_kinetics400 --epochs 60
    $ python .lab/crossvalidate.py table folds/boston104 --baseline full

`fold` pools train and dev of a corpus and deals each signer's sentences out to the folds; other
folds may be used too (DIR/fold*/ in the layout of --data_dir, the held-out sentences as dev).
`run` trains teacher.py on each fold and scores the *last* epoch by greedy decoding, so that nothing
is chosen on the held-out sentences. `table` gives WER over all held-out sentences, mean ± standard
deviation over seeds, and against the baseline the difference with its 95% interval by a paired
bootstrap over sentences (errors of a sentence averaged over the seeds both have).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab

sys.path.insert(0, str(lab.ROOT))
from wer import read_annotations, score  # noqa: E402


def fold(args):
    """Write fold0, fold1, ... with links to the corpus's features."""
    source, out = Path(args.corpus).resolve(), Path(args.folds_dir)
    pooled = [(split, a) for split in ("train", "dev")
              for a in read_annotations(source / f"{split}.corpus.csv")]
    pooled.sort(key=lambda item: (item[1].signer, item[1].id))
    for k in range(args.folds):
        for split, held_out in (("train", False), ("dev", True)):
            folder = out / f"fold{k}/features" / split
            folder.mkdir(parents=True)
            lines = ["id|folder|signer|annotation"]
            for number, (home, a) in enumerate(pooled):
                if (number % args.folds == k) == held_out:
                    os.symlink(source / f"features/{home}/{a.id}.npy", folder / f"{a.id}.npy")
                    lines.append(f"{a.id}|{a.id}|{a.signer}|{' '.join(a.glosses)}")
            (out / f"fold{k}/{split}.corpus.csv").write_text("\n".join(lines) + "\n")


def run_fold(folder, seed, args):
    """One training. Returns [[fold/id, glosses, errors]] of the held-out sentences."""
    with tempfile.TemporaryDirectory() as output:
        lab.run("teacher.py", "--data_dir", folder.resolve(), "--output_dir", output,
                "--seed", seed, "--device", "cpu", *args.flags, root=args.root)
        result = lab.run("teacher.py", "--evaluate", f"{output}/last.pth", "--device", "cpu",
                         root=args.root)
    rows = []
    for a in read_annotations(folder / "dev.corpus.csv"):
        errors = score([a.glosses], [result["hypotheses"][a.id]])
        rows.append([f"{folder.name}/{a.id}", len(a.glosses), errors.errors])
    return rows


def run(args):
    folders = sorted(Path(args.folds_dir).glob("fold*"))
    for seed in args.seeds:
        key = {"folds": Path(args.folds_dir).name, "setting": args.setting, "seed": seed}
        if lab.recorded(**key):
            continue
        started = time.monotonic()
        with ThreadPoolExecutor(args.workers) as pool:
            rows = [row for rows in pool.map(lambda f: run_fold(f, seed, args), folders)
                    for row in rows]
        glosses, errors = sum(row[1] for row in rows), sum(row[2] for row in rows)
        lab.record({**key, "flags": args.flags, "commit": lab.commit(args.root),
                    "wer": errors / glosses, "errors": errors, "glosses": glosses,
                    "seconds": round(time.monotonic() - started), "sentences": rows})
        print(f"{key}: {100 * errors / glosses:.1f}% of {glosses} glosses", flush=True)


def table(args):
    rows = lab.recorded(folds=Path(args.folds_dir).name)
    settings = {}
    for row in rows:
        settings.setdefault(row["setting"], {})[row["seed"]] = row
    print(f"| {Path(args.folds_dir).name} | seeds | WER, last epoch | difference, 95% interval |")
    print("|---|---|---|---|")
    for setting, seeds in settings.items():
        cell = "-"
        base = settings.get(args.baseline, {})
        common = sorted(seeds.keys() & base.keys())
        if common and setting != args.baseline:
            a, b = ([statistics.mean(s) for s in zip(*([row[2] for row in runs[k]["sentences"]]
                                                       for k in common))] for runs in (base, seeds))
            glosses = [row[1] for row in seeds[common[0]]["sentences"]]
            difference, (low, high) = lab.bootstrap(glosses, a, b)
            cell = f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        print(f"| {setting} | {len(seeds)} | {lab.spread([r['wer'] for r in seeds.values()])} "
              f"| {cell} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function, name in ((fold, "corpus"), (run, None), (table, None)):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        if name:
            command.add_argument(name)
        command.add_argument("folds_dir")
        if function is fold:
            command.add_argument("--folds", type=int, default=7)
        if function is run:
            command.add_argument("--setting", required=True, help="its name in record and table")
            command.add_argument("--seeds", type=int, nargs="+", default=[0])
            command.add_argument("--workers", type=int, default=1)
            command.add_argument("--root", default=lab.ROOT, help="checkout whose teacher.py runs")
        if function is table:
            command.add_argument("--baseline", help="setting that the others are compared with")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    args.function(args)


if __name__ == "__main__":
    main()
