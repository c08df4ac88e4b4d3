"""`lit-dpo inspect`: as a user types it, on real files; what it prints, writes, and ends with."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from browser import look
from lit_dpo.cli import main
from lit_dpo.data.doctor import KINDS
from lit_dpo.tools.inspect import CHAT_TEMPLATE
from lit_dpo.tools.reports.html import element, marked
from lit_dpo.tools.reports.record import visible

ROOT = Path(__file__).parents[1]
HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "]]></style></div></details><script>document.title='owned'</script>",
    "' onmouseover=alert(1) \" style=position:fixed &lt;b&gt; `code` `<b>`",
    "left \u202e thgir \u2066 isolate \u2028 line \u2029 paragraph",
    "nul \x00 escape \x1b[31m bell \x07 delete \x7f csi \x9b31m",
    "[bold red]markup[/] and [link=file:///etc/passwd]link[/link] \ufffd",
    "שלום, مرحبا، 你好 🇩🇪 👩‍👩‍👧 e\u0301",
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hostile(tmp_path):
    rows = [
        {"prompt": f"{text} {n}?", "chosen": f" {text} yes {n}", "rejected": f"no {text} {n} {text}"}
        for n, text in enumerate(HOSTILE * 2)
    ]
    return write(tmp_path / "<script>&'\u202e.jsonl", rows)


def inspect(capsys, *arguments: Any) -> str:
    main(["inspect", *map(str, arguments)])
    return capsys.readouterr().out


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


# ---- every real file, with nothing else ----

REAL = {
    "llamafactory-demo/dpo_en_demo.json": (300, {"duplicates": 5}),
    "llamafactory-demo/dpo_zh_demo.json": (300, {"duplicates": 11, "replacement-characters": 6}),
    "llamafactory-demo/v1_dpo_demo.jsonl": (10, {}),
    "hh-rlhf-harmless-base-test/test.jsonl.gz": (2308, {"empty-completions": 4, "early-parting": 5}),
    "rasbt-instruction-preference/instruction-data-with-preference.json": (1100, {"equal-sides": 6}),
    "finetuning-lab-tinystories/preference_pairs.jsonl": (113, {"repeated-prompts": 48}),
    "medicalgpt/dpo_zh_500.jsonl": (500, {"replacement-characters": 13}),
    "medicalgpt/toolcall_dpo_zh_demo.jsonl": (11, {}),
    "ps-llm-long-prompts/train.jsonl": (52, {}),
    "torchtune-tiny/hh_rlhf_tiny.json": (1, {}),
    "torchtune-tiny/stack_exchange_paired_tiny.json": (25, {"repeated-prompts": 17}),
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_file_with_nothing_else(shared, name, tmp_path, capsys):
    printed = inspect(capsys, "--data.train", shared / "data" / name, "--out", tmp_path)
    found = report(tmp_path)
    kept, counts = REAL[name]
    assert found["splits"][0]["kept"] == kept
    above = {one["name"]: one["count"] for one in found["findings"] if one["above"]}
    assert counts.items() <= above.items()
    assert all(finding in printed for finding in above)
    assert "lengths are in tokens of `lit-dpo/quickstart`" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_prompts_shared_with_val(shared, tmp_path, capsys):
    files = [shared / "data" / name for name in ("llamafactory-demo/dpo_zh_demo.json", "medicalgpt/dpo_zh_500.jsonl")]
    printed = inspect(capsys, "--data.train", files[0], "--data.val", files[1])
    assert "23 of 500 prompts of val are in train too" in printed


def test_the_columns_that_are_read(shared, capsys):
    file = shared / "data/rasbt-instruction-preference/instruction-data-with-preference.json"
    assert re.search(r"input\s+\(325\s+of\s+1,100\s+rows\)", inspect(capsys, "--data.train", file))


# ---- what a run would have ----


@pytest.fixture
def weightless(tiny_model, tmp_path):
    """A model's folder without its weights."""
    folder = tmp_path / "weightless"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_the_tokenizer_is_the_policys_and_no_weights_are_read(weightless, pairs_file, tmp_path, capsys):
    inspect(capsys, f"--model.policy.model={weightless}", f"--data.train={pairs_file}", "--out", tmp_path / "out")
    found = report(tmp_path / "out")
    assert (found["tokenizer"], found["notes"]) == (str(weightless), [])
    assert found["lengths"]["prompt"]["p100"] == len("How many are 20?")


