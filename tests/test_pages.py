"""The report page: what it says, that it is safe to open, and how it looks in a real browser."""

from __future__ import annotations

import base64
import errno
import html.parser
import io
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import Tensor, read_tensors, write_checkpoint, write_shard
from tierewrite import cli, errors
from tierewrite.consumers.findings import Finding, ReadinessReport
from tierewrite.pages import facts as facts_room

Naive = Callable[[str], Path]

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow looks at pictures")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")

NEVER_COLOUR, ONE_SIDE_COLOUR = (0xD1, 0x34, 0x5B), (0x9A, 0xA3, 0xAD)


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A fixture's rewrite, made once."""
    from tests.checkpoints import FIXTURES

    made: dict[str, Path] = {}

    def make(case: str, **options: Any) -> Path:
        key = case + repr(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("rewritten") / case
            tierewrite.rewrite(FIXTURES / case / "naive", made[key], **options)
        return made[key]

    return make


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def group(canonical: str, status: str = "rewritten", reason: str | None = None, **tensors: Any) -> dict[str, Any]:
    return {
        "id": canonical,
        "canonical": canonical,
        "aliases": [f"alias.{canonical}"],
        "status": status,
        "reason": reason,
        "tensors": tensors.get("tensors", {}),
    }


def merged(name: str, ratio: float | None, calibrated: bool = True) -> dict[str, Any]:
    return {
        "from": [name, f"alias.{name}"],
        "action": "merge",
        "merged": True,
        "blake3": "0" * 64,
        "ratio": ratio,
        "calibrated": calibrated,
    }


def manifest(groups: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "schema": "tierewrite/manifest/1",
        "tool": {"name": "tierewrite", "version": "0.1.0"},
        "source": {"shards": [{"name": "model.safetensors", "size": 100}]},
        "options": {"on_mismatch": "error", "kv_scales": "keep", "max_shard_size": None},
        "ties": {"source": "class", "detail": "SomeModel", "map": {}},
        "groups": groups,
        **changes,
    }


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def experts(layers: int, count: int, ratio: Callable[[int, int], float | None], projection: str = "down_proj") -> Any:
    """A manifest with `count` experts in each of `layers` layers."""
    groups = []
    for layer in range(layers):
        stem = f"model.layers.{layer}.experts"
        tensors = {}
        for expert in range(count):
            name = f"{stem}.{expert}.{projection}.input_scale"
            value = ratio(layer, expert)
            tensors[name] = merged(name, value, calibrated=value is not None)
        groups.append(group(f"{stem}.{projection}", tensors=tensors))
    return manifest(groups)


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# ------------------------------------------------------------------------------------------------------- facts


def test_sizes_are_those_of_the_source_and_of_the_output(naive: Naive, tmp_path: Path) -> None:
    report = tierewrite.rewrite(naive("dg_nvfp4_sharded"), tmp_path / "out")
    sizes = tierewrite.report_page(tmp_path / "out").facts.sizes
    assert sizes is not None
    total = sizes.total
    assert (total.before_bytes, total.before_tensors) == (report.before_bytes, report.before_tensors)
    assert (total.after_bytes, total.after_tensors) == (report.after_bytes, report.after_tensors)
    for table in (sizes.by_part, sizes.by_tensor):
        assert sum(row.before_bytes for row in table) == report.before_bytes
        assert sum(row.after_bytes for row in table) == report.after_bytes


@pytest.mark.parametrize("case", ["dg_nvfp4", "dg_fp8", "llmcompressor_nvfp4_dg", "dg_bf16", "mixtral_tied_bf16"])
def test_bytes_per_kind_of_tensor_are_those_in_the_files(
    rewritten: Callable[..., Path], naive: Naive, case: str
) -> None:
    sizes = tierewrite.report_page(rewritten(case)).facts.sizes
    assert sizes is not None
    rows = {row.name: row for row in sizes.by_tensor}
    for folder, field in ((naive(case), "before_bytes"), (rewritten(case), "after_bytes")):
        found: dict[str, int] = {}
        for name, (dtype, _, data) in read_tensors(folder).items():
            key = f"{name.rpartition('.')[2]}, {dtype}"
            found[key] = found.get(key, 0) + len(data)
        assert {name: getattr(row, field) for name, row in rows.items()} == found


def test_median_p90_and_maximum_are_those_of_the_scales_on_disk(rewritten: Callable[..., Path], naive: Naive) -> None:
    source = read_tensors(naive("dg_nvfp4_sharded"))
    value = {
        name: memoryview(data).cast("f")[0] for name, (_, _, data) in source.items() if name.endswith("input_scale")
    }
    ratios = []
    for name in value:
        if ".decoder." in name and "down_proj" in name and "experts" in name:
            twin = value[name.replace("model.decoder", "model.encoder.language_model")]
            ratios.append(max(value[name], twin) / min(value[name], twin))
    found = {d.projection: d for d in tierewrite.report_page(rewritten("dg_nvfp4_sharded")).facts.divergence}
    row = found["experts.down_proj"]
    assert len(row.scales) == len(ratios) == 32
    assert row.median == pytest.approx(statistics.median(ratios))
    assert row.max == pytest.approx(max(ratios))
    assert row.p90 == pytest.approx(statistics.quantiles(ratios, n=10, method="inclusive")[8])


def test_unpacked_experts_are_grouped_by_projection_layer_and_expert(rewritten: Callable[..., Path]) -> None:
    facts = tierewrite.report_page(rewritten("dg_nvfp4_sharded")).facts
    assert {"experts.gate_proj", "experts.up_proj", "experts.down_proj", "self_attn.q_proj"} <= {
        d.projection for d in facts.divergence
    }
    scale = next(s for s in facts.scales if s.name == "model.decoder.layers.2.experts.5.up_proj.input_scale")
    assert (scale.projection, scale.layer, scale.expert) == ("experts.up_proj", 2, 5)


@pytest.mark.parametrize(
    ("module", "where"),
    [
        ("model.layers.12.mlp.experts.127.down_proj", (12, 127)),
        ("model.layers.3.block_sparse_moe.experts.7.w1", (3, 7)),
        ("encoder.block.4.layer.1.DenseReluDense.wi", (4, None)),
        ("lm_head", (None, None)),
        ("model.layers.99999999999999999999.q_proj", (None, None)),
    ],
)
def test_position_is_the_first_number_and_the_one_after_experts(
    module: str, where: tuple[int | None, int | None]
) -> None:
    assert facts_room.position(module) == where


def test_one_sided_and_never_calibrated_scales_are_counted_separately(rewritten: Callable[..., Path]) -> None:
    page = tierewrite.report_page(rewritten("dg_nvfp4_decoder_uncalibrated"))
    assert page.facts.overall.one_sided == len(page.facts.scales) > 0
    text = Elements(page.html()).text
    assert "no scale has two sides" in text
    assert "– at most" not in text
    assert "Option excludenone" in text
    path = Path(rewritten("dg_nvfp4_decoder_uncalibrated")).parent / "m.json"
    values = {(0, 0): 2.0, (0, 1): 4.0}
    page = tierewrite.report_page(write(path, experts(1, 3, lambda layer, e: values.get((layer, e)))))
    row = page.to_json()["divergence"][0]
    assert (row["scales"], row["never_calibrated"], row["one_sided"]) == (3, 1, 0)
    assert (row["median"], row["max"]) == (3.0, 4.0)
    assert row["max_at"] == "model.layers.0.experts.1.down_proj.input_scale"


def test_the_worst_scales_come_by_name_furthest_first(tmp_path: Path) -> None:
    page = tierewrite.report_page(write(tmp_path / "m.json", experts(2, 12, lambda la, e: 1 + la + e / 10)), worst=3)
    assert [(w["ratio"], w["name"].split(".")[2:5]) for w in page.to_json()["worst"]] == [
        (pytest.approx(3.1), ["1", "experts", "11"]),
        (pytest.approx(3.0), ["1", "experts", "10"]),
        (pytest.approx(2.9), ["1", "experts", "9"]),
    ]
    listed = page.html()
    assert "The 3 scales that differ most" in listed
    assert "model.layers.1.experts.9.down_proj.input_scale" in listed
    assert "model.layers.1.experts.8.down_proj.input_scale" not in listed


def test_kept_groups_are_listed_with_their_reasons(rewritten: Callable[..., Path]) -> None:
    out = rewritten("qwen3_tied_but_diverged_bf16", on_mismatch="keep")
    page = tierewrite.report_page(out)
    (kept,) = page.facts.kept
    assert kept.canonical == "model.embed_tokens.weight"
    assert page.facts.count("kept") == 1
    text = Elements(page.html()).text
    assert "Kept on every side (1)" in text
    assert "lm_head.weight" in text
    assert kept.reason
    assert kept.reason in text


def test_a_rewrite_without_merged_scales_says_so(rewritten: Callable[..., Path]) -> None:
    page = tierewrite.report_page(rewritten("dg_bf16"))
    assert page.facts.scales == ()
    text = page.html()
    assert "No activation scales were merged" in text
    assert text.count("<svg") == 1  # the sizes
    assert page.to_json()["scales"]["median"] is None
    assert page.png().startswith(b"\x89PNG")


def test_a_manifest_alone_gives_everything_but_the_sizes(rewritten: Callable[..., Path], tmp_path: Path) -> None:
    out = rewritten("dg_nvfp4_sharded")
    alone = Path(shutil.copy(out / "tierewrite.json", tmp_path))
    with_folder, without = tierewrite.report_page(out).to_json(), tierewrite.report_page(alone).to_json()
    assert without["sizes"] is None
    assert without["divergence"] == with_folder["divergence"] != []
    assert without["groups"] == with_folder["groups"] != []
    assert "give the folder instead" in tierewrite.report_page(alone).html()


def test_findings_of_a_check_are_on_the_page(rewritten: Callable[..., Path]) -> None:
    out = rewritten("dg_nvfp4_sharded")
    report = tierewrite.check(out, "vllm")
    page = tierewrite.report_page(out, "vllm")
    assert page.facts.readiness is not None
    assert page.facts.readiness.ids() == report.ids()
    text = Elements(page.html()).text
    assert "Ready for vllm?" in text
    for finding in report.findings:
        assert finding.id in text
    if not report.findings:
        assert "Nothing found that vllm" in text
    assert "Ready for" not in tierewrite.report_page(out).html()


# ---------------------------------------------------------------------------------------------- safe to open


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "a\"onmouseover='alert(1)'",
    "</svg></text><script src=//evil.example/x.js>",
    "&lt;b&gt;\u202etxt.exe\x1b[31m",
    "$\\frac{1}{0}$",
    "]]><!--",
    "\ud800\ufffe漢字",
]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    groups = []
    for i, name in enumerate(HOSTILE):
        scale = f"m.{i}.{name}.input_scale"
        groups.append(group(f"m.{i}.{name}.weight", tensors={scale: merged(scale, 2.0 + i)}))
        groups.append(group(f"kept.{name}", "kept", name))
    data = manifest(groups, tool={"name": "tierewrite", "version": HOSTILE[0]})
    data["ties"] = {"source": "class", "detail": HOSTILE[2], "map": {}}
    folder = tmp_path / "<script>alert(2)<"
    folder.mkdir()
    page = tierewrite.report_page(write(folder / "tierewrite.json", data))
    findings = tuple(Finding(n, "error", (n, n), n, n, n, None, n) for n in HOSTILE)  # type: ignore[arg-type]
    ready = ReadinessReport(HOSTILE[0], HOSTILE[1], "x", 1, 1, findings, tuple(HOSTILE))
    object.__setattr__(page.facts, "consumers", (ready,))
    # A manifest with such options or such a source of ties is refused when it is read.
    object.__setattr__(page.facts, "options", {name: name for name in HOSTILE})
    object.__setattr__(page.facts, "ties_source", HOSTILE[1])
    found = Elements(page.html())
    assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe", "link", "object"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in found.text
    assert "$\\frac{1}{0}$" in found.text
    assert "\u202e" not in found.text
    assert "\x1b" not in found.text
    assert page.png().startswith(b"\x89PNG")
    page.html().encode()


