"`format_find` and `to_fastest` for training, mostly with fake times."
import pickle
import random
from copy import deepcopy
from functools import partial

import matplotlib
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.vision.all import (Adam, Callback, DataLoader, DataLoaders, GradientAccumulation, GradientClip, Learner, MixedPrecision,
                               MixUp, OptimWrapper, Optimizer, load_learner, ranger)
from matplotlib import pyplot as plt
from pytest import approx
from torch import nn

from channelslast import ChannelsLast
from channelslast.find.results import FormatTimings, Timing
from channelslast.learner.setting import Setting
from .helpers import (Bomb, Fails, WrongInChannelsLast, convnet, difference, find, image_folder, learner, learner_state, loaders,
                      rows_of, strides)

matplotlib.use('agg')
BASELINE = dict(formats='contiguous', precisions='fp32')  # measures contiguous fp32 alone
ALL = ['contiguous, fp32', 'contiguous, fp16', 'contiguous, bf16', 'channels last, fp32', 'channels last, fp16', 'channels last, bf16']


def head(*layers, c=8): return nn.Sequential(nn.Conv2d(3, c, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4))


# which settings are measured

@pytest.mark.parametrize('fast, names', [((), [ALL[0], ALL[3]]), (('bf16',), ALL[::3] + ALL[2::3]), (('fp16', 'bf16'), ALL)])
def test_format_find_measures_both_formats_in_fp32_and_each_fast_dtype(has, fake_steps, fast, names):
    has(*fast); fake_steps({})
    t = find()
    assert [*rows_of(t)] == [o for o in ALL if o in names] and all(r.valid and r.ms == approx(100.) for r in t.rows)


@pytest.mark.parametrize('kwargs, names', [(dict(precisions='bf16'), [ALL[0], ALL[2], ALL[5]]), (dict(formats='channels_last'), [ALL[0], ALL[3], ALL[5]]),
                                           (dict(precisions=['fp32'], formats=['contiguous']), [ALL[0]])])
def test_format_find_with_fewer_precisions_or_formats_measures_these_and_contiguous_fp32(has, fake_steps, kwargs, names):
    has('bf16'); fake_steps({})
    assert [*rows_of(find(**kwargs))] == names


def test_each_candidate_runs_in_its_format_and_dtype(has, fake_steps):
    has('bf16'); fake_steps({})
    seen = set()
    class Probe(nn.Conv2d):
        def forward(self, x):
            out = super().forward(x)
            seen.add((self.weight.is_contiguous(memory_format=torch.channels_last), x.is_contiguous(memory_format=torch.channels_last), out.dtype))
            return out
    find(learner(nn.Sequential(Probe(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))), num_it=1)
    assert seen == {(last, last, dtype) for last in (True, False) for dtype in (torch.float32, torch.bfloat16)}


# how long, and what is chosen

def test_more_steps_are_measured_while_times_are_uncertain(fake_steps):
    def _steps(times):
        before = len(fake_steps.settings)
        t = find(num_it=15)
        return len(fake_steps.settings) - before, t.margin
    fake_steps(lambda setting, n: times(n))
    times = lambda n: 100.
    few, margin = _steps(times)
    assert margin == 0.02
    times = lambda n: 100. + 53*n % 101  # no two steps agree
    many, margin = _steps(times)
    assert many > few + 4 and margin > 0.02


@pytest.mark.parametrize('n_slow, num_it, found', [(20, 15, True), (40, None, True), (40, 15, False)])
def test_a_slow_phase_at_the_start_does_not_decide(fake_steps, n_slow, num_it, found):
    "All steps agree while something slows the machine down: few milliseconds decide nothing, and None takes more steps."
    fake_steps(lambda setting, n: 5. if setting == 'channels last, fp32' and n > n_slow else 10.)
    t = find(num_it=num_it, optimizer=False)
    assert t.rows[1].ms == approx(5. if found else 10.) and (t.best is t.rows[1]) == found


@pytest.mark.parametrize('per_step', [-0.003, 0.003])
def test_a_machine_that_changes_its_speed_steadily_favors_no_candidate(has, fake_steps, per_step):
    "Candidates take turns. If each had all its steps in a row, the first or last one would be 2% to 5% faster."
    has('bf16'); fake_steps(lambda setting, n: 100.*(1 + per_step)**n)
    t = find(num_it=9)
    assert t.best is t.rows[0] and max(r.ms for r in t.rows) < 1.02*min(r.ms for r in t.rows)


