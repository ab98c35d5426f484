"""Cross-validation: every sentence is held out once, a setting's WER is over all of them.

    $ python .lab/crossvalidate.py fold boston104 folds/boston104 --folds 7
    $ python .lab/crossvalidate.py run folds/boston104 --setting full --seeds 0 1 -- \\
          --pretrained_weights i3d_kinetics400 --epochs 60
    $ python .lab/crossvalidate.py table folds/boston104 --baselines full

`fold` pools train and dev of a corpus and spreads each signer's sentences over the folds, so that
signers are on both sides; other folds may be used too (DIR/fold*/ in the layout of --data_dir,
the held-out sentences as dev). `run` trains teacher.py on each fold and scores the *last* epoch
by greedy decoding, so that no epoch is chosen on the held-out sentences; with --teachers DIR, the
students of the teachers that an earlier `run --keep DIR` left, each with its baseline (not with
--no_baseline). A setting and seed that the record has are not run again, but for --keep, and
never recorded twice. `repeated` records which held-out sentences have the same glosses as a train
sentence. `table` gives the WER over all held-out sentences and over those not repeated, mean ±
standard deviation over seeds, and the difference to each of the baselines with a 95% interval by
bootstrap, see lab.bootstrap.
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
import numpy as np

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
    """One training of teacher.py, or with --teachers of distill.py, on a fold. Returns {setting:
    {id: errors of the held-out sentence}}."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(args.keep or scratch).resolve() / f"{folder.name}-{seed}"
        program, runs, flags = "teacher.py", {args.setting: output}, []
        if args.teachers:
            teacher = Path(args.teachers).resolve() / f"{folder.name}-{seed}/last.pth"
            program, flags = "distill.py", ["--teacher_checkpoint", teacher]
            if "--no_baseline" not in args.flags:
                runs[f"{args.setting}: baseline"] = output / "alone"
        lab.run(program, "--data_dir", folder.resolve(), "--output_dir", output, "--seed", seed,
                "--device", "cpu", *flags, *args.flags, root=args.root)
        found = {}
        for setting, run in runs.items():
            hypotheses = lab.run(program, "--evaluate", run / "last.pth", "--data_dir",
                                 folder.resolve(), "--device", "cpu", root=args.root)["hypotheses"]
            found[setting] = {
                f"{folder.name}/{a.id}": score([a.glosses], [hypotheses[a.id]]).errors
                for a in read_annotations(folder / "dev.corpus.csv")}
    return found


def glosses_of(folds_dir):
    """{fold/id: number of reference glosses} of all held-out sentences."""
    return {f"{folder.name}/{a.id}": len(a.glosses) for folder in sorted(folds_dir.glob("fold*"))
            for a in read_annotations(folder / "dev.corpus.csv")}


def save(folds_dir, setting, seed, errors, **more):
    """A row of the record: errors and glosses per held-out sentence, in the order of their ids."""
    glosses = glosses_of(folds_dir)
    lab.record({"folds": folds_dir.name, "setting": setting, "seed": seed}, **more,
               wer=sum(errors.values()) / sum(glosses.values()),
               glosses=[glosses[name] for name in sorted(glosses)],
               errors=[errors[name] for name in sorted(glosses)])
    print(f"{setting}, seed {seed}: {100 * sum(errors.values()) / sum(glosses.values()):.1f}% of "
          f"{sum(glosses.values())} glosses", flush=True)


def run(args):
    folds_dir = Path(args.folds_dir)
    for seed in args.seeds:
        if not args.keep and lab.recorded(folds=folds_dir.name, setting=args.setting, seed=seed):
            print(f"{args.setting}, seed {seed}: in the record already, and nothing is to be kept")
            continue
        started, errors = time.monotonic(), {}
        with ThreadPoolExecutor(args.workers) as pool:
            for found in pool.map(lambda folder: run_fold(folder, seed, args),
                                  sorted(folds_dir.glob("fold*"))):
                for setting, some in found.items():
                    errors.setdefault(setting, {}).update(some)
        for setting, some in errors.items():
            save(folds_dir, setting, seed, some, flags=args.flags, commit=lab.commit(args.root),
                 seconds=round(time.monotonic() - started))


def repeated(args):
    """Record which held-out sentences have the glosses of a train sentence of their fold."""
    found = {}
    for folder in sorted(Path(args.folds_dir).glob("fold*")):
        train = {a.glosses for a in read_annotations(folder / "train.corpus.csv")}
        found |= {f"{folder.name}/{a.id}": a.glosses in train
                  for a in read_annotations(folder / "dev.corpus.csv")}
    lab.record({"repeated_in": Path(args.folds_dir).name},
               repeated=[found[name] for name in sorted(found)])
    print(f"{sum(found.values())} of {len(found)} held-out sentences are repeated in train")


def lines(folds, baselines=()):
    """Lines of Markdown: every setting's WER over all held-out sentences and, where `repeated` was
    recorded any, over those that are not repeated; its difference to the baseline settings."""
    settings = {}
    for row in lab.recorded(folds=folds):
        settings.setdefault(row["setting"], []).append(row)
    kept = [~np.array(row["repeated"]) for row in lab.recorded(repeated_in=folds)
            if any(row["repeated"])]
    heads = (folds, "seeds", "WER, last epoch", *(f"of {some.sum()} sentences not in train"
                                                  for some in kept),
             *(f"difference to: {name}" for name in baselines))
    out = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    wer = lambda row, some: float(np.array(row["errors"])[some].sum()
                                  / np.array(row["glosses"])[some].sum())
    for setting, rows in sorted(settings.items(), key=lambda item: statistics.mean(
            row["wer"] for row in item[1])):
        cells = [setting, len(rows), lab.spread([row["wer"] for row in rows]),
                 *(lab.spread([wer(row, some) for row in rows]) for some in kept)]
        for name in baselines:
            runs = ([row["errors"] for row in settings[key]] for key in (name, setting))
            difference, (low, high) = lab.bootstrap(rows[0]["glosses"], *runs)
            cells.append("-" if name == setting else
                         f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        out.append(f"| {' | '.join(map(str, cells))} |")
    return out


def table(args):
    print("\n".join(lines(Path(args.folds_dir).name, args.baselines)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function, name in ((fold, "corpus"), (run, None), (repeated, None), (table, None)):
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
            command.add_argument("--root", default=lab.ROOT, help="checkout whose programs run")
            command.add_argument("--keep", help="directory for the runs, else thrown away")
            command.add_argument("--teachers", help="a --keep of teachers: train their students")
        if function is table:
            command.add_argument("--baselines", nargs="*", default=[],
                                 help="settings that all are compared with")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    args.function(args)


if __name__ == "__main__":
    main()
