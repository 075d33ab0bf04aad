"""A race: candidates take turns, and the fastest one is chosen as soon as that is clear. Knows neither PyTorch nor a
Learner.

Noise only makes steps longer, so the fastest of several steps shows what a machine can do, and a burst of other work
does not change it. The median depends on how busy the machine is. `tests/test_race.py` counts how often each finds
the right one of five candidates from ten recorded steps: the fastest in 200 of 200 cases, the lowest tenth in 198, the
lowest quarter in 197, the median in 166. `times` are milliseconds of each remaining candidate's steps, by its key."""
import math
from dataclasses import dataclass, field
from typing import Any

TIE = 0.02  # relative difference up to which times count as equal
# Stop if the possible gain is below SMALL_GAIN after so many rounds or milliseconds; the limit grows in proportion
SMALL_GAIN, PATIENCE_ROUNDS, PATIENCE_MS = 0.05, 6, 10_000
MIN_ROUNDS = 3  # rounds before anything is decided, except about hopeless candidates
HOPELESS_FACTOR = 5  # after two steps, candidates that take more than this times the fastest are eliminated
MIN_TOTAL_MS = 1000  # milliseconds that a slow phase of the machine may last
FAR_FACTOR = 1.5  # candidates that take more than this times the fastest are far behind
SIGN_TEST_ALPHA = 0.025  # significance level of the sign test
BASELINE_UNCERTAINTY = 0.05  # the first candidate is timed until it is this certain, since speedups are relative to it
# Share of its uncertainty taken off the incumbent's time: wrongly keeping it costs as much as wrongly replacing it
INCUMBENT_BONUS = 1/5


def fastest(ms: list) -> float:
    "Milliseconds of a step without noise: the fastest one measured."
    return min(ms)


def uncertainty(ms: list) -> float: # A fraction of the fastest
    """How much faster than the fastest measured step a step without noise may be.

    Based on the gap between the fastest and the third fastest step. Noisy steps rarely agree, so three steps that agree
    have no noise. With few steps the gap is uncertain, so it is multiplied, as with Student's t: by 6 with two steps,
    by 3 with three, by 2 with four. One step says nothing."""
    n, ms = len(ms), sorted(ms)
    if n == 1: return 0.9
    factor = 1 + 2/(n - 2) if n > 2 else 6
    return min((ms[min(n, 3) - 1]/ms[0] - 1)*factor, 0.9)


def lower_bound(ms: list) -> float: return fastest(ms)*(1 - uncertainty(ms))  # of a step without noise


def wins_sign_test(
    a: list, b: list, # Milliseconds of two candidates' steps; the last ones are of the same round
) -> bool:
    """True if `a` was faster in more of the common rounds than chance explains.

    A slow phase of the machine slows a whole round, so the order within rounds counts even where no two steps agree."""
    rounds = list(zip(a[::-1], b[::-1]))
    n, won = len(rounds), sum(x < y for x, y in rounds)
    return sum(math.comb(n, k) for k in range(won, n + 1)) <= SIGN_TEST_ALPHA*2**n


def too_early(times: dict) -> bool:
    "True while all steps might lie in one slow phase of the machine: they could agree and still all be slow."
    return sum(map(sum, times.values())) < MIN_TOTAL_MS


def eliminated(times: dict) -> list: # Keys
    """Candidates that can no longer win: slower than a tie with the fastest, and either their lower bound is too or
    they lose the sign test. After two steps, which may both be noisy, only hopeless ones."""
    best = min(times.values(), key=fastest)
    tie = fastest(best)*(1 + TIE)
    def _has_lost(ms):
        if len(ms) < MIN_ROUNDS: return len(ms) == 2 and fastest(ms) > HOPELESS_FACTOR*fastest(best)
        return fastest(ms) > tie and (lower_bound(ms) > tie or wins_sign_test(best, ms))
    return [k for k, ms in times.items() if _has_lost(ms)]


@dataclass(frozen=True)
class Decision:
    "The choice that follows from the times so far."
    best: Any              # Key of the candidate to use
    rival: Any = None      # Key of the candidate that may still be faster; None if no other remains
    max_gain: float = 0.   # How much faster it may be at most: 0.05 is 5%
    @property
    def sure(self) -> bool: return self.max_gain <= TIE


