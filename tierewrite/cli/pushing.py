"""`rewrite --push`: what is asked of the hub before the rewrite, and the upload after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tierewrite import interrupts
from tierewrite.output.push import Push
from tierewrite.report import Report
from tierewrite.stores.places import is_local, located


def push_of(options: dict[str, Any], src: str, dst: str | None, manifest: bool) -> Push | None:
    """Takes `push` and `private` out of a rewrite's options, and asks the hub whether it would take the output.

    A publisher wants the digest of every tensor in the manifest: `digests` is set.

    Raises:
        UsageError, SystemFailure: as `Push.checked`.
    """
    repo, private = options.pop("push", None), options.pop("private", False)
    if repo is None:
        if private:
            raise click.UsageError("--private goes with --push; leave it out, or add that")
        return None
    if manifest:
        options["digests"] = True
    return Push.checked(repo, private, located(src if dst is None else dst))


def pushed(report: Report, push: Push, forced: bool) -> Report:
    """Uploads what a rewrite wrote. Not where the consumer's check found errors, unless it is `forced`.

    Raises:
        UsageError, SystemFailure: as `Push.upload_in_child`.
    """
    if report.readiness is not None and report.readiness.errors and not forced:
        said = f"not uploaded to {push.repo}: errors are left for {report.readiness.consumer} (--force uploads it)"
        return replace(report, warnings=(*report.warnings, said))
    place = located(report.dst)
    assert is_local(place)
    with interrupts.standing() as said_of_dst:
        said_of_dst.append(f"DST is complete, and the upload to {push.repo} is not")
        report = replace(report, pushed=push.upload_in_child(Path(place)))
        said_of_dst.append(f"DST is complete, and so is the upload to {push.repo}")
    return report
