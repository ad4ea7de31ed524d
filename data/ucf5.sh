#!/bin/sh
# The whole chain on five classes of UCF101, for three seeds: prepared teachers, distillation, fine-tuning, tests, exported forms, cost. About 50 minutes on one core.
# It writes data/ucf5_chain.csv (a row a tested model) and data/ucf5_cost.csv. From the repository's root, with TSD_SHARED set: sh data/ucf5.sh
# Stopped, it goes on when it is called again; runs/ucf5-seedN.log says where a run is.
set -e
export OMP_NUM_THREADS=1
tsd=.venv/bin/tsd clips='$TSD_SHARED/clips/ucf5/clips.csv'
mkdir -p runs
kept() { sed -nE "s/^$1 teacher.*(kept in|read from) //p" "$run.log" | tail -n 1; }    # the file of a prepared teacher
for s in 0 1 2; do
    run=runs/ucf5-seed$s
    $tsd train data/ucf5.toml seed=$s name=ucf5-seed$s --resume auto >> $run.log
    rm -rf $run/export
    $tsd export --model $run/student.safetensors --out $run/export --data "$clips"
    for m in "cnn teacher=$(kept EfficientNet)" "transformer teacher=$(kept FrameTransformer)" "distilled=$run/distilled.safetensors" "fine-tuned=$run/student.safetensors" \
             "onnx=$run/export/student.onnx" "int8=$run/export/student-int8.onnx"; do
        $tsd test --model "${m#*=}" --data "$clips" --out "$run/tests/${m%%=*}.csv"
    done
done
.venv/bin/python - <<'PY'
import json, pandas as pd
rows = []
for s in range(3):
    for m in ('cnn teacher','transformer teacher','distilled','fine-tuned','onnx','int8'):
        t = json.load(open(f'runs/ucf5-seed{s}/tests/{m}.json'))
        rows.append(dict(model=m, seed=s, top1=t['top1'], low=t['interval'][0], high=t['interval'][1], mean_class=t['mean_class'], n=t['evaluated'], expected=t['expected'], views='{}x{}'.format(*t['test']['views']), command='sh data/ucf5.sh'))
pd.DataFrame(rows).round(4).to_csv('data/ucf5_chain.csv', index=False)
PY
run=runs/ucf5-seed0
$tsd cost student=$run/student.safetensors "cnn teacher=$(kept EfficientNet)" "transformer teacher=$(kept FrameTransformer)" \
    --test "$run/tests/fine-tuned.json" --test "$run/tests/cnn teacher.json" --test "$run/tests/transformer teacher.json" --out data/ucf5_cost.csv
