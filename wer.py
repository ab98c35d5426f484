"""Decoding and scoring: log probabilities -> glosses -> word error rate of a corpus.

    $ python wer.py reference.txt hypothesis.txt
    $ python wer.py dev.stm hypothesis.ctm --scoring sclite --clean phoenix
    $ python wer.py text hypothesis --format kaldi --show

The first scores plain text, one sentence per line; the second scores as papers on
Phoenix-2014 do. It prints one line, such as
"WER 50.00% (2 errors in 4 glosses: 1 substitutions, 0 deletions, 1 insertions), ...".

WER = (substitutions + deletions + insertions) / reference glosses, each summed over
the corpus before the division. It is not a mean over sentences and is never capped:
insertions can push it above 1.

Scoring "levenshtein" counts an alignment with the fewest errors and, among those, the
most hits. "sclite" counts as NIST's scorer does, which published Phoenix-2014 results
come from: ASCII case and one "*" at the end of a gloss are ignored; a substitution
costs 4, an insertion or a deletion 3, which can make more errors.

Formats, by suffix: .csv (a corpus file with the columns of Phoenix-2014 or -2014-T),
.stm and .ctm (NIST), .trn (NIST: glosses, then the id in parentheses). Other files and
"-", which is standard input, are plain text or what --format says ("kaldi": the id,
then glosses). All text is brought to Unicode's normal form NFC.

Axes: B sentences, T' encoder frames, V classes (0 is the CTC blank).
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import re
import signal
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Costs of a substitution, an insertion and a deletion. For "levenshtein", LARGE exceeds
# any number of substitutions, so that fewer errors always cost less and, of equally
# many errors, those with fewer substitutions, which are those with more hits.
LARGE = 10**6
COSTS = {"levenshtein": (LARGE + 1, LARGE, LARGE), "sclite": (4, 3, 3)}

# Steps of an alignment: a pair, a hypothesis gloss alone, a reference gloss alone.
PAIR, INSERTION, DELETION = range(3)
LONG_HYPOTHESIS = 100  # glosses from which numpy is faster than a loop over them

EMPTY = "[EMPTY]"  # Phoenix-2014's hypothesis without glosses: one substitution

CORPUS_COLUMNS = ("id|signer|annotation", "name|speaker|orth")  # Phoenix-2014, -2014-T
FORMATS_BY_SUFFIX = {".csv": "csv", ".stm": "stm", ".ctm": "ctm", ".trn": "trn"}
STANDARD_INPUT = "-"

# Lines of NIST's formats; times are in seconds. A label such as <o,f0,female> may
# precede the glosses of STM: sclite takes a first word that begins with "<" for one.
TIME = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
STM_LINE = re.compile(rf"(\S+) (\S+) \S+ ({TIME}) {TIME}(?: <\S*)?((?: \S+)*)")
STM_EXPECTED = "id channel signer begin end GLOSS ..."
CTM_LINE = re.compile(rf"(\S+) (\S+) ({TIME}) ({TIME}) (\S+)(?: (?:-?{TIME}|NA))?")
CTM_EXPECTED = "id channel start duration GLOSS [confidence]"
TRN_LINE = re.compile(r"(.*)\(([^()\s]+)\)")
TRN_EXPECTED = "GLOSS ... (id)"

# What sclite does not count as a word: alternatives, tags, escapes, the empty word "@".
SCLITE_MARKUP = re.compile(
    r"[{};\\]|^@$|^<ALT(_BEGIN|_END)?>$|IGNORE_TIME_SEGMENT_IN_SCORING", re.IGNORECASE
)
SCLITE_COMMENT = (";", "*")  # sclite misreads ids that begin with one of them
# Zero-width non-joiner and joiner: invisible, but part of the spelling of Persian,
# Sinhala and Hindi.
JOINERS = ("\u200c", "\u200d")


# ------------------------------------------------------------ text, arrays
def normalise(text):
    """Return text in Unicode's normal form NFC, so that equal spellings are equal."""
    return unicodedata.normalize("NFC", text)


def _is_printable(text):
    for joiner in JOINERS:
        text = text.replace(joiner, "")
    return text != "" and text.isprintable()


def _is_field(text):
    """Tell whether text is printable and has no whitespace in or around it."""
    return text.split() == [text] and _is_printable(text)


