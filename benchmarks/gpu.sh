#!/usr/bin/env bash
# What has to be measured on a GPU, in pieces of at most 9 minutes: see benchmarks/gpu.md.
#   benchmarks/gpu.sh checks | speed | study [FOLDER OF Task_HeadNeckCT] [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1
python=$(command -v python3 || command -v python)
"$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU'; print(torch.cuda.get_device_name(), torch.__version__)"
case "${1:-}" in
checks) # every bundle trains, resumes and exports
  timeout 530 "$python" -m pytest -q -p no:cacheprovider --numprocesses 6 --dist load \
    tests/hybridmim_pretrain/test_gpu.py tests/segmentation_bundles/test_seg_gpu.py
  ;;
speed) # a step of the published recipe and of ours
  variants="published recipe,as configured,32 bit,bfloat16,with checkpointing"
  for overlay in "" swin_unetr; do
    timeout 260 "$python" -m benchmarks.pretrain_step --overlays "$overlay" --device cuda --crops 8 --steps 10 \
      --variants_only "$variants"
  done
  ;;
study) # tables 1 to 4 at full size, 3 seeds; the same command continues
  timeout --signal=TERM 530 "$python" -m benchmarks.study --preset headneck_gpu --jobs 6 \
    --dataset_dir "${2:?folder of Task_HeadNeckCT}" --output_dir "${3:-runs/headneck_gpu}" || [ $? = 124 ]
  cat "${3:-runs/headneck_gpu}/report.md"
  ;;
*)
  echo "benchmarks/gpu.sh: found '${1:-}', expected checks, speed or study" >&2
  exit 2
  ;;
esac
