# Sourced by check.sh and quickstart.sh: makes .venv, installs the project into it, and puts its programs first on PATH.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
stamp="$venv/installed-from"

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and was not found; install it, or name it: PYTHON=/path/to/python bash $0"
}

# Programs lie in bin/, on Windows in Scripts/.
programs() { if [ -d "$venv/Scripts" ]; then printf '%s\n' "$venv/Scripts"; else printf '%s\n' "$venv/bin"; fi; }

wanted() { cat pyproject.toml constraints.txt | cksum; }

make_venv() {
    local python
    python="$(find_python)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || fail "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
}

install_project() {
    say "installing the project and its tools into .venv (minutes the first time)"
    rm -f "$stamp"
    "$(programs)/python" -m pip install --quiet --disable-pip-version-check -e ".[genai,dev]" -c constraints.txt ||
        fail "pip could not install the project; its message is above"
    # Without what it asks for: the registry's torchvision breaks transformers wherever torch is a CPU build.
    "$(programs)/python" -m pip install --quiet --disable-pip-version-check --no-deps onnx2torch -c constraints.txt ||
        fail "pip could not install onnx2torch; its message is above"
    wanted >"$stamp"
}

if ! new_enough "$(programs)/python"; then make_venv; fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$(wanted)" ]; then install_project; fi
PATH="$(programs):$PATH"
export PATH
