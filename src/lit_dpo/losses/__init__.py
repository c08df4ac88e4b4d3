"""Preference losses: one file per paper, one frozen dataclass per loss."""

from lit_dpo.losses.alphapo import AlphaPOLoss
from lit_dpo.losses.aot import AOTLoss
from lit_dpo.losses.aotunpaired import AOTUnpairedLoss
from lit_dpo.losses.apodown import APODownLoss
from lit_dpo.losses.apozero import APOZeroLoss
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.cdpo import CDPOLoss
from lit_dpo.losses.cpo import CPOLoss
from lit_dpo.losses.discopop import DiscoPOPLoss
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.losses.exo import EXOLoss
from lit_dpo.losses.fdpo import FDPOLoss
from lit_dpo.losses.hinge import HingeLoss
from lit_dpo.losses.ipo import IPOLoss
from lit_dpo.losses.nca import NCALoss
from lit_dpo.losses.normalizeddpo import NormalizedDPOLoss
from lit_dpo.losses.robustdpo import RobustDPOLoss
from lit_dpo.losses.simpo import SimPOLoss
from lit_dpo.losses.sppo import SPPOLoss

__all__ = [
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "AlphaPOLoss",
    "CDPOLoss",
    "CPOLoss",
    "DPOLoss",
    "DiscoPOPLoss",
    "EXOLoss",
    "FDPOLoss",
    "HingeLoss",
    "IPOLoss",
    "NCALoss",
    "NormalizedDPOLoss",
    "PreferenceLoss",
    "RobustDPOLoss",
    "SPPOLoss",
    "SimPOLoss",
]
