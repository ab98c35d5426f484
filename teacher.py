r"""The teacher: a 1D I3D backbone and a BiLSTM, trained with CTC on per-frame features.

    $ python teacher.py --pretrained_weights i3d_kinetics400 --progressive_unfreeze
    $ python teacher.py --pretrained_weights i3d_kinetics400 --data_dir DIR \
          --adapt_method spatial_mean
    $ python teacher.py --evaluate checkpoints/teacher/best_i3d.pth --split test

Without --data_dir a built-in corpus of made-up signing is learned: the first command
takes some minutes on one CPU core. The network is I3D (Carreira & Zisserman 2017, arXiv
1705.07750, figure 3) over time alone, with a few convolutions beside it; it is trained
with connectionist temporal classification (CTC: Graves et al. 2006) over glosses.

The file reads from top to bottom: network, training, data, the built-in corpus, several
processes, reporting, the program.

Axes: B sentences of a batch, T frames, T' output frames (one per temporal_stride
frames), N frames of a whole batch one after the other ("rows"), D features, C channels,
V classes with the CTC blank as class 0, L glosses of a sentence. Epochs count from 0.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import html
import itertools
import json
import math
import os
import signal
import sys
import time
import unicodedata
from dataclasses import dataclass, field
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

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# ------------------------------------------------------------ the network

# I3D's Inception blocks: output channels of the units b0, b1a, b1b, b2a, b2b, b3b.
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
STEM_CHANNELS = (64, 64, 192)  # of conv_1a, conv_2b, conv_2c
# Max-pooling over time in front of a block: its kernel in frames, and the smallest
# temporal stride of the network at which the pooling halves time. Where it does not,
# the kernels behind it read frames that lie twice as far apart (dilation):
#     temporal stride of the network    8    4    2
#     dilation behind mixed_4b's        1    1    2
#     dilation behind mixed_5b's        1    2    4
POOLINGS = {"mixed_4b": (3, 4), "mixed_5b": (2, 8)}
STRIDES = (2, 4, 8)  # temporal strides that the network can have; 8 is I3D's own

TEMPORAL_STRIDE = 4  # frames per output frame, of a network made without a Config
HIDDEN_SIZE = 256  # LSTM units per direction
SHORTCUT_KERNEL = 5  # frames that a unit of Shortcut reads
SHORTCUT_CHANNELS = 512  # of Shortcut
DROPOUT = 0.5  # share of values dropped in front of the LSTM and of the classifier
FEATURE_CLIP_STD = 100  # features are clamped to so many standard deviations


def refuse_other_stride(temporal_stride):
    """Raise ValueError for a temporal stride that is not one of STRIDES."""
    if temporal_stride not in STRIDES:
        raise ValueError(
            f"temporal_stride {temporal_stride}, expected one of {STRIDES}"
        )


def neighbours(lengths, kernel, left, stride=1, dilation=1, device="cpu"):
    """Find the rows that each output row of a convolution or pooling over time reads.

    Args:
        lengths: [B] frames per sentence, on the CPU.
        kernel: rows that an output row reads.
        left: how many of these lie before the output's own frame.
        stride: frames per output frame.
        dilation: frames from one row that is read to the next.
        device: where the index is needed.

    Returns:
        index [N', kernel] into the N rows, and lengths' [B] = ceil(lengths / stride).
        The index N stands for a frame before a sentence's start or after its end, which
        gather_rows reads as zeros.
    """
    output_lengths = -(-lengths // stride)  # rounded up
    sentence = torch.repeat_interleave(output_lengths)  # [N'], such as 0 0 0 1 1
    first_output = output_lengths.cumsum(0) - output_lengths  # [B]
    position = torch.arange(len(sentence)) - first_output[sentence]  # [N']
    taps = dilation * (torch.arange(kernel) - left)  # [kernel]
    frame = stride * position[:, None] + taps  # [N', kernel]
    inside = (frame >= 0) & (frame < lengths[sentence][:, None])
    first_row = lengths.cumsum(0) - lengths  # [B]
    row = frame + first_row[sentence][:, None]
    index = row.where(inside, lengths.sum())
    return index.to(device, non_blocking=True), output_lengths


def gather_rows(rows, index):
    """Read rows [N, C] at an int64 index [N', kernel] -> [N', kernel, C].

    The index N, one past the last row, reads as zeros.
    """
    padded = F.pad(rows, (0, 0, 0, 1))  # [N, C] -> [N + 1, C], the last one zeros
    # padded[index] gives the same, but its backward pass is slower.
    return padded.index_select(0, index.flatten()).unflatten(0, index.shape)


def max_pool(rows, index):
    """Take the maximum over each row's neighbours: [N, C], [N', kernel] -> [N', C].

    The rows come from a ReLU, so the zeros outside a sentence change nothing.
    """
    return gather_rows(rows, index).amax(dim=1)


def pad(rows, lengths, frames):
    """Put sentences into a batch: rows [N, C], lengths [B], T -> [B, T, C].

    The frames past a sentence's end are zeros.
    """
    padded = rnn.pad_sequence(rows.split(lengths.tolist()), batch_first=True)
    return F.pad(padded, (0, 0, 0, frames - padded.shape[1]))


def unpad(padded, lengths):
    """Leave out what lies past each sentence's end: [B, T, C], [B] -> [N, C]."""
    pairs = zip(padded, lengths.tolist(), strict=True)
    return torch.cat([sentence[:length] for sentence, length in pairs])


def frame_mask(lengths, frames):
    """Mark the frames before each sentence's end: [B], T -> [B, T], true for these."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def standardise(features, lengths, mean, std, centre_sentences):
    """Express features in the train split's standard deviations from a mean.

    They are clamped, so that a wrong frame of a tracker neither becomes infinite in the
    layers behind nor moves the mean of its sentence without bound.

    Args:
        features: [B, T, D].
        lengths: [B] frames per sentence.
        mean: [D] of the train split.
        std: [D] of the train split.
        centre_sentences: take each sentence's mean as its zero, so that it no longer
            tells where a signer stands; speech recognition calls this cepstral mean
            normalisation (Atal 1974, JASA 55). A sentence without movement becomes all
            zeros.

    Returns:
        Features [B, T, D], meaningless past a sentence's end.
    """
    standardised = (features.to(mean.dtype) - mean) / std
    standardised = standardised.clamp(-FEATURE_CLIP_STD, FEATURE_CLIP_STD)
    if not centre_sentences:
        return standardised
    lengths = lengths.to(features.device, non_blocking=True)
    inside = frame_mask(lengths, features.shape[1])[:, :, None]  # [B, T, 1]
    total = standardised.masked_fill(~inside, 0).sum(dim=1, keepdim=True)  # [B, 1, D]
    return standardised - total / lengths[:, None, None]


class Unit(nn.Module):
    """Convolution over time (no bias), BatchNorm, ReLU: [N, C] -> [N', C'].

    A convolution is one matrix product: each row's neighbours, side by side, times the
    kernel. Rows hold no padding, so BatchNorm sees real frames alone.
    """

    def __init__(self, inputs, outputs, kernel=1):
        super().__init__()
        # It holds the weight and draws its random values; it is never called.
        self.conv = nn.Conv1d(inputs, outputs, kernel, bias=False)
        # nn.BatchNorm1d that stays put while frozen; see the section on processes.
        self.bn = BatchNorm(outputs, eps=adapt.BATCHNORM_EPS)

    def forward(self, rows, index=None):
        """Apply the unit; index [N', kernel] of neighbours, None for a kernel of 1."""
        weight = self.conv.weight  # [C', C, kernel]
        if index is not None:
            rows = gather_rows(rows, index).flatten(1)  # [N', kernel * C]
            weight = weight.transpose(1, 2)  # [C', kernel, C]
        return F.relu(self.bn(F.linear(rows, weight.flatten(1))))


class Stem(nn.Module):
    """The units conv_1a, which halves time, conv_2b and conv_2c: [N, D] -> [N', 192].

    I3D's two poolings in the stem are over space alone.
    """

    def __init__(self, feature_dim):
        super().__init__()
        channels_1a, channels_2b, channels_2c = STEM_CHANNELS
        self.conv_1a = Unit(feature_dim, channels_1a, 7)
        self.conv_2b = Unit(channels_1a, channels_2b)
        self.conv_2c = Unit(channels_2b, channels_2c, 3)

    def forward(self, rows, window7, window3):
        """Apply the units; window7 [N', 7] and window3 [N', 3] are neighbours."""
        rows = self.conv_1a(rows, window7)
        rows = self.conv_2b(rows)
        return self.conv_2c(rows, window3)


class Inception(nn.Module):
    """Four branches side by side, their channels concatenated: [N, C] -> [N, C']."""

    def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit(inputs, b0)
        self.b1a = Unit(inputs, b1a)
        self.b1b = Unit(b1a, b1b, 3)
        self.b2a = Unit(inputs, b2a)
        self.b2b = Unit(b2a, b2b, 3)
        self.b3b = Unit(inputs, b3b)
        self.channels = b0 + b1b + b2b + b3b

    def forward(self, rows, window3):
        """Apply the branches; window3 [N, 3] are each row's neighbours."""
        branch0 = self.b0(rows)
        branch1 = self.b1b(self.b1a(rows), window3)
        branch2 = self.b2b(self.b2a(rows), window3)
        branch3 = self.b3b(max_pool(rows, window3))
        return torch.cat((branch0, branch1, branch2, branch3), dim=1)


class Shortcut(nn.Module):
    """Convolutions over time from features to frames: [N, D], [B] -> [N', C], [B].

    This is the field's usual temporal module (VAC: Min et al. 2021, arXiv 2104.02330,
    section 3.1): units of SHORTCUT_KERNEL frames, followed by max-poolings of 2.

    Args:
        feature_dim: D.
        channels: C.
        temporal_stride: frames per output frame; at 2 the second unit has no pooling.
    """

    def __init__(self, feature_dim, channels, temporal_stride):
        super().__init__()
        self.poolings = int(math.log2(temporal_stride))
        units = [Unit(feature_dim, channels, SHORTCUT_KERNEL)]
        while len(units) < max(2, self.poolings):
            units.append(Unit(channels, channels, SHORTCUT_KERNEL))
        self.units = nn.ModuleList(units)

    def forward(self, rows, lengths):
        """Apply the units; lengths [B] are the rows of each sentence, on the CPU."""
        for number, unit in enumerate(self.units):
            window, _ = neighbours(
                lengths, SHORTCUT_KERNEL, left=SHORTCUT_KERNEL // 2, device=rows.device
            )
            rows = unit(rows, window)
            if number < self.poolings:
                pair, lengths = neighbours(
                    lengths, 2, left=0, stride=2, device=rows.device
                )
                rows = max_pool(rows, pair)
        return rows, lengths


class Recurrent(nn.LSTM):
    """The BiLSTM over frames; it holds the Shortcut, if there is one.

    The shortcut is held here, and the projections in Classifier, so that the network's
    children are exactly those of freeze.LAYERS. Neither is part of these layers' own
    forward: Recogniser applies the projections, I3DTeacher the shortcut.
    """

    def __init__(self, inputs, hidden_size, shortcut=None):
        super().__init__(inputs, hidden_size, bidirectional=True)
        self.shortcut = shortcut


class Classifier(nn.Linear):
    """The LSTM's output -> logits: [..., 2 * hidden] -> [..., V].

    It holds a projection [..., C] -> [..., 2 * hidden] for each C of frame_channels,
    which Recogniser.all_heads applies.
    """

    def __init__(self, inputs, num_classes, frame_channels=()):
        super().__init__(inputs, num_classes)
        self.projections = nn.ModuleList()
        for channels in frame_channels:
            self.projections.append(nn.Linear(channels, inputs))


class Recogniser(nn.Module):
    """Standardised features, frames, BiLSTM, classifier: the teacher and its like.

    A network derives from it: it defines `kind`, `options`, `temporal_stride`,
    `frames_of` and the layers `lstm` and `classifier`, a Classifier. It keeps the value
    of each option as an attribute of that name.

    Args:
        feature_dim: D.
        dropout: share of values dropped in front of the LSTM and of the classifier.
        backbone_ctc: weight of the further heads' loss in training; 0: no such heads.
        centre_sentences: see standardise.
    """

    def __init__(self, feature_dim, dropout, backbone_ctc, centre_sentences):
        super().__init__()
        self.dropout = dropout
        self.backbone_ctc = backbone_ctc
        self.centre_sentences = centre_sentences
        # With these values features are not scaled; make_model sets the data's.
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))

    def frames_of(self, rows, lengths):
        """Turn standardised features into frames of one or several kinds.

        Args:
            rows: [N, D] of all sentences of a batch, without padding.
            lengths: [B] rows per sentence, on the CPU.

        Returns:
            A list of rows [N', C], one of each kind, and lengths' [B].
        """
        raise NotImplementedError

    def forward(self, features, lengths):
        """Recognise sentences.

        Args:
            features: [B, T, D].
            lengths: [B] frames per sentence, 1 to T.

        Returns:
            logits [B, T', V], meaningless past a sentence's end, and lengths' [B].
        """
        frames, lengths = self.encode(features, lengths)
        return self.recurrent_head(torch.cat(frames, dim=2), lengths), lengths

    def all_heads(self, features, lengths):
        """Recognise sentences also without the LSTM, which serves training alone.

        Each further head is the same classifier on a projection of one kind of frames:
        its loss reaches the layers of this kind directly (VAC, section 3.2).

        Returns:
            logits [B, T', V], a list of the further heads' logits [B, T', V], and
            lengths' [B].
        """
        frames, lengths = self.encode(features, lengths)
        logits = self.recurrent_head(torch.cat(frames, dim=2), lengths)
        further_logits = []
        for project, kind in zip(self.classifier.projections, frames, strict=True):
            projected = F.dropout(project(kind), self.dropout, self.training)
            further_logits.append(self.classifier(projected))
        return logits, further_logits, lengths

    def recurrent_head(self, frames, lengths):
        """Classify frames by the BiLSTM: [B, T', C], [B] -> logits [B, T', V]."""
        # Autocast would run the LSTM in half precision.
        with torch.autocast(frames.device.type, enabled=False):
            packed = rnn.pack_padded_sequence(
                frames.to(self.feature_mean.dtype),  # under autocast it may be bfloat16
                lengths,
                batch_first=True,
                enforce_sorted=False,
            )
            packed, _ = self.lstm(packed)
            hidden, _ = rnn.pad_packed_sequence(
                packed, batch_first=True, total_length=frames.shape[1]
            )
        hidden = F.dropout(hidden, self.dropout, self.training)  # [B, T', 2 * hidden]
        return self.classifier(hidden)

    def encode(self, features, lengths):
        """Turn features into frames.

        Args:
            features: [B, T, D].
            lengths: [B] frames per sentence, 1 to T.

        Returns:
            A list of frames [B, T', C] of each kind, zeros past a sentence's end, with
            dropout in training; and lengths' [B].

        Raises:
            ValueError: see rows_of.
        """
        rows, lengths = self.rows_of(features, lengths)
        kinds, lengths = self.frames_of(rows, lengths)
        frames = []
        for kind_rows in kinds:
            padded = pad(kind_rows, lengths, self.output_frames(features))
            frames.append(F.dropout(padded, self.dropout, self.training))
        return frames, lengths

    def output_frames(self, features):
        """Return T' = ceil(T / stride) for features [B, T, D]."""
        return math.ceil(features.shape[1] / self.temporal_stride)

    def rows_of(self, features, lengths):
        """Standardise features and leave out padding: [B, T, D] -> [N, D], lengths [B].

        Raises:
            ValueError: shapes that do not fit each other or the network.
        """
        lengths = torch.as_tensor(lengths).cpu()
        self.check_shapes(features, lengths)
        features = standardise(
            features,
            lengths,
            self.feature_mean,
            self.feature_std,
            self.centre_sentences,
        )
        return unpad(features, lengths), lengths

    def check_shapes(self, features, lengths):
        """Raise ValueError unless features are [B, T, D], and lengths [B] 1 to T."""
        feature_dim = len(self.feature_mean)
        fits = (
            features.dim() == 3
            and features.shape[2] == feature_dim
            and lengths.shape == features.shape[:1]
            and lengths.min() >= 1
            and lengths.max() <= features.shape[1]
        )
        if not fits:
            raise ValueError(
                f"features of shape {list(features.shape)}, lengths "
                f"{lengths.tolist()}, expected [B, T, {feature_dim}], B lengths 1 to T"
            )


