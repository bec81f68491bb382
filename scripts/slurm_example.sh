#!/usr/bin/env bash
# A training that a Slurm cluster may stop and start again. Submit it from the project's folder:
#   sbatch scripts/slurm_example.sh RUN_FOLDER [flags of train.py]
# For several GPUs of one machine (here 4): PROCESSES=4 sbatch --gres=gpu:4 scripts/slurm_example.sh ...
# Checkpoints and logs go to RUN_FOLDER. Slurm sends SIGTERM 180 s before the time is over; train.py
# then saves interrupted.pth.tar, and the job queues again. Its next start goes on from the newest whole
# checkpoint, also after a crash of the machine.
#SBATCH --job-name=train
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
set -euo pipefail
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  echo "use: sbatch scripts/slurm_example.sh RUN_FOLDER [flags of train.py]" >&2
  exit 2
fi
run=$1
shift
# Slurm runs a copy of this file, so its own place does not tell where the project is.
cd "${SLURM_SUBMIT_DIR:-.}"
[ -f train.py ] || { echo "error: submit it from the project's folder" >&2; exit 1; }
source scripts/environment.sh
command=("$PYTHON")
[ "${PROCESSES:-1}" -eq 1 ] ||
  command+=(-m torch.distributed.run --standalone --nproc_per_node="$PROCESSES")

"${command[@]}" train.py --model_name "$run" --logger_name "$run" --resume auto --keep 3 "$@" &
training=$!
stopped=
stop() {
  kill -TERM "$training" 2> /dev/null || true
  stopped=yes
}
trap stop TERM
await() { # sets code
  code=0
  wait "$training" || code=$?
}
await
while kill -0 "$training" 2> /dev/null; do await; done # each signal ends a wait
if [ -n "$stopped" ]; then
  await # again: the code of the training, not of the signal
  if [ "$code" -ne 0 ]; then
    echo "the training was stopped: it queues again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
