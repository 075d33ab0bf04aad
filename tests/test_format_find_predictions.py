"`format_find(train=False)` and `to_fastest(train=False)`, mostly with fake times."
import pickle
import sys
import warnings

import pytest
import torch
from fastai.vision.all import Callback, DataLoader, DataLoaders, Learner, MixedPrecision, ProgressCallback, load_learner
from fastprogress.fastprogress import ProgressBar
from matplotlib import pyplot as plt
from pytest import approx
from torch import nn

from channelslast import ChannelsLast, CompilePredictions, FoldBatchNorm
from .helpers import (Bomb, Fails, WrongInChannelsLast, convnet, difference, find, image_folder, learner, learner_state, loaders,
                      rows_of, shake)

PLAIN = ['contiguous, fp32', 'channels last, fp32']
HALF = ['contiguous, fp32', 'contiguous, bf16', 'channels last, fp32', 'channels last, bf16']


def folded(names): return [f'{o}, folded' for o in names]
def predict(learn=None, **kwargs): return find(learn or learner(shake(convnet())), train=False, **kwargs)


# what is measured

@pytest.mark.parametrize('fast, names', [((), PLAIN), (('bf16',), HALF)])
def test_predictions_are_measured_in_each_setting_unfolded_and_folded(has, fake_steps, fast, names):
    "All give the numbers of contiguous fp32."
    has(*fast); fake_steps({})
    t = predict()
    assert [*rows_of(t)] == names + folded(names) and not t.train
    assert t.rows[0].pred_diff == 0 and all(r.valid and r.loss_diff is None and r.grad_diff is None for r in t.rows)
    assert all(0 < r.pred_diff < 1e-5 if r.precision == 'fp32' else 1e-4 < r.pred_diff < 5e-2 for r in t.rows[1:])
    assert t.optimizer_ms is None and t.best is t.rows[0]


def test_predictions_are_made_in_eval_mode_without_gradients():
    seen = []
    class Look(nn.Module):
        def forward(self, x): seen.append((self.training, torch.is_grad_enabled(), len(x))); return x
    class Step(Callback):
        def before_batch(self): seen.append((self.learn.training, torch.is_grad_enabled(), 8)); self.learn.xb = self.xb
    predict(learner(nn.Sequential(Look(), convnet()), cbs=Step()), num_it=1)
    assert {*seen} == {(False, False, 8), (False, False, 4)}  # numbers are compared on four items


def test_candidates_that_are_far_behind_are_not_folded(has, fake_steps):
    has('bf16'); fake_steps({'channels last, bf16': 300., 'contiguous, bf16': 160.})
    assert [k for k in rows_of(predict()) if 'folded' in k] == folded(PLAIN)


def test_a_model_without_batch_norms_has_no_folded_candidate(fake_steps):
    fake_steps({})
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert [*rows_of(predict(learner(plain)))] == PLAIN


def test_a_machine_that_slows_down_before_batch_norms_are_folded_favors_no_candidate(fake_steps):
    "Only steps of the same rounds are compared."
    def _ms(setting, n): return (80. if setting == 'channels last, fp32, folded' else 100.)*(1 if any('folded' in o for o in fake_steps.settings) else 0.5)
    fake_steps(_ms)
    t = predict()
    assert t.best is rows_of(t)['channels last, fp32, folded'] and [r.ms for r in t.rows] == approx([100, 100, 100, 80])


def test_the_preparation_of_folded_weights_is_not_timed(fake_steps):
    "Weights are prepared again in the first batch after the format has changed, which is not a step."
    prepared, visit = {}, [0]
    def _ms(setting, n):
        before = fake_steps.settings[-2:-1]
        if before and ('last' in before[0]) != ('last' in setting): visit[0] += 1
        if 'folded' not in setting: return 100.
        first, prepared[setting] = prepared.get(setting) != visit[0], visit[0]
        return 500. if first else 50.
    fake_steps(_ms)
    rows = rows_of(predict(num_it=5))
    assert [(rows[o].ms, rows[o].doubt) for o in folded(PLAIN)] == [(approx(50.), approx(0., abs=1e-9))]*2


