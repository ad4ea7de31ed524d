"Tar shards against plain files: the same batches, kills, several processes, a small disk, a web server, damaged and foreign shards"
import contextlib, functools, http.server, io, multiprocessing, os, pickle, shutil, signal, sys, tarfile, threading, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback   # brings learn.no_bar
from fastai.learner import Learner, load_learner
from torch import nn

pytest.importorskip('webdataset')
import webdataset

from conftest import noise_video
from tsd import shards as sh
from tsd.data import VideoDataLoaders
from tsd.resume import ExactResume
from tsd.shards import ShardCache, index_shards, read_index, shards_of, window_order, write_shards
from tsd.teachers import fingerprint

SMALL = dict(frames=4, stride=1, size=16, bs=4, num_workers=0)
pytestmark = pytest.mark.usefixtures('one_thread')
fork = multiprocessing.get_context('fork')

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "A folder of 36 clips of noise and their table: three classes in a row, the last third for validation; shards of four clips or so"
    root = tmp_path_factory.mktemp('clips')
    rows = []
    for i in range(36):
        noise_video(root/f'clip {i:02}.v1.mp4', 8, 20, 28, i)
        rows.append((f'clip {i:02}.v1.mp4', ['stay, there','à gauche','10'][i//12], 'valid' if i%12 > 7 else 'train', f'g{i//2}'))
    df = pd.DataFrame(rows, columns=['path','label','split','group'])
    df.to_csv(root/'clips.csv', index=False)
    write_shards(df, root/'shards', root, shard_mb=.016)
    return root, df

def loaders(clips, cache, window=None, index=None, **kw): return VideoDataLoaders.from_shards(index or clips[0]/'shards/index.csv', cache, window=window, **{**SMALL, **kw})
def epoch(dl): return [(x.as_subclass(torch.Tensor), y) for x,y in dl]
def same(a, b): return len(a) == len(b) and all(torch.equal(u, v) for x,y in zip(a, b) for u,v in zip(x, y))
def logged(clips, log, before=''): return f"pipe:{before} echo {{}} >> '{log}'; cat '{clips[0]}/shards/{{}}'"
def copied(clips, to): return shutil.copytree(clips[0]/'shards', to)
def contents(root): return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}
def whole(cache): return sorted(o.name for o in Path(cache).iterdir() if o.is_dir() and o.suffix != '.part')

def in_child(f):
    "Exit status of a forked process that calls `f`"
    p = fork.Process(target=f); p.start(); p.join(60)
    return p.exitcode

def wait_for(done, seconds=30):
    for _ in range(int(seconds/.02)):
        if done(): return
        time.sleep(.02)
    raise AssertionError(f'not within {seconds} s')

# --- order

@pytest.mark.parametrize('kw', [dict(augment='finetune', seed=3, num_workers=2), dict(repeats=2, augment='finetune', drop_last=None)])
def test_whole_order_is_that_of_files(clips, tmp_path, kw):
    kw = {k:v for k,v in kw.items() if v is not None}
    a,b = VideoDataLoaders.from_csv(clips[0]/'clips.csv', **{**SMALL, **kw}),loaders(clips, tmp_path/'c', **kw)
    assert list(a.vocab) == list(b.vocab)
    for _ in range(2): assert all(same(epoch(u), epoch(v)) for u,v in zip(a.loaders, b.loaders))

def test_held_out_clips_and_class_order_are_those_of_files(clips, tmp_path):
    names = ['stay, there','10','à gauche']
    df = clips[1].drop(columns='split').assign(label=pd.Categorical(clips[1].label, names))
    write_shards(df, tmp_path/'s', clips[0], shard_mb=.03)
    a,b = VideoDataLoaders.from_df(df, clips[0], **SMALL, valid_pct=.3),loaders(clips, tmp_path/'c', index=tmp_path/'s/index.csv', valid_pct=.3)
    assert list(b.vocab) == names and 0 < len(b.valid_ds) < 20
    assert all(same(epoch(u), epoch(v)) for u,v in zip(a.loaders, b.loaders))

def test_window_order_any_workers_any_processes(clips, tmp_path):
    a = loaders(clips, tmp_path/'a', 2)
    want = [epoch(a.train) for _ in range(2)]
    assert not same(*want) and not same(want[0], epoch(loaders(clips, tmp_path/'a', 2, seed=1).train))
    b = loaders(clips, tmp_path/'b', 2, num_workers=2)
    assert all(same(o, epoch(b.train)) for o in want)
    halves = [loaders(clips, tmp_path/'b', 2).train.new(share=(k,2)) for k in range(2)]
    for o in want:
        one,two = map(epoch, halves)
        assert len(one) == len(two) == len(o)
        for (x,y),(u,v),(w,z) in zip(o, one, two): assert torch.equal(x[0::2], u) and torch.equal(x[1::2], w) and torch.equal(y[0::2], v) and torch.equal(y[1::2], z)

def test_every_clip_once_and_each_shard_fetched_once(clips, tmp_path):
    dls = loaders(clips, tmp_path/'c', 2, urls=logged(clips, tmp_path/'log'))
    n = dict(zip(*np.unique(read_index(clips[0]/'shards/index.csv').groupby('split')['shard'].unique().explode().map(lambda o: o[:5]), return_counts=True)))
    calls = lambda: [o for o in (tmp_path/'log').read_text().split() if o.startswith('train')]
    assert not calls()
    for k in range(1, 3):
        seen = []
        for i in dls.train.get_idxs(): seen.append(i); dls.train_ds.clip(i); assert dls.store.used() <= dls.store.gb*1e9
        assert sorted(seen) == list(range(24))
        assert n['train'] <= len(calls()) <= n['train']*k and n['train'] == len(set(calls())) >= 5   # in the second epoch some are there still

def test_window_is_mixed_within_and_bounded():
    rng = np.random.default_rng(0)
    shard = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 90, 40)))
    for k in 1,4,100:
        order,place,_ = window_order(shard, k, np.random.default_rng(k))
        first,last = (np.array([f(np.flatnonzero(shard[order]==s)) for s in range(40)]) for f in (min, max))
        assert sorted(order) == list(range(len(shard))) and max(((first <= i) & (i <= last)).sum() for i in range(len(shard))) <= k
        if k == 1: assert (np.diff(place[shard[order]]) >= 0).all()

