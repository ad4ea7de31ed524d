"Several processes do what one does: losses, metrics, clips, files, resume; what is refused, and what happens when one dies"
import json, os, subprocess, sys, time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name('distributed_worker.py')
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
KILLED,TERMINATED = -9,143

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "Of tests/distributed_worker.py, which imports everything once and forks the processes"
    out = tmp_path_factory.mktemp('runs')
    done = subprocess.run([sys.executable, WORKER, out], capture_output=True, text=True, timeout=560, env={k: v for k,v in ENV.items() if k not in ('RANK', 'WORLD_SIZE')})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out/'results.json').read_text())

@pytest.mark.parametrize('name, n', [('fad', 1), ('fad', 2), ('fad', 4), ('fpld', 2), ('feature alone', 2), ('tuned', 2), ('clipped', 2)])
def test_losses_metrics_and_weights_of_one_process(results, name, n):
    one, = results[f'{name} 0']['res']
    for o in results[f'{name} {n}']['res']:
        assert o['world'] == n and o['iters'] == one['iters']
        assert o['history'].keys() == one['history'].keys()
        assert o['history'] == pytest.approx(one['history'], rel=1e-5, abs=1e-6)          # losses, their terms, accuracy, rates: every epoch of every stage
        assert o['losses'] == pytest.approx(one['losses'], rel=1e-5)
        assert o['weights'] == pytest.approx(one['weights'], rel=1e-4, abs=1e-4)
        assert o['bits'] == results[f'{name} {n}']['res'][0]['bits']

@pytest.mark.parametrize('name', ['fad', 'fpld', 'tuned', 'clipped'])
def test_a_student_in_shards_learns_as_a_whole_one(results, name):
    one,(a,b) = results[f'{name} 0']['res'][0],results[f'sharded {name} 2']['res']
    for o in (a,b):
        assert o['history'] == pytest.approx(one['history'], rel=1e-5, abs=1e-6) and o['losses'] == pytest.approx(one['losses'], rel=1e-5)
        assert o['weights'] == pytest.approx(one['weights'], rel=1e-4, abs=1e-4) and o['bits'] == a['bits']    # whole again, in every process

def test_shards_in_bf16(results):
    a,b = (results[f'{k} 2']['res'][0] for k in ('bf16', 'sharded bf16'))
    assert a['losses'] == pytest.approx(b['losses'], rel=.02) and a['losses'] != pytest.approx(results['fad 0']['res'][0]['losses'][:len(a['losses'])], rel=1e-6)

@pytest.mark.parametrize('what, said', [('fp16', "use Precision('bf16'), or float32"), ('best', 'use ExactResume for checkpoints')])
def test_what_shards_refuse(results, what, said):
    run = results[f'sharded {what} 2']
    assert run['codes'] == [1, 1] and said in run['said'][0], run['said']

def test_the_comparison_can_fail(results):
    a,b = (results[f'{k} 0']['res'][0] for k in ('fad', 'feature alone'))
    assert {k.split()[0] for k in a['history']} == {'stage1', 'stage2'} and any('feature' in k for k in a['history']) and any('f1_score' in k for k in a['history'])
    assert a['losses'] != pytest.approx(b['losses'], rel=1e-3)

@pytest.mark.parametrize('n', [2, 4])
def test_each_clip_is_read_once_by_one_process_and_cut_as_by_one(results, n):
    def reads(o):
        seen = o['seen'][2*(o['world'] > 1):]                                              # a new loader looks at its first clip
        return [c for c in seen if c[0].startswith('train')],[c for c in seen if c[0].startswith('valid')]
    train,valid = reads(results['fad 0']['res'][0])
    train = [c for e in range(4) for c in train[18*e:18*e+16]]                            # 18 clips in batches of 8: one process reads the last two, and drops them
    shares = [reads(o) for o in results[f'fad {n}']['res']]
    for r,(mine,checked) in enumerate(shares):
        assert mine == train[r::n]                                                         # file, epoch and frames, in this order
        assert checked == [c for e in range(4) for c in valid[7*e+r:7*e+7:n]]              # 7 clips
    assert sum(len(v) for _,v in shares) == len(valid) == 28

def test_loader_processes(results):
    assert results['workers 2']['res'][0]['losses'] == pytest.approx(results['no workers 0']['res'][0]['losses'], rel=1e-5)

def test_chance_differs_between_processes(results):
    a,b = results['random 2']['res']
    assert a['drawn'] != b['drawn'] and a['bits'] == b['bits']

