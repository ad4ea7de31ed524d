"""Runs that are killed, in children of one process that has imported everything: `python resume_worker.py FOLDER CASES` writes FOLDER/results.json.

A child trains a tiny student on clips in memory. It is stopped by SIGKILL or SIGTERM at a place drawn by chance, and taken up by another child, until one reaches the end."""
import contextlib, hashlib, io, json, os, random, resource, signal, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import timm
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientClip
from fastai.data.transforms import CategoryMap
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.callback.schedule import fit_one_cycle
from fastai.torch_core import set_seed

from tsd import resume
from tsd.augment import train_transforms
from tsd.data import ClipNormalize, Sampling, VideoDataLoaders, VideoDataset, VideoDL, VideoItem
from tsd.finetune import finetune_learner
from tsd.learner import two_stage_learner
from tsd.resume import ExactResume, list_states
from tsd.teachers import Teacher, VideoMAEViT
from tsd.training import EMA, Accumulate, FiniteLoss, Precision

TINY = dict(patch_size=8, embed_dim=48, num_heads=3)
EPOCHS = dict(two_stage=4, finetune=3, fastai=3)

class Clips(VideoDataset):
    "Counts the clips that are read"
    reads = 0
    def read(self, i, indices): Clips.reads += 1; return super().read(i, indices)

def loaders(num_workers=0, bs=4, augment='distill', seed=0, n=16):
    def part(name, n, tfm):
        items = [VideoItem(Path(f'{name}{i}.mp4'), 'ab'[i%2]) for i in range(n)]
        ds = Clips(items, CategoryMap(['a', 'b']), Sampling(frames=4, stride=1, size=16), tfm, seed)
        ds.cache = {o.path: torch.randint(128, (8,18,24,3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)) + 64*(i%2) for i,o in enumerate(items)}
        return ds
    return VideoDataLoaders.from_dsets(part('train', n, train_transforms(16, augment)), part('valid', 6, None), bs=bs, device='cpu', dl_type=VideoDL,
                                       num_workers=num_workers, drop_last=False, after_batch=ClipNormalize())

class KillAt(Callback):
    "SIGKILL when the `n`-th event of this process is called, whichever it is"
    order = 0
    def __init__(self, n): self.n,self.seen = n,0
    def __call__(self, event):
        self.seen += 1
        if self.seen == self.n: os.kill(os.getpid(), signal.SIGKILL)

class Timed(Callback):
    "Tell the parent that training has begun, for signals at random times"
    def __init__(self, pipe): self.pipe = pipe
    def before_train(self):
        if self.pipe is not None: os.write(self.pipe, b'.'); os.close(self.pipe); self.pipe = None

class Slow(Callback):
    "Validation that takes a while"
    def before_validate(self): os.write(self.learn.pipe, b'v'); time.sleep(.3)

def train(kind, folder, cbs, lr=1e-3, num_workers=0, loaders_kw={}, resume='auto', steps=2, epochs=None, logging=None):
    "One process's share of a run; the Learner, if it comes to the end"
    e = epochs or EPOCHS[kind]
    again = ExactResume(folder/'states', resume=resume, steps=steps)
    dls = loaders(num_workers, **{**dict(augment='finetune' if kind == 'finetune' else 'distill', n=18 if kind == 'finetune' else 16), **loaders_kw})
    set_seed(0)
    if kind == 'fastai':                                  # any Learner, with fastai's own optimizer, schedule and callbacks
        net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d((1,4,4)), torch.nn.Flatten(), torch.nn.Dropout(.5), torch.nn.Linear(48, 2))
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    else:
        cnn = Teacher(timm.create_model('test_resnet', num_classes=2, output_stride=8))
        vit = Teacher(VideoMAEViT(**TINY, img_size=16, num_frames=4, depth=1, num_classes=2))
        learn = two_stage_learner(dls, 'tsd_vit_tiny_patch16_224', cnn, vit, drop_path_rate=.2, depth=2, **TINY)
        if kind == 'finetune': learn = finetune_learner(dls, learn.student, drop_path=.3)
    history = dict(history=folder/'history.csv', cbs=[*cbs, again])
    with learn.no_bar(), learn.no_logging():
        if kind == 'two_stage': learn.fit_two_stage(e//2, e-e//2, lr=lr, **history)
        elif kind == 'finetune': learn.fit_finetune(e, lr=lr, **{**history, 'cbs': [EMA(.9), Accumulate(2), GradientClip(1.), FiniteLoss(), Precision('bf16'), *history['cbs']]})
        else: learn.fit_one_cycle(e, lr, cbs=[EarlyStoppingCallback(patience=9), *history['cbs']])
    return learn

def digest(o, h=None):
    "A hash of all bits of tensors in dicts and lists"
    top,h = h is None, h or hashlib.sha256()
    if isinstance(o, dict):
        for k in sorted(o, key=str): h.update(str(k).encode()); digest(o[k], h)
    elif isinstance(o, (list, tuple)):
        for v in o: digest(v, h)
    elif isinstance(o, torch.Tensor): h.update(f'{o.dtype}{tuple(o.shape)}'.encode()); h.update(o.detach().contiguous().numpy().tobytes())
    else: h.update(repr(o).encode())
    return h.hexdigest() if top else None

def outcome(learn, folder):
    "All that has to be equal"
    rec = learn.recorder
    opt = learn.opt.opt.state_dict() if hasattr(learn.opt, 'opt') else learn.opt.state_dict()
    res = dict(weights=digest(learn.model.state_dict()), opt=digest(opt['state']), losses=[v.item() for v in rec.losses], lrs=[float(v) for v in rec.lrs], values=[list(v) for v in rec.values],
               chance=digest(resume.random_states()), train_iter=learn.train_iter)
    if hasattr(learn, 'history') and isinstance(learn.history, pd.DataFrame):
        keep = lambda df: df[df.metric != 'clips_per_second'].to_csv(index=False)
        speeds = (learn.history.metric == 'clips_per_second').sum()
        res |= dict(history=keep(learn.history), file=keep(pd.read_csv(folder/'history.csv', float_precision='round_trip')), speeds=int(speeds))
    return res

def child(f):
    "Fork a process that calls `f`: its pid and the end of a pipe that `f` gets the other end of"
    r,w = os.pipe()
    pid = os.fork()
    if pid: os.close(w); return pid, r
    status = 1
    try:
        os.close(r); os.setpgid(0, 0)
        f(w); status = 0
    except SystemExit as e: status = e.code
    except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True)
    finally: sys.stdout.flush(); os._exit(status)

