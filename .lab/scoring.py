"""Compare wer.py's scoring with sclite's counts and jiwer's speed.

    $ apt-get install sctk
    $ python .lab/scoring.py agree --sets 3000
    $ python .lab/scoring.py table
    $ pip install jiwer==4.0.0
    $ OMP_NUM_THREADS=1 python .lab/scoring.py time

"agree" draws sets of sentences, writes them as STM and CTM or as TRN, and compares the
counts of each sentence. "table" prints sclite's counts for the tables of the tests.
"""

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import wer  # noqa: E402

SCLITE = "/usr/lib/sctk/bin/sclite"
COUNTS = r"Scores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)"
FILE_REPORT = re.compile(rf"File: (\S+)\nChannel: (\S+)\n(?:.*\n)*?{COUNTS}")
TRN_REPORT = re.compile(rf"id: \((\S+)\)\n{COUNTS}")
SENTENCES = 40  # per set


# ------------------------------------------------------------------------------- sclite
def sclite(reference, hypothesis):
    """Return {(id, channel): (hits, substitutions, deletions, insertions)} by sclite.

    Args:
        reference: path of a .stm or .trn file.
        hypothesis: path of a .ctm file, for a .stm reference, or a .trn file.
    """
    formats = reference.suffix[1:], hypothesis.suffix[1:]
    command = [SCLITE, "-r", reference, formats[0], "-h", hypothesis, formats[1]]
    if formats[0] == "trn":
        command += ["-i", "rm"]
    command += ["-o", "pralign", "stdout"]
    run = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace"
    )
    if run.returncode != 0 or "Error" in run.stderr:
        raise RuntimeError(f"sclite, status {run.returncode}: {run.stderr}")
    result = {}
    if formats[0] == "trn":
        for name, *counts in TRN_REPORT.findall(run.stdout):
            result[name, ""] = tuple(int(count) for count in counts)
    else:
        for name, channel, *counts in FILE_REPORT.findall(run.stdout):
            result[name, channel] = tuple(int(count) for count in counts)
    return result


