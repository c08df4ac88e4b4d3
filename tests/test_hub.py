"""Hub ids walked for real: over HTTP on the loopback, from a cache, and with whatever a hub refuses.

Each walk is one process, because the libraries read HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE as they are imported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import hub as loopback
import tiny
from hub import FOREVER, environment, python

# Runs commands one after the other and notes how each ended; `noted` is printed as the last line.
PRELUDE = """
import contextlib, io, json, os, sys, traceback
from lit_dpo.cli import main

noted, FIT = {}, "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.num_sanity_val_steps 0"

def command(name, line, to_fit=True):
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            main([*line.split(), *FIT.split()])
            code = 0
        except SystemExit as error:
            code = error.code
        except Exception:
            code = "traceback"
            traceback.print_exc()
    text = output.getvalue()
    errors = [one for one in text.splitlines() if one.startswith("lit-dpo: error: ")]
    noted[name] = {"code": code, "error": text[text.find(errors[0]) :] if errors else "", "text": text}
"""


def walk(script: str, cwd: Path, env: dict[str, str]) -> dict:
    done = python(f"{PRELUDE}{script}\nprint()\nprint(json.dumps(noted))", cwd, env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama before and after some change, another repository's GPT-2, and an adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    old = tiny.directory(root / "old", **sizes)
    new = tiny.directory(root / "new", seed=1, **sizes)
    gpt2 = tiny.directory(root / "gpt2", "gpt2", n_embd=64)
    adapter = tiny.lora(tiny.model(**sizes), seed=3, targets=["q_proj", "v_proj"])
    adapter.save_pretrained(root / "adapter")
    return {"old": old, "new": new, "gpt2": gpt2, "adapter": root / "adapter"}


@pytest.fixture(scope="module")
def hub(folders):
    with loopback.serve() as found:
        found.old = found.commit("acme/tiny", folders["old"], tag="v1")
        found.new = found.commit("acme/tiny", folders["new"])
        found.commit("acme/gpt2", folders["gpt2"])
        path = folders["adapter"] / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "acme/tiny", "revision": found.old})
        )
        found.commit("acme/adapter", folders["adapter"], tag="v1")
        found.commit("acme/adapter", {"README.md": b"moved"})
        found.commit("acme/both", {**_files(folders["old"]), **_files(folders["adapter"])})
        found.commit("acme/gated", folders["old"], access="gated")
        found.commit("acme/secret", folders["old"], access="private")
        found.commit("acme/breaks", folders["old"])
        files = _files(folders["old"])
        weights = files.pop("model.safetensors")
        found.commit("acme/pickled", {**files, "pytorch_model.bin": b"pickle"})
        found.commit("acme/converted", {**files, "pytorch_model.bin": b"pickle"}, conversion=3)
        found.commit("acme/converted", {**files, "model.safetensors": weights}, branch="refs/pr/3")
        found.commit("acme/pairs", {"train.jsonl": _rows(), "val.jsonl": _rows(3)}, kind="datasets", tag="v1")
        found.commit("acme/pairs", {"train.jsonl": _rows(right="of course")}, kind="datasets")
        many = {"README.md": CONFIGURATIONS, "en.jsonl": _rows(), "de.jsonl": _rows(right="ja")}
        found.commit("acme/many", many, kind="datasets")
        found.commit("acme/gated", {"train.jsonl": _rows()}, kind="datasets", access="gated")
        yield found


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


ONLINE = """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

train, policy = "--data.train acme/pairs@v1:train --data.val acme/pairs@v1:validation", "--model.policy.model acme/tiny"
nf4 = f"fit {policy} {train} --data.batch_size 4 --trainer.max_epochs"
command("fit", f"{nf4} 1 --model.policy.revision v1")
(saved,) = __import__("glob").glob("runs/version_0/checkpoints/*.ckpt")
command("validate, the commit", f"validate {policy} {train} --model.policy.revision {OLD} --ckpt_path {saved}")
command("validate, another commit", f"validate {policy} {train} --ckpt_path {saved}")
command("resume, another commit", f"{nf4} 2 --model.policy.revision main --ckpt_path {saved}")
command("resume", f"{nf4} 2 --model.policy.revision v1 --ckpt_path {saved}")
command("predict, a copy", f"predict --model.policy.model {COPY} {train} --ckpt_path {saved}")
for name in "first", "second":
    command(
        f"cached {name}",
        f"{nf4} 1 --model.policy.revision v1 --model.reference CachedReference "
        f"--model.reference.reference lit_dpo.ModelReference --model.reference.reference.model acme/tiny "
        f"--model.reference.reference.quantization none",
    )
adapter = f"{nf4} 1 --model.policy.quantization none --model.policy.adapter_path"
command("adapter", f"{adapter} acme/adapter@v1 --model.policy.revision v1 --model.reference CachedReference")
command("adapter on a copy", f"{adapter} acme/adapter@v1 --model.policy.model {COPY}")
command("adapter on another commit", f"{adapter} acme/adapter@v1")
command("adapter on another commit, told", f"{adapter} acme/adapter@v1 --model.policy.adapter_base any")
command("adapter that moved", f"{adapter} acme/adapter")
command("adapter on another model", f"{adapter} acme/adapter@v1 --model.policy.model acme/gpt2")
command("reference on another commit", f"{nf4} 1 --model.reference AdapterReference --model.reference.path acme/adapter@v1")
command("reference", f"{nf4} 1 --model.policy.revision v1 --model.reference AdapterReference --model.reference.path acme/adapter@v1")
command("gpt2", f"fit --model.policy.model acme/gpt2 {train} --data.tokenizer acme/tiny@v1 --trainer.max_epochs 1")
command("converted", f"fit --model.policy.model acme/converted {train} --trainer.max_epochs 1")
command("configuration", f"fit {policy} --data.train acme/many:german:train --trainer.max_epochs 1")

exported, ids = "runs/version_0/adapter", torch.arange(3, 40)[None]
base = AutoModelForCausalLM.from_pretrained(COPY)
with torch.no_grad():
    expected = PeftModel.from_pretrained(base, exported)(ids).logits
    noted["exported"] = json.load(open(f"{exported}/adapter_config.json"))
    noted["auto"] = float((AutoPeftModelForCausalLM.from_pretrained(exported)(ids).logits - expected).abs().max())
    piped = pipeline("text-generation", model=exported, revision=noted["exported"]["revision"]).model
    noted["pipeline"] = float((piped(ids).logits - expected).abs().max())
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home, folders, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("online")
    script = f"OLD, COPY = {hub.old!r}, {str(folders['old'])!r}\n{ONLINE}"
    return cwd, walk(script, cwd, environment(home, HF_ENDPOINT=hub.url))


def test_debug(online):
    for name, value in online[1].items():
        print(
            name,
            value
            if not isinstance(value, dict) or "code" not in value
            else (value["code"], value["error"] or value["text"][-300:]),
        )
    assert 0
