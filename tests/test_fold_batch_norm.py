"`FoldBatchNorm`: predictions keep their numbers, the model is restored, and folded weights are never stale."
import copyreg
import gc
import pickle
import random
import subprocess
import sys
import threading
import warnings
import weakref
from copy import copy, deepcopy

import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.vision.all import Callback, CancelBatchException, DynamicUnet, Learner, SGD, hook_outputs, load_learner, noop, partial
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from channelslast import ChannelsLast, FoldBatchNorm
from channelslast.command.reference_timing import set_running_statistics
from channelslast.core.compare import perturb, relative_error
from channelslast.find.candidates import apply_timing
from channelslast.find.results import Timing
from channelslast.fold import fold_batch_norm as module
from channelslast.fold.fold_trace import Pair
from .conftest import learner, loaders, shake
from .test_channels_last import image_folder

NORM = nn.modules.batchnorm._BatchNorm


def block(i, o, act=True, **kwargs): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **kwargs), nn.BatchNorm2d(o), *([nn.ReLU(True)] if act else []))


class Net(nn.Module):
    "Two pairs of convolution and batch norm, a third pair connected by `between`, which each test sets, and a head."
    def __init__(self, between=None, c=3):
        super().__init__()
        self.one, self.two = block(c, 8, bias=False), block(8, 8, act=False)
        self.conv, self.norm, self.head = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.between = between or (lambda self, x: self.norm(self.conv(x)))
        shake(self)
    def forward(self, x): return self.head(self.between(self, self.two(self.one(x))).mean((2, 3)))


def preds(learn, **kwargs): return learn.get_preds(act=noop, **kwargs)[0]


def check(model, folded=None, found=None, dtype=torch.float64, tol=1e-10, dls=None, warns=False, **kwargs):
    "Check that the first and later predictions equal those of the unfolded model. Returns the Learner."
    learn = learner(model.to(dtype), dls or loaders(dtype=dtype), **kwargs)
    truth = preds(learn)
    before = state(model)
    learn.add_cb(FoldBatchNorm())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(2): assert relative_error(preds(learn), truth) <= tol
    assert [str(o.message) for o in told if 'FoldBatchNorm' in str(o.message)] == [] or warns
    assert same_state(before, state(model))
    cb = learn.fold_batch_norm
    assert folded in (None, cb.folded) and found in (None, cb.found), (cb.folded, cb.found)
    return learn


def state(model):
    "Everything that a model holds, with identities and memory addresses."
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return ([(n, id(t), t.data_ptr(), t.stride(), t.dtype, t.requires_grad, t._version) for n, t in tensors], [t.clone() for _, t in tensors],
            list(model.state_dict()), [(id(m), m.training, sorted(vars(m)), list(m._parameters), list(m._forward_hooks), list(m._forward_pre_hooks),
                                        vars(m).get('forward'), getattr(m, 'stride', None)) for m in model.modules()])


def same_state(a, b): return a[0] == b[0] and a[2:] == b[2:] and all(torch.equal(x, y) for x, y in zip(a[1], b[1]))


# what is folded

def tap(f):
    "The third pair, with `f(self, y, z)` also reading the convolution's output `y`."
    def _between(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return f(self, y, z)
    return _between


KEPT = []
BETWEEN = {
    'added': (tap(lambda self, y, z: z + y), 2), 'concatenated': (tap(lambda self, y, z: torch.cat([z, y], 1)[:, :8]), 2),
    'view': (tap(lambda self, y, z: z + y[:, :1]), 2), 'number': (tap(lambda self, y, z: z*y.flatten()[0].item()), 2),
    'detached': (tap(lambda self, y, z: z + y.detach().numpy().mean()), 2), 'kept': (tap(lambda self, y, z: (KEPT.append(y), z)[1]), 2),
    'a copy kept': (tap(lambda self, y, z: (KEPT.append(y.float()), z)[1]), 2),
    'changed in place': (lambda self, x: self.norm(self.conv(x).relu_()), 2), 'activation between': (lambda self, x: self.norm(self.conv(x).relu()), 2),
    'a part': (lambda self, x: self.norm(torch.cat([self.conv(x)[:, :4]]*2, 1)), 2), 'shape alone': (tap(lambda self, y, z: z*y.shape[1]), 3),
    'deleted': (tap(lambda self, y, z: z), 3), 'keyword': (lambda self, x: self.norm(input=self.conv(x)), 2),
    'twice the norm': (lambda self, x: self.norm(self.norm(self.conv(x))), 2), 'twice the conv': (lambda self, x: self.norm(self.conv(self.conv(x))), 2),
    'both twice': (lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))), 2), 'the weight elsewhere': (tap(lambda self, y, z: z + self.conv.weight.mean()), 3),
    'without call': (lambda self, x: self.norm.forward(self.conv.forward(x)), 2), 'order of registration': (lambda self, x: self.conv(self.norm(x)), 2)}


@pytest.mark.parametrize('name', BETWEEN)
def test_what_reads_the_convolution(name):
    f, folded = BETWEEN[name]
    check(Net(f), folded)
    KEPT.clear()


def test_the_same_in_fp32():
    for f, folded in BETWEEN.values(): check(Net(f), folded, dtype=torch.float32, tol=1e-5)
    KEPT.clear()


