"""`channelslast bench`: compare the candidate that `format_find` picks with the fastest one according to an
independent, longer measurement."""
import sys
import warnings
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
from .reference_timing import interleaved, judge, judge_compiled, judge_predictions
from .report import print_report
from .rows import columns, measure_row, plan, summary


def overhead(device, n=20) -> str:
    "Time that the callback takes before a fit with nothing left to convert, and time to convert a batch."
    learn = make_learner('resnet152', 64, 2, device).to_channelslast(to_fp16=False)
    with learn.no_logging(): learn.fit(1)  # creates optimizer state, which the callback checks too
    batch = torch.randn(64, 3, 224, 224, device=device)
    def _fit():
        learn.channels_last.before_fit()
        learn.channels_last.before_train()
    work = dict(fit=_fit, batch=lambda: convert_nested(batch, {4}))
    times = interleaved({k: partial(elapsed_ms, device, f) for k, f in work.items()}, n)
    return (f"Overhead: {fastest(times['fit']):.1f} ms before a fit of a ResNet-152 that is already in channels last; "
            f"{fastest(times['batch']):.1f} ms to convert a batch of 64×3×224×224")


def main(
    models: str = '', # Comma-separated names, of the panel or of any torchvision or timm classifier; empty: the panel
    size: int = 0, # Height and width; 0: 224 (video: 112), or the panel's own for training on a CPU or Apple GPU
    bs: int = 0, # Images per batch; 0: the panel's own (other GPUs: 128), for predictions 16 (other GPUs: 128) and 1
    device: str = None, # cpu, cuda, cuda:1, mps, …; default: the fastest one available
    num_it: int = 20, # Minimum timed steps (predictions) per candidate in the reference timing; 6 copies (compiled: 3)
    busy: store_true = False, # Run format_find while a second process computes in bursts; not the reference timing
    predict: store_true = False, # Measure predictions instead of training: 224 px, in batches and one by one
    compile: store_true = False, # With --predict: also measure compiled predictions; compiling a model takes minutes
    report: store_true = False, # Print training, predictions and format_summary as Markdown to paste; can be resumed
):
    "Compare what format_find picks for a panel of models with an independent, longer measurement."
    if num_it < 1: raise UsageError(f'--num-it {num_it}: must be above 0')
    if compile and not predict:
        raise UsageError('--compile: pass it only with --predict; the bench measures compiled predictions only')
    device = pick_device(device)
    names = [o.strip() for o in models.split(',') if o.strip()] or list(PANEL)
    for n in names:
        if n in PANEL: continue
        try: build(n, 10, size or 64)  # report a wrong name before anything is measured
        except UsageError: raise
        except Exception: pass  # other errors go into the model's row
    # fastai's own `to_channelslast`, which is measured too, warns in each fit on a CPU
    warnings.filterwarnings('ignore', module=r'fastai\.callback\.fp16')
    machine = versions(device)
    memory_can_be_kept = keep_memory(False)
    if memory_can_be_kept: machine += ', `keep_memory()`'
    kinds = ['predictions'] if predict else ['training', 'predictions', 'format_summary']
    if compile: kinds = ['compiled predictions']
    if report: return print_report(names, size, bs, device, num_it, busy, kinds, machine)
    print(machine, flush=True)
    rows, measure = [], judge_compiled if compile else judge_predictions if predict else judge
    for _, name, px, images in plan(kinds[:1], names, size, bs, device):
        rows.append(measure_row(measure, name, px, images, device, num_it, busy))
        rows[-1].pop('candidates', None)  # only the report shows them
        header = len(rows) == 1 or list(rows[-1]) != list(rows[-2])  # models differ in their candidates
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=header), flush=True)
    print()
    print(pd.DataFrame(rows, columns=columns(rows)).fillna('–').to_string(index=False))
    print(summary(rows))
    if all('error' in r for r in rows): sys.exit('channelslast: all rows failed')
    if not predict: print(overhead(device))
