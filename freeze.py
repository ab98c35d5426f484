"""What trains in which epoch, and at which share of the learning rate.

    $ python freeze.py                                # 50 epochs, 4 stages, to mixed_5c
    $ python freeze.py --unfreeze_by 0.3 --freeze_until_layer mixed_4f

Layers are frozen from the input up to a named layer, and released from the top of the
network down (gradual unfreezing: Howard & Ruder 2018, arXiv 1801.06146, section 3.3).
What trains in epoch k, and at which rate, is a function of k alone: it does not matter
whether the run that reaches epoch k was resumed. Epochs, stages and steps count from 0.
"""

import argparse
import bisect
import itertools
import math

import numpy as np
from torch import nn

# The network's children from input to output: the one layer table. The stem holds I3D's
# conv_1a, conv_2b and conv_2c.
LAYERS = (
    "stem",
    "mixed_3b",
    "mixed_3c",
    "mixed_4b",
    "mixed_4c",
    "mixed_4d",
    "mixed_4e",
    "mixed_4f",
    "mixed_5b",
    "mixed_5c",
    "lstm",
    "classifier",
)
BACKBONE = LAYERS[:-2]

EPOCHS = 50
STAGES = 4  # of progressive unfreezing; the first stage releases nothing
FREEZE_UNTIL = "mixed_5c"  # the last frozen layer: the whole I3D backbone is frozen
WARMUP_SHARE = 0.1  # of a stage's steps, in which the learning rate rises


def stage_starts(epochs, stages, unfreeze_by=None):
    """Return the first epoch of each stage, a tuple of ints.

    Without unfreeze_by the stages are equally long, as numpy.array_split divides the
    epochs. With it the last stage starts after this share of the epochs, and the others
    at equal distances before it.

    Raises:
        ValueError: there is no other stage to release layers in, or a stage would have
            no epoch.
    """
    if unfreeze_by is None:
        return tuple(int(part[0]) for part in np.array_split(range(epochs), stages))
    if stages == 1:
        raise ValueError(
            f"unfreeze_by {unfreeze_by} with 1 unfreezing stage, in which no layer is "
            f"ever released: expected at least 2 stages"
        )
    last_start = unfreeze_by * epochs
    if not stages - 1 <= last_start <= epochs - 1:
        raise ValueError(
            f"{stages} unfreezing stages, the last after {unfreeze_by} of {epochs} "
            f"epochs: expected it after {stages - 1} to {epochs - 1} epochs"
        )
    return tuple(round(last_start * stage / (stages - 1)) for stage in range(stages))


def block_of(layer):
    """Return the I3D block that a layer belongs to; the stem goes with mixed_3."""
    if layer == "stem":
        return "mixed_3"
    return layer[: len("mixed_3")]


def release_groups(frozen, releases):
    """Divide the frozen layers into groups, from the top of the network down.

    Layers are grouped by block where there are at least as many blocks as releases,
    else taken singly; numpy.array_split deals these units out, so no group is empty.

    Args:
        frozen: names of the frozen layers from input to output.
        releases: the number of groups, from 0 to the number of frozen layers.

    Returns:
        A list of tuples of layer names, the first to be released first.
    """
    if releases == 0:
        return []
    top_down = frozen[::-1]
    units = [tuple(layers) for _, layers in itertools.groupby(top_down, key=block_of)]
    if len(units) < releases:
        units = [(layer,) for layer in top_down]
    groups = []
    for indices in np.array_split(range(len(units)), releases):
        chosen = [units[index] for index in indices]
        groups.append(tuple(itertools.chain.from_iterable(chosen)))
    return groups


