"`format_find` and `to_fastest`, mostly with fake times."
import pickle
import random
from copy import deepcopy
from functools import partial

import matplotlib
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
from fastai.vision.all import (Adam, Callback, DataLoader, DataLoaders, GradientAccumulation, GradientClip, Learner,
                               MixUp, OptimWrapper, load_learner, ranger)
from torch import nn

from channelslast import ChannelsLast
from channelslast.find import layer_timing, train_benchmark
from channelslast.find.candidates import FORMATS, PRECISIONS
from channelslast.find.results import FormatTimings, Timing
from tests.conftest import convnet, fake_steps, learner, loaders, strides
from tests.test_channels_last import image_folder
from tests.test_format_summary import Net, same, state

matplotlib.use('agg')
ALL = [(f, p) for f in FORMATS for p in PRECISIONS]


@pytest.fixture
def fake(monkeypatch):
    "`fake(times)` replaces the measured milliseconds of each candidate's step; the step still runs."
    def _key(learn):
        mp = learn._grab_cbs(MixedPrecision)
        return FORMATS[bool(learn._grab_cbs(ChannelsLast))], mp[0].amp_mode.value if mp else 'fp32'
    return fake_steps(monkeypatch, _key, train_benchmark)


def find(learn=None, **kw): return (learn or learner()).format_find(**{**dict(num_it=4, show_plot=False, layers=False), **kw})


def row(f='contiguous', p='fp32', ms=100., **kw): return Timing(f, p, ms, 100./ms if ms else None, **kw)


# what is measured

@pytest.mark.parametrize('fast, pairs', [((), [0, 3]), (('bf16',), [0, 2, 3, 5]), (('fp16', 'bf16'), range(6))])
def test_candidates(has, fake, fast, pairs):
    has(*fast); fake({})
    t = find()
    assert [(r.memory_format, r.precision) for r in t.rows] == [ALL[i] for i in pairs]
    assert len(fake.steps) == (1 + 3)*len(t.rows)  # all are equally fast: certain after three rounds


@pytest.mark.parametrize('kw, pairs', [(dict(precisions='bf16'), [0, 2, 5]), (dict(formats='channels_last'), [0, 3, 5]),
                                       (dict(precisions=['fp32'], formats=['contiguous']), [0])])
def test_arguments_choose_fewer(has, fake, kw, pairs):
    "The baseline, contiguous fp32, is always measured."
    has('bf16'); fake({})
    assert [(r.memory_format, r.precision) for r in find(**kw).rows] == [ALL[i] for i in pairs]


@pytest.mark.parametrize('ms, rounds', [(100., 3), (20., 13), (5., 15)])
def test_what_lasts_no_longer_than_a_slow_phase_decides_nothing(fake, ms, rounds):
    "Short steps may agree because something slowed all of them."
    fake(lambda key, n: ms)
    find(num_it=15, formats='channels_last', precisions='fp32')
    assert len(fake.steps) == 2*(1 + rounds)


