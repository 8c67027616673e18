"""The Ray engine on a real cluster of two worker nodes: the local engine's bytes, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.benchmarks.generate import PRESETS, Generated, generate
from tests.checkpoints import edit_tensors, read_tensors
from tests.s3_server import Store
from tierewrite import engines, errors, interrupts
from tierewrite.engines import on_ray
from tierewrite.engines.progress import Progress
from tierewrite.errors import Interrupted, SourceChanged, SystemFailure, TierewriteError, UsageError
from tierewrite.output.result import BUFFER_BYTES
from tierewrite.source.table import STAGING_MARK_NAME

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

ROOT = Path(__file__).parent.parent
FAULTS = Path(__file__).parent / "ray_faults"
Naive = Callable[[str], Path]


class Cluster:
    """A head without CPUs, where drivers connect, and nodes of one CPU; and what goes wrong in their workers."""

    def __init__(self, faults: Path) -> None:
        self.faults = faults
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), str(ROOT)]))
            patch.setenv("TIEREWRITE_TEST_FAULTS", str(faults))
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            self.ray = cluster_utils.Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20},
            )
            self.add_node()
            self.add_node()
        self.address: str = self.ray.address

    def add_node(self) -> None:
        self.ray.add_node(num_cpus=1, object_store_memory=100 << 20)

    def goes_wrong(self, action: str, file: str = "", at: str = "half", **more: Any) -> None:
        (self.faults / "plan.json").write_text(json.dumps({"action": action, "file": file, "at": at, **more}))

    def marks(self) -> list[dict[str, Any]]:
        """Process and node of each time that it went wrong."""
        return [json.loads(path.read_text()) for path in sorted(self.faults.glob("*.mark"))]

    def recover(self) -> None:
        for path in self.faults.iterdir():
            path.unlink()


@pytest.fixture(scope="module", autouse=True)
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its files, the address of the latest cluster among them: these tests have one of their own."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:  # short: sockets
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield Path(folder)


@pytest.fixture(scope="module")
def whole_cluster(ray_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("faults"))
    yield made
    made.ray.shutdown()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    assert not ray.is_initialized()
    yield whole_cluster
    assert not ray.is_initialized()
    whole_cluster.recover()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    """A checkpoint with tensors larger than a buffer."""
    recipe = replace(PRESETS["tiny"], experts=192, vocabulary=40_000, max_shard_bytes=12_000_000)
    made = generate(tmp_path_factory.mktemp("made") / "naive", recipe)
    assert made.largest_tensor > 2 * BUFFER_BYTES
    return made


@pytest.fixture(scope="module")
def right(made: Generated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the local engine makes of it, in three shards."""
    out = tmp_path_factory.mktemp("right") / "out"
    tierewrite.rewrite(made.path, out, ties=made.ties_file, max_shard_size=SHARD)
    files = contents(out)
    assert len([name for name in files if name.endswith(".safetensors")]) == 3
    return files


SHARD = "21MB"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def on_cluster(cluster: Cluster, made: Generated, dst: Path, **options: Any) -> tierewrite.Report:
    return tierewrite.rewrite(
        made.path, dst, ties=made.ties_file, max_shard_size=SHARD, engine="ray", ray_address=cluster.address, **options
    )


class OneWritten(Progress):
    """Calls back once the first shard is written."""

    def __init__(self, back: Callable[[], None]) -> None:
        self.back = back
        self.writing = False

    def start(self, phase: str, total: int) -> None:
        self.writing = phase == "rewriting"

    def advance(self, nbytes: int) -> None:
        if self.writing and nbytes:
            self.writing = False
            self.back()


