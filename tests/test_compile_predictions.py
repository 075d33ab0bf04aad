"""`CompilePredictions`: the compiled model predicts the same, and the model stays as it was. Changes between predictions are in
test_never_stale.py; copies, threads and interruptions in test_hands_off.py; what holds for both callbacks in test_compile_training.py."""
import gc
import logging
import threading
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.vision.all import Callback, ConvLayer, CrossEntropyLossFlat, DynamicUnet, Learner, load_learner
from torch import nn
from torch.utils.checkpoint import checkpoint

from channelslast import CompilePredictions, FoldBatchNorm
from .helpers import (REFUSED, Breaks, convnet, difference, each_backend, find, image_folder, learner, learner_state, loaders, model_state, preds_of,
                      rows_of, shake, truth_of)

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')


def compiling(model=None, dls=None, **kwargs):
    return learner(model or shake(convnet()), dls or loaders(n=20), cbs=[FoldBatchNorm(), CompilePredictions()], **kwargs)


def assert_right(learn): torch.testing.assert_close(preds_of(learn), truth_of(learn), rtol=1e-4, atol=1e-5)


def alive(n):
    gc.collect()
    return sum(type(o) in (torch.Tensor, nn.Parameter) and o.numel() == n for o in gc.get_objects())


def test_really_compiled_predictions_are_the_same_and_the_frozen_weights_are_freed(compilations, capsys):
    "With the compiler. Only whole batches run compiled."
    model = nn.Sequential(shake(convnet(n=33)), nn.Linear(33, 77), nn.ReLU(), nn.Linear(77, 4))
    learn = learner(model, loaders(n=20), cbs=CompilePredictions())
    before, n_alive = model_state(model.eval()), alive(33*77)
    for _ in range(2): assert_right(learn)
    cb = learn.compile_predictions
    assert len(compilations) == 1 and {*compilations[0]} == {(8, 3, 8, 8)} and cb.compiled and cb.seconds > 0 and alive(33*77) > n_alive
    out = capsys.readouterr().out
    assert out.count('CompilePredictions: Sequential compiled in') == 1 and '(8, 3, 8, 8)' in out
    with torch.inference_mode(): assert_right(learn)
    assert difference(before, model_state(model)) == '' and len(compilations) == 1 and cb.compiled
    learn.remove_cb(cb)
    assert alive(33*77) == n_alive


