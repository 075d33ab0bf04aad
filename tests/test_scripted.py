"Each public call on TorchScript models, and on plain models with scripted parts."
import copy
import io

import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from channelslast import FoldBatchNorm
from .helpers import convnet, difference, learner, learner_state, loaders

pytestmark = pytest.mark.filterwarnings('ignore')
CL = torch.channels_last


class Keeps(nn.Module):
    "State of all kinds: batch norm, a counter, a list, a tensor that it changes, and buffers that it changes or replaces."
    calls: int
    seen: list[int]
    def __init__(self):
        super().__init__()
        self.bn, self.calls, self.seen, self.t = nn.BatchNorm2d(3), 0, [0], torch.zeros(2)
        self.register_buffer('new', torch.zeros(1)); self.register_buffer('old', torch.zeros(1, 2, 2, 2))
    def forward(self, x):
        self.calls += 1; self.seen.append(self.calls); self.t += 1; self.new = self.new + 1; self.old += 1
        return self.bn(x)


class Net(nn.Module):
    def __init__(self): super().__init__(); self.keeps, self.body = Keeps(), convnet()
    def forward(self, x): return self.body(self.keeps(x))


def traced(m): return torch.jit.trace(m, torch.randn(2, 3, 8, 8))


def loaded(m):
    torch.jit.save(torch.jit.script(m), file := io.BytesIO())
    return torch.jit.load(io.BytesIO(file.getvalue()))


def part(how, name):
    def _part(m):
        parent, _, last = name.rpartition('.')
        setattr(m.get_submodule(parent), last, how(m.get_submodule(name)))
        return m
    return _part


MAKE = dict(script=torch.jit.script, trace=lambda m: traced(m.body), load=loaded, part=part(torch.jit.script, 'keeps'),
            body=part(torch.jit.script, 'body'), traced=part(traced, 'body'), layer=part(torch.jit.script, 'body.5'))


def kinds(*fast):
    "Learners of these kinds of scripts in the fast suite, of all others in the slow one."
    return pytest.mark.parametrize('learn', [k if k in fast else pytest.param(k, marks=pytest.mark.slow) for k in MAKE], indirect=True)


@pytest.fixture
def learn(request, has):
    has('bf16')
    return learner(MAKE[request.param](Net()), loaders(n=16))


def in_cpp(model):
    "State that TorchScript holds, by value."
    names = 'calls', 'seen', 't', 'new', 'old', 'running_mean', 'training'
    def _values(m): return {k: copy.deepcopy(getattr(m, k)) for k in names if hasattr(m, k)}
    return [_values(m) for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]


class Dtypes(TorchDispatchMode):
    "Records the dtypes of convolutions and matrix products in forward passes."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.addmm): self.seen.append(out.dtype)
        return out


def dtypes(learn):
    with Dtypes() as mode: learn.validate(dl=[learn.dls.valid.one_batch()])
    return mode.seen


@kinds('script', 'trace', 'load', 'part', 'layer')
@pytest.mark.parametrize('amp_mode', [None, 'bf16'])
def test_a_scripted_model_trains_in_channels_last_and_goes_back(learn, amp_mode):
    learn.to_channelslast(to_fp16=amp_mode is not None, amp_mode=amp_mode)
    learn.fit(1); learn.validate(); learn.get_preds()
    weights = [p for p in learn.model.parameters() if p.dim() == 4]
    assert len(weights) == 3 and all(p.is_contiguous(memory_format=CL) and p.grad.is_contiguous(memory_format=CL) for p in weights)
    assert {*dtypes(learn)} == {torch.bfloat16 if amp_mode else torch.float32}
    learn.to_contiguous(to_fp32=True)
    learn.fit(1)
    assert all(p.is_contiguous() for p in weights) and {*dtypes(learn)} == {torch.float32}


FIND = dict(num_it=1, show_plot=False)


def measure(learn, call, start='contiguous'):
    "Measuring leaves the Learner and what TorchScript holds as they were."
    if start == 'channels last': learn.to_channelslast(amp_mode='bf16')
    learn.fit(1)
    learn.model.train()
    before, cpp = learner_state(learn), in_cpp(learn.model)
    result = call(learn)
    assert difference(before, learner_state(learn)) == '' and difference(cpp, in_cpp(learn.model)) == '' and cpp
    learn.fit(1)
    return result


@kinds('script', 'part', 'load', 'traced')
@pytest.mark.parametrize('start', ['channels last', pytest.param('contiguous', marks=pytest.mark.slow)])
def test_format_summary_leaves_a_scripted_model_as_it_was(learn, start):
    assert measure(learn, lambda o: o.format_summary(), start).holds == (start == 'channels last')


@kinds('script', 'trace')
@pytest.mark.parametrize('start', ['channels last', pytest.param('contiguous', marks=pytest.mark.slow)])
@pytest.mark.parametrize('train', [True, False], ids=['train', 'predict'])
def test_format_find_leaves_a_scripted_model_as_it_was_and_measures_all_settings(learn, train, start):
    "Otherwise the script's batch norms keep the running statistics of the measured steps, and its modules stay in another mode."
    rows = measure(learn, lambda o: o.format_find(train=train, **FIND), start).rows
    assert len(rows) >= 4 and not any('Error' in r.note or 'numbers' in r.note for r in rows)