# --- resuming

class Stop(Callback):
    order = 99
    def __init__(self, at): self.at,self.seen = at,[]
    def before_batch(self):
        if self.training: self.seen.append(self.y.tolist()+[self.x.sum().item()])
    def after_batch(self):
        if self.training and len(self.seen) == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('workers', [0, 2])
def test_exact_resume(clips, tmp_path, workers):
    def run(cache, states, at=None, window=2):
        dls = loaders(clips, cache, window, num_workers=workers)
        torch.manual_seed(0)
        stop,learn = Stop(at),Learner(dls, nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Dropout(.3), nn.Linear(24, 3)))
        with learn.no_bar(), learn.no_logging(), contextlib.suppress(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=[stop, ExactResume(states, steps=1)])
        return stop.seen,{k: v.clone() for k,v in learn.model.state_dict().items()}
    seen,weights = run(tmp_path/'a', tmp_path/'sa')
    part,_ = run(tmp_path/'b', tmp_path/'sb', at=8)                       # of 6 batches an epoch
    rest,again = run(tmp_path/'other', tmp_path/'sb')                     # another machine: nothing is unpacked there
    assert len(part) == 8 and part == seen[:8] and seen[-len(rest):] == rest and 4 <= len(rest) <= 5
    assert all(torch.equal(v, again[k]) for k,v in weights.items())
    with pytest.raises(ValueError, match='data.window: 2 there, 3 here'): run(tmp_path/'b', tmp_path/'sb', window=3)

# --- writing