@pytest.mark.parametrize("case", ["dg_nvfp4_sharded", "dg_bf16", "llmcompressor_nvfp4_dg"])
def test_the_page_asks_for_nothing_outside_itself(rewritten: Callable[..., Path], case: str) -> None:
    text = tierewrite.report_page(rewritten(case), "vllm").html()
    found = Elements(text)
    policy = [a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)|@import|https?://|file:", text)


def test_the_same_input_makes_the_same_bytes(rewritten: Callable[..., Path], tmp_path: Path) -> None:
    out = rewritten("dg_nvfp4_sharded")
    page = tierewrite.report_page(out)
    page.write_html(tmp_path / "1.html")
    page.write_png(tmp_path / "1.png")
    script = (
        "import sys, tierewrite; p = tierewrite.report_page(sys.argv[1]);"
        "p.write_html(sys.argv[2] + '/2.html'); p.write_png(sys.argv[2] + '/2.png')"
    )
    # Another process, hash seed, time zone and somebody's own matplotlibrc.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: red\nsvg.fonttype: path\n")
    env = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run([sys.executable, "-c", script, str(out), str(tmp_path)], env=env, check=True)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_ids_on_the_page_are_unique_and_all_are_used(rewritten: Callable[..., Path]) -> None:
    text = tierewrite.report_page(rewritten("dg_nvfp4_sharded")).html()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 0
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used == set(ids)