@pytest.mark.parametrize('hooked', ['conv', 'norm', 'Sequential of the conv', 'Sequential of the norm', 'pre', 'pre of the norm', 'backward', 'outside'])
def test_users_hooks(hooked):
    seen, m = [], Net()  # a hook may do anything with a tensor
    m.conv, m.norm = nn.Sequential(m.conv), nn.Sequential(m.norm)
    hook, one = (lambda m, i, o: seen.append((i[0].shape, o.shape))), dict(conv=m.conv[0], norm=m.norm[0])
    if hooked == 'pre': m.conv[0].register_forward_pre_hook(lambda m, i: None)
    elif hooked == 'pre of the norm': m.norm.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape))
    elif hooked == 'backward': m.norm[0].register_full_backward_hook(lambda m, i, o: None)
    elif hooked == 'outside': m.two.register_forward_hook(hook)
    else: one.get(hooked, m.conv if hooked.endswith('conv') else m.norm).register_forward_hook(hook)
    check(m, 3 if hooked == 'outside' else 2, 3)


def test_what_hooks_see_is_what_they_saw():
    m = Net()
    learn = check(m, 3)
    for layer in m.conv, m.one, m.norm:
        with hook_outputs([layer]) as h:
            truth = []
            for on in False, True:
                if not on: learn.remove_cb(FoldBatchNorm)
                else: learn.add_cb(FoldBatchNorm())
                preds(learn); preds(learn)
                truth.append(h.stored[0].clone())
        assert relative_error(*truth) < 1e-10


def test_global_hooks():
    m = Net()
    learn, seen = check(m, 3), []
    h = nn.modules.module.register_module_forward_hook(lambda m_, i, o: seen.append(o.clone()) if m_ is m.conv else None)
    try:
        preds(learn)
        preds(learn.remove_cb(FoldBatchNorm))
    finally: h.remove()
    assert len(seen) == 8 and all(map(torch.equal, seen[:4], seen[4:]))


def test_each_dimension_and_class():
    class Dims(nn.Module):
        def __init__(self):
            super().__init__()
            self.c3, self.n3 = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)
            self.c2, self.n2 = nn.Conv2d(4, 8, 3, padding=1, padding_mode='reflect', groups=2, stride=2), nn.SyncBatchNorm(8)
            self.c1, self.n1, self.head = nn.Conv1d(8, 8, 3, padding='same', dilation=2, bias=False), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 4)
        def forward(self, x):
            x = self.n3(self.c3(x[:, :, None])).mean(2)
            return self.head(self.n1(self.c1(self.n2(self.c2(x)).mean(2))).mean(2))
    check(shake(Dims()), 3, 3)


class Doubled(nn.Conv2d):
    def forward(self, x): return self._conv_forward(x, self.weight*2, self.bias)
class Same(nn.Conv2d):
    def forward(self, x): return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)
class Act(nn.BatchNorm2d):
    "As in timm."
    def __init__(self, n): super().__init__(n); self.act, self.drop = nn.ReLU(True), nn.Identity()
    def forward(self, x): return self.act(self.drop(super().forward(x)))
class Shifted(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x) + 1
class Skip(Act):
    def forward(self, x): return self.act(x) + super().forward(x)
class Other(nn.BatchNorm2d):
    def __init__(self, n): super().__init__(n); self.register_buffer('mean', torch.ones(n))
    def forward(self, x): return nn.functional.batch_norm(x, self.mean, self.running_var, self.weight, self.bias)
class Side(Act):
    def __init__(self, n): super().__init__(n); self.act = nn.ReLU()
    def forward(self, x):
        self.act(self.running_var)
        return self.drop(nn.BatchNorm2d.forward(self, x))


def writes_in_eval():
    "True if instance norm changes the version of its running statistics in eval mode, as in PyTorch 2.6."
    norm = nn.InstanceNorm2d(4, track_running_stats=True).eval()
    before = norm.running_mean._version
    norm(torch.randn(2, 4, 3, 3))
    return norm.running_mean._version != before


@pytest.mark.parametrize('conv, norm, folded', [
    (Doubled, nn.BatchNorm2d, 2), (Same, nn.BatchNorm2d, 3), (nn.Conv2d, Act, 3), (nn.Conv2d, Shifted, 2), (nn.Conv2d, Skip, 2), (nn.Conv2d, Other, 2), (nn.Conv2d, Side, 2),
    (nn.ConvTranspose2d, nn.BatchNorm2d, 2), pytest.param(nn.Conv2d, partial(nn.InstanceNorm2d, affine=True, track_running_stats=True), 2,
        marks=pytest.mark.skipif(writes_in_eval(), reason='instance norm of this PyTorch writes in eval mode')),
    (nn.Conv2d, partial(nn.BatchNorm2d, track_running_stats=False), 2), (nn.Conv2d, partial(nn.BatchNorm2d, affine=False, eps=0.1), 3)])
def test_subclasses_and_look_alikes(conv, norm, folded):
    m = Net()
    m.conv, m.norm = conv(8, 8, 3), norm(8)
    check(shake(m), folded)