@pytest.mark.slow
def test_really_compiled_unets_and_nested_outputs_are_the_same(compilations):
    for model, dls in (unet(), loaders((3, 16, 16))), (Named(), loaders()):
        learn = compiling(shake(model), dls)
        learn.loss_func = lambda pred, y: torch.zeros(())
        outputs = []
        for _ in range(3): learn.validate(cbs=Keep(outputs))
        n = len(outputs)//3
        for k in 1, 2:
            for a, b in zip(outputs[:n], outputs[k*n:]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert learn.compile_predictions.compiled


class Transposed(nn.Module):
    "Transposed convolutions with as many channels in as out, and a factor per channel."
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.ConvTranspose1d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose3d(4, 4, 2)
        self.norm, self.scale, self.head = nn.BatchNorm2d(4), nn.Parameter(torch.rand(1, 4, 1)), nn.Linear(4, 4)
    def forward(self, x):
        x = self.norm(self.two(torch.cat([x, x[:, :1]], 1)))
        x = self.one(x.mean(-1))*self.scale
        return self.head((self.three(x[..., None, None])/self.scale[..., None, None]).mean((2, 3, 4)))


@pytest.mark.slow
def test_really_compiled_transposed_convolutions_keep_their_factors(compilations):
    learn = learner(shake(Transposed()), loaders(), cbs=CompilePredictions())
    for _ in range(2): assert_right(learn)
    assert learn.compile_predictions.compiled and len(compilations) == 1


class Recomputes(nn.Module):
    "Checkpoints a layer, as timm's `set_grad_checkpointing` does."
    def __init__(self): super().__init__(); self.net, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    def forward(self, x): return self.head(checkpoint(self.net, x, use_reentrant=False).mean((2, 3)))


@each_backend()
@pytest.mark.filterwarnings('ignore:.*stays uncompiled')
def test_a_model_that_checkpoints_layers_is_compiled_by_PyTorch_and_follows_its_weights(backend):
    learn = learner(Recomputes(), loaders(n=16), cbs=CompilePredictions(backend))
    for _ in range(2): assert_right(learn)
    assert learn.compile_predictions.compiled == (backend == 'inductor')
    if backend != 'inductor': assert 'has no `tag_activation_checkpoint`' in learn.compile_predictions.reason
    with torch.no_grad(): learn.model.net.weight.mul_(2)
    assert_right(learn)


class Keep(Callback):
    "Keeps the predictions of each batch."
    def __init__(self, kept): self.kept = kept
    def after_pred(self): self.kept.append(self.pred)


def test_the_smaller_last_batch_and_other_sizes_run_folded_and_compile_nothing(uncompiled):
    learn = compiling()
    for _ in range(2): assert_right(learn)
    assert len(uncompiled) == 1 and {*uncompiled[0]} == {(8, 3, 8, 8)} and learn.fold_batch_norm.folded == 1
    learn.dls = loaders((3, 12, 12), n=16)
    for _ in range(3): assert_right(learn)
    assert len(uncompiled) == 1


def test_of_two_of_a_kind_the_one_added_last_takes_part(uncompiled):
    learn = compiling()
    first = learn.compile_predictions
    learn.add_cbs([CompilePredictions(), FoldBatchNorm()])
    assert_right(learn)
    assert len(uncompiled) == 1 and learn.compile_predictions is not first
    assert learn.compile_predictions.compiled and not first.compiled
    assert [cb.folded for cb in learn._grab_cbs(FoldBatchNorm)] == [None, 1]
    learn.remove_cb(learn.compile_predictions)
    assert_right(learn)
    assert len(uncompiled) == 2 and first.compiled


@each_backend()
def test_changed_weights_compile_again_and_a_line_says_so(code, capsys):
    learn = compiling()
    preds_of(learn)
    capsys.readouterr()
    with torch.no_grad(): learn.model[0].weight.mul_(2)
    assert not learn.compile_predictions.compiled
    assert_right(learn)
    assert len(code) == 2 and learn.compile_predictions.compiled and code.alive() == 1
    assert (out := capsys.readouterr().out).startswith('CompilePredictions: Sequential co') and ' again in ' in out


@each_backend()
def test_another_format_compiles_again(code):
    learn = compiling()
    preds_of(learn)
    preds_of(learn.to_channelslast(to_fp16=False))
    assert len(code) == 2 and learn.compile_predictions.compiled


@each_backend('inductor')
def test_another_model_compiles_again_and_frees_the_code_of_the_old_one(code):
    learn = compiling()
    preds_of(learn)
    learn.model = shake(convnet())
    assert not learn.compile_predictions.compiled
    assert_right(learn)
    assert len(code) == 2 and learn.compile_predictions.compiled and code.alive() == 1


@each_backend('inductor')
def test_validation_in_a_fit_is_not_compiled_and_the_next_one_outside_is(code):
    learn = compiling()
    learn.fit(2)
    assert code == []
    for n in 1, 2:
        learn.validate()
        assert len(code) == n
        learn.fit(1)
        assert len(code) == n


def test_predictions_inside_a_fit_are_not_compiled_also_after_a_fit_that_failed(uncompiled):
    class Predict(Callback):
        def after_train(self):
            self.learn.get_preds(inner=True)
            self.learn.validate()
    class Fail(Callback):
        def after_train(self): raise ZeroDivisionError('now')
    learn = compiling()
    learn.fit(2, cbs=Predict())
    assert uncompiled == []
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=Fail())
    preds_of(learn)
    assert len(uncompiled) == 1


