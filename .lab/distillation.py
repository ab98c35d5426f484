"""The README's table of students: train teachers, distill, record, print the table.

    $ python .lab/distillation.py --name built-in --seeds 0 1 2 --teacher "--pretrained_weights i3d_kinetics400"
    $ python .lab/distillation.py --name built-in                    # only the table
    $ python .lab/distillation.py --name "T 2" --teachers built-in --seeds 0 1 2 --student "--temperature 2 --no_baseline"

Each seed trains a teacher (kept in --work, and used again where it is there; --teachers: those of
another experiment) and then, with `python distill.py`, its student with and without it. --teacher: flags of teacher.py; --student:
flags of distill.py; --shared: flags of both. One thread a process, --workers of them at a time.
What is recorded in .lab/students.jsonl is not repeated. WER in percent: on test where there is a
test split, of the epoch that is best on dev; on dev that same epoch's and the last one's.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from strategies import ROOT, recorded, spread

RECORD = ROOT / ".lab/students.jsonl"


def program(*arguments):
    """Run one of the programs with --json in a process with one thread; its JSON."""
    process = subprocess.run([sys.executable, *map(str, arguments), "--json"], cwd=ROOT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                             text=True)
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def curve(folder):
    """(lowest, last) dev WER of a run."""
    wers = [json.loads(line)["wer"] for line in (folder / "log.jsonl").open().readlines()[1:]]
    return min(wers), wers[-1]


def run(args, seed):
    """Teacher and students of one seed; appends what came out to the record."""
    folder = (args.work / f"{args.name}-{seed}").resolve()
    source = (args.work / f"{args.teachers or args.name}-{seed}/teacher").resolve()
    data = ["--data_dir", Path(args.data_dir).resolve()] if args.data_dir else []
    teacher, student, shared = map(shlex.split, (args.teacher, args.student, args.shared))
    if not (source / "best_i3d.pth").exists():
        program("teacher.py", *data, "--seed", seed, "--output_dir", source, *teacher, *shared)
    result = program("distill.py", "--teacher_checkpoint", source / "best_i3d.pth",
                     "--seed", seed, "--output_dir", folder / "student", *student, *shared)
    row = {"name": args.name, "seed": seed, "teacher_flags": " ".join(teacher + shared),
           "student_flags": " ".join(student + shared)}
    runs = {"teacher": source, "student": folder / "student",
            "student without teacher": folder / "student/alone"}
    for name in result:
        best, last = curve(runs[name])
        row[name] = {**result[name], "dev_best": best, "dev_last": last}
        del row[name]["checkpoint"]
    with RECORD.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table(name):
    rows = recorded(name, RECORD)
    print(f"| {name}, {len(rows)} seeds | parameters | dev WER, best epoch | dev WER, last epoch "
          f"| test WER |\n|---|---|---|---|---|")
    for model in ("teacher", "student", "student without teacher"):
        some = [row[model] for row in rows if model in row]
        if not some:
            continue
        cells = " | ".join(spread([r.get(key) for r in some])
                           for key in ("dev_best", "dev_last", "test_wer"))
        print(f"| {model} | {some[0]['parameters']:,} | {cells} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True, help="of the experiment, in record and table")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--teachers", help="experiment whose teachers are used")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--teacher", default="")
    parser.add_argument("--student", default="")
    parser.add_argument("--shared", default="")
    parser.add_argument("--work", type=Path, default=Path("checkpoints/students"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    done = {row["seed"] for row in recorded(args.name, RECORD)}
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: run(args, seed), [s for s in args.seeds if s not in done]))
    table(args.name)


if __name__ == "__main__":
    main()
