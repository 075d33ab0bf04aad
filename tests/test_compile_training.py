"""`CompileTraining` trains as without it and compiles rarely. At the end: what holds for `CompilePredictions`, too."""
import gc
import pickle
import random
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, CancelBatchException, CrossEntropyLossFlat, GradientAccumulation, Learner, MixUp, SGD, load_learner
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from channelslast import CompilePredictions, CompileTraining
from .helpers import (REFUSED, Breaks, convnet, difference, image_folder, learner, learner_state, loaders, names_library, preds_of, shake, truth_of)

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
slow = pytest.mark.slow


def fits(learn): learn.fit(2, 1e-2)


def trained(compiled, model=convnet, n=20, change=fits, cbs=(), loss=None, **kwargs):
    "A Learner after `change`, from the same weights and batches with and without `CompileTraining`."
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    learn = learner(shake(model()), loaders(n=n), cbs=[*[CompileTraining()]*compiled, *cbs], **kwargs)
    if loss: learn.loss_func = loss
    with learn.no_bar(), learn.no_logging(): change(learn)
    return learn


def assert_same(a, b, rtol=1e-3, atol=1e-4):
    assert a.model.state_dict().keys() == b.model.state_dict().keys()
    for (k, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values()): torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=k)


def check(rtol=1e-3, atol=1e-4, **kwargs):
    "Weights and running statistics are the same with and without the callback. Returns the Learner with it."
    learn, plain = trained(True, **kwargs), trained(False, **kwargs)
    assert_same(learn, plain, rtol, atol)
    return learn


def test_really_compiled_steps_compute_the_same_weights_and_running_statistics(compilations, capsys):
    "With the compiler, for two epochs whose last batch is smaller."
    learn = check()
    assert len(compilations) == 1 and {*compilations[0]} == {(8, 3, 8, 8)} and len(compilations[0]) == 3
    assert learn.compile_training.compiled == 1 and learn.compile_training.seconds > 0
    assert capsys.readouterr().out.count('CompileTraining: Sequential compiled in') == 1


def test_traced_steps_compute_the_same_weights_and_running_statistics(traced):
    learn = check()
    assert len(traced) == 1 and learn.compile_training.compiled == 1 and not learn.compile_training.reason


@slow
@pytest.mark.parametrize('what', ['freezing', 'bf16'])
def test_really_compiled_steps_after_freezing_and_in_half_precision_compute_the_same(has, compilations, what):
    has('bf16')
    if what == 'freezing': learn = check(change=freezes, splitter=split)
    else: learn = check(5e-2, 5e-3, change=lambda learn: learn.to_channelslast(amp_mode='bf16').fit(2))
    assert len(compilations) == learn.compile_training.compiled == (2 if what == 'freezing' else 1)


def test_half_precision_in_channels_last_computes_the_same(has, traced):
    has('bf16')
    learn = check(5e-2, 5e-3, change=lambda learn: learn.to_channelslast(amp_mode='bf16').fit(2))
    assert len(traced) == 1 and learn.compile_training.compiled == 1


def test_smaller_batches_and_validation_run_uncompiled(uncompiled):
    modes = []
    class Mode(nn.Module):
        def forward(self, x):
            if torch.compiler.is_compiling(): modes.append((len(x), self.training, torch.is_grad_enabled()))
            return x
    trained(True, lambda: nn.Sequential(Mode(), *convnet()))
    assert {*modes} == {(8, True, True)} and len(uncompiled) == 1


def split(model): return [list(model[:3].parameters()), list(model[3:].parameters())]


def freezes(learn):
    learn.fit(1)
    for _ in range(2):
        learn.freeze_to(1); learn.fit(1)
        learn.unfreeze(); learn.fit(1)


def searches(learn): learn.lr_find(num_it=4, show_plot=False); learn.fit(1)
def formats(learn): learn.fit(1); learn.to_channelslast(to_fp16=False).fit(2); learn.to_contiguous().fit(1)
def reloads(learn): learn.fit(1); learn.model.load_state_dict(deepcopy(learn.model.state_dict())); learn.fit(1)
def validates(learn): learn.fit(1); learn.validate(); learn.get_preds(); learn.fit(1)


CHANGES = { # and the number of compilations
    'freeze': (freezes, 2), 'lr_find': (searches, 1), 'channels last': (formats, 2), 'load': (reloads, 1), 'validate': (validates, 1),
    'accumulate': (lambda learn: learn.fit(2, cbs=GradientAccumulation(16)), 1), 'mixup': (lambda learn: learn.fit(2, cbs=MixUp()), 1)}


