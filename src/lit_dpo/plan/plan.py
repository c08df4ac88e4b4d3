"""What a run will need: counted on its data and on its model without weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import TrainingError
from lit_dpo.logps.fields import Field
from lit_dpo.logps.microbatch import MICROBATCH_TOKENS
from lit_dpo.memory import Lengths, StepEstimate, StepMemory, optimizer_bytes, stored_bytes
from lit_dpo.plan.arithmetic import Arithmetic, count, measured_rate
from lit_dpo.plan.cards import Card, card
from lit_dpo.plan.skeleton import Skeleton, skeleton
from lit_dpo.policy.devices import default_dtype
from lit_dpo.references import AdapterReference, CachedReference, EMAReference, ModelReference, NoReference
from lit_dpo.requirements import check_run

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.module import DPOModule
    from lit_dpo.policy.base_model import BaseModel
    from lit_dpo.references.base import Reference


GIB = 2.0**30
_PROCESS = 0.5 * GIB
"""Python, PyTorch and the libraries on a CPU; on a GPU about the same is the device's context."""
_USED = (0.2, 0.45)
"""Part of a card's arithmetic that training uses. Not measured on any card: what trainers of large models report."""
_SPREAD = (0.6, 1.0)
"""Part of a measured layer's rate that whole steps reach, measured on CPUs."""


class Device(NamedTuple):
    """Where the run is planned for."""

    name: str
    memory: float
    on_gpu: bool
    dtype: torch.dtype
    card: Card | None


class Plan(NamedTuple):
    """What a run needs.

    Attributes:
        pairs: comparisons of training.
        prompts: examples of training: prompts with their completions. As many as pairs, where each has two.
        completions: of these, all told.
        tokens: means of the prompt, and of the first and the second completion, or, where there are more than two, of
            all completions of a prompt together.
        longest: tokens of the longest prompt with its completions.
        steps: optimizer steps of the whole run.
        epochs: passes over the data of the whole run; a part of one where it stops inside.
        parameters: numbers in the frozen weights.
        trained: numbers in the adapters.
        step: the memory of a training step, as the run is configured.
        device: what it is planned for.
        fitting: the most `microbatch_tokens` whose step fits the device; None if none fits.
        checkpointing: whether that takes `gradient_checkpointing`.
        arithmetic: floating point operations of the whole run, on all devices.
        seconds: from and to.
        text: all of it, for reading.
    """

    pairs: int
    prompts: int
    completions: int
    tokens: tuple[float, ...]
    longest: int
    steps: int
    epochs: float
    parameters: int
    trained: int
    step: StepMemory
    device: Device
    fitting: int | None
    checkpointing: bool
    arithmetic: float
    seconds: tuple[float, float]
    text: str

    def __str__(self) -> str:
        """Write the text."""
        return self.text


def plan(module: DPOModule, data: pl.LightningDataModule, trainer: pl.Trainer, device: str = "here") -> Plan:
    """Plan a run. Configuration, tokenizer and data are read (and encoded, for the run that follows); no weights.

    Args:
        module: a `DPOModule`.
        data: a `PreferenceDataModule`.
        trainer: of the run; it does not run.
        device: `here`, or a GPU by name, see `lit_dpo.plan.cards.CARDS`.

    Raises:
        TrainingError: for another data module or a stream, whose lengths are not known, or an unknown name.
        LitDPOError: for whatever the run itself would refuse before it loads weights.
    """
    if not isinstance(data, PreferenceDataModule):
        raise TrainingError(f"Expected a PreferenceDataModule to plan with but got {type(data).__name__}.")
    if data.streaming:
        raise TrainingError(
            "Expected data of a known length to plan with: `--data.streaming false`, or a file of some."
        )
    target = _device(device, trainer)
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    data.setup("fit")
    check_run(module, trainer, weights=False)
    loader = data.train_dataloader()
    table = loader.dataset.table  # type: ignore[attr-defined]
    lengths = Lengths(table.prompt_lengths, table.completions_per_prompt, table.completion_lengths)
    steps, epochs = planned_steps(trainer, len(loader))
    found = _Search(module, loader, target)
    step, (fitting, checkpointing) = found.step(found.wanted), found.fitting()
    passes = epochs * loader.sampler.epoch_rows / table.size  # type: ignore[attr-defined] # a mixture repeats rows
    arithmetic = _arithmetic(module, found.arithmetic(lengths), passes)
    tokens = min(found.wanted, int(lengths.tokens / table.size * (data.batch_size or math.inf)))
    rates, said = _rates(target, module.policy.quantization, found.skeleton, tokens)
    ranks = trainer.world_size
    seconds = (arithmetic / rates[1] / ranks, arithmetic / rates[0] / ranks)
    made = Plan(
        pairs=int(table.comparisons_per_prompt.sum()),
        prompts=table.size,
        completions=len(lengths.completion),
        tokens=_means(lengths),
        longest=int(table.lengths.max()),
        steps=steps,
        epochs=epochs,
        parameters=found.skeleton.parameters,
        trained=found.skeleton.trained,
        step=step,
        device=target,
        fitting=fitting,
        checkpointing=checkpointing,
        arithmetic=arithmetic,
        seconds=seconds,
        text="",
    )
    return made._replace(text=_text(made, module, found.wanted, said, ranks))


