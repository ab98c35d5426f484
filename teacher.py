"""The teacher: a 1D I3D backbone and a BiLSTM, trained with CTC on per-frame features.

    $ python teacher.py --pretrained_weights i3d_kinetics400          # on the built-in corpus
    $ python teacher.py --pretrained_weights i3d_kinetics400 --progressive_unfreeze
    $ python teacher.py --data_dir DIR --pretrained_weights i3d_kinetics400 --epochs 150

The network is I3D (Carreira & Zisserman 2017, arXiv 1705.07750, figure 3) over time alone, with
connectionist temporal classification (Graves et al. 2006) over glosses.

Axes: B sentences of a batch, T frames, T' frames after temporal_stride, N frames of a whole batch
one after the other ("rows"), D features, C channels, V classes with the CTC blank as class 0,
L glosses of a sentence. Epochs are counted from 0.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.data import DataLoader, Dataset

import adapt
import freeze
import wer

# I3D's Inception blocks: output channels of b0, b1a -> b1b, b2a -> b2b, b3b.
BRANCHES = {
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
# Max-pooling over time before a block: kernel in frames, smallest stride at which it halves time.
POOLS = {"mixed_4b": (3, 4), "mixed_5b": (2, 8)}
STRIDES = (2, 4, 8)
TEMPORAL_STRIDE, HIDDEN_SIZE, DROPOUT = 4, 256, 0.5  # defaults of network and flags
BACKBONE_CTC = 1.0            # weight of the second head's CTC loss, of the flag
FEATURE_CLIP_STD = 1e4        # standard deviations from the mean at which a feature is clamped

TIME_STRETCH = (0.8, 1.25)    # length factor of a training sentence
AMPLITUDE_SCALE = (0.7, 1.4)  # factor of its features: signers' sizes, their distance
CENTRED_STD = 3.0             # means within so many deviations of zero: scaled about zero
DIAGNOSED = 200               # train sentences that are scored for the diagnosis
NOISE_STD = 0.1               # of training noise, in standard deviations of a feature
GRADIENT_CLIP_NORM = 5.0      # of all parameters together

SPLITS = ("train", "dev", "test")
ANNOTATIONS = ("{}.corpus.csv", "PHOENIX-2014-T.{}.corpus.csv", "{}.SI5.corpus.csv")
CORRUPT_IDS = {"13April_2011_Wednesday_tagesschau_default-14"}  # of Phoenix-2014: damaged video
BLANK = "<blank>"
BEST = {"teacher": "best_i3d.pth", "student": "best_student.pth"}  # the best epoch's checkpoint
RUN_FILES = ("last.pth", *BEST.values(), "log.jsonl", "curves.svg")
NOT_SAVED = {*"resume evaluate split predict picture ctm beam_width json validate_data".split()}

# ---------------------------------------------------------------- the network
def neighbours(lengths, kernel, left, stride=1, dilation=1, device="cpu"):
    """Which rows each output row of a convolution or pooling over time sees.
    lengths: [B] frames. left: taps before the output's own frame. dilation: frames between taps.
    Returns (index [N', kernel] on the device, lengths' [B] = ceil(lengths / stride)). Index N is a
    row of zeros, which is what a frame before a sentence's start or after its end reads."""
    outputs = -(-lengths // stride)
    sentence = torch.repeat_interleave(outputs)                 # [N'], of each output row
    position = torch.arange(len(sentence)) - (outputs.cumsum(0) - outputs)[sentence]
    frame = position[:, None] * stride + dilation * (torch.arange(kernel) - left)  # [N', kernel]
    inside = (frame >= 0) & (frame < lengths[sentence][:, None])
    row = frame + (lengths.cumsum(0) - lengths)[sentence][:, None]
    return row.where(inside, lengths.sum()).to(device, non_blocking=True), outputs

def gather(rows, index):
    """[N, C], [N', kernel] -> [N', kernel, C], zeros where the index is N. The maximum over kernel
    is a pooling: rows come from a ReLU, so zeros change nothing."""
    return F.embedding(index, F.pad(rows, (0, 0, 0, 1)), padding_idx=len(rows))

def standardise(features, model):
    """[..., D] -> [..., D] in the train split's standard deviations. Clamped, so that one wrong
    frame of a tracker does not become infinite in the layers behind."""
    features = (features.to(model.feature_mean) - model.feature_mean) / model.feature_std
    return features.clamp(-FEATURE_CLIP_STD, FEATURE_CLIP_STD)

class Unit(nn.Module):
    """Convolution over time (no bias), BatchNorm, ReLU: [N, C] -> [N', C']. There is no padding in
    rows, so BatchNorm's statistics are those of real frames alone."""

    def __init__(self, inputs, outputs, kernel=1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, bias=False)  # for its weight alone
        self.bn = freeze.BatchNorm1d(outputs, eps=adapt.BATCHNORM_EPS)

    def forward(self, rows, index=None):
        """index: [N', kernel] of neighbours; None for a kernel of one frame."""
        weight = self.conv.weight                                           # [C', C, kernel]
        if index is not None:
            rows = gather(rows, index).flatten(1)                           # [N', kernel * C]
            weight = weight.transpose(1, 2)                                 # [C', kernel, C]
        return F.relu(self.bn(F.linear(rows, weight.flatten(1))))

class Stem(nn.Module):
    """conv_1a halves time; I3D's two poolings in the stem are over space alone."""

    def __init__(self, inputs):
        super().__init__()
        self.conv_1a, self.conv_2b = Unit(inputs, 64, 7), Unit(64, 64)
        self.conv_2c = Unit(64, 192, 3)

    def forward(self, rows, window7, window3):
        return self.conv_2c(self.conv_2b(self.conv_1a(rows, window7)), window3)

class Inception(nn.Module):
    """Four branches side by side; their channels are concatenated."""

    def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit(inputs, b0)
        self.b1a, self.b1b = Unit(inputs, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(inputs, b2a), Unit(b2a, b2b, 3)
        self.b3b = Unit(inputs, b3b)
        self.channels = b0 + b1b + b2b + b3b

    def forward(self, rows, window3):
        return torch.cat((self.b0(rows), self.b1b(self.b1a(rows), window3), self.b2b(
            self.b2a(rows), window3), self.b3b(gather(rows, window3).amax(dim=1))), dim=1)

class I3DTeacher(nn.Module):
    """I3D over time, BiLSTM, classifier. Children in the order of freeze.LAYERS.
    feature_dim: D. num_classes: V, with the CTC blank as class 0. temporal_stride: 8 is I3D's own
    (conv_1a and the poolings before mixed_4b and mixed_5b halve time). At 4 the last pooling, at 2
    both keep their window with stride 1, and all kernels behind are dilated (a trous: Chen et al.
    2018, arXiv 1606.00915): in evaluation every second (fourth) output frame equals stride 8's.
    backbone_ctc: above 0 the network has a second head, which serves training alone: the classifier
    on a projection of the backbone's frames (VAC: Min et al. 2021, arXiv 2104.02330, part 3.2)."""

    kind = "teacher"
    options = ("temporal_stride", "hidden_size", "dropout", "backbone_ctc")

    def __init__(self, feature_dim, num_classes, temporal_stride=TEMPORAL_STRIDE,
                 hidden_size=HIDDEN_SIZE, dropout=DROPOUT, backbone_ctc=0.0):
        super().__init__()
        if temporal_stride not in STRIDES:
            raise ValueError(f"temporal_stride {temporal_stride}, expected one of {STRIDES}")
        self.temporal_stride, self.dropout = temporal_stride, dropout
        self.backbone_ctc = backbone_ctc
        # Set from the train split; with these defaults features are taken as they are.
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.stem, channels = Stem(feature_dim), 192
        for name in freeze.BACKBONE[1:]:
            self.add_module(name, block := Inception(channels, *BRANCHES[name]))
            channels = block.channels
        self.lstm = nn.LSTM(channels, hidden_size, bidirectional=True)
        self.classifier = nn.Linear(2 * hidden_size, num_classes)
        if backbone_ctc:  # a part of the classifier, as freeze.LAYERS names the children
            self.classifier.projection = nn.Linear(channels, 2 * hidden_size)

    def forward(self, features, lengths, both_heads=False):
        """[B, T, D], [B] -> (logits [B, T', V], lengths' [B]); what lies past lengths' is noise.
        both_heads: (logits, lengths', the second head's logits), where there is such a head."""
        frames, lengths = self.backbone(features, lengths)                  # [B, T', 1024]
        frames = F.dropout(frames, self.dropout, self.training)
        with torch.autocast(frames.device.type, enabled=False):  # it would run the LSTM in fp16
            packed = rnn.pack_padded_sequence(frames.to(self.feature_mean), lengths,
                                              batch_first=True, enforce_sorted=False)
            hidden, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        hidden = F.dropout(hidden, self.dropout, self.training)             # [B, T', 2 * hidden]
        if both_heads and self.backbone_ctc:
            projected = F.dropout(self.classifier.projection(frames), self.dropout, self.training)
            return self.classifier(hidden), lengths, self.classifier(projected)
        return self.classifier(hidden), lengths

    def backbone(self, features, lengths):
        """[B, T, D], [B] -> (mixed_5c [B, T', 1024], zeros past the end, lengths' [B])."""
        lengths = torch.as_tensor(lengths).cpu()
        if (features.dim() != 3 or features.shape[2:] != self.feature_mean.shape
                or lengths.shape != features.shape[:1]
                or not 1 <= lengths.min() <= lengths.max() <= features.shape[1]):
            raise ValueError(f"features of shape {list(features.shape)}, lengths {lengths.tolist()}"
                             f", expected [B, T, {len(self.feature_mean)}], B lengths 1 to T")
        rows = torch.cat([f[:n] for f, n in zip(features, lengths.tolist())])   # [N, D]
        # left = (kernel - stride) // 2, as TensorFlow pads; a pooling keeps it also at stride 1.
        windows, dilation = partial(neighbours, device=rows.device), 1
        window7, lengths = windows(lengths, 7, left=2, stride=2)
        window3, _ = windows(lengths, 3, left=1)
        rows = self.stem(standardise(rows, self), window7, window3)
        for name in freeze.BACKBONE[1:]:
            kernel, halves_from = POOLS.get(name, (0, 0))
            stride = 2 if self.temporal_stride >= halves_from else 1
            if kernel:
                window, lengths = windows(lengths, kernel, (kernel - 2) // 2, stride, dilation)
                rows = gather(rows, window).amax(dim=1)
                dilation *= 2 // stride
                window3, _ = windows(lengths, 3, left=1, dilation=dilation)
            rows = getattr(self, name)(rows, window3)
        return rnn.pad_sequence(rows.split(lengths.tolist()), batch_first=True), lengths

# ---------------------------------------------------------------- data
class Sentence(NamedTuple):
    id: str
    signer: str
    glosses: tuple
    features: object  # path of a .npy or .npz file, or the array [T, D] itself
    frames: int = 0   # T, where the features have been read

    def fits(self, stride):
        """Whether CTC can align the glosses with what stride leaves of the frames."""
        return math.ceil(self.frames / stride) >= frames_needed(self.glosses)

class Data(NamedTuple):
    name: str         # the corpus's directory, for messages
    splits: dict      # split -> [Sentence]
    vocabulary: list  # class -> gloss, the blank first
    mean: np.ndarray  # [D] over all frames of the train split
    std: np.ndarray   # [D], 1 for a constant feature
    digest: str       # SHA-256 of all ids, signers, glosses and features

def frames_needed(glosses):
    """Frames T' that CTC needs: one per gloss, and a blank between equal neighbours."""
    return len(glosses) + sum(a == b for a, b in zip(glosses, glosses[1:]))

def read_split(data_dir, split, clean=None):
    """[Sentence] of a split, features not yet read; data_dir None: the built-in corpus. [] without
    a test file; without a dev file dev is a tenth of the train sentences, drawn by their ids.
    clean="phoenix": train annotations by the official rules. ValueError for broken annotations."""
    if not data_dir:
        return synthetic_corpus()[split]
    paths = {split: [path for folder in ("", "annotations/manual") for name in ANNOTATIONS
                     if (path := Path(data_dir, folder, name.format(split))).is_file()]
             for split in SPLITS}
    home = "train" if split == "dev" and not paths["dev"] and paths["train"] else split
    if split == "test" and not paths["test"]:
        return []
    path = (paths[home] or [Path(data_dir, ANNOTATIONS[0].format(split))])[0]
    sentences = [Sentence(*annotation, Path(data_dir, "features", home, f"{annotation.id}.npy"))
                 for annotation in wer.read_annotations(path)]
    if corrupt := CORRUPT_IDS & {sentence.id for sentence in sentences}:
        print(f"{path}: left out, known to be corrupt: {' '.join(corrupt)}")
    sentences = [sentence for sentence in sentences if sentence.id not in CORRUPT_IDS]
    if not paths["dev"] and split != "test":
        order = sorted(sentences, key=lambda s: hashlib.sha256(s.id.encode()).digest())
        held_out = {s.id for s in order[:math.ceil(len(order) / 10)]}
        sentences = [s for s in sentences if (s.id in held_out) == (split == "dev")]
        if split == "dev":
            print(f"{data_dir}: no dev file, {len(sentences)} of the train sentences are dev")
    if clean and home == "train":
        sentences = [s._replace(glosses=wer.clean_phoenix_annotation(" ".join(s.glosses)))
                     for s in sentences]
        if empty := [s.id for s in sentences if not s.glosses]:
            print(f"{path}: left out, nothing is left of the annotation: {' '.join(empty)}")
    return [sentence for sentence in sentences if sentence.glosses]

def read_features(source, dim=None):
    """[T, D] float32 from a .npy file, else the .npz of one array beside it, or from an array;
    keypoints [T, V, C] as [T, V * C]. ValueError for a missing or broken file, and for what is no
    finite [T, D] with D = dim."""
    features, name = source, "features"
    if not isinstance(source, np.ndarray):
        name = path = Path(source)
        if path.suffix not in (".npy", ".npz"):
            raise ValueError(f"{path}: expected .npy or .npz with features [T, D], see README, "
                             f"'From videos to features'")
        try:
            path = path if path.is_file() else path.with_suffix(".npz")
            features = np.load(path, allow_pickle=False)
            if isinstance(features, np.lib.npyio.NpzFile):
                (features,) = map(np.asanyarray, features.values())
        except Exception as error:  # on broken bytes numpy raises whatever it runs into
            reason = getattr(error, "strerror", None) or re.split(r"\n|\. If", str(error))[0]
            reason = reason.replace("This file contains pickled (object) data", "not a numpy file")
            raise ValueError(f"{source}: {reason}, expected one array as .npy or .npz") from error
    if features.ndim == 3 and features.size:
        features = features.reshape(len(features), -1)
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        raise ValueError(f"{name}: {features.dtype} array of shape {list(features.shape)}, "
                         f"expected floating point [T, D]")
    if dim and features.shape[1] != dim:
        raise ValueError(f"{name}: {features.shape[1]} features per frame, expected {dim}"
                         + ", perhaps it is [D, T]" * (len(features) == dim))
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        features = features.astype(np.float32, order="C", copy=False)
    if not (finite := np.isfinite(features).all(axis=1)).all():
        raise ValueError(f"{name}: NaN or infinity in frame {finite.argmin()}, expected numbers")
    return features

def read_data(data_dir, vocabulary=None, dim=None, clean=None):
    """Data of a directory, or of the built-in corpus for None. Every file is read and checked.
    vocabulary, dim: of a trained model that they must fit. clean: see read_split. ValueError with
    the first ten errors."""
    name, errors, sentences = data_dir or "built-in corpus", [], []
    for split in SPLITS:
        try:
            sentences += [(split, sentence) for sentence in read_split(data_dir, split, clean)]
        except ValueError as error:
            errors += [line for line in str(error).split("\n  ") if line not in errors]
    paths = {Path(s.features).with_suffix("") for _, s in sentences} if data_dir else {}
    spare = {}  # folder -> names of files without an annotation
    for folder in sorted({path.parent for path in paths}):
        spare[folder] = sorted(p.name for p in folder.glob("*.*") if p.with_suffix("") not in paths)
        if names := spare[folder]:
            print(f"{folder}: {len(names)} files without an annotation: {' '.join(names[:5])}")
    splits = {split: [] for split in SPLITS}
    seen, digest, total, squares = {}, hashlib.sha256(), 0.0, 0.0
    for split, sentence in sentences:
        try:
            features = read_features(sentence.features, dim)
        except ValueError as error:
            near = len(errors) < 10 and "No such file" in str(error) and difflib.get_close_matches(
                sentence.features.name, spare[sentence.features.parent], 1)
            errors.append(f"{error}" + (f"; is {near[0]} meant?" if near else ""))
            continue
        dim, content = features.shape[1], hashlib.sha256(features).hexdigest()
        digest.update(repr((split, sentence[:3], content)).encode())
        splits[split].append(sentence._replace(frames=len(features)))
        first = seen.setdefault(content, (split, sentence.id))
        if first[0] != split:
            print(f"Equal features in two splits: {'/'.join(first)} and {split}/{sentence.id}")
        if split == "train":
            features = features.astype(np.float64)
            total, squares = total + features.sum(axis=0), squares + (features ** 2).sum(axis=0)
    glosses = {gloss for sentence in splits["train"] for gloss in sentence.glosses}
    vocabulary = vocabulary or [BLANK, *sorted(glosses - {BLANK})]
    if wrong := glosses - {*vocabulary[1:]}:
        errors.append(f"{name}: train glosses {' '.join(sorted(wrong)[:9])}, expected glosses of "
                      f"the model's vocabulary and not {BLANK}")
    if not errors and not (splits["train"] and splits["dev"]):
        errors = [f"{name}: train or dev is empty, training cannot run"]
    if len(errors) > 1:
        errors = [f"{name}: {len(errors)} errors", *errors[:10]]
    if errors:
        raise ValueError("\n  ".join(errors))
    frames = sum(sentence.frames for sentence in splits["train"])
    mean, square = total / frames, squares / frames
    varies = square - mean ** 2 > np.maximum(1e-12 * square, 1e-60)
    if not varies.all():
        print(f"Features that are constant in train: {np.flatnonzero(~varies).tolist()}")
    std = np.sqrt(np.where(varies, square - mean ** 2, 1))
    return Data(name, {split: some for split, some in splits.items() if some}, vocabulary,
                mean.astype(np.float32), std.astype(np.float32), digest.hexdigest())

def describe_data(data):
    """Print sizes, and what a user should know of the data before believing a WER; as a dict."""
    known, facts = {*data.vocabulary}, {}
    print(f"Data: {data.name}, D = {len(data.mean)}, {len(known) - 1} glosses")
    for split, sentences in data.splits.items():
        frames = [sentence.frames for sentence in sentences]
        glosses = [gloss for sentence in sentences for gloss in sentence.glosses]
        print(f"  {split:<5} {len(sentences):>5} sentences, {len(glosses):>6} glosses, "
              f"{min(frames)} to {max(frames)} frames per sentence")
        if unknown := [gloss for gloss in glosses if gloss not in known]:
            print(f"    glosses unknown to train, certain errors (WER at least "
                  f"{len(unknown) / len(glosses):.1%}): {' '.join(sorted({*unknown}))}")
        if case := {*map(str.casefold, unknown)} & {*map(str.casefold, known)}:
            print(f"    differ from train's glosses only in case: {' '.join(sorted(case))}")
        constant, gloss = wer.constant_answer([sentence.glosses for sentence in sentences])
        print(f"    best constant answer: {gloss or 'none'}, WER {constant:.1%}")
        if any(short := [sum(not s.fits(stride) for s in sentences) for stride in STRIDES]):
            print(f"    too few frames for CTC at --temporal_stride {STRIDES}: {short} sentences")
        facts[split] = {"sentences": len(frames), "glosses": len(glosses), "unknown": unknown,
                        "frames": [min(frames), max(frames)], "other_case": sorted(case),
                        "constant_answer": constant, "too_short": dict(zip(STRIDES, short))}
    return facts

def alignable(data, stride):
    """The train sentences with enough frames for CTC. Lists the others; ValueError without any."""
    for s in data.splits["train"]:
        if not s.fits(stride):
            print(f"Left out, too few frames for CTC: {s.id}, {s.frames} frames, {len(s.glosses)} "
                  f"glosses, fits --temporal_stride {max(filter(s.fits, STRIDES), default='none')}")
    if not (kept := [sentence for sentence in data.splits["train"] if sentence.fits(stride)]):
        raise ValueError(f"{data.name}: no train sentence fits --temporal_stride {stride}")
    return kept

class SentenceDataset(Dataset):
    """Item (epoch, k): (features [T, D] float32, classes [L]) of sentence k.
    augment: (features, glosses, generator) -> features, or None. The generator is seeded by seed,
    epoch and k: what is drawn depends on neither batches nor workers. A gloss outside the
    vocabulary has no class: it is no target, but an error in scoring, which compares glosses."""

    def __init__(self, sentences, vocabulary, dim, augment, seed):
        self.sentences, self.dim, self.augment, self.seed = sentences, dim, augment, seed
        self.classes = {gloss: k for k, gloss in enumerate(vocabulary)}

    def __len__(self):
        return len(self.sentences)

    def __getitem__(self, item):
        epoch, index = item
        glosses = self.sentences[index].glosses
        features = read_features(self.sentences[index].features, self.dim)
        if self.augment:
            generator = np.random.default_rng([self.seed, epoch, 1 + index])  # 0: the order
            features = self.augment(features, glosses, generator)
        classes = [self.classes[gloss] for gloss in glosses if gloss in self.classes]
        return torch.from_numpy(features), torch.tensor(classes, dtype=torch.long)

class Batch(NamedTuple):
    features: torch.Tensor        # [B, T, D], zeros after each sentence's end
    lengths: torch.Tensor         # [B] frames, on the CPU
    targets: torch.Tensor         # [sum of L] classes, one sentence after the other
    target_lengths: torch.Tensor  # [B] glosses, on the CPU

    @classmethod
    def collate(cls, items):
        features, targets = zip(*items)
        lengths, target_lengths = (torch.tensor([*map(len, column)]) for column in zip(*items))
        return cls(rnn.pad_sequence(features, batch_first=True), lengths, torch.cat(targets),
                   target_lengths)

    def to(self, device):
        return self._replace(features=self.features.to(device, non_blocking=True),
                             targets=self.targets.to(device, non_blocking=True))

def make_loader(sentences, vocabulary, dim, args, augment=None, shuffle=False):
    """Batches of all sentences in their order; with shuffle of those that freeze.Batches draws for
    its epoch. Worker processes stay from epoch to epoch."""
    batches = freeze.Batches(len(sentences), args.batch_size, args.seed if shuffle else None)
    return DataLoader(SentenceDataset(sentences, vocabulary, dim, augment, args.seed),
                      batch_sampler=batches, collate_fn=Batch.collate,
                      generator=torch.Generator(),  # or it would draw from what dropout draws from
                      num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
                      worker_init_fn=freeze.delay_sigterm, pin_memory="cuda" in args.device)

@np.errstate(over="ignore")  # infinity is clamped by standardise()
def augment(features, glosses, generator, mean, std, stride):
    """[T, D] -> [another T, D]: speed, amplitude and noise are drawn. mean, std: [D] of train."""
    shortest = (frames_needed(glosses) - 1) * stride + 1  # that CTC can align
    frames = max(round(len(features) * generator.uniform(*TIME_STRETCH)), shortest)
    features = change_length(features, frames)
    # Scaled about zero, as coordinates relative to the body may be; a mean more than 3 std from
    # zero would mostly be shifted by that: then about the point 3 std from it, towards zero.
    origin = mean - np.clip(mean, -CENTRED_STD * std, CENTRED_STD * std)
    scale = np.float32(np.exp(generator.uniform(*np.log(AMPLITUDE_SCALE))))
    noise = generator.standard_normal(features.shape, dtype=np.float32)
    return origin + scale * (features - origin) + NOISE_STD * std * noise

def change_length(features, frames):
    """[T, D] -> [frames, D], by linear interpolation over time."""
    columns = torch.from_numpy(features).T[None]                            # [1, D, T]
    return F.interpolate(columns, frames, mode="linear", align_corners=True)[0].T.numpy()

# ---------------------------------------------------------------- the built-in corpus
GLOSSES = ("ABEND BLEIBEN FRUEH GEWITTER HEUTE KALT KOMMEN MORGEN NACHT NEBEL NORD REGEN SCHNEE "
           "SONNE STARK SUED TAG WARM WIND WOLKE").split()
SIZES = {"train": 200, "dev": 40, "test": 60}  # sentences
POSES, HAND = 7, 8  # key poses in the inventory; features of one of the two hands

def synthetic_corpus(seed=0, sizes=SIZES):
    """{split: [Sentence]} of made-up signing with D = 16, a pure function of the seed.
    A gloss is a sequence of three out of seven key poses; features glide from pose to pose, also
    from gloss to gloss (coarticulation). Eight signers differ in size, place, speed and style; two
    are in dev and test only. A sentence follows a random grammar of six successors per gloss."""
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

# ---------------------------------------------------------------- training
def ctc_losses(logits, lengths, batch):
    """[B] CTC losses in nats per gloss: each sentence's loss over its number of glosses."""
    precise = torch.promote_types(logits.dtype, torch.float32)  # under autocast it may be half
    log_probs = logits.log_softmax(dim=2, dtype=precise).transpose(0, 1)    # [T', B, V]
    losses = F.ctc_loss(log_probs, batch.targets, lengths, batch.target_lengths, reduction="none")
    return losses / batch.target_lengths.clamp(min=1).to(losses.device, non_blocking=True)

def ctc_loss(model, batch):
    """Mean over the batch's sentences of the CTC loss in nats per gloss, of the logits plus, where
    the network has a second head, backbone_ctc times that of the second head's."""
    logits, lengths, *second = model(batch.features, batch.lengths, both_heads=True)
    losses = ctc_losses(logits, lengths, batch)
    if second:
        weight = getattr(model, "module", model).backbone_ctc  # .module: DistributedDataParallel's
        losses = losses + weight * ctc_losses(*second, lengths, batch)
    return freeze.batch_mean(losses.sum(), len(losses))

def train_one_epoch(model, loader, optimizer, learning_rate, loss_function):
    """(mean loss over the steps, steps left out because loss or gradient was not finite).
    learning_rate: step -> rate. loss_function: (model, Batch) -> scalar."""
    model.train()
    network = (nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
               if distributed.is_initialized() else model)  # anew per epoch, as what trains changes
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, started = [], time.monotonic()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = loss_function(network, batch.to(model.feature_mean.device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        finite = (loss.detach() + norm).isfinite()
        losses.append(loss.detach().where(finite, math.nan))
        # Fused AdamW divides the gradients by grad_scale and leaves the step out where found_inf is
        # 1, so nothing here waits for the device.
        optimizer.grad_scale = (norm / GRADIENT_CLIP_NORM).clamp(min=1).float()
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        if sys.stderr.isatty() and step % 10 == 0:  # one line, rewritten in place; waits for loss
            left = int((time.monotonic() - started) / (step + 1) * (len(loader) - step - 1))
            print(f"\r  step {step + 1}/{len(loader)}  loss {loss.item():.3f}  left "
                  f"{left // 60}:{left % 60:02d} \r", end="", file=sys.stderr)
    losses = [loss for loss in torch.stack(losses).tolist() if math.isfinite(loss)]
    weights = [value.isfinite().all() for value in model.state_dict().values()]
    if not losses or not torch.stack(weights).all():
        raise FloatingPointError("NaN or infinity in loss or weights, try a lower --learning_rate")
    return sum(losses) / len(losses), len(loader) - len(losses)

class Evaluation(NamedTuple):
    errors: wer.WordErrors
    loss: object        # nats per gloss, mean over the sentences that CTC can align, None without
    hypotheses: list    # tuples of glosses
    log_probs: list     # [T', V] per sentence

    @property
    def blank_share(self):  # of all frames, those whose most probable class is the blank
        return float(np.concatenate([x.argmax(axis=1) == 0 for x in self.log_probs]).mean())

@torch.inference_mode()
def evaluate(model, loader, vocabulary, decode=wer.greedy_decode):
    """Evaluation of a SentenceDataset's loader. Leaves the model in evaluation mode."""
    model.eval()
    hypotheses, losses, frames = [], [], []
    for batch in loader:
        batch = batch.to(model.feature_mean.device)
        logits, lengths = model(batch.features, batch.lengths)
        log_probs = logits.log_softmax(dim=2).cpu().numpy()                 # [B, T', V]
        hypotheses += decode(log_probs, lengths.numpy(), vocabulary)
        frames += [x[:n] for x, n in zip(log_probs, lengths)]
        losses += [x for x in ctc_losses(logits, lengths, batch).tolist() if math.isfinite(x)]
    errors = wer.score([s.glosses for s in loader.dataset.sentences], hypotheses)
    return Evaluation(errors, sum(losses) / len(losses) if losses else None, hypotheses, frames)

def train(model, data, args, schedule, loss_function=ctc_loss, last=None):
    """Train; write checkpoints, log and picture into --output_dir. Returns the best epoch's row.
    loss_function: (model, Batch) -> scalar. last: the content of the last.pth to resume from."""
    folder, sentences = Path(args.output_dir), alignable(data, args.temporal_stride)
    augmentation = partial(augment, mean=data.mean, std=data.std, stride=args.temporal_stride)
    dev = data.splits["dev"]
    if args.overfit:
        sentences = dev = sentences[:args.overfit]
        augmentation = None
    load = partial(make_loader, vocabulary=data.vocabulary, dim=len(data.mean), args=args)
    batches, dev_batches = load(sentences, augment=augmentation, shuffle=True), load(dev)
    optimizer = torch.optim.AdamW(freeze.layer_groups(model), lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    history = []  # a row per epoch
    header = {"arguments": {k: v for k, v in vars(args).items() if k not in NOT_SAVED},
              "versions": [sys.version.split()[0], str(torch.__version__), np.__version__],
              "threads": torch.get_num_threads(), "data": data.digest,
              "constant_answer": wer.constant_answer([s.glosses for s in dev])[0]}
    if last:
        if (last["header"]["data"], last["vocabulary"]) != (data.digest, data.vocabulary):
            raise ValueError(f"{folder / 'last.pth'}: made from other data than {data.name}, "
                             f"expected the same glosses and features")
        model.load_state_dict(last["model_state_dict"])
        optimizer.load_state_dict(last["optimizer"])
        header = {**header, **last["header"], "arguments": header["arguments"]}
        history = last["log"]
    else:
        freeze.in_first(lambda: adapt.move_aside(folder, RUN_FILES))
    started, done, found = time.monotonic(), len(history), None
    save = lambda: save_run(folder, model, optimizer, schedule, data.vocabulary, header, history)
    for epoch in range(done, args.epochs):
        freeze.in_first(save)  # before the first epoch too, so that any run can be resumed
        freeze.apply_freeze(model, schedule.trainable(epoch))
        if epoch in (*schedule.starts, done):
            size = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"epoch {epoch:>3}  stage {schedule.stage(epoch)} trains {size:,} parameters: "
                  f"{' '.join(schedule.trainable(epoch))}")
        batches.batch_sampler.epoch = epoch
        rate = lambda step: args.learning_rate * schedule.learning_rate_factor(
            epoch, step, len(batches))
        # Dropout too is a function of seed and epoch: there is no random state to resume.
        drawn = np.random.SeedSequence([args.seed, epoch, freeze.processes()[0]]).generate_state(1)
        torch.manual_seed(int(drawn[0]))
        loss, skipped = train_one_epoch(model, batches, optimizer, rate, loss_function)
        found = evaluate(model, dev_batches, data.vocabulary)
        history.append({"epoch": epoch, "stage": schedule.stage(epoch), "loss": loss,
                        "dev_loss": found.loss, "wer": found.errors.wer, **asdict(found.errors),
                        "blank_share": found.blank_share, "skipped_steps": skipped,
                        "learning_rate": optimizer.param_groups[0]["lr"]})
        left = int((time.monotonic() - started) / (epoch + 1 - done) * (args.epochs - 1 - epoch))
        best, note = best_epoch(history), f"  {skipped} steps not finite" if skipped else ""
        print(f"epoch {epoch:>3}  loss {loss:6.3f}  dev {found.loss or math.nan:6.3f}  WER "
              f"{found.errors.rates()}  blank {history[-1]['blank_share']:4.0%}  best "
              f"{100 * best['wer']:6.2f}% at {best['epoch']:<3}  left {left // 60}:{left % 60:02d}"
              f"{note}", flush=True)
    freeze.in_first(save)
    print("The last epoch's ", end="")
    diagnose(model, sentences, dev, found or evaluate(model, dev_batches, data.vocabulary),
             data.vocabulary, args)
    return best_epoch(history)

def best_epoch(history):
    """The row of the lowest dev WER; of several, that of the lowest dev loss."""
    return min(history, key=lambda row: (row["wer"], row["dev_loss"] or math.inf))

def diagnose(model, train, dev, found, vocabulary, args):
    """Print what the errors suggest. found: the Evaluation of dev. train: sentences, of which up to
    DIAGNOSED are scored without augmentation; [] where they are not at hand."""
    some = train[::math.ceil(len(train) / DIAGNOSED) or 1]
    loader = make_loader(some, vocabulary, len(model.feature_mean), args)
    unknown = [gloss not in vocabulary for sentence in dev for gloss in sentence.glosses]
    frozen = 1 - np.average([p.requires_grad for p in model.parameters()],
                            weights=[p.numel() for p in model.parameters()])
    lines = wer.diagnosis(
        evaluate(model, loader, vocabulary).errors.wer if some else math.nan, found.errors,
        wer.constant_answer([s.glosses for s in some])[0], found.blank_share, np.mean(unknown),
        len({s.signer for s in dev} - {s.signer for s in train}) if train else 0, frozen)
    print("\n  ".join(("diagnosis:", *lines)))

def save_run(folder, model, optimizer, schedule, vocabulary, header, history):
    """Write best checkpoint (where the last epoch is the best), last.pth, log and picture."""
    content = {"model": model.kind, "model_state_dict": model.state_dict(),
               "vocabulary": vocabulary, "config": header["arguments"],
               "epoch": len(history) - 1, "wer": history[-1]["wer"] if history else None}
    if history and best_epoch(history) is history[-1]:
        adapt.save_checkpoint(content, folder / BEST[model.kind])
    content |= {"optimizer": optimizer.state_dict(), "header": header, "log": history,
                "always_trainable": [*schedule.always_trainable]}
    adapt.save_checkpoint(content, folder / "last.pth")
    lines = [json.dumps(row) + "\n" for row in (header, *history)]
    adapt.write_text("".join(lines), folder / "log.jsonl")
    if history:
        picture = wer.curves_svg(history, best_epoch(history), schedule.starts,
                                 max(1, schedule.epochs - 1), header["constant_answer"])
        adapt.write_text(picture, folder / "curves.svg")

# ---------------------------------------------------------------- the program
def number(kind, low, high):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}, expected {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's own message
    return parse

def make_parser(program, doc, output_dir, learning_rate, dropout):
    """(parser of the flags that teacher.py and distill.py share, its either-or group)."""
    parser = argparse.ArgumentParser(program, description=doc.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{program}: {message} (see --help" + (
        f"; this is torch {torch.__version__}" if "--device" in message else "") + ")\n")
    count, rate, add = number(int, 1, 10 ** 6), number(float, 0, 1000), parser.add_argument
    for name, kind, default, text in (
            ("data_dir", os.path.abspath, None, "corpus; none: a checkpoint's own, else built-in"),
            ("output_dir", str, output_dir, "for checkpoints, log and picture"),
            ("epochs", count, freeze.EPOCHS, "passes over the train sentences"),
            ("batch_size", count, 8, "sentences per step, of all processes"),
            ("learning_rate", rate, learning_rate, "AdamW's maximum"),
            ("weight_decay", rate, 0.01, "AdamW's"),
            ("dropout", number(float, 0, 0.99), dropout, "share dropped before the last layers"),
            ("seed", number(int, 0, 2 ** 63 - 1), 0, "of all that is drawn"),
            ("num_workers", number(int, 0, 1000), 2 * torch.cuda.is_available(), "read data ahead"),
            ("overfit", count, None, "train on so many sentences, not augmented, and score these"),
            ("ctm", str, None, "file for the hypotheses of --evaluate, for wer.py or sclite"),
            ("beam_width", count, 1, "prefixes that --evaluate and --predict keep; 1: greedy")):
        add(f"--{name}", type=kind, default=default, help=text)
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    devices = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="to run on")
    add("--clean_annotations", choices=("phoenix",), help="clean train by Phoenix's rules")
    add("--split", choices=SPLITS, default="dev", help="what --evaluate scores")
    add("--picture", nargs=2, metavar=("ID", "SVG"), help="draw a sentence of --evaluate")
    add("--predict", metavar="FILE", nargs="+", help="recognise by --evaluate's or the best model")
    add("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue --output_dir's last.pth")
    either.add_argument("--evaluate", metavar="CHECKPOINT", help="score a checkpoint, do not train")
    return parser, either

def run_program(parser, argv, model_class, run):
    """Print what run(args, last) returns, with --json. last: with --resume the content of last.pth.
    Errors end without traceback: status 2 for what the user gave, 1 for what failed."""
    args, last = parser.parse_args(argv), None
    other = distributed.is_torchelastic_launched() and os.environ["RANK"] != "0"
    if other:  # of torchrun's processes the first one speaks for all
        args.json, sys.stdout = False, open(os.devnull, "w")
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # for unprintable glosses
    if (args.picture or args.ctm) and (args.evaluate is None or args.predict):
        parser.error("--picture and --ctm go with --evaluate, without --predict")
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            if args.resume:
                args, last = resume_flags(parser, argv, args.output_dir, model_class)
            args.device = freeze.join_processes(args.device)
            result = run(args, last)
            if distributed.is_initialized():
                distributed.destroy_process_group()
        if args.json:
            print(json.dumps(result))
    except ValueError as error:  # from a DataLoader's worker it comes with a traceback in words
        parser.exit(2, f"{parser.prog}: {str(error).rpartition('ValueError: ')[2].rstrip()}\n")
    except (OSError, MemoryError, FloatingPointError, RuntimeError) as error:
        if type(error) is RuntimeError and not (other or "DataLoader worker" in str(error)):
            raise  # a defect of this program; torch.OutOfMemoryError is another class
        parser.exit(1, f"{parser.prog}: {str(error) or 'out of memory'}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; a training continues with --resume "
                         f"--output_dir {args.output_dir}\n")

def resume_flags(parser, argv, folder, model_class):
    """(flags of the interrupted run, the content of its last.pth). ValueError."""
    _, last = adapt.load_model(path := f"{folder}/last.pth", model_class)
    if "optimizer" not in last:
        raise ValueError(f"{path}: cannot be resumed, expected a last.pth")
    saved = {**last["config"], "output_dir": folder}
    if saved["device"] != "cpu" and not torch.cuda.is_available():
        del saved["device"]
    args = parser.parse_args(argv, argparse.Namespace(**saved))  # saved flags instead of defaults
    for name in saved.keys() - {"data_dir", "device", "num_workers", "teacher_checkpoint",
                                "export", "no_baseline"}:
        if getattr(args, name) != saved[name]:
            raise ValueError(f"--{name} {getattr(args, name)}: {path} was run with {saved[name]}, "
                             f"expected the same, or a new run without --resume")
    print(f"Resuming {path} after epoch {last['epoch']}")
    return args, last

def run_checkpoint(args, model_class):
    """--evaluate and --predict: print what a checkpoint recognises. Returns what --json prints."""
    path = args.evaluate or f"{args.output_dir}/{BEST[model_class.kind]}"
    model, checkpoint = adapt.load_model(path, model_class)
    vocabulary = checkpoint["vocabulary"]
    data_dir = args.data_dir or checkpoint["config"]["data_dir"]
    sentences = ([Sentence(file, "", (), file) for file in args.predict] if args.predict else
                 read_split(data_dir, args.split, checkpoint["config"].get("clean_annotations")))
    glosses = {gloss for sentence in sentences for gloss in sentence.glosses}
    if unknown := sorted(glosses - {*vocabulary}):
        print(f"Not in the vocabulary of {path}, certain errors: {' '.join(unknown)}")
    if len(unknown) == len(glosses) and not args.predict:
        raise ValueError(f"{data_dir}: no {args.split} split, or no gloss of it known to {path}")
    decode = (partial(wer.beam_decode, beam_width=args.beam_width) if args.beam_width > 1
              else wer.greedy_decode)
    loader = make_loader(sentences, vocabulary, len(model.feature_mean), args)
    found = evaluate(model.to(args.device), loader, vocabulary, decode)
    errors, hypotheses = found.errors, found.hypotheses
    for sentence, hypothesis in zip(sentences, map(" ".join, hypotheses)):
        print(f"{sentence.id}: {hypothesis}" if args.predict else
              f"{sentence.id}\n  ref  {' '.join(sentence.glosses)}\n  hyp  {hypothesis}")
    result = {"checkpoint": path, "hypotheses": {s.id: h for s, h in zip(sentences, hypotheses)}}
    if args.predict:
        return result
    print(f"{path} on {args.split}: {errors}")
    if args.ctm:  # its times stand for the order alone
        adapt.write_text("".join(f"{s.id} 1 {k / 100:.2f} 0.01 {gloss}\n"
                                 for s, hypothesis in zip(sentences, hypotheses)
                                 for k, gloss in enumerate(hypothesis or (wer.EMPTY,))), args.ctm)
    diagnose(model, [], sentences, found, vocabulary, args)
    if args.picture:
        (name, file), names = args.picture, [sentence.id for sentence in sentences]
        if name not in names:
            raise ValueError(f"--picture {name}: no such sentence in {args.split}")
        panels = {f"{path}, {name}": found.log_probs[names.index(name)]}
        adapt.write_text(wer.posteriors_svg(panels, vocabulary, model.temporal_stride,
                                            sentences[names.index(name)].glosses), file)
    return {**result, "split": args.split, "wer": errors.wer, "ser": errors.ser, **asdict(errors)}

def make_model(model_class, data, args):
    """A model with random weights by --seed and the data's statistics, vocabulary and D."""
    torch.manual_seed(args.seed)
    model = model_class(len(data.mean), len(data.vocabulary),
                        **{name: getattr(args, name) for name in model_class.options})
    model.feature_mean.copy_(torch.from_numpy(data.mean))
    model.feature_std.copy_(torch.from_numpy(data.std))
    return model

def load_weights(model, data, args):
    """Fill the model from --pretrained_weights. Returns the names of its fresh modules."""
    if not args.pretrained_weights:
        print("Weights: random, so every layer is fresh and trains in every epoch")
        return freeze.LAYERS
    if args.pretrained_weights == adapt.KINETICS:
        freeze.in_first(adapt.fetch_kinetics)
    report = adapt.load_pretrained(model, args.pretrained_weights, args.adapt_method,
                                   data.vocabulary)
    print(report)
    if args.adapt_method == "temporal_max":
        print("BatchNorm statistics are re-estimated on the training features")
        loader = make_loader(data.splits["train"], data.vocabulary, len(data.mean), args,
                             shuffle=True)
        adapt.estimate_batchnorm(model, (batch[:2] for batch in loader))
    return report.fresh_modules

def run_teacher(args, last):
    """What the flags of teacher.py ask for. Returns what --json prints."""
    started = time.monotonic()
    if args.predict or args.evaluate is not None:
        return freeze.in_first(lambda: run_checkpoint(args, I3DTeacher))
    args.progressive_unfreeze |= args.unfreeze_by is not None
    freezing = args.freeze_backbone or args.progressive_unfreeze or args.freeze_until_layer
    make_schedule = partial(freeze.UnfreezeSchedule, freeze.LAYERS, args.epochs,
                            args.unfreeze_stages if args.progressive_unfreeze else 1,
                            (args.freeze_until_layer or freeze.FREEZE_UNTIL) if freezing else None,
                            unfreeze_by=args.unfreeze_by)
    make_schedule()  # flags that do not go together are refused before anything is read
    if args.overfit and not last:
        args.output_dir = f"{args.output_dir}/overfit"  # no teacher for distill.py
    data = read_data(args.validate_data or args.data_dir, clean=args.clean_annotations)
    facts = describe_data(data)
    if args.validate_data:
        usable, count = len(alignable(data, args.temporal_stride)), len(data.splits["train"])
        known = facts["dev"]["glosses"] - len(facts["dev"]["unknown"])
        if 2 * usable < count or not known:
            raise OSError(f"{data.name}: {usable} of {count} train sentences have enough frames, "
                          f"{known} of dev's glosses are in train: expected at least half, and any")
        return {"data_dir": data.name, "usable": usable, **facts}
    model = make_model(I3DTeacher, data, args)
    fresh = last["always_trainable"] if last else load_weights(model, data, args)
    schedule = make_schedule(always_trainable=fresh)
    with adapt.lock(args.output_dir, freeze.processes()[0]):
        best = train(model.to(args.device), data, args, schedule, last=last)
        result = freeze.in_first(lambda: report(best, data, args))
    return {**result, "seconds": round(time.monotonic() - started, 1)}

def report(best, data, args):
    """Print the best epoch and, where there is a test split, its WER there; the same as a dict."""
    path = Path(args.output_dir, BEST["teacher"])
    print(f"Best dev WER {100 * best['wer']:.2f}% at epoch {best['epoch']}: {path}")
    result = {**best, "checkpoint": str(path), "dev_wer": best["wer"]}
    if "test" in data.splits and not args.overfit:
        model, _ = adapt.load_model(path, I3DTeacher)
        loader = make_loader(data.splits["test"], data.vocabulary, len(data.mean), args)
        errors = evaluate(model.to(args.device), loader, data.vocabulary).errors
        print(f"Test {errors}")
        result |= {"test_wer": errors.wer, "test": asdict(errors)}
        with open(Path(args.output_dir, "log.jsonl"), "a") as log:
            log.write(json.dumps({"split": "test", "wer": errors.wer, **asdict(errors)}) + "\n")
    return result

def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser, either = make_parser("teacher.py", __doc__, "checkpoints/teacher", 1e-3, DROPOUT)
    add = parser.add_argument
    add("--temporal_stride", type=int, choices=STRIDES, default=TEMPORAL_STRIDE,
        help="frames per output")
    add("--hidden_size", type=number(int, 1, 10 ** 4), default=HIDDEN_SIZE, help="of the LSTM")
    add("--backbone_ctc", type=number(float, 0, 1000), default=BACKBONE_CTC, metavar="WEIGHT",
        help="of a second CTC loss on the backbone's frames in training; 0: none")
    add("--pretrained_weights", metavar="NAME|PATH", help=f"file or {adapt.KINETICS} to start from")
    add("--adapt_method", choices=adapt.METHODS, default=adapt.METHOD, help="3D kernels -> 1D")
    add("--freeze_backbone", action="store_true", help="freeze stem to mixed_5c")
    add("--freeze_until_layer", choices=freeze.BACKBONE, metavar="LAYER", help="freeze up to LAYER")
    add("--progressive_unfreeze", action="store_true", help="freeze, then release by --unfreeze_by")
    add("--unfreeze_stages", type=int, default=freeze.STAGES, help="of --progressive_unfreeze")
    add("--unfreeze_by", type=float, help="release all by this share of the epochs; 0.15 did best")
    either.add_argument("--validate_data", metavar="DIR", type=os.path.abspath,
                        help="read and describe a corpus; status 0 if half of train is long enough")
    run_program(parser, argv, I3DTeacher, run_teacher)

if __name__ == "__main__":
    main()
