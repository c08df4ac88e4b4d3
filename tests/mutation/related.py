"""Which tests belong to a module: its own first, then those of what is built on it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

_LOGPS = (
    *("test_records", "test_head", "test_many_completions", "test_statistics", "test_flat_row", "test_attention"),
    *("test_varlen", "test_microbatch", "test_probe", "test_training_mode"),
)
_REFERENCES = ("test_references", "test_cache", "test_store", "test_ema", "test_model")
_NEAR = {
    "losses/__init__": ["tests/losses/test_contract.py", "tests/test_layers.py"],
    "losses/checks": ["tests/test_loss_inputs.py", "tests/losses/test_contract.py", "tests/losses/test_lists.py"],
    "losses/order": ["tests/losses/test_aot.py", "tests/losses/test_lists.py", "tests/losses/test_contract.py"],
    "losses/base": ["tests/losses/test_contract.py", "tests/losses/test_lists.py", "tests/test_loss_inputs.py"],
    "losses/composed": ["tests/losses/test_humanline.py", "tests/losses/test_lddpo.py", "tests/losses/test_wpo.py"],
    "logps/fields": ["tests/logps/test_records.py", "tests/losses/test_contract.py"],
    "references/base": ["tests/references/test_references.py", "tests/references/test_cache.py"],
    "metrics": ["tests/metrics", "tests/test_ends.py", "tests/test_module.py", "tests/test_rankings.py"],
    "data/encode": ["tests/data/test_encode.py", "tests/data/test_encode_rankings.py", "tests/data/test_properties.py"],
    "data/encoding": [
        "tests/data/test_encoding_costs.py",
        "tests/data/test_encode.py",
        "tests/data/test_datamodule.py",
    ],
    "checkpoint": ["tests/test_checkpoint.py", "tests/test_stops.py", "tests/test_lightning.py", "tests/test_ends.py"],
}
_LATER = {
    "losses": ["tests/test_loss_inputs.py", "tests/test_rankings.py"],
    "logps": ["tests/test_loss_inputs.py"],
    "data": [
        *(f"tests/data/test_{name}.py" for name in ("truncation", "cuts", "tool_calls", "prompt_parts", "bad_rows")),
        *(f"tests/data/test_{name}.py" for name in ("chat_template", "cached_rows", "other_models", "rendering")),
    ],
}
_HEAVY = "not two_processes and not on_two and not in_two and not signal_saves"


def related(module: Path) -> list[list[str]]:
    """Give arguments of pytest, of one session after another, for a module of the package."""
    room, name = module.parts[0], module.stem
    own = f"tests/{room}/test_{name}.py"
    near = _NEAR.get(f"{room}/{name}", _NEAR.get(room, []))
    if room == "losses" and not near:
        (kind,) = re.findall(r"^class (\w+Loss)\(", _source(module), re.MULTILINE)[-1:]
        return [_there(own), ["tests/losses/test_contract.py", "-k", kind], [*_there(*_LATER["losses"]), "-k", kind]]
    rooms = {"logps": _LOGPS, "references": _REFERENCES}.get(room, ())
    files = [own, *near, *(f"tests/{room}/{one}.py" for one in rooms), *_LATER.get(room, [])]
    return [[*_there(*dict.fromkeys(files)), "-k", _HEAVY]]


def _there(*files: str) -> list[str]:
    return [file for file in files if (TESTS.parent / file).exists()]


def _source(module: Path) -> str:
    return (TESTS.parent / "src" / "lit_dpo" / module).read_text()
