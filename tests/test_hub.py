"""Hub ids walked for real: over HTTP on the loopback, from a cache, and with whatever a hub refuses.

Each walk is one process, because the libraries read HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE as they are imported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import hub as loopback
import tiny
from hub import FOREVER, environment, python

# Runs commands one after the other and notes how each ended; `noted` is printed as the last line.
PRELUDE = """
import contextlib, glob, io, json, logging, os, traceback, urllib.request
from lit_dpo import AdapterReference, CachedReference, ModelReference, QLoRAPolicy
from lit_dpo.cli import main
from lit_dpo.data.sources import load_pairs
from lit_dpo.errors import LitDPOError

noted, FIT = {}, "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.num_sanity_val_steps 0"

def check(name, policy, reference=None):
    \"\"\"What `fit` does before it loads weights.\"\"\"
    try:
        policy.check()
        if reference is not None:
            reference.check(policy)
        noted[name] = None
    except LitDPOError as error:
        noted[name] = str(error)

def pairs(source):
    try:
        noted[source] = load_pairs(source, ["prompt", "chosen", "rejected"])[0].rows[0]["chosen"]
    except LitDPOError as error:
        noted[source] = str(error)

def command(name, line):
    output = io.StringIO()
    for logger in None, "lightning.pytorch", "lightning.fabric":
        for handler in logging.getLogger(logger).handlers:
            handler.setStream(output)
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            main([*line.split(), *FIT.split()])
            code = 0
        except SystemExit as error:
            code = error.code
        except Exception:
            code = "traceback"
            traceback.print_exc()
    text = output.getvalue()
    errors = [one for one in text.splitlines() if one.startswith("lit-dpo: error: ")]
    noted[name] = {"code": code, "error": text[text.find(errors[0]) :].strip() if errors else "", "text": text}
"""


def walk(script: str, cwd: Path, env: dict[str, str]) -> dict:
    done = python(f"{PRELUDE}{script}\nprint()\nprint(json.dumps(noted))", cwd, env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _rows(count: int = 8, right: str = "yes") -> bytes:
    rows = [{"prompt": f"is {i} so?", "chosen": f" {right}", "rejected": " no" * (1 + i % 3)} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CONFIGURATIONS = b"""---
configs:
- config_name: english
  data_files: [{split: train, path: en.jsonl}, {split: test, path: en.jsonl}]
- config_name: german
  data_files: [{split: train, path: de.jsonl}, {split: test, path: de.jsonl}]
---
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama before and after some change, another repository's GPT-2, and an adapter of the first."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    old = tiny.directory(root / "old", **sizes)
    new = tiny.directory(root / "new", seed=1, **sizes)
    gpt2 = tiny.directory(root / "gpt2", "gpt2", n_embd=64)
    adapter = tiny.lora(tiny.model(**sizes), seed=3, targets=["q_proj", "v_proj"])
    adapter.save_pretrained(root / "adapter")
    return {"old": old, "new": new, "gpt2": gpt2, "adapter": root / "adapter"}


@pytest.fixture(scope="module")
def hub(folders):
    with loopback.serve() as found:
        found.old = found.commit("acme/tiny", folders["old"], tag="v1")
        found.new = found.commit("acme/tiny", folders["new"])
        found.commit("acme/gpt2", folders["gpt2"])
        path = folders["adapter"] / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "acme/tiny", "revision": found.old})
        )
        found.commit("acme/adapter", folders["adapter"], tag="v1")
        found.commit("acme/adapter", {"README.md": b"moved"})
        found.commit("acme/both", {**_files(folders["old"]), **_files(folders["adapter"])})
        found.commit("acme/mirror", folders["old"])
        found.commit("acme/gated", folders["old"], access="gated")
        found.commit("acme/secret", folders["old"], access="private")
        found.commit("acme/breaks", folders["old"])
        files = _files(folders["old"])
        weights = files.pop("model.safetensors")
        found.commit("acme/pickled", {**files, "pytorch_model.bin": b"pickle"})
        found.commit("acme/converted", {**files, "pytorch_model.bin": b"pickle"}, conversion=3)
        found.commit("acme/converted", {**files, "model.safetensors": weights}, branch="refs/pr/3")
        found.commit("acme/pairs", {"train.jsonl": _rows(), "val.jsonl": _rows(3)}, kind="datasets", tag="v1")
        found.commit("acme/pairs", {"train.jsonl": _rows(right="of course")}, kind="datasets")
        many = {"README.md": CONFIGURATIONS, "en.jsonl": _rows(), "de.jsonl": _rows(right="ja")}
        found.commit("acme/many", many, kind="datasets")
        found.commit("acme/gated", {"train.jsonl": _rows()}, kind="datasets", access="gated")
        yield found


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


