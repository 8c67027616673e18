"""Signals are remembered, and raised once, where that does no harm (tierewrite/interrupts.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.checkpoints import FIXTURES
from tests.faults import REPOSITORY, names_in
from tierewrite import interrupts
from tierewrite.errors import Interrupted, TierewriteError

MAIN = [sys.executable, "-c", "from tierewrite.cli import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


pytestmark = pytest.mark.usefixtures("handlers")


def send(signum: int = signal.SIGTERM) -> None:
    signal.raise_signal(signum)


def of_module(name: str, act: Callable[[], None]) -> Callable[[], None]:
    """`act` as a function of a module `name` would do it."""
    module = types.ModuleType(name)
    exec("def call(act):\n    act()\n", module.__dict__)
    return lambda: module.call(act)


@pytest.mark.parametrize("signum", interrupts.SIGNALS)
def test_each_of_them_ends_a_command_and_is_no_exception(signum: signal.Signals) -> None:
    with pytest.raises(Interrupted) as stopped:
        send(signum)
    assert stopped.value.exit_code == 128 + signum
    assert not isinstance(stopped.value, (Exception, TierewriteError))


def test_one_that_somebody_swallows_is_raised_again_at_our_next_step() -> None:
    with contextlib.suppress(BaseException):
        send()
    with pytest.raises(Interrupted, match="signal 15"):
        interrupts.check()


def test_a_second_one_changes_nothing() -> None:
    with pytest.raises(Interrupted):
        send(signal.SIGINT)
    send(signal.SIGTERM)
    stopped = interrupts.pending()
    assert stopped is not None
    assert stopped.exit_code == 130


@pytest.mark.parametrize("module", ["threading", "queue", "concurrent.futures._base", "importlib._bootstrap"])
def test_none_is_raised_while_a_lock_is_taken_or_a_module_imported_but_soon_after(module: str) -> None:
    went_on = []

    def act() -> None:
        send()
        went_on.append(True)

    of_module(module, act)()
    assert went_on
    with pytest.raises(Interrupted):
        signal.pause()


def test_a_wait_for_other_threads_is_ended_and_its_lock_given_back() -> None:
    event = threading.Event()
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(Interrupted):
        event.wait()
    timer.join()
    event.set()  # takes the same lock


def test_workers_whose_results_are_waited_for_can_end() -> None:
    go = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(go.wait) for _ in range(2)]
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(Interrupted):
            futures[0].result()
        go.set()
        timer.join()
    assert [future.result() for future in futures] == [True, True]


def test_one_that_a_destructor_swallows_is_raised_soon_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Dying:
        def __del__(self) -> None:
            send()

    dying = Dying()
    del dying
    with pytest.raises(Interrupted):
        signal.pause()
    assert capsys.readouterr().err == ""


def test_held_back_it_comes_afterwards() -> None:
    steps = []

    def swap() -> None:
        with interrupts.held():
            send(signal.SIGHUP)
            steps.append("both renames")

    with pytest.raises(Interrupted):
        swap()
    assert steps == ["both renames"]


def test_held_back_from_a_handler_of_the_callers_too() -> None:
    arrived: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: arrived.append(signum))
    with interrupts.held():
        send()
        assert arrived == []
    assert arrived == [signal.SIGTERM]


def test_how_things_stand_is_said_also_after_the_work() -> None:
    with interrupts.standing() as said:
        said.append("the rewrite is complete")
    with pytest.raises(Interrupted, match="stopped by signal 15; the rewrite is complete"):
        send()
    interrupts.reset()
    with interrupts.standing(), interrupts.standing() as said:  # a rewrite in a batch
        said.append("the rewrite is complete")
    with pytest.raises(Interrupted, match="nothing half-done was left behind"):
        send()


def test_without_our_handlers_nothing_is_ever_raised() -> None:
    interrupts.reset()
    interrupts.check()
    assert interrupts.pending() is None


# ------------------------------------------------------------------------------------------------- whole commands


def tied(folder: Path) -> list[str | Path]:
    """Arguments of a rewrite that asks no class."""
    ties = folder / "ties.json"
    ties.write_text('{"lm_head": "model.embed_tokens"}')
    return [FIXTURES / "qwen3_tied_bf16" / "naive", folder / "out", "--ties", ties, "-q"]


SWALLOWING = """
import os, signal, sys
class Finder:
    '''Any library that tries something and goes on without it.'''
    def find_spec(self, name, path, target=None):
        if name == 'blake3':
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(10_000_000 // 100): pass
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
from tierewrite.cli import main
main()
"""


def test_a_command_ends_though_a_library_swallows_the_signal(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SWALLOWING, "rewrite", *tied(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout) == (143, ""), done
    assert done.stderr == "tierewrite: stopped by signal 15; nothing half-done was left behind\n"
    assert names_in(tmp_path) == ["ties.json"]


def test_stopped_after_the_rewrite_a_command_says_that_it_is_complete(tmp_path: Path) -> None:
    """The signal arrives when the rewrite has returned, and the command has not yet ended."""
    code = (
        "import signal, tierewrite\n"
        "from tierewrite.cli import main\n"
        "rewrite = tierewrite.rewrite\n"
        "def rewritten(*given, **options):\n"
        "    report = rewrite(*given, **options)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    return report\n"
        "tierewrite.rewrite = rewritten\n"
        "main()\n"
    )
    arguments = [sys.executable, "-c", code, "rewrite", *tied(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout) == (143, ""), done
    assert done.stderr == "tierewrite: stopped by signal 15; the rewrite is complete\n"
    assert names_in(tmp_path) == ["out", "ties.json"]


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from tierewrite import interrupts\n"
        "install = interrupts.install\n"
        "def installed(): install(); signal.raise_signal(signal.SIGHUP)\n"
        "interrupts.install = installed\n"
        "from tierewrite.cli import main\n"
        "main()\n"
    )
    arguments = [sys.executable, "-c", code, "rewrite", *tied(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert names_in(tmp_path) == ["out", "ties.json"]


def test_while_it_starts_a_command_prints_no_traceback(tmp_path: Path) -> None:
    """The signal arrives when a module is looked for, one after the other: from the first of ours on."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    left = int(sys.argv.pop(1))\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        Finder.left -= 1\n"
        "        if Finder.left == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "from tierewrite.cli import main\n"
        "sys.meta_path.insert(0, Finder())\n"
        "main()\n"
    )
    for number in (1, 2, 3, 5, 8, 13, 40, 120):
        arguments = [sys.executable, "-c", code, str(number), "rewrite", *tied(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
        assert done.returncode == 130, (number, done)
        assert "Traceback" not in done.stderr, (number, done)
        assert names_in(tmp_path) == ["ties.json"], number


def test_importing_the_command_line_imports_next_to_nothing() -> None:
    """So long a signal meets Python's own handlers."""
    code = "import sys; before = set(sys.modules); import tierewrite.cli; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.split() == ["__future__", "tierewrite", "tierewrite.cli"]
