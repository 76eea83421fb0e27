"""The part that the pipeline asks: orders each job's route, and counts where the jobs are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Deployment, Fleet
from promptfleet_shared.jobs import Usage
from promptfleet_shared.policies.balancing import (
    ORDERED,
    ModelBalancing,
    affinity_key,
    rendezvous,
    request_prefix,
    spill_bound,
)
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.balancing.building import build_balancer
from promptfleet_workers.balancing.places import DeploymentLoad, Place, Places
from promptfleet_workers.balancing.protocol import Choice, JobFacts, LoadBalancer
from promptfleet_workers.providers.protocol import Answer, Completion
from promptfleet_workers.retries import FailureKind, classify, speaks_of_health
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

PRICED = Usage(input=1000, output=250)
"""What prices are compared by."""
PRICE_KEPT_S = 60.0
PROBE_EVERY_S = 0.1
"""How often a deployment whose breaker may be probed is put first, in one worker."""
MAX_ORDERS = 1000
"""Orders of a route that are kept, so that equal ones are one object."""

_LEVELS = {"low": 3.0, "medium": 5.0, "high": 10.0}
"""Where only a level is known: the hardest job of that level, with the usual bounds."""
_TOO_BUSY = {FailureKind.RATE_LIMIT, FailureKind.OVERLOAD, FailureKind.QUOTA}


class Health(Protocol):
    """What the breakers know."""

    def open_for_s(self, name: str) -> float | None:
        """Seconds until a deployment may be probed; None while calls go through."""
        ...


class _Candidate:
    """A `Choice`: reads how its place stands when it is asked."""

    __slots__ = ("_clock", "_price", "_priced_until", "_usd", "candidate", "index", "place")

    def __init__(
        self,
        index: int,
        candidate: Candidate,
        place: Place,
        price: Callable[[Candidate], float | None],
        clock: Callable[[], float],
    ) -> None:
        self.index = index
        self.candidate = candidate
        self.place = place
        self._price = price
        self._clock = clock
        self._priced_until = clock()
        self._usd: float | None = None

    @property
    def deployment(self) -> str:
        return self.place.name

    @property
    def model(self) -> str:
        return self.candidate.model

    @property
    def in_flight(self) -> int:
        return self.place.own + self.place.others

    @property
    def max_concurrency(self) -> int | None:
        return self.place.limit

    @property
    def latency_s(self) -> float | None:
        return self.place.latency_s

    @property
    def usd(self) -> float | None:
        now = self._clock()
        if now >= self._priced_until:
            self._usd = self._price(self.candidate)
            self._priced_until = now + PRICE_KEPT_S
        return self._usd

    def can_take(self, complexity: float | None) -> bool:
        most = self.candidate.deployment.max_complexity
        return most is None or complexity is None or complexity <= most


class _Group:
    """Deployments among which a balancer chooses."""

    def __init__(
        self, balancer: LoadBalancer | None, options: ModelBalancing, choices: list[_Candidate]
    ) -> None:
        self.balancer = balancer
        self.options = options
        self.choices = choices
        self.names = [choice.deployment for choice in choices]


class _Plan:
    """The groups of a route, in its models' order."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self.groups = groups
        self.balances = any(
            _chooses(group.options, [choice.candidate.deployment for choice in group.choices])
            for group in groups
        )
        self.orders: dict[tuple[int, ...], tuple[Candidate, ...]] = {}

    def route(self, ordered: Sequence[_Candidate]) -> tuple[Candidate, ...]:
        """The route in this order; equal ones are one object, as jobs of a request share it."""
        key = tuple([choice.index for choice in ordered])
        known = self.orders.get(key)
        if known is None:
            if len(self.orders) >= MAX_ORDERS:
                self.orders.clear()
            known = self.orders[key] = tuple([choice.candidate for choice in ordered])
        return known


class _Sorted(NamedTuple):
    """A group's deployments, by whether they may be chosen now."""

    probed: list[_Candidate]
    good: list[_Candidate]
    full: list[_Candidate]
    unfit: list[_Candidate]
    shut: list[_Candidate]


