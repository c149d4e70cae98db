# shellcheck shell=bash disable=SC2034
# What the batch scripts share. Sourced by them, and never submitted.
#
#   VENV        virtual environment (.venv)
#   CONTAINER   words before python, such as "apptainer exec --nv mgc.sif"; if they begin with --,
#               flags of srun, such as "--container-image=mgc.sqsh"; python is the container's then

cd "$SLURM_SUBMIT_DIR" || exit 2

# A job of an array has two numbers. The last one's is the array's: to Slurm it means all of them.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

words=("${@//%a/${SLURM_ARRAY_TASK_ID:-}}")  # what follows the script's name, for python

python=("${VENV:-.venv}/bin/python" -u)
srun=(srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
case ${CONTAINER:-} in
    "") ;;
    --*) # shellcheck disable=SC2206 # words on purpose
        srun+=($CONTAINER) ;;
    *) # shellcheck disable=SC2206
        python=($CONTAINER "${python[@]}") ;;
esac
[ -z "${CONTAINER:-}" ] || [ -n "${VENV:-}" ] || python[-2]=python

# Below Linux's ephemeral ports; jobs that share a node differ, and so do the tries of one job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 10000))
export MASTER_ADDR MASTER_PORT
