"""Fill the tables in RESULTS.md and README.md from .lab/results.jsonl.

    $ python .lab/report.py           # rewrites what stands between the marks
    $ python .lab/report.py --check   # status 1 where a table differs from the records

A mark is <!-- KIND: ARGUMENTS --> before a table and <!-- end --> behind it. Kinds:

    folds: NAME; PART; BASELINE; ...    crossvalidate.table_lines
    corpus: NAME                        strategies.table_lines
    transfer: NAME                      strategies.transfer_lines
    results:                            README's table
"""

import argparse
import re
import sys

import crossvalidate
import lab
import strategies

MARKED_TABLE = re.compile(r"(<!-- (\w+):(.*?) -->)\n.*?(<!-- end -->)", re.DOTALL)

BOSTON = "150 epochs, stride 8, second head"
# README's rows: a name, network, strategy with its flags, setting on RWTH-BOSTON-104.
RESULTS = (
    ("teacher, everything trains", "teacher", "full", BOSTON),
    (
        "the same, `spatial_mean`",
        "teacher",
        "full --adapt_method spatial_mean",
        f"{BOSTON}, spatial_mean",
    ),
    ("teacher, released in equal stages", "teacher", "progressive", None),
    (
        "teacher, released by 15% of the epochs",
        "teacher",
        "progressive, by 0.15",
        f"{BOSTON}, progressive by 0.15",
    ),
    (
        "the same, `spatial_mean`",
        "teacher",
        "progressive, by 0.15 --adapt_method spatial_mean",
        f"{BOSTON}, progressive by 0.15, spatial_mean",
    ),
    (
        "teacher, random weights",
        "teacher",
        "from scratch",
        f"{BOSTON}, from scratch",
    ),
    (
        "student of everything, `spatial_mean`",
        None,
        None,
        f"student of: {BOSTON}, spatial_mean",
    ),
    (
        "student of released by 15%, `spatial_mean`",
        "student",
        "progressive, by 0.15 --adapt_method spatial_mean",
        None,
    ),
    (
        "baseline: the student alone",
        "baseline",
        "",
        f"student of: {BOSTON}: baseline",
    ),
    (
        "no network: nearest train sentence, standardised",
        None,
        None,
        "nearest train sentence, per sentence",
    ),
)


def built_in_tests(network, strategy):
    """Return the test WERs of a network's runs on the built-in corpus."""
    rows = lab.recorded(corpus="built-in", network=network)
    if network != "baseline":  # which has no teacher, and so no strategy
        rows = [
            row
            for row in rows
            if " ".join([row["strategy"]] + row["flags"]) == strategy
        ]
    return [row["test"] for row in strategies.distinct_runs(rows)]


def fold_wers(folds, setting):
    """Return the WERs of a setting's runs on a corpus's folds."""
    return [row["wer"] for row in lab.recorded(folds=folds, setting=setting)]


def results_lines():
    """Return README's results: the built-in corpus and RWTH-BOSTON-104's folds."""
    lines = ["| network | built-in | RWTH-BOSTON-104 |", "|---|---|---|"]
    for name, network, strategy, setting in RESULTS:
        tests = [] if network is None else built_in_tests(network, strategy)
        folds = fold_wers("boston104", setting)
        cells = [
            f"{lab.spread(wers)} ({len(wers)})" if wers else "-"
            for wers in (tests, folds)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def marked_table(match):
    """Return a match of MARKED_TABLE with its table made anew."""
    begin_mark, kind, text, end_mark = match.groups()
    arguments = [argument.strip() for argument in text.split(";")]
    if kind == "folds":
        name, part, *baselines = arguments
        lines = crossvalidate.table_lines(name, part, baselines)
    elif kind == "corpus":
        lines = strategies.table_lines(arguments[0])
    elif kind == "transfer":
        lines = strategies.transfer_lines(arguments[0])
    elif kind == "results":
        lines = results_lines()
    else:
        raise ValueError(f"{begin_mark}: expected folds, corpus, transfer or results")
    return "\n".join([begin_mark] + lines + [end_mark])


def main():
    """Fill or check the tables of both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    differing = 0
    for path in (lab.ROOT / ".lab/RESULTS.md", lab.ROOT / "README.md"):
        text = path.read_text()
        filled = MARKED_TABLE.sub(marked_table, text)
        if text == filled:
            continue
        differing += 1
        if args.check:
            print(f"{path}: tables differ from the records")
        else:
            path.write_text(filled)
            print(f"{path}: tables filled from the records")
    if args.check and differing:
        sys.exit(1)


if __name__ == "__main__":
    main()
