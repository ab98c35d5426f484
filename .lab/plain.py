r"""The plain network that a user would pick instead of the teacher, as the bar for it.

    $ python .lab/plain.py --data_dir corpora/boston104 --epochs 150
    $ python .lab/plain.py --evaluate checkpoints/plain/last.pth
    $ python .lab/crossvalidate.py run folds/copycat-signer --setting plain \
          --network plain -- --epochs 20

Two convolutions over time with max-pooling and a BiLSTM of two layers, the field's
usual temporal module (VAC: Min et al. 2021, arXiv 2104.02330), from random
weights. Data, augmentation, losses, training loop and checkpoints are the library's: it
shows what another network needs to be trained by teacher.train. It has teacher.py's
flags of training, data and evaluation; --pretrained_weights takes a file of its own.

Axes: see teacher.py.
"""

import argparse
import dataclasses
import os
from dataclasses import dataclass

import lab  # noqa: F401, the project's folder is on the path from here on
from torch import nn

import freeze
import teacher

CHANNELS = 512
STRIDE = 4  # frames per output frame: two poolings of 2

# ------------------------------------------------------------ the network


class PlainNetwork(teacher.Recogniser):
    """Two convolutions with poolings, a BiLSTM of two layers, a classifier.

    Args:
        feature_dim: D.
        num_classes: V, with the CTC blank as class 0.
        hidden_size: LSTM units per direction.
        dropout: share of values dropped in front of each layer of the LSTM and of the
            classifier.
        backbone_ctc: weight of the further head's loss in training; 0: no such head.
        centre_sentences: see teacher.standardise.
    """

    temporal_stride = STRIDE
    kind = "teacher"  # names the best checkpoint, see teacher.BEST_CHECKPOINT
    options = ("hidden_size", "dropout", "backbone_ctc", "centre_sentences")

    def __init__(
        self,
        feature_dim,
        num_classes,
        hidden_size,
        dropout,
        backbone_ctc,
        centre_sentences,
    ):
        super().__init__(feature_dim, dropout, backbone_ctc, centre_sentences)
        self.hidden_size = hidden_size
        self.convolutions = teacher.Shortcut(feature_dim, CHANNELS, STRIDE)
        self.lstm = nn.LSTM(
            CHANNELS, hidden_size, num_layers=2, dropout=dropout, bidirectional=True
        )
        self.classifier = teacher.Classifier(
            2 * hidden_size, num_classes, [CHANNELS] if backbone_ctc > 0 else ()
        )

    def frames_of(self, rows, lengths):
        """Apply the convolutions: [N, D], [B] -> a list of [N', C], lengths' [B]."""
        rows, lengths = self.convolutions(rows, lengths)
        return [rows], lengths


# ------------------------------------------------------------ training


@dataclass(frozen=True)
class Config(teacher.TrainingConfig):
    """The settings of a run; the flags have the same names and these defaults."""

    output_dir: str = "checkpoints/plain"  # for checkpoints, log and picture
    temporal_stride: int = STRIDE  # the network has no other
    hidden_size: int = teacher.HIDDEN_SIZE  # LSTM units per direction
    backbone_ctc: float = teacher.BACKBONE_CTC  # weight of the further head's loss
    pretrained_weights: str | None = None  # a checkpoint of this network; None: random


def load_weights(model, path, vocabulary):
    """Fill a model from a checkpoint; one of other glosses gives no classifier.

    Raises:
        ValueError: not a checkpoint of this network, or of one of other sizes.
    """
    source, content = teacher.load_model(path, PlainNetwork)
    same_glosses = content["vocabulary"] == vocabulary
    weights = {}
    for name, value in source.state_dict().items():
        of_data = name in ("feature_mean", "feature_std")
        of_glosses = name in ("classifier.weight", "classifier.bias")
        if not of_data and (same_glosses or not of_glosses):
            weights[name] = value
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: does not fit this network ({reason})") from error
    modules = {name.rpartition(".")[0] for name in missing if "." in name}
    fresh = ", ".join(sorted(modules)) or "nothing"
    print(f"Weights from {path}, fresh: {fresh}")


def train(config, resumed=None):
    """Train the network; return the best epoch's row with checkpoint and test WER."""
    teacher.refuse_unwritable(config.output_dir, f"--output_dir {config.output_dir}")
    data = teacher.read_data(config.data_dir, clean=config.clean_annotations)
    teacher.describe_data(data)
    model = teacher.make_model(PlainNetwork, data, config)
    if config.pretrained_weights is not None and resumed is None:
        load_weights(model, config.pretrained_weights, data.vocabulary)
    layers = [name for name, _ in model.named_children()]
    schedule = freeze.UnfreezeSchedule(
        layers, config.epochs, stages=1, freeze_until=None
    )
    model.to(config.device)
    with teacher.lock(config.output_dir):
        best = teacher.train(model, data, schedule, config, resumed=resumed)
    return teacher.in_first_process(
        teacher.report_best, best, data, config, PlainNetwork
    )


# ------------------------------------------------------------ the program


def make_parser():
    """Return the parser of the flags."""
    parser, _ = teacher.make_shared_parser("plain.py", __doc__.split("\n")[0])
    parser.add_argument(
        "--hidden_size",
        type=teacher.number(int, 1, 10**4),
        help="LSTM units per direction",
    )
    parser.add_argument(
        "--centre_sentences",
        action=argparse.BooleanOptionalAction,
        help="take each sentence's mean as its features' zero",
    )
    parser.add_argument(
        "--backbone_ctc",
        type=teacher.number(float, 0, 1000),
        metavar="WEIGHT",
        help="of a CTC loss in front of the LSTM in training; 0: none",
    )
    parser.add_argument(
        "--pretrained_weights",
        type=os.path.abspath,
        metavar="PATH",
        help="checkpoint of this network to start from; none: random weights",
    )
    parser.set_defaults(**dataclasses.asdict(Config()))
    return parser


def run(args, resumed):
    """Do what the flags ask for; return what --json prints."""
    config = teacher.config_from(args, Config)
    if args.evaluate is not None or args.predict is not None:
        return teacher.run_checkpoint(args, PlainNetwork, config)
    return train(config, resumed)


def main(argv=None):
    """Run the program; argv as in sys.argv[1:]."""
    teacher.run_program(make_parser(), argv, PlainNetwork, run)


if __name__ == "__main__":
    main()
