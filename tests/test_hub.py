"""Hub ids: a snapshot for a rewrite, headers alone for plan and inspect; against a stand-in for the hub on loopback.

huggingface_hub reads its settings when it is imported, so every command runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.checkpoints import FIXTURES, digests, read_header, read_shard, right_answer, write_checkpoint, write_shard
from tests.hub_server import Hub, Repo
from tierewrite import ShardIndexError, UsageError
from tierewrite.source import hub
from tierewrite.source.folder import open_folder

ROOT = Path(__file__).parent.parent
DRIVER = """
import contextlib, io, json, sys
from tierewrite import cli
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


class Client:
    """tierewrite's command line in another process, with a cache of its own and this server as the hub."""

    def __init__(self, server: Hub, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.cache = folder / "cache"
        self.answers = folder.parent / "answers"  # of model classes: asked once for all tests of a process

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_CACHE": str(self.cache),
            "TIEREWRITE_CACHE": str(self.answers),
            "PYTHONPATH": str(ROOT),
            **settings,
        }

    def __call__(self, *commands: str, **settings: str) -> list[Done]:
        """Runs commands, given as lines, one after the other in one process; `settings` are environment variables."""
        environment = self.environment(**settings)
        lines = [line.split() for line in commands]
        found = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(lines)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert found.stderr == ""
        return [Done(*json.loads(line)) for line in found.stdout.splitlines()]


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as running:
        running.repos["org/name"] = Repo({"main": FIXTURES / "qwen3_tied_bf16" / "naive"})
        yield running


@pytest.fixture
def client(server: Hub, tmp_path: Path) -> Client:
    (tmp_path / "ties.json").write_text(json.dumps({"lm_head.weight": "model.embed_tokens.weight"}))
    return Client(server, tmp_path)


def local(case: str) -> Path:
    return FIXTURES / case / "naive"


# --- what a hub id is


@pytest.mark.parametrize("text", ["org/name", "nvidia/Gemma-3.1_NVFP4", "a/b", "0x/1.5b"])
def test_a_name_of_two_words_that_is_not_on_disk_is_a_hub_id(text: str) -> None:
    assert hub.repo_id(text) == text
    assert hub.repo_id(Path(text)) == text


@pytest.mark.parametrize(
    "text",
    ["name", "a/b/c", "/a/b", "./a/b", "../a", "a/", "a/b/", "a/.b", "a b/c", "a/b--c", "a/b..c", "a/b.git", "a/b\n",
     "", "https://huggingface.co/a/b", "a\\b", "ä/b", "a/" + "b" * 95],
)  # fmt: skip
def test_anything_else_is_a_path(text: str) -> None:
    assert hub.repo_id(text) is None


def test_a_path_that_exists_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "link").symlink_to("nowhere")
    assert hub.repo_id("org/name") is None
    assert hub.repo_id("org/link") is None
    assert hub.repo_id("org/other") == "org/other"


