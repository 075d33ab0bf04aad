"Learners whose step needs one of the user's callbacks, or training mode."
import random

import numpy as np
import pytest
import torch
from fastai.callback.rnn import RNNCallback, RNNRegularizer
from fastai.vision.all import (Callback, CSVLogger, CutMix, DataLoader, DataLoaders, EarlyStoppingCallback, GatherPredsCallback, GradientClip,
                               Learner, MixUp, NonNativeMixedPrecision, ParamScheduler, ProgressCallback, Recorder, ReduceLROnPlateau,
                               SaveModelCallback, ShowGraphCallback, TerminateOnNaNCallback)
from fastai.vision.gan import GANLearner, basic_critic, basic_generator
from torch import nn

from channelslast.learner.step_callbacks import changes_step
from .conftest import convnet, learner, loaders


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()
    def forward(self, x): return self.net(x), x.mean()


def assigns(self): self.learn.pred = self.pred[0]

class DropOutput(Callback):
    def after_pred(self): self.learn.pred = self.pred[0]

class ByAnotherName(Callback):
    def after_pred(self):
        learn = self.learn
        learn.pred, self.kept = self.pred

class InAMethod(Callback):
    def after_pred(self): self._pick(0)
    def _pick(self, i): setattr(self.learn, 'pred', self.pred[i])

class Inherits(DropOutput): pass

class WithState(DropOutput):
    "Has a counter, random generators, tensors and a module."
    def __init__(self):
        self.n, self.seen, self.mean, self.net = 0, [], torch.zeros(1), nn.Linear(1, 1)
        self.rng, self.np_rng, self.generator = random.Random(0), np.random.default_rng(0), torch.Generator().manual_seed(0)
    def after_pred(self):
        super().after_pred()
        self.n += 1; self.seen.append(self.n); self.mean.add_(1)
        self.rng.random(); self.np_rng.random(); torch.rand(1, generator=self.generator)
        with torch.no_grad(): self.net.weight.add_(1)

CHANGE = [DropOutput, ByAnotherName, InAMethod, Inherits, WithState, lambda: Callback(after_pred=assigns)]


class Logs(Callback):
    "A callback that only logs; it is left out."
    def __init__(self): self.loss, self.calls = None, []
    def before_batch(self): self.calls.append('batch')
    def after_loss(self): self.loss = self.learn.loss; self.x = self.y = self.pred
    def after_batch(self): self.calls.append(self.learn.loss)
    def after_epoch(self): self.calls.append('epoch')


def state_of(cb):
    "Everything that a `WithState` holds, by value."
    return (cb.n, [*cb.seen], cb.mean.clone(), cb.rng.getstate(), str(cb.np_rng.bit_generator.state), cb.generator.get_state().tolist(),
            cb.net.weight.detach().clone(), cb.net.weight.data_ptr())


@pytest.mark.parametrize('make', CHANGE)
def test_a_callback_that_picks_an_output_takes_part(has, make):
    "✗ Without the callback, the loss gets two outputs and fails."
    has('bf16')
    learn = learner(TwoOutputs(), cbs=[make(), logs := Logs()]).to_channelslast(amp_mode='bf16')
    assert learn.format_summary().counts[False][1]
    t = learn.format_find(num_it=1, show_plot=False)
    assert all(r.valid for r in t.rows) and len(t.rows) >= 4
    assert all(r.valid for r in learn.format_find(num_it=1, show_plot=False, train=False).rows)
    assert logs.calls == []
    learn.to_fastest(num_it=1).fit(1)
    assert logs.calls


def test_its_state_is_restored(has):
    has('bf16')
    learn = learner(TwoOutputs(), cbs=(cb := WithState()))
    learn.fit(1)
    before = state_of(cb)
    learn.format_summary(), learn.format_find(num_it=1, show_plot=False), learn.format_find(num_it=1, show_plot=False, train=False)
    for a, b in zip(before, state_of(cb)): assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize('cb, does', [
    (DropOutput(), True), (Callback(after_pred=assigns), True), (Logs(), False), (Callback(), False), (MixUp(), True), (CutMix(), True),
    (RNNCallback(), True), (RNNRegularizer(), True), (CSVLogger(), False), (SaveModelCallback(), False), (EarlyStoppingCallback(), False),
    (Recorder(), False), (ShowGraphCallback(), False), (ProgressCallback(), False), (ParamScheduler({}), False), (GradientClip(), False),
    (TerminateOnNaNCallback(), False), (ReduceLROnPlateau(), False), (NonNativeMixedPrecision(), False), (GatherPredsCallback(), False)])
def test_which(cb, does): assert changes_step(cb) == does


class SetsOnTheModel(Callback):
    "Its code does not show that the model needs it."
    def before_batch(self): self.model.scale = 2.


class NeedsScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()
    def forward(self, x):
        try: return self.net(x)*self.scale
        finally: vars(self).pop('scale', None)


