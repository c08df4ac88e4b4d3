"""What makes a step fast changes nothing that it computes: 20 steps compared with the plainest code there is."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import tiny
from lit_dpo.data.batch import CompletionBatch, EncodedPrompt
from lit_dpo.logps.layouts import segments
from lit_dpo.logps.score import base_model
from lit_dpo.policy.adapters import adapters_off
from training import adapter, data, module, trainer

STEPS, BETA = 20, 0.1


class Steps(Callback):
    """The batches and mean losses of a run, and its model before the first step, in ordinary attention."""

    def __init__(self) -> None:
        self.batches: list[list[EncodedPrompt]] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer, pl_module):
        self.model = copy.deepcopy(pl_module.model)
        base_model(self.model).set_attn_implementation("eager")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(_pairs(batch))
        self.losses.append(float(outputs["loss"]))


def _pairs(batch: CompletionBatch) -> list[EncodedPrompt]:
    found = []
    for s in segments(batch):
        lengths = [s.prompt, *s.completions]
        parts = batch.input_ids[0, s.start : s.start + sum(lengths)].split(lengths)
        prompt, *completions = (part.tolist() for part in parts)
        found.append(EncodedPrompt(prompt, completions))
    return found


def _plain_step(model, pairs: list[EncodedPrompt], optimizer: torch.optim.Optimizer) -> float:
    """Whole sequences, one at a time, whole logits, the formula of the paper."""
    with torch.no_grad(), adapters_off(model):
        reference = [logps.sum() for logps in tiny.one_at_a_time(model, pairs)]
    ratios = [p.sum() - r for p, r in zip(tiny.one_at_a_time(model, pairs), reference, strict=True)]
    chosen, rejected = torch.stack(ratios).view(-1, 2).T
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize(("checkpointing", "microbatch_tokens"), [(False, None), (True, 100)])
def test_20_steps_compute_the_losses_and_adapters_of_the_plain_path(
    tiny_model, pairs_file, tmp_path, checkpointing, microbatch_tokens
):
    # momentum, so that errors add up; not Adam, whose division blows up the rounding error of a tiny gradient
    optimizer = functools.partial(torch.optim.SGD, lr=0.2, momentum=0.9)
    policy = {"gradient_checkpointing": checkpointing}
    fast, steps = module(tiny_model, optimizer=optimizer, policy=policy, microbatch_tokens=microbatch_tokens), Steps()
    trainer(tmp_path, max_epochs=-1, max_steps=STEPS, callbacks=[steps]).fit(fast, data(pairs_file))
    plain = steps.model
    taken = optimizer([p for p in plain.parameters() if p.requires_grad])
    losses = [_plain_step(plain, pairs, taken) for pairs in steps.batches]
    assert len(losses) == STEPS
    assert min(losses) < 0.9 * losses[0]  # it trained
    torch.testing.assert_close(torch.tensor(steps.losses), torch.tensor(losses), rtol=0, atol=1e-4)
    expected = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    for name, found in adapter(fast).items():
        torch.testing.assert_close(found, expected[name].detach(), rtol=0, atol=1e-4, msg=name)
