"""Predictions of `FoldBatchNorm` and `CompilePredictions` never come from other values than the model's: each change between
two predictions is seen, whatever is changed, by whom, and how. Compiled code keeps its constants, but is not made in C++."""
import random
import types
from collections import deque, namedtuple
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, CancelValidException, Learner, SGD
from torch import nn
from torch.nn.utils import prune

from channelslast import CompilePredictions, FoldBatchNorm
from channelslast.core.compare import relative_error
from channelslast.core.model_copy import ModelState
from .helpers import BACKENDS, Pairs, learner, loaders, preds_of, shake, truth_of, use_backend

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
NORM = nn.modules.batchnorm._BatchNorm


@pytest.fixture
def callback(request):
    "`FoldBatchNorm`, or `CompilePredictions`, whose backend it is in this test."
    if request.param is FoldBatchNorm: return FoldBatchNorm
    request.getfixturevalue('traced')
    use_backend(request.getfixturevalue('monkeypatch'), request.param)
    return CompilePredictions


def cases(name, table, compiled=(), folded=None, converted=()):
    """Each case with both callbacks, and `CompilePredictions` with each backend. Fast are those of `compiled`, which trace the model
    several times, of `converted` by OpenVINO, and of `folded`, or all."""
    fast = {FoldBatchNorm: table if folded is None else folded, 'inductor': compiled, 'openvino': converted, 'onnxruntime': ()}
    ids = {FoldBatchNorm: 'folded', 'inductor': 'compiled'}
    return pytest.mark.parametrize(f'callback, {name}', [pytest.param(cb, k, marks=() if k in fast[cb] else pytest.mark.slow, id=f'{ids.get(cb, cb)}, {k}')
                                                         for cb in fast for k in table], indirect=['callback'])


def net_for(callback):
    "A model with batch norms to fold, or one that is traced in less time."
    if callback is FoldBatchNorm: return Pairs()
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def works(learn, callback): return (learn.fold_batch_norm.folded or 0) > 0 if callback is FoldBatchNorm else learn.compile_predictions.compiled
def is_right(learn, tol=1e-4): return relative_error(preds_of(learn).double(), truth_of(learn).double()) < tol
def mean_square(pred, *y): return pred.float().square().mean()


def check(callback, model, change, used=None, differs=True, **kwargs):
    """Predictions before and after `change(learn)` are those of the model. `used`: True or False if the model must, or must not,
    be folded or compiled before and after it. `differs`: the change must change the output."""
    learn = learner(model, loaders(n=16), cbs=callback(), **kwargs)
    learn.loss_func = mean_square
    with learn.no_bar(), learn.no_logging():
        assert is_right(learn) and is_right(learn)
        assert used in (None, works(learn, callback))
        before = truth_of(learn)
        with torch.no_grad(): change(learn)
        for _ in range(3): assert is_right(learn)
        assert used in (None, works(learn, callback))
    after = truth_of(learn)
    assert not differs or before.shape != after.shape or relative_error(after.double(), before.double()) > 1e-3
    return learn


# weights, by whoever changes them

def on_model(f):
    "A change of a model as a change of a Learner."
    return lambda learn: f(learn.model)


def in_place(m): m.conv.weight.mul_(2); m.norm.bias.add_(1); m.two[0].bias.zero_()


def same_address(m):
    "Assign new memory until it lies at the first address again."
    at = m.conv.weight.data_ptr()
    for _ in range(10000):
        m.conv.weight.data = torch.randn_like(m.conv.weight)
        if m.conv.weight.data_ptr() == at: break


def loads(learn):
    learn.save('a')
    in_place(learn.model)
    preds_of(learn)
    learn.load('a')


class FrozenStatistics(Callback):
    "Running statistics stay; weights change through `p.data`, which no version counter sees."
    def before_train(self): self.model.apply(lambda m: m.eval() if isinstance(m, NORM) else m)


def fits(learn, **kwargs):
    with torch.enable_grad(): learn.fit(1, 0.1, **kwargs)


def fits_with_sgd(learn):
    learn.opt_func = SGD
    learn.create_opt()
    fits(learn)


def freezes(learn): learn.freeze(); fits(learn)


def gradients(learn):
    "Gradients of one batch, whose running statistics stay."
    learn.model.eval()
    with torch.enable_grad(): learn.model(learn.dls.one_batch()[0]).square().sum().backward()


