r"""Feature files that people have, in the project's layout.

    $ python .lab/import_features.py pickle data/phoenix14t.pami0 corpora/phoenix14t
    $ python .lab/import_features.py mp_data MP_Data corpora/signs
    $ python .lab/import_features.py csv recordings.csv corpora/mine
    $ python teacher.py --validate_data corpora/mine

OUT, a new folder, gets {train,dev,test}.corpus.csv and features/SPLIT/ID.npy, [T, D]
float32. What SOURCE is in each FORMAT:

pickle
    The gzipped pickles of neccam/slt, FangyunWei/SLRT and MSKA: SOURCE.train,
    SOURCE.dev and SOURCE.test, or a folder with one of each. They hold a list, or a
    dict, of dicts with name, gloss, features as "sign" or "keypoint", and perhaps
    signer. If a name occurs twice with equal glosses, its features are concatenated
    along axis 1, as slt does. Keypoints [T, 133, 3] become [T, 399]: x, y and
    confidence of the first point, of the second, and so on. Reading a file takes twice
    its features' size of memory. Nothing in it runs: it may hold tensors, arrays,
    numbers and text, and is refused where it asks for anything else.
mp_data
    A folder with SIGN/TAKE/FRAME.npy, frames numbered without a gap. A take is a
    sentence of one gloss, the sign's name with - for whitespace; its id is SIGN_TAKE.
    Of each sign's takes a tenth (at least one) is drawn for dev and a tenth for test;
    a sign of one or two takes is in train only. A signer may be in all splits.
csv
    A .csv file with the columns id and glosses (separated by whitespace), and perhaps
    signer and split, between commas, semicolons or tabs. Beside it, or in a folder
    beside it, lie ID.npy, ID.npz (one array) or ID.pose. A split is train, dev (or val)
    or test; without this column a tenth of the sentences is drawn for dev and a tenth
    for test, whoever signs. A .pose file (needs `pip install pose-format`) becomes
    coordinates and confidence of each point; of several people the first is taken.

Ids: of a name with folders, what follows the folder named as the split counts
(train/ID, and Phoenix-2014's train/ID/1/FRAMES). Other slashes and whitespace become _.
A signer that is not given is "unknown". Translations are not read.

Values are copied as they are, confidences too. A value is missing where it is NaN, or
where a .pose file's point has confidence 0: it becomes the last value before it, else
the first one after it, else 0. Zeros that stand for missing parts, as in MP_Data,
cannot be told from others and stay. A sentence is left out if it has infinity, no
frames, no glosses, another D than the first sentence, or an id that is taken. All that
is left out is listed with its reason.
"""

import argparse
import gzip
import io
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import corpora
import lab  # noqa: F401 (puts the project on the path)
import numpy as np
import torch

import adapt
import teacher
import wer

try:
    from pose_format import Pose
except ImportError:
    Pose = None

SPLITS = ("train", "dev", "test")
OTHER_SPLIT_NAMES = {"val": "dev", "valid": "dev", "validation": "dev"}
HELD_OUT_SHARE = 0.1  # of the sentences that are drawn for dev, and again for test
FEWEST_TO_DIVIDE = 3  # sentences, so that train, dev and test get one
UNKNOWN_SIGNER = "unknown"
FEATURE_KEYS = ("sign", "keypoint")  # in the pickles
FILE_SUFFIXES = (".npy", ".npz", ".pose")
DELIMITERS = (",", ";", "\t")
PICKLE_NAMES = {  # what tensors and arrays need, beside adapt.ArrayUnpickler's names
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",
    "numpy._core.numeric._frombuffer",
    "_codecs.encode",
    "__builtin__.bytes",  # of an empty array
}
EXPECTED_PICKLE = "expected a gzip archive of a pickle with tensors, see --help"


@dataclass
class Item:
    """A sentence as its source has it."""

    place: str  # file and row, for messages
    name: str  # of which the id is made
    signer: str
    glosses: str  # separated by whitespace
    parts: list  # what the format's reader makes arrays of, side by side


