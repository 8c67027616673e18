"""The names that have to stay for a consumer: its record is asked for those that its loader would miss."""

from __future__ import annotations

from dataclasses import replace

from tierewrite.consumers import CONSUMERS
from tierewrite.errors import UsageError, shown
from tierewrite.planning.policy import Policy
from tierewrite.values.opened import Opened


def with_needed_names(opened: Opened, policy: Policy) -> Opened:
    """`opened`, with the names that the consumer in `policy.keep_names_for` needs; unchanged where there is none.

    Raises:
        UsageError: that consumer has no rule for it.
    """
    if policy.keep_names_for is None:
        return opened
    consumer = CONSUMERS.get(policy.keep_names_for)
    if consumer is None or consumer.needed_names is None:
        raise UsageError(f"nothing is known of names that '{shown(policy.keep_names_for)}' needs")
    return replace(opened, needed=consumer.needed_names(opened))
