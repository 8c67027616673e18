"""Is a checkpoint ready for a consumer? Found from headers and the bytes of scales, before anything is served.

    report = tierewrite.readiness.check("DST", "vllm")
    for finding in report.findings:
        print(finding)

One file a consumer: `vllm` and `transformers`; each is a list of small rules over a `Subject`. This room reads and
never writes (but for `mends`, in staged output). It refuses a folder whose headers or configs cannot be read at all
(SourceError, exit 4); everything that a loader would trip over later is a `Finding`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tierewrite.consumers.findings import SCHEMA, Finding, ReadinessReport, in_order
from tierewrite.errors import UsageError

if TYPE_CHECKING:
    from tierewrite.source.open import Place



__all__ = ["CONSUMERS", "SCHEMA", "Finding", "ReadinessReport", "check"]

CONSUMERS = ("vllm", "transformers")


def check(
    path: Place,
    consumer: str = "vllm",
    *,
    backbone: str | os.PathLike[str] | None = None,
    ties: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    compare_limit: int = 4 << 30,
) -> ReadinessReport:
    """What `consumer` will do with the checkpoint folder `path`.

    Reads headers, configs, the bytes of scales, and tensors whose names meet in one parameter of the consumer, those
    up to `compare_limit` bytes in all; writes nothing.

    Args:
        path: the folder, or its URL.
        consumer: "vllm" or "transformers".
        backbone: a JSON file that describes how vLLM maps names (the form of backbones.json here), asked before
            the built-in one.
        ties, trust_remote_code: as for `rewrite`.
        compare_limit: bytes of equal names to compare at most; beyond it they are reported as not compared.

    Raises:
        UsageError: an unknown consumer, or a broken backbone file.
        SourceError: the folder's headers, index or configs cannot be read.
        SystemFailure: the system does not let us read it.
    """
    from tierewrite.consumers.folder import Folder
    from tierewrite.consumers.subject import Subject
    from tierewrite.source.open import name_of

    options: dict[str, Any] = {
        "ties_file": ties,
        "trust_remote_code": trust_remote_code,
        "compare_limit": compare_limit,
    }
    subject: Subject
    if consumer == "vllm":
        from tierewrite.consumers import vllm

        subject = vllm.VllmSubject(Folder.open(path, "vllm"), backbone=backbone, **options)
        version, found = vllm.VERSION, in_order(vllm.findings(subject))
    elif consumer == "transformers":
        from tierewrite.consumers import transformers

        subject = Subject(Folder.open(path, "transformers"), backbone=transformers.PLAIN, **options)
        version, found = transformers.VERSION, in_order(transformers.findings(subject))
    else:
        raise UsageError(f"no rules for the consumer '{consumer}'; known: {', '.join(CONSUMERS)}")
    return ReadinessReport(
        consumer=consumer,
        consumer_version=version,
        checkpoint=name_of(path),
        tensors=len(subject.entries),
        bytes_read=subject.bytes_read,
        findings=found,
        notes=tuple(dict.fromkeys(subject.notes)),
    )
