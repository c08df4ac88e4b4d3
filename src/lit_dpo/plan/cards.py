"""GPUs by name: memory, and dense 16-bit tensor arithmetic with float32 sums."""

from __future__ import annotations

from typing import NamedTuple

from lit_dpo.errors import TrainingError


class Card(NamedTuple):
    """A GPU.

    Attributes:
        memory: GiB that a program can have, as the device reports them.
        teraflops: dense bfloat16 (float16 where there is no bfloat16), 10^12 operations a second, as the maker says.
        has_bfloat16: whether it multiplies bfloat16.
        source: of the arithmetic.
    """

    memory: float
    teraflops: float
    has_bfloat16: bool
    source: str


CARDS = {
    "B200": Card(178, 2250, True, "NVIDIA DGX B200 datasheet"),
    "H200": Card(140, 989, True, "NVIDIA H200 datasheet, without sparsity"),
    "H100": Card(79, 989, True, "NVIDIA H100 SXM datasheet, without sparsity"),
    "H100-PCIe": Card(79, 756, True, "NVIDIA H100 PCIe datasheet, without sparsity"),
    "A100": Card(79, 312, True, "NVIDIA A100 80GB datasheet"),
    "A100-40GB": Card(39, 312, True, "NVIDIA A100 datasheet"),
    "L40S": Card(44, 362, True, "NVIDIA L40S datasheet, without sparsity"),
    "L4": Card(22, 121, True, "NVIDIA L4 datasheet, without sparsity"),
    "A10": Card(22, 125, True, "NVIDIA A10 datasheet"),
    "RTX-A6000": Card(47, 155, True, "NVIDIA RTX A6000 datasheet, without sparsity"),
    "RTX-5090": Card(31, 209.5, True, "NVIDIA RTX Blackwell whitepaper, float32 sums"),
    "RTX-4090": Card(23.5, 165, True, "NVIDIA Ada whitepaper, float32 sums"),
    "RTX-3090": Card(23.5, 71, True, "NVIDIA GA102 whitepaper, float32 sums"),
    "T4": Card(14.5, 65, False, "NVIDIA T4 datasheet"),
    "V100": Card(31, 125, False, "NVIDIA V100 datasheet"),
}


def card(name: str) -> Card:
    """Find the card of a name, in whatever case and with or without hyphens.

    Raises:
        TrainingError: naming those that are known.

    Example:
        >>> card("rtx4090").memory
        23.5
    """
    plain = {_plain(known): one for known, one in CARDS.items()}
    if (found := plain.get(_plain(name))) is None:
        raise TrainingError(f"Expected `--plan` to be `here` or one of {', '.join(CARDS)} but got {name!r}.")
    return found


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("nvidia")