def test_a_tokenizer_alone_and_its_limits(weightless, pairs_file, tmp_path, capsys):
    options = ("--data.tokenizer", weightless, "--data.train", pairs_file, "--data.max_length", 40, "--out", tmp_path)
    printed = inspect(capsys, *options)
    found = report(tmp_path)
    assert found["tokenizer"] == str(weightless)
    assert found["splits"][0]["dropped"] == {"longer than max_length=40": 5}
    assert "train: 5 dropped: longer than max_length=40" in printed
    assert "too-long" in printed


def test_without_a_tokenizer_a_limit_holds_only_if_it_is_typed(tmp_path, capsys):
    row = {"prompt": "Why?", "chosen": " So." * 1000, "rejected": " No, it is not so."}
    file = write(tmp_path / "long.jsonl", [row, {**row, "chosen": " So, and not otherwise."}])
    assert "no row is dropped for its length" in inspect(capsys, "--data.train", file)
    printed = inspect(capsys, "--data.train", file, "--data.max_length", 1000)
    assert "1 dropped: longer than max_length=1000" in printed
    assert "no row is dropped for its length" not in printed


def test_conversations_without_a_template_are_looked_at_and_a_note_says_that_a_run_refuses_them(
    weightless, tmp_path, capsys
):
    """Again, too: what was encoded with our template is not in the cache of a tokenizer without one."""
    text = (ROOT / "tests/data/layouts/sharegpt_tools.jsonl").read_text().replace("Add", f"Add {tmp_path.name}")
    (tmp_path / "rows.jsonl").write_text(text)
    options = ("--data.tokenizer", weightless, "--data.train", tmp_path / "rows.jsonl", "--out", tmp_path)
    for _ in range(2):
        inspect(capsys, *options)
        (note,) = report(tmp_path)["notes"]
    assert (
        note == "the tokenizer has no chat template: conversations are rendered as ChatML here, and `fit` refuses them"
    )


@pytest.mark.parametrize("config", ["configs/quickstart.yaml", "configs/opt-350m.yaml"])
def test_a_file_of_a_run_is_accepted_and_what_is_typed_holds(config, weightless, pairs_file, tmp_path, capsys):
    typed = ("--data.train", pairs_file, "--model.policy.model", weightless, "--config", ROOT / config)
    inspect(capsys, *typed, "--data.val", pairs_file, "--out", tmp_path)
    found = report(tmp_path)
    assert (found["data"], found["tokenizer"]) == (str(pairs_file), str(weightless))
    assert found["epochs"] == 3
    assert found["steps"] == {"configs/quickstart.yaml": 9, "configs/opt-350m.yaml": 18}[config]


