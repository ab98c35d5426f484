"""Decoding and scoring: log probabilities -> glosses -> word error rate of a corpus.

    $ python wer.py reference.txt hypothesis.txt            # plain text, one sentence per line
    $ python wer.py dev.stm hypothesis.ctm --scoring sclite --clean phoenix      # as papers do

WER = (substitutions + deletions + insertions) / reference glosses, each summed over the corpus
before the division; not a mean over sentences, and never capped: insertions can push it above 1.
Scoring "levenshtein" counts an alignment with the fewest errors and, among those, the most hits;
"sclite" counts as NIST's scorer, which published Phoenix-2014 results come from: ASCII case is
ignored, a substitution costs 4, an insertion or deletion 3, which can be more errors.

Axes: B sentences, T' encoder frames, V classes (0 is the CTC blank), L glosses of a sentence.
"""

import argparse
import contextlib
import html
import itertools
import json
import math
import re
import signal
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

# Costs of a substitution, an insertion and a deletion. LARGE is above any number of
# substitutions: fewer errors always cost less, and of equally many those with more hits.
LARGE = 10 ** 6
COSTS = {"levenshtein": (LARGE + 1, LARGE, LARGE), "sclite": (4, 3, 3)}
COLUMNS = ("id|signer|annotation", "name|speaker|orth")  # read of Phoenix-2014's, -2014-T's
# NIST's formats: a line's id, time in seconds and glosses; the same in words. A label as in
# <o,f0,female> may precede the glosses of STM; what sclite takes for markup is no gloss.
TIME = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
FORMATS = {".stm": (re.compile(rf"(\S+) \S+ \S+ ({TIME}) {TIME}(?: <\S*>)?((?: \S+)*)"),
                    "id channel signer begin end GLOSS ..."),
           ".ctm": (re.compile(rf"(\S+) \S+ ({TIME}) {TIME} (\S+)(?: -?{TIME})?"),
                    "id channel start duration GLOSS [confidence]")}
MARKUP = re.compile("[{}();]|^@$|^IGNORE_TIME_SEGMENT_IN_SCORING$")
EMPTY = "[EMPTY]"  # Phoenix-2014's hypothesis without glosses: one substitution, no deletion

# ---------------------------------------------------------------- decoding
def greedy_decode(log_probs, lengths, vocabulary):
    """The best class of each frame, repeats merged, blanks removed: a list of B tuples of glosses.
    log_probs: [B, T', V]. lengths: [B], valid frames. vocabulary: V glosses, the blank first."""
    paths = log_probs.argmax(axis=2)                                    # [B, T', V] -> [B, T']
    return [tuple(vocabulary[k] for k, _ in itertools.groupby(path[:n].tolist()) if k != 0)
            for path, n in zip(paths, lengths)]

def beam_decode(log_probs, lengths, vocabulary, beam_width=10, min_log_prob=-5.0):
    """The glosses with the most probable paths together: a list of B tuples of glosses.
    log_probs [B, T', V], in nats, lengths and vocabulary as in greedy_decode. beam_width: prefixes
    kept after each frame. min_log_prob: classes of a frame below it are not tried, except its best
    (pyctcdecode's token_min_logp)."""
    return [tuple(vocabulary[k] for k in _prefix_search(frames[:n], beam_width, min_log_prob))
            for frames, n in zip(log_probs, lengths)]

