#!/usr/bin/env bash
# Runs a command in this project's Python environment, making the environment first where it is missing or out of date.
#     bash tools/run_in_venv.sh sparsecod train examples/configs/tiny.yaml
#
# By default the environment is .venv at the repository root. With SPARSECOD_PYTHON set to an interpreter that already has
# torch (inside an NGC container: SPARSECOD_PYTHON=python3) that interpreter is used as it is: no .venv, its torch and CUDA
# packages stay untouched, and the rest is installed beside them.
#
# Every version is the one in tools/lock/ (tools/lock.sh chooses them). A stamp, written after everything else, says what the
# environment was made from; while it matches, a call costs a few milliseconds. pip's own settings (index, cache, wheel
# folders) apply. Works from any folder.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
UNFINISHED="$ROOT/.venv.unfinished"
LOCK="$ROOT/tools/lock"
EXTRAS="eval,wandb,tensorboard,modelopt,docs,dev"
STAMP_NAME="sparsecod_megatron.stamp"

note() { printf 'run_in_venv.sh: %s\n' "$*" >&2; }
fail() { note "$*"; exit 1; }

# What an environment is made from, on one line: folder, lists, interpreter ($1).
fingerprint() {
    printf '%s | %s | %s | %s' "$ROOT" "$EXTRAS" "$(cat "$ROOT/pyproject.toml" "$LOCK"/*.txt | cksum)" "$1"
}

stamp_matches() { # $1 stamp file, $2 expected text
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}

write_stamp() { # $1 stamp file, $2 text: complete or absent, never half
    printf '%s\n' "$2" >"$1.new"
    mv "$1.new" "$1"
}

# One builder at a time; the second waits and then finds the stamp. Without flock (macOS) two first calls must not overlap.
lock() {
    command -v flock >/dev/null 2>&1 || return 0
    exec 9>"$ROOT/.venv.lock"
    flock -n 9 || { note "another shell is setting the environment up; waiting for it"; flock 9; }
}

unlock() { exec 9>&-; } # or the command would hold the lock for as long as it runs

pip_install() { # $1 interpreter, then pip's arguments; stdout stays the command's own
    local python="$1" quiet=(-qq)
    shift
    [ -t 2 ] && quiet=()
    "$python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} "$@" >&2
}

pip_failed() { fail "pip could not install the packages (its message is above); the next call resumes from there"; }

# ---------------------------------------------------------------- .venv

python_for_venv() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s' "$name"
            return
        fi
    done
    fail "needs Python 3.10 or newer on PATH, python3 is '$(python3 -V 2>&1 || true)': install one, or name one that has torch in SPARSECOD_PYTHON"
}

venv_fingerprint() { fingerprint "$("$VENV/bin/python" -V 2>&1)"; }

venv_ready() { [ -x "$VENV/bin/python" ] && stamp_matches "$VENV/$STAMP_NAME" "$(venv_fingerprint)"; }