@pytest.mark.parametrize('change', CHANGES)
def test_only_other_settings_compile_again(uncompiled, change, tmp_path):
    f, n = CHANGES[change]
    kwargs = dict(change=f, splitter=split, path=tmp_path)
    learn = trained(True, **kwargs)
    assert len(uncompiled) == n and not learn.compile_training.reason
    if change != 'mixup': assert_same(learn, trained(False, **kwargs))


def test_after_a_few_settings_no_more_are_compiled(uncompiled):
    def _change(learn):
        for i in range(8):
            for k, p in enumerate(learn.model.parameters()): p.requires_grad_(k != i)
            learn.fit(1)
    learn = check(change=_change)
    assert 1 < len(uncompiled) < 8 and learn.compile_training.compiled == len(uncompiled)


class Counts(nn.Module):
    "Keeps state in a plain number, which compiled code holds as a constant."
    def __init__(self): super().__init__(); self.net, self.n = convnet(), 0
    def forward(self, x):
        self.n += 1
        return self.net(x)*(1 + self.n % 2)


def test_a_model_whose_state_changes_trains_as_without_the_callback_with_one_warning(traced):
    kwargs = dict(model=Counts, n=40)  # five batches an epoch
    with pytest.warns(UserWarning, match='CompileTraining: Counts stays uncompiled: .*state changes') as w: learn = trained(True, **kwargs)
    assert len([o for o in w if 'CompileTraining' in str(o.message)]) == 1 and learn.compile_training.compiled == 0
    assert_same(learn, trained(False, **kwargs))
    assert learn.model.n == trained(False, **kwargs).model.n


class Draws(nn.Module):
    def __init__(self, draw): super().__init__(); self.net, self.draw = convnet(), draw
    def forward(self, x): return self.net(x*self.draw(len(x))) if self.training else self.net(x)


def shuffled(n):
    order = [*range(n)]
    random.shuffle(order)
    return torch.tensor(order).view(-1, 1, 1, 1)


DRAWS = {'random.shuffle': shuffled, 'random.sample': lambda n: torch.tensor(random.sample(range(n), n)).view(-1, 1, 1, 1),
         'random.random': lambda n: random.random(), 'numpy.random': lambda n: float(np.random.rand())}


@pytest.mark.parametrize('draw', DRAWS)
def test_a_model_that_draws_from_Python_or_NumPy_trains_uncompiled_and_draws_new_numbers(uncompiled, draw):
    with pytest.warns(UserWarning, match='stays uncompiled: it draws random numbers of Python or NumPy'):
        learn = check(model=lambda: Draws(DRAWS[draw]))
    assert uncompiled == [] and 'random' in learn.compile_training.reason


# it computes the same, or says that it does not

class TwoHeads(nn.Module):
    "The loss ignores `aux`."
    def __init__(self): super().__init__(); self.b, self.main, self.aux = nn.Linear(192, 8), nn.Linear(8, 4), nn.Linear(8, 4)
    def forward(self, x):
        h = self.b(x.flatten(1)).relu()
        return self.main(h), self.aux(h)


def main_loss(pred, y): return nn.functional.cross_entropy(pred[0], y)


@pytest.mark.parametrize('opt_func', [SGD, pytest.param(None, marks=slow)])
def test_a_head_that_the_loss_ignores_has_no_gradient_and_does_not_decay(traced, opt_func):
    kwargs = dict(model=TwoHeads, loss=main_loss, change=lambda learn: learn.fit(5, 0.1, wd=.1), **dict(opt_func=opt_func) if opt_func else {})
    learn = check(**kwargs)
    assert learn.compile_training.compiled == 1 and learn.model.aux.weight.grad is None and learn.model.main.weight.grad is not None
    fresh = trained(False, **{**kwargs, 'change': lambda learn: None})
    assert torch.equal(learn.model.aux.weight, fresh.model.aux.weight)


def test_a_head_that_the_loss_begins_to_use_is_trained(traced):
    n = []
    def _loss(pred, y):
        n.append(0)
        return main_loss(pred, y) + (nn.functional.cross_entropy(pred[1], y) if len(n) > 8 else 0)
    def _fits(learn):
        n.clear()
        learn.fit(4, 0.1)
    check(model=TwoHeads, loss=_loss, change=_fits, opt_func=SGD)


