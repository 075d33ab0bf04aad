"""`channelslast bench`: does `format_find` pick well, and what is the pick worth? Judged by an independent, longer
measurement."""
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import fastai
import pandas as pd
import torch
from fastcore.script import store_true
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, resnet18, unet_learner, xresnet18
from torchvision.models import get_model

from .. import less_random
from ..candidates import apply
from ..devices import elapsed_ms
from ..layers import fp32_names
from ..memory_format import FORMATS, cast_tree
from ..precision import fp32_forward
from ..race import fastest
from ..timings import label
from ..trial import step_ms
from ..workarounds import replace_forwards
from .classifiers import Mistake, build, pick_device

DISTURBED = 1.25  # the median step over the fastest, from which on the judge was not alone

# pixels and images a batch on a CPU; on a GPU, 224 and 128
PANEL = dict(resnet18=(128, 16), resnet50=(96, 16), densenet121=(64, 16), mobilenet_v2=(96, 16),
             mobilenet_v3_small=(128, 16), efficientnet_b0=(96, 16), shufflenet_v2_x1_0=(128, 16),
             convnext_tiny=(64, 16), vgg11_bn=(64, 16), regnet_y_400mf=(96, 16), vit_b_16=(96, 8), unet=(64, 8),
             r3d_18=(56, 4), xresnet18=(128, 16))


def make_learner(name, size, bs, device) -> Learner:
    "A Learner on random images: the time of a step does not depend on what they show."
    shape, target = (3, 8, size, size) if name == 'r3d_18' else (3, size, size), torch.tensor(1)
    if name == 'unet': target = torch.ones(size, size, dtype=torch.int64)
    dl = DataLoader([(torch.randn(shape), target) for _ in range(2*bs)], bs=bs, device=device, drop_last=True)
    dls = DataLoaders(dl, dl, device=device)
    if name == 'unet': learn = unet_learner(dls, resnet18, n_out=2, pretrained=False, normalize=False,
                                            loss_func=CrossEntropyLossFlat(axis=1))
    else:
        if name == 'xresnet18': model = xresnet18(n_out=10)
        elif name == 'r3d_18': model = get_model(name, weights=None, num_classes=10)
        else: model = build(name, 10, size)
        learn = Learner(dls, model, CrossEntropyLossFlat())
    return learn.remove_cbs(learn._grab_cbs(type(learn.progress)) if hasattr(learn, 'progress') else [])


def stepper(learn, batch):
    "A function that times a training step of this Learner, as inside a fit, learning rate 0."
    learn.create_opt()
    learn.opt.set_hypers(lr=0.)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    learn.n_iter = 10**6
    return partial(step_ms, learn, batch)


def bare(learn, batch, row, layers=()):
    """The same step in a plain PyTorch loop: this format and precision, the Learner's optimizer and loss, the same
    layers in fp32, nothing else."""
    fmt = torch.contiguous_format if row.memory_format == 'contiguous' else FORMATS[batch[0].dim()]
    half, _, tuned = row.precision.partition('+')
    device, dtype = batch[0].device, dict(fp16=torch.float16, bf16=torch.bfloat16).get(half)
    model, x, y = learn.model.to(device).train(), batch[0].to(memory_format=fmt), batch[1]
    for p in model.parameters():
        if p.dim() == x.dim(): p.data = p.data.to(memory_format=fmt)
    opt = learn.opt_func(learn.splitter(model), lr=0.)
    kept = [model.get_submodule(n) for n in fp32_names(layers, half)] if tuned else ()
    replace_forwards(kept, lambda m, forward: fp32_forward(forward, device.type, dtype), {})
    scaler = torch.amp.GradScaler(device.type, enabled=half == 'fp16')
    def _step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None): loss = learn.loss_func(model(x), y)
        scaler.scale(loss).backward()
        if scaler.is_enabled(): scaler.step(opt); scaler.update()
        else: opt.step()
        opt.zero_grad()
    return partial(elapsed_ms, device, _step)


def interleaved(steps, n) -> dict:
    "Milliseconds of each in `n` rounds, back and forth after two to warm up."
    ms = {k: [] for k in steps}
    for i in range(n + 2):
        for k in list(steps)[::(-1)**i]: ms[k].append(steps[k]())
    return {k: v[2:] for k, v in ms.items()}


def disturbed(ms) -> bool:
    "Did something else take the machine's time while these steps ran? Half of them, and more, took much longer."
    return statistics.median(statistics.median(v)/fastest(v) for v in ms.values()) > DISTURBED


@contextmanager
def company():
    "While this runs, another process computes in bursts; it ends with the block, with this process, or after an hour."
    busy = subprocess.Popen([sys.executable, Path(__file__).with_name('busy.py')], stdin=subprocess.PIPE)
    try: yield busy
    finally:
        busy.kill()
        busy.wait()


