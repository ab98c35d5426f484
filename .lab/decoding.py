"""wer.py's beam search beside pyctcdecode's, and a checkpoint's WER by beam width.

    $ pip install pyctcdecode==0.5.0; OMP_NUM_THREADS=1 python .lab/decoding.py
    $ python .lab/decoding.py --checkpoint CHECKPOINT --split dev

Logits are random: "peaky" ones are blank in 6 of 10 frames and else favour one gloss by 9 to 13
nats, as a trained network does; "flat" ones are noise. One of pyctcdecode's characters stands for
each gloss; its other options are its defaults.
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import lab

sys.path.insert(0, str(Path(__file__).parent.parent))

import wer  # noqa: E402

WIDTH = 10


def random_log_probs(kind, sentences, frames, classes):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((sentences, frames, classes), dtype=np.float32)
    if kind == "peaky":
        best = rng.integers(1, classes, (sentences, frames, 1))
        best[rng.random(best.shape) < 0.6] = 0
        np.put_along_axis(logits, best, rng.uniform(9, 13, best.shape).astype(np.float32), 2)
    return logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))


def compare(sentences, frames, classes, repeats):
    """Print medians of seconds of CPU, and whether both found the same glosses."""
    from pyctcdecode import build_ctcdecoder
    logging.disable(logging.WARNING)
    first = 0x4E00  # a block of Chinese characters, a class each
    theirs = build_ctcdecoder(["", *(chr(first + k) for k in range(1, classes))])
    lengths, vocabulary = [frames] * sentences, ["", *(chr(first + k) for k in range(1, classes))]
    runs = {"greedy_decode": lambda x: wer.greedy_decode(x, lengths, vocabulary),
            "beam_decode": lambda x: wer.beam_decode(x, lengths, vocabulary, WIDTH),
            "pyctcdecode": lambda x: [tuple(theirs.decode(row, beam_width=WIDTH)) for row in x]}
    for kind in ("peaky", "flat"):
        log_probs = random_log_probs(kind, sentences, frames, classes)
        seconds, found = {name: [] for name in runs}, {}
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.process_time()
                found[name] = run(log_probs)
                seconds[name].append(time.process_time() - start)
        base = statistics.median(seconds["pyctcdecode"])
        print(f"{kind}: {sentences} sentences of {frames} frames, {classes} classes, width "
              f"{WIDTH}, medians of {repeats}")
        for name, values in seconds.items():
            equal = sum(a == b for a, b in zip(found[name], found["pyctcdecode"]))
            print(f"  {name:<14} {statistics.median(values):6.3f} s of CPU  "
                  f"{statistics.median(values) / base:5.2f} of pyctcdecode, the same glosses in "
                  f"{equal} sentences")


def evaluate(path, split):
    """Print a checkpoint's WER by beam width."""
    for width in (1, 10):
        result = lab.run("teacher.py", "--evaluate", Path(path).resolve(), "--split", split,
                         "--beam_width", width)
        print(f"{path} {split} --beam_width {width}: WER {100 * result['wer']:.2f}%")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="evaluate this one instead")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--sentences", type=int, default=540)
    parser.add_argument("--frames", type=int, default=35)
    parser.add_argument("--classes", type=int, default=1201, help="the blank among them")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.checkpoint:
        evaluate(args.checkpoint, args.split)
    else:
        compare(args.sentences, args.frames, args.classes, args.repeats)


if __name__ == "__main__":
    main()
