"Candidates' numbers compared with contiguous fp32: wrong kernels are found, right ones pass."
import pytest
import torch
import torchvision
from fastai.vision.all import DataLoader, DataLoaders, Learner, SGD
from torch import nn

from channelslast.core.memory_format import format_strides
from channelslast.find.candidates import Candidate
from channelslast.find.number_check import not_finite
from channelslast.find.train_benchmark import TrainBenchmark, load_batches
from channelslast.learner.preserve_learner import preserve_learner
from .conftest import convnet, learner

ALL = [(f, p) for f in ('contiguous', 'channels_last') for p in ('fp32', 'bf16')]


def checked(learn, pairs=ALL) -> dict:
    "The candidates by format and precision, after the number check alone."
    candidates = [Candidate(f, p, {}) for f, p in pairs]
    with preserve_learner(learn, eager=False) as originals:
        batches, _ = load_batches(learn, learn.dls.train)
        if learn.opt is None: learn.create_opt()
        learn.opt.set_hypers(lr=0.)
        learn.n_iter = 1
        benchmark = TrainBenchmark(learn, candidates, batches, originals, lambda n: None)
        benchmark.check_numbers()
    return {c.key[:2]: c for c in candidates}


class Spoil(torch.autograd.Function):
    "The identity with a changed gradient."
    @staticmethod
    def forward(ctx, x, f): ctx.f = f; return x.clone()
    @staticmethod
    def backward(ctx, g): return ctx.f(g), None


def one_row(g):
    "One output channel gets the gradient of its neighbor."
    g, i = g.clone(), g.flatten(1).norm(dim=1).argmax()
    g[i] = g[i - 1] if len(g) > 1 else -g[i]
    return g

def garbage(by):
    def _garbage(g):
        g = g.clone()
        g[:1] = g.norm()/g.numel()**0.5*by
        return g
    return _garbage

GRADIENTS = dict(zero=torch.zeros_like, doubled=lambda g: 2*g, half=lambda g: g/2, negative=lambda g: -g, row=one_row, flipped=lambda g: g.flip(0, -1),
                 garbage=garbage(1), much=garbage(1e6), nan=garbage(float('nan')))
RESULTS = dict(zero_result=lambda y: y*0, doubled_result=lambda y: 2*y, flipped_result=lambda y: y.flip(1), nan_result=lambda y: y*float('nan'),
               channel_result=lambda y: torch.cat([y[:, :1]*3 + y.std(), y[:, 1:]], 1))


def spoil(conv, how, when):
    "Make a convolution compute wrong results or weight gradients if `when(conv)`."
    real = conv._conv_forward
    def _conv_forward(x, weight, bias):
        if not when(conv): return real(x, weight, bias)
        if how == 'detached': return real(x, weight.detach(), bias)
        if how in RESULTS: return RESULTS[how](real(x, weight, bias))
        return real(x, Spoil.apply(weight, GRADIENTS[how]), bias)
    conv._conv_forward = _conv_forward


def in_half(m): return torch.is_autocast_enabled('cpu')
def in_last(m): return m.weight.stride() == format_strides(m.weight.shape)


def images(model, size=32, n=8):
    "A Learner that trains on random images."
    x, y = torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))
    dl = DataLoader(list(zip(x, y)), bs=n)
    return Learner(DataLoaders(dl, dl), model, nn.CrossEntropyLoss(), opt_func=SGD)


class Residual(nn.Module):
    "Three convolutions, one of them in a branch that hardly affects the loss."
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    def forward(self, x):
        x = self.one(x)
        return self.head(self.three(x + 0.1*self.two(x.relu())))


MODELS = dict(residual=Residual, resnet18=lambda: torchvision.models.resnet18(num_classes=10),
              mobilenet_v2=lambda: torchvision.models.mobilenet_v2(num_classes=10, dropout=0.))


def convs_of(model): return [m for m in model.modules() if isinstance(m, nn.Conv2d)]

# not `channel_result` in the branch: it changes the loss and later results by less than rounding in bf16
CASES = [('residual', i, [*GRADIENTS, *{*RESULTS} - {'channel_result' if i == 1 else ''}, 'detached']) for i in range(3)] + [
    ('resnet18', 1, ['zero', 'row']), ('resnet18', 10, ['doubled', 'channel_result']), ('resnet18', 19, ['flipped']),
    ('mobilenet_v2', 1, ['zero', 'row']), ('mobilenet_v2', 25, ['doubled', 'garbage']), ('mobilenet_v2', 51, ['detached', 'flipped'])]


