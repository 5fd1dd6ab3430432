#!/usr/bin/env bash
# What a host needs before it can train.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/setup_host.sh [--extras "EXTRA ..."] [--tests] [--dry-run]

Makes .venv in this checkout with the package and its dependencies, at the versions of
.ci/constraints.txt. Does nothing where that is done already.

  --extras EXTRAS  tpu or cuda for JAX on that device; others are in pyproject.toml
  --tests          also what the tests need
  --dry-run        prints the commands and runs none

On Debian and Ubuntu it installs make and a Python >= 3.11 with venv first if they are missing, which
takes root or sudo without a password. Elsewhere they must be there.
HELP
}

extras=
tests=
parse "extras" "tests" "$@"
((${#words[@]} == 0)) || fail "nothing comes after --"

# The first interpreter that is new enough and can make environments.
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
    fail "make and a Python >= 3.11 with venv are needed, and here is no apt-get to install them"
  [[ $(id -u) == 0 ]] || apt=(sudo -n "${apt[@]}")
  # Ubuntu 22.04, which the Cloud TPU images are, has 3.10 as python3, and 3.11 beside it.
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
