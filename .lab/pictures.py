r"""The pictures of README and RESULTS.md.

    $ python .lab/pictures.py strategies     # .lab/strategies.svg, from the records
    $ python .lab/pictures.py epochs         # .lab/epochs.svg, from the records
    $ python .lab/pictures.py posteriors OUT.svg --sentence dev-0003 --split dev \
          CHECKPOINT [CHECKPOINT ...]

`strategies`: test WER on the built-in corpus, a dot per seed and a line at the mean.
`epochs`: dev WER over the epochs with the stages of progressive unfreezing.
`posteriors`: what networks believe of one sentence over time, a panel per checkpoint of
teacher.py or distill.py: a line per gloss whose probability reaches MIN_PROBABILITY in
some output frame, grey for the blank. A gloss is named above the chart where it is the
most probable class, any other one at its peak. The sentence comes from the first
checkpoint's corpus, or from --data_dir.
"""

import argparse
import itertools
import operator
import statistics
from pathlib import Path
from typing import NamedTuple

import lab
import numpy as np
import strategies
import torch

import adapt
import distill
import freeze
import teacher
import wer

PALETTE = (
    teacher.BLUE,
    teacher.RED,
    "#2ca02c",
    "#9467bd",
    "#c26a00",
    "#0b8a99",
    "#8c564b",
    "#c2309b",
)
BLANK_COLOUR = "#999999"

# ------------------------------------------------------------ pictures of the records

DOTS_LEFT = 290  # pixels, where the x axis begins
DOTS_WIDTH = 520
ROW_HEIGHT = 30


def dots_svg(title, rows, x_label):
    """Draw a row of dots per label, with a line at their mean, as SVG.

    Args:
        title: of the picture.
        rows: label -> values from 0 on.
        x_label: what the values are.
    """
    highest = max(max(values) for values in rows.values())
    x_ticks = teacher.round_ticks(highest)

    def pixel_x(value):
        return DOTS_LEFT + DOTS_WIDTH * value / x_ticks[-1]

    bottom = 50 + ROW_HEIGHT * len(rows)
    elements = [teacher.svg_text(20, 24, title, 'font-weight="bold"')]
    for tick in x_ticks:
        x = pixel_x(tick)
        elements.append(f'<path d="M{x:.1f} 40V{bottom}" stroke="#ddd"/>')
        style = 'fill="#666" text-anchor="middle"'
        elements.append(teacher.svg_text(x, bottom + 18, f"{tick:g}", style))
    for number, (label, values) in enumerate(rows.items()):
        y = 60 + ROW_HEIGHT * number
        mean_x = pixel_x(statistics.mean(values))
        elements.append(
            teacher.svg_text(DOTS_LEFT - 12, y + 4, label, 'text-anchor="end"')
        )
        elements.append(
            f'<path d="M{mean_x:.1f} {y - 10}v20" stroke="{teacher.RED}" '
            f'stroke-width="2"/>'
        )
        for value in values:
            elements.append(
                f'<circle cx="{pixel_x(value):.1f}" cy="{y}" r="4" '
                f'fill="{teacher.BLUE}" fill-opacity="0.6"/>'
            )
    elements.append(teacher.svg_text(DOTS_LEFT, bottom + 38, x_label))
    width = DOTS_LEFT + DOTS_WIDTH + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{bottom + 50}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def built_in_teachers():
    """Return label -> recorded runs of teachers on the built-in corpus."""
    rows = lab.recorded(corpus="built-in", network="teacher")
    return strategies.group_rows(rows, strategies.label_of)


def strategies_svg():
    """Draw the test WER of each strategy, as SVG."""
    wers = {
        label: [100 * row["test"] for row in rows]
        for label, rows in built_in_teachers().items()
    }
    labels = sorted(wers, key=lambda label: statistics.mean(wers[label]))
    return dots_svg(
        "Built-in corpus: what trains, and the adaptation method if not temporal_mean",
        {label: wers[label] for label in labels},
        "test WER in percent: a dot per seed, a line at the mean",
    )


