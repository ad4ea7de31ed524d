"VideoDataLoaders with awkward tables, worker processes, damaged files and fastai's own tools"
import os, pickle, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback   # brings learn.no_bar
from fastai.callback.schedule import Learner            # with lr_find
from fastai.learner import load_learner
from torch import nn

from conftest import noise_video
from tsd.augment import VideoMixup, train_transforms
from tsd.data import ClipNormalize, VideoClip, VideoDataLoaders, VideoItem
from tsd.video import VideoError, encode

SMALL = dict(frames=4, stride=2, size=32, bs=4)

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "18 clips of noise in a folder with a blank in its name: 3 classes, 12 for training; the table's columns are path, label, split"
    root = tmp_path_factory.mktemp('my clips')
    rows = []
    for i in range(18):
        name = f'{"abc"[i%3]}/clip {i:02}.mp4'
        (root/name).parent.mkdir(exist_ok=True)
        noise_video(root/name, 20+i, 40, 56, i)
        rows.append((name, f'class {"abc"[i%3]}', 'train' if i < 12 else 'test'))
    df = pd.DataFrame(rows, columns=['path','label','split'])
    df.to_csv(root/'clips.csv', index=False)
    return root, df

def loaders(clips, **kwargs): return VideoDataLoaders.from_df(clips[1], clips[0], **{**SMALL, 'num_workers':0, **kwargs})
def epochs(dls, n=2): return [[(x.as_subclass(torch.Tensor), y) for x,y in dls.train] for _ in range(n)]
def same(a, b): return all(torch.equal(u, v) for x,y in zip(a, b) for u,v in zip(x, y))
def net(): return nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 3))

# --- chance

@pytest.mark.parametrize('augment', ['distill','finetune'])
def test_workers_change_nothing(clips, augment):
    torch.manual_seed(1)
    a = epochs(loaders(clips, augment=augment, seed=3))
    torch.manual_seed(2)
    b = epochs(loaders(clips, augment=augment, seed=3, num_workers=2))
    assert same(a[0], b[0]) and same(a[1], b[1])
    assert not same(a[0], a[1])
    assert not same(a[0], epochs(loaders(clips, augment=augment, seed=4), 1)[0])

def test_processes_of_a_machine_share_its_cores(clips, monkeypatch):
    from fastcore.all import defaults
    monkeypatch.setattr(defaults, 'cpus', 12)
    for n,workers in ((None, 12), ('4', 3), ('64', 1)):
        if n: monkeypatch.setenv('LOCAL_WORLD_SIZE', n)
        else: monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
        assert loaders(clips, num_workers=None).train.fake_l.num_workers == workers
        assert loaders(clips, num_workers=None, cache=True).train.fake_l.num_workers == 0 and loaders(clips, num_workers=5).train.fake_l.num_workers == 5

def test_an_epoch_can_be_set(clips):
    dls = loaders(clips)
    a = epochs(dls, 3)
    assert dls.train.dataset.epoch == 2
    again = loaders(clips, num_workers=2)
    again.train.dataset.epoch = 2
    assert same(epochs(again, 1)[0], a[2])

def test_looking_does_not_advance(clips):
    a,b = loaders(clips),loaders(clips)
    b.train.one_batch(); b.valid.one_batch(); list(b.valid); b.show_batch(max_n=1)
    assert same(epochs(a)[1], epochs(b)[1])

def test_global_generators_are_left_alone(clips, monkeypatch):
    dls = loaders(clips, augment='finetune')
    def refuse(*_): raise AssertionError('torch.manual_seed would reset the generators of every device')
    monkeypatch.setattr(torch, 'manual_seed', refuse)
    cpu,npy = torch.get_rng_state(),np.random.get_state()[1].copy()
    for i in range(4): dls.train_ds[i]
    assert torch.equal(cpu, torch.get_rng_state()) and (npy == np.random.get_state()[1]).all()

def test_validation_has_no_chance(clips):
    a,b = loaders(clips, seed=1, mode='uniform'),loaders(clips, seed=2, mode='uniform')
    assert same(list(a.valid), list(b.valid))

def test_pickled_and_copied(clips):
    dls = loaders(clips, augment='finetune')
    other = pickle.loads(pickle.dumps(dls.train_ds))
    assert torch.equal(other[5][0], dls.train_ds[5][0]) and other.epoch == dls.train_ds.epoch

# --- tables