@pytest.mark.parametrize('wrap', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings('ignore')
def test_parametrized(wrap):
    m = Net()
    wrap(m.conv)
    check(m, 2, 3)
    m = Net()
    learn = check(m, 3)
    wrap(m.conv)  # after the first predictions
    truth = preds(learn.remove_cb(FoldBatchNorm))
    learn.add_cb(FoldBatchNorm())
    assert relative_error(preds(learn), truth) < 1e-10 and learn.fold_batch_norm.folded == 2


def test_parametrized_between_two_predictions():
    m = Net()
    learn = check(m, 3)
    nn.utils.parametrize.register_parametrization(m.norm, 'weight', nn.Tanh())
    with torch.no_grad(): truth = m.eval()(learn.dls.valid.one_batch()[0])
    assert relative_error(preds(learn)[:8], truth) < 1e-10 and learn.fold_batch_norm.folded == 2


def test_forwards_that_somebody_replaced():
    m = Net()
    own = m.norm.forward
    m.norm.forward = replaced = lambda x: own(x)*2
    check(m, 2, 3)
    assert m.norm.forward is replaced


@pytest.mark.parametrize('counts', [True, False])
def test_in_training_mode(counts):
    "A batch norm kept in training mode writes its running statistics, so a second pass would write them twice."
    class Train(Callback):
        order = 5
        def before_validate(self): self.model.norm.train()
    got = []
    for fold in False, True:
        torch.manual_seed(0)
        learn = learner(Net(), loaders(), cbs=[Train(), FoldBatchNorm()] if fold else Train())
        if not counts: learn.model.norm.num_batches_tracked = None
        got.append([preds(learn), learn.model.norm.running_mean])
    assert all(map(torch.equal, *got)) and learn.fold_batch_norm.folded == 0


# the model is restored

def test_random_states_and_passes():
    "Dropout that stays active in eval mode draws the same numbers with and without folding."
    class Drops(Net):
        def forward(self, x): return super().forward(nn.functional.dropout(x, random.random()/2 + np.random.rand()/4, True))
    torch.manual_seed(0)
    m, dls, got = Drops(), loaders(), []
    for fold in False, True:
        learn = learner(m, dls, cbs=FoldBatchNorm() if fold else None)
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        got.append([preds(learn), torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())])
    assert learn.fold_batch_norm.folded == 3 and all(relative_error(a, b) < 1e-5 for a, b in zip(*got))


def test_a_module_of_another_thread_ends_while_the_pass_is_traced():
    started, tracing = threading.Event(), threading.Event()
    class Other(nn.Module):
        def forward(self, x):
            started.set()
            assert tracing.wait(10)
            return x
    class First(nn.Module):
        def forward(self, x):
            tracing.set()
            thread.join()
            return x
    other = Other()
    other.register_forward_hook(lambda *args: None)  # PyTorch then looks for hooks on all modules when it ends
    thread = threading.Thread(target=other, args=(torch.ones(1),))
    thread.start()
    assert started.wait(10)
    learn = learner(shake(nn.Sequential(First(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))))
    learn.add_cb(FoldBatchNorm())
    learn.get_preds()
    assert (learn.fold_batch_norm.folded, learn.fold_batch_norm.found) == (1, 1)


@pytest.mark.filterwarnings('ignore:.*stays unfolded')
def test_a_pass_that_fails(monkeypatch):
    "Only the folded pass fails."
    def _fail(*args):
        torch.rand(1)
        raise ValueError
    monkeypatch.setattr(module.FoldedWeights, 'run', _fail)
    learn = learner(Net(), cbs=FoldBatchNorm())
    state = torch.get_rng_state()
    truth = preds(learn)
    after, _ = torch.get_rng_state(), torch.set_rng_state(state)
    assert torch.equal(preds(learn.remove_cb(FoldBatchNorm)), truth) and torch.equal(after, torch.get_rng_state())


def test_what_the_pass_leaves_on_the_model():
    "Attributes that the second pass over the first batch changes are restored."
    class Counts(Net):
        calls, seen = 0, ()
        def forward(self, x):
            self.calls, self.seen = self.calls + 1, (*self.seen, len(x))
            return super().forward(x)
    m = Counts()
    learner(m, cbs=FoldBatchNorm()).get_preds()
    assert m.calls == 4 and m.seen == (8,)*4