def _prefix_search(frames, beam_width, min_log_prob):
    """CTC prefix beam search (Hannun et al. 2014, arXiv 1408.2873): [T', V] -> classes."""
    tried = frames >= min_log_prob                                      # [T', V]
    tried[range(len(frames)), frames.argmax(axis=1)] = True
    # Prefix, beginning with class 0 -> log probabilities of all paths so far that collapse to it:
    # of those that end with a blank, and of those that end with its last class.
    beam = {(0,): (0.0, -math.inf)}
    for frame, mask in zip(frames, tried):
        classes = list(zip(mask.nonzero()[0].tolist(), frame[mask].tolist()))
        grown = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (blank, label) in beam.items():
            last, total = prefix[-1], _log_add(blank, label)
            for k, log_prob in classes:
                if k == 0:
                    grown[prefix][0] = _log_add(grown[prefix][0], total + log_prob)
                    continue
                if k == last:
                    grown[prefix][1] = _log_add(grown[prefix][1], label + log_prob)
                start = blank if k == last else total  # a gloss again only after a blank
                if start > -math.inf:
                    paths = grown[(*prefix, k)]
                    paths[1] = _log_add(paths[1], start + log_prob)
        beam = dict(sorted(grown.items(), key=lambda item: -_log_add(*item[1]))[:beam_width])
    return next(iter(beam))[1:]

