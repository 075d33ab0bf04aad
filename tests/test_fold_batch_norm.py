"""`FoldBatchNorm`: only safe pairs are folded, and predictions keep their numbers. Changes between predictions are in
test_never_stale.py; copies, threads and interruptions in test_hands_off.py."""
import copyreg
import gc
import pickle
import random
import threading
import warnings
import weakref
from copy import copy, deepcopy

import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.vision.all import Callback, CancelBatchException, DynamicUnet, Learner, hook_outputs, load_learner, partial
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from channelslast import ChannelsLast, FoldBatchNorm
from channelslast.core.compare import perturb, relative_error
from .helpers import (Pairs, block, convnet, difference, image_folder, learner, loaders, model_state, names_library, passes_in_new_process, preds_of,
                      shake, truth_of)


def check(model, folded=None, found=None, dtype=torch.float64, tol=1e-10, dls=None, warns=False, **kwargs):
    "Check that the first and later predictions equal those of the unfolded model, and that it stays as it was. Returns the Learner."
    learn = learner(model.to(dtype), dls or loaders(dtype=dtype), **kwargs)
    truth = preds_of(learn)
    before = model_state(model)
    learn.add_cb(FoldBatchNorm())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(2): assert relative_error(preds_of(learn), truth) <= tol
    assert [str(o.message) for o in told if 'FoldBatchNorm' in str(o.message)] == [] or warns
    assert difference(before, model_state(model)) == ''
    cb = learn.fold_batch_norm
    assert folded in (None, cb.folded) and found in (None, cb.found), (cb.folded, cb.found)
    return learn


def is_right(learn, tol=1e-5): return relative_error(preds_of(learn).double(), truth_of(learn).double()) < tol


# what is folded

def tap(f):
    "The third pair, with `f(self, y, z)` also reading the convolution's output `y`."
    def _between(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return f(self, y, z)
    return _between


KEPT = []
BETWEEN = { # by what reads the third convolution: how it is connected, and how many of the three pairs are folded; None: at least two
    'added': (tap(lambda self, y, z: z + y), 2), 'concatenated': (tap(lambda self, y, z: torch.cat([z, y], 1)[:, :8]), 2),
    'view': (tap(lambda self, y, z: z + y[:, :1]), 2), 'number': (tap(lambda self, y, z: z*y.flatten()[0].item()), 2),
    'detached': (tap(lambda self, y, z: z + y.detach().numpy().mean()), 2), 'kept': (tap(lambda self, y, z: (KEPT.append(y), z)[1]), 2),
    'a copy kept': (tap(lambda self, y, z: (KEPT.append(y.float()), z)[1]), 2),
    'changed in place': (lambda self, x: self.norm(self.conv(x).relu_()), 2), 'activation between': (lambda self, x: self.norm(self.conv(x).relu()), 2),
    'a part': (lambda self, x: self.norm(torch.cat([self.conv(x)[:, :4]]*2, 1)), 2), 'shape alone': (tap(lambda self, y, z: z*y.shape[1]), 3),
    'deleted': (tap(lambda self, y, z: z), 3), 'keyword': (lambda self, x: self.norm(input=self.conv(x)), 2),
    'twice the norm': (lambda self, x: self.norm(self.norm(self.conv(x))), 2), 'twice the conv': (lambda self, x: self.norm(self.conv(self.conv(x))), 2),
    'both twice': (lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))), 2),
    'the weight elsewhere': (tap(lambda self, y, z: z + self.conv.weight.mean()), None),
    'the bias elsewhere': (tap(lambda self, y, z: z*self.conv.bias.mean()), None),
    'the statistics elsewhere': (tap(lambda self, y, z: z + self.norm.running_mean.mean() + self.norm.weight.mean()), 3),
    'without call': (lambda self, x: self.norm.forward(self.conv.forward(x)), 2), 'order of registration': (lambda self, x: self.conv(self.norm(x)), 2)}


@pytest.mark.parametrize('name', BETWEEN)
def test_a_pair_is_folded_only_if_nothing_else_reads_the_convolution(name):
    f, folded = BETWEEN[name]
    learn = check(Pairs(f), folded)
    assert learn.fold_batch_norm.folded >= 2
    KEPT.clear()


@pytest.mark.parametrize('name', [pytest.param(o, marks=() if o in ('added', 'deleted') else pytest.mark.slow) for o in BETWEEN])
def test_a_pair_is_folded_in_fp32_as_in_fp64(name):
    f, folded = BETWEEN[name]
    check(Pairs(f), folded, dtype=torch.float32, tol=1e-5)
    KEPT.clear()


class SeesShapes:
    "A hook that the model owns."
    def __init__(self): self.n = 0
    def __call__(self, m, args, out): self.n = out.shape[1]


@pytest.mark.parametrize('hooked', ['conv', 'norm', 'Sequential of the conv', 'Sequential of the norm', 'elsewhere'])
def test_a_pair_whose_output_the_models_own_hook_sees_stays(hooked):
    m = Pairs()
    m.conv, m.norm, m.hook = nn.Sequential(m.conv), nn.Sequential(m.norm), SeesShapes()
    layers = {'conv': m.conv[0], 'norm': m.norm[0], 'Sequential of the conv': m.conv, 'Sequential of the norm': m.norm, 'elsewhere': m.two}
    layers[hooked].register_forward_hook(m.hook)
    check(m, 3 if hooked == 'elsewhere' else 2, 3)
    assert m.hook.n == 8


