"""The teacher: a 1D I3D trunk and a BiLSTM, trained with CTC on per-frame features.

    $ python teacher.py --pretrained_weights i3d_kinetics400 --progressive_unfreeze
    $ python teacher.py --data_dir DIR --pretrained_weights i3d_kinetics400 --epochs 150
    $ python teacher.py --evaluate checkpoints/teacher/best_i3d.pth --split test
    $ python teacher.py --predict recording.npy another.npy
    $ python teacher.py --write_corpus corpus         # the built-in corpus as files: the layout

The network is I3D (Carreira & Zisserman 2017, arXiv 1705.07750, figure 3) over time alone, with
connectionist temporal classification (Graves et al. 2006) over glosses. What a run writes lies in
--output_dir: best_i3d.pth, last.pth, log.jsonl and curves.svg.

Axes: B sentences of a batch, T frames, T' frames after temporal_stride, N frames of a whole batch
one after the other ("rows"), D features, C channels, V classes with the CTC blank as class 0,
L glosses of a sentence. Epochs are counted from 0.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import platform
import sys
import time
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
from wer import score

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
COLUMNS = ({"id": "id", "signer": "signer", "glosses": "annotation"},     # Phoenix-2014
           {"id": "name", "signer": "speaker", "glosses": "orth"})        # Phoenix-2014-T
BROKEN = {"13April_2011_Wednesday_tagesschau_default-14"}  # of Phoenix-2014: its video is damaged

SPEED = (0.8, 1.25)      # training sentences are played at a length factor drawn from this range
NOISE = 0.1              # standard deviation of training noise, in standard deviations of a feature
CLIP_NORM = 5.0          # largest norm of the gradient of all parameters together
WARMUP = 0.1             # share of all steps in which the learning rate rises to its maximum
PATIENCE = 10            # non-finite training steps in a row after which training stops


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


# ---------------------------------------------------------------- configuration

def option(default, text, **argparse_options):
    """A field of Config that is also a command line flag of the same name."""
    return dataclasses.field(default=default, metadata={"help": text, **argparse_options})


@dataclass
class Config:
    """What makes a run what it is: saved in its checkpoints, and the only place of defaults."""

    data_dir: str = option("", "corpus directory (default: the built-in synthetic corpus)")
    output_dir: str = option("checkpoints/teacher", "where checkpoints, log and picture go")
    pretrained_weights: str = option(
        "", f"checkpoint to start from: a file or {adapt.KINETICS} (default: random weights)",
        metavar="NAME|PATH")
    adapt_method: str = option(adapt.METHOD, "how 3D kernels become 1D", choices=adapt.METHODS)
    freeze_backbone: bool = option(False, f"freeze stem to {BACKBONE[-1]}")
    freeze_until_layer: str = option("", "freeze stem to LAYER, LAYER included", metavar="LAYER")
    progressive_unfreeze: bool = option(
        False, "freeze, then release from the top over the epochs (see freeze.py)")
    unfreeze_stages: int = option(freeze.STAGES, "stages of --progressive_unfreeze")
    epochs: int = option(50, "passes over the training sentences")
    batch_size: int = option(8, "sentences a step")
    learning_rate: float = option(1e-3, "AdamW's maximum, after warm-up and before cosine decay")
    weight_decay: float = option(0.01, "AdamW's")
    temporal_stride: int = option(4, "frames of the input a frame of the output",
                                  choices=(2, 4, 8))
    hidden_size: int = option(256, "LSTM units a direction")
    dropout: float = option(0.5, "before and after the LSTM")
    seed: int = option(0, "of weights, data order, augmentation and dropout")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")

    def __post_init__(self):
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("hidden_size", 1), ("seed", 0),
                             ("unfreeze_stages", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {lowest}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning_rate {self.learning_rate}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: expected at least 0 and below 1")
        if self.freeze_until_layer not in ("", *BACKBONE):
            raise ValueError(f"--freeze_until_layer {self.freeze_until_layer}: unknown layer, "
                             f"expected one of {', '.join(BACKBONE)}")
        self.schedule()

    def schedule(self):
        """The UnfreezeSchedule that the four freezing flags ask for."""
        frozen = self.freeze_backbone or self.progressive_unfreeze or self.freeze_until_layer
        until = (self.freeze_until_layer or freeze.FREEZE_UNTIL) if frozen else None
        stages = self.unfreeze_stages if self.progressive_unfreeze else 1
        return freeze.UnfreezeSchedule(LAYERS, self.epochs, stages, until)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def add_config_flags(parser, config_class=Config):
    """One flag a field. Flags that are not given stay absent, so that Config has the defaults."""
    for field in dataclasses.fields(config_class):
        options = dict(field.metadata)
        if field.default not in ("", False):
            options["help"] += f" (default: {field.default})"
        options |= {"action": "store_true"} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


# ---------------------------------------------------------------- data

class Sentence(NamedTuple):
    id: str
    signer: str
    glosses: tuple
    features: object  # path of a .npy or .npz file, or the array [T, D] itself


def read_corpus(directory):
    """{split: [Sentence]} of a directory in the project's layout; features are not read yet.

    Understands the columns of Phoenix-2014 (id, signer, annotation) and Phoenix-2014-T (name,
    speaker, orth), separated by |. ValueError names file, line and what was expected.
    """
    directory, corpus = Path(directory), {}
    for split in SPLITS:
        candidates = [directory / name.format(split) for name in ANNOTATIONS]
        path = next((path for path in candidates if path.is_file()), None)
        if path:
            corpus[split] = read_annotations(path, directory / "features" / split)
        elif split != "test":
            raise ValueError(f"{candidates[0]}: no such file, expected the {split} annotations "
                             f"there or at {', '.join(ANNOTATIONS[1:]).format(*[split] * 5)}")
    return corpus


def read_annotations(path, feature_dir):
    """[Sentence] of one corpus file, with the paths of their features."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a UTF-8 text file with lines ({error})") from error
    header = rows[0] if rows else []
    columns = next((c for c in COLUMNS if set(c.values()) <= set(header)), None)
    if columns is None:
        raise ValueError(f"{path}:1: header is {'|'.join(header)[:100]!r}, expected "
                         f"id|folder|signer|annotation or "
                         f"name|video|start|end|speaker|orth|translation")
    sentences = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(f"{path}:{number}: {len(row)} columns, expected {len(header)}")
        entry = dict(zip(header, row))
        name, glosses = entry[columns["id"]], tuple(entry[columns["glosses"]].split())
        if not name.isprintable() or name != Path(name).name or "\\" in name:
            raise ValueError(f"{path}:{number}: id {name!r}, expected a plain file name")
        if name in sentences:
            raise ValueError(f"{path}:{number}: id {name} again, expected each id once")
        if not glosses:
            raise ValueError(f"{path}:{number}: {name} has an empty annotation, expected glosses")
        npz = feature_dir / f"{name}.npz"
        sentences[name] = Sentence(name, entry[columns["signer"]], glosses,
                                   npz if npz.is_file() else feature_dir / f"{name}.npy")
    if not sentences:
        raise ValueError(f"{path}: no sentences, expected at least one line below the header")
    return list(sentences.values())


