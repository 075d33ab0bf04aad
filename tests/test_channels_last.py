"`ChannelsLast`, `to_channelslast` and `to_contiguous` on real Learners."
import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from functools import partial

import channelslast
import fastai.callback.channelslast as fastai_cl
import fastai.vision.all
import pytest
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision, NonNativeMixedPrecision
from fastai.vision.all import (Adam, Callback, DataLoader, DataLoaders, Flatten, Learner, MergeLayer, MSELossFlat, OptimWrapper, SGD,
                               TensorImage, load_learner)
from fastai.vision.models.unet import DynamicUnet
from torch import nn

from channelslast import ChannelsLast, less_random
from .helpers import Mixed, PretendGPU, convnet, difference, image_folder, learner, learner_state, loaders, strides

CL, CL3 = torch.channels_last, torch.channels_last_3d
FUSED_ADAMW = partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))


def is_ours(mp): return type(mp) is type(learner().to_channelslast().mixed_precision)


# the callback

def test_ChannelsLast_is_a_fastai_ChannelsLast_and_can_be_removed_as_one():
    learn = learner(cbs=ChannelsLast())
    assert isinstance(learn.channels_last, fastai_cl.ChannelsLast)
    assert not hasattr(learn.remove_cb(fastai_cl.ChannelsLast), 'channels_last')


def test_weights_are_converted_before_other_callbacks_can_wrap_the_model():
    class Wraps(Callback):
        order = 0
        def before_fit(self): self.last = self.model[0].weight.is_contiguous(memory_format=CL)
    learner(dls=loaders(n=8), cbs=[wraps := Wraps(), ChannelsLast()]).fit(1)
    assert wraps.last


@pytest.mark.parametrize('shape', [(3, 8, 8), (3, 4, 8, 8)])
def test_models_with_convolutions_of_several_dimensions_train_in_channels_last(shape):
    "fastai's callback raises `required rank 4 tensor`."
    with pytest.raises(RuntimeError): learner(Mixed(), loaders(shape), cbs=fastai_cl.ChannelsLast()).fit(1)
    learn = learner(Mixed(), loaders(shape), cbs=ChannelsLast())
    learn.fit(1)
    assert learn.model.c3.weight.is_contiguous(memory_format=CL3) and learn.model.c2.weight.is_contiguous(memory_format=CL)


@pytest.mark.parametrize('run', ['fit', 'validate', 'get_preds'])
def test_weights_are_converted_once_by_fit_validate_and_get_preds(run):
    learn = learner(dls=loaders(n=8), cbs=ChannelsLast())
    getattr(learn, run)(*([1] if run == 'fit' else []))
    assert learn.model[0].weight.is_contiguous(memory_format=CL)
    ptrs = [p.data_ptr() for p in learn.model.parameters()]
    learn.validate()
    assert ptrs == [p.data_ptr() for p in learn.model.parameters()]


class Frames(nn.Module):
    "A 2-D network over the frames of a clip, whose `view` fails if the clip's strides change."
    def __init__(self): super().__init__(); self.c = nn.Conv2d(3, 4, 3)
    def forward(self, x): return self.c(x.view(-1, *x.shape[2:])).mean((2, 3)).view(*x.shape[:2], -1).mean(1)


def test_inputs_of_other_dimensions_than_the_weights_stay_as_they_are():
    learner(Frames(), loaders((5, 3, 8, 8), n=8), cbs=ChannelsLast()).fit(1)
    learner(nn.Sequential(Flatten(), nn.Linear(192, 4)), loaders(n=8), cbs=ChannelsLast()).fit(1)


class Bank(nn.Module):
    "A 2-D network over the frames of a clip, with a bank of kernels. With `module`, one of its convolutions is a module."
    def __init__(self, module):
        super().__init__()
        self.bank, self.kernel = nn.Parameter(torch.randn(2, 4, 3, 3, 3)), nn.Parameter(torch.randn(4, 3, 3, 3))
        self.c = nn.Conv2d(4, 4, 1) if module else nn.Identity()
    def forward(self, x):
        w = self.bank.view(2, -1).mean(0).view_as(self.kernel)
        self.out = nn.functional.conv2d(x.view(-1, *x.shape[2:]), self.kernel + w)
        return self.c(self.out).mean((2, 3)).view(*x.shape[:2], -1).mean(1)