def steps_with(opt, **kwargs):
    def _change(learn):
        o = opt(learn.model.parameters(), lr=0.1, **kwargs)
        gradients(learn)
        o.step(); o.zero_grad()
    return _change


def steps_by_hand(learn):
    "Through fastai's optimizer."
    learn.create_opt()
    gradients(learn)
    learn.opt.set_hypers(lr=0.5)
    learn.opt.step(); learn.opt.zero_grad()


def other_learner(learn): train_elsewhere(learn, learn.model)
def larger_model(learn): train_elsewhere(learn, nn.Sequential(learn.model, nn.Linear(4, 4)))


def train_elsewhere(learn, model):
    other = Learner(learn.dls, model, mean_square, opt_func=SGD, cbs=FrozenStatistics())
    with torch.enable_grad(), other.no_bar(), other.no_logging(): other.fit(1, 0.5)


def through_data(m):
    for p in m.parameters(): p.data.mul_(1.5)


def fewer_classes(m):
    for p in m.head.parameters(): p.data = p.data[:2]


def other_strides(m): m.two[0].weight.data = m.two[0].weight.data.transpose(0, 1)
def data_of_statistics(m): m.norm.running_mean.data.add_(1); m.two[1].running_var.data.mul_(3)
def as_vector(m): nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters())*1.5, m.parameters())
def doubled(learn): learn.model.double(); learn.dls = loaders(n=16, dtype=torch.float64)


def on_flat_memory(learn):
    "Weights that are views of one tensor, which is then changed."
    ps = [*learn.model.parameters()]
    flat = torch.cat([p.data.flatten() for p in ps])
    for p, part in zip(ps, flat.split([p.numel() for p in ps])): p.data = part.view_as(p)
    assert is_right(learn)
    flat.mul_(1.5)


def in_inference_mode(m):
    with torch.inference_mode(): m.conv.weight.mul_(2)


def forgets(learn):
    learn.model.head.weight.data[1, 3] += 5  # too few elements to be seen
    for cb in learn.cbs:
        if hasattr(cb, 'forget'): cb.forget()


WEIGHTS = {
    'a fit': fits, 'a fit with SGD': fits_with_sgd, 'a fit of unfrozen layers': freezes, 'in place': on_model(in_place),
    'a fit that leaves running statistics alone': lambda learn: fits(learn, cbs=FrozenStatistics()),
    'data assigned at the same address': on_model(same_address), 'load': loads,
    'running statistics': on_model(lambda m: m.norm.running_var.mul_(3)), 'running statistics through data': on_model(data_of_statistics),
    'load_state_dict': on_model(lambda m: m.load_state_dict(Pairs().state_dict())), 'eps': on_model(lambda m: setattr(m.norm, 'eps', 1.)),
    'load_state_dict with assign': on_model(lambda m: m.load_state_dict(Pairs().state_dict(), assign=True)),
    'a training batch without Learner': lambda learn: learn.model.train()(learn.dls.one_batch()[0]*3),
    'torch Adam': steps_with(torch.optim.Adam), 'torch SGD foreach': steps_with(torch.optim.SGD, foreach=True),
    'torch AdamW fused': steps_with(torch.optim.AdamW, fused=True), "fastai's optimizer by hand": steps_by_hand, 'another Learner': other_learner,
    'a larger model in another Learner': larger_model, 'all weights through data': on_model(through_data),
    'fewer classes through data': on_model(fewer_classes), 'other strides through data': on_model(other_strides),
    'swap_tensors': on_model(lambda m: torch.utils.swap_tensors(m.conv.weight, nn.Parameter(torch.randn(8, 8, 1, 1)))),
    'NumPy': on_model(lambda m: m.head.weight.detach().numpy().__imul__(2)), 'vector_to_parameters': on_model(as_vector), 'flat memory': on_flat_memory,
    'in inference mode': on_model(in_inference_mode), 'set_': on_model(lambda m: m.head.weight.set_(torch.randn(4, 8))), 'fp64': doubled, 'forget': forgets}
FAST = ('a fit', 'data assigned at the same address', 'running statistics', 'torch AdamW fused', 'another Learner', 'fewer classes through data',
        'load_state_dict with assign', 'forget')