def read_features(source, dim=None):
    """[T, D] float32 from a .npy file, a .npz file with one array, or an array.

    ValueError for a file that is missing or broken, and for anything but finite floating point
    numbers with two axes, at least one frame, and D = dim where dim is given.
    """
    features = source
    if isinstance(source, (str, Path)):
        try:
            features = np.load(source, allow_pickle=False)
            if isinstance(features, np.lib.npyio.NpzFile):
                with features as archive:
                    if len(archive.files) != 1:
                        raise ValueError(f"{len(archive.files)} arrays in it, expected one")
                    features = archive[archive.files[0]]
        # numpy raises whatever a broken header or archive leads it to (BadZipFile, EOFError, ...)
        except Exception as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"{source}: {reason}, expected features [T, D]") from error
    else:
        source = "features"
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise ValueError(f"{source}: {features.dtype} array of shape {list(features.shape)}, "
                         f"expected floating point [T, D]")
    if dim and features.shape[1] != dim:
        raise ValueError(f"{source}: {features.shape[1]} features a frame, expected {dim}")
    if not np.isfinite(features).all():
        frame = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise ValueError(f"{source}: NaN or infinity in frame {frame}, expected finite numbers")
    return features.astype(np.float32, copy=False)


class Survey(NamedTuple):
    """What one pass over a corpus finds."""

    mean: torch.Tensor  # [D] over the frames of the train split
    std: torch.Tensor   # [D], 1 for a constant feature
    frames: dict        # split -> frames of each sentence


def survey(corpus):
    """Read every feature file once: statistics of the train split, and ValueError for bad files."""
    frames, total, squares, dim = {}, 0.0, 0.0, None
    for split, sentences in corpus.items():
        frames[split] = []
        for sentence in sentences:
            features = read_features(sentence.features, dim).astype(np.float64)
            dim = features.shape[1]
            frames[split].append(len(features))
            if split == "train":
                total, squares = total + features.sum(0), squares + (features ** 2).sum(0)
    count = sum(frames["train"])
    mean = total / count
    variance = np.maximum(squares / count - mean ** 2, 0)
    std = np.sqrt(np.where(variance > 1e-12 * squares / count, variance, 1))
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float32)
    return Survey(as_tensor(mean), as_tensor(std), frames)


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


def training_batches(sentences, vocabulary, config, epoch, std):
    """Shuffled and augmented batches of one epoch: a pure function of config.seed and epoch."""
    rng = np.random.default_rng([config.seed, epoch])
    shuffled = [sentences[i] for i in rng.permutation(len(sentences))]
    std = std.cpu().numpy()

    def augmentation(features, sentence):
        shortest = (frames_needed(sentence.glosses) - 1) * config.temporal_stride + 1
        features = change_speed(features, rng.uniform(*SPEED), shortest)
        noise = rng.standard_normal(features.shape, dtype=np.float32)
        return features + NOISE * std * noise

    return batches(shuffled, vocabulary, config.batch_size, len(std), augmentation)


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
SIZES = {"train": 240, "dev": 60, "test": 60}


