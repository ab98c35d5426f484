"""The student: a network for a phone, distilled from the teacher.

    $ python distill.py                        # from checkpoints/teacher/best_i3d.pth, on its data
    $ python distill.py --teacher_checkpoint best_i3d.pth --export student.pt2

The student learns from the glosses (CTC) and from the teacher's output for every frame (Hinton et
al. 2015, arXiv 1503.02531, section 2). The baseline, the same student trained without the teacher,
is trained after it, so that the gain is a number; its files lie in the folder `alone/`. Axes as in
teacher.py: B sentences, T frames, T' after temporal_stride, D features, C channels, V classes.
"""

import argparse
import itertools
import json
import os
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import adapt
import freeze
import teacher

KERNEL = 9                        # frames that a block's convolution sees
DILATIONS = (1, 1, 2, 2, 4, 4)    # one block each: spacing of those frames
EXPANSION = 2                     # hidden channels of a block over its channels
BLOCK_DROPOUT = 0.1               # share of a block's changes dropped in training
CHANNELS, DROPOUT = 128, 0.3      # defaults of network and flags
TIMED, PASSES = 50, 5             # sentences whose time is taken, and how often

# ---------------------------------------------------------------- losses
def kd_loss(student_logits, teacher_logits, lengths, temperature):
    """T^2 * KL(teacher || student) at temperature T, in nats per frame (Hinton et al. 2015).
    student_logits, teacher_logits: [B, T', V]. lengths: [B]. Summed over classes, mean over the
    batch's valid frames: no padding counts. T^2 keeps the gradient's size from depending on T."""
    if student_logits.shape != teacher_logits.shape or lengths.max() > student_logits.shape[1]:
        raise ValueError(f"logits {list(student_logits.shape)} and {list(teacher_logits.shape)}, "
                         f"lengths to {lengths.max()}, expected equal [B, T', V], lengths to T'")
    padding = ~frame_mask(lengths, student_logits.shape[1], student_logits.device)[:, :, None]
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    student, taught = (  # [B, T', V]; both are uniform in the padding, where their divergence is 0
        (logits.masked_fill(padding, 0) / temperature).log_softmax(dim=2, dtype=precise)
        for logits in (student_logits, teacher_logits))
    total = F.kl_div(student, taught, reduction="sum", log_target=True)
    return temperature ** 2 * freeze.batch_mean(total, int(lengths.sum()))

def frame_mask(lengths, frames, device):
    """[B], T -> [B, T] on the device, true for the frames before each sentence's end."""
    return torch.arange(frames, device=device) < lengths.to(device, non_blocking=True)[:, None]

def distillation_loss(student, batch, teacher_model, args):
    """alpha * kd_loss + (1 - alpha) * CTC in nats per gloss; at alpha 0 CTC alone. The teacher is
    no part of the student and known to no optimizer: it is in evaluation mode, without gradients,
    and sees the same augmented features."""
    logits, lengths = student(batch.features, batch.lengths)
    losses = teacher.ctc_losses(logits, lengths, batch)
    ctc = freeze.batch_mean(losses.sum(), len(losses))
    if args.alpha == 0:
        return ctc
    with torch.no_grad():
        teacher_logits, _ = teacher_model(batch.features, batch.lengths)
    kd = kd_loss(logits, teacher_logits, lengths, args.temperature)
    return args.alpha * kd + (1 - args.alpha) * ctc

