"""Damaged files by the thousand: each must end in frames of the right shape or in a VideoError that names it, in good time and within memory.

    python tests/test_fuzz.py FOLDER 0 150    # what the tests run: one line for each mutation, named by its number, which is also its seed
"""
import collections, ctypes, faulthandler, resource, subprocess, sys, time, traceback
from pathlib import Path

import av
import numpy as np
import pytest

from tsd.video import VideoError, check, decode, decord, probe

CLIPS = {'h264.mp4': ('libx264', 'yuv420p', dict(g='5', bf='2')), 'vp9.webm': ('libvpx-vp9', 'yuv420p', dict(g='5', b='2M', deadline='realtime')),
         'mpeg4.avi': ('mpeg4', 'yuv420p', dict(g='5', qscale='3')), 'mjpeg.mov': ('mjpeg', 'yuvj420p', dict(qscale='3')),
         'hevc.mkv': ('libx265', 'yuv420p', {'preset': 'ultrafast', 'x265-params': 'keyint=5:log-level=none'}), 'h264.ts': ('libx264', 'yuv420p', dict(g='5'))}
BACKENDS = ('auto', 'decord') if decord else ('auto',)
LIMIT = 20 # seconds a mutation may take, on a busy machine
ROOM = 2**18 # KiB of memory that may come on top of what the imports take

