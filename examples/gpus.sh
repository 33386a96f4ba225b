#!/usr/bin/env bash
# Prints how many GPUs a run here would see. (Importing torch takes seconds to say the same.)
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr , '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c . || true
elif command -v nvidia-smi > /dev/null; then
    nvidia-smi --list-gpus | grep -c '^GPU ' || true
else
    echo 0
fi
