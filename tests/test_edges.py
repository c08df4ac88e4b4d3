"""A value beyond its edge is refused by name, with what came; the value at the edge is taken."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_dpo import AdapterReference, DPOModule, EMAReference, LoRAPolicy, NoReference
from lit_dpo.callbacks import HealthMonitor, LastCheckpoint, SampleCompletions, TrainingHealth
from lit_dpo.callbacks.texts import prompts_of_file
from lit_dpo.cli import main
from lit_dpo.errors import AblationError, LitDPOError
from lit_dpo.logps import Field
from lit_dpo.losses import MixtureLoss, checks
from lit_dpo.plan.cards import card
from lit_dpo.references.base import Reference
from lit_dpo.schedules import check_schedule
from lit_dpo.shipped import fragment
from lit_dpo.tools import audit, export, generate
from lit_dpo.tools.ablate import run as run_once
from lit_dpo.tools.ablate import running
from lit_dpo.tools.ablate.axes import axis, from_file, typed
from lit_dpo.tools.ablate.configuring import check_places
from lit_dpo.tools.ablate.measuring import judge_of
from lit_dpo.tools.ablate.records import Layout
from lit_dpo.tools.generate.prompts import Prompt, encode, read_prompts
from lit_dpo.tools.measures.judges import RewardModelJudge
from lit_dpo.tools.measures.statistics import t_cdf, t_quantile
from toy_tokenizers import byte_level
from training import data, module, trainer

policy = functools.partial(LoRAPolicy, "x")
typed_audit, typed_export = (
    functools.partial(lambda main, *words: main(list(words)), one.main) for one in (audit, export)
)


def typed_generate(*words):
    generate.main(["x", *words])


REFUSED = {
    "completions every 0 steps": (lambda: SampleCompletions(every_n_steps=0), "`every_n_steps` >= 1 but got 0"),
    "completions every 0 epochs": (lambda: SampleCompletions(every_n_epochs=0), "`every_n_epochs` >= 1 but got 0"),
    "completions of no prompt": (lambda: SampleCompletions(prompts=[]), r"`prompts` to be at least one but got \[\]"),
    "health": (lambda: TrainingHealth("keep"), "`nonfinite` to be stop or skip but got 'keep'"),
    "last, minutes": (lambda: LastCheckpoint(every_n_minutes=0.0), "`every_n_minutes` > 0 but got 0.0"),
    "monitor, finding": (lambda: HealthMonitor(on_finding="x"), "`on_finding` to be warn or stop but got 'x'"),
    "monitor, patience": (lambda: HealthMonitor(patience=0), "`patience` >= 1 but got 0"),
    "monitor, rules": (lambda: HealthMonitor(ignore=["x"]), "`ignore` to name rules, of .*, but got 'x'"),
    "mixture": (lambda: MixtureLoss(losses=[]), "`losses` to name at least one loss"),
    "card": (lambda: card("abacus"), "`--plan` to be `here` or one of .*H100.*, but got 'abacus'|but got 'abacus'"),
    "rank": (lambda: policy(r=0), "`r` >= 1.* but got r=0"),
    "alpha": (lambda: policy(alpha=0), "`alpha` > 0 .* but got .*alpha=0"),
    "dropout": (lambda: policy(dropout=1.0), r"`dropout` in \[0, 1\) but got .*dropout=1.0"),
    "negative dropout": (lambda: policy(dropout=-0.1), r"`dropout` in \[0, 1\) but got .*dropout=-0.1"),
    "choice": (lambda: policy(quantization="nf5"), "`quantization` among nf4, int8, none but got 'nf5'"),
    "moving by 0": (lambda: EMAReference(0.0), r"`reference.alpha` in \(0, 1\] but got 0.0"),
    "moving by more than all": (lambda: EMAReference(1.1), r"`reference.alpha` in \(0, 1\] but got 1.1"),
    "moving every 0": (lambda: EMAReference(1.0, 0), "`reference.every` >= 1 but got 0"),
    "warm-up": (lambda: check_schedule("linear", 1.1), r"`warmup_ratio` in \[0, 1\] but got 1.1"),
    "cooling": (lambda: check_schedule("cosine", 0.0, 1.0), r"`min_lr_ratio` in \[0, 1\) but got 1.0"),
    "fragment": (lambda: fragment("losses", "ipp"), "for losses but got 'ipp': did you mean ipo"),
    "judge's batch": (lambda: RewardModelJudge("x", batch_size=0), "`judge.batch_size` >= 1 but got 0"),
    "judge's length": (lambda: RewardModelJudge("x", max_length=0), "`judge.max_length` >= 1 but got 0"),
    "no judge": (lambda: judge_of("my.own.judge"), "path of a function at `--judge` but got 'my.own.judge': No module"),
    "judge that is none": (lambda: judge_of("math.pi"), "a function at `--judge` but math.pi is a float"),
    "axis": (lambda: typed("beta="), "`--vary KEY=V1,V2` but got 'beta='"),
    "axis without a name": (lambda: typed(" =1,2"), "`--vary KEY=V1,V2` but got ' =1,2'"),
    "axis without values": (lambda: axis("beta", []), "Expected values of `beta` but got none"),
    "degrees": (lambda: t_cdf(0.0, 0), "`degrees` >= 1 but got 0"),
    "quantile 0": (lambda: t_quantile(0.0, 3), r"`share` in \(0, 1\) but got 0.0"),
    "quantile 1": (lambda: t_quantile(1.0, 3), r"`share` in \(0, 1\) but got 1.0"),
    "audit of nothing": (lambda: typed_audit("x", "--top", "0"), r"`--top` in \(0, 1\] but got 0"),
    "audit of more than all": (lambda: typed_audit("x", "--top", "1.5"), r"`--top` in \(0, 1\] but got 1.5"),
    "audit, examples": (lambda: typed_audit("x", "--examples", "-1"), "`--examples` >= 0 but got -1"),
    "audit, weight": (lambda: typed_audit("x", "--hard-weight", "nan"), "`--hard-weight` >= 0 but got nan"),
    "export, drift": (
        lambda: typed_export("x", "y", "--merge", "--max_drift", "0"),
        "`--max_drift` > 0 but got 0",
    ),
    "export, pairs": (
        lambda: typed_export("x", "y", "--merge", "--probe_pairs", "0"),
        "`--probe_pairs` >= 1 but got 0",
    ),
    "chat and a prompt": (lambda: typed_generate("--chat", "--prompt", "p"), "`--chat`, or prompts .* but got both"),
    "nothing to complete": (lambda: typed_generate(), "what shall be completed"),
    "a system message for texts": (
        lambda: typed_generate("--prompt", "p", "--no-messages", "--system", "s"),
        "`--system` is a message",
    ),
    **{
        f"generate, {name}": (
            lambda name=name, value=value: typed_generate("--prompt", "p", f"--{name}", value),
            rf"`--{name}` .* but got {value}",
        )
        for name, value in {
            "max_new_tokens": "0",
            "temperature": "0.0",
            "top_p": "1.5",
            "top_k": "-1",
            "repetition_penalty": "0.0",
        }.items()
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_beyond_its_edge_is_refused_with_its_name(name):
    call, said = REFUSED[name]
    with pytest.raises((LitDPOError, ValueError), match=said):
        call()


def test_a_value_at_its_edge_is_taken():
    SampleCompletions(every_n_steps=1, every_n_epochs=1, prompts=1)
    LastCheckpoint(every_n_steps=1, every_n_minutes=1e-9)
    HealthMonitor(patience=1)
    assert policy(r=1, alpha=1e-9, dropout=0.0).r == 1
    assert EMAReference(1.0, 1).every == 1
    for edge in (0.0, 1.0):
        check_schedule("linear", edge)
    check_schedule("cosine", 0.0, 0.0)
    RewardModelJudge("x", batch_size=1, max_length=1)
    assert t_cdf(0.0, 1) == 0.5


def _taken(check, *given) -> bool:
    try:
        check("beta", *given)
    except ValueError as error:
        assert str(error).startswith("Expected `beta` ")  # noqa: PT017 - it may be taken
        return False
    return True


def test_the_checks_of_a_loss_take_the_ends_that_they_name():
    for interval, ends in {"[0, 1]": {0, 1}, "(0, 1)": set(), "[0, 1)": {0}, "(0, 1]": {1}}.items():
        for value in (0, 1, 0.5, -1e-9, 1 + 1e-9, math.nan, math.inf, True, "0.5", None):
            assert _taken(checks.in_range, value, interval) == (type(value) is not bool and value in {0.5, *ends})
    values = (-1e-9, 0, 1e-9, 1, math.inf, math.nan, False)
    assert [_taken(checks.positive, one) for one in values] == [False, False, True, True, False, False, False]
    assert [_taken(checks.not_negative, one) for one in values] == [False, True, True, True, False, False, False]
    assert [_taken(checks.whole, one, 2) for one in (1, 2, 3, 2.0, True)] == [False, True, True, False, False]
    assert [_taken(checks.one_of, one, "log", "linear") for one in ("log", "linear", "ln")] == [True, True, False]
    assert [_taken(checks.flag, one) for one in (True, False, 1, "true")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("absent.txt", None, "to be a file of prompts but .*absent.txt: .*No such file"),
        ("bytes.txt", b"\xff\xfe\x00", "to be a file of prompts but .*bytes.txt: .*utf-8"),
        ("rows.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', r'Expected {"prompt": ...} in line 3 of .*rows.jsonl'),
        ("list.json", b'["a"]\n', r'Expected {"prompt": ...} in line 1 of .*list.json'),
        ("empty.jsonl", b'{"prompt": ""}\n', "Expected text, or a list of messages, as `prompt` in line 1 of"),
    ],
)
def test_a_file_of_prompts_says_which_line_is_none(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(LitDPOError, match=said):
        prompts_of_file(tmp_path / name)


@pytest.mark.parametrize("text", ["- beta", "beta: 0.1", "beta: [0.1", "\x00"])
def test_a_file_of_axes_that_is_something_else_is_named(tmp_path, text):
    (tmp_path / "axes.yaml").write_text(text)
    with pytest.raises(AblationError, match=r"(Cannot read the axes in|Expected) .*axes.yaml"):
        from_file(tmp_path / "axes.yaml")
    with pytest.raises(AblationError, match=r"Cannot read the axes in .*none.yaml"):
        from_file(Path(tmp_path / "none.yaml"))


def test_a_reference_that_is_none_has_no_model_and_one_that_does_not_say_what_it_is_is_not_cached():
    with pytest.raises(LitDPOError, match="NoReference has no model to run"):
        NoReference().activated(None)
    with pytest.raises(LitDPOError, match="does not say what its log-probs depend on"):
        Reference.cache_identity(AdapterReference("x"), policy())


def test_a_reference_declares_fields_and_nothing_else():
    for wrong in ({Field.KL}, frozenset({"kl"}), frozenset({Field.KL, "no"}), "kl"):
        with pytest.raises(TypeError, match=r"Expected `provides` of Mine to be a frozenset of Field\..* but got"):
            type("Mine", (Reference,), {"provides": wrong})
    for right in ({"provides": frozenset({Field.KL})}, {"provides": frozenset()}, {}, {"provides": property(set)}):
        type("Mine", (Reference,), right)


def test_quantiles_and_shares_are_each_other_s_inverse():
    for degrees in (1, 2, 3, 8, 31):
        assert t_quantile(0.5, degrees) == pytest.approx(0.0, abs=1e-9)
        for share in (0.001, 0.3, 0.975):
            assert t_cdf(t_quantile(share, degrees), degrees) == pytest.approx(share, abs=1e-9)
            assert t_quantile(share, degrees) == pytest.approx(-t_quantile(1 - share, degrees), rel=1e-6)
    assert t_quantile(0.75, 1) == pytest.approx(math.tan(math.pi / 4), rel=1e-9)  # Cauchy's


# ---- what only a run or a file shows ----


class HalfOptimized(DPOModule):
    """Its optimizer has the adapters of one layer."""

    def configure_optimizers(self):
        own = [p for name, p in self.model.named_parameters() if p.requires_grad and "layers.0" in name]
        return torch.optim.SGD(own, lr=0.1)


class Unfrozen(DPOModule):
    """A part of the base trains too."""

    def configure_model(self):
        super().configure_model()
        self.model.get_base_model().lm_head.weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (HalfOptimized, r"the optimizer of `configure_optimizers` to have every adapter but not .*layers\.1\."),
        (Unfrozen, r"only adapters to train but these do too: .*lm_head\.weight"),
    ],
)
def test_what_trains_is_every_adapter_and_nothing_else(tiny_model, pairs_file, tmp_path, kind, said):
    with pytest.raises(LitDPOError, match=said):
        trainer(tmp_path).fit(module(tiny_model, kind=kind), data(pairs_file))


def test_completions_of_a_loader_need_prompts_of_their_own(tiny_model, pairs_file, tmp_path):
    source = data(pairs_file, tokenizer=str(tiny_model))
    source.setup("fit")
    run = trainer(tmp_path, callbacks=[SampleCompletions()])
    with pytest.raises(LitDPOError, match="takes its prompts from a PreferenceDataModule"):
        run.fit(module(tiny_model), source.train_dataloader())


@pytest.mark.parametrize(
    ("attention", "said"),
    [("flat", "Expected `attention` among auto, pairs, eager, .*sdpa.* but got 'flat'"),
     ("flash_attention_2", "needs the flash_attn or the kernels package")],
)  # fmt: skip
def test_an_attention_that_is_not_there_is_said_before_weights_load(tiny_model, attention, said):
    if attention != "flat" and (find_spec("flash_attn") or find_spec("kernels")):
        pytest.skip("the package is here")
    with pytest.raises(LitDPOError, match=said):
        LoRAPolicy(str(tiny_model), attention=attention).check_model(weights=False)


def test_a_folder_without_a_tokenizer_or_a_configuration_is_named(tiny_model, tmp_path):
    for name, call in (("tokenizer*", "load_tokenizer"), ("config.json", "check_model")):
        folder = shutil.copytree(tiny_model, tmp_path / call)
        for file in folder.glob(name):
            file.unlink()
        with pytest.raises(LitDPOError, match=re.escape(str(folder))):
            getattr(LoRAPolicy(str(folder)), call)()


def test_a_text_file_that_is_no_text_or_empty_gives_no_prompts(tmp_path):
    for name, content in (("bytes.txt", b"\xff\xfe"), ("empty.txt", b"\n \n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LitDPOError, match=rf"Expected .*{name}"):
            read_prompts(str(tmp_path / name))


def test_a_new_run_has_a_new_folder(tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(AblationError, match=r"Expected a new folder for the run but .* holds files"):
        run_once({}, tmp_path)


def test_two_ablations_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_PATIENCE", 0.3)
    layout = Layout(tmp_path)
    with running._locked(layout), pytest.raises(AblationError, match="Another ablation is at work in"):  # noqa: SIM117
        with running._locked(layout):
            pass
    with running._locked(layout):
        pass


@pytest.mark.parametrize(
    ("words", "said"), [(["inspect"], "to inspect"), (["fit", "--trainer.max_epochs=1", "--plan"], "to plan with")]
)
def test_other_data_are_named_where_ours_are_needed(tiny_model, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    kind = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    with pytest.raises(SystemExit) as stopped:
        main([*words, f"--model.policy.model={tiny_model}", "--model.policy.quantization=none", f"--data={kind}"])
    assert stopped.value.code == 1
    assert f"Expected a PreferenceDataModule {said} but got BoringDataModule" in capsys.readouterr().err


def test_a_template_that_refuses_a_prompt_and_a_row_that_is_none_say_why(tmp_path):
    refuses = byte_level(chat_template="{{ raise_exception('no ' + messages[0]['role']) }}")
    with pytest.raises(LitDPOError, match=r"The chat template refuses the conversation: .*no user"):
        encode(refuses, Prompt([{"role": "user", "content": "q"}]), {})
    with pytest.raises(LitDPOError, match="Expected a prompt of at least one token but '' has none"):
        encode(byte_level(), Prompt(""), {})
    file = tmp_path / "rows.jsonl"
    rows = [{"question": question, "chosen": "c", "rejected": "r"} for question in ("a", "b", None)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert [one.asked for one in read_prompts(str(file))] == ["a", "b"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LitDPOError, match=r"rows\.jsonl, row 2 \(from 0\): "):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("callback", "option"),
    [(ModelCheckpoint(dirpath="x"), "dirpath"), (LastCheckpoint(directory="x"), "directory")],
)
def test_runs_of_an_ablation_do_not_write_into_one_folder(callback, option):
    check_places([ModelCheckpoint(), LastCheckpoint()])
    with pytest.raises(AblationError, match=f"Expected no `{option}` for .* all runs would write there"):
        check_places([callback])
