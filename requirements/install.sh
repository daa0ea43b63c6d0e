#!/usr/bin/env bash
# install.sh SET: installs requirements/SET.txt (cpu, native, models, dev or bench) into .venv and checks the hashes. Does
# nothing if that is done. Sets can be combined, since all locks have the same versions; dev contains cpu, native, models.
set -euo pipefail
cd "$(dirname "$0")/.."
set=$1
venv=.venv

die() { printf '\nmake: %s\n' "$@" >&2; exit 1; }
hash_of() { cat requirements/build.txt "requirements/$1.txt" requirements/install.sh pyproject.toml | sha256sum | cut -c1-16; }
installed() { [ -e "$venv/.installed-$1-$(hash_of "$1")" ] && "$venv/bin/python" -c ''; } 2>/dev/null

exec 9<requirements
flock 9 # of two makes at once, the second waits
if installed "$set" || { [ "$set" != bench ] && installed dev; }; then exit 0; fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "There is no $python. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version 2>&1) is too old: 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"
[ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 2000000 ] ||
    die "Less than 2 GB is free on the disk of $PWD: too little to install. Free some space and run make again."
compiles() { case $set in cpu | models | dev) true ;; *) false ;; esac; } # llama-cpp-python, which has no wheels
if compiles; then
    command -v "${CXX:-c++}" g++ clang++ >/dev/null ||
        die "There is no C++ compiler, and llama-cpp-python is compiled on install. On Debian and Ubuntu: apt install build-essential
Or use llama.cpp's own server, which comes compiled: make run ENGINE=llama-server"
fi

# Start over after an interrupted install, add to a finished one.
echo "make: installing requirements/$set.txt into $venv"
if [ -e "$venv/.installing" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
fi
touch "$venv/.installing"
rm -f "$venv/.installed-$set-"*

quiet=-q
if [ -t 1 ]; then quiet=; fi # show progress on a terminal
# The library for images is a quarter of the compilation, and no images are sent to llama-cpp-python.
export CMAKE_ARGS=${CMAKE_ARGS--DLLAVA_BUILD=OFF}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
failed() { die "The install failed, see above. Fix the cause and run make again; it starts over."; }

pip install -q --require-hashes -r requirements/build.txt || failed
! compiles || echo "make: compiling llama-cpp-python, unless pip has cached it: 5 to 20 minutes"
pip install $quiet --require-hashes --no-build-isolation -r "requirements/$set.txt" || failed
pip install -q --no-deps --no-build-isolation -e . || failed
rm "$venv/.installing"
touch "$venv/.installed-$set-$(hash_of "$set")"
