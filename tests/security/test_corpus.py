"""What fuzzing has found once, and a little fuzzing of each target: `fuzz.py` does it for as long as one likes."""

from __future__ import annotations

import random

import pytest
from fuzz import CORPUS, TARGETS, judged, mutant, seeds


@pytest.mark.parametrize("target", TARGETS)
def test_broken_files_are_read_or_refused(target):
    rng, known = random.Random(target), seeds(target)
    judged(target, known[0])  # what this imports is no part of what is measured
    made = [mutant(rng, known) for _ in range(3 if target == "config" else 25)]
    assert {content: wrong for content in [*known, *made] if (wrong := judged(target, content)) is not None} == {}


def test_the_corpus_is_of_targets():
    assert {folder.name for folder in CORPUS.iterdir()} <= set(TARGETS)


def test_the_judge_finds_what_is_wrong(monkeypatch):
    monkeypatch.setitem(TARGETS, "jsonl", lambda content, folder: {}["no such key"])
    assert judged("jsonl", b"") == "KeyError: 'no such key'"
