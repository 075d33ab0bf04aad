"""`channelslast bench --report`: a benchmark report of a machine as Markdown, to paste into an issue.

Finished rows are kept in a file, so that a report can be stopped and resumed."""
import html
import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from fastai.callback.fp16 import AMPMode
from fastcore.basics import uniqueify

from .. import less_random
from ..core import devices
from ..core.devices import elapsed_ms, free_memory
from .common import UsageError
from .models import make_learner
from .reference_timing import judge, judge_compiled, judge_predictions
from .rows import columns, measure_row, plan, summary

# Per row and millisecond of its model's forward pass, at the default `num_it`, from three models on a CPU in fp32;
# compiled predictions are guessed, since compiling takes most of their time
SECONDS = {'training': 0.78, 'predictions': 0.65, 'compiled predictions': 1.3, 'format_summary': 0.02}
FILE = Path('channelslast-report.jsonl')  # in the current folder
TITLES = {'training': 'Training steps', 'predictions': 'Predictions',
          'compiled predictions': 'Predictions, also with the model compiled',
          'format_summary': '`format_summary` of a training step in channels last'}


def log(message):
    "Print progress to standard error, apart from the report."
    print(message, file=sys.stderr, flush=True)


def judge_format(name, size, bs, device, num_it, busy=False) -> dict:
    "The verdict of `format_summary` on one model in channels last, in fp16 if the device is fast in it."
    fp16 = devices.autocast_is_fast(device, AMPMode.FP16)
    with less_random(): result = make_learner(name, size, bs, device).to_channelslast(to_fp16=fp16).format_summary()
    return {'model': name, 'px': size, 'batch': bs, 'verdict': result.verdict}


def forward_pass_ms(name, size, bs, device) -> float: # None if it fails; the model's row will show the error
    "Milliseconds of the second forward pass in contiguous fp32, from which a row's duration is estimated."
    try:
        free_memory(device)
        learn = make_learner(name, size, bs, device)
        model, x = learn.model.to(device).eval(), learn.dls.one_batch()[0]
        with torch.no_grad(): return [elapsed_ms(device, partial(model, x)) for _ in range(2)][1]
    except Exception: return None


def row_name(kind, name, px, bs) -> str: return f'{name}, {kind}, {px} px, batch {bs}'
def duration(seconds) -> str: return f'{seconds:.0f} s' if seconds < 100 else f'{seconds/60:.0f} minutes'


def seconds_left(todo, done, forward, n_half) -> float:
    """Estimated seconds for the rows of `todo` on an idle machine that is fast in `n_half` half precisions.

    Models differ in speed by more than 10 times, so a row's time is taken as proportional to its model's `forward`
    pass. The finished rows of the same kind give the factor. Before the first one, the factor is that of a CPU."""
    total = 0
    for kind in {row[0] for row in todo}:
        known = [(o['seconds'], o['forward_pass_ms']) for row, o in done.items()
                 if row[0] == kind and o['forward_pass_ms'] and 'error' not in o['row']]
        known = known or [(SECONDS[kind]*(1 + 1.5*n_half), 1)]  # two candidates, and three more per half precision
        seconds, ms = map(sum, zip(*known))
        total += seconds/ms*sum(forward[row[1:]] or 0 for row in todo if row[0] == kind)
    return total


def load_records(path) -> dict: # Record of each key
    "The rows that earlier runs finished. A line that was cut off is skipped."
    records = {}
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
            if 'forward_pass_ms' in record: records[tuple(record['key'])] = record  # older ones have other columns
        except (ValueError, TypeError, KeyError): pass
    return records


def table(rows) -> str:
    "A Markdown table of dictionaries."
    def _line(cells): return f"| {' | '.join(map(_cell, cells))} |"
    def _cell(v):
        if isinstance(v, float): v = f'{v:.0f}' if v >= 100 else f'{v:.3g}'
        text = '–' if v is None else ' '.join(str(v).split())
        return html.escape(text, quote=False).replace('|', r'\|')
    names = columns(rows)
    return '\n'.join([_line(names), _line(['---']*len(names)), *(_line([r.get(c) for c in names]) for r in rows)])


