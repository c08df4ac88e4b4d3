"""Selected log-probs in chunks: the (tokens × vocabulary) matrix is never there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

# Keeps float16 gradients of unlikely tokens, 1e-6 and less, from vanishing; exact in every format.
_SCALE = 2.0**10


def selected_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities of the targets, `(N,)` float32 nats.

    The hidden states are projected chunk by chunk, in float32 from the logits on. Where the head is frozen, a chunk's
    gradient is computed while its logits are there, so that the backward pass projects nothing; where it trains, the
    chunk is computed again in the backward pass.

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
        # float32 before the softmax: over 512 tokens one in bfloat16 is about 12 nats off
        return -cross_entropy(head(states).float(), tokens, reduction="none")

    return _in_chunks(score, _is_frozen(head), vocabulary, hidden, targets)


@torch.no_grad()
def collision_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, vocabulary: int) -> Tensor:
    """`(N,)` log Σ_v p(v)² over the vocabulary: the log-prob that two samples agree, nats. Without gradient."""

    def score(states: Tensor) -> Tensor:
        logits = head(states).float()
        # log Σ p² without p, which would vanish for unlikely tokens
        return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)

    return _in_chunks(score, True, vocabulary, hidden)


def reference_kl(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    reference_head: Callable[[Tensor], Tensor],
    reference_hidden: Tensor,
    vocabulary: int,
) -> Tensor:
    """`(N,)` KL(π_ref ‖ π) over the vocabulary, nats; gradients flow into the policy alone.

    Models of one family pad a vocabulary to different widths; of such a pair the padding of the wider is left out.

    Args:
        head: of the policy.
        hidden: `(N, H)` states of the policy.
        reference_head: of the reference; runs without gradients.
        reference_hidden: `(N, H)` states of the reference at the same positions.
        vocabulary: `V`.
    """

    def score(states: Tensor, frozen: Tensor) -> Tensor:
        logits, target = head(states).float(), reference_head(frozen).float()
        width = min(logits.shape[-1], target.shape[-1])
        policy, target = logits[:, :width].log_softmax(-1), target[:, :width].log_softmax(-1)
        return (target.exp() * (target - policy)).sum(-1)

    return _in_chunks(score, _is_frozen(head), vocabulary, hidden, reference_hidden)


def _in_chunks(score: Callable[..., Tensor], frozen: bool, vocabulary: int, *inputs: Tensor) -> Tensor:
    """`score` of `(N, …)` inputs, some rows at a time. `frozen`: the first alone gets a gradient."""
    rows = chunk_rows(vocabulary, inputs[0].device)
    chunks = [*zip(*(torch.split(given, rows) for given in inputs), strict=True)]
    if not torch.is_grad_enabled():
        return torch.cat([score(*chunk) for chunk in chunks])
    if frozen:
        found: Tensor = _RowGradients.apply(inputs[0], score, chunks)  # type: ignore[no-untyped-call]
        return found
    # random states are kept, which is the default: an adapter on the head drops out by the same mask again
    return torch.cat([_checkpointed(score, *chunk) for chunk in chunks])


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Enough rows for an efficient product, else few: logits that stay in a CPU's cache cost half as much."""
    # 2**21 float32 logits are 8 MiB, the best that was measured on a CPU; 2**25 on a GPU was not measured
    return max(256, 2**25 // vocabulary) if device.type == "cuda" else max(128, 2**21 // vocabulary)


class _RowGradients(torch.autograd.Function):
    """Values of rows that do not depend on one another, with each row's gradient computed with its value.

    The gradient of `Σ g(n) · value(n)` in row n is `g(n) · ∂value(n)/∂row(n)`, so `(N, H)` is all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, score: Callable[..., Tensor], chunks: list[tuple[Tensor, ...]]) -> Tensor:
        values, gradients = [], list[Tensor]()
        for states, *others in chunks:
            # gradients are off in here, as in every autograd function's forward
            with torch.enable_grad():
                # a leaf of its own, so that the graph ends with the chunk and its logits are freed
                leaf = states.detach().requires_grad_()
                found = score(leaf, *others)
            gradients += torch.autograd.grad(found, leaf, torch.full_like(found, _SCALE))
            values.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        # `upstream` is float32, and so is the product: only what comes out of it is rounded
        return (gradients * (upstream / _SCALE)[:, None]).to(gradients.dtype), None, None


def _checkpointed(score: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    # reentrant ones lose the head's gradients where the hidden states need none
    result = checkpoint(score, *inputs, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def _is_frozen(head: Callable[[Tensor], Tensor]) -> bool:
    # a plain function does not say what it closes over: it counts as trained
    return isinstance(head, nn.Module) and not any(parameter.requires_grad for parameter in head.parameters())
