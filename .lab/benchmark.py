"""Time and memory of a training and an evaluation step, beside the matrix products they consist of.

    $ python .lab/benchmark.py                                   # B 8, T 80, D 8, one thread
    $ python .lab/benchmark.py --frames 140 --features 1662 --growth
    $ python .lab/benchmark.py --device cuda --threads 8 --json

A step is one of teacher.train_one_epoch: loss, backward pass, clipping, AdamW. The floor is the bare
matrix products of the same step (each convolution, linear layer and LSTM, forward and, where
something trains, backward; the student's depthwise convolutions are left out), timed in turn with
it. Times are medians over --repeats of the mean of --steps: of CPU time on one CPU thread, else of
wall time. "waiting" is the time of an epoch over the time without what it waits for its loader, the
first batch included, with a reader that sleeps --slow times as long per batch as the step takes,
and 0 or --num_workers workers.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import distill
import freeze
import teacher

GROWTH = {"frames": (40, 80, 160, 320), "features": (8, 170, 512, 1662),
          "classes": (21, 105, 410, 1232), "batch": (4, 8, 16, 32)}
TRAINED = {"all layers": freeze.LAYERS, "frozen to mixed_4f": freeze.LAYERS[8:],
           "frozen to mixed_5c": freeze.LAYERS[10:]}


def make(args, kind="teacher"):
    """(model, optimizer, batch, loss, networks that it runs) of random numbers on the device."""
    torch.manual_seed(0)
    if kind == "teacher":
        model = teacher.I3DTeacher(args.features, args.classes, args.stride, backbone_ctc=1.0)
    else:
        model = distill.Student(args.features, args.classes, args.stride)
    model.to(args.device)
    glosses = min(8, args.frames // args.stride // 2)
    batch = teacher.Batch(torch.randn(args.batch, args.frames, args.features),
                          torch.full((args.batch,), args.frames),
                          torch.randint(1, args.classes, (args.batch * glosses,)),
                          torch.full((args.batch,), glosses)).to(args.device)
    loss, networks = teacher.ctc_loss, [model]
    if kind == "student":
        networks.append(taught := make(args)[0].eval().requires_grad_(False))
        loss = lambda *both: distill.distillation_loss(*both, taught, argparse.Namespace(
            alpha=0.7, temperature=4.0))
    optimizer = torch.optim.AdamW(freeze.layer_groups(model), lr=1e-5, fused=True)
    return model, optimizer, batch, loss, networks


def products(model, batch, loss, networks):
    """[(m, k, n, products per step)] of the matrix products of one training step."""
    found = []

    def note(module, inputs, output):
        rows = output.numel() // output.shape[-1] if torch.is_tensor(output) else 0
        if isinstance(module, (teacher.Unit, nn.Linear)):
            weight = module.weight if isinstance(module, nn.Linear) else module.conv.weight
            found.append((rows, weight[0].numel(), len(weight), 1 + torch.is_grad_enabled() * (
                weight.requires_grad + inputs[0].requires_grad)))
        elif isinstance(module, nn.LSTM):
            data, gates, trains = inputs[0], 4 * module.hidden_size, 2 * torch.is_grad_enabled()
            for _ in range(2):  # directions
                found.append((len(data.data), module.input_size, gates,
                              1 + (trains > 0) + (trains > 0) * data.data.requires_grad))
                found.extend((int(size), module.hidden_size, gates, 1 + trains)
                             for size in data.batch_sizes)
    hooks = [module.register_forward_hook(note)
             for network in networks for module in network.modules()]
    loss(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def evaluated(model, batch):
    """The products of one evaluation step."""
    forward = lambda model, batch: model(batch.features, batch.lengths)
    return products(model.eval(), batch, forward, [model])


def floor_of(shapes, device):
    """A function that runs the products."""
    made = {(m, k, n): (torch.randn(m, k, device=device), torch.randn(k, n, device=device),
                        torch.randn(m, n, device=device)) for m, k, n, _ in shapes}

    def run():
        for *shape, count in shapes:
            x, w, y = made[tuple(shape)]
            torch.mm(x, w)
            if count > 1:
                torch.mm(x.T, y)
            if count > 2:
                torch.mm(y, w.T)
    return run


def seconds(functions, args):
    """Medians of the seconds of each function, timed in turn."""
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    taken = [[] for _ in functions]
    for _ in range(args.repeats + 1):  # the first time is for warming up
        for function, times in zip(functions, taken):
            start = clock()
            function()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(clock() - start)
    return [statistics.median(times[1:]) for times in taken]


def measure(args, trained=freeze.LAYERS, kind="teacher"):
    """One row: milliseconds and ratios of training and evaluation."""
    model, optimizer, batch, loss, networks = make(args, kind)
    if kind == "teacher":
        freeze.apply_freeze(model, trained)
    train_floor = floor_of(products(model.train(), batch, loss, networks), args.device)
    eval_floor = floor_of(evaluated(model, batch), args.device)
    batches = [batch] * args.steps

    def train():
        teacher.train_one_epoch(model, batches, optimizer, lambda _: 1e-5, loss)

    @torch.inference_mode()
    def evaluate():
        model.eval()
        for some in batches:
            model(some.features, some.lengths)
    times = seconds((train, lambda: [train_floor() for _ in batches],
                     evaluate, lambda: [eval_floor() for _ in batches]), args)
    step, floor, forward, forward_floor = (1000 * t / args.steps for t in times)
    return {"network": kind, "trains": " ".join(trained[:1]) if kind == "teacher" else "all",
            "train_ms": step, "floor_ms": floor, "train_ratio": step / floor, "eval_ms": forward,
            "eval_ratio": forward / forward_floor,
            "frames_per_second": 1000 * args.batch * args.frames / step}


class Timed:
    """A loader that adds up the seconds in which its user waits for it."""

    def __init__(self, loader):
        self.loader, self.seconds = loader, 0.0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches, start = iter(self.loader), time.perf_counter()
        for batch in batches:
            self.seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def waiting(args, step):
    """{workers: milliseconds of reading and augmenting per batch, waiting}."""
    model, optimizer, _, loss, _ = make(args)
    rng, read = np.random.default_rng(0), teacher.read_features
    pause = args.slow * step / args.batch

    def slow_reader(*arguments):
        time.sleep(pause)  # a slow disk or network; the processor is free meanwhile
        return read(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        np.save(file := Path(folder, "a.npy"),
                rng.standard_normal((args.frames, args.features), dtype=np.float32))
        vocabulary = [teacher.BLANK, *(f"G{k}" for k in range(1, args.classes))]
        count = args.batch * args.epoch_steps
        sentences = [teacher.Sentence(f"s{k}", "", ("G1", "G2", "G3"), str(file))
                     for k in range(count)]
        statistics_ = np.zeros(args.features, np.float32), np.ones(args.features, np.float32)
        augment = lambda features, glosses, rng: teacher.augment(
            features, glosses, rng, *statistics_, args.stride)[:args.frames]
        result = {}
        for workers in (0, args.num_workers):
            flags = argparse.Namespace(seed=0, batch_size=args.batch, num_workers=workers,
                                       device=args.device)
            load = lambda: teacher.make_loader(sentences, vocabulary, args.features, flags, augment)
            for loader in 2 * [load()]:  # the first pass starts its workers
                list(timed := Timed(loader))
            teacher.read_features, shares = slow_reader, []
            next(iter(loader := load()))
            for _ in range(3):
                start, slow = time.perf_counter(), Timed(loader)
                teacher.train_one_epoch(model, slow, optimizer, lambda _: 1e-5, loss)
                whole = time.perf_counter() - start
                shares.append(whole / (whole - slow.seconds))
            teacher.read_features = read
            result[workers] = {"read_ms_per_batch": 1000 * timed.seconds / args.epoch_steps,
                               "waiting": statistics.median(shares)}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("threads", 1), ("batch", 8), ("frames", 80), ("features", 8),
                          ("classes", 105), ("stride", 4), ("steps", 5), ("repeats", 5),
                          ("num_workers", 2), ("epoch_steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--slow", type=float, default=1.0, help="reading over step time")
    parser.add_argument("--growth", action="store_true", help="four sizes of each dimension too")
    parser.add_argument("--no_data", action="store_true", help="leave out reading")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = sys.stderr if args.json else sys.stdout
    show = lambda name, row: print(
        f"{name:<24}{row['train_ms']:>10.1f}{row['floor_ms']:>10.1f}{row['train_ratio']:>8.2f}"
        f"{row['eval_ms']:>10.1f}{row['eval_ratio']:>8.2f}{row['frames_per_second']:>10.0f}",
        file=out, flush=True)
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}; B {args.batch}, T "
          f"{args.frames}, D {args.features}, V {args.classes}, stride {args.stride}\n{'':<24}"
          f"{'train ms':>10}{'floor ms':>10}{'ratio':>8}{'eval ms':>10}{'ratio':>8}"
          f"{'frames/s':>10}", file=out)
    rows = {name: measure(args, layers) for name, layers in TRAINED.items()}
    rows["student"] = measure(args, kind="student")
    for name, row in rows.items():
        show(name, row)
    result = {**rows["all layers"], "rows": rows, "arguments": vars(args)}
    if args.growth:
        for dimension, values in GROWTH.items():
            for value in values:
                some = argparse.Namespace(**{**vars(args), dimension: value})
                result[f"{dimension} {value}"] = row = measure(some)
                show(f"{dimension} {value}", row)
    if not args.no_data:
        result["data"] = waiting(args, rows["all layers"]["train_ms"] / 1000)
        for workers, found in result["data"].items():
            print(f"{workers} workers: reading and augmenting {found['read_ms_per_batch']:.1f} ms "
                  f"per batch; waiting {found['waiting']:.2f}", file=out)
    memory = (torch.cuda.max_memory_allocated() if args.device.startswith("cuda")
              else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    result["peak_bytes"] = memory
    print(f"peak memory {memory / 1e6:.0f} MB", file=out)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