def test_each_candidate_is_what_it_says(has, monkeypatch):
    has('bf16')
    seen = set()
    class Probe(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen.add((self.weight.is_contiguous(memory_format=torch.channels_last), x.is_contiguous(memory_format=torch.channels_last), out.dtype))
            return out
    find(learner(nn.Sequential(Probe(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))))
    assert seen == {(l, l, d) for l in (True, False) for d in (torch.float32, torch.bfloat16)}


def test_interleaved_and_back_and_forth(has, fake):
    has('bf16'); fake({})
    find(num_it=2)
    order = [ALL[i] for i in (0, 2, 3, 5)]
    assert fake.steps == order + order + order[::-1]


def test_hopeless_candidates_are_dropped_early(has, fake):
    has(); fake({('channels_last', 'fp32'): 400.})
    t = find(num_it=9)
    assert fake.steps.count(('channels_last', 'fp32')) == fake.steps.count(('contiguous', 'fp32')) == 1 + 3
    assert 'dropped after 3 steps' in t.rows[1].note and t.rows[1].ms == 400. and t.best is t.rows[0]


@pytest.mark.parametrize('firsts, steps', [((2001., 2001.), 2), ((2001., 80.), 1 + 1 + 3), ((1999.,), 1 + 3)])
def test_who_is_emulated_is_out_after_two_steps(has, fake, firsts, steps):
    "A candidate that is only slow in its first step, because it compiles or is disturbed, stays."
    half = 'contiguous', 'bf16'
    has('bf16'); fake(lambda key, n: 100. if key != half else firsts[k - 1] if (k := fake.steps.count(half)) <= len(firsts) else 80.)
    t = find(formats='contiguous')
    r = next(r for r in t.rows if r.precision == 'bf16')
    assert fake.steps.count(half) == steps and (r is t.best) == r.valid == (r.ms is not None) == (steps > 2)
    assert r.note == ('' if r.valid else 'a step takes 20 times as long as in contiguous fp32') and (steps > 2 or r.note in repr(t))


def test_the_fastest_counts_speedups_and_the_choice(has, fake):
    has('bf16')
    fake(lambda key, n: {('contiguous', 'fp32'): 100., ('contiguous', 'bf16'): 70., ('channels_last', 'fp32'): 80.}.get(key, 50.) * (1 if n % 7 else 9))
    t = find(num_it=7)
    assert [(r.ms, round(r.speedup, 3)) for r in t.rows] == [(100., 1.), (70., 1.429), (80., 1.25), (50., 2.)]
    assert (t.best.memory_format, t.best.precision) == ('channels_last', 'bf16') and t.margin == 0.02 and t.best.doubt < 1e-9


def test_the_learners_own_step(has, monkeypatch):
    "Its loss, optimizer, clipping, accumulation and MixUp take part, other callbacks don't; the learning rate is 0."
    monkeypatch.setattr(train_benchmark, 'SYNCHRONOUS', {})
    seen = []
    class Other(Callback):
        def before_batch(self): raise AssertionError('not part of a step')
    def loss(p, y, reduction='mean'):
        seen.append(('loss', p.shape[0]))
        return nn.functional.cross_entropy(p, y, reduction=reduction)
    class Opt(torch.optim.AdamW):
        def step(self, *a): seen.append(('opt', [g['lr'] for g in self.param_groups])); return super().step(*a)
    loss.y_int = True
    learn = Learner(loaders(), convnet(), loss, opt_func=partial(OptimWrapper, opt=Opt), cbs=[Other(), GradientClip(1e-9), MixUp(), GradientAccumulation(16)])
    find(learn, num_it=2)
    assert ('loss', 8) in seen and ('opt', [0.]) in seen
    assert seen.count(('opt', [0.])) < seen.count(('loss', 8))/1.5  # the optimizer steps after every other batch of 8


# the loader

@pytest.mark.parametrize('step, bound', [(1000., False), (0.001, True)])
def test_input_bound(fake, step, bound):
    fake(lambda key, n: step)
    t = find()
    assert t.loader_ms > 0 and t.input_bound == bound and ('limited by data loading' in repr(t)) == bound


# numbers

class WrongInChannelsLast(nn.Module):
    "Wrong results in channels last, as in PyTorch issue 67239."
    def forward(self, x): return x.flip(1) if x.is_contiguous(memory_format=torch.channels_last) else x


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.last = x.is_contiguous(memory_format=torch.channels_last); return x.clone()
    @staticmethod
    def backward(ctx, g): return -g if ctx.last else g


class WrongBackward(nn.Module):
    def forward(self, x): return WrongGradient.apply(x)


class Overflow(nn.Module):
    def forward(self, x): return x*(float('inf') if x.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize('bad, note', [(WrongInChannelsLast, 'numbers differ'), (WrongBackward, 'numbers differ'), (Overflow, 'not finite')])
def test_wrong_numbers_are_never_suggested(has, fake, bad, note):
    has('bf16'); fake({('channels_last', 'fp32'): 1., ('channels_last', 'bf16'): 1., ('contiguous', 'bf16'): 1. if bad is Overflow else 200.})
    t = find(learner(nn.Sequential(nn.Conv2d(3, 8, 3), bad(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))))
    marked = [r for r in t.rows if note in r.note]
    assert {r.precision if bad is Overflow else r.memory_format for r in marked} == {'bf16' if bad is Overflow else 'channels_last'}
    assert not any(r.valid for r in marked) and t.best.valid


@pytest.mark.parametrize('fast', [('fp16',), ('bf16', 'fp16')])
def test_numbers_of_good_models(has, fast):
    has(*fast)
    t = find(learner(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))))
    assert all(r.valid for r in t.rows) and t.rows[0].loss_diff == t.rows[0].grad_diff == 0.
    by = {(r.memory_format, r.precision): r for r in t.rows}
    assert by['channels_last', 'fp32'].grad_diff < 1e-4 and by['contiguous', 'fp16'].grad_diff < 0.05
    if 'bf16' in fast: assert 0 < by['channels_last', 'bf16'].grad_diff < 0.2


