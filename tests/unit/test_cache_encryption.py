"""Sealed values: of use to who has the key, under their own name."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.jobs import Usage
from promptfleet_workers.caching.encryption import AesGcm
from promptfleet_workers.caching.values import Codec
from promptfleet_workers.providers.protocol import Completion

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
ANSWER = Completion(
    text="CANARY", response=b'"CANARY"', finish_reason="stop", usage=Usage(input=1, output=2)
)


@given(st.binary(), st.text(st.characters(codec="ascii")))
def test_what_is_sealed_opens_as_it_was(plain: bytes, name: str) -> None:
    cipher = AesGcm([NEW])

    assert cipher.open(name, cipher.seal(name, plain)) == plain


def test_a_value_is_not_readable_and_never_the_same_twice() -> None:
    codec = Codec(cipher=AesGcm([NEW]))

    values = [codec.encode("key", ANSWER) for _ in range(2)]

    assert values[0] != values[1]
    assert all(b"CANARY" not in value for value in values)
    kept = codec.decode("key", values[0])
    assert kept is not None
    assert kept.completion == ANSWER


def test_keys_are_changed_without_a_miss() -> None:
    old = Codec(cipher=AesGcm([OLD])).encode("key", ANSWER)
    both = Codec(cipher=AesGcm([NEW, OLD]))

    assert both.decode("key", old) is not None
    assert Codec(cipher=AesGcm([OLD])).decode("key", both.encode("key", ANSWER)) is None
    assert Codec(cipher=AesGcm([NEW])).decode("key", both.encode("key", ANSWER)) is not None


def test_another_key_or_name_or_none_is_a_miss() -> None:
    sealed = Codec(cipher=AesGcm([NEW])).encode("key", ANSWER)
    plain = Codec().encode("key", ANSWER)

    assert Codec(cipher=AesGcm([OLD])).decode("key", sealed) is None
    assert Codec(cipher=AesGcm([NEW])).decode("other", sealed) is None
    assert Codec().decode("key", sealed) is None
    assert Codec(cipher=AesGcm([NEW])).decode("key", plain) is None


@given(st.data())
def test_any_damage_is_a_miss(data: st.DataObject) -> None:
    codec = Codec(cipher=AesGcm([NEW]))
    value = bytearray(codec.encode("key", ANSWER))
    place = data.draw(st.integers(0, len(value) - 1))
    value[place] ^= data.draw(st.integers(1, 255))

    assert codec.decode("key", bytes(value)) is None
    assert codec.decode("key", bytes(value[:place])) is None


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    new = base64.urlsafe_b64encode(NEW).decode().rstrip("=")
    monkeypatch.setenv("KEYS", f"{new}, {base64.b64encode(OLD).decode()}")

    cipher = AesGcm.of_environment("KEYS")

    assert AesGcm([NEW]).open("n", cipher.seal("n", b"x")) == b"x"
    assert cipher.open("n", AesGcm([OLD]).seal("n", b"x")) == b"x"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "KEYS is not set"),
        (" , ", "KEYS is not set"),
        ("SECRET", "key 1 of KEYS is not 32 bytes in base64"),
        (base64.b64encode(NEW).decode() + ",SECRET!", "key 2 of KEYS"),
        (base64.b64encode(bytes(31)).decode(), "key 1 of KEYS"),
    ],
)
def test_keys_that_are_none_are_told_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, value: str | None, told: str
) -> None:
    if value is not None:
        monkeypatch.setenv("KEYS", value)

    with pytest.raises(ConfigurationError) as caught:
        AesGcm.of_environment("KEYS")

    assert told in str(caught.value)
    assert str(caught.value).startswith("cache.encryption_key_env: ")
    assert "SECRET" not in str(caught.value)
