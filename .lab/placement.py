"""Device placement without a GPU: CPU tensors that pose as another device's.

    $ python .lab/placement.py

A tensor subclass on PyTorch's PrivateUse1 device, named "far", holds a CPU tensor; each
operation is run on what it holds. Two things are reported, each with the line of the
project that asked for it: operations that mix far tensors with CPU tensors of more than
one element, and operations for which the CPU waits (for values or sizes). They are
counted per step of teacher and student, per evaluated batch, per run that is resumed
and per batch of a beam search. Exits with 1 where devices were mixed.

There is no public way to pose as a device, so this script uses inner parts of torch
2.13, and with another version of torch it may need other ones.
"""

import contextlib
import dataclasses
import functools
import io
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import lab
import torch
from torch.utils import _pytree, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

# Composite operations arrive here as what they consist of, but not in inference mode,
# which the project's functions ask for when they are defined.
torch.inference_mode = torch.no_grad

import distill  # noqa: E402
import freeze  # noqa: E402
import teacher  # noqa: E402
import wer  # noqa: E402

DEVICE = "far:0"
EPOCHS = 3  # of a run, with a stage each
SENTENCES = 8  # of each split
BATCH_SIZE = 4
MIXED = "MIXED DEVICES"
WAITS = "the CPU waits"
# Lengths stay on the CPU: these take them from there on a GPU too.
TAKE_CPU_LENGTHS = ("_ctc_loss", "_pack_padded_sequence", "lstm")
# On a GPU the CPU waits for the size of what these return.
SIZED_BY_VALUES = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)
COPIES = ("_to_copy", "copy_")
# These return a far tensor, and sizes that are on the CPU.
RETURN_CPU_SIZES = ("_pack_padded_sequence", "_pad_packed_sequence")
noted = Counter()  # (MIXED or WAITS, operation, line of the project) -> times


class Backend(backend_registration._DummyBackendModule):
    """The module that torch asks about the device."""

    def get_amp_supported_dtype(self):
        """Return the precisions of autocast."""
        return [torch.float16]


backend_registration._setup_privateuseone_for_python_backend("far", Backend())


class Far(torch.Tensor):
    """A tensor on the device far:0 that holds a CPU tensor."""

    @staticmethod
    def __new__(cls, held):
        """Return a tensor without values of its own, shaped as the held one."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            dtype=held.dtype,
            device=DEVICE,
            storage_offset=held.storage_offset(),
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        """Return the values, as a copy to the CPU gives them."""
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        """Save the held values, as torch.save does for a GPU's tensors."""
        return self.held.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run an operation that has a far argument."""
        return run(function, args, kwargs or {})


class Placement(TorchDispatchMode):
    """Runs also operations without a far argument, such as torch.zeros(device=...)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation."""
        return run(function, args, kwargs or {})


# ------------------------------------------------------------ the LSTM off the CPU


def lstm_cell(input_gates, hidden_gates, cell, input_bias=None, hidden_bias=None):
    """Compute an LSTM's step: hidden state, cell state, and the gates for backward."""
    gates = input_gates + hidden_gates
    if input_bias is not None:
        gates = gates + input_bias + hidden_bias
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=1)
    input_gate = input_gate.sigmoid()
    forget_gate = forget_gate.sigmoid()
    candidate = candidate.tanh()
    output_gate = output_gate.sigmoid()
    new_cell = forget_gate * cell + input_gate * candidate
    workspace = torch.cat((input_gate, forget_gate, candidate, output_gate), dim=1)
    return output_gate * new_cell.tanh(), new_cell, workspace


def lstm_cell_backward(grad_hidden, grad_cell, cell, new_cell, workspace, has_bias):
    """Compute the gradients of lstm_cell: of the gates, the cell state, the bias."""
    input_gate, forget_gate, candidate, output_gate = workspace.chunk(4, dim=1)
    tanh = new_cell.tanh()
    if grad_hidden is None:
        grad_hidden = torch.zeros_like(new_cell)
    grad = grad_hidden * output_gate * (1 - tanh**2)
    if grad_cell is not None:
        grad = grad + grad_cell
    grad_gates = torch.cat(
        (
            grad * candidate * input_gate * (1 - input_gate),
            grad * cell * forget_gate * (1 - forget_gate),
            grad * input_gate * (1 - candidate**2),
            grad_hidden * tanh * output_gate * (1 - output_gate),
        ),
        dim=1,
    )
    grad_bias = grad_gates.sum(dim=0) if has_bias else None
    return grad_gates, grad * forget_gate, grad_bias


