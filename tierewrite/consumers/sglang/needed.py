"""Which names SGLang would miss where each tied weight is stored once: the heads of classes that do not tie them."""

from __future__ import annotations

from tierewrite.consumers.sglang.classes import model_class
from tierewrite.consumers.sglang.subject import VERSION, is_head
from tierewrite.errors import shown
from tierewrite.planning.needed_names import NeededNames
from tierewrite.values.opened import Opened


def needed_names(opened: Opened) -> NeededNames:
    """The heads in the source that have to stay: where the class has a head of its own, or may have one.

    A head that stays does no harm where the class ties: SGLang passes it over.
    """
    listed = opened.checkpoint.config.get("architectures")
    architecture = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""
    known = model_class(architecture)
    if known.head in ("tied", "none"):
        return NeededNames("sglang")
    aliases = {alias for group in opened.disk.groups for slot in group.slots for alias in slot[1:] if is_head(alias)}
    stems = {alias.removesuffix(".weight") for alias in aliases}
    names = frozenset(key for key in opened.checkpoint.tensors if key.rpartition(".")[0] in stems)
    if not names:
        return NeededNames("sglang")
    how = {
        "measured": f"SGLang {VERSION} has a head of its own in '{shown(architecture)}'; only '{min(names)}' fills it",
        "read": f"SGLang {VERSION} has a head of its own in '{shown(architecture)}' by its text, which was not run",
    }
    unknown = f"whether SGLang {VERSION} ties the head of '{shown(architecture)}' is not known, so that it stays"
    return NeededNames("sglang", names, (how.get(known.how, unknown) if known.head == "own" else unknown,))
