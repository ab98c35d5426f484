"""What copycat.py and boston104.py share: a public repository's data -> a corpus.

A corpus is in the layout that README describes, DIR/{train,dev,test}.corpus.csv and
DIR/features/. Signers are numbered s1, s2, ... in the alphabetical order of the names
that the repository has for them, and these names are neither written nor printed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Recording:
    """A signed sentence as it is written to a corpus."""

    id: str
    signer: str  # s1, s2, ...
    glosses: tuple
    features: np.ndarray  # [T, D]


def number_signers(names):
    """Return name -> s1, s2, ... in alphabetical order of the names."""
    return {name: f"s{k}" for k, name in enumerate(sorted(set(names)), start=1)}


def refuse_existing(folder):
    """Raise ValueError where a folder to be written is there and not empty."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already, expected a new folder")


def write_corpus(folder, splits):
    """Write a corpus to a new folder, and print the sizes of its splits.

    Args:
        folder: its directory.
        splits: split -> list of Recording.

    Raises:
        ValueError: the folder is there and not empty.
        OSError: a file cannot be written.
    """
    refuse_existing(folder)
    for split, recordings in splits.items():
        features = Path(folder, "features", split)
        features.mkdir(parents=True)
        lines = ["id|folder|signer|annotation"]
        for recording in recordings:
            name = recording.id
            np.save(features / f"{name}.npy", recording.features)
            glosses = " ".join(recording.glosses)
            lines.append(f"{name}|{name}|{recording.signer}|{glosses}")
        text = "\n".join(lines) + "\n"
        Path(folder, f"{split}.corpus.csv").write_text(text, encoding="utf-8")
        signers = {recording.signer for recording in recordings}
        frames = [len(recording.features) for recording in recordings]
        print(
            f"{folder} {split}: {len(recordings)} sentences of {len(signers)} signers, "
            f"{min(frames)} to {max(frames)} frames"
        )


def run(parser, command):
    """Call command(args); an error becomes one line on stderr, with status 2."""
    args = parser.parse_args()
    try:
        command(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
