"The page of `tsd serve`: asked by a program, and used in a headless browser; what it says of files that are no videos; nothing leaves this machine, and no upload stays."
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures('one_thread')
VOCAB = ['cat', 'dog', 'owl', '<b>fox</b>', 'bee & wasp', 'cow']

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A student's file, a clip, and five files that are no videos"
    from tsd.checkpoints import save_student
    from tsd.data import Sampling
    from tsd.student import VideoViT
    from tsd.tinyclips import make_tinyclips
    path = tmp_path_factory.mktemp('work')
    torch.manual_seed(0)
    student = VideoViT(img_size=32, num_frames=4, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=6)
    torch.nn.init.normal_(student.head.weight, std=.5)
    save_student(student, path/'student.safetensors', VOCAB, sampling=asdict(Sampling(4, 2, 32)))
    shutil.copy(next(make_tinyclips(path/'tiny', n_train=10, n_test=10, seed=0).parent.rglob('*.mp4')), path/'clip.mp4')
    (path/'bad').mkdir()
    (path/'bad/text.mp4').write_text('no video')
    (path/'bad/empty.mp4').touch()
    (path/'bad/cut.mp4').write_bytes((path/'clip.mp4').read_bytes()[:600])
    with av.open(path/'bad/sound.mp4', 'w') as box:
        stream = box.add_stream('aac', rate=8000)
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format='fltp', layout='mono')
        quiet.sample_rate = 8000
        box.mux(stream.encode(quiet))
        box.mux(stream.encode())
    with av.open(path/'bad/frameless.mp4', 'w') as box:
        stream = box.add_stream('libx264', rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, 'yuv420p'
        box.start_encoding()
    return path

def wanted(video, work, **kwargs):
    from tsd.evaluate import predict
    return predict(video, work/'student.safetensors', **kwargs)

SPY = """
import atexit, sys
hosts = set()
def hook(event, args):                                                    # all that this process reaches for
    if event == 'socket.getaddrinfo': hosts.add(str(args[0]))
    if event == 'socket.connect' and isinstance(args[1], tuple): hosts.add(args[1][0])
sys.addaudithook(hook)
atexit.register(lambda: print('reached', sorted(hosts), flush=True))
from tsd.cli import main
sys.exit(main(sys.argv[1:]))
"""

def test_asked_by_a_program(work, tmp_path):
    import httpx
    from gradio_client import Client, handle_file
    env = {k: v for k,v in os.environ.items() if not k.startswith('GRADIO_')} | dict(GRADIO_TEMP_DIR=str(tmp_path/'uploads'))
    words = ['serve', '--model', work/'student.safetensors', '--port', '0', '--max-size', '100kb', '--clips', '2', '--crops', '1']
    server = subprocess.Popen([sys.executable, '-c', SPY, *map(str, words)], stdout=subprocess.PIPE, stderr=open(tmp_path/'err', 'w'), text=True, env=env)
    try:
        line = server.stdout.readline()
        url = re.match(r'http://127\.0\.0\.1:(\d+)/', line)
        assert url, line + (tmp_path/'err').read_text()
        with pytest.raises(OSError): socket.create_connection(('127.0.0.2', int(url[1])), 5)            # it listens at one address
        url,clip = url[0],work/'clip.mp4'
        client = Client(url, verbose=False, analytics_enabled=False)
        bars = client.predict(handle_file(clip), api_name='/predict')[0]['confidences']
        want = wanted(clip, work, clips=2, crops=1)
        assert [b['label'] for b in bars] == [n for n,_ in want] and np.allclose([b['confidence'] for b in bars], [p for _,p in want], atol=1e-6)
        for file,said in dict(text='not a video', empty='0 bytes', cut='cut.mp4: ', sound='only sound', frameless='frameless.mp4: ').items():
            with pytest.raises(Exception) as e: client.predict(handle_file(work/'bad'/f'{file}.mp4'), api_name='/predict')
            assert said in str(e.value) and str(e.value).startswith(f'{file}.mp4: '), (file, e.value)   # its own name, no folder of the server's
        assert client.predict(handle_file(clip), api_name='/predict')[0]['confidences'] == bars         # it goes on
        # neither what was not uploaded nor what is too large
        assert httpx.get(f'{url}gradio_api/file={work}/student.safetensors').status_code == 403
        asked = httpx.post(f'{url}gradio_api/call/predict', json=dict(data=[dict(path=str(clip), meta=dict(_type='gradio.FileData'))])).json()['event_id']
        answer = httpx.get(f'{url}gradio_api/call/predict/{asked}', timeout=60).text
        assert 'event: error' in answer and 'confidence' not in answer
        assert httpx.post(f'{url}gradio_api/upload', files=dict(files=('big.mp4', b'0'*200_000))).status_code == 413
        assert {o.name for o in (tmp_path/'uploads').rglob('*.mp4')} >= {'clip.mp4', 'text.mp4'}
        server.send_signal(signal.SIGTERM)
        rest = server.communicate(timeout=60)[0]
    finally: server.kill()
    assert server.returncode == 0, (tmp_path/'err').read_text()
    assert rest.splitlines()[-1] == "reached ['127.0.0.1']", rest
    assert 'cannot be read' not in (tmp_path/'err').read_text()                                         # a user's bad file is no error of the server
    assert not list((tmp_path/'uploads').rglob('*.mp4'))

@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_awkward_real_files(work, shared, whole):
    "Each has an answer or a message; the slow form also waits for the figures"
    import pandas as pd
    from tsd.serve import prediction_page
    odd = shared/'clips/odd'
    answer = next(iter(prediction_page(work/'student.safetensors', clips=1, crops=1).fns.values())).fn
    told = {}
    for r in pd.read_csv(odd/'clips.csv').itertuples():
        said = answer(str(odd/r.file))
        try:
            first = next(said)[0] or next(said)                                                         # before an error nothing is shown
            if whole: list(said)
            told[r.file] = bool(first)
        except Exception as e: told[r.file] = type(e).__name__ == 'Error' and e.message.startswith(f'{r.file}: ') and str(odd) not in e.message
    assert len(told) > 15 and all(told.values()), told

def test_says_what_is_missing(work, tsd, monkeypatch):
    serve,was = ['serve', '--model', work/'student.safetensors'],signal.getsignal(signal.SIGTERM)
    with socket.create_server(('127.0.0.1', 0)) as s:
        for words,said in ((['--port', s.getsockname()[1]], f'port {s.getsockname()[1]} (Address already in use)'), (['--max-size', 'big'], "'big'"), (['--clips', 0], '--clips 0'),
                           (['--model', 'absent.safetensors'], 'absent.safetensors does not exist'), (['--host', 'no.such.host.invalid'], 'no.such.host.invalid')):
            code,_,err = tsd(*serve, *words)
            assert code == 1 and said in err and err.count('\n') == 1, err
    assert signal.getsignal(signal.SIGTERM) is was
    monkeypatch.setitem(sys.modules, 'gradio', None)                                                    # its import fails
    code,_,err = tsd(*serve)
    assert code == 1 and "pip install 'tsd[serve]'" in err and 'Traceback' not in err
    import importlib, tsd.serve
    importlib.reload(tsd.serve)                                                                         # the module itself needs no Gradio

@pytest.fixture
def browser(tmp_path):
    "A headless Chromium with a camera that shows a test picture"
    binary = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if not binary or not driver: pytest.skip('no chromium and chromedriver here: the page is not tried in a browser')
    from selenium import webdriver
    opts = webdriver.ChromeOptions()
    opts.binary_location = binary
    profile = tempfile.mkdtemp()                                                                        # a short path: it holds a socket
    for o in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'disable-quic', 'no-first-run', 'disable-background-networking', 'disable-component-update', 'disable-sync',
              'use-fake-device-for-media-stream', 'use-fake-ui-for-media-stream', f'user-data-dir={profile}', 'window-size=1366,800'): opts.add_argument(f'--{o}')
    opts.set_capability('goog:loggingPrefs', dict(performance='ALL'))
    b = webdriver.Chrome(opts, webdriver.ChromeService(driver))
    yield b
    b.quit()
    shutil.rmtree(profile, ignore_errors=True)

