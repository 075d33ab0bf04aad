"`CompileTraining`: trains as without it, and compiles rarely."
import pickle
from copy import deepcopy

import pytest
import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, GradientAccumulation, Learner, MixUp, load_learner
from torch import nn

from channelslast import CompileTraining
from channelslast.compile import compile_training, compiled_forward
from channelslast.find import train_benchmark
from .conftest import REFUSED, Breaks, convnet, learner, loaders, names_library, shake
from .test_channels_last import image_folder
from .test_format_summary import same, state

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')


def trained(cbs=(), model=None, n=20, change=lambda learn: learn.fit(2), **kwargs):
    "A Learner after `change`, from the same weights and batches whatever the callbacks."
    torch.manual_seed(0)
    learn = learner(shake(model() if model else convnet()), loaders(n=n), cbs=[*cbs], **kwargs)
    with learn.no_bar(), learn.no_logging(): change(learn)
    return learn


def assert_same(a, b, **kwargs):
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()): torch.testing.assert_close(x, y, **kwargs)


def test_weights_are_the_same(compilations, capsys):
    "Running statistics, weights and optimizer after two epochs, whose last batch is smaller."
    learn = trained([CompileTraining()])
    assert_same(learn, trained(), rtol=1e-3, atol=1e-4)
    assert compilations == [learn.model] and learn.compile_training.compiled == 1
    assert capsys.readouterr().out.count('CompileTraining: Sequential compiled in') == 1
    assert not any('forward' in vars(m) for m in learn.model.modules())
    assert [*learn.model.state_dict()] == [*convnet().state_dict()]


def test_other_shapes_and_validation_run_uncompiled(monkeypatch, uncompiled):
    shapes, real = [], compiled_forward.CompiledForward.__call__
    monkeypatch.setattr(compiled_forward.CompiledForward, '__call__', lambda self, x: (shapes.append((len(x), self.modules[0].training)), real(self, x))[1])
    trained([CompileTraining()])
    assert {*shapes} == {(8, True)} and len(uncompiled) == 1


def freeze(learn):
    learn.fit(1)
    for _ in range(2):
        learn.freeze_to(1); learn.fit(1)
        learn.unfreeze(); learn.fit(1)


CHANGES = dict(
    freeze=(freeze, 2), lr_find=(lambda learn: (learn.lr_find(num_it=4, show_plot=False), learn.fit(1)), 1),
    channelslast=(lambda learn: (learn.fit(1), learn.to_channelslast(to_fp16=False).fit(2), learn.to_contiguous().fit(1)), 2),
    load=(lambda learn: (learn.fit(1), learn.model.load_state_dict(deepcopy(learn.model.state_dict())), learn.fit(1)), 1),
    accumulate=(lambda learn: learn.fit(2, cbs=GradientAccumulation(16)), 1), mixup=(lambda learn: learn.fit(2, cbs=MixUp()), 1),
    validate=(lambda learn: (learn.fit(1), learn.validate(), learn.get_preds(), learn.fit(1)), 1))


def split(model): return [list(model[:3].parameters()), list(model[3:].parameters())]


@pytest.mark.parametrize('change', CHANGES)
def test_compiles_rarely(uncompiled, change, tmp_path):
    f, n = CHANGES[change]
    learn = trained([CompileTraining()], change=f, splitter=split, path=tmp_path)
    assert len(uncompiled) == n and not learn.compile_training.reason
    if change != 'mixup': assert_same(learn, trained(change=f, splitter=split, path=tmp_path), rtol=1e-3, atol=1e-4)


def test_really_compiled_after_freezing(compilations):
    learn = trained([CompileTraining()], change=freeze, splitter=split)
    assert_same(learn, trained(change=freeze, splitter=split), rtol=1e-3, atol=1e-4)
    assert len(compilations) == 2 and learn.compile_training.compiled == 2


def test_mixed_precision(has, compilations):
    has('bf16')
    change = lambda learn: learn.to_channelslast(amp_mode='bf16').fit(2)
    learn = trained([CompileTraining()], change=change)
    assert_same(learn, trained(change=change), rtol=5e-2, atol=5e-3)
    assert len(compilations) == 1 and learn.compile_training.compiled == 1


def test_layers_in_fp32_stay_uncompiled(has, uncompiled):
    has('bf16')
    with pytest.warns(UserWarning, match='kept in fp32') as w:
        trained([CompileTraining()], change=lambda learn: learn.to_channelslast(amp_mode='bf16', fp32_layers='0').fit(2))
    assert uncompiled == [] and len([o for o in w if 'CompileTraining' in str(o.message)]) == 1


