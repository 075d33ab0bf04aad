"`CompilePredictions`: the compiled model predicts the same, is never stale, and leaves the model as it was."
import gc
import logging
import pickle
import threading
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.vision.all import (Callback, ConvLayer, CrossEntropyLossFlat, DataLoader, DataLoaders, DynamicUnet, Learner,
                               load_learner)
from torch import nn

from channelslast import CompilePredictions, FoldBatchNorm
from channelslast.compile import compile_predictions, compiled_forward
from channelslast.core.devices import torch_version
from channelslast.find import predict_benchmark, train_benchmark
from .conftest import REFUSED, Breaks, convnet, learner, loaders, names_library, shake
from .test_channels_last import image_folder
from .test_format_summary import same, state

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')


def compiling(model=None, dls=None, **kwargs):
    return learner(model or shake(convnet()), dls or loaders(n=20), cbs=[FoldBatchNorm(), CompilePredictions()], **kwargs)


def plain(learn): return Learner(learn.dls, learn.model, CrossEntropyLossFlat()).get_preds()[0]


def test_predictions_and_weights_are_the_same(compilations, capsys):
    learn = compiling()
    before = {k: (v.clone(), v.stride(), v.data_ptr()) for k, v in learn.model.state_dict().items()}
    own = {k: {*vars(m)} for k, m in learn.model.named_modules()}
    expected = plain(learn)
    for _ in range(2): torch.testing.assert_close(learn.get_preds()[0], expected)
    assert compilations == [learn.model] and learn.compile_predictions.compiled
    out = capsys.readouterr().out
    assert out.count('CompilePredictions: Sequential compiled in') == 1 and '(8, 3, 8, 8)' in out
    assert all(torch.equal(v, before[k][0]) and (v.stride(), v.data_ptr()) == before[k][1:] for k, v in learn.model.state_dict().items())
    assert {k: {*vars(m)} for k, m in learn.model.named_modules()} == own
    with torch.inference_mode(): torch.testing.assert_close(learn.get_preds()[0], expected)
    assert len(compilations) == 1 and learn.compile_predictions.compiled


def test_other_shapes_run_uncompiled(compilations, monkeypatch):
    "The smaller last batch is folded, not compiled."
    learn, shapes = compiling(), []
    real = compiled_forward.CompiledForward.__call__
    monkeypatch.setattr(compiled_forward.CompiledForward, '__call__', lambda self, x: (shapes.append(len(x)), real(self, x))[1])
    for _ in range(2): learn.get_preds()
    assert {*shapes} == {8} and learn.fold_batch_norm.folded == 1 and len(compilations) == 1
    learn.get_preds(dl=DataLoader([(torch.randn(3, 12, 12), 0)]*8, bs=8))
    assert len(compilations) == 1


STALE = dict(
    optimizer=lambda learn: learn.fit(1), in_place=lambda learn: learn.model[0].weight.mul_(2),
    data=lambda learn: setattr(learn.model[0].weight, 'data', learn.model[0].weight.data*2),
    statistics=lambda learn: learn.model[1].running_mean.add_(1),
    load=lambda learn: learn.model.load_state_dict({k: v*2 for k, v in learn.model.state_dict().items()}),
    switch=lambda learn: setattr(learn.model, 'flag', True))


@pytest.mark.parametrize('how', STALE)
def test_never_stale(uncompiled, how, capsys):
    "Weights, running statistics and switches: the next prediction compiles again, and a line says so."
    learn = compiling(Flagged())
    learn.get_preds()
    capsys.readouterr()
    with torch.set_grad_enabled(how == 'optimizer'): STALE[how](learn)
    assert not learn.compile_predictions.compiled
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    assert len(uncompiled) == 2 and learn.compile_predictions.compiled
    assert 'Flagged compiled again in' in capsys.readouterr().out


class Flagged(nn.Sequential):
    flag = None
    def __init__(self): super().__init__(*shake(convnet())); self.flag = False
    def forward(self, x): return super().forward(x)*(2 if self.flag else 1)


def test_another_model(uncompiled):
    learn = compiling()
    learn.get_preds()
    learn.model = shake(convnet())
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    assert [*map(id, uncompiled)] == [id(uncompiled[0]), id(learn.model)] and learn.compile_predictions.compiled


