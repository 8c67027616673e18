"""How messages spell options: as flags for whoever typed a command, as keyword arguments for whoever calls a function.

Messages are written with flags. An error turns them into keyword arguments when it is shown, a result when it is made,
unless a command is being carried out. Commands of others that a message quotes stay as they are: those in backquotes,
and what follows "to go on:".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

SWITCHES = frozenset(
    {
        "backup", "confirm", "digests", "duplicates", "fill-missing-scales", "fix-config", "fix-ignore", "force",
        "ignore-unindexed", "in-place", "manifest", "overwrite", "plan-only", "private", "resume", "strip-prefix",
        "trust-remote-code", "unify-fused-scales", "values", "verify",
    }
)  # fmt: skip
VALUES = frozenset(
    {
        "backbone", "consumer-python", "copy", "device", "engine", "exclude", "into", "jobs", "keep-names-for",
        "kv-scales", "loader", "max-shard-size", "on-mismatch", "ray-address", "revision", "sample",
        "tensor-parallel-size", "threads", "ties", "worst",
    }
)  # fmt: skip
RENAMED = {"for": "consumer"}
"""Flags whose keyword argument has another name."""
_CHOICES = "auto|cpu|cuda|error|keep|repack|merge|local|ray|never|require|off|vllm|sglang|tensorrt-llm|transformers"
_FLAG = re.compile(
    rf"`[^`]*`|to go on: .*|(?<![\w-])--(?P<no>no-)?(?P<name>[a-z][a-z-]*)(?: (?P<value>{_CHOICES}|[A-Z]+)\b)?"
)

_commands = 0


@contextlib.contextmanager
def of_a_command() -> Iterator[None]:
    """While a command is carried out messages speak of flags."""
    global _commands
    _commands += 1
    try:
        yield
    finally:
        _commands -= 1


def spelled(message: str) -> str:
    """A message as its reader would write the options that it names."""
    return message if _commands or "--" not in message else _FLAG.sub(_in_python, message)


def said_once(*several: Iterable[str]) -> tuple[str, ...]:
    """What a result has to say, each once, as its reader would write the options."""
    return tuple(dict.fromkeys(spelled(said) for some in several for said in some))


def _in_python(found: re.Match[str]) -> str:
    no, name, value = found["no"], found["name"], found["value"]
    if name == "ties" and no:
        return "ties={}"
    if name in SWITCHES:
        return f"{_keyword(name)}={not no}" + (f" {value}" if value else "")
    if no or (name not in VALUES and name not in RENAMED):
        return found[0]
    if value is None:
        return _keyword(name)
    return f"{_keyword(name)}={value if value.isupper() else repr(value)}".replace("'", '"')


def _keyword(name: str) -> str:
    return RENAMED.get(name, name.replace("-", "_"))