@pytest.mark.parametrize('n, after', [(1, False), (3, False), (3, True), (99, False)])
def test_killed_while_writing_it_goes_on(clips, tmp_path, n, after):
    def die():
        calls,real = [0],os.replace
        def replace(a, b):
            calls[0] += str(b).endswith('.tar')
            last = calls[0] == n or (n == 99 and str(b).endswith('index.csv'))
            if last and not after: os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)
            if last: os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        write_shards(clips[1], tmp_path/'s', clips[0], shard_mb=.016)
    assert in_child(die) == -signal.SIGKILL
    made = {p: p.stat().st_mtime_ns for p in (tmp_path/'s').glob('*.tar')}
    assert not (tmp_path/'s/index.csv').exists() and len(made) in ((n-1+after,) if n < 99 else range(6, 20))
    write_shards(clips[1], tmp_path/'s', clips[0], shard_mb=.016)
    got,want = contents(tmp_path/'s'),contents(clips[0]/'shards')
    assert {k: got[k] for k in got if k != 'written.csv'} == {k: want[k] for k in want if k != 'written.csv'}
    assert all(p.stat().st_mtime_ns == t for p,t in made.items())

def test_a_changed_clip_and_a_second_writer_are_refused(clips, tmp_path):
    root = Path(shutil.copytree(clips[0], tmp_path/'all'))
    with sh.Ledger(root/'shards/written.csv', [*sh.INDEX,'mtime_ns']):
        with pytest.raises(OSError, match='another process is at work'): write_shards(clips[1], root/'shards', root, shard_mb=.016)
    os.utime(root/'clip 05.v1.mp4', ns=(1, 1))
    with pytest.raises(ValueError, match='clip 05.v1.mp4 has changed'): write_shards(clips[1], root/'shards', root, shard_mb=.016)
    with pytest.raises(ValueError, match='shard_mb is 0'): write_shards(clips[1], tmp_path/'x', root, shard_mb=0)
    (root/'plain').write_bytes(b'x')
    with pytest.raises(ValueError, match='plain: its name has no ending'): write_shards(clips[1].assign(path=['plain', *clips[1].path[1:]]), tmp_path/'x', root)

def test_read_by_webdataset_and_by_tar(clips, tmp_path):
    tars = sorted(map(str, (clips[0]/'shards').glob('*.tar')))
    want = {r.path: ((clips[0]/r.path).read_bytes(), r.label, r.split, r.group) for r in clips[1].itertuples()}
    decoded = {o['json']['path']: (o['mp4'], o['json']['label'], o['json']['split'], o['json']['group']) for o in webdataset.WebDataset(tars, shardshuffle=False).decode()}
    assert decoded == want
    numbers = {o['json']['label']: o['cls'] for o in webdataset.WebDataset(tars, shardshuffle=False).decode()}
    assert numbers == {k: i for i,k in enumerate(sorted(set(clips[1].label)))}
    assert sum(len(tarfile.open(o).getnames()) for o in tars) == 3*36
    again = index_shards(tars, tmp_path/'i.csv').sort_values('member', ignore_index=True)
    again['shard'] = again['shard'].map(os.path.basename)
    assert again.astype(str).equals(pd.read_csv(clips[0]/'shards/index.csv', dtype=str))

# --- unpacking

def shards_at(clips, urls=None): return shards_of(read_index(clips[0]/'shards/index.csv', urls))[0]

def test_several_processes_unpack_a_shard_once(clips, tmp_path):
    shard = shards_at(clips, logged(clips, tmp_path/'log', 'sleep .3;'))[0]
    def work():
        with ShardCache(tmp_path/'c').held(shard) as folder:
            for member,n,_ in shard.clips: assert (folder/member).stat().st_size == n
    ps = [fork.Process(target=work) for _ in range(4)]
    for p in ps: p.start()
    for p in ps: p.join(30)
    assert [p.exitcode for p in ps] == [0]*4 and len((tmp_path/'log').read_text().split()) == 1

def test_killed_while_unpacking(clips, tmp_path):
    root,df = clips
    write_shards(df, tmp_path/'large', root, shard_mb=1.)                     # more of it than a block of the pipe comes through
    shard = shards_of(read_index(tmp_path/'large/index.csv'))[0][0]
    half = f"pipe:head -c {shard.bytes//2} '{shard.url}'; sleep 5"
    def work():
        with ShardCache(tmp_path/'c').held(sh.Shard(half, shard.name, shard.bytes, shard.clips)): pass
    p = fork.Process(target=work); p.start()
    part = tmp_path/'c'/f'{shard.name}.part'
    wait_for(lambda: part.is_dir() and any(part.iterdir()))
    p.kill(); p.join()
    cache = ShardCache(tmp_path/'c', gb=shard.bytes/1e9)
    assert part.exists() and whole(tmp_path/'c') == [] and cache.used() == shard.bytes
    with cache.held(shard) as folder: assert sorted(o.name for o in folder.iterdir()) == [m for m,*_ in shard.clips]
    assert not part.exists()

