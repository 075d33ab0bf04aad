"`fused`: the same weights as fastai's `Adam` and `SGD`, in float64, and when `to_fastest` puts it in and out."
import pickle
import subprocess
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.vision.all import (Adam, Callback, Lamb, Larc, Learner, Lookahead, Optimizer, OptimWrapper, QHAdam, RAdam, RMSProp, SGD,
                               load_learner, ranger, sgd_step, weight_decay)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from channelslast import fused
from channelslast.learner.fused_optimizer import fused_argument
from channelslast.learner.setting import Setting
from .helpers import convnet, difference, find, image_folder, learner, learner_state, loaders, names_library, rows_of

Fused = type(fused(SGD)([nn.Parameter(torch.zeros(1))], lr=1.))  # class of the optimizers that `fused` makes
slow = partial(pytest.param, marks=pytest.mark.slow)
OPTIMIZERS = {  # the Learner's optimizer and the argument for its fused step
    'Adam': (Adam, 'opt_func=fused(Adam)'),
    'Adam by hand': (partial(Adam, wd=0.1, eps=1e-3, mom=0.8, sqr_mom=0.95), 'opt_func=fused(Adam, wd=0.1, eps=0.001, mom=0.8, sqr_mom=0.95)'),
    'Adam L2': (partial(Adam, wd=0.1, decouple_wd=False), 'opt_func=fused(Adam, wd=0.1, decouple_wd=False)'),
    'Adam lr': (partial(Adam, lr=0.02), 'opt_func=fused(Adam, lr=0.02)'),
    'SGD': (partial(SGD, wd=0.1), 'opt_func=fused(SGD, wd=0.1)'),
    'SGD L2': (partial(SGD, wd=0.1, decouple_wd=False), 'opt_func=fused(SGD, wd=0.1, decouple_wd=False)'),
    'momentum': (partial(SGD, mom=0.9, wd=0.1), 'opt_func=fused(SGD, mom=0.9, wd=0.1)'),
    'momentum L2': (partial(SGD, mom=0.9, wd=0.1, decouple_wd=False), 'opt_func=fused(SGD, mom=0.9, wd=0.1, decouple_wd=False)')}


class Branched(nn.Module):
    "A network with a branch that two of three batches skip, so that its parameters get no gradient."
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.branch = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.head, self.calls = nn.Linear(4, 4), 0
    def forward(self, x):
        self.calls += self.training
        x = self.norm(self.stem(x))
        return self.head((x + self.branch(x) if self.calls % 3 == 2 else x).mean((2, 3)))


def double_loaders(): return loaders(n=16, dtype=torch.float64)
def made(opt_func, model=None, **kwargs): return learner(model or convnet().double(), double_loaders(), **dict(lr=1e-2, opt_func=opt_func) | kwargs)
def weights(learn): return [t.detach().clone() for t in (*learn.model.parameters(), *learn.model.buffers())]
def state_tensors(learn): return [t for p in learn.model.parameters() for t in learn.opt.state.get(p, {}).values() if isinstance(t, torch.Tensor)]
def results(learn): return [*weights(learn), *state_tensors(learn), *(g for p in learn.model.parameters() if (g := p.grad) is not None)]
def close(a, b): return len(a) == len(b) and all(torch.allclose(s, o, rtol=1e-9, atol=1e-12) for s, o in zip(a, b))
def two_groups(m): return [list(m[:2].parameters()), list(m[2:].parameters())]
def three_groups(m): return [list(m[:2].parameters()), list(m[2:5].parameters()), list(m[5:].parameters())]


def results_of_both(opt_func, run, other=None, model=None, **kwargs):
    "The results of the same run with fastai's optimizer and with its fused step, or with the optimizer `other`."
    model, dls = model or convnet().double(), double_loaders()
    def _run(opt_func):
        learn = learner(deepcopy(model), dls, **dict(lr=1e-2, opt_func=opt_func) | kwargs)
        run(learn)
        return learn
    first, second = _run(opt_func), _run(other or fused(opt_func))
    assert other or type(second.opt) is Fused
    return results(first), results(second)


# the argument for the fused step

