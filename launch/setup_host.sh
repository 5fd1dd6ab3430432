#!/usr/bin/env bash
# Installs on a host what training needs.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/setup_host.sh [--extras "EXTRA ..."] [--tests] [--dry-run]

Creates .venv in this checkout with the package and its dependencies, at the versions in
.ci/constraints.txt. Does nothing if that is already done.

  --extras EXTRAS  tpu or cuda for JAX on that device; pyproject.toml lists the others
  --tests          also install the test dependencies
  --dry-run        print the commands and run none

On Debian and Ubuntu it first installs make and a Python >= 3.11 with venv if they are missing, which
needs root, or sudo without a password. On other systems they must already be installed.
HELP
}

extras=
tests=
parse "extras" "tests" "$@"
((${#words[@]} == 0)) || fail "this script takes no arguments after --"

# Prints the first interpreter that is new enough and can create virtual environments.
find_python() {
  for python in python3 python3.11 python3.12 python3.13 python3.14; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
      echo "$python" && return
  done
  return 1
}

install_system_packages() {
  local python=python3 apt=(env DEBIAN_FRONTEND=noninteractive
    apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  command -v apt-get >/dev/null ||
    fail "make and a Python >= 3.11 with venv are needed, and there is no apt-get to install them"
  [[ $(id -u) == 0 ]] || apt=(sudo -n "${apt[@]}")
  # On Ubuntu 22.04, the system of the Cloud TPU images, python3 is 3.10; 3.11 is another package.
  if command -v python3 >/dev/null && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
  then
    python=python3.11
  fi
  act "${apt[@]}" update
  act "${apt[@]}" install -y ca-certificates make "$python" "$python-venv"
}

if ! command -v make >/dev/null || ! find_python >/dev/null; then
  install_system_packages
fi
act make -C "$root" "$([[ -n $tests ]] && echo install || echo base)" "EXTRAS=$extras"
