"""Choices of `selection`, counted over recorded and made-up times. `recorded/` holds steps next to a process that
computes in bursts, on a CPU with AVX512-BF16 and on one without; each file names machine, versions and date.
`nbs/train-avx512-bf16.json` holds steps of a quiet machine."""
import json
import random
import statistics
from pathlib import Path

import pytest
from pytest import approx

from channelslast.find import race as module
from channelslast.find.race import Decision, decide, eliminated, fastest, should_stop, too_early, uncertainty, wins_sign_test

recorded = Path(__file__).parent/'recorded'
busy = json.loads((recorded/'busy-steps-avx512-bf16.json').read_text())['models']
quiet = json.loads((Path(__file__).parent.parent/'nbs'/'train-avx512-bf16.json').read_text())['models']
fp32 = json.loads((recorded/'busy-steps-avx512.json').read_text())['models']
SIMPLE = ['contiguous, fp32', 'channels last, fp32', 'contiguous, bf16', 'channels last, bf16', 'channels last, bf16+fp32']


def race(step, keys, num_it=15, incumbent='contiguous, fp32'):
    "The decision and the number of steps that it took; `step(key, round)` returns milliseconds."
    taken = []
    def _step(k, i): taken.append(k); return step(k, i)
    return module.race(_step, keys, incumbent, num_it).decision, len(taken)


def starts(model):
    "`(step, keys, true)` for each recorded run from each of its rounds on; `true` are times on a quiet machine."
    true = busy[model]['true']
    for run in busy[model]['runs']:
        keys = [k for k in SIMPLE if k in run and k in true]
        for s in range(40): yield lambda k, i: run[k][(s + i) % 40], keys, true


def right(pick, true): return true[pick] <= 1.05*min(true.values())


# one number per candidate

@pytest.mark.parametrize('model', ['mobilenet_v2', 'regnet_y_400mf'])
def test_the_fastest_of_ten_recorded_steps_finds_the_right_candidate_where_quantiles_do_not(model):
    "Right picks out of 200, each from ten consecutive recorded rounds."
    def _lowest(part): return lambda ms: statistics.quantiles(ms, n=100, method='inclusive')[round(part*100) - 1]
    def _count(f):
        picks = [(min(keys, key=lambda k: f([step(k, i) for i in range(10)])), true) for step, keys, true in starts(model)]
        return sum(right(*o) for o in picks)
    counts = [_count(f) for f in (statistics.median, _lowest(.25), _lowest(.1), fastest)]
    assert counts[-1] == 200 and counts == sorted(counts) and counts[0] < 170


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

@pytest.mark.parametrize('kind, by_median', [('quiet', 300), ('bursts', 200)])
def test_the_fastest_of_ten_made_up_steps_finds_the_right_candidate_also_in_bursts(kind, by_median):
    counts = [0, 0]
    for seed in range(300):
        rnd = random.Random(seed)
        times = {k: [v*noise(kind, rnd) for _ in range(10)] for k, v in FIVE.items()}
        for j, f in enumerate((statistics.median, fastest)): counts[j] += right(min(times, key=lambda k: f(times[k])), FIVE)
    assert counts == [by_median, 300]


# whole searches: right picks, sure ones, and their number of steps

@pytest.mark.parametrize('model, rights, sures, steps', [('mobilenet_v2', 194, 160, 34), ('regnet_y_400mf', 196, 130, 32)])
def test_searches_on_recorded_steps_of_a_busy_machine_are_nearly_always_right_and_short(model, rights, sures, steps):
    "200 searches of at most 15 rounds; without early stopping, the mean number of steps would be 75 and 60."
    ends = [(race(step, keys), true) for step, keys, true in starts(model)]
    assert sum(right(d.best, true) for (d, _), true in ends) >= rights
    assert sum(d.sure for (d, _), _ in ends) >= sures
    assert statistics.mean(n for (_, n), _ in ends) <= steps


