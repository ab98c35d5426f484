"""Device placement without a GPU: CPU tensors that pose as another device, through both programs.

    $ python .lab/placement.py

A tensor subclass on PyTorch's PrivateUse1 device, named "far", holds a CPU tensor; each operation is
run on what it holds. Reported, with the line of the project that asked for it: operations that mix
far tensors with CPU tensors (of more than one element), and host synchronisations (values or sizes
that the CPU waits for), counted per step of teacher and student (training across a release, each
with evaluation and resuming) and of a beam search. Exits with 1 where devices were mixed.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.inference_mode = torch.no_grad  # in which composite operations arrive as what they consist of
import adapt
import distill
import freeze
import teacher
import wer


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16]


backend_registration._setup_privateuseone_for_python_backend("far", Backend())
# Lengths stay on the CPU: these take them from there on a GPU too.
TAKE_CPU_LENGTHS = ("_ctc_loss", "_pack_padded_sequence", "lstm")
# On a GPU the CPU waits for the size of what these return.
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
found = Counter()  # (what, operation, line of the project) -> times


class Far(torch.Tensor):
    """A tensor on the device far:0 that holds a CPU tensor."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device="far:0",
            storage_offset=held.storage_offset())

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Placement(TorchDispatchMode):
    """Sends also what has no far argument, such as torch.zeros(..., device="far"), through run."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def lstm_cell(input_gates, hidden_gates, cx, input_bias=None, hidden_bias=None):
    gates = input_gates + hidden_gates
    gates = gates if input_bias is None else gates + input_bias + hidden_bias
    i, f, g, o = gates.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat((i, f, g, o), dim=1)


def lstm_cell_backward(grad_hy, grad_cy, cx, cy, workspace, has_bias):
    (i, f, g, o), tanh = workspace.chunk(4, dim=1), cy.tanh()
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    cell = grad_hy * o * (1 - tanh ** 2) + (0 if grad_cy is None else grad_cy)
    gates = torch.cat((cell * g * i * (1 - i), cell * cx * f * (1 - f), cell * i * (1 - g ** 2),
                       grad_hy * tanh * o * (1 - o)), dim=1)
    return gates, cell * f, gates.sum(dim=0) if has_bias else None


# PyTorch's LSTM off the CPU, whose kernels a CPU does not have.
NOT_ON_CPU = {"_thnn_fused_lstm_cell": lstm_cell,
              "_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward}


def note(what, function):
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else ""
    found[what, function.overloadpacket.__name__, line] += 1


def run(function, args, kwargs):
    leaves = _pytree.tree_leaves((args, kwargs))
    far = [x for x in leaves if isinstance(x, Far)]
    near = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Far)]
    name, device = function.overloadpacket.__name__, kwargs.get("device")
    target = bool(far) if device is None else torch.device(device).type == "far"
    if (name == "_to_copy" and (not target if far else near and target
                                and not kwargs.get("non_blocking"))
            or far and (name in ("_local_scalar_dense", *SIZED_BY_VALUES)
                        or name in ("index", "index_put_") and any(
                            x is not None and x.dtype == torch.bool for x in args[1]))):
        note("the host waits", function)
    elif (far and any(x.numel() > 1 for x in near) and name not in ("_to_copy", "copy_")
          and not name.startswith(TAKE_CPU_LENGTHS)):
        note("MIXED DEVICES", function)
    held = {id(x.held): x for x in far}
    open_ = lambda x: x.held if isinstance(x, Far) else x
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    function = NOT_ON_CPU.get(name, function)
    result = function(*_pytree.tree_map(open_, args), **_pytree.tree_map(open_, kwargs))
    if name == "_local_scalar_dense" or not target:
        return result
    if name == "copy_":
        return args[0]
    if name in ("_pack_padded_sequence", "_pad_packed_sequence"):
        return Far(result[0]), result[1]  # the second are sizes, on the CPU

    def close(x):
        return x if not isinstance(x, torch.Tensor) else held[id(x)] if id(x) in held else Far(x)
    return _pytree.tree_map(close, result)


def to_cpu(content):
    return _pytree.tree_map(lambda x: x.held.clone() if isinstance(x, Far) else x, content)


def show(name, steps=1):
    print(f"\n{name}")
    for (what, operation, line), count in found.most_common():
        print(f"  {count / steps:7.2f}  {what}: {operation:<20} {line}")
    mixed = sum(count for (what, *_), count in found.items() if what == "MIXED DEVICES")
    found.clear()
    return mixed


def main():
    save = adapt.save_checkpoint  # torch.save cannot pickle Far; a GPU's tensors it can
    adapt.save_checkpoint = lambda content, path: save(to_cpu(content), path)
    mixed, epochs = 0, 3
    with tempfile.TemporaryDirectory() as folder, Placement():
        args = argparse.Namespace(
            batch_size=4, num_workers=0, device="far:0", seed=0, temporal_stride=4, hidden_size=8,
            dropout=0.5, backbone_ctc=1.0, learning_rate=1e-3, weight_decay=0.01, overfit=None,
            epochs=epochs, output_dir=f"{folder}/teacher", channels=8, alpha=0.7, temperature=4.0)
        with contextlib.redirect_stdout(io.StringIO()):
            data = teacher.read_data(None)
            data.splits.update({split: some[:8] for split, some in data.splits.items()})
        models = {}
        for kind, model_class in (("teacher", teacher.I3DTeacher), ("student", distill.Student)):
            args.output_dir = f"{folder}/{kind}"
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, 3, always_trainable=(
                "stem.conv_1a",))
            loss = teacher.ctc_loss
            if kind == "student":
                layers = [*dict(distill.Student(2, 2, 4).named_children())]
                schedule = freeze.UnfreezeSchedule(layers, epochs, 1, None)
                loss = lambda *both: distill.distillation_loss(*both, models["teacher"], args)
            step = teacher.train_one_epoch

            def counted(*arguments):
                nonlocal mixed
                mixed += show(f"{kind}, before the epoch")
                result = step(*arguments)
                mixed += show(f"{kind}, an epoch's training, per step", len(arguments[1]))
                return result
            teacher.train_one_epoch = counted
            last = None
            for attempt in range(2):  # the second is resumed
                model = teacher.make_model(model_class, data, args).to("far:0")
                args.epochs = epochs - 1 if not attempt else epochs
                teacher.train(model, data, args, schedule, loss, last)
                mixed += show(f"{kind}, evaluation, checkpoints{', resumed' * attempt}")
                last = adapt.load_model(f"{folder}/{kind}/last.pth", model_class)[1]
            models[kind] = model.eval()
            teacher.train_one_epoch = step
        loader = teacher.make_loader(data.splits["dev"], data.vocabulary, 16, args)
        teacher.evaluate(models["teacher"], loader, data.vocabulary, wer.beam_decode)
        mixed += show("beam search, per batch", len(loader))
    print(f"\n{mixed} operations mixed devices")
    sys.exit(mixed > 0)


if __name__ == "__main__":
    main()