def synthetic_corpus(seed=0, sizes=SIZES):
    """{split: [Sentence]} of made-up signing, a pure function of the seed. D = 16.

    A gloss is a sequence of three poses out of an inventory of seven, so glosses share poses and
    differ in their order, as signs do. Between poses the features glide, inside a gloss and from
    one gloss to the next (coarticulation). Eight signers differ in size, place, speed and style;
    two of them sign in dev and test only. A frame in some 30 starts a gap in which one "hand"
    (half of the features) is lost and reads zero, as trackers write it.
    """
    rng = np.random.default_rng([seed, 104])
    poses = rng.standard_normal((7, 16))
    triples = [(a, b, c) for a in range(7) for b in range(7) for c in range(7) if a != b != c]
    forms = dict(zip(GLOSSES, (triples[i] for i in rng.permutation(len(triples)))))
    successors = {g: [GLOSSES[i] for i in rng.permutation(len(GLOSSES))[:6]] for g in GLOSSES}
    signers = [{"scale": rng.uniform(0.7, 1.3), "offset": 0.4 * rng.standard_normal(16),
                "speed": rng.uniform(0.8, 1.25), "style": 0.3 * rng.standard_normal((7, 16))}
               for _ in range(8)]
    corpus = {}
    for split, size in sizes.items():
        corpus[split] = []
        for i in range(size):
            who = int(rng.integers(0, 6 if split == "train" else 8))
            glosses = [GLOSSES[rng.integers(len(GLOSSES))]]
            while len(glosses) < 3 or (len(glosses) < 7 and rng.random() < 0.7):
                glosses.append(successors[glosses[-1]][rng.integers(6)])
            features = _sign([forms[g] for g in glosses], poses, signers[who], rng)
            corpus[split].append(Sentence(f"{split}-{i:04d}", f"signer-{who}", tuple(glosses),
                                          features))
    return corpus


def _sign(forms, poses, signer, rng):
    """[T, 16] of one sentence: through the poses of its glosses, then the signer, then noise."""
    rest = np.zeros(16)
    targets, times = [rest], [0.0]
    for form in forms:
        for k, pose in enumerate(form):
            # Frames from pose to pose: a glide into the gloss is longer than one inside it.
            times.append(times[-1] + rng.uniform(3, 6) * (1.5 if k == 0 else 1) / signer["speed"])
            targets.append(poses[pose] + signer["style"][pose] + 0.15 * rng.standard_normal(16))
    times.append(times[-1] + 4)
    targets.append(rest)
    t = np.arange(int(times[-1]) + 1)
    track = np.stack([np.interp(t, times, values) for values in np.array(targets).T], axis=1)
    track = signer["scale"] * track + signer["offset"] + 0.2 * rng.standard_normal(track.shape)
    for start in np.flatnonzero(rng.random(len(t)) < 1 / 30):
        hand = 8 * int(rng.integers(2))
        track[start:start + int(rng.integers(1, 5)), hand:hand + 8] = 0
    return track.astype(np.float32)


def write_corpus(corpus, directory):
    """Write a corpus with its features in memory to files in the project's layout."""
    for split, sentences in corpus.items():
        folder = Path(directory) / "features" / split
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["id|folder|signer|annotation"]
        for s in sentences:
            np.save(folder / f"{s.id}.npy", s.features)
            lines.append(f"{s.id}|{s.id}/1/*.png|{s.signer}|{' '.join(s.glosses)}")
        path = Path(directory) / f"{split}.corpus.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the network

