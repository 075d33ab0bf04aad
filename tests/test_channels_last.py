"`ChannelsLast`, `to_channelslast` and `to_contiguous` on real Learners."
import inspect
import subprocess
import sys
import warnings
from copy import deepcopy
from functools import partial

import fastai.callback.channelslast as fastai_cl
import numpy as np
import pytest
import torch
from PIL import Image
from fastai.callback.fp16 import AMPMode, MixedPrecision, NonNativeMixedPrecision
from fastai.vision.all import (Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Flatten, ImageDataLoaders, Learner,
                               MergeLayer, MSELossFlat, OptimWrapper, SGD, TensorImage, unet_learner)
from torch import nn

from channelslast import ChannelsLast, less_random
from channelslast.learner import channels_last as callback
from channelslast.learner.mixed_precision import DeviceMixedPrecision
from channelslast.learner.preserve_learner import preserve_learner
from tests.conftest import Mixed, convnet, learner, loaders, strides

CL, CL3 = torch.channels_last, torch.channels_last_3d


def raises_unchanged(learn, error, match, **kwargs):
    cbs, before = list(learn.cbs), strides(learn)
    with pytest.raises(error, match=match): learn.to_channelslast(**kwargs)
    assert list(learn.cbs) == cbs and strides(learn) == before


# the callback

def test_is_fastais_and_runs_before_what_wraps_the_model():
    learn = learner(cbs=ChannelsLast())
    assert isinstance(learn.channels_last, fastai_cl.ChannelsLast) and learn.channels_last.order == -1
    assert not hasattr(learn.remove_cb(fastai_cl.ChannelsLast), 'channels_last')


@pytest.mark.parametrize('shape', [(3, 8, 8), (3, 4, 8, 8)])
def test_models_that_mix_dimensions_train(shape):
    "✗ fastai raises `required rank 4 tensor`."
    with pytest.raises(RuntimeError): learner(Mixed(), loaders(shape), cbs=fastai_cl.ChannelsLast()).fit(1)
    learn = learner(Mixed(), loaders(shape), cbs=ChannelsLast())
    learn.fit(1)
    assert learn.model.c3.weight.is_contiguous(memory_format=CL3) and learn.model.c2.weight.is_contiguous(memory_format=CL)


@pytest.mark.parametrize('run', ['fit', 'validate', 'get_preds'])
def test_casts_whatever_runs(run):
    learn = learner(cbs=ChannelsLast())
    getattr(learn, run)(*([1] if run == 'fit' else []))
    assert learn.model[0].weight.is_contiguous(memory_format=CL)
    ptrs = [p.data_ptr() for p in learn.model.parameters()]
    learn.validate()
    assert ptrs == [p.data_ptr() for p in learn.model.parameters()]


class Frames(nn.Module):
    "A 2-D network over the frames of a clip, whose `view` fails if the clip's strides change."
    def __init__(self): super().__init__(); self.c = nn.Conv2d(3, 4, 3)
    def forward(self, x): return self.c(x.view(-1, *x.shape[2:])).mean((2, 3)).view(*x.shape[:2], -1).mean(1)


def test_inputs_of_other_dimensions_than_the_weights_stay():
    learner(Frames(), loaders((5, 3, 8, 8)), cbs=ChannelsLast()).fit(1)
    learner(nn.Sequential(Flatten(), nn.Linear(192, 4)), cbs=ChannelsLast()).fit(1)


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
def test_banks_of_kernels_are_no_3d_convolutions(module):
    "✗ Converted as 3-D kernels, the bank fails in its `view`, and so do the clips."
    (learn := learner(Bank(module), loaders((5, 3, 8, 8)), cbs=ChannelsLast())).fit(1)
    assert learn.model.kernel.is_contiguous(memory_format=CL) and learn.model.out.is_contiguous(memory_format=CL)


class Seen(Callback):
    "Stores the model's inputs and predictions."
    order = 95
    def before_batch(self): self.batch = self.learn.xb
    def after_pred(self): self.p = self.learn.pred


def test_batch_is_cast_and_keeps_its_types():
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


def test_predictions_are_channels_last():
    ds = [(torch.randn(3, 8, 8), torch.randn(4, 8, 8)) for _ in range(8)]
    learn = Learner(DataLoaders(*[DataLoader(ds, bs=4)]*2), nn.Conv2d(3, 4, 3, padding=1), MSELossFlat(),
                    cbs=[ChannelsLast(), seen := Seen()])
    learn.fit(1)
    assert seen.batch[0].is_contiguous(memory_format=CL) and seen.p.is_contiguous(memory_format=CL)