@pytest.mark.parametrize('module', [False, True])
def test_a_bank_of_2d_kernels_is_not_converted_as_3d_kernels(module):
    "Otherwise the bank would fail in its `view`, and so would the clips."
    (learn := learner(Bank(module), loaders((5, 3, 8, 8), n=8), cbs=ChannelsLast())).fit(1)
    assert learn.model.kernel.is_contiguous(memory_format=CL) and learn.model.out.is_contiguous(memory_format=CL)


class Seen(Callback):
    "Stores the model's inputs and predictions."
    order = 95
    def before_batch(self): self.batch = self.learn.xb
    def after_pred(self): self.p = self.learn.pred


def test_inputs_are_converted_and_keep_their_types():
    ds = [((TensorImage(torch.randn(3, 4, 4)), torch.ones(3)), torch.tensor(0)) for _ in range(8)]
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.c = nn.Conv2d(3, 4, 3)
        def forward(self, x): return self.c(x[0]).mean((2, 3)) + x[1].sum()
    class Types(Callback):
        order = 0 # before fastai casts them to plain tensors
        def before_batch(self): self.batch = self.learn.xb[0]
    learn = learner(Two(), DataLoaders(*[DataLoader(ds, bs=4)]*2), cbs=[ChannelsLast(), types := Types()])
    learn.fit(1)
    assert type(types.batch[0]) is TensorImage and types.batch[0].is_contiguous(memory_format=CL) and types.batch[1].shape == (4, 3)


def test_predictions_of_images_are_channels_last():
    ds = [(torch.randn(3, 8, 8), torch.randn(4, 8, 8)) for _ in range(8)]
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=4)]*2), nn.Conv2d(3, 4, 3, padding=1), MSELossFlat(),
                    cbs=[ChannelsLast(), seen := Seen()])
    learn.fit(1)
    assert seen.batch[0].is_contiguous(memory_format=CL) and seen.p.is_contiguous(memory_format=CL)


def test_a_unet_stays_channels_last_to_its_last_layer():
    "With fastai's callback, the UNet concatenates the contiguous batch at full resolution, and the result is contiguous."
    ds = [(torch.randn(3, 32, 32), torch.randn(2, 32, 32)) for _ in range(4)]
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=2)]*2), DynamicUnet(body, 2, (32, 32)), MSELossFlat(), cbs=[ChannelsLast(), seen := Seen()])
    merged = []
    for m in learn.model.modules():
        if isinstance(m, MergeLayer): m.register_forward_hook(lambda m, i, o: merged.append(o.is_contiguous(memory_format=CL)))
    learn.validate()
    assert merged and all(merged) and seen.p.is_contiguous(memory_format=CL)


# optimizer state and checkpoints

@pytest.mark.parametrize('kw', [dict(), dict(fused=True), dict(foreach=True)], ids=str)
def test_switching_between_fits_trains_as_without_a_switch(kw):
    "With fastai's callback, `AdamW(fused=True)` is wrong by 6e-2. In float64."
    dls, model = loaders(dtype=torch.float64), convnet().double()
    runs = []
    for switch in False, True:
        learn = learner(copy.deepcopy(model), dls, opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, **kw)), lr=1e-2)
        learn.fit(1)
        if switch: learn.to_channelslast(to_fp16=False)
        learn.fit(1)
        if switch: learn.to_contiguous()
        learn.fit(1)
        runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize('into', ['channels last', 'contiguous'])
def test_a_checkpoint_of_the_other_format_loads_with_the_strides_of_the_parameters(tmp_path, into):
    "The state was saved with the other format's strides and has its parameters' strides before the first step."
    learn = learner(path=tmp_path)
    if into == 'contiguous': learn.to_channelslast(to_fp16=False)
    learn.fit(1); learn.save('a')
    other = learner(path=tmp_path)
    if into == 'channels last': other.to_channelslast(to_fp16=False)
    class Look(Callback):
        def before_batch(self): self.seen = strides(self.learn)
    other.load('a')
    for a, b in zip(learn.model.parameters(), other.model.parameters()): assert torch.equal(a, b)
    other.fit(1, cbs=(look := Look()))
    ps, _, ss = look.seen
    assert all(s == p for p, s in zip([p.stride() for p in other.model.parameters()], ss) for s in s)
    assert other.model[0].weight.is_contiguous(memory_format=CL if into == 'channels last' else torch.contiguous_format)


