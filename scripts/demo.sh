#!/usr/bin/env bash
# Trains on real text and real images with a batch that does not fit in the memory budget, then compares the strategies,
# and trains a PyTorch model in Python if the package is built. Usage: scripts/demo.sh BUILD
set -euo pipefail
build=$1
microbatch=$build/microbatch
text=/usr/share/games/fortunes
images=/usr/share/datasets/fashion-mnist
runs=runs/demo-$(date +%Y%m%d-%H%M%S)

step() { printf '\n== %s\n\n' "$1"; }
show() { printf '$ microbatch %s\n' "$*"; "$microbatch" "$@"; }

step "English text (fortunes): a batch of 64 samples in 64 MiB, which do not hold it at once"
show train --data $text --model gpt-tiny --batch 64 --memory 64MiB --steps 150 --warmup "10 steps" --run "$runs/text"

step "Images (Fashion-MNIST): a batch of 512 samples in 100 MiB, which do not hold it at once"
show train --data $images --model resnet --norm group --batch 512 --memory 100MiB --samples 30000 --warmup "3 steps" --lr 0.003 \
    --run "$runs/images"

step "Text: what a small batch, the accumulated batch and the batch at once cost and give"
show compare --data $text --model gpt-tiny --batch 64 --memory 64MiB --samples 1920

step "Images: the same"
show compare --data $images --model resnet --norm group --batch 512 --memory 100MiB --samples 8192 --lr 0.003

if [ -e "$build/python/microbatch/_core.so" ]; then
    step "Python: a PyTorch model, texts of any length, a batch of 64 that 32 MiB do not hold at once"
    echo "\$ python examples/python/run.py --batch 64 --memory 32MiB --steps 60"
    # torch warns where NumPy is not installed; nothing here needs it.
    PYTHONWARNINGS="ignore:Failed to initialize NumPy" PYTHONPATH=$build/python .venv/bin/python examples/python/run.py --batch 64 --memory 32MiB --steps 60 --run "$runs/python"
fi
