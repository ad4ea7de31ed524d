"""`tsd train` and a teacher cache in several processes, forked from one that has imported everything: `python train_worker.py FOLDER` writes FOLDER/results.json"""
import json, os, shutil, signal, sys, time
from pathlib import Path

import numpy as np
import torch
from distributed_worker import Stop, fork
from distributed_worker import train as train_in_memory

from tsd import evaluate, train
from tsd.cache import TeacherCache, _read_set, _salt, _scan, record_type
from tsd.cli import main
from tsd.distributed import from_main, rank_world

SMALL = ('data.options.n_train=20 data.options.n_test=30 data.options.workers=1 cnn.epochs=1 vit.epochs=1 train.stage2_epochs=2 train.checkpoint_minutes=1e-9 '
         'finetune.mixup=0 finetune.cutmix=0 finetune.drop_path=0 name=run').split()   # without what processes draw for themselves

def tsd(folder, *words, before=None, command=('train', 'tiny-fad')):
    "The command in one process of a group"
    torch.set_num_threads(1)
    if before: before()
    if code := main([*command, *SMALL, *words, '--out', str(folder)]): raise SystemExit(code)

def stop_training():
    "SIGKILL to process 1 in stage 2"
    plain = train._callbacks
    train._callbacks = lambda *a: [*plain(*a), Stop(1, 3, signal.SIGKILL)]

def stop_testing():
    "SIGKILL to process 1 when it has tested some of its videos"
    plain,calls = evaluate.view_probs,[]
    def probs(*a):
        calls.append(a)
        if len(calls) == 2 and rank_world()[0] == 1: os.kill(os.getpid(), signal.SIGKILL)
        return plain(*a)
    evaluate.view_probs = probs

def count_tested():
    plain = evaluate.view_probs
    def probs(model, views, *a): print('tested', len(views), flush=True); return plain(model, views, *a)
    evaluate.view_probs = probs

def cached(out):
    "What a run ends with, by name of its cache; and the keys of all entries that a cache holds"
    res = {}
    def run(*names, plain=False):
        ends = [fork(lambda d: train_in_memory(d, distill='fpld', epochs=(1,1), cbs=lambda: [] if plain else [TeacherCache(out/name.split()[0])]), out/f'run {name}', 2) for name in names]
        for name,end in zip(names, ends): res[name] = end()
    run('none', plain=True); run('one cold'); run('one warm'); run('both a', 'both b')
    def keys(folder):
        sets = [(p, _read_set(p)) for p in folder.iterdir()]
        whole = [_scan(f, record_type(a['classes'], a['dtype'], a['topk']), _salt(a))[:2] for p,a in sets for f in sorted(p.glob('*.bin'))]
        return [np.array(r['key'])[good].tolist() for r,good in whole],sum(int((~good).sum()) for _,good in whole)
    return dict(runs=res, keys={n: keys(out/n) for n in ('one','both')})

def main_(out):
    res = {}
    res['one'] = fork(tsd, out/'one', 0)()
    res['two'] = fork(tsd, out/'two', 2)()
    res['shards'] = fork(lambda d: tsd(d, 'train.fsdp=true'), out/'shards', 2)()
    res['no shards'] = fork(lambda d: tsd(d, 'train.fsdp=true', 'name=alone'), out/'one', 0)()
    res['killed'] = fork(lambda d: tsd(d, before=stop_training), out/'killed', 2)()
    (out/'tested').mkdir()
    for name in ('run', 'clips_scene'): shutil.copytree(out/'two'/name, out/'tested'/name)
    for o in [*(out/'tested'/'run').glob('predictions.*'), out/'tested'/'run'/'results.csv']: o.unlink()
    res['tested'] = fork(lambda d: tsd(d, '--resume', 'auto', before=stop_testing), out/'tested', 2)()
    res['tested']['rows'] = sum(len(o.read_text().splitlines()) - 1 for o in (out/'tested'/'run').glob('predictions.csv.part*'))
    res['tested on'] = fork(lambda d: tsd(d, '--resume', 'auto', before=count_tested), out/'tested', 0)()
    for name,n in (('one', 0), ('two', 2)):
        words = 'finetune', 'tiny-fad', '--student', str(out/'one'/'run'/'distilled.safetensors')
        res[f'tuned {name}'] = fork(lambda d: tsd(d, 'name=tuned', command=words), out/name, n)()
    res['odd batch'] = fork(lambda d: tsd(d, 'train.bs=5', 'name=odd'), out/'two', 2)()
    res['other run'] = fork(lambda d: tsd(d, 'train.lr=1'), out/'two', 2)()
    res['patient'] = fork(lambda d: from_main(lambda: time.sleep(4) or 'prepared'), out/'patient', 2, minutes=2/60)()
    res['cached'] = cached(out/'cached')
    (out/'results.json').write_text(json.dumps(res))

if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1]).resolve(); out.mkdir(parents=True, exist_ok=True)
    main_(out)
