"""Formats: how a row of a file becomes a preference. One reader per way people store them; extend by subclassing."""

from lit_dpo.data.formats.base import Message, Preference, PreferenceFormat, Ranking, Skipped
from lit_dpo.data.formats.conversations import OpenAIPreferences, ShareGPT
from lit_dpo.data.formats.implicit import ImplicitPrompt, Transcripts
from lit_dpo.data.formats.judged import SHP, SafeRLHF, SignedPairs, SummaryComparisons, WebGPT
from lit_dpo.data.formats.labelled import Arena, ArenaColumns, LabelledPairs
from lit_dpo.data.formats.questions import Alpaca, AlpacaOutputs, Orca, StackExchange
from lit_dpo.data.formats.ranked import OneRight, RankedObjects
from lit_dpo.data.formats.rankings import Rankings
from lit_dpo.data.formats.recognition import Auto
from lit_dpo.data.formats.trees import Trees
from lit_dpo.data.formats.triples import Triples

__all__ = [
    "SHP",
    "Alpaca",
    "AlpacaOutputs",
    "Arena",
    "ArenaColumns",
    "Auto",
    "ImplicitPrompt",
    "LabelledPairs",
    "Message",
    "OneRight",
    "OpenAIPreferences",
    "Orca",
    "Preference",
    "PreferenceFormat",
    "RankedObjects",
    "Ranking",
    "Rankings",
    "SafeRLHF",
    "ShareGPT",
    "SignedPairs",
    "Skipped",
    "StackExchange",
    "SummaryComparisons",
    "Transcripts",
    "Trees",
    "Triples",
    "WebGPT",
]
