#!/usr/bin/env bash
# The embedded experiment: a teacher, students with and without it, their table and their spectra.
# Runs in a few minutes on two CPU cores; any GPU is left alone so that the figures are comparable.
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-Output/demo}
export OMP_NUM_THREADS=1  # two processes share the cores
began=$SECONDS

run() {  # run NAME FLAGS...: two processes; prints the progress once an epoch
    echo "== $1"
    mkdir -p "$out/$1"
    python -m torch.distributed.run --standalone --nproc_per_node=2 main.py --output_dir "$out/$1" --overwrite \
        --data-set GRATINGS --gratings-sizes 6000 1500 --input-size 32 --aa none \
        --batch-size 50 --lr 0.01 --warmup-epochs 1 --model-ema-decay 0.99 \
        --num_workers 0 --device cpu "${@:2}" 2>&1 | tee "$out/$1/console.txt" | grep --line-buffered -E "^Max accuracy|[Ee]rror"
}

# RandAugment and DeiT's crops would turn and stretch the gratings into other classes: only erasing, colour and shifts.
grid="img_size=32 patch_size=8"
teacher="$grid embed_dim=96 depth=6 num_heads=4"
run teacher --model cait_s24_224 --model-kwargs $teacher --epochs 12

soft="--teacher-model cait_s24_224 --teacher-kwargs $teacher --teacher-path $out/teacher/model_best.pth
    --distillation-type soft --distillation-alpha 0.9"
pairs="--s-id 0 1 2 3 --t-id 0 1 4 5 --w-fft 0.2"
for seed in 0 1; do
    student="--model deit_tiny_patch16_224 --model-kwargs $grid embed_dim=48 depth=4 num_heads=3 --epochs 6 --seed $seed"
    run "no_teacher-$seed" $student
    run "soft_kd-$seed" $student $soft --w-fft 0
    run "mse-$seed" $student $soft $pairs --feature-loss mse
    run "spectral-$seed" $student $soft $pairs
done

echo
python tables.py "$out"/{teacher,no_teacher-0,no_teacher-1,soft_kd-0,soft_kd-1,mse-0,mse-1,spectral-0,spectral-1}
echo
python analyze.py --data-set GRATINGS --num-images 256 --device cpu --num_workers 0 --output_dir "$out/analysis" \
    --compare teacher="$out/teacher" "no teacher=$out/no_teacher-0" "soft KD=$out/soft_kd-0" \
    "MSE twin=$out/mse-0" "SpectralKD=$out/spectral-0"
echo
echo "Done in $(( SECONDS - began )) s. Figures: $out/analysis. Curves over epochs: tensorboard --logdir $out"
