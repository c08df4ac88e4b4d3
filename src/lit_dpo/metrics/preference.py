"""What preference training measures, as sums and counts: batch size and number of processes do not matter.

`DPOModule` calls a collection of these with keyword arguments, and each metric takes those that its `update` names:
`pairs` (`PairLogps`), `losses`, `chosen_rewards`, `rejected_rewards` (`(B,)` each). A metric of your own does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_dpo.logps.records import PairLogps, SequenceLogps


def on_host(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Numbers, on whatever device, as float64 on the CPU, in one copy: each copy of its own waits for the device."""
    if not values:
        return {}
    numbers = [torch.as_tensor(value).detach().reshape(()) for value in values.values()]
    device = next((one.device for one in numbers if one.device.type != "cpu"), torch.device("cpu"))
    together = torch.stack([one.to(device, _double(device), non_blocking=True) for one in numbers])
    return dict(zip(values, together.cpu().double().unbind(), strict=True))


def _double(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class Mean(Metric):
    """Base of means over pairs or tokens: a float64 sum and an integer count.

    float64, because a float32 sum over millions of pairs drifts, and because `bf16-true` would cast a float state.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _apply(self, fn: Any, exclude_state: Any = "") -> Any:
        """Move, never cast: `module.to(torch.bfloat16)` around a metric would round its sum."""
        device = fn(torch.empty(0, device=self.total.device)).device
        return super()._apply(
            lambda tensor: tensor.to(device, _double(device) if tensor.is_floating_point() else None), exclude_state
        )

    def add(self, values: Tensor, count: Tensor | int | None = None) -> None:
        """Add values, counted one each unless told otherwise."""
        # not in place: a state that was reset under inference mode, in `validate`, could not train afterwards
        self.total = self.total + values.detach().double().sum()
        self.count = self.count + (values.numel() if count is None else count)

    def compute(self) -> Tensor:
        """Return the mean, float64; NaN before the first update."""
        return self.total / self.count


class PreferenceLossMean(Mean):
    """Mean loss over pairs."""

    def update(self, losses: Tensor) -> None:
        """Add losses `(B,)`."""
        self.add(losses)


class LossPart(Mean):
    """Mean over pairs of one part of a composed loss, unweighted.

    Args:
        name: of the part, one of the loss's `part_names`.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name

    def update(self, parts: dict[str, Tensor]) -> None:
        """Add a batch's parts, `(B,)` each."""
        self.add(parts[self.name])


class RewardAccuracy(Mean):
    """Share of pairs whose chosen completion has the higher reward. A tie counts ½: where nothing moved it is 0.5.

    NaN if a reward is: such a pair is neither won nor lost.

    Example:
        >>> accuracy = RewardAccuracy()
        >>> accuracy.update(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0]))
        >>> accuracy.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
        """Add rewards, `(B,)` each."""
        wins = (chosen_rewards > rejected_rewards).double() + 0.5 * (chosen_rewards == rejected_rewards).double()
        self.add(torch.where((chosen_rewards - rejected_rewards).isnan(), torch.nan, wins))


class RewardMargin(Mean):
    """Mean reward of chosen minus rejected."""

    higher_is_better = True

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> None:
        """Add rewards, `(B,)` each."""
        self.add(chosen_rewards.double() - rejected_rewards.double())


class ChosenReward(Mean):
    """Mean reward of the chosen completions."""

    def update(self, chosen_rewards: Tensor) -> None:
        """Add rewards `(B,)`."""
        self.add(chosen_rewards)


class RejectedReward(Mean):
    """Mean reward of the rejected completions."""

    def update(self, rejected_rewards: Tensor) -> None:
        """Add rewards `(B,)`."""
        self.add(rejected_rewards)


class ChosenLogps(Mean):
    """Policy log-prob of the chosen completions, nats per token. It may fall while the margin rises: watch it."""

    def update(self, pairs: PairLogps) -> None:
        """Add a batch."""
        _add_tokens(self, pairs.policy_chosen)


class RejectedLogps(Mean):
    """Policy log-prob of the rejected completions, nats per token."""

    def update(self, pairs: PairLogps) -> None:
        """Add a batch."""
        _add_tokens(self, pairs.policy_rejected)


class KLEstimate(Mean):
    """How far the policy has moved from the reference, nats per token over all completions.

    The estimator ½·(log π − log π_ref)² per token, known as k2 (joschu.net/blog/kl-approx.html): never negative, 0 only
    where both agree on every token, and finite where π has given up a token that π_ref liked. The completions are the
    data's, not samples of the policy, so that it is an estimate of drift on these texts.
    """

    higher_is_better = False

    def update(self, pairs: PairLogps) -> None:
        """Add a batch, each completion once; without a reference there is nothing to add."""
        chosen, rejected = (
            (pairs.policy_chosen, pairs.reference_chosen),
            (pairs.policy_rejected, pairs.reference_rejected),
        )
        for policy, reference in [chosen, rejected] if pairs.completions is None else [pairs.completions[:2]]:
            if reference is not None and policy.per_token is not None and reference.per_token is not None:
                self.add(0.5 * (policy.per_token.double() - reference.per_token.double()) ** 2)


def _add_tokens(metric: Mean, side: SequenceLogps) -> None:
    metric.add(side.total, side.length.sum().long())