@cases('how', WEIGHTS, FAST, converted=('a fit', 'data assigned at the same address', 'torch AdamW fused', 'load_state_dict with assign'))
def test_changed_weights_are_predicted_with(callback, how, tmp_path):
    used = True if how != 'fp64' or getattr(callback(), 'backend', 'inductor') == 'inductor' else None  # runtimes compute in fp32
    check(callback, Pairs(), WEIGHTS[how], used, how not in ('load', 'fp64'), path=tmp_path, splitter=lambda m: [[*m.one.parameters()], [*m.head.parameters()]])


@pytest.mark.parametrize('callback', [FoldBatchNorm, *BACKENDS], indirect=True)
def test_weights_that_become_NaN_and_back_are_predicted_with(callback):
    learn = learner(Pairs(), loaders(n=16), cbs=callback())
    preds_of(learn)
    learn.model.head.bias.data[0] = float('nan')
    for _ in range(2): assert preds_of(learn).isnan().sum(0).tolist() == [16, 0, 0, 0]
    learn.model.head.bias.data[0] = 0
    assert not preds_of(learn).isnan().any()


WITHOUT_NORM = {'torch AdamW fused': steps_with(torch.optim.AdamW, fused=True), 'another Learner': other_learner, 'a larger model': larger_model,
                "fastai's optimizer by hand": steps_by_hand, 'a fit': fits, 'all weights through data': on_model(through_data)}


@cases('how', WITHOUT_NORM, ('a larger model', "fastai's optimizer by hand"), ())
def test_a_model_without_batch_norms_predicts_with_its_new_weights(callback, how):
    "No buffer changes: only the weights tell. Nothing is folded."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    check(callback, net, WITHOUT_NORM[how], callback is CompilePredictions)


# layers, formats, modes

class Doubling(nn.Linear):
    def forward(self, x): return super().forward(x)*2


def no_statistics(m): m.norm.running_var = m.norm.running_mean = None


LAYERS = {
    'a new convolution': on_model(lambda m: setattr(m, 'conv', nn.Conv2d(8, 8, 3))),
    'a new batch norm': on_model(lambda m: setattr(m, 'norm', shake(nn.BatchNorm2d(8)))),
    'another model': lambda learn: setattr(learn, 'model', Pairs()), 'no batch norm': on_model(lambda m: setattr(m, 'norm', nn.Identity())),
    'no running statistics': on_model(no_statistics), 'another order': on_model(lambda m: setattr(m, 'between', lambda self, x: self.conv(self.norm(x)))),
    'a bias': on_model(lambda m: setattr(m.one[0], 'bias', nn.Parameter(torch.randn(8)))), 'no bias': on_model(lambda m: setattr(m.two[0], 'bias', None)),
    'dilation': on_model(lambda m: setattr(m.one[0], 'dilation', (2, 2))), 'stride': on_model(lambda m: setattr(m.conv, 'stride', (2, 2))),
    'padding': on_model(lambda m: setattr(m.one[0], 'padding', (0, 0))), 'channels last': lambda learn: learn.to_channelslast(to_fp16=False),
    'contiguous': lambda learn: (learn.to_channelslast(to_fp16=False), preds_of(learn), learn.to_contiguous()),
    'a parametrization': on_model(lambda m: nn.utils.parametrize.register_parametrization(m.norm, 'weight', nn.Tanh())),
    'pruning': on_model(lambda m: prune.l1_unstructured(m.conv, 'weight', 0.5)),
    'a hook': on_model(lambda m: m.head.register_forward_hook(lambda m, i, o: o*3)),
    'the class of a layer': on_model(lambda m: setattr(m.head, '__class__', Doubling)), 'requires_grad': on_model(lambda m: m.requires_grad_(False))}


@cases('what', LAYERS, ('another model', 'dilation', 'channels last'))
def test_changed_layers_are_predicted_with(callback, what):
    check(callback, Pairs(), LAYERS[what], differs=what not in ('channels last', 'contiguous', 'requires_grad'))


@cases('kind', ['hook', 'pre-hook'], (), ['hook'])
def test_a_replaced_hook_runs_in_the_next_prediction(callback, kind):
    model = Pairs()
    register = model.head.register_forward_hook if kind == 'hook' else model.head.register_forward_pre_hook
    first = register(lambda m, x, *out: out[0] + 1 if out else x[0] + 1)
    check(callback, model, lambda learn: (first.remove(), register(lambda m, x, *out: out[0]*3 if out else x[0]*3)))


