"""Runs in several processes, forked from one that has imported everything: `python distributed_worker.py FOLDER` writes FOLDER/results.json.

Processes of a group find each other by a file and talk by gloo, on the CPU. A tiny student goes through its stages on clips in memory."""
import contextlib, json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path

import pandas as pd
import timm
import torch
import torch.distributed as dist
from accelerate import PartialState
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.data.transforms import CategoryMap
from fastai.metrics import F1Score, accuracy
from fastai.torch_core import set_seed

from tsd.augment import train_transforms
from tsd.data import ClipNormalize, Sampling, VideoDataLoaders, VideoDataset, VideoDL, VideoItem
from tsd.distributed import Distributed, rank_world
from tsd.finetune import finetune_learner
from tsd.learner import two_stage_learner
from tsd.resume import ExactResume, random_states
from tsd.teachers import Teacher, VideoMAEViT
from tsd.training import EMA, Accumulate, FiniteLoss, Precision

TINY = dict(patch_size=8, embed_dim=48, num_heads=3)

class Clips(VideoDataset):
    "Knows which clips were read"
    seen = []
    def read(self, i, indices): Clips.seen.append((self.items[i].path.name, self.epoch, list(map(int, indices)))); return super().read(i, indices)

def loaders(n=18, bs=8, repeats=1, num_workers=0, valid=7):
    def part(name, n, tfm):
        items = [VideoItem(Path(f'{name}{i}.mp4'), 'ab'[i%2]) for i in range(n)]
        ds = Clips(items, CategoryMap(['a', 'b']), Sampling(frames=4, stride=1, size=16), tfm)
        ds.cache = {o.path: torch.randint(128, (8,18,24,3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) + 64*(i%2) for i,o in enumerate(items)}
        return ds
    return VideoDataLoaders.from_dsets(part('train', n, train_transforms(16, 'distill')), part('valid', valid, None), bs=bs, device='cpu', dl_type=VideoDL, repeats=(repeats,1),
                                       num_workers=num_workers, after_batch=ClipNormalize())

def learner(kind, distill='fad', drop_path=0., loaders_kw={}, **kw):
    set_seed(0)
    cnn = Teacher(timm.create_model('test_resnet', num_classes=2, output_stride=8))
    vit = Teacher(VideoMAEViT(**TINY, img_size=16, num_frames=4, depth=1, num_classes=2))
    learn = two_stage_learner(loaders(**loaders_kw), 'tsd_vit_tiny_patch16_224', cnn, vit, distill, drop_path_rate=drop_path, depth=4 if distill == 'fpld' else 2, metrics=[accuracy, F1Score()], **TINY, **kw)
    return learn if kind == 'two_stage' else finetune_learner(learn.dls, learn.student, mixup=0, cutmix=0, drop_path=drop_path, metrics=accuracy)

class Draws(Callback):
    "What a process draws by chance"
    def before_epoch(self): self.learn.drawn = torch.rand(3).tolist()

class Bad(Callback):
    "A loss of NaN in one process at one batch"
    order = -250                                              # before Distributed looks
    def __init__(self, rank, at): self.rank_,self.at = rank,at
    def after_loss(self):
        if self.training and self.train_iter == self.at and rank_world()[0] == self.rank_: self.learn.loss_grad = self.learn.loss_grad*float('nan'); self.learn.loss = self.learn.loss_grad.clone()

def train(folder, kind='two_stage', cbs=lambda: [], epochs=(2,2), states=None, history=True, fsdp=False, elastic=False, **kw):
    "One process's share of a run, and what came of it"
    Clips.seen = []
    learn = learner(kind, **kw)
    cbs = [Draws(), *([Distributed('cpu', fsdp=fsdp)] if 'RANK' in os.environ else []), *([ExactResume(folder/states, steps=1, elastic=elastic)] if states else []), *cbs()]
    path = folder/'history.csv' if history else None
    with learn.no_bar() if states else contextlib.nullcontext():
        if kind == 'two_stage': learn.fit_two_stage(*epochs, lr=1e-3, cbs=cbs, history=path)
        else: learn.fit_finetune(epochs[0], lr=1e-3, cbs=cbs, history=path)
    r,w = rank_world()
    h = learn.history[~learn.history.metric.isin(['clips_per_second','data_wait'])]
    return dict(rank=r, world=w, history={f'{o.stage} {o.epoch} {o.metric}': o.value for o in h.itertuples()}, losses=[o.item() for o in learn.recorder.losses], values=[list(v) for v in learn.recorder.values],
                weights={k: v.double().sum().item() for k,v in learn.student.state_dict().items()}, bits={k: v.flatten()[:50].tolist() for k,v in learn.student.state_dict().items()}, seen=Clips.seen,
                drawn=learn.drawn, share=learn.dls.train.share, bs=learn.dls.train.bs, iters=learn.train_iter, chance=random_states()['torch'].sum().item())

def fork(f, folder, n, minutes=1.):
    "`f(folder)` in `n` processes of a group (none for n=0): exit statuses, results and what was printed, by rank"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'meet').unlink(missing_ok=True)
    pids = []
    for r in range(max(n, 1)):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                out = open(folder/f'out{r}.txt', 'a'); os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
                if n:
                    os.environ.update(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', ACCELERATE_USE_CPU='true')
                    dist.init_process_group('gloo', init_method=f'file://{folder/"meet"}', rank=r, world_size=n, timeout=timedelta(minutes=minutes))
                (folder/f'{r}.json').write_text(json.dumps(f(folder)))
                status = 0
            except SystemExit as e: status = e.code
            except BaseException as e: print(f'{type(e).__name__}: {e}', flush=True)
            finally: sys.stdout.flush(); os._exit(status)
        pids.append(pid)
    def end():
        codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
        return dict(codes=codes, said=[(folder/f'out{r}.txt').read_text() for r in range(max(n, 1))], files=sorted(p.name for p in folder.rglob('*') if p.is_file()),
                    res=[json.loads((folder/f'{r}.json').read_text()) if (folder/f'{r}.json').exists() else None for r in range(max(n, 1))])
    return end

class Stop(Callback):
    "A signal to one's own process at a batch of the run"
    order = -150
    def __init__(self, rank, at, sig): self.rank_,self.at,self.sig = rank,at,sig
    def before_batch(self):
        if self.training and self.train_iter == self.at and rank_world()[0] == self.rank_: os.kill(os.getpid(), self.sig)


def main(out):
    res = {}
    def case(name, f=train, ns=(0,2), **kw):
        for n in ns: res[f'{name} {n}'] = fork(lambda d: f(d, **kw), out/f'{name}{n}', n)()
    case('fad', ns=(0,1,2,4), loaders_kw=dict(bs=8))
    case('fpld', distill='fpld', epochs=(1,1))
    case('feature alone', label1=False, logit1=False, epochs=(1,1))
    case('no workers', ns=(0,), epochs=(1,0))
    case('workers', ns=(2,), epochs=(1,0), loaders_kw=dict(num_workers=1))
    case('tuned', kind='finetune', epochs=(2,), loaders_kw=dict(bs=8, repeats=2), cbs=lambda: [EMA(.5), Accumulate(2), FiniteLoss()])
    case('clipped', cbs=lambda: [GradientClip(.05), EMA(.5)], epochs=(1,1))
    case('sharded fad', ns=(2,), fsdp=True)
    case('sharded fpld', ns=(2,), fsdp=True, distill='fpld', epochs=(1,1))
    case('sharded tuned', ns=(2,), fsdp=True, kind='finetune', epochs=(2,), loaders_kw=dict(bs=8, repeats=2), cbs=lambda: [EMA(.5), Accumulate(2), FiniteLoss()])
    case('sharded clipped', ns=(2,), fsdp=True, cbs=lambda: [GradientClip(.05), EMA(.5)], epochs=(1,1))
    case('bf16', ns=(2,), cbs=lambda: [Precision('bf16')], epochs=(1,1))
    case('sharded bf16', ns=(2,), fsdp=True, cbs=lambda: [Precision('bf16')], epochs=(1,1))
    for what,cbs in (('fp16', lambda: [Precision('fp16')]), ('best', lambda: [SaveModelCallback()])): case(f'sharded {what}', ns=(2,), fsdp=True, cbs=cbs, epochs=(1,0))
    case('one bad', epochs=(2,0), cbs=lambda: [FiniteLoss(skip=1), Bad(1, 1)], ns=(2,))
    case('too bad', epochs=(2,0), cbs=lambda: [FiniteLoss(), Bad(1, 1)], ns=(2,))
    case('files', epochs=(1,0), cbs=lambda: [CSVLogger(out/'files2'/'log.csv'), SaveModelCallback(fname=str(out/'files2'/'best'))], ns=(2,))
    case('random', drop_path=.5, epochs=(2,0), ns=(2,))
    again = dict(drop_path=.3, states='states')
    case('whole', ns=(2,), **again)
    for name,rank,at,sig in ('killed',1,3,signal.SIGKILL),('killed0',0,5,signal.SIGKILL),('told',1,5,signal.SIGTERM):
        d,t = out/name,time.time()
        first = fork(lambda d: train(d, cbs=lambda: [Stop(rank, at, sig)], **again), d, 2)()
        first['seconds'] = time.time() - t
        res[name] = dict(first=first, then=fork(lambda d: train(d, **again), d, 2)())
    case('sharded whole', ns=(2,), fsdp=True, **again)
    for name,rank,at,sig in ('sharded killed',1,3,signal.SIGKILL),('sharded told',0,5,signal.SIGTERM):
        d = out/name
        first = fork(lambda d: train(d, cbs=lambda: [Stop(rank, at, sig)], fsdp=True, **again), d, 2)()
        res[name] = dict(first=first, then=fork(lambda d: train(d, fsdp=True, **again), d, 2)())
    plain = dict(drop_path=0., states='states')
    fork(lambda d: train(d, cbs=lambda: [Stop(1, 5, signal.SIGKILL)], fsdp=True, **plain), out/'elastic', 2)()
    res['elastic'] = fork(lambda d: train(d, elastic=True, **plain), out/'elastic', 0)()
    res['fewer'] = fork(lambda d: train(d, **again), out/'killed', 0)()
    t = time.time()
    def late(d):
        if rank_world()[0]: time.sleep(6)
        return train(d, epochs=(1,0))
    res['late'] = fork(late, out/'late', 2, minutes=2/60)() | dict(seconds=time.time()-t)
    def refuse(d, what):
        learn = learner('two_stage', loaders_kw=dict(n=17, bs=6))
        if what == 'batch': learn.dls.loaders[0] = learn.dls.train.new(bs=5)
        if what == 'rest': learn.dls.loaders[0] = learn.dls.train.new(drop_last=False)
        if what == 'loader': learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train_ds)
        learn.fit(1, cbs=Distributed('cuda' if what == 'gpu' else 'cpu'))
    for what in ('batch', 'rest', 'loader', 'gpu'): res[f'refused {what}'] = fork(lambda d: refuse(d, what), out/f'refused {what}', 2)()
    res['refused alone'] = fork(lambda d: refuse(d, 'alone'), out/'refused alone', 0)()
    (out/'results.json').write_text(json.dumps(res))

def launched(out):
    "One process of torchrun: process 1 is killed in the first attempt, and a second attempt goes on from the checkpoint"
    first = os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0'
    res = train(out, cbs=lambda: [Stop(1, 3, signal.SIGKILL)] if first else [], drop_path=.3, states='states')
    (out/f'{res["rank"]}.json').write_text(json.dumps(res))
    PartialState().destroy_process_group()

if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
    launched(out) if 'RANK' in os.environ else main(out)
