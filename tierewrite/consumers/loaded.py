"""What a consumer's own loader did with a checkpoint, as data: the facts that `dry_load.py` scripts print.

A script prints one JSON object a folder and a line; its members are the attributes of `DryLoad`, and `read` takes
nothing else. Dtypes are called as in safetensors' headers ("BF16", "F8_E4M3", "U8"). Names of parameters are the
consumer's, names of keys the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

LOADED_SCHEMA = "tierewrite/dry-load/1"
Outcome = Literal["loaded", "refused", "not-run"]
Initial = Literal["uninitialised", "default", "unused"]


@dataclass(frozen=True)
class RefusedKey:
    """A key at which the consumer's loader raised.

    Attributes:
        key: the checkpoint's tensor.
        error: the consumer's own words, with the type of the exception: "AssertionError: Attempted to load ...".
    """

    key: str
    error: str


@dataclass(frozen=True)
class Unfilled:
    """A parameter of which some elements were written by no key.

    Attributes:
        parameter: the consumer's name.
        shape: of the parameter on this rank.
        missing: elements that no key wrote; of `elements`.
        elements: of the parameter.
        initial: what they hold: "uninitialised" memory, a "default" that the class sets, or "unused": nobody reads it.
        rows: where whole rows of the first dimension are missing: their numbers, the first 64 of them. Of fused experts
            these are the experts.
        buffer: it is a persistent buffer, not a parameter.
    """

    parameter: str
    shape: tuple[int, ...]
    missing: int
    elements: int
    initial: Initial = "uninitialised"
    rows: tuple[int, ...] = ()
    buffer: bool = False


@dataclass(frozen=True)
class Overwritten:
    """Elements of one parameter that two keys wrote; whether the bytes are equal is for the reader to find out.

    Attributes:
        parameter: the consumer's name.
        first, last: the keys; `last` was read later and wins.
        elements: how many both wrote.
    """

    parameter: str
    first: str
    last: str
    elements: int


@dataclass(frozen=True)
class Cast:
    """A key whose values were converted to the dtype of its parameter.

    Attributes:
        key, parameter: which.
        found: the key's dtype.
        wanted: the parameter's.
    """

    key: str
    parameter: str
    found: str
    wanted: str


@dataclass(frozen=True)
class Rank:
    """What one rank of a tensor-parallel group loaded; without one, all there is.

    Attributes:
        rank: from 0.
        written: parameter -> the keys that wrote into it, in the order in which they were read.
        refused: keys that abort the load, the first first. Each was left out and the load tried again, so that the
            other facts are those of a load without them.
        refused_all: False where the script gave up before the load ran through: there may be more.
        failed: what the consumer said after the last key, such as that weights are not initialised; None if nothing.
        unfilled: parameters that are not filled.
        overwritten: elements that were written twice.
        ignored: keys that wrote nothing and were not refused.
        casts: conversions of dtypes.
        unquantized: modules that were built without quantization, although the checkpoint is quantized and their kind
            of layer takes it.
        unknown: parameters whose writes could not be followed; nothing is said of them.
        warnings: what the consumer logged, each text once.
    """

    rank: int = 0
    written: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: tuple[RefusedKey, ...] = ()
    refused_all: bool = True
    failed: str | None = None
    unfilled: tuple[Unfilled, ...] = ()
    overwritten: tuple[Overwritten, ...] = ()
    ignored: tuple[str, ...] = ()
    casts: tuple[Cast, ...] = ()
    unquantized: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def parameters_of(self) -> Mapping[str, tuple[str, ...]]:
        """Key -> the parameters that it wrote into."""
        found: dict[str, list[str]] = {}
        for parameter, keys in self.written.items():
            for key in keys:
                found.setdefault(key, []).append(parameter)
        return {key: tuple(parameters) for key, parameters in found.items()}


@dataclass(frozen=True)
class DryLoad:
    """What a consumer's own loader did with one checkpoint folder.

    Attributes:
        schema: `LOADED_SCHEMA`.
        consumer, version: who loaded, such as "vllm" and "0.33.0"; "" where it could not be imported.
        outcome: "loaded": the loader ran, with or without faults. "refused": the consumer refused the folder before a
            tensor was read. "not-run": a fault of the environment; nothing is known.
        reason: why it was refused, in the consumer's own words, or did not run; "" if it loaded.
        model_class: the consumer's class that was built; "" if none was.
        quantization: the consumer's name of the quantization, "" if it took the checkpoint for an unquantized one.
        tensor_parallel_size: of how many ranks.
        ranks: the facts, by rank.
        seconds: of processor time for this folder, without the import.
        peak_mib: resident memory at most, in MiB; `import_mib` of it were there before.
    """

    schema: str
    consumer: str
    version: str
    outcome: Outcome
    reason: str = ""
    model_class: str = ""
    quantization: str = ""
    tensor_parallel_size: int = 1
    ranks: tuple[Rank, ...] = ()
    seconds: float = 0.0
    peak_mib: int = 0
    import_mib: int = 0

    @property
    def ran(self) -> bool:
        """Whether the loader judged the checkpoint."""
        return self.outcome != "not-run"

    @property
    def loaded(self) -> bool:
        """Whether there are facts of parameters and keys."""
        return self.outcome == "loaded"

    @classmethod
    def not_run(cls, consumer: str, reason: str) -> DryLoad:
        """Nothing is known, because of `reason`."""
        return cls(LOADED_SCHEMA, consumer, "", "not-run", reason)

    def kv_scales(self) -> tuple[list[str], list[str]]:
        """Parameters k_scale and v_scale that nothing fills while the other is filled; and modules with neither."""
        lacking = {one.parameter for rank in self.ranks for one in rank.unfilled}
        half: dict[str, None] = {}
        none: dict[str, None] = {}
        for name in sorted(lacking):
            module, _, leaf = name.rpartition(".")
            other = {"k_scale": "v_scale", "v_scale": "k_scale"}.get(leaf)
            if other is not None and f"{module}.{other}" in lacking:
                none[module] = None
            elif other is not None:
                half[name] = None
        return list(half), list(none)

    def keys_together(self, ending: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
        """Parameters that several keys wrote into, on any rank, with those keys.

        Args:
            ending: only parameters whose names end so, such as "weight_scale_2".
        """
        found: dict[str, dict[str, None]] = {}
        for rank in self.ranks:
            for parameter, keys in rank.written.items():
                if parameter.endswith(ending):
                    found.setdefault(parameter, {}).update(dict.fromkeys(keys))
        return ((parameter, tuple(keys)) for parameter, keys in found.items() if len(keys) > 1)


def read(lines: Iterable[bytes], names: Mapping[str, str]) -> list[DryLoad]:
    """What a script printed, one line a folder.

    Args:
        names: texts that stand for something else in messages: paths of this machine -> what users call them.

    Raises:
        ValueError: a line is not of the form of `DryLoad`, or of another schema.
    """
    import msgspec

    decoder = msgspec.json.Decoder(DryLoad)
    found: list[DryLoad] = []
    for line in lines:
        text = line.decode("utf-8")
        for path, name in names.items():
            text = text.replace(json.dumps(path)[1:-1], json.dumps(name)[1:-1])  # as the script writes them
        try:
            one = decoder.decode(text)
        except msgspec.MsgspecError as e:
            raise ValueError(str(e)) from None
        if one.schema != LOADED_SCHEMA:
            raise ValueError(f"schema {one.schema!r}; expected {LOADED_SCHEMA!r}")
        found.append(one)
    return found