def test_room_for_as_much_as_was_allowed(tmp_path):
    n = 124715
    assert n/1e9*1e9 < n                                                     # a number that GB do not hold exactly
    ShardCache(tmp_path, gb=n/1e9).make_room(sh.Shard('x.tar', f'x-{"0"*16}-{n}', n, ()), seconds=0)

def test_a_part_of_another_run_makes_room(clips, tmp_path):
    one,two = shards_at(clips)[:2]
    cache = ShardCache(tmp_path/'c', gb=max(one.bytes, two.bytes)/1e9)
    cache.lock(one.name).touch(); (tmp_path/'c'/f'{one.name}.part').mkdir()
    with cache.held(two): assert whole(tmp_path/'c') == [two.name] and cache.used() == two.bytes

def test_nothing_in_use_is_removed(clips, tmp_path, monkeypatch):
    one,two = shards_at(clips)[:2]
    cache = ShardCache(tmp_path/'c', gb=max(one.bytes, two.bytes)/1e9)
    monkeypatch.setattr(ShardCache, 'make_room', functools.partialmethod(ShardCache.make_room, seconds=.3))
    go,ready = fork.Event(),fork.Event()
    def reader():
        with ShardCache(tmp_path/'c').held(one): ready.set(); go.wait(20)
    p = fork.Process(target=reader); p.start(); assert ready.wait(20)
    with pytest.raises(OSError, match=r'GB of shards are in use, train-000001.* raise it'):
        with cache.held(two): pass
    assert whole(tmp_path/'c') == [one.name]
    go.set(); p.join()
    with cache.held(two): assert whole(tmp_path/'c') == [two.name]

def test_pins_last_as_long_as_their_run(clips, tmp_path):
    shards = shards_at(clips)
    def run(): ShardCache(tmp_path/'c').keep(shards[:2]); os.kill(os.getpid(), signal.SIGKILL)
    assert in_child(run) == -signal.SIGKILL and len(list((tmp_path/'c').glob('*.pin'))) == 1
    cache = ShardCache(tmp_path/'c')
    assert sorted(cache.removable()) == [o.name for o in shards[:2]]         # its owner is dead
    cache.keep(shards[:1])
    assert ShardCache(tmp_path/'c').removable() == [shards[1].name] and len(list((tmp_path/'c').glob('*.pin'))) == 1

def test_a_damaged_shard_stops_training_with_its_name(clips, tmp_path):
    to = copied(clips, tmp_path/'s')
    row = read_index(to/'index.csv').query('split == "train"').iloc[0]
    def train(workers=0): return epoch(loaders(clips, tmp_path/f'c{workers}', 2, index=to/'index.csv', num_workers=workers).train)
    raw = (to/row['shard']).read_bytes()
    at = raw.find((clips[0]/row.path).read_bytes())
    for data,said in ((raw[:at+40], f'{row["shard"]}: is truncated'), (b'', f'{row["shard"]}: is truncated'), (raw[:at+40]+b'????'+raw[at+44:], f'{row["shard"]}: member {row.member} is damaged')):
        (to/row['shard']).write_bytes(data)
        with pytest.raises(OSError, match=said): train()
        with pytest.raises(OSError, match=said): loaders(clips, tmp_path/'d', index=to/'index.csv')
    with pytest.raises(OSError, match=said): train(2)
    (to/row['shard']).unlink()
    with pytest.raises(OSError, match=f'{row["shard"]}: cannot be read .No such file'): train()
    wait_for(lambda: not [*tmp_path.glob('c0/*.part'), *tmp_path.glob('d/*.part')])          # the next shard may be on its way still