def _as_array(values, name):
    """Return numpy.asarray(values); what numpy cannot convert is a ValueError."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}: {reason}; expected an array or a CPU tensor without gradient"
        ) from error


def _as_list(values, name):
    """Return the elements of a sequence, an array or a tensor as a list."""
    kind = type(values).__name__
    if hasattr(values, "__array__"):
        values = _as_array(values, name).tolist()
    if isinstance(values, (str, bytes)):  # bytes would be numbers, text characters
        raise ValueError(f"{name}: {kind} {values[:60]!r}, expected a list")
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{name}: {kind}, expected a list") from error


def _as_sentences(sentences, name):
    """Return a list of sentences; a dict, which would give ids, or a set is refused."""
    if isinstance(sentences, (dict, set, frozenset)):
        kind = type(sentences).__name__
        raise ValueError(
            f"{name}: {kind}, expected a list of sentences, such as wer.pair returns"
        )
    return _as_list(sentences, name)


def _as_tokens(values, name="tokens"):
    """Return a sequence's elements, or a string's characters, as a list, in NFC."""
    if isinstance(values, str):
        return list(normalise(values))
    tokens = _as_list(values, name)
    return [normalise(token) if isinstance(token, str) else token for token in tokens]


def _as_glosses(sentence):
    """Return the glosses of a sentence, which is text or a sequence, as a list."""
    if isinstance(sentence, str):
        return normalise(sentence).split()
    return _as_tokens(sentence)


# ------------------------------------------------------------ decoding
def greedy_decode(log_probs, lengths, vocabulary):
    """Decode each frame's best class: repeats are merged, then blanks removed.

    Args:
        log_probs: [B, T', V], an array or a CPU tensor.
        lengths: [B], the valid frames of each sentence.
        vocabulary: V glosses; the first stands for the blank.

    Returns:
        A list of B tuples of glosses.

    Raises:
        ValueError: for shapes that do not belong together, or tensors with gradient.
    """
    sentences, vocabulary = _decoder_input(log_probs, lengths, vocabulary)
    decoded = []
    for frames in sentences:
        path = frames.argmax(axis=1).tolist()  # [T', V] -> [T']
        merged = [best for best, _ in itertools.groupby(path)]
        decoded.append(tuple(vocabulary[k] for k in merged if k != 0))
    return decoded


def beam_decode(log_probs, lengths, vocabulary, beam_width=10, min_log_prob=-5.0):
    """Decode the glosses whose paths have the highest probability together.

    CTC prefix beam search without a language model (Hannun et al. 2014, arXiv
    1408.2873).

    Args:
        log_probs: [B, T', V] in nats, an array or a CPU tensor.
        lengths: [B], the valid frames of each sentence.
        vocabulary: V glosses; the first stands for the blank.
        beam_width: prefixes kept after each frame.
        min_log_prob: nats; a frame's classes below it are not tried, except its best
            (pyctcdecode's token_min_logp).

    Returns:
        A list of B tuples of glosses.

    Raises:
        ValueError: for shapes that do not belong together, tensors with gradient, or
            a beam_width that is not 1, 2, ...
    """
    if not isinstance(beam_width, (int, np.integer)) or beam_width < 1:
        raise ValueError(f"beam_width {beam_width!r}, expected a whole number from 1")
    sentences, vocabulary = _decoder_input(log_probs, lengths, vocabulary)
    decoded = []
    for frames in sentences:
        classes = _prefix_search(frames, beam_width, min_log_prob)
        decoded.append(tuple(vocabulary[k] for k in classes))
    return decoded


def _decoder_input(log_probs, lengths, vocabulary):
    """Return each sentence's valid frames, a list of [T', V], and the vocabulary."""
    log_probs = _as_array(log_probs, "log_probs")
    lengths = _as_array(lengths, "lengths")
    vocabulary = _as_tokens(vocabulary, "vocabulary")
    if log_probs.ndim != 3:
        raise ValueError(f"log_probs {log_probs.shape}, expected the axes [B, T', V]")
    if log_probs.dtype.kind not in "fiu":
        raise ValueError(f"log_probs of type {log_probs.dtype}, expected real numbers")
    batch, steps, classes = log_probs.shape
    if lengths.shape != (batch,):
        raise ValueError(f"lengths {lengths.shape}, expected ({batch},) as log_probs")
    if len(vocabulary) != classes:
        raise ValueError(f"{len(vocabulary)} glosses, expected {classes} as log_probs")
    if batch > 0 and lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths of type {lengths.dtype}, expected whole numbers")
    sentences = []
    for frames, length in zip(log_probs, lengths.tolist(), strict=True):
        if not 0 <= length <= steps:
            raise ValueError(f"length {length}, expected 0 to {steps} as log_probs")
        sentences.append(frames[:length])
    return sentences, vocabulary


def _prefix_search(frames, beam_width, min_log_prob):
    """Return the classes of the best prefix of one sentence's frames, [T', V]."""
    is_tried = frames >= min_log_prob  # [T', V]
    is_tried[np.arange(len(frames)), frames.argmax(axis=1)] = True
    # A prefix begins with class 0. Its value is two log probabilities: of all paths so
    # far that collapse to it and end with a blank, and of those that do and end with
    # its last class.
    beam = {(0,): (0.0, -math.inf)}
    for frame, mask in zip(frames, is_tried, strict=True):
        classes = np.flatnonzero(mask).tolist()
        log_probs = frame[mask].tolist()
        grown = _extend_prefixes(beam, list(zip(classes, log_probs, strict=True)))
        ranked = sorted(grown.items(), key=_negative_log_prob)
        beam = dict(ranked[:beam_width])
    best = next(iter(beam))
    return best[1:]


def _extend_prefixes(beam, classes):
    """Return all prefixes after one more frame; classes: [(class, log probability)]."""
    grown = defaultdict(lambda: [-math.inf, -math.inf])
    for prefix, (ends_blank, ends_label) in beam.items():
        last = prefix[-1]
        total = _log_add(ends_blank, ends_label)
        for k, log_prob in classes:
            if k == 0:
                same = grown[prefix]
                same[0] = _log_add(same[0], total + log_prob)
                continue
            before = total
            if k == last:
                same = grown[prefix]
                same[1] = _log_add(same[1], ends_label + log_prob)
                before = ends_blank  # the class counts again only after a blank
            if before > -math.inf:
                longer = grown[prefix + (k,)]
                longer[1] = _log_add(longer[1], before + log_prob)
    return grown


def _negative_log_prob(item):
    _, (ends_blank, ends_label) = item
    return -_log_add(ends_blank, ends_label)


def _log_add(a, b):
    """Return log(exp(a) + exp(b)); numpy.logaddexp is slower on two floats."""
    low, high = (a, b) if a < b else (b, a)
    if low == -math.inf:
        return high
    return high + math.log1p(math.exp(low - high))


# ------------------------------------------------------------ alignment and scoring
@dataclass(frozen=True)
class WordErrors:
    """Counts over a corpus; hits + substitutions + deletions = reference glosses."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int
    sentences: int
    sentence_errors: int  # sentences with at least one error

    @property
    def reference_glosses(self):
        """Number of glosses in the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self):
        """Number of errors of the three kinds together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self):
        """Errors per reference gloss, a fraction; infinite for insertions alone."""
        if self.reference_glosses > 0:
            return self.errors / self.reference_glosses
        return math.inf if self.errors > 0 else 0.0

    @property
    def ser(self):
        """Sentences with errors per sentence, a fraction."""
        return self.sentence_errors / max(self.sentences, 1)

    def rates(self):
        """Return WER and its parts, in percent of the reference glosses, as text."""
        percent = 100 / max(self.reference_glosses, 1)
        parts = (
            f"S {percent * self.substitutions:4.1f} D {percent * self.deletions:4.1f} "
            f"I {percent * self.insertions:4.1f}"
        )
        return f"{100 * self.wer:6.2f}% ({parts})"

    def __str__(self):
        return (
            f"WER {100 * self.wer:.2f}% ({self.errors} errors in "
            f"{self.reference_glosses} glosses: {self.substitutions} substitutions, "
            f"{self.deletions} deletions, {self.insertions} insertions), "
            f"{100 * self.ser:.1f}% of {self.sentences} sentences wrong"
        )