@pytest.mark.parametrize('incumbent', ['contiguous, fp32', 'channels last, fp32'])
@pytest.mark.parametrize('name, rights', [('regnet_y_400mf', 54), ('resnet18', 45), ('shufflenet_v2_x1_0', 60)])
def test_searches_where_most_steps_are_noisy_mostly_replace_a_slower_incumbent_and_keep_a_faster_one(name, rights, incumbent):
    """Two candidates that differ by 12% (RegNetY) or by less than a tie. 40 to 76% of the steps took over 1.3 times as
    long, some ten times. 60 searches, ResNet 45."""
    ms = fp32[name]
    true, n = {k: min(v) for k, v in ms.items()}, len(ms[incumbent])
    ends = [race(lambda k, i: ms[k][(s + i) % n], list(ms), incumbent=incumbent)[0] for s in range(n)]
    assert sum(right(d.best, true) for d in ends) >= rights


@pytest.mark.parametrize('name', quiet)
def test_searches_on_recorded_steps_of_a_quiet_machine_find_nearly_the_fastest(name):
    "Steps between the recorded fastest and median. The pick is at most a tie slower than the incumbent."
    ms = {k: v for k, v in quiet[name]['ms'].items() if k in SIMPLE}
    def _step(rnd): return lambda k, i: ms[k][0] + (ms[k][1] - ms[k][0])*2*rnd.random()**2
    ends = [race(_step(random.Random(seed)), [k for k in SIMPLE if k in ms]) for seed in range(50)]
    best = min(v[0] for v in ms.values())
    assert sum(ms[d.best][0] <= 1.05*best for d, _ in ends) >= 48
    assert all(ms[d.best][0] <= 1.02*ms['contiguous, fp32'][0] for d, _ in ends)


@pytest.mark.parametrize('kind, true, more, rights, sures, steps', [
    ('quiet', FIVE, {}, 100, 100, 18),
    ('bursts', FIVE, {}, 95, 90, 32),
    ('quiet', FIVE, dict(drift=2e-3), 100, 100, 18),                  # clocks slow down by a fifth in 100 steps
    ('quiet', FIVE, dict(noisy='e'), 92, 90, 20),                    # the fastest is much noisier than the others
    ('bursts', dict(a=100., b=98.5), {}, 100, 30, 16),                # nearly equal: both picks are right
    ('quiet', dict(a=100., b=100.), {}, 100, 100, 11),
    ('quiet', dict.fromkeys('abcde', 100.), {}, 100, 100, 30),
    ('bursts', dict.fromkeys('abcde', 100.), {}, 100, 60, 45)])
def test_searches_on_made_up_times_are_right_and_short(kind, true, more, rights, sures, steps):
    "100 searches: at least so many right picks and sure ones, in at most so many steps on average."
    ends = [made_up(kind, true, seed, **more) for seed in range(100)]
    assert sum(right(d.best, true) for d, _ in ends) >= rights and sum(d.sure for d, _ in ends) >= sures
    assert statistics.mean(n for _, n in ends) <= steps


# the rules

def test_uncertainty_is_large_for_few_or_differing_steps_and_zero_for_three_equal_ones():
    assert uncertainty([100.]) == uncertainty([100., 200., 900.]) >= 0.5  # nothing is known
    assert uncertainty([100.]*3) == 0 and uncertainty([100.]*3 + [900.]) == 0
    assert 0.1 < uncertainty([100., 104.]) < 0.5  # two steps that agree may both be noisy
    assert uncertainty([100., 101., 110.]) == uncertainty([110., 100., 101.]) > 0.1  # more than the gap to the third fastest
    assert uncertainty([110., 100., 101., 400.]) < uncertainty([110., 100., 101.])  # with more steps the gap is more certain
    assert uncertainty([100., 100., 110.]) == uncertainty([100., 105., 110.])  # the third fastest


def test_it_is_too_early_until_all_steps_together_outlast_a_slow_phase():
    assert too_early(dict(a=[10.]*3, b=[10.]*3)) and not too_early(dict(a=[1000.]*3, b=[1000.]*3))
    rounds = next(n for n in range(1, 1000) if not too_early(dict(a=[10.]*n, b=[10.]*n)))
    assert not too_early(dict(a=[20.]*rounds, b=[])) and too_early(dict(a=[20.]*(rounds - 1), b=[]))  # the sum counts