def test_a_shard_that_lacks_a_clip(clips, tmp_path):
    "As one does that was cut between two members: tar sees nothing wrong with it"
    shard = shards_at(clips)[0]
    with tarfile.open(clips[0]/'shards/train-000000.tar') as t: end = next(o.offset for o in reversed(t.getmembers()) if o.name.endswith('.mp4'))
    (tmp_path/'cut.tar').write_bytes((clips[0]/'shards/train-000000.tar').read_bytes()[:end])
    with pytest.raises(OSError, match=rf'cut.tar: 1 of {len(shard.clips)} clips are not in it, the first is member \d\d.mp4'):
        with ShardCache(tmp_path/'c').held(sh.Shard(str(tmp_path/'cut.tar'), shard.name, shard.bytes, shard.clips)): pass
    assert not whole(tmp_path/'c')

def test_a_command_is_read_to_its_end(clips, tmp_path):
    url = f"pipe:cat '{clips[0]}/shards/train-000000.tar'; head -c 300000 /dev/zero || exit 1"   # some programs fail when nobody reads on
    with sh.tar_from(url) as tar: assert len([*tar]) == 3*len(shards_at(clips)[0].clips)
    with pytest.raises(OSError, match='its command ends with status 3'):
        with sh.tar_from(url+'; exit 3') as tar: list(tar)

def test_full_disk(clips, tmp_path, monkeypatch):
    if shutil.which('mount') and not os.system(f'mkdir {tmp_path}/disk; mount -t tmpfs -o size=60k none {tmp_path}/disk 2>/dev/null'):
        try:
            monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('u', (), dict(free=10**9)))       # it fills up meanwhile
            with pytest.raises(OSError, match='disk: cannot be written to .No space left'): loaders(clips, tmp_path/'disk')
            assert not list((tmp_path/'disk').glob('*.part'))
        finally: os.system(f'umount -l {tmp_path}/disk')
    if Path('/dev/full').exists():                                           # even where a member is smaller than a buffer
        with pytest.raises(OSError, match=f'{tmp_path}: cannot be written to .No space left'): ShardCache(tmp_path)._copy(io.BytesIO(b'x'), Path('/dev/full'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('u', (), dict(free=100)))
    with pytest.raises(OSError, match='GB are free: choose another disk'): loaders(clips, tmp_path/'c')

# --- from a server

@pytest.fixture
def server(clips):
    "The URL of the shards on a server of this machine; one name is cut off in the middle"
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
        def copyfile(self, src, out): out.write(src.read()[:3000] if 'cut' in self.path else src.read())
        def translate_path(self, path): return super().translate_path(path.replace('/cut', ''))
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=clips[0]/'shards'))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown(); httpd.server_close()

def test_http(clips, tmp_path, server):
    a,b = VideoDataLoaders.from_csv(clips[0]/'clips.csv', **SMALL),loaders(clips, tmp_path/'c', index=f'{server}/index.csv')
    assert same(epoch(a.train), epoch(b.train)) and same(epoch(a.valid), epoch(b.valid))
    assert same(epoch(loaders(clips, tmp_path/'e', 2).train), epoch(loaders(clips, tmp_path/'f', 2, index=f'{server}/index.csv', num_workers=2).train))
    with pytest.raises(OSError, match='none.csv: cannot be read .the server answers with an error, such as 404'): loaders(clips, tmp_path/'d', index=f'{server}/none.csv')
    with pytest.raises(OSError, match=r'valid-0+\d.tar.gone: cannot be read .the server answers with an error|train-0+\d.tar.gone: cannot'): loaders(clips, tmp_path/'d', urls=server+'/{}.gone')
    with pytest.raises(OSError, match=r'-0+\d.tar: cannot be read .it ended early|cut.*is truncated'): loaders(clips, tmp_path/'d', urls=server+'/cut{}')
    with pytest.raises(OSError, match='cannot be read .no connection'): loaders(clips, tmp_path/'d', index='http://127.0.0.1:9/index.csv')

# --- shards of others

def foreign(tmp_path, *members, name='f.tar'):
    with tarfile.open(tmp_path/name, 'w') as t:
        for member,data in members:
            o = tarfile.TarInfo(member); o.size = len(data)
            t.addfile(o, io.BytesIO(data))
    return str(tmp_path/name)

