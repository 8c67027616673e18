"""While a class is asked in one thread, the others of a process go on as if nothing were (ties/this_thread.py)."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoints import FIXTURES
from tierewrite.ties import meta_model, this_thread

LOGGERS = ("transformers", "huggingface_hub", "torch", "transformers_modules")


def elsewhere(act: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def say(word: str) -> None:
    print(word)
    for name in LOGGERS:
        logging.getLogger(f"{name}.somewhere").error("%s by %s", word, name)
    warnings.warn(word, UserWarning, stacklevel=1)


def test_other_threads_are_heard_and_this_one_is_not(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # where caplog listens
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with meta_model.quiet():
            say("hidden")
            elsewhere(lambda: say("heard"))
        say("after")
    assert capsys.readouterr().out == "heard\nafter\n"
    assert list(dict.fromkeys(caplog.messages)) == [
        f"{word} by {name}" for word in ("heard", "after") for name in LOGGERS
    ]
    assert [str(one.message) for one in warned] == ["heard", "after"]


def test_weights_of_other_threads_are_filled_and_tied_while_a_model_is_built() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    config.tie_word_embeddings = True

    def theirs() -> bool:
        filled = torch.nn.init.constant_(torch.empty(4), 3.0)
        model = transformers.LlamaForCausalLM(config)
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        return filled is not None and bool((filled == 3).all()) and tied

    def model_class(_: object) -> bool:
        assert torch.nn.init.constant_(torch.empty(4), 3.0) is None  # here nothing is filled
        return bool(elsewhere(theirs))

    assert meta_model.build(model_class, config)[0] is True
    assert theirs()


def test_modules_of_other_threads_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_model, "MAX_MODULES", 2)

    def modules() -> None:
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(8)))

    meta_model.build(lambda _: elsewhere(modules), None)
    with pytest.raises(meta_model.TooLarge):
        meta_model.build(lambda _: modules(), None)


def test_what_another_thread_puts_back_too_late_is_inert() -> None:
    """As transformers' own `no_init_weights` and `redirect_stdout` do, where they began inside and end after."""
    taken: list[Any] = []

    def model_class(_: object) -> None:
        taken.extend((torch.nn.init.constant_, sys.stdout))

    original, out = torch.nn.init.constant_, sys.stdout
    with meta_model.quiet():
        meta_model.build(model_class, None)
    assert torch.nn.init.constant_ is original
    assert sys.stdout is out
    assert torch.equal(taken[0](torch.empty(2), 3.0), torch.full((2,), 3.0))
    assert taken[1].write("said") == 4


@pytest.mark.parametrize("begins", ["ours", "theirs"])
@pytest.mark.parametrize("ends", ["ours", "theirs"])
def test_filters_are_as_before_whichever_thread_begins_and_ends_first(begins: str, ends: str) -> None:
    before = warnings.filters[:]
    both = {"theirs": warnings.catch_warnings(), "ours": this_thread.warning_of_nothing(others_stay=False)}
    for name in sorted(both, key=lambda name: name != begins):
        both[name].__enter__()
    for name in sorted(both, key=lambda name: name != ends):
        both[name].__exit__(None, None, None)
    assert warnings.filters == before


def test_filters_of_what_is_imported_for_a_class_stay(tmp_path: Path) -> None:
    """The user's later `import torch` finds it imported, and would lack the filters that it makes for itself."""
    imports = "import transformers, torch; from transformers import PreTrainedModel"
    asked = f"import tierewrite; tierewrite.plan({str(FIXTURES / 'qwen3_tied_bf16' / 'naive')!r})"
    shown = "import warnings; print([str(one) for one in warnings.filters if 'torch' in str(one)])"
    said = [
        subprocess.run(
            [sys.executable, "-c", f"{first}\n{shown}"],
            cwd=Path(__file__).parent.parent,
            env={"TIEREWRITE_CACHE": "", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for first in (imports, asked)
    ]
    assert set(eval(said[0])) <= set(eval(said[1]))
    assert "torch" in said[0]


def test_a_process_that_is_forked_while_a_class_is_asked_can_ask_one_too() -> None:
    """A server forks its workers while a thread of its own plans."""
    script = """
import os, threading
from tierewrite.ties import model_class
holding, over = threading.Event(), threading.Event()
def ask():
    with model_class._BUILD_LOCK:
        holding.set()
        over.wait()
asking = threading.Thread(target=ask)
asking.start()
holding.wait()
child = os.fork()
if child == 0:
    os._exit(0 if model_class._BUILD_LOCK.acquire(blocking=False) else 1)
status = os.waitpid(child, 0)[1]
assert not model_class._BUILD_LOCK.acquire(blocking=False)  # here it is still held
over.set()
asking.join()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=root, check=False).returncode == 0