class Named(nn.Module):
    "Outputs in a dictionary and a tuple, as detectors and models with several heads give them."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return dict(logits=self.net(x), more=(x.mean((1, 2, 3)), self.net(x) + 1))


@each_backend('inductor')
def test_nested_outputs_are_compiled_and_equal(traced, backend):
    learn, batches = compiling(shake(Named())), []
    learn.loss_func = lambda pred, y: pred['logits'].mean()
    for _ in range(2): learn.validate(cbs=Keep(batches))
    assert learn.compile_predictions.compiled and len(traced) == 1
    for a, b in zip(batches[:3], batches[3:]): torch.testing.assert_close(a, b)


@each_backend()
def test_predict_and_tta_run_compiled_also_on_a_Learner_from_a_file(code, tmp_path):
    dls = image_folder(tmp_path, 8)
    learn = Learner(dls, shake(convnet(n=2)), CrossEntropyLossFlat(), path=tmp_path)
    image, expected = dls.valid_ds.items[0], learn.predict(dls.valid_ds.items[0])[2]
    learn.export('e.pkl')
    for o in learn, load_learner(tmp_path/'e.pkl'):
        o.add_cb(CompilePredictions())
        for _ in range(3): torch.testing.assert_close(o.predict(image)[2], expected)
        assert o.compile_predictions.compiled and len(code) == 1
        code.clear()
    learn.compile_predictions.forget()
    augmented = learn.tta(n=2)[0]
    assert len(code) == 1
    assert augmented.shape == learn.remove_cb(CompilePredictions).tta(n=2)[0].shape


class Counts(nn.Module):
    "Keeps state in a plain number, which compiled code holds as a constant."
    def __init__(self): super().__init__(); self.net, self.n = convnet(), 0
    def forward(self, x):
        self.n += 1
        return self.net(x)*self.n


class Writes(nn.Module):
    def __init__(self): super().__init__(); self.net = convnet(); self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        self.n += 1
        return self.net(x) + self.n


class AddsInPlace(Writes):
    "Its counter is an attribute, not a buffer."
    def __init__(self): super().__init__(); del self.n; self.n = torch.zeros(())


class AddsToAList(nn.Module):
    def __init__(self): super().__init__(); self.net, self.seen = convnet(), [torch.zeros(())]
    def forward(self, x):
        self.seen[0] += 1
        return self.net(x)*self.seen[0]


@pytest.mark.parametrize('model', [Counts, Writes, AddsInPlace, AddsToAList])
def test_a_model_that_changes_its_state_in_each_pass_runs_uncompiled_once_per_batch_with_one_warning(uncompiled, model):
    torch.manual_seed(0)
    learn = learner(model(), loaders(n=32), cbs=CompilePredictions())
    twin = Learner(learn.dls, deepcopy(learn.model), CrossEntropyLossFlat())
    with pytest.warns(UserWarning, match=f'CompilePredictions: {model.__name__} stays uncompiled: .*(state|buffers)') as w:
        for _ in range(2): torch.testing.assert_close(preds_of(learn), preds_of(twin))
    assert len([o for o in w if 'CompilePredictions' in str(o.message)]) == 1 and not learn.compile_predictions.compiled
    assert uncompiled == [] and 'state' in learn.compile_predictions.reason or 'buffers' in learn.compile_predictions.reason


@pytest.mark.parametrize('error', [1e-2, float('nan')])
def test_compiled_code_that_gives_other_outputs_is_not_used_and_one_warning_says_so(uncompiled, error):
    uncompiled.output = lambda out: out*(1 + error)
    learn = learner(shake(convnet()), loaders(n=20), cbs=CompilePredictions())
    with pytest.warns(UserWarning, match='Sequential stays uncompiled: its outputs differ when compiled') as w:
        for _ in range(3): assert_right(learn)
    assert len([o for o in w if 'CompilePredictions' in str(o.message)]) == 1 and len(uncompiled) == 1 and not learn.compile_predictions.compiled


