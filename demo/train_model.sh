#!/usr/bin/env bash
# Make the demo's models again from nothing: the drawn datasets, the base, the networks that recognise and parse, and the adapter
# that train_vton.py trains on the base.
#
#     bash demo/train_model.sh [WORK [MODEL [CLASSIFIER]]]
#
# WORK (default runs/demo-model) holds every stage's results; the same command goes on where a killed one stopped, and finished
# stages are skipped: remove a stage's folder to run it again. At the end they are copied to MODEL (default demo/model) and
# CLASSIFIER (default demo/classifier) and measured. The numbers below are for a GPU, and can be set in the
# environment: on a CPU, where they would take days, begin with BATCH=8 ADAPTER_BATCH=8 UNET_STEPS=10000 UNET_RATE=8e-4 WORKERS=0.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/demo-model} model=${2:-demo/model} classifier=${3:-demo/classifier}
python=.venv/bin/python
: "${HEIGHT:=128}" "${TRAIN:=9000}" "${TEST:=96}"
: "${PARSER_TRAIN:=1500}" "${PARSER_TEST:=64}" "${PARSER_STEPS:=2500}"
: "${BATCH:=128}" "${VAE_STEPS:=1000}" "${UNET_STEPS:=3500}" "${UNET_RATE:=1e-3}" "${DECODER_STEPS:=2000}"
: "${CLASSIFIER:=--train 48000 --epochs 16 --batch_size 128}"
: "${ADAPTER_BATCH:=96}" "${ADAPTER_STEPS:=500}" "${ADAPTER_RATE:=1.2e-3}" "${FINISH_STEPS:=1500}" "${WORKERS:=8}"
: "${CHECKPOINT_EVERY:=250}" "${LINES:=64}" "${STEPS:=50}"
precision=$($python -c 'from demo.try_on import mixed_precision; print(mixed_precision())')
words=$($python -c "from benchmarks.launch import launch; print(*launch('train_vton.py', precision='$precision'), sep='\n')")
mapfile -t launch <<<"$words"

stage() { # NAME PROOF COMMAND...: the command writes the proof when it has finished
  echo "== $1"
  [ -e "$2" ] || "${@:3}"
}

drawn() { # FOLDER FLAGS...
  rm -rf "$1.unfinished"
  $python -m demo.make_dataset --output_dir "$1.unfinished" --height "$HEIGHT" "${@:2}"
  mv "$1.unfinished" "$1"
}

base() {
  $python -m demo.train_base --dataset_root "$work/dataset" --output_dir "$work/base" \
    --vae_steps "$VAE_STEPS" --unet_steps "$UNET_STEPS" --decoder_steps "$DECODER_STEPS" \
    --batch_size "$BATCH" --learning_rate "$UNET_RATE" --mixed_precision "$precision" \
    --checkpointing_steps "$CHECKPOINT_EVERY" --seed 0
}

classifier() {
  $python -m demo.train_classifier --output_dir "$work/classifier" --height "$HEIGHT" $CLASSIFIER
}

parser() { # seeds of its own; VITON-HD's labels tell the neck from the face, DressCode's do not
  $python -m demo.train_parser --dataset_root "$work"/parser-data/*/ --output_dir "$work/parser" \
    --height "$HEIGHT" --width $((HEIGHT * 3 / 4)) --train_steps "$PARSER_STEPS" \
    --checkpointing_steps "$CHECKPOINT_EVERY" --seed 0
}

attention() { # FOLDER FLAGS...: self-attention alone, of all categories, averaged weights, masks that do not tell the cut
  "${launch[@]}" --pretrained_model_name_or_path "$work/base" --dataset_root "$work/dataset" --output_dir "$1" \
    --height "$HEIGHT" --width $((HEIGHT * 3 / 4)) --augment mask flip --guidance_scale 1.5 --dataloader_num_workers "$WORKERS" \
    --validation_steps "$CHECKPOINT_EVERY" --checkpointing_steps "$CHECKPOINT_EVERY" --checkpoints_total_limit 2 \
    --resume_from_checkpoint latest --seed 0 "${@:2}"
}

adapter() { # with DREAM (arXiv:2312.00210)
  attention "$work/adapter" --dream_detail_preservation 10 --train_batch_size "$ADAPTER_BATCH" --max_train_steps "$ADAPTER_STEPS" \
    --learning_rate "$ADAPTER_RATE" --lr_warmup_steps "$((ADAPTER_STEPS / 12))" --ema_decay 0.99
}

finish() { # small batches, a small rate
  attention "$work/finish" --init_adapter "$work/adapter" --train_batch_size 8 --max_train_steps "$FINISH_STEPS" \
    --learning_rate 3e-4 --lr_warmup_steps "$((FINISH_STEPS / 75))" --ema_decay 0.995
}

stage dataset "$work/dataset" drawn "$work/dataset" --category all --train "$TRAIN" --test "$TEST" --seed 0
stage base "$work/base/model_index.json" base
stage classifier "$work/classifier/config.json" classifier
for category in upper lower dress; do
  data=$work/parser-data/$category
  stage "parser's $category" "$data" drawn "$data" --category $category --train "$PARSER_TRAIN" --test "$PARSER_TEST" --seed 21
done
stage parser "$work/parser/model.safetensors" parser
stage adapter "$work/adapter/vton_adapter.safetensors" adapter
stage finish "$work/finish/vton_adapter.safetensors" finish

mkdir -p "$model" "$classifier"
for part in model_index.json scheduler text_encoder tokenizer unet vae; do
  rm -rf "${model:?}/$part"
  cp -r "$work/base/$part" "$model/"
done
# With the base's name in its metadata that it has from here on.
$python - "$work/finish/vton_adapter.safetensors" "$model" <<'PYTHON'
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

trained, model = map(Path, sys.argv[1:])
with safe_open(trained, "pt") as file:
    save_file(load_file(trained), model / trained.name, file.metadata() | {"base_model": "demo/model"})
PYTHON
cp "$work/classifier/"* "$classifier/"
$python -m demo.train_parser --output_dir "$work/parser" --install "$model"
$python -m demo.measure --model "$model" --classifier "$classifier" --output_dir "$work/measure" \
  --lines "$LINES" --num_inference_steps "$STEPS" --by
