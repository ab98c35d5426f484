"""Word error rate of sign language recognition, at corpus level.

    $ python wer.py reference.txt hypothesis.txt        # a sentence a line, glosses between blanks
    $ python wer.py dev.stm hypothesis.ctm --scoring sclite --clean phoenix    # as is published
    $ python wer.py dev.corpus.csv hypothesis.ctm --show --json

WER = (substitutions + deletions + insertions) / reference glosses, all summed over the corpus
before the one division: not an average over sentences, and never capped, so a hypothesis with
many insertions has a WER above 1.

"levenshtein" counts the fewest errors that turn the reference into the hypothesis, and of the
alignments that share that minimum one with the most hits, which makes the counts unique.
"sclite" counts as NIST's scorer does: glosses are the same in any (ASCII) case, the alignment is
the cheapest at 4 a substitution and 3 a deletion or insertion, and of equally cheap ones it is
the one that sclite takes. It can have more errors than the fewest.
"""

import argparse
import contextlib
import csv
import json
import math
import re
import signal
import string
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Names of the columns that hold id, signer and glosses.
COLUMNS = (("id", "signer", "annotation"),   # Phoenix-2014: id|folder|signer|annotation
           ("name", "speaker", "orth"))      # -2014-T: name|video|start|end|speaker|orth|...

# What a substitution, insertion, deletion adds to the value of an alignment, an integer of three
# fields: cost, then a rank between moves of equal cost, then the number of substitutions. Fewer
# substitutions at equal errors are more hits. sclite, tracing back from the sentences' ends,
# takes a pair where it can, else an insertion, else a deletion: so ranked, the smaller value is
# its choice; the rank (TIE) is dropped after each choice.
TIE = 1 << 20
COST = TIE << 2
KEEP = ~(3 * TIE)
WEIGHTS = {"levenshtein": (COST + 1, COST, COST),
           "sclite": (4 * COST + 1, 3 * COST + TIE, 3 * COST + 2 * TIE)}
MOST_GLOSSES = 3_000  # of a sentence; the work of scoring grows with the square
SMALL = 500  # table cells; above, rows of Python integers are slower than diagonals of an array
FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


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


def count_errors(ref, hyp, scoring="levenshtein"):
    """(hits, substitutions, deletions, insertions) of two sequences of hashable tokens.

    Tokens are compared as they are: score() is what folds case for sclite.
    """
    ends, ref, hyp = _middle(ref, hyp, scoring == "levenshtein")
    n, m = len(ref), len(hyp)
    if n == 0 or m == 0:
        return ends, 0, n, m
    substitution, insertion, _ = weights = WEIGHTS[scoring]
    if n * m > SMALL:
        value = _corner(ref, hyp, weights)
    elif scoring == "levenshtein":
        value = _levenshtein(ref, hyp)
    else:
        value = _table(ref, hyp, weights)[-1][-1]
    substitutions = value % TIE
    gaps = (value - substitutions * substitution) // (insertion & KEEP)
    hits = (n + m - gaps) // 2 - substitutions
    return ends + hits, substitutions, n - hits - substitutions, m - hits - substitutions


def _middle(ref, hyp, both):
    """(number of tokens left out, ref, hyp) without their equal ends, or only without the last.

    Those are hits of a best alignment and need no table. For sclite only the last are hits of the
    alignment that it takes.
    """
    n, m = len(ref), len(hyp)
    begin = count = 0
    shorter = n if n < m else m
    while count < shorter and ref[-1 - count] == hyp[-1 - count]:
        count += 1
    n, m, shorter = n - count, m - count, shorter - count
    while both and begin < shorter and ref[begin] == hyp[begin]:
        begin += 1
    return begin + count, ref[begin:n], hyp[begin:m]


def _table(ref, hyp, weights):
    """Rows of the best alignments' values of all beginnings (Wagner & Fischer 1974)."""
    substitution, insertion, deletion = weights
    table = [[j * (insertion & KEEP) for j in range(len(hyp) + 1)]]
    for token in ref:
        above = table[-1]
        left = above[0] + (deletion & KEEP)
        row = [left]
        for other, diagonal, up in zip(hyp, above, above[1:]):
            best = diagonal if token == other else diagonal + substitution
            if left + insertion < best:
                best = left + insertion
            if up + deletion < best:
                best = up + deletion
            left = best & KEEP
            row.append(left)
        table.append(row)
    return table


