r"""CopyCat in the project's layout, from a clone of its public repository.

    $ git clone https://github.com/DhruvaBansal00/Deep-Learning-for-ASLR
    $ python .lab/copycat.py Deep-Learning-for-ASLR corpora/copycat
    $ python .lab/copycat.py corpora/copycat folds/copycat-signer --protocol signer
    $ python .lab/crossvalidate.py run folds/copycat-signer --setting full -- \
          --pretrained_weights i3d_kinetics400 --temporal_stride 8 --epochs 20

The first call writes all recordings into one train split: American Sign Language of
several signers, phrases of 3 to 5 signs. Features [T, 94] are columns of the
repository: boxes of both hands, 21 landmarks of each, and the hands' distance, as
fractions of the image times ten.

With --protocol the first folder is such a corpus, and OUT gets folds with links to its
features, for .lab/crossvalidate.py; each is a --data_dir. In every protocol the k-th
signer is held out in fold k (s1 in fold0), so that a fold of one protocol can start
from the network of the same fold of another:

    signer      train: the other signers; dev: this signer
    sentences   train: most phrases; dev: the other HELD_OUT_PHRASES; only fold0
    both        train: most phrases by the other signers; dev: the rest by this one
    personal    train: --recordings of this signer, drawn by --seed; dev: the others,
                or --held_out of them
"""

import argparse
import collections
import random
import re
from pathlib import Path

import corpora
import numpy as np
from crossvalidate import write_split

from wer import read_annotations

FEATURES = 94  # numbers per frame
FILE_NAME = re.compile(r"(\d\d-\d\d-\d\d)_(\w+)_4K\.([a-z_]+)\.(\d+)\.ark")
PROTOCOLS = ("signer", "sentences", "both", "personal")
HELD_OUT_PHRASES = 12
HELD_OUT_DRAWS = 10_000  # at most, until one is found that every gloss survives

# ------------------------------------------------------------ the corpus