def write_clips(folder):
    "The undamaged clips: 10 frames of 64x96"
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (10,8,12,3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    for name,(codec,pix_fmt,options) in CLIPS.items():
        with av.open(str(folder/name), 'w') as box:
            s = box.add_stream(codec, rate=25, options=options)
            s.height, s.width, s.pix_fmt, s.codec_context.thread_count = 64, 96, pix_fmt, 1
            for f in video: box.mux(s.encode(av.VideoFrame.from_ndarray(f, format='rgb24')))
            box.mux(s.encode())

# --- ways to damage a file: (bytes, random state) -> bytes

def flips(d, rng):
    for at in rng.integers(0, len(d), 2**rng.integers(0, 7)): d[at] ^= 1 << rng.integers(8)

def truncation(d, rng): del d[rng.integers(1, len(d)):]

def swap(d, rng):
    n = int(rng.integers(1, len(d)//4))
    a, b = sorted(int(i) for i in rng.integers(0, len(d)-n, 2))
    d[a:a+n], d[b:b+n] = d[b:b+n], d[a:a+n]

def zeroed(d, rng):
    at, n = header(d, rng), 2**rng.integers(0, 9)
    d[at:at+n] = bytes(len(d[at:at+n]))

def header_bytes(d, rng):
    for _ in range(rng.integers(1, 5)):
        at = header(d, rng)
        d[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])

def cut_out(d, rng):
    at = rng.integers(0, len(d))
    del d[at:at+2**rng.integers(0, 12)]

def header(d, rng):
    "A place where headers are: the file's start or, in mp4, the index at its end"
    lo = max(d.find(b'moov'), 0) if rng.integers(2) else 0
    return int(rng.integers(lo, min(lo+1000, len(d))))

def absurd(d, rng):
    "A number in a header becomes the smallest or largest there is"
    at = header(d, rng)
    d[at:at+4] = int(rng.choice([0, 1, 2**31-1, 2**32-1])).to_bytes(4, 'big')

DAMAGE = [flips, truncation, swap, zeroed, header_bytes, cut_out, absurd]

def mutate(folder, seed):
    "Write damaged file number `seed`; its path and what was done"
    rng = np.random.default_rng(seed)
    name, f = list(CLIPS)[seed % len(CLIPS)], DAMAGE[seed//len(CLIPS) % len(DAMAGE)]
    data, path = bytearray((folder/name).read_bytes()), folder/f'{seed}-{name}'
    f(data, rng)
    path.write_bytes(data)
    return path, f'{f.__name__} of {name}'

# --- the process that is put at risk

def case(path):
    "'frames' or 'error'; an AssertionError or whatever else was raised is a defect"
    outcome = 'frames'
    c = check(path)
    assert c.ok == (not c.reason) and c.frames >= 0
    try:
        info = probe(path)
        for backend in BACKENDS:
            for idx in ([0], range(info.frames)[:64], [info.frames-1, info.frames//2]):
                try: v = decode(path, idx, backend)
                except VideoError as e:
                    if backend == 'auto': outcome = 'error'
                    named(e, path)
                else: assert tuple(v.shape) == (len(idx), info.height, info.width, 3), (v.shape, info)
    except VideoError as e:
        named(e, path)
        return 'error'
    return outcome

def named(e, path): assert str(e).startswith(f'{path}: ') and len(e.why) > 10, e

def peak():
    "KiB that this process held at most; ru_maxrss, where there is no /proc, also counts what its parent held when it started it"
    status = Path('/proc/self/status')
    return int(status.read_text().partition('VmHWM:')[2].split()[0]) if status.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def serve(folder, start, stop, plant=''):
    "Run mutations `start` to `stop`, a line before and after each; a native crash or a hang leaves only the first. `plant`: 'crash', 'hang', 'raise' or 'hoard' in place of number 1"
    room = peak() + ROOM
    for seed in range(start, stop):
        path, what = mutate(folder, seed)
        print(seed, what, end=': ', flush=True)
        faulthandler.dump_traceback_later(2 if plant=='hang' else LIMIT, exit=True)
        try:
            if plant and seed == 1: PLANTS[plant]()
            print(case(path), flush=True)
        except BaseException: print('DEFECT', *traceback.format_exc().splitlines()[-4:], sep=' | ', flush=True)
        faulthandler.cancel_dump_traceback_later()
        path.unlink()
        if (held := peak()) > room: sys.exit(f'{seed} took the process to {held} KiB')

PLANTS = {'crash': lambda: ctypes.string_at(0), 'hang': lambda: time.sleep(99), 'raise': lambda: {}['x'], 'hoard': lambda: np.ones(2**26)}

def fuzz(folder, start, stop, plant=''):
    "Outcomes of mutations `start` to `stop`, counted, and the lines of those that are neither frames nor a VideoError"
    write_clips(folder)
    count, bad = collections.Counter(), []
    while start < stop:
        p = subprocess.run([sys.executable, __file__, str(folder), str(start), str(stop), plant], capture_output=True, text=True)
        lines = p.stdout.splitlines()
        assert lines and lines[0].startswith(f'{start} '), p.stderr
        for line in lines:
            outcome = next((o for o in ('frames','error','DEFECT') if o in line.partition(': ')[2]), 'stopped')
            count[outcome] += 1
            if outcome not in ('frames', 'error'): bad.append(line if outcome == 'DEFECT' else f'{line} exit {p.returncode} {p.stderr[-1500:]}')
        if p.returncode and outcome != 'stopped': bad.append(p.stderr[-1500:])
        start += len(lines)
        plant = ''
    return count, bad

# --- tests

@pytest.mark.timeout(300)
def test_damaged_files_end_in_frames_or_a_named_error(tmp_path):
    count, bad = fuzz(tmp_path, 0, 150)
    assert not bad, '\n'.join(bad)
    assert count['frames'] > 30 and count['error'] > 30 and count.total() == 150

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_files(tmp_path):
    count, bad = fuzz(tmp_path, 150, 2650)
    print(dict(count))
    assert not bad, '\n'.join(bad)
    assert count['frames'] > 500 and count['error'] > 500 and count.total() == 2500

@pytest.mark.slow
@pytest.mark.parametrize('plant,shows', [('crash','1 flips of vp9.webm:  exit -11'), ('hang','1 flips of vp9.webm:  exit 1 Timeout (0:00:02)'), ('raise',"KeyError: 'x'"), ('hoard','1 took the process to')])
def test_the_fuzzer_notices(tmp_path, plant, shows):
    count, bad = fuzz(tmp_path, 0, 5, plant)
    assert len(bad) == 1 and shows in bad[0] and count.total() == 5

if __name__ == '__main__': serve(Path(sys.argv[1]), *map(int, sys.argv[2:4]), *sys.argv[4:])
