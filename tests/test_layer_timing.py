"Mixed precision with some layers in fp32, and the search for such layers; with fake times."
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import Learner
from torch import nn

from channelslast import ChannelsLast
from channelslast.find import layer_timing as module, train_benchmark
from channelslast.find.layer_timing import fp32_names, record_inputs, time_layers
from channelslast.learner.mixed_precision import resolve_layers
from tests.conftest import convnet, learner, loaders
from tests.test_channels_last import image_folder
from tests.test_format_find import fake, find
from tests.test_format_summary import same, state

depthwise = lambda m: isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1


class Probe(nn.Module):
    "Records the dtypes of a layer's input and output."
    def __init__(self, inner): super().__init__(); self.inner, self.seen = inner, []
    def forward(self, x):
        out = self.inner(x)
        self.seen.append((x.dtype, out.dtype))
        return out


class Two(nn.Module):
    "Positional and keyword inputs, outputs in nested containers, integers."
    def __init__(self): super().__init__(); self.c, self.types = nn.Conv2d(8, 8, 1), []
    def forward(self, x, *, scale, n=3):
        y = self.c(x)
        self.types.append((x.dtype, scale.dtype, y.dtype, torch.is_autocast_enabled('cpu')))
        return dict(a=y*scale, b=(y, n)), torch.ones(1, dtype=torch.int64)


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.two, self.head, self.out = nn.Conv2d(3, 8, 3), Two(), nn.Linear(8, 4), []
    def forward(self, x):
        x = self.first(x)
        d, i = self.two(x, scale=x.mean())
        self.out.append((d['a'].dtype, d['b'][0].dtype, d['b'][1], i.dtype, d['a'].is_contiguous(memory_format=torch.channels_last)))
        return self.head(d['a'].mean((2, 3)))


def test_inputs_and_outputs_of_any_shape(has):
    has('bf16')
    m = Uses()
    learner(m).to_channelslast(amp_mode='bf16', fp32_layers='two').fit(1)
    half, full = torch.bfloat16, torch.float32
    assert set(m.two.types) == {(full, full, full, False)} and set(m.out) == {(half, half, 3, torch.int64, True)}


@pytest.mark.parametrize('asked, names', [('1', ['1']), (['1', '4'], ['1', '4']), (depthwise, ['3']), ([depthwise, '0'], ['0', '3']),
                                          (['2.inner'], ['2.inner'])])
def test_who_runs_in_fp32(has, asked, names):
    has('bf16')
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), Probe(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = learner(m).to_channelslast(amp_mode='bf16', fp32_layers=asked)
    assert list(learn.mixed_precision.fp32_layers) == names
    computed = {}
    real = torch.nn.functional.conv2d
    def spy(x, w, *a):
        computed.setdefault(ids[id(w)], set()).add(torch.is_autocast_enabled('cpu') and x.dtype != torch.float64)
        return real(x, w, *a)
    ids = {id(c.weight): n for n, c in m.named_modules() if isinstance(c, nn.Conv2d)}
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(torch.nn.functional, 'conv2d', spy)
        learn.fit(1); learn.validate(); learn.get_preds()
    assert {n for n, on in computed.items() if on == {False}} == set(names) and {n for n, on in computed.items() if on == {True}} == set(ids.values()) - set(names)


class Shared(nn.Module):
    "A module that is used twice and has two names, with a module inside."
    def __init__(self):
        super().__init__()
        self.a = Probe(nn.Conv2d(3, 3, 1))
        self.again, self.l, self.types = self.a, nn.Linear(3, 4), []
    def forward(self, x):
        y = self.again(self.a(x))
        self.types.append(y.dtype)
        return self.l(y.mean((2, 3)))


@pytest.mark.parametrize('names', [['a'], ['a', 'a.inner'], ['again']])
def test_shared_and_nested_modules(has, names):
    has('bf16')
    m = Shared()
    learn = learner(m)
    if names == ['again']:
        with pytest.raises(ValueError, match="no module 'again'; did you mean"): learn.to_channelslast(amp_mode='bf16', fp32_layers=names)
        return
    learn.to_channelslast(amp_mode='bf16', fp32_layers=names).fit(1)
    assert set(m.a.seen) == {(torch.float32, torch.float32)} and set(m.types) == {torch.bfloat16}


@pytest.mark.parametrize('bad, match', [('features.1', "no module 'features.1'"), (['1', 'lst'], "no module 'lst'; did you mean 'last'"),
                                        ([3], 'no module 3'), ('', "no module ''")])
def test_unknown_names(bad, match):
    learn = learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(), nn.Flatten()))
    learn.model.add_module('last', nn.Linear(144, 4))
    cbs = list(learn.cbs)
    with pytest.raises(ValueError, match=match): learn.to_channelslast(amp_mode='bf16', fp32_layers=bad)
    assert list(learn.cbs) == cbs


