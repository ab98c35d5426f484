r"""Cross-validation: every sentence is held out once; the WER is over all of them.

    $ python .lab/crossvalidate.py fold boston104 folds/boston104 --folds 7
    $ python .lab/crossvalidate.py run folds/boston104 --setting full --seeds 0 1 -- \
          --pretrained_weights i3d_kinetics400 --epochs 60
    $ python .lab/crossvalidate.py table folds/boston104 --baselines full

`fold` pools train and dev of a corpus and spreads each signer's sentences over the
folds, so that every signer is on both sides. Other folds work too: DIR/fold*/ in the
layout of --data_dir, with the held-out sentences as dev. `copycat.py --protocol` writes
those of unseen signers, unseen sentences, both, and few recordings of one signer.

`run` trains a network on each fold and scores the last epoch by greedy decoding, so
that no epoch is chosen on the held-out sentences. The network is that of teacher.py, or
that of a --network which has its flags. With --weights_from DIR each fold starts from
the last epoch of the same fold and seed that an earlier `run --keep DIR` left; with
--teachers DIR it trains the students of these. A setting and seed that the record has
are not run again unless --keep is given, and never recorded twice.

    $ python .lab/copycat.py corpora/copycat folds/copycat-signer --protocol signer
    $ python .lab/copycat.py corpora/copycat folds/copycat-personal --protocol personal
    $ python .lab/crossvalidate.py run folds/copycat-signer --setting plain \
          --network plain --keep runs/plain -- --epochs 20
    $ python .lab/crossvalidate.py run folds/copycat-personal --setting plain \
          --network plain --weights_from runs/plain -- --epochs 40 --learning_rate 3e-4

    $ python .lab/crossvalidate.py adapt folds/copycat-signer --setting full,adapted \
          --runs runs/full --recordings 25

`adapt` scores runs that `run --keep DIR` left, as they recognise a signer whom they
know from some recordings without glosses (--adapt_to). The held-out sentences of a fold
are divided into two halves, drawn by the seed, and each half is recognised by the
network whose BatchNorm has the statistics of recordings of the other half.

`repeated` records which held-out sentences have the glosses of a train sentence.

`table` prints the WER over all held-out sentences and over those not repeated in train,
mean ± standard deviation over seeds, and the difference to each baseline with a 95%
interval (lab.bootstrap).
"""

import argparse
import functools
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import corpora
import lab
import numpy as np

from wer import PHOENIX_CORRUPT_IDS, edit_distance, read_annotations

NETWORKS = {"teacher": "teacher.py", "plain": ".lab/plain.py"}  # in a checkout


@dataclass(frozen=True)
class Setting:
    """How the networks of a setting are trained."""

    name: str  # in record and table
    flags: list  # of the program
    root: Path  # checkout whose programs run
    program: str  # path of teacher.py or a script with its flags, seen from the root
    keep: str | None  # directory for the runs, which are else thrown away
    teachers: str | None  # a `keep` of teachers, whose students distill.py trains
    weights_from: str | None  # a `keep` of networks that the folds start from
    device: str


def fold_folders(folds_dir):
    """Return the folders of the folds in their order. ValueError: there are none."""
    folders = sorted(Path(folds_dir).glob("fold*"))
    if not folders:
        raise ValueError(
            f"{folds_dir}: no fold*/, expected folds as `fold` writes them"
        )
    return folders


def make_folds(corpus, folds_dir, folds):
    """Write fold0, fold1, ... with links to the corpus's features.

    Raises:
        ValueError: files that are missing or broken, or a number that does not fit.
        OSError: folds are there already.
    """
    source = Path(corpus).resolve()
    pooled = []
    for split in ("train", "dev"):
        for annotation in read_annotations(source / f"{split}.corpus.csv"):
            if annotation.id in PHOENIX_CORRUPT_IDS:
                print(f"Left out, known to be corrupt: {annotation.id}")
            else:
                pooled.append((split, annotation))
    if not 2 <= folds <= len(pooled):
        raise ValueError(
            f"--folds {folds}: {source} has {len(pooled)} sentences, expected 2 to as "
            f"many"
        )
    pooled.sort(key=lambda item: (item[1].signer, item[1].id))
    for fold in range(folds):
        held_out = pooled[fold::folds]
        others = [item for item in pooled if item not in held_out]
        folder = Path(folds_dir, f"fold{fold}")
        write_split(source, folder, "train", others)
        write_split(source, folder, "dev", held_out)


