"`tsd train`: recipes as the paper has them and as an installed package has them, the run folder, the log, the plan, the engine's callbacks, bad input."
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).resolve().parent.parent
SMALL = 'data.options.n_train=20 data.options.n_test=10 cnn.epochs=1 vit.epochs=1 train.stage2_epochs=1 data.options.workers=1'.split()

def overrides(model, setting):
    "A row of tables 3-6 as changes to the recipe of its model"
    name,_,value = setting.partition('=')
    if name == 'stage1_epochs': return [f'train.stage1_epochs={value}', f'train.stage2_epochs={400-int(value)}']
    if name.startswith('without') or setting == 'layers=none': return ['train.distill=none']
    if name == 'layers': return [f'train.quarters=[{value.replace("+", ",")}]']
    if not name: return []
    on = name.split('+')
    over = [f'train.{k}={str(k in on).lower()}' for k in ('label1','logit1','label2','logit2')] + ['train.distill=none']*('feature' not in on)
    return over + ['train.stage1_epochs=0', 'train.stage2_epochs=400']*(not {'feature','label1','logit1'} & set(on))     # stage 1 has no term

def test_rows_of_tables_3_to_6_are_overrides():
    import timm
    from tsd.paper import paper_tables
    from tsd.teachers import Teacher, VideoMAEViT
    from tsd.train import make_stages, needs, read_config
    with torch.device('meta'): cnn,vit = Teacher(timm.create_model('resnet101', num_classes=400)),Teacher(VideoMAEViT())
    rows = pd.concat([paper_tables(t) for t in (3, 4, 5, 6)]).query('metric == "top1"')
    seen = {}
    for r in rows.itertuples():
        c = read_config(f'{r.dataset}-{r.model.removeprefix("TSD-")}', overrides(r.model, r.setting))
        a,b = (t if asked else None for t,asked in zip((cnn, vit), needs(c)))
        one,two = make_stages(c, a, b)
        assert one.epochs + two.epochs == 400
        assert c.student.mhca_blocks == (8 if r.model == 'TSD-fad' else 0)              # with and without the feature term
        terms = lambda s: '-' if not s.epochs else '+'.join(([s.feature + ''.join(map(str, s.quarters))*(s.feature == 'fpld')] if s.feature else []) + ['label']*bool(s.label) + ['logit']*bool(s.logit))
        seen[r.model, r.setting] = f'{one.epochs} {terms(one)} | {two.epochs} {terms(two)}'
    both = '300 label+logit'
    assert seen == {
        ('TSD-fpld', 'without fpld'): f'100 label+logit | {both}', ('TSD-fpld', ''): f'100 fpld1234+label+logit | {both}',
        ('TSD-fad', 'without fad'): f'100 label+logit | {both}', ('TSD-fad', ''): f'100 fad+label+logit | {both}',
        ('TSD-fpld', 'layers=none'): f'100 label+logit | {both}', ('TSD-fpld', 'layers=4'): f'100 fpld4+label+logit | {both}', ('TSD-fpld', 'layers=3+4'): f'100 fpld34+label+logit | {both}',
        ('TSD-fpld', 'layers=2+3+4'): f'100 fpld234+label+logit | {both}', ('TSD-fpld', 'layers=1+2+3+4'): f'100 fpld1234+label+logit | {both}',
        ('TSD-fpld', 'stage1_epochs=0'): '0 - | 400 label+logit', **{('TSD-fpld', f'stage1_epochs={n}'): f'{n} fpld1234+label+logit | {400-n} label+logit' for n in (50, 75, 100, 125, 150)},
        ('TSD-fad', 'label2'): '0 - | 400 label', ('TSD-fad', 'logit1+label2+logit2'): f'100 logit | {both}', ('TSD-fad', 'label1+logit1+label2+logit2'): f'100 label+logit | {both}',
        ('TSD-fad', 'feature+label1+logit1+label2+logit2'): f'100 fad+label+logit | {both}'}

def test_recipes_are_in_the_wheel(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', tmp_path, ROOT], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PIP_DISABLE_PIP_VERSION_CHECK': '1'})
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(*tmp_path.glob('*.whl'))
    inside = {n.removeprefix('tsd/recipes/'): wheel.read(n) for n in wheel.namelist() if n.startswith('tsd/recipes/')}
    assert inside == {p.name: p.read_bytes() for p in (ROOT/'tsd'/'recipes').glob('*.toml')} and len(inside) == 6

def test_each_line_of_a_recipe_has_its_source():
    for p in (ROOT/'tsd'/'recipes').glob('[ks]*.toml'):
        for line in p.read_text().splitlines():
            if '=' in line.split('#')[0] and not line.startswith(('base', 'seed', 'source', 'root')): assert '#' in line or line.startswith(('logit1', 'label2', 'logit2')), f'{p.name}: {line}'

