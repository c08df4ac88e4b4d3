"""Direct Preference Optimization for PyTorch Lightning.

Public names load on first use: `import lit_dpo` is instant and `import lit_dpo.losses` loads neither transformers nor
lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lit_dpo.data.datamodule import PreferenceDataModule as PreferenceDataModule
    from lit_dpo.logps import Field as Field
    from lit_dpo.losses import CDPOLoss as CDPOLoss
    from lit_dpo.losses import DPOLoss as DPOLoss
    from lit_dpo.losses import IPOLoss as IPOLoss
    from lit_dpo.losses import PreferenceLoss as PreferenceLoss
    from lit_dpo.module import DPOModule as DPOModule
    from lit_dpo.policy import LoRAPolicy as LoRAPolicy
    from lit_dpo.references import AdapterReference as AdapterReference
    from lit_dpo.references import BaseReference as BaseReference
    from lit_dpo.references import CachedReference as CachedReference
    from lit_dpo.references import EMAReference as EMAReference
    from lit_dpo.references import ModelReference as ModelReference
    from lit_dpo.references import NoReference as NoReference
    from lit_dpo.references import Reference as Reference

_HOMES = {
    "DPOModule": "lit_dpo.module",
    "PreferenceDataModule": "lit_dpo.data.datamodule",
    "LoRAPolicy": "lit_dpo.policy",
    "Reference": "lit_dpo.references",
    "BaseReference": "lit_dpo.references",
    "AdapterReference": "lit_dpo.references",
    "CachedReference": "lit_dpo.references",
    "EMAReference": "lit_dpo.references",
    "ModelReference": "lit_dpo.references",
    "NoReference": "lit_dpo.references",
    "Field": "lit_dpo.logps",
    "PreferenceLoss": "lit_dpo.losses",
    "DPOLoss": "lit_dpo.losses",
    "CDPOLoss": "lit_dpo.losses",
    "IPOLoss": "lit_dpo.losses",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
