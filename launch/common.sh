# Sourced by the other scripts: reads options, quotes words, runs or prints commands.
# shellcheck shell=bash

# shellcheck disable=SC2034  # the scripts use it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
me=launch/$(basename "$0")
dry_run=

say() {
  echo "$me: $*" >&2
}

fail() {
  say "$@"
  echo "$me -h shows the usage" >&2
  exit 2
}

# parse "VALUED ..." "SWITCHES ..." WORDS: sets one variable per option in WORDS, to the value of the
# option or to yes. The variable has the name of the option, with _ for -. The array `words` gets
# everything after --. -h calls `usage` and exits.
parse() {
  local valued=" $1 " switches=" $2 dry-run " key
  shift 2
  words=()
  while (($#)); do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --) shift; words=("$@"); return ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    key=${1#--}
    if [[ $1 == --* && $valued == *" $key "* ]]; then
      (($# > 1)) || fail "$1 needs a value"
      printf -v "${key//-/_}" %s "$2"
      shift 2
    elif [[ $1 == --* && $switches == *" $key "* ]]; then
      printf -v "${key//-/_}" yes
      shift
    else
      fail "unknown option $1; put the arguments of the run after --"
    fi
  done
}

# verbs "VERB ..." WORDS: sets `verb` and `name` to the first two WORDS, and checks them.
verbs() {
  local known=$1
  shift
  case "${1:-}" in "" | -h | --help) usage; exit 0 ;; esac
  [[ " $known " == *" $1 "* ]] || fail "unknown verb $1; known: $known"
  # shellcheck disable=SC2034
  verb=$1
  [[ ${2:-} =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "$1 needs a NAME of lower-case letters, digits and -, not '${2:-}'"
  # shellcheck disable=SC2034
  name=$2
}

# demand OPTION ...: fails unless each option was given.
demand() {
  local option variable
  for option; do
    variable=${option//-/_}
    [[ -n ${!variable} ]] || fail "--$option is needed"
  done
}

# number LEAST OPTION ...: fails unless each option is a whole number >= LEAST (0 or 1).
number() {
  local least=$1 option variable
  shift
  for option; do
    variable=${option//-/_}
    if [[ ! ${!variable} =~ ^(0|[1-9][0-9]*)$ ]] || ((${!variable} < least)); then
      fail "--$option ${!variable}: expected a whole number >= $least"
    fi
  done
}

# one_of OPTION "VALUE ...": fails unless the option has one of these values.
one_of() {
  local variable=${1//-/_}
  [[ " $2 " == *" ${!variable} "* ]] || fail "--$1 ${!variable}: expected one of: $2"
}

# need TOOL ADVICE: fails with ADVICE unless TOOL is installed. --dry-run needs no tool.
need() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || fail "$1 is not on PATH: $2"
}

# Prints the words as one line that any POSIX shell splits into the same words. `printf %q` would
# write $'...', which not every remote login shell supports.
quote() {
  local word separator='' mark="'" escaped="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=$mark${word//$mark/"$escaped"}$mark
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs the words as a command. Under --dry-run, prints the command instead.
act() {
  if [[ -n $dry_run ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Sets `command`: `$1 train` and the other words, or only the other words if the first one is not an
# option.
set_command() {
  local program=$1
  shift
  (($#)) || fail "nothing to run: put the arguments or a command after --"
  command=("$@")
  [[ $1 != -* ]] || command=("$program" train "$@")
}

# Writes the working tree, uncommitted changes included and ignored files excluded, to the archive $1.
pack() {
  local list=(git -C "$root" ls-files -z --cached --others --exclude-standard)
  local archive=(tar -C "$root" -czf "$1" --null -T -)
  if [[ -n $dry_run ]]; then
    echo "$(quote "${list[@]}") | $(quote "${archive[@]}")"
    return
  fi
  need git "it lists the files of the checkout"
  "${list[@]}" | while IFS= read -r -d '' file; do
    # git lists a deleted file until the deletion is staged.
    [[ ! -e $root/$file && ! -L $root/$file ]] || printf '%s\0' "$file"
  done | "${archive[@]}"
}

# Sets `folder` to a new temporary folder, or to the placeholder FOLDER under --dry-run.
temporary_folder() {
  folder=FOLDER
  [[ -n $dry_run ]] || folder=$(mktemp -d "${TMPDIR:-/tmp}/bigalign-launch.XXXXXX")
}

# Installs traps so that the script calls its function `delete` on exit, if --delete asks for that.
# `where` holds the other options that the verb delete takes.
delete_at_end() {
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # Closing the terminal must not delete the run.
  trap 'trap - EXIT; exit 129' HUP
}

# shellcheck disable=SC2154
finish() {
  local status=$?
  trap - EXIT
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null || true
  if [[ $delete == always || $delete == failure && $status != 0 ]]; then
    delete || say "could not delete $name, which may still cost money"
  elif [[ -z $dry_run ]]; then
    say "$name was not deleted. Delete it: $(quote "$me" delete "$name" ${where[@]+"${where[@]}"})"
  fi
  exit "$status"
}