def test_what_has_no_effect_is_said():
    with pytest.warns(UserWarning, match='matched no module'): learner().to_channelslast(amp_mode='bf16', fp32_layers=lambda m: False)
    with pytest.warns(UserWarning, match='ignores fp32_layers: `to_fp16=False` adds'): learner().to_channelslast(to_fp16=False, fp32_layers='0')


def test_naming_layers_replaces_the_mixed_precision():
    learn = learner().to_channelslast(amp_mode='fp16').to_channelslast(amp_mode='bf16', fp32_layers='0')
    assert learn.mixed_precision.fp32_layers == ('0',) and learn.to_channelslast().mixed_precision.fp32_layers == ('0',)


# nothing is left behind

@pytest.mark.parametrize('where', ['inside', 'after', 'interrupt', 'loss'])
def test_exceptions_leave_no_trace(has, where):
    has('bf16')
    class Boom(nn.Module):
        def forward(self, x):
            if where != 'loss': raise KeyboardInterrupt if where == 'interrupt' else RuntimeError('boom')
            return x
    m = nn.Sequential(nn.Conv2d(3, 8, 3), Boom(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn = learner(m).to_channelslast(amp_mode='bf16', fp32_layers=['0', '1'] if where == 'inside' else '0')
    if where == 'loss': learn.loss_func = lambda p, y: 1/0
    before = state(learn)[1]
    with pytest.raises((RuntimeError, KeyboardInterrupt, ZeroDivisionError)): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and not any('forward' in vars(o) for o in m.modules())
    assert [sorted(o) for *_, o in state(learn)[1]] == [sorted(o) for *_, o in before]


def test_an_own_forward_on_the_instance_stays(has):
    has('bf16')
    m = convnet()
    own, calls = m[0].forward, []
    def custom(x):
        calls.append(torch.is_autocast_enabled('cpu'))
        return own(x)
    m[0].forward = custom
    learner(m).to_channelslast(amp_mode='bf16', fp32_layers='0').fit(1)
    assert m[0].forward is custom and set(calls) == {False}


def test_the_model_outside_the_learner_copies_and_checkpoints(has, tmp_path):
    has('bf16')
    learn = learner(path=tmp_path).to_channelslast(amp_mode='bf16', fp32_layers='0')
    learn.fit(1)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast('cpu'): assert learn.model[0](x).dtype == torch.bfloat16
    twin = deepcopy(learn)
    assert twin.mixed_precision.fp32_layers == ('0',) and twin.mixed_precision.learn is twin
    twin.fit(1)
    learn.save('a'); learn.load('a'); learn.fit(1)
    learn.freeze(); learn.fit(1)


def test_exports_load_without_this_library(has, tmp_path):
    has('bf16')
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path).to_channelslast(amp_mode='bf16', fp32_layers=depthwise)
    learn.fit(1)
    learn.export('e.pkl')
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
print(load_learner({str(tmp_path/'e.pkl')!r}).predict({str(tmp_path/'data'/'a'/'0.png')!r})[0])"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip()[-1] in 'ab', out.stderr


def test_compiled_models(has):
    "In a compiled model the layers run in fp32 in the Learner, and as usual outside it."
    has('bf16')
    torch.manual_seed(0)
    plain = convnet()
    def backend(gm, inputs): return gm.forward
    losses = []
    for compiled in False, True:
        m = deepcopy(plain)
        learn = learner(torch.compile(m, backend=backend) if compiled else m, loaders_once)
        learn.to_channelslast(amp_mode='bf16', fp32_layers=['0', '3'])
        assert learn.mixed_precision.fp32_layers == ('0', '3')
        learn.fit(1)
        losses.append([float(o) for o in learn.recorder.losses])
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad(), torch.autocast('cpu'): torch.testing.assert_close(learn.model.eval()(x), m(x), rtol=0, atol=0)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


torch.manual_seed(3)
loaders_once = loaders()


def test_wrapped_models_keep_their_names(has):
    has('bf16')
    m = Shared()
    learn = learner(nn.DataParallel(m)).to_channelslast(amp_mode='bf16', fp32_layers='a')
    learn.fit(1)
    assert learn.mixed_precision.fp32_layers == ('a',) and set(m.a.seen) == {(torch.float32, torch.float32)}


# measuring layers

def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding=1),
                                nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def fake_layers(monkeypatch):
    "`fake_layers(f)` replaces a layer's time by `f(module, in_fp32)`; the layer still runs."
    def _fake(f):
        real = module.layer_ms
        def _ms(m, x, device, half, in_fp32):
            real(m, x, device, half, in_fp32)
            return f(m, in_fp32)
        monkeypatch.setattr(module, 'layer_ms', _ms)
    return _fake


