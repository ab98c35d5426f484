"""The teacher: a 1D I3D trunk and a BiLSTM, trained with CTC on per-frame features.

    $ python teacher.py --pretrained_weights i3d_kinetics400 --progressive_unfreeze
    $ python teacher.py --data_dir DIR --pretrained_weights i3d_kinetics400 --epochs 150
    $ python teacher.py --evaluate checkpoints/teacher/best_i3d.pth --split test --beam_width 10
    $ python teacher.py --predict recording.npy another.npy
    $ python teacher.py --write_corpus corpus         # the built-in corpus as files: the layout
    $ python teacher.py --validate_data DIR           # what training would meet there

The network is I3D (Carreira & Zisserman 2017, arXiv 1705.07750, figure 3) over time alone, with
connectionist temporal classification (Graves et al. 2006) over glosses. What a run writes lies in
--output_dir: best_i3d.pth, last.pth, log.jsonl and curves.svg.

Axes: B sentences of a batch, T frames, T' frames after temporal_stride, N frames of a whole batch
one after the other ("rows"), D features, C channels, V classes with the CTC blank as class 0,
L glosses of a sentence. Epochs are counted from 0.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

import adapt
import freeze
from wer import read_annotations, score

# I3D's Inception blocks: output channels of b0, b1a -> b1b, b2a -> b2b, b3b. The order of this
# table is the network's; freezing cuts it, adaptation finds its names in checkpoints.
MIXED = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}
BACKBONE = ("stem", *MIXED)
LAYERS = (*BACKBONE, "lstm", "classifier")
# Max-pooling over time in front of a block: kernel in frames, smallest temporal_stride that has it.
POOLS = {"mixed_4b": (3, 4), "mixed_5b": (2, 8)}
BLANK = "<blank>"

SPLITS = ("train", "dev", "test")
ANNOTATIONS = ("{}.corpus.csv", "annotations/manual/{}.corpus.csv",
               "PHOENIX-2014-T.{}.corpus.csv", "annotations/manual/PHOENIX-2014-T.{}.corpus.csv",
               "{}.SI5.corpus.csv", "annotations/manual/{}.SI5.corpus.csv")
BROKEN = {"13April_2011_Wednesday_tagesschau_default-14"}  # of Phoenix-2014: its video is damaged

SPEED = (0.8, 1.25)      # training sentences are played at a length factor drawn from this range
SCALE = (0.7, 1.4)       # and their features multiplied by one: signers' sizes, their distance
OFFSET = 3.0             # deviations that a feature's mean counts as its distance from an origin
NOISE = 0.1              # standard deviation of training noise, in standard deviations of a feature
CLIP_NORM = 5.0          # largest norm of the gradient of all parameters together
WARMUP = 0.1             # share of all steps in which the learning rate rises to its maximum
PATIENCE = 10            # non-finite training steps in a row after which training stops
FARTHEST = 1e4           # deviations from its mean at which a feature is cut off
STRIDES = (2, 4, 8)
OUTPUTS = ("last.pth", "best_*.pth", "log.jsonl", "curves.svg")  # what a run leaves
MOST_FRAMES = 100_000    # in a sentence: more than an hour at 25 a second
MOST_UNPACKED = 2 ** 26  # bytes that any .npz may unpack to; beyond that 20 times its size

DECODING = {"beam_width": 1, "lm_weight": 0.0}  # defaults: greedy, without a language model
HASH = 6364136223846793005  # odd: (hash * HASH + class) modulo 2^64 hashes a longer prefix
MOST_BIGRAMS = 10_000    # glosses; a language model holds a number for each pair
DISCOUNT = 0.5           # taken off each bigram count for the bigrams that were not seen


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended training after a step. number: of the signal."""

    def __init__(self, number, where):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.number = number


# ---------------------------------------------------------------- configuration

def option(default, text, check=None, **argparse_options):
    """A field of a config that is also a command line flag of the same name.

    check: (value -> whether it will do, words for what was expected).
    """
    return dataclasses.field(default=default,
                             metadata={"help": text, "check": check, **argparse_options})


def at_least(lowest, highest=10 ** 6):
    """The check of a whole number."""
    return lambda value: lowest <= value <= highest, f"{lowest} to {highest}"


ABOVE_0 = (lambda value: 0 < value < math.inf, "a number above 0")
BELOW_1 = (lambda value: 0 <= value < 1, "at least 0 and below 1")


@dataclass
class TrainingConfig:
    """What any run needs: saved in its checkpoints, and the only place of defaults.

    A program's own config adds its fields, output_dir among them, `layers` (of its network, input
    to output), `checkpoint` (name of the best epoch's file) and, where it is not this, `loss_name`.
    """

    loss_name = "CTC, nats a gloss"

    data_dir: str = option("", "corpus directory (default: the built-in synthetic corpus)")
    epochs: int = option(50, "passes over the training sentences", at_least(1))
    batch_size: int = option(8, "sentences a step", at_least(1))
    learning_rate: float = option(1e-3, "AdamW's maximum, after warm-up and before cosine decay",
                                  ABOVE_0)
    weight_decay: float = option(0.01, "AdamW's",
                                 (lambda value: 0 <= value < math.inf, "at least 0"))
    temporal_stride: int = option(4, "frames of the input a frame of the output",
                                  choices=STRIDES)
    dropout: float = option(0.5, "share of values dropped around the last layers",
                            BELOW_1)
    seed: int = option(0, "of weights, data order, augmentation and dropout",
                       at_least(0, 2 ** 63 - 1))
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata["check"]
            kinds = (int, float) if field.type is float else field.type
            if not isinstance(value, kinds) or isinstance(value, bool) != (field.type is bool):
                raise ValueError(f"--{field.name} {value!r}: expected {field.type.__name__}")
            if not str(value).isprintable():
                raise ValueError(f"--{field.name} {value!r}: expected characters that can be seen")
            if check and not check[0](value):
                raise ValueError(f"--{field.name} {value}: expected {check[1]}")
        if self.data_dir:
            self.data_dir = str(Path(self.data_dir).resolve())  # checkpoints find it from anywhere

    def schedule(self):
        """The UnfreezeSchedule of a run in which everything trains."""
        return freeze.UnfreezeSchedule(self.layers, self.epochs, 1, None)


@dataclass
class Config(TrainingConfig):
    """The teacher's."""

    layers, checkpoint = LAYERS, "best_i3d.pth"

    output_dir: str = option("checkpoints/teacher", "where checkpoints, log and picture go")
    pretrained_weights: str = option(
        "", f"checkpoint to start from: a file or {adapt.KINETICS} (default: random weights)",
        metavar="NAME|PATH")
    adapt_method: str = option(adapt.METHOD, "how 3D kernels become 1D", choices=adapt.METHODS)
    freeze_backbone: bool = option(False, f"freeze stem to {BACKBONE[-1]}")
    freeze_until_layer: str = option(
        "", "freeze stem to LAYER, LAYER included",
        (lambda value: value in ("", *BACKBONE), f"one of {', '.join(BACKBONE)}"), metavar="LAYER")
    progressive_unfreeze: bool = option(
        False, "freeze, then release from the top over the epochs (see freeze.py)")
    unfreeze_stages: int = option(freeze.STAGES, "stages of --progressive_unfreeze")
    hidden_size: int = option(256, "LSTM units a direction", at_least(1, 10 ** 5))

    def __post_init__(self):
        super().__post_init__()
        self.schedule()

    def schedule(self):
        """The UnfreezeSchedule that the four freezing flags ask for."""
        frozen = self.freeze_backbone or self.progressive_unfreeze or self.freeze_until_layer
        until = (self.freeze_until_layer or freeze.FREEZE_UNTIL) if frozen else None
        stages = self.unfreeze_stages if self.progressive_unfreeze else 1
        return freeze.UnfreezeSchedule(LAYERS, self.epochs, stages, until)


def add_config_flags(parser, config_class):
    """One flag a field. Flags that are not given stay absent: the config has the defaults."""
    for field in dataclasses.fields(config_class):
        options = {key: value for key, value in field.metadata.items() if key != "check"}
        if "(default" not in options["help"] and field.type is not bool and field.default != "":
            options["help"] += f" (default: {field.default})"
        options |= {"action": "store_true"} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


# ---------------------------------------------------------------- data

class Sentence(NamedTuple):
    id: str
    signer: str
    glosses: tuple
    features: object  # path of a .npy or .npz file, or the array [T, D] itself


