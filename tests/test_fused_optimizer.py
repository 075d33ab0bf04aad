"The suggested line, with a fused step, gives the same weights as fastai's optimizer, in float64."
import pickle
import re
import subprocess
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.vision.all import (Adam, Callback, Lamb, Larc, Learner, Lookahead, Optimizer, OptimWrapper, QHAdam, RAdam, RMSProp, SGD,
                               ranger, sgd_step, weight_decay)
from torch import nn
from torch.utils._pytree import tree_leaves

from channelslast import fused
from channelslast.find import train_benchmark
from channelslast.learner.fused_optimizer import FusedOptimizer, fused_argument, restore_optimizer, use_fused
from channelslast.learner.preserve_learner import preserve_learner
from .conftest import convnet, learner, loaders, names_library
from .test_channels_last import image_folder

GIVEN = {  # name: the Learner's optimizer, the suggested line
    'Adam': (Adam, 'opt_func=fused(Adam)'),
    'Adam by hand': (partial(Adam, wd=0.1, eps=1e-3, mom=0.8, sqr_mom=0.95), 'opt_func=fused(Adam, wd=0.1, eps=0.001, mom=0.8, sqr_mom=0.95)'),
    'Adam L2': (partial(Adam, wd=0.1, decouple_wd=False), 'opt_func=fused(Adam, wd=0.1, decouple_wd=False)'),
    'Adam lr': (partial(Adam, lr=0.02), 'opt_func=fused(Adam, lr=0.02)'),
    'SGD': (partial(SGD, wd=0.1), 'opt_func=fused(SGD, wd=0.1)'),
    'SGD L2': (partial(SGD, wd=0.1, decouple_wd=False), 'opt_func=fused(SGD, wd=0.1, decouple_wd=False)'),
    'momentum': (partial(SGD, mom=0.9, wd=0.1), 'opt_func=fused(SGD, mom=0.9, wd=0.1)'),
    'momentum L2': (partial(SGD, mom=0.9, wd=0.1, decouple_wd=False), 'opt_func=fused(SGD, mom=0.9, wd=0.1, decouple_wd=False)')}


def execute(line):
    "Evaluate the line in a namespace like a user's."
    names = {}
    exec('from fastai.vision.all import *\nfrom channelslast import *', names)
    return eval(f'dict({line})', names)


class Sometimes(nn.Module):
    "A network with a branch that some batches skip."
    def __init__(self): super().__init__(); self.always, self.branch, self.calls = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), 0
    def forward(self, x):
        self.calls += self.training
        return self.always(x) + (self.branch(x) if self.calls % 3 == 2 else 0)


def three_groups(m): return [list(m[:2].parameters()), list(m[2:5].parameters()), list(m[5:].parameters())]
def once(learn, **kwargs): learn.fit_one_cycle(5, **kwargs)  # 20 steps
def sliced(learn): learn.fit_one_cycle(5, slice(1e-4, 1e-2), wd=0.3)
def tuned(learn):
    learn.freeze(); learn.fit_one_cycle(2, slice(1e-2))
    learn.unfreeze(); learn.fit_one_cycle(3, slice(1e-4, 1e-2), wd=0.2)
def frozen_again(learn): learn.fit(2); learn.freeze(); learn.fit(3); learn.opt.clear_state(); learn.fit(1)
def by_hand(learn):
    learn.create_opt()
    learn.opt.set_hyper('eps', 1e-2); learn.opt.set_hyper('wd', [0.3, 0., 0.1])
    learn.fit(5)


RUNS = dict(one_cycle=(once, {}), wd_in_fit=(partial(once, wd=0.3), {}), learner_wd=(once, dict(wd=0.2, lr=0.03)),
            no_schedule=(lambda learn: learn.fit(5, 1e-2), {}), decayed_norms=(once, dict(wd_bn_bias=True)),
            to_momentum_0=(once, dict(moms=(0.9, 0., 0.9))), momentum_0=(lambda learn: learn.fit_one_cycle(5, moms=(0., 0., 0.)), {}),
            slices=(sliced, dict(splitter=three_groups)), freeze=(tuned, dict(splitter=three_groups)),
            frozen_norms=(tuned, dict(splitter=three_groups, train_bn=False)), frozen_again=(frozen_again, dict(splitter=three_groups)),
            reset=(lambda learn: (learn.fit(2), learn.fit(3, reset_opt=True)), {}))