# --------------------------------------------------------------------------------------------------- large


def pictures(text: str) -> list[Any]:
    """The bitmaps of the heatmaps."""
    return [
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
        for data in re.findall(r'href="data:image/png;base64,\s*([^"]+)"', text)
    ]


def test_a_heatmap_has_one_cell_a_layer_and_expert_in_the_colour_of_its_ratio(tmp_path: Path) -> None:
    def ratio(layer: int, expert: int) -> float | None:
        return None if (layer, expert) == (2, 5) else 16.0 if (layer, expert) == (1, 3) else 1.0

    data = experts(4, 8, ratio)
    one_sided = data["groups"][3]["tensors"]["model.layers.3.experts.0.down_proj.input_scale"]
    one_sided["ratio"] = None
    (image,) = pictures(tierewrite.report_page(write(tmp_path / "m.json", data)).html())
    assert image.size == (8, 4)
    assert image.getpixel((5, 2)) == (*NEVER_COLOUR, 255)
    assert image.getpixel((0, 3)) == (*ONE_SIDE_COLOUR, 255)
    lowest, highest = image.getpixel((0, 0)), image.getpixel((3, 1))
    assert sum(lowest[:3]) < sum(highest[:3])
    others = {image.getpixel((x, y)) for x in range(8) for y in range(4)}
    assert others == {lowest, highest, (*NEVER_COLOUR, 255), (*ONE_SIDE_COLOUR, 255)}


