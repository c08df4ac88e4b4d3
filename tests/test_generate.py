"""`lit-dpo generate`: what it says is what transformers says of the same weights, from whatever users have."""

from __future__ import annotations

import io
import json
import re
import signal

import pytest
from transformers import pipeline

from lit_dpo.cli import main
from lit_dpo.quickstart import quickstart_directory
from lit_dpo.tools.generate.completing import Completer

ASKED = ["What is rain?", "What is DNA?", "Where do bees live, and why?"]
LAST = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}


def generate(capsys, *args):
    """What is printed."""
    main(["generate", *map(str, args)])
    return capsys.readouterr().out


def typed(*prompts):
    return [word for prompt in prompts for word in ("--prompt", prompt)]


@pytest.fixture(scope="module")
def by_transformers(quickstart_run):
    """Greedy completions by `pipeline`: of the texts, and of the same as a user's messages."""
    speaks = pipeline("text-generation", model=str(quickstart_run / "adapter"))
    texts = [speaks(text, **LAST)[0]["generated_text"] for text in ASKED]
    talks = [speaks([{"role": "user", "content": text}], **LAST)[0]["generated_text"] for text in ASKED]
    base = pipeline("text-generation", model=str(quickstart_directory() / "model"))
    before = [base([{"role": "user", "content": text}], **LAST)[0]["generated_text"] for text in ASKED]
    return texts, talks, before


SHORT = ("--max_new_tokens", 6)
GREEDY = ("--greedy", "--max_new_tokens", 12, "--quantization", "none")


def test_texts_are_completed_as_by_the_pipeline_of_transformers(quickstart_run, by_transformers, capsys):
    """A run of conversations takes them for a user's messages, as it was trained, unless it is told not to."""
    for number, how in enumerate((["--no-messages"], [])):
        out = generate(capsys, quickstart_run / "adapter", *typed(*ASKED), *how, *GREEDY)
        said = re.split(r"^# .*\n", out, flags=re.MULTILINE)[1:]
        assert [one.strip() for one in said] == [text.strip() for text in by_transformers[number]]


def test_the_built_in_model_says_what_it_says_in_transformers(quickstart, by_transformers, capsys):
    for name in ("lit-dpo/quickstart", quickstart / "model"):
        said = generate(capsys, name, *typed(ASKED[0]), "--messages", "--greedy", "--max_new_tokens", 12)
        assert said.strip() == by_transformers[2][0].strip()


def test_a_file_of_messages_and_the_reference_beside(quickstart_run, by_transformers, capsys, tmp_path):
    """In batches, and from the checkpoint: the same adapter."""
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ASKED]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (checkpoint,) = (quickstart_run / "checkpoints").glob("*.ckpt")
    out = tmp_path / "said.jsonl"
    shown = generate(
        capsys, checkpoint, "--file", tmp_path / "prompts.jsonl", "--compare", "--out", out, "--batch_size", 2, *GREEDY
    )
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in said] == [row["prompt"] for row in rows]
    assert [row["completion"] for row in said] == by_transformers[1]
    assert [row["reference"] for row in said] == by_transformers[2]
    assert by_transformers[1] != by_transformers[2]
    assert all(row[side].strip() in shown for row in said for side in ("completion", "reference"))


def test_a_run_is_quantised_as_it_was_trained(quickstart_run, capsys):
    """Its own NF4, from the adapter's record and from the checkpoint; a choice of one's own is another model."""
    asked = [*typed(*ASKED), "--messages", "--max_new_tokens", 24, "--temperature", 3.0, "--seed", 5]
    (checkpoint,) = (quickstart_run / "checkpoints").glob("*.ckpt")
    by_run, by_file, plain = (
        generate(capsys, *one, *asked)
        for one in ([quickstart_run], [checkpoint], [quickstart_run, "--quantization", "none"])
    )
    assert by_run == by_file
    assert by_run != plain


@pytest.mark.parametrize(
    "lines", [f"{ASKED[0]}\n/reset\n{ASKED[1]}\n/exit\nnever", f"{ASKED[0]}\n\n/reset\n{ASKED[1]}"]
)
def test_a_conversation_begins_anew(quickstart_run, by_transformers, capsys, monkeypatch, lines):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    out = generate(capsys, quickstart_run, "--chat", *GREEDY)
    assert out.splitlines() == [text.strip() for text in by_transformers[1][:2]]


