"Paths and small clip sets that several test files share."
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

def noise_video(path, frames, height, width, seed=0):
    "Encode a video of noise, the same for the same seed"
    from tsd.video import encode
    encode(path, torch.randint(256, (frames,height,width,3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))

@pytest.fixture(scope='session')
def shared():
    "The folder of real clips and weights ($TSD_SHARED); the test is skipped where there is none"
    path = Path(os.environ.get('TSD_SHARED', ROOT.parent/'shared'))
    if not path.is_dir(): pytest.skip('no real clips here: set TSD_SHARED to their folder')
    return path

@pytest.fixture
def one_thread():
    "Tensors and pictures as small as the tests' are handled faster by one thread, above all when the cores are busy"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture
def tsd(tmp_path, monkeypatch, capsys):
    "The command line in this process and in `tmp_path`: a function of its words that gives exit status, output and errors"
    from tsd.cli import main
    monkeypatch.chdir(tmp_path)
    def run(*words):
        capsys.readouterr()
        return main(map(str, words)), *capsys.readouterr()
    return run
