"""Feed broken files to what reads files, guided by the lines that run: `python tests/security/fuzz.py --minutes 5`.

Each target takes bytes, as a stranger's file would have them, and is read or refused with a `LitDPOError`. Anything
else is a finding: another exception, more than 10 seconds, more memory than 10 times the input and 500 MB. Findings are
kept as files; `corpus/` holds the small ones of the past, which the suite reads again (`test_corpus.py`).

With `--engine atheris` libFuzzer makes the inputs instead (`pip install atheris`), one target after another.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SECONDS = 10.0
MEGABYTES = 500
_OURS = f"{os.sep}lit_dpo{os.sep}"


class Finding(NamedTuple):
    """An input that was neither read nor refused as it should be."""

    target: str
    content: bytes
    what: str


# ---- what is fed ----


def readers(suffix: str) -> Callable[[bytes, Path], None]:
    """Rows of a text file, as `load_rows` reads them before it keeps them."""

    def read(content: bytes, folder: Path) -> None:
        from lit_dpo.data.sources.files import TEXT, suffix_of
        from lit_dpo.data.sources.text import lines_of

        path = folder / f"rows{suffix}"
        path.write_bytes(content)
        kind = TEXT[str(suffix_of(path))]
        for row in kind.read(lines_of(path, None, kind.newline), []):
            assert row.reason or row.text

    return read


def settings(content: bytes, folder: Path) -> None:
    """A configuration file of a policy and of data, as `--config` reads it."""
    from jsonargparse import ActionConfigFile

    from lit_dpo import LoRAPolicy, PreferenceDataModule
    from lit_dpo.parser import Parser

    (folder / "config.yaml").write_bytes(content)
    parser = Parser(exit_on_error=True)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(LoRAPolicy, "policy")
    parser.add_class_arguments(PreferenceDataModule, "data")
    try:
        parser.parse_args(["--config", str(folder / "config.yaml")])
    except SystemExit as stop:  # a mistake in the arguments, with a sentence
        if stop.code not in (1, 2):
            raise


def cache(content: bytes, folder: Path) -> None:
    """A part of a cache: an index, and values behind a mark."""
    from lit_dpo.references.store import LogpStore

    index, _, values = content.partition(b"VALUES")
    (folder / "part.index").write_bytes(index)
    (folder / "part.logps").write_bytes(values)
    store = LogpStore(folder)
    for entry in store._entries[:100]:
        assert store.get(entry["key"].tobytes()) is not None or store.damaged


def _adapter(folder: Path, name: str, content: bytes) -> None:
    from lit_dpo.hub import Place
    from lit_dpo.policy.adapter_checks import check_lora

    for file in (_seeds() / "adapter").iterdir():
        (folder / file.name).write_bytes(content if file.name == name else file.read_bytes())
    check_lora(Place(folder, str(folder), None, "policy.adapter_path"))


def adapter_config(content: bytes, folder: Path) -> None:
    """What an adapter says of itself."""
    _adapter(folder, "adapter_config.json", content)


def adapter_tensors(content: bytes, folder: Path) -> None:
    """The tensors of an adapter."""
    _adapter(folder, "adapter_model.safetensors", content)


def checkpoint(content: bytes, folder: Path) -> None:
    """The pickled part of a checkpoint, in an archive as torch writes it."""
    from lit_dpo import DPOModule
    from lit_dpo.checkpoint import hyper_parameters, only_known_classes, untrusting
    from lit_dpo.module import NAMED_IN_FILES

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("archive/data.pkl", content)
        for name, inside in {"version": b"3\n", "byteorder": b"little", "data/0": bytes(64)}.items():
            made.writestr(f"archive/{name}", inside)
    key = DPOModule.CHECKPOINT_HYPER_PARAMS_KEY
    with only_known_classes(hyper_parameters(archive, key), DPOModule, NAMED_IN_FILES):
        untrusting(archive, key)


def archive(content: bytes, folder: Path) -> None:
    """A whole checkpoint."""
    from lit_dpo.checkpoint import read_checkpoint

    read_checkpoint(io.BytesIO(content))


def record(content: bytes, folder: Path) -> None:
    """What an adapter's folder says of its run."""
    from lit_dpo.tools.trained import _said

    (folder / "lit_dpo.json").write_bytes(content)
    _said(folder)


def index(content: bytes, folder: Path) -> None:
    """The list of a model's files of weights."""
    from lit_dpo.hub import weight_names

    (folder / "model.safetensors.index.json").write_bytes(content)
    for name in weight_names(folder):
        assert (folder / name).resolve().parent == folder.resolve()