def read_corpus(directory, refused=None):
    """{split: [Sentence]} of a directory in the project's layout; features are not read yet.

    refused: a list that takes up the errors of annotations, whose split is then empty.
    """
    directory, corpus = Path(directory), {}
    for split in SPLITS:
        candidates = [directory / name.format(split) for name in ANNOTATIONS]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None and split != "test":
            raise ValueError(f"{candidates[0]}: no such file, nor at {', '.join(ANNOTATIONS[1:])}; "
                             f"expected the {split} annotations".replace("{}", split))
        if path:
            folder = directory / "features" / split
            try:
                annotations = read_annotations(path)
            except ValueError as error:
                if refused is None:
                    raise
                refused.append(str(error))
                annotations = []
            corpus[split] = [Sentence(*annotation, folder / f"{annotation.id}.npy")
                             for annotation in annotations]
    return corpus


def read_features(source, dim=None):
    """[T, D] float32 from a .npy file, else the .npz of one array beside it, or from an array.

    ValueError for a file that is missing or broken, and for anything but finite floating point
    numbers with two axes, at least one frame, and D = dim where dim is given.
    """
    if isinstance(source, np.ndarray):
        features, source = source, "features"
    else:
        # numpy raises whatever a broken header or archive leads it to (BadZipFile, EOFError, ...)
        try:
            npz = Path(source).with_suffix(".npz")
            source = npz if npz.is_file() and not Path(source).is_file() else source
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they are about is refused in one line
                features = _load_array(Path(source))
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ValueError(f"{source}: {reason}, expected one array of features") from error
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise ValueError(f"{source}: {features.dtype} array of shape {list(features.shape)}, "
                         f"expected floating point [T, D]")
    if len(features) > MOST_FRAMES:
        raise ValueError(f"{source}: {len(features):,} frames, expected at most {MOST_FRAMES:,}")
    if dim and features.shape[1] != dim:
        raise ValueError(f"{source}: {features.shape[1]} features a frame, expected {dim}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused below
        features = features.astype(np.float32, order="C", copy=False)
    if not np.isfinite(features).all():
        frame = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise ValueError(f"{source}: NaN or infinity in frame {frame}, expected finite numbers of "
                         f"float32's range")
    return features


def _load_array(path):
    """The one array of a .npy or .npz file; whatever numpy raises where there is no such array."""
    if not path.is_file():
        raise ValueError("not a plain file" if path.exists() else "no such file")
    with open(path, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return np.load(path, allow_pickle=False)
    if not start.startswith(b"PK"):
        raise ValueError("neither .npy nor .npz")
    adapt.check_zip(path, MOST_UNPACKED + 20 * os.path.getsize(path))
    with np.load(path, allow_pickle=False) as archive:
        (name,) = archive.files
        return np.asanyarray(archive[name])  # numpy gives what is no array as bytes


class Data(NamedTuple):
    """A corpus and what one pass over its feature files finds."""

    corpus: dict        # split -> [Sentence]
    frames: dict        # split -> frames of each sentence
    vocabulary: list    # class -> gloss, the blank first
    mean: torch.Tensor  # [D] over all frames of the train split
    std: torch.Tensor   # [D], 1 for a constant feature
    constant: list      # features that never change in the train split
    same: list          # pairs of sentences of different splits with equal features
    digest: str         # SHA-256 of all ids, signers, glosses and features


def read_data(data_dir, vocabulary=None, dim=None, refused=None):
    """Data of a directory, or of the built-in corpus for "". Every file is read and checked.

    vocabulary, dim: of a model that the data has to fit; otherwise the data's own. ValueError for
    train glosses that the vocabulary lacks, and for a frame of other than dim features. refused:
    a list that takes up the errors of files, whose sentences are then left out.
    """
    corpus = read_corpus(data_dir, refused) if data_dir else synthetic_corpus()
    if broken := [s.id for s in corpus["train"] if s.id in BROKEN]:
        corpus["train"] = [s for s in corpus["train"] if s.id not in BROKEN]
        print(f"Left out, known to be broken: {', '.join(broken)}")
    glosses = {gloss for sentence in corpus["train"] for gloss in sentence.glosses}
    if BLANK in glosses:
        raise ValueError(f"{data_dir}: {BLANK} is a train gloss, expected any other name: it is "
                         f"that of CTC's blank")
    vocabulary = vocabulary or [BLANK, *sorted(glosses)]
    if unknown := glosses - set(vocabulary):
        raise ValueError(f"{data_dir or 'built-in corpus'}: train glosses that are not in the "
                         f"model's vocabulary: {' '.join(sorted(unknown)[:9])}, expected the data "
                         f"it was trained for")
    frames, total, squares, seen, same, digest = {}, 0.0, 0.0, {}, [], hashlib.sha256()
    for split, sentences in corpus.items():
        corpus[split], frames[split] = [], []
        for sentence in sentences:
            try:
                features = read_features(sentence.features, dim)
            except ValueError as error:
                if refused is None:
                    raise
                refused.append(str(error))
                continue
            dim = features.shape[1]
            corpus[split].append(sentence)
            frames[split].append(len(features))
            content = hashlib.sha256(features).digest()
            digest.update(repr((split, sentence[:3], content)).encode())
            first = seen.setdefault(content, (split, sentence.id))
            if first[0] != split:
                same.append((first, (split, sentence.id)))
            if split == "train":
                features = features.astype(np.float64)
                total, squares = total + features.sum(0), squares + (features ** 2).sum(0)
    if empty := [split for split in corpus if not corpus[split]]:
        raise ValueError(f"{data_dir}: no sentence of {' and '.join(empty)} can be used, training "
                         f"cannot run")
    mean, square = total / sum(frames["train"]), squares / sum(frames["train"])
    variance = square - mean ** 2
    varies = variance > np.maximum(1e-12 * square, 1e-60)
    std = np.sqrt(np.where(varies, variance, 1))
    return Data(corpus, frames, vocabulary, torch.tensor(mean, dtype=torch.float32),
                torch.tensor(std, dtype=torch.float32), np.flatnonzero(~varies).tolist(), same,
                digest.hexdigest())


def describe_data(data, name):
    """Print sizes, and what a user should know of the data before believing a WER."""
    print(f"Data: {name or 'built-in corpus'}, {len(data.mean)} features a frame, "
          f"{len(data.vocabulary) - 1} glosses")
    for split, sentences in data.corpus.items():
        frames, glosses = data.frames[split], [g for s in sentences for g in s.glosses]
        unknown = [gloss for gloss in glosses if gloss not in data.vocabulary]
        print(f"  {split:<5} {len(sentences):>5} sentences, {len(glosses):>6} glosses, "
              f"{min(frames)} to {max(frames)} frames a sentence"
              + (f"; {len(unknown)} glosses unknown to train, certain errors (WER at least "
                 f"{len(unknown) / len(glosses):.1%}): {' '.join(sorted(set(unknown)))}"
                 if unknown else ""))
    if data.constant:
        print(f"Features that are constant in train: {' '.join(map(str, data.constant))}")
    for (split, one), (other, two) in data.same:
        print(f"Equal features in two splits: {split}/{one} and {other}/{two}")


def validate_data(data_dir):
    """Read all of a directory and print a report. Returns what --json prints.

    ValueError where training cannot run on it.
    """
    refused = []
    if not data_dir:
        raise ValueError("--validate_data: expected a directory")
    try:
        data = read_data(data_dir, refused=refused)
    finally:
        for error in refused:
            print(f"Refused: {error}")
    describe_data(data, data_dir)
    short = {stride: {split: sum(not fits(*pair, stride) for pair in zip(*pairs))
                      for split, *pairs in zip(data.corpus, data.corpus.values(),
                                               data.frames.values())} for stride in STRIDES}
    for stride, counts in short.items():
        print(f"Sentences with too few frames for CTC at --temporal_stride {stride}: "
              + ", ".join(f"{split} {count}" for split, count in counts.items()))
    if refused:
        raise ValueError(f"{data_dir}: {len(refused)} files are refused (listed above), "
                         f"training cannot run, expected none")
    if short[Config.temporal_stride]["train"] == len(data.corpus["train"]):
        raise ValueError(f"{data_dir}: no train sentence has enough frames at --temporal_stride "
                         f"{Config.temporal_stride}, training cannot run")
    print("Training can run")
    return {"data_dir": data_dir, "features": len(data.mean), "glosses": len(data.vocabulary) - 1,
            "sentences": {split: len(data.corpus[split]) for split in data.corpus},
            "too_short": short, "constant": data.constant, "same": data.same}


def alignable(data, stride):
    """The train sentences with enough frames for CTC; says which are left out, and the cure."""
    pairs = list(zip(data.corpus["train"], data.frames["train"]))
    kept = [sentence for sentence, frames in pairs if fits(sentence, frames, stride)]
    if len(kept) < len(pairs):
        print(f"Left out of training, too few frames for their glosses at stride {stride}: "
              f"{len(pairs) - len(kept)} of {len(pairs)} sentences")
    for sentence, frames in pairs:
        if not fits(sentence, frames, stride):
            cure = next((s for s in reversed(STRIDES) if fits(sentence, frames, s)), "none")
            print(f"  {sentence.id}: {frames} frames, {len(sentence.glosses)} glosses, "
                  f"--temporal_stride that fits: {cure}")
    if not kept:
        raise ValueError(f"--temporal_stride {stride}: no train sentence has enough frames for "
                         f"its glosses, expected at least a frame a gloss after the stride")
    return kept


def fits(sentence, frames, stride):
    """Whether CTC can align the sentence's glosses with what stride leaves of its frames."""
    return -(-frames // stride) >= frames_needed(sentence.glosses)


def frames_needed(glosses):
    """Encoder frames T' that CTC needs: a frame a gloss, a blank between equal neighbours."""
    return len(glosses) + sum(a == b for a, b in zip(glosses, glosses[1:]))


class Batch(NamedTuple):
    features: torch.Tensor        # [B, T, D], zeros after each sentence's end
    lengths: torch.Tensor         # [B] frames, on the CPU
    targets: torch.Tensor         # [sum of L] classes, one sentence after the other
    target_lengths: torch.Tensor  # [B] glosses, on the CPU
    sentences: list

    def to(self, device):
        return self._replace(features=self.features.to(device), targets=self.targets.to(device))


def batches(sentences, vocabulary, batch_size, dim, augmentation=None):
    """Batches of the sentences in their order. augmentation: [T, D], Sentence -> [T, D].

    A gloss outside the vocabulary has no class; it is left out of targets (and still counts as
    an error in scoring, which compares glosses).
    """
    classes = {gloss: k for k, gloss in enumerate(vocabulary)}
    for first in range(0, len(sentences), batch_size):
        chosen = sentences[first:first + batch_size]
        arrays = [read_features(sentence.features, dim) for sentence in chosen]
        if augmentation:
            arrays = [augmentation(array, s) for array, s in zip(arrays, chosen)]
        targets = [[classes[g] for g in s.glosses if g in classes] for s in chosen]
        yield Batch(
            pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True),
            torch.tensor([len(array) for array in arrays]),
            torch.tensor([k for target in targets for k in target], dtype=torch.long),
            torch.tensor([len(target) for target in targets]), chosen)


@np.errstate(over="ignore")  # infinity is cut off by standardised()
def training_batches(sentences, data, config, epoch):
    """Shuffled and augmented batches of one epoch: a pure function of config.seed and epoch."""
    rng = np.random.default_rng([config.seed, epoch])
    shuffled = [sentences[i] for i in rng.permutation(len(sentences))]
    mean, std = data.mean.numpy(), data.std.numpy()
    # Scaling is about zero for features that vary around it, as coordinates relative to the body
    # do; a mean of many deviations tells of no such origin, and scaling it would only shift.
    origin = mean - np.clip(mean, -OFFSET * std, OFFSET * std)

    @np.errstate(over="ignore")
    def augmentation(features, sentence):
        shortest = (frames_needed(sentence.glosses) - 1) * config.temporal_stride + 1
        features = change_speed(features, rng.uniform(*SPEED), shortest)
        scale = np.float32(np.exp(rng.uniform(*np.log(SCALE))))
        noise = rng.standard_normal(features.shape, dtype=np.float32)
        return origin + scale * (features - origin) + NOISE * std * noise

    return batches(shuffled, data.vocabulary, config.batch_size, len(std), augmentation)


def change_speed(features, factor, shortest=1):
    """[T, D] -> [max(T * factor, shortest), D], by linear interpolation over time."""
    count = max(round(len(features) * factor), shortest)
    where = np.linspace(0, len(features) - 1, count, dtype=np.float32)
    left = where.astype(int)
    right = np.minimum(left + 1, len(features) - 1)
    weight = (where - left)[:, None].astype(np.float32)
    return features[left] * (1 - weight) + features[right] * weight


# ---------------------------------------------------------------- the built-in corpus

GLOSSES = ("ABEND BLEIBEN FRUEH GEWITTER HEUTE KALT KOMMEN MORGEN NACHT NEBEL NORD REGEN SCHNEE "
           "SONNE STARK SUED TAG WARM WIND WOLKE").split()
SIZES = {"train": 200, "dev": 40, "test": 60}  # sentences
POSES, HAND = 7, 8  # key poses in the inventory; features of one of the two hands


def synthetic_corpus(seed=0, sizes=SIZES):
    """{split: [Sentence]} of made-up signing with D = 16, a pure function of the seed.

    A gloss is a sequence of three out of seven key poses, so glosses share poses and differ in
    their order, as signs do. The features glide from pose to pose, inside a gloss and from one to
    the next (coarticulation). Eight signers differ in size, place, speed and style; two of them
    are in dev and test only. A sentence follows a random grammar of six successors a gloss.
    """
    rng = np.random.default_rng([seed, POSES])
    poses = rng.standard_normal((POSES, 2 * HAND))
    forms = [form for form in np.ndindex(POSES, POSES, POSES) if form[0] != form[1] != form[2]]
    forms = dict(zip(GLOSSES, rng.permutation(forms)))
    grammar = {gloss: rng.permutation(GLOSSES)[:6].tolist() for gloss in GLOSSES}
    signers = [{"size": rng.uniform(0.7, 1.3), "place": 0.4 * rng.standard_normal(2 * HAND),
                "speed": rng.uniform(0.8, 1.25),
                "poses": poses + 0.3 * rng.standard_normal(poses.shape)} for _ in range(8)]
    corpus = {split: [] for split in sizes}
    for split, size in sizes.items():
        for number in range(size):
            signer = int(rng.integers(6 if split == "train" else 8))
            glosses = [str(rng.choice(GLOSSES))]
            while len(glosses) < 3 or (len(glosses) < 7 and rng.random() < 0.7):
                glosses.append(grammar[glosses[-1]][rng.integers(6)])
            features = _sign(np.concatenate([forms[g] for g in glosses]), signers[signer], rng)
            corpus[split].append(Sentence(f"{split}-{number:04d}", f"signer-{signer}",
                                          tuple(glosses), features))
    return corpus


def _sign(sequence, signer, rng):
    """[T, 16]: from rest through a sequence of poses and back, with noise and lost hands."""
    targets = signer["poses"][sequence]
    targets = np.pad(targets + 0.15 * rng.standard_normal(targets.shape), ((1, 1), (0, 0)))
    steps = rng.uniform(2.5, 5, len(targets) - 1) / signer["speed"]     # frames from pose to pose
    times = np.concatenate(([0], np.cumsum(steps)))
    t = np.arange(int(times[-1]) + 1)
    track = np.stack([np.interp(t, times, values) for values in targets.T], axis=1)
    track = signer["size"] * track + signer["place"] + 0.2 * rng.standard_normal(track.shape)
    for start in np.flatnonzero(rng.random(len(t)) < 1 / 30):  # a tracker loses a hand: zeros
        first = HAND * int(rng.integers(2))
        track[start:start + int(rng.integers(1, 5)), first:first + HAND] = 0
    return track.astype(np.float32)


def write_corpus(corpus, directory):
    """Write a corpus with its features in memory as files in the project's layout."""
    for split, sentences in corpus.items():
        folder = Path(directory) / "features" / split
        folder.mkdir(parents=True)
        lines = ["id|folder|signer|annotation"]
        for s in sentences:
            np.save(folder / f"{s.id}.npy", s.features)
            lines.append(f"{s.id}|{s.id}/1/*.png|{s.signer}|{' '.join(s.glosses)}")
        write_text("\n".join(lines) + "\n", Path(directory) / f"{split}.corpus.csv")


# ---------------------------------------------------------------- the network

def neighbours(lengths, kernel, stride, device="cpu"):
    """Which rows each output row of a convolution or pooling over time sees.

    lengths: [B] frames, on the CPU. Returns (index [N', kernel] on the device, lengths' [B] =
    ceil(lengths / stride)). The frames of a batch lie one after the other in N = sum(lengths)
    rows; index N stands for a row of zeros, which is what a frame before a sentence's start or
    after its end reads. As TensorFlow's SAME padding at a length that the stride divides:
    (kernel - stride) // 2 frames on the left.
    """
    outputs = -(-lengths // stride)
    sentence = torch.repeat_interleave(outputs)                             # [N']
    position = torch.arange(len(sentence)) - (outputs.cumsum(0) - outputs)[sentence]
    frame = (position * stride - (kernel - stride) // 2)[:, None] + torch.arange(kernel)
    inside = (frame >= 0) & (frame < lengths[sentence][:, None])            # [N', kernel]
    first = (lengths.cumsum(0) - lengths)[sentence][:, None]
    return torch.where(inside, first + frame, lengths.sum()).to(device), outputs


def gather(rows, index):
    """[N, C], [N', kernel] -> [N', kernel, C], zeros where the index is N."""
    return F.embedding(index, F.pad(rows, (0, 0, 0, 1)), padding_idx=len(rows))


def standardised(features, model):
    """[..., D] -> [..., D] in the train split's deviations; what is absurdly far off is cut off,
    so that one tracker's slip does not become infinite in the layers behind."""
    return ((features - model.feature_mean) / model.feature_std).clamp(-FARTHEST, FARTHEST)


def max_pool(rows, index):
    """[N, C] -> [N', C]. Rows come out of a ReLU: zeros outside a sentence change nothing."""
    return gather(rows, index).amax(dim=1)


class Unit(nn.Module):
    """Convolution over time (no bias), BatchNorm, ReLU: [N, C] -> [N', C'].

    Since padding does not exist in rows, BatchNorm's statistics are those of real frames alone.
    """

    def __init__(self, inputs, outputs, kernel=1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, bias=False)  # holds [C', C, kernel]
        self.bn = freeze.BatchNorm1d(outputs, eps=adapt.BATCHNORM_EPS)

    def forward(self, rows, index=None):
        if index is not None:
            rows = gather(rows, index).flatten(1)                           # [N', kernel * C]
        weight = self.conv.weight.transpose(1, 2).flatten(1)                # [C', kernel * C]
        return F.relu(self.bn(F.linear(rows, weight)))


class Stem(nn.Module):
    """conv_1a halves time; I3D's two poolings in the stem are over space alone."""

    def __init__(self, inputs):
        super().__init__()
        self.conv_1a = Unit(inputs, 64, 7)
        self.conv_2b = Unit(64, 64)
        self.conv_2c = Unit(64, 192, 3)
        self.channels = 192

    def forward(self, rows, lengths):
        index, lengths = neighbours(lengths, 7, 2, rows.device)
        near, _ = neighbours(lengths, 3, 1, rows.device)
        return self.conv_2c(self.conv_2b(self.conv_1a(rows, index)), near), near, lengths


class Inception(nn.Module):
    """Four branches side by side; their channels are concatenated."""

    def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit(inputs, b0)
        self.b1a, self.b1b = Unit(inputs, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(inputs, b2a), Unit(b2a, b2b, 3)
        self.b3b = Unit(inputs, b3b)
        self.channels = b0 + b1b + b2b + b3b

    def forward(self, rows, near):
        """near: [N, 3], the rows a kernel of three frames sees."""
        return torch.cat((self.b0(rows), self.b1b(self.b1a(rows), near),
                          self.b2b(self.b2a(rows), near), self.b3b(max_pool(rows, near))), dim=1)


def check_stride(stride):
    """ValueError for a temporal_stride that the networks do not have."""
    if stride not in STRIDES:
        raise ValueError(f"temporal_stride {stride}, expected 2, 4 or 8")


class I3DTeacher(nn.Module):
    """I3D over time, BiLSTM, classifier. Children in the order of LAYERS.

    feature_dim: D. num_classes: V, with the CTC blank as class 0. temporal_stride: 8 is I3D's own
    (conv_1a and the poolings before mixed_4b and mixed_5b halve time); 4 leaves out the last of
    these, 2 both poolings.
    """

    def __init__(self, feature_dim, num_classes, temporal_stride=Config.temporal_stride,
                 hidden_size=Config.hidden_size, dropout=Config.dropout):
        super().__init__()
        check_stride(temporal_stride)
        self.feature_dim, self.dropout = feature_dim, dropout
        self.temporal_stride = temporal_stride
        # Set from the train split; with these defaults features are taken as they are.
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.stem = Stem(feature_dim)
        channels = self.stem.channels
        for name, branches in MIXED.items():
            block = Inception(channels, *branches)
            self.add_module(name, block)
            channels = block.channels
        self.lstm = nn.LSTM(channels, hidden_size, bidirectional=True)
        self.classifier = nn.Linear(2 * hidden_size, num_classes)

    def forward(self, features, lengths):
        """[B, T, D], [B] -> (logits [B, T', V], lengths' [B]); what lies past lengths' is noise."""
        rows, lengths = self._trunk_rows(features, lengths)
        rows = F.dropout(rows, self.dropout, self.training)
        hidden, _ = self.lstm(pack_sequence(rows.split(lengths.tolist()), enforce_sorted=False))
        hidden, _ = pad_packed_sequence(hidden, batch_first=True)           # [B, T', 2 * hidden]
        return self.classifier(F.dropout(hidden, self.dropout, self.training)), lengths

    def trunk(self, features, lengths):
        """[B, T, D], [B] -> (mixed_5c [B, T', 1024], zeros past the end, lengths' [B])."""
        rows, lengths = self._trunk_rows(features, lengths)
        return pad_sequence(rows.split(lengths.tolist()), batch_first=True), lengths

    def _trunk_rows(self, features, lengths):
        """[B, T, D], [B] -> ([N', 1024], lengths' [B] on the CPU)."""
        lengths = torch.as_tensor(lengths).cpu()
        if features.dim() != 3 or features.shape[2] != self.feature_dim:
            raise ValueError(f"features of shape {list(features.shape)}, expected [B, T, "
                             f"{self.feature_dim}]")
        if lengths.shape != features.shape[:1] or not 1 <= lengths.min() <= lengths.max() \
                <= features.shape[1]:
            raise ValueError(f"lengths {lengths.tolist()} for features of shape "
                             f"{list(features.shape)}, expected one from 1 to T a sentence")
        rows = torch.cat([f[:n] for f, n in zip(features, lengths.tolist())])  # [N, D]
        rows = standardised(rows, self)
        rows, near, lengths = self.stem(rows, lengths)
        for name in MIXED:
            kernel, from_stride = POOLS.get(name, (None, math.inf))
            if self.temporal_stride >= from_stride:
                index, lengths = neighbours(lengths, kernel, 2, rows.device)
                rows = max_pool(rows, index)
                near, _ = neighbours(lengths, 3, 1, rows.device)
            rows = getattr(self, name)(rows, near)
        return rows, lengths


# ---------------------------------------------------------------- decoding and evaluation

def greedy_decode(logits, lengths, vocabulary):
    """The best class of every frame, repeats merged, blanks dropped: [B, T', V] -> B tuples."""
    best = logits.argmax(dim=2).cpu()
    paths = (torch.unique_consecutive(b[:n]).tolist() for b, n in zip(best, lengths.tolist()))
    return [tuple(vocabulary[k] for k in path if k != 0) for path in paths]


class Beams(NamedTuple):
    """Prefixes of each sentence, as [B, W]; one without probability is an empty place."""

    blank: torch.Tensor  # log probability of all alignments so far that end with a blank
    other: torch.Tensor  # and that end with the prefix's last gloss
    last: torch.Tensor   # its class, 0 for the empty prefix
    key: torch.Tensor    # hash of the prefix


def beam_decode(logits, lengths, vocabulary, width, lm=None, symbols=None):
    """The most probable glosses, all their alignments together: [B, T', V] -> B tuples.

    CTC prefix beam search (Hannun et al. 2014), all sentences at once. width: W prefixes are kept
    after a frame; the result is exact where that loses none. lm: [V, V] nats to add with a gloss
    (column) after another (row), class 0 as begin and end: bigram_lm times its weight. symbols:
    K, the classes of a frame by which prefixes grow. The default width + 1 loses nothing: behind
    one prefix that many better classes fill the beam, one less where the best is a repeat. With
    lm it is 3 * width, and could lose something.
    """
    lengths, classes = lengths.to(logits.device), logits.shape[2]
    frames = logits.float().log_softmax(dim=2)                                       # [B, T', V]
    ended = torch.arange(frames.shape[1], device=lengths.device) >= lengths[:, None]
    frames[ended] = -math.inf
    frames[:, :, 0].masked_fill_(ended, 0)  # blanks for certain, which change nothing
    symbols = symbols or (width + 1 if lm is None else 3 * width)
    values, best = frames[:, :, 1:].topk(min(symbols, classes - 1))                  # [B, T', K]
    lm = None if lm is None else lm.to(frames.device)
    empty = torch.full((len(frames), width), -math.inf, dtype=torch.double, device=lengths.device)
    zero = torch.zeros_like(empty, dtype=torch.long)
    beams = Beams(empty.clone(), empty, zero, zero)
    beams.blank[:, 0] = 0  # the empty prefix
    history = []
    for frame, value, symbol in zip(frames.unbind(1), values.unbind(1), best.unbind(1)):
        beams, parent, symbol = next_beams(beams, frame, value, symbol + 1, lm)
        history.append((parent, symbol))
    total = torch.logaddexp(beams.blank, beams.other)
    total = total if lm is None else total + lm[beams.last, 0]
    place, paths = total.argmax(dim=1, keepdim=True), []
    for parent, symbol in reversed(history):
        paths.append(symbol.gather(1, place))
        place = parent.gather(1, place)
    return [tuple(vocabulary[k] for k in path if k) for path in torch.cat(paths[::-1], 1).tolist()]


def next_beams(beams, frame, value, symbol, lm):
    """(Beams after a frame, place each came from, class it grew by or 0), each [B, W].

    frame: log probabilities [B, V]. value, symbol: those of the classes to grow by, [B, K].
    """
    blank, other, last, key = beams
    total, hold = torch.logaddexp(blank, other), frame.gather(1, last)               # [B, W]

    def grown(symbol, value):
        """Log probability of each prefix with each class behind it: [B, n] -> [B, W, n]."""
        again = symbol[:, None] == last[:, :, None]  # a gloss twice needs a blank in between
        start = torch.where(again, blank[:, :, None], total[:, :, None])
        score = start + value[:, None]
        return score if lm is None else score + lm[last[:, :, None], symbol[:, None]]

    # Prefix i grown by a class may be prefix j, which is in the beam already: j takes it over.
    same = ((key[:, :, None] * HASH + last[:, None] == key[:, None])                 # [B, i, j]
            & (last[:, None] > 0) & (total[:, None] > -math.inf))
    taken_over = grown(last, hold).masked_fill(~same, -math.inf).amax(dim=1)
    known = same.float() @ (last[:, :, None] == symbol[:, None]).float() > 0         # [B, W, K]
    new = grown(symbol, value).masked_fill(known, -math.inf).flatten(1)              # [B, W * K]
    blank, other = total + frame[:, :1], torch.logaddexp(other + hold, taken_over)
    score, chosen = torch.cat([torch.logaddexp(blank, other), new], 1).topk(last.shape[1])
    kept, grows = chosen < last.shape[1], chosen - last.shape[1]
    parent = torch.where(kept, chosen, grows.div(symbol.shape[1], rounding_mode="floor"))
    symbol = symbol.gather(1, grows.remainder(symbol.shape[1])).masked_fill(kept, 0)
    last, key = last.gather(1, parent), key.gather(1, parent)
    return Beams(blank.gather(1, parent).masked_fill(~kept, -math.inf),
                 torch.where(kept, other.gather(1, parent), score),
                 torch.where(kept, last, symbol),
                 torch.where(kept, key, key * HASH + symbol)), parent, symbol


def bigram_lm(sentences, vocabulary):
    """[V, V] in nats: log P(gloss | gloss before) - log P(gloss), the one before as the row.

    sentences: tuples of glosses. Class 0 is their begin as a row and their end as a column. The
    network has learned how frequent a gloss is, and P alone would favour few glosses: what counts
    is how much more likely the one before makes it. P by absolute discounting; what that frees
    goes to all glosses by frequency (Ney et al. 1994).
    """
    classes = {gloss: k for k, gloss in enumerate(vocabulary)}
    paths = [[0, *(classes[gloss] for gloss in s if gloss in classes), 0] for s in sentences]
    pairs = torch.tensor([pair for path in paths for pair in zip(path, path[1:])])
    counts = torch.bincount(pairs @ torch.tensor([len(classes), 1]), minlength=len(classes) ** 2)
    counts = counts.view(len(classes), -1).double()                                  # [V, V]
    frequency = (counts.sum(dim=0) + 1) / (counts.sum() + len(classes))              # [V]
    kept = (counts - DISCOUNT).clamp(min=0) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return (kept / frequency + 1 - kept.sum(dim=1, keepdim=True)).log()


def make_decoder(data_dir, vocabulary, beam_width, lm_weight):
    """What --beam_width and --lm_weight ask for: (logits, lengths, vocabulary) -> B tuples.

    The language model is counted in the train annotations of data_dir (or the built-in corpus):
    a checkpoint's own, unless --data_dir names others.
    """
    if not 1 <= beam_width <= 1000 or not 0 <= lm_weight < math.inf:
        raise ValueError(f"--beam_width {beam_width} --lm_weight {lm_weight}: expected 1 to 1000 "
                         f"and a finite number of at least 0")
    if lm_weight and len(vocabulary) > MOST_BIGRAMS:
        raise ValueError(f"--lm_weight {lm_weight}: {len(vocabulary):,} glosses, expected at most "
                         f"{MOST_BIGRAMS:,}, whose pairs fit into memory")
    if beam_width == 1 and lm_weight == 0:
        return greedy_decode
    lm = None
    if lm_weight:
        corpus = read_corpus(data_dir) if data_dir else synthetic_corpus()
        lm = lm_weight * bigram_lm([s.glosses for s in corpus["train"]], vocabulary)
    return functools.partial(beam_decode, width=beam_width, lm=lm)


def ctc_losses(logits, lengths, batch):
    """[B] CTC losses in nats a gloss: each sentence's loss over its number of glosses."""
    log_probs = logits.float().log_softmax(dim=2).transpose(0, 1)           # [T', B, V]
    losses = F.ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths, blank=0,
                        reduction="none")
    return losses / batch.target_lengths.clamp(min=1).to(losses.device)


@torch.inference_mode()
def evaluate(model, sentences, vocabulary, device, batch_size=Config.batch_size,
             decode=greedy_decode):
    """(WordErrors, loss, hypotheses) in evaluation mode.

    loss: nats a gloss, mean over the sentences that CTC can align; None without any.
    """
    was_training = model.training
    model.eval()
    hypotheses, losses = [], []
    for batch in batches(sentences, vocabulary, batch_size, model.feature_dim):
        batch = batch.to(device)
        logits, lengths = model(batch.features, batch.lengths)
        hypotheses += decode(logits, lengths, vocabulary)
        losses.append(ctc_losses(logits, lengths, batch).cpu())
    model.train(was_training)
    losses = torch.cat(losses)
    losses = losses[losses.isfinite()]
    errors = score([sentence.glosses for sentence in sentences], hypotheses)
    return errors, losses.mean().item() if len(losses) else None, hypotheses


# ---------------------------------------------------------------- optimizer and schedule

def make_optimizer(model, config):
    """AdamW over every parameter, a group a layer, so that unfreezing never touches its state."""
    groups = [{"name": name, "params": list(layer.parameters())}
              for name, layer in model.named_children()]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay,
                             fused=True)


def learning_rate(config, step, steps):
    """Linear warm-up to the maximum, then half a cosine to zero; step counts from 0 to steps.

    steps are those of an unfreezing stage: what a stage releases would learn little from the
    small rates at the end of one decay over the whole run.
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_epoch(model, optimizer, epoch_batches, loss_function, rates, device, losses=(),
                stopped=()):
    """One pass, or the rest of one. loss_function(model, batch) -> scalar; rates: one a step.

    Returns the loss of each step, None for one that was left out because loss or gradient was not
    finite. losses: of the steps that were taken before an interruption, whose batches are only
    drawn, as they were then. Ends early, after a step, once something is in stopped.
    TrainingError after PATIENCE steps left out in a row, or where no step could be taken.
    """
    model.train()
    parameters, losses = [p for p in model.parameters() if p.requires_grad], list(losses)
    for rate, batch in itertools.islice(zip(rates, epoch_batches), len(losses), None):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_function(model, batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        value = loss.item()
        finite = math.isfinite(value) and math.isfinite(norm.item())
        losses.append(value if finite else None)
        if finite:
            optimizer.step()
        elif {*losses[-PATIENCE:]} == {None} and len(losses) >= min(PATIENCE, len(rates)):
            names = ", ".join(sentence.id for sentence in batch.sentences)
            raise TrainingError(f"loss or gradient was not finite in {len(losses[-PATIENCE:])} "
                                f"steps in a row (last batch: {names}): try a lower "
                                f"--learning_rate")
        if sys.stderr.isatty():  # one line, rewritten in place
            end = "\r" if len(losses) < len(rates) else "\r" + " " * 40 + "\r"
            print(f"  step {len(losses)}/{len(rates)}  loss {value:.3f}", end=end, file=sys.stderr)
        if stopped:
            break
    return losses


@contextlib.contextmanager
def finishing_steps():
    """In this block SIGTERM and Ctrl-C are only noted, in the list it gives; a second one acts."""
    noted, before = [], {}

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                before[number] = signal.getsignal(number)
                signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ctc_loss(model, batch):
    """Mean over the batch's sentences of the CTC loss in nats a gloss."""
    return ctc_losses(*model(batch.features, batch.lengths), batch).mean()


# ---------------------------------------------------------------- checkpoints, log, picture

def load_checkpoint(path, config_class):
    """A checkpoint's content, a dict. ValueError for a file that is missing or anything else."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, expected a checkpoint as "
                         f"{config_class.checkpoint}")
    content, parts = adapt.load_file(path), {"model_state_dict": dict, "vocabulary": list,
                                             "config": dict}
    if not isinstance(content, dict) or not all(
            isinstance(content.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{path}: not a {config_class.checkpoint}, expected "
                         f"{', '.join(parts)}")
    glosses = content["vocabulary"]
    if not all(isinstance(gloss, str) and gloss.isprintable() for gloss in glosses) \
            or not 2 <= len(glosses) == len(set(glosses)):
        raise ValueError(f"{path}: a vocabulary of none, equal or invisible glosses")
    # Plain dicts, whatever they were.
    return {**content, "config": {**content["config"]},
            "model_state_dict": {**content["model_state_dict"]}}


def load_model(path, build, config_class, device):
    """(model in evaluation mode, its checkpoint). build(config, D, V): an empty model.

    ValueError for a file that is missing or anything else.
    """
    checkpoint = load_checkpoint(path, config_class)
    saved, state = checkpoint["config"], checkpoint["model_state_dict"]
    names = {field.name for field in dataclasses.fields(config_class)}
    try:
        config = config_class(**{name: saved[name] for name in names & saved.keys()})
        with torch.device("meta"):  # no memory is touched before all shapes are known to fit
            model = build(config, len(state["feature_mean"]), len(checkpoint["vocabulary"]))
        model.to_empty(device="cpu").load_state_dict(state)
        if not is_finite(model) or (model.feature_std <= 0).any():
            raise ValueError("weights that are NaN or infinite, or deviations of 0")
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a {config_class.checkpoint} ({reason})") from error
    return model.to(device).eval(), checkpoint


def is_finite(model):
    """Whether no weight and no statistic of the model is NaN or infinite."""
    return all(value.isfinite().all() for value in model.state_dict().values())


def load_teacher(path, device="cpu"):
    """(I3DTeacher in evaluation mode, its checkpoint) of a best_i3d.pth or last.pth."""
    def build(config, feature_dim, num_classes):
        return I3DTeacher(feature_dim, num_classes, config.temporal_stride, config.hidden_size,
                          config.dropout)
    return load_model(path, build, Config, device)


def write_text(text, path):
    adapt.write_file(path, lambda file: file.write(text.encode()))


def curves_svg(rows, schedule, loss_name):
    """The picture of a run: loss (train, dev) and dev WER over its epochs, a band a stage."""
    epochs = schedule.epochs
    left, width, height = 60, 640, 180  # of a panel, in pixels
    x = lambda epoch: left + width * epoch / max(1, epochs - 1)
    best = min(rows, key=lambda row: row["wer"])
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="510" '
           f'font-family="sans-serif" font-size="12"><path d="M0 0h999v999h-999z" fill="white"/>']
    for top, factor, unit, series in (
            (40, 1, loss_name, (("train loss", "loss", "#1f77b4"),
                                          ("dev loss", "dev_loss", "#d62728"))),
            (280, 100, f"%, best {100 * best['wer']:.1f} at epoch {best['epoch']}",
             (("dev WER", "wer", "#d62728"),))):
        values = [factor * row[key] for _, key, _ in series for row in rows if row[key] is not None]
        ticks = axis_ticks(max(values, default=1))
        y = lambda value: top + height * (1 - value / ticks[-1])
        ends = (*schedule.starts[1:], epochs - 1)
        for stage, (start, end) in enumerate(zip(schedule.starts, ends)):
            out.append(f'<path d="M{x(start):.1f} {top}H{x(end):.1f}v{height}H{x(start):.1f}z" '
                       f'fill="{("#f6f6f6", "#e4ebf5")[stage % 2]}"/><text x="{x(start) + 4:.1f}" '
                       f'y="{top + 14}" fill="#666">{f"stage {stage}" * (len(ends) > 1)}</text>')
        out += [f'<path d="M{left} {y(tick):.1f}h{width}" stroke="#ccc"/><text x="{left - 6}" '
                f'y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>' for tick in ticks]
        for name, key, colour in series:
            points = " ".join(f"{x(row['epoch']):.1f},{y(factor * row[key]):.1f}"
                              for row in rows if row[key] is not None)
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                       f'stroke-width="2"/>')
        legend = " ".join(f'<tspan fill="{colour}" font-weight="bold">{name}</tspan>'
                          for name, _, colour in series)
        out.append(f'<text x="{left}" y="{top - 10}">{legend} ({unit})</text>')
    out += [f'<text x="{x(epoch):.1f}" y="478" text-anchor="middle">{epoch:g}</text>'
            for epoch in axis_ticks(max(1, epochs - 1)) if epoch % 1 == 0 and epoch < epochs]
    out.append(f'<text x="{left + width / 2}" y="498" text-anchor="middle">epoch</text></svg>')
    return "\n".join(out) + "\n"


def axis_ticks(high):
    """0 to at least high in at most five steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(max(high, 1e-6) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if 5 * m * power >= high)
    return [k * step for k in range(math.ceil(max(high, 1e-6) / step) + 1)]


# ---------------------------------------------------------------- training

def make_teacher(config, data, device):
    """(I3DTeacher with the weights config asks for, names of its fresh modules)."""
    torch.manual_seed(config.seed)
    model = I3DTeacher(len(data.mean), len(data.vocabulary), config.temporal_stride,
                       config.hidden_size, config.dropout)
    model.feature_mean.copy_(data.mean)
    model.feature_std.copy_(data.std)
    if not config.pretrained_weights:
        print("Weights: random (--pretrained_weights starts from a checkpoint)"
              + (", which freezing leaves alone: fresh parameters train in every epoch"
                 if config.schedule().frozen else ""))
        return model.to(device), list(LAYERS)
    report = adapt.load_pretrained(model, config.pretrained_weights, config.adapt_method,
                                   data.vocabulary)
    print(report)
    model.to(device)
    if config.adapt_method == "temporal_max" and report.adapted:
        print("temporal_max: BatchNorm statistics are re-estimated on the training features, "
              "since no exact rule carries them over")
        seen = batches(data.corpus["train"], data.vocabulary, config.batch_size, len(data.mean))
        adapt.estimate_batchnorm(model, ((b.features.to(device), b.lengths) for b in seen))
    return model, sorted({name.rpartition(".")[0] for name in report.fresh})


def train(model, data, config, device, fresh=(), loss_function=ctc_loss, last=None):
    """Train with CTC, or another loss_function(model, batch). Returns the best epoch's log row.

    fresh: names of modules that train in every epoch. last: the content of the last.pth that
    model is from, to go on. Writes checkpoints, log and picture into config.output_dir. On
    SIGTERM and Ctrl-C the step is finished and saved, then Interrupted raised.
    """
    folder, schedule = Path(config.output_dir), config.schedule()
    sentences = alignable(data, config.temporal_stride)
    steps = -(-len(sentences) // config.batch_size)
    optimizer, rows, losses = make_optimizer(model, config), [], []  # losses: of this epoch's steps
    header = run_header(config, model, data, device)
    if last:
        header, fresh, rows, losses = restore(last, folder / "last.pth", optimizer, data, device)
    check_room(folder, model, 3 if rows else 7)  # last.pth has three times the weights, best once

    def save(best=False):
        """Write last.pth, log and picture, before them the best epoch's checkpoint."""
        content = {"model_state_dict": model.state_dict(), "epoch": len(rows) - 1,
                   "wer": rows[-1]["wer"] if rows else None,
                   "config": dataclasses.asdict(config), "vocabulary": data.vocabulary}
        if best:
            adapt.write_tensors(content, folder / config.checkpoint)
        content |= {"optimizer": optimizer.state_dict(), "random": random_state(device),
                    "schedule": {"starts": schedule.starts, "fresh": [*fresh]},
                    "header": header, "log": rows, "losses": losses}
        adapt.write_tensors(content, folder / "last.pth")
        write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)),
                   folder / "log.jsonl")
        if rows:
            write_text(curves_svg(rows, schedule, config.loss_name), folder / "curves.svg")

    if not last:
        move_aside(folder)
    save()  # now, so that there is something to go on from at any time, and a full disk shows
    print(f"{config.epochs} epochs of {steps} steps on {device}, into {folder}/", flush=True)
    started, done = time.monotonic(), len(rows)
    with finishing_steps() as stopped:
        for epoch in range(done, config.epochs):
            freeze.apply_freeze(model, (*schedule.trainable(epoch), *fresh))
            if epoch in schedule.starts:
                print_stage(epoch, schedule, model)
            first, end = schedule.span(epoch)
            rates = [learning_rate(config, (epoch - first) * steps + step, (end - first) * steps)
                     for step in range(steps)]
            losses = train_epoch(model, optimizer, training_batches(sentences, data, config, epoch),
                                 loss_function, rates, device, losses, stopped)
            if not is_finite(model):
                raise TrainingError(f"weights or statistics are NaN or infinite in epoch {epoch}, "
                                    f"{folder / 'last.pth'} is from before: try a lower "
                                    f"--learning_rate")
            if not stopped:
                errors, dev_loss, _ = evaluate(model, data.corpus["dev"], data.vocabulary, device)
                rows.append(log_row(epoch, schedule, losses, dev_loss, errors, rates[-1]))
                losses, best = [], min(rows, key=lambda row: row["wer"])
                pace = (time.monotonic() - started) / (epoch + 1 - done)  # seconds an epoch
                print_epoch(rows[-1], best, pace * (config.epochs - 1 - epoch))
            save(best=not losses and best is rows[-1])
            if stopped:
                raise Interrupted(stopped[0], f"in epoch {len(rows)} after step {len(losses)}")
    return min(rows, key=lambda row: row["wer"])


def log_row(epoch, schedule, losses, dev_loss, errors, rate):
    """An epoch's line of the log. losses: a step each, averaged over the steps that were taken."""
    taken = [loss for loss in losses if loss is not None]
    return {"epoch": epoch, "stage": schedule.stage(epoch), "loss": sum(taken) / len(taken),
            "dev_loss": dev_loss, "wer": errors.wer, **dataclasses.asdict(errors),
            "learning_rate": rate, "skipped_steps": losses.count(None),
            "released": schedule.describe(epoch) if epoch in schedule.starts else None}


def restore(last, path, optimizer, data, device):
    """(header, fresh, rows, losses) of a last.pth; sets optimizer and random generators to it.

    ValueError where it was made from other data, or is no last.pth of this version.
    """
    try:
        if (last["vocabulary"], last["header"]["data"]) != (data.vocabulary, data.digest):
            raise ValueError("made from other data, expected the same vocabulary and features")
        rows, losses, fresh = [*last["log"]], [*last["losses"]], [*last["schedule"]["fresh"]]
        if [row["epoch"] for row in rows] != [*range(len(rows))] or not all(
                type(value) is float and abs(value) < 1e9 for value in (
                    *(loss for loss in losses if loss is not None),
                    *(row[key] for row in rows for key in ("loss", "dev_loss", "wer")
                      if key == "wer" or row[key] is not None))):
            raise ValueError("a log of other epochs, or of what are no losses")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": last["optimizer"]["state"]})
        for group, saved in zip(optimizer.param_groups, last["optimizer"]["param_groups"]):
            group["lr"] = float(saved["lr"])
        for p, state in optimizer.state.items():
            for name, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
                moment = state[name]  # the fused kernels trust these
                if moment.shape != shape or not moment.is_contiguous() or not (
                        moment.isfinite() & ((moment >= 0) | (name == "exp_avg"))).all():
                    raise ValueError(f"an optimizer's {name} that cannot be")
        if rows and not optimizer.state:
            raise ValueError("no optimizer state")
        json.dumps([last["header"], rows, "".join(fresh)])
        set_random_state(last["random"], device)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError,
            ValueError) as error:
        raise ValueError(f"{path}: cannot be gone on from ({error}), expected a last.pth of this "
                         f"version") from error
    print(f"Going on after epoch {len(rows) - 1} and {len(losses)} more steps of {path}")
    return last["header"], fresh, rows, losses


