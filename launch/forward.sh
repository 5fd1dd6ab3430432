#!/usr/bin/env bash
# Runs a command and passes signals on to it: launch/forward.sh COMMAND [ARGUMENTS]
#
# A shell that runs a command in the foreground keeps SIGTERM for itself: without a trap it ends before the
# command has saved its checkpoint, and with a trap it waits until the command ends by itself. Schedulers
# may send SIGTERM to the shell alone or to its whole process group, so both must reach the command.
#
# slurm.sh and on_host.sh source this file. It is also the first process of the container: the kernel
# ignores SIGTERM for that process until it installs a handler, which a program does late.

# forward COMMAND [ARGUMENTS]: runs the command in the background, passes signals on to it, waits for its
# end, and sets `status` to its exit status. After a signal to the process group the command gets the
# signal twice.
forward() {
  local child='' early='' signal ended='' found
  status=143
  for signal in HUP INT QUIT TERM USR1 USR2; do
    # shellcheck disable=SC2064  # the name of the signal is expanded now
    trap "if [[ \$child ]]; then kill -$signal \"\$child\" 2>/dev/null; else early=$signal; fi" "$signal"
  done
  # Without job control bash lets background commands ignore SIGINT and SIGQUIT and read /dev/null.
  (trap - INT QUIT; exec "$@") <&0 &
  child=$!
  [[ -z $early ]] || kill "-$early" "$child" 2>/dev/null
  # A trap ends `wait` before the command ends. Once the command has ended, `wait` returns its status again.
  until [[ $ended ]]; do
    kill -0 "$child" 2>/dev/null || ended=yes
    found=0
    wait "$child" || found=$?
    # bash loses the status (-1) if a trap runs just when the command ends; then that of the signal counts.
    ((found < 0)) || status=$found
  done
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  forward "$@"
  exit "$status"
fi
