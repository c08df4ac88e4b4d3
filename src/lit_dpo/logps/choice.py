"""Which layout a model can use: decided by what it computes at start-up, not by its name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_dpo.compat import attention_of, can_switch_attention
from lit_dpo.data.batch import CompletionBatch
from lit_dpo.errors import PolicyError, UnsupportedAttentionError, first_line
from lit_dpo.logps.attention import MissingLayoutError, has_pair_attention, use_pair_attention
from lit_dpo.logps.layouts import segments
from lit_dpo.logps.model_head import backbone
from lit_dpo.logps.probe import (
    blind_to,
    eager_attention,
    probe_batch,
    training_mode,
    truth_of,
    why_no_kernels,
    without_outliers,
)
from lit_dpo.logps.score import base_model, completion_logps
from lit_dpo.policy.checks import int8_layers
from lit_dpo.policy.kernels import without_kernels

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

Layout = Literal["flat", "padded"]


@torch.no_grad()
def choose_layout(model: PeftModel | PreTrainedModel, attention: str = "auto") -> Layout:
    """Decide by measurement which layout this model can use, and switch its attention to it.

    Two probe prompts, one of them longer than the model's windows where these are short, are scored one sequence at a
    time by the model's own forward under `eager`, then in the flat row. If both agree within the dtype's tolerance, and
    no completion feels a change in another, the flat row is used; else padded rows, in one log line that says why.
    An implementation that does not compute what `eager` does is replaced by it, in a line too. In training mode, but
    for the adapters' dropout, the numbers must be the same, twice.

    Kernels are off until then; they stay on where the numbers are as near to the truth, and the gradients the same.

    Args:
        model: a transformers causal LM, or a PEFT model around one; in its plain attention.
        attention: `"auto"`; `"pairs"` for the flat row or an error; or a transformers implementation (`"sdpa"`,
            `"eager"`, `"flash_attention_2"`, …) for padded rows under it.

    Raises:
        PolicyError: if `"pairs"` was asked for and is not exact, if padded rows are wrong too, if an implementation
            that was asked for computes something else, or if training mode does.
    """
    base = base_model(model)
    backbone(base)  # or an error
    if has_pair_attention(base):
        # chosen for an earlier run: begin where that one began
        base.set_attn_implementation(base.lit_dpo_plain_attention)
    # on the model itself, for `plain_attention`, which knows nothing else; `_use_eager` may correct it
    base.lit_dpo_plain_attention = attention_of(base)
    training = model.training
    model.eval()  # what is compared below; `_check_training` looks at the other mode
    try:
        with without_outliers(base), without_kernels(base) as kernels:
            batch = probe_batch(base)
            exact = base.dtype == torch.float32 and not int8_layers(base)
            # some releases of transformers ignore in other implementations what these lack, and say nothing
            with eager_attention(base):
                truth = truth_of(base, batch)
                # 16 bits and INT8: what the numbers themselves lose when shapes change, seen on padded rows, with room
                tolerance = 1e-3 if exact else max(0.1, 4 * _padded(base, batch, truth))
            layout = _choose_layout(base, attention, batch, truth, tolerance)
            reason = kernels and why_no_kernels(base, kernels, lambda: _tokens(base, batch), truth, tolerance)
    finally:
        model.train(training)
    if kernels is not None:
        # not inside `without_kernels`, which leaves them as it found them
        kernels.use(reason is None)
        said = f"Liger's kernels in {kernels}" if reason is None else f"no kernels of Liger: {reason}"
        log.log(logging.INFO if reason is None else logging.WARNING, "%s: %s.", type(base).__name__, said)
    return layout


def _choose_layout(
    base: PreTrainedModel, attention: str, batch: CompletionBatch, truth: Tensor, tolerance: float
) -> Layout:
    name = type(base).__name__
    # by name, because what it leaves out may hide below the tolerance of 16 bits
    if lacking := blind_to(base):
        _use_eager(base, attention, f"has no {lacking}")
    if attention in ("auto", "pairs"):
        reason = _why_not_flat(base, batch, truth, tolerance)
        if reason is None:
            _check_training(base, batch, truth, tolerance)
            return "flat"
        if attention == "pairs":
            raise PolicyError(f"attention=pairs: the flat row is not exact for {name}: {reason}.")
        log.warning("%s: padded rows instead of the flat row: %s.", name, reason)
    padded = _padded(base, batch, truth)
    if not padded <= tolerance and attention_of(base) != "eager" and can_switch_attention(base):  # NaN too
        _use_eager(base, attention, f"is off by {padded:.2g} nats per token from `eager`")
        padded = _padded(base, batch, truth)
    if not padded <= tolerance:
        raise PolicyError(
            f"{name} scores a padded row differently from the sequence alone (by {padded:.2g} nats per "
            f"token, tolerance {tolerance:.2g}); its log-probs cannot be trusted in batches."
        )
    _check_training(base, batch, truth, tolerance)
    return "padded"


def _use_eager(base: PreTrainedModel, attention: str, why: str) -> None:
    """Instead of a plain implementation that computes something else, unless that was asked for."""
    name, plain = type(base).__name__, attention_of(base)
    if attention == plain:
        raise PolicyError(f"attention={attention} {why}, so it does not compute what {name} is. Use `eager` or `auto`.")
    base.set_attn_implementation("eager")
    base.lit_dpo_plain_attention = "eager"
    if attention != "eager":
        log.warning("%s: `eager` instead of `%s`, which %s.", name, plain, why)


def _padded(base: PreTrainedModel, batch: CompletionBatch, truth: Tensor) -> float:
    """How far padded rows are off, nats per token."""
    try:
        return float((_tokens(base, batch) - truth).abs().max())
    except (TypeError, AttributeError) as error:
        raise PolicyError(
            f"{type(base).__name__} cannot be scored: its parts are not called as those of transformers' causal "
            f"language models are ({first_line(error)})."
        ) from error


def _check_training(base: PreTrainedModel, batch: CompletionBatch, truth: Tensor, tolerance: float) -> None:
    """See that training mode computes what evaluation mode does, and the same twice.

    Raises:
        PolicyError: for a dropout or another randomness that is on.
    """
    try:
        with training_mode(base):
            # twice: a mask may move little compared with the tolerance, but two are never the same
            one, other = (_tokens(base, batch) for _ in range(2))
    except UnsupportedAttentionError as error:
        raise PolicyError(f"{type(base).__name__}: in training mode {first_line(error)}. {_DROPOUT}") from error
    apart, off = float((one - other).abs().max()), float((one - truth).abs().max())
    if not apart <= 1e-4:  # kernels that add in any order differ by more in 16 bits, in evaluation mode too
        apart = max(0.0, apart - 4 * float((_tokens(base, batch) - _tokens(base, batch)).abs().max()))
    if not apart <= 1e-4:
        raise PolicyError(
            f"{type(base).__name__}: two passes in training mode differ by {apart:.2g} nats per token. {_DROPOUT}"
        )
    if not off <= tolerance:
        raise PolicyError(
            f"{type(base).__name__} computes something else in training mode (by {off:.2g} nats per token, tolerance "
            f"{tolerance:.2g}), so that policy and reference would not compare."
        )


_DROPOUT = (
    "A dropout or another randomness of the base is on, and policy and reference under different masks do not "
    "compare. Set it to 0 in the model's config.json; where its code has it fixed, the model cannot be used."
)


def _why_not_flat(base: PreTrainedModel, batch: CompletionBatch, truth: Tensor, tolerance: float) -> str | None:
    """None if the flat row is exact (and the pair attention stays on), else the reason (and it is off again)."""
    plain = attention_of(base)
    try:
        use_pair_attention(base)
        found = _tokens(base, batch)
        difference = float((found - truth).abs().max())
        leak = _leak(base, batch, found)
        if difference <= tolerance and leak <= 1e-4:
            return None
        reason = f"its log-probs are off by {difference:.2g} nats per token (tolerance {tolerance:.2g})"
        if difference <= tolerance:
            reason = f"one completion moves another's log-probs by {leak:.2g} nats per token"
    except MissingLayoutError:  # ahead of its own base class
        reason = "its layers do not hand what they are told on to their attention"
    except (UnsupportedAttentionError, TypeError, ValueError, RuntimeError) as error:  # of the model's code
        reason = first_line(error).removesuffix(".")
    if has_pair_attention(base):
        base.set_attn_implementation(plain)
    return reason


def _leak(base: PreTrainedModel, batch: CompletionBatch, before: Tensor) -> float:
    """How far other completions move when the tokens of one change, of the first prompt's each but the last.

    Shapes are the same, so that rounding is too: this sees a leak that hides below a 16-bit tolerance.
    """
    apart, start = 0.0, 0
    for begin, end in segments(batch)[0].spans[:-1]:
        changed = batch.input_ids.clone()
        changed[0, begin:end] += 1
        changed %= base.config.get_text_config().vocab_size
        moved = (_tokens(base, batch._replace(input_ids=changed)) - before).abs()
        own = slice(start, start + end - begin)  # these may
        moved[own] = 0.0
        apart = max(apart, float(moved.max()))
        start = own.stop
    return apart


def _tokens(base: PreTrainedModel, batch: CompletionBatch) -> Tensor:
    found = completion_logps(base, batch).per_token
    assert found is not None
    return found
