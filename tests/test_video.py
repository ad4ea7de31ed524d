"Awkward, damaged and generated files; both backends; worker processes."
import csv, gc, os, pickle, signal, struct, sys, time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tsd import video
from fastai.data.transforms import CategoryMap
from tsd.data import Sampling, VideoDataset, VideoItem
from tsd.video import VideoError, check, decode, encode, probe

BACKENDS = ['pyav'] + (['decord'] if video.decord else [])

def picture(rng, n=12, h=64, w=96):
    "Textured frames, each with its number as grey level in the left half"
    v = rng.integers(0, 256, (n,h,w,3), dtype=np.uint8)
    v[:,:,:w//2] = (16*np.arange(n, dtype=np.uint8))[:,None,None,None]
    return v

def number(v): return (v[:,:,:v.shape[2]//2-4].float().mean((1,2,3))/16).round().int().tolist()

@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp('video')/'clip.mp4'
    encode(path, picture(np.random.default_rng(0)), gop=5)
    return path

def frames_by_hand(path):
    "Every frame, upright, by nothing but PyAV"
    with av.open(str(path)) as box:
        return np.stack([np.rot90(f.to_ndarray(format='rgb24'), round(f.rotation/90)) for f in box.decode(video=0)])

# --- the awkward files, each with what its table says

def odd_rows(shared):
    with open(shared/'clips/odd/clips.csv', newline='') as f: return list(csv.DictReader(f))

def test_odd_files_end_in_frames_or_a_named_error(shared):
    rows = odd_rows(shared)
    assert len(rows) == 19
    for row in rows:
        path = shared/'clips/odd'/row['file']
        if row['decode_status'] in ('ok', 'partial'):
            info = probe(path)
            assert info.fps > 0 and info.duration == pytest.approx(info.frames/info.fps)
            assert tuple(decode(path, [0]).shape) == (1, info.height, info.width, 3)
        if row['decode_status'] == 'ok':
            assert info.frames == int(row['n_frames']), row
            assert decode(path, [info.frames-1, 0]).shape[0] == 2
            assert info.codec == row['codec']
            with pytest.raises(VideoError, match=f"{row['file']}: frame {info.frames} asked for"): decode(path, [info.frames])
        elif row['decode_status'] != 'partial':
            for f in (probe, lambda p: decode(p, [0])):
                with pytest.raises(VideoError) as e: f(path)
                assert str(e.value).startswith(f'{path}: ') and len(e.value.why) > 10

def test_odd_files_strict_check(shared):
    for row in odd_rows(shared):
        c = check(shared/'clips/odd'/row['file'])
        assert c.ok == (row['decode_status'] == 'ok'), (row, c)
        assert bool(c.reason) != c.ok
        assert c.frames == int(row['n_frames']), (row, c)
        if row['header_frames']: assert c.header_frames == int(row['header_frames']), (row, c)

def test_odd_files_every_backend_gives_the_frames_of_a_plain_scan(shared):
    refused = set()
    for row in odd_rows(shared):
        if row['decode_status'] != 'ok': continue
        path = shared/'clips/odd'/row['file']
        n, plain = int(row['n_frames']), frames_by_hand(path)
        idx = sorted({0, n//3, n//2, n-1}, reverse=True) + [0]
        for backend in ['auto'] + BACKENDS:
            try: v = decode(path, idx, backend)
            except VideoError:
                assert backend == 'decord'
                refused.add(row['file'])
            else: assert np.array_equal(v, plain[idx]), (row['file'], backend)
    if video.decord: assert refused == {'-video-with-dash-.mp4', 'discard_first_keyframe.mp4', 'h265_video.mp4', 'newtonscradle.gif', 'no_duration.webm',
                                        'testsrc2_mpeg4.mp4', 'testsrc2_odd_height_and_width_vp9.mp4', 'unordered.mov'}

def test_broken_in_the_middle(shared):
    path = shared/'clips/odd/corrupted.mp4'
    for backend in ('auto', 'pyav'): assert len(decode(path, [27,3], backend)) == 2 # decord's reading thread may run ahead into the fault
    with pytest.raises(VideoError, match='frame 30 asked for, 50 announced, but only 28 decode'): decode(path, [3,30])

def test_rates(shared):
    for name,fps in [('test.mp4',30), ('smth-smth-1.webm',12), ('no_duration.webm',15000/1001), ('h265_video.mp4',10), ('-video-with-dash-.mp4',1)]:
        assert probe(shared/'clips/odd'/name).fps == pytest.approx(fps, rel=1e-3)
    assert probe(shared/'clips/odd/newtonscradle.gif').duration == pytest.approx(.82, abs=.02) # frames at irregular times
    assert probe(shared/'clips/odd/test.mp4').duration == pytest.approx(10)

@pytest.mark.parametrize('step', [80, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_backends_agree_on_real_clips(shared, step, one_thread):
    if len(BACKENDS) < 2: pytest.skip('decord is not installed')
    rng, paths = np.random.default_rng(0), sorted((shared/'clips/ucf5').rglob('*.mp4'))[::step]
    assert len(paths) == -(-646//step)
    for path in paths:
        n = probe(path).frames
        for idx in (rng.integers(0, n, 8), range(n-61, n, 4) if n > 61 else [0]):
            for short in (None, 96): assert torch.equal(decode(path, idx, 'decord', short), decode(path, idx, 'pyav', short)), path

def test_no_warning_on_stderr(shared, capfd):
    for name in ('corrupted.mp4', 'zero_empty_stsc.mp4', 'no_duration.webm', 'result.webm'):
        try: decode(shared/'clips/odd'/name, [0, 40])
        except VideoError: pass
    assert capfd.readouterr().err == ''

# --- indices

@pytest.mark.parametrize('backend', ['auto'] + BACKENDS)
def test_any_order_and_repeats(clip, backend):
    for idx in ([11,0,5,5,4], np.array([3,3,3]), torch.tensor([9,1]), range(12), (7,)):
        v = decode(clip, idx, backend)
        assert v.dtype == torch.uint8 and v.is_contiguous()
        assert number(v) == [int(i) for i in idx]

def test_same_pixels_as_a_plain_scan(clip):
    for backend in BACKENDS: assert np.array_equal(decode(clip, range(12), backend), frames_by_hand(clip))

def test_short_side(clip):
    whole = video.resize_short(decode(clip, range(12)), 40) # frame by frame or all at once: the same
    for backend in BACKENDS: assert torch.equal(decode(clip, range(12), backend, 40), whole)
    for backend in BACKENDS: assert tuple(decode(clip, [2,1], backend, short_side=32).shape) == (2,32,48,3)
    assert torch.equal(decode(clip, [2], short_side=64), decode(clip, [2]))
    with pytest.raises(ValueError, match='short side is -1'): decode(clip, [0], short_side=-1)

@pytest.mark.parametrize('idx', [[], [[0]], [0.], ['0'], 3, [None], [True]])
def test_not_an_index(clip, idx):
    with pytest.raises(ValueError, match='whole numbers'): decode(clip, idx)

def test_out_of_range(clip):
    for i in (12, -1, 10**9):
        with pytest.raises(VideoError, match=f'clip.mp4: frame {i} asked for, but its 12 frames are 0 to 11'): decode(clip, [0,i])

def test_a_replaced_file_is_probed_again(tmp_path):
    path = tmp_path/'a.mp4'
    for n in (3, 5):
        encode(path, picture(np.random.default_rng(0), n))
        assert probe(path).frames == n

# --- files that are no videos

def sound(path, cover=False):
    with av.open(str(path), 'w') as box:
        s = box.add_stream('aac' if path.suffix == '.mp4' else 'libmp3lame', rate=44100)
        if cover:
            c = box.add_stream('mjpeg', rate=1)
            c.width, c.height, c.pix_fmt = 32, 32, 'yuvj420p'
            c.disposition = av.stream.Disposition.attached_pic.value
            for p in (*c.encode(av.VideoFrame.from_ndarray(np.zeros((32,32,3), np.uint8), format='rgb24')), *c.encode()): box.mux(p)
        f = av.AudioFrame.from_ndarray(np.zeros((1,44100), np.float32), format='fltp', layout='mono')
        f.rate = 44100
        for p in (*s.encode(f), *s.encode()): box.mux(p)

def no_decoder(path, clip):
    data = bytearray(clip.read_bytes())
    at = data.find(b'avc1', data.find(b'stsd'))
    data[at:at+4] = b'zzzz'
    path.write_bytes(data)

MAKE = dict(missing=lambda p,c: None, empty=lambda p,c: p.touch(), text=lambda p,c: p.write_text('hello\n'*500), folder=lambda p,c: p.mkdir(),
            sound=lambda p,c: sound(p), truncated=lambda p,c: p.write_bytes(c.read_bytes()[:300]), no_decoder=no_decoder)
WHY  = dict(missing='no such file', empty='is empty', text='cannot be read', folder='is not a file', sound='only sound', truncated='cannot be read', no_decoder='no decoder')

@pytest.mark.parametrize('what', MAKE)
def test_not_a_video(tmp_path, clip, what):
    path = tmp_path/f'{what} ü.mp4'
    MAKE[what](path, clip)
    for f in (probe, *[lambda p, b=b: decode(p, [0], b) for b in ['auto'] + BACKENDS]):
        with pytest.raises(VideoError, match=f'{what} ü.mp4: .*{WHY[what]}'): f(path)
    c = check(path)
    assert not c.ok and c.frames == 0 and WHY[what] in c.reason

def test_cover_art_is_no_video(tmp_path):
    sound(tmp_path/'song.mp3', cover=True)
    with av.open(str(tmp_path/'song.mp3')) as box: assert len(box.streams.video) == 1
    with pytest.raises(VideoError, match='only sound'): probe(tmp_path/'song.mp3')

@pytest.mark.skipif(sys.platform == 'win32', reason='POSIX permissions')
def test_no_permission(tmp_path, clip, monkeypatch):
    path = tmp_path/'locked.mp4'
    path.write_bytes(clip.read_bytes())
    path.chmod(0)
    try: path.read_bytes()
    except PermissionError:
        with pytest.raises(VideoError, match='locked.mp4: .*ermission'): probe(path)
    else: pytest.skip('this user may read everything')

@pytest.mark.parametrize('name', ['-dash.mp4', 'http:clip.mp4', 'a b%02d#?.mp4', 'clip.txt', 'ünï.mp4', "it's.mp4"])
def test_awkward_names(tmp_path, clip, name, monkeypatch):
    (tmp_path/name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    for backend in ['auto'] + BACKENDS: assert number(decode(name, [4,2], backend)) == [4,2]
    encode('-out.mp4', picture(np.random.default_rng(0), 2))
    assert probe('-out.mp4').frames == 2

@pytest.mark.parametrize('bframes', [0, 2])
@pytest.mark.parametrize('part', [.5, .8, .95])
def test_cut_off_download(tmp_path, part, bframes):
    "With the index in front, a file cut short still opens: only the frames which are there may be announced"
    whole, path = tmp_path/'whole.mp4', tmp_path/'part.mp4'
    written(whole, picture(np.random.default_rng(0)), g='4', bf=str(bframes), container=dict(movflags='faststart'))
    plain = frames_by_hand(whole)
    path.write_bytes(whole.read_bytes()[:int(part*whole.stat().st_size)])
    info = probe(path)
    assert 0 < info.frames < 12 == info.header_frames and not check(path).ok
    for backend in ('auto', 'pyav'):
        v = decode(path, range(info.frames), backend)
        if not bframes: assert np.array_equal(v, plain[:info.frames])
    with pytest.raises(VideoError, match=f'its {info.frames} frames are'): decode(path, [11])

# --- kinds of video

def written(path, frames, codec='libx264', pix_fmt='yuv420p', times=None, **options):
    "`times`: of the frames, in 25ths of a second; None: 0,1,2,…"
    with av.open(str(path), 'w', container_options=options.pop('container', {})) as box:
        s = box.add_stream(codec, rate=25, options=options)
        s.height, s.width, s.pix_fmt = *frames.shape[1:3], pix_fmt
        for f,t in zip(frames, range(len(frames)) if times is None else times):
            f = av.VideoFrame.from_ndarray(f, format='rgb24')
            f.pts = int(t)
            box.mux(s.encode(f))
        box.mux(s.encode())

KINDS = {'b_frames.mp4': dict(bf='4', g='6'), 'open_gop.mp4': {'x264-params': 'open-gop=1:keyint=4:bframes=2'}, 'fragmented.mp4': dict(container=dict(movflags='frag_keyframe+empty_moov')),
         'mpeg4.avi': dict(codec='mpeg4', bf='2', qscale='3'), 'vp8.webm': {'codec': 'libvpx', 'auto-alt-ref': '1', 'lag-in-frames': '8', 'b': '4M'}, 'vp9.webm': dict(codec='libvpx-vp9', b='4M'),
         'stream.ts': {}, 'interlaced.mp4': {'x264-params': 'interlaced=1'}, 'full_range.mp4': dict(pix_fmt='yuvj420p'), '444.mp4': dict(pix_fmt='yuv444p'), 'ten_bit.mp4': dict(pix_fmt='yuv420p10le'), 'stills.avi': dict(codec='mjpeg', pix_fmt='yuvj420p', qscale='3'),
         'lossless.mkv': dict(codec='ffv1')}

@pytest.mark.parametrize('name', KINDS)
def test_kinds(tmp_path, name):
    path = tmp_path/name
    written(path, picture(np.random.default_rng(1)), **KINDS[name])
    info, plain = probe(path), frames_by_hand(path)
    assert info.frames == 12 and check(path).ok and info.fps == pytest.approx(25, rel=.01)
    for backend in ['auto'] + BACKENDS:
        try: v = decode(path, [11,0,6,6], backend)
        except VideoError: assert backend == 'decord' and name in ('ten_bit.mp4', 'stream.ts', 'open_gop.mp4', 'mpeg4.avi', 'stills.avi', 'lossless.mkv', 'interlaced.mp4')
        else:
            assert np.array_equal(v, plain[[11,0,6,6]])
            assert number(v) == [11,0,6,6]

def test_random_encodings(tmp_path):
    "decord's seeking goes wrong on many of these kinds; whatever `decode` returns must be a plain scan's frames"
    rng, used = np.random.default_rng(0), {'decord': 0, 'pyav': 0}
    for k in range(24):
        ext, n = str(rng.choice(['mp4','mkv','mov','avi','flv','ts'])), int(rng.integers(1, 40))
        path = tmp_path/f'{k}.{ext}'
        written(path, picture(rng, 12).repeat(4, 0)[:n], g=str(rng.choice([1,5,12,250])), bf=str(rng.choice([0,2,5])), preset=str(rng.choice(['ultrafast','superfast'])),
                **{'x264-params': str(rng.choice(['', 'open-gop=1', 'intra-refresh=1', 'interlaced=1', 'b-pyramid=2'], p=[.6,.1,.1,.1,.1]))})
        plain = frames_by_hand(path)
        assert probe(path).frames == n == len(plain)
        for _ in range(3):
            idx = rng.integers(0, n, rng.integers(1, 6))
            for backend in BACKENDS:
                try: assert np.array_equal(decode(path, idx, backend), plain[idx]), (backend, path.name, probe(path))
                except VideoError: assert backend == 'decord'
                else: used[backend] += 1
    assert used['pyav'] == 72 and used['decord'] > 15 or not video.decord

# --- seeking

def counted(n, rng): return picture(rng, 16).repeat(-(-n//16), 0)[:n] # a texture for 16 values, whose place in the row is known anyway

SEEKS = {'gop12.mp4': dict(g='12', bf='0'), 'gop250.mp4': dict(g='250', bf='3', sc_threshold='0'), 'b_frames.mp4': dict(g='12', bf='4'), 'b_frames.mkv': dict(g='12', bf='4'), 'stream.ts': dict(g='12', bf='2'), 'every.mp4': dict(g='1'),
         'fragments.mp4': dict(g='12', bf='2', container=dict(movflags='frag_keyframe+empty_moov')), 'vp9.webm': {'codec': 'libvpx-vp9', 'g': '12', 'b': '1M', 'deadline': 'realtime', 'cpu-used': '8'},
         'hevc.mp4': {'codec': 'libx265', 'preset': 'ultrafast', 'x265-params': 'keyint=12:open-gop=0:log-level=none'}, 'hevc_open.mp4': {'codec': 'libx265', 'preset': 'ultrafast', 'x265-params': 'keyint=12:open-gop=1:log-level=none'},
         'open.mp4': {'x264-params': 'open-gop=1:keyint=12:bframes=3'}, 'mpeg4.avi': dict(codec='mpeg4', g='12', qscale='9')}
STAY = {'gop250.mp4', 'hevc_open.mp4', 'open.mp4', 'mpeg4.avi'} # no keyframe on the way, or none that may be trusted

@pytest.mark.parametrize('when', ['even', 'late', 'uneven'])
@pytest.mark.parametrize('name', SEEKS)
def test_seeking_gives_the_frames_of_the_scan(tmp_path, name, when):
    "Dense, uniform, sparse and random indices, with even and uneven times, from zero and from later"
    n, path, rng = 100, tmp_path/name, np.random.default_rng(len(when))
    times = dict(even=np.arange(n), late=np.arange(n)+300, uneven=np.cumsum(rng.integers(1, 6, n))+77)[when]
    if when != 'even' and name == 'mpeg4.avi': pytest.skip('AVI has no time stamps')
    written(path, counted(n, rng), times=times, **SEEKS[name])
    info, plain = probe(path), frames_by_hand(path)
    assert info.frames == n == len(plain)
    assert info.fps == pytest.approx(25*(n-1)/(times[-1]-times[0]), rel=.01)
    jumps = 0
    for idx in (range(30, 91, 4), range(0, 61, 4), range(39, 100, 4), np.linspace(0, n-1, 16).astype(int), [5,96], [99], [12], [11], [13,12], [0], range(n), *[rng.integers(0, n, k) for k in (1,2,4,8)]):
        jumps += sum(stamp is not None for _,stamp,_ in video._runs(info, np.unique(idx)))
        assert np.array_equal(decode(path, idx, 'pyav'), plain[np.asarray(idx)]), idx
    assert (jumps == 0) == (name in STAY), (jumps, info)

def test_a_seek_spares_frames_and_is_left_alone_where_it_does_not():
    info = SimpleNamespace(starts=np.array([[0,0],[10,1000],[20,2000]]))
    for wanted,runs in [([0],[(0,None,0)]), ([3,9],[(0,None,9)]), ([10],[(10,1000,10)]), ([8,10],[(0,None,10)]), ([2,15,19],[(0,None,2),(10,1000,19)]), ([2,15,25],[(0,None,2),(10,1000,15),(20,2000,25)]),
                        ([2,15,18,25],[(0,None,2),(10,1000,25)]), ([28],[(20,2000,28)])]: assert video._runs(info, np.array(wanted)) == runs

def test_more_seeks_on_random_times(tmp_path):
    "The number of frames that are decoded is that of the runs, and never above the scan's but for the frames which a seek throws away"
    path = tmp_path/'a.mp4'
    written(path, counted(60, np.random.default_rng(0)), g='10', bf='2')
    info, rng = probe(path), np.random.default_rng(1)
    for _ in range(10):
        runs = video._runs(info, np.unique(rng.integers(0, 60, 3)))
        with video._opened(path) as (box, stream): seen = [n for n,_ in video._frames(box, stream, info, runs)]
        assert seen == [n for first,_,last in runs for n in range(first, last+1)]

def packets_rewritten(src, dst, change):
    "Copy the video `src` packet by packet; `change(number, packet bytes)` gives the bytes to write, or None for none"
    with av.open(str(src)) as a, av.open(str(dst), 'w') as b:
        s = b.add_stream_from_template(a.streams.video[0])
        for i,p in enumerate(p for p in a.demux(video=0) if p.size):
            data = change(i, bytes(p))
            if data is None: continue
            q = av.Packet(data)
            q.pts, q.dts, q.time_base, q.is_keyframe, q.stream = p.pts, p.dts, p.time_base, p.is_keyframe, s
            b.mux(q)

def test_a_swallowed_frame_does_not_shift_those_behind_the_next_keyframe(tmp_path):
    "A packet of HEVC without a picture in it: no error, but fewer frames"
    whole, hurt = tmp_path/'whole.mp4', tmp_path/'hurt.mp4'
    written(whole, counted(30, np.random.default_rng(0)), **{'codec': 'libx265', 'preset': 'ultrafast', 'x265-params': 'keyint=10:bframes=0:open-gop=0:log-level=none'})
    packets_rewritten(whole, hurt, lambda i,d: bytes([0,0,0,3,70,1,16]) if i == 3 else d) # an access unit delimiter
    plain, info, asis = frames_by_hand(whole), probe(hurt), lambda o: o
    assert len(frames_by_hand(hurt)) == 23 and info.frames == 30 and len(info.starts) == 3 # seven lean on it
    for idx in ([29], [17,19], [0,22], [1,2,10,25], [11]):
        for seek in (True, False): assert np.array_equal(video._decode_pyav(info, np.array(idx), asis, seek), plain[idx])
    for i in (3, 9):
        with pytest.raises(VideoError, match=f'frame {i} asked for, 30 announced'): decode(hurt, [i])

def test_a_seek_goes_round_what_stops_the_scan(tmp_path):
    "A packet of H.264 without a picture in it is an error"
    whole, hurt = tmp_path/'whole.mp4', tmp_path/'hurt.mp4'
    written(whole, counted(30, np.random.default_rng(0)), g='5', bf='0')
    packets_rewritten(whole, hurt, lambda i,d: bytes([0,0,0,2,9,240]) if i == 3 else d)
    plain = frames_by_hand(whole)
    assert not check(hurt).ok
    for idx in ([29], [17,20], [0,22]): assert np.array_equal(decode(hurt, idx), plain[idx])
    with pytest.raises(VideoError, match='frame 3 asked for, 30 announced, but only 3 decode'): decode(hurt, [1,3])

def test_hidden_pictures_are_no_frames(tmp_path):
    written(tmp_path/'whole.webm', counted(20, np.random.default_rng(0)), codec='libvpx', g='6', b='1M')
    packets_rewritten(tmp_path/'whole.webm', tmp_path/'a.webm', lambda i,d: bytes([d[0] & ~16]) + d[1:] if i == 4 else d)
    info, plain = probe(tmp_path/'a.webm'), frames_by_hand(tmp_path/'a.webm')
    assert info.frames == len(plain) == 19 and info.discarded == 1
    assert np.array_equal(decode(tmp_path/'a.webm', [18,2,9]), plain[[18,2,9]])

def test_a_picture_size_that_changes_or_is_absurd(tmp_path):
    for i,side in enumerate((64,80)): written(tmp_path/f'{i}.webm', picture(np.random.default_rng(0), 6, side, side), codec='libvpx-vp9', g='3', b='1M', deadline='realtime')
    other = [bytes(p) for p in av.open(str(tmp_path/'1.webm')).demux(video=0)]
    packets_rewritten(tmp_path/'0.webm', tmp_path/'a.webm', lambda i,d: other[i] if i >= 3 else d)
    assert len(decode(tmp_path/'a.webm', [0,2])) == 2
    for idx in ([4], [4,5], [0,4]): # not even where all that are asked for agree
        with pytest.raises(VideoError, match=r'picture size changes on the way, from \(64, 64\) to \(80, 80\)'): decode(tmp_path/'a.webm', idx)

    def resized(i, data):
        if i: return data
        bits = int.from_bytes(data[4:9], 'big') # behind the start code of a VP9 keyframe: 4 bits, width-1, height-1
        return data[:4] + (bits>>36<<36 | 15999<<20 | 15999<<4 | bits & 15).to_bytes(5, 'big') + data[9:]
    packets_rewritten(tmp_path/'0.webm', tmp_path/'big.webm', resized)
    for call in (lambda: probe(tmp_path/'big.webm'), lambda: decode(tmp_path/'big.webm', [0])):
        with pytest.raises(VideoError, match='big.webm: '): call()
    assert not check(tmp_path/'big.webm').ok

@pytest.mark.parametrize('h,w', [(2,2), (36,48), (32,46), (63,97), (64,97), (65,96)])
def test_sizes(tmp_path, h, w):
    path = tmp_path/'a.webm'
    written(path, picture(np.random.default_rng(1), 4, h, w), codec='libvpx-vp9')
    for backend in ['auto'] + BACKENDS:
        try: assert np.array_equal(decode(path, [3,1], backend), frames_by_hand(path)[[3,1]])
        except VideoError: assert backend == 'decord' and (h % 2 or w < 64)

MATRIX = dict(upright=(1,0,0,1), quarter=(0,1,-1,0), half=(-1,0,0,-1), three=(0,-1,1,0))

@pytest.mark.parametrize('turns,matrix', list(enumerate(MATRIX.values())), ids=MATRIX)
def test_rotation_tag(tmp_path, clip, turns, matrix):
    data, path = bytearray(clip.read_bytes()), tmp_path/'turned.mp4'
    at, (a,b,c,d) = data.find(b'tkhd') + 44, matrix
    data[at:at+36] = struct.pack('>9i', *[v<<16 for v in (a,b,0,c,d,0,0,0)], 1<<30)
    path.write_bytes(data)
    want = np.rot90(frames_by_hand(clip), -turns, (1,2))
    info = probe(path)
    assert (info.height, info.width, info.rotation) == (*want.shape[1:3], -90*turns % 360)
    for backend in BACKENDS:
        assert np.array_equal(decode(path, range(12), backend), want)
        assert np.array_equal(decode(path, [11], backend), want[[11]]) # behind a seek
        assert torch.equal(decode(path, [11], backend, 32), video.resize_short(torch.from_numpy(want[[11]].copy()), 32))

# --- processes

class Clips(torch.utils.data.Dataset):
    def __init__(self, path, bad=None): self.path, self.bad = path, bad
    def __len__(self): return 8
    def __getitem__(self, i): return decode(self.bad if i==5 and self.bad else self.path, [i,0])

@pytest.mark.timeout(180)
@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_worker_processes_after_use_in_the_parent(clip, how):
    for backend in BACKENDS: decode(clip, [3], backend) # whatever stays open here would hang in a forked worker
    for _ in range(2 if how == 'fork' else 1):
        batches = list(DataLoader(Clips(clip), batch_size=4, num_workers=2, timeout=80, multiprocessing_context=how))
        assert [number(b[:,0]) for b in batches] == [[0,1,2,3], [4,5,6,7]]

@pytest.mark.timeout(90)
def test_error_comes_back_from_a_worker(clip, tmp_path):
    with pytest.raises(VideoError, match='missing.mp4: no such file'): list(DataLoader(Clips(clip, tmp_path/'missing.mp4'), num_workers=1, timeout=30))

def test_error_survives_pickling():
    e = pickle.loads(pickle.dumps(VideoError('a.mp4', 'is empty')))
    assert (type(e), str(e), e.why) == (VideoError, 'a.mp4: is empty', 'is empty')

def test_nothing_stays_open(clip):
    fds = Path('/proc/self/fd')
    if not fds.exists(): pytest.skip('needs /proc')
    threads = Path('/proc/self/task')
    for backend in BACKENDS: decode(clip, [1], backend)
    gc.collect()
    before = len(list(fds.iterdir())), len(list(threads.iterdir()))
    for _ in range(20):
        for backend in BACKENDS: decode(clip, [1,5], backend)
        with pytest.raises(VideoError): decode(clip, [99])
    gc.collect()
    assert (len(list(fds.iterdir())), len(list(threads.iterdir()))) == before

@pytest.mark.parametrize('opens', [200, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_memory_does_not_grow(clip, tmp_path, opens):
    if not Path('/proc/self/statm').exists(): pytest.skip('needs /proc')
    def held(): return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20 # MB
    (tmp_path/'cut.mp4').write_bytes(clip.read_bytes()[:300])
    def go(n):
        for i in range(n):
            video._probe.cache_clear()
            decode(clip, [11,3], BACKENDS[i % len(BACKENDS)], 32)
            if i % 4 == 0:
                with pytest.raises(VideoError): decode(tmp_path/'cut.mp4', [0])
        gc.collect()
        return held()
    before = go(100)
    assert go(opens) - before < 8 # one frame leaked by each open of 5,000 would be 92

# --- a time limit

FAKE = """
import ctypes, time
class DECORDError(Exception): pass
class logging:
    QUIET = 0
    def set_level(level): pass
def VideoReader(path, num_threads):
    if 'hang' in path: time.sleep(999)
    if 'die' in path: ctypes.string_at(0)
    raise DECORDError('fake')
"""

@pytest.fixture
def bad_decoder(tmp_path, clip, monkeypatch):
    "A folder with ok.mp4, hang.mp4 and die.mp4, all the same clip; the decord of child processes started from now on hangs or crashes on the file so named"
    (tmp_path/'decord.py').write_text(FAKE)
    for name in ('ok','hang','die'): (tmp_path/f'{name}.mp4').write_bytes(clip.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    video._child.owner = None # a new child
    yield tmp_path
    video._child.owner = None

@pytest.mark.timeout(180)
def test_time_limit(bad_decoder, monkeypatch):
    ok, hang, die = [bad_decoder/f'{name}.mp4' for name in ('ok','hang','die')]
    assert torch.equal(decode(ok, [3,1], timeout=60, short_side=32), decode(ok, [3,1], short_side=32))
    assert decode(ok, [3], timeout=60).add_(1).shape == (1,64,96,3) # writable memory, no warning
    assert probe(ok, timeout=60) == probe(ok) and check(ok, timeout=60) == check(ok)
    child = video._child.process.pid
    for call,error,why in [(lambda: decode(ok, [99], timeout=60), VideoError, 'ok.mp4: frame 99 asked for'), (lambda: decode(ok, [.5], timeout=60), ValueError, 'whole numbers'), (lambda: decode(ok, [0], timeout=0), ValueError, 'timeout is 0'),
                           (lambda: probe(bad_decoder/'missing.mp4', timeout=60), VideoError, 'missing.mp4: no such file')]:
        with pytest.raises(error, match=why): call()
    monkeypatch.chdir(bad_decoder)
    assert number(decode('ok.mp4', [7], timeout=60)) == [7] # the caller's folder, not the child's
    assert video._child.process.pid == child
    begun = time.monotonic()
    with pytest.raises(VideoError, match='hang.mp4: not done after 1 s'): decode('hang.mp4', [0], 'decord', timeout=1)
    assert time.monotonic() - begun < 20
    with pytest.raises(VideoError, match=r'die.mp4: kills its decoder \(exit code -11\)'): decode('die.mp4', [0], 'decord', timeout=60)
    assert number(decode(ok, [7,2], timeout=60)) == [7,2]

    def interrupt(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, .3)
    try:
        with pytest.raises(KeyboardInterrupt): video._child(60, ok, 'time:sleep', 2)
    finally: signal.signal(signal.SIGALRM, before)
    assert video._child(60, ok, 'math:sqrt', 9) == 3 # not the late answer of the call before

    def late(seconds, path, *_): raise VideoError(path, f'not done after {seconds} s')
    monkeypatch.setattr(video, '_child', late)
    assert check(ok, timeout=1) == video.Check(str(ok), False, 0, 0, 'not done after 1 s')

class Guarded(torch.utils.data.Dataset):
    "Frames, or zeros for a file that cannot be read"
    def __init__(self, *paths): self.paths = paths
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        try: return decode(self.paths[i], [1], 'decord' if 'ok' not in str(self.paths[i]) else 'pyav', timeout=2 if 'hang' in str(self.paths[i]) else 60)
        except VideoError: return torch.zeros(1, 64, 96, 3, dtype=torch.uint8)

@pytest.mark.timeout(180)
def test_time_limit_in_a_worker_process(bad_decoder):
    "A worker of a DataLoader may have a child too; one that hangs or dies doesn't take the worker along"
    ok, hang, die = [bad_decoder/f'{name}.mp4' for name in ('ok','hang','die')]
    decode(ok, [0], timeout=60) # the parent's child must not be taken for the worker's
    mine = video._child.process
    got = list(DataLoader(Guarded(ok, die, ok, hang, ok), batch_size=None, num_workers=1, timeout=120, multiprocessing_context='fork'))
    assert [number(v) if v.any() else 'error' for v in got] == [[1], 'error', [1], 'error', [1]]
    assert mine.poll() is None and number(decode(ok, [5], timeout=60)) == [5]

@pytest.mark.timeout(180)
@pytest.mark.parametrize('name, said', [('hang', 'hang.mp4: not done after 5 s'), ('die', r'die.mp4: kills its decoder \(exit code -11\)')])
def test_time_limit_of_a_data_set(bad_decoder, name, said):
    "A loader says which video it was, and goes on to others"
    from tsd.data import VideoDataset, VideoItem
    ds = VideoDataset([VideoItem(bad_decoder/f'{o}.mp4', 'a') for o in ('ok', name)], CategoryMap(['a', 'b']), Sampling(2, 1, 32), backend='decord', timeout=5)
    with pytest.raises(VideoError, match=said): ds[1]
    ds.backend = 'pyav'
    assert ds[0][0].shape == (3,2,32,32) and ds.new_empty().timeout == 5

@pytest.mark.timeout(180)
def test_a_child_leaves_with_its_parent(clip):
    "However the parent goes"
    here, there = os.pipe()
    if not (parent := os.fork()):
        try:
            decode(clip, [0], timeout=60)
            os.write(there, str(video._child.process.pid).encode())
        finally: os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    status = Path('/proc')/os.read(here, 99).decode()/'status'
    for fd in (here, there): os.close(fd)
    for _ in range(100):
        if not status.exists() or 'State:\tZ' in status.read_text(): break
        time.sleep(.1)
    else: pytest.fail('the child is still there')

# --- damage, writing

def test_check_notices_damage(clip, tmp_path):
    data, rng, noticed = clip.read_bytes(), np.random.default_rng(0), 0
    lo, hi = data.find(b'mdat') + 800, data.find(b'moov')
    for _ in range(20):
        bad = bytearray(data)
        for at in rng.integers(lo, hi, 3): bad[at] ^= 1 << rng.integers(8)
        (tmp_path/'bad.mp4').write_bytes(bad)
        noticed += not check(tmp_path/'bad.mp4').ok
    assert noticed >= 15 # H.264 has no checksum

def test_encode_refuses(tmp_path):
    for shape in ((0,16,16,3), (2,15,16,3), (2,16,17,3)):
        with pytest.raises(ValueError, match='even sides'): encode(tmp_path/'a.mp4', np.zeros(shape, np.uint8))
    with pytest.raises(ValueError): encode(tmp_path/'a.mp4', np.zeros((2,16,16,3), np.float32))

def test_encode_is_reproducible(tmp_path):
    v = torch.from_numpy(picture(np.random.default_rng(0)))
    for name in 'ab': encode(tmp_path/f'{name}.mp4', v, crf=10)
    assert (tmp_path/'a.mp4').read_bytes() == (tmp_path/'b.mp4').read_bytes()
    assert (decode(tmp_path/'a.mp4', range(12)).float() - v).abs()[:,:,:40].mean() < 3
