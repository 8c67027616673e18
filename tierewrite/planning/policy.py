"""The options that decide what an output holds: one record. Command line, batch lists and manifest are made from it.

A new option is a field of `Policy`, and its line in `PolicyOptions` for type checkers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from tierewrite.errors import UsageError, shown
from tierewrite.json_text import plain_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

OnMismatch = Literal["error", "keep", "repack"]
KVScales = Literal["keep", "merge"]
ConsumerName = Literal["vllm", "sglang", "tensorrt-llm", "transformers"]
NamesFor = Literal["sglang", "transformers"]
"""The consumers that need more names than one of each tie."""
Size = int | str
"""A number of bytes, or a text such as "5GB" (powers of 1000)."""


class PolicyOptions(TypedDict, total=False):
    """The fields of `Policy` as keyword arguments; a size may be a text."""

    on_mismatch: OnMismatch
    kv_scales: KVScales
    max_shard_size: Size | None
    unify_fused_scales: bool
    fix_ignore: bool
    fix_config: bool
    fill_missing_scales: bool
    keep_names_for: NamesFor | None
    exclude: str | Sequence[str]
    strip_prefix: bool


@dataclass(frozen=True)
class Policy:
    """The options that decide content (all of them are recorded in the manifest); `OPTIONS` says what each means.

    `Policy.of` makes one from keyword arguments.

    Raises:
        UsageError: an unknown choice, or a size below one byte.
    """

    on_mismatch: OnMismatch = field(
        default="error",
        metadata={
            "choices": get_args(OnMismatch),
            "help": "A declared tie that the bytes do not confirm: refuse (exit 3), keep that group whole, or, where "
            "NVFP4 sides differ only by how they are scaled, write one blob re-encoded to the larger scale.",
        },
    )
    kv_scales: KVScales = field(
        default="keep",
        metadata={
            "choices": get_args(KVScales),
            "help": "KV-cache scales: keep every side's, or leave one merged canonical value.",
        },
    )
    max_shard_size: int | None = field(
        default=None,
        metadata={
            "types": get_args(Size),
            "metavar": "SIZE",
            "help": 'Most tensor bytes in a shard, e.g. "5GB" (10^9). Default: as the fullest shard of SRC; where '
            "whole shards are left, these.",
        },
    )
    unify_fused_scales: bool = field(
        default=False,
        metadata={
            "help": "Give NVFP4 projections that consumers fuse (q/k/v, gate/up) one weight_scale_2, re-encoding the "
            "others.",
        },
    )
    fix_ignore: bool = field(
        default=False,
        metadata={"help": "Rewrite entries of ignore lists in the configs that disagree with what is on disk."},
    )
    fix_config: bool = field(
        default=False,
        metadata={
            "help": "Set tie_word_embeddings in config.json to what is stored: true where a tied tensor was dropped, "
            "false where a differing or quantized head was kept."
        },
    )
    fill_missing_scales: bool = field(
        default=False,
        metadata={
            "help": "Take an expert's missing or never calibrated input scale from the tied side, else from the "
            "largest of the same projection's other experts in its layer.",
        },
    )
    keep_names_for: NamesFor | None = field(
        default=None,
        metadata={
            "choices": get_args(NamesFor),
            "help": "Keep every name that the loader of this consumer would miss, with the one value of its tie on all "
            "sides: such tensors are stored more than once.",
        },
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={
            "types": (str, list),
            "metavar": "PATTERN",
            "help": 'Leave out side files whose name, or path in SRC, matches this wildcard, e.g. "*.bin"; may be '
            "given several times. config.json and hf_quant_config.json always stay.",
        },
    )
    strip_prefix: bool = field(
        default=False,
        metadata={
            "help": 'Take names of wrappers ("_orig_mod.", "module.", "base_model.model.", ...) off names, '
            "where every name begins with them; torch's own also inside names.",
        },
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        for option in OPTIONS.values():
            value = getattr(self, option.name)
            option.check(value)
            if isinstance(value, str):
                object.__setattr__(self, option.name, plain_text(value))
        if self.max_shard_size is not None and self.max_shard_size <= 0:
            raise UsageError(f"--max-shard-size is {self.max_shard_size}; expected at least 1 byte")

    @classmethod
    def of(cls, consumer: str | None = None, **options: Unpack[PolicyOptions]) -> Policy:
        """The options that are given, before those that `consumer` needs, before the defaults.

        Raises:
            UsageError: an unknown option, choice or consumer, or a size that is none.
        """
        if consumer is not None and consumer not in FOR_CONSUMER:
            raise UsageError(f"consumer is '{shown(consumer)}'; expected one of {', '.join(FOR_CONSUMER)}")
        for name in options:
            if name not in OPTIONS:
                raise UsageError(
                    f"there is no option '{shown(name)}'; those that decide content are {', '.join(OPTIONS)}"
                )
        chosen: dict[str, Any] = {**(FOR_CONSUMER[consumer] if consumer is not None else {}), **options}
        if isinstance(chosen.get("max_shard_size"), str):
            chosen["max_shard_size"] = size_in_bytes(chosen["max_shard_size"])
        return cls(**chosen)

    def to_json(self) -> dict[str, Any]:
        """The `options` of manifest and report."""
        return {**asdict(self), "exclude": list(self.exclude)}


@dataclass(frozen=True)
class Option:
    """What is known of a field of `Policy`.

    Attributes:
        name: of the field, the keyword argument and the member of a batch list; the command line writes it with dashes.
        default: None where the checkpoint decides.
        help: what it does, for people.
        choices: the texts that it may be; () where it is no choice.
        types: what a JSON value of it may be.
        metavar: what the command line's help calls its value.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...]
    types: tuple[type, ...]
    metavar: str | None

    def check(self, value: Any) -> None:
        """Raises UsageError: `value` is none of the choices, or of another type."""
        if value is None and self.default is None:
            return
        value = list(value) if isinstance(value, tuple) else value
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.name} is {value!r}; expected one of {', '.join(self.choices)}")
        if not of_type(value, self.types):
            raise UsageError(f"{self.name} is {value!r}; expected {type_names(self.types)}")


