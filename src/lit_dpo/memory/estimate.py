"""Will it fit: the peak memory of a training step, from a few probes of a few tokens.

`peak = weights + adapters + activations + max(head, backward)`, in bytes:

- weights: all tensors of the policy and of a reference next to it, as they are stored (packed 4 bits and their scales);
  of a base in shards this rank's, and what is gathered at once;
- adapters: parameters, gradients (twice where there are several micro-batches), and what the optimizer keeps of them;
- activations: what is alive after the forward of the backbone. Measured on probes, as the sum of a constant, a term per
  token of each part of a prompt and its completions, one per entry of an attention matrix, and one per prompt token
  whose keys a further completion reads: eight probes decide it for any architecture;
- backward: what comes on top of it while it runs backward, from the same probes. With gradient checkpointing this is
  one layer; in 4 bits it has a dequantised weight;
- head: `constant + a · rows of a chunk + b · scored tokens`, from probes of the head alone.

What is not in it: what kernels allocate inside themselves, the device's context, and the allocator's fragments. Padded
rows of models that hold whole attention matrices may need more in the backward of rows much longer than the probes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate
from lit_dpo.logps import head as heads
from lit_dpo.logps import score
from lit_dpo.logps.attention import has_pair_attention
from lit_dpo.logps.head import reference_kl, selected_logps
from lit_dpo.logps.model_head import backbone, model_head
from lit_dpo.memory.live import LiveBytes, stored_bytes
from lit_dpo.policy.sharding import gathered_bytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Lengths(NamedTuple):
    """Tokens of some prompts and of their completions.

    Attributes:
        prompt: `(P,)` of each prompt.
        completions_per_prompt: `(P,)` how many completions it has.
        completion: `(C,)` of each completion, prompt after prompt.
    """

    prompt: NDArray[np.int64]
    completions_per_prompt: NDArray[np.int64]
    completion: NDArray[np.int64]

    @classmethod
    def of(cls, prompts: Sequence[tuple[int, Sequence[int]]]) -> Lengths:
        """Of prompts one by one.

        Args:
            prompts: tokens of each, and of each of its completions.

        Example:
            >>> Lengths.of([(7, (3, 4)), (5, (1, 1, 2))]).completion.tolist()
            [3, 4, 1, 1, 2]
        """
        completions = [length for _, lengths in prompts for length in lengths]
        counts = [len(lengths) for _, lengths in prompts]
        return cls(np.array([prompt for prompt, _ in prompts]), np.array(counts), np.array(completions))

    @property
    def tokens(self) -> int:
        """All of them, each prompt once."""
        return int(self.prompt.sum() + self.completion.sum())

    @property
    def longest(self) -> NDArray[np.int64]:
        """`(P,)` tokens of each prompt with its longest completion."""
        starts = self.completions_per_prompt.cumsum() - self.completions_per_prompt
        found: NDArray[np.int64] = self.prompt + np.maximum.reduceat(self.completion, starts)
        return found


Context = Callable[[], AbstractContextManager[Any]]
"""What a training step runs in, such as autocast, entered anew for each."""

# A prompt and its completions of each probe, different enough to tell the parts' tokens and their products apart.
PROBES = (
    (4, (4, 4)),
    (16, (4, 4)),
    (4, (16, 4)),
    (4, (4, 16)),
    (16, (16, 4)),
    (16, (4, 16)),
    (4, (4, 4, 4)),
    (16, (4, 4, 4)),
)
_ROWS = (4, 12)  # scored tokens of the head's probes
_TINY_CHUNKS = 2**40  # a vocabulary so large that a chunk has as few rows as there can be


class StepMemory(NamedTuple):
    """The parts of the peak of a training step, in bytes.

    Attributes:
        weights: frozen tensors, the reference's too.
        adapters: what trains, its gradients and the optimizer's state.
        activations: alive after the forward of the backbone.
        backward: at most alive on top of them while it runs backward.
        head: at most alive on top of them while logits are scored.
        tokens: of the micro-batch, each prompt and each completion once.
    """

    weights: int
    adapters: int
    activations: int
    backward: int
    head: int
    tokens: int

    @property
    def total(self) -> int:
        """The peak: head and backward do not run at the same time."""
        return self.weights + self.adapters + self.activations + max(self.backward, self.head)

    def __str__(self) -> str:
        """One line, in GiB, or in MiB where that is too coarse.

        Example:
            >>> print(StepMemory(3 * 2**28, 2**25, 2**30, 2**26, 2**27, 3210))
            1.91 GiB: weights 0.75, adapters and optimizer 0.03, activations of 3,210 tokens 1.00, head 0.12
        """
        unit, size = ("GiB", 2**30) if self.total >= 2**30 else ("MiB", 2**20)
        last = "head" if self.head > self.backward else "backward"
        return (
            f"{self.total / size:.2f} {unit}: weights {self.weights / size:.2f}, adapters and optimizer "
            f"{self.adapters / size:.2f}, activations of {self.tokens:,} tokens {self.activations / size:.2f}, "
            f"{last} {max(self.backward, self.head) / size:.2f}"
        )


class StepEstimate:
    """What is known of a model's steps after its probes; `of` says the peak for any micro-batches.

    Random states, gradients and weights are left as they are.

    Args:
        model: the policy, its layout chosen, in training mode.
        optimizer_bytes: that the optimizer keeps for each byte of what trains, by `optimizer_bytes`.
        with_kl: the loss reads the divergence of whole distributions.
        context: what a training step runs in, such as autocast.
        most: tokens of the largest micro-batch to come, if that is known: no probe needs more.

    Attributes:
        alive: bytes per feature (`step_features`) that are alive after the forward of the backbone.
        backward: bytes per feature that are at most alive on top of them while it runs backward.
        frozen: bytes that are stored and do not train.
        trained: bytes that train.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        optimizer_bytes: float,
        *,
        with_kl: bool = False,
        context: Context = nullcontext,
        most: int | None = None,
    ) -> None:
        base = score.base_model(model)
        device = base.get_input_embeddings().weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.alive, self.backward = _backbone(base, device, context, most)
            one = _batch(1, (1, 1), device)
            with context():
                self._head = _head(base, one, with_kl)
        self._flat = has_pair_attention(base)
        self.frozen, self.trained = stored_bytes(model)
        self.frozen += gathered_bytes(model)
        self._optimizer_bytes = optimizer_bytes

    def with_layers(self, more: StepEstimate, times: int, frozen: int, trained: int) -> StepEstimate:
        """Of a deeper model: this one's, and `times` what another one, some layers deeper, has more.

        Args:
            more: of the same model with some layers more.
            times: how often these layers come on top of this model's own.
            frozen: bytes that are stored and do not train, of the deeper model.
            trained: bytes that train.
        """
        deeper = copy.copy(self)
        deeper.alive = self.alive + times * (more.alive - self.alive)
        deeper.backward = self.backward + times * (more.backward - self.backward)
        deeper.frozen, deeper.trained = frozen, trained
        return deeper

    def of(self, microbatches: Sequence[Lengths], several: bool = False) -> StepMemory:
        """Estimate the peak of a training step over the largest of some micro-batches.

        Args:
            microbatches: candidates for the largest; each is a batch, or a part of one.
            several: a batch is cut into several, whose gradients add up while those of the batch before are still
                there.
        """
        steps = [
            StepMemory(
                weights=self.frozen,
                adapters=round(self.trained * (2 + several + self._optimizer_bytes)),
                activations=(activations := round(float(features @ self.alive))),
                # its gradients are all there when its activations are gone, and not yet added to those of others
                backward=max(round(float(features @ self.backward)), several * self.trained - activations),
                head=self._head(int(lengths.completion.sum())),
                tokens=lengths.tokens,
            )
            for lengths in microbatches
            for features in [step_features(lengths, self._flat)]
        ]
        return max(steps, key=lambda step: step.total)