def test_accumulated_gradients_of_a_head_that_the_loss_ignores_are_the_same(traced):
    kwargs = dict(model=TwoHeads, loss=main_loss, change=lambda learn: learn.fit(3, 0.1, wd=.1, cbs=GradientAccumulation(16)), opt_func=SGD)
    assert check(**kwargs).compile_training.compiled == 1


class Penalty(Callback):
    "A gradient penalty, which differentiates twice."
    def before_batch(self): self.learn.xb = (self.x.clone().requires_grad_(),)
    def after_loss(self):
        if not self.training: return
        g, = torch.autograd.grad(self.learn.loss_grad, self.x, create_graph=True)
        self.learn.loss_grad = self.learn.loss_grad + g.pow(2).sum()


class Twice(Callback):
    "Two backward passes through one graph."
    def before_backward(self): self.learn.loss_grad.backward(retain_graph=True)


SAYS_SO = r'CompileTraining[\s\S]*learn\.remove_cb\(CompileTraining\)'


def notes_of(e): return '\n'.join([str(e), *getattr(e, '__notes__', [])])


@pytest.mark.parametrize('cb', [Penalty, Twice])
def test_a_second_backward_pass_computes_the_same_or_the_error_says_how_to_train_without_the_callback(traced, cb):
    try: learn = trained(True, cbs=[cb()])
    except RuntimeError as e:
        assert re.search(SAYS_SO, notes_of(e))
    else: assert_same(learn, trained(False, cbs=[cb()]))


@slow
@pytest.mark.parametrize('cb', [Penalty, Twice])
def test_a_second_backward_pass_in_really_compiled_code_computes_the_same_or_says_so(compilations, cb):
    test_a_second_backward_pass_computes_the_same_or_the_error_says_how_to_train_without_the_callback(None, cb)


def test_without_the_callback_the_same_Learner_trains_with_a_gradient_penalty(traced):
    torch.manual_seed(0)
    learn = learner(cbs=[CompileTraining(), Penalty()])
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(RuntimeError): learn.fit(1)
        learn.remove_cb(CompileTraining).fit(1)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise RuntimeError('in the backward pass of compiled code')


@pytest.mark.parametrize('n', [1, 3])
def test_a_backward_pass_that_fails_in_compiled_code_says_how_to_train_without_it(uncompiled, n):
    "In the step that compiles, or in a later one."
    calls = []
    def _fail(out):
        calls.append(0)
        return FailsBackward.apply(out) if len(calls) == n else out
    uncompiled.output = _fail
    with pytest.raises(RuntimeError) as e: trained(True)
    assert re.search(SAYS_SO, notes_of(e.value)) and len(calls) == n


def test_a_forward_that_fails_in_a_later_compiled_batch_says_how_to_train_without_it(uncompiled):
    calls = []
    def _fail(out):
        calls.append(0)
        if len(calls) == 3: raise RuntimeError('in compiled code')
        return out
    uncompiled.output = _fail
    with pytest.raises(RuntimeError) as e: trained(True)
    assert re.search(SAYS_SO, notes_of(e.value))


@pytest.mark.parametrize('error', ['of the loss', 'in the first batch', 'out of memory'])
def test_errors_that_compiled_code_does_not_cause_do_not_name_the_callback(uncompiled, error):
    def _loss(pred, y):
        calls.append(0)
        if len(calls) == (1 if error == 'in the first batch' else 3): raise errors[error]
        return nn.functional.cross_entropy(pred, y)
    calls, oom = [], torch.OutOfMemoryError('CUDA out of memory')
    errors = {'of the loss': ValueError('mine'), 'in the first batch': RuntimeError('mine'), 'out of memory': oom}
    with pytest.raises((RuntimeError, ValueError)) as e: trained(True, loss=_loss)
    assert 'CompileTraining' not in notes_of(e.value)


def test_a_compiled_forward_that_fails_after_it_has_run_updates_running_statistics_once(uncompiled):
    def _fail(out): raise RuntimeError('in compiled code')
    uncompiled.output = _fail
    with pytest.warns(UserWarning, match='stays uncompiled: RuntimeError: in compiled code'): learn = check(rtol=0, atol=0)
    assert learn.model[1].num_batches_tracked == 6 and learn.compile_training.compiled == 0


