"`format_find(train=False)` and `to_fastest(train=False)`, mostly with fake times."
import pickle
import sys

import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import Learner, load_learner
from torch import nn

from channelslast import ChannelsLast, FoldBatchNorm
from channelslast.find import predict_benchmark, train_benchmark
from channelslast.find.results import label
from channelslast.find.train_benchmark import load_batches
from tests.conftest import convnet, fake_steps, learner, loaders
from tests.test_channels_last import image_folder
from tests.test_format_find import Fails, WrongInChannelsLast, find
from tests.test_format_summary import same, state


@pytest.fixture
def fake(monkeypatch):
    "`fake(times)` replaces the measured milliseconds of each candidate's predictions, which are still made."
    def _name(learn):
        assert not learn.training and not learn.model.training and not torch.is_grad_enabled()
        mp = learn._grab_cbs(MixedPrecision)
        precision = mp[0].amp_mode.value if mp else 'fp32'
        if mp and mp[0].fp32_layers: precision += '+fp32'
        name = f"{'channels last' if learn._grab_cbs(ChannelsLast) else 'contiguous'}, {precision}"
        return f'{name}, folded' if learn._grab_cbs(FoldBatchNorm) else name
    return fake_steps(monkeypatch, _name, train_benchmark, predict_benchmark)


@pytest.fixture
def all_rounds(monkeypatch):
    "No candidate is eliminated, and all rounds run."
    monkeypatch.setattr(train_benchmark.selection, 'eliminated', lambda times: [])
    monkeypatch.setattr(train_benchmark.selection, 'should_stop', lambda decision, times: False)
    monkeypatch.setattr(train_benchmark.selection, 'FAR_FACTOR', 1e9)  # all are folded too, however busy the machine


def stirred(model):
    "Random running statistics and weights for batch norms: fresh ones would hide mistakes."
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        nn.init.normal_(m.running_mean); nn.init.uniform_(m.running_var, 0.5, 2); nn.init.uniform_(m.weight, 0.5, 2); nn.init.normal_(m.bias)
    return model


def predict(learn=None, **kw): return find(learn or learner(stirred(convnet())), train=False, **kw)


@pytest.mark.parametrize('fast, rows', [((), ['contiguous, fp32', 'channels last, fp32']),
                                        (('bf16',), ['contiguous, fp32', 'contiguous, bf16', 'channels last, fp32', 'channels last, bf16'])])
def test_candidates(has, fake, fast, rows):
    "Each candidate unfolded and folded; all give the numbers of contiguous fp32."
    has(*fast); fake({})
    t = predict()
    assert [label(r) for r in t.rows] == rows + [f'{o}, folded' for o in rows] and not t.train
    assert t.rows[0].pred_diff == 0 and all(r.valid and r.loss_diff is None for r in t.rows)
    assert all((0 < r.pred_diff < 1e-5) if r.precision == 'fp32' else (1e-4 < r.pred_diff < 5e-2) for r in t.rows[1:] if label(r) != rows[0])
    assert t.optimizer_ms is None and t.best is t.rows[0]


def test_what_is_far_behind_is_not_folded_too(has, fake):
    has('bf16'); fake({'channels last, bf16': 300., 'contiguous, bf16': 160.})
    assert [label(r) for r in predict().rows if r.folded] == ['contiguous, fp32, folded', 'channels last, fp32, folded']


def test_a_machine_that_slows_down_favours_nobody(has, fake):
    "Before batch norms were folded, it was twice as fast."
    class Times(dict):
        def get(self, k, default): return super().get(k, default)*(1 if any('folded' in o for o in fake.steps) else 0.5)
    has(); fake(Times({'channels last, fp32, folded': 80.}))
    t = predict()
    assert label(t.best) == 'channels last, fp32, folded' and [r.ms for r in t.rows] == [100, 100, 100, 80]


def test_folded_weights_are_prepared_when_the_format_changed(has, fake, all_rounds, monkeypatch):
    "Once per round, and never inside a timed step."
    ready = []
    has(); fake({})
    learn = learner(stirred(convnet()))
    real = predict_benchmark.step_ms
    def _ms(learn, batch):
        ready.extend(o.ready for o in learn._grab_cbs(FoldBatchNorm))
        return real(learn, batch)
    monkeypatch.setattr(predict_benchmark, 'step_ms', _ms)
    predict(learn, num_it=8)
    last = ['channels last' in o for o in fake.steps[8:]]  # after the warm-up, two rounds and the warm-up of folded candidates
    assert all(ready) and len(ready) == 18 and sum(a != b for a, b in zip(last, last[1:])) == 8