def test_each_signature_once_with_its_real_shape(fake_layers):
    calls = []
    fake_layers(lambda m, fp32: calls.append((m, fp32)) or (1. if fp32 == depthwise(m) else 2.))
    m, x = net(), torch.randn(2, 3, 8, 8)
    rows = time_layers(m, record_inputs(m, lambda: m(x)), torch.bfloat16, 'bf16')
    assert [(r.names, r.cls, r.shape) for r in rows] == [
        (('0',), 'Conv2d', (2, 3, 8, 8)), (('2',), 'Conv2d', (2, 8, 6, 6)), (('3', '4'), 'Conv2d', (2, 8, 6, 6)),
        (('5',), 'ConvTranspose2d', (2, 8, 6, 6)), (('8',), 'Linear', (2, 8))]
    assert [(r.kept, r.half_ms, r.fp32_ms) for r in rows] == [('bf16', 1., 2.), ('fp32', 2., 1.)] + [('bf16', 1., 2.)]*3
    assert len(calls) == 5*2*(module.WARM_UP + module.ROUNDS) and [f for _, f in calls[:4]] == [False, True, False, True]
    assert fp32_names(rows, 'bf16') == ['2'] and fp32_names(rows, 'fp16') == [] and not any(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize('fp32, kept', [(0.89, 'fp32'), (0.91, 'bf16')])
def test_fp32_only_where_clearly_faster(fake_layers, fp32, kept):
    fake_layers(lambda m, f: fp32 if f else 1.)
    m = nn.Sequential(nn.Linear(3, 3))
    assert time_layers(m, record_inputs(m, lambda: m(torch.randn(2, 3))), torch.bfloat16, 'bf16')[0].kept == kept


def test_layers_that_cannot_run_alone_are_left_out():
    class Odd(nn.Linear):
        def forward(self, x, more): return super().forward(x)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.o, self.l = Odd(3, 3), nn.Linear(3, 3)
        def forward(self, x): return self.l(self.l(self.o(x, 1)).repeat(2, 1))  # `l` gets two shapes
    m = Net()
    assert time_layers(m, record_inputs(m, lambda: m(torch.randn(2, 3))), torch.bfloat16, 'bf16') == []


def test_find_adds_the_candidate(has, fake, fake_layers):
    has('bf16'); fake_layers(lambda m, f: 1. if f == depthwise(m) else 2.)
    fake(lambda key, n: 100.)
    learn = learner(net())
    before = state(learn)
    t = find(learn, layers=True)
    assert [(r.memory_format, r.precision) for r in t.rows][-1] == ('channels_last', 'bf16+fp32') and len(t.rows) == 5
    assert t.rows[-1].note == '1 of 6 layers in fp32' and t.rows[-1].valid and t.rows[-1].grad_diff is not None
    assert [r.names for r in t.layers if r.kept == 'fp32'] == [('2',)] and t.best is t.rows[0]
    for a, b in zip(before, state(learn)): assert same(a, b)
    assert len(find(learn).rows) == 4 and find(learn).layers == []
    assert len(find(learn, formats='contiguous', layers=True).rows) == 2


def test_no_candidate_where_no_layer_gains(has, fake, fake_layers):
    has('bf16'); fake({}); fake_layers(lambda m, f: 1.)
    t = find(learner(net()), layers=True)
    assert len(t.rows) == 4 and all(r.kept == 'bf16' for r in t.layers)


@pytest.mark.parametrize('mixed, best', [(80., 'bf16+fp32'), (99., 'bf16')])
def test_it_wins_by_the_margin_only(has, fake_layers, monkeypatch, capsys, mixed, best):
    has('bf16'); fake_layers(lambda m, f: 1. if f == depthwise(m) else 2.)
    real = train_benchmark.step_ms
    def _ms(learn, batch):
        real(learn, batch)
        mp = learn._grab_cbs(MixedPrecision)
        if not mp: return 140.
        return mixed if mp[0].fp32_layers else 100. if learn._grab_cbs(ChannelsLast) else 130.
    monkeypatch.setattr(train_benchmark, 'step_ms', _ms)
    learn = learner(net())
    for _ in range(2):
        assert learn.to_fastest(num_it=3, optimizer=False) is learn
        assert learn.format_timings.best.precision == best and len(learn._grab_cbs(MixedPrecision)) == 1
        assert learn.mixed_precision.fp32_layers == (('2',) if '+' in best else ())
        assert capsys.readouterr().out.strip().splitlines()[-1].endswith(f'channels last, {best}: {140/(mixed if "+" in best else 100):.2f}× as fast as contiguous fp32.')
    learn.fit(1)


@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_on_cuda(mode):
    m = Uses()
    learner(m, loaders().to(torch.device('cuda'))).to_channelslast(amp_mode=mode, fp32_layers='two').fit(1)
    assert {t[:3] for t in m.two.types} == {(torch.float32,)*3}


def test_classes_and_modules_are_names_too():
    m = convnet()
    assert resolve_layers(m, nn.Conv2d) == ['0', '3', '5'] and resolve_layers(m, (nn.Linear, nn.BatchNorm2d)) == ['1', '8']
    assert resolve_layers(m, m[3]) == ['3'] == resolve_layers(m, [m[3]])
    with pytest.raises(ValueError, match='no module'): resolve_layers(m, nn.Conv2d(1, 1, 1))
