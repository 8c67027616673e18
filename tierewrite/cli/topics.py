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


@dataclass(frozen=True)
class Part:
    """What stands inside of objects, under the same name in all of them.

    Attributes:
        name: the member that holds it.
        stands_in: the objects, by the middle of their schemas' names.
        members: what its own members are.
    """

    name: str
    stands_in: str
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
        "sides), `reencoded`, `filled`, `readiness`, `warnings`, `configs` (those that were changed), `seconds`, "
        "`verified`, `pushed` (`id`, `commit`, `url`; null without `--push`), `means` (how many bytes of the "
        "shards were `shared`, `copied_in_kernel`, `copied_by_store`, `written`)",
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

PARTS = (
    Part(
        "options",
        "plan, report, page, manifest",
        "those that decide what the output holds: `on_mismatch`, `kv_scales`, `max_shard_size` (bytes, or null), "
        "`unify_fused_scales`, `fix_ignore`, `fix_config`, `fill_missing_scales`, `keep_names_for`, `exclude`, "
        "`strip_prefix`, as `rewrite --help` explains the flags",
    ),
    Part(
        "ties",
        "plan, report, inspection, verification, expansion, page, manifest",
        "`source`: who declares them (`class`, `config`, `ties-file`, `mapping`, `none`; of a verification also "
        "`manifest`), and `detail`: which class or file; in plan, report and inspection `unpaired` (aliases that are "
        "declared without a partner); in an inspection `remembered` (the class was not asked now), `idle` (declared "
        "aliases of which nothing is stored), and `groups` with `parameters_on_disk`: the names of each stored "
        "parameter, the canonical one first; null with `--no-ties`",
    ),
    Part(
        "before, after",
        "plan, report, expansion, batch",
        "`bytes` of tensors, `tensors` (how many), `shards` (each with `name` and `bytes`: in a report of the whole "
        "file, else of its tensors; in a plan also `tensors`; of an expansion's `before` their number)",
    ),
    Part(
        "groups",
        "plan, report, inspection, manifest, error",
        "one entry a tie: `id`, `canonical` and `aliases` (parameters), `origins` (who declared it), `kind` (the "
        "parameter without prefix and numbers), `status` (in a plan `planned`, `canonical` or `unconfirmed`; else as "
        "in a report), `reason` (why it is not confirmed, or null), `dropped_tensors`, `dropped_bytes`, `kept_names` "
        "(names that stay, for a consumer), `differing_aliases` (alias -> how it differs), and in a report `ratio`: "
        "the largest of its scales",
    ),
    Part(
        "scales",
        "report",
        "one entry a merged scale: `target` (key in DST), `sources` (keys in SRC), `ratio` (largest side by smallest; "
        "null where fewer than two sides have a value), `calibrated` (false: no side has), `invalid` (the keys whose "
        "values took no part), `kv` (a scale of the KV cache)",
    ),
    Part(
        "reencoded",
        "report",
        "one entry a module of which NVFP4 weights were re-encoded: `module`, `reason` (`mismatch` or `fused`), "
        "`scale` (the new weight_scale_2 or weight_global_scale), `largest_change` and `rms_change` of its elements",
    ),
    Part(
        "filled",
        "report",
        "one entry a scale of an expert: `target` (key in DST), `missing` (else it was there, never calibrated), "
        "`taken_from` (the key whose value it got, or null where values differ by channel)",
    ),
    Part(
        "counts",
        "report, verification, batch",
        "`groups`, `rewritten`, `canonical`, `kept` (ties), `dropped_tensors`, `merged_scales`, `never_calibrated` "
        "(scales); in a verification how many tensors of SRC were `kept`, `renamed`, `dropped`, `merged`, `repacked`; "
        "in a batch `checkpoints` and each status",
    ),
    Part("ratios", "report, batch", "`median` and `max` of the ratios of all merged scales, or null"),
    Part("problems", "verification, integrity", "`id` (stable, for scripts), `where`, `message`"),
    Part(
        "findings",
        "readiness",
        "`id` (a rule; `tierewrite explain ID`), `severity` (`error` or `warning`), `where` (tensors, or entries of "
        "configs), `found`, `consequence` (what the consumer does with it), `fix`, `fixed_by` (the arguments of "
        "tierewrite that fix it, such as `rewrite --for vllm`, or null), `source` (where in the consumer it was read)",
    ),
    Part("readiness, consumers", "report, expansion, page", "an object of the schema tierewrite/readiness/1, or null"),
    Part(
        "shards, dtypes, side_files, recognised, tensors",
        "inspection",
        "shards: `name`, `bytes` (of the file), `tensors` (how many), `metadata` (of its header); dtypes: dtype -> "
        "`tensors`, `bytes`; side files: `name`, `bytes`; recognised: `format`, and the `tensors` and `configs` that "
        "show it; tensors: `name`, `dtype`, `shape`, `bytes`, `shard`",
    ),
    Part(
        "sizes",
        "page",
        "`before_shards`, `after_shards`, and `total`, `by_part` (of the model), `by_tensor` (last word and dtype): "
        "`name`, `before_tensors`, `before_bytes`, `after_tensors`, `after_bytes`",
    ),
    Part(
        "scales, divergence, worst",
        "page",
        "how far the sides of merged scales differ: `projection`, `scales` (how many), `median`, `p90` and `max` of "
        "the ratios, `max_at` (a key), `one_sided` (scales that one side alone has), `never_calibrated`; worst: "
        "`name`, `ratio`, `from`",
    ),
    Part(
        "groups, kept",
        "page",
        "of each `kind`: how many ties were `rewritten`, `canonical`, `kept`, the `dropped_tensors`, and `actions` "
        "(action -> tensors); kept: `canonical`, `aliases`, `reason`",
    ),
    Part("tool", "page, manifest", "`name` and `version` of what wrote it"),
)


def explained(topic: str) -> str | None:
    """The text of a topic, or None where it is none."""
    if topic in FAMILIES:
        return "\n".join(_family_lines(FAMILIES[topic]))
    return TOPICS[topic][1]() if topic in TOPICS else None


def names() -> tuple[str, ...]:
    """All topics, the formats among them."""
    return (*TOPICS, *FAMILIES)


def listed() -> str:
    """A line for each topic; those of the formats stand in one."""
    width = max(map(len, TOPICS))
    lines = {name: f"{name:<{width}}  {title}" for name, (title, _) in TOPICS.items()}
    lines["formats"] += f"; of one: {', '.join(FAMILIES)}"
    return "\n".join(lines.values())


def _exit_codes() -> str:
    return "\n".join(f"{code:>3}  {text}" for code, text in EXIT_CODES.items())


def _json() -> str:
    intro = "Every object has a `schema`. A member may be added under the same number; its meaning never changes."
    objects = [f"{one.name}, by {one.printed_by}:\n  {one.members}" for one in SCHEMAS]
    parts = [f"{one.name}, in {one.stands_in}:\n  {one.members}" for one in PARTS]
    return "\n\n".join([intro, *objects, "What stands inside of them:", *parts]).replace("`", "")


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


def parts_table() -> list[str]:
    """What stands inside of the JSON objects, as a table in Markdown, for cli/JSON_AND_EXIT_CODES.md."""
    rows = [f"| {_in_backquotes(one.name)} | {one.stands_in} | {one.members} |" for one in PARTS]
    return ["| member | in | what it holds |", "|---|---|---|", *rows]


def _in_backquotes(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def exit_codes_table() -> list[str]:
    """The exit codes as a table in Markdown, for cli/JSON_AND_EXIT_CODES.md."""
    return ["| exit code | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
