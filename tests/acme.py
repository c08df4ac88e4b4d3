"""What the loopback hub holds: models, adapters and data sets of one organisation, good and bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hub
import tiny


def _rows(count: int = 8, right: str = "yes") -> bytes:
    rows = [{"prompt": f"is {i} so?", "chosen": f" {right}", "rejected": " no" * (1 + i % 3)} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CONFIGURATIONS = b"""---
configs:
- config_name: english
  data_files: [{split: train, path: en.jsonl}, {split: test, path: en.jsonl}]
- config_name: german
  data_files: [{split: train, path: de.jsonl}, {split: test, path: de.jsonl}]
---
"""
ENDLESS = b"configs: &again\n- config_name: default\n  data_files: *again\n"


@contextmanager
def acme(root: Path) -> Iterator[hub.Hub]:
    """A running hub; `old` and `new` are commits of `acme/tiny`, `folders` holds what was uploaded."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    old = tiny.directory(root / "old", **sizes)
    new = tiny.directory(root / "new", seed=1, **sizes)
    gpt2 = tiny.directory(root / "gpt2", "gpt2", n_embd=64)
    adapter = tiny.lora(tiny.model(**sizes), seed=3, targets=["q_proj", "v_proj"])
    adapter.save_pretrained(root / "adapter")
    tiny.model(**sizes).save_pretrained(root / "sharded", max_shard_size="150KB")
    (root / "sharded" / "consolidated.safetensors").write_bytes(b"the same weights as another program wants them")
    folders = {"old": old, "new": new, "gpt2": gpt2, "adapter": root / "adapter", "sharded": root / "sharded"}
    with hub.serve() as found:
        found.folders = folders
        found.old = found.commit("acme/tiny", folders["old"], tag="v1")
        found.new = found.commit("acme/tiny", folders["new"])
        found.commit("acme/tiny", {**_files(folders["old"]), "README.md": b"better said"}, branch="readme")
        found.commit("acme/gpt2", folders["gpt2"])
        path = folders["adapter"] / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "acme/tiny", "revision": found.old})
        )
        found.commit("acme/adapter", folders["adapter"], tag="v1")
        found.commit("acme/adapter", {"README.md": b"moved"})
        found.commit("acme/both", {**_files(folders["old"]), **_files(folders["adapter"])})
        found.commit("acme/mirror", folders["old"])
        found.commit("acme/sharded", folders["sharded"])
        found.commit("acme/custom", {**_files(folders["old"]), **_custom(folders["old"])})
        found.commit("acme/gated", folders["old"], access="gated")
        found.commit("acme/secret", folders["old"], access="private")
        found.commit("acme/breaks", folders["old"])
        files = _files(folders["old"])
        weights = files.pop("model.safetensors")
        found.commit("acme/pickled", {**files, "pytorch_model.bin": b"pickle"})
        found.commit("acme/converted", {**files, "pytorch_model.bin": b"pickle"}, tag="v1", conversion=3)
        found.commit("acme/converted", {**files, "model.safetensors": weights}, branch="refs/pr/3")
        found.commit("acme/pairs", {"train.jsonl": _rows(), "val.jsonl": _rows(3)}, kind="datasets", tag="v1")
        found.commit("acme/pairs", {"train.jsonl": _rows(right="of course")}, kind="datasets")
        found.commit("acme/rows", {"train.jsonl": _rows(21)}, kind="datasets", tag="v1")
        found.commit("acme/rows", {"train.jsonl": _rows(9)}, kind="datasets")
        many = {"README.md": CONFIGURATIONS, "en.jsonl": _rows(), "de.jsonl": _rows(right="ja")}
        found.commit("acme/many", many, kind="datasets")
        found.commit("acme/gated", {"train.jsonl": _rows()}, kind="datasets", access="gated")
        for name, card in ("README.md", b"---\n%s---\n" % ENDLESS), (".huggingface.yaml", ENDLESS):
            found.commit(f"acme/endless-{len(name)}", {"train.jsonl": _rows(), name: card}, kind="datasets")
        yield found


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _custom(folder: Path) -> dict[str, bytes]:
    """Code that comes with a model."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "acme",
        "auto_map": {"AutoConfig": "acme_model.AcmeConfig", "AutoModelForCausalLM": "acme_model.AcmeForCausalLM"},
    }
    code = """
from transformers import LlamaConfig, LlamaForCausalLM

class AcmeConfig(LlamaConfig):
    model_type = "acme"

class AcmeForCausalLM(LlamaForCausalLM):
    config_class = AcmeConfig
"""
    return {"config.json": json.dumps(config).encode(), "acme_model.py": code.encode()}
