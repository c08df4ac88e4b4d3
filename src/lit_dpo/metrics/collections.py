"""What is measured together: the metrics of a run, and of each of several sets."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torchmetrics import Metric, MetricCollection

from lit_dpo.metrics.preference import (
    ChosenLogps,
    ChosenReward,
    KLEstimate,
    LossPart,
    PreferenceLossMean,
    RejectedLogps,
    RejectedReward,
    RewardAccuracy,
    RewardMargin,
)


def preference_metrics(parts: Iterable[str] = (), *, kl: bool = False) -> MetricCollection:
    """Return the metrics of preference training, by the names that they are logged under.

    Args:
        parts: names of the loss's parts, each of which becomes `loss_NAME`.
        kl: whether the reference's log-probs per token are there, of which `kl` is an estimate.

    Example:
        >>> from lit_dpo.metrics.collections import preference_metrics
        >>> sorted(preference_metrics(["nll"]))[2:5]
        ['loss', 'loss_nll', 'rejected_logps']
    """
    measured: dict[str, Metric] = {
        "loss": PreferenceLossMean(),
        "reward_accuracy": RewardAccuracy(),
        "reward_margin": RewardMargin(),
        "chosen_reward": ChosenReward(),
        "rejected_reward": RejectedReward(),
        "chosen_logps": ChosenLogps(),
        "rejected_logps": RejectedLogps(),
        **{f"loss_{name}": LossPart(name) for name in parts},
    }
    if kl:
        measured["kl"] = KLEstimate()
    return MetricCollection(measured, compute_groups=False)  # type: ignore[arg-type]


def asked_together(measured: MetricCollection) -> MetricCollection:
    """Let metrics remember no result: a rank that had no share of a batch would give its own again, and not gather.

    The others, which have counted, would wait for it.
    """
    for metric in measured.values():
        metric.compute_with_cache = False
    return measured


def of_set(
    sets: torch.nn.ModuleDict, together: MetricCollection, stage: str, name: str | int
) -> tuple[str, MetricCollection]:
    """Return the metrics of one of several sets, and their key among all of them; made when first asked for.

    Args:
        sets: of each set that was measured.
        together: of all sets; a copy of them is what a new set gets, on their device.
        stage: `val` or `test`.
        name: of the set, which is then a part of its metrics' names; or its number, which is not.
    """
    prefix = f"{stage}/{name}/" if isinstance(name, str) else f"{stage}/"
    key = f"{stage}_{name}".replace(".", "_")
    if key not in sets:
        made = together.clone(prefix=prefix)
        made.reset()
        device = next(iter(together.values())).device
        sets[key] = made.to(device).train()  # it is copied in the middle of an evaluation
    found = sets[key]
    assert isinstance(found, MetricCollection)
    return key, found
