#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/gke.sh VERB NAME [OPTIONS] [-- ARGUMENTS]

  image   builds launch/Dockerfile from this checkout and pushes it as --image
  yaml    prints the JobSet that run applies
  run     runs `bigalign train ARGUMENTS`, or another command if ARGUMENTS begin with one, on each
          host, waits for the end and comes back with the exit status of what failed; called again
          while it runs, it waits on
  logs    the last 50 lines of each first host
  delete  removes the JobSet
  xpk     hands the same run to xpk, for a cluster that xpk made

  --image IMAGE      REGISTRY/NAME:TAG
  --accelerator A    label of the nodes: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, tpu7x, ...
  --topology T       of a slice: 4x4, 2x2x4, ...
  --chips-per-host N 4
  --slices N         how many slices work together; 1
  --spot             on nodes that may be taken away
  --restarts N       how often all begin anew; 100
  --delete WHEN      removes the JobSet after run: always, failure or never, the default
  --type, --cluster, --zone, --project    for xpk: v5litepod-16 and where the cluster is
  --dry-run          prints the commands and runs none

  launch/gke.sh run siglip --image REGISTRY/bigalign:1 --accelerator tpu-v5-lite-podslice \
    --topology 8x8 --spot -- --config=configs/siglip_b16.py --workdir=/mnt/runs/siglip

All begin anew when a process ends with 143 (SIGTERM, after its checkpoint), 137 (killed) or 134 (it
lost the others); what else fails ends the run. kubectl must be set to the cluster, and JobSet 0.6 or
newer be installed there.
HELP
}

image='' accelerator='' topology='' chips_per_host=4 slices=1 spot='' restarts=100 delete=never
type='' cluster='' zone='' project='' where=()
verbs "image yaml run logs delete xpk" "$@"
parse "image accelerator topology chips-per-host slices restarts delete type cluster zone project" \
  spot "${@:3}"
case "$verb" in
  image) demand image ;;
  yaml | run) demand image accelerator topology ;;
  xpk) demand image type cluster zone ;;
esac
case "$verb" in yaml | run | xpk) set_command bigalign ${words[@]+"${words[@]}"} ;; esac
one_of delete "always failure never"
[[ $topology =~ ^([0-9]+(x[0-9]+){1,2})?$ ]] || fail "--topology $topology is no 4x4 or 2x2x4"
number 0 restarts
number 1 slices chips-per-host

# The word as YAML and Kubernetes read it back: there, $(NAME) would be replaced, and $$ stands for $.
yaml_word() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  word=${word//$'\t'/\\t}
  word=${word//$'\r'/\\r}
  word=${word//\$/\$\$}
  [[ $word != *[[:cntrl:]]* ]] || fail "a control character in $(quote "$1")"
  echo "\"$word\""
}

# The items of `command:`.
yaml_words() {
  local word
  for word; do
    word=$(yaml_word "$word") || return
    echo "              - $word"
  done
}

yaml() {
  local chips=$((${topology//x/*})) words node_selector=''
  ((chips % chips_per_host == 0)) ||
    fail "--topology $topology are $chips chips, which --chips-per-host $chips_per_host cannot share"
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
  need docker "https://docs.docker.com/engine/install tells how to get it"
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

# Prints the exit status of the process that failed: of those that did not only miss the others, if
# there is such a one.
failed_status() {
  local code found=1
  for code in $(kubectl get pods --selector "$pods" --output \
    'jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}'); do
    case "$code" in
      0) ;;
      134 | 137 | 143) found=$code ;;
      *) found=$code; break ;;
    esac
  done
  echo "$found"
}

# "NAME " while it runs, then "NAME Completed" or "NAME Failed"; nothing if there is no such JobSet.
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
  [[ -z ${answer#* } ]] || fail "$name has ended: ${answer#* }; $me delete $name makes room for another"
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
  [[ $line != *$'\n'* ]] || fail "xpk cannot carry a line break: $line"
  local words=(
    xpk workload create --workload "$name" --cluster "$cluster" --zone "$zone" --tpu-type "$type"
    --num-slices "$slices" --docker-image "$image" --max-restarts "$restarts"
    --termination-grace-period-seconds 300
  )
  [[ -z $project ]] || words+=(--project "$project")
  [[ -z $spot ]] || words+=(--spot)
  # Kubernetes reads $$ as $, and $(NAME) as a variable of its own.
  act "${words[@]}" --command "${line//\$/\$\$}"
}

case "$verb" in
  image) image ;;
  yaml) yaml ;;
  xpk)
    need xpk "pip install xpk, in an environment of its own"
    run_by_xpk
    ;;
  *)
    need kubectl "https://kubernetes.io/docs/tasks/tools tells how to get it"
    "$verb"
    ;;
esac