def _levenshtein(ref, hyp):
    """The last value of _table for "levenshtein", in half its time: one row, no rank to drop."""
    substitution, error, _ = WEIGHTS["levenshtein"]
    row = [j * error for j in range(len(hyp) + 1)]
    for token in ref:
        diagonal = row[0]
        left = row[0] = diagonal + error
        for j, other in enumerate(hyp, 1):
            best = diagonal if token == other else diagonal + substitution
            diagonal = row[j]
            gap = (left if left < diagonal else diagonal) + error
            row[j] = left = gap if gap < best else best
    return left


def _corner(ref, hyp, weights):
    """The last value of _table, by its diagonals i + j = d: a cell needs only d - 1 and d - 2."""
    substitution, insertion, deletion = weights
    numbers, n, m = {}, len(ref), len(hyp)
    ref, hyp = (np.array([numbers.setdefault(token, len(numbers)) for token in tokens])
                for tokens in (ref, hyp[::-1]))
    last, new = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)  # by i, of d - 1 and d - 2
    for d in range(1, n + m + 1):
        first, end = max(1, d - m), min(n + 1, d)  # rows i that have both a token and j = d - i > 0
        if first < end:
            cells = new[first - 1:end - 1] + substitution * (
                ref[first - 1:end - 1] != hyp[m - d + first:m - d + end])
            np.minimum(cells, last[first:end] + insertion, out=cells)
            np.minimum(cells, last[first - 1:end - 1] + deletion, out=cells)
            new[first:end] = cells & KEEP
        if d <= m:
            new[0] = d * (insertion & KEEP)
        if d <= n:
            new[d] = d * (deletion & KEEP)
        last, new = new, last
    return int(last[n])


def align(ref, hyp, scoring="levenshtein"):
    """[(ref token or None, hyp token or None)]: the alignment that count_errors counts."""
    substitution, insertion, deletion = weights = WEIGHTS[scoring]
    table, pairs, i, j = _table(ref, hyp, weights), [], len(ref), len(hyp)
    while i or j:
        moves = []
        if i and j:
            same = ref[i - 1] == hyp[j - 1]
            moves.append((table[i - 1][j - 1] + (0 if same else substitution), 1, 1))
        if j:
            moves.append((table[i][j - 1] + insertion, 0, 1))
        if i:
            moves.append((table[i - 1][j] + deletion, 1, 0))
        _, up, left = min(moves, key=lambda move: move[0])
        pairs.append((ref[i - 1] if up else None, hyp[j - 1] if left else None))
        i, j = i - up, j - left
    return pairs[::-1]


def edit_distance(ref, hyp):
    """Levenshtein distance of two sequences of any hashable tokens (of two strings: letters).

    Bit-parallel (Myers 1999 as restated by Hyyro 2003): a column of the table is two integers
    whose bit i says that the value rises or falls by one from row i to row i + 1.
    """
    _, ref, hyp = _middle(ref, hyp, True)
    if not ref or not hyp:
        return len(ref) + len(hyp)
    where, bit, distance = {}, 1, len(ref)
    for token in ref:
        where[token] = where.get(token, 0) | bit
        bit <<= 1
    last, rises, falls = bit >> 1, bit - 1, 0
    for token in hyp:
        equal = where.get(token, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        up, down = falls | ~(diagonal | rises), diagonal & rises  # changes along the row
        if up & last:
            distance += 1
        elif down & last:
            distance -= 1
        up = up << 1 | 1
        rises, falls = (down << 1 | ~(diagonal | up)) & (bit - 1), up & diagonal
    return distance


def score(references, hypotheses, scoring="levenshtein"):
    """WordErrors of a corpus.

    references, hypotheses: the same number of sentences in the same order, each a sequence of
    glosses (strings, for sclite) or a string of glosses between blanks. scoring: "levenshtein",
    or "sclite" for the counts of NIST's scorer. ValueError where the numbers differ, and for
    another scoring.
    """
    if scoring not in WEIGHTS:
        raise ValueError(f"scoring {scoring!r}: expected {' or '.join(WEIGHTS)}")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses: "
                         f"expected one hypothesis a reference")
    fold = scoring == "sclite"
    counts = [count_errors(_glosses(ref, fold), _glosses(hyp, fold), scoring)
              for ref, hyp in zip(references, hypotheses)]
    totals = [sum(column) for column in zip(*counts)] or [0, 0, 0, 0]
    wrong = sum(any(sentence[1:]) for sentence in counts)
    return WordErrors(*totals, sentences=len(counts), sentence_errors=wrong)