def _costs(scoring):
    if scoring not in COSTS:
        raise ValueError(f"scoring {scoring!r}: expected {' or '.join(COSTS)}")
    return COSTS[scoring]


def _last_steps(ref, hyp, costs):
    """Return the last step of the cheapest alignment of ref[:i] with hyp[:j], all i, j.

    Wagner & Fischer 1974. At equal cost a pair precedes an insertion and an insertion a
    deletion: so sclite chooses among its cheapest alignments, whose counts can differ.

    Returns:
        Rows for i = 1 ... len(ref), each with PAIR, INSERTION or DELETION for
        j = 0 ... len(hyp). At i = 0 all steps are insertions.
    """
    _, insertion, _ = costs
    row_costs = [j * insertion for j in range(len(hyp) + 1)]  # of ref[:i], i = 0
    next_row = _next_row
    if len(hyp) >= LONG_HYPOTHESIS:
        classes = {token: k for k, token in enumerate(dict.fromkeys(ref + hyp))}
        ref = [classes[token] for token in ref]
        hyp = np.array([classes[token] for token in hyp])
        row_costs = np.array(row_costs)
        next_row = _next_row_in_numpy
    rows = []
    for token in ref:
        row_costs, steps = next_row(row_costs, token, hyp, costs)
        rows.append(steps)
    return rows


def _next_row(above, token, hyp, costs):
    """Return the costs and last steps of ref[:i], given the costs of ref[:i - 1].

    Args:
        above: costs of ref[:i - 1] with hyp[:j], j = 0 ... len(hyp).
        token: ref[i - 1].
        hyp: tokens of the hypothesis.
        costs: of a substitution, an insertion and a deletion.
    """
    substitution, insertion, deletion = costs
    left = above[0] + deletion
    row = [left]
    steps = [DELETION]
    # above is one longer than hyp: its last cell is no diagonal.
    for other, diagonal, up in zip(hyp, above, above[1:], strict=False):
        paired = diagonal if token == other else diagonal + substitution
        inserted = left + insertion
        deleted = up + deletion
        if paired <= inserted and paired <= deleted:
            left = paired
            steps.append(PAIR)
        elif inserted <= deleted:
            left = inserted
            steps.append(INSERTION)
        else:
            left = deleted
            steps.append(DELETION)
        row.append(left)
    return row, steps


def _next_row_in_numpy(above, token, hyp, costs):
    """Return what _next_row returns, as arrays: faster for a long hypothesis.

    Without insertions a row's costs depend on the row above alone. With them, row[j] is
    the minimum over k <= j of row[k] + (j - k) * insertion: a running minimum of
    row[k] - k * insertion. Steps take one byte each.
    """
    substitution, insertion, deletion = costs
    insertions = insertion * np.arange(len(above))
    paired = above[:-1] + np.where(hyp == token, 0, substitution)
    row = above + deletion
    row[1:] = np.minimum(row[1:], paired)
    row = np.minimum.accumulate(row - insertions) + insertions
    steps = np.full(len(row), DELETION, dtype=np.uint8)
    steps[1:][row[1:] == row[:-1] + insertion] = INSERTION
    steps[1:][row[1:] == paired] = PAIR
    return row, steps


def _align(ref, hyp, costs):
    """Return the alignment of two lists of tokens; see align."""
    rows = _last_steps(ref, hyp, costs)
    pairs = []
    i = len(ref)
    j = len(hyp)
    while i > 0 or j > 0:
        step = rows[i - 1][j] if i > 0 else INSERTION
        if step == PAIR:
            i -= 1
            j -= 1
            pairs.append((ref[i], hyp[j]))
        elif step == INSERTION:
            j -= 1
            pairs.append((None, hyp[j]))
        else:
            i -= 1
            pairs.append((ref[i], None))
    pairs.reverse()
    return pairs


def _count(ref, hyp, costs):
    """Return (hits, substitutions, deletions, insertions) of two lists of tokens."""
    pairs = _align(ref, hyp, costs)
    deletions = len(pairs) - len(hyp)
    insertions = len(pairs) - len(ref)
    hits = len([1 for token, other in pairs if token == other])
    return hits, len(ref) - hits - deletions, deletions, insertions


def align(ref, hyp, scoring="levenshtein"):
    """Align two sequences of tokens as they are counted.

    Args:
        ref: hashable tokens, text in any Unicode form; of a string, its characters.
        hyp: likewise.
        scoring: "levenshtein" or "sclite", the costs. Case and final "*", which sclite
            ignores, are compared here; score removes them before.

    Returns:
        A list of (reference token or None, hypothesis token or None), text in NFC.
    """
    return _align(_as_tokens(ref), _as_tokens(hyp), _costs(scoring))


