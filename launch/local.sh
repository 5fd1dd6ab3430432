#!/usr/bin/env bash
# Runs several processes on this machine, like the hosts of a pod. Also used by the tests.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/local.sh [-n PROCESSES] [-d DEVICES] [-o FOLDER] [--dry-run] -- ARGUMENTS

Runs `bigalign train ARGUMENTS` in PROCESSES connected processes, or another command, if ARGUMENTS
begin with one (a word that is not an option).

  -n PROCESSES   number of processes (default 2)
  -d DEVICES     CPU devices per process; without it, JAX uses the devices that it finds
  -o FOLDER      folder for process_1.log, process_2.log, ... (default: a new temporary folder)
  --dry-run      print the commands and run none

Process 0 writes to the terminal. When a process fails, the script stops the others and exits with the
status of the failed process. Ctrl-C stops all, within 10 s. SIGTERM is passed on to all processes, and
the script waits for their checkpoint, and exits with 143 as they do.

  launch/local.sh -n 2 -d 4 -- --config=configs/tiny.py --workdir=runs/two
HELP
}

processes=2
devices=
logs=
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    -n | -d | -o)
      (($# > 1)) || fail "$1 needs a value"
      case "$1" in -n) processes=$2 ;; -d) devices=$2 ;; -o) logs=$2 ;; esac
      shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    --) shift; break ;;
    *) fail "unknown option $1; put the arguments of the run after --" ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "-n $processes: expected a number of processes >= 1"
[[ -z $devices || $devices =~ ^[1-9][0-9]*$ ]] || fail "-d $devices: expected a number of devices >= 1"

set_command "$(command -v bigalign || echo "$root/.venv/bin/bigalign")" "$@"

# Prints a free port below the range that the system uses for outgoing connections.
free_port() {
  local port=$((20000 + RANDOM % 12000))
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
  echo "$port"
}

coordinator=127.0.0.1:$(free_port)

# Sets `variables`, the environment variables of process $1.
set_variables() {
  variables=(
    "BIGALIGN_COORDINATOR=$coordinator"
    "BIGALIGN_NUM_PROCESSES=$processes"
    "BIGALIGN_PROCESS_ID=$1"
  )
  if [[ -n $devices ]]; then
    variables+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  fi
}

if [[ -n $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    set_variables "$i"
    act "${variables[@]}" "${command[@]}"
  done
  exit 0
fi

if [[ -z $logs ]]; then
  logs=$(mktemp -d "${TMPDIR:-/tmp}/bigalign-local.XXXXXX")
fi
mkdir -p "$logs"
((processes == 1)) || echo "The other processes write to $logs/process_*.log" >&2

# With job control each process leads its own process group, which includes its data workers.
set -m
pids=()

# Sends SIGTERM to all processes, once. They save a checkpoint, however long that takes.
terminated=
terminate() {
  local pid
  [[ -z $terminated ]] || return 0
  terminated=yes
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -TERM -- "-$pid" 2>/dev/null || true
  done
}

# Stops all processes: SIGTERM, then SIGKILL after 10 s. Hides bash's messages about ended jobs.
# shellcheck disable=SC2329  # the trap below calls it
end_all() {
  trap '' INT TERM HUP
  local pid tries=50
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -TERM -- "-$pid" || true
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    while kill -0 -- "-$pid" && ((tries > 0)); do
      tries=$((tries - 1))
      sleep 0.2
    done
    kill -KILL -- "-$pid" || true
  done
  wait
} 2>/dev/null
trap end_all EXIT
trap 'exit 130' INT
trap terminate TERM HUP

for ((i = 0; i < processes; i++)); do
  set_variables "$i"
  if ((i)); then
    env "${variables[@]}" "${command[@]}" </dev/null >"$logs/process_$i.log" 2>&1 &
  else
    env "${variables[@]}" "${command[@]}" </dev/null &
  fi
  pids+=($!)
  [[ -z $terminated ]] || kill -TERM -- "-$!" 2>/dev/null || true
done

last=0
running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.2
  for i in "${!running[@]}"; do
    if kill -0 "${running[i]}" 2>/dev/null; then
      continue
    fi
    status=0
    wait "${running[i]}" 2>/dev/null || status=$?
    # 143: the process has saved a checkpoint, and the others are doing the same.
    if ((status == 143)); then
      [[ $terminated ]] || echo "launch/local.sh: process $i ended with status 143" >&2
      terminate
      last=143
    elif ((status)); then
      echo "launch/local.sh: process $i ended with status $status" >&2
      ((i == 0)) || tail -n 30 "$logs/process_$i.log" >&2
      exit "$status"
    fi
    unset "running[i]"
  done
done
exit "$last"
