"""`--data.chat_template FILE`: trained, cached, exported; and arguments that no template reads, refused before rows."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import training
from lit_dpo.cli import main
from lit_dpo.data.datamodule import PreferenceDataModule
from lit_dpo.errors import DataError
from toy_tokenizers import CHAT, byte_level, sentencepiece_like

PLAIN = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
ASK = [{"role": "user", "content": "What is the answer?"}]


def rows(count: int = 6) -> list[dict]:
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return [{"prompt": [{"role": "user", "content": f"What is {number}?"}], **sides} for number in range(count)]


@pytest.fixture
def template(tmp_path: Path) -> str:
    file = tmp_path / "plain.jinja"
    file.write_text(PLAIN)
    return str(file)


def data(rows: Any, **options: Any) -> PreferenceDataModule:
    module = PreferenceDataModule(train=rows, **options)
    module.setup("fit")
    return module


def prompts(module: PreferenceDataModule) -> list[str]:
    return [module.loaded_tokenizer.decode(ids) for _, ids, _ in module.prompts("train", 2)]


def test_it_is_trained_and_exported(tiny_model: Path, template: str, tmp_path: Path) -> None:
    """The adapter's tokenizer renders what was trained on, and what generation is asked."""
    run, pairs = training.trainer(tmp_path / "run"), PreferenceDataModule(rows(), batch_size=4, chat_template=template)
    run.fit(training.module(tiny_model), pairs)
    exported = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    assert exported.chat_template == PLAIN
    for row, ids, preference in pairs.prompts("train", 3):
        text = exported.apply_chat_template(preference.prompt, tokenize=False, add_generation_prompt=True)
        assert text == f"USER: What is {row}?\nASSISTANT: "
        assert exported(text, add_special_tokens=False)["input_ids"] == ids
    completion = exported.decode(pairs._table("train").batch([0]).input_ids[0])
    assert completion == "USER: What is 0?\nASSISTANT: chosen\n</s>rejected\n</s>"


def test_a_tokenizer_that_is_given_keeps_its_own(template: str) -> None:
    for given in (byte_level(), sentencepiece_like()):
        before = given.chat_template
        module = data(rows(), tokenizer=given, chat_template=template)
        assert prompts(module)[0] == "USER: What is 0?\nASSISTANT: "
        assert (given.chat_template, module.loaded_tokenizer.chat_template) == (before, PLAIN)


def test_a_changed_file_encodes_anew(template: str, jsonl, tokenizer_folder: str) -> None:
    path = jsonl("rows.jsonl", rows())
    assert prompts(data(path, tokenizer=tokenizer_folder))[0] == "<|user|>What is 0?<|end|>\n<|assistant|>"
    assert prompts(data(path, tokenizer=tokenizer_folder, chat_template=template))[0].startswith("USER: ")
    Path(template).write_text(PLAIN.replace("': '", "'> '"))
    assert prompts(data(path, tokenizer=tokenizer_folder, chat_template=template))[0].startswith("USER> ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("", "does not read `messages`"),
        ("{% for m in messages %}\n{{ m ", "line 2: Expected a chat template in Jinja"),
        ("{{ message['content'] }}", "does not read `messages`"),
    ],
)
def test_what_is_no_template_stops_before_weights(
    text: str | None, words: str, tiny_model: Path, tmp_path, capsys
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").write_bytes(b"")  # would be another error
    file = tmp_path / "bad.jinja"
    if text is not None:
        file.write_text(text)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    given = (f"--model.policy.model={model}", f"--data.train={pairs}", f"--data.chat_template={file}")
    with pytest.raises(SystemExit):
        main(["fit", "--model.policy.quantization=none", "--trainer.accelerator=cpu", "--trainer.max_steps=1", *given])
    said = capsys.readouterr().err
    assert words in said
    assert str(file) in said


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_thinkin": False}, "does not read `enable_thinkin`, but `enable_thinking`"),
        ({"chat_template": CHAT}, "`--data.chat_template FILE` sets one"),
        ({"messages": []}, "`messages` is no argument of a template"),
    ],
)
def test_arguments_that_no_template_reads_stop_before_rows(arguments: dict, words: str) -> None:
    tokenizer = byte_level(chat_template="{% if enable_thinking %}!{% endif %}" + CHAT)
    with pytest.raises(DataError) as error:
        data("/nowhere/at/all.jsonl", tokenizer=tokenizer, chat_template_kwargs=arguments)
    assert words in str(error.value)
    assert prompts(data(rows(), tokenizer=tokenizer, chat_template_kwargs={"enable_thinking": True}))[0][0] == "!"


def test_options_of_templates_that_no_row_can_feel(caplog, template: str) -> None:
    text = [{"prompt": "q", "chosen": " a", "rejected": " b"}]
    with pytest.raises(DataError, match="has no chat template"):
        data(text, tokenizer=sentencepiece_like(), chat_template_kwargs={"a": 1})
    with caplog.at_level(logging.INFO):
        data(text, tokenizer=byte_level(), chat_template=template)
        data(rows(), tokenizer=byte_level(), chat_template=template)
    lines = [one.getMessage() for one in caplog.records if "changes nothing" in one.getMessage()]
    assert lines == ["train: `chat_template` changes nothing, for the rows are text, which no chat template renders"]
    with pytest.raises(DataError, match="`chat_template` with a file"):
        data(rows(), tokenizer=sentencepiece_like())


# --- of a row ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [dict, json.dumps])
def test_a_row_may_have_arguments_of_its_own_whatever_its_layout(written, jsonl) -> None:
    tokenizer = byte_level(chat_template="{% if mood %}{{ mood + ': ' }}{% endif %}" + CHAT)
    (triple,) = rows(1)
    whole = {side: triple["prompt"] + triple[side] for side in ("chosen", "rejected")}
    ranked = {"prompt": triple["prompt"], "completions": [triple["chosen"], triple["rejected"]], "scores": [1, 0]}
    orca = {"system": "", "question": "What is 0?", "chosen": "a", "rejected": "b"}
    replies = [{"role": "assistant", "text": text, "rank": rank} for rank, text in enumerate("ab")]
    tree = {"message_tree_id": "x", "prompt": {"role": "prompter", "text": "What is 0?", "replies": replies}}
    for number, cells in enumerate((triple, whole, ranked, orca, tree)):
        loud, calm = ({**cells, "chat_template_kwargs": written({"mood": mood})} for mood in ("loud", "calm"))
        plain = [{**cells, "chat_template_kwargs": value} for value in (None, written({}))]
        module = data(jsonl(f"{number}.jsonl", [loud, calm, *plain]), tokenizer=tokenizer)
        own = [module.loaded_tokenizer.decode(module._table("train").batch([n]).input_ids[0]) for n in range(4)]
        assert [one.partition("<|user|>")[0] for one in own] == ["loud: ", "calm: ", "", ""]
    for value, words in (({"moot": 1}, "does not read the row's `moot`, but `mood`"), ([1], "an object")):
        path = jsonl("bad.jsonl", [triple | {"chat_template_kwargs": value}])
        with pytest.raises(DataError, match=rf"row 0 .*{words}"):
            data(path, tokenizer=tokenizer)


def test_arguments_beside_text_are_refused(jsonl, tokenizer_folder: str) -> None:
    path = jsonl("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"mood": "loud"}}])
    with pytest.raises(DataError, match="mood given with text"):
        data(path, tokenizer=tokenizer_folder)