def test_the_configuration_that_a_run_leaves_is_accepted(tiny_model, pairs_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--model.policy.model={tiny_model}", "--model.policy.quantization=none", f"--data.train={pairs_file}"]
    main(["fit", *options, "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    capsys.readouterr()
    inspect(capsys, "--config", "runs/version_0/config.yaml", "--out", "report")
    assert report(tmp_path / "report")["steps"] == 1


def test_memory_and_hours_come_from_the_plan(weightless, pairs_file, tmp_path, capsys):
    options = ("--data.train", pairs_file, "--trainer.max_epochs", 2, "--plan", "H100", "--out", tmp_path)
    few = ("--model.policy.target_modules", "[q_proj]")
    inspect(capsys, "--model.policy.model", weightless, "--model.policy.quantization", "none", *few, *options)
    assert "H100" in report(tmp_path)["plan"]
    inspect(capsys, *options)
    assert report(tmp_path)["plan"] == "needs a model: give `--model.policy.model`"


# ---- ends ----


def test_strict_ends_with_1_if_a_finding_is_above_its_threshold(tmp_path, capsys):
    row = {"prompt": "Why?", "chosen": " It is so.", "rejected": " It is not."}
    file = write(tmp_path / "rows.jsonl", [row, {**row, "prompt": "How?", "chosen": " By the way."}, row])
    options = ("--data.train", file, "--strict", "--thresholds.repeated-prompts", 0.5)
    with pytest.raises(SystemExit) as stopped:
        inspect(capsys, *options)
    assert stopped.value.code == 1
    assert "Above the threshold: duplicates" in capsys.readouterr().out
    rest = ("--thresholds.both-roles", 1, "--thresholds.frequent-completions", 1)
    inspect(capsys, *options, *rest, "--thresholds.duplicates", 0.4)
    inspect(capsys, *options, *rest, "--data.deduplicate", "true")
    inspect(capsys, *options[:2])


def test_bad_rows_are_counted_and_a_stream_is_read(tmp_path, capsys):
    """A run would stop at the first, or at all of them; whoever asks what is wrong wants to see the others too."""
    file = tmp_path / "rows.jsonl"
    right = json.dumps({"prompt": "Why?", "chosen": " So.", "rejected": " No."})
    file.write_text(f'{right}\n{{"prompt": "Why?", "chosen": "", "rejected": "b"}}\n{{oops\n')
    inspect(capsys, "--data.train", file, "--data.streaming", "true", "--out", tmp_path)
    found = report(tmp_path)
    (bad,) = (one for one in found["findings"] if one["name"] == "bad-rows")
    assert (bad["count"], bad["of"], bad["above"]) == (2, 3, True)
    assert "line 3 is no JSON" in json.dumps(bad["examples"])
    assert "what a run would stream is read as a table, to its end" in found["notes"]


def test_mistakes_are_sentences(tmp_path, capsys):
    def refused(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *map(str, arguments)])
        assert stopped.value.code in (1, 2)
        return capsys.readouterr().err

    file = write(tmp_path / "rows.jsonl", [{"prompt": "Why?", "chosen": " So.", "rejected": " No."}])
    assert "Expected training data but `train` is not set: name a file with `--data.train`." in refused()
    assert "Expected the name of a finding, one of bad-rows" in refused("--data.train", file, "--thresholds.dupes", 1)
    assert "File not found" in refused("--data.train", tmp_path / "none.jsonl")
    assert "Expected `max_length` >= 2" in refused("--data.train", file, "--data.max_length", 1)
    (tmp_path / "file").write_text("")
    assert "A file is in the way" in refused("--data.train", file, "--out", tmp_path / "file" / "report")


def test_without_the_library_near_duplicates_are_not_looked_for_and_a_note_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasketch", None)  # as if it were not installed
    file = write(tmp_path / "rows.jsonl", [{"prompt": "Why?", "chosen": " So.", "rejected": " No."}])
    inspect(capsys, "--data.train", file, "--out", tmp_path)
    found = report(tmp_path)
    assert "near duplicates were not looked for" in found["notes"][-1]
    assert "pip install 'lit_dpo[inspect]'" in found["notes"][-1]
    assert "near-duplicates" not in {one["name"] for one in found["findings"]}


def test_the_documents_name_every_finding_with_its_threshold():
    page = (ROOT / "docs" / "inspect.md").read_text()
    for kind in KINDS.values():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind.name}`")]
        assert f"| {100 * kind.threshold:g} % |" in row, kind.name


def test_every_option_that_a_remedy_names_is_one():
    from lit_dpo import losses
    from lit_dpo.data.datamodule import PreferenceDataModule
    from lit_dpo.data.formats import Triples

    data = PreferenceDataModule.__init__.__annotations__
    fields = Triples.__dataclass_fields__
    for kind in KINDS.values():
        for option in re.findall(r"`--data\.([\w.]+)", kind.remedy):
            assert option in data or option.removeprefix("format.") in fields, option
        for loss in re.findall(r"\b([A-Z]\w+Loss)\b", kind.remedy):
            assert loss in losses.__all__, loss


# ---- the start of a run ----


def test_a_run_says_it_once_and_briefly(tiny_model, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "Why?", "chosen": " It is so.", "rejected": " It is not."}
    others = [{**row, "prompt": f"Why {n}?", "chosen": f" {n}" + " so" * (n % 5)} for n in range(12)]
    file = write(
        tmp_path / "rows.jsonl", [row, row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}, *others]
    )
    options = [f"--model.policy.model={tiny_model}", "--model.policy.quantization=none", f"--data.train={file}"]
    with caplog.at_level(logging.INFO):
        main(["fit", *options, "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.logger=false"])
    said = [one.getMessage() for one in caplog.records if one.name == "lit_dpo.data.reports"]
    assert said[0].startswith("train: 1 of 15 rows say what an earlier row says (6.7 %). `--data.deduplicate true`")
    assert len(said) == len({*said}) <= 6
    assert said[-1] == "train: `lit-dpo inspect`, with the same options, shows which rows, and more."