ONLINE = """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

train, policy = "--data.train acme/pairs@v1:train --data.val acme/pairs@v1:validation", "--model.policy.model acme/tiny"
nf4 = f"fit {policy} {train} --data.batch_size 4 --trainer.max_epochs"
command("fit", f"{nf4} 1 --model.policy.revision v1")
(saved,) = glob.glob("runs/version_0/checkpoints/*.ckpt")
command("validate", f"validate {policy} {train} --model.policy.revision {OLD} --ckpt_path {saved}")
command("validate elsewhere", f"validate {policy} {train} --ckpt_path {saved}")
command("resume", f"{nf4} 2 --model.policy.revision v1 --ckpt_path {saved}")
command("resume elsewhere", f"{nf4} 2 --ckpt_path {saved}")
command("predict", f"predict --model.policy.model {COPY} {train} --ckpt_path {saved}")
for number in 1, 2:
    command(
        f"cached {number}",
        f"{nf4} 1 --model.policy.revision v1 --model.reference CachedReference "
        "--model.reference.reference lit_dpo.ModelReference --model.reference.reference.model acme/tiny "
        "--model.reference.reference.quantization none",
    )
adapter = "--model.policy.adapter_path acme/adapter@v1 --model.policy.quantization none"
command("adapter", f"{nf4} 1 {adapter} --model.policy.revision v1 --model.reference CachedReference")
command("gpt2", f"fit --model.policy.model acme/gpt2 {train} --data.tokenizer acme/tiny@v1 --trainer.max_epochs 1")
command("converted", f"fit --model.policy.model acme/converted {train} --trainer.max_epochs 1")

trained = {"adapter_path": "acme/adapter@v1"}
check("on a copy", QLoRAPolicy(COPY, **trained))
check("on a mirror", QLoRAPolicy("acme/mirror", **trained))
check("on another commit", QLoRAPolicy("acme/tiny", **trained))
check("on another commit, told", QLoRAPolicy("acme/tiny", **trained, adapter_base="any"))
check("on another model", QLoRAPolicy("acme/gpt2", **trained))
check("on another directory", QLoRAPolicy(OTHER, **trained))
check("reference", QLoRAPolicy("acme/tiny", revision="v1"), AdapterReference("acme/adapter@v1"))
check("reference on another commit", QLoRAPolicy("acme/tiny"), AdapterReference("acme/adapter@v1"))
pairs("acme/many:german:train")
pairs("acme/many:english:train[:3]")
pairs("acme/pairs:train")

a, b, c = (QLoRAPolicy("acme/tiny", revision=at) for at in ("v1", OLD, "main"))
noted["identities"] = [one.identity() for one in (a, b, c, QLoRAPolicy(COPY))]
noted["contents"] = [one.content() for one in (a, b, c)]
noted["adapters"] = [a.adapter_content(at) for at in ("acme/adapter@v1", ADAPTER)]

exported, ids = "runs/version_0/adapter", torch.arange(3, 40)[None]
base = AutoModelForCausalLM.from_pretrained(COPY)
with torch.no_grad():
    expected = PeftModel.from_pretrained(base, exported)(ids).logits
    noted["exported"] = json.load(open(f"{exported}/adapter_config.json"))
    noted["auto"] = float((AutoPeftModelForCausalLM.from_pretrained(exported)(ids).logits - expected).abs().max())
    piped = pipeline("text-generation", model=exported, revision=noted["exported"]["revision"]).model
    noted["pipeline"] = float((piped(ids).logits - expected).abs().max())
    moved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("acme/tiny"), exported)
    noted["on main"] = float((moved(ids).logits - expected).abs().max())
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home, folders, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("online")
    places = {"OLD": hub.old, "COPY": folders["old"], "OTHER": folders["new"], "ADAPTER": folders["adapter"]}
    script = "".join(f"{name} = {str(value)!r}\n" for name, value in places.items())
    hub.breaks["model.safetensors"] = 1
    return walk(script + ONLINE, cwd, environment(home, HF_ENDPOINT=hub.url))


LINES = ("fit", "validate", "resume", "predict", "cached 1", "cached 2", "adapter", "gpt2", "converted")


@pytest.mark.parametrize("name", LINES)
def test_a_hub_id_does_what_a_directory_does(online, name):
    assert online[name]["code"] == 0, online[name]["text"][-2000:]


def test_a_broken_connection_is_taken_up_where_it_broke(online, hub):
    """The first download of weights ended after half of them."""
    assert online["fit"]["code"] == 0
    assert len(hub.asked("GET", f"acme/tiny/resolve/{hub.old}/model.safetensors")) == 2


@pytest.mark.parametrize("name", ["validate elsewhere", "resume elsewhere"])
def test_another_commit_is_refused_with_both(online, hub, name):
    assert online[name]["code"] == 1
    assert f"base.commit: '{hub.old}' in the checkpoint, '{hub.new}' now" in online[name]["error"]


def test_a_cached_reference_of_a_hub_id_is_found_again(online):
    assert "reference cache: 0 pairs" in online["cached 1"]["text"]
    assert "reference cache: 8 pairs" in online["cached 2"]["text"]


def test_a_conversion_to_safetensors_is_found_and_said(online):
    assert (
        "acme/converted has only pytorch_model.bin: taking the safetensors of refs/pr/3" in online["converted"]["text"]
    )


def test_identity_and_content_are_those_of_the_commit(online, hub):
    tag, commit, main, copy = online["identities"]
    assert [one.pop("revision") for one in (tag, commit, main)] == ["v1", hub.old, "main"]
    assert tag == commit
    assert tag["commit"] == hub.old
    assert main["commit"] == hub.new
    assert tag["fingerprint"] == copy["fingerprint"] != main["fingerprint"]
    assert "commit" not in copy
    assert online["contents"][0] == online["contents"][1] != online["contents"][2]
    assert online["adapters"][0] == online["adapters"][1]


def test_an_exported_adapter_is_loaded_onto_the_commit_it_was_trained_on(online, hub):
    assert online["exported"]["base_model_name_or_path"] == "acme/tiny"
    assert online["exported"]["revision"] == hub.old
    assert online["auto"] == 0
    assert online["pipeline"] == 0, "the pipeline is given the revision; by itself it takes the main branch"
    assert online["on main"] > 1


@pytest.mark.parametrize("name", ["on a copy", "on a mirror", "on another commit, told", "reference"])
def test_an_adapter_goes_onto_its_base_wherever_that_lies(online, name):
    assert online[name] is None


@pytest.mark.parametrize(
    "name", ["on another commit", "on another model", "on another directory", "reference on another commit"]
)
def test_an_adapter_of_another_base_is_refused_with_both(online, hub, name):
    assert f"was trained on another base: acme/tiny (commit {hub.old}); the policy is " in online[name]
    assert "`policy.adapter_base` to any" in online[name]


def test_configurations_and_revisions_of_data_sets_can_be_named(online):
    assert online["acme/many:german:train"] == " ja"
    assert online["acme/many:english:train[:3]"] == " yes"
    assert online["acme/pairs:train"] == " of course"


LOCAL = """
import sys

