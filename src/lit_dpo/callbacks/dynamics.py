from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.export import data_of, run_directory
from lit_dpo.callbacks.stop import is_stop
from lit_dpo.checkpoint import KEY, gather
from lit_dpo.data.batch import places
from lit_dpo.logps.records import PairLogps, SequenceLogps
from lit_dpo.versions import DYNAMICS
from lit_dpo.writing import written_whole

if TYPE_CHECKING:
    import pyarrow as pa

    from lit_dpo.data.batch import CompletionBatch
    from lit_dpo.module import DPOModule

FILE = "dynamics.parquet"
"""In the run's directory."""

_COUNTS = ("epoch", "step", "index", "chosen", "rejected")
_NUMBERS = ("margin", "reward_margin", "reference_margin", "loss", "gradient")
_AT_ONCE = 256  # batches whose numbers stay on their device, so that a step waits for none


class Measured(NamedTuple):
    """Comparisons as they were measured: a row each.

    Attributes:
        counts: `(N, 5)` int32 on the CPU: epoch, optimizer steps before, row number, places of the two completions.
        numbers: `(N, 5)` float32: margin, reward margin and the reference's margin (nats), loss, size of the gradient.
    """

    counts: Tensor
    numbers: Tensor

    @classmethod
    def none(cls) -> Measured:
        """No rows."""
        return cls(torch.zeros(0, len(_COUNTS), dtype=torch.int32), torch.zeros(0, len(_NUMBERS)))

    @classmethod
    def joined(cls, parts: list[Measured]) -> Measured:
        """All rows, on the CPU."""
        if not parts:
            return cls.none()
        return cls(torch.cat([one.counts for one in parts]), torch.cat([one.numbers for one in parts]).cpu())


class TrainingDynamics(pl.Callback):
    """Writes down what training does with each comparison, to `dynamics.parquet`; `lit-dpo audit` reads it.

    A row for each comparison and epoch, as the training passes themselves see it, just before its step: no pass more.
    Columns: `epoch`, `step` (optimizer steps before it), `index` (row number in the training data), `chosen` and
    `rejected` (places among the prompt's completions, 0 and 1 of a pair), `margin` (difference of the log-ratios,
    nats; of log-probs under a loss without a reference), `reward_margin` (β times it), `confidence` (its sigmoid),
    `reference_margin` (difference of the reference's log-probs, nats; missing without one), `loss`, and
    `gradient_share`: what part of its step's |∂L/∂ log π| is the comparison's, whatever the loss is.

    Rows are kept in memory, 40 bytes each, are in the checkpoints, and are written after each epoch and when the run is
    stopped: a run that goes on has each of them once.
    """

    _batch: CompletionBatch | None = None  # until training begins

    def setup(self, trainer: pl.Trainer, pl_module: DPOModule, stage: str) -> None:
        """Begin anew; a checkpoint that is loaded after this brings its rows."""
        self._rows, self._parts, self._failed = Measured.none(), list[tuple[int, int, Measured]](), False
        self._batch = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: DPOModule, batch: CompletionBatch, batch_idx: int
    ) -> None:
        """Know which rows are measured."""
        self._batch, self._number, pl_module.measured_batch = batch, batch_idx, None

    def on_after_backward(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Note what the pass has seen, before the step that it is for."""
        if self._failed or self._batch is None:
            return
        with alone("TrainingDynamics"):
            if pl_module.measured_batch is None:
                raise TypeError("there is a `training_step` of one's own, which measures no comparisons")
            found = measured(pl_module, self._batch, trainer.current_epoch, trainer.global_step)
            step, number, _ = self._parts[-1] if self._parts else (-1, -1, None)
            if (step, number) == (trainer.global_step, self._number):  # an optimizer asks several times
                self._parts.pop()
            self._parts.append((trainer.global_step, self._number, found))
            if len(self._parts) >= 2 * _AT_ONCE:
                self._settle(trainer)
            return
        self._failed = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        """Write the file, whole or not at all."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: DPOModule, exception: BaseException) -> None:
        """Write it if somebody stopped the run."""
        if is_stop(trainer, exception) and trainer.state.fn == "fit" and self._batch is not None:
            self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: DPOModule, checkpoint: dict[str, Any]) -> None:
        """Add the rows of the steps that were made, of all ranks; all of them ask together."""
        checkpoint[f"{KEY}_dynamics"] = dict(self._all(trainer)._asdict())

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: DPOModule, checkpoint: dict[str, Any]) -> None:
        """Go on with its rows."""
        if (there := checkpoint.get(f"{KEY}_dynamics")) and trainer.is_global_zero:
            self._rows = Measured(**there)

    def _settle(self, trainer: pl.Trainer) -> None:
        """Put the rows of steps that were made together; batches of a step that was not made come again."""
        # by the trainer's count, since a checkpoint may be written before this callback hears of the step
        made = [rows for step, _, rows in self._parts if step < trainer.global_step]
        self._rows = Measured.joined([self._rows, *made])
        self._parts = self._parts[len(made) :]

    def _all(self, trainer: pl.Trainer) -> Measured:
        """Bring the rows of all ranks to the first one, which keeps them."""
        self._settle(trainer)
        if trainer.world_size > 1:
            gathered = gather(dict(self._rows._asdict()), trainer.world_size)
            self._rows = Measured.joined([Measured(**one) for one in gathered])
            if not trainer.is_global_zero:
                self._rows = Measured.none()
        return self._rows

    def _write(self, trainer: pl.Trainer, pl_module: DPOModule) -> None:
        rows, directory = self._all(trainer), run_directory(trainer)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False) or not len(rows.counts):
            return
        if self._failed:
            return
        about = {"loss": type(pl_module.loss).__name__, "beta": pl_module.loss.beta}
        digest = getattr(data_of(trainer), "train_digest", None)
        with alone("TrainingDynamics"), written_whole(directory / FILE) as path:
            write(path, rows, {**about, "data": digest})