def neighbours(lengths, kernel, stride):
    """Which rows each output row of a convolution or pooling over time sees.

    lengths: [B] frames. Returns (index [N', kernel], lengths' [B] = ceil(lengths / stride)). The
    frames of a batch lie one after the other in N = sum(lengths) rows; index N stands for a row
    of zeros, which is what a frame before a sentence's start or after its end reads. TensorFlow's
    SAME padding at a length that the stride divides: (kernel - stride) // 2 frames on the left.
    """
    outputs = -(-lengths // stride)
    sentence = torch.repeat_interleave(outputs)                             # [N']
    position = torch.arange(len(sentence)) - (outputs.cumsum(0) - outputs)[sentence]
    frame = (position * stride - (kernel - stride) // 2)[:, None] + torch.arange(kernel)
    inside = (frame >= 0) & (frame < lengths[sentence][:, None])            # [N', kernel]
    first = (lengths.cumsum(0) - lengths)[sentence][:, None]
    return torch.where(inside, first + frame, lengths.sum()), outputs


def gather(rows, index):
    """[N, C], [N', kernel] -> [N', kernel, C], zeros where the index is N."""
    return F.embedding(index, F.pad(rows, (0, 0, 0, 1)), padding_idx=len(rows))


def max_pool(rows, index):
    """[N, C] -> [N', C]. Rows come out of a ReLU, so the zeros outside a sentence change nothing."""
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

    def forward(self, rows, lengths, device):
        index, lengths = neighbours(lengths, kernel=7, stride=2)
        rows = self.conv_2b(self.conv_1a(rows, index.to(device)))
        index, _ = neighbours(lengths, kernel=3, stride=1)
        return self.conv_2c(rows, index.to(device)), lengths


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


class I3DTeacher(nn.Module):
    """I3D over time, BiLSTM, classifier. Children in the order of LAYERS.

    feature_dim: D. num_classes: V, with the CTC blank as class 0. temporal_stride: 8 is I3D's own
    (conv_1a and the poolings before mixed_4b and mixed_5b halve time); 4 leaves out the last of
    these, 2 both poolings.
    """

    def __init__(self, feature_dim, num_classes, temporal_stride=Config.temporal_stride,
                 hidden_size=Config.hidden_size, dropout=Config.dropout):
        super().__init__()
        if temporal_stride not in (2, 4, 8):
            raise ValueError(f"temporal_stride {temporal_stride}, expected 2, 4 or 8")
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
        rows = (rows - self.feature_mean) / self.feature_std
        rows, lengths = self.stem(rows, lengths, rows.device)
        near = neighbours(lengths, kernel=3, stride=1)[0].to(rows.device)
        for name in MIXED:
            kernel, from_stride = POOLS.get(name, (None, math.inf))
            if self.temporal_stride >= from_stride:
                index, lengths = neighbours(lengths, kernel, stride=2)
                rows = max_pool(rows, index.to(rows.device))
                near = neighbours(lengths, kernel=3, stride=1)[0].to(rows.device)
            rows = getattr(self, name)(rows, near)
        return rows, lengths


# ---------------------------------------------------------------- decoding and evaluation

def greedy_decode(logits, lengths, vocabulary):
    """The best class of every frame, repeats merged, blanks dropped: [B, T', V] -> B tuples."""
    best = logits.argmax(dim=2).cpu()
    paths = (torch.unique_consecutive(b[:n]).tolist() for b, n in zip(best, lengths.tolist()))
    return [tuple(vocabulary[k] for k in path if k != 0) for path in paths]


def ctc_losses(logits, lengths, batch):
    """[B] CTC losses in nats a gloss: each sentence's loss over its number of glosses."""
    log_probs = logits.float().log_softmax(dim=2).transpose(0, 1)           # [T', B, V]
    losses = F.ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths, blank=0,
                        reduction="none")
    return losses / batch.target_lengths.clamp(min=1).to(losses.device)


class Evaluation(NamedTuple):
    errors: object     # wer.WordErrors
    loss: float        # nats a gloss, mean over the sentences CTC can align; None without any
    hypotheses: list   # a tuple of glosses a sentence


@torch.inference_mode()
def evaluate(model, sentences, vocabulary, device, batch_size=Config.batch_size):
    """Greedy decoding and CTC loss of sentences, in evaluation mode; the mode is restored."""
    was_training = model.training
    model.eval()
    hypotheses, losses = [], []
    for batch in batches(sentences, vocabulary, batch_size, model.feature_dim):
        batch = batch.to(device)
        logits, lengths = model(batch.features, batch.lengths)
        hypotheses += greedy_decode(logits, lengths, vocabulary)
        losses.append(ctc_losses(logits, lengths, batch).cpu())
    model.train(was_training)
    losses = torch.cat(losses)
    losses = losses[losses.isfinite()]
    errors = score([sentence.glosses for sentence in sentences], hypotheses)
    return Evaluation(errors, losses.mean().item() if len(losses) else None, hypotheses)


# ---------------------------------------------------------------- optimizer and schedule

def make_optimizer(model, config):
    """AdamW over every parameter, a group a layer, so that unfreezing never touches its state."""
    groups = [{"name": name, "params": list(layer.parameters())}
              for name, layer in model.named_children()]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay,
                             fused=True)


def learning_rate(config, step, steps):
    """Linear warm-up to the maximum, then half a cosine to zero; step counts from 0 to steps."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_epoch(model, optimizer, epoch_batches, loss_function, rates, device):
    """One pass. loss_function(model, batch) -> scalar; rates: a learning rate a step.

    Returns (mean loss over the steps taken, None without any; steps left out because loss or
    gradient was not finite).
    TrainingError after PATIENCE such steps in a row.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, skipped, in_a_row = [], 0, 0
    progress = Progress(len(rates))
    for rate, batch in zip(rates, epoch_batches):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_function(model, batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            optimizer.step()
            losses.append(loss.item())
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == PATIENCE:
                names = ", ".join(sentence.id for sentence in batch.sentences)
                raise TrainingError(f"loss or gradient was not finite in {PATIENCE} steps in a "
                                    f"row (last batch: {names}): try a lower --learning_rate")
        progress.step(loss.item())
    return (sum(losses) / len(losses) if losses else None), skipped


def ctc_loss(model, batch):
    """Mean over the batch's sentences of the CTC loss in nats a gloss."""
    return ctc_losses(*model(batch.features, batch.lengths), batch).mean()


class Progress:
    """A line within the epoch: rewritten in place on a terminal, else once a minute."""

    def __init__(self, steps):
        self.steps, self.done, self.said = steps, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self, loss):
        self.done += 1
        line = f"  step {self.done}/{self.steps}  loss {loss:.3f}"
        if self.terminal:
            end = "\r" if self.done < self.steps else "\r" + " " * len(line) + "\r"
            print(line, end=end, file=sys.stderr, flush=True)
        elif time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- checkpoints, log, picture

