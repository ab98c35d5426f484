"""The student: a network for a phone, distilled from the teacher.

    $ python distill.py                        # from checkpoints/teacher/best_i3d.pth, on its data
    $ python distill.py --teacher_checkpoint best_i3d.pth --temperature 4.0 --alpha 0.7
    $ python distill.py --export student.pt2   # also write the student with torch.export
    $ python distill.py --evaluate checkpoints/student/best_student.pth --split test
    $ python distill.py --predict recording.npy another.npy

The student learns from the glosses (CTC) and from what the teacher says of every frame (Hinton et
al. 2015, arXiv 1503.02531, section 2); then the same student is trained without the teacher, so
that the gain is a number. What a run writes lies in --output_dir: best_student.pth, last.pth,
log.jsonl and curves.svg, the same of the student without the teacher in its folder `alone/`.

Axes as in teacher.py: B sentences, T frames, T' frames after temporal_stride, D features,
C channels, V classes with the CTC blank as class 0.
"""

import dataclasses
import functools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import teacher
from teacher import option

LAYERS = ("stem", "halvings", "blocks", "norm", "classifier")
KERNEL = 9                        # frames that a block's convolution sees
DILATIONS = (1, 1, 2, 2, 4, 4)    # one block each: spacing of those frames
EXPANSION = 2                     # hidden channels of a block over its channels
BLOCK_DROPOUT = 0.1               # share of a block's changes dropped in training
TIMED, PASSES = 50, 5             # sentences whose time is taken, and how often


# ---------------------------------------------------------------- configuration

@dataclass
class StudentConfig(teacher.TrainingConfig):
    """The student's. run_distillation takes data_dir and temporal_stride from the teacher."""

    layers, checkpoint = LAYERS, "best_student.pth"

    data_dir: str = option("", "corpus directory (default: the teacher's)")
    output_dir: str = option("checkpoints/student", "where checkpoints, log and picture go")
    temporal_stride: int = option(0, "frames of the input a frame of the output (default: the "
                                  "teacher's, and no other will do)")
    learning_rate: float = option(2e-3, "AdamW's maximum, after warm-up and before cosine decay",
                                  teacher.ABOVE_0)
    dropout: float = option(0.3, "share of values dropped before the classifier",
                            teacher.BELOW_1)
    teacher_checkpoint: str = option(
        "checkpoints/teacher/best_i3d.pth", "best_i3d.pth of teacher.py", metavar="FILE")
    temperature: float = option(4.0, "of teacher and student in the distillation loss",
                                teacher.ABOVE_0)
    alpha: float = option(0.7, "weight of the distillation loss, 1 - alpha of CTC",
                          (lambda value: 0 <= value <= 1, "0 to 1"))
    blank_threshold: float = option(
        0.5, "frames that the teacher gives a higher probability of blank teach nothing",
        (lambda value: 0 < value <= 1, "above 0 and at most 1"))
    channels: int = option(128, "of the student", teacher.at_least(2, 10 ** 4))

    def __post_init__(self):
        super().__post_init__()
        self.teacher_checkpoint = str(Path(self.teacher_checkpoint).resolve())

    @property
    def loss_name(self):
        return "train: distillation and CTC, dev: CTC" if self.alpha else super().loss_name


# ---------------------------------------------------------------- losses

def kd_loss(student_logits, teacher_logits, lengths, temperature, blank_threshold=1.0):
    """T^2 * KL(teacher || student) at temperature T, in nats a frame (Hinton et al. 2015).

    student_logits, teacher_logits: [B, T', V]. lengths: [B] valid frames. Summed over classes,
    mean over the valid frames of the batch, so neither padding nor how sentences are batched
    together changes what a frame counts. T^2 keeps the gradient's size from depending on T.
    blank_threshold: frames to which the teacher gives the blank a higher probability (at T = 1)
    are left out, of sum and mean; 1 leaves out none (Hilmes et al. 2025, arXiv 2506.01503).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of student {list(student_logits.shape)} and teacher "
                         f"{list(teacher_logits.shape)}, expected the same frames and classes")
    valid = frame_mask(lengths, student_logits.shape[1], student_logits.device)
    student_logits, teacher_logits = student_logits[valid].float(), teacher_logits[valid].float()
    divergence = F.kl_div((student_logits / temperature).log_softmax(dim=1),
                          (teacher_logits / temperature).log_softmax(dim=1), reduction="none",
                          log_target=True).sum(dim=1)                       # [N] valid frames
    kept = teacher_logits.softmax(dim=1)[:, 0] <= blank_threshold
    return temperature ** 2 * (divergence * kept).sum() / kept.sum().clamp(min=1)


def frame_mask(lengths, frames, device):
    """[B], T -> [B, T] on the device, true for the frames before each sentence's end."""
    return torch.arange(frames, device=device) < lengths.to(device)[:, None]