def write_split(source, folder, split, items):
    """Write a split's annotations, and links to its features.

    Args:
        source: directory of the corpus, an absolute path.
        folder: directory of the fold.
        split: train or dev.
        items: (split in the corpus, Annotation) of each sentence.
    """
    features = folder / "features" / split
    features.mkdir(parents=True)
    lines = ["id|folder|signer|annotation"]
    for original_split, annotation in items:
        name = annotation.id
        link_features(source / "features" / original_split, name, features)
        lines.append(
            f"{name}|{name}|{annotation.signer}|{' '.join(annotation.glosses)}"
        )
    text = "\n".join(lines) + "\n"
    (folder / f"{split}.corpus.csv").write_text(text, encoding="utf-8")


def link_features(source, name, target):
    """Link a sentence's feature file, from one folder into another.

    Raises:
        ValueError: there is no such file.
    """
    for suffix in (".npy", ".npz"):
        original = source / f"{name}{suffix}"
        if original.exists():
            os.symlink(original, target / original.name)
            return
    raise ValueError(f"{source}/{name}.npy: no such file, expected it or an .npz")


def held_out_sentences(folds_dir):
    """Return fold/id -> Annotation of all held-out sentences, sorted by fold/id."""
    sentences = {}
    for folder in fold_folders(folds_dir):
        for annotation in read_annotations(folder / "dev.corpus.csv"):
            sentences[f"{folder.name}/{annotation.id}"] = annotation
    return dict(sorted(sentences.items()))


def run_fold(folder, seed, setting):
    """Train on a fold and score its held-out sentences.

    Returns:
        Name of the setting -> {fold/id: errors}; with teachers there is also the
        baseline, where the flags let distill.py train one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run_name = f"{folder.name}-{seed}"
        output = Path(setting.keep or scratch).resolve() / run_name
        data_flags = ["--data_dir", folder.resolve(), "--device", setting.device]
        flags = data_flags + ["--output_dir", output, "--seed", seed]
        runs = {setting.name: output}
        if setting.weights_from is not None:
            flags += ["--pretrained_weights", last_of(setting.weights_from, run_name)]
        if setting.teachers is not None:
            flags += ["--teacher_checkpoint", last_of(setting.teachers, run_name)]
        lab.run(setting.program, flags + setting.flags, setting.root)
        if (output / "alone" / "last.pth").exists():
            runs[f"{setting.name}: baseline"] = output / "alone"
        annotations = read_annotations(folder / "dev.corpus.csv")
        errors = {}
        for name, run_folder in runs.items():
            evaluation_flags = data_flags + ["--evaluate", run_folder / "last.pth"]
            result = lab.run(setting.program, evaluation_flags, setting.root)
            errors[name] = count_errors(folder, annotations, result["hypotheses"])
    return errors


def adapt_fold(folder, seed, args):
    """Score a fold's network adapted to recordings that it does not recognise.

    Args:
        folder: of the fold.
        seed: of the run and of the halves.
        args: of the command line: runs, program, root, recordings (None: all).

    Returns:
        fold/id -> errors.
    """
    annotations = read_annotations(folder / "dev.corpus.csv")
    random.Random(seed).shuffle(annotations)
    middle = len(annotations) // 2
    halves = (annotations[:middle], annotations[middle:])
    checkpoint = last_of(args.runs, f"{folder.name}-{seed}")
    flags = ["--data_dir", folder.resolve(), "--device", "cpu"]
    flags += ["--evaluate", checkpoint, "--adapt_to"]
    errors = {}
    for recognised, others in (halves, halves[::-1]):
        features = folder.resolve() / "features" / "dev"
        files = [features / f"{a.id}.npy" for a in others[: args.recordings]]
        result = lab.run(args.program, flags + files, args.root)
        errors |= count_errors(folder, recognised, result["hypotheses"])
    return errors


def adapt(args):
    """Score a setting's networks adapted to recordings, and record it.

    Args:
        args: of the command line: folds_dir, setting, seeds, and those of adapt_fold.

    Raises:
        ValueError: the record has other sentences by the folder's name.
    """
    count_glosses(args.folds_dir)  # refuses other folds before any is recognised
    for seed in args.seeds:
        errors = {}
        for folder in fold_folders(args.folds_dir):
            errors |= adapt_fold(folder, seed, args)
        save(
            args.folds_dir,
            args.setting,
            seed,
            errors,
            program=args.program,
            recordings=args.recordings,
            device="cpu",
            commit=lab.commit(args.root),
        )


def last_of(keep, run_name):
    """Return the path of the last epoch's checkpoint of a run in a `keep`."""
    return Path(keep).resolve() / run_name / "last.pth"