def made(opt_func, model=None, **kwargs):
    return learner(model or convnet().double(), loaders(dtype=torch.float64), **{'lr': 1e-2, **dict(opt_func=opt_func), **kwargs})


def weights(learn): return [t.detach().clone() for t in (*learn.model.parameters(), *learn.model.buffers())]


def both(opt_func, run=once, other=None, model=None, **kwargs):
    "The weights after the same run with fastai's optimizer and with the suggested line (or the optimizer `other`)."
    model, dls = model or convnet().double(), loaders(dtype=torch.float64)
    first = learner(deepcopy(model), dls, **{'lr': 1e-2, 'opt_func': opt_func, **kwargs})
    line = execute(fused_argument(first)) if other is None else dict(opt_func=other)
    second = learner(deepcopy(model), dls, **{'lr': 1e-2, **kwargs, **line})
    for learn in first, second: run(learn)
    if other is None: assert type(second.opt) is FusedOptimizer
    return weights(first), weights(second)


def snapshot(learn):
    "Weights, `requires_grad`, hyperparameters and optimizer state, by value."
    parts = weights(learn), [p.requires_grad for p in learn.model.parameters()], learn.opt.state_dict()
    return [o.tolist() if isinstance(o, torch.Tensor) else o for o in tree_leaves([*parts[:2], [*parts[2]['state']], [*parts[2]['hypers']]])]


def equal(a, b): return all(torch.allclose(s, o, rtol=1e-9, atol=1e-12) for s, o in zip(a, b, strict=True))


@pytest.mark.parametrize('name', GIVEN)
def test_the_line(name):
    opt_func, line = GIVEN[name]
    assert fused_argument(made(opt_func)) == line


@pytest.mark.parametrize('name, run', [(n, r) for n in GIVEN for r in RUNS if n in ('Adam', 'momentum') or r in ('wd_in_fit', 'freeze')])
def test_equal_weights(name, run):
    f, kwargs = RUNS[run]
    assert equal(*both(GIVEN[name][0], f, **kwargs))


def test_hypers_set_by_hand(): assert equal(*both(Adam, by_hand, splitter=three_groups))


@pytest.mark.parametrize('name', GIVEN)
def test_branches_without_gradients(name):
    "✗ PyTorch's own wrapped optimizers skip such a parameter, fastai's update it; PyTorch's fused SGD raises."
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Sometimes(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    assert equal(*both(GIVEN[name][0], model=model.double()))


@pytest.mark.parametrize('wrong', [dict(eps=1e-8), dict(sqr_mom=0.999), dict(wd=0.), dict(decouple_wd=False), dict(mom=0.8)], ids=str)
def test_the_comparison_sees(wrong):
    run = lambda learn: learn.fit(5)
    assert not equal(*both(partial(Adam, wd=0.01), run, other=fused(partial(Adam, wd=0.01), **wrong)))


def test_the_comparison_sees_decayed_norms():
    "✗ An `OptimWrapper` with the same hyperparameters decays norms and biases."
    plain = partial(OptimWrapper, opt=torch.optim.AdamW, fused=True, eps=1e-5, betas=(0.9, 0.99))
    assert not equal(*both(Adam, other=plain)) and equal(*both(Adam, other=plain, wd_bn_bias=True))


def half(m): return m.half()
def own_optimizer(params, lr, **kwargs): return Optimizer(params, [weight_decay, sgd_step, lambda p, **kw: None], lr=lr)
def expanded(m): m[0].weight = nn.Parameter(torch.zeros(8, 3, 1, 1).expand(8, 3, 3, 3)); return m
class Shared(nn.Parameter): pass
def subclass(m): m[0].weight = Shared(m[0].weight.data); return m
def sparse_weight(m): m.p = nn.Parameter(torch.eye(2).to_sparse()); return m
class OwnPartial(partial): pass
def sparse(m): m.add_module('e', nn.Embedding(2, 2, sparse=True)); return m
def assigned(opt, opt_func=Adam): learn = made(opt_func); learn.opt = opt(learn.model.parameters(), lr=1.); return learn


NONE = dict(
    **{o.__name__: lambda o=o: made(o) for o in (Lamb, Larc, QHAdam, RAdam, RMSProp, ranger, own_optimizer)},
    lookahead=lambda: made(lambda p, **kw: Lookahead(Adam(p, **kw))), lamb=lambda: made(partial(Lamb, wd=0.1)),
    wrapped=lambda: made(partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)), fused=lambda: made(fused(Adam)),
    built=lambda: made(OptimWrapper(opt=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.))),
    half=lambda: made(Adam, half(convnet())), complex=lambda: made(Adam, nn.Linear(2, 2, dtype=torch.complex64)),
    meta=lambda: made(Adam, convnet().to('meta')), expanded=lambda: made(Adam, expanded(convnet())),
    subclass=lambda: made(Adam, subclass(convnet())), sparse_weight=lambda: made(SGD, sparse_weight(convnet())),
    own_partial=lambda: made(OwnPartial(SGD)), sparse=lambda: made(SGD, sparse(convnet())),
    twice=lambda: made(SGD, splitter=lambda m: [list(m.parameters()), list(m[0].parameters())]),
    assigned=lambda: assigned(Lamb), other_kernel=lambda: assigned(SGD), slow=lambda: assigned(lambda p, **kw: Lookahead(Adam(p, **kw))),
    own_hyper=lambda: assigned(partial(Optimizer, cbs=[weight_decay, sgd_step], wd=0., dampening=True), SGD),
    non_native=lambda: made(Adam, cbs=NonNativeMixedPrecision()))


