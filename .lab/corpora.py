"""What copycat.py, boston104.py and import_features.py share: other files -> a corpus.

A corpus is in the layout that README describes, DIR/{train,dev,test}.corpus.csv and
DIR/features/. copycat.py and boston104.py number signers s1, s2, ... in the
alphabetical order of their names, which they neither write nor print;
import_features.py writes signers' names as they are given.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Recording:
    """A signed sentence as it is written to a corpus."""

    id: str
    signer: str  # as it is written
    glosses: tuple
    features: np.ndarray  # [T, D]


def number_signers(names):
    """Return name -> s1, s2, ... in alphabetical order of the names."""
    return {name: f"s{k}" for k, name in enumerate(sorted(set(names)), start=1)}


def read_table(path, columns, delimiter=","):
    """Read a .csv file: a list of (place for messages, column -> text).

    Raises:
        ValueError: a column or a value that is missing, text that is not UTF-8, or a
            quote that is not closed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error.reason}, expected UTF-8 text") from error
    file = io.StringIO(text, newline="")
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames or []
        numbered_rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: {error}, expected quotes around whole values"
        ) from error
    missing = [column for column in columns if column not in header]
    if missing:
        expected = delimiter.join(columns)
        raise ValueError(f"{path}: no column {', '.join(missing)}, expected {expected}")
    rows = []
    for line_number, row in numbered_rows:
        place = f"{path}:{line_number}"
        empty = [column for column in columns if not row[column]]
        if empty:
            raise ValueError(f"{place}: no {empty[0]}, expected {len(header)} values")
        if None in row:
            raise ValueError(
                f"{place}: more values than columns, expected {len(header)}"
            )
        rows.append((place, row))
    if not rows:
        raise ValueError(f"{path}: no rows, expected some below the header")
    return rows


def show_progress(text=""):
    """Show a line on a terminal that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\033[K{text}\r", end="", file=sys.stderr, flush=True)


def refuse_existing(folder):
    """Raise ValueError where a folder to be written is there."""
    if Path(folder).exists():
        raise ValueError(f"{folder}: is there already, expected a new folder")


def write_corpus(folder, splits):
    """Write a corpus to a new folder, and print the sizes of its splits.

    Args:
        folder: its directory.
        splits: split -> list of Recording.

    Raises:
        ValueError: the folder is there.
        OSError: a file cannot be written.
    """
    refuse_existing(folder)
    for split, recordings in splits.items():
        write_split(folder, split, recordings)


def write_split(folder, split, recordings):
    """Write a split of a corpus, and print its size.

    Args:
        folder: the corpus's directory.
        split: train, dev or test.
        recordings: an iterable of Recording, written one by one; without any, no file
            is written.

    Raises:
        OSError: a file cannot be written.
    """
    features = Path(folder, "features", split)
    features.mkdir(parents=True)
    lines = ["id|folder|signer|annotation"]
    signers = set()
    frames = []
    for recording in recordings:
        name = recording.id
        np.save(features / f"{name}.npy", recording.features)
        glosses = " ".join(recording.glosses)
        lines.append(f"{name}|{name}|{recording.signer}|{glosses}")
        signers.add(recording.signer)
        frames.append(len(recording.features))
    if not frames:
        features.rmdir()
        print(f"{folder} {split}: no sentences")
        return
    text = "\n".join(lines) + "\n"
    Path(folder, f"{split}.corpus.csv").write_text(text, encoding="utf-8")
    print(
        f"{folder} {split}: {len(frames)} sentences of {len(signers)} signers, "
        f"{min(frames)} to {max(frames)} frames"
    )


def run(parser, command, argv=None):
    """Call command(args); an error becomes one line on stderr, with status 2."""
    args = parser.parse_args(argv)
    try:
        command(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
