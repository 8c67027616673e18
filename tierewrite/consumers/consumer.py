"""A consumer as a record: who loads a checkpoint, and all that is known of how it does that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tierewrite.consumers.backbone import BackboneTable
from tierewrite.consumers.dry_load import DryLoader
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.folder import Folder
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import Subject
from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.policy import PolicyOptions
from tierewrite.stores.base import PathLike
from tierewrite.stores.mirror import Place
from tierewrite.values.opened import Opened

S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class Consumer(Generic[S]):
    """Who loads a checkpoint.

    Attributes:
        name: as users write it.
        version: the version whose sources the rules were read in.
        reads_alone: wildcard of the safetensors files that it reads alone, where there are any.
        presets: the options of a rewrite for it (planning.policy.FOR_CONSUMER).
        backbones: how it maps names to its parameters, by architecture.
        rules: what it demands.
        subject_type: what its rules look at.
        corrected_configs: the configs of an output with what `fix_ignore` has to change for it: new contents by name,
            and one sentence for each. None where nothing has to be changed.
        needed_names: of a source, the names that its loader has to find though a tie makes another tensor stand for
            them (`planning.needed_names.NeededNames`). None where one name of each tie is enough.
        seen_by_loader: ids of rules that name the cause of a load that fails or leaves something out: where the
            consumer's own loader ran and has nothing to complain of, they are mistaken.
        loader_rules: what follows from what its own loader did, where that was asked.
        dry_loader: how its own loader is asked. None where that cannot be done.
    """

    name: str
    version: str
    reads_alone: str
    presets: PolicyOptions
    backbones: BackboneTable
    rules: RuleSet[S]
    subject_type: type[S]
    corrected_configs: Callable[[S], tuple[dict[str, bytes], tuple[str, ...]]] | None = None
    needed_names: Callable[[Opened], NeededNames] | None = None
    seen_by_loader: frozenset[str] = frozenset()
    loader_rules: RuleSet[Subject] = field(default_factory=RuleSet)
    dry_loader: DryLoader | None = None

    @property
    def records(self) -> tuple[Rule, ...]:
        """All its rules: those that it is read by, and those that follow from what its own loader did."""
        return (*self.rules.records, *self.loader_rules.records)

    def findings(self, subject: S) -> Iterator[Finding]:
        """What is wrong with the checkpoint, by the consumer's own loader where it was asked, and by the rules."""
        loaded = subject.loaded is not None and subject.loaded.loaded
        by_loader = [] if subject.loaded is None else list(self.loader_rules.findings(subject))
        yield from by_loader
        clean = loaded and not any(finding.severity == "error" for finding in by_loader)
        for finding in self.rules.findings(subject, loaded=loaded):
            if not (clean and finding.id in self.seen_by_loader):
                yield finding

    def subject(self, path: Place, backbone: PathLike | None = None, **options: Any) -> S:
        """The checkpoint at `path` as this consumer reads it.

        Args:
            backbone: a file of the user's that is asked before the consumer's own table.
            options: those of `Subject`.

        Raises:
            As `Folder.open`, `BackboneTable.with_file` and `Subject`.
        """
        table = self.backbones if backbone is None else self.backbones.with_file(backbone)
        return self.subject_type(Folder.open(path, self.reads_alone), table, **options)

    def subject_with(self, path: Place, configs: Path, **options: Any) -> S:
        """The same with the config.json and hf_quant_config.json of the folder `configs` in place of its own."""
        folder = Folder.open(path, self.reads_alone).with_configs(configs)
        return self.subject_type(folder, self.backbones, **options)