# attributes, and what they hold

Couple = namedtuple('Couple', 'layer t')


@dataclass
class Config:
    t: object = 1.
    layer: object = None


class Slots:
    __slots__ = 't', 'layer'
    def __init__(self, t, layer): self.t, self.layer = t, layer


class Applies(nn.Module):
    "A network, and then `f(held, output)`. `held` is an attribute."
    def __init__(self, net, held, f): super().__init__(); self.net, self.held, self.f = net, held, f
    def forward(self, x): return self.f(self.held, self.net(x))


def linear(): return nn.Linear(4, 4)
def ones(**kwargs): return torch.ones(4, **kwargs)
def threes(): return torch.full((4,), 3.)


def put(o, name, value):
    "Assign to an attribute or element."
    if isinstance(o, (dict, list)): o[name] = value
    else: setattr(o, name, value)


ATTRIBUTES = { # what is held, how it is used, how it is changed; `m` is the model
    'number': (lambda: 1., lambda h, x: x*h, lambda m: put(m, 'held', 3.)),
    'nested list': (lambda: [[1., 2.]], lambda h, x: x*h[0][1], lambda m: put(m.held[0], 1, 5.)),
    'dictionary': (lambda: dict(t=1.), lambda h, x: x*h['t'], lambda m: put(m.held, 't', 3.)),
    'object': (Config, lambda h, x: x*h.t, lambda m: put(m.held, 't', 3.)),
    'object in a list': (lambda: [types.SimpleNamespace(t=1.)], lambda h, x: x*h[0].t, lambda m: put(m.held[0], 't', 3.)),
    'deque': (lambda: deque([1.]), lambda h, x: x*h[0], lambda m: m.held.appendleft(3.)),
    'number next to a layer in an object': (lambda: Config(1., linear()), lambda h, x: h.layer(x)*h.t, lambda m: put(m.held, 't', 3.)),
    'number next to a layer in slots': (lambda: Slots(1., linear()), lambda h, x: h.layer(x)*h.t, lambda m: put(m.held, 't', 3.)),
    'number next to a layer in a dictionary': (lambda: dict(t=1., layer=linear()), lambda h, x: h['layer'](x)*h['t'], lambda m: put(m.held, 't', 3.)),
    'number next to a layer in a nested list': (lambda: [[linear(), 1.]], lambda h, x: h[0][0](x)*h[0][1], lambda m: put(m.held[0], 1, 3.)),
    'object next to a layer in a list': (lambda: [linear(), Config()], lambda h, x: h[0](x)*h[1].t, lambda m: put(m.held[1], 't', 3.)),
    'new layer in a list': (lambda: [linear()], lambda h, x: h[0](x), lambda m: put(m.held, 0, linear())),
    'one more layer in a list': (lambda: [linear()], lambda h, x: h[-1](h[0](x)), lambda m: m.held.append(linear())),
    'new layer in an object': (lambda: Config(layer=linear()), lambda h, x: h.layer(x), lambda m: put(m.held, 'layer', linear())),
    'new layer in a dictionary': (lambda: dict(layer=linear()), lambda h, x: h['layer'](x), lambda m: put(m.held, 'layer', linear())),
    'weights of a layer in a list': (lambda: [linear()], lambda h, x: h[0](x), lambda m: m.held[0].weight.mul_(3)),
    'weights of a layer in an object': (lambda: Config(layer=linear()), lambda h, x: h.layer(x), lambda m: m.held.layer.weight.data.mul_(3)),
    'weights of a layer in slots': (lambda: Slots(1., linear()), lambda h, x: h.layer(x), lambda m: m.held.layer.weight.mul_(3)),
    'mode of a layer in a list': (lambda: [nn.Identity()], lambda h, x: x*3 if h[0].training else x, lambda m: m.held[0].eval()),
    'tensor': (ones, lambda h, x: x*h, lambda m: m.held.mul_(3)), 'tensor, assigned': (ones, lambda h, x: x*h, lambda m: put(m, 'held', threes())),
    'tensor through data': (ones, lambda h, x: x*h, lambda m: m.held.data.mul_(3)),
    'tensor in a list': (lambda: [ones()], lambda h, x: x*h[0], lambda m: m.held[0].mul_(3)),
    'tensor in a list, assigned': (lambda: [ones()], lambda h, x: x*h[0], lambda m: put(m.held, 0, threes())),
    'tensor in an object': (lambda: Config(ones()), lambda h, x: x*h.t, lambda m: m.held.t.mul_(3)),
    'tensor in an object, assigned': (lambda: Config(ones()), lambda h, x: x*h.t, lambda m: put(m.held, 't', threes())),
    'tensor in an object through data': (lambda: Config(ones()), lambda h, x: x*h.t, lambda m: m.held.t.data.mul_(3)),
    'tensor in slots': (lambda: Slots(ones(), None), lambda h, x: x*h.t, lambda m: m.held.t.mul_(3)),
    'tensor in a named tuple': (lambda: Couple(None, ones()), lambda h, x: x*h.t, lambda m: m.held.t.mul_(3)),
    'tensor in a partial': (lambda: partial(torch.mul, ones()), lambda h, x: h(x), lambda m: m.held.args[0].mul_(3)),
    'tensor of whole numbers': (lambda: ones(dtype=torch.int64), lambda h, x: x*h, lambda m: m.held.add_(2)),
    'tensor with a gradient': (lambda: nn.Parameter(ones())*1, lambda h, x: x*h, lambda m: m.held.mul_(3)),
    'NumPy array': (lambda: np.ones(4, dtype=np.float32), lambda h, x: x*torch.from_numpy(h), lambda m: m.held.__imul__(3))}