def test_dropout_after_a_compiled_forward_that_fails_draws_the_same_numbers(uncompiled):
    def _fail(out): raise RuntimeError('in compiled code')
    uncompiled.output = _fail
    with pytest.warns(UserWarning, match='stays uncompiled'): check(model=lambda: nn.Sequential(convnet(), nn.Dropout(0.5)), rtol=0, atol=0)


@slow
@pytest.mark.parametrize('n', [1, 3])
def test_orthogonal_convolutions_train_the_same_or_say_so(compilations, n):
    def _model():
        layers = [o for _ in range(n) for o in (orthogonal(nn.Conv2d(3, 3, 3, padding=1)), nn.BatchNorm2d(3))]
        return nn.Sequential(*layers, convnet())
    try: learn = trained(True, _model)
    except RuntimeError as e:
        assert re.search(SAYS_SO, notes_of(e))
    else: assert_same(learn, trained(False, _model))


def test_a_batch_that_is_canceled_while_compiled_leaves_the_next_ones_as_without_the_callback(uncompiled):
    class Cancel(Callback):
        def after_pred(self):
            if self.training and self.iter == 1: raise CancelBatchException
    learn = check(cbs=[Cancel()], n=32)
    assert learn.compile_training.compiled == 1


HOOKS = {'forward hook': lambda layer: layer.register_forward_hook(lambda m, i, o: o*2),
         'pre-hook': lambda layer: layer.register_forward_pre_hook(lambda m, i: i[0]*2),
         'backward hook': lambda layer: layer.register_full_backward_hook(lambda m, i, o: (i[0]*2,)),
         'hook of a weight': lambda layer: layer.weight.register_hook(lambda g: g*2)}


@pytest.mark.parametrize('kind', [pytest.param(o, marks=slow if o == 'pre-hook' else ()) for o in HOOKS])
def test_hooks_registered_after_the_compilation_work_as_without_the_callback(traced, kind):
    def _change(learn):
        learn.fit(1, 0.1)
        h = HOOKS[kind](learn.model[3])
        learn.fit(1, 0.1)
        h.remove()
        learn.fit(1, 0.1)
    plain = trained(False, change=lambda learn: learn.fit(3, 0.1), opt_func=SGD)
    learn = check(change=_change, opt_func=SGD)
    assert not torch.allclose(learn.model[0].weight, plain.model[0].weight, rtol=1e-3)


def test_a_hook_registered_after_the_compilation_sees_each_batch(traced):
    "As fastai's `Hook` and `ActivationStats` register them."
    seen = [[], []]
    for compiled in False, True:
        def _change(learn):
            learn.fit(1)
            with learn.model[3].register_forward_hook(lambda m, i, o: seen[compiled].append(o.detach().mean())): learn.fit(1)
        trained(compiled, change=_change)
    torch.testing.assert_close(*map(torch.stack, seen), rtol=1e-3, atol=1e-4)


class Inner(nn.Module):
    def helper(self, x): return x
    def forward(self, x): return self.helper(x)


@pytest.mark.parametrize('name', ['forward', 'helper'])
def test_methods_redefined_between_fits_train_as_without_the_callback(traced, name, monkeypatch):
    def _change(learn):
        with monkeypatch.context() as m:
            learn.fit(1, 0.1)
            m.setattr(Inner, name, lambda self, x: x*3)
            learn.fit(1, 0.1)
    check(model=lambda: nn.Sequential(convnet(), Inner()), change=_change, opt_func=SGD)


class Constants(nn.Module):
    shared = torch.ones(4)
    def __init__(self): super().__init__(); self.net, self.t, self.held, self.p = convnet(), torch.ones(4), [torch.ones(4)], 1.
    def forward(self, x): return self.net(x)*self.t*self.held[0]*self.shared*self.p


CHANGED = {'number': lambda m, i: setattr(m, 'p', 1. + i), 'tensor': lambda m, i: m.t.fill_(1. + i),
           'tensor, assigned': lambda m, i: setattr(m, 't', torch.full((4,), 1. + i)),
           'tensor in a list': lambda m, i: m.held[0].fill_(1. + i), 'tensor of the class': lambda m, i: m.shared.fill_(1. + i),
           'momentum': lambda m, i: setattr(m.net[1], 'momentum', .1 + .1*i), 'dilation': lambda m, i: setattr(m.net[5], 'dilation', (1 + i % 2,)*2),
           'weight through data': lambda m, i: setattr(m.net[3].weight, 'data', m.net[3].weight.data*1.1)}


