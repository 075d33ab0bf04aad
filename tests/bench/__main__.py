"The command line of the benchmark."
import sys
import warnings

import pandas as pd
from fastcore.script import store_true

from channelslast.command.common import UsageError, build, pick_device, run
from channelslast.core.glibc_malloc import keep_memory
from .models import PANEL, plan, versions
from .reference import overhead
from .report import columns, measure_row, print_report, summary


def main(
    models: str = '', # Comma-separated names, of the panel or of any torchvision or timm classifier; empty: the panel
    size: int = 0, # Height and width; 0: 224 (video: 112), or the panel's own for training on a CPU or Apple GPU
    bs: int = 0, # Images per batch; 0: the panel's own (other GPUs: 128), for predictions 16 (other GPUs: 128) and 1
    device: str = None, # cpu, cuda, cuda:1, mps, …; default: the fastest one available
    num_it: int = 20, # Minimum timed steps (predictions) per candidate in the reference timing; 6 copies (compiled: 3)
    busy: store_true = False, # Run format_find while a second process computes in bursts; not the reference timing
    predict: store_true = False, # Measure predictions instead of training: 224 px, in batches and one by one
    compile: store_true = False, # With --predict: also measure compiled predictions; compiling a model takes minutes
    app: store_true = False, # Measure learn.predict(image) instead, with all that predicts faster
    report: store_true = False, # Print training, predictions and format_summary as Markdown to paste; can be resumed
):
    "Compare what format_find picks for a panel of models with an independent, longer measurement."
    if num_it < 1: raise UsageError(f'--num-it {num_it}: must be above 0')
    if compile and not predict: raise UsageError('--compile: pass it only with --predict; the benchmark measures compiled predictions only')
    device = pick_device(device)
    names = [o.strip() for o in models.split(',') if o.strip()] or list(PANEL)
    for n in names:
        if n in PANEL: continue
        try: build(n, 10, size or 64)  # report a wrong name before anything is measured
        except UsageError: raise
        except Exception: pass  # other errors go into the model's row
    # fastai's own `to_channelslast`, which is measured too, warns in each fit on a CPU
    warnings.filterwarnings('ignore', module=r'fastai\.callback\.fp16')
    machine = versions(device) + (', `keep_memory()`' if keep_memory(False) else '')
    kinds = ['app'] if app else ['compiled predictions'] if compile else ['predictions'] if predict else ['training', 'predictions', 'format_summary']
    if report: return print_report(plan(kinds, names, size, bs, device), device, num_it, busy, machine)
    print(machine, flush=True)
    rows = []
    for row in plan(kinds[:1], names, size, bs, device):
        rows.append(measure_row(row, device, num_it, busy))
        rows[-1].pop('candidates', None)  # only the report shows them
        header = len(rows) == 1 or list(rows[-1]) != list(rows[-2])  # models differ in their candidates
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=header), flush=True)
    print()
    print(pd.DataFrame(rows, columns=columns(rows)).fillna('–').to_string(index=False))
    print(summary(rows))
    if all('error' in r for r in rows): sys.exit('All rows failed')
    if not predict and not app: print(overhead(device))


def cli(): run(main, 'python -m tests.bench')


if __name__ == '__main__': cli()
