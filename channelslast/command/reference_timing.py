"Check the pick of `format_find` with an independent, longer measurement of one model, in training or predicting."
import gc
import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from fastai.torch_core import to_device
from torch import nn

from .. import less_random
from ..predict.compile_predictions import CompilePredictions
from ..core.autocast import run_in_fp32
from ..core.devices import elapsed_ms, synchronize
from ..core.glibc_malloc import keep_memory
from ..core.memory_format import CHANNELS_LAST_FORMATS
from ..find.candidates import apply_timing
from ..find.layer_timing import fp32_names
from ..find.results import label
from ..find.selection import fastest
from ..find.train_benchmark import MAX_SKIPS, step_ms, step_was_skipped
from ..learner.fused_optimizer import use_fused
from .models import make_learner

FRESH_COPIES, COMPILED_COPIES = 6, 3  # compiling each set of copies takes longer than measuring it
NOISE_LIMIT = 1.25  # a measurement is noisy above this ratio of the median to the fastest step


def timed_fit_step(learn, batch):
    "A function that runs a training step of the Learner as inside a fit, with learning rate 0, and returns its time."
    learn.create_opt()
    learn.opt.set_hypers(lr=0.)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    learn.n_iter = 10**6
    return partial(until_not_skipped, partial(step_ms, learn, batch), partial(step_was_skipped, learn))


def until_not_skipped(step, was_skipped) -> float:
    "Milliseconds of the first step that the gradient scaler does not skip: its initial scale is often too high."
    for _ in range(MAX_SKIPS):
        ms = step()
        if not was_skipped(): return ms
    raise RuntimeError(f'the gradient scaler skipped {MAX_SKIPS} steps in a row')


def plain_loop(learn, batch, row, layers=()):
    """A function that times the same step in a plain PyTorch loop: the format and precision of `row`, the Learner's
    optimizer and loss, the same layers in fp32, and nothing else."""
    fmt = torch.contiguous_format if row.memory_format == 'contiguous' else CHANNELS_LAST_FORMATS[batch[0].dim()]
    half, _, tuned = row.precision.partition('+')
    device, dtype = batch[0].device, dict(fp16=torch.float16, bf16=torch.bfloat16).get(half)
    model, x, y = learn.model.to(device).train(), batch[0].to(memory_format=fmt), batch[1]
    for p in model.parameters():
        if p.dim() == x.dim(): p.data = p.data.to(memory_format=fmt)
    opt = learn.opt_func(learn.splitter(model), lr=0.)
    in_fp32 = [model.get_submodule(n) for n in fp32_names(layers, half)] if tuned else ()
    for m in in_fp32: run_in_fp32(m, device.type, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=half == 'fp16')
    scale = None
    def _step():
        with torch.autocast(device.type, dtype, enabled=dtype is not None): loss = learn.loss_func(model(x), y)
        scaler.scale(loss).backward()
        if scaler.is_enabled(): scaler.step(opt); scaler.update()
        else: opt.step()
        opt.zero_grad()
    def _ms():
        nonlocal scale
        scale = scaler.get_scale()
        return elapsed_ms(device, _step)
    return partial(until_not_skipped, _ms, lambda: scaler.get_scale() < scale)


def interleaved(steps, n) -> dict:
    "Milliseconds of each step in `n` rounds, in alternating order, after one round to warm up."
    ms, order = {k: [] for k in steps}, list(steps)
    for _ in range(n + 1):
        for k in order: ms[k].append(steps[k]())
        order.reverse()
    return {k: v[1:] for k, v in ms.items()}


