# shellcheck shell=bash
# Looks at the nodes before a run starts on them. Sourced by job.sh; the looking is done by preflight.py.
#
# First every node by itself (GPUs, the run folder, versions), then the network between them. Failing nodes go, one a line,
# into $JOB_DIR/failed-nodes-$ATTEMPT, and the job is requeued without them. A node that cannot be named fails all the same.

PREFLIGHT_NODE_S=180     # for one node
PREFLIGHT_NETWORK_S=600  # for the network, starting the processes included

run_preflight() {
    local reports=$JOB_DIR/preflight-$ATTEMPT started=$SECONDS
    case $MEGARPT_PREFLIGHT in
        off) return 0 ;;
        nodes | full) ;;
        *) say "MEGARPT_PREFLIGHT: got $MEGARPT_PREFLIGHT, expected full, nodes or off" && exit 78 ;;
    esac
    mkdir -p "$reports"
    # shellcheck disable=SC2086  # flags
    srun --label --kill-on-bad-exit=0 $MEGARPT_CONTAINER timeout --kill-after=10 "$PREFLIGHT_NODE_S" \
        "$MEGARPT_PYTHON" "$MEGARPT_HOME/slurm/preflight.py" node "$reports" --gpus "$(gpus_expected)" || true
    judge "$reports" node || return 1
    if [ "$MEGARPT_PREFLIGHT" = full ] && [ $((SLURM_JOB_NUM_NODES * MEGARPT_RANKS_PER_NODE)) -gt 1 ]; then
        torchrun_step $((MASTER_PORT + 1)) "$MEGARPT_HOME/slurm/preflight.py" network "$reports" \
            --gpus "$(gpus_expected)" --timeout "$PREFLIGHT_NETWORK_S" &
        wait_for $! || true
        judge "$reports" network --min-gbps "$MEGARPT_MIN_ALLREDUCE_GBPS" || return 1
    fi
    say "the preflight took $((SECONDS - started)) s and found nothing wrong"
}

# How many GPUs each node must have; 0 where the job asked for none.
gpus_expected() {
    local count=${SLURM_GPUS_PER_NODE:-0}
    echo "${count##*:}"
}

judge() {
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
    python3 "$MEGARPT_HOME/slurm/preflight.py" judge "$1" --stage "$2" --nodes "$nodes" "${@:3}" \
        >"$JOB_DIR/failed-nodes-$ATTEMPT"
}
