#!/usr/bin/env bash
# One node's part of a run. Start it on every node with the same arguments:
#
#   NNODES=8 NODE_RANK=0 MASTER_ADDR=HOST examples/launch/node.sh CONFIG.yaml section.key=value …
#
# From the environment:
#   NNODES        number of nodes                                  (1)
#   NODE_RANK     0 … NNODES − 1, 0 on the node MASTER_ADDR        (0)
#   MASTER_ADDR   a name of that node which all nodes resolve      (127.0.0.1)
#   MASTER_PORT   a port that is free there                        (29500)
#   NPROC         ranks of this node                               (one per GPU; 1 without)
#   ATTEMPTS      starts in all; a rerun resumes                   (3)
#   PAUSE         seconds before another one                       (20)
#
# The exit status is that of megatron_taopd.launch: 3 means that the run was asked to end and goes on
# when it is started again.
set -uo pipefail

# PET_…: torchrun's own variables, which operators set.
NNODES="${NNODES:-${PET_NNODES:-1}}"
NODE_RANK="${NODE_RANK:-${PET_NODE_RANK:-0}}"
MASTER_ADDR="${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}"
MASTER_PORT="${MASTER_PORT:-${PET_MASTER_PORT:-29500}}"
NPROC="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
ATTEMPTS="${ATTEMPTS:-3}"
PAUSE="${PAUSE:-20}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# SGLang's defaults: ranks and servers have NCCL groups in common, and need these alike.
export NCCL_CUMEM_ENABLE="${NCCL_CUMEM_ENABLE:-0}"
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

launch=0
asked=
# The run is asked, not killed: it saves what it has.
pass_on() {
    asked=yes
    [ "$launch" = 0 ] || kill -s "$1" "$launch" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1

for attempt in $(seq "$ATTEMPTS"); do
    python -m megatron_taopd.launch \
        --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        -m megatron_taopd.train "$@" &
    launch=$!
    # A signal that is passed on ends wait, not the run.
    wait "$launch"
    status=$?
    while kill -0 "$launch" 2>/dev/null; do
        wait "$launch"
        status=$?
    done
    case $status in
        0 | 2 | 3) exit "$status" ;;
    esac
    [ -z "$asked" ] || exit 3
    if [ "$attempt" -lt "$ATTEMPTS" ]; then
        echo "node $NODE_RANK: status $status; start $((attempt + 1)) of $ATTEMPTS in $PAUSE s" >&2
        sleep "$PAUSE"
    fi
done
exit "$status"
