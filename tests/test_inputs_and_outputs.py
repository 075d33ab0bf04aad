"Models with inputs and outputs in containers of any kind: mixed precision, summary, folding and measuring."
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastcore.basics import fastuple
from fastcore.foundation import L
from torch import nn

from channelslast import FoldBatchNorm
from channelslast.core.nested_tensors import tensors_of
from .helpers import convnet, learner, loaders, shake
from .test_nested_tensors import MAKE, Boxes, Data, ModelOutput, UserDict

HOLDERS = dict(
    data=lambda t: Data(t), output=lambda t: ModelOutput(a=t, b=None), user=lambda t: UserDict(a=t), object=lambda t: Boxes(t), L=lambda t: L(t, 'name'),
    numbers=lambda t: (t, None, 3, 's', 2.5), array=lambda t: dict(a=t, size=np.ones(2)), nested=lambda t: [Data([dict(a=t)])])


class Gives(nn.Module):
    "A convnet whose output comes in a container."
    def __init__(self, hold):
        super().__init__()
        self.net, self.hold = convnet(), hold
    def forward(self, x): return self.hold(self.net(x))


def mostly_slow(options, *fast):
    return pytest.mark.parametrize('name', [o if o in fast else pytest.param(o, marks=pytest.mark.slow) for o in options])


def first(out): return tensors_of(out)[0]


def loss_of(out, y): return nn.functional.cross_entropy(first(out), y)


class Seen(Callback):
    "Keeps the model's output as the loss gets it."
    order = 1000
    def after_pred(self): self.got = self.pred


# mixed precision

@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('fast', [('bf16',), pytest.param((), marks=pytest.mark.slow)], ids=['bf16', 'fp32'])
@pytest.mark.filterwarnings('ignore')
def test_mixed_precision_keeps_the_types_of_outputs_and_casts_half_precision_only(has, name, fast):
    "fastai's mixed precision turns `ModelOutput` into a plain dictionary, and fails on `None`, numbers and named tuples."
    has(*fast)
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convnet()
        def forward(self, x): return self.net(x), MAKE[name](), torch.ones(1, dtype=torch.float64)
    learn = Learner(loaders(n=8), Adds(), loss_of, cbs=(seen := Seen())).to_channelslast(amp_mode='bf16')
    learn.fit(1)
    out, held, double = seen.got
    assert type(held) is type(MAKE[name]()) and out.dtype == torch.float32 and double.dtype == torch.float64
    assert first(held).dtype == torch.float32


class Sized(tuple):
    "A tuple with an attribute, as images with their size."


def sized(t):
    o = Sized((t,))
    o.size = 8
    return o


def test_mixed_precision_keeps_the_attributes_of_tuples(has):
    has('bf16')
    learn = Learner(loaders(n=8), Gives(sized), loss_of, cbs=(seen := Seen())).to_channelslast(amp_mode='bf16')
    learn.fit(1)
    assert type(seen.got) is Sized and seen.got.size == 8 and first(seen.got).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_googlenet_trains_with_its_named_tuple_of_outputs(has):
    has('bf16')
    def _loss(out, y): return sum(nn.functional.cross_entropy(o, y) for o in ((out,) if isinstance(out, torch.Tensor) else out) if o is not None)
    model = torchvision.models.googlenet(weights=None, num_classes=4, aux_logits=True, init_weights=False)
    learn = Learner(loaders((3, 64, 64), n=4, bs=2), model, _loss).to_channelslast(amp_mode='bf16')
    class Train(Callback):
        def after_pred(self): self.kind = self.kind if hasattr(self, 'kind') else type(self.pred)
    learn.fit(1, cbs=(kind := Train()))
    assert kind.kind.__name__ == 'GoogLeNetOutputs'


# folding and predictions

@pytest.mark.parametrize('name', HOLDERS)
def test_outputs_in_a_container_are_compared_when_batch_norms_are_folded(name):
    "Otherwise `FoldBatchNorm` warns that the folded model gives other outputs."
    learn = Learner(loaders(n=8), shake(Gives(HOLDERS[name])), loss_of, cbs=FoldBatchNorm())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(2): learn.validate()
    assert learn.fold_batch_norm.folded == 1


FIND = dict(num_it=1, show_plot=False, layers=False)


@mostly_slow(HOLDERS, 'output', 'nested')
def test_predictions_in_a_container_are_compared_by_format_find(has, name):
    "Otherwise each candidate has the note `numbers differ`."
    has('bf16')
    t = Learner(loaders(n=16), shake(Gives(HOLDERS[name])), loss_of).format_find(train=False, **FIND)
    assert all(r.valid and r.pred_diff is not None for r in t.rows) and any(r.folded for r in t.rows), t


@mostly_slow(HOLDERS, 'numbers', 'object')
def test_losses_of_outputs_in_a_container_are_compared_by_format_find(has, name):
    has('bf16')
    t = Learner(loaders(n=16), Gives(HOLDERS[name]), loss_of).format_find(**FIND)
    assert all(r.valid for r in t.rows), t


