"Files that are no checkpoint, or only part of one: what `read_checkpoint` and `load_checkpoint` say."
import argparse

import pytest
import torch
from safetensors.torch import save_file

from tsd.checkpoints import load_checkpoint, read_checkpoint
from tsd.student import VideoViT
from tsd.teachers import VideoMAEViT

pytestmark = pytest.mark.usefixtures('one_thread')
net = lambda **kw: VideoMAEViT(**dict(img_size=16, num_frames=2, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=3) | kw)

def ran(): raise AssertionError('code of the file was run')
class Code:
    def __reduce__(self): return ran, ()

@pytest.mark.parametrize('name,write,says', [
    ('empty.pth',         lambda p: p.touch(), 'is empty'),
    ('empty.safetensors', lambda p: p.touch(), 'not a safetensors file'),
    ('page.pth',          lambda p: p.write_text('<html>404</html>'), 'no checkpoint'),
    ('text.pt',           lambda p: p.write_text('hello there'), 'no checkpoint'),
    ('hollow.safetensors', lambda p: save_file({}, p), 'holds no weights'),
    ('cut.pth',           lambda p: (torch.save(net().state_dict(), p), p.write_bytes(p.read_bytes()[:20_000])), 'cut off'),
    ('cut.safetensors',   lambda p: (save_file(net().state_dict(), p), p.write_bytes(p.read_bytes()[:-1])), 'not a whole safetensors'),
    ('code.pth',          lambda p: torch.save(dict(model={'a': torch.zeros(1)}, hook=Code()), p), 'could run any code'),
    ('whole.pth',         lambda p: torch.save(net(), p), 'could run any code'),
    ('log.pth',           lambda p: torch.save(dict(epoch=3, args=argparse.Namespace()), p), 'holds no weights'),
    ('list.pth',          lambda p: torch.save([torch.zeros(1)], p), 'holds no weights'),
    ('none.pth',          lambda p: torch.save({}, p), 'holds no weights'),
])
def test_no_checkpoint(tmp_path, name, write, says):
    write(tmp_path/name)
    with pytest.raises(ValueError, match=says) as e: read_checkpoint(tmp_path/name)
    assert name in str(e.value)

def test_absent(tmp_path):
    for p,says in ((tmp_path/'no.pth', 'does not exist'), (tmp_path/'no', 'does not exist'), (tmp_path, 'neither model.safetensors')):
        with pytest.raises(FileNotFoundError, match=says): read_checkpoint(p)

def test_another_network(tmp_path):
    save_file({'conv1.weight': torch.zeros(1)}, tmp_path/'cnn.safetensors')
    with pytest.raises(ValueError, match='cnn.safetensors.*no known layout.*conv1'): load_checkpoint(net(), tmp_path/'cnn.safetensors')
    half = {k: v for k,v in net(depth=2).state_dict().items() if 'blocks.1.mlp' not in k}
    save_file(half, tmp_path/'half.safetensors')
    with pytest.raises(ValueError, match="4 weights of the model are not in it, such as .'blocks.1.mlp.fc1.weight'"): load_checkpoint(net(depth=2), tmp_path/'half.safetensors')

def test_a_damaged_folder(tmp_path):
    model = VideoViT(img_size=16, num_frames=2, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=3)
    model.save_pretrained(tmp_path)
    state = model.state_dict(); del state['head.bias']
    save_file(state, tmp_path/'model.safetensors')
    with pytest.raises(RuntimeError, match='head.bias'): VideoViT.from_pretrained(tmp_path)
    (tmp_path/'config.json').write_text('{"cut')
    with pytest.raises(ValueError, match='config.json is damaged'): read_checkpoint(tmp_path)
