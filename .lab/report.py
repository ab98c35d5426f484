"""Fill the tables in RESULTS.md and README.md from .lab/results.jsonl.

    $ python .lab/report.py           # rewrites what stands between the marks
    $ python .lab/report.py --check   # status 1 where a table differs from the records

A mark is <!-- KIND: ARGUMENTS --> before a table and <!-- end --> behind it. Kinds:

    folds: NAME; PART; BASELINE; ...       crossvalidate.table_lines
    each_fold: NAME; FOLDS; SETTING; ...   crossvalidate.fold_table_lines
    corpus: NAME                           strategies.table_lines
    transfer: NAME                         strategies.transfer_lines

FOLDS are names for the columns, separated by whitespace.
"""

import argparse
import re
import sys

import crossvalidate
import lab
import strategies

MARKED_TABLE = re.compile(r"(<!-- (\w+):(.*?) -->)\n(?:\|.*\n)*(<!-- end -->)")


def marked_table(match):
    """Return a match of MARKED_TABLE with its table made anew."""
    begin_mark, kind, text, end_mark = match.groups()
    arguments = [argument.strip() for argument in text.split(";")]
    if kind == "folds":
        name, part, *baselines = arguments
        lines = crossvalidate.table_lines(name, part, baselines)
    elif kind == "each_fold":
        name, fold_names, *settings = arguments
        lines = crossvalidate.fold_table_lines(name, fold_names.split(), settings)
    elif kind == "corpus":
        lines = strategies.table_lines(arguments[0])
    elif kind == "transfer":
        lines = strategies.transfer_lines(arguments[0])
    else:
        raise ValueError(f"{begin_mark}: expected folds, each_fold, corpus or transfer")
    return "\n".join([begin_mark] + lines + [end_mark])


def main():
    """Fill or check the tables of both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    differing = 0
    for path in (lab.ROOT / ".lab/RESULTS.md", lab.ROOT / "README.md"):
        text = path.read_text()
        if text.count("<!--") != 2 * len(MARKED_TABLE.findall(text)):
            sys.exit(f"{path}: expected a table and <!-- end --> behind each mark")
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
