#!/usr/bin/env bash
# Tests, benchmarks, speed and accuracy of localgrad on one NVIDIA GPU, within ten minutes, results after every stage.
#
# Runs from the source tree with nothing installed and no network: needs Python >= 3.11 with torch, torchvision, timm,
# typer, rich, pyyaml, safetensors, matplotlib and pytest; takes pytest-xdist where it is found; needs no pydantic.
#
#   scripts/gpu_check.sh                     # all stages; again: goes on where the last call stopped
#   scripts/gpu_check.sh tests bench         # some of them: tests, suite, bench, speed, accuracy
#   GPU_CHECK_DEVICE=cpu scripts/gpu_check.sh   # dry run at tiny sizes on the CPU
#
# GPU_CHECK_SECONDS   how long it may take, 570
# GPU_CHECK_RESULTS   where to write, results/DATE-GPU
# GPU_CHECK_ARCHIVE   one .tar.gz with all results and the state of unfinished runs: unpacked first, written last
# LOCALGRAD_DATA      data sets; without CIFAR-10 in it speed and accuracy are measured on the embedded digits
set -uo pipefail
cd "$(dirname "$0")/.."
device="${GPU_CHECK_DEVICE:-cuda}"
budget="${GPU_CHECK_SECONDS:-570}"
stages="${*:-tests suite bench speed accuracy}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src" MPLBACKEND=Agg HF_HUB_OFFLINE=1 LOCALGRAD_DEVICE="$device" PYTHONUNBUFFERED=1
[ -n "${LOCALGRAD_DATA:-}" ] || { [ -d shared/data ] && export LOCALGRAD_DATA="$PWD/shared/data"; }
[ "$device" = cpu ] && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

name=$("$python" - "$device" <<'PY'
import sys
try:
    import torch, torchvision, timm, typer, rich, yaml, safetensors, pytest
except ImportError as error:
    sys.exit(f"gpu_check: {error}; install it for {sys.executable}, or name another Python in PYTHON=")
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("gpu_check: torch sees no GPU; GPU_CHECK_DEVICE=cpu makes a dry run")
name = "cpu" if sys.argv[1] == "cpu" else torch.cuda.get_device_name().lower().replace("nvidia", "").strip()
print("-".join(name.split()))
PY
) || exit 2
archive="${GPU_CHECK_ARCHIVE:-}"
out="${GPU_CHECK_RESULTS:-results/$(date +%F)-$name}"
mkdir -p "$out" || exit 2
if [ -n "$archive" ] && [ -f "$archive" ]; then tar -xzf "$archive" -C "$out" || exit 2; fi

left() { echo $((budget - SECONDS)); }
# Runs a command for at most so many seconds, or until the budget is spent, its output in a log. TERM makes training save
# and stop.
limited() {
  local log="$1" seconds="$2" rest
  shift 2
  rest=$(($(left) - 5))
  [ "$seconds" -gt "$rest" ] && seconds="$rest"
  [ "$seconds" -lt 5 ] && return 124
  timeout -s TERM -k 20 "$seconds" "$@" >"$out/$log" 2>&1
}
note() { printf '%4ds  %s\n' "$SECONDS" "$*" | tee -a "$out/stages.log"; }
wants() { case " $stages " in *" $1 "*) true ;; *) false ;; esac }

if ! "$python" -m localgrad doctor >"$out/machine.txt" 2>&1; then
  echo "gpu_check: localgrad does not start: $(tail -n 1 "$out/machine.txt")" >&2 # the newest typer imports pydantic
  exit 2
fi
{ git rev-parse --short HEAD 2>/dev/null && git status --short 2>/dev/null | head -20; } >>"$out/machine.txt"
[ "$device" = cpu ] || nvidia-smi >>"$out/machine.txt" 2>&1
note "call of $(date '+%F %H:%M'): $stages; $name, $budget s"

if [ "$device" = cpu ]; then small=1 epochs=1; else small= epochs=4; fi
if "$python" -c "import xdist" 2>/dev/null; then workers="-n ${GPU_CHECK_WORKERS:-$([ $small ] && echo 1 || echo 8)}"; else workers=; fi
tested() { limited "$1" "$2" "$python" -m pytest -q -ra -o addopts= -p no:cacheprovider -W default "${@:3}"; }

if wants tests && ! grep -qs "^passed" "$out/tests.status"; then
  files=tests/cuda
  [ "$device" = cpu ] || files="$files tests/unit/test_capture.py tests/contract/test_captured_steps.py tests/unit/test_sealed.py::test_cuda"
  # shellcheck disable=SC2086
  tested tests.txt 200 $files
  status=$?
  [ $status = 0 ] && echo passed >"$out/tests.status" || echo "failed ($status)" >"$out/tests.status"
  note "tests on $device: $(cat "$out/tests.status"): $(tail -n 1 "$out/tests.txt")"
fi

# The tests of the engine and of the papers, on this machine's CPU: do they hold with its versions of everything?
if wants suite && [ ! -f "$out/suite.txt" ]; then
  files="tests/contract/test_wide_spans.py tests/contract/test_end_to_end.py tests/reference tests/unit/test_engine.py"
  [ $small ] && files="tests/unit/test_spans.py"
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=1 tested suite.txt 100 $workers $files
  note "suite: $(tail -n 1 "$out/suite.txt")"
fi