def distillation_loss(teacher_model, config):
    """loss(student, batch) = alpha * kd_loss + (1 - alpha) * CTC in nats a gloss, for train().

    The teacher is a closed-over function, neither part of the student nor known to an optimizer:
    in evaluation mode, without gradients, on the same augmented features as the student.
    """
    def loss(student, batch):
        """Scalar; CTC alone where alpha is 0, without asking the teacher."""
        logits, lengths = student(batch.features, batch.lengths)
        ctc = teacher.ctc_losses(logits, lengths, batch).mean()
        if config.alpha == 0:
            return ctc
        with torch.no_grad():
            teacher_logits, _ = teacher_model(batch.features, batch.lengths)
        kd = kd_loss(logits, teacher_logits, lengths, config.temperature, config.blank_threshold)
        return config.alpha * kd + (1 - config.alpha) * ctc
    return loss


# ---------------------------------------------------------------- the network

class BatchNorm(teacher.freeze.BatchNorm1d):
    """nn.BatchNorm1d over frames: [B, T, C], mask [B, T] -> [B, T, C].

    In training the statistics are of the valid frames alone, however far a batch is padded.
    """

    def forward(self, frames, mask):
        if not self.training:
            return super().forward(frames.flatten(0, 1)).view_as(frames)
        normalised = torch.zeros_like(frames)
        normalised[mask] = super().forward(frames[mask])
        return normalised


def depthwise(convolution, frames, mask):
    """[B, T, C] -> [B, T', C]. Frames past a sentence's end read as zeros, like all padding."""
    return convolution((frames * mask[:, :, None]).transpose(1, 2)).transpose(1, 2)


