r"""Strategies over seeds on one corpus: run, record, print the table.

    $ python .lab/strategies.py --corpus built-in --seeds 0 1 2
    $ python .lab/strategies.py --corpus wlasl25b --data_dir wlasl25b \
          --train_sentences 50 --weights wlasl25a=runs/a/best_i3d.pth \
          --strategies full "from scratch" -- --epochs 40
    $ python .lab/strategies.py --corpus built-in --strategies full --keep runs/built-in
    $ python .lab/strategies.py --corpus built-in --strategies full \
          --teachers runs/built-in
    $ python .lab/strategies.py --corpus built-in --seeds       # only the table

Each run is `python teacher.py` in a process with one thread; what follows -- goes to
all of them. A run that .lab/results.jsonl has is not repeated unless --keep is given,
and never recorded twice. With --teachers distill.py trains the students of the teachers
that an earlier run with --keep left, each with its baseline.

The table has WER in percent, mean ± standard deviation over seeds: on dev at the last
epoch, which nothing was chosen by, on dev at the best epoch, which dev itself chose,
and on test with the best epoch's checkpoint.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import corpora
import lab

WEIGHTS = "i3d_kinetics400"
STRATEGIES = {  # flags beside those of the weights
    "from scratch": [],
    "full": [],
    "progressive": ["--progressive_unfreeze"],
    "progressive, by 0.3": ["--progressive_unfreeze", "--unfreeze_by", "0.3"],
    "progressive, by 0.15": ["--progressive_unfreeze", "--unfreeze_by", "0.15"],
    "top layers": ["--freeze_until_layer", "mixed_4f"],
    "feature extraction": ["--freeze_until_layer", "mixed_5c"],
}


@dataclass(frozen=True)
class Experiment:
    """What the runs of all strategies and seeds share."""

    corpus: str  # its name in record and table
    data_dir: str | None  # None: the built-in corpus
    weights: str  # their name in the record
    weights_file: str | None  # None: teacher.py knows them by their name
    train_sentences: int | None  # drawn by the seed; None: all. Dev stays whole
    adapt_method: str | None  # of the teachers
    keep: str | None  # directory for the runs, which are else thrown away
    teachers: str | None  # a `keep` of teachers, whose students are trained
    root: Path  # checkout whose programs run
    flags: list  # of all runs


def write_subset(source, count, seed, folder):
    """Write a corpus with `count` train sentences of the source and its whole dev."""
    os.symlink(source / "features", folder / "features")
    dev_annotations = (source / "dev.corpus.csv").read_bytes()
    (folder / "dev.corpus.csv").write_bytes(dev_annotations)
    lines = (source / "train.corpus.csv").read_text().splitlines()
    header = lines[0]
    sentences = lines[1:]
    if count > len(sentences):
        raise ValueError(
            f"--train_sentences {count}: {source} has {len(sentences)}, expected at "
            f"most as many"
        )
    drawn = sorted(random.Random(seed).sample(range(len(sentences)), count))
    chosen = [sentences[index] for index in drawn]
    (folder / "train.corpus.csv").write_text("\n".join([header] + chosen))


def data_flags(experiment, seed, scratch):
    """Return the flags that name a run's corpus; a subset is written to scratch."""
    if experiment.data_dir is None:
        return []
    data_dir = Path(experiment.data_dir).resolve()
    if experiment.train_sentences is not None:
        write_subset(data_dir, experiment.train_sentences, seed, scratch)
        data_dir = scratch
    return ["--data_dir", data_dir]


def method_flags(experiment):
    """Return the flags of the adaptation method."""
    if experiment.adapt_method is None:
        return []
    return ["--adapt_method", experiment.adapt_method]


def teacher_flags(experiment, strategy):
    """Return the flags that are a teacher's alone: weights and what trains."""
    flags = STRATEGIES[strategy] + method_flags(experiment)
    if strategy == "from scratch":
        return flags
    source = experiment.weights
    if experiment.weights_file is not None:
        source = os.path.abspath(experiment.weights_file)
    return ["--pretrained_weights", source] + flags


def record_key(experiment, strategy, seed):
    """Return the columns by which a run is known in the record, but its network."""
    from_scratch = strategy == "from scratch"
    return {
        "corpus": experiment.corpus,
        "strategy": strategy,
        "flags": method_flags(experiment) + experiment.flags,
        "seed": seed,
        "weights": "random" if from_scratch else experiment.weights,
        "train_sentences": experiment.train_sentences,
    }


