"""Time and memory of a step, beside the matrix products that it consists of.

    $ python .lab/benchmark.py                             # B 8, T 80, D 8, one thread
    $ python .lab/benchmark.py --frames 140 --features 1662 --growth
    $ python .lab/benchmark.py --device cuda --threads 8 --json

A step is one of teacher.train_one_epoch: loss, backward pass, clipping, AdamW. The
floor is the bare matrix products of the same step (each convolution, linear layer and
LSTM, forward and, where something trains, backward; the student's depthwise
convolutions are left out), timed in turn with it. Times are medians over --repeats of
the mean of --steps: of CPU time on one CPU thread, else of wall time. The peak memory
is a GPU's in training, on the CPU the process's so far, with what the floor needs.

"idle" is the share of a training step in which the GPU has nothing to do, because the
host has not yet given it the next kernel: 1 - busy / step. "busy" is the time that
kernels and copies cover in torch.profiler's trace, per step; "step" is the wall time
without the profiler, which slows down the host.

"waiting" is the time of an epoch over its time without what it waits for its loader,
the first batch included. The reader sleeps --slow times as long per batch as a step
takes; there are 0 or --num_workers workers.

Axes: B sentences of a batch, T frames, D features, V classes.
"""

import argparse
import dataclasses
import functools
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lab  # noqa: F401 (puts the project on the path)
import numpy as np
import torch
from torch import nn

import distill
import freeze
import teacher

GROWTH = {  # sizes that are changed one at a time
    "frames": (40, 80, 160, 320),
    "features": (8, 170, 512, 1662),
    "classes": (21, 105, 410, 1232),
    "batch": (4, 8, 16, 32),
}
TRAINED = {
    "all layers": freeze.LAYERS,
    "frozen to mixed_4f": freeze.LAYERS[8:],
    "frozen to mixed_5c": freeze.LAYERS[10:],
}
LEARNING_RATE = 1e-5
GLOSSES = 8  # per sentence, at most
WAITING_EPOCHS = 3  # of which the median is taken


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch and of the networks."""

    batch: int = 8  # B
    frames: int = 80  # T
    features: int = 8  # D
    classes: int = 105  # V
    stride: int = 4  # frames per output frame


@dataclass(frozen=True)
class Timing:
    """How times are taken."""

    device: str
    threads: int
    steps: int = 5  # per time
    repeats: int = 5  # of which the median is taken
    precision: str = teacher.PRECISION


class Task(NamedTuple):
    """What a training step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: teacher.Batch
    loss_function: object  # (model, batch) -> scalar
    networks: list  # that a step runs: the model, with a student also its teacher


def make_batch(sizes, device):
    """Return a Batch of random numbers on the device."""
    glosses = min(GLOSSES, sizes.frames // sizes.stride // 2)
    batch = teacher.Batch(
        torch.randn(sizes.batch, sizes.frames, sizes.features),
        torch.full((sizes.batch,), sizes.frames),
        torch.randint(1, sizes.classes, (sizes.batch * glosses,)),
        torch.full((sizes.batch,), glosses),
    )
    return batch.to(device)


def make_teacher(sizes):
    """Return a teacher with random weights, all heads and a shortcut."""
    return teacher.I3DTeacher(
        sizes.features,
        sizes.classes,
        sizes.stride,
        backbone_ctc=teacher.BACKBONE_CTC,
        shortcut_channels=teacher.SHORTCUT_CHANNELS,
    )


def make_task(sizes, device, kind="teacher"):
    """Return the Task of a teacher or of a student with its teacher."""
    torch.manual_seed(0)
    if kind == "teacher":
        model = make_teacher(sizes).to(device)
        loss_function = teacher.all_heads_loss
        networks = [model]
    else:
        model = distill.Student(sizes.features, sizes.classes, sizes.stride).to(device)
        teacher_model = make_teacher(sizes).to(device).eval().requires_grad_(False)
        config = distill.Config()
        loss_function = functools.partial(
            distill.distillation_loss,
            teacher_model=teacher_model,
            alpha=config.alpha,
            temperature=config.temperature,
        )
        networks = [model, teacher_model]
    optimizer = torch.optim.AdamW(
        freeze.layer_groups(model), lr=LEARNING_RATE, fused=True
    )
    return Task(model, optimizer, make_batch(sizes, device), loss_function, networks)


# ------------------------------------------------------------ the floor


class Product(NamedTuple):
    """Matrix products [m, k] x [k, n] of a layer in a step."""

    m: int
    k: int
    n: int
    count: int  # 1 forward; 2 or 3 with what the backward pass needs


def count_products(weight_trains, input_trains):
    """Return how many products a layer costs: forward, and up to two backward."""
    if not torch.is_grad_enabled():
        return 1
    return 1 + [weight_trains, input_trains].count(True)


def lstm_products(lstm, packed):
    """Return the Products of a bidirectional LSTM over a packed batch, a list."""
    gates = 4 * lstm.hidden_size
    inputs = len(packed.data)
    input_count = count_products(True, packed.data.requires_grad)
    hidden_count = count_products(True, True)
    products = []
    for _direction in range(2):
        products.append(Product(inputs, lstm.input_size, gates, input_count))
        for sentences in packed.batch_sizes.tolist():
            products.append(Product(sentences, lstm.hidden_size, gates, hidden_count))
    return products


def find_products(networks, step):
    """Return the Products of all layers that step() runs, a list."""
    products = []

    def note(module, inputs, output):
        if isinstance(module, nn.LSTM):
            products.extend(lstm_products(module, inputs[0]))
            return
        weight = (
            module.conv.weight if isinstance(module, teacher.Unit) else module.weight
        )
        rows = output.numel() // output.shape[-1]
        count = count_products(weight.requires_grad, inputs[0].requires_grad)
        products.append(Product(rows, weight[0].numel(), len(weight), count))

    hooks = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, (teacher.Unit, nn.Linear, nn.LSTM)):
                hooks.append(module.register_forward_hook(note))
    step()
    for hook in hooks:
        hook.remove()
    return products


