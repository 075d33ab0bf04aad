"`channelslast`: train an image classifier contiguous and in channels last, and advise which to use on this machine."
import os
import sys
import time
from pathlib import Path

import pandas as pd
from fastai.vision.all import AMPMode, Callback, CrossEntropyLossFlat, Learner, accuracy, find_bs
from fastcore.basics import uniqueify

from .. import less_random
from ..core import devices
from ..core.devices import synchronize
from ..find.race import TIE, fastest
from ..find.results import BEST, OTHER, bars
from ..find.steps import step_was_skipped
from ..learner.setting import LABELS
from .common import UsageError, build, check, digits, folder, pick_device, unreadable


class StepTimer(Callback):
    "Milliseconds of each training step: forward, loss, backward and optimizer, without loading data."
    order, run_valid = -100, False
    def before_fit(self): self.ms = []
    def _now(self):
        synchronize(self.dls.device)
        return time.perf_counter()
    def before_batch(self): self.start = self._now()
    def after_batch(self):
        ms = (self._now() - self.start)*1e3
        if not step_was_skipped(self.learn): self.ms.append(ms)


def print_epochs(learn) -> Learner:
    "Print one line per epoch instead of progress bars if the output is not a terminal."
    if sys.stdout.isatty(): return learn
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    def _print(values):
        texts = [f'{v:.3f}' if isinstance(v, float) else str(v) for v in values]
        print(', '.join(f'{k} {v}' for k, v in zip(learn.recorder.metric_names, texts)), flush=True)
    learn.logger = _print
    return learn


def precisions(device, amp_mode):
    "The precisions that `format_find` measures: the requested one, or all that are fast on the device."
    fast = ['fp32', *(o.value for o in AMPMode if devices.autocast_is_fast(device, o))]
    if amp_mode is None: return fast
    if amp_mode not in ('fp16', 'bf16', 'fp32'):
        raise UsageError(f"--amp-mode {amp_mode}: not a precision; use fp16, bf16 or fp32")
    if amp_mode not in fast:
        raise UsageError(f"--amp-mode {amp_mode}: not fast on this {device.type}; use {' or '.join(fast)}")
    return [amp_mode]


def to_train(timings) -> list: # `Timing`s
    "Contiguous fp32, the fastest candidate in channels last, and the best one if it is neither of them."
    channels_last = [r for r in timings.rows if r.setting.is_channels_last and r.valid]
    return uniqueify([timings.rows[0], *sorted(channels_last, key=lambda r: r.ms)[:1], timings.best])


def table(rows) -> str:
    return pd.DataFrame([{
        'format': LABELS[r['timing'].memory_format], 'precision': r['timing'].precision + ', fused'*r['timing'].fused,
        'ms/step': f"{r['ms']:.1f}", 'speedup': f"{rows[0]['ms']/r['ms']:.2f}×", 'images/s predicting': f"{r['images']:.0f}"}
        for r in rows]).to_string(index=False)


def advice(rows, predictions) -> str:
    "The gains in sentences. The last line is the code that gives them."
    best, predicting = min(rows, key=lambda r: r['ms']), predictions.best
    gains = {'Training': (rows[0]['ms']/best['ms'], best['timing']), 'Predictions': (predicting.speedup, predicting)}
    faster = {k: v for k, v in gains.items() if v[0] > 1 + TIE}
    nothing = f'nothing else was more than {TIE:.0%} faster here.'
    if not faster: return f'Keep contiguous fp32: {nothing}'
    texts = [] if 'Training' in faster else [f'Keep contiguous fp32 for training: {nothing}']
    texts += [f'{k} in {o.setting}: {gain:.2f}× as fast as contiguous fp32.' for k, (gain, o) in faster.items()]
    lines = {'Training': 'learn.to_fastest()', 'Predictions': 'learn.to_fastest(train=False)'}
    code = '  # before predicting: '.join(lines[k] for k in faster)
    return '\n'.join([*texts, 'In your code, this line measures your Learner and switches it to the fastest:', code])