def asked_for(browser):
    "Addresses of all that the browser asked for since the last call"
    for line in browser.get_log('performance'):
        m = json.loads(line['message'])['message']
        if m['method'] == 'Network.requestWillBeSent': yield m['params']['request']['url']
        if m['method'] == 'Network.webSocketCreated': yield m['params']['url']

def test_in_a_browser(work, tmp_path, browser, monkeypatch):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    from tsd.serve import close_page, serve
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path/'uploads'))
    find = lambda css: browser.find_elements(By.CSS_SELECTOR, css)
    wait = lambda done: WebDriverWait(browser, 60, ignored_exceptions=[Exception]).until(lambda _: done())
    def click(text): wait(lambda: [o for o in find('button') if text in (o.get_attribute('aria-label'), o.text)][0].click() or True)
    def upload(file): wait(lambda: find('input[type=file]'))[0].send_keys(str(file))
    def bars(): return [tuple(o.text.split('\n')) for o in find('[data-testid$=-confidence-set]')]
    page = serve(work/'student.safetensors', port=0, block=False)
    try:
        browser.get(page.local_url)
        upload(work/'clip.mp4')
        wait(lambda: len(bars()) == 5 and len([o for o in find('img[src^=data]') if o.size['width'] > 300]) == 2)          # timeline and attention, too
        want = wanted(work/'clip.mp4', work)
        assert bars() == [(n, f'{np.floor(100*p + .5):.0f}%') for n,p in want]
        assert [o.text for o in find('[data-testid=label-output-value]')] == [want[0][0]]
        for width in (1366, 390):                                                                       # nothing is wider than a laptop's or a phone's window
            browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 500))
            assert browser.execute_script('return document.documentElement.scrollWidth') <= width
        browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
        click('Clear')
        wait(lambda: not bars() and not find('img[src^=data]'))
        upload(work/'bad/text.mp4')
        wait(lambda: 'text.mp4: cannot be read' in find('[data-testid=toast-body]')[0].text)
        assert 'Traceback' not in browser.page_source and not bars()
        for seconds in (1.5, 6, 24):                                                                    # a busy machine may give no picture at first
            click('Clear')
            click('Capture from camera'); click('Click to Access Webcam'); click('Record')
            wait(lambda: find('button[aria-label="start recording"]')[0].text == 'Stop')
            time.sleep(seconds)
            click('Stop')
            wait(lambda: len(bars()) == 5 or 'sample.webm' in find('[data-testid=toast-body]')[0].text)
            if bars(): break
            click('Close')                                                                              # the message
        took = max((tmp_path/'uploads').rglob('*.webm'), key=lambda o: o.stat().st_mtime)
        assert bars() == [(n, f'{np.floor(100*p + .5):.0f}%') for n,p in wanted(took, work)]
        urls = set(asked_for(browser)) | set(browser.execute_script("return performance.getEntriesByType('resource').map(o => o.name)"))
        away = [u for u in urls if re.match('(http|ws|ftp)s?:', u) and not u.startswith(page.local_url)]
        assert len(urls) > 20 and not away, away
    finally: close_page(page)
    assert not list((tmp_path/'uploads').rglob('*.*'))
