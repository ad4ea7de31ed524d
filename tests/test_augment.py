"Augmentation of whole clips: the same for every frame, in bytes up to the device, and one decode for all uses"
import json

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback   # brings learn.no_bar
from fastai.learner import Learner
from torch import nn
from torchvision.transforms import v2

from conftest import noise_video
from tsd.augment import *
from tsd.data import Sampling, VideoDataLoaders
from tsd.distill import Distill, DistillModel
from tsd.evaluate import test_views as run_test, video_views
from tsd.student import VideoViT
from tsd.teachers import Teacher, fingerprint

SMALL = dict(frames=4, stride=2, size=32, bs=4, num_workers=0)

@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    "14 clips of noise in two classes, 8 of them for training: a folder and its table"
    root = tmp_path_factory.mktemp('clips')
    for i in range(14): noise_video(root/f'{i}.mp4', 20+i, 40, 56, i)
    return root, pd.DataFrame(dict(path=[f'{i}.mp4' for i in range(14)], label=['go','stay']*7, split=['train']*8 + ['test']*6))

def loaders(clips, **kwargs): return VideoDataLoaders.from_df(clips[1], clips[0], **{**SMALL, **kwargs})
def epoch(dls): return [(x.as_subclass(torch.Tensor), y) for x,y in dls.train]
def same(a, b): return len(a) == len(b) and all(torch.equal(u, v) for x,y in zip(a, b) for u,v in zip(x, y))

@pytest.fixture
def decodes(monkeypatch):
    "Paths of the calls to `decode`, in order"
    calls = []
    for module in 'tsd.data', 'tsd.evaluate':
        def counted(path, *args, _decode=__import__(module, fromlist=['decode']).decode, **kwargs):
            calls.append(path)
            return _decode(path, *args, **kwargs)
        monkeypatch.setattr(f'{module}.decode', counted)
    return calls

# --- the same for every frame

TRANSFORMS = dict(crop=MultiScaleCrop(32), resized=v2.RandomResizedCrop(32, antialias=True), randaugment=ClipRandAugment(4, 7, p=.9), flip=HorizontalFlip(), erase=ClipErasing(.7),
                  jitter=v2.ColorJitter(.4, .4, .4, .1), distill=train_transforms(32), finetune=train_transforms(32, 'finetune'))

@pytest.mark.parametrize('name', TRANSFORMS)
def test_frames_are_treated_alike(name):
    "A clip comes out as its frames do one by one, with the same draws"
    tfm,moved = TRANSFORMS[name],0
    clip = torch.randint(256, (3,48,64,3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).permute(0,3,1,2)
    def at(seed, x): torch.manual_seed(seed); return tfm(x)
    for seed in range(40):
        out,frames = at(seed, clip),torch.cat([at(seed, o[None]) for o in clip])
        assert out.dtype == torch.uint8 and out.shape == frames.shape and (out.int() - frames.int()).abs().max() <= 1, seed
        moved += out.shape != clip.shape or not torch.equal(out, clip)
    assert moved > 10   # and it does something

# --- repeated augmentation

def test_a_video_is_decoded_once_for_all_its_views(clips, decodes):
    dls = loaders(clips, augment='finetune', repeats=2)
    batches = epoch(dls)
    assert [len(y) for _,y in batches] == [4]*4 and sorted(decodes) == sorted(o.path for o in dls.train_ds.items)
    for x,y in batches: assert torch.equal(y[::2], y[1::2]) and not torch.equal(x[::2], x[1::2])

def test_views_are_a_function_of_seed_epoch_item_view(clips):
    a = loaders(clips, augment='finetune', repeats=2, seed=3)
    first,second = epoch(a),epoch(a)
    b = loaders(clips, augment='finetune', repeats=2, seed=3, num_workers=2)
    assert same(first, epoch(b)) and same(second, epoch(b)) and not same(first, second)
    assert not same(first, epoch(loaders(clips, augment='finetune', repeats=2, seed=4)))
    b.train_ds.epoch = 1
    assert same(second, epoch(b))
    stacked = lambda batches: torch.cat([x for x,_ in batches])
    assert torch.equal(stacked(first)[::2], stacked(epoch(loaders(clips, augment='finetune', seed=3))))   # the first views are those of a run without repeats

def test_an_own_transform_may_write_into_its_clip(clips):
    seen = []
    def spoil(video, label): seen.append(int(video.sum())); video.zero_(); return video[..., :32, :32], label
    loaders(clips, augment=spoil, repeats=2).train_ds.samples(0, 2)
    assert seen[0] == seen[1] > 0

def test_learner_with_repeats(clips):
    dls = loaders(clips, augment='finetune', repeats=2, cache=True)
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 2)), cbs=VideoMixup())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with learn.no_bar(): p,y = learn.get_preds(ds_idx=0)
    assert len(p) == 8 and y.tolist() == [dls.vocab.o2i[o.label] for o in dls.train_ds.items]    # each video once