def count_errors(ref, hyp, scoring="levenshtein"):
    """Return (hits, substitutions, deletions, insertions) of align's alignment."""
    return _count(_as_tokens(ref), _as_tokens(hyp), _costs(scoring))


def edit_distance(ref, hyp):
    """Return the Levenshtein distance of two sequences of any hashable tokens.

    Of two strings it is that of their characters.
    """
    _, substitutions, deletions, insertions = count_errors(ref, hyp)
    return substitutions + deletions + insertions


def score(references, hypotheses, scoring="levenshtein"):
    """Count the errors of a corpus.

    Args:
        references: sentences, each a sequence of glosses or one string of glosses
            separated by whitespace.
        hypotheses: as many sentences in the same order.
        scoring: "levenshtein" or "sclite".

    Returns:
        WordErrors.

    Raises:
        ValueError: for unequal numbers of sentences, one string, a dict or a set in
            place of a list of sentences, an unknown scoring or, for sclite, a gloss
            that is its markup.
    """
    costs = _costs(scoring)
    references = _as_sentences(references, "references")
    hypotheses = _as_sentences(hypotheses, "hypotheses")
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(hypotheses)} hypotheses, expected {len(references)} as references"
        )
    counts = []
    for ref, hyp in zip(references, hypotheses, strict=True):
        ref_glosses = _comparable(ref, scoring)
        hyp_glosses = _comparable(hyp, scoring)
        counts.append(_count(ref_glosses, hyp_glosses, costs))
    return WordErrors(
        hits=sum(hits for hits, _, _, _ in counts),
        substitutions=sum(substitutions for _, substitutions, _, _ in counts),
        deletions=sum(deletions for _, _, deletions, _ in counts),
        insertions=sum(insertions for _, _, _, insertions in counts),
        sentences=len(counts),
        sentence_errors=len([1 for sentence in counts if any(sentence[1:])]),
    )


def _comparable(sentence, scoring):
    """Return the list of a sentence's glosses as scoring compares them."""
    glosses = _as_glosses(sentence)
    if scoring == "sclite":
        return [_sclite_word(gloss) for gloss in glosses]
    return glosses


@lru_cache(maxsize=10_000)
def _sclite_word(gloss):
    """Return a gloss as sclite compares it: ASCII lower case, without one final "*"."""
    if not isinstance(gloss, str):
        return gloss
    if SCLITE_MARKUP.search(gloss):
        raise ValueError(f"{gloss!r} is markup for sclite, expected glosses")
    word = "".join(c.lower() if c.isascii() else c for c in gloss)
    if len(word) > 1:
        return word.removesuffix("*")
    return word


def sclite_markup(glosses):
    """List the glosses that sclite takes for markup, each once, in their order.

    Such glosses can be learned and counted here ("levenshtein"), but not written for
    sclite or counted as it counts.
    """
    distinct = dict.fromkeys(_as_glosses(glosses))
    words = [gloss for gloss in distinct if isinstance(gloss, str)]
    return [word for word in words if SCLITE_MARKUP.search(word)]


def constant_answer(references):
    """Find the best constant answer: one gloss, or none, as every hypothesis.

    A network whose WER is near it has learned nothing from the features.

    Args:
        references: sentences as in score.

    Returns:
        (WER, gloss); the gloss is "" where no gloss is better than an empty answer.
    """
    sentences = [
        _as_glosses(sentence) for sentence in _as_sentences(references, "references")
    ]
    sentences_with = Counter()
    for glosses in sentences:
        sentences_with.update(set(glosses))
    if not sentences_with:
        return 1.0, ""
    # Of equally frequent glosses the first in the order of the alphabet.
    gloss = max(sorted(sentences_with), key=sentences_with.get)
    empty = len([1 for glosses in sentences if not glosses])
    # Each sentence that has the gloss has one deletion less than with the empty answer,
    # each empty sentence one insertion more.
    gain = sentences_with[gloss] - empty
    if gain <= 0:
        return 1.0, ""
    reference_glosses = sum(len(glosses) for glosses in sentences)
    return 1 - gain / reference_glosses, gloss


# ------------------------------------------------------------ Phoenix-2014's clean-up
# The official evaluation's rules in its order: pattern, replacement. Those with spaces
# are for whole annotations; a hypothesis is cleaned gloss by gloss.
JOIN_LETTERS = [("([ +][A-Z]) ([A-Z][ +])", r"\1+\2")]  # fingerspelling: A B -> A+B
MERGE_REPEATS = [(r"(?<![\w-])(\b[A-Z]+(?![\w-])) \1(?![\w-])", r"\1")]
PHOENIX_RULES = [
    ("loc-", ""),
    ("cl-", ""),
    ("qu-", ""),
    ("poss-", ""),
    ("lh-", ""),
    ("S0NNE", "SONNE"),
    ("HABEN2", "HABEN"),
    ("__EMOTION__", ""),
    ("__PU__", ""),
    ("__LEFTHAND__", ""),
    ("WIE AUSSEHEN", "WIE-AUSSEHEN"),
    ("ZEIGEN ", "ZEIGEN-BILDSCHIRM "),
    ("ZEIGEN$", "ZEIGEN-BILDSCHIRM"),
    ("[ +]([A-Z]) ([A-Z]) ", r" \1+\2 "),
]
PHOENIX_RULES += JOIN_LETTERS * 3
PHOENIX_RULES += [
    ("([ +]SCH) ([A-Z][ +])", r"\1+\2"),
    ("([ +]NN) ([A-Z][ +])", r"\1+\2"),
    ("([ +][A-Z]) (NN[ +])", r"\1+\2"),
    ("([ +][A-Z]) ([A-Z])$", r"\1+\2"),
    ("([A-Z][A-Z])RAUM", r"\1"),
    ("-PLUSPLUS", ""),
]
PHOENIX_RULES += MERGE_REPEATS * 4
# A train sentence of Phoenix-2014 whose video is damaged.
PHOENIX_CORRUPT_IDS = {"13April_2011_Wednesday_tagesschau_default-14"}
PHOENIX_DROPPED = re.compile("__LEFTHAND__|__EPENTHESIS__|__EMOTION__")


