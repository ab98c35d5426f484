"""In which output frame each network names a gloss, beside the first network.

    $ python .lab/timing.py best_i3d.pth checkpoints/student/best_student.pth
    $ python .lab/timing.py TEACHER STUDENT STUDENT_ALONE --split train --data_dir DIR

CTC leaves open when a gloss is named: at the beginning of its sign, at its end, or in
between. The frame of a gloss is the middle of those whose best class it is. Sentences
that any of the networks gets wrong are left out. Each row has quantiles, over the
glosses of the others, of the difference from the first network's frame in output
frames.
"""

import argparse

import corpora
import lab  # noqa: F401 (puts the project on the path)
import numpy as np
import torch

import adapt
import distill
import teacher

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def load_network(path):
    """Return a teacher or a student, and the content of its checkpoint.

    Raises:
        ValueError: it is neither.
    """
    content = adapt.load_file(path)
    model_class = teacher.I3DTeacher
    if isinstance(content, dict) and content.get("model") == distill.Student.kind:
        model_class = distill.Student
    return teacher.load_model(path, model_class)


def load_networks(paths):
    """Return the networks of checkpoints, and the content of the first one.

    Raises:
        ValueError: files that are missing or broken, other glosses than the first
            one's, or another temporal stride.
    """
    first_model, first_content = load_network(paths[0])
    models = [first_model]
    for path in paths[1:]:
        model, content = load_network(path)
        same_glosses = content["vocabulary"] == first_content["vocabulary"]
        if not same_glosses or model.temporal_stride != first_model.temporal_stride:
            raise ValueError(
                f"{path}: its glosses or its temporal stride are not those of "
                f"{paths[0]}"
            )
        models.append(model)
    return models, first_content


def named_glosses(path):
    """Return the classes along a best path [T'] and the middle frame of each.

    Blanks are left out. [0 3 3 3 0 2] gives [3 2] and [2.0 5.0].
    """
    changes = np.flatnonzero(np.diff(path)) + 1
    starts = np.concatenate(([0], changes))
    ends = np.concatenate((changes, [len(path)])) - 1  # the last frame of each run
    classes = path[starts]
    named = classes != 0
    return classes[named], (starts + ends)[named] / 2


@torch.inference_mode()
def best_path(model, features):
    """Return a network's best class in each output frame: [T, D] -> [T']."""
    features = torch.from_numpy(features)[None]  # [1, T, D]
    logits, _ = model(features, torch.tensor([features.shape[1]]))
    return logits[0].argmax(dim=1).numpy()


def frames_of_glosses(models, sentences, vocabulary):
    """Return the frames in which networks name the glosses of sentences.

    Args:
        models: K networks with the same glosses and the same temporal stride.
        sentences: a list of teacher.Sentence.
        vocabulary: V glosses, the blank first.

    Returns:
        [K, glosses] frames, of the sentences that all networks recognise, and the
        number of these sentences.
    """
    frames = []
    recognised = 0
    for sentence in sentences:
        features = teacher.read_features(sentence.features)
        named = [named_glosses(best_path(model, features)) for model in models]
        hypotheses = [
            tuple(vocabulary[k] for k in classes.tolist()) for classes, _ in named
        ]
        if all(hypothesis == sentence.glosses for hypothesis in hypotheses):
            frames.append([middles for _, middles in named])
            recognised += 1
    if not recognised:
        raise ValueError("no sentence that all networks recognise")
    return np.concatenate(frames, axis=1), recognised


def compare(args):
    """Print when the networks of checkpoints name the glosses of a split.

    Args:
        args: of the command line: checkpoints, split, data_dir.

    Raises:
        ValueError: files that are missing, broken or do not fit each other.
    """
    paths = args.checkpoints
    models, content = load_networks(paths)
    config = teacher.Config(data_dir=args.data_dir)
    config = teacher.with_data_of(config, content, paths[0])
    sentences = teacher.read_split(
        config.data_dir, args.split, config.clean_annotations
    )
    frames, recognised = frames_of_glosses(models, sentences, content["vocabulary"])
    print(
        f"{recognised} of {len(sentences)} sentences, which all recognise; differences "
        f"in output frames of {models[0].temporal_stride} frames"
    )
    quantile_names = "".join(f"{100 * share:>7.0f}%" for share in QUANTILES)
    print(f"{quantile_names}  checkpoint")
    for path, row in zip(paths, frames, strict=True):
        quantiles = np.quantile(row - frames[0], QUANTILES)
        print("".join(f"{value:8.1f}" for value in quantiles), f" {path}")


def main(argv=None):
    """Compare the checkpoints that the command line names; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--split", choices=teacher.SPLITS, default="dev")
    parser.add_argument("--data_dir", help="corpus; none: the first checkpoint's")
    torch.set_num_threads(1)  # a sentence at a time has no work for more
    corpora.run(parser, compare, argv)


if __name__ == "__main__":
    main()