class I3DTeacher(Recogniser):
    """I3D over time, BiLSTM, classifier; its children are freeze.LAYERS in this order.

    At a temporal stride of 4 the pooling in front of mixed_5b has a stride of 1 instead
    of 2; at a temporal stride of 2 so has that in front of mixed_4b. Their windows
    stay, and the kernels behind are dilated by 2, or 4, instead (a trous: Chen et al.
    2018, arXiv 1606.00915). In evaluation every second (fourth) frame of the backbone
    then equals one of the network at stride 8.

    Args:
        feature_dim: D.
        num_classes: V, with the CTC blank as class 0.
        temporal_stride: frames per output frame, 2, 4 or 8.
        hidden_size: LSTM units per direction.
        dropout: share of values dropped in front of the LSTM and of the classifier.
        backbone_ctc: weight of the further heads' loss in training; 0: no such heads.
        centre_sentences: see standardise.
        shortcut_channels: of the Shortcut around the backbone, whose frames are put
            beside the backbone's; 0: none.

    Raises:
        ValueError: another temporal stride.
    """

    kind = "teacher"
    # The arguments that come from a run's Config; make_model and load_model pass them.
    options = (
        "temporal_stride",
        "hidden_size",
        "dropout",
        "backbone_ctc",
        "centre_sentences",
        "shortcut_channels",
    )

    def __init__(
        self,
        feature_dim,
        num_classes,
        temporal_stride=TEMPORAL_STRIDE,
        hidden_size=HIDDEN_SIZE,
        dropout=DROPOUT,
        backbone_ctc=0.0,
        centre_sentences=False,
        shortcut_channels=0,
    ):
        super().__init__(feature_dim, dropout, backbone_ctc, centre_sentences)
        refuse_other_stride(temporal_stride)
        self.temporal_stride = temporal_stride
        self.hidden_size = hidden_size
        self.shortcut_channels = shortcut_channels
        self.stem = Stem(feature_dim)
        channels = STEM_CHANNELS[-1]
        for name, branches in BRANCHES.items():
            block = Inception(channels, *branches)
            self.add_module(name, block)
            channels = block.channels
        frame_channels = [channels]
        shortcut = None
        if shortcut_channels > 0:
            shortcut = Shortcut(feature_dim, shortcut_channels, temporal_stride)
            frame_channels.append(shortcut_channels)
        self.lstm = Recurrent(sum(frame_channels), hidden_size, shortcut)
        self.classifier = Classifier(
            2 * hidden_size, num_classes, frame_channels if backbone_ctc > 0 else ()
        )

    def frames_of(self, rows, lengths):
        """Apply I3D and, if there is one, the shortcut around it.

        Returns:
            A list of rows [N', 1024] and [N', shortcut_channels], and lengths' [B].
        """
        backbone_frames, output_lengths = self.i3d(rows, lengths)
        kinds = [backbone_frames]
        if self.lstm.shortcut is not None:
            shortcut_frames, _ = self.lstm.shortcut(rows, lengths)
            kinds.append(shortcut_frames)
        return kinds, output_lengths

    def backbone(self, features, lengths):
        """Apply I3D alone: [B, T, D], [B] -> [B, T', 1024], lengths' [B].

        The frames past a sentence's end are zeros.
        """
        rows, lengths = self.rows_of(features, lengths)
        rows, lengths = self.i3d(rows, lengths)
        return pad(rows, lengths, self.output_frames(features)), lengths

    def i3d(self, rows, lengths):
        """Apply stem to mixed_5c: [N, D], [B] -> [N', 1024], lengths' [B]."""
        find_neighbours = functools.partial(neighbours, device=rows.device)
        # left = (kernel - stride) // 2 is TensorFlow's padding of a length that the
        # stride divides. TensorFlow shifts the windows of other lengths by a frame;
        # here they lie alike in every sentence. A pooling whose stride became 1 keeps
        # the window that it has at stride 2.
        window7, lengths = find_neighbours(lengths, 7, left=2, stride=2)
        window3, _ = find_neighbours(lengths, 3, left=1)
        rows = self.stem(rows, window7, window3)
        dilation = 1
        for name in BRANCHES:
            if name in POOLINGS:
                rows, lengths, dilation = self.pool(name, rows, lengths, dilation)
                window3, _ = find_neighbours(lengths, 3, left=1, dilation=dilation)
            rows = self.get_submodule(name)(rows, window3)
        return rows, lengths

    def pool(self, name, rows, lengths, dilation):
        """Apply the max-pooling in front of a block.

        Args:
            name: of the block.
            rows: [N, C].
            lengths: [B] frames per sentence.
            dilation: frames from one row that a kernel reads to the next.

        Returns:
            rows [N', C], lengths' [B], and the dilation of what lies behind.
        """
        kernel, smallest_halving_stride = POOLINGS[name]
        halves = self.temporal_stride >= smallest_halving_stride
        stride = 2 if halves else 1
        left = (kernel - 2) // 2
        window, lengths = neighbours(
            lengths, kernel, left, stride, dilation, rows.device
        )
        return max_pool(rows, window), lengths, dilation if halves else 2 * dilation


# ------------------------------------------------------------ training

# Batch is defined in the section on data; batch_mean and share_gradients, which in one
# process do next to nothing, in that on several processes.

GRADIENT_CLIP_NORM = 5.0  # largest norm of all gradients together
BACKBONE_CTC = 1.0  # weight of the further heads' loss, beside 1 for the first's
PRECISIONS = ("float32", "bfloat16")  # that forward pass and loss can have
PRECISION = "float32"


def sentence_ctc_losses(logits, lengths, batch):
    """Compute CTC losses in nats per gloss: [B, T', V], [B] -> [B].

    They are part of the training loss of teacher and student, and the loss on dev.
    Each sentence's loss is divided by its number of glosses. It is infinite where the
    sentence has too few output frames. Under autocast it is computed in float32.
    """
    precision = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.log_softmax(dim=2, dtype=precision)
    log_probs = log_probs.transpose(0, 1)  # [B, T', V] -> [T', B, V]
    losses = F.ctc_loss(
        log_probs, batch.targets, lengths, batch.target_lengths, reduction="none"
    )
    glosses = batch.target_lengths.clamp(min=1)
    return losses / glosses.to(losses.device, non_blocking=True)


def ctc_loss(model, batch):
    """Compute the CTC loss in nats per gloss, mean over the batch's sentences."""
    logits, lengths = model(batch.features, batch.lengths)
    losses = sentence_ctc_losses(logits, lengths, batch)
    return batch_mean(losses.sum(), len(losses))


def all_heads_loss(model, batch):
    """Compute ctc_loss plus backbone_ctc times the mean of the further heads' losses.

    A network without further heads has ctc_loss alone.
    """
    weight = model.backbone_ctc
    if weight == 0:
        return ctc_loss(model, batch)
    logits, further_logits, lengths = model.all_heads(batch.features, batch.lengths)
    total = sentence_ctc_losses(logits, lengths, batch)
    for head_logits in further_logits:
        losses = sentence_ctc_losses(head_logits, lengths, batch)
        total = total + weight / len(further_logits) * losses
    return batch_mean(total.sum(), len(total))


