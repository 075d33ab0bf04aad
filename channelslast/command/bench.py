"""`channelslast bench`: does `format_find` pick well, and what is the pick worth? Judged by an independent, longer
measurement."""
import sys
from functools import partial

import pandas as pd
import torch
from fastcore.script import store_true

from ..core.devices import elapsed_ms
from ..core.glibc_malloc import keep_memory
from ..core.memory_format import convert_nested
from ..find.selection import fastest
from .common import UsageError, build, pick_device
from .models import PANEL, make_learner, versions
from .reference_timing import interleaved, judge, judge_predictions
from .report import print_report
from .rows import columns, measure_row, plan, summary


def overhead(device, n=20) -> str:
    "What the callback costs where there is nothing left to cast, and what casting a batch does."
    learn = make_learner('resnet152', 64, 2, device).to_channelslast(to_fp16=False)
    with learn.no_logging(): learn.fit(1)  # so that the optimizer's state is looked through, too
    batch = torch.randn(64, 3, 224, 224, device=device)
    def _fit():
        learn.channels_last.before_fit()
        learn.channels_last.before_train()
    work = dict(fit=_fit, batch=lambda: convert_nested(batch, {4}))
    ms = interleaved({k: partial(elapsed_ms, device, f) for k, f in work.items()}, n)
    ms = {k: fastest(v) for k, v in ms.items()}
    return (f"before a fit of a ResNet-152 that is channels last already: {ms['fit']:.1f} ms; "
            f"casting a batch of 64×3×224×224: {ms['batch']:.1f} ms")


def main(
    models: str = '', # Names of the panel or of any classifier, with commas; without them, the whole panel
    size: int = 0, # Height and width of images; 0: the panel's own on a CPU or an Apple GPU, 224 on other GPUs
    bs: int = 0, # Images per batch; 0: the panel's own (128 on other GPUs); of predictions 16 (128) and 1
    device: str = None, # cpu, cuda, cuda:1, mps…; without it, the fastest there is
    num_it: int = 20, # Timed steps, or predictions, of each candidate by the judge, on up to six sets of copies
    busy: store_true = False, # Pick beside a second process that computes in bursts; judge without it
    predict: store_true = False, # Predictions in place of training steps: 224 px, in batches and one by one
    report: store_true = False, # Training, predictions and format_summary, as Markdown to paste; can be resumed
):
    "Measure what format_find picks for a panel of models against an independent, longer measurement."
    if num_it < 1: raise UsageError(f'--num-it {num_it}: must be above 0')
    device = pick_device(device)
    names = [o.strip() for o in models.split(',') if o.strip()] or list(PANEL)
    for n in names:
        if n in PANEL: continue
        try: build(n, 10, size or 64)  # a wrong name shows before anything is measured
        except UsageError: raise
        except Exception: pass  # its row will show that
    machine = versions(device) + (', `keep_memory()`' if keep_memory(False) else '')  # named where it works
    kinds = ['predictions'] if predict else ['training', 'predictions', 'format_summary']
    if report: return print_report(names, size, bs, device, num_it, busy, kinds, machine)
    print(machine, flush=True)
    rows, judged = [], judge_predictions if predict else judge
    for _, name, px, images in plan(kinds[:1], names, size, bs, device):
        rows.append(measure_row(judged, name, px, images, device, num_it, busy))
        rows[-1].pop('candidates', None)  # they are the report's
        header = len(rows) == 1 or list(rows[-1]) != list(rows[-2])  # candidates differ from model to model
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=header), flush=True)
    print()
    print(pd.DataFrame(rows, columns=columns(rows)).fillna('–').to_string(index=False))
    print(summary(rows))
    if all('error' in r for r in rows): sys.exit('channelslast: all rows failed')
    if not predict: print(overhead(device))