@pytest.mark.parametrize('name', NONE)
def test_no_line_without_proof(name): assert fused_argument(NONE[name]()) is None


UNSUPPORTED = re.escape("`fused` supports only fastai's `Adam` and `SGD`, with dense, unshared fp32 or fp64 parameters on one device (CPU or CUDA).")


@pytest.mark.parametrize('opt', [ranger, lambda p, **kw: Lookahead(Adam(p, **kw)), partial(OptimWrapper, opt=torch.optim.SGD)])
def test_what_is_not_equal_is_refused(opt):
    with pytest.raises(ValueError, match=UNSUPPORTED): made(fused(opt)).fit(1)


@pytest.mark.cuda
def test_one_device_for_all():
    ps = [nn.Parameter(torch.zeros(1, device=d)) for d in ('cpu', 'cuda')]
    with pytest.raises(ValueError, match=UNSUPPORTED): fused(SGD)(ps, lr=1.)


def test_what_has_the_same_parts_will_do(): # from a user's own function
    assert equal(*both(lambda p, **kw: Adam(p, wd=0.1, **kw), other=fused(lambda p, **kw: Adam(p, wd=0.1, **kw))))


def test_learner_is_only_looked_at():
    learn = made(Adam, splitter=three_groups)
    assert fused_argument(learn) and learn.opt is None
    learn.freeze(); learn.fit(1)
    before = snapshot(learn)
    assert fused_argument(learn) == 'opt_func=fused(Adam)' and snapshot(learn) == before


@pytest.mark.parametrize('name', ['Adam', 'momentum'])
@pytest.mark.parametrize('before, after', [(0, 1), (1, 0), (1, 1)])
def test_checkpoints_serve_both(tmp_path, name, before, after):
    opt_func = GIVEN[name][0]
    model, dls = convnet().double(), loaders(dtype=torch.float64)
    make = lambda quick: learner(deepcopy(model), dls, lr=1e-2, path=tmp_path, opt_func=fused(opt_func) if quick else opt_func)
    straight = make(0)
    straight.fit(3); straight.fit(2)
    first, second = make(before), make(after)
    first.fit(3); first.save('a')
    second.load('a'); second.fit(2)
    assert equal(weights(straight), weights(second))


@pytest.mark.parametrize('name', ['Adam', 'momentum'])
def test_formats_change_on_the_way(name):
    "The format is changed by this library, and by a `to` that keeps the old strides of state and gradients."
    def _to(learn):
        learn.fit(1); learn.to_channelslast(to_fp16=False); learn.fit(2); learn.to_contiguous(); learn.fit(1)
        learn.model.to(memory_format=torch.channels_last); learn.fit(1)
        class Turned(Callback):
            def before_step(self):
                for p in self.model.parameters(): p.grad = p.grad.contiguous()
        learn.fit(1, cbs=Turned())
    assert equal(*both(GIVEN[name][0], _to))


