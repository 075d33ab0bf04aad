"Train and predict faster with fastai: measure memory formats and precisions, and switch a Learner to the fastest."
import warnings as _warnings

with _warnings.catch_warnings():
    _warnings.filterwarnings('ignore', r'`torch\.jit\.script', FutureWarning)  # fastai calls it when it is imported
    from fastai.learner import Learner as _Learner

from .core.glibc_malloc import keep_memory
from .core.random_state import less_random
from .find.format_find import FormatTimings
from .predict.compile_predictions import CompilePredictions
from .learner.compile_training import CompileTraining
from .predict.fold_batch_norm import FoldBatchNorm
from .learner import fastai_patches  # fastai's own methods, for every Learner
from .learner.channels_last import ChannelsLast
from .learner.fused_optimizer import fused
from .summary.format_summary import FormatSummary

__all__ = ['ChannelsLast', 'CompilePredictions', 'CompileTraining', 'FoldBatchNorm', 'fused', 'keep_memory',
           'less_random']

# doctest does not find patched methods itself
__test__ = {o: getattr(_Learner, o) for o in ('to_channelslast', 'to_contiguous', 'to_fp16', 'to_bf16', 'load',
                                              'format_summary', 'format_find', 'to_fastest')}
