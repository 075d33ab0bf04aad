"Is the pick of `format_find` the fastest? An independent, longer measurement of one model, in training or predicting."
import gc
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from fastai.torch_core import to_device
from torch import nn

from .. import less_random
from ..core.autocast import fp32_forward
from ..core.devices import elapsed_ms
from ..core.glibc_malloc import keep_memory
from ..core.memory_format import CHANNELS_LAST_FORMATS
from ..core.undo import ForwardPatch
from ..find.candidates import apply_timing
from ..find.layer_timing import fp32_names
from ..find.results import label
from ..find.selection import fastest
from ..find.train_benchmark import MAX_SKIPS, step_ms, step_was_skipped
from .models import make_learner

FRESH_COPIES = 6
DISTURBED = 1.25  # the median step over the fastest, from which on the judge was not alone


def timed_fit_step(learn, batch):
    "A function that times a training step of this Learner, as inside a fit, learning rate 0."
    learn.create_opt()
    learn.opt.set_hypers(lr=0.)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    learn.n_iter = 10**6
    return partial(until_not_skipped, partial(step_ms, learn, batch), partial(step_was_skipped, learn))


def until_not_skipped(step, was_skipped) -> float:
    "Milliseconds of a step that the gradient scaler does not skip: its scale starts too high for most models."
    for _ in range(MAX_SKIPS):
        ms = step()
        if not was_skipped(): return ms
    raise RuntimeError(f'the gradient scaler skipped {MAX_SKIPS} steps in a row')


def plain_loop(learn, batch, row, layers=()):
    """The same step in a plain PyTorch loop: this format and precision, the Learner's optimizer and loss, the same
    layers in fp32, nothing else."""
    fmt = torch.contiguous_format if row.memory_format == 'contiguous' else CHANNELS_LAST_FORMATS[batch[0].dim()]
    half, _, tuned = row.precision.partition('+')
    device, dtype = batch[0].device, dict(fp16=torch.float16, bf16=torch.bfloat16).get(half)
    model, x, y = learn.model.to(device).train(), batch[0].to(memory_format=fmt), batch[1]
    for p in model.parameters():
        if p.dim() == x.dim(): p.data = p.data.to(memory_format=fmt)
    opt = learn.opt_func(learn.splitter(model), lr=0.)
    kept = [model.get_submodule(n) for n in fp32_names(layers, half)] if tuned else ()
    ForwardPatch(kept, lambda m, forward: fp32_forward(forward, device.type, dtype)).apply()
    scaler = torch.amp.GradScaler(device.type, enabled=half == 'fp16')
    def _step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None): loss = learn.loss_func(model(x), y)
        scaler.scale(loss).backward()
        if scaler.is_enabled(): scaler.step(opt); scaler.update()
        else: opt.step()
        opt.zero_grad()
    scale = scaler.get_scale
    def _ms():
        nonlocal scaled
        scaled = scale()
        return elapsed_ms(device, _step)
    scaled = None
    return partial(until_not_skipped, _ms, lambda: scale() < scaled)


def interleaved(steps, n) -> dict:
    "Milliseconds of each in `n` rounds, back and forth after one to warm up."
    ms = {k: [] for k in steps}
    for i in range(n + 1):
        for k in list(steps)[::(-1)**i]: ms[k].append(steps[k]())
    return {k: v[1:] for k, v in ms.items()}


