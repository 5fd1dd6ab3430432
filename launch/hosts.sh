# Sourced by tpu_vm.sh and gce.sh: creates hosts, runs on them by ssh, restarts, deletes.
#
# Those scripts define:
#   create, delete           functions that create and delete the machines
#   set_targets              a function that sets `targets`, the arguments of the two next functions
#   ssh_to COMMAND TARGET    runs COMMAND on the hosts of TARGET
#   copy_to FILE TARGET      copies FILE to the hosts of TARGET
#   describe                 a command (an array) that prints the state, and fails if nothing exists
#   parse_state OUTPUT       prints the meaning of its output: ready, gone (refused or reclaimed), or
#                            the state that the machines are still in
# shellcheck shell=bash disable=SC2034,SC2154

hosts_usage="  train    runs create, wait, copy, setup and run; restarts when the machines are preempted
  create   requests the machines
  wait     waits until the machines are ready
  copy     copies this checkout, without files that git ignores, to ~/bigalign on each host
  setup    runs launch/setup_host.sh and the --prepare command on each host
  run      runs \`bigalign train ARGUMENTS\` on each host, or another command if ARGUMENTS begin with
           one. It keeps running when the connection breaks; the same command follows it again
  logs     prints the last 50 lines of output of each host
  delete   deletes the machines; the content of their disks is lost"

hosts_options='  --project P    the project; default: the one that gcloud is configured for
  --spot         use cheaper machines that may be preempted
  --delete WHEN  delete the machines after train or run: always, failure or never (default)
  --restarts N   the maximum number of restarts by train (default 100)
  --prepare C    a command to run on each host after setup, for example to mount the workdir
  --dry-run      print the commands and run none'

# on_all_targets FUNCTION ARGUMENT: calls FUNCTION ARGUMENT TARGET for all targets in parallel. Returns
# the status of the first one that failed by itself, otherwise of the first one that was interrupted:
# hosts that lose a failed peer end with such a status.
on_all_targets() {
  local target pid code status=0 pids=()
  set_targets
  for target in "${targets[@]}"; do
    if [[ -n $dry_run ]]; then
      "$@" "$target"
    else
      "$@" "$target" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    code=0
    wait "$pid" || code=$?
    if ((code == 0)); then
      continue
    fi
    if ((status == 0)) || { is_interruption "$status" && ! is_interruption "$code"; }; then
      status=$code
    fi
  done
  return "$status"
}

# Whether status $1 means an interruption and not an error of the run: SIGTERM (143), SIGKILL (137), JAX
# lost a peer (134), or the connection was lost (255).
is_interruption() {
  case "$1" in 134 | 137 | 143 | 255) ;; *) return 1 ;; esac
}

state() {
  local output
  if output=$("${describe[@]}" 2>/dev/null); then
    parse_state "$output"
  else
    echo none
  fi
}

wait_until_ready() {
  local now
  if [[ -n $dry_run ]]; then
    act "${describe[@]}"
    return
  fi
  while now=$(state); [[ $now != ready ]]; do
    case "$now" in
      gone) say "$name was refused or reclaimed: $(quote "${describe[@]}")"; return 1 ;;
      none) say "$name does not exist: $(quote "${describe[@]}")"; return 1 ;;
    esac
    say "$name: $now"
    sleep 30
  done
}

copy() {
  local folder status=0
  temporary_folder
  pack "$folder/bigalign.tar.gz" &&
    on_all_targets copy_to "$folder/bigalign.tar.gz" &&
    on_all_targets ssh_to 'mkdir -p bigalign && tar -xzf bigalign.tar.gz -C bigalign' || status=$?
  [[ -n $dry_run ]] || rm -r "$folder"
  return "$status"
}

setup() {
  on_all_targets ssh_to "bash bigalign/launch/setup_host.sh --extras 'tpu gcs'${prepare:+ && $prepare}"
}

run() {
  local status=0 own_status=0
  on_all_targets ssh_to "cd bigalign && exec bash launch/on_host.sh run $id $(quote "${command[@]}")" ||
    status=$?
  # gcloud returns the status of one host, which may only have lost the host that failed.
  if [[ -z $dry_run ]] && ((status && status != 255)) && is_interruption "$status"; then
    on_all_targets ssh_to 'bash bigalign/launch/on_host.sh failed' || own_status=$?
    ((own_status == 0)) || is_interruption "$own_status" || status=$own_status
  fi
  return "$status"
}

logs() {
  on_all_targets ssh_to 'bash bigalign/launch/on_host.sh logs 50'
}

# Whether a run that ended with status $1 can resume. Other failures would only repeat.
can_resume() {
  is_interruption "$1" || [[ $(state) == gone || $(state) == none ]]
}

# Sets `fresh` if it created machines, which have no checkout yet.
create_if_missing() {
  case "$(state)" in
    none) create && fresh=yes ;;
    gone) delete && create && fresh=yes ;;
  esac
}

train() {
  local attempt status fresh=yes
  if [[ -n $dry_run ]]; then
    create && wait_until_ready && copy && setup && run
    return
  fi
  create_if_missing
  for ((attempt = 1; ; attempt++)); do
    status=0
    wait_until_ready && { [[ -z $fresh ]] || { copy && setup && fresh=''; }; } && run || status=$?
    if ((status == 0)) || ! can_resume "$status"; then
      return "$status"
    fi
    if ((attempt > restarts)); then
      say "status $status: no restart, because --restarts $restarts is used up"
      return "$status"
    fi
    say "status $status: restarting"
    sleep 30
    # If only the connection was lost, the old ID finds the run again, even if it has ended.
    ((status == 255)) || new_id
    # If this fails, the next wait reports it.
    create_if_missing || true
  done
}

new_id() {
  id=$(date -u +%Y%m%d-%H%M%S)-$((++ids))
}

# Runs the function of `verb`.
start() {
  ids=0
  new_id
  case "$verb" in train | run) set_command .venv/bin/bigalign ${words[@]+"${words[@]}"} ;; esac
  one_of delete "always failure never"
  number 0 restarts
  need gcloud "install it, https://cloud.google.com/sdk/docs/install"
  case "$verb" in
    train | run)
      delete_at_end
      "$verb"
      ;;
    wait) wait_until_ready ;;
    *) "$verb" ;;
  esac
}
