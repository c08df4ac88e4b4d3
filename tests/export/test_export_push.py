"""`--push` walked for real: the hub's own client, over HTTP on the loopback, in a process of its own."""

from __future__ import annotations

import pytest

import tiny
from hub import environment, serve, walk
from writable_hub import WritableHandler

WALK = """
import contextlib, io, os
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

def export(name, out, *more, token="hf_acme"):
    os.environ["HF_TOKEN"] = token
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(["export", ADAPTER, out, *more])
            code = 0
        except SystemExit as error:
            code = error.code
    noted[name] = [code, output.getvalue(), os.path.isdir(out)]

export("pushed", "a", "--push", "acme/tuned", "--private")
export("again", "b", "--push", "acme/tuned")
export("added", "c", "--push", "acme/tuned", "--push_to_existing")
export("stranger", "d", "--push", "acme/other", token="hf_wrong")
export("elsewhere", "e", "--push", "others/tuned")
export("nobody", "f", "--push", "acme/other", token="")
os.environ["HF_TOKEN"] = "hf_acme"
model = LoRAPolicy("acme/base", quantization="none", adapter_path="acme/tuned").load()
noted["loaded"] = model.peft_config["default"].r
noted["files"] = sorted(os.listdir("a"))
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/down")
export("down", "g", "--push", "acme/third")
"""


class _Handler(WritableHandler):
    """A hub that goes away when it is told to."""

    down = False

    def _answer(self, body: bytes) -> None:
        if self.path == "/down":
            type(self).down = True
            return self._json({})
        if self.down:
            self.close_connection = True
            return None
        return super()._answer(body)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("push")
    base = tiny.directory(root / "base")
    model = tiny.lora(AutoModelForCausalLM.from_pretrained(base), 1)
    model.peft_config["default"].base_model_name_or_path = "acme/base"
    model.save_pretrained(root / "adapter")
    tiny.tokenizer().save_pretrained(root / "adapter")
    with serve(_Handler) as hub:
        hub.commit("acme/base", base)
        script = f"ADAPTER = {str(root / 'adapter')!r}\n{WALK}"
        yield hub, walk(script, root, environment(root / "home", HF_ENDPOINT=hub.url))


def test_a_folder_is_pushed_and_loads_by_its_name(walked):
    hub, noted = walked
    code, said, there = noted["pushed"]
    assert (code, there, noted["loaded"]) == (0, True, 2)
    repository = hub.repositories[("models", "acme/tuned")]
    assert repository.access == "private"
    assert hub.url + "/acme/tuned/commit/" in said
    pushed = set(repository.commits[repository.branches["main"]]) - {".gitattributes"}
    assert pushed == set(noted["files"])
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= pushed
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in pushed)
    assert hub.asked("validate-yaml")  # the client had the card's front matter looked at
    card = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert "base_model: acme/base\n" in card


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("again", "acme/tuned is there already: name another one, or add a commit to it with `--push_to_existing`."),
        ("stranger", "was refused, for the token is not valid: log in"),
        ("elsewhere", "was refused, for this token may not write there: log in"),
        ("down", "the connection to the hub failed"),
    ],
)
def test_what_the_hub_refuses_is_said_and_the_folder_stays(walked, name, said):
    code, printed, there = walked[1][name]
    assert (code, there) == (1, True)
    assert said in printed
    assert "is written and stays: `hf upload " in printed
    assert "Traceback" not in printed


def test_without_a_token_nothing_is_begun(walked):
    assert walked[1]["nobody"][0::2] == [1, False]
    assert "`--push` needs a token" in walked[1]["nobody"][1]


def test_a_commit_is_added_to_what_is_there(walked):
    hub, noted = walked
    assert noted["added"][0] == 0, noted["added"]
    assert len(hub.repositories[("models", "acme/tuned")].commits) >= 2
