"""Prepare an exported checkpoint for vLLM and hear what it will do with it: python before_vllm.py SRC DST.

SRC is a folder or a hub id. Exits 6 if something is left that vLLM would get wrong without a warning, and otherwise as
the command does: 3 where a tie is refused, 4 where something is wrong in SRC.
"""

import sys

import tierewrite

src, dst = sys.argv[1:]
try:
    report = tierewrite.prepare_for_vllm(src, dst)
except tierewrite.TierewriteError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)

print(f"{report.before_bytes:,} -> {report.after_bytes:,} bytes in {dst}")
if report.readiness is not None and report.readiness.errors:
    print(*report.readiness.errors, sep="\n")
    sys.exit(6)
print(f"vllm serve {dst}")