@pytest.mark.parametrize('train', [True, False])
def test_the_bar_ends_with_the_last_step(has, all_rounds, monkeypatch, train):
    class Bar:
        def __init__(self, gen, leave): self.total, self.seen = len(gen), []; bars.append(self)
        def update(self, n): self.seen.append(n)
        def on_iter_end(self): pass
    bars = []
    monkeypatch.setattr(sys.modules['channelslast.find.format_find'], 'progress_bar', Bar)
    has()
    learn = learner(stirred(convnet()))
    learn.progress = None  # so that it has one
    find(learn, train=train)
    # it stays there for steps with the Learner's own optimizer, if a fused one is raced
    assert [*dict.fromkeys(bars[0].seen)] == [*range(bars[0].total + 1)] and bars[0].seen == sorted(bars[0].seen)


def test_nothing_to_fold_is_no_candidate(has, fake):
    has(); fake({})
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert not any(r.folded for r in predict(learner(plain)).rows)


def test_batches_are_those_of_dl(fake):
    "Without `dl`, they come from the validation loader."
    seen = []
    class Look(nn.Module):
        def forward(self, x): seen.append(len(x)); return x
    fake({})
    learn = learner(nn.Sequential(Look(), convnet()))
    predict(learn, dl=learn.dls.test_dl([(torch.randn(3, 8, 8), 1)]*6, bs=3) if hasattr(learn.dls, 'test_dl') else loaders(bs=3).valid)
    assert {*seen} <= {3, 2}
    seen.clear()
    predict(learn)
    assert {*seen} == {8}


@pytest.mark.parametrize('outputs', [lambda x: (x, x*2), lambda x: dict(a=x, b=[x + 1]), lambda x: x[..., None, None].expand(-1, -1, 5, 5)])
def test_outputs_of_any_kind(has, fake, outputs):
    has(); fake({})
    class Nested(nn.Module):
        def __init__(self): super().__init__(); self.net = stirred(convnet())
        def forward(self, x): return outputs(self.net(x))
    t = predict(Learner(loaders(), Nested(), lambda p, y, **kw: torch.zeros(())))
    assert len(t.rows) == 4 and all(r.valid and r.pred_diff < 1e-5 for r in t.rows)


def test_wrong_numbers_are_never_suggested(has, fake):
    has(); fake({'channels last, fp32': 1., 'channels last, fp32, folded': 1.})
    t = predict(learner(nn.Sequential(nn.Conv2d(3, 8, 3), WrongInChannelsLast(), stirred(convnet(8)))))
    assert not t.rows[1].valid and 'numbers differ' in t.rows[1].note and t.best.memory_format == 'contiguous'