# candidates that cannot run

class Fails(nn.Module):
    def __init__(self, error, when): super().__init__(); self.error, self.when = error, when
    def forward(self, x):
        if self.when(x): raise self.error
        return x


@pytest.mark.parametrize('error, note', [(torch.OutOfMemoryError('CUDA out of memory. Tried to'), 'out of memory'),
                                         (RuntimeError("\"conv\" not implemented for 'BFloat16'"), "not implemented for 'BFloat16'"),
                                         (NotImplementedError(), 'NotImplementedError')])
def test_a_candidate_that_fails_is_a_row(has, fake, error, note):
    has('bf16'); fake({('channels_last', 'fp32'): 50.})
    t = find(learner(nn.Sequential(nn.Conv2d(3, 4, 3), Fails(error, lambda x: x.dtype == torch.bfloat16), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert [r.ms for r in t.rows] == [100., None, 50., None] and all(note in t.rows[i].note for i in (1, 3))
    assert t.best is t.rows[2] and '–' in repr(t) and not t.rows[1].valid


def test_an_error_of_the_baseline_is_the_users():
    error = RuntimeError('mine')
    with pytest.raises(RuntimeError) as e: find(learner(nn.Sequential(nn.Conv2d(3, 4, 3), Fails(error, lambda x: True))))
    assert e.value is error


# nothing changes

class Bomb(Net):
    "Raises in its k-th forward pass."
    def __init__(self, k, error): super().__init__(); self.k, self.error, self.n = k, error, [0]
    def forward(self, x):
        self.n[0] += 1
        if self.n[0] == self.k: raise self.error('boom')
        return super().forward(x)


OPTS = dict(none=None, adam={}, fused=dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))), ranger=dict(opt_func=ranger))
# warm-up, timed steps and number check of five candidates; one step to record layer inputs, one to time the optimizer
TOTAL = (1 + 2 + 1)*5 + 1 + 1


@pytest.mark.parametrize('k', range(1, TOTAL + 2))
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_failure_at_any_step_leaves_everything_as_it_was(has, fake, monkeypatch, k, error):
    has('bf16'); fake({})
    monkeypatch.setattr(layer_timing, 'layer_ms', lambda m, x, d, h, in_fp32: 1. if in_fp32 == isinstance(m, nn.Conv2d) else 2.)
    opt = OPTS[[*OPTS][k % len(OPTS)]]
    learn = learner(Bomb(0, error), loaders(shuffle=True), **(opt or {}))
    if opt is not None: learn.fit(1)
    if k % 2: learn.to_channelslast(amp_mode='bf16')
    if opt is not None and k % 3: learn.fit(1)
    learn.model.k, learn.model.n[0] = k, 0
    before, hypers = state(learn), learn.opt and deepcopy(list(learn.opt.hypers))
    try: find(learn, num_it=2, layers=True)
    except error: assert error is KeyboardInterrupt or k <= TOTAL
    else: assert error is RuntimeError or k > TOTAL
    for a, b in zip(before, state(learn)): assert same(a, b)
    assert (learn.opt and list(learn.opt.hypers)) == hypers and (opt is not None) == (learn.opt is not None)
    learn.model.k = 0
    learn.fit(1)