@pytest.mark.filterwarnings('ignore:.*stays uncompiled')
@pytest.mark.parametrize('what', [pytest.param(o, marks=() if o in ('number', 'tensor of the class', 'momentum') else slow) for o in CHANGED])
def test_values_that_change_before_each_batch_train_as_without_the_callback(traced, what):
    class Change(Callback):
        def before_batch(self):
            if self.training: CHANGED[what](self.model, self.iter)
    check(model=Constants, cbs=[Change()], opt_func=SGD)
    Constants.shared.fill_(1)


def test_on_a_CPU_with_AVX512_a_padded_2D_network_in_fp32_is_compiled(monkeypatch, uncompiled):
    "Its kernels compute some padded 3-D convolutions wrongly, but no 2-D ones in fp32."
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)
    assert trained(True).compile_training.compiled == 1


def test_two_callbacks_compute_the_same(uncompiled):
    check(cbs=[CompileTraining()])


# format_find and to_fastest

@pytest.fixture
def fast(fake_steps):
    "Compiled steps take 100 ms, others 1000."
    fake_steps(lambda setting, n: 100. if 'compiled' in setting else 1000.)


def to_fastest(learn, **kwargs):
    with learn.no_bar(): return learn.to_fastest(compile=True, num_it=3, layers=False, optimizer=False, **kwargs)


def compiled_row(learn):
    row, = [r for r in learn.format_timings.rows if r.compiled]
    return row


def test_to_fastest_trains_with_the_code_that_was_measured(fast, uncompiled, capsys):
    learn = to_fastest(learner(shake(convnet())))
    n = len(uncompiled)
    assert ', compiled' in capsys.readouterr().out and n == 2 and learn.compile_training.compiled == 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(uncompiled) == n and learn.compile_training.compiled == 1  # in eval mode, to compare numbers, and in training mode
    assert 'The compilation by inductor took ' in learn.format_timings.verdict


def test_other_settings_remove_what_to_fastest_compiled(fast, uncompiled):
    learn = to_fastest(learner(shake(convnet())))
    with learn.no_bar(): learn.to_fastest(num_it=2, layers=False)
    assert not learn._grab_cbs(CompileTraining)
    assert not to_fastest(learn).to_contiguous(to_fp32=True)._grab_cbs(CompileTraining)
    assert uncompiled.alive() == 0


def test_format_find_with_compile_leaves_the_Learner(fast, uncompiled):
    learn = learner(nn.Sequential(shake(convnet()), nn.Dropout(0.5)))
    before = learner_state(learn)
    with learn.no_bar(): t = learn.format_find(compile=True, num_it=3, layers=False, show_plot=False)
    row, = [r for r in t.rows if r.compiled]
    assert row is t.best and row.grad_diff < 1e-5 and row.compile_s is not None and len(uncompiled) == 2
    assert difference(before, learner_state(learn)) == '' and not learn._grab_cbs(CompileTraining) and uncompiled.alive() == 0


def test_a_compilation_that_an_epoch_does_not_earn_back_is_not_chosen_and_the_verdict_says_so(fast, clock, uncompiled):
    "0.9 s gained in each of four batches, and 100 s of compiling."
    def _compile(out):
        if len(uncompiled[-1]) == 1: clock.pass_ms(100_000)
        return out
    uncompiled.output = _compile
    learn = to_fastest(learner(shake(convnet())))
    row = compiled_row(learn)
    assert not learn._grab_cbs(CompileTraining) and row.valid and row.note == '28 epochs earn the compilation back'
    said = ('Compiled, a step would be 10.00× as fast: 28 epochs earn back the 100 s of the compilation. '
            'For a longer training, `learn.add_cb(CompileTraining())`.')
    assert said in learn.format_timings.verdict
    assert to_fastest(learner(shake(convnet()), loaders((3, 4, 4), n=112*8))).compile_training.compiled


@pytest.mark.parametrize('wrong, what', [(lambda out: out*1.5, r'\(loss\)'), (lambda out: (out.register_hook(lambda g: g*1.5), out)[1], r'\(gradient of .*\)')],
                         ids=['outputs', 'gradients'])
def test_wrong_numbers_of_compiled_code_are_a_row_with_a_note(fast, uncompiled, wrong, what):
    uncompiled.output = wrong
    row = compiled_row(to_fastest(learner(shake(convnet()))))
    assert re.fullmatch('numbers differ when compiled ' + what, row.note) and not row.valid