def write(root, text, name='odd.csv', encoding='utf-8'):
    (root/name).write_bytes(text.encode(encoding))
    return root/name

def test_labels_and_paths_stay_text(clips):
    root,df = clips
    lines = ['"path","label"'] + [f'"{root/p}","{l}"' for p,l in zip(df.path, ['001','1','None','1e3','a, b','déjà']*3)]
    for start in '','\ufeff':   # with and without a byte order mark
        dls = VideoDataLoaders.from_csv(write(root, start+'\n'.join(lines)), **SMALL, num_workers=0, valid_pct=.4)
        assert list(dls.vocab) == sorted(['001','1','None','1e3','a, b','déjà'])
    assert len(dls.train_ds) == 12 and len(dls.valid_ds) == 6 and len(dls.train.one_batch()) == 2

def test_numbers_as_labels(clips):
    root,df = clips
    dls = VideoDataLoaders.from_df(df.assign(label=[i%3 for i in range(18)]), root, **SMALL, num_workers=0)
    assert list(dls.vocab) == ['0','1','2'] and dls.train_ds.items[1].label == '1'

def test_other_column_names_and_folder(clips, tmp_path, monkeypatch):
    root,df = clips
    monkeypatch.chdir(tmp_path)   # paths are relative to the table, not to where one happens to be
    write(root, df.rename(columns=dict(path='file', label='class')).to_csv(index=False))
    dls = VideoDataLoaders.from_csv(os.path.relpath(root/'odd.csv'), path_col='file', label_col='class', **SMALL, num_workers=0)
    assert len(list(dls.train)) == 3

@pytest.mark.parametrize('text, error, said', [
    ('', ValueError, 'odd.csv: holds no clips'),
    ('path,label,split\n', ValueError, 'odd.csv: holds no clips'),
    ('path,split\na.mp4,train\n', ValueError, "no column 'label' .* the columns are path, split; name the right one with label_col="),
    ('path|label\na.mp4|b\n', ValueError, r"odd.csv, line 2: 'a.mp4\|b' is not a video's path .* a blank and a class; separate the columns by commas"),
    ('path,label\n"a.mp4,b\n', ValueError, 'not a CSV file'),
    ('path,label\n\n,b\n', ValueError, 'odd.csv, line 3 has no path'),
    ('path,label,split\na.mp4,b,trian\n', ValueError, "odd.csv, line 2: unknown split 'trian'"),
    ('path,label\na.mp4,b\n\nc.mp4,b\n./a.mp4,c\n', ValueError, 'odd.csv, line 5: .*a.mp4 is listed already, in .*odd.csv, line 2'),
    ('path,label\na.mp4,b\n', FileNotFoundError, r'1 of 1 videos \(100.0%\) do not exist, the first is .*a.mp4'),
])
def test_bad_tables(clips, text, error, said):
    with pytest.raises(error, match=said): VideoDataLoaders.from_csv(write(clips[0], text))

def test_not_a_table(clips):
    root,_ = clips
    with pytest.raises(FileNotFoundError, match='nowhere.csv: no such file'): VideoDataLoaders.from_csv(root/'nowhere.csv')
    with pytest.raises(FileNotFoundError, match='no such file'): VideoDataLoaders.from_csv(root)
    (root/'film.csv').write_bytes(bytes(range(256))*20)
    with pytest.raises(ValueError, match='film.csv: not a text file in UTF-8'): VideoDataLoaders.from_csv(root/'film.csv')

def test_classes_that_do_not_fit(clips):
    root,df = clips
    only = lambda **kw: VideoDataLoaders.from_df(df.assign(**kw), root, **SMALL)
    with pytest.raises(ValueError, match="unknown class 'class d' among the valid clips"): only(label=[*df.label[:-1], 'class d'])
    with pytest.raises(ValueError, match="only one class, 'x'"): only(label='x')
    with pytest.raises(ValueError, match='no valid clips'): only(split='train')
    with pytest.raises(ValueError, match='no train clips'): only(split='test')
    with pytest.raises(ValueError, match="class 'class d' has no training clip"): loaders(clips, vocab=['class a','class b','class c','class d'])
    with pytest.raises(ValueError, match="unknown class 'class c' among the train clips: it isn't one of vocab's 2"): loaders(clips, vocab=['class a','class b'])
    assert list(loaders(clips, vocab=['class c','class a','class b']).vocab) == ['class c','class a','class b']