# PyTorch's LSTM off the CPU calls these, for which the CPU has no kernels.
NOT_ON_CPU = {
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward,
}


# ------------------------------------------------------------ running operations


def project_line():
    """Return the line of the project that is being run, with its file and number."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if Path(frame.filename).parent == lab.ROOT
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


def tensors_of(args, kwargs):
    """Return the far and the CPU tensors among an operation's arguments."""
    leaves = _pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, Far)]
    return far, on_cpu


def is_far_result(far, kwargs):
    """Tell whether an operation returns far tensors."""
    device = kwargs.get("device")
    if device is None:
        return len(far) > 0
    return torch.device(device).type == "far"


def indexes_by_mask(name, args):
    """Tell whether an operation indexes by a boolean mask."""
    if name not in ("index", "index_put_"):
        return False
    indices = [index for index in args[1] if index is not None]
    return any(index.dtype == torch.bool for index in indices)


def cpu_waits(name, args, kwargs, far, on_cpu):
    """Tell whether the CPU waits for a GPU in this operation."""
    if name == "_to_copy":
        far_result = is_far_result(far, kwargs)
        if far:
            return not far_result
        blocking = not kwargs.get("non_blocking", False)
        return len(on_cpu) > 0 and far_result and blocking
    reads_values = name == "_local_scalar_dense" or name in SIZED_BY_VALUES
    return len(far) > 0 and (reads_values or indexes_by_mask(name, args))


def mixes_devices(name, far, on_cpu):
    """Tell whether a GPU would refuse this operation for its CPU tensors."""
    allowed = name in COPIES or name.startswith(TAKE_CPU_LENGTHS)
    large = [tensor for tensor in on_cpu if tensor.numel() > 1]
    return len(far) > 0 and len(large) > 0 and not allowed


def held_by(value):
    """Return the CPU tensor that a far tensor holds, anything else as it is."""
    return value.held if isinstance(value, Far) else value


