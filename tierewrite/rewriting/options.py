"""The keyword arguments that `rewrite`, `prepare_for_vllm` and `batch` share, as types; those of content: `Policy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypedDict

from tierewrite.planning.policy import OPTIONS, ConsumerName, PolicyOptions

if TYPE_CHECKING:
    from tierewrite.consumers.dry_load import LoaderMode
    from tierewrite.engines.progress import ProgressLike
    from tierewrite.stores.base import CopyMode, PathLike
    from tierewrite.ties.tie import TiesGiven

Device = Literal["auto", "cpu", "cuda"]
EngineName = Literal["local", "ray"]


class SourceOptions(TypedDict, total=False):
    """How a source is read, and who says what is tied in it."""

    ties: TiesGiven | None
    trust_remote_code: bool
    ignore_unindexed: bool


class PlanOptions(PolicyOptions, SourceOptions, total=False):
    """All that a plan depends on."""

    revision: str | None


class ItemOptions(PlanOptions, total=False):
    """What may be chosen for one checkpoint of a batch."""

    overwrite: bool
    resume: bool
    verify: bool
    consumer: ConsumerName | None
    force: bool
    loader: LoaderMode
    consumer_python: PathLike | None
    manifest: bool
    digests: bool
    copy: CopyMode


class EngineOptions(TypedDict, total=False):
    """Who does the work."""

    device: Device
    threads: int | None
    engine: EngineName
    ray_address: str | None


class BatchOptions(ItemOptions, EngineOptions, total=False):
    """What may be chosen for all checkpoints of a batch."""


class RewriteOptions(BatchOptions, total=False):
    """All of `rewrite`."""

    in_place: bool
    backup: bool
    progress: ProgressLike


ITEM_TYPES: Mapping[str, tuple[type, ...]] = {
    **{name: option.types for name, option in OPTIONS.items()},
    **dict.fromkeys(("revision", "consumer", "loader", "consumer_python", "copy"), (str,)),
    "ties": (str, dict),
    **dict.fromkeys(("trust_remote_code", "ignore_unindexed"), (bool,)),
    **dict.fromkeys(("overwrite", "resume", "verify", "force", "manifest", "digests"), (bool,)),
}
"""The types that JSON may give each of `ItemOptions`."""
