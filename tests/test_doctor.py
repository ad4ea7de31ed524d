"The doctor, preparing a data set and frames kept on disk: real and damaged files, kills, full disks, bad input."
import os, shutil, signal, subprocess, sys, time, uuid, warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from conftest import noise_video
from tsd import doctor as doc
from tsd.data import ClipNormalize, VideoDataLoaders
from tsd.doctor import doctor, prepare_data, psnr, reencode, watched
from tsd.evaluate import test_views as run_test_views
from tsd.frames import FrameCache
from tsd.video import VideoError, check, decode, encode, probe

SMALL = dict(frames=4, stride=2, size=32, bs=4, num_workers=0)
pytestmark = pytest.mark.usefixtures('one_thread')

def smooth(seed, n=20, h=48, w=64):
    "Frames (n,h,w,3) of smooth texture; the left half of frame i has grey level 8 i"
    x = torch.rand(1, 3, h//16+1, w//16+1, generator=torch.Generator().manual_seed(seed))
    v = nn.functional.interpolate(x, size=(h, w), mode='bilinear')[0].permute(1,2,0).mul(255).byte().repeat(n, 1, 1, 1)
    v[:,:,:w//2] = (8*torch.arange(n))[:,None,None,None].byte()
    return v

def number(v): return (v[:,:,:v.shape[2]//2-4].float().mean((1,2,3))/8).round().int().tolist()

def table(root, n=8, name='clips.csv', **columns):
    "n clips of two classes, the last quarter for testing, in a CSV file with a column that nobody asks for"
    for i in range(n): encode(root/f'{i}.mp4', smooth(i))
    df = pd.DataFrame(dict(path=[f'{i}.mp4' for i in range(n)], label=[*'ab']*(n//2), split=['train']*(n-n//4)+['test']*(n//4), note=[f'{i:03}, "x"' for i in range(n)]))
    df.assign(**columns).to_csv(root/name, index=False)
    return root/name

@pytest.fixture
def clips(tmp_path):
    (tmp_path/'clips').mkdir()
    return table(tmp_path/'clips')

@pytest.fixture
def tiny_disk(tmp_path):
    "A folder with room for 200 kB"
    (tmp_path/'disk').mkdir()
    if shutil.which('mount') is None or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'none', tmp_path/'disk'], capture_output=True).returncode: pytest.skip('a small disk needs the right to mount one')
    yield tmp_path/'disk'
    subprocess.run(['umount', '-l', tmp_path/'disk'], check=True)

def contents(root): return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}

def wait_for(done, seconds=60):
    for _ in range(int(seconds/.02)):
        if done(): return
        time.sleep(.02)
    raise AssertionError(f'not within {seconds} s')

# --- doctor

def test_real_odd_files(shared, tmp_path):
    odd = pd.read_csv(shared/'clips/odd/clips.csv', keep_default_na=False)
    pd.DataFrame(dict(path=[str((shared/'clips/odd').resolve()/f) for f in odd.file], label=['a','b']*9+['a'])).to_csv(tmp_path/'odd.csv', index=False)
    report = doctor(tmp_path/'odd.csv', tmp_path/'report.csv', workers=2)
    want = dict(partial='damaged', no_video='unreadable', undecodable='unreadable', open_failed='unreadable')
    want = {str((shared/'clips/odd').resolve()/r.file): 'empty' if (shared/'clips/odd'/r.file).stat().st_size == 0 else want[r.decode_status] for r in odd.itertuples() if r.decode_status != 'ok'}
    errors = report[report.severity=='error']
    assert dict(zip(errors.path, errors.problem)) == want and len(errors) == len(want)
    short = {str((shared/'clips/odd').resolve()/r.file) for r in odd.itertuples() if r.decode_status == 'ok' and int(r.n_frames) < 61}
    assert set(report[report.problem=='short'].path) == short

def test_real_clips_are_clean(shared, tmp_path):
    df = pd.read_csv(shared/'clips/ucf5/clips.csv')[::16]
    df.assign(path=[str((shared/'clips/ucf5').resolve()/p) for p in df.path]).to_csv(tmp_path/'few.csv', index=False)
    report = doctor(tmp_path/'few.csv', tmp_path/'report.csv')
    assert not (report.severity=='error').any(), report
    assert len(report) == (df.frames < 61).sum()

def test_truncation_at_any_place_is_found(clips, tmp_path):
    "In the pictures, or in the table of frames which this writer puts last; behind it are but remarks"
    whole = (clips.parent/'0.mp4').read_bytes()
    names = []
    for i,cut in enumerate(np.linspace(.05, .9, 8)):
        names.append(f'cut{i}.mp4'); (clips.parent/names[-1]).write_bytes(whole[:int(len(whole)*cut)])
    pd.DataFrame(dict(path=names, label=[*'ab']*4)).to_csv(clips.parent/'cut.csv', index=False)
    for quick in True,False: assert set(doctor(clips.parent/'cut.csv', tmp_path/'r.csv', quick=quick, frames=2).path) == set(names)

def test_stopped_it_goes_on(clips, tmp_path, monkeypatch):
    add,written = doc.Ledger.add,[]
    def stop_after_three(self, **row):
        if len(written) == 3: raise KeyboardInterrupt
        written.append(row['path']); add(self, **row)
    monkeypatch.setattr(doc.Ledger, 'add', stop_after_three)
    with pytest.raises(KeyboardInterrupt): doctor(clips, tmp_path/'r.csv')
    assert not (tmp_path/'r.csv').exists()
    monkeypatch.setattr(doc.Ledger, 'add', lambda self, **row: (written.append(row['path']), add(self, **row)))
    assert len(doctor(clips, tmp_path/'r.csv', frames=4)) == 0
    assert len(written) == 8 == len(set(written))                 # each file once

def test_a_long_look_counts_as_a_quick_one_not_the_reverse(clips, tmp_path):
    book = tmp_path/'r.checked.csv'
    rows = lambda **kw: (doctor(clips, tmp_path/'r.csv', **kw), len(book.read_text().splitlines())-1)[1]
    assert [rows(quick=True), rows(quick=True), rows(), rows(quick=True), rows()] == [8, 8, 16, 16, 16]

def test_columns_of_other_names(clips, tmp_path):
    pd.read_csv(clips).rename(columns=dict(path='file', label='class', split='part', note='source')).assign(source=['s']*8).to_csv(clips.parent/'other.csv', index=False)
    report = doctor(clips.parent/'other.csv', tmp_path/'r.csv', frames=4, path_col='file', label_col='class', split_col='part', group_col='source')
    assert report[['problem','severity']].values.tolist() == [['group','error']] and "'s'" in report.detail[0]

# --- training and testing with a report

def test_training_skips_and_testing_counts(clips, tmp_path):
    for i in 1,7: (clips.parent/f'{i}.mp4').write_bytes(b'damaged')
    doctor(clips, tmp_path/'r.csv', frames=4)
    with pytest.warns(UserWarning, match=r'1 of 6 training clips \(16.7%\) are left out'): dls = VideoDataLoaders.from_csv(clips, skip=tmp_path/'r.csv', **SMALL)
    assert [o.path.name for o in dls.train_ds.items] == [f'{i}.mp4' for i in (0,2,3,4,5)] and len(list(dls.train)) == 1
    net = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2))
    ds = dls.valid_ds
    res = run_test_views(net, ds.items, 2, 1, ds.sampling, list(ds.vocab), dls.norm, strict=False, progress=False)
    assert (res['expected'], res['evaluated'], [Path(p).name for p,_ in res['unreadable']]) == (2, 1, ['7.mp4'])
    with pytest.raises(VideoError, match='7.mp4'): run_test_views(net, ds.items, 2, 1, ds.sampling, list(ds.vocab), dls.norm, progress=False)

def test_a_missing_video_that_is_listed_may_be_missing(clips, tmp_path):
    (clips.parent/'1.mp4').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 8 videos'): VideoDataLoaders.from_csv(clips, **SMALL)
    assert doctor(clips, tmp_path/'r.csv', frames=4).problem.tolist() == ['missing']
    with pytest.warns(UserWarning, match='1 of 6 training clips'): assert len(VideoDataLoaders.from_csv(clips, skip=tmp_path/'r.csv', **SMALL).train_ds) == 5

def test_a_report_of_other_clips_leaves_nothing_out(clips, tmp_path):
    (tmp_path/'r.csv').write_text('path,problem,detail,severity\nelsewhere.mp4,damaged,,error\n')
    with pytest.warns(UserWarning, match='0 of 6 training clips'): assert len(VideoDataLoaders.from_csv(clips, skip=tmp_path/'r.csv', **SMALL).train_ds) == 6
    (tmp_path/'empty.csv').touch()
    with pytest.raises(ValueError, match='empty.csv: not a report'): VideoDataLoaders.from_csv(clips, skip=tmp_path/'empty.csv', **SMALL)

# --- prepare_data

def test_real_odd_files_are_prepared(shared, tmp_path):
    odd = shared/'clips/odd'
    df = pd.read_csv(odd/'clips.csv', keep_default_na=False)
    df.assign(file=[str(odd.resolve()/f) for f in df.file]).to_csv(tmp_path/'odd.csv', index=False)
    before = {p: p.stat().st_mtime_ns for p in odd.iterdir()}
    bad = prepare_data(tmp_path/'odd.csv', tmp_path/'new', short_side=100, path_col='file', workers=2)
    ok = df.decode_status == 'ok'
    assert len(bad) == (~ok).sum() and {Path(p).stem for p in bad.path} == {Path(f).stem for f in df.file[~ok]}
    new = pd.read_csv(tmp_path/'new'/'odd.csv', keep_default_na=False)
    assert len(new) == len(df) and new.drop(columns='file').equals(pd.read_csv(tmp_path/'odd.csv', keep_default_na=False).drop(columns='file'))
    for old,name,n in zip(df.file[ok], new.file[ok], df.n_frames[ok]):
        a,b = probe(odd/old),probe(tmp_path/'new'/name)
        assert b.frames == int(n) == check(tmp_path/'new'/name).frames and check(tmp_path/'new'/name).ok and b.codec == 'h264' and not b.rotation
        assert not b.height%2 and not b.width%2 and min(b.height, b.width) <= max(100, 2) and b.keyframes >= b.frames/12
        assert abs(b.width/b.height/(a.width/a.height) - 1) < .03 and abs(b.fps/a.fps - 1) < .01
        with av.open(str(tmp_path/'new'/name)) as box: assert not box.streams.audio
        i = [0, b.frames//2, b.frames-1]
        was = decode(odd/old, i).permute(0,3,1,2)
        now = decode(tmp_path/'new'/name, i)
        was = nn.functional.interpolate(was.float(), now.shape[1:3], mode='bilinear', antialias=True).round().byte().permute(0,2,3,1)
        assert psnr(was, now) > 22, name                         # upright, in order, in the right colours
    assert {p: p.stat().st_mtime_ns for p in odd.iterdir()} == before

def test_sound_is_dropped_and_uneven_time_stamps_keep_every_frame(tmp_path):
    video,at = smooth(0, 24, 63, 81)[:, :62, :80],np.cumsum([1,7,1,1,3,1]*4)
    with av.open(str(tmp_path/'a.mkv'), 'w') as box:
        stream,sound = box.add_stream('libx264', rate=30, options=dict(crf='10')),box.add_stream('aac', rate=8000)
        stream.width,stream.height,stream.pix_fmt,stream.codec_context.time_base = 80,62,'yuv420p',Fraction(1, 100)
        for f,t in zip(video.numpy(), at):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format='rgb24'); frame.pts,frame.time_base = int(t),Fraction(1, 100)
            box.mux(stream.encode(frame))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format='fltp', layout='mono'); noise.sample_rate = 8000
        box.mux(sound.encode(noise)); box.mux(sound.encode()); box.mux(stream.encode())
    with av.open(str(tmp_path/'a.mkv')) as box: assert box.streams.audio
    a = probe(tmp_path/'a.mkv')
    res = reencode((tmp_path/'a.mkv', tmp_path/'b.mp4'), 40)
    assert (res["frames"], res["height"], res["width"], a.frames) == (24, 40, 52, 24)
    assert number(decode(tmp_path/'b.mp4', range(24))) == list(range(24)) == number(decode(tmp_path/'a.mkv', range(24)))
    assert probe(tmp_path/'b.mp4').fps == pytest.approx(a.fps, rel=.01)
    with av.open(str(tmp_path/'b.mp4')) as box: assert not box.streams.audio

@pytest.mark.parametrize('harm, said', [(lambda fs: fs[:-1], 'came out'), (lambda fs: fs[::-1], 'differs too much'), (lambda fs: [255-f for f in fs], 'differs too much'), (lambda fs: fs[:1]+fs, 'came out')])
def test_verification_finds(tmp_path, monkeypatch, harm, said):
    encode(tmp_path/'a.mp4', smooth(1))
    write = doc._write
    monkeypatch.setattr(doc, '_write', lambda path, frames, *args: write(path, harm(list(frames)), *args))
    with pytest.raises(VideoError, match=said): reencode((tmp_path/'a.mp4', tmp_path/'b.mp4'), 32)
    assert not (tmp_path/'b.mp4').exists()

def test_killed_it_goes_on(tmp_path):
    "SIGKILL in the middle: nothing half under a final name, processes go, the next call does the rest and only that"
    (tmp_path/'clips').mkdir(); csv,out = table(tmp_path/'clips', 24),tmp_path/'new'
    for i in range(24): encode(csv.parent/f'{i}.mp4', smooth(i, 60, 96, 128))
    mark = uuid.uuid4().hex
    (tmp_path/'script.py').write_text(f'open("started", "a").write("once ")\nfrom tsd.doctor import prepare_data\nprepare_data({str(csv)!r}, {str(out)!r}, short_side=64, workers=2)\n')
    p = subprocess.Popen([sys.executable, 'script.py'], cwd=tmp_path, env={**os.environ, 'TSD_MARK': mark}, start_new_session=True)
    wait_for(lambda: len(list(out.glob('*.mp4'))) >= 4, 300)
    p.kill(); p.wait()
    assert (tmp_path/'started').read_text() == 'once '                                     # a script without a main guard is not run again by its processes
    whole = {p.name for p in out.glob('*.mp4')}
    assert 4 <= len(whole) < 24 and not (out/'clips.csv').exists()
    for k in whole: assert check(out/k).ok and probe(out/k).frames == 60
    made = {k: (out/k).stat().st_mtime_ns for k in whole}
    assert len(prepare_data(csv, out, short_side=64, workers=2)) == 0                       # at once: the lock went with the process
    assert {k: (out/k).stat().st_mtime_ns for k in whole} == made
    assert {p.name for p in out.iterdir()} == {f'{i}.mp4' for i in range(24)} | {'clips.csv','clips_prepared.csv','clips_problems.csv'}
    if Path('/proc/self/environ').exists():
        def gone(): return not [q for q in Path('/proc').glob('[0-9]*/environ') if mark.encode() in _read(q)]
        wait_for(gone)

def _read(path):
    try: return path.read_bytes()
    except OSError: return b''

def test_a_full_disk_stops_it_and_it_goes_on(clips, tiny_disk, tmp_path):
    for i in range(8): noise_video(clips.parent/f'{i}.mp4', 20, 64, 64, i)
    with pytest.raises(OSError, match='No space left'): prepare_data(clips, tiny_disk/'new', min_psnr=0, workers=1)
    made = sorted((tiny_disk/'new').glob('*.mp4'))
    assert made and all(check(p).ok for p in made) and not (tiny_disk/'new'/'clips.csv').exists() and not list((tiny_disk/'new').glob('*.part'))
    subprocess.run(['mount', '-o', 'remount,size=20m', tiny_disk], check=True)
    assert len(prepare_data(clips, tiny_disk/'new', min_psnr=0, workers=1)) == 0 and len(list((tiny_disk/'new').glob('*.mp4'))) == 8

def test_late_and_crashed_files_are_reported(clips, tmp_path, monkeypatch):
    bad = prepare_data(clips, tmp_path/'new', short_side=32, seconds=1e-6, workers=1)
    assert bad.problem.tolist() == ['timeout']*8 and not list((tmp_path/'new').glob('*.mp4')) and not list((tmp_path/'new').glob('*.part'))
    assert len(pd.read_csv(tmp_path/'new'/'clips.csv')) == 8
    real = watched
    monkeypatch.setattr(doc, 'watched', lambda f, items, *a: ((x, ChildProcessError('its process died')) if '3.mp4' in x[0] else (x, f(x)) for x in items))
    assert prepare_data(clips, tmp_path/'new', short_side=32).values.tolist()[0][:2] == ['3.mp4', 'crash']

# --- frames on disk

@pytest.mark.parametrize('workers', [0, 2])
def test_frames_on_disk_change_nothing(clips, tmp_path, workers):
    a = VideoDataLoaders.from_csv(clips, **SMALL, seed=3)
    b = VideoDataLoaders.from_csv(clips, **{**SMALL, 'num_workers':workers}, seed=3, cache=tmp_path/'frames')
    for _ in range(2):
        for x,y in zip(a.train, b.train): assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    for x,y in zip(a.valid, b.valid): assert torch.equal(x[0], y[0])
    net = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2))
    views = [run_test_views(net, d.valid_ds.items, 2, 3, d.valid_ds.sampling, ['a','b'], d.norm, progress=False, cache=d.valid_ds.cache)['table'] for d in (a,b)]
    assert views[0].equals(views[1])
    one = a.test_dl(a.valid_ds.items[:1]).one_batch()[0]
    assert torch.equal(one, b.test_dl(b.valid_ds.items[:1], num_workers=0).one_batch()[0])

