"""A rule as a record, and the rules of a consumer in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from tierewrite.consumers.findings import Finding, FixingRewrite, Severity
from tierewrite.units import with_one

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a consumer does with one kind of defect. Findings and the text of `tierewrite explain` are made from it.

    Attributes:
        id: stable, for scripts: `scale-missing`, `per-side-conflict`, ...
        title: what is wrong, in a few words.
        severity: as of a finding.
        consequence: what the consumer does.
        fix: what to do about it, one sentence; "" where nothing is known.
        source: file and function of the consumer that this was read in.
        fixed_by: the rewrite that fixes it, or None.
        when: the case that this record is for, where several records share an id because severity, consequence or
            fix depend on what was found; "" where the id has one record.
        decided_by_loader: the consumer's own loader tells this better: where it loaded the checkpoint, this rule is not
            asked, and `Consumer.loader_rules` decide. All records of a function agree in it.
    """

    id: str
    title: str
    severity: Severity
    consequence: str
    fix: str
    source: str
    fixed_by: FixingRewrite | None = None
    when: str = ""
    decided_by_loader: bool = False

    def at(self, where: Iterable[str], found: str) -> Finding:
        """A finding of this rule at the tensors or config entries `where`; `found` says what is there."""
        return Finding(
            id=self.id,
            severity=self.severity,
            where=tuple(where),
            found=with_one(found),
            consequence=self.consequence,
            fix=self.fix,
            fixed_by=self.fixed_by,
            source=self.source,
        )


class RuleSet(Generic[S]):
    """Rules for subjects of type `S`, with the functions that look for them, in the order in which they run.

    RULES: RuleSet[Subject] = RuleSet()

    WRONG_SHAPE = Rule(id="wrong-shape", ...)

    @RULES.add(WRONG_SHAPE)
    def shapes(s: Subject) -> Iterator[Finding]:
        yield WRONG_SHAPE.at(keys, "3 tensors have other shapes than their parameters")
    """

    def __init__(self) -> None:
        self.records: list[Rule] = []
        self.functions: list[Callable[[S], Iterator[Finding]]] = []
        self._left_to_loader: set[Callable[[S], Iterator[Finding]]] = set()

    def add(self, *records: Rule) -> Callable[[Callable[[S], Iterator[Finding]]], Callable[[S], Iterator[Finding]]]:
        """A decorator: the function finds where `records` are broken."""

        def registered(function: Callable[[S], Iterator[Finding]]) -> Callable[[S], Iterator[Finding]]:
            self.records += records
            self.functions.append(function)
            if any(rule.decided_by_loader for rule in records):
                assert all(rule.decided_by_loader for rule in records), function
                self._left_to_loader.add(function)
            return function

        return registered

    @classmethod
    def joined(cls, *sets: RuleSet[S]) -> RuleSet[S]:
        """All rules of `sets`, one set after the other."""
        found: RuleSet[S] = cls()
        for each in sets:
            found.records += each.records
            found.functions += each.functions
            found._left_to_loader |= each._left_to_loader
        return found

    def findings(self, subject: S, *, loaded: bool = False) -> Iterator[Finding]:
        """What every rule finds.

        Args:
            loaded: the consumer's own loader loaded the checkpoint: rules that it decides are not asked.
        """
        for function in self.functions:
            if not (loaded and function in self._left_to_loader):
                yield from function(subject)
