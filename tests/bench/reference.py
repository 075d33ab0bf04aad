"""The reference timing: check the pick of `format_find` with an independent, longer measurement of one model.

Only this file of the benchmark knows how candidates are represented and put into a Learner."""
import gc
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast as FastaiChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.torch_core import to_device
from torch import nn

from channelslast import CompilePredictions, keep_memory, less_random
from channelslast.core.devices import elapsed_ms, is_out_of_memory, synchronize
from channelslast.core.memory_format import convert_nested
from channelslast.find.steps import MAX_SKIPS, step_ms, step_was_skipped
from channelslast.predict.runtimes import openvino_core, without_telemetry
from .models import make_learner

FRESH_COPIES, COMPILED_COPIES = 6, 3  # compiling each set of copies takes longer than measuring it
NOISE_LIMIT = 1.25  # a measurement is noisy above this ratio of the median to the fastest step


def timed_fit_step(learn, batch):
    """A function that runs a training step of the Learner as inside a fit, with learning rate 0, and returns its milliseconds. Steps
    that the gradient scaler skips do not count: its initial scale is often too high."""
    learn.create_opt()
    learn.opt.set_hypers(lr=0.)
    learn('before_fit'); learn('before_epoch'); learn('before_train')
    learn.n_iter = 10**6
    def _step():
        for _ in range(MAX_SKIPS):
            ms = step_ms(learn, batch)
            if not step_was_skipped(learn): return ms
        raise RuntimeError(f'the gradient scaler skipped {MAX_SKIPS} steps in a row')
    return _step


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
    ms, n_sets = defaultdict(list), min(n, max_sets)
    for _ in range(n_sets):
        gc.collect()  # Learners are reference cycles: frees the previous set before the next one is made
        keep_memory(False)
        keep_memory()
        for k, v in interleaved(make_steps(), math.ceil(n/n_sets)).items(): ms[k] += v
    keep_memory(False)
    return ms


def is_noisy(ms) -> bool:
    "True if other work slowed these steps down: half of them or more took much longer than the fastest."
    return statistics.median(statistics.median(v)/min(v) for v in ms.values()) > NOISE_LIMIT


@contextmanager
def background_load():
    "Run another process that computes in bursts. It ends with the block, with this process, or after an hour."
    process = subprocess.Popen([sys.executable, Path(__file__).with_name('load_generator.py')], stdin=subprocess.PIPE)
    try: yield process
    finally:
        process.kill()
        process.wait()


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


class ByHand(Callback):
    "Predict with another runtime in the model's place, as its users do without this library: `run(array)` gives an array."
    order = 10**6  # after the batch is converted
    def __init__(self, run):
        class _Runtime(nn.Module):
            def forward(self, x): return torch.from_numpy(run(x.numpy()))
        self.runtime = _Runtime()
    def before_batch(self): self.own, self.learn.model = self.model, self.runtime
    def after_pred(self): self.learn.model = self.own


def openvino_by_hand(model, x):
    with without_telemetry(): import openvino
    compiled = openvino_core().compile_model(openvino.convert_model(model, example_input=x), 'CPU')
    return lambda a: compiled(a)[0]