class UnfreezeSchedule:
    """Which layers train in which epoch, and at which share of the learning rate.

    Args:
        layers: all layer names from input to output.
        epochs: epochs of the whole run.
        stages: stages of progressive unfreezing; 1 is plain freezing.
        freeze_until: the last layer that starts frozen; None freezes nothing.
        always_trainable: names of modules that train in every epoch also where their
            layer is frozen, such as those that no checkpoint has filled.
        unfreeze_by: the share of the epochs after which the last stage starts; None for
            stages of equal length.

    Attributes:
        frozen: the layers that start frozen, from input to output.
        starts: the first epoch of each stage.
        releases: for each stage the layers that begin to train in it, top first.
        always_trainable: those of the names given that lie in a frozen layer.

    Raises:
        ValueError: an unknown layer, or a stage without an epoch or without a layer.
    """

    def __init__(
        self,
        layers,
        epochs,
        stages=STAGES,
        freeze_until=FREEZE_UNTIL,
        always_trainable=(),
        unfreeze_by=None,
    ):
        self.layers = tuple(layers)
        self.epochs = epochs
        self.frozen = ()
        if freeze_until is not None:
            if freeze_until not in self.layers:
                raise ValueError(
                    f"unknown layer {freeze_until!r}, "
                    f"expected one of {', '.join(self.layers)}"
                )
            self.frozen = self.layers[: self.layers.index(freeze_until) + 1]
        most_stages = min(epochs, len(self.frozen) + 1)
        if not 1 <= stages <= most_stages:
            raise ValueError(
                f"{stages} unfreezing stages over {epochs} epochs and "
                f"{len(self.frozen)} frozen layers, expected 1 to {most_stages}"
            )
        self.starts = stage_starts(epochs, stages, unfreeze_by)
        self.releases = [()] + release_groups(self.frozen, stages - 1)
        self.always_trainable = [
            name for name in always_trainable if name.partition(".")[0] in self.frozen
        ]

    def stage(self, epoch):
        """Return the stage that the epoch belongs to."""
        return bisect.bisect_right(self.starts, epoch) - 1

    def trainable(self, epoch):
        """Return the names of what trains in the epoch, a tuple.

        Layers come first, from input to output, then those of always_trainable whose
        layer is still frozen.
        """
        still_frozen = set(self.frozen)
        for released in self.releases[: self.stage(epoch) + 1]:
            still_frozen.difference_update(released)
        layers = [name for name in self.layers if name not in still_frozen]
        modules = [
            name
            for name in self.always_trainable
            if name.partition(".")[0] in still_frozen
        ]
        return tuple(layers + modules)

    def learning_rate_factor(self, epoch, step, steps_per_epoch):
        """Return the share of the maximal learning rate, above 0 and at most 1.

        In each stage the rate rises linearly over WARMUP_SHARE of its steps and then
        falls to zero along half a cosine. With one decay over the whole run the layers
        that are released last would train at next to no learning rate.
        """
        stage = self.stage(epoch)
        stage_bounds = self.starts + (self.epochs,)
        first_epoch = stage_bounds[stage]
        stage_epochs = stage_bounds[stage + 1] - first_epoch
        stage_steps = stage_epochs * steps_per_epoch
        stage_step = (epoch - first_epoch) * steps_per_epoch + step
        warmup_steps = max(1, round(WARMUP_SHARE * stage_steps))
        if stage_step < warmup_steps:
            return (stage_step + 1) / warmup_steps
        progress = (stage_step - warmup_steps) / (stage_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def __str__(self):
        if not self.frozen:
            return "Freezing: nothing, all layers train from the start"
        if set(self.frozen) <= set(self.always_trainable):
            return (
                f"Freezing: nothing, as no weights were loaded into {self.frozen[0]} "
                f"to {self.frozen[-1]}: they train from the start"
            )
        description = f"Freezing: {self.frozen[0]} to {self.frozen[-1]}"
        if len(self.starts) == 1:
            description += " in all epochs"
        else:
            epochs = ", ".join(str(start) for start in self.starts[1:])
            description += f", released from the top at epochs {epochs}"
        if self.always_trainable:
            description += f"; trains all the same: {' '.join(self.always_trainable)}"
        return description


class BatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that, while frozen, uses and keeps its running statistics.

    It counts as frozen while its weight does not require gradients. PyTorch's own layer
    returns to batch statistics at the next model.train(), whatever requires_grad says,
    and its running statistics then drift (pytorch#86590).
    """

    def train(self, mode=True):
        """Set the training mode; a frozen layer stays in evaluation mode."""
        return super().train(mode and self.weight.requires_grad)


def apply_freeze(model, trainable):
    """Let exactly the named parts of the model train, by setting requires_grad.

    Every freeze.BatchNorm1d that is frozen by it keeps its running statistics through
    any later model.train().

    Args:
        model: an nn.Module.
        trainable: names of layers, of modules in them (`stem.conv_1a`) or of
            parameters.

    Raises:
        ValueError: a name that the model does not have, or a frozen BatchNorm of
            another class, whose statistics would drift.
    """
    names_found = set()
    for parameter_name, parameter in model.named_parameters():
        owners = [
            name for name in trainable if f"{parameter_name}.".startswith(f"{name}.")
        ]
        parameter.requires_grad_(len(owners) > 0)
        names_found.update(owners)
    unknown = set(trainable) - names_found
    if unknown:
        raise ValueError(
            f"the model has no parameters named {', '.join(sorted(unknown))}"
        )
    refuse_drifting_batchnorm(model)
    model.train(model.training)  # every BatchNorm1d looks at its requires_grad again


def refuse_drifting_batchnorm(model):
    """Raise ValueError for a frozen BatchNorm that is not this module's BatchNorm1d."""
    batchnorms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        if not isinstance(module, batchnorms) or isinstance(module, BatchNorm1d):
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f"{name} is {type(module).__name__}, whose statistics would drift "
                f"while frozen, expected freeze.BatchNorm1d"
            )


def layer_groups(model):
    """Return an optimizer's parameter groups, one per layer, with the layer's name.

    The optimizer holds every parameter from the first step on, so that unfreezing
    touches no optimizer state.
    """
    return [
        {"name": name, "params": list(layer.parameters())}
        for name, layer in model.named_children()
    ]


# ------------------------------------------------------------ the program


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message):
        """Print the message and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser():
    """Return the parser of the program's flags."""
    parser = OneLineParser(
        "freeze.py",
        description="Print which layers train in which epochs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help="passes over the train sentences"
    )
    parser.add_argument(
        "--unfreeze_stages", type=int, default=STAGES, help="stages of unfreezing"
    )
    parser.add_argument(
        "--freeze_until_layer",
        choices=BACKBONE,
        default=FREEZE_UNTIL,
        metavar="LAYER",
        help="the last layer that starts frozen",
    )
    parser.add_argument(
        "--unfreeze_by",
        type=float,
        metavar="SHARE",
        help="share of the epochs after which all layers train; without it the stages "
        "are equally long",
    )
    return parser


def main(argv=None):
    """Run the program; argv as in sys.argv[1:]."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        schedule = UnfreezeSchedule(
            LAYERS,
            args.epochs,
            args.unfreeze_stages,
            args.freeze_until_layer,
            unfreeze_by=args.unfreeze_by,
        )
    except ValueError as error:
        parser.error(str(error))
    print("stage  epochs    trains released")
    ends = schedule.starts[1:] + (args.epochs,)
    for stage, (start, end) in enumerate(zip(schedule.starts, ends, strict=True)):
        epochs = f"{start}-{end - 1}"
        trains = f"{len(schedule.trainable(start))}/{len(LAYERS)}"
        released = " ".join(schedule.releases[stage]) or "-"
        print(f"{stage:>5}  {epochs:<9} {trains:<6} {released}")


if __name__ == "__main__":
    main()