# ------------------------------------------------------------ pickles


def load_storage(content):
    """Read a tensor's numbers from bytes, without running anything.

    Plain pickles hold them as torch.save writes them. Their own reader,
    torch.storage._load_from_bytes, would run what is in them.

    Raises:
        pickle.UnpicklingError: bytes that hold more than numbers, or are damaged.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # on broken bytes torch raises whatever it runs into
        raise pickle.UnpicklingError(
            "a tensor in it is damaged or asks for more than numbers"
        ) from error


class TensorUnpickler(adapt.ArrayUnpickler):
    """Reads lists and dicts of tensors and arrays, and refuses everything else."""

    def find_class(self, module, name):
        """Return one of the few functions that are allowed. UnpicklingError."""
        module = module.replace("numpy.core", "numpy._core")  # numpy 2 moved it
        full_name = f"{module}.{name}"
        if full_name == "torch.storage._load_from_bytes":
            return load_storage
        if full_name in PICKLE_NAMES:
            return pickle.Unpickler.find_class(self, module, name)
        return super().find_class(module, name)


def find_pickles(source):
    """Return split -> path of SOURCE.train and so on, or of the files in a folder.

    Raises:
        ValueError: no train file, or several files for a split.
    """
    paths = {}
    for split in SPLITS:
        if source.is_dir():
            found = sorted(source.glob(f"*.{split}"))
        else:
            found = [Path(f"{source}.{split}")]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(
                f"{source}: {names}, expected one .{split} file; name one by its path "
                f"without .{split}"
            )
        if found:
            paths[split] = found[0]
    if "train" not in paths:
        raise ValueError(
            f"{source}: expected {source}.train, or a folder with a .train file"
        )
    return paths


def load_pickle(path):
    """Return the rows of a gzipped pickle, a list of dicts.

    Raises:
        ValueError: a file of another kind, or one that asks for what is not allowed.
    """
    corpora.show_progress(f"reading {path}")
    try:
        with gzip.open(path) as file:
            content = TensorUnpickler(file).load()
    except Exception as error:  # on broken bytes pickle raises whatever it runs into
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        description = adapt.describe_file(path)
        if description not in (None, "a gzip archive"):
            reason = f"it is {description}"
        raise ValueError(f"{path}: {reason}; {EXPECTED_PICKLE}") from error
    rows = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path}: a pickled {type(content).__name__}, expected a list or a dict of "
            f"dicts"
        )
    return rows


def check_row(place, row):
    """Return the key of a row's features. ValueError where a key is missing."""
    present = [key for key in FEATURE_KEYS if key in row]
    texts = [row.get("name"), row.get("gloss")]
    if not present or not all(isinstance(text, str) for text in texts):
        keys = ", ".join(str(key) for key in row)[:100]
        raise ValueError(
            f"{place}: keys {keys}, expected name and gloss as text, and "
            f"{' or '.join(FEATURE_KEYS)}"
        )
    return present[0]


def list_pickles(source, seed):
    """Yield (split, list of Item), one file after the other; nothing is drawn."""
    for split, path in find_pickles(source).items():
        items = {}
        for number, row in enumerate(load_pickle(path)):
            place = f"{path}[{number}]"
            features = row[check_row(place, row)]
            identity = (row["name"], row["gloss"])
            if identity in items:
                items[identity].parts.append(features)
                continue
            signer = str(row.get("signer") or UNKNOWN_SIGNER)
            place = f"{path.name}: {row['name']}"
            items[identity] = Item(place, row["name"], signer, row["gloss"], [features])
        yield split, list(items.values())


