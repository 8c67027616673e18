"""What follows from what a consumer's own loader did: the rules for every consumer whose loader is asked.

Each consumer has records of its own, made by `loader_rules`; the functions stand here once. They see `Subject.loaded`.
"""

from __future__ import annotations

from tierewrite.consumers.rules import RuleSet
from tierewrite.consumers.subject import Subject


def loader_rules(title: str) -> RuleSet[Subject]:
    """The rules for the consumer that its makers call `title`."""
    return RuleSet()