def test_foreign_shards(clips, tmp_path):
    raw = [(clips[0]/p).read_bytes() for p in clips[1].path]
    for part,idx in (('train', range(16)), ('val', range(16, 24))):
        with webdataset.ShardWriter(f'{tmp_path}/{part}-%03d.tar', maxcount=5, verbose=0) as w:
            for i in idx: w.write({'__key__': f'sub.dir/n{i}', 'mp4': raw[i], 'cls': 9+i%2, 'txt': 'a caption'})
    df = index_shards(dict(train=f'{tmp_path}/train-{{000..003}}.tar', valid=[f'{tmp_path}/val-{i:03}.tar' for i in range(2)]), tmp_path/'index.csv')
    dls = loaders(clips, tmp_path/'c', index=tmp_path/'index.csv')
    assert list(dls.vocab) == ['9','10'] and [len(o.dataset) for o in dls.loaders] == [16, 8] and df.member[0] == 'sub.dir/n0.mp4'
    files = VideoDataLoaders.from_df(pd.DataFrame(dict(path=clips[1].path[:24], label=[str(9+i%2) for i in range(24)], split=['train']*16+['valid']*8)), clips[0], **SMALL, vocab=['9','10'])
    assert same(epoch(files.train), epoch(dls.train)) and same(epoch(files.valid), epoch(dls.valid))

@pytest.mark.parametrize('members, said', [
    ([('a.mp4', b'x'), ('a.cls', b'1'), ('b.cls', b'0')], r'f.tar: sample b has no video, only .cls'), ([('a.mp4', b'x')], 'sample a: has no label'), ([('a.mp4', b'x'), ('a.cls', b'')], 'sample a: has no label'),
    ([('a.mp4', b'x'), ('a.json', b'{')], 'sample a: its .json is none'), ([('a.mp4', b'x'), ('a.json', b'[1]')], 'sample a: has no label'),
    ([('a.mp4', b'x'), ('a.cls', b'0'), ('a.mp4', b'y'), ('a.cls', b'1')], 'f.tar: two members a.mp4'), ([('a.mp4', b'x'), ('a.webm', b'x'), ('a.cls', b'1')], 'has two videos, a.mp4 and a.webm'),
    ([('a.mp4', b'x'), ('a.cls', b'5')], 'unknown class 5, there are 2'), ([('a.mp4', b'x'), ('a.cls', b'hop')], "unknown class 'hop'"),
    ([('../a.mp4', b'x'), ('../a.cls', b'1')], "member '../a.mp4' would lie outside"), ([('/etc/a.mp4', b'x')], 'would lie outside'), ([('readme', b'x')], 'the shards hold no clips'), ([], 'the shards hold no clips')])
def test_odd_foreign_shards(tmp_path, members, said):
    with pytest.raises(ValueError, match=said): index_shards([foreign(tmp_path, *members)], tmp_path/'i.csv', classes=['run','jump'])
    assert not (tmp_path/'i.csv').exists()

# --- bad input

@pytest.mark.parametrize('change, said', [
    (lambda df: df.drop(columns='sha256'), "no column 'sha256'"), (lambda df: df[:0], 'holds no clips'), (lambda df: df.assign(bytes='many'), "line 2: 'many' is no number in column 'bytes'"),
    (lambda df: pd.concat([df, df[3:4]]), r'line 38: member 03.mp4 of shard .* is listed already'), (lambda df: df.assign(member=['../../x', *df.member[1:]]), 'would lie outside'),
    (lambda df: df.assign(label='one'), "label 'one' stands with more than one class: 0, 1, 2"), (lambda df: df.assign(**{'class':'0'}), "class '0' stands with more than one label: 10, "), (lambda df: df.assign(label='one', **{'class':'0'}), "only one class"), (lambda df: df.assign(split='train'), 'no valid clips'), (lambda df: df.assign(split='dev'), "unknown split 'dev'")])
def test_odd_indexes(clips, tmp_path, change, said):
    change(pd.read_csv(clips[0]/'shards/index.csv', dtype=str)).to_csv(tmp_path/'odd.csv', index=False)
    with pytest.raises(ValueError, match=said): loaders(clips, tmp_path/'c', index=tmp_path/'odd.csv', urls=f'{clips[0]}/shards/{{}}')

