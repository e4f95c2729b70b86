#!/usr/bin/env bash
# Command 1: set-up, sample scans, a short pre-training, fine-tuning with and without it, a comparison of both.
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

pretrain=bundles/hybridmim_pretrain
btcv=bundles/hybridmim_btcv_seg
run=runs/quickstart
log=$run/quickstart.log
mkdir -p $run
: >$log
stage() { # what is happening, and a command, whose output goes to the log
  echo "$(date +%H:%M:%S)  $1"
  shift
  "$@" >>$log 2>&1 || {
    status=$?
    tail -n 20 $log >&2
    echo "stopped with status $status; all that was said is in $log" >&2
    exit $status
  }
}
if [ -z "$scans" ]; then
  echo "This takes about 15 minutes on two cores that are busy otherwise, too. What each stage says goes to $log"
else
  echo "Pre-trains a small network on $scans for 20 epochs. What each stage says goes to $log"
fi
cases=()
if [ -z "$scans" ]; then
  # 16 cases: 12 to train, 2 to validate, 2 that nothing is trained on
  scans=data/sample_btcv
  stage "draws 16 synthetic abdominal CT scans" python -m tools sample_data --output_dir $scans --kind btcv --cases 16
  stage "writes the list of cases: 12 to train, 2 to validate, 2 to test" python -m tools datalist btcv --dataset_dir $scans --output $run/cases.json --fold 0 --folds 7 --test_cases 2
  cases=(--datalist $run/cases.json)
fi
stage "pre-trains a small UNet without labels" python -m monai.bundle run training \
  --config_file "['$pretrain/configs/train.yaml','$pretrain/configs/small.yaml']" \
  --bundle_root $pretrain --dataset_dir "$scans" "${cases[@]}" \
  --output_dir $run --ckpt_dir $run/models --overwrite true \
  --batch_size 2 --crops_per_volume 3 --val_fraction 0.2
stage "draws the curves" python -m tools figures $run/metrics.csv $run/figures/curves.png

cat <<END

pictures:  $(find $run/figures -name 'reconstruction_epoch=*.png' | sort | tail -n 1)   input, masked, reconstruction, error
           $run/figures/curves.png   every loss term, and the metrics beside chance
metrics:   $run/metrics.csv
weights:   $run/models/backbone.pt   loads into monai.networks.nets.BasicUNet (docs/weights.md says how)
END
[ ${#cases[@]} -gt 0 ] || exit 0

# Four of the training cases keep their labels. Twice the same training, from scratch and from backbone.pt.
segment() { # name, options of training
  name=$1
  shift
  stage "fine-tunes on 4 labelled scans ($name)" python -m monai.bundle run training \
    --config_file "['$btcv/configs/train.yaml','$btcv/configs/small.yaml']" \
    --bundle_root $btcv --dataset_dir $scans "${cases[@]}" --label_fraction 0.34 \
    --output_dir "$run/$name" --ckpt_dir "$run/$name/models" --overwrite true \
    --batch_size 2 --crops_per_volume 1 --roi_size "[48,48,48]" --epochs 40 --val_interval 40 "$@"
  stage "measures Dice on 2 test cases ($name)" python -m monai.bundle run evaluating \
    --config_file "['$btcv/configs/train.yaml','$btcv/configs/small.yaml','$btcv/configs/evaluate.yaml']" \
    --bundle_root $btcv --dataset_dir $scans "${cases[@]}" --evaluated test \
    --output_dir "$run/$name" --ckpt_dir "$run/$name/models" --roi_size "[48,48,48]"
  stage "segments the test cases ($name)" python -m monai.bundle run inferring \
    --config_file "['$btcv/configs/inference.yaml','$btcv/configs/small.yaml']" \
    --bundle_root $btcv --dataset_dir $scans "${cases[@]}" \
    --output_dir "$run/$name" --ckpt_path "$run/$name/models/model.pt" --roi_size "[48,48,48]"
}
segment scratch
segment pretrained --pretrained $run/models/backbone.pt

image=$(python -c "import json; print(json.load(open('$run/cases.json'))['test'][0]['image'])")
label=$(python -c "import json; print(json.load(open('$run/cases.json'))['test'][0]['label'])")
echo
python -m tools compare $run --image "$scans/$image" --label "$scans/$label" \
  --scratch $run/scratch --pretrained $run/pretrained
stage "writes the report" python -m tools report $run
cat <<END

Both trained on four labelled synthetic cases for one or two minutes: that shows the way, and measures nothing.
report:    $run/report.html      all of it on one page
picture:   $run/comparison.png   a case that neither saw: image, label, both segmentations
END