@pytest.mark.parametrize('kind', ['hook', 'pre-hook', 'backward hook'])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_hooks_get_the_users_modules_and_what_they_got_without_the_callback(kind, when):
    "As Grad-CAM and users who collect activations write them, registered before or after the first prediction."
    m, dls, seen = Pairs(), loaders(), []
    register = {'hook': m.conv.register_forward_hook, 'pre-hook': m.norm.register_forward_pre_hook, 'backward hook': m.norm.register_full_backward_hook}[kind]
    for fold in False, True:
        learn, got = learner(m, dls, cbs=FoldBatchNorm() if fold else None), []
        if when == 'after': preds_of(learn); preds_of(learn)
        h = register(lambda layer, args, *out: got.append((layer in (m.conv, m.norm), args[0].clone(), *[o.clone() for o in out])))
        for _ in range(2): preds_of(learn)
        h.remove()
        seen.append(got)
    assert difference(*seen) == '' and len(seen[0]) == (0 if kind == 'backward hook' else 8)
    assert is_right(learn)


def test_hook_outputs_of_fastai_stores_what_it_stored_without_the_callback():
    m = Pairs()
    learn = check(m, 3)
    for layer in m.conv, m.one, m.norm:
        with hook_outputs([layer]) as h:
            truth = []
            for on in False, True:
                if not on: learn.remove_cb(FoldBatchNorm)
                else: learn.add_cb(FoldBatchNorm())
                preds_of(learn); preds_of(learn)
                truth.append(h.stored[0].clone())
        assert relative_error(*truth) < 1e-10


def test_hooks_on_all_modules_see_the_unfolded_layers():
    m = Pairs()
    learn, seen = check(m, 3), []
    h = nn.modules.module.register_module_forward_hook(lambda m_, i, o: seen.append(o.clone()) if m_ is m.conv else None)
    try:
        preds_of(learn)
        preds_of(learn.remove_cb(FoldBatchNorm))
    finally: h.remove()
    assert len(seen) == 8 and all(map(torch.equal, seen[:4], seen[4:]))


def test_convolutions_of_each_dimension_are_folded():
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


def counts_as_changed(norm) -> bool:
    "True if PyTorch counts a pass in eval mode as a change of running statistics, as 2.8 does for `InstanceNorm2d`."
    if norm.running_var is None: return False
    before = norm.running_var._version
    norm.eval()(torch.randn(2, 8, 4, 4))
    return norm.running_var._version > before