def check_room(folder, model, times):
    """OSError where the disk has no room for the checkpoints, `times` the weights. Leftovers of
    writes that were killed go first."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (path for name in OUTPUTS for path in folder.glob(f"{name}.*.tmp")):
        leftover.unlink()
    needed = times * sum(v.numel() * v.element_size() for v in model.state_dict().values())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder}: {free / 1e6:.0f} MB are free on its disk, expected "
                      f"{needed / 1e6:.0f} MB for the checkpoints")


def print_stage(epoch, schedule, model):
    """Say what trains from this epoch on."""
    sizes = {p: p.numel() for p in model.parameters()}
    print(f"epoch {epoch:>3}  {schedule.describe(epoch)} "
          f"({sum(n for p, n in sizes.items() if p.requires_grad):,} of "
          f"{sum(sizes.values()):,} parameters"
          + (" train, fresh ones always)" if schedule.frozen else ")"))


def print_epoch(row, best, left):
    loss, dev_loss = (f"{math.nan if row[key] is None else row[key]:6.3f}"
                      for key in ("loss", "dev_loss"))
    skipped = f"  {row['skipped_steps']} steps not finite" if row["skipped_steps"] else ""
    print(f"epoch {row['epoch']:>3}  loss {loss}  dev loss {dev_loss}  dev WER "
          f"{100 * row['wer']:6.2f}%  best {100 * best['wer']:6.2f}% at {best['epoch']:<3}  "
          f"left {int(left) // 60}:{int(left) % 60:02d}{skipped}", flush=True)


def run_header(config, model, data, device):
    """The log's first row: what a reader needs to repeat the run."""
    return {"arguments": dataclasses.asdict(config), "seed": config.seed,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "numpy": np.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sentences": {split: len(sentences) for split, sentences in data.corpus.items()},
            "data": data.digest}