def test_plan_of_the_full_recipe(tsd):
    "22 M parameters, 57 GMAC; ResNet-101 on 16 frames 125, ViT-B 180: as counted elsewhere (timm's and VideoMAE's own tables, bench_stages.csv)"
    from tsd.train import plan, read_config
    p = plan(read_config('k400-fpld', ['finetune.epochs=0', 'train.precision=fp32', 'train.bs=64', 'train.accumulate=16', 'cache.folder=cache', 'train.views=10']), clips=240_000, rate=500)
    assert abs(p.stage2.student_millions - 22.04) < .01 and abs(p.stage2.student_gmacs - 56.9) < .1
    assert abs(p.stage1.teacher_gmacs - 124.8) < .1 and abs(p.stage2.teacher_gmacs - 180.3) < .1
    assert p.stage1.steps == 100*-(-(240_000//64)//16) and p.stage1.clips_a_step == 1024
    assert abs(p.stage1.hours - 240_000*100/500/3600) < 1e-9
    made = pd.read_csv(ROOT/'data'/'bench_stages.csv').set_index('what').mib/1024                   # measured, one clip, in float32
    for stage,what in ((p.stage1, 'stage 1, TSD-fpld'), (p.stage2, 'stage 2')): assert .8 < stage.memory_gib/64/made[what] < 1.25
    assert 16*400*4*240_000*10 <= p.stage1.cache_gb*1e9 < 1.2*16*400*4*240_000*10                   # logits of 16 frames, float32

def test_train_writes_a_log_without_bars(tmp_path):
    "In a process of its own, both streams to a file"
    with open(tmp_path/'log', 'w') as f:
        code = subprocess.run([Path(sys.executable).with_name('tsd'), 'train', 'tiny-fpld', *SMALL, 'log.every=.01'], cwd=tmp_path, stdout=f, stderr=f, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode
    said = (tmp_path/'log').read_bytes()
    assert code == 0, said.decode()
    assert b'\r' not in said and '█'.encode() not in said and b'it/s' not in said
    said = said.decode()
    for stage,terms in (('stage1', ('label', 'logit', 'feature')), ('stage2', ('label', 'logit')), ('finetune', ('loss',))):
        line = next(l for l in said.splitlines() if l.startswith(f'{stage} epoch 1/1 batch 1/'))
        assert all(f'{t} ' in line for t in terms) and 'clips/s' in line and 'waiting for data' in line and line.endswith('left'), line
        assert any(l.startswith(f'{stage} epoch 1/1: ') and 'valid_loss' in l for l in said.splitlines())
    run = tmp_path/'runs'/'tiny-fpld'
    about = json.loads((run/'versions.json').read_text())
    assert {'torch', 'commit', 'command'} <= set(about) and about['data']['data']['train']['clips'] == 20 and about['command'].startswith('tsd train tiny-fpld')
    for f in ('history.png', 'finetune.png'): assert (run/f).read_bytes()[:4] == b'\x89PNG'
    res = pd.read_csv(run/'results.csv')
    assert res.n[0] == res.expected[0] == 10 and f'top-1 {res.top1[0]:.1%}' in said

@pytest.fixture
def recorders(monkeypatch):
    "TensorBoard and Weights & Biases as stand-ins that keep what they are told"
    told,made = {'tensorboard': [], 'wandb': []},{}
    class SummaryWriter:
        def __init__(self, log_dir): told['folder'] = Path(log_dir)
        def add_scalar(self, k, v, step): told['tensorboard'].append((k, float(v), step))
        def close(self): pass
    made['tensorboard'] = types.ModuleType('tensorboard')
    made['torch.utils.tensorboard'] = types.ModuleType('torch.utils.tensorboard'); made['torch.utils.tensorboard'].SummaryWriter = SummaryWriter
    w = made['wandb'] = types.ModuleType('wandb')
    w.run,w.config = None,types.SimpleNamespace(update=lambda *a, **kw: None)
    def init(**kw): w.run = types.SimpleNamespace(step=0, summary={}); told['init'] = kw
    w.init,w.log = init,lambda d, step=None: told['wandb'].append((step, d))
    for k,m in made.items(): monkeypatch.setitem(sys.modules, k, m)
    for k in ('fastai.callback.tensorboard', 'fastai.callback.wandb'): monkeypatch.delitem(sys.modules, k, raising=False)
    return told

def test_loggers_where_they_are_asked_for(tmp_path, tsd, recorders, monkeypatch):
    more = ['train.stage1_epochs=0', 'train.stage2_epochs=1', 'finetune.epochs=0', 'test.clips=0', 'vit.model=VideoMAEViT', 'vit.options={patch_size=8, embed_dim=48, depth=1, num_heads=3}']
    code,out,err = tsd('train', 'tiny-fad', *SMALL[:2], *more, 'log.tensorboard=true', 'log.wandb=true', 'name=logged')
    assert code == 0, err
    assert recorders['folder'] == Path('runs/logged/tensorboard/distill') and recorders['init']['name'] == 'logged' and recorders['init']['config']['train']['lr'] == 2e-3
    assert [s for k,_,s in recorders['tensorboard'] if k == 'train_loss'][:2] == [1, 2] and {'valid_loss', 'accuracy'} <= {k for k,_,_ in recorders['tensorboard']}
    assert {'label', 'logit', 'lr'} <= {k for k,_,_ in recorders['tensorboard']}
    assert any('train_loss' in d for _,d in recorders['wandb']) and any({'label', 'logit'} <= set(d) for _,d in recorders['wandb'])
    monkeypatch.setitem(sys.modules, 'wandb', None)
    code,out,err = tsd('train', 'tiny-fad', 'log.wandb=true', 'name=other')
    assert code == 1 and 'pip install wandb' in err and not Path('runs/other').exists()

def test_all_that_a_section_can_ask_for_goes_on_after_a_stop(tmp_path, tsd):
    "Accumulation, 16 bits, average weights, views that come round and a teacher cache; then another run of the same words that is stopped between the stages and goes on: the same student"
    from tsd.checkpoints import load_student
    from tsd.resume import list_states
    words = ['train', 'tiny-fpld', *SMALL, 'train.bs=5', 'train.accumulate=2', 'train.precision=bf16', 'train.ema=.5', 'train.views=1', 'cache.folder=cache', 'finetune.epochs=0', 'test.clips=0', 'data.cache=false', 'data.num_workers=0']
    code,out,err = tsd(*words, 'name=whole')
    assert code == 0, err
    assert 'accuracy' in out and any(Path('cache').rglob('*.bin'))
    from tsd import train
    class Stop(train.Callback):
        order = 200
        def after_epoch(self): raise KeyboardInterrupt
    plain = train._callbacks
    train._callbacks = lambda *a: [*plain(*a), Stop()]
    try: code,out,err = tsd(*words, 'name=cut')
    finally: train._callbacks = plain
    assert code == 130 and list_states('runs/cut/checkpoints/distill')
    assert not Path('runs/cut/distilled.safetensors').exists()
    code,out,err = tsd(*words, 'name=cut')
    assert code == 1 and '--resume auto' in err
    code,out,err = tsd(*words, 'name=cut', '--resume', 'auto')
    assert code == 0 and 'going on from' in out, err
    a,b = (load_student(f'runs/{n}/student.safetensors')[0].state_dict() for n in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    one,two = (pd.read_csv(f'runs/{n}/history.csv').query('metric in ("loss","accuracy")') for n in ('whole', 'cut'))
    assert one.value.tolist() == two.value.tolist() and one.epoch.tolist() == two.epoch.tolist()
    csv = Path('runs/clips_motion/clips.csv')                                           # other clips, the same words
    csv.write_text('\n'.join(csv.read_text().splitlines()[:-1]) + '\n')
    Path('runs/cut/distilled.safetensors').unlink(); Path('runs/cut/student.safetensors').unlink()
    code,out,err = tsd(*words, 'name=cut', '--resume', 'auto')
    assert code == 1 and 'clips are not those' in err and err.count('\n') == 1, err

def test_finetune_of_students_and_foreign_weights(tmp_path, tsd):
    from safetensors.torch import save_file
    from tsd.student import VideoViT
    from tsd.teachers import VideoMAEViT
    from tsd.checkpoints import save_student
    shape = dict(img_size=32, num_frames=4, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    own = VideoViT(num_classes=3, **shape)
    save_student(own, tmp_path/'own.safetensors', ['a', 'b', 'c'])
    own.save_pretrained(tmp_path/'folder')
    mae = VideoMAEViT(num_classes=7, **shape)
    state = {k: v for k,v in mae.state_dict().items() if 'attn.qkv.bias' not in k}
    for k,v in mae.state_dict().items():                                                # as VideoMAE writes it
        if 'attn.qkv.bias' in k: state |= {k.replace('qkv.bias', 'q_bias'): v[:64].clone(), k.replace('qkv.bias', 'v_bias'): v[128:].clone()}
    torch.save(dict(model=state), tmp_path/'videomae.pth')
    small = [*SMALL[:2], 'data.options.workers=1', 'test.crops=1']
    for name,file in (('own', 'own.safetensors'), ('folder', 'folder'), ('mae', 'videomae.pth')):
        code,out,err = tsd('finetune', 'tiny-fad', '--student', file, *small, f'name={name}')
        assert code == 0, err
        assert 'stage1' not in out and list(pd.read_csv(f'runs/{name}/history.csv').stage.unique()) == ['finetune']
        assert pd.read_csv(f'runs/{name}/results.csv').n[0] == 10
    assert Path('runs/own/student.safetensors').is_file() and json.loads(Path('runs/mae/student/config.json').read_text())['architectures'] == ['VideoMAEViT']
    # what was saved says how a video becomes clips, and with which normalisation: its test is that of the run
    other = ['data.source=csv', 'data.root=runs/clips_scene/clips.csv', 'data.mode=uniform', 'data.options={mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]}']
    for name,file in (('own2', 'own.safetensors'), ('mae2', 'videomae.pth')):
        code,out,err = tsd('finetune', 'tiny-fad', '--student', file, *other, 'test.crops=1', 'finetune.epochs=1', f'name={name}')
        assert code == 0, err
        student,clips = next(Path(f'runs/{name}').glob('student*')),pd.read_csv(f'runs/{name}/results.csv').clips[0]
        code,out,err = tsd('test', '--model', student, '--data', 'runs/clips_scene/clips.csv', '--clips', clips, '--crops', 1, '--out', f'{name}.csv')
        assert code == 0 and ', uniform, ' in out, err
        probs = [pd.read_csv(f).set_index('path').sort_index().filter(regex='^p_') for f in (f'runs/{name}/predictions.csv', f'{name}.csv')]
        assert len(probs[0]) == 10 and abs(probs[0].values - probs[1].values).max() < 1e-5
        assert tsd('export', '--model', student, '--out', f'{name}-out', '--formats', '')[0] == 0
        about = json.loads(Path(f'{name}-out/preprocessor_config.json').read_text())
        assert about['sampling']['mode'] == 'uniform' and about['image_mean'] == [.1, .2, .3] and about['image_std'] == [.4, .5, .6]
        video = next(Path('runs/clips_scene').rglob('*.mp4'))
        said = [json.loads(tsd('predict', video, '--model', m, '--json', '--clips', 1, '--crops', 1)[1])['predictions'] for m in (student, f'{name}-out')]
        assert said[0] == said[1]
    # a head for as many classes of other names is kept or made anew, as one says
    save_student(VideoViT(num_classes=10, **shape), tmp_path/'ten.safetensors', list('abcdefghij'))
    code,out,err = tsd('finetune', 'tiny-fad', '--student', 'ten.safetensors', *small, 'name=ten')
    assert code == 1 and 'student.reset_head=true on the command line' in err
    assert tsd('finetune', 'tiny-fad', '--student', 'ten.safetensors', *small, 'name=ten2', 'student.reset_head=true')[0] == 0
    code,out,err = tsd('finetune', 'tiny-fad', '--student', 'absent.pth', *small)
    assert code == 1 and 'absent.pth' in err

@pytest.mark.parametrize('words, said', [
    (['k400-fda'], 'nearest is k400-fad'), (['absent.toml'], 'absent.toml'), (['broken.toml'], 'broken.toml is no TOML'), (['loop.toml'], 'leads back'), (['own.toml'], 'train.bs or finetune.bs'),
    (['k400-fad'], 'K400'), (['k400-fad', 'data.root=/absent', 'train.bs'], "'train.bs' is not key=value"), (['tiny-fad', 'student.file=absent.pth', 'train.stage1_epochs=0', 'train.stage2_epochs=0'], 'absent.pth'),
    (['tiny-fad', 'data.source=csv', 'data.root=absent.csv'], 'absent.csv'), (['tiny-fad', 'vit.model=none', 'vit.file=$VIDEOMAE_FILE'], 'VIDEOMAE_FILE'), (['tiny-fad', 'cache.dtype=int8', 'cache.folder=x'], 'int8')])
def test_bad_input_is_one_clear_line(tmp_path, tsd, words, said, monkeypatch):
    monkeypatch.delenv('K400', raising=False)
    (tmp_path/'broken.toml').write_text('a = ')
    (tmp_path/'loop.toml').write_text('base = "loop.toml"')
    (tmp_path/'own.toml').write_text('base = "tiny-fad"\nbs = 4\n')
    code,out,err = tsd('train', words[0], *(SMALL if words[0] == 'tiny-fad' else []), *words[1:])
    assert code == 1 and said in err and 'Traceback' not in err and err.count('\n') == 1, err
