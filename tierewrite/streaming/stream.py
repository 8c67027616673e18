"""`stream`: a checkpoint's tensors under their canonical names, decided as a rewrite decides, without writing one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tierewrite.engines import open_engine
from tierewrite.engines.progress import ProgressLike, progress_of
from tierewrite.errors import UsageError
from tierewrite.kept_files import cache_folder
from tierewrite.output.configs import configs_of
from tierewrite.output.unwritten import UnwrittenOutput
from tierewrite.planning.plan import Action, RewritePlan
from tierewrite.planning.policy import ConsumerName, Policy, PolicyOptions
from tierewrite.rewriting.confirmed import Confirmed, confirmed
from tierewrite.rewriting.options import Device
from tierewrite.rewriting.run import asking
from tierewrite.rewriting.steps import check_for, refuse_unusable_loader, with_needed
from tierewrite.source.open import fetched, name_in_messages
from tierewrite.source.table import Checkpoint, Tensors
from tierewrite.spelling import said_once
from tierewrite.stores.base import PathLike
from tierewrite.stores.mirror import RemoteFolder
from tierewrite.streaming.remembered import Digests
from tierewrite.streaming.tensors import as_tensor, tensors_of, unknown_to_torch
from tierewrite.tables import repr_of
from tierewrite.ties.tie import TiesGiven
from tierewrite.values.content import COPY, Content
from tierewrite.values.opened import Opened

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from tierewrite.consumers import ReadinessReport
    from tierewrite.consumers.dry_load import LoaderMode


@dataclass(frozen=True, repr=False)
class Stream(Iterable[tuple[str, "torch.Tensor"]]):
    """The tensors that a rewrite would write, decided and confirmed. Each iteration reads the source again.

    Attributes:
        plan: what becomes of each tensor of the source, and the shards of the output.
        configs: config.json and hf_quant_config.json as a rewrite would write them, where that is not as they are;
            by name.
        readiness: with a consumer, what `check` says of the output.
        warnings: sentences for people.
        hashed_bytes: bytes of the source that were hashed to confirm ties; 0 where all was remembered.
    """

    plan: RewritePlan
    configs: Mapping[str, bytes]
    readiness: ReadinessReport | None
    warnings: tuple[str, ...]
    hashed_bytes: int
    _checkpoint: Checkpoint
    _contents: Mapping[str, Content]
    _in_files: Tensors

    def __repr__(self) -> str:
        return repr_of(self, self.plan.one_line())

    @property
    def names(self) -> list[str]:
        """The keys of the output, in the order of its files."""
        return [name for shard in self.plan.shards for name in shard.names]

    def __len__(self) -> int:
        return self.plan.total_tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.tensors()

    def tensors(
        self, *, by_name: bool = False, wanted: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, shard by shard of the output: (key, tensor on the CPU).

        A survivor in a folder of this machine is a view of its file, mapped privately: writing to it changes neither
        the file nor another tensor. Of all else at most three loads of 8 MiB are in memory, or of one tensor where
        that is larger.

        Args:
            by_name: within a shard by name, which is the order that `safetensors.safe_open(...).keys()` gives; else
                as they lie in the file.
            wanted: whether a key is wanted; what is not is not read.

        Raises:
            SourceChanged: a file of the source is not, or at the end no longer, what was confirmed.
            SystemFailure: reading failed.
        """
        return tensors_of(self._unwritten(), by_name, wanted)

    def through(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors out of what another reader gives of the source's files, such as one that reads to a GPU.

        What survives is passed on as it came, under its canonical name; what is dropped is not; merged, filled and
        re-encoded tensors take the place of the source's, on its device. The order is the reader's; tensors that the
        source does not have come last.

        Args:
            tensors: (key in the source, tensor). What the reader leaves out is left out.

        Raises:
            KeyError: a key that the source does not have. SourceChanged, SystemFailure: as `tensors`.
        """
        plan, made = self.plan, _Made(self._unwritten())
        read: set[int] = set()  # numbers of files
        with made.output:
            for name, tensor in tensors:
                # The reader gives names as they are in the files, the plan may have them without those of wrappers.
                row = self._in_files.row[name]
                read.add(int(self._in_files.shard[row]))
                fate = plan.tensors[plan.source.names[row]]
                if fate.action is Action.DROP:
                    continue
                if self._contents.get(fate.target, COPY) is COPY:
                    yield fate.target, tensor
                else:
                    yield fate.target, made.tensor(fate.target).to(tensor.device)
            for shard in plan.shards:
                for one in shard.tensors:
                    if one.added:
                        yield one.name, made.tensor(one.name)
            for number in sorted(read):
                made.output.source(number)
            made.output.finish()

    def _unwritten(self) -> UnwrittenOutput:
        return UnwrittenOutput(self._checkpoint, self.plan, self._contents)


class _Made:
    """The tensors of an output that are no copies, one by one."""

    def __init__(self, output: UnwrittenOutput) -> None:
        self.output = output
        self._places = {
            one.name: (shard, one)
            for shard in output.plan.shards
            for one in shard.tensors
            if one.name in output.contents
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that key. Raises SourceChanged, SystemFailure."""
        shard, one = self._places[name]
        data = bytearray(one.end - one.start)
        self.output.read(shard, one.start, one.end, memoryview(data))
        table = self.output.checkpoint.tensors
        return as_tensor(data, 0, table.kinds[table.kind[table.row[one.source]]])


def stream(
    src: PathLike,
    *,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
    consumer: ConsumerName | None = None,
    force: bool = False,
    loader: LoaderMode = "auto",
    consumer_python: PathLike | None = None,
    device: Device = "auto",
    threads: int | None = None,
    remember: bool = False,
    progress: ProgressLike = None,
    **options: Unpack[PolicyOptions],
) -> Stream:
    """The checkpoint in `src` as `rewrite` would write it: its tensors under canonical names, and nothing is written.

        for name, tensor in tierewrite.stream("exported"):
            ...

    Everything is decided here, before the first tensor: headers and ties are read, tied tensors hashed, scales merged,
    and what `rewrite` with the same options would refuse is refused, with the same message. The tensors are, byte for
    byte, those of its output.

    Args:
        src: as for `rewrite`: a folder, a URL, or a hub id, of which a snapshot is taken. Never written to.
        ties, trust_remote_code, ignore_unindexed, revision: as for `rewrite`.
        consumer: make the choices that it needs, where `options` does not, and refuse what `rewrite --for` refuses.
        force: with `consumer`, give the tensors all the same.
        loader, consumer_python: as for `check`: whether the consumer's own loader is asked, and the Python that has it.
        device, threads: as for `rewrite`: where and by how many workers tied tensors are hashed.
        remember: keep the digests below the cache folder (TIEREWRITE_CACHE, else XDG_CACHE_HOME/tierewrite; empty:
            off), under the identity of every file of `src`. Of several processes of a host that ask at once, one
            hashes and the others wait for it.
        progress: called with how many bytes were hashed.
        options: as for `rewrite`; what concerns other files (`exclude`) changes nothing here.

    Returns:
        An iterable of (name, torch tensor on the CPU), in the order of the output's files; it can be iterated again.

    Raises:
        UsageError: the call cannot be carried out, or torch lacks a dtype. Refused, SourceError, SystemFailure,
        NotReady: as `rewrite`. While iterating: SourceChanged, SystemFailure.
    """
    policy = Policy.of(consumer, **options)
    watched = progress_of(progress)
    refuse_unusable_loader(consumer, force, loader, consumer_python)
    place = fetched(src, revision=revision, bars=watched.shown)
    with open_engine("local", device=device, threads=threads, progress=watched) as workers:
        opened = Opened.open(
            place,
            ties=ties,
            trust_remote_code=trust_remote_code,
            ignore_unindexed=ignore_unindexed,
            meanwhile=partial(asking, watched, ahead=True),
        )
        in_files = opened.checkpoint.tensors
        opened = with_needed(opened.under(policy), policy, consumer)
        hasher = Digests(workers, cache_folder("digests", place) if remember else None)
        found = confirmed(opened, policy, hasher)
    if missing := unknown_to_torch(opened.checkpoint.tensors.kinds):
        raise UsageError(f"the installed torch has no dtype for {', '.join(missing)}; update torch", file=src)
    configs, config_warnings = configs_of(opened.checkpoint, found.plan, opened.disk, opened.ties)
    readiness = None
    if consumer is not None:
        from tierewrite.consumers import corrected_configs  # a tenth of a second

        def correct(output: RemoteFolder) -> tuple[dict[str, bytes], tuple[str, ...]]:
            return corrected_configs(consumer, output, ties=ties, trust_remote_code=trust_remote_code)

        def judge(output: RemoteFolder) -> ReadinessReport:
            return check_for(
                consumer,
                output,
                name_in_messages(src),
                ties=ties,
                trust_remote_code=trust_remote_code,
                force=force,
                loader=loader,
                consumer_python=consumer_python,
            )

        configs, sentences, readiness = _judged(opened.checkpoint, found, configs, correct, judge)
        config_warnings = (*config_warnings, *sentences)
    warnings = said_once(opened.ties.warnings, found.warnings, config_warnings)
    return Stream(
        found.plan, configs, readiness, warnings, hasher.nbytes, opened.checkpoint, found.values.contents, in_files
    )


def _judged(
    checkpoint: Checkpoint,
    found: Confirmed,
    configs: Mapping[str, bytes],
    correct: Callable[[RemoteFolder], tuple[dict[str, bytes], tuple[str, ...]]],
    judge: Callable[[RemoteFolder], ReadinessReport],
) -> tuple[Mapping[str, bytes], tuple[str, ...], ReadinessReport]:
    """What a consumer makes of the output: configs corrected for it, sentences about them, and its verdict.

    Args:
        correct: `corrected_configs` for the consumer, of an output.
        judge: `check_for` the consumer, of an output.

    Raises:
        NotReady: errors that a rewrite could have avoided, or that make the output useless, unless `force`.
    """
    from tierewrite.stores.in_process import served  # imports fsspec

    sentences: tuple[str, ...] = ()
    with UnwrittenOutput(checkpoint, found.plan, found.values.contents) as output, served(output.files()) as base:
        if found.plan.policy.fix_ignore:
            corrected, sentences = correct(RemoteFolder(base, configs))
            configs = {**configs, **corrected}
        readiness = judge(RemoteFolder(base, configs))
    return configs, sentences, readiness
