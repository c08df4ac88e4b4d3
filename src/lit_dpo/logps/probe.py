"""What the start-up probe runs: prompts that reach beyond a model's windows, their truth, and the modes it runs in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_dpo.compat import attention_of, can_switch_attention
from lit_dpo.data.batch import CompletionBatch, EncodedPrompt, collate
from lit_dpo.errors import first_line
from lit_dpo.logps.layouts import segments
from lit_dpo.policy.checks import int8_layers
from lit_dpo.policy.kernels import Kernels
from lit_dpo.policy.settings import rope_limit, settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_FURTHEST = 256
"""Windows and original lengths of up to so many tokens are crossed at start-up; longer ones would cost too much."""

_SHORT, _COMPLETIONS = 16, (7, 5, 6)
# the first two are names of settings, the third one of parameters, which a model with sinks has for them
_WINDOWS = re.compile(r"(^|_)window(_size)?$|^(local_attention|attention_chunk_size|original_max_position_embeddings)$")
_SOFT_CAPS = re.compile(r"^attn\w*soft_?cap(ping)?$")
_SINKS = re.compile(r"(^|[._])(sinks?|s_aux|sinks?_bias)$")


def probe_batch(base: PreTrainedModel) -> CompletionBatch:
    """Two prompts of random tokens, of three and of two completions.

    Enough for a leak between any two completions to show: one from the second to the third moves nothing else. The
    second prompt is short. The first with its first completion is longer than the model's sliding windows, attention
    chunks and original length, as far as these are at most `_FURTHEST` tokens, so that a window that is lost, or a
    position that depends on a batch mate's length, shows.
    """
    config = base.config.get_text_config()
    vocabulary = config.vocab_size
    random = torch.Generator().manual_seed(0)  # of its own: the run's is not moved

    def tokens(count: int) -> list[int]:
        return [int(token) for token in torch.randint(vocabulary, (count,), generator=random)]

    # the prompt alone fills the longest window, so that all tokens of a completion but the first look beyond it
    longest = max(_COMPLETIONS)
    first = EncodedPrompt(tokens(_reach(config) - longest), [tokens(length) for length in _COMPLETIONS])
    batch = collate([first, EncodedPrompt(tokens(4), [tokens(3), tokens(8)])])
    return batch.to(base.get_input_embeddings().weight.device)


def _reach(config: PreTrainedConfig) -> int:
    """Tokens of the longest probe: beyond what can be crossed, within what the model can read at all."""
    marks = [one.value for one in settings(config) if one.is_number and _WINDOWS.search(one.name)]
    wanted = max((int(mark) for mark in marks if 0 < mark <= _FURTHEST), default=0) + max(_COMPLETIONS)
    limit = rope_limit(config)
    # learned positions end there; beyond a RoPE's limit the longer pair moves the other, by design
    most: list[int | None] = [getattr(config, "max_position_embeddings", None), limit and limit.tokens]
    return max(_SHORT, min([wanted, *filter(None, most)]))


def truth_of(base: PreTrainedModel, batch: CompletionBatch) -> Tensor:
    """Log-probs by the definition: each sequence alone through the model's own forward."""
    return torch.cat([_one_at_a_time(base, row, start) for row, start in _sequences(batch)])


def _sequences(batch: CompletionBatch) -> list[tuple[Tensor, int]]:
    ids = batch.input_ids[0]
    return [
        (torch.cat([ids[s.start : s.start + s.prompt], ids[begin:end]]), s.prompt)
        for s in segments(batch)
        for begin, end in s.spans
    ]


def _one_at_a_time(base: PreTrainedModel, row: Tensor, start: int) -> Tensor:
    # no positions, mask or layout from here: what the model makes of a sequence by itself
    logits: Tensor = base(input_ids=row.unsqueeze(0), use_cache=False).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, row[start:, None])[:, 0]


@contextmanager
def eager_attention(base: PreTrainedModel) -> Iterator[None]:
    """Use the model's own arithmetic, written out, where it can be had: others may ignore what they lack."""
    plain = attention_of(base)
    if plain == "eager" or not can_switch_attention(base):
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(plain)


def blind_to(base: PreTrainedModel) -> str | None:
    """Name what of this model's attention its implementation does not compute, as far as that is known, or None.

    `sdpa` has no soft-cap and no sinks. Some releases of transformers refuse it then, some ignore what it lacks, by
    less than 16 bits would show.
    """
    if attention_of(base) != "sdpa":
        return None
    if any(_SOFT_CAPS.search(one.name) and one.value for one in settings(base.config.get_text_config())):
        return "soft-cap"
    return "attention sinks" if any(_SINKS.search(name) for name, _ in base.named_parameters()) else None


def why_no_kernels(
    base: PreTrainedModel, kernels: Kernels, score: Callable[[], Tensor], truth: Tensor, tolerance: float
) -> str | None:
    """None if kernels give the truth and the gradients of the plain code, else the reason; they are off afterwards.

    Args:
        base: the model, its layout chosen, its kernels off.
        kernels: its kernels.
        score: gives `(N,)` log-probs of the probe.
        truth: `(N,)` of them.
        tolerance: nats per token.
    """
    try:
        # gradients have no other truth than the plain code's
        _, plain = _with_gradients(base, score)
        kernels.use(True)
        found, gradients = _with_gradients(base, score)
    except Exception as error:  # of any kind: kernels are compiled here
        return first_line(error).removesuffix(".")
    finally:
        kernels.use(False)
    if not (off := float((found - truth).abs().max())) <= tolerance:  # NaN too
        return f"log-probs are off by {off:.2g} nats per token (tolerance {tolerance:.2g})"
    # what 16 bits lose through many layers is far from what a wrong derivative does
    limit = 1e-2 if base.dtype == torch.float32 else 0.2
    if plain.numel() and not (off := float((gradients - plain).norm() / plain.norm())) <= limit:
        return f"gradients are off by {off:.2g} of their size (tolerance {limit:.2g})"
    return None


def _with_gradients(base: PreTrainedModel, score: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs, and of a sum in which each has a weight of its own the gradients of what trains, in one row."""
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    with torch.enable_grad():  # `choose_layout` runs without
        tokens = score()
        weights = torch.linspace(0.5, 1.5, len(tokens), device=tokens.device)
        found = torch.autograd.grad((tokens * weights).sum(), trained, allow_unused=True) if trained else []
    return tokens.detach(), torch.cat([tokens.new_empty(0), *(g.flatten().float() for g in found if g is not None)])


@contextmanager
def training_mode(base: PreTrainedModel) -> Iterator[None]:
    """As the model trains, but for the adapters' own dropout; random numbers drawn inside are given back."""
    devices = {parameter.device for parameter in base.parameters() if parameter.is_cuda}
    base.train()
    for name, module in base.named_modules():
        # its masks are the user's choice, and no fault of the base
        if name.rsplit(".", 1)[-1] == "lora_dropout":
            module.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        base.eval()  # as `choose_layout` had it


@contextmanager
def without_outliers(base: PreTrainedModel) -> Iterator[None]:
    """LLM.int8() picks outlier columns over the whole batch, so that any batch mate moves any log-prob.

    That is its nature (arXiv 2208.07339), and policy and reference share it; the probe looks beneath it.
    """
    thresholds = [(layer.state, layer.state.threshold) for layer in int8_layers(base)]
    try:
        for state, _ in thresholds:
            state.threshold = 0.0  # no column is an outlier then
        yield
    finally:
        for state, threshold in thresholds:
            state.threshold = threshold