@pytest.mark.parametrize('name', OPTS)
def test_training_goes_on_as_if_nothing_had_been_measured(name):
    runs = []
    for measure in False, True:
        torch.manual_seed(0); random.seed(0)
        learn = learner(convnet(), loaders(shuffle=True), lr=1e-2, **(OPTS[name] or {}))
        learn.fit(1)
        if measure: find(learn)
        learn.fit(1)
        runs.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_ready_made_optimizer_is_untouched():
    "`opt_func` may be an existing optimizer."
    model = convnet()
    opt = torch.optim.AdamW(model.parameters(), lr=0.5)
    learn = learner(model, opt_func=OptimWrapper(opt=opt))
    find(learn)
    assert learn.opt is None and not opt.state and opt.param_groups[0]['lr'] == 0.5


# the result

def test_it_prints_renders_and_plots(has, fake, tmp_path):
    has('bf16'); fake({('channels_last', 'bf16'): 70.})
    from matplotlib import pyplot as plt
    plt.close('all')
    t = find(show_plot=True)
    assert plt.get_fignums() and plt.gca().get_xlabel().startswith('speedup') and len(plt.gca().patches) == 4
    assert repr(t).splitlines()[4].lstrip().startswith('→ channels last') and '1.43×' in repr(t)
    assert 'Use channels last in bf16: 1.43× as fast as contiguous fp32 (differences below 2% count as a tie).' in repr(t)
    assert '<table' in t._repr_html_() and 'MiB' not in repr(t) and 'note' not in repr(t)
    assert list(t.to_frame().precision) == ['fp32', 'bf16', 'fp32', 'bf16'] and t.to_frame().ms[3] == 70.
    with pytest.raises(AttributeError): t.best.ms = 1


@pytest.mark.parametrize('opt, ms, said', [
    (ranger, 5., None), (ranger, 30., 'The optimizer takes 30.0 ms of each step (30%).'),
    (Adam, 30., 'ms of each step (30%). Pass `opt_func=fused(Adam)` to `Learner`: the same weights in less time.')])
def test_the_optimizers_part_is_said_where_it_is_much(fake, monkeypatch, opt, ms, said):
    "With the argument of `Learner` that helps, if one is known that gives the same weights."
    fake({})
    monkeypatch.setattr(train_benchmark, 'elapsed_ms', lambda device, f: (f(), ms)[1])
    t = find(learner(opt_func=opt))
    assert t.optimizer_ms == ms and (said in t.verdict if said else 'optimizer' not in t.verdict)


@pytest.fixture
def timed(has, monkeypatch):
    """`timed(fails, **kwargs)` measures two candidates, and returns the result and how often the optimizer ran. Its
    `fails`th step raises. Alone it takes 70 ms, then 40; a step takes 100 ms, and 40 more with the optimizer."""
    def _ms(device, f):
        before = len(ran)
        f()
        if getattr(f, '__name__', '') != 'step': return 140. if len(ran) > before else 100.
        alone.append(1)
        return 40. if alone[1:] else 70.
    def _timed(fails=0, **kwargs):
        def _opt(*args, **kw):
            opt = Adam(*args, **kw)
            real = opt.step
            def step():
                ran.append(1)
                if len(ran) == fails: raise RuntimeError('not without a new gradient')
                real()
            opt.step = step
            return opt
        return find(learner(opt_func=_opt, **kwargs)), len(ran)
    alone, ran = [], []
    has(); monkeypatch.setattr(train_benchmark, 'elapsed_ms', _ms)
    return _timed