def run(function, args, kwargs):
    """Run an operation on what its far arguments hold; note what is reported."""
    name = function.overloadpacket.__name__
    far, on_cpu = tensors_of(args, kwargs)
    if cpu_waits(name, args, kwargs, far, on_cpu):
        noted[WAITS, name, project_line()] += 1
    elif mixes_devices(name, far, on_cpu):
        noted[MIXED, name, project_line()] += 1
    far_result = is_far_result(far, kwargs)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": "cpu"}
    function = NOT_ON_CPU.get(name, function)
    held_args = _pytree.tree_map(held_by, args)
    held_kwargs = _pytree.tree_map(held_by, kwargs)
    result = function(*held_args, **held_kwargs)
    if name == "_local_scalar_dense" or not far_result:
        return result
    if name == "copy_":
        return args[0]
    if name in RETURN_CPU_SIZES:
        return Far(result[0]), result[1]
    far_by_held = {id(tensor.held): tensor for tensor in far}

    def close(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in far_by_held:  # an operation in place returns its argument
            return far_by_held[id(value)]
        return Far(value)

    return _pytree.tree_map(close, result)


# ------------------------------------------------------------ what is run


class Report:
    """Prints what was noted since the last time, and counts mixed devices."""

    def __init__(self):
        self.mixed = 0

    def show(self, title, parts=1):
        """Print the operations noted, per part, such as a step; forget them."""
        print(f"\n{title}")
        for (what, operation, line), count in noted.most_common():
            print(f"  {count / parts:7.2f}  {what}: {operation:<20} {line}")
            if what == MIXED:
                self.mixed += count
        noted.clear()


def read_data():
    """Return the built-in corpus with SENTENCES sentences per split."""
    with contextlib.redirect_stdout(io.StringIO()):
        data = teacher.read_data()
    splits = {split: sentences[:SENTENCES] for split, sentences in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


def run_epochs(model, data, schedule, config, loss_function, report):
    """Train and evaluate a model epoch by epoch, across releases of layers."""
    vocabulary = data.vocabulary
    train_loader = teacher.make_train_loader(data.splits["train"], data, config)
    dev_sentences = data.splits["dev"]
    dev_loader = teacher.make_loader(dev_sentences, vocabulary, config)
    references = [sentence.glosses for sentence in dev_sentences]
    optimizer = teacher.make_optimizer(model, config)
    report.show(f"{model.kind}: made")
    for epoch in range(config.epochs):
        freeze.apply_freeze(model, schedule.trainable(epoch))
        train_loader.batch_sampler.epoch = epoch
        steps = len(train_loader)
        rates = teacher.epoch_learning_rates(
            schedule, config.learning_rate, epoch, steps
        )
        report.show(f"{model.kind}: before epoch {epoch}")
        teacher.train_one_epoch(model, train_loader, optimizer, rates, loss_function)
        report.show(f"{model.kind}: training in epoch {epoch}, per step", steps)
        teacher.evaluate(model, dev_loader, references, vocabulary)
        report.show(f"{model.kind}: evaluation, per batch", len(dev_loader))


def run_and_resume(model_class, data, schedule, config, loss_function, report):
    """Train by teacher.train, resume after the first epoch; return the model."""
    resumed = None
    shorter = dataclasses.replace(config, epochs=1)
    for run_config in (shorter, config):
        model = teacher.make_model(model_class, data, run_config).to(DEVICE)
        teacher.train(model, data, schedule, run_config, loss_function, resumed)
        path = Path(config.output_dir, teacher.LAST_CHECKPOINT)
        _, resumed = teacher.load_model(path, model_class)
        times = "run" if run_config is shorter else "resumed run"
        report.show(f"{model_class.kind}: a {times} with its checkpoints")
    return model.eval()


def run_teacher(data, output_dir, report):
    """Run everything with a small teacher; return it in evaluation mode."""
    config = teacher.Config(
        hidden_size=8,
        shortcut_channels=8,
        batch_size=BATCH_SIZE,
        num_workers=0,
        device=DEVICE,
        epochs=EPOCHS,
        output_dir=output_dir,
        temporal_stride=teacher.TEMPORAL_STRIDE,
    )
    schedule = freeze.UnfreezeSchedule(
        freeze.LAYERS, EPOCHS, EPOCHS, always_trainable=("stem.conv_1a",)
    )
    loss_function = teacher.all_heads_loss
    model = teacher.make_model(teacher.I3DTeacher, data, config).to(DEVICE)
    run_epochs(model, data, schedule, config, loss_function, report)
    model = run_and_resume(
        teacher.I3DTeacher, data, schedule, config, loss_function, report
    )
    dev_sentences = data.splits["dev"]
    loader = teacher.make_loader(dev_sentences, data.vocabulary, config)
    references = [sentence.glosses for sentence in dev_sentences]
    teacher.evaluate(model, loader, references, data.vocabulary, wer.beam_decode)
    report.show("teacher: beam search, per batch", len(loader))
    return model


def run_student(data, output_dir, teacher_model, report):
    """Run everything with a small student of the teacher."""
    config = distill.Config(
        channels=8,
        batch_size=BATCH_SIZE,
        num_workers=0,
        device=DEVICE,
        epochs=EPOCHS,
        output_dir=output_dir,
        temporal_stride=teacher.TEMPORAL_STRIDE,
    )
    student = teacher.make_model(distill.Student, data, config).to(DEVICE)
    layers = [name for name, _ in student.named_children()]
    schedule = freeze.UnfreezeSchedule(layers, EPOCHS, 1, None)
    loss_function = functools.partial(
        distill.distillation_loss,
        teacher_model=teacher_model,
        alpha=config.alpha,
        temperature=config.temperature,
    )
    run_epochs(student, data, schedule, config, loss_function, report)
    run_and_resume(distill.Student, data, schedule, config, loss_function, report)


def main():
    """Train, evaluate and resume both networks; print what was noted."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder, Placement():
        data = read_data()
        model = run_teacher(data, f"{folder}/teacher", report)
        run_student(data, f"{folder}/student", model, report)
    print(f"\n{report.mixed} operations mixed devices")
    sys.exit(1 if report.mixed else 0)


if __name__ == "__main__":
    main()
