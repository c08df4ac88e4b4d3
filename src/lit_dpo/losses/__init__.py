"""Preference losses: one file per paper, one frozen dataclass per loss."""

from lit_dpo.losses.alphadpo import AlphaDPOLoss
from lit_dpo.losses.alphapo import AlphaPOLoss
from lit_dpo.losses.aot import AOTLoss
from lit_dpo.losses.aotunpaired import AOTUnpairedLoss
from lit_dpo.losses.apodown import APODownLoss
from lit_dpo.losses.apozero import APOZeroLoss
from lit_dpo.losses.base import PreferenceLoss
from lit_dpo.losses.bco import BCOLoss
from lit_dpo.losses.betadpo import BetaDPOLoss
from lit_dpo.losses.caldpo import CalDPOLoss
from lit_dpo.losses.cdpo import CDPOLoss
from lit_dpo.losses.chipo import ChiPOLoss
from lit_dpo.losses.cpo import CPOLoss
from lit_dpo.losses.discopop import DiscoPOPLoss
from lit_dpo.losses.dpo import DPOLoss
from lit_dpo.losses.dpop import DPOPLoss
from lit_dpo.losses.dposhift import DPOShiftLoss
from lit_dpo.losses.exo import EXOLoss
from lit_dpo.losses.fdpo import FDPOLoss
from lit_dpo.losses.hinge import HingeLoss
from lit_dpo.losses.humanline import HumanlineLoss
from lit_dpo.losses.ipo import IPOLoss
from lit_dpo.losses.lddpo import LDDPOLoss
from lit_dpo.losses.lipo import LiPOLoss
from lit_dpo.losses.mixture import MixtureLoss
from lit_dpo.losses.nca import NCALoss
from lit_dpo.losses.normalizeddpo import NormalizedDPOLoss
from lit_dpo.losses.odpo import ODPOLoss
from lit_dpo.losses.orpo import ORPOLoss
from lit_dpo.losses.plackettluce import PlackettLuceLoss
from lit_dpo.losses.rdpo import RDPOLoss
from lit_dpo.losses.robustdpo import RobustDPOLoss
from lit_dpo.losses.rpo import RPOLoss
from lit_dpo.losses.sft import SFTLoss
from lit_dpo.losses.simper import SimPERLoss
from lit_dpo.losses.simpo import SimPOLoss
from lit_dpo.losses.slic import SLiCLoss
from lit_dpo.losses.softdpo import SoftDPOLoss
from lit_dpo.losses.sppo import SPPOLoss
from lit_dpo.losses.tdpo import TDPOLoss
from lit_dpo.losses.wpo import WPOLoss

__all__ = [
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "AlphaDPOLoss",
    "AlphaPOLoss",
    "BCOLoss",
    "BetaDPOLoss",
    "CDPOLoss",
    "CPOLoss",
    "CalDPOLoss",
    "ChiPOLoss",
    "DPOLoss",
    "DPOPLoss",
    "DPOShiftLoss",
    "DiscoPOPLoss",
    "EXOLoss",
    "FDPOLoss",
    "HingeLoss",
    "HumanlineLoss",
    "IPOLoss",
    "LDDPOLoss",
    "LiPOLoss",
    "MixtureLoss",
    "NCALoss",
    "NormalizedDPOLoss",
    "ODPOLoss",
    "ORPOLoss",
    "PlackettLuceLoss",
    "PreferenceLoss",
    "RDPOLoss",
    "RPOLoss",
    "RobustDPOLoss",
    "SFTLoss",
    "SLiCLoss",
    "SPPOLoss",
    "SimPERLoss",
    "SimPOLoss",
    "SoftDPOLoss",
    "TDPOLoss",
    "WPOLoss",
]
