#!/usr/bin/env bash
# Runs on the GPUs of a Slurm cluster.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/slurm.sh --nodes N --gpus-per-node G [OPTIONS] -- ARGUMENTS

Submits a job that runs `bigalign train ARGUMENTS` in one process per GPU, or another command if
ARGUMENTS begin with one. This checkout and its .venv (make base EXTRAS=cuda) must be on a file system
that all nodes mount.

  --time LIMIT         time limit of one attempt. 300 s before it, SIGTERM requests a checkpoint; the
                       job is then requeued and resumes, as it does after a preemption
  --cpus-per-task C    cores of each process, shared with its data workers
  --name NAME          name of the job and of its log, NAME-JOBID.log (default bigalign)
  --wait               wait for the end of the job and return its exit status
  --dry-run            print the command and its input, and run nothing

sbatch reads other settings of your site from the environment: SBATCH_PARTITION, SBATCH_ACCOUNT,
SBATCH_QOS, SBATCH_CONSTRAINT, ...

  SBATCH_PARTITION=h100 launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 -- \
    --config=configs/siglip_b16.py --workdir=/shared/runs/siglip
HELP
}

(($#)) || { usage; exit 0; }
nodes='' gpus_per_node='' time='' cpus_per_task='' name=bigalign wait=''
parse "nodes gpus-per-node time cpus-per-task name" "wait" "$@"
demand nodes gpus-per-node
number 1 nodes gpus-per-node
set_command "$root/.venv/bin/bigalign" ${words[@]+"${words[@]}"}
need sbatch "run this on a login node of the cluster"

# Each process sees all GPUs of its node; JAX uses the GPU with the index SLURM_LOCALID.
submit=(
  sbatch --parsable "--job-name=$name" "--output=$name-%j.log" --open-mode=append --requeue
  "--nodes=$nodes" "--gpus-per-node=$gpus_per_node" "--ntasks-per-node=$gpus_per_node"
)
# One failure must not send SIGTERM to the others: they end by themselves when they lose a peer. srun
# returns the largest status, which is theirs (143), so a task that fails writes its own to a file.
# Slurm sends SIGTERM to the shell of a task alone (proctrack/cgroup) or to all its processes.
# shellcheck disable=SC2016  # expanded by the tasks
task='. "$1"; forward "${@:3}"
case $status in 0 | 134 | 137 | 143) ;; *) echo "$status" >"$2" ;; esac; exit "$status"'
step=(srun --kill-on-bad-exit=0)
if [[ -n $cpus_per_task ]]; then
  submit+=("--cpus-per-task=$cpus_per_task")
  step+=("--cpus-per-task=$cpus_per_task")
fi
[[ -z $time ]] || submit+=("--time=$time" --signal=TERM@300)
[[ -z $wait ]] || submit+=(--wait)

script="#!/bin/bash
trap : TERM
cd $(quote "$root") || exit
status=0
# A name that no attempt has used: NFS may remember for a minute that a file did not exist.
failed=\$PWD/.failed-\$SLURM_JOB_ID-\${SLURM_RESTART_COUNT:-0}
$(quote "${step[@]}" bash -c "$task" task "$root/launch/forward.sh") \"\$failed\" $(quote "${command[@]}") || status=\$?
if [[ -s \$failed ]]; then status=\$(cat \"\$failed\"); rm \"\$failed\"; fi
# 143: SIGTERM requested a checkpoint. A cancelled or preempted job is no longer in the state RUNNING;
# Slurm itself requeues a preempted one.
if [[ \$status == 143 && \$(squeue --noheader --jobs=\"\$SLURM_JOB_ID\" --format=%T) == RUNNING ]]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$status\""

if [[ -n $dry_run ]]; then
  echo "$(quote "${submit[@]}") <<'BIGALIGN'"
  echo "$script"
  echo BIGALIGN
else
  "${submit[@]}" <<<"$script"
fi
