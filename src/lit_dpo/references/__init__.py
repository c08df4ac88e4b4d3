"""References: what the policy is compared with."""

from lit_dpo.references.adapter import AdapterReference, BaseReference, NoReference, default_reference
from lit_dpo.references.base import Reference
from lit_dpo.references.cache import CachedReference
from lit_dpo.references.ema import EMAReference
from lit_dpo.references.model import ModelReference

__all__ = [
    "AdapterReference",
    "BaseReference",
    "CachedReference",
    "EMAReference",
    "ModelReference",
    "NoReference",
    "Reference",
    "default_reference",
]
