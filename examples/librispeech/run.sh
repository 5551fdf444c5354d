#!/usr/bin/env bash
# LibriSpeech from the archives to a scored model with its card.
#
#   examples/librispeech/run.sh [--setup 8gpu|24gb] [--data DIR] [--work DIR] [--gpus N] [--gpu NAME] [--download] [--slurm] [key=value ...]
#
# --setup     recipes in examples/librispeech/SETUP: 8 GPUs of 80 GB with Llama-3.1-8B (default), or one of 24 GB with Qwen2.5-1.5B
# --data      holds LibriSpeech/train-clean-100, ... as the archives unpack (default: data)
# --work      gets shards, model and scores (default: runs/librispeech)
# --download  fetch and unpack the archives first (60 GB, and 60 GB unpacked)
# --slurm     submit the three stages with slurm/chain.sh and end; run the same command without it for the scores
# key=value   for all three recipes
# An interrupted run continues with the same command: finished parts are recognised by the tools themselves.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../.."

SETUP=8gpu DATA=data WORK=runs/librispeech GPUS="" GPU="" DOWNLOAD=0 SLURM=0 OVERRIDES=()
usage() { sed -n '2,/^# An interrupted/p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
    case $1 in
        --setup) SETUP=${2:?--setup needs 8gpu or 24gb}; shift ;;
        --data) DATA=${2:?--data needs a folder}; shift ;;
        --work) WORK=${2:?--work needs a folder}; shift ;;
        --gpus) GPUS=${2:?--gpus needs a number}; shift ;;
        --gpu) GPU=${2:?--gpu needs a name, e.g. a100-80}; shift ;;
        --download) DOWNLOAD=1 ;;
        --slurm) SLURM=1 ;;
        -h|--help) usage; exit 0 ;;
        -*) echo "error: option $1 is not known; see examples/librispeech/run.sh --help" >&2; exit 2 ;;
        *=*) OVERRIDES+=("$1") ;;
        *) echo "error: '$1' is neither an option nor key=value; see examples/librispeech/run.sh --help" >&2; exit 2 ;;
    esac
    shift
done
case $SETUP in
    8gpu) GPUS=${GPUS:-8} GPU=${GPU:-a100-80} ;;
    24gb) GPUS=${GPUS:-1} GPU=${GPU:-rtx4090} ;;
    *) echo "error: --setup $SETUP: write 8gpu or 24gb" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python}
CORPUS=$DATA/LibriSpeech
export LIBRISPEECH_SHARDS=$WORK/shards
mkdir -p "$WORK"
WORKERS=$(nproc)

step() { printf '\n== %s\n' "$*"; }

if [ "$DOWNLOAD" = 1 ]; then
    step "download and unpack"
    mkdir -p "$DATA"
    for name in train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other; do
        [ -d "$CORPUS/$name" ] && continue
        curl -fL -C - -o "$DATA/$name.tar.gz" "https://www.openslr.org/resources/12/$name.tar.gz"
        tar xzf "$DATA/$name.tar.gz" -C "$DATA"
    done
fi
[ -d "$CORPUS" ] || { echo "error: $CORPUS does not exist: give --data, or --download" >&2; exit 2; }

step "pack"
pack() { "$PYTHON" data_tools/pack.py --normalise sentence --workers "$WORKERS" "$@"; }
pack --corpus "librispeech:$CORPUS" --out "$WORK/shards/train"
pack --corpus "librispeech:$CORPUS,subset=dev-clean+dev-other" --out "$WORK/shards/valid"
pack --corpus "librispeech:$CORPUS,subset=test-clean" --out "$WORK/shards/test-clean"
pack --corpus "librispeech:$CORPUS,subset=test-other" --out "$WORK/shards/test-other"
# Stage 3: the same audio with many wordings of the instruction.
[ -f "$WORK/instructions.jsonl" ] || "$PYTHON" -m data_tools.instruct wrap --task asr --normalise sentence \
    --corpus "librispeech:$CORPUS,subset=train-clean-100" --out "$WORK/instructions.jsonl"
pack --manifest "$WORK/instructions.jsonl" --out "$WORK/shards/instructions"

step "plan for $GPUS x $GPU"
RECIPES=examples/librispeech/$SETUP
for number in 1 2 3; do
    "$PYTHON" -m train.run "$RECIPES/stage$number.yaml" --dry-run --gpus "$GPUS" --gpu "$GPU" "output=$WORK/model" \
        "${OVERRIDES[@]}"
done | tee "$WORK/plan.txt"

if [ "$SLURM" = 1 ]; then
    step "submit"
    exec slurm/chain.sh --recipes "$RECIPES" "output=$WORK/model" "${OVERRIDES[@]}"
fi

if [ "$GPUS" = 1 ]; then
    TRAIN=("$PYTHON" -m train.run) EVALUATE=("$PYTHON" -m evaluation.run)
else
    TRAIN=(deepspeed --num_gpus "$GPUS" train/run.py)
    EVALUATE=(torchrun --standalone --nproc-per-node "$GPUS" -m evaluation.run)
fi
for number in 1 2 3; do
    step "stage $number"
    "${TRAIN[@]}" "$RECIPES/stage$number.yaml" "output=$WORK/model" "${OVERRIDES[@]}"
done

step "evaluate"
"${EVALUATE[@]}" --model "$WORK/model/sft/model" --task asr \
    --shards "$WORK/shards/test-clean" "$WORK/shards/test-other"

step "export with its model card"
"$PYTHON" -m model.export "$WORK/model/sft" --out "$WORK/export" --hub-layout
echo "model card: $WORK/export/README.md"