def judge(name, size, bs, device, num_it, busy=False) -> dict:
    "One row of the table; with `busy` the pick is made beside another process, and judged without it."
    with less_random():
        learn = make_learner(name, size, bs, device)
        start = time.perf_counter()
        with company() if busy else nullcontext(): timings = learn.format_find(show_plot=False)
        took, pick = time.perf_counter() - start, timings.best
        batch = learn._set_device(learn.dls.one_batch())
        steps = {label(r): stepper(apply(deepcopy(learn), r, timings.layers), batch) for r in timings.rows if r.ms}
        steps['bare'] = bare(deepcopy(learn), batch, pick, timings.layers)
        own = deepcopy(learn).add_cbs([FastaiChannelsLast(), MixedPrecision()])
        try: steps['fastai'] = stepper(own, batch)
        except RuntimeError: pass  # a Conv3d: fastai's callback can't
        times = interleaved(steps, num_it)
        ms = {k: fastest(v) for k, v in times.items()}
    mine, best = ms[label(pick)], min(ms[label(r)] for r in timings.rows if r.ms)
    fastais = f"{ms['fastai']/mine:.2f}×" if 'fastai' in ms else 'fails'
    single = min(ms[label(r)] for r in timings.rows if r.ms and '+' not in r.precision)
    tuned = [ms[label(r)] for r in timings.rows if r.ms and '+' in r.precision]
    return {'model': name, 'px': size, 'batch': bs, 'pick': label(pick), 'ms/step': f'{mine:.1f}',
            'pick/best': f'{mine/best:.2f}', 'over contiguous fp32': f"{ms['contiguous, fp32']/mine:.2f}×",
            "over fastai's own": fastais, 'tuned over single': f'{single/min(tuned):.2f}×' if tuned else '–',
            'step/bare loop': f"{mine/ms['bare']:.2f}", 'find took': f'{took:.0f} s',
            'judged': 'disturbed' if disturbed(times) else 'in quiet'}


def overhead(device, n=20) -> str:
    "What the callback costs where there is nothing left to cast, and what casting a batch does."
    learn = make_learner('resnet152', 64, 2, device).to_channelslast(to_fp16=False)
    learn.create_opt()
    learn.model.to(device)
    batch = torch.randn(64, 3, 224, 224, device=device)
    work = dict(fit=lambda: learn.channels_last('before_fit'), batch=lambda: cast_tree(batch, {4}))
    ms = interleaved({k: partial(elapsed_ms, device, f) for k, f in work.items()}, n)
    ms = {k: fastest(v) for k, v in ms.items()}
    return (f"before_fit of a ResNet-152 that is channels last already: {ms['fit']:.1f} ms a fit; "
            f"casting a batch of 64×3×224×224: {ms['batch']:.1f} ms")


def summary(rows) -> str:
    "All rows in a line."
    def _numbers(column): return [float(r[column].rstrip('× s')) for r in rows]
    off, over, took = map(_numbers, ('pick/best', 'over contiguous fp32', 'find took'))
    return (f'{sum(o <= 1.05 for o in off)} of {len(off)} picks within 5 % of the best; over contiguous fp32 at least '
            f'{min(over):.2f}×; format_find took {sum(took):.0f} s')


def versions(device) -> str:
    "Machine and versions, for the line above the table."
    if device.type == 'cuda': machine = torch.cuda.get_device_name(device)
    else:
        try: machine = next(o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name'))
        except (OSError, StopIteration): machine = platform.processor() or platform.machine()
        machine += f', {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return f'{machine}; PyTorch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}'


def main(
    models: str = '', # Names of the panel or of any classifier, with commas; without them, the whole panel
    size: int = 0, # Pixels; 0: the panel's own on a CPU, 224 on a GPU
    bs: int = 0, # Images a batch; 0: the panel's own on a CPU, 128 on a GPU
    device: str = None, # cpu, cuda, cuda:1, mps…; without it, the fastest there is
    num_it: int = 20, # Timed steps of each candidate, by the judge
    busy: store_true = False, # Pick beside a second process that computes in bursts; judge without it
):
    "Measure what format_find picks for a panel of models against an independent, longer measurement."
    if num_it < 1: raise Mistake(f'--num-it {num_it}: must be above 0')
    device = pick_device(device)
    names = [o.strip() for o in models.split(',') if o.strip()] or list(PANEL)
    for n in names:
        if n not in PANEL: build(n, 10, size or 64)  # a wrong name shows before anything is measured
    print(versions(device), flush=True)
    rows, small = [], device.type == 'cpu'
    for n in names:
        px, images = PANEL.get(n, (64, 16)) if small else (224, 128)
        rows.append(judge(n, size or px, bs or images, device, num_it, busy))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    print()
    print(pd.DataFrame(rows).to_string(index=False))
    print(summary(rows))
    print(overhead(device))
