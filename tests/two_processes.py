"Run by test_distributed.py in each of two processes: `torchrun --nproc_per_node 2 two_processes.py folder`."
import json
import os
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from fastai.distributed import DistributedDL, num_distrib, rank_distrib
from fastai.vision.all import ConvLayer, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, noop
from torch import nn
from torch.utils.data import TensorDataset

from channelslast import ChannelsLast, less_random
from channelslast.core import devices
from tests.helpers import Clock, Steep, setting_of

folder, rank, clock = Path(sys.argv[1]), rank_distrib(), Clock()


# fastai moves the shuffled indices to the GPU ("nccl only works with cuda tensors"); gloo broadcasts CPU tensors
def broadcast(self, t, rank):
    t = torch.tensor(list(t))
    torch.distributed.broadcast(t, rank)
    return t.tolist()


DistributedDL._broadcast = broadcast


def end_with(parent):
    "End this process, which may wait for the other one forever, when the launcher is gone, as after a timeout."
    while os.getppid() == parent: time.sleep(1)
    os._exit(1)


def has(*modes): devices.autocast_is_fast = lambda device, amp_mode: amp_mode.value in modes


def make(seed=0):
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(32, 3, 16, 16), torch.randint(0, 4, (32,)))
    dl = [DataLoader(data, bs=4, shuffle=s, num_workers=0) for s in (True, False)]
    model = nn.Sequential(ConvLayer(3, 8), ConvLayer(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return Learner(DataLoaders(*dl, device=torch.device('cpu')), model, CrossEntropyLossFlat(), lr=1e-3,
                   opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))


def train(switch, inside=False):
    with less_random():
        learn = make() if inside else switch(make())
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
            if inside: switch(learn)
            learn.fit(2)
    return learn


def watched_layers() -> dict:
    "The dtypes of two layers' outputs. `fp32_layers` refers to the user's own modules, also inside DistributedDataParallel."
    dtypes = {}
    def _switch(learn):
        for name in '0.0', '1.0':
            learn.model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: dtypes.update({name: str(out.dtype)}))
        return learn.to_channelslast(amp_mode='bf16', fp32_layers='0.0')
    has('bf16')
    train(_switch)
    return dtypes


def fake_steps(ms_of):
    "A step takes `ms_of(setting)` milliseconds. Returns the list of the settings of all steps."
    settings = []
    def _one_batch(self, *args):
        real_one_batch(self, *args)
        settings.append(setting_of(self))
        clock.pass_ms(ms_of(settings[-1]))
    Learner.one_batch = _one_batch
    return settings


class Second(nn.Module):
    "Applies `f` in the second process only, or in both."
    def __init__(self, f, both): super().__init__(); self.f, self.both = f, both
    def forward(self, x): return self.f(x) if rank or self.both else x


class Timed(nn.Conv2d):
    "In the first process slow in half precision, in the second one slow in fp32."
    def forward(self, x):
        clock.pass_ms(10 if torch.is_autocast_enabled('cpu') != bool(rank) else 1)
        return super().forward(x)


def fails(error, when=lambda x: True):
    def _f(x):
        if when(x): raise error
        return x
    return _f


def is_last(x): return x.is_contiguous(memory_format=torch.channels_last)


def measure(f=noop, both=False, fast=(), layer=None, **kwargs):
    "Rows and notes of `format_find`, or its error, where `f` is part of the model in the second process."
    has(*fast)
    learn = make()
    learn.model.insert(1, layer or Second(f, both))
    try:
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
            t = learn.format_find(num_it=2, show_plot=False, **kwargs)
        return [[r.precision, r.note, r.valid] for r in t.rows], t.notes
    except Exception as e: return f'{type(e).__name__}: {e}'


threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
real_one_batch = Learner.one_batch
with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'fp16 is slow on this CPU')
    has()
    facts = dict(world=num_distrib())
    try: make().to_fastest(num_it=2)
    except ValueError as e: facts['refused'] = str(e)
    learns = dict(last=train(lambda o: o.to_channelslast()), inside=train(lambda o: o.to_channelslast(), inside=True),
                  callback=train(lambda o: o.add_cb(ChannelsLast())), contiguous=train(noop))
    torch.save({k: [p.detach().contiguous() for p in v.model.parameters()] for k, v in learns.items()}, folder/f'{rank}.pt')
    facts.update(last=is_last(learns['last'].model[0][0].weight), dtypes=watched_layers())

    # alone, each process would decide differently
    has()
    time.perf_counter = clock
    settings = fake_steps(lambda setting: 1. if ('channels last' in setting) == bool(rank) else 2.)
    learn = make()
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
        learn.to_fastest(num_it=2)
        learn.fit(1)
        settings.clear()
        predictions = learn.format_find(train=False, num_it=2, show_plot=False).best
    best = learn.format_timings.best
    facts.update(best=[best.memory_format, round(best.ms, 3)], predictions=predictions.memory_format, settings=settings,
                 cbs=sorted(type(o).__name__ for o in learn.cbs))

    # what goes wrong in the second process alone reaches both
    fake_steps(lambda setting: 1.)
    oom = torch.OutOfMemoryError('out of memory')
    second = Second(fails(oom, lambda x: is_last(x) and not second.training), both=False)  # only the comparison is in eval mode
    facts['alone'] = dict(
        layers=measure(fast=['bf16'], layer=Timed(8, 8, 1)), memory=measure(fails(oom, is_last)),
        predictions=measure(fails(oom, is_last), train=False), halves=measure(fails(oom, lambda x: len(x) > 2)),
        infinite=measure(lambda x: x/0 if is_last(x) else x), numbers=measure(lambda x: x.flip(1) if is_last(x) else x),
        other_predictions=measure(lambda x: x.flip(1) if is_last(x) else x, train=False),
        comparison=measure(layer=second), two_errors=measure(fails(oom if rank else KeyError('mine')), both=True), error=measure(fails(KeyError('mine'))),
        skips=measure(Steep.apply if rank else noop, fast=['fp16'], formats='contiguous'))
    (folder/f'{rank}.json').write_text(json.dumps(facts))
# sometimes a C++ thread aborts the exit after everything is written: exit without destructors
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
