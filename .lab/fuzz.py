"""Mutated files for every reader of the project: each is read, or refused clearly.

    $ python .lab/fuzz.py 100000

While a reader runs, an audit hook (PEP 578) reports whatever it opens for writing, runs
or asks of the network. Exits with 1 where a file was neither read nor refused by a
ValueError of one line per error, each of which names the file.
"""

import argparse
import functools
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import lab  # noqa: F401 (puts the project on the path)
import numpy as np
import torch

import adapt
import distill
import teacher
import wer

MUTATED_FILES = 3000  # where the command line does not say
# What the hostile write into files, besides broken bytes.
TOKENS = (
    b"../x",
    b"\0",
    b"\x1b[31m",
    b"\xff\xfe",
    b"\r\n",
    b"|",
    b"\n",
    b" ",
    b"nan",
    b"1e999",
    b"cos\nsystem\n(tR",
    b"\xff\xff\xff\x7f",
    b"(9999999999, 16)",
    b"'O'",
    b"h\0",
    b".",
)
SPAN_SIZES = (1, 4, 9, 40, 1 << 20)  # bytes; the last one reaches to the file's end
WATCHED_EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.")


class Target(NamedTuple):
    """A good file and what reads it."""

    name: str
    content: bytes
    read: object  # path -> anything, ValueError for a bad file


def mutate(content, generator):
    """Return bytes with one to four spans cut, doubled, changed or preceded by more."""
    content = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        start = int(generator.integers(len(content) + 1))
        size = int(generator.choice(SPAN_SIZES))
        token = TOKENS[generator.integers(len(TOKENS))]
        old = content[start : start + size]
        replacements = (
            b"",
            old + old,
            generator.bytes(len(old)),
            generator.bytes(4) + old,
            token + old,
            token + old[len(token) :],
        )
        replacement = replacements[generator.integers(len(replacements))]
        content[start : start + size] = replacement
    return bytes(content)


def to_bytes(write, content):
    """Return what write(file, content) writes."""
    file = io.BytesIO()
    write(file, content)
    return file.getvalue()


def text_targets():
    """Return the Targets of wer.py's text formats."""
    csv = b"id|folder|signer|annotation\ns1|f|S|A  B A \ns2|f|S|B\n"
    stm = b"s1 1 x 0.0 1.79769e+308 A B\ns2 1 x 0 1 <o,f0,m> C\n"
    ctm = b"s1 1 0.0 0.1 A\ns1 1 0.2 0.1 B 0.9\ns2 1 0 1 C\n"
    read_kaldi = functools.partial(wer.read_sentences, file_format="kaldi")
    return [
        Target("a.csv", csv, wer.read_annotations),
        Target("a.stm", stm, wer.read_sentences),
        Target("a.ctm", ctm, wer.read_sentences),
        Target("a.trn", b"A B (s1)\n(s2)\nC (s3)\n", wer.read_sentences),
        Target("a.txt", "A B\n\nÄ C\n".encode(), wer.read_sentences),
        Target("kaldi", b"s1 A B\ns2\ns3 C\n", read_kaldi),
    ]


def feature_targets():
    """Return the Targets of feature files."""
    array = np.arange(60, dtype=np.float32).reshape(20, 3)
    return [
        Target("a.npy", to_bytes(np.save, array), teacher.read_features),
        Target("b.npz", to_bytes(np.savez, array), teacher.read_features),
        Target("c.npz", to_bytes(np.savez_compressed, array), teacher.read_features),
    ]


def checkpoint_targets():
    """Return the Targets of weights and of a run's checkpoint, in both zip forms."""
    weights = {
        "state_dict": {
            "module.Mixed_3b.b0.conv3d.weight": torch.randn(2, 3, 1, 1, 1),
            "logits.conv3d.bias": torch.randn(4),
            "epoch": torch.tensor(3),
        }
    }
    student = distill.Student(3, 4, temporal_stride=4, channels=4)
    checkpoint = {
        "model": "student",
        "model_state_dict": student.state_dict(),
        "config": {
            "temporal_stride": 4,
            "channels": 4,
            "dropout": 0.3,
            "centre_sentences": False,
        },
        "vocabulary": ["<blank>", "A", "B", "C"],
        "epoch": 0,
        "wer": 0.5,
    }
    load_student = functools.partial(teacher.load_model, model_class=distill.Student)
    targets = []
    for zipped in (True, False):

        def save(file, content, zipped=zipped):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)

        best = to_bytes(save, checkpoint)
        targets += [
            Target("weights.pth", to_bytes(save, weights), adapt.read_checkpoint),
            Target("best.pth", best, load_student),
        ]
    return targets


class Watch:
    """An audit hook that collects what happens while it is on."""

    def __init__(self):
        self.on = False
        self.events = []
        sys.addaudithook(self.audit)

    def audit(self, event, details):
        """Note an event that a reader should not cause."""
        if not self.on:
            return
        writes = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith(WATCHED_EVENTS):
            self.events.append((event, details))


def read(target, path, watch):
    """Read a file under watch; return the exception that the reader raised, or None."""
    watch.events = []
    watch.on = True
    try:
        target.read(path)
    except Exception as error:  # whatever a reader raises is what is looked for
        return error
    finally:
        watch.on = False
    return None


def problem_of(error, path):
    """Return what is wrong with how a reader ended, "" where nothing is."""
    if error is None:
        return ""
    if not isinstance(error, ValueError):
        return f"{type(error).__name__}: {error}"
    lines = str(error).split("\n")
    if all(line.strip().startswith(str(path)) for line in lines):
        return ""
    return f"refused with {error}"


def main():
    """Read the good files, then as many mutated ones as asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=MUTATED_FILES)
    args = parser.parse_args()
    targets = text_targets() + feature_targets() + checkpoint_targets()
    generator = np.random.default_rng(0)
    watch = Watch()
    refused = 0
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-len(targets), args.count):  # below 0: as they are
            target = targets[number % len(targets)]
            path = Path(folder, target.name)
            content = target.content
            if number >= 0:
                content = mutate(content, generator)
            path.write_bytes(content)
            error = read(target, path, watch)
            problem = problem_of(error, path)
            if number < 0 and error is not None:
                problem = f"a good file was refused: {error}"
            if isinstance(error, ValueError):
                refused += 1
            if watch.events or problem:
                failures += 1
                print(f"{number} {target.name}: {watch.events} {problem}")
    print(f"{args.count} mutated files: {refused} refused, {failures} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
