"The generated sets: the same content from the same seed, honest splits, and what happens to folders."
import hashlib, json, multiprocessing

import numpy as np
import pandas as pd
import pytest
import torch

from tsd.tinyclips import CLASSES, draw_digit, make_tinyclips, motion_clip, scene_clip
from tsd.tinyclips import _digits, _frames
from tsd.video import check, decode, probe

SIZE  = dict(frames=16, height=36, width=48)
SMALL = dict(n_train=16, n_test=16, frames=4, height=16, width=24)
MAKE  = dict(scene=scene_clip, motion=motion_clip)

pytestmark = pytest.mark.usefixtures('one_thread')

def digest(kind, seed, n=10, **size): return [hashlib.sha1(_frames(kind, seed, 'train', i, **(SIZE|size))[-1]).hexdigest() for i in range(n)]

@pytest.fixture(scope='module')
def scene(tmp_path_factory): return make_tinyclips(tmp_path_factory.mktemp('tiny')/'scene', n_train=100, n_test=30, workers=2)

# --- content

@pytest.mark.parametrize('kind', CLASSES)
def test_same_seed_same_frames(kind):
    a = digest(kind, 0)
    assert a == digest(kind, 0)
    assert len(set(a + digest(kind, 1))) == 20 # another seed, and each clip, is another clip

def digests(threads):
    torch.set_num_threads(threads)
    return {k: digest(k, 3, 2) for k in CLASSES}

def test_frames_do_not_depend_on_threads_or_processes():
    here = digests(1)
    assert digests(2) == here
    with multiprocessing.get_context('spawn').Pool(1) as pool: assert pool.apply(digests, (1,)) == here

@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.parametrize('size', [(16,36,48), (2,16,16), (5,64,40), (4,224,224), (3,600,900)])
def test_any_size(kind, size):
    v = MAKE[kind](CLASSES[kind][-1], np.random.default_rng(0), 'test', *size)
    assert v.shape == (*size,3) and v.dtype == np.uint8 and v.std() > 5

def test_digit_is_where_the_class_says():
    "The difference of a clip with its digit and the same clip's backdrop is the digit: large, about 20 to 30 pixels of 36, and inside the picture"
    from tsd import tinyclips
    heights = []
    for i in range(40):
        rng = np.random.default_rng([5,i])
        label = CLASSES['scene'][i % 10]
        with_digit = scene_clip(label, rng)
        rng = np.random.default_rng([5,i])
        draw_digit(rng, 'train', i % 10)
        ground = tinyclips.backdrop(rng, 16, 36, 48).mul(255).round().byte().permute(0,2,3,1).numpy()
        rows = (np.abs(with_digit.astype(int) - ground).max((2,3)) > 12)
        heights += [np.ptp(np.flatnonzero(r)) + 1 for r in rows if r.any()]
        assert rows.any(1).all()
    assert 18 <= np.quantile(heights, .05) and np.quantile(heights, .95) <= 32, np.quantile(heights, [.05,.5,.95])

def test_motion_reversed_is_the_opposite_exactly():
    names = CLASSES['motion']
    for a,b in zip(names[::2], names[1::2]):
        for seed in range(8):
            for split in ('train','test'):
                x, y = (motion_clip(c, np.random.default_rng([seed,1]), split) for c in (a,b))
                assert np.array_equal(x[::-1], y)
                assert not np.array_equal(x, y)
                assert sorted(f.tobytes() for f in x) == sorted(f.tobytes() for f in y) # the same set of frames

def test_shuffled_motion_is_undecidable_and_ordered_is_not():
    "A classifier of shuffled clips cannot split a pair; the displacement of what changes does"
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    def coarse(v): return v.astype(np.float32).mean(-1).reshape(16,6,6,6,8).mean((2,4)).reshape(16,-1)
    def shift(v):
        g = np.abs(coarse(v) - np.median(coarse(v), 0)).reshape(16,6,6)
        return np.concatenate([(g[8:] - g[:8]).mean(0).sum(k) for k in (0,1)])
    n = 60
    for a,b in (('left','right'), ('up','down')):
        clips = {(c,s): [motion_clip(c, np.random.default_rng([ord(c[0]),i,s=='test']), s) for i in range(n)] for c in (a,b) for s in ('train','test')}
        y = np.repeat([0,1], n)
        def score(f): x, tx = [np.array([f(v) for c in (a,b) for v in clips[c,s]]) for s in ('train','test')]; return make_pipeline(StandardScaler(), LogisticRegression(C=.05, max_iter=300)).fit(x,y).score(tx,y)
        rng = np.random.default_rng(0)
        shuffled = [score(lambda v: coarse(rng.permutation(v)).ravel()), score(lambda v: np.sort(coarse(v), 0).ravel()), score(lambda v: coarse(v).mean(0))]
        assert max(abs(s-.5) for s in shuffled) < 2/np.sqrt(2*n), shuffled
        assert score(shift) > .85, score(shift)

def test_any_classifier_of_frame_sets_gets_exactly_half():
    "On pairs made from the same seeds every function of the set of frames says the same of both, so it is right once in two"
    rng = np.random.default_rng(0)
    w = rng.normal(size=36*48*3)
    def decide(v): return np.sort(v.reshape(16,-1) @ w)[[0,5,-1]].sum() > 0
    right = [decide(motion_clip('left', np.random.default_rng(i))) for i in range(20)] + [not decide(motion_clip('right', np.random.default_rng(i))) for i in range(20)]
    assert sum(right) == 20

# --- splits

