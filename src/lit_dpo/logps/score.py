"""Log-probs of a batch of pairs under a model, and the start-up probe that decides the layout."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_dpo.data.batch import EncodedPair, PairBatch, collate_pairs
from lit_dpo.errors import PolicyError, UnsupportedAttentionError
from lit_dpo.logps.attention import PairLayout, has_pair_attention, use_pair_attention
from lit_dpo.logps.head import collision_logps, model_head, reference_kl, selected_logps
from lit_dpo.logps.last_layer import last_layer_on
from lit_dpo.logps.layouts import Rows, Segment, flat_rows, padded_rows, segments
from lit_dpo.logps.records import SequenceLogps

log = logging.getLogger(__name__)

Layout = Literal["flat", "padded"]


def pair_logps(model: Any, batch: PairBatch, *, collision: bool = False) -> tuple[SequenceLogps, SequenceLogps]:
    """Log-probs of the chosen and of the rejected completions under `model`, float32.

    The layout follows the model's attention: the flat row under the pair attention, else padded rows. Both score the
    same positions. Gradients flow unless the caller turned them off; adapters are as the caller left them.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        batch: `B` pairs on the model's device.
        collision: fill `SequenceLogps.collision` too, at the cost of a second projection.

    Returns:
        Two records of `(B,)` totals and lengths and `(N,)` tokens.
    """
    scored = _run(model, batch)
    return _sides(scored, _collision(scored) if collision else None)


def pair_logps_with_kl(
    model: Any,
    batch: PairBatch,
    reference: Callable[[Any], AbstractContextManager[Any]],
    *,
    collision: bool = False,
) -> tuple[SequenceLogps, SequenceLogps, SequenceLogps, SequenceLogps]:
    """Policy and reference in one go, with KL(π_ref ‖ π) over the vocabulary wherever a completion token is predicted.

    The reference's backbone runs once; its log-probs and the divergence are taken from the same hidden states.

    Args:
        model: the policy.
        batch: `B` pairs on the model's device.
        reference: `Reference.active`: given the policy, a context in which it yields the model to compare with.
        collision: fill `SequenceLogps.collision` of the policy too.

    Returns:
        Chosen and rejected of the policy, with `kl`, then of the reference, without gradients.
    """
    with torch.no_grad(), reference(model) as other:
        frozen = _run(other, batch)
        sides = _sides(frozen)
    scored = _run(model, batch)

    def reference_head(states: Tensor) -> Tensor:
        with torch.no_grad(), reference(model) as other:  # an adapter on the head is off here too
            logits: Tensor = model_head(base_model(other))(states)
            return logits

    kl = reference_kl(scored.head, scored.hidden, reference_head, frozen.hidden, scored.vocabulary)
    return (*_sides(scored, _collision(scored) if collision else None, kl), *sides)


class _Scored(NamedTuple):
    """The hidden states that predict completion tokens, `(N, H)`, and what makes log-probs of them."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    rows: Rows
    vocabulary: int


def _run(model: Any, batch: PairBatch) -> _Scored:
    base = base_model(model)
    pairs = segments(batch)
    config = base.config.get_text_config()
    _check_rope(config, pairs)
    if has_pair_attention(base):
        rows = flat_rows(batch, pairs)
        layers = getattr(config, "num_hidden_layers", None)
        rows.inputs["pair_layout"] = PairLayout(pairs, batch.input_ids.device, layers and layers - 1)
    else:
        rows = padded_rows(batch, pairs)
    return _Scored(_hidden_states(base, rows), model_head(base), rows, config.vocab_size)


def _collision(scored: _Scored) -> Tensor:
    return collision_logps(scored.head, scored.hidden, scored.vocabulary)


def _sides(
    scored: _Scored, collision: Tensor | None = None, kl: Tensor | None = None
) -> tuple[SequenceLogps, SequenceLogps]:
    """Chosen and rejected, from per-token values of both."""
    lengths = scored.rows.lengths
    tokens = selected_logps(scored.head, scored.hidden, scored.rows.targets, scored.vocabulary)
    totals = torch.stack([part.sum() for part in torch.split(tokens, lengths)])
    counts = torch.tensor(lengths, dtype=torch.float32).to(totals.device, non_blocking=True)
    size = len(lengths) // 2
    border = sum(lengths[:size])

    def cut(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if values is None else (values[:border], values[border:])

    chosen, rejected = zip(cut(tokens), cut(collision), cut(kl), strict=True)
    return (
        SequenceLogps(totals[:size], counts[:size], *chosen),
        SequenceLogps(totals[size:], counts[size:], *rejected),
    )


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, adapters injected; a transformers model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden_states(model: Any, rows: Rows) -> Tensor:
    """`(N, H)`: those that predict a completion token."""
    backbone = model.get_decoder()
    accepted = inspect.signature(backbone.forward).parameters
    inputs = {
        name: given
        for name, given in rows.inputs.items()
        # ALiBi and recurrent backbones have no positions to be told; padded rows count from 0 anyway
        if name != "position_ids" or "position_ids" in accepted
    }
    with nullcontext() if rows.needed is None else last_layer_on(backbone, rows.needed):
        hidden: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, rows.predictors)


