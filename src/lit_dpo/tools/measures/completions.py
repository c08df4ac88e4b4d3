"""Completions of held-out prompts, by the policy and by its reference, next to each other and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule
    from lit_dpo.references import Reference

Judge = Callable[[str, str, str], float]


def sampled(
    module: DPOModule,
    data: PreferenceDataModule,
    *,
    prompts: int = 32,
    max_new_tokens: int = 64,
    seed: int = 0,
    judge: Judge | None = None,
    reference: Reference | None = None,
) -> list[dict[str, Any]]:
    """Sample a completion of each of some held-out prompts."""
    raise NotImplementedError
