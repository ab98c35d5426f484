"""Made-up files in the layout of Phoenix-2014's archive and of MSKA's feature files.

    $ python .lab/phoenix_archive.py FOLDER [--share 0.1]

The commands of RESULTS.md, "Phoenix-2014 in ten lines", are tried on them. FOLDER gets
phoenix2014-release/phoenix-2014-multisigner/ with annotations/manual/ and evaluation/,
and the gzipped pickles phoenix-2014.{train,dev,test}, keypoints [T, 133, 3]. Ids have
the archive's form, 5,671 / 540 / 629 of them or a share; some glosses of train need the
official clean-up. Each gloss moves the points in its own way, so that something can be
learned, but WER means nothing here. Nothing of the real corpus is in it.
"""

import argparse
import datetime
import gzip
import pickle
from pathlib import Path

import corpora
import lab  # noqa: F401 (puts the project on the path)
import numpy as np
import phoenix_scale
import torch

from wer import PHOENIX_CORRUPT_IDS, clean_phoenix_annotation

RELEASE = "phoenix2014-release/phoenix-2014-multisigner"
POINTS = 133
WIDTH, HEIGHT = 210, 260  # of the picture in pixels
MOVEMENT = 20  # pixels, standard deviation of a gloss's largest displacements
NOISE = 2  # pixels
PAUSE_FRAMES = 6  # before the first gloss
# The most frequent ones. The clean-up changes all but __ON__, __OFF__, IX, REGEN, WOLKE
# and SONNE, and joins B R.
FREQUENT = ["__ON__", "__OFF__", "IX", "REGEN", "loc-NORD", "WOLKE", "__EMOTION__"]
FREQUENT += ["SONNE", "ZEIGEN", "S0NNE", "poss-MEIN", "__PU__", "lh-WIND"]
FREQUENT += ["MORGEN-PLUSPLUS", "B", "R", "NORDRAUM"]
CONSONANTS = "BDFGHKLMNPRSTVWZ"
VOWELS = "AEIOU"
FIRST_DAY = datetime.date(2009, 8, 1)
SENTENCES_PER_DAY = 12
STM_TIMES = "0.0 1.79769e+308"


def make_vocabulary():
    """Return phoenix_scale.GLOSSES glosses, the frequent ones first."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    words = [first + second for first in syllables for second in syllables]
    return FREQUENT + words[: phoenix_scale.GLOSSES - len(FREQUENT)]


def make_id(number):
    """Return the id of a sentence, as 01April_2010_Thursday_heute_default-3."""
    day = FIRST_DAY + datetime.timedelta(days=number // SENTENCES_PER_DAY)
    programme = "tagesschau" if day.day % 2 else "heute"
    date = day.strftime("%d%B_%Y_%A")
    return f"{date}_{programme}_default-{number % SENTENCES_PER_DAY}"


def draw_glosses(generator, frames):
    """Draw a sentence's gloss numbers, frequent ones by Zipf's law."""
    weights = 1 / np.arange(1, phoenix_scale.GLOSSES + 1)
    count = max(1, (frames - PAUSE_FRAMES) // phoenix_scale.FRAMES_PER_GLOSS)
    return generator.choice(len(weights), size=count, p=weights / weights.sum())


def draw_keypoints(generator, frames, glosses, movements):
    """Draw [frames, POINTS, 3] float32: x, y in pixels, confidence."""
    points = np.empty((frames, POINTS, 3))
    points[..., 0] = WIDTH / 2
    points[..., 1] = HEIGHT / 2
    edges = np.linspace(PAUSE_FRAMES, frames, len(glosses) + 1).astype(int)
    for gloss, start, end in zip(glosses, edges[:-1], edges[1:], strict=True):
        phase = np.sin(np.linspace(0, np.pi, end - start))  # there and back
        points[start:end, :, :2] += phase[:, None, None] * movements[gloss]
    points[..., :2] += generator.normal(0, NOISE, (frames, POINTS, 2))
    points[..., 2] = generator.uniform(0.5, 1, (frames, POINTS))
    return points.astype(np.float32)


def draw_frames(generator):
    """Draw a sentence's number of frames."""
    drawn = generator.normal(phoenix_scale.FRAMES_MEAN, phoenix_scale.FRAMES_STD)
    return int(np.clip(drawn, phoenix_scale.FEWEST_FRAMES, phoenix_scale.MOST_FRAMES))


def write_split(folder, split, ids, vocabulary, movements, generator):
    """Write a split's annotations, its ground truth (not of train) and its pickle."""
    lines = ["id|folder|signer|annotation"]
    truths = []
    rows = {}
    for number, name in enumerate(ids):
        frames = draw_frames(generator)
        glosses = draw_glosses(generator, frames)
        words = " ".join(vocabulary[gloss] for gloss in glosses)
        if split != "train":  # only train's annotations need the clean-up
            words = " ".join(clean_phoenix_annotation(words)) or vocabulary[0]
        signer = f"Signer{number % 9 + 1:02d}"
        lines.append(f"{name}|{name}/1/*.png|{signer}|{words}")
        truths.append(f"{name} 1 {signer} {STM_TIMES} {words}")
        if name in PHOENIX_CORRUPT_IDS:
            continue
        keypoints = draw_keypoints(generator, frames, glosses, movements)
        key = f"{split}/{name}"
        row = {"name": key, "gloss": words, "text": "", "num_frames": frames}
        rows[key] = row | {"keypoint": torch.from_numpy(keypoints)}
    release = folder / RELEASE
    annotations = release / "annotations/manual" / f"{split}.corpus.csv"
    annotations.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if split != "train":
        truth = release / "evaluation" / f"phoenix2014-groundtruth-{split}.stm"
        truth.write_text("\n".join(truths) + "\n", encoding="utf-8")
    with gzip.open(folder / f"phoenix-2014.{split}", "wb", compresslevel=1) as file:
        pickle.dump(rows, file)


def write(args):
    """Write the archive and the feature files."""
    release = args.folder / RELEASE
    (release / "annotations/manual").mkdir(parents=True)
    (release / "evaluation").mkdir()
    generator = np.random.default_rng(0)
    vocabulary = make_vocabulary()
    movements = generator.normal(0, MOVEMENT, (len(vocabulary), POINTS, 2))
    first = 0
    for split, sentences in phoenix_scale.SENTENCES.items():
        count = max(1, round(args.share * sentences))
        ids = [make_id(number) for number in range(first, first + count)]
        first += count
        if split == "train":
            ids += sorted(PHOENIX_CORRUPT_IDS)
        write_split(args.folder, split, ids, vocabulary, movements, generator)


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the sentences")
    corpora.run(parser, write)


if __name__ == "__main__":
    main()