def on_fresh_copies(make_steps, n, max_sets=FRESH_COPIES) -> dict:
    """Milliseconds of each step in at least `n` rounds, divided among several new sets of copies from `make_steps()`.

    A copy's place in memory makes steps of large models 5 to 15% longer, so each set gets new memory. The set keeps it:
    on a CPU, allocating memory again takes half of a large model's step and causes much of its noise."""
    ms, n_sets = {}, min(n, max_sets)
    for _ in range(n_sets):
        gc.collect()  # Learners are reference cycles: frees the previous set before the next one is made
        keep_memory(False)
        keep_memory()
        for k, v in interleaved(make_steps(), math.ceil(n/n_sets)).items(): ms[k] = ms.get(k, []) + v
    keep_memory(False)
    return ms


def is_noisy(ms) -> bool:
    "True if other work slowed these steps down: half of them or more took much longer than the fastest."
    return statistics.median(statistics.median(v)/fastest(v) for v in ms.values()) > NOISE_LIMIT


@contextmanager
def background_load():
    "Run another process that computes in bursts. It ends with the block, with this process, or after an hour."
    process = subprocess.Popen([sys.executable, Path(__file__).with_name('load_generator.py')], stdin=subprocess.PIPE)
    try: yield process
    finally:
        process.kill()
        process.wait()


def timed_search(learn, busy, **kwargs) -> tuple: # `FormatTimings`, seconds
    "Run `format_find`, next to a busy process if `busy`. Memory is kept, as in the reference timing."
    keep_memory()
    start = time.perf_counter()
    with background_load() if busy else nullcontext(): timings = learn.format_find(show_plot=False, **kwargs)
    return timings, time.perf_counter() - start


def with_fastai_callbacks(learn) -> Learner:
    "A copy with the callbacks that fastai's own `to_channelslast` adds."
    return deepcopy(learn).add_cbs([FastaiChannelsLast(), MixedPrecision()])


def shared_columns(timings, ms, times, seconds, base) -> dict:
    "The columns that rows of training and of predictions have in common, and the measurements of each candidate."
    pick = label(timings.best)
    candidates = [{'candidate': label(r), 'ms': r.ms, '±': r.doubt, 'reference ms': ms.get(label(r)), 'MiB': r.memory,
                   'note': r.note} for r in timings.rows]
    return {'pick': pick, 'pick/best': f"{ms[pick]/min(ms[label(r)] for r in timings.rows if r.valid):.2f}",
            'speedup': f'{ms[base]/ms[pick]:.2f}×',
            "speedup over fastai's own": f"{ms['fastai']/ms[pick]:.2f}×" if 'fastai' in ms else 'fails',
            'search time': f'{seconds:.0f} s', 'machine': 'noisy' if is_noisy(times) else 'quiet',
            'candidates': candidates}


def judge(name, size, bs, device, num_it, busy=False) -> dict:
    "One row of the table of training steps. With `busy`, only `format_find` runs next to a busy process."
    with less_random():
        learn = make_learner(name, size, bs, device)
        timings, seconds = timed_search(learn, busy)
        ran = [r for r in timings.rows if r.ms]
        batch = to_device(learn.dls.one_batch(), device)  # the model is still on the CPU
        base = 'unchanged' if timings.fused else 'contiguous, fp32'
        def _copy():
            new = deepcopy(learn)
            if timings.fused: use_fused(new)
            return new
        def _steps():
            steps = {label(r): timed_fit_step(apply_timing(_copy(), r, timings.layers), batch) for r in ran}
            steps['plain loop'] = plain_loop(_copy(), batch, timings.best, timings.layers)
            if timings.fused: steps[base] = timed_fit_step(deepcopy(learn), batch)
            try: steps['fastai'] = timed_fit_step(with_fastai_callbacks(learn), batch)
            except RuntimeError: pass  # fastai's callback can't convert a Conv3d
            return steps
        times = on_fresh_copies(_steps, num_it)
        ms = {k: fastest(v) for k, v in times.items()}
    pick_ms = ms[label(timings.best)]
    with_fp32_layers = [ms[label(r)] for r in ran if '+' in r.precision]
    others = [ms[label(r)] for r in ran if '+' not in r.precision]
    return {'model': name, 'px': size, 'batch': bs, 'ms/step': f'{pick_ms:.1f}',
            **shared_columns(timings, ms, times, seconds, base),
            'speedup by fp32 layers': f'{min(others)/min(with_fp32_layers):.2f}×' if with_fp32_layers else '–',
            'step/plain loop': f"{pick_ms/ms['plain loop']:.2f}"}