@pytest.mark.parametrize('opt_func, argument', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fused_argument_names_the_optimizer_and_its_arguments(opt_func, argument):
    learn, names = made(opt_func), {}
    exec('from fastai.vision.all import *\nfrom channelslast import *', names)
    assert fused_argument(learn) == argument and learn.opt is None
    f = eval(f'dict({argument})', names)['opt_func']
    assert type(f) is fused and (f.func, f.keywords) == (getattr(opt_func, 'func', opt_func), getattr(opt_func, 'keywords', {}))


def own_optimizer(params, lr, **kwargs): return Optimizer(params, [weight_decay, sgd_step, lambda p, **kw: None], lr=lr)
def lookahead(params, **kwargs): return Lookahead(Adam(params, **kwargs))
def with_weight(weight, opt_func=Adam):
    m = convnet()
    m[0].weight = weight
    return made(opt_func, m)
def assigned(opt_func, own=Adam): learn = made(own); learn.opt = opt_func(learn.model.parameters(), lr=1.); return learn
def with_sparse_weight(): m = convnet(); m.p = nn.Parameter(torch.eye(2).to_sparse()); return m
class OwnParameter(nn.Parameter): pass
class OwnPartial(partial): pass


UNSUPPORTED = dict(
    **{o.__name__: partial(made, o) for o in (Lamb, Larc, QHAdam, RAdam, RMSProp, ranger, own_optimizer, lookahead)},
    partial_of_Lamb=lambda: made(partial(Lamb, wd=0.1)), OptimWrapper=lambda: made(partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)),
    OptimWrapper_instance=lambda: made(OptimWrapper(opt=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.))),
    already_fused=lambda: made(fused(Adam)), own_partial=lambda: made(OwnPartial(SGD)),
    half_precision=lambda: made(Adam, convnet().half()), complex_numbers=lambda: made(Adam, nn.Linear(2, 2, dtype=torch.complex64)),
    meta_device=lambda: made(Adam, convnet().to('meta')), parameter_class=lambda: with_weight(OwnParameter(torch.randn(8, 3, 3, 3))),
    expanded_weight=lambda: with_weight(nn.Parameter(torch.zeros(8, 3, 1, 1).expand(8, 3, 3, 3))), sparse_weight=lambda: made(SGD, with_sparse_weight()),
    sparse_gradients=lambda: made(SGD, nn.Sequential(*convnet(), nn.Embedding(2, 2, sparse=True))),
    parameters_in_two_groups=lambda: made(SGD, splitter=lambda m: [list(m.parameters()), list(m[0].parameters())]),
    assigned_Lamb=lambda: assigned(Lamb), assigned_SGD=lambda: assigned(SGD), assigned_lookahead=lambda: assigned(lookahead),
    unknown_hyperparameter=lambda: assigned(partial(Optimizer, cbs=[weight_decay, sgd_step], wd=0., dampening=True), SGD),
    non_native_precision=lambda: made(Adam, cbs=NonNativeMixedPrecision()))