FAST = ('nested list', 'number next to a layer in an object', 'one more layer in a list', 'weights of a layer in a list', 'tensor in an object',
        'tensor in a partial', 'tensor in slots', 'tensor in a list, assigned')


@cases('what', ATTRIBUTES, FAST, converted=('nested list', 'tensor in an object', 'tensor in a list, assigned'))
def test_changed_attributes_are_predicted_with(callback, what):
    held, f, change = ATTRIBUTES[what]
    check(callback, Applies(net_for(callback), held(), f), on_model(change), True if callback is FoldBatchNorm else None)


def both(self, x):
    "The batch norm's output, and also the convolution's if a flag says so, which folding would have changed."
    y = self.conv(x)
    z = self.norm(y)
    return z + y if self.flag(self) else z


class Switched(Pairs):
    on_class = False
    def __init__(self, flag):
        super().__init__(both)
        self.on, self.flags, self.config, self.options, self.level, self.flag = False, [False], dict(on=False), Config(False), 1., flag
    def answer(self): return False


SWITCHES = {
    'attribute': (lambda m: m.on, lambda m: put(m, 'on', True)), 'class attribute': (lambda m: m.on_class, lambda m: put(Switched, 'on_class', True)),
    'list': (lambda m: m.flags[0], lambda m: put(m.flags, 0, True)), 'dictionary': (lambda m: m.config['on'], lambda m: put(m.config, 'on', True)),
    'object': (lambda m: m.options.t, lambda m: put(m.options, 't', True)), 'number': (lambda m: m.level > 1, lambda m: put(m, 'level', 2.)),
    'method': (lambda m: m.answer(), lambda m: put(Switched, 'answer', lambda self: True))}


@cases('where', SWITCHES, ('dictionary',))
def test_a_switch_of_what_reads_the_convolution_is_seen(callback, where, monkeypatch):
    "Folded layers must not give their changed output to what the switch turns on."
    for k in 'on_class', 'answer': monkeypatch.setattr(Switched, k, vars(Switched)[k])
    flag, change = SWITCHES[where]
    learn = check(callback, Switched(flag), on_model(change))
    if callback is FoldBatchNorm: assert learn.fold_batch_norm.folded == 2


# constants of compiled code that no attribute holds

GLOBAL = torch.ones(4)
DEFAULT = torch.ones(4)


class Constants(nn.Module):
    shared = torch.ones(4)
    def __init__(self, net, closed): super().__init__(); self.net, self.scaled = net, lambda x: x*closed
    def forward(self, x, default=DEFAULT): return self.scaled(self.net(x)*self.shared)*default*GLOBAL


CONSTANTS = 'class attribute', 'class attribute, assigned', 'closure', 'default argument', 'global'


