"""Ranks of a sharded base that do not do the same: it is made up for, or fails in seconds with its cause."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

import ranks
from lit_dpo import DPOModule, LoRAPolicy, PreferenceDataModule
from lit_dpo.errors import PolicyError
from training import data, module, trainer


class Uneven(PreferenceDataModule):
    """Its loaders for evaluation are one's own: the first rank has two batches more than the other."""

    def val_dataloader(self) -> Any:
        loader: Any = super().val_dataloader()
        batches = [batch for _, batch in zip(range(4), loader, strict=False)]
        return DataLoader(batches[: 4 - 2 * self.trainer.global_rank], batch_size=None, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch


class Lonely(DPOModule):
    """Runs the base on one rank alone, which nothing can make up for."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_global_zero:
            self.batch_logps(batch)


class Broken(DPOModule):
    """Its second layer fails in the middle of a pass, while it is gathered."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError("this is the cause")

        self.model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(fail)


def fit(folder: Path, rows: Path, model: Path, kind: type[DPOModule], own: bool) -> dict[str, float]:
    """Train on two ranks whose process group gives up after some seconds."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=3 if kind is Lonely else 6))
    fitting = trainer(folder, strategy=strategy, devices=2, num_sanity_val_steps=2, limit_train_batches=2)
    pairs = Uneven(train=str(rows), val=str(rows), batch_size=4, eval_batch_size=2) if own else data(rows)
    trained = module(model, policy={"shard": "node"}, kind=kind, microbatch_tokens=60)
    fitting.fit(trained, datamodule=pairs)
    return {name: float(value) for name, value in fitting.callback_metrics.items()}


def cause(folder: Path, rows: Path, model: Path) -> str:
    """What a user sees of an error in the middle of a pass."""
    try:
        fit(folder, rows, model, Broken, own=False)
    except Exception as error:  # of any kind: which one it is, is what is asked
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_own_loaders_of_unequal_lengths_are_made_up_for(pairs_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    given = (tmp_path, pairs_file, tiny_model, DPOModule, True)
    found = ranks.run(fit, 2, *given, folder=tmp_path / "logs", seconds=100)
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    assert "val/loss" in found[0]


def test_a_rank_alone_fails_in_seconds(pairs_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ranks.RankError, match=r"(?i)timed out|connection closed|was not done|its time was up"):
        ranks.run(fit, 2, tmp_path, pairs_file, tiny_model, Lonely, False, folder=tmp_path / "logs", seconds=100)


def test_the_cause_of_an_error_within_a_pass_is_seen(pairs_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = ranks.run(cause, 2, tmp_path, pairs_file, tiny_model, folder=tmp_path / "logs", seconds=100)
    assert found == ["ZeroDivisionError: this is the cause"] * 2


def test_one_process_says_that_its_base_is_whole(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = module(tiny_model, policy={"shard": "all"})
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        alone.configure_model()
    assert not any(hasattr(p, "to_local") for p in alone.model.parameters())
    assert "policy.shard=all: the base is whole" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "int8"}, "`policy.shard` does not go with `policy.quantization` int8"),
        ({"use_dora": True}, "`shard` does not go with `use_dora`"),
        ({"target_parameters": ["mlp.gate_up_proj"]}, "`shard` does not go with `target_parameters`"),
        ({"trainable_token_indices": [3]}, "`shard` does not go with `trainable_token_indices`"),
        ({"shard": "some"}, "Expected `shard` among none, node, all but got 'some'"),
    ],
)
def test_what_does_not_come_in_parts_is_refused_before_weights_load(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        LoRAPolicy("nowhere", **{"quantization": "none", "shard": "all", **options})


def test_a_model_that_is_loaded_is_not_sharded(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(PolicyError, match="`shard` is for a base that is read in shards"):
        LoRAPolicy.from_model(AutoModelForCausalLM.from_pretrained(tiny_model), shard="all")
