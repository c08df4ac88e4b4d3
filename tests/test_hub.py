"""Hub ids walked for real: over HTTP on the loopback, and from a cache.

Each walk is one process, because the libraries read HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE as they are imported.
"""

from __future__ import annotations

import shutil

import pytest

from acme import acme
from hub import environment, walk


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with acme(tmp_path_factory.mktemp("models")) as found:
        yield found


ONLINE = """
import os
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, pipeline

train, policy = "--data.train acme/pairs@v1:train --data.val acme/pairs@v1:validation", "--model.policy.model acme/tiny"
nf4 = f"fit {policy} {train} --data.batch_size 4 --model.lr_scheduler constant --trainer.max_epochs"
command("plan", f"{nf4} 1 --model.policy.revision v1 --model.policy.target_modules [q_proj] --plan here")
noted["weights after a plan"] = glob.glob(os.environ["HF_HOME"] + "/**/*.safetensors", recursive=True)
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
check("on a copy", LoRAPolicy(COPY, **trained))
check("on a mirror", LoRAPolicy("acme/mirror", **trained))
check("on a commit that changes a text", LoRAPolicy("acme/tiny", revision="readme", **trained))
check("on another commit", LoRAPolicy("acme/tiny", **trained))
check("on another commit, told", LoRAPolicy("acme/tiny", **trained, adapter_base="any"))
check("on another model", LoRAPolicy("acme/gpt2", **trained))
check("on another directory", LoRAPolicy(OTHER, **trained))
check("reference", LoRAPolicy("acme/tiny", revision="v1"), AdapterReference("acme/adapter@v1"))
check("reference on another commit", LoRAPolicy("acme/tiny"), AdapterReference("acme/adapter@v1"))
pairs("acme/many:german:train")
pairs("acme/many:english:train[:3]")
pairs("acme/pairs:train")

a, b, c = (LoRAPolicy("acme/tiny", revision=at) for at in ("v1", OLD, "main"))
noted["identities"] = [one.checkpoint_identity() for one in (a, b, c, LoRAPolicy(COPY))]
noted["contents"] = [one.cache_identity() for one in (a, b, c)]
noted["adapters"] = [a.adapter_content(at) for at in ("acme/adapter@v1", ADAPTER)]

sharded = LoRAPolicy("acme/sharded", r=2)
sharded.load()
both = (sharded, LoRAPolicy(SHARDED))
noted["sharded"] = [one.checkpoint_identity()["fingerprint"] for one in both]
check("custom", LoRAPolicy("acme/custom"))
noted["custom, trusted"] = type(LoRAPolicy("acme/custom", trust_remote_code=True).load().get_base_model()).__name__

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

def tables():
    there = glob.glob(os.environ["HF_HOME"] + "/**/*", recursive=True)
    return {file for file in there if file.endswith((".arrow", ".jsonl"))}

before = tables()
stream = "--data.train acme/rows@v1:train --data.streaming true --data.shuffle_buffer 5 --data.batch_size 4"
plain = f"--model.policy.model {COPY} --model.policy.quantization none --model.lr_scheduler constant"
fit = f"fit {plain} {stream} --trainer.max_epochs 2"
mixture = '{"acme/rows@v1:train":1,"acme/rows:train":2}'
command("streamed", fit)
command("streamed, mixed", fit.replace("acme/rows@v1:train", mixture) + " --trainer.max_steps 2")
command("streamed, nowhere", fit.replace("acme/rows@v1", "acme/nothing"))
command("streamed, split", fit.replace("acme/rows@v1:train", "acme/rows@v1:tests"))
noted["tables"] = len(before), sorted(tables() - before)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home, tmp_path_factory):
    cwd, folders = tmp_path_factory.mktemp("online"), hub.folders
    places = {"OLD": hub.old, "COPY": folders["old"], "OTHER": folders["new"], "ADAPTER": folders["adapter"]}
    places["SHARDED"] = folders["sharded"]
    script = "".join(f"{name} = {str(value)!r}\n" for name, value in places.items())
    hub.breaks["model.safetensors"] = 1
    return walk(script + ONLINE, cwd, environment(home, HF_ENDPOINT=hub.url))


LINES = ("fit", "validate", "resume", "predict", "cached 1", "cached 2", "adapter", "gpt2", "converted")


@pytest.mark.parametrize("name", LINES)
def test_a_hub_id_does_what_a_directory_does(online, name):
    assert online[name]["code"] == 0, online[name]["text"][-2000:]


def test_a_plan_downloads_no_weights(online):
    assert online["plan"]["code"] == 0
    assert "An estimate; no weights were read or downloaded." in online["plan"]["text"]
    assert online["weights after a plan"] == []


def test_a_broken_connection_is_taken_up_where_it_broke(online, hub):
    """The first download of weights ended after half of them."""
    assert online["fit"]["code"] == 0
    assert len(hub.asked("GET", f"acme/tiny/resolve/{hub.old}/model.safetensors")) == 2


@pytest.mark.parametrize("name", ["validate elsewhere", "resume elsewhere"])
def test_another_commit_is_refused_with_both(online, hub, name):
    assert online[name]["code"] == 1
    assert f"base.commit: '{hub.old}' in the checkpoint, '{hub.new}' now" in online[name]["error"]


def test_a_cached_reference_of_a_hub_id_is_found_again(online):
    assert "reference cache: 0 completions" in online["cached 1"]["text"]
    assert "reference cache: 16 completions" in online["cached 2"]["text"]


def test_a_check_downloads_no_weights(online, hub):
    """The adapter's base was compared with the mirror's by the digests that the hub has."""
    assert online["on a mirror"] is None
    assert hub.asked("acme/mirror", "config.json")
    assert not hub.asked("acme/mirror", "safetensors")


def test_shards_are_loaded_and_nothing_else(online, hub):
    assert len(hub.asked("GET", "acme/sharded", "/model-0")) > 1
    assert not hub.asked("consolidated")
    assert online["sharded"][0] == online["sharded"][1]


def test_code_that_comes_with_a_model_runs_only_if_trusted(online):
    assert "'acme/custom' comes with code of its own" in online["custom"]
    assert online["custom, trusted"] == "AcmeForCausalLM"


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


@pytest.mark.parametrize(
    "name", ["on a copy", "on a mirror", "on a commit that changes a text", "on another commit, told", "reference"]
)
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


def test_a_hub_data_set_is_streamed(online):
    """Over HTTP, and nothing of it is left on the disk."""
    whole, mixed, nowhere, split = (online[f"streamed{how}"] for how in ("", ", mixed", ", nowhere", ", split"))
    assert whole["code"] == 0, whole["text"][-3000:]
    for epoch in range(2):
        assert f"train: epoch {epoch}: 21 rows read, 21 kept" in whole["text"]
    assert "12 steps in" in whole["text"]
    assert mixed["code"] == 0, mixed["text"][-3000:]
    assert "2 steps in" in mixed["text"]
    assert "acme/nothing" in nowhere["error"]
    assert "has no split `tests`; it has train" in split["error"]
    before, more = online["tables"]
    assert before > 0, "of data sets that were downloaded"
    assert more == []


OFFLINE = """
fit = "fit --trainer.max_epochs 1 --model.policy.model"
command("downloaded before", f"{fit} acme/tiny --model.policy.revision v1 --data.train acme/pairs@v1:train")
command("hand-made", f"{fit} hand/made --data.train {PAIRS}")
check("its commit", LoRAPolicy("hand/made", revision=40 * "a"))
check("adapter", LoRAPolicy("acme/tiny", revision="v1", adapter_path="acme/adapter@v1"))
noted["identity"] = LoRAPolicy("hand/made").checkpoint_identity()
check("no such revision", LoRAPolicy("hand/made", revision="v1"))
check("no weights", LoRAPolicy("hand/empty"))
check("nowhere", LoRAPolicy("acme/nowhere"))
check("no adapter", LoRAPolicy("hand/made", adapter_path="acme/nowhere"))
pairs("acme/nowhere:train")
"""


@pytest.fixture(scope="module")
def offline(online, hub, home, pairs_file, tmp_path_factory):
    """No server, no network: the cache of the walk before, and one that was made by hand."""
    for name in ("made", "empty"):
        cache = home / "hub" / f"models--hand--{name}"
        shutil.copytree(hub.folders["old"], cache / "snapshots" / (40 * "a"))
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
