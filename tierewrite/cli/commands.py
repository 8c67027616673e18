"""The commands: each calls the library and shows what it returns. They decide nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

import tierewrite
from tierewrite.cli.help import CONTEXT, HelpfulGroup, argument, option
from tierewrite.cli.options import (
    DST,
    ITEM_OPTION_NAMES,
    OUTPUT,
    SOURCE,
    SRC,
    WORK,
    backbone_option,
    check_loader_options,
    expand_options,
    flag_of,
    given,
    json_option,
    loader_option,
    output_options,
    policy_options,
    push_options,
    quiet_option,
    rewritten_for_option,
    run_options,
    source_options,
    ties_option,
    trust_remote_code_option,
    verbose_option,
)
from tierewrite.cli.telling import explain, report_command
from tierewrite.cli.terminal import console, print_json, said_of
from tierewrite.errors import EXIT_CODES, EXIT_FINDINGS
from tierewrite.planning.policy import ConsumerName

if TYPE_CHECKING:
    from tierewrite.engines.progress import Progress

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.items())


@contextlib.contextmanager
def watched(shown: bool) -> Iterator[Progress]:
    """Progress for people. Where nobody looks, Rich is not loaded."""
    if not shown:
        yield tierewrite.Progress()
        return
    from tierewrite.cli.progress_bar import Bar

    with Bar(console(stderr=True)) as bar:
        yield bar


@click.group(cls=HelpfulGroup, context_settings=CONTEXT, epilog=_EPILOG)
@click.version_option(tierewrite.__version__, "-V", "--version", prog_name="tierewrite")
@verbose_option
def cli() -> None:
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


@cli.command()
@argument("src", SRC, type=SOURCE)
@argument("dst", f"{DST} Left out with --in-place.", type=SOURCE, required=False)
@policy_options
@source_options
@run_options
@option(
    "--in-place", heading=OUTPUT, is_flag=True, help="Let the result take the place of SRC, which is kept as SRC.bak."
)
@option("--no-backup", heading=OUTPUT, is_flag=True, help="With --in-place: keep no SRC.bak.")
@output_options
@option("--no-manifest", heading=OUTPUT, is_flag=True, help="Do not write tierewrite.json.")
@push_options
@quiet_option
@json_option
@verbose_option
def rewrite(
    src: str,
    dst: str | None,
    as_json: bool,
    quiet: bool,
    no_manifest: bool,
    no_backup: bool,
    consumer: ConsumerName | None,
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
      tierewrite rewrite exported/ canonical/ --verify --push org/name --private
      tierewrite rewrite s3://bucket/exported s3://bucket/canonical --verify

    SRC and DST may be URLs of any fsspec file system (s3://, gs://, memory://, ...: pip install 'tierewrite[remote]').
    A DST in a store must be new; its index is written last, and makes it a checkpoint. After a kill, --resume goes on
    there and --overwrite starts again.
    """
    options = given(options)
    if consumer is not None:
        options["consumer"] = consumer
    upload = None
    if "push" in options or "private" in options:
        from tierewrite.cli.pushing import push_of

        upload = push_of(options, src, dst, not no_manifest)
    with watched(not (quiet or as_json)) as bar:
        report = tierewrite.rewrite(src, dst, manifest=not no_manifest, backup=not no_backup, progress=bar, **options)
        if upload is not None:
            from tierewrite.cli.pushing import pushed

            bar.start(f"uploading to {upload.repo}", 0)
            report = pushed(report, upload, "force" in options)
    with said_of("the rewrite in place is complete" if "in_place" in options else "DST is complete"):
        if as_json:
            print_json(report.to_json())
        elif not quiet:
            console().print(report)
    if report.readiness is not None and report.readiness.errors:
        raise click.exceptions.Exit(EXIT_FINDINGS)


