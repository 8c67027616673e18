"""The sdist and the wheel: what is in them, and that what they install works without the repository."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from email.message import Message
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests, right_answer

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Extras that a venv can hold together: CuPy for one CUDA is enough, and warns beside another.
APART = {"cuda12", "cuda13"}

_BUILD = "from setuptools import build_meta as b; print(b.build_sdist('out')); print(b.build_wheel('out'))"


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without anything that would bring in the repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "HF_HUB_OFFLINE": "1", **more}


def call(command: Sequence[object], folder: Path, **environment: str) -> str:
    """Runs a command away from the repository; its output, or a failure that shows what it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(tree: Path) -> tuple[Path, Path]:
    """(sdist, wheel) of a source tree, made by the backend that pyproject.toml names."""
    (tree / "out").mkdir()
    call([sys.executable, "-c", _BUILD], tree)
    (sdist,) = (tree / "out").glob("*.tar.gz")
    (wheel,) = (tree / "out").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy: nothing is left behind in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("tierewrite", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tree / name)
    return build(tree)[0]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the unpacked sdist: whatever that lacks is missing here too."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return build(tree)[1]


def new_venv(folder: Path) -> Path:
    """A venv with nothing in it; its python. No pip inside: Debian's python3 brings no ensurepip."""
    call([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    return folder / "bin" / "python"


def install(python: Path, *what: object, **environment: str) -> None:
    call([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *what], python.parent, **environment)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a clean venv with the wheel; dependencies are those of the running environment."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    python = new_venv(folder)
    install(python, "--no-deps", "--no-index", wheel)
    site = call([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder).strip()
    # After the installation, or pip would find the running environment's tierewrite and install nothing.
    (Path(site) / "dependencies.pth").write_text("\n".join({sysconfig.get_path(n) for n in ("purelib", "platlib")}))
    return python.parent


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(packed.read(name))


def source_files() -> set[str]:
    """What the package is made of, as the tree has it."""
    files = (path for path in (ROOT / "tierewrite").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in members(wheel) if ".dist-info/" not in name}
    assert packed == source_files()
    assert "tierewrite/py.typed" in packed
    assert "tierewrite/consumers/vllm/backbones.json" in packed


def test_the_wheel_brings_the_license_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        (folder,) = {name.split("/")[0] for name in packed.namelist() if ".dist-info/" in name}
        assert packed.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        points = configparser.ConfigParser()
        points.read_string(packed.read(f"{folder}/entry_points.txt").decode())
    assert dict(points["console_scripts"]) == {"tierewrite": "tierewrite.cli:main"}


def test_the_sdist_holds_the_package_and_what_builds_and_explains_it(sdist: Path) -> None:
    with tarfile.open(sdist) as packed:
        names = {member.name.split("/", 1)[1] for member in packed if member.isfile()}
    assert source_files() | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("fixtures/")]


def test_one_version_everywhere(sdist: Path, wheel: Path) -> None:
    newest = re.search(r"^## \[?([0-9][^\s\]]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    versions = {
        tierewrite.__version__,
        newest[1],
        metadata(wheel)["Version"],
        sdist.name.removeprefix("tierewrite-").removesuffix(".tar.gz"),
        wheel.name.split("-")[1],
    }
    assert versions == {tierewrite.__version__}


def test_metadata_names_every_extra_and_its_packages(wheel: Path) -> None:
    found = metadata(wheel)
    assert set(found.get_all("Provides-Extra", [])) == EXTRAS.keys()
    for extra, wanted in EXTRAS.items():
        brought = [line for line in found.get_all("Requires-Dist", []) if f'extra == "{extra}"' in line]
        assert len(brought) == len(wanted)
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.10"


def test_every_extra_is_explained_to_people() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert [extra for extra in EXTRAS if f"`{extra}`" not in text and f"[{extra}]" not in text] == []


def test_the_installed_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    said = call([installed / "tierewrite", "--version"], tmp_path)
    assert said.split()[-1] == tierewrite.__version__
    assert "Examples:" in call([installed / "python", "-m", "tierewrite", "rewrite", "--help"], tmp_path)


def test_the_installed_package_is_the_wheels_own(installed: Path, tmp_path: Path) -> None:
    file = call([installed / "python", "-c", "import tierewrite; print(tierewrite.__file__)"], tmp_path).strip()
    assert Path(file).is_relative_to(installed.parent)


def test_the_installed_command_rewrites_and_verifies_a_real_checkpoint(installed: Path, tmp_path: Path) -> None:
    src, dst = FIXTURES / "dg_nvfp4_sharded" / "naive", tmp_path / "canonical"
    call([installed / "tierewrite", "rewrite", src, dst, "-q"], tmp_path)
    assert digests(dst) == right_answer("dg_nvfp4_sharded")
    call([installed / "tierewrite", "verify", src, dst], tmp_path)
    # The table of backbones is data in the wheel.
    ask = f"import tierewrite; print(tierewrite.check({str(dst)!r}, 'vllm').to_json()['schema'])"
    assert call([installed / "python", "-c", ask], tmp_path).strip() == "tierewrite/readiness/1"


def _installs() -> list[object]:
    """What a user may ask for: nothing, each extra alone, and all that go together."""
    together = ",".join(sorted(EXTRAS.keys() - APART))
    return [
        pytest.param(kind, extra, id=f"{kind}-{extra or 'plain'}")
        for kind, extra in [
            ("wheel", ""),
            ("sdist", ""),
            *(("wheel", extra) for extra in sorted(EXTRAS)),
            ("sdist", together),
        ]
    ]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "extra"), _installs())
def test_installs_with_every_extra_from_the_index(
    kind: str, extra: str, sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    """Needs the network. PIP_CONSTRAINT and the like are honoured."""
    python = new_venv(tmp_path / "venv")
    archive = {"wheel": wheel, "sdist": sdist}[kind]
    install(python, f"{archive}[{extra}]" if extra else archive)
    call([sys.executable, "-m", "pip", "--python", python, "check"], tmp_path)
    # `pip check` does not look at extras: a name that is not installed raises.
    wanted = [re.split(r"[\[><=]", line)[0] for name in extra.split(",") if name for line in EXTRAS[name]]
    call([python, "-c", "import sys, importlib.metadata as m; [*map(m.version, sys.argv[1:])]", *wanted], tmp_path)
    src, dst = FIXTURES / "dg_nvfp4_sharded" / "naive", tmp_path / "canonical"
    command = python.parent / "tierewrite"
    call([command, "rewrite", src, dst, "-q"], tmp_path)
    assert digests(dst) == right_answer("dg_nvfp4_sharded")
    if extra in ("report", "test", "dev") or "," in extra:
        call([command, "report", dst, "--html", tmp_path / "page.html"], tmp_path)
        assert (tmp_path / "page.html").read_text().startswith("<!")
    shutil.rmtree(tmp_path / "venv")  # a gigabyte each


def test_imported_from_the_wheel_as_an_archive_it_says_what_to_do(wheel: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import tierewrite; tierewrite.plan"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("tierewrite cannot be imported from an archive: it reads files; pip install it\n")
