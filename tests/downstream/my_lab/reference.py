from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lit_dpo import Reference


@dataclass(frozen=True)
class WeakerReference(Reference):
    """The policy with its adapter at a part of its strength."""

    share: float = 0.5

    @property
    def starts_at_policy(self) -> bool:
        return True  # a fresh adapter does nothing at any strength

    @contextmanager
    def activated(self, model: Any) -> Iterator[Any]:
        layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
        for layer in layers:
            layer.scaling["default"] *= self.share
        try:
            yield model
        finally:
            for layer in layers:
                layer.scaling["default"] /= self.share
