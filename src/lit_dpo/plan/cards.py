"""GPUs by name: memory, dense 16-bit tensor arithmetic with float32 sums, and the link to others of their node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from lit_dpo.errors import TrainingError
from lit_dpo.policy.devices import default_dtype

if TYPE_CHECKING:
    import lightning.pytorch as pl


GIB = 2.0**30


class Card(NamedTuple):
    """A GPU.

    Attributes:
        memory: GiB that a program can have, as the device reports them.
        teraflops: dense bfloat16 (float16 where there is no bfloat16), 10^12 operations a second, as the maker says.
        has_bfloat16: whether it multiplies bfloat16.
        link: to the other cards of its node, 10^9 bytes a second in one direction, as the maker says: NVLink where
            cards of this name have a switch of it between them, else PCI Express with 16 lanes.
        source: of the arithmetic.
    """

    memory: float
    teraflops: float
    has_bfloat16: bool
    link: float
    source: str


CARDS = {
    "B200": Card(178, 2250, True, 900, "NVIDIA DGX B200 datasheet"),
    "H200": Card(140, 989, True, 450, "NVIDIA H200 datasheet, without sparsity"),
    "H100": Card(79, 989, True, 450, "NVIDIA H100 SXM datasheet, without sparsity"),
    "H100-PCIe": Card(79, 756, True, 64, "NVIDIA H100 PCIe datasheet, without sparsity"),
    "A100": Card(79, 312, True, 300, "NVIDIA A100 80GB datasheet"),
    "A100-40GB": Card(39, 312, True, 300, "NVIDIA A100 datasheet"),
    "L40S": Card(44, 362, True, 32, "NVIDIA L40S datasheet, without sparsity"),
    "L4": Card(22, 121, True, 32, "NVIDIA L4 datasheet, without sparsity"),
    "A10": Card(22, 125, True, 32, "NVIDIA A10 datasheet"),
    "RTX-A6000": Card(47, 155, True, 32, "NVIDIA RTX A6000 datasheet, without sparsity"),
    "RTX-5090": Card(31, 209.5, True, 64, "NVIDIA RTX Blackwell whitepaper, float32 sums"),
    "RTX-4090": Card(23.5, 165, True, 32, "NVIDIA Ada whitepaper, float32 sums"),
    "RTX-3090": Card(23.5, 71, True, 32, "NVIDIA GA102 whitepaper, float32 sums"),
    "T4": Card(14.5, 65, False, 16, "NVIDIA T4 datasheet"),
    "V100": Card(31, 125, False, 150, "NVIDIA V100 datasheet"),
}


class Device(NamedTuple):
    """Where the run is planned for."""

    name: str
    memory: float
    on_gpu: bool
    dtype: torch.dtype
    card: Card | None


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


def device_of(name: str, trainer: pl.Trainer) -> Device:
    """Say where a run is planned for: `here`, on one of the trainer's devices, or on a card of this name."""
    if name != "here":
        found = card(name)
        return Device(name, found.memory * GIB, True, torch.bfloat16 if found.has_bfloat16 else torch.float16, found)
    root = trainer.strategy.root_device
    if root.type == "cuda":
        name = torch.cuda.get_device_name(root)
        return Device(name, float(torch.cuda.mem_get_info(root)[0]), True, default_dtype(root), None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory / trainer.num_devices, False, torch.float32, None)  # ranks are processes of it
