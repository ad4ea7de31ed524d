"""Runs that are killed, in children of one process that has imported everything: `python resume_worker.py FOLDER N SEED` writes FOLDER/results.json.

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
from fastai.metrics import accuracy
from fastai.losses import CrossEntropyLossFlat
import fastai.callback.schedule   # Learner.fit_one_cycle
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

class SlowValidation(Callback):
    "Tell the parent that validation has begun, and wait for its signal"
    order = -50
    def __init__(self, pipe): self.pipe = pipe
    def before_validate(self): os.write(self.pipe, b'.'); time.sleep(.2)

class KillAtSwitch(Callback):
    "SIGKILL on this or that side of the change from stage 1 to stage 2, or in the midst of it"
    order = 99
    def __init__(self, where): self.where = where
    def at(self, where):
        if where == self.where and self.learn.train_iter == 8: os.kill(os.getpid(), signal.SIGKILL)
    def after_batch(self): self.training and self.at('last batch')
    def before_validate(self): self.at('last validation')
    def before_epoch(self): self.at('new head')
    def before_batch(self): self.training and self.at('first batch')
    def before_fit(self):
        real = self.learn.two_stage.drop_head
        def drop_head(): real(); self.at('old head gone')
        self.learn.two_stage.drop_head = drop_head

def train(kind, folder, cbs, lr=1e-3, num_workers=0, loaders_kw={}, resume='auto', steps=2, epochs=None, logging=None):
    "One process's share of a run; the Learner, if it comes to the end"
    e = epochs or EPOCHS[kind]
    again = ExactResume(folder/'states', resume=resume, steps=steps)
    dls = loaders(num_workers, **{**dict(augment='finetune' if kind == 'finetune' else 'distill', n=18 if kind == 'finetune' else 16), **loaders_kw})
    set_seed(0)
    if kind == 'fastai':                                  # any Learner, with fastai's own optimizer, schedule and callbacks
        net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d((1,4,4)), torch.nn.Flatten(), torch.nn.Dropout(.5), torch.nn.Linear(48, 2))
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    else:
        cnn = Teacher(timm.create_model('test_resnet', num_classes=2, output_stride=8))
        vit = Teacher(VideoMAEViT(**TINY, img_size=16, num_frames=4, depth=1, num_classes=2))
        learn = two_stage_learner(dls, 'tsd_vit_tiny_patch16_224', cnn, vit, drop_path_rate=.2, depth=2, **TINY)
        if kind == 'finetune': learn = finetune_learner(dls, learn.student, drop_path=.3)
    history = dict(history=folder/'history.csv', cbs=[*cbs, again])
    with learn.no_bar(), learn.no_logging():
        if kind == 'two_stage': learn.fit_two_stage(e//2, e-e//2, lr=lr, **history)
        elif kind == 'finetune': learn.fit_finetune(e, lr=lr, **{**history, 'cbs': [EMA(.9), Accumulate(2), GradientClip(1.), FiniteLoss(), Precision('bf16'), *history['cbs']]})
        else:
            learn.tracker = EarlyStoppingCallback('accuracy', patience=9)
            learn.fit_one_cycle(e, lr, cbs=[learn.tracker, *history['cbs']])
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
    if 'tracker' in vars(learn): res['best'] = [float(learn.tracker.best), learn.tracker.wait]
    if hasattr(learn, 'history') and isinstance(learn.history, pd.DataFrame):
        keep = lambda df: df[~df.metric.isin(['clips_per_second','data_wait'])].to_csv(index=False)
        speeds = (learn.history.metric == 'clips_per_second').sum()
        res |= dict(history=keep(learn.history), file=keep(pd.read_csv(folder/'history.csv')), speeds=int(speeds))
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

    stop: None, ('event', n), ('switch', where), ('time', seconds, signal, whole group), ('validation', signal), ('space', bytes), or of the n-th save
    ('write', n, bytes), ('rename', n), ('renamed', n), ('delete', n)"""
    folder.mkdir(parents=True, exist_ok=True)
    what = stop[0] if stop else None
    def go(pipe):
        out = open(folder/'out.txt', 'a'); os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
        if what in ('write', 'rename', 'renamed', 'delete'): trap(*stop)
        if what == 'space': resource.setrlimit(resource.RLIMIT_FSIZE, (stop[1], stop[1]))
        count = KillAt(stop[1] if what == 'event' else 0)
        cbs = dict(time=[Timed(pipe)], validation=[SlowValidation(pipe)], switch=[KillAtSwitch(*stop[1:])] if what == 'switch' else []).get(what, [])
        learn = train(kind, folder, [count, *cbs], **kw)
        (folder/'outcome.json').write_text(json.dumps(outcome(learn, folder) | dict(events=count.seen, reads=Clips.reads)))
    pid,pipe = child(go)
    if what in ('time', 'validation'):
        os.read(pipe, 1)
        if what == 'time': time.sleep(stop[1])
        with contextlib.suppress(ProcessLookupError): (os.killpg if what == 'time' and stop[3] else os.kill)(pid, stop[2 if what == 'time' else 1])
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
        def opened(path, mode):
            f = open(path, mode)
            calls[0] += mode == 'wb'
            if calls[0] < n: return f
            class Half:
                def write(self, data): f.write(data[:size]); f.flush(); die()
                def __enter__(self): return self
                def __exit__(self, *_): pass
            return Half()
        resume.open = opened
    elif what in ('rename', 'renamed'): resume.os = type('os', (), {**vars(os), 'replace': staticmethod(counted(os.replace, what == 'rename'))})
    else: Path.unlink = counted(Path.unlink, True)

