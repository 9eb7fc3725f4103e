#!/usr/bin/env bash
# The demo on embedded data: ./demo.sh [FOLDER] [--full]; about two minutes on two cores, ./demo.sh --help says more.
set -euo pipefail
cd "$(dirname "$0")"
OMP_NUM_THREADS=1 exec python demo.py "$@"  # two runs at a time, each on one core
