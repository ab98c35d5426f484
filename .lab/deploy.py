"""A student's exports beside the network itself: differences, time, size and WER.

    $ pip install onnxscript onnxruntime
    $ python .lab/deploy.py checkpoints/student/best_student.pth
    $ python .lab/deploy.py best_student.pth --data_dir DIR --output_dir exports

Writes best_student.pt2, best_student.onnx and best_student_int8.onnx. In the last one
the weights of the matrix products are int8, with a scale for each output channel (ONNX
Runtime's dynamic quantisation; the convolutions stay float32, int8 ones are slower). It
is kept if it costs less than half a point of WER.

Each row of the table it prints:

- file: its size.
- ms per sentence: on one CPU thread, one sentence of the dev split at a time.
- difference: the largest one of log probabilities (nats) from the network's, over
  all output frames inside sentences, at every T from 1 to 300 and B from 1 to 4. The
  features are normal, with the mean and the standard deviation of the train split.
- dev WER: of the dev split by greedy decoding. Without --data_dir the corpus is the one
  that the student was trained on.
"""

import argparse
import importlib.util
from pathlib import Path

import lab  # noqa: F401 (puts the project on the path)
import torch

import distill
import teacher
import wer

PACKAGES = ("onnxscript", "onnxruntime")
MAX_FRAMES = 300  # the largest T that is compared
MAX_SENTENCES = 4  # the largest B
MAX_COST = 0.005  # of int8, as a fraction of WER


class OnnxStudent:
    """A student in ONNX Runtime, on one thread, called as the network is."""

    def __init__(self, path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)

    def __call__(self, features, lengths):
        """Return logits [B, T', V] and lengths' [B] as tensors."""
        inputs = {"features": features.numpy(), "lengths": lengths.numpy()}
        logits, output_lengths = self.session.run(None, inputs)
        return torch.from_numpy(logits), torch.from_numpy(output_lengths)


def quantise(path, target):
    """Write an .onnx file with the weights of its matrix products in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with distill.without_log():
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def random_batches(student):
    """Yield (features [B, T, D], lengths [B]) of every T and B that is compared.

    One sentence has T frames, the others 1 to T.
    """
    generator = torch.Generator().manual_seed(0)
    for frames in range(1, MAX_FRAMES + 1):
        for sentences in range(1, MAX_SENTENCES + 1):
            shape = (sentences, frames, len(student.feature_mean))
            features = torch.randn(shape, generator=generator)
            features = student.feature_mean + student.feature_std * features
            lengths = torch.randint(1, frames + 1, (sentences,), generator=generator)
            lengths[-1] = frames
            yield features, lengths


def largest_difference(network, student):
    """Return the largest difference of log probabilities inside sentences, in nats.

    Raises:
        ValueError: logits of another shape, or other lengths.
    """
    largest = 0.0
    for features, lengths in random_batches(student):
        expected, expected_lengths = student(features, lengths)
        logits, output_lengths = network(features, lengths)
        if logits.shape != expected.shape or not output_lengths.equal(expected_lengths):
            raise ValueError(
                f"{list(features.shape)} has logits {list(logits.shape)} and lengths "
                f"{output_lengths.tolist()}, expected {list(expected.shape)} and "
                f"{expected_lengths.tolist()}"
            )
        inside = teacher.frame_mask(expected_lengths, expected.shape[1])  # [B, T']
        difference = logits.log_softmax(dim=2) - expected.log_softmax(dim=2)
        largest = max(largest, difference[inside].abs().max().item())
    return largest


def word_errors(network, sentences, vocabulary, config):
    """Return the WordErrors of a network on sentences, by greedy decoding."""
    hypotheses = []
    for batch in teacher.make_loader(sentences, vocabulary, config):
        logits, lengths = network(batch.features, batch.lengths)
        hypotheses += wer.greedy_decode(logits, lengths, vocabulary)
    return wer.score([sentence.glosses for sentence in sentences], hypotheses)


def read_dev(checkpoint, path, feature_dim, data_dir):
    """Return the dev split's sentences, and the config with which they are loaded."""
    config = distill.Config(data_dir=data_dir, device="cpu", num_workers=0)
    config = teacher.with_data_of(config, checkpoint, path)
    sentences = teacher.read_split(config.data_dir, "dev", config.clean_annotations)
    name = f"{config.data_dir} dev"
    teacher.refuse_foreign_glosses(sentences, checkpoint["vocabulary"], name, path)
    teacher.check_features(sentences, feature_dim)
    return sentences, config