asked, watching = [], True

def hook(event, args):
    if watching and (event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple))):
        asked.append(f"{event} {args}")
        raise OSError("there is no network here")

sys.addaudithook(hook)
files = f"--data.train {PAIRS} --data.val_split 0.2 --data.predict {PAIRS}"
fit = f"fit --trainer.max_epochs 1 {files} --model.policy.model {MODEL}"
command("local fit", f"{fit} --trainer.callbacks SampleAnswers")
command("local, continued", f"{fit} --model.policy.adapter_path runs/version_0/adapter --model.reference CachedReference")
command("local, other reference", f"{fit} --model.reference ModelReference --model.reference.model {MODEL}")
(saved,) = glob.glob("runs/version_0/checkpoints/*.ckpt")
command("local predict", f"predict {files} --model.policy.model {MODEL} --ckpt_path {saved}")
noted["asked"], watching = asked, False
"""


REFUSED = """
for name in "gated", "secret", "nothing", "both", "tiny@v1", "pickled":
    check(name, QLoRAPolicy(f"acme/{name}"))
check("adapter as a model", QLoRAPolicy("acme/adapter", revision="v1"))
check("revision", QLoRAPolicy("acme/tiny", revision="v7"))
check("directory's revision", QLoRAPolicy(".", revision="v7"))
for name in "gated", "nothing", "adapter@v7", "adapter":
    check(f"{name} adapter", QLoRAPolicy("acme/tiny", adapter_path=f"acme/{name}"))