def test_only_process_0_writes_and_shows_bars(results):
    run = results['files 2']
    assert run['codes'] == [0, 0] and {'history.csv', 'log.csv', 'best.pth'} <= set(run['files'])
    assert 'Epoch 1/1' in run['said'][0] and 'Epoch' not in run['said'][1] and 'train_loss' not in run['said'][1]

def test_a_batch_that_one_leaves_out_all_leave_out(results):
    run = results['one bad 2']
    assert run['codes'] == [0, 0] and 'left out, 1 of at most 1' in run['said'][1] and len(run['res'][0]['losses']) == run['res'][0]['iters'] - 1
    assert run['res'][0]['bits'] == run['res'][1]['bits']
    bad = results['too bad 2']
    assert bad['codes'] == [1, 1] and 'loss = nan in epoch 1, batch 2, of train' in bad['said'][1]

@pytest.mark.parametrize('name, codes', [('killed', [1, KILLED]), ('killed0', [KILLED, 1]), ('told', [TERMINATED]*2)])
def test_resumed_bit_for_bit(results, name, codes):
    run = results[name]
    assert run['first']['codes'] == codes and run['first']['seconds'] < 40                 # whoever is left ends too
    assert run['then']['codes'] == [0, 0] and run['then']['said'][0].count('going on from checkpoint') == 1 and 'going on' not in run['then']['said'][1]
    for whole,o in zip(results['whole 2']['res'], run['then']['res']):
        assert {k: v for k,v in o.items() if k != 'seen'} == {k: v for k,v in whole.items() if k != 'seen'}
        assert len(o['seen']) < len(whole['seen'])

@pytest.mark.parametrize('name, codes', [('sharded killed', [1, KILLED]), ('sharded told', [TERMINATED]*2)])
def test_shards_resumed_bit_for_bit(results, name, codes):
    run = results[name]
    assert run['first']['codes'] == codes and run['then']['codes'] == [0, 0] and run['then']['said'][0].count('going on from checkpoint') == 1, run
    for whole,o in zip(results['sharded whole 2']['res'], run['then']['res']):
        assert {k: v for k,v in o.items() if k != 'seen'} == {k: v for k,v in whole.items() if k != 'seen'}

def test_one_process_goes_on_from_the_shards_of_two(results):
    run,one = results['elastic'],results['fad 0']['res'][0]
    assert run['codes'] == [0] and 'going on from checkpoint' in run['said'][0], run
    assert run['res'][0]['weights'] == pytest.approx(one['weights'], rel=1e-4, abs=1e-4)

def test_another_number_of_processes_is_another_run(results):
    assert results['fewer']['codes'] == [1] and 'data.processes: 2 there, 1 here' in results['fewer']['said'][0]

def test_a_process_that_does_not_come(results):
    assert results['late']['codes'] == [1, 1] and 'Timed out waiting 2000ms' in results['late']['said'][0] and results['late']['seconds'] < 40

@pytest.mark.parametrize('what, said', [
    ('batch', 'bs is 5, for 2 processes together: it must be a multiple of 2'), ('rest', '17 training clips cannot be shared evenly by 2 processes: use drop_last=True'),
    ('loader', 'Distributed shares out a VideoDL, not a DataLoader'), ('gpu', 'needs GPU 0, and there are 0 GPUs'), ('alone', 'no process group: start the script with `torchrun')])
def test_refused(results, what, said):
    run = results[f'refused {what}']
    assert set(run['codes']) == {1} and said in run['said'][0], run['said']

def torchrun(out, *words, **env):
    return subprocess.run([Path(sys.executable).with_name('torchrun'), '--nproc_per_node', '2', '--master_port', str(20000 + os.getpid()%20000), *words, WORKER, out],
                          capture_output=True, text=True, timeout=240, env=ENV | env, cwd=WORKER.parent.parent)

def test_torchrun_ends_when_a_process_is_killed(tmp_path):
    start = time.time()
    done = torchrun(tmp_path)
    assert done.returncode == 1 and 'Signal 9 (SIGKILL)' in done.stderr and not list(tmp_path.glob('*.json')), done.stderr[-3000:]
    assert list((tmp_path/'states').glob('checkpoint-*.pt'))
    print(f'{time.time()-start:.0f} s')

def test_torchrun_starts_again_by_itself(results, tmp_path):
    done = torchrun(tmp_path, '--standalone', '--max_restarts', '1', TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    assert done.returncode == 0 and 'going on from checkpoint' in done.stdout, done.stderr[-3000:]
    for r in range(2): assert json.loads((tmp_path/f'{r}.json').read_text())['bits'] == results['whole 2']['res'][r]['bits']
