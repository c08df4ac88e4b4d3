"""What a run will need: counted on its data and on its model without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_dpo.data.batch import microbatch_borders
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import TrainingError
from lit_dpo.logps.fields import Field
from lit_dpo.logps.microbatch import MICROBATCH_TOKENS
from lit_dpo.memory import Lengths, StepEstimate, StepMemory, optimizer_bytes
from lit_dpo.plan.arithmetic import Arithmetic, count, measured_rate
from lit_dpo.plan.cards import GIB, Device, device_of
from lit_dpo.plan.mesh import NETWORK, Links, Mesh, Parts, Share, Traffic
from lit_dpo.plan.skeleton import Skeleton, skeleton
from lit_dpo.plan.text import means, on_mesh, text_of
from lit_dpo.references import AdapterReference, CachedReference, EMAReference, ModelReference, NoReference
from lit_dpo.requirements import check_run

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lit_dpo.module import DPOModule
    from lit_dpo.policy.base_model import BaseModel


_PROCESS = 0.5 * GIB
"""Python, PyTorch and the libraries on a CPU; on a GPU about the same is the device's context."""
_USED = (0.2, 0.45)
"""Part of a card's arithmetic that training uses. Not measured on any card: what trainers of large models report."""
_SPREAD = (0.6, 1.0)
"""Part of a measured layer's rate that whole steps reach, measured on CPUs."""


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
        seconds: from and to, with what devices wait for each other.
        mesh: the devices.
        share: of the frozen weights on each of them.
        traffic: of a micro-batch and a step, for each of them.
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
    mesh: Mesh
    share: Share
    traffic: Traffic
    text: str

    def __str__(self) -> str:
        """Write the text."""
        return self.text


def plan(
    module: DPOModule,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    device: str = "here",
    network: float = NETWORK,
) -> Plan:
    """Plan a run. Configuration, tokenizer and data are read (and encoded, for the run that follows); no weights.

    `devices` and `num_nodes` are the trainer's, which needs none of them: see `lit_dpo.plan.elsewhere`.

    Args:
        module: a `DPOModule`.
        data: a `PreferenceDataModule`.
        trainer: of the run; it does not run.
        device: `here`, or a GPU by name, see `lit_dpo.plan.cards.CARDS`.
        network: 10^9 bits a second of each device's own port to other nodes.

    Raises:
        TrainingError: for another data module or a stream, whose lengths are not known, an unknown name, or a network
            without a bandwidth.
        LitDPOError: for whatever the run itself would refuse before it loads weights.
    """
    if not isinstance(data, PreferenceDataModule):
        raise TrainingError(f"Expected a PreferenceDataModule to plan with but got {type(data).__name__}.")
    if data.streaming:
        raise TrainingError(
            "Expected data of a known length to plan with: `--data.streaming false`, or a file of some."
        )
    if not network > 0:
        raise TrainingError(f"Expected `network` > 0 (10^9 bits a second) but got {network}.")
    target = device_of(device, trainer)
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    data.setup("fit")
    check_run(module, trainer, weights=False)
    loader = data.train_dataloader()
    table = loader.dataset.table  # type: ignore[attr-defined]
    lengths = Lengths(table.prompt_lengths, table.completions_per_prompt, table.completion_lengths)
    steps, epochs = planned_steps(trainer, len(loader))
    mesh = Mesh(trainer.num_nodes, trainer.num_devices, module.policy.shard)
    found = Search(module, loader, target, mesh)
    step, (fitting, checkpointing) = found.step(found.wanted), found.fitting()
    repeated = loader.sampler.epoch_rows / table.size  # type: ignore[attr-defined] # a mixture repeats rows
    once = found.arithmetic(lengths)
    arithmetic = arithmetic_of(module, once, epochs * repeated)
    tokens = min(found.wanted, int(lengths.tokens / table.size * (data.batch_size or math.inf)))
    rates, said = _rates(target, module.policy.quantization, found.skeleton, tokens)
    mean = MeanStep.of(module, once, repeated / mesh.ranks / len(loader), found.microbatches(), trainer)
    sizes = [found.parts.spread] * len(mean.passes)
    if found.reference is not None and not isinstance(module.reference, CachedReference):
        sizes[0] = found.reference.spread
    links = Links.of(target.card, network) if target.card else None
    traffic = Traffic.of(mesh, found.parts.trained, sizes, links)
    waits = [mean.waiting(traffic, rate) * steps for rate in rates]
    low, high = (
        arithmetic / rate / mesh.ranks + wait for rate, wait in zip(reversed(rates), reversed(waits), strict=True)
    )
    made = Plan(
        pairs=int(table.comparisons_per_prompt.sum()),
        prompts=table.size,
        completions=len(lengths.completion),
        tokens=means(lengths),
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
        seconds=(low, high),
        mesh=mesh,
        share=Share.of(mesh, found.parts, found.reference),
        traffic=traffic,
        text="",
    )
    of_mesh = on_mesh(made, mean, rates, network) if mesh.ranks > 1 else {}
    return made._replace(text=text_of(made, module.policy, found.wanted, said, of_mesh))