@pytest.mark.parametrize('what', ['buffer', 'input'])
def test_a_pass_that_writes(what):
    class Writes(Net):
        def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(1))
        def forward(self, x):
            self.n.add_(1) if what == 'buffer' else x.mul_(2)
            return super().forward(x) + self.n
    m, dls = Writes(), loaders()
    got = []
    for fold in False, True:
        m.n.zero_()
        learn = learner(m, dls, cbs=FoldBatchNorm() if fold else None)
        got.append(preds(learn))
    assert torch.equal(*got) and learn.fold_batch_norm.folded == 0


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException])
@pytest.mark.parametrize('where', ['layer', 'after_pred', 'after_loss', 'loss'])
def test_no_trace_however_it_ends(error, where):
    class Raises(nn.Module):
        on = False
        def forward(self, x):
            if Raises.on and where == 'layer': raise error('boom')
            return x
    class Stop(Callback):
        order = 50
    def _stop(self=None):
        if Raises.on: raise error('boom')
    if where in ('after_pred', 'after_loss'): setattr(Stop, where, _stop)
    m = nn.Sequential(block(3, 8), Raises(), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = learner(shake(m), cbs=[FoldBatchNorm(), Stop()]).to_channelslast(to_fp16=False)
    loss = learn.loss_func
    learn.loss_func = lambda p, y: (_stop() if where == 'loss' else None, loss(p, y))[1]
    learn.validate()
    before, Raises.on = state(m), True
    if error is CancelBatchException: learn.validate()
    else:
        with pytest.raises(error): learn.validate()
    assert learn.fold_batch_norm.folded == 2 and same_state(before, state(m)) and not any('forward' in vars(o) for o in m.modules())


def test_training_steps_are_what_they_were():
    got = []
    for fold in False, True:
        torch.manual_seed(0)
        learn = learner(Net(), loaders(), cbs=FoldBatchNorm() if fold else None)
        learn.fit(2)
        got.append([torch.tensor(learn.recorder.losses), *learn.model.parameters(), *learn.model.buffers()])
        metrics = [torch.tensor(o) for o in learn.recorder.values]
        got[-1] = got[-1], metrics
    assert all(map(torch.equal, got[0][0], got[1][0])) and all(relative_error(a, b) < 1e-5 for a, b in zip(got[0][1], got[1][1]))


def test_in_force_while_the_model_runs_alone():
    m, seen = Net(), []
    class Look(Callback):
        order = 90
        def after_pred(self): seen.append([n for n, o in m.named_modules() if 'forward' in vars(o)])
    learn = learner(m, cbs=[FoldBatchNorm(), Look()])
    learn.get_preds(); learn.fit(1)
    assert set(map(tuple, seen)) == {('',), ()} and not any('forward' in vars(o) for o in m.modules())


def test_models_that_callbacks_call_with_gradients():
    m, grads = Net(), []
    class Saliency(Callback):
        def after_pred(self):
            if self.training: return
            with torch.enable_grad(): grads.append(torch.autograd.grad(self.model(self.x.clone().requires_grad_()).sum(), self.model.conv.weight))
    learner(m, cbs=[FoldBatchNorm(), Saliency()]).get_preds()
    assert len(grads) == 4 and all(g.abs().sum() > 0 for g, in grads)


# never stale

def fresh(learn):
    "True if the Learner's predictions are those of its model's current weights."
    with torch.no_grad():
        learn.model.eval()
        truth = torch.cat([learn.model(learn._set_device(b)[0]) for b in learn.dls.valid])
    return relative_error(preds(learn).double(), truth.double()) < 1e-5


def outside(learn, opt, **kwargs):
    "Train without the Learner."
    learn.model.train()
    opt = opt(learn.model.parameters(), lr=0.1, **kwargs)
    learn.model(learn.dls.one_batch()[0]).square().sum().backward()
    opt.step()
    opt.zero_grad()


@torch.no_grad()
def in_place(learn): learn.model.conv.weight.mul_(2); learn.model.norm.bias.add_(1); learn.model.two[0].bias.zero_()


def other_data(learn):
    "Assign new memory until it lies at the first address again."
    w = learn.model.conv.weight
    at = w.data_ptr()
    for _ in range(10000):
        w.data = torch.randn_like(w)
        if w.data_ptr() == at: break


def loads(learn): learn.save('a'); in_place(learn); preds(learn); learn.load('a')


class Frozen(Callback):
    "Running statistics stay; weights change through `p.data`, which no version counter sees."
    def before_train(self): self.model.apply(lambda m: m.eval() if isinstance(m, NORM) else m)


CHANGES = {
    'fit': lambda learn: learn.fit(1, 0.1), 'a fit of SGD': lambda learn: (setattr(learn, 'opt_func', SGD), learn.create_opt(), learn.fit(1, 0.1)),
    'weights': in_place, 'p.data = …': other_data, 'load': loads, 'statistics': lambda learn: learn.model.norm.running_var.mul_(3),
    'load_state_dict': lambda learn: learn.model.load_state_dict(Net().state_dict()),
    'assign': lambda learn: learn.model.load_state_dict(Net().state_dict(), assign=True), 'eps': lambda learn: setattr(learn.model.norm, 'eps', 1.),
    'channels last': lambda learn: learn.to_channelslast(to_fp16=False), 'contiguous': lambda learn: (learn.to_channelslast(to_fp16=False), preds(learn), learn.to_contiguous()),
    'a fit that leaves statistics alone': lambda learn: learn.fit(1, 0.1, cbs=Frozen()), 'freeze': lambda learn: (learn.freeze(), learn.fit(1, 0.1)), 'a new layer': lambda learn: setattr(learn.model, 'conv', nn.Conv2d(8, 8, 3)),
    'a new batch norm': lambda learn: setattr(learn.model, 'norm', shake(nn.BatchNorm2d(8))), 'model': lambda learn: setattr(learn, 'model', Net()),
    'an identity': lambda learn: setattr(learn.model, 'norm', nn.Identity()), 'statistics gone': lambda learn: setattr(learn.model.norm, 'running_var', None) or setattr(learn.model.norm, 'running_mean', None),
    'another order': lambda learn: setattr(learn.model, 'between', lambda self, x: self.conv(self.norm(x))),
    'a bias': lambda learn: setattr(learn.model.one[0], 'bias', nn.Parameter(torch.randn(8))), 'no bias': lambda learn: setattr(learn.model.two[0], 'bias', None),
    'batches counted': lambda learn: (learn.model.train(), learn.model(learn.dls.one_batch()[0]*3)), 'forget': lambda learn: (learn.model.conv.weight.data.mul_(2), learn.fold_batch_norm.forget()),
    'Adam': lambda learn: outside(learn, torch.optim.Adam), 'foreach': lambda learn: outside(learn, torch.optim.SGD, foreach=True), 'fused': lambda learn: outside(learn, torch.optim.AdamW, fused=True)}


@pytest.mark.parametrize('name', CHANGES)
@pytest.mark.filterwarnings('ignore:.*stays unfolded')
def test_never_stale(name, tmp_path):
    learn = learner(Net(), cbs=FoldBatchNorm(), path=tmp_path)
    assert fresh(learn) and learn.fold_batch_norm.folded == 3 and fresh(learn)
    first = preds(learn)
    CHANGES[name](learn)
    assert fresh(learn) and fresh(learn)
    assert relative_error(preds(learn), first) > 1e-4 or name in ('channels last', 'contiguous', 'load')


def test_between_two_predictions_nothing_is_prepared(monkeypatch):
    made = []
    real = module.FoldedWeights
    monkeypatch.setattr(module, 'FoldedWeights', lambda plan: made.append(plan) or real(plan))
    learn = learner(Net(), cbs=FoldBatchNorm())
    for _ in range(3): preds(learn)
    assert len(made) == 1
    learn.fit(2)
    assert len(made) == 3


def test_a_switch_of_what_the_model_runs():
    class Switch(Net):
        features = False
        def forward(self, x):
            if not self.features: return super().forward(x)
            y = self.conv(self.one(x))
            return self.head(self.norm(y).mean((2, 3))) + y.mean()
    m = Switch()
    m.features = False
    learn = learner(m, cbs=FoldBatchNorm())
    assert fresh(learn) and learn.fold_batch_norm.folded == 3
    m.features = True
    assert fresh(learn) and learn.fold_batch_norm.folded == 1


def test_shapes():
    "A model may run other layers for other sizes. After many sizes with one plan, new sizes are not traced."
    class Sizes(Net):
        def forward(self, x):
            y = self.conv(self.one(x))
            z = self.norm(y)
            return self.head((z + y if x.shape[-1] > 10 else z).mean((2, 3)))
    learn = learner(Sizes(), cbs=FoldBatchNorm())
    for size, folded in (8, 2), (12, 1), (8, 2), (9, 2), (13, 1):
        learn.dls = loaders((3, size, size))
        assert fresh(learn)
        assert sum(isinstance(o, Pair) for o in learn.fold_batch_norm._folds.prepared.plan) == folded
    learn = learner(Net(), cbs=FoldBatchNorm())
    for size in range(8, 20):
        learn.dls = loaders((3, size, size))
        assert fresh(learn)
    plans, = learn.fold_batch_norm._folds.plans.values()
    assert len(plans) == module.MAX_SHAPES


# folding disables itself

class Diverges(Net):
    "Runs other layers for some data."
    def forward(self, x):
        x = self.two(self.one(x))
        y = self.conv(x)
        return self.head((self.norm(y) if not self.where(x) else self.way(x, y)).mean((2, 3)))
    way = lambda self, x, y: self.norm(y + 1)


@pytest.mark.parametrize('way', [lambda self, x, y: self.norm(y + 1), lambda self, x, y: self.norm(self.norm(y)), lambda self, x, y: y, lambda self, x, y: self.conv(y),
                                 lambda self, x, y: self.norm(self.conv(y)), lambda self, x, y: self.norm(x)])
def test_other_layers_for_other_data(way):
    m, n = Diverges(), []
    m.way, m.where = partial(way, m), lambda x: len(n) > 1
    learn = learner(m, loaders())
    class Count(Callback):
        def after_batch(self): n.append(0)
        def before_validate(self): n.clear()
    learn.add_cb(Count())
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    with pytest.warns(UserWarning, match='Diverges does not run the same layers') as told: found = preds(learn)
    assert relative_error(found, truth) < 1e-5 and learn.fold_batch_norm.folded == 0 and len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(preds(learn), truth)


@pytest.mark.parametrize('allowed', [10, 0])
def test_rounding_that_the_model_amplifies(monkeypatch, allowed):
    "Folding may change the output by a small multiple of what a rounding error of the input changes, not more."
    monkeypatch.setattr(module, 'AMPLIFICATION', allowed)
    set_running_statistics(model := torchvision.models.resnet50(num_classes=4), torch.randn(8, 3, 64, 64))  # with random weights, a batch's statistics amplify
    learn = learner(model, loaders((3, 64, 64), n=8))
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    with warnings.catch_warnings(record=True) as told: preds(learn)
    assert (learn.fold_batch_norm.folded, len(told)) == ((53, 0) if allowed else (0, 1))
    assert relative_error(preds(learn), truth) < 1e-3


def test_nudge():
    x = torch.cat([torch.randn(20_000), torch.arange(5.)])
    x = x[(x == x.round()) | (x.abs() > 1e-3)]  # no numbers that are too small for the eps of half precision
    for t in x, x.double(), x.half():
        a, b = perturb([t, 'word', torch.arange(3)], 0.)[0], perturb((t,), 1e-2)[0]
        moved = t != t.round()
        assert ((a > t) | (a < t))[moved].all() and 0.4 < (a > t)[moved].float().mean() < 0.6 and torch.equal(a[~moved], t[~moved])
        torch.testing.assert_close(a, t, rtol=2*torch.finfo(t.dtype).eps, atol=0)
        assert ((b - t).abs()/t.abs())[moved].min() > 0.005


def test_a_model_that_looks_closely_at_its_input(monkeypatch):
    "A model that fails on a perturbed input stays unfolded."
    monkeypatch.setattr(module, 'OUTPUT_TOLERANCE', {torch.float64: 0., torch.float32: 0.})
    class Looks(Net):
        def forward(self, x):
            if not torch.equal(x, x.round(decimals=2)): raise ValueError('hundredths only')
            return super().forward(x)
    dls = loaders(dtype=torch.float64)
    dls.valid.dataset = [(x.round(decimals=2), y) for x, y in dls.valid.dataset]
    learn = learner(Looks().double(), dls)
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    with pytest.warns(UserWarning, match='gives other outputs'): assert torch.equal(preds(learn), truth)
    assert torch.equal(preds(learn), truth) and learn.fold_batch_norm.folded == 0


def test_interrupted_before_the_comparison(monkeypatch):
    "A plan that was not verified is verified with the next batch."
    def _stop(*args): raise KeyboardInterrupt
    learn = learner(Net(), cbs=FoldBatchNorm())
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(module, 'relative_error', _stop)
        preds(learn)
    seen = []
    monkeypatch.setattr(module, 'relative_error', lambda a, b: (seen.append(1), relative_error(a, b))[1])
    preds(learn)
    assert seen and learn.fold_batch_norm.folded == 3


def test_a_mistake_in_a_model_that_amplifies(monkeypatch):
    "A relative error of 1e-3 is not rounding."
    from channelslast.fold import folded_weights as folding
    real = folding.fold
    monkeypatch.setattr(folding, 'fold', lambda pair: {k: v*(1 + 1e-3*torch.randn_like(v)) for k, v in real(pair).items()})
    set_running_statistics(model := torchvision.models.resnet50(num_classes=4), torch.randn(8, 3, 64, 64))  # with random weights, a batch's statistics amplify
    learn = learner(model, loaders((3, 64, 64), n=8), cbs=FoldBatchNorm())
    with pytest.warns(UserWarning, match='gives other outputs'): preds(learn)


def test_numbers_that_differ(monkeypatch):
    "One warning, which names the class; the model stays unfolded."
    from channelslast.fold import folded_weights as folding
    real = folding.fold
    monkeypatch.setattr(folding, 'fold', lambda pair: {k: v*(1 + 1e-4) for k, v in real(pair).items()})
    learn = learner(Net())
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    with pytest.warns(UserWarning, match='FoldBatchNorm: Net gives other outputs') as told:
        for _ in range(3): assert torch.equal(preds(learn), truth)
    assert len(told) == 1 and learn.fold_batch_norm.folded == 0


def test_difference():
    t = torch.tensor([1., float('nan'), float('inf')])
    assert relative_error((t, dict(a=t*2)), (t, dict(a=t*2))) == 0 and relative_error(t, t[:2]) == relative_error([], []) == relative_error(t, t.double()) == float('inf')
    assert relative_error(t, torch.tensor([1., 2., float('inf')])) == float('inf') and relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error([torch.ones(3), torch.tensor(2)], [torch.ones(3), torch.tensor(1)]) == 1 and relative_error(torch.ones(1)*1.5, torch.ones(1)) == 0.5
    assert relative_error([torch.ones(1), torch.tensor([1e-9])], [torch.ones(1), torch.zeros(1)]) < 1e-5


@pytest.mark.parametrize('out', [lambda a, b: (a, b), lambda a, b: dict(a=a, b=[b, None]), lambda a, b: [a, (b, 3)]])
def test_outputs_of_any_kind(monkeypatch, out):
    class Many(Net):
        def forward(self, x): return out(super().forward(x), self.two(self.one(x)).mean())
    class First(nn.Module):
        def forward(self, p, y): return torch.zeros(())
    learn = learner(Many())
    learn.loss_func = First()
    class Keep(Callback):
        order = -50
        def after_pred(self): kept.append(self.pred)
    kept = []
    learn.add_cb(Keep())
    learn.validate()
    learn.add_cb(FoldBatchNorm())
    learn.validate()
    assert learn.fold_batch_norm.folded == 1 and all(relative_error(a, b) < 1e-5 for a, b in zip(kept[:4], kept[4:]))


# with other callbacks

@pytest.mark.parametrize('layers, full', [(None, 0), ('one.0', 1), ('one', 1), (['norm', 'conv'], 1), ('norm', 0), (nn.Conv2d, 3), (nn.BatchNorm2d, 0), (nn.Linear, 0)])
@pytest.mark.filterwarnings('ignore')
def test_mixed_precision(has, layers, full):
    "Each layer runs in the same precision as unfolded; weights are cast once."
    has('bf16')
    m = Net()
    learn = learner(m).to_channelslast(amp_mode='bf16', fp32_layers=layers)
    truth, seen = preds(learn), {}
    learn.add_cb(FoldBatchNorm())
    real = nn.functional.conv2d
    def spy(x, w, b, *args): seen.setdefault(w.data_ptr(), []).append((w.dtype, b is not None and b.dtype)); return real(x, w, b, *args)
    preds(learn)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(nn.functional, 'conv2d', spy)
        found = preds(learn)
    assert relative_error(found, truth) < 3e-2 and found.dtype == truth.dtype == torch.float32 and learn.fold_batch_norm.folded == 3
    kinds = [o for o, *_ in seen.values()]
    assert len(seen) == 3 and kinds.count((torch.float32,)*2) == full and kinds.count((torch.bfloat16,)*2) == 3 - full
    prepared = learn.fold_batch_norm._folds.prepared
    assert (m.head in prepared.tensors) == (layers is not nn.Linear)
    w = learn.fold_batch_norm._folds.prepared.tensors[m.two[0]]['weight']
    assert w.stride() == m.two[0].weight.stride() and not any('forward' in vars(o) for o in m.modules())


@pytest.mark.filterwarnings('ignore')
def test_casts_are_exact(has):
    "Without batch norms, mixed precision computes the same bit for bit, and no weight is cast twice."
    has('bf16')
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4))
    m[6].weight = nn.Parameter(m[5].weight[:4].detach())
    learn = learner(m).to_channelslast(amp_mode='bf16')
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    assert torch.equal(preds(learn), truth) and torch.equal(preds(learn), truth) and learn.fold_batch_norm.folded == learn.fold_batch_norm.found == 0
    assert len(learn.fold_batch_norm._folds.prepared.tensors) == 4
    learn.to_contiguous(to_fp32=True)
    assert not hasattr(learn, 'fold_batch_norm') and not learn._grab_cbs(FoldBatchNorm)