@pytest.mark.parametrize('error', [RuntimeError('boom'), torch.OutOfMemoryError('out of memory')])
def test_a_candidate_that_fails_is_a_row(has, fake, error):
    has('bf16'); fake({'channels last, fp32': 50.})
    t = predict(learner(nn.Sequential(nn.Conv2d(3, 4, 3), Fails(error, lambda x: x.dtype == torch.bfloat16), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert [label(r) for r in t.rows if not r.valid] == ['contiguous, bf16', 'channels last, bf16'] and label(t.best) == 'channels last, fp32'


class Bomb(nn.Module):
    def __init__(self): super().__init__(); self.net, self.k, self.n, self.error = convnet(), 0, [0], None
    def forward(self, x):
        self.n[0] += 1
        if self.n[0] == self.k: raise self.error('boom')
        return self.net(x)


@pytest.mark.parametrize('k', [*range(1, 30, 2), 200])
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_everything_is_as_it_was(has, fake, k, error):
    "Also after an error or an interrupt."
    has(); fake({})
    learn = learner(Bomb(), loaders(shuffle=True))
    learn.fit(1)
    if k % 3 == 0: learn.to_channelslast(to_fp16=False)
    if k % 3 == 1: learn.add_cb(FoldBatchNorm())
    learn.model.k, learn.model.n[0], learn.model.error = k, 0, error
    before = state(learn)
    try: predict(learn)
    except error: pass
    for a, b in zip(before, state(learn)): assert same(a, b)
    learn.model.k = 0
    learn.fit(1)


def test_it_prints_renders_and_plots(has, fake):
    has(); fake({'channels last, fp32, folded': 50.})
    t = predict()
    assert 'ms/batch' in repr(t) and 'pred diff' in repr(t) and 'grad diff' not in repr(t) and 'folded' in repr(t)
    assert 'Use channels last in fp32 with batch norms folded: 2.00× as fast as contiguous fp32' in t.verdict
    assert t.plot().get_xlabel().startswith('speedup of predictions')
    assert pickle.loads(pickle.dumps(t))['best']['folded']


# to_fastest

@pytest.mark.parametrize('win', ['contiguous, fp32', 'contiguous, fp32, folded', 'channels last, fp32, folded', 'channels last, bf16, folded', 'channels last, fp32'])
def test_to_fastest_applies_the_winner_and_training_undoes_it(has, fake, capsys, win):
    has('bf16'); fake({win: 10.})
    learn = learner(stirred(convnet()))
    expected = learn.get_preds()[0]
    for _ in range(2):
        assert learn.to_fastest(train=False, num_it=4) is learn
        assert bool(learn._grab_cbs(ChannelsLast)) == ('last' in win) and bool(learn._grab_cbs(MixedPrecision)) == ('bf16' in win)
        assert len(learn._grab_cbs(FoldBatchNorm)) == ('folded' in win)
        said = capsys.readouterr().out.strip().splitlines()[-1]
        assert said.startswith(f'Predictions in {win}: ') and said.endswith('× as fast as contiguous fp32.')
    torch.testing.assert_close(learn.get_preds()[0], expected, rtol=1e-1 if 'bf16' in win else 1e-4, atol=1e-2 if 'bf16' in win else 1e-5)
    if 'folded' in win: assert learn.fold_batch_norm.folded == learn.fold_batch_norm.found == 1
    with pytest.MonkeyPatch.context() as mp:
        def _ms(learn, batch):
            learn.one_batch(0, batch)
            return 100.
        mp.setattr(train_benchmark, 'step_ms', _ms)
        learn.to_contiguous(to_fp32=False).to_fastest(num_it=3)
    assert not learn._grab_cbs(FoldBatchNorm) and capsys.readouterr().out.strip().splitlines()[-1].startswith('Training in ')
    learn.fit(1)


def test_the_users_own_callback_stays_in_training(has, fake):
    has()
    learn = learner(cbs=FoldBatchNorm())
    learn.to_fastest(num_it=3, layers=False)
    assert len(learn._grab_cbs(FoldBatchNorm)) == 1


def test_batches_of_one_shape():
    "A smaller last batch would always be the fastest."
    learn = learner(dls=loaders(n=20))
    batches, _ = load_batches(learn, learn.dls.valid)
    assert [len(x) for x, _ in batches] == [8, 8]


def test_an_app(has, tmp_path, capsys):
    "Export, load, measure on single files, predict."
    has()
    dls = image_folder(tmp_path)
    learn = Learner(dls, stirred(convnet(n=2)), path=tmp_path)
    learn.fit(1)
    file = tmp_path/'data'/'a'/'0.png'
    expected = learn.predict(file)[2]
    learn.export('e.pkl')
    app = load_learner(tmp_path/'e.pkl')
    with pytest.raises(ValueError, match=r'holds no data.*dl=learn.dls.test_dl\(files, bs=1\)'): app.to_fastest(train=False)
    app.to_fastest(train=False, dl=app.dls.test_dl([file]*3, bs=1), num_it=4)
    torch.testing.assert_close(app.predict(file)[2], expected, rtol=1e-4, atol=1e-5)
    assert 'Predictions in ' in capsys.readouterr().out


@pytest.mark.parametrize('kw, match', [(dict(train=None), 'train=None: use True or False'), (dict(dl=[1]), 'only with `train=False`'),
                                       (dict(train=False, dl=3), 'dl=3: use a DataLoader'), (dict(train=False, dl=[]), 'yields no batch')])
@pytest.mark.parametrize('call', ['format_find', 'to_fastest'])
def test_wrong_arguments(kw, match, call):
    learn = learner()
    before = state(learn)
    with pytest.raises(ValueError, match=match): getattr(learn, call)(**kw)
    for a, b in zip(before, state(learn)): assert same(a, b)
