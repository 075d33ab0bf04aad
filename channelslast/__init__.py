"Train and predict faster with fastai in PyTorch's channels-last memory format, with the same numbers."
from . import mended  # fastai's own methods, for every Learner
from .callback import ChannelsLast
from .fold_batch_norm import FoldBatchNorm
from .format_find import FormatTimings
from .format_summary import FormatSummary
from .malloc import keep_memory
from .optimizers import fused
from .reproducible import less_random

__all__ = ['ChannelsLast', 'FoldBatchNorm', 'fused', 'keep_memory', 'less_random']
