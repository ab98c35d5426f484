"""Landmarks of videos: pose and hands of every frame, as features for teacher.py.

    $ python3 -m venv mp && mp/bin/pip install mediapipe==0.10.21
    $ mp/bin/python .lab/landmarks.py videos/*.mp4 --output DIR/features/train
    $ mp/bin/python .lab/landmarks.py --columns
    $ python teacher.py --predict DIR/features/train/NAME.npy
    $ mp/bin/pip install torch==2.13.0     # for the glosses of a camera or a long video
    $ mp/bin/python .lab/landmarks.py --live student.pt2 0
    $ mp/bin/python .lab/landmarks.py --live student.pt2 long.mp4

Each video becomes DIR/{its name without suffix}.npy, [T, D] float32, D = 112.
MediaPipe gets a virtual environment of its own, because it brings OpenCV and holds
numpy below 2. The version is pinned because 0.10.21 (Python 3.10 to 3.12) still ships
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

--live prints the glosses of a video, or of the camera with that number, while it is
read, each with the number of its first frame. A student that distill.py has exported
sees a window of frames that moves on by 8. What it says of a frame counts once the
window's middle has passed the frame, so that at least half a window follows it. So a
gloss is printed at most half a window and 8 frames after its first frame; in the first
window, which has to fill up first, at most a window. Ctrl-C ends the recording, and the
last window is then settled to its end. Missing parts are held as in a file. A terminal
shows how many frames per second are read: a camera that gives more loses the others,
and the student then sees another frame rate than in training.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from corpora import show_progress

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

WINDOW = 128  # frames that the student sees at once in --live
HOP = 8  # frames from one window to the next, a multiple of every temporal stride


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


def open_video(source):
    """Open a video file, or the camera of a number.

    Raises:
        ValueError: no such file or camera, or one that cannot be opened.
    """
    if isinstance(source, int):
        video = cv2.VideoCapture(source)
        expected = "the number of a camera"
    else:
        if not source.is_file():
            raise ValueError("no such file, expected a video")
        video = cv2.VideoCapture(str(source), cv2.CAP_FFMPEG)
        expected = "a video (mp4, avi, ...)"
    if not video.isOpened():
        raise ValueError(f"cannot be opened, expected {expected}")
    return video


def video_points(video, name):
    """Yield the points of a video's frames: [P, 2] pixels, see frame_points.

    Raises:
        ValueError: no frame can be read.
    """
    declared = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    total = declared if declared > 0 else "?"
    started = time.monotonic()
    frames = 0
    with solutions.holistic.Holistic() as holistic:  # a new one: it tracks over frames
        while True:
            readable, frame = video.read()
            if not readable:
                break
            yield frame_points(holistic, frame)
            frames += 1
            speed = frames / (time.monotonic() - started)
            show_progress(f"{name}  {frames}/{total} frames  {speed:.1f} frames/s")
    show_progress()
    if frames == 0:
        raise ValueError("no frame can be read, expected a video")


def read_video(path):
    """Find the points in all frames of a video.

    Returns:
        [T, P, 2] pixels, frames per second, and the number of frames that the file's
        header declares.

    Raises:
        ValueError: no such file, or one without a frame that can be read.
    """
    video = open_video(path)
    points = list(video_points(video, path.name))
    declared = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
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


def shoulder_scale(points, shoulders=SHOULDERS):
    """Return the middle's x and y and the width of the shoulders in each frame.

    Args:
        points: [T, P, 2] pixels, NaN for a part that is not found.
        shoulders: indices of the left and the right shoulder's point.

    Returns:
        [T, 3] pixels, NaN where no shoulders are found.
    """
    left = points[:, shoulders[0]]  # [T, 2]
    right = points[:, shoulders[1]]  # [T, 2]
    width = np.linalg.norm(left - right, axis=1)  # [T]
    scale = np.column_stack([(left + right) / 2, width])
    scale[~(width >= MIN_SHOULDER_WIDTH)] = np.nan  # also where the width is NaN
    return scale


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
    scale = shoulder_scale(points, shoulders)
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


# ------------------------------------------------------------ live


def live_features(frames):
    """Yield the features of frames as they come, with missing parts held.

    Args:
        frames: an iterable of points [P, 2] in pixels, NaN for a part that is not
            found.

    Yields:
        Features [D] as make_features returns them, but NaN for a part that is not
        known yet. What it holds is what a later frame shows first, see fill_unknown.
    """
    scale = np.full(3, np.nan)
    held = np.full((len(POINTS), 2), np.nan)
    for points in frames:
        new_scale = shoulder_scale(points[None])[0]
        if np.isfinite(new_scale).all():
            scale = new_scale
        relative = (points - scale[:2]) / scale[2]
        for part in PARTS:
            if np.isfinite(relative[part]).all():
                held[part] = relative[part]
        hands_found = [np.isfinite(points[part.start, 0]) for part in PARTS[1:]]
        yield np.append(held.ravel(), hands_found).astype(np.float32)


def fill_unknown(features):
    """Fill the NaN that live_features leaves at a window's begin: [T, D] -> [T, D]."""
    columns = [hold(features[:, 2 * part.start : 2 * part.stop]) for part in PARTS]
    return np.concatenate(columns + [features[:, -len(SIDES) :]], axis=1)


