"""The command line: parses, calls the library, renders. It decides nothing."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

import tierewrite
from tierewrite.errors import (
    EXIT_CODES,
    EXIT_FINDINGS,
    EXIT_OK,
    EXIT_SYSTEM,
    EXIT_USAGE,
    Interrupted,
    TierewriteError,
    to_tierewrite_error,
)

if TYPE_CHECKING:
    from rich.console import Console



ERROR_SCHEMA = "tierewrite/error/1"

_F = TypeVar("_F", bound=Callable[..., Any])
_FOLDER = click.Path(readable=False, path_type=Path)  # what cannot be read is for the library to say: exit 5
_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.items())


def _options(*decorators: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def decorate(function: _F) -> _F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object (see the README).")
_SOURCE = click.Path(readable=False)  # text: as a path, ./org/name would become a hub id, and a URL lose a slash
_source_options = _options(
    click.option(
        "--ties",
        type=_FOLDER,
        metavar="FILE",
        help="JSON {alias: canonical}, names or regular expressions as transformers writes them, instead of asking "
        "the model class.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the model code that SRC brings (auto_map), to ask it for its ties.",
    ),
    click.option(
        "--ignore-unindexed",
        is_flag=True,
        help="Leave out tensors that are in a shard but not in the index, instead of refusing (exit 4).",
    ),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit, where SRC is a hub id (org/name)."),
)
_policy_options = _options(
    click.option(
        "--on-mismatch",
        type=click.Choice(["error", "keep", "repack"]),
        default="error",
        show_default=True,
        help="A declared tie that the bytes do not confirm: refuse (exit 3), keep that group whole, or, where NVFP4 "
        "sides differ only by how they are scaled, write one blob re-encoded to the larger scale.",
    ),
    click.option(
        "--kv-scales",
        type=click.Choice(["keep", "merge"]),
        help="KV-cache scales: keep every side's (the default), or leave one merged canonical value (with --for vllm).",
    ),
    click.option(
        "--max-shard-size",
        metavar="SIZE",
        help='Most tensor bytes in a shard, e.g. "5GB" (10^9). Default: as the fullest shard of SRC.',
    ),
    click.option(
        "--unify-fused-scales",
        is_flag=True,
        help="Give NVFP4 projections that consumers fuse (q/k/v, gate/up) one weight_scale_2, re-encoding the others.",
    ),
    click.option(
        "--fill-missing-scales",
        is_flag=True,
        help="Take an expert's missing or never calibrated input scale from the tied side, else from the largest of "
        "the same projection's other experts in its layer.",
    ),
    click.option(
        "--fix-ignore",
        is_flag=True,
        help="Rewrite entries of ignore lists in the configs that disagree with what is on disk.",
    ),
)
_run_options = _options(
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the hashing happens; the output is the same. auto: a GPU that works, the CPU until it is ready.",
    ),
    click.option("--threads", type=click.IntRange(1, 256), help="Workers. Default: one a core, at most 8."),
)
_engine_options = _options(
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
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG)
@click.version_option(tierewrite.__version__, "-V", "--version", prog_name="tierewrite")
@click.option("-v", "--verbose", count=True, help="Log what is done to standard error; twice for debugging.")
def cli(verbose: int) -> None:
    """Rewrite exported safetensors checkpoints so that every tied weight is stored once.

    Quantization exporters write every tied weight under every one of its names, each with its own activation
    scales. tierewrite works on the files alone: it learns from the model class which parameters are tied, confirms
    it by hashing the bytes, merges the activation scales, drops the alias names and writes a checkpoint and index
    under canonical names. SRC is never written to; DST appears whole or not at all.

    \b
    Examples:
      tierewrite plan exported/                      what would be done
      tierewrite rewrite exported/ canonical/        do it
      tierewrite verify exported/ canonical/         prove it
      tierewrite rewrite --help                      all options of a command, with examples

    \b
    Completion of commands and options, for the shell's start-up file (or zsh_source, fish_source):
      eval "$(_TIEREWRITE_COMPLETE=bash_source tierewrite)"
    """
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    # What libraries log of a failure, tracebacks and all, our error says in a line.
    handler.addFilter(lambda record: verbose > 0 or record.name.partition(".")[0] == "tierewrite")
    logging.basicConfig(handlers=[handler])
    # Not the root: the libraries that talk to stores log requests with their signatures.
    logging.getLogger("tierewrite").setLevel(level)


@cli.command()
@click.argument("src", type=_SOURCE)
@click.argument("dst", type=_SOURCE, required=False)
@_policy_options
@_source_options
@_run_options
@_engine_options
@click.option("--in-place", is_flag=True, help="Let the result take the place of SRC, which is kept as SRC.bak.")
@click.option("--no-backup", is_flag=True, help="With --in-place: keep no SRC.bak.")
@click.option("--resume", is_flag=True, help="Go on from the shards that a killed run into DST finished.")
@click.option("--verify", is_flag=True, help="Prove the output from SRC before it appears (reads both once more).")
@click.option(
    "--for",
    "consumer",
    type=click.Choice(["vllm", "transformers"]),
    help="Make the choices that this consumer needs (vllm: --kv-scales merge, --unify-fused-scales, --fix-ignore) and "
    "check the result before it appears. Exit code 6 if errors are left; DST is written all the same if they are only "
    "per-side conflicts, which no rewrite can merge.",
)
@click.option("--force", is_flag=True, help="With --for: let DST appear whatever errors are left.")
@click.option("--overwrite", is_flag=True, help="Swap out what DST holds, once the new checkpoint is complete.")
@click.option("--no-manifest", is_flag=True, help="Do not write tierewrite.json.")
@_quiet_option
@_json_option
def rewrite(
    src: str,
    dst: str | None,
    as_json: bool,
    quiet: bool,
    no_manifest: bool,
    no_backup: bool,
    consumer: str | None,
    **options: Any,
) -> None:
    """Write the canonical form of the checkpoint in SRC to DST.

    \b
    Examples:
      tierewrite rewrite exported/ canonical/
      tierewrite rewrite exported/ canonical/ --on-mismatch keep --json > report.json
      tierewrite rewrite exported/ canonical/ --ties ties.json --max-shard-size 5GB
      tierewrite rewrite org/name canonical/ --revision main
      tierewrite rewrite exported/ served/ --for vllm
      tierewrite rewrite exported/ --in-place --verify
      tierewrite rewrite s3://bucket/exported s3://bucket/canonical --verify

    SRC and DST may be URLs of any fsspec file system (s3://, gs://, memory://, ...: pip install 'tierewrite[remote]').
    A DST in a store must be new; its index is written last, and makes it a checkpoint. After a kill, --resume goes on
    there and --overwrite starts anew.
    """
    options = _given(options)
    if no_backup and "in_place" not in options:
        raise click.UsageError("--no-backup goes with --in-place; leave it out, or add that")
    if "force" in options and consumer is None:
        raise click.UsageError("--force goes with --for; leave it out, or add that")
    if consumer is not None:
        options["consumer"] = consumer
    from tierewrite.cli.tables import Bar

    with Bar(_console(stderr=True), shown=not (quiet or as_json)) as bar:
        report = tierewrite.rewrite(
            src, dst, manifest=not no_manifest, backup=not no_backup, progress=bar, **options
        )
    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        from tierewrite.cli.tables import show_report

        show_report(_console(), report)
    if report.readiness is not None and report.readiness.errors:
        raise click.exceptions.Exit(EXIT_FINDINGS)


@cli.command()
@click.argument("items", type=_SOURCE, nargs=-1, required=True, metavar="FILE|FOLDER...")
@click.option("--into", type=_SOURCE, metavar="OUT", help="Folder or URL below which every DST is made.")
@click.option(
    "--plan-only",
    is_flag=True,
    help="Write nothing and read headers only: show what could be saved, the largest saving first. Needs no --into.",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="How many checkpoints at a time. Each already takes all --threads: more than one helps with small ones, with "
    "stores, and with --engine ray, where all of them share the cluster.",
)
@_policy_options
@_source_options
@_run_options
@_engine_options
@click.option("--resume", is_flag=True, help="Go on from the shards that a killed run finished.")
@click.option("--verify", is_flag=True, help="Prove each output from its SRC before it appears.")
@click.option(
    "--for",
    "consumer",
    type=click.Choice(["vllm", "transformers"]),
    help="Make the choices that this consumer needs, and check each result; see rewrite --help.",
)
@click.option("--force", is_flag=True, help="With --for: let a DST appear whatever errors are left.")
@click.option("--overwrite", is_flag=True, help="Do again what is done, and swap out what a DST holds.")
@click.option("--no-manifest", is_flag=True, help="Do not write tierewrite.json (a next run then skips nothing).")
@_quiet_option
@_json_option
def batch(
    items: tuple[str, ...],
    into: str | None,
    plan_only: bool,
    jobs: int,
    as_json: bool,
    quiet: bool,
    no_manifest: bool,
    **options: Any,
) -> None:
    """Rewrite many checkpoints, or scan them for what could be saved (--plan-only).

    One that fails does not stop the others: exit code 6 if any did. A list, an option or two DSTs that cannot be are
    refused before anything starts (exit 2), a FOLDER without any checkpoint too (exit 4). An interrupt leaves what is
    finished, and the results so far are shown.

    A FOLDER, or the URL of one, stands for every checkpoint at or below it: each folder that holds an index or a
    *.safetensors file. Each goes to OUT/<path below FOLDER>; FOLDER itself, if it is one, to OUT/<its name>. What lies
    below a checkpoint belongs to it. Passed over are hidden folders, X.bak beside X, and OUT. Links are followed, each
    folder counts once. A hub cache is such a FOLDER; a hub id (org/name) stands for itself.

    A FILE lists checkpoints, one a line: a SRC (folder, URL or hub id; goes to OUT/<its name>), or a JSON object with
    "src" and, as wanted, "dst" and options for this one: on_mismatch, kv_scales, max_shard_size, unify_fused_scales,
    fill_missing_scales, fix_ignore, ties, trust_remote_code, ignore_unindexed, revision, overwrite, resume, verify,
    consumer (as --for), force, manifest. Blank lines and lines that begin with # are left out. Relative paths in a FILE
    are relative to the folder that FILE is in.

    A DST that an earlier run made of the same SRC, with the same options and the same version of tierewrite, is left
    as it is (already-done), so that a batch that was stopped can simply be run again. Compared are names and sizes of
    files, options, ties, times and a few tensors; `tierewrite verify` proves it. A DST with anything else in it fails.

    \b
    Examples:
      tierewrite batch models/ --plan-only
      tierewrite batch ~/.cache/huggingface/hub --plan-only --json | jq '.results[] | [.src, .saved_bytes]'
      tierewrite batch models/ --into canonical/ --on-mismatch keep
      tierewrite batch list.txt --into s3://bucket/canonical --engine ray --jobs 4
      tierewrite batch exports/2024 exports/2025 --into served/ --for vllm --verify

    \b
    A list:
      # one a line
      llama-nvfp4
      org/name
      {"src": "s3://bucket/gemma", "dst": "out/gemma", "on_mismatch": "keep"}
    """
    options = _given(options)
    if no_manifest:
        options["manifest"] = False
    from tierewrite.batches.run import BatchInterrupted
    from tierewrite.cli.tables import Bar

    stopped = None
    with Bar(_console(stderr=True), shown=not (quiet or as_json)) as bar:
        try:
            report = tierewrite.batch(
                items, into=into, plan_only=plan_only, jobs=jobs, progress=bar, **options
            )
        except BatchInterrupted as interrupt:
            stopped, report = interrupt, interrupt.report
    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        from tierewrite.cli.tables import show_batch

        show_batch(_console(), report)
    if stopped is not None:
        print(f"tierewrite: {stopped}", file=sys.stderr)
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)


@cli.command()
@click.argument("src", type=_SOURCE)
@_policy_options
@_source_options
@_json_option
def plan(src: str, as_json: bool, **options: Any) -> None:
    """Show what `rewrite` would do with SRC. Reads headers only and writes nothing.

    A plan is what happens if every tie is confirmed. Groups that the headers already refute are listed as
    unconfirmed; the exit code is 0 all the same.

    \b
    Examples:
      tierewrite plan exported/
      tierewrite plan s3://bucket/exported
      tierewrite plan exported/ --json | jq '.tensors[] | select(.action == "drop") | .name'
    """
    result = tierewrite.plan(src, **_given(options))
    if as_json:
        _print_json(result.to_json())
    else:
        from tierewrite.cli.tables import show_plan

        show_plan(_console(), result)


@cli.command()
@click.argument("src", type=_SOURCE)
@click.argument("dst", type=_SOURCE)
@click.option("--ties", type=_FOLDER, metavar="FILE", help="JSON {alias: canonical}; see rewrite --help.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit, where SRC is a hub id (org/name).")
@click.option("--trust-remote-code", is_flag=True, help="Run the model code that SRC brings (auto_map).")
@click.option("--ignore-unindexed", is_flag=True, help="As for rewrite: leave out what SRC's index does not list.")
@_policy_options
@click.option(
    "--for",
    "consumer",
    type=click.Choice(["vllm", "transformers"]),
    help="The consumer that DST was rewritten for, which makes the choices that the options do not.",
)
@_json_option
def verify(src: str, dst: str, as_json: bool, ties: Path | None, **options: Any) -> None:
    """Prove that DST is what rewriting SRC with these options makes.

    Every expected value comes from SRC, the options given here and whoever declares the ties: give the options that the
    rewrite was given. Every tensor of SRC is accounted for, every tensor of DST has its origin; index, other files and
    manifest are right. Exit code 6 if anything is wrong, an unreadable DST included.

    \b
    Examples:
      tierewrite verify exported/ canonical/
      tierewrite verify exported/ served/ --for vllm
      tierewrite verify s3://bucket/exported s3://bucket/canonical
      tierewrite verify exported/ canonical/ --json | jq '.problems[] | [.id, .where]'
    """
    result = tierewrite.verify(src, dst, ties=ties, **_given(options))
    if as_json:
        _print_json(result.to_json())
    else:
        from tierewrite.cli.tables import show_verification

        show_verification(_console(), result)
    if not result.ok:
        raise click.exceptions.Exit(EXIT_FINDINGS)


@cli.command()
@click.argument("src", type=_SOURCE)
@_source_options
@click.option("--no-ties", is_flag=True, help="Do not ask for declared ties (never imports transformers).")
@_json_option
def inspect(src: str, as_json: bool, no_ties: bool, **options: Any) -> None:
    """Show shards, tensors, dtypes, formats and declared ties of SRC. Reads headers only.

    \b
    Examples:
      tierewrite inspect exported/
      tierewrite inspect s3://bucket/exported --no-ties
      tierewrite inspect org/name --json | jq .dtypes
    """
    result = tierewrite.inspect(src, declared=not no_ties, **options)
    if as_json:
        _print_json(result.to_json())
    else:
        from tierewrite.cli.tables import show_inspection

        show_inspection(_console(), result)


@cli.command()
@click.argument("checkpoint", type=_SOURCE)
@click.option(
    "--for",
    "consumer",
    type=click.Choice(["vllm", "transformers"]),
    default="vllm",
    show_default=True,
    help="Who will load it.",
)
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option(
    "--backbone",
    type=_FOLDER,
    metavar="FILE",
    help="JSON that says how vLLM maps checkpoint names to a single backbone, instead of the built-in one.",
)
@click.option("--ties", type=_FOLDER, metavar="FILE", help="JSON {alias: canonical}; see rewrite --help.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model code that CHECKPOINT brings (auto_map).")
@_json_option
def check(checkpoint: str, consumer: str, strict: bool, as_json: bool, **options: Any) -> None:
    """Find what a consumer would load wrong, before it does. Reads headers, configs and scales only.

    vLLM loads incomplete and contradictory checkpoints without a word. Each finding has an id, a severity, the tensors
    or config entries concerned, what the consumer will do, and the mend if there is one. Exit code 6 if any is an
    error (with --strict, or a warning).

    \b
    Examples:
      tierewrite check canonical/ --for vllm
      tierewrite check canonical/ --for transformers --strict --json
      tierewrite check s3://bucket/canonical
    """
    result = tierewrite.check(checkpoint, consumer, **options)
    if as_json:
        _print_json(result.to_json())
    else:
        from tierewrite.cli.tables import show_readiness

        show_readiness(_console(), result)
    code = result.exit_code(strict=strict)
    if code:
        raise click.exceptions.Exit(code)


@cli.command("report", short_help="Show what a rewrite did, here or on a page to pass on.")
@click.argument("target", type=_SOURCE, metavar="DST|MANIFEST")
@click.option("--html", type=_FOLDER, metavar="FILE", help="Write one self-contained HTML page.")
@click.option("--png", type=_FOLDER, metavar="FILE", help="Write its figures and pictures as one PNG.")
@click.option(
    "--for",
    "consumer",
    type=click.Choice(["vllm", "transformers"]),
    help="Add what `check` finds in DST for this consumer.",
)
@click.option("--backbone", type=_FOLDER, metavar="FILE", help="For that check; see check --help.")
@click.option(
    "--worst",
    type=click.IntRange(0, 100_000),
    default=20,
    show_default=True,
    help="How many of the scales that were furthest apart to list.",
)
@_json_option
def report_command(
    target: str,
    html: Path | None,
    png: Path | None,
    consumer: str | None,
    backbone: Path | None,
    worst: int,
    as_json: bool,
) -> None:
    """Show what a rewrite did: sizes, how far apart the activation scales of tied sides were, what was kept and why.

    Reads DST's manifest (tierewrite.json) and headers; a manifest alone will do for everything but the sizes. The page
    needs no network. Pictures need matplotlib: pip install 'tierewrite[report]'.

    \b
    Examples:
      tierewrite report canonical/ --html report.html --for vllm
      tierewrite report canonical/ --png report.png
      tierewrite report s3://bucket/canonical --html report.html
      tierewrite report canonical/ --json | jq '.divergence[] | [.projection, .median, .max]'
    """
    page = tierewrite.report_page(target, consumer, backbone=backbone, worst=worst)
    if html is not None:
        page.write_html(html)
    if png is not None:
        page.write_png(png)
    for written in (html, png):
        if written is not None and not as_json:
            click.echo(f"{written} is written.")
    if as_json:
        _print_json(page.to_json())
    elif html is None and png is None:
        from tierewrite.pages.terminal import show

        show(_console(), page.facts, worst)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line: the library has the defaults."""
    return {name: value for name, value in options.items() if value is not None and value is not False}


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    # Piped output is not cut to 80 columns: scripts and logs want whole lines.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if stream.isatty() else 200)


def _print_json(data: dict[str, Any]) -> None:
    from tierewrite.json_text import pieces

    sys.stdout.writelines(pieces(data, ascii_only=True))


def _stop(signum: int, frame: FrameType | None) -> None:
    """Raises in the main thread, once: the clean-up that follows is not to be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(signum)


def _failed(error: TierewriteError, as_json: bool) -> int:
    print(f"tierewrite: {error}", file=sys.stderr)
    if as_json:
        _print_json({"schema": ERROR_SCHEMA, "error": error.to_json()})
    return error.exit_code


def run(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code. Only messages reach the user, never a traceback."""
    as_json = "--json" in arguments
    try:
        code = cli.main(args=arguments, prog_name="tierewrite", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        if as_json:
            usage = tierewrite.UsageError(error.format_message())
            _print_json({"schema": ERROR_SCHEMA, "error": usage.to_json()})
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return _failed(Interrupted(signal.SIGINT), as_json)
    except BrokenPipeError:
        # Whoever read our output has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SYSTEM
    except Exception as error:
        if not isinstance(error, TierewriteError):
            logging.getLogger(__name__).debug("internal error", exc_info=True)
        return _failed(to_tierewrite_error(error), as_json)


def main() -> None:
    """Entry point of the `tierewrite` command."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = run(sys.argv[1:])
    except Interrupted as stopped:  # while the message of an error was printed
        code = stopped.exit_code
    sys.exit(code)
