"`channelslast`: an image classifier trained contiguous and in channels last; which of them to take, here?"
import os
import sys
import time
from pathlib import Path

import pandas as pd
from fastai.vision.all import AMPMode, Callback, CrossEntropyLossFlat, Learner, accuracy, find_bs

from .. import less_random
from ..core import devices
from ..core.devices import synchronize
from ..find.candidates import apply_timing
from ..find.results import BEST, LABELS, OTHER, bars, label
from ..find.selection import TIE, fastest
from ..find.train_benchmark import step_was_skipped
from .common import UsageError, build, check, digits, folder, pick_device, unreadable

# the line that gives a format and precision; what is not here, `to_fastest` finds
LINES = {('contiguous', 'fp16'): 'learn.to_channelslast().to_contiguous()',
         ('contiguous', 'bf16'): "learn.to_channelslast(amp_mode='bf16').to_contiguous()",
         ('channels_last', 'fp32'): 'learn.to_channelslast(to_fp16=False)',
         ('channels_last', 'fp16'): 'learn.to_channelslast()',
         ('channels_last', 'bf16'): "learn.to_channelslast(amp_mode='bf16')"}


class StepTimer(Callback):
    "Milliseconds of each training step: forward, loss, backward, optimizer; without loading data."
    order, run_valid = -100, False
    def before_fit(self): self.ms = []
    def _now(self):
        synchronize(self.dls.device)
        return time.perf_counter()
    def before_batch(self): self.start = self._now()
    def after_batch(self):
        ms = (self._now() - self.start)*1e3
        if not step_was_skipped(self.learn): self.ms.append(ms)


def plain(learn) -> Learner:
    "One line an epoch in place of progress bars, where the output is no terminal."
    if sys.stdout.isatty(): return learn
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    def _say(values):
        said = [f'{v:.3f}' if isinstance(v, float) else str(v) for v in values]
        print(', '.join(f'{k} {v}' for k, v in zip(learn.recorder.metric_names, said)), flush=True)
    learn.logger = _say
    return learn


def train(learn, epochs, lr):
    "Train; milliseconds of the fastest step, final accuracy."
    learn.fit_one_cycle(epochs, lr, cbs=(timer := StepTimer()))
    return fastest(timer.ms), learn.recorder.values[-1][-1]


def precisions(device, amp_mode):
    "What `format_find` shall measure: all, or the one asked for."
    fast = ['fp32', *(o.value for o in AMPMode if devices.autocast_is_fast(device, o))]
    if amp_mode is None: return fast
    if amp_mode not in ('fp16', 'bf16', 'fp32'):
        raise UsageError(f"--amp-mode {amp_mode}: not known; use fp16, bf16 or fp32")
    if amp_mode not in fast:
        raise UsageError(f"--amp-mode {amp_mode}: not fast on this {device.type}; use {' or '.join(fast)}")
    return [amp_mode]


def to_train(timings) -> list: # `Timing`s
    "Contiguous fp32, the fastest in channels last, and the winner, if that is neither."
    last = [r for r in timings.rows if r.memory_format == 'channels_last' and r.valid]
    return [*dict.fromkeys([timings.rows[0], *sorted(last, key=lambda r: r.ms)[:1], timings.best])]


def advice(rows, predictions) -> str:
    "What to take, in a sentence."
    first, mine = rows[0], min(rows, key=lambda r: r['ms'])
    faster, images = first['ms']/mine['ms'], predictions.best.speedup
    took = LINES.get((mine['timing'].memory_format, mine['timing'].precision), 'learn.to_fastest()')
    if faster <= 1 + TIE: said = 'Here nothing trains faster than plain fastai: leave it as it is'
    else: said = (f"Here `{took}` trains {faster:.2f}× as fast as plain fastai, with {mine['accuracy']:.1%} accuracy "
                  f"in place of {first['accuracy']:.1%}")
    if images <= 1 + TIE: return said + '.'
    return f'{said}; for predictions `learn.to_fastest(train=False)` gives {images:.2f}× the images a second.'


