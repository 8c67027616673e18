"""The house keeps its shape: one direction of imports, rooms of a size that can be read, one door to the libraries."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tierewrite
from tierewrite.consumers.findings import Finding
from tierewrite.pages.facts import KeptGroup, SizeRow
from tierewrite.planning.plan import GroupPlan
from tierewrite.proof import Problem
from tierewrite.report import GroupReport, Pushed, ShardSize
from tierewrite.ties.tie import Tie
from tierewrite.values.merged import MergedScale

PACKAGE = Path(__file__).parent.parent / "tierewrite"

ROOMS = (
    "spelling",
    "errors",
    "interrupts",
    "units",
    "json_text",
    "tables",
    "bounded_regex",
    "kept_files",
    "stores",
    "source",
    "formats",
    "ties",
    "numbers",
    "digest",
    "planning",
    "values",
    "report",
    "output",
    "engines",
    "consumers",
    "proof",
    "rewriting",
    "expanding",
    "streaming",
    "inspection",
    "in_memory",
    "batches",
    "pages",
    "cli",
)
"""In the order of the story (CONTRIBUTING.md): a room imports from itself and from those before it."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ROOMS)
OF_CONSUMERS = {path for path in MODULES if "loader_process" in path.parts or path.match("consumers/*/dry_load.py")}
"""What runs in a consumer's own Python, and imports what that has."""
LINES = 500
FUNCTION_LINES = 60


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each module that is imported from, for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; the house imports by full names"
            assert node.module is not None
            if node.module == "tierewrite":
                yield from ((node.lineno, f"tierewrite.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    allowed = ROOMS[: ROOMS.index(room_of(path)) + 1]
    upward = [
        f"line {line}: {name}"
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith("tierewrite.") and name.split(".")[1] not in (*allowed, "__version__")
    ]
    assert not upward


def test_every_folder_and_module_is_a_room() -> None:
    there = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert there == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_can_be_read_at_a_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and body_lines(node) > FUNCTION_LINES
        and "Long because" not in (ast.get_docstring(node) or "")
    ]
    assert not long, "cut it, or say in its docstring: Long because ..."


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    first, *others = node.body
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first if not documented or not others else others[0]
    assert node.end_lineno is not None
    return node.end_lineno - start.lineno + 1


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("transformers", {"ties"}),
        ("torch", {"ties", "digest", "streaming", "in_memory", "consumers/vllm/model_loader.py"}),
        ("cupy", {"digest/cuda.py", "numbers/arithmetic.py"}),
        ("vllm", {"consumers/vllm/plugin.py", "consumers/vllm/model_loader.py"}),
        ("fsspec", {"stores"}),
        ("regex", {"bounded_regex"}),
        ("ray", {"engines"}),
    ],
)
def test_a_library_has_one_door(library: str, rooms: set[str]) -> None:
    """torch in digest/: pinned host memory. In streaming/, in_memory: tensors that go through them are torch's."""
    for path in (path for path in MODULES if path not in OF_CONSUMERS):
        names = {name.split(".")[0] for _, name in imported(ast.parse(path.read_text(encoding="utf-8")))}
        here = str(path.relative_to(PACKAGE))
        assert library not in names or here in rooms or room_of(path) in rooms, here


FOLDERS = sorted({path.parent for path in MODULES if path.parent.parent == PACKAGE})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_rooms_readme_names_its_modules_and_no_others(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    modules = {path.name for path in folder.glob("*.py")}
    named = re.sub(r"(?<=\w)-(?=\w)", "_", text)  # a family's name has dashes where its module's has underscores
    unnamed = {name for name in modules - {"__init__.py"} if not re.search(rf"\b{name.removesuffix('.py')}\b", named)}
    first_cells = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    gone = {name for cell in first_cells for name in re.findall(r"`(\w+\.py)`", cell)} - modules
    assert (unnamed, gone) == (set(), set())


def test_a_rooms_readme_is_a_page() -> None:
    """What is longer stands beside it, in a document of its own subject."""
    lines = {folder.name: (folder / "README.md").read_text(encoding="utf-8").count("\n") for folder in FOLDERS}
    assert {name: count for name, count in lines.items() if count > 60} == {}


def test_contributing_names_every_room_in_order_and_test_files_that_exist() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("## The rooms")[2].partition("## The tests")[0]
    folders = [room for room in ROOMS if (PACKAGE / room).is_dir()]
    assert re.findall(r"^    (\w+)/ ", block, re.MULTILINE) == folders
    assert all(re.search(rf"\b{room}(?:\.py|/)", block) for room in ROOMS)
    tests = set(re.findall(r"\btest_\w+\.py", text))
    assert len(tests) > 20
    assert {name for name in tests if not (Path(__file__).parent / name).exists()} == set()


def test_every_test_that_the_table_of_promises_names_exists() -> None:
    folder = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)(?:::([\w:]+))?`", (folder / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 25
    for file, path in named:
        text = (folder / file).read_text(encoding="utf-8")
        for word in filter(None, path.split("::")):
            assert re.search(rf"^\s*(?:class|def) {word}\b", text, re.MULTILINE), f"{file}: {word}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_says_its_job_and_what_is_public_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    first, _, rest = (ast.get_docstring(tree) or "").partition("\n")
    assert first.endswith("."), "its first line is one sentence"
    assert not rest or rest.startswith("\n"), "an empty line comes after it"
    silent = [name for name, node in public(tree) if ast.get_docstring(node) is None]
    assert not silent, "a sentence each, or `See Protocol`"


def test_members_of_our_classes_that_texts_name_exist() -> None:
    """`Checkpoint.open`, say, in docstrings, comments and READMEs; of classes that inherit nothing."""
    members: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.bases:
                there = members.setdefault(node.name, set())
                for part in ast.walk(node):
                    name = getattr(part, "name", getattr(part, "attr", getattr(part, "id", None)))
                    there.add(str(name))
    gone = [
        f"{path.relative_to(PACKAGE)}: {found[0]}"
        for path in (*MODULES, *PACKAGE.rglob("*.md"))
        for found in re.finditer(r"`([A-Z]\w*)\.(\w+)(?:\(.*?\))?`", path.read_text(encoding="utf-8"))
        if found[1] in members and found[2] not in members[found[1]]
    ]
    assert not gone


def public(
    tree: ast.Module | ast.ClassDef, of: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Names of classes, functions and methods that others may use, declarations of a protocol excepted."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not is_declaration(node):
                yield of + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{of}{node.name}.")


def is_declaration(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether its body is `...` alone."""
    only = node.body[0]
    return len(node.body) == 1 and isinstance(only, ast.Expr) and getattr(only.value, "value", None) is ...


RESULTS = (
    *tierewrite.__all__,
    *(
        f"{kind.__module__}:{kind.__qualname__}"
        for kind in (Finding, GroupPlan, GroupReport, MergedScale, Problem, Pushed, ShardSize, SizeRow, KeptGroup, Tie)
    ),
)
"""What a caller gets: the public names, and what their attributes hold."""


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_public_says_what_each_argument_and_attribute_is(name: str) -> None:
    module, _, member = name.rpartition(":")
    found = getattr(importlib.import_module(module), member) if module else getattr(tierewrite, name)
    if inspect.isclass(found) and dataclasses.is_dataclass(found):
        named = [field.name for field in dataclasses.fields(found)]
    elif inspect.isfunction(found):
        named = [] if "others: as for `rewrite`" in str(found.__doc__) else [*inspect.signature(found).parameters]
    else:
        named = []
    lacking = [one for one in named if not one.startswith("_") and not re.search(rf"\b{one}\b", str(found.__doc__))]
    assert lacking == []
