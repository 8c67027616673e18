"""A finished output, uploaded to the Hugging Face Hub as one commit: readers see all of it, or nothing.

Everything goes through huggingface_hub: its endpoint (HF_ENDPOINT), its token (`hf auth login`, HF_TOKEN) and its way
of uploading. It is imported only when something is to be uploaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tierewrite
from tierewrite.errors import SystemFailure, TierewriteError, UsageError, first_line, shown
from tierewrite.report import Pushed
from tierewrite.source import hub
from tierewrite.source.folder import safetensors_among
from tierewrite.spelling import of_a_command
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import FilePath, is_local, located

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


_CHILD = """
import json, sys
sys.path[:], *asked = json.loads(sys.argv[1])
from tierewrite.output.push import answer
print(answer(*asked))
"""
"""What the process that uploads runs: it finds modules where this one does."""


@dataclass(frozen=True)
class Push:
    """Where an output is to be uploaded.

    Attributes:
        repo: `org/name`; it is made if it does not exist.
        private: it is made private; one that exists has to be.
    """

    repo: str
    private: bool = False

    @classmethod
    def checked(cls, repo: str, private: bool, dst: FilePath) -> Push:
        """A push of `dst` that the hub will take, as far as that can be known before there is anything to upload.

        Raises:
            UsageError: `repo` is no hub id, is public though `private` is wanted, or `dst` is not on this machine.
            SystemFailure: no token, or the hub does not take it, or it does not answer.
        """
        if not hub.is_repo_id(repo):
            raise UsageError(f"'{shown(repo)}' is no hub id; expected org/name")
        if not is_local(dst):
            raise UsageError("only a folder of this machine can be uploaded; name one as DST", file=dst)
        push = cls(repo, private)
        with _errors(repo, "nothing was uploaded"):
            from huggingface_hub import constants, get_token

            if constants.HF_HUB_OFFLINE:
                raise SystemFailure(f"HF_HUB_OFFLINE forbids to ask {constants.ENDPOINT}: unset it, or do not push")
            if get_token() is None:
                raise SystemFailure(f"there is no token for {constants.ENDPOINT}: {_LOG_IN}; nothing was uploaded")
            api = hub.api()
            api.whoami()
            push._refuse_public(api, "nothing was uploaded")
        return push

    def upload(self, folder: Path) -> Pushed:
        """Uploads a checkpoint that is complete. `folder` stays as it is, also if this fails.

        Raises:
            UsageError: the repository is public though `private` is wanted, or holds other weights, too.
            SystemFailure: the hub or the network failed; the message says how to go on.
        """
        state = self._state(folder)
        with _errors(self.repo, state):
            api = hub.api()
            api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            self._refuse_public(api, state)
            self._refuse_other_weights(api, folder, state)
            done = api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message=f"Every tied weight stored once (tierewrite {tierewrite.__version__})",
            )
            self._refuse_incomplete(api, folder, str(done.oid))
        return Pushed(self.repo, str(done.oid), str(done.commit_url))

    def upload_in_child(self, folder: Path) -> Pushed:
        """`upload`, in a process of its own: whoever interrupts it does not wait until files of many GiB are sent.

        Raises:
            UsageError, SystemFailure: as `upload`.
        """
        arguments = json.dumps([[*map(str, sys.path)], self.repo, self.private, os.fspath(folder)])
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        try:
            answer = child.communicate()[0]
        finally:
            child.kill()
            child.wait()
        if child.returncode != 0:
            raise SystemFailure(f"the upload ended with {child.returncode}; {self._state(folder)}")
        found = json.loads(answer)
        if "message" in found:
            kind = UsageError if found["type"] == "UsageError" else SystemFailure
            raise kind(found["message"])
        return Pushed(**found)

    def _state(self, folder: Path) -> str:
        """How things stand while it is not uploaded, and how to go on."""
        private = " --private" if self.private else ""
        how = f"hf upload {self.repo} {shlex.quote(os.fspath(folder))} . --repo-type model{private}"
        return f"DST is complete, and nothing of it is to be seen there; to go on: {how}"

    def _refuse_public(self, api: HfApi, state: str) -> None:
        from huggingface_hub import errors

        try:
            info = api.model_info(self.repo)
        except errors.RepositoryNotFoundError:
            return
        if self.private and not info.private:
            raise UsageError(f"'{self.repo}' exists and is public, while --private is wanted: name another; {state}")

    def _refuse_incomplete(self, api: HfApi, folder: Path, commit: str) -> None:
        """The hub leaves out, without an error, what a .gitignore among the files names."""
        info = api.model_info(self.repo, revision=commit, files_metadata=True)
        there = {file.rfilename: file.size for file in info.siblings or ()}
        for name, size in _uploaded(folder).items():
            if there.get(name) != size:
                raise SystemFailure(
                    f"'{self.repo}' at commit {commit} lacks '{shown(name)}' of {size:,} bytes, though the upload "
                    "ended without an error. DST is complete: see whether its .gitignore names this file, and upload "
                    "it again"
                )

    def _refuse_other_weights(self, api: HfApi, folder: Path, state: str) -> None:
        """Weights that stay beside ours would be read by some loaders."""
        there = (name for name in api.list_repo_files(self.repo) if "/" not in name)
        others = [name for name in safetensors_among(there) if not (folder / name).exists()]
        if others:
            raise UsageError(
                f"'{self.repo}' holds '{shown(others[0])}', which DST does not have, and a loader may read both: push "
                f"to a new repository, or delete it there. {state}"
            )


def answer(repo: str, private: bool, folder: str) -> str:
    """What the process that uploads says at its end: a `Pushed`, or an error, as JSON."""
    with of_a_command():  # who shows the message spells its options
        return _answer(repo, private, folder)


def _answer(repo: str, private: bool, folder: str) -> str:
    try:
        return json.dumps(Push(repo, private).upload(Path(folder)).to_json())
    except TierewriteError as error:
        return json.dumps({"type": type(error).__name__, "message": str(error)})


def push(folder: PathLike, repo: str, *, private: bool = False) -> Pushed:
    """Uploads a finished checkpoint to the Hugging Face Hub, as one commit on the main branch of `repo`.

    Args:
        folder: on this machine, as a rewrite wrote it. It is only read.
        repo: `org/name`; made if it does not exist.
        private: make it private; one that exists has to be.

    Raises:
        UsageError: `repo` is no hub id, is public though `private` is wanted, or holds other weights.
        SystemFailure: no token, no right to write, or the network failed; the message says how to go on.
    """
    place = located(folder)
    checked = Push.checked(repo, private, place)
    assert is_local(place)
    return checked.upload(place)


def _uploaded(folder: Path) -> dict[str, int]:
    """The files of `folder` that huggingface_hub uploads, with their sizes."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = (".git/", ".cache/huggingface/")
    return {name: path.stat().st_size for name, path in names.items() if not name.startswith(own)}


@contextlib.contextmanager
def _errors(repo: str, state: str) -> Iterator[None]:
    """Inside, what huggingface_hub or the network raises becomes a SystemFailure that says how things stand."""
    from huggingface_hub import constants, errors

    with hub.without_bars():
        try:
            yield
        except TierewriteError:
            raise
        except Exception as error:
            known = isinstance(error, (errors.HfHubHTTPError, OSError, ValueError, RuntimeError))
            if not known and not hub.is_of_the_network(error):
                raise
            raise SystemFailure(f"{_said(error, repo, constants.ENDPOINT)}; {state}") from error


def _said(error: Any, repo: str, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{endpoint} does not take the token (401): {_LOG_IN}"
    if status == 403:
        return f"the token has no right to write to '{repo}' (403): {_LOG_IN}, or name a repository of yours"
    if status == 404:
        return f"{endpoint} has no '{repo}' that this token may see, nor may it make one (404): check the name"
    if status is not None:
        return f"{endpoint} answers {status} to an upload to '{repo}': {shown(first_line(error))}"
    return f"'{repo}' cannot be uploaded to {endpoint}: {hub.cause(error)}"
