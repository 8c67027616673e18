"""What vLLM demands of the files of a checkpoint and of its index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierewrite.consumers import common_rules
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.vllm.sources import DEFAULT_LOADER, WEIGHT_UTILS
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.source.table import INDEX_NAME

RULES: RuleSet[VllmSubject] = RuleSet()

INDEX_NAMES_MISSING_FILE = Rule(
    id="index-names-missing-file",
    title="the index names files that are not there",
    severity="error",
    consequence="vLLM refuses to load",
    fix="bring the files, or export again",
    source=f"{WEIGHT_UTILS} filter_duplicate_safetensors_files",
)


@RULES.add(INDEX_NAMES_MISSING_FILE)
def index_names_missing_file(s: VllmSubject) -> Iterator[Finding]:
    """`filter_duplicate_safetensors_files` raises FileNotFoundError."""
    return common_rules.absent_files(s, INDEX_NAMES_MISSING_FILE)


FILE_NOT_INDEXED = Rule(
    id="file-not-indexed",
    title="a file is not in the index",
    when="some of its tensors are nowhere else",
    severity="error",
    consequence="vLLM does not read it; the parameters stay uninitialised",
    fix="add the tensors to the index",
    source=f"{WEIGHT_UTILS} filter_duplicate_safetensors_files",
)
FILE_NOT_NEEDED = replace(
    FILE_NOT_INDEXED,
    when="all of its tensors are in other files too",
    severity="warning",
    consequence="vLLM does not read it",
    fix="remove the file",
)


@RULES.add(FILE_NOT_INDEXED, FILE_NOT_NEEDED)
def file_not_indexed(s: VllmSubject) -> Iterator[Finding]:
    """`filter_duplicate_safetensors_files`: files that the index does not name are not read."""
    if s.folder.alone:
        return
    for file, names in s.folder.unread.items():
        lost = tuple(n for n in names if n not in s.entries)
        rule = FILE_NOT_INDEXED if lost else FILE_NOT_NEEDED
        found = f"{file} is not in {INDEX_NAME}; {len(lost)} of its {len(names)} tensors are nowhere else"
        yield rule.at(lost or (file,), found)


INDEX_INCOMPLETE = Rule(
    id="index-incomplete",
    title="the index lacks tensors of the files that it names",
    severity="warning",
    consequence="vLLM reads them all the same; tools that go by the index do not",
    fix="add them to the index",
    source=f"{WEIGHT_UTILS} safetensors_weights_iterator",
)
INDEX_NAMES_MISSING_TENSOR = Rule(
    id="index-names-missing-tensor",
    title="the index lists tensors that the file does not hold",
    severity="warning",
    consequence="vLLM goes by the files; tools that go by the index fail",
    fix="name the file that holds them; remove those that no file holds",
    source=f"{WEIGHT_UTILS} safetensors_weights_iterator",
)


@RULES.add(INDEX_INCOMPLETE, INDEX_NAMES_MISSING_TENSOR)
def index_against_files(s: VllmSubject) -> Iterator[Finding]:
    """`safetensors_weights_iterator` reads files whole, so the index's keys do not matter to vLLM."""
    weight_map = s.folder.weight_map
    if weight_map is None or s.folder.alone:
        return
    missing = tuple(k for k in s.entries if k not in weight_map)
    if missing:
        yield INDEX_INCOMPLETE.at(missing, f"{INDEX_NAME} lacks {len(missing)} tensors of the files it names")
    files = s.folder.shards
    absent = set(s.folder.absent)
    wrong = tuple(
        k
        for k, file in weight_map.items()
        if file not in absent and (k not in s.entries or files[s.entries[k].shard].name != file)
    )
    if wrong:
        found = f"{INDEX_NAME} lists {len(wrong)} tensors that the file named for them does not hold"
        yield INDEX_NAMES_MISSING_TENSOR.at(wrong, found)


CONSOLIDATED_FILE = Rule(
    id="consolidated-file",
    title="consolidated*.safetensors lies beside other safetensors files",
    severity="error",
    consequence="vLLM takes the folder for Mistral's own format and reads nothing else",
    fix="remove or rename the file",
    source=f"{DEFAULT_LOADER} _prepare_weights",
)


@RULES.add(CONSOLIDATED_FILE)
def consolidated_file(s: VllmSubject) -> Iterator[Finding]:
    """`_prepare_weights`: Mistral's format comes first."""
    if s.folder.alone and s.folder.unread:
        found = f"{', '.join(s.folder.alone)} beside {len(s.folder.unread)} other safetensors files"
        yield CONSOLIDATED_FILE.at(s.folder.alone, found)


DUPLICATE_KEY = Rule(
    id="duplicate-key",
    title="a tensor is in several files",
    when="the bytes differ",
    severity="error",
    consequence="the file whose name comes last in natural order wins",
    fix="keep one of them",
    source=f"{WEIGHT_UTILS} safetensors_weights_iterator",
)
DUPLICATE_KEY_EQUAL = replace(DUPLICATE_KEY, when="the bytes are equal", severity="warning")


@RULES.add(DUPLICATE_KEY, DUPLICATE_KEY_EQUAL)
def duplicate_key(s: VllmSubject) -> Iterator[Finding]:
    """`safetensors_weights_iterator`: files in natural order of their names, each whole; what is read last stays."""
    return common_rules.repeated_keys(s, DUPLICATE_KEY, DUPLICATE_KEY_EQUAL)