def test_a_conversation_is_remembered_and_does_not_outgrow_the_context(quickstart_run, capsys, monkeypatch):
    """The third turn sees the first two; one that does not fit leaves it as it was."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED[0]}\n{'long ' * 300}\n{ASKED[1]}\n/help\n"))
    folder = quickstart_run / "adapter"
    first, refused, second, unknown = generate(capsys, folder, "--chat", *GREEDY, "--seed", 1).splitlines()
    assert "model's context, 256" in refused
    assert "/help is no command" in unknown
    speaks = pipeline("text-generation", model=str(folder))
    talk = [
        {"role": "user", "content": ASKED[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": ASKED[1]},
    ]
    assert second == speaks(talk, **LAST)[0]["generated_text"].strip()


def test_a_template_of_ones_own_is_what_the_text_that_it_makes_is(quickstart, capsys, tmp_path):
    """With arguments of its own; and a text that is completed as it is says that there are messages too."""
    template = tmp_path / "mine.jinja"
    template.write_text("{{ mark }}{{ messages[0].content }}")
    rows = [{"prompt": ASKED[0]}, {"prompt": [{"role": "user", "content": ASKED[0]}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    how = ["--chat_template", template, "--chat_template_kwargs", '{"mark": "Q: "}', "--messages"]
    model = "lit-dpo/quickstart"
    by_template = generate(capsys, model, "--file", tmp_path / "prompts.jsonl", *how, "--greedy", *SHORT)
    as_it_is = generate(capsys, model, "--prompt", f"Q: {ASKED[0]}", "--greedy", *SHORT)
    assert by_template.partition("\n")[2] == as_it_is
    with pytest.raises(SystemExit) as stop:
        main(["generate", model, "--prompt", "a", "--chat_template_kwargs", "[1]"])
    assert stop.value.code == 2


class Typed(io.StringIO):
    """A terminal: what is typed comes line by line."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_spoken_to_and_ctrl_c_ends_a_completion_alone(quickstart_run, capsys, monkeypatch):
    """The conversation goes on as if what was stopped had not been said; Ctrl-D ends it. Both sides are named."""
    complete, count = Completer.complete, 0

    def stopped_once(self, *args):
        nonlocal count
        count += 1
        if count == 3:  # of the second turn, the first side
            signal.raise_signal(signal.SIGINT)
        return complete(self, *args)

    monkeypatch.setattr(Completer, "complete", stopped_once)
    monkeypatch.setattr("sys.stdin", Typed(f"{ASKED[0]}\n{ASKED[1]}\n/reset\n{ASKED[0]}\n"))
    said = generate(capsys, quickstart_run, "--chat", "--compare", "--greedy", *SHORT, "--quantization", "none")
    assert said.startswith("/reset begins a new conversation, /exit or Ctrl-D ends")
    before, stopped, after = said.partition("(stopped; the conversation is as it was)")
    assert stopped
    policy, reference = (before.split(f"[{side}]\n")[1].split("\n")[0] for side in ("policy", "reference"))
    assert f"[policy]\n{policy}\n[reference]\n{reference}\n" in after


def test_what_steers_a_terminal_is_not_printed(tiny_model, capsys, tmp_path):
    """A random model says any byte, and a prompt may hold any; the file has all of them."""
    hostile = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
    asked = ["red \x1b[31m\u202e?", "more", "and more", "\x07"]
    (tmp_path / "prompts.txt").write_text("\n".join(asked) + "\n\n")
    for how in (["--file", tmp_path / "prompts.txt"], typed(*asked)):
        out = tmp_path / f"{how[0]}.jsonl"
        shown = generate(capsys, tiny_model, *how, "--max_new_tokens", 60, "--do_sample", "--out", out)
        said = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in said] == asked
        assert any(hostile.search(row["completion"]) for row in said)
        assert "# red [31m?" in shown
        assert not hostile.search(shown)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "Expected `--prompt TEXT`, `--file FILE` or `--chat`"),
        (["--prompt", "a", "--greedy", "--top_p", "0.5"], "`--top_p` has no effect with `--greedy`"),
        (["--prompt", "a", "--temperature", "0"], "Expected `--temperature` > 0 (`--greedy` for none) but got 0.0"),
        (["--prompt", "a", "--batch_size", "2"], "`--batch_size` has no effect without `--file`"),
        (["--chat", "--out", "a.jsonl"], "`--out` has no effect with `--chat`"),
        (["--prompt", "a", "--compare"], "`--compare` needs an adapter"),
        (["--prompt", "a" * 600], "Expected prompt 1 to have fewer tokens than the model's context, 512"),
        (["--chat"], "Expected a tokenizer with a chat template"),
        (["--file", "no.jsonl"], "no.jsonl"),
        (["--file", "a.txt", "--batch_size", "0"], "Expected `--batch_size` >= 1 but got 0"),
        (["--prompt", "a", "--chat_template", "no.jinja"], "Expected a file in `--chat_template` but no.jinja"),
        (["--prompt", "a", "--device", "tpu9"], "Expected `--device` to be a device"),
        (["--prompt", "a", "--base", "b"], "`--base` has no effect on a whole model"),
    ],
)
def test_refusals(tiny_model, capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(tiny_model), *args])
    assert stop.value.code == 1
    assert said in capsys.readouterr().err