def markdown(
    machine: str, # Versions and device
    run: str, # How it was measured
    records: dict, # `(kind, name, px, bs)` to record
) -> str:
    "The report."
    parts, candidates = [f'- {machine}\n- {run}'], []
    for kind, title in TITLES.items():
        rows = [dict(o['row']) for row, o in records.items() if row[0] == kind]
        if not rows: continue
        for r in rows:
            about = {'model': r['model'], 'batch': r['batch'], 'kind': kind}
            candidates += [about | c for c in r.pop('candidates', ())]
        parts += [f'### {title}', table(rows)]
        if kind != 'format_summary': parts.append(summary(rows))
    if candidates:
        parts.append('<details><summary>Each candidate: ms measured by format_find, ms in the reference timing (for '
                     f'predictions, of two batches), peak memory</summary>\n\n{table(candidates)}\n\n</details>')
    return '\n\n'.join(parts)


def is_usable(device) -> bool:
    "True unless this process can no longer use the device, as after an error in a CUDA kernel."
    try: return torch.ones(1, device=device).item() == 1
    except Exception: return False


def measure_rows(
    todo: list, # `(kind, name, px, bs)` of each row
    records: dict, # Record of each row measured before; those of `todo` are added
    save, # Called with each row and its record
    device: torch.device,
    num_it: int, # Timed steps per candidate
    busy: bool, # True: `format_find` runs next to a busy process
) -> str: # Why it ended early; empty if all of `todo` were measured
    "Measure rows. After each, print how long the remaining ones will take."
    forward = {model: forward_pass_ms(*model, device) for model in uniqueify(row[1:] for row in todo)}
    n_half = sum(devices.autocast_is_fast(device, o) for o in AMPMode)
    def _left(rows): return f'about {duration(seconds_left(rows, records, forward, n_half))}'
    if todo: log(f'{len(todo)} rows: {_left(todo)} on an idle machine (a first estimate, corrected after each row)')
    measures = {'training': judge, 'predictions': judge_predictions, 'compiled predictions': judge_compiled,
                'format_summary': judge_format}
    for i, row in enumerate(todo, 1):
        start = time.perf_counter()
        result = measure_row(measures[row[0]], *row[1:], device, num_it, busy)
        seconds = time.perf_counter() - start
        records[row] = dict(row=result, seconds=seconds, forward_pass_ms=forward[row[1:]])
        save(row, records[row])
        left = f'; {_left(todo[i:])} left on an idle machine' if todo[i:] else ''
        log(f"{i} of {len(todo)}: {row_name(*row)}: {result.get('error') or duration(seconds)}{left}")
        if 'error' in result and not is_usable(device): return f'The last error made {device} unusable in this process'
    return ''


def print_report(
    names: list, size: int, bs: int, # Models, height and width of images, images per batch; 0: the panel's own
    device: torch.device,
    num_it: int, # Timed steps per candidate
    busy: bool, # True: `format_find` runs next to a busy process
    kinds, # Names in `TITLES`
    machine: str, # Versions and device
    path: Path = FILE, # Where finished rows are kept
):
    "Measure all rows that are not in `path`. The report goes to standard output, progress to standard error."
    try: path.open('a').close()
    except OSError as e: raise UsageError(f"--report: {path} can't be written ({e.strerror}); run it in another folder")
    machine = f"channelslast {version('channelslast')}, torchvision {torchvision.__version__}; {machine}"
    def _key(row): return machine, str(device), num_it, busy, *row
    def _save(row, record): # the line break comes first: the last line of an earlier run may have been cut off
        with path.open('a', encoding='utf-8') as f: f.write('\n' + json.dumps({'key': _key(row), **record}))
    rows, saved = plan(kinds, names, size, bs, device), load_records(path)
    records = {row: saved[_key(row)] for row in rows if _key(row) in saved}
    failed = [row for row in records if 'error' in records[row]['row']]
    todo = [row for row in rows if row not in records] + [row for row in rows if row in failed]
    log(f'{machine}\n{len(rows)} rows; finished rows are kept in {path.resolve()}')
    for row in rows:
        if row not in todo: log(f'measured before: {row_name(*row)}')
    if todo: log('Timing a forward pass of each model to estimate the duration …')
    try: stopped = measure_rows(todo, records, _save, device, num_it, busy)
    except KeyboardInterrupt: stopped = 'Stopped'
    good = sum('error' not in o['row'] for o in records.values())
    run = f"{good} of {len(rows)} rows in {duration(sum(o['seconds'] for o in records.values()))}, `--num-it {num_it}`"
    if busy: run += ', `--busy`'
    print('\n' + markdown(machine, run, {row: records[row] for row in rows if row in records}))
    again = 'run the same command in the same folder'
    if stopped: sys.exit(f'\nchannelslast: {stopped}. To resume, {again}.')
    if good < len(rows): log(f'\n{len(rows) - good} rows failed. To retry them, {again}.')
    if not good: sys.exit('channelslast: all rows failed')