def decide(
    times: dict, # The simplest candidate first
    incumbent: Any = None, # Key of the current setting, which is replaced only by a clearly faster one
) -> Decision:
    """Choose the simplest candidate that ties with the fastest, or the incumbent unless it is clearly slower.

    It is sure if no other remaining candidate can be more than a tie faster."""
    lost = eliminated(times)
    times = {k: ms for k, ms in times.items() if k not in lost}
    tie = min(map(fastest, times.values()))*(1 + TIE)
    pick = next(k for k, ms in times.items() if fastest(ms) <= tie)
    if incumbent in times:
        bonus = INCUMBENT_BONUS*uncertainty(times[incumbent])
        if fastest(times[incumbent])*(1 - bonus) <= fastest(times[pick]): pick = incumbent
    gains = {k: fastest(times[pick])/lower_bound(ms) - 1 for k, ms in times.items() if k != pick}
    rival = max(gains, key=gains.get, default=None)
    return Decision(pick, rival, max(gains.get(rival, 0.), 0.))


def should_stop(decision: Decision, times: dict) -> bool:
    "True if the decision is sure, or the possible gain is small for the time already spent."
    rounds, total_ms = max(map(len, times.values())), sum(map(sum, times.values()))
    effort = max(rounds/PATIENCE_ROUNDS, total_ms/PATIENCE_MS)
    return rounds >= MIN_ROUNDS and (decision.sure or (effort >= 1 and decision.max_gain <= SMALL_GAIN*effort))


def near(times: dict) -> list: # Keys, the fastest first
    "Candidates that are not far behind the fastest."
    limit = FAR_FACTOR*min(map(fastest, times.values()))
    return sorted((k for k, ms in times.items() if fastest(ms) <= limit), key=lambda k: fastest(times[k]))


@dataclass
class Result:
    "Milliseconds of each candidate's steps, by its key; the choice; the candidates that were dropped far behind."
    times: dict
    decision: Decision = None
    far_behind: set = field(default_factory=set)


def race(
    step, # `step(key, round)` takes a step and returns its milliseconds, or None if the candidate fails
    keys, # Candidates; the first one is the baseline
    incumbent=None, # Key of the current setting
    rounds=15, # Most rounds
    extra_rounds=0, # More rounds, while all steps may lie in one slow phase of the machine
    stages=(), # Pairs `(rounds, propose)`: after so many rounds, `propose(times)` returns keys of more candidates
    rank=lambda key: 0, # Orders candidates, the simplest first
    agree=lambda x: x, # Gives all processes the answer of the first one
) -> Result:
    """Candidates take turns until the choice is clear. Those that can no longer win are dropped.

    When candidates join, the times of the others start again: only steps of the same rounds are compared, since the
    machine may have been faster or slower before."""
    result, running = Result({k: [] for k in keys}), list(keys)
    for limit, propose in [*((min(n, rounds), f) for n, f in stages), (rounds + extra_rounds, None)]:
        n = max((len(result.times[k]) for k in running), default=0)
        for i in range(n, limit):
            if i >= rounds and not agree(too_early(_running(result, running))): break
            _round(step, result, running, i)
            gone, done = agree(_review(result, running, incumbent, rank, keep_first=propose is not None))
            for k in [running[j] for j in gone]: _drop(result, running, k)
            if done and propose is None: break
        new = propose(_running(result, running)) if propose else []
        for k in running if new else (): result.times[k] = []
        running += new
        result.times.update({k: [] for k in new})
    result.decision = _decide(result, running, incumbent, rank)
    return result


def _running(result, running) -> dict: return {k: result.times[k] for k in running}


def _round(step, result, running, i):
    "One step of each candidate. The order alternates, so that drift affects all of them alike."
    for k in list(reversed(running)) if i % 2 else list(running):
        ms = step(k, i)
        if ms is None: running.remove(k)
        else: result.times[k].append(ms)


def _drop(result, running, k):
    best = min(fastest(ms) for ms in _running(result, running).values())
    if fastest(result.times[k]) > FAR_FACTOR*best: result.far_behind.add(k)
    running.remove(k)


def _review(result, running, incumbent, rank, keep_first) -> tuple:
    "Positions of the candidates that can no longer win, and whether the choice among the others is clear."
    times, first = _running(result, running), next(iter(result.times))
    if too_early(times): return [], False
    keep_first = keep_first or first in times and uncertainty(times[first]) > BASELINE_UNCERTAINTY
    gone = [running.index(k) for k in eliminated(times) if not (keep_first and k == first)]
    return gone, should_stop(_decide(result, running, incumbent, rank), times)


def _decide(result, running, incumbent, rank) -> Decision:
    current = incumbent if incumbent in result.times else next(iter(result.times))
    times = _running(result, sorted(running, key=lambda k: (k != current, rank(k))))
    return decide(times, current)
