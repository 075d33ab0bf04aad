"One image in an app: milliseconds of `learn.predict(image)`, plain, in the fastest setting, and in other runtimes by hand."
import time
from collections import defaultdict
from copy import deepcopy
from functools import partial

import torch
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, IndexSplitter, Learner, Normalize,
                               PILImage, Resize, imagenet_stats)
from sklearn.datasets import load_sample_image

from channelslast import CompilePredictions, less_random
from channelslast.command.common import build
from channelslast.core.devices import elapsed_ms
from channelslast.find.race import FAR_FACTOR
from .reference import ModelTime, by_hand, interleaved, is_noisy, set_running_statistics


def make_app(name, size, device) -> tuple: # A Learner, an image
    "A classifier with the transforms of an app, and a photograph of 640×427 pixels."
    photo = load_sample_image('china.jpg')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: range(16), get_x=lambda i: photo, get_y=lambda i: i % 8,
                      splitter=IndexSplitter([*range(8)]), item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders(None, bs=4, device=device, num_workers=0)
    learn = Learner(dls, build(name, dls.c, size), CrossEntropyLossFlat())
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    set_running_statistics(learn.model, torch.as_subclass(dls.one_batch()[0], torch.Tensor))
    return learn, PILImage.create(photo)


def judge_app(name, size, device, num_it, compile=True) -> dict:
    "One row. Speedups are of `predict` over plain fastai; the model's milliseconds are those inside `predict`."
    model_ms = defaultdict(list)
    with less_random():
        learn, image = make_app(name, size, device)
        dl, start = learn.dls.test_dl([image], bs=1, num_workers=0), time.perf_counter()
        timings = learn.format_find(train=False, compile=compile, dl=dl, show_plot=False)
        seconds, batch = time.perf_counter() - start, dl.one_batch()
        # few Learners: an app has one in memory
        ran = {str(r.setting): r.setting for r in timings.rows if r.valid and r.ms <= FAR_FACTOR*timings.best.ms}
        learners = {'plain': deepcopy(learn), **{k: s.apply(deepcopy(learn), False) for k, s in ran.items()}}
        learners |= {f'{k} by hand': deepcopy(learn).add_cb(cb) for k, cb in by_hand(learn, batch).items()}
        for k, o in learners.items():
            for cb in o._grab_cbs(CompilePredictions): cb.quiet = True
            o.add_cb(ModelTime(model_ms[k], device))
        def _second(o): # Milliseconds of the second of two predictions: an app has one model, so caches hold its weights
            o.predict(image)
            return elapsed_ms(device, partial(o.predict, image))
        times = interleaved({k: partial(_second, o) for k, o in learners.items()}, num_it)
    ms, model = ({k: min(v) for k, v in o.items()} for o in (times, model_ms))
    best = str(timings.best.setting)
    def _speedup(k): return f"{ms['plain']/ms[k]:.2f}×"
    return {'model': name, 'px': size, 'batch': 1, 'predict ms': f"{ms['plain']:.1f}", 'its model ms': f"{model['plain']:.1f}",
            **{k: _speedup(k) for k in ms if k != 'plain'}, 'pick': best, "pick's ms": f'{ms[best]:.1f}', "its model's ms": f'{model[best]:.1f}',
            'pick/best': f'{ms[best]/min(ms[k] for k in ran):.2f}', 'speedup': _speedup(best), 'search time': f'{seconds:.0f} s',
            'machine': 'noisy' if is_noisy(times) else 'quiet'}
