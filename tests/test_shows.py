"""What only shows costs nothing that was trained, and shows text as it is."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

import ranks
import tiny
from lit_dpo import PreferenceDataModule
from lit_dpo.callbacks import AdapterExport, SampleCompletions
from lit_dpo.callbacks.alone import alone
from lit_dpo.callbacks.completions import sample_completions
from test_writing import _full
from training import data, module, trainer

STRANGE = [
    r"solve \[x = 5\]",
    r"[INST] hi \[/INST] [/b] [red]not red[/red] :smile:",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \x08\x08 a\rb \x00 \u202eturned\u202c",
    "a\tb\nc",
    "é 漢字 🙂",
    "\ud800",
]


def _pairs(path: Path, prompts: list[str]) -> Path:
    rows = [{"prompt": prompt, "chosen": " yes", "rejected": " no"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _fit(model: Path, pairs, root: Path, *callbacks, **kwargs):
    """A run whose adapter is there in the end; what was said."""
    with tiny.records("lit_dpo") as found:
        run = trainer(root, callbacks=list(callbacks), max_steps=1, num_sanity_val_steps=0, **kwargs)
        run.fit(module(model), pairs)
    assert list(root.rglob("adapter/adapter_model.safetensors"))
    return [one.getMessage() for one in found if "goes on without it" in one.getMessage()]


@pytest.fixture
def stdout(monkeypatch):
    """A stream of bytes in an encoding, as standard output: `stdout(encoding)`, and then what was printed."""

    def replace(encoding: str) -> io.TextIOWrapper:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "200")
        return stream

    return replace


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_text_is_shown_as_it_is_in_any_encoding_and_steers_nothing(tiny_model, tmp_path, stdout, encoding):
    stream = stdout(encoding)
    # the lone surrogate is no text for a tokenizer: it stands in a label
    callback = SampleCompletions(prompts=9, shown=9, max_new_tokens=4, classify=lambda *_: "[/b]\x1b[1m\ud800")
    path = _pairs(tmp_path / "pairs.jsonl", STRANGE[:-1])
    assert _fit(tiny_model, data(path), tmp_path / "run", callback) == []
    shown = stream.buffer.getvalue().decode(encoding)
    for text in (r"\[x = 5\]", r"[INST] hi \[/INST] [/b] [red]not red[/red] :smile:", "[31mred[0m", "turned"):
        assert text in shown
    assert "share of [/b][1m? completions: 1.00 before, 1.00 after" in shown
    assert ("漢字" in shown) == (encoding == "utf-8")
    assert not [mark for mark in shown if mark != "\n" and (ord(mark) < 32 or 127 <= ord(mark) < 160)]
    assert "\u202e" not in shown
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_bytes().splitlines()]
    assert [row["prompt"] for row in rows] == STRANGE[:-1]


def _ascii() -> None:
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="ascii", errors="backslashreplace", closefd=False)  # noqa: SIM115


def test_the_command_ends_well_where_the_output_is_ascii(tiny_model, tmp_path):
    running = ranks.command(
        [
            *(
                "fit",
                f"--model.policy.model={tiny_model}",
                f"--data.train={_pairs(tmp_path / 'pairs.jsonl', STRANGE[:-1])}",
            ),
            *("--model.policy.quantization=none", "--trainer.callbacks=SampleCompletions", "--trainer.accelerator=cpu"),
            *("--trainer.max_steps=1", "--trainer.enable_progress_bar=false"),
        ],
        log=tmp_path / "log.txt",
        cwd=tmp_path,
        before=_ascii,
    )
    assert running.wait() == 0, running.output()
    assert r"\[/INST]" in running.output()
    assert "goes on without it" not in running.output()
    assert (tmp_path / "runs" / "version_0" / "adapter").is_dir()


def test_a_pad_token_that_the_model_has_not_is_not_used(tmp_path):
    model = tiny.directory(tmp_path / "model", "llama")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    assert tokenizer.pad_token_id == tiny.VOCABULARY
    tokenizer.save_pretrained(model)
    path = _pairs(tmp_path / "pairs.jsonl", ["a", "a longer prompt"])
    assert _fit(model, data(path), tmp_path / "run", SampleCompletions(max_new_tokens=20)) == []
    assert len((tmp_path / "run" / "completions.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["gpt2", "opt-projected"])
def test_a_prompt_keeps_its_end_where_the_context_is_short(tmp_path, name):
    model = tiny.directory(tmp_path / "model", name)
    path = _pairs(tmp_path / "pairs.jsonl", ["q" * 55, "short"])
    assert _fit(model, data(path), tmp_path / "run", SampleCompletions(max_new_tokens=40)) == []
    loaded, tokenizer = tiny.model(name), tiny.tokenizer()
    prompt = tokenizer("x" * 30 + "the end of a prompt 0123", add_special_tokens=False).input_ids
    for new in (40, 63, 500):
        kept = prompt[-(64 - min(new, 63)) :]
        asked = [
            sample_completions(loaded, tokenizer, [ids], max_new_tokens=min(new, 63 if ids == kept else new))
            for ids in (prompt, kept)
        ]
        assert asked[0] == asked[1]


def test_an_answer_ends_where_the_model_ended_it(tmp_path):
    """Rows that are done are filled up with a token that may mean something."""
    loaded, tokenizer = tiny.model("llama"), tiny.tokenizer()
    loaded.generation_config.eos_token_id = [5, *range(40, 90)]
    tokenizer.pad_token = tokenizer.eos_token = None
    prompts = [[10 + n] * 3 for n in range(8)]
    together = sample_completions(loaded, tokenizer, prompts, max_new_tokens=30, temperature=5.0)
    assert all(len(answer) < 30 for answer in together)
    assert "<pad>" not in "".join(together)


# --- alone -----------------------------------------------------------------------------------------------------------


class _BadLogger(CSVLogger):
    def log_hyperparams(self, params) -> None:
        if "lr" in params:
            raise RuntimeError("no room for a table")


class _BadLengths(PreferenceDataModule):
    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.largest_microbatches = lambda *limits: 1 / 0
        return loader


def _classify(prompt: str, answer: str) -> str:
    raise KeyError("a label of my own")


def test_each_of_what_only_shows_fails_alone_in_a_line(tiny_model, pairs_file, tmp_path):
    pairs = _BadLengths(train=str(pairs_file), val=str(pairs_file), batch_size=4)
    said = _fit(
        tiny_model,
        pairs,
        tmp_path,
        SampleCompletions(max_new_tokens=2, classify=_classify),
        logger=_BadLogger(tmp_path, name=""),
        val_check_interval=1,
        estimate=True,
    )
    assert [line.partition(" failed")[0] for line in said] == [
        "The list of hyper-parameters",
        "The estimate of a step's memory",
        "SampleCompletions",
    ]
    assert all("\n" not in line for line in said)
    assert "ZeroDivisionError: division by zero" in said[1]


def test_answers_that_cannot_be_written_or_asked_for_cost_nothing(tiny_model, pairs_file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with _full(tmp_path / "disk") as folder:
        (folder / "more").write_bytes(b"x" * 56 * 1024)
        export = AdapterExport(str(tmp_path / "elsewhere" / "adapter"))
        answers = SampleCompletions(max_new_tokens=2)
        (line,) = _fit(tiny_model, data(pairs_file), tmp_path / "elsewhere", export, answers, default_root_dir=folder)
        assert "The disk is full: make room" in line
        assert sorted(one.name for one in folder.iterdir()) == ["filler", "more"]
    (line,) = _fit(tiny_model, data(pairs_file), tmp_path / "two", SampleCompletions(max_new_tokens=-1))
    assert line.startswith("SampleCompletions failed")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_through(kind):
    with pytest.raises(kind), alone("x"):
        raise kind
    with alone("x"):
        raise MemoryError
