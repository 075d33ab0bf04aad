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
from .helpers import convnet, difference, find, learner, learner_state


@pytest.fixture(autouse=True)
def equal_times(fake_steps):
    "All steps take equally long: otherwise a CPU that emulates bf16 slowly would drop it before its numbers are compared."
    fake_steps({})


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
    def _pick(self, i): setattr(self.learn, 'pred', self.pred[i])  # noqa: B010

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


@pytest.mark.parametrize('make', [pytest.param(o, marks=pytest.mark.slow if o is Inherits else ()) for o in CHANGE])
def test_a_callback_that_sets_the_prediction_takes_part_and_one_that_logs_does_not(make):
    "Without the first one, the loss gets two outputs and fails."
    learn = learner(TwoOutputs(), cbs=[make(), logs := Logs()]).to_channelslast(to_fp16=False)
    assert learn.format_summary().counts[False][1]
    assert all(r.valid for train in (True, False) for r in find(learn, num_it=1, train=train).rows)
    assert logs.calls == []
    learn.to_fastest(num_it=1, layers=False).fit(1)
    assert logs.calls


@pytest.mark.parametrize('call', [lambda o: o.format_summary(), lambda o: find(o, num_it=1), lambda o: find(o, num_it=1, train=False)],
                         ids=['format_summary', 'training', 'predictions'])
def test_the_state_of_a_callback_that_takes_part_is_restored(call):
    learn = learner(TwoOutputs(), cbs=(cb := WithState()))
    learn.fit(1)
    def _state(): return learner_state(learn), cb.net.weight.data_ptr(), cb.net.weight.detach().clone(), cb.generator.get_state()
    before = _state()
    call(learn)
    assert difference(before, _state()) == ''


@pytest.mark.parametrize('cb, does', [
    (DropOutput(), True), (Callback(after_pred=assigns), True), (Logs(), False), (Callback(), False), (MixUp(), True), (CutMix(), True),
    (RNNCallback(), True), (RNNRegularizer(), True), (CSVLogger(), False), (SaveModelCallback(), False), (EarlyStoppingCallback(), False),
    (Recorder(), False), (ShowGraphCallback(), False), (ProgressCallback(), False), (ParamScheduler({}), False), (GradientClip(), False),
    (TerminateOnNaNCallback(), False), (ReduceLROnPlateau(), False), (NonNativeMixedPrecision(), False), (GatherPredsCallback(), False)])
def test_changes_step_is_true_for_callbacks_that_set_batch_prediction_or_loss(cb, does): assert changes_step(cb) == does


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
def test_an_error_of_a_step_names_the_users_callbacks_that_were_left_out(call):
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
def test_a_detector_is_compared_in_training_mode_and_keeps_its_running_statistics(has, dropout):
    "In eval mode it returns detections instead of a loss."
    has('bf16')
    learn = detector(dropout)
    before = learner_state(learn)
    t = find(learn, num_it=1)
    assert all(r.valid and r.grad_diff < 0.1 for r in t.rows) and t.rows[0].grad_diff == 0.
    assert difference(before, learner_state(learn)) == ''
    assert learn.to_channelslast().format_summary().counts[False][1]


@pytest.mark.slow
def test_torchvisions_detector_is_measured_and_summarized():
    "It takes a list of images and a list of dictionaries of targets."
    import torchvision
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    def _sample(): return torch.rand(3, 64, 64), dict(boxes=torch.tensor([[4., 4., 40., 40.]]), labels=torch.tensor([1]))
    def _collate(b): return [o[0] for o in b], [o[1] for o in b], torch.zeros(len(b))
    dl = torch.utils.data.DataLoader([_sample() for _ in range(4)], batch_size=2, collate_fn=_collate)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 2
    learn = Learner(dls, model, lambda losses, y: sum(losses.values()))
    t = find(learn, num_it=1, layers=True)
    assert all(r.valid for r in t.rows), t
    summary = learn.to_channelslast(to_fp16=False).format_summary()
    assert summary.counts[False][1] and summary.counts[True][1]


class ListDetector(nn.Module):
    "Takes a list of images and a list of dictionaries of targets, as torchvision's detectors do."
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, images, targets):
        out = self.net(torch.stack(images))
        if not self.training: return [dict(boxes=o) for o in out]
        return dict(boxes=(out - torch.cat([t['boxes'] for t in targets])).square().mean(), labels=out.mean())


def test_a_detector_with_lists_and_dictionaries_as_inputs_is_measured_and_summarized():
    def _collate(b): return [o[0] for o in b], [o[1] for o in b], torch.zeros(len(b))
    dl = torch.utils.data.DataLoader([(torch.rand(3, 8, 8), dict(boxes=torch.rand(1, 4)))]*4, batch_size=2, collate_fn=_collate)
    dls = DataLoaders(dl, dl)
    dls.n_inp = 2
    learn = Learner(dls, ListDetector(), lambda losses, y: sum(losses.values()))
    assert all(r.valid for r in find(learn, num_it=1).rows)
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


def test_a_model_without_gradients_in_eval_mode_is_compared_in_training_mode():
    assert all(r.valid for r in find(learner(RefusesEval()), num_it=1).rows)


class DetachesInEval(nn.Module):
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x): return self.net(x) if self.training else self.net(x).detach()


def test_a_model_whose_eval_mode_gives_no_gradient_is_compared_in_training_mode():
    assert all(r.valid and r.grad_diff is not None for r in find(learner(DetachesInEval()), num_it=1).rows)


# GANs, self-supervised views, recurrent models

def gan(gen_first=False, **kwargs):
    dl = DataLoader([(torch.randn(16), torch.randn(3, 16, 16)) for _ in range(16)], bs=8)
    return GANLearner.wgan(DataLoaders(dl, dl), basic_generator(16, 3, in_sz=16), basic_critic(16, 3), **kwargs)


@pytest.mark.parametrize('fitted', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_gan_is_measured_and_summarized_and_keeps_its_mode(fitted):
    "Its trainer swaps inputs and targets, and its switcher alternates between generator and critic."
    learn = gan()
    if fitted: learn.fit(1, 1e-4)
    else: learn.create_opt()
    needs, gen_mode = [p.requires_grad for p in learn.model.parameters()], learn.model.gen_mode
    for _ in range(2):
        t = find(learn, num_it=1)
        assert all(r.ms for r in t.rows) and t.best.valid, t
        assert learn.format_summary()
        learn.to_channelslast(to_fp16=False)
    assert needs == [p.requires_grad for p in learn.model.parameters()] and gen_mode == learn.model.gen_mode
    learn.fit(1, 1e-4)


class Views(Callback):
    "Two augmented views of each image, as in self-supervised learning."
    def before_batch(self): self.learn.xb, self.learn.yb = (torch.cat([self.x, self.x.flip(-1)]),), (torch.cat([self.y, self.y]),)


class Doubles(nn.Module):
    def __init__(self): super().__init__(); self.net = convnet()
    def forward(self, x):
        assert len(x) == 16, 'two views'
        return self.net(x)


def test_a_callback_that_makes_two_views_of_each_image_takes_part():
    learn = learner(Doubles(), cbs=Views())
    assert all(r.valid for r in find(learn, num_it=1).rows)
    assert learn.to_channelslast(to_fp16=False).format_summary().holds


def test_training_with_MixUp_continues_after_a_measurement_with_its_own_loss_function():
    learn = learner(cbs=MixUp(0.4))
    loss = learn.loss_func
    assert all(r.valid for r in find(learn, num_it=1).rows)
    learn.to_channelslast(to_fp16=False).format_summary()
    assert learn.loss_func is loss
    learn.fit(1)
