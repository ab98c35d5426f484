"""A corpus of Phoenix-2014's size: start-up, memory and one epoch of both networks.

    $ python .lab/phoenix_scale.py FOLDER [--threads 2]

Features are random, so WER means nothing here: time and memory are measured. FOLDER
gets 3.2 GB: 5,671 / 540 / 629 sentences of 27 to 250 frames, about 140, D = 1,662,
1,231 glosses, float16. Start-up lasts until the first epoch's stage is printed, the
epoch from there to its line, dev included. The peak is the process's largest resident
memory. Wall time is given beside the CPU time of the whole run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import lab
import numpy as np

SENTENCES = {"train": 5671, "dev": 540, "test": 629}
FEATURES = 1662  # D
GLOSSES = 1231
FRAMES_MEAN = 140
FRAMES_STD = 35
FEWEST_FRAMES = 27
MOST_FRAMES = 250
FRAMES_PER_GLOSS = 12
BLOCK_FRAMES = 1000  # of random numbers, of which every sentence is a window
MARKS = {"start-up": "  stage ", "epoch": "  loss "}  # in the line that ends each


def draw_glosses(generator, frames, split, number):
    """Draw a sentence's gloss numbers; together the train sentences have them all."""
    glosses = generator.integers(GLOSSES, size=max(1, frames // FRAMES_PER_GLOSS))
    glosses = glosses.tolist()
    if split == "train":
        first = 3 * number
        glosses += range(first, min(first + 3, GLOSSES))
    return glosses


def generate(folder, share):
    """Write the corpus, or a share of its sentences."""
    generator = np.random.default_rng(0)
    block = generator.standard_normal((BLOCK_FRAMES, FEATURES)).astype(np.float16)
    for split, sentences in SENTENCES.items():
        features = folder / "features" / split
        features.mkdir(parents=True)
        lines = ["id|folder|signer|annotation"]
        for number in range(max(1, round(share * sentences))):
            drawn = generator.normal(FRAMES_MEAN, FRAMES_STD)
            frames = int(np.clip(drawn, FEWEST_FRAMES, MOST_FRAMES))
            start = int(generator.integers(len(block) - frames))
            glosses = draw_glosses(generator, frames, split, number)
            offset = np.float16(generator.standard_normal())
            name = f"{split}-{number}"
            np.save(features / f"{name}.npy", block[start : start + frames] + offset)
            annotation = " ".join(f"G{gloss}" for gloss in glosses)
            lines.append(f"{name}|x|signer{number % 9}|{annotation}")
        (folder / f"{split}.corpus.csv").write_text("\n".join(lines) + "\n")


def run(name, program, flags, threads):
    """Run a program and print its times and its memory."""
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    marks = {}
    process = subprocess.Popen(
        [sys.executable, str(lab.ROOT / program)] + [str(flag) for flag in flags],
        cwd=lab.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
    )
    with process.stdout:
        for line in process.stdout:
            for mark, words in MARKS.items():
                if line.startswith("epoch") and words in line:
                    marks.setdefault(mark, time.perf_counter())
    _, status, usage = os.wait4(process.pid, 0)
    end = time.perf_counter()
    if status != 0:
        sys.exit(f"{name}: {program} ended with status {status}")
    print(
        f"{name}: start-up {marks['start-up'] - start:.0f} s, epoch "
        f"{marks['epoch'] - marks['start-up']:.0f} s, whole run {end - start:.0f} s "
        f"({usage.ru_utime + usage.ru_stime:.0f} s of CPU), peak "
        f"{usage.ru_maxrss / 1e6:.2f} GB",
        flush=True,
    )


def main():
    """Make the corpus where it is missing, then train both networks for one epoch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the sentences")
    args = parser.parse_args()
    data_dir = args.folder.resolve() / "data"
    if not data_dir.exists():
        generate(data_dir, args.share)
    shared = ["--data_dir", data_dir, "--epochs", 1, "--device", "cpu"]
    teacher_flags = shared + ["--pretrained_weights", "i3d_kinetics400"]
    frozen = args.folder.resolve() / "frozen"
    full = args.folder.resolve() / "full"
    student = args.folder.resolve() / "student"
    run(
        "teacher, frozen to mixed_5c",
        "teacher.py",
        teacher_flags + ["--freeze_backbone", "--output_dir", frozen],
        args.threads,
    )
    run(
        "teacher, all layers",
        "teacher.py",
        teacher_flags + ["--output_dir", full],
        args.threads,
    )
    checkpoint = ["--teacher_checkpoint", full / "best_i3d.pth", "--no_baseline"]
    run(
        "student",
        "distill.py",
        shared + checkpoint + ["--output_dir", student],
        args.threads,
    )


if __name__ == "__main__":
    main()