def until(true: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ------------------------------------------------------------------------------------------------- equal bytes


def uncalibrated(src: Path) -> None:
    sides = ("model.encoder.language_model", "model.decoder")
    edit_tensors(src, {f"{side}.layers.1.experts.2.down_proj.input_scale": None for side in sides})


@pytest.mark.parametrize(
    ("case", "options", "change"),
    [
        ("dg_nvfp4_sharded", {"max_shard_size": "10KB", "verify": True}, None),
        ("dg_nvfp4", {"max_shard_size": "20KB", "unify_fused_scales": True}, None),
        ("dg_nvfp4", {"max_shard_size": "20KB", "fill_missing_scales": True}, uncalibrated),
        ("dg_nvfp4_encoder_bf16", {"on_mismatch": "keep"}, None),
        ("qwen3_tied_but_diverged_bf16", {"on_mismatch": "keep"}, None),
        ("bart_bf16", {"max_shard_size": "5KB"}, None),
    ],
)
def test_every_file_is_what_the_local_engine_writes(
    case: str,
    options: dict[str, Any],
    change: Callable[[Path], None] | None,
    copied: Naive,
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    src = copied(case)
    if change is not None:
        change(src)
    here = tierewrite.rewrite(src, tmp_path / "here", **options)
    there = tierewrite.rewrite(src, tmp_path / "there", engine="ray", ray_address=cluster.address, **options)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert there.device == "Ray, 2 nodes, 2 CPUs"
    assert replace(there, device="", dst="") == replace(here, device="", dst="")
    assert names_in(tmp_path) == sorted(["here", src.name, "there"])


def test_tensors_larger_than_a_buffer(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    on_cluster(cluster, made, tmp_path / "out")
    assert contents(tmp_path / "out") == right


def test_progress_adds_up_task_by_task(cluster: Cluster, made: Generated, tmp_path: Path) -> None:
    class Watch(Progress):
        phases: dict[str, list[int]]

        def start(self, phase: str, total: int) -> None:
            self.phases[phase] = self.now = [total]

        def advance(self, nbytes: int) -> None:
            if nbytes:
                self.now.append(nbytes)

    watch = Watch()
    watch.phases = {}
    on_cluster(cluster, made, tmp_path / "out", progress=watch)
    total, *steps = watch.phases["rewriting"]
    assert len(steps) == 3
    assert sum(steps) == total == sum(len(tensor[2]) for tensor in read_tensors(tmp_path / "out").values())


def test_a_connection_that_the_caller_made_is_used_and_left(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        tierewrite.rewrite(made.path, tmp_path / "out", ties=made.ties_file, max_shard_size=SHARD, engine="ray")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert contents(tmp_path / "out") == right


# ------------------------------------------------------------------------------------------------- what dies


def test_worker_killed_in_the_middle(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.goes_wrong("kill", SECOND, times=1)
    on_cluster(cluster, made, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    (killed,) = cluster.marks()
    assert ended(killed["pid"])
    assert contents(tmp_path / "out") == right
    assert names_in(tmp_path) == ["out"]


def test_worker_killed_while_it_hashes(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    cluster.goes_wrong("kill", times=2)
    on_cluster(cluster, made, tmp_path / "out")
    assert len(cluster.marks()) == 2
    assert contents(tmp_path / "out") == right


def test_node_removed_in_the_middle(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone: dict[str, Any] = {}

    def remove() -> None:
        until(cluster.marks)
        gone.update(cluster.marks()[0])
        (node,) = (n for n in cluster.ray.worker_nodes if n.node_id == gone["node"])
        cluster.ray.remove_node(node, allow_graceful=False)

    cluster.goes_wrong("wait", FIRST, times=1)
    try:
        on_cluster(cluster, made, tmp_path / "out", progress=OneWritten(remove))
        assert capfd.readouterr() == ("", "")
        assert len(cluster.ray.worker_nodes) == 1
        assert ended(gone["pid"])
        assert contents(tmp_path / "out") == right
        assert names_in(tmp_path) == ["out"]
    finally:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), str(ROOT)]))
            patch.setenv("TIEREWRITE_TEST_FAULTS", str(cluster.faults))
            cluster.add_node()
        cluster.ray.wait_for_nodes(60)  # the head is some time in noticing that one has gone


def start_cli(cluster: Cluster, made: Generated, dst: Path, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tierewrite", "rewrite", str(made.path), str(dst), "--ties", str(made.ties_file)]
    argv += ["--max-shard-size", SHARD, "--engine", "ray", "--ray-address", cluster.address, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_driver_killed_and_the_run_resumed(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    staging = tmp_path / ".out.tierewrite"
    cluster.goes_wrong("deaf", SECOND)
    driver = start_cli(cluster, made, tmp_path / "out")
    until(lambda: cluster.marks() and {FIRST, THIRD} <= set(names_in(staging)))
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    (waiting,) = cluster.marks()
    until(lambda: ended(waiting["pid"]))  # Ray ends the workers of a driver that is gone
    assert names_in(tmp_path) == [staging.name]
    parts = set(names_in(staging)) - {FIRST, THIRD, STAGING_MARK_NAME}  # none, if the worker had the time to tidy up
    assert all(name.startswith(f"{SECOND}.") and name.endswith(".part") for name in parts)
    (staging / f"{SECOND}.0123456789abcdef.part").write_bytes(b"half")
    (staging / "model-00001-of-00009.safetensors").write_bytes(b"by a driver with other options")
    before = {name: (staging / name).stat() for name in (FIRST, THIRD)}
    cluster.recover()
    again = start_cli(cluster, made, tmp_path / "out", "--resume", "--json")
    out, err = again.communicate(timeout=120)
    assert (again.returncode, err) == (0, "")
    assert json.loads(out)["device"] == "Ray, 2 nodes, 2 CPUs"
    assert contents(tmp_path / "out") == right
    assert names_in(tmp_path) == ["out"]
    for name, was in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns), name


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_tasks_and_leaves_nothing(
    signum: signal.Signals, code: int, cluster: Cluster, made: Generated, tmp_path: Path
) -> None:
    cluster.goes_wrong("wait", SECOND)
    driver = start_cli(cluster, made, tmp_path / "out", "--quiet")
    until(cluster.marks)
    driver.send_signal(signum)
    out, err = driver.communicate(timeout=120)
    assert (driver.returncode, out) == (code, ""), err
    assert err == f"tierewrite: stopped by signal {int(signum)}; nothing half-done was left behind\n"
    assert names_in(tmp_path) == []


@pytest.mark.long
def test_signals_at_random_instants_end_the_tasks_and_leave_nothing(
    cluster: Cluster, made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    began = time.monotonic()
    assert start_cli(cluster, made, tmp_path / "out", "--quiet").wait(120) == 0
    lasted = time.monotonic() - began
    for number in range(int(os.environ.get("SIGNALS", "200"))):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        chance = random.Random(number)
        signum = chance.choice(interrupts.SIGNALS)
        driver = start_cli(cluster, made, tmp_path / "out", "--quiet")
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(chance.uniform(0.3, 1.05 * lasted))
        driver.send_signal(signum)
        out, err = driver.communicate(timeout=120)
        assert driver.returncode in (0, 128 + signum), (number, signum, err)
        assert out == "", number
        for word in ("Traceback", "Exception ignored", "internal error"):
            assert word not in err, (number, signum, err)
        complete = driver.returncode == 0 or "the rewrite is complete" in err  # Ray's own end takes a while
        assert names_in(tmp_path) == (["out"] if complete else []), (number, signum, err)
        assert not complete or contents(tmp_path / "out") == right, number


# ------------------------------------------------------------------------------------------------- what fails for good


def test_a_task_that_always_fails_ends_in_exit_5_with_its_cause(
    cluster: Cluster, made: Generated, tmp_path: Path
) -> None:
    cluster.goes_wrong("raise", SECOND)
    driver = start_cli(cluster, made, tmp_path / "out", "--json")
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 5
    assert "the cat sat on the keyboard" in err
    assert SECOND in err
    assert json.loads(out)["error"]["exit_code"] == 5
    assert len(cluster.marks()) == 1  # an error is no death: it is not tried again
    assert names_in(tmp_path) == []


def test_a_worker_that_always_dies_is_given_up(cluster: Cluster, made: Generated, tmp_path: Path) -> None:
    cluster.goes_wrong("kill", THIRD)
    with pytest.raises(SystemFailure, match=r"model-00003-of-00003.*WorkerCrashedError") as failed:
        on_cluster(cluster, made, tmp_path / "out")
    assert failed.value.exit_code == 5
    assert len(cluster.marks()) == 4
    assert names_in(tmp_path) == []


def test_a_task_that_cannot_be_interrupted_is_killed(
    cluster: Cluster, made: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_CANCEL_SECONDS", 3)

    class Impatient(Exception):
        pass

    def stop() -> None:
        until(cluster.marks)
        raise Impatient

    cluster.goes_wrong("deaf", SECOND)
    with pytest.raises(Impatient):
        on_cluster(cluster, made, tmp_path / "out", progress=OneWritten(stop))
    (deaf,) = cluster.marks()
    assert ended(deaf["pid"])
    assert names_in(tmp_path) == []


def test_a_progress_that_raises_stops_a_run_whose_tasks_are_slow(
    cluster: Cluster, made: Generated, tmp_path: Path
) -> None:
    class Impatient(Exception):
        pass

    class Stop(Progress):
        def advance(self, nbytes: int) -> None:
            if cluster.marks():
                raise Impatient

    cluster.goes_wrong("wait")  # nothing ends
    with pytest.raises(Impatient):
        on_cluster(cluster, made, tmp_path / "out", progress=Stop())
    assert names_in(tmp_path) == []


def test_our_own_error_arrives_as_it_was_raised(cluster: Cluster, copied: Naive, tmp_path: Path) -> None:
    src = copied("bart_bf16")
    shard = src / "model.safetensors"

    class Touch(Progress):
        """Changes a shard just before it is read again."""

        def start(self, phase: str, total: int) -> None:
            if phase == "rewriting":
                os.utime(shard, ns=(1, 1))

    with pytest.raises(SourceChanged, match="run again when nothing writes to it") as changed:
        tierewrite.rewrite(src, tmp_path / "out", engine="ray", ray_address=cluster.address, progress=Touch())
    assert (changed.value.exit_code, changed.value.file) == (5, str(shard))
    assert names_in(tmp_path) == [src.name]


def test_a_node_that_does_not_see_src_is_named(cluster: Cluster, copied: Naive, tmp_path: Path) -> None:
    src = copied("bart_bf16")
    shard = src / "model.safetensors"

    class Remove(Progress):
        def start(self, phase: str, total: int) -> None:
            if phase == "rewriting":
                shard.unlink()

    with pytest.raises(SystemFailure, match=r"ENOENT.*has to see SRC and DST") as unseen:
        tierewrite.rewrite(src, tmp_path / "out", engine="ray", ray_address=cluster.address, progress=Remove())
    assert unseen.value.file == str(shard)
    assert socket.gethostname() in str(unseen.value)
    assert names_in(tmp_path) == [src.name]


@pytest.mark.parametrize(
    ("action", "message"),
    [("lack", "does not have tierewrite: install it on every node"), ("older", r"has tierewrite 0\.0\.9, and this is")],
)
def test_nodes_without_this_tierewrite(
    action: str, message: str, cluster: Cluster, made: Generated, tmp_path: Path
) -> None:
    cluster.goes_wrong(action)
    with pytest.raises(SystemFailure, match=message):
        on_cluster(cluster, made, tmp_path / "out")
    assert names_in(tmp_path) == []


def test_cuda_without_a_gpu_in_the_cluster_is_refused(cluster: Cluster, made: Generated, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no node of the Ray cluster has one"):
        on_cluster(cluster, made, tmp_path / "out", device="cuda")
    assert names_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------- connecting


def cli(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tierewrite", *map(str, argv)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_without_a_cluster_one_is_started_and_ended_and_nothing_is_printed(
    made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    argv = ("rewrite", made.path, tmp_path / "out", "--ties", made.ties_file, "--max-shard-size", SHARD, "--json")
    done = cli(*argv, "--engine", "ray", "--ray-address", "local")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["device"].startswith("Ray, 1 node, ")
    assert contents(tmp_path / "out") == right


def test_without_an_address_the_latest_cluster_of_this_machine_is_used(
    cluster: Cluster, naive: Naive, tmp_path: Path
) -> None:
    done = cli("rewrite", naive("bart_bf16"), tmp_path / "out", "--engine", "ray", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "Ray, 2 nodes, 2 CPUs"


def test_without_an_address_a_cluster_that_is_gone_is_passed_over(
    closed_port: int, naive: Naive, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        latest = Path(folder) / "ray" / "ray_current_cluster"
        latest.parent.mkdir()
        latest.write_text(f"127.0.0.1:{closed_port}")
        done = cli("rewrite", naive("bart_bf16"), tmp_path / "out", "--engine", "ray", "--json", RAY_TMPDIR=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"].startswith("Ray, 1 node, ")


def test_tasks_share_the_gpus_of_a_cluster_and_do_without_where_cupy_does_not_work(
    made: Generated, right: dict[str, bytes], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"ties": made.ties_file, "max_shard_size": SHARD, "engine": "ray"}
    ray.init(address="local", num_cpus=2, num_gpus=1, object_store_memory=100 << 20, include_dashboard=False)
    try:
        report = tierewrite.rewrite(made.path, tmp_path / "out", **options)
        assert report.device == "Ray, 1 node, 2 CPUs, 1 GPU"
        assert contents(tmp_path / "out") == right
        if tierewrite.digest.select("auto").device == "cpu":
            with pytest.raises(UsageError, match="needs a GPU on which CuPy works"):
                tierewrite.rewrite(made.path, tmp_path / "none", device="cuda", **options)
            assert names_in(tmp_path) == ["out"]
    finally:
        ray.shutdown()


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such.invalid:1", "nonsense"])
@pytest.mark.parametrize("how", ["option", "environment"])
def test_no_cluster_at_the_address(
    address: str, how: str, closed_port: int, naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address.format(port=closed_port)
    options = {"ray_address": address}
    if how == "environment":
        monkeypatch.setenv("RAY_ADDRESS", options.pop("ray_address"))
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is asked, which tries for minutes"))
    with pytest.raises(SystemFailure, match="cannot connect to a Ray cluster at") as failed:
        tierewrite.rewrite(naive("bart_bf16"), tmp_path / "out", engine="ray", **options)
    assert address in str(failed.value)
    assert "ray start --head" in str(failed.value)
    assert names_in(tmp_path) == []


def test_something_else_listens_at_the_address(naive: Naive, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = cli("rewrite", naive("bart_bf16"), tmp_path / "out", "--engine", "ray", "--ray-address", address)
    assert done.returncode == 5
    assert f"cannot connect to a Ray cluster at '{address}'" in done.stderr
    assert "Traceback" not in done.stderr
    assert names_in(tmp_path) == []


def test_without_ray_the_extra_is_named(naive: Naive, tmp_path: Path) -> None:
    (tmp_path / "hidden" / "ray").mkdir(parents=True)
    (tmp_path / "hidden" / "ray" / "__init__.py").write_text("raise ModuleNotFoundError('No module named ray')")
    path = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)])
    done = cli("rewrite", naive("bart_bf16"), tmp_path / "out", "--engine", "ray", PYTHONPATH=path)
    assert done.returncode == 2
    assert "pip install 'tierewrite[ray]'" in done.stderr
    assert names_in(tmp_path) == ["hidden"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "local", "ray_address": "auto"}, 'belongs to engine="ray"'),
        ({"engine": "ray", "threads": 2}, "belongs to the local engine"),
        ({"engine": "ray", "device": "tpu"}, "there is no device 'tpu'"),
        ({"engine": "dask"}, "there is no engine 'dask'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, naive: Naive, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        tierewrite.rewrite(naive("bart_bf16"), tmp_path / "out", **options)
    assert names_in(tmp_path) == []


def test_help_and_a_local_rewrite_import_no_ray(made: Generated, tmp_path: Path) -> None:
    local = ["rewrite", str(made.path), str(tmp_path / "out"), "--ties", str(made.ties_file), "--quiet"]
    for argv in (["--help"], ["rewrite", "--help"], local):
        code = (
            "import sys; from tierewrite.cli import run; assert run(sys.argv[1:]) == 0;"
            "assert not {'ray', 'tierewrite.engines.on_ray'} & sys.modules.keys()"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, *argv], env=environment, check=True, stdout=subprocess.DEVNULL)


def test_workers_read_from_a_store_and_write_to_it(
    store: Store, made: Generated, right: dict[str, bytes], ray_folder: Path
) -> None:
    source = store.upload(made.path)
    target = store.url("out")
    options = {"ties": made.ties_file, "max_shard_size": SHARD}
    # A cluster of its own: its workers get the endpoint from this process's environment.
    tierewrite.rewrite(source, target, engine="ray", ray_address="local", **options)
    assert store.objects("out") == right
    assert tierewrite.verify(source, target, **options).ok


# ------------------------------------------------------------------------------------------------- what travels


def kinds() -> list[type[TierewriteError]]:
    """Every class of our errors."""
    import tierewrite.digest  # has one of its own

    found = [TierewriteError]
    for kind in found:
        found.extend(kind.__subclasses__())
    assert {SystemFailure, SourceChanged, errors.NotReady, tierewrite.digest.DeviceFailed} <= set(found)
    return found


@pytest.mark.parametrize("kind", [*kinds(), Interrupted], ids=lambda kind: kind.__name__)
def test_errors_survive_the_way_from_a_worker(kind: type[TierewriteError | Interrupted]) -> None:
    if issubclass(kind, Interrupted):
        error: TierewriteError | Interrupted = Interrupted(15)
    elif issubclass(kind, errors.Undelivered):
        error = errors.Undelivered("what happened", reader_gone=True, state="DST is complete")
    else:
        error = kind("what happened", file="a/file", tensor="a.tensor", details={"groups": [1]})
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.to_json() == error.to_json()


def test_a_system_error_survives_it_too() -> None:
    with pytest.raises(SystemFailure) as raised, errors.system_errors("reading", "a/file"):
        raise OSError(errno.EIO, "Input/output error")
    assert pickle.loads(pickle.dumps(raised.value)).to_json() == raised.value.to_json()


def test_connecting_leaves_the_signal_handlers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(signum: int, frame: object) -> None:
        raise AssertionError

    before = {signum: signal.signal(signum, ours) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        with engines.open_engine("ray", ray_address=cluster.address):
            assert {signal.getsignal(signum) for signum in before} == {ours}
        assert {signal.getsignal(signum) for signum in before} == {ours}
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_the_engine_is_the_one_that_was_asked_for(cluster: Cluster) -> None:
    with engines.open_engine("ray", ray_address=cluster.address) as engine:
        assert isinstance(engine, on_ray.RayEngine)
        assert engine.run_jobs([], "rewriting") == []