# ---- hostile text ----


class Elements(HTMLParser):
    """The elements of a page, and the attributes that they have."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)


def test_hostile_text_is_text(hostile, tmp_path, capsys):
    printed = inspect(capsys, "--data.train", hostile, "--out", tmp_path / "out", "--examples", 16)
    page = (tmp_path / "out" / "report.html").read_text()
    elements = Elements(page)
    assert elements.open == []
    assert not elements.tags & {"script", "img", "link", "iframe", "object", "base"}
    assert not [name for name in elements.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;" in page
    for text in (page, printed):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)
        assert "[bold red]markup[/]" in text
    assert r"nul \x00 escape \x1b[31m bell \x07" in page
    assert "👩‍👩‍👧" in page
    assert report(tmp_path / "out")["splits"][0]["kept"] == 16


def test_elements_escape_what_is_text():
    assert element("p", '<&>"', title="\"'<").source == '<p title="&quot;&#x27;&lt;">&lt;&amp;&gt;&quot;</p>'
    assert marked("a `<b>` c").source == "a <code>&lt;b&gt;</code> c"
    assert visible("a\tb\nc\rd") == "a\tb\nc\\rd"


def test_the_template_renders_all_of_a_conversation():
    from lit_dpo.quickstart import quickstart_tokenizer

    tokenizer = quickstart_tokenizer()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "S1"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": None, "reasoning_content": "R1", "tool_calls": [call]},
        {"role": "tool", "content": "T1"},
    ]
    text = tokenizer.apply_chat_template(
        turns, tools=[call], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    for part in ("S1", "U1", "R1", "T1", '"add"', "<|im_start|>tools"):
        assert part in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_page_in_a_browser(hostile, tmp_path, capsys):
    """It fits, and nothing of the data runs."""
    inspect(capsys, "--data.train", hostile, "--out", tmp_path / "out", "--examples", 8)
    page = (tmp_path / "out" / "report.html").read_text()
    measured = """
        cut: [...inside.querySelectorAll("h1, h2, p, .tile, .card")].filter((one) => right(one) > width).length,
        plots: [...inside.querySelectorAll("svg")].filter((one) => one.getBoundingClientRect().width < 100).length,
        shown: inside.body.innerText.length > 3000"""
    for seen in look([(page, 1200), (page, 390)], tmp_path, measured):
        assert "owned" not in (seen["title"], seen["own"])
        assert (seen["fits"], seen["cut"], seen["plots"], seen["scripts"], seen["shown"]) == (True, 0, 0, 0, True)