def template(content: bytes, folder: Path) -> None:
    """A chat template; what it raises by itself is a row's error."""
    from jinja2 import TemplateError

    from lit_dpo.data.sandbox import BoundedSandbox

    try:
        made = BoundedSandbox(trim_blocks=True, lstrip_blocks=True).from_string(content.decode("utf-8", "replace"))
        made.render(messages=[{"role": "user", "content": "hello"}], add_generation_prompt=True, eos_token="</s>")
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return
    except SyntaxError:  # of Python, for what Jinja lets through
        return


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "jsonl": readers(".jsonl"),
    "json": readers(".json"),
    "csv": readers(".csv"),
    "gz": readers(".jsonl.gz"),
    "config": settings,
    "cache": cache,
    "adapter_config": adapter_config,
    "adapter_tensors": adapter_tensors,
    "checkpoint": checkpoint,
    "archive": archive,
    "record": record,
    "index": index,
    "template": template,
}
_TOKENS = [
    *(b'{}[]",:\\\n\r\t;<>%&*!|-#', b"[" * 300, b'{"a":' * 300, b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\\ud83d",
        b'"../../x"',
        b'"/etc/passwd"',
        b'"os.system"',
    ),
    *(
        b"&a [*a,*a]",
        b"<<: *a",
        b"!!python/object/apply:os.system",
        b"class_path: ",
        b"init_args: ",
        b"{{ x }}",
        b"{% for",
    ),
    *(
        b"i in range(99)",
        b"%}{% endfor %}",
        b"|tojson",
        b" ~ ",
        b" * 99",
        b".format(",
        b"\x80\x02",
        b"cos\nsystem\n",
        b"R.",
    ),
    *(
        b"\x00" * 8,
        b"\xff" * 8,
        b"q\x01h\x01",
        b"VALUES",
        b'"r":1000000000',
        b'"weight_map"',
        b"role",
        b"chosen",
        b"a,b",
    ),
]


def _seeds() -> Path:
    """Files as they should be: an adapter of a tiny model."""
    folder = Path(tempfile.gettempdir()) / f"lit_dpo-fuzz-{os.getuid()}"
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
        tiny = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="tiny")
        get_peft_model(tiny, lora).save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
    return folder


