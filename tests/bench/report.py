"""Rows of results, one per model, kind and batch size, and `--report`: all rows as Markdown, to paste into an issue.

An error becomes a row, and a batch that does not fit in memory is halved. A report can be stopped and resumed."""
import html
import json
import sys
import time
from pathlib import Path

import torch
from fastai.callback.fp16 import AMPMode
from fastcore.basics import uniqueify

from channelslast import less_random
from channelslast.command.common import UsageError
from channelslast.core import devices
from .app import judge_app
from .models import make_learner
from .reference import judge

FILE = Path('channelslast-report.jsonl')  # the finished rows of reports, in the current folder
TITLES = {'training': 'Training steps', 'predictions': 'Predictions', 'compiled predictions': 'Predictions, also with the model compiled',
          'app': 'One image: `learn.predict(image)`', 'format_summary': '`format_summary` of a training step in channels last'}


def measure(kind, name, px, bs, device, num_it, busy) -> dict:
    "Measure one row. For `'format_summary'`, the model trains in channels last, in fp16 if the device is fast in it."
    if kind == 'app': return judge_app(name, px, device, num_it)
    if kind != 'format_summary': return judge(name, px, bs, device, num_it, busy, kind == 'training', kind == 'compiled predictions')
    fp16 = devices.autocast_is_fast(device, AMPMode.FP16)
    with less_random(): result = make_learner(name, px, bs, device).to_channelslast(to_fp16=fp16).format_summary()
    return {'model': name, 'px': px, 'batch': bs, 'verdict': result.verdict}


def measure_row(row, device, num_it, busy) -> dict: # With the column `error` if it failed
    "The row `(kind, name, px, bs)`. The batch is halved until it fits in memory."
    kind, name, px, requested = row
    bs = requested
    while True:
        try:
            devices.free_memory(device)  # not in the handler below, whose traceback holds the failed step's tensors
            result = measure(kind, name, px, bs, device, num_it, busy)
            break
        except Exception as e:
            too_large = devices.is_out_of_memory(e)
            result = {'model': name, 'px': px, 'batch': bs, 'error': f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
        if not too_large or bs == 1: break
        bs //= 2
    if bs < requested: result['batch'] = f'{bs} ({requested}: out of memory)'
    return result


def columns(rows) -> list:
    "The columns of all rows: those of the longest row first, `error` last."
    by_length = sorted(rows, key=lambda row: ('error' not in row, len(row)), reverse=True)
    return uniqueify(column for row in by_length for column in row)


def summary(rows) -> str:
    "All rows in one line."
    good = [r for r in rows if 'error' not in r]
    failed = f'{len(rows) - len(good)} of {len(rows)} rows failed'
    if not good: return failed
    ratios, speedups, seconds = ([float(r[c].rstrip('× s')) for r in good] for c in ('pick/best', 'speedup', 'search time'))
    text = (f'{sum(o <= 1.05 for o in ratios)} of {len(ratios)} picks within 5% of the best; speedup over contiguous fp32 at least '
            f'{min(speedups):.2f}×; format_find took {sum(seconds):.0f} s')
    return text if len(good) == len(rows) else f'{text}; {failed}'


def table(rows) -> str:
    "A Markdown table of dictionaries."
    def _cell(v):
        if isinstance(v, float): v = f'{v:.0f}' if v >= 100 else f'{v:.3g}'
        return '–' if v is None else html.escape(' '.join(str(v).split()), quote=False).replace('|', r'\|')
    names = columns(rows)
    lines = [names, ['---']*len(names), *([r.get(c) for c in names] for r in rows)]
    return '\n'.join(f"| {' | '.join(map(_cell, o))} |" for o in lines)


def markdown(results) -> str: # `results`: `(kind, name, px, bs)` to row
    "A table per kind, and one of all candidates."
    parts, candidates = [], []
    for kind, title in TITLES.items():
        rows = [dict(r) for row, r in results.items() if row[0] == kind]
        if not rows: continue
        for r in rows: candidates += [{'model': r['model'], 'batch': r['batch'], 'kind': kind} | c for c in r.pop('candidates', ())]
        parts += [f'### {title}', table(rows)]
        if kind != 'format_summary': parts.append(summary(rows))
    if candidates:
        parts.append('<details><summary>Each candidate: ms measured by format_find, ms in the reference timing (for predictions, of '
                     f'two batches), peak memory</summary>\n\n{table(candidates)}\n\n</details>')
    return '\n\n'.join(parts)


def load_results() -> dict: # Row of each key
    "The rows that earlier runs finished. A line that was cut off is skipped."
    results = {}
    for line in FILE.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
            results[tuple(record['key'])] = record['row']
        except (ValueError, TypeError, KeyError): pass
    return results


def print_report(rows, device, num_it, busy, machine):
    "Measure each `(kind, name, px, bs)` that is not in `FILE`. Progress goes to standard error."
    def _log(message): print(message, file=sys.stderr, flush=True)
    def _name(kind, name, px, bs): return f'{name}, {kind}, {px} px, batch {bs}'
    def _key(row): return machine, str(device), num_it, busy, *row
    try: FILE.open('a').close()
    except OSError as e: raise UsageError(f"--report: {FILE} can't be written ({e.strerror}); run it in another folder")
    _log(f'{machine}\n{len(rows)} rows; finished rows are kept in {FILE.resolve()}')
    saved, stopped, again = load_results(), '', 'run the same command in the same folder'
    results = {row: saved[_key(row)] for row in rows if _key(row) in saved}
    failed = [row for row in results if 'error' in results[row]]  # one may have ended the process, so they come last
    for row in results:
        if row not in failed: _log(f'measured before: {_name(*row)}')
    todo = [row for row in rows if row not in results] + failed
    try:
        for i, row in enumerate(todo, 1):
            start = time.perf_counter()
            results[row] = r = measure_row(row, device, num_it, busy)
            with FILE.open('a', encoding='utf-8') as f: f.write('\n' + json.dumps({'key': _key(row), 'row': r}))  # the last line may be cut off
            _log(f"{i} of {len(todo)}: {_name(*row)}: {r.get('error') or f'{time.perf_counter() - start:.0f} s'}")
            if 'error' in r: torch.ones(1, device=device).item()  # fails after an error in a CUDA kernel, as would all other rows
    except (KeyboardInterrupt, RuntimeError) as e: stopped = f'Stopped by {type(e).__name__}'
    good = sum('error' not in r for r in results.values())
    print(f"\n- {machine}\n- {good} of {len(rows)} rows, `--num-it {num_it}`{', `--busy`' if busy else ''}\n")
    print(markdown({row: results[row] for row in rows if row in results}))
    if stopped: sys.exit(f'\n{stopped}. To resume, {again}.')
    if good < len(rows): _log(f'\n{len(rows) - good} rows failed. To retry them, {again}.')
    if not good: sys.exit('All rows failed')