@pytest.mark.parametrize('make', UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_fused_argument_is_None_where_no_kernel_computes_the_same(make): assert fused_argument(make()) is None


@pytest.mark.parametrize('name, opt_func', [('adam', partial(Adam, decouple_wd=False)), ('adamw', Adam), ('sgd', SGD)])
def test_without_a_functional_optimizer_in_PyTorch_only_its_fused_step_is_missing(monkeypatch, name, opt_func):
    "Another version of PyTorch may not have it: `fused` says so, and the package imports."
    module = sys.modules[f'torch.optim.{name}']
    monkeypatch.delattr(module, name)
    assert fused_argument(made(opt_func)) is None
    with pytest.raises(ValueError, match="and needs PyTorch's functional `adam`, `adamw` and `sgd`"): made(fused(opt_func)).fit(1)
    monkeypatch.setitem(sys.modules, f'torch.optim.{name}', None)  # no such module
    assert fused_argument(made(opt_func)) is None
    others = {'adam': partial(Adam, decouple_wd=False), 'adamw': Adam, 'sgd': SGD}.items()
    assert all(fused_argument(made(f)) for n, f in others if n != name)


@pytest.mark.parametrize('steps', [(1, 1), (1, 2)], ids=['equal', 'different'])
def test_step_counters_are_fp32_whatever_the_default_dtype(monkeypatch, steps):
    "The kernels of CUDA read them as fp32."
    seen, module = set(), sys.modules['torch.optim.adamw']
    real = module.adamw
    def _adamw(ps, grads, avgs, sqr_avgs, max_avgs, counts, **kwargs):
        seen.update(t.dtype for t in counts)
        return real(ps, grads, avgs, sqr_avgs, max_avgs, counts, **kwargs)
    monkeypatch.setattr(module, 'adamw', _adamw)
    ps = [nn.Parameter(torch.ones(3)) for _ in steps]
    opt = fused(Adam)(ps, lr=0.1)
    for p, step in zip(ps, steps): p.grad, opt.state[p]['step'] = torch.ones(3), step
    torch.set_default_dtype(torch.float64)
    try: opt.step()
    finally: torch.set_default_dtype(torch.float32)
    assert seen == {torch.float32}


@pytest.mark.slow
def test_the_package_imports_without_the_functional_optimizers_of_PyTorch():
    code = "import torch.optim, sys; [delattr(sys.modules[f'torch.optim.{o}'], o) for o in ('adam', 'adamw', 'sgd')]; import channelslast; print('imported')"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.stdout == 'imported\n', out.stderr


def test_fused_argument_leaves_the_learner_as_it_is():
    learn = made(Adam, splitter=three_groups)
    learn.freeze(); learn.fit(1)
    before = learner_state(learn)
    assert fused_argument(learn) == 'opt_func=fused(Adam)' and difference(before, learner_state(learn)) == ''


# equal weights, state and gradients

def one_cycle(learn, **kwargs): learn.fit_one_cycle(3, **kwargs)  # 6 steps
def with_slices(learn): learn.fit_one_cycle(3, slice(1e-4, 1e-2), wd=0.3)
def freeze_and_unfreeze(learn):
    learn.freeze(); learn.fit_one_cycle(1, slice(1e-2))
    learn.unfreeze(); learn.fit_one_cycle(2, slice(1e-4, 1e-2), wd=0.2)
def freeze_after_training(learn): learn.fit(1); learn.freeze(); learn.fit(2); learn.opt.clear_state(); learn.fit(1)
def freeze_and_reset(learn):
    "The new optimizer finds the frozen layers' gradients of the old one, which are zero."
    learn.unfreeze(); learn.fit(1, wd=0.1); learn.freeze(); learn.fit(2, reset_opt=True, wd=0.1)
def freeze_and_remove_gradients(learn):
    "Frozen layers without a gradient don't decay, and their averages stay."
    learn.fit(1, wd=0.1); learn.freeze(); learn.model.zero_grad(); learn.fit(2, wd=0.1)
    learn.unfreeze(); learn.fit(1, wd=0.1)
def remove_some_gradients(learn):
    learn.fit(1, wd=0.1); learn.freeze(); learn.model[0].weight.grad = None; learn.fit(1, wd=0.1); learn.fit(1, reset_opt=True)
def set_hypers(learn):
    learn.create_opt()
    learn.opt.set_hyper('wd', [0.3, 0., 0.1])
    if 'eps' in learn.opt.hypers[0]: learn.opt.set_hyper('eps', 1e-2)
    learn.fit(3)


RUNS = dict(one_cycle=(one_cycle, {}), wd_in_fit=(partial(one_cycle, wd=0.3), {}), wd_of_the_learner=(one_cycle, dict(wd=0.2, lr=0.03)),
            no_schedule=(lambda learn: learn.fit(3, 1e-2), {}), decayed_norms=(one_cycle, dict(wd_bn_bias=True)),
            momentum_down_to_0=(partial(one_cycle, moms=(0.9, 0., 0.9)), {}), momentum_0=(partial(one_cycle, moms=(0., 0., 0.)), {}),
            reset_opt=(lambda learn: (learn.fit(1), learn.fit(2, reset_opt=True)), {}), branches=(lambda learn: learn.fit(3), dict(model=Branched().double())),
            **{o.__name__: (o, dict(splitter=three_groups)) for o in (
                with_slices, freeze_and_unfreeze, freeze_after_training, freeze_and_reset, freeze_and_remove_gradients, remove_some_gradients, set_hypers)},
            frozen_norms=(freeze_and_unfreeze, dict(splitter=three_groups, train_bn=False)))
FAST = {*((n, r) for n in OPTIMIZERS for r in ('freeze_and_reset', 'freeze_and_remove_gradients')), *((n, 'branches') for n in OPTIMIZERS if n != 'Adam lr'),
        *(('Adam', r) for r in RUNS), *(('momentum', r) for r in ('wd_in_fit', 'momentum_down_to_0', 'momentum_0', 'decayed_norms', 'freeze_after_training')),
        *((n, r) for n in ('Adam L2', 'SGD', 'momentum L2') for r in ('freeze_and_unfreeze', 'set_hypers')), ('SGD L2', 'wd_in_fit'),
        ('Adam by hand', 'with_slices')}


@pytest.mark.parametrize('name, run', [(n, r) if (n, r) in FAST else slow(n, r) for n in OPTIMIZERS for r in RUNS])
def test_fused_gives_the_weights_state_and_gradients_of_fastai(name, run):
    f, kwargs = RUNS[run]
    assert close(*results_of_both(OPTIMIZERS[name][0], f, **kwargs))


@pytest.mark.parametrize('wrong', [dict(eps=1e-8), dict(sqr_mom=0.999), dict(wd=0.), dict(decouple_wd=False), dict(mom=0.8)], ids=str)
def test_the_comparison_notices_a_wrong_hyperparameter(wrong):
    assert not close(*results_of_both(partial(Adam, wd=0.01), lambda learn: learn.fit(3), other=fused(partial(Adam, wd=0.01), **wrong)))


def test_an_OptimWrapper_decays_norms_and_biases_but_fused_does_not():
    plain = partial(OptimWrapper, opt=torch.optim.AdamW, fused=True, eps=1e-5, betas=(0.9, 0.99))
    for decays in False, True:
        first, second = results_of_both(Adam, one_cycle, other=plain, wd_bn_bias=decays)
        n = len([*convnet().parameters(), *convnet().buffers()])  # the weights: the state has other names
        assert close(first[:n], second[:n]) == decays


def test_fused_of_a_function_that_calls_Adam_gives_its_weights():
    def own(params, **kwargs): return Adam(params, wd=0.1, **kwargs)
    assert close(*results_of_both(own, one_cycle))


def test_callbacks_find_the_gradients_of_fastai_at_each_event():
    "Zeros after the step, as some read them in `after_batch`, and None before the first gradient."
    def _seen(opt_func):
        torch.manual_seed(0)
        class Reads(Callback):
            def before_batch(self): seen.append([getattr(p.grad, 'clone', lambda: torch.tensor(-1.))() for p in self.model.parameters()])
            after_batch = before_step = before_batch
        seen, learn = [], made(opt_func, cbs=Reads())
        learn.fit(1)
        return sum(seen, [])
    assert close(_seen(SGD), _seen(fused(SGD)))


@pytest.mark.parametrize('name', ['Adam', slow('momentum')])
@pytest.mark.parametrize('before, after', [(0, 1), (1, 0), slow(1, 1)])
def test_a_checkpoint_continues_in_the_other_optimizer(tmp_path, name, before, after):
    opt_func = OPTIMIZERS[name][0]
    model, dls = convnet().double(), double_loaders()
    def _make(is_fused): return learner(deepcopy(model), dls, lr=1e-2, path=tmp_path, opt_func=fused(opt_func) if is_fused else opt_func)
    straight, first, second = _make(0), _make(before), _make(after)
    straight.fit(2); straight.fit(1)
    first.fit(2); first.save('a')
    second.load('a'); second.fit(1)
    assert close(weights(straight), weights(second)) and len(state_tensors(second)) > 6


@pytest.mark.parametrize('name', ['Adam', 'momentum'])
@pytest.mark.filterwarnings('ignore:grad and param do not obey')
def test_fused_in_other_memory_formats_gives_the_weights_of_fastai(name):
    "The format is changed by this library, and by a `to` that keeps the old strides of state and gradients."
    class Turned(Callback):
        def before_step(self):
            for p in self.model.parameters(): p.grad = p.grad.contiguous()
    def _run(learn):
        learn.fit(1); learn.to_channelslast(to_fp16=False); learn.fit(1); learn.to_contiguous(); learn.fit(1)
        learn.model.to(memory_format=torch.channels_last); learn.fit(1, cbs=Turned())
    assert close(*results_of_both(OPTIMIZERS[name][0], _run))


@pytest.mark.cuda
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_fused_gives_the_weights_of_fastai_on_CUDA(name):
    assert close(*results_of_both(OPTIMIZERS[name][0], freeze_and_unfreeze, splitter=three_groups, model=convnet().double().cuda()))


# copies and files

def test_copies_stay_fused_and_pickles_are_fastais():
    f = fused(partial(SGD, mom=0.9), wd=0.1)
    assert f.keywords == dict(mom=0.9, wd=0.1) and deepcopy(f) is f
    again = pickle.loads(pickle.dumps(f))
    assert type(again) is partial and again.func is SGD and again.keywords == f.keywords
    learn = made(f)
    learn.fit(1)
    again = pickle.loads(pickle.dumps(learn.opt))
    assert type(again) is Optimizer and type(deepcopy(learn.opt)) is Fused and again.hypers == learn.opt.hypers
    assert vars(again).keys() == vars(SGD([nn.Parameter(torch.zeros(1))], lr=1.)).keys() and not names_library(pickle.dumps((f, learn.opt)))


def test_an_export_holds_a_plain_optimizer_function(tmp_path):
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path, opt_func=fused(Adam, eps=1e-6))
    learn.fit(1); learn.export('e.pkl'); learn.fit(1)
    again = load_learner(tmp_path/'e.pkl')
    again.create_opt()
    assert type(learn.opt) is Fused and type(again.opt) is Optimizer and again.opt.hypers[0]['eps'] == 1e-6
    assert not names_library((tmp_path/'e.pkl').read_bytes())


