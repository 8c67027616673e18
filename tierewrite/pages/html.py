"""One HTML file out of the facts: no script, nothing fetched, readable in the dark.

The page forbids itself the network (a Content-Security-Policy of `default-src 'none'`), and every name, which may come
from a stranger's checkpoint, goes through `escaped` on its way in. The same facts make the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from tierewrite.consumers.findings import Finding, ReadinessReport
from tierewrite.pages import charts, heatmaps
from tierewrite.pages.charts import key_figures, verdict
from tierewrite.pages.facts import WORST_SHOWN, Divergence, Facts, GroupRow, SizeRow, quantile
from tierewrite.pages.style import change, escaped, times
from tierewrite.tables import count, declarer
from tierewrite.units import size

ROWS_SHOWN = 40
KEPT_SHOWN = 100
FINDINGS_SHOWN = 100
LAYERS_SHOWN = 256
COLUMNS_SHOWN = 12


def page(facts: Facts, worst: int = WORST_SHOWN) -> str:
    """The page.

    Args:
        worst: how many of the scales that differ most to list.

    Raises:
        UsageError: matplotlib is not installed.
    """
    pictures = charts.svgs(facts)
    sections = [
        _head(facts),
        _sizes(facts, pictures["sizes"]),
        _divergence(facts, pictures, worst),
        _groups(facts),
        *map(_readiness, facts.consumers),
        _about(facts),
    ]
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{escaped(facts.name)} – tierewrite report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(facts: Facts) -> str:
    kept = facts.count("kept")
    if facts.count("rewritten"):
        lead = "Every confirmed tied weight is stored once, under its canonical name."
    elif facts.count("canonical"):
        lead = "The checkpoint was canonical already: there was nothing to drop."
    else:
        lead = "No tied weight was rewritten."
    if kept:
        verbs = ("s were", "stay") if kept > 1 else (" was", "stays")
        lead += f" {kept:,} declared tie{verbs[0]} not confirmed and {verbs[1]} on every side."
    cards = "".join(
        f'<div class="card"><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd><p>{escaped(remark)}</p></div>'
        for name, value, remark in key_figures(facts)
    )
    return (
        f'<header><p class="eyebrow">tierewrite report</p><h1>{escaped(facts.name)}</h1>'
        f'<p class="lead">{lead}</p></header>\n{_verdicts(facts)}<dl class="cards">{cards}</dl>'
    )


def _verdicts(facts: Facts) -> str:
    """A tile for each consumer that was asked, which leads to what it found."""
    tiles = "".join(
        f'<a class="verdict{" bad" * bool(report.errors)}" href="#{_anchor(report)}">{escaped(verdict(report))}</a>'
        for report in facts.consumers
    )
    return f'<nav class="verdicts">{tiles}</nav>\n' if tiles else ""


def _anchor(report: ReadinessReport) -> str:
    return f"ready-for-{escaped(report.consumer)}"


def _section(title: str, *parts: str, anchor: str = "") -> str:
    named = f' id="{anchor}"' if anchor else ""
    return f"<section{named}>\n<h2>{escaped(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table; the first column is text, the others are numbers. Cells are HTML already."""
    head = "".join(f"<th scope=col>{escaped(c)}</th>" for c in columns)
    body = "\n".join(
        "<tr>" + f"<th scope=row>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    table = f'<table class="{css}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _more(total: int, most: int, what: str) -> str:
    return f'<p class="note">… and {total - most:,} more {what} (all of them with --json).</p>' if total > most else ""


def _figures(pictures: Sequence[str]) -> str:
    return "\n".join(f'<figure class="scroll">{picture}</figure>' for picture in pictures)


def _grids(pictures: Sequence[str]) -> str:
    """Heatmaps with their captions, small ones side by side."""
    return '<div class="grids">' + "\n".join(f"<figure>{picture}</figure>" for picture in pictures) + "</div>"


def _keys(*keys: tuple[str, str]) -> str:
    """A legend of (class of the swatch, text)."""
    return "".join(f'<span class="key"><i class="swatch {css}"></i>{escaped(name)}</span>' for css, name in keys)


def _code(name: str) -> str:
    return f"<code>{escaped(name)}</code>"


def _sizes(facts: Facts, pictures: Sequence[str]) -> str:
    sizes = facts.sizes
    if sizes is None:
        return _section(
            "Size",
            '<p class="note">Sizes are read from the headers of the checkpoint: give the folder instead of its '
            "manifest to see them.</p>",
        )
    columns = ("", "tensors before", "after", "bytes before", "after", "change")

    def rows(table: Sequence[SizeRow]) -> list[Sequence[str]]:
        listed = list(table[:ROWS_SHOWN])
        if len(table) > ROWS_SHOWN:
            listed.append(charts.rest_of(table[ROWS_SHOWN:]))
        return [_size_row(row) for row in (*listed, sizes.total)]

    return _section(
        "Size before and after",
        f'<div class="legend">{_keys(("before", "before"), ("after", "after"))}</div>',
        _figures(pictures),
        "<h3>By kind of tensor</h3>",
        _table(columns, rows(sizes.by_tensor), "sum"),
        f"<details><summary>All {len(sizes.by_part):,} parts of the model</summary>"
        f"{_table(columns, rows(sizes.by_part), 'sum')}</details>",
    )


def _size_row(row: SizeRow) -> Sequence[str]:
    changed = change(row.before_bytes, row.after_bytes) if row.before_bytes != row.after_bytes else "–"
    return (
        _code(row.name) if row.name != "total" else "total",
        f"{row.before_tensors:,}",
        f"{row.after_tensors:,}",
        size(row.before_bytes),
        size(row.after_bytes),
        changed,
    )


def _divergence(facts: Facts, pictures: dict[str, list[str]], worst: int) -> str:
    title = "How much the sides’ activation scales differed"
    if not facts.scales:
        return _section(
            title,
            '<p class="note">No activation scales were merged: the checkpoint has none under tied weights, or had '
            "them on one side only.</p>",
        )
    rows = facts.divergence
    listed = [facts.overall, *rows] if len(rows) > 1 else list(rows)
    intro = (
        "<p>Each side of a tied weight was calibrated on inputs of its own, and one value now stands for all of them: "
        "the one with the largest range, so that no side clips. The <b>ratio</b> is the largest side’s value over the "
        "smallest’s. At 1× the sides agree; at <i>r</i>× the side with the smallest range quantizes its activations "
        "within a range <i>r</i> times wider than it was calibrated for.</p>"
    )
    table = _table(
        ("projection", "scales", "median", "p90", "max", "one side only", "never calibrated", "largest at"),
        [_divergence_row(d) for d in listed[: ROWS_SHOWN + 1]],
        "first last-text" if len(rows) > 1 else "last-text",
    )
    parts = [intro, table, _more(len(listed), ROWS_SHOWN + 1, "projections")]
    if pictures["ratios"]:
        keys = _keys(("median", "median"), ("p90", "p90"), ("largest", "largest"))
        parts += ["<h3>Distribution</h3>", f'<div class="legend">{keys}</div>', _figures(pictures["ratios"])]
    if pictures["heatmaps"]:
        parts += ["<h3>Where</h3>", _legend(facts), _grids(pictures["heatmaps"])]
    parts += [_worst(facts, worst), _by_layer(facts)]
    return _section(title, *parts)


def _divergence_row(d: Divergence) -> Sequence[str]:
    return (
        "all together" if d.projection == "all" else _code(d.projection),
        f"{len(d.scales):,}",
        times(d.median),
        times(d.p90),
        f"<b>{times(d.max)}</b>",
        f"{d.one_sided:,}" if d.one_sided else "–",
        f'<span class="never">{d.never:,}</span>' if d.never else "–",
        "–" if d.largest is None else escaped(_place(d.largest.layer, d.largest.expert)),
    )


def _place(layer: int | None, expert: int | None) -> str:
    found = [f"layer {layer}"] if layer is not None else []
    if expert is not None:
        found.append(f"expert {expert}")
    return ", ".join(found) or "–"


def _legend(facts: Facts) -> str:
    top = heatmaps.scale_top(facts)
    stops = ", ".join(heatmaps.gradient())
    ticks = "".join(
        f'<span style="left:{100 * math.log(t) / math.log(top):.2f}%">{t:g}×</span>' for t in charts.ticks(top)
    )
    ramp = f'<div style="background:linear-gradient(90deg, {stops})"></div>{ticks}'
    return (
        f'<div class="legend"><div class="ramp">{ramp}</div>'
        f"{_keys(('one', 'one side only'), ('no', 'never calibrated on any side'), ('none', 'no scale here'))}</div>"
    )


def _worst(facts: Facts, worst: int) -> str:
    found = facts.worst(worst)
    if not found:
        return ""
    rows = [(times(s.ratio), _code(s.name), escaped(_place(s.layer, s.expert)), f"{len(s.sources)}") for s in found]
    return f"<h3>The {len(found):,} scales that differ most</h3>" + _table(
        ("ratio", "scale", "where", "sides"), rows, "names"
    )


def _by_layer(facts: Facts) -> str:
    columns = [d for d in facts.divergence if d.ratios][:COLUMNS_SHOWN]
    layers = sorted({s.layer for d in columns for s in d.scales if s.layer is not None})
    if not columns or not layers:
        return ""
    cells: dict[tuple[int, int], list[float]] = {}
    for i, d in enumerate(columns):
        for s in d.scales:
            if s.layer is not None and s.ratio is not None:
                cells.setdefault((s.layer, i), []).append(s.ratio)

    def cell(layer: int, column: int) -> str:
        ratios = sorted(cells.get((layer, column), ()))
        if not ratios:
            return "–"
        if len(ratios) == 1:
            return times(ratios[0])
        return f"{times(quantile(ratios, 0.5))} <b>{times(ratios[-1])}</b>"

    rows = [(str(layer), *(cell(layer, i) for i in range(len(columns)))) for layer in layers[:LAYERS_SHOWN]]
    return (
        "<details><summary>By layer: median and <b>maximum</b></summary>"
        + _table(("layer", *(d.projection for d in columns)), rows)
        + _more(len(layers), LAYERS_SHOWN, "layers")
        + "</details>"
    )


def _groups(facts: Facts) -> str:
    if not facts.groups:
        return _section("Tied parameters", '<p class="note">Nothing on disk is declared tied.</p>')
    columns: list[tuple[str, Callable[[GroupRow], int]]] = [
        ("groups", lambda r: r.rewritten + r.canonical + r.kept),
        ("rewritten", lambda r: r.rewritten),
        ("canonical already", lambda r: r.canonical),
        ("kept", lambda r: r.kept),
        ("tensors dropped", lambda r: r.dropped),
        ("renamed", lambda r: r.actions.get("rename", 0)),
        ("merged", lambda r: r.actions.get("merge", 0)),
        ("repacked", lambda r: r.actions.get("repack", 0)),
    ]
    used = [(name, get) for name, get in columns if name == "groups" or any(map(get, facts.groups))]
    rows: list[Sequence[str]] = [
        (_code(row.kind), *(f"{get(row):,}" if get(row) else "–" for _, get in used))
        for row in facts.groups[:ROWS_SHOWN]
    ]
    rows.append(("total", *(f"{sum(map(get, facts.groups)):,}" for _, get in used)))
    return _section(
        "Tied parameters, by what was done",
        _table(("tied parameter", *(name for name, _ in used)), rows, "sum"),
        _more(len(facts.groups), ROWS_SHOWN, "kinds"),
        _kept(facts),
    )


def _kept(facts: Facts) -> str:
    if not facts.kept:
        return '<p class="note">Every declared tie was confirmed by its bytes; none was kept.</p>'
    rows = [
        (_code(k.canonical), "<br>".join(_code(alias) for alias in k.aliases[:8]), escaped(k.reason))
        for k in facts.kept[:KEPT_SHOWN]
    ]
    what = "Kept on every side" if len(facts.kept) == facts.count("kept") else "Not confirmed, and kept"
    return (
        f"<h3>{what} ({len(facts.kept):,})</h3>"
        + _table(("canonical", "aliases", "why"), rows, "text kept")
        + _more(len(facts.kept), KEPT_SHOWN, "groups")
    )


def _readiness(report: ReadinessReport) -> str:
    who = f"{report.consumer} {report.consumer_version}".strip()
    if not report.findings:
        found = f'<p class="good">Nothing found that {escaped(who)} would stumble over.</p>'
    else:
        counts = f"{count(len(report.errors), 'error')} and {count(len(report.warnings), 'warning')}"
        found = f"<p>{counts} for {escaped(who)}.</p>"
    notes = "".join(f"<li>{escaped(note)}</li>" for note in report.notes[:20])
    return _section(
        f"Ready for {report.consumer}?",
        found,
        "\n".join(_finding(f) for f in report.findings[:FINDINGS_SHOWN]),
        _more(len(report.findings), FINDINGS_SHOWN, "findings"),
        f'<p class="note">Not checked:</p><ul class="note">{notes}</ul>' if notes else "",
        anchor=_anchor(report),
    )


def _finding(found: Finding) -> str:
    places = "".join(f"<li>{_code(place)}</li>" for place in found.where[:5])
    if len(found.where) > 5:
        places += f"<li>and {len(found.where) - 5:,} more</li>"
    fix = f"<p><b>Fix:</b> {escaped(found.fix)}</p>" if found.fix else ""
    severity = "error" if found.severity == "error" else "warning"
    return (
        f'<article class="{severity}"><h3><span class="tag">{severity}</span> {escaped(found.id)}</h3>'
        f"<p>{escaped(found.found)}</p><p><b>Then:</b> {escaped(found.consequence)}</p>{fix}"
        f"<ul>{places}</ul></article>"
    )


def _option(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else value


def _about(facts: Facts) -> str:
    who = escaped(declarer(facts.ties_source))
    if facts.ties_detail:
        who += f" ({_code(facts.ties_detail)})"
    rows: list[tuple[str, str]] = [
        ("Written by", f"tierewrite {escaped(facts.version)}"),
        ("Ties declared by", who),
        *((f"Option {escaped(name)}", escaped(_option(v))) for name, v in facts.options.items()),
        ("Source", f"{facts.source_shards} safetensors file{'' if facts.source_shards == 1 else 's'}"),
        *([("Made from", f"{_code(facts.hub[0])} at commit {_code(facts.hub[1])}")] if facts.hub else []),
    ]
    facts_ = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<footer><dl class="about">{facts_}</dl><p>Read from the rewrite’s manifest and the headers of its output. '
        "Sizes are tensor bytes, in powers of 1024. <code>tierewrite verify</code> proves the output from its source."
        "</p></footer>"
    )


_CSS = """
:root{--paper:#f6f7f9;--panel:#fff;--ink:#17202e;--muted:#5d6878;--line:#dde2e9;--before:#a9b4c4;--after:#0f8b8d;
--never:#d1345b;--one-side:#9aa3ad;--warn:#a86400;--good:#1b7f4b;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#10151d;--panel:#18202b;--ink:#e7ecf3;--muted:#9aa7b8;--line:#2c3746;
--before:#55637a;--after:#2fb8b3;--never:#ff5d84;--one-side:#6f7a87;--warn:#f0b04c;--good:#54c98a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:40px 24px 32px}
header{margin-bottom:24px}
.eyebrow{margin:0;color:var(--after);font-weight:600;letter-spacing:.02em}
h1{font-size:32px;line-height:1.2;margin:2px 0 8px;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:20px;margin:0 0 14px;letter-spacing:-.005em}
h3{font-size:15px;margin:28px 0 8px}
p{margin:0 0 12px;max-width:78ch}
.lead{font-size:17px;color:var(--muted);margin:0}
.cards{display:flex;flex-wrap:wrap;gap:1px;margin:0 0 24px;
background:var(--line);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.card{flex:1 1 136px;background:var(--panel);padding:14px 14px}
.card dt{color:var(--muted);font-size:12.5px;line-height:1.3}
.card dd{margin:4px 0 2px;font-size:21px;font-weight:650;line-height:1.25;
font-variant-numeric:tabular-nums;white-space:nowrap}
.card p{margin:0;color:var(--muted);font-size:12.5px;line-height:1.35}
section{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:22px 24px 20px;margin:0 0 20px}
figure{margin:0 0 6px}
.scroll{overflow-x:auto;--hidden:color-mix(in srgb,var(--ink) 22%,transparent);
background:linear-gradient(90deg,var(--panel) 40%,transparent) 0/36px 100% no-repeat local,
linear-gradient(270deg,var(--panel) 40%,transparent) 100%/36px 100% no-repeat local,
linear-gradient(90deg,var(--hidden),transparent) 0/12px 100% no-repeat scroll,
linear-gradient(270deg,var(--hidden),transparent) 100%/12px 100% no-repeat scroll}
.chart{display:block;width:100%;min-width:660px;height:auto}
.chart text{font-variant-numeric:tabular-nums}
.chart image{image-rendering:pixelated}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:500;font-size:12.5px;vertical-align:bottom;white-space:normal}
tbody th{font-weight:400}
tbody tr:last-child>*{border-bottom:0}
.sum tbody tr:last-child>*{border-top:2px solid var(--line);font-weight:600}
.first tbody tr:first-child>*{font-weight:600;border-bottom:2px solid var(--line)}
.last-text td:last-child,.last-text thead th:last-child{text-align:left;color:var(--muted)}
.names td:nth-child(2),.names th:nth-child(2),.names td:nth-child(3),.names th:nth-child(3){text-align:left}
.names td:nth-child(2){white-space:normal;overflow-wrap:anywhere;min-width:20em}
.names tbody th{font-weight:600}
.text td,.text th{text-align:left;white-space:normal}
.kept td,.kept th{overflow-wrap:anywhere}
.kept td,.kept th{min-width:17em}
code{font-family:var(--mono);font-size:.92em}
details{margin:16px 0 0;border-top:1px solid var(--line);padding-top:12px}
details+details{margin-top:12px}
summary{cursor:pointer;color:var(--after);font-weight:500}
details>.scroll{margin-top:10px}
.note{color:var(--muted);font-size:13.5px}
p.note{margin:10px 0 0}
.good{color:var(--good);font-weight:600}
.never{color:var(--never);font-weight:600}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:10px 28px;font-size:12.5px;color:var(--muted);
margin:4px 0 16px}
.ramp{position:relative;width:320px;max-width:100%;height:32px;margin:0 10px}
.ramp div{height:12px;border-radius:2px}
.ramp span{position:absolute;top:14px;transform:translateX(-50%)}
.key{display:inline-flex;align-items:center;gap:7px}
.swatch{width:14px;height:14px;border-radius:2px;display:inline-block}
.swatch.one{background:#9aa3ad}.swatch.no{background:#d1345b}.swatch.none{border:1px solid var(--line)}
.swatch.before{background:var(--before)}.swatch.after{background:var(--after)}
.swatch.median{width:2px;border-radius:0;background:var(--ink)}
.swatch.p90{width:0;border-left:2px dashed var(--ink);border-radius:0}
.swatch.largest{width:0;height:0;border:6px solid transparent;border-top:9px solid var(--never);border-bottom:0}
.grids{display:flex;flex-wrap:wrap;gap:8px 36px}
.grids figure{flex:0 1 auto;max-width:100%}
figcaption{font-size:13.5px;margin:10px 0 4px;overflow-wrap:anywhere}
figcaption span{color:var(--muted);font-size:12.5px;margin-left:10px}
.chart.small{min-width:0;max-width:none}
.verdicts{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 16px}
.verdict{flex:1 1 220px;padding:12px 16px;border-radius:10px;font-weight:650;font-size:17px;text-decoration:none;
border:1px solid var(--line);border-left:6px solid var(--good);background:var(--panel);color:var(--good)}
.verdict.bad{border-left-color:var(--never);color:var(--never)}
article{border-left:3px solid var(--warn);padding:2px 0 2px 14px;margin:0 0 18px}
article.error{border-color:var(--never)}
article h3{margin:0 0 4px}
article p{margin:0 0 4px}
article ul{margin:4px 0 0;padding-left:18px;font-size:13px;overflow-wrap:anywhere;color:var(--muted)}
.tag{color:var(--warn)}.error .tag{color:var(--never)}
footer{color:var(--muted);font-size:13px;padding:4px 2px}
.about{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0 0 12px}
.about dt{font-weight:500}.about dd{margin:0;overflow-wrap:anywhere}
@media (max-width:640px){main{padding:24px 14px}section{padding:16px}h1{font-size:25px}}
@media print{body{background:#fff}section{break-inside:avoid-page}}
"""