def test_frames_on_disk_are_used_and_never_stale(clips, tmp_path, monkeypatch):
    dls = VideoDataLoaders.from_csv(clips, **SMALL, augment=None, cache=tmp_path/'frames')
    monkeypatch.setattr('tsd.data.decode', lambda *a: pytest.fail('decoded'))
    before = dls.train_ds[0][0]
    monkeypatch.undo()
    encode(clips.parent/'0.mp4', 255-smooth(0))                   # as many frames, other pixels
    assert not torch.equal(before, dls.train_ds[0][0])
    assert torch.equal(dls.train_ds[0][0], VideoDataLoaders.from_csv(clips, **SMALL, augment=None).train_ds[0][0])

def test_frames_that_do_not_fit_are_refused_before_decoding(clips, tmp_path, monkeypatch):
    monkeypatch.setattr('tsd.frames.decode', lambda *a: pytest.fail('decoded'))
    with pytest.raises(MemoryError, match='8 more videos take .* cache_gb is 0.0001'): VideoDataLoaders.from_csv(clips, **SMALL, cache=tmp_path/'frames', cache_gb=.0001)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match='1e-06 GB are free: choose another disk'): VideoDataLoaders.from_csv(clips, **SMALL, cache=tmp_path/'frames')
    with pytest.raises(OSError, match='clips.csv.* cannot be a folder'): VideoDataLoaders.from_csv(clips, **SMALL, cache=clips)

