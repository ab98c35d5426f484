"""The WLASL clips' raw image coordinates as landmarks.py would have written them.

    $ python .lab/relative_clips.py wlasl_clips relative/wlasl_clips

Columns of a clip [T, 170]: 11 points of the pose as x, y, z, visibility, of which the first seven
(nose, shoulders, elbows, wrists) are taken; then x, y, z of 21 points per hand, zeros where the
hand is missing. Written: [T, 100], relative to the shoulders, missing hands held and marked.
"""

import sys
from pathlib import Path

import numpy as np

import landmarks

PIXELS = 256  # per unit of the coordinates; make_features asks for shoulders of a pixel at least
landmarks.np = np  # which it imports together with MediaPipe alone
landmarks.POINTS = ("nose", "left_shoulder", "right_shoulder", *["other"] * 46)
landmarks.PARTS = (slice(0, 7), slice(7, 28), slice(28, 49))

source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for path in sorted(source.glob("*.npy")):
    columns = np.load(path).astype(np.float64)
    pose = columns[:, :28].reshape(-1, 7, 4)[..., :2]                       # [T, 7, 2]
    hands = columns[:, 44:].reshape(-1, 2, 21, 3)[..., :2]                  # [T, 2, 21, 2]
    hands[(hands == 0).all(axis=(2, 3))] = np.nan
    points = np.concatenate((pose, hands.reshape(-1, 42, 2)), axis=1)       # [T, 49, 2]
    np.save(target / path.name, landmarks.make_features(PIXELS * points).astype(np.float16))
