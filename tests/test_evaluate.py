"A multi-view test under two processes and under SIGKILL, and on the command line."
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from tsd.checkpoints import save_student
from tsd.data import VideoDataLoaders, VideoItem
from tsd.evaluate import read_results, test_views as views
from tsd.student import VideoViT
from tsd.tinyclips import make_tinyclips
from tsd.video import VideoError, probe

pytestmark = pytest.mark.usefixtures('one_thread')

class Watched(VideoViT):
    "A student that writes down how many views it sees, and kills its process with `limit` batches"
    limit,log = None,None
    def forward(self, x):
        if self.limit == 0: os.kill(os.getpid(), signal.SIGKILL)
        if self.limit: self.limit -= 1
        with open(self.log, 'a') as f: f.write(f'{len(x)}\n')
        return super().forward(x)

def seen(log): return sum(map(int, Path(log).read_text().split())) if Path(log).exists() else 0

@pytest.fixture(scope='module')
def job(tmp_path_factory):
    "A student, 31 videos of which one cannot be read, and the arguments of a test"
    path = tmp_path_factory.mktemp('evaluate')
    dls = VideoDataLoaders.from_csv(make_tinyclips(path/'clips', n_train=20, n_test=30, frames=12, seed=0), frames=4, stride=2, size=32, bs=10)
    (path/'bad.mp4').write_bytes(b'no video')
    torch.manual_seed(0)
    net = Watched(img_size=32, num_frames=4, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    items = list(dls.valid_ds.items)
    items.insert(7, VideoItem(path/'bad.mp4', items[0].label))
    return net, items, dict(clips=2, crops=3, sampling=dls.valid_ds.sampling, vocab=list(dls.vocab), bs=12, strict=False, workers=1)

def worker(rank, world, folder, job, limit, out):
    "One process of a test; what it returned goes to a file"
    torch.set_num_threads(1)
    if world > 1: dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    net, items, kw = job
    net.limit,net.log = limit,folder/f'log{rank}'
    try: torch.save(views(net, items, out=out, **kw), folder/f'result{rank}')
    except (ValueError, VideoError) as e:
        (folder/f'said{rank}').write_text(str(e))
        raise SystemExit(3)
    if world > 1: dist.destroy_process_group()

def start(world, folder, job, limit=None, out=None):
    "Run the processes of a test to their end; their exit codes"
    folder.mkdir()
    ctx = multiprocessing.get_context('fork')
    ps = [ctx.Process(target=worker, args=(r, world, folder, job, limit, out)) for r in range(world)]
    for p in ps: p.start()
    for p in ps: p.join(120)
    return [p.exitcode for p in ps]

def load(folder, rank): return torch.load(folder/f'result{rank}', weights_only=False)

def same(res, want):
    for k in ('top1', 'top5', 'mean_class', 'interval', 'expected', 'evaluated', 'unreadable', 'dataset'): assert res[k] == want[k], k
    cols = [c for c in want['table'] if not c.startswith('p_')]
    assert res['table'][cols].equals(want['table'][cols])
    probs = lambda t: t.filter(regex='^p_').values
    assert abs(probs(res['table']) - probs(want['table'])).max() < 1e-6

@pytest.fixture(scope='module')
def want(job, tmp_path_factory):
    net, items, kw = job
    net.limit,net.log = None,tmp_path_factory.mktemp('want')/'log'
    res = views(net, items, **kw)
    assert res['expected'] == 31 and res['evaluated'] == 30 and seen(net.log) == 30*6 and 'bad.mp4' in res['unreadable'][0][0]
    return res

@pytest.mark.parametrize('out', [None, 'test.csv'])
def test_two_processes_share_the_videos(tmp_path, job, want, out):
    out = out and tmp_path/out
    assert start(2, tmp_path/'run', job, out=out) == [0, 0]
    for rank in (0, 1): same(load(tmp_path/'run', rank), want)
    logs = [seen(tmp_path/'run'/f'log{r}') for r in (0, 1)]
    assert sum(logs) == 30*6 and min(logs) >= 14*6                 # each video once, in equal shares
    if out:
        assert read_results(out).path.tolist() == want['table'].path.tolist()
        assert sorted(o.name for o in tmp_path.glob('test*')) == ['test.csv', 'test.json']

def test_killed_and_resumed_with_other_numbers_of_processes(tmp_path, job, want):
    "Two processes killed, then one killed, then one to the end: no view is computed twice"
    out = tmp_path/'test.csv'
    assert start(2, tmp_path/'a', job, 3, out) == [-signal.SIGKILL]*2
    assert start(1, tmp_path/'b', job, 4, out) == [-signal.SIGKILL]
    kept = read_results(out)                                       # what the second run found
    assert len(kept) == kept.path.nunique() == 2*3*2 - 1    # the bad one was among them
    assert start(1, tmp_path/'c', job, None, out) == [0]
    same(load(tmp_path/'c', 0), want)
    total = sum(seen(f) for d in 'abc' for f in (tmp_path/d).glob('log*'))
    assert total == 30*6
    about = json.loads((tmp_path/'test.json').read_text())
    assert (about['expected'], about['evaluated'], len(about['unreadable'])) == (31, 30, 1) and about['top1'] == want['top1']

def test_refusal_reaches_every_process(tmp_path, job):
    "Rows of other weights, and an unreadable video where that is an error: both processes say so, none waits for the other"
    net, items, kw = job
    assert start(1, tmp_path/'a', job, out=tmp_path/'test.csv') == [0]
    other = Watched(**net.config)
    for d, task, out, says in (('b', (other, items, kw), tmp_path/'test.csv', 'results of other weights'), ('c', (net, items, kw | dict(strict=True)), None, 'bad.mp4: cannot be read')):
        assert start(2, tmp_path/d, task, out=out) == [3, 3]
        said = [(tmp_path/d/f'said{r}').read_text() for r in (0, 1)]
        assert said[0] == said[1] and says in said[0]

def test_predict_a_folder_of_odd_files(tmp_path, shared, job, capsys):
    "A line a video, those that cannot be read among them, and the exit status says that there were some"
    from tsd.cli import main
    from tsd.predict import find_videos
    plain = VideoViT(**job[0].config)
    save_student(plain, tmp_path/'s.safetensors', job[2]['vocab'], sampling=asdict(job[2]['sampling']))
    folder = shared/'clips'/'odd'
    assert main(['predict', str(folder), '--model', str(tmp_path/'s.safetensors'), '--json', '--topk', '3', '--clips', '1', '--crops', '1']) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(o) for o in out.splitlines()]
    def readable(v):
        try: probe(v)
        except VideoError: return False
        return True
    assert [r['path'] for r in rows] == [str(v) for v in find_videos([folder])]
    assert all(readable(r['path']) for r in rows if r['predictions']) and any(not readable(r['path']) for r in rows)
    assert all(len(r['predictions']) == 3 for r in rows if 'error' not in r) and sum('error' not in r for r in rows) >= 5
    assert err.count('\n') == sum('error' in r for r in rows) and 'Traceback' not in err

