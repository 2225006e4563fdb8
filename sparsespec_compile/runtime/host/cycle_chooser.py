"""Which cycle requests run, chosen while they run: whether to draft, with what, and how many drafts.

Speculation pays where reading the cache takes long, and costs where many requests fill the arithmetic units anyway, or
where a pass costs much the same whatever it reads. All of this changes as a batch grows, drains and lengthens. So the
choice follows from how long iterations are predicted and measured to take, and from how many drafts were accepted.

How many n-gram drafts would be accepted is estimated while another drafter, or none, is in use, since a text does not
depend on its drafter. Proposals that draft iterations judge are such n-grams too, and drafts are mostly the text: so
the same estimate tells how many drafts a cycle with proposals will have. The host looks n-grams up in texts as they
are, and compares what followed with what was written: a few tokens of one request at a time, in the texts of up to 64
requests, which takes a few milliseconds.
"""

import statistics
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from sparsespec_compile.config import Schedule, SpecConfig
from sparsespec_compile.kernels.ops import NGRAM_EQUAL, NGRAM_SUFFIX, NGRAM_TOKENS
from sparsespec_compile.runtime.device.drafters import Cycle, Drafter, NgramDrafter, cycles_of
from sparsespec_compile.runtime.host.iteration_times import (
    IterationTime,
    IterationTimes,
    Load,
    MeasuredTimes,
    PredictedTimes,
)
from sparsespec_compile.runtime.host.phases import expected_drafts
from sparsespec_compile.runtime.host.request import Request

_TOKENS = 24
"""Most tokens of a text that one look examines; it examines those that are new since the last one."""

_TEXTS, _SEARCHED, _SEARCHED_TOGETHER = 64, 4096, 65536
"""Texts that are searched at a time, and tokens at the end of each, and of all together."""


class Foresight:
    """Tells what `NgramDrafter` would have achieved.

    Args:
        most: drafts of a cycle.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turn = 0
        self._latest: dict[Request, tuple[int, np.ndarray]] = {}  # tokens of a text, and the last ones

    def look(self, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        """(drafts, accepted) of simulated cycles over the latest tokens of the next request in turn.

        The other texts are searched as they are, with a few tokens that the device would not have known yet.
        """
        if not requests:
            return
        self._turn = (self._turn + 1) % len(requests)
        searched = [*requests[self._turn :], *requests[: self._turn]][:_TEXTS]
        request = searched[0]
        unseen = min(len(request.output) - max(request.looked_up, 1), _TOKENS)
        request.looked_up = len(request.output)
        each = min(max(_SEARCHED_TOGETHER // len(searched), 2 * _TOKENS), _SEARCHED)
        self._latest = {one: self._with_new_tokens(one, each) for one in searched}
        texts = Texts([latest for _, latest in self._latest.values()])
        end = len(self._latest[request][1]) - 1
        newest = end - unseen
        while newest < end:
            drafts = min(self._most, end - newest)
            accepted = texts.right_ngrams(0, newest, drafts)
            yield drafts, accepted
            newest += accepted + 1

    def _with_new_tokens(self, request: Request, most: int) -> tuple[int, np.ndarray]:
        known, latest = self._latest.get(request, (0, np.empty(0, np.int32)))
        count = len(request.prompt) + len(request.output)
        first = max(known, count - most)
        new = [*request.prompt[first:], *request.output[max(first - len(request.prompt), 0) :]]
        return count, np.concatenate([latest, np.array(new, np.int32)])[-most:]


class Texts:
    """Texts that are searched together.

    Args:
        texts: token ids of each, at least one.
    """

    def __init__(self, texts: Sequence[np.ndarray]) -> None:
        behind = np.array([-1], np.int32)  # so that no comparison goes on from one text to the one before
        self._tokens = np.concatenate([part for text in texts for part in (text, behind)])
        ends = np.cumsum([len(text) + 1 for text in texts])
        self._start, self._newest = ends - [len(text) + 1 for text in texts], ends - 2
        self._equal, self._compared = np.zeros(len(self._tokens), np.int32), (-1, -1)

    def right_ngrams(self, own: int, newest: int, drafts: int) -> int:
        """How many tokens after a place equal what `sparsespec::propose_ngrams` proposes there, at most `drafts`.

        Args:
            own: number of the text.
            newest: position of the newest token that the proposal knows, at least `drafts` before the last. Asking
                from the first to the last takes the least time.
            drafts: tokens that are proposed.
        """
        tokens, start = self._tokens, self._start[own]
        newest += start
        self._compare(own, newest)
        places = np.flatnonzero((self._equal & 3) != 0)
        places = places[(tokens[places + 1] >= 0) & ((places < newest) | (places > self._newest[own]))]
        if len(places):
            mine = (places >= start) & (places < newest)
            rank = _rank(self._equal[places], mine)
            best = rank == rank.max()
            places = places[best]
            source = np.searchsorted(self._newest, places)
            latest = int(np.argmax(places - self._start[source]))
            match, end = int(places[latest]), newest if mine[best][0] else int(self._newest[source[latest]])
        else:
            match, end = newest - 1, newest
        proposed = tokens[match + 1 + np.arange(drafts) % (end - match)]
        wrong = np.flatnonzero(proposed != tokens[newest + 1 : newest + 1 + drafts])
        return int(wrong[0]) if len(wrong) else drafts

    def _compare(self, own: int, newest: int) -> None:
        """Compare the tokens up to each place with those up to a text's newest: bit k for the k-th last ones."""
        text, reached = self._compared
        if text == own and reached <= newest:
            first = reached + 1
        else:
            first = max(newest - NGRAM_TOKENS + 1, int(self._start[own]))
            self._equal[:] = 0
        for token in self._tokens[first : newest + 1]:
            self._equal[1:] = self._equal[:-1] << 1
            self._equal[0] = 0
            self._equal |= self._tokens == token
            self._equal[self._newest + 1] = 0
        self._equal &= (1 << NGRAM_TOKENS) - 1
        self._compared = own, newest


