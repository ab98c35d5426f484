"""A corpus of Phoenix-2014's size: start-up, memory and one epoch of teacher and student.

    $ python .lab/phoenix_scale.py FOLDER [--threads 2]

Random features (5,671 / 540 / 629 sentences of 27 to 250 frames, about 140; D = 1,662; 1,231
glosses; float16: 3.2 GB in FOLDER), so WER means nothing here: what is measured is time and memory.
Start-up: until the first epoch's stage is printed. Epoch: from there until its line, dev included.
Peak: the largest resident memory of the process. Wall time, beside CPU time of the whole run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SENTENCES, D, GLOSSES = {"train": 5671, "dev": 540, "test": 629}, 1662, 1231


def generate(folder):
    rng = np.random.default_rng(0)
    block = rng.standard_normal((1000, D)).astype(np.float16)  # sentences are windows of it
    for split, count in SENTENCES.items():
        (features := folder / "features" / split).mkdir(parents=True)
        rows = ["id|folder|signer|annotation"]
        for k in range(count):
            frames = int(np.clip(rng.normal(140, 35), 27, 250))
            start = int(rng.integers(len(block) - frames))
            glosses = rng.integers(GLOSSES, size=max(1, frames // 12))
            if split == "train" and k * 3 < GLOSSES:
                glosses = [*glosses, *(g for g in range(3 * k, 3 * k + 3) if g < GLOSSES)]
            noise = np.float16(rng.standard_normal())
            np.save(features / f"{split}-{k}.npy", block[start:start + frames] + noise)
            rows.append(f"{split}-{k}|x|signer{k % 9}|{' '.join(f'G{g}' for g in glosses)}")
        (folder / f"{split}.corpus.csv").write_text("\n".join(rows) + "\n")


def run(name, program, *flags, threads):
    """Run a program and print a row."""
    start, marks = time.perf_counter(), {}
    process = subprocess.Popen(
        [sys.executable, ROOT / program, *map(str, flags)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads),
                                     "PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        for mark, words in (("start", "  stage "), ("epoch", "  loss ")):
            if line.startswith("epoch") and words in line:
                marks.setdefault(mark, time.perf_counter())
    _, status, usage = os.wait4(process.pid, 0)
    print(f"{name}: status {status}, start-up {marks['start'] - start:.0f} s, epoch "
          f"{marks['epoch'] - marks['start']:.0f} s, whole run {time.perf_counter() - start:.0f} s "
          f"({usage.ru_utime + usage.ru_stime:.0f} s of CPU), peak {usage.ru_maxrss / 1e6:.2f} GB",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not (args.folder / "data").exists():
        generate(args.folder / "data")
    shared = ["--data_dir", args.folder / "data", "--epochs", 1, "--device", "cpu"]
    kinetics = ["--pretrained_weights", "i3d_kinetics400", "--output_dir"]
    run("teacher, frozen to mixed_5c", "teacher.py", *shared, *kinetics, args.folder / "frozen",
        "--freeze_backbone", threads=args.threads)
    run("teacher, all layers", "teacher.py", *shared, *kinetics, args.folder / "full",
        threads=args.threads)
    run("student", "distill.py", *shared, "--no_baseline", "--teacher_checkpoint",
        args.folder / "full/best_i3d.pth", "--output_dir", args.folder / "student",
        threads=args.threads)


if __name__ == "__main__":
    main()
