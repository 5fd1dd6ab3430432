#!/usr/bin/env bash
# Runs on Cloud TPU slices, requested as queued resources: v4, v5e, v5p, v6e.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/hosts.sh
. "$root/launch/hosts.sh"

usage() {
  cat <<HELP
usage: launch/tpu_vm.sh VERB NAME --zone ZONE [OPTIONS] [-- ARGUMENTS]

$hosts_usage

  --type TYPE    accelerator type for create: v5litepod-16, v6e-64, v5p-128, v4-32, ...
  --runtime R    image of the hosts (default: the usual one for the type)
  --slices N     number of slices in the run (default 1)
$hosts_options

  launch/tpu_vm.sh train siglip --zone us-west4-b --type v5litepod-64 --spot --delete always -- \\
    --config=configs/siglip_b16.py --workdir=/mnt/runs/siglip

The workdir must be on storage that all hosts, and those of a later slice, can reach: a bucket or a
mounted file system, not the disk of a host. For TPU7x, use launch/gce.sh or launch/gke.sh.
HELP
}

zone='' project='' type='' runtime='' slices=1 spot='' delete=never restarts=100 prepare=''
verbs "train create wait copy setup run logs delete" "$@"
parse "zone project type runtime slices delete restarts prepare" "spot" "${@:3}"
demand zone
case "$verb" in train | create) demand type ;; esac
number 1 slices

where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
tpus=(gcloud compute tpus)
describe=("${tpus[@]}" queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')

parse_state() {
  case "$1" in
    ACTIVE) echo ready ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) echo gone ;;
    *) echo "$1" ;;
  esac
}

create() {
  local image=$runtime nodes=(--node-id "$name") options=()
  case "$type" in
    v5litepod-*) : "${image:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${image:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${image:=v2-alpha-tpuv6e}" ;;
    tpu7x*) fail "--type $type: for TPU7x, use launch/gce.sh or launch/gke.sh" ;;
    *) : "${image:=tpu-ubuntu2204-base}" ;;
  esac
  ((slices == 1)) || nodes=(--node-count "$slices" --node-prefix "$name")
  [[ -z $spot ]] || options+=(--spot)
  act "${tpus[@]}" queued-resources create "$name" "${where[@]}" --accelerator-type "$type" \
    --runtime-version "$image" "${nodes[@]}" ${options[@]+"${options[@]}"}
}

delete() {
  act "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Connects to each node of the queued resource separately: `queued-resources ssh` serves at most 64
# hosts at a time, and the processes of a run wait for each other.
set_targets() {
  local i
  targets=("$name")
  if ((slices > 1)); then
    targets=()
    for ((i = 0; i < slices; i++)); do
      targets+=("$name-$i")
    done
  fi
}

ssh_to() {
  act "${tpus[@]}" tpu-vm ssh "$2" "${where[@]}" --worker=all "--command=$1"
}

copy_to() {
  act "${tpus[@]}" tpu-vm scp "$1" "$2:" "${where[@]}" --worker=all
}

start
