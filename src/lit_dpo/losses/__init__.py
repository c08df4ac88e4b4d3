"""Preference losses: one file per paper, one frozen dataclass per loss."""

from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.cdpo import CDPOLoss
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.losses.ipo import IPOLoss

__all__ = ["CDPOLoss", "DPOLoss", "IPOLoss", "PreferenceLoss"]
