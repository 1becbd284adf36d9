#!/bin/bash
# A Ray cluster inside one Slurm job for `search.run`: a head on the job's first node, workers on the others, the driver
# in the batch script. It comes with the job and goes with it. From the root of the repository, after `make setup`:
#
#   sbatch --export=ALL,SHARED=/scratch/me/ccdist docs/clusters/slurm.sh spaces/cifar.yaml --set resources.gpu=0.25
#
# What follows the script are arguments of search.run. The same line again goes on with the study.
#
# The repository and SHARED must lie on folders that all nodes mount at the same path. Trials keep their files in
# SHARED/artifacts, so a node's loss costs at most what its trials did since their last epoch. The study's database and
# MLflow's are SQLite, which network file systems corrupt: they lie on the first node's disk, are copied to SHARED/study
# when the job ends, also at its time limit, and are taken from there when the next one begins. If the first node itself
# dies, nobody copies: the study is lost, only its artefacts remain, and the next job says so. A study that must survive
# that belongs into PostgreSQL:  --export=ALL,SHARED=...,STUDY=postgresql://USER@HOST/ccdist  with ~/.pgpass for the
# password (and TRACKING=http://HOST:5000, where there is an MLflow server).
#SBATCH --job-name=ccdist
#SBATCH --output=%x-%j.log
# Eight nodes of four GPUs; one task on each, which starts Ray with all of the node that the job was given.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=24:00:00
# Ten minutes before the time limit this script, and only it, is told to end.
#SBATCH --signal=B:TERM@600
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