@pytest.mark.parametrize('call', ['format_summary', 'format_find', 'to_fastest'])
def test_a_callback_left_out_is_named_where_the_step_fails(call):
    learn = learner(NeedsScale(), cbs=[SetsOnTheModel(), Logs()])
    learn.fit(1)
    with pytest.raises(AttributeError, match='scale') as e: getattr(learn, call)()
    notes = ' '.join(getattr(e.value, '__notes__', e.value.args))
    assert '`SetsOnTheModel`, `Logs`' in notes and 'Recorder' not in notes


# models that compute their own loss

class Detector(nn.Module):
    "Takes targets and returns a dictionary of losses in training mode, a list of detections in eval mode."
    def __init__(self, dropout=0.):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 4)
    def forward(self, images, targets):
        out = self.head(self.body(torch.stack(list(images))).mean((2, 3)))
        if not self.training: return [dict(boxes=o) for o in out]
        return dict(boxes=(out - targets).square().mean(), labels=out.mean())


def detector(dropout=0.):
    dl = DataLoader([(torch.randn(3, 8, 8), torch.randn(4), 0) for _ in range(16)], bs=8)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 2
    return Learner(dls, Detector(dropout), lambda losses, *yb: sum(losses.values()))


@pytest.mark.parametrize('dropout', [0., 0.5])
def test_a_detector_is_compared_in_training_mode(has, dropout):
    "✗ In eval mode it returns no loss: `'list' object has no attribute 'values'`."
    has('bf16')
    learn = detector(dropout)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    t = learn.format_find(num_it=1, show_plot=False)
    assert all(r.valid and r.grad_diff < 0.1 for r in t.rows) and t.rows[0].grad_diff == 0.
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    assert learn.to_channelslast().format_summary().counts[False][1]


def test_torchvisions_detector(has):
    "Takes a list of images and a list of dictionaries of targets."
    import torchvision
    has()
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    def _sample(): return torch.rand(3, 64, 64), dict(boxes=torch.tensor([[4., 4., 40., 40.]]), labels=torch.tensor([1]))
    def _collate(b): return [o[0] for o in b], [o[1] for o in b], torch.zeros(len(b))
    dl = torch.utils.data.DataLoader([_sample() for _ in range(4)], batch_size=2, collate_fn=_collate)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 2
    learn = Learner(dls, model, lambda losses, y: sum(losses.values()))
    t = learn.format_find(num_it=1, show_plot=False)
    assert all(r.valid for r in t.rows), t
    summary = learn.to_channelslast(to_fp16=False).format_summary()
    assert summary.counts[False][1] and summary.counts[True][1]


class RefusesEval(nn.Module):
    "Like cuDNN's recurrent layers, whose backward pass works in training mode only."
    def __init__(self):
        super().__init__()
        self.net = convnet()
    def forward(self, x):
        if not self.training and torch.is_grad_enabled(): raise RuntimeError('cudnn RNN backward can only be called in training mode')
        return self.net(x)


def test_a_model_without_gradients_in_eval_mode(has):
    has('bf16')
    assert all(r.valid for r in learner(RefusesEval()).format_find(num_it=1, show_plot=False).rows)


# GANs, self-supervised views, recurrent models

def gan(gen_first=False, **kwargs):
    dl = DataLoader([(torch.randn(16), torch.randn(3, 16, 16)) for _ in range(16)], bs=8)
    return GANLearner.wgan(DataLoaders(dl, dl), basic_generator(16, 3, in_sz=16), basic_critic(16, 3), **kwargs)


@pytest.mark.parametrize('fitted', [False, True])
def test_a_gan(has, fitted):
    "Its trainer swaps inputs and targets, and its switcher alternates between generator and critic."
    has('bf16')
    learn = gan()
    if fitted: learn.fit(1, 1e-4)
    else: learn.create_opt()
    needs, gen_mode = [p.requires_grad for p in learn.model.parameters()], learn.model.gen_mode
    for _ in range(2):
        t = learn.format_find(num_it=1, show_plot=False)
        assert all(r.ms for r in t.rows) and t.best.valid, t
        assert learn.format_summary()
        learn.to_channelslast(to_fp16=False)
    assert needs == [p.requires_grad for p in learn.model.parameters()] and gen_mode == learn.model.gen_mode
    learn.fit(1, 1e-4)


class Views(Callback):
    "Two augmented views of each image, as in self-supervised learning."
    def before_batch(self): self.learn.xb, self.learn.yb = (torch.cat([self.x, self.x.flip(-1)]),), (torch.cat([self.y, self.y]),)


def test_views(has):
    has('bf16')
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convnet()
        def forward(self, x):
            assert len(x) == 16, 'two views'
            return self.net(x)
    learn = learner(Doubles(), cbs=Views())
    assert all(r.valid for r in learn.format_find(num_it=1, show_plot=False).rows)
    assert learn.to_channelslast(to_fp16=False).format_summary().holds


def test_mixup_goes_on(has):
    "Its loss function is restored, and training continues."
    has('bf16')
    learn = learner(cbs=MixUp(0.4))
    loss = learn.loss_func
    t = learn.format_find(num_it=1, show_plot=False)
    assert all(r.valid for r in t.rows), t
    learn.to_channelslast(to_fp16=False).format_summary()
    assert learn.loss_func is loss
    learn.fit(1)