@pytest.mark.slow
def test_an_export_loads_where_this_library_is_not_installed(tmp_path):
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path, opt_func=fused(Adam, eps=1e-6))
    learn.fit(1); learn.export('e.pkl')
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
learn = load_learner({str(tmp_path/'e.pkl')!r})
learn.create_opt()
print(learn.opt_func.func is Adam, learn.opt.hypers[0]['eps'])"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.stdout == 'True 1e-06\n', out.stderr


def test_step_with_a_closure_raises_NotImplementedError():
    with pytest.raises(NotImplementedError): fused(SGD)([nn.Parameter(torch.zeros(1))], lr=1.).step(closure=lambda: 0)


class Operations(TorchDispatchMode):
    "The names of all operations."
    def __init__(self): super().__init__(); self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('opt_func, kernel', [(Adam, '_fused_adamw_'), (partial(Adam, decouple_wd=False), '_fused_adam_'), (SGD, '_fused_sgd_')],
                         ids=['adamw', 'adam', 'sgd'])
def test_the_step_runs_PyTorchs_fused_kernel(opt_func, kernel):
    learn = made(fused(opt_func) if opt_func in (Adam, SGD) else fused(opt_func.func, **opt_func.keywords))
    learn.create_opt()
    learn.model(learn.dls.one_batch()[0].double()).sum().backward()
    with Operations() as seen: learn.opt.step()
    assert kernel in seen.names