def official(shared, name, folder):
    "The first rows of a set's official lists, as they are where a few lines of training clips are needed too; test clips (path, class), all classes, options of --data-options"
    at,notes = shared/'annotations',folder/'notes'
    notes.mkdir(parents=True)
    if name == 'kinetics':
        lines = (at/'kinetics400'/'kinetics-400_val.csv').read_text().splitlines()[:40]
        (notes/'val.csv').write_text('\n'.join(lines) + '\n')
        rows = [o.split(',') for o in lines[1:]]
        return [(f'{i}_{int(a):06}_{int(b):06}.mp4', c) for c,i,a,b,*_ in rows], (at/'kinetics400'/'label_map.txt').read_text().splitlines(), f'csvs={notes}/val.csv'
    if name == 'ssv2':
        rows = json.loads((at/'ssv2'/'something-something-v2-validation.json').read_text())[:40]
        names = (at/'ssv2'/'something-something-v2-labels.json').read_text()
        for part,o in (('labels', names), ('validation', json.dumps(rows[1:])), ('train', json.dumps(rows[:1]))): (notes/f'{part}.json').write_text(o)
        return [(f'{o["id"]}.webm', o['template'].replace('[', '').replace(']', '')) for o in rows[1:]], list(json.loads(names)), f'annotations={notes}'
    if name == 'ucf101':
        names,rows = (at/'ucf101'/'classInd.txt').read_text(), (at/'ucf101'/'testlist01.txt').read_text().splitlines()[:40]
        for f,o in (('classInd.txt', names), ('testlist01.txt', '\n'.join(rows[1:])), ('trainlist01.txt', rows[0] + ' 1')): (notes/f).write_text(o)
        return [(o, o.split('/')[0]) for o in rows[1:]], [o.split()[1] for o in names.splitlines()], f'annotations={notes} split=1'
    rows = []
    for c in ('cartwheel', 'dive', 'wave'):
        text = (at/'hmdb51'/f'{c}_test_split1.txt').read_text()
        (notes/f'{c}_test_split1.txt').write_text(text)
        rows += [(f'{c}/{o.split()[0]}', c) for o in text.splitlines() if o.split()[1] == '2']
    return rows, sorted(o.strip() for o in (at/'hmdb51'/'class_list.txt').read_text().splitlines() if o.strip()), f'annotations={notes}'

