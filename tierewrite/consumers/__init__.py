"""Is a checkpoint ready for a consumer? Found from headers and the bytes of scales, before anything is served.

    report = tierewrite.check("DST", "vllm")
    for finding in report.findings:
        print(finding)

Each consumer is a record in `CONSUMERS`, with rules that are records too. This room reads and never writes. It refuses
a folder whose headers or configs cannot be read at all (SourceError, exit 4); everything that a loader would trip over
later is a `Finding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tierewrite.consumers.consumer import Consumer
from tierewrite.consumers.dry_load import LoaderMode, LoaderOptions, dry_load, interpreter, reason_for_people
from tierewrite.consumers.findings import SCHEMA, Finding, ReadinessReport, in_order
from tierewrite.consumers.sglang import SGLANG
from tierewrite.consumers.sparse_copy import as_local_folder
from tierewrite.consumers.subject import Subject
from tierewrite.consumers.tensorrt_llm import TENSORRT_LLM
from tierewrite.consumers.transformers import TRANSFORMERS
from tierewrite.consumers.value_rules import look_at_values
from tierewrite.consumers.vllm import VLLM
from tierewrite.errors import SystemFailure, UsageError, shown
from tierewrite.planning.policy import ConsumerName
from tierewrite.source.open import name_in_messages
from tierewrite.spelling import said_once
from tierewrite.stores.base import PathLike
from tierewrite.stores.mirror import Place
from tierewrite.ties.tie import TiesGiven

__all__ = [
    "CONSUMERS", "SCHEMA", "Finding", "LoaderMode", "LoaderOptions", "ReadinessReport", "check", "consumer_named",
    "corrected_configs", "refuse_no_interpreter",
]  # fmt: skip

CONSUMERS: Mapping[str, Consumer[Any]] = {
    consumer.name: consumer for consumer in (VLLM, SGLANG, TENSORRT_LLM, TRANSFORMERS)
}


def check(
    path: Place,
    consumer: ConsumerName = "vllm",
    *,
    backbone: PathLike | None = None,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    compare_limit: int = 4 << 30,
    loader: LoaderMode = "auto",
    consumer_python: PathLike | None = None,
    tensor_parallel_size: int = 1,
    values: bool = False,
    sample: int | None = None,
    name: object = None,
) -> ReadinessReport:
    """What `consumer` will do with the checkpoint folder `path`.

    Asks the consumer's own loader, where a Python that has it is known (in a process of its own: no weight is read, and
    no GPU is needed); what it tells decides. Reads headers, configs, the bytes of scales, and tensors whose names meet
    in one parameter of the consumer, those up to `compare_limit` bytes in all; writes nothing.

    Args:
        path: the folder, or its URL.
        consumer: one of `CONSUMERS`, such as "vllm".
        backbone: a JSON file that describes how the consumer maps names (the form of vllm/backbones.json here), asked
            before the built-in table.
        ties, trust_remote_code: as for `rewrite`.
        compare_limit: bytes of equal names to compare at most; beyond it they are reported as not compared.
        loader: "auto": ask the consumer's own loader if a Python that has it is known, and note it if not; "require":
            raise if it cannot be asked; "off": go by the rules alone.
        consumer_python: the Python interpreter that has the consumer; None: what TIEREWRITE_VLLM_PYTHON (or the like)
            names, else this one.
        tensor_parallel_size: ranks that share the weights when it is served.
        values: read the weights too, and look for what is broken in them (`value_rules.py`): on a GPU that CuPy can
            use, else on the CPU.
        sample: with `values`, how many weights to read, at even distances; None: all.
        name: what messages call the checkpoint, where that is not `path`.

    Raises:
        UsageError: an unknown consumer, a broken backbone file, or an interpreter that is none.
        SourceError: the folder's headers, index or configs cannot be read.
        SystemFailure: the system does not let us read it, or the loader is required and could not be asked.
    """
    if sample is not None and not values:
        raise UsageError("--sample goes with --values; leave it out, or add that")
    if sample is not None and sample < 1:
        raise UsageError(f"sample is {sample}; expected a number of weights from 1 on")
    asked = consumer_named(consumer)
    called = name_in_messages(path) if name is None else str(name)
    chosen = LoaderOptions(loader, consumer_python, tensor_parallel_size, trust_remote_code)
    refuse_no_interpreter(consumer, chosen)
    subject = asked.subject(path, backbone, ties=ties, trust_remote_code=trust_remote_code, compare_limit=compare_limit)
    if asked.dry_loader is not None:
        ask_loader(asked, subject, called, chosen)
    broken = look_at_values(subject, sample=sample) if values else ()
    found = in_order((*asked.findings(subject), *broken))
    return ReadinessReport(
        consumer=asked.name,
        consumer_version=subject.loaded.version if subject.loaded is not None else asked.version,
        checkpoint=called,
        tensors=len(subject.entries),
        bytes_read=subject.bytes_read,
        findings=found,
        notes=said_once(subject.notes),
    )


def refuse_no_interpreter(consumer: str, options: LoaderOptions) -> None:
    """Raises UsageError where a Python was named that cannot be run: before any work is done."""
    loader = consumer_named(consumer).dry_loader
    if loader is not None and options.mode != "off":
        interpreter(loader, options.python)


def ask_loader(consumer: Consumer[Any], subject: Subject, name: str, options: LoaderOptions) -> None:
    """Lets the consumer's own loader load the checkpoint; `subject.loaded` is what it did, where it could be asked.

    Args:
        name: what messages call the checkpoint.

    Raises:
        UsageError, SourceError and its kin: as `check`.
        SystemFailure: it is required and could not be asked.
    """
    loader = consumer.dry_loader
    assert loader is not None
    if options.mode == "off":
        subject.notes.append(f"{loader.title}'s own loader was not asked (--loader off); rules decided alone")
        return
    with as_local_folder(subject.folder) as folder:
        done = dry_load(loader, {folder: name}, options)[0]
    if done.ran:
        subject.loaded = done
        return
    if options.mode == "require":
        raise SystemFailure(
            f"{loader.title}'s own loader could not be asked: {reason_for_people(done)}",
            advice=f"name a Python in which {loader.title} works (--consumer-python), or leave out --loader require",
        )
    nowhere = interpreter(loader, options.python) is None
    advice = "; name one that has it with --consumer-python" if nowhere else ""
    said = f"{reason_for_people(done)}{advice}"
    subject.notes.append(f"{loader.title}'s own loader was not asked, rules decided alone: {said}")


def corrected_configs(
    consumer: str,
    path: Place,
    *,
    configs: Path | None = None,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """What `fix_ignore` has to change for `consumer` in the configs of the checkpoint folder `path`.

    Args:
        configs: a folder whose config.json and hf_quant_config.json are looked at in place of those of `path`.
        ties, trust_remote_code: as for `rewrite`.

    Returns:
        New contents by name, and one sentence for each.

    Raises:
        UsageError: an unknown consumer.
        SourceError and its kin: the folder cannot be read.
    """
    asked = consumer_named(consumer)
    if asked.corrected_configs is None:
        return {}, ()
    if configs is None:
        return asked.corrected_configs(asked.subject(path, ties=ties, trust_remote_code=trust_remote_code))
    subject = asked.subject_with(path, configs, ties=ties, trust_remote_code=trust_remote_code)
    return asked.corrected_configs(subject)


def consumer_named(name: str) -> Consumer[Any]:
    """The record of a consumer. Raises UsageError where there is none of that name."""
    if name not in CONSUMERS:
        raise UsageError(f"no rules for the consumer '{shown(name)}'; known: {', '.join(CONSUMERS)}")
    return CONSUMERS[name]
