#!/usr/bin/env bash
# Checks MicroServe on a machine with an NVIDIA GPU and prints one table.
#
#     deploy/gpu_check.sh [MODEL_DIR]
#
# One row each, in this order:
#   heaps       tests/gpu without what follows: the conformance suite of cuda_ipc between two processes, 10,000
#               random puts that no signal may overtake, grants, writers that are killed within a transfer
#   nvshmem     two ranks, 10,000 transfers (nvshmem4py; where it is missing the row fails)
#   kernels     against their references
#   engine      the runner: fp32 token by token, bf16 logits within bounds of fp32 on the CPU
#   exact       engine.cuda_exact: bits of logits, log-probabilities and KV over any company, and from CUDA graphs;
#               then bits of a whole mesh in bf16, every strategy, engines killed
#   strategies  every strategy on two engines that share the GPU (engine.device=cuda:0, kvcache.heap=cuda_ipc,
#               fp32) token by token against transformers
#   benchmarks  gpu_kernels.py, gpu.py, then gpu_exact.py, which is what exact bits cost; a goal that they miss
#               is no failure
# MODEL_DIR: a model directory for the strategies; default: a tiny random one, made for the run.
# PYTHON: the interpreter, with the wheels that the script names where they are missing; it installs nothing.
# REQUESTS: requests of each strategy, default 40.
#
# Exit code 0: all passed. 1: something failed. 2: this machine cannot run it, nothing was checked.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/.src${PYTHONPATH:+:$PYTHONPATH}"

if ! gpu=$("$PYTHON" - <<'END'
import ctypes, sys
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    sys.exit(print(error) or 1)
count = ctypes.c_int()
if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
    sys.exit(print("the NVIDIA driver shows no device") or 1)
name = ctypes.create_string_buffer(256)
driver.cuDeviceGetName(name, 256, 0)
print(f"{name.value.decode()}, {count.value} device(s)")
END
); then
    echo "gpu_check: no NVIDIA GPU here, nothing was checked (${gpu:-$PYTHON does not run})" >&2
    exit 2
fi

if ! missing=$("$PYTHON" - <<'END'
import importlib.util, sys
wheels = {
    "torch": "torch (a CUDA build)",
    "triton": "triton (comes with a CUDA build of torch)",
    "cupy": "cupy-cuda12x>=13.4 or cupy-cuda13x>=14.0, as torch's CUDA",
    "transformers": "MicroServe's extra engine (pip install '.[engine]')",
    "zmq": "MicroServe's extra engine (pip install '.[engine]')",
    "pytest": "MicroServe's extra dev (pip install '.[dev]')",
    "hypothesis": "MicroServe's extra dev (pip install '.[dev]')",
}
lacking = [wheel for name, wheel in wheels.items() if importlib.util.find_spec(name) is None]
if "torch" not in " ".join(lacking):
    import torch
    if not torch.cuda.is_available():
        lacking.append(f"torch (a CUDA build; {torch.__version__} sees no GPU)")
print("; ".join(dict.fromkeys(lacking)))
sys.exit(bool(lacking))
END
); then
    echo "gpu_check: wheels are missing, nothing was checked: ${missing:-$PYTHON does not run}" >&2
    exit 2
fi

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
rows=()
failures=0

row() { # name, result, seconds, last line
    rows+=("$(printf '%-44s %-10s %6s s   %s' "$1" "$2" "$3" "$4")")
    [ "$2" = passed ] || failures=$((failures + 1))
}

stage() { # name, pattern that the output must have, command
    local name=$1 pattern=$2 start=$SECONDS result=passed code
    shift 2
    echo "== $name"
    "$@" 2>&1 | tee "$work/output"
    code=${PIPESTATUS[0]}
    # A run in which nothing ran has shown nothing, whatever its exit code.
    if [ "$code" != 0 ] || ! grep -Eq "$pattern" "$work/output"; then
        result=FAILED
    fi
    row "$name" "$result" "$((SECONDS - start))" "$(tail -n 1 "$work/output" | cut -c 1-80)"
}

model=${1:-}
if [ -z "$model" ]; then
    model=$work/tiny
    "$PYTHON" -c \
        "import sys; from tests.support.engine.model.tiny_model import make_tiny_model; make_tiny_model(sys.argv[1], head_dim=64)" "$model"
fi

passed='(^|[^0-9])[1-9][0-9]* passed'
tests() { # pytest's arguments
    "$PYTHON" -m pytest -q -rs -p no:cacheprovider "$@"
}

nvshmem=tests/gpu/heap/test_nvshmem_on_device.py
stage "heaps and grants, 2 processes" "$passed" \
    tests tests/gpu --ignore="$nvshmem" --ignore=tests/gpu/kernels --ignore=tests/gpu/engine
stage "nvshmem, 2 ranks" "$passed" tests "$nvshmem"
stage "kernels against their references" "$passed" tests tests/gpu/kernels
exact=tests/gpu/engine/test_exact_on_device.py
stage "engine, fp32 tokens and bf16 logits" "$passed" tests tests/gpu/engine --ignore="$exact"
stage "exact rows, whatever their company" "$passed" tests "$exact"
stage "exact mesh, 2 engines on cuda:0, bf16" '^exact$' \
    "$PYTHON" tests/support/process/exactness.py --model "$model" --device cuda:0 --requests "${REQUESTS:-40}" \
    --dtype bfloat16 --set engine.cuda_exact=true
stage "strategies, 2 engines on cuda:0, fp32" '^exact$' \
    "$PYTHON" tests/support/process/exactness.py --model "$model" --device cuda:0 --requests "${REQUESTS:-40}"
stage "benchmarks/gpu/gpu_kernels.py" 'multiprocessors' \
    "$PYTHON" benchmarks/gpu/gpu_kernels.py
stage "benchmarks/gpu/gpu.py" '^[0-9]+ of [0-9]+ goals met' \
    "$PYTHON" benchmarks/gpu/gpu.py
stage "benchmarks/gpu/gpu_exact.py" '^[0-9]+ of [0-9]+ goals met' \
    "$PYTHON" benchmarks/gpu/gpu_exact.py

echo
echo "$gpu"
printf '%s\n' "${rows[@]}"
[ "$failures" = 0 ]
