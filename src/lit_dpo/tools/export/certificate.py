"""How far two models are apart on the same pairs, and whether that is as near as a merge has to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.errors import LitDPOError
from lit_dpo.logps.records import CompletionLogps, SequenceLogps
from lit_dpo.logps.score import completion_logps

MAX_DRIFT = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-3}
"""Largest drift by rounding of a completion, nats per token, unless another is asked for."""
MAX_GAP = 0.5
"""Largest mean drift from what was trained where a base is merged into that only log-probs compare with its own."""


class Scores(NamedTuple):
    """What a model gives the probe: `C` completions of `N` tokens, `B` comparisons; on the CPU, float32.

    Attributes:
        per_token: `(N,)` log-probs, nats.
        lengths: `(C,)` tokens of each completion.
        chosen: `(B,)` log-probs of the chosen completions.
        rejected: `(B,)` of the others.
    """

    per_token: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def difference(self) -> Tensor:
        """`(B,)` by how much the chosen completion is likelier, nats."""
        return self.chosen - self.rejected


class Drift(NamedTuple):
    """Absolute changes of log-probs, nats per token: the mean over tokens, and the completion where it is largest."""

    mean: float
    largest: float


class Preferring(NamedTuple):
    """How a model prefers: the share of margins above 0, and the mean margin to the reference, nats."""

    accuracy: float
    margin: float


class Certificate(NamedTuple):
    """What a merge changed.

    Attributes:
        pairs: comparisons that were scored.
        completions: that were.
        tokens: of these.
        probe: which pairs.
        dtype: of the merged weights.
        base: which was merged into, and whether its content is known to be the one that was trained on.
        trained_as: how the base was quantised in training.
        rounding: the merged weights, read from the disk, against the adapter on the same base in float32.
        gap: the merged weights against the adapter on the base as it was trained: what quantisation was worth.
        base_gap: the same between the two bases, without the adapter.
        before: as it was trained.
        after: merged.
        turned: comparisons that are preferred the other way round after than before.
        max_drift: bound on `rounding.largest`.
        max_gap: bound on `gap.mean`; None where the base is known to be the one that was trained on.
        untied: whether embeddings and head were one weight before, and are two.
    """

    pairs: int
    completions: int
    tokens: int
    probe: str
    dtype: str
    base: str
    trained_as: str
    rounding: Drift
    gap: Drift
    base_gap: Drift
    before: Preferring
    after: Preferring
    turned: int
    max_drift: float
    max_gap: float | None
    untied: bool

    @property
    def as_dict(self) -> dict[str, Any]:
        """In builtins, for `certificate.json`."""
        return {
            name: value._asdict() if isinstance(value, Drift | Preferring) else value
            for name, value in self._asdict().items()
        }


@torch.no_grad()
def scores(model: Any, batches: Sequence[CompletionBatch]) -> Scores:
    """Score a probe with a model in its plain attention, as it is: adapters on or off."""
    device, found = model.get_input_embeddings().weight.device, []
    for batch in batches:
        logps = completion_logps(model, batch.to(device))
        moved = SequenceLogps(logps.total.cpu(), logps.length.cpu(), _cpu(logps.per_token))
        pairs = CompletionLogps.of(batch, moved, None).pairs()
        found.append(
            Scores(_cpu(logps.per_token), moved.length, pairs.policy_chosen.total, pairs.policy_rejected.total)
        )
    return Scores(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _cpu(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.float().cpu()


def drift(one: Scores, other: Scores) -> Drift:
    """How far the log-probs of two models are apart.

    Example:
        >>> one = Scores(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1, 2]), torch.zeros(1), torch.zeros(1))
        >>> drift(one, one._replace(per_token=torch.tensor([-1.5, -2.0, -4.0])))
        Drift(mean=0.5, largest=0.5)
    """
    apart = (one.per_token.double() - other.per_token.double()).abs()
    lengths = one.lengths.long()
    each = torch.stack([part.mean() for part in torch.split(apart, lengths.tolist())])
    return Drift(float(apart.mean()), float(each.max()))


def preferring(policy: Scores, reference: Scores) -> Preferring:
    """How a policy prefers, compared with its reference."""
    margins = policy.difference - reference.difference
    return Preferring(float((margins > 0).double().mean()), float(margins.double().mean()))


def check(certificate: Certificate) -> None:
    """Refuse a merge that is not what was trained.

    Raises:
        LitDPOError: with the bound, what came, and what to do. NaN is above any bound.
    """
    c = certificate
    if not c.rounding.largest <= c.max_drift:
        raise LitDPOError(
            f"The merged model is not what the adapter computes on the same base: a completion's log-probs drift by "
            f"{c.rounding.largest:.3g} nats per token (mean {c.rounding.mean:.3g}), and rounding to {c.dtype} may by "
            f"{c.max_drift:g} (`--max_drift`). Nothing was written. This kind of adapter may not merge: export it as "
            "it is, without `--merge`; or merge with another `--dtype`."
        )
    if c.max_gap is not None and not c.gap.mean <= c.max_gap:
        raise LitDPOError(
            f"The merged model is far from what was trained: log-probs drift by {c.gap.mean:.3g} nats per token on "
            f"average (bases alone by {c.base_gap.mean:.3g}; accuracy {c.before.accuracy:.3f} before and "
            f"{c.after.accuracy:.3f} after), and `--max_gap` is {c.max_gap:g}. Trained on {c.trained_as}, merged "
            f"into {c.base}: see that this is the same model. Nothing was written."
        )