@pytest.mark.parametrize('odd', [0, 1])
def test_other_work_in_every_other_step_favors_no_candidate(fake_steps, odd):
    "The order alternates. If the candidates always had the same one, all steps of one of them would be slow."
    fake_steps(lambda setting, n: 200. if n % 2 == odd else 100.)
    t = find(num_it=8, optimizer=False)
    assert [r.ms for r in t.rows] == approx([100.]*2) and t.best is t.rows[0]


def test_a_candidate_that_is_far_slower_is_dropped_early(has, fake_steps):
    has('bf16')
    half = 'channels last, bf16'
    fake_steps(lambda setting, n: 400. if setting == half else 100. + random.Random(n).uniform(0, 100))
    t = find(num_it=9)
    steps = {o: fake_steps.settings.count(o) for o in ALL}
    assert steps[half] < steps[ALL[0]] and steps[half] < steps[ALL[3]]
    r = rows_of(t)[half]
    assert 'far slower' in r.note and r.ms == approx(400.) and r.valid and t.best is not r


@pytest.mark.parametrize('firsts, stays', [((4000., 4000.), False), ((4000., 80.), True), ((500., 500.), True)])
def test_a_candidate_whose_first_steps_take_far_longer_than_contiguous_fp32_is_dropped(has, fake_steps, firsts, stays):
    "Its precision is emulated. One that is only slow in its first step, because it compiles or is disturbed, stays."
    half = 'contiguous, bf16'
    def _ms(setting, n):
        if setting != half: return 100.
        k = fake_steps.settings.count(half)
        return firsts[k - 1] if k <= len(firsts) else 80.
    has('bf16'); fake_steps(_ms)
    t = find(formats='contiguous')
    r = rows_of(t)[half]
    assert (r is t.best) == r.valid == (r.ms is not None) == stays
    if stays: assert r.note == '' and r.ms == approx(80.)
    else: assert r.note == 'a step takes 40 times as long as in contiguous fp32' and r.note in repr(t) and fake_steps.settings.count(half) == 2


@pytest.mark.parametrize('slow_steps, stays', [(2, True), (9, False)])
def test_on_a_gpu_a_candidate_may_choose_kernels_in_two_steps(has, fake_steps, gpu, slow_steps, stays):
    def _ms(setting, n): return 4000. if 'bf16' in setting and fake_steps.settings.count(setting) <= slow_steps else 100.
    has('bf16'); fake_steps(_ms)
    t = find(gpu().learner(), formats='contiguous')
    assert t.rows[1].valid == stays


def test_the_fastest_of_noisy_steps_counts(has, fake_steps):
    has('bf16')
    times = {ALL[0]: 100., ALL[2]: 70., ALL[3]: 80., ALL[5]: 50.}
    fake_steps(lambda setting, n: times[setting]*(9 if random.Random(n + 1).random() < 0.15 else 1))
    t = find(num_it=7)
    assert {k: (round(r.ms, 3), round(r.speedup, 3)) for k, r in rows_of(t).items()} == {
        ALL[0]: (100., 1.), ALL[2]: (70., 1.429), ALL[3]: (80., 1.25), ALL[5]: (50., 2.)}
    assert t.best is rows_of(t)[ALL[5]] and t.margin == 0.02 and t.best.doubt < 1e-9


# the Learner's own step

def test_the_step_is_the_learners_own():
    "Its loss, optimizer, clipping, accumulation and MixUp take part, other callbacks do not; the learning rate is 0."
    seen = dict(loss=[], lr=[], clip=[])
    class Other(Callback):
        def before_batch(self): raise AssertionError('not part of a step')
    class Clip(GradientClip):
        def before_step(self): seen['clip'].append(1); super().before_step()
    class Opt(torch.optim.AdamW):
        def step(self, *args): seen['lr'] += [g['lr'] for g in self.param_groups]; return super().step(*args)
    def loss(p, y, reduction='mean'):
        seen['loss'].append((len(p), reduction))
        return nn.functional.cross_entropy(p, y, reduction=reduction)
    loss.y_int = True
    learn = Learner(loaders(), convnet(), loss, opt_func=partial(OptimWrapper, opt=Opt), lr=0.5, cbs=[Other(), Clip(1e-9), MixUp(), GradientAccumulation(16)])
    find(learn, num_it=2)
    assert {*seen['loss']} == {(8, 'none'), (4, 'none')} and seen['lr'] and {*seen['lr']} == {0.} and seen["clip"]  # numbers are compared on four
    assert len(seen['clip']) < len(seen['loss'])  # only after every other batch of 8