@mostly_slow(HOLDERS, 'array', 'user')
def test_different_numbers_in_a_container_are_found_by_format_find(has, name):
    has('bf16')
    def _hold(t): return HOLDERS[name](t + 1 if torch.is_autocast_enabled('cpu') else t)
    t = Learner(loaders(n=16), Gives(_hold), loss_of).format_find(train=False, **FIND)
    assert {r.precision: r.valid for r in t.rows} == dict(fp32=True, bf16=False) and 'numbers differ' in repr(t)


class Names(nn.Module):
    "Returns class names."
    def __init__(self):
        super().__init__()
        self.net = shake(convnet())
    def forward(self, x): return ['abcd'[i] for i in self.net(x).argmax(1)]


def test_outputs_without_numbers_are_never_chosen_nor_folded(has):
    has('bf16')
    learn = Learner(loaders(n=16), Names(), lambda out, y: torch.zeros(()))
    t = learn.format_find(train=False, **FIND)
    assert t.rows[0].valid and all('no numbers to compare' in r.note and not r.valid for r in t.rows[1:]) and t.best is t.rows[0]
    with pytest.warns(UserWarning, match="gives outputs without numbers, which can't be compared. It stays unfolded"):
        learn.add_cb(FoldBatchNorm()).validate()


class Takes(nn.Module):
    "Takes its images in a container."
    def __init__(self):
        super().__init__()
        self.net = shake(convnet())
    def forward(self, x): return self.net(first(x))


@dataclass
class Batch: images: object


def holding(hold):
    "DataLoaders whose inputs come in a container."
    x, y = torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))
    def _collate(b): return hold(torch.stack([o[0] for o in b])), torch.stack([o[1] for o in b])
    dl = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=8, collate_fn=_collate)
    return DataLoaders(dl, dl)


INPUTS = dict(L=lambda t: L([t]), data=lambda t: Batch(t), fastuple=lambda t: fastuple((t, 1)), list=lambda t: [t], object=lambda t: Boxes(t))


@pytest.mark.parametrize('name', INPUTS)
@pytest.mark.filterwarnings('ignore')
def test_inputs_in_a_container_are_converted_summarized_measured_and_folded(has, name):
    "Folded batch norms are also distinguished by the input's type."
    has('bf16')
    learn = Learner(holding(INPUTS[name]), Takes(), CrossEntropyLossFlat()).to_channelslast(amp_mode='bf16')
    learn.fit(1)
    assert learn.format_summary().holds
    if name in ('data', 'list'): assert all(r.valid for r in learn.format_find(train=False, **FIND).rows)
    learn.add_cb(FoldBatchNorm())
    for _ in range(2): learn.validate()
    assert learn.fold_batch_norm.folded == 1
    learn.to_contiguous().to_fp32()  # weights folded for bf16 can't be used in fp32
    learn.validate()
    folded = [*learn.validate()]
    assert folded == pytest.approx([*learn.remove_cb(FoldBatchNorm).validate()], rel=1e-4)


# images created inside the model

class Normalizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()
    def forward(self, x): return self.net(x.float()/255)


class Generates(nn.Module):
    "Generates images from a vector."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4*8*8), nn.Unflatten(1, (4, 8, 8)), nn.ConvTranspose2d(4, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 3, 3))
    def forward(self, z): return self.net(z).mean((2, 3))


class Stacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = convnet()
    def forward(self, images): return self.net(torch.stack(list(images)))


def of(x, collate=None):
    dl = torch.utils.data.DataLoader(list(zip(x, torch.randint(0, 3, (len(x),)))), batch_size=8, collate_fn=collate)
    return DataLoaders(dl, dl)


CASES = dict(
    uint8=lambda: (Normalizes(), of(torch.randint(0, 255, (16, 3, 8, 8), dtype=torch.uint8))), vector=lambda: (Generates(), of(torch.randn(16, 5))),
    images=lambda: (Stacks(), of(torch.randn(16, 3, 8, 8), lambda b: ([o[0] for o in b], torch.stack([o[1] for o in b])))))


@pytest.mark.parametrize('name', CASES)
def test_format_summary_of_a_model_that_makes_its_images_from_other_inputs_counts_their_layers(name):
    "A check of the batch alone would find no 4-D or 5-D floating-point tensor in it."
    model, dls = CASES[name]()
    learn = Learner(dls, model, CrossEntropyLossFlat()).to_channelslast(to_fp16=False)
    learn.fit(1)
    summary = learn.format_summary()
    assert summary.counts[False][1] + len(summary.rows) > 0


@pytest.mark.parametrize('batch', [lambda b: L(*b), lambda b: fastuple(b), lambda b: list(b), lambda b: b[0]])
def test_format_summary_takes_batches_of_any_type(batch):
    learn = learner().to_channelslast(to_fp16=False)
    b = learn.dls.one_batch()
    if isinstance(batch(b), torch.Tensor): assert 'no labels' in learn.format_summary(batch(b)).note
    else: assert learn.format_summary(batch(b)).holds