def test_a_disk_that_fills_up_leaves_nothing_half(clips, tiny_disk, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 10**12))     # another process takes the room
    with pytest.raises(OSError, match='cannot be written'): VideoDataLoaders.from_csv(clips, **SMALL, cache=tiny_disk/'frames')
    cache = FrameCache(tiny_disk/'frames', round(32*8/7))
    assert not list(cache.folder.glob('*.part')) and 0 < len(list(cache.folder.iterdir())) < 8
    for i in range(8):
        kept,path = cache.get(clips.parent/f'{i}.mp4'),clips.parent/f'{i}.mp4'
        assert kept is None or torch.equal(kept, decode(path, range(20), short_side=cache.short_side))

def test_a_kill_while_frames_are_written(clips, tmp_path):
    "Killed when all is written but not yet renamed: no entry, and the next fill makes it"
    video = clips.parent/'0.mp4'
    code = f'import os, signal\nfrom tsd.frames import FrameCache\nos.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nFrameCache("frames", 32).add({str(video)!r})'
    assert subprocess.run([sys.executable, '-c', code], cwd=tmp_path, timeout=300).returncode == -signal.SIGKILL
    cache = FrameCache(tmp_path/'frames', 32)
    part, = cache.folder.iterdir()
    assert part.suffix == '.part' and cache.get(video) is None
    os.utime(part, (0, 0))
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(2) as pool: cache.fill([probe(video)], 1, pool)
    assert torch.equal(cache.get(video), decode(video, range(20), short_side=32)) and len(list(cache.folder.iterdir())) == 1

