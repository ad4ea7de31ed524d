"What the notebooks of mhca, fpld and paper do not show: real sizes, compilation, what is stored, and where the data file is looked for."
import copy, io, math

import pytest
import torch
from timm.layers.attention import Attention

import tsd
from tsd.aligner import Aligner, fad_loss
from tsd.fpld import FPLDBranches, fpld_loss, fpld_sum
from tsd.mhca import MHCA, dense_bias, fold_bias, head_centres, patch_positions
from tsd.paper import paper_tables

pytestmark = pytest.mark.usefixtures('one_thread')

def layer(grid, n_prefix=0, dim=96, heads=3, **kwargs):
    "An MHCA with random widths and centres"
    torch.manual_seed(0)
    m = MHCA(dim, heads, **kwargs)
    m.set_grid(*grid, n_prefix)
    with torch.no_grad():
        m.alpha.mul_(torch.rand(heads)+.5)
        m.delta.add_(torch.randn(heads, 2))
    return m

@pytest.mark.parametrize('grid,n_prefix', [((8,14,14), 0), ((1,14,14), 1)])
def test_forms_agree_in_float32_at_full_size(grid, n_prefix):
    m = layer(grid, n_prefix)
    x = torch.randn(1, math.prod(grid)+n_prefix, 96)
    with torch.no_grad():
        folded, m.form = m(x), 'dense'
        assert (folded-m(x)).abs().max() < 1e-5

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head_dim', [32, 64])
@pytest.mark.parametrize('alpha', [1., 10.])
def test_positional_attention_survives_half_precision_kernels(dtype, head_dim, alpha):
    "Attention by position alone, through the kernel itself: values are the identity, so the output is the attention map"
    torch.manual_seed(0)
    pos, a, d = patch_positions(1, 14, 14), torch.full((6,), alpha), head_centres(6)+.3*torch.randn(6, 2)
    want = dense_bias(pos.double(), a.double(), d.double(), 1).softmax(-1)
    q, k = (o.to(dtype).expand(6, -1, -1)[None] for o in fold_bias(pos, a, d, 1, scale=head_dim**.5))
    pad = torch.nn.functional.pad
    got = torch.nn.functional.scaled_dot_product_attention(pad(q, (0,192)), pad(k, (0,192)), pad(torch.eye(197, dtype=dtype), (0,3))[None,None].expand(1,6,-1,-1), scale=head_dim**-.5)
    assert got.isfinite().all()
    assert (got[0,...,:197].double()-want).abs().sum(-1).max() < (.01 if dtype is torch.bfloat16 else .002)   # mostly the output's rounding

def saved(form, n=256):
    "Most elements of a tensor that forward keeps for backward"
    m, sizes = layer((1,16,16), form=form), []
    x = torch.randn(1, n, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t): m(x)
    return max(sizes)

def test_folded_form_keeps_no_table():
    assert saved('dense') >= 3*256*256
    assert saved('folded') < 256*256

def test_compiles_without_a_graph_break():
    m = layer((2,4,4), 1)
    compiled = torch.compile(m, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 33, 96)
    assert torch.allclose(compiled(x), m(x), atol=1e-6)
    m.set_grid(1, 4, 4, 1)                      # stage 1's grid after stage 2's: compiled again, not reused
    assert torch.allclose(compiled(x[:,:17]), m(x[:,:17]), atol=1e-6)

def test_adds_two_parameters_and_nothing_else_to_timms_state():
    plain, m = Attention(96, 3, qkv_bias=True).state_dict(), layer((1,4,4), qkv_bias=True)
    assert set(m.state_dict())-set(plain) == {'alpha', 'delta'} and set(plain) < set(m.state_dict())
    with torch.device('meta'): meta = MHCA(96, 3)
    meta = meta.to_empty(device='cpu')
    meta.reset_parameters()
    assert meta.alpha.eq(1).all() and meta.delta.equal(head_centres(3))

def test_copies_and_pickles_keep_the_grid():
    m, x = layer((1,4,4)), torch.randn(1, 16, 96)
    buf = io.BytesIO()
    torch.save(m, buf)
    buf.seek(0)
    for other in (copy.deepcopy(m), torch.load(buf, weights_only=False)): assert other(x).equal(m(x))

def test_a_convolution_can_be_learnt():
    "Nine heads that start around the query come to imitate a 3 x 3 convolution; without positions they cannot"
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(9, 9, 3, padding=1, padding_mode='replicate', bias=False)
    def fit(m):
        opt = torch.optim.Adam(m.parameters(), 1e-2)
        for _ in range(100):
            x = torch.randn(8, 9, 6, 6)
            loss = (m(x.flatten(2).mT)-conv(x).detach().flatten(2).mT).square().mean()
            opt.zero_grad(); loss.backward(); opt.step()
        return loss.item()
    m = MHCA(9, 9, attn_head_dim=9)
    m.set_grid(1, 6, 6)
    assert fit(m) < .3*fit(Attention(9, 9, attn_head_dim=9))
    assert (m.alpha > 1.5).all()                # and the heads have become narrower

@pytest.mark.parametrize('form', ['paper', 'ofa'])
def test_fpld_gradient_matches_finite_differences(form):
    torch.manual_seed(0)
    t, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 5, 2])
    assert torch.autograd.gradcheck(lambda s: fpld_loss(s, t, y, form=form), torch.randn(3, 6, dtype=torch.float64, requires_grad=True))

def test_branches_and_aligner_train_under_autocast():
    torch.manual_seed(0)
    al, br = Aligner(24, 10), FPLDBranches(24, 5, depth=4, num_heads=3, quarters=(2,4))
    x = torch.randn(2, 16, 24, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss = fad_loss(torch.rand(2, 10, 2, 2), al(x, (4,4), (2,2))) + fpld_sum(br({2:x, 4:x}, (4,4)), torch.randn(2, 5), torch.tensor([0,1]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *al.parameters(), *br.parameters()])

def test_published_numbers_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert len(paper_tables()) == 93

def test_absent_data_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tsd, '__file__', str(tmp_path/'tsd'/'__init__.py'))
    with pytest.raises(FileNotFoundError, match='paper_tables.csv.*checkout'): paper_tables()