@pytest.mark.parametrize('cb', [ChannelsLast, fastai_cl.ChannelsLast])
def test_unet_stays_channels_last_to_its_last_layer(cb):
    "✗ With fastai's callback, the UNet concatenates the contiguous batch at full resolution, and the result is contiguous."
    from torchvision.models import resnet18
    ds = [(torch.randn(3, 32, 32), torch.randint(0, 2, (32, 32))) for _ in range(4)]
    learn = unet_learner(DataLoaders(*[DataLoader(ds, bs=2)]*2), resnet18, n_out=2, pretrained=False, normalize=False,
                         loss_func=CrossEntropyLossFlat(axis=1), cbs=[cb(), seen := Seen()])
    merged = []
    for m in learn.model.modules():
        if isinstance(m, MergeLayer): m.register_forward_hook(lambda m, i, o: merged.append(o.is_contiguous(memory_format=CL)))
    learn.validate()
    assert all(merged) == (cb is ChannelsLast) and seen.p.is_contiguous(memory_format=CL)


@pytest.mark.parametrize('kw', [dict(), dict(fused=True), dict(foreach=True)], ids=str)
def test_optimizer_state_follows_a_switch_in_mid_training(kw):
    "✗ With fastai's callback, `AdamW(fused=True)` is wrong by 6e-2. In float64."
    dls, model = loaders(dtype=torch.float64), convnet().double()
    runs = []
    for switch in False, True:
        learn = learner(deepcopy(model), dls, opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, **kw)), lr=1e-2)
        learn.fit(1)
        if switch: learn.to_channelslast(to_fp16=False)
        learn.fit(1)
        if switch: learn.to_contiguous()
        learn.fit(1)
        runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize('into', ['channels last', 'contiguous'])
def test_checkpoints_load_across_formats(tmp_path, into):
    "The state was saved with the other format's strides and has its parameters' strides before the first step."
    learn = learner(path=tmp_path)
    if into == 'contiguous': learn.to_channelslast(to_fp16=False)
    learn.fit(1); learn.save('a')
    other = learner(path=tmp_path)
    if into == 'channels last': other.to_channelslast(to_fp16=False)
    class Look(Callback):
        def before_batch(self): self.seen = strides(self.learn)
    other.load('a')
    other.fit(1, cbs=(look := Look()))
    ps, _, ss = look.seen
    assert all(s == p for p, s in zip([p.stride() for p in other.model.parameters()], ss) for s in s)
    assert other.model[0].weight.is_contiguous(memory_format=CL if into == 'channels last' else torch.contiguous_format)


def test_state_that_comes_in_between():
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