def write_stm(path, sentences):
    """Write {(id, channel): glosses} as STM."""
    lines = []
    for (name, channel), glosses in sentences.items():
        lines.append(f"{name} {channel} signer 0.0 1.79769e+308 {' '.join(glosses)}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_ctm(path, sentences):
    """Write {(id, channel): glosses} as CTM."""
    lines = []
    for (name, channel), glosses in sentences.items():
        for k, gloss in enumerate(glosses):
            lines.append(f"{name} {channel} {k / 100:.2f} 0.01 {gloss}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_trn(path, sentences):
    """Write {(id, ""): glosses} as TRN."""
    lines = []
    for (name, _), glosses in sentences.items():
        while glosses and glosses[0].startswith("**"):  # the line would be a comment
            glosses.pop(0)
        words = [*glosses, f"({name})"]
        lines.append(" ".join(words) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------- agree
def draw_glosses(rng):
    """Return a set's glosses, few or many; some with *, parentheses, < and -."""
    glosses = []
    for k in range(rng.choice((1, 2, 2, 3, 3, 4, 6, 10, 30, 1000))):
        word = rng.choice(("G", "g", "Gl", "__X", "Ü")) + str(k)
        form = rng.choice(("{}",) * 12 + ("({})", "G({})", "<{}>", "-{}", "{}-", "*{}"))
        glosses.append(form.format(word))
    if rng.random() < 0.2:
        glosses.append(rng.choice(("*", "**", "()", "(", "-", wer.EMPTY)))
    return glosses


def draw_variant(rng, gloss):
    """Return a gloss in a form that sclite may or may not take for the same word."""
    star = rng.choice(("", "", "", "", "*", "**"))
    return rng.choice((gloss, gloss, gloss.upper(), gloss.lower())) + star


def draw_hypothesis(rng, reference, glosses):
    """Return a noisy recognition of a sentence."""
    noise = rng.random()
    hypothesis = []
    for gloss in reference:
        drawn = rng.random()
        if drawn > 2 * noise / 3:
            hypothesis.append(draw_variant(rng, gloss))
        elif drawn > noise / 3:
            hypothesis.append(rng.choice(glosses))
        while rng.random() < noise / 4:
            hypothesis.append(rng.choice(hypothesis or glosses))
    return hypothesis


def draw_set(rng):
    """Return references and hypotheses as lists: few or many glosses, some empty."""
    glosses = draw_glosses(rng)
    longest = 400 if rng.random() < 0.02 else rng.choice((3, 6, 10, 10, 20, 60))
    references = []
    hypotheses = []
    for _ in range(SENTENCES):
        length = rng.randint(rng.random() > 0.1, longest)
        reference = [draw_variant(rng, rng.choice(glosses)) for _ in range(length)]
        kind = rng.random()
        if kind < 0.02:
            hypothesis = []
        elif kind < 0.04:
            hypothesis = [wer.EMPTY]
        elif kind < 0.2:
            hypothesis = [rng.choice(glosses) for _ in range(rng.randint(0, longest))]
        else:
            hypothesis = draw_hypothesis(rng, reference, glosses)
        references.append(reference)
        hypotheses.append(hypothesis)
    hypotheses[0] = hypotheses[0] or glosses[:1]  # a CTM file without lines is refused
    return references, hypotheses


def write_set(rng, folder, references, hypotheses):
    """Write a set as TRN in any order, or as STM and CTM with one or two channels."""
    if rng.random() < 0.3:
        keys = [(f"s-{k:06d}", "") for k in range(SENTENCES)]
        pairs = list(zip(keys, hypotheses, strict=True))
        rng.shuffle(pairs)
        refs = dict(zip(keys, references, strict=True))
        return (
            write_trn(folder / "ref.trn", refs),
            write_trn(folder / "hyp.trn", dict(pairs)),
        )
    channels = rng.choice((1, 2))
    keys = [(f"s{k // channels:06d}", f"{k % channels + 1}") for k in range(SENTENCES)]
    refs = dict(zip(keys, references, strict=True))
    hyps = dict(zip(keys, hypotheses, strict=True))
    return write_stm(folder / "ref.stm", refs), write_ctm(folder / "hyp.ctm", hyps)


def our_counts(reference, hypothesis):
    """Return what sclite returns, as wer.py counts."""
    names, references, hypotheses, _ = wer.pair(reference, hypothesis)
    result = {}
    for name, ref, hyp in zip(names, references, hypotheses, strict=True):
        errors = wer.score([ref], [hyp], "sclite")
        sentence, _, channel = name.partition(" ")
        if reference.suffix == ".stm" and channel == "":
            channel = "1"
        result[sentence, channel] = (
            errors.hits,
            errors.substitutions,
            errors.deletions,
            errors.insertions,
        )
    return result


def agree(sets, seed):
    """Compare sentence by sentence and print how many differ."""
    rng = random.Random(seed)
    sentences = 0
    differences = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(sets):
            paths = write_set(rng, Path(folder), *draw_set(rng))
            theirs = sclite(*paths)
            ours = our_counts(*paths)
            for key in set(theirs) | set(ours):
                sentences += 1
                expected = theirs.get(key)
                found = ours.get(key)
                if found != expected:
                    differences += 1
                    print(f"{paths[0].name} {key}: sclite {expected}, wer.py {found}")
    print(
        f"{sets} sets, {sentences} sentences: {differences} have other counts than "
        "sclite's"
    )


# -------------------------------------------------------------------------------- table
def count_sentences(folder, references, hypotheses):
    """Return sclite's counts of each sentence, a list."""
    keys = [(f"s{k:06d}", "1") for k in range(len(references))]
    refs = dict(zip(keys, references, strict=True))
    hyps = dict(zip(keys, hypotheses, strict=True))
    stm = write_stm(folder / "ref.stm", refs)
    ctm = write_ctm(folder / "hyp.ctm", hyps)
    return list(sclite(stm, ctm).values())


def total(counts):
    """Return the sums of hits, substitutions, deletions, insertions."""
    return tuple(sum(column) for column in zip(*counts, strict=True))


def table():
    """Print the rows of the tests' tables with sclite's counts."""
    import test_all

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [row.split() for row in test_all.SCLITE.split(";")]
        references = [row[0].strip("-") for row in rows]
        hypotheses = [row[1].strip("-") for row in rows]
        counts = count_sentences(folder, references, hypotheses)
        for row, found in zip(rows, counts, strict=True):
            print(f"    {row[0]} {row[1]} {' '.join(str(count) for count in found)};")
        print(
            "SCLITE_DRAWN =", total(count_sentences(folder, *test_all.drawn_corpus()))
        )
        for reference, hypothesis, _ in test_all.SCLITE_SENTENCES:
            words = [reference.split()], [hypothesis.split()]
            (found,) = count_sentences(folder, *words)
            print(f"    {(reference, hypothesis, found)},")
        for reference, hypothesis, suffixes, _ in test_all.SCLITE_FILES:
            paths = folder / f"ref{suffixes[0]}", folder / f"hyp{suffixes[1]}"
            paths[0].write_text(reference, encoding="utf-8")
            paths[1].write_text(hypothesis, encoding="utf-8")
            found = total(sclite(*paths).values())
            print(f"    {(reference, hypothesis, suffixes, found)},")


# --------------------------------------------------------------------------------- time
def phoenix_sized(rng, sentences=540, words=1100, noise=0.22):
    """Return lines of about 10 glosses and a recognition of them at about 21% WER."""
    glosses = [f"GLOSS{k}" for k in range(words)]
    weights = [1 / (k + 2) for k in range(words)]
    references = []
    hypotheses = []
    for _ in range(sentences):
        length = max(1, round(rng.gauss(10.3, 3.5)))
        reference = rng.choices(glosses, weights, k=length)
        hypothesis = []
        for gloss in reference:
            drawn = rng.random()
            if drawn >= 0.75 * noise:
                hypothesis.append(gloss)
            elif drawn >= 0.4 * noise:
                hypothesis += rng.choices(glosses, weights)
            if rng.random() < 0.25 * noise:
                hypothesis += rng.choices(glosses, weights)
        references.append(" ".join(reference))
        hypotheses.append(" ".join(hypothesis))
    return references, hypotheses


def edit_distances(references, hypotheses):
    """Compute the edit distance of each pair of lines."""
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wer.edit_distance(reference.split(), hypothesis.split())


def timings(repeats):
    """Print each scorer's median time, taken in turns, and its ratio to jiwer's."""
    import jiwer

    references, hypotheses = phoenix_sized(random.Random(0))
    runs = {
        "jiwer.process_words": (jiwer.process_words, ()),
        "wer.score": (wer.score, ()),
        "wer.score, sclite": (wer.score, ("sclite",)),
        "wer.edit_distance": (edit_distances, ()),
    }
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (function, more) in runs.items():
            start = time.perf_counter()
            function(references, hypotheses, *more)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["jiwer.process_words"])
    glosses = sum(len(line.split()) for line in references)
    percent = 100 * wer.score(references, hypotheses).wer
    print(
        f"{len(references)} sentences, {glosses} reference glosses, "
        f"WER {percent:.1f}%, medians of {repeats}"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:<20} {1000 * median:6.2f} ms  {median / base:5.2f} of jiwer")


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("agree", "table", "time"))
    parser.add_argument("--sets", type=int, default=3000, help="of 40 sentences")
    parser.add_argument("--seed", type=int, default=0, help="of the random sets")
    parser.add_argument("--repeats", type=int, default=31, help="for time")
    args = parser.parse_args()
    if args.what == "agree":
        agree(args.sets, args.seed)
    elif args.what == "table":
        table()
    else:
        timings(args.repeats)


if __name__ == "__main__":
    main()