def test_odd_options(clips, tmp_path):
    with pytest.raises(OSError, match='none.csv: cannot be read .No such file'): loaders(clips, tmp_path/'c', index=tmp_path/'none.csv')
    with pytest.raises(ValueError, match='not an index of shards'): loaders(clips, tmp_path/'c', index=clips[0]/'clips.csv')
    with pytest.raises(ValueError, match='not an index of shards'): loaders(clips, tmp_path/'c', index=clips[0]/'clip 00.v1.mp4')
    with pytest.raises(ValueError, match='window is 0'): loaders(clips, tmp_path/'c', 0)
    with pytest.raises(ValueError, match="needs {} where"): loaders(clips, tmp_path/'c', urls='http://x')
    with pytest.raises(ValueError, match="it isn't known where the shards are"): loaders(clips, tmp_path/'c', index='pipe:cat index.csv')
    with pytest.raises(ValueError, match='cache needs all clips'): VideoDataLoaders.from_shards(clips[0]/'shards/index.csv', tmp_path/'c', window=2, cache=True, **SMALL)
    with pytest.raises(TypeError, match="unexpected keyword argument 'skip'"): loaders(clips, tmp_path/'c', skip='r.csv')
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot be a folder for shards'): loaders(clips, tmp_path/'file')
    assert not (tmp_path/'c').exists() or not whole(tmp_path/'c')

def test_without_webdataset(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'webdataset', None); monkeypatch.setitem(sys.modules, 'webdataset.gopen', None); monkeypatch.setitem(sys.modules, 'webdataset.writer', None)
    with pytest.raises(ValueError, match=r"pip install 'tsd\[shards\]'"): loaders(clips, tmp_path/'c')
    with pytest.raises(ValueError, match=r"pip install 'tsd\[shards\]'"): write_shards(clips[1], tmp_path/'s', clips[0])
    assert not (tmp_path/'s').exists()

# --- fastai's own tools, recipes, command line

def test_learner_export_and_fingerprints(clips, tmp_path):
    from tsd.train import SOURCES, data_fingerprint
    w,all_ = loaders(clips, tmp_path/'w', 2),loaders(clips, tmp_path/'w')
    assert 'shards' in SOURCES and data_fingerprint(w) == data_fingerprint(all_)
    w = loaders(clips, tmp_path/'v', 2)
    with pytest.raises(ValueError, match='cannot be probed'): w.summary_table()
    assert torch.equal(pickle.loads(pickle.dumps(w.train_ds)).samples(3)[0][0], w.train_ds.samples(3)[0][0])
    learn = Learner(w, nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 3)), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2); probs = learn.get_preds()[0]
    learn.export('x.pkl')
    again = load_learner(tmp_path/'x.pkl')
    with again.no_bar(): assert torch.allclose(again.predict(w.valid_ds.items[2].path)[2], probs[2], atol=1e-5)

def test_command_line(tsd, clips, tmp_path):
    code,out,err = tsd('shards', clips[0]/'clips.csv', 'made', '--shard-mb', .016)
    assert code == 0 and out == f"36 clips in {len(list(Path('made').glob('*.tar')))} shards, {sum(pd.read_csv('made/index.csv').bytes)/1e9:.3g} GB; made/index.csv lists them\n"
    assert {k:v for k,v in contents(Path('made')).items() if k != 'written.csv'} == {k:v for k,v in contents(clips[0]/'shards').items() if k != 'written.csv'}
    for words,said in (('absent.csv x', 'absent.csv: no such file'), (f'{clips[0]}/clips.csv made', 'made: holds shards of another table'), (f'{clips[0]}/clips.csv x --shard-mb -1', 'shard_mb is -1'),
                       (f'{clips[0]}/clips.csv x --label-col class', "no column 'class'"), (f'{clips[0]}/clips.csv made/index.csv', 'cannot be written')):
        code,_,err = tsd('shards', *words.split())
        assert code == 1 and said in err and 'Traceback' not in err and err.count('\n') == 1, err
