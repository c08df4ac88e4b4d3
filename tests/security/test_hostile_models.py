"""Adapters and models of strangers: what their files claim is believed by nothing that would pay for it."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from limits import bounded
from safetensors.torch import load_file, save_file

from lit_dpo import LoRAPolicy
from lit_dpo.errors import DataError, PolicyError
from lit_dpo.policy import files
from training import data

CONFIGS = {
    "r": 10**9,
    "rank_pattern": {"q_proj": 10**9},
    "lora_alpha": float("nan"),
    "lora_dropout": 1e9,
    "target_modules": 5,
    "layers_to_transform": [10**12],
    "trainable_token_indices": [10**12],
    "task_type": "SEQ_CLS",
    "peft_type": "NOPE",
    "base_model_name_or_path": 5,
    "alpha_pattern": [3],
}
TEXTS = {
    "empty": b"",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "number": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
    "twice": b'{"peft_type": "LORA", "r": 4, "r": 2048}',
}


def _header(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


LIES = {
    "empty": b"",
    "length": _header(b"{}", 2**63),
    "shape": _header(
        b'{"a.lora_A.weight":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,16]}}', None, bytes(16)
    ),
    "overlap": _header(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        None,
        bytes(16),
    ),
    "deep": _header(b"[" * 100_000),
}


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "adapter"
    LoRAPolicy(str(tiny_model), quantization="none", r=4).load().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(good, tiny_model, tmp_path):
    """Makes an adapter's folder with one thing changed, and loads it."""

    def adapter(name: str = "adapter_config.json", content: bytes | None = None, **changes: object) -> None:
        folder = tmp_path / "adapter"
        shutil.copytree(good, folder)
        if changes:
            content = json.dumps({**json.loads((folder / name).read_text()), **changes}).encode()
        if content is not None:
            (folder / name).write_bytes(content)
        policy = LoRAPolicy(str(tiny_model), quantization="none", adapter_path=str(folder))
        with bounded(len(content or b"")):
            policy.check()
            policy.load()

    return adapter


def test_an_adapter_that_is_one_loads(adapter):
    adapter()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_an_adapter_says_is_looked_at_before_memory_is_taken(adapter, name):
    with pytest.raises(PolicyError, match=r"The adapter (in|at)"):
        adapter(**{name: CONFIGS[name]})


@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_description_is_a_sentence(adapter, name):
    with pytest.raises(PolicyError):
        adapter(content=TEXTS[name])


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_found_before_weights_load(adapter, name):
    with pytest.raises(PolicyError):
        adapter("adapter_model.safetensors", LIES[name])


def test_a_pattern_that_does_not_end_is_ended(adapter, monkeypatch):
    monkeypatch.setattr(files, "_SECONDS", 1)
    with pytest.raises(PolicyError, match="regular expression that does not end"):
        adapter(target_modules="(([a-z._0-9])+)+X")


@pytest.mark.parametrize("change", ["not finite", "shape", "whole numbers"])
def test_tensors_of_another_kind_are_refused(good, adapter, tmp_path, change):
    tensors = load_file(good / "adapter_model.safetensors")
    name = next(iter(tensors))
    changed = {
        "not finite": torch.full_like(tensors[name], float("nan")),
        "shape": torch.zeros(7, 7),
        "whole numbers": tensors[name].long(),
    }
    save_file({**tensors, name: changed[change]}, tmp_path / "changed")
    with pytest.raises(PolicyError):
        adapter("adapter_model.safetensors", (tmp_path / "changed").read_bytes())


@pytest.fixture
def model(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def _change(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "given"),
    [("num_hidden_layers", 10**6), ("hidden_size", 10**7), ("vocab_size", 10**12), ("num_attention_heads", 0),
     ("hidden_size", "x"), ("hidden_act", "os.system"), ("model_type", 5)],
)  # fmt: skip
def test_a_model_that_claims_more_than_it_holds_is_refused(model, name, given):
    _change(model / "config.json", **{name: given})
    policy = LoRAPolicy(str(model), quantization="none")
    with bounded(), pytest.raises(PolicyError):
        policy.load()  # which checks first


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "..", 5, ""])
def test_an_index_of_weights_names_files_of_its_folder(model, name):
    shutil.copy(model / "model.safetensors", model.parent / "out.safetensors")
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PolicyError, match=r"to name files of its folder but it names"):
        LoRAPolicy(str(model), quantization="none").check()


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "[]"), ("tokenizer.json", "[" * 100_000), ("tokenizer_config.json", "[]"),
     ("tokenizer_config.json", '{"bos_token": 5}')],
)  # fmt: skip
def test_a_broken_tokenizer_is_a_sentence(model, pairs_file, file, content):
    (model / file).write_text(content)
    with pytest.raises(PolicyError):
        LoRAPolicy(str(model), quantization="none").load_tokenizer()
    with pytest.raises(DataError):
        data(pairs_file, tokenizer=str(model)).setup("fit")


def test_a_tokenizer_without_end_is_only_a_number(model):
    _change(model / "tokenizer_config.json", model_max_length=10**400)
    assert LoRAPolicy(str(model), quantization="none").load_tokenizer()("a")["input_ids"]
