"""Which tests belong to a module: first those of what it is for, which are quick, then those of what is built on it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

_LOGPS = (
    *("records", "head", "statistics", "many_completions", "flat_row", "attention", "varlen", "microbatch", "probe"),
    "training_mode",
)
_REFERENCES = ("references", "cache", "store", "ema", "model")
_ENCODED = ("encode", "encode_rankings", "encoding_costs", "properties", "cuts", "tool_calls", "prompt_parts")
_WIDE = {
    "losses": ["test_edges", "losses/test_contract", "losses/test_lists", "test_loss_inputs", "test_rankings"],
    "logps": [*(f"logps/test_{one}" for one in _LOGPS), "losses/test_contract", "test_loss_inputs", "test_module"],
    "references": [*(f"references/test_{one}" for one in _REFERENCES), "policy/test_held", "test_module", "test_stops"],
    "metrics": ["test_ends", "test_rankings", "callbacks/test_callbacks_monitor", "test_lightning", "test_module"],
    "data": [*(f"data/test_{one}" for one in _ENCODED), "data/test_datamodule", "data/test_other_models"],
    "checkpoint": ["test_checkpoint", "test_stops", "test_ends", "test_lightning", "test_fork"],
}
_NEAR = {
    "losses/__init__": ["losses/test_contract"],
    "losses/checks": ["test_edges", "test_loss_inputs", "losses/test_contract"],
    "losses/order": ["losses/test_aot", "losses/test_aotunpaired", "losses/test_lists"],
    "losses/base": ["losses/test_contract"],
    "losses/composed": ["losses/test_humanline", "losses/test_lddpo", "losses/test_wpo"],
    "logps/fields": ["logps/test_records", "test_edges"],
    "logps/last_layer": ["logps/test_head", "logps/test_microbatch"],
    "logps/layouts": ["logps/test_flat_row", "logps/test_many_completions"],
    "logps/model_head": ["logps/test_head"],
    "logps/choice": ["logps/test_flat_row", "logps/test_training_mode", "logps/test_probe"],
    "logps/score": ["logps/test_flat_row", "logps/test_training_mode", "logps/test_probe"],
    "logps/attention": ["logps/test_varlen"],
    "logps/coupling": ["test_many"],
    "checkpoint/classes": ["security/test_hostile_checkpoints", "test_remote_code"],
    "references/base": ["references/test_references"],
    "references/model": ["references/test_cache"],
    "references/adapter": ["references/test_references", "policy/test_held"],
    "references/outdated": ["references/test_cache", "references/test_store"],
    "data/encode": ["data/test_encode", "data/test_encode_rankings"],
    "data/truncation": ["data/test_encode"],
    "data/encoding": ["data/test_encoding_costs", "data/test_encode"],
}
_SOME = "checks_of or MixtureLoss or BCOLoss or TDPOLoss or SimPOLoss or LiPOLoss or test_loss_inputs"
_HEAVY = "not two_processes and not signal_saves and not on_two"


def related(module: Path, *, wide: bool) -> list[list[str]]:
    """Give arguments of pytest, of one session after another, for a module of the package."""
    room, name = module.parts[0], module.stem
    key = f"{room}/{name}"
    own = {"metrics": "metrics/test_preference", "checkpoint": "test_checkpoint"}.get(room, f"{room}/test_{name}")
    some = _SOME if key in ("losses/__init__", "losses/checks", "losses/base") else _HEAVY
    sessions = [[*(_there(own, *_NEAR.get(key, [])) or _there(*_WIDE[room])), "-k", some]]
    if room == "losses" and key not in _NEAR:
        *_, kind = re.findall(r"^class (\w+Loss)\(", (ROOT / "src" / "lit_dpo" / module).read_text(), re.MULTILINE)
        sessions.append(["tests/losses/test_contract.py", "-k", kind])
    return [*sessions, [*_there(*_WIDE[room]), "-k", _HEAVY]] if wide else sessions


def _there(*files: str) -> list[str]:
    named = [f"tests/{file}.py" for file in dict.fromkeys(files)]
    return [file for file in named if (ROOT / file).exists()]