# ---------------------------------------------------------------- the network
class BatchNorm(freeze.BatchNorm1d):
    """nn.BatchNorm1d over frames: [B, T, C], mask [B, T] -> [B, T, C].
    In training the statistics are of the valid frames alone, however far a batch is padded."""

    def forward(self, frames, mask):
        return super().forward(frames.flatten(0, 1), mask.flatten()).view_as(frames)

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
    MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381) in the order of ConvNeXt's (Liu et
    al. 2022, arXiv 2201.03545, section 2.6)."""

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
    """Convolutions over time alone, separable as in QuartzNet (Kriman et al. 2020, 1910.10261). No
    recurrent layer: torch.export unrolls nn.LSTM and nn.GRU for one length (pytorch#115092); the
    dilated blocks see 113 encoder frames. temporal_stride: 2, 4 or 8."""

    kind, options = "student", ("temporal_stride", "channels", "dropout")

    def __init__(self, feature_dim, num_classes, temporal_stride, channels=CHANNELS,
                 dropout=DROPOUT):
        super().__init__()
        self.temporal_stride, self.dropout = temporal_stride, dropout
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
        frames = self.stem(teacher.standardise(features, self))
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
        # Frames innermost: else the cut's layout is another one at T' = 1, which export refuses.
        return logits.mT.contiguous().mT[:, :-2], lengths

def export_student(checkpoint, path):
    """Write torch.export's program of a best_student.pth: (features [B, T, D] float32, raw, lengths
    [B] int64) of any B and T -> what Student.forward returns. It runs without this project, see
    README, and carries student.json: vocabulary, feature_dim, temporal_stride."""
    model, content = adapt.load_model(checkpoint, Student)
    about = {"vocabulary": content["vocabulary"], "feature_dim": len(model.feature_mean),
             "temporal_stride": model.temporal_stride}
    model.requires_grad_(False)
    arguments = torch.randn(2, 40, len(model.feature_mean)), torch.tensor([40, 25])
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    program = torch.export.export(AnyLength(model), arguments,
                                  dynamic_shapes=({0: batch, 1: frames}, {0: batch}))
    adapt.write_file(path, lambda file: torch.export.save(
        program, file, extra_files={"student.json": json.dumps(about)}))
    print(f"{checkpoint} as a program of torch.export: {path}")
    return {"checkpoint": str(checkpoint), "export": str(path)}

# ---------------------------------------------------------------- the program
def train_student(args, data, teacher_model, last):
    """Train, or resume training from last, into --output_dir. Path of the best checkpoint."""
    student = teacher.make_model(Student, data, args).to(args.device)
    schedule = freeze.UnfreezeSchedule([*dict(student.named_children())], args.epochs, 1, None)
    loss = partial(distillation_loss, teacher_model=teacher_model, args=args)
    teacher.train(student, data, args, schedule, loss, last)
    return Path(args.output_dir, teacher.BEST["student"])

def distill(args, last):
    """What the flags of distill.py ask for. Returns what --json prints."""
    if args.export and (args.predict or args.ctm or args.picture or args.export[-4:] != ".pt2"):
        raise ValueError(f"--export {args.export}: expected a .pt2, no --predict, --ctm, --picture")
    if args.export and args.evaluate is not None:
        return export_student(args.evaluate, args.export)
    if args.predict or args.evaluate is not None:
        return freeze.in_first(lambda: teacher.run_checkpoint(args, Student))
    folder, source = Path(args.output_dir), Path(args.teacher_checkpoint)
    teacher_model, checkpoint = adapt.load_model(source, teacher.I3DTeacher)
    if source.resolve().parent in (folder.resolve(), folder.resolve() / "alone"):
        raise ValueError(f"--output_dir {folder}: {source.name} is there, expected another folder")
    args.temporal_stride = teacher_model.temporal_stride  # so that their frames line up
    args.data_dir = args.data_dir or checkpoint["config"]["data_dir"]
    args.clean_annotations = args.clean_annotations or checkpoint["config"].get("clean_annotations")
    data = teacher.read_data(args.data_dir, checkpoint["vocabulary"],
                             len(teacher_model.feature_mean), args.clean_annotations)
    teacher.describe_data(data)
    teacher_model.to(args.device)
    with adapt.lock(folder, freeze.processes()[0]):
        if not last:  # or --resume might take it for this run's
            freeze.in_first(lambda: adapt.move_aside(folder / "alone", teacher.RUN_FILES))
        models = {"teacher": (teacher.I3DTeacher, source),
                  "student": (Student, train_student(args, data, teacher_model, last))}
        if args.alpha and not args.no_baseline:
            print("The baseline: the same student without the teacher")
            alone = argparse.Namespace(**vars(args))
            alone.alpha, alone.output_dir = 0.0, f"{folder}/alone"
            path = folder / "alone/last.pth"
            last = last and freeze.in_first(path.exists) and adapt.load_model(path, Student)[1]
            models["baseline"] = Student, train_student(alone, data, None, last)
        result = freeze.in_first(lambda: report(models, data, args))
        if args.export:
            freeze.in_first(lambda: export_student(models["student"][1], args.export))
    return result

@torch.inference_mode()
def report(models, data, args):
    """Print size, speed and WER of checkpoints side by side; the same as a dict.
    models: name -> (class, path). WER on test, else on dev, which also chose each model's epoch.
    Time: one CPU thread, one sentence at a time."""
    split, rows = "test" if "test" in data.splits else "dev", {}
    load = partial(teacher.make_loader, data.splits[split], data.vocabulary, len(data.mean))
    timed = [*itertools.islice(load(argparse.Namespace(**{**vars(args), "batch_size": 1})), TIMED)]
    print(f"\n{'':<10}{'parameters':>12}{'file':>10}{'ms per sentence':>17}{split + ' WER':>11}")
    for name, (model_class, path) in models.items():
        model, size = adapt.load_model(path, model_class)[0], path.stat().st_size
        speed = 1000 / len(timed) * Timer(
            "for batch in timed: model(batch.features, batch.lengths)", num_threads=1,
            globals={"model": model, "timed": timed}).timeit(PASSES).mean
        wer = teacher.evaluate(model.to(args.device), load(args), data.vocabulary).errors.wer
        count = sum(p.numel() for part, p in model.named_parameters()
                    if "projection" not in part)  # training's second head
        rows[name] = {"checkpoint": str(path), "bytes": size, "parameters": count,
                      "milliseconds": speed, f"{split}_wer": wer}
        print(f"{name:<10}{count:>12,}{size / 1e6:>7.1f} MB{speed:>17.2f}{wer:>11.2%}")
    if alone := rows.get("baseline", {}).get(f"{split}_wer"):
        gain = 1 - rows["student"][f"{split}_wer"] / alone
        print(f"Distillation: {abs(gain):.0%} {'fewer' if gain >= 0 else 'more'} errors than the "
              f"baseline, the same student without the teacher")
    return rows

def main(argv=None):
    """The program; argv as in sys.argv[1:]."""
    parser, _ = teacher.make_parser("distill.py", __doc__, "checkpoints/student", 2e-3, DROPOUT)
    add = parser.add_argument
    add("--teacher_checkpoint", type=os.path.abspath, metavar="FILE",
        default="checkpoints/teacher/best_i3d.pth", help="best_i3d.pth of teacher.py")
    add("--temperature", type=teacher.number(float, 0.01, 1000), default=4.0,
        help="of teacher and student in the distillation loss")
    add("--alpha", type=teacher.number(float, 0, 1), default=0.7,
        help="weight of the distillation loss, 1 - alpha of CTC")
    add("--channels", type=teacher.number(int, 2, 10 ** 4), default=CHANNELS, help="of the student")
    add("--no_baseline", action="store_true", help="do not train the student without the teacher")
    add("--export", metavar="FILE", help="write the student, or --evaluate's, as a .pt2")
    teacher.run_program(parser, argv, Student, distill)

if __name__ == "__main__":
    main()
