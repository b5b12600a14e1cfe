"""A process to be killed: appends records to a log and prints the number of each acknowledged one.

    python log_child.py FOLDER COUNT [small]

``small``: tiny segments, and all but the last two records are settled (told as ``sNUMBER`` before), so that a
short run begins, settles and deletes segments and makes every kind of system call.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import types
from importlib.util import find_spec
from pathlib import Path

# The package without its __init__, which would import SQLAlchemy and redis: hundreds of children are started.
if "sync_engine" not in sys.modules and (spec := find_spec("sync_engine")):
    package = types.ModuleType("sync_engine")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["sync_engine"] = package

from sync_engine.errors import ConfigError, TierUnavailable
from sync_engine.item import Op, SyncItem
from sync_engine.log import WriteAheadLog

SUBMITTERS = 20


def put(number: int, size: int = 40) -> Op:
    object_id = f"k{number}"
    content = random.Random(number).randbytes(size)
    item = SyncItem(object_id, content, stamp=number, updated_at=0, content_type="binary")  # type: ignore[arg-type]  # a plain str is taken too
    return Op(kind="put", object_id=object_id, stamp=number, item=item)


async def main(path: Path, count: int, small: bool) -> None:
    log = await WriteAheadLog.open(path, segment_bytes=1_400 if small else 65_536)
    loop = asyncio.get_running_loop()
    numbers = iter(range(1, count + 1))

    async def submit() -> None:
        for number in numbers:
            told = loop.create_future()
            log.append([put(number)], told.set_result, told.set_exception)
            try:
                records = await told
            except TierUnavailable as refused:
                os.write(1, b"failed %d %s\n" % (number, str(refused).encode()))
            else:
                os.write(1, b"%d\n" % number)
                if small and number > 2:
                    os.write(1, b"s%d\n" % (number - 2))
                    log.settle([records[0].seq - 2])

    # One by one where calls are counted, so that every run makes the same ones.
    await asyncio.gather(*(submit() for _ in range(1 if count < 100 else SUBMITTERS)))
    await log.close()


if __name__ == "__main__":
    try:
        asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), "small" in sys.argv))
    except ConfigError as refused:
        sys.stderr.write(str(refused))
        sys.exit(3)