def random_state(device):
    """What dropout draws from: of the CPU and, where the run is on one, of the GPU."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "cuda" or state["cuda"] is not None:
        print("Going on on another kind of device: the end will not be exactly the same")


# ---------------------------------------------------------------- the program

ANYWAY = {"data_dir", "output_dir", "device"}  # flags of files and machines, not of a training


def flags_given(given):
    """Names of the flags of a command line that were given."""
    return {name for name, value in given.items() if value is not None and value is not False}


def move_aside(folder):
    """Keep an earlier run's files: they move to the first free folder/earlier_N."""
    files = [path for name in OUTPUTS for path in folder.glob(name)]
    if files:
        target = next(t for n in range(1, 10 ** 6) if not (t := folder / f"earlier_{n}").exists())
        target.mkdir()
        for file in files:
            file.rename(target / file.name)
        print(f"An earlier run's files in {folder}/ are now in {target}/")


def resumed_config(given, last, path, config_class):
    """The interrupted run's config; flags that would make it another run are refused."""
    saved, known = last["config"], {field.name for field in dataclasses.fields(config_class)}
    if set(saved) != known:
        raise ValueError(f"{path}: flags {', '.join(map(str, set(saved) ^ known))} are of another "
                         f"version or program, expected the one that began the run")
    config = config_class(**{**saved, **given, "output_dir": str(path.parent)})
    for name in given.keys() - ANYWAY:
        if getattr(config, name) != saved[name]:
            raise ValueError(f"--{name} {given[name]}: {path} was run with {saved[name]}, "
                             f"expected --resume without it")
    return config


