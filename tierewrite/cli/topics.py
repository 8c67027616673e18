"""What `explain` says beside rules: exit codes, JSON schemas, formats. Each is made from the records it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tierewrite.errors import EXIT_CODES
from tierewrite.formats.families import FAMILIES
from tierewrite.formats.family import Companion, Family, Role


@dataclass(frozen=True)
class Schema:
    """A kind of JSON object: its name and version, who prints it, and what its members are."""

    name: str
    printed_by: str
    members: str


SCHEMAS = (
    Schema(
        "tierewrite/plan/1",
        "`plan --json`",
        "`options`, `confirmed` (with `--confirm`), `ties`, `formats`, `before`, `after`, `groups`, `warnings`, and"
        " `tensors`: a list of each source tensor once, with `name`, `action` (`keep`, `rename`, `drop`, `merge`, "
        "`repack`), `target` (the key in DST that holds it or stands for it), `merged` (a merged value is written), "
        "`group` (id or null)",
    ),
    Schema(
        "tierewrite/report/1",
        "`rewrite --json`",
        "`src`, `dst`, `options`, `ties`, `formats`, `device`, `before`, `after`, `counts`, `ratios`, `groups` "
        "(with `status` `rewritten`, `canonical` or `kept`, `reason`, and `scales` with the `ratio` between the "
        "sides), `reencoded`, `filled`, `readiness`, `warnings`, `seconds`, `verified`, `pushed` "
        "(`id`, `commit`, `url`; null without `--push`), `means` (how many bytes of the shards were `shared`, "
        "`copied_in_kernel`, `copied_by_store`, `written`)",
    ),
    Schema(
        "tierewrite/inspection/1",
        "`inspect --json`",
        "`root`, `bytes`, `shards`, `dtypes`, `formats`, `recognised` (by which tensors and configs), `side_files`, "
        "`ties` (`groups` with `origins`), `tensors`, `warnings`",
    ),
    Schema(
        "tierewrite/verification/1",
        "`verify --json`",
        "`ok`, `problems` (`id`, `where`, `message`), `counts`, `ties` (`source`, `detail`), `notes`",
    ),
    Schema(
        "tierewrite/integrity/1",
        "`verify --json` without SRC",
        "`ok`, `version` (of the tierewrite that wrote it), `source` (`id` and `commit` on the hub, or null), `counts` "
        "(`files`, `tensors`, and `digests`: of how many tensors the bytes were compared), `problems`, `notes`",
    ),
    Schema(
        "tierewrite/readiness/1",
        "`check --json`",
        "`consumer`, `consumer_version`, `checkpoint`, `ready`, `errors`, `warnings` (how many), `tensors`, "
        "`bytes_read`, `findings` (`id`, `severity`, `where`, `found`, `consequence`, `fix`, `fixed_by`, `source`), "
        "`notes`",
    ),
    Schema(
        "tierewrite/rules/1",
        "`explain --json`",
        "`rules`: each with `consumer`, `consumer_version`, `id`, `title`, `when`, `severity`, `consequence`, "
        "`fix`, `fixed_by`, `source`",
    ),
    Schema(
        "tierewrite/expansion/1",
        "`expand --json`",
        "`src`, `dst`, `ties`, `before`, `after`, `written` (name written out: the tensor of SRC that it copies), "
        "`verified`, `readiness`, `warnings`, `seconds`",
    ),
    Schema(
        "tierewrite/batch/1",
        "`batch --json`",
        "`plan_only`, `exit_code`, `seconds`, `counts` (a status: how many), `before`, `after`, `saved_bytes`, and "
        "`results`: each checkpoint with `src`, `dst`, `status` (`rewritten`, `planned`, `canonical`, `already-"
        "done`, `skipped`, `refused`, `failed`, `stopped`, `not-started`), `exit_code`, `error` (as below), `seconds`, "
        "`before`, `after`, `saved_bytes`, `groups`, `kept` (with `--plan-only`: unconfirmed), `merged_scales`, "
        "`ratios`, `consumer_errors`, `warnings`, `skipped` (why)",
    ),
    Schema(
        "tierewrite/page/1",
        "`report --json`",
        "what the page shows: `name`, `tool`, `options`, `ties`, `hub` (`id` and `commit` of the source, or null), "
        "`sizes` (null where the manifest came alone), `scales`, `divergence` (the same of each projection), `worst`, "
        "`groups`, `kept`, `consumers` (what `check` found for each), `readiness` (the first of these)",
    ),
    Schema(
        "tierewrite/error/1",
        "any, on failure",
        "`error`: `type`, `exit_code`, `message`, `file`, `tensor`, `details` (`groups` of a refusal)",
    ),
    Schema(
        "tierewrite/manifest/1",
        "`tierewrite.json` in DST",
        "`tool`, `source` (`shards` with `size` and `header`, the BLAKE3 of length and header; `hub` with `id` and "
        "`commit`), `options`, `ties` (`map`: alias to canonical), `groups` (per output tensor: `from`, `action`, "
        "`merged`, `blake3`, `ratio`, `calibrated`), `output` (`shards` as above, other `files` with `size` and "
        "`blake3`, with `--digests` `tensors`: the BLAKE3 of each)",
    ),
)


def explained(topic: str) -> str | None:
    """The text of a topic, or None where it is none."""
    if topic in FAMILIES:
        return "\n".join(_family_lines(FAMILIES[topic]))
    return TOPICS[topic][1]() if topic in TOPICS else None


def listed() -> str:
    """A line for each topic."""
    width = max(map(len, TOPICS))
    return "\n".join(f"{name:<{width}}  {title}" for name, (title, _) in TOPICS.items())


def _exit_codes() -> str:
    return "\n".join(f"{code:>3}  {text}" for code, text in EXIT_CODES.items())


def _json() -> str:
    intro = "Every object has a `schema`. A member may be added under the same number; its meaning never changes."
    return "\n\n".join([intro, *(f"{one.name}, by {one.printed_by}:\n  {one.members}" for one in SCHEMAS)]).replace(
        "`", ""
    )


def _formats() -> str:
    lines = ["What a suffix beside a tied weight means. `tierewrite explain NAME` has each family's own."]
    return "\n\n".join([*lines, *("\n".join(_family_lines(family)) for family in FAMILIES.values())])


def _family_lines(family: Family) -> Iterator[str]:
    yield family.name
    for title, suffixes in _columns(family).items():
        if suffixes:
            yield f"  {title}: {', '.join(suffixes)}"


def _columns(family: Family) -> dict[str, list[str]]:
    """What a family writes, by what must hold between the sides of a tie."""
    columns: dict[str, list[str]] = {
        "the weight itself": [],
        "computed from the weight, equal on all sides": [],
        "equal, and so the neighbours that it was folded into": [],
        "calibrated, merged into one value that covers all sides": [],
        "of each side": [],
        "ranges of the KV cache, merged on request": [],
    }
    main, equal, adjacent, merged, per_side, kv = columns.values()
    by_role = {
        Role.WEIGHT: equal,
        Role.ADJACENT: adjacent,
        Role.ACTIVATION: merged,
        Role.PER_SIDE: per_side,
        Role.KV: kv,
    }
    for companion in (*family.companions, *family.fused, *family.kv):
        column = main if companion.main else by_role[companion.role]
        text = _named(companion)
        if text not in column:
            column.append(text)
    return columns


def _named(companion: Companion) -> str:
    return f"{companion.suffix} ({companion.merge})" if companion.merge else companion.suffix


TOPICS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "exit-codes": ("what each exit code means", _exit_codes),
    "json": ("the JSON that commands print, and its members", _json),
    "formats": ("quantization formats: what is equal, merged or per side", _formats),
}
"""Name -> title, and what makes the text. The name of a quantization family is a topic too."""


def formats_table() -> list[str]:
    """The families as a table in Markdown, for formats/FAMILIES.md."""
    lines = [
        "| family | the weight itself | from the weight: equal | equal, and the neighbours | merged | per side | KV |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        cells = [", ".join(f"`{suffix}`" for suffix in suffixes) for suffixes in _columns(family).values()]
        lines.append(f"| {family.name} | {' | '.join(cells)} |")
    return lines


def schemas_table() -> list[str]:
    """The JSON objects as a table in Markdown, for cli/JSON_AND_EXIT_CODES.md."""
    rows = [f"| `{one.name}` | {one.printed_by} | {one.members} |" for one in SCHEMAS]
    return ["| schema | printed by | members |", "|---|---|---|", *rows]


def exit_codes_table() -> list[str]:
    """The exit codes as a table in Markdown, for cli/JSON_AND_EXIT_CODES.md."""
    return ["| exit code | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
