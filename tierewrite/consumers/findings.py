"""What a check found, as data: findings, and the report that holds them. JSON both ways; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tierewrite.errors import EXIT_FINDINGS, EXIT_OK
from tierewrite.tables import Summary, count, some, text

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "tierewrite/readiness/1"
Severity = Literal["error", "warning"]
FixingRewrite = Literal[
    "rewrite",
    "rewrite --fill-missing-scales",
    "rewrite --for vllm",
    "rewrite --kv-scales merge",
    "rewrite --unify-fused-scales",
]


@dataclass(frozen=True, slots=True, repr=False)
class Finding(Summary):
    """One thing that a consumer will stumble over.

    Attributes:
        id: stable, for scripts: `scale-missing`, `per-side-conflict`, ...
        severity: "error": refused at load, or other numbers than the checkpoint means, on every backend;
            "warning": only on some backends, or overridable, or a waste.
        where: the tensors (by name) or config entries (`config.json: quantization_config.ignore[3]`) concerned.
        found: what is there, one sentence.
        consequence: what the consumer does with it.
        fix: what to do about it, one sentence; "" where nothing is known.
        fixed_by: the rewrite that fixes it, or None.
        source: file and function of the consumer that this was read in.
    """

    id: str
    severity: Severity
    where: tuple[str, ...]
    found: str
    consequence: str
    fix: str
    fixed_by: FixingRewrite | None
    source: str

    def one_line(self) -> str:
        """See `Summary`."""
        return f"{self.severity}: {self.id}: {self.found}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield text(str(self))

    def to_json(self) -> dict[str, Any]:
        """All attributes, by name."""
        return {name: getattr(self, name) for name in self.__slots__} | {"where": list(self.where)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """What `to_json` wrote."""
        return cls(**{name: data[name] for name in cls.__slots__ if name != "where"}, where=tuple(data["where"]))

    def __str__(self) -> str:
        return f"{self.severity}: {self.id}: {self.found} [{some(self.where)}]; {self.consequence}"


@dataclass(frozen=True, slots=True, repr=False)
class ReadinessReport(Summary):
    """What `check` found in one checkpoint for one consumer.

    Attributes:
        consumer, consumer_version: "vllm" and the version whose sources the rules were read in.
        checkpoint: the folder, as given.
        tensors: how many tensors the consumer will read.
        bytes_read: bytes of tensor data (scales, and names that meet) that were looked at.
        findings: errors first, then by id.
        notes: what could not be checked, and why; never a reason to fail.
    """

    consumer: str
    consumer_version: str
    checkpoint: str
    tensors: int
    bytes_read: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def one_line(self) -> str:
        """See `Summary`."""
        counts = f"{count(len(self.errors), 'error')}, {count(len(self.warnings), 'warning')}"
        return f"{self.consumer} {self.consumer_version}: {counts} in {count(self.tensors, 'tensor')}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        for finding in self.findings:
            style = "red" if finding.severity == "error" else "yellow"
            yield text(finding.one_line(), style)
            yield text(f"    where: {some(finding.where)}")
            yield text(f"    {self.consumer}: {finding.consequence}")
            if finding.fix:
                yield text(f"    fix: {finding.fix}")
        for note in self.notes:
            yield text(f"note: {note}")
        yield text(self.one_line(), "red" if self.errors else "green")

    @property
    def ready(self) -> bool:
        """No finding is an error."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity error."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings of severity warning."""
        return tuple(f for f in self.findings if f.severity == "warning")

    def ids(self) -> set[str]:
        """The ids of all findings."""
        return {f.id for f in self.findings}

    def exit_code(self, *, strict: bool = False) -> int:
        """0 when no finding is an error, 6 otherwise; with `strict` warnings count too."""
        return EXIT_FINDINGS if self.errors or (strict and self.findings) else EXIT_OK

    def only_per_side_conflicts(self) -> bool:
        """Whether there are errors and all of them are conflicts that no rewrite can merge."""
        return bool(self.errors) and all(f.id == "per-side-conflict" for f in self.errors)

    def to_json(self) -> dict[str, Any]:
        """An object with `schema`, `ready` (no errors), the counts, and every finding in full."""
        return {
            "schema": SCHEMA,
            "consumer": self.consumer,
            "consumer_version": self.consumer_version,
            "checkpoint": self.checkpoint,
            "ready": self.ready,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "tensors": self.tensors,
            "bytes_read": self.bytes_read,
            "findings": [f.to_json() for f in self.findings],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReadinessReport:
        """What `to_json` wrote.

        Raises:
            ValueError: the object's schema is another one.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}; expected {SCHEMA!r}")
        return cls(
            consumer=data["consumer"],
            consumer_version=data["consumer_version"],
            checkpoint=data["checkpoint"],
            tensors=data["tensors"],
            bytes_read=data["bytes_read"],
            findings=tuple(Finding.from_json(f) for f in data["findings"]),
            notes=tuple(data.get("notes", ())),
        )


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors before warnings, then by id and place."""
    return tuple(sorted(findings, key=lambda f: (f.severity, f.id, f.where)))
