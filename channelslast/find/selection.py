"""Who is fastest, how sure, and when to stop: times in, decision out. Knows neither PyTorch nor a Learner.

Whatever disturbs a step makes it longer, so that the fastest of several says what a machine can do, and no burst of
other work moves it; the median of a busy machine's times is a busy machine's. What `tests/test_race.py` counts on
recorded steps: of five candidates the fastest of ten finds the right one in 200 of 200 cases, the lowest tenth in 198,
the lowest quarter in 197, the median in 166."""
import math
from dataclasses import dataclass
from typing import Any

__all__ = ['TIE', 'MIN_ROUNDS', 'FAR_FACTOR', 'Decision', 'fastest', 'uncertainty', 'wins_sign_test', 'too_early', 'eliminated', 'decide', 'should_stop']

TIE = 0.02  # times this near are the same
# after so many rounds, or milliseconds, a gain below this is not worth the search; after twice as many, twice it
SMALL_GAIN, PATIENCE_ROUNDS, PATIENCE_MS = 0.05, 6, 10_000
MIN_ROUNDS = 3  # rounds before anything is decided, but for
HOPELESS_FACTOR = 5  # times the fastest
MIN_TOTAL_MS = 500  # milliseconds that a slow phase may last
FAR_FACTOR = 1.5  # times the fastest: worth a word
SIGN_TEST_ALPHA = 0.025  # that a lead, round for round, means nothing
INCUMBENT_BONUS = 1/5  # of its doubt in favour of what the user has: to stay by mistake costs as much as to leave


def fastest(ms: list) -> float:
    "What a step takes where nothing disturbs it: the fastest seen."
    return min(ms)


def uncertainty(
    ms: list, # Milliseconds of one candidate's steps
) -> float: # A fraction of the fastest
    """How far below the fastest step seen an undisturbed one may still lie.

    The gap between the fastest and the third: where three steps agree, none of them was disturbed, since disturbances
    rarely agree. Few steps know little of that gap, so it counts more, as with Student's t: six times after two steps,
    three times after three, twice after four. One step knows nothing."""
    n, (first, *more) = len(ms), sorted(ms)
    if not more: return 0.9
    return min((more[:2][-1]/first - 1) * (1 + 2/(n - 2) if n > 2 else 6), 0.9)


def lower_bound(ms: list) -> float:
    "What an undisturbed step takes at the least."
    return fastest(ms)*(1 - uncertainty(ms))


def wins_sign_test(
    a: list, b: list, # Milliseconds of two candidates' steps, round by round to the last
) -> bool:
    """Was `a` the faster one in more of the rounds that both ran in than chance explains?

    A machine's slow phases slow a whole round, so who leads it says something where no two steps agree (sign test)."""
    rounds = list(zip(a[::-1], b[::-1]))
    n, won = len(rounds), sum(x < y for x, y in rounds)
    return sum(math.comb(n, k) for k in range(won, n + 1)) <= SIGN_TEST_ALPHA*2**n


def too_early(
    times: dict, # Milliseconds of the steps of each candidate in the race
) -> bool:
    "Is it too early to judge? What one slow phase may hold whole may agree, and be slow all the same."
    return sum(map(sum, times.values())) < MIN_TOTAL_MS


def eliminated(
    times: dict, # Milliseconds of the steps of each candidate in the race
) -> list: # Their keys
    """Who cannot win any more: beyond a tie with the fastest even undisturbed, or round for round. Of two steps, both
    may be disturbed alike."""
    first = min(times.values(), key=fastest)
    tie = fastest(first)*(1 + TIE)
    def _is(ms):
        if len(ms) < MIN_ROUNDS: return len(ms) == 2 and fastest(ms) > HOPELESS_FACTOR*fastest(first)
        return fastest(ms) > tie and (lower_bound(ms) > tie or wins_sign_test(first, ms))
    return [k for k, ms in times.items() if _is(ms)]


@dataclass(frozen=True)
class Decision:
    "What follows from the times so far."
    best: Any          # The key of the one to take
    rival: Any = None  # The key of the one that may be faster still; None: there is no other
    by: float = 0.     # By how much at the most: a fraction of the best one's time

    @property
    def sure(self) -> bool: return self.by <= TIE


def decide(
    times: dict, # Milliseconds of the steps of each candidate in the race, the simplest one first
    incumbent: Any = None, # The key of what is left only for what is clearly faster
) -> Decision:
    """Of those that tie with the fastest the simplest; but what the user has, unless it is clearly slower.

    Sure is what no other that is not beaten can beat by more than a tie."""
    lost = eliminated(times)
    times = {k: ms for k, ms in times.items() if k not in lost}
    best = min(map(fastest, times.values()))
    pick = next(k for k, ms in times.items() if fastest(ms) <= best*(1 + TIE))
    if incumbent in times and fastest(times[incumbent])*(1 - INCUMBENT_BONUS*uncertainty(times[incumbent])) <= fastest(times[pick]): pick = incumbent
    mine = fastest(times[pick])
    others = {k: mine/lower_bound(ms) - 1 for k, ms in times.items() if k != pick}
    rival = max(others, key=others.get, default=None)
    return Decision(pick, rival, max(others.get(rival, 0.), 0.))


def should_stop(
    decision: Decision,
    times: dict, # Milliseconds of the steps of each candidate in the race
) -> bool:
    "May the race end? When it is sure, or when what may still be gained is little for what it takes to find out."
    rounds, took = max(map(len, times.values())), sum(map(sum, times.values()))
    effort = max(rounds/PATIENCE_ROUNDS, took/PATIENCE_MS)
    return rounds >= MIN_ROUNDS and (decision.sure or effort >= 1 and decision.by <= SMALL_GAIN*effort)