class Counts(nn.Module):
    "Keeps state in a plain number, which compiled code holds as a constant."
    def __init__(self): super().__init__(); self.net, self.n = convnet(), 0
    def forward(self, x):
        self.n += 1
        return self.net(x)*(1 + self.n % 2)


@pytest.mark.parametrize('model, reason', [(Breaks, REFUSED), (Counts, 'state changes')])
def test_models_that_cannot_be_compiled(model, reason):
    "They train as they are, with one warning."
    n = 40  # five batches an epoch
    with pytest.warns(UserWarning, match=f'CompileTraining: {model.__name__} stays uncompiled: .*{reason}') as w:
        learn = trained([CompileTraining()], model, n)
    assert len([o for o in w if 'CompileTraining' in str(o.message)]) == 1 and learn.compile_training.compiled == 0
    assert_same(learn, trained((), model, n), rtol=1e-3, atol=1e-4)


def test_no_compiler():
    with torch._inductor.config.patch({'cpp.cxx': (None, 'no-such-compiler')}), pytest.warns(UserWarning, match=r'no C\+\+ compiler found'):
        assert_same(trained([CompileTraining()]), trained())


def test_wrong_convolutions_stay_uncompiled(uncompiled):
    "✗ A strided 1×1 convolution of few channels crashes in channels last (oneDNN issue 6035)."
    model = lambda: nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    if not compile_training.hits_onednn_6035(model()[0]): pytest.skip('PyTorch has mended it')
    with pytest.warns(UserWarning, match='oneDNN'): trained([CompileTraining()], model)
    assert uncompiled == []


def test_an_interruption_leaves_everything(monkeypatch):
    def _stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(compiled_forward, '_compile', _stop)
    torch.manual_seed(0)
    learn = learner(cbs=CompileTraining())
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert not any('forward' in vars(m) for m in learn.model.modules()) and not learn.compile_training.compiled


def test_two_backward_passes(compilations):
    "✗ Compiled code reuses the memory of saved tensors by default, and a second backward pass fails."
    class Twice(Callback):
        def before_backward(self): self.learn.loss_grad.backward(retain_graph=True)
    learn = trained([CompileTraining(), Twice()])
    assert_same(learn, trained([Twice()]), rtol=1e-3, atol=1e-4)
    assert learn.compile_training.compiled == 1


def test_exports_and_copies(uncompiled, tmp_path):
    learn = Learner(image_folder(tmp_path), shake(convnet(n=2)), CrossEntropyLossFlat(), path=tmp_path, cbs=CompileTraining())
    learn.fit(2)
    copied = deepcopy(learn)
    assert learn.compile_training.compiled and not copied.compile_training.compiled
    copied.fit(1)
    assert copied.compile_training.compiled and len(uncompiled) == 2
    assert not names_library(pickle.dumps(learn.compile_training))
    learn.export('e.pkl')
    assert not names_library((tmp_path/'e.pkl').read_bytes())
    assert [type(o) for o in load_learner(tmp_path/'e.pkl').cbs if type(o) is Callback]


def test_freed_with_the_callback(uncompiled):
    learn = trained([CompileTraining()])
    cb = learn.compile_training
    learn.to_contiguous(to_fp32=True)
    assert not cb._codes and not learn._grab_cbs(CompileTraining)


# format_find and to_fastest

@pytest.fixture
def fake(monkeypatch):
    "Compiled steps take 100 ms, others 1000."
    def _ms(learn, batch):
        real(learn, batch)
        return 100. if learn._grab_cbs(CompileTraining) else 1000.
    real = train_benchmark.step_ms
    monkeypatch.setattr(train_benchmark, 'step_ms', _ms)
    monkeypatch.setattr(train_benchmark.selection, 'MIN_TOTAL_MS', 0)


def to_fastest(learn, **kwargs):
    with learn.no_bar(): return learn.to_fastest(compile=True, num_it=3, layers=False, **kwargs)


def test_to_fastest_compiles_once(has, fake, uncompiled, capsys):
    "The code that was measured trains the Learner; other settings remove it."
    has()
    learn = learner(shake(convnet()))
    to_fastest(learn)
    assert ', compiled' in capsys.readouterr().out and len(uncompiled) == 2 and learn.compile_training.measured
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(uncompiled) == 2 and learn.compile_training.compiled == 1  # in eval mode, to compare numbers, and in training mode
    assert 'The compilation took ' in learn.format_timings.verdict
    with learn.no_bar(): learn.to_fastest(num_it=2, layers=False)
    assert not learn._grab_cbs(CompileTraining)
    assert not to_fastest(learn).to_contiguous(to_fp32=True)._grab_cbs(CompileTraining)


