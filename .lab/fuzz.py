"""Mutated files for every reader of the project: each is read, or refused in one line.

    $ python .lab/fuzz.py 100000

While a reader runs, an audit hook (PEP 578) reports whatever it opens for writing, runs or asks of
the network. Exits with 1 where a file was neither read nor refused by a ValueError that names it.
"""

import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapt
import distill
import teacher
import wer

# What the hostile write into files, besides broken bytes.
TOKENS = (b"../x", b"\0", b"\x1b[31m", b"\xff\xfe", b"\r\n", b"|", b"\n", b" ", b"nan", b"1e999",
          b"cos\nsystem\n(tR", b"\xff\xff\xff\x7f", b"(9999999999, 16)", b"'O'", b"h\0", b".")


def mutated(content, rng):
    """Some bytes, or all after some place, changed, put in, cut out or repeated."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        start, size = int(rng.integers(len(content) + 1)), int(rng.choice((1, 4, 9, 40, 1 << 20)))
        token, old = TOKENS[rng.integers(len(TOKENS))], content[start:start + size]
        content[start:start + size] = (b"", old + old, rng.bytes(len(old)), rng.bytes(4) + old,
                                       token + old, token + old[len(token):])[rng.integers(6)]
    return bytes(content)


def fuzz_targets():
    """(name, content of a good file, what reads it) for every reader of the project."""
    array = np.arange(60, dtype=np.float32).reshape(20, 3)
    weights = {"state_dict": {"module.Mixed_3b.b0.conv3d.weight": torch.randn(2, 3, 1, 1, 1),
                              "logits.conv3d.bias": torch.randn(4), "epoch": torch.tensor(3)}}
    config = {"temporal_stride": 4, "channels": 4, "dropout": 0.3, "teacher_checkpoint": "x"}
    best = {"model": "student", "model_state_dict": distill.Student(3, 4, 4, 4).state_dict(),
            "config": config, "vocabulary": ["<blank>", "A", "B", "C"], "epoch": 0, "wer": 0.5}
    yield "a.csv", b"id|folder|signer|annotation\ns1|f|S|A  B A \ns2|f|S|B\n", wer.read_annotations
    yield "a.stm", b"s1 1 x 0.0 1.79769e+308 A B\ns2 1 x 0 1 <o,f0,m> C\n", wer.read_sentences
    yield "a.ctm", b"s1 1 0.0 0.1 A\ns1 1 0.2 0.1 B 0.9\ns2 1 0 1 C\n", wer.read_sentences
    yield "a.txt", "A B\n\nÄ C\n".encode(), wer.read_sentences
    for name, save in (("a.npy", np.save), ("b.npz", np.savez), ("c.npz", np.savez_compressed)):
        yield name, to_bytes(save, array), teacher.read_features
    for zipped in (True, False):
        save = lambda file, some: torch.save(some, file, _use_new_zipfile_serialization=zipped)
        yield "weights.pth", to_bytes(save, weights), adapt.read_checkpoint
        yield "best.pth", to_bytes(save, best), lambda path: adapt.load_model(path, distill.Student)


def to_bytes(write, content):
    """What write(file, content) writes."""
    write(file := io.BytesIO(), content)
    return file.getvalue()


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    rng, inside, refused, failures = np.random.default_rng(0), [], 0, 0
    targets = [*fuzz_targets()]

    def audit(event, details):
        if inside and (event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes."))
                       or event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)):
            inside.append((event, details))
    sys.addaudithook(audit)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-len(targets), count):  # below 0: as they are
            name, content, read = targets[number % len(targets)]
            path, problem = Path(folder, name), ""
            path.write_bytes(mutated(content, rng) if number >= 0 else content)
            try:
                inside[:] = [path]
                read(path)
            except ValueError as error:
                refused += 1
                if number < 0 or "\n" in str(error) or not str(error).startswith(str(path)):
                    problem = f"refused with {error}"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            events, inside[:] = inside[1:], []
            if events or problem:
                failures += 1
                print(f"{number} {name}: {events} {problem}")
    print(f"{count} mutated files: {refused} refused in one line, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