def _option_of(name: str, default: Any, metadata: Mapping[str, Any]) -> Option:
    choices = metadata.get("choices", ())
    types = metadata.get("types", (str,) if choices else (type(default),))
    return Option(name, default, metadata["help"], choices, types, metadata.get("metavar"))


OPTIONS: Mapping[str, Option] = {one.name: _option_of(one.name, one.default, one.metadata) for one in fields(Policy)}
"""All options that decide content, by name."""

FOR_CONSUMER: Mapping[str, PolicyOptions] = {
    "vllm": {"kv_scales": "merge", "unify_fused_scales": True, "fix_ignore": True},
    "sglang": {"kv_scales": "merge", "unify_fused_scales": True, "keep_names_for": "sglang"},
    "tensorrt-llm": {"kv_scales": "merge", "unify_fused_scales": True},
    "transformers": {"keep_names_for": "transformers"},
}
"""What a rewrite for a consumer chooses, where the caller does not. `--for` offers these names."""

_TYPE_NAMES = {bool: "true or false", int: "a number", str: "a text", list: "a list of texts", dict: "an object"}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})\s*([KMGT]B|)", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _patterns(value: Any) -> tuple[str, ...]:
    """The wildcards of `exclude`, of which one may be given as a text.

    Raises:
        UsageError: they are no texts.
    """
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) and one for one in found):
        raise UsageError(f"--exclude is {value!r}; expected wildcards such as '*.bin', a text or a list of texts")
    try:
        "".join(found).encode()
    except UnicodeEncodeError:
        said = f"--exclude is {value!r}, which is no text in UTF-8; write ? in place of what is none"
        raise UsageError(said) from None
    return tuple(map(plain_text, found))


def of_type(value: Any, types: tuple[type, ...]) -> bool:
    """Whether `value` is of one of `types`; true and false are no numbers."""
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def type_names(types: tuple[type, ...]) -> str:
    """`types` for people, as JSON calls them: "a number or a text"."""
    return " or ".join(_TYPE_NAMES[kind] for kind in types)


def size_in_bytes(text: str) -> int:
    """Bytes of "5GB", "1.5 MB" or "500" (powers of 1000, upper or lower case).

    Raises:
        UsageError: the text is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (not found[2] and "." in found[1]):
        raise UsageError(f"--max-shard-size '{shown(text)}' is no size; write it as 5GB, 500MB, 200KB or plain bytes")
    unit = _UNITS[found[2].upper()]
    return int(found[1]) * unit if found[1].isdecimal() else int(float(found[1]) * unit)