def test_outputs_that_differ_by_rounding_are_used(uncompiled):
    uncompiled.output = lambda out: out*(1 + 1e-5)
    learn = compiling()
    preds_of(learn); preds_of(learn)
    assert learn.compile_predictions.compiled and not learn.compile_predictions.reason


def test_code_whose_guards_fail_in_every_batch_is_given_up_with_one_warning(uncompiled):
    "Each batch compiled again would be slower than none."
    uncompiled.fits = lambda n: n <= 2  # the calls that compile and compare
    learn = compiling()
    with pytest.warns(UserWarning, match='stays uncompiled: its state changes, or it depends on more than its input') as w:
        for _ in range(20): assert_right(learn)
    assert len([o for o in w if 'CompilePredictions' in str(o.message)]) == 1
    n = len(uncompiled)
    for _ in range(5): assert_right(learn)
    assert len(uncompiled) == n < 10 and not learn.compile_predictions.compiled


def test_code_that_fails_in_a_later_batch_is_replaced_by_the_model(uncompiled):
    learn = compiling()
    preds_of(learn)
    def _fail(out): raise ArithmeticError('in compiled code')
    uncompiled.output = _fail
    assert_right(learn)


class Caches(nn.Module):
    "Keeps results of a first pass until training mode, as timm's LeViT does."
    def __init__(self): super().__init__(); self.net, self.cache = convnet(), {}
    def train(self, mode=True):
        if mode: self.cache.clear()
        return super().train(mode)
    def forward(self, x):
        if 'one' not in self.cache: self.cache['one'] = x.new_ones(())
        return self.net(x) + self.cache['one']


@each_backend('inductor')
def test_a_cache_that_is_cleared_and_filled_again_is_predicted_with(traced, backend):
    learn = compiling(Caches(), loaders(n=32))
    expected = truth_of(learn)
    for _ in range(4):
        torch.testing.assert_close(preds_of(learn), expected)
        learn.model.train()
    for _ in range(2): preds_of(learn)
    assert len(traced) <= 5


@each_backend()
def test_another_number_of_threads_predicts_the_same_and_gives_no_reason(traced, backend):
    "Guards of compiled code then fail."
    learn, n = compiling(), torch.get_num_threads()
    preds_of(learn)
    try:
        torch.set_num_threads(n + 1)
        for _ in range(2): assert_right(learn)
    finally: torch.set_num_threads(n)
    assert len(traced) <= 2 and not learn.compile_predictions.reason


def unet(): return DynamicUnet(nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 8, stride=2)), 2, (16, 16))


@each_backend('inductor')
def test_a_unet_is_compiled_keeps_its_hooks_and_gives_the_same_type_of_tensor(traced, backend):
    """fastai's `DynamicUnet` casts its output to a type, stores features in hooks and removes these in a finalizer, which
    PyTorch calls for copies while compiling: the skip connections would stay those of the first batch."""
    model = shake(unet())
    learn = compiling(model, loaders((3, 16, 16), n=16))
    learn.loss_func = lambda pred, y: pred.mean()
    hooks = [h.removed for h in model.sfs]
    for change in (lambda: None, lambda: model.layers[0][0][0].weight.mul_(2)):
        with torch.no_grad(): change()
        expected = preds_of(Learner(learn.dls, model, learn.loss_func))
        for _ in range(2):
            preds = preds_of(learn)
            torch.testing.assert_close(preds, expected)
            assert type(preds) is type(expected)
    assert len(traced) == 2 and learn.compile_predictions.compiled
    assert [h.removed for h in model.sfs] == hooks and vars(DynamicUnet)['__del__'].__module__.startswith('fastai')


