"Mixed precision on the model's device."
import warnings

import pytest
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import Callback, CancelBatchException, Learner
from torch import nn

from channelslast.core.devices import autocast_is_fast
from .helpers import PretendGPU, convnet, learner, loaders

HALF = dict(bf16=torch.bfloat16, fp16=torch.float16)


def dtypes(learn):
    "The output dtypes of the first convolution during one fit."
    seen = set()
    h = learn.model[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    learn.fit(1)
    h.remove()
    return seen


def messages(f):
    "The messages of the warnings that `f` gives."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in w if issubclass(o.category, UserWarning)]


@pytest.mark.parametrize('features, fast', [((), True), (('avx512', 'avx512_bf16'), True), (('avx512', 'amx_tile'), True),
                                            (('avx512',), False)])
def test_autocast_is_fast_on_a_cpu_only_with_instructions_for_bf16(monkeypatch, features, fast):
    """PyTorch reports two types as supported that oneDNN emulates: bf16 on CPUs with AVX512 but without AVX512-BF16 and
    AMX, and the gradients in fp16 on Xeons with AVX512-FP16."""
    class Ops: _is_mkldnn_fp16_supported = _is_mkldnn_bf16_supported = staticmethod(lambda: True)
    monkeypatch.setattr(torch.ops, 'mkldnn', Ops)
    for o in 'avx512', 'avx512_bf16', 'amx_tile':
        monkeypatch.setattr(torch.cpu, f'_is_{o}_supported', lambda o=o: o in features)
    assert autocast_is_fast('cpu', AMPMode.BF16) == fast and not autocast_is_fast('cpu', AMPMode.FP16)
    monkeypatch.setattr(torch.ops, 'mkldnn', object())  # a PyTorch without oneDNN
    assert not autocast_is_fast('cpu', AMPMode.BF16) and not autocast_is_fast('meta', AMPMode.FP16)


@pytest.mark.parametrize('mode', HALF)
def test_layers_run_in_half_precision_on_a_cpu_without_warnings(has, mode):
    "fastai's `MixedPrecision` uses `'cuda'` on every device: on a CPU it trains in fp32 with two warnings."
    has('fp16', 'bf16')
    learn = learner(dls=loaders(n=8)).to_channelslast(amp_mode=mode)
    assert messages(lambda: learn.fit(1)) == [] and dtypes(learn) == {HALF[mode]}
    assert learn.model[0].weight.dtype == torch.float32 and torch.isfinite(learn.recorder.losses[-1])


HINT = '`learn.to_fp32()` (bf16 is fast on x86 CPUs with AVX512-BF16 or AMX)'


@pytest.mark.parametrize('fast, mode, advice', [
    ((), 'fp16', HINT), ((), 'bf16', HINT), (('bf16',), 'fp16', "`learn.to_channelslast(amp_mode='bf16')` (fast here) or `learn.to_fp32()`"),
    (('fp16',), 'bf16', "`learn.to_channelslast(amp_mode='fp16')` (fast here) or `learn.to_fp32()`")])
def test_a_dtype_that_is_slow_on_the_cpu_warns_once_and_trains_in_fp32(has, fast, mode, advice):
    has(*fast)
    learn = learner(dls=loaders(n=8)).to_channelslast(amp_mode=mode)
    warned = messages(lambda: (learn.fit(1), learn.fit(1), learn.validate()))
    assert warned == [f'{mode} is slow on this CPU, so training continues in fp32. To avoid this warning, call {advice}.']
    assert dtypes(learn) == {torch.float32}


@pytest.mark.parametrize('device', ['cuda', 'mps', 'xpu'])
@pytest.mark.parametrize('fast, advice', [((), '`learn.to_fp32()`'), (('bf16',), "`learn.to_channelslast(amp_mode='bf16')` (fast here) or `learn.to_fp32()`")])
def test_a_dtype_that_is_slow_on_another_device_warns_once_and_trains_in_fp32(has, monkeypatch, device, fast, advice):
    has(*fast)
    with PretendGPU(monkeypatch, device) as gpu:
        learn = gpu.learner(dls=loaders(n=8)).to_channelslast()
        warned = messages(lambda: (learn.validate(), learn.validate()))
    assert [o for o in warned if o.startswith('fp16')] == [
        f'fp16 is unsupported or no faster than fp32 on this {device.upper()} device, so training continues in fp32. To avoid this warning, call {advice}.']


class Scaler(Callback):
    "Keeps the gradient scaler that the batches see."
    order = 50
    def before_batch(self): self.seen = self.learn.scaler