@pytest.mark.parametrize('conv, norm, folded', [
    (Doubled, nn.BatchNorm2d, 2), (Same, nn.BatchNorm2d, 3), (nn.Conv2d, Act, 3), (nn.Conv2d, Shifted, 2), (nn.Conv2d, Skip, 2),
    (nn.Conv2d, Other, 2), (nn.Conv2d, Side, 2), (nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    (nn.Conv2d, partial(nn.InstanceNorm2d, affine=True, track_running_stats=True), 2),
    (nn.Conv2d, partial(nn.BatchNorm2d, track_running_stats=False), 2), (nn.Conv2d, partial(nn.BatchNorm2d, affine=False, eps=0.1), 3)])
def test_subclasses_are_folded_only_if_they_compute_the_same(conv, norm, folded):
    m = Pairs()
    m.conv, m.norm = conv(8, 8, 3), norm(8)
    if counts_as_changed(m.norm): folded = 0
    check(shake(m), folded, warns=not folded)


@pytest.mark.parametrize('wrap', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings('ignore')
def test_a_convolution_with_a_parametrized_weight_stays(wrap):
    m = Pairs()
    wrap(m.conv)
    check(m, 2, 3, warns=True)
    m = Pairs()
    learn = check(m, 3)
    wrap(m.conv)  # after the first predictions
    assert is_right(learn, 1e-10)


def test_a_batch_norm_whose_forward_was_replaced_stays_and_keeps_it():
    m = Pairs()
    own = m.norm.forward
    m.norm.forward = replaced = lambda x: own(x)*2
    check(m, 2)
    assert m.norm.forward is replaced


@pytest.mark.parametrize('counts', [True, False])
def test_a_batch_norm_in_training_mode_writes_its_statistics_once_per_batch(counts):
    class Train(Callback):
        order = 5
        def before_validate(self): self.model.norm.train()
    got = []
    for fold in False, True:
        torch.manual_seed(0)
        learn = learner(Pairs(), loaders(), cbs=[Train(), FoldBatchNorm()] if fold else Train())
        if not counts: learn.model.norm.num_batches_tracked = None
        got.append([preds_of(learn), learn.model.norm.running_mean])
    assert all(map(torch.equal, *got)) and not learn.fold_batch_norm.folded


def test_a_batch_norm_in_training_mode_without_statistics_stays():
    m = Pairs()
    m.norm = nn.BatchNorm2d(8, track_running_stats=False)
    check(m, 2)


# predictions are as without the callback

def test_active_dropout_and_random_passes_draw_the_same_numbers():
    class Drops(Pairs):
        def forward(self, x): return super().forward(nn.functional.dropout(x, random.random()/2 + np.random.rand()/4, True))
    torch.manual_seed(0)
    m, dls, got = Drops(), loaders(), []
    for fold in False, True:
        learn = learner(m, dls, cbs=FoldBatchNorm() if fold else None)
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        got.append([preds_of(learn), torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())])
    assert learn.fold_batch_norm.folded == 3 and all(relative_error(a, b) < 1e-5 for a, b in zip(*got))


GENERATORS = {'torch': (lambda: torch.Generator().manual_seed(0), lambda g: torch.rand((), generator=g)),
              'random': (lambda: random.Random(0), lambda g: g.random()),
              'numpy': (lambda: np.random.default_rng(0), lambda g: g.random()), 'old numpy': (lambda: np.random.RandomState(0), lambda g: g.rand())}


@pytest.mark.parametrize('kind', GENERATORS)
@pytest.mark.filterwarnings('ignore:.*stays un')
def test_a_model_with_a_random_generator_of_its_own_draws_the_same_numbers(kind):
    make, draw = GENERATORS[kind]
    class Noisy(Pairs):
        def forward(self, x): return super().forward(x)*(1 + float(draw(self.generator)))
    model, dls, got = Noisy(), loaders(), []
    for fold in False, True:
        model.generator = make()
        learn = learner(model, dls, cbs=FoldBatchNorm() if fold else None)
        got.append(torch.cat([preds_of(learn) for _ in range(3)]))
    torch.testing.assert_close(*got, rtol=1e-4, atol=1e-4)


def test_modules_that_end_in_another_thread_during_the_first_batch_are_no_part_of_it():
    started, tracing = threading.Event(), threading.Event()
    class InThread(nn.Module):
        def forward(self, x):
            started.set()
            assert tracing.wait(10)
            return x
    class First(nn.Module):
        def forward(self, x):
            tracing.set()
            thread.join()
            return x
    other = InThread()
    other.register_forward_hook(lambda *args: None)
    thread = threading.Thread(target=other, args=(torch.ones(1),))
    thread.start()
    assert started.wait(10)
    learn = learner(shake(nn.Sequential(First(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))))
    learn.add_cb(FoldBatchNorm())
    learn.get_preds()
    assert (learn.fold_batch_norm.folded, learn.fold_batch_norm.found) == (1, 1)


class Unlike(Pairs):
    "A private copy does something else: `f(output)`. `own` is the user's model."
    own = None
    def __init__(self, f): super().__init__(); self.f = f; Unlike.own = weakref.ref(self)
    def forward(self, x):
        out = super().forward(x)
        return out if self is Unlike.own() else self.f(out)


@pytest.mark.filterwarnings('ignore:.*stays unfolded')
def test_a_copy_that_fails_leaves_predictions_and_random_states_as_without_the_callback():
    def _fail(out):
        torch.rand(1)
        raise ValueError
    learn = learner(Unlike(_fail), cbs=FoldBatchNorm())
    state = torch.get_rng_state()
    truth = preds_of(learn)
    after, _ = torch.get_rng_state(), torch.set_rng_state(state)
    assert torch.equal(preds_of(learn), truth) and not learn.fold_batch_norm.folded
    torch.set_rng_state(state)
    assert torch.equal(preds_of(learn.remove_cb(FoldBatchNorm)), truth) and torch.equal(after, torch.get_rng_state())


class Counts(Pairs):
    "Changes what `where` names in each pass."
    def __init__(self, where):
        super().__init__()
        self.where, self.n, self.seen, self.stats = where, 0, [], dict(n=0)
        self.register_buffer('b', torch.zeros(1))
    def forward(self, x):
        if self.where == 'number': self.n += 1
        if self.where == 'list': self.seen.append(1)
        if self.where == 'dictionary': self.stats['n'] += 1
        if self.where == 'buffer': self.b.add_(1)
        if self.where == 'assigned buffer': self.b = self.b + 1
        if self.where == 'input': x.mul_(2)
        return super().forward(x) + self.b
    def count(self): return self.n + len(self.seen) + self.stats['n'] + int(self.b)


@pytest.mark.parametrize('where', ['number', 'list', 'dictionary', 'buffer', 'assigned buffer', 'input'])
def test_a_model_that_changes_in_each_pass_runs_once_per_batch_as_without_the_callback(where):
    torch.manual_seed(0)
    state, got = Counts(where).state_dict(), []
    for fold in False, True:
        torch.manual_seed(1)
        learn = learner(Counts(where), loaders(), cbs=FoldBatchNorm() if fold else None)
        learn.model.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            got.append([*(preds_of(learn) for _ in range(3)), learn.model.count()])
    for a, b in zip(*got): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got[1][3] == (0 if where == 'input' else 12)
    assert where in ('list', 'dictionary') or not learn.fold_batch_norm.folded


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException])
@pytest.mark.parametrize('where', ['layer', 'after_pred', 'after_loss', 'loss'])
def test_a_folded_batch_that_ends_with_an_error_leaves_the_model_and_stays_folded(error, where):
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
    before = model_state(m)
    Raises.on = True
    if error is CancelBatchException: learn.validate()
    else:
        with pytest.raises(error): learn.validate()
    assert learn.model is m and difference(before, model_state(m)) == ''
    Raises.on = False
    assert is_right(learn) and learn.fold_batch_norm.folded == 2


def test_training_steps_are_bit_for_bit_as_without_the_callback():
    got = []
    for fold in False, True:
        torch.manual_seed(0)
        learn = learner(Pairs(), loaders(), cbs=FoldBatchNorm() if fold else None)
        learn.fit(2)
        got.append(([torch.tensor(learn.recorder.losses), *learn.model.parameters(), *learn.model.buffers()], [torch.tensor(o) for o in learn.recorder.values]))
    assert all(map(torch.equal, got[0][0], got[1][0])) and all(relative_error(a, b) < 1e-5 for a, b in zip(got[0][1], got[1][1]))


def test_callbacks_that_call_the_model_with_gradients_get_them():
    m, grads = Pairs(), []
    class Saliency(Callback):
        def after_pred(self):
            if self.training: return
            with torch.enable_grad(): grads.append(torch.autograd.grad(self.model(self.x.clone().requires_grad_()).sum(), self.model.conv.weight))
    learner(m, cbs=[FoldBatchNorm(), Saliency()]).get_preds()
    assert len(grads) == 4 and all(g.abs().sum() > 0 for g, in grads)