def test_measuring_leaves_no_trace():
    learn = made(fused(Adam))
    learn.fit(1)
    opt, before, had_grad = learn.opt, snapshot(learn), {*learn.opt._had_grad}
    with preserve_learner(learn): learn.fit(1)
    learn.format_find(num_it=1, show_plot=False)
    assert learn.opt is opt and opt._had_grad == had_grad and len(had_grad) == len(opt.param_lists[0])
    assert snapshot(learn) == before


def test_copies_and_pickles():
    f = fused(partial(SGD, mom=0.9), wd=0.1)
    assert f.keywords == dict(mom=0.9, wd=0.1) and deepcopy(f) is f
    again = pickle.loads(pickle.dumps(f))
    assert type(again) is partial and again.func is SGD and again.keywords == f.keywords
    learn = made(f)
    learn.fit(1)
    again = pickle.loads(pickle.dumps(learn.opt))
    assert type(again) is Optimizer and type(deepcopy(learn.opt)) is FusedOptimizer and again.hypers == learn.opt.hypers
    assert not names_library(pickle.dumps((f, learn.opt)))


def test_export_loads_where_this_library_is_not_installed(tmp_path):
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path, opt_func=fused(Adam, eps=1e-6))
    learn.fit(1)
    learn.export('e.pkl')
    learn.fit(1)
    assert type(learn.opt) is FusedOptimizer
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
learn = load_learner({str(tmp_path/'e.pkl')!r})
learn.create_opt()
print(learn.opt_func.func is Adam, learn.opt.hypers[0]['eps'])"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.stdout == 'True 1e-06\n', out.stderr


def test_no_closures():
    with pytest.raises(NotImplementedError): fused(SGD)([nn.Parameter(torch.zeros(1))], lr=1.).step(closure=lambda: 0)


@pytest.mark.cuda
@pytest.mark.parametrize('name', GIVEN)
def test_equal_weights_on_cuda(name): assert equal(*both(GIVEN[name][0], tuned, splitter=three_groups, model=convnet().double().cuda()))


# what `to_fastest` puts in

def branched(): return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Sometimes(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).double()
def switched(learn, *switches):
    "Fit with frozen groups in between, and call one of these functions after each part."
    learn.fit(1); learn.fit(1, wd=0.2); switches[0](learn)
    learn.freeze(); learn.fit_one_cycle(2, slice(1e-2)); switches[1](learn)
    learn.fit(2); switches[2](learn)
    learn.unfreeze(); learn.fit(2, slice(1e-4, 1e-2))


