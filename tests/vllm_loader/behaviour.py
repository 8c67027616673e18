"""What vLLM's real loader does with a variant of a good checkpoint, in a few stable facts.

    python -m tests.vllm_loader.behaviour VENV       writes tests/vllm_behaviour.json again

The facts say how a variant's load differs from that of the good checkpoint it was made of; uninitialised memory,
paths and the order of sets do not show in them.
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
RECORD = HERE.parent / "vllm_behaviour.json"
VENV_VARIABLE = "TIEREWRITE_VLLM_VENV"


def python() -> Path | None:
    """The interpreter of the venv that TIEREWRITE_VLLM_VENV names, if there is one."""
    venv = os.environ.get(VENV_VARIABLE)
    found = Path(venv) / "bin" / "python" if venv else None
    return found if found is not None and found.exists() else None


def load(interpreter: Path, folders: Iterable[Path], *options: str) -> dict[str, dict[str, Any]]:
    """Feed `folders` to load.py; its output by the folders' names, which must differ."""
    with tempfile.TemporaryDirectory() as out:
        paths = [str(folder) for folder in folders]
        target = out if len(paths) > 1 else f"{out}/{Path(paths[0]).name}.json"
        done = subprocess.run(
            [str(interpreter), str(HERE / "load.py"), *paths, "--out", target, *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path(out).glob("*.json")}
        missing = {Path(p).name for p in paths} - found.keys()
        assert not missing, f"the loader failed on {sorted(missing)}:\n{done.stderr[-4000:]}"
        return found


def facts(out: Mapping[str, Any], good: Mapping[str, Any]) -> dict[str, Any]:
    """How the load `out` of a variant differs from `good`, the load of the checkpoint it was made of.

    `outcome` is "refused" (before any weight is read), "aborts" (at a key), "unfilled" (loads, parameters are
    missing), "fails" (after loading), "changed" (loads, with other numbers or other layers) or "same".
    """
    if "refused" in out:
        return {"outcome": "refused", "error": _short(out["refused"])}
    if out["unexpected"] or "load_failed" in out:
        first = out["unexpected"][0] if out["unexpected"] else {"key": "None", "error": out["load_failed"]}
        found = {"outcome": "aborts", "keys": len(out["unexpected"]), "error": _short(first["error"])}
        return found | ({"key": first["key"]} if first["key"] != "None" else {})
    partial = [p["param"] for p in out["partial_params"]]
    unfilled = [*out["unloaded_params"], *partial]
    changed = sorted(
        n for n in good["digests"].keys() | out["digests"].keys()
        if n not in unfilled and good["digests"].get(n) != out["digests"].get(n)
    )  # fmt: skip
    failed = out.get("process_failed", "")
    details = {
        "unfilled": unfilled,
        "changed": changed,
        "ignored": sorted(set(out["ignored"]) - set(good["ignored"])),
        "casts": {k: v for k, v in out["dtype_casts"].items() if good["dtype_casts"].get(k) != v},
        "conflicts": out["conflicts"]["different"] - good["conflicts"]["different"],
        "fails": _short(failed),
        "sampler": out["sampler_settings"] or "",
        "kv_cache": out["kv_cache_dtype"] if out["kv_cache_dtype"] != good["kv_cache_dtype"] else "",
        "warns": _warnings(out) > _warnings(good),
    }
    for key in ("unfilled", "changed", "ignored"):
        if len(details[key]) > 4:
            details[key] = [*details[key][:4], f"and {len(details[key]) - 4} more"]
    same = not details["kv_cache"] and not details["sampler"]
    outcome = "unfilled" if unfilled else "fails" if failed else "changed" if changed else "same" if same else "changed"
    return {"outcome": outcome} | {k: v for k, v in details.items() if v}


def _warnings(out: Mapping[str, Any]) -> int:
    return sum(len(out.get(k, ())) for k in ("warnings", "warnings_at_build", "warnings_of_processing"))


def _short(error: str) -> str:
    """The first sentence of an error, without paths and sets."""
    text = error.split("Value error, ")[-1].split(" The available")[0].split(": {")[0].split("\n")[0]
    return text.split(" [type=")[0][:160].strip()


def main() -> int:
    from tests.defects import CONTROLS, DEFECTS, make_all

    interpreter = Path(sys.argv[1]) / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        goods, variants = make_all(Path(folder), [*DEFECTS, *CONTROLS])
        found = load(interpreter, [*goods.values(), *variants.values()], "--process")
        version = next(iter(found.values()))["vllm"]
        rows = {v.name: facts(found[v.name], found[goods[v.base].name]) for v in (*DEFECTS, *CONTROLS)}
    text = json.dumps({"vllm": version, "variants": rows}, indent=1, sort_keys=True)
    RECORD.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