@pytest.mark.filterwarnings('ignore')
def test_switches_of_precision_and_format(has):
    has('bf16')
    learn = learner(Net(), cbs=FoldBatchNorm())
    first = preds(learn)
    for change in (lambda: learn.to_channelslast(amp_mode='bf16'), lambda: learn.to_contiguous(), lambda: learn.to_fp32(), lambda: learn.to_channelslast(to_fp16=False)):
        change()
        for _ in range(2): assert relative_error(preds(learn), first) < (3e-2 if hasattr(learn, 'mixed_precision') else 1e-5)
        dtype = torch.bfloat16 if hasattr(learn, 'mixed_precision') else torch.float32
        assert {t.dtype for o in learn.fold_batch_norm._folds.prepared.tensors.values() for t in o.values()} == {dtype}


def test_unstrided_layers():
    m = nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    learn = check(shake(m), 1, cbs=ChannelsLast())
    assert m[0].stride == (2, 2)
    assert fresh(learn)


def test_half_models():
    m = Net().bfloat16()
    learn = learner(m, loaders(dtype=torch.bfloat16))
    learn.loss_func = lambda p, y: p.float().mean()
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    assert relative_error(preds(learn).float(), truth.float()) < 3e-2 and relative_error(preds(learn).float(), truth.float()) < 3e-2 and learn.fold_batch_norm.folded == 3