@pytest.mark.parametrize('step_ms, bound', [(1000., False), (1., True)])
def test_a_loader_slower_than_the_step_is_said(clock, fake_steps, step_ms, bound):
    class Slow:
        def __len__(self): return 32
        def __getitem__(self, i): clock.pass_ms(5.); return torch.randn(3, 8, 8), torch.tensor(i % 4)
    fake_steps(lambda setting, n: step_ms)
    t = find(learner(dls=DataLoaders(*[DataLoader(Slow(), bs=8)]*2)), **BASELINE)
    assert t.loader_ms == approx(40.) and t.input_bound == bound
    assert ('Training is limited by data loading: 40.0 ms to load a batch, 1.0 ms to train on it.' in repr(t)) == bound


# candidates with wrong numbers, and those that fail

class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.last = x.is_contiguous(memory_format=torch.channels_last); return x.clone()
    @staticmethod
    def backward(ctx, g): return -g if ctx.last else g


class WrongBackward(nn.Module):
    def forward(self, x): return WrongGradient.apply(x)


class Overflow(nn.Module):
    def forward(self, x): return x*(float('inf') if x.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize('bad, wrong, note', [(WrongInChannelsLast, 'channels last', 'numbers differ'), (WrongBackward, 'channels last', 'numbers differ'),
                                              (Overflow, 'bf16', 'not finite')])
def test_candidates_with_wrong_numbers_are_never_chosen(has, fake_steps, bad, wrong, note):
    has('bf16'); fake_steps(lambda setting, n: 1. if wrong in setting else 200.)
    t = find(learner(head(bad(), nn.Conv2d(8, 8, 3), nn.ReLU())))
    for name, r in rows_of(t).items(): assert (note in r.note) == (not r.valid) == (wrong in name), (name, r)
    assert t.best.valid and wrong not in f'{t.best.memory_format} {t.best.precision}'.replace('_', ' ')


@pytest.mark.parametrize('fast', [('fp16',), ('bf16', 'fp16')])
def test_candidates_of_an_ordinary_model_are_valid_in_every_format_and_dtype(has, fake_steps, fast):
    has(*fast); fake_steps({})
    t = find(learner(head(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout())), num_it=1)
    rows = rows_of(t)
    assert all(r.valid for r in t.rows) and rows[ALL[0]].loss_diff == rows[ALL[0]].grad_diff == 0.
    assert rows[ALL[3]].grad_diff < 1e-4 and 0 < rows[ALL[1]].grad_diff < 0.05 and 0 < rows[ALL[1]].loss_diff < 0.02
    if 'bf16' in fast: assert 0 < rows[ALL[5]].grad_diff < 0.2


@pytest.mark.parametrize('error, note', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to'), 'out of memory'), (NotImplementedError(), 'NotImplementedError: no message'),
    (RuntimeError("first line\n\"conv\" not implemented for 'BFloat16'"), "RuntimeError: \"conv\" not implemented for 'BFloat16'")])
def test_a_candidate_that_fails_is_a_row_with_the_error_as_its_note(has, fake_steps, error, note):
    has('bf16'); fake_steps({'channels last, fp32': 50.})
    t = find(learner(nn.Sequential(nn.Conv2d(3, 4, 3), Fails(error, lambda x: x.dtype == torch.bfloat16), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert [r.ms and round(r.ms, 3) for r in t.rows] == [100., None, 50., None] and t.rows[1].note == t.rows[3].note == note
    assert t.best is t.rows[2] and '–' in repr(t) and not t.rows[1].valid


def test_an_error_in_contiguous_fp32_is_raised_as_it_is():
    error = RuntimeError('mine')
    with pytest.raises(RuntimeError) as e: find(learner(nn.Sequential(nn.Conv2d(3, 4, 3), Fails(error, lambda x: True))))
    assert e.value is error


# nothing changes

OPTS = dict(adam={}, fused=dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))), ranger=dict(opt_func=ranger))
FAILURES = [(k, error) for k in range(1, 41) for error in (RuntimeError, KeyboardInterrupt)]
FAST = {1, 5, 6, 12, 18, 23}  # first steps, layer inputs, number check, timed steps


