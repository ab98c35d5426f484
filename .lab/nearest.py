"""The baseline without a network: the glosses of the nearest train sentence.

    $ python .lab/nearest.py folds/boston104          # DIR/fold*/, as .lab/crossvalidate.py makes
    $ python .lab/nearest.py folds/boston104 --per_sentence

Nearest by dynamic time warping (Sakoe & Chiba 1978: steps to the next frame of one or of both, the
path's mean distance), Euclidean between frames standardised with the train split's statistics, or
with --per_sentence each sentence with its own. One row per corpus in .lab/results.jsonl, with the
errors per held-out sentence, so that networks can be compared with it.
"""

import argparse
import sys
from pathlib import Path

import crossvalidate
import lab
import numpy as np

sys.path.insert(0, str(lab.ROOT))
from teacher import read_features, read_split  # noqa: E402
from wer import edit_distance  # noqa: E402


def distances(query, others):
    """[T, D], list of [T_k, D] -> the warped distance to each, over T + T_k."""
    longest = max(map(len, others))
    padded = np.stack([np.pad(o, ((0, longest - len(o)), (0, 0))) for o in others])   # [K, U, D]
    squares = (query ** 2).sum(1)[None, :, None] + (padded ** 2).sum(2)[:, None]
    cost = np.sqrt(np.maximum(squares - 2 * (padded @ query.T).transpose(0, 2, 1), 0))
    frames, total = len(query), np.full(cost.shape, np.inf)
    total[:, 0, 0] = cost[:, 0, 0]
    for diagonal in range(1, frames + longest - 1):     # all cells of a diagonal at once
        t = np.arange(max(0, diagonal - longest + 1), min(frames, diagonal + 1))
        u = diagonal - t
        best = np.full((len(others), len(t)), np.inf)
        for back, ahead in ((1, 0), (0, 1), (1, 1)):
            inside = (t >= back) & (u >= ahead)
            best[:, inside] = np.minimum(best[:, inside],
                                         total[:, t[inside] - back, u[inside] - ahead])
        total[:, t, u] = best + cost[:, t, u]
    return np.array([total[k, -1, len(o) - 1] / (frames + len(o)) for k, o in enumerate(others)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folds_dir")
    parser.add_argument("--per_sentence", action="store_true")
    args = parser.parse_args()
    errors = {}
    for folder in sorted(Path(args.folds_dir).glob("fold*")):
        splits = {split: [(s, read_features(s.features).astype(float))
                          for s in read_split(folder, split)] for split in ("train", "dev")}
        everything = np.concatenate([x for _, x in splits["train"]])
        mean, std = everything.mean(0), everything.std(0)
        for split, some in splits.items():
            splits[split] = [(s, (x - x.mean(0)) / (x.std(0) + 0.1 * std + 1e-9)
                              if args.per_sentence else (x - mean) / (std + 1e-9)) for s, x in some]
        others = [x for _, x in splits["train"]]
        for sentence, features in splits["dev"]:
            nearest = splits["train"][distances(features, others).argmin()][0]
            errors[f"{folder.name}/{sentence.id}"] = edit_distance(sentence.glosses,
                                                                   nearest.glosses)
    name = "nearest train sentence" + ", standardised per sentence" * args.per_sentence
    crossvalidate.save(Path(args.folds_dir), name, 0, errors, flags=[], commit=lab.commit())


if __name__ == "__main__":
    main()