def test_inference_mode():
    learn = learner(Net(), cbs=FoldBatchNorm())
    truth = preds(learn)
    with torch.inference_mode(): assert relative_error(preds(learn), truth) < 1e-5 and learn.fold_batch_norm.folded == 3
    assert fresh(learn)
    learn = learner(Net(), cbs=FoldBatchNorm())
    with torch.inference_mode(): preds(learn); preds(learn)
    assert learn.fold_batch_norm.folded == 3 and fresh(learn)


def test_weights_made_in_inference_mode():
    with torch.inference_mode(): m = Net()
    learn = learner(m, cbs=FoldBatchNorm())
    with torch.inference_mode(): assert fresh(learn)
    assert learn.fold_batch_norm.folded == 0 and learn.fold_batch_norm.found == 3


def test_tta_and_unet():
    m = DynamicUnet(nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 16), nn.MaxPool2d(2), block(16, 16)), 4, (16, 16))
    class Pool(nn.Module):
        def forward(self, x): return x.mean((2, 3))
    learn = check(shake(nn.Sequential(m, Pool())), dls=loaders((3, 16, 16), dtype=torch.float64))
    assert learn.fold_batch_norm.folded >= 3
    learn.remove_cb(FoldBatchNorm)


@pytest.mark.parametrize('wrap', ['compile', 'a compiled part', 'compile in place', 'DataParallel', 'script', 'a scripted part'])
@pytest.mark.filterwarnings('ignore')
def test_compiled_and_wrapped_models_stay_unfolded(wrap):
    m = nn.Sequential(block(3, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    shake(m).eval()
    backend = dict(backend='eager')
    if wrap == 'a compiled part': m[0] = torch.compile(m[0], **backend)
    if wrap == 'compile in place': m[1].compile(**backend)
    if wrap == 'a scripted part': m[0] = torch.jit.script(m[0])
    wrapped = {'compile': lambda: torch.compile(m, **backend), 'DataParallel': lambda: nn.DataParallel(m), 'script': lambda: torch.jit.script(m)}.get(wrap, lambda: m)()
    learn = learner(wrapped)
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    assert torch.equal(preds(learn), truth) and torch.equal(preds(learn), truth) and not learn.fold_batch_norm.folded


# memory, copies, exports

def test_freed():
    learn = learner(Net(), cbs=(cb := FoldBatchNorm()))
    preds(learn)
    refs = [weakref.ref(t) for o in cb._folds.prepared.tensors.values() for t in o.values()]
    model = weakref.ref(learn.model)
    assert len(refs) == 6 and all(r() is not None for r in refs)
    learn.remove_cb(cb)
    assert not any(r() is not None for r in refs)
    learn.model = None
    learn.opt = None
    gc.collect()
    assert model() is None
    cb.learn = None


def test_temporary():
    learn = learner(Net())
    truth = preds(learn)
    assert relative_error(preds(learn, cbs=FoldBatchNorm()), truth) < 1e-5 and not hasattr(learn, 'fold_batch_norm')
    assert (learn.validate(cbs=FoldBatchNorm())[0] - learn.validate()[0]) < 1e-5


class Own(FoldBatchNorm): "A user's subclass."


def test_copies():
    learn = learner(Net(), cbs=FoldBatchNorm())
    preds(learn)
    twin = deepcopy(learn)
    assert type(twin.fold_batch_norm) is FoldBatchNorm and twin.fold_batch_norm._folds.prepared is None and copy(learn.fold_batch_norm).folded == 3
    in_place(twin)
    assert fresh(twin) and fresh(learn) and twin.fold_batch_norm.folded == 3
    own = learner(Net(), cbs=Own())
    preds(own)
    own.remove_cb(cb := own.own)
    cb._folds = learn.fold_batch_norm._folds
    assert type(pickle.loads(pickle.dumps(cb))) is Own and pickle.loads(pickle.dumps(cb))._folds.prepared is None


def between(self, x): return self.norm(self.conv(x))  # a lambda can't be pickled


def test_the_mark_of_to_fastest():
    "`to_fastest()` removes a callback that `to_fastest(train=False)` added, and no other one."
    with pytest.raises(TypeError): FoldBatchNorm(measured=True)
    training, predicting = Timing('contiguous', 'fp32'), Timing('contiguous', 'fp32', folded=True, pred_diff=0.)
    learn = learner(Net(between), cbs=FoldBatchNorm())
    apply_timing(learn, predicting); apply_timing(learn, training)
    assert not learn.fold_batch_norm.measured
    apply_timing(learn.remove_cb(FoldBatchNorm), predicting)
    cb = learn.fold_batch_norm
    assert cb.measured and copy(cb).measured and deepcopy(learn).fold_batch_norm.measured and not FoldBatchNorm.measured
    loaded = pickle.loads(pickle.dumps(learn))
    assert [type(o) for o in loaded.cbs if hasattr(o, 'measured')] == [Callback] and not loaded._grab_cbs(FoldBatchNorm)
    apply_timing(deepcopy(learn), training)
    apply_timing(learn, training)
    assert not learn._grab_cbs(FoldBatchNorm)


class Old:
    "Pickles as a `FoldBatchNorm` of the version whose `__init__` took `measured`."
    def __init__(self, cls, **state): self.cls, self.state = cls, state
    def __reduce__(self): return copyreg._reconstructor, (self.cls, object, None), self.state


@pytest.mark.parametrize('measured', [True, False])
def test_pickles_of_the_version_with_an_argument(measured):
    cb = pickle.loads(pickle.dumps(Old(Callback, measured=measured)))
    own = pickle.loads(pickle.dumps(Old(Own, measured=measured, _folds=module.FoldCache())))
    assert type(cb) is Callback and type(own) is Own and cb.measured == own.measured == measured
    learn = learner(Net(), cbs=[cb, own])
    assert fresh(learn) and own.folded == 3
    apply_timing(learn, Timing('contiguous', 'fp32'))
    assert len(learn._grab_cbs(FoldBatchNorm)) == (not measured)


def test_exports_load_without_this_library(tmp_path):
    m = nn.Sequential(block(3, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    learn = Learner(image_folder(tmp_path), shake(m), path=tmp_path, cbs=FoldBatchNorm())
    image = tmp_path/'data'/'a'/'0.png'
    expected = learn.predict(image)[2]
    assert learn.fold_batch_norm.folded == 2
    learn.export('e.pkl')
    assert learn.fold_batch_norm.folded == 2
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
learn = load_learner({str(tmp_path/'e.pkl')!r})
print([type(o).__name__ for o in learn.cbs])
print('predicted', learn.predict({str(image)!r})[2].tolist())"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    torch.testing.assert_close(torch.tensor(eval(out.stdout.split('predicted ')[1])), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    loaded = load_learner(tmp_path/'e.pkl')
    loaded.add_cb(FoldBatchNorm())
    for _ in range(2): torch.testing.assert_close(loaded.predict(image)[2], expected, rtol=1e-4, atol=1e-5)
    assert loaded.fold_batch_norm.folded == 2


# many models

def grow(draw):
    "A random network of convolutions and batch norms with taps, shared modules, hooks and skips."
    c, steps = 4, draw(st.lists(st.tuples(st.sampled_from(['pair', 'act', 'skip', 'tap', 'again', 'hook', 'between', 'norm first', 'kept', 'timm', 'inner hook']),
                                          st.integers(0, 5)), min_size=1, max_size=6))
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, c, 1), nn.Linear(c, 4)
            self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=bool(k % 2), groups=1 + k % 2) for _, k in steps)
            self.norms = nn.ModuleList((Act if kind == 'timm' else nn.BatchNorm2d)(c) for kind, _ in steps)
            for (kind, k), a, b in zip(steps, self.convs, self.norms):
                if kind == 'hook': (a, b)[k % 2].register_forward_hook(lambda m, i, o: o*2 if k > 2 else None)
                if kind == 'inner hook': b.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
        def forward(self, x):
            x, kept = self.stem(x), []
            for i, (kind, k) in enumerate(steps):
                a, b = self.convs[k % len(steps) if kind == 'again' else i], self.norms[i]
                y = a(b(x) if kind == 'norm first' else x)
                if kind == 'between': y = y*0.5
                z = y if kind == 'norm first' else b(y)
                if kind == 'tap': z = z + y
                if kind == 'skip': z = z + x
                if kind == 'kept': kept.append(y)
                x = z.tanh() if kind == 'act' else z
            return self.head((x + sum(kept)).mean((2, 3)))
    return shake(Random())


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck])
@given(data=st.data(), last=st.booleans())
def _any_network(data, last):
    check(grow(data.draw), dls=loaders((3, 4, 4), n=4, bs=2, dtype=torch.float64), cbs=ChannelsLast() if last else None)