@cases('where', CONSTANTS, CONSTANTS, ['closure'], CONSTANTS)
def test_changed_tensors_outside_the_model_are_predicted_with(callback, where, monkeypatch):
    monkeypatch.setattr(Constants, 'shared', torch.ones(4))
    closed = torch.ones(4)
    t = {'class attribute': Constants.shared, 'closure': closed, 'default argument': DEFAULT, 'global': GLOBAL}.get(where)
    def _change(learn):
        if t is None: monkeypatch.setattr(Constants, 'shared', threes())
        else: t.mul_(3)
    try: check(callback, Constants(net_for(callback), closed), _change, where != 'class attribute, assigned' or None)
    finally: DEFAULT.fill_(1); GLOBAL.fill_(1)


class HookWithLayer:
    def __init__(self): self.layer = linear()
    def __call__(self, m, args, out): return self.layer(out)


HOOKS = {'function': lambda hook: lambda m, i, o: hook.layer(o), 'object': lambda hook: hook, 'method': lambda hook: hook.__call__}


@pytest.mark.parametrize('held', [True, pytest.param(False, marks=pytest.mark.slow)])
@cases('kind', HOOKS, HOOKS)
def test_changed_layers_of_a_forward_hook_are_predicted_with(callback, kind, held):
    model, hook = net_for(callback), HookWithLayer()
    if held: model.hook = hook
    model.register_forward_hook(HOOKS[kind](hook))
    check(callback, model, lambda learn: hook.layer.weight.data.mul_(3))


@cases('through', ['counter', 'data'], ['data'])
def test_a_changed_layer_that_only_a_function_holds_is_predicted_with(callback, through):
    layer = linear()
    model = Applies(net_for(callback), None, lambda h, x: layer(x))
    check(callback, model, lambda learn: (layer.weight.data if through == 'data' else layer.weight).mul_(3))


# methods that a notebook defines again

class Inner(nn.Module):
    factor = 1.
    def helper(self, x): return x
    def forward(self, x): return self.helper(x)*self.factor


class OwnConv(nn.Conv2d):
    def forward(self, x): return super().forward(x)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x)


class Redefined(Pairs):
    def __init__(self): super().__init__(); self.conv, self.norm, self.inner = OwnConv(8, 8, 3), shake(OwnNorm(8)), Inner()
    def forward(self, x): return self.inner(super().forward(x))


def reads_twice(self, x):
    y = self.conv(self.two(self.one(x)))
    return self.head((self.norm(y) + y).mean((2, 3)))


def times_three(self, x): return x*3
def function(h, x): return x
def other_function(h, x): return x*3


REDEFINED = {
    'forward of an inner module': (Inner, 'forward', times_three), 'helper of an inner module': (Inner, 'helper', times_three),
    'number in a class': (Inner, 'factor', 3.), 'forward of the convolution': (OwnConv, 'forward', lambda self, x: nn.Conv2d.forward(self, x)*2),
    'forward of the batch norm': (OwnNorm, 'forward', lambda self, x: nn.BatchNorm2d.forward(self, x)*2),
    'forward of the model': (Redefined, 'forward', reads_twice)}


@cases('what', REDEFINED, ('forward of an inner module', 'helper of an inner module'))
def test_redefined_methods_are_predicted_with(callback, what, monkeypatch):
    cls, name, new = REDEFINED[what]
    check(callback, Redefined(), lambda learn: monkeypatch.setattr(cls, name, new))


@cases('what', ['method', 'function', 'assigned function'], ['method'], ['method'], ['function'])
def test_code_that_autoreload_defines_again_is_predicted_with(callback, what, monkeypatch):
    "IPython's `%autoreload` keeps the function and replaces its code, where it can."
    monkeypatch.setattr(Inner, 'helper', types.FunctionType(Inner.helper.__code__, globals()))
    monkeypatch.setitem(globals(), 'function', types.FunctionType(function.__code__, globals()))
    def _change(learn):
        if what == 'method': Inner.helper.__code__ = times_three.__code__
        elif what == 'function': function.__code__ = other_function.__code__
        else: monkeypatch.setitem(globals(), 'function', other_function)
    check(callback, nn.Sequential(net_for(callback), Inner(), Applies(nn.Identity(), None, lambda h, x: function(h, x))), _change)


# random numbers

class Shuffles(nn.Module):
    def __init__(self, net, order): super().__init__(); self.net, self.order = net, order
    def forward(self, x): return self.net(x)[self.order(len(x))]


def shuffled(n):
    order = list(range(n))
    random.shuffle(order)
    return order