def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def attempt(kind, folder, stop=None, **kw):
    """A process that trains, and how it is stopped; its exit status

    stop: None, ('event', n), ('time', seconds, signal, whole group), ('write', bytes of the n-th checkpoint, n), ('rename'|'renamed'|'delete', n)"""
    folder.mkdir(parents=True, exist_ok=True)
    what = stop[0] if stop else None
    def go(pipe):
        out = open(folder/'out.txt', 'a'); os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
        if what in ('write', 'rename', 'renamed', 'delete'): trap(*stop)
        count = KillAt(stop[1] if what == 'event' else 0)
        cbs = [count, *([Timed(pipe)] if what == 'time' else [])]
        learn = train(kind, folder, cbs, **kw)
        (folder/'outcome.json').write_text(json.dumps(outcome(learn, folder) | dict(events=count.seen)))
    pid,pipe = child(go)
    if what == 'time':
        os.read(pipe, 1); time.sleep(stop[1])
        with contextlib.suppress(ProcessLookupError): (os.killpg if stop[3] else os.kill)(pid, stop[2])
    os.close(pipe)
    return wait(pid)

def trap(what, n, size=0):
    "SIGKILL in the `n`-th save: after `size` bytes, before or after the renaming, or before the old one is deleted"
    calls,die = [0], lambda: os.kill(os.getpid(), signal.SIGKILL)
    def counted(real, before):
        def f(*a, **k):
            calls[0] += 1
            if calls[0] == n and before: die()
            res = real(*a, **k)
            if calls[0] == n: die()
            return res
        return f
    if what == 'write':
        real = torch.save
        def save(state, f):
            calls[0] += 1
            if calls[0] < n: return real(state, f)
            b = io.BytesIO(); real(state, b); f.write(b.getvalue()[:size]); f.flush(); die()
        torch.save = save
    elif what in ('rename', 'renamed'): resume.os = type('os', (), {**vars(os), 'replace': staticmethod(counted(os.replace, what == 'rename'))})
    else: Path.unlink = counted(Path.unlink, True)

def until_the_end(kind, folder, stops, **kw):
    "Stop a run at each of `stops` in turn, if it comes there, then let it end; how often it was stopped, and the outcome"
    codes = []
    for s in stops:
        codes.append(attempt(kind, folder, s, **kw))
        if codes[-1] == 0: break
    if not codes or codes[-1] != 0: codes.append(attempt(kind, folder, **kw))
    if codes[-1] != 0: raise RuntimeError(f'{folder}: exit {codes}\n' + (folder/'out.txt').read_text()[-3000:])
    return dict(codes=codes, stops=list(map(str, stops)), outcome=json.loads((folder/'outcome.json').read_text()))

def main(out, n_events, n_times, long):
    rng,res = random.Random(int(long)),{}
    for kind in ('two_stage', 'finetune', 'fastai'):
        t = time.time()
        ref = until_the_end(kind, out/f'{kind}_whole', [])
        res[kind] = dict(whole=ref['outcome'], runs=[])
        span = time.time() - t
        def case(name, stops, **kw): res[kind]['runs'].append(dict(name=name, **until_the_end(kind, out/f'{kind}_{name}', stops, **kw)))
        share = {'two_stage': 1, 'finetune': .5, 'fastai': .25}[kind]
        total = ref['outcome']['events']
        for i in range(max(round(n_events*share), 1)): case(f'event{i}', [('event', rng.randrange(5, total)) for _ in range(2)])
        for i in range(max(round(n_times*share), 1)): case(f'time{i}', [('time', rng.random()*span, signal.SIGKILL, False) for _ in range(2)])
        if kind != 'two_stage': continue
        for what in ('write', 'rename', 'renamed', 'delete'): case(what, [(what, 3) + (2000,)*(what == 'write'), (what, 2) + (40000,)*(what == 'write')])
        case('workers', [('time', .7*span, signal.SIGKILL, False), ('event', 90)], num_workers=2)
    (out/'results.json').write_text(json.dumps(res))

if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
    main(out, int(sys.argv[2]), int(sys.argv[3]), len(sys.argv) > 4)
