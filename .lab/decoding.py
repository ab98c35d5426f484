"""wer.py's beam search beside pyctcdecode's: time, and whether they find the same.

    $ pip install pyctcdecode==0.5.0; OMP_NUM_THREADS=1 python .lab/decoding.py

Logits are random: "peaky" ones are blank in 6 of 10 frames and else favour one gloss by
9 to 13 nats, as a trained network does; "flat" ones are noise. pyctcdecode decodes
characters, so each gloss is one; its other options are its defaults. Times are medians
in seconds of CPU.
"""

import argparse
import functools
import logging
import statistics
import time

import lab  # noqa: F401 (puts the project on the path)
import numpy as np

import wer

WIDTH = 10  # prefixes that both keep
FIRST_CHARACTER = 0x4E00  # of a block of Chinese characters, one per class
BLANK_SHARE = 0.6  # of the frames of peaky logits
PEAK = (9, 13)  # nats, lowest and highest


def random_log_probs(kind, sentences, frames, classes):
    """Draw log probabilities [sentences, frames, classes], "peaky" or "flat"."""
    generator = np.random.default_rng(0)
    shape = (sentences, frames, classes)
    logits = generator.standard_normal(shape, dtype=np.float32)
    if kind == "peaky":
        best = generator.integers(1, classes, (sentences, frames, 1))
        best[generator.random(best.shape) < BLANK_SHARE] = 0
        peaks = generator.uniform(*PEAK, best.shape).astype(np.float32)
        np.put_along_axis(logits, best, peaks, axis=2)
    return logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))


def decode_theirs(log_probs, decoder):
    """Decode by pyctcdecode: a tuple of glosses per sentence."""
    return [tuple(decoder.decode(frames, beam_width=WIDTH)) for frames in log_probs]


def make_decoders(frames, sentences, classes):
    """Return name -> function of log probabilities that returns glosses."""
    from pyctcdecode import build_ctcdecoder  # not a package of the project

    logging.disable(logging.WARNING)
    characters = [chr(FIRST_CHARACTER + k) for k in range(1, classes)]
    vocabulary = [""] + characters
    lengths = [frames] * sentences
    return {
        "greedy_decode": functools.partial(
            wer.greedy_decode, lengths=lengths, vocabulary=vocabulary
        ),
        "beam_decode": functools.partial(
            wer.beam_decode, lengths=lengths, vocabulary=vocabulary, beam_width=WIDTH
        ),
        "pyctcdecode": functools.partial(
            decode_theirs, decoder=build_ctcdecoder(vocabulary)
        ),
    }


def time_in_turn(decoders, log_probs, repeats):
    """Return name -> median seconds of CPU, and name -> glosses."""
    seconds = {name: [] for name in decoders}
    glosses = {}
    for _ in range(repeats):
        for name, decode in decoders.items():
            start = time.process_time()
            glosses[name] = decode(log_probs)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians, glosses


def main():
    """Print times and agreement for both kinds of logits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sentences", type=int, default=540)
    parser.add_argument("--frames", type=int, default=35)
    parser.add_argument("--classes", type=int, default=1201, help="with the blank")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    decoders = make_decoders(args.frames, args.sentences, args.classes)
    for kind in ("peaky", "flat"):
        log_probs = random_log_probs(kind, args.sentences, args.frames, args.classes)
        seconds, glosses = time_in_turn(decoders, log_probs, args.repeats)
        print(
            f"{kind}: {args.sentences} sentences of {args.frames} frames, "
            f"{args.classes} classes, width {WIDTH}, medians of {args.repeats}"
        )
        theirs = glosses["pyctcdecode"]
        for name, median in seconds.items():
            pairs = zip(glosses[name], theirs, strict=True)
            equal = sum(1 for ours, other in pairs if ours == other)
            print(
                f"  {name:<14} {median:6.3f} s  "
                f"{median / seconds['pyctcdecode']:5.2f} of pyctcdecode, the same "
                f"glosses in {equal} sentences"
            )


if __name__ == "__main__":
    main()
