#!/usr/bin/env bash
# What there is to find out on a machine with a GPU: .lab/gpu.sh OUT [FLAGS of gpu.py]
exec python3 "$(dirname "$0")/gpu.py" "$@"