@pytest.mark.parametrize('kwargs, said', [
    (dict(bs=13), 'bs is 13, and there are 12 training clips'), (dict(bs=0), 'bs is 0'), (dict(frames=0), 'frames is 0'), (dict(size=0), 'is 0'),
    (dict(mode='tsn'), "mode is 'tsn'"), (dict(augment='train'), "kind is 'train'"), (dict(valid_pct=1.5), 'valid_pct is 1.5'),
    (dict(flip_labels={'left':'class a'}), "flip_labels names 'left'"), (dict(augment=None, flip=True), 'an own transform'),
])
def test_bad_options(clips, kwargs, said):
    with pytest.raises(ValueError, match=said): loaders(clips, **kwargs)

def test_missing_videos_are_counted_once(clips):
    root,df = clips
    gone = df.assign(path=['gone.mp4', *df.path[1:-1], 'gone too.mp4'])
    with pytest.raises(FileNotFoundError, match=r'2 of 18 videos \(11.1%\).*gone.mp4.*max_missing=0.12'): VideoDataLoaders.from_df(gone, root, **SMALL)
    with pytest.warns(UserWarning, match='they are left out') as seen: dls = VideoDataLoaders.from_df(gone, root, **SMALL, num_workers=0, max_missing=.12)
    assert len(seen) == 1 and [len(o) for o in (dls.train_ds, dls.valid_ds)] == [11,5]

def test_groups_are_not_split(clips):
    root,df = clips
    grouped = df.drop(columns='split').assign(group=[f'g{i//2}' for i in range(18)])
    for seed in range(5):
        dls = VideoDataLoaders.from_df(grouped, root, **SMALL, valid_pct=.3, seed=seed)
        group = dict(zip((root/p for p in grouped.path), grouped.group))
        parts = [{group[o.path] for o in ds.items} for ds in (dls.train_ds, dls.valid_ds)]
        assert not parts[0] & parts[1] and all(parts)
    with pytest.warns(UserWarning, match='groups have clips in more than one split'): VideoDataLoaders.from_df(df.assign(group='one'), root, **SMALL)
    with pytest.warns(UserWarning, match='1 of 17 groups'): VideoDataLoaders.from_df(df.assign(path=[*df.path[:-1], df.path[2]]), root, **SMALL)

def test_folders(clips, tmp_path):
    root,df = clips
    def copy(row, to): (tmp_path/to).mkdir(parents=True, exist_ok=True); (tmp_path/to/Path(row.path).name).with_suffix('.MP4').symlink_to(root/row.path)
    for i,row in df.iterrows(): copy(row, f'{("train","train","val","test")[i%4]}/{row.label}/deeper' if i%4 < 2 else f'{("train","train","val","test")[i%4]}/{row.label}')
    (tmp_path/'train'/'notes.txt').write_text('no video'); (tmp_path/'thumbs').mkdir(); (tmp_path/'thumbs'/'x.mp4').write_text('not in a split')
    dls = VideoDataLoaders.from_folder(tmp_path, **SMALL, num_workers=0)
    assert [len(dl.dataset) for dl in dls.loaders] == [10,4,4] and dls.test is dls[2]
    assert list(dls.vocab) == ['class a','class b','class c'] and {o.label for o in dls.test.dataset.items} <= set(dls.vocab)
    with pytest.raises(ValueError, match='no videos in class folders'): VideoDataLoaders.from_folder(tmp_path/'val'/'class a')

# --- files

@pytest.mark.parametrize('workers, content', [(0,b''), (0,b'not a video at all'), (2,b'not a video at all')])
def test_unreadable_video_is_named(clips, workers, content):
    root,df = clips
    (root/'broken one.mp4').write_bytes(content)
    dls = VideoDataLoaders.from_df(df.assign(path=[*df.path[:5], 'broken one.mp4', *df.path[6:]]), root, **SMALL, num_workers=workers)
    with pytest.raises(VideoError, match='broken one.mp4'): list(dls.train)
    with pytest.raises(VideoError, match='broken one.mp4'): dls.fill_cache()