def epochs_svg():
    """Draw dev WER over the epochs of full and progressive fine-tuning, as SVG."""
    teachers = built_in_teachers()
    lines = []
    labels = ("full", "progressive, by 0.15", "progressive")
    for colour, label in zip(PALETTE, labels, strict=False):
        curves = [row["curve"] for row in teachers[label]]
        means = [statistics.mean(wers) for wers in zip(*curves, strict=True)]
        points = [(epoch, 100 * wer) for epoch, wer in enumerate(means)]
        lines.append(teacher.Line(label, colour, points))
    last = freeze.EPOCHS - 1
    schedule = freeze.UnfreezeSchedule(freeze.LAYERS, freeze.EPOCHS)
    bands = [(start, f"stage {k}") for k, start in enumerate(schedule.starts)]
    panel = teacher.Panel("Built-in corpus: dev WER in percent, mean over seeds", lines)
    x_label = 'epoch; shaded: the equally long stages of "progressive"'
    return teacher.chart_svg([panel], x_ticks_to(last), x_label, bands)


def x_ticks_to(last):
    """Return round numbers from 0 on, and at the end `last` itself."""
    return [x for x in teacher.round_ticks(last, 12) if x < last] + [last]


# ------------------------------------------------------------ what networks believe

MIN_PROBABILITY = 0.2  # in some output frame, for a gloss to have a line
NAME_PIXELS = 10.5  # per letter of a gloss's name
FIRST_CHART = 50  # pixels, where teacher.chart_svg begins the first chart
MODELS = {"teacher": teacher.I3DTeacher, "student": distill.Student}


class Belief(NamedTuple):
    """What a network believes of a sentence."""

    name: str  # of the network
    probabilities: np.ndarray  # [T', V]
    vocabulary: list  # V glosses, the blank first
    stride: int  # frames per output frame
    hypothesis: tuple  # glosses

    def best_glosses(self):
        """Return (gloss, its middle in frames) where a gloss is the best class."""
        best = self.probabilities.argmax(axis=1).tolist()
        glosses = []
        runs = itertools.groupby(enumerate(best), key=operator.itemgetter(1))
        for index, run in runs:
            steps = [step for step, _ in run]
            if index != 0:
                middle = self.stride * statistics.mean(steps)
                glosses.append((self.vocabulary[index], middle))
        return glosses


def load(path):
    """Read a checkpoint of teacher.py or distill.py: the model, the file's content."""
    kind = adapt.load_file(path).get("model")
    if kind not in MODELS:
        raise ValueError(f"{path}: not a checkpoint of teacher.py or distill.py")
    return teacher.load_model(path, MODELS[kind])


def find_sentence(sentence_id, split, data_dir, checkpoint):
    """Return a Sentence of the corpus that a checkpoint was trained on.

    Args:
        sentence_id: its id.
        split: train, dev or test.
        data_dir: where the corpus is; None: where it was in training.
        checkpoint: path.
    """
    _, content = load(checkpoint)
    config = teacher.Config(data_dir=data_dir)
    config = teacher.with_data_of(config, content, checkpoint)
    sentences = teacher.read_split(config.data_dir, split, config.clean_annotations)
    for sentence in sentences:
        if sentence.id == sentence_id:
            return sentence
    raise ValueError(f"--sentence {sentence_id}: expected an id of {split}")


@torch.inference_mode()
def believe(checkpoint, features):
    """Return the Belief of a checkpoint about features [T, D]."""
    model, content = load(checkpoint)
    batch = torch.from_numpy(features)[None]  # [1, T, D]
    logits, lengths = model(batch, torch.tensor([len(features)]))
    log_probs = logits.log_softmax(dim=2).numpy()  # [1, T', V]
    vocabulary = content["vocabulary"]
    hypothesis = wer.greedy_decode(log_probs, lengths.numpy(), vocabulary)[0]
    return Belief(
        model.kind, np.exp(log_probs[0]), vocabulary, model.temporal_stride, hypothesis
    )


def assign_colours(beliefs):
    """Return gloss -> colour of the glosses that have a line in some panel."""
    glosses = []
    for belief in beliefs:
        likely = np.flatnonzero(belief.probabilities.max(axis=0) >= MIN_PROBABILITY)
        glosses += [belief.vocabulary[index] for index in likely if index != 0]
    distinct = list(dict.fromkeys(glosses))
    return dict(zip(distinct, itertools.cycle(PALETTE), strict=False))


