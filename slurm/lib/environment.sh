# shellcheck shell=bash disable=SC2034  # the other parts' variables
# The Python environment, and the variables that ranks need.

# open_environment: open the Python environment for this shell (srun passes it on), or set IN_CONTAINER, the words before a command
# on a node, and CONTAINER_OPTIONS, srun's. Modules and activation scripts may print anything.
open_environment() {
    local kind=${ENVIRONMENT%%:*} name=${ENVIRONMENT#*:} module file tool folders=("$PROJECT")
    [ "$PWD" = "$PROJECT" ] || folders+=("$PWD")
    case $kind:$name in venv:/*|apptainer:/*) ;; venv:*|apptainer:*) name=$PROJECT/$name ;; esac
    IN_CONTAINER=() CONTAINER_OPTIONS=()
    set +u  # the site's and conda's own scripts read unset variables
    if [ -n "$MODULES" ] && ! type module >/dev/null 2>&1; then  # a batch shell is no login shell: it is not defined yet
        for file in "$MODULESHOME/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
            # shellcheck source=/dev/null
            if [ -r "$file" ]; then source "$file" || true; break; fi
        done
    fi
    for module in $MODULES; do
        type module >/dev/null 2>&1 || die "MODULES=$MODULES, but this site has no 'module' command: leave MODULES empty"
        module load "$module" || die "module load $module failed: see 'module avail'"
    done
    case $kind in
        venv)
            [ -x "$name/bin/python" ] || die "ENVIRONMENT=$ENVIRONMENT: no ${name#"$PROJECT"/}/bin/python in $PROJECT: run 'make setup GPU=1' first"
            VIRTUAL_ENV=$(cd "$name" && pwd)
            export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" ;;
        conda)
            command -v conda >/dev/null || die "ENVIRONMENT=$ENVIRONMENT: no conda on the PATH: name its module in MODULES"
            # shellcheck disable=SC1091
            source "$(conda info --base)/etc/profile.d/conda.sh"
            conda activate "$name" || die "conda activate $name failed: see 'conda env list'" ;;
        apptainer)
            [ -e "$name" ] || die "ENVIRONMENT=$ENVIRONMENT: $name does not exist: build it as docs/slurm.md says"
            for tool in apptainer singularity; do command -v "$tool" >/dev/null && break; tool=""; done  # its name until 2021
            [ -n "$tool" ] || die "ENVIRONMENT=$ENVIRONMENT: no apptainer on the PATH: name its module in MODULES"
            # Images are read-only.
            export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$LOCAL_DISK/soundwave-cache-$(id -u)/extensions}
            folders+=("$LOCAL_DISK" ${MOUNTS:+"$MOUNTS"})
            IN_CONTAINER=("$tool" exec --nv --bind "$(IFS=,; echo "${folders[*]}")" --pwd "$PWD" "$name") ;;
        pyxis)
            local mounts="" folder
            for folder in "${folders[@]}" "$LOCAL_DISK" ${MOUNTS//,/ }; do mounts+="${mounts:+,}$folder:$folder"; done
            CONTAINER_OPTIONS=("--container-image=$name" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
        *) die "ENVIRONMENT=$ENVIRONMENT: write venv:DIR, conda:NAME, apptainer:FILE.sif or pyxis:IMAGE" ;;
    esac
    set -u
}

# set_variables: what the ranks need to know. Anything set before (site profile, sbatch --export) is left as it is.
set_variables() {
    export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export PYTHONSAFEPATH=1  # `python -m` must not find the checkout in the current folder before the frozen copy
    # Compute nodes often have no network: what the hub holds was fetched on the login node (docs/slurm.md).
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # Without this every rank starts a thread per core of the whole node.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS}
    # Batches differ in shape from step to step, which splits PyTorch's memory pool into pieces too small to use.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # NCCL logs why it stops
    # 4 us * 2^22 = 17 s per try: a link that flaps for some seconds, or a switch that reroutes, is waited for, not fatal.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # Set by the site where NCCL's or Gloo's own choice is wrong (docs/slurm.md): NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
    # (the interface of the bootstrap connection), NCCL_IB_HCA (the InfiniBand ports), NCCL_IB_GID_INDEX (RoCE).
    # Names need not share a prefix; lines before them are a wrapper's.
    SOUNDWAVE_NODES=$({ client scontrol show hostnames "$SLURM_JOB_NODELIST" || true; } | grep -xE '[A-Za-z0-9._-]+' | tail -n "$NODES" \
        | tr '\n' ' ' || true)
    [ "$(wc -w <<<"$SOUNDWAVE_NODES")" = "$NODES" ] \
        || die "scontrol show hostnames $SLURM_JOB_NODELIST does not name $NODES nodes: '$SOUNDWAVE_NODES'" 1
    MASTER_ADDR=${SOUNDWAVE_NODES%% *}
    # Two jobs that share a node seldom meet, nor does a restarted job what a dead node has left of its former self. From 32768
    # on Linux gives ports to whoever asks.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 7919 * RESTARTS) % 12768))
    SOUNDWAVE_TASKS=$TASKS SOUNDWAVE_RANKS=$((NODES * TASKS))  # what the ranks hold Slurm's and torchrun's numbers against
    export SOUNDWAVE_NODES SOUNDWAVE_TASKS SOUNDWAVE_RANKS MASTER_ADDR MASTER_PORT
    export SLURM_JOB_END_TIME=$END  # empty where it is not known
}
