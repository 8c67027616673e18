"""The commands `explain` and `report`: what rules, formats and manifests say. They decide nothing."""

from __future__ import annotations

import sys

import click

import tierewrite
from tierewrite.cli.help import HelpfulCommand, argument
from tierewrite.cli.options import FILE, SOURCE, backbone_option, json_option, report_consumer_option, verbose_option
from tierewrite.cli.terminal import console, print_json
from tierewrite.errors import shown
from tierewrite.planning.policy import ConsumerName
from tierewrite.stores.places import chain, located


@click.command(cls=HelpfulCommand)
@argument("topic", "A rule, as `check` names it, or a topic.", required=False)
@click.option("--list", "all_topics", is_flag=True, help="Name all topics and rules, a line each.")
@json_option
@verbose_option
def explain(topic: str | None, all_topics: bool, as_json: bool) -> None:
    """Say what a finding of `check` means, and what exit codes, JSON and formats mean.

    Of a rule: what the consumer does, how to fix it and where that was read. With --json rules only.

    \b
    Examples:
      tierewrite explain scale-missing
      tierewrite explain exit-codes
      tierewrite explain formats
      tierewrite explain --list
      tierewrite explain --list --json | jq '.rules[] | select(.fixed_by)'
    """
    if (topic is None) is not all_topics:
        raise click.UsageError("name a rule or a topic, or give --list to see their names")
    from tierewrite.cli import topics
    from tierewrite.consumers import explain as rules

    if as_json:
        if topic is not None and topics.explained(topic) is not None:
            raise click.UsageError(
                f"'{topic}' is explained in words only; leave out --json (only rules have an object)"
            )
        print_json(rules.to_json(topic))
    elif topic is None:
        click.echo(f"{topics.listed()}\n\n{rules.listed()}")
    else:
        click.echo(topics.explained(topic) or rules.explained(topic, topics.names()))


@click.command("report", cls=HelpfulCommand, short_help="Show what a rewrite did, here or on a page to pass on.")
@argument(
    "target", "The folder that a rewrite wrote, its URL, or its tierewrite.json.", type=SOURCE, metavar="DST|MANIFEST"
)
@click.option("--html", type=FILE, metavar="FILE", help="Write one self-contained HTML page.")
@click.option("--png", type=FILE, metavar="FILE", help="Write its figures and pictures as one PNG.")
@click.option("--card", is_flag=True, help="Print a few lines of Markdown for the checkpoint's model card.")
@report_consumer_option
@backbone_option
@click.option(
    "--worst",
    type=click.IntRange(0, 100_000),
    default=20,
    show_default=True,
    help="How many of the scales that differ most to list.",
)
@json_option
@verbose_option
def report_command(
    target: str,
    html: str | None,
    png: str | None,
    consumer: tuple[ConsumerName, ...],
    backbone: str | None,
    worst: int,
    card: bool,
    as_json: bool,
) -> None:
    """Show what a rewrite did: sizes, how much the activation scales of tied sides differed, what was kept and why.

    Reads DST's manifest (tierewrite.json) and headers; a manifest alone will do for everything but the sizes. The page
    needs no network. Pictures need matplotlib: pip install 'tierewrite[report]'.

    \b
    Examples:
      tierewrite report canonical/ --html report.html --for vllm
      tierewrite report canonical/ --png report.png
      tierewrite report canonical/ --card --for vllm >> card.md
      tierewrite report s3://bucket/canonical --html report.html
      tierewrite report canonical/ --json | jq '.divergence[] | [.projection, .median, .max]'
    """
    if html is not None and png is not None and chain(located(html))[0] == chain(located(png))[0]:
        raise click.UsageError("--html and --png name the same file; give each a name of its own")
    page = tierewrite.report_page(target, consumer, backbone=backbone, worst=worst)
    if html is not None:
        page.write_html(html)
    if png is not None:
        page.write_png(png)
    for written in (html, png):
        if written is not None and not as_json:
            click.echo(f"{shown(str(written))} is written.")
    if as_json:
        print_json(page.to_json())
    elif card:
        sys.stdout.write(page.card())
    elif html is None and png is None:
        from tierewrite.pages.terminal import show

        show(console(), page.facts, worst)