def read_run_checkpoint(path):
    """A checkpoint of this project as a dict. ValueError for anything else."""
    content = adapt.load_file(path) if Path(path).is_file() else None
    if content is None:
        raise ValueError(f"{path}: no such file, expected a checkpoint of teacher.py")
    missing = {"model_state_dict", "epoch", "wer", "config", "vocabulary"} - set(
        content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path}: has no {', '.join(sorted(missing))}, "
                         f"expected a checkpoint of teacher.py")
    return content


def load_teacher(path, device):
    """(model in evaluation mode, its checkpoint) of a best_i3d.pth or last.pth."""
    checkpoint = read_run_checkpoint(path)
    state, config = checkpoint["model_state_dict"], checkpoint["config"]
    try:
        model = I3DTeacher(len(state["feature_mean"]), len(checkpoint["vocabulary"]),
                           config["temporal_stride"], config["hidden_size"], config["dropout"])
        model.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: does not fit the teacher network ({reason})") from error
    return model.to(device).eval(), checkpoint


class Log:
    """log.jsonl: a first row about the run, then a row an epoch. It is also the picture's data."""

    def __init__(self, path, first_row, epochs_done=0):
        """epochs_done: epochs of an interrupted run, whose lines stay; what follows is cut off."""
        self.path = Path(path)
        lines = [json.dumps(first_row) + "\n"]
        if epochs_done:
            lines = self.path.read_text(encoding="utf-8").splitlines(True)[:epochs_done + 1]
            if len(lines) <= epochs_done:
                raise ValueError(f"{path}: {len(lines)} lines, expected a run's first row and "
                                 f"{epochs_done} epochs")
        self.rows = [json.loads(line) for line in lines[1:]]
        self.path.write_text("".join(lines), encoding="utf-8")

    def add(self, row):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def curves_svg(rows, schedule, epochs):
    """The picture of a run: loss (train, dev) and dev WER over epochs, a band a stage."""
    width, height, left, right, top, gap = 760, 190, 62, 120, 34, 52
    x = lambda epoch: left + (width - left - right) * epoch / max(1, epochs - 1)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
           f'height="{2 * height + top + gap + 40}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>']
    panels = (("CTC loss (nats a gloss)", (("train", "loss", "#1f77b4"),
                                           ("dev", "dev_loss", "#d62728"))),
              ("dev WER (%)", (("dev WER", "wer", "#d62728"),)))
    for number, (title, series) in enumerate(panels):
        base = top + number * (height + gap)
        values = [row[key] for _, key, _ in series for row in rows if row[key] is not None]
        scale = 100 if number else 1
        high, tick = _axis(scale * max(values, default=1))
        y = lambda value: base + height - height * min(scale * value, high) / high
        for stage, start in enumerate(schedule.starts):
            end = (*schedule.starts[1:], epochs - 1)[stage]
            shade = ("#f4f4f4", "#e6ecf5")[stage % 2]
            out.append(f'<rect x="{x(start):.1f}" y="{base}" width="{x(end) - x(start):.1f}" '
                       f'height="{height}" fill="{shade}"/>')
            if number == 0 and len(schedule.starts) > 1:
                out.append(f'<text x="{x(start) + 4:.1f}" y="{base + 13}" fill="#555">'
                           f'stage {stage}</text>')
        out.append(f'<text x="{left}" y="{base - 10}" font-weight="bold">{title}</text>')
        for k in range(round(high / tick) + 1):
            at = base + height - height * k * tick / high
            out.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" '
                       f'stroke="#ccc"/><text x="{left - 6}" y="{at + 4:.1f}" '
                       f'text-anchor="end">{k * tick:g}</text>')
        for k, (label, key, colour) in enumerate(series):
            points = [(x(row["epoch"]), y(row[key])) for row in rows if row[key] is not None]
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" '
                       f'stroke-width="1.8"/>')
            out.append(f'<text x="{width - right + 8}" y="{base + 14 + 16 * k}" fill="{colour}">'
                       f'{label}</text>')
        if number and values:
            best = min((row for row in rows), key=lambda row: row["wer"])
            out.append(f'<circle cx="{x(best["epoch"]):.1f}" cy="{y(best["wer"]):.1f}" r="4" '
                       f'fill="none" stroke="#d62728"/><text x="{width - right + 8}" '
                       f'y="{base + 32}">best {100 * best["wer"]:.1f}%</text>'
                       f'<text x="{width - right + 8}" y="{base + 48}">epoch {best["epoch"]}'
                       f'</text>')
    last = max(1, epochs - 1)
    step = max(1, round(_axis(last)[1]))
    for epoch in range(0, last + 1, step):
        out.append(f'<text x="{x(epoch):.1f}" y="{base + height + 17}" text-anchor="middle">'
                   f'{epoch}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{base + height + 34}" '
               f'text-anchor="middle">epoch</text></svg>')
    return "\n".join(out) + "\n"