# what `to_fastest` puts in

@pytest.fixture
def optimizers_take(fake_steps, clock, monkeypatch):
    "`optimizers_take(own, fused)` sets the milliseconds of the optimizers' steps, or an error. The rest of a step takes 60."
    ms = {}
    for cls in Optimizer, Fused:
        def _step(self, *args, cls=cls, real=cls.step):
            if isinstance(ms[cls], Exception): raise ms[cls]
            clock.pass_ms(ms[cls])
            return real(self, *args)
        monkeypatch.setattr(cls, 'step', _step)
    def _take(own, fused): ms.update({Optimizer: own, Fused: fused})
    fake_steps(lambda setting, n: 60.)
    _take(40., 10.)
    return _take


DEVICES = dict(argvalues=['cpu', 'cuda'], ids=['CPU', 'fake GPU'])  # on a GPU the optimizer's own time is unknown


def made_on(device, gpu): return made(Adam) if device == 'cpu' else gpu().learner(convnet().double(), double_loaders(), opt_func=Adam)


@pytest.mark.parametrize('device', **DEVICES)
def test_the_fused_optimizer_is_measured_for_all_settings_that_may_still_win(optimizers_take, gpu, device):
    "Speedups are over contiguous fp32 with the Learner's own optimizer. On a CPU, where times add up, only that is shown without."
    t = find(made_on(device, gpu), optimizer=True)
    rows = {k: (round(r.ms, 6), round(r.speedup, 4)) for k, r in rows_of(t).items()}
    plain = ['contiguous, fp32'] if device == 'cpu' else ['contiguous, fp32', 'channels last, fp32']
    assert rows == {**{k: (100., 1.) for k in plain}, **{f'{o}, fp32, fused': (70., 1.4286) for o in ('contiguous', 'channels last')}}
    assert t.fused is True and rows_of(t)['contiguous, fp32, fused'] is t.best and t.advice == 'opt_func=fused(Adam)'
    assert (t.optimizer_ms, t.fused_ms) == ((pytest.approx(40.), pytest.approx(10.)) if device == 'cpu' else (None, None))
    assert t.verdict.startswith('Use contiguous fp32 with the fused optimizer: 1.43× as fast as contiguous fp32.')
    assert t.verdict.endswith('Without measuring: learn.opt_func = fused(Adam); learn.to_contiguous(to_fp32=True)')