N = train_benchmark.OPTIMIZER_STEPS  # after two warm-up steps; the choice takes three rounds


def test_on_a_cpu_the_optimizer_is_timed_once_and_added(timed):
    t, ran = timed()
    assert t.optimizer_ms == 40. and [r.ms for r in t.rows] == [140.]*2 and ran == 2 + N


def test_elsewhere_the_optimizer_is_part_of_each_step(timed, monkeypatch):
    "On a GPU, calls return before the work is done, so times don't add up: the optimizer's part is a difference."
    monkeypatch.setattr(train_benchmark, 'SYNCHRONOUS', {})
    t, ran = timed()
    assert t.optimizer_ms == 40. and [r.ms for r in t.rows] == [140.]*2 and ran == 2 + 1 + N + 2*3


@pytest.mark.parametrize('fails', [3, 4])
def test_an_optimizer_that_cant_run_alone_is_part_of_each_step(timed, fails):
    t, ran = timed(fails)
    assert t.optimizer_ms is None and [r.ms for r in t.rows] == [140.]*2 and ran == fails + 2*3


def test_what_comes_before_the_optimizer_stays_in_the_step(timed):
    clipped = []
    class Clip(GradientClip):
        def before_step(self): clipped.append(1); super().before_step()
    t, ran = timed(cbs=Clip(1.))
    assert len(clipped) == 2 + 2*3 and t.rows[0].ms == 140.


def test_the_optimizer_is_added_only_where_it_would_run(timed):
    "Here after every other batch of 8; the fastest step is one without."
    t, ran = timed(cbs=GradientAccumulation(16))
    assert [r.ms for r in t.rows] == [100.]*2 and {r.doubt for r in t.rows} != {0.} and t.optimizer_ms == 40.


# to_fastest

@pytest.mark.parametrize('start', ['plain', 'last', 'last bf16', 'bf16', 'fastai'])
@pytest.mark.parametrize('win', [('contiguous', 'fp32'), ('contiguous', 'bf16'), ('channels_last', 'fp32'), ('channels_last', 'bf16')])
def test_to_fastest_applies_the_winner(has, fake, capsys, start, win):
    has('bf16'); fake({win: 10.})
    learn = learner()
    if start == 'last': learn.to_channelslast(to_fp16=False)
    if start == 'last bf16': learn.to_channelslast(amp_mode='bf16')
    if start == 'bf16': learn.to_channelslast(amp_mode='bf16').to_contiguous()
    if start == 'fastai':
        from fastai.callback.channelslast import ChannelsLast as Fastais
        learn.add_cb(Fastais())
    for _ in range(2):
        assert learn.to_fastest(num_it=3) is learn
        assert len(learn._grab_cbs(ChannelsLast)) == (win[0] == 'channels_last') and len(learn._grab_cbs(MixedPrecision)) == (win[1] == 'bf16')
        if win[1] == 'bf16': assert learn.mixed_precision.amp_mode.value == 'bf16'
        assert (learn.format_timings.best.memory_format, learn.format_timings.best.precision) == win
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.endswith(f"{win[0].replace('_', ' ')}, {win[1]}: {1 if win == ('contiguous', 'fp32') else 10:.2f}× as fast as contiguous fp32.")
    learn.fit(1)


def test_to_fastest_passes_scaler_arguments_on(has, fake):
    has('fp16'); fake({('channels_last', 'fp16'): 10.})
    learn = learner().to_fastest(num_it=3, init_scale=128.)
    assert learn.mixed_precision.kwargs == dict(init_scale=128.)


def test_fastais_cuda_only_precision_is_replaced(has, fake):
    has('fp16'); fake({('channels_last', 'fp16'): 10.})
    learn = learner().to_fp16().to_fastest(num_it=3)
    assert [type(o).__name__ for o in learn._grab_cbs(MixedPrecision)] == ['DeviceMixedPrecision']


