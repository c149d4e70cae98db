#!/bin/bash
# The whole way on a cluster: pack in parallel, join, bias pass, train, evaluate; each job starts
# when the one before has succeeded. Run it on a login node, in the project's folder:
#
#   slurm/pipeline.sh --data data/genres_original --shards shards/gtzan --run runs/gtzan \
#       --preset gtzan --gpu "--nodes=2 --gpus-per-node=4 --ntasks-per-node=4"
#
#   --data DIR       folder or table of tracks
#   --shards DIR     folder for the shards
#   --run DIR        run folder
#   --preset NAME, --config FILE   for every command: each reads its own section
#   --parts N        jobs that pack, as one array (4)
#   --cpu "FLAGS"    flags of sbatch for packing, such as "--partition=cpu --cpus-per-task=32"
#   --gpu "FLAGS"    flags of sbatch for the other jobs
#   -- FLAGS         what follows goes to mgc_dist.train
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }

data='' shards='' run='' parts=4 common=() cpu=() gpu=()
while [ $# -gt 0 ]; do
    [ "$1" = -- ] && { shift; break; }
    [ $# -ge 2 ] || usage
    case $1 in
        --data) data=$2 ;;
        --shards) shards=$2 ;;
        --run) run=$2 ;;
        --parts) parts=$2 ;;
        --preset | --config) common+=("$1" "$2") ;;
        --cpu) read -ra cpu <<<"$2" ;;
        --gpu) read -ra gpu <<<"$2" ;;
        *) usage ;;
    esac
    shift 2
done
[ -n "$data" ] && [ -n "$shards" ] && [ -n "$run" ] || usage

after=
submit() {  # submit NAME SBATCH-WORDS...: prints a line, and sets `after` to the job's number
    local name=$1 wait=()
    shift
    [ -z "$after" ] || wait=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable --job-name="mgc-$name" ${wait[@]+"${wait[@]}"} "$@")
    job=${job%%;*}  # a federation adds the cluster's name
    printf '%-9s %s%s\n' "$name" "$job" "${after:+  after $after}"
    after=$job
    jobs+=("$job")
}

jobs=()
pack=(slurm/run.sbatch -m mgc_dist.shard ${common[@]+"${common[@]}"} --data "$data" --out "$shards")
cpu=(--gpus-per-node=0 ${cpu[@]+"${cpu[@]}"})
gpu=(${gpu[@]+"${gpu[@]}"})
submit pack --array="1-$parts" "${cpu[@]}" "${pack[@]}" --part "%a/$parts"
submit join "${cpu[@]}" "${pack[@]}" --join
submit bias ${gpu[@]+"${gpu[@]}"} slurm/run.sbatch -m mgc_dist.bias \
    ${common[@]+"${common[@]}"} --shards "$shards"
submit train ${gpu[@]+"${gpu[@]}"} slurm/train.sbatch \
    ${common[@]+"${common[@]}"} --shards "$shards" --run "$run" "$@"
submit evaluate ${gpu[@]+"${gpu[@]}"} slurm/run.sbatch -m mgc_dist.evaluate \
    "$run" ${common[@]+"${common[@]}"}

echo
echo "follow:   squeue --jobs=$(IFS=,; echo "${jobs[*]}")"
echo "          tail -F $run/train.log; each job also writes mgc-NAME-JOB.out here"
echo "stop:     scancel ${jobs[*]}"
echo "result:   $run/report.html"
