"""What `--load-format tierewrite` adds to loading a checkpoint into vLLM: CPU, time and memory, as ratios.

    TIEREWRITE_VLLM_VENV=DIR python -m tests.benchmarks.load_format [--preset 2gb-6000] [--repeats 3] [--work DIR]

vLLM's own loader on the rewritten checkpoint is what it is compared with. The ways alternate, round after round, each
in a process of its own; the figures are medians. The files are in the page cache. Building the model is in all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tierewrite
from tests.benchmarks.generate import PRESETS, generate
from tests.vllm_loader.behaviour import python
from tests.vllm_loader.installed import ROOT, as_installed

FIRST = "vLLM's loader, rewritten"


def jobs(naive: Path, canonical: Path, ties: Path, repeats: int) -> list[dict[str, Any]]:
    """The ways, in rounds. A way's name ends with the number of its round."""
    plugin = {"folder": str(naive), "format": "tierewrite"}
    ways: dict[str, dict[str, Any]] = {
        FIRST: {"folder": str(canonical)},
        "vLLM's loader, naive": {"folder": str(naive)},
        "tierewrite, naive": {**plugin, "extra": {"force": True, "remember": False}},
        "tierewrite, naive, ties given": {**plugin, "extra": {"force": True, "remember": False, "ties": str(ties)}},
        "tierewrite, naive, remembered": {**plugin, "extra": {"force": True}},
    }
    warm = {"name": "warm 0", **ways["tierewrite, naive, remembered"]}
    return [warm, *({"name": f"{name} {n}", **way} for n in range(repeats) for name, way in ways.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="2gb-6000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder with room for twice the checkpoint")
    given = parser.parse_args()
    interpreter = python()
    if interpreter is None:
        sys.exit("TIEREWRITE_VLLM_VENV names no venv of vLLM; tests/vllm_loader/setup.sh DIR makes one")
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        work = Path(name)
        made = generate(work / "naive", given.preset)
        tierewrite.prepare_for_vllm(made.path, work / "canonical", force=True, loader="off")
        todo = jobs(made.path, work / "canonical", made.ties_file, given.repeats)
        (work / "jobs.json").write_text(json.dumps(todo))
        script = ROOT / "tests" / "vllm_loader" / "with_format.py"
        command = [str(interpreter), str(script), str(work / "jobs.json"), str(work / "out.json")]
        subprocess.run(
            command, check=True, env=as_installed(work / "site"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        found = json.loads((work / "out.json").read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, ranks in found.items():
        if "error" in ranks[0]:
            sys.exit(f"{name}: {ranks[0]['error']}\n{ranks[0]['trace']}")
        rows.setdefault(name.rpartition(" ")[0], []).append(ranks[0])
    first = rows[FIRST]
    for name, samples in rows.items():
        same = all(sample["digests"] == first[0]["digests"] for sample in samples)
        texts = [f"{name:32} {'equal' if same else 'other'} parameters, {samples[0]['hashed'] >> 20:5,} MiB hashed"]
        for kind, unit in (("cpu", 1.0), ("wall", 1.0), ("anonymous", 2.0**20), ("peak", 2.0**20)):
            value, base = (statistics.median(sample[kind] for sample in side) for side in (samples, first))
            texts.append(f"{kind} {value / unit:8,.2f} ({value / base:4.2f})")
        print("  ".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
