# What the scripts in bin share. Sourced, with the repository's root as the working directory.
# pip's own settings are honoured: PIP_CONSTRAINT, PIP_INDEX_URL and so on.

venv=${TIEREWRITE_VENV:-.venv}

say() { printf '\n== %s\n' "$*"; }

# new_venv FOLDER: a virtual environment, unless it is there.
new_venv() {
    local folder=$1 python=${PYTHON:-python3}
    [ -x "$folder/bin/python" ] && return
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or later is needed; found: $("$python" --version 2>&1 || echo none). Set PYTHON to one." >&2
        exit 2
    fi
    # Debian's python3 comes without venv's ensurepip; virtualenv from PyPI does the same.
    "$python" -m venv "$folder" 2>/dev/null || {
        rm -rf "$folder"
        "$python" -m pip install --quiet --target "$folder.virtualenv" virtualenv
        PYTHONPATH="$folder.virtualenv" "$python" -m virtualenv --quiet "$folder"
        rm -rf "$folder.virtualenv"
    }
}

# make_venv [EXTRA]: a virtual environment with the package (editable) and one of its extras.
make_venv() {
    new_venv "$venv"
    # Installed again only when what is asked for changes.
    local stamp="$venv/.installed${1:+-$1}"
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        say "Installing into $venv (torch and transformers among it: the first time takes minutes)"
        "$venv/bin/python" -m pip install --quiet --config-settings editable_mode=compat --editable ".${1:+[$1]}"
        touch "$stamp"
    fi
}