check("reference", QLoRAPolicy("acme/tiny"), ModelReference("acme/nothing"))
for source in (
    *("acme/gated:train", "acme/nothing:train", "acme/pairs@v7:train", "acme/pairs@v1", "acme/pairs:tain"),
    *("acme/many:train", "acme/many:french:train", "acme/many:german"),
):
    pairs(source)
fit = "fit --data.train acme/pairs:train --trainer.max_epochs 1 --model.policy.model"
command("gated tokenizer", f"{fit} acme/tiny --data.tokenizer acme/gated")
command("gated model", f"{fit} acme/gated")
command("breaks", f"{fit} acme/breaks")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mend")
command("breaks no more", f"{fit} acme/breaks")
"""


@pytest.fixture(scope="module")
def refused(hub, tiny_model, pairs_file, tmp_path_factory):
    hub.breaks["model.safetensors"] = FOREVER
    cwd = tmp_path_factory.mktemp("refused")
    script = f"MODEL, PAIRS = {str(tiny_model)!r}, {str(pairs_file)!r}\n{LOCAL}{REFUSED}"
    found = walk(script, cwd, environment(cwd / "home", HF_ENDPOINT=hub.url))
    hub.breaks.clear()
    return found


def test_what_is_local_asks_no_network(refused):
    """NF4, samples, checkpoints, export, references and predictions, in a process that may ask and has asked nothing."""
    assert refused["asked"] == []
    local = {name: one["code"] for name, one in refused.items() if name.startswith("local")}
    assert local == dict.fromkeys(local, 0), refused
    assert len(local) == 4


GATED = "is gated: accept its licence on its page, then log in with that account"
ABSENT = "is not on the hub, or is private: check the name, or log in"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gated", f"`policy.model`: acme/gated {GATED}"),
        ("secret", f"`policy.model`: acme/secret {ABSENT}"),
        ("nothing", f"`policy.model`: acme/nothing {ABSENT}"),
        ("both", "holds a model and an adapter"),
        ("tiny@v1", "give that in `policy.revision`"),
        ("pickled", "has only pytorch_model.bin"),
        (
            "adapter as a model",
            "it holds README.md, adapter_config.json, adapter_model.safetensors. That is an adapter",
        ),
        ("revision", "`policy.model`: acme/tiny has no revision 'v7'; it has main, v1."),
        ("directory's revision", "A revision has no effect on a directory: leave 'v7' out"),
        ("gated adapter", f"`policy.adapter_path`: acme/gated {GATED}"),
        ("nothing adapter", f"`policy.adapter_path`: acme/nothing {ABSENT}"),
        ("adapter@v7 adapter", "`policy.adapter_path`: acme/adapter has no revision 'v7'; it has main, v1."),
        ("adapter adapter", "but it has no adapter_config.json: README.md"),
        ("reference", f"`reference.model`: acme/nothing {ABSENT}"),
        ("acme/gated:train", f"acme/gated {GATED}"),
        ("acme/nothing:train", f"acme/nothing {ABSENT}"),
        ("acme/pairs@v7:train", "acme/pairs has no revision 'v7'; it has main, v1."),
        ("acme/pairs@v1", "Expected a split, such as `acme/pairs@v1:train`; `acme/pairs` has train, validation."),
        ("acme/pairs:tain", "`acme/pairs` has no split `tain`; it has train."),
        (
            "acme/many:train",
            "Expected a configuration, such as `acme/many:english:train`; `acme/many` has english, german",
        ),
        ("acme/many:french:train", "`acme/many` has no configuration `french`; it has english, german."),
        (
            "acme/many:german",
            "Expected a configuration, such as `acme/many:german:train`; `acme/many` has english, german",
        ),
    ],
)
def test_what_a_hub_refuses_is_one_sentence_with_what_to_do(refused, name, sentence):
    assert sentence in refused[name]
    assert "\n" not in refused[name]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gated tokenizer", f"`data.tokenizer`: acme/gated {GATED}"),
        ("gated model", f"`policy.model`: acme/gated {GATED}"),
        ("breaks", "acme/breaks did not come through: the connection to the hub failed"),
    ],
)
def test_a_command_ends_with_that_sentence(refused, name, sentence):
    assert refused[name]["code"] == 1
    assert sentence in refused[name]["error"]
    assert "\n" not in refused[name]["error"]


def test_after_a_broken_download_the_same_command_completes(refused, hub):
    assert "Run the same command again" in refused["breaks"]["error"]
    assert refused["breaks no more"]["code"] == 0


OFFLINE = """
fit = "fit --trainer.max_epochs 1 --model.policy.model"
command("downloaded before", f"{fit} acme/tiny --model.policy.revision v1 --data.train acme/pairs@v1:train")
command("hand-made", f"{fit} hand/made --data.train {PAIRS}")
check("its commit", QLoRAPolicy("hand/made", revision=40 * "a"))
check("adapter", QLoRAPolicy("acme/tiny", revision="v1", adapter_path="acme/adapter@v1"))
noted["identity"] = QLoRAPolicy("hand/made").identity()
check("no such revision", QLoRAPolicy("hand/made", revision="v1"))
check("no weights", QLoRAPolicy("hand/empty"))
check("nowhere", QLoRAPolicy("acme/nowhere"))
check("no adapter", QLoRAPolicy("hand/made", adapter_path="acme/nowhere"))
pairs("acme/nowhere:train")
"""


@pytest.fixture(scope="module")
def offline(online, home, folders, pairs_file, tmp_path_factory):
    """No server, no network: the cache of the walk before, and one that was made by hand."""
    for name in ("made", "empty"):
        cache = home / "hub" / f"models--hand--{name}"
        shutil.copytree(folders["old"], cache / "snapshots" / (40 * "a"))
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(40 * "a")
    (cache / "snapshots" / (40 * "a") / "model.safetensors").unlink()
    cwd = tmp_path_factory.mktemp("offline")
    script = f"PAIRS = {str(pairs_file)!r}\n{OFFLINE}"
    return walk(script, cwd, environment(home, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize("name", ["downloaded before", "hand-made"])
def test_a_cache_is_enough(offline, name):
    assert offline[name]["code"] == 0, offline[name]["text"][-2000:]


@pytest.mark.parametrize("name", ["its commit", "adapter"])
def test_a_cache_is_enough_to_check(offline, name):
    assert offline[name] is None


def test_a_hand_made_cache_has_a_commit(offline):
    assert offline["identity"]["commit"] == 40 * "a"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("no such revision", "`policy.model`: hand/made is not in the cache at revision 'v1'"),
        ("no weights", "`policy.model`: hand/empty is not in the cache"),
        ("nowhere", "`policy.model`: acme/nowhere is not in the cache"),
        ("no adapter", "`policy.adapter_path`: acme/nowhere is not in the cache"),
        ("acme/nowhere:train", "acme/nowhere is not in the cache"),
    ],
)
def test_what_no_cache_has_is_one_sentence(offline, name, option):
    assert option in offline[name]
    assert "HF_HUB_OFFLINE" in offline[name]
    assert "\n" not in offline[name]