def writable_folder(given, config_class):
    """--output_dir as a Path; ValueError where nothing can be written."""
    folder = Path(given.get("output_dir", config_class.output_dir))
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):  # the one way to know
            return folder
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot write there ({error.strerror}), expected "
                         f"a directory") from error


def run_training(given, resume):
    """Train, or go on training, then score the best checkpoint. Returns what --json prints."""
    folder = writable_folder(given, Config)
    model, last = load_teacher(folder / "last.pth") if resume else (None, None)
    config = (resumed_config(given, last, folder / "last.pth", Config) if resume
              else Config(**given))
    if "unfreeze_stages" in given and not config.progressive_unfreeze:
        print("--unfreeze_stages does nothing without --progressive_unfreeze")
    device = pick_device(config.device)
    data = read_data(config.data_dir)
    describe_data(data, config.data_dir)
    model, fresh = (model.to(device), ()) if resume else make_teacher(config, data, device)
    best = train(model, data, config, device, fresh, last=last)
    path = folder / config.checkpoint
    print(f"Best dev WER {100 * best['wer']:.2f}% at epoch {best['epoch']}: {path}")
    result = {"checkpoint": str(path), "epoch": best["epoch"], "dev_wer": best["wer"]}
    if "test" in data.corpus:
        model, _ = load_teacher(path, device)
        errors, _, _ = evaluate(model, data.corpus["test"], data.vocabulary, device)
        print(f"Test {errors}")
        result["test_wer"] = errors.wer
    return result


