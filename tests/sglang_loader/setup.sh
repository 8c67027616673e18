#!/bin/bash
# Builds a venv in which SGLang's own model classes and weight loaders run on a CPU (5 to 10 minutes).
#   setup.sh VENV_DIR
# A venv that was built from the same requirements is left as it is. SGLang goes in without its
# dependencies (CUDA kernels); requirements.txt pins what the imports reach.
# PYTHON_FOR_SGLANG names another interpreter than python3.11 (sglang's wheel is for 3.11).
set -euo pipefail
venv=${1:?usage: setup.sh VENV_DIR}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON_FOR_SGLANG:-python3.11}
stamp="$("$python" -V) $(sha256sum <"$here/requirements.txt")"
if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "ok: $venv is up to date"
    exit 0
fi
rm -f "$venv/.stamp"
"$python" -m venv --clear "$venv"
"$venv/bin/pip" install -q --no-deps -r "$here/requirements.txt"
PYTHONPATH=$here/../../tierewrite/consumers/sglang "$venv/bin/python" -B -c 'import dry_load
print("ok: sglang", dry_load.Sglang().imports(), "torch", dry_load.torch.__version__)'
# Last, so that a build that was cut short is built again.
printf '%s\n' "$stamp" >"$venv/.stamp"
