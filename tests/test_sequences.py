"After any sequence of public calls, formats agree, no callback is there twice, and training is as without the library."
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import Adam, OptimWrapper, partial
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from channelslast import ChannelsLast, less_random
from .helpers import convnet, learner, loaders

FORMAT = {  # methods of this library
    'to_channelslast': lambda learn: learn.to_channelslast(), 'channels last in fp32': lambda learn: learn.to_channelslast(to_fp16=False),
    'bf16': lambda learn: learn.to_channelslast(amp_mode='bf16'), 'fp32_layers': lambda learn: learn.to_channelslast(fp32_layers='3'),
    'to_contiguous': lambda learn: learn.to_contiguous(), 'to_contiguous fp32': lambda learn: learn.to_contiguous(to_fp32=True),
    'format_summary': lambda learn: learn.format_summary(),
    'format_find': lambda learn: learn.format_find(num_it=1, show_plot=False), 'to_fastest': lambda learn: learn.to_fastest(num_it=1)}
FASTAI = {
    'fit': lambda learn: learn.fit(1), 'validate': lambda learn: learn.validate(), 'save': lambda learn: learn.save('a'),
    'load': lambda learn: learn.load('a') if (learn.path/'models/a.pth').exists() else None,
    'to_fp16': lambda learn: learn.to_fp16(), 'to_bf16': lambda learn: learn.to_bf16(), 'to_fp32': lambda learn: learn.to_fp32(),
    'freeze': lambda learn: learn.freeze(), 'unfreeze': lambda learn: learn.unfreeze()}
CALLS = FORMAT | FASTAI
OFTEN = ['fit']*6 + ['to_channelslast', 'to_contiguous', 'save', 'load']*2  # calls that create state, or move it
OPTIMIZERS = dict(Adam=Adam, AdamW=partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True)),
                  SGD=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9)))


def check(learn, since):
    cbs = learn.cbs
    assert sum(isinstance(o, FastaiChannelsLast) for o in cbs) <= 1 and sum(isinstance(o, MixedPrecision) for o in cbs) <= 1
    assert len({o.name for o in cbs}) == len(cbs)
    state = getattr(learn.opt, 'opt', learn.opt).state if learn.opt else {}
    four = [p for p in learn.model.parameters() if p.dim() == 4]
    for p in learn.model.parameters():
        if p.grad is not None: assert p.grad.stride() == p.stride(), since
        for v in state.get(p, {}).values():
            if isinstance(v, torch.Tensor) and v.shape == p.shape: assert v.stride() == p.stride(), since
    last = [p.stride(1) == 1 for p in four if p.shape[1] > 1 and p.shape[2] > 1] # otherwise both formats are the same
    if since in ('fit', 'validate'): assert all(last) == any(last) == any(isinstance(o, ChannelsLast) for o in cbs)
    if since.startswith('to_contiguous'): assert not any(isinstance(o, FastaiChannelsLast) for o in cbs) and all(p.is_contiguous() for p in four)
    assert not torch.is_autocast_enabled('cpu')


def run(calls, opt, path) -> list:
    "The losses and metrics of each fit and validation."
    results = []
    with less_random(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = convnet(c=3, n=4)
        split = lambda m: [list(m[:4].parameters()), list(m[4:].parameters())]
        learn = learner(model, loaders(n=16, shuffle=True), opt_func=OPTIMIZERS[opt], splitter=split, lr=1e-3, path=path)
        for name in calls:
            value = CALLS[name](learn)
            check(learn, name)
            if name == 'fit': results += [o.item() for o in learn.recorder.losses] + list(learn.recorder.values[-1])
            if name == 'validate': results += list(value)
    return results


def check_sequence(calls, opt, path):
    calls = [*calls, 'fit']
    results = run(calls, opt, path/'with')
    plain = run([c for c in calls if c in FASTAI], opt, path/'without')
    assert results == pytest.approx(plain, rel=2e-3, abs=1e-4)


SEQUENCES = dict(  # each call after each of those that may matter to it
    switches_between_fits=['fit', 'to_channelslast', 'fit', 'to_contiguous', 'fit', 'channels last in fp32', 'validate', 'to_contiguous fp32'],
    checkpoints_of_both_formats=['fit', 'save', 'to_channelslast', 'load', 'fit', 'save', 'to_contiguous', 'load', 'fit', 'bf16', 'fit', 'load'],
    precisions=['to_channelslast', 'to_bf16', 'fit', 'to_fp16', 'bf16', 'fp32_layers', 'fit', 'to_fp32', 'to_channelslast', 'to_fp32', 'validate'],
    measuring_between_fits=['fit', 'format_find', 'channels last in fp32', 'format_summary', 'fit', 'to_fastest', 'fit', 'format_find', 'to_contiguous fp32'],
    frozen_layers=['freeze', 'fit', 'to_channelslast', 'fit', 'unfreeze', 'fit', 'to_fastest', 'freeze', 'to_contiguous', 'validate', 'unfreeze'])


@pytest.mark.parametrize('name, opt', zip(SEQUENCES, ['AdamW', 'AdamW', 'Adam', 'SGD', 'Adam']))
def test_training_is_the_same_with_a_sequence_of_calls_as_without_them(has, tmp_path, name, opt):
    has()  # fp32 on every machine: this tests state, not rounding
    check_sequence(SEQUENCES[name], opt, tmp_path)


@pytest.mark.slow
def test_training_is_the_same_with_many_sequences_of_calls_as_without_them(has):
    has()
    @settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck])
    @given(calls=st.lists(st.sampled_from([*CALLS, *OFTEN]), min_size=4, max_size=14), opt=st.sampled_from(list(OPTIMIZERS)))
    def _any_sequence(calls, opt):
        with tempfile.TemporaryDirectory() as path: check_sequence(calls, opt, Path(path))
    _any_sequence()