def test_a_gradient_that_compiled_code_does_not_compute_is_a_row_with_a_note(fast, uncompiled):
    learn = learner(shake(convnet()))
    h = learn.model[0].register_forward_hook(lambda m, i, o: o.detach() if torch.compiler.is_compiling() else o)
    row = compiled_row(to_fastest(learn))
    h.remove()
    assert re.search('gradient.*0.weight', row.note) and not row.valid


@slow
def test_to_fastest_with_the_compiler_trains_with_the_measured_code(fast, compilations):
    learn = to_fastest(learner(shake(convnet())))
    n = len(compilations)
    assert n == 2 and learn.compile_training.compiled == 1
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(compilations) == n and learn.compile_training.compiled == 1 and not learn.compile_training.reason


# both callbacks

@pytest.fixture(params=[CompilePredictions, CompileTraining], ids=['predictions', 'training'])
def kind(request): return request.param


def used(kind, model=None, dls=None, change=None, **kwargs):
    "A Learner that has predicted or trained with the callback, and the callback."
    torch.manual_seed(0)
    learn = learner(shake(model or convnet()), dls or loaders(n=40), cbs=kind(), **kwargs)
    if change: change(learn)
    return use(learn, kind), learn._grab_cbs(kind)[0]


def use(learn, kind):
    with learn.no_bar(), learn.no_logging():
        if kind is CompileTraining: learn.fit(2)
        else: [learn.validate() for _ in range(4)]
    return learn


def one_warning(kind, reason): return pytest.warns(UserWarning, match=rf'{kind.__name__}: \w+ stays uncompiled: .*{reason}')


def of(kind, warned): return len([o for o in warned if kind.__name__ in str(o.message)])


def test_layers_in_fp32_stay_uncompiled_with_one_warning(has, uncompiled, kind):
    has('bf16')
    with one_warning(kind, 'kept in fp32') as w:
        learn, cb = used(kind, change=lambda learn: learn.to_channelslast(amp_mode='bf16', fp32_layers='0'))
    assert uncompiled == [] and of(kind, w) == 1 and 'fp32' in cb.reason


def test_a_model_that_the_compiler_refuses_runs_uncompiled_with_one_warning(traced, kind):
    with one_warning(kind, REFUSED) as w: learn, cb = used(kind, Breaks())
    assert of(kind, w) == 1 and not cb.compiled and cb.reason.startswith(REFUSED) and len(traced) == 1
    torch.testing.assert_close(preds_of(learn), truth_of(learn))


def test_the_compilers_whole_message_is_one_short_line(uncompiled, kind):
    def _fail(out): raise ArithmeticError('\n\n  the first line ' + 'x'*200 + '\nand more')
    uncompiled.output = _fail
    with one_warning(kind, 'ArithmeticError: the first line'): learn, cb = used(kind)
    assert '\n' not in cb.reason and len(cb.reason) < 140


def test_a_quiet_callback_neither_warns_nor_prints(uncompiled, kind, recwarn, capsys):
    def _quiet(learn): learn._grab_cbs(kind)[0].quiet = True
    learn, cb = used(kind, change=_quiet)
    assert cb.compiled and capsys.readouterr().out == ''
    uncompiled.output = lambda out: 1/0
    learn, cb = used(kind, change=_quiet)
    assert 'ZeroDivisionError' in cb.reason and of(kind, recwarn) == 0


@pytest.mark.parametrize('platform, package', [('linux', r'install g\+\+'), ('darwin', '.*xcode-select'), ('win32', '.*Build Tools'), ('other', 'install one')])
def test_without_a_compiler_the_warning_names_the_package(uncompiled, kind, monkeypatch, platform, package):
    from torch._inductor.exc import InvalidCxxCompiler
    def _fail(out): raise InvalidCxxCompiler
    uncompiled.output = _fail
    monkeypatch.setattr('sys.platform', platform)
    with one_warning(kind, r'no C\+\+ compiler found: ' + package): used(kind)


@slow
def test_really_without_a_compiler_the_warning_names_the_package(kind):
    with torch._inductor.config.patch({'cpp.cxx': (None, 'no-such-compiler')}), one_warning(kind, r'no C\+\+ compiler found'): used(kind)