def test_eliminated_are_candidates_that_are_more_than_a_tie_slower_even_without_noise():
    clear = [100.]*3
    assert eliminated(dict(a=clear, b=[103.]*3)) == ['b'] and eliminated(dict(a=clear, b=[101.]*3)) == []
    assert eliminated(dict(a=[103.]*3, b=clear, c=[140.]*3)) == ['a', 'c']
    assert eliminated(dict(a=clear, b=[150., 170., 400.])) == []  # undisturbed, it may be as fast
    assert eliminated(dict(a=clear, b=[101.5, 170., 400.])) == []


def test_after_two_steps_only_hopeless_candidates_are_eliminated():
    assert eliminated(dict(a=[100.]*2, b=[150.]*2, c=[2000.]*2)) == ['c'] and eliminated(dict(a=[100.], b=[2000.])) == []


def test_a_candidate_wins_the_sign_test_if_it_is_faster_in_more_common_rounds_than_chance_explains():
    def _won(won, n): return wins_sign_test([1.]*n, [2.]*won + [0.5]*(n - won))
    assert not _won(3, 3) and not _won(4, 4) and _won(8, 8) and _won(15, 15) and not _won(8, 15) and _won(14, 15)
    assert [_won(k, 15) for k in range(16)] == sorted(_won(k, 15) for k in range(16))
    assert not wins_sign_test([1.]*15, [1.]*15)
    assert wins_sign_test([9.]*9 + [1.]*8, [2.]*8) and not wins_sign_test([1.]*9 + [9.]*8, [2.]*8)  # the common rounds are the last


def test_a_candidate_that_loses_the_sign_test_by_more_than_a_tie_is_eliminated_however_noisy():
    noisy = [100., 180., 130., 240., 110., 300., 125., 170.]
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
    (dict(a=[100., 103., 105.], b=[60.]*3), 'a', 'b', True),      # too little doubt to keep it
    (dict(a=[100., 101., 102.], b=[50.]*3), 'a', 'b', True),
    (dict(a=[100.]*3, b=[50.]*3), 'c', 'b', True),                # an incumbent that was not measured
    (dict(a=[100.]), 'a', 'a', True)])
def test_decide_takes_the_first_that_ties_with_the_fastest_or_the_incumbent(times, incumbent, best, sure):
    d = decide(times, incumbent)
    assert (d.best, d.sure) == (best, sure)


def test_a_decision_says_which_candidate_may_be_faster_and_by_how_much():
    d = decide(dict(a=[100.]*3, b=[100., 105., 110.], c=[101., 102., 103.]))
    assert (d.best, d.rival) == ('a', 'b') and d.max_gain == approx(1/(1 - uncertainty([100., 105., 110.])) - 1) and not d.sure
    assert decide(dict(a=[100.])) == Decision('a') and Decision('a').sure
    assert decide(dict(a=[100.]*3, b=[150.]*3)).rival is None  # nothing slower is a rival


def test_a_search_stops_when_the_choice_is_sure_but_not_after_two_rounds():
    sure = Decision('a', 'b', 0.)
    assert should_stop(sure, dict(a=[1.]*5, b=[1.]*5)) and not should_stop(sure, dict(a=[1.]*2, b=[1.]*2)) and not should_stop(sure, dict(a=[1e6]*2, b=[1e6]*2))
    assert not should_stop(Decision('a', 'b', 0.5), dict(a=[1.]*5, b=[1.]*5))


@pytest.mark.parametrize('ms_of', [lambda k: [1.]*k, lambda k: [50.*k]*4], ids=['rounds', 'milliseconds'])
def test_the_longer_a_search_takes_the_larger_a_gain_it_gives_up(ms_of):
    def _first(gain): return next((k for k in range(3, 200) if should_stop(Decision('a', 'b', gain), dict(a=ms_of(k), b=ms_of(k)))), None)
    near, far, farther = map(_first, (0.04, 0.08, 0.15))
    assert 3 < near < far < farther
