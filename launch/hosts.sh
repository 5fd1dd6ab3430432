# Sourced by tpu_vm.sh and gce.sh: the course of a run on hosts that are reached by ssh.
#
# They define: create, delete; set_targets, what `ssh_to COMMAND TARGET` and `copy_to FILE TARGET`
# reach; `describe`, a command that fails where there is nothing, and `reading OUTPUT`, which says what
# it tells: ready, gone (they were taken away or refused), or what is waited for.
# shellcheck shell=bash disable=SC2034,SC2154

hosts_usage="  train    all of this: create, wait, copy, setup, run; and anew when the machines are taken away
  create   asks for the machines
  wait     until they are there
  copy     this checkout as it is, without what git ignores, to ~/bigalign on each host
  setup    launch/setup_host.sh on each host, and --prepare
  run      \`bigalign train ARGUMENTS\` on each host, or another command if ARGUMENTS begin with one;
           it goes on when the connection breaks, and the same command follows it again
  logs     the last 50 lines that each host wrote
  delete   gives the machines back, and what is on their disks is lost"

hosts_options='  --project P    if it is not what gcloud is set to
  --spot         cheaper machines that may be taken away
  --delete WHEN  gives the machines back after train or run: always, failure or never, the default
  --restarts N   how often train starts anew; 100
  --prepare C    a command for each host once it is set up: one that mounts the workdir, for example
  --dry-run      prints the commands and runs none'

# at_once FUNCTION ARGUMENT: for all targets at the same time; the status of the first that failed,
# or else of the first that did not come to its end: who misses a failed peer ends so.
at_once() {
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
    if ((code)) && { ((status == 0)) || { unfinished "$status" && ! unfinished "$code"; }; }; then
      status=$code
    fi
  done
  return "$status"
}

# Whether status $1 says that nothing was wrong with the run: SIGTERM (143) or SIGKILL came, JAX missed
# a peer (134), or the connection was lost (255).
unfinished() {
  case "$1" in 134 | 137 | 143 | 255) ;; *) return 1 ;; esac
}

state() {
  local output
  if output=$("${describe[@]}" 2>/dev/null); then
    reading "$output"
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
      gone) say "$name was refused or taken away: $(quote "${describe[@]}")"; return 1 ;;
      none) say "there is no $name: $(quote "${describe[@]}")"; return 1 ;;
    esac
    say "$name: $now"
    sleep 30
  done
}

copy() {
  local folder status=0
  temporary_folder
  pack "$folder/bigalign.tar.gz" &&
    at_once copy_to "$folder/bigalign.tar.gz" &&
    at_once ssh_to 'mkdir -p bigalign && tar -xzf bigalign.tar.gz -C bigalign' || status=$?
  [[ -n $dry_run ]] || rm -r "$folder"
  return "$status"
}

setup() {
  at_once ssh_to "bash bigalign/launch/setup_host.sh --extras 'tpu gcs'${prepare:+ && $prepare}"
}

run() {
  local status=0 mistake=0
  at_once ssh_to "cd bigalign && exec bash launch/on_host.sh run $id $(quote "${command[@]}")" ||
    status=$?
  # gcloud tells the status of one of its hosts, which may only have missed the one that failed.
  if [[ -z $dry_run ]] && ((status && status != 255)) && unfinished "$status"; then
    at_once ssh_to 'bash bigalign/launch/on_host.sh failed' || mistake=$?
    ((mistake == 0)) || unfinished "$mistake" || status=$mistake
  fi
  return "$status"
}

logs() {
  at_once ssh_to 'bash bigalign/launch/on_host.sh logs 50'
}

# Whether a run that ended with status $1 can go on. What else fails would fail again.
interrupted() {
  unfinished "$1" || [[ $(state) == gone || $(state) == none ]]
}

# `fresh` are machines without a checkout.
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
    if ((status == 0)) || ! interrupted "$status"; then
      return "$status"
    fi
    if ((attempt > restarts)); then
      say "status $status, and --restarts $restarts is used up"
      return "$status"
    fi
    say "status $status: starts again"
    sleep 30
    # By its old ID, a run that only the connection has lost is found even if it has ended.
    ((status == 255)) || new_id
    # If this fails, the next wait tells.
    create_if_missing || true
  done
}

new_id() {
  id=$(date -u +%Y%m%d-%H%M%S)-$((++ids))
}

# Does what `verb` says.
start() {
  ids=0
  new_id
  case "$verb" in train | run) set_command .venv/bin/bigalign ${words[@]+"${words[@]}"} ;; esac
  one_of delete "always failure never"
  number 0 restarts
  need gcloud "https://cloud.google.com/sdk/docs/install tells how to get it"
  case "$verb" in
    train | run)
      delete_at_end
      "$verb"
      ;;
    wait) wait_until_ready ;;
    *) "$verb" ;;
  esac
}