def test_arguments_of_the_gradient_scaler_reach_it(has):
    has('fp16')
    args = dict(init_scale=128., growth_factor=3., backoff_factor=0.25, growth_interval=7)
    learn = learner(dls=loaders(n=8), cbs=(cb := Scaler())).to_channelslast(**args)
    learn.fit(1)
    s = cb.seen
    assert (s.get_scale(), s.get_growth_factor(), s.get_backoff_factor(), s.get_growth_interval()) == (128., 3., 0.25, 7) and s.is_enabled()


@pytest.mark.parametrize('kwargs, on', [(dict(), True), (dict(enabled=False), False), (dict(amp_mode='bf16'), False)])
def test_the_scaler_is_on_in_fp16_unless_enabled_is_False_in_every_fit(has, kwargs, on):
    "fastai overwrites `enabled=False` with True."
    has('fp16', 'bf16')
    learn = learner(dls=loaders(n=8), cbs=(cb := Scaler())).to_channelslast(**kwargs)
    for _ in range(2):
        learn.fit(1)
        assert cb.seen.is_enabled() == on


def test_the_scaler_is_off_where_training_stays_in_fp32(has):
    has()
    learn = learner(dls=loaders(n=8), cbs=(cb := Scaler())).to_channelslast()
    messages(lambda: learn.fit(1))
    assert not cb.seen.is_enabled()


def test_two_scales_give_the_same_steps(has):
    has('fp16')
    runs = []
    for scale in 1., 1024.:
        torch.manual_seed(0)
        learn = learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)), loaders(n=16), lr=1e-3)
        learn.to_channelslast(init_scale=scale).fit(1)
        runs.append([p.detach() for p in learn.model.parameters()])
    for a, b in zip(*runs): torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_the_mixed_precision_is_a_fastai_MixedPrecision_with_all_its_events(has):
    has('bf16')
    learn = learner().to_channelslast(amp_mode='bf16')
    assert isinstance(learn.mixed_precision, MixedPrecision) and learn.mixed_precision.name == 'mixed_precision'
    events = [o for o in vars(MixedPrecision) if o.startswith(('before_', 'after_'))]
    assert all(hasattr(learn.mixed_precision, o) for o in events)
    assert not hasattr(learn.to_fp32(), 'mixed_precision')


def autocast_on(): return torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('where', ['model', 'loss', 'callback', 'cancel', 'interrupt'])
def test_autocast_and_fp32_layers_end_with_the_batch_even_if_it_raises_or_is_canceled(has, where):
    "fastai leaves autocast on if the model or the loss raises: the rest of the session runs in half precision."
    has('bf16')
    class Boom(nn.Module):
        def forward(self, x):
            if where == 'model': raise RuntimeError('boom')
            if where == 'interrupt': raise KeyboardInterrupt
            return x
    class Cb(Callback):
        order = 20
        def after_pred(self):
            if where == 'callback': raise RuntimeError('boom')
            if where == 'cancel': raise CancelBatchException
    def loss(p, y): raise RuntimeError('boom') if where == 'loss' else None
    learn = Learner(loaders(n=8), nn.Sequential(convnet(), Boom()), loss, cbs=Cb()).to_channelslast(amp_mode='bf16', fp32_layers=nn.Linear)
    if where == 'cancel': learn.fit(1)
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)): learn.fit(1)
    assert not autocast_on() and not any('forward' in vars(m) for m in learn.model.modules())


@pytest.mark.parametrize('how', ['second', 'removed', 'fastai'])
def test_autocast_ends_with_the_batch_if_the_callback_is_doubled_removed_or_fastais(has, how):
    has('bf16')
    class Cb(Callback):
        order = 50
        def before_batch(self):
            if how == 'removed': self.learn.to_fp32()
    class Cpu(MixedPrecision):
        def before_fit(self): self.autocast, self.learn.scaler = torch.autocast('cpu'), torch.amp.GradScaler('cpu', enabled=False)
        def before_step(self): pass
        def after_step(self): pass
    learn = learner(cbs=Cb())
    if how != 'fastai': learn.to_channelslast(amp_mode='bf16')
    if how != 'removed':
        learn.add_cb(Cpu('bf16'))
        learn.loss_func = lambda p, y: 1/0
        with pytest.raises(ZeroDivisionError): learn.fit(1)
    else: learn.fit(1)
    assert not autocast_on() and torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0


@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_layers_run_in_half_precision_on_cuda(mode):
    learn = learner(dls=loaders().to(torch.device('cuda'))).to_channelslast(amp_mode=mode)
    assert dtypes(learn) == {HALF[mode]}