def test_eleven_thousand_scales_of_forty_six_thousand_tensors_make_a_small_page(tmp_path: Path) -> None:
    groups: list[dict[str, Any]] = []
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for layer in range(30):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            stem = f"model.decoder.layers.{layer}.experts"
            written: dict[str, Any] = {}
            for expert in range(128):
                module = f"{stem}.{expert}.{projection}"
                for suffix, dtype in (("weight", "U8"), ("weight_scale", "F8_E4M3"), ("weight_scale_2", "F32")):
                    name = f"{module}.{suffix}"
                    tensors[name] = (dtype, [1], b"1234" if dtype == "F32" else b"1")
                    written[name] = {**merged(name, 1.0), "action": "keep", "merged": False}
                name = f"{module}.input_scale"
                tensors[name] = ("F32", [], b"1234")
                written[name] = merged(name, 1 + (layer * 7 + expert * 13) % 97 / 8)
            groups.append(group(f"{stem}.{projection}", tensors=written))
    write_shard(tmp_path / "model.safetensors", tensors)
    write(tmp_path / "tierewrite.json", manifest(groups))
    page = tierewrite.report_page(tmp_path)
    text = page.html()
    assert len(page.facts.scales) == 11_520
    assert page.facts.sizes is not None
    assert page.facts.sizes.total.after_tensors == 46_080
    assert page.facts.sizes.total.before_tensors == 92_160
    assert len(text) < 400_000
    assert [image.size for image in pictures(text)] == [(128, 30)] * 3
    assert "11,520" in text
    assert "92,160" in text


