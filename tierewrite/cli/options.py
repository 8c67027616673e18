"""The options of the command line: each is defined once, and those that decide content are made from `Policy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import click

from tierewrite.cli.help import option
from tierewrite.cli.logs import say_more
from tierewrite.planning.policy import FOR_CONSUMER, OPTIONS, Option
from tierewrite.rewriting.options import ITEM_TYPES, Device, EngineName
from tierewrite.spelling import RENAMED
from tierewrite.stores.base import COPY_MODES

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

SOURCE = click.Path(readable=False)
"""Text: as a path, ./org/name would become a hub id, and a URL would lose a slash."""
SRC = "A folder with model.safetensors or indexed shards, a hub id (org/name), or a URL (s3://bucket/exported)."
DST = "The folder to make, or its URL."
"""What `--help` says of the arguments that most commands have."""
FILE = click.Path(readable=False)
"""What cannot be read is for the library to say, with exit code 5."""

CONTENT, INPUT, WORK, OUTPUT = "What the output holds", "What is read", "How the work is done", "Where the output goes"
CONSUMER = "How the consumer is asked"
"""The headings of `--help`."""

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
    renamed = {keyword: flag for flag, keyword in RENAMED.items()}
    return f"--{renamed.get(name, name).replace('_', '-')}"


def _policy_option(one: Option) -> Decorator[Any]:
    flag = flag_of(one.name)
    if one.types == (bool,):
        return option(flag, heading=CONTENT, is_flag=True, help=one.help)
    if one.choices:
        text = one.help if one.default is None else f"{one.help}  [default: {one.default}]"
        return option(flag, heading=CONTENT, type=click.Choice(one.choices), help=text)
    kind = int if one.types == (int,) else str
    several = list in one.types
    return option(flag, heading=CONTENT, type=kind, metavar=one.metavar, multiple=several, help=one.help)


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
    "--json", "as_json", is_flag=True, help="Print one JSON object; `tierewrite explain json` says what is in it."
)
verbose_option: Decorator[Any] = click.option(
    "-v",
    "--verbose",
    count=True,
    expose_value=False,
    callback=lambda ctx, parameter, times: say_more(ctx, times),
    help="Log what is done to standard error; twice for debugging. Before the command or after it.",
)
quiet_option: Decorator[Any] = click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")

policy_options: Decorator[Any] = together(*map(_policy_option, OPTIONS.values()))

ties_option: Decorator[Any] = option(
    "--ties",
    heading=INPUT,
    type=FILE,
    metavar="FILE",
    help="JSON {alias: canonical}, names or regular expressions as transformers writes them, instead of asking the "
    "model class; {} says that nothing is tied.",
)
trust_remote_code_option: Decorator[Any] = option(
    "--trust-remote-code",
    heading=INPUT,
    is_flag=True,
    help="Run the model code that the checkpoint brings (auto_map), to ask it for its ties.",
)
source_options: Decorator[Any] = together(
    ties_option,
    trust_remote_code_option,
    option(
        "--ignore-unindexed",
        heading=INPUT,
        is_flag=True,
        help="Leave out tensors that are in a shard of SRC but not in its index, instead of refusing (exit 4).",
    ),
    option(
        "--revision", heading=INPUT, metavar="NAME", help="Branch, tag or commit, where SRC is a hub id (org/name)."
    ),
)

run_options: Decorator[Any] = together(
    option(
        "--device",
        heading=WORK,
        type=click.Choice(get_args(Device)),
        default="auto",
        show_default=True,
        help="Where the hashing happens; the output is the same. auto: the CPU, and a GPU where much is left and it is "
        "faster.",
    ),
    option("--threads", heading=WORK, type=click.IntRange(1, 256), help="Workers. Default: one a core, at most 8."),
    option(
        "--copy",
        heading=WORK,
        type=click.Choice(COPY_MODES),
        default="auto",
        show_default=True,
        help="auto: large parts that stay as they are share their blocks with SRC, or are copied by the kernel or the "
        "object store, where those can. never: all is written by this program. The output is the same.",
    ),
    option(
        "--engine",
        heading=WORK,
        type=click.Choice(get_args(EngineName)),
        default="local",
        show_default=True,
        help="Who hashes and writes: this machine, or the tasks of a Ray cluster whose nodes all see SRC and DST.",
    ),
    option(
        "--ray-address",
        heading=WORK,
        metavar="ADDRESS",
        help="The cluster, as ray.init takes it. Default: RAY_ADDRESS, else one on this machine.",
    ),
)

asked_loader_options: tuple[Decorator[Any], ...] = (
    option(
        "--loader",
        heading=CONSUMER,
        type=click.Choice(["auto", "require", "off"]),
        default="auto",
        show_default=True,
        help="Whether the consumer's own loader is asked, without reading a weight and without a GPU. auto: where a "
        "Python that has the consumer is known; require: exit 5 if it cannot be asked; off: rules alone decide.",
    ),
    option(
        "--consumer-python",
        heading=CONSUMER,
        type=FILE,
        metavar="PATH",
        help="The Python interpreter that has the consumer. Default: what TIEREWRITE_VLLM_PYTHON (or the like) names, "
        "else the one that runs tierewrite.",
    ),
)
check_loader_options: Decorator[Any] = together(
    *asked_loader_options,
    option(
        "--tensor-parallel-size",
        heading=CONSUMER,
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Ask the loader for every rank of this many, as the checkpoint will be served.",
    ),
    option(
        "--values",
        heading=CONSUMER,
        is_flag=True,
        help="Read the weights too, and find NaN, zeros and scales that are broken in transfer or by an exporter.",
    ),
    option(
        "--sample",
        heading=CONSUMER,
        type=click.IntRange(1),
        metavar="N",
        help="With --values: read N weights, at even distances, and not all.",
    ),
)
output_options: Decorator[Any] = together(
    option("--resume", heading=OUTPUT, is_flag=True, help="Go on from the shards that a killed run into DST finished."),
    option(
        "--verify",
        heading=OUTPUT,
        is_flag=True,
        help="Prove the output from SRC before it appears (reads both once more).",
    ),
    option(
        "--for",
        "consumer",
        heading=OUTPUT,
        type=_CONSUMER,
        help=f"Make the choices that this consumer needs ({_presets()}) and check the result before it appears. Exit "
        "code 6 if errors are left; DST is written all the same if they are only per-side conflicts, which no rewrite "
        "can merge.",
    ),
    *asked_loader_options,
    option("--force", heading=OUTPUT, is_flag=True, help="With --for: let DST appear whatever errors are left."),
    option(
        "--digests",
        heading=OUTPUT,
        is_flag=True,
        help="Let tierewrite.json hold a digest of every tensor, so that `verify DST` alone checks all bytes; else of "
        "those that are read for their ties.",
    ),
    option(
        "--overwrite",
        heading=OUTPUT,
        is_flag=True,
        help="Swap out what DST holds, once the new checkpoint is complete.",
    ),
)

push_options: Decorator[Any] = together(
    option(
        "--push",
        heading=OUTPUT,
        metavar="ORG/NAME",
        help="Upload DST to the Hugging Face Hub once it is complete, as one commit, with --digests. If that fails, "
        "DST stays (exit 5).",
    ),
    option("--private", heading=OUTPUT, is_flag=True, help="With --push: make the repository private."),
)

expand_options: Decorator[Any] = together(
    option(
        "--for",
        "consumer",
        heading=CONTENT,
        type=_CONSUMER,
        help="Write out only the names that this consumer's loader needs, and check the result before it appears.",
    ),
    option(
        "--kv-scales",
        heading=CONTENT,
        type=click.Choice(OPTIONS["kv_scales"].choices),
        help="merge: write KV-cache scales out for sides that have none. Default: what SRC's tierewrite.json says of "
        "the rewrite that made it, else keep.",
    ),
    option(
        "--max-shard-size",
        heading=CONTENT,
        metavar="SIZE",
        help="Most tensor bytes in a shard. Default: the shards of SRC stay, and aliases come in further ones.",
    ),
    option("--verify", heading=OUTPUT, is_flag=True, help="Prove that a rewrite of DST would give SRC again."),
    option("--force", heading=OUTPUT, is_flag=True, help="With --for: let DST appear whatever errors are left."),
    option("--overwrite", heading=OUTPUT, is_flag=True, help="Swap out what DST holds, once the new one is complete."),
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
    "--for",
    "consumer",
    type=_CONSUMER,
    multiple=True,
    help="Add what `check` finds in DST for this consumer; may be given several times.",
)
backbone_option: Decorator[Any] = click.option(
    "--backbone",
    type=FILE,
    metavar="FILE",
    help="JSON that says how the consumer maps checkpoint names to a single backbone, instead of the built-in one.",
)