def clean_phoenix_annotation(text):
    """Return the glosses, a tuple, of a raw train annotation.

    Nothing is cleaned in the annotations of dev and test.
    """
    text = " " + normalise(text)
    for pattern, replacement in PHOENIX_RULES:
        text = re.sub(pattern, replacement, text, flags=re.ASCII)
    return tuple(gloss for gloss in text.split() if not PHOENIX_DROPPED.search(gloss))


def clean_phoenix(glosses):
    """Return the glosses of a cleaned hypothesis, a tuple; (EMPTY,) for none."""
    cleaned = []
    for gloss in _as_glosses(glosses):
        cleaned.extend(clean_phoenix_annotation(gloss))
    if not cleaned:
        return (EMPTY,)
    return tuple(cleaned)


# ------------------------------------------------------------ corpus files
class Annotation(NamedTuple):
    """One sentence of a corpus file."""

    id: str
    signer: str
    glosses: tuple


def read_annotations(path):
    """Read a corpus file: UTF-8, Phoenix-2014's or -2014-T's columns, separated by |.

    Quotes are read as the csv module reads them if a field of the header begins with
    one, if any field is quoted and holds a doubled quote, if a column is quoted in
    every row of two or more, or if only then every line has the header's columns. In
    all other files a quote is a character like any other.

    Args:
        path: of the file, or "-" for standard input.

    Returns:
        A list of Annotation.

    Raises:
        ValueError: with one line per error: "path:line: found, expected".
    """
    records = _corpus_records(path, _read_text(path))
    where, header = records[0]
    indices = _column_indices(where, header)
    annotations = {}
    errors = []
    for where, row in records[1:]:
        if row in ([], [""]):  # an empty line
            continue
        try:
            if len(row) != len(header):
                raise ValueError(f"{where}: {len(row)} columns, expected {len(header)}")
            name, signer, text = [row[k] for k in indices]
            annotation = check_annotation(where, name, signer, text)
            if annotation.id in annotations:
                raise ValueError(
                    f"{where}: id {annotation.id} again, expected each id once"
                )
            annotations[annotation.id] = annotation
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n  ".join(errors))
    if not annotations:
        raise ValueError(f"{path}: no sentences, expected one per line")
    return list(annotations.values())


def _column_indices(where, header):
    """Return the indices of the columns id, signer and glosses."""
    for columns in CORPUS_COLUMNS:
        names = columns.split("|")
        if set(names) <= set(header):
            return [header.index(name) for name in names]
    found = "|".join(header)[:100]
    raise ValueError(
        f"{where}: columns {found!r}, expected {' or '.join(CORPUS_COLUMNS)} among "
        "them, separated by |"
    )


def check_annotation(where, name, signer, text):
    """Return the Annotation of a line's fields.

    Args:
        where: file and line, with which an error begins.
        name: the id.
        signer: who signs.
        text: the glosses, separated by whitespace.

    Raises:
        ValueError: an id that is no plain file name or begins a comment of NIST's
            formats, or no glosses.
    """
    # The id names the feature file, so it must not lead out of the features' folder;
    # NIST's formats separate it by whitespace.
    is_file_name = name not in (".", "..") and "/" not in name and "\\" not in name
    if not is_file_name or not _is_field(name):
        raise ValueError(
            f"{where}: id {name!r}, expected a plain file name without whitespace"
        )
    if name.startswith(SCLITE_COMMENT):
        raise ValueError(
            f"{where}: id {name!r}, expected no ; or * at its start, where sclite "
            "reads a comment"
        )
    glosses = _split(text, where)
    if not glosses:
        raise ValueError(f"{where}: {name} has an empty annotation, expected glosses")
    return Annotation(name, signer, glosses)


def _corpus_records(path, text):
    """Return [("path:line", fields)] of a corpus file; quotes: see read_annotations."""
    lines = text.removesuffix("\n").split("\n")
    plain = [(f"{path}:{k}", line.split("|")) for k, line in enumerate(lines, 1)]
    if '"' not in text:
        return plain
    for where, row in plain:
        is_header = where == plain[0][0]
        for field in row:
            if _holds_doubled_quote(field) or (is_header and field.startswith('"')):
                return _quoted_records(path, text)
    if _columns_fit(plain) and not _has_quoted_column(plain):
        return plain
    try:
        quoted = _quoted_records(path, text)
    except ValueError:
        return plain
    return quoted if _columns_fit(quoted) else plain


def _holds_doubled_quote(field):
    """Tell whether a field is quoted and holds quotes, all doubled: "a ""b"" c"."""
    inner = field[1:-1]
    return _is_quoted(field) and '""' in inner and '"' not in inner.replace('""', "")


def _is_quoted(field):
    return len(field) > 1 and field.startswith('"') and field.endswith('"')


def _has_quoted_column(records):
    """Tell whether a column is quoted in every row, of two rows or more."""
    rows = [row for _, row in records[1:] if row != [""]]
    for column in zip(*rows, strict=True):
        if len(column) > 1 and all(_is_quoted(field) for field in column):
            return True
    return False