ORDERS = {'random.shuffle': shuffled, 'random.sample': lambda n: random.sample(range(n), n), 'numpy.random': lambda n: np.random.permutation(n)}


@cases('order', ORDERS, ('random.sample', 'numpy.random'), ('random.shuffle',))
def test_models_that_draw_from_Python_or_NumPy_draw_new_numbers_for_each_batch(callback, order, recwarn):
    model, dls, found = Shuffles(net_for(callback), ORDERS[order]), loaders(n=32), []
    for cbs in [], callback():
        learn = learner(model, dls, cbs=cbs)
        random.seed(0); np.random.seed(0)
        found.append([torch.cat([preds_of(learn) for _ in range(3)]), torch.tensor([random.random(), np.random.rand()])])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if callback is CompilePredictions:
        assert not learn.compile_predictions.compiled and any('random numbers of Python or NumPy' in str(o.message) for o in recwarn)


# callbacks that change weights around predictions

class AveragedAtTheEnd(Callback):
    "As users write weight averaging."
    def after_fit(self): through_data(self.model)


class SwappedForValidation(Callback):
    "Validates with other weights than those that are trained, as exponential moving averages do."
    def __init__(self, assign, order): self.assign, self.order = assign, order
    def before_validate(self):
        self.own = [p.data.clone() for p in self.model.parameters()]
        self._put([p.data*1.5 for p in self.model.parameters()])
    def after_validate(self): self._put(self.own)
    def _put(self, values):
        for p, v in zip(self.model.parameters(), values):
            if self.assign: p.data = v
            else: p.data.copy_(v)


@cases('when', ['after_fit'], ['after_fit'])
def test_weights_averaged_after_a_fit_are_predicted_with(callback, when):
    check(callback, Pairs(), lambda learn: fits(learn, cbs=[AveragedAtTheEnd(), FrozenStatistics()]), True)


@pytest.mark.parametrize('order', [-10, pytest.param(50, marks=pytest.mark.slow), 2_000_000])
@cases('how', ['assigned', 'copied'], ['copied'])
def test_weights_swapped_for_validation_are_validated_with(callback, how, order):
    if callback is CompilePredictions and order < 0: pytest.skip('one order is enough for compiled code')
    swap, found, model, dls = SwappedForValidation(how == 'assigned', order), [], Pairs(), loaders(n=16)
    for cbs in [], [callback()]:
        learn = Learner(dls, deepcopy(model), mean_square, cbs=cbs, opt_func=SGD)
        with learn.no_bar(), learn.no_logging():
            found.append([learn.validate(), learn.validate(cbs=swap), learn.validate()])
            learn.fit(2, 0.1, cbs=[swap, FrozenStatistics()])
            found[-1] += [*learn.recorder.values, learn.validate()]
    assert found[0][0] != found[0][1]
    for a, b in zip(*found): assert [*b] == pytest.approx([*a], rel=1e-4)


@cases('how', ['lerp'])
def test_a_teacher_that_follows_the_student_predicts_with_its_new_weights(callback, how):
    class Follow(Callback):
        def after_step(self):
            for a, b in zip(teacher.model.parameters(), self.model.parameters()): a.data.lerp_(b.data, .5)
    teacher = learner(Pairs(), loaders(n=16), cbs=callback())
    assert is_right(teacher)
    student = learner(Pairs(), teacher.dls, cbs=Follow())
    with student.no_bar(), student.no_logging(): student.fit(1, 0.1)
    assert is_right(teacher)


@cases('epochs', [3])
def test_predictions_in_a_fit_follow_the_weights_of_each_epoch(callback, epochs):
    seen = []
    class Predict(Callback):
        def after_epoch(self):
            preds, truth = self.learn.get_preds(inner=True)[0], truth_of(self.learn)
            seen.append(relative_error(preds, truth))
    learn = Learner(loaders(n=16), Pairs(), mean_square, cbs=[callback(), Predict()], opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 0.1)
    assert max(seen) < 1e-4 and len(seen) == epochs


@cases('how', ['one_batch'], [])
def test_batches_that_the_user_runs_one_by_one_are_predicted_with_the_weights_of_each(callback, how):
    learn = learner(Pairs(), loaders(n=16), cbs=callback())
    assert is_right(learn)
    b = learn.dls.valid.one_batch()
    learn.model.eval()
    learn.training = False
    for _ in range(3):
        through_data(learn.model)
        with torch.no_grad():
            learn.one_batch(0, b)
            assert relative_error(learn.pred, learn.model(b[0])) < 1e-4