class _Search:
    """Steps of any size, on a skeleton that is made once."""

    def __init__(self, module: DPOModule, loader: Any, device: Device) -> None:
        self.module, self.loader, self.device = module, loader, device
        self.wanted = module.microbatch_tokens or MICROBATCH_TOKENS["cuda" if device.on_gpu else "cpu"]
        self.whole, self.of_one_prompt = module.why_whole is not None, module.prompt_limit
        self.skeleton, self.estimate = self._measure(module.policy)

    def context(self) -> AbstractContextManager[Any]:
        """Return what a step runs in: on a GPU autocast, for which that of a CPU stands."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.device.on_gpu else nullcontext()

    def step(self, microbatch_tokens: int, estimate: StepEstimate | None = None) -> StepMemory:
        limits = (math.inf, math.inf) if self.whole else (microbatch_tokens, max(microbatch_tokens, self.of_one_prompt))
        largest, several = self.loader.largest_microbatches(*limits)
        return (estimate or self.estimate).of([Lengths.of(part) for part in largest], several)

    def fitting(self) -> tuple[int | None, bool]:
        """Find the most `microbatch_tokens` that fit, if need be with checkpoints; those of the run where they do."""
        if (found := self._most(self.estimate)) or self.module.policy.gradient_checkpointing:
            return found, False
        _, estimate = self._measure(replace(self.module.policy, gradient_checkpointing=True))
        return self._most(estimate), True

    def _most(self, estimate: StepEstimate) -> int | None:
        room = self.device.memory - _PROCESS
        sizes = [self.wanted, *(2**power for power in range(16, 7, -1) if 2**power < self.wanted)]
        return next((size for size in sizes if self.step(size, estimate).total <= room), None)

    def _measure(self, policy: BaseModel) -> tuple[Skeleton, StepEstimate]:
        whole = self._skeleton(policy)
        others = _other_models(self.module.reference.unwrapped, whole, self.device)
        frozen, trained = stored_bytes(whole.model)
        if (repeats := whole.repeats) is None:
            shallow = deep = self._estimate(whole)
            times = 0
        else:
            shallow, deep = (self._estimate(self._skeleton(policy, n)) for n in (repeats.shallow, repeats.deep))
            times = repeats.times
        return whole, shallow.with_layers(deep, times, frozen + others, trained)

    def _estimate(self, made: Skeleton) -> StepEstimate:
        kept = optimizer_bytes(self.module.optimizer, torch.device("cpu"))

        @contextmanager
        def context() -> Iterator[None]:
            with made.fake, self.context():
                yield

        return StepEstimate(made.model, kept, with_kl=Field.KL in self.module.loss.requires, context=context)

    def _skeleton(self, policy: BaseModel, layers: int | None = None) -> Skeleton:
        return skeleton(policy, self.device.dtype, on_gpu=self.device.on_gpu, layers=layers)

    def arithmetic(self, lengths: Lengths) -> Arithmetic:
        """Of one pass over all pairs."""
        if (repeats := self.skeleton.repeats) is None:
            return count(self.skeleton, self.context, lengths)
        policy = self.module.policy
        shallow, deep = (
            count(self._skeleton(policy, n), self.context, lengths) for n in (repeats.shallow, repeats.deep)
        )
        return shallow.with_layers(deep, repeats.times)


def _other_models(reference: Reference, made: Skeleton, device: Device) -> int:
    """Bytes of a reference that is not the policy's own base."""
    if isinstance(reference, ModelReference):
        dtype = reference.torch_dtype(torch.device("cpu"), device.dtype)
        return sum(stored_bytes(skeleton(reference, dtype, on_gpu=device.on_gpu).model))
    return 4 * made.trained if isinstance(reference, AdapterReference | EMAReference) else 0