def test_exports_after_to_fastest_need_no_library(fake, tmp_path):
    fake({('channels_last', 'fp32'): 10.})
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path).to_fastest(num_it=3)
    assert deepcopy(learn).format_timings is learn.format_timings
    blob = pickle.dumps(learn.format_timings)
    assert b'channelslast' not in blob and pickle.loads(blob)['best']['ms'] == 10.
    learn.export('e.pkl')
    assert load_learner(tmp_path/'e.pkl').format_timings['best']['memory_format'] == 'channels_last'


# wrong uses

@pytest.mark.parametrize('kw, error, match', [
    (dict(num_it=0), ValueError, 'num_it=0'), (dict(num_it=2.5), ValueError, 'num_it=2.5'), (dict(num_it=True), ValueError, 'num_it=True'),
    (dict(precisions=['fp8']), ValueError, "precisions: 'fp8'"), (dict(precisions=['fp16']), ValueError, "'fp16' can't be measured here; choose from 'fp32'"),
    (dict(optimizer='fused'), ValueError, "optimizer='fused': use True or False"), (dict(optimizer=None), ValueError, 'optimizer=None'),
    (dict(formats='nhwc'), ValueError, "formats: 'nhwc'.*'contiguous', 'channels_last'"), (dict(init_scale=-1), ValueError, 'init_scale'),
    (dict(nim_it=3), TypeError, "'nim_it'")])
@pytest.mark.parametrize('call', ['format_find', 'to_fastest'])
def test_wrong_arguments(has, kw, error, match, call):
    has()
    learn = learner()
    before = state(learn)
    with pytest.raises(error, match=match): getattr(learn, call)(**kw)
    for a, b in zip(before, state(learn)): assert same(a, b)


@pytest.mark.parametrize('dls, match', [
    (lambda: DataLoaders(*[DataLoader([], bs=2)]*2), 'yields no batch'),
    (lambda: DataLoaders(*[DataLoader([(torch.randn(3, 8, 8),)]*4, bs=2)]*2), 'no labels')])
def test_wrong_loaders(dls, match):
    with pytest.raises(ValueError, match=match): find(learner(dls=dls()))


def test_non_native_precision_is_refused():
    with pytest.raises(ValueError, match='to_non_native_fp32'): find(learner(cbs=NonNativeMixedPrecision()))


@pytest.mark.cuda
def test_on_cuda():
    learn = learner(dls=loaders().to(torch.device('cuda')))
    before = strides(learn)
    t = learn.format_find(num_it=3, show_plot=False)
    assert len(t.rows) >= 4 and all(r.memory for r in t.rows if r.ms) and strides(learn) == before
    learn.to_fastest(num_it=3).fit(1)


@pytest.mark.parametrize('margin, said', [(0.03, False), (0.45, True)])
def test_a_busy_machine_is_said(margin, said):
    r = row()
    verdict = FormatTimings([r], r, margin, 1., rival=row('channels_last', ms=90.)).verdict
    assert ('less busy' in verdict) == said and f'channels last in fp32 may be up to {margin:.0%} faster.' in verdict


BASE, LAST, FAILED = row(), row('channels_last', ms=50.), row('channels_last', 'bf16', ms=10., valid=False, note='x'*200)

@pytest.mark.parametrize('rows, best, margin, current, choice', [
    ([BASE, LAST], BASE, 0.02, BASE, 'Keep contiguous fp32: nothing else was more than 2% faster.'),
    ([BASE, LAST], BASE, 0.02, LAST, 'Use contiguous fp32: nothing else was more than 2% faster.'),
    ([BASE, FAILED], BASE, 0.02, BASE, 'Keep contiguous fp32: no other valid setting was more than 2% faster.'),
    ([BASE], BASE, 0.02, BASE, 'Keep contiguous fp32: nothing else was measured.'),
    ([BASE, LAST], LAST, 0.02, LAST, 'Keep channels last in fp32: 2.00× as fast as contiguous fp32 (differences below 2% count as a tie).'),
    ([BASE, LAST], BASE, 0.05, BASE, 'Undecided: keep contiguous fp32, but channels last in fp32 may be up to 5% faster.'),
    ([BASE, LAST], BASE, 1.5, LAST, 'Undecided: use contiguous fp32, but channels last in fp32 may be more than twice as fast. Measure again when')])
