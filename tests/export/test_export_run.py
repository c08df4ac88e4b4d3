"""A run of the command, exported: the quickstart, trained in NF4 and merged into 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tiny
from lit_dpo.cli import main
from lit_dpo.errors import LitDPOError
from lit_dpo.tools import export

LAST = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False}


@pytest.fixture(scope="module")
def merged(quickstart_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    main(["export", str(quickstart_run), str(out), "--merge"])
    return out


@pytest.fixture(scope="module")
def certificate(merged):
    return json.loads((merged / "certificate.json").read_text())


def test_the_quickstart_is_certified(certificate, quickstart_run):
    """Rounding is two orders below what 4 bits were worth, and what was trained is what validation has seen."""
    assert (certificate["pairs"], certificate["completions"], certificate["dtype"]) == (64, 128, "bfloat16")
    assert certificate["trained_as"] == "lit-dpo/quickstart (4-bit NF4)"
    assert certificate["base"] == "lit-dpo/quickstart (content as in training)"
    assert 0 < certificate["rounding"]["largest"] < 0.01
    assert 0.005 < certificate["gap"]["mean"] < 0.2
    assert 0.001 < certificate["base_gap"]["mean"] < 0.2
    measured = json.loads((quickstart_run / "adapter" / "lit_dpo.json").read_text())["measures"]
    assert certificate["before"]["accuracy"] == pytest.approx(measured["val/reward_accuracy"])
    assert certificate["before"]["margin"] == pytest.approx(measured["val/reward_margin"], abs=1e-3)  # beta is 1
    assert certificate["after"]["accuracy"] > 0.9


def test_the_merged_folder_says_what_the_adapter_said(merged, quickstart_run, quickstart):
    """Greedy, in transformers alone: the same text, but where two tokens were nearer than twice the drift."""
    rows = [json.loads(line)["prompt"] for line in (quickstart / "val.jsonl").read_text().splitlines()[:12]]
    trained, whole = (pipeline("text-generation", model=str(one)) for one in (quickstart_run / "adapter", merged))
    assert whole.model.dtype == torch.bfloat16
    said = [[speaks(row, **LAST)[0]["generated_text"] for row in rows] for speaks in (trained, whole)]
    apart = [one for one in zip(*said, strict=True) if one[0] != one[1]]
    assert len(apart) <= 1, apart


def test_what_goes_along(merged, quickstart_run):
    assert not [file.name for file in merged.iterdir() if file.suffix in (".bin", ".pt", ".pkl", ".py")]
    mine, theirs = (AutoTokenizer.from_pretrained(one) for one in (merged, quickstart_run / "adapter"))
    assert mine.chat_template == theirs.chat_template
    assert mine("any text")["input_ids"] == theirs("any text")["input_ids"]
    settings = json.loads((merged / "generation_config.json").read_text())
    assert settings["eos_token_id"] == mine.eos_token_id
    assert (merged / "training.yaml").read_bytes() == (quickstart_run / "config.yaml").read_bytes()
    assert (merged / "model.safetensors").stat().st_mode & 0o777 == (merged / "README.md").stat().st_mode & 0o777


def test_the_card(merged, quickstart):
    """The hub reads its front matter; it says what was done, measured and certified, and no row's text."""
    card = ModelCard.load(merged / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "dpo" in card.data.tags
    for part in (
        "lit-dpo/quickstart, preference-tuned",
        "- MixtureLoss(weights=",
        "- DPOLoss(beta=1.0",
        "[arXiv 2305.18290](https://arxiv.org/abs/2305.18290)",
        "| train | train.jsonl | 410 | 0 | 410 | 410 |",
        "| val | val.jsonl | 64 | 0 | 64 | 64 |",
        "| val/reward\\_accuracy |",
        "## Certificate of the merge",
        "content as in training",
        "lit-dpo fit --config training.yaml",
        "- 24 optimizer steps",
        "transformers ",
        "sha256 ",
    ):
        assert part in card.text, part
    assert str(Path.home()) not in card.text
    rows = [json.loads(line) for name in ("train", "val") for line in (quickstart / f"{name}.jsonl").open()]
    texts = {message["content"] for row in rows for turns in row.values() for message in turns}
    written = "".join((merged / name).read_text() for name in ("README.md", "certificate.json", "training.yaml"))
    assert len(texts) > 900
    assert not [text for text in texts if text in written]


def test_a_planted_base_is_refused_before_anything_is_computed(quickstart_run, quickstart, tmp_path, monkeypatch):
    """The same shapes, another training: as if the built-in model had been made by another release."""
    shutil.copytree(quickstart, tmp_path / quickstart.name)
    file = tmp_path / quickstart.name / "model" / "model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path))
    (checkpoint,) = (quickstart_run / "checkpoints").glob("*.ckpt")
    for trained in (quickstart_run, checkpoint):
        with pytest.raises(LitDPOError, match=r"was trained on lit-dpo/quickstart, .* it is another model"):
            export.main([str(trained), str(tmp_path / "out"), "--merge"])
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_and_the_adapter_of_the_end_are_the_same(quickstart_run, tmp_path):
    """As PEFT folders: weights, template and record; and each is continued as an adapter of its base."""
    (checkpoint,) = (quickstart_run / "checkpoints").glob("*.ckpt")
    for name, trained in (("file", checkpoint), ("folder", quickstart_run)):
        export.main([str(trained), str(tmp_path / name)])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("file", "folder"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = [json.loads((tmp_path / name / "lit_dpo.json").read_text()) for name in ("file", "folder")]
    assert records[0]["base"] == records[1]["base"]
    assert "library_name: peft" in (tmp_path / "file" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "file")
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_text_of_others_is_text_in_the_card(tmp_path):
    """Names of data and a loss's arguments may be anything."""
    base = tiny.directory(tmp_path / "base")
    tiny.lora(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    strange = {"base": 3, "data": {"train": 4}, "measures": {"val/x": "y"}, "loss": [1], "policy": None}
    (tmp_path / "adapter" / "lit_dpo.json").write_text(json.dumps(strange))
    export.main([str(tmp_path / "adapter"), str(tmp_path / "strange")])
    (tmp_path / "adapter" / "lit_dpo.json").write_text("[]")
    with pytest.raises(LitDPOError, match="Expected a JSON object"):
        export.main([str(tmp_path / "adapter"), str(tmp_path / "list")])
    hostile = "a | b\n# c <script>alert(1)</script> [x](javascript:1) `d` \x1b[31m"
    said = {
        "base": {"model": hostile},
        "loss": {"class_path": f"x.{hostile}", "init_args": {"name": hostile}},
        "measures": {f"val/{hostile}": 1.0},
        "data": {hostile: {"sources": [hostile], "rows": hostile}},
        "steps": hostile,
    }
    (tmp_path / "adapter" / "lit_dpo.json").write_text(json.dumps(said))
    export.main([str(tmp_path / "adapter"), str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "\\<script\\>" in card.text
    assert "\x1b" not in card.text
    import re

    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\[x|^# c", card.text, re.MULTILINE)
    tables = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {3, 7}
