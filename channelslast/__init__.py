"Train and predict faster with fastai in PyTorch's channels-last memory format, with the same numbers."
from .learner import fastai_patches  # fastai's own methods, for every Learner
from .learner.channels_last import ChannelsLast
from .fold.fold_batch_norm import FoldBatchNorm
from .find.format_find import FormatTimings
from .summary.format_summary import FormatSummary
from .core.glibc_malloc import keep_memory
from .learner.fused_optimizer import fused
from .core.random_state import less_random

__all__ = ['ChannelsLast', 'FoldBatchNorm', 'fused', 'keep_memory', 'less_random']
