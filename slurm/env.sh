# shellcheck shell=bash
# Every variable of a job, with its reason. Sourced by the batch scripts; srun hands all of it to the tasks.
# What is already set when the job is submitted wins: MEGARPT_CONTAINER=... sbatch slurm/train.sbatch ...

# --- what may differ from cluster to cluster ---

# The repository. Slurm runs a copy of the batch script from its spool folder, so the script cannot find its own place.
export MEGARPT_HOME=${MEGARPT_HOME:-$SLURM_SUBMIT_DIR}

# Flags that srun passes to pyxis, for example
#   MEGARPT_CONTAINER="--container-image=/images/megarpt.sqsh --container-mounts=/data,/home --container-workdir=$PWD"
# Empty: the tasks run on the nodes themselves. The repository, the data and the run folder must be mounted at their own paths,
# and the working folder must be the one outside, because configurations hold relative paths.
export MEGARPT_CONTAINER=${MEGARPT_CONTAINER:-}

# The Python of the tasks; in a container, the container's.
if [ -z "${MEGARPT_PYTHON:-}" ]; then
    if [ -z "$MEGARPT_CONTAINER" ] && [ -x "$MEGARPT_HOME/.venv/bin/python" ]; then
        MEGARPT_PYTHON=$MEGARPT_HOME/.venv/bin/python
    else
        MEGARPT_PYTHON=python3
    fi
fi
export MEGARPT_PYTHON

# Processes on each node: one for each GPU that was asked for (SLURM_GPUS_PER_NODE is 8 or h100:8), one where there are none.
if [ -z "${MEGARPT_RANKS_PER_NODE:-}" ]; then
    MEGARPT_RANKS_PER_NODE=${SLURM_GPUS_PER_NODE:-0}
    MEGARPT_RANKS_PER_NODE=${MEGARPT_RANKS_PER_NODE##*:}
    [ "$MEGARPT_RANKS_PER_NODE" -gt 0 ] || MEGARPT_RANKS_PER_NODE=1
fi
export MEGARPT_RANKS_PER_NODE

# full: look at every node and at the network before training; nodes: without the network; off: neither.
export MEGARPT_PREFLIGHT=${MEGARPT_PREFLIGHT:-full}

# The slowest all-reduce over all nodes, in GB/s of bus bandwidth, that the preflight accepts; 0 accepts any. Set it to about
# half of what a good day shows in the log.
export MEGARPT_MIN_ALLREDUCE_GBPS=${MEGARPT_MIN_ALLREDUCE_GBPS:-0}

# The job is not started again after this many attempts in a row that failed without a new checkpoint.
export MEGARPT_MAX_FAILURES=${MEGARPT_MAX_FAILURES:-3}

# NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME: not set, because interface names belong to a cluster and NCCL finds the
# fast ones by itself. Where the preflight fails to connect, export what `ip -brief address` and `ibv_devinfo` show.

# --- what Slurm needs ---

# srun does not take --cpus-per-task over from the job (since 22.05); without it a task is bound to one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}

# After `sbatch --export=...` srun would hand on only that list, and none of what is set here.
export SLURM_EXPORT_ENV=ALL

# --- what the libraries need ---

# One hardware queue keeps communication kernels in the order in which they were launched, so that they overlap with the
# matrix products of tensor and context parallelism; megatron-core asks for it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# A failing NCCL says why, and a working one says nothing.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The ranks of a node share its cores; a pool of threads as large as the machine in each of them slows all.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The Python stack of a process that dies in native code.
export PYTHONFAULTHANDLER=1

# The last lines before a kill are in the log.
export PYTHONUNBUFFERED=1

# Compiled kernels on the node's own disk: thousands of ranks that lock files in one home folder stall for minutes.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/megarpt-$UID/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/megarpt-$UID/inductor}

# Open files: sockets to every peer and the data files of every rank.
ulimit -Sn "$(ulimit -Hn)"