class Balancer:
    """Used on the event loop's thread only; nothing waits here."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        places: Places,
        health: Health,
        price: Callable[[Candidate], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Build the balancers that fleet.toml names.

        Args:
            fleet: Its models' balancing options.
            places: Of all its deployments.
            health: Which of them may be called.
            price: US dollars of `PRICED` at a deployment; None where nobody knows.
            clock: Gives steady seconds.

        Raises:
            ConfigurationError: A strategy is not what it should be.
        """
        self.places = places
        self._fleet = fleet
        self._health = health
        self._price = price
        self._clock = clock
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._probe_at: dict[str, float] = {}
        self._balancers: dict[str, LoadBalancer | None] = {
            name: build_balancer(
                fleet.balancing_options(name), field=f"models.{name}.balancing.strategy"
            )
            for name in fleet.models
        }
        self.balances = any(
            _chooses(fleet.balancing_options(name), model.deployments)
            for name, model in fleet.models.items()
        )
        """False where jobs of a session are all that there is to place."""
        self._fleets_own = build_balancer(fleet.balancing, field="balancing.strategy")

    @classmethod
    def of(
        cls,
        fleet: Fleet,
        *,
        health: Health,
        pricer: Pricer,
        clock: Callable[[], float] = time.monotonic,
    ) -> Balancer:
        """For all deployments of a fleet."""
        places = Places(
            [
                Place(deployment, decay_s=fleet.balancing_options(name).decay_s, clock=clock)
                for name, model in fleet.models.items()
                for deployment in model.deployments
            ]
        )

        def price(candidate: Candidate) -> float | None:
            provider, there = candidate.deployment.provider, candidate.model_there
            cost = pricer.cost(provider, there, PRICED, candidate.price_as)
            return None if cost is None else float(cost)

        return cls(fleet, places=places, health=health, price=price, clock=clock)

    # -- before calls ----------------------------------------------------------------------------

    def place(self, works: Iterable[Work]) -> None:
        """Order the routes of these jobs, and count each where it will be called first."""
        for work in works:
            session = work.job.policy.get("session_id")
            if (session is None and not self.balances) or work.place is not None:
                continue
            plan = self._plan(work.route)
            if plan.balances or session is not None:
                self._place(work, plan, session)

    def _place(self, work: Work, plan: _Plan, session: str | None) -> None:
        job = _facts(work, session)
        ordered: list[_Candidate] = []
        told: tuple[str, str] | None = None
        for group in plan.groups:
            strategy, chosen = self._order(group, job, work)
            if told is None and chosen:
                told = strategy, _why(strategy, chosen[0], len(group.choices))
            ordered += chosen
        work.route = plan.route(ordered)
        work.place = ordered[0].place
        work.place.own += 1
        if told is not None:
            work.note("deployment", strategy=told[0], why=told[1])
        self.places.use()

    def _order(self, group: _Group, job: JobFacts, work: Work) -> tuple[str, list[_Candidate]]:
        """What decided, and the group's deployments, best first."""
        if len(group.choices) == 1:
            return group.options.strategy, group.choices
        sorted_ = self._sorted(group, job.complexity)
        well = sorted_.good + sorted_.full
        if not well:  # the breakers' own refusals decide
            return ORDERED, sorted_.probed + sorted_.unfit + sorted_.shut
        key = _affinity(group.options, job, work)
        if key is not None:
            kind = "prefix" if job.session_id is None else "session"
            chosen = _sticky(key, well, sorted_.good, group.options)
        else:
            kind = group.options.strategy
            chosen = self._chosen(group, job, sorted_.good or sorted_.full)
            chosen += sorted_.full if sorted_.good else []
        return kind, sorted_.probed + chosen + sorted_.unfit + sorted_.shut

    def _sorted(self, group: _Group, complexity: float | None) -> _Sorted:
        sorted_ = _Sorted([], [], [], [], [])
        for choice in group.choices:
            open_for_s = self._health.open_for_s(choice.deployment)
            if open_for_s is not None:
                due = open_for_s <= 0 and self._may_probe(choice.deployment)
                (sorted_.probed if due else sorted_.shut).append(choice)
            elif not choice.can_take(complexity):
                sorted_.unfit.append(choice)
            elif choice.place.has_room:
                sorted_.good.append(choice)
            else:
                sorted_.full.append(choice)
        return sorted_

    def _may_probe(self, name: str) -> bool:
        """True now and then: an open breaker needs a job that tries, and refuses the others."""
        now = self._clock()
        if now < self._probe_at.get(name, now):
            return False
        self._probe_at[name] = now + PROBE_EVERY_S
        return True

    def _chosen(self, group: _Group, job: JobFacts, choices: list[_Candidate]) -> list[_Candidate]:
        if group.balancer is None or len(choices) < 2:  # noqa: PLR2004 - nothing to choose
            return choices
        try:
            order: Sequence[Choice] = group.balancer.order(job, choices)
            named = dict.fromkeys([id(choice) for choice in order])
        except Exception as error:  # noqa: BLE001 - a user's own code must not lose the batch
            name = type(error).__name__
            log.error("balancer_failed", extra={"error": name})  # noqa: TRY400 - its text could be anything
            return choices
        by_id = {id(choice): choice for choice in choices}
        best = [by_id.pop(key) for key in named if key in by_id]
        return best + list(by_id.values())

    def _plan(self, route: tuple[Candidate, ...]) -> _Plan:
        key = tuple([id(candidate) for candidate in route])  # the router keeps its candidates
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MAX_ORDERS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(route)
        return plan

    def _make_plan(self, route: tuple[Candidate, ...]) -> _Plan:
        choices = [
            _Candidate(n, one, self.places[one.deployment.name], self._price, self._clock)
            for n, one in enumerate(route)
        ]
        if self._fleet.balancing.across_models:
            return _Plan([_Group(self._fleets_own, self._fleet.balancing, choices)])
        models = dict.fromkeys(choice.model for choice in choices)
        return _Plan(
            [
                _Group(
                    self._balancers.get(model),
                    self._fleet.balancing_options(model),
                    [choice for choice in choices if choice.model == model],
                )
                for model in models
            ]
        )

    # -- around calls ----------------------------------------------------------------------------

    def move(self, works: Iterable[Work], candidate: Candidate) -> None:
        """These jobs are called there now, if they were placed anywhere."""
        place = self.places[candidate.deployment.name]
        for work in works:
            if work.place is not None and work.place is not place:
                work.place.own -= 1
                work.place = place
                place.own += 1

    def ended(self, candidate: Candidate, elapsed_s: float, answers: Sequence[Answer]) -> None:
        """A call ended so; one that failed counts as slow, however quickly it did."""
        if not self.places.used or not answers:
            return
        place = self.places[candidate.deployment.name]
        if any(isinstance(answer, Completion) for answer in answers):
            place.answered(elapsed_s)
            return
        first = answers[0]
        assert isinstance(first, ProviderError)  # noqa: S101 - for the type checkers
        judgement = classify(first)
        if judgement.kind in _TOO_BUSY:
            place.rest(first.retry_after_s)
        if speaks_of_health(judgement):
            place.failed(elapsed_s)

    def loads(self) -> list[DeploymentLoad]:
        """How all stand, for metrics."""
        return [
            DeploymentLoad(place.name, place.in_flight, place.latency_s or float("nan"))
            for place in self.places.all()
        ]


