#!/usr/bin/env bash
# Tests, measurements and training runs on one NVIDIA GPU, as many as fit into the time there is: see gpu_queue.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_queue.py" "$@"