def _axis(high):
    """(end, tick) of an axis from 0 that shows `high`: ticks of 1, 2 or 5 times a power of ten."""
    raw = max(high, 1e-6) / 4
    power = 10 ** math.floor(math.log10(raw))
    tick = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return tick * math.ceil(max(high, 1e-6) / tick), tick


# ---------------------------------------------------------------- training

class Data(NamedTuple):
    """What training needs to know of a corpus."""

    corpus: dict         # split -> [Sentence]
    vocabulary: list     # class -> gloss, the blank first
    found: Survey
    train: list          # the train sentences that CTC can align at the run's stride


def prepare_data(config):
    """Read and check the corpus that config names, and say what was found."""
    corpus = read_corpus(config.data_dir) if config.data_dir else synthetic_corpus()
    broken = [s.id for s in corpus["train"] if s.id in BROKEN]
    corpus["train"] = [s for s in corpus["train"] if s.id not in BROKEN]
    found = survey(corpus)
    vocabulary = [BLANK, *sorted({g for s in corpus["train"] for g in s.glosses})]
    print(f"Data: {config.data_dir or 'built-in synthetic corpus'}, {len(found.mean)} features a "
          f"frame, {len(vocabulary) - 1} glosses")
    for split, sentences in corpus.items():
        frames = found.frames[split]
        print(f"  {split:<5} {len(sentences):>5} sentences, "
              f"{sum(len(s.glosses) for s in sentences):>6} glosses, {min(frames)} to "
              f"{max(frames)} frames (median {sorted(frames)[len(frames) // 2]})")
        unknown = [g for s in sentences for g in s.glosses if g not in vocabulary]
        if unknown:
            print(f"  {split}: {len(unknown)} glosses are not in train, each an error for certain: "
                  f"{' '.join(sorted(set(unknown)))}")
    if broken:
        print(f"  left out, known to be broken: {', '.join(broken)}")
    return Data(corpus, vocabulary, found, alignable(corpus["train"], found, config))