@pytest.mark.filterwarnings('ignore:You are shadowing')
def test_a_model_that_holds_its_Learner_predicts_with_it():
    class HoldsLearner(Pairs):
        def forward(self, x): return super().forward(x)*self.learn.factor
    learn = learner(HoldsLearner(), cbs=FoldBatchNorm())
    learn.model.learn, learn.factor = learn, 1.
    assert is_right(learn) and is_right(learn)
    learn.factor = 3.
    assert is_right(learn) and is_right(learn)


def test_a_model_with_a_lazy_layer_predicts_right_and_is_folded_after_its_first_batch():
    learn = learner(shake(nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))), cbs=FoldBatchNorm())
    for _ in range(3): assert is_right(learn)
    assert learn.fold_batch_norm.folded == 1


# passes, shapes

class CountsPasses(Pairs):
    "`passes`, outside the model, counts the passes of the model and of its copies."
    def __init__(self, passes): super().__init__(); self.count = lambda: passes.append(0)
    def forward(self, x):
        self.count()
        return super().forward(x)


def test_later_predictions_take_one_pass_per_batch_also_after_training():
    passes = []
    learn = learner(CountsPasses(passes), cbs=FoldBatchNorm())
    preds_of(learn)
    for train in False, False, True, True:
        if train: learn.fit(1)
        passes.clear()
        preds_of(learn)
        assert len(passes) == 4
    assert learn.fold_batch_norm.folded == 3 and is_right(learn)


@pytest.mark.parametrize('used', [False, True])
def test_an_attribute_that_changes_before_each_batch_costs_few_passes(used):
    passes = []
    class Steps(CountsPasses):
        step = 1.
        def forward(self, x): return super().forward(x)*(self.step if used else 1)
    class Step(Callback):
        def before_batch(self): self.model.step = 1. + self.iter
    learn = learner(Steps(passes), loaders(n=80), cbs=[Step(), FoldBatchNorm()])
    for _ in range(3): preds_of(learn)
    passes.clear()
    preds = preds_of(learn)
    assert len(passes) < 20  # for ten batches
    learn.remove_cb(FoldBatchNorm)
    assert relative_error(preds, preds_of(learn)) < 1e-5


def test_a_model_that_runs_other_layers_for_other_sizes_predicts_each_right():
    class Sizes(Pairs):
        def forward(self, x):
            y = self.conv(self.one(x))
            z = self.norm(y)
            return self.head((z + y if x.shape[-1] > 10 else z).mean((2, 3)))
    learn = learner(Sizes(), cbs=FoldBatchNorm())
    for size in 8, 12, 8, 9, 13, 8, 12:
        learn.dls = loaders((3, size, size), n=8)
        for _ in range(2): assert is_right(learn)


def test_after_many_sizes_a_new_size_takes_one_pass_per_batch():
    passes = []
    learn = learner(CountsPasses(passes), cbs=FoldBatchNorm())
    for size in range(8, 20):
        learn.dls = loaders((3, size, size), n=8)
        assert is_right(learn)
    learn.dls = loaders((3, 20, 20), n=8)
    passes.clear()
    preds_of(learn)
    assert len(passes) == 1 and learn.fold_batch_norm.folded == 3


# folding disables itself

class Diverges(Pairs):
    "Runs other layers for some data."
    def forward(self, x):
        x = self.two(self.one(x))
        y = self.conv(x)
        return self.head((self.way(self, x, y) if self.where(x) else self.norm(y)).mean((2, 3)))


WAYS = {'something between': lambda self, x, y: self.norm(y + 1),
        'the norm twice': lambda self, x, y: self.norm(self.norm(y)),
        'no norm': lambda self, x, y: y,
        'another conv': lambda self, x, y: self.conv(y),
        'the conv twice': lambda self, x, y: self.norm(self.conv(y)), 'no conv': lambda self, x, y: self.norm(x)}


@pytest.mark.parametrize('way', WAYS)
def test_a_model_that_runs_other_layers_for_other_data_is_unfolded_with_one_warning(way):
    m, n = Diverges(), []
    m.way, m.where = WAYS[way], lambda x: len(n) > 1
    learn = learner(m, loaders())
    class Count(Callback):
        def after_batch(self): n.append(0)
        def before_validate(self): n.clear()
    learn.add_cb(Count())
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    with pytest.warns(UserWarning, match='Diverges does not run the same layers') as told: found = preds_of(learn)
    assert relative_error(found, truth) < 1e-5 and learn.fold_batch_norm.folded == 0 and len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(preds_of(learn), truth)


def amplifying():
    "A deep model with one batch's running statistics, which amplifies rounding errors, and its data."
    model, dls = torchvision.models.resnet50(num_classes=4), loaders((3, 64, 64), n=8)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    with torch.no_grad(): model.train()(dls.valid.one_batch()[0])
    return model, dls


def test_rounding_that_the_model_amplifies_is_no_reason_to_stay_unfolded():
    model, dls = amplifying()
    learn = learner(model, dls)
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        preds_of(learn)
    assert learn.fold_batch_norm.folded == 53 and not [o for o in told if 'FoldBatchNorm' in str(o.message)]
    assert 1e-5 < relative_error(preds_of(learn), truth) < 1e-3  # or the test shows nothing


class Off(nn.Module):
    "Its output is off by this factor if the weights of `layer` are not the model's own, as if folding had made a mistake."
    own = None
    def __init__(self, net, error, layer): super().__init__(); self.net, self.error, self.layer = net, error, layer; Off.own = weakref.ref(self)
    def forward(self, x):
        own = self.layer.weight.data_ptr() == Off.own().layer.weight.data_ptr()
        return self.net(x)*(1 if own else 1 + self.error*torch.linspace(-1, 1, 4))