def count_errors(folder, annotations, hypotheses):
    """Return fold/id -> errors of some of a fold's held-out sentences.

    Args:
        folder: of the fold.
        annotations: of these sentences.
        hypotheses: id -> glosses.
    """
    errors = {}
    for annotation in annotations:
        errors[f"{folder.name}/{annotation.id}"] = edit_distance(
            annotation.glosses, hypotheses[annotation.id]
        )
    return errors


def count_glosses(folds_dir):
    """Return fold/id -> number of glosses of each held-out sentence, sorted.

    Raises:
        ValueError: the record has other sentences by this folder's name.
    """
    name = Path(folds_dir).name
    glosses = {}
    for sentence, annotation in held_out_sentences(folds_dir).items():
        glosses[sentence] = len(annotation.glosses)
    for row in lab.recorded(folds=name):
        if row["glosses"] != list(glosses.values()):
            raise ValueError(
                f"{folds_dir}: the record has {row['setting']!r} on other sentences of "
                f"folds {name!r}, expected the same, or a folder of another name"
            )
    return glosses


def save(folds_dir, setting, seed, errors, **more):
    """Record errors and glosses per held-out sentence, in the order of fold/id.

    The column "sentences" has the number of held-out sentences of each fold.

    Args:
        folds_dir: directory of the folds; its name is the corpus's in the record.
        setting: its name.
        seed: of the runs.
        errors: fold/id -> errors.
        more: further columns, such as flags and commit.

    Raises:
        ValueError: the record has other sentences by this name.
    """
    glosses = count_glosses(folds_dir)
    count = sum(glosses.values())
    wer = sum(errors.values()) / count
    folds_of_sentences = [name.partition("/")[0] for name in glosses]
    sentences = list(Counter(folds_of_sentences).values())
    lab.record(
        {"folds": Path(folds_dir).name, "setting": setting, "seed": seed},
        **more,
        wer=wer,
        sentences=sentences,
        glosses=list(glosses.values()),
        errors=[errors[name] for name in glosses],
    )
    print(
        f"{setting}, seed {seed}: {100 * wer:.1f}% of {count} glosses",
        flush=True,
    )


def run(folds_dir, setting, seeds, workers):
    """Train and score a setting on all folds with each seed, and record it.

    Raises:
        ValueError: the record has other sentences by the folder's name.
    """
    count_glosses(folds_dir)  # refuses other folds before hours of training
    for seed in seeds:
        known = lab.recorded(
            folds=Path(folds_dir).name, setting=setting.name, seed=seed
        )
        if known and setting.keep is None:
            print(f"{setting.name}, seed {seed}: in the record already")
            continue
        started = time.monotonic()
        commit = lab.commit(setting.root)
        train_fold = functools.partial(run_fold, seed=seed, setting=setting)
        errors = {}
        with ThreadPoolExecutor(workers) as pool:
            for errors_of_fold in pool.map(train_fold, fold_folders(folds_dir)):
                for name, counts in errors_of_fold.items():
                    errors.setdefault(name, {}).update(counts)
        for name, counts in errors.items():
            save(
                folds_dir,
                name,
                seed,
                counts,
                flags=setting.flags,
                program=str(setting.program),
                device=setting.device,
                commit=commit,
                seconds=round(time.monotonic() - started),
            )


