# shellcheck shell=bash
# What train.sbatch and score.sbatch share: one attempt of a job, from its first line to the decision about the next.
#
# The batch shell gets USR1 before the time limit (--signal=B:USR1@300) and hands it to the tasks, which save and end. TERM,
# which preemption and scancel send, reaches the tasks directly. torchrun would die of either while its workers are still
# saving, so it inherits both as ignored; the workers install handlers of their own.

# shellcheck source=slurm/env.sh
source "$MEGARPT_HOME/slurm/env.sh"
# shellcheck source=slurm/preflight.sh
source "$MEGARPT_HOME/slurm/preflight.sh"

ATTEMPT=${SLURM_RESTART_COUNT:-0}
STEP=      # process id of the srun that works
STOPPING=  # set once USR1 came
JOB_DIR=   # what this job writes about itself
SIGNAL_AGAIN_S=5

say() { echo "[$(date +%FT%T%z)] $SLURM_JOB_NAME $SLURM_JOB_ID: $*"; }

on_signal() {
    say "USR1: the time of this allocation ends soon; the run is told to save and stop"
    STOPPING=1
    forward_signal
}
trap on_signal USR1

# Again and again until the step has ended: a task that is still loading its libraries ignores the signal.
forward_signal() {
    [ -n "$STEP" ] || return 0
    while kill -0 "$STEP" 2>/dev/null; do
        scancel --signal=USR1 "$SLURM_JOB_ID" || true
        sleep "$SIGNAL_AGAIN_S"
    done &
}

# The address of the first node. Its name need not resolve, and `hostname -i` is 127.0.x.x on many images.
head_address() {
    scontrol show node "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# on_first_node COMMAND...: one process on one node, in the container if there is one.
on_first_node() {
    # shellcheck disable=SC2086  # flags
    srun --nodes=1 --ntasks=1 --exact $MEGARPT_CONTAINER "$@"
}

# begin_attempt FOLDER [RUN_DIR]: from here on the job keeps its records in FOLDER.
begin_attempt() {
    JOB_DIR=$(realpath -m "$1")
    RECORD=("$JOB_DIR" ${2:+--run-dir "$2"} --attempt "$ATTEMPT")
    mkdir -p "$JOB_DIR"
    python3 "$MEGARPT_HOME/slurm/requeue.py" begin "${RECORD[@]}" --nodes "$SLURM_JOB_NODELIST"
    say "attempt $ATTEMPT on $SLURM_JOB_NODELIST, $MEGARPT_RANKS_PER_NODE ranks on each of $SLURM_JOB_NUM_NODES nodes; records in $JOB_DIR"
    run_preflight || conclude 80
    [ -z "$STOPPING" ] || conclude 75
}

# launch MODULE-ARGUMENTS...: torchrun on every node; the code of the step. Static rendezvous: the same node has the same
# ranks each time, and no host name has to match what the node calls itself.
launch() {
    local code=0
    # torchrun turns every code of its workers into 1; they write theirs into this file.
    export MEGARPT_EXIT_FILE=$JOB_DIR/exit-$ATTEMPT.json
    torchrun_step "$MASTER_PORT" "$@" &
    STEP=$!
    [ -z "$STOPPING" ] || forward_signal
    wait_for "$STEP" || code=$?
    STEP=
    return "$code"
}

# wait_for PID: its code. `wait` alone returns early when a trapped signal comes.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1"
}

# torchrun_step PORT ARGUMENTS...: srun starts torchrun on every node, and ends it on all when it fails on one.
torchrun_step() {
    export MASTER_ADDR MASTER_PORT=$1
    # shellcheck disable=SC2016,SC2086  # expanded on the node; flags
    exec srun --kill-on-bad-exit=1 --label --unbuffered $MEGARPT_CONTAINER bash -c '
        trap "" USR1 TERM
        exec "$MEGARPT_PYTHON" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
            --nproc-per-node="$MEGARPT_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
            --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT "$@"' _ "${@:2}"
}

# conclude CODE: what the attempt came to, and what follows from it. Does not return.
conclude() {
    local decision exclude=
    [ ! -s "$JOB_DIR/failed-nodes-$ATTEMPT" ] || exclude=$(paste -sd, "$JOB_DIR/failed-nodes-$ATTEMPT")
    decision=$(python3 "$MEGARPT_HOME/slurm/requeue.py" decide "${RECORD[@]}" --exit-code "$1" \
        --exit-file "$JOB_DIR/exit-$ATTEMPT.json" --exclude "$exclude" --max-failures "$MEGARPT_MAX_FAILURES")
    [ "$decision" = requeue ] || exit "$decision"
    requeue_job "$exclude"
}

# requeue_job NODES: back into the queue, away from NODES (comma-separated, may be empty). Does not return.
requeue_job() {
    local before
    # Slurm ends this shell when it requeues the job, and takes a new list of nodes only afterwards.
    trap '' TERM
    before=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm refuses to requeue this job; submit the same command again, the run goes on where it stopped"
        exit 75
    fi
    if [ -n "$1" ]; then
        [ "$before" = "(null)" ] && before=
        scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}$1"
        say "requeued, and will stay away from $1"
    fi
    exit 75
}

# Below the ports that systems hand out by themselves, and different for jobs that share a node.
MASTER_PORT=$((15000 + SLURM_JOB_ID * 2 % 16000))
MASTER_ADDR=$(head_address)
