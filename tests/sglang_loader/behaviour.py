"""What SGLang's real loader does with a variant of a good checkpoint, in a few stable facts.

python -m tests.sglang_loader.behaviour VENV       writes tests/sglang_behaviour.json again
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD = HERE.parent / "sglang_behaviour.json"
VENV_VARIABLE = "TIEREWRITE_SGLANG_VENV"


def python() -> Path | None:
    """The interpreter of the venv that TIEREWRITE_SGLANG_VENV names, if there is one."""
    venv = os.environ.get(VENV_VARIABLE)
    found = Path(venv) / "bin" / "python" if venv else None
    return found if found is not None and found.exists() else None


def load(interpreter: Path, folders: Iterable[Path]) -> dict[str, Any]:
    """What load.py says of `folders`, by their names, which must differ."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [str(interpreter), "-B", str(HERE / "load.py"), "--out", f"{out}/all.json", *map(str, folders)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(Path(f"{out}/all.json").read_text(encoding="utf-8"))
        return found


def facts(out: Mapping[str, Any], good: Mapping[str, Any]) -> dict[str, Any]:
    """How the load `out` of a variant differs from `good`, the load of the checkpoint it was made of.

    `outcome` is "refused" (before any weight is read), "aborts" (at a key), "unfilled" (loads, parameters are
    missing), "changed" (loads, with other numbers or other layers) or "same". `unfilled` has the elements of each
    parameter that no key wrote, those of the good one too.
    """
    if "refused" in out:
        return {"outcome": "refused", "error": out["refused"].split("\n")[0][:120]}
    if "error" in out:
        return {"outcome": "aborts", "key": out["key"], "error": out["error"].split("\n")[0][:120]}
    more = {name: count for name, count in out["unfilled"].items() if good["unfilled"].get(name) != count}
    names = good["digests"].keys() | out["digests"].keys()
    changed = sorted(n for n in names - more.keys() if good["digests"].get(n) != out["digests"].get(n))
    found: dict[str, Any] = {"outcome": "unfilled" if more else "changed" if changed else "same"}
    if out["unfilled"]:
        found["unfilled"] = out["unfilled"]
    if changed:
        found["changed"] = [*changed[:4], *([f"and {len(changed) - 4} more"] if len(changed) > 4 else [])]
    return found | ({"warns": True} if out["warns"] > good["warns"] else {})


def main() -> int:
    from tests.sglang_defects import VARIANTS, make_all

    interpreter = Path(sys.argv[1]) / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        made = make_all(Path(folder))
        found = load(interpreter, made.values())
    rows = {v.name: facts(found[v.name], found[f"{v.base}-unchanged"]) for v in VARIANTS}
    text = json.dumps({"sglang": found["sglang"], "variants": rows}, indent=1, sort_keys=True)
    RECORD.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