def _columns_fit(records):
    """Tell whether all lines that are not empty have as many fields as the first."""
    columns = len(records[0][1])
    return all(len(row) == columns for _, row in records if row not in ([], [""]))


def _quoted_records(path, text):
    """Return [("path:line", fields)] of a quoted file; a record's first line."""
    reader = csv.reader(io.StringIO(text), delimiter="|", strict=True)
    records = []
    line = 1
    try:
        for row in reader:
            records.append((f"{path}:{line}", row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{line}: {error}, expected quotes as the csv module writes them"
        ) from error
    return records


# ------------------------------------------------------------ references and hypotheses
def _read_text(path):
    """Return the text of a file, or of standard input for "-", in NFC."""
    try:
        if str(path) == STANDARD_INPUT:
            if sys.stdin is None:
                raise ValueError("-: standard input is closed, expected UTF-8 text")
            content = sys.stdin.buffer.read()
        else:
            content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}, expected UTF-8 text") from error
    return normalise(text.replace("\r\n", "\n").replace("\r", "\n"))


def _split(text, where):
    """Return the glosses, a tuple, that whitespace separates in text."""
    glosses = tuple(text.split())
    for gloss in glosses:
        if not _is_printable(gloss):
            raise ValueError(f"{where}: {gloss[:60]!r}, expected printable characters")
    return glosses


def _refuse_markup(glosses, where):
    markup = " ".join(sclite_markup(glosses))
    if markup:
        raise ValueError(f"{where}: {markup!r} is markup for sclite, expected glosses")


def _match(pattern, expected, where, line):
    """Return the groups of a NIST line whose fields are separated by single blanks."""
    match = pattern.fullmatch(" ".join(_split(line, where)))
    if match is None:
        raise ValueError(f"{where}: {line[:100]!r}, expected {expected}")
    return match.groups()


def _is_comment(line):
    """Tell whether sclite ignores a line: it is empty or begins with ;; or **."""
    return line.strip() == "" or line.strip().startswith((";;", "**"))


# Each reader takes [("path:line", line)] and returns {(id, channel): tuple of glosses}.
# The channel is "" in formats without channels.


def _read_stm(lines):
    sentences = {}
    for where, line in lines:
        if _is_comment(line):
            continue
        name, channel, start, text = _match(STM_LINE, STM_EXPECTED, where, line)
        if (name, channel) in sentences:
            again = f"{where}: id {name} again, at {float(start):g} s"
            raise ValueError(f"{again}, expected one line per id and channel")
        glosses = tuple(text.split())
        _refuse_markup(glosses, where)
        sentences[name, channel] = glosses
    return sentences


def _read_ctm(lines):
    words = {}  # (id, channel) -> [("path:line", start, duration, gloss)]
    last_key = None
    for where, line in lines:
        if _is_comment(line):
            continue
        name, channel, start, duration, gloss = _match(
            CTM_LINE, CTM_EXPECTED, where, line
        )
        _refuse_markup([gloss], where)
        key = (name, channel)
        if key in words and key != last_key:
            again = f"{where}: id {name} again, at {float(start):g} s"
            raise ValueError(f"{again}, expected its lines together, as sclite does")
        words.setdefault(key, []).append((where, float(start), duration, gloss))
        last_key = key
    sentences = {}
    for (name, channel), lines_of_key in words.items():
        _refuse_disorder(name, lines_of_key)
        sentences[name, channel] = tuple(gloss for _, _, _, gloss in lines_of_key)
    return sentences


def _refuse_disorder(name, words):
    """Refuse falling starts and repeated lines, as of a file appended to itself."""
    last_start = 0.0
    seen = set()
    for where, start, duration, gloss in words:
        again = f"{where}: id {name} again, at {start:g} s"
        if start < last_start:
            raise ValueError(f"{again}, expected a start after {last_start:g} s")
        if (start, duration, gloss) in seen:
            raise ValueError(f"{again}, expected each line once")
        seen.add((start, duration, gloss))
        last_start = start


def _read_trn(lines):
    sentences = {}
    for where, line in lines:
        if _is_comment(line):
            continue
        text, name = _match(TRN_LINE, TRN_EXPECTED, where, line)
        glosses = tuple(text.split())
        _refuse_markup(glosses, where)
        if (name, "") in sentences:
            raise ValueError(f"{where}: id {name} again, expected one line per id")
        sentences[name, ""] = glosses
    return sentences


def _read_kaldi(lines):
    sentences = {}
    for where, line in lines:
        fields = _split(line, where)
        if not fields:
            continue
        name = fields[0]
        if (name, "") in sentences:
            raise ValueError(f"{where}: id {name} again, expected one line per id")
        sentences[name, ""] = fields[1:]
    return sentences


def _read_plain(lines):
    sentences = {}
    for number, (where, line) in enumerate(lines, 1):
        sentences[number, ""] = _split(line, where)
    return sentences


READERS = {
    "stm": (_read_stm, STM_EXPECTED),
    "ctm": (_read_ctm, CTM_EXPECTED),
    "trn": (_read_trn, TRN_EXPECTED),
    "kaldi": (_read_kaldi, "id GLOSS ..."),
    "text": (_read_plain, "GLOSS ..."),
}
FILE_FORMATS = ("auto", "csv") + tuple(READERS)


