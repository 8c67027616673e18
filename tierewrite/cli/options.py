"""The options of the command line: each is defined once, and those that decide content are made from `Policy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from tierewrite.planning.policy import FOR_CONSUMER, OPTIONS, Option
from tierewrite.rewriting.options import ITEM_TYPES

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

SOURCE = click.Path(readable=False)
"""Text: as a path, ./org/name would become a hub id, and a URL would lose a slash."""
FILE = click.Path(readable=False)
"""What cannot be read is for the library to say, with exit code 5."""

_CONSUMER = click.Choice(tuple(FOR_CONSUMER))


def together(*decorators: Decorator[F]) -> Decorator[F]:
    """Several options as one decorator, listed by --help in this order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line: the library has the defaults."""
    return {name: value for name, value in options.items() if value is not None and value is not False and value != ()}


def flag_of(name: str) -> str:
    """How the command line writes the option `name`: "--fix-ignore"."""
    return f"--{name.replace('_', '-')}"


def _policy_option(option: Option) -> Decorator[Any]:
    if option.types == (bool,):
        return click.option(flag_of(option.name), is_flag=True, help=option.help)
    if option.choices:
        text = option.help if option.default is None else f"{option.help}  [default: {option.default}]"
        return click.option(flag_of(option.name), type=click.Choice(option.choices), help=text)
    kind = int if option.types == (int,) else str
    return click.option(
        flag_of(option.name), type=kind, metavar=option.metavar, multiple=list in option.types, help=option.help
    )


def _presets() -> str:
    """What each consumer chooses, as one would write it: "vllm: --kv-scales merge, --fix-ignore"."""
    texts = []
    for consumer, chosen in FOR_CONSUMER.items():
        words = [flag_of(name) if value is True else f"{flag_of(name)} {value}" for name, value in chosen.items()]
        if words:
            texts.append(f"{consumer}: {', '.join(words)}")
    return "; ".join(texts)


ITEM_OPTION_NAMES = f"Options of one checkpoint in a FILE: {', '.join(ITEM_TYPES)}."
"""For `batch --help`; `consumer` is what --for is on the command line."""

json_option: Decorator[Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object (see the README)."
)
quiet_option: Decorator[Any] = click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")

policy_options: Decorator[Any] = together(*map(_policy_option, OPTIONS.values()))

ties_option: Decorator[Any] = click.option(
    "--ties",
    type=FILE,
    metavar="FILE",
    help="JSON {alias: canonical}, names or regular expressions as transformers writes them, instead of asking the "
    "model class.",
)
trust_remote_code_option: Decorator[Any] = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the model code that the checkpoint brings (auto_map), to ask it for its ties.",
)
source_options: Decorator[Any] = together(
    ties_option,
    trust_remote_code_option,
    click.option(
        "--ignore-unindexed",
        is_flag=True,
        help="Leave out tensors that are in a shard of SRC but not in its index, instead of refusing (exit 4).",
    ),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit, where SRC is a hub id (org/name)."),
)

run_options: Decorator[Any] = together(
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the hashing happens; the output is the same. auto: a GPU that works, the CPU until it is ready.",
    ),
    click.option("--threads", type=click.IntRange(1, 256), help="Workers. Default: one a core, at most 8."),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who hashes and writes: this machine, or the tasks of a Ray cluster whose nodes all see SRC and DST.",
    ),
    click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="The cluster, as ray.init takes it. Default: RAY_ADDRESS, else one on this machine.",
    ),
)

output_options: Decorator[Any] = together(
    click.option("--resume", is_flag=True, help="Go on from the shards that a killed run into DST finished."),
    click.option("--verify", is_flag=True, help="Prove the output from SRC before it appears (reads both once more)."),
    click.option(
        "--for",
        "consumer",
        type=_CONSUMER,
        help=f"Make the choices that this consumer needs ({_presets()}) and check the result before it appears. Exit "
        "code 6 if errors are left; DST is written all the same if they are only per-side conflicts, which no rewrite "
        "can merge.",
    ),
    click.option("--force", is_flag=True, help="With --for: let DST appear whatever errors are left."),
    click.option("--overwrite", is_flag=True, help="Swap out what DST holds, once the new checkpoint is complete."),
)

rewritten_for_option: Decorator[Any] = click.option(
    "--for",
    "consumer",
    type=_CONSUMER,
    help="The consumer that DST was rewritten for, which makes the choices that the options do not.",
)
loader_option: Decorator[Any] = click.option(
    "--for", "consumer", type=_CONSUMER, default="vllm", show_default=True, help="Who will load it."
)
report_consumer_option: Decorator[Any] = click.option(
    "--for", "consumer", type=_CONSUMER, help="Add what `check` finds in DST for this consumer."
)
backbone_option: Decorator[Any] = click.option(
    "--backbone",
    type=FILE,
    metavar="FILE",
    help="JSON that says how the consumer maps checkpoint names to a single backbone, instead of the built-in one.",
)
