#!/usr/bin/env bash
# Make demo/model again from nothing: the drawn dataset, the base, and the adapter that train_vton.py trains on it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-runs/demo-model}

.venv/bin/python -m demo.make_dataset --output_dir "$work/dataset" --train 12000 --test 64 --seed 0
.venv/bin/python -m demo.train_base --dataset_root "$work/dataset" --output_dir "$work/base" \
  --vae_steps 1200 --unet_steps 7000 --decoder_steps 1500 --batch_size 16 --learning_rate 8e-4 --seed 0
for part in model_index.json scheduler text_encoder tokenizer unet vae; do
  rm -rf "demo/model/$part"
  mkdir -p demo/model
  cp -r "$work/base/$part" demo/model/
done
.venv/bin/accelerate launch --cpu --num_processes 1 --num_cpu_threads_per_process 2 train_vton.py \
  --pretrained_model_name_or_path demo/model --dataset_root "$work/dataset" --output_dir "$work/adapter" \
  --height 64 --width 48 --cache_latents --train_batch_size 16 --max_train_steps 2200 --learning_rate 2e-3 \
  --lr_warmup_steps 100 --ema_decay 0.999 --guidance_scale 1.5 --seed 0
cp "$work/adapter/vton_adapter.safetensors" demo/model/
.venv/bin/python -m demo.measure
