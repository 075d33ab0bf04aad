"`channelslast`: find the fastest format for a model, train it so and contiguous, and compare."
import time

import numpy as np
import pandas as pd
from fastai.vision.all import AMPMode, Callback, CrossEntropyLossFlat, Learner, accuracy

from .. import devices, less_random
from ..candidates import apply
from ..devices import synchronize
from ..timings import label
from .classifiers import Mistake, build, check, digits, folder, pick_device, unreadable


class StepTimer(Callback):
    "Milliseconds of each training step: forward, loss, backward, optimizer; without loading data."
    order, run_valid = -100, False
    def before_fit(self): self.ms = []
    def _now(self):
        synchronize(self.dls.device)
        return time.perf_counter()
    def before_batch(self): self.start = self._now()
    def after_batch(self): self.ms.append((self._now() - self.start)*1e3)


def train(learn, epochs, lr):
    "Train; median milliseconds a step, seconds of the whole fit, final accuracy."
    start = time.perf_counter()
    learn.fit_one_cycle(epochs, lr, cbs=(timer := StepTimer()))
    return float(np.median(timer.ms)), time.perf_counter() - start, learn.recorder.values[-1][-1]


def precisions(device, amp_mode):
    "What `format_find` shall measure: all, or the one asked for."
    fast = ['fp32', *(o.value for o in AMPMode if devices.accelerates(device.type, o))]
    if amp_mode is None: return fast
    if amp_mode not in ('fp16', 'bf16', 'fp32'):
        raise Mistake(f"--amp-mode {amp_mode}: not known; use fp16, bf16 or fp32")
    if amp_mode not in fast:
        raise Mistake(f"--amp-mode {amp_mode}: not fast on this {device.type}; use {' or '.join(fast)}")
    return [amp_mode]


def main(
    arch: str = 'resnet18', # Architecture: any classifier's name in torchvision or timm
    data: str = None, # Folder of class folders with images; without it, scikit-learn's digits
    size: int = 48, # Images are resized to size×size pixels
    bs: int = 64, # Images a batch
    epochs: int = 3, # Epochs of each of both trainings
    lr: float = 3e-3, # Highest learning rate of the one-cycle schedule
    device: str = None, # cpu, cuda, cuda:1, mps…; without it, the fastest there is
    amp_mode: str = None, # fp16, bf16 or fp32: measure this precision only; without it, all that the device accelerates
):
    """Find the fastest memory format and precision for an image classifier, train it so and in contiguous fp32,
    compare. `channelslast bench` measures a panel of models instead."""
    for k, v in dict(size=size, bs=bs, epochs=epochs, lr=lr).items():
        if not v > 0: raise Mistake(f"--{k} {v}: must be above 0")
    device = pick_device(device)
    asked = precisions(device, amp_mode)
    def make_dls(): return folder(data, size, bs, device) if data else digits(size, bs, device)
    check(make_dls, arch, size, bs)
    def make_learn():
        dls = make_dls()
        return Learner(dls, build(arch, dls.c, size), CrossEntropyLossFlat(), metrics=accuracy)

    print(f'{arch} on {device}, {size} px, batches of {bs}', flush=True)
    with less_random(), make_learn().no_bar() as learn: timings = learn.format_find(asked, num_it=5, show_plot=False)
    print(timings)
    best = timings.best
    if (best.memory_format, best.precision) == ('contiguous', 'fp32'):
        best = max((r for r in timings.rows if r.memory_format == 'channels_last' and r.ms), key=lambda r: r.speedup)
        print(f'Contiguous fp32 is as fast as any; {label(best)} is trained all the same, to compare.')
    rows, seconds = [], []
    for row in timings.rows[0], best:
        print(f'\nTraining {label(row)}', flush=True)
        with less_random():
            learn = apply(make_learn(), row, timings.layers)
            try: ms, sec, acc = train(learn, epochs, lr)
            except OSError as e: raise unreadable(e)
        seconds.append(sec)
        speedup = float(rows[0][2])/ms if rows else 1
        rows.append((label(row).split(', ')[0], row.precision, f'{ms:.1f}', f'{speedup:.2f}×', f'{acc:.1%}'))
    print()
    print(pd.DataFrame(rows, columns=['format', 'precision', 'ms/step', 'speed-up', 'accuracy']).to_string(index=False))
    print(f'The whole fit, loading and validation included: {seconds[0]:.1f} s → {seconds[1]:.1f} s, '
          f'{seconds[0]/seconds[1]:.2f}×; format_find had said {best.speedup:.2f}× for a step.')