@pytest.mark.parametrize('when', [in_half, in_last])
@pytest.mark.parametrize('name, i, hows', CASES)
def test_each_wrong_kernel_is_caught(has, name, i, hows, when):
    has('bf16')
    pairs = [('contiguous', 'fp32'), ('contiguous', 'bf16') if when is in_half else ('channels_last', 'fp32')]
    for how in hows:
        torch.manual_seed(0)
        learn = images(MODELS[name]())
        spoil(convs_of(learn.model)[i], how, when)
        c = checked(learn, pairs)[pairs[1]]
        assert not c.valid and not c.running and ('finite' in c.note or 'numbers differ' in c.note), (how, c.note, c.grad_diff)


@pytest.mark.parametrize('name', MODELS)
def test_right_kernels_are_valid(has, name):
    "Even where rounding is amplified: the differences are explained by replay; a constant would have to be too large."
    has('bf16')
    torch.manual_seed(0)
    for c in checked(images(MODELS[name]())).values(): assert c.valid and c.running, c.note


def test_the_fault_is_named(has):
    has('bf16')
    learn = images(Residual())
    spoil(learn.model.two, 'zero', in_half)
    assert checked(learn)['contiguous', 'bf16'].note == 'numbers differ from contiguous fp32 (gradient of two.weight)'
    spoil(learn.model.three, 'doubled_result', in_half)
    assert checked(learn)['channels_last', 'bf16'].note == 'numbers differ from contiguous fp32 (result of head.2)'


# gradients of any kind

class Waves(nn.Module):
    "A convolution, then a product in the frequency domain with complex weights."
    def __init__(self, wrong=False):
        super().__init__()
        self.conv, self.head, self.wrong = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), wrong
        self.weight = nn.Parameter(torch.randn(8, 6, 4, dtype=torch.complex64))
    def forward(self, x):
        x = self.conv(x)
        w = Spoil.apply(self.weight, lambda g: g.real + 0j) if self.wrong and in_last(self.conv) else self.weight
        return self.head(torch.fft.irfft2(torch.fft.rfft2(x)*w).relu().mean((2, 3)))


@pytest.mark.parametrize('wrong', [False, True])
def test_complex_gradients_are_compared_whole(has, wrong):
    "Including their imaginary part."
    has()
    c = checked(images(Waves(wrong), 8), [('contiguous', 'fp32'), ('channels_last', 'fp32')])['channels_last', 'fp32']
    assert c.valid != wrong and (c.grad_diff > 0.01) == wrong
    if wrong: assert 'gradient of weight' in c.note


class Unused(nn.Module):
    "One layer without a gradient in any format, and one whose gradient is zero."
    def __init__(self):
        super().__init__()
        self.net, self.unused, self.dead = convnet(), nn.Linear(3, 3), nn.Linear(3, 3)
    def forward(self, x): return self.net(x) + 0*self.dead(x.mean((2, 3))).sum()


def test_layers_without_gradients(has):
    has('bf16')
    assert all(c.valid for c in checked(learner(Unused())).values())


class KeepsGraph(nn.Module):
    "Keeps a result of its parameters with its graph in eval mode, as LeViT does."
    def __init__(self):
        super().__init__()
        self.net, self.bias, self.cache = convnet(), nn.Parameter(torch.zeros(4)), {}
    def forward(self, x):
        if self.training: return self.net(x) + self.bias.exp()
        if 'bias' not in self.cache: self.cache['bias'] = self.bias.exp()
        return self.net(x) + self.cache['bias']


def test_a_model_that_keeps_its_graph(has):
    has('bf16')
    learn = learner(KeepsGraph())
    assert all(c.valid for c in checked(learn).values()) and not learn.model.cache


# not finite

def test_not_finite():
    a, b = torch.ones(2), torch.tensor([1., float('inf')])
    assert not_finite([('a', a), ('n', None)]) == not_finite([]) == '' and not_finite([('a', a), ('b', b), ('c', b)]) == 'b'


class InfiniteGradient(nn.Module):
    "A finite loss with infinite gradients in bf16."
    def forward(self, x): return Spoil.apply(x, lambda g: g*float('inf')) if x.dtype == torch.bfloat16 else x


class BadStatistics(nn.Module):
    "A buffer becomes NaN in bf16."
    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(3))
        self.register_buffer('mask', torch.full((3,), -float('inf')))
    def forward(self, x):
        if x.dtype == torch.bfloat16 and self.training: self.seen += float('nan')
        return x


