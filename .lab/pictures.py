"""The notebook's pictures, drawn from .lab/results.jsonl and, for the posteriors, two checkpoints.

    $ python .lab/pictures.py
    $ python .lab/pictures.py --teacher checkpoints/teacher/best_i3d.pth \\
          --student checkpoints/student/best_student.pth --sentence test-0003

strategies.svg: WER per strategy, a dot per seed and a line at the mean. epochs.svg: dev WER over
the epochs, mean over seeds, with the stages of progressive unfreezing. sizes.svg: WER and number of
parameters. transfer.svg: WER by number of train sentences and weights. posteriors.svg: what teacher
and student believe of one sentence of the built-in corpus.
"""

import argparse
import html
import statistics
import sys

import lab

sys.path.insert(0, str(lab.ROOT))
import adapt  # noqa: E402
import distill  # noqa: E402
import freeze  # noqa: E402
import teacher  # noqa: E402
import wer  # noqa: E402

# On the built-in corpus; the teacher's without the second head, which serves training alone.
PARAMETERS = {"teacher": 6_023_669, "student": 435_029, "baseline": 435_029}


def write(name, svg):
    (lab.ROOT / ".lab" / name).write_text(svg)
    print(f".lab/{name}")


def built_in(**wanted):
    """The records of the built-in corpus with no flags besides the strategy's."""
    return [row for row in lab.recorded(corpus="built-in", **wanted)
            if "network" in row and not row["flags"]]


def dots(title, rows, highest, axis):
    """SVG: a line of dots per row. rows: [(label, [values])], values in percent."""
    left, width, step = 290, 520, 30
    x = lambda value: left + width * value / highest
    height = 60 + step * len(rows)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 40}" '
           f'height="{height + 40}" font-family="sans-serif" font-size="12">'
           f'<rect width="100%" height="100%" fill="white"/>'
           f'<text x="20" y="24" font-weight="bold">{html.escape(title)}</text>']
    for tick in (highest * k / 5 for k in range(6)):
        out.append(f'<path d="M{x(tick):.1f} 40V{height - 10}" stroke="#ddd"/><text fill="#666" '
                   f'x="{x(tick):.1f}" y="{height + 8}" text-anchor="middle">{tick:g}</text>')
    for k, (label, values) in enumerate(rows):
        y, mean = 60 + step * k, statistics.mean(values)
        out.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">'
                   f'{html.escape(label)}</text><path d="M{x(mean):.1f} {y - 10}v20" '
                   f'stroke="#d62728" stroke-width="2"/>')
        out += [f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="#1f77b4" fill-opacity="0.6"/>'
                for value in values]
    return "\n".join(out) + f'<text x="{left}" y="{height + 28}">{html.escape(axis)}</text></svg>\n'


def strategies():
    found = {}
    for row in lab.recorded(corpus="built-in", network="teacher"):
        label = " ".join([row["strategy"], *row["flags"][1:]])  # of --adapt_method its value
        found.setdefault(label, []).append(100 * row["test"])
    rows = sorted(found.items(), key=lambda item: statistics.mean(item[1]))
    highest = max(max(values) for _, values in rows)
    write("strategies.svg", dots("Built-in corpus: strategies", rows, 5 * (int(highest) // 5 + 1),
                                 "test WER in %: a dot per seed, a line at the mean"))


def epochs():
    lines, names = [], ("full", "progressive, by 0.3", "progressive")
    for colour, name in zip(wer.COLOURS, names):
        if curves := [row["curve"] for row in built_in(strategy=name, network="teacher")]:
            lines.append((colour, "", [(k, 100 * statistics.mean(some))
                                       for k, some in enumerate(zip(*curves))]))
    starts = freeze.UnfreezeSchedule(freeze.LAYERS, freeze.EPOCHS, unfreeze_by=0.3).starts
    title = "Dev WER in %, mean over seeds: full (blue), progressive by 0.3 (red), equal (green)"
    write("epochs.svg", wer.chart([(title, lines)], (*starts, freeze.EPOCHS - 1),
                                  "epoch; stages of progressive unfreezing by 0.3", starts))


def sizes():
    rows = []
    for network, parameters in PARAMETERS.items():
        values = [100 * row["test"] for row in built_in(strategy="full", network=network)]
        if values:
            rows.append((f"{network}, {parameters / 1e6:.2f} M parameters", values))
    highest = max(max(values) for _, values in rows)
    write("sizes.svg", dots("Built-in corpus: size and WER", rows, 5 * (int(highest) // 5 + 1),
                            "test WER in %: a dot per seed, a line at the mean"))


def transfer():
    found = {}
    for row in lab.recorded(corpus="wlasl25b"):
        label = f"{row['train_sentences']}: {row['strategy']}, {row['weights']}"
        found.setdefault((row["train_sentences"], label), []).append(100 * row["dev_last"])
    rows = sorted(found.items(), key=lambda item: (item[0][0], statistics.mean(item[1])))
    write("transfer.svg", dots("wlasl25b: number of train sentences, strategy, weights",
                               [(label, values) for (_, label), values in rows], 100,
                               "dev WER in % at the last epoch: a dot per seed, a line at the mean"))


def posteriors(args):
    sentence = next(s for s in teacher.read_split(None, "test") if s.id == args.sentence)
    panels = {}
    for path, model_class in ((args.teacher, teacher.I3DTeacher), (args.student, distill.Student)):
        model, content = adapt.load_model(path, model_class)
        loader = teacher.make_loader([sentence], content["vocabulary"], len(model.feature_mean),
                                     argparse.Namespace(seed=0, batch_size=1, num_workers=0,
                                                        device="cpu"))
        found = teacher.evaluate(model, loader, content["vocabulary"])
        panels[f"{model.kind}: {' '.join(found.hypotheses[0])}"] = found.log_probs[0]
    write("posteriors.svg", wer.posteriors_svg(panels, content["vocabulary"],
                                               model.temporal_stride, sentence.glosses))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--sentence", default="test-0003")
    args = parser.parse_args()
    strategies(), epochs(), sizes(), transfer()
    if args.teacher and args.student:
        posteriors(args)


if __name__ == "__main__":
    main()