def run(experiment, strategy, seed):
    """Train once; record a row, or with teachers one for student and baseline each."""
    key = record_key(experiment, strategy, seed)
    network = "teacher" if experiment.teachers is None else "student"
    if experiment.keep is None and lab.recorded(**key, network=network):
        print(f"{experiment.corpus}, {strategy}, seed {seed}: in the record already")
        return
    started = time.monotonic()
    commit = lab.commit(experiment.root)
    run_name = f"{strategy}-{seed}"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(experiment.keep or scratch).resolve() / run_name
        flags = data_flags(experiment, seed, Path(scratch))
        flags += ["--seed", seed, "--device", "cpu", "--output_dir", output]
        if experiment.teachers is None:
            flags += teacher_flags(experiment, strategy) + experiment.flags
            results = {"teacher": lab.run("teacher.py", flags, experiment.root)}
            folders = {"teacher": output}
        else:
            teacher_folder = Path(experiment.teachers).resolve() / run_name
            flags += ["--teacher_checkpoint", teacher_folder / "best_i3d.pth"]
            results = lab.run("distill.py", flags + experiment.flags, experiment.root)
            folders = {"student": output, "baseline": output / "alone"}
        seconds = round(time.monotonic() - started)
        for trained, folder in folders.items():
            curve = [row["wer"] for row in lab.epoch_rows(folder)]
            test_wer = results[trained].get("test_wer")
            lab.record(
                key | {"network": trained},
                commit=commit,
                dev_best=min(curve),
                dev_last=curve[-1],
                test=test_wer,
                seconds=seconds,
                curve=[round(wer, 4) for wer in curve],
            )
            test = "" if test_wer is None else f", test {test_wer:.1%}"
            print(
                f"{experiment.corpus}, {strategy}, seed {seed}, {trained}: dev "
                f"{curve[-1]:.1%}{test}",
                flush=True,
            )


def label_of(row):
    """Return a recorded run's strategy and flags, of --adapt_method its value alone."""
    flags = [flag for flag in row["flags"] if flag != "--adapt_method"]
    return " ".join([row["strategy"]] + flags)


def distinct_runs(rows):
    """Return the rows without those of a run that was recorded under two names."""
    distinct = {}
    for row in rows:
        distinct[row["seed"], tuple(row["curve"]), row["test"]] = row
    return list(distinct.values())


def group_rows(rows, name_of):
    """Return name -> distinct rows, sorted by name."""
    groups = {}
    for row in rows:
        groups.setdefault(name_of(row), []).append(row)
    return {name: distinct_runs(groups[name]) for name in sorted(groups)}


def table_lines(corpus):
    """Return the lines of a Markdown table of the runs recorded for a corpus."""

    def name_of(row):
        if row["network"] == "baseline":  # it has no teacher
            return "baseline"
        name = f"{row['network']}: {label_of(row)}"
        if row["train_sentences"] is not None:
            name += f", {row['train_sentences']} sentences"
        if row["weights"] not in (WEIGHTS, "random"):
            name += f", {row['weights']}"
        return name

    rows = [row for row in lab.recorded(corpus=corpus) if "network" in row]
    lines = [
        f"| {corpus} | runs | dev, last epoch | dev, best epoch | test |",
        "|---|---|---|---|---|",
    ]
    for name, group in group_rows(rows, name_of).items():
        cells = [
            lab.spread([row[column] for row in group])
            for column in ("dev_last", "dev_best", "test")
        ]
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return lines


def transfer_lines(corpus):
    """Return a Markdown table: strategy and weights by number of train sentences.

    A cell has dev WER at the last epoch and the number of runs.
    """

    def name_of(row):
        return f"{row['strategy']}, {row['weights']}", row["train_sentences"]

    rows = [
        row
        for row in lab.recorded(corpus=corpus, network="teacher")
        if row["train_sentences"] is not None
    ]
    groups = group_rows(rows, name_of)
    counts = sorted({count for _, count in groups})
    heads = [f"{count} sentences" for count in counts]
    lines = [f"| {corpus} | {' | '.join(heads)} |", "|---" * (1 + len(counts)) + "|"]
    for name in dict.fromkeys(name for name, _ in groups):
        cells = []
        for count in counts:
            wers = [row["dev_last"] for row in groups.get((name, count), [])]
            cells.append(f"{lab.spread(wers)} ({len(wers)})" if wers else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def make_parser():
    """Return the parser of the script's flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="its name in the record")
    parser.add_argument("--data_dir", help="none: the built-in corpus")
    parser.add_argument(
        "--weights",
        default=WEIGHTS,
        metavar="NAME[=FILE]",
        help="their name in the record, and their file if teacher.py does not know it",
    )
    parser.add_argument("--train_sentences", type=int, help="drawn by the seed")
    parser.add_argument("--adapt_method", help="of the teachers")
    parser.add_argument("--keep", help="directory for the runs")
    parser.add_argument("--teachers", help="a --keep of teachers")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--root", type=os.path.abspath, default=lab.ROOT, help="checkout to run"
    )
    return parser


def run_all(args):
    """Run what the flags ask for and print the corpus's table."""
    weights, _, weights_file = args.weights.partition("=")
    experiment = Experiment(
        corpus=args.corpus,
        data_dir=args.data_dir,
        weights=weights,
        weights_file=weights_file or None,
        train_sentences=args.train_sentences,
        adapt_method=args.adapt_method,
        keep=args.keep,
        teachers=args.teachers,
        root=args.root,
        flags=args.flags,
    )
    pairs = [(strategy, seed) for seed in args.seeds for strategy in args.strategies]
    with ThreadPoolExecutor(args.workers) as pool:
        # The first failure cancels the runs that have not begun.
        for _ in pool.map(lambda pair: run(experiment, *pair), pairs):
            pass
    print("\n".join(table_lines(args.corpus)))


def main():
    """Run the program."""
    parser = make_parser()
    own, flags = lab.split_flags(sys.argv[1:])
    parser.set_defaults(flags=flags)
    corpora.run(parser, run_all, own)


if __name__ == "__main__":
    main()