# True for a .venv that pip can work on: not killed half-way, not moved here from another folder, pip and Python new enough.
venv_usable() {
    [ -x "$VENV/bin/python" ] && [ ! -e "$UNFINISHED" ] || return 1
    [ ! -f "$VENV/$STAMP_NAME" ] || [ "$(cut -d'|' -f1 "$VENV/$STAMP_NAME")" = "$ROOT " ] || return 1
    "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

build_venv() {
    local python=""
    if ! venv_usable; then
        # `venv --clear` would empty the folder that the link names: an environment of another checkout, say.
        [ ! -L "$VENV" ] || [ -z "$(ls -A "$VENV/")" ] ||
            fail ".venv is a link to $(readlink "$VENV"), which is not this folder's environment: remove the link"
        python="$(python_for_venv)"
    fi
    # Outlives a kill or Ctrl-C, which may leave a package half there that pip would take for whole.
    touch "$UNFINISHED"
    trap 'exit 130' INT TERM
    if [ -n "$python" ]; then
        note "making .venv with $("$python" -V 2>&1)"
        "$python" -m venv --clear "$VENV" >&2 ||
            fail "'$python -m venv' failed (its message is above); on Debian and Ubuntu: apt-get install python3-venv"
    fi
    note "installing packages into .venv (minutes the first time)"
    rm -f "$VENV/$STAMP_NAME"
    # The lock holds what torch needs too, so that torch, which has no one hash, adds its own CUDA libraries alone.
    if pip_install "$VENV/bin/python" --no-deps --require-hashes --requirement "$LOCK/venv.txt" &&
        pip_install "$VENV/bin/python" --requirement "$LOCK/torch.txt" &&
        pip_install "$VENV/bin/python" --no-deps --no-build-isolation --editable "$ROOT"; then
        write_stamp "$VENV/$STAMP_NAME" "$(venv_fingerprint)"
        rm -f "$UNFINISHED"
    else
        [ "$?" -ge 128 ] || rm -f "$UNFINISHED"
        pip_failed
    fi
    trap - INT TERM
}

use_venv() {
    if ! venv_ready; then
        lock
        if ! venv_ready; then build_venv; fi # an if, because `||` would switch `set -e` off inside
        unlock
    fi
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
}

# ---------------------------------------------------------------- SPARSECOD_PYTHON

# Prints, a line each: executable, its script folders joined by ':', the folder pip installs into, the folder stamps may also
# lie in, and the versions of Python and torch.
DESCRIBE='
import os, site, sys, sysconfig
from importlib import metadata
if sys.version_info < (3, 10):
    sys.exit(f"is Python {sys.version.split()[0]}, needs 3.10 or newer")
try:
    torch = metadata.version("torch")
except metadata.PackageNotFoundError:
    sys.exit("has no torch: name an interpreter that has it, or unset SPARSECOD_PYTHON to use .venv")
if tuple(int(part) for part in torch.split(".")[:2]) < (2, 6):
    sys.exit(f"has torch {torch}, needs 2.6 or newer")
purelib, user = sysconfig.get_path("purelib"), site.getusersitepackages()
scripts = [os.path.dirname(sys.executable), sysconfig.get_path("scripts")]
scripts.append(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
print(sys.executable, ":".join(dict.fromkeys(scripts)), purelib if os.access(purelib, os.W_OK) else user, purelib, sep="\n")
print("Python", sys.version.split()[0], "torch", torch)
'

# Pins whatever was compiled against this torch and CUDA, so that pip works around it and never replaces it.
PINS='
import re
from importlib import metadata
compiled = re.compile(r"(torch|triton|pytorch[-_]triton|transformer[-_]engine|apex|flash[-_]attn|nvidia(?![-_]modelopt)|numpy)", re.IGNORECASE)
names = {d.metadata["Name"]: d.version for d in metadata.distributions() if compiled.match(d.metadata["Name"] or "")}
print("\n".join(f"{name}=={version}" for name, version in sorted(names.items())))
'

build_in_place() { # $1 interpreter, $2 stamp file, $3 fingerprint
    note "installing the locked versions beside the torch of $1, which stays as it is"
    rm -f "$2"
    local work
    work="$(mktemp -d)"
    "$1" -c "$PINS" >"$work/pins.txt"
    # The lock without what stays. An entry is a line and the hashes indented below it.
    awk -v pins="$work/pins.txt" '
        BEGIN { while ((getline line < pins) > 0) { sub(/==.*/, "", line); gsub(/[-_.]+/, "-", line); stays[tolower(line)] } }
        /^[a-z0-9]/ { name = $1; sub(/==.*/, "", name); skip = name in stays }
        !skip' "$LOCK/ngc.txt" >"$work/lock.txt"
    mkdir -p "$(dirname "$2")"
    # NGC images set PIP_CONSTRAINT to every version they were built with, far more than has to stay.
    unset PIP_CONSTRAINT
    # The second call finds all it needs, unless the interpreter lacks what every image has (NumPy).
    { pip_install "$1" --no-deps --require-hashes --requirement "$work/lock.txt" &&
        pip_install "$1" --constraint "$work/pins.txt" --editable "${ROOT}[$EXTRAS]"; } || pip_failed
    rm -rf "$work"
    write_stamp "$2" "$3"
}

use_given_python() {
    local described expected python scripts home shared versions
    command -v "$SPARSECOD_PYTHON" >/dev/null 2>&1 || fail "SPARSECOD_PYTHON: no interpreter '$SPARSECOD_PYTHON'"
    described="$("$SPARSECOD_PYTHON" -c "$DESCRIBE" 2>&1)" || fail "SPARSECOD_PYTHON: '$SPARSECOD_PYTHON' ${described##*$'\n'}"
    { read -r python; read -r scripts; read -r home; read -r shared; read -r versions; } <<<"$described"
    expected="$(fingerprint "$versions")"
    given_ready() { stamp_matches "$home/$STAMP_NAME" "$expected" || stamp_matches "$shared/$STAMP_NAME" "$expected"; }
    if ! given_ready; then
        lock
        if ! given_ready; then build_in_place "$python" "$home/$STAMP_NAME" "$expected"; fi
        unlock
    fi
    export PATH="$scripts:$PATH"
    [ "$(command -v python3)" -ef "$python" ] || fail "SPARSECOD_PYTHON: '$python' must also be called python3 in its folder"
}

if [ "$#" -eq 0 ]; then
    note "usage: bash tools/run_in_venv.sh COMMAND [ARGUMENT ...]"
    exit 2
fi
if [ -n "${SPARSECOD_PYTHON:-}" ]; then use_given_python; else use_venv; fi
exec "$@"