def _rank(equal: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The order of places, as `sparsespec::propose_ngrams` has it but for positions: bits of equal tokens, [n] each."""
    three_unequal = ~(equal | equal >> 1 | equal >> 2)
    count = _ones(equal & ((three_unequal & -three_unequal) - 1))
    whole = (1 << NGRAM_SUFFIX) - 1
    suffix = ((~equal & (equal + 1)) - 1) & whole
    rank = np.where(count >= NGRAM_EQUAL, whole * 64 + count * 2 + own, suffix * 64 + own * 32 + count)
    return np.where(suffix == whole, (whole + 1) * 64 + count * 2 + own, rank)


def _ones(bits: np.ndarray) -> np.ndarray:
    """Number of ones among `NGRAM_TOKENS` bits."""
    return _ONES[bits & 0xFFF] + _ONES[bits >> 12]


_ONES = np.array([number.bit_count() for number in range(1 << 12)], np.int32)


_GUESS_VERIFIED = 4.0
"""Prior weight, in verified drafts. The pooled acceptance rate is the prior for the first draft of a cycle, as with few
requests it is soon known well; each draft's posterior is the prior for the next one."""

_KEPT_VERIFIED, _KEPT_UNUSED = 0.995, 0.9998
"""What a verified draft, and each choice, leaves of the weight of earlier ones: 200 of them count, and what was not
tried for long is tried again."""

CHOICE_EVERY = 16
"""Iterations between two choices of the same cycle."""

_OTHER_LOAD, _OTHER_REQUESTS = 1.5, 4
"""Factor and difference in the number of decoding requests at which a cycle is chosen at once. Where a few requests
come and go all the time, choices at once would leave no time to measure anything."""

_MEASURED = 8
"""Iterations that are measured at a time at least, in whole cycles."""

_OUTLIER = 2.0
_RECENT = 127
_FEWEST = 3
"""Times beyond `_OUTLIER` times the usual are left out: they hold a compilation, a capture or a pause of the caller's.
Usual is the median of the recent ones, relative to what was expected, of the same drafter; until there are a few, what
was expected."""

_CURIOSITY = 0.5
"""Standard deviations by which a cycle may be faster than estimated, for it to be tried."""

_BOLD_EVERY = 24
"""Choices of which one is as curious as `IterationTimes.WRONG` says. Otherwise what was never tried at a load might
never be found out. A trial is some percent slower for 25 of 400 iterations, and seldom: it tells of similar cycles
too."""

_DOUBT = 0.5
"""Weight of the deviation of its accepted drafts beside that of its time: those are also learnt without trying it."""

_GAIN_TO_CHANGE = 1.005
"""A change costs some requests a short cycle, so it must promise this much."""

_SAME_LENGTH = 32.0
"""Tokens to which mean lengths are rounded."""

_PATIENCE = 4
"""Choices for which a new cycle is kept until it was measured; where prompts come all the time, it may never be."""

_UNDER_WAY = 2
"""Iterations that are enqueued, or were read late, when a cycle changes."""


class Pace:
    """Tells in which iterations a cycle is chosen: alike on all ranks, as nothing that is measured plays a part."""

    def __init__(self) -> None:
        self._next = 1
        self._requests = 0

    def other_load(self, requests: int) -> bool:
        """Whether so many decoding requests deserve a new choice at once, after one for another number of them.

        A batch ends with few requests, for which another cycle is best than for the many with which the next begins.
        """
        before = self._requests
        far = abs(requests - before) >= _OTHER_REQUESTS
        return requests > 0 and far and not before / _OTHER_LOAD < requests < before * _OTHER_LOAD

    def due(self, iteration: int, requests: int) -> bool:
        """Whether to choose after an iteration, the first of which is 1, in which so many requests decoded."""
        return iteration >= self._next or self.other_load(requests)

    def chose(self, iteration: int, requests: int, cycle: Cycle, *, changed: bool) -> None:
        """A cycle was chosen. A new one is judged as soon as it was measured."""
        self._requests = requests
        whole = -(-_MEASURED // (cycle.passes + 1)) * (cycle.passes + 1)
        self._next = iteration + (_settling(cycle) + whole if changed else CHOICE_EVERY)


def _settling(cycle: Cycle) -> int:
    """Iterations after a change in which phases and cycles are still of the former kind, or under way."""
    return cycle.passes + 1 + _UNDER_WAY


def chooser_for(config: SpecConfig, predicted: IterationTime | None) -> "CycleChooser | None":
    """The chooser of `draft_tokens="auto"`; None where the number of drafts is fixed.

    Args:
        config: the settings.
        predicted: the prediction. None = only measured times tell: plain decoding comes first.
    """
    if config.draft_tokens != "auto":
        return None
    cycles = cycles_of(config)
    if predicted is None:
        return CycleChooser(cycles, MeasuredTimes(cycles), first=cycles[0], schedule=config.schedule)
    return CycleChooser(cycles, PredictedTimes(predicted, cycles), first=cycles[-1], schedule=config.schedule)


class CycleChooser:
    """Chooses among cycles.

    Args:
        cycles: the choices.
        times: estimates how long their iterations take.
        first: the choice until something is known.
        schedule: in which iterations requests verify, which judge no proposals.

    Attributes:
        current: the present choice.
    """

    def __init__(
        self, cycles: Sequence[Cycle], times: IterationTimes, first: Cycle, schedule: Schedule = "grouped"
    ) -> None:
        self.current = first
        self._cycles = list(cycles)
        self._schedule = schedule
        self._passes = np.array([cycle.passes for cycle in cycles])
        self._most_drafts = np.array([cycle.drafts for cycle in cycles], float)
        self._with_proposals = [nth for nth, cycle in enumerate(cycles) if cycle.proposals]
        self._ngrams = next((one.drafter for one in cycles if isinstance(one.drafter, NgramDrafter)), None)
        self._times = times
        most: dict[Drafter, int] = {}
        for cycle in cycles:
            most[cycle.drafter] = max(cycle.drafts, most.get(cycle.drafter, 0))
        self._of_drafter = {
            drafter: np.array([nth for nth, cycle in enumerate(cycles) if cycle.drafter == drafter]) for drafter in most
        }
        self._acceptance = {drafter: _Acceptance(drafts, drafter.first_guess) for drafter, drafts in most.items()}
        self._recent: dict[Drafter, deque[float]] = {drafter: deque(maxlen=_RECENT) for drafter in most}
        self._measuring: list[tuple[float, Load]] = []
        self._unsettled = 0
        self._choices = 0
        self._unjudged = 0  # choices that the present cycle is kept for until it was measured
        self._judged = True  # whether it was measured before they ran out

    def verified(self, drafter: Drafter, drafts: int, accepted: int) -> None:
        """Record a verification: of `drafts` drafts of a drafter the first `accepted` were right."""
        self._acceptance[drafter].verified(drafts, accepted)

    def began(self) -> None:
        """The requests have changed: discard the measurement under way."""
        self._measuring.clear()
        self._unjudged, self._judged = 0, True

    def took(self, seconds: float, lengths: list[int]) -> None:
        """Take note of the time of an iteration in which requests of these cached lengths decoded.

        Iterations of a cycle differ by how many requests verify; their mean is what is estimated.
        """
        if not lengths:
            return
        if self._unsettled:
            self._unsettled -= 1
            return
        self._measuring.append((seconds, _load(lengths)))
        iterations, cycle = len(self._measuring), self.current.passes + 1
        if iterations < _MEASURED or iterations % cycle:
            return
        mean = statistics.fmean(seconds for seconds, _ in self._measuring)
        load = self._measuring[iterations // 2][1]
        self._measuring.clear()
        self._unjudged, self._judged = 0, True
        expected = self._times.expected(self.current, load)
        ratio = 1.0 if expected is None else mean / expected
        recent = self._recent[self.current.drafter]
        recent.append(ratio)
        if ratio <= _OUTLIER * (statistics.median(recent) if len(recent) >= _FEWEST else 1.0):
            self._times.measured(self.current, load, mean)

    def choose(self, lengths: list[int]) -> Cycle:
        """The cycle for requests of these cached lengths; keeps the present one unless another is better.

        The one that may be the fastest is tried: an optimist finds out (upper confidence bounds, Auer 2002). But not
        while nobody can: a cycle that could not be measured in time is followed by what is estimated to be the fastest.
        """
        if not lengths:
            return self.current
        for acceptance in self._acceptance.values():
            acceptance.fade()
        if self._unjudged:
            self._unjudged -= 1
            self._judged = False
            return self.current
        load = _load(lengths)
        seconds, deviation = self._times.estimate(load)
        tokens, doubt = self._tokens(load.requests)
        speed = tokens / seconds
        self._choices += 1
        if self._judged:
            curiosity = _CURIOSITY * (1.0 if self._choices % _BOLD_EVERY else self._times.WRONG)
            speed = speed * np.exp(curiosity * (deviation + _DOUBT * doubt * (deviation > 0)))
        best = int(np.argmax(speed))
        if speed[best] > _GAIN_TO_CHANGE * speed[self._cycles.index(self.current)]:
            self.current = self._cycles[best]
            self._measuring.clear()
            self._unsettled = _settling(self.current)
            self._unjudged = _PATIENCE
        return self.current

    def _tokens(self, requests: int) -> tuple[np.ndarray, np.ndarray]:
        """Expected tokens of a request in an iteration of each cycle, and the standard deviation of their logarithm:
        [n] each."""
        made = self._drafts_made(requests)
        mean, deviation = np.empty_like(made), np.empty_like(made)
        for drafter, acceptance in self._acceptance.items():
            mine = self._of_drafter[drafter]
            mean[mine], deviation[mine] = acceptance.accepted_of(made[mine])
        return (mean + 1) / (self._passes + 1), deviation / (mean + 1)

    def _drafts_made(self, requests: int) -> np.ndarray:
        """Expected drafts of each cycle, [n]."""
        made = self._most_drafts.copy()
        if self._ngrams is None or not self._with_proposals:
            return made
        right = np.cumprod(self._acceptance[self._ngrams].rates()).tolist()
        for nth in self._with_proposals:
            made[nth] = expected_drafts(self._cycles[nth], right, self._schedule, requests)
        return made


class _Acceptance:
    """How many drafts of a drafter are accepted."""

    def __init__(self, most: int, first_guess: float) -> None:
        self._first_guess = first_guess
        # Lists, since a hundred verifications are recorded while an iteration runs.
        self._hits = [0.0] * most
        self._tries = [0.0] * most

    def verified(self, drafts: int, accepted: int) -> None:
        for nth in range(min(accepted + 1, drafts)):
            self._hits[nth] = self._hits[nth] * _KEPT_VERIFIED + (nth < accepted)
            self._tries[nth] = self._tries[nth] * _KEPT_VERIFIED + 1.0

    def fade(self) -> None:
        """Decay the counts slightly."""
        self._hits = [_KEPT_UNUSED * hits for hits in self._hits]
        self._tries = [_KEPT_UNUSED * tries for tries in self._tries]

    def rates(self) -> np.ndarray:
        """Expected share of drafts that are right, of those whose predecessors are, by their place: [most]."""
        rates = []
        right = (sum(self._hits) + _GUESS_VERIFIED * self._first_guess) / (sum(self._tries) + _GUESS_VERIFIED)
        for hits, tries in zip(self._hits, self._tries, strict=True):
            right = (hits + _GUESS_VERIFIED * right) / (tries + _GUESS_VERIFIED)
            rates.append(right)
        return np.array(rates)

    def accepted(self) -> np.ndarray:
        """Expected accepted drafts of 0, 1, ... drafts, and their standard deviation: [2, most + 1]."""
        rate = self.rates()
        expected = np.concatenate([[0.0], np.cumprod(rate).cumsum()])
        # A relative error of one rate carries over to every later product. Variances are those of beta distributions.
        share = (1 - rate) / (rate * (np.array(self._tries) + _GUESS_VERIFIED + 1))
        behind = np.maximum(expected[None, 1:] - expected[:-1, None], 0.0)  # [draft, number of drafts]
        return np.stack([expected, np.concatenate([[0.0], np.sqrt(share @ behind**2)])])

    def accepted_of(self, drafts: np.ndarray) -> np.ndarray:
        """`accepted` of any numbers of drafts [n], those between whole ones in proportion: [2, n]."""
        curve = self.accepted()
        few = drafts.astype(int)
        more = np.minimum(few + 1, curve.shape[1] - 1)
        return curve[:, few] + (drafts - few) * (curve[:, more] - curve[:, few])


def _load(lengths: list[int]) -> Load:
    """The rounded load: similar lengths share predictions, which take two milliseconds for all cycles."""
    return Load(round(statistics.fmean(lengths) / _SAME_LENGTH) * _SAME_LENGTH, len(lengths))
