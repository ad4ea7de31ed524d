"Runs with a teacher cache end like runs without one, whatever happens to its files."
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp

pytestmark = pytest.mark.usefixtures('one_thread')

COMMON = """
import hashlib, timm, torch
from fastai.torch_core import set_seed
from tsd.cache import LogitStore, TeacherCache, Views
from tsd.data import VideoDataLoaders
from tsd.learner import two_stage_learner
from tsd.teachers import Teacher, VideoMAEViT

def teachers(seed=0, **kw):
    torch.manual_seed(seed)
    return (Teacher(timm.create_model('test_resnet', num_classes=10), **kw),
            Teacher(VideoMAEViT(img_size=32, num_frames=4, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10), **kw))

def train(csv, *cbs, models=None, epochs=(1,1), **kw):
    dls = VideoDataLoaders.from_csv(csv, **{**dict(frames=4, stride=2, size=32, bs=10, cache=True, seed=0), **kw})
    models = models or teachers()
    set_seed(0, reproducible=True)
    learn = two_stage_learner(dls, 'tsd_vit_tiny_patch16_224', *models, 'fpld', frame_stride=2, patch_size=8, embed_dim=48, depth=4, num_heads=3)
    with learn.no_bar(), learn.no_logging(): learn.fit_two_stage(*epochs, lr=1e-3, cbs=list(cbs))
    return hashlib.sha256(b''.join(v.numpy().tobytes() for v in learn.student.state_dict().values())).hexdigest()
"""
exec(COMMON)

@pytest.fixture(scope='module')
def csv(tmp_path_factory):
    from tsd.tinyclips import make_tinyclips
    return make_tinyclips(tmp_path_factory.mktemp('clips'), n_train=20, n_test=10, seed=0)

@pytest.fixture(scope='module')
def plain(csv):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                        # as in the tests: other threads, other last bits
    yield train(csv)
    torch.set_num_threads(threads)

def fit(csv, path, *cbs, **kw):
    "Hash of the weights, and the callback's log summed over the epochs"
    cache = TeacherCache(path)
    return train(csv, cache, *cbs, **kw), {k: sum(o[k] for o in cache.log) for k in ('hits', 'misses', 'damaged', 'unsaved')}

def shards(path): return sorted(path.glob('*/*.bin'))

def test_same_weights_without_cold_and_warm(csv, plain, tmp_path):
    assert fit(csv, tmp_path) == (plain, dict(hits=0, misses=60, damaged=0, unsaved=0))     # 20 clips, 2 frames each in stage 1
    assert fit(csv, tmp_path) == (plain, dict(hits=60, misses=0, damaged=0, unsaved=0))
    assert fit(csv, tmp_path, bs=5)[1]['hits'] == 60                                        # the same views in smaller batches
    assert fit(csv, tmp_path, num_workers=2, cache=False) == (plain, dict(hits=60, misses=0, damaged=0, unsaved=0))

def test_two_processes_and_a_kill_in_the_middle_of_an_entry(csv, plain, tmp_path):
    script = COMMON + """
import os, signal, sys, time
from pathlib import Path
from unittest import mock
csv, tmp, me = sys.argv[1:]
torch.set_num_threads(1)
def meet(self, epoch, enter=LogitStore.enter):
    "Both processes have looked before either writes"
    bad, there = enter(self, epoch), Path(tmp)
    (there/f'{me}{epoch}').touch()
    while not all((there/f'{o}{epoch}').exists() for o in 'ab'): time.sleep(.02)
    return bad
with mock.patch.object(LogitStore, 'enter', meet): print('weights', train(csv, TeacherCache(tmp + '/both')), flush=True)
def half(self, records, write=LogitStore._write):
    if self.epoch == 1 and self.file is not None:                                          # the second batch of stage 2
        self.file.write(records.tobytes()[:3*self.kind.itemsize + 17])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, records)
LogitStore._write = half
train(csv, TeacherCache(tmp + '/' + me))
"""
    jobs = [subprocess.Popen([sys.executable, '-c', script, csv, tmp_path, me], stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}) for me in 'ab']
    for j in jobs: assert f'weights {plain}\n' in j.communicate(timeout=300)[0] and j.returncode == -signal.SIGKILL
    from tsd.cache import verify_cache
    df = verify_cache(tmp_path/'both')
    assert len(df) == 4 and (df.damaged == 0).all() and (df.unfinished == 0).all()          # a file for each process and epoch
    assert fit(csv, tmp_path/'both') == (plain, dict(hits=60, misses=0, damaged=0, unsaved=0))
    for me in 'ab':
        assert verify_cache(tmp_path/me).unfinished.tolist().count(17) == 1
        assert fit(csv, tmp_path/me) == (plain, dict(hits=50, misses=10, damaged=0, unsaved=0))     # the batch of which 3 entries were whole is asked as a whole
        assert fit(csv, tmp_path/me)[1]['hits'] == 60

def test_damaged_entries_are_counted_and_asked_again(csv, plain, tmp_path, capsys):
    fit(csv, tmp_path)
    for f in shards(tmp_path):
        data = bytearray(f.read_bytes()); data[70] ^= 1; f.write_bytes(data)
    from tsd.cli import main
    assert main(['cache', '--verify', str(tmp_path)]) == 1
    assert '2 damaged' in capsys.readouterr().err
    weights, log = fit(csv, tmp_path)
    assert weights == plain and (log['damaged'], log['hits'] + log['misses']) == (2, 60) and 0 < log['misses'] < 60
    assert capsys.readouterr().out.count(' 1 damaged') == 2 and log['unsaved'] == 0         # one an epoch
    assert fit(csv, tmp_path)[1]['hits'] == 60

