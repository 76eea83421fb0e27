"""How tenants share: the order itself as a model, fleet.toml's section, and a worker's reserve."""

from __future__ import annotations

import uuid
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fair_model import FairModel

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import parse_fleet
from promptfleet_shared.parking import shared_fields
from promptfleet_shared.policies.fairness import FairnessSection, KeyBound, TenantShare
from promptfleet_shared.queueing import PRIORITY_STEPS
from promptfleet_workers.batching import Slots
from promptfleet_workers.gate import open_doors

TENANTS = st.dictionaries(
    st.sampled_from("abcdef"), st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 7.5]), min_size=2
)


class TestOrder:
    @settings(max_examples=20, deadline=None)
    @given(weights=TENANTS, most=st.integers(1, 100))
    def test_shares_follow_the_weights(self, weights: dict[str, float], most: int) -> None:
        model = FairModel(weights=weights)
        each = 1_000
        for tenant in weights:
            for n in range(each):
                model.park(tenant, f"{tenant}{n}", n, 5)

        taken: Counter[str] = Counter()
        while max(taken.values(), default=0) < each - most:  # as long as all have some
            taken.update(job[0] for job in model.take(most))

        whole, weight = sum(taken.values()), sum(weights.values())
        for tenant, own in weights.items():
            assert taken[tenant] == pytest.approx(whole * own / weight, rel=0.05, abs=8)

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_nobody_starves(self, data: st.DataObject) -> None:
        """However many come, and however urgent: a job's wait is bounded by its own tenant's."""
        model = FairModel(ageing_ms=1_000)
        model.park("small", "patient", 0, 0)
        clock = n = 0
        for n in range(200):
            clock += 500
            for tenant in data.draw(st.sets(st.sampled_from("abc"), min_size=1)):
                model.park(tenant, f"{tenant}{n}", clock, 9)
            if "patient" in model.take(1):
                break
        assert n <= 4

    def test_the_least_urgent_job_is_next_once_it_has_waited_long_enough(self) -> None:
        model = FairModel(ageing_ms=1_000)
        model.park("a", "old", 0, 0)
        order = []
        for second in range(12):
            model.park("a", f"new{second}", second * 1_000 + 1, 9)
            order += model.take(1)

        assert order.index("old") == 9  # as many seconds as steps of priority

    def test_a_single_job_is_in_the_next_message_whatever_waits(self) -> None:
        model = FairModel()
        for n in range(500):
            model.park("big", f"big{n}", n, 9)
        model.take(100)
        model.park("small", "small", 1_000, 0)

        assert "small" in model.take(100)

    def test_who_comes_back_at_once_gets_no_more_than_its_share(self) -> None:
        model = FairModel()
        for n in range(300):
            model.park("big", f"big{n}", n, 5)
        taken: list[str] = []
        for n in range(100):
            model.park("pushy", f"pushy{n}", n, 9)
            taken += model.take(1)

        assert 45 <= sum(job.startswith("pushy") for job in taken) <= 55


class TestSection:
    def test_what_the_fleet_is_told(self) -> None:
        section = FairnessSection(
            interactive_reserve=0.1,
            max_in_flight=9,
            tenants={"acme": TenantShare(weight=3, max_in_flight=4)},
            keys={"user:*": KeyBound(max_in_flight=2)},
        )

        fields = shared_fields(section, {"basic": 50})

        assert {name: value for name, value in fields.items() if name != "id"} == {
            "ageing_ms": "60000",
            "urgent_from": "8",
            "bounded": "1",
            "t": "9",
            "w:acme": "3.0",
            "t:acme": "4",
            "k:user:*": "2",
            "chunk:prompts.basic": "50",
        }
        assert shared_fields(FairnessSection(enabled=False), {}) == {"id": "off", "off": "1"}

    def test_bounds_by_tenant_and_key(self) -> None:
        section = FairnessSection(
            tenants={"acme": TenantShare(max_in_flight=4)},
            keys={"user:*": KeyBound(max_in_flight=2), "user:7": KeyBound(max_in_flight=1)},
        )

        assert section.bound_of_tenant("acme") == 4
        assert section.bound_of_tenant("other") is None
        assert [section.bound_of_key(key) for key in ("user:7", "user:8", "db")] == [1, 2, None]
        assert section.is_bounded("other", "user:8")
        assert not section.is_bounded("other", None)

    @pytest.mark.parametrize(("slots", "reserved"), [(1, 0), (2, 1), (10, 1), (100, 10)])
    def test_a_reserve_is_never_all(self, slots: int, reserved: int) -> None:
        assert FairnessSection(interactive_reserve=0.1).reserved(slots) == reserved
        assert FairnessSection().reserved(slots) == 0

    @pytest.mark.parametrize(
        ("text", "field"),
        [
            ("[fairness]\ninteractive_reserve = 0.9", "fairness.interactive_reserve"),
            ("[fairness]\nmax_in_flight = 0", "fairness.max_in_flight"),
            ("[fairness.tenants.acme]\nweight = 0", "fairness.tenants.acme.weight"),
            ("[fairness]\nenabled = false\nmax_in_flight = 1", "fairness.enabled"),
            ("[fairness]\nshare = 1", "fairness.share"),
        ],
    )
    def test_mistakes_are_named(self, text: str, field: str) -> None:
        with pytest.raises(ConfigurationError, match=field.replace(".", r"\.")):
            parse_fleet(text)


class TestReserve:
    def test_others_leave_it_free_and_it_lends_none(self) -> None:
        slots = Slots(10, reserve=2)
        ids = [uuid.uuid4() for _ in range(5)]

        assert slots.take(100) == 8
        assert slots.take_reserved(ids) == 2
        assert slots.take_reserved(ids[2:]) == 0
        assert not slots.wants_interactive

        slots.ended(ids[0])
        assert slots.free == 0
        assert slots.wants_interactive
        slots.give_back(ids[4])  # had no slot of the reserve
        assert slots.free == 1

    @pytest.mark.parametrize(
        ("work", "interactive", "steps"),
        [
            (True, True, PRIORITY_STEPS),
            (False, True, PRIORITY_STEPS[:2]),
            (True, False, PRIORITY_STEPS[2:]),
        ],
    )
    def test_only_lists_with_room_are_looked_at(
        self, work: bool, interactive: bool, steps: tuple[int, ...]
    ) -> None:
        channel = SimpleNamespace(priority_steps=None, brpop_timeout=None)
        worker: Any = SimpleNamespace(wants_work=work, wants_interactive=interactive)

        assert open_doors(worker, channel)
        assert channel.priority_steps == list(steps)

    def test_nothing_is_looked_at_without_room(self) -> None:
        worker: Any = SimpleNamespace(wants_work=False, wants_interactive=False)

        assert not open_doors(worker, SimpleNamespace())