def record_repeated(folds_dir):
    """Record which held-out sentences have the glosses of a train sentence."""
    train_sentences = {}
    for folder in fold_folders(folds_dir):
        annotations = read_annotations(folder / "train.corpus.csv")
        train_sentences[folder.name] = {a.glosses for a in annotations}
    repeated = []
    for name, annotation in held_out_sentences(folds_dir).items():
        fold = name.partition("/")[0]
        repeated.append(annotation.glosses in train_sentences[fold])
    key = {"repeated_in": Path(folds_dir).name}
    lab.record(key, commit=lab.commit(), repeated=repeated)
    print(
        f"{sum(repeated)} of {len(repeated)} held-out sentences are repeated in train"
    )


def wer_of(row, sentences):
    """Return the WER of a row of the record over some sentences, a boolean array."""
    errors = np.array(row["errors"])[sentences].sum()
    glosses = np.array(row["glosses"])[sentences].sum()
    return float(errors / glosses)


def settings_of(folds, part, baselines):
    """Return name -> rows of the recorded settings, the lowest mean WER first.

    Args:
        folds: the corpus's name in the record.
        part: text that a setting's name must hold, unless it is a baseline.
        baselines: names of settings.
    """
    settings = {}
    for row in lab.recorded(folds=folds):
        if part in row["setting"] or row["setting"] in baselines:
            settings.setdefault(row["setting"], []).append(row)

    def mean_wer(name):
        return statistics.mean(row["wer"] for row in settings[name])

    return {name: settings[name] for name in sorted(settings, key=mean_wer)}


def new_sentences_of(folds):
    """Return which held-out sentences are not repeated in train, a boolean array.

    None where all are new, or where the record does not tell.
    """
    for row in lab.recorded(repeated_in=folds):
        if any(row["repeated"]):
            return ~np.array(row["repeated"])
    return None


def difference_cell(rows, baseline_rows):
    """Return "difference (low to high)" in percent of two settings' WERs."""
    runs = [row["errors"] for row in rows]
    baseline_runs = [row["errors"] for row in baseline_rows]
    glosses = rows[0]["glosses"]
    difference, low, high = lab.bootstrap(glosses, baseline_runs, runs)
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def table_lines(folds, part="", baselines=()):
    """Return the lines of a Markdown table of the recorded settings.

    Args:
        folds: the corpus's name in the record.
        part: only settings whose name holds this text, shown as "...", and the
            baselines are in the table.
        baselines: settings that all others are compared with.
    """
    settings = settings_of(folds, part, baselines)
    if not settings:
        raise ValueError(f"{folds}: the record has no setting of such folds")
    for baseline in baselines:
        if baseline not in settings:
            raise ValueError(
                f"{folds}: no setting {baseline!r} in the record, expected one of "
                f"{', '.join(settings)}"
            )
    new_sentences = new_sentences_of(folds)
    heads = [folds, "seeds", "WER"]
    if new_sentences is not None:
        heads.append("not in train")
    heads += [f"against {name}" for name in baselines]
    lines = [table_row(heads), "|---" * len(heads) + "|"]
    for name, rows in settings.items():
        shares_part = part and name not in baselines
        label = name.replace(part, "...") if shares_part else name
        cells = [label, str(len(rows)), lab.spread([row["wer"] for row in rows])]
        if new_sentences is not None:
            cells.append(lab.spread([wer_of(row, new_sentences) for row in rows]))
        for baseline in baselines:
            if name == baseline:
                cells.append("-")
            else:
                cells.append(difference_cell(rows, settings[baseline]))
        lines.append(table_row(cells))
    return lines