class Floor:
    """Bare matrix products on random numbers, all of one precision."""

    def __init__(self, products, timing):
        self.products = products
        self.operands = {}
        dtype = getattr(torch, timing.precision)
        draw = functools.partial(torch.randn, device=timing.device, dtype=dtype)
        for m, k, n, _ in products:
            self.operands[m, k, n] = (draw(m, k), draw(k, n), draw(m, n))

    def run(self):
        """Compute all products once."""
        for m, k, n, count in self.products:
            inputs, weight, gradient = self.operands[m, k, n]
            torch.mm(inputs, weight)
            if count > 1:
                torch.mm(inputs.T, gradient)
            if count > 2:
                torch.mm(gradient, weight.T)


# ------------------------------------------------------------ times


def median_seconds(functions, timing):
    """Return the median seconds of each function, timed in turn, a list."""
    clock = time.perf_counter
    if timing.device == "cpu" and timing.threads == 1:
        clock = time.process_time
    seconds = [[] for _ in functions]
    for _ in range(timing.repeats + 1):  # the first time is for warming up
        for function, values in zip(functions, seconds, strict=True):
            start = clock()
            function()
            if timing.device.startswith("cuda"):
                torch.cuda.synchronize(timing.device)
            values.append(clock() - start)
    return [statistics.median(values[1:]) for values in seconds]


def train_steps(task, loader, precision=teacher.PRECISION):
    """Train on a loader's batches as teacher.py does."""
    rates = [LEARNING_RATE] * len(loader)
    teacher.train_one_epoch(
        task.model, loader, task.optimizer, rates, task.loss_function, precision
    )


@torch.inference_mode()
def evaluate_steps(model, batches, precision=teacher.PRECISION):
    """Run the model on batches in evaluation mode."""
    model.eval()
    for batch in batches:
        with teacher.in_precision(precision, batch.features.device):
            model(batch.features, batch.lengths)


def run_repeatedly(function, times):
    """Call a function several times."""
    for _ in range(times):
        function()


def covered_ms(spans):
    """Return the milliseconds that spans (start, duration), in microseconds, cover."""
    covered = 0.0
    end = -math.inf
    for start, duration in sorted(spans):
        covered += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return covered / 1000


def gpu_spans(trace):
    """Return (start, duration) in microseconds of what a GPU did in a Chrome trace."""
    spans = []
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((event["ts"], event["dur"]))
    return spans


