"""The control for pretrained weights: I3D's kernels with their entries in random order.

    $ python .lab/shuffled.py shuffled.pth
    $ python teacher.py --pretrained_weights shuffled.pth --adapt_method spatial_mean

Each 3D kernel keeps its values and loses their places; BatchNorm is kept. What a
network still gains from such weights is due to the values' distribution and to
BatchNorm, not to the patterns that the kernels have learned.
"""

import argparse

import corpora
import lab  # noqa: F401, the project's folder is on the path from here on
import torch

import adapt


def shuffle_kernels(weights, seed):
    """Return weights with the entries of each convolution's kernel permuted.

    Args:
        weights: name -> tensor, from adapt.read_checkpoint.
        seed: of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, value in weights.items():
        if adapt.is_unit_convolution(name):
            order = torch.randperm(value.numel(), generator=generator)
            value = value.flatten()[order].view_as(value)
        shuffled[name] = value
    return shuffled


def write(args):
    """Write the file that the flags name."""
    weights, _ = adapt.read_checkpoint(args.weights)
    shuffled = shuffle_kernels(weights, args.seed)
    kernels = sum(adapt.is_unit_convolution(name) for name in shuffled)
    adapt.save_checkpoint(shuffled, args.out)
    print(f"{args.out}: {kernels} kernels shuffled of {len(shuffled)} arrays")


def main():
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="the .pth file to write")
    parser.add_argument("--weights", default=adapt.KINETICS, help="a file of I3D's")
    parser.add_argument("--seed", type=int, default=0)
    corpora.run(parser, write)


if __name__ == "__main__":
    main()