def save_chart(rows, predictions, path):
    "Save a bar chart of the speedup of training steps and of the images predicted per second."
    from matplotlib import pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.5*len(rows)), layout='constrained')
    speedups, images = [rows[0]['ms']/r['ms'] for r in rows], [rows[0]['images'], rows[-1]['images']]
    def _colors(values): return [BEST if v == max(values) else OTHER for v in values]
    bars(left, [str(r['timing'].setting) for r in rows], speedups,
         [f'{s:.2f}×' for s in speedups], _colors(speedups))
    bars(right, ['contiguous, fp32', str(predictions.best.setting)], images, [f'{i:.0f}' for i in images], _colors(images))
    left.set(xlabel='speedup of a training step over contiguous fp32', xlim=(0, 1.2*max(speedups)))
    right.set(xlabel='images predicted per second')
    fig.savefig(path, dpi=144)
    plt.close(fig)


def check_save(path):
    "Raise a `UsageError` if no chart can be saved at `path`, before anything is measured."
    from matplotlib.figure import Figure
    if not os.access(Path(path).parent, os.W_OK) or Path(path).is_dir():
        raise UsageError(f'--save {path}: no such folder, or not writable as a file; try --save {Path(path).stem}.png')
    if Path(path).suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise UsageError(f'--save {path}: not a supported image type; try --save {Path(path).stem}.png')


def main(
    arch: str = 'mobilenet_v2', # Architecture: any classifier's name in torchvision or timm
    data: str = None, # Folder with one subfolder of images per class; default: scikit-learn's digits
    size: int = 48, # Images are resized to size×size pixels
    bs: int = 32, # Images per batch
    epochs: int = 5, # Epochs of each training
    lr: float = 1e-2, # Highest learning rate of the one-cycle schedule
    device: str = None, # cpu, cuda, cuda:1, mps, …; default: the fastest one available
    amp_mode: str = None, # fp16, bf16 or fp32, measured next to contiguous fp32; default: all that are fast here
    save: str = None, # Save a chart of the table to this file, such as chart.png
):
    """Find the fastest memory format and precision for an image classifier. Train it in contiguous fp32, in the
    fastest channels-last setting and in the fastest of all, and compare."""
    for k, v in dict(size=size, bs=bs, epochs=epochs, lr=lr).items():
        if not v > 0: raise UsageError(f"--{k} {v}: must be above 0")
    if save: check_save(save)
    device = pick_device(device)
    measured = precisions(device, amp_mode)
    def make_dls(): return folder(data, size, bs, device) if data else digits(size, bs, device)
    check(make_dls, arch, size, bs)
    def make_learn():
        dls = make_dls()
        return print_epochs(Learner(dls, build(arch, dls.c, size), CrossEntropyLossFlat(), metrics=accuracy))

    print(f'{arch} on {device}, {size} px, batches of {bs}', flush=True)
    try:
        with less_random(): timings = make_learn().format_find(measured, show_plot=False)
    except OSError as e: raise unreadable(e)
    print(timings)
    rows = []
    for timing in to_train(timings):
        print(f'\nTraining {timing.setting}', flush=True)
        with less_random():
            learn, timer = timing.setting.apply(make_learn()), StepTimer()
            try: learn.fit_one_cycle(epochs, lr, cbs=timer)
            except OSError as e: raise unreadable(e)
        rows.append(dict(timing=timing, ms=fastest(timer.ms)))
    print()
    with less_random(): predictions = learn.to_fastest(precisions=measured, train=False).format_timings
    images = find_bs(learn.dls.valid.one_batch())
    for r in rows: r['images'] = images*1e3/(predictions.rows[0] if r is rows[0] else predictions.best).ms
    print(table(rows))
    print(advice(rows, predictions))
    if save: save_chart(rows, predictions, save)