@pytest.mark.parametrize('how', ['DataParallel', 'compiled'])
def test_wrapped_models_stay_uncompiled(uncompiled, kind, how):
    model = nn.DataParallel(convnet()) if how == 'DataParallel' else Wrapped(convnet())
    with one_warning(kind, 'compiled.*already|wrapped for several devices'): learn, cb = used(kind, model)
    assert uncompiled == [] and not cb.compiled


class Wrapped(nn.Module):
    "As `torch.compile` wraps models."
    def __init__(self, m): super().__init__(); self._orig_mod = m
    def forward(self, x): return self._orig_mod(x)


def test_convolutions_that_oneDNN_computes_wrongly_stay_uncompiled(uncompiled, kind, monkeypatch):
    "The result is one column wide, which AVX-512 kernels misread. Compiled code would use them."
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=(1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with one_warning(kind, "oneDNN's kernels compute one of its convolutions wrongly") as w: used(kind, model, loaders((1, 8, 3), n=40))
    assert uncompiled == [] and of(kind, w) == 1


def test_strided_1x1_convolutions_of_few_channels_train_uncompiled_in_channels_last(uncompiled):
    "Their backward pass crashes (oneDNN issue 6035)."
    model = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with one_warning(CompileTraining, 'oneDNN'): used(CompileTraining, model, change=lambda learn: learn.to_channelslast(to_fp16=False))
    assert uncompiled == []


@pytest.mark.filterwarnings('ignore:.*stays uncompiled')
def test_eager_stance_compiles_nothing(traced, kind):
    with torch.compiler.set_stance('force_eager'): learn, cb = used(kind)
    torch.testing.assert_close(preds_of(learn), truth_of(learn))
    assert not any('compiled in' in o for o in cb.reason.splitlines())


def test_pickles_and_exports_load_without_this_library_and_copies_compile_their_own(uncompiled, kind, tmp_path):
    torch.manual_seed(0)
    learn = Learner(image_folder(tmp_path), shake(convnet(n=2)), CrossEntropyLossFlat(), path=tmp_path, cbs=kind())
    use(learn, kind)
    cb, copied = learn._grab_cbs(kind)[0], deepcopy(learn)
    assert cb.compiled and not copied._grab_cbs(kind)[0].compiled
    use(copied, kind)
    assert copied._grab_cbs(kind)[0].compiled and cb.compiled and len(uncompiled) == 2
    assert not names_library(pickle.dumps(cb))
    learn.export('e.pkl')
    assert not names_library((tmp_path/'e.pkl').read_bytes())
    assert [type(o) for o in load_learner(tmp_path/'e.pkl').cbs if type(o) is Callback]


@pytest.mark.parametrize('how', ['forget', 'remove_cb', 'to_contiguous'])
def test_compiled_code_is_freed(uncompiled, kind, how):
    learn, cb = used(kind)
    assert cb.compiled and uncompiled.alive() == 1
    if how == 'forget': cb.forget()
    if how == 'remove_cb': learn.remove_cb(kind)
    if how == 'to_contiguous': learn.to_contiguous(to_fp32=True)
    assert uncompiled.alive() == 0 and bool(learn._grab_cbs(kind)) == (how == 'forget')
    if how != 'forget': return
    assert not cb.compiled
    use(learn, kind)
    assert cb.compiled and len(uncompiled) == 2


@pytest.mark.parametrize('train', [True, False])
def test_to_fastest_keeps_the_users_own_callback(uncompiled, fake_steps, kind, train):
    fake_steps({})
    learn = learner(cbs=kind())
    with learn.no_bar(): learn.to_fastest(num_it=2, layers=False, train=train)
    assert len(learn._grab_cbs(kind)) == 1


def test_a_row_that_could_not_be_compiled_says_why(fast, traced):
    learn = to_fastest(learner(Breaks()))
    assert compiled_row(learn).note.startswith(f'not compiled: {REFUSED}') and not compiled_row(learn).valid and not learn._grab_cbs(CompileTraining)


@slow
def test_compiling_and_forgetting_again_and_again_keeps_no_memory(compilations, kind):
    "Weights and code, but not the few objects that PyTorch keeps for each compilation."
    def _alive(): gc.collect(); return sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())
    learn, cb = used(kind)
    cb.forget(); learn.opt = None
    before = _alive()
    for _ in range(3):
        use(learn, kind)
        assert cb.compiled
        cb.forget(); learn.opt = None
    assert _alive() <= before and compilations.alive() == 0
