"""Fixtures for all tests."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported: two processes with two threads each slow each other tenfold on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes prepares to compile functions that no test runs on its way: 1.5 s of each process that imports it
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
from filelock import FileLock

gc.disable()  # while tests are collected: their imports make a million objects, and no garbage


def pytest_collection_finish() -> None:
    """What is there by now is looked through no more, and what tests leave seldom: each look takes 0.1 s."""
    gc.freeze()
    gc.set_threshold(2000, 10, 50)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture draws does not depend on what ran before it: a run of some tests has the numbers of all."""
    _draw_anew()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Nor does what a test draws depend on which of its fixtures are there already."""
    _draw_anew()


def _draw_anew() -> None:
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes 80 µs, for devices that are not there
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where tests marked `gpu` run; `cpu` rehearses them, with an emulation of the variable-length kernel",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n` the tests of a file go to one worker, in the order of files: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # else long files of few tests come last
    return LoadFileScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """Send a worker's warning on as text: else the process that reports imports Lightning and PEFT for its class."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        warning_message.message, warning_message.category = str(warning_message.message), UserWarning


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop() -> Iterator[Any]:
    """Fork the server of processes, if a test may ask for one, before the first test has started anything."""
    if "ranks" in sys.modules:
        import forking

        forking.serve()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A rehearsal is of the lines of a test: its first and last cases are enough, as the laws are the CPU's already."""
    if config.getoption("--gpu-device") != "cpu":
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    between = {id(item) for every in cases.values() for item in every[1:-1]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in between])
    items[:] = [item for item in items if id(item) not in between]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With `-n`, a worker takes neighbouring tests: what a file sets up once is rarely set up in two processes."""
    if config.getoption("numprocesses", None) and config.getoption("dist") == "no":
        config.option.dist = "worksteal"


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The device of tests that need a GPU: a `torch.device`."""
    import torch

    if request.config.getoption("--gpu-device") == "cpu":
        from kernel import emulate

        emulate(monkeypatch)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; `--gpu-device cpu` rehearses it")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def kernel_calls(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The dtype of each call of the variable-length kernel, in a list that grows."""
    from lit_dpo.logps import attention

    calls, varlen = [], attention._varlen

    def counted(query: Any, *given: Any) -> Any:
        calls.append(query.dtype)
        return varlen(query, *given)

    monkeypatch.setattr(attention, "_varlen", counted)
    return calls


_RUN = ("PL_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")
_BEFORE = frozenset(os.environ)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Begin without what a run has left, a session's fixture for instance, and end as it was."""
    for name in [name for name in os.environ.keys() - _BEFORE if name.startswith(_RUN)]:
        del os.environ[name]
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test leaves in the environment (Lightning a seed, a port, a rank) is not the next test's."""
    with _as_it_was():
        yield


@pytest.fixture(autouse=True, scope="module")
def _environment_of_module() -> Iterator[None]:
    """Nor what the fixtures of a file leave the next file's: a process of two ranks would take that seed."""
    with _as_it_was():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, tokenizers and referee numbers; tests that need it skip where it is not."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of shared data next to the repository")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder once for all workers of `-n`: `once(name, fill)`. What costs half a minute is not made by both."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, fill: Callable[[Path], None]) -> Path:
        folder = root / f"once-{name}"
        with FileLock(root / f"once-{name}.lock"):
            if not (folder / ".whole").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / ".whole").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The embedded model and preferences, built once and cached."""
    from lit_dpo.quickstart import quickstart_directory

    return quickstart_directory()


@pytest.fixture(scope="session")
def quickstart_run(once: Callable[[str, Callable[[Path], None]], Path], quickstart: Path) -> Path:
    """The folder of a short run of `lit-dpo fit`: the quickstart in NF4, quicker than it comes. It is read only."""
    return once("quickstart-run", _train_quickstart) / "version_0"


def _train_quickstart(root: Path) -> None:
    from lit_dpo.cli import main

    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    changes = {
        "max_epochs": "1",
        "limit_train_batches": "24",
        "callbacks": "[training.Unestimated]",
        "enable_progress_bar": "false",
        "logger.save_dir": str(root),
    }
    typed = [word for name, value in changes.items() for word in (f"--trainer.{name}", value)]
    main(["fit", "--config", str(config), "--model.optimizer.lr", "3e-3", *typed])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer, saved as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    directory = tmp_path_factory.mktemp("tiny") / "model"
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs of strings, of different lengths: an odd number, so that every last batch has a tail."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"How many are {number}?",
            "chosen": " Exactly " + "one, " * (number % 4) + f"{number}.",
            "rejected": " No" + " idea" * (number % 3) + "!",
        }
        for number in range(21)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