def settled_classes(frames, best_classes, stride, window):
    """Yield the best class of each output frame of a stream once it is settled.

    The windows begin at frames 0, HOP, 2 HOP, ... A class is that of the first full
    window in whose first half the output frame lies; those which the end of the stream
    leaves are of the last window, which reaches to the end. A stream that is not longer
    than the window is one window.

    Args:
        frames: an iterable of features [D].
        best_classes: a function of a window's features [T, D] that returns the best
            class of each of its ceil(T / stride) output frames.
        stride: frames per output frame.
        window: frames, a multiple of 2 * stride.

    Yields:
        ceil(T / stride) classes for T frames, in their order.
    """
    in_window = []
    settled = 0  # output frames of the window
    for frame in frames:
        if len(in_window) == window:
            middle = window // 2 // stride
            yield from best_classes(np.stack(in_window))[settled:middle]
            settled = middle - HOP // stride  # in the next window
            del in_window[:HOP]
        in_window.append(frame)
    if in_window:
        yield from best_classes(np.stack(in_window))[settled:]


def gloss_begins(classes):
    """Yield (output frame, class) where a gloss begins: CTC's path, collapsed.

    Args:
        classes: an iterable of the best class of each output frame; 0 is the blank.
    """
    previous = 0
    for number, best in enumerate(classes):
        if best not in (0, previous):
            yield number, best
        previous = best


class LiveStudent:
    """A student that distill.py has exported, for windows of live_features.

    Raises:
        ValueError: a file that cannot be read, or a student of other features.
    """

    def __init__(self, path):
        import torch  # is installed only where --live is used

        files = {"student.json": ""}
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected an exported student")
        try:
            self.network = torch.export.load(path, extra_files=files).module()
            about = json.loads(files["student.json"])
        except Exception as error:  # torch raises whatever it runs into
            raise ValueError(
                f"{path}: cannot be read, expected a .pt2 file of distill.py --export"
            ) from error
        if about["feature_dim"] != len(column_names()):
            raise ValueError(
                f"{path}: a student of {about['feature_dim']} features per frame, "
                f"expected {len(column_names())}, see --columns"
            )
        self.vocabulary = about["vocabulary"]
        self.temporal_stride = about["temporal_stride"]

    def best_classes(self, features):
        """Return the best class of each output frame: [T, D] -> a list of T'.

        They are blanks in a window without a person, which no training has.
        """
        import torch

        if np.isnan(features[:, 0]).all():  # column 0 is of the pose
            return [0] * math.ceil(len(features) / self.temporal_stride)
        features = torch.from_numpy(fill_unknown(features))
        with torch.inference_mode():
            logits, _ = self.network(features[None], torch.tensor([len(features)]))
        return logits[0].argmax(dim=1).tolist()  # [1, T', V] -> [T']


def live_glosses(frames, student, window):
    """Yield (number of its first frame, gloss) of a stream as the glosses settle.

    Args:
        frames: an iterable of points [P, 2], see live_features.
        student: a LiveStudent.
        window: frames that the student sees at once.
    """
    stride = student.temporal_stride
    features = live_features(frames)
    classes = settled_classes(features, student.best_classes, stride, window)
    for output_frame, best in gloss_begins(classes):
        yield stride * output_frame, student.vocabulary[best]


@contextlib.contextmanager
def interrupt_noted():
    """Give a threading.Event that Ctrl-C sets in place of ending the program."""
    interrupted = threading.Event()

    def note(signal_number, frame):
        """Be the handler of SIGINT."""
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def until(event, items):
    """Yield items until an event is set."""
    for item in items:
        yield item
        if event.is_set():
            break