def test_several_fill_one_folder(clips, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    infos = [probe(clips.parent/f'{i}.mp4') for i in range(8)]
    def fill(_):
        with ThreadPoolExecutor(2) as pool: return FrameCache(tmp_path/'frames', 32).fill(infos, 1, pool)
    with ThreadPoolExecutor(3) as three: list(three.map(fill, range(3)))
    cache = FrameCache(tmp_path/'frames', 32)
    for o in infos: assert torch.equal(cache.get(o.path), decode(o.path, range(20), short_side=32))
    assert len(list(cache.folder.iterdir())) == 8

# --- bad input on the command line

@pytest.fixture
def tsd(clips, monkeypatch, capsys):
    from tsd.cli import main
    monkeypatch.chdir(clips.parent)
    def run(*words):
        capsys.readouterr()
        return main(map(str, words)), *capsys.readouterr()
    return run

@pytest.mark.parametrize('words, said', [
    ('doctor absent.csv', 'absent.csv: no such file'), ('doctor empty.csv', 'empty.csv: holds no clips'), ('doctor clips.csv --path-col file', "no column 'file'"), ('doctor clips.csv --label-col class', "no column 'class'"),
    ('doctor clips.csv --out 0.mp4/r.csv', '0.mp4/r.checked.csv: cannot be written'), ('doctor clips.csv --out clips.csv', 'is the table of clips itself'), ('doctor clips.csv --out .', 'is a folder'),
    ('doctor clips.csv --frames 0', 'frames is 0'), ('doctor clips.csv --workers 0', 'workers is 0'), ('doctor clips.csv --seconds 0', 'limit is 0'), ('doctor clips.csv --imbalance 0', 'imbalance is 0'),
    ('prepare-data absent.csv new', 'absent.csv: no such file'), ('prepare-data clips.csv new --path-col file', "no column 'file'"), ('prepare-data clips.csv 0.mp4', '0.mp4'), ('prepare-data clips.csv 0.mp4/new', '0.mp4/new'),
    ('prepare-data clips.csv .', 'is the folder of the originals'), ('prepare-data clips.csv ../clips', 'is the folder of the originals'), ('prepare-data clips.csv new --short-side 0', 'short_side is 0'),
    ('prepare-data clips.csv new --gop 0', 'gop is 0'), ('prepare-data clips.csv new --crf 60', 'crf is 60'), ('prepare-data clips.csv new --workers 0', 'workers is 0'), ('prepare-data clips.csv new --seconds -1', 'limit is -1'),
    ('bench dta', "no benchmark 'dta'"), ('bench data --repeats 0', 'repeats = 0'), ('bench data --out 0.mp4/x.csv', '0.mp4'), ('bench data --out .', "'.'")])
def test_bad_input_is_one_clear_line(tsd, clips, words, said):
    (clips.parent/'empty.csv').write_text('path,label\n')
    before = contents(clips.parent)
    code,out,err = tsd(*words.split())
    assert code == 1 and said in err and 'Traceback' not in err and err.count('\n') == 1, err
    assert {k:v for k,v in contents(clips.parent).items() if k in before} == before

def test_exit_status(tsd, clips):
    assert tsd('doctor', 'clips.csv', '--frames', 4)[:2] == (0, 'nothing found\n')
    code,out,_ = tsd('doctor', 'clips.csv')                       # short clips are a warning, no error
    assert code == 0 and out.splitlines() == ['warning  short      8', '8 findings are in runs/doctor_clips.csv']
    Path('3.mp4').write_bytes(b'damaged')
    assert tsd('doctor', 'clips.csv', '--quick')[0] == 1
    code,out,_ = tsd('prepare-data', 'clips.csv', 'new', '--short-side', 32)
    assert code == 1 and '1 of its videos could not be made' in out
    encode('3.mp4', smooth(3))
    assert tsd('prepare-data', 'clips.csv', 'new', '--short-side', 32)[0] == 0
    assert tsd('doctor', 'new/clips.csv', '--frames', 4)[0] == 0
