#!/usr/bin/env bash
# What only a machine with one CUDA GPU can show, in at most 12 minutes: tools/gpu_check.py.
#     bash tools/gpu_check.sh [cifar10-train.zip]
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v python || command -v python3)
if ! "$python" -c "import torch, numpy, PIL, tqdm" 2>/dev/null; then
    echo "gpu_check.sh: needs Python with: pip install -r $root/requirements.txt" >&2
    exit 2
fi
PYTHONPATH=$root exec "$python" -m tools.gpu_check "$@"
