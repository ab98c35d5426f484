"""Features with their first differences beside them: [T, D] -> [T, 2 D].

    $ python .lab/differences.py /data/mine /data/mine_differences
    $ python teacher.py --data_dir /data/mine_differences ...

The source is a --data_dir, or a folder of feature files for --predict. The second half
of the columns is each feature's change since the frame before, 0 in the first frame.
This pays on landmarks as landmarks.py makes them, which hold a part that is not found,
not where missing parts are zeros (.lab/RESULTS.md). Features that have velocities
already need no differences. Annotation files are copied, anything else is left out.
"""

import argparse
import shutil
from pathlib import Path

import corpora
import lab  # noqa: F401 (puts the project on the path)
import numpy as np

from teacher import read_features

FEATURE_SUFFIXES = (".npy", ".npz")


def with_differences(features):
    """Put each feature's change since the frame before beside it: -> [T, 2 D]."""
    changes = np.diff(features, axis=0, prepend=features[:1])
    return np.concatenate((features, changes), axis=1)


def convert(source, target):
    """Write a folder's feature files with differences; copy its annotations.

    Returns:
        The number of files written.

    Raises:
        ValueError: a target in the source, no files, or a broken one.
    """
    folder = target.resolve()
    if source.resolve() in [folder] + list(folder.parents):
        raise ValueError(
            f"{target}: it is the source or lies in it, expected another folder"
        )
    suffixes = FEATURE_SUFFIXES + (".csv",)
    paths = [path for path in sorted(source.rglob("*")) if path.suffix in suffixes]
    if not paths:
        raise ValueError(f"{source}: expected .npy, .npz or .csv files in it")
    for path in paths:
        new_path = target / path.relative_to(source)
        new_path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in FEATURE_SUFFIXES:
            features = with_differences(read_features(path))
            np.save(new_path.with_suffix(".npy"), features)
        else:
            shutil.copy(path, new_path)
    return len(paths)


def run(args):
    """Convert the folder that the command line names."""
    count = convert(args.source, args.target)
    print(f"{args.target}: {count} files")


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    corpora.run(parser, run)


if __name__ == "__main__":
    main()