def alignable(sentences, found, config):
    """The train sentences with enough frames for CTC; says which are left out, and the cure."""
    enough = lambda s, frames, stride: -(-frames // stride) >= frames_needed(s.glosses)
    pairs = list(zip(sentences, found.frames["train"]))
    short = [(s, t) for s, t in pairs if not enough(s, t, config.temporal_stride)]
    if short:
        print(f"  left out of training, too few frames for their glosses at stride "
              f"{config.temporal_stride}: {len(short)} of {len(sentences)} sentences")
        for s, t in short:
            cure = next((f"fits at --temporal_stride {stride}" for stride in (8, 4, 2)
                         if enough(s, t, stride)), "fits at no stride")
            print(f"    {s.id}: {t} frames, {len(s.glosses)} glosses; {cure}")
    if len(short) == len(sentences):
        raise ValueError(f"--temporal_stride {config.temporal_stride}: no train sentence has "
                         f"enough frames for its glosses")
    return [s for s, t in pairs if enough(s, t, config.temporal_stride)]


def make_teacher(config, data, device):
    """(I3DTeacher with the weights config asks for, names of its fresh parameters)."""
    torch.manual_seed(config.seed)
    model = I3DTeacher(len(data.found.mean), len(data.vocabulary), config.temporal_stride,
                       config.hidden_size, config.dropout)
    model.feature_mean.copy_(data.found.mean)
    model.feature_std.copy_(data.found.std)
    if not config.pretrained_weights:
        print("Weights: random (--pretrained_weights starts from a checkpoint)")
        return model.to(device), [name for name, _ in model.named_parameters()]
    report = adapt.load_pretrained(model, config.pretrained_weights, config.adapt_method,
                                   data.vocabulary)
    print(report)
    model.to(device)
    if config.adapt_method == "temporal_max":
        print("temporal_max: BatchNorm statistics are re-estimated on the training features, "
              "since no exact rule carries them over")
        batches_seen = batches(data.train, data.vocabulary, config.batch_size, model.feature_dim)
        adapt.estimate_batchnorm(model, ((b.features.to(device), b.lengths) for b in batches_seen))
    return model, [n for n in report.fresh if n in dict(model.named_parameters())]


def train(model, data, config, fresh, device, loss_function=ctc_loss, name="best_i3d.pth",
          resume=None):
    """Train with CTC, or another loss_function(model, batch), and return the best dev row.

    fresh: names of parameters that train in every epoch. name: of the best checkpoint. resume:
    the content of last.pth. Writes checkpoints, log and picture into config.output_dir.
    """
    folder = Path(config.output_dir)
    schedule, steps = config.schedule(), -(-len(data.train) // config.batch_size)
    optimizer = make_optimizer(model, config)
    first, best = 0, None
    if resume:
        first, best = resume["epoch"] + 1, resume["best"]
        model.load_state_dict(resume["model_state_dict"])
        optimizer.load_state_dict(resume["optimizer"])
        restore_random_state(resume["random"])
    log = Log(folder / "log.jsonl", run_row(config, model, data, device), first)
    print(f"{config.epochs} epochs of {steps} steps on {device}, into {folder}/")
    started = time.monotonic()
    for epoch in range(first, config.epochs):
        freeze.apply_freeze(model, (*schedule.trainable(epoch), *fresh))
        announce_stage(schedule, epoch, fresh, model)
        rates = [learning_rate(config, epoch * steps + step, config.epochs * steps)
                 for step in range(steps)]
        loss, skipped = train_epoch(
            model, optimizer, training_batches(data.train, data.vocabulary, config, epoch,
                                               data.found.std), loss_function, rates, device)
        dev = evaluate(model, data.corpus["dev"], data.vocabulary, device)
        row = {"epoch": epoch, "stage": schedule.stage(epoch), "loss": loss,
               "dev_loss": dev.loss, "wer": dev.errors.wer, **dataclasses.asdict(dev.errors),
               "learning_rate": rates[-1], "skipped_steps": skipped}
        log.add(row)
        (folder / "curves.svg").write_text(curves_svg(log.rows, schedule, config.epochs))
        content = {"model_state_dict": model.state_dict(), "epoch": epoch, "wer": row["wer"],
                   "config": dataclasses.asdict(config), "vocabulary": data.vocabulary}
        if best is None or row["wer"] < best["wer"]:
            best = row
            adapt.write_tensors(content, folder / name)
        adapt.write_tensors({**content, "best": best, "optimizer": optimizer.state_dict(),
                             "schedule": {"starts": schedule.starts, "fresh": fresh},
                             "random": random_state()}, folder / "last.pth")
        left = (time.monotonic() - started) / (epoch + 1 - first) * (config.epochs - 1 - epoch)
        print_epoch(row, best, left)
    return best


def print_epoch(row, best, left):
    show = lambda loss: "   -  " if loss is None else f"{loss:6.3f}"
    print(f"epoch {row['epoch']:>3}  stage {row['stage']}  loss {show(row['loss'])}  dev loss "
          f"{show(row['dev_loss'])}  dev WER {100 * row['wer']:6.2f}%  (best "
          f"{100 * best['wer']:.2f}% at {best['epoch']})  lr {row['learning_rate']:.1e}  "
          f"left {int(left) // 60}:{int(left) % 60:02d}"
          + (f"  {row['skipped_steps']} steps not finite" if row["skipped_steps"] else ""),
          flush=True)


def announce_stage(schedule, epoch, fresh, model):
    """One line where a stage starts: what it releases, or what the first one trains."""
    if epoch not in schedule.starts:
        return
    stage, parameters = schedule.stage(epoch), list(model.parameters())
    if not schedule.frozen:
        what = "all layers train"
    elif stage == 0:
        kept = sorted({n.rsplit(".", 2)[0] for n in fresh if n.split(".")[0] in schedule.frozen})
        what = (f"{' '.join(schedule.frozen)} frozen, {' '.join(schedule.trainable(0))} train"
                + (f", and what is fresh: {' '.join(kept)}" if kept else ""))
    else:
        what = f"releases {' '.join(schedule.releases[stage]) or 'nothing, all layers train'}"
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(f"epoch {epoch:>3}  stage {stage}: {what} "
          f"({trained:,} of {sum(p.numel() for p in parameters):,} parameters train)")


def run_row(config, model, data, device):
    """The log's first row: what a reader needs to repeat the run."""
    return {"arguments": dataclasses.asdict(config), "seed": config.seed,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "numpy": np.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sentences": {split: len(sentences) for split, sentences in data.corpus.items()},
            "trained_sentences": len(data.train)}


def random_state():
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state):
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---------------------------------------------------------------- the program

def move_aside(folder, names):
    """Keep an earlier run's files: they move to the first free folder/earlier_N."""
    files = [folder / name for name in names if (folder / name).exists()]
    if files:
        target = next(t for n in range(1, 10 ** 6) if not (t := folder / f"earlier_{n}").exists())
        target.mkdir()
        for file in files:
            file.rename(target / file.name)
        print(f"An earlier run's files in {folder}/ are now in {target}/")


def resumed_config(given, last, path):
    """The interrupted run's Config; flags that would make it another run are refused."""
    saved = dict(last["config"])
    for name in given.keys() - {"output_dir", "data_dir", "device"}:
        if given[name] != saved.get(name):
            raise ValueError(f"--{name} {given[name]}: {path} was run with {saved.get(name)}, "
                             f"expected --resume without it")
    output_dir = given.get("output_dir", Config.output_dir)
    return Config(**{**saved, **given, "output_dir": output_dir})


def run_training(given, resume):
    """Train, or go on training, then score the best checkpoint. Returns what --json prints."""
    last = None
    if resume:
        path = Path(given.get("output_dir", Config.output_dir)) / "last.pth"
        last = read_run_checkpoint(path)
        if "optimizer" not in last:
            raise ValueError(f"{path}: has no optimizer, expected a last.pth of teacher.py")
    config = resumed_config(given, last, path) if resume else Config(**given)
    device = pick_device(config.device)
    data = prepare_data(config)
    folder = Path(config.output_dir)
    if resume:
        if last["vocabulary"] != data.vocabulary:
            raise ValueError(f"{config.data_dir}: {len(data.vocabulary) - 1} glosses that differ "
                             f"from the {len(last['vocabulary']) - 1} in {path}, expected the "
                             f"same train split")
        model, _ = load_teacher(path, device)
        fresh = last["schedule"]["fresh"]
        print(f"Going on after epoch {last['epoch']} of {path}")
    else:
        model, fresh = make_teacher(config, data, device)
        folder.mkdir(parents=True, exist_ok=True)
        move_aside(folder, ("best_i3d.pth", "last.pth", "log.jsonl", "curves.svg"))
    best = train(model, data, config, fresh, device, resume=last)
    print(f"Best dev WER {100 * best['wer']:.2f}% at epoch {best['epoch']}: "
          f"{folder / 'best_i3d.pth'}")
    result = {"checkpoint": str(folder / "best_i3d.pth"), "epoch": best["epoch"],
              "dev_wer": best["wer"], "test_wer": None}
    if "test" in data.corpus:
        model, _ = load_teacher(folder / "best_i3d.pth", device)
        test = evaluate(model, data.corpus["test"], data.vocabulary, device)
        print(f"Test {test.errors}")
        result["test_wer"] = test.errors.wer
    return result


def run_evaluation(path, split, given):
    """Score a checkpoint on a split of its own data, or of --data_dir."""
    device = pick_device(given.get("device", Config.device))
    model, checkpoint = load_teacher(path, device)
    data_dir = given.get("data_dir", checkpoint["config"]["data_dir"])
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
    result = evaluate(model, sentences, vocabulary, device)
    for sentence, hypothesis in zip(sentences, result.hypotheses):
        print(f"{sentence.id}\n  ref  {' '.join(sentence.glosses)}\n  hyp  {' '.join(hypothesis)}")
    print(f"{path} on {split}: {result.errors}")
    return {"checkpoint": str(path), "split": split, "wer": result.errors.wer,
            "ser": result.errors.ser, **dataclasses.asdict(result.errors),
            "hypotheses": {s.id: h for s, h in zip(sentences, result.hypotheses)}}


def run_prediction(path, files, given):
    """Print the glosses of feature files."""
    device = pick_device(given.get("device", Config.device))
    model, checkpoint = load_teacher(path, device)
    predictions = {}
    for file in files:
        features = torch.from_numpy(read_features(file, model.feature_dim))[None].to(device)
        with torch.inference_mode():
            logits, lengths = model(features, torch.tensor([features.shape[1]]))
        predictions[file] = greedy_decode(logits, lengths, checkpoint["vocabulary"])[0]
        print(f"{file}: {' '.join(predictions[file])}")
    return {"checkpoint": str(path), "predictions": predictions}


def run_write_corpus(directory):
    if Path(directory).exists() and any(Path(directory).iterdir()):
        raise ValueError(f"{directory}: is not empty, expected a new directory")
    write_corpus(synthetic_corpus(), directory)
    print(f"The built-in corpus is in {directory}/: train on it with --data_dir {directory}")
    return {"data_dir": str(directory)}


def pick_device(name):
    """torch.device of "cpu", "cuda", ... or "auto". ValueError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name}: {reason}, expected cpu or cuda") from error


def main(argv=None):
    parser = Parser("teacher.py", description=__doc__.split("\n")[0])
    add_config_flags(parser)
    parser.add_argument("--resume", action="store_true",
                        help="go on from --output_dir's last.pth, with its flags")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="score a checkpoint, do not train")
    parser.add_argument("--split", choices=SPLITS, default="dev",
                        help="what --evaluate scores (default: dev)")
    parser.add_argument("--predict", metavar="FILE", nargs="+",
                        help="print the glosses of feature files, with the checkpoint of "
                             "--evaluate, else --output_dir's best_i3d.pth")
    parser.add_argument("--write_corpus", metavar="DIR",
                        help="write the built-in corpus in the layout of --data_dir")
    parser.add_argument("--json", action="store_true",
                        help="the last line on stdout is one JSON object, all else is on stderr")
    given = vars(parser.parse_args(argv))
    resume, checkpoint, split, files, target, as_json = (given.pop(name) for name in (
        "resume", "evaluate", "split", "predict", "write_corpus", "json"))
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            if target:
                result = run_write_corpus(target)
            elif files:
                default = Path(given.get("output_dir", Config.output_dir)) / "best_i3d.pth"
                result = run_prediction(checkpoint or default, files, given)
            elif checkpoint:
                result = run_evaluation(checkpoint, split, given)
            else:
                result = run_training(given, resume)
    except ValueError as error:
        parser.exit(2, f"teacher.py: {error}\n")
    except (OSError, TrainingError, adapt.FetchError) as error:
        parser.exit(1, f"teacher.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nteacher.py: interrupted; --resume goes on after the last full epoch\n")
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
