"""The student: a network for a phone, distilled from the teacher.

    $ python distill.py                # from checkpoints/teacher/best_i3d.pth, its data
    $ python distill.py --teacher_checkpoint best_i3d.pth --export student.pt2
    $ python distill.py --evaluate best_student.pth --export student.onnx

The student learns from the glosses (CTC) and from the teacher's output for every frame
(Hinton et al. 2015, arXiv 1503.02531, section 2). Then a baseline is trained, the same
student by CTC alone, to measure the gain. Its files lie in the folder `alone/`.

Axes as in teacher.py: B sentences, T frames, T' output frames (one per temporal_stride
frames), N' output frames of a whole batch, D features, C channels, V classes with the
CTC blank as class 0.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import adapt
import freeze
import teacher

# ------------------------------------------------------------ losses


def kd_loss(student_logits, teacher_logits, lengths, temperature):
    """Compute temperature^2 * KL(teacher || student) (Hinton et al. 2015).

    The divergence is summed over classes; its mean is over the valid frames of the
    batch, so padding does not count. The factor temperature^2 keeps the gradient's size
    from depending on the temperature.

    Args:
        student_logits: [B, T', V].
        teacher_logits: [B, T', V].
        lengths: [B] valid output frames, at most T'.
        temperature: both logits are divided by it.

    Returns:
        A scalar in nats per frame.

    Raises:
        ValueError: shapes that do not fit each other, or lengths that are not 1 to T'.
    """
    fits = (
        student_logits.shape == teacher_logits.shape
        and lengths.shape == student_logits.shape[:1]
        and lengths.min() >= 1
        and lengths.max() <= student_logits.shape[1]
    )
    if not fits:
        raise ValueError(
            f"logits {list(student_logits.shape)} and {list(teacher_logits.shape)}, "
            f"lengths {lengths.tolist()}, expected equal [B, T', V], B lengths 1 to T'"
        )
    student_log_probs = soft_log_probs(student_logits, lengths, temperature)
    teacher_log_probs = soft_log_probs(teacher_logits, lengths, temperature)
    # As probabilities, so that a class that the teacher rules out (-inf) counts as 0.
    teacher_probs = teacher_log_probs.exp()
    total = F.kl_div(student_log_probs, teacher_probs, reduction="sum")
    mean = teacher.batch_mean(total, len(student_log_probs))
    return temperature**2 * mean


def soft_log_probs(logits, lengths, temperature):
    """Return the valid frames' log probabilities: [B, T', V], [B] -> [N', V].

    Under autocast they are computed in float32.
    """
    precision = torch.promote_types(logits.dtype, torch.float32)
    rows = teacher.unpad(logits, lengths) / temperature
    return rows.log_softmax(dim=1, dtype=precision)


def distillation_loss(student, batch, teacher_model, alpha, temperature):
    """Compute alpha * kd_loss + (1 - alpha) * CTC.

    kd_loss is per output frame, CTC in nats per gloss. The teacher is in evaluation
    mode, without gradients, and sees the same augmented features. It is no submodule of
    the student, so the optimizer does not hold it.

    Args:
        student: the network that is trained.
        batch: a teacher.Batch.
        teacher_model: the trained I3DTeacher.
        alpha: the weight of kd_loss, 0 to 1.
        temperature: see kd_loss.
    """
    logits, lengths = student(batch.features, batch.lengths)
    losses = teacher.sentence_ctc_losses(logits, lengths, batch)
    ctc = teacher.batch_mean(losses.sum(), len(losses))
    with torch.no_grad():
        teacher_logits, _ = teacher_model(batch.features, batch.lengths)
    kd = kd_loss(logits, teacher_logits, lengths, temperature)
    return alpha * kd + (1 - alpha) * ctc


# ------------------------------------------------------------ the network

KERNEL = 9  # frames that a block's convolution reads
DILATIONS = (1, 1, 2, 2, 4, 4)  # of the blocks: frames from one read to the next
EXPANSION = 2  # a block's hidden channels per channel
BLOCK_DROPOUT = 0.1  # share of a block's output dropped in training

CHANNELS = 128
DROPOUT = 0.3  # share of values dropped in front of the classifier


class BatchNorm(teacher.BatchNorm):
    """BatchNorm over frames: [B, T, C], mask [B, T] -> [B, T, C].

    In training the statistics are those of the valid frames alone, however far a batch
    is padded.
    """

    def forward(self, frames, mask):
        """Normalise frames; mask is true for the valid ones."""
        rows = super().forward(frames.flatten(0, 1), mask.flatten())
        return rows.view_as(frames)


def convolve(convolution, frames, mask):
    """Apply an nn.Conv1d to frames [B, T, C], mask [B, T] -> [B, T', C].

    Frames past a sentence's end read as zeros, like all padding.
    """
    valid = frames * mask[:, :, None]
    return convolution(valid.transpose(1, 2)).transpose(1, 2)


class Halving(nn.Module):
    """A separable convolution of stride 2: [B, T, C] -> [B, ceil(T / 2), C']."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.depthwise = nn.Conv1d(
            inputs, inputs, 5, stride=2, padding=2, groups=inputs
        )
        self.pointwise = nn.Linear(inputs, outputs, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, frames, mask, halved_mask):
        """Halve time; the masks are of the frames that come in and that go out."""
        frames = convolve(self.depthwise, frames, mask)
        return F.relu(self.norm(self.pointwise(frames), halved_mask))


class Block(nn.Module):
    """An inverted residual block over time: [B, T', C] -> [B, T', C].

    A depthwise convolution over time, then wide and narrow again over channels:
    MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381) in the order of
    ConvNeXt's (Liu et al. 2022, arXiv 2201.03545, section 2.6).
    """

    def __init__(self, channels, dilation):
        super().__init__()
        self.depthwise = nn.Conv1d(
            channels,
            channels,
            KERNEL,
            padding=dilation * (KERNEL // 2),
            dilation=dilation,
            groups=channels,
        )
        self.norm = BatchNorm(channels)
        self.widen = nn.Linear(channels, EXPANSION * channels)
        self.narrow = nn.Linear(EXPANSION * channels, channels)

    def forward(self, frames, mask):
        """Add the block's output to its input; mask is true for valid frames."""
        change = self.norm(convolve(self.depthwise, frames, mask), mask)
        change = self.narrow(F.relu(self.widen(change)))
        return frames + F.dropout(change, BLOCK_DROPOUT, self.training)


class Student(nn.Module):
    """Separable convolutions over time, as in QuartzNet.

    Kriman et al. 2020, arXiv 1910.10261. There is no recurrent layer: torch.export
    unrolls nn.LSTM and nn.GRU for one length (pytorch#115092). The dilated blocks see
    113 output frames.

    Args:
        feature_dim: D.
        num_classes: V, with the CTC blank as class 0.
        temporal_stride: frames per output frame, 2, 4 or 8.
        channels: C.
        dropout: share of values dropped in front of the classifier.
        centre_sentences: see teacher.standardise.

    Raises:
        ValueError: another temporal stride.
    """

    kind = "student"
    # The arguments that come from a run's Config, see teacher.make_model.
    options = ("temporal_stride", "channels", "dropout", "centre_sentences")

    def __init__(
        self,
        feature_dim,
        num_classes,
        temporal_stride=teacher.TEMPORAL_STRIDE,
        channels=CHANNELS,
        dropout=DROPOUT,
        centre_sentences=False,
    ):
        super().__init__()
        teacher.refuse_other_stride(temporal_stride)
        self.temporal_stride = temporal_stride
        self.channels = channels
        self.dropout = dropout
        self.centre_sentences = centre_sentences
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.stem = nn.Linear(feature_dim, channels // 2)
        self.halvings = nn.ModuleList()
        width = channels // 2
        for _ in range(int(math.log2(temporal_stride))):
            self.halvings.append(Halving(width, channels))
            width = channels
        self.blocks = nn.ModuleList(Block(channels, d) for d in DILATIONS)
        self.norm = BatchNorm(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, features, lengths):
        """Recognise sentences.

        Args:
            features: [B, T, D].
            lengths: [B] frames per sentence, 1 to T.

        Returns:
            logits [B, T', V], meaningless past a sentence's end, and lengths' [B].
        """
        device = features.device
        features = teacher.standardise(
            features,
            lengths,
            self.feature_mean,
            self.feature_std,
            self.centre_sentences,
        )
        frames = self.stem(features)
        mask = teacher.frame_mask(
            lengths.to(device, non_blocking=True), frames.shape[1]
        )
        for halving in self.halvings:
            lengths = (lengths + 1) // 2
            halved_mask = teacher.frame_mask(
                lengths.to(device, non_blocking=True), (frames.shape[1] + 1) // 2
            )
            frames = halving(frames, mask, halved_mask)
            mask = halved_mask
        for block in self.blocks:
            frames = block(frames, mask)  # [B, T', C]
        frames = F.dropout(self.norm(frames, mask), self.dropout, self.training)
        return self.classifier(frames), lengths


# ------------------------------------------------------------ export

DESCRIPTION_NAME = "student.json"  # of a .pt2's extra file and of an .onnx's metadata
ONNX_PACKAGE = "onnxscript"  # which torch.onnx needs; it brings the package onnx


class AnyLength(nn.Module):
    """The student for torch.export, which takes sizes of 1 for constants.

    It pads every sentence, so that T' is 3 at least, and cuts the padding off again.
    """

    PADDED_FRAMES = 2  # output frames

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, features, lengths):
        """Return what Student.forward returns, for any B and T."""
        padding = self.PADDED_FRAMES * self.student.temporal_stride
        padded = F.pad(features, (0, 0, 0, padding))  # [B, T + padding, D]
        logits, lengths = self.student(padded, lengths)
        # With the frames innermost in memory the cut has one layout for every T';
        # export refuses another one at T' = 1.
        logits = logits.mT.contiguous().mT
        return logits[:, : -self.PADDED_FRAMES], lengths


def make_program(student):
    """Return a student as a torch.export.ExportedProgram for any B and T."""
    student.requires_grad_(False)
    example = (torch.randn(2, 40, len(student.feature_mean)), torch.tensor([40, 25]))
    batch = torch.export.Dim("batch")
    frames = torch.export.Dim("frames")
    program = torch.export.export(
        AnyLength(student),
        example,
        dynamic_shapes=({0: batch, 1: frames}, {0: batch}),
    )
    for node in program.graph.nodes:  # a file for others holds no paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def write_pt2(program, description, file):
    """Write a program and its description, which is text, for torch.export.load."""
    extra_files = {DESCRIPTION_NAME: description}
    torch.export.save(program, file, extra_files=extra_files)


def write_onnx(program, description, file):
    """Write a program and its description, which is text, as an ONNX model."""
    with without_log():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["features", "lengths"],
            output_names=["logits", "output_lengths"],
            # Names of the axes for those who read the file.
            dynamic_shapes=({0: "batch", 1: "frames"}, {0: "batch"}),
        )
    model = onnx_program.model_proto
    model.metadata_props.add(key=DESCRIPTION_NAME, value=description)
    file.write(model.SerializeToString())


@contextlib.contextmanager
def without_log():
    """Hide warnings, also those of packages that write them to Python's log.

    torch.onnx logs which packages it would also know, such as torchvision.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# Suffix of a file -> the format's name, and the function that writes it.
EXPORT_FORMATS = {
    ".pt2": ("torch.export", write_pt2),
    ".onnx": ("ONNX", write_onnx),
}


def export_student(checkpoint, path, adapt_to=None):
    """Write a best_student.pth as a program that needs no file of this project.

    It takes raw features [B, T, D] float32 and lengths [B] int64 of any B and T, and
    returns what Student.forward returns. With it go vocabulary, feature_dim and
    temporal_stride, as JSON by the name of student.json.

    Args:
        checkpoint: path of the student's checkpoint.
        path: of the file to write, whose suffix is one of EXPORT_FORMATS.
        adapt_to: files for teacher.adapt_to_signer, None for none.

    Returns:
        {"checkpoint": ..., "export": ...}.
    """
    student, content = teacher.load_model(checkpoint, Student)
    if adapt_to is not None:
        teacher.adapt_to_signer(student, adapt_to, Config(device="cpu"))
    description = {
        "vocabulary": content["vocabulary"],
        "feature_dim": len(student.feature_mean),
        "temporal_stride": student.temporal_stride,
    }
    name, write = EXPORT_FORMATS[Path(path).suffix]
    program = make_program(student)
    adapt.write_file(path, functools.partial(write, program, json.dumps(description)))
    print(f"{checkpoint} as a program of {name}: {path}")
    return {"checkpoint": str(checkpoint), "export": str(path)}


# ------------------------------------------------------------ training


@dataclass(frozen=True)
class Config(teacher.TrainingConfig):
    """Every setting of a student's training run: name, default, unit and meaning.

    The program's flags have the same names and take their defaults from here. What has
    no flag comes from the teacher: temporal_stride, centre_sentences, teacher_sha256.
    """

    output_dir: str = "checkpoints/student"  # for checkpoints, log and picture
    learning_rate: float = 2e-3  # AdamW's, at its maximum
    dropout: float = DROPOUT  # share of values dropped in front of the classifier
    speed_std: float = 0.5  # of the logarithm of the speed, see teacher.augment
    gain_std: float = 0.25  # of the logarithm of each feature's factor, see there
    channels: int = CHANNELS  # of its blocks
    teacher_checkpoint: str = "checkpoints/teacher/best_i3d.pth"  # or another
    teacher_sha256: str | None = None  # of that file, set when the run begins
    temperature: float = 4.0  # of teacher and student in kd_loss
    alpha: float = 0.7  # weight of kd_loss; CTC has 1 - alpha
    no_baseline: bool = False  # do not train the student without the teacher
    export: str | None = None  # write the student as a .pt2 or .onnx file


def train_student(config, data, teacher_model, resumed=None):
    """Train a student, by CTC alone where alpha is 0.

    Args:
        config: a Config.
        data: a teacher.Data.
        teacher_model: the trained I3DTeacher; at alpha 0 it is not used.
        resumed: the content of the last.pth to continue from.

    Returns:
        The path of the best checkpoint.
    """
    student = teacher.make_model(Student, data, config).to(config.device)
    layers = [name for name, _ in student.named_children()]
    schedule = freeze.UnfreezeSchedule(layers, config.epochs, 1, None)
    loss_function = teacher.ctc_loss
    if config.alpha > 0:
        loss_function = functools.partial(
            distillation_loss,
            teacher_model=teacher_model,
            alpha=config.alpha,
            temperature=config.temperature,
        )
    teacher.train(student, data, schedule, config, loss_function, resumed)
    return best_student(config.output_dir)


def best_student(folder):
    """Return the path of a run's best checkpoint."""
    return Path(folder, teacher.BEST_CHECKPOINT["student"])


def train_baseline(config, data, resuming):
    """Train the student without the teacher, in the folder alone/.

    Args:
        config: the student's Config.
        data: a teacher.Data.
        resuming: whether an unfinished run there is continued.

    Returns:
        The path of the best checkpoint.
    """
    print("The baseline: the same student without the teacher")
    folder = Path(config.output_dir, "alone")
    config = dataclasses.replace(config, alpha=0.0, output_dir=str(folder))
    last_path = folder / teacher.LAST_CHECKPOINT
    resumed = None
    if resuming and teacher.in_first_process(last_path.exists):
        _, resumed = teacher.load_model(last_path, Student)
    return train_student(config, data, None, resumed)


def load_teacher(config):
    """Read the teacher that a student is distilled from.

    Args:
        config: the student's Config.

    Returns:
        The teacher in evaluation mode, on the config's device; the content of its
        checkpoint; and the config with what the student takes over: the teacher's data
        where it names none, the temporal stride, so that their output frames line up,
        centre_sentences, and the SHA-256 of the file.

    Raises:
        ValueError: a file that is missing, no teacher's, or another one than that of
            the run that is resumed; or data that have moved.
    """
    source = Path(config.teacher_checkpoint)
    if not source.is_file():
        raise ValueError(
            f"{source}: no such file, expected a teacher's checkpoint: run teacher.py "
            f"first, or name one by --teacher_checkpoint"
        )
    teacher_sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    if config.teacher_sha256 not in (None, teacher_sha256):
        raise ValueError(
            f"{source}: not the teacher that this run began with, expected the same "
            f"file, or another --output_dir for another run"
        )
    teacher_model, checkpoint = teacher.load_model(source, teacher.I3DTeacher)
    config = teacher.with_data_of(config, checkpoint, source)
    config = dataclasses.replace(
        config,
        teacher_sha256=teacher_sha256,
        temporal_stride=teacher_model.temporal_stride,
        centre_sentences=teacher_model.centre_sentences,
    )
    return teacher_model.to(config.device), checkpoint, config


def distill(config, resumed=None):
    """Distill a student from a teacher's checkpoint, on the teacher's data.

    Args:
        config: a Config; see load_teacher for what it takes over from the teacher.
        resumed: the content of the last.pth to continue from.

    Returns:
        What report returns.

    Raises:
        ValueError: files that are missing, broken or do not fit each other.
    """
    source = Path(config.teacher_checkpoint)
    teacher_model, checkpoint, config = load_teacher(config)
    teacher.refuse_unwritable(config.output_dir, f"--output_dir {config.output_dir}")
    refuse_teachers_folder(source, config.output_dir)
    data = teacher.read_data(
        config.data_dir,
        checkpoint["vocabulary"],
        len(teacher_model.feature_mean),
        config.clean_annotations,
    )
    teacher.describe_data(data)
    with teacher.lock(config.output_dir):
        if resumed is None:
            # A later --resume continues alone/last.pth, so that of an earlier run must
            # not stay there.
            alone = Path(config.output_dir, "alone")
            teacher.in_first_process(teacher.move_earlier_files_aside, alone)
        models = {
            "teacher": (teacher.I3DTeacher, source),
            "student": (Student, train_student(config, data, teacher_model, resumed)),
        }
        if config.alpha > 0 and not config.no_baseline:
            baseline_path = train_baseline(config, data, resumed is not None)
            models["baseline"] = (Student, baseline_path)
        result = teacher.in_first_process(report, models, data, config)
        if config.export is not None:
            path = best_student(config.output_dir)
            teacher.in_first_process(export_student, path, config.export)
    return result


def refuse_teachers_folder(source, output_dir):
    """Raise ValueError where the student's files would lie among the teacher's."""
    folder = Path(output_dir).resolve()
    if source.resolve().parent in (folder, folder / "alone"):
        raise ValueError(
            f"--output_dir {output_dir}: {source.name} is there, expected another "
            f"folder"
        )


# ------------------------------------------------------------ reporting

TIMED_SENTENCES = 50  # at most, whose time is taken
PASSES = 5  # over these sentences


def report(models, data, config):
    """Print size, speed and WER of checkpoints side by side.

    The WER is on test, else on dev, which also chose each model's epoch; with
    config.overfit it is on the sentences that were trained on.

    Args:
        models: name -> (class, path of the checkpoint).
        data: a teacher.Data.
        config: a Config.

    Returns:
        name -> what was found, a dict.
    """
    split = "test" if "test" in data.splits else "dev"
    sentences = data.splits[split]
    if config.overfit is not None:
        split = "train"
        sentences, _ = teacher.select_sentences(data, config)
    wer_key = f"{split}_wer"
    found = {}
    print()
    print(
        f"{'':<10}{'parameters':>12}{'file':>10}{'ms per sentence':>17}"
        f"{split + ' WER':>11}"
    )
    for name, (model_class, path) in models.items():
        model, _ = teacher.load_model(path, model_class)
        bytes_of_file = path.stat().st_size
        milliseconds = time_per_sentence(model, sentences, data.vocabulary, config)
        model.to(config.device)
        evaluation = teacher.recognise(model, sentences, data.vocabulary, config)
        found[name] = {
            "checkpoint": str(path),
            "bytes": bytes_of_file,
            "parameters": count_parameters(model),
            "milliseconds": milliseconds,
            wer_key: evaluation.errors.wer,
        }
        print(
            f"{name:<10}{found[name]['parameters']:>12,}{bytes_of_file / 1e6:>7.1f} MB"
            f"{milliseconds:>17.2f}{evaluation.errors.wer:>11.2%}"
        )
    if "baseline" in found and found["baseline"][wer_key] > 0:
        gain = 1 - found["student"][wer_key] / found["baseline"][wer_key]
        direction = "fewer" if gain >= 0 else "more"
        print(
            f"Distillation: {abs(gain):.0%} {direction} errors than the baseline, the "
            f"same student without the teacher"
        )
    return found


def count_parameters(model):
    """Return the number of parameters, without those of the heads of training."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "classifier.projections" not in name
    )


@torch.inference_mode()
def time_per_sentence(model, sentences, vocabulary, config):
    """Return milliseconds per sentence on one CPU thread, one sentence at a time."""
    alone = dataclasses.replace(config, batch_size=1, num_workers=0)
    timed = sentences[:TIMED_SENTENCES]
    batches = list(teacher.make_loader(timed, vocabulary, alone))
    timer = Timer(
        "for batch in batches: model(batch.features, batch.lengths)",
        globals={"model": model, "batches": batches},
        num_threads=1,
    )
    return 1000 / len(timed) * timer.timeit(PASSES).mean


# ------------------------------------------------------------ the program


def make_parser():
    """Return the parser of distill.py's flags."""
    parser, _ = teacher.make_shared_parser("distill.py", __doc__.split("\n")[0])
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher_checkpoint",
        type=os.path.abspath,
        metavar="FILE",
        help="best_i3d.pth of teacher.py",
    )
    group.add_argument(
        "--temperature",
        type=teacher.number(float, 0.01, 1000),
        help="of teacher and student in the distillation loss",
    )
    group.add_argument(
        "--alpha",
        type=teacher.number(float, 0, 1),
        help="weight of the distillation loss; that of CTC is 1 - alpha",
    )
    group.add_argument(
        "--channels",
        type=teacher.number(int, 2, 10**4),
        help="of the student",
    )
    group.add_argument(
        "--no_baseline",
        action="store_true",
        help="do not train the student without the teacher",
    )
    group.add_argument(
        "--export",
        metavar="FILE",
        help="write the student, or --evaluate's checkpoint, as a .pt2 or .onnx file",
    )
    parser.set_defaults(**dataclasses.asdict(Config()))
    return parser


def refuse_export_path(path):
    """Raise ValueError for a path to which no program can be written.

    This is found before the training, not after it.
    """
    path = Path(path)
    if path.suffix not in EXPORT_FORMATS or path.is_dir():
        suffixes = " or ".join(EXPORT_FORMATS)
        raise ValueError(f"--export {path}: expected the name of a {suffixes} file")
    if path.suffix == ".onnx" and importlib.util.find_spec(ONNX_PACKAGE) is None:
        raise ValueError(
            f"--export {path}: an .onnx file needs: pip install {ONNX_PACKAGE}"
        )
    teacher.refuse_unwritable(path.absolute().parent, f"--export {path}")


def run_distill(args, resumed):
    """Do what the flags of distill.py ask for; return what --json prints."""
    config = teacher.config_from(args, Config)
    if args.export is not None:
        if args.predict is not None:
            raise ValueError("--export goes without --predict")
        refuse_export_path(args.export)
    if args.evaluate is not None and args.export is not None:
        return teacher.in_first_process(
            export_student, args.evaluate, args.export, args.adapt_to
        )
    if args.evaluate is not None or args.predict is not None:
        return teacher.run_checkpoint(args, Student, config)
    return distill(config, resumed)


def main(argv=None):
    """Run the program; argv as in sys.argv[1:]."""
    teacher.run_program(make_parser(), argv, Student, run_distill)


if __name__ == "__main__":
    if sys.stdout is not None:  # glosses that a terminal cannot print are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
