"""Choices of `selection`, counted over recorded and made-up times. `recorded/` holds steps next to a process that
computes in bursts, on a CPU with AVX512-BF16 and on one without; each file names machine, versions and date.
`nbs/train-avx512-bf16.json` holds steps of a quiet machine."""
import json
import random
import statistics
from pathlib import Path

import pytest

from channelslast.find.selection import HOPELESS_FACTOR, MIN_ROUNDS, MIN_TOTAL_MS, PATIENCE_MS, PATIENCE_ROUNDS, SMALL_GAIN, TIE, Decision, decide, eliminated, fastest, should_stop, too_early, uncertainty, wins_sign_test

recorded = Path(__file__).parent/'recorded'
busy = json.loads((recorded/'busy-steps-avx512-bf16.json').read_text())['models']
quiet = json.loads((Path(__file__).parent.parent/'nbs'/'train-avx512-bf16.json').read_text())['models']
fp32 = json.loads((recorded/'busy-steps-avx512.json').read_text())['models']
SIMPLE = ['contiguous, fp32', 'channels last, fp32', 'contiguous, bf16', 'channels last, bf16', 'channels last, bf16+fp32']


def race(step, keys, num_it=15, incumbent='contiguous, fp32'):
    "The decision and the number of steps that it took; `step(key, round)` returns milliseconds."
    times, steps = {k: [] for k in keys}, 0
    for i in range(num_it):
        for k in list(reversed(times) if i % 2 else times): times[k].append(step(k, i))
        steps += len(times)
        for k in eliminated(times): del times[k]
        if should_stop(decide(times, incumbent), times): break
    return decide(times, incumbent), steps


def starts(model):
    "`(step, keys, true)` for each recorded run from each of its rounds on; `true` are times on a quiet machine."
    true = busy[model]['true']
    for run in busy[model]['runs']:
        keys = [k for k in SIMPLE if k in run and k in true]
        for s in range(40): yield lambda k, i: run[k][(s + i) % 40], keys, true


def right(pick, true): return true[pick] <= 1.05*min(true.values())


# one number per candidate

@pytest.mark.parametrize('model, medians, quarters, tenths, fastests', [('mobilenet_v2', 166, 197, 198, 200),
                                                                        ('regnet_y_400mf', 143, 186, 199, 200)])
def test_the_fastest_of_ten_holds_where_others_do_not(model, medians, quarters, tenths, fastests):
    "Right picks out of 200, each from ten consecutive recorded rounds."
    def _lowest(part): return lambda ms: statistics.quantiles(ms, n=100, method='inclusive')[round(part*100) - 1]
    def _count(f):
        picks = [(min(keys, key=lambda k: f([step(k, i) for i in range(10)])), true) for step, keys, true in starts(model)]
        return sum(right(*o) for o in picks)
    assert [_count(f) for f in (statistics.median, _lowest(.25), _lowest(.1), fastest)] == [medians, quarters, tenths, fastests]


def noise(kind, rnd):
    "Milliseconds of a step that takes 1 ms undisturbed."
    clean = 1 + abs(rnd.gauss(0, 0.01))
    return clean*rnd.uniform(1.3, 6) if kind == 'bursts' and rnd.random() < 0.4 else clean


def made_up(kind, true, seed, num_it=15, noisy=None, drift=0.):
    rnd, n = random.Random(seed), [0]
    def _step(k, i):
        n[0] += 1
        ms, spread = true[k]*noise(kind, rnd)*(1 + drift*n[0]), abs(rnd.gauss(0, 0.15))
        return ms*(1 + spread) if k == noisy else ms
    return race(_step, list(true), num_it, incumbent=next(iter(true)))


FIVE = dict(a=100., b=80., c=95., d=60., e=55.)

@pytest.mark.parametrize('kind, median, low', [('quiet', 300, 300), ('bursts', 200, 300)])
def test_the_fastest_of_ten_on_made_up_times(kind, median, low):
    "Right picks out of 300, by the median of ten steps and by the fastest."
    counts = [0, 0]
    for seed in range(300):
        rnd = random.Random(seed)
        times = {k: [v*noise(kind, rnd) for _ in range(10)] for k, v in FIVE.items()}
        for j, f in enumerate((statistics.median, fastest)): counts[j] += right(min(times, key=lambda k: f(times[k])), FIVE)
    assert counts == [median, low]


