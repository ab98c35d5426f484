"""wer.py's scoring beside the tools it stands for: sclite's counts, jiwer's speed.

    $ apt-get install sctk
    $ python .lab/scoring.py agree --sets 3000    # counts of each sentence
    $ python .lab/scoring.py table                # sclite's counts for the tests' SCLITE table
    $ pip install jiwer==4.0.0; OMP_NUM_THREADS=1 python .lab/scoring.py time
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import wer  # noqa: E402

SCLITE = "/usr/lib/sctk/bin/sclite"


def sclite(references, hypotheses):
    """[(hits, substitutions, deletions, insertions)] of each sentence, as sclite counts."""
    with tempfile.TemporaryDirectory() as folder:
        stm, ctm = Path(folder, "ref.stm"), Path(folder, "hyp.ctm")
        stm.write_text("".join(f"s{k:06d} 1 signer 0.0 1.79769e+308 {' '.join(glosses)}\n"
                               for k, glosses in enumerate(references)))
        ctm.write_text("".join(f"s{k:06d} 1 {t / 100:.2f} 0.01 {gloss}\n"
                               for k, glosses in enumerate(hypotheses)
                               for t, gloss in enumerate(glosses)))
        command = [SCLITE, "-h", ctm, "ctm", "-r", stm, "stm", "-f", "0", "-o", "pralign", "stdout"]
        report = subprocess.run(command, capture_output=True, encoding="latin1", check=True).stdout
    rows = re.findall(r"File: s(\d+)\n.*\nScores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)", report)
    if [int(row[0]) for row in rows] != list(range(len(references))):
        raise RuntimeError(f"sclite reported {len(rows)} sentences of {len(references)}")
    return [tuple(map(int, row[1:])) for row in rows]


def noisy_set(rng, sentences=40):
    """(references, hypotheses): few or many glosses, repeats, empty and long sentences, cases."""
    glosses = [rng.choice(("G", "g", "Gl", "__X")) + str(k)
               for k in range(rng.choice((1, 2, 2, 3, 3, 4, 6, 10, 30, 1000)))]
    longest = 400 if rng.random() < 0.02 else rng.choice((3, 6, 10, 10, 20, 60))
    draw = lambda low: [rng.choice(glosses) for _ in range(rng.randint(low, longest))]
    references = [draw(0 if rng.random() < 0.1 else 1) for _ in range(sentences)]
    hypotheses = []
    for reference in references:
        noise, hypothesis, kind = rng.random(), [], rng.random()
        for gloss in reference:
            u = rng.random()
            if u > noise / 3:
                other = rng.choice((gloss, gloss, gloss.upper(), gloss.lower()))
                hypothesis.append(rng.choice(glosses) if u < 2 * noise / 3 else other)
            while rng.random() < noise / 4:
                hypothesis.append(rng.choice(hypothesis or glosses))
        hypotheses.append([] if kind < 0.02 else [wer.EMPTY] if kind < 0.04 else
                          draw(0) if kind < 0.2 else hypothesis)
    return references, hypotheses


def agree(sets):
    """Compare sentence by sentence and print how many differ."""
    rng, sentences, differ, more = random.Random(0), 0, 0, 0
    for _ in range(sets):
        references, hypotheses = noisy_set(rng)
        for ref, hyp, theirs in zip(references, hypotheses, sclite(references, hypotheses)):
            errors = wer.score([ref], [hyp], "sclite")
            ours = errors.hits, errors.substitutions, errors.deletions, errors.insertions
            fewest = wer.edit_distance(*([gloss.lower() for gloss in s] for s in (ref, hyp)))
            sentences, differ = sentences + 1, differ + (ours != theirs)
            more += sum(theirs[1:]) != fewest
    print(f"{sets} sets, {sentences} sentences: {differ} have other counts than sclite's "
          f"({more} have more errors than Levenshtein's)")


def table():
    """Print the rows of SCLITE in test_all.py with sclite's counts, and its drawn corpus's."""
    import test_all
    rows = [row.split()[:2] for row in test_all.SCLITE.split(";")]
    counts = sclite(*([word.strip("-") for word in column] for column in zip(*rows)))
    for (ref, hyp), row in zip(rows, counts):
        print(f"    {ref} {hyp} {' '.join(map(str, row))};")
    print("SCLITE_DRAWN =", tuple(map(sum, zip(*sclite(*test_all.drawn_corpus())))))


def phoenix_sized(rng, sentences=540, words=1100, noise=0.22):
    """Lines of about 10 glosses and a recognition of them at about 21% WER."""
    glosses = [f"GLOSS{k}" for k in range(words)]
    weights = [1 / (k + 2) for k in range(words)]
    draw = lambda count: rng.choices(glosses, weights, k=count)
    references, hypotheses = [], []
    for _ in range(sentences):
        references.append(draw(max(1, round(rng.gauss(10.3, 3.5)))))
        hypotheses.append([])
        for gloss in references[-1]:
            u = rng.random()
            hypotheses[-1] += [] if u < 0.4 * noise else draw(1) if u < 0.75 * noise else [gloss]
            hypotheses[-1] += draw(1) if rng.random() < 0.25 * noise else []
    return [" ".join(s) for s in references], [" ".join(s) for s in hypotheses]


def timings(repeats):
    """Print the median time of each scorer, taken in turns, and its ratio to jiwer's."""
    import jiwer
    refs, hyps = phoenix_sized(random.Random(0))
    runs = {"jiwer.process_words": lambda: jiwer.process_words(refs, hyps),
            "wer.score": lambda: wer.score(refs, hyps),
            "wer.score, sclite": lambda: wer.score(refs, hyps, "sclite"),
            "wer.edit_distance": lambda: [wer.edit_distance(ref.split(), hyp.split())
                                          for ref, hyp in zip(refs, hyps)]}
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["jiwer.process_words"])
    print(f"{len(refs)} sentences, {sum(len(ref.split()) for ref in refs)} reference glosses, "
          f"WER {100 * wer.score(refs, hyps).wer:.1f}%, medians of {repeats}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:<20} {1000 * median:6.2f} ms  {median / base:5.2f} of jiwer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("agree", "table", "time"))
    parser.add_argument("--sets", type=int, default=3000, help="of 40 sentences, for agree")
    parser.add_argument("--repeats", type=int, default=31, help="for time")
    args = parser.parse_args()
    if args.what == "agree":
        agree(args.sets)
    elif args.what == "table":
        table()
    else:
        timings(args.repeats)


if __name__ == "__main__":
    main()
