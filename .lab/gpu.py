"""What there is to find out on a machine with a GPU, in one run.

    $ .lab/gpu.sh OUT                       # at most 4 minutes
    $ .lab/gpu.sh OUT --limit 480           # at most 8: nothing is cut but what hangs
    $ .lab/gpu.sh OUT --parts machine gather
    $ .lab/gpu.sh OUT --device cpu --limit 600 --patience 4 --batches 2 --steps 1 \
          --repeats 1 --epochs 4 --epoch_steps 3     # some 5 minutes on two cores

It needs python3 with torch and numpy, and no network. The parts run one after another,
each as a process with a limit in seconds, the most important ones first. What they find
is written as it comes: OUT/gpu.txt for people, OUT/gpu.json for programs; a second run
adds parts, and replaces those that it repeats. A part that fails or reaches its limit
leaves what it has found, and the next one begins.

    machine   versions, card, processor
    tests     the suite's tests that take a device
    steps     benchmark.py at Phoenix-2014's size; it explains "idle"
    gather    how a convolution over time reads its neighbours, against other ways
    main      the README's first command to its end
    main_cpu  the same on the CPU with few epochs, for the time per epoch
    resume    a killed and resumed run against two that were not
    workers   reading data ahead

Axes: see teacher.py.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import benchmark
import lab
import numpy as np
import torch
from torch.nn import functional as F

import adapt
import freeze
import teacher

MAIN_FLAGS = ["--pretrained_weights", adapt.KINETICS, "--progressive_unfreeze"]
CPU_EPOCHS = 4  # of main_cpu: one for each stage of unfreezing
RESUME_EPOCHS = 3
KILLED_AFTER = "epoch   1  loss"  # begins the line after which the run is killed
WORKERS = (0, 2, 4)
LENGTHS_STD = 0.25  # of the frames per sentence, over their mean, as in Phoenix-2014

# ------------------------------------------------------------ the record


class Record:
    """The part of gpu.json that belongs to a part."""

    def __init__(self, folder, part):
        self.path = Path(folder, "gpu.json")
        self.part = part

    def read(self):
        """Return what all parts have recorded."""
        if not self.path.exists():
            return {}
        return json.loads(self.path.read_text())

    def write(self, content):
        """Write what all parts have recorded."""
        adapt.write_text(json.dumps(content, indent=1) + "\n", self.path)

    def clear(self):
        """Remove what an earlier run of this part has recorded."""
        content = self.read()
        content.pop(self.part, None)
        self.write(content)

    def add(self, **values):
        """Add values, or replace those of the same name."""
        content = self.read()
        content.setdefault(self.part, {}).update(values)
        self.write(content)


def start(arguments, **environment):
    """Start Python in the project's folder; stdout and stderr are one pipe of text."""
    return subprocess.Popen(
        [sys.executable] + [str(argument) for argument in arguments],
        cwd=lab.ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


# ------------------------------------------------------------ machine and tests


def processor():
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def card(device):
    """Return what torch says of a GPU, a dict."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def run_machine(args, record):
    """Note versions, card and processor."""
    facts = {
        "commit": lab.commit() if shutil.which("git") else "",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
    }
    if args.device.startswith("cuda"):
        facts |= card(args.device)
    record.add(**facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    if facts["gpus"] < 2:
        print(
            "Not run, it needs two GPUs: several processes by torchrun (nccl, "
            "DistributedDataParallel)"
        )


def run_tests(args, record):
    """Run the tests that take a device."""
    kind, _, index = args.device.partition(":")
    gpu = ""
    if kind == "cuda":
        gpu = index if index else "0"
    arguments = ["-m", "unittest", "-v", "test_all.Device"]
    with start(arguments, TEST_GPU=gpu) as process:
        lines = print_lines(process.stdout)
    record.add(status=process.returncode, output=lines)
    sys.exit(process.returncode)


def print_lines(stream):
    """Print a stream's lines as they come; return them."""
    lines = []
    for line in stream:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    return lines


# ------------------------------------------------------------ steps and workers


def phoenix_sizes(args, batch):
    """Return the Sizes of a batch."""
    return benchmark.Sizes(batch, args.frames, args.features, args.classes)


def make_timing(args, precision):
    """Return the benchmark.Timing that the flags ask for."""
    return benchmark.Timing(
        args.device, torch.get_num_threads(), args.steps, args.repeats, precision
    )


def run_steps(args, record):
    """Time steps of teacher and student at every batch size and precision."""
    teacher.allow_tf32(args.device)
    rows = []
    for batch in args.batches:
        sizes = phoenix_sizes(args, batch)
        for precision in teacher.PRECISIONS:
            timing = make_timing(args, precision)
            benchmark.print_head(sizes, timing, sys.stdout)
            for kind in ("teacher", "student"):
                row = benchmark.measure(sizes, timing, kind=kind)
                benchmark.print_row(kind, row, sys.stdout)
                key = {"kind": kind, "precision": precision, "batch": batch}
                rows.append(key | row)
                record.add(rows=rows)


def run_workers(args, record):
    """Time epochs that read and augment files, with and without workers."""
    teacher.allow_tf32(args.device)
    sizes = phoenix_sizes(args, args.batches[0])
    rows = {}
    for count in WORKERS:
        rows |= benchmark.measure_waiting(
            sizes, args.device, (count,), args.epoch_steps, pause=0
        )
        print(
            f"--num_workers {count}: reading and augmenting "
            f"{rows[count]['read_ms_per_batch']:.1f} ms per batch; an epoch takes "
            f"{rows[count]['waiting']:.2f} of its time without waiting for data"
        )
        record.add(batch=sizes.batch, rows=rows)


# ------------------------------------------------------------ the main command


def run_main(args, record):
    """Run the README's first command on the device."""
    time_program(args.device, args.epochs, record)


def run_main_cpu(args, record):
    """Run the first command with few epochs on all CPU threads."""
    if args.device == "cpu":
        print("Not run: with --device cpu this is what main measures")
        return
    time_program("cpu", min(CPU_EPOCHS, args.epochs), record)


def time_program(device, epochs, record):
    """Train by teacher.py; note seconds, seconds per epoch, and what it found.

    An epoch's time has its evaluation and its checkpoints in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--device", device, "--epochs", epochs, "--output_dir", folder]
        begin = time.perf_counter()
        first_epoch = None
        done = 0
        result = None
        with start(["teacher.py", "--json"] + MAIN_FLAGS + flags) as process:
            for line in process.stdout:
                now = time.perf_counter()
                if line.startswith("epoch") and first_epoch is None:
                    first_epoch = now
                if line.startswith("epoch") and "  loss " in line:
                    done += 1
                    seconds_per_epoch = (now - first_epoch) / done
                    record.add(
                        device=device,
                        epochs=done,
                        start_seconds=first_epoch - begin,
                        seconds_per_epoch=seconds_per_epoch,
                    )
                if line.startswith("{"):
                    result = json.loads(line)
                else:
                    print(line, end="", flush=True)
    seconds = time.perf_counter() - begin
    if process.returncode != 0:
        sys.exit(f"teacher.py ended with status {process.returncode}")
    record.add(seconds=seconds, result=result)
    print(
        f"{device}: {seconds:.1f} s, {seconds_per_epoch:.2f} s per epoch, "
        f"test WER {result['test_wer']:.2%}"
    )


# ------------------------------------------------------------ a killed run


def start_run(args, folder, *more_flags):
    """Start a short run of teacher.py without workers."""
    flags = ["--output_dir", folder, "--device", args.device, "--num_workers", 0]
    # Three runs at once: on the CPU one thread each.
    environment = {"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {}
    return start(["teacher.py"] + flags + list(more_flags), **environment)


def kill_after_line(process, beginning):
    """Kill a process with SIGKILL after it has printed a line that begins so."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    if process.wait() != -signal.SIGKILL:
        sys.exit("".join(lines))


def finish(process):
    """Wait for a process; exit with what it printed if it failed."""
    output, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(output)


def weights_of(folder):
    """Return all floating-point weights of a run's last.pth, one after the other."""
    path = Path(folder, teacher.LAST_CHECKPOINT)
    state = torch.load(path, weights_only=True, map_location="cpu")["model_state_dict"]
    weights = [v.flatten() for v in state.values() if v.is_floating_point()]
    return torch.cat(weights)


def relative_difference(found, expected):
    """Return the norm of a difference over that of the expected value."""
    return float((found - expected).norm() / expected.norm())


def run_resume(args, record):
    """Compare a killed and resumed run's weights with those of two whole ones."""
    with tempfile.TemporaryDirectory() as parent:
        folders = {name: Path(parent, name) for name in ("whole", "again", "killed")}
        runs = {}
        try:
            for name, folder in folders.items():
                runs[name] = start_run(args, folder, "--epochs", RESUME_EPOCHS)
            kill_after_line(runs["killed"], KILLED_AFTER)
            runs["killed"] = start_run(args, folders["killed"], "--resume")
            for run in runs.values():
                finish(run)
        finally:  # where one failed, the others must not run beside the next part
            for run in runs.values():
                run.kill()
                run.wait()
        whole = weights_of(folders["whole"])
        differences = {
            "again": relative_difference(weights_of(folders["again"]), whole),
            "resumed": relative_difference(weights_of(folders["killed"]), whole),
        }
    record.add(epochs=RESUME_EPOCHS, relative_differences=differences)
    print(
        f"Relative difference of the weights after {RESUME_EPOCHS} epochs, from those "
        f"of one run: an equal run {differences['again']:.1e}, a run killed after "
        f"epoch 1 and resumed {differences['resumed']:.1e} (0: bit for bit)"
    )


# ------------------------------------------------------------ ways to gather
#
# A unit reads each row's neighbours. These are other ways than teacher.gather_rows.


def gather_by_indexing(rows, index):
    """Do what teacher.gather_rows does by padded[index]."""
    return F.pad(rows, (0, 0, 0, 1))[index]


def gather_by_embedding(rows, index):
    """Do what teacher.gather_rows does by F.embedding."""
    return F.embedding(index, F.pad(rows, (0, 0, 0, 1)), padding_idx=len(rows))


class Window(NamedTuple):
    """What a convolution over a padded batch needs in place of an index."""

    shape: tuple  # B, T of the padded batch
    slots: torch.Tensor  # [N] each row's place among the B * T frames
    output_slots: torch.Tensor  # [N'] of the output's rows among its B * T' frames
    padding: tuple  # frames before and after
    stride: int
    dilation: int
    kernel: int


def find_slots(lengths, device):
    """Return each row's place in a flattened padded batch: [B] -> [N]."""
    mask = teacher.frame_mask(lengths, int(lengths.max()))  # [B, T]
    return mask.flatten().nonzero().flatten().to(device, non_blocking=True)


def find_window(lengths, kernel, left, stride=1, dilation=1, device="cpu"):
    """Return a Window and lengths', in place of teacher.neighbours."""
    output_lengths = -(-lengths // stride)
    frames = int(lengths.max())
    needed = stride * (-(-frames // stride) - 1) + dilation * (kernel - 1) + 1
    padding = (dilation * left, needed - frames - dilation * left)
    window = Window(
        (len(lengths), frames),
        find_slots(lengths, device),
        find_slots(output_lengths, device),
        padding,
        stride,
        dilation,
        kernel,
    )
    return window, output_lengths


def to_columns(rows, window):
    """Return rows as a padded batch: [N, C] -> [B, C, T with padding]."""
    batch, frames = window.shape
    padded = rows.new_zeros(batch * frames, rows.shape[1])
    padded = padded.index_copy(0, window.slots, rows)
    columns = padded.view(batch, frames, -1).transpose(1, 2)  # [B, C, T]
    return F.pad(columns, window.padding)


def to_rows(columns, window):
    """Return the rows of a padded batch: [B, C, T'] -> [N', C]."""
    frames = columns.transpose(1, 2).flatten(0, 1)  # [B * T', C]
    return frames.index_select(0, window.output_slots)


def max_pool_columns(rows, window):
    """Do what teacher.max_pool does on a padded batch."""
    columns = to_columns(rows, window)
    pooled = F.max_pool1d(
        columns, window.kernel, window.stride, dilation=window.dilation
    )
    return to_rows(pooled, window)


def forward_columns(unit, rows, window=None):
    """Do what teacher.Unit.forward does, by conv1d on a padded batch."""
    weight = unit.conv.weight
    if window is None:
        rows = F.linear(rows, weight.flatten(1))
    else:
        columns = to_columns(rows, window)
        columns = F.conv1d(
            columns, weight, stride=window.stride, dilation=window.dilation
        )
        rows = to_rows(columns, window)
    return F.relu(unit.bn(rows))


# Name -> what it puts in the place of what in teacher.py.
WAYS = {
    "index_select": {},  # as it is
    "padded[index]": {"gather_rows": gather_by_indexing},
    "embedding": {"gather_rows": gather_by_embedding},
    "conv1d": {
        "neighbours": find_window,
        "max_pool": max_pool_columns,
        "Unit.forward": forward_columns,
    },
}

# Units of the backbone: name, their kernel, stride and dilation, and frames per row.
UNITS = (
    ("stem.conv_1a", 7, 2, 1, 1),
    ("stem.conv_2c", 3, 1, 1, 2),
    ("mixed_3c.b1b", 3, 1, 1, 2),
    ("mixed_4f.b1b", 3, 1, 1, 4),
    ("mixed_5c.b1b", 3, 1, 2, 4),
)


@contextlib.contextmanager
def way_of_reading(way):
    """Let teacher.py read neighbours in one of WAYS."""
    with contextlib.ExitStack() as stack:
        for name, replacement in WAYS[way].items():
            target = f"teacher.{name}"
            stack.enter_context(mock.patch(target, replacement))
        yield


def draw_lengths(args, batch):
    """Draw the frames of each sentence, [B], args.frames on average."""
    generator = np.random.default_rng(0)
    drawn = generator.normal(args.frames, LENGTHS_STD * args.frames, batch)
    return torch.from_numpy(drawn.clip(args.frames / 5, 2 * args.frames)).long()


def run_both_passes(forward, parameters, factors, precision):
    """Run a forward and a backward pass; return the output.

    Args:
        forward: () -> tensor.
        parameters: whose gradients are computed.
        factors: of the output's shape; the loss is the sum of their products.
        precision: one of teacher.PRECISIONS.
    """
    with teacher.in_precision(precision, factors.device):
        output = forward()
    torch.autograd.grad((output * factors).sum(), parameters)
    return output


def compare_ways(make_forward, parameters, timing):
    """Time a forward and backward pass in each of WAYS.

    Args:
        make_forward: () -> a function () -> tensor; called anew for each way.
        parameters: whose gradients are computed.
        timing: a benchmark.Timing.

    Returns:
        way -> milliseconds, the GPU's work, relative difference from the first, a dict.
    """
    functions = []
    outputs = []
    for way in WAYS:
        with way_of_reading(way):
            forward = make_forward()
            with torch.no_grad():
                output = forward()
        factors = torch.randn(output.shape, device=output.device)
        outputs.append(output)
        both_passes = functools.partial(
            run_both_passes, forward, parameters, factors, timing.precision
        )
        functions.append(functools.partial(repeat_way, way, both_passes, timing.steps))
    rows = {}
    seconds = benchmark.median_seconds(functions, timing)
    for way, function, output, value in zip(
        WAYS, functions, outputs, seconds, strict=True
    ):
        milliseconds = 1000 * value / timing.steps
        rows[way] = {
            "ms": milliseconds,
            "difference": relative_difference(output, outputs[0]),
            **benchmark.gpu_work(function, timing, milliseconds),
        }
    return rows


def repeat_way(way, function, times):
    """Call a function several times in one of WAYS."""
    with way_of_reading(way):
        benchmark.run_repeatedly(function, times)


def compare_unit(args, model, batch, unit_row, timing):
    """Compare the WAYS on a unit of the model on rows of its usual number."""
    name, kernel, stride, dilation, frames_per_row = unit_row
    unit = model.get_submodule(name)
    lengths = -(-draw_lengths(args, batch) // frames_per_row)
    rows = torch.randn(int(lengths.sum()), unit.conv.in_channels, device=args.device)
    rows = rows.relu().requires_grad_()

    def make_forward():
        left = (kernel - stride) // 2
        window, _ = teacher.neighbours(
            lengths, kernel, left, stride, dilation, args.device
        )
        return functools.partial(unit, rows, window)

    return compare_ways(make_forward, [rows, unit.conv.weight], timing)


def compare_backbone(args, model, batch, timing):
    """Compare the WAYS on the whole backbone."""
    lengths = draw_lengths(args, batch)
    rows = torch.randn(int(lengths.sum()), args.features, device=args.device)

    def forward():
        frames, _ = model.i3d(rows, lengths)
        return frames

    def make_forward():
        return forward

    backbone = [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("stem", "mixed"))
    ]
    return compare_ways(make_forward, backbone, timing)


def print_ways(name, timing, batch, rows):
    """Print a line of the table: milliseconds of each of WAYS."""
    text = f"{name:<14}{batch:>4}  {timing.precision:<9}"
    for row in rows.values():
        text += f"{row['ms']:>16.3f}"
        if row["busy_ms"] is not None:
            text += f" / {row['busy_ms']:.3f}"
    print(text, flush=True)


def run_gather(args, record):
    """Compare the WAYS: units, then the backbone, at the smallest and largest batch."""
    teacher.allow_tf32(args.device)
    model = benchmark.make_teacher(phoenix_sizes(args, 1)).to(args.device)
    rows = []
    print("Milliseconds of a forward and backward pass / in which the GPU works")
    print(f"{'':<14}{'B':>4}  {'precision':<9}" + "".join(f"{w:>16}" for w in WAYS))
    for batch in sorted({min(args.batches), max(args.batches)}):
        for precision in teacher.PRECISIONS:
            timing = make_timing(args, precision)
            key = {"batch": batch, "precision": precision}
            for unit_row in UNITS:
                name = unit_row[0]
                found = compare_unit(args, model, batch, unit_row, timing)
                print_ways(name, timing, batch, found)
                rows.append({"name": name, **key, "ways": found})
                record.add(rows=rows)
            found = compare_backbone(args, model, batch, timing)
            print_ways("backbone", timing, batch, found)
            rows.append({"name": "backbone", **key, "ways": found})
            record.add(rows=rows)


# ------------------------------------------------------------ the program

PARTS = {  # the most important ones first: function, and its limit in seconds
    "machine": (run_machine, 40),
    "tests": (run_tests, 45),
    "steps": (run_steps, 90),
    "gather": (run_gather, 50),
    "main": (run_main, 120),
    "main_cpu": (run_main_cpu, 45),
    "resume": (run_resume, 50),
    "workers": (run_workers, 35),
}


def make_parser():
    """Return the parser of the script's flags."""
    parser = freeze.OneLineParser(
        "gpu.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "out", type=os.path.abspath, help="folder for gpu.json, gpu.txt"
    )
    parser.add_argument("--device", choices=teacher.device_names(), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    count = teacher.number(int, 1, 10**6)
    parser.add_argument("--limit", type=count, default=240, help="seconds of all parts")
    parser.add_argument(
        "--patience",
        type=teacher.number(float, 0.1, 100),
        default=1.0,
        help="factor of each part's own limit",
    )
    parser.add_argument("--batches", type=count, nargs="+", default=[8, 32, 64])
    parser.add_argument("--frames", type=count, default=140, help="T")
    parser.add_argument("--features", type=count, default=1662, help="D")
    parser.add_argument("--classes", type=count, default=1232, help="V")
    parser.add_argument("--steps", type=count, default=10, help="in a measured time")
    parser.add_argument(
        "--repeats", type=count, default=2, help="measured times; the median counts"
    )
    parser.add_argument("--epochs", type=count, default=50, help="of main")
    parser.add_argument("--epoch_steps", type=count, default=20, help="of workers")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def run_part(name, seconds, out, log):
    """Run a part as a process of its own; what it prints goes to stdout and the log.

    Args:
        name: of the part.
        seconds: its limit.
        out: the folder of gpu.json.
        log: an open file.
    """
    command = ["timeout", "--kill-after", "5", str(seconds), sys.executable, __file__]
    command += sys.argv[1:] + ["--part", name]
    say(f"\n== {name} (at most {seconds} s)", log)
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process:
        try:
            for line in process.stdout:
                say(line.rstrip("\n"), log)
        except KeyboardInterrupt:
            process.terminate()  # timeout tells the part
            sys.exit("gpu.py: interrupted")
    taken = time.perf_counter() - begin
    endings = {
        0: "done",
        124: "cut at its limit",
        -signal.SIGKILL: "killed, after its limit or for want of memory",
    }
    status = process.returncode
    ending = endings.get(status, f"failed, status {status}")
    say(f"== {name}: {ending}, {taken:.1f} s", log)
    Record(out, "parts").add(**{name: {"ending": ending, "seconds": taken}})


def say(line, log):
    """Print a line and write it to an open file at once."""
    print(line, flush=True)
    print(line, file=log, flush=True)


def main():
    """Run all parts that are asked for, or, in such a part's process, the part."""
    parser = make_parser()
    args = parser.parse_args()
    if args.device not in teacher.device_names():  # such as the default
        parser.error(
            f"--device {args.device}: torch {torch.__version__} finds no GPU, expected "
            f"one; --device cpu tries the script"
        )
    if args.part is not None:
        run, _ = PARTS[args.part]
        record = Record(args.out, args.part)
        record.clear()
        # An exit, not a sudden end, removes the part's temporary folders.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        run(args, record)
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.limit
    with open(Path(args.out, "gpu.txt"), "a", encoding="utf-8") as log:
        for name in args.parts:
            left = int(deadline - time.perf_counter())
            if left <= 0:
                say(f"\n== {name}: not begun, the {args.limit} s are over", log)
                continue
            _, seconds = PARTS[name]
            run_part(name, min(round(args.patience * seconds), left), args.out, log)


if __name__ == "__main__":
    main()
