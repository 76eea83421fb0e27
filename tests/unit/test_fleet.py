"""fleet.toml: what may stand in it, what is said of mistakes, and which option wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import BatchOptions, Fleet, load_fleet, parse_fleet

GOOD = """\
default_tier = "basic"

[batch]
max_batch_size = 50
batch_window_ms = 20

[retry]
retry_attempts = 5

[tiers.basic]
models = ["small"]

[tiers.advanced]
models = ["large", "small"]
batch = { max_batch_size = 7 }

[tiers.advanced.retry]
retry_delay_ms = 100

[models.small]
[[models.small.deployments]]
base_url = "http://localhost:8000/v1"
prompts_per_request = 16

[[models.small.deployments]]
name = "spare"
base_url = "https://spare.example.com/v1"
api_key_env = "SPARE_KEY"

[models.large]
price_as = "openai/gpt-4o"
[[models.large.deployments]]
base_url = "https://api.openai.com/v1"
model = "gpt-4o"
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parse_fleet(text, name="fleet.toml")
    return str(caught.value).splitlines()


def line_of(needle: str, text: str) -> int:
    (number,) = [n for n, line in enumerate(text.splitlines(), 1) if needle in line]
    return number


class TestMistakes:
    @pytest.mark.parametrize(
        ("good", "bad", "field"),
        [
            ("max_batch_size = 50", "max_batch_size = 0", "batch.max_batch_size"),
            ("batch_window_ms = 20", 'batch_window_ms = "soon"', "batch.batch_window_ms"),
            ("batch_window_ms = 20", "batch_window = 20", "batch.batch_window"),
            ("retry_attempts = 5", "retry_attempts = -1", "retry.retry_attempts"),
            ("retry_delay_ms = 100", "retry_delay_ms = -1", "tiers.advanced.retry.retry_delay_ms"),
            ("[retry]", "[retries]", "retries"),
            ('models = ["small"]', "models = []", "tiers.basic.models"),
            ('models = ["small"]', 'models = "small"', "tiers.basic.models"),
            ('models = ["small"]', 'models = ["tiny"]', "tiers.basic.models"),
            ('models = ["large", "small"]', 'modles = ["small"]', "tiers.advanced.modles"),
            ("prompts_per_request = 16", "prompts_per_request = 0", "prompts_per_request"),
            (
                'base_url = "https://spare.example.com/v1"',
                'base_url = "spare.example.com"',
                "models.small.deployments.1.base_url",
            ),
            (
                'base_url = "https://api.openai.com/v1"',
                'base_url = "ftp://api.openai.com"',
                "models.large.deployments.0.base_url",
            ),
            ('api_key_env = "SPARE_KEY"', "api_key_env = 7", "models.small.deployments.1"),
            ('price_as = "openai/gpt-4o"', "price = 3", "models.large.price"),
            ('default_tier = "basic"', 'default_tier = "huge"', "default_tier"),
        ],
    )
    def test_each_is_told_with_its_line_and_field(self, good: str, bad: str, field: str) -> None:
        text = GOOD.replace(good, bad, 1)

        found = mistakes(text)

        line = line_of(bad, text)
        assert any(m.startswith(f"fleet.toml:{line}: ") and field in m for m in found), found

    def test_an_option_within_an_inline_table_is_found_by_its_line(self) -> None:
        text = GOOD.replace("{ max_batch_size = 7 }", "{ max_batch_size = 0 }")

        (found,) = mistakes(text)

        assert found.startswith(f"fleet.toml:{line_of('max_batch_size = 0', text)}: ")
        assert "tiers.advanced.batch.max_batch_size" in found

    def test_what_is_missing_is_told_where_it_should_be(self) -> None:
        text = GOOD.replace('model = "gpt-4o"\n', "").replace(
            'base_url = "https://api.openai.com/v1"\n', ""
        )

        found = mistakes(text)[0]

        assert "models.large.deployments.0.base_url" in found
        line = line_of("[[models.large.deployments]]", text)
        assert found.startswith(f"fleet.toml:{line}: ")

    def test_one_mistake_is_told_once(self) -> None:
        found = mistakes('[[models.m.deployments]]\nbase_url = "nowhere"')

        assert len(found) == 1

    def test_no_deployments_at_all(self) -> None:
        (found,) = mistakes('[models.m]\nprice_as = "free"')

        assert found.startswith("fleet.toml:1: models.m.deployments: ")

    def test_broken_toml(self) -> None:
        (found,) = mistakes(GOOD.replace("max_batch_size = 50", "max_batch_size = "))

        assert found.startswith("fleet.toml:4: ")

    def test_a_key_twice(self) -> None:
        (found,) = mistakes(GOOD.replace("max_batch_size = 50", "batch_window_ms = 1"))

        assert found.startswith("fleet.toml:5: ")

    def test_all_are_told_at_once(self) -> None:
        text = GOOD.replace("max_batch_size = 50", "max_batch_size = 0").replace(
            "retry_attempts = 5", "retry_attempts = -1"
        )

        assert [m.split(":")[1] for m in mistakes(text)] == ["4", "8"]

    def test_a_tiers_name_is_a_queues_name(self) -> None:
        text = '[tiers."Big One"]\nmodels = ["m"]\n[[models.m.deployments]]\nbase_url = "http://h"'

        found = mistakes(text.replace("[tiers", 'default_tier = "Big One"\n[tiers'))

        assert found[0].startswith("fleet.toml:2: tiers.Big One: a tier's name is ")

    def test_two_deployments_of_one_name(self) -> None:
        text = GOOD.replace('model = "gpt-4o"', 'model = "gpt-4o"\nname = "spare"')

        (found,) = mistakes(text)

        assert "two deployments are called 'spare'" in found

    def test_a_mistake_does_not_tell_a_key(self) -> None:
        text = GOOD.replace('api_key_env = "SPARE_KEY"', 'api_key = "hunter2"\nmodle = "hunter2"')

        assert "hunter2" not in "\n".join(mistakes(text))


