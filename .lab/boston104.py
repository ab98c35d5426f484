"""RWTH-BOSTON-104 in the project's layout, from a clone of udacity/AIND-Recognizer.

    $ git clone https://github.com/udacity/AIND-Recognizer
    $ python .lab/boston104.py AIND-Recognizer corpora/boston104
    $ python teacher.py --data_dir corpora/boston104

The repository has 201 sentences of American Sign Language by three signers (Dreuw et
al., Interspeech 2007) as the published positions of hands and nose. Features [T, 8] are
the hands' positions relative to the nose in pixels (left x, y, right x, y), then their
velocities in pixels per frame, by central differences. A sentence's glosses are its
words in the order of their first frames. Of the official train sentences 21 in 161,
drawn once and for all, are dev.
"""

import argparse
import random
from pathlib import Path

import corpora
import numpy as np

HAND_COLUMNS = ("left-x", "left-y", "right-x", "right-y")
NOSE_COLUMNS = ("nose-x", "nose-y", "nose-x", "nose-y")
DEV_SHARE = 21 / 161  # of the official train sentences
DEV_SEED = 104  # of the draw


def integer(place, row, column):
    """Return the whole number in a column of a row."""
    try:
        return int(row[column])
    except ValueError as error:
        raise ValueError(
            f"{place}: {column} {row[column]!r}, expected a whole number"
        ) from error


def read_positions(path):
    """Read the hands' positions relative to the nose: video -> [T, 4] in pixels."""
    columns = HAND_COLUMNS + NOSE_COLUMNS[:2]
    frames = {}
    for place, row in corpora.read_table(path, ("video", "frame") + columns):
        video = integer(place, row, "video")
        hands = [integer(place, row, column) for column in HAND_COLUMNS]
        nose = [integer(place, row, column) for column in NOSE_COLUMNS]
        frames.setdefault(video, []).append(np.subtract(hands, nose))
    return {video: np.array(rows) for video, rows in frames.items()}


def read_signers(path):
    """Read who signs: video -> s1, s2 or s3."""
    names = {}
    for place, row in corpora.read_table(path, ("video", "speaker")):
        names[integer(place, row, "video")] = row["speaker"]
    numbers = corpora.number_signers(names.values())
    return {video: numbers[name] for video, name in names.items()}


def read_sentences(path):
    """Read sentences: video -> glosses, in the order of the file's first mention."""
    words = {}
    for place, row in corpora.read_table(path, ("video", "word", "startframe")):
        video = integer(place, row, "video")
        start = integer(place, row, "startframe")
        words.setdefault(video, []).append((start, row["word"]))
    sentences = {}
    for video, starts_and_words in words.items():
        starts_and_words.sort(key=lambda pair: pair[0])
        sentences[video] = tuple(word for _, word in starts_and_words)
    return sentences


def make_features(positions):
    """Return positions [T, 4] with their velocities: [T, 8] float32."""
    velocities = np.gradient(positions, axis=0)
    return np.concatenate((positions, velocities), axis=1).astype(np.float32)


def make_recordings(path, positions, signers):
    """Return the recordings of a file of words, in its order.

    Args:
        path: train_words.csv or test_words.csv.
        positions: video -> [T, 4].
        signers: video -> signer.

    Raises:
        ValueError: a broken file, or a video without signer or frames.
    """
    recordings = []
    for video, glosses in read_sentences(path).items():
        if video not in signers:
            raise ValueError(f"{path}: video {video}, expected one of speaker.csv")
        if len(positions.get(video, ())) < 2:
            raise ValueError(
                f"{path}: video {video}, expected one with at least 2 frames in "
                f"hands_condensed.csv"
            )
        features = make_features(positions[video])
        name = f"boston104-{video:03d}"
        recordings.append(corpora.Recording(name, signers[video], glosses, features))
    return recordings


def draw_dev(recordings):
    """Divide the official train recordings into train and dev."""
    count = max(1, round(DEV_SHARE * len(recordings)))
    drawn = random.Random(DEV_SEED).sample(range(len(recordings)), count)
    train = [r for k, r in enumerate(recordings) if k not in drawn]
    dev = [r for k, r in enumerate(recordings) if k in drawn]
    return train, dev


def convert(args):
    """Write the corpus."""
    corpora.refuse_existing(args.out)
    data = Path(args.clone, "data")
    positions = read_positions(data / "hands_condensed.csv")
    signers = read_signers(data / "speaker.csv")
    official_train = make_recordings(data / "train_words.csv", positions, signers)
    test = make_recordings(data / "test_words.csv", positions, signers)
    train, dev = draw_dev(official_train)
    corpora.write_corpus(args.out, {"train": train, "dev": dev, "test": test})


def main():
    """Convert a clone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", help="of github.com/udacity/AIND-Recognizer")
    parser.add_argument("out", help="new folder for the corpus")
    corpora.run(parser, convert)


if __name__ == "__main__":
    main()