def delay_line(window, rate):
    """Return the line that states the delay, in seconds too where the rate is known."""
    delay = window // 2 + HOP
    seconds = f" ({delay / rate:.1f} s)" if rate > 0 else ""
    return (
        f"Delay: a gloss is printed at most {delay} frames{seconds} after its first "
        f"one, in the first window at most {window}"
    )


def run_live(student_path, source, window):
    """Print the glosses of a camera or a video file as they settle.

    Args:
        student_path: of the .pt2 file.
        source: the path of a video, or the number of a camera.
        window: frames that the student sees at once.

    Raises:
        ValueError: files that cannot be read or do not fit.
    """
    student = LiveStudent(student_path)
    try:
        print_glosses(student, source, window)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def print_glosses(student, source, window):
    """Do what run_live does, with a LiveStudent."""
    video = open_video(source)
    print(delay_line(window, video.get(cv2.CAP_PROP_FPS)), flush=True)
    glosses = []
    with interrupt_noted() as interrupted:
        frames = until(interrupted, video_points(video, str(source)))
        for number, gloss in live_glosses(frames, student, window):
            show_progress()
            print(f"{number:>8} {gloss}", flush=True)
            glosses.append(gloss)
    show_progress()
    print(" ".join(glosses))


# ------------------------------------------------------------ the program


def convert(path, target):
    """Write a video's features and print a line about them. ValueError if unusable."""
    points, rate, declared = read_video(path)
    features = make_features(points)
    np.save(target, features)
    left, right = 100 * features[:, -2:].mean(axis=0)
    header = ""
    if declared > 0 and declared != len(features):
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

    MediaPipe's log goes to file descriptor 2, and no setting stops it. That of torch
    is Python's log.
    """
    logging.disable(logging.WARNING)
    own_stderr = os.dup(2)
    sys.stderr = os.fdopen(own_stderr, "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "videos", nargs="*", metavar="VIDEO", type=Path, help="or a camera's number"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="for the .npy files")
    parser.add_argument("--columns", action="store_true", help="print columns' names")
    parser.add_argument(
        "--live",
        metavar="STUDENT.pt2",
        type=Path,
        help="print the glosses of one VIDEO while it is read",
    )
    parser.add_argument(
        "--window",
        type=int,
        help=f"frames that the student sees at once in --live (default: {WINDOW})",
    )
    return parser


def refuse_arguments(parser, args):
    """End the program where arguments do not fit or a package is missing."""
    if args.live is None and (not args.videos or args.output is None):
        parser.error(
            "expected VIDEO... --output DIR, --live STUDENT.pt2 VIDEO, or --columns"
        )
    if args.live is not None and (len(args.videos) != 1 or args.output is not None):
        parser.error("--live: expected one VIDEO or camera, and no --output")
    if args.window is not None and args.live is None:
        parser.error(f"--window {args.window}: expected --live too")
    if args.window is not None and (
        args.window < 2 * HOP or args.window % (2 * HOP) != 0
    ):
        parser.error(f"--window {args.window}: expected a multiple of {2 * HOP}")
    if IMPORT_ERROR is not None:
        reason = str(IMPORT_ERROR).partition("\n")[0]
        parser.exit(
            1, f"{parser.prog}: {reason}; needs: pip install mediapipe==0.10.21\n"
        )
    if args.live is not None and importlib.util.find_spec("torch") is None:
        parser.exit(1, f"{parser.prog}: --live needs: pip install torch==2.13.0\n")


def source_of(path):
    """Return a camera's number where that is what the path is, else the path."""
    text = str(path)
    return int(text) if text.isdecimal() and not path.exists() else path


def run(parser, args):
    """Do what the arguments ask for; return the exit status."""
    if args.live is not None:
        source = source_of(args.videos[0])
        run_live(args.live, source, WINDOW if args.window is None else args.window)
        return 0
    targets = [args.output / f"{path.stem}.npy" for path in args.videos]
    for number, target in enumerate(targets):
        if target in targets[:number]:
            raise ValueError(f"two videos would be written to {target}")
    args.output.mkdir(parents=True, exist_ok=True)
    return convert_all(parser.prog, args.videos, targets)


def main():
    """Convert the videos that the command line names, or print glosses or columns."""
    parser = make_parser()
    args = parser.parse_args()
    if args.columns:
        for number, name in enumerate(column_names()):
            print(f"{number:3} {name}")
        return
    refuse_arguments(parser, args)
    silence_libraries()
    status = 0
    try:
        status = run(parser, args)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        show_progress()
        parser.exit(130, f"{parser.prog}: interrupted\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