def test_a_mistake_in_a_model_that_amplifies_rounding_is_found():
    "A relative error of 1e-2 is not rounding."
    model, dls = amplifying()
    learn = learner(Off(model, 1e-2, model.conv1), dls, cbs=FoldBatchNorm())
    with pytest.warns(UserWarning, match='gives other outputs'): preds_of(learn)


@pytest.mark.parametrize('error, same', [(1e-6, True), (1e-4, False), (1., False), (float('nan'), False)])
def test_a_folded_model_that_gives_other_outputs_is_not_used_and_one_warning_names_its_class(error, same):
    net = Pairs()
    learn = learner(Off(net, error, net.conv))
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for _ in range(3): assert torch.equal(preds_of(learn), truth) or same
    told = [str(o.message) for o in told if 'FoldBatchNorm' in str(o.message)]
    assert len(told) == (not same) and all('FoldBatchNorm: Off gives other outputs' in o and 'stays unfolded' in o for o in told)
    assert learn.fold_batch_norm.folded == (3 if same else 0)


def test_a_model_that_fails_on_a_perturbed_input_stays_unfolded_if_its_output_differs():
    class Looks(Pairs):
        def forward(self, x):
            if not torch.equal(x, x.round(decimals=2)): raise ValueError('hundredths only')
            return super().forward(x)
    dls = loaders()
    dls.valid.dataset = [(x.round(decimals=2), y) for x, y in dls.valid.dataset]
    net = Looks()
    learn = learner(Off(net, 1e-4, net.conv), dls)
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    with pytest.warns(UserWarning, match='gives other outputs'): assert torch.equal(preds_of(learn), truth)
    assert torch.equal(preds_of(learn), truth) and learn.fold_batch_norm.folded == 0


def test_perturb_moves_numbers_by_a_rounding_error_up_or_down_and_leaves_whole_numbers():
    x = torch.cat([torch.randn(20_000), torch.arange(5.)])
    x = x[(x == x.round()) | (x.abs() > 1e-3)]  # no numbers that are too small for the eps of half precision
    for t in x, x.double(), x.half():
        a, b = perturb([t, 'word', torch.arange(3)], 0.)[0], perturb((t,), 1e-2)[0]
        moved = t != t.round()
        assert ((a > t) | (a < t))[moved].all() and 0.4 < (a > t)[moved].float().mean() < 0.6 and torch.equal(a[~moved], t[~moved])
        torch.testing.assert_close(a, t, rtol=2*torch.finfo(t.dtype).eps, atol=0)
        inside = moved & ((t - t.round()).abs() > 0.1)
        assert ((b - t).abs()/t.abs())[inside].min() > 0.005 and ((t.floor() <= b) & (b <= t.ceil()))[moved].all()


def test_perturb_crosses_no_whole_number_where_all_are_exact():
    "A probability above 1 makes `BCELoss` raise, on a GPU for the rest of the session."
    x = torch.tensor([0.999, 1e-6, -0.999, 127.5, -127.5]).repeat(50, 1)
    for eps in 2**-8, 0.3:
        y = perturb(x, eps)[:, :3 if eps > 0.1 else None]
        assert ((y.floor() == x[:, :y.shape[1]].floor()) | (y == x[:, :y.shape[1]].ceil())).all()
    assert (perturb(torch.full((50,), 1000.3), 2**-8) - 1000.3).abs().min() > 3


def test_relative_error_is_that_of_the_worst_tensor_and_infinite_where_outputs_cannot_be_compared():
    t = torch.tensor([1., float('nan'), float('inf')])
    inf = float('inf')
    assert relative_error((t, dict(a=t*2)), (t, dict(a=t*2))) == 0
    assert relative_error(t, t[:2]) == relative_error([], []) == relative_error(t, t.double()) == inf
    assert relative_error(t, torch.tensor([1., 2., inf])) == inf and relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error([torch.ones(3), torch.tensor(2)], [torch.ones(3), torch.tensor(1)]) == 1
    assert relative_error(torch.ones(1)*1.5, torch.ones(1)) == 0.5
    assert relative_error([torch.ones(1), torch.tensor([1e-9])], [torch.ones(1), torch.zeros(1)]) < 1e-5


OUTPUTS = {'tuple': lambda a, b: (a, b), 'nested dictionary': lambda a, b: dict(a=a, b=[b, None]), 'list': lambda a, b: [a, (b, 3)]}


@pytest.mark.parametrize('kind', OUTPUTS)
def test_outputs_in_containers_are_folded_and_equal(kind):
    class Many(Pairs):
        def forward(self, x): return OUTPUTS[kind](super().forward(x), self.two(self.one(x)).mean())
    class Keep(Callback):
        order = -50
        def after_pred(self): kept.append(self.pred)
    kept, learn = [], learner(Many(), cbs=Keep())
    learn.loss_func = lambda pred, y: torch.zeros(())
    learn.validate()
    learn.add_cb(FoldBatchNorm())
    learn.validate()
    assert learn.fold_batch_norm.folded == 1 and all(relative_error(a, b) < 1e-5 for a, b in zip(kept[:4], kept[4:]))


# with other callbacks