# name, model, images in a step, pixels, classes, blocks, whether methods are combined with the other ways
bench_list() {
  if [ $small ]; then
    echo "resnet8 resnet8 8 16 3 combinations"
    echo "vit_tiny timm:vit_tiny_patch16_224 2 32 4 no-combinations"
    return
  fi
  echo "resnet32 resnet32 1024 32 16 combinations"
  echo "resnet50 torchvision:resnet50 128 224 4 combinations"
  echo "vit_small timm:vit_small_patch16_224 128 224 4 combinations"
  echo "swin_t torchvision:swin_t 128 224 4 no-combinations"
  echo "resnet101 torchvision:resnet101 128 224 4 no-combinations"
  echo "vit_base timm:vit_base_patch16_224 128 224 4 no-combinations"
  echo "resnet152 torchvision:resnet152 128 224 4 no-combinations"
}
if wants bench; then
  # Half of what is left, so that speed and accuracy get their turn in the same call.
  until=$((SECONDS + $(left) * 6 / 10))
  while read -r title model batch side blocks combined; do
    [ -f "$out/bench-$title/bench.json" ] && continue
    [ $SECONDS -ge $until ] && { note "bench: $title and later ones are left for the next call"; break; }
    limited "bench-$title.md" $((until - SECONDS + 20)) "$python" -m localgrad bench "$model" --batch-size "$batch" \
      --image-size "$side" --num-blocks "$blocks" --method '[{dgl: {head: linear}}]' \
      --balance bytes --$combined --variant fp32 --variant bf16+channels_last \
      --rounds $([ $small ] && echo 1 || echo 7) --out "$out/bench-$title" \
      </dev/null # else it could read the list of this loop
    note "bench $title: $([ -f "$out/bench-$title/bench.json" ] && echo done || tail -n 1 "$out/bench-$title.md")"
  done < <(bench_list)
fi

if "$python" -m localgrad list data --json | "$python" -c '
import json, sys
sys.exit(not any(row["name"] == "cifar10" and row["found"] == "yes" for row in json.load(sys.stdin)))'; then
  data=cifar10
else
  data=digits
  note "no CIFAR-10 in LOCALGRAD_DATA: speed and accuracy are measured on digits"
fi
[ $small ] && data=digits
if [ $data = cifar10 ]; then
  common=(cifar10_resnet32 beside=[] train.batch_size=1024 data.validation=0 optim.lr=0.4 optim.warmup_epochs=1)
  length=30
else
  common=(digits beside=[])
  length=10
fi
[ $small ] && common+=(data.limit=200) && length=2
fast=(train.precision=bf16 train.channels_last=true)
[ $small ] && fast=()

# Seconds of an epoch once everything is warm, and what the 400 epochs of the papers would take; also as CUDA graphs.
if wants speed && [ ! -f "$out/speed.json" ]; then
  speeds=(e2e dgl)
  [ "$device" = cpu ] || speeds+=(e2e-captured dgl-captured)
  for kind in "${speeds[@]}"; do
    capture=(train.capture=false)
    [ "${kind#*-}" = captured ] && capture=(train.capture=true)
    limited "speed-$kind.txt" 60 "$python" -m localgrad train "${common[@]}" --method "${kind%-captured}" \
      --epochs $epochs train.device="$device" --run-dir "$out/speed-$kind" --overwrite "${fast[@]}" "${capture[@]}"
    note "speed of $kind: exit $?"
  done
  "$python" - "$out" "$data" "${speeds[@]}" <<'PY'
import csv, json, shutil, sys
from pathlib import Path
out, rows = Path(sys.argv[1]), {}
for kind in sys.argv[3:]:
    path = out / f"speed-{kind}" / "metrics.csv"
    if path.is_file():
        seconds = [float(row["seconds"]) for row in csv.DictReader(path.open())]
        rows[kind] = {"epochs": seconds, "best": min(seconds), "minutes_of_400_epochs": min(seconds) * 400 / 60}
    shutil.rmtree(out / f"speed-{kind}", ignore_errors=True)
if rows:
    (out / "speed.json").write_text(json.dumps({"data": sys.argv[2], **rows}, indent=1) + "\n")
    print(json.dumps({kind: round(row["best"], 3) for kind, row in rows.items()}))
PY
fi

# One run after the other until the time is up; the next call continues each where it stopped.
if wants accuracy; then
  for method in e2e dgl lean auglocal infopro dgl+man dgl+man_pp dgl+mlaan dgl+hpff; do
    run="$out/accuracy-$method"
    [ -f "$out/accuracy-$method.json" ] && continue
    [ "$(left)" -lt 15 ] && { note "accuracy: $method and later ones are left for the next call"; break; }
    if [ -f "$run/checkpoint.safetensors" ]; then
      limited "accuracy-$method.txt" 9999 "$python" -m localgrad train --resume "$run"
    else
      limited "accuracy-$method.txt" 9999 "$python" -m localgrad train "${common[@]}" --method "$method" \
        --epochs $length train.device="$device" --run-dir "$run" --overwrite "${fast[@]}"
    fi
    status=$?
    if [ -f "$run/results.json" ]; then
      mv "$run/results.json" "$out/accuracy-$method.json"
      mv "$run/metrics.csv" "$out/accuracy-$method.csv"
      rm -rf "$run"
      note "accuracy of $method: done"
    else
      rm -rf "$run"/*.previous "$run/tensorboard"
      note "accuracy of $method: exit $status, $(tail -n 1 "$out/accuracy-$method.txt" | cut -c1-120)"
    fi
    [ $small ] && [ "$method" = dgl ] && break
  done
fi

large=$(find "$out" -type f -size +60M)
[ -n "$large" ] && note "larger than 60 MiB, too large to carry: $large"
if [ -n "$archive" ]; then tar -czf "$archive.partial" -C "$out" . && mv "$archive.partial" "$archive"; fi
note "end; results in $out"
! grep -qs "^failed" "$out/tests.status"