# whole searches: right picks, sure ones, and their number of steps

@pytest.mark.parametrize('model, rights, sures, steps', [('mobilenet_v2', 197, 176, 28), ('regnet_y_400mf', 199, 149, 26)])
def test_recorded_on_a_busy_machine(model, rights, sures, steps):
    "200 searches of at most 15 rounds; `steps` is the mean, which would be 75 and 60 without early stopping."
    ends = [(race(step, keys), true) for step, keys, true in starts(model)]
    assert sum(right(d.best, true) for (d, _), true in ends) == rights
    assert sum(d.sure for (d, _), _ in ends) == sures
    assert round(statistics.mean(n for (_, n), _ in ends)) == steps


@pytest.mark.parametrize('incumbent', ['contiguous, fp32', 'channels last, fp32'])
@pytest.mark.parametrize('name, rights', [('regnet_y_400mf', (57, 58)), ('resnet18', (45, 45)), ('shufflenet_v2_x1_0', (60, 60))])
def test_recorded_where_most_steps_are_disturbed(name, rights, incumbent):
    """Two candidates that differ by 12% (RegNetY) or by less than a tie. 40 to 76% of the steps took over 1.3 times as
    long, some ten times. A slower incumbent is mostly replaced, and a faster one mostly kept."""
    ms = fp32[name]
    true, n = {k: min(v) for k, v in ms.items()}, len(ms[incumbent])
    ends = [race(lambda k, i: ms[k][(s + i) % n], list(ms), incumbent=incumbent)[0] for s in range(n)]
    assert sum(right(d.best, true) for d in ends) == dict(zip(ms, rights))[incumbent]


@pytest.mark.parametrize('name', quiet)
def test_recorded_in_quiet(name):
    "Steps between the recorded fastest and median. The pick is nearly the fastest, and at most a tie slower than the incumbent."
    ms = {k: v for k, v in quiet[name]['ms'].items() if k in SIMPLE}
    def _step(rnd): return lambda k, i: ms[k][0] + (ms[k][1] - ms[k][0])*2*rnd.random()**2
    ends = [race(_step(random.Random(seed)), [k for k in SIMPLE if k in ms]) for seed in range(50)]
    best = min(v[0] for v in ms.values())
    assert sum(ms[d.best][0] <= 1.05*best for d, _ in ends) >= 48
    assert all(ms[d.best][0] <= 1.02*ms['contiguous, fp32'][0] for d, _ in ends)


@pytest.mark.parametrize('kind, true, more, rights, sures, steps', [
    ('quiet', FIVE, {}, 100, 100, 15),
    ('bursts', FIVE, {}, 98, 99, 25),
    ('quiet', FIVE, dict(drift=2e-3), 100, 100, 15),                  # clocks slow down by a fifth in 100 steps
    ('quiet', FIVE, dict(noisy='e'), 95, 98, 16),                    # the fastest is much noisier than the others
    ('bursts', dict(a=100., b=98.5), {}, 100, 42, 12),                # nearly equal: both picks are right
    ('quiet', dict(a=100., b=100.), {}, 100, 100, 8),
    ('quiet', dict.fromkeys('abcde', 100.), {}, 100, 100, 24),
    ('bursts', dict.fromkeys('abcde', 100.), {}, 100, 75, 36)])
def test_made_up(kind, true, more, rights, sures, steps):
    "100 searches; `steps` is the mean."
    ends = [made_up(kind, true, seed, **more) for seed in range(100)]
    assert (sum(right(d.best, true) for d, _ in ends), sum(d.sure for d, _ in ends), round(statistics.mean(n for _, n in ends))) == (
        rights, sures, steps)


# the rules

def test_doubt():
    assert uncertainty([100.]) == 0.9  # one step knows nothing
    assert uncertainty([100., 101., 110.]) == pytest.approx(0.3) and uncertainty([110., 100., 101., 400.]) == pytest.approx(0.2)
    assert uncertainty([100.]*3) == 0 and uncertainty([100., 200., 900.]) == 0.9
    assert uncertainty([100., 104.]) == pytest.approx(0.24)  # two steps that agree may be disturbed alike