def write_exports(path, folder):
    """Write a checkpoint's exports to a folder; return name -> path."""
    paths = {
        "pt2": folder / f"{path.stem}.pt2",
        "onnx": folder / f"{path.stem}.onnx",
        "onnx int8": folder / f"{path.stem}_int8.onnx",
    }
    distill.export_student(path, paths["pt2"])
    distill.export_student(path, paths["onnx"])
    quantise(paths["onnx"], paths["onnx int8"])
    return paths


@torch.inference_mode()
def compare(path, folder, data_dir):
    """Print the table of a checkpoint's exports; keep int8 only if it is worth it.

    Args:
        path: of the checkpoint.
        folder: for the exports.
        data_dir: of the corpus; None stands for the checkpoint's.

    Returns:
        name -> what was found, a dict.
    """
    student, checkpoint = teacher.load_model(path, distill.Student)
    sentences, config = read_dev(checkpoint, path, len(student.feature_mean), data_dir)
    paths = write_exports(path, folder)
    networks = {
        "network": (student, path),
        "pt2": (torch.export.load(paths["pt2"]).module(), paths["pt2"]),
        "onnx": (OnnxStudent(paths["onnx"]), paths["onnx"]),
        "onnx int8": (OnnxStudent(paths["onnx int8"]), paths["onnx int8"]),
    }
    vocabulary = checkpoint["vocabulary"]
    found = {}
    print(
        f"\n{'':<10}{'file':>10}{'ms per sentence':>17}{'difference':>13}{'dev WER':>9}"
    )
    for name, (network, file) in networks.items():
        errors = word_errors(network, sentences, vocabulary, config)
        row = {
            "bytes": file.stat().st_size,
            "milliseconds": distill.time_per_sentence(
                network, sentences, vocabulary, config
            ),
            "difference": largest_difference(network, student),
            "wer": errors.wer,
        }
        print(
            f"{name:<10}{row['bytes'] / 1e6:>7.2f} MB{row['milliseconds']:>17.2f}"
            f"{row['difference']:>13.1e}{row['wer']:>9.2%}"
        )
        found[name] = row
    found["onnx int8"]["kept"] = keep_if_cheap(found, paths["onnx int8"])
    return found


def keep_if_cheap(found, path):
    """Delete the int8 file if it costs too much; print and return whether it stays."""
    cost = found["onnx int8"]["wer"] - found["onnx"]["wer"]
    kept = cost < MAX_COST
    if not kept:
        path.unlink()
    print(
        f"int8 costs {100 * cost:.2f} points of WER, "
        f"{'kept' if kept else 'deleted'} (limit {100 * MAX_COST:g}): {path}"
    )
    return kept


def main(argv=None):
    """Run the program; argv as in sys.argv[1:]."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="STUDENT")
    parser.add_argument("--data_dir", help="of the dev split (default: the student's)")
    parser.add_argument(
        "--output_dir", type=Path, help="for the exports (default: beside STUDENT)"
    )
    args = parser.parse_args(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"{parser.prog}: needs: pip install {' '.join(missing)}\n")
    torch.set_num_threads(1)
    folder = args.output_dir
    if folder is None:
        folder = args.checkpoint.parent
    try:
        compare(args.checkpoint, folder, args.data_dir)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