def onnxruntime_by_hand(model, x):
    with without_telemetry(): import onnxruntime
    exported = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(exported, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda a: session.run(None, {name: a})[0]


BY_HAND = dict(openvino=openvino_by_hand, onnxruntime=onnxruntime_by_hand)


def by_hand(learn, batch) -> dict: # A callback by the runtime's name
    "The Learner's model in each installed runtime, which takes the measured batch size only."
    model, x = deepcopy(learn.model).eval(), torch.as_subclass(batch[0], torch.Tensor)
    callbacks = {}
    for k, f in BY_HAND.items() if x.is_cpu else ():
        if not find_spec(k): continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of exporters
                callbacks[k] = ByHand(f(model, x))
        except Exception: pass  # it can't convert this model
    return callbacks


def compiled_columns(rows, ms) -> dict:
    "The fastest valid eager and compiled candidates, and their ratio, by their times `ms` in the model alone."
    def _best(compiled): return min((r for r in rows if r.valid and bool(r.compiled) == compiled), key=lambda r: ms[str(r.setting)], default=None)
    def _speedup(r): return f"{ms['contiguous, fp32']/ms[str(r.setting)]:.2f}× ({str(r.setting)})"
    eager, compiled = _best(False), _best(True)
    columns = {'model ms/batch': f"{ms['contiguous, fp32']:.1f}", 'best eager': _speedup(eager)}
    if not compiled: return columns | {'best compiled': '; '.join(r.note for r in rows if r.compiled)}
    return columns | {'best compiled': _speedup(compiled), 'compiled': f'{ms[str(eager.setting)]/ms[str(compiled.setting)]:.2f}×',
                      'compile time': f'{compiled.compile_s:.0f} s'}


def judge(
    name: str, size: int, bs: int, # Model, height and width of images, images per batch
    device: torch.device,
    num_it: int, # Timed steps (predictions) per candidate
    busy: bool = False, # Run `format_find`, and nothing else, next to a busy process?
    train: bool = True, # False: calls of `get_preds` for two batches, including loading and all of fastai
    compile: bool = False, # Also measure compiled predictions?
) -> dict: # Speedups of predictions are over the unchanged Learner, those of training over contiguous fp32
    "One row of the table of training steps or of predictions."
    model_ms = defaultdict(list)
    with less_random():
        learn = make_learner(name, size, bs, device)
        batch = to_device(learn.dls.one_batch(), device)  # the model is still on the CPU
        if not train: set_running_statistics(learn.model, torch.randn(max(bs, 4), *batch[0].shape[1:], device=device))
        keep_memory()  # as in the reference timing
        start = time.perf_counter()
        with background_load() if busy else nullcontext(): timings = learn.format_find(show_plot=False, train=train, compile=compile)
        seconds = time.perf_counter() - start
        ran, best = {str(r.setting): r for r in timings.rows if r.ms}, str(timings.best.setting)
        own = str(timings.rows[0].setting) if train else 'unchanged'
        def _timed(k, new):
            if train: return timed_fit_step(new, batch)
            if compile: new.add_cb(ModelTime(model_ms[k], device))
            for cb in new._grab_cbs(CompilePredictions): cb.quiet = True
            return partial(elapsed_ms, device, new.get_preds)
        def _steps():
            steps = {k: _timed(k, r.setting.apply(deepcopy(learn), train)) for k, r in ran.items()}
            if own not in steps: steps[own] = _timed(own, deepcopy(learn))
            try:
                fastai = _timed('fastai', deepcopy(learn).add_cbs([FastaiChannelsLast(), MixedPrecision()]))  # its `to_channelslast`
                fastai()
            except RuntimeError as e:  # fastai's callback can't convert a Conv3d
                if is_out_of_memory(e): raise
            else: steps['fastai'] = fastai
            for k, cb in (by_hand(learn, batch) if compile else {}).items(): steps[f'{k} by hand'] = _timed(k, deepcopy(learn).add_cb(cb))
            return steps
        times = on_fresh_copies(_steps, num_it, COMPILED_COPIES if compile else FRESH_COPIES)
    ms = {k: min(v) for k, v in times.items()}
    def _speedup(k): return f'{ms[own]/ms[k]:.2f}×'
    row = {'model': name, 'px': size, 'batch': bs}
    if train: row['ms/step'] = f'{ms[best]:.1f}'
    else: row |= {'fastai ms/batch': f'{ms[own]/2:.1f}', **{k: _speedup(k) for k in ran}}
    row |= {k: _speedup(k) for k in ms if k.endswith('by hand')}
    if compile: row |= compiled_columns(timings.rows, {k: min(v) for k, v in model_ms.items()})
    row |= {'pick': best, 'pick/best': f'{ms[best]/min(ms[k] for k, r in ran.items() if r.valid):.2f}', 'speedup': _speedup(best),
            "speedup over fastai's own": f"{ms['fastai']/ms[best]:.2f}×" if 'fastai' in ms else 'fails',
            'search time': f'{seconds:.0f} s', 'machine': 'noisy' if is_noisy(times) else 'quiet',
            'candidates': [{'candidate': str(r.setting), 'ms': r.ms, '±': r.doubt, 'reference ms': ms.get(str(r.setting)), 'MiB': r.memory, 'note': r.note}
                           for r in timings.rows]}
    if not train: return row
    with_fp32, others = ([ms[k] for k, r in ran.items() if ('+' in r.precision) == o] for o in (True, False))
    return row | {'speedup by fp32 layers': f'{min(others)/min(with_fp32):.2f}×' if with_fp32 else '–'}


def overhead(device, n=20) -> str:
    "Time that the callback takes before a fit with nothing left to convert, and time to convert a batch."
    learn = make_learner('resnet152', 64, 2, device).to_channelslast(to_fp16=False)
    with learn.no_logging(): learn.fit(1)  # creates optimizer state, which the callback checks too
    cb, batch = learn.channels_last, torch.randn(64, 3, 224, 224, device=device)
    work = dict(fit=lambda: (cb.before_fit(), cb.before_train()), batch=lambda: convert_nested(batch, {4}))
    ms = {k: min(v) for k, v in interleaved({k: partial(elapsed_ms, device, f) for k, f in work.items()}, n).items()}
    return (f"Overhead: {ms['fit']:.1f} ms before a fit of a ResNet-152 that is already in channels last; "
            f"{ms['batch']:.1f} ms to convert a batch of 64×3×224×224")
