"""Question 6b: 100,000 places from ``submit`` until all is stored, flushed by one, two and four writers of SQL.

On one machine the database and the engine share the cores; where the database is far away a writer mostly waits. So
each is asked twice, the second time with every reply held back by 2 ms.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from bench.data import places
from bench.end_to_end import ByTheThousand
from bench.harness import Answer, Stage, compared
from bench.truths import MariaDB, PostgreSQL, Server, made
from sync_engine.testing.proxy import CuttingProxy

__all__ = ["ask"]

ITEMS = 50_000
FAR_S = 0.002
WRITERS = (2, 4)


async def ask(stage: Stage) -> list[Answer]:
    """Redis + MariaDB, Redis + PostgreSQL; beside the engine with one writer."""
    data = places(stage.sized(ITEMS, 2_000))
    answers: list[Answer] = []
    for kind in (MariaDB, PostgreSQL):
        near = await made(stage, kind)
        assert isinstance(near, Server)
        where = urlsplit(near.url)
        assert where.hostname is not None
        assert where.port is not None
        async with CuttingProxy((where.hostname, where.port)) as proxy:
            proxy.delay(FAR_S)
            far = where._replace(netloc=f"{where.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}").geturl()
            for place, url in (("beside it", near.url), (f"{FAR_S * 1000:g} ms away", far)):
                contenders = [
                    ByTheThousand(
                        stage, data, near, {"sql_url": url, "sql_write_concurrency": count}, f"{count} writers, {place}"
                    )
                    for count in (1, *WRITERS)
                ]
                times = await stage.race(*contenders, rounds=stage.rounds)
                one, *more = (each.name for each in contenders)
                asked = f"`submit` → all stored, {len(data):,} places, Redis + {near.what} {place}"
                answers += [
                    compared(f"{asked}: {count} writers beside one", times, name, [one], None)
                    for count, name in zip(WRITERS, more, strict=True)
                ]
    return answers
