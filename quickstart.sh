#!/usr/bin/env bash
# Command 1: set-up, sample scans (or your own: ./quickstart.sh /path/to/scans), a short pre-training, pictures.
set -euo pipefail
if [ $# -gt 1 ] || [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  echo "usage: ./quickstart.sh [/path/to/CT/scans]" >&2
  exit 2
fi
scans=${1:+$(realpath "$1")}
cd "$(dirname "$0")"
. ./setup.sh

if [ -z "$scans" ]; then
  python -m tools sample_data --output_dir data/sample_ct --kind ct_abdomen --cases 16
  scans=data/sample_ct/imagesTr
fi
configs=bundles/hybridmim_pretrain/configs
run=runs/quickstart
python -m monai.bundle run training \
  --config_file "['$configs/train.yaml','$configs/small.yaml']" \
  --bundle_root bundles/hybridmim_pretrain --dataset_dir "$scans" \
  --output_dir $run --ckpt_dir $run/models \
  --batch_size 2 --crops_per_volume 3 --val_fraction 0.2
python -m tools figures $run/metrics.csv $run/figures/curves.png

cat <<END

pictures:  $(find $run/figures -name 'reconstruction_epoch=*.png' | sort | tail -n 1)   input, masked, reconstruction, error
           $run/figures/curves.png   every loss term, and the metrics beside chance
metrics:   $run/metrics.csv
weights:   $run/models/backbone.pt   loads into monai.networks.nets.BasicUNet (README.md says how)
END
