"""A benchmark of `format_find` for this repository: `python -m tests.bench` in a checkout, `--report` if you have a GPU.

It compares what `format_find` picks for a panel of models with the reference timing, an independent and longer measurement."""
from .models import PANEL, make_learner
from .reference import judge, overhead, timed_fit_step

__all__ = ['PANEL', 'make_learner', 'judge', 'overhead', 'timed_fit_step']