@kinds('part', 'layer')
def test_format_find_leaves_a_model_with_scripted_parts_as_it_was_and_measures_all_settings(learn):
    rows = measure(learn, lambda o: o.format_find(layers=False, **FIND)).rows
    assert len(rows) >= 4 and not any('Error' in r.note or 'numbers' in r.note for r in rows)


@kinds('part')
@pytest.mark.parametrize('train', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_to_fastest_of_a_scripted_model_measures_and_trains_on(learn, train):
    assert learn.to_fastest(num_it=1, train=train, layers=False) is learn
    assert learn.format_timings.train == train and len(learn.format_timings.rows) >= 4
    learn.fit(1)


@kinds('script', 'body', 'layer')
@pytest.mark.parametrize('amp_mode', [None, 'bf16'])
def test_FoldBatchNorm_leaves_scripted_models_unfolded(learn, amp_mode):
    learn.to_channelslast(to_fp16=amp_mode is not None, amp_mode=amp_mode).fit(1)
    truth = learn.get_preds()[0]
    learn.add_cb(FoldBatchNorm())
    for _ in range(2): torch.testing.assert_close(learn.get_preds()[0], truth, rtol=0, atol=0)
    assert not learn.fold_batch_norm.folded


@kinds('script', 'part', 'load')
@pytest.mark.parametrize('into', ['channels last', 'contiguous'])
def test_a_scripted_models_checkpoint_loads_across_formats(learn, tmp_path, into, request):
    learn.path = tmp_path
    learn.to_channelslast(amp_mode='bf16').fit(1)
    learn.save('a')
    other = learner(MAKE[request.node.callspec.params['learn']](Net()), loaders(n=16), path=tmp_path)
    if into == 'channels last': other.to_channelslast(amp_mode='bf16').fit(1)
    other.load('a')
    for a, b in zip(learn.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b) and [v.stride() for v in other.opt.state[b].values() if isinstance(v, Tensor)] == [b.stride()]*2
    other.fit(1)


# layers in fp32

def module(learn, name): return dict(learn.model.named_modules())[name]


INSIDE = [('script', 'body.0', 'the scripted model'), ('script', 'keeps', 'the scripted model'), ('trace', '0', 'the scripted model'),
          ('load', 'body.8', 'the scripted model'), ('body', 'body.0', "the scripted module 'body'"), ('traced', 'body.8', "the scripted module 'body'")]


@pytest.mark.parametrize('as_', [lambda learn, n: n, lambda learn, n: ['', n][1:], module, lambda learn, n: lambda m: m is module(learn, n)],
                         ids=['name', 'names', 'module', 'function'])
@pytest.mark.parametrize('learn, name, where', INSIDE, indirect=['learn'])
def test_fp32_layers_inside_a_script_raise_and_change_nothing(learn, name, where, as_):
    learn.to_bf16()
    before = learner_state(learn)
    with pytest.raises(ValueError) as e: learn.to_channelslast(amp_mode='bf16', fp32_layers=as_(learn, name))
    assert difference(before, learner_state(learn)) == ''
    assert f"{name!r} is inside {where}" in str(e.value) and ("fp32_layers='body'" if 'module' in where else 'to_fp16=False') in str(e.value)


@pytest.mark.parametrize('asked', ['body', ['body', 'body.0'], torch.jit.ScriptModule, lambda m: isinstance(m, torch.jit.ScriptModule)],
                         ids=['name', 'and a layer', 'class', 'function'])
@pytest.mark.parametrize('learn', ['body', 'traced'], indirect=True)
def test_a_whole_script_as_fp32_layers_runs_in_fp32(learn, asked):
    learn.to_channelslast(amp_mode='bf16', fp32_layers=asked)
    learn.fit(1)
    assert {*dtypes(learn)} == {torch.float32} and learn.dls.valid.one_batch()[0].dtype == torch.float32


@pytest.mark.parametrize('learn', ['layer'], indirect=True)
@pytest.mark.parametrize('asked, half', [('body.5', 1), ('body.0', 1), ('body', 0)])
def test_layers_around_a_script_as_fp32_layers_run_in_fp32(learn, asked, half):
    learn.to_channelslast(amp_mode='bf16', fp32_layers=asked)
    assert dtypes(learn).count(torch.float32) == (1 if half else 4)
    assert learn._grab_cbs(MixedPrecision)[0].fp32_layers == (asked,)


def test_a_model_scripted_after_fp32_layers_were_set_raises(has):
    "After scripting, the names no longer belong to layers that can run on their own."
    has('bf16')
    learn = learner().to_channelslast(amp_mode='bf16', fp32_layers='0')
    learn.model = torch.jit.script(learn.model)
    with pytest.raises(ValueError, match='scripted model'): learn.fit(1)


def test_a_scripted_loss_trains_and_is_measured(has):
    has('bf16')
    @torch.jit.script
    def loss(p: Tensor, y: Tensor): return nn.functional.cross_entropy(p, y)
    learn = learner(torch.jit.script(convnet()), loaders(n=16))
    learn.loss_func = loss
    learn.to_channelslast(amp_mode='bf16').fit(1)
    assert learn.format_summary().holds and len(learn.format_find(layers=False, **FIND).rows) >= 4
