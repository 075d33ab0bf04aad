"""`channelslast bench`: does `format_find` pick well, and what is the pick worth? Judged by an independent, longer
measurement."""
from functools import partial

import pandas as pd
import torch
from fastcore.script import store_true

from ..devices import elapsed_ms
from ..malloc import keep_memory
from ..memory_format import cast_tree
from ..race import fastest
from .classifiers import Mistake, build, pick_device
from .judge import interleaved, judge, judge_predictions
from .panel import PANEL, make_learner, measured, versions


def overhead(device, n=20) -> str:
    "What the callback costs where there is nothing left to cast, and what casting a batch does."
    learn = make_learner('resnet152', 64, 2, device).to_channelslast(to_fp16=False)
    with learn.no_logging(): learn.fit(1)  # so that the optimizer's state is looked through, too
    batch = torch.randn(64, 3, 224, 224, device=device)
    def _fit():
        learn.channels_last.before_fit()
        learn.channels_last.before_train()
    work = dict(fit=_fit, batch=lambda: cast_tree(batch, {4}))
    ms = interleaved({k: partial(elapsed_ms, device, f) for k, f in work.items()}, n)
    ms = {k: fastest(v) for k, v in ms.items()}
    return (f"before a fit of a ResNet-152 that is channels last already: {ms['fit']:.1f} ms; "
            f"casting a batch of 64×3×224×224: {ms['batch']:.1f} ms")


def summary(rows) -> str:
    "All rows in a line."
    def _numbers(column): return [float(r[column].rstrip('× s')) for r in rows]
    off, over, took = map(_numbers, ('pick/best', 'over contiguous fp32', 'find took'))
    return (f'{sum(o <= 1.05 for o in off)} of {len(off)} picks within 5 % of the best; over contiguous fp32 at least '
            f'{min(over):.2f}×; format_find took {sum(took):.0f} s')


def main(
    models: str = '', # Names of the panel or of any classifier, with commas; without them, the whole panel
    size: int = 0, # Pixels; 0: the panel's own on a CPU, 224 on a GPU
    bs: int = 0, # Images a batch; 0: the panel's own on a CPU, 128 on a GPU; of predictions 16 (128) and 1
    device: str = None, # cpu, cuda, cuda:1, mps…; without it, the fastest there is
    num_it: int = 20, # Timed steps, or predictions, of each candidate by the judge, on up to six sets of copies
    busy: store_true = False, # Pick beside a second process that computes in bursts; judge without it
    predict: store_true = False, # Predictions in place of training steps: 224 px, in batches and one by one
):
    "Measure what format_find picks for a panel of models against an independent, longer measurement."
    if num_it < 1: raise Mistake(f'--num-it {num_it}: must be above 0')
    device = pick_device(device)
    names = [o.strip() for o in models.split(',') if o.strip()] or list(PANEL)
    for n in names:
        if n not in PANEL: build(n, 10, size or 64)  # a wrong name shows before anything is measured
    print(versions(device) + ', `keep_memory()`'*keep_memory(False), flush=True)  # named where it works
    rows, judged = [], judge_predictions if predict else judge
    todo = [(n, size or px, bs or images) for n, px, images in measured(names, device.type == 'cpu', predict)]
    for name, px, images in dict.fromkeys(todo):
        rows.append(judged(name, px, images, device, num_it, busy))
        header = predict or len(rows) == 1  # which candidates are predicted with differs from model to model
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=header), flush=True)
    print()
    columns = dict.fromkeys(k for row in sorted(rows, key=len, reverse=True) for k in row)  # candidates side by side
    print(pd.DataFrame(rows, columns=columns).fillna('–').to_string(index=False))
    print(summary(rows))
    if not predict: print(overhead(device))