@pytest.mark.parametrize('opt_func', [Adam, fused(Adam)], ids=['plain', 'fused'])
def test_format_find_leaves_the_optimizer_as_it_was(optimizers_take, opt_func):
    learn = made(opt_func, splitter=three_groups)
    find(learn, optimizer=True)
    assert learn.opt is None and learn.opt_func is opt_func
    learn.freeze(); learn.fit(1)
    before = learner_state(learn)
    find(learn, optimizer=True)
    assert difference(before, learner_state(learn)) == ''


SHARE = 'The optimizer takes 40.0 ms of each step (40%).'


@pytest.mark.parametrize('own, fast, kwargs, fused_ms, said', [
    (40., 38.5, {}, 38.5, SHARE), (40., 45., {}, 45., SHARE),
    (40., 10., dict(optimizer=False), None, f'{SHARE} Pass `opt_func=fused(Adam)` to `Learner`: the same weights in less time.')],
    ids=['within a tie', 'slower', 'not asked for'])
def test_to_fastest_keeps_the_own_optimizer_without_a_clear_gain(optimizers_take, own, fast, kwargs, fused_ms, said):
    optimizers_take(own, fast)
    learn = made(Adam).to_fastest(num_it=3, **kwargs)
    t = learn.format_timings
    assert t.fused is False and t.verdict.endswith(said) and [(round(r.ms, 6), round(r.speedup, 6)) for r in t.rows] == [(100., 1.)]*2
    assert t.fused_ms == (fused_ms and pytest.approx(fused_ms))
    assert learn.opt_func is Adam and learn.opt is None


@pytest.mark.parametrize('device', **DEVICES)
def test_a_fused_step_that_fails_is_not_taken(optimizers_take, gpu, device):
    optimizers_take(40., RuntimeError('no kernel'))
    t = find(made_on(device, gpu), optimizer=True)
    assert t.fused is False and t.optimizer_ms is None and t.fused_ms is None and not any(r.valid for r in t.rows if r.fused)
    assert (round(t.best.ms, 6), round(t.best.speedup, 6)) == (100., 1.) and {r.note for r in t.rows if r.fused} <= {'RuntimeError: no kernel'}


@pytest.mark.parametrize('name', ['sparse_gradients', 'already_fused', 'lookahead'])
def test_to_fastest_leaves_an_optimizer_without_a_fused_equivalent_in_place(optimizers_take, name):
    learn = made(SGD, nn.Sequential(convnet(), nn.Identity()).double()) if name == 'sparse_gradients' else UNSUPPORTED[name]()
    if name == 'sparse_gradients': learn.model[1].e = nn.Embedding(2, 2, sparse=True)
    if name == 'already_fused': learn.fit(1)
    own, opt = learn.opt_func, learn.opt
    learn.to_fastest(num_it=1).to_contiguous(to_fp32=True)
    assert learn.opt_func is own and learn.opt is opt and learn.format_timings.fused_ms is None


