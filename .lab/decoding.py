"""teacher.py's beam search beside pyctcdecode: time and quality on the same logits, in turns.

    $ pip install pyctcdecode==0.5.0; OMP_NUM_THREADS=1 python .lab/decoding.py
    $ python .lab/decoding.py --checkpoint CHECKPOINT        # greedy, beam, beam with bigrams: WER

Logits are random: "peaky" ones are blank in 6 of 10 frames and else favour one gloss by 9 to 13
nats, as a trained network does; "flat" ones are noise. One of pyctcdecode's characters stands for
each gloss. Quality is the log probability of what was found, over all its alignments.
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import teacher  # noqa: E402


def random_logits(kind, sentences, frames, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sentences, frames, classes, generator=generator)
    if kind == "peaky":
        best = torch.randint(1, classes, (sentences, frames, 1), generator=generator)
        best[torch.rand(best.shape, generator=generator) < 0.6] = 0
        logits.scatter_(2, best, 9 + 4 * torch.rand(best.shape, generator=generator))
    return logits


def quality(logits, found):
    """Mean log probability in nats of the sentences found, tuples of classes."""
    targets = torch.tensor([k for sentence in found for k in sentence])
    lengths = torch.full((len(logits),), logits.shape[1])
    losses = F.ctc_loss(logits.log_softmax(2).transpose(0, 1), targets, lengths,
                        torch.tensor([len(sentence) for sentence in found]), reduction="none")
    return -losses.mean().item()


def compare(sentences, frames, classes, repeats):
    from pyctcdecode import build_ctcdecoder
    logging.disable(logging.WARNING)
    first = 0x4E00  # a block of Chinese characters, a class each
    theirs = build_ctcdecoder(["", *(chr(first + k) for k in range(1, classes))])
    lengths, vocabulary = torch.full((sentences,), frames), list(range(classes))
    ours = lambda logits: teacher.beam_decode(logits, lengths, vocabulary, 10)

    def pyctcdecode(logits, **options):
        found = [theirs.decode(row, beam_width=10, **options)
                 for row in logits.log_softmax(2).numpy()]
        return [tuple(ord(letter) - first for letter in text) for text in found]

    for kind in ("peaky", "flat"):
        logits = random_logits(kind, sentences, frames, classes)
        runs = {"greedy": lambda x: teacher.greedy_decode(x, lengths, vocabulary),
                "beam_decode, width 10": ours, "pyctcdecode, width 10": pyctcdecode}
        seconds, found = {name: [] for name in runs}, {}
        for _ in range(repeats):
            for name, run in runs.items():
                start, begun = time.perf_counter(), time.process_time()
                found[name] = run(logits)
                seconds[name].append((time.perf_counter() - start, time.process_time() - begun))
        print(f"{kind}: {sentences} sentences of {frames} frames, {classes} classes, median of "
              f"{repeats}")
        for name, values in seconds.items():
            wall, cpu = (statistics.median(column) for column in zip(*values))
            print(f"  {name:<22} {wall:7.2f} s ({cpu:.2f} s of CPU), found "
                  f"{quality(logits, found[name]):.2f} nats a sentence")


def evaluate(path, split):
    """Print a checkpoint's WER for widths and weights of the language model."""
    model, checkpoint = teacher.load_teacher(path)
    data_dir, vocabulary = checkpoint["config"]["data_dir"], checkpoint["vocabulary"]
    corpus = teacher.read_corpus(data_dir) if data_dir else teacher.synthetic_corpus()
    for width, weight in ((1, 0), (10, 0), (10, 0.1), (10, 0.2), (10, 0.3), (10, 0.5), (10, 0.8)):
        decode = teacher.make_decoder(data_dir, vocabulary, width, weight)
        errors, _, _ = teacher.evaluate(model, corpus[split], vocabulary, "cpu", decode=decode)
        print(f"{path} {split} --beam_width {width} --lm_weight {weight}: {errors}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="score this one instead")
    parser.add_argument("--split", choices=teacher.SPLITS, default="dev")
    parser.add_argument("--sentences", type=int, default=540)
    parser.add_argument("--frames", type=int, default=35)
    parser.add_argument("--classes", type=int, default=1201, help="the blank among them")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.checkpoint:
        evaluate(args.checkpoint, args.split)
    else:
        compare(args.sentences, args.frames, args.classes, args.repeats)


if __name__ == "__main__":
    main()
