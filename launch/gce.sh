#!/usr/bin/env bash
# Runs on a TPU slice that is a managed instance group of Compute Engine: TPU7x, v6e, v5p.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/hosts.sh
. "$root/launch/hosts.sh"

usage() {
  cat <<HELP
usage: launch/gce.sh VERB NAME --zone ZONE [OPTIONS] [-- ARGUMENTS]

$hosts_usage

  --machine M    machine type for create: tpu7x-standard-4t, ct6e-standard-4t, ct5p-hightpu-4t
  --topology T   topology of the slice: 4x4x4 for TPU7x and v5p, 4x4 for v6e; 4 chips per host
  --image F      image family in ubuntu-os-accelerator-images; default: the usual one for the machine
$hosts_options

  launch/gce.sh train siglip --zone us-central1-c --machine tpu7x-standard-4t --topology 4x4x4 \\
    --delete always -- --config=configs/siglip_b16.py --workdir=/mnt/runs/siglip

The workdir must be on storage that all hosts, and those of a later slice, can reach: a bucket or a
mounted file system, not the disk of a host. create makes a workload policy, an instance template and
an instance group, all called NAME. The other verbs also work on a group of that name that you made
yourself, for example from a reservation.
HELP
}

zone='' project='' machine='' topology='' image='' spot='' delete=never restarts=100 prepare=''
verbs "train create wait copy setup run logs delete" "$@"
parse "zone project machine topology image delete restarts prepare" "spot" "${@:3}"
demand zone
case "$verb" in train | create) demand machine topology ;; esac
[[ $topology =~ ^([0-9]+(x[0-9]+){1,2})?$ ]] ||
  fail "--topology $topology: expected a shape such as 4x4 or 2x2x4"

where=(--zone "$zone")
of_project=()
if [[ -n $project ]]; then
  where+=(--project "$project")
  of_project=(--project "$project")
fi
region=(--region "${zone%-*}" ${of_project[@]+"${of_project[@]}"})
# In SDK 528, the mode that creates all machines of a group or none is still in alpha.
groups=(gcloud alpha compute instance-groups managed)
describe=("${groups[@]}" list-instances "$name" "${where[@]}" '--format=value(name,instanceStatus)')

parse_state() {
  if [[ -z $1 ]]; then
    echo "no hosts yet"
  elif grep -qE 'STOP|TERMINATED|SUSPEND' <<<"$1"; then
    echo gone
  elif grep -qv 'RUNNING$' <<<"$1"; then
    echo "$(grep -c 'RUNNING$' <<<"$1") of $(grep -c . <<<"$1") hosts"
  else
    echo ready
  fi
}

create() {
  local chips=$((${topology//x/*})) family=$image options=()
  case "$machine" in
    tpu7x-*)
      : "${family:=ubuntu-accel-2404-amd64-tpu-tpu7x}"
      # These machines support no other disk type.
      options+=(--boot-disk-type hyperdisk-balanced)
      ;;
    *) : "${family:=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}" ;;
  esac
  ((chips % 4 == 0)) ||
    fail "--topology $topology has $chips chips, not a multiple of 4, the chips of a host"
  [[ -z $spot ]] || options+=(--provisioning-model SPOT --instance-termination-action STOP)
  act gcloud compute resource-policies create workload-policy "$name" "${region[@]}" \
    --type HIGH_THROUGHPUT --accelerator-topology "$topology" &&
    act gcloud compute instance-templates create "$name" ${of_project[@]+"${of_project[@]}"} \
      --machine-type "$machine" --image-project ubuntu-os-accelerator-images \
      --image-family "$family" --boot-disk-size 200GB --maintenance-policy TERMINATE \
      --scopes cloud-platform ${options[@]+"${options[@]}"} &&
    act "${groups[@]}" create "$name" "${where[@]}" --template "$name" --size $((chips / 4)) \
      --workload-policy "$name" --target-size-policy-mode bulk \
      --default-action-on-vm-failure do-nothing
}

# Continues after an error: a failed create may have made only some of the three.
delete() {
  local status=0
  act "${groups[@]}" delete "$name" "${where[@]}" --quiet || status=$?
  act gcloud compute instance-templates delete "$name" ${of_project[@]+"${of_project[@]}"} --quiet ||
    status=$?
  act gcloud compute resource-policies delete "$name" "${region[@]}" --quiet || status=$?
  return "$status"
}

set_targets() {
  targets=(HOST)
  [[ -n $dry_run ]] || read -r -d '' -a targets < <("${describe[@]}" | cut -f 1) || true
  ((${#targets[@]})) || fail "$name has no hosts: $(quote "${describe[@]}")"
}

ssh_to() {
  act gcloud compute ssh "$2" "${where[@]}" "--command=$1"
}

# Retries, because this is the first connection to a new host, which takes a while to answer.
copy_to() {
  local tries=20
  until act gcloud compute scp "$1" "$2:" "${where[@]}"; do
    ((tries--)) || return 255
    sleep 10
  done
}

start