def tensor_to_array(tensor):
    """Return a tensor or an array as an array. ValueError for anything else."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().float().numpy()
    if isinstance(tensor, np.ndarray):
        return tensor
    raise ValueError(f"features are a {type(tensor).__name__}, expected a tensor")


# ------------------------------------------------------------ MP_Data


def visible(folder):
    """Return a folder's entries by name, without the system's hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def list_takes(source, seed):
    """Yield (split, list of Item) of SIGN/TAKE/FRAME.npy. ValueError: no takes."""
    if not source.is_dir():
        raise ValueError(f"{source}: no folder, expected one with SIGN/TAKE/FRAME.npy")
    signs = [path for path in visible(source) if path.is_dir()]
    others = [path.name for path in visible(source) if not path.is_dir()]
    if others:
        print(f"{source}: not a sign's folder: {' '.join(others)}")
    items = {split: [] for split in SPLITS}
    for sign in signs:
        gloss = "-".join(wer.normalise(sign.name).split())
        takes = visible(sign)
        if not takes:
            print(f"{sign}: no takes, expected TAKE/FRAME.npy")
        splits = draw_splits(len(takes), f"{seed} {gloss}")
        for take, split in zip(takes, splits, strict=True):
            name = f"{gloss}_{take.name}"
            items[split].append(Item(str(take), name, UNKNOWN_SIGNER, gloss, [take]))
    if not items["train"]:
        raise ValueError(f"{source}: no takes, expected SIGN/TAKE/FRAME.npy")
    yield from items.items()


def draw_splits(count, seed):
    """Draw the splits of some sentences: a list of train, dev and test.

    Args:
        count: the number of sentences.
        seed: a text, so that one sign's draw does not depend on the others'.
    """
    held_out = max(1, round(HELD_OUT_SHARE * count))
    if count < FEWEST_TO_DIVIDE:
        held_out = 0
    splits = ["dev"] * held_out + ["test"] * held_out
    splits += ["train"] * (count - len(splits))
    random.Random(seed).shuffle(splits)
    return splits


def read_take(folder):
    """Read the frames of a take, [T, D].

    Raises:
        ValueError: a frame that is missing, broken or of another D.
    """
    if not folder.is_dir():
        raise ValueError("it is a file, expected a folder of frames")
    paths = visible(folder)
    if not paths:
        raise ValueError("no frames, expected NUMBER.npy")
    numbers = []
    for path in paths:
        if path.suffix != ".npy" or not path.stem.isdecimal():
            raise ValueError(f"{path.name} is in it, expected NUMBER.npy")
        numbers.append(int(path.stem))
    frames = dict(sorted(zip(numbers, paths, strict=True)))
    if len(frames) < len(paths):
        raise ValueError("a frame's number occurs twice")
    for number in range(min(frames), max(frames)):
        if number not in frames:
            raise ValueError(f"frame {number} is missing")
    arrays = [teacher.load_array(path).reshape(-1) for path in frames.values()]
    sizes = sorted({array.size for array in arrays})
    if len(sizes) != 1:
        raise ValueError(f"frames of {sizes} numbers, expected one size")
    return np.stack(arrays)


# ------------------------------------------------------------ a .csv beside files


def find_delimiter(path):
    """Return what separates the columns of a .csv file, judged by its header."""
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8-sig", errors="replace")
    return max(DELIMITERS, key=header.count)


def find_files(folders, name):
    """Return the feature files with this name, in any of the folders."""
    paths = []
    for folder in folders:
        paths += [folder / f"{name}{suffix}" for suffix in FILE_SUFFIXES]
    return [path for path in paths if path.is_file()]