def save_chart(rows, predictions, path):
    "Speed-up of the steps, and images a second, as bars."
    from matplotlib import pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.5*len(rows)), layout='constrained')
    ups, images = [rows[0]['ms']/r['ms'] for r in rows], [rows[0]['images'], rows[-1]['images']]
    def _colors(values): return [BEST if v == max(values) else OTHER for v in values]
    bars(left, [label(r['timing']) for r in rows], ups,
         [f"{u:.2f}×, {r['accuracy']:.1%} right" for u, r in zip(ups, rows)], _colors(ups))
    bars(right, ['plain fastai', label(predictions.best)], images, [f'{i:.0f}' for i in images], _colors(images))
    left.set(xlabel='speed-up of a training step; accuracy', xlim=(0, 1.7*max(ups)))
    right.set(xlabel='images a second, predicting')
    fig.savefig(path, dpi=144)
    plt.close(fig)


def check_save(path):
    "A `UsageError` where no chart can be saved, before anything is measured."
    from matplotlib.figure import Figure
    if not os.access(Path(path).parent, os.W_OK) or Path(path).is_dir():
        raise UsageError(f'--save {path}: no such folder, or none to write to; try --save {Path(path).stem}.png')
    if Path(path).suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise UsageError(f'--save {path}: no kind of picture that can be drawn; try --save {Path(path).stem}.png')


def main(
    arch: str = 'mobilenet_v2', # Architecture: any classifier's name in torchvision or timm
    data: str = None, # Folder of class folders with images; without it, scikit-learn's digits
    size: int = 48, # Images are resized to size×size pixels
    bs: int = 32, # Images a batch
    epochs: int = 5, # Epochs of each training
    lr: float = 1e-2, # Highest learning rate of the one-cycle schedule
    device: str = None, # cpu, cuda, cuda:1, mps…; without it, the fastest there is
    amp_mode: str = None, # fp16, bf16 or fp32: measure this precision only; without it, all that the device accelerates
    save: str = None, # A file for the chart of the table: chart.png
):
    """Find the fastest memory format and precision for an image classifier; train it contiguous in fp32, as fastai
    does, and in the fastest channels last; compare. `channelslast bench` measures a panel of models instead."""
    for k, v in dict(size=size, bs=bs, epochs=epochs, lr=lr).items():
        if not v > 0: raise UsageError(f"--{k} {v}: must be above 0")
    if save: check_save(save)
    device = pick_device(device)
    asked = precisions(device, amp_mode)
    def make_dls(): return folder(data, size, bs, device) if data else digits(size, bs, device)
    check(make_dls, arch, size, bs)
    def make_learn():
        dls = make_dls()
        return plain(Learner(dls, build(arch, dls.c, size), CrossEntropyLossFlat(), metrics=accuracy))

    print(f'{arch} on {device}, {size} px, batches of {bs}', flush=True)
    try:
        with less_random(): timings = make_learn().format_find(asked, show_plot=False)
    except OSError as e: raise unreadable(e)
    print(timings)
    rows = []
    for timing in to_train(timings):
        print(f'\nTraining {label(timing)}', flush=True)
        with less_random():
            learn = apply_timing(make_learn(), timing, timings.layers)
            try: ms, right = train(learn, epochs, lr)
            except OSError as e: raise unreadable(e)
        rows.append(dict(timing=timing, ms=ms, accuracy=right))
    print()
    with less_random(): predictions = learn.to_fastest(precisions=asked, train=False).format_timings
    images = find_bs(learn.dls.valid.one_batch())
    for r in rows: r['images'] = images*1e3/(predictions.rows[0] if r is rows[0] else predictions.best).ms
    print(pd.DataFrame([{
        'format': LABELS[r['timing'].memory_format], 'precision': r['timing'].precision, 'ms/step': f"{r['ms']:.1f}",
        'speed-up': f"{rows[0]['ms']/r['ms']:.2f}×", 'accuracy': f"{r['accuracy']:.1%}",
        'images/s predicting': f"{r['images']:.0f}"} for r in rows]).to_string(index=False))
    print(advice(rows, predictions))
    if save: save_chart(rows, predictions, save)
