"Who is fastest, and how sure: times in, decision out. Knows neither PyTorch nor a Learner."
import math
import statistics

__all__ = ['HOPELESS', 'LOOK', 'hopeless', 'noise_margin', 'choose']

HOPELESS = 1.5  # times the fastest: not measured further
LOOK = 3  # rounds after which the hopeless are dropped


def hopeless(
    times: dict, # Milliseconds of each step, a list a candidate
) -> list: # Their keys
    "Those so far behind the fastest that more rounds say nothing new."
    best = min(map(statistics.median, times.values()))
    return [k for k, ms in times.items() if statistics.median(ms) > HOPELESS*best]


def noise_margin(
    times: list, # Milliseconds of each step, a list a candidate, all measured in the same rounds
) -> float: # A fraction: differences below it say nothing
    """Twice the standard error of the median ratio to the fastest candidate, round by round; at least 2 %.

    Ratios within a round, since a machine's drift hits a whole round alike; from the median absolute deviation, so that
    single slow steps count little. Of several candidates, the median of their errors."""
    fastest = min(times, key=statistics.median)
    def _error(ms):
        logs = [math.log(a/b) for a, b in zip(ms, fastest)]
        med = statistics.median(logs)
        return 1.2533 * 1.4826 * statistics.median(abs(o - med) for o in logs) / len(logs)**0.5
    return max(0.02, 2*statistics.median([_error(ms) for ms in times if ms is not fastest] or [0]))


def choose(
    rows: list, # With `memory_format`, `precision`, `ms` and `valid`, as a `Timing` has them
    current: tuple, # `(memory_format, precision)` of the Learner
    margin: float, # Fraction within which times are equal
): # One of the rows
    """The fastest valid row; of those within the margin of it the simplest: what the Learner has, then fp32, then
    one precision for all layers, then contiguous."""
    valid = [r for r in rows if r.valid]
    tied = [r for r in valid if r.ms <= min(o.ms for o in valid) * (1 + margin)]
    return min(tied, key=lambda r: ((r.memory_format, r.precision) != current, r.precision != 'fp32',
                                    '+' in r.precision, r.memory_format != 'contiguous', r.ms))