def test_validation_in_a_fit_is_not_compiled(uncompiled):
    learn = compiling()
    learn.fit(2)
    assert uncompiled == []
    learn.validate()
    assert len(uncompiled) == 1
    learn.fit(1)
    assert len(uncompiled) == 1
    learn.validate()
    assert len(uncompiled) == 2


class Named(nn.Module):
    "Outputs in a dictionary and a tuple, as detectors and models with several heads give them."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return dict(logits=self.net(x), more=(x.mean((1, 2, 3)), self.net(x) + 1))


def test_nested_outputs(compilations):
    learn, batches = compiling(shake(Named())), []
    learn.loss_func = lambda pred, y: pred['logits'].mean()
    class Keep(Callback):
        def after_pred(self): batches.append(self.pred)
    for _ in range(2): learn.validate(cbs=Keep())
    assert learn.compile_predictions.compiled and len(compilations) == 1
    for a, b in zip(batches[:3], batches[3:]): torch.testing.assert_close(a, b)


def test_predict_tta_and_load_learner(uncompiled, tmp_path):
    "One image after the other; also on a Learner from a file."
    dls = image_folder(tmp_path)
    learn = Learner(dls, shake(convnet(n=2)), CrossEntropyLossFlat(), path=tmp_path)
    image, expected = dls.valid_ds.items[0], learn.predict(dls.valid_ds.items[0])[2]
    learn.export('e.pkl')
    for o in learn, load_learner(tmp_path/'e.pkl'):
        o.add_cb(CompilePredictions())
        for _ in range(3): torch.testing.assert_close(o.predict(image)[2], expected)
        assert o.compile_predictions.compiled and len(uncompiled) == 1
        uncompiled.clear()
    learn.compile_predictions.forget()
    augmented = learn.tta(n=2)[0]
    assert len(uncompiled) == 1
    learn.remove_cb(CompilePredictions)
    assert augmented.shape == learn.tta(n=2)[0].shape


def test_models_on_several_devices_stay_uncompiled(uncompiled):
    learn = compiling()
    learn.model = nn.DataParallel(learn.model)
    with pytest.warns(UserWarning, match='stays uncompiled: it is wrapped for several devices'): learn.get_preds()
    assert uncompiled == []


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


@pytest.mark.parametrize('model, reason', [(Breaks, REFUSED), (Counts, 'state'), (Writes, 'buffers')])
def test_models_that_cannot_be_compiled(model, reason):
    "They run as they are, with one warning."
    learn, twin = compiling(model()), None
    twin = Learner(learn.dls, deepcopy(learn.model), CrossEntropyLossFlat())
    with pytest.warns(UserWarning, match=f'CompilePredictions: {model.__name__} stays uncompiled: .*{reason}') as w:
        for _ in range(2): torch.testing.assert_close(learn.get_preds()[0], twin.get_preds()[0])
    assert len([o for o in w if 'CompilePredictions' in str(o.message)]) == 1 and not learn.compile_predictions.compiled


def test_no_compiler(monkeypatch):
    "The warning names the package."
    monkeypatch.setattr(compiled_forward.sys, 'platform', 'linux')
    learn = compiling()
    with torch._inductor.config.patch({'cpp.cxx': (None, 'no-such-compiler')}), pytest.warns(UserWarning, match=r'no C\+\+ compiler found: install g\+\+'):
        torch.testing.assert_close(learn.get_preds()[0], plain(learn))


def test_wrong_numbers_are_not_used(monkeypatch):
    monkeypatch.setattr(compiled_forward, '_compile', lambda model, args, *_: (lambda x: type(model).forward(model, x)*1.01, model(*args)))
    learn = compiling()
    with pytest.warns(UserWarning, match='outputs differ when compiled'): torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))


def test_an_interruption_leaves_everything(monkeypatch):
    def _stop(*args): raise KeyboardInterrupt
    learn = compiling()
    own = {k: {*vars(m)} for k, m in learn.model.named_modules()}
    with monkeypatch.context() as m:
        m.setattr(compiled_forward, '_compile', _stop)
        with pytest.raises(KeyboardInterrupt): learn.get_preds()
    assert {k: {*vars(m)} for k, m in learn.model.named_modules()} == own and not torch.is_autocast_enabled('cpu')
    assert not torch._inductor.config.freezing and not learn.compile_predictions.reason