@pytest.mark.parametrize('bad, note', [(InfiniteGradient, 'gradient of 0.weight is not finite'), (BadStatistics, '1.seen is not finite')])
@pytest.mark.parametrize('fitted', [False, True])
def test_one_candidates_infinity_is_healed_before_the_next(has, bad, note, fitted):
    "A step at learning rate 0 turns the weights into NaN: 0·inf."
    has('bf16')
    net = nn.Sequential(nn.Conv2d(3, 8, 3), bad(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = learner(net)
    if fitted and bad is InfiniteGradient: learn.fit(1)
    t = learn.format_find(num_it=1, show_plot=False, layers=False)
    by = {(r.memory_format, r.precision): r for r in t.rows}
    assert note in by['contiguous', 'bf16'].note and note in by['channels_last', 'bf16'].note
    assert by['channels_last', 'fp32'].valid and not by['channels_last', 'fp32'].note  # runs after contiguous bf16
    assert by['contiguous', 'fp32'].valid and by['contiguous', 'fp32'].ms and not t.rows[0].note
    assert not by['contiguous', 'bf16'].valid and all(p.isfinite().all() for p in learn.model.parameters())


def test_what_the_last_warm_up_found_ends_with_it(has, monkeypatch):
    "The rounds that follow restore nothing."
    has('bf16')
    restored, real = [], TrainBenchmark.restore_tensors
    monkeypatch.setattr(TrainBenchmark, 'restore_tensors', lambda self: (restored.append(1), real(self)))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), InfiniteGradient(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learner(net).format_find(num_it=4, show_plot=False, layers=False)
    assert len(restored) == 2  # once for each candidate in bf16


def test_a_failing_optimizer_is_healed(has):
    "Its step raises after it has changed the weights."
    has()
    class Bad(SGD(nn.Linear(1, 1).parameters(), lr=0.).__class__):
        def step(self, closure=None):
            for pg in self.param_lists:
                for p in pg:
                    p.data.fill_(float('nan')) if p.dim() == 4 and p.stride(1) == 1 and min(p.shape) > 1 else None
            if any(p.isnan().any() for pg in self.param_lists for p in pg): raise RuntimeError('no channels last here')
    learn = learner(opt_func=lambda params, **kw: Bad(params, [], lr=0.))
    t = learn.format_find(num_it=1, show_plot=False)
    assert t.rows[0].valid and 'no channels last' in t.rows[1].note and all(p.isfinite().all() for p in learn.model.parameters())


class Skips(nn.Module):
    "Gradients that overflow in fp16 at the scaler's initial scale, so that it skips the first steps."
    def forward(self, x): return Spoil.apply(x, lambda g: g*(float('inf') if g.abs().max() > 1e3 else 1)) if torch.is_autocast_enabled('cpu') else x


def test_a_step_that_the_scaler_skips_is_no_fault(has):
    has('fp16')
    learn = learner(nn.Sequential(nn.Conv2d(3, 8, 3), Skips(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    t = learn.format_find(num_it=2, show_plot=False, layers=False, precisions='fp16')
    assert all(r.valid for r in t.rows), t


# metrics

def viewed(p, y): return (p.view(len(p), -1).argmax(1) >= 0).float().mean()
def broken(p, y): raise KeyError('always')


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
    def forward(self, x): return self.conv(x)


def maps(): return DataLoaders(*[DataLoader([(torch.randn(3, 8, 8), torch.randint(0, 4, (8, 8))) for _ in range(16)], bs=8)]*2)


@pytest.mark.parametrize('train', [True, False])
def test_a_metric_that_fails_in_one_format_is_its_note(has, train):
    has('bf16')
    learn = Learner(maps(), Segments(), nn.CrossEntropyLoss(), metrics=[broken, viewed])
    t = learn.format_find(num_it=1, show_plot=False, layers=False, train=train)
    for r in t.rows:
        last = r.memory_format == 'channels_last'
        assert r.valid != last and ('metric viewed fails: RuntimeError: view size' in r.note) == last, r
    learn.to_fastest(num_it=1, train=train)
    assert not hasattr(learn, 'channels_last')


def test_metrics_keep_their_state(has):
    has()
    from fastai.vision.all import AccumMetric, accuracy
    learn = learner(metrics=[AccumMetric(accuracy, flatten=False)])
    learn.fit(1)
    before = [dict(vars(m)) for m in learn.metrics]
    learn.format_find(num_it=1, show_plot=False)
    assert [{k: id(v) for k, v in vars(m).items()} for m in learn.metrics] == [{k: id(v) for k, v in b.items()} for b in before]
