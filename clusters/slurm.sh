#!/usr/bin/env bash
# One training on nodes of a Slurm cluster, all alike:
#   sbatch --nodes=4 --gpus-per-node=4 clusters/slurm.sh configs/industrial.yaml --run $SHARED/runs/x learners=4
# The first node holds the head, the learners and the reward workers, the others the rollout workers. Submitted from the
# root of this checkout, which all nodes see, after clusters/install.sh cuda (or cpu) has run there. A run that was cut
# off by the time limit goes on with the same command and --resume. Not run on Slurm. See docs/cluster.md.
#SBATCH --job-name=rporec
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
set -euo pipefail

PORT=${PORT:-6379}
export PATH=$PWD/.venv/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
gpus=${SLURM_GPUS_ON_NODE:-0}
places=$((gpus > 0 ? gpus : 1))  # of a role on one node

# In the home that all nodes share, readable by its owner alone; never on a command line, which others may list.
(umask 077 && ray get-auth-token --generate >/dev/null)

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ "${#nodes[@]}" -lt 2 ]; then
    echo "slurm: two nodes or more; on one, rporec train starts its own cluster" >&2
    exit 2
fi
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# --block: a node's Ray lives and ends with its task. The dashboard stays on loopback.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    ray start --head --block --node-ip-address="$address" --port="$PORT" --num-gpus="$gpus" \
    --dashboard-host=127.0.0.1 --resources="{\"learner\": $places, \"reward\": 2, \"serve\": 3}" &
until srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" ray health-check --address="$address:$PORT"; do sleep 2; done
srun --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --overlap --exclude="$head" \
    ray start --block --address="$address:$PORT" --num-gpus="$gpus" --resources="{\"rollout\": $places}" &

# On the head, where the controller must be. Slurm's TERM, 300 s before the time limit, is passed on as Ctrl-C would
# come: in stage 2 of RL the step under way is finished and a checkpoint written. Warm-up and offline preferences end at
# once; --resume goes on from their newest checkpoint, RecHeads begin anew.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" rporec train "$@" --address "$address:$PORT" --attached &
training=$!
trap 'kill -TERM "$training"' TERM
status=0
wait "$training" || status=$?
if kill -0 "$training" 2>/dev/null; then  # the trap ended the first wait
    status=0
    wait "$training" || status=$?
fi
exit "$status"
