"""The names that have to stay for a consumer: its record is asked for those that its loader would miss."""

from __future__ import annotations

from dataclasses import replace

from tierewrite.consumers import CONSUMERS
from tierewrite.consumers.transformers.names import dropped_names_warning
from tierewrite.errors import UsageError, shown
from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.policy import Policy
from tierewrite.values.opened import Opened


def with_needed_names(opened: Opened, policy: Policy, consumer: str | None = None) -> Opened:
    """`opened`, with the names that the consumer in `policy.keep_names_for` needs.

    Where there is none the plan of an output for nobody in particular warns of names that it drops and that the loader
    of the checkpoint's own quantizer needs.

    Args:
        consumer: for whom the output is.

    Raises:
        UsageError: that consumer has no rule for it.
    """
    if policy.keep_names_for is None:
        notes = dropped_names_warning(opened) if consumer is None else ()
        return replace(opened, needed=NeededNames(notes=notes, of_dropped=True)) if notes else opened
    record = CONSUMERS.get(policy.keep_names_for)
    if record is None or record.needed_names is None:
        raise UsageError(f"nothing is known of names that '{shown(policy.keep_names_for)}' needs")
    return replace(opened, needed=record.needed_names(opened))