class Halving(nn.Module):
    """A depthwise-separable convolution of stride 2: [B, T, C] -> [B, ceil(T / 2), C']."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.depthwise = nn.Conv1d(inputs, inputs, 5, stride=2, padding=2, groups=inputs)
        self.pointwise = nn.Linear(inputs, outputs, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, frames, mask, after):
        """mask, after: the valid frames of what comes in and of what goes out."""
        frames = self.pointwise(depthwise(self.depthwise, frames, mask))
        return F.relu(self.norm(frames, after))


class Block(nn.Module):
    """An inverted residual: depthwise convolution over time, then wide and narrow over channels.

    MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381) in the order of ConvNeXt's
    (Liu et al. 2022, arXiv 2201.03545, section 2.6).
    """

    def __init__(self, channels, dilation):
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, KERNEL, padding=dilation * (KERNEL // 2),
                                   dilation=dilation, groups=channels)
        self.norm = BatchNorm(channels)
        self.widen = nn.Linear(channels, EXPANSION * channels)
        self.narrow = nn.Linear(EXPANSION * channels, channels)

    def forward(self, frames, mask):
        change = self.norm(depthwise(self.depthwise, frames, mask), mask)   # [B, T', C]
        change = self.narrow(F.relu(self.widen(change)))
        return frames + F.dropout(change, BLOCK_DROPOUT, self.training)


class Student(nn.Module):
    """Convolutions over time alone, separable as in QuartzNet (Kriman et al. 2020, 1910.10261).

    No recurrent layer: torch.export unrolls nn.LSTM and nn.GRU for one length (pytorch#115092),
    and the dilated blocks see 113 encoder frames.
    """

    def __init__(self, feature_dim, num_classes, temporal_stride, channels=StudentConfig.channels,
                 dropout=StudentConfig.dropout):
        super().__init__()
        teacher.check_stride(temporal_stride)
        self.feature_dim, self.temporal_stride = feature_dim, temporal_stride
        self.dropout = dropout
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.stem = nn.Linear(feature_dim, channels // 2)
        widths = [channels // 2] + [channels] * (temporal_stride.bit_length() - 1)
        self.halvings = nn.ModuleList(map(Halving, widths, widths[1:]))
        self.blocks = nn.ModuleList(Block(channels, dilation) for dilation in DILATIONS)
        self.norm = BatchNorm(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, features, lengths):
        """[B, T, D], [B] -> (logits [B, T', V], lengths' [B]); what lies past lengths' is noise."""
        frames = self.stem(teacher.standardised(features, self))
        mask = frame_mask(lengths, frames.shape[1], frames.device)
        for halving in self.halvings:
            lengths = (lengths + 1) // 2
            after = frame_mask(lengths, (frames.shape[1] + 1) // 2, frames.device)
            frames, mask = halving(frames, mask, after), after              # [B, T', C]
        for block in self.blocks:
            frames = block(frames, mask)
        frames = F.dropout(self.norm(frames, mask), self.dropout, self.training)
        return self.classifier(frames), lengths


class AnyLength(nn.Module):
    """The student for torch.export, which takes sizes of 1 for constants: T' is 3 at least."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, features, lengths):
        padded = F.pad(features, (0, 0, 0, 2 * self.student.temporal_stride))
        logits, lengths = self.student(padded, lengths)
        # Laid out with frames innermost, as only then the cut leaves the exporter no question.
        return logits.mT.contiguous().mT[:, :-2], lengths


def load_student(path, device="cpu"):
    """(Student in evaluation mode, its checkpoint) of a best_student.pth or last.pth."""
    def build(config, feature_dim, num_classes):
        return Student(feature_dim, num_classes, config.temporal_stride, config.channels,
                       config.dropout)
    return teacher.load_model(path, build, StudentConfig, device)


def export_student(model, path):
    """Write torch.export's program of the student: (features [B, T, D], lengths [B]) of any B, T.

    features: float32, as they are in the files (standardising is inside). lengths: int64. Returns
    what Student.forward does. OSError where path cannot be written.
    `torch.export.load(path).module()(features, lengths)` runs it without this project.
    """
    lengths = torch.tensor([40, 25])
    features = torch.randn(2, 40, model.feature_dim)
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    dynamic = ({0: batch, 1: frames}, {0: batch})
    program = torch.export.export(AnyLength(model.cpu().eval()), (features, lengths),
                                  dynamic_shapes=dynamic)
    teacher.adapt.write_file(path, lambda file: torch.export.save(program, file))


# ---------------------------------------------------------------- the program

def read_teacher(path, device):
    """As load_teacher; ValueError where the file is a student's."""
    if "teacher_checkpoint" in teacher.load_checkpoint(path, teacher.Config)["config"]:
        raise ValueError(f"{path}: a student's checkpoint, expected a teacher's best_i3d.pth")
    return teacher.load_teacher(path, device)


def train_student(config, data, teacher_model, device, resume):
    """Train a student, or go on training it. Returns the best epoch's log row."""
    torch.manual_seed(config.seed)
    student = Student(len(data.mean), len(data.vocabulary), config.temporal_stride,
                      config.channels, config.dropout)
    student.feature_mean.copy_(data.mean)
    student.feature_std.copy_(data.std)
    last, path = None, Path(config.output_dir) / "last.pth"
    if resume and path.exists():
        student, last = load_student(path)
    return teacher.train(student.to(device), data, config, device, last=last,
                         loss_function=distillation_loss(teacher_model, config))


def run_distillation(given, resume, export=None, no_baseline=False):
    """Train the student with and without its teacher and compare. Returns what --json prints."""
    folder = teacher.writable_folder(given, StudentConfig)
    if resume:
        _, last = load_student(folder / "last.pth")
        config = teacher.resumed_config(given, last, folder / "last.pth", StudentConfig)
        given = dataclasses.asdict(config)
    path = given.get("teacher_checkpoint", StudentConfig.teacher_checkpoint)
    device = teacher.pick_device(given.get("device", StudentConfig.device))
    teacher_model, checkpoint = read_teacher(path, device)
    if Path(path).resolve().parent == folder.resolve():
        raise ValueError(f"--output_dir {folder}: {path} is there, expected another directory, so "
                         f"that the teacher's files stay")
    own = {"data_dir": checkpoint["config"].get("data_dir", ""),
           "temporal_stride": teacher_model.temporal_stride}
    config = StudentConfig(**{**own, **given})
    if config.temporal_stride != teacher_model.temporal_stride:
        raise ValueError(f"--temporal_stride {config.temporal_stride}: {path} was trained with "
                         f"{teacher_model.temporal_stride}, expected the same, so that the frames "
                         f"of teacher and student line up")
    data = teacher.read_data(config.data_dir, checkpoint["vocabulary"], teacher_model.feature_dim)
    teacher.describe_data(data, config.data_dir)
    print(f"Student of {path}, temperature {config.temperature}, alpha {config.alpha}")
    if not resume:
        teacher.move_aside(folder / "alone")  # or --resume might take it for this run's
    train_student(config, data, teacher_model, device, resume)
    rows = {"teacher": (teacher.load_teacher, Path(path)),
            "student": (load_student, folder / config.checkpoint)}
    if config.alpha and not no_baseline:
        print("The same student without the teacher, to see what the teacher is worth")
        alone = dataclasses.replace(config, alpha=0.0, output_dir=str(folder / "alone"))
        train_student(alone, data, teacher_model, device, resume)
        rows["student without teacher"] = (load_student, folder / "alone" / config.checkpoint)
    result = report(rows, data, device)
    if export:
        run_export(folder / config.checkpoint, export)
    return result


def report(files, data, device):
    """Print size, speed and WER of models side by side; the same as a dict.

    files: name -> (what loads it, path of the checkpoint). WER on test, or on dev where there
    is no test split; dev also chose each model's epoch.
    """
    split = "test" if "test" in data.corpus else "dev"
    models = {name: load(path)[0] for name, (load, path) in files.items()}
    speeds = milliseconds(models, data.corpus[split][:TIMED], data)
    rows = {}
    print(f"\n{'':<24}{'parameters':>11}{'file':>10}{'ms a sentence':>15}{split + ' WER':>10}")
    for name, model in models.items():
        errors, _, _ = teacher.evaluate(model.to(device), data.corpus[split], data.vocabulary,
                                        device)
        path = files[name][1]
        rows[name] = {"checkpoint": str(path), "bytes": path.stat().st_size,
                      "parameters": sum(p.numel() for p in model.parameters()),
                      "milliseconds": speeds[name], f"{split}_wer": errors.wer}
        print(f"{name:<24}{rows[name]['parameters']:>11,}{rows[name]['bytes'] / 1e6:>7.1f} MB"
              f"{speeds[name]:>15.2f}{100 * errors.wer:>9.2f}%")
    print(f"(milliseconds: one CPU thread, one sentence at a time, mean over "
          f"{len(data.corpus[split][:TIMED])} sentences, median of {PASSES} passes)")
    if alone := rows.get("student without teacher", {}).get(f"{split}_wer"):
        gain = 1 - rows["student"][f"{split}_wer"] / alone
        print(f"Distillation: {abs(gain):.0%} {'fewer' if gain >= 0 else 'more'} errors than the "
              f"student makes without the teacher")
    return rows


def milliseconds(models, sentences, data):
    """{name: milliseconds a sentence}, all models in turn so that they meet the same machine."""
    threads, times = torch.get_num_threads(), {name: [] for name in models}
    inputs = list(teacher.batches(sentences, data.vocabulary, 1, len(data.mean)))
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(PASSES):
            for name, model in models.items():
                started = time.perf_counter()
                for batch in inputs:
                    model(batch.features, batch.lengths)
                times[name].append(1000 * (time.perf_counter() - started) / len(inputs))
    torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def run_export(checkpoint, path):
    model, _ = load_student(checkpoint)
    export_student(model, Path(path))
    print(f"{checkpoint} as a program of torch.export: {path}")
    return {"checkpoint": str(checkpoint), "export": str(path)}


def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser, _ = teacher.make_parser("distill.py", __doc__.split("\n")[0], StudentConfig)
    parser.add_argument("--export", metavar="FILE", help="write the best student, or that of "
                        "--evaluate, with torch.export (.pt2)")
    parser.add_argument("--no_baseline", action="store_true",
                        help="do not train the student without the teacher")

    def function(given):
        """What the flags ask for; returns what --json prints."""
        export, no_baseline = given.pop("export"), given.pop("no_baseline")
        training = given["evaluate"] is None and not given["predict"]
        if no_baseline and not training:
            raise ValueError("--no_baseline: a flag of training, expected without --evaluate and "
                             "--predict")
        if export is not None and (Path(export).suffix != ".pt2" or Path(export).is_dir()):
            raise ValueError(f"--export {export}: expected a file name that ends in .pt2")
        if training or export is None:
            return teacher.run(given, StudentConfig, load_student, functools.partial(
                run_distillation, export=export, no_baseline=no_baseline))
        if unused := teacher.flags_given(given) - {"evaluate"}:
            raise ValueError(f"--{min(unused)}: expected --evaluate and --export without it")
        return run_export(given["evaluate"], export)
    teacher.run_program(parser, argv, function)


if __name__ == "__main__":
    main()
