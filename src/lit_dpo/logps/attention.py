"""The pair attention: exact attention over one flat row of `prompt | completion 1 | … | completion K`.

Per prompt it is `K` causal attentions, aligned bottom-right: the prompt with its first completion on itself, and each
further completion on prompt and itself, whose prompt keys and values are gathered, not recomputed. It is registered
with
`transformers.AttentionInterface` under `PAIR_ATTENTION`, so every model that uses the interface has it. What it does
not implement it refuses: an ignored `softcap` or attention sink is wrong numbers, and random tiny models hide it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lit_dpo.compat import attention_of, can_switch_attention
from lit_dpo.errors import UnsupportedAttentionError
from lit_dpo.logps.layouts import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PAIR_ATTENTION = "lit_dpo_pairs"


class MissingLayoutError(UnsupportedAttentionError):
    """The model was called without a pair layout, or does not hand it on to its attention."""


# Arguments that models pass along and that do not change what attention computes here.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "position_embeddings",
}


class PairLayout:
    """The flat row as attention sees it; made once per forward and shared by all layers.

    Args:
        prompts: their places in the row.
        device: where the indices live.
        last_layer: index of the layer after which only what predicts a completion token is read. Its other queries, all
            of a prompt's but the last, are not asked on a CPU; their outputs are zeros.
    """

    def __init__(self, prompts: list[Segment], device: torch.device, last_layer: int | None = None) -> None:
        self.prompts = prompts
        self.device = device
        self.last_layer = last_layer
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}
        self._varlen: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    @property
    def longest(self) -> int:
        """Tokens in the longest `prompt + completion`."""
        return max(s.longest for s in self.prompts)

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor | None:
        """Make a `(queries, keys)` boolean mask, causal from the bottom right; None where plain causal is the same."""
        if window is not None and window >= keys:
            window = None
        # `is_causal` of `scaled_dot_product_attention` aligns at the top left: right for a square alone
        if window is None and queries == keys:
            return None
        if (found := self._masks.get((queries, keys, window))) is None:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.device)
            found = ones.tril(keys - queries)
            if window is not None:
                # query `i` stands at key `keys - queries + i`, and sees itself and `window - 1` tokens before it
                found &= ones.triu(keys - queries - window + 1)
            self._masks[queries, keys, window] = found
        return found

    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Key gather index, cumulative query and key lengths, and the longest of each, for `varlen_attn`."""
        if self._varlen is None:
            gather, query_lengths, key_lengths = [], [], []
            for s in self.prompts:
                prompt, (first, *further) = torch.arange(s.start, s.start + s.prompt), s.spans
                # the first completion asks together with its prompt; a further one asks less than it reads, and the
                # kernel aligns both at the end
                gather.append(torch.arange(s.start, first[1]))
                query_lengths.append(first[1] - s.start)
                key_lengths.append(first[1] - s.start)
                for begin, end in further:
                    gather += [prompt, torch.arange(begin, end)]
                    query_lengths.append(end - begin)
                    key_lengths.append(s.prompt + end - begin)
            cumulative = [
                # int32 is what flash attention reads
                torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.device, non_blocking=True)
                for lengths in (query_lengths, key_lengths)
            ]
            index = torch.cat(gather).to(self.device, non_blocking=True)
            self._varlen = (index, *cumulative, max(query_lengths), max(key_lengths))  # type: ignore[assignment]
        assert self._varlen is not None
        return self._varlen