def in_precision(precision, device):
    """Return the context for a forward pass and its loss, one of PRECISIONS.

    bfloat16 means autocast: products of matrices and convolutions in bfloat16, while
    weights, LSTM, CTC and divergence stay in float32. The weights that it has converted
    are kept until the context ends, so each training step needs its own.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def allow_tf32(device):
    """Let a GPU round the factors of float32 matrix products to TF32 (10 bits)."""
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


class Objective(nn.Module):
    """A model with its loss function as one module: batch -> loss.

    DistributedDataParallel wraps this module, so it sees whatever the loss function
    calls of the model, not its forward alone.
    """

    def __init__(self, model, loss_function):
        super().__init__()
        self.model = model
        self.loss_function = loss_function

    def forward(self, batch):
        """Return the scalar loss of a batch."""
        return self.loss_function(self.model, batch)


def train_one_epoch(
    model, loader, optimizer, learning_rates, loss_function, precision=PRECISION
):
    """Train the parameters that require gradients on every batch once.

    Steps whose loss or gradient is not finite are left out and counted.

    Args:
        model: the network, on the device to train on.
        loader: an iterable of Batch that has a length.
        optimizer: over all of the model's parameters.
        learning_rates: the rate of each step.
        loss_function: (model, batch) -> scalar.
        precision: of the forward pass and the loss, one of PRECISIONS.

    Returns:
        The mean loss over the steps taken, and the number of steps left out.

    Raises:
        FloatingPointError: no step was finite, or the weights no longer are.
    """
    model.train()  # but for frozen BatchNorm, see freeze.BatchNorm1d
    objective = share_gradients(Objective(model, loss_function))
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    losses = []
    started = time.monotonic()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates[step]
        with in_precision(precision, device):
            loss = objective(batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP_NORM)
        if not (loss.isfinite() and norm.isfinite()):
            continue
        optimizer.step()
        losses.append(loss.item())
        show_progress(step, len(loader), losses[-1], started)
    weights_finite = [value.isfinite().all() for value in model.state_dict().values()]
    if not losses or not torch.stack(weights_finite).all():
        raise FloatingPointError(
            "NaN or infinity in loss or weights, try a lower --learning_rate"
        )
    return sum(losses) / len(losses), len(loader) - len(losses)


@dataclass
class Evaluation:
    """What a model recognises of some sentences, and how well."""

    errors: wer.WordErrors
    loss: float | None  # nats per gloss, mean over the sentences that CTC can align
    hypotheses: list  # a tuple of glosses per sentence
    blank_share: float  # of all output frames, those whose best class is the blank


@torch.inference_mode()
def evaluate(
    model,
    loader,
    references,
    vocabulary,
    decode=wer.greedy_decode,
    precision=PRECISION,
):
    """Recognise all sentences and score them. Leaves the model in evaluation mode.

    Args:
        model: (features [B, T, D], lengths [B]) -> (logits [B, T', V], lengths' [B]).
        loader: an iterable of Batch; nothing is drawn or shuffled.
        references: the glosses of each sentence, in the loader's order.
        vocabulary: V glosses, the blank first.
        decode: (log_probs [B, T', V], lengths [B], vocabulary) -> B tuples of glosses.
        precision: of the forward pass and the loss, one of PRECISIONS.

    Returns:
        An Evaluation.
    """
    model.eval()
    device = next(model.parameters()).device
    hypotheses = []
    losses = []
    blank_frames = 0
    all_frames = 0
    for batch in loader:
        batch = batch.to(device)
        with in_precision(precision, device):
            logits, lengths = model(batch.features, batch.lengths)
            batch_losses = sentence_ctc_losses(logits, lengths, batch)
        losses += batch_losses.tolist()
        log_probs = logits.float().log_softmax(dim=2).cpu().numpy()  # [B, T', V]
        hypotheses += decode(log_probs, lengths.numpy(), vocabulary)
        inside = frame_mask(lengths, log_probs.shape[1]).numpy()  # [B, T']
        blank_frames += int((inside & (log_probs.argmax(axis=2) == 0)).sum())
        all_frames += int(inside.sum())
    errors = wer.score(references, hypotheses)
    finite = [loss for loss in losses if math.isfinite(loss)]
    mean_loss = sum(finite) / len(finite) if finite else None
    return Evaluation(errors, mean_loss, hypotheses, blank_frames / max(1, all_frames))


def recognise(model, sentences, vocabulary, config, beam_width=1):
    """Return the Evaluation of a model on a list of Sentence, by greedy or beam search.

    Args:
        model: the network.
        sentences: a list of Sentence.
        vocabulary: V glosses, the blank first.
        config: a TrainingConfig.
        beam_width: prefixes kept after each frame; 1 is greedy decoding.
    """
    return make_evaluator(model, sentences, vocabulary, config, beam_width)()


def make_evaluator(model, sentences, vocabulary, config, beam_width=1):
    """Return what recognise does as a function () -> Evaluation.

    It can be called again and again; worker processes then live on.
    """
    decode = wer.greedy_decode
    if beam_width > 1:
        decode = functools.partial(wer.beam_decode, beam_width=beam_width)
    loader = make_loader(sentences, vocabulary, config)
    references = [sentence.glosses for sentence in sentences]
    return functools.partial(
        evaluate, model, loader, references, vocabulary, decode, config.precision
    )


def default_device():
    """Return the name of the device to run on where none is asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_num_workers():
    """Return 2 beside a GPU, which should not wait for data, else 0."""
    return 2 if torch.cuda.is_available() else 0


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a training run that teacher and student share."""

    data_dir: str | None = None  # the corpus; None: the built-in one
    clean_annotations: str | None = None  # "phoenix": clean train by Phoenix's rules
    output_dir: str = "checkpoints/teacher"  # for checkpoints, log and picture
    epochs: int = freeze.EPOCHS  # passes over the train sentences
    batch_size: int = 8  # sentences per step, of all processes together
    learning_rate: float = 1e-3  # AdamW's, at its maximum
    weight_decay: float = 0.01  # AdamW's
    dropout: float = DROPOUT  # share of values dropped in front of the last layers
    speed_std: float = 0.0  # of the logarithm of the speed, see augment
    gain_std: float = 0.0  # of the logarithm of each feature's factor, see augment
    seed: int = 0  # of all that is drawn
    temporal_stride: int | None = None  # frames per output frame; None: see with_stride
    centre_sentences: bool = True  # take each sentence's mean as its features' zero
    overfit: int | None = None  # train on so many sentences and score these
    precision: str = PRECISION  # of forward pass and loss, in evaluation too
    device: str = field(default_factory=default_device)  # cpu, cuda, cuda:1, ...
    num_workers: int = field(default_factory=default_num_workers)  # read data ahead


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Every setting of a teacher's training run: name, default, unit and meaning.

    The program's flags have the same names and take their defaults from here.
    """

    hidden_size: int = HIDDEN_SIZE  # LSTM units per direction
    backbone_ctc: float = BACKBONE_CTC  # weight of the further heads' loss; 0: none
    shortcut_channels: int = SHORTCUT_CHANNELS  # around the backbone; 0: none
    pretrained_weights: str | None = None  # file or adapt.KINETICS; None: random
    adapt_method: str = adapt.METHOD  # how 3D kernels become 1D
    freeze_backbone: bool = False  # freeze stem to mixed_5c
    freeze_until_layer: str | None = None  # freeze stem to this layer
    progressive_unfreeze: bool = False  # release the frozen layers in stages
    unfreeze_stages: int = freeze.STAGES  # of progressive unfreezing
    unfreeze_by: float | None = None  # share of the epochs after which all train

    @property
    def has_stages(self):
        """Whether frozen layers are released in stages; unfreeze_by implies it."""
        return self.progressive_unfreeze or self.unfreeze_by is not None


def make_schedule(config, fresh_modules=()):
    """Return the UnfreezeSchedule that a Config asks for.

    Args:
        config: a Config; unfreeze_by implies progressive_unfreeze, which freezes the
            whole backbone unless freeze_until_layer names another last layer.
        fresh_modules: names of the modules that no checkpoint filled, which always
            train.

    Raises:
        ValueError: flags that do not go together.
    """
    freeze_until = config.freeze_until_layer
    if freeze_until is None and (config.freeze_backbone or config.has_stages):
        freeze_until = freeze.FREEZE_UNTIL
    return freeze.UnfreezeSchedule(
        freeze.LAYERS,
        config.epochs,
        config.unfreeze_stages if config.has_stages else 1,
        freeze_until,
        fresh_modules,
        config.unfreeze_by,
    )


def make_model(model_class, data, config):
    """Return a new model for a corpus; its random weights are drawn by config.seed.

    Args:
        model_class: I3DTeacher, or another class that is called as
            model_class(D, V, **options), where `model_class.options` are the names of
            the config's fields that it takes.
        data: a Data; the model takes its D, its V, and as feature_mean and feature_std
            the mean and standard deviation of the train split.
        config: a TrainingConfig with these fields.
    """
    torch.manual_seed(config.seed)
    config = with_stride(config, data)
    options = {name: getattr(config, name) for name in model_class.options}
    model = model_class(len(data.mean), len(data.vocabulary), **options)
    model.feature_mean.copy_(torch.from_numpy(data.mean))
    model.feature_std.copy_(torch.from_numpy(data.std))
    return model


def make_optimizer(model, config):
    """Return AdamW over all parameters, in a group per layer that last.pth names."""
    return torch.optim.AdamW(
        freeze.layer_groups(model),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def train(model, data, schedule, config, loss_function=all_heads_loss, resumed=None):
    """Train a model; write checkpoints, log and picture after each epoch.

    Args:
        model: the network, on the device to train on.
        data: a Data with train and dev sentences.
        schedule: the UnfreezeSchedule of the model's layers.
        config: a TrainingConfig.
        loss_function: (model, batch) -> scalar.
        resumed: the content of the last.pth to continue from, see load_model.

    Returns:
        The log's row of the best epoch, a dict.

    Raises:
        ValueError: no train sentence is long enough, the model was made with other
            options than the config's, or last.pth is of other data.
        FloatingPointError: training diverged; the last good checkpoints stay.
        OSError: a file cannot be written.
    """
    config = with_stride(config, data)
    refuse_other_options(model, config)
    train_sentences, dev_sentences = select_sentences(data, config)
    train_loader = make_train_loader(train_sentences, data, config)
    evaluate_dev = make_evaluator(model, dev_sentences, data.vocabulary, config)
    constant_wer, _ = wer.constant_answer([item.glosses for item in dev_sentences])
    run = Run(model, schedule, data, config, constant_wer)
    run.begin(resumed)
    in_first_process(run.save)  # before epoch 0 too, so that any run can be resumed
    evaluation = None
    for epoch in range(len(run.history), config.epochs):
        set_epoch(model, train_loader, schedule, config.seed, epoch)
        run.report_stage(epoch)
        learning_rates = epoch_learning_rates(
            schedule, config.learning_rate, epoch, len(train_loader)
        )
        loss, skipped_steps = train_one_epoch(
            model,
            train_loader,
            run.optimizer,
            learning_rates,
            loss_function,
            config.precision,
        )
        evaluation = evaluate_dev()
        row = {
            "epoch": epoch,
            "stage": schedule.stage(epoch),
            "loss": loss,
            "skipped_steps": skipped_steps,
            "learning_rate": learning_rates[-1],
        }
        run.add_epoch(row | evaluation_row(evaluation), evaluation.errors)
        in_first_process(run.save)
    if evaluation is None:
        print(f"The run was finished: it has all of its {config.epochs} epochs")
        evaluation = evaluate_dev()
    diagnose_training(model, train_sentences, evaluation, data.vocabulary, config)
    return best_epoch(run.history)


def set_epoch(model, train_loader, schedule, seed, epoch):
    """Set all that an epoch trains and draws, which its number alone decides.

    Args:
        model: its layers are frozen or released.
        train_loader: of make_train_loader; order and augmentation are the epoch's.
        schedule: the UnfreezeSchedule of the model's layers.
        seed: of the run.
        epoch: counted from 0.
    """
    freeze.apply_freeze(model, schedule.trainable(epoch))
    train_loader.batch_sampler.epoch = epoch
    seed_dropout(seed, epoch)


def evaluation_row(evaluation):
    """Return what the log keeps of an Evaluation, a dict."""
    return {
        "dev_loss": evaluation.loss,
        "wer": evaluation.errors.wer,
        "blank_share": evaluation.blank_share,
        **dataclasses.asdict(evaluation.errors),
    }


def epoch_learning_rates(schedule, maximum, epoch, steps):
    """Return the learning rate of each step of an epoch, a list.

    Args:
        schedule: an UnfreezeSchedule, which gives the share of the maximum.
        maximum: the highest learning rate of the run.
        epoch: counted from 0.
        steps: steps per epoch.
    """
    factors = [
        schedule.learning_rate_factor(epoch, step, steps) for step in range(steps)
    ]
    return [maximum * factor for factor in factors]


def seed_dropout(seed, epoch):
    """Make dropout a function of seed, epoch and process: no random state to resume."""
    sequence = np.random.SeedSequence([seed, epoch, process_rank()])
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def best_epoch(history):
    """Return the row of the lowest dev WER; of several, that of the lowest dev loss."""

    def wer_and_loss(row):
        dev_loss = math.inf if row["dev_loss"] is None else row["dev_loss"]
        return row["wer"], dev_loss

    return min(history, key=wer_and_loss)


BEST_CHECKPOINT = {"teacher": "best_i3d.pth", "student": "best_student.pth"}
LAST_CHECKPOINT = "last.pth"
LOG = "log.jsonl"
PICTURE = "curves.svg"
RUN_FILES = (LAST_CHECKPOINT, *BEST_CHECKPOINT.values(), LOG, PICTURE)


def move_earlier_files_aside(folder):
    """Move the files of an earlier run to the first free folder/earlier_N."""
    files = [folder / name for name in RUN_FILES]
    files = [file for file in files if file.exists()]
    if not files:
        return
    targets = (folder / f"earlier_{number}" for number in itertools.count(1))
    target = next(target for target in targets if not target.exists())
    target.mkdir()
    for file in files:
        file.rename(target / file.name)
    print(f"An earlier run's files in {folder}/ are now in {target}/")


class Run:
    """A training run in its output directory: what is saved of it and resumed.

    Attributes:
        optimizer: AdamW over all of the model's parameters.
        header: the log's first row: settings, versions, the data's digest.
        history: the log's other rows, one per epoch.
    """

    def __init__(self, model, schedule, data, config, constant_wer):
        self.model = model
        self.optimizer = make_optimizer(model, config)
        self.schedule = schedule
        self.data = data
        self.folder = Path(config.output_dir)
        self.header = {
            "arguments": dataclasses.asdict(config),
            "versions": [
                sys.version.split()[0],
                str(torch.__version__),
                np.__version__,
            ],
            "threads": torch.get_num_threads(),
            "data": data.digest,
            "constant_answer": constant_wer,
        }
        self.history = []
        self.first_epoch = 0  # of this process
        self.started = time.monotonic()

    def begin(self, resumed=None):
        """Begin anew, or continue from the content of a last.pth. ValueError."""
        if resumed is None:
            in_first_process(move_earlier_files_aside, self.folder)
        else:
            self.continue_from(resumed)
        self.first_epoch = len(self.history)
        print(self.schedule)

    def report_stage(self, epoch):
        """Print what trains, in the first epoch of a stage and of this process."""
        if epoch == self.first_epoch or epoch in self.schedule.starts:
            print(stage_line(self.model, self.schedule, epoch))

    def add_epoch(self, row, errors):
        """Add an epoch's row to the log, and print its line with dev's WordErrors."""
        self.history.append(row)
        done = len(self.history) - self.first_epoch
        left = self.schedule.epochs - len(self.history)
        seconds_left = (time.monotonic() - self.started) / done * left
        print(epoch_line(self.history, errors, seconds_left), flush=True)

    def continue_from(self, checkpoint):
        """Take over weights, optimizer and log of a last.pth's content. ValueError."""
        same_data = checkpoint["header"]["data"] == self.data.digest
        same_vocabulary = checkpoint["vocabulary"] == self.data.vocabulary
        if not (same_data and same_vocabulary):
            raise ValueError(
                f"{self.folder / LAST_CHECKPOINT}: made from other data than "
                f"{self.data.name}, expected the same glosses and features"
            )
        arguments = self.header["arguments"]
        for name in self.model.options:
            if checkpoint["config"][name] != arguments[name]:
                raise ValueError(
                    f"{self.folder / LAST_CHECKPOINT}: made with {name} "
                    f"{checkpoint['config'][name]}, not {arguments[name]}"
                )
        self.model.load_state_dict(checkpoint["model_state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.header = {**checkpoint["header"], "arguments": arguments}
        self.history = checkpoint["log"]

    def save(self):
        """Write last.pth, log and picture; if the last epoch is best, best_*.pth."""
        checkpoint = {
            "model": self.model.kind,
            "model_state_dict": self.model.state_dict(),
            "vocabulary": self.data.vocabulary,
            "config": self.header["arguments"],
            "epoch": len(self.history) - 1,
            "wer": self.history[-1]["wer"] if self.history else None,
        }
        if self.history and best_epoch(self.history) is self.history[-1]:
            best_path = self.folder / BEST_CHECKPOINT[self.model.kind]
            adapt.save_checkpoint(checkpoint, best_path)
        checkpoint["optimizer"] = self.optimizer.state_dict()
        checkpoint["header"] = self.header
        checkpoint["log"] = self.history
        checkpoint["always_trainable"] = list(self.schedule.always_trainable)
        adapt.save_checkpoint(checkpoint, self.folder / LAST_CHECKPOINT)
        lines = [json.dumps(row) + "\n" for row in [self.header] + self.history]
        adapt.write_text("".join(lines), self.folder / LOG)
        if self.history:
            constant_wer = self.header["constant_answer"]
            picture = curves_svg(self.history, self.schedule, constant_wer)
            adapt.write_text(picture, self.folder / PICTURE)


@contextlib.contextmanager
def lock(folder):
    """Lock a folder, made where it is missing, against another training run.

    The lock ends with this context, or with the process and its workers. Of several
    processes the first one takes it for all.

    Raises:
        ValueError: another run has the lock.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, ".lock"), "w") as file:
        if process_rank() == 0 and fcntl is not None:
            take_lock(file, folder)
        yield


def take_lock(file, folder):
    """Lock an open file, if its file system can do that. ValueError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{folder}: another training writes there (after a kill its workers, for "
            f"some seconds), expected a folder of its own"
        ) from error
    except OSError as error:  # such as Lustre and NFS
        print(
            f"{folder}: its file system has no locks ({error.strerror}), so nothing "
            f"keeps two runs from writing there at once"
        )


def load_model(path, model_class):
    """Read a checkpoint of teacher.py or distill.py.

    Args:
        path: the file.
        model_class: I3DTeacher, or a class with its `kind` and `options`.

    Returns:
        The model in evaluation mode, on the CPU, and the file's whole content.

    Raises:
        ValueError: no such file, or one that is not such a model's.
    """
    content = adapt.load_file(path)
    try:
        model = build_model(content, model_class)
        # Glosses are read in this form, but a checkpoint may have been made elsewhere.
        vocabulary = [wer.normalise(gloss) for gloss in content["vocabulary"]]
        if len(set(vocabulary)) < len(vocabulary):
            raise ValueError("a gloss of its vocabulary has two classes")
    except KeyError as error:
        raise ValueError(
            f"{path}: not a {model_class.kind}'s checkpoint (it has no {error})"
        ) from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: not a {model_class.kind}'s checkpoint ({reason})"
        ) from error
    return model.eval(), {**content, "vocabulary": vocabulary}


def build_model(content, model_class):
    """Return the model of a checkpoint's content, which may hold anything at all."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dict")
    kind = content.get("model")
    if kind != model_class.kind:
        raise ValueError(f"it is a {kind}'s" if kind else "it names no kind of model")
    state = content["model_state_dict"]
    options = {name: content["config"][name] for name in model_class.options}
    num_classes = len(content["vocabulary"])
    model = model_class(len(state["feature_mean"]), num_classes, **options)
    model.load_state_dict(state)
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError("weights that are NaN or infinite")
    return model


# ------------------------------------------------------------ data

SPLITS = ("train", "dev", "test")  # names of further splits can be added here
# Names of a split's annotations: this project's and Phoenix-2014's, Phoenix-2014-T's,
# and those of Phoenix-2014's signer-independent part.
ANNOTATION_NAMES = (
    "{}.corpus.csv",
    "PHOENIX-2014-T.{}.corpus.csv",
    "{}.SI5.corpus.csv",
)
ANNOTATION_FOLDERS = ("", "annotations/manual")
BLANK = "<blank>"
DEV_SHARE = 0.1  # of the train sentences, held out where there is no dev file
MOST_ERRORS = 10  # errors of a corpus that are printed

TIME_STRETCH = (0.8, 1.25)  # length factor of a train sentence
SPEED_FRAMES = 24  # frames, about, for which an uneven speed is kept
FEWEST_SPEEDS = 3  # in a sentence
AMPLITUDE_SCALE = (0.7, 1.4)  # factor of its features: a signer's size and distance
CENTRED_STD = 3.0  # largest distance of a mean from zero at which zero is the origin
NOISE_STD = 0.1  # of added noise, in standard deviations of a feature


@dataclass(frozen=True)
class Sentence:
    """A signed sentence."""

    id: str
    signer: str
    glosses: tuple
    features: object  # path of a .npy or .npz file, or the array [T, D] itself
    frames: int = 0  # T, where the features have been read

    def fits(self, stride):
        """Tell whether CTC can align the glosses with the frames at this stride."""
        frames = self.frames
        if frames == 0:  # a sentence that read_data has not read
            frames = len(read_features(self.features))
        return math.ceil(frames / stride) >= frames_needed(self.glosses)


@dataclass(frozen=True)
class Data:
    """A corpus whose features have been read and checked once."""

    name: str  # its directory, for messages
    splits: dict  # split -> list of Sentence, without empty splits
    vocabulary: list  # class -> gloss, the blank first
    mean: np.ndarray  # [D] over all frames of the train split
    std: np.ndarray  # [D] likewise, 1 for a constant feature
    digest: str  # SHA-256 of all ids, signers, glosses and features


def frames_needed(glosses):
    """Return the fewest output frames in which CTC can align glosses.

    Each gloss needs one, and a blank stands between equal neighbours.
    """
    equal_neighbours = [a for a, b in itertools.pairwise(glosses) if a == b]
    return len(glosses) + len(equal_neighbours)


def find_annotations(data_dir, split):
    """Return the path of a split's annotations, None where there is none."""
    for folder in ANNOTATION_FOLDERS:
        for name in ANNOTATION_NAMES:
            path = Path(data_dir, folder, name.format(split))
            if path.is_file():
                return path
    return None


def read_split(data_dir, split, clean=None):
    """Read the annotations of a split; its features are not yet read.

    Without a dev file a tenth of the train sentences, drawn by their ids, is dev.

    Args:
        data_dir: the corpus's directory; None for the built-in corpus.
        split: one of SPLITS; train and dev are needed.
        clean: "phoenix" cleans train annotations by the official rules.

    Returns:
        A list of Sentence, empty where a split other than these two has no file.

    Raises:
        ValueError: a missing or broken file.
    """
    if data_dir is None:
        return synthetic_corpus().get(split, [])
    has_file = find_annotations(data_dir, split) is not None
    if split not in ("train", "dev"):  # the others are optional
        return read_sentences(data_dir, split, clean) if has_file else []
    if find_annotations(data_dir, "dev") is not None:
        return read_sentences(data_dir, split, clean)
    sentences = read_sentences(data_dir, "train", clean)
    held_out = draw_dev_ids(sentences)
    if split == "train":
        return [sentence for sentence in sentences if sentence.id not in held_out]
    print(f"{data_dir}: no dev file, {len(held_out)} of the train sentences are dev")
    return [sentence for sentence in sentences if sentence.id in held_out]


def draw_dev_ids(sentences):
    """Draw the ids of DEV_SHARE of the sentences, by a hash, the same everywhere."""

    def digest(sentence_id):
        return hashlib.sha256(sentence_id.encode()).digest()

    ids = sorted((sentence.id for sentence in sentences), key=digest)
    return set(ids[: math.ceil(DEV_SHARE * len(ids))])


def read_sentences(data_dir, split, clean):
    """Read a split's annotation file: a list of Sentence. Prints what it leaves out."""
    path = find_annotations(data_dir, split)
    if path is None:
        path = Path(data_dir, ANNOTATION_NAMES[0].format(split))  # refused as missing
    sentences = []
    left_out = []
    for annotation in wer.read_annotations(path):
        glosses = annotation.glosses
        if BLANK in glosses:
            raise ValueError(
                f"{path}: {annotation.id} has the gloss {BLANK}, which is the name of "
                f"CTC's blank, expected another"
            )
        if clean and split == "train":
            glosses = wer.clean_phoenix_annotation(" ".join(glosses))
        if annotation.id in wer.PHOENIX_CORRUPT_IDS or not glosses:
            left_out.append(annotation.id)
            continue
        features = Path(data_dir, "features", split, f"{annotation.id}.npy")
        sentences.append(Sentence(annotation.id, annotation.signer, glosses, features))
    if left_out:
        print(
            f"{path}: left out, known to be corrupt or empty after cleaning: "
            f"{' '.join(left_out)}"
        )
    return sentences


def find_features(path):
    """Return the path of a feature file: the .npy, else the .npz beside it.

    macOS writes names in Unicode's decomposed form (NFD), so either form is found.

    Raises:
        ValueError: no such file; a file of another suffix beside it is named.
    """
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(
            f"{path}: expected .npy or .npz with features [T, D], see README, "
            f"'From videos to features'"
        )
    for form in ("NFC", "NFD"):
        named = path.with_name(unicodedata.normalize(form, path.name))
        for candidate in (path, named, named.with_suffix(".npz")):
            if candidate.exists():
                return candidate
    if path.is_symlink():
        raise ValueError(f"{path}: a link to a file that is missing")
    message = f"{path}: no such file, expected one array as .npy or .npz"
    entries = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    for entry in entries:
        name = wer.normalise(entry.name)
        if name == wer.normalise(path.name):  # a mixture of both forms
            return entry
        if name.startswith(f"{wer.normalise(path.stem)}."):
            message += f"; {entry.name} is there"
    raise ValueError(message)


def load_array(path):
    """Read the one array of a .npy or .npz file. ValueError for a broken file."""
    path = find_features(Path(path))
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        arrays = list(content.values())
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise TypeError("members of a zip file that are no arrays")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # on broken bytes numpy raises whatever it runs into
        raise ValueError(
            f"{path}: {why_not_numpy(path, error)}, expected one array as .npy or .npz"
        ) from error
    if len(arrays) != 1:
        raise ValueError(
            f"{path}: .npz of {len(arrays)} arrays ({', '.join(content.files)}), "
            f"expected one"
        )
    return arrays[0]


def why_not_numpy(path, error):
    """Say in a few words why numpy cannot read a file."""
    with open(path, "rb") as file:
        beginning = file.read(6)
    if beginning[:2] == b"PK" and "Object arrays" not in str(error):
        return "a zip file, perhaps of torch.save, but no .npz of arrays"
    if beginning != b"\x93NUMPY":
        return "not a numpy file"
    return str(error).splitlines()[0]


def as_frames(array):
    """Return an array as [T, D].

    Axes of length 1 around are dropped: [1, T, D] and [T, 1, 1, D] are [T, D].
    Keypoints [T, V, C] are [T, V * C].
    """
    while array.ndim > 2 and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    if array.ndim == 3 and array.size > 0:
        array = array.reshape(len(array), -1)
    return array


def read_features(source, feature_dim=None):
    """Read the features of a sentence: an array [T, D] of float32.

    Args:
        source: an array, or what numpy makes one of, or the path of a .npy file;
            where that is missing, the .npz file of the same name is read.
        feature_dim: the D that is expected; None for any.

    Raises:
        ValueError: a file that is missing or cannot be read; an array that is empty,
            not floating point or of another shape (see as_frames); another D; NaN,
            infinity or a number beyond float32.
    """
    if isinstance(source, (str, os.PathLike)):
        name = source
        array = load_array(source)
    else:
        name = "features"
        array = np.asarray(source)
    features = as_frames(array)
    if features.ndim != 2 or features.size == 0 or features.dtype.kind != "f":
        raise ValueError(
            f"{name}: {array.dtype} array of shape {list(array.shape)}, expected "
            f"floating point [T, D]"
        )
    check_feature_dim(features, feature_dim, name)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        features = features.astype(np.float32, order="C", copy=False)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}: NaN or infinity in frame {finite.argmin()} (counted from 0, as "
            f"float32), expected numbers"
        )
    return features


def check_feature_dim(features, feature_dim, name):
    """Raise ValueError where features [T, D] have another D; None allows any."""
    if feature_dim is None or features.shape[1] == feature_dim:
        return
    message = (
        f"{name}: {features.shape[1]} features per frame (shape "
        f"{list(features.shape)}), expected {feature_dim}"
    )
    if len(features) == feature_dim:
        message += ", perhaps it is [D, T]"
    raise ValueError(message)


class FeatureStatistics:
    """Mean and standard deviation of features, summed up in float64."""

    def __init__(self):
        self.frames = 0
        self.total = 0.0
        self.squares = 0.0

    def add(self, features):
        """Add the frames of a sentence, [T, D]."""
        features = features.astype(np.float64)
        self.frames += len(features)
        self.total = self.total + features.sum(axis=0)
        self.squares = self.squares + (features**2).sum(axis=0)

    def mean_and_std(self):
        """Return mean [D] and deviation [D], 1 for a feature that is constant."""
        mean = self.total / self.frames
        mean_square = self.squares / self.frames
        variance = mean_square - mean**2
        # Rounding leaves a constant feature a variance of some 1e-16 of its square.
        varies = variance > np.maximum(1e-12 * mean_square, 1e-60)
        if not varies.all():
            constant = np.flatnonzero(~varies).tolist()
            print(f"Features that are constant in train: {constant}")
        std = np.sqrt(np.where(varies, variance, 1))
        return mean.astype(np.float32), std.astype(np.float32)


class CorpusScan:
    """One pass over all feature files of a corpus: checks, statistics, a digest.

    Attributes:
        splits: split -> list of Sentence, now with their frames.
        errors: a line for each file that cannot be used.
        statistics: FeatureStatistics of the train split.
    """

    def __init__(self, feature_dim):
        self.feature_dim = feature_dim
        self.splits = {split: [] for split in SPLITS}
        self.errors = []
        self.shapes = []  # [T, D] of every file that can be read
        self.statistics = FeatureStatistics()
        self.digest = hashlib.sha256()
        self.first_with_content = {}  # SHA-256 of features -> (split, id)

    def add(self, split, sentence):
        """Read and check the features of a sentence."""
        try:
            features = read_features(sentence.features)
            self.shapes.append(features.shape)
            check_feature_dim(features, self.feature_dim, sentence.features)
        except ValueError as error:
            self.errors.append(str(error))
            return
        self.feature_dim = features.shape[1]
        sentence = dataclasses.replace(sentence, frames=len(features))
        self.splits[split].append(sentence)
        if split == "train":
            self.statistics.add(features)
        content = hashlib.sha256(features).hexdigest()
        identity = (split, sentence.id, sentence.signer, sentence.glosses, content)
        self.digest.update(repr(identity).encode())
        first = self.first_with_content.setdefault(content, (split, sentence.id))
        if first[0] != split:
            print(
                f"Equal features in two splits: {first[0]}/{first[1]} and "
                f"{split}/{sentence.id}"
            )

    def suspect_exchanged_axes(self, name):
        """Add an error in front where all files have one T, but different D."""
        frames = {shape[0] for shape in self.shapes}
        if len(frames) == 1 and len({shape[1] for shape in self.shapes}) > 1:
            self.errors.insert(
                0,
                f"{name}: the first axis of all files is {frames.pop()}, the second "
                f"differs, expected [T, D]: perhaps they are [D, T]",
            )


def read_data(data_dir=None, vocabulary=None, feature_dim=None, clean=None):
    """Read a corpus; every file of it is read and checked.

    Args:
        data_dir: its directory; None for the built-in corpus.
        vocabulary: of a trained model that the train glosses must fit.
        feature_dim: D of such a model.
        clean: see read_split.

    Returns:
        A Data.

    Raises:
        ValueError: the first MOST_ERRORS errors, one per line.
    """
    name = "built-in corpus" if data_dir is None else str(data_dir)
    scan = CorpusScan(feature_dim)
    annotated = []
    for split in SPLITS:
        try:
            sentences = read_split(data_dir, split, clean)
        except ValueError as error:
            # One line per error. Where dev is held out of train, both have the same.
            new_errors = str(error).split("\n  ")
            scan.errors += [line for line in new_errors if line not in scan.errors]
            continue
        annotated += sentences
        for sentence in sentences:
            scan.add(split, sentence)
    if data_dir is not None:
        report_unannotated_files(annotated)
    scan.suspect_exchanged_axes(name)
    train_glosses = glosses_of(scan.splits["train"])
    if vocabulary is None:
        vocabulary = [BLANK] + sorted(train_glosses)
    unknown = train_glosses - set(vocabulary)
    if unknown:
        scan.errors.append(
            f"{name}: train glosses {' '.join(sorted(unknown)[:9])}, expected glosses "
            f"of the model's vocabulary"
        )
    if not scan.errors and not (scan.splits["train"] and scan.splits["dev"]):
        scan.errors.append(f"{name}: train or dev is empty, training cannot run")
    raise_errors(name, scan.errors)
    mean, std = scan.statistics.mean_and_std()
    splits = {split: some for split, some in scan.splits.items() if some}
    return Data(name, splits, vocabulary, mean, std, scan.digest.hexdigest())


def raise_errors(name, errors):
    """Raise ValueError with the first MOST_ERRORS errors, unless there are none."""
    if len(errors) > 1:
        errors = [f"{name}: {len(errors)} errors"] + errors[:MOST_ERRORS]
    if errors:
        raise ValueError("\n  ".join(errors))


def glosses_of(sentences):
    """Return the set of all glosses of the sentences."""
    sets = [set(sentence.glosses) for sentence in sentences]
    return set().union(*sets)


def report_unannotated_files(sentences):
    """Print which files beside the sentences' features have no annotation."""
    folders = sorted({sentence.features.parent for sentence in sentences})
    for folder in folders:
        paths = [s.features for s in sentences if s.features.parent == folder]
        names = {wer.normalise(path.stem) for path in paths}
        files = sorted(folder.glob("*.*"))
        unused = [file.name for file in files if wer.normalise(file.stem) not in names]
        if unused:
            print(
                f"{folder}: {len(unused)} files without an annotation: "
                f"{' '.join(unused[:5])}"
            )


def with_stride(config, data):
    """Return the config with the temporal stride that the data allow, if it has none.

    It is the largest one at which CTC can align every train sentence that it can align
    at all: the fewer output frames, the faster and the easier to align.
    """
    if config.temporal_stride is not None:
        return config
    smallest = min(STRIDES)
    sentences = [item for item in data.splits["train"] if item.fits(smallest)]
    fitting = [
        stride for stride in STRIDES if all(item.fits(stride) for item in sentences)
    ]
    return dataclasses.replace(config, temporal_stride=max(fitting))


def stride_line(config, data):
    """Return a line on the temporal stride, and on sentences too short for the next."""
    line = f"Temporal stride: {config.temporal_stride} frames per output frame"
    larger = [stride for stride in STRIDES if stride > config.temporal_stride]
    if not larger:
        return line
    sentences = data.splits["train"]
    short = [item for item in sentences if not item.fits(min(larger))]
    if not short:
        return line
    return (
        f"{line}; {len(short)} of {len(sentences)} train sentences are too short for "
        f"{min(larger)}, such as {short[0].id}"
    )


def refuse_other_options(model, config):
    """Raise ValueError where a model was made with other options than a config's."""
    for name in model.options:
        wanted = getattr(config, name)
        found = getattr(model, name)
        if found != wanted:
            raise ValueError(
                f"a model with {name} {found} and a config with {wanted}, expected the "
                f"same: make_model takes it from the config"
            )


def select_sentences(data, config):
    """Return the train and dev sentences of a run.

    Train sentences too short for CTC are left out and listed. With config.overfit both
    are its first train sentences.

    Raises:
        ValueError: no train sentence is long enough.
    """
    train_sentences = alignable(data, config.temporal_stride)
    if config.overfit is None:
        return train_sentences, data.splits["dev"]
    chosen = train_sentences[: config.overfit]
    return chosen, chosen


def alignable(data, stride):
    """Return the train sentences with enough frames for CTC; print the others.

    Raises:
        ValueError: there is none.
    """
    kept = []
    for sentence in data.splits["train"]:
        if sentence.fits(stride):
            kept.append(sentence)
            continue
        fitting = [smaller for smaller in STRIDES if sentence.fits(smaller)]
        print(
            f"Left out, too few frames for CTC: {sentence.id}, {sentence.frames} "
            f"frames, {len(sentence.glosses)} glosses, "
            f"fits --temporal_stride {max(fitting, default='none')}"
        )
    if not kept:
        raise ValueError(
            f"{data.name}: no train sentence fits --temporal_stride {stride}"
        )
    return kept


class SentenceDataset(Dataset):
    """Item (epoch, k): features [T, D] float32 and classes [L] of sentence k.

    The epoch is part of the item because worker processes, which live as long as the
    run, augment by it.
    A gloss outside the vocabulary has no class. It is no target, but an error in
    scoring, which compares glosses.

    Args:
        sentences: a list of Sentence.
        vocabulary: V glosses, the blank first.
        augment: (features, glosses, generator) -> features, or None. The generator is
            seeded by seed, epoch and k: what is drawn depends on neither batches nor
            worker processes.
        seed: of what is drawn.
    """

    def __init__(self, sentences, vocabulary, augment=None, seed=0):
        self.sentences = sentences
        self.augment = augment
        self.seed = seed
        self.classes = {gloss: k for k, gloss in enumerate(vocabulary)}

    def __len__(self):
        return len(self.sentences)

    def __getitem__(self, item):
        epoch, index = item
        sentence = self.sentences[index]
        features = read_features(sentence.features)
        if self.augment is not None:
            # EpochBatches draws an epoch's order from [seed, epoch, 0].
            generator = np.random.default_rng([self.seed, epoch, 1 + index])
            features = self.augment(features, sentence.glosses, generator)
        classes = [self.classes[g] for g in sentence.glosses if g in self.classes]
        return torch.from_numpy(features), torch.tensor(classes, dtype=torch.long)


class Batch(NamedTuple):
    """Some sentences, padded to the longest."""

    features: torch.Tensor  # [B, T, D], zeros after each sentence's end
    lengths: torch.Tensor  # [B] frames, on the CPU
    targets: torch.Tensor  # [sum of L] classes, one sentence after the other
    target_lengths: torch.Tensor  # [B] glosses, on the CPU

    def to(self, device):
        """Return the batch with features and targets on the device."""
        return self._replace(
            features=self.features.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


def collate(items):
    """Return the Batch of some items of a SentenceDataset."""
    features = [features for features, _ in items]
    targets = [classes for _, classes in items]
    return Batch(
        rnn.pad_sequence(features, batch_first=True),
        torch.tensor([len(sentence) for sentence in features]),
        torch.cat(targets),
        torch.tensor([len(classes) for classes in targets]),
    )


class EpochBatches:
    """The batches of an epoch, lists of (epoch, index): a DataLoader's batch_sampler.

    The caller sets `epoch`. Sentences are dealt out to batches of nearly equal size.
    With a seed their order is drawn by seed and epoch, and of each batch this process
    takes its share; without one all come in their order.

    Raises:
        ValueError: a process would have no sentence of some batch.
    """

    def __init__(self, count, batch_size, seed=None):
        self.count = count  # of the sentences
        self.seed = seed
        self.epoch = 0
        self.batches = math.ceil(count / batch_size)
        smallest_batch = count // self.batches
        if seed is not None and process_count() > smallest_batch:
            raise ValueError(
                f"{process_count()} processes, {smallest_batch} sentences in a batch: "
                f"raise --batch_size or start fewer processes"
            )

    def __len__(self):
        return self.batches

    def __iter__(self):
        order = np.arange(self.count)
        if self.seed is not None:
            generator = np.random.default_rng([self.seed, self.epoch, 0])
            order = generator.permutation(order)
        for batch in np.array_split(order, self.batches):
            if self.seed is not None:
                batch = batch[process_rank() :: process_count()]
            yield [(self.epoch, index) for index in batch.tolist()]


def make_loader(sentences, vocabulary, config, augment=None, shuffle=False):
    """Return a DataLoader of Batch over sentences.

    Args:
        sentences: a list of Sentence.
        vocabulary: V glosses, the blank first.
        config: a TrainingConfig: batch size, seed, device, worker processes.
        augment: see SentenceDataset.
        shuffle: draw the order of each epoch, and take this process's share.
    """
    seed = config.seed if shuffle else None
    return DataLoader(
        SentenceDataset(sentences, vocabulary, augment, config.seed),
        batch_sampler=EpochBatches(len(sentences), config.batch_size, seed),
        collate_fn=collate,
        generator=torch.Generator(),  # its draws would otherwise shift dropout's
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=leave_process_group,
        pin_memory="cuda" in config.device,
    )


def leave_process_group(worker):
    """Keep a signal to the process group, such as Ctrl-C, from ending a worker.

    The training process gets it too, reports it and ends its workers.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_train_loader(sentences, data, config):
    """Return the DataLoader of a run's training: shuffled and augmented."""
    if config.overfit is not None:
        return make_loader(sentences, data.vocabulary, config, shuffle=True)
    augmentation = functools.partial(
        augment,
        mean=data.mean,
        std=data.std,
        stride=config.temporal_stride,
        speed_std=config.speed_std,
        gain_std=config.gain_std,
    )
    return make_loader(sentences, data.vocabulary, config, augmentation, shuffle=True)


@np.errstate(over="ignore")  # infinity is clamped by standardise()
def augment(features, glosses, generator, mean, std, stride, speed_std, gain_std):
    """Draw another speed, length, amplitude and noise for a train sentence.

    Args:
        features: [T, D].
        glosses: of the sentence; it stays long enough for CTC to align them.
        generator: a numpy Generator.
        mean: [D] of the train split.
        std: [D] of the train split.
        stride: frames per output frame.
        speed_std: standard deviation of the logarithm of the speed, which is drawn for
            each part of the sentence; 0: the speed is even.
        gain_std: standard deviation of the logarithm of the factor that is drawn for
            each feature; 0: all features of a sentence have the same factor.

    Returns:
        Features [another T, D].
    """
    if speed_std > 0:
        features = change_speed(features, generator, speed_std)
    frames = round(len(features) * generator.uniform(*TIME_STRETCH))
    shortest = (frames_needed(glosses) - 1) * stride + 1
    features = change_length(features, max(frames, shortest))
    origin = scaling_origin(mean, std)
    scale = np.float32(np.exp(generator.uniform(*np.log(AMPLITUDE_SCALE))))
    if gain_std > 0:
        gains = generator.standard_normal(features.shape[1], dtype=np.float32)
        scale = scale * np.exp(gain_std * gains)  # [D]
    noise = generator.standard_normal(features.shape, dtype=np.float32)
    return origin + scale * (features - origin) + NOISE_STD * std * noise


def scaling_origin(mean, std):
    """Return the point about which each feature is scaled: [D], [D] -> [D].

    It is zero for a feature whose mean is near zero, as of coordinates relative to the
    body. Others would mostly be shifted by that: a coordinate of mean 1000 and
    deviation 10 is scaled about 1000 - CENTRED_STD * 10 instead.
    """
    return mean - np.clip(mean, -CENTRED_STD * std, CENTRED_STD * std)


def change_speed(features, generator, speed_std):
    """Make some parts of a sentence slower and others faster: [T, D] -> [T, D].

    The sentence is divided into equal parts of about SPEED_FRAMES. Each lasts longer or
    shorter by a factor whose logarithm has the standard deviation speed_std.
    """
    frames = len(features)
    parts = max(FEWEST_SPEEDS, frames // SPEED_FRAMES)
    durations = np.exp(speed_std * generator.standard_normal(parts))
    borders = np.cumsum(np.concatenate(([0], durations)))  # of the changed parts
    original_borders = np.linspace(0, frames - 1, parts + 1)
    times = np.linspace(0, borders[-1], frames)
    positions = np.interp(times, borders, original_borders)  # [T] frames
    before = np.floor(positions).astype(int)
    after = np.minimum(before + 1, frames - 1)
    weights = (positions - before).astype(np.float32)[:, None]  # [T, 1]
    return (1 - weights) * features[before] + weights * features[after]


def change_length(features, frames):
    """Interpolate linearly over time: [T, D] -> [frames, D]."""
    columns = torch.from_numpy(features).T[None]  # [T, D] -> [1, D, T]
    resampled = F.interpolate(columns, frames, mode="linear", align_corners=True)
    return resampled[0].T.numpy()


# ------------------------------------------------------------ the built-in corpus

BUILT_IN_GLOSSES = [
    "ABEND",
    "BLEIBEN",
    "FRUEH",
    "GEWITTER",
    "HEUTE",
    "KALT",
    "KOMMEN",
    "MORGEN",
    "NACHT",
    "NEBEL",
    "NORD",
    "REGEN",
    "SCHNEE",
    "SONNE",
    "STARK",
    "SUED",
    "TAG",
    "WARM",
    "WIND",
    "WOLKE",
]
BUILT_IN_SIZES = {"train": 200, "dev": 40, "test": 60}  # sentences
KEY_POSES = 7  # from which all glosses are made
HAND_FEATURES = 8  # of each of the two hands, so D = 16
SIGNERS = 8
TRAIN_SIGNERS = 6  # the others are in dev and test only
SUCCESSORS = 6  # glosses that may follow a gloss
SENTENCE_GLOSSES = (3, 7)  # fewest and most


@dataclass
class Signer:
    """How one of the built-in corpus's signers signs."""

    size: float
    place: np.ndarray  # [D], added to all features
    speed: float
    poses: np.ndarray  # [KEY_POSES, D], in this signer's style


def synthetic_corpus(seed=0, sizes=BUILT_IN_SIZES):
    """Make up signing that is worth learning, a pure function of the seed.

    A gloss is a sequence of three key poses; features glide from pose to pose, also
    from gloss to gloss (coarticulation). Signers differ in size, place, speed and
    style. A sentence follows a random grammar: SUCCESSORS glosses may follow a gloss.

    Args:
        seed: of all that is drawn.
        sizes: split -> number of sentences.

    Returns:
        split -> list of Sentence with features [T, 16].
    """
    generator = np.random.default_rng([seed, KEY_POSES])
    poses = generator.standard_normal((KEY_POSES, 2 * HAND_FEATURES))
    forms = draw_forms(generator)
    grammar = {
        gloss: generator.permutation(BUILT_IN_GLOSSES)[:SUCCESSORS].tolist()
        for gloss in BUILT_IN_GLOSSES
    }
    signers = [draw_signer(poses, generator) for _ in range(SIGNERS)]
    corpus = {}
    for split, size in sizes.items():
        available = TRAIN_SIGNERS if split == "train" else SIGNERS
        corpus[split] = []
        for number in range(size):
            signer = int(generator.integers(available))
            glosses = draw_glosses(grammar, generator)
            key_poses = np.concatenate([forms[gloss] for gloss in glosses])
            sentence = Sentence(
                id=f"{split}-{number:04d}",
                signer=f"signer-{signer}",
                glosses=tuple(glosses),
                features=sign(key_poses, signers[signer], generator),
            )
            corpus[split].append(sentence)
    return corpus


def draw_forms(generator):
    """Return gloss -> its three key poses, of which neighbours differ."""
    forms = [
        form
        for form in itertools.product(range(KEY_POSES), repeat=3)
        if form[0] != form[1] and form[1] != form[2]
    ]
    drawn = generator.permutation(forms)[: len(BUILT_IN_GLOSSES)]
    return dict(zip(BUILT_IN_GLOSSES, drawn, strict=True))


def draw_signer(poses, generator):
    """Draw a Signer with a style of the poses."""
    return Signer(
        size=generator.uniform(0.7, 1.3),
        place=0.4 * generator.standard_normal(poses.shape[1]),
        speed=generator.uniform(0.8, 1.25),
        poses=poses + 0.3 * generator.standard_normal(poses.shape),
    )


def draw_glosses(grammar, generator):
    """Draw the glosses of a sentence, a list."""
    fewest, most = SENTENCE_GLOSSES
    glosses = [str(generator.choice(BUILT_IN_GLOSSES))]
    while len(glosses) < fewest or (len(glosses) < most and generator.random() < 0.7):
        successors = grammar[glosses[-1]]
        glosses.append(successors[generator.integers(SUCCESSORS)])
    return glosses


def sign(sequence, signer, generator):
    """Move through a sequence of poses, with noise and hands that a tracker loses.

    Args:
        sequence: [P] key poses; rest, all zeros, precedes and follows them.
        signer: a Signer.
        generator: a numpy Generator.

    Returns:
        Features [T, D].
    """
    targets = signer.poses[sequence]  # [P, D]
    targets = targets + 0.15 * generator.standard_normal(targets.shape)
    targets = np.pad(targets, ((1, 1), (0, 0)))
    frames_between = generator.uniform(2.5, 5, len(targets) - 1) / signer.speed
    times = np.concatenate(([0], np.cumsum(frames_between)))
    frames = np.arange(int(times[-1]) + 1)
    columns = [np.interp(frames, times, values) for values in targets.T]
    track = np.stack(columns, axis=1)  # [T, D]
    track = signer.size * track + signer.place
    track = track + 0.2 * generator.standard_normal(track.shape)
    for start in np.flatnonzero(generator.random(len(frames)) < 1 / 30):
        first_column = HAND_FEATURES * int(generator.integers(2))
        end = start + int(generator.integers(1, 5))
        track[start:end, first_column : first_column + HAND_FEATURES] = 0
    return track.astype(np.float32)


# ------------------------------------------------------------ several processes
#
# Under torchrun each process does the same with its share of every batch. Losses and
# BatchNorm's statistics are means over the whole batch, so the number of processes
# changes nothing but dropout, which each draws for itself, and rounding.


def join_processes(device):
    """Join torchrun's other processes, if any; return this process's device."""
    if not distributed.is_torchelastic_launched():
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group()  # gloo for CPU tensors, nccl for a GPU's
    return device


def process_rank():
    """Return which process this is, counted from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count():
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def in_first_process(function, *arguments):
    """Call a function in the first process; return its result in all of them."""
    result = [function(*arguments) if process_rank() == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(result)
    return result[0]


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is summed likewise.

    Every process then holds the loss of the whole batch. With P processes the gradients
    are P times those of its share, and DistributedDataParallel, which averages over the
    processes, divides by P.
    """

    @staticmethod
    def forward(context, tensor):
        """Return the sum over all processes."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient):
        """Return the sum of all processes' gradients."""
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def sum_over_processes(tensor):
    """Return the sum over all processes; in one process the tensor itself."""
    if not distributed.is_initialized():
        return tensor
    return AllReduceSum.apply(tensor)


class BatchNorm(freeze.BatchNorm1d):
    """BatchNorm over the valid rows of all processes' batches: [N, C] -> [N, C].

    Ioffe & Szegedy 2015, arXiv 1502.03167, section 3. nn.SyncBatchNorm does the same
    for several processes, but needs GPUs and knows no valid rows. The teacher's rows
    are all valid; the student's batches are padded.
    """

    def forward(self, rows, valid=None):
        """Normalise rows; valid [N] is true for those that count, None means all."""
        # With all rows in one process PyTorch's own layer does the same, and faster;
        # but it refuses a single row.
        one_process = process_count() == 1
        if not self.training or (valid is None and one_process and len(rows) > 1):
            return super().forward(rows)
        if valid is None:
            valid = torch.ones(len(rows), device=rows.device)
        valid = valid[:, None].to(self.bias.dtype)  # [N, 1]
        sums = torch.cat((valid.sum(dim=0), (valid * rows).sum(dim=0)))
        count, total = sum_over_processes(sums).split([1, len(self.bias)])
        mean = total / count  # [C]
        squares = valid * (rows - mean) ** 2  # E[x^2] - E[x]^2 would cancel digits
        variance = sum_over_processes(squares.sum(dim=0)) / count  # [C]
        self.update_running_statistics(count, mean, variance)
        normalised = (rows - mean) * torch.rsqrt(variance + self.eps)
        return normalised * self.weight + self.bias

    @torch.no_grad()
    def update_running_statistics(self, count, mean, variance):
        """Move the running statistics as nn.BatchNorm1d does, by momentum."""
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the mean of all batches, for adapt.estimate_batchnorm
            momentum = 1 / self.num_batches_tracked
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased, momentum)


def batch_mean(total, count):
    """Return the mean over a whole batch of this process's sum (a tensor) and count."""
    share = torch.stack((total, total.new_full((), count)))
    total, count = sum_over_processes(share)
    return total / count


def share_gradients(objective):
    """Return the module that averages gradients over the processes in backward.

    It is made anew for each epoch, as what trains changes.
    """
    if not distributed.is_initialized():
        return objective
    return nn.parallel.DistributedDataParallel(objective, forward_sync_buffers=False)


# ------------------------------------------------------------ reporting

DIAGNOSED = 200  # train sentences, at most, that are scored for the diagnosis
BLUE = "#1f77b4"
RED = "#d62728"
GREY = "#777777"


def minutes(seconds):
    """Return a duration as m:ss."""
    whole_minutes, rest = divmod(int(seconds), 60)
    return f"{whole_minutes}:{rest:02d}"


def show_progress(step, steps, loss, started):
    """Rewrite one line of a terminal every ten steps: step, loss and the time left."""
    if step % 10 != 0 or not sys.stderr.isatty():
        return
    per_step = (time.monotonic() - started) / (step + 1)
    left = minutes(per_step * (steps - step - 1))
    line = f"\r  step {step + 1}/{steps}  loss {loss:.3f}  left {left} \r"
    print(line, end="", file=sys.stderr, flush=True)


def stage_line(model, schedule, epoch):
    """Return a line on what trains from this epoch on."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return (
        f"epoch {epoch:>3}  stage {schedule.stage(epoch)} trains {sum(trained):,} "
        f"parameters: {' '.join(schedule.trainable(epoch))}"
    )


def epoch_line(history, errors, seconds_left):
    """Return the line that a person sees after each epoch.

    Args:
        history: the log's rows, the last one for this epoch.
        errors: the WordErrors of dev.
        seconds_left: until the end of the run.
    """
    row = history[-1]
    best = best_epoch(history)
    dev_loss = math.nan if row["dev_loss"] is None else row["dev_loss"]
    line = (
        f"epoch {row['epoch']:>3}  loss {row['loss']:6.3f}  dev {dev_loss:6.3f}  "
        f"WER {errors.rates()}  blank {row['blank_share']:4.0%}  "
        f"best {best['wer']:7.2%} at {best['epoch']:<3}  left {minutes(seconds_left)}"
    )
    if row["skipped_steps"]:
        line += f"  {row['skipped_steps']} steps not finite"
    return line


def describe_data(data):
    """Print what to know of a corpus before believing a WER; return it as a dict."""
    print(
        f"Data: {data.name}, D = {len(data.mean)}, {len(data.vocabulary) - 1} glosses"
    )
    train_signers = {sentence.signer for sentence in data.splits["train"]}
    facts = {}
    for split, sentences in data.splits.items():
        facts[split] = describe_split(split, sentences, data.vocabulary)
        new_signers = {sentence.signer for sentence in sentences} - train_signers
        if new_signers:
            print(f"    signers that are not in train: {' '.join(sorted(new_signers))}")
    report_unscorable(data.vocabulary)
    suspect_axes(data)
    return facts


def describe_split(split, sentences, vocabulary):
    """Print the sizes and oddities of a split; return them as a dict."""
    frames = [sentence.frames for sentence in sentences]
    references = [sentence.glosses for sentence in sentences]
    glosses = list(itertools.chain.from_iterable(references))
    known = set(vocabulary)
    print(
        f"  {split:<5} {len(sentences):>5} sentences, {len(glosses):>6} glosses, "
        f"{min(frames)} to {max(frames)} frames per sentence"
    )
    unknown = [gloss for gloss in glosses if gloss not in known]
    if unknown:
        print(
            f"    glosses unknown to train, certain errors (WER at least "
            f"{len(unknown) / len(glosses):.1%}): {' '.join(sorted(set(unknown)))}"
        )
    other_case = in_other_case(unknown, known)
    if other_case:
        print(f"    differ from train's glosses only in case: {' '.join(other_case)}")
    constant_wer, constant_gloss = wer.constant_answer(references)
    print(
        f"    best constant answer: {constant_gloss or 'none'}, WER {constant_wer:.1%}"
    )
    too_short = {}  # stride -> number of sentences
    for stride in STRIDES:
        fitting = [sentence for sentence in sentences if sentence.fits(stride)]
        too_short[stride] = len(sentences) - len(fitting)
    if any(too_short.values()):
        print(
            f"    too few frames for CTC at --temporal_stride {STRIDES}: "
            f"{list(too_short.values())} sentences"
        )
    return {
        "sentences": len(sentences),
        "glosses": len(glosses),
        "unknown": unknown,
        "frames": [min(frames), max(frames)],
        "other_case": other_case,
        "constant_answer": constant_wer,
        "too_short": too_short,
    }


def in_other_case(unknown, known):
    """Return the unknown glosses that are known in upper or lower case, sorted."""
    folded = {gloss.casefold() for gloss in known}
    return sorted({gloss for gloss in unknown if gloss.casefold() in folded})


def report_unscorable(vocabulary):
    """Print the glosses that sclite takes for markup, which wer.py refuses in files."""
    markup = wer.sclite_markup(vocabulary[1:])
    if markup:
        print(
            f"  glosses that sclite takes for markup, so --ctm and wer.py refuse them: "
            f"{' '.join(markup)}"
        )


def suspect_axes(data):
    """Print a warning where the features' axes look exchanged or flattened."""
    sentences = data.splits["train"]
    frames = {sentence.frames for sentence in sentences}
    shorter = [s for s in sentences if s.frames < frames_needed(s.glosses)]
    shape = f"[{sentences[0].frames}, {len(data.mean)}]"
    if len(sentences) >= 5 and len(frames) == 1:
        print(
            f"  all train files have the shape {shape}, expected [T, D]: is the first "
            f"axis the frames, or are the files [D, T] of one length?"
        )
    elif 2 * len(shorter) > len(sentences):
        print(
            f"  {len(shorter)} of {len(sentences)} train sentences have fewer frames "
            f"than glosses, the first has the shape {shape}, expected [T, D]: is the "
            f"first axis the frames?"
        )


def print_diagnosis(title, lines):
    """Print what errors suggest, under a title."""
    print(title)
    for line in lines or ["nothing conspicuous"]:
        print(f"  {line}")


def diagnose_training(model, train_sentences, evaluation, vocabulary, config):
    """Print what the last epoch's errors suggest; arguments as of fit_diagnosis."""
    lines = fit_diagnosis(model, train_sentences, evaluation, vocabulary, config)
    lines += decoding_diagnosis(evaluation)
    print_diagnosis("Diagnosis of the last epoch's network:", lines)


def fit_diagnosis(model, train_sentences, evaluation, vocabulary, config):
    """Return lines on underfitting and overfitting, and which flags to try.

    Args:
        model: the network.
        train_sentences: up to DIAGNOSED of them are recognised, without augmentation.
        evaluation: the Evaluation of dev.
        vocabulary: V glosses, the blank first.
        config: a TrainingConfig.
    """
    scored = train_sentences[:: math.ceil(len(train_sentences) / DIAGNOSED)]
    train_wer = recognise(model, scored, vocabulary, config).errors.wer
    references = [sentence.glosses for sentence in scored]
    constant_wer, _ = wer.constant_answer(references)
    return compare_train_and_dev(
        train_wer, constant_wer, evaluation.errors.wer, frozen_share(model)
    )


def frozen_share(model):
    """Return the share of a model's parameters that do not require gradients."""
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    return sum(frozen) / sum(p.numel() for p in model.parameters())


def compare_train_and_dev(train_wer, constant_wer, dev_wer, frozen):
    """Return lines on underfitting and overfitting.

    Args:
        train_wer: without augmentation.
        constant_wer: of the best constant answer to the train sentences.
        dev_wer: of the sentences that were not trained on.
        frozen: the share of the parameters that are frozen.
    """
    if train_wer > 0.8 * constant_wer:
        return [
            f"underfitting: train WER {train_wer:.1%}, the best constant answer has "
            f"{constant_wer:.1%}, frozen {frozen:.0%} of the parameters: more "
            f"--epochs, another --learning_rate, fewer frozen layers; --overfit 8 "
            f"tests the features"
        ]
    if train_wer <= 0.3 and dev_wer > 2 * train_wer + 0.05:
        return [
            f"overfitting: train WER {train_wer:.1%}, dev WER {dev_wer:.1%}: more "
            f"data, a higher --dropout or --weight_decay"
        ]
    return []


def decoding_diagnosis(evaluation):
    """Return lines on blanks, deletions and insertions, and which flags to try."""
    glosses = max(1, evaluation.errors.reference_glosses)
    deletions = evaluation.errors.deletions / glosses
    insertions = evaluation.errors.insertions / glosses
    if evaluation.blank_share > 0.95:
        return [
            f"only blanks, {evaluation.blank_share:.0%} of the frames: usual in the "
            f"first epochs; later a smaller --temporal_stride or more --epochs"
        ]
    if deletions > 2 * insertions + 0.05:
        return [
            f"deletions prevail, {deletions:.1%} of the glosses, insertions "
            f"{insertions:.1%}: --evaluate with --beam_width 10, a smaller "
            f"--temporal_stride"
        ]
    if insertions > 2 * deletions + 0.05:
        return [
            f"insertions prevail, {insertions:.1%} of the glosses, deletions "
            f"{deletions:.1%}: --evaluate with --beam_width 10, a larger "
            f"--temporal_stride"
        ]
    return []


@dataclass
class Line:
    """A line of a chart."""

    name: str  # for the legend; "" for none
    colour: str
    points: list  # of (x, y)


@dataclass
class Panel:
    """A chart with its title; several stand one below the other."""

    title: str
    lines: list  # of Line


CHART_WIDTH = 760  # pixels
CHART_HEIGHT = 170
CHART_LEFT = 56  # where the x axis begins
PANEL_HEIGHT = 250  # a chart with its title, legend and ticks


def round_ticks(highest, most=6):
    """Return round numbers from 0 to at least highest, at most so many."""
    step = 10.0 ** math.floor(math.log10(max(highest, 1e-6) / most))
    factors = (1, 2, 5, 10, 20)
    factor = next(f for f in factors if math.ceil(highest / (f * step)) < most)
    count = max(1, math.ceil(highest / (factor * step)))
    return [factor * step * k for k in range(count + 1)]


def svg_text(x, y, words, style=""):
    """Return an SVG text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(str(words))}</text>'


@dataclass
class Axes:
    """Where the values of a chart lie in the picture."""

    top: float  # pixels
    x_ticks: list  # values along the x axis, from its first to its last
    y_ticks: list  # values along the y axis, from 0 up

    def x(self, value):
        """Return the x pixel of a value."""
        width = max(self.x_ticks[-1] - self.x_ticks[0], 1e-9)
        return CHART_LEFT + CHART_WIDTH * (value - self.x_ticks[0]) / width

    def y(self, value):
        """Return the y pixel of a value."""
        return self.top + CHART_HEIGHT * (1 - value / self.y_ticks[-1])


def bands_svg(axes, bands):
    """Return the SVG elements of shaded bands, (x where it begins, its name) each."""
    elements = []
    for number, (start, name) in enumerate(bands):
        left = axes.x(start)
        width = axes.x(axes.x_ticks[-1]) - left
        shade = "#f4f4f4" if number % 2 == 0 else "#e6edf6"
        elements.append(
            f'<rect x="{left:.1f}" y="{axes.top}" width="{width:.1f}" '
            f'height="{CHART_HEIGHT}" fill="{shade}"/>'
        )
        elements.append(svg_text(left + 4, axes.top + 14, name, 'fill="#666"'))
    return elements


def ticks_svg(axes):
    """Return the SVG elements of both axes' ticks."""
    elements = []
    for value in axes.y_ticks:
        y = axes.y(value)
        elements.append(
            f'<path d="M{CHART_LEFT} {y:.1f}h{CHART_WIDTH}" stroke="#ccc"/>'
        )
        label = svg_text(CHART_LEFT - 6, y + 4, f"{value:g}", 'text-anchor="end"')
        elements.append(label)
    for value in axes.x_ticks:
        y = axes.top + CHART_HEIGHT + 16
        style = 'fill="#666" text-anchor="middle"'
        elements.append(svg_text(axes.x(value), y, f"{value:g}", style))
    return elements


def lines_svg(axes, lines):
    """Return the SVG elements of lines, with a legend above the chart."""
    elements = []
    legend_x = CHART_LEFT
    for line in lines:
        points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        elements.append(
            f'<polyline fill="none" stroke="{line.colour}" stroke-width="2" '
            f'points="{points}"/>'
        )
        style = f'fill="{line.colour}"'
        elements.append(svg_text(legend_x, axes.top - 9, line.name, style))
        legend_x += 30 + 7 * len(line.name)
    return elements


def chart_svg(panels, x_ticks, x_label, bands=()):
    """Draw line charts one below the other, as SVG on a white ground.

    Args:
        panels: a list of Panel.
        x_ticks: values along the x axis, from its first to its last.
        x_label: what they are.
        bands: (x where it begins, its name) of each shaded band, in order.
    """
    width = CHART_LEFT + CHART_WIDTH + 30
    height = PANEL_HEIGHT * len(panels) + 30
    elements = []
    for number, panel in enumerate(panels):
        points = itertools.chain.from_iterable(line.points for line in panel.lines)
        highest = max((y for _, y in points), default=1)
        headroom = 1.15 if bands else 1  # for the bands' names
        axes = Axes(
            top=PANEL_HEIGHT * number + 50,
            x_ticks=x_ticks,
            y_ticks=round_ticks(headroom * highest),
        )
        title = svg_text(CHART_LEFT, axes.top - 28, panel.title, 'font-weight="bold"')
        elements.append(title)
        elements += bands_svg(axes, bands) + ticks_svg(axes)
        elements += lines_svg(axes, panel.lines)
    elements.append(svg_text(CHART_LEFT, height - 12, x_label))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def curves_svg(history, schedule, constant_wer):
    """Draw a run's losses and dev WER over the epochs, as SVG.

    Args:
        history: the log's rows.
        schedule: the run's UnfreezeSchedule.
        constant_wer: WER of the best constant answer to dev.
    """

    def points(key, factor=1):
        rows = [row for row in history if row[key] is not None]
        return [(row["epoch"], factor * row[key]) for row in rows]

    last = max(1, schedule.epochs - 1)
    best = best_epoch(history)
    losses = Panel(
        "Loss",
        [
            Line("training objective", BLUE, points("loss")),
            Line("CTC loss on dev, nats per gloss", RED, points("dev_loss")),
        ],
    )
    wers = Panel(
        f"Dev WER in percent, lowest {100 * best['wer']:.1f} at epoch {best['epoch']}",
        [
            Line(
                "best constant answer",
                GREY,
                [(x, 100 * constant_wer) for x in (0, last)],
            ),
            Line("network", RED, points("wer", 100)),
        ],
    )
    x_ticks = [x for x in round_ticks(last, 12) if x < last] + [last]
    bands = [(start, f"stage {k}") for k, start in enumerate(schedule.starts)]
    return chart_svg([losses, wers], x_ticks, "epoch", bands)


# ------------------------------------------------------------ the program

# Settings that a resumed run may change: they do not change what is trained.
RESUME_MAY_CHANGE = {
    "data_dir",
    "output_dir",
    "device",
    "num_workers",
    "teacher_checkpoint",
    "no_baseline",
    "export",
}

# The flags that the modes read which do not train; --device and --json go everywhere.
RECOGNITION_FLAGS = {
    "evaluate",
    "beam_width",
    "adapt_to",
    "batch_size",
    "num_workers",
    "precision",
}
MODE_FLAGS = {
    "--evaluate": RECOGNITION_FLAGS | {"split", "ctm", "data_dir", "clean_annotations"},
    "--predict": RECOGNITION_FLAGS | {"predict", "output_dir", "overfit"},
    "--evaluate --export": {"evaluate", "export", "adapt_to"},
    "--validate_data": {"validate_data", "clean_annotations", "temporal_stride"},
}
NOT_IN_TRAINING = {"split", "beam_width", "adapt_to"}  # flags that only modes read


def refuse_unwritable(folder, flag):
    """Raise ValueError where no file can be written into a folder.

    One that is missing can be written if it can be made. This is found before the
    training, not after it.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{flag}: {existing} is no folder that can be written")


def number(kind, low, high):
    """Return an argparse type: an int or a float from low to high."""

    def parse(text):
        """Return the number; ArgumentTypeError for what is none in the range."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text}, expected {low} to {high} ({kind.__name__})"
            )
        return value

    return parse


def device_names():
    """Return the devices that torch finds here."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cuda"] + gpus + ["cpu"] if gpus else ["cpu"]


class ProgramParser(freeze.OneLineParser):
    """The parser of teacher.py and distill.py."""

    def error(self, message):
        """Print the message and end with status 2."""
        if "--device" in message:
            message += f"; this is torch {torch.__version__}"
        super().error(f"{message} (see --help)")


def make_shared_parser(program, description):
    """Return the parser of the flags that teacher.py and distill.py share.

    Their defaults are set last, all at once, from a config.

    Args:
        program: the file's name.
        description: one line.

    Returns:
        The parser, and its group of modes of which one alone can be asked for.
    """
    parser = ProgramParser(
        program,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_data_flags(parser)
    add_training_flags(parser)
    modes = add_mode_flags(parser)
    return parser, modes


def add_data_flags(parser):
    """Add the flags of what is read and written, and of where the work is done."""
    group = parser.add_argument_group("data and device")
    group.add_argument(
        "--data_dir",
        type=os.path.abspath,
        help="corpus; none: that of the checkpoint, else the built-in one",
    )
    group.add_argument(
        "--clean_annotations",
        choices=("phoenix",),
        help="clean train annotations by Phoenix-2014's rules",
    )
    group.add_argument("--output_dir", help="for checkpoints, log and picture")
    group.add_argument(
        "--num_workers",
        type=number(int, 0, 1000),
        help="processes that read data ahead",
    )
    group.add_argument("--device", choices=device_names(), help="to run on")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of forward pass and loss, in evaluation too; on a GPU float32 has TF32's "
        "products",
    )


def add_training_flags(parser):
    """Add the flags of the training that teacher and student share."""
    group = parser.add_argument_group("training")
    count = number(int, 1, 10**6)
    non_negative = number(float, 0, 1000)
    group.add_argument("--epochs", type=count, help="passes over the train sentences")
    group.add_argument(
        "--batch_size",
        type=count,
        help="sentences per step, of all processes together",
    )
    group.add_argument(
        "--learning_rate", type=non_negative, help="AdamW's, at its maximum"
    )
    group.add_argument("--weight_decay", type=non_negative, help="AdamW's")
    group.add_argument(
        "--dropout",
        type=number(float, 0, 0.99),
        help="share of values dropped in front of the last layers",
    )
    group.add_argument(
        "--speed_std",
        type=number(float, 0, 5),
        metavar="STD",
        help="of the logarithm of the speed in parts of a train sentence, in training",
    )
    group.add_argument(
        "--gain_std",
        type=number(float, 0, 5),
        metavar="STD",
        help="of the logarithm of each feature's factor in training",
    )
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), help="of all that is drawn"
    )
    group.add_argument(
        "--overfit",
        type=count,
        metavar="N",
        help="train on N sentences, not augmented, and score these; the run lies in "
        "the folder overfit/ of --output_dir",
    )


def add_mode_flags(parser):
    """Add the flags that ask for something else than a new run.

    Returns:
        The group of modes of which one alone can be asked for.
    """
    group = parser.add_argument_group("evaluation and other modes")
    group.add_argument(
        "--split", choices=SPLITS, default="dev", help="what --evaluate scores"
    )
    group.add_argument(
        "--ctm", metavar="FILE", help="write --evaluate's hypotheses, for sclite"
    )
    group.add_argument(
        "--predict",
        metavar="FILE",
        nargs="+",
        help="recognise files, by --evaluate's checkpoint or the best in --output_dir",
    )
    group.add_argument(
        "--beam_width",
        type=number(int, 1, 10**6),
        default=1,
        help="prefixes that --evaluate and --predict keep; 1: greedy decoding",
    )
    group.add_argument(
        "--adapt_to",
        metavar="FILE",
        nargs="+",
        help="feature files, not annotated, of the signer that --evaluate and "
        "--predict recognise: BatchNorm takes its statistics from them",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout, all else on stderr",
    )
    modes = group.add_mutually_exclusive_group()
    modes.add_argument(
        "--resume", action="store_true", help="continue --output_dir's last.pth"
    )
    modes.add_argument(
        "--evaluate", metavar="CHECKPOINT", help="score a checkpoint, do not train"
    )
    return modes


def add_network_flags(parser):
    """Add the flags of the network and of the weights that it starts from."""
    group = parser.add_argument_group("network and weights")
    group.add_argument(
        "--temporal_stride",
        type=int,
        choices=STRIDES,
        help="frames per output frame; none: the largest that fits every train "
        "sentence",
    )
    group.add_argument(
        "--centre_sentences",
        action=argparse.BooleanOptionalAction,
        help="take each sentence's mean as its features' zero",
    )
    group.add_argument(
        "--hidden_size",
        type=number(int, 1, 10**4),
        help="LSTM units per direction",
    )
    group.add_argument(
        "--shortcut_channels",
        type=number(int, 0, 10**4),
        help="of convolutions around the backbone; 0: none",
    )
    group.add_argument(
        "--backbone_ctc",
        type=number(float, 0, 1000),
        metavar="WEIGHT",
        help="of further CTC losses, in front of the LSTM, in training; 0: none",
    )
    group.add_argument(
        "--pretrained_weights",
        metavar="NAME|PATH",
        help=f"file, or {adapt.KINETICS}, to start from; none: random weights",
    )
    group.add_argument(
        "--adapt_method",
        choices=adapt.METHODS,
        help="how 3D kernels become 1D",
    )


def add_freezing_flags(parser):
    """Add the flags of freezing and unfreezing."""
    group = parser.add_argument_group("freezing")
    group.add_argument(
        "--freeze_backbone",
        action="store_true",
        help="freeze stem to mixed_5c",
    )
    group.add_argument(
        "--freeze_until_layer",
        choices=freeze.BACKBONE,
        metavar="LAYER",
        help="freeze stem to LAYER",
    )
    group.add_argument(
        "--progressive_unfreeze",
        action="store_true",
        help="freeze, then release layers in stages",
    )
    group.add_argument(
        "--unfreeze_stages",
        type=int,
        help="stages of --progressive_unfreeze",
    )
    group.add_argument(
        "--unfreeze_by",
        type=float,
        metavar="SHARE",
        help="release all layers by this share of the epochs, such as 0.15; implies "
        "--progressive_unfreeze",
    )


def make_parser():
    """Return the parser of teacher.py's flags."""
    parser, modes = make_shared_parser("teacher.py", __doc__.split("\n")[0])
    add_network_flags(parser)
    add_freezing_flags(parser)
    modes.add_argument(
        "--validate_data",
        metavar="DIR",
        type=os.path.abspath,
        help="read and describe a corpus; status 0 if half of train is long enough and "
        "a gloss of dev is in train",
    )
    parser.set_defaults(**dataclasses.asdict(Config()))
    return parser


def config_from(args, config_class):
    """Return the config that parsed flags describe; other flags are left out."""
    given = vars(args)
    names = [setting.name for setting in dataclasses.fields(config_class)]
    return config_class(**{name: given[name] for name in names if name in given})


def run_program(parser, argv, model_class, run):
    """Run a program; its errors are one line each, without a traceback.

    The exit status is 2 for what the user gave, 1 for what failed, 130 after Ctrl-C or
    SIGTERM. With --json the last line on stdout is what `run` returns.

    Args:
        parser: a ProgramParser.
        argv: as in sys.argv[1:], or None.
        model_class: of the checkpoint that --resume continues.
        run: (args, content of the last.pth to resume or None) -> dict.
    """
    args = parser.parse_args(argv)
    mode = mode_of(args)
    names_run = mode in ("training", "--predict") and not args.resume
    if args.overfit is not None and names_run:
        # distill.py must not take such a network for the teacher.
        args.output_dir = f"{args.output_dir}/overfit"
    if args.ctm is not None and mode != "--evaluate":
        parser.error("--ctm goes with --evaluate, without --predict or --export")
    if args.predict is not None and args.resume:
        parser.error("--resume goes without --predict")
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.redirect_stdout(message_stream(args.json)):
            name_unused_flags(parser, args)
            resumed = None
            if args.resume:
                args, resumed = parse_resumed(parser, argv, args, model_class)
            args.device = join_processes(args.device)
            allow_tf32(args.device)
            result = run(args, resumed)
        if args.json and process_rank() == 0:
            print(json.dumps(result))
        if distributed.is_initialized():
            # Without it, gloo's threads of a process that is the first to end may still
            # hold tensors while Python shuts down, which aborts the process.
            distributed.barrier()
            distributed.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        status, message = explain_failure(error, args)
        if status is None:
            raise
        parser.exit(status, f"{parser.prog}: {message}\n")


def mode_of(args):
    """Return what the flags ask for: a key of MODE_FLAGS, or "training"."""
    given = vars(args)  # not every program has every flag
    if args.predict is not None:
        return "--predict"
    if args.evaluate is not None and given.get("export") is not None:
        return "--evaluate --export"
    if args.evaluate is not None:
        return "--evaluate"
    if given.get("validate_data") is not None:
        return "--validate_data"
    return "training"


def name_unused_flags(parser, args):
    """Print which of the given flags are not read by the mode that is asked for."""
    defaults = parser.parse_args([])  # of the same types, as of paths
    mode = mode_of(args)
    if mode == "training":
        used = vars(args).keys() - NOT_IN_TRAINING
    else:
        used = MODE_FLAGS[mode] | {"device", "json"}
    unused = []
    for name in sorted(vars(args).keys() - used):
        if getattr(args, name) != getattr(defaults, name):
            unused.append(f"--{name}")
    if unused:
        print(f"Flags that {mode} does not use: {' '.join(unused)}")


def explain_failure(error, args):
    """Return the exit status and the line for an error.

    A ValueError counts as what the user gave. The status is None for a defect of this
    program, whose traceback is needed.
    """
    if isinstance(error, ValueError):
        return 2, str(error)
    if isinstance(error, (OSError, FloatingPointError, torch.OutOfMemoryError)):
        return 1, str(error)
    # Where memory runs out on the CPU, torch raises a RuntimeError without a class.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return 1, "out of memory, try a smaller --batch_size"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return 1, str(error)  # such as one that the system has killed
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted"
        if mode_of(args) == "training":
            message += (
                f"; a training continues with --resume --output_dir {args.output_dir}"
            )
        return 130, message
    return None, ""


def message_stream(to_stderr):
    """Return where messages go; of several processes only the first one prints any."""
    if distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        return open(os.devnull, "w")
    return sys.stderr if to_stderr else sys.stdout


def parse_resumed(parser, argv, args, model_class):
    """Parse the flags of a run to resume, with those of its last.pth as defaults.

    Flags that are given must be those the run was started with, but for
    RESUME_MAY_CHANGE. A run from a GPU continues on the CPU where there is none.

    Args:
        parser: a ProgramParser; its defaults are changed.
        argv: what it parses, as in sys.argv[1:], or None.
        args: what it made of argv so far; last.pth lies in args.output_dir.
        model_class: of the checkpoint.

    Returns:
        The flags, and the content of last.pth.

    Raises:
        ValueError: no last.pth of such a model, a flag that differs, or a corpus that
            is no longer where it was.
    """
    path = Path(args.output_dir, LAST_CHECKPOINT)
    if not path.is_file():
        raise ValueError(
            f"cannot resume from {path}: no such file, expected the --output_dir of "
            f"a run"
        )
    _, checkpoint = load_model(path, model_class)
    missing = {"optimizer", "header", "log", "always_trainable"} - checkpoint.keys()
    if missing:
        raise ValueError(
            f"cannot resume from {path}: it has no {' and no '.join(sorted(missing))}"
        )
    saved = {**checkpoint["config"], "output_dir": args.output_dir}
    if not torch.cuda.is_available():
        saved["device"] = "cpu"
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in sorted(saved.keys() - RESUME_MAY_CHANGE):
        if getattr(args, name) != saved[name]:
            raise ValueError(
                f"--{name} {getattr(args, name)}: {path} was run with {saved[name]}, "
                f"expected the same, or another --output_dir for another run"
                f"{hint_at_weights(path, model_class)}"
            )
    if args.data_dir == saved["data_dir"]:
        refuse_moved_data(args.data_dir, path)
    print(f"Resuming {path} after epoch {checkpoint['epoch']}")
    return args, checkpoint


def hint_at_weights(last_path, model_class):
    """Return how another run of teacher.py can start from a run's best weights."""
    if model_class is not I3DTeacher:
        return ""
    best_path = last_path.with_name(BEST_CHECKPOINT["teacher"])
    return (
        f"; one that starts from its weights: python teacher.py "
        f"--pretrained_weights {best_path} --output_dir DIR"
    )


def check_features(sentences, feature_dim):
    """Read each sentence's features once, so that errors come before any result."""
    for sentence in sentences:
        read_features(sentence.features, feature_dim)


def sentences_of_files(files, feature_dim):
    """Return feature files as a list of Sentence without glosses, after a check."""
    sentences = [Sentence(file, "", (), file) for file in files]
    check_features(sentences, feature_dim)
    return sentences


def adapt_to_signer(model, files, config):
    """Take BatchNorm's statistics from recordings of a signer, which need no glosses.

    A BatchNorm that was frozen in the whole training, so that it has counted no batch,
    keeps its statistics: they come with its weights, and the layers behind it have
    learned from what it makes of the features.

    Args:
        model: the network, on the config's device.
        files: of features [T, D].
        config: a TrainingConfig.

    Raises:
        ValueError: files that are missing, broken or do not fit the network, or
            several processes.
    """
    if process_count() > 1:
        raise ValueError("--adapt_to runs in one process, expected no torchrun")
    sentences = sentences_of_files(files, len(model.feature_mean))
    norms = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
    frozen = [norm for norm in norms if norm.num_batches_tracked == 0]
    for norm in frozen:
        norm.requires_grad_(False)
    # Shuffled, because a batch of one gloss varies less than all of them.
    loader = make_loader(sentences, [BLANK], config, shuffle=True)
    adapt.estimate_batchnorm(
        model, ((batch.to(config.device).features, batch.lengths) for batch in loader)
    )
    print(
        f"BatchNorm's statistics in {len(norms) - len(frozen)} of {len(norms)} layers "
        f"are those of {len(sentences)} recordings"
    )


def predict_files(path, model_class, files, config, beam_width, adapt_to=None):
    """Print the glosses that a checkpoint recognises in feature files.

    Args:
        path: of the checkpoint.
        model_class: of its model.
        files: of features [T, D].
        config: a TrainingConfig.
        beam_width: prefixes kept; 1 is greedy decoding.
        adapt_to: files for adapt_to_signer, None for none.

    Returns:
        {"checkpoint": path, "hypotheses": file -> tuple of glosses}.

    Raises:
        ValueError: files that are missing, broken or do not fit each other.
    """
    model, checkpoint = load_model(path, model_class)
    sentences = sentences_of_files(files, len(model.feature_mean))
    model.to(config.device)
    if adapt_to is not None:
        adapt_to_signer(model, adapt_to, config)
    vocabulary = checkpoint["vocabulary"]
    evaluation = recognise(model, sentences, vocabulary, config, beam_width)
    hypotheses = dict(zip(files, evaluation.hypotheses, strict=True))
    for file, glosses in hypotheses.items():
        print(f"{file}: {' '.join(glosses)}")
    return {"checkpoint": str(path), "hypotheses": hypotheses}


def evaluate_checkpoint(
    path, model_class, split, config, beam_width, adapt_to=None, ctm=None
):
    """Print what a checkpoint recognises of a split, its errors, and a diagnosis.

    Args:
        path: of the checkpoint.
        model_class: of its model.
        split: train, dev or test.
        config: a TrainingConfig; data_dir None stands for the checkpoint's.
        beam_width: prefixes kept; 1 is greedy decoding.
        adapt_to: files for adapt_to_signer, None for none.
        ctm: a file for the hypotheses, None for none.

    Returns:
        A dict of checkpoint, split, hypotheses, rates and counts.

    Raises:
        ValueError: files that are missing, broken or do not fit each other.
    """
    if ctm is not None:
        if Path(ctm).is_dir():
            raise ValueError(f"--ctm {ctm}: a folder, expected the name of a file")
        refuse_unwritable(Path(ctm).absolute().parent, f"--ctm {ctm}")
    model, checkpoint = load_model(path, model_class)
    config = with_data_of(config, checkpoint, path)
    vocabulary = checkpoint["vocabulary"]
    sentences = read_split(config.data_dir, split, config.clean_annotations)
    refuse_foreign_glosses(sentences, vocabulary, f"{config.data_dir} {split}", path)
    check_features(sentences, len(model.feature_mean))
    model.to(config.device)
    if adapt_to is not None:
        adapt_to_signer(model, adapt_to, config)
    evaluation = recognise(model, sentences, vocabulary, config, beam_width)
    ids = [sentence.id for sentence in sentences]
    hypotheses = dict(zip(ids, evaluation.hypotheses, strict=True))
    for sentence in sentences:
        print(sentence.id)
        print(f"  ref  {' '.join(sentence.glosses)}")
        print(f"  hyp  {' '.join(hypotheses[sentence.id])}")
    print(f"{path} on {split}: {evaluation.errors}")
    if ctm is not None:
        adapt.write_text(wer.ctm_text(ids, evaluation.hypotheses), ctm)
    print_diagnosis("Diagnosis:", decoding_diagnosis(evaluation))
    return {
        "checkpoint": str(path),
        "split": split,
        "hypotheses": hypotheses,
        "wer": evaluation.errors.wer,
        "ser": evaluation.errors.ser,
        **dataclasses.asdict(evaluation.errors),
    }


def with_data_of(config, checkpoint, path):
    """Return the config with the checkpoint's corpus where it names none itself.

    Raises:
        ValueError: the checkpoint's corpus has moved.
    """
    saved = checkpoint["config"]
    data_dir = config.data_dir
    if data_dir is None:
        data_dir = saved.get("data_dir")
        refuse_moved_data(data_dir, path)
    clean = config.clean_annotations or saved.get("clean_annotations")
    return dataclasses.replace(config, data_dir=data_dir, clean_annotations=clean)


def refuse_moved_data(data_dir, path):
    """Raise ValueError if the corpus that a checkpoint was trained on is not there."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(
            f"{data_dir}: no such folder, though {path} was trained on it; name where "
            f"it is now by --data_dir"
        )


def refuse_foreign_glosses(sentences, vocabulary, name, path):
    """Print the glosses that a vocabulary lacks; ValueError if it has none of them."""
    glosses = glosses_of(sentences)
    unknown = sorted(glosses - set(vocabulary))
    if len(unknown) == len(glosses):
        raise ValueError(f"{name}: no such split, or no gloss of it known to {path}")
    if unknown:
        print(f"Not in the vocabulary of {path}, certain errors: {' '.join(unknown)}")


def load_weights(model, data, config):
    """Fill a model from config.pretrained_weights.

    Returns:
        The names of the modules that nothing filled.
    """
    if config.pretrained_weights is None:
        print("Weights: random, so every layer is fresh and trains in every epoch")
        return freeze.LAYERS
    if config.pretrained_weights == adapt.KINETICS:
        in_first_process(adapt.fetch_kinetics)
    report = adapt.load_pretrained(
        model, config.pretrained_weights, config.adapt_method, data.vocabulary
    )
    print(report)
    if config.adapt_method == "temporal_max":
        print("BatchNorm statistics are re-estimated on the training features")
        sentences = data.splits["train"]
        loader = make_loader(sentences, data.vocabulary, config, shuffle=True)
        adapt.estimate_batchnorm(
            model, ((batch.features, batch.lengths) for batch in loader)
        )
    return report.fresh_modules


def validate_data(config):
    """Read and describe the corpus of config.data_dir; return what was found, a dict.

    Raises:
        ValueError: errors in its files, or all train sentences are too short.
        OSError: most of them are too short, or no gloss of dev is in train.
    """
    data = read_data(config.data_dir, clean=config.clean_annotations)
    facts = describe_data(data)
    config = with_stride(config, data)
    print(stride_line(config, data))
    usable = len(alignable(data, config.temporal_stride))
    count = len(data.splits["train"])
    known = facts["dev"]["glosses"] - len(facts["dev"]["unknown"])
    if 2 * usable < count or known == 0:
        raise OSError(
            f"{data.name}: {usable} of {count} train sentences have enough frames, "
            f"{known} of dev's glosses are in train: expected at least half, and any"
        )
    return {"data_dir": data.name, "usable": usable, **facts}


def train_teacher(config, resumed=None):
    """Train a teacher from flags to its test WER.

    Args:
        config: a Config.
        resumed: the content of the last.pth to continue from.

    Returns:
        The best epoch's row with the checkpoint, test errors and seconds.
    """
    started = time.monotonic()
    refuse_unwritable(config.output_dir, f"--output_dir {config.output_dir}")
    make_schedule(config)  # refuses flags that do not go together before data are read
    data = read_data(config.data_dir, clean=config.clean_annotations)
    describe_data(data)
    config = with_stride(config, data)
    print(stride_line(config, data))
    model = make_model(I3DTeacher, data, config)
    if resumed is None:
        fresh_modules = load_weights(model, data, config)
    else:
        fresh_modules = resumed["always_trainable"]
    schedule = make_schedule(config, fresh_modules)
    model.to(config.device)
    with lock(config.output_dir):
        best = train(model, data, schedule, config, resumed=resumed)
        result = in_first_process(report_best, best, data, config, I3DTeacher)
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def report_best(best, data, config, model_class):
    """Print the best epoch and, where there is a test split, its WER there.

    Args:
        best: its row of the log.
        data: a Data.
        config: a TrainingConfig.
        model_class: of the model.

    Returns:
        The best epoch's row with the checkpoint and what was found on test.
    """
    path = Path(config.output_dir, BEST_CHECKPOINT[model_class.kind])
    print(f"Best dev WER {best['wer']:.2%} at epoch {best['epoch']}: {path}")
    result = {**best, "checkpoint": str(path), "dev_wer": best["wer"]}
    if "test" not in data.splits or config.overfit is not None:
        return result
    model, _ = load_model(path, model_class)
    model.to(config.device)
    errors = recognise(model, data.splits["test"], data.vocabulary, config).errors
    print(f"Test {errors}")
    counts = dataclasses.asdict(errors)
    with open(Path(config.output_dir, LOG), "a") as log:
        row = {"split": "test", "wer": errors.wer, **counts}
        log.write(json.dumps(row) + "\n")
    return {**result, "test_wer": errors.wer, "test": counts}


def run_checkpoint(args, model_class, config):
    """Do what --evaluate and --predict ask for; return what --json prints."""
    if args.predict is None:
        return in_first_process(
            evaluate_checkpoint,
            args.evaluate,
            model_class,
            args.split,
            config,
            args.beam_width,
            args.adapt_to,
            args.ctm,
        )
    path = args.evaluate
    if path is None:
        path = Path(args.output_dir, BEST_CHECKPOINT[model_class.kind])
    return in_first_process(
        predict_files,
        path,
        model_class,
        args.predict,
        config,
        args.beam_width,
        args.adapt_to,
    )


def run_teacher(args, resumed):
    """Do what the flags of teacher.py ask for; return what --json prints."""
    config = config_from(args, Config)
    if args.evaluate is not None or args.predict is not None:
        return run_checkpoint(args, I3DTeacher, config)
    if args.validate_data is not None:
        config = dataclasses.replace(config, data_dir=args.validate_data)
        return validate_data(config)
    if config.freeze_backbone and config.freeze_until_layer is not None:
        print(
            f"--freeze_until_layer {config.freeze_until_layer} decides what is frozen, "
            f"not --freeze_backbone, which alone freezes to {freeze.FREEZE_UNTIL}"
        )
    if config.unfreeze_stages != freeze.STAGES and not config.has_stages:
        print(
            f"--unfreeze_stages {config.unfreeze_stages} is not used: without "
            f"--progressive_unfreeze or --unfreeze_by nothing is released in stages"
        )
    return train_teacher(config, resumed)


def main(argv=None):
    """Run the program; argv as in sys.argv[1:]."""
    run_program(make_parser(), argv, I3DTeacher, run_teacher)


if __name__ == "__main__":
    if sys.stdout is not None:  # glosses that a terminal cannot print are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