def fold_table_lines(folds, fold_names, settings):
    """Return the lines of a Markdown table of WERs on each fold and on all.

    Args:
        folds: the corpus's name in the record.
        fold_names: of the columns, in the order of the folds.
        settings: names of settings in the order of the rows; of several seeds each
            cell has mean and standard deviation.
    """
    lines = [table_row([folds] + fold_names + ["all"])]
    lines.append("|---" * (len(fold_names) + 2) + "|")
    for name in settings:
        rows = lab.recorded(folds=folds, setting=name)
        if not rows:
            raise ValueError(f"{folds}: the record has no setting {name!r}")
        wers = [wers_of_folds(row) + [row["wer"]] for row in rows]
        cells = [lab.spread(column) for column in zip(*wers, strict=True)]
        lines.append(table_row([name] + cells))
    return lines


def wers_of_folds(row):
    """Return the WER of a row of the record on each of its folds."""
    ends = np.cumsum(row["sentences"])[:-1]
    errors = np.split(row["errors"], ends)
    glosses = np.split(row["glosses"], ends)
    return [float(e.sum() / g.sum()) for e, g in zip(errors, glosses, strict=True)]


def table_row(cells):
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def make_parser():
    """Return the parser of the script's commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fold = commands.add_parser("fold")
    fold.add_argument("corpus")
    fold.add_argument("folds_dir")
    fold.add_argument("--folds", type=int, default=7)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("folds_dir")
    run_parser.add_argument("--setting", required=True, help="its name in the record")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_parser.add_argument("--workers", type=int, default=1, help="folds at a time")
    run_parser.add_argument(
        "--root", type=os.path.abspath, default=lab.ROOT, help="checkout to run"
    )
    run_parser.add_argument(
        "--network",
        default="teacher",
        help=f"{' or '.join(NETWORKS)}, or a script that has the flags of teacher.py",
    )
    run_parser.add_argument("--device", default="cpu")
    run_parser.add_argument("--keep", help="directory for the runs")
    sources = run_parser.add_mutually_exclusive_group()
    sources.add_argument("--teachers", help="a --keep of teachers")
    sources.add_argument("--weights_from", help="a --keep of networks to start from")
    adapt_parser = commands.add_parser("adapt")
    adapt_parser.add_argument("folds_dir")
    adapt_parser.add_argument("--setting", required=True, help="its name in the record")
    adapt_parser.add_argument("--runs", required=True, help="a --keep of networks")
    adapt_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    adapt_parser.add_argument(
        "--program", default="teacher.py", help="of the networks, seen from the root"
    )
    adapt_parser.add_argument(
        "--root", type=os.path.abspath, default=lab.ROOT, help="checkout to run"
    )
    adapt_parser.add_argument(
        "--recordings", type=int, metavar="N", help="at most N; none: all of the half"
    )
    repeated = commands.add_parser("repeated")
    repeated.add_argument("folds_dir")
    table = commands.add_parser("table")
    table.add_argument("folds_dir")
    table.add_argument("--part", default="", help="only settings that hold this text")
    table.add_argument("--baselines", nargs="*", default=[], help="names of settings")
    return parser


def run_command(args):
    """Do what the command line asks for."""
    if args.command == "fold":
        make_folds(args.corpus, args.folds_dir, args.folds)
    elif args.command == "run":
        setting = Setting(
            name=args.setting,
            flags=args.flags,
            root=args.root,
            program=program_of(args),
            keep=args.keep,
            teachers=args.teachers,
            weights_from=args.weights_from,
            device=args.device,
        )
        run(args.folds_dir, setting, args.seeds, args.workers)
    elif args.command == "adapt":
        adapt(args)
    elif args.command == "repeated":
        record_repeated(args.folds_dir)
    else:
        name = Path(args.folds_dir).name
        print("\n".join(table_lines(name, args.part, args.baselines)))


def program_of(args):
    """Return the program that trains, seen from the checkout."""
    if args.teachers is not None:
        return "distill.py"
    return NETWORKS.get(args.network) or os.path.abspath(args.network)


def main():
    """Run the program."""
    parser = make_parser()
    own, flags = lab.split_flags(sys.argv[1:])
    parser.set_defaults(flags=flags)
    corpora.run(parser, run_command, own)


if __name__ == "__main__":
    main()
