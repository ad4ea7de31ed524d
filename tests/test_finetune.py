"Students from others' weights, in the layouts of their authors, against a network written out here in those names; one step of fine-tuning with the head kept or new; what is said of weights and classes that do not fit."
import argparse
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tsd.data import VideoDataLoaders
from tsd.finetune import finetune_learner, pretrained_student
from tsd.student import VideoViT
from tsd.teachers import VideoMAEViT
from tsd.video import encode

pytestmark = pytest.mark.usefixtures('one_thread')
VOCAB = ['cat', 'dog', 'owl']
D, DEPTH, PATCH = 64, 2, 8                                                             # one head
GRID = 2, 4, 4                                                                         # of clips of 4 frames of 32 x 32

def vit(classes=None, mean_pooling=True):
    "Random weights of a ViT by VideoMAE's names: no bias of the keys"
    shapes = {'patch_embed.proj.weight': (D, 3, 2, PATCH, PATCH), 'patch_embed.proj.bias': (D,)}
    for b in (f'blocks.{i}.' for i in range(DEPTH)):
        shapes |= {b+'norm1.weight': (D,), b+'norm1.bias': (D,), b+'attn.q_bias': (D,), b+'attn.v_bias': (D,), b+'attn.qkv.weight': (3*D, D), b+'attn.proj.weight': (D, D), b+'attn.proj.bias': (D,),
                   b+'norm2.weight': (D,), b+'norm2.bias': (D,), b+'mlp.fc1.weight': (4*D, D), b+'mlp.fc1.bias': (4*D,), b+'mlp.fc2.weight': (D, 4*D), b+'mlp.fc2.bias': (D,)}
    norm = 'fc_norm' if mean_pooling else 'norm'
    shapes |= {norm+'.weight': (D,), norm+'.bias': (D,)} | ({'head.weight': (classes, D), 'head.bias': (classes,)} if classes else {})
    return {k: torch.randn(s)*.1 for k,s in shapes.items()}

