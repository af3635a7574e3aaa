#!/usr/bin/env bash
# Makes the artifacts that come with the package, with the library's own commands, from the packaged images.
#     bash examples/make_embedded_artifacts.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=${WORK:-runs/artifacts}
zoo=src/diffusion_sae/zoo/artifacts
extract() { diffusion-sae extract fashion-mnist-mini "$work/$2/$1" --split "$1" --layers up_ft1 --timesteps 50 --pooling "$2" --batch-size 100; }

for split in train validation test; do extract "$split" mean; done
extract train tokens
diffusion-sae train "$work/tokens/train" --output-dir "$work/tiny-sd-up1-t50" --expansion-factor 16 --k 16 \
  --learning-rate 1e-3 --warmup-steps 50 --batch-size 1024 --num-train-epochs 20 --dead-after-rows 100000
diffusion-sae probe "$work/mean/train" --validation-store "$work/mean/validation" --test-store "$work/mean/test" \
  --output-dir "$work/tiny-sd-up1-t50-fashion-mnist"
for name in tiny-sd-up1-t50 tiny-sd-up1-t50-fashion-mnist; do
  mkdir -p "$zoo/$name" hub_cards
  for file in config.json model.safetensors extractor_config.json metrics.json README.md preprocessor_config.json; do
    if [ -e "$work/$name/$file" ]; then cp "$work/$name/$file" "$zoo/$name/"; fi
  done
  cp "$work/$name/README.md" "hub_cards/$name.md"
done