class TestOptions:
    def test_a_tier_overrides_what_it_names_and_nothing_else(self) -> None:
        fleet = parse_fleet(GOOD)

        assert fleet.batch_options("basic").max_batch_size == 50
        advanced = fleet.batch_options("advanced")
        assert (advanced.max_batch_size, advanced.batch_window_ms) == (7, 20.0)
        assert fleet.retry_options("advanced").retry_delay_ms == 100
        assert fleet.retry_options("advanced").retry_attempts == 5
        assert fleet.retry_options("basic").retry_delay_ms == 500

    def test_a_tier_may_set_a_default_explicitly(self) -> None:
        default = BatchOptions().max_batch_size
        text = GOOD.replace("max_batch_size = 7", f"max_batch_size = {default}")

        assert parse_fleet(text).batch_options("advanced").max_batch_size == default

    def test_an_unknown_tier_has_the_fleets_options(self) -> None:
        assert parse_fleet(GOOD).batch_options("nowhere").max_batch_size == 50

    def test_timers_come_from_deployment_tier_and_fleet(self) -> None:
        fleet = parse_fleet(
            """
            default_tier = "a"
            [timeouts]
            timeout_ms = 1
            idle_timeout_ms = 1
            connect_timeout_ms = 1
            [tiers.a]
            models = ["m"]
            timeouts = { timeout_ms = 2, idle_timeout_ms = 2 }
            [[models.m.deployments]]
            base_url = "http://h"
            timeouts = { timeout_ms = 3 }
            """
        )

        timers = fleet.timeout_options("a", fleet.models["m"].deployments[0])

        assert (timers.timeout_ms, timers.idle_timeout_ms, timers.connect_timeout_ms) == (3, 2, 1)
        assert timers.first_byte_timeout_ms == 300_000


class TestNames:
    def test_deployments_are_named_after_their_model(self) -> None:
        models = parse_fleet(GOOD).models

        assert [d.name for d in models["small"].deployments] == ["small", "spare"]
        assert [d.name for d in models["large"].deployments] == ["large"]

    def test_the_second_and_third_are_numbered(self) -> None:
        text = 'default_tier="a"\n[models.m]\ndeployments = [{A}, {A}, {A}]'.replace(
            "A", 'base_url = "http://h"'
        )

        assert [d.name for d in parse_fleet(text).models["m"].deployments] == ["m", "m-2", "m-3"]

    def test_tiers(self) -> None:
        assert parse_fleet(GOOD).tier_names == ("basic", "advanced")
        assert Fleet().tier_names == ("basic", "standard", "advanced")

    def test_a_quoted_model_name_may_hold_dots(self) -> None:
        text = (
            'default_tier = "a"\n[tiers.a]\nmodels = ["gpt-4.1"]\n'
            '[models."gpt-4.1"]\n[[models."gpt-4.1".deployments]]\nbase_url = "nowhere"\n'
        )

        found = mistakes(text)

        assert found[0].startswith("fleet.toml:6: models.gpt-4.1.deployments.0.base_url")


class TestKeys:
    def test_come_from_the_file_or_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = GOOD.replace('model = "gpt-4o"', 'model = "gpt-4o"\napi_key = "hunter2"')
        fleet = parse_fleet(text)
        monkeypatch.setenv("SPARE_KEY", "from-env")

        plain, spare = fleet.models["small"].deployments
        assert plain.secret() is None
        assert spare.secret() == "from-env"
        assert fleet.models["large"].deployments[0].secret() == "hunter2"
        assert "hunter2" not in repr(fleet)


class TestLoad:
    def test_no_file_means_the_usual_tiers(self) -> None:
        assert load_fleet(None) == Fleet()

    def test_a_file_is_named_in_its_mistakes(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("[batch]\nmax_batch_size = 0\n")

        with pytest.raises(ConfigurationError, match=r"mine\.toml:2: batch\.max_batch_size"):
            load_fleet(path)

    def test_a_file_that_can_not_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="can't be read"):
            load_fleet(tmp_path / "none.toml")
        (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigurationError, match="can't be read"):
            load_fleet(tmp_path / "latin.toml")

    def test_an_empty_file_is_a_fleet(self, tmp_path: Path) -> None:
        (tmp_path / "fleet.toml").write_text("")

        assert load_fleet(tmp_path / "fleet.toml") == Fleet()
