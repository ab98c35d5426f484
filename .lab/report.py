"""Fill the tables in RESULTS.md and README.md from .lab/results.jsonl.

    $ python .lab/report.py           # rewrites what stands between the marks
    $ python .lab/report.py --check   # exit status 1 where a table is not what the records say

A mark is <!-- KIND: ARGUMENTS --> before a table and <!-- end --> behind it. Kinds: `folds: NAME;
BASELINE; ...` (crossvalidate.py), `corpus: NAME` (strategies.py), `results` (README).
"""

import re
import sys

import crossvalidate
import lab
import strategies

HEAD = "150 epochs, stride 8, second head"
WLASL = "40 epochs, stride 8, second head"
RESULTS = (  # README's rows: network, strategy and flags; settings on boston104's and wlasl's folds
    ("teacher", "full", HEAD, WLASL),
    ("", "the same without the second head", "150 epochs, stride 8", "40 epochs, stride 8"),
    ("teacher", "full --adapt_method spatial_mean", f"{HEAD}, spatial_mean",
     f"{WLASL}, spatial_mean"),
    ("teacher", "from scratch", f"{HEAD}, from scratch", None),
    ("teacher", "progressive, by 0.15", f"{HEAD}, progressive by 0.15", None),
    ("teacher", "progressive, by 0.15 --adapt_method spatial_mean",
     f"{HEAD}, progressive by 0.15, spatial_mean", None),
    ("teacher", "progressive", None, None),
    ("student", "full", f"student of: {HEAD}", None),
    ("student", "progressive, by 0.15", None, None),
    ("student", "progressive, by 0.15 --adapt_method spatial_mean", None, None),
    ("baseline", "the same student without a teacher", f"student of: {HEAD}: baseline", None),
    ("", "no network, nearest train sentence", "nearest train sentence", "nearest train sentence"))


def results(_):
    """README's results table: built-in corpus over seeds, folds of the two real corpora."""
    lines = ["| | built-in, test | RWTH-BOSTON-104, 7 folds | WLASL landmarks, 4 folds |",
             "|---|---|---|---|"]
    for network, strategy, boston104, wlasl in RESULTS:
        name, *flags = re.split(r" (?=--)|(?<=--adapt_method) ", strategy)
        wanted = {"strategy": name, "flags": flags} if network != "baseline" else {}
        tests = {(row["seed"], row["dev_last"], row["test"]) for row in lab.recorded(
            corpus="built-in", network=network, **wanted)}  # one run under two names counts once
        cells = [[test for _, _, test in sorted(tests)]]
        cells += [[row["wer"] for row in lab.recorded(folds=folds, setting=setting)]
                  for folds, setting in (("boston104", boston104), ("wlasl", wlasl))]
        if any(cells):
            lines.append(f"| {f'{network}: ' * bool(network)}{strategy} | " + " | ".join(
                f"{lab.spread(some)} ({len(some)})" if some else "-" for some in cells) + " |")
    return lines


def fill(text):
    """The text with every marked table made anew."""
    kinds = {"folds": lambda words: crossvalidate.lines(words[0], words[1:]),
             "corpus": lambda words: strategies.table(*words), "results": results}

    def table(match):
        words = [word.strip() for word in match[3].split(";") if word.strip()]
        return "\n".join((match[1], *kinds[match[2]](words), match[4]))

    return re.sub(r"(<!-- (\w+):(.*?) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main():
    wrong = 0
    for path in (lab.ROOT / ".lab/RESULTS.md", lab.ROOT / "README.md"):
        text = path.read_text()
        if text != (filled := fill(text)):
            wrong += 1
            print(f"{path}: tables {'differ from' if '--check' in sys.argv else 'filled from'} the "
                  f"records")
            if "--check" not in sys.argv:
                path.write_text(filled)
    sys.exit(wrong if "--check" in sys.argv else 0)


if __name__ == "__main__":
    main()
