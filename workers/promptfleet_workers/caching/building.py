"""From [cache] in fleet.toml to the cache that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.policies.caching import CacheSection, SemanticSection
from promptfleet_workers.caching import disk, memory
from promptfleet_workers.caching.custom import GuardedCache, load_custom
from promptfleet_workers.caching.embedding import (
    FunctionVerifier,
    ModelVerifier,
    ProviderEmbedder,
)
from promptfleet_workers.caching.encryption import AesGcm
from promptfleet_workers.caching.layers import FRONT_BYTES, LayeredCache, SharedLayeredCache
from promptfleet_workers.caching.parts import Caching
from promptfleet_workers.caching.protocol import ResponseCache, SharedCache
from promptfleet_workers.caching.redis_cache import RedisCache
from promptfleet_workers.caching.semantic import SemanticCache, Verifier
from promptfleet_workers.caching.side_calls import Health, Limits, Money, Prices, SideCalls
from promptfleet_workers.caching.single_flight import Flight
from promptfleet_workers.caching.values import Codec
from promptfleet_workers.plugins import load_path
from promptfleet_workers.routing import Router

if TYPE_CHECKING:
    from promptfleet_workers.caching.semantic_index import SemanticIndex


def build_caching(
    fleet: Fleet,
    default_url: str,
    *,
    router: Router,
    health: Health,
    prices: Prices,
    limits: Limits | None = None,
    money: Money | None = None,
) -> Caching:
    """The parts of a worker's cache; they connect with their first use.

    Args:
        fleet: What fleet.toml says.
        default_url: The server of the settings.
        router: Knows where the semantic cache's models are.
        health: Gives leave to call them.
        prices: Prices those calls.
        limits: Those of the deployments and of the jobs, where there are any.
        money: The budgets, where there are any.

    Raises:
        ConfigurationError: Something that [cache] names is not there.
    """
    section = fleet.cache
    cache = build_cache(section, default_url)
    flight = None
    if section.single_flight == "fleet" and isinstance(cache, RedisCache | SharedLayeredCache):
        flight = Flight(cache)
    codec = build_codec(section)
    if not (section.enabled and section.semantic.enabled):
        return Caching(cache, section, codec=codec, flight=flight)
    index = _index(section, section.where() or default_url, codec)
    calls = SideCalls(
        health=health,
        prices=prices,
        timeout_s=section.semantic.timeout_ms / 1000,
        limits=limits,
        money=money,
    )
    semantic = SemanticCache(
        section,
        cache=cache,
        codec=codec,
        index=index,
        embedder=ProviderEmbedder(calls, router.candidates_of(section.semantic.model or "")),
        verifier=_verifier(section.semantic, calls, router),
    )
    return Caching(cache, section, codec=codec, flight=flight, semantic=semantic, index=index)


def _index(section: CacheSection, url: str, codec: Codec) -> SemanticIndex:
    try:
        from promptfleet_workers.caching.semantic_index import (  # noqa: PLC0415 - an extra of its own
            SemanticIndex,
        )
    except ImportError:
        msg = "cache.semantic.enabled: needs numpy; pip install 'promptfleet[semantic-cache]'"
        raise ConfigurationError(msg) from None
    return SemanticIndex(
        url,
        max_entries=section.semantic.max_entries,
        codec=codec,
        keep_texts=section.semantic.verify != "none",
    )


def _verifier(section: SemanticSection, calls: SideCalls, router: Router) -> Verifier | None:
    if section.verify == "none":
        return None
    if section.verify_model is not None:
        return ModelVerifier(calls, router.candidates_of(section.verify_model))
    function = load_path(section.verify, field="cache.semantic.verify")
    return FunctionVerifier(function, timeout_s=section.timeout_ms / 1000)


def build_cache(section: CacheSection, default_url: str) -> ResponseCache | SharedCache:
    """The cache of a worker; connects with its first use.

    Args:
        section: What fleet.toml says.
        default_url: The server of the settings.

    Raises:
        ConfigurationError: Something that it names is not there.
    """
    where = section.where()
    if section.connection_env is not None and where is None:
        msg = f"cache.connection_env: the environment variable {section.connection_env} is not set"
        raise ConfigurationError(msg)
    match section.type:
        case "redis":
            return _layered_redis(section, where or default_url)
        case "memory":
            return memory.MemoryCache(max_bytes=section.max_bytes or memory.MAX_BYTES)
        case "disk":
            path = Path(where or "").expanduser()
            return _layered(
                section, disk.DiskCache(path, max_bytes=section.max_bytes or disk.MAX_BYTES)
            )
        case "custom":
            return _layered(section, GuardedCache(load_custom(section)))


def _layered_redis(section: CacheSection, url: str) -> ResponseCache | SharedCache:
    try:
        back = RedisCache(url)
    except ValueError as error:
        msg = f"cache.connection: is no URL of a Redis server: {error}"
        raise ConfigurationError(msg) from None
    if section.layers:
        return SharedLayeredCache(memory.MemoryCache(max_bytes=FRONT_BYTES), back)
    return back


def _layered(section: CacheSection, back: ResponseCache) -> ResponseCache:
    if not section.layers:
        return back
    return LayeredCache(memory.MemoryCache(max_bytes=FRONT_BYTES), back)


def build_codec(section: CacheSection) -> Codec:
    """What writes and reads its values.

    Raises:
        ConfigurationError: Its keys are missing, or no keys.
    """
    variable = section.encryption_key_env
    return Codec(
        compress=section.compression == "zlib",
        cipher=AesGcm.of_environment(variable) if variable else None,
    )
