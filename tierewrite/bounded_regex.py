"""Regular expressions that strangers wrote, matched in bounded time.

They come from ties files, config.json and ignore lists, in the language of Python's `re`: transformers' own patterns
use lookaheads (`class_embed.(?![0])\\d+`), which RE2 does not have. `re` itself cannot be stopped, so whatever may take
more than a little is matched by the `regex` package (a dependency of transformers), whose matches have a timeout.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from tierewrite.errors import shown

LONGEST = 10_000  # characters; transformers' own patterns have less than a hundred
SECONDS_A_NAME = 1.0
"""What one match may take; a million times what it takes with a pattern of transformers' own."""
SECONDS = 10.0
SECONDS_MORE_A_NAME = 50e-6
"""All names together may take `SECONDS`, and this for each."""

# No choice, no repetition of a group and two repetitions at most: n characters take at most n^2 steps. One group may be
# repeated, `(?:[^.]+\.)*`, the modules on the way to a parameter: only its end matches a dot, so there is one way.
_SIMPLE = re.compile(
    r"\^?(?:\(\?:\[\^\.\]\+\\\.\)\*|(?:[A-Za-z0-9_\-.]|\\[.dDwW]|\[\^?(?:[A-Za-z0-9_.]|\\[.dDwW])+\])(?:[*+]\??|\?)?"
    r"|\((?:\?:)?|\)(?![*+?{]))*\$?"
)
_REPETITIONS = 2
SHORT_NAME = 1_000  # characters: a million steps are 10 ms

# What `regex` reads otherwise than `re`: `{e<=1}`, which is text to `re`, and `[:alpha:]`.
_BRACE = re.compile(r"\\N\{[^}]*\}|\\.|\{(?![0-9]*,?[0-9]*\})", re.DOTALL)
_POSIX_CLASS = re.compile(r"\[:\^?[A-Za-z0-9_]+:\]")


class BadPattern(ValueError):
    """What is no regular expression, or takes too long; the message says which, without naming the pattern."""


def is_simple(pattern: str) -> bool:
    """Whether matching a short name with `pattern` takes no time worth bounding."""
    return (
        len(pattern) <= LONGEST
        and _SIMPLE.fullmatch(pattern) is not None
        and sum(map(pattern.count, "*+?")) - pattern.count("(?:") <= _REPETITIONS
    )


class BoundedRegex:
    """One pattern, compiled.

    Args:
        pattern: what a stranger wrote.
        around: what it stands in, with `{}` in its place; ours.
        ours: `pattern` is one that is known to take no time worth bounding, as `fnmatch.translate` makes them.

    Attributes:
        simple: matching a short name takes no time worth bounding.
        text: all of it.

    Raises:
        BadPattern: `re` cannot read it, or it is longer than any real one.
    """

    def __init__(self, pattern: str, around: str = "{}", *, ours: bool = False) -> None:
        if len(pattern) > LONGEST and not ours:
            raise BadPattern(f"it has {len(pattern)} characters; at most {LONGEST} are read")
        self.text = around.replace("{}", pattern)
        try:
            self._fast = re.compile(self.text)
        except (re.error, OverflowError, RecursionError) as error:
            raise BadPattern(f"it is no regular expression: {error}") from error
        self.simple = ours or is_simple(pattern)
        self.has_flags = self._fast.flags != re.UNICODE
        self._timed: Any = None if self.simple else _timed(self.text)

    def matching(self, names: Iterable[str], *, anywhere: bool = False) -> list[str]:
        """The names that match from their start, or `anywhere` in them, in order.

        Raises:
            BadPattern: it takes too long.
        """
        found: list[str] = []
        fast = self._fast.search if anywhere else self._fast.match
        short = 0 if not self.simple else 100 if anywhere else SHORT_NAME
        started = time.thread_time()
        for number, name in enumerate(names):
            if number % 64 == 63 and time.thread_time() - started > SECONDS + SECONDS_MORE_A_NAME * number:
                raise _too_slow(name)
            if (fast(name) is not None) if len(name) <= short else self._matches_before_timeout(name, anywhere):
                found.append(name)
        return found

    def _matches_before_timeout(self, name: str, anywhere: bool) -> bool:
        if self._timed is None:
            self._timed = _timed(self.text)
        try:
            match = self._timed.search if anywhere else self._timed.match
            return match(name, timeout=SECONDS_A_NAME) is not None
        except TimeoutError:
            raise _too_slow(name) from None
        except (MemoryError, RecursionError) as error:
            raise BadPattern(f"matching '{shown(name)}' takes too much memory ({type(error).__name__})") from None


def _timed(pattern: str) -> Any:
    """`pattern` compiled by the package that can stop.

    Raises:
        BadPattern: it is read otherwise there.
    """
    import regex  # 40 ms, and only for patterns that are not simple

    if _POSIX_CLASS.search(pattern):
        raise BadPattern("it holds a POSIX class such as [:alpha:], which Python's re does not know: write it out")
    spoken = _BRACE.sub(lambda found: r"\{" if found[0] == "{" else found[0], pattern)
    try:
        return regex.compile(spoken, regex.VERSION0, cache_pattern=False)
    except (regex.error, OverflowError, RecursionError) as error:
        raise BadPattern(f"it is no regular expression that can be bounded: {error}") from error


def _too_slow(name: str) -> BadPattern:
    return BadPattern(
        f"it takes too long at '{shown(name)}': write it without repetitions inside repetitions, as (a+)+, or name "
        "the parameters"
    )
