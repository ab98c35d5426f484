"""Landmarks of videos: pose and hands of every frame, as the features that teacher.py reads.

    $ python3 -m venv mp && mp/bin/pip install mediapipe==0.10.21
    $ mp/bin/python .lab/landmarks.py videos/*.mp4 --output DIR/features/train
    $ mp/bin/python .lab/landmarks.py --columns
    $ python teacher.py --predict DIR/features/train/NAME.npy

Each video becomes DIR/{its name without suffix}.npy, [T, D] float32, D = 112. This is the one
script with packages of its own, so they get a virtual environment of their own: mediapipe brings
OpenCV and holds numpy below 2. The version is pinned because 0.10.21 (Python 3.9 to 3.12) still
ships its models; 0.10.30 and all later releases ship none and want downloads.

Columns, x before y for each point, names by --columns:

      0-25   pose, 13 points: nose, eyes, ears, mouth, shoulders, elbows, wrists; left before right
     26-67   left hand, 21 points: wrist, then thumb to little finger, each from base to tip
     68-109  right hand, likewise
    110-111  1 where the left (right) hand was found in the frame, 0 where it is held

x grows to the right of the picture and y downwards, in shoulder widths of the frame from the middle
between its shoulders, so that the signer's place and distance do not matter; where no shoulders are
found, the last known ones count. Left is the signer's own left, if the video is not mirrored. z is
left out: from one camera it is a guess, and it has other origins in the hands than in the pose.
Hips and legs are left out because signing videos end above them. A part that is not found holds its
last known values, before its first detection the first ones; a hand that is found in no frame is
zeros. T is the video's own number of frames, not resampled: train and predict at one frame rate.
"""

import argparse
import os
import sys
import time
from pathlib import Path

try:
    import cv2
    import numpy as np
    from mediapipe import solutions
    IMPORT_ERROR = None
except Exception as error:  # in a mixed environment they raise whatever they run into
    IMPORT_ERROR = error

# The points of the pose, with MediaPipe's numbers.
POSE = {"nose": 0, "left_eye": 2, "right_eye": 5, "left_ear": 7, "right_ear": 8, "mouth_left": 9,
        "mouth_right": 10, "left_shoulder": 11, "right_shoulder": 12, "left_elbow": 13,
        "right_elbow": 14, "left_wrist": 15, "right_wrist": 16}
HAND = ("wrist", "thumb_cmc", "thumb_mcp", "thumb_ip", "thumb_tip",
        *(f"{finger}_{joint}" for finger in ("index", "middle", "ring", "little")
          for joint in ("mcp", "pip", "dip", "tip")))  # MediaPipe's order
POINTS = (*POSE, *(f"{side}_hand_{name}" for side in ("left", "right") for name in HAND))
PARTS = (slice(0, 13), slice(13, 34), slice(34, 55))  # points of pose, left hand, right hand
COLUMNS = (*(f"{point}_{axis}" for point in POINTS for axis in "xy"),
           "left_hand_found", "right_hand_found")
MIN_SHOULDER_WIDTH = 1.0  # pixels; less counts as not found


def progress(text=""):
    """Show a line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\033[K{text}\r", end="", file=sys.stderr, flush=True)


def frame_points(holistic, frame):
    """[P, 2] pixels of the points of a frame, NaN for a part that is not found."""
    found = holistic.process(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    points = np.full((len(POINTS), 2), np.nan)
    for part, some in zip(PARTS, (found.pose_landmarks, found.left_hand_landmarks,
                                  found.right_hand_landmarks)):
        if some:
            numbers = POSE.values() if part is PARTS[0] else range(len(HAND))
            points[part] = [(some.landmark[i].x, some.landmark[i].y) for i in numbers]
    return points * (frame.shape[1], frame.shape[0])  # MediaPipe's are fractions of width, height


def read_video(path):
    """([T, P, 2] pixels, frames per second, frames by the file's header). ValueError."""
    if not path.is_file():
        raise ValueError("no such file, expected a video")
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not video.isOpened():
        raise ValueError("cannot be opened, expected a video (mp4, avi, ...)")
    declared, points, started = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), [], time.monotonic()
    with solutions.holistic.Holistic() as holistic:  # a new one: it tracks from frame to frame
        while (frame := video.read()[1]) is not None:
            points.append(frame_points(holistic, frame))
            speed = len(points) / (time.monotonic() - started)
            progress(f"{path.name}  {len(points)}/{declared if declared > 0 else '?'} frames  "
                     f"{speed:.1f} frames/s")
    progress()
    if not points:
        raise ValueError("no frame can be read, expected a video")
    return np.stack(points), video.get(cv2.CAP_PROP_FPS), declared