@pytest.mark.parametrize('name', ['kinetics', 'ssv2', 'ucf101', 'hmdb51'])
def test_official_lists_on_the_command_line(tmp_path, shared, name, tsd, job):
    "Three videos of a set that has more: the three are tested by their official classes, the others are named, none is forgotten"
    rows,names,opts = official(shared, name, tmp_path/'set')
    video,there = next(o.path for o in job[1] if o.path.name != 'bad.mp4'),[rows[0], rows[len(rows)//2], rows[-1]]
    for path,_ in there:
        (file := tmp_path/'videos'/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, file)
    save_student(VideoViT(**job[0].config | dict(num_classes=len(names))), tmp_path/'s.safetensors', names, sampling=asdict(job[2]['sampling']))
    words = ['test', '--model', 's.safetensors', '--source', name, '--data', 'videos', '--clips', 1, '--crops', 1]
    code,out,err = tsd(*words, '--data-options', opts, '--out', 'test.csv')
    assert code == 1 and f'3 of {len(rows)} videos' in out and err.count('not tested: ') == len(rows) - 3, err
    table = read_results('test.csv')
    assert [(Path(p).name, c) for p,c in zip(table.path, table.label)] == [(Path(p).name, c) for p,c in there]
    code,out,err = tsd(*words, '--data-options', 'colour=red')
    assert code == 1 and f'colour=red: {name} has no such option' in err and err.count('\n') == 1, err
    code,out,err = tsd(*words[:-6], '--data', 'nowhere', '--data-options', opts)
    assert code == 1 and 'nowhere' in err and err.count('\n') == 1, err

def test_lists_on_the_command_line(tmp_path, tsd, job):
    "Lines `path class` with names beside them and videos elsewhere; the same videos as a CSV file whose paths are relative to a folder: the same answers"
    net,items,kw = job
    good,names = [o for o in items if o.path.name != 'bad.mp4'][:4],kw['vocab']
    save_student(VideoViT(**net.config), tmp_path/'s.safetensors', names, sampling=asdict(kw['sampling']))
    root = good[0].path.parent
    while not all(o.path.is_relative_to(root) for o in good): root = root.parent
    (tmp_path/'list.txt').write_text(''.join(f'{o.path.relative_to(root)} {names.index(o.label)}\n' for o in good))
    (tmp_path/'names.txt').write_text('\n'.join(names))
    pd.DataFrame(dict(path=[o.path.relative_to(root) for o in good], label=[o.label for o in good])).to_csv(tmp_path/'clips.csv', index=False)
    words = ['test', '--model', 's.safetensors', '--clips', 1, '--crops', 1]
    for out,more in (('a.csv', ['--source', 'lists', '--data', 'list.txt', '--data-options', f'path={root} classes=names.txt']), ('b.csv', ['--data', 'clips.csv', '--data-options', f'folder={root}'])):
        code,said,err = tsd(*words, *more, '--out', out)
        assert code == 0 and '4 of 4 videos' in said, err
    assert read_results('a.csv').equals(read_results('b.csv')) and read_results('a.csv').label.tolist() == [o.label for o in good]

@pytest.mark.slow
def test_torchrun(tmp_path, job, want):
    net, items, kw = job
    plain = VideoViT(**net.config); plain.load_state_dict(net.state_dict())
    save_student(plain, tmp_path/'s.safetensors', kw['vocab'], sampling=asdict(kw['sampling']))
    pd.DataFrame(dict(path=[o.path for o in items], label=[o.label for o in items])).to_csv(tmp_path/'clips.csv', index=False)
    run = [Path(sys.executable).with_name('torchrun'), '--nproc-per-node', '2', '--no-python', Path(sys.executable).with_name('tsd'), 'test', '--model', 's.safetensors', '--data', 'clips.csv',
           '--clips', '2', '--out', 'test.csv']
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.stdout.count('30 of 31 videos') == 1 and done.stderr.count('not tested') == 1, done.stderr
    assert abs(read_results(tmp_path/'test.csv').filter(regex='^p_').values - want['table'].filter(regex='^p_').values).max() < 1e-6