def test_batches_come_from_dl_or_from_the_validation_loader(fake_steps):
    seen = []
    class Look(nn.Module):
        def forward(self, x): seen.append(len(x)); return x
    fake_steps({})
    learn = learner(nn.Sequential(Look(), convnet()))
    learn.dls.train.bs = 5
    predict(learn, dl=loaders(n=8, bs=3).valid, num_it=1)
    assert {*seen} == {3}
    seen.clear()
    predict(learn, num_it=1)
    assert {*seen} == {8, 4}  # numbers are compared on four items


def test_a_smaller_last_batch_is_left_out():
    "It would always be the fastest."
    seen = []
    class Look(nn.Module):
        def forward(self, x): seen.append(len(x)); return x
    predict(learner(nn.Sequential(Look(), convnet()), loaders(n=13, bs=5)), num_it=4)
    assert {*seen} == {5, 4}  # numbers are compared on four items


@pytest.mark.parametrize('train', [True, False])
def test_the_progress_bar_counts_all_passes_and_ends_with_the_last_one(fake_steps, monkeypatch, train):
    seen = []
    fake_steps({})
    update = ProgressBar.update
    monkeypatch.setattr(ProgressBar, 'update', lambda self, n: (seen.append((n, self.total, len(fake_steps.settings))), update(self, n)))
    find(learner(shake(convnet()), cbs=ProgressCallback()), train=train, num_it=2)
    values, totals, passes = zip(*seen)
    assert len({*totals}) == 1 and [*values] == sorted(values) and values[-1] == totals[0] and max(values[:-1]) < totals[0]
    assert max(b - a for a, b in zip(passes, passes[1:])) <= 4  # it never stands still


def test_on_a_gpu_predictions_are_measured_too(fake_steps, gpu):
    fake_steps({'channels last, fp32, folded': 50.})
    t = predict(gpu().learner(shake(convnet())))
    assert [*rows_of(t)] == PLAIN + folded(PLAIN) and all(r.valid and r.memory is not None for r in t.rows)
    assert t.best is t.rows[3] and [r.ms for r in t.rows] == approx([100., 100., 100., 50.])


# numbers

@pytest.mark.parametrize('outputs', [lambda x: (x, x*2), lambda x: dict(a=x, b=[x + 1]), lambda x: x[..., None, None].expand(-1, -1, 5, 5)],
                         ids=['tuple', 'dict', 'expanded'])
def test_outputs_of_any_kind_are_compared(fake_steps, outputs):
    class Nested(nn.Module):
        def __init__(self): super().__init__(); self.net = shake(convnet())
        def forward(self, x): return outputs(self.net(x))
    fake_steps({})
    t = predict(Learner(loaders(), Nested(), lambda p, y, **kw: torch.zeros(())))
    assert len(t.rows) == 4 and all(r.valid and r.pred_diff < 1e-5 for r in t.rows)


def test_predictions_with_wrong_numbers_are_never_chosen(fake_steps):
    fake_steps({'channels last, fp32': 1., 'channels last, fp32, folded': 1.})
    t = predict(learner(nn.Sequential(nn.Conv2d(3, 8, 3), WrongInChannelsLast(), shake(convnet(8)))))
    assert not t.rows[1].valid and 'numbers differ' in t.rows[1].note and t.rows[1].pred_diff > 0.01 and t.best.memory_format == 'contiguous'