def _glosses(sentence, fold=False):
    if isinstance(sentence, str):
        return (sentence.translate(FOLD) if fold else sentence).split()
    return [gloss.translate(FOLD) for gloss in sentence] if fold else list(sentence)


# Phoenix-2014's clean-up, in its order: pattern, replacement. Patterns with blanks are for whole
# annotations, where they join fingerspelt letters; a hypothesis is cleaned gloss by gloss.
PHOENIX = (
    *((mark, "") for mark in ("loc-", "cl-", "qu-", "poss-", "lh-")),
    ("S0NNE", "SONNE"), ("HABEN2", "HABEN"),
    *((mark, "") for mark in ("__EMOTION__", "__PU__", "__LEFTHAND__")),
    ("WIE AUSSEHEN", "WIE-AUSSEHEN"),
    ("ZEIGEN ", "ZEIGEN-BILDSCHIRM "), ("ZEIGEN$", "ZEIGEN-BILDSCHIRM"),
    ("[ +]([A-Z]) ([A-Z]) ", r" \1+\2 "),
    *[("([ +][A-Z]) ([A-Z][ +])", r"\1+\2")] * 3,
    ("([ +]SCH) ([A-Z][ +])", r"\1+\2"), ("([ +]NN) ([A-Z][ +])", r"\1+\2"),
    ("([ +][A-Z]) (NN[ +])", r"\1+\2"), ("([ +][A-Z]) ([A-Z])$", r"\1+\2"),
    ("([A-Z][A-Z])RAUM", r"\1"), ("-PLUSPLUS", ""),
    *[(r"(?<![\w-])(\b[A-Z]+(?![\w-])) \1(?![\w-])", r"\1")] * 4)
PHOENIX = tuple((re.compile(pattern, re.ASCII), replacement) for pattern, replacement in PHOENIX)
PHOENIX_DROPS = ("__LEFTHAND__", "__EPENTHESIS__", "__EMOTION__")


def clean_phoenix_annotation(text):
    """The glosses, a tuple, of a raw Phoenix-2014 annotation as its official evaluation has them.

    text: the annotation as it is in the corpus file, with its blanks. For train annotations; the
    references of dev and test are scored as they are.
    """
    text = " " + text
    for pattern, replacement in PHOENIX:
        text = pattern.sub(replacement, text)
    return tuple(gloss for gloss in text.split()
                 if not any(mark in gloss for mark in PHOENIX_DROPS))


def clean_phoenix(glosses):
    """The glosses of a hypothesis, a tuple, after the clean-up of Phoenix-2014's evaluation."""
    return tuple(clean for gloss in glosses for clean in clean_phoenix_annotation(gloss))


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
    except (OSError, csv.Error, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: not lines of UTF-8 text ({reason}), expected a corpus "
                         f"file") from error
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
        try:
            annotations[name] = Annotation(name, signer, _split(glosses))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if not annotations[name].glosses:
            raise ValueError(f"{path}:{line}: {name} has an empty annotation, expected glosses")
    if not annotations:
        raise ValueError(f"{path}: no sentences, expected a line a sentence below the header")
    return list(annotations.values())


