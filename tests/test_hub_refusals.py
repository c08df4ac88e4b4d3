"""What a hub refuses is said in one sentence, before weights load; and what is local asks no hub at all."""

from __future__ import annotations

import pytest

from acme import acme
from hub import FOREVER, environment, walk


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with acme(tmp_path_factory.mktemp("models")) as found:
        yield found


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
command("local fit", f"{fit} --trainer.callbacks SampleCompletions")
adapter = "--model.policy.adapter_path runs/version_0/adapter"
command("local, continued", f"{fit} {adapter} --model.reference CachedReference")
command("local, other reference", f"{fit} --model.reference ModelReference --model.reference.model {MODEL}")
(saved,) = glob.glob("runs/version_0/checkpoints/*.ckpt")
config = json.load(open("runs/version_0/adapter/adapter_config.json"))
os.mkdir("named")
for name in os.listdir("runs/version_0/adapter"):
    os.link(f"runs/version_0/adapter/{name}", f"named/{name}")
os.unlink("named/adapter_config.json")
json.dump({**config, "base_model_name_or_path": "acme/tiny"}, open("named/adapter_config.json", "w"))
check("adapter that names a hub id", LoRAPolicy(MODEL, adapter_path="named"))
os.makedirs("folder")
os.link(PAIRS, "folder/train.jsonl")
pairs("folder:train")
command("local predict", f"predict {files} --model.policy.model {MODEL} --ckpt_path {saved}")
command("local inspect", f"inspect --data.train {PAIRS} --data.tokenizer {MODEL} --out report", "")
command("local generate", "generate runs/version_0 --prompt yes --max_new_tokens 2", "")
command("local export", "export runs/version_0 tuned --merge", "")
noted["asked"], watching = asked, False
"""


REFUSED = """
for name in "gated", "secret", "nothing", "both", "tiny@v1", "pickled":
    check(name, LoRAPolicy(f"acme/{name}"))
check("adapter as a model", LoRAPolicy("acme/adapter", revision="v1"))
check("converted, pinned", LoRAPolicy("acme/converted", revision="v1"))
check("revision", LoRAPolicy("acme/tiny", revision="v7"))
check("directory's revision", LoRAPolicy(".", revision="v7"))
for name in "gated", "nothing", "adapter@v7", "adapter":
    check(f"{name} adapter", LoRAPolicy("acme/tiny", adapter_path=f"acme/{name}"))
check("reference", LoRAPolicy("acme/tiny"), ModelReference("acme/nothing"))
for source in (
    *("acme/gated:train", "acme/nothing:train", "acme/pairs@v7:train", "acme/pairs@v1", "acme/pairs:tain"),
    *("acme/many:train", "acme/many:french:train", "acme/many:german", "acme/endless-9:train", "acme/endless-17:train"),
):
    pairs(source)
os.environ["HF_TOKEN"] = "hf_of_somebody"
for name in "gated", "secret", "nothing":
    check(f"{name}, logged in", LoRAPolicy(f"acme/{name}"))
del os.environ["HF_TOKEN"]
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
    """NF4, samples, checkpoints, references, predictions, other commands: it may ask and has asked nothing."""
    assert refused["asked"] == []
    local = {name: one["code"] for name, one in refused.items() if name.startswith("local")}
    assert local == dict.fromkeys(local, 0), refused
    assert len(local) == 7
    assert refused["adapter that names a hub id"] is None
    assert refused["folder:train"] == " Exactly 0."


GATED = "is gated: accept its licence on its page, then log in with that account"
ABSENT = "is not on the hub, or is private: check the name, or log in"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gated", f"`policy.model`: acme/gated {GATED}"),
        ("secret", f"`policy.model`: acme/secret {ABSENT}"),
        ("nothing", f"`policy.model`: acme/nothing {ABSENT}"),
        ("gated, logged in", f"`policy.model`: acme/gated {GATED}"),
        ("nothing, logged in", f"`policy.model`: acme/nothing {ABSENT}"),
        ("both", "holds a model and an adapter"),
        ("tiny@v1", "give that in `policy.revision`"),
        ("pickled", "has only pytorch_model.bin"),
        (
            "adapter as a model",
            "it holds README.md, adapter_config.json, adapter_model.safetensors. That is an adapter",
        ),
        ("revision", "`policy.model`: acme/tiny has no revision 'v7'; it has main, readme, v1."),
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
        ("acme/endless-9:train", "`acme/endless-9/README.md` cannot be read: its aliases (`*name`) repeat without end"),
        ("acme/endless-17:train", "`acme/endless-17/.huggingface.yaml` cannot be read: its aliases (`*name`) repeat"),
    ],
)
def test_what_a_hub_refuses_is_one_sentence_with_what_to_do(refused, name, sentence):
    assert sentence in refused[name]
    assert "\n" not in refused[name]


def test_what_is_private_opens_to_who_is_logged_in(refused):
    assert refused["secret, logged in"] is None


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