def pair_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pair_layout: PairLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each prompt and completion.

    Args:
        module: the attention layer.
        query: `(1, heads, T, d)`.
        key: `(1, key heads, T, d)`.
        value: `(1, key heads, T, d_v)`.
        attention_mask: expected None: the layout says who sees whom.
        pair_layout: the row's layout.
        scaling: of the scores; `d ** -0.5` if None.
        dropout: expected 0: a policy and a reference with different masks do not compare.
        sliding_window: tokens that a query sees, itself included; None for all.
        softcap: scores become `softcap · tanh(scores / softcap)`.
        others: refused unless known not to matter.

    Returns:
        `(1, T, heads, d_v)` and None for the attention weights.

    Raises:
        UnsupportedAttentionError: for an argument that changes the mathematics and is not implemented.
    """
    if pair_layout is None:
        raise MissingLayoutError(
            f"Expected a pair layout but the model was called without one. Generate or score plain rows inside "
            f"`with plain_attention(model):`; `{PAIR_ATTENTION}` only reads rows of pairs."
        )
    # models pass what changes the mathematics by names of their own: what is not known is refused, not ignored
    refused = [name for name, given in others.items() if name not in _HARMLESS and not _neutral(name, given)]
    refused += ["attention_mask"] if attention_mask is not None else []
    refused += ["dropout"] if dropout else []
    refused += ["a window that is only in the mask"] if sliding_window is None and _masks_a_window(module) else []
    if refused:
        raise UnsupportedAttentionError(f"the pair attention does not implement {', '.join(map(repr, refused))}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # ahead of the choice between the two ways, which goes by dtypes
    query, key, value = _autocast(query, key, value)
    # a window that no completion reaches is none: so the kernel of torch 2.10, which has no windows, can take it
    if sliding_window is not None and sliding_window >= pair_layout.longest:
        sliding_window = None
    if softcap is None and _varlen_fits(query, key, value, sliding_window):
        out = _varlen(query[0], key[0], value[0], pair_layout, scale, sliding_window)
    else:
        is_last = pair_layout.last_layer is not None and getattr(module, "layer_idx", None) == pair_layout.last_layer
        out = _by_segment(query, key, value, pair_layout, scale, sliding_window, softcap, is_last)
    return out.contiguous().unsqueeze(0), None  # as the other implementations do: some models take a view of it


def _autocast(*parts: Tensor) -> tuple[Tensor, ...]:
    """As autocast does for `scaled_dot_product_attention`: float32 positions leave rotated queries in float32."""
    device = parts[0].device.type
    if not torch.is_autocast_enabled(device):
        return parts
    return tuple(part.to(torch.get_autocast_dtype(device)) for part in parts)


def _masks_a_window(module: nn.Module) -> bool:
    """Whether this layer sees a window or chunks by its configuration: some models tell the mask alone."""
    config = getattr(module, "config", None)
    if getattr(config, "sliding_window", None) is None and getattr(config, "attention_chunk_size", None) is None:
        return False
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    # where it is not said which layers have it, any may
    return kinds is None or index is None or kinds[index] in ("sliding_attention", "chunked_attention")


def _neutral(name: str, given: Any) -> bool:
    return given is None or (name == "is_causal" and given is True)


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PairLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    is_last: bool,
) -> Tensor:
    # key heads become the batch, so that a group of heads shares its keys without a copy
    query = query.reshape(key.shape[1], -1, *query.shape[2:])
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    # `split`, not slices: the backward of a slice fills a tensor as long as the row, for each prompt
    sides = [n for s in layout.prompts for n in (s.prompt + s.completions[0], *s.completions[1:])]
    # the same row cut at other places, to have each prompt's keys; `[::2]` drops what follows them
    prompts = [n for s in layout.prompts for n in (s.prompt, sum(s.completions))]
    queries, keys, values = (iter(part.split_with_sizes(sides, 2)) for part in (query, key, value))
    prompt_keys, prompt_values = (part.split_with_sizes(prompts, 2)[::2] for part in (key, value))

    def attend(asked: Tensor, *read: Tensor) -> Tensor:
        # groups of heads after the `cat`, which would copy their keys once for each head
        read_keys, read_values = (part.expand(-1, asked.shape[1], -1, -1) for part in read)
        return _attend(asked, read_keys, read_values, layout, scale, window, softcap)

    outputs = []
    for s, prompt_key, prompt_value in zip(layout.prompts, prompt_keys, prompt_values, strict=True):
        # zeros stand for what is not asked, so that every token keeps its place in the row
        unread = s.prompt - 1 if is_last else 0
        asked = next(queries)[:, :, unread:]
        outputs.append(asked.new_zeros(*asked.shape[:2], unread, value.shape[-1]))
        outputs.append(attend(asked, next(keys), next(values)))
        for _ in s.completions[1:]:
            read = torch.cat([prompt_key, next(keys)], 2), torch.cat([prompt_value, next(values)], 2)
            outputs.append(attend(next(queries), *read))
    return torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PairLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    mask = layout.mask(query.shape[2], key.shape[2], window)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    # written out, since `scaled_dot_product_attention` has no soft-cap; softmax in float32, as `eager` takes it
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def _varlen_fits(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    """Flash attention needs one 16-bit type and one head size, a multiple of 8 up to 256, on a device that has it."""
    return (
        query.dtype in _KERNEL_TYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and _has_kernel(query.device)
        and (window is None or "window_size" in _varlen_arguments())
    )


_KERNEL_TYPES = (torch.float16, torch.bfloat16)


def _has_kernel(device: torch.device) -> bool:
    """See whether it is an Ampere GPU or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _varlen_arguments() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    # asked of the function itself: torch 2.10, 2.11 and 2.13 take different arguments
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: PairLayout, scale: float, window: int | None) -> Tensor:
    """One kernel per layer. The queries are already in order; prompt keys and values are gathered per completion."""
    from torch.nn.attention.varlen import varlen_attn

    index, cu_q, cu_k, max_q, max_k = layout.varlen()
    arguments: dict[str, Any] = {}
    known = _varlen_arguments()  # torch 2.10 said `is_causal`, later releases say it with the window
    if "scale" in known:
        arguments["scale"] = scale
    elif (factor := scale * query.shape[-1] ** 0.5) != 1:  # torch 2.10 has the usual scale alone
        query = query * factor
    if "window_size" in known:
        # a query itself counts in a model's window; the kernel counts the tokens to its left
        arguments["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:
        arguments["is_causal"] = True
    groups = query.shape[0] // key.shape[0]
    if groups > 1 and "enable_gqa" in known:
        arguments["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    # the backward of `index_select` adds; that of indexing sorts first
    keys, values = (part.transpose(0, 1).index_select(0, index) for part in (key, value))
    out = varlen_attn(query.transpose(0, 1).contiguous(), keys, values, cu_q, cu_k, max_q, max_k, **arguments)
    assert isinstance(out, Tensor)
    return out


def use_pair_attention(model: PreTrainedModel) -> None:
    """Switch a transformers model to the pair attention.

    Raises:
        UnsupportedAttentionError: if the architecture does not use `transformers.AttentionInterface`.
    """
    from transformers import AttentionInterface

    # here, not at import: transformers is loaded by who needs it
    AttentionInterface.register(PAIR_ATTENTION, pair_attention_forward)
    if not can_switch_attention(model):
        raise UnsupportedAttentionError(f"{type(model).__name__} does not use transformers' AttentionInterface")
    model.set_attn_implementation(PAIR_ATTENTION)


def has_pair_attention(model: PreTrainedModel) -> bool:
    """Whether the model reads flat rows."""
    return attention_of(model) == PAIR_ATTENTION


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lend the model its ordinary attention, to generate or to score plain rows.

    Args:
        model: a transformers model, or a PEFT model around one.

    Example:
        ```python
        with plain_attention(module.model):
            module.model.generate(**tokenizer("Explain gravity.", return_tensors="pt"))
        ```
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not has_pair_attention(base):
        yield
        return
    # what `choose_layout` found to be right; `sdpa` if it was never asked
    base.set_attn_implementation(getattr(base, "lit_dpo_plain_attention", None) or "sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(PAIR_ATTENTION)
