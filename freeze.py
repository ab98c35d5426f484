"""What trains in which epoch, and at which rate: freezing by prefix, unfreezing by a schedule.

    $ python freeze.py                                       # 50 epochs, 4 stages, to mixed_5c
    $ python freeze.py --unfreeze_by 0.3 --freeze_until_layer mixed_4f

Gradual unfreezing from the top (Howard & Ruder 2018, arXiv 1801.06146, section 3.3). What trains
at epoch k, and at which learning rate, is a function of k: it does not depend on how epoch k was
reached, resumed or not. Epochs, stages and steps are counted from 0.
"""

import argparse
import itertools
import math
import os
import signal
import threading

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed import _functional_collectives

# The network's children, input to output: the one layer table. stem: I3D's conv_1a to conv_2c.
LAYERS = ("stem", "mixed_3b", "mixed_3c", "mixed_4b", "mixed_4c", "mixed_4d", "mixed_4e",
          "mixed_4f", "mixed_5b", "mixed_5c", "lstm", "classifier")
BACKBONE = LAYERS[:-2]

EPOCHS = 50
STAGES = 4                  # of progressive unfreezing; the first one releases nothing
FREEZE_UNTIL = "mixed_5c"   # the last frozen layer: the whole I3D backbone
WARMUP = 0.1                # share of a stage's steps in which the learning rate rises

