#!/usr/bin/env bash
# A run on a TPU slice that is a managed instance group of Compute Engine: TPU7x, v6e, v5p.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/hosts.sh
. "$root/launch/hosts.sh"

usage() {
  cat <<HELP
usage: launch/gce.sh VERB NAME --zone ZONE [OPTIONS] [-- ARGUMENTS]

$hosts_usage

  --machine M    what create asks for: tpu7x-standard-4t, ct6e-standard-4t, ct5p-hightpu-4t
  --topology T   of the slice: 4x4x4 of TPU7x and v5p, 4x4 of v6e; one host for each four chips
  --image F      family of images of ubuntu-os-accelerator-images, if not the usual one of the machine
$hosts_options

  launch/gce.sh train siglip --zone us-central1-c --machine tpu7x-standard-4t --topology 4x4x4 \\
    --delete always -- --config=configs/siglip_b16.py --workdir=/mnt/runs/siglip

The workdir must be where the next slice finds it: on what all mount, not on a host. create makes a workload
policy, an instance template and an instance group, all called NAME; to a group of that name which was
made in another way (from a reservation, say), the verbs after create apply too.
HELP
}

zone='' project='' machine='' topology='' image='' spot='' delete=never restarts=100 prepare=''
verbs "train create wait copy setup run logs delete" "$@"
parse "zone project machine topology image delete restarts prepare" "spot" "${@:3}"
demand zone
case "$verb" in train | create) demand machine topology ;; esac
[[ $topology =~ ^([0-9]+(x[0-9]+){1,2})?$ ]] || fail "--topology $topology is no 4x4 or 2x2x4"

where=(--zone "$zone")
of_project=()
if [[ -n $project ]]; then
  where+=(--project "$project")
  of_project=(--project "$project")
fi
region=(--region "${zone%-*}" ${of_project[@]+"${of_project[@]}"})
# The mode that creates all machines of a group or none has not left alpha in the SDK 528.
groups=(gcloud alpha compute instance-groups managed)
describe=("${groups[@]}" list-instances "$name" "${where[@]}" '--format=value(name,instanceStatus)')

reading() {
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
      # These machines take no other.
      options+=(--boot-disk-type hyperdisk-balanced)
      ;;
    *) : "${family:=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}" ;;
  esac
  ((chips % 4 == 0)) || fail "--topology $topology are $chips chips; a host has four"
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

# What a failed create left undone is not there to delete.
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

# The first to reach a new host, which takes a while to answer.
copy_to() {
  local tries=20
  until act gcloud compute scp "$1" "$2:" "${where[@]}"; do
    ((tries--)) || return 255
    sleep 10
  done
}

start