def test_as_many_kinds_as_tensors_still_make_a_readable_page(tmp_path: Path) -> None:
    groups = []
    for i in range(2000):
        word = "".join(chr(97 + int(c)) for c in str(i)) * 20
        scale = f"{word}.{word}.input_scale"
        status = "kept" if i % 2 else "rewritten"
        groups.append(group(f"{word}.weight", status, "why" if i % 2 else None, tensors={scale: merged(scale, 3)}))
    page = tierewrite.report_page(write(tmp_path / "m.json", manifest(groups)))
    text = page.html()
    assert len(text) < 400_000
    assert "and 900 more groups" in text
    assert "more projections" in text
    width, height = Image.open(io.BytesIO(page.png())).size
    assert height < 5 * width


# --------------------------------------------------------------------------------------------- in a browser


def chromium(*arguments: str, profile: Path) -> bytes:
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --force-color-profile=srgb"
    )
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def screenshot(page: Path, tmp_path: Path, *arguments: str, height: int = 3400) -> Any:
    shot = tmp_path / "shot.png"
    chromium(
        f"--screenshot={shot}", f"--window-size=1200,{height}", *arguments, page.as_uri(), profile=tmp_path / "profile"
    )
    return Image.open(shot).convert("RGB")


def colours(image: Any) -> dict[tuple[int, int, int], int]:
    return {colour: count for count, colour in image.getcolors(1 << 24)}