def _log_add(a, b):
    """log(exp(a) + exp(b)); numpy.logaddexp takes several times as long on two floats."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))

# ---------------------------------------------------------------- alignment and scoring
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
        """Errors per reference gloss, a fraction; infinite for insertions into nothing."""
        if not self.reference_glosses:
            return math.inf if self.errors else 0.0
        return self.errors / self.reference_glosses

    @property
    def ser(self):
        return self.sentence_errors / max(self.sentences, 1)

    def rates(self):
        """WER and its parts, per reference gloss in percent, as one short text."""
        glosses = max(1, self.reference_glosses)
        parts = " ".join(f"{name} {100 * count / glosses:4.1f}" for name, count in (
            ("S", self.substitutions), ("D", self.deletions), ("I", self.insertions)))
        return f"{100 * self.wer:6.2f}% ({parts})"

    def __str__(self):
        return (f"WER {100 * self.wer:.2f}% ({self.errors} errors in {self.reference_glosses} "
                f"glosses: {self.substitutions} substitutions, {self.deletions} deletions, "
                f"{self.insertions} insertions), {100 * self.ser:.1f}% of {self.sentences} "
                f"sentences wrong")

def _cost_table(ref, hyp, scoring):
    """table[i][j]: lowest cost of aligning ref[:i] with hyp[:j] (Wagner & Fischer 1974)."""
    substitution, insertion, deletion = COSTS[scoring]
    table = [[j * insertion for j in range(len(hyp) + 1)]]
    for token in ref:
        above = table[-1]
        left = above[0] + deletion
        row = [left]
        for other, diagonal, up in zip(hyp, above, above[1:]):
            gap = left + insertion if left + insertion < up + deletion else up + deletion
            paired = diagonal if token == other else diagonal + substitution
            left = paired if paired < gap else gap
            row.append(left)
        table.append(row)
    return table

def align(ref, hyp, scoring="levenshtein"):
    """[(ref token or None, hyp token or None)]: the alignment of two sequences that is counted."""
    substitution, insertion, _ = COSTS[scoring]
    table, pairs, i, j = _cost_table(ref, hyp, scoring), [], len(ref), len(hyp)
    # Back from the ends, at equal cost a pair before an insertion before a deletion: so sclite
    # chooses among its cheapest alignments, which can differ in their counts.
    while i or j:
        same = i and j and ref[i - 1] == hyp[j - 1]
        if i and j and table[i][j] == table[i - 1][j - 1] + (0 if same else substitution):
            i, j = i - 1, j - 1
            pairs.append((ref[i], hyp[j]))
        elif j and table[i][j] == table[i][j - 1] + insertion:
            j -= 1
            pairs.append((None, hyp[j]))
        else:
            i -= 1
            pairs.append((ref[i], None))
    return pairs[::-1]

def count_errors(ref, hyp, scoring="levenshtein"):
    """(hits, substitutions, deletions, insertions) of two sequences of tokens."""
    pairs = align(ref, hyp, scoring)
    hits, deletions = sum(r == h for r, h in pairs), len(pairs) - len(hyp)
    return hits, len(ref) - hits - deletions, deletions, len(pairs) - len(ref)

def edit_distance(ref, hyp):
    """Levenshtein distance of two sequences of any tokens (of two strings: their characters)."""
    return _cost_table(ref, hyp, "levenshtein")[-1][-1] // LARGE

def score(references, hypotheses, scoring="levenshtein"):
    """WordErrors of a corpus.
    references, hypotheses: as many sentences in the same order, each a sequence of glosses or a
    string of glosses separated by whitespace, else ValueError. scoring: "levenshtein", "sclite"."""
    if scoring not in COSTS:
        raise ValueError(f"scoring {scoring!r}: expected {' or '.join(COSTS)}")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses, expected {len(references)} as references")
    counts = [count_errors(_glosses(ref, scoring), _glosses(hyp, scoring), scoring)
              for ref, hyp in zip(references, hypotheses)]
    totals = [sum(column) for column in zip(*counts)] or [0, 0, 0, 0]
    return WordErrors(*totals, sentences=len(counts),
                      sentence_errors=sum(any(sentence[1:]) for sentence in counts))

def _glosses(sentence, scoring):
    glosses = sentence.split() if isinstance(sentence, str) else sentence
    if scoring == "sclite":
        return [gloss.encode().lower().decode() for gloss in glosses]  # bytes: only ASCII letters
    return glosses

def constant_answer(references):
    """(WER, gloss) of the best constant answer: the same gloss, or "" for none, to each sentence.
    A network whose WER is near it has learned nothing from the features."""
    found = Counter(gloss for ref in references for gloss in {*ref})
    gloss, hits = max(sorted(found.items()), key=lambda item: item[1], default=("", 0))
    gain = hits - sum(not ref for ref in references)
    return (1 - gain / sum(map(len, references)), gloss) if gain > 0 else (1.0, "")

def diagnosis(train_wer, dev, constant, blank_share, unknown, new_signers, frozen):
    """Lines that say what the errors (dev: WordErrors) suggest and which flags to try.
    train_wer: without augmentation, NaN where not known. constant: WER of constant_answer. Shares:
    blank_share of dev's frames; unknown of dev's glosses, not in train; frozen of parameters."""
    counts = {"deletions": dev.deletions, "insertions": dev.insertions}
    fewer, more = sorted(counts, key=counts.get)
    low, high = (counts[name] / max(1, dev.reference_glosses) for name in (fewer, more))
    rules = (
        (train_wer > 0.3, f"underfitting: train WER {train_wer:.1%}, best constant answer "
                          f"{constant:.1%}, parameters frozen {frozen:.0%}: more --epochs, another "
                          f"--learning_rate, fewer frozen layers; --overfit 8 tests the features"),
        (train_wer <= 0.3 and dev.wer > 2 * train_wer + 0.05,
         f"overfitting: train WER {train_wer:.1%}, dev WER {dev.wer:.1%}: more data, a higher "
         f"--dropout or --weight_decay"),
        (blank_share > 0.95, f"only blanks, {blank_share:.0%} of the frames: usual in the first "
                             f"epochs; later a smaller --temporal_stride or more --epochs"),
        (blank_share <= 0.95 and high > 2 * low + 0.05,
         f"{more} prevail, {high:.1%} of the glosses, {fewer} {low:.1%}: "
         f"--beam_width 10, a {'smaller' if more == 'deletions' else 'larger'} --temporal_stride"),
        (unknown, f"{unknown:.1%} of the reference glosses are not in train and stay errors"),
        (new_signers, f"{new_signers} signers are not in train: expect more errors on them"))
    return [text for applies, text in rules if applies] or ["nothing conspicuous"]

# ---------------------------------------------------------------- Phoenix-2014's clean-up
# The official evaluation's rules in its order: pattern, replacement. Those with spaces are for
# whole annotations (fingerspelling, repeated glosses); hypotheses are cleaned gloss by gloss.
PHOENIX = tuple((re.compile(pattern, re.ASCII), replacement) for pattern, replacement in (
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
    *[(r"(?<![\w-])(\b[A-Z]+(?![\w-])) \1(?![\w-])", r"\1")] * 4))
PHOENIX_DROPPED = re.compile("__LEFTHAND__|__EPENTHESIS__|__EMOTION__")

def clean_phoenix_annotation(text):
    """The glosses, a tuple, of a raw train annotation (of dev and test nothing is cleaned)."""
    text = " " + text
    for pattern, replacement in PHOENIX:
        text = pattern.sub(replacement, text)
    return tuple(gloss for gloss in text.split() if not PHOENIX_DROPPED.search(gloss))

def clean_phoenix(glosses):
    """The glosses of a hypothesis, a tuple, after Phoenix-2014's clean-up; (EMPTY,) for none."""
    cleaned = tuple(clean for gloss in glosses for clean in clean_phoenix_annotation(gloss))
    return cleaned or (EMPTY,)

