"""`rewrite --push`: what a stand-in for the hub receives, and what is left when it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tests.hub_server import Hub, Repo
from tests.test_hub import Client
from tierewrite.cli.pushing import pushed
from tierewrite.consumers.vllm.rules_scales import SCALE_MISSING
from tierewrite.output.push import Push
from tierewrite.report import Pushed

SRC = FIXTURES / "qwen3_tied_bf16" / "naive"
PUSH = f"rewrite {SRC} out --ties ties.json -q --push org/new"
TOKEN = {"HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with Hub(uploads=tmp_path / "uploads") as running:
        yield running


@pytest.fixture
def client(server: Hub, tmp_path: Path) -> Client:
    (tmp_path / "ties.json").write_text('{"lm_head.weight": "model.embed_tokens.weight"}')
    return Client(server, tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits(server: Hub) -> int:
    return sum(request.method == "POST" and "/commit/" in request.path for request in server.log)


def test_the_hub_receives_every_file_in_one_commit_and_a_download_of_it_is_as_it_was_written(
    client: Client, server: Hub, tmp_path: Path
) -> None:
    done, checked = client(f"{PUSH.replace('-q', '--json')} --private", "verify org/new --json", **TOKEN)
    assert (done.code, done.err) == (0, "")
    assert done.json()["pushed"]["id"] == "org/new"
    assert done.json()["pushed"]["commit"] == server.repos["org/new"].commit("main")
    assert files(tmp_path / "uploads" / "org" / "new") == files(tmp_path / "out")
    assert server.repos["org/new"].private
    assert commits(server) == 1
    assert checked.json()["ok"]
    counts = checked.json()["counts"]
    assert counts["digests"] == counts["tensors"] > 0  # --push has the digest of every tensor


def test_a_second_push_changes_the_repository_that_is_there(client: Client, server: Hub, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").write_text("mine")
    server.repos["org/new"] = Repo({"main": tmp_path / "there"})
    (done,) = client(PUSH, **TOKEN)
    assert done.code == 0
    assert files(tmp_path / "there") == {**files(tmp_path / "out"), "README.md": b"mine"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"HF_TOKEN": ""}, "there is no token for http"),
        ({"HF_TOKEN": "hf_other"}, "does not take the token (401)"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be uploaded to http://127.0.0.1:9"),
    ],
)
def test_what_can_be_known_before_costs_no_rewrite(
    setting: dict[str, str], said: str, client: Client, server: Hub, tmp_path: Path
) -> None:
    (done,) = client(PUSH, **{**TOKEN, **setting})
    assert done.code == 5
    assert said in done.err
    assert "nothing was uploaded" in done.err or "unset it" in done.err
    assert not (tmp_path / "out").exists()
    assert not server.repos


@pytest.mark.parametrize("repo", ["new", "a/b/c"])
def test_what_is_no_hub_id_is_a_usage_error(repo: str, client: Client, tmp_path: Path) -> None:
    (done,) = client(PUSH.replace("org/new", repo), **TOKEN)
    assert (done.code, f"'{repo}' is no hub id; expected org/name" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_private_goes_with_push_and_not_to_a_public_repository(client: Client, server: Hub, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    server.repos["org/new"] = Repo({"main": tmp_path / "there"})
    alone, public = client(f"rewrite {SRC} out -q --private", f"{PUSH} --private", **TOKEN)
    assert (alone.code, "--private goes with --push" in alone.err) == (2, True)
    assert (public.code, "exists and is public" in public.err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert not files(tmp_path / "there")


@pytest.mark.parametrize(
    ("step", "refusal", "said"),
    [
        ("/api/repos/create", (403, "", "no"), "the token has no right to write to 'org/new' (403)"),
        ("/lfs/", (403, "", "no"), "the token has no right to write to 'org/new' (403)"),
        ("/commit/main", (422, "", "unhappy"), "answers 422 to an upload to 'org/new'"),
    ],
)
def test_an_upload_that_fails_leaves_dst_and_says_how_to_go_on(
    step: str, refusal: tuple[int, str, str], said: str, client: Client, server: Hub, tmp_path: Path
) -> None:
    server.refuses[step] = refusal
    (done,) = client(PUSH, **TOKEN)
    assert done.code == 5
    assert said in done.err
    assert "DST is complete" in done.err
    assert f"hf upload org/new {tmp_path / 'out'} ." in done.err or "hf upload org/new out ." in done.err
    assert "model.safetensors" in os.listdir(tmp_path / "out")
    assert not list((tmp_path / "uploads").rglob("*.safetensors"))
    server.refuses.clear()
    checked, again = client("verify out", PUSH.replace("-q", "-q --overwrite"), **TOKEN)
    assert (checked.code, again.code) == (0, 0)
    assert files(tmp_path / "uploads" / "org" / "new") == files(tmp_path / "out")


def test_weights_that_would_stay_beside_ours_are_refused(client: Client, server: Hub, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model-00001-of-00002.safetensors").write_bytes(b"old")
    server.repos["org/new"] = Repo({"main": tmp_path / "there"})
    (done,) = client(PUSH, **TOKEN)
    assert done.code == 2
    assert "holds 'model-00001-of-00002.safetensors', which DST does not have" in done.err
    assert commits(server) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_the_hub_leaves_out_without_an_error_is_noticed(client: Client, server: Hub, tmp_path: Path) -> None:
    server.ignores = ("model.safetensors",)
    (done,) = client(PUSH, **TOKEN)
    assert done.code == 5
    assert "lacks 'model.safetensors' of" in done.err
    assert "DST is complete" in done.err


def test_an_interrupt_does_not_wait_until_files_are_sent(client: Client, server: Hub, tmp_path: Path) -> None:
    server.hold = threading.Event()
    command = [sys.executable, "-m", "tierewrite", *PUSH.split(), "--max-shard-size", "20KB"]
    settings = client.environment(**TOKEN)
    run = subprocess.Popen(command, cwd=tmp_path, env=settings, stderr=subprocess.PIPE, text=True)
    try:
        while not server.held.wait(0.2):
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        err = run.communicate(timeout=120)[1]  # the hub has not answered
    finally:
        run.kill()
        server.hold.set()
    assert run.returncode == 130
    assert "DST is complete, and the upload to org/new is not" in err
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert commits(server) == 0


def test_what_a_consumer_cannot_use_is_not_uploaded_unless_forced(tmp_path: Path) -> None:
    class Pushing(Push):
        def upload_in_child(self, folder: Path) -> Pushed:
            return Pushed(self.repo, "c0ffee", f"page of {folder.name}")

    report = tierewrite.rewrite(SRC, tmp_path / "out", ties={"lm_head.weight": "model.embed_tokens.weight"})
    broken = tierewrite.check(tmp_path / "out", "vllm", loader="off")
    broken = replace(broken, findings=(SCALE_MISSING.at(["a.weight_scale"], "is not there"),))
    for found, forced, uploaded in ((None, False, True), (broken, False, False), (broken, True, True)):
        after = pushed(replace(report, readiness=found), Pushing("org/new"), forced)
        assert (after.pushed is not None) is uploaded
        assert any("not uploaded to org/new" in warning for warning in after.warnings) is not uploaded
