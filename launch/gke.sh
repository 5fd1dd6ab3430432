#!/usr/bin/env bash
# Runs on TPU slices of a GKE cluster, as a JobSet.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/gke.sh VERB NAME [OPTIONS] [-- ARGUMENTS]

  image   builds launch/Dockerfile from this checkout and pushes it as --image
  yaml    prints the JobSet that run applies
  run     runs `bigalign train ARGUMENTS` on each host, or another command if ARGUMENTS begin with
          one; waits for the end and returns the exit status of the process that failed. If the
          JobSet is already running, it only waits
  logs    prints the last 50 lines of the first host of each slice
  delete  deletes the JobSet
  xpk     submits the same run by xpk, for a cluster that xpk created

  --image IMAGE      REGISTRY/NAME:TAG
  --accelerator A    node label: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, tpu7x, ...
  --topology T       topology of one slice: 4x4, 2x2x4, ...
  --chips-per-host N chips of one host (default 4)
  --slices N         number of slices in the run (default 1)
  --user ID          user of the processes (default 0, root: the device files of TPUs may belong to it).
                     1000 is the user of launch/Dockerfile; it must be able to write the workdir
  --spot             use nodes that may be preempted
  --restarts N       the maximum number of restarts of the whole run (default 100)
  --delete WHEN      delete the JobSet after run: always, failure or never (default)
  --type, --cluster, --zone, --project    for xpk: v5litepod-16 and the address of the cluster
  --dry-run          print the commands and run none

  launch/gke.sh run siglip --image REGISTRY/bigalign:1 --accelerator tpu-v5-lite-podslice \
    --topology 8x8 --spot -- --config=configs/siglip_b16.py --workdir=/mnt/runs/siglip

All processes restart when one ends with 143 (SIGTERM, after its checkpoint), 137 (killed) or 134 (it
lost the others); any other failure ends the run. kubectl must be configured for the cluster, and
JobSet 0.6 or newer must be installed there.
HELP
}

image='' accelerator='' topology='' chips_per_host=4 slices=1 spot='' restarts=100 delete=never
user=0 type='' cluster='' zone='' project='' where=()
verbs "image yaml run logs delete xpk" "$@"
parse "image accelerator topology chips-per-host slices user restarts delete type cluster zone project" \
  spot "${@:3}"
case "$verb" in
  image) demand image ;;
  yaml | run) demand image accelerator topology ;;
  xpk) demand image type cluster zone ;;
esac
case "$verb" in yaml | run | xpk) set_command bigalign ${words[@]+"${words[@]}"} ;; esac
one_of delete "always failure never"
[[ $topology =~ ^([0-9]+(x[0-9]+){1,2})?$ ]] ||
  fail "--topology $topology: expected a shape such as 4x4 or 2x2x4"
number 0 restarts user
number 1 slices chips-per-host

