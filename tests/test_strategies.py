"""Strategies that would train something else are refused by name, with the reason, before a weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

import ranks
from lit_dpo import LoRAPolicy
from lit_dpo.errors import LitDPOError, TrainingError
from lit_dpo.requirements import check_strategy
from training import data, module, trainer


def test_what_keeps_adapters_whole_is_taken():
    for one in (SingleDeviceStrategy(), DDPStrategy(), "auto", "ddp", "ddp_spawn"):
        check_strategy(one)


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (FSDPStrategy(), "flattens adapters and base"),
        (ModelParallelStrategy(), "neither exported nor resumed"),
        (object.__new__(DeepSpeedStrategy), "stage 3 makes parameters of size 0"),  # it is not installed here
        ("fsdp", "flattens"),
        ("deepspeed_stage_2", "optimizer state alone"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_the_rest_is_refused_with_its_reason_and_what_to_take(strategy, why):
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    with pytest.raises(TrainingError, match=f"got {name}: .*{why}.*policy.shard: node"):
        check_strategy(strategy)


@pytest.mark.parametrize("static_graph", [False, True])
def test_a_static_graph_does_not_go_with_accumulation(tiny_model, pairs_file, tmp_path, static_graph):
    strategy = DDPStrategy(process_group_backend="gloo", static_graph=static_graph)
    run = trainer(tmp_path, devices=1, strategy=strategy, accumulate_grad_batches=2, max_steps=1)
    try:
        if static_graph:
            with pytest.raises(TrainingError, match=r"static_graph.*accumulate_grad_batches.*microbatch_tokens"):
                run.fit(module(tiny_model), data(pairs_file))
        else:
            run.fit(module(tiny_model), data(pairs_file))
        assert run.global_step == (not static_graph)
    finally:
        torch.distributed.destroy_process_group()


def in_pieces(model: str, root: Any) -> list[str]:
    """What two ranks are told: of a tensor group, of sharding by hand, and of a model that is in pieces already."""
    from transformers import AutoModelForCausalLM

    found = []
    for mesh in ({"data_parallel_size": 1, "tensor_parallel_size": 2}, {"data_parallel_size": 2}):
        made = {"tensor_parallel_size": 1, **mesh}
        run = trainer(root, devices=2, strategy=ModelParallelStrategy(process_group_backend="gloo", **made))
        run.strategy.connect(module(model))
        run.strategy.setup_environment()  # as a fit does ahead of its checks: the mesh is known from here on
        try:
            check_strategy(run.strategy)
        except LitDPOError as error:
            found.append(str(error))
    try:
        LoRAPolicy.from_model(AutoModelForCausalLM.from_pretrained(model, tp_plan="auto"))
    except LitDPOError as error:
        found.append(str(error))
    return found


def test_two_ranks_that_would_share_a_matrix_are_told_so(tiny_model, tmp_path):
    for said in ranks.run(in_pieces, 2, str(tiny_model), tmp_path, folder=tmp_path / "ranks"):
        group, shards, loaded = said
        assert "ModelParallelStrategy: the devices of a tensor group compute one batch together" in group
        assert "ModelParallelStrategy: it leaves sharding to the module" in shards
        assert "is spread over devices: was it loaded with `tp_plan`" in loaded
