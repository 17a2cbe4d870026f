#!/bin/bash
# Checks and measures the project on a CUDA GPU: bash benchmarks/gpu.sh OUT [PART ...]
#
# There are four parts of at most 9 minutes. Results go to the folder OUT as they come. A part that was cut off, or in
# which a section failed, continues when it is started again. benchmarks/gpu.py describes the sections.
out=${1:?usage: bash benchmarks/gpu.sh OUT [PART ...]}
shift
status=0
for part in ${@:-1 2 3 4}; do
    python "$(dirname "$0")/gpu.py" --out "$out" --part "$part" || status=1
done
exit $status
