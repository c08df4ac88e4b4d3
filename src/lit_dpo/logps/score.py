"""Log-probs of a batch of completions under a model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_dpo.data.batch import CompletionBatch
from lit_dpo.errors import PolicyError
from lit_dpo.logps.attention import PairLayout, has_pair_attention
from lit_dpo.logps.head import collision_logps, reference_kl, selected_logps
from lit_dpo.logps.last_layer import last_layer_on
from lit_dpo.logps.layouts import Rows, Segment, flat_rows, padded_rows, segments
from lit_dpo.logps.model_head import arguments, backbone, model_head
from lit_dpo.logps.records import SequenceLogps
from lit_dpo.policy.settings import rope_limit

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


class FrozenStates(NamedTuple):
    """What the reference computes of a batch's completion tokens, to compare whole distributions with.

    Attributes:
        hidden: `(N, H)` states that predict them.
        head: states to logits, without gradients.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


def completion_logps(
    model: PeftModel | PreTrainedModel,
    batch: CompletionBatch,
    *,
    collision: bool = False,
    frozen: FrozenStates | None = None,
) -> SequenceLogps:
    """Log-probs of a batch's completions under `model`, float32.

    The layout follows the model's attention: the flat row under the pair attention, else padded rows. Both score the
    same positions. Gradients flow unless the caller turned them off; adapters are as the caller left them.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        batch: `C` completions on the model's device.
        collision: fill `SequenceLogps.collision` too, at the cost of a second projection.
        frozen: by `frozen_logps` of the same batch: fill `SequenceLogps.kl` too, KL(π_ref ‖ π) over the vocabulary
            wherever a completion token is predicted, at the cost of two more projections.

    Returns:
        `(C,)` totals and lengths and `(N,)` log-probs per token, in the order of the batch.
    """
    scored = run(model, batch)
    kl = frozen and reference_kl(scored.head, scored.hidden, frozen.head, frozen.hidden, scored.vocabulary)
    return _logps(scored, _collision(scored) if collision else None, kl)


def frozen_logps(
    model: PeftModel | PreTrainedModel,
    batch: CompletionBatch,
    reference: Callable[[Any], AbstractContextManager[Any]],
) -> tuple[FrozenStates, SequenceLogps]:
    """Log-probs under the reference, without gradients, and the hidden states that they were taken from.

    Args:
        model: the policy.
        batch: on the model's device.
        reference: `Reference.activated`: given the policy, a context in which it yields the model to compare with.
    """
    with torch.no_grad(), reference(model) as other:
        scored = run(other, batch)
        logps = _logps(scored)

    def head(states: Tensor) -> Tensor:
        # run within the policy's pass, where the reference is not active any more
        with torch.no_grad(), reference(model) as other:  # an adapter on the head is off here too
            logits: Tensor = model_head(base_model(other))(states)
            return logits

    return FrozenStates(scored.hidden, head), logps


class Scored(NamedTuple):
    """The hidden states that predict completion tokens, `(N, H)`, and what makes log-probs of them."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    rows: Rows
    vocabulary: int


def run(model: PeftModel | PreTrainedModel, batch: CompletionBatch) -> Scored:
    """One pass of a model over a batch, in the layout that its attention reads."""
    base = base_model(model)
    prompts = segments(batch)
    config = base.config.get_text_config()
    _check_rope(config, prompts)
    if has_pair_attention(base):
        rows = flat_rows(batch, prompts)
        layers = getattr(config, "num_hidden_layers", None)
        # models hand keywords that they do not know down to their attention; the probe finds those that do not
        rows.inputs["pair_layout"] = PairLayout(prompts, batch.input_ids.device, layers and layers - 1)
    else:
        rows = padded_rows(batch, prompts)
    return Scored(_hidden_states(base, rows), model_head(base), rows, config.vocab_size)


def _collision(scored: Scored) -> Tensor:
    return collision_logps(scored.head, scored.hidden, scored.vocabulary)


def _logps(scored: Scored, collision: Tensor | None = None, kl: Tensor | None = None) -> SequenceLogps:
    lengths = scored.rows.lengths
    tokens = selected_logps(scored.head, scored.hidden, scored.rows.targets, scored.vocabulary)
    totals = torch.stack([part.sum() for part in torch.split(tokens, lengths)])
    counts = torch.tensor(lengths, dtype=torch.float32).to(totals.device, non_blocking=True)
    return SequenceLogps(totals, counts, tokens, collision, kl)


def base_model(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, adapters injected; a transformers model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden_states(model: PeftModel | PreTrainedModel, rows: Rows) -> Tensor:
    """`(N, H)`: those that predict a completion token."""
    decoder = backbone(model)
    accepted = arguments(decoder)
    inputs = {
        name: given
        for name, given in rows.inputs.items()
        # ALiBi and recurrent backbones have no positions to be told; padded rows count from 0 anyway
        if name != "position_ids" or "position_ids" in accepted
    }
    with nullcontext() if rows.needed is None else last_layer_on(decoder, rows.needed):
        hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    # before the head, so that only scored positions get logits; the backward of `index_select` adds, without a sort
    return hidden.flatten(0, 1).index_select(0, rows.predictors)


def _check_rope(config: PreTrainedConfig, prompts: list[Segment]) -> None:
    """Refuse a pair that is so long that it would move its batch mates."""
    if (limit := rope_limit(config)) is None:
        return
    longest = max(s.longest for s in prompts)
    if longest > limit.tokens:
        raise PolicyError(
            f"Expected pairs of up to {limit.tokens} tokens but one has {longest}: beyond that this model's positions "
            f"(rope_type={limit.kind}) depend on its batch mates. Set `data.max_length` to {limit.tokens}."
        )