def on_fresh_copies(make, n) -> dict:
    """Milliseconds of each in `n` rounds, on several new sets of copies that `make()` gives: where in memory a copy
    happens to lie makes steps of large models 5 to 15 % longer. Each set gets new memory, and keeps it: handing it out
    anew in each step is else half of a large model's on a CPU, and much of its noise."""
    ms, sets = {}, min(n, FRESH_COPIES)
    for _ in range(sets):
        gc.collect()  # Learners are cycles: the last set would else stay beside the next
        keep_memory(False)
        keep_memory()
        for k, v in interleaved(make(), -(-n//sets)).items(): ms[k] = ms.get(k, []) + v
    keep_memory(False)
    return ms


def is_noisy(ms) -> bool:
    "Did something else take the machine's time while these steps ran? Half of them, and more, took much longer."
    return statistics.median(statistics.median(v)/fastest(v) for v in ms.values()) > DISTURBED


@contextmanager
def background_load():
    "While this runs, another process computes in bursts; it ends with the block, with this process, or after an hour."
    busy = subprocess.Popen([sys.executable, Path(__file__).with_name('load_generator.py')], stdin=subprocess.PIPE)
    try: yield busy
    finally:
        busy.kill()
        busy.wait()


def timed_search(learn, busy, **kwargs) -> tuple: # `FormatTimings`; seconds
    "What `format_find` says, beside a busy process or alone, with memory kept, as the judge does."
    keep_memory()
    start = time.perf_counter()
    with background_load() if busy else nullcontext(): timings = learn.format_find(show_plot=False, **kwargs)
    return timings, time.perf_counter() - start


def with_fastai_callbacks(learn) -> Learner:
    "A copy as fastai's own `to_channelslast` makes it."
    return deepcopy(learn).add_cbs([FastaiChannelsLast(), MixedPrecision()])


def candidates(timings, ms) -> list: # One dictionary per candidate
    "What `format_find` and the judge measured of each."
    return [{'candidate': label(r), 'ms': r.ms, '±': r.doubt, 'judged ms': ms.get(label(r)), 'MiB': r.memory,
             'note': r.note} for r in timings.rows]


def verdict(timings, ms, times, took, base) -> dict:
    "Columns of the table that both kinds of measurement have, and what was measured of each candidate."
    pick = label(timings.best)
    return {'pick': pick, 'pick/best': f"{ms[pick]/min(ms[label(r)] for r in timings.rows if r.valid):.2f}",
            'over contiguous fp32': f'{ms[base]/ms[pick]:.2f}×',
            "over fastai's own": f"{ms['fastai']/ms[pick]:.2f}×" if 'fastai' in ms else 'fails',
            'find took': f'{took:.0f} s', 'judged': 'is_noisy' if is_noisy(times) else 'in quiet',
            'candidates': candidates(timings, ms)}


def judge(name, size, bs, device, num_it, busy=False) -> dict:
    "One row of the table; with `busy` the pick is made beside another process, and judged without it."
    with less_random():
        learn = make_learner(name, size, bs, device)
        timings, took = timed_search(learn, busy)
        batch = to_device(learn.dls.one_batch(), device)  # the model is still on the CPU
        def _steps():
            steps = {label(r): timed_fit_step(apply_timing(deepcopy(learn), r, timings.layers), batch) for r in timings.rows if r.ms}
            steps['plain_loop'] = plain_loop(deepcopy(learn), batch, timings.best, timings.layers)
            try: steps['fastai'] = timed_fit_step(with_fastai_callbacks(learn), batch)
            except RuntimeError: pass  # a Conv3d: fastai's callback can't
            return steps
        times = on_fresh_copies(_steps, num_it)
        ms = {k: fastest(v) for k, v in times.items()}
    mine, ran = ms[label(timings.best)], [r for r in timings.rows if r.ms]
    tuned, single = ([ms[label(r)] for r in ran if ('+' in r.precision) == kept] for kept in (True, False))
    return {'model': name, 'px': size, 'batch': bs, 'ms/step': f'{mine:.1f}',
            **verdict(timings, ms, times, took, 'contiguous, fp32'),
            'tuned over single': f'{min(single)/min(tuned):.2f}×' if tuned else '–',
            'step/bare loop': f"{mine/ms['bare']:.2f}"}


def set_running_statistics(model, batch):
    "Batch norms get this batch's statistics, as trained ones have some: with fresh ones small nets' outputs die away."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = None
    with torch.no_grad(): model.to(batch.device).train()(batch)


def judge_predictions(name, size, bs, device, num_it, busy=False) -> dict:
    """One row of the table of predictions: `get_preds` of two batches, loading and all of fastai included; the speed-up
    of each candidate over fastai as it is."""
    with less_random():
        learn = make_learner(name, size, bs, device)
        x, = learn.dls.one_batch()[:1]
        set_running_statistics(learn.model, torch.randn(max(bs, 4), *x.shape[1:], device=device))
        timings, took = timed_search(learn, busy, train=False)
        def _steps():
            learners = {label(r): apply_timing(deepcopy(learn), r, timings.layers) for r in timings.rows if r.ms}
            learners |= {'as it is': deepcopy(learn), 'fastai': with_fastai_callbacks(learn)}
            steps = {k: partial(elapsed_ms, device, o.get_preds) for k, o in learners.items()}
            try: steps['fastai']()
            except RuntimeError: del steps['fastai']  # a Conv3d: fastai's callback can't
            return steps
        times = on_fresh_copies(_steps, num_it)
        ms = {k: fastest(v) for k, v in times.items()}
    return {'model': name, 'px': size, 'batch': bs, 'fastai ms/batch': f"{ms['as it is']/2:.1f}",
            **{label(r): f"{ms['as it is']/ms[label(r)]:.2f}×" for r in timings.rows if r.ms},
            **verdict(timings, ms, times, took, 'as it is')}
