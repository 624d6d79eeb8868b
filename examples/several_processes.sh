#!/usr/bin/env sh
# Prune the bundled network on two CPU processes, and compare the plan with that of one process. Runs offline.
#
#     sh examples/several_processes.sh
#
# On a machine with N GPUs: accelerate launch --multi_gpu --num_processes N scripts/prune.py ...
# On CPUs accelerate starts several processes only where ACCELERATE_USE_CPU is set.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
options="--model digits_resnet --dataset digits --criterion fisher --target-macs 0.5 --calibration-size 128 --dry-run"

python "$root/scripts/prune.py" $options --output-dir "$output/one"
OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 \
    --mixed_precision no --dynamo_backend no "$root/scripts/prune.py" $options --output-dir "$output/two"

cmp "$output/one/prune_plan.json" "$output/two/prune_plan.json" && echo "One process and two make the same plan."