def set_running_statistics(model, batch):
    "Set batch norms' running statistics to those of `batch`: with the initial ones, outputs of small nets vanish."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = None
    with torch.no_grad(): model.to(batch.device).train()(batch)


class ModelTime(Callback):
    "Append the milliseconds of each batch in the model, including conversions of the batch, to `ms`."
    order = -10**6  # before the batch is converted, and before other callbacks read the predictions
    def __init__(self, ms, device): self.ms, self.device = ms, device
    def before_batch(self):
        synchronize(self.device)
        self.start = time.perf_counter()
    def after_pred(self):
        synchronize(self.device)
        self.ms.append((time.perf_counter() - self.start)*1e3)


def compiled_columns(timings, times) -> dict:
    "The fastest valid eager and compiled candidates, and their ratio, by their `times` in the model alone."
    ms = {k: fastest(v) for k, v in times.items()}
    def _best(compiled):
        rows = [r for r in timings.rows if r.valid and r.compiled == compiled]
        return min(rows, key=lambda r: ms[label(r)], default=None)
    def _speedup(r): return f"{ms['contiguous, fp32']/ms[label(r)]:.2f}× ({label(r)})"
    eager, compiled = _best(False), _best(True)
    columns = {'model ms/batch': f"{ms['contiguous, fp32']:.1f}", 'best eager': _speedup(eager)}
    if not compiled: return columns | {'best compiled': '; '.join(r.note for r in timings.rows if r.compiled)}
    return columns | {'best compiled': _speedup(compiled), 'compiled': f'{ms[label(eager)]/ms[label(compiled)]:.2f}×',
                      'compile time': f'{compiled.compile_s:.0f} s'}


def judge_predictions(name, size, bs, device, num_it, busy=False, compile=False) -> dict:
    """One row of the table of predictions: the speedup of each candidate over the unchanged Learner in `get_preds` of
    two batches, including loading and all of fastai. With `compile`, also the columns of `compiled_columns`."""
    model_times = defaultdict(list)
    with less_random():
        learn = make_learner(name, size, bs, device)
        x = learn.dls.one_batch()[0]
        set_running_statistics(learn.model, torch.randn(max(bs, 4), *x.shape[1:], device=device))
        timings, seconds = timed_search(learn, busy, train=False, compile=compile)
        ran = [r for r in timings.rows if r.ms]
        def _steps():
            learners = {label(r): apply_timing(deepcopy(learn), r, timings.layers) for r in ran}
            learners.update(unchanged=deepcopy(learn), fastai=with_fastai_callbacks(learn))
            for k, o in learners.items() if compile else ():
                o.add_cb(ModelTime(model_times[k], device))
                for cb in o._grab_cbs(CompilePredictions): cb.quiet = True
            steps = {k: partial(elapsed_ms, device, o.get_preds) for k, o in learners.items()}
            try: steps['fastai']()
            except RuntimeError: del steps['fastai']  # fastai's callback can't convert a Conv3d
            return steps
        times = on_fresh_copies(_steps, num_it, COMPILED_COPIES if compile else FRESH_COPIES)
        ms = {k: fastest(v) for k, v in times.items()}
    return {'model': name, 'px': size, 'batch': bs, 'fastai ms/batch': f"{ms['unchanged']/2:.1f}",
            **{label(r): f"{ms['unchanged']/ms[label(r)]:.2f}×" for r in ran},
            **(compiled_columns(timings, model_times) if compile else {}),
            **shared_columns(timings, ms, times, seconds, 'unchanged')}


judge_compiled = partial(judge_predictions, compile=True)