def gpu_work(function, timing, step_ms):
    """Find how long a GPU works for timing.steps steps, which function() runs.

    Args:
        function: without arguments.
        timing: a Timing.
        step_ms: the wall time of a step without the profiler.

    Returns:
        busy_ms and kernels per step, and the idle share, a dict; all are None on the
        CPU, and where the profiler sees no kernels.
    """
    spans = []
    if timing.device.startswith("cuda"):
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            function()
            torch.cuda.synchronize(timing.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            spans = gpu_spans(json.loads(path.read_text(errors="replace")))
    if not spans:
        return {"busy_ms": None, "kernels": None, "idle": None}
    busy_ms = covered_ms(spans) / timing.steps
    return {
        "busy_ms": busy_ms,
        "kernels": len(spans) / timing.steps,
        "idle": 1 - busy_ms / step_ms,
    }


def peak_bytes(device, function):
    """Return the largest memory that was used by the end of a function.

    It is that of the GPU during the function, else that of the process so far.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    function()
    if on_gpu:
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(sizes, timing, trained=freeze.LAYERS, kind="teacher"):
    """Time a training and an evaluation step beside their floors.

    Returns:
        Milliseconds, ratios, frames per second, bytes, idle share and kernels, a dict.
    """
    task = make_task(sizes, timing.device, kind)
    if kind == "teacher":
        freeze.apply_freeze(task.model, trained)
    task.model.train()
    loss_step = functools.partial(task.loss_function, task.model, task.batch)
    train_products = find_products(task.networks, loss_step)
    batches = [task.batch] * timing.steps
    one_evaluation = functools.partial(evaluate_steps, task.model, batches[:1])
    eval_products = find_products([task.model], one_evaluation)
    train = functools.partial(train_steps, task, batches, timing.precision)
    evaluate = functools.partial(evaluate_steps, task.model, batches, timing.precision)
    train_peak = peak_bytes(timing.device, train)  # before the floor needs memory
    train_floor = Floor(train_products, timing)
    eval_floor = Floor(eval_products, timing)
    seconds = median_seconds(
        [
            train,
            functools.partial(run_repeatedly, train_floor.run, timing.steps),
            evaluate,
            functools.partial(run_repeatedly, eval_floor.run, timing.steps),
        ],
        timing,
    )
    train_ms, floor_ms, eval_ms, eval_floor_ms = [
        1000 * value / timing.steps for value in seconds
    ]
    return {
        "train_ms": train_ms,
        "floor_ms": floor_ms,
        "train_ratio": train_ms / floor_ms,
        "eval_ms": eval_ms,
        "eval_ratio": eval_ms / eval_floor_ms,
        "frames_per_second": 1000 * sizes.batch * sizes.frames / train_ms,
        "peak_bytes": train_peak,
        **gpu_work(train, timing, train_ms),
    }


# ------------------------------------------------------------ reading ahead


class TimedLoader:
    """A loader that adds up the seconds in which its user waits for it."""

    def __init__(self, loader):
        self.loader = loader
        self.seconds = 0.0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        start = time.perf_counter()
        for batch in self.loader:
            self.seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def augment_slowly(features, glosses, generator, sizes, pause):
    """Augment a sentence as in training, to the same length, after some seconds.

    The sleep stands for a slow disk or network: the processor is free meanwhile.
    """
    time.sleep(pause)
    mean = np.zeros(sizes.features, np.float32)
    std = np.ones(sizes.features, np.float32)
    features = teacher.augment(
        features,
        glosses,
        generator,
        mean,
        std,
        sizes.stride,
        speed_std=0,
        gain_std=0,
    )
    return features[: sizes.frames]


def make_slow_loader(path, sizes, device, workers, epoch_steps, pause):
    """Return a loader over one file, read again for every sentence.

    Args:
        path: of a feature file.
        sizes: Sizes.
        device: where batches are used.
        workers: processes that read ahead.
        epoch_steps: batches.
        pause: seconds per sentence.
    """
    vocabulary = [teacher.BLANK] + [f"G{k}" for k in range(1, sizes.classes)]
    sentences = [
        teacher.Sentence(f"s{k}", "", ("G1", "G2", "G3"), str(path))
        for k in range(sizes.batch * epoch_steps)
    ]
    config = teacher.Config(batch_size=sizes.batch, num_workers=workers, device=device)
    augment = functools.partial(augment_slowly, sizes=sizes, pause=pause)
    return teacher.make_loader(sentences, vocabulary, config, augment)


def reading_ms(load, epoch_steps):
    """Return milliseconds of reading and augmenting per batch of load(pause=0)."""
    loader = load(pause=0)
    for _ in range(2):  # the first pass starts the workers
        timed = TimedLoader(loader)
        for _batch in timed:
            pass
    return 1000 * timed.seconds / epoch_steps


def waiting_share(task, loader):
    """Return the median time of an epoch over its time without waiting."""
    next(iter(loader))  # starts the workers
    shares = []
    for _ in range(WAITING_EPOCHS):
        timed = TimedLoader(loader)
        start = time.perf_counter()
        train_steps(task, timed)
        seconds = time.perf_counter() - start
        shares.append(seconds / (seconds - timed.seconds))
    return statistics.median(shares)


def measure_waiting(sizes, device, worker_counts, epoch_steps, pause):
    """Return workers -> reading time per batch and waiting, a dict.

    Args:
        sizes: Sizes.
        device: to train on.
        worker_counts: each a number of processes that read ahead.
        epoch_steps: batches per epoch.
        pause: seconds that the slow reader sleeps per sentence.
    """
    task = make_task(sizes, device)
    generator = np.random.default_rng(0)
    shape = (sizes.frames, sizes.features)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npy")
        np.save(path, generator.standard_normal(shape, dtype=np.float32))
        for count in worker_counts:
            load = functools.partial(
                make_slow_loader, path, sizes, device, count, epoch_steps
            )
            result[count] = {
                "read_ms_per_batch": reading_ms(load, epoch_steps),
                "waiting": waiting_share(task, load(pause=pause)),
            }
    return result


# ------------------------------------------------------------ the program


def print_head(sizes, timing, out):
    """Print what is measured and the table's head."""
    print(
        f"{timing.device}, {timing.precision}, {timing.threads} threads, torch "
        f"{torch.__version__}; "
        f"B {sizes.batch}, T {sizes.frames}, D {sizes.features}, V {sizes.classes}, "
        f"stride {sizes.stride}",
        file=out,
    )
    print(
        f"{'':<24}{'train ms':>10}{'floor ms':>10}{'ratio':>8}{'eval ms':>10}"
        f"{'ratio':>8}{'frames/s':>10}{'peak MB':>9}{'idle':>7}{'kernels':>9}",
        file=out,
    )


def print_row(name, row, out):
    """Print a row of the table."""
    idle = "-"
    kernels = "-"
    if row["idle"] is not None:
        idle = f"{row['idle']:.0%}"
        kernels = f"{row['kernels']:.0f}"
    print(
        f"{name:<24}{row['train_ms']:>10.1f}{row['floor_ms']:>10.1f}"
        f"{row['train_ratio']:>8.2f}{row['eval_ms']:>10.1f}{row['eval_ratio']:>8.2f}"
        f"{row['frames_per_second']:>10.0f}{row['peak_bytes'] / 1e6:>9.0f}"
        f"{idle:>7}{kernels:>9}",
        file=out,
        flush=True,
    )


def make_parser():
    """Return the parser of the script's flags."""
    sizes = Sizes()
    timing = Timing(teacher.default_device(), threads=1)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default=timing.device)
    parser.add_argument("--threads", type=int, default=timing.threads)
    parser.add_argument(
        "--precision", choices=teacher.PRECISIONS, default=timing.precision
    )
    for setting in dataclasses.fields(Sizes):
        default = getattr(sizes, setting.name)
        parser.add_argument(f"--{setting.name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=timing.steps, help="per time")
    parser.add_argument("--repeats", type=int, default=timing.repeats, help="of times")
    parser.add_argument("--num_workers", type=int, default=2, help="that read ahead")
    parser.add_argument("--epoch_steps", type=int, default=40, help="for waiting")
    parser.add_argument("--slow", type=float, default=1.0, help="reading over step")
    parser.add_argument(
        "--growth", action="store_true", help="four values of each size"
    )
    parser.add_argument("--no_data", action="store_true", help="leave out reading")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    return parser


def measure_networks(sizes, timing, growth, out):
    """Print and return the rows of teacher and student, name -> dict."""
    rows = {}
    for name, layers in TRAINED.items():
        rows[name] = measure(sizes, timing, layers)
        print_row(name, rows[name], out)
    rows["student"] = measure(sizes, timing, kind="student")
    print_row("student", rows["student"], out)
    if growth:
        for size, values in GROWTH.items():
            for value in values:
                name = f"{size} {value}"
                changed = dataclasses.replace(sizes, **{size: value})
                rows[name] = measure(changed, timing)
                print_row(name, rows[name], out)
    return rows


def main():
    """Measure what the flags ask for."""
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    teacher.allow_tf32(args.device)
    sizes = Sizes(args.batch, args.frames, args.features, args.classes, args.stride)
    timing = Timing(args.device, args.threads, args.steps, args.repeats, args.precision)
    out = sys.stderr if args.json else sys.stdout
    print_head(sizes, timing, out)
    rows = measure_networks(sizes, timing, args.growth, out)
    result = {"rows": rows, "arguments": vars(args)}
    if not args.no_data:
        pause = args.slow * rows["all layers"]["train_ms"] / 1000 / sizes.batch
        result["data"] = measure_waiting(
            sizes, args.device, (0, args.num_workers), args.epoch_steps, pause
        )
        for workers, row in result["data"].items():
            print(
                f"{workers} workers: reading and augmenting "
                f"{row['read_ms_per_batch']:.1f} ms per batch; waiting "
                f"{row['waiting']:.2f}",
                file=out,
            )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