def opt_state(learn): return dict(learner_state(learn)['model'], hypers=[dict(h) for h in learn.opt.hypers], tensors_of_opt=state_tensors(learn))


@pytest.mark.parametrize('fitted', [False, True])
def test_to_fastest_puts_the_fused_optimizer_in_and_to_contiguous_takes_it_out(optimizers_take, capsys, fitted):
    own = partial(Adam, eps=1e-6)
    learn = made(own, splitter=three_groups)
    if fitted:
        learn.fit(1); learn.freeze(); learn.opt.set_hyper('wd', [0.3, 0., 0.1])
        state = opt_state(learn)
    capsys.readouterr()
    learn.to_fastest(num_it=3)
    hint = ' ' + learn.format_timings.frozen_hint if fitted else ''
    assert capsys.readouterr().out == (f'Training in contiguous, fp32, fused: 1.43× as fast as contiguous fp32.{hint}\n'
                                       'Without measuring: learn.opt_func = fused(Adam, eps=1e-06); learn.to_contiguous(to_fp32=True)\n')
    assert type(learn.opt_func) is fused and learn.opt_func.func is Adam and learn.opt_func.keywords == dict(eps=1e-6)
    if fitted: assert type(learn.opt) is Fused and difference(state, opt_state(learn)) == '' and learn.opt.frozen_idx == 2
    learn.fit(1)
    assert type(learn.opt) is Fused and type(learn.to_contiguous().opt) is Fused
    state, copy = opt_state(learn), deepcopy(learn)
    for o in learn, copy:
        o.to_contiguous(to_fp32=True)
        assert o.opt_func is own and type(o.opt) is Optimizer and vars(o.opt).keys() == vars(own([nn.Parameter(torch.zeros(1))], lr=1.)).keys()
        if o is learn: assert difference(state, opt_state(o)) == ''
        o.fit(1)


@pytest.mark.parametrize('first', ['unfreeze', 'fit'])
def test_the_printed_line_gives_an_existing_optimizer_the_fused_step_at_the_next_fit(optimizers_take, first):
    "`unfreeze`, `fit` and `lr_find` make an optimizer. One of another kind stays, as in fastai."
    learn, other = made(Adam), made(SGD)
    for o in learn, other:
        o.unfreeze() if first == 'unfreeze' else o.fit(1)
        o.opt_func = fused(Adam)
    state = opt_state(learn)
    assert Setting.of(learn).fused and not Setting.of(other).fused and difference(state, opt_state(learn)) == ''
    t = find(learn, optimizer=True)
    assert t.optimizer_ms == pytest.approx(10.) and t.current.fused and type(learn.opt) is Optimizer
    for o in learn, other: o.fit(1)
    assert type(learn.opt) is Fused and type(other.opt) is Optimizer
    find(learn)
    assert type(learn.opt) is Fused and learn.opt._made_by is learn.opt_func


def test_a_later_to_fastest_measures_from_the_plain_optimizer(optimizers_take):
    learn = made(Adam).to_fastest(num_it=3)
    learn.fit(1)
    before = learner_state(learn)
    assert find(learn, optimizer=True).fused and difference(before, learner_state(learn)) == ''
    opt = learn.opt
    for kwargs in dict(optimizer=False), dict(train=False):  # these leave it in
        learn.to_fastest(num_it=1, **kwargs)
        assert learn.opt is opt and type(learn.opt_func) is fused and not any(r.fused for r in learn.format_timings.rows) == (kwargs != dict(optimizer=False))
    learn.to_fastest(num_it=3)
    assert type(learn.opt) is Fused and learn.to_contiguous(to_fp32=True).opt_func is Adam


def test_a_later_to_fastest_takes_the_fused_optimizer_out_where_it_no_longer_gains(optimizers_take):
    learn = made(Adam).to_fastest(num_it=3)
    learn.fit(1)
    optimizers_take(40., 45.)
    learn.to_fastest(num_it=3)
    assert learn.opt_func is Adam and type(learn.opt) is Optimizer and learn.format_timings.fused_ms == pytest.approx(45.)


