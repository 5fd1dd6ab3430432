#!/usr/bin/env bash
# Several processes of one run on this machine: to try what a pod does, and for the tests.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/local.sh [-n PROCESSES] [-d DEVICES] [-o FOLDER] [--dry-run] -- ARGUMENTS

Starts PROCESSES processes of `bigalign train ARGUMENTS` that know of each other, or of another
command, if ARGUMENTS begin with one (a word that is no option).

  -n PROCESSES   how many; 2 if not given
  -d DEVICES     CPU devices of each process; without it, JAX takes the devices that it finds
  -o FOLDER      where process_1.log, process_2.log, ... go; a new temporary folder if not given
  --dry-run      prints the commands and starts none

Process 0 writes to the terminal. When a process fails, the others are ended and its exit status is
that of this script; Ctrl-C ends all.

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
    *) fail "unknown option $1; what is to run comes after --" ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "-n $processes is no number of processes"
[[ -z $devices || $devices =~ ^[1-9][0-9]*$ ]] || fail "-d $devices is no number of devices"

set_command "$(command -v bigalign || echo "$root/.venv/bin/bigalign")" "$@"

# Below the range from which outgoing connections take theirs.
free_port() {
  local port=$((20000 + RANDOM % 12000))
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 12000))
  done
  echo "$port"
}

coordinator=127.0.0.1:$(free_port)

# Sets `variables`, what process $1 finds in its environment.
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
((processes == 1)) || echo "Processes from 1 on write to $logs/process_*.log" >&2

# With job control each process leads a group of its own, which holds its data workers too.
set -m
pids=()

# Ten seconds to end in order, then by force; bash's own notes on ended jobs are not for the reader.
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
trap 'exit 143' TERM HUP

for ((i = 0; i < processes; i++)); do
  set_variables "$i"
  if ((i)); then
    env "${variables[@]}" "${command[@]}" </dev/null >"$logs/process_$i.log" 2>&1 &
  else
    env "${variables[@]}" "${command[@]}" </dev/null &
  fi
  pids+=($!)
done

running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.2
  for i in "${!running[@]}"; do
    if kill -0 "${running[i]}" 2>/dev/null; then
      continue
    fi
    status=0
    wait "${running[i]}" 2>/dev/null || status=$?
    if ((status)); then
      echo "launch/local.sh: process $i ended with status $status" >&2
      ((i == 0)) || tail -n 30 "$logs/process_$i.log" >&2
      exit "$status"
    fi
    unset "running[i]"
  done
done
