"""Selected log-probs in chunks: the (tokens × vocabulary) matrix is never there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 2**24  # fp32 logits of one chunk: 64 MiB


def selected_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities of the targets, `(N,)` float32 nats.

    The hidden states are projected chunk by chunk, in float32 from the logits on, and each chunk's logits are computed
    again in the backward pass instead of being kept.

    Args:
        head: hidden states `(n, H)` to logits `(n, V)`.
        hidden: `(N, H)`, only the states that are scored.
        targets: `(N,)` token ids.
        vocabulary: `V`, which decides the chunk.

    Example:
        >>> head = nn.Linear(4, 10)
        >>> hidden, targets = torch.randn(6, 4), torch.arange(6)
        >>> dense = head(hidden).log_softmax(-1)[torch.arange(6), targets]
        >>> torch.allclose(selected_logps(head, hidden, targets, 10), dense, atol=1e-6)
        True
    """

    def score(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states).float()
        return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)

    return _in_chunks(score, vocabulary, hidden, targets)


@torch.no_grad()
def collision_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, vocabulary: int) -> Tensor:
    """`(N,)` log Σ_v p(v)² over the vocabulary: the log-prob that two samples agree, nats. Without gradient."""

    def score(states: Tensor) -> Tensor:
        logits = head(states).float()
        return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)

    return _in_chunks(score, vocabulary, hidden)


def reference_kl(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    reference_head: Callable[[Tensor], Tensor],
    reference_hidden: Tensor,
    vocabulary: int,
) -> Tensor:
    """`(N,)` KL(π_ref ‖ π) over the vocabulary, nats; gradients flow into the policy alone.

    Args:
        head: of the policy.
        hidden: `(N, H)` states of the policy.
        reference_head: of the reference; runs without gradients.
        reference_hidden: `(N, H)` states of the reference at the same positions.
        vocabulary: `V`.
    """

    def score(states: Tensor, frozen: Tensor) -> Tensor:
        target = reference_head(frozen).float().log_softmax(-1)
        policy = head(states).float().log_softmax(-1)
        return (target.exp() * (target - policy)).sum(-1)

    return _in_chunks(score, vocabulary, hidden, reference_hidden)


def _in_chunks(score: Callable[..., Tensor], vocabulary: int, *inputs: Tensor) -> Tensor:
    """`score` of `(N, …)` inputs, some rows at a time; with gradients each chunk is computed again in the backward."""
    rows = max(16, _CHUNK_ELEMENTS // vocabulary)
    chunks = zip(*(torch.split(given, rows) for given in inputs), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([score(*chunk) for chunk in chunks])
    # preserve_rng_state costs a device sync per chunk, and heads have no dropout
    return torch.cat([_checkpointed(score, *chunk) for chunk in chunks])


def _checkpointed(score: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    result = checkpoint(score, *inputs, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def model_head(model: Any) -> Callable[[Tensor], Tensor]:
    """What a transformers causal LM does after its backbone: head, soft-cap, logit scale, an adapter on any of them.

    It is the model's own `forward` with the backbone replaced by one that returns what it is given, on a shallow copy
    that shares every parameter, so that no architecture's arithmetic is written here a second time.
    """
    shallow = _replace(model, model.get_decoder(), _Given())

    def head(states: Tensor) -> Tensor:
        logits: Tensor = shallow(inputs_embeds=states.unsqueeze(0), use_cache=False).logits
        return logits[0]

    return head


class _Given(nn.Module):
    """A backbone that returns its input embeddings as its last hidden state."""

    def forward(self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor, **_: Any) -> Any:
        return _output_type()(last_hidden_state=inputs_embeds)


@cache
def _output_type() -> type[Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class GivenOutput(BaseModelOutputWithPast):
        """Heads copy what else their backbone returns (router logits, caches, …) into their own output: nothing."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return GivenOutput


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Shallow copies of the modules on the way down to `old`, with `new` in its place."""
    if module is old:
        return new
    for name, child in module.named_children():
        if any(found is old for found in child.modules()):
            clone = copy.copy(module)
            clone._modules = {**module._modules, name: _replace(child, old, new)}
            return clone
    raise ValueError(f"{type(module).__name__} does not hold its decoder")
