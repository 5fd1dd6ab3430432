#!/usr/bin/env bash
# A run on Cloud TPU slices, asked for as queued resources: v4, v5e, v5p, v6e.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/hosts.sh
. "$root/launch/hosts.sh"

usage() {
  cat <<HELP
usage: launch/tpu_vm.sh VERB NAME --zone ZONE [OPTIONS] [-- ARGUMENTS]

$hosts_usage

  --type TYPE    what create asks for: v5litepod-16, v6e-64, v5p-128, v4-32, ...
  --runtime R    the image of the hosts, if not the usual one of the type
  --slices N     how many slices work together; 1
$hosts_options

  launch/tpu_vm.sh train siglip --zone us-west4-b --type v5litepod-64 --spot --delete always -- \\
    --config=configs/siglip_b16.py --workdir=/mnt/runs/siglip

The workdir must be where the next slice finds it: on what all mount, not on a host. TPU7x is not to be had
this way: launch/gce.sh, launch/gke.sh.
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

reading() {
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
    tpu7x*) fail "--type $type: TPU7x comes by launch/gce.sh or launch/gke.sh" ;;
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

# The nodes one by one: `queued-resources ssh` serves no more than 64 hosts at a time, and of a run
# none goes on without the others.
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