# ---------------------------------------------------------------- files
Annotation = namedtuple("Annotation", "id signer glosses")  # str, str, tuple of str

def read_annotations(path):
    """[Annotation] of a corpus file: UTF-8, Phoenix-2014's or -2014-T's columns, separated by |.
    ValueError with a line for each error: "path:line: what was found, what was expected"."""
    (where, header), *rows = ((where, line.split("|")) for where, line in _lines(path))
    columns = [names.split("|") for names in COLUMNS if {*names.split("|")} <= {*header}]
    if not columns:
        raise ValueError(f"{where}: columns {'|'.join(header)[:100]!r}, expected "
                         f"{' or '.join(COLUMNS)} among them")
    annotations, errors = {}, []
    for where, row in rows:
        if row == [""]:  # an empty line
            continue
        try:
            if len(row) != len(header):
                raise ValueError(f"{where}: {len(row)} columns, expected {len(header)}")
            name, signer, text = (row[header.index(column)] for column in columns[0])
            # The id names the feature file, so it must not lead out of the features' folder.
            if not name.isprintable() or name in ("", ".", "..") or {*name} & {*"/\\"}:
                raise ValueError(f"{where}: id {name!r}, expected a plain file name")
            if name in annotations:
                raise ValueError(f"{where}: id {name} again, expected each id once")
            if not (glosses := _split(text, where)):
                raise ValueError(f"{where}: {name} has an empty annotation, expected glosses")
            annotations[name] = Annotation(name, signer, glosses)
        except ValueError as error:
            errors.append(str(error))
    if errors or not annotations:
        raise ValueError("\n  ".join(errors) or f"{path}: no sentences, expected one per line")
    return list(annotations.values())