def until_the_end(kind, folder, stops, between=None, **kw):
    "Stop a run at each of `stops` in turn, if it comes there, then let it end: exit codes, what was said, the outcome, how many clips the last process had to read"
    codes = []
    for s in [*stops, None]:
        if s is None and between: between(folder)
        states = [kw['resume']] if 'resume' in kw else [p for p in list_states(folder/'states') if hashlib.sha256(p.read_bytes()).hexdigest()[:16] == p.stem[-16:]]
        epoch,batch = map(int, states[0].stem.split('-')[1:3]) if states else (0, 0)
        codes.append(attempt(kind, folder, s, **kw))
        if codes[-1] == 0: break
    said = (folder/'out.txt').read_text()
    if codes[-1] != 0: raise RuntimeError(f'{folder}: exit {codes}\n{said[-3000:]}')
    dls = loaders(n=18 if kind == 'finetune' else 16)
    left = EPOCHS[kind] - epoch
    return dict(name=folder.name, codes=codes, said=said, outcome=json.loads((folder/'outcome.json').read_text()), clips=left*(len(dls.train_ds) + len(dls.valid_ds)) - min(batch*4, len(dls.train_ds)),
                files=sorted(p.name for p in (folder/'states').iterdir()))

def refused(folder, **kw):
    "What a run says that finds the checkpoints of another, and its exit status"
    (folder/'out.txt').write_text('')
    code = attempt('two_stage', folder, **kw)
    return dict(code=code, said=(folder/'out.txt').read_text())

def damage(folder):
    "One bit of the newest checkpoint"
    path = list_states(folder/'states')[0]
    raw = bytearray(path.read_bytes()); raw[len(raw)//2] ^= 1; path.write_bytes(raw)

def main(out, n, seed):
    "`n` runs that are killed at random events, and as many at random times; of other kinds of runs a part of that"
    rng,res = random.Random(seed),{}
    kill,term = signal.SIGKILL,signal.SIGTERM
    for kind,share in (('two_stage', 1), ('finetune', .5), ('fastai', .25)):
        start = time.time()
        whole = until_the_end(kind, out/kind, [])
        span,events = time.time() - start,whole['outcome']['events']
        runs = []
        def case(name, *stops, **kw): runs.append(until_the_end(kind, out/f'{kind} {name}', stops, **kw))
        for i in range(max(round(n*share), 1)):
            case(f'events {i}', *[('event', rng.randrange(5, events)) for _ in range(2)])
            case(f'times {i}', *[('time', rng.random()*span, kill, False) for _ in range(2)])
        res[kind] = dict(whole=whole, runs=runs)
        if kind == 'fastai': continue
        case('workers', ('event', rng.randrange(events//3, events)), ('time', .5*span, term, True), num_workers=2)   # SIGTERM to the loader's processes too
        if kind == 'finetune': continue
        for where in ('last batch', 'last validation', 'old head gone', 'new head', 'first batch'): case(where, ('switch', where))
        for what,*args in (('write', 2000), ('write', 40000), ('rename',), ('renamed',), ('delete',)): case(f'{what} {args}', (what, 4, *args), (what, 2, *args))
        case('damaged', ('event', events//2), between=damage)
        case('sigterm', ('time', .3*span, term, False), ('validation', term))
        case('space', ('event', events//3), ('space', 100_000))
        run = out/'two_stage'
        res['finished'] = until_the_end(kind, run, [])
        best = list_states(out/'two_stage space'/'states')[-1]
        (out/'elsewhere').mkdir(); moved = best.rename(out/'elsewhere'/best.name)
        res['path'] = until_the_end(kind, out/'two_stage path', [], resume=moved)
        res['refused'] = {str(k): refused(run, **k) for k in (dict(lr=2e-3), dict(epochs=6), dict(loaders_kw=dict(bs=8)), dict(loaders_kw=dict(seed=1)), dict(loaders_kw=dict(n=20)),
                                                              dict(loaders_kw=dict(augment='finetune')), dict(resume=None))}
        for p in list_states(run/'states'): p.write_bytes(p.read_bytes()[:-9])
        res['refused']['all damaged'] = refused(run)
    (out/'results.json').write_text(json.dumps(res))

if __name__ == '__main__':
    torch.set_num_threads(1)
    out = Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
    main(out, int(sys.argv[2]), int(sys.argv[3]))