def dtypes_of_layers(learn):
    "The dtypes of weight and bias of each convolution and linear layer that runs in a prediction, in the order that they run in."
    dtypes = []
    def _spy(real): return lambda x, w, b=None, *args, **kw: (dtypes.append((w.dtype, None if b is None else b.dtype)), real(x, w, b, *args, **kw))[1]
    with pytest.MonkeyPatch.context() as mp:
        for k in 'conv2d', 'conv_transpose2d', 'linear': mp.setattr(nn.functional, k, _spy(getattr(nn.functional, k)))
        preds = preds_of(learn)
    return dtypes[:len(dtypes)//len(learn.dls.valid)], preds


BF16, FP32 = (torch.bfloat16,)*2, (torch.float32,)*2
PRECISE = {'none': (None, ''), 'one layer': ('one.0', 'F'), 'a block': ('one', 'F'), 'a pair': (['norm', 'conv'], 'xxF'), 'a batch norm': ('norm', ''),
           'convolutions': (nn.Conv2d, 'FFF'), 'batch norms': (nn.BatchNorm2d, ''), 'the head': (nn.Linear, 'xxxF')}


@pytest.mark.parametrize('which', [pytest.param(o, marks=() if o in ('none', 'a pair', 'the head') else pytest.mark.slow) for o in PRECISE])
@pytest.mark.filterwarnings('ignore')
def test_in_mixed_precision_layers_of_fp32_layers_stay_in_fp32_and_all_other_weights_are_cast_in_advance(has, which):
    has('bf16')
    layers, where = PRECISE[which]
    learn = learner(Pairs()).to_channelslast(amp_mode='bf16', fp32_layers=layers)
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    preds_of(learn)
    dtypes, found = dtypes_of_layers(learn)
    assert relative_error(found, truth) < 3e-2 and found.dtype == truth.dtype == torch.float32 and learn.fold_batch_norm.folded == 3
    assert dtypes == [FP32 if c == 'F' else BF16 for c in where.ljust(4, 'x')]


@pytest.mark.filterwarnings('ignore')
def test_in_channels_last_folded_weights_have_the_strides_of_the_convolutions(has):
    has('bf16')
    learn = learner(Pairs(), cbs=FoldBatchNorm()).to_channelslast(amp_mode='bf16')
    preds_of(learn)
    strides, real = [], nn.functional.conv2d
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(nn.functional, 'conv2d', lambda x, w, *args: (strides.append(w.stride()), real(x, w, *args))[1])
        preds_of(learn)
    m = learn.model
    assert strides[:3] == [o.weight.stride() for o in (m.one[0], m.two[0], m.conv)] and m.two[0].weight.stride()[1] == 1


@pytest.mark.filterwarnings('ignore')
def test_without_batch_norms_mixed_precision_computes_the_same_bit_for_bit_with_weights_cast_in_advance(has):
    has('bf16')
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4))
    m[6].weight = nn.Parameter(m[5].weight[:4].detach())
    learn = learner(m).to_channelslast(amp_mode='bf16')
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    assert torch.equal(preds_of(learn), truth) and torch.equal(preds_of(learn), truth) and learn.fold_batch_norm.folded == learn.fold_batch_norm.found == 0
    assert dtypes_of_layers(learn)[0] == [BF16]*4
    learn.to_contiguous(to_fp32=True)
    assert not hasattr(learn, 'fold_batch_norm') and not learn._grab_cbs(FoldBatchNorm)


@pytest.mark.filterwarnings('ignore')
def test_after_each_switch_of_precision_and_format_weights_are_of_the_new_dtype(has):
    has('bf16')
    learn = learner(Pairs(), cbs=FoldBatchNorm())
    first = preds_of(learn)
    for change in (lambda: learn.to_channelslast(amp_mode='bf16'), lambda: learn.to_contiguous(), lambda: learn.to_fp32(),
                   lambda: learn.to_channelslast(to_fp16=False)):
        change()
        half = hasattr(learn, 'mixed_precision')
        for _ in range(2): assert relative_error(preds_of(learn), first) < (3e-2 if half else 1e-5)
        assert dtypes_of_layers(learn)[0] == [BF16 if half else FP32]*4 and learn.fold_batch_norm.folded == 3