def _lines(path):
    """[("path:number", line)] of a text file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', error)}, expected UTF-8 text")
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]

def _split(text, where):
    if bad := [gloss for gloss in text.split() if not gloss.isprintable()]:
        raise ValueError(f"{where}: {bad[0][:60]!r}, expected printable characters")
    return tuple(text.split())

def read_sentences(path):
    """{id: tuple of glosses} of a .csv (corpus file), .stm, .ctm or plain text (any other name).
    Plain text: a sentence, which may be empty, per line, its number (an int) as id. STM, CTM: see
    FORMATS; comments after ;;. ValueError: "path:line: what was found, what was expected"."""
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        return {annotation.id: annotation.glosses for annotation in read_annotations(path)}
    if suffix not in FORMATS:
        return {number: _split(line, where) for number, (where, line) in enumerate(_lines(path), 1)}
    pattern, expected = FORMATS[suffix]
    sentences, starts = {}, {}
    for where, line in _lines(path):
        if not line.strip() or line.startswith(";;"):
            continue
        if not (match := pattern.fullmatch(" ".join(_split(line, where)))):
            raise ValueError(f"{where}: {line[:100]!r}, expected {expected}")
        name, start, glosses = match[1], float(match[2]), tuple(match[3].split())
        if name in sentences and (suffix == ".stm" or start < starts[name]):
            order = "one line per id" if suffix == ".stm" else f"a start after {starts[name]:g} s"
            raise ValueError(f"{where}: id {name} again, at {start:g} s, expected {order}")
        if markup := [gloss for gloss in glosses if MARKUP.search(gloss)]:
            raise ValueError(f"{where}: {markup[0]!r} is markup for sclite, expected glosses")
        starts[name], sentences[name] = start, sentences.get(name, ()) + glosses
    if not sentences:
        raise ValueError(f"{path}: no sentences, expected lines of {expected}")
    return sentences

def pair(reference, hypothesis):
    """(ids, references, hypotheses, ids without hypothesis) of two files, in the reference's order.
    Such a hypothesis is empty; in plain text it is a ValueError, as is an id without reference."""
    ref, hyp = read_sentences(reference), read_sentences(hypothesis)
    if unknown := [name for name in hyp if name not in ref]:
        raise ValueError(f"{hypothesis}: {len(unknown)} ids that {reference} does not have, "
                         f"expected none: {' '.join(map(str, unknown[:5]))}")
    if len(ref) != len(hyp) and isinstance(next(iter(ref)), int):
        raise ValueError(f"{hypothesis}: {len(hyp)} lines, expected {len(ref)} as {reference} has")
    return (list(ref), list(ref.values()), [hyp.get(name, ()) for name in ref],
            [name for name in ref if name not in hyp])

# ---------------------------------------------------------------- pictures
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#b35900", "#8c564b")

def chart(panels, ticks, axis, bands=()):
    """SVG of line charts one below the other, over the x values from ticks[0] to ticks[-1].
    panels: [(title, [(colour, name, [(x, y), ...])])]; a name stands at its line's highest point.
    ticks: x values to print. axis: text below. bands: x where each shading begins."""
    width, height, out = 760, 180, []  # of a panel, in pixels
    x = lambda value: 60 + width * (value - ticks[0]) / max(1, ticks[-1] - ticks[0])
    text = lambda x, y, words, style="": out.append(
        f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(str(words))}</text>')
    for top, (title, lines) in zip(range(50, 9999, height + 60), panels):
        high = math.ceil(max((b for _, _, points in lines for _, b in points), default=1)) or 1
        y = lambda value: top + height * (1 - value / high)
        text(60, top - 24, title, 'font-weight="bold"')
        for k, start in enumerate(bands):
            out.append(f'<rect x="{x(start):.1f}" y="{top}" width="{x(ticks[-1]) - x(start):.1f}" '
                       f'height="{height}" fill="{("#f6f6f6", "#e4ebf5")[k % 2]}"/>')
            text(x(start) + 4, top + 14, f"stage {k}", 'fill="#666"')
        for value in (high * k / 4 for k in range(5)):
            out.append(f'<path d="M60 {y(value):.1f}h{width}" stroke="#ccc"/>')
            text(54, y(value) + 4, f"{value:g}", 'text-anchor="end"')
        for value in ticks:
            text(x(value), top + height + 16, value, 'fill="#666" text-anchor="middle"')
        for colour, name, points in lines:
            out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                       + " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points) + '"/>')
            a, b = max(points, key=lambda point: point[1], default=(0, 0))
            text(max(x(a), 62 + 4 * len(name)), y(b) - 4, name,
                 f'fill="{colour}" text-anchor="middle"')
    total = 50 + len(panels) * (height + 60)
    text(60, total - 16, axis)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{total}" '
            'font-family="sans-serif" font-size="12"><rect width="860" height="100%" fill="white"/>'
            + "\n".join(out) + "</svg>\n")

def curves_svg(history, best, starts, last, constant):
    """A run's loss and dev WER over the epochs (history: a row each, best: one of them) as SVG.
    starts: first epochs of the stages; last: the last epoch; constant: WER of constant_answer."""
    line = lambda key, factor: [(row["epoch"], factor * row[key]) for row in history
                                if row[key] is not None]
    return chart([
        ("Nats per gloss: training objective (blue), CTC loss on dev (red)",
         [(COLOURS[0], "", line("loss", 1)), (COLOURS[1], "", line("dev_loss", 1))]),
        (f"Dev WER in %, best {100 * best['wer']:.1f} at {best['epoch']} (grey: constant answer)",
         [("#888", "", [(k, 100 * constant) for k in (0, last)]),
          (COLOURS[1], "", line("wer", 100))])], (*starts, last), "epoch", starts)

def posteriors_svg(panels, vocabulary, stride, reference):
    """What networks believe of one sentence, as SVG: a line per class that reaches 0.2 in a frame,
    grey for the blank, glosses where they are the best. panels: title -> log probs [T', V]."""
    charts = []
    for title, frames in panels.items():
        likely = np.flatnonzero(np.exp(frames).max(axis=0) >= 0.2)
        colours = {k: COLOURS[n % 6] if k else "#aaa" for n, k in enumerate(likely)}
        lines = [(colours[k], "", [(stride * step, math.exp(frame[k]))
                                   for step, frame in enumerate(frames)]) for k in likely]
        for k, run in itertools.groupby(range(len(frames)), key=frames.argmax(axis=1).item):
            if k:  # a line of one point is its name alone
                lines.append((colours.get(k), vocabulary[k], [(stride * next(run), 1)]))
        charts.append((title, lines))
    ticks = [stride * step for step in range(0, len(frames), max(1, len(frames) // 10))]
    return chart(charts, [*ticks, stride * (len(frames) - 1)],
                 f"input frame. Reference: {' '.join(reference)}")

# ---------------------------------------------------------------- program
def print_alignments(names, references, hypotheses, scoring):
    """Print each sentence's alignment, a line per pair of glosses, and the most confused pairs."""
    confused = Counter()
    for name, ref, hyp in zip(names, references, hypotheses):
        print(name)
        for r, h in align(_glosses(ref, scoring), _glosses(hyp, scoring), scoring):
            mark = " " if r == h else "I" if r is None else "D" if h is None else "S"
            confused[r, h] += mark == "S"
            print(f"  {mark} {r or '*':<24} {h or '*'}")
    print("Most confused (reference -> hypothesis)")
    for (ref, hyp), times in (+confused).most_common(10):
        print(f"  {times:>5}  {ref} -> {hyp}")

def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("reference", help="the correct sentences: .stm, .ctm, corpus .csv or plain text")
    add("hypothesis", help="the recognised sentences, likewise; those missing are empty")
    add("--scoring", choices=COSTS, default="levenshtein", help="see above (default: %(default)s)")
    add("--clean", choices=("phoenix",), help="clean the hypothesis as Phoenix-2014's scripts do")
    add("--show", action="store_true", help="print alignments and confusions")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    parser.error = lambda message: parser.exit(2, f"wer.py: {message}\n")  # one line, no usage
    args = parser.parse_args(argv)
    try:
        names, references, hypotheses, missing = pair(args.reference, args.hypothesis)
    except ValueError as error:
        parser.error(error)
    if args.clean:
        hypotheses = [clean_phoenix(glosses) for glosses in hypotheses]
    errors = score(references, hypotheses, args.scoring)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        if args.show:
            print_alignments(names, references, hypotheses, args.scoring)
        if missing:
            print(f"{len(missing)} sentences have no hypothesis, scored as empty:", *missing)
        print(errors)
    if args.json:
        rates = {"wer": None if errors.wer == math.inf else errors.wer, "ser": errors.ser}
        print(json.dumps(asdict(errors) | rates | {"missing": missing, "scoring": args.scoring,
                                                   "clean": args.clean}))

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal cannot print an umlaut
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as other tools
    main()
