#!/usr/bin/env bash
# Command 1: set-up, sample scans, a short pre-training, a bundle for their organs, fine-tuning with and without it.
# With a folder of scans (./quickstart.sh /path/to/CT/scans): pre-training on these scans.
set -euo pipefail
if [ $# -gt 1 ] || [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  echo "usage: ./quickstart.sh [/path/to/CT/scans]" >&2
  exit 2
fi
scans=${1:+$(realpath "$1")}
cd "$(dirname "$0")"
. ./setup.sh
# what MONAI says at every start, and docs/pretraining.md once: configs are code
export PYTHONWARNINGS="ignore:parsing config_file,ignore:Detected deprecated name"

run=runs/quickstart
log=$run/quickstart.log
mkdir -p $run
: >$log
say() { echo "$(date +%H:%M:%S)  $1"; }
quietly() { # a command, whose output goes to the log
  "$@" >>"$log" 2>&1 || {
    status=$?
    tail -n 20 "$log" >&2
    echo "stopped with status $status; all that was said is in $log" >&2
    exit $status
  }
}
small=(--small --overwrite true) # the network of small.yaml, which fine-tuning with --small takes on
if [ -n "$scans" ]; then
  echo "Pre-trains a small network on $scans for 20 epochs. What it says goes to $log"
  quietly hybridmim pretrain --data "$scans" --out $run "${small[@]}" \
    --batch_size 2 --crops_per_volume 3 --val_fraction 0.2
else
  echo "This takes about 6 minutes on two cores that do nothing else. What each stage says goes to $log"
  # 16 cases: 12 to train, 2 to validate, 2 that nothing is trained on
  scans=data/sample_organs
  cases=(--data $scans --datalist $run/cases.json)
  say "draws 16 synthetic CT scans of the abdomen"
  quietly python -m tools sample_data --output_dir $scans --kind organs --cases 16
  quietly python -m tools datalist msd --dataset_dir $scans --output $run/cases.json --fold 0 --folds 7 --test_cases 2
  say "pre-trains a small UNet without labels"
  # patches of 16 voxels, over which the network pools, and the region level as published: of smaller ones, and with the
  # default weights and bound, so short a training hardly learns which are masked
  quietly hybridmim pretrain "${cases[@]}" --out $run "${small[@]}" --unet_features "[8,8,16,32,64,8]" \
    --spacing "[6.0,6.0,6.0]" --roi_size "[64,32,48]" \
    --region_size "[32,32,16]" --patch_size "[16,16,16]" --batch_size 2 --crops_per_volume 2 --epochs 24 \
    --weight_num 0.1 --weight_loc 0.1 --weight_con 0.01 --head_gradient '$None' --learning_rate 0.01 \
    --window "[-100,200]" --val_interval 48
fi
quietly python -m tools figures $run/metrics.csv $run/figures/curves.png

cat <<END

pictures:  $(find $run/figures -name 'reconstruction_epoch=*.png' | sort | tail -n 1)   input, masked, reconstruction, error
           $run/figures/curves.png   every loss term, and the metrics beside chance
metrics:   $run/metrics.csv
weights:   $run/models/backbone.pt   loads into monai.networks.nets.BasicUNet (docs/weights.md says how)

END
[ -n "${cases:-}" ] || exit 0

say "plans a bundle that segments liver, spleen and kidneys"
bundle=$run/hybridmim_organs_seg
rm -rf $bundle
quietly hybridmim new-bundle organs "${cases[@]}" --pretrained $run/models/backbone.pt --bundles_dir $run

# Four of the training cases keep their labels. Twice the same training, from scratch and from backbone.pt.
crop=(--roi_size "[48,32,48]")
segment() { # name, options of training
  out=$run/$1
  log=$run/$1.log
  shift
  : >"$log"
  quietly hybridmim finetune "${cases[@]}" --bundle $bundle --out "$out" --overwrite true "${crop[@]}" \
    --label_fraction 0.34 --epochs 140 --warmup_epochs 2 --val_interval 1000 --learning_rate 0.01 "$@"
  quietly hybridmim evaluate "${cases[@]}" --bundle $bundle --out "$out" "${crop[@]}" --evaluated test
  quietly hybridmim segment "${cases[@]}" --bundle $bundle --out "$out" "${crop[@]}" \
    --ckpt_path "$out/models/model.pt"
}
say "fine-tunes on 4 labelled scans, and segments and evaluates 2 others: from scratch and pre-trained, side by side"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
cores=$(python -c "import os; print(os.cpu_count())")
export OMP_NUM_THREADS=$(((cores + 1) / 2))
segment scratch &
first=$!
segment pretrained --pretrained $run/models/backbone.pt &
wait $first
wait $!
unset OMP_NUM_THREADS

image=$(python -c "import json; print(json.load(open('$run/cases.json'))['test'][0]['image'])")
label=$(python -c "import json; print(json.load(open('$run/cases.json'))['test'][0]['label'])")
echo
python -m tools compare $run --image "$scans/$image" --label "$scans/$label" \
  --scratch $run/scratch --pretrained $run/pretrained
quietly python -m tools report $run
say "done"
cat <<END

Both trained on four labelled synthetic cases for two minutes: that shows the way, and measures nothing.
report:    $run/report.html      all of it on one page
picture:   $run/comparison.png   a case that neither saw: image, label, both segmentations
bundle:    $bundle   trains, segments and serves as the others (docs/planning.md)
END
