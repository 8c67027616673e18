#!/bin/bash
# Builds a venv in which vLLM's own model classes and weight loaders run on a CPU (about 8 minutes).
#   setup.sh VENV_DIR
# A venv that was built from the same requirements is left as it is. vLLM goes in without its
# dependencies (CUDA kernels, 8 GiB); requirements.txt pins what load.py's imports reach.
# PYTHON_FOR_VLLM names another interpreter than python3.11.
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
PYTHONPATH=$here "$venv/bin/python" -c 'import shim, vllm.model_executor.models.diffusion_gemma, vllm
print("ok: vllm", vllm.__version__, "torch", shim.torch.__version__)'
# Last, so that a build that was cut short is built again.
printf '%s\n' "$stamp" >"$venv/.stamp"