def test_sound_only_and_odd_files(shared):
    odd = shared/'clips/odd'
    ok = ['h265_video.mp4','video_90.mov','newtonscradle.gif','-video-with-dash-.mp4']
    df = pd.DataFrame(dict(path=ok*2, label=['a','b']*4, split=['train']*4+['valid']*4))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # the same files on both sides
        dls = VideoDataLoaders.from_df(df, odd, **SMALL, num_workers=0)
    assert all(x.shape == (4,3,4,32,32) for x,_ in dls.valid)
    dl = dls.test_dl([odd/'nasa_13013.mp4.audio.mp3'], num_workers=0)
    with pytest.raises(VideoError, match='nasa_13013.mp4.audio.mp3'): dl.one_batch()

def test_ucf5(shared):
    with warnings.catch_warnings():
        warnings.simplefilter('error')    # split by group: nothing to warn of
        dls = VideoDataLoaders.from_csv(shared/'clips/ucf5/clips.csv', frames=4, size=32, bs=8, num_workers=0)
    assert [len(dl.dataset) for dl in dls.loaders] == [453,193] and dls.c == 5 and len(dls.train) == 56 and len(dls.valid) == 25
    x,y = dls.one_batch()
    assert x.shape == (8,3,4,32,32) and x.std() > .3

# --- the cache

def test_cache_gives_the_same_clips(clips, capsys):
    a = loaders(clips, seed=1); b = loaders(clips, seed=1, cache=True); c = loaders(clips, seed=1, cache=True, num_workers=2)
    assert '18 videos' in capsys.readouterr().out
    want = epochs(a, 1)[0]
    for dls in b,c: assert same(want, epochs(dls, 1)[0])
    assert same(list(a.valid), list(b.valid))

def test_cache_refuses_before_decoding(clips, monkeypatch):
    monkeypatch.setattr('tsd.data.decode', lambda *a: pytest.fail('decoded'))
    with pytest.raises(MemoryError, match='18 videos take .* GB .* cache_gb is 0.001: raise it, lower short_side'): loaders(clips, cache=True, cache_gb=.001)

# --- fastai's own tools

def test_every_training_clip_can_be_predicted(clips):
    dls = loaders(clips, bs=5)   # the training loader itself drops two clips of twelve
    learn = Learner(dls, net())
    with learn.no_bar():
        p,y = learn.get_preds(ds_idx=0)
        assert y.tolist() == [dls.vocab.o2i[o.label] for o in dls.train_ds.items]
        p,y,loss = learn.get_preds(with_loss=True)
    assert len(p) == 6 and torch.allclose(loss, -p[range(6), y].log(), atol=1e-5)

def test_lr_find_and_mixup(clips):
    learn = Learner(loaders(clips, cache=True), net(), cbs=VideoMixup())
    own = learn.loss_func
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    assert learn.loss_func is own
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.loss_func is own and np.isfinite(learn.recorder.losses[-1].item())

def test_exported_learner_carries_no_clips(clips, tmp_path):
    dls = loaders(clips, cache=True)
    learn = Learner(dls, net(), path=tmp_path)
    video = dls.valid_ds.items[0].path
    with learn.no_bar(): name,_,p = learn.predict(video)
    learn.export('learner.pkl')
    data = (tmp_path/'learner.pkl').read_bytes()
    assert len(data) < 2e5 and str(video).encode() not in data
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # fastai's reminder that pickles can hold code
        again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(): name2,_,q = again.predict(video)
    assert name2 == name and torch.equal(p, q)

def test_the_augmentation_can_be_exchanged(clips):
    dls = loaders(clips)
    a = dls.train_ds[0][0]
    dls.train_ds.tfm = train_transforms(32, 'finetune')
    assert not torch.equal(a, dls.train_ds[0][0]) and dls.train_ds[0][0].shape == a.shape

def test_normalisation_of_another_network(clips):
    a,b = loaders(clips),loaders(clips, mean=[.5]*3, std=[.5]*3)
    x,y = a.valid.one_batch()[0],b.valid.one_batch()[0]
    assert isinstance(b.norm, ClipNormalize) and torch.allclose(a.norm.decode(x), b.norm.decode(y), atol=1e-6)
    assert y.min() >= -1 and y.max() <= 1 and isinstance(y, VideoClip)

def test_unlabelled_items(clips):
    dls = loaders(clips)
    dl = dls.test_dl([o.path for o in dls.valid_ds.items])
    assert len(dl.one_batch()) == 1 and len(dl.dataset) == 6 and dl.dataset.items[0] == VideoItem(dls.valid_ds.items[0].path)
    with Learner(dls, net()).no_bar() as learn: assert learn.get_preds(dl=dl)[0].shape == (6,3)