def test_a_local_folder_costs_nothing_of_the_hub(tmp_path: Path) -> None:
    code = (
        "import sys; from tierewrite.source import hub; "
        f"assert hub.open_checkpoint({str(local('qwen3_tied_bf16'))!r}).tensors; "
        f"assert hub.fetched({str(local('qwen3_tied_bf16'))!r}); "
        "assert not [m for m in sys.modules if m.startswith(('huggingface_hub', 'httpx'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_revision_of_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    for call in (hub.fetched, hub.open_checkpoint):
        with pytest.raises(UsageError, match="revision"):
            call(tmp_path, revision="main")


# --- rewrite


def test_rewrite_of_a_hub_id_equals_the_right_answer_and_then_works_offline(client: Client, tmp_path: Path) -> None:
    (first,) = client("rewrite org/name out --json")
    assert first.code == 0, first
    assert digests(tmp_path / "out") == right_answer("qwen3_tied_bf16")
    assert (tmp_path / "out" / "config.json").read_bytes() == (local("qwen3_tied_bf16") / "config.json").read_bytes()
    assert first.json()["src"] == "org/name"
    assert first.err == ""
    asked = len(client.server.log)
    rewritten, planned, inspected = client(
        "rewrite org/name again --ties ties.json",
        "plan org/name --ties ties.json --json",
        "inspect org/name --no-ties --json",
        HF_HUB_OFFLINE="1",
    )
    assert (rewritten.code, planned.code, inspected.code) == (0, 0, 0)
    assert digests(tmp_path / "again") == right_answer("qwen3_tied_bf16")
    assert len(client.server.log) == asked


def test_sharded_checkpoint_arrives_whole(client: Client, tmp_path: Path) -> None:
    client.server.repos["org/sharded"] = Repo({"main": local("dg_nvfp4_sharded")})
    (done,) = client("rewrite org/sharded out")
    assert done.code == 0, done
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4_sharded")


def test_revision_names_a_branch_or_a_commit(client: Client, tmp_path: Path) -> None:
    repo = client.server.repos["org/name"]
    repo.revisions["other"] = local("qwen3_untied_equal_bf16")
    commit = repo.commit("other")
    branch, pinned, default = client(
        "inspect org/name --revision other --no-ties --json",
        f"inspect org/name --revision {commit} --no-ties --json",
        "inspect org/name --no-ties --json",
    )
    assert branch.json()["root"].endswith(f"/snapshots/{commit}")
    assert pinned.json() == branch.json()
    assert default.json()["root"].endswith(f"/snapshots/{repo.commit('main')}")
    (done,) = client("rewrite org/name out --revision other")
    assert done.code == 0, done
    assert digests(tmp_path / "out") == right_answer("qwen3_untied_equal_bf16")


def test_dst_is_looked_at_before_anything_is_downloaded(client: Client, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (done,) = client("rewrite org/name out")
    assert done.code == 2
    assert client.server.log == []


def test_hub_id_cannot_be_rewritten_in_place(client: Client) -> None:
    (done,) = client("rewrite org/name --in-place")
    assert done.code == 2
    assert "no folder here" in done.err
    assert client.server.log == []


def test_token_is_sent(client: Client) -> None:
    (done,) = client("inspect org/name --no-ties", HF_TOKEN="hf_secret")
    assert done.code == 0, done
    assert {request.token for request in client.server.log if "org/name" in request.path} == {"hf_secret"}
    assert "hf_secret" not in done.out + done.err


def test_connection_that_drops_once_is_taken_up_again(client: Client, tmp_path: Path) -> None:
    client.server.repos["org/name"].drops = 1
    (done,) = client("rewrite org/name out --ties ties.json")
    assert done.code == 0, done
    assert digests(tmp_path / "out") == right_answer("qwen3_tied_bf16")
    assert len(client.server.shard_requests()) == 2


def test_output_is_proved_from_the_hub_id(client: Client, tmp_path: Path) -> None:
    written, proved, other = client(
        "rewrite org/name out --ties ties.json",
        "verify org/name out --ties ties.json",
        "verify org/name out --ties ties.json --revision nowhere",
    )
    assert (written.code, proved.code, other.code) == (0, 0, 4), (written, proved, other)
    commit = client.server.repos["org/name"].commit("main")
    assert json.loads((tmp_path / "out" / "tierewrite.json").read_text())["source"]["hub"] == {
        "id": "org/name",
        "commit": commit,
    }


def test_snapshot_whose_blobs_are_shared_between_repositories_is_read(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    for folder in (snapshot, repo / "blobs", shared.parent):
        folder.mkdir(parents=True)
    write_shard(shared, {"a.weight": ("U8", [2], b"ab")})
    (repo / "blobs" / "etag").symlink_to(f"../../blobs/ab/{shared.name}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/etag")
    index = {"weight_map": {"a.weight": "model.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(open_folder(snapshot).tensors) == ["a.weight"]
    shared.rename(tmp_path / "elsewhere")
    (repo / "blobs" / "etag").unlink()
    (repo / "blobs" / "etag").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShardIndexError, match="leaves the folder"):
        open_folder(snapshot)


# --- plan and inspect: headers only


def test_plan_of_a_hub_id_is_that_of_the_folder_and_fetches_no_tensor_beyond_the_first_read(client: Client) -> None:
    client.server.repos["org/sharded"] = Repo({"main": local("dg_nvfp4_sharded")})
    there, here = client("plan org/sharded --json", f"plan {local('dg_nvfp4_sharded')} --json")
    assert there.code == 0, there
    assert there.json() == here.json()
    shards = sorted(path.name for path in local("dg_nvfp4_sharded").glob("*.safetensors"))
    asked = [request for request in client.server.log if ".safetensors" in request.path and "index" not in request.path]
    assert sorted(request.path.rpartition("/")[2] for request in asked) == shards
    assert {(request.method, request.range) for request in asked} == {("GET", "bytes=0-100000")}
    assert not list(client.cache.rglob("*.safetensors"))


def test_header_longer_than_the_first_read_is_fetched_to_its_end_and_no_further(client: Client, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.{'very_' * 8}long_name.weight" for i in range(1500)]
    tensors = {name: ("F32", [64], bytes(256)) for name in names}
    folder = write_checkpoint(tmp_path / "src", tensors, {"model_type": "qwen3"})
    length = read_header(folder / "model.safetensors")[1] - 8
    assert length > 100_001
    client.server.repos["org/long"] = Repo({"main": folder})
    (done,) = client("inspect org/long --no-ties --json")
    assert {tensor["name"] for tensor in done.json()["tensors"]} == set(names)
    assert [r.range for r in client.server.shard_requests()] == ["bytes=0-100000", f"bytes=8-{7 + length}"]
    assert sum(r.sent for r in client.server.shard_requests()) == 100_001 + length


@pytest.mark.parametrize("case", ["qwen3_tied_bf16", "dg_nvfp4_sharded"])
def test_inspect_of_a_hub_id_is_that_of_the_folder(case: str, client: Client) -> None:
    client.server.repos["org/it"] = Repo({"main": local(case)})
    commands = [f"inspect {source} --no-ties --json" for source in ("org/it", local(case))]
    there, here = (done.json() for done in client(*commands))
    assert there.pop("root") != here.pop("root")
    assert there == here


def test_shard_offsets_are_those_in_the_file(client: Client, tmp_path: Path) -> None:
    code = (
        "from tierewrite.source import hub; print([tuple(e) for e in hub.open_checkpoint('org/name').tensors.values()])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_ENDPOINT": client.server.endpoint,
            "HF_HUB_CACHE": str(client.cache),
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str([tuple(e) for e in open_folder(local("qwen3_tied_bf16")).tensors.values()])


def test_several_files_without_an_index_are_all_read(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    write_checkpoint(folder, {"a.weight": ("U8", [2], b"ab")})
    write_shard(folder / "extra.safetensors", {"b.weight": ("U8", [2], b"ab")})
    (folder / "sub").mkdir()
    write_shard(folder / "sub" / "more.safetensors", {"c.weight": ("U8", [2], b"ab")})
    client.server.repos["org/two"] = Repo({"main": folder})
    there, here = client("inspect org/two --no-ties --json", f"inspect {folder} --no-ties --json")
    assert there.code == 0, there
    assert {tensor["name"] for tensor in there.json()["tensors"]} == {"a.weight", "b.weight"}
    assert {**there.json(), "root": ""} == {**here.json(), "root": ""}


def damaged(folder: Path, how: str) -> Path:
    """A one-file checkpoint that is wrong in one way."""
    tensors = {"a.weight": ("U8", [8], bytes(8)), "b.weight": ("U8", [8], bytes(8))}
    write_checkpoint(folder, tensors, {"model_type": "qwen3"})
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if how == "overlap":
        path.write_bytes(data.replace(b"[8, 16]", b"[7, 15]"))
    elif how == "hole":
        path.write_bytes(data.replace(b"[8, 16]", b"[9, 17]") + b"\0")
    elif how == "size":
        path.write_bytes(data.replace(b'"U8", "shape": [8]', b'"U8", "shape": [7]', 1))
    elif how == "truncated":
        path.write_bytes((local("qwen3_tied_bf16") / "model.safetensors").read_bytes()[:-9])
    elif how == "trash":
        path.write_bytes(b"\x10" + bytes(7) + b"no JSON at all!!")
    elif how == "shape of words":
        path.write_bytes(data.replace(b'"shape": [8]', b'"shape": "x"', 1))
    elif how == "html":
        path.write_bytes(b"<html>" + bytes(400))
    elif how == "no such shard":
        index = {"weight_map": {"a.weight": "gone.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "no weights":
        path.rename(folder / "model.bin")
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("overlap", "overlaps the tensor before it"),
        ("hole", "leaves a hole before it"),
        ("size", "takes 7"),
        ("truncated", "truncated"),
        ("trash", "model.safetensors"),
        ("shape of words", "model.safetensors"),
        ("html", "model.safetensors"),
        ("no such shard", "which the repository lacks"),
        ("no weights", "model.bin"),
    ],
)
def test_what_is_wrong_with_a_header_on_the_hub_is_exit_4(how: str, said: str, client: Client, tmp_path: Path) -> None:
    client.server.repos["org/bad"] = Repo({"main": damaged(tmp_path / "src", how)})
    (done,) = client("inspect org/bad --no-ties --json")
    assert done.code == 4, done
    assert said in done.err
    assert "Traceback" not in done.err


# --- what can go wrong on the way


COMMANDS = (
    "rewrite org/name out --ties ties.json --json",
    "plan org/name --ties ties.json",
    "inspect org/name --no-ties",
)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ((404, "RepoNotFound", "Repository not found"), 4, "hf auth login"),
        ((401, "RepoNotFound", "Repository not found"), 4, "hf auth login"),
        ((401, "", "Invalid credentials in Authorization header"), 5, "token is invalid"),
        ((403, "GatedRepo", "Access to model org/name is restricted"), 5, "is gated: ask for access"),
        ((403, "", "Forbidden"), 5, "HF_TOKEN"),
        ((500, "", "Internal error"), 5, "try again"),
        ((429, "", "Too many requests"), 5, "try again"),
    ],
)
def test_refusal_of_the_hub_names_the_id_and_what_to_do(
    error: tuple[int, str, str], code: int, said: str, client: Client, tmp_path: Path
) -> None:
    client.server.repos["org/name"].error = error
    for done in client(*COMMANDS):
        assert done.code == code, done
        assert "org/name" in done.err
        assert said in done.err, done.err
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_id_that_does_not_exist_says_that_there_is_no_such_folder_either(client: Client) -> None:
    for done in client("plan exported/checkpoint", "rewrite exported/checkpoint out --json"):
        assert done.code == 4
        assert "there is no folder 'exported/checkpoint' here" in done.err


def test_revision_that_does_not_exist_is_exit_4(client: Client) -> None:
    for done in client(*(f"{command} --revision v9" for command in COMMANDS)):
        assert done.code == 4, done
        assert "'org/name' at revision 'v9'" in done.err
        assert "branches, tags or commits" in done.err


def test_offline_without_a_snapshot_is_exit_5_and_asks_nobody(client: Client, tmp_path: Path) -> None:
    for done in client(*COMMANDS, HF_HUB_OFFLINE="1"):
        assert done.code == 5, done
        assert "HF_HUB_OFFLINE" in done.err
        assert "hf download org/name" in done.err
    assert client.server.log == []
    assert not (tmp_path / "out").exists()


def test_offline_does_not_mistake_the_headers_of_an_earlier_plan_for_a_snapshot(client: Client, tmp_path: Path) -> None:
    (planned,) = client("plan org/name --ties ties.json")
    assert planned.code == 0, planned
    for done in client(*COMMANDS, HF_HUB_OFFLINE="1"):
        assert done.code in (4, 5), done
        assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_nobody_listening_is_exit_5(client: Client, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    for done in client(*COMMANDS, HF_ENDPOINT=nowhere):
        assert done.code == 5, done
        assert "'org/name' cannot be fetched" in done.err
        assert "Check the network" in done.err
    assert not (tmp_path / "out").exists()


def test_connection_that_keeps_dropping_is_exit_5_and_leaves_no_dst(client: Client, tmp_path: Path) -> None:
    client.server.repos["org/name"].drops = 1_000
    for done in client(*COMMANDS):
        assert done.code == 5, done
        assert "org/name" in done.err
        assert "Traceback" not in done.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("cache", "home")) == ["ties.json"]


def test_error_is_a_json_object_too(client: Client) -> None:
    (done,) = client("plan org/absent --json")
    assert done.json()["error"]["type"] == "SourceError"
    assert done.json()["error"]["exit_code"] == 4


def test_read_shard_of_the_stand_in_is_what_was_stored(client: Client, tmp_path: Path) -> None:
    (done,) = client("rewrite org/name out --ties ties.json --no-manifest -q")
    assert (done.code, done.out, done.err) == (0, "", "")
    snapshot = next(client.cache.glob("models--org--name/snapshots/*"))
    assert read_shard(snapshot / "model.safetensors") == read_shard(local("qwen3_tied_bf16") / "model.safetensors")