@each_backend('inductor')
def test_a_forward_that_the_user_replaced_runs_uncompiled_until_it_is_gone(code):
    learn = compiling()
    preds_of(learn)
    real = learn.model.forward
    learn.model.forward = lambda x: real(x) + 1
    with pytest.warns(UserWarning, match='forward of a module was replaced'): assert_right(learn)
    del learn.model.forward
    assert_right(learn)
    assert learn.compile_predictions.compiled


@each_backend('inductor')
def test_a_model_with_gradients_or_in_training_mode_runs_uncompiled(code):
    class Train(Callback):
        def before_validate(self): self.model.train()
    class Saliency(Callback):
        def after_pred(self):
            if self.training: return
            with torch.enable_grad(): torch.autograd.grad(self.model(self.x.clone().requires_grad_()).sum(), self.model[0].weight)
    preds_of(compiling(), cbs=Train())
    assert code == []
    preds_of(compiling(), cbs=Saliency())
    assert len(code) == 1


@each_backend()
def test_summary_neither_compiles_nor_frees_compiled_code(code):
    learn = compiling(dls=loaders(n=16))
    learn.summary()
    assert code == []
    preds_of(learn)
    calls = len(code[0])
    learn.summary()
    assert len(code) == 1 and code.alive() == 1 and learn.compile_predictions.compiled and len(code[0]) == calls
    assert_right(learn)
    assert len(code) == 1


@each_backend()
def test_while_hooks_are_on_the_model_batches_run_uncompiled_and_the_code_stays(code):
    learn, seen = compiling(dls=loaders(n=16)), []
    preds_of(learn)
    calls = len(code[0])
    h = learn.model[0].register_forward_hook(lambda m, i, o: seen.append(m is learn.model[0]))
    assert_right(learn)
    h.remove()
    assert seen == [True]*4 and len(code[0]) == calls
    assert_right(learn)
    assert len(code) == 1 and len(code[0]) == calls + 2