def test_early():
    assert too_early(dict(a=[80.]*3, b=[80.]*3)) and not too_early(dict(a=[80.]*4, b=[80.]*3)) and not too_early(dict(a=[MIN_TOTAL_MS]))


def test_beaten():
    clear, near = [100., 100., 100.], [103., 103., 103.]
    assert eliminated(dict(a=clear, b=near)) == ['b'] and eliminated(dict(a=clear, b=[101.]*3)) == []
    assert eliminated(dict(a=clear, b=[150., 170., 400.])) == []  # undisturbed, it may be as fast
    near, far = 100.*(HOPELESS_FACTOR - 1), 100.*(HOPELESS_FACTOR + 1)
    assert eliminated(dict(a=[100.]*2, b=[near]*2, c=[far]*2)) == ['c'] and eliminated(dict(a=[100.], b=[far])) == []


def test_ahead():
    def _won(won, n): return wins_sign_test([1.]*n, [2.]*won + [0.5]*(n - won))
    assert [next((k for k in range(n + 1) if _won(k, n)), None) for n in (5, 6, 8, 10, 12, 15)] == [None, 6, 8, 9, 10, 12]
    assert not wins_sign_test([1.]*15, [1.]*15)
    assert wins_sign_test([9.]*9 + [1.]*6, [2.]*6) and not wins_sign_test([1.]*9 + [9.]*6, [2.]*6)  # the common rounds are the last
    noisy = [100., 180., 130., 240., 110., 300.]
    assert eliminated(dict(a=noisy, b=[1.1*o for o in noisy])) == ['b'] and eliminated(dict(a=noisy, b=[1.01*o for o in noisy])) == []
    assert decide(dict(a=noisy, b=[1.1*o for o in noisy]), 'b').best == 'a'


@pytest.mark.parametrize('times, incumbent, best, sure', [
    (dict(a=[100.]*3, b=[50.]*3), 'a', 'b', True),
    (dict(a=[100.]*3, b=[99.]*3), None, 'a', True),               # a tie: the first one, which is simpler
    (dict(a=[100.]*3, b=[99.]*3), 'b', 'b', True),                # a tie: the incumbent
    (dict(a=[100.]*3, b=[101.5]*3), 'b', 'a', True),              # except if it is certainly slower
    (dict(a=[103.]*3, b=[100.]*3), None, 'b', True),              # no tie: the faster one
    (dict(a=[100., 200., 300.], b=[85.]*3), 'a', 'a', False),     # the incumbent may be as fast
    (dict(a=[100., 200., 300.], b=[80.]*3), None, 'b', False),
    (dict(a=[100., 105., 108.], b=[80.]*3), 'a', 'b', False),     # INCUMBENT_BONUS is not enough
    (dict(a=[100., 101., 102.], b=[50.]*3), 'a', 'b', True),
    (dict(a=[100.]), 'a', 'a', True)])
def test_decide(times, incumbent, best, sure):
    d = decide(times, incumbent)
    assert (d.best, d.sure) == (best, sure)


def test_how_much_faster_the_rival_may_be():
    assert decide(dict(a=[100.]*3, b=[100., 105., 110.])) == Decision('a', 'b', pytest.approx(1/0.7 - 1))
    assert decide(dict(a=[100.])) == Decision('a') and Decision('a', 'b', TIE).sure


def test_enough():
    near, far, sure = Decision('a', 'b', SMALL_GAIN), Decision('a', 'b', 0.06), Decision('a', 'b', TIE)
    def _times(rounds, ms=1.): return dict(a=[ms]*rounds, b=[ms]*rounds)
    assert should_stop(sure, _times(MIN_ROUNDS)) and not should_stop(sure, _times(MIN_ROUNDS - 1))
    assert should_stop(near, _times(PATIENCE_ROUNDS)) and not should_stop(near, _times(PATIENCE_ROUNDS - 1)) and not should_stop(far, _times(PATIENCE_ROUNDS))
    assert should_stop(far, _times(2*PATIENCE_ROUNDS))  # the longer it took, the larger a gain is given up
    assert should_stop(near, _times(4, PATIENCE_MS/8)) and not should_stop(near, _times(4, PATIENCE_MS/8 - 1)) and not should_stop(far, _times(4, PATIENCE_MS/8))
    assert should_stop(far, _times(4, PATIENCE_MS/4)) and not should_stop(far, _times(2, PATIENCE_MS))
