"""Redis URLs: what each one means, which are refused, and that nobody ever reads a part of one."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_engine.errors import ConfigError
from sync_engine.storage.redis.address import Meaning, meaning_of, servers_of

CANARY = "canary-77d1"

MEANINGS: list[tuple[str, Meaning]] = [
    ("redis://", Meaning("one", {})),
    ("redis://h", Meaning("one", {"host": "h"})),
    ("redis://h:1/", Meaning("one", {"host": "h", "port": 1})),
    ("redis://h/3", Meaning("one", {"host": "h", "db": 3})),
    ("redis://h?db=3", Meaning("one", {"host": "h", "db": 3})),
    ("redis://[::1]:7/0", Meaning("one", {"host": "::1", "port": 7, "db": 0})),
    ("redis://:p%40%2F@h", Meaning("one", {"host": "h", "password": "p@/"})),
    ("redis://u:p@q@h", Meaning("one", {"host": "h", "username": "u", "password": "p@q"})),
    ("REDIS://h?protocol=2", Meaning("one", {"host": "h", "protocol": 2})),
    ("redis://h?client_name=c", Meaning("one", {"host": "h", "client_name": "c"})),
    ("rediss://h", Meaning("one", {"host": "h", "ssl": True})),
    (
        "rediss://h?ssl_ca_certs=/ca&ssl_cert_reqs=none&ssl_check_hostname=false",
        Meaning(
            "one",
            {"host": "h", "ssl": True, "ssl_ca_certs": "/ca", "ssl_cert_reqs": "none", "ssl_check_hostname": False},
        ),
    ),
    ("unix:///run/r.sock", Meaning("one", {"path": "/run/r.sock"})),
    (
        "unix://u:p@/run/a%20b.sock?db=2",
        Meaning("one", {"path": "/run/a b.sock", "username": "u", "password": "p", "db": 2}),
    ),
    (
        "redis+sentinel://h1/name",
        Meaning("sentinel", {}, (("h1", 26_379),), "name", {}),
    ),
    (
        "redis+sentinel://u:p@h1:1,[::1]:2,h3/my%20name/4?sentinel_username=su&sentinel_password=sp",
        Meaning(
            "sentinel",
            {"username": "u", "password": "p", "db": 4},
            (("h1", 1), ("::1", 2), ("h3", 26_379)),
            "my name",
            {"username": "su", "password": "sp"},
        ),
    ),
    (
        "redis+sentinel://h/n?tls=true&ssl_ca_certs=/ca",
        Meaning(
            "sentinel",
            {"ssl": True, "ssl_ca_certs": "/ca"},
            (("h", 26_379),),
            "n",
            {"ssl": True, "ssl_ca_certs": "/ca"},
        ),
    ),
    ("rediss+sentinel://h/n", Meaning("sentinel", {"ssl": True}, (("h", 26_379),), "n", {"ssl": True})),
    ("redis+cluster://h1,h2:7", Meaning("cluster", {}, (("h1", 6_379), ("h2", 7)))),
    (
        "redis+cluster://u:p@h/0?tls=false",
        Meaning("cluster", {"username": "u", "password": "p"}, (("h", 6_379),)),
    ),
    ("rediss+cluster://h", Meaning("cluster", {"ssl": True}, (("h", 6_379),))),
]


@pytest.mark.parametrize(("url", "meant"), MEANINGS, ids=[url for url, _ in MEANINGS])
def test_what_a_url_means(url: str, meant: Meaning) -> None:
    assert meaning_of(url) == meant


@pytest.mark.parametrize(
    "url",
    [
        "",
        CANARY,
        f"{CANARY}:secret@h",
        f"{CANARY}://h",
        f"http://u:{CANARY}@h",
        f"redis+nobody://u:{CANARY}@h",
        f"unix+sentinel://u:{CANARY}@h/n",
        f"redis://u:{CANARY}@h:port",
        f"redis://u:{CANARY}@h:99999",
        f"redis://u:{CANARY}@[::1",
        f"redis://u:1/{CANARY}@h:1/0",  # a slash, a question mark, a hash in a password that should be escaped
        f"redis://u:1?{CANARY}@h:1/0",
        f"redis://u:1?{CANARY}=1@h:1/0",
        f"redis://u:1#{CANARY}@h:1/0",
        f"redis://u:{CANARY}@h/nought",
        f"redis://u:{CANARY}@h/1/2",
        f"redis://u:{CANARY}@h/-1",
        f"redis://u:{CANARY}@h?nonsense=1",
        f"redis://u:{CANARY}@h?socket_timeout=1",
        f"redis://u:{CANARY}@h?max_connections=1000",
        f"redis://u:{CANARY}@h?retry_on_timeout=true",
        f"redis://u:{CANARY}@h?tls=true",
        f"redis://u:{CANARY}@h?ssl_cert_reqs=none",
        f"redis://u:{CANARY}@h?db=",
        f"redis://u:{CANARY}@h?db=1&db=2",
        f"redis://u:{CANARY}@h?db=x",
        f"redis://u:{CANARY}@h?protocol=4",
        f"redis://u:{CANARY}@h?sentinel_password={CANARY}",
        f"rediss://u:{CANARY}@h?ssl_cert_reqs=perhaps",
        f"rediss://u:{CANARY}@h?ssl_ca_certs=/no/{CANARY}",
        f"unix://u:{CANARY}@host/run/r.sock",
        f"unix://u:{CANARY}@",
        f"unix://u:{CANARY}@/run/r.sock?ssl_cert_reqs=none",
        f"redis+sentinel://u:{CANARY}@h",
        f"redis+sentinel://u:{CANARY}@h/",
        f"redis+sentinel://u:{CANARY}@h,/n",
        f"redis+sentinel://u:{CANARY}@h/n/x",
        f"redis+sentinel://u:{CANARY}@h/n/1/2",
        f"redis+sentinel://u:{CANARY}@h:0x1/n",
        f"redis+sentinel://u:{CANARY}@:1/n",
        f"redis+cluster://u:{CANARY}@",
        f"redis+cluster://u:{CANARY}@h1,,h2",
        f"redis+cluster://u:{CANARY}@h1/1",
        f"redis+cluster://u:{CANARY}@h1?db=1",
    ],
)
def test_a_bad_url_is_refused_and_not_quoted(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"^redis_(url|ca_file)") as refused:
        servers_of(url, "p:", timeout_ms=1_000, response_timeout_ms=1_000)
    told = "".join(traceback.format_exception(refused.value))
    assert CANARY not in told.replace(url, "")  # the traceback shows this file's own line
    assert CANARY not in f"{refused.value} {refused.value!r}"
    assert refused.value.__cause__ is None
    assert CANARY not in caplog.text


@given(url=st.text() | st.from_regex(r"(redis|rediss|unix)(\+(sentinel|cluster))?://[^\x00]{0,40}", fullmatch=True))
def test_any_text_is_a_meaning_or_a_config_error(url: str) -> None:
    try:
        meant = meaning_of(url)
    except ConfigError:
        return
    assert meant.kind == "one" or meant.hosts


@given(user=st.text(min_size=1), password=st.text(min_size=1), service=st.text(min_size=1))
def test_what_is_escaped_comes_back(user: str, password: str, service: str) -> None:
    login, name = f"{quote(user, safe='')}:{quote(password, safe='')}", quote(service, safe="")
    for url in (f"redis://{login}@h/0", f"unix://{login}@/s", f"redis+sentinel://{login}@h1,h2/{name}/0"):
        meant = meaning_of(url)
        assert (meant.options["username"], meant.options["password"]) == (user, password)
        assert meant.service == (service if meant.kind == "sentinel" else "")


# Certificates


def test_the_ca_file_is_for_every_encrypted_kind_unless_the_url_names_its_own() -> None:
    ca_file = Path("/ca.pem")
    for url in ("rediss://h", "rediss+sentinel://h/n", "redis+cluster://h?tls=true"):
        assert meaning_of(url, ca_file).options["ssl_ca_certs"] == "/ca.pem"
    assert meaning_of("rediss://h?ssl_ca_certs=/other", ca_file).options["ssl_ca_certs"] == "/other"
    assert meaning_of("unix:///run/r.sock", ca_file).options == {"path": "/run/r.sock"}


@pytest.mark.parametrize("url", ["redis://h", "redis+sentinel://h/n", "redis+cluster://h"])
def test_a_ca_file_beside_a_url_without_tls_is_a_mistake(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_ca_file"):
        meaning_of(url, Path("/ca.pem"))


@pytest.mark.parametrize("url", ["rediss://h", "rediss+sentinel://h/n", "rediss+cluster://h"])
def test_a_ca_file_that_is_none_is_refused_at_once(url: str, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("no certificate")
    for name in ("missing.pem", "empty.pem"):
        with pytest.raises(ConfigError, match="redis_ca_file"):
            servers_of(url, "p:", timeout_ms=1, response_timeout_ms=1, ca_file=tmp_path / name)


# Warnings


def make(url: str) -> None:
    servers_of(url, "p:", timeout_ms=1_000, response_timeout_ms=1_000)


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("redis://:{secret}@redis.example:{port}", "unencrypted"),
        ("redis://10.1.2.3:{port}?password={secret}", "unencrypted"),
        ("redis+sentinel://:{secret}@h:{port}/n", "unencrypted"),
        ("redis+sentinel://h2:{port}/n?sentinel_password={secret}", "unencrypted"),
        ("redis+cluster://:{secret}@localhost,h:{port}", "unencrypted"),
        ("rediss://:{secret}@h:{port}?ssl_cert_reqs=none", "not checked"),
        ("rediss://:{secret}@h2:{port}?ssl_check_hostname=false", "not checked"),
        ("rediss+cluster://:{secret}@h2:{port}?ssl_cert_reqs=none", "not checked"),
    ],
    ids=lambda value: value,
)
def test_what_endangers_a_password_is_warned_of_once(
    url: str, warned: str, caplog: pytest.LogCaptureFixture, ports: list[int]
) -> None:
    ports[0] += 1  # a host that no test has named: what was said of one is not said again
    with caplog.at_level(logging.WARNING, "sync_engine"):
        for _ in range(3):
            make(url.format(secret=CANARY, port=ports[0]))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert warned in caplog.text
    for part in (CANARY, "example", str(ports[0])):
        assert part not in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://:pw@localhost",
        "redis://:pw@127.8.9.1",
        "redis://:pw@[::1]",
        "redis://:pw@",
        "unix://:pw@/run/r.sock",
        "rediss://:pw@h",
        "redis+cluster://:pw@h?tls=true",
    ],
)
def test_what_is_safe_is_not_warned_of(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sync_engine"):
        make(url)
    assert caplog.records == []


@pytest.fixture(scope="module")
def ports() -> list[int]:
    """The port that was named last."""
    return [7_000]


def test_nothing_shows_a_password() -> None:
    for url in (f"redis://:{CANARY}@h", f"redis+sentinel://:{CANARY}@h/n?sentinel_password={CANARY}"):
        servers: Any = servers_of(url, "p:", timeout_ms=1_000, response_timeout_ms=1_000)
        for shown in (servers, servers.client, servers.client.connection_pool, meaning_of(url)):
            assert CANARY not in f"{shown!r} {shown!s}"