def _split(text):
    """What is between blanks, a tuple. ValueError for too much, and for what cannot be seen."""
    glosses = tuple(text.split())
    if len(glosses) > MOST_GLOSSES:
        raise ValueError(f"{len(glosses):,} glosses, expected at most {MOST_GLOSSES:,} a sentence")
    if not "".join(glosses).isprintable():
        bad = next(gloss for gloss in glosses if not gloss.isprintable())
        raise ValueError(f"{bad[:60]!r}, expected characters that can be seen")
    return glosses


def read_sentences(path):
    """{id: tuple of glosses} of a .csv (corpus file), .stm or .ctm, else of lines of plain text.

    A line of text is a sentence, its id the line's number (an int), an empty line an empty
    sentence. STM and CTM are NIST's: "id channel signer begin end GLOSS ..." a sentence and
    "id channel start duration GLOSS [confidence]" a gloss; ;; begins a comment line, channels are
    not looked at. ValueError names file and line, and what was expected there.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return {a.id: a.glosses for a in read_annotations(path)}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a text file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8 text") from error
    read, sentences, starts = {".stm": _read_stm, ".ctm": _read_ctm}.get(suffix), {}, {}
    for number, line in enumerate(lines, 1):
        try:
            if not read:
                sentences[number] = _split(line)
            elif line.strip() and not line.startswith(";;"):
                read(_split(line), sentences, starts)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if not sentences:
        raise ValueError(f"{path}: no sentences, expected lines of {suffix[1:].upper()}")
    return sentences


def _read_stm(fields, sentences, starts):
    """Add one line of an STM file to sentences."""
    if len(fields) < 5:
        raise ValueError(f"{len(fields)} fields, expected id channel signer begin end GLOSS ...")
    name, _, _, begin, end, *glosses = fields
    if not 0 <= _seconds(begin) < _seconds(end):
        raise ValueError(f"{begin} to {end}, expected a time and a later one")
    if name in sentences:
        raise ValueError(f"id {name} again, expected one segment an id")
    if glosses and re.fullmatch("<.*>", glosses[0]):
        del glosses[0]  # a label such as <o,f0,female>
    sentences[name] = tuple(_plain(gloss) for gloss in glosses)


def _read_ctm(fields, sentences, starts):
    """Add one line of a CTM file to sentences; starts: id -> start of its latest gloss."""
    if len(fields) not in (5, 6):
        raise ValueError(f"{len(fields)} fields, expected id channel start duration GLOSS "
                         f"[confidence]")
    name, _, start, duration, gloss = fields[:5]
    start, duration, *_ = (_seconds(field) for field in (start, duration, *fields[5:]))
    if start < starts.get(name, 0) or duration < 0:
        raise ValueError(f"start {start:g} after {starts.get(name, 0):g}, duration {duration:g}, "
                         f"expected an id's glosses in the order of time")
    if len(sentences.get(name, ())) == MOST_GLOSSES:
        raise ValueError(f"id {name} again, expected at most {MOST_GLOSSES:,} glosses an id")
    starts[name] = start
    sentences[name] = (*sentences.get(name, ()), _plain(gloss))


def _seconds(field):
    try:
        number = float(field)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{field!r}, expected a finite number")
    return number


def _plain(gloss):
    """The gloss, unless sclite gives its letters a meaning of their own (alternatives, silence)."""
    if re.search("[{}();]", gloss) or gloss in ("@", "IGNORE_TIME_SEGMENT_IN_SCORING"):
        raise ValueError(f"{gloss!r} is markup of NIST's formats, expected plain glosses")
    return gloss


def pair(reference, hypothesis):
    """(ids, references, hypotheses, ids without hypothesis) of two files, in the reference's order.

    A sentence that the hypothesis does not have is empty there: all deletions. ValueError for an
    id that the reference does not have, and for texts of different numbers of lines.
    """
    ref, hyp = read_sentences(reference), read_sentences(hypothesis)
    lines = isinstance(next(iter(ref)), int)
    if lines != isinstance(next(iter(hyp)), int):
        raise ValueError(f"{reference} and {hypothesis}: one is plain text, the other has ids, "
                         f"expected both or neither")
    if lines and len(ref) != len(hyp):
        raise ValueError(f"{hypothesis}: {len(ref)} references but {len(hyp)} hypotheses, expected "
                         f"a line for each of {reference}")
    if unknown := [name for name in hyp if name not in ref]:
        raise ValueError(f"{hypothesis}: {len(unknown)} ids that {reference} does not have, "
                         f"expected none: {' '.join(unknown[:5])}")
    return (list(ref), list(ref.values()), [hyp.get(name, ()) for name in ref],
            [name for name in ref if name not in hyp])


def print_alignments(names, references, hypotheses, scoring, width=100):
    """Print each sentence's alignment, the most confused pairs and errors by sentence length."""
    confused, lengths, fold = Counter(), {}, scoring == "sclite"
    margin = ("  ref ", "  hyp ", "      ")
    for name, ref, hyp in zip(names, references, hypotheses):
        pairs = align(_glosses(ref, fold), _glosses(hyp, fold), scoring)
        marks = ["" if r == h else "I" if r is None else "D" if h is None else "S"
                 for r, h in pairs]
        confused.update(pair for pair, mark in zip(pairs, marks) if mark == "S")
        errors = lengths.setdefault((len(ref) + 4) // 5, [0, 0, 0])
        errors[:] = errors[0] + 1, errors[1] + len(ref), errors[2] + len(marks) - marks.count("")
        print(name)
        lines = margin
        for (r, h), mark in zip(pairs, marks):
            cells = ("*" if r is None else r, "*" if h is None else h, mark)
            column = max(map(len, cells))
            if len(lines[0]) + column >= width and lines is not margin:
                print(*(line.rstrip() for line in lines), sep="\n")
                lines = margin
            lines = [f"{line} {cell:<{column}}" for line, cell in zip(lines, cells)]
        print(*(line.rstrip() for line in lines), sep="\n")
    print("Most confused (reference -> hypothesis)")
    for (ref, hyp), times in confused.most_common(10):
        print(f"  {times:>5}  {ref} -> {hyp}")
    print("Glosses a sentence  sentences  errors  WER")
    for fives, (sentences, glosses, errors) in sorted(lengths.items()):
        span = f"{max(0, 5 * fives - 4)}-{5 * fives}" if fives else "0"
        print(f"  {span:>16} {sentences:>10} {errors:>7}  {100 * _fraction(errors, glosses):.1f}%")


def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(description="Corpus word error rate of two files: .stm, .ctm, "
                                                 "corpus .csv, or text with a sentence a line.",
                                     allow_abbrev=False)
    parser.add_argument("reference", help="the sentences as they should be")
    parser.add_argument("hypothesis", help="the recognised sentences; those missing are deletions")
    parser.add_argument("--scoring", choices=WEIGHTS, default="levenshtein",
                        help="the fewest errors, or NIST's way to align (default: %(default)s)")
    parser.add_argument("--clean", choices=("phoenix",),
                        help="clean the hypothesis (never the reference) as Phoenix-2014 does")
    parser.add_argument("--show", action="store_true",
                        help="print alignments, most confused pairs, errors by sentence length")
    parser.add_argument("--json", action="store_true",
                        help="the last line on stdout is one JSON object, all else is on stderr")
    parser.error = lambda message: parser.exit(2, f"wer.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        names, references, hypotheses, missing = pair(args.reference, args.hypothesis)
    except ValueError as error:
        parser.exit(2, f"wer.py: {error}\n")
    if args.clean:
        hypotheses = [clean_phoenix(glosses) for glosses in hypotheses]
    errors = score(references, hypotheses, args.scoring)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        if args.show:
            print_alignments(names, references, hypotheses, args.scoring)
        if missing:
            print(f"{len(missing)} sentences have no hypothesis, all deletions: "
                  f"{' '.join(map(str, missing))}")
        print(errors)
    if args.json:
        rate = errors.wer if math.isfinite(errors.wer) else None  # JSON has no infinity
        print(json.dumps({**asdict(errors), "wer": rate, "ser": errors.ser, "missing": missing,
                          "scoring": args.scoring, "clean": args.clean}))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal has no Umlaut
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as other tools
    main()
