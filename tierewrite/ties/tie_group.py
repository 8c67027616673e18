"""Ties under the names that are on disk, as data."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

# How a tensor on disk stands for (a part of) a parameter: () for all of it; else the expert's part.
Part = tuple[Any, ...]
WHOLE: Part = ()


@dataclass(frozen=True, slots=True)
class TieGroup:
    """One canonical parameter with everything that is tied to it.

    Attributes:
        id: the canonical parameter's name in memory; unique.
        canonical: the same name.
        aliases: the parameters tied to it, in the order of their declaration.
        origins: who declared each, as `Tie.origin`, one per alias.
        slots: one tuple per tensor that the parameter is on disk: its name under the canonical side, then under each
            alias, as if unquantized (`...experts.3.gate_proj.weight`). A name need not exist as a key. Slots of which
            no side has anything on disk are left out.
        problem: why the sides cannot be compared slot by slot, or None.
    """

    id: str
    canonical: str
    aliases: tuple[str, ...]
    origins: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    problem: str | None = None


@dataclass(frozen=True)
class DiskTies:
    """The ties of a checkpoint under its own names.

    Attributes:
        groups: every group with at least one slot, in the order of the declarations.
        owned: the keys that are a parameter or buffer of the model themselves (never a companion of a neighbour);
            empty when no model class was asked.
        idle: canonical parameters of declared ties of which nothing is on disk, on no side.
        prefix: names of wrappers that every key begins with and that the names of the ties lack, e.g. "_orig_mod.".
        warnings: what a reader of plan or report should know of how the names were found.
    """

    groups: tuple[TieGroup, ...]
    owned: Set[str]
    idle: tuple[str, ...]
    prefix: str = ""
    warnings: tuple[str, ...] = ()