def read_frames(path, name):
    """Read the features of an .ark file, `KEY [ ` + a line per frame + `]`.

    Args:
        path: of the file.
        name: the file's in messages.

    Returns:
        [T, 94] float16, which moves no value by more than 0.04% of the image.

    Raises:
        ValueError: a broken file.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    begin = text.find("[")
    end = text.rfind("]")
    inside = text[begin + 1 : end] if 0 <= begin < end else ""
    if not inside.strip():
        raise ValueError(f"{name}: no frames between [ and ], expected one per line")
    frames = []
    for number, line in enumerate(inside.splitlines(), start=1):
        values = line.split()
        if len(values) not in (0, FEATURES):
            raise ValueError(
                f"{name}:{number}: {len(values)} numbers, expected {FEATURES} per frame"
            )
        if values:
            frames.append(values)
    try:
        features = np.array(frames, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{name}: {error}, expected numbers") from error
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: NaN or infinity, expected numbers")
    return features.astype(np.float16)


def read_recordings(clone):
    """Read all recordings of a clone, in the order of the files' names.

    Raises:
        ValueError: a file that is missing, broken or named in another way.
    """
    folder = Path(clone, "data/ark")
    paths = sorted(folder.glob("*.ark"))
    if not paths:
        raise ValueError(
            f"{folder}: no .ark files, expected a clone of "
            f"github.com/DhruvaBansal00/Deep-Learning-for-ASLR"
        )
    matches = []
    for path in paths:
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path}: expected DATE_NAME_4K.word_word.NUMBER.ark")
        matches.append(match)
    signers = corpora.number_signers(match[2] for match in matches)
    recordings = []
    for path, match in zip(paths, matches, strict=True):
        date, person, words, number = match.groups()
        # A pattern that the shell finds the file by, and that names nobody.
        name = path.with_name(f"{date}_*_4K.{words}.{number}.ark")
        signer = signers[person]
        recordings.append(
            corpora.Recording(
                id=f"{signer}_{date.replace('-', '')}_{words}_{int(number):03d}",
                signer=signer,
                glosses=tuple(words.upper().split("_")),
                features=read_frames(path, name),
            )
        )
    return recordings


# ------------------------------------------------------------ protocols


def draw_phrases(sentences):
    """Draw the phrases that are held out, the same for the same corpus.

    Every gloss is in some of them, and none loses more than half of its phrases.

    Returns:
        A set of tuples of glosses.

    Raises:
        ValueError: no such draw is found.
    """
    phrases = sorted({sentence.glosses for sentence in sentences})
    if len(phrases) < HELD_OUT_PHRASES:
        raise ValueError(f"{len(phrases)} phrases, expected {HELD_OUT_PHRASES} or more")
    total = count_phrases(phrases)
    for seed in range(HELD_OUT_DRAWS):
        drawn = random.Random(seed).sample(phrases, HELD_OUT_PHRASES)
        lost = count_phrases(drawn)
        if all(1 <= lost[gloss] <= total[gloss] / 2 for gloss in total):
            return set(drawn)
    raise ValueError(
        f"{len(phrases)} phrases, expected some {HELD_OUT_PHRASES} that hold every "
        f"gloss and at most half of its phrases"
    )


def count_phrases(phrases):
    """Return gloss -> the number of phrases that hold it, a Counter."""
    return collections.Counter(gloss for phrase in phrases for gloss in set(phrase))


def divide(sentences, protocol, signer, args):
    """Divide a corpus by a protocol.

    Args:
        sentences: a list of wer.Annotation.
        protocol: one of PROTOCOLS.
        signer: who is held out; "sentences" holds out none.
        args: see divide_personal.

    Returns:
        Lists of the sentences in train and in dev.

    Raises:
        ValueError: too few recordings or phrases.
    """
    own = [s for s in sentences if s.signer == signer]
    others = [s for s in sentences if s.signer != signer]
    if protocol == "signer":
        return others, own
    if protocol == "personal":
        return divide_personal(own, signer, args)
    held_out = draw_phrases(sentences)
    if protocol == "sentences":
        own = sentences
        others = sentences
    train = [s for s in others if s.glosses not in held_out]
    return train, [s for s in own if s.glosses in held_out]


def divide_personal(own, signer, args):
    """Divide a signer's sentences into some recordings to train on, and others.

    Args:
        own: a list of wer.Annotation.
        signer: their signer.
        args: the flags; recordings are in train, at most held_out (None: all) of the
            others in dev, and seed is of the draw.

    Returns:
        Lists of the sentences in train and in dev.

    Raises:
        ValueError: a number that does not fit.
    """
    if not 1 <= args.recordings < len(own):
        raise ValueError(
            f"--recordings {args.recordings}: {signer} has {len(own)}, expected 1 to "
            f"{len(own) - 1}"
        )
    if args.held_out is not None and args.held_out < 1:
        raise ValueError(f"--held_out {args.held_out}: expected 1 or more")
    generator = random.Random(args.seed)
    drawn = set(generator.sample(range(len(own)), args.recordings))
    train = [s for k, s in enumerate(own) if k in drawn]
    rest = [s for k, s in enumerate(own) if k not in drawn]
    if args.held_out is not None and args.held_out < len(rest):
        rest = generator.sample(rest, args.held_out)
    return train, rest


def write_folds(args):
    """Write the folds of a protocol, and print their sizes.

    Args:
        args: the flags; protocol is followed by the signers that are held out, each in
            a fold; without any, every signer is.

    Raises:
        ValueError: files that are missing or broken, a protocol, signer or number that
            does not fit.
    """
    protocol, *chosen = args.protocol
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"--protocol {protocol}: expected one of {', '.join(PROTOCOLS)}"
        )
    source = Path(args.source).resolve()
    sentences = read_annotations(source / "train.corpus.csv")
    signers = sorted({sentence.signer for sentence in sentences})
    if protocol == "sentences":
        if chosen:
            raise ValueError(
                f"--protocol {protocol} {' '.join(chosen)}: expected no signer"
            )
        signers = [None]
    unknown = [signer for signer in chosen if signer not in signers]
    if unknown:
        raise ValueError(
            f"--protocol {protocol} {' '.join(unknown)}: {source} has the signers "
            f"{', '.join(signers)}"
        )
    folds = {}
    for fold, signer in enumerate(signers):
        if chosen and signer not in chosen:
            continue
        folder = Path(args.out, f"fold{fold}")
        corpora.refuse_existing(folder)
        train, dev = divide(sentences, protocol, signer, args)
        if not train or not dev:
            raise ValueError(f"{source}: {folder.name} has no sentence in train or dev")
        folds[folder] = (train, dev)
    for folder, (train, dev) in folds.items():
        write_split(source, folder, "train", [("train", s) for s in train])
        write_split(source, folder, "dev", [("train", s) for s in dev])
        print(f"{folder}: {len(train)} sentences in train, {len(dev)} in dev")


# ------------------------------------------------------------ the program


def run(args):
    """Write the corpus, or with --protocol its folds."""
    if args.protocol is None:
        corpora.refuse_existing(args.out)
        recordings = read_recordings(args.source)
        corpora.write_corpus(args.out, {"train": recordings})
        return
    write_folds(args)


def main():
    """Convert a clone, or divide a corpus."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="clone, or with --protocol a corpus")
    parser.add_argument("out", help="new folder for the corpus or for folds")
    parser.add_argument(
        "--protocol",
        nargs="+",
        metavar=("NAME", "SIGNER"),
        help=f"{', '.join(PROTOCOLS)}; without signers a fold for each",
    )
    parser.add_argument(
        "--recordings", type=int, default=25, help="in train of a personal fold"
    )
    parser.add_argument(
        "--held_out", type=int, metavar="N", help="at most N in dev of a personal fold"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their draw")
    corpora.run(parser, run)


if __name__ == "__main__":
    main()
