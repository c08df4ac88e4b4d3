"""One data module with several models: each is trained on its own ids, and exported with its own tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import tiny
from lit_dpo import DPOModule, LoRAPolicy
from training import data, trainer


@pytest.fixture(scope="module")
def characters(tmp_path_factory) -> Path:
    """A model with another tokenizer than `tiny_model`: of characters instead of bytes."""
    return tiny.directory(tmp_path_factory.mktemp("characters") / "model")


def _module(model: Path) -> DPOModule:
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    return DPOModule(LoRAPolicy(str(model), quantization="none", r=4), optimizer=optimizer)


def _ids(pairs) -> list[int]:
    return pairs._tables["train"].batch([0]).input_ids[0].tolist()


def test_a_second_model_is_trained_on_its_own_ids_and_exports_its_own_tokenizer(
    tiny_model, characters, pairs_file, tmp_path
):
    pairs, found = data(pairs_file), {}
    for model in (tiny_model, characters, tiny_model):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        trainer(root, max_steps=2).fit(_module(model), pairs)
        exported = AutoTokenizer.from_pretrained(root / "adapter")
        assert exported.get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
        alone = data(pairs_file)
        trainer(tmp_path / "alone", max_steps=1).fit(_module(model), alone)
        assert _ids(pairs) == _ids(alone)
        found.setdefault(model, _ids(pairs))
    assert found[tiny_model] != found[characters]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_second_model_is_measured_on_its_own_ids(tiny_model, characters, pairs_file, tmp_path, stage):
    pairs = data(pairs_file, val=str(pairs_file), test=str(pairs_file))
    alone = data(pairs_file, val=str(pairs_file), test=str(pairs_file))
    trainer(tmp_path / "fit", max_steps=1).fit(_module(tiny_model), pairs)
    measured = [getattr(trainer(tmp_path), stage)(_module(characters), one) for one in (pairs, alone)]
    name = {"validate": "val/chosen_logps", "test": "test/chosen_logps", "predict": "chosen_logps"}[stage]
    numbers = [one[0][name] for one in measured]
    torch.testing.assert_close(torch.as_tensor(numbers[0]), torch.as_tensor(numbers[1]))


def test_the_same_tokenizer_is_not_encoded_again(tiny_model, pairs_file, tmp_path):
    """Another policy of the same model keeps the tables as they are."""
    pairs = data(pairs_file)
    trainer(tmp_path, max_steps=1).fit(_module(tiny_model), pairs)
    before = pairs._tables["train"]
    other = DPOModule(LoRAPolicy(str(tiny_model), quantization="none", r=2))
    trainer(tmp_path, max_steps=1).fit(other, pairs)
    assert pairs._tables["train"] is before
