"""What trains in which epoch: freezing by prefix, unfreezing by a schedule of the epoch alone.

    $ python freeze.py                                       # 50 epochs, 4 stages, to mixed_5c
    $ python freeze.py --epochs 60 --unfreeze_stages 6 --freeze_until_layer mixed_4f

Gradual unfreezing from the top (Howard & Ruder 2018, arXiv 1801.06146, section 3.3). What trains
at epoch k is a function of k, so it is the same however epoch k was reached, resumed or not.
"""

import argparse
import re

import numpy as np
from torch import nn
from torch.nn import functional as F

STAGES = 4                  # the first trains what is above the frozen layers, each later releases
FREEZE_UNTIL = "mixed_5c"   # the last frozen layer: the whole I3D trunk


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that, while frozen, uses and keeps its running statistics.

    PyTorch's own re-enters training mode at the next model.train(), whatever requires_grad says,
    and its running statistics then drift (pytorch#86590). A batch of one row has no variance: it
    too is normalised with the running statistics.
    """

    def train(self, mode=True):
        return super().train(mode and (self.weight is None or self.weight.requires_grad))

    def forward(self, rows):
        if self.training and len(rows) == 1:
            return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        return super().forward(rows)


class UnfreezeSchedule:
    """Layers released from the top of the network down, in `stages` over `epochs`.

    layers: all layer names from input to output. freeze_until: the last layer that starts frozen;
    None freezes nothing. starts: the first epoch of each stage, as numpy.array_split divides the
    epochs. stages=1 never releases anything: plain freezing.
    """

    def __init__(self, layers, epochs, stages=STAGES, freeze_until=FREEZE_UNTIL):
        layers = tuple(layers)
        if freeze_until is not None and freeze_until not in layers:
            raise ValueError(f"unknown layer {freeze_until!r}, expected one of {', '.join(layers)}")
        if not 1 <= stages <= epochs:
            raise ValueError(f"{stages} unfreezing stages over {epochs} epochs, "
                             f"expected 1 to {epochs} stages")
        self.layers, self.epochs = layers, epochs
        self.starts = tuple(int(part[0]) for part in np.array_split(range(epochs), stages))
        frozen = layers[:layers.index(freeze_until) + 1] if freeze_until else ()
        groups = _blocks(frozen) if stages <= 4 else [(name,) for name in reversed(frozen)]
        releases = np.array_split(range(len(groups)), stages - 1) if stages > 1 else []
        # release[k]: the layers, top first, that stage k lets train
        self.releases = ((),) + tuple(
            tuple(name for g in part for name in groups[g]) for part in releases)
        self.frozen = frozen

    def stage(self, epoch):
        """The stage, counted from 0, that epoch (counted from 0) belongs to."""
        return sum(epoch >= start for start in self.starts) - 1

    def span(self, epoch):
        """(first epoch of the stage that epoch belongs to, first epoch after it)."""
        stage = self.stage(epoch)
        return self.starts[stage], (*self.starts, self.epochs)[stage + 1]

    def trainable(self, epoch):
        """Names of the layers that train in this epoch, from input to output."""
        released = {name for names in self.releases[:self.stage(epoch) + 1] for name in names}
        return tuple(n for n in self.layers if n not in self.frozen or n in released)

    def describe(self, epoch):
        """What a person wants to know where a stage starts: what it releases."""
        stage = self.stage(epoch)
        if not self.frozen:
            return "all layers train"
        if stage:
            return f"stage {stage} releases {' '.join(self.releases[stage]) or 'nothing more'}"
        return (f"stage 0 trains {' '.join(self.trainable(epoch))}; frozen: "
                f"{' '.join(self.frozen)}")


def _blocks(frozen):
    """Top first: (mixed_5*), (mixed_4*), (mixed_3* and the stem, which has no block number)."""
    blocks = []
    for name in reversed(frozen):
        number = re.match(r"mixed_\d|", name).group()
        if blocks and number in ("", blocks[-1][0]):
            blocks[-1][1].append(name)
        else:
            blocks.append((number, [name]))
    return [tuple(names) for _, names in blocks]


def apply_freeze(model, trainable):
    """Let exactly the named parts of the model train.

    trainable: names of layers, of modules in them (`stem.conv_1a`) or of single parameters.
    Sets requires_grad; the BatchNorm1d above then keep their statistics through any train().
    ValueError for a name the model does not have, and for a frozen BatchNorm of another class.
    """
    parameters, matched = dict(model.named_parameters()), set()
    for name, parameter in parameters.items():
        owners = {name[:dot.start()] for dot in re.finditer(r"\.|$", name)} & set(trainable)
        parameter.requires_grad_(bool(owners))
        matched |= owners
    if unknown := set(trainable) - matched:
        raise ValueError(f"the model has no parameters named {', '.join(sorted(unknown))}")
    for name, module in model.named_modules():
        if (isinstance(module, nn.modules.batchnorm._BatchNorm)
                and not isinstance(module, BatchNorm1d)
                and not any(p.requires_grad for p in module.parameters())):
            raise ValueError(f"{name} is {type(module).__name__}, whose statistics would drift "
                             f"while frozen; expected freeze.BatchNorm1d")
    model.train(model.training)  # every BatchNorm1d looks at its requires_grad again


def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    # Only as a program: the one layer table, and the defaults of training, live with the model.
    from teacher import BACKBONE, LAYERS, Config
    parser = argparse.ArgumentParser(description="Print which layers train in which epochs.",
                                     allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    parser.add_argument("--unfreeze_stages", type=int, default=STAGES)
    parser.add_argument("--freeze_until_layer", default=FREEZE_UNTIL, choices=BACKBONE,
                        metavar="LAYER")
    parser.error = lambda message: parser.exit(2, f"freeze.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        schedule = UnfreezeSchedule(LAYERS, args.epochs, args.unfreeze_stages,
                                    args.freeze_until_layer)
    except ValueError as error:
        parser.exit(2, f"freeze.py: {error}\n")
    ends = (*schedule.starts[1:], args.epochs)
    print(f"{'stage':>5}  {'epochs':<9} {'trains':<6} released")
    for stage, (start, end) in enumerate(zip(schedule.starts, ends)):
        count = f"{len(schedule.trainable(start))}/{len(LAYERS)}"
        released = " ".join(schedule.releases[stage]) or "-"
        print(f"{stage:>5}  {f'{start}-{end - 1}':<9} {count:<6} {released}")
    print(f"Parameters that a checkpoint did not fill train in every epoch. Layers, input to "
          f"output: {' '.join(LAYERS)}")


if __name__ == "__main__":
    main()
