from dataclasses import dataclass
from typing import Any

from lit_dpo import LoRAPolicy


@dataclass(frozen=True)
class FrozenA(LoRAPolicy):
    """LoRA-FA (arXiv 2308.03303): of each pair of matrices only B trains, from an A of its own scale."""

    a_scale: float = 1.0

    def load(self, *args: Any, **kwargs: Any) -> Any:
        model = super().load(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False).mul_(self.a_scale)
        return model
