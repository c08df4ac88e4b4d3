"""The LightningModule: a policy, a reference, a loss, and the hooks that bring them together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection

from lit_dpo.callbacks.brought import with_brought
from lit_dpo.callbacks.export import claim_versions, clear_runs, unnumbered
from lit_dpo.callbacks.own_directory import OwnDirectory
from lit_dpo.checkpoint import (
    Standing,
    adapter_state,
    check_belongs,
    configuration,
    describe,
    frozen_is_not_missing,
    hyper_parameters,
    load_strictly,
    only_known_classes,
    read_checkpoint,
    untrusting,
)
from lit_dpo.data.batch import CompletionBatch
from lit_dpo.errors import PolicyError, TrainingError
from lit_dpo.logps.choice import choose_layout
from lit_dpo.logps.fields import Field
from lit_dpo.logps.microbatch import (
    MICROBATCH_TOKENS,
    why_whole,
)
from lit_dpo.logps.records import CompletionLogps, PairLogps, SequenceLogps
from lit_dpo.logps.score import completion_logps
from lit_dpo.losses import DPOLoss, PreferenceLoss
from lit_dpo.metrics.collections import asked_together, of_set, preference_metrics
from lit_dpo.passes import BatchPasses, may_couple, overrides, trainer_of
from lit_dpo.policy import LoRAPolicy
from lit_dpo.policy.base_model import BaseModel
from lit_dpo.policy.devices import remark
from lit_dpo.policy.sharding import leave_to_shards, make_mesh, parameter_counts
from lit_dpo.references import Reference
from lit_dpo.requirements import check_run, resolve_reference
from lit_dpo.schedules import check_schedule, make_schedule, steps_of_run
from lit_dpo.window import MeasuredBatch, Window

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAMED_IN_FILES: tuple[type, ...] = (pl.LightningModule, BaseModel, PreferenceLoss, Reference)
"""What a checkpoint may name classes of, besides optimizers and schedules."""


class DPOModule(pl.LightningModule):
    """Preference optimisation of a LoRA policy against a frozen reference.

    Subclasses override `configure_model`, `configure_metrics`, `forward`, `completion_logps`, `pair_logps`,
    `compute_loss` or `configure_optimizers`. Weights load in `configure_model`, never in `__init__`. See
    `couples_pairs`.

    Lightning's hooks (`on_…`, `setup`, `configure_callbacks`, …) are the subclass's own: nothing here depends on
    `super()` in them. What must happen is done by callbacks that come along, unless the trainer has its own of a class.

    Args:
        policy: the model that is trained.
        loss: the preference loss; a frozen strategy.
        reference: what the policy is compared with. By default its base with adapters off, or, for a policy that
            continues an adapter, a frozen copy of that adapter, or, for a loss that reads none, none.
        optimizer: makes the optimizer from the adapters' parameters.
        lr_scheduler: shape of the learning rate after the warm-up, stepped per optimizer step: `linear` and `cosine`
            fall to the end, `wsd` only over the last steps (warm-up, stable, decay; arXiv 2404.06395; its warm-up
            begins at `min_lr_ratio`). Or any scheduler of PyTorch by class path, or what makes one from the optimizer;
            Lightning's `ReduceLROnPlateau` follows a measure.
        warmup_ratio: part of all steps over which the learning rate rises from 0. Expected in [0, 1].
        min_lr_ratio: part of the learning rate that is left at the end. Expected in [0, 1).
        decay_ratio: part of all steps over which `wsd` falls. None: 0.2.
        microbatch_tokens: most tokens that run at once. A batch is cut into micro-batches of whole prompts, whose
            gradients add up: the same step, but for other dropout masks, in the memory of one micro-batch. None: 1024
            on a CPU, 16384 on a GPU. A loss that couples the prompts of a batch costs one forward pass more then; so
            does a prompt with more than two completions that is longer than this, or, by default, than 16384.
        average_over: what counts the same in the loss of a step: each `"comparison"`, or each `"prompt"`, with the mean
            over its comparisons, as InstructGPT has it (arXiv 2203.02155, eq. 1). They differ where prompts have
            different numbers of comparisons.

    Raises:
        PolicyError: if the loss needs a reference and there is none, or the other way round, or `average_over` is
            neither.

    Example:
        ```python
        module = DPOModule(LoRAPolicy("lit-dpo/quickstart"), loss=IPOLoss(beta=0.5))
        Trainer(max_epochs=1).fit(module, PreferenceDataModule(train="pairs.jsonl"))
        ```
    """

    couples_pairs: bool | None = None
    """Whether an override of `forward`, `completion_logps`, `pair_logps` or `compute_loss` must see a whole training
    batch, because it mixes prompts, logs, or waits for other ranks. None: yes, if there is one. If False, they are
    called for each micro-batch. An override of `compute_loss` alone costs a second pass then, as a loss that couples
    pairs does; one of the others costs the memory of the whole batch."""

    accepts_changes = False
    """Whether what is loaded may be of a run with another loss or reference."""

    loss_state: Tensor | None

    def __init__(
        self,
        policy: LoRAPolicy,
        loss: PreferenceLoss = DPOLoss(),  # noqa: B008 - frozen
        reference: Reference | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        lr_scheduler: Literal["linear", "cosine", "constant", "wsd"] | LRSchedulerCallable = "linear",
        warmup_ratio: float = 0.0,
        min_lr_ratio: float = 0.0,
        decay_ratio: float | None = None,
        microbatch_tokens: int | None = None,
        average_over: Literal["comparison", "prompt"] = "comparison",
    ) -> None:
        super().__init__()
        if not isinstance(policy, LoRAPolicy):
            raise PolicyError(
                f"Expected a policy but got a {type(policy).__name__}. `LoRAPolicy(name)` loads a model, and "
                "`LoRAPolicy.from_model(model)` takes one that is loaded."
            )
        if getattr(optimizer, "__qualname__", "") == "DPOModule.<lambda>":  # the command can write it, pickle cannot
            optimizer = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
        with warnings.catch_warnings():  # a lambda cannot be saved; a checkpoint then falls back on the default
            warnings.filterwarnings("ignore", message=".*removed from hparams because it cannot be pickled.*")
            self.save_hyperparameters()
        reference = resolve_reference(reference, loss, policy)
        check_schedule(lr_scheduler, warmup_ratio, min_lr_ratio, decay_ratio)
        if microbatch_tokens is not None and microbatch_tokens < 1:
            raise PolicyError(f"Expected `microbatch_tokens` >= 1 but got {microbatch_tokens}.")
        if average_over not in ("comparison", "prompt"):
            raise PolicyError(f"Expected `average_over` to be `comparison` or `prompt` but got {average_over!r}.")
        self.policy, self.loss, self.reference = policy, loss, reference
        self.optimizer, self.lr_scheduler, self.warmup_ratio = optimizer, lr_scheduler, warmup_ratio
        self.min_lr_ratio, self.decay_ratio = min_lr_ratio, decay_ratio
        self.lr: float | None = None  # instead of the optimizer's own; what Lightning's tuner finds, it sets here
        self.microbatch_tokens, self.average_over = microbatch_tokens, average_over
        self.model: Any = None
        self.register_buffer("loss_state", loss.initial_state())
        self.fresh = True  # until it has trained, or was loaded with a checkpoint's adapter
        self.train_metrics, self.val_metrics, self.test_metrics = map(self._metrics_of, ("train/", "val/", "test/"))
        self.eval_sets = torch.nn.ModuleDict()  # metrics of each validation or test set, where there are several
        self.register_load_state_dict_post_hook(frozen_is_not_missing)  # type: ignore[no-untyped-call]
        self.window = Window()
        self.passes = BatchPasses(self)
        self.unlogged = False  # whether the training metrics have counted something since the last row
        self.fetched: dict[str, Tensor] | None = None  # their values on the CPU, until they count the next batch
        self.measured_batch: MeasuredBatch | None = None  # the last one, for callbacks; not of a step of one's own
        self.asked: dict[str, Tensor] = {}  # what callbacks want to know too: the check of gradients fetches it
        self.schedule_steps: int | None = None  # of a learning rate that changes, by `configure_optimizers`
        self.standing: Standing | None = None  # after the last step
        self.configured = False  # until the policy has loaded
        self.checked = False  # until `prepare_data` has looked at this run

    def _metrics_of(self, prefix: str) -> MetricCollection:
        measured = self.configure_metrics()
        if type(self).configure_metrics is not DPOModule.configure_metrics:  # it may return one that it keeps
            measured = measured.clone()
        measured.prefix = prefix
        return asked_together(measured)

    # ---- what subclasses override ----

    def configure_model(self) -> None:
        """Load policy and reference on the trainer's device and choose the layout. Does nothing the second time."""
        if self.model is not None:  # Lightning asks before every stage, `load_state_dict` asks too
            return
        self.configured = True
        device = self.trainer.strategy.root_device if trainer_of(self) is not None else torch.device("cpu")
        precision = str(self.trainer.precision) if trainer_of(self) is not None else ""
        half = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "16-mixed": torch.float16}
        # Lightning makes its device the default here; a CPU's generator draws no GPU tensors
        cpu = torch.device("cpu")
        with nullcontext() if torch.get_default_device() == cpu else cpu:
            mesh = self._mesh()
            load = self.policy.load if mesh is None else partial(self.policy.load, mesh=mesh)
            self.model = load(device, half.get(precision))
            if line := remark(device, precision, self.policy.torch_dtype(device, half.get(precision))):
                rank_zero_info(line)
            self.reference.attach(self.model, self.policy)
            layout = choose_layout(self.model, self.policy.attention)
        leave_to_shards(self)
        trained, total = parameter_counts(self.model)
        rank_zero_info(f"{trained} of {total} parameters train; {layout} layout; reference {self.reference}")

    def configure_metrics(self) -> MetricCollection:
        """Name what is measured in training, validation and test; extend what `super()` returns."""
        return preference_metrics(self.loss.part_names, kl=Field.REFERENCE_PER_TOKEN in self.reference.provides)

    def forward(self, batch: CompletionBatch) -> SequenceLogps:
        """`(C,)` log-probs of the batch's completions under the policy."""
        collision = Field.COLLISION in self.loss.requires
        return completion_logps(self.model, batch, collision=collision, frozen=self.passes.frozen)

    def completion_logps(self, batch: CompletionBatch) -> CompletionLogps:
        """Score each completion once: under the policy, with gradients, and under the reference, without."""
        frozen, reference = self.passes.reference_logps(batch)
        self.passes.note_draw()
        return CompletionLogps.of(batch, self.passes.policy_logps(batch, frozen), reference)

    def pair_logps(self, batch: CompletionBatch) -> PairLogps:
        """Make the record of `B` comparisons that losses and metrics read: `completion_logps`, and the data's columns.

        Of a prompt that is too long to run at once it is made without this method.
        """
        return self.completion_logps(batch).pairs(batch.columns, self.loss_state)

    def compute_loss(self, pairs: PairLogps) -> Tensor:
        """Losses `(B,)`, or `(P,)` of a loss over lists, times the data's weights.

        The module takes their mean over all of an optimizer step; see `average_over`.
        """
        losses = self.loss(pairs)
        if (weight := pairs.columns.get("weight")) is None:
            return losses
        return losses * (pairs.lists.per_prompt(weight) if self.loss.per_prompt else weight)

    def configure_optimizers(self) -> Any:
        """Make the optimizer of the adapters, and the learning rate's schedule per step."""
        if self.model is None:
            raise TrainingError("Expected `configure_model` to load the policy: call `super().configure_model()`.")
        try:
            optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise TrainingError(f"The optimizer refuses its arguments: {error}") from error
        if self.lr is not None:
            for group in optimizer.param_groups:  # groups of a class of one's own keep their proportions
                group["lr"] *= self.lr / optimizer.defaults["lr"]
        steps = steps_of_run(self.trainer)
        schedule = make_schedule(
            optimizer,
            self.lr_scheduler,
            steps,
            warmup_ratio=self.warmup_ratio,
            min_lr_ratio=self.min_lr_ratio,
            decay_ratio=self.decay_ratio,
        )
        self.schedule_steps = int(steps) if schedule and isinstance(self.lr_scheduler, str) else None
        return {"optimizer": optimizer, "lr_scheduler": schedule} if schedule else optimizer

    # ---- what Lightning calls ----

    @pl.LightningModule.trainer.setter  # type: ignore[attr-defined, untyped-decorator, unused-ignore]
    def trainer(self, trainer: Any) -> None:
        """Bring callbacks along: see `with_brought`."""
        # not in `configure_callbacks`, which a subclass may override without `super()`
        pl.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is not None and trainer.lightning_module is self:
            trainer.callbacks = with_brought(trainer.callbacks)
            self._unnumbered = unnumbered(trainer)

    def prepare_data(self) -> None:
        """Find what is wrong before the run's directory is made; where this is overridden, before a weight is read."""
        check_run(self, self.trainer)
        self.checked = True
        if self.trainer.is_global_zero:
            claim_versions(self._unnumbered)
            for one in self.trainer.callbacks if self.trainer.state.fn == "fit" else ():
                if isinstance(one, OwnDirectory):
                    one.take(self.trainer)
            clear_runs(self.trainer)

    def training_step(self, batch: CompletionBatch, batch_idx: int) -> Tensor:
        """Return a batch's mean loss, before Lightning divides it for accumulation; see `Window` for its gradient."""
        self.fetched = None
        total, losses = self.passes.step(batch, self.train_metrics, training=True)
        self.unlogged = True
        parameters = [p for p in self.parameters() if p.requires_grad]
        mean = self.window.loss(total, losses.numel(), batch_idx, self.trainer, parameters)
        self.window.note(batch_idx, batch.indices_of(losses.numel()), losses)
        return mean

    def validation_step(self, batch: CompletionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure."""
        self._evaluate(batch, "val", self.trainer.val_dataloaders, dataloader_idx)

    def test_step(self, batch: CompletionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure."""
        self._evaluate(batch, "test", self.trainer.test_dataloaders, dataloader_idx)

    def predict_step(self, batch: CompletionBatch, batch_idx: int) -> dict[str, Tensor]:
        """Rewards, margins and log-probs of each comparison, `(B,)` each, on the CPU.

        Where a prompt has more than two completions, also the numbers of those that are compared, from 0.
        """
        pairs = self.batch_logps(batch)
        chosen, rejected = self.loss.rewards(pairs)
        columns = (chosen, rejected, chosen - rejected, pairs.policy_chosen.total, pairs.policy_rejected.total)
        names = ("chosen_reward", "rejected_reward", "margin", "chosen_logps", "rejected_logps")
        numbers = torch.stack(columns).cpu()  # one copy: each waits for the device
        return {
            "index": batch.indices,
            **dict(zip(names, numbers, strict=True)),
            "chosen_length": batch.chosen_lengths,
            "rejected_length": batch.rejected_lengths,
            **_which(batch),
            **{name: column.cpu() for name, column in batch.columns.items()},
        }

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move; never cast. The policy decides dtypes: `bf16-true` would round adapters, which then hardly train."""
        torch.nn.Module().to(*args, **kwargs)  # or torch's error, for what it cannot read
        first = args[0] if args else kwargs.get("device", kwargs.get("tensor"))
        if first is None or isinstance(first, torch.dtype):
            return self
        return super().to(first.device if isinstance(first, Tensor) else first)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the policy's adapter and whatever a subclass added; what is frozen is not stored."""
        # torch would store the whole base; one in 4 bits would not even load again
        model, self.model = self.model, None
        try:
            state: dict[str, Any] = super().state_dict(*args, **kwargs)
        finally:
            self.model = model
        if model is not None:
            state |= adapter_state(self, kwargs.get("prefix", args[1] if len(args) > 1 else ""))
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load adapters, strictly: every key must match.

        Raises:
            ResumeError: listing keys that are missing, unknown or of another shape.
        """
        self.configure_model()
        training = trainer_of(self) is not None and self.trainer.state.fn == "fit" and not self.accepts_changes
        load_strictly(self.state_dict(keep_vars=True), dict(state_dict), training=training)
        self.fresh = False
        return torch.nn.Module().load_state_dict({})  # as it says that all keys matched

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module as a checkpoint says it was, with its adapter; see Lightning.

        But no file says that code is run: `trust_remote_code` is false unless it is given here, within `policy=` or
        `reference=`, and of other projects it only names classes that are imported already.

        Raises:
            ResumeError: if the base that is there now is not the one that the adapter belongs to, if it is no
                checkpoint, or if it names a class that is not taken from a file.
            PolicyError: if that base comes with code of its own.
        """
        file = kwargs.get("hparams_file", args[1] if len(args) > 1 else None)
        stored = hyper_parameters(checkpoint_path, cls.CHECKPOINT_HYPER_PARAMS_KEY, file)
        given = untrusting(checkpoint_path, cls.CHECKPOINT_HYPER_PARAMS_KEY, file) | kwargs
        # the class that they say is Lightning's to check
        with only_known_classes({key: one for key, one in stored.items() if key not in kwargs}, cls, NAMED_IN_FILES):
            module = super().load_from_checkpoint(checkpoint_path, *args, **given)
        check_belongs(read_checkpoint(checkpoint_path), describe(module), training=False)
        return module

    # ---- micro-batches ----

    @property
    def microbatch_limit(self) -> int:
        """Most tokens that run at once, a longer pair excepted: `microbatch_tokens`, or what suits the device."""
        return self.microbatch_tokens or MICROBATCH_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]

    @property
    def prompt_limit(self) -> int:
        """Most tokens of a prompt with more than two completions, of which a longer one runs in parts."""
        # not the default for a CPU, which is about speed: parts cost a pass more, and the prompt once more each
        return self.microbatch_tokens or MICROBATCH_TOKENS["cuda"]

    @property
    def why_whole(self) -> str | None:
        """Why a training batch must not be cut, or None."""
        if may_couple(self, "forward", "completion_logps", "pair_logps"):
            return f"{type(self).__name__} may couple pairs (`couples_pairs = False` in its class says it does not)"
        if overrides(self, "pair_logps") and self.needs_two_passes:
            return f"the losses couple pairs that {type(self).__name__} makes"
        return why_whole(self.trainer.strategy, self.parameters())

    @property
    def needs_two_passes(self) -> bool:
        """Whether all log-probs of a batch must be known before any gradient is: the loss looks at several pairs."""
        return self.loss.couples_pairs or self.loss.initial_state() is not None or may_couple(self, "compute_loss")

    def batch_logps(self, batch: CompletionBatch) -> PairLogps:
        """`pair_logps` of a batch of any size, without gradients and dropout, one micro-batch at a time."""
        return self.passes.measure(batch)

    def accumulate(
        self, parts: Sequence[CompletionBatch], batch: CompletionBatch | None = None
    ) -> tuple[Tensor, Tensor, PairLogps]:
        """Return the sum of a batch's losses, to run backward from, the losses and the record; see `BatchPasses`.

        Args:
            parts: micro-batches.
            batch: of which they are. Needed where a prompt is in several of them.
        """
        return self.passes.accumulate(parts, batch)

    # ---- helpers ----

    def _mesh(self) -> DeviceMesh | None:
        """Make the ranks that share a base by `policy.shard`; where there is one rank, it is whole, in a line."""
        if self.policy.shard == "none":
            return None
        trainer = trainer_of(self)
        if trainer is None or trainer.world_size == 1:
            rank_zero_info(f"policy.shard={self.policy.shard}: the base is whole, for no trainer has several processes")
            return None
        device = trainer.strategy.root_device.type
        return make_mesh(self.policy.shard, device, trainer.world_size, trainer.num_nodes)

    @property
    def hparams_initial(self) -> AttributeDict:
        """The hyper-parameters in builtins, as loggers take them and the command line would have written them."""
        return AttributeDict(copy.deepcopy(configuration(self)))

    def losses_of(self, pairs: PairLogps) -> Tensor:
        """`compute_loss`, which must not be reduced: `(B,)` or `(P,)`; with `average_over="prompt"` always `(P,)`.

        Raises:
            TrainingError: naming both shapes; a mean would train with a part of the gradient.
        """
        losses = self.compute_loss(pairs)
        expected, found = tuple(pairs.policy_chosen.total.shape), getattr(losses, "shape", None)
        of_prompts = pairs.completions is not None and found == pairs.completions.completions_per_prompt.shape
        if found is None or (tuple(found) != expected and not of_prompts):
            what = f"a {type(losses).__name__}" if found is None else f"the shape {tuple(found)}"
            raise TrainingError(
                f"Expected a loss for each pair, of shape {expected}, but {type(self.loss).__name__} and "
                f"{type(self).__name__}.compute_loss gave {what}. Leave out the mean: the module takes it over all "
                "pairs of an optimizer step."
            )
        return pairs.lists.per_prompt(losses) if self.average_over == "prompt" and not of_prompts else losses

    def _evaluate(self, batch: CompletionBatch, stage: str, loaders: Any, number: int) -> None:
        """Measure a batch; where there are several sets, each by itself. `OptimizerSteps` logs all of them together."""
        together: MetricCollection = getattr(self, f"{stage}_metrics")
        measured, home, numbered = together, f"{stage}_metrics", False
        if isinstance(loaders, Mapping | Sequence) and len(loaders) > 1:
            name = list(loaders)[number] if isinstance(loaders, Mapping) else None
            key, measured = of_set(self.eval_sets, together, stage, number if name is None else name)
            home, numbered = f"eval_sets.{key}", name is None  # Lightning then adds the number
            self.passes.step(batch, measured, together)
        else:
            self.passes.step(batch, together)
        for name, metric in measured.items():
            self.log(
                name,
                metric,
                on_step=False,
                on_epoch=True,
                prog_bar=name == f"{stage}/reward_accuracy",
                batch_size=1,
                add_dataloader_idx=numbered,
                metric_attribute=home,
            )


def _which(batch: CompletionBatch) -> dict[str, Tensor]:
    """Say which of more than two completions are compared."""
    if int(batch.completions_per_prompt.max()) <= 2:
        return {}
    return dict(zip(("chosen_completion", "rejected_completion"), batch.comparisons.unbind(1), strict=True))
