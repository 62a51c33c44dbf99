"""One tenant that does all it can, as a process of its own: floods, junk, versions of itself, giants, slow ones.

``python -m tests.e2e.aggressor <url> <key> <versions>``: runs until its input ends, then prints what it was
answered, as JSON. A process, because in the measuring one it would share the interpreter lock with the victims.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

import numpy as np

from flatshare.bench.client import Connection, NoAnswer, Target
from flatshare.bench.workload import encode_json

MODEL = "serve_multiplexed_model_id"
SLOW_CONNECTIONS = 100
GIANT_BYTES = 1_000_000


class Aggressor:
    def __init__(self, url: str, key: str, versions: int) -> None:
        self.target = Target.of(f"{url}/predict")
        self.key = key
        self.versions = versions
        self.stop = False
        self.answers: Counter[str] = Counter()

    async def run(self) -> None:
        one, many = (encode_json(np.zeros((rows, 1, 28, 28), dtype=np.float32)) for rows in (1, 64))
        slow = [asyncio.create_task(self.say_nothing()) for _ in range(SLOW_CONNECTIONS)]
        floods = [self.flood("bad-actor", one) for _ in range(24)]
        floods += [self.flood("bad-actor", many) for _ in range(8)]
        floods += [self.flood(f"bad-actor@{1 + n}", one) for n in range(self.versions)]
        floods += [self.flood(ref, one) for ref in ("nobody", "victim-0", "bad-actor@999", "../../x")]
        floods += [self.flood("bad-actor", b"[" * 300_000), self.flood("bad-actor", b"x" * 8_300_000)]
        print("running", flush=True)
        running = asyncio.gather(*floods)
        await asyncio.to_thread(sys.stdin.read)
        self.stop = True
        await running
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        print(json.dumps(self.answers), flush=True)

    async def flood(self, ref: str, body: bytes) -> None:
        headers = {MODEL: ref, "content-type": "application/json", "x-api-key": self.key}
        request = self.target.request(headers, body)
        connection = Connection(self.target)
        while not self.stop:
            try:
                reply = await connection.post(request, 20)
                self.answers[str(reply.status)] += 1
            except NoAnswer:
                self.answers["no answer"] += 1
            if len(body) > GIANT_BYTES:
                await asyncio.sleep(0.2)  # or to make the bytes would be what takes the cores
        connection.close()

    async def say_nothing(self) -> None:
        """A connection that sends half a request and waits."""
        while True:
            reader, writer = await asyncio.open_connection(self.target.host, self.target.port)
            writer.write(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nhalf")
            await reader.read()
            writer.close()


if __name__ == "__main__":
    asyncio.run(Aggressor(sys.argv[1], sys.argv[2], int(sys.argv[3])).run())