def run_evaluation(path, split, given, load, decoding):
    """Score a checkpoint on a split of its own data, or of --data_dir."""
    device = pick_device(given.get("device", TrainingConfig.device))
    model, checkpoint = load(path, device)
    data_dir = given.get("data_dir", checkpoint["config"].get("data_dir", ""))
    corpus = read_corpus(data_dir) if data_dir else synthetic_corpus()
    if split not in corpus:
        raise ValueError(f"{data_dir}: has no {split} split, expected one of {', '.join(corpus)}")
    sentences, vocabulary = corpus[split], checkpoint["vocabulary"]
    unknown = {g for s in sentences for g in s.glosses} - set(vocabulary)
    if all(g in unknown for s in sentences for g in s.glosses):
        raise ValueError(f"{data_dir or 'built-in corpus'}: no gloss of its {split} split is in "
                         f"the vocabulary of {path}, expected the data it was trained for")
    if unknown:
        print(f"{len(unknown)} glosses are not in the vocabulary of {path}, each occurrence an "
              f"error for certain: {' '.join(sorted(unknown))}")
    decode = make_decoder(data_dir, vocabulary, **decoding)
    errors, _, hypotheses = evaluate(model, sentences, vocabulary, device, decode=decode)
    for sentence, hypothesis in zip(sentences, hypotheses):
        print(f"{sentence.id}\n  ref  {' '.join(sentence.glosses)}\n  hyp  {' '.join(hypothesis)}")
    print(f"{path} on {split}: {errors}")
    return {"checkpoint": str(path), "split": split, **decoding, "wer": errors.wer,
            "ser": errors.ser, **dataclasses.asdict(errors),
            "hypotheses": {s.id: hyp for s, hyp in zip(sentences, hypotheses)}}