@cli.command()
@argument("src", SRC, type=SOURCE)
@argument("dst", DST, type=SOURCE)
@expand_options
@source_options
@quiet_option
@json_option
@verbose_option
def expand(src: str, dst: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write the checkpoint in SRC to DST with every tied tensor under each of its names, the reverse of `rewrite`.

    For loaders that do not tie what is stored once. The names come from the model class, or from --ties; every side
    gets the canonical side's bytes. Rewriting DST gives SRC again.

    \b
    Examples:
      tierewrite expand canonical/ expanded/
      tierewrite expand canonical/ expanded/ --for transformers
    """
    with watched(not (quiet or as_json)) as bar:
        made = tierewrite.expand(src, dst, progress=bar, **given(options))
    with said_of("DST is complete"):
        if as_json:
            print_json(made.to_json())
        elif not quiet:
            console().print(made)
    if made.readiness is not None and made.readiness.errors:
        raise click.exceptions.Exit(EXIT_FINDINGS)


@cli.command(epilog=ITEM_OPTION_NAMES)
@argument(
    "items",
    "Folders with checkpoints at or below them, lists of checkpoints, URLs or hub ids.",
    type=SOURCE,
    nargs=-1,
    required=True,
    metavar="FILE|FOLDER...",
)
@option("--into", heading=OUTPUT, type=SOURCE, metavar="OUT", help="Folder or URL below which every DST is made.")
@click.option(
    "--plan-only",
    is_flag=True,
    help="Write nothing and read headers only: show what could be saved, the largest saving first. Needs no --into.",
)
@option(
    "-j",
    "--jobs",
    heading=WORK,
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="How many checkpoints at a time. Each already takes all --threads: more than one helps with small ones, with "
    "stores, and with --engine ray, where all of them share the cluster.",
)
@policy_options
@source_options
@run_options
@output_options
@option(
    "--no-manifest", heading=OUTPUT, is_flag=True, help="Do not write tierewrite.json (a next run then skips nothing)."
)
@quiet_option
@json_option
@verbose_option
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
    "src" and, as wanted, "dst" and options for this one, as they are listed below. Blank lines and lines that begin
    with # are left out. Relative paths in a FILE are relative to the folder that FILE is in.

    A DST that an earlier run made of the same SRC, with the same options and the same version of tierewrite, is left
    as it is (already-done), so that a batch that was stopped can simply be run again. Compared are names and sizes of
    files, options, ties, times and a few tensors; `tierewrite verify` proves it. A DST with anything else in it fails.
    With --overwrite both are made again.

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
    options = given(options)
    if no_manifest:
        options["manifest"] = False
    from tierewrite.batches.results import BatchInterrupted
    from tierewrite.cli.progress_bar import Bar

    stopped = None
    with Bar(console(stderr=True), shown=not (quiet or as_json)) as bar:
        try:
            report = tierewrite.batch(items, into=into, plan_only=plan_only, jobs=jobs, progress=bar, **options)
        except BatchInterrupted as interrupt:
            stopped, report = interrupt, interrupt.report
    with said_of("every checkpoint that was finished is complete"):
        if as_json:
            print_json(report.to_json())
        elif not quiet:
            console().print(report)
    if stopped is not None:
        print(f"tierewrite: {stopped}", file=sys.stderr)
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)


@cli.command()
@argument("src", SRC, type=SOURCE)
@policy_options
@source_options
@option("--confirm", heading=WORK, is_flag=True, help="Hash the tied tensors too: the plan is then what rewrite does.")
@option(
    "--duplicates",
    heading=WORK,
    is_flag=True,
    help="Also read tensors of 1 MiB or more that may be equal, and list those that hold the same bytes though no tie "
    "is declared. A hint; they are kept.",
)
@json_option
@verbose_option
def plan(src: str, as_json: bool, **options: Any) -> None:
    """Show what `rewrite` would do with SRC. Reads headers alone, unless --confirm or --duplicates; writes nothing.

    A plan is what happens if every tie is confirmed. Groups that the headers already refute are listed as
    unconfirmed; the exit code is 0 all the same. With --confirm the bytes are asked, as rewrite asks them: exit code 3
    where it would refuse.

    \b
    Examples:
      tierewrite plan exported/
      tierewrite plan exported/ --confirm
      tierewrite plan s3://bucket/exported
      tierewrite plan exported/ --json | jq '.tensors[] | select(.action == "drop") | .name'
    """
    with watched(not as_json) as bar:
        result = tierewrite.plan(src, progress=bar, **given(options))
    if as_json:
        print_json(result.to_structs())
    else:
        console().print(result)


@cli.command()
@argument("src", f"What DST was made of. {SRC}", type=SOURCE, metavar="[SRC]", required=False)
@argument(
    "dst", "The folder that a rewrite wrote, its URL, or, alone, a hub id.", type=SOURCE, metavar="DST", required=False
)
@source_options
@policy_options
@rewritten_for_option
@json_option
@verbose_option
def verify(src: str | None, dst: str | None, as_json: bool, **options: Any) -> None:
    """Prove that DST is what rewriting SRC with these options makes; or, without SRC, that DST is as it was written.

    Every expected value comes from SRC, from the options given here and from whoever declares the ties: give the
    options that the rewrite was given. Every tensor of SRC is accounted for, every tensor of DST has its origin; index,
    other files and manifest are right. Exit code 6 if anything is wrong, an unreadable DST included.

    DST alone (a folder, URL or hub id) is compared with its own manifest: files, headers, and the digests that are in
    it (of every tensor after `rewrite --digests`). That finds what changed since; whether it was right, SRC shows.

    \b
    Examples:
      tierewrite verify exported/ canonical/
      tierewrite verify org/canonical
      tierewrite verify exported/ served/ --for vllm
      tierewrite verify s3://bucket/exported s3://bucket/canonical
      tierewrite verify exported/ canonical/ --json | jq '.problems[] | [.id, .where]'
    """
    if src is None:
        raise click.UsageError("Missing argument 'DST'.")
    options = given(options)
    result: tierewrite.Integrity | tierewrite.Verification
    if dst is None:
        if others := sorted(options.keys() - {"revision"}):
            raise click.UsageError(f"{flag_of(others[0])} needs SRC: DST alone is compared with its own manifest")
        result = tierewrite.verify_integrity(src, **options)
    else:
        result = tierewrite.verify(src, dst, **options)
    if as_json:
        print_json(result.to_json())
    else:
        console().print(result)
    if not result.ok:
        raise click.exceptions.Exit(EXIT_FINDINGS)


@cli.command()
@argument("src", SRC, type=SOURCE)
@source_options
@click.option("--no-ties", is_flag=True, help="Do not ask for declared ties (never imports transformers).")
@json_option
@verbose_option
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
        print_json(result.to_json())
    else:
        console().print(result)


@cli.command()
@argument("checkpoint", "The folder that the consumer will load, or its URL.", type=SOURCE)
@loader_option
@check_loader_options
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@backbone_option
@ties_option
@trust_remote_code_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github", "sarif", "junit"]),
    help="For people, for programs (as --json), as annotations of a GitHub workflow, for code scanning, or as a test "
    "report.  [default: text]",
)
@json_option
@verbose_option
def check(
    checkpoint: str, consumer: ConsumerName, strict: bool, form: str | None, as_json: bool, **options: Any
) -> None:
    """Find what a consumer would load wrong, before it does. Reads headers, configs and scales; weights with --values.

    vLLM loads incomplete and contradictory checkpoints without a warning. Each finding has an id, a severity, the
    tensors or config entries concerned, what the consumer will do, and the fix if there is one. Exit code 6 if any is
    an error (with --strict, or a warning).

    \b
    Examples:
      tierewrite check canonical/ --for vllm
      tierewrite check canonical/ --for transformers --strict --json
      tierewrite check canonical/ --format sarif > tierewrite.sarif
      tierewrite check s3://bucket/canonical
      tierewrite check downloaded/ --values
    """
    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json is --format json; leave it out, or --format {form}")
    result = tierewrite.check(checkpoint, consumer, **options)
    form = "json" if as_json else form
    if form not in (None, "text"):
        from tierewrite.cli.findings_formats import FORMATS

        sys.stdout.write(FORMATS[form](result, strict))
    else:
        console().print(result)
    code = result.exit_code(strict=strict)
    if code:
        raise click.exceptions.Exit(code)


cli.add_command(explain)
cli.add_command(report_command)
