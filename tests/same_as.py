"""Are outputs still what another version of the code writes, byte for byte?

    python -m tests.same_as OTHER_CHECKOUT [--fixtures DIR] [--only WORD]

Runs the command line of this checkout and of OTHER_CHECKOUT (another clone, at another commit) over every fixture with
every set of options below, and compares: exit code, the plan as JSON, and the bytes of every file of the output (the
manifest as JSON, without the tool's version). Prints each difference; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
MANIFEST = "tierewrite.json"

SINCE_ADDED = ("exclude", "keep_names_for", "fix_config", "strip_prefix")
"""Options that an older version's manifest lacks; none of the sets below gives them."""

OPTIONS: dict[str, list[str]] = {
    "default": [],
    "keep": ["--on-mismatch", "keep"],
    "all": [
        "--on-mismatch", "repack", "--kv-scales", "merge", "--unify-fused-scales", "--fix-ignore",
        "--fill-missing-scales", "--max-shard-size", "100KB",
    ],
    "vllm": ["--for", "vllm", "--force", "--on-mismatch", "keep"],
}  # fmt: skip


def one_side(fixtures: Path, only: str) -> dict[str, Any]:
    """What this process's tierewrite makes of the fixtures: "fixture options" -> what came out."""
    from blake3 import blake3

    from tierewrite import cli

    found: dict[str, Any] = {}
    for naive in sorted(fixtures.glob("*/naive")):
        for name, options in OPTIONS.items():
            case = f"{naive.parent.name} {name}"
            if only not in case:
                continue
            work = Path(tempfile.mkdtemp(prefix="same-as-"))
            dst = work / "canonical"
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                code = cli.run(["rewrite", str(naive), str(dst), "--quiet", *options])
            result: dict[str, Any] = {"exit": code}
            for path in sorted(p for p in dst.rglob("*") if p.is_file()):
                data = path.read_bytes()
                if path.name == MANIFEST:
                    manifest = json.loads(data)
                    del manifest["tool"]
                    manifest.pop("output", None)  # an older version's lacks it, and the headers' digests
                    for shard in manifest["source"]["shards"]:
                        shard.pop("header", None)
                    for option in SINCE_ADDED:
                        manifest["options"].pop(option, None)
                    result[path.name] = manifest
                else:
                    result[str(path.relative_to(dst))] = blake3(data).hexdigest()
            shutil.rmtree(work)
            found[case] = result
        case = f"{naive.parent.name} plan"
        if only in case:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                code = cli.run(["plan", str(naive), "--json"])
            plan = json.loads(said.getvalue() or "null")
            for option in SINCE_ADDED:
                (plan or {}).get("options", {}).pop(option, None)
            found[case] = {"exit": code, "plan": plan}
    return found


def differences(here: Any, there: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, a line each."""
    if isinstance(here, dict) and isinstance(there, dict):
        lines = []
        for key in sorted(here.keys() | there.keys()):
            if key not in here or key not in there:
                lines.append(f"{at}/{key}: only {'there' if key not in here else 'here'}")
            else:
                lines += differences(here[key], there[key], f"{at}/{key}")
        return lines
    return [] if here == there else [f"{at}: here {shortened(here)}, there {shortened(there)}"]


def shortened(value: Any) -> str:
    return re.sub(r"(.{200}).+", r"\1...", json.dumps(value))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--fixtures", type=Path, default=HERE / "fixtures")
    parser.add_argument("--only", default="", help="cases whose name has this word")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        json.dump(one_side(given.fixtures, given.only), sys.stdout)
        return 0
    sides = []
    for checkout in (HERE, given.other.resolve()):
        asked = [sys.executable, __file__, str(checkout), "--side", "--fixtures", str(given.fixtures.resolve())]
        child = subprocess.run(
            [*asked, "--only", given.only],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            check=True,
        )
        sides.append(json.loads(child.stdout))
    lines = differences(*sides)
    print("\n".join([*lines, f"{len(sides[0])} cases, {len(lines)} differences"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