class UnfreezeSchedule:
    """Layers released from the top of the network down, in `stages` over `epochs`.
    layers: all layer names from input to output. freeze_until: the last layer that starts frozen;
    None freezes nothing. always_trainable: names of modules in frozen layers that train in every
    epoch (those a checkpoint did not fill). starts: the first epoch of each stage, as
    numpy.array_split divides the epochs; with unfreeze_by the last stage starts after this share of
    the epochs, the others at equal distances before it. stages=1: plain freezing. Layers are
    released by block (mixed_5; mixed_4; mixed_3 and stem) where at least as many are frozen as
    there are releases, else singly. ValueError for an unknown layer and for empty stages."""

    def __init__(self, layers, epochs, stages=STAGES, freeze_until=FREEZE_UNTIL,
                 always_trainable=(), unfreeze_by=None):
        layers = tuple(layers)
        if freeze_until is not None and freeze_until not in layers:
            raise ValueError(f"unknown layer {freeze_until!r}, expected one of {', '.join(layers)}")
        self.frozen = layers[:layers.index(freeze_until) + 1] if freeze_until else ()
        most = min(epochs, len(self.frozen) + 1)
        if not 1 <= stages <= most:
            raise ValueError(f"{stages} unfreezing stages over {epochs} epochs and "
                             f"{len(self.frozen)} frozen layers, expected 1 to {most}")
        self.layers, self.epochs = layers, epochs
        self.always_trainable = tuple(name for name in always_trainable
                                      if name.partition(".")[0] in self.frozen)
        self.starts = tuple(int(part[0]) for part in np.array_split(range(epochs), stages))
        if unfreeze_by is not None and stages > 1:
            last = unfreeze_by * epochs
            if not stages - 1 <= last <= epochs - 1:
                raise ValueError(f"{stages} unfreezing stages, the last after {unfreeze_by} of "
                                 f"{epochs} epochs: expected {stages - 1} to {epochs - 1} epochs")
            self.starts = tuple(round(last * k / (stages - 1)) for k in range(stages))
        # Top first, by name[:7]: mixed_5, mixed_4, mixed_3 (with the stem, which has no number).
        groups = [tuple(names) for _, names in itertools.groupby(
            reversed(self.frozen), lambda name: "mixed_3" if name == "stem" else name[:7])]
        if len(groups) < stages - 1:
            groups = [(name,) for name in reversed(self.frozen)]
        parts = np.array_split(range(len(groups)), stages - 1) if stages > 1 else []
        # releases[k]: the layers, top first, that begin to train in stage k
        self.releases = ((), *(tuple(name for g in part for name in groups[g]) for part in parts))

    def stage(self, epoch):
        """The stage that the epoch belongs to."""
        return sum(epoch >= start for start in self.starts) - 1

    def trainable(self, epoch):
        """Names of the layers that train in this epoch, input to output, then always_trainable."""
        released = {name for names in self.releases[:self.stage(epoch) + 1] for name in names}
        layers = [n for n in self.layers if n not in self.frozen or n in released]
        return (*layers, *(name for name in self.always_trainable
                           if name.partition(".")[0] not in layers))

    def learning_rate_factor(self, epoch, step, steps_per_epoch):
        """The share of the maximal learning rate at a step of an epoch, above 0 and at most 1.
        In each stage a linear warm-up over WARMUP of its steps, then half a cosine to zero. A decay
        over the whole run instead would leave the last released layers next to no learning rate."""
        stage = self.stage(epoch)
        first, end = (*self.starts, self.epochs)[stage:stage + 2]
        step += (epoch - first) * steps_per_epoch
        steps = (end - first) * steps_per_epoch
        warmup = max(1, round(WARMUP * steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that, while frozen, uses and keeps its running statistics: [N, C] -> [N, C].
    PyTorch's own re-enters training mode at the next model.train(), whatever requires_grad says,
    and its running statistics then drift (pytorch#86590)."""

    def train(self, mode=True):
        return super().train(mode and self.weight.requires_grad)

    def forward(self, rows, valid=None):
        """[N, C], valid [N] -> [N, C]. In training the statistics are of the valid rows (None: all)
        of all torchrun's processes, as nn.SyncBatchNorm's, which refuses CPUs and has no `valid`
        (Ioffe & Szegedy 2015, arXiv 1502.03167, section 3)."""
        if not self.training or (valid is None and len(rows) > 1 and processes()[1] == 1):
            return super().forward(rows)
        weight = (rows.new_ones(len(rows)) if valid is None else valid)[:, None].to(self.bias)
        sums = torch.cat((weight.sum(dim=0), (weight * rows).sum(dim=0)))
        count, total = sum_over_processes(sums).split([1, len(self.bias)])
        mean = total / count  # [C]; where it is large E[x^2] - E[x]^2 would cancel
        var = sum_over_processes((weight * (rows - mean) ** 2).sum(dim=0)) / count      # [C]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum or 1 / self.num_batches_tracked  # None: the mean of all
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), momentum)
        return (rows - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias

def apply_freeze(model, trainable):
    """Let exactly the named parts of the model train.
    trainable: names of layers, of modules in them (`stem.conv_1a`) or of single parameters.
    Sets requires_grad; the BatchNorm1d above then keep their statistics through any train().
    ValueError for a name the model does not have, and for a frozen BatchNorm of another class."""
    used = set()
    for name, parameter in model.named_parameters():
        owners = {owner for owner in trainable if f"{name}.".startswith(f"{owner}.")}
        parameter.requires_grad_(bool(owners))
        used |= owners
    if unknown := {*trainable} - used:
        raise ValueError(f"the model has no parameters named {', '.join(sorted(unknown))}")
    for name, module in model.named_modules():
        if (isinstance(module, nn.modules.batchnorm._BatchNorm)
                and not isinstance(module, BatchNorm1d)
                and not any(p.requires_grad for p in module.parameters())):
            raise ValueError(f"{name} is {type(module).__name__}, whose statistics would drift "
                             f"while frozen, expected freeze.BatchNorm1d")
    model.train(model.training)  # every BatchNorm1d looks at its requires_grad again

def layer_groups(model):
    """An optimizer's parameter groups: all parameters, a group per layer with its name. Since the
    optimizer holds them from the first step, unfreezing touches no optimizer state."""
    return [{"name": name, "params": list(layer.parameters())}
            for name, layer in model.named_children()]

# ---------------------------------------------------------------- several processes
# Under torchrun each process does the same with its share of a batch. Losses and BatchNorm's
# statistics are means over the whole batch, so their number changes dropout and rounding alone.
def join_processes(device):
    """Join torchrun's other processes, if any. The device of this one."""
    if distributed.is_torchelastic_launched():
        if device.startswith("cuda"):
            torch.cuda.set_device(device := f"cuda:{os.environ['LOCAL_RANK']}")
        distributed.init_process_group()  # gloo for CPU tensors, nccl for a GPU's
    return device

def processes():
    """(which process this is, how many there are)."""
    return ((distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized()
            else (0, 1))

def in_first(function):
    """What function() returns in the first process, in all of them: the others wait for it."""
    result = [None if processes()[0] else function()]
    if distributed.is_initialized():
        distributed.broadcast_object_list(result)
    return result[0]

def sum_over_processes(tensor):
    """The sum over torchrun's processes, also of its gradients; in one process the tensor."""
    return (_functional_collectives.all_reduce(tensor, "sum", distributed.group.WORLD)
            if distributed.is_initialized() else tensor)

def delay_sigterm(_):
    """For workers: end by SIGTERM, or their process waits for ever, but after it had its say."""
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(1, os._exit, [0]).start())

def batch_mean(total, count):
    """The mean over the whole batch, of the sum and the count of this process's share."""
    total, count = sum_over_processes(torch.stack((total, total.new_full((), count))))
    return total / count

class Batches:
    """The batches of an epoch, lists of (epoch, index): a DataLoader's batch_sampler.
    count sentences in batches of nearly equal size, at most batch_size; without seed all in their
    order, else in an order drawn by seed and epoch (set by the caller), of each batch this
    process's share. ValueError where that would be empty."""

    def __init__(self, count, batch_size, seed=None):
        self.count, self.seed, self.epoch = count, seed, 0
        self.batches = max(1, math.ceil(count / batch_size))
        self.process, self.processes = (0, 1) if seed is None else processes()
        if self.processes > max(1, count // self.batches):
            raise ValueError(f"{self.processes} processes, {count // self.batches} sentences in a "
                             f"batch: raise --batch_size or start fewer processes")

    def __len__(self):
        return self.batches

    def __iter__(self):
        order = np.arange(self.count)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(order)
        for batch in np.array_split(order, self.batches):
            yield [(self.epoch, k) for k in batch[self.process::self.processes].tolist()]

# ---------------------------------------------------------------- the program
def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(
        "freeze.py", description="Print which layers train in which epochs.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the sentences")
    parser.add_argument("--unfreeze_stages", type=int, default=STAGES, help="stages of training")
    parser.add_argument("--freeze_until_layer", default=FREEZE_UNTIL, choices=BACKBONE,
                        metavar="LAYER", help="the last layer that starts frozen")
    parser.add_argument("--unfreeze_by", type=float, help="share of epochs until all layers train")
    parser.error = lambda message: parser.exit(2, f"freeze.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        schedule = UnfreezeSchedule(LAYERS, args.epochs, args.unfreeze_stages,
                                    args.freeze_until_layer, unfreeze_by=args.unfreeze_by)
    except ValueError as error:
        parser.error(error)
    print(f"{'stage':>5}  {'epochs':<9} {'trains':<6} released")
    for stage, (start, end) in enumerate(zip(schedule.starts, (*schedule.starts[1:], args.epochs))):
        count = f"{len(schedule.trainable(start))}/{len(LAYERS)}"
        released = " ".join(schedule.releases[stage]) or "-"
        print(f"{stage:>5}  {f'{start}-{end - 1}':<9} {count:<6} {released}")

if __name__ == "__main__":
    main()
