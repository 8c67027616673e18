"""What several consumers demand alike. Each states with its own records what it does about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from tierewrite import formats
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule
from tierewrite.consumers.subject import Subject
from tierewrite.errors import shown
from tierewrite.formats.experts import split_expert
from tierewrite.source.table import INDEX_NAME
from tierewrite.ties.on_disk import WHOLE


def absent_files(s: Subject, rule: Rule) -> Iterator[Finding]:
    """Every file that the index names is there."""
    if s.folder.absent:
        yield rule.at(s.folder.absent, f"{INDEX_NAME} names {len(s.folder.absent)} files that are not in the folder")


def repeated_keys(s: Subject, differ: Rule, same: Rule | None = None) -> Iterator[Finding]:
    """No tensor is in several files.

    Args:
        differ: for those whose bytes differ, or are too many to be compared.
        same: for those with equal bytes; None where they do no harm.
    """
    repeated = sorted(s.folder.repeated.items(), key=lambda item: item[1][0].nbytes)
    unequal: list[str] = []
    equal: list[str] = []
    verdicts = s.equal(entries for _, entries in repeated)
    for (name, _), verdict in zip(repeated, verdicts, strict=True):
        (equal if verdict else unequal).append(name)
    if unequal:
        yield differ.at(unequal, f"{len(unequal)} tensors are in several files, with different bytes")
    if equal and same is not None:
        yield same.at(equal, f"{len(equal)} tensors are in several files, with equal bytes")


def missing_parameters(s: Subject) -> tuple[list[str], list[str], list[str]]:
    """Every parameter of the model class is filled: what is not, as `Subject.missing` gives it.

    Nothing is missing for good while files are absent, and nothing can be said without a model class: a note says so.
    """
    if s.model is None:
        s.notes.append("completeness was not checked: no model class says which parameters there are")
        return [], [], []
    if s.in_unknown_format:
        s.notes.append(
            f"{len(s.in_unknown_format)} tensors were not checked, nor whether they are all there: the config says "
            f"quant_method {shown(s.unknown_format or '')}, and that format is not known here"
        )
    return ([], [], []) if s.folder.absent else s.missing()


def unlike_their_siblings(s: Subject) -> list[str]:
    """Every weight of an expert, packed or not, has the shape that most experts beside it have: those that have not."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for key in s.entries:
        module, _, leaf = key.rpartition(".")
        container, number, projection = split_expert(module)
        if number is not None and formats.is_main(leaf):
            alike.setdefault((container, projection, leaf), []).append(key)
    wrong: list[str] = []
    for keys in alike.values():
        usual, count = Counter(s.entries[key].shape for key in keys).most_common(1)[0]
        if 2 * count > len(keys) > count:
            wrong += [key for key in keys if s.entries[key].shape != usual]
    return wrong


def of_other_shape(s: Subject, *, experts: bool) -> list[str]:
    """Every unquantized tensor has the shape of its parameter: those that have not.

    Args:
        experts: look at experts' weights too, that are parts of a parameter, and hold them against each other, packed
            or not. At those that transformers stacks itself it looks in any case.
    """
    packed = {
        key for m in s.quantized.values() for leaf, keys in m.leaves.items() if formats.is_main(leaf) for key in keys
    }
    wrong: list[str] = []
    for key, (_, part) in s.places.items():
        size = s.size(key) if experts or part == WHOLE or part[0] == "converter" else None
        if size is not None and key not in packed and not formats.main_parameter(key) and s.entries[key].shape != size:
            wrong.append(key)
    return list(dict.fromkeys([*wrong, *unlike_their_siblings(s)])) if experts else wrong