@pytest.mark.parametrize('k, error', [pytest.param(*o, marks=() if o[0] in FAST and (o[0] + (o[1] is RuntimeError)) % 2 or o[0] == 1 else pytest.mark.slow)
                                      for o in FAILURES])
def test_format_find_that_fails_in_any_pass_leaves_the_learner_as_it_was(has, fake_steps, k, error):
    has('bf16'); fake_steps({})
    model = Bomb()
    model.c = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1))
    fitted = k % 4 > 0
    learn = learner(model, loaders(shuffle=True), **OPTS[[*OPTS][k % len(OPTS)]])
    if fitted: learn.fit(1)
    if k % 2: learn.to_channelslast(amp_mode='bf16')
    if fitted and k % 3: learn.fit(1)
    model.arm(k, error)
    before, raised = learner_state(learn), False
    try: t = find(learn, num_it=2, layers=True)
    except error: raised = True
    assert difference(before, learner_state(learn)) == '' and fitted == (learn.opt is not None)
    if error is KeyboardInterrupt: assert raised == (model.passes.n >= k)
    elif k == 1: assert raised  # contiguous fp32
    if not raised: assert len(t.rows) >= 4 and t.best.valid
    model.arm(0)
    learn.fit(1)


@pytest.mark.parametrize('opt', [pytest.param(o, marks=() if o == 'adam' else pytest.mark.slow) for o in OPTS])
def test_training_continues_after_format_find_as_without_it(opt):
    runs = []
    for measure in False, True:
        torch.manual_seed(0)
        learn = learner(convnet(), loaders(shuffle=True), lr=1e-2, **OPTS[opt])
        learn.dls.train.rng.seed(0)
        learn.fit(1)
        if measure: find(learn)
        learn.fit(1)
        runs.append([p.detach().clone() for p in learn.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_format_find_leaves_an_optimizer_passed_as_opt_func_as_it_was():
    model = convnet()
    opt = torch.optim.AdamW(model.parameters(), lr=0.5)
    learn = learner(model, opt_func=OptimWrapper(opt=opt))
    find(learn, num_it=1, **BASELINE)
    assert learn.opt is None and not opt.state and opt.param_groups[0]['lr'] == 0.5


# the result

def test_the_result_prints_renders_and_plots(has, fake_steps):
    has('bf16'); fake_steps({ALL[5]: 70.})
    plt.close('all')
    t = find(show_plot=True)
    assert plt.get_fignums() and plt.gca().get_xlabel().startswith('speedup of a training step over contiguous fp32')
    assert len(plt.gca().patches) == 4 and plt.gca().get_title() == 'Suggested: channels last, bf16'
    assert repr(t).splitlines()[4].lstrip().startswith('→ channels last') and '1.43×' in repr(t)
    assert t.verdict == "Use channels last in bf16: 1.43× as fast as contiguous fp32. Without measuring: learn.to_channelslast(amp_mode='bf16')"
    assert all(o in repr(t) for o in t.verdict.split('. '))
    assert "<code>learn.to_channelslast(amp_mode='bf16')</code>" in t._repr_html_() and '`' not in t._repr_html_()
    assert '<table' in t._repr_html_() and 'MiB' not in repr(t) and 'note' not in repr(t)
    assert list(t.to_frame().precision) == ['fp32', 'bf16', 'fp32', 'bf16'] and t.to_frame().ms[3] == approx(70.)
    with pytest.raises(AttributeError): t.best.ms = 1
    plt.close('all')
    find(show_plot=False, **BASELINE)
    assert not plt.get_fignums()


def row(f='contiguous', p='fp32', ms=100., **kwargs): return Timing(Setting(f, p), ms, 100./ms if ms else None, **kwargs)
AGAIN, BACK = 'Measure again when this machine is less busy.', 'Without measuring: learn.to_contiguous(to_fp32=True)'
BASE, LAST, SLOWER, FAILED = row(), row('channels_last', ms=50.), row('channels_last', ms=101.), row('channels_last', 'bf16', ms=10., valid=False, note='x'*200)

@pytest.mark.parametrize('rows, best, margin, current, verdict', [
    ([BASE, LAST], BASE, 0.02, BASE, 'Keep contiguous fp32: nothing else was more than 2% faster.'),
    ([BASE, LAST], BASE, 0.02, LAST, 'Use contiguous fp32: nothing else was more than 2% faster. Without measuring: learn.to_contiguous(to_fp32=True)'),
    ([BASE, FAILED], BASE, 0.02, BASE, 'Keep contiguous fp32: no other valid setting was more than 2% faster.'),
    ([BASE], BASE, 0.02, BASE, 'Keep contiguous fp32: nothing else was measured.'),
    ([BASE, LAST], LAST, 0.02, LAST, 'Keep channels last in fp32: 2.00× as fast as contiguous fp32. Without measuring: learn.to_channelslast(to_fp16=False)'),
    ([BASE, LAST], BASE, 0.03, BASE, 'Undecided: keep contiguous fp32, but channels last in fp32 may be up to 3% faster.'),
    ([BASE, LAST], BASE, 0.45, BASE, f'Undecided: keep contiguous fp32, but channels last in fp32 may be up to 45% faster. {AGAIN}'),
    ([BASE, LAST], BASE, 1.5, LAST, f'Undecided: use contiguous fp32, but channels last in fp32 may be more than twice as fast. {AGAIN} {BACK}')])
def test_the_verdict_of_given_times(rows, best, margin, current, verdict):
    t = FormatTimings(rows, best, margin, LAST, 1., current=current.setting)
    assert t.verdict == verdict and list(t.to_frame().note) == [r.note for r in rows]
    assert max(map(len, repr(FormatTimings(rows, best, loader_ms=1.)).splitlines())) <= 160


@pytest.mark.parametrize('rows, best, margin, current, outcome', [
    ([BASE, LAST], LAST, 0.02, BASE, 'Training in channels last, fp32: 2.00× as fast as contiguous fp32.'),
    ([BASE, LAST], LAST, 0.02, LAST, 'Training stays in channels last, fp32: 2.00× as fast as contiguous fp32.'),
    ([BASE, SLOWER], SLOWER, 0.02, SLOWER, 'Training stays in channels last, fp32: nothing else was more than 2% faster.'),
    ([BASE, SLOWER], SLOWER, 0.03, SLOWER, 'Training stays in channels last, fp32: nothing else was clearly faster.'),
    ([BASE, LAST], BASE, 0.02, LAST, 'Training in contiguous, fp32: nothing else was more than 2% faster.'),
    ([BASE, LAST], BASE, 0.45, BASE, f'Training stays in contiguous, fp32: nothing else was clearly faster. Undecided: channels last in fp32 '
                                   f'may be up to 45% faster. {AGAIN}')])
def test_the_outcome_of_given_times(rows, best, margin, current, outcome):
    rival = LAST if best is BASE else BASE
    assert FormatTimings(rows, best, margin, rival, current=current.setting).outcome == outcome


def test_after_a_short_measurement_the_verdict_advises_a_larger_num_it(fake_steps):
    fake_steps({})
    assert find(num_it=3).few_rounds and not find(num_it=None).few_rounds
    undecided = FormatTimings([BASE, LAST], BASE, 0.45, LAST, few_rounds=True)
    assert undecided.verdict.endswith(' Measure again with a larger `num_it`.')


def test_many_frozen_parameters_are_printed_with_commas():
    assert '11,166,912 of 11,703,872 parameters' in FormatTimings([BASE], BASE, frozen=(11166912, 11703872)).verdict


@pytest.mark.parametrize('last, choice', [(False, 'Keep contiguous fp32: '), (True, 'Use contiguous fp32: ')])
def test_the_verdict_says_whether_to_keep_the_current_setting(fake_steps, last, choice):
    fake_steps({'channels last, fp32': 200.})
    learn = learner()
    assert find(learn.to_channelslast(to_fp16=False) if last else learn).verdict.startswith(choice)


def test_the_current_setting_is_kept_in_a_tie(fake_steps):
    fake_steps({'contiguous, fp32': 99.5})
    assert find(learner().to_channelslast(to_fp16=False)).verdict.startswith('Keep channels last in fp32: ')


# the optimizer's part of a step

@pytest.mark.parametrize('opt_func, kwargs, ms, said', [
    (ranger, {}, 5., None), (ranger, {}, 30., 'The optimizer takes 30.0 ms of each step (30%).'),
    (Adam, dict(optimizer=False), 30., 'ms of each step (30%). Pass `opt_func=fused(Adam)` to `Learner`: the same weights in less time.')])
def test_an_optimizer_that_takes_much_of_the_step_is_said(fake_steps, clock, monkeypatch, opt_func, kwargs, ms, said):
    "With the argument of `Learner` that helps, if one is known that gives the same weights."
    real = Optimizer.step
    monkeypatch.setattr(Optimizer, 'step', lambda self: (clock.pass_ms(ms), real(self)))
    fake_steps(lambda setting, n: 100. - ms)
    t = find(learner(opt_func=opt_func), **BASELINE, **kwargs)
    assert t.optimizer_ms == approx(ms) and t.rows[0].ms == approx(100.)
    assert t.verdict.endswith(said) if said else 'optimizer' not in t.verdict


@pytest.fixture
def noisy_adam(clock):
    "`noisy_adam(fails)`: an `opt_func` whose steps take 40 or 70 ms; the `fails`th one raises. `.ran` counts them."
    def _make(fails=0):
        def _opt(*args, **kwargs):
            opt = Adam(*args, **kwargs)
            real = opt.step
            def step():
                _make.ran += 1
                clock.pass_ms(70. if _make.ran % 3 == 1 else 40.)
                if _make.ran == fails: raise RuntimeError('not without a new gradient')
                real()
            opt.step = step
            return opt
        return _opt
    _make.ran = 0
    return _make


def test_on_a_cpu_the_optimizer_is_timed_alone_and_added_to_each_step(fake_steps, noisy_adam):
    "Its noise is not in the steps."
    fake_steps({})
    t = find(learner(opt_func=noisy_adam()))
    assert t.optimizer_ms == approx(40.) and [r.ms for r in t.rows] == approx([140.]*2) and max(r.doubt for r in t.rows) < 1e-9
    assert noisy_adam.ran < len(fake_steps.settings)


def test_on_a_gpu_the_optimizer_is_part_of_each_step_and_its_time_unknown(fake_steps, noisy_adam, gpu):
    "Calls return before the work is done, so times do not add up."
    fake_steps({})
    t = find(gpu().learner(opt_func=noisy_adam()), num_it=3, **BASELINE)
    assert t.optimizer_ms is None and t.rows[0].ms == approx(140.) and t.rows[0].doubt > 0.01 and t.rows[0].memory is not None


@pytest.mark.parametrize('fails', [3, 4])
def test_an_optimizer_that_cannot_run_alone_is_part_of_each_step(fake_steps, noisy_adam, fails):
    fake_steps({})
    t = find(learner(opt_func=noisy_adam(fails)))
    assert t.optimizer_ms is None and [r.ms for r in t.rows] == approx([140.]*2) and noisy_adam.ran > fails + 4


def test_gradient_clipping_is_part_of_a_step_without_the_optimizer(fake_steps, noisy_adam, clock):
    class Clip(GradientClip):
        def before_step(self): clock.pass_ms(10.); super().before_step()
    fake_steps({})
    t = find(learner(opt_func=noisy_adam(), cbs=Clip(1.)))
    assert [r.ms for r in t.rows] == approx([150.]*2) and t.optimizer_ms == approx(40.)


def test_the_optimizer_is_added_only_to_steps_in_which_it_would_run(fake_steps, noisy_adam):
    "Here after every other batch of 8; the fastest step is one without."
    fake_steps({})
    t = find(learner(opt_func=noisy_adam(), cbs=GradientAccumulation(16)))
    assert [r.ms for r in t.rows] == approx([100.]*2) and max(r.doubt for r in t.rows) > 0.01 and t.optimizer_ms == approx(40.)


# to_fastest

STARTS = dict(plain=lambda o: o, last=lambda o: o.to_channelslast(to_fp16=False), last_bf16=lambda o: o.to_channelslast(amp_mode='bf16'),
              bf16=lambda o: o.to_channelslast(amp_mode='bf16').to_contiguous(), fastai=lambda o: o.add_cb(FastaiChannelsLast()))
WINS = [ALL[0], ALL[2], ALL[3], ALL[5]]
FEW = {('plain', ALL[0]), ('plain', ALL[5]), ('last', ALL[2]), ('last_bf16', ALL[0]), ('last_bf16', ALL[3]), ('bf16', ALL[5]),
       ('bf16', ALL[0]), ('fastai', ALL[2]), ('fastai', ALL[3])}


@pytest.mark.parametrize('start, win', [pytest.param(s, w, marks=() if (s, w) in FEW else pytest.mark.slow) for s in STARTS for w in WINS])
def test_to_fastest_switches_to_the_fastest_setting_and_prints_it(has, fake_steps, capsys, start, win):
    has('bf16'); fake_steps({win: 10.})
    learn = STARTS[start](learner())
    for _ in range(2 if start == 'plain' else 1):
        assert learn.to_fastest(num_it=3, optimizer=False) is learn
        assert len(learn._grab_cbs(ChannelsLast)) == len(learn._grab_cbs(FastaiChannelsLast)) == ('last' in win)
        assert len(learn._grab_cbs(MixedPrecision)) == ('bf16' in win)
        if 'bf16' in win: assert learn.mixed_precision.amp_mode.value == 'bf16'
        assert rows_of(learn.format_timings)[win] is learn.format_timings.best
    said = capsys.readouterr().out.strip().splitlines()
    why = 'nothing else was more than 2% faster' if win == ALL[0] else '10.00× as fast as contiguous fp32'
    before = dict(plain=win, last='channels last, fp32', fastai='channels last, fp32', last_bf16='channels last, bf16', bf16='contiguous, bf16')
    assert f"Training {'stays ' if before[start] == win else ''}in {win}: {why}." in said[-2:]
    assert said[-1].startswith('Without measuring: learn.to_') or win == ALL[0]
    learn.fit(1)


def test_to_fastest_passes_scaler_arguments_to_the_mixed_precision(has, fake_steps):
    has('fp16'); fake_steps({'channels last, fp16': 10.})
    learn = learner().to_fastest(num_it=3, init_scale=128.)
    assert learn.mixed_precision.kwargs == dict(init_scale=128.)


def test_to_fastest_replaces_fastais_mixed_precision_which_runs_on_cuda_only(has, fake_steps):
    has('fp16'); fake_steps({'channels last, fp16': 10.})
    learn = learner().to_fp16().to_fastest(num_it=3)
    assert len(learn._grab_cbs(MixedPrecision)) == 1 and type(learn.mixed_precision) is not MixedPrecision
    learn.fit(1)


def test_a_learner_exported_after_to_fastest_loads_without_this_library(fake_steps, tmp_path):
    fake_steps({'channels last, fp32': 10.})
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path).to_fastest(num_it=3)
    assert deepcopy(learn).format_timings is learn.format_timings
    blob = pickle.dumps(learn.format_timings)
    assert b'channelslast' not in blob and pickle.loads(blob)['best']['ms'] == approx(10.)
    learn.export('e.pkl')
    assert load_learner(tmp_path/'e.pkl').format_timings['best']['memory_format'] == 'channels_last'


@pytest.mark.cuda
def test_format_find_and_to_fastest_on_cuda():
    learn = learner(dls=loaders().to(torch.device('cuda')))
    before = strides(learn)
    t = learn.format_find(num_it=3, show_plot=False)
    assert len(t.rows) >= 4 and all(r.memory for r in t.rows if r.ms) and strides(learn) == before
    learn.to_fastest(num_it=3).fit(1)


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
def test_frozen_parameters_are_counted_and_said(fake_steps, capsys, freeze, kwargs, counts):
    "Counts the parameters that `learn.unfreeze()` would train: after it, steps are not the measured ones."
    fake_steps({})
    learn = freeze(learner(**kwargs))
    learn.to_fastest(num_it=1, optimizer=False, **BASELINE)
    printed, t = capsys.readouterr().out, learn.format_timings
    said = f'{counts[0]} of 604 parameters are frozen. To train them later, call `learn.unfreeze()` and measure again.'
    assert t.frozen == counts and t.verdict.endswith(said) == (said in repr(t)) == (counts[0] > 0) and ('frozen' in t._repr_html_()) == (counts[0] > 0)
    has_hint = f'Training stays in contiguous, fp32: nothing else was measured. {said}' in printed
    assert printed.count('\n') == 1 and has_hint == ('frozen' in printed) == (counts[0] > 0)
    assert pickle.loads(pickle.dumps(t))['frozen'] == counts
    assert all(p.requires_grad for p in learn.model.parameters()) == (counts == (0, 604))  # unchanged
    learn.unfreeze()
    assert find(learn, num_it=1, **BASELINE).frozen == (0, counts[1])


def test_frozen_parameters_do_not_matter_for_predictions(fake_steps, capsys):
    fake_steps({})
    learn = frozen(learner(splitter=split)).to_fastest(num_it=1, train=False, **BASELINE)
    assert learn.format_timings.frozen is None and 'frozen' not in repr(learn.format_timings) + capsys.readouterr().out
