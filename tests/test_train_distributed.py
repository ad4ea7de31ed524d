"`tsd train` by several processes: the run of one process, its files, what happens when one is killed, how launchers start it; a teacher cache that processes share"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

WORKER = Path(__file__).with_name('train_worker.py')
ROOT = WORKER.parent.parent
BIN = Path(sys.executable).parent
ENV = {k: v for k,v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')} | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT)}

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Folder of the runs of tests/train_worker.py"
    out = tmp_path_factory.mktemp('runs')
    done = subprocess.run([sys.executable, WORKER, out], capture_output=True, text=True, timeout=560, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    return out

@pytest.fixture(scope='module')
def results(runs): return json.loads((runs/'results.json').read_text())

def history(run): return pd.read_csv(run/'history.csv').query('metric not in ("clips_per_second", "data_wait")').set_index(['run', 'stage', 'epoch', 'step', 'metric']).value
def weights(run, name='student'):
    from tsd.checkpoints import load_student
    return load_student(run/f'{name}.safetensors')[0].state_dict()
def files(folder): return sorted(str(o.relative_to(folder)) for o in folder.rglob('*') if o.is_file() and o.suffix not in ('.mp4', '.pt'))

def test_the_student_of_one_process(runs, results):
    assert results['one']['codes'] == [0] and results['two']['codes'] == [0, 0], results['two']['said']
    one,two = (runs/n/'run' for n in ('one', 'two'))
    a,b = history(one),history(two)
    assert set(a.index.get_level_values('stage')) == {'stage1', 'stage2', 'finetune'} and {'label', 'logit', 'feature', 'loss', 'valid_loss', 'accuracy'} <= set(a.index.get_level_values('metric'))
    assert b.to_dict() == pytest.approx(a.to_dict(), rel=1e-5, abs=1e-6)
    for name in 'distilled', 'student':
        a,b = weights(one, name),weights(two, name)
        for k in a: torch.testing.assert_close(b[k], a[k], rtol=1e-3, atol=1e-4)
    assert any((a[k] - v).abs().max() > 3e-4 for k,v in weights(two, 'distilled').items())         # which fine-tuning changed by more
    a,b = (pd.read_csv(o/'predictions.csv') for o in (one, two))
    assert a.path.str.split('/').str[-2:].tolist() == b.path.str.split('/').str[-2:].tolist()
    assert b.filter(like='p_').values == pytest.approx(a.filter(like='p_').values, abs=1e-4)

def test_the_student_in_shards(runs, results):
    assert results['shards']['codes'] == [0, 0], results['shards']['said']
    assert history(runs/'shards'/'run').to_dict() == pytest.approx(history(runs/'one'/'run').to_dict(), rel=1e-5, abs=1e-6)
    assert files(runs/'shards'/'run') == files(runs/'one'/'run')                                  # and they are whole
    for k,v in weights(runs/'one'/'run').items(): torch.testing.assert_close(weights(runs/'shards'/'run')[k], v, rtol=1e-3, atol=1e-4)
    assert results['no shards']['codes'] == [1] and 'train.fsdp = true shards the student over several processes' in results['no shards']['said'][0]

def test_finetune_is_that_of_one_process(runs, results):
    assert results['tuned one']['codes'] == [0] and results['tuned two']['codes'] == [0, 0], results['tuned two']['said']
    one,two = (runs/n/'tuned' for n in ('one', 'two'))
    assert history(two).to_dict() == pytest.approx(history(one).to_dict(), rel=1e-5, abs=1e-6) and len(history(one)) >= 3
    assert pd.read_csv(two/'predictions.csv').path.nunique() == 30

def test_process_0_alone_writes_and_prints(runs, results):
    for name in 'run', 'teachers', 'clips_scene': assert files(runs/'two'/name) == files(runs/'one'/name)
    assert len(files(runs/'two'/'run')) == 10 and not list((runs/'two').rglob('*part*'))
    assert results['two']['said'][1] == ''
    said = results['two']['said'][0]
    assert said.count('student in') == 2 and said.count('top-1') == 3 and said.count('kept in') == 4 and 'stage1 epoch 1/1: ' in said    # both teachers, clips twice
    assert json.loads((runs/'two'/'run'/'versions.json').read_text())['processes'] == 2
    assert [o.read_bytes() for o in sorted((runs/'two'/'teachers').iterdir())] == [o.read_bytes() for o in sorted((runs/'one'/'teachers').iterdir())]

def test_every_video_is_tested_once_also_after_a_kill(runs, results):
    assert results['tested']['codes'] == [1, -signal.SIGKILL] and 0 < results['tested']['rows'] < 30
    assert results['tested on']['codes'] == [0]
    views = [int(l.split()[1]) for l in results['tested on']['said'][0].splitlines() if l.startswith('tested ')]
    assert sum(views) == 3*(30 - results['tested']['rows'])                                        # 3 crops of the videos that were left
    for name in 'two', 'tested':
        df,res = pd.read_csv(runs/name/'run'/'predictions.csv'),pd.read_csv(runs/name/'run'/'results.csv')
        assert len(df) == df.path.nunique() == res.n[0] == res.expected[0] == 30
        assert sorted(o.name for o in (runs/name/'run').glob('predictions*')) == ['predictions.csv', 'predictions.json']
    assert df.pred.tolist() == pd.read_csv(runs/'two'/'run'/'predictions.csv').pred.tolist()

def test_all_say_what_is_wrong_and_none_waits(results):
    for name,said in (('odd batch', 'train.bs = 5, for 2 processes together: it must be a multiple of 2'), ('other run', 'train.lr = 0.002 there, 1.0 here')):
        assert results[name]['codes'] == [1, 1] and all(said in o and 'Traceback' not in o for o in results[name]['said'])

def test_process_0_may_take_its_time(results):
    assert results['patient']['codes'] == [0, 0] and results['patient']['res'] == ['prepared']*2     # 4 s, and processes wait 2 s for tensors

def launch(runs, name, *words):
    "Go on with the run whose process 1 was killed"
    import train_worker
    shutil.copytree(runs/'killed', runs/name)
    return subprocess.run([*map(str, words), '-m', 'tsd.cli', 'train', 'tiny-fad', *train_worker.SMALL, '--out', str(runs/name), '--resume', 'auto'], capture_output=True, text=True, timeout=240, env=ENV)

PORT = 20000 + os.getpid()%20000
LINES = dict(torchrun=[BIN/'torchrun', '--nproc_per_node', 2, '--master_port', PORT],
             accelerate=[BIN/'accelerate', 'launch', '--multi_gpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', PORT+1])

@pytest.mark.parametrize('name', LINES)
def test_launchers_go_on_after_a_kill(runs, results, name):
    assert results['killed']['codes'] == [1, -signal.SIGKILL] and not (runs/'killed'/'run'/'distilled.safetensors').exists()
    done = launch(runs, name, *LINES[name])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('going on from checkpoint') == 1 and done.stdout.count('done: ') == 1
    a,b = (weights(runs/o/'run') for o in ('two', name))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert history(runs/name/'run').to_dict() == history(runs/'two'/'run').to_dict()

def test_accelerate_on_cpus_says_how(tsd, monkeypatch):
    "`accelerate launch --cpu --num_processes 2` starts one process, which it tells of a master but of no rank"
    for k,v in dict(ACCELERATE_MIXED_PRECISION='no', ACCELERATE_USE_CPU='True', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500').items(): monkeypatch.setenv(k, v)
    code,out,err = tsd('train', 'tiny-fad')
    assert code == 1 and '--multi_gpu --num_processes N' in err and not Path('runs').exists()

@pytest.mark.slow
@pytest.mark.parametrize('command', [['-m', 'tsd.cli'], [BIN/'tsd']])
def test_torchrun_ends_when_a_process_is_killed_from_outside(tmp_path, command):
    import psutil
    import train_worker
    words = [LINES['torchrun'][0], *LINES['torchrun'][1:], *command, 'train', 'tiny-fad', *train_worker.SMALL, 'train.stage2_epochs=200', '--out', tmp_path]
    job = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV)
    start = time.time()
    while not list((tmp_path/'run'/'checkpoints').glob('*/checkpoint-0002-*')) and time.time() < start + 120: time.sleep(.1)
    next(o for o in psutil.Process(job.pid).children(recursive=True) if o.environ().get('RANK') == '1').kill()
    killed,said = time.time(),job.communicate(timeout=60)[0]
    assert job.returncode == 1 and 'Signal 9 (SIGKILL)' in said and time.time() < killed + 40, said[-3000:]

def test_a_cache_that_processes_share(results):
    "No bit of the training changes; what two processes, or four of two runs at once, keep there is whole"
    runs,kept = results['cached']['runs'],results['cached']['keys']
    assert all(o['codes'] == [0, 0] for o in runs.values()), [o['said'] for o in runs.values()]
    def hits(o): return [v for k,v in o['history'].items() if k.endswith('cache_hits')]
    for name,o in runs.items():
        for a,b in zip(runs['none']['res'], o['res']): assert (a['losses'], a['bits'], a['weights'], a['chance']) == (b['losses'], b['bits'], b['weights'], b['chance']), name
    assert [hits(o) for o in runs['one cold']['res'] + runs['one warm']['res']] == [[0., 0.]]*2 + [[1., 1.]]*2
    for name,times in (('one', (1,)), ('both', (1, 2))):
        files,damaged = kept[name]
        keys = [tuple(k) for f in files for k in f]
        assert damaged == 0 and len(set(keys)) == 16*4 + 16                                          # a frame of each clip in stage 1, a clip in stage 2
        assert all(len({tuple(k) for k in f}) == len(f) for f in files) and {keys.count(k) for k in set(keys)} <= set(times)
    assert len(kept['one'][0]) == 4                                                                  # two processes, two epochs