@torch.no_grad()
def choose_layout(model: Any, attention: str = "auto") -> Layout:
    """Decide by measurement which layout this model can use, and switch its attention to it.

    Two probe pairs are scored one sequence at a time by the model's own forward, then in the flat row. If both agree
    within the dtype's tolerance, and no part of a pair feels a change in another, the flat row is used; else padded
    rows, in one log line that says why.

    Args:
        model: a transformers causal LM, or a PEFT model around one; in its plain attention.
        attention: `"auto"`; `"pairs"` for the flat row or an error; or a transformers implementation (`"sdpa"`,
            `"eager"`, `"flash_attention_2"`, …) for padded rows under it.

    Raises:
        PolicyError: if `"pairs"` was asked for and is not exact, or if padded rows are wrong too.
    """
    base = base_model(model)
    if base.get_decoder() is base:
        raise PolicyError(f"{type(base).__name__} does not tell its backbone from its head, so it cannot be scored.")
    if has_pair_attention(base):
        base.set_attn_implementation(base.lit_dpo_plain_attention)
    base.lit_dpo_plain_attention = base.config._attn_implementation
    training = model.training
    model.eval()
    try:
        with _without_outliers(base):
            return _choose_layout(base, attention)
    finally:
        model.train(training)


def _choose_layout(base: Any, attention: str) -> Layout:
    batch = _probe(base)
    truth = torch.cat([_one_at_a_time(base, row, start) for row, start in _sequences(batch)])
    padded = float((_tokens(base, batch) - truth).abs().max())
    exact = base.dtype == torch.float32 and not _is_int8(base)
    # 16 bits and INT8: what the numbers themselves lose when shapes change, seen on padded rows, with room
    tolerance = 1e-3 if exact else max(0.1, 4 * padded)
    if attention in ("auto", "pairs"):
        reason = _why_not_flat(base, batch, truth, tolerance)
        if reason is None:
            return "flat"
        if attention == "pairs":
            raise PolicyError(f"attention=pairs: the flat row is not exact for {type(base).__name__}: {reason}.")
        log.warning("%s: padded rows instead of the flat row: %s.", type(base).__name__, reason)
    if not padded <= tolerance:  # NaN too
        raise PolicyError(
            f"{type(base).__name__} scores a padded row differently from the sequence alone (by {padded:.2g} nats per "
            f"token, tolerance {tolerance:.2g}); its log-probs cannot be trusted in batches."
        )
    return "padded"


def _check_rope(config: Any, pairs: list[Segment]) -> None:
    """These choose their frequencies by the longest row of a batch: a long pair would move its batch mates."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return
    limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    longest = max(s.prompt + max(s.chosen, s.rejected) for s in pairs)
    if longest > limit:
        raise PolicyError(
            f"Expected pairs of up to {limit} tokens but one has {longest}: beyond that this model's positions "
            f"(rope_type={rope['rope_type']}) depend on its batch mates. Set `data.max_length` to {limit}."
        )


def _why_not_flat(base: Any, batch: PairBatch, truth: Tensor, tolerance: float) -> str | None:
    """None if the flat row is exact (and the pair attention stays on), else the reason (and it is off again)."""
    plain = base.config._attn_implementation
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
    except (UnsupportedAttentionError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
    if has_pair_attention(base):
        base.set_attn_implementation(plain)
    return reason


def _leak(base: Any, batch: PairBatch, before: Tensor) -> float:
    """How far the other completions move when the first pair's chosen tokens change.

    Shapes are the same, so that rounding is too: this sees a leak that hides below a 16-bit tolerance.
    """
    first = segments(batch)[0]
    changed = batch.input_ids.clone()
    changed[0, first.start + first.prompt : first.start + first.prompt + first.chosen] += 1
    changed %= base.config.get_text_config().vocab_size
    after = _tokens(base, batch._replace(input_ids=changed))
    return float((after - before)[first.chosen :].abs().max())


def _tokens(base: Any, batch: PairBatch) -> Tensor:
    chosen, rejected = pair_logps(base, batch)
    assert chosen.tokens is not None
    assert rejected.tokens is not None
    return torch.cat([chosen.tokens, rejected.tokens])


def _int8_layers(base: Any) -> list[Any]:
    # peft has a wrapper of the same name, without the state
    return [layer for layer in base.modules() if type(layer).__name__ == "Linear8bitLt" and hasattr(layer, "state")]


def _is_int8(base: Any) -> bool:
    return bool(_int8_layers(base))


@contextmanager
def _without_outliers(base: Any) -> Iterator[None]:
    """LLM.int8() picks outlier columns over the whole batch, so that any batch mate moves any log-prob.

    That is its nature (arXiv 2208.07339), and policy and reference share it; the probe looks beneath it.
    """
    thresholds = [(layer.state, layer.state.threshold) for layer in _int8_layers(base)]
    try:
        for state, _ in thresholds:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in thresholds:
            state.threshold = threshold


def _probe(base: Any) -> PairBatch:
    """Two short pairs of random tokens: enough for a leak between parts or between pairs to show."""
    vocabulary = base.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in torch.randint(vocabulary, (count,), generator=random)]

    batch = collate_pairs([EncodedPair(tokens(9), tokens(7), tokens(5)), EncodedPair(tokens(4), tokens(3), tokens(8))])
    return batch.to(base.get_input_embeddings().weight.device)


def _sequences(batch: PairBatch) -> list[tuple[Tensor, int]]:
    rows = []
    for side in ("chosen", "rejected"):
        for s in segments(batch):
            start = s.start + s.prompt + (0 if side == "chosen" else s.chosen)
            answer = batch.input_ids[0, start : start + getattr(s, side)]
            rows.append((torch.cat([batch.input_ids[0, s.start : s.start + s.prompt], answer]), s.prompt))
    return rows


def _one_at_a_time(base: Any, row: Tensor, start: int) -> Tensor:
    """The definition: the whole forward of the whole model on one sequence."""
    logits: Tensor = base(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float()
    return logits[start - 1 : -1].log_softmax(-1).gather(-1, row[start:, None])[:, 0]