@pytest.mark.parametrize('name', GIVEN)
@pytest.mark.parametrize('order', [(use_fused, restore_optimizer, use_fused), (lambda o: o, use_fused, restore_optimizer), (use_fused, use_fused, restore_optimizer)])
def test_switching_in_mid_training(name, order):
    "There and back: groups, state and averages of branches without gradients go on as in fastai."
    torch.manual_seed(0)
    runs, model, dls = [], branched(), loaders(dtype=torch.float64)
    for switches in order, [lambda o: o]*3:
        learn = learner(deepcopy(model), dls, lr=1e-2, opt_func=GIVEN[name][0], splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
        switched(learn, *switches)
        runs.append([*weights(learn), *[v for s in learn.opt.state_dict()['state'] for v in s.values() if isinstance(v, torch.Tensor)]])
    assert equal(*runs)


@pytest.fixture
def gains(has, monkeypatch):
    """`gains(own, fused)` sets the milliseconds of the optimizer's steps. The rest of a step takes 60. `gains.ran` lists
    the classes of optimizers that stepped."""
    ran, ms = [], {}
    for cls in Optimizer, FusedOptimizer:
        def _step(self, *args, cls=cls, real=cls.step):
            ran.append(cls)
            if isinstance(ms[cls], Exception): raise ms[cls]
            return real(self, *args)
        monkeypatch.setattr(cls, 'step', _step)
    def _elapsed(device, f):
        before = len(ran)
        f()
        return sum(ms[c] for c in ran[before:]) + 60.*(getattr(f, '__name__', '') != '_step')
    def _gains(own, fused): ms.update({Optimizer: own, FusedOptimizer: fused})
    has(); monkeypatch.setattr(train_benchmark, 'elapsed_ms', _elapsed)
    _gains.ran = ran
    _gains(40., 10.)
    return _gains


def find(learn, **kw): return learn.format_find(num_it=3, show_plot=False, **kw)
SAID = 'All times are with the fused step of the same optimizer, which takes 30.0 ms less. `to_fastest()` puts it in, as does `opt_func=fused(Adam)` in `Learner`.'


@pytest.mark.parametrize('alone', [{'cpu'}, {}], ids=['cpu', 'elsewhere'])
@pytest.mark.parametrize('fitted', [False, True])
def test_the_whole_step_is_timed_as_it_will_be(gains, monkeypatch, alone, fitted):
    "Speedups are over contiguous fp32 with the Learner's own optimizer. Nothing changes."
    monkeypatch.setattr(train_benchmark, 'SYNCHRONOUS', alone)
    learn = made(Adam)
    if fitted: learn.fit(1)
    opt, before = learn.opt, snapshot(learn) if fitted else None
    gains.ran.clear()
    t = find(learn)
    assert t.fused is True and (t.optimizer_ms, t.fused_ms) == (40., 10.) and SAID in t.verdict
    assert [(r.ms, round(r.speedup, 4)) for r in t.rows] == [(70., 1.4286)]*2
    assert learn.opt is opt and learn.opt_func is Adam and (not fitted or snapshot(learn) == before)
    assert 'with the plain optimizer' in t.plot().get_xlabel()
    n = train_benchmark.OPTIMIZER_STEPS
    assert gains.ran.count(FusedOptimizer) == n + (0 if alone else 2*3)  # three rounds of two candidates
    assert gains.ran.count(Optimizer) == 2 + n + (0 if alone else 1 + 3)  # warm-up, timing, one own step in each round


@pytest.mark.parametrize('own, quick, kw, fused_ms, said', [
    (40., 38.5, {}, 38.5, 'The optimizer takes 40.0 ms of each step (40%).'), (40., 45., {}, 45., 'The optimizer takes 40.0 ms of each step (40%).'),
    (40., 10., dict(optimizer=False), None, 'The optimizer takes 40.0 ms of each step (40%). Pass `opt_func=fused(Adam)` to `Learner`: the same weights in less time.')])
def test_no_clear_gain_no_fused_step(gains, own, quick, kw, fused_ms, said):
    gains(own, quick)
    learn = made(Adam)
    t = find(learn, **kw)
    assert t.fused is False and t.fused_ms == fused_ms and t.verdict.endswith(said) and [(r.ms, r.speedup) for r in t.rows] == [(100., 1.)]*2
    assert 'plain' not in t.plot().get_xlabel()
    learn.to_fastest(num_it=3, **kw)
    assert learn.opt_func is Adam and learn.opt is None


@pytest.mark.parametrize('alone', [{'cpu'}, {}], ids=['cpu', 'elsewhere'])
def test_a_fused_step_that_fails_is_not_taken(gains, monkeypatch, alone):
    monkeypatch.setattr(train_benchmark, 'SYNCHRONOUS', alone)
    gains(40., RuntimeError('no kernel'))
    t = find(made(Adam))
    assert t.fused is False and t.optimizer_ms is None and t.fused_ms is None and t.rows[0].ms == 100. and t.rows[0].speedup == 1.


@pytest.mark.parametrize('name', ['sparse', 'fused', 'lookahead'])
def test_nothing_unproven_is_put_in(gains, name):
    learn = NONE[name]()
    if name == 'sparse': learn = learner(opt_func=SGD); sparse(learn.model[0])
    own = learn.opt_func
    if name == 'fused': learn.fit(1)
    opt = learn.opt
    learn.to_fastest(num_it=1).to_contiguous(to_fp32=True)
    assert learn.opt_func is own and learn.opt is opt and learn.format_timings.fused_ms is None


@pytest.mark.parametrize('fitted', [False, True])
def test_to_fastest_puts_it_in_and_takes_it_out(gains, capsys, fitted):
    own = partial(Adam, eps=1e-6)
    learn = made(own, splitter=three_groups)
    if fitted: learn.fit(1); learn.freeze(); learn.opt.set_hyper('wd', [0.3, 0., 0.1])
    hypers, state = (deepcopy(list(learn.opt.hypers)), snapshot(learn)) if fitted else (None, None)
    capsys.readouterr()
    learn.to_fastest(num_it=3)
    assert capsys.readouterr().out == ('Training in contiguous, fp32, with fused(Adam, eps=1e-06): 1.43× as fast as contiguous fp32 with the plain optimizer.'
                                       f'{" " + learn.format_timings.frozen_hint if fitted else ""}\n')
    assert type(learn.opt_func) is fused and learn.opt_func.keywords == dict(eps=1e-6)
    if fitted: assert type(learn.opt) is FusedOptimizer and list(learn.opt.hypers) == hypers and snapshot(learn) == state and learn.opt.frozen_idx == 2
    learn.fit(1)
    assert type(learn.opt) is FusedOptimizer
    state = snapshot(learn)
    copy, opt, had_grad = deepcopy(learn), learn.opt, {*learn.opt._had_grad}
    assert find(learn).fused and learn.opt is opt and opt._had_grad == had_grad and snapshot(learn) == state  # measured from the plain one
    for kw in dict(optimizer=False), dict(train=False):
        learn.to_fastest(num_it=1, **kw)
        assert learn.opt is opt and type(learn.opt_func) is fused and not learn.format_timings.fused
    learn.to_fastest(num_it=3)
    assert type(learn.opt) is FusedOptimizer and learn.opt_func.replaced is own
    assert type(learn.to_contiguous().opt) is FusedOptimizer
    for o in learn, copy:
        o.to_contiguous(to_fp32=True)
        assert o.opt_func is own and type(o.opt) is Optimizer and snapshot(o) == state and not {'_kernel', '_had_grad', '_measured'} & {*vars(o.opt)}
        o.fit(1)


def test_a_later_call_takes_it_out_where_it_no_longer_gains(gains):
    learn = made(Adam).to_fastest(num_it=3)
    learn.fit(1)
    gains(40., 40.)
    learn.to_fastest(num_it=3)
    assert learn.opt_func is Adam and type(learn.opt) is Optimizer and learn.format_timings.fused_ms == 40.


@pytest.mark.parametrize('opt', ['plain', 'fused', None])
def test_what_users_put_in_since_then_stays(gains, opt):
    learn = made(Adam).to_fastest(num_it=3)
    learn.fit(1)
    if opt is None: learn.opt_func = theirs = fused(SGD)
    else: learn.opt = theirs = {'plain': Adam, 'fused': fused(Adam)}[opt](learn.model.parameters(), lr=1.)
    learn.to_contiguous(to_fp32=True)
    assert (learn.opt_func is theirs and type(learn.opt) is Optimizer) if opt is None else (learn.opt is theirs and learn.opt_func is Adam)


def test_what_was_put_in_exports_and_saves_as_before(gains, tmp_path):
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path, opt_func=partial(Adam, eps=1e-6)).to_fastest(num_it=3)
    learn.fit(1)
    learn.export('e.pkl'); learn.save('s')
    assert type(learn.opt) is FusedOptimizer and not names_library((tmp_path/'e.pkl').read_bytes() + (tmp_path/'models'/'s.pth').read_bytes())
    learn.to_contiguous(to_fp32=True)  # the export has made another optimizer
    assert type(learn.opt) is Optimizer and type(learn.opt_func) is partial
    again = pickle.loads(pickle.dumps(learn.to_fastest(num_it=3).opt_func))
    assert type(again) is partial and not vars(again)


def test_steps_start_with_the_gradients_that_their_optimizer_leaves(gains, monkeypatch):
    "Adding to zeros takes longer than a first gradient."
    seen, real = [], train_benchmark.step_ms
    def _ms(learn, batch):
        seen.append((type(learn.opt), learn.model[0].weight.grad is None))
        return real(learn, batch)
    monkeypatch.setattr(train_benchmark, 'step_ms', _ms)
    assert find(made(Adam)).fused
    assert seen[2:].count((Optimizer, False)) == 3 and seen[2:].count((FusedOptimizer, True)) == 6 and len(seen) == 2 + 9
