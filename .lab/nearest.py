"""The baseline without a network: the glosses of the nearest train sentence.

    $ python .lab/nearest.py folds/boston104
    $ python .lab/nearest.py folds/boston104 --per_sentence

The folds are those of .lab/crossvalidate.py. Distance is dynamic time warping (Sakoe &
Chiba 1978): steps go to the next frame of one sentence or of both, and the distance is
the path's sum over the sum of both lengths. Frames are compared by Euclidean distance,
standardised with the train split's statistics, or with --per_sentence each sentence
with its own. Each corpus gets one row in .lab/results.jsonl, with the errors per
held-out sentence, so that networks can be compared with it.

Axes: T frames of the query, K other sentences, U frames of the longest of these, D
features.
"""

import argparse

import corpora
import crossvalidate
import lab
import numpy as np

from teacher import read_features, read_split
from wer import edit_distance

STEPS = ((1, 0), (0, 1), (1, 1))  # frames of query and other sentence


def frame_distances(query, others):
    """Compute Euclidean distances of frames: [T, D], K times [., D] -> [K, T, U]."""
    longest = max(len(other) for other in others)
    padded = np.stack(
        [np.pad(other, ((0, longest - len(other)), (0, 0))) for other in others]
    )  # [K, U, D]
    products = (padded @ query.T).transpose(0, 2, 1)  # [K, U, T] -> [K, T, U]
    query_squares = (query**2).sum(axis=1)[None, :, None]  # [1, T, 1]
    other_squares = (padded**2).sum(axis=2)[:, None]  # [K, 1, U]
    squares = query_squares + other_squares - 2 * products
    return np.sqrt(np.maximum(squares, 0))


def warped_distances(query, others):
    """Compute the warped distance from a query [T, D] to each other sentence: [K]."""
    cost = frame_distances(query, others)  # [K, T, U]
    _, frames, longest = cost.shape
    total = np.full(cost.shape, np.inf)
    total[:, 0, 0] = cost[:, 0, 0]
    for diagonal in range(1, frames + longest - 1):  # all cells of a diagonal at once
        first = max(0, diagonal - longest + 1)
        t = np.arange(first, min(frames, diagonal + 1))
        u = diagonal - t
        best = np.full((len(others), len(t)), np.inf)
        for query_step, other_step in STEPS:
            inside = (t >= query_step) & (u >= other_step)
            before = total[:, t[inside] - query_step, u[inside] - other_step]
            best[:, inside] = np.minimum(best[:, inside], before)
        total[:, t, u] = best + cost[:, t, u]
    path_sums = [total[k, -1, len(other) - 1] for k, other in enumerate(others)]
    lengths = [frames + len(other) for other in others]
    return np.array(path_sums) / np.array(lengths)


def standardise(features, mean, std, per_sentence):
    """Standardise features [T, D] by the train split's statistics or by their own.

    A sentence's own deviation gets a tenth of the train split's added, so that features
    that hardly move in it are not blown up.
    """
    if per_sentence:
        own_std = features.std(axis=0) + 0.1 * std + 1e-9
        return (features - features.mean(axis=0)) / own_std
    return (features - mean) / (std + 1e-9)


def copy_nearest(folder, per_sentence):
    """Give each held-out sentence of a fold its nearest train sentence's glosses.

    Returns:
        id -> errors.
    """
    sentences = {}
    features = {}
    for split in ("train", "dev"):
        sentences[split] = read_split(folder, split)
        arrays = [read_features(sentence.features) for sentence in sentences[split]]
        features[split] = [array.astype(float) for array in arrays]
    frames = np.concatenate(features["train"])
    mean = frames.mean(axis=0)
    std = frames.std(axis=0)
    others = [standardise(x, mean, std, per_sentence) for x in features["train"]]
    errors = {}
    for sentence, array in zip(sentences["dev"], features["dev"], strict=True):
        query = standardise(array, mean, std, per_sentence)
        index = warped_distances(query, others).argmin()
        hypothesis = sentences["train"][index].glosses
        errors[sentence.id] = edit_distance(sentence.glosses, hypothesis)
    return errors


def record_copying(args):
    """Record the WER of copying on all folds of a corpus.

    Args:
        args: of the command line: folds_dir, per_sentence.

    Raises:
        ValueError: files that are missing or broken.
    """
    errors = {}
    for folder in crossvalidate.fold_folders(args.folds_dir):
        for name, count in copy_nearest(folder, args.per_sentence).items():
            errors[f"{folder.name}/{name}"] = count
    setting = "nearest train sentence"
    if args.per_sentence:
        setting += ", per sentence"
    commit = lab.commit()
    crossvalidate.save(args.folds_dir, setting, 0, errors, flags=[], commit=commit)


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folds_dir")
    parser.add_argument(
        "--per_sentence",
        action="store_true",
        help="standardise each sentence with its own statistics",
    )
    corpora.run(parser, record_copying)


if __name__ == "__main__":
    main()