# Prints the word quoted for YAML and for Kubernetes, which replaces $(NAME) and reads $$ as $.
yaml_word() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  word=${word//$'\t'/\\t}
  word=${word//$'\r'/\\r}
  word=${word//\$/\$\$}
  [[ $word != *[[:cntrl:]]* ]] || fail "a JobSet cannot hold a control character: $(quote "$1")"
  echo "\"$word\""
}

# Prints the words as the items of `command:`.
yaml_words() {
  local word
  for word; do
    word=$(yaml_word "$word") || return
    echo "              - $word"
  done
}

# The kernel ignores SIGTERM for the first process of a container until it installs a handler, and the
# program of the user is that process unless the containers of a pod share their processes.
yaml() {
  local chips=$((${topology//x/*})) words node_selector=''
  ((chips % chips_per_host == 0)) ||
    fail "--topology $topology has $chips chips, not a multiple of --chips-per-host $chips_per_host"
  words=$(yaml_words "${command[@]}") || return
  [[ -z $spot ]] || node_selector='
              cloud.google.com/gke-spot: "true"'
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml_word "$name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $((chips / chips_per_host))
        completions: $((chips / chips_per_host))
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: bigalign
              operator: NotIn
              values: [134, 137, 143]
        template:
          spec:
            restartPolicy: Never
            shareProcessNamespace: true
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(yaml_word "$accelerator")
              cloud.google.com/gke-tpu-topology: $topology$node_selector
            tolerations:
            - key: google.com/tpu
              operator: Exists
            - key: cloud.google.com/gke-spot
              operator: Exists
            containers:
            - name: bigalign
              image: $(yaml_word "$image")
              securityContext:
                runAsUser: $user
              resources:
                limits:
                  google.com/tpu: $chips_per_host
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
              command:
$words
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
YAML
}

image() {
  local folder status=0 build
  build=(docker build --tag "$image" --file launch/Dockerfile --build-arg "EXTRAS=tpu gcs" -)
  need docker "install it, https://docs.docker.com/engine/install"
  temporary_folder
  pack "$folder/bigalign.tar.gz"
  if [[ -n $dry_run ]]; then
    echo "$(quote "${build[@]}") <$folder/bigalign.tar.gz"
  else
    "${build[@]}" <"$folder/bigalign.tar.gz" || status=$?
    rm -r "$folder"
    ((status == 0)) || return "$status"
  fi
  act docker push "$image"
}

pods=jobset.sigs.k8s.io/jobset-name=$name

logs() {
  act kubectl logs --selector "$pods,batch.kubernetes.io/job-completion-index=0" --prefix --tail 50
}

delete() {
  act kubectl delete jobset "$name"
}

# Prints the exit status of a process that failed by itself, if there is one, otherwise of a process
# that was interrupted or lost the others.
failed_status() {
  local code status=1
  for code in $(kubectl get pods --selector "$pods" --output \
    'jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}'); do
    case "$code" in
      0) ;;
      134 | 137 | 143) status=$code ;;
      *) status=$code; break ;;
    esac
  done
  echo "$status"
}

# Prints "NAME " during the run, "NAME Completed" or "NAME Failed" after it, and nothing if the JobSet
# does not exist.
terminal_state() {
  kubectl get jobset "$name" --ignore-not-found \
    --output 'jsonpath={.metadata.name} {.status.terminalState}'
}

run() {
  local manifest answer
  manifest=$(yaml)
  if [[ -n $dry_run ]]; then
    printf '%s\n' "kubectl apply --filename - <<'BIGALIGN'" "$manifest" BIGALIGN
    return
  fi
  answer=$(terminal_state)
  [[ -z ${answer#* } ]] ||
    fail "$name has ended: ${answer#* }. Before a new run of this name: $me delete $name"
  kubectl apply --filename - <<<"$manifest"
  delete_at_end
  while true; do
    if answer=$(terminal_state); then
      case "$answer" in
        *Completed) return ;;
        *Failed) logs || true; return "$(failed_status)" ;;
        "") say "$name was deleted"; return 1 ;;
      esac
    fi
    sleep 10
  done
}

run_by_xpk() {
  local line
  line=$(quote "${command[@]}")
  [[ $line != *$'\n'* ]] || fail "xpk cannot pass on a line break: $line"
  local words=(
    xpk workload create --workload "$name" --cluster "$cluster" --zone "$zone" --tpu-type "$type"
    --num-slices "$slices" --docker-image "$image" --max-restarts "$restarts"
    --termination-grace-period-seconds 300
  )
  [[ -z $project ]] || words+=(--project "$project")
  [[ -z $spot ]] || words+=(--spot)
  # xpk writes the command into a script of its own, which sends SIGTERM to the subshell that runs it;
  # `exec` makes this the command itself. Kubernetes reads $$ as $ and replaces $(NAME).
  act "${words[@]}" --command "exec ${line//\$/\$\$}"
}

case "$verb" in
  image) image ;;
  yaml) yaml ;;
  xpk)
    need xpk "pip install xpk, in a separate environment"
    run_by_xpk
    ;;
  *)
    need kubectl "install it, https://kubernetes.io/docs/tasks/tools"
    "$verb"
    ;;
esac