def test_exports_and_copies(uncompiled, tmp_path):
    learn = Learner(image_folder(tmp_path), shake(convnet(n=2)), CrossEntropyLossFlat(), path=tmp_path, cbs=CompilePredictions())
    learn.get_preds()
    assert not deepcopy(learn).compile_predictions.compiled and learn.compile_predictions.compiled
    assert not names_library(pickle.dumps(learn.compile_predictions))
    learn.export('e.pkl')
    loaded = load_learner(tmp_path/'e.pkl')
    assert not names_library((tmp_path/'e.pkl').read_bytes())
    assert [type(o) for o in loaded.cbs if type(o) is Callback]


def test_weights_without_batch_norm_after_a_fit():
    "✗ fastai's optimizers step through `p.data`, which PyTorch does not count."
    learn = compiling(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)))
    learn.get_preds()
    learn.fit(1, 1e-1)
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    learn.model[0].weight.data = learn.model[0].weight.data + 1; learn.model[0].weight.data = learn.model[0].weight.data + 1
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))


class Scales(nn.Module):
    def __init__(self): super().__init__(); self.net, self.scale, self.scales = convnet(), torch.ones(4), [torch.ones(4)]
    def forward(self, x): return self.net(x)*self.scale*self.scales[0]


def test_tensors_in_attributes():
    "They are constants of the compiled code, too."
    learn = compiling(Scales())
    for change in None, lambda m: m.scale.mul_(2), lambda m: m.scales[0].mul_(3), lambda m: setattr(m, 'scale', torch.full((4,), 5.)):
        if change: change(learn.model)
        for _ in range(2): torch.testing.assert_close(learn.get_preds()[0], plain(learn))


def test_a_replaced_forward(uncompiled):
    "A forward that the user sets on the model is not compiled, nor passed over."
    learn = compiling()
    learn.get_preds()
    real = learn.model.forward
    learn.model.forward = lambda x: real(x) + 1
    with pytest.warns(UserWarning, match='forward of a module was replaced'): preds = learn.get_preds()[0]
    torch.testing.assert_close(preds, plain(learn))
    del learn.model.forward
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    assert learn.compile_predictions.compiled


def test_predictions_inside_a_fit(uncompiled):
    class Predict(Callback):
        def after_train(self):
            self.learn.get_preds(inner=True)
            self.learn.validate()
    class Fail(Callback):
        def after_train(self): 1/0
    learn = compiling()
    learn.fit(2, cbs=Predict())
    assert uncompiled == []
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=Fail())
    learn.get_preds()
    assert len(uncompiled) == 1


def test_another_format_compiles_again(uncompiled):
    learn = compiling()
    learn.get_preds()
    learn.to_channelslast(to_fp16=False).get_preds()
    assert len(uncompiled) == 2 and learn.compile_predictions.compiled


def test_global_settings(compilations):
    "A guard that fails runs the model as it is, and compiles again, three times at most."
    learn, n = compiling(), torch.get_num_threads()
    expected = plain(learn)
    learn.get_preds()
    try:
        torch.set_num_threads(n + 1)
        for _ in range(2): torch.testing.assert_close(learn.get_preds()[0], expected)
    finally: torch.set_num_threads(n)
    assert len(compilations) <= 2 and not learn.compile_predictions.reason


def test_unet(compilations):
    """fastai's `DynamicUnet` casts its output to a type, stores features in hooks and removes these in a finalizer.
    ✗ PyTorch finalizes copies of the model while compiling: the skip connections stayed those of the first batch."""
    model = DynamicUnet(nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 8, stride=2)), 2, (16, 16))
    learn = compiling(shake(model), loaders((3, 16, 16)))
    learn.loss_func = lambda pred, y: pred.mean()
    hooks = [h.removed for h in model.sfs]
    for change in (lambda: None, lambda: model.layers[0][0][0].weight.mul_(2)):
        with torch.no_grad(): change()
        expected = Learner(learn.dls, model, learn.loss_func).get_preds()[0]
        for _ in range(2):
            preds = learn.get_preds()[0]
            torch.testing.assert_close(preds, expected)
            assert type(preds) is type(expected)
    if torch_version() >= (2, 7): assert len(compilations) == 2 and learn.compile_predictions.compiled
    else: assert 'setattr' in learn.compile_predictions.reason  # PyTorch 2.6 can't compile it
    assert [h.removed for h in model.sfs] == hooks and vars(DynamicUnet)['__del__'].__module__.startswith('fastai')