def check_path(place, name):
    """Raise ValueError for an id that leads out of the folders."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{place}: id {name!r}, expected a path without ..")


def split_of(place, row):
    """Return the split that a row names, None where there is no such column."""
    if "split" not in row:
        return None
    name = (row["split"] or "").strip().lower()
    split = OTHER_SPLIT_NAMES.get(name, name)
    if split not in SPLITS:
        raise ValueError(
            f"{place}: split {row['split']!r}, expected one of {', '.join(SPLITS)}"
        )
    return split


def list_rows(source, seed):
    """Yield (split, list of Item) of a .csv file. ValueError: a broken one."""
    if not source.is_file():
        raise ValueError(f"{source}: no such file, expected a .csv file")
    rows = corpora.read_table(source, ("id", "glosses"), find_delimiter(source))
    folders = [source.parent]
    folders += [path for path in visible(source.parent) if path.is_dir()]
    drawn = draw_splits(len(rows), str(seed))
    items = {split: [] for split in SPLITS}
    used = set()
    for (place, row), drawn_split in zip(rows, drawn, strict=True):
        name = wer.normalise(row["id"].strip())
        check_path(place, name)
        paths = find_files(folders, name)
        used.update(paths)
        if Pose is None and any(path.suffix == ".pose" for path in paths):
            raise ValueError(
                f"{paths[0]}: package pose-format is needed: pip install pose-format"
            )
        signer = row.get("signer") or UNKNOWN_SIGNER
        split = split_of(place, row) or drawn_split
        place = f"{place}: {name}"
        items[split].append(Item(place, name, signer, row["glosses"], [paths]))
    report_unused(source, used)
    yield from items.items()


def report_unused(source, used):
    """Print which feature files beside those that are used have no row."""
    unused = []
    for folder in sorted({path.parent for path in used}):
        for path in sorted(folder.iterdir()):
            if path.suffix in FILE_SUFFIXES and path not in used:
                unused.append(str(path.relative_to(source.parent)))
    if unused:
        print(f"{source}: {len(unused)} files without a row: {' '.join(unused[:5])}")


def read_file(paths):
    """Read the one feature file that was found for a row.

    Raises:
        ValueError: none, several, or a broken one.
    """
    if len(paths) != 1:
        names = ", ".join(str(path) for path in paths) or "no file"
        raise ValueError(f"{names}, expected one of ID{', ID'.join(FILE_SUFFIXES)}")
    if paths[0].suffix == ".pose":
        return read_pose(paths[0])
    return teacher.load_array(paths[0])


def read_pose(path):
    """Read a .pose file: coordinates and confidence of each point, [T, D].

    Returns:
        An array with NaN where a point was not found.

    Raises:
        ValueError: a broken file, or one without people.
    """
    try:
        body = Pose.read(path.read_bytes()).body
    except Exception as error:  # on broken bytes it raises whatever it runs into
        reason = str(error).split("\n")[0][:150] or type(error).__name__
        raise ValueError(f"{path.name}: {reason}, expected a .pose file") from error
    frames, people = body.confidence.shape[:2]
    if people == 0:
        raise ValueError(f"{path.name}: nobody is in it, expected a person")
    if people > 1:
        print(f"{path}: {people} people, the first is taken")
    points = np.ma.filled(body.data[:, 0].astype(np.float32), np.nan)  # [T, P, dims]
    confidence = body.confidence[:, 0, :, None]  # [T, P, 1]
    return np.concatenate((points, confidence), axis=2).reshape(frames, -1)


# ------------------------------------------------------------ any format

FORMATS = {  # name -> what lists the sentences, what reads a part of their features
    "pickle": (list_pickles, tensor_to_array),
    "mp_data": (list_takes, read_take),
    "csv": (list_rows, read_file),
}


def make_id(name, split):
    """Return the id of a name: without folders, as a file may be called."""
    parts = name.replace("\\", "/").split("/")
    if split in parts[:-1]:
        parts = parts[parts.index(split) + 1 :]
        if parts[1:2] == ["1"]:  # as in Phoenix-2014's train/ID/1/FRAMES
            parts = parts[:1]
    return "_".join("_".join(parts).split())


def as_matrix(array):
    """Return an array of numbers as [T, D] float32. ValueError for another shape."""
    features = teacher.as_frames(array)
    if features.ndim != 2 or features.size == 0 or features.dtype.kind not in "fiu":
        raise ValueError(
            f"{array.dtype} array of shape {list(array.shape)}, expected numbers [T, D]"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return features.astype(np.float32)


def side_by_side(matrices):
    """Return features [T, D1], [T, D2], ... as one [T, D1 + D2 + ...]."""
    frames = sorted({len(matrix) for matrix in matrices})
    if len(frames) > 1:
        raise ValueError(f"occurs with {frames} frames, expected one number of frames")
    return np.concatenate(matrices, axis=1)


def hold(features):
    """Fill NaN with the last value before it, else the first after it, else 0."""
    found = ~np.isnan(features)  # [T, D]
    first_found = found.argmax(axis=0)  # [D]
    frames = np.arange(len(features))[:, None]
    last_found = np.maximum.accumulate(np.where(found, frames, first_found), axis=0)
    held = np.take_along_axis(features, last_found, axis=0)
    held[np.isnan(held)] = 0
    return held


class Importer:
    """Writes sentences, and keeps account of what is left out or filled.

    Args:
        out: the corpus's folder.
        read_part: makes an array of a part of an Item.
    """

    def __init__(self, out, read_part):
        self.out = out
        self.read_part = read_part
        self.feature_dim = None  # D of the first sentence
        self.left_out = []  # a line for each sentence
        self.held = 0  # sentences with missing values

    def write(self, split, items):
        """Write a split and print what is left out of it.

        Raises:
            ValueError: no sentence of train can be used.
        """
        self.left_out = []
        self.held = 0
        corpora.write_split(self.out, split, self.recordings(split, items))
        for line in self.left_out:
            print(f"  left out: {line}")
        if self.held:
            print(f"  missing values in {self.held} sentences, see --help")
        if split == "train" and len(self.left_out) == len(items):
            reason = f"; {self.left_out[0]}" if items else ""
            raise ValueError(f"{self.out}: no sentence for train{reason}")

    def recordings(self, split, items):
        """Yield the corpora.Recording of each sentence that can be used."""
        places = {}  # of ids
        for number, item in enumerate(items, start=1):
            corpora.show_progress(f"{split}: {number} of {len(items)}")
            try:
                recording = self.recording(split, item)
                if recording.id in places:
                    raise ValueError(
                        f"{item.place}: its id {recording.id} is that of "
                        f"{places[recording.id]} too"
                    )
            except ValueError as error:
                self.left_out.append(str(error))
                continue
            places[recording.id] = item.place
            yield recording
        corpora.show_progress()

    def recording(self, split, item):
        """Return a sentence as it is written. ValueError where it cannot be used."""
        signer = " ".join(item.signer.split())
        for text in (item.name, signer, item.glosses):
            if "|" in text:
                raise ValueError(
                    f"{item.place}: {text!r}, expected no |, which separates columns"
                )
        name = wer.normalise(make_id(item.name, split))
        glosses = wer.normalise(item.glosses)
        annotation = wer.check_annotation(item.place, name, signer, glosses)
        try:
            features = side_by_side([as_matrix(self.read_part(p)) for p in item.parts])
        except ValueError as error:
            raise ValueError(f"{item.place}: {error}") from error
        teacher.check_feature_dim(features, self.feature_dim, item.place)
        if np.isinf(features).any():
            frame = np.isinf(features).any(axis=1).argmax()
            raise ValueError(f"{item.place}: infinity in frame {frame} (from 0)")
        if np.isnan(features).any():
            self.held += 1
            features = hold(features)
        self.feature_dim = features.shape[1]
        return corpora.Recording(
            annotation.id, annotation.signer, annotation.glosses, features
        )


def convert(args):
    """Write the corpus; what was written is removed where that fails."""
    list_items, read_part = FORMATS[args.format]
    corpora.refuse_existing(args.out)
    importer = Importer(args.out, read_part)
    try:
        for split, items in list_items(args.source, args.seed):
            importer.write(split, items)
    except BaseException:  # an interrupt too
        shutil.rmtree(args.out, ignore_errors=True)
        raise


def main(argv=None):
    """Import what the command line names; argv as in sys.argv[1:]."""
    parser = adapt.OneLineParser(
        "import_features.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT")
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0, help="of splits that are drawn")
    corpora.run(parser, convert, argv)


if __name__ == "__main__":
    main()