def test_format_find_leaves_the_learner(has, fake, uncompiled):
    has()
    learn = learner(nn.Sequential(shake(convnet()), nn.Dropout(0.5)))
    before = state(learn)
    with learn.no_bar(): t = learn.format_find(compile=True, num_it=3, layers=False, show_plot=False)
    row, = [r for r in t.rows if r.compiled]
    assert row is t.best and row.grad_diff < 1e-5 and row.compile_s is not None and len(uncompiled) == 2
    assert same(before, state(learn)) and not learn._grab_cbs(CompileTraining)


def test_an_epoch_must_earn_it_back(has, fake, uncompiled, monkeypatch):
    "0.9 s gained in each of four batches, and 100 s of compiling."
    has()
    def _took_long(self, seconds, *args, **kwargs): self.seconds = 100.
    monkeypatch.setattr(compiled_forward.CompileCallback, 'compiled_in', _took_long)
    learn = to_fastest(learner(shake(convnet())))
    row, = [r for r in learn.format_timings.rows if r.compiled]
    assert not learn._grab_cbs(CompileTraining) and row.valid and row.note == '112 batches earn the compilation back'
    assert 'the compilation takes 100 s: 112 batches earn it back, and an epoch has 4.' in learn.format_timings.verdict
    assert 'Compiled, a step would be 10.00× as fast, but' in learn.format_timings.verdict
    many = to_fastest(learner(shake(convnet()), loaders(n=112*8)))
    assert many.compile_training.measured


@pytest.mark.parametrize('factor, what', [(1.5, 'loss'), (None, 'gradient of 0.weight')])
def test_wrong_numbers_are_a_note(has, fake, monkeypatch, factor, what):
    has()
    def _compile(model, args, kwargs, freeze):
        def _forward(x):
            if factor: return type(model).forward(model, x)*factor
            return model[1:](model[0](x).detach())  # no gradient of the first layer
        return _forward, _forward(*args)
    monkeypatch.setattr(compiled_forward, '_compile', _compile)
    row, = [r for r in to_fastest(learner(shake(convnet()))).format_timings.rows if r.compiled]
    assert row.note == f'numbers differ when compiled ({what})' and not row.valid


def test_what_cannot_be_compiled_is_a_note(has, fake):
    has()
    learn = to_fastest(learner(Breaks()))
    row, = [r for r in learn.format_timings.rows if r.compiled]
    assert row.note.startswith(f'not compiled: {REFUSED}') and not row.valid and not learn._grab_cbs(CompileTraining)


def test_the_users_own_callback_stays(has, fake, uncompiled):
    has()
    learn = learner(cbs=CompileTraining())
    with learn.no_bar(): learn.to_fastest(num_it=2, layers=False)
    assert len(learn._grab_cbs(CompileTraining)) == 1


def test_really_compiled(has, compilations, monkeypatch):
    "With the compiler. Fitting uses the code that was measured."
    has()
    real = train_benchmark.step_ms
    monkeypatch.setattr(train_benchmark, 'step_ms', lambda learn, b: (real(learn, b), 1e5 - 9e4*bool(learn._grab_cbs(CompileTraining)))[1])
    learn = to_fastest(learner(shake(convnet())))
    assert len(compilations) == 2 and learn.compile_training.measured
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(compilations) == 2 and learn.compile_training.compiled == 1 and not learn.compile_training._codes[0].misses


def test_a_cpu_with_avx512(monkeypatch, compilations):
    "✗ Its kernels compute some padded 3-D convolutions wrongly, but no 2-D ones in fp32."
    monkeypatch.setattr(torch.cpu, '_is_avx512_supported', lambda: True)
    assert trained([CompileTraining()]).compile_training.compiled == 1


def test_copies_made_in_a_batch_are_independent(uncompiled):
    "✗ They kept the patched forward, which computes with the original's weights."
    copies = []
    class Copy(Callback):
        def before_backward(self): copies.append(deepcopy(self.learn.model))
        def after_batch(self): copies.append(deepcopy(self.learn.model))
    trained([CompileTraining(), Copy()])
    assert not any('forward' in vars(m) for c in copies for m in c.modules())


def test_two_callbacks(uncompiled):
    "✗ The first one's patch was undone last, and stayed."
    learn = trained([CompileTraining(), CompileTraining()])
    assert 'forward' not in vars(learn.model)


def test_eager_stance(uncompiled):
    with torch.compiler.set_stance('force_eager'): learn = trained([CompileTraining()])
    assert uncompiled == [] and not learn.compile_training.reason
