"Run by test_distributed.py in each of two processes: `torchrun --nproc_per_node 2 two_processes.py folder`."
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from fastai.distributed import DistributedDL
from fastai.vision.all import *
from torch.utils.data import TensorDataset

from channelslast import ChannelsLast, less_random
from channelslast.core import devices
from channelslast.find import predict_benchmark, train_benchmark
from tests.conftest import Steep

# fastai moves the shuffled indices to the GPU ("nccl only works with cuda tensors"); gloo broadcasts CPU tensors
def _broadcast(self, t, rank):
    t = torch.tensor(list(t))
    torch.distributed.broadcast(t, rank)
    return t.tolist()


DistributedDL._broadcast = _broadcast
devices.autocast_is_fast = lambda device, amp_mode: False  # fp32 on every machine
folder, rank = Path(sys.argv[1]), rank_distrib()


def make(seed=0):
    torch.manual_seed(seed)
    data = TensorDataset(torch.randn(32, 3, 16, 16), torch.randint(0, 4, (32,)))
    dl = [DataLoader(data, bs=4, shuffle=s, num_workers=0) for s in (True, False)]
    model = nn.Sequential(ConvLayer(3, 8), ConvLayer(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return Learner(DataLoaders(*dl, device=torch.device('cpu')), model, CrossEntropyLossFlat(), lr=1e-3,
                   opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))


def train(switch, inside):
    with less_random():
        learn = make() if inside else switch(make())
        with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
            if inside: switch(learn)
            learn.fit(2)
    return learn


with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'fp16 is slow on this CPU')
    try: make().to_fastest(num_it=2)
    except ValueError as e: refused = str(e)
    learns = {'last': train(lambda o: o.to_channelslast(), False), 'inside': train(lambda o: o.to_channelslast(), True),
              'callback': train(lambda o: o.add_cb(ChannelsLast()), False), 'contiguous': train(noop, False)}
    torch.save({k: [p.detach().contiguous() for p in v.model.parameters()] for k, v in learns.items()}, folder/f'{rank}.pt')
    last = learns['last'].model[0][0].weight.is_contiguous(memory_format=torch.channels_last)

    # names refer to the user's own modules, also inside DistributedDataParallel
    devices.autocast_is_fast = lambda device, amp_mode: amp_mode.value == 'bf16'
    dtypes = {}
    def watch(learn):
        for i in 0, 1:
            def _seen(*args, i=i, real=(m := learn.model[i][0])._conv_forward):
                dtypes[f'{i}.0'] = str(args[0].dtype), str(args[1].dtype)
                return real(*args)
            m._conv_forward = _seen
        return learn.to_channelslast(amp_mode='bf16', fp32_layers='0.0')
    train(watch, False)
    devices.autocast_is_fast = lambda device, amp_mode: False

    # alone, each process would decide differently
    real = train_benchmark.step_ms
    def _ms(learn, batch):
        real(learn, batch)
        return 1. if bool(learn._grab_cbs(ChannelsLast)) == bool(rank) else 2.
    train_benchmark.step_ms = predict_benchmark.step_ms = _ms
    tried, warm_up = [], predict_benchmark.PredictBenchmark.warm_up
    def _warm_up(self, candidates):
        tried.append([c.key for c in candidates])
        return warm_up(self, candidates)
    predict_benchmark.PredictBenchmark.warm_up = _warm_up
    learn = make()
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
        learn.to_fastest(num_it=2)
        learn.fit(1)
        predictions = learn.format_find(train=False, num_it=2, show_plot=False).best
    best = learn.format_timings.best

    # what goes wrong in the second process alone reaches both
    train_benchmark.step_ms = predict_benchmark.step_ms = real
    class Second(nn.Module):
        def __init__(self, f, both): super().__init__(); self.f, self.both = f, both
        def forward(self, x): return self.f(x) if rank or self.both else x
    def fails(error, when):
        def _f(x):
            if when(x): raise error
            return x
        return _f
    def is_last(x): return x.is_contiguous(memory_format=torch.channels_last)
    def is_large(x): return len(x) > 2
    oom = torch.OutOfMemoryError('out of memory')
    def measure(f=noop, names=None, accelerated='', both=False, **kwargs):
        devices.autocast_is_fast = lambda device, amp_mode: amp_mode.value == accelerated
        learn = make()
        learn.model.insert(1, Second(f, both))
        original = train_benchmark.fp32_names
        if names: train_benchmark.fp32_names = lambda rows, half: names[rank]
        try:
            with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
                t = learn.format_find(num_it=2, show_plot=False, **kwargs)
            return [[r.precision, r.note, r.valid] for r in t.rows], t.notes
        except Exception as e: return f'{type(e).__name__}: {e}'
        finally: train_benchmark.fp32_names = original
    alone = dict(
        layers=measure(names=[['0.0'], []], accelerated='bf16'), memory=measure(fails(oom, is_last)),
        predictions=measure(fails(oom, is_last), train=False), halves=measure(fails(oom, is_large)),
        infinite=measure(lambda x: x/0 if is_last(x) else x), numbers=measure(lambda x: x.flip(1) if is_last(x) else x),
        other_predictions=measure(lambda x: x.flip(1) if is_last(x) else x, train=False),
        two_errors=measure(fails(oom if rank else KeyError('mine'), lambda x: True), both=True), error=measure(fails(KeyError('mine'), lambda x: True)), skips=measure(Steep.apply if rank else noop, accelerated='fp16', formats='contiguous'))
    (folder/f'{rank}.json').write_text(json.dumps(dict(last=last, dtypes=dtypes, world=num_distrib(), best=[best.memory_format, best.ms], refused=refused, tried=tried,
        predictions=predictions.memory_format, alone=alone, cbs=sorted(type(o).__name__ for o in learn.cbs), loss=learn.recorder.losses[-1].item())))
# sometimes a C++ thread aborts the exit after everything is written: exit without destructors
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