def flat():
    "VideoMAE's table: one line of patches, sine and cosine in turn"
    return torch.tensor([[(math.cos if j % 2 else math.sin)(p/10000**(j//2*2/D)) for j in range(D)] for p in range(math.prod(GRID))])

def separable(grid=GRID):
    "MVD's: a quarter time, then width, then height, sines before cosines"
    def wave(p, n): return [f(p/10000**(j/(n//2))) for f in (math.sin, math.cos) for j in range(n//2)]
    t,h,w = grid
    return torch.tensor([wave(k, D//4) + wave(x, D*3//8) + wave(y, D*3//8) for k in range(t) for y in range(h) for x in range(w)])

def tokens(s, x, table):
    "After the last block (B,N,D), by the names of `vit`"
    def linear(h, name): return F.linear(h, s[name+'.weight'], s[name+'.bias'])
    def norm(h, name): return F.layer_norm(h, (D,), s[name+'.weight'], s[name+'.bias'], 1e-6)
    t = F.conv3d(x, s['patch_embed.proj.weight'], s['patch_embed.proj.bias'], (2, PATCH, PATCH)).flatten(2).mT + table
    for b in (f'blocks.{i}.' for i in range(DEPTH)):
        q,k,v = F.linear(norm(t, b+'norm1'), s[b+'attn.qkv.weight'], torch.cat([s[b+'attn.q_bias'], torch.zeros(D), s[b+'attn.v_bias']])).chunk(3, -1)
        t = t + linear((q @ k.mT/D**.5).softmax(-1) @ v, b+'attn.proj')
        t = t + linear(F.gelu(linear(norm(t, b+'norm2'), b+'mlp.fc1')), b+'mlp.fc2')
    return t

def logits(s, x, table): return F.linear(F.layer_norm(tokens(s, x, table).mean(1), (D,), s['fc_norm.weight'], s['fc_norm.bias'], 1e-6), s['head.weight'], s['head.bias'])

def videomae_pretrained(s):
    "The encoder, and what reconstructs pixels"
    return {f'encoder.{k}': v for k,v in s.items()} | {'mask_token': torch.zeros(1, 1, 32), 'encoder_to_decoder.weight': torch.zeros(32, D), 'decoder.blocks.0.attn.qkv.weight': torch.zeros(96, 32),
            'decoder.blocks.0.attn.q_bias': torch.zeros(32), 'decoder.norm.weight': torch.zeros(32), 'decoder.head.weight': torch.zeros(6*PATCH**2, 32)}

def mvd_pretrained(s, grid=GRID):
    "The student of MVD: no prefix, its table stored, a decoder for each teacher"
    more = {'pos_embed': separable(grid)[None]}
    for o in ('img', 'vid'):
        more |= {f'mask_token_{o}': torch.zeros(1, 1, D), f'down_{o}.weight': torch.zeros(D, D), f'down_{o}.bias': torch.zeros(D), f'pos_embed_{o}': separable(grid)[None],
                 f'decoder_{o}.blocks.0.attn.qkv.weight': torch.zeros(3*D, D), f'decoder_{o}.blocks.0.attn.q_bias': torch.zeros(D), f'decoder_{o}.norm.weight': torch.zeros(D), f'decoder_{o}.head.weight': torch.zeros(D, D)}
    return s | more

def hugging_face(s, version):
    "Names of transformers 4 and of 5"
    new = {}
    for k,v in s.items():
        k = k.replace('blocks.', 'videomae.encoder.layer.').replace('patch_embed.proj', 'videomae.embeddings.patch_embeddings.projection').replace('norm1', 'layernorm_before').replace('norm2', 'layernorm_after')
        k = k.replace('attn.proj', 'attention.output.dense').replace('mlp.fc1', 'intermediate.dense').replace('mlp.fc2', 'output.dense').replace('head.', 'classifier.')
        if k.endswith('attn.qkv.weight'):
            for name,part in zip(('query', 'key', 'value'), v.chunk(3)): new[k.replace('attn.qkv.weight', f'attention.attention.{name}.weight')] = part.clone()
        elif k.endswith('_bias'): new[k.replace('attn.', 'attention.attention.') if version == 4 else k.replace('attn.q_', 'attention.attention.query.').replace('attn.v_', 'attention.attention.value.')] = v
        else: new[k] = v
    return new

def save_hugging_face(s, folder, version, vocab):
    folder.mkdir()
    names = vocab or [f'LABEL_{i}' for i in range(len(s['head.bias']))]
    (folder/'config.json').write_text(json.dumps(dict(architectures=['VideoMAEForVideoClassification'], model_type='videomae', id2label=dict(enumerate(names)), num_attention_heads=16)))
    save_file({k: v.contiguous() for k,v in hugging_face(s, version).items()}, folder/'model.safetensors')
    return folder

def save_pth(state, path, container='model', **more):
    torch.save({container: state} | more, path)
    return path

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    "Three clips of noise, in training and in validation"
    work,rng = tmp_path_factory.mktemp('clips'),np.random.default_rng(0)
    for c in VOCAB: encode(work/f'{c}.mp4', torch.from_numpy(rng.integers(0, 255, (12, 32, 40, 3), dtype=np.uint8)), fps=8)
    rows = pd.DataFrame(dict(path=[f'{c}.mp4' for c in VOCAB], label=VOCAB))
    with pytest.warns(UserWarning, match='more than one split'):
        return VideoDataLoaders.from_df(pd.concat([rows.assign(split=s) for s in ('train', 'valid')]), work, frames=4, stride=2, size=32, bs=3, num_workers=0)

BACK = [*range(D//4), *range(D*5//8, D), *range(D//4, D*5//8)]                         # MVD has width before height
LAYOUTS = {'VideoMAE, pretrained': (lambda p: save_pth(videomae_pretrained(s := vit(mean_pooling=False)), p/'a.pth', args=argparse.Namespace(lr=1)) and s, 'a.pth', {}, VideoMAEViT, flat, None),
           'VideoMAE, fine-tuned': (lambda p: save_pth(s := vit(3), p/'a.pth', 'module') and s, 'a.pth', {}, VideoMAEViT, flat, None),
           'VideoMAE, 5 classes': (lambda p: save_pth(s := vit(5), p/'a.pth') and s, 'a.pth', {}, VideoMAEViT, flat, None),
           'MVD, pretrained': (lambda p: save_pth(mvd_pretrained(s := vit(mean_pooling=False)), p/'a.pth', epoch=400) and s, 'a.pth', {}, VideoViT, separable, None),
           'MVD, fine-tuned': (lambda p: save_pth(s := vit(3), p/'a.pth') and s, 'a.pth', dict(kind='mvd'), VideoViT, separable, None),
           'Hugging Face, transformers 4': (lambda p: save_hugging_face(s := vit(3), p/'a', 4, VOCAB) and s, 'a', {}, VideoMAEViT, flat, VOCAB),
           'Hugging Face, transformers 5': (lambda p: save_hugging_face(s := vit(5), p/'a', 5, None) and s, 'a', {}, VideoMAEViT, flat, None)}

@pytest.mark.parametrize('name', LAYOUTS)
def test_official_weights_become_a_student_that_learns(tmp_path, dls, name):
    write,file,kw,cls,positions,vocab = LAYOUTS[name]
    torch.manual_seed(0)
    s,x = write(tmp_path),torch.randn(2, 3, 4, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net = pretrained_student(tmp_path/file, 4, 32, verbose=False, **kw)
    classes = len(s['head.bias']) if 'head.bias' in s else 0
    assert (type(net), net.num_classes, net.vocab) == (cls, classes, vocab)
    with torch.no_grad():
        want = tokens(s, x, positions())
        got = net.forward_intermediates(x, norm=False)[1][-1]
        torch.testing.assert_close(got, want[..., BACK] if cls is VideoViT else want, atol=1e-5, rtol=1e-4)
        if classes: torch.testing.assert_close(net(x), logits(s, x, positions()), atol=1e-5, rtol=1e-4)
    learn = finetune_learner(dls, net if kw else tmp_path/file, mixup=0, cutmix=0)      # a file alone cannot say that it is MVD's
    start = {k: v.clone() for k,v in learn.student.state_dict().items()}
    for k,v in net.state_dict().items():
        if not k.startswith('head') and (classes or not k.startswith('fc_norm')): assert torch.equal(v, start[k]), k
    if classes == 3: assert torch.equal(net.head.weight, start['head.weight'])         # kept
    assert start['head.weight'].shape == (3, D) and learn.student.vocab == VOCAB
    with learn.no_bar(), learn.no_logging(): learn.fit_finetune(1, 1e-2, warmup=0)
    end = learn.student.state_dict()
    assert all(v.isfinite().all() for v in end.values())
    for k in ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'head.weight'): assert not torch.equal(end[k], start[k]), k

def image(**kw): return timm.create_model('vit_tiny_patch16_224', **dict(img_size=32, patch_size=PATCH, embed_dim=D, depth=DEPTH, num_heads=1, num_classes=3) | kw).eval()

@pytest.mark.parametrize('kw', [{}, dict(class_token=False, global_pool='avg')], ids=['class token', 'mean pooling'])
def test_image_network_is_spread_over_time(tmp_path, dls, kw):
    torch.manual_seed(0)
    net,picture = image(**kw),torch.randn(2, 3, 32, 32)
    save_file(net.state_dict(), tmp_path/'timm.safetensors')
    with pytest.warns(UserWarning, match='other positions'): student = pretrained_student(tmp_path/'timm.safetensors', 4, 32, verbose=False)
    still = picture.unsqueeze(2).repeat(1, 1, 4, 1, 1)
    with torch.no_grad():
        want = net.patch_embed(picture)
        torch.testing.assert_close(student.patch_embed(still), torch.cat([want, want], 1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(student.blocks(want), net.blocks(want), atol=1e-5, rtol=1e-4)
    assert (student.cls_token is None) == ('class_token' in kw) and student.num_classes == 3
    if student.cls_token is not None: assert torch.equal(student.cls_token, net.cls_token)
    learn = finetune_learner(dls, student, mixup=0, cutmix=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_finetune(1, 1e-2, warmup=0)
    assert all(v.isfinite().all() for v in learn.student.state_dict().values())

def test_weights_that_do_not_fit(tmp_path):
    "A kernel over time is no image network's; LayerScale, register tokens and a missing weight would change the trunk"
    video = {k: v.unsqueeze(2).repeat(1, 1, 2, 1, 1) if k == 'patch_embed.proj.weight' else v for k,v in image().state_dict().items()}
    s = vit(3)
    for name,state,said in (('spread', video, 'save_student'), ('scaled', image(init_values=.1).state_dict(), '4 weights of its trunk.*blocks.0.ls1.gamma'), ('gamma', s | {'blocks.0.gamma_1': torch.ones(D)}, 'another kind of network.*gamma_1'),
                            ('registers', image(reg_tokens=2).state_dict(), 'reg_token'), ('cut', {k: v for k,v in s.items() if k != 'blocks.1.mlp.fc2.weight'}, 'incomplete.*blocks.1.mlp.fc2.weight')):
        with pytest.raises(ValueError, match=said) as e: pretrained_student(save_pth(state, tmp_path/f'{name}.pth'), 4, 32, verbose=False)
        assert f'{name}.pth' in str(e.value)

def test_mvd_of_clips_of_another_size(tmp_path):
    "Its positions are a formula: nothing to warn of where the clips are smaller; another table is"
    s = vit(mean_pooling=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net = pretrained_student(save_pth(mvd_pretrained(s, (8, 14, 14)), tmp_path/'mvd.pth'), 4, 32, verbose=False)
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(net.forward_intermediates(x, norm=False)[1][-1], tokens(s, x, separable())[..., BACK], atol=1e-5, rtol=1e-4)
    learnt = mvd_pretrained(s, (8, 14, 14)) | dict(pos_embed=torch.randn(1, 1568, D))
    with pytest.warns(UserWarning, match='other positions'): pretrained_student(save_pth(learnt, tmp_path/'mvd.pth'), 4, 32, verbose=False)

def test_classes_that_do_not_fit(tmp_path, dls):
    torch.manual_seed(0)
    five,none = (pretrained_student(save_pth(s, tmp_path/f'{i}.pth'), 4, 32, verbose=False) for i,s in enumerate((vit(5), videomae_pretrained(vit(mean_pooling=False)))))
    for net,said in ((five, 'the student has 5 classes and the data 3'), (none, 'the student has no classes and the data 3')):
        with pytest.raises(ValueError, match=said): finetune_learner(dls, net, reset_head=False)
    for i,(names,said) in enumerate(((['cat', 'dog', 'bat'], "1 of the data's classes are not the student's: 'owl'"), (['dog', 'cat', 'owl'], 'another order'))):
        folder = save_hugging_face(vit(3), tmp_path/f'hf{i}', 4, names)
        with pytest.raises(ValueError, match=said): finetune_learner(dls, folder)
        net = pretrained_student(folder, 4, 32, verbose=False)
        learn = finetune_learner(dls, net, reset_head=True)                             # the remedy
        assert learn.student.vocab == VOCAB and not torch.equal(learn.student.head.weight, net.head.weight)