@pytest.fixture(scope="module")
def looked_at(rewritten: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    tierewrite.report_page(rewritten("dg_nvfp4_sharded"), "vllm").write_html(path)
    return path


@browser
def test_a_browser_shows_the_figures_as_text(looked_at: Path, tmp_path: Path, rewritten: Callable[..., Path]) -> None:
    text = Elements(chromium("--dump-dom", looked_at.as_uri(), profile=tmp_path / "p").decode()).text
    facts = tierewrite.report_page(rewritten("dg_nvfp4_sharded")).facts
    assert facts.sizes is not None
    assert f"{facts.sizes.total.after_bytes / 1024:.2f} KiB" in text
    assert f"{facts.sizes.total.before_tensors:,}" in text
    assert f"{facts.overall.median:.2f}×" in text
    assert f"{facts.overall.max:.2f}×" in text
    assert text.count("experts.down_proj") >= 4  # sizes, table, histogram, heatmap
    assert facts.worst(1)[0].name in text


@browser
def test_a_browser_draws_bars_histograms_and_heatmaps(
    looked_at: Path, tmp_path: Path, rewritten: Callable[..., Path]
) -> None:
    from matplotlib import colormaps

    image = screenshot(looked_at, tmp_path)
    found = colours(image)
    before, after, panel, paper = (0xA9, 0xB4, 0xC4), (0x0F, 0x8B, 0x8D), (255, 255, 255), (0xF6, 0xF7, 0xF9)
    assert found[paper] > 100_000
    assert found[panel] > 1_000_000
    assert found[before] > 10_000
    assert found[after] > 5_000
    # Bars of the sizes: the longest one of each colour is as long as the bytes say.
    widths = {
        colour: max(sum(image.getpixel((x, y)) == colour for x in range(300, 1100)) for y in range(330, 700, 3))
        for colour in (before, after)
    }
    sizes = tierewrite.report_page(rewritten("dg_nvfp4_sharded")).facts.sizes
    assert sizes is not None
    longest = max(r.before_bytes for r in sizes.by_part), max(r.after_bytes for r in sizes.by_part)
    assert widths[before] > 300
    assert widths[before] / widths[after] == pytest.approx(longest[0] / longest[1], rel=0.02)
    # Heatmap cells: the colours that the ratios have, in large areas.
    map_colours = {tuple(colormaps["viridis"](i, bytes=True)[:3]) for i in range(256)}
    cells = {colour: count for colour, count in found.items() if colour in map_colours and count > 2_000}
    assert len(cells) >= 5
    assert sum(cells.values()) > 100_000
    # Text: dark pixels in the band of the headline, and nowhere above it.
    ink = (0x17, 0x20, 0x2E)
    headline = colours(image.crop((60, 60, 1140, 110)))
    assert headline[ink] > 200
    assert ink not in colours(image.crop((0, 0, 1200, 35)))


@browser
def test_the_page_is_dark_for_those_who_want_it_dark(looked_at: Path, tmp_path: Path) -> None:
    image = screenshot(looked_at, tmp_path, "--blink-settings=preferredColorScheme=0", height=1400)
    found = colours(image)
    paper, panel, after, ink = (0x10, 0x15, 0x1D), (0x18, 0x20, 0x2B), (0x2F, 0xB8, 0xB3), (0xE7, 0xEC, 0xF3)
    assert found[paper] > 100_000
    assert found[panel] > 500_000
    assert found[after] > 5_000  # the pictures follow, not the text alone
    assert found[ink] > 1_000
    assert found.get((255, 255, 255), 0) < 500


@browser
def test_a_hostile_name_runs_nothing_in_a_browser(tmp_path: Path) -> None:
    scale = "<img src=x onerror=\"document.title='owned'\">.input_scale"
    page = tmp_path / "r.html"
    data = manifest([group("m.weight", tensors={scale: merged(scale, 2.0)})])
    tierewrite.report_page(write(tmp_path / "m.json", data)).write_html(page)
    dom = chromium("--dump-dom", page.as_uri(), profile=tmp_path / "p").decode()
    found = Elements(dom)
    assert "img" not in {tag for tag, _ in found.tags}
    assert "<title>owned" not in dom
    assert scale in found.text


def test_the_png_has_bars_heatmap_and_text(rewritten: Callable[..., Path]) -> None:
    image = Image.open(io.BytesIO(tierewrite.report_page(rewritten("dg_nvfp4_sharded")).png())).convert("RGB")
    found = colours(image)
    assert found[(0xA9, 0xB4, 0xC4)] > 10_000
    assert found[(0x0F, 0x8B, 0x8D)] > 10_000
    assert found[(0x17, 0x20, 0x2E)] > 2_000
    assert found[(68, 1, 84)] > 5_000  # viridis at 1x
    assert found[(253, 231, 36)] > 1_000  # and at the largest ratio
    assert "Software" not in image.info


# ------------------------------------------------------------------------------------------ the command line


def test_report_writes_what_was_asked_for_and_prints_json(
    rewritten: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = rewritten("dg_nvfp4_sharded")
    code = run("report", out, "--html", tmp_path / "r.html", "--png", tmp_path / "r.png", "--for", "vllm", "--json")
    data = json.loads(capsys.readouterr().out)
    assert code == 0
    assert data["schema"] == "tierewrite/page/1"
    assert data["readiness"]["consumer"] == "vllm"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.png"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_is_no_wrong_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tierewrite.report_page(write(tmp_path / "m.json", experts(1, 1, lambda layer, e: 2.0)))

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(errors.SystemFailure, match="No space left on device; free some space, or choose another disk"):
        page.write_html(tmp_path / "r.html")


def test_report_prints_the_table_without_a_file_to_write(
    rewritten: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report", rewritten("dg_nvfp4_sharded"), "--worst", "2") == 0
    out = capsys.readouterr().out
    assert "experts.down_proj" in out
    assert out.count(".input_scale") == 2
    assert out.isascii()


def test_report_leaves_the_checkpoint_as_it_was(
    rewritten: Callable[..., Path], naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = rewritten("dg_nvfp4_sharded")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert run("report", out, "--html", out / "report.html") == errors.EXIT_USAGE
    assert "lies inside" in capsys.readouterr().err
    for page in ("tierewrite.json", "report.html"):
        assert run("report", out / "tierewrite.json", "--html", out / page) == errors.EXIT_USAGE
        assert "lies inside" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], errors.EXIT_USAGE, "does not exist"),
        (["empty"], errors.EXIT_USAGE, "holds no tierewrite.json"),
        (["text.json"], errors.EXIT_SOURCE, "no valid JSON"),
        (["deep.json"], errors.EXIT_SOURCE, "nested too deeply"),
        (["array.json"], errors.EXIT_SOURCE, "no object with a schema"),
        (["other.json"], errors.EXIT_SOURCE, "its schema is other/1"),
        (["groups.json"], errors.EXIT_SOURCE, "Expected `str`, got `int` - at `$.groups[0].canonical`"),
        (["nan.json"], errors.EXIT_SOURCE, "is not described as it should be"),
        (["less.json"], errors.EXIT_SOURCE, "is not described as it should be"),
        (["good.json", "--for", "vllm"], errors.EXIT_USAGE, "needs the folder"),
        (["good.json", "--html", "empty"], errors.EXIT_USAGE, "is a folder"),
        (["good.json", "--html", "./empty/../good.json"], errors.EXIT_USAGE, "is the manifest that the page is about"),
        (["good.json", "--html", "r.html", "--png", "./empty/../r.html"], errors.EXIT_USAGE, "name the same file"),
        (["good.json", "--html", "no/where/r.html"], errors.EXIT_SYSTEM, "cannot be written"),
        (["stranger"], errors.EXIT_SOURCE, "belongs to another checkpoint"),
    ],
)
def test_what_cannot_be_reported_on_says_why(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    write(tmp_path / "array.json", [])
    write(tmp_path / "other.json", {"schema": "other/1"})
    write(tmp_path / "groups.json", manifest([{"canonical": 3}]))
    write(tmp_path / "nan.json", experts(1, 1, lambda layer, e: float("nan")))
    write(tmp_path / "less.json", experts(1, 1, lambda layer, e: 0.5))
    good = write(tmp_path / "good.json", experts(1, 1, lambda layer, e: 2.0))
    (tmp_path / "stranger").mkdir()
    shutil.copy(good, tmp_path / "stranger" / "tierewrite.json")
    write_shard(tmp_path / "stranger" / "model.safetensors", {"a": ("U8", [1], b"1")})
    assert run("report", *arguments) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))
    assert not list(tmp_path.glob(".*"))