def test_no_digit_on_both_sides_whatever_the_seed(scene):
    images, labels, test = _digits()
    pools = {s: {draw_digit(np.random.default_rng([k,i]), s) for k in range(3) for i in range(400)} for s in ('train','test')}
    assert not pools['train'] & pools['test']
    df = pd.read_csv(scene)
    assert list(df.columns) == ['path','label','group','split']
    assert not set(df.group[df.split=='train']) & set(df.group[df.split=='test'])
    for label, group, split in zip(df.label, df.group, df.split):
        digit = int(group.removeprefix('digit_'))
        assert CLASSES['scene'][labels[digit]] == label and test[digit] == (split=='test')

def test_group_is_the_digit_that_was_drawn():
    "Painting any other image gives other frames"
    from tsd import tinyclips
    for kind in CLASSES:
        for i in range(8):
            _, digit, clip = _frames(kind, 0, 'train', i, **SIZE)
            real, seen = tinyclips.lay_digit, []
            tinyclips.lay_digit = lambda ground, digit, *a: seen.append(digit) or real(ground, digit, *a)
            try: _frames(kind, 0, 'train', i, **SIZE)
            finally: tinyclips.lay_digit = real
            assert seen == [digit]

def test_balance(scene):
    n = pd.read_csv(scene).groupby(['split','label']).size().unstack()
    assert (n.loc['train'] == 10).all() and (n.loc['test'] == 3).all()

def test_a_longer_set_begins_with_the_shorter():
    for kind in CLASSES: assert digest(kind, 0, 4) == digest(kind, 0, 12)[:4]

# --- files

def test_files_hold_what_was_drawn(scene):
    df = pd.read_csv(scene)
    assert all((scene.parent/p).is_file() for p in df.path) and len(list(scene.parent.rglob('*.mp4'))) == len(df) == 130
    for i in (0, 57, 99):
        path = scene.parent/df.path[i]
        info, c = probe(path), check(path)
        assert (info.frames, info.height, info.width, info.codec, info.keyframes) == (16,36,48,'h264',2) and c.ok
        err = np.abs(decode(path, range(16)).numpy().astype(int) - _frames('scene', 0, 'train', i, **SIZE)[-1]).mean()
        assert err < 8

def test_number_of_workers_does_not_matter(tmp_path):
    a, b = (make_tinyclips(tmp_path/str(w), 'motion', workers=w, n_train=40, n_test=40, frames=4, height=16, width=24) for w in (1,2))
    assert a.read_text() == b.read_text()
    for p in pd.read_csv(a).path: assert (a.parent/p).read_bytes() == (b.parent/p).read_bytes()

# --- folders

def test_finished_set_is_reused_and_others_refused(tmp_path):
    csv = make_tinyclips(tmp_path/'a', **SMALL)
    before = csv.stat().st_mtime_ns
    assert make_tinyclips(str(tmp_path/'a'), **SMALL).stat().st_mtime_ns == before
    for change in (dict(seed=1), dict(kind='motion'), dict(n_train=17), dict(frames=5)):
        with pytest.raises(FileExistsError, match='other settings'): make_tinyclips(tmp_path/'a', **(SMALL|change))
    make_tinyclips(tmp_path/'a', **(SMALL|dict(kind='motion')), overwrite=True)
    assert sorted(p.name for p in (tmp_path/'a').iterdir() if p.is_dir()) == sorted(CLASSES['motion'])

def test_broken_off_set_is_made_again(tmp_path):
    csv = make_tinyclips(tmp_path/'a', **SMALL)
    note = tmp_path/'a/tinyclips.json'
    note.write_text(json.dumps(json.loads(note.read_text()) | dict(done=False)))
    csv.unlink()
    assert make_tinyclips(tmp_path/'a', **SMALL).exists()

def test_lost_files_are_made_again(tmp_path):
    csv = make_tinyclips(tmp_path/'a', **SMALL)
    path = tmp_path/'a'/pd.read_csv(csv).path[0]
    path.unlink()
    make_tinyclips(tmp_path/'a', **SMALL)
    assert path.exists()

def test_strangers_folders_are_left_alone(tmp_path):
    (tmp_path/'a').mkdir(); (tmp_path/'a/thesis.txt').write_text('x')
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match='something else'): make_tinyclips(tmp_path/'a', overwrite=overwrite, **SMALL)
    with pytest.raises(FileExistsError, match='something else'): make_tinyclips(tmp_path/'a/thesis.txt', **SMALL)
    assert (tmp_path/'a/thesis.txt').read_text() == 'x'
    (tmp_path/'b').mkdir()
    assert make_tinyclips(tmp_path/'b', **SMALL).exists() # an empty folder will do

@pytest.mark.parametrize('bad,word', [(dict(kind='sport'), "kind is 'sport'"), (dict(n_train=9), 'n_train is 9'), (dict(n_test=0), 'n_test is 0'), (dict(height=35), 'height is 35'),
                                      (dict(width=47), 'width is 47'), (dict(height=0), 'height is 0'), (dict(frames=1), 'frames is 1'), (dict(workers=-1), 'workers is -1'), (dict(seed=-1), 'seed is -1')])
def test_refused(tmp_path, bad, word):
    with pytest.raises(ValueError, match=word): make_tinyclips(tmp_path/'a', **(SMALL|bad))
    assert not (tmp_path/'a').exists()

def test_unknown_class_and_split():
    for f in MAKE.values():
        with pytest.raises(ValueError, match="'ten' is no class"): f('ten', np.random.default_rng(0))
        with pytest.raises(ValueError, match="split is 'valid'"): f(CLASSES['scene' if f is scene_clip else 'motion'][0], np.random.default_rng(0), 'valid')
