"""Students over seeds: train a teacher, distill, record, print the table.

    $ python .lab/distillation.py --corpus built-in --seeds 0 1 2
    $ python .lab/distillation.py --corpus built-in --seeds      # only the table

Each seed trains a teacher (kept in --work and used again where it is there) and then, with
`python distill.py`, its student and the baseline, the same student without the teacher. --teacher:
flags of teacher.py; --student: flags of distill.py; --shared: flags of both. One thread per
process, --workers of them at a time. WER in percent: on test (dev where there is none) of the epoch
that is best on dev; on dev the last epoch's, which chose nothing.
"""

import argparse
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab

RECORD = lab.ROOT / ".lab/students.jsonl"


def run(args, seed):
    """Teacher and students of one seed; appends what came out to the record."""
    key = {"corpus": args.corpus, "seed": seed, "teacher_flags": f"{args.teacher} {args.shared}",
           "student_flags": f"{args.student} {args.shared}", "commit": lab.commit()}
    if lab.recorded(RECORD, **key):
        return
    folder = (args.work / f"{args.corpus}-{seed}").resolve()
    data = ["--data_dir", Path(args.data_dir).resolve()] if args.data_dir else []
    teacher, student, shared = map(shlex.split, (args.teacher, args.student, args.shared))
    shared += ["--seed", str(seed), "--device", "cpu"]
    best = folder / "teacher/best_i3d.pth"
    if not best.exists():
        lab.run("teacher.py", *data, "--output_dir", folder / "teacher", *teacher, *shared)
    result = lab.run("distill.py", "--teacher_checkpoint", best, "--output_dir",
                     folder / "student", *student, *shared)
    runs = {"teacher": folder / "teacher", "student": folder / "student",
            "baseline": folder / "student/alone"}
    row = {**key, **{name: {**result[name], "dev_last": lab.log_rows(runs[name])[-1]["wer"]}
                     for name in result}}
    lab.record(row, RECORD)
    print(row, flush=True)


def table(corpus):
    rows = lab.recorded(RECORD, corpus=corpus)
    print(f"| {corpus}: student's flags | seeds | measured on | teacher | student | baseline |")
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((r["teacher_flags"], r["student_flags"], r["commit"]) for r in rows):
        some = [r for r in rows
                if (r["teacher_flags"], r["student_flags"], r["commit"]) == key]
        split = "test_wer" if "test_wer" in some[0]["teacher"] else "dev_wer"
        for column in (split, "dev_last"):
            cells = " | ".join(lab.spread([r[name][column] for r in some]) if name in some[0]
                               else "-" for name in ("teacher", "student", "baseline"))
            print(f"| {key[1]} (teacher {key[0]}, {key[2]}) | {len(some)} | {column} | {cells} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True, help="its name in record, table and --work")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--teacher", default=" ".join(lab.KINETICS))
    parser.add_argument("--student", default="")
    parser.add_argument("--shared", default="")
    parser.add_argument("--work", type=Path, default=Path("checkpoints/lab"))
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: run(args, seed), args.seeds))
    table(args.corpus)


if __name__ == "__main__":
    main()
