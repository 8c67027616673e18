# What bin/demo and bin/test share. Sourced, with the repository's root as the working directory.
# pip's own settings are honoured: PIP_CONSTRAINT, PIP_INDEX_URL and so on.

venv=${TIEREWRITE_VENV:-.venv}

say() { printf '\n== %s\n' "$*"; }

# make_venv [EXTRA]: a virtual environment with the package (editable) and one of its extras.
make_venv() {
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or later is needed; found: $("$python" --version 2>&1 || echo none). Set PYTHON to one." >&2
        exit 2
    fi
    if [ ! -x "$venv/bin/python" ]; then
        # Debian's python3 comes without venv's ensurepip; virtualenv from PyPI does the same.
        "$python" -m venv "$venv" 2>/dev/null || {
            rm -rf "$venv"
            "$python" -m pip install --quiet --target "$venv.virtualenv" virtualenv
            PYTHONPATH="$venv.virtualenv" "$python" -m virtualenv --quiet "$venv"
            rm -rf "$venv.virtualenv"
        }
    fi
    # Installed again only when what is asked for changes.
    local stamp="$venv/.installed${1:+-$1}"
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        say "Installing into $venv (torch and transformers among it: the first time takes minutes)"
        "$venv/bin/python" -m pip install --quiet --config-settings editable_mode=compat --editable ".${1:+[$1]}"
        touch "$stamp"
    fi
}
