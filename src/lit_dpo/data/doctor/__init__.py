"""What is wrong with preference data, by name, with what to do about it: the work behind `lit-dpo inspect`."""

from lit_dpo.data.doctor.brief import brief, remembered
from lit_dpo.data.doctor.examine import Examined, examine
from lit_dpo.data.doctor.findings import KINDS, Finding, Kind

__all__ = ["KINDS", "Examined", "Finding", "Kind", "brief", "examine", "remembered"]