def test_what_to_do_is_said(rows, best, margin, current, choice):
    t = FormatTimings(rows, best, margin, 1., rival=LAST, current=(current.memory_format, current.precision, current.folded, False))
    assert t.verdict.startswith(choice) and max(map(len, repr(t).splitlines())) <= 160 and list(t.to_frame().note) == [r.note for r in rows]


@pytest.mark.parametrize('last, choice', [(False, 'Keep contiguous fp32: '), (True, 'Use contiguous fp32: ')])
def test_it_knows_the_current_setting(has, fake, last, choice):
    has(); fake({('channels_last', 'fp32'): 200.})
    learn = learner()
    assert find(learn.to_channelslast(to_fp16=False) if last else learn).verdict.startswith(choice)


# frozen layers

def split(m): return [[*m[:4].parameters()], [*m[4:].parameters()]]  # as `vision_learner` splits body and head
def frozen(learn): learn.freeze(); return learn
def by_hand(learn): learn.model[0].requires_grad_(False); return learn
def late(learn): learn.create_opt(); return by_hand(learn)
def thawed(learn): learn.freeze(); learn.unfreeze(); return learn


# convnet() has 216 weights in its first layer, 16 in its batch norm, 144, 160 and 68 in the others; fastai trains frozen batch norms
ADAMW = partial(OptimWrapper, opt=torch.optim.AdamW)
FROZEN = dict(frozen=(frozen, dict(splitter=split), (360, 604)), torch=(frozen, dict(splitter=split, opt_func=ADAMW), (360, 604)),
              lookahead=(frozen, dict(splitter=split, opt_func=ranger), (360, 604)), bn=(frozen, dict(splitter=split, train_bn=False), (376, 604)),
              by_hand=(by_hand, dict(splitter=split), (216, 604)), late=(late, {}, (216, 604)), not_reached=(by_hand, {}, (0, 388)),
              one_group=(frozen, {}, (0, 604)), thawed=(thawed, dict(splitter=split), (0, 604)), plain=(lambda o: o, {}, (0, 604)))


@pytest.mark.parametrize('freeze, kwargs, counts', FROZEN.values(), ids=FROZEN)
def test_frozen_layers_are_said(fake, capsys, freeze, kwargs, counts):
    "Counts what `learn.unfreeze()` would train: after it, steps are not the measured ones."
    fake({})
    learn = freeze(learner(**kwargs))
    t = find(learn)
    said = f'{counts[0]} of 604 parameters are frozen. To train them later, call `learn.unfreeze()` and measure again.'
    assert t.frozen == counts and t.verdict.endswith(said) == (said in repr(t)) == (counts[0] > 0) and ('frozen' in t._repr_html_()) == (counts[0] > 0)
    learn.to_fastest(num_it=3)
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and (f'1.00× as fast as contiguous fp32. {said}' in printed) == ('frozen' in printed) == (counts[0] > 0)
    assert pickle.loads(pickle.dumps(t))['frozen'] == counts
    assert all(p.requires_grad for p in learn.model.parameters()) == (counts == (0, 604))  # unchanged
    learn.unfreeze()
    assert find(learn).frozen == (0, counts[1])


def test_predictions_have_no_frozen_layers(fake, capsys):
    learn = frozen(learner(splitter=split))
    t = find(learn, train=False)
    learn.to_fastest(num_it=1, train=False)
    assert t.frozen is None and 'frozen' not in repr(t) + capsys.readouterr().out


def test_many_frozen_parameters_read_well():
    r = row()
    assert '11,166,912 of 11,703,872 parameters' in FormatTimings([r], r, 0.02, 1., frozen=(11166912, 11703872)).verdict
