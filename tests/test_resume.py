"Runs that are killed end bit for bit where the run ends that was never stopped; what is refused, and what is said"
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest

KILLED,TERMINATED = -9,143

def work(out, n, seed, timeout):
    "Results of tests/resume_worker.py, which imports everything once and forks a process for each run"
    done = subprocess.run([sys.executable, Path(__file__).with_name('resume_worker.py'), out, str(n), str(seed)], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out/'results.json').read_text())

@pytest.fixture(scope='module')
def results(tmp_path_factory): return work(tmp_path_factory.mktemp('runs'), 3, 0, 570)

KINDS = 'two_stage', 'finetune', 'fastai'
def runs(results): return [(k, r) for k in KINDS for r in results[k]['runs']]
def named(results, name, kind='two_stage'): return next(r for r in results[kind]['runs'] if r['name'] == f'{kind} {name}')

def check_equal(results):
    for kind,run in runs(results):
        for k,v in results[kind]['whole']['outcome'].items():
            if k not in ('events', 'reads'): assert run['outcome'][k] == v, (run['name'], k)

def test_killed_runs_end_bit_for_bit_where_the_whole_run_ends(results):
    check_equal(results)
    assert sum(r['codes'].count(KILLED) for _,r in runs(results)) >= 20
    assert {k for k,r in runs(results) if KILLED in r['codes']} >= {'two_stage', 'finetune'}

def test_the_comparison_sees_everything(results):
    a,b = (results[k]['whole']['outcome'] for k in KINDS[:2])
    assert {'weights', 'opt', 'losses', 'lrs', 'values', 'chance', 'train_iter', 'history', 'file', 'speeds'} <= set(a)
    assert all(a[k] != b[k] for k in ('weights', 'opt', 'losses', 'lrs', 'values', 'chance', 'history', 'file'))
    assert len(a['losses']) == a['train_iter'] == 16 and a['history'] == a['file'] and a['speeds'] == 4

@pytest.mark.parametrize('name', ['last batch', 'last validation', 'old head gone', 'new head', 'first batch'])
def test_killed_on_both_sides_of_the_stage_switch(results, name): assert named(results, name)['codes'] == [KILLED, 0]

@pytest.mark.parametrize('name', ['write [2000]', 'write [40000]', 'rename []', 'renamed []', 'delete []'])
def test_killed_during_a_save(results, name):
    run = named(results, name)
    assert run['codes'] == [KILLED, KILLED, 0] and len(run['files']) == 2                     # two are kept, no part of one is left

def test_clips_that_have_been_seen_are_not_read_again(results):
    some = [(r['outcome']['reads'], r['clips']) for _,r in runs(results) if 'workers' not in r['name']]
    assert all(a == b for a,b in some) and len(set(some)) > 4
    assert results['two_stage']['whole']['outcome']['reads'] == 4*(16+6)

@pytest.mark.parametrize('kind', ['two_stage', 'finetune'])
def test_with_loader_processes_and_a_signal_to_the_whole_group(results, kind):
    codes = named(results, 'workers', kind)['codes']
    assert codes[0] == KILLED and codes[-1] == 0 and set(codes) <= {KILLED, TERMINATED, 1, 0}    # 1: a loader's process died of the signal before it could ignore it

def test_sigterm_saves_and_says_so(results):
    run = named(results, 'sigterm')
    assert run['codes'] == [TERMINATED, TERMINATED, 0]                                        # in training, in validation
    assert run['said'].count('SIGTERM: ') == run['said'].count('is written; the same command goes on from there') == run['said'].count('going on from checkpoint') == 2

def test_a_damaged_checkpoint_falls_back_to_the_one_before(results):
    run = named(results, 'damaged')
    assert 'is damaged: its bytes do not match' in run['said'] and 'goes on from the checkpoint before it' in run['said']
    assert len([f for f in run['files'] if f.endswith('.damaged')]) == 1

def test_no_space(results):
    run = named(results, 'space')
    assert run['codes'] == [KILLED, 1, 0] and 'no checkpoint could be written' in run['said'] and 'goes on from checkpoint-' in run['said']
    assert 'Traceback' not in run['said'] and not [f for f in run['files'] if f.endswith('.part')]

def test_a_finished_run_only_validates_again(results):
    whole,again = results['two_stage']['whole']['outcome'],results['finished']['outcome']
    assert again['reads'] == 6 and all(again[k] == v for k,v in whole.items() if k not in ('events', 'reads'))

def test_going_on_from_a_checkpoint_of_another_folder(results):
    whole,moved = results['two_stage']['whole']['outcome'],results['path']
    assert moved['outcome']['reads'] == moved['clips'] < whole['reads']
    assert all(moved['outcome'][k] == whole[k] for k in ('weights', 'opt', 'losses', 'history', 'file'))

@pytest.mark.parametrize('change, said', [
    ("{'lr': 0.002}", ['optimizer.groups[0].lr: 0.001 there, 0.002 here', 'schedule.lr[0]']), ("{'epochs': 6}", ['epochs: 4 there, 6 here', 'stages[1].epochs: 2 there, 3 here']),
    ("{'loaders_kw': {'bs': 8}}", ['data.batch_size: 4 there, 8 here']), ("{'loaders_kw': {'seed': 1}}", ['data.seed: 0 there, 1 here']),
    ("{'loaders_kw': {'n': 20}}", ['data.clips: 16 there, 20 here', 'data.fingerprint']), ("{'loaders_kw': {'augment': 'finetune'}}", ['data.augmentation: Compose( MultiScaleCrop']),
    ("{'resume': None}", ['holds checkpoints of a run']), ('all damaged', ['are damaged, all 2 of them'])])
def test_refused(results, change, said):
    found = results['refused'][change]
    assert found['code'] == 1 and all(s in found['said'] for s in said), found['said']

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_kills(tmp_path):
    results = work(tmp_path, 40, 1, 3500)
    check_equal(results)
    assert sum(r['codes'].count(KILLED) for _,r in runs(results)) >= 100

def test_bars_go_on_too(tmp_path, capsys):
    "With fastai's own progress bar, from an epoch that is not the first"
    import resume_worker as w
    class Stop(w.Callback):
        order = 99
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    def fit(*cbs): w.finetune_learner(w.loaders(), student, mixup=0, cutmix=0).fit_finetune(3, cbs=[w.ExactResume(tmp_path, steps=2), *cbs])
    before = signal.getsignal(signal.SIGTERM)
    student = w.two_stage_learner(w.loaders(), 'tsd_vit_tiny_patch16_224', distill=None, depth=1, **w.TINY).student
    with pytest.raises(KeyboardInterrupt): fit(Stop())
    assert signal.getsignal(signal.SIGTERM) is before                                         # nothing of a run that was broken off stays behind
    fit()
    assert 'going on from checkpoint' in capsys.readouterr().out