def test_full_disk(csv, plain, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))                            # real writes cut short in the second batch of stage 1
    try:
        with pytest.warns(UserWarning, match='takes no more entries'): weights, log = fit(csv, tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert weights == plain and log['unsaved'] > 0
    from tsd.cache import verify_cache
    df = verify_cache(tmp_path)
    assert (df.unfinished == 0).all() and df.entries.sum() > 0
    weights, log = fit(csv, tmp_path)
    assert weights == plain and log['hits'] > 0 and log['unsaved'] == 0

@pytest.mark.parametrize('where', ['file/below', '/proc/tsd-cache'])
def test_unwritable_folder(csv, tmp_path, where):
    (tmp_path/'file').touch()
    if where[0] == '/' and not os.path.isdir('/proc'): pytest.skip('no /proc here')
    with pytest.raises(OSError, match='cannot be kept in .*give a folder'): fit(csv, tmp_path/where)

def test_a_set_that_lets_nothing_be_added(csv, plain, tmp_path, monkeypatch):
    fit(csv, tmp_path)
    for f in shards(tmp_path): f.write_bytes(f.read_bytes()[:640])
    from tsd import cache as module
    def no(path, *args, **kw): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(module, 'open', no, raising=False)
    with pytest.warns(UserWarning, match='Permission denied'): weights, log = fit(csv, tmp_path)
    assert weights == plain and log['unsaved'] > 0

def test_other_teachers_are_other_sets(csv, tmp_path, capsys):
    fit(csv, tmp_path)
    for models, what in ((teachers(1), 'weights'), (teachers(mean=.4), 'weights')):
        capsys.readouterr()
        assert fit(csv, tmp_path, models=models)[1]['hits'] == 0
        out = capsys.readouterr().out
        assert 'nothing is kept yet' in out and f'nearest differs in {what}' in out
    assert len(list(tmp_path.iterdir())) == 6

class Brighter(Callback):
    "An augmentation of the batch behind the loader, of which the cache knows nothing"
    order = 50
    def before_batch(self):
        if self.training: self.learn.xb = (self.x*1.01,)

@pytest.mark.parametrize('change', [dict(stride=1), dict(seed=1), dict(flip=True), dict(mode='uniform'), dict(augment='finetune'), dict(mean=(.5,)*3), dict(cb=Brighter)])
def test_other_views_are_not_hits(csv, plain, tmp_path_factory, change, capsys, filled):
    cbs = [o() for o in [change.pop('cb', None)] if o]
    import shutil
    path = tmp_path_factory.mktemp('views')/'c'; shutil.copytree(filled, path)
    weights, log = fit(csv, path, *cbs, **change)
    assert weights == train(csv, *cbs, **change) != plain
    assert log['hits'] == 0 and 'answers from disk, 40 from the teacher' in capsys.readouterr().out

@pytest.fixture(scope='module')
def filled(csv, tmp_path_factory):
    path = tmp_path_factory.mktemp('filled')
    fit(csv, path)
    return path

def test_a_changed_clip_is_not_a_hit(csv, tmp_path):
    import pandas as pd, shutil
    root = tmp_path/'set'; shutil.copytree(csv.parent, root)
    fit(root/csv.name, tmp_path/'c')
    df = pd.read_csv(csv); a, b = (root/p for p in df[df.split == 'train'].path[:2])
    stamp = a.stat(); data = a.read_bytes(); a.write_bytes(b.read_bytes()); b.write_bytes(data); os.utime(a, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    weights, log = fit(root/csv.name, tmp_path/'c')
    assert weights == train(root/csv.name) and log['misses'] > 0

def test_refused(csv, tmp_path):
    from tsd.augment import VideoMixup
    for cb in (VideoMixup(), MixUp()):
        with pytest.raises(ValueError, match='mixes every batch'): fit(csv, tmp_path, cb)
    with pytest.raises(ValueError, match='less than the 10 classes'): train(csv, TeacherCache(tmp_path, topk=10))
    about = next(tmp_path.glob('*/about.json'), None)
    assert about is None                                                                    # refused before anything was kept
    fit(csv, tmp_path)
    about = next(tmp_path.glob('*/about.json'))
    about.write_text(about.read_text().replace('float32', 'float64'))
    with pytest.raises(ValueError, match='delete this folder'): fit(csv, tmp_path)
    about.write_text('{')
    with pytest.raises(ValueError, match='cannot be read'): fit(csv, tmp_path)

def test_a_teacher_that_gives_nan_is_named(csv, tmp_path):
    models = teachers()
    with torch.no_grad(): models[0].model.fc.bias.fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite'): fit(csv, tmp_path, models=models)

def test_command_line(filled, tmp_path, capsys):
    from tsd.cli import main
    assert main(['cache', '--info', str(filled)]) == 0
    out = capsys.readouterr().out
    assert 'hit_rate' in out and 'test_resnet' in out and '40' in out
    assert main(['cache', '--verify', str(filled)]) == 0
    assert '60 entries in 2 files are whole' in capsys.readouterr().out
    for words in (['--info', tmp_path/'absent'], ['--verify', tmp_path]):
        assert main(['cache', *map(str, words)]) == 1
        err = capsys.readouterr().err
        assert str(words[1]) in err and 'Traceback' not in err
