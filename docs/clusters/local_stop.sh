#!/bin/bash
# End what docs/clusters/local.yaml has started on all machines, as `ray down` does not. Run on the head by `ray exec`.
# Exit code 1: a machine could not be reached; the others are stopped.
cd ~ || exit 1
export RAY_AUTH_MODE=token

# The head first: its autoscaler would start the workers again.
ray stop

# Ray on the head keeps the cluster file, as JSON, and the key to the workers.
read -r user workers < <(python -c "
import json
cluster = json.load(open('ray_bootstrap_config.yaml'))
print(cluster['auth']['ssh_user'], *cluster['provider']['worker_ips'])")
declare -A stopping
for worker in $workers; do
  ssh -n -i ~/ray_bootstrap_key.pem -o BatchMode=yes -o ConnectTimeout=10 -o StrictHostKeyChecking=no \
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$user@$worker" '~/ccdist/.venv/bin/ray stop' &
  stopping[$worker]=$!
done
code=0
for worker in $workers; do
  wait "${stopping[$worker]}" || { echo "error: Ray on $worker could not be stopped" >&2; code=1; }
done

# MLflow is a group of processes. Its file goes with it: the number may be another process's one day.
if test -f ~/ccdist/runs/mlflow/server.pid; then
  server=$(cat ~/ccdist/runs/mlflow/server.pid)
  kill -- "-$server"
  for _ in {1..100}; do kill -0 -- "-$server" 2> /dev/null || break; sleep 0.1; done
  rm ~/ccdist/runs/mlflow/server.pid
fi
exit $code