class Caches(nn.Module):
    "Keeps results of a first pass until training mode, as timm's LeViT does."
    def __init__(self): super().__init__(); self.net, self.cache = convnet(), {}
    def train(self, mode=True):
        if mode: self.cache.clear()
        return super().train(mode)
    def forward(self, x):
        if 'one' not in self.cache: self.cache['one'] = x.new_ones(())
        return self.net(x) + self.cache['one']


def test_a_cleared_cache(compilations):
    "Batches that the code does not fit run uncompiled, until there are three in a row."
    learn = compiling(Caches())
    expected = plain(learn)
    for n in 1, 1, 2:
        torch.testing.assert_close(learn.get_preds()[0], expected)
        assert len(compilations) == n
        learn.model.train()


def test_code_that_never_fits(monkeypatch):
    "Each batch compiled again would be slower than none."
    n = []
    def _compile(model, args, kwargs, freeze):
        calls = []
        n.append(calls)
        def _forward(x):
            calls.append(x)
            if len(calls) > 1: raise compiled_forward.NotCompiled(compiled_forward.DEPENDS)
            return convs(x)
        return _forward, convs(*args)
    monkeypatch.setattr(compiled_forward, '_compile', _compile)
    learn = compiling()
    convs = deepcopy(learn.model).eval()
    with pytest.warns(UserWarning, match='stays uncompiled: its state changes, or it depends on more than its input'):
        for _ in range(10): torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    assert len(n) == compile_predictions.MAX_UNUSED


def test_the_compiled_weights_are_freed():
    "✗ PyTorch keeps compiled code, its constants included, for the life of the process."
    def _alive(): gc.collect(); return sum(type(o) in (torch.Tensor, nn.Parameter) and o.numel() == 77*33 for o in gc.get_objects())
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 77), nn.Linear(77, 33), nn.Linear(33, 4))
    learn = compiling(model)
    before = _alive()
    learn.get_preds()
    assert learn.compile_predictions.compiled and _alive() > before
    learn.remove_cb(CompilePredictions)
    if torch_version() < (2, 7): pytest.xfail('PyTorch 2.6 keeps the constants')
    assert _alive() == before