def run_prediction(path, files, given, load, decoding):
    """Print the glosses of feature files."""
    device = pick_device(given.get("device", TrainingConfig.device))
    model, checkpoint = load(path, device)
    data_dir = given.get("data_dir", checkpoint["config"].get("data_dir", ""))
    decode = make_decoder(data_dir, checkpoint["vocabulary"], **decoding)
    sentences = [Sentence(file, "", (), file) for file in files]
    _, _, hypotheses = evaluate(model, sentences, checkpoint["vocabulary"], device, 1, decode)
    for file, hypothesis in zip(files, hypotheses):
        print(f"{file}: {' '.join(hypothesis)}")
    return {"checkpoint": str(path), "predictions": dict(zip(files, hypotheses))}


def run_write_corpus(directory):
    if Path(directory).exists():
        raise ValueError(f"{directory}: is there already, expected a new directory")
    write_corpus(synthetic_corpus(), directory)
    print(f"The built-in corpus is in {directory}/: train on it with --data_dir {directory}")
    return {"data_dir": str(directory)}


def pick_device(name):
    """torch.device of "cpu", "cuda", ... or "auto". ValueError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not name.startswith(("cpu", "cuda")):
            raise RuntimeError("not a device that trains")
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name}: {reason}, expected cpu or cuda") from error


def make_parser(program, description, config_class):
    """(parser of the flags that teacher.py and distill.py share, its either-or group)."""
    parser = argparse.ArgumentParser(program, description=description, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{program}: {message} (see --help)\n")
    add_config_flags(parser, config_class)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true",
                        help="go on from --output_dir's last.pth, with its flags")
    either.add_argument("--evaluate", metavar="CHECKPOINT", help="score a checkpoint, do not train")
    parser.add_argument("--split", choices=SPLITS, help="what --evaluate scores (default: dev)")
    parser.add_argument("--predict", metavar="FILE", nargs="+",
                        help="print the glosses of feature files, with the checkpoint of "
                             f"--evaluate, else --output_dir's {config_class.checkpoint}")
    parser.add_argument("--beam_width", type=int, default=argparse.SUPPRESS,
                        help="prefixes that --evaluate and --predict keep in CTC beam search "
                             f"(default: {DECODING['beam_width']}, greedy)")
    parser.add_argument("--lm_weight", type=float, default=argparse.SUPPRESS,
                        help="of a bigram language model of the train annotations in that search "
                             f"(default: {DECODING['lm_weight']})")
    parser.add_argument("--json", action="store_true",
                        help="the last line on stdout is one JSON object, all else is on stderr")
    return parser, either


def run(given, config_class, load, training):
    """Evaluate, predict or train, as the flags say. Returns what --json prints."""
    resume, checkpoint, split, files = (given.pop(name) for name in (
        "resume", "evaluate", "split", "predict"))
    decoding = {name: given.pop(name) for name in DECODING if name in given}
    evaluating = checkpoint is not None
    if decoding and not (files or evaluating):
        raise ValueError(f"--{min(decoding)}: expected with --evaluate or --predict, training is "
                         f"scored by greedy decoding")
    decoding = {**DECODING, **decoding}
    if (files and resume) or (split and (files or not evaluating)):
        raise ValueError(f"--{'predict' if files else 'split'}: expected with --evaluate "
                         f"CHECKPOINT and without --resume, and not both")
    if not files and not evaluating:
        return training(given, resume)
    if unused := given.keys() - ANYWAY:
        raise ValueError(f"--{min(unused)}: a flag of training, expected without --evaluate and "
                         f"--predict")
    if files:
        folder = Path(given.get("output_dir", config_class.output_dir))
        checkpoint = checkpoint or folder / config_class.checkpoint
        return run_prediction(checkpoint, files, given, load, decoding)
    return run_evaluation(checkpoint, split or "dev", given, load, decoding)


def run_program(parser, argv, function):
    """function(flags as a dict) -> what --json prints; errors become one line and a status."""
    argv = sys.argv[1:] if argv is None else argv
    given, program = vars(parser.parse_args(argv)), parser.prog
    as_json = given.pop("json")
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            result = function(given)
    except ValueError as error:
        parser.exit(2, f"{program}: {adapt.printable(str(error))}\n")
    except (OSError, TrainingError, adapt.FetchError) as error:
        parser.exit(1, f"{program}: {adapt.printable(str(error))}\n")
    except (MemoryError, RuntimeError) as error:
        # Of the CPU's memory torch speaks in a plain RuntimeError; all others are not the user's.
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError))
                or "can't allocate memory" in str(error)):
            raise
        reason = str(error).split("\n")[0]
        parser.exit(1, f"{program}: out of memory ({reason}), try a smaller --batch_size\n")
    except Interrupted as stop:
        again = shlex.join([*argv, *["--resume"] * ("--resume" not in argv)])
        parser.exit(128 + stop.number, f"{program}: {stop}, saved; to go on from there: python "
                                       f"{program} {again}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{program}: interrupted\n")
    if as_json:
        print(json.dumps(result))


def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser, either = make_parser("teacher.py", __doc__.split("\n")[0], Config)
    either.add_argument("--write_corpus", metavar="DIR",
                        help="write the built-in corpus in the layout of --data_dir")
    either.add_argument("--validate_data", metavar="DIR",
                        help="report what training would meet in a corpus directory; exit status "
                             "0 if it can run")

    def function(given):
        """What the flags ask for; returns what --json prints."""
        alone = {"write_corpus": run_write_corpus, "validate_data": validate_data}
        targets = {name: given.pop(name) for name in alone}
        for name, target in targets.items():
            if target is not None:
                if unused := flags_given(given) - ANYWAY:
                    raise ValueError(f"--{min(unused)}: expected --{name} without it")
                return alone[name](target)
        return run(given, Config, load_teacher, run_training)
    run_program(parser, argv, function)


if __name__ == "__main__":
    main()