@pytest.mark.parametrize('right', [0, 3, 1000])
def test_folded_predictions_with_wrong_numbers_are_never_chosen(fake_steps, right):
    "The convolution is right with its own weights, and with others only in its first few calls."
    conv, calls = nn.Conv2d(3, 8, 3), []
    own, real = conv.weight, conv._conv_forward
    def _conv_forward(x, weight, bias):
        out = real(x, weight, bias)
        if weight.data_ptr() == own.data_ptr(): return out
        calls.append(1)
        return out if len(calls) <= right else out*2
    conv._conv_forward = _conv_forward
    fake_steps({o: 10. for o in folded(PLAIN)})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # `FoldBatchNorm` says so if it finds the fault itself
        t = predict(learner(shake(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))))
    assert calls and t.best.folded == (right == 1000) and all(r.valid for r in t.rows if not r.folded or right == 1000)
    if right == 3: assert any('numbers differ from contiguous fp32' in r.note for r in t.rows)


@pytest.mark.parametrize('error', [RuntimeError('boom'), torch.OutOfMemoryError('out of memory')])
def test_predictions_that_fail_in_bf16_are_rows_that_are_not_valid(has, fake_steps, error):
    has('bf16'); fake_steps({'channels last, fp32': 50.})
    t = predict(learner(nn.Sequential(nn.Conv2d(3, 4, 3), Fails(error, lambda x: x.dtype == torch.bfloat16), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert [k for k, r in rows_of(t).items() if not r.valid] == ['contiguous, bf16', 'channels last, bf16']
    assert str(error) in t.rows[1].note and t.best is rows_of(t)['channels last, fp32']


FAILURES = [(k, error) for k in range(1, 30) for error in (RuntimeError, KeyboardInterrupt)]
FAST = [(1, RuntimeError), (3, KeyboardInterrupt), (6, RuntimeError), (8, KeyboardInterrupt), (11, RuntimeError), (16, KeyboardInterrupt)]


@pytest.mark.parametrize('k, error', [pytest.param(*o, marks=() if o in FAST else pytest.mark.slow) for o in FAILURES])
def test_predictions_that_fail_in_any_pass_leave_the_learner_as_it_was(fake_steps, k, error):
    fake_steps({})
    learn = learner(Bomb(), loaders(shuffle=True))
    learn.fit(1)
    if k % 3 == 0: learn.to_channelslast(to_fp16=False)
    if k % 3 == 1: learn.add_cb(FoldBatchNorm())
    learn.model.arm(k, error)
    before, raised = learner_state(learn), False
    try: predict(learn)
    except error: raised = True
    assert difference(before, learner_state(learn)) == ''
    assert raised or error is RuntimeError or learn.model.passes.n < k
    learn.model.arm(0)
    learn.fit(1)


def test_the_result_of_predictions_prints_renders_and_plots(fake_steps):
    fake_steps({'channels last, fp32, folded': 50.})
    t = predict()
    assert 'ms/batch' in repr(t) and 'pred diff' in repr(t) and 'grad diff' not in repr(t) and 'batch norm' in repr(t) and 'folded' in repr(t)
    assert 'Use channels last in fp32 with batch norms folded: 2.00× as fast as contiguous fp32' in t.verdict
    assert t.plot().get_xlabel().startswith('speedup of predictions') and plt.gca().get_title() == 'Suggested: channels last, fp32, folded'
    assert pickle.loads(pickle.dumps(t))['best']['folded']
    plt.close('all')


def test_a_loader_slower_than_the_predictions_is_said(clock, fake_steps):
    class Slow:
        def __len__(self): return 32
        def __getitem__(self, i): clock.pass_ms(5.); return torch.randn(3, 8, 8), torch.tensor(i % 4)
    fake_steps(lambda setting, n: 2.)
    t = predict(learner(dls=DataLoaders(*[DataLoader(Slow(), bs=8)]*2)), num_it=1, formats='contiguous')
    assert 'Predictions are limited by data loading: 40.0 ms to load a batch, 2.0 ms to predict it. Speed up the DataLoader first.' in t.verdict


# to_fastest

WINS = ['contiguous, fp32', 'contiguous, fp32, folded', 'channels last, fp32, folded', 'channels last, bf16, folded', 'channels last, fp32']

@pytest.mark.parametrize('win', [pytest.param(o, marks=pytest.mark.slow if o == WINS[2] else ()) for o in WINS])
def test_to_fastest_for_predictions_switches_to_the_fastest_setting_and_training_undoes_it(has, fake_steps, capsys, win):
    has('bf16'); fake_steps({win: 10.})
    learn = learner(shake(convnet()))
    expected = learn.get_preds()[0]
    for again in False, True:
        assert learn.to_fastest(train=False, num_it=3, layers=False) is learn
        assert bool(learn._grab_cbs(ChannelsLast)) == ('last' in win) and bool(learn._grab_cbs(MixedPrecision)) == ('bf16' in win)
        assert len(learn._grab_cbs(FoldBatchNorm)) == ('folded' in win)
        why = 'nothing else was more than 2% faster' if win == WINS[0] else '10.00× as fast as contiguous fp32'
        stay = 'stay ' if again or win == WINS[0] else ''
        assert f'Predictions {stay}in {win}: {why}.' in capsys.readouterr().out.splitlines()
    torch.testing.assert_close(learn.get_preds()[0], expected, rtol=1e-1 if 'bf16' in win else 1e-4, atol=1e-2 if 'bf16' in win else 1e-5)
    if 'folded' in win: assert learn.fold_batch_norm.folded == learn.fold_batch_norm.found == 1
    learn.to_contiguous(to_fp32=False).to_fastest(num_it=1, layers=False)
    assert not learn._grab_cbs(FoldBatchNorm) and capsys.readouterr().out.startswith('Training ')
    learn.fit(1)


def test_to_fastest_for_training_keeps_a_fold_batch_norm_that_the_user_added(fake_steps):
    fake_steps({})
    learn = learner(cbs=FoldBatchNorm()).to_fastest(num_it=1, layers=False)
    assert len(learn._grab_cbs(FoldBatchNorm)) == 1


def test_an_app_that_loads_an_export_measures_on_files_and_predicts(tmp_path, capsys):
    dls = image_folder(tmp_path)
    learn = Learner(dls, shake(convnet(n=2)), path=tmp_path)
    learn.fit(1)
    file = tmp_path/'data'/'a'/'0.png'
    expected = learn.predict(file)[2]
    learn.export('e.pkl')
    app = load_learner(tmp_path/'e.pkl')
    with pytest.raises(ValueError, match=r'holds no data.*dl=learn.dls.test_dl\(files, bs=1\)'): app.to_fastest(train=False)
    app.to_fastest(train=False, dl=app.dls.test_dl([file]*3, bs=1), num_it=3)
    torch.testing.assert_close(app.predict(file)[2], expected, rtol=1e-4, atol=1e-5)
    assert 'Predictions ' in capsys.readouterr().out


# OpenVINO and ONNX Runtime

NAMES = dict(openvino='OpenVINO', onnxruntime='ONNX Runtime')


@pytest.fixture
def compilers(monkeypatch):
    "`compilers('openvino')`: only these runtimes are installed, and `torch.compile` compiles nothing. Skips without them."
    def _only(*names):
        for o in names: pytest.importorskip(o, reason=f'{o} is not installed')
        for o in {*NAMES} - {*names}: monkeypatch.setitem(sys.modules, o, None)
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, backend=None, **kwargs: real(f, backend=backend, **kwargs))
    monkeypatch.setattr(torch._inductor, 'compile', lambda graph, inputs: graph)
    return _only


def small(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('modes, expected', [((), [('fp32', 'inductor'), ('fp32', 'openvino'), ('fp32', 'onnxruntime')]),
    (('bf16',), [('fp32', 'inductor'), ('fp32', 'openvino'), ('fp32', 'onnxruntime'), ('bf16', 'inductor'), ('bf16', 'openvino')])])
def test_each_installed_runtime_is_measured_and_the_learner_stays(has, fake_steps, compilers, modes, expected):
    "ONNX Runtime computes in fp32 only."
    compilers('openvino', 'onnxruntime'); has(*modes); fake_steps({})
    learn = learner(shake(small()))
    before = learner_state(learn)
    t = predict(learn, compile=True)
    rows = [r for r in t.rows if r.compiled]
    assert sorted((r.precision, r.compiled) for r in rows) == sorted(expected) and all(r.valid and r.compile_s is not None for r in rows)
    assert not any(r.folded for r in rows if r.compiled != 'inductor') and not t.best.compiled
    assert difference(before, learner_state(learn)) == '' and all(f'{o}, ' in repr(t) for _, o in expected)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', NAMES)
def test_to_fastest_predicts_with_the_runtime_that_was_measured(fake_steps, compilers, capsys, backend):
    compilers(backend); fake_steps({f'contiguous, fp32, {backend}': 10., f'channels last, fp32, {backend}': 10.})
    learn = learner(shake(small()), loaders(n=16))
    expected = learn.get_preds()[0]
    learn.to_fastest(train=False, compile=True, num_it=3)
    out = capsys.readouterr().out
    assert f'fp32, {NAMES[backend]}: 10.00× as fast as contiguous fp32.' in out and f"add_cb(CompilePredictions('{backend}'))" in out
    assert f'with {NAMES[backend]}: 10.00×' in learn.format_timings.verdict and learn.format_timings.best.compiled == backend
    assert f'The compilation by {backend} took ' in learn.format_timings.verdict
    torch.testing.assert_close(learn.get_preds()[0], expected)
    assert capsys.readouterr().out == ''  # nothing is converted again
    assert learn.compile_predictions.compiled and learn.compile_predictions.backend == backend
    assert not learn.to_contiguous(to_fp32=True)._grab_cbs(CompilePredictions)


class Sorts(nn.Module):
    "Neither runtime has this operation."
    def __init__(self): super().__init__(); self.net = small()
    def forward(self, x): return self.net(x) + torch.special.bessel_j0(x).mean()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', NAMES)
def test_a_model_that_a_runtime_cannot_convert_is_a_row_with_a_note(fake_steps, compilers, backend):
    compilers(backend); fake_steps({})
    t = predict(learner(Sorts()), compile=True, formats='contiguous')
    row, = [r for r in t.rows if r.compiled == backend]
    assert row.note.startswith('not compiled: ') and not row.valid and '\n' not in row.note and t.best.valid


@pytest.mark.parametrize('installed, kwargs, says', [
    ((), dict(), 'pip install openvino'), ((), dict(compile=True), 'pip install openvino'),
    (('openvino',), dict(), 'Not tried: OpenVINO. `compile=True` measures what is installed.'), (('openvino',), dict(compile=True), None)])
def test_the_verdict_says_once_how_to_measure_a_runtime(fake_steps, compilers, capsys, installed, kwargs, says):
    compilers(*installed); fake_steps({})
    learn = learner(small())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.to_fastest(train=False, num_it=1, **kwargs)
    texts = learn.format_timings.verdict, capsys.readouterr().out
    assert all(o.count(says) == 1 if says else 'Not tried' not in o and 'pip' not in o for o in texts)
    assert 'pip' not in find(learn).verdict  # training


@pytest.mark.filterwarnings('ignore')
def test_on_a_gpu_no_runtime_is_measured_or_recommended(gpu, fake_steps, compilers):
    fake_steps({})
    compilers()
    assert 'pip' not in gpu().learner(small()).format_find(train=False, num_it=1, show_plot=False).verdict
    compilers('openvino')
    learn = gpu().learner(small())
    t = learn.format_find(train=False, num_it=1, show_plot=False, compile=True)
    assert 'openvino' not in [r.compiled for r in t.rows] and 'Not tried: OpenVINO, for CPUs only.' in t.verdict
