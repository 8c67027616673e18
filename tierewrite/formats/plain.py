"""Parameters as they are, unquantized.

`bias` beside a tied `weight` is not part of it: the tie map names it, or it stays as it is.

Source: torch.nn.Linear, Embedding and the norms register `weight` and `bias`; nothing else is known here.
"""

from __future__ import annotations

from tierewrite.formats.family import Companion, Family, Role, main

FAMILY = Family(
    name="plain",
    companions=(*main("weight"), Companion("bias", Role.PER_SIDE)),
    fused=(*main("{leaf}"), Companion("{leaf}_bias", Role.PER_SIDE)),
)
