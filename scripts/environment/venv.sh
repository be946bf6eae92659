# Sourced by check.sh, quickstart.sh and gpu_check.sh: makes .venv, installs the project with its $extras into it, and
# puts its programs first on PATH.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
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

# What quickstart.sh asks for is a beginning of what check.sh does: an environment of check.sh's serves both.
wanted() { printf '%s %s' "$(cat pyproject.toml constraints.txt | cksum)" "${extras:?}"; }

installed() {
    case "$(cat "$stamp" 2>/dev/null)" in "$(wanted)"*) return 0 ;; *) return 1 ;; esac
}

# Uncompiled: Python compiles the few modules that are imported when they are first, in a fraction of the time. It must
# then keep them, or each process would compile torch and transformers again.
unset PYTHONDONTWRITEBYTECODE
pip_install() {
    "$(programs)/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt "$@"
}

make_venv() {
    local python
    python="$(find_python)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || fail "python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
}

has_torch() { "$(programs)/python" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)'; }

# First, and only where its index is not pip's own; else it comes with the project.
install_torch() {
    local index
    index="$("$(programs)/python" scripts/environment/torch_build.py)"
    if [ -n "$index" ]; then
        pip_install --no-deps --index-url "$index" torch || fail "pip could not install torch; its message is above"
    fi
}

install_project() {
    say "installing the project and what it needs into .venv"
    rm -f "$stamp"
    if ! has_torch; then install_torch; fi
    pip_install -e ".[$extras]" || fail "pip could not install the project; its message is above"
    # onnx2torch asks for torchvision. The registry's fits the registry's torch only, and breaks transformers beside a
    # CPU build; onnx2torch does without it.
    if ! "$(programs)/python" -c 'import torchvision' >/dev/null 2>&1; then
        "$(programs)/python" -m pip uninstall --quiet --yes torchvision
    fi
    wanted >"$stamp"
}

# Runs that install into one .venv at once would break it: the later ones wait, and find it ready. Where there is no
# flock (macOS, Git Bash) they don't.
lock() {
    command -v flock >/dev/null 2>&1 || return 0
    exec 9<"$root"
    if ! flock --nonblock 9; then
        say "waiting for another run, which installs into .venv"
        flock 9
    fi
}

ready() { new_enough "$(programs)/python" && installed; }

if ! ready; then
    lock
    if ! new_enough "$(programs)/python"; then make_venv; fi
    if ! installed; then install_project; fi
    exec 9<&-
fi
PATH="$(programs):$PATH"
export PATH
