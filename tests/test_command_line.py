"""What the command says: help, mistakes, completion, and a run on terminals and in a file."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

import ranks
from lit_dpo import PreferenceDataModule
from lit_dpo.cli import main
from lit_dpo.commands import COMMANDS, FIRST, TOOLS, first_settings, overview
from lit_dpo.config_files import dotted_values, file_with
from lit_dpo.errors import LitDPOError
from lit_dpo.mistakes import explain
from lit_dpo.parser import _load, _no_value, _shared_arguments
from lit_dpo.shipped import described, files, folder, fragment
from lit_dpo.tools import configs
from lit_dpo.tools.completion import script
from swaps import command_parser, plain

MODEL = "--model.policy.model=x"
FILES = {
    "top.yaml": "modle:\n  policy: {model: x}\n",
    "promt.yaml": "model:\n  policy: {model: x}\ndata:\n  format: {class_path: Triples, init_args: {promt: q}}\n",
    "name.yaml": "model:\n  policy: {model: x}\n  loss: {class_path: IPOLos}\n",
    "outer.yaml": "model:\n  policy: {model: x}\n  loss: inner.yaml\n",
    "inner.yaml": "class_path: IPOLoss\ninit_args: {bta: 0.1}\n",
    "trainer.yaml": "model:\n  policy: {model: x}\ntrainer: {max_epoch: 3}\n",
    "list.yaml": "[1, 2]\n",
    "class.yaml": "class_path: IPOLos\n",
    "value.yaml": "class_path: SimPOLoss\ninit_args: {beta: 2.0, gamma: many}\n",
    "calls.yaml": "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: x, patiense: 3}\n",
    "deep.yaml": "[" * 999,
    "open.yaml": "model:\n  policy: {model: x}\n  loss: [\n",
}
TYPOS = [
    # options
    ("--modle.loss=IPOLoss", "no option `--modle.loss`: did you mean `--model.loss`?"),
    ("--data.batchsize=4", "PreferenceDataModule has no argument `--data.batchsize`: did you mean `--data.batch_size`"),
    ("--model.policy.rank=4", "LoRAPolicy has no argument `--model.policy.rank`: did you mean `--model.policy.r`?"),
    ("--model.policy.lora_alpha=4", "did you mean `--model.policy.alpha`?"),
    ("--trainer.max_epoch=4", "no option `--trainer.max_epoch`: did you mean `--trainer.max_epochs`"),
    ("--trainer.max_ep=4", "did you mean `--trainer.max_epochs`"),
    ("--seed=4", "did you mean `--seed_everything`?"),
    ("--cpkt_path=x", "did you mean `--ckpt_path`?"),
    ("--lr=1", "did you mean `--model.optimizer.lr`?"),
    ("--beta=1", "did you mean `--model.loss.beta`?"),
    ("--nothing.like.it=1", "no option `--nothing.like.it`: `--print_config` shows what there is."),
    ("stray", "Expected an option, which starts with --, but got 'stray'."),
    ("--model.loss.beta", "Expected a value after `--model.loss.beta`."),
    # arguments of a class
    ("--model.loss.bta=1", "DPOLoss has no argument `--model.loss.bta`: did you mean `--model.loss.beta`?"),
    ("--model.loss=SimPOLoss --model.loss.gama=1", "SimPOLoss has no argument `--model.loss.gama`"),
    ("--model.optimizer.learning_rate=1", "AdamW has no argument `--model.optimizer.learning_rate`: did you mean"),
    ("--trainer.logger.savedir=x", "did you mean `--trainer.logger.save_dir`?"),
    # classes
    (
        "--model.loss=IPOLos",
        "`--model.loss`: Expected a subclass of PreferenceLoss but got IPOLos: did you mean IPOLoss",
    ),
    ("--model.loss=ipo", "did you mean IPOLoss"),
    ("--model.reference=BaseRef", "did you mean BaseReference?"),
    ("--model.optimizer=AdamWW", "a subclass of Optimizer but got AdamWW: did you mean AdamW"),
    ("--model.optimizer=torch.optim.Adammw", "did you mean AdamW"),
    ("--trainer.callbacks+=EarlyStoping", "a subclass of Callback but got EarlyStoping: did you mean EarlyStopping"),
    ("--data.format=Triple", "did you mean Triples?"),
    ("--model=Nothing", "`--model`: Expected a subclass of LightningModule but got Nothing."),
    ("--model.optimizer=AdamW", "several AdamW: name it torch.optim.AdamW or bitsandbytes.optim.AdamW."),
    # values
    ("--model.lr_scheduler=linaer", "one of linear, cosine, constant, wsd or a subclass of LRScheduler but got linaer"),
    ("--model.policy.quantization=nf5", "to be one of nf4, int8, none but got nf5: did you mean nf4?"),
    ("--trainer.precision=bf16mixed", "but got bf16mixed: did you mean bf16-mixed"),
    ("--data.batch_size=four", "Expected `--data.batch_size` to be int but got four."),
    ("--model.optimizer=torch.optim.SGD --model.optimizer.lr=x", "`--model.optimizer.lr` to be float but got x"),
    (
        "--model.lr_scheduler=StepLR --model.lr_scheduler.gamma=x",
        "Expected `--model.lr_scheduler.gamma` to be float but got x.",
    ),
    # files
    ("--config=tpo.yaml", "There is no file tpo.yaml: did you mean top.yaml"),
    ("--model.loss=list.yaml", "list.yaml: Expected a class by `class_path` and `init_args`, but it holds no keys."),
    ("--model.loss=class.yaml", "class.yaml: Expected a subclass of PreferenceLoss but got IPOLos: did you mean"),
    ("--model.loss=value.yaml", "value.yaml: Expected `gamma` to be float but got many."),
    ("--config=calls.yaml", "calls.yaml: EarlyStopping has no argument `trainer.callbacks.init_args.patiense`"),
    ("--config=configs/losses/ipp.yaml", "no file configs/losses/ipp.yaml: did you mean configs/losses/ipo.yaml"),
    ("--model.loss=configs/losses/ipp.yaml", "no file configs/losses/ipp.yaml: did you mean configs/losses/ipo.yaml"),
    ("--config=top.yaml", "top.yaml: there is no key `modle.policy.model`: did you mean `model.policy.model`?"),
    ("--config=trainer.yaml", "trainer.yaml: there is no key `trainer.max_epoch`: did you mean `trainer.max_epochs`"),
    (
        "--config=promt.yaml",
        "promt.yaml: Triples has no argument `data.format.init_args.promt`: did you mean `prompt`?",
    ),
    ("--config=name.yaml", "name.yaml: Expected a subclass of PreferenceLoss but got IPOLos: did you mean IPOLoss"),
    ("--config=outer.yaml", "inner.yaml: IPOLoss has no argument `bta`: did you mean `beta`?"),
    ("--config=open.yaml", "open.yaml: line 4: Expected YAML"),
    ("--config=deep.yaml", "a configuration file that can be read, but it is nested too deep."),
    # what is missing
    ("--model.reference=ModelReference", "Expected `--model.reference.model` but it was not given."),
]


@pytest.mark.parametrize(("typed", "said"), TYPOS, ids=[typed for typed, _ in TYPOS])
def test_a_mistake_is_met_with_what_was_meant_in_two_lines_at_most(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command_parser().parse_args(["fit", MODEL, *typed.split()])
    assert stopped.value.code == 2
    first, *more = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("lit-dpo: error: ")
    assert said in first
    assert len(more) <= 1


class Unreadable:
    """One whose annotations name what is not there."""

    def __init__(self, words: Nowhere) -> None:  # noqa: F821
        """Take anything."""


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("Problems parsing config", ["--config=nowhere.yaml"]),
        ("Option 'x' is not accepted\nParser key \"model\"", []),
        ("Option 'x' is not accepted\nParser key \"model\": expects a function or a callable class", []),
        ('Parser key "model": Problem with given class_path \'a.B\'\nParser key "words": not as it should be', []),
        ('Parser key "model": Problem with given class_path \'a.B\'\nParser key "others": not as it should be', []),
        ("anything else", ["--x=1"]),
    ],
)
def test_a_message_of_no_known_kind_is_shown_as_it_is(message, typed):
    """Nothing is made up of it, nor of a class that cannot be looked into; and nothing stumbles."""
    assert explain(message, typed, {"a.B": Unreadable}.get) is None


def test_what_cannot_be_imported_shares_no_arguments_and_a_value_that_is_there_is_not_asked_for():
    assert _load("lit_dpo.nowhere.Class") == "lit_dpo.nowhere.Class"
    assert _shared_arguments("lit_dpo.nowhere.Class", PreferenceDataModule) == set()
    assert "val_split" in _shared_arguments(PreferenceDataModule, PreferenceDataModule)
    assert _no_value("--x: expected one argument", ["--x=1", "--y", "2"]) is None


def test_a_key_or_a_value_is_found_in_the_file_that_has_it(tmp_path):
    """In one that another names too, and behind one that cannot be read."""
    texts = {"bad": "a: [", "outer": "- {x: {y: inner.yaml}, z: gone.yaml}", "inner": "p: {q: [{r: worth}]}"}
    files = {name: tmp_path / f"{name}.yaml" for name in texts}
    for name, path in files.items():
        path.write_text(texts[name])
    typed = [f"--config={files['bad']}", "--config", str(files["outer"])]
    assert file_with("y", typed) == (str(files["outer"]), "x.y")
    assert file_with("r", typed) == (str(files["inner"]), "p.q.r")
    assert file_with("worth", typed, dotted_values) == (str(files["inner"]), "worth")
    assert file_with("s", typed) is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ablte", ": did you mean ablate"), ("Fit", ": did you mean fit"), ("zzz", ": `lit-dpo --help`")],
)
def test_an_unknown_command_gets_the_nearest(name, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name])
    assert stopped.value.code == 2
    assert f"There is no command {name}{meant}" in capsys.readouterr().err


# ---- help ----


def test_help_names_every_command_and_fits_a_terminal():
    text = overview()
    tools = {path.stem for path in Path(configs.__file__).parent.iterdir() if not path.stem.startswith("_")}
    tools = {name for name in tools if name in TOOLS}
    assert {"configs", "inspect", "completion"} <= tools
    for name, what in {**COMMANDS, **TOOLS}.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


def test_the_first_settings_have_the_defaults_that_the_parser_has():
    assert len(FIRST) == 20
    found = plain(command_parser().parse_args(["fit", "--model.policy.model=m", "--data.train=t"]).fit)
    model, data = found["model"]["init_args"], found["data"]["init_args"]
    rooms = {
        "model.policy.": model["policy"]["init_args"],
        "model.loss.": model["loss"]["init_args"],
        "model.optimizer.": model["optimizer"]["init_args"],
        "model.": model,
        "data.": data,
        "trainer.": found["trainer"],
        "": found,
    }
    for option, default, _ in FIRST:
        room = next(room for room in rooms if option.startswith(f"--{room}"))
        value = rooms[room][option.removeprefix(f"--{room}")]
        if isinstance(value, dict):
            value = value["class_path"].rpartition(".")[2]
        shown = {"m": "required", "t": "required", "None": "null"}.get(str(value), str(value))
        assert shown == default or (option == "--trainer.max_epochs" and value is None), option
    assert max(map(len, first_settings("fit").splitlines())) <= 130


def test_help_of_a_command_begins_with_the_first_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(first_settings("fit"))
    for wanted in ("--model.help", "--data.help", "--model.loss.help", "--trainer.limit_val_batches"):
        assert wanted in text


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("--model", "--model.lr_scheduler"),
        ("--data", "--data.truncation"),
        ("--model.loss", "--loss.beta"),
        ("--model.policy", "--policy.target_modules"),
    ],
)
def test_help_of_one_thing_is_that_of_its_class(option, argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"{option}.help"])
    assert stopped.value.code == 0
    assert argument in capsys.readouterr().out


# ---- what is shipped ----


def test_fragments_have_short_names_and_a_line_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ipo", "ipo.yaml", "losses/ipo.yaml", "configs/losses/ipo.yaml"):
        assert fragment("losses", name) == folder() / "losses" / "ipo.yaml"
    (tmp_path / "ipo.yaml").write_text("class_path: Mine\n")
    assert fragment("losses", "ipo.yaml") == Path("ipo.yaml"), "what is there comes first"
    assert fragment("references", "ema").name == "ema.yaml"
    with pytest.raises(LitDPOError, match=r"for losses but got 'simpro': did you mean simpo"):
        fragment("losses", "simpro")
    assert configs.named("quickstart") == folder() / "quickstart.yaml", "an experiment before a fragment"
    said = {file: described(file) for file in files()}
    assert all(len(line) > 10 and "\n" not in line for line in said.values())
    assert said[folder() / "losses" / "ipo.yaml"].startswith("Identity Preference Optimization (arXiv 2310.12036, eq.")


def test_a_file_is_described_by_its_comment_or_by_what_it_names(tmp_path):
    for text, said in (
        ("# Only a comment. And more.\n", "Only a comment."),
        ("class_path: lit_dpo.losses.Nowhere\n", "Nowhere"),
        ("a: 1\n", "a: 1"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        assert described(tmp_path / "a.yaml").rstrip(".") == said.rstrip(".")


def test_configs_lists_shows_and_names_what_is_meant(capsys):
    main(["configs"])
    assert re.search(r"^  losses/ipo.yaml +Identity Preference", capsys.readouterr().out, re.MULTILINE)
    main(["configs", "show", "ipo"])
    assert "class_path: lit_dpo.losses.IPOLoss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["configs", "show", "quikstart"])
    assert "did you mean quickstart" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    line = f"{sys.executable} -m lit_dpo configs | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")


# ---- completion ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lit-dpo", "ab"], {"ablate"}),
        (["lit-dpo", "f"], {"fit", "fork"}),
        (["lit-dpo", "fit", "--model.policy.q"], {"--model.policy.quantization"}),
        (["lit-dpo", "fit", "--model.loss", "configs/losses/ip"], {"configs/losses/ipo.yaml"}),
        (["lit-dpo", "fit", "--model.lr_scheduler", "co"], {"cosine", "constant"}),
        (["lit-dpo", "configs", "s"], {"show"}),
        (["lit-dpo", "configs", "show", "losses/ip"], {"losses/ipo"}),
        (["lit-dpo", "fit", "--config", "p"], {"pairs.yaml"}),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_bash_completes(words, expected, tmp_path):
    (tmp_path / "complete.sh").write_text(script("bash"))
    (tmp_path / "pairs.yaml").touch()
    asked = " ".join(f"'{word}'" for word in words)
    line = f"source complete.sh; COMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}; _lit_dpo; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert set(done.stdout.split()) == expected


def test_the_script_is_there_at_once_and_names_what_there_is():
    code = "import sys; from lit_dpo.cli import main; main(['completion', 'bash']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == script("bash") + "False\n"
    assert script("zsh").count("bashcompinit") >= 2
    for option, *_ in FIRST:
        assert re.search(rf"{option}[\s\"]", script("bash"))


# ---- a run, on a terminal and in a file ----


@pytest.fixture(scope="module")
def run(tiny_model, pairs_file, tmp_path_factory):
    """Runs the command; what was written, by the columns of the terminal, or by 0 to a file."""
    command = ["fit", f"--model.policy.model={tiny_model}"]
    command += ["--model.policy.quantization=none", f"--data.train={pairs_file}", f"--data.val={pairs_file}"]
    command += ["--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
    command += ["--trainer.val_check_interval=3", "--trainer.num_sanity_val_steps=0"]

    def made(columns):
        folder = tmp_path_factory.mktemp("run")
        if columns == 0:
            running = ranks.command(command, log=folder / "log.txt", cwd=folder)
            assert running.wait() == 0, running.output()
            return (folder / "log.txt").read_bytes()
        process, terminal = pty.fork()
        if process == 0:
            os.chdir(folder)
            os.environ.pop("COLUMNS", None)
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [sys.executable, "-m", "lit_dpo", *command])
        ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
        found, end = b"", time.monotonic() + 300
        while time.monotonic() < end:
            try:
                found += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, found.decode()
        return found

    return made


def test_a_piped_log_can_be_followed_and_is_text(run):
    """A line for each validation and epoch, with step, loss and accuracy; nothing drawn over, no colours."""
    text = run(0).decode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert "Loading weights" not in text
    assert "it/s" not in text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert [re.match(r"epoch (\d) of 2, step (\d+) of 12: ", line).groups() for line in lines] == [
        ("1", "3"),
        ("1", "6"),
        ("2", "9"),
        ("2", "12"),
    ]
    assert all("val/loss" in line and "val/reward_accuracy" in line for line in lines)
    assert all("train/loss" in line for line in lines[1:])
    assert all(re.search(r"; [\d.]+ (s|min) left$", line) for line in lines[:3])


def test_on_80_columns_the_last_bar_is_there_once_and_hides_no_line(run):
    """Rendered as a terminal does: cursor up, erase, carriage return."""
    screen = rendered(run(80), 80)
    bars = [number for number, line in enumerate(screen) if line.startswith("Epoch ")]
    assert len(bars) == 1
    assert len(screen) - bars[0] <= 2, "the last, on two lines"
    assert "accuracy" in " ".join(screen[bars[0] :])
    text = "".join(screen)
    for whole in ("`Trainer.fit` stopped: `max_epochs=2` reached.", "The trained adapter and its tokenizer are in"):
        assert text.count(whole) == 1


def rendered(raw: bytes, columns: int) -> list[str]:
    """What a terminal shows of it, without empty lines at the end: the few sequences that Rich and tqdm write."""
    screen, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]|\x1b", raw.decode()):
        if part.startswith("\x1b["):
            count, kind = part[2:-1], part[-1]
            if kind == "A":
                row = max(0, row - int(count or 1))
            elif kind == "K":
                screen[row] = "" if count == "2" else screen[row][:column]
            continue
        if part == "\r":
            column = 0
            continue
        if part == "\n" or column == columns:
            row, column = row + 1, 0 if part != "\n" else column
            screen += [""] * (row + 1 - len(screen))
            if part == "\n":
                continue
        line = screen[row].ljust(column)
        screen[row] = line[:column] + part + line[column + 1 :]
        column += 1
    while not screen[-1].strip():
        screen.pop()
    return screen
