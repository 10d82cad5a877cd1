from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from zlib import crc32

import pytest
import torch
from jaxtyping import config, install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup is what its name says
torch.set_num_threads(1)  # tiny tensors: on a busy machine a second thread costs a hundred times what it gives

PACKAGE = Path(__file__).parents[1] / "src" / "apportion"
CHECKED = [f"apportion.{path.stem}" for path in PACKAGE.glob("[!_]*") if path.stem != "kernels"]
TRITON = {"triton_kernels", "triton_gradients"}
CHECKED += [f"apportion.kernels.{path.stem}" for path in PACKAGE.glob("kernels/*.py") if path.stem not in TRITON]
"""Rooms and files whose annotations are checked, shapes too. Triton compiles the source of its kernels as it stands."""
install_import_hook(CHECKED, "checked.check")
config.update("jaxtyping_disable", os.environ.get("JAXTYPING_DISABLE", "1"))  # twice the time: 0 in CI


OUTCOMES: dict[str, dict[str, int]] = defaultdict(lambda: {"tried": 0, "survived": 0, "did not come about": 0})
"""Of every family of trials (tests/faults/trials.py)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", metavar="FILE", help="write how many trials of each family there were, and held")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked few(n) n cases run always, which their names decide, and the others are slow."""
    cases = defaultdict(list)
    for item in items:
        if (mark := item.get_closest_marker("few")) and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    for (_, n), of in cases.items():
        for item in sorted(of, key=lambda item: crc32(item.name.encode()))[n:]:
            item.add_marker(pytest.mark.slow)


def pytest_itemcollected(item: pytest.Item) -> None:
    if mark := item.get_closest_marker("fault"):  # so that the report says it, also where another process runs it
        item.user_properties.append(("family", mark.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    said = dict(report.user_properties)
    if "family" not in said:
        return
    outcomes = OUTCOMES[str(said["family"])]
    if report.skipped and report.when in ("setup", "call"):
        outcomes["did not come about"] += 1
    elif report.when == "call" or (report.when == "setup" and report.failed):
        count = said.get("trials", 1)
        assert isinstance(count, int)
        outcomes["tried"] += count
        outcomes["survived"] += count * report.passed


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--faults-json")
    if file is not None and not hasattr(session.config, "workerinput"):  # a worker of pytest-xdist counts nothing
        Path(file).write_text(json.dumps(OUTCOMES, indent=1) + "\n")


SENTENCES = [
    "the cat sat on the mat and looked at the dog",
    "a dog ran over the hill to see the old house by the sea",
    "the sea was calm and the sun was warm on the old stones",
    "she read a book about ships and the people who sailed them",
]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (3 layers, width 32) and a word-level tokenizer that adds BOS, made offline."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