def test_strided_convolutions_of_few_channels_are_folded_in_channels_last():
    m = nn.Sequential(nn.Conv2d(3, 16, 1, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    learn = check(shake(m), 1, cbs=ChannelsLast())
    assert m[0].stride == (2, 2) and is_right(learn)


def test_models_in_half_precision_are_folded():
    m = Pairs().bfloat16()
    learn = learner(m, loaders(dtype=torch.bfloat16))
    learn.loss_func = lambda p, y: p.float().mean()
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    for _ in range(2): assert relative_error(preds_of(learn).float(), truth.float()) < 3e-2
    assert learn.fold_batch_norm.folded == 3


def test_in_inference_mode_predictions_are_folded_and_equal():
    learn = learner(Pairs(), cbs=FoldBatchNorm())
    truth = preds_of(learn)
    with torch.inference_mode(): assert relative_error(preds_of(learn), truth) < 1e-5 and learn.fold_batch_norm.folded == 3
    assert is_right(learn)
    learn = learner(Pairs(), cbs=FoldBatchNorm())
    with torch.inference_mode(): preds_of(learn); preds_of(learn)
    assert learn.fold_batch_norm.folded == 3 and is_right(learn)


def test_weights_made_in_inference_mode_stay_unfolded():
    with torch.inference_mode(): m = Pairs()
    learn = learner(m, cbs=FoldBatchNorm())
    with torch.inference_mode(): assert is_right(learn) and is_right(learn)
    assert learn.fold_batch_norm.folded == 0


def test_a_unet_is_folded():
    "Its skip connections are hooks that the model owns."
    m = DynamicUnet(nn.Sequential(block(3, 8), nn.MaxPool2d(2), block(8, 16), nn.MaxPool2d(2), block(16, 16)), 4, (16, 16))
    class Pool(nn.Module):
        def forward(self, x): return x.mean((2, 3))
    hooks = [h.removed for h in m.sfs]
    learn = check(shake(nn.Sequential(m, Pool())), dls=loaders((3, 16, 16), dtype=torch.float64))
    assert learn.fold_batch_norm.folded >= 3 and is_right(learn)
    learn.remove_cb(FoldBatchNorm)
    del learn
    gc.collect()
    assert [h.removed for h in m.sfs] == hooks  # a copy's finalizer would remove them


@pytest.mark.parametrize('wrap', ['compile', 'a compiled part', 'compile in place', 'DataParallel', 'script', 'a scripted part'])
@pytest.mark.filterwarnings('ignore')
def test_compiled_scripted_and_parallel_models_stay_unfolded(wrap):
    m = nn.Sequential(block(3, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    shake(m).eval()
    backend = dict(backend='eager')
    if wrap == 'a compiled part': m[0] = torch.compile(m[0], **backend)
    if wrap == 'compile in place': m[1].compile(**backend)
    if wrap == 'a scripted part': m[0] = torch.jit.script(m[0])
    wrappers = {'compile': lambda: torch.compile(m, **backend), 'DataParallel': lambda: nn.DataParallel(m), 'script': lambda: torch.jit.script(m)}
    learn = learner(wrappers.get(wrap, lambda: m)())
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    assert torch.equal(preds_of(learn), truth) and torch.equal(preds_of(learn), truth) and not learn.fold_batch_norm.folded


class CantBeCopied(Pairs):
    def __deepcopy__(self, memo): raise TypeError('not copyable')
class SharesItself(Pairs):
    "Copies of models share it, as users write for large frozen networks."
    def __deepcopy__(self, memo): return self


@pytest.mark.parametrize('make', [CantBeCopied, SharesItself, lambda: nn.Sequential(SharesItself())])
def test_a_model_that_cannot_be_copied_stays_as_it_is_and_unfolded(make):
    learn = learner(make(), cbs=FoldBatchNorm())
    before = model_state(learn.model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in range(2): assert is_right(learn, 1e-12)
    assert difference(before, model_state(learn.model)) == '' and not learn.fold_batch_norm.folded


def test_a_model_that_holds_objects_that_cannot_be_copied_is_folded():
    m = Pairs()
    m.inside = [m.head, threading.Lock(), (o for o in 'abc')]
    check(m, 3)


# memory, copies, exports

def alive(n): return sum(type(o) in (torch.Tensor, nn.Parameter) and o.numel() == n for o in gc.get_objects())


def test_folded_weights_share_the_models_memory_where_they_can_and_are_freed_with_the_callback():
    m = nn.Sequential(nn.Conv2d(3, 7, 11, padding=5), nn.BatchNorm2d(7), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 13), nn.Linear(13, 4))
    learn = learner(m, cbs=(cb := FoldBatchNorm()))
    n = 3*7*121
    before = alive(n)
    preds_of(learn)
    assert cb.folded == 1 and alive(n) > before
    linears = {o.data_ptr() for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.numel() == 91 and o.dtype == torch.float32}
    assert linears == {m[4].weight.data_ptr()}
    model = weakref.ref(m)
    learn.remove_cb(cb)
    gc.collect()
    assert alive(n) == before
    learn.model = learn.opt = m = None
    gc.collect()
    assert model() is None
    cb.learn = None


def test_a_callback_passed_to_one_call_is_gone_after_it():
    learn = learner(Pairs())
    truth = preds_of(learn)
    assert relative_error(preds_of(learn, cbs=FoldBatchNorm()), truth) < 1e-5 and not hasattr(learn, 'fold_batch_norm')
    assert abs(learn.validate(cbs=FoldBatchNorm())[0] - learn.validate()[0]) < 1e-5


class Own(FoldBatchNorm): "A user's subclass."


def test_copies_of_a_Learner_fold_their_own_weights():
    learn = learner(Pairs(), cbs=FoldBatchNorm())
    preds_of(learn)
    twin = deepcopy(learn)
    assert type(twin.fold_batch_norm) is FoldBatchNorm and copy(learn.fold_batch_norm).folded == 3 and not twin.fold_batch_norm.ready
    with torch.no_grad(): twin.model.conv.weight.mul_(2)
    assert is_right(twin) and is_right(learn) and twin.fold_batch_norm.folded == 3


def test_a_pickled_callback_is_fastais_and_a_users_subclass_stays_without_its_copies():
    own = learner(Pairs(), cbs=Own())
    preds_of(own)
    own.remove_cb(cb := own.own)
    cb.learn = own
    preds_of(own.add_cb(cb)); own.remove_cb(cb)
    data = pickle.dumps(cb)
    assert type(pickle.loads(data)) is Own and len(data) < 2000
    assert not names_library(pickle.dumps(FoldBatchNorm()))


def test_what_to_fastest_added_is_taken_away_from_copies_and_loaded_pickles(fake_steps):
    fake_steps({'contiguous, fp32, folded': 10.})
    learn = learner(shake(convnet())).to_fastest(train=False, num_it=3, layers=False)
    assert learn._grab_cbs(FoldBatchNorm)
    twin, loaded = deepcopy(learn), pickle.loads(pickle.dumps(learn))
    fake_steps({})
    for o in twin, learn: assert not o.to_fastest(num_it=1, layers=False)._grab_cbs(FoldBatchNorm)
    assert not loaded._grab_cbs(FoldBatchNorm) and Callback in map(type, loaded.cbs)
    assert not [o for o in loaded.to_fastest(num_it=1, layers=False).cbs if type(o) is Callback]


class Old:
    "Pickles as a `FoldBatchNorm` of the version whose `__init__` took `measured`."
    def __init__(self, cls, **state): self.cls, self.state = cls, state
    def __reduce__(self): return copyreg._reconstructor, (self.cls, object, None), self.state


@pytest.mark.parametrize('measured', [True, False])
def test_pickles_of_the_version_with_an_argument_load_and_fold(measured):
    cb = pickle.loads(pickle.dumps(Old(Callback, measured=measured)))
    own = pickle.loads(pickle.dumps(Old(Own, measured=measured)))
    assert type(cb) is Callback and type(own) is Own and cb.measured == own.measured == measured
    learn = learner(Pairs(), cbs=[cb, own])
    assert is_right(learn) and own.folded == 3


def test_exports_load_and_predict_without_this_library(tmp_path):
    m = nn.Sequential(block(3, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    learn = Learner(image_folder(tmp_path), shake(m), path=tmp_path, cbs=FoldBatchNorm())
    image = tmp_path/'data'/'a'/'0.png'
    expected = learn.predict(image)[2]
    assert learn.fold_batch_norm.folded == 2
    learn.export('e.pkl')
    assert learn.fold_batch_norm.folded == 2
    def _load():
        import sys
        for k in [o for o in sys.modules if o.split('.')[0] == 'channelslast']: sys.modules[k] = None
        loaded = load_learner(tmp_path/'e.pkl')
        with loaded.no_bar(): torch.testing.assert_close(loaded.predict(image)[2], expected, rtol=1e-4, atol=1e-5)
    assert passes_in_new_process(_load)
    loaded = load_learner(tmp_path/'e.pkl')
    loaded.add_cb(FoldBatchNorm())
    for _ in range(2): torch.testing.assert_close(loaded.predict(image)[2], expected, rtol=1e-4, atol=1e-5)
    assert loaded.fold_batch_norm.folded == 2


# many models

def grow(draw):
    "A random network of convolutions and batch norms with taps, shared modules, hooks and skips."
    kinds = 'pair', 'act', 'skip', 'tap', 'again', 'hook', 'between', 'norm first', 'kept', 'timm', 'inner hook'
    c, steps = 4, draw(st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 5)), min_size=1, max_size=6))
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, c, 1), nn.Linear(c, 4)
            self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=bool(k % 2), groups=1 + k % 2) for _, k in steps)
            self.norms = nn.ModuleList((Act if kind == 'timm' else nn.BatchNorm2d)(c) for kind, _ in steps)
            for (kind, k), a, b in zip(steps, self.convs, self.norms):
                if kind == 'hook': (a, b)[k % 2].register_forward_hook(Doubles(k > 2))
                if kind == 'inner hook': b.register_forward_pre_hook(AddsOne())
            self.hooks = [h for o in (*self.convs, *self.norms) for h in (*o._forward_hooks.values(), *o._forward_pre_hooks.values())]
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