def estimate_step(
    model: PeftModel | PreTrainedModel,
    microbatches: Sequence[Lengths],
    *,
    several: bool = False,
    optimizer: Callable[..., Any] = torch.optim.AdamW,
    with_kl: bool = False,
    context: Context = nullcontext,
) -> StepMemory:
    """Estimate the peak of a step over the largest of some micro-batches: `StepEstimate` of the model, `of` them.

    Args:
        model: the policy, its layout chosen, in training mode.
        microbatches: candidates for the largest; each is a batch, or a part of one.
        several: a batch is cut into several.
        optimizer: makes one from a list of parameters.
        with_kl: the loss reads the divergence of whole distributions.
        context: what a training step runs in, such as autocast.
    """
    device = score.base_model(model).get_input_embeddings().weight.device
    kept = optimizer_bytes(optimizer, device)
    most = max(lengths.tokens for lengths in microbatches)
    return StepEstimate(model, kept, with_kl=with_kl, context=context, most=most).of(microbatches, several)


def optimizer_bytes(optimizer: Callable[..., Any], device: torch.device) -> float:
    """Bytes that an optimizer keeps per byte of float32 parameters, seen after one step."""
    probe = nn.Parameter(torch.zeros(64, 64, device=device))
    probe.grad = torch.zeros_like(probe)
    made = optimizer([probe])
    made.step()
    kept = [value for value in made.state[probe].values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.untyped_storage().nbytes() for value in kept) / probe.untyped_storage().nbytes()


