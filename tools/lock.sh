#!/usr/bin/env bash
# Chooses the newest versions that pyproject.toml allows and writes them, with hashes, to tools/lock/: what tools/run_in_venv.sh
# installs. Run it to raise versions, then the tests, then commit both files.
#     bash tools/lock.sh                      the versions as they are, moved only where pyproject.toml or torch.txt says so
#     bash tools/lock.sh --upgrade            the newest of everything; also --upgrade-package NAME
#
# venv.txt is for .venv, Python 3.10 to 3.13. Torch itself is torch.txt: which build of a version is installed is the index's
# choice, so there is no one hash, and it names its CUDA libraries exactly. ngc.txt is for an interpreter that brings torch,
# Transformer Engine, apex and NumPy (SPARSECOD_PYTHON): all but those, in versions that work with the NumPy 1.26 of the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

EXTRAS="$(sed -n 's/^EXTRAS="\(.*\)"$/\1/p' tools/run_in_venv.sh)"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

python3 -m venv "$WORK/venv"
"$WORK/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

compile() { # $1 result, then uv's arguments; what the result holds already is kept where it can be
    local result="$1"
    shift
    "$WORK/venv/bin/uv" pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate "$@" --output-file "$result"
}

omit() { # names on stdin, as arguments that leave them out of the result
    sed 's/^/--no-emit-package=/'
}

names_of() { sed -n 's/^\([a-z0-9][a-z0-9._-]*\)==.*/\1/p' "$1" | sort -u; }

compile "$WORK/torch.txt" tools/lock/torch.txt
names_of "$WORK/torch.txt" | grep -E '^(torch|triton|cuda|nvidia)' | omit >"$WORK/cuda"
mapfile -t cuda <"$WORK/cuda"
mapfile -t image < <(printf '%s\n' numpy setuptools | omit)
printf 'numpy<2\n' >"$WORK/image.txt"

for name in venv ngc; do # worked on as a copy: a failure half-way leaves the lock as it was
    [ ! -f "tools/lock/$name.txt" ] || cp "tools/lock/$name.txt" "$WORK/$name.txt"
done
whole=(--generate-hashes pyproject.toml)
IFS=, read -ra extras <<<"$EXTRAS"
whole+=("${extras[@]/#/--extra=}")
printf 'setuptools>=77\n' >"$WORK/build.txt" # builds this package
compile "$WORK/venv.txt" "${whole[@]}" "$WORK/build.txt" --constraint tools/lock/torch.txt "${cuda[@]}" "$@"
compile "$WORK/ngc.txt" "${whole[@]}" --constraint "$WORK/image.txt" --constraint tools/lock/torch.txt "${cuda[@]}" "${image[@]}" "$@"
for name in venv ngc; do
    { printf '# Written by tools/lock.sh; not by hand.\n'; cat "$WORK/$name.txt"; } >"tools/lock/$name.txt.new"
    mv "tools/lock/$name.txt.new" "tools/lock/$name.txt"
done
