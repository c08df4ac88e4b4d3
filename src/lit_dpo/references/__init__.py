"""References: what the policy is compared with."""

from lit_dpo.references.adapter import AdapterReference, BaseReference, NoReference
from lit_dpo.references.base import Reference

__all__ = ["AdapterReference", "BaseReference", "NoReference", "Reference"]