def step_features(lengths: Lengths, flat: bool) -> NDArray[np.float64]:
    """Count what bytes and arithmetic are sums of: a constant, tokens, entries of attention matrices, prompts read."""
    prompt, counts, completion = lengths
    if not flat:
        rows, width = len(completion), int(lengths.longest.max())
        return np.array([1.0, rows * width, rows * width**2, completion.sum()])
    starts = counts.cumsum() - counts
    first = completion[starts]
    further = np.delete(completion, starts)
    own = np.repeat(prompt, counts - 1)  # of each further completion
    entries = ((prompt + first) ** 2).sum(), (further * (own + further)).sum()
    return np.array([1.0, prompt.sum(), first.sum(), further.sum(), *entries, own.sum(), len(further)], dtype=float)


def _backbone(
    base: PreTrainedModel, device: torch.device, context: Context, most: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes per feature: alive after the forward, and on top of that in the backward."""
    longer = _longer(base, device, most)
    shapes = [(longer * prompt, tuple(longer * length for length in lengths)) for prompt, lengths in PROBES]
    features = [step_features(Lengths.of([shape]), has_pair_attention(base)) for shape in shapes]
    # each in a context of its own: autocast keeps the copies of weights that the first pass makes until its end
    probes = []
    for shape in shapes:
        batch = _batch(*shape, device)
        with context():
            probes.append(_probe(base, batch))
    found = np.array(probes, dtype=float)
    coefficients = np.linalg.lstsq(np.array(features), found, rcond=None)[0]
    return coefficients[:, 0], coefficients[:, 1]


def _longer(base: PreTrainedModel, device: torch.device, most: int | None) -> int:
    """Say how many times longer than `PROBES` the probes are, within what the model can read and a step will run."""
    room = getattr(base.config, "max_position_embeddings", 128) // 32
    if device.type == "cuda":
        # There a layer's 4 bits are unpacked at once, by way of its scales, of which there is one for 64 numbers. Over
        # few tokens these are more than what the layer computes, and over many less: probes of few would not see what
        # is alive at the peak of many. To a GPU a hundred tokens are as quick as ten.
        longest = max(prompt + sum(lengths) for prompt, lengths in PROBES)
        return max(1, min(8, room, 8 if most is None else most // longest))
    # Padded rows may hold attention matrices, which outgrow other tensors of the backward only at some length.
    return 1 if has_pair_attention(base) else max(1, min(4, room))


def _batch(prompt: int, lengths: Sequence[int], device: torch.device) -> CompletionBatch:
    # outside of the context of a step: where tensors are fake, lengths must still be numbers
    return collate([EncodedPrompt([0] * prompt, [[0] * length for length in lengths])]).to(device)


def _probe(base: PreTrainedModel, batch: CompletionBatch) -> tuple[int, int]:
    trained = [p for p in backbone(base).parameters() if p.requires_grad]
    with LiveBytes() as memory:
        hidden = score.run(base, batch).hidden
        alive = memory.live
        if hidden.requires_grad:
            # The first adapter's gradient passes all layers; the others' are counted with the adapters.
            torch.autograd.grad(hidden, trained[:1], torch.zeros_like(hidden), allow_unused=True)
    return int(alive), int(memory.peak - alive)


def _head(base: PreTrainedModel, one: CompletionBatch, with_kl: bool) -> Callable[[int], int]:
    """Scored tokens to bytes: logits of one chunk at a time, and what every scored token leaves."""
    vocabulary = base.config.get_text_config().vocab_size
    like, device = score.run(base, one).hidden.detach()[:1], one.input_ids.device
    trains = any(p.requires_grad for p in base.get_output_embeddings().parameters())
    narrow = nn.Linear(like.shape[1], 2, device=device, dtype=like.dtype).requires_grad_(trains)
    few = heads.chunk_rows(_TINY_CHUNKS, device)
    each, _ = _line(narrow, like, (4 * few, 8 * few), _TINY_CHUNKS, with_kl)
    in_chunk, constant = _line(model_head(base), like, _ROWS, vocabulary, with_kl)
    rows = heads.chunk_rows(vocabulary, device)
    return lambda scored: round(constant + (in_chunk - each) * min(scored, rows) + each * scored)


def _line(head: nn.Module, like: Tensor, rows: tuple[int, int], vocabulary: int, with_kl: bool) -> tuple[float, float]:
    """Bytes per row of hidden states, and for none, as a line through two sizes."""
    small, large = (_head_bytes(head, like.expand(count, -1), vocabulary, with_kl) for count in rows)
    slope = (large - small) / (rows[1] - rows[0])
    return slope, small - rows[0] * slope


def _head_bytes(head: nn.Module, hidden: Tensor, vocabulary: int, with_kl: bool) -> int:
    hidden = hidden.contiguous().requires_grad_()
    with LiveBytes() as memory:
        if with_kl:
            found = reference_kl(head, hidden, head, hidden.detach(), vocabulary)
        else:
            found = selected_logps(head, hidden, hidden.new_zeros(len(hidden), dtype=torch.long), vocabulary)
        torch.autograd.grad(found.sum(), hidden)
    return int(memory.peak)