@cases('how', ['canceled'], [])
def test_weights_changed_after_a_canceled_validation_are_predicted_with(callback, how):
    class Cancel(Callback):
        def after_batch(self): raise CancelValidException
    learn = learner(Pairs(), loaders(n=16), cbs=callback())
    assert is_right(learn)
    learn.validate(cbs=Cancel())
    through_data(learn.model)
    learn.model.eval()
    learn.training, b = False, learn.dls.valid.one_batch()
    with torch.no_grad():
        learn.one_batch(0, b)
        assert relative_error(learn.pred, learn.model(b[0])) < 1e-4
    assert is_right(learn)


# dtypes and devices

def special_buffers():
    "Buffers of unusual dtypes and strides; each scales the output."
    m = nn.Module()
    for name, t in dict(float8=torch.ones(4).to(torch.float8_e4m3fn), complex=torch.ones(4, dtype=torch.complex64), bool=torch.ones(4, dtype=torch.bool),
                        uint16=torch.ones(4, dtype=torch.uint16), bf16=torch.ones(4, dtype=torch.bfloat16), scalar=torch.tensor(2.), none=torch.ones(0, 3),
                        expanded=torch.ones(1).expand(4), part=torch.ones(9)[1::2]).items(): m.register_buffer(name, t)
    return m


def scale(m, x): return x*m.float8.float()*m.complex.real*m.bool*m.bf16*m.scalar*m.expanded*m.part


@cases('buffer', ['float8', 'complex', 'bool', 'bf16', 'scalar', 'expanded', 'part'], ['part'])
def test_buffers_of_any_dtype_and_layout_are_predicted_with(callback, buffer):
    def _change(learn):
        t = getattr(learn.model.held, buffer).data
        (t[:1] if buffer == 'expanded' else t).copy_(torch.tensor(0. if buffer == 'bool' else 3.))
    used = getattr(callback(), 'backend', '') != 'onnxruntime' or None  # ONNX lacks complex numbers
    check(callback, Applies(net_for(callback), special_buffers(), scale), _change, used)


@pytest.mark.parametrize('lazy', [lambda t: t.conj(), lambda t: t.conj().imag], ids=['conjugated', 'negative'])
def test_writes_through_data_into_lazy_tensors_are_seen(lazy):
    m = nn.Module()
    m.register_buffer('lazy', lazy(torch.full((4,), 1 + 1j)))
    assert m.lazy.is_conj() or m.lazy.is_neg()
    state = ModelState(m)
    assert state.same_memory() and state.same_values()
    m.lazy.data.fill_(3.)
    assert state.same_memory() and not state.same_values()


def test_memory_of_compared_tensors_can_be_resized():
    "✗ `Tensor.numpy` forbids that for the life of the memory."
    m = special_buffers()
    state = ModelState(m)
    assert state.same_values() and all(t.untyped_storage().resizable() for t in m.buffers())
    m.scalar.untyped_storage().resize_(400)
    assert not state.same_memory()


@cases('dtype', [torch.float64, torch.bfloat16])
def test_another_dtype_and_back_is_predicted_with(callback, dtype):
    learn = learner(Pairs(), loaders(n=16), cbs=callback())
    learn.loss_func = mean_square
    for d in torch.float32, dtype, torch.float32:
        learn.model.to(d)
        learn.dls = loaders(n=16, dtype=d)
        for _ in range(2): assert is_right(learn, 3e-2 if d == torch.bfloat16 else 1e-4)


@pytest.mark.cuda
@cases('device', ['cuda'], ['cuda'])
def test_a_model_moved_to_another_device_and_back_is_predicted_with(callback, device):
    model, dls = Pairs(), loaders(n=16)
    learn = learner(model, dls, cbs=callback())
    truth = preds_of(learn)
    for d in device, 'cpu', device:
        model.to(d); dls.to(torch.device(d))
        for _ in range(2): torch.testing.assert_close(preds_of(learn), truth, rtol=1e-2, atol=1e-2)
    with torch.no_grad(): model.head.weight.mul_(2)
    found = preds_of(learn)
    torch.testing.assert_close(found, preds_of(learn.remove_cb(callback)), rtol=1e-2, atol=1e-2)