class Doubles:
    def __init__(self, on): self.on = on
    def __call__(self, m, args, out): return out*2 if self.on else None


class AddsOne:
    def __call__(self, m, args): return args[0] + 1,


def any_network(n):
    @settings(max_examples=n, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck])
    @given(data=st.data(), last=st.booleans())
    def _check(data, last):
        check(grow(data.draw), dls=loaders((3, 4, 4), n=4, bs=2, dtype=torch.float64), cbs=ChannelsLast() if last else None)
    return _check


@pytest.mark.parametrize('n', [15, pytest.param(100, marks=pytest.mark.slow)])
def test_random_networks_predict_as_without_the_callback(n): any_network(n)()


ARCHITECTURES = '''
torchvision/resnet18 torchvision/mobilenet_v3_small torchvision/shufflenet_v2_x0_5 torchvision/mnasnet0_5 torchvision/regnet_y_400mf
torchvision/densenet121 timm/efficientnet_b0 timm/tf_mobilenetv3_small_075 timm/resnet10t timm/seresnet18 timm/dla46x_c timm/lcnet_050
timm/mobilevit_xxs timm/repvgg_a0'''.split()


@pytest.mark.parametrize('name', [pytest.param(o, marks=() if o in ('torchvision/resnet18', 'timm/lcnet_050') else pytest.mark.slow) for o in ARCHITECTURES])
@pytest.mark.filterwarnings('ignore')
def test_all_pairs_of_an_architecture_are_folded(name):
    source, name = name.split('/')
    m = (timm.create_model if source == 'timm' else torchvision.models.get_model)(name, num_classes=4)
    learn = check(shake(m), dls=loaders((3, 32, 32), n=4, bs=2, dtype=torch.float64))
    assert learn.fold_batch_norm.folded == learn.fold_batch_norm.found >= 10
    check(m, dtype=torch.float32, tol=1e-5, dls=loaders((3, 32, 32), n=4, bs=2), cbs=ChannelsLast())


@pytest.mark.cuda
@pytest.mark.parametrize('mode', [None, 'fp16', 'bf16'])
def test_on_CUDA_predictions_are_folded_and_follow_the_model_to_the_CPU(mode):
    learn = learner(Pairs(), loaders().to(torch.device('cuda')))
    learn.to_channelslast(to_fp16=bool(mode), amp_mode=mode)
    truth = preds_of(learn)
    learn.add_cb(FoldBatchNorm())
    for _ in range(2): assert relative_error(preds_of(learn), truth) < (5e-2 if mode else 1e-2)
    assert learn.fold_batch_norm.folded == 3
    learn.model.cpu()
    learn.dls = loaders()
    for _ in range(2): assert is_right(learn, 5e-2)