def test_threads(compilations):
    "Two threads compile one after the other; log level and warnings stay."
    level, filters, learns = logging.root.manager.disable, list(warnings.filters), [compiling(), compiling()]
    expected, found = [plain(o) for o in learns], [None, None]
    def _predict(i): found[i] = learns[i].get_preds()[0]
    threads = [threading.Thread(target=_predict, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(found, expected): torch.testing.assert_close(a, b)
    assert not any(o.compile_predictions.reason for o in learns)  # no hooks of the other's trace were compiled
    assert logging.root.manager.disable == level and warnings.filters == filters


def test_freed_with_the_callback(uncompiled):
    learn = compiling()
    learn.get_preds()
    cb = learn.compile_predictions
    learn.remove_cb(cb)
    assert cb._compiled is None


def test_layers_in_fp32_stay_uncompiled(has, uncompiled):
    has('bf16')
    learn = compiling().to_channelslast(amp_mode='bf16', fp32_layers='0')
    with pytest.warns(UserWarning, match='kept in fp32'): learn.get_preds()
    assert uncompiled == []


# format_find and to_fastest

@pytest.fixture
def fake(monkeypatch):
    "`fake(winner)`: the class of callback that makes a batch's predictions take 1 ms instead of 10."
    def _fake(cls):
        real = train_benchmark.step_ms
        def _ms(learn, batch):
            real(learn, batch)
            return 1. if cls and learn._grab_cbs(cls) else 10.
        for m in train_benchmark, predict_benchmark: monkeypatch.setattr(m, 'step_ms', _ms)
        monkeypatch.setattr(train_benchmark.selection, 'MIN_TOTAL_MS', 0)
    return _fake


def find(learn, **kwargs):
    with learn.no_bar(): return learn.format_find(train=False, compile=True, num_it=3, show_plot=False, **kwargs)


@pytest.mark.parametrize('fast, kinds', [((), ['fp32']), (('bf16',), ['bf16', 'fp32']), (('fp16', 'bf16'), ['bf16', 'fp16', 'fp32'])])
def test_each_precision_is_compiled_once(has, fake, uncompiled, fast, kinds):
    has(*fast); fake(None)
    learn = learner(shake(convnet()), loaders(n=16))
    before = state(learn)
    t = find(learn)
    rows = [r for r in t.rows if r.compiled]
    assert sorted(r.precision for r in rows) == kinds and len(uncompiled) == len(kinds)
    assert all(r.compile_s > 0 and r.pred_diff is not None and r.ms for r in rows) and not t.best.compiled
    assert same(before, state(learn)) and not learn._grab_cbs(CompilePredictions)
    assert 'compiled' in repr(t) and not any(r.compiled for r in learn.format_find(train=False, num_it=2, show_plot=False).rows)


def test_to_fastest_compiles_once(has, fake, uncompiled, capsys):
    "The code that was measured serves the Learner; other settings remove it."
    has(); fake(CompilePredictions)
    learn = learner(shake(convnet()), loaders(n=16))
    expected = plain(learn)
    with learn.no_bar(): learn.to_fastest(train=False, compile=True, num_it=3)
    assert ', compiled: 10.00× as fast as contiguous fp32.' in capsys.readouterr().out and len(uncompiled) == 1
    torch.testing.assert_close(learn.get_preds()[0], expected)
    assert len(uncompiled) == 1 and learn.compile_predictions.compiled and 'batch' in learn.format_timings.verdict
    assert capsys.readouterr().out == ''
    with torch.no_grad(): learn.model[0].weight.mul_(2)
    torch.testing.assert_close(learn.get_preds()[0], plain(learn))
    assert len(uncompiled) == 2 and 'compiled again' in capsys.readouterr().out
    learn.to_contiguous(to_fp32=True)
    assert not learn._grab_cbs(CompilePredictions)
    with learn.no_bar(): learn.to_fastest(train=False, compile=True, num_it=3).to_fastest(num_it=2)
    assert not learn._grab_cbs(CompilePredictions)


@pytest.mark.parametrize('train', [True, False])
def test_the_users_own_callback_stays(has, fake, uncompiled, train):
    has(); fake(None)
    learn = learner(cbs=CompilePredictions())
    with learn.no_bar(): learn.to_fastest(num_it=2, layers=False, train=train)
    assert len(learn._grab_cbs(CompilePredictions)) == 1


def test_what_cannot_be_compiled_is_a_note(has, fake):
    has(); fake(CompilePredictions)
    learn = learner(Breaks(), loaders(n=16))
    t = find(learn)
    row, = [r for r in t.rows if r.compiled]
    assert row.note.startswith(f'not compiled: {REFUSED}') and not row.valid and not t.best.compiled


def test_wrong_numbers_are_a_note(has, fake, monkeypatch):
    has(); fake(CompilePredictions)
    monkeypatch.setattr(compiled_forward, '_compile', lambda model, args, *_: (lambda x: type(model).forward(model, x)*1.01, model(*args)))
    row, = [r for r in find(learner(shake(convnet()), loaders(n=16))).rows if r.compiled]
    assert 'outputs differ when compiled' in row.note and not row.valid


def test_several_devices_are_not_measured(has, fake, uncompiled):
    "The verdict says why nothing is compiled."
    has(); fake(CompilePredictions)
    t = find(learner(shake(convnet()), loaders(n=16), cbs=type('ParallelTrainer', (Callback,), {})()))
    assert not any(r.compiled for r in t.rows) and uncompiled == []
    assert 'The model stays uncompiled, because `ParallelTrainer` wraps it.' in t.verdict


@pytest.mark.parametrize('kwargs', [dict(compile='yes'), dict(train=False, compile=2)])
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match='compile='): learner().format_find(**kwargs)


def test_really_compiled(has, compilations, capsys):
    "With the compiler, and real times."
    has()
    learn = learner(shake(convnet()), loaders(n=16))
    expected = plain(learn)
    with learn.no_bar(): t = find(learn)
    row, = [r for r in t.rows if r.compiled]
    assert row.valid and row.pred_diff < 1e-5 and len(compilations) == 1, row
    torch.testing.assert_close(plain(learn), expected)
