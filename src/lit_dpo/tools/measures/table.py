"""One pass over the held-out comparisons: what every loss, and everything that arms are compared by, makes of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_dpo.errors import first_line
from lit_dpo.logps.fields import OF_REFERENCE, Field
from lit_dpo.logps.microbatch import join
from lit_dpo.logps.records import PairLogps, SequenceLogps
from lit_dpo.tools.measures.gradients import Measured, measured
from lit_dpo.tools.measures.scoring import Scored, compared_with, measuring, scored, the_reference

if TYPE_CHECKING:
    import pyarrow as pa

    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.losses import PreferenceLoss
    from lit_dpo.module import DPOModule
    from lit_dpo.references import Reference

log = logging.getLogger(__name__)


def pair_table(
    module: DPOModule,
    data: PreferenceDataModule,
    losses: Mapping[str, PreferenceLoss],
    reference: Reference | None = None,
) -> pa.Table:
    """Make a row per held-out comparison, of all validation sets, in one pass of the policy.

    Columns: `set` (its name, `""` where there is one), `source` (file or part of a mixture, or the set's name),
    `index` (row in the data set), `prompt` (the same number is the same prompt, to the token, in any set and run),
    `chosen_length` and `rejected_length` (tokens), `chosen_logps`, `rejected_logps`, `reference_chosen_logps`,
    `reference_rejected_logps` (sums over tokens, nats), `chosen_kl` and `rejected_kl` (Σ ½·(log π − log π_ref)² over
    the tokens; NaN where the reference has sums alone), `beta` (the module's loss's), and for each loss `loss/NAME` and
    `weight/NAME`, see `gradients.measured`.

    Numbers are those of `lit-dpo predict`, and do not depend on the batch size but for rounding: a loss that couples
    pairs sees all comparisons of all sets at once. One with a memory reads what the module's has become in training if
    it is the module's loss, and else what it would be after seeing the held-out comparisons once. A loss that requires
    what reference or data do not have, or refuses the comparisons, is NaN, in a line that says why. The data's `weight`
    does not count.

    Mode, random states, metrics, gradients, device and the module's own reference are left as they were.

    Args:
        module: fitted, or about to be. With a trainer it runs on its device and in its precision.
        data: with `val` or `val_split`.
        losses: by the names that the columns have.
        reference: what all are compared with, also a policy that was trained without any. None: the module's own, or
            else where its policy started: the base, or the adapter that was continued.

    Raises:
        DataError: if there are no held-out comparisons.
        PolicyError: for a reference that cannot be compared with.
    """
    import pyarrow as pa

    against = the_reference(module, reference)
    lacking = {name: why for name, loss in losses.items() if (why := _why_not(loss, against))}
    able = {name: loss for name, loss in losses.items() if name not in lacking}
    fields = frozenset({Field.REFERENCE}).union(*(loss.requires for loss in able.values()))
    columns: dict[str, Any] = {}
    with measuring(module), compared_with(module, against):
        board = _Board(able, module)
        for part in scored(module, data, fields):
            for name, values in _facts(part).items():
                columns.setdefault(name, []).extend(values)
            board.add(part.pairs)
    count = len(columns["index"])
    columns["beta"] = [module.loss.beta] * count
    found, refused = board.finish(count)
    for name, why in {**lacking, **refused}.items():
        log.warning("%s: no numbers (NaN) of this loss in the table of pairs: %s", name, why)
    for name in losses:
        one = found.get(name) or Measured(*torch.full((2, count), torch.nan))
        columns[f"loss/{name}"], columns[f"weight/{name}"] = one.values.double(), one.weights.double()
    return pa.table({name: _column(values) for name, values in columns.items()})


def _column(values: Any) -> Any:
    return values.numpy() if isinstance(values, Tensor) else values


def _why_not(loss: PreferenceLoss, reference: Reference) -> str | None:
    lacking = loss.requires & OF_REFERENCE - reference.provides
    return f"it reads {', '.join(sorted(lacking))}, which {reference} has not." if lacking else None


def _facts(part: Scored) -> dict[str, list[Any]]:
    """Say what is known of a batch's comparisons, whatever the loss."""
    pairs, batch = part.pairs, part.batch
    chosen, rejected = _sides(pairs, "chosen"), _sides(pairs, "rejected")
    return {
        "set": [part.set] * batch.size,
        "source": part.sources,
        "index": batch.indices.tolist(),
        "prompt": part.prompts.tolist(),
        "chosen_length": batch.chosen_lengths.tolist(),
        "rejected_length": batch.rejected_lengths.tolist(),
        "chosen_logps": pairs.policy_chosen.total.tolist(),
        "rejected_logps": pairs.policy_rejected.total.tolist(),
        "reference_chosen_logps": chosen[1].total.tolist(),
        "reference_rejected_logps": rejected[1].total.tolist(),
        "chosen_kl": _divergence(*chosen).tolist(),
        "rejected_kl": _divergence(*rejected).tolist(),
    }


def _sides(pairs: PairLogps, side: str) -> tuple[SequenceLogps, SequenceLogps]:
    return pairs.require(f"policy_{side}"), pairs.require(f"reference_{side}")


def _divergence(policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
    """`(B,)` Σ ½·(log π − log π_ref)² over tokens: `KLEstimate`, before it is divided by their number."""
    if policy.per_token is None or reference.per_token is None:
        return torch.full_like(policy.total, torch.nan).double()
    return policy.sums(0.5 * (policy.per_token.double() - reference.per_token.double()) ** 2)


class _Board:
    """Losses, and what they make of comparisons that come batch by batch.

    A loss that takes each prompt by itself is evaluated at once; for one that couples them, or remembers, the records
    are kept, and those tokens of them that such a loss reads.
    """

    def __init__(self, losses: Mapping[str, PreferenceLoss], module: DPOModule) -> None:
        self._whole = {name: loss for name, loss in losses.items() if _sees_all(loss)}
        self._single = {name: loss for name, loss in losses.items() if name not in self._whole}
        self._states = {name: _trained_state(loss, module) for name, loss in self._whole.items()}
        read = frozenset[Field]().union(*(loss.requires for loss in self._whole.values()))
        self._tokens = bool(read - {Field.REFERENCE})  # what is kept costs memory
        self._kept: list[PairLogps] = []
        self._done: dict[str, list[Measured]] = {name: [] for name in self._single}
        self._refused: dict[str, str] = {}

    def add(self, pairs: PairLogps) -> None:
        """Take a batch."""
        for name, loss in self._single.items():
            self._done[name].append(self._evaluate(name, loss, pairs))
        if self._whole:
            record = pairs.lists
            if not self._tokens:
                record = record._replace(
                    policy=_sums(record.policy), reference=record.reference and _sums(record.reference)
                )
            self._kept.append(record.pairs(pairs.columns))

    def finish(self, count: int) -> tuple[dict[str, Measured], dict[str, str]]:
        """Return what each loss makes of all, and why some make nothing."""
        found = {name: Measured(*map(torch.cat, zip(*those, strict=True))) for name, those in self._done.items()}
        if self._whole:
            pairs = _joined(self._kept)
            for name, loss in self._whole.items():
                found[name] = self._evaluate(name, loss, pairs)
        return {name: one for name, one in found.items() if name not in self._refused}, self._refused

    def _evaluate(self, name: str, loss: PreferenceLoss, pairs: PairLogps) -> Measured:
        nothing = Measured(*torch.full((2, len(pairs.policy_chosen.total)), torch.nan))
        if lacking := sorted(loss.columns - pairs.columns.keys()):
            self._refused[name] = f"it reads the rows' {', '.join(lacking)}, which they have not."
        if name in self._refused:
            return nothing
        try:
            return measured(loss, pairs._replace(state=_state(loss, self._states.get(name), pairs)))
        except ValueError as error:
            self._refused[name] = first_line(error)
            return nothing


def _sees_all(loss: PreferenceLoss) -> bool:
    return loss.couples_pairs or loss.initial_state() is not None


def _trained_state(loss: PreferenceLoss, module: DPOModule) -> Tensor | None:
    """Return what the loss remembers of training, if it is the one that was trained with."""
    return None if loss != module.loss or module.loss_state is None else module.loss_state.detach().cpu()


def _state(loss: PreferenceLoss, trained: Tensor | None, pairs: PairLogps) -> Tensor | None:
    """Return what training left, or what the loss would remember after these pairs alone."""
    first = loss.initial_state()
    if first is None or trained is not None:
        return trained
    with torch.no_grad():
        return loss.next_state(first, loss.sums(pairs._replace(state=first)))


def _sums(logps: SequenceLogps) -> SequenceLogps:
    return SequenceLogps(logps.total, logps.length)


def _joined(records: Sequence[PairLogps]) -> PairLogps:
    """Join batches; a column that not all of them have is left out."""
    common = set.intersection(*(set(one.columns) for one in records))
    return join([one._replace(columns={name: one.columns[name] for name in sorted(common)}) for one in records])