@each_backend('inductor')
def test_two_threads_compile_one_after_the_other_and_log_level_and_warnings_stay(traced, backend):
    level, filters, learns = logging.root.manager.disable, list(warnings.filters), [compiling(), compiling()]
    expected, found = [truth_of(o) for o in learns], [None, None]
    def _predict(i): found[i] = preds_of(learns[i])
    threads = [threading.Thread(target=_predict, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(found, expected): torch.testing.assert_close(a, b)
    assert not any(o.compile_predictions.reason for o in learns), [o.compile_predictions.reason for o in learns]
    assert logging.root.manager.disable == level and warnings.filters == filters


@pytest.mark.parametrize('kind', ['inference', 'subclass'])
def test_inputs_of_other_tensor_types_run_compiled(uncompiled, kind):
    from fastai.vision.all import TensorImage
    learn = compiling(dls=loaders(n=16))
    class Convert(Callback):
        def before_batch(self):
            with torch.inference_mode(): self.learn.xb = (TensorImage(self.x) if kind == 'subclass' else self.x.clone(),)
    preds_of(learn, cbs=Convert())
    assert len(uncompiled) == 1 and learn.compile_predictions.compiled


# format_find and to_fastest

@pytest.fixture
def fast(fake_steps):
    "Compiled predictions take 10 ms, others 100."
    fake_steps(lambda setting, n: 10. if 'compiled' in setting else 100.)


@pytest.fixture
def no_faster(fake_steps): fake_steps({})


def find_compiled(learn=None, **kwargs):
    return find(learn or learner(shake(convnet()), loaders(n=16)), train=False, compile=True, **kwargs)


def to_fastest(learn, **kwargs):
    with learn.no_bar(): return learn.to_fastest(train=False, compile=True, num_it=3, **kwargs)


@pytest.mark.usefixtures('no_runtimes')
@pytest.mark.parametrize('modes, kinds', [((), ['fp32']), (('bf16',), ['bf16', 'fp32']), (('fp16', 'bf16'), ['bf16', 'fp16', 'fp32'])])
def test_format_find_compiles_each_precision_once_and_leaves_the_Learner(has, no_faster, uncompiled, modes, kinds):
    has(*modes)
    learn = learner(shake(convnet()), loaders(n=16))
    before = learner_state(learn)
    t = find_compiled(learn)
    rows = [r for r in t.rows if r.compiled]
    assert sorted(r.precision for r in rows) == kinds and len(uncompiled) == len(kinds)
    assert all(r.compile_s is not None and r.pred_diff is not None and r.ms for r in rows) and not t.best.compiled
    assert difference(before, learner_state(learn)) == '' and not learn._grab_cbs(CompilePredictions) and uncompiled.alive() == 0
    assert 'compiled' in repr(t) and not any(r.compiled for r in find(learn, train=False).rows)


@pytest.mark.usefixtures('no_runtimes')
def test_to_fastest_uses_the_code_that_was_measured_until_weights_change(fast, uncompiled, capsys):
    learn = learner(shake(convnet()), loaders(n=16))
    to_fastest(learn)
    assert ', compiled: 10.00× as fast as contiguous fp32.' in capsys.readouterr().out and len(uncompiled) == 1
    assert_right(learn)
    assert len(uncompiled) == 1 and learn.compile_predictions.compiled and 'batch' in learn.format_timings.verdict
    assert capsys.readouterr().out == ''
    with torch.no_grad(): learn.model[0].weight.mul_(2)
    assert_right(learn)
    assert len(uncompiled) == 2 and 'compiled again' in capsys.readouterr().out


@pytest.mark.usefixtures('no_runtimes')
def test_other_settings_remove_what_to_fastest_compiled(fast, uncompiled):
    learn = to_fastest(learner(shake(convnet()), loaders(n=16)))
    assert not learn.to_contiguous(to_fp32=True)._grab_cbs(CompilePredictions)
    assert to_fastest(learn)._grab_cbs(CompilePredictions)
    with learn.no_bar(): learn.to_fastest(num_it=2, layers=False)
    assert not learn._grab_cbs(CompilePredictions) and uncompiled.alive() == 0


@pytest.mark.usefixtures('no_runtimes')
def test_a_model_that_cannot_be_compiled_is_a_row_with_a_note(fast, traced):
    row, = [r for r in find_compiled(learner(Breaks(), loaders(n=16))).rows if r.compiled]
    assert row.note.startswith(f'not compiled: {REFUSED}') and not row.valid


@pytest.mark.usefixtures('no_runtimes')
def test_wrong_outputs_of_compiled_code_are_a_row_with_a_note(fast, uncompiled):
    uncompiled.output = lambda out: out*1.01
    t = find_compiled()
    row, = [r for r in t.rows if r.compiled]
    assert 'outputs differ when compiled' in row.note and not row.valid and not t.best.compiled


def test_on_several_devices_nothing_is_compiled_and_the_verdict_says_why(fast, uncompiled):
    t = find_compiled(learner(shake(convnet()), loaders(n=16), cbs=type('ParallelTrainer', (Callback,), {})()))
    assert not any(r.compiled for r in t.rows) and uncompiled == []
    assert 'The model stays uncompiled, because `ParallelTrainer` wraps it.' in t.verdict


@pytest.mark.slow
@pytest.mark.usefixtures('no_runtimes')
def test_format_find_with_the_compiler_and_real_times(compilations):
    learn = learner(shake(convnet()), loaders(n=16))
    expected = truth_of(learn)
    row, = [r for r in find_compiled(learn).rows if r.compiled]
    assert row.valid and row.pred_diff < 1e-5 and row.compile_s > 0 and len(compilations) == 1, row
    torch.testing.assert_close(truth_of(learn), expected)
    assert rows_of(learn.format_find(train=False, num_it=2, show_plot=False))