def _likely_format(lines):
    """Return "csv", "stm", "ctm" or "trn" if plain text looks like it, else None."""
    header = lines[0].split("|")
    for columns in CORPUS_COLUMNS:
        if set(columns.split("|")) <= set(header):
            return "csv"
    patterns = {"stm": STM_LINE, "ctm": CTM_LINE, "trn": re.compile(r"(.* )?\(\S+\)")}
    content = [" ".join(line.split()) for line in lines if not _is_comment(line)]
    for name, pattern in patterns.items():
        if content and all(pattern.fullmatch(line) for line in content):
            return name
    return None


def _read_channels(path, file_format):
    """Return {(id, channel): tuple of glosses} of a file; see read_sentences."""
    if file_format not in FILE_FORMATS:
        raise ValueError(f"format {file_format!r}, expected {', '.join(FILE_FORMATS)}")
    suffix = Path(path).suffix.lower()
    file_format = FORMATS_BY_SUFFIX.get(suffix, file_format)
    if file_format == "csv":
        return {
            (sentence.id, ""): sentence.glosses for sentence in read_annotations(path)
        }
    text = _read_text(path)
    lines = text.removesuffix("\n").split("\n")
    if file_format == "auto":
        likely = _likely_format(lines)
        if likely is not None:
            raise ValueError(
                f"{path}: looks like {likely.upper()}, expected plain text: name it "
                f"*.{likely} or say --format {likely} (or --format text)"
            )
        file_format = "text"
    read, expected = READERS[file_format]
    located = [(f"{path}:{k}", line) for k, line in enumerate(lines, 1)]
    sentences = read(located) if text else {}
    if not sentences:
        raise ValueError(f"{path}: no sentences, expected lines of {expected}")
    return sentences


def read_sentences(path, file_format="auto"):
    """Read the sentences of a file in one of FILE_FORMATS.

    STM, CTM: see STM_EXPECTED, CTM_EXPECTED; channels of one id are different speakers.
    Plain text: a sentence, which may be empty, per line.

    Args:
        path: of the file, or "-" for standard input.
        file_format: of files whose suffix is not in FORMATS_BY_SUFFIX; "auto" is plain
            text, unless it looks like another format.

    Returns:
        {id: tuple of glosses}; the id is the line's number, an int, in plain text, and
        "id channel" for an id with several channels.

    Raises:
        ValueError: "path:line: found, expected".
    """
    sentences = _read_channels(path, file_format)
    names = _names(sentences)
    return {names[key]: glosses for key, glosses in sentences.items()}


def _names(keys):
    """Return {(id, channel): id, or "id channel" if the id has several channels}."""
    channels = Counter(name for name, _ in keys)
    names = {}
    for name, channel in keys:
        names[name, channel] = f"{name} {channel}" if channels[name] > 1 else name
    return names


def pair(reference, hypothesis, file_format="auto"):
    """Read two files and pair their sentences by id, in plain text by line.

    Like sclite, pair by id and channel where both files have channels.

    Args:
        reference: path of the correct sentences; one of the two may be "-".
        hypothesis: path of the recognised sentences.
        file_format: as in read_sentences.

    Returns:
        (ids, references, hypotheses, ids without hypothesis), in the reference's order;
        a hypothesis that is missing is empty.

    Raises:
        ValueError: for broken files, a hypothesis without reference, plain texts of
            unequal length or, for "auto", that look like Kaldi's, and two files without
            a gloss.
    """
    if str(reference) == STANDARD_INPUT and str(hypothesis) == STANDARD_INPUT:
        raise ValueError("-: both files are standard input, expected at most one")
    refs = _read_channels(reference, file_format)
    hyps = _read_channels(hypothesis, file_format)
    if not _has_channels(refs) or not _has_channels(hyps):
        refs = _without_channels(refs, reference)
        hyps = _without_channels(hyps, hypothesis)
    if _is_plain(refs) and _is_plain(hyps):
        if len(refs) != len(hyps):
            lines = f"{len(hyps)} lines, expected {len(refs)} as {reference} has"
            raise ValueError(f"{hypothesis}: {lines}")
        if file_format == "auto":
            _refuse_kaldi(reference, list(refs.values()), list(hyps.values()))
    names = _names(refs | hyps)
    unknown = [str(names[key]) for key in hyps if key not in refs]
    if unknown:
        found = f"{len(unknown)} ids that {reference} does not have"
        lower_case = {str(names[key]).lower() for key in refs}
        if lower_case.issuperset(name.lower() for name in unknown):
            found += " (they differ in case only)"
        raise ValueError(
            f"{hypothesis}: {found}, expected none: {' '.join(unknown[:5])}"
        )
    if not any(refs.values()) and not any(hyps.values()):
        raise ValueError(f"{reference}: no glosses, nor in {hypothesis}, expected some")
    ids = [names[key] for key in refs]
    missing = [names[key] for key in refs if key not in hyps]
    hypotheses = [hyps.get(key, ()) for key in refs]
    return ids, list(refs.values()), hypotheses, missing


def _is_plain(sentences):
    """Tell whether a file is plain text, whose ids are the numbers of lines."""
    return all(isinstance(name, int) for name, _ in sentences)


def _refuse_kaldi(path, references, hypotheses):
    """Refuse plain texts whose lines seem to begin with ids, as Kaldi's do.

    They do if the first words of two lines or more are distinct, are the same in both
    files, and are in another order or hold a digit each. Files with an empty line or
    with one word in every line are plain text.
    """
    lengths = {len(glosses) for glosses in references + hypotheses}
    if len(references) < 2 or 0 in lengths or lengths == {1}:
        return
    ref_ids = [glosses[0] for glosses in references]
    hyp_ids = [glosses[0] for glosses in hypotheses]
    are_distinct = len(set(ref_ids)) == len(ref_ids)
    are_same = sorted(ref_ids) == sorted(hyp_ids)
    have_digits = all(re.search(r"\d", name) for name in ref_ids)
    if are_distinct and are_same and (ref_ids != hyp_ids or have_digits):
        raise ValueError(
            f"{path}: looks like KALDI, expected plain text: say --format kaldi (or "
            "--format text)"
        )


