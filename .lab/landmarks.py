"""Landmarks of videos: pose and hands of every frame, as features for teacher.py.

    $ python3 -m venv mp && mp/bin/pip install mediapipe==0.10.21
    $ mp/bin/python .lab/landmarks.py videos/*.mp4 --output DIR/features/train
    $ mp/bin/python .lab/landmarks.py --columns
    $ python teacher.py --predict DIR/features/train/NAME.npy

Each video becomes DIR/{its name without suffix}.npy, [T, D] float32, D = 112.
MediaPipe gets a virtual environment of its own, because it brings OpenCV and holds
numpy below 2. The version is pinned because 0.10.21 (Python 3.9 to 3.12) still ships
its models; 0.10.30 and all later releases ship none and download them.

Columns, x before y for each point, names by --columns:

      0-25   pose, 13 points: nose, eyes, ears, mouth, shoulders, elbows, wrists; left
             before right
     26-67   left hand, 21 points: wrist, then thumb to little finger, each from base
             to tip
     68-109  right hand, likewise
    110-111  1 where the left (right) hand was found in the frame, 0 where it is held

x grows to the right of the picture and y downwards. Their unit is the shoulder width of
the frame and their origin the middle between its shoulders, so that the signer's place
and distance do not matter; where no shoulders are found, the last known ones count.
Left is the signer's own left, if the video is not mirrored. z is left out: one camera
can only guess it, and its origin in the hands is not that in the pose. Hips and legs
are left out because signing videos end above them. A part that is not found holds its
last known values, before its first detection the first ones; a hand that is found in no
frame is zeros. T is the video's own number of frames, not resampled: train and predict
at one frame rate.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

try:
    import cv2
    from mediapipe import solutions

    IMPORT_ERROR = None
except Exception as error:  # in a mixed environment they raise whatever they run into
    IMPORT_ERROR = error

# The points of the pose, with MediaPipe's numbers.
POSE = {
    "nose": 0,
    "left_eye": 2,
    "right_eye": 5,
    "left_ear": 7,
    "right_ear": 8,
    "mouth_left": 9,
    "mouth_right": 10,
    "left_shoulder": 11,
    "right_shoulder": 12,
    "left_elbow": 13,
    "right_elbow": 14,
    "left_wrist": 15,
    "right_wrist": 16,
}
# The points of a hand in MediaPipe's order.
THUMB = ("thumb_cmc", "thumb_mcp", "thumb_ip", "thumb_tip")
FINGERS = ("index", "middle", "ring", "little")
JOINTS = ("mcp", "pip", "dip", "tip")
SIDES = ("left", "right")
PARTS = (slice(0, 13), slice(13, 34), slice(34, 55))  # points of pose, left, right hand
MIN_SHOULDER_WIDTH = 1.0  # pixels; less counts as not found


def hand_points():
    """Return the names of a hand's points in MediaPipe's order."""
    names = ["wrist"] + list(THUMB)
    for finger in FINGERS:
        names += [f"{finger}_{joint}" for joint in JOINTS]
    return names


def all_points():
    """Return the names of all points in the order of the columns."""
    names = list(POSE)
    for side in SIDES:
        names += [f"{side}_hand_{name}" for name in hand_points()]
    return names


def column_names():
    """Return the names of the D columns."""
    names = []
    for point in all_points():
        names += [f"{point}_x", f"{point}_y"]
    return names + [f"{side}_hand_found" for side in SIDES]


POINTS = all_points()
SHOULDERS = (POINTS.index("left_shoulder"), POINTS.index("right_shoulder"))


def show_progress(text=""):
    """Show a line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\033[K{text}\r", end="", file=sys.stderr, flush=True)


def frame_points(holistic, frame):
    """Return the points of a frame: [P, 2] pixels, NaN for a part that is not found."""
    detected = holistic.process(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    points = np.full((len(POINTS), 2), np.nan)
    hand_numbers = range(len(hand_points()))
    parts = (
        (detected.pose_landmarks, POSE.values()),
        (detected.left_hand_landmarks, hand_numbers),
        (detected.right_hand_landmarks, hand_numbers),
    )
    for part, (landmarks, numbers) in zip(PARTS, parts, strict=True):
        if landmarks is None:
            continue
        chosen = [landmarks.landmark[number] for number in numbers]
        points[part] = [(point.x, point.y) for point in chosen]
    height, width = frame.shape[:2]
    return points * (width, height)  # MediaPipe's are shares of the picture


def read_video(path):
    """Find the points in all frames of a video.

    Returns:
        [T, P, 2] pixels, frames per second, and the number of frames that the file's
        header declares.

    Raises:
        ValueError: no such file, or one without a frame that can be read.
    """
    if not path.is_file():
        raise ValueError("no such file, expected a video")
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not video.isOpened():
        raise ValueError("cannot be opened, expected a video (mp4, avi, ...)")
    declared = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    points = []
    started = time.monotonic()
    with solutions.holistic.Holistic() as holistic:  # a new one: it tracks over frames
        while True:
            readable, frame = video.read()
            if not readable:
                break
            points.append(frame_points(holistic, frame))
            speed = len(points) / (time.monotonic() - started)
            total = declared if declared > 0 else "?"
            show_progress(
                f"{path.name}  {len(points)}/{total} frames  {speed:.1f} frames/s"
            )
    show_progress()
    if not points:
        raise ValueError("no frame can be read, expected a video")
    return np.stack(points), video.get(cv2.CAP_PROP_FPS), declared


def hold(values):
    """Replace each frame that has NaN by the last known one: [T, ...] -> [T, ...].

    Frames before the first known one become that one; if none is known, all are zeros.
    """
    finite = np.isfinite(values).reshape(len(values), -1)
    known = np.flatnonzero(finite.all(axis=1))
    if len(known) == 0:
        return np.zeros_like(values)
    last = np.searchsorted(known, np.arange(len(values)), side="right") - 1
    return values[known[np.maximum(last, 0)]]


def make_features(points, shoulders=SHOULDERS, parts=PARTS):
    """Express points relative to the shoulders, with missing parts held.

    Args:
        points: [T, P, 2] pixels, NaN for a part that is not found.
        shoulders: indices of the left and the right shoulder's point.
        parts: slices of the points of pose, left hand and right hand.

    Returns:
        [T, 2 P + 2] float32 in shoulder widths, at the end whether each hand was found.

    Raises:
        ValueError: no frame has shoulders.
    """
    left = points[:, shoulders[0]]  # [T, 2]
    right = points[:, shoulders[1]]  # [T, 2]
    width = np.linalg.norm(left - right, axis=1)  # [T]
    scale = np.column_stack([(left + right) / 2, width])  # [T, 3]: middle x, y, width
    scale[~(width >= MIN_SHOULDER_WIDTH)] = np.nan  # also where the width is NaN
    if np.isnan(scale).all():
        raise ValueError(
            f"no shoulders found in any of {len(points)} frames, expected a person"
        )
    scale = hold(scale)[:, None]  # [T, 3] -> [T, 1, 3]
    points = (points - scale[..., :2]) / scale[..., 2:]
    first_points = [part.start for part in parts[1:]]
    hands_found = np.isfinite(points[:, first_points, 0])  # [T, 2]
    columns = [hold(points[:, part]).reshape(len(points), -1) for part in parts]
    return np.concatenate(columns + [hands_found], axis=1).astype(np.float32)


def convert(path, target):
    """Write a video's features and print a line about them. ValueError if unusable."""
    points, rate, declared = read_video(path)
    features = make_features(points)
    np.save(target, features)
    left, right = 100 * features[:, -2:].mean(axis=0)
    header = ""
    if 0 < declared != len(features):
        header = f" (its header says {declared})"
    print(
        f"{path.name}: {len(features)} frames{header} at {rate:.4g} frames/s, left "
        f"hand found in {left:.0f}%, right hand in {right:.0f}%: {target}",
        flush=True,
    )


def convert_all(program, videos, targets):
    """Convert videos; one that is unusable is one line on stderr, the others go on.

    Returns:
        The exit status: 2 where a video was unusable, else 0.
    """
    status = 0
    for path, target in zip(videos, targets, strict=True):
        try:
            convert(path, target)
        except ValueError as error:
            print(f"{program}: {path}: {error}", file=sys.stderr)
            status = 2
    return status


def silence_libraries():
    """Keep stderr for this script's own messages.

    MediaPipe's log goes to file descriptor 2, and no setting stops it.
    """
    own_stderr = os.dup(2)
    sys.stderr = os.fdopen(own_stderr, "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main():
    """Convert the videos that the command line names, or print the columns' names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="*", metavar="VIDEO", type=Path)
    parser.add_argument("--output", metavar="DIR", type=Path, help="for the .npy files")
    parser.add_argument("--columns", action="store_true", help="print columns' names")
    args = parser.parse_args()
    if args.columns:
        for number, name in enumerate(column_names()):
            print(f"{number:3} {name}")
        return
    if not args.videos or args.output is None:
        parser.error("expected VIDEO... --output DIR, or --columns")
    if IMPORT_ERROR is not None:
        reason = str(IMPORT_ERROR).partition("\n")[0]
        parser.exit(
            1, f"{parser.prog}: {reason}; needs: pip install mediapipe==0.10.21\n"
        )
    targets = [args.output / f"{path.stem}.npy" for path in args.videos]
    for number, target in enumerate(targets):
        if target in targets[:number]:
            parser.exit(2, f"{parser.prog}: two videos would be written to {target}\n")
    silence_libraries()
    status = 0
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        status = convert_all(parser.prog, args.videos, targets)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        show_progress()
        parser.exit(130, f"{parser.prog}: interrupted\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