def measured(module: DPOModule, batch: CompletionBatch, epoch: int, step: int) -> Measured:
    """Look at the comparisons of the batch that a module has measured last.

    Args:
        module: has just measured it.
        batch: which it was.
        epoch: from 0.
        step: optimizer steps before it.
    """
    assert module.measured_batch is not None
    if not batch.size:  # a rank without a share of the batch
        return Measured.none()
    pairs, losses = module.measured_batch.pairs, module.measured_batch.losses
    policy = pairs.policy_chosen.total - pairs.policy_rejected.total
    if pairs.reference_chosen is None or pairs.reference_rejected is None:
        reference, margin = torch.full_like(policy, torch.nan), policy
    else:
        reference = pairs.reference_chosen.total - pairs.reference_rejected.total
        margin = pairs.margin
    chosen, rejected = module.measured_batch.chosen_rewards, module.measured_batch.rejected_rewards
    if losses.shape != policy.shape:  # one for each prompt
        losses = pairs.lists.per_comparison(losses)
    numbers = torch.stack([margin, chosen - rejected, reference, losses, gradient_sizes(module, pairs)], 1)
    when = torch.tensor([[epoch, step]]).expand(batch.size, 2)
    counts = torch.cat([when, batch.indices[:, None].cpu(), batch.comparisons.cpu()], 1).int()
    return Measured(counts, numbers.float())


def gradient_sizes(module: DPOModule, pairs: PairLogps) -> Tensor:
    """`(B,)` |∂L/∂ log π| of both sides together, L the sum of the losses, from a record without a graph.

    Of each side it is the mean over its tokens, so that a loss which reads sums and one which reads tokens compare. Of
    a loss over lists each completion's is shared out among the comparisons that it is in.
    """
    shared = pairs.lists.completions_per_prompt.shape != pairs.policy_chosen.total.shape and (
        module.loss.per_prompt or module.average_over == "prompt"
    )
    device = pairs.policy_chosen.total.device
    devices = [device] if device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):  # a loss of one's own may draw
        if shared:
            policy = _leaves(pairs.lists.policy)
            losses = module.passes.losses_among(pairs.lists._replace(policy=policy).pairs(pairs.columns, pairs.state))
            return _shared_out(_sizes(losses, [policy])[0], pairs)
        sides = [_leaves(pairs.policy_chosen), _leaves(pairs.policy_rejected)]
        alone_ = pairs._replace(policy_chosen=sides[0], policy_rejected=sides[1], completions=None)
        return torch.stack(_sizes(module.passes.losses_among(alone_), sides)).sum(0)


def _leaves(side: SequenceLogps) -> SequenceLogps:
    asking = {
        name: values.detach().requires_grad_()
        for name in ("total", "per_token")
        if (values := getattr(side, name)) is not None
    }
    return side._replace(**asking)


def _sizes(losses: Tensor, sides: list[SequenceLogps]) -> list[Tensor]:
    """`(B,)` mean over each completion's tokens of |∂L/∂ log π|."""
    if not losses.requires_grad:  # of a loss that is flat here
        return [torch.zeros_like(side.total) for side in sides]
    wanted = [one for side in sides for one in (side.total, side.per_token) if one is not None]
    found = dict(zip(map(id, wanted), torch.autograd.grad(losses.sum(), wanted, allow_unused=True), strict=True))
    sizes = []
    for side in sides:
        of_sum, of_tokens = found[id(side.total)], found.get(id(side.per_token))
        whole = torch.zeros_like(side.total) if of_sum is None else of_sum
        if of_tokens is not None:
            lengths = side.length.long()
            slopes = torch.repeat_interleave(whole, lengths, output_size=len(of_tokens)) + of_tokens
            whole = side.sums(slopes.abs()) / side.length
        sizes.append(whole.abs())
    return sizes


def _shared_out(sizes: Tensor, pairs: PairLogps) -> Tensor:
    """`(B,)` of `(C,)`: each completion's among the comparisons that it is in."""
    both = torch.from_numpy(places(pairs.lists)).to(sizes.device)
    often = torch.bincount(both.flatten(), minlength=len(sizes)).clamp(min=1)
    return (sizes / often)[both].sum(1)


def write(path: Path, rows: Measured, about: dict[str, Any]) -> None:
    """Write rows as Parquet, each comparison's gradient as its share of its step's.

    Args:
        path: of the file.
        rows: of all ranks.
        about: what is said of the run, in builtins.
    """
    import pyarrow.parquet as pq

    pq.write_table(table(rows, about), path)


def table(rows: Measured, about: dict[str, Any]) -> pa.Table:
    """Make the table that is written, in the order of training."""
    import numpy as np
    import pyarrow as pa

    counts = dict(zip(_COUNTS, rows.counts.numpy().T, strict=True))
    numbers = dict(zip(_NUMBERS, rows.numbers.numpy().T, strict=True))
    gradient = numbers.pop("gradient").astype(np.float64)
    _, of = np.unique(counts["step"], return_inverse=True)
    sums = np.bincount(of, gradient)[of]
    numbers["gradient_share"] = np.divide(gradient, sums, out=np.zeros_like(gradient), where=sums > 0).astype("f4")
    numbers["confidence"] = torch.sigmoid(torch.from_numpy(numbers["reward_margin"])).numpy()
    order = np.lexsort((counts["rejected"], counts["chosen"], counts["index"], counts["step"]))
    made = pa.table({name: values[order] for name, values in {**counts, **numbers}.items()})
    return made.replace_schema_metadata({"lit_dpo": json.dumps({"version": DYNAMICS, **about})})