@pytest.mark.parametrize('opt', ['plain', 'fused', None])
def test_to_contiguous_keeps_an_optimizer_that_the_user_has_put_in_since_to_fastest(optimizers_take, opt):
    learn = made(Adam).to_fastest(num_it=3)
    learn.fit(1)
    if opt is None: learn.opt_func = theirs = fused(SGD)
    else: learn.opt = theirs = {'plain': Adam, 'fused': fused(Adam)}[opt](learn.model.parameters(), lr=1.)
    learn.to_contiguous(to_fp32=True)
    assert (learn.opt_func is theirs and type(learn.opt) is Optimizer) if opt is None else (learn.opt is theirs and learn.opt_func is Adam)


def test_to_fastest_put_in_then_a_model_without_a_fused_step_gets_a_plain_optimizer(optimizers_take):
    learn = made(Adam).to_fastest(num_it=3)
    learn.model.half().float()
    learn.model[0].weight = nn.Parameter(torch.zeros(8, 3, 1, 1).expand(8, 3, 3, 3))
    learn.create_opt()
    assert type(learn.opt) is Optimizer


def test_a_learner_with_the_fused_optimizer_of_to_fastest_exports_and_saves_as_fastais(optimizers_take, tmp_path):
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path, opt_func=partial(Adam, eps=1e-6)).to_fastest(num_it=3)
    learn.fit(1)
    learn.export('e.pkl'); learn.save('s')
    assert type(learn.opt) is Fused and not names_library((tmp_path/'e.pkl').read_bytes() + (tmp_path/'models'/'s.pth').read_bytes())
    again = pickle.loads(pickle.dumps(learn.opt_func))
    assert type(again) is partial and not vars(again)
    learn.to_contiguous(to_fp32=True)  # the export has made another optimizer
    assert type(learn.opt) is Optimizer and type(learn.opt_func) is partial


def test_an_exported_learner_in_channels_last_with_the_fused_optimizer_of_to_fastest_loads(tmp_path):
    "`load_learner` makes it contiguous, and the record of `to_fastest` holds a plain `partial` there."
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path, opt_func=partial(Adam, eps=1e-6))
    Setting('channels_last', fused=True).apply(learn)
    learn.export('e.pkl')
    again = load_learner(tmp_path/'e.pkl')
    assert type(again.opt_func) is partial and again.opt_func.keywords == dict(eps=1e-6)


def put_in(learn): learn.to_fastest(num_it=1, formats='contiguous')
def take_out(learn): learn.to_contiguous(to_fp32=True)
def nothing(learn): pass


ORDERS = [(put_in, take_out, put_in), slow(nothing, put_in, take_out), slow(put_in, put_in, take_out)]


@pytest.mark.parametrize('name', ['Adam', 'momentum L2', *(slow(o) for o in OPTIMIZERS if o not in ('Adam', 'momentum L2'))])
@pytest.mark.parametrize('switches', [ORDERS[0], *(pytest.param(o.values, marks=o.marks) for o in ORDERS[1:])], ids=['in out in', 'late', 'twice'])
def test_training_continues_as_in_fastai_when_to_fastest_switches_the_optimizer(optimizers_take, name, switches):
    "Groups, state and averages of branches without gradients go on, as do layers that were frozen in between."
    def _groups(m): return [[*m.stem.parameters(), *m.norm.parameters()], [*m.branch.parameters(), *m.head.parameters()]]
    def _run(learn, switches):
        learn.fit(1); learn.fit(1, wd=0.2); switches[0](learn)
        learn.freeze(); learn.fit_one_cycle(1, slice(1e-2)); switches[1](learn)
        learn.fit(1); switches[2](learn)
        learn.unfreeze(); learn.fit(1, slice(1e-4, 1e-2))
        return results(learn)
    model, dls = Branched().double(), double_loaders()
    assert close(*(_run(learner(deepcopy(model), dls, lr=1e-2, opt_func=OPTIMIZERS[name][0], splitter=_groups), o) for o in (switches, [nothing]*3)))