def test_any_network(): _any_network()


ARCHITECTURES = '''torchvision/resnet18 torchvision/mobilenet_v3_small torchvision/shufflenet_v2_x0_5 torchvision/mnasnet0_5 torchvision/regnet_y_400mf torchvision/densenet121
timm/efficientnet_b0 timm/tf_mobilenetv3_small_075 timm/resnet10t timm/seresnet18 timm/dla46x_c timm/lcnet_050 timm/mobilevit_xxs timm/repvgg_a0'''.split()


@pytest.mark.parametrize('name', ARCHITECTURES)
@pytest.mark.filterwarnings('ignore')
def test_architectures(name):
    source, name = name.split('/')
    m = (timm.create_model if source == 'timm' else torchvision.models.get_model)(name, num_classes=4)
    learn = check(shake(m), dls=loaders((3, 32, 32), n=4, bs=2, dtype=torch.float64))
    assert learn.fold_batch_norm.folded == learn.fold_batch_norm.found >= 10
    check(m, dtype=torch.float32, tol=1e-5, dls=loaders((3, 32, 32), n=4, bs=2), cbs=ChannelsLast())


@pytest.mark.cuda
@pytest.mark.parametrize('mode', [None, 'fp16', 'bf16'])
def test_on_cuda(mode):
    learn = learner(Net(), loaders().to(torch.device('cuda')))
    learn.to_channelslast(to_fp16=bool(mode), amp_mode=mode)
    truth = preds(learn)
    learn.add_cb(FoldBatchNorm())
    for _ in range(2): assert relative_error(preds(learn), truth) < (5e-2 if mode else 1e-2)
    assert learn.fold_batch_norm.folded == 3
    learn.model.cpu()
    learn.dls = loaders()
    for _ in range(2): assert relative_error(preds(learn), truth) < 5e-2
