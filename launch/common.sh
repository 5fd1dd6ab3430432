# Sourced by the other scripts: how they read options, quote words, run or print commands.
# shellcheck shell=bash

# shellcheck disable=SC2034  # of the scripts
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
me=launch/$(basename "$0")
dry_run=

say() {
  echo "$me: $*" >&2
}

fail() {
  say "$@"
  echo "$me -h tells how it is used" >&2
  exit 2
}

# parse "VALUED ..." "SWITCHES ..." WORDS: sets the variable of each option in WORDS, its name with _
# for -, to what follows it or to yes; `words` is what follows --. Calls `usage` for -h.
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
      fail "unknown option $1; what is to run comes after --"
    fi
  done
}

# verbs "VERB ..." WORDS: sets `verb` and `name`, the first two of WORDS.
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

# demand OPTION ...: each was given.
demand() {
  local option variable
  for option; do
    variable=${option//-/_}
    [[ -n ${!variable} ]] || fail "--$option is needed"
  done
}

# number LEAST OPTION ...: each is a whole number, LEAST (0 or 1) or more.
number() {
  local least=$1 option variable
  shift
  for option; do
    variable=${option//-/_}
    if [[ ! ${!variable} =~ ^(0|[1-9][0-9]*)$ ]] || ((${!variable} < least)); then
      fail "--$option ${!variable} is no number from $least on"
    fi
  done
}

# one_of OPTION "VALUE ...": it has one of these.
one_of() {
  local variable=${1//-/_}
  [[ " $2 " == *" ${!variable} "* ]] || fail "--$1 ${!variable}: one of $2"
}

# need TOOL WHERE: it is installed, unless nothing will be run.
need() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || fail "there is no $1 on PATH; $2"
}

# The words in one line that any POSIX shell reads back as they were. `printf %q` would write
# $'...', which a remote login shell need not know.
quote() {
  local word separator='' mark="'" escaped="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=$mark${word//$mark/"$escaped"}$mark
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs the words; prints them instead under --dry-run.
act() {
  if [[ -n $dry_run ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Sets `command`: `$1 train` with the other words, or those alone if they begin with no option.
set_command() {
  local program=$1
  shift
  (($#)) || fail "nothing to run; say it after --"
  command=("$@")
  [[ $1 != -* ]] || command=("$program" train "$@")
}

# Writes an archive of the checkout as it is, without what git ignores, into the file $1.
pack() {
  local list=(git -C "$root" ls-files -z --cached --others --exclude-standard)
  local archive=(tar -C "$root" -czf "$1" --null -T -)
  if [[ -n $dry_run ]]; then
    echo "$(quote "${list[@]}") | $(quote "${archive[@]}")"
    return
  fi
  need git "it tells which files belong to the checkout"
  "${list[@]}" | while IFS= read -r -d '' file; do
    # Deleted files are listed until the deletion is staged.
    [[ ! -e $root/$file && ! -L $root/$file ]] || printf '%s\0' "$file"
  done | "${archive[@]}"
}

# Sets `folder` to a new one; under --dry-run to a word that stands for it.
temporary_folder() {
  folder=FOLDER
  [[ -n $dry_run ]] || folder=$(mktemp -d "${TMPDIR:-/tmp}/bigalign-launch.XXXXXX")
}

# From here on, what the script calls `delete` happens at the end as --delete asks. `where` are the
# options that delete takes besides.
delete_at_end() {
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # A terminal that closes leaves the run alone.
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
    say "$name stays until: $(quote "$me" delete "$name" ${where[@]+"${where[@]}"})"
  fi
  exit "$status"
}