def _device(name: str, trainer: pl.Trainer) -> Device:
    if name != "here":
        found = card(name)
        return Device(name, found.memory * GIB, True, torch.bfloat16 if found.has_bfloat16 else torch.float16, found)
    root = trainer.strategy.root_device
    if root.type == "cuda":
        name = torch.cuda.get_device_name(root)
        return Device(name, float(torch.cuda.mem_get_info(root)[0]), True, default_dtype(root), None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", float(memory), False, torch.float32, None)


def planned_steps(trainer: pl.Trainer, batches: int) -> tuple[int, float]:
    """Optimizer steps of a run, and epochs.

    Args:
        trainer: says how long it trains.
        batches: of an epoch.

    Raises:
        TrainingError: if it has no end.
    """
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    each = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        steps = trainer.max_steps
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            steps = min(steps, trainer.max_epochs * each)
    elif trainer.max_epochs is not None and trainer.max_epochs >= 0:
        steps = trainer.max_epochs * each
    else:
        raise TrainingError("Expected `max_epochs` or `max_steps` to plan with: how long shall it train?")
    return steps, steps / each


def _arithmetic(module: DPOModule, one: Arithmetic, epochs: float) -> float:
    reference = module.reference
    if isinstance(reference, NoReference):
        passes = 0.0
    elif isinstance(reference, CachedReference):
        passes = min(1.0, epochs)
    else:
        passes = epochs
    if isinstance(reference.unwrapped, ModelReference):
        rank_zero_info("the reference's passes are counted as if it were as large as the policy")
    return one.training * epochs + one.reference * passes


def _rates(device: Device, quantization: str, made: Skeleton, tokens: int) -> tuple[tuple[float, float], str]:
    """Operations a second, from and to, and where they come from."""
    if device.card is not None:
        peak = device.card.teraflops * 1e12
        low, high = _USED
        said = f"{low:.0%} to {high:.0%} of {device.card.teraflops:g} TFLOP/s ({device.card.source}), not measured"
        return (low * peak, high * peak), said
    place = torch.device("cuda" if device.on_gpu else "cpu")
    rate = measured_rate(made.widest, max(1, tokens), quantization, place, device.dtype)
    low, high = _SPREAD
    unit = f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
    return (low * rate, high * rate), f"{low:.0%} to {high:.0%} of the {unit} that one layer reaches here now"


def _text(made: Plan, module: DPOModule, wanted: int, rate: str, ranks: int) -> str:
    policy, device = module.policy, made.device
    prompt, *completions = made.tokens
    precision = str(device.dtype).removeprefix("torch.")
    cluster = f" on {ranks} devices" if ranks > 1 else ""
    lines = {
        "data": f"{_counted(made)} of {sum(made.tokens):,.0f} tokens (prompt {prompt:,.0f}, completions "
        f"{' and '.join(f'{mean:,.0f}' for mean in completions)}), the longest {made.longest:,}; {made.steps:,} steps, "
        f"{made.epochs:.3g} epoch{'' if made.epochs == 1 else 's'}",
        "model": f"{policy.model}: {made.parameters:,} parameters, {policy.quantization}, computing in {precision}; "
        f"{made.trained:,} train",
        "a step": str(made.step),
        "fits": f"{device.name}, {device.memory / GIB:.1f} GiB: {_fits(made, wanted)}",
        "time": f"{_span(*made.seconds)}{cluster}: {made.arithmetic:.3g} operations, at {rate}",
    }
    return "\n".join(
        ["An estimate; no weights were read or downloaded.", *(f"{name:7} {said}" for name, said in lines.items())]
    )


def _means(lengths: Lengths) -> tuple[float, ...]:
    if (lengths.completions_per_prompt == 2).all():
        completions = [lengths.completion[place::2].mean() for place in (0, 1)]
    else:
        completions = [lengths.completion.sum() / len(lengths.prompt)]
    return tuple(float(mean) for mean in (lengths.prompt.mean(), *completions))


def _counted(made: Plan) -> str:
    if len(made.tokens) == 3:
        return f"{made.pairs:,} training pairs"
    return f"{made.prompts:,} training prompts, with {made.completions:,} completions in {made.pairs:,} comparisons,"


def _fits(made: Plan, wanted: int) -> str:
    if made.fitting is None:
        return (
            "no, not even with gradient checkpointing, a pair at a time: lower `--data.max_length`, or take less model"
        )
    options = ["`--model.policy.gradient_checkpointing true`"] if made.checkpointing else []
    options += [f"`--model.microbatch_tokens {made.fitting}`"] if made.fitting != wanted else []
    return f"yes, with {' and '.join(options)}" if options else "yes"


def _span(low: float, high: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if high >= 2 * size:
            return f"{low / size:.2g} to {high / size:.2g} {unit}"
    return f"{low:.2g} to {high:.2g} seconds"
