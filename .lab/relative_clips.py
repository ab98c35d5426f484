"""The WLASL clips' image coordinates as landmarks.py would have written them.

    $ python .lab/relative_clips.py wlasl_clips relative/wlasl_clips

Columns of a clip [T, 170]: 11 points of the pose as x, y, z, visibility, of which the
first seven (nose, shoulders, elbows, wrists) are taken; then x, y, z of 21 points per
hand, zeros where the hand is missing. Written: [T, 100], relative to the shoulders,
missing hands held and marked.
"""

import argparse
from pathlib import Path

import corpora
import landmarks
import numpy as np

PIXELS = 256  # per unit of the coordinates; shoulders must be a pixel apart at least
SHOULDERS = (1, 2)  # points of the left and the right one
PARTS = (slice(0, 7), slice(7, 28), slice(28, 49))  # points of pose, left, right hand
POSE_COLUMNS = 44  # of which the first 28 are the seven points
COLUMNS = 170


def read_points(path):
    """Read a clip's points: [T, 49, 2], NaN for a hand that is missing.

    Raises:
        ValueError: an array of another shape.
    """
    columns = np.load(path).astype(np.float64)
    if columns.ndim != 2 or columns.shape[1] != COLUMNS:
        raise ValueError(f"{path}: {list(columns.shape)}, expected [T, {COLUMNS}]")
    pose = columns[:, :28].reshape(-1, 7, 4)[..., :2]  # [T, 7, 2]
    hands = columns[:, POSE_COLUMNS:].reshape(-1, 2, 21, 3)[..., :2]  # [T, 2, 21, 2]
    hands[(hands == 0).all(axis=(2, 3))] = np.nan
    return np.concatenate((pose, hands.reshape(-1, 42, 2)), axis=1)


def convert(args):
    """Convert all clips of a folder.

    Args:
        args: of the command line: source, target.

    Raises:
        ValueError: no clips, other arrays, or a target that is there.
    """
    paths = sorted(args.source.glob("*.npy"))
    if not paths:
        raise ValueError(f"{args.source}: no .npy files, expected clips [T, {COLUMNS}]")
    corpora.refuse_existing(args.target)
    args.target.mkdir(parents=True)
    for path in paths:
        points = PIXELS * read_points(path)
        features = landmarks.make_features(points, SHOULDERS, PARTS)
        np.save(args.target / path.name, features.astype(np.float16))


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    corpora.run(parser, convert)


if __name__ == "__main__":
    main()