def test_a_teacher_prepared_with_repeats_is_another(clips):
    teacher = Teacher(VideoViT(img_size=32, num_frames=4, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=2))
    once,twice = (loaders(clips, bs=2*r, repeats=r) for r in (1,2))
    assert once.train.bs == twice.train.bs == 2 and fingerprint(teacher, once) != fingerprint(teacher, twice)

@pytest.mark.parametrize('kwargs, said', [(dict(repeats=3), 'bs is 4 and repeats is 3'), (dict(repeats=0), 'repeats is 0'), (dict(repeats=2, augment=None), 'augment None'),
    (dict(erase=1.5), 'erase is 1.5'), (dict(magnitude=-1), 'magnitude is -1'), (dict(n_ops=-1), 'n_ops is -1'), (dict(min_scale=2), 'min_scale is 2'),
    (dict(flip_labels={'go':'come'}), "flip_labels names 'come'"), (dict(augment='distill', n_ops=2), "belong to augment='finetune'")])
def test_bad_options(clips, kwargs, said):
    with pytest.raises(ValueError, match=said): loaders(clips, **{'augment':'finetune', **kwargs})

# --- flips

def test_flips_on_something_something(shared, clips):
    "No flip by itself; with a map, the pairs that the data set's authors list"
    path = shared/'annotations'/'ssv2'
    names,official = (json.loads((path/o).read_text()) for o in ('something-something-v2-labels.json', 'augmentation_mappings.json'))
    root,_ = clips
    for i in range(174*2): (root/f'link{i}.mp4').hardlink_to(root/f'{i%14}.mp4')
    df = pd.DataFrame(dict(path=[f'link{i}.mp4' for i in range(174*2)], label=[*names]*2, split=['train']*174 + ['test']*174))
    load = lambda **kw: VideoDataLoaders.from_df(df, root, **SMALL, augment='finetune', **kw).train_ds.tfm.transforms
    assert not [o for o in load() if isinstance(o, HorizontalFlip)]
    flip, = [o for o in load(flip_labels=True) if isinstance(o, HorizontalFlip)]
    with pytest.raises(ValueError, match='flip=True would show'): load(flip=True)
    assert {k:v for k,v in flip.label_map.items() if v} == official['left/right']

# --- one decode, bytes until the device, the same pixels for all

def test_a_test_video_is_decoded_once(clips, decodes):
    dls = loaders(clips)
    path = dls.valid_ds.items[0].path
    for mode in 'dense','uniform':
        decodes.clear()
        assert video_views(path, Sampling(4, 2, 32, mode), clips=5, crops=3).shape == (15,3,4,32,32) and decodes == [path]
    decodes.clear()
    net = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 2))
    res = run_test(net, dls.valid_ds.items, 5, 3, dls.sampling, list(dls.vocab), progress=False)
    assert res['evaluated'] == 6 and sorted(decodes) == sorted(o.path for o in dls.valid_ds.items)

def test_batches_cross_to_the_device_as_bytes(clips, monkeypatch):
    dls = loaders(clips, augment='finetune', repeats=2)
    crossed = []
    import fastai.data.load
    to_device = fastai.data.load.to_device
    monkeypatch.setattr(fastai.data.load, 'to_device', lambda b, *args, **kw: (crossed.append(b[0].dtype), to_device(b, *args, **kw))[1])
    x,_ = dls.one_batch()
    assert crossed == [torch.uint8] and x.dtype == torch.float32

@pytest.mark.parametrize('mixup', [False, True])
def test_teacher_and_student_see_the_same_pixels(clips, mixup):
    dls = loaders(clips, seed=1)
    vit = lambda: VideoViT(img_size=32, num_frames=4, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=2)
    student,teacher = DistillModel(vit()),Teacher(vit(), mean=(.5,.4,.3), std=(.2,.2,.3))
    seen = {}
    student.register_forward_pre_hook(lambda m, args: seen.setdefault('student', []).append(args[0].as_subclass(torch.Tensor).detach().clone()) if m.training else None)
    teacher.register_forward_pre_hook(lambda m, args: seen.setdefault('teacher', []).append(args[0].detach().clone()))
    learn = Learner(dls, student, loss_func=nn.CrossEntropyLoss(), cbs=[Distill(teacher), *[VideoMixup()]*mixup])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert len(seen['student']) == len(seen['teacher']) == 2
    mean,std = (torch.tensor(o).view(1,3,1,1,1) for o in ((.485,.456,.406), (.229,.224,.225)))
    for s,t in zip(seen['student'], seen['teacher']): assert torch.allclose(s*std + mean, t, atol=1e-6)
    if mixup: return
    order = np.concatenate([[next(i for i in range(8) if torch.allclose(dls.train_ds[i][0].as_subclass(torch.Tensor)/255, o, atol=1e-5)) for o in t] for t in seen['teacher']])
    assert sorted(order) == list(range(8))     # the bytes of the data set itself, each video once