def _chooses(options: ModelBalancing, deployments: Sequence[Deployment]) -> bool:
    """True if anything but the order of fleet.toml decides among these."""
    if options.strategy != ORDERED or options.prefix_affinity:
        return True
    return any(d.max_concurrency is not None or d.max_complexity is not None for d in deployments)


def _facts(work: Work, session: str | None) -> JobFacts:
    job = work.job
    return JobFacts(
        tenant=job.tenant,
        tier=job.tier,
        kind=job.kind,
        input_tokens=job.input_tokens,
        priority=job.priority,
        complexity=_complexity(work),
        session_id=session,
    )


def _complexity(work: Work) -> float | None:
    """What the caller said, else what was found when the tier was chosen."""
    job = work.job
    said = job.policy.get("complexity")
    if said is None:
        decided = job.decision.get("tier")
        found = decided if isinstance(decided, dict) else {}
        said = found.get("score", found.get("level"))
    if isinstance(said, str):
        return _LEVELS.get(said)
    return said if isinstance(said, int | float) else None


def _affinity(options: ModelBalancing, job: JobFacts, work: Work) -> bytes | None:
    """What the job sticks to a deployment by; None if by nothing."""
    if job.session_id is not None:
        return affinity_key("session", job.tenant, job.session_id)
    if options.prefix_affinity:
        return affinity_key("prefix", request_prefix(work.request, options.prefix_bytes))
    return None


def _sticky(
    key: bytes,
    well: Sequence[_Candidate],
    good: Sequence[_Candidate],
    options: ModelBalancing,
) -> list[_Candidate]:
    """In the key's order, those that are overloaded last."""
    bound = spill_bound([choice.in_flight for choice in well], options)
    ranked = [well[n] for n in rendezvous(key, [choice.deployment for choice in well])]
    free = {id(choice) for choice in good if choice.in_flight < bound}
    return sorted(ranked, key=lambda choice: id(choice) not in free)


def _why(strategy: str, first: _Candidate, count: int) -> str:
    """In a few words, how the first choice stood among how many."""
    facts = [f"{first.in_flight} in flight"]
    latency_s = first.latency_s
    if latency_s is not None:
        facts.append(f"{latency_s * 1000:.0f} ms")
    if strategy in {"cheapest", "weighted"} and first.usd is not None:
        facts.append(f"${first.usd:.6f}")
    return f"{', '.join(facts)}, of {count}"
