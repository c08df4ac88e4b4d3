"""Tokenizers and files for the tests of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from toy_tokenizers import CHAT, byte_level, sentencepiece_like

TOOLS = (
    "{% if tools %}{{ '<|system|>' + tools | map(attribute='function.name') | join(', ') + '<|end|>\\n' }}{% endif %}"
)
CALLS = CHAT.replace("m['content']", "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '')")


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece_like", "adds_eos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "adds_eos":
        return sentencepiece_like("<s> $A </s>")
    return {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}[request.param]()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tools_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer whose chat template says the names of the tools, and what is called."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(chat_template=TOOLS + CALLS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing that tests load stays in the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    datasets.enable_progress_bars()


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def jsonl(tmp_path: Path):
    """`jsonl("name.jsonl", rows)` writes a file and gives its path."""
    return lambda name, rows: write_jsonl(tmp_path / name, rows)