class Search:
    """Steps of any size, on a skeleton that is made once."""

    def __init__(self, module: DPOModule, loader: Any, device: Device, mesh: Mesh) -> None:
        self.module, self.loader, self.device, self.mesh = module, loader, device, mesh
        self.wanted = module.microbatch_tokens or MICROBATCH_TOKENS["cuda" if device.on_gpu else "cpu"]
        self.whole, self.of_one_prompt = module.why_whole is not None, module.prompt_limit
        self.reference = _reference(module, device)
        self._skeletons: dict[tuple[str, int | None], Skeleton] = {}
        self.skeleton, self.parts, self.estimate = self._measure(module.policy)

    def context(self) -> AbstractContextManager[Any]:
        """Return what a step runs in: on a GPU autocast, for which that of a CPU stands."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.device.on_gpu else nullcontext()

    def step(self, microbatch_tokens: int, estimate: StepEstimate | None = None) -> StepMemory:
        """Estimate the largest step, if so many tokens run at once."""
        limits = (math.inf, math.inf) if self.whole else (microbatch_tokens, max(microbatch_tokens, self.of_one_prompt))
        largest, several = self.loader.largest_microbatches(*limits)
        found = (estimate or self.estimate).of([Lengths.of(part) for part in largest], several)
        return found._replace(adapters=found.adapters + Share.of(self.mesh, self.parts).buckets)

    def microbatches(self) -> float:
        """Count those of a batch, on the average; a prompt that runs in parts counts once."""
        if self.whole:
            return 1.0
        lengths, batches = self.loader.dataset.table.lengths, list(self.loader.sampler)
        return sum(len(microbatch_borders(lengths[batch], self.wanted)) - 1 for batch in batches) / len(batches)

    def fitting(self) -> tuple[int | None, bool]:
        """Find the most `microbatch_tokens` that fit, if need be with checkpoints; those of the run where they do."""
        if (found := self._most(self.estimate)) or self.module.policy.gradient_checkpointing:
            return found, False
        *_, estimate = self._measure(replace(self.module.policy, gradient_checkpointing=True))
        return self._most(estimate), True

    def _most(self, estimate: StepEstimate) -> int | None:
        room = self.device.memory - _PROCESS
        sizes = [self.wanted, *(2**power for power in range(16, 7, -1) if 2**power < self.wanted)]
        return next((size for size in sizes if self.step(size, estimate).total <= room), None)

    def _measure(self, policy: BaseModel) -> tuple[Skeleton, Parts, StepEstimate]:
        whole = self._skeleton(policy)
        parts = Parts.of(whole.model)
        if (repeats := whole.repeats) is None:
            shallow = deep = self._estimate(whole)
            times = 0
        else:
            shallow, deep = (self._estimate(self._skeleton(policy, n)) for n in (repeats.shallow, repeats.deep))
            times = repeats.times
        copies = parts.trained if isinstance(self.module.reference.unwrapped, AdapterReference | EMAReference) else 0
        frozen = Share.of(self.mesh, parts, self.reference).frozen + copies
        return whole, parts, shallow.with_layers(deep, times, frozen, parts.trained)

    def _estimate(self, made: Skeleton) -> StepEstimate:
        kept = optimizer_bytes(self.module.optimizer, torch.device("cpu"))

        @contextmanager
        def context() -> Iterator[None]:
            with made.fake, self.context():
                yield

        return StepEstimate(made.model, kept, with_kl=Field.KL in self.module.loss.requires, context=context)

    def _skeleton(self, policy: BaseModel, layers: int | None = None) -> Skeleton:
        key = repr(policy), layers  # lists among its fields have no hash
        if key not in self._skeletons:
            self._skeletons[key] = skeleton(policy, self.device.dtype, on_gpu=self.device.on_gpu, layers=layers)
        return self._skeletons[key]

    def arithmetic(self, lengths: Lengths) -> Arithmetic:
        """Of one pass over all pairs."""
        if (repeats := self.skeleton.repeats) is None:
            return count(self.skeleton, self.context, lengths)
        policy = self.module.policy
        shallow, deep = (
            count(self._skeleton(policy, n), self.context, lengths) for n in (repeats.shallow, repeats.deep)
        )
        return shallow.with_layers(deep, repeats.times)


def _reference(module: DPOModule, device: Device) -> Parts | None:
    """Sort the tensors of a reference that is not the policy's own base."""
    reference = module.reference.unwrapped
    if not isinstance(reference, ModelReference):
        return None
    dtype = reference.torch_dtype(torch.device("cpu"), device.dtype)
    return Parts.of(skeleton(reference, dtype, on_gpu=device.on_gpu).model)


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


class MeanStep(NamedTuple):
    """An optimizer step of the average: its micro-batches, and the operations of each pass of one over the base."""

    microbatches: float
    passes: tuple[float, ...]

    @classmethod
    def of(cls, module: DPOModule, once: Arithmetic, of_batch: float, each: float, trainer: pl.Trainer) -> MeanStep:
        """Of a run: `of_batch` is the part of all pairs in a batch of a device, `each` its micro-batches."""
        forward, backward = (operations * of_batch / each for operations in (once.forward, once.backward))
        reference = 0 if isinstance(module.reference, CachedReference | NoReference) else 1
        again = module.needs_two_passes and each > 1  # first without a graph, for the log-probs of all pairs
        forwards = reference + again * (1 + reference * (Field.KL in module.loss.requires)) + 1
        return cls(each * trainer.accumulate_grad_batches, (*[forward] * forwards, backward))

    def waiting(self, traffic: Traffic, rate: float) -> float:
        """Seconds that a device waits in a step, if it does `rate` operations a second while it does not."""
        hidden = [operations / rate for operations in self.passes]
        return self.microbatches * traffic.waiting(hidden) + (traffic.reducing or 0.0)


def arithmetic_of(module: DPOModule, one: Arithmetic, epochs: float) -> float:
    """Count the operations of a run: of policy and reference, whose passes `one` has once."""
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