def test_without_matplotlib_pictures_name_the_extra_and_the_facts_still_come(
    rewritten: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = rewritten("dg_nvfp4_sharded")
    assert run("report", out, "--html", tmp_path / "r.html") == errors.EXIT_USAGE
    assert "pip install 'tierewrite[report]'" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    assert run("report", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["divergence"]


def test_sides_of_infinite_ratio_are_drawn_at_the_end_of_the_axis(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(experts(1, 3, lambda layer, e: [1.5, 2e300, float("inf")][e])))
    page = tierewrite.report_page(path)
    assert "∞×" in page.html()
    assert page.png().startswith(b"\x89PNG")


def test_a_broken_manifest_is_a_page_or_a_documented_error(tmp_path: Path) -> None:
    """Values of other kinds anywhere in it, members that are gone or new, other bytes."""
    tensors = {f"layers.0.{side}.weight": ("BF16", [1], b"ab") for side in "abc"}
    tensors["layers.0.c.weight"] = ("BF16", [1], b"cd")
    ties = {f"layers.0.{side}.weight": "layers.0.a.weight" for side in "bc"}
    src = write_checkpoint(tmp_path / "src", tensors, config={"_tied_weights_keys": ties})
    tierewrite.rewrite(src, tmp_path / "dst", on_mismatch="keep")
    path = tmp_path / "dst" / "tierewrite.json"
    text = path.read_text()
    assert "differing_aliases" in text
    odd: list[Any] = [None, True, 0, -1, 1e999, "", "\x1b[2J\ud800", [], {}, [[]], {"": {}}, 10**400, float("nan")]
    rng = random.Random(0)
    outcomes = Counter[str]()
    for _ in range(200):
        manifest = json.loads(text)
        parent, key = manifest, rng.choice(list(manifest))
        while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        if rng.random() < 0.7:
            parent[key] = rng.choice(odd)
        else:
            del parent[key]
        broken = bytearray(json.dumps(manifest).encode())
        if rng.random() < 0.2:
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            page = tierewrite.report_page(tmp_path / "dst")
            json.dumps(page.to_json(), allow_nan=False)
            assert "\x1b" not in page.html()
            outcomes["page"] += 1
        except errors.SourceError:
            outcomes["error"] += 1
    assert min(outcomes["page"], outcomes["error"]) > 10, outcomes


@pytest.mark.parametrize("member", ["ratio", "calibrated"])
def test_a_merged_scale_that_does_not_say_how_it_was_merged_is_refused(
    member: str, rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = json.loads((rewritten("dg_nvfp4") / "tierewrite.json").read_text())
    scales = [one for group in manifest["groups"] for one in group["tensors"].values() if one["merged"]]
    del scales[0][member]
    path = tmp_path / "tierewrite.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(errors.SourceError, match="not described as it should be"):
        tierewrite.report_page(path)


def test_an_error_about_a_manifest_alone_names_it(tmp_path: Path) -> None:
    path = tmp_path / "tierewrite.json"
    path.write_text("{")
    with pytest.raises(errors.SourceError) as error:
        tierewrite.report_page(path)
    assert error.value.file == str(path)


def test_a_model_card_says_what_was_done_and_found(
    rewritten: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rewritten("dg_nvfp4")
    assert run("report", folder, "--card", "--for", "vllm") == 0
    card = capsys.readouterr().out
    assert card == tierewrite.report_page(folder, "vllm").card()
    assert card.startswith("## Tied weights\n\nEvery tied weight is stored once, under its canonical name: 346 to 198 ")
    assert "The ties are those that `DiffusionGemmaForBlockDiffusion` declares" in card
    assert "37 activation scales merged: the sides differed by 1.08× (median), at most 2.15×." in card
    assert "Checked for vllm 0.33.0: 1 error, 2 warnings." in card


@pytest.mark.parametrize("differing", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_card_and_a_page_do_not_say_of_what_was_kept_that_it_is_confirmed(differing: str, tmp_path: Path) -> None:
    """One alias of two differs and is kept, or, with the canonical tensor, the whole tie is."""
    names = ("model.embed_tokens.weight", "lm_head.weight", "other.weight")
    tensors = {name: Tensor("F32", [1], b"abcd" if name == differing else b"efgh") for name in names}
    write_checkpoint(tmp_path / "src", tensors, config={})
    ties = dict.fromkeys(names[1:], names[0])
    tierewrite.rewrite(tmp_path / "src", tmp_path / "dst", ties=ties, on_mismatch="keep")
    page = tierewrite.report_page(tmp_path / "dst")
    kept = "`lm_head.weight`" if differing == names[1] else "`lm_head.weight`, `other.weight`"
    assert f"Not confirmed, and kept beside their canonical names: {kept}." in page.card()
    assert "Every tied weight whose bytes agree is stored once" in page.card()
    assert "each confirmed" not in page.card()
    assert "all confirmed" not in Elements(page.html()).text
    assert "all confirmed" not in str(page)


def test_a_strangers_name_is_no_markdown_on_a_card(tmp_path: Path) -> None:
    page = tierewrite.report_page(write(tmp_path / "tierewrite.json", manifest([])))
    object.__setattr__(page.facts, "ties_detail", "`](http://evil)<script>")
    assert "`'](http://evil)<script>`" in page.card()
