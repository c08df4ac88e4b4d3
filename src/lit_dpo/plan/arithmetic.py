"""The arithmetic of training, counted on a model without weights, and the rate of this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import flop_registry

from lit_dpo.compat import operation_mode
from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate
from lit_dpo.logps import score
from lit_dpo.logps.attention import has_pair_attention
from lit_dpo.logps.model_head import backbone
from lit_dpo.memory import PROBES, Context, Lengths, step_features
from lit_dpo.plan.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Arithmetic(NamedTuple):
    """Floating point operations by what they are for, over all pairs of a data set.

    Attributes:
        forward: of the policy, or of the base as its reference.
        backward: of the policy.
        head: of one pass over all scored tokens, `2 · hidden · vocabulary` each.
    """

    forward: float
    backward: float
    head: float

    @property
    def training(self) -> float:
        """One pass of the policy; its head computes log-probs and their gradient at once."""
        return self.forward + self.backward + 2 * self.head

    @property
    def reference(self) -> float:
        """One pass of a reference of the same size."""
        return self.forward + self.head

    def with_layers(self, more: Arithmetic, times: int) -> Arithmetic:
        """Of a deeper model: this one's, and `times` what another one, some layers deeper, has more."""
        forward = self.forward + times * (more.forward - self.forward)
        return Arithmetic(forward, self.backward + times * (more.backward - self.backward), self.head)


def count(skeleton: Skeleton, context: Context, lengths: Lengths) -> Arithmetic:
    """Of one pass over pairs, from a few probes.

    Args:
        skeleton: of the policy.
        context: what a training step runs in, such as autocast.
        lengths: tokens of all prompts and completions.
    """
    base = score.base_model(skeleton.model)
    flat = has_pair_attention(base)
    # outside of the context, where lengths are numbers
    batches = [collate([EncodedPrompt([0] * prompt, [[0] * n for n in lengths])]) for prompt, lengths in PROBES]
    with skeleton.fake, context():
        found = np.array([_probe(base, batch) for batch in batches], dtype=float)
    features = np.array([step_features(Lengths.of([shape]), flat) for shape in PROBES])
    coefficients = np.linalg.lstsq(features, found, rcond=None)[0]
    sums = _summed(lengths, flat)
    forward, backward = sums @ coefficients
    config = base.config.get_text_config()
    scored = float(lengths.completion.sum())
    return Arithmetic(float(forward), float(backward), 2.0 * config.hidden_size * config.vocab_size * scored)


def _summed(lengths: Lengths, flat: bool) -> NDArray[np.float64]:
    """Add up the features of all prompts: of flat rows as they are; of padded ones each prompt by itself."""
    if flat:
        return step_features(lengths, True)
    rows, width = lengths.completions_per_prompt, lengths.longest
    sums = len(rows), (rows * width).sum(), (rows * width**2).sum(), lengths.completion.sum()
    return np.array(sums, dtype=np.float64)


def _probe(base: PreTrainedModel, batch: CompletionBatch) -> tuple[int, int]:
    trained = [p for p in backbone(base).parameters() if p.requires_grad]
    with _Operations() as forward:
        hidden = score.run(base, batch).hidden
    with _Operations() as backward:
        if hidden.requires_grad:
            torch.autograd.grad(hidden, trained, torch.zeros_like(hidden), allow_unused=True)
    return forward.count, backward.count


_Mode: Any = operation_mode()


class _Operations(_Mode):
    """Counts floating point operations by PyTorch's formulas; its own counter first takes every operation apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=made)
        return made


def measured_rate(
    layer: tuple[int, int], tokens: int, quantization: str, device: torch.device, dtype: torch.dtype, seconds: float = 1
) -> float:
    """Floating point operations a second of a layer's forward pass and the gradient of its input, here and now.

    Args:
        layer: `(outputs, inputs)`.
        tokens: of a micro-batch.
        quantization: `nf4` has its weight unpacked in each pass.
        device: where.
        dtype: of computation.
        seconds: to measure for, after a first pass.
    """
    from lit_dpo.policy.sliced import SlicedLinear4bit

    outputs, inputs = layer
    made: Any
    if quantization == "nf4":
        made = SlicedLinear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    else:
        made = torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    times: list[float] = []
    while not times or sum(times[1:]) < seconds:
        _wait(device)
        begun = time.perf_counter()
        made(x).sum().backward()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return 4.0 * outputs * inputs * tokens / float(np.median(times[1:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
