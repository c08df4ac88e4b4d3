"""Completions on the way: a run that shows them is the same run, and what is shown is what the models say."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from lit_dpo import CachedReference
from lit_dpo.callbacks import LastCheckpoint, SampleCompletions
from lit_dpo.callbacks.completions import left_as_it_is, sample_completions
from lit_dpo.callbacks.texts import markdown_table
from lit_dpo.errors import TrainingError
from lit_dpo.losses import SimPOLoss
from lit_dpo.references import NoReference
from training import Trace, adapter, data, trainer
from training import light as module


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(model, pairs, root, *callbacks, ckpt_path=None, loggers=(), **kwargs):
    trace = Trace()
    logger = [CSVLogger(root, name="", version="csv"), *loggers]
    run = trainer(
        root, callbacks=[trace, *callbacks], logger=logger, num_sanity_val_steps=0, val_check_interval=3, **kwargs
    )
    dpo = module(model, lr=0.2, policy={"dropout": 0.2})
    run.fit(dpo, data(pairs, val=str(pairs)), ckpt_path=ckpt_path, weights_only=False)
    return adapter(dpo), trace, (root / "csv" / "metrics.csv").read_text(), dpo


@pytest.fixture(scope="module")
def plain(tiny_model, pairs_file, tmp_path_factory):
    """A run of 12 steps with dropout, without completions."""
    return _run(tiny_model, pairs_file, tmp_path_factory.mktemp("plain"), max_epochs=2)


@pytest.fixture(scope="module")
def sampled(tiny_model, pairs_file, tmp_path_factory):
    """The same run, with completions every second step and every epoch, and a checkpoint after step 5."""
    root = tmp_path_factory.mktemp("sampled")
    callback = SampleCompletions(
        prompts=3, max_new_tokens=24, every_n_steps=2, every_n_epochs=1, temperature=2.0, seed=5
    )
    board = TensorBoardLogger(root, name="board", version="")
    found = _run(
        tiny_model, pairs_file, root, callback, LastCheckpoint(5, directory=str(root / "kept")), max_epochs=2,
        loggers=[board], limit_train_batches=6,
    )  # fmt: skip
    return root, callback, found


def test_a_run_that_shows_completions_is_the_same_run_to_the_last_bit(plain, sampled):
    weights, trace, rows, _ = sampled[2]
    assert trace.rows == plain[1].rows
    assert trace.losses == plain[1].losses
    assert rows == plain[2]
    torch.testing.assert_close(weights, plain[0], rtol=0, atol=0)


def test_so_is_one_that_goes_on_in_between(tiny_model, pairs_file, tmp_path, plain):
    callback = SampleCompletions(prompts=2, max_new_tokens=3, every_n_steps=2)
    kept = LastCheckpoint(directory=str(tmp_path / "kept"))
    _run(tiny_model, pairs_file, tmp_path / "one", callback, kept, max_steps=5, max_epochs=-1)
    again = SampleCompletions(prompts=2, max_new_tokens=3, every_n_steps=2)
    path = str(tmp_path / "kept" / "last.ckpt")
    weights, trace, _, _ = _run(tiny_model, pairs_file, tmp_path / "two", again, ckpt_path=path, max_epochs=2)
    assert trace.losses == plain[1].losses[5:]
    torch.testing.assert_close(weights, plain[0], rtol=0, atol=0)
    steps = [row["step"] for row in _rows(tmp_path / "two" / "csv" / "completions.jsonl")]
    assert list(dict.fromkeys(steps)) == [5, 6, 8, 10, 12]


def test_the_file_says_what_the_policy_and_the_reference_say_at_each_step(sampled, tiny_model):
    root, callback, (_, _, _, dpo) = sampled
    rows = _rows(root / "csv" / "completions.jsonl")
    assert list(dict.fromkeys(row["step"] for row in rows)) == [0, 2, 4, 6, 8, 10, 12]
    assert all(list(row) == ["step", "prompt", "completion", "reference"] for row in rows)
    first, last = rows[:3], rows[-3:]
    # a fresh adapter does nothing, and both are drawn with the same numbers
    assert [row["completion"] for row in first] == [row["reference"] for row in first]
    assert [row["reference"] for row in last] == [row["reference"] for row in first]
    tokenizer = dpo.policy.load_tokenizer()
    ids = [tokenizer(row["prompt"]).input_ids for row in last]
    given = {"max_new_tokens": 24, "temperature": 2.0, "seed": 5}
    assert [row["completion"] for row in last] == sample_completions(dpo.model, tokenizer, ids, **given)
    assert [row["completion"] for row in last] != [row["reference"] for row in last]
    assert callback.lengths[12] == sum(len(row["completion"]) for row in last) / 3


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells = []

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "thead", "tbody", "tr", "th", "td", "br")
        if tag in ("th", "td"):
            self.cells.append("")
        elif tag == "br":
            self.cells[-1] += "\n"

    def handle_data(self, found):
        if self.cells and found.strip():
            self.cells[-1] += found


def _seen(markdown):
    """What TensorBoard shows of it."""
    parser = _Cells()
    parser.feed(markdown_to_safe_html(markdown))
    return parser.cells


def test_a_logger_that_takes_text_shows_each_completion_as_it_is(sampled):
    root, _, _ = sampled
    board = EventAccumulator(str(root / "board")).Reload()
    events = board.Tensors("completions/text_summary")
    assert [event.step for event in events] == [2, 4, 6, 8, 10, 12]
    cells = _seen(events[0].tensor_proto.string_val[0].decode())
    rows = [row for row in _rows(root / "csv" / "completions.jsonl") if row["step"] == 2]
    assert cells[:3] == ["prompt", "reference", "after 2 steps"]
    assert cells[3] == rows[0]["prompt"]
    texts = [
        "| *a* __b__ <b>c</b> `d` ~~e~~ [f](g) \\|",
        "# h\n- i\n\n1. j",
        "&lt; <script>k</script> http://l.m $n$",
        "é漢🙂",
    ]
    assert _seen(markdown_table(["x"], [[text] for text in texts])) == ["x", *texts]


def test_prompts_of_ones_own(tiny_model, pairs_file, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("How many?\n\nWhy?\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How many?"}\n{"prompt": "Why?"}\n')
    for given in (["How many?", "Why?"], str(tmp_path / "lines.txt"), str(tmp_path / "rows.jsonl")):
        assert SampleCompletions(given).prompts == ["How many?", "Why?"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    for given, said in (("none.txt", "none.txt"), (str(tmp_path / "bad.jsonl"), "line 2"), (0, "at least one")):
        with pytest.raises(TrainingError, match=said):
            SampleCompletions(given)
    callbacks = [SampleCompletions(given, max_new_tokens=3) for given in (["How many?", "Why?"], ["What?"])]
    run = trainer(tmp_path, callbacks=callbacks, max_steps=1)
    run.fit(module(tiny_model), train_dataloaders=_loader(pairs_file))
    assert [row["prompt"] for row in _rows(tmp_path / "completions.jsonl")] == ["How many?", "Why?"]
    assert [row["prompt"] for row in _rows(tmp_path / "completions-2.jsonl")] == ["What?"]
    assert "prompt" in capsys.readouterr().out


def _loader(pairs):
    from torch.utils.data import DataLoader

    from lit_dpo.data.batch import EncodedPrompt, collate

    return DataLoader([EncodedPrompt([1, 5], [[6, 7], [8]])] * 4, batch_size=2, collate_fn=collate)


@pytest.mark.parametrize("kind", ["none", "cached"])
def test_a_reference_that_runs_no_model_is_left_out_or_is_what_it_remembers(tiny_model, pairs_file, tmp_path, kind):
    given = {"loss": SimPOLoss(), "reference": NoReference()} if kind == "none" else {
        "reference": CachedReference(directory=str(tmp_path / "cache"))
    }  # fmt: skip
    callback = SampleCompletions(prompts=1, max_new_tokens=3, every_n_epochs=1)
    trainer(tmp_path, callbacks=[callback], max_steps=1).fit(module(tiny_model, **given), data(pairs_file))
    first = _rows(tmp_path / "completions.jsonl")[0]
    assert first["reference"] == (None if kind == "none" else first["completion"])


def test_random_states_and_modes_are_given_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())

    def states():
        return torch.rand(1).item(), random.random(), np.random.rand(), [part.training for part in model.modules()]

    def seed():
        torch.manual_seed(1), random.seed(1), np.random.seed(1)

    seed()
    expected = states()
    seed()

    def fail():
        with left_as_it_is(model, torch.device("cpu")):
            model.eval()
            states()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert states() == expected