def seeds(target: str) -> list[bytes]:
    """What a target is fed first, and what mutants are made of."""
    import gzip
    import pickle

    import numpy as np

    row = b'{"prompt": "a", "chosen": [{"role": "user", "content": "x"}], "rejected": "\\u00e9", "n": 1.5}\n'
    hyper = {"policy": {"class_path": "lit_dpo.LoRAPolicy", "init_args": {"model": "m", "r": 4}}, "optimizer": "a.b"}
    saved = {"hyper_parameters": hyper, "lit_dpo": {"base": {"model": "m"}}, "state_dict": {}, "epoch": 1}
    if target == "cache":
        from lit_dpo.references.store import LogpStore

        with tempfile.TemporaryDirectory() as folder:
            LogpStore(Path(folder)).put({bytes(range(16)): np.ones(3, np.float32), bytes(16): np.zeros(2, np.float32)})
            parts = [next(Path(folder).glob(f"*.{kind}")).read_bytes() for kind in ("index", "logps")]
        first = [b"VALUES".join(parts)]
    elif target == "archive":
        import torch

        stream = io.BytesIO()
        torch.save({**saved, "state_dict": {"a": torch.ones(3)}}, stream)
        first = [stream.getvalue()]
    elif target in ("adapter_config", "adapter_tensors"):
        name = "adapter_config.json" if target == "adapter_config" else "adapter_model.safetensors"
        first = [(_seeds() / "adapter" / name).read_bytes()]
    else:
        first = {
            "jsonl": [row * 2, b"[\n" + row + b"]"],
            "json": [b"[" + row + b"," + row + b"]", b'{"data": [' + row + b"]}", b'{"prompt":["a"],"chosen":["b"]}'],
            "csv": [b'prompt,chosen,rejected\na,"b ""c""\nd",e\n', b"a;b\n1;2\n"],
            "gz": [gzip.compress(row * 2)],
            "config": [b"policy:\n  model: m\n  r: 8\ndata:\n  train: &a x.jsonl\n  val: *a\n", b"policy: {model: m}"],
            "checkpoint": [pickle.dumps(saved, 2)],
            "record": [b'{"base": {"model": "m"}, "measures": {"a": 1.0}, "data": {"train": {"rows": 3}}}'],
            "index": [b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'],
            "template": [
                b"{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' + m.content|trim }}{% endfor %}{{ eos_token }}",
                b"{% set n = namespace(x=[]) %}{% for i in [1] %}{% set n.x = [i * 2] %}{% endfor %}{{ n.x|tojson }}",
                b"{% macro a(x) %}{{ '%s' % x }}{% endmacro %}{{ a('b').replace('b', 'cc')|indent(2) }}",
            ],
        }[target]
    kept = sorted((CORPUS / target).glob("*")) if (CORPUS / target).is_dir() else []
    return [*first, *(file.read_bytes() for file in kept)]


# ---- how it is judged ----


def _peak() -> int:
    """Megabytes that this process has had since `_forget`; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
    except (OSError, IndexError):
        return 0


def _forget() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _peak()


def judged(target: str, content: bytes) -> str | None:
    """Say what is wrong with how an input was read; None if nothing is."""
    from lit_dpo.errors import LitDPOError

    before, start, wrong = _forget(), time.monotonic(), None
    with tempfile.TemporaryDirectory() as folder:
        try:
            TARGETS[target](content, Path(folder))
        except LitDPOError as error:
            wrong = None if str(error).strip() else "an error without a sentence"
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
    if (took := time.monotonic() - start) > SECONDS:
        wrong = f"took {took:.0f} seconds"
    if (grown := _peak() - before) > MEGABYTES + 10 * len(content) / 1e6:
        wrong = f"took {grown} MB"
    return wrong


# ---- how inputs are made ----


class _Lines:
    """Which lines of the package have run."""

    def __init__(self) -> None:
        self.seen: set[tuple[object, int]] = set()

    def _line(self, frame: object, event: str, _: object) -> object:
        self.seen.add((frame.f_code, frame.f_lineno))  # type: ignore[attr-defined]
        return self._line

    def _call(self, frame: object, event: str, _: object) -> object:
        return self._line if _OURS in frame.f_code.co_filename else None  # type: ignore[attr-defined]

    def __enter__(self) -> _Lines:
        sys.settrace(self._call)  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


def mutant(rng: random.Random, known: list[bytes]) -> bytes:
    """Change an input in a few places, or put two of them together."""
    found = bytearray(rng.choice(known))
    for _ in range(1 << rng.randrange(5)):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + (1 << rng.randrange(7)))
        kind = rng.randrange(7)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:end]
        elif kind == 2:
            found[at:at] = found[at:end] * rng.randrange(1, 9)
        elif kind == 3:
            found[at:end] = rng.choice(_TOKENS)
        elif kind == 4:
            token = rng.choice(_TOKENS)
            found[at:at] = token[: rng.randrange(1, len(token) + 1)]
        elif kind == 5:
            other = rng.choice(known)
            found[at:end] = other[rng.randrange(len(other) + 1) :]
        else:
            found[at:end] = rng.randbytes(end - at)
    return bytes(found[: 1 << 16])


def fuzz(target: str, seconds: float, seed: int, findings: Path) -> tuple[int, int, int]:
    """Feed a target for a while; return how many inputs, lines of the package that they reached, and findings."""
    rng, known, lines, count, kept = random.Random(seed), seeds(target), _Lines(), 0, dict[str, int]()
    findings.mkdir(parents=True, exist_ok=True)
    fed, until = list(known), time.process_time() + seconds
    while time.process_time() < until:
        content = fed.pop() if fed else mutant(rng, known)
        (findings / f"{target}.last").write_bytes(content)  # what it was, if this process does not live on
        before = len(lines.seen)
        with lines:
            wrong = judged(target, content)
        count += 1
        if wrong is not None:
            name = wrong[:60].split("0x")[0]
            if name not in kept:
                (findings / f"{target}-{len(kept)}.bin").write_bytes(content)
                print(f"{target}: {wrong[:300]!r} ({target}-{len(kept)}.bin)", flush=True)
            kept[name] = kept.get(name, 0) + 1
        elif len(lines.seen) > before:
            known.append(content)
    (findings / f"{target}.last").unlink(missing_ok=True)
    return count, len(lines.seen), len(kept)


def _by_atheris(target: str, seconds: float, findings: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["lit_dpo"]):
        import lit_dpo.checkpoint
        import lit_dpo.data.sandbox
        import lit_dpo.data.sources
        import lit_dpo.module
        import lit_dpo.policy.adapter_checks
        import lit_dpo.tools.trained  # noqa: F401

    def one(content: bytes) -> None:
        if (wrong := judged(target, content)) is not None:
            raise AssertionError(wrong)

    first = findings / f"seeds-{target}"
    first.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds(target)):
        (first / str(number)).write_bytes(content)
    options = [f"-max_total_time={int(seconds)}", f"-artifact_prefix={findings}/{target}-", "-timeout=20"]
    atheris.Setup([sys.argv[0], str(first), *options, "-rss_limit_mb=6000", "-print_final_stats=1"], one)
    atheris.Fuzz()


def main() -> None:
    """Feed all targets, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time, of all targets together")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--engine", choices=("lines", "atheris"), default="lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "lit_dpo-findings")
    given = parser.parse_args()
    share = 60 * given.minutes / len(given.targets)
    if given.engine == "atheris":
        if len(given.targets) == 1:
            _by_atheris(given.targets[0], share, given.findings)
        for target in given.targets:  # libFuzzer ends its process
            again = [sys.executable, __file__, "--engine", "atheris", "--minutes", str(share / 60), "--targets", target]
            subprocess.run([*again, "--findings", str(given.findings)], check=False)
        return
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for target in given.targets:  # what they import is no part of what is measured
        judged(target, seeds(target)[0])
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.RLIM_INFINITY))
    total = 0
    for target in given.targets:
        count, reached, found = fuzz(target, share, given.seed, given.findings)
        total += found
        print(f"{target:16s} {count:8d} inputs {reached:6d} lines reached {found:4d} findings", flush=True)
    raise SystemExit(1 if total else 0)


if __name__ == "__main__":
    main()
