"""What the ranks of a job are to each other: same versions, same time, and neighbours that are equally fast."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from pipeline.doctor.finding import ClockSkew, Finding, Level, PairTimes, size
from pipeline.ranks.team import holders

MUST_AGREE = ("localpipe", "torch", "NCCL")
"""What speaks on the wire; the others are only told."""
SKEW_S = 1.0
"""Between two wall clocks, above which logs of several machines cannot be read side by side."""
SLOW = 2.0
"""Times as slow as the median of the other pairs."""
LEAST_S = 0.5e-3
"""Latencies that differ by less do so by chance: threads of Python that are woken."""
SLOW_BYTES_PER_S = 125e6
"""A link of 1 Gbit/s."""
COMPARED, LARGE = 64 << 10, 1 << 20
"""Bytes of a message from which rates of pairs are compared, and from which a rate tells of the link itself: below,
what each message costs decides."""
WAYS = ("down", "up")


def version_findings(versions: Sequence[dict[str, str]]) -> list[Finding]:
    """What differs, or one line that nothing does. ``versions``: by rank."""
    found = []
    for name in versions[0]:
        held = [of_rank[name] for of_rank in versions]
        if len(set(held)) > 1:
            level = Level.ERROR if name in MUST_AGREE else Level.WARNING
            found.append(Finding("versions", level, f"{name}: {holders(held)}", "install the same on all machines"))
    return found or [Finding("versions", Level.OK, f"the same on all {len(versions)} ranks")]


def clock_finding(clocks: Sequence[ClockSkew]) -> Finding:
    """One line. ``clocks``: of all ranks but 0, which they are compared with; at least one."""
    worst = max(clocks, key=lambda clock: abs(clock.ahead_s))
    way = "ahead of" if worst.ahead_s >= 0 else "behind"
    text = f"rank {worst.rank} is {1e3 * abs(worst.ahead_s):.2f} ms {way} rank 0 (+- {1e3 * worst.error_s:.2f} ms)"
    text += ", no other more" if len(clocks) > 1 else ""
    if abs(worst.ahead_s) - worst.error_s > SKEW_S:
        return Finding("clocks", Level.WARNING, text, "set the clocks by NTP: chronyc tracking, timedatectl")
    return Finding("clocks", Level.OK, text)


def pair_findings(pairs: Sequence[PairTimes]) -> list[Finding]:
    """A line about all pairs, and one for each that is slow. At least one pair."""
    latency = 1e3 * statistics.median(pair.latency_s for pair in pairs)
    text = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}, median: latency {latency:.2f} ms"
    for index, way in enumerate(WAYS):
        sizes = [_sizes(pair)[index] for pair in pairs]
        rate = statistics.median(_rates(pair)[index] for pair in pairs)
        if max(sizes) >= COMPARED:
            span = size(max(sizes)) if len(set(sizes)) == 1 else f"{size(min(sizes))} to {size(max(sizes))}"
            text += f", {_rate(rate)} {way} (messages of {span})"
    findings = [Finding("neighbours", Level.OK, text)]
    slow = {pair.upper: why for pair in pairs if (why := _slow(pair, pairs))}
    between = Counter(rank for upper in slow for rank in (upper, upper + 1))
    for upper, why in slow.items():
        shared = next((rank for rank in (upper, upper + 1) if between[rank] == 2), None)
        fix = "compare their links, ports and cables; look for other jobs on both machines"
        if shared is not None:
            fix = f"both pairs of rank {shared} are slow: look at its machine first"
        crosses = " (on two machines)" if pairs[upper].crosses else ""
        findings.append(Finding("slow pair", Level.WARNING, f"rank {upper} <-> rank {upper + 1}{crosses}: {why}", fix))
    return findings


def _slow(pair: PairTimes, pairs: Sequence[PairTimes]) -> str:
    """What is slow, or nothing. A pair on two machines is compared with others that are."""
    others = [other for other in pairs if other is not pair and other.crosses == pair.crosses]
    reasons = []
    if others:
        usual = statistics.median(other.latency_s for other in others)
        if pair.latency_s > max(SLOW * usual, usual + LEAST_S):
            reasons.append(f"latency {1e3 * pair.latency_s:.2f} ms, others {1e3 * usual:.2f} ms")
    for index, way in enumerate(WAYS):
        rate, nbytes = _rates(pair)[index], _sizes(pair)[index]
        alike = [_rates(other)[index] for other in others if _sizes(other)[index] == nbytes >= COMPARED]
        if alike and rate * SLOW < statistics.median(alike):
            reasons.append(f"{_rate(rate)} {way}, others {_rate(statistics.median(alike))}")
        elif rate < SLOW_BYTES_PER_S and nbytes >= LARGE:
            reasons.append(f"{_rate(rate)} {way}, less than 1 Gbit/s (the right interface? GLOO_SOCKET_IFNAME)")
    return "; ".join(reasons)


def _rates(pair: PairTimes) -> tuple[float, float]:
    return pair.down_bytes_per_s, pair.up_bytes_per_s


def _sizes(pair: PairTimes) -> tuple[int, int]:
    return pair.down_bytes, pair.up_bytes


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
