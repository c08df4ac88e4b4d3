"""The policy: a base model in 4 bits, 8 bits or full precision, and the LoRA adapters on it that train."""

from lit_dpo.policy.base_model import QUICKSTART, BaseModel
from lit_dpo.policy.held import HeldPolicy
from lit_dpo.policy.lora import LoRAPolicy

__all__ = ["QUICKSTART", "BaseModel", "HeldPolicy", "LoRAPolicy"]