def image_folder(path, n=16):
    "DataLoaders whose transforms can be pickled, as `export` needs."
    for i in range(n):
        (d := path/'data'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(d/f'{i}.png')
    return ImageDataLoaders.from_folder(path/'data', valid_pct=0.25, bs=4, num_workers=0)


@pytest.mark.parametrize('cpu', [True, False])
def test_export_loads_where_this_library_is_not_installed(has, tmp_path, cpu):
    "✗ With a callback class of this library, loading would raise `UnboundLocalError: … 'res'`."
    has()  # the loaded Learner predicts in fp32
    learn = Learner(image_folder(tmp_path), convnet(n=2), path=tmp_path).to_channelslast(amp_mode='bf16')
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); learn.fit(1)
    expected = learn.predict(tmp_path/'data'/'a'/'0.png')[2]
    learn.export('e.pkl')
    code = f"""
import sys; sys.modules['channelslast'] = None
from fastai.vision.all import *
learn = load_learner({str(tmp_path/'e.pkl')!r}, cpu={cpu})
print([f'{{type(o).__module__}}.{{type(o).__name__}}' for o in learn.cbs])
if {cpu}: print('predicted', learn.predict({str(tmp_path/'data'/'a'/'0.png')!r})[2].tolist())"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    if cpu:
        got = torch.tensor(eval(out.stdout.split('predicted ')[1].splitlines()[0]))
        torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    else: assert 'fastai.callback.channelslast.ChannelsLast' in out.stdout and 'fastai.callback.fp16.MixedPrecision' in out.stdout


@pytest.mark.parametrize('into', [True, False], ids=['channels last', 'contiguous'])
def test_training_goes_on_from_a_checkpoint_of_the_other_format(tmp_path, into):
    "In float64, with a fused optimizer, compared with a run that stays contiguous."
    dls, model, opt = loaders(dtype=torch.float64), convnet().double(), partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))
    runs = []
    for switch in False, True:
        learn = learner(deepcopy(model), dls, opt_func=opt, lr=1e-2, path=tmp_path)
        if switch and not into: learn.to_channelslast(to_fp16=False)
        learn.fit(1); learn.save('a'); learn.fit(1)
        if switch: learn.to_channelslast(to_fp16=False) if into else learn.to_contiguous()
        class Load(Callback): # in the middle of a fit, as with SaveModelCallback
            def before_epoch(self): self.learn.load('a')
        learn.fit(1, cbs=Load())
        runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


class Own(ChannelsLast): pass


def test_own_subclasses_are_kept():
    import copy, pickle
    learn = learner(cbs=Own()).to_channelslast()
    assert [type(o) for o in learn._grab_cbs(ChannelsLast)] == [Own]
    assert type(pickle.loads(pickle.dumps(Own()))) is type(copy.copy(Own())) is Own


def test_copies_keep_the_class():
    learn = deepcopy(learner().to_channelslast())
    assert type(learn.channels_last) is ChannelsLast and type(learn.mixed_precision) is DeviceMixedPrecision
    assert learn.channels_last.learn is learn


@pytest.mark.parametrize('device, deterministic, benchmark, n',
                         [('cuda', True, False, 1), ('cuda', True, True, 0), ('cuda', False, False, 0), ('cpu', True, False, 0)])
def test_cudnn_warning_once(monkeypatch, device, deterministic, benchmark, n):
    learn = learner(cbs=ChannelsLast())
    monkeypatch.setattr(callback, 'model_device', lambda m: torch.device(device))
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', deterministic)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', benchmark)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn.validate(); learn.validate()
    assert len([o for o in w if 'less_random' in str(o.message)]) == n


# to_channelslast

def test_signature_is_the_scalers():
    sig = inspect.signature(Learner.to_channelslast)
    assert {k: v.default for k, v in list(sig.parameters.items())[1:]} == dict(
        to_fp16=True, amp_mode=None, fp32_layers=None, init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, enabled=True)


def test_returns_the_learner_and_adds_nothing_twice():
    "✗ fastai returns None the second time."
    learn = learner()
    for _ in range(3): assert learn.to_channelslast() is learn
    assert [type(o) for o in learn.cbs].count(ChannelsLast) == len(learn._grab_cbs(MixedPrecision)) == 1


@pytest.mark.parametrize('args, kwargs, mode', [
    ((), {}, AMPMode.FP16), ((False,), {}, None), ((), dict(use_amp=False), None), ((), dict(to_fp16=False), None),
    ((), dict(use_amp=True), AMPMode.FP16), ((), dict(amp_mode=AMPMode.BF16), AMPMode.BF16), ((True, 'bf16'), {}, AMPMode.BF16)])
def test_calls_written_for_fastai(args, kwargs, mode):
    learn = learner().to_channelslast(*args, **kwargs)
    assert getattr(getattr(learn, 'mixed_precision', None), 'amp_mode', None) == mode and hasattr(learn, 'channels_last')


def test_callback_alone_gets_its_mixed_precision():
    "✗ fastai silently does nothing."
    learn = learner(cbs=ChannelsLast()).to_channelslast()
    assert hasattr(learn, 'mixed_precision') and len(learn._grab_cbs(ChannelsLast)) == 1


def test_fastais_callback_is_replaced():
    learn = learner(cbs=fastai_cl.ChannelsLast()).to_channelslast()
    assert [type(o) for o in learn._grab_cbs(fastai_cl.ChannelsLast)] == [ChannelsLast] and type(learn.channels_last) is ChannelsLast


@pytest.mark.parametrize('call, kept', [(dict(), True), (dict(to_fp16=False), True), (dict(amp_mode='fp16'), False),
                                        (dict(init_scale=2.), False)])
@pytest.mark.filterwarnings('ignore')
def test_mixed_precision_is_kept_unless_the_call_names_it(call, kept):
    learn = learner().to_bf16()
    mp = learn.mixed_precision
    learn.to_channelslast(**call)
    assert (learn.mixed_precision is mp) == kept and len(learn._grab_cbs(MixedPrecision)) == 1
    if not kept: assert learn.mixed_precision.amp_mode is AMPMode.FP16 and type(learn.mixed_precision) is DeviceMixedPrecision


def test_kept_cuda_only_mixed_precision_is_said():
    with pytest.warns(UserWarning, match=r"to_channelslast\(\) keeps fastai's own `MixedPrecision`, which works on CUDA only"): learner().to_fp16().to_channelslast()


@pytest.mark.parametrize('first', [lambda o: o, lambda o: o.to_fp16(), lambda o: o.to_bf16(), lambda o: o.to_channelslast(amp_mode='bf16')])
@pytest.mark.parametrize('then, mode', [(lambda o: o.to_fp16(), AMPMode.FP16), (lambda o: o.to_bf16(), AMPMode.BF16),
                                        (lambda o: o.to_fp16(amp_mode=AMPMode.BF16), AMPMode.BF16), (lambda o: o.to_fp16(init_scale=8.), AMPMode.FP16)])
def test_one_mixed_precision_at_a_time(first, then, mode):
    "✗ fastai adds a second callback: the loss is scaled twice. The new one is of this library's class if the old one was."
    learn = first(learner())
    ours = any(isinstance(o, DeviceMixedPrecision) for o in learn.cbs)
    assert then(learn) is learn
    mp, = learn._grab_cbs(MixedPrecision)
    assert mp.amp_mode is mode and isinstance(mp, DeviceMixedPrecision) == ours and learn.mixed_precision is mp


class OwnPrecision(MixedPrecision): pass


def test_mixed_precision_of_any_name_is_kept():
    learn = learner(cbs=OwnPrecision()).to_channelslast()
    assert [type(o) for o in learn._grab_cbs(MixedPrecision)] == [OwnPrecision] and hasattr(learn, 'channels_last')
    learn = learner().to_channelslast()
    del learn.mixed_precision  # as a `MixedPrecision` in `fit(cbs=…)` does
    assert len(learn.to_channelslast()._grab_cbs(MixedPrecision)) == 1


def test_no_second_precision_beside_the_non_native_one():
    learn = learner(cbs=NonNativeMixedPrecision())
    assert not learn.to_channelslast()._grab_cbs(MixedPrecision)
    with pytest.warns(UserWarning, match='ignores amp_mode: the Learner has `NonNativeMixedPrecision`'): learn.to_channelslast(amp_mode='fp16')
    assert not learn._grab_cbs(MixedPrecision)


@pytest.mark.parametrize('kwargs, match', [
    (dict(amp_mode='bf16', init_scale=2., enabled=False), 'ignores init_scale, enabled: bf16 needs no gradient scaling'),
    (dict(to_fp16=False, growth_factor=3.), 'ignores growth_factor: `to_fp16=False` adds no mixed precision'),
    (dict(to_fp16=False, amp_mode='bf16'), 'ignores amp_mode: `to_fp16=False` adds no mixed precision')])
def test_arguments_without_effect_are_said(kwargs, match):
    with pytest.warns(UserWarning, match=match): learner().to_channelslast(**kwargs)


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(initscale=1.), TypeError, "'initscale'.*init_scale, growth_factor, backoff_factor, growth_interval, enabled"),
    (dict(device='cpu'), TypeError, "'device'"),
    (dict(growth_factor=1.), ValueError, r'to_channelslast\(growth_factor=1.0\): use a number above 1'),
    (dict(growth_factor=float('nan')), ValueError, 'growth_factor=nan'),
    (dict(backoff_factor=0.), ValueError, r'to_channelslast\(backoff_factor=0.0\): use a number between 0 and 1'),
    (dict(backoff_factor=1.), ValueError, 'backoff_factor=1.0'),
    (dict(init_scale=0.), ValueError, r'to_channelslast\(init_scale=0.0\): use a number above 0'),
    (dict(init_scale=-1), ValueError, 'init_scale=-1'), (dict(init_scale='big'), ValueError, "init_scale='big'"),
    (dict(init_scale=None), ValueError, 'init_scale=None'), (dict(init_scale=float('inf')), ValueError, 'init_scale=inf'),
    (dict(growth_interval=0), ValueError, r'to_channelslast\(growth_interval=0\): use a whole number of at least 1'),
    (dict(growth_interval=1e3), ValueError, 'growth_interval=1000.0'), (dict(init_scale=1e39), ValueError, 'init_scale=1e.39'),
    (dict(enabled='yes'), ValueError, r"to_channelslast\(enabled='yes'\): use True or False"),
    (dict(amp_mode='fp8'), ValueError, r"to_channelslast\(amp_mode='fp8'\): pass 'fp16' or 'bf16'"),
    (dict(amp_mode=torch.float16), ValueError, 'amp_mode=torch.float16'),
    (dict(to_fp16='bf16'), ValueError, r"to_channelslast\(to_fp16='bf16'\): use True or False"),
    (dict(use_amp='fp16'), ValueError, "use_amp='fp16'")])
def test_wrong_arguments_fail_at_the_call(kwargs, error, match): raises_unchanged(learner(), error, match, **kwargs)


# to_contiguous

def test_there_and_back_leaves_no_stride_changed():
    "✗ fastai leaves the optimizer state in channels last."
    learn = learner(Mixed())
    learn.fit(1)
    before = strides(learn)
    learn.to_channelslast(to_fp16=False).fit(1)
    assert strides(learn) != before
    assert learn.to_contiguous() is learn and strides(learn) == before and not learn._grab_cbs(fastai_cl.ChannelsLast)
    learn.fit(1)
    assert strides(learn) == before


@pytest.mark.parametrize('to_fp32', [True, False])
def test_to_contiguous_removes_what_it_should(to_fp32):
    learn = learner().to_channelslast().to_contiguous(to_fp32=to_fp32)
    assert not hasattr(learn, 'channels_last') and hasattr(learn, 'mixed_precision') != to_fp32
    learn = learner(cbs=fastai_cl.ChannelsLast()).to_contiguous()
    assert not hasattr(learn, 'channels_last')


def test_to_contiguous_is_harmless():
    learn = learner()
    learn.fit(1)
    before, cbs = [p.clone() for p in learn.model.parameters()], list(learn.cbs)
    learn.to_contiguous(to_fp32=True)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters())) and list(learn.cbs) == cbs


# import order

@pytest.mark.parametrize('first, second', [('channelslast', 'fastai.vision.all'), ('fastai.vision.all', 'channelslast')])
def test_import_order(first, second):
    code = f"""