def _has_channels(sentences):
    return any(channel != "" for _, channel in sentences)


def _without_channels(sentences, path):
    """Return {(id, ""): glosses}, for a file beside one that has no channels."""
    result = {}
    for (name, _), glosses in sentences.items():
        if (name, "") in result:
            raise ValueError(
                f"{path}: id {name} has several channels, expected one, as the other "
                "file has no channels"
            )
        result[name, ""] = glosses
    return result


def ctm_text(ids, hypotheses):
    """Return hypotheses as the text of a CTM file, which wer.py and sclite read.

    Start times, 0.01 s apart, stand for the order alone. A hypothesis without glosses
    is one line with EMPTY.

    Args:
        ids: of the sentences, without whitespace, each once.
        hypotheses: as many sentences, as in score.

    Returns:
        Lines "id 1 start 0.01 gloss".

    Raises:
        ValueError: for ids and glosses that CTM cannot hold, which it names.
    """
    ids = [normalise(str(name)) for name in _as_sentences(ids, "ids")]
    hypotheses = _as_sentences(hypotheses, "hypotheses")
    if len(ids) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses, expected {len(ids)} as ids")
    lines = []
    for name, hypothesis in zip(ids, hypotheses, strict=True):
        glosses = _as_glosses(hypothesis)
        if not glosses:
            glosses = [EMPTY]
        _refuse_unwritable(name, glosses)
        for k, gloss in enumerate(glosses):
            lines.append(f"{name} 1 {k / 100:.2f} 0.01 {gloss}\n")
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"id {repeated[0]!r} again, expected each id once")
    return "".join(lines)


def _refuse_unwritable(name, glosses):
    """Raise ValueError for what would not be one field of a CTM line."""
    if not _is_field(name) or name.startswith(SCLITE_COMMENT):
        raise ValueError(
            f"id {name!r}, expected printable characters, no whitespace, and no ; or * "
            "at its start, where sclite reads a comment"
        )
    for gloss in glosses:
        if not _is_field(gloss):
            raise ValueError(
                f"{name}: gloss {gloss!r}, expected printable characters, no whitespace"
            )
    _refuse_markup(glosses, name)


# ------------------------------------------------------------ the program
def print_alignments(names, references, hypotheses, scoring):
    """Print each sentence's alignment, one pair of glosses per line, and confusions."""
    costs = _costs(scoring)
    confusions = Counter()
    for name, ref, hyp in zip(names, references, hypotheses, strict=True):
        print(name)
        pairs = _align(_comparable(ref, scoring), _comparable(hyp, scoring), costs)
        for ref_gloss, hyp_gloss in pairs:
            if ref_gloss is None:
                mark = "I"
            elif hyp_gloss is None:
                mark = "D"
            elif ref_gloss == hyp_gloss:
                mark = " "
            else:
                mark = "S"
                confusions[ref_gloss, hyp_gloss] += 1
            print(f"  {mark} {ref_gloss or '*':<24} {hyp_gloss or '*'}")
    print("Most confused (reference -> hypothesis)")
    for (ref_gloss, hyp_gloss), times in confusions.most_common(10):
        print(f"  {times:>5}  {ref_gloss} -> {hyp_gloss}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """End the program with one line, without the usage."""
        self.exit(2, f"wer.py: {message}\n")


def _parse(argv):
    parser = _Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "reference", help="the correct sentences: .csv, .stm, .ctm, .trn, plain text, -"
    )
    add(
        "hypothesis", help="the recognised sentences, likewise; those missing are empty"
    )
    add(
        "--scoring",
        choices=COSTS,
        default="levenshtein",
        help="see above (default: %(default)s)",
    )
    add(
        "--format",
        choices=FILE_FORMATS,
        default="auto",
        help="of files with another suffix than .csv, .stm, .ctm and .trn (default: "
        "plain text, refused where it looks like another format)",
    )
    add(
        "--clean",
        choices=("phoenix",),
        help="clean the hypothesis as Phoenix-2014's scripts do",
    )
    add("--show", action="store_true", help="print alignments and confusions")
    add(
        "--json",
        action="store_true",
        help="one JSON object on stdout, all else on stderr",
    )
    return parser, parser.parse_args(argv)


def main(argv=None):
    """Run the program; argv as in sys.argv[1:]."""
    parser, args = _parse(argv)
    try:
        names, references, hypotheses, missing = pair(
            args.reference, args.hypothesis, args.format
        )
        if args.clean is not None:
            hypotheses = [clean_phoenix(glosses) for glosses in hypotheses]
        errors = score(references, hypotheses, args.scoring)
    except ValueError as error:
        parser.error(error)
    report = sys.stderr if args.json else sys.stdout
    with contextlib.redirect_stdout(report):
        if args.show:
            print_alignments(names, references, hypotheses, args.scoring)
        if missing:
            listed = " ".join(str(name) for name in missing)
            count = len(missing)
            print(f"{count} sentences have no hypothesis, scored as empty: {listed}")
        print(errors, flush=True)
    if args.json:
        result = asdict(errors)
        result["wer"] = None if errors.wer == math.inf else errors.wer
        result["ser"] = errors.ser
        result["missing"] = missing
        result["scoring"] = args.scoring
        result["clean"] = args.clean
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.stdout is not None:
        # For terminals without umlauts.
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    try:
        main()
    except OSError as error:  # of output, such as a full disk
        sys.stdout = None  # or it would be written again at exit
        sys.exit(f"wer.py: cannot write: {error.strerror}")