def belief_panel(belief, colours, reference):
    """Return the Panel of a Belief.

    Args:
        belief: a Belief.
        colours: gloss -> colour.
        reference: glosses.
    """
    lines = []
    for index, gloss in enumerate(belief.vocabulary):
        probabilities = belief.probabilities[:, index]
        if index == 0:
            colour = BLANK_COLOUR
        elif probabilities.max() >= MIN_PROBABILITY:
            colour = colours[gloss]
        else:
            continue
        points = [(belief.stride * k, float(p)) for k, p in enumerate(probabilities)]
        lines.append(teacher.Line("", colour, points))
    errors = wer.edit_distance(reference, belief.hypothesis)
    title = (
        f"{belief.name}: probability of each gloss, grey the blank; errors: {errors}"
    )
    return teacher.Panel(title, lines)


def gloss_labels(belief, colours, top, last):
    """Return SVG text elements that name the glosses of a chart, a list.

    A gloss that is the best class is named above the chart, to the right of the name
    before it where there is no room. Any other one is named at its peak.

    Args:
        belief: a Belief.
        colours: gloss -> colour.
        top: pixels, where the chart begins.
        last: the frame at the right end of the x axis.
    """

    def pixel_x(frame):
        return teacher.CHART_LEFT + teacher.CHART_WIDTH * frame / last

    elements = []
    named = set()
    free_from = teacher.CHART_LEFT  # pixels
    for gloss, frame in belief.best_glosses():
        half_width = NAME_PIXELS * len(gloss) / 2
        x = max(pixel_x(frame), free_from + half_width)
        colour = colours.get(gloss, "black")  # best with less than MIN_PROBABILITY
        style = f'fill="{colour}" text-anchor="middle" font-weight="bold"'
        elements.append(teacher.svg_text(x, top - 8, gloss, style))
        free_from = x + half_width
        named.add(gloss)
    for gloss in colours.keys() - named:
        if gloss not in belief.vocabulary:
            continue
        probabilities = belief.probabilities[:, belief.vocabulary.index(gloss)]
        peak = probabilities.max()
        if peak >= MIN_PROBABILITY:
            x = pixel_x(belief.stride * probabilities.argmax())
            y = top + teacher.CHART_HEIGHT * (1 - peak) - 5
            style = f'fill="{colours[gloss]}" text-anchor="middle"'
            elements.append(teacher.svg_text(x, y, gloss, style))
    return elements


def posteriors_svg(beliefs, reference, frames):
    """Draw what networks believe of one sentence over time, as SVG.

    Args:
        beliefs: a Belief per panel.
        reference: the sentence's glosses.
        frames: T.
    """
    last = max(1, frames - 1)
    colours = assign_colours(beliefs)
    panels = [belief_panel(belief, colours, reference) for belief in beliefs]
    x_label = f"input frame; signed: {' '.join(reference)}"
    picture = teacher.chart_svg(panels, x_ticks_to(last), x_label)
    labels = []
    for number, belief in enumerate(beliefs):
        top = teacher.PANEL_HEIGHT * number + FIRST_CHART
        labels += gloss_labels(belief, colours, top, last)
    return picture.replace("</svg>", "\n".join(labels + ["</svg>"]))


# ------------------------------------------------------------ the program


def make_parser():
    """Return the parser of the script's commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("strategies")
    commands.add_parser("epochs")
    posteriors = commands.add_parser("posteriors")
    posteriors.add_argument("output", metavar="OUT.svg", type=Path)
    posteriors.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+")
    posteriors.add_argument("--sentence", required=True, help="its id")
    posteriors.add_argument("--split", choices=teacher.SPLITS, default="dev")
    posteriors.add_argument("--data_dir", help="where the corpus is now")
    return parser


def main():
    """Draw the picture that the command line names."""
    parser = make_parser()
    args = parser.parse_args()
    path = lab.ROOT / ".lab" / f"{args.command}.svg"
    if args.command == "strategies":
        picture = strategies_svg()
    elif args.command == "epochs":
        picture = epochs_svg()
    else:
        path = args.output
        try:
            sentence = find_sentence(
                args.sentence, args.split, args.data_dir, args.checkpoints[0]
            )
            features = teacher.read_features(sentence.features)
            beliefs = [believe(checkpoint, features) for checkpoint in args.checkpoints]
        except ValueError as error:
            parser.exit(2, f"pictures.py: {error}\n")
        picture = posteriors_svg(beliefs, sentence.glosses, len(features))
    path.write_text(picture)
    print(path)


if __name__ == "__main__":
    main()
