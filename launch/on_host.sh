#!/usr/bin/env bash
# Called by the other scripts on a host: runs a command that outlives the connection that started it.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: launch/on_host.sh run ID COMMAND [ARGUMENTS]
       launch/on_host.sh logs LINES
       launch/on_host.sh failed

run starts the command under the name ID, prints its output, and exits with its status. The command
keeps running when the connection breaks. If a command is already running, `run` starts nothing and
follows that one. If ID has already ended, `run` prints its log and exits with its status.

failed exits with the status of the last command if that failed by itself, otherwise with 0.

~/bigalign-launch/ID (or $BIGALIGN_LAUNCH/ID) holds `log` and `status`; `last` links to the newest ID.
HELP
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${BIGALIGN_LAUNCH:-$HOME/bigalign-launch}
case "${1:-}" in
  run) ;;
  failed)
    status=$(cat "$folder/last/status" 2>/dev/null || echo 0)
    case "$status" in 134 | 137 | 143) exit 0 ;; *) exit "$status" ;; esac
    ;;
  logs) exec tail -n "$2" "$folder/last/log" ;;
  *) usage; exit 0 ;;
esac
id=$2
shift 2
lines=+1

mkdir -p "$folder/$id"
exec 9>"$folder/lock"
if [[ ! -e $folder/$id/status ]]; then
  # A command that has written its status is about to release the lock.
  patience=0
  [[ ! -s $folder/last/status ]] || patience=10
  if flock --wait "$patience" 9; then
    : >"$folder/$id/log"
    ln -sfn "$id" "$folder/last"
    # This shell holds the lock until the command ends, and passes SIGTERM on to it.
    # shellcheck disable=SC2016
    setsid bash -c '. "$1"; forward "${@:3}" 9>&-; echo "$status" >"$2/status"' \
      bash "$here/forward.sh" "$folder/$id" "$@" </dev/null >"$folder/$id/log" 2>&1 &
    echo $! >"$folder/$id/pid"
  else
    id=$(readlink "$folder/last")
    lines=20
    echo "launch/on_host.sh: following $id, which is still running" >&2
  fi
fi
exec 9>&-

until [[ -s $folder/$id/pid ]]; do
  sleep 0.1
done
tail -n "$lines" -s 0.2 -f "$folder/$id/log" --pid "$(<"$folder/$id/pid")"
[[ -s $folder/$id/status ]] || {
  echo "launch/on_host.sh: $id was killed" >&2
  exit 137
}
exit "$(<"$folder/$id/status")"
