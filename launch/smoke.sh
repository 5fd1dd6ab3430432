#!/usr/bin/env bash
# Sets up a fresh host and measures it.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/smoke.sh [--extras "EXTRA ..."] [--json FILE] [--dry-run] [-- ARGUMENTS]

Runs launch/setup_host.sh, then `bigalign benchmark ARGUMENTS`: a training step, the loader, embedding
and an evaluation of a B/16 on this host's TPUs or GPUs, or of a small model on its CPUs. It takes a few
minutes and needs no data. Paste FILE, which holds no path and no name of a host, where results are
collected.

  --extras EXTRAS  of setup_host.sh (default: tpu or cuda for the devices of this host)
  --json FILE      where the figures are written (default smoke.json)
  --dry-run        print the commands and run none

  launch/smoke.sh -- --config=clip_b16 --batch=1024
HELP
}

extras='' json=smoke.json
parse "extras json" "" "$@"

# Prints the extra for the devices of this host, which nothing has to be installed to see.
devices() {
  local path
  for path in /dev/accel[0-9]* /dev/vfio/[0-9]*; do
    [[ ! -e $path ]] || { echo tpu; return; }
  done
  ! command -v nvidia-smi >/dev/null || echo cuda
}

: "${extras:=$(devices)}"
act "$root/launch/setup_host.sh" --extras "$extras"
act "$root/.venv/bin/bigalign" benchmark "--json=$json" ${words[@]+"${words[@]}"}
