#!/usr/bin/env bash
# Train the runs of the table on GRATINGS, two at a time on two cores, then copy their logs here.
# Started again, it continues. The settings were fixed before the first of these runs, with another seed.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
here=results/gratings output=Output/gratings
python main.py @$here/teacher.args --output_dir $output/teacher --resume auto

sweep() { # student, varied flags
    python recipes/sweep.py $here/"$1".args --output $output --vary seed="$seed" ${2:+--vary "$2"}
}
for seed in 1 2 3 4 5; do
    sweep none
    sweep deit feature-loss,w-fft=spectral:0,spectral:0.2,mse_plain:0.2,manifold:1,projector_trained:0.2
    sweep lift feature-loss,w-fft=mse_plain:0,mse_plain:0.2
    sweep widelast feature-loss,w-fft=mse_plain:0,mse_plain:0.2
done | xargs -P 2 -d '\n' -n 1 sh -c

for run in $output/teacher $output/*/*=*/; do
    mkdir -p "$here/${run#"$output"/}"
    cp "$run"/args.json "$run"/log.txt "$here/${run#"$output"/}"
done