def hold(values):
    """[T, ...] with each frame that has NaN replaced by the last known one, before the first known
    one by that one; all zeros if none is known."""
    known = np.flatnonzero(np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if not len(known):
        return np.zeros_like(values)
    last = np.searchsorted(known, np.arange(len(values)), side="right") - 1
    return values[known[np.maximum(last, 0)]]


def make_features(points):
    """[T, P, 2] pixels -> [T, D] float32. ValueError where no frame has shoulders."""
    left, right = (points[:, POINTS.index(f"{side}_shoulder")] for side in ("left", "right"))
    width = np.linalg.norm(left - right, axis=1)                     # [T]
    scale = np.column_stack([(left + right) / 2, width])             # [T, 3] middle x, y, width
    scale[~(width >= MIN_SHOULDER_WIDTH)] = np.nan
    if np.isnan(scale).all():
        raise ValueError(f"no shoulders found in any of {len(points)} frames, expected a person")
    scale = hold(scale)[:, None]                                     # [T, 1, 3]
    points = (points - scale[..., :2]) / scale[..., 2:]              # [T, P, 2] shoulder widths
    found = np.isfinite(points[:, [part.start for part in PARTS[1:]], 0])  # [T, 2] hands
    held = [hold(points[:, part]).reshape(len(points), -1) for part in PARTS]
    return np.concatenate([*held, found], axis=1).astype(np.float32)  # [T, D]


def convert(path, target):
    """Write a video's features and print its final line. ValueError."""
    points, rate, declared = read_video(path)
    features = make_features(points)
    np.save(target, features)
    left, right = 100 * features[:, -2:].mean(axis=0)
    header = f" (its header says {declared})" if 0 < declared != len(features) else ""
    print(f"{path.name}: {len(features)} frames{header} at {rate:.4g} frames/s, left hand found in "
          f"{left:.0f}%, right hand in {right:.0f}%: {target}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="*", metavar="VIDEO", type=Path)
    parser.add_argument("--output", metavar="DIR", type=Path, help="directory of the .npy files")
    parser.add_argument("--columns", action="store_true", help="print the columns' names")
    args = parser.parse_args()
    if args.columns:
        print("\n".join(f"{i:3} {name}" for i, name in enumerate(COLUMNS)))
        return
    if not (args.videos and args.output):
        parser.error("expected VIDEO... --output DIR, or --columns")
    if IMPORT_ERROR:
        reason = str(IMPORT_ERROR).partition("\n")[0]
        parser.exit(1, f"{parser.prog}: {reason}; needs: pip install mediapipe==0.10.21\n")
    targets = [args.output / f"{path.stem}.npy" for path in args.videos]
    if twice := [str(target) for target in targets if targets.count(target) > 1]:
        parser.exit(2, f"{parser.prog}: two videos would be written to {twice[0]}\n")
    # The libraries' own log goes to file descriptor 2 and no setting stops it.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    status = 0
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for path, target in zip(args.videos, targets):
            try:
                convert(path, target)
            except ValueError as error:
                print(f"{parser.prog}: {path}: {error}", file=sys.stderr)
                status = 2
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        progress()
        parser.exit(130, f"{parser.prog}: interrupted\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