from {first} import *
from {second} import *
import channelslast
assert Learner.to_channelslast.__module__ == Learner.to_contiguous.__module__ == 'channelslast.learner.channels_last'"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_star_import_shadows_one_name():
    import channelslast, fastai.vision.all
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


@pytest.mark.parametrize('opt', [partial(SGD, mom=0.9), Adam, partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))], ids=['SGD', 'Adam', 'AdamW'])
def test_shared_memory_stays_shared(tmp_path, opt):
    "✗ If sharing ends, the two weights of a pair differ. This test runs all calls that copy or convert weights."
    runs = []
    for last in False, True:
        with less_random():
            learn = learner(Shared(), path=tmp_path/str(last), opt_func=opt, lr=1e-3)
            before, ptrs = strides(learn)[0], learn.model.ptrs
            assert ptrs[0] == ptrs[1] and ptrs[2] == ptrs[3]
            if last: learn.to_channelslast(to_fp16=False)
            learn.fit(1)
            learn.save('a')
            learn.fit(1)
            learn.load('a')
            learn.validate()
            learn.fit(1)
            if last:
                assert learn.model.c1.weight.is_contiguous(memory_format=CL) and learn.model.c1.weight.stride(1) == 1
                learn.format_find(num_it=1, show_plot=False)
                learn.format_summary()
                assert learn.model.ptrs == ptrs
                learn.to_contiguous()
            learn.fit(1)
            assert learn.model.ptrs == ptrs and strides(learn)[0] == before
            runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_measuring_keeps_what_is_shared():
    "Memory is shared inside `preserve_learner` too: a change of one weight changes the other."
    learn = learner(Shared())
    m, ptrs, before, own = learn.model, learn.model.ptrs, [p.detach().clone() for p in learn.model.parameters()], strides(learn)
    with preserve_learner(learn):
        inside = m.ptrs
        assert inside[0] == inside[1] and inside[2] == inside[3] and not {*inside} & {*ptrs}
        assert strides(learn) == own
        for a, b in zip(m.parameters(), before): assert torch.equal(a, b)
        with torch.no_grad():
            for p in m.parameters(): p += 1
        assert torch.equal(m.c3.weight[..., 1:2, 1:2], m.middle.weight) and torch.equal(m.c1.weight[..., 0, 0].t(), m.head.weight)
    assert m.ptrs == ptrs
    for a, b in zip(m.parameters(), before): assert torch.equal(a, b)


def test_one_channel_images_are_not_copied():
    "Both formats have the same order in memory, so only the strides of the batch change."
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    class Given(Seen): order = ChannelsLast.order - 1
    learner(net, loaders((1, 8, 8)), cbs=[ChannelsLast(), given := Given(), seen := Seen()]).fit(1)
    assert seen.batch[0].stride() == (64, 1, 8, 1) and seen.batch[0].data_ptr() == given.batch[0].data_ptr()
