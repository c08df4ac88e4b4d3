"""The rule of `torch.nn.attention.varlen.varlen_attn`, as a loop over sequences on any device.

What its documentation says (torch 2.10 to 2.13), and flash attention's for the mask: sequence `n` asks with
`query[cu_seq_q[n]:cu_seq_q[n + 1]]` for `key[cu_seq_k[n]:cu_seq_k[n + 1]]`. Of `q` queries and `k` keys, query `i` sees
key `j` where `i + k - q - left <= j <= i + k - q + right`: aligned at the end, itself included, so that a window of `W`
tokens is `left = W - 1` (the documentation's "(W, 0) for a window of size W" sees one more); -1 is no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from lit_dpo.logps import attention


def varlen_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    return _loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, (-1, 0) if is_causal else (-1, -1))


def varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return _loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert (seqused_k, block_table, num_splits) == (None, None, None)
    return _loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa)


RELEASES = {"2.10": varlen_2_10, "2.11": varlen_2_11, "2.13": varlen_2_13}


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float | None,
    window: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """In float32, rounded at the end. What the kernel refuses, or reads beyond, is an error here."""
    assert cu_seq_k is not None
    for part in (query, key, value):
        assert part.ndim == 3
        assert part.stride(-1) == 1
        assert part.dtype == query.dtype
    for cumulative, rows, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert cumulative.dtype == torch.int32
        assert cumulative.is_contiguous()
        assert cumulative.device == query.device
        assert int(cumulative[0]) == 0
        assert int(cumulative[-1]) == len(rows)
        assert int(cumulative.diff().max()) == longest
    assert len(cu_seq_q) == len(cu_seq_k)
    assert len(key) == len(value)
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa, "Expect query and key/value to have the same number of heads"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (part.float().transpose(0, 1) for part in (query, key, value))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    parts = [
        _attend(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], scale, window)
        for q0, q1, k0, k1 in zip(
            cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), cu_seq_k[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True
        )
    ]
    return torch.cat(parts, 1).transpose(0, 1).to(query.dtype).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    queries, keys = query.shape[1], key.shape[1]
    here = torch.arange(queries, device=query.device)[:, None] + keys - queries
    other = torch.arange(keys, device=query.device)
    left, right = window
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if left >= 0:
        seen &= other >= here - left
    if right >= 0:
        seen &= other <= here + right
    return (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ value


def emulate(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Callable[..., Tensor] = varlen_2_13,
    types: tuple[torch.dtype, ...] = attention._KERNEL_TYPES,
) -> list[int]:
    """Let every device have the kernel, for tensors of these types; the numbers of queries of each call to come."""
    calls: list[int] = []

    def counted(*given: Any, **named: Any) -> Tensor:
        calls.append(len(given[0]))
        return kernel(*given, **named)

    counted.__signature__ = attention.inspect.signature(kernel)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_KERNEL_TYPES", types)
    monkeypatch.setattr(attention, "_has_kernel", lambda device: True)
    monkeypatch.setattr(attention, "_varlen_arguments", attention._varlen_arguments.__wrapped__)  # not remembered
    return calls