def test_optimizer_state_of_the_other_format_is_converted_when_training_starts():
    "State of the other format, loaded straight into the optimizer, gets its parameters' strides when training starts."
    plain, learn = learner(), learner().to_channelslast(to_fp16=False)
    for o in plain, learn: o.fit(1)
    learn.opt.load_state_dict(plain.opt.state_dict())
    learn.validate()
    assert any(s != p for p, ss in zip(strides(learn)[0], strides(learn)[2]) for s in ss)  # predictions leave the state alone
    class Look(Callback):
        def before_batch(self): self.seen = strides(self.learn)
    learn.fit(1, cbs=(look := Look()))
    ps, _, ss = look.seen
    assert all(s == p.stride() for p, s in zip(learn.model.parameters(), ss) for s in s)


def exported(path):
    "A Learner that is exported after a fit in channels last with mixed precision, and its prediction for an image."
    learn = Learner(image_folder(path, 8), convnet(n=2), path=path).to_channelslast(amp_mode='bf16')
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); learn.fit(1)
    learn.export('e.pkl')
    return path/'e.pkl', path/'data'/'a'/'0.png', torch.as_tensor(learn.predict(path/'data'/'a'/'0.png')[2])


@pytest.mark.filterwarnings('ignore:load_learner')
def test_an_exported_learner_names_fastais_callbacks_only_so_it_loads_without_this_library(tmp_path, monkeypatch):
    file, image, expected = exported(tmp_path)
    with monkeypatch.context() as m:
        for name in [*sys.modules]:
            if name.split('.')[0] == 'channelslast': m.setitem(sys.modules, name, None)  # cannot be imported
        learn, on_cpu = load_learner(file, cpu=False), load_learner(file)
    assert {fastai_cl.ChannelsLast, MixedPrecision} <= {type(o) for o in learn.cbs}
    torch.testing.assert_close(torch.as_tensor(on_cpu.predict(image)[2]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_exported_learner_loads_and_predicts_where_this_library_is_not_installed(tmp_path):
    "Callbacks of this library's classes would raise `UnboundLocalError: … 'res'`."
    file, image, expected = exported(tmp_path)
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
print([f'{{type(o).__module__}}.{{type(o).__name__}}' for o in load_learner({str(file)!r}, cpu=False).cbs])
print('predicted', load_learner({str(file)!r}).predict({str(image)!r})[2].tolist())"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert 'fastai.callback.channelslast.ChannelsLast' in out.stdout and 'fastai.callback.fp16.MixedPrecision' in out.stdout
    torch.testing.assert_close(torch.tensor(eval(out.stdout.split('predicted ')[1].splitlines()[0])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('into', [True, False], ids=['channels last', 'contiguous'])
def test_training_continues_from_a_checkpoint_of_the_other_format_as_without_a_switch(tmp_path, into):
    "In float64, with a fused optimizer, compared with a run that stays contiguous."
    dls, model = loaders(dtype=torch.float64), convnet().double()
    runs = []
    for switch in False, True:
        learn = learner(copy.deepcopy(model), dls, opt_func=FUSED_ADAMW, lr=1e-2, path=tmp_path)
        if switch and not into: learn.to_channelslast(to_fp16=False)
        learn.fit(1); learn.save('a'); learn.fit(1)
        if switch: learn.to_channelslast(to_fp16=False) if into else learn.to_contiguous()
        class Load(Callback): # in the middle of a fit, as with SaveModelCallback
            def before_epoch(self): self.learn.load('a')
        learn.fit(1, cbs=Load())
        runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


# copies and warnings

class Own(ChannelsLast): pass


def test_a_subclass_of_ChannelsLast_is_kept_and_keeps_its_class_in_copies():
    learn = learner(cbs=Own()).to_channelslast()
    assert [type(o) for o in learn._grab_cbs(ChannelsLast)] == [Own]
    assert type(pickle.loads(pickle.dumps(Own()))) is type(copy.copy(Own())) is Own


def test_a_deep_copy_of_a_learner_keeps_the_callbacks_classes():
    learn = copy.deepcopy(learner().to_channelslast())
    assert type(learn.channels_last) is ChannelsLast and is_ours(learn.mixed_precision)
    assert learn.channels_last.learn is learn


@pytest.mark.parametrize('device, deterministic, benchmark, n',
                         [('cuda', True, False, 1), ('cuda', True, True, 0), ('cuda', False, False, 0), ('cpu', True, False, 0)])
def test_deterministic_cuDNN_without_benchmark_warns_once_on_cuda(monkeypatch, device, deterministic, benchmark, n):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', deterministic)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', benchmark)
    with PretendGPU(monkeypatch, device) as gpu, warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn = gpu.learner(dls=loaders(n=8), cbs=ChannelsLast())
        learn.validate(); learn.validate()
    assert len([o for o in w if 'less_random' in str(o.message)]) == n


# to_channelslast

def test_the_signature_of_to_channelslast_lists_the_arguments_of_GradScaler():
    sig = inspect.signature(Learner.to_channelslast)
    assert {k: v.default for k, v in list(sig.parameters.items())[1:]} == dict(
        to_fp16=True, amp_mode=None, fp32_layers=None, init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, enabled=True)


def test_to_channelslast_called_again_returns_the_learner_and_adds_nothing():
    "fastai returns None the second time."
    learn = learner()
    for _ in range(3): assert learn.to_channelslast() is learn
    assert [type(o) for o in learn.cbs].count(ChannelsLast) == len(learn._grab_cbs(MixedPrecision)) == 1


@pytest.mark.parametrize('args, kwargs, mode', [
    ((), {}, AMPMode.FP16), ((False,), {}, None), ((), dict(use_amp=False), None), ((), dict(to_fp16=False), None),
    ((), dict(use_amp=True), AMPMode.FP16), ((), dict(amp_mode=AMPMode.BF16), AMPMode.BF16), ((True, 'bf16'), {}, AMPMode.BF16)])
def test_calls_written_for_fastais_to_channelslast_add_the_same_mixed_precision(args, kwargs, mode):
    learn = learner().to_channelslast(*args, **kwargs)
    assert getattr(getattr(learn, 'mixed_precision', None), 'amp_mode', None) == mode and hasattr(learn, 'channels_last')


def test_to_channelslast_of_a_learner_with_the_callback_adds_mixed_precision():
    "fastai silently does nothing."
    learn = learner(cbs=ChannelsLast()).to_channelslast()
    assert hasattr(learn, 'mixed_precision') and len(learn._grab_cbs(ChannelsLast)) == 1


def test_to_channelslast_replaces_fastais_callback():
    learn = learner(cbs=fastai_cl.ChannelsLast()).to_channelslast()
    assert [type(o) for o in learn._grab_cbs(fastai_cl.ChannelsLast)] == [ChannelsLast] and type(learn.channels_last) is ChannelsLast


@pytest.mark.parametrize('call, kept', [(dict(), True), (dict(to_fp16=False), True), (dict(amp_mode='fp16'), False),
                                        (dict(init_scale=2.), False)])
@pytest.mark.filterwarnings('ignore')
def test_to_channelslast_keeps_existing_mixed_precision_unless_the_call_passes_its_arguments(call, kept):
    learn = learner().to_bf16()
    mp = learn.mixed_precision
    learn.to_channelslast(**call)
    assert (learn.mixed_precision is mp) == kept and len(learn._grab_cbs(MixedPrecision)) == 1
    if not kept: assert learn.mixed_precision.amp_mode is AMPMode.FP16 and is_ours(learn.mixed_precision)


def test_to_channelslast_that_keeps_fastais_mixed_precision_on_a_cpu_warns():
    message = r"to_channelslast\(\) keeps fastai's own `MixedPrecision`, which works on CUDA only"
    with pytest.warns(UserWarning, match=message): learner().to_fp16().to_channelslast()


@pytest.mark.parametrize('first', [lambda o: o, lambda o: o.to_fp16(), lambda o: o.to_bf16(), lambda o: o.to_channelslast(amp_mode='bf16')])
@pytest.mark.parametrize('then, mode', [(lambda o: o.to_fp16(), AMPMode.FP16), (lambda o: o.to_bf16(), AMPMode.BF16),
                                        (lambda o: o.to_fp16(amp_mode=AMPMode.BF16), AMPMode.BF16), (lambda o: o.to_fp16(init_scale=8.), AMPMode.FP16)])
def test_to_fp16_and_to_bf16_replace_any_mixed_precision_by_one_of_its_class(first, then, mode):
    "fastai adds a second callback: the loss is scaled twice. The new one is of this library's class if the old one was."
    learn = first(learner())
    ours = any(map(is_ours, learn.cbs))
    assert then(learn) is learn
    mp, = learn._grab_cbs(MixedPrecision)
    assert mp.amp_mode is mode and is_ours(mp) == ours and learn.mixed_precision is mp


class OwnPrecision(MixedPrecision): pass


def test_to_channelslast_keeps_mixed_precision_of_another_class_or_name():
    learn = learner(cbs=OwnPrecision()).to_channelslast()
    assert [type(o) for o in learn._grab_cbs(MixedPrecision)] == [OwnPrecision] and hasattr(learn, 'channels_last')
    learn = learner().to_channelslast()
    del learn.mixed_precision  # as a `MixedPrecision` in `fit(cbs=…)` does
    assert len(learn.to_channelslast()._grab_cbs(MixedPrecision)) == 1


def test_to_channelslast_adds_no_mixed_precision_next_to_the_non_native_one():
    learn = learner(cbs=NonNativeMixedPrecision())
    assert not learn.to_channelslast()._grab_cbs(MixedPrecision)
    with pytest.warns(UserWarning, match='ignores amp_mode: the Learner has `NonNativeMixedPrecision`'): learn.to_channelslast(amp_mode='fp16')
    assert not learn._grab_cbs(MixedPrecision)


@pytest.mark.parametrize('kwargs, match', [
    (dict(amp_mode='bf16', init_scale=2., enabled=False), 'ignores init_scale, enabled: bf16 needs no gradient scaling'),
    (dict(to_fp16=False, growth_factor=3.), 'ignores growth_factor: `to_fp16=False` adds no mixed precision'),
    (dict(to_fp16=False, amp_mode='bf16'), 'ignores amp_mode: `to_fp16=False` adds no mixed precision')])
def test_to_channelslast_with_arguments_without_effect_warns(kwargs, match):
    with pytest.warns(UserWarning, match=match): learner().to_channelslast(**kwargs)


def test_to_channelslast_whose_fp32_layers_match_no_module_warns():
    with pytest.warns(UserWarning, match='`fp32_layers` matched no module; all layers run in half precision'):
        learner().to_channelslast(fp32_layers=nn.Conv3d)


# to_contiguous

def test_to_contiguous_restores_the_strides_of_weights_gradients_and_optimizer_state():
    "fastai leaves the optimizer state in channels last."
    learn = learner(Mixed())
    learn.fit(1)
    before = strides(learn)
    learn.to_channelslast(to_fp16=False).fit(1)
    assert strides(learn) != before
    assert learn.to_contiguous() is learn and strides(learn) == before and not learn._grab_cbs(fastai_cl.ChannelsLast)
    learn.fit(1)
    assert strides(learn) == before


@pytest.mark.parametrize('to_fp32', [True, False])
def test_to_contiguous_removes_the_callback_and_only_with_to_fp32_the_mixed_precision(to_fp32):
    learn = learner().to_channelslast().to_contiguous(to_fp32=to_fp32)
    assert not hasattr(learn, 'channels_last') and hasattr(learn, 'mixed_precision') != to_fp32
    learn = learner(cbs=fastai_cl.ChannelsLast()).to_contiguous()
    assert not hasattr(learn, 'channels_last')


def test_to_contiguous_of_a_contiguous_learner_changes_nothing():
    learn = learner(dls=loaders(n=8))
    learn.fit(1)
    before = learner_state(learn)
    learn.to_contiguous(to_fp32=True)
    assert difference(before, learner_state(learn)) == ''


# import order

@pytest.mark.parametrize('first, second', [('channelslast', 'fastai.vision.all'),
                                           pytest.param('fastai.vision.all', 'channelslast', marks=pytest.mark.slow)])
def test_methods_are_this_librarys_in_either_order_of_imports(first, second):
    code = f"""
from {first} import *
from {second} import *
import channelslast
assert {{o.__module__.split('.')[0] for o in (Learner.to_channelslast, Learner.to_contiguous, Learner.to_fp16, Learner.load)}} == {{'channelslast'}}"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_a_star_import_shadows_one_name_of_fastai():
    assert set(channelslast.__all__) & set(dir(fastai.vision.all)) == {'ChannelsLast'}
    assert all(hasattr(channelslast, o) for o in channelslast.__all__)


# weights that share memory

class Shared(nn.Module):
    "A 1×1 convolution that shares its memory with a linear layer, and a 3×3 one whose center is a second 1×1 convolution."
    def __init__(self):
        super().__init__()
        self.c3, self.c1, self.middle, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
        self.head.weight.data, self.middle.weight.data = self.c1.weight.data.view(4, 4).t(), self.c3.weight.data[..., 1:2, 1:2]
    @property
    def ptrs(self):
        ptrs = [o.weight.data_ptr() for o in (self.c3, self.middle, self.c1, self.head)]
        ptrs[1] -= 16  # the center of the 3×3 kernel
        return ptrs
    def forward(self, x): return self.head(self.c1(self.c3(x) + self.middle(x)[..., 1:-1, 1:-1]).relu().mean((2, 3)))


    def check(self): return self.ptrs[0] == self.ptrs[1] and self.ptrs[2] == self.ptrs[3]


@pytest.mark.parametrize('opt', [partial(SGD, mom=0.9), Adam, FUSED_ADAMW], ids=['SGD', 'Adam', 'AdamW'])
def test_weights_that_share_memory_share_it_after_every_call(tmp_path, opt):
    "If sharing ends, the two weights of a pair differ. This test runs all calls that copy or convert weights."
    runs = []
    for last in False, True:
        with less_random():
            learn = learner(Shared(), path=tmp_path/str(last), opt_func=opt, lr=1e-3)
            before, ptrs = strides(learn)[0], learn.model.ptrs
            assert learn.model.check()
            if last: learn.to_channelslast(to_fp16=False)
            learn.fit(1)
            learn.save('a')
            learn.fit(1)
            learn.load('a')
            learn.validate()
            learn.fit(1)
            if last:
                assert learn.model.c1.weight.is_contiguous(memory_format=CL) and learn.model.c1.weight.stride(1) == 1
                learn.format_find(num_it=1, show_plot=False, precisions='fp32')
                learn.format_summary()
                assert learn.model.ptrs == ptrs
                learn.to_contiguous()
            learn.fit(1)
            assert learn.model.ptrs == ptrs and strides(learn)[0] == before
            runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_weights_that_share_memory_share_it_while_they_are_measured():
    "Measuring works on copies of the weights: a change of one weight changes the other, and neither reaches the Learner's own."
    shared = []
    class Changes(Shared):
        def forward(self, x):
            with torch.no_grad():
                for p in self.parameters(): p += 1e-3
            shared.append(self.check() and torch.equal(self.c3.weight[..., 1:2, 1:2], self.middle.weight)
                          and torch.equal(self.c1.weight[..., 0, 0].t(), self.head.weight))
            return super().forward(x)
    learn = learner(Changes(), loaders(n=8))
    before = learner_state(learn)
    learn.format_find(num_it=1, show_plot=False)
    assert shared and all(shared) and difference(before, learner_state(learn)) == ''


def test_one_channel_images_get_other_strides_without_a_copy():
    "Both formats have the same order in memory, so only the strides of the batch change."
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    class Given(Seen): order = ChannelsLast.order - 1
    learner(net, loaders((1, 8, 8)), cbs=[ChannelsLast(), given := Given(), seen := Seen()]).fit(1)
    assert seen.batch[0].stride() == (64, 1, 8, 1) and seen.batch[0].data_ptr() == given.batch[0].data_ptr()