usage='sbatch --export=ALL,SHARED=FOLDER docs/clusters/slurm.sh SPACE [OPTIONS]'
[[ $# -ge 1 ]] || fail "no space file was given; expected: $usage"
[[ -d ${SHARED:-} ]] || fail "SHARED is '${SHARED:-}', no folder; expected one that all nodes mount: $usage"
SHARED=$(realpath "$SHARED") # the driver runs elsewhere, below
repository=$SLURM_SUBMIT_DIR
[[ -x $repository/.venv/bin/python ]] || fail "$repository has no .venv; run make setup there, and sbatch from there"
export PATH=$repository/.venv/bin:$PATH
space=$1 && shift
[[ -f $space ]] && space=$(realpath "$space")

# On the node's own disk, and the same folder in every job, since MLflow's database holds the paths of its files.
place=${CCDIST_SCRATCH_DIR:-/tmp}
[[ -d $place ]] || fail "CCDIST_SCRATCH_DIR is '$place', no folder on $(hostname)"
scratch=$(realpath "$place")/ccdist-$UID-$(cksum <<<"$SHARED" | cut -d ' ' -f 1)
begun=$(cat "$SHARED/study/.scratch" 2>/dev/null || printf %s "$scratch")
[[ $begun == "$scratch" ]] ||
    fail "the study in $SHARED works in $begun; set CCDIST_SCRATCH_DIR to ${begun%/*}, as it was in its first job"
mkdir -m 700 "$scratch" ||
    fail "$scratch is there on $(hostname): another job works on SHARED, or one was killed here and left its study; \
mv -T $scratch/runs $SHARED/study, or delete $scratch"
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$SHARED/.ray-token-$SLURM_JOB_ID
driver='' steps=()

# Everything that was started ends here, whatever ended the script; the databases are copied once nobody writes them.
finish() {
    local status=$?
    trap - EXIT TERM
    set +e
    if [[ -n $driver ]] && kill -0 "$driver" 2>/dev/null; then
        kill -INT "$driver"
        (sleep 300 && kill -KILL "$driver") 2>/dev/null & # before Slurm does it, with nothing copied
        wait "$driver"
        status=$?
        kill -- -$!
    fi
    for step in "${steps[@]}"; do
        kill -TERM "$step" 2>/dev/null
        wait "$step"
    done
    rm -f "$RAY_AUTH_TOKEN_PATH"
    if [[ -d $scratch/runs ]]; then
        printf %s "$scratch" >"$scratch/runs/.scratch"
        rm -rf "$SHARED/study.part"
        if ! { cp -a "$scratch/runs" "$SHARED/study.part" && mv -T "$SHARED/study.part" "$SHARED/study"; }; then
            fail "the study could not be copied; it is still in $scratch/runs on $(hostname)"
        fi
        rm -rf "$SHARED/study-before-$SLURM_JOB_ID"
    fi
    rm -rf "$scratch"
    exit "$status"
}
trap finish EXIT TERM
set -m # job control: else processes in the background would not hear the signal by which a search stops cleanly

# A key for this job alone, which no other user can read, in place of ~/.ray/auth_token.
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it over from sbatch

# Ray listens on every address of a node, whichever it is told to announce: a node with a public one is refused, unless
# you say that a firewall closes it. The token is the second lock, not the first.
private='^(10\.|192\.168\.|172\.(1[6-9]|2.|3[01])\.|100\.(6[4-9]|[7-9].|1[01].|12[0-7])\.|169\.254\.|f[cde])'
if [[ ${FIREWALL:-} != closed ]]; then
    closed='if a firewall closes them: FIREWALL=closed'
    if ! addresses=$(srun --ntasks-per-node=1 hostname -I | xargs -n 1 | sort -u) || [[ -z $addresses ]]; then
        fail "the nodes do not say which addresses they have (hostname -I), and Ray would listen on all; $closed"
    fi
    public=()
    for address in $addresses; do
        [[ $address =~ $private ]] || public+=("$address")
    done
    [[ ${#public[@]} == 0 ]] || fail "nodes have public addresses, where Ray would listen: ${public[*]}; $closed"
fi

# The address by which Slurm itself knows the first node, in numbers.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
name=$(scontrol --oneliner show node "$head" | grep -oP '\bNodeAddr=\K\S+')
address=$(getent ahostsv4 "$name" | awk 'NR == 1 {print $1}')
[[ -n $address && $address != 127.* ]] || fail "node $head is known as '$name', by which other nodes cannot reach it"
# Several jobs may share a node, so the port is the job's.
port=$((20000 + SLURM_JOB_ID % 10000))

# Moved away while a job works on it: after the loss of this node the next job must not go on from an old copy, whose
# trials would be others than those of the same number in SHARED/artifacts. `runs` is what this job brings back, so it
# is never a part of a copy; a signal waits for the end of the parentheses, so that it finds either both moves or none.
mkdir -p "$SHARED/artifacts"
if [[ -d $SHARED/study ]]; then
    cp -a "$SHARED/study" "$scratch/runs.part" || fail "$SHARED/study could not be copied to $scratch; it stays there"
    (mv -T "$SHARED/study" "$SHARED/study-before-$SLURM_JOB_ID" && mv -T "$scratch/runs.part" "$scratch/runs")
fi

# What a node offers is what Slurm gave this job of it, not what Ray would count. --block: Ray ends with its step.
# shellcheck disable=SC2016 # for the node's own shell to fill in
offer='--num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block'
srun --nodes=1 --ntasks=1 --nodelist="$head" bash -c "ulimit -n \$(ulimit -Hn)
    exec ray start --head --node-ip-address=$address --port=$port --include-dashboard=false $offer" &
steps+=($!)
for _ in {1..60}; do
    ray health-check --address "$address:$port" 2>/dev/null && ready=yes && break
    kill -0 "${steps[0]}" 2>/dev/null || break
    sleep 2
done
[[ ${ready:-} == yes ]] || fail "no Ray head answers at $address:$port on $head; what it said is above"
others=$((${#nodes[@]} - 1))
if ((others > 0)); then
    srun --nodes=$others --ntasks=$others --ntasks-per-node=1 --exclude="$head" bash -c "ulimit -n \$(ulimit -Hn)
        exec ray start --address=$address:$port $offer" &
    steps+=($!)
fi

# In the folder of this job's databases: `runs` below it is the default storage, apart from the artefacts. Trials start
# on the nodes that are there, and on the others as they join.
cd "$scratch"
settings=(--set "storage.artifacts=$SHARED/artifacts")
[[ -z ${STUDY:-} ]] || settings+=(--set "storage.study=$STUDY")
[[ -z ${TRACKING:-} ]] || settings+=(--set "tracking.uri=$TRACKING")
python -m search.run "$space" --address "$address:$port" "${settings[@]}" "$@" &
driver=$!
wait "$driver"
