"""Word error rate of sign language recognition, at corpus level.

    $ python wer.py reference.txt hypothesis.txt        # a sentence a line, glosses between blanks
    $ python wer.py reference.txt hypothesis.txt --json

WER = (substitutions + deletions + insertions) / reference glosses, all summed over the corpus
before the one division: not an average over sentences, and never capped, so a hypothesis with
many insertions has a WER above 1.

Errors are Levenshtein's: the fewest substitutions, deletions and insertions that turn the
reference into the hypothesis. Several alignments can share that minimum; the counts are those of
the one with the most hits, which makes them unique.
"""

import argparse
import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# Names of the columns that hold id, signer and glosses.
COLUMNS = (("id", "signer", "annotation"),   # Phoenix-2014: id|folder|signer|annotation
           ("name", "speaker", "orth"))      # -2014-T: name|video|start|end|speaker|orth|...


@dataclass(frozen=True)
class WordErrors:
    """Counts over a corpus. hits + substitutions + deletions = reference glosses."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int
    sentences: int
    sentence_errors: int  # sentences with at least one error

    @property
    def reference_glosses(self):
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self):
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self):
        """Errors a reference gloss, a fraction; infinite for insertions into nothing."""
        return _fraction(self.errors, self.reference_glosses)

    @property
    def ser(self):
        """Share of sentences that are not entirely right."""
        return _fraction(self.sentence_errors, self.sentences)

    def __str__(self):
        return (f"WER {100 * self.wer:.2f}% ({self.errors} errors in {self.reference_glosses} "
                f"glosses: {self.substitutions} substitutions, {self.deletions} deletions, "
                f"{self.insertions} insertions), {100 * self.ser:.1f}% of {self.sentences} "
                f"sentences wrong")


def _fraction(part, whole):
    return part / whole if whole else float("inf") if part else 0.0


def count_errors(ref, hyp):
    """(hits, substitutions, deletions, insertions) of two sequences of hashable tokens.

    One row of the Levenshtein table (Wagner & Fischer 1974) over integers that order alignments
    first by errors, then by hits: an error weighs `error`, more than all hits together can take
    off. No backtrace is needed: the four counts follow from the two lengths, errors and hits.
    """
    error = min(len(ref), len(hyp)) + 1
    row = [error * j for j in range(len(hyp) + 1)]
    for i, token in enumerate(ref, 1):
        diagonal, row[0] = row[0], error * i
        for j, other in enumerate(hyp, 1):
            matched = diagonal + (-1 if token == other else error)
            diagonal = row[j]
            row[j] = min(matched, row[j] + error, row[j - 1] + error)
    errors = -(-row[-1] // error)
    hits = errors * error - row[-1]
    insertions = hits + errors - len(ref)
    deletions = insertions + len(ref) - len(hyp)
    return hits, errors - insertions - deletions, deletions, insertions


def edit_distance(ref, hyp):
    """Levenshtein distance of two sequences of any hashable tokens (of two strings: letters)."""
    return sum(count_errors(ref, hyp)[1:])


def score(references, hypotheses):
    """WordErrors of a corpus.

    references, hypotheses: the same number of sentences in the same order, each a sequence of
    glosses or a string of glosses between blanks. ValueError where the numbers differ.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses: "
                         f"expected one hypothesis a reference")
    counts = [count_errors(_glosses(ref), _glosses(hyp))
              for ref, hyp in zip(references, hypotheses)]
    totals = [sum(column) for column in zip(*counts)] or [0, 0, 0, 0]
    wrong = sum(any(sentence[1:]) for sentence in counts)
    return WordErrors(*totals, sentences=len(counts), sentence_errors=wrong)


def _glosses(sentence):
    return sentence.split() if isinstance(sentence, str) else list(sentence)


class Annotation(NamedTuple):
    """A sentence of a corpus file."""

    id: str
    signer: str
    glosses: tuple


def read_annotations(path):
    """[Annotation] of a corpus file in Phoenix-2014 or Phoenix-2014-T columns, separated by |.

    ValueError names file and line, and what was expected there.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path}: not lines of UTF-8 text, expected a corpus file "
                         f"({error})") from error
    columns = next((names for names in COLUMNS if {*names} <= {*header}), None)
    if columns is None:
        raise ValueError(f"{path}:1: columns {'|'.join(header)[:100]!r}, expected "
                         f"{' or '.join('|'.join(names) for names in COLUMNS)} among them")
    annotations = {}
    for line, row in enumerate(rows, 2):
        if not row:
            continue  # an empty line, as editors leave at the end
        if len(row) != len(header):
            raise ValueError(f"{path}:{line}: {len(row)} columns, expected {len(header)}")
        name, signer, glosses = (row[header.index(column)] for column in columns)
        # The id names the feature file, so it must not lead out of the features' folder.
        if not name.isprintable() or name in ("", "..") or name != Path(name).name \
                or "\\" in name:
            raise ValueError(f"{path}:{line}: id {name!r}, expected a plain file name")
        if name in annotations:
            raise ValueError(f"{path}:{line}: id {name} again, expected every id once")
        if not glosses.split():
            raise ValueError(f"{path}:{line}: {name} has an empty annotation, expected glosses")
        annotations[name] = Annotation(name, signer, tuple(glosses.split()))
    if not annotations:
        raise ValueError(f"{path}: no sentences, expected a line a sentence below the header")
    return list(annotations.values())


def read_sentences(path):
    """The lines of a UTF-8 text file; an empty line is an empty sentence."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from error


def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(description="Corpus word error rate of two text files.")
    parser.add_argument("reference", help="text file, a sentence a line")
    parser.add_argument("hypothesis", help="text file, line by line the reference's sentences")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.error = lambda message: parser.exit(2, f"wer.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        errors = score(read_sentences(args.reference), read_sentences(args.hypothesis))
    except ValueError as error:
        parser.exit(2, f"wer.py: {error}\n")
    rate = errors.wer if math.isfinite(errors.wer) else None  # JSON has no infinity
    print(json.dumps({**asdict(errors), "wer": rate, "ser": errors.ser}) if args.json else errors)


if __name__ == "__main__":
    main()
