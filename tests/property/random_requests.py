"""Requests at random to the data plane, mostly almost right (``test_fuzz.py``)."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from ..contract.planes import MODEL, Data

__all__ = ["Maker"]

NUMBERS = ["0", "1", "-1", "0.5", "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "1e-999", "3.4e38",
           "3.5e38", "true", "null", '"7"', '"0.1"', "[]", "{}", "0x10", "1_000", "00", "1."]  # fmt: skip
REFS = ["acme", "acme@1", "acme:production", "globex", "nobody", "", "acme@0", "acme@99999999", "acme@-1", "ACME",
        "acme:canary", "a" * 64, "../../etc", "acme@1:x", "acme\t", "acme,globex", "%61cme", "acme@١"]  # fmt: skip
NASTY = ["\r\nx-evil: 1", "\x1b[31m", "\u202e", "${jndi:ldap://x}", "%s%n", "'; drop table", "a" * 3000]


class Maker:
    """Makes requests at random: mostly almost right, since what is wrong at once is refused at once."""

    def __init__(self, seed: int, data: Data) -> None:
        self.random = random.Random(seed)
        self.keys = [text for text in data.keys.texts.values() if text is not None]
        self.good = data.keys.texts["both"]

    def request(self) -> tuple[str, str, dict[str, str], bytes]:
        chosen = self.random
        body, kind, path = chosen.choice(
            [self.json, self.json, self.octets, self.npy, self.image, self.oip, self.lines]
        )()
        if chosen.random() < 0.3:
            body = self.damaged(body)
        headers = {"content-type": kind, MODEL: chosen.choice(REFS) if chosen.random() < 0.3 else "acme"}
        if chosen.random() < 0.9:
            key = self.good if chosen.random() < 0.85 else chosen.choice(self.keys)
            assert key is not None
            headers |= {"authorization": f"Bearer {key}"} if chosen.random() < 0.5 else {"x-api-key": key}
        elif chosen.random() < 0.5:
            headers["authorization"] = chosen.choice(
                ["Bearer", "Bearer x", "Basic YTpi", "bearer " + "x" * 9000, ""]
            )
        if chosen.random() < 0.3:
            headers["x-tensor-dtype"] = chosen.choice(["uint8", "float32", "float64", "object", "", "F32"])
            headers["x-tensor-shape"] = chosen.choice(
                [
                    "1,1,28,28",
                    "28,28",
                    "0,1,28,28",
                    "-1,1,28,28",
                    "1,1,28",
                    "9" * 400,
                    "1e3",
                    "",
                    ",",
                    "1,1,28,28,1",
                ]
            )
        if chosen.random() < 0.2:
            headers["x-request-id"] = chosen.choice([*NASTY, "fine-1"]).encode("ascii", "replace").decode()
        if chosen.random() < 0.1:
            headers["inference-header-content-length"] = chosen.choice(
                ["0", "5", "-1", "9" * 30, "x", str(len(body))]
            )
        if chosen.random() < 0.05:
            path = chosen.choice(
                ["/", "/predict", "/classify", "/predict/stream", "/v2", "/nope", "/predict/", "//"]
            )
        method = (
            "POST" if chosen.random() < 0.97 else chosen.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
        )
        return method, path, headers, body

    def rows(self) -> str:
        chosen = self.random
        size = chosen.choice([28, 28, 28, 1, 0, 27])
        row = "[" + ",".join("0" for _ in range(size)) + "]"
        image = "[" + ",".join([row] * chosen.choice([28, 28, 28, 0, 29])) + "]"
        if chosen.random() < 0.5:
            image = image.replace("0", chosen.choice(NUMBERS), chosen.choice([1, 1, 784]))
        return chosen.choice([image, f"[[{image}]]", f"[{','.join([image] * chosen.choice([1, 2, 9]))}]"])

    def json(self) -> tuple[bytes, str, str]:
        chosen = self.random
        text = f'{{"image": {self.rows()}}}'
        shape = chosen.random()
        if shape < 0.1:
            text = json.dumps(text)  # the notebook's form
        elif shape < 0.15:
            text = "[" * chosen.choice([10, 1000, 100_000])
        elif shape < 0.2:
            text = '{"image":' * 2000 + "1" + "}" * 2000
        elif shape < 0.25:
            text = json.dumps(
                {"image": chosen.choice([None, 5, "x", {}, [[]], NASTY[0]]), chosen.choice(NASTY): 1}
            )
        return text.encode("utf-8", "surrogatepass"), "application/json", "/predict"

    def octets(self) -> tuple[bytes, str, str]:
        chosen = self.random
        return (
            chosen.randbytes(chosen.choice([784, 784, 1568, 0, 783, 3136])),
            "application/octet-stream",
            chosen.choice(["/predict", "/classify"]),
        )

    def npy(self) -> tuple[bytes, str, str]:
        chosen = self.random
        target = io.BytesIO()
        kind = chosen.choice(["float32", "float32", "uint8", "float64", "int64", "complex64", "S4"])
        np.save(
            target, np.zeros(chosen.choice([(1, 1, 28, 28), (28, 28), (2, 28, 28), (0,), (3, 3)]), dtype=kind)
        )
        data = target.getvalue()
        if chosen.random() < 0.2:
            data = data.replace(b"(1, 1, 28, 28)", b"(9, 99999,999)").replace(b"'<f4'", b"'|O' ")
        return data, "application/x-npy", "/predict"

    def image(self) -> tuple[bytes, str, str]:
        chosen = self.random
        if chosen.random() < 0.2:  # a bomb: a small file that claims to be enormous
            header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 0, 0, 0, 0)
            data = b"\x89PNG\r\n\x1a\n" + b"".join(
                struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
                for name, part in (
                    (b"IHDR", header),
                    (b"IDAT", zlib.compress(b"\0" * 10_000)),
                    (b"IEND", b""),
                )
            )
            return data, "image/png", "/classify"
        target = io.BytesIO()
        mode, form = chosen.choice(["L", "RGB", "P", "RGBA", "1", "CMYK"]), chosen.choice(["PNG", "JPEG"])
        size = chosen.choice([(28, 28), (28, 28), (1, 1), (29, 28), (2000, 1)])
        if form == "JPEG" and mode in ("P", "RGBA"):
            mode = "L"
        if form == "PNG" and mode == "CMYK":
            mode = "RGB"
        Image.new(mode, size).save(target, form)
        return (
            target.getvalue(),
            chosen.choice(["image/png", "image/jpeg", "multipart/form-data; boundary=x"]),
            "/classify",
        )

    def oip(self) -> tuple[bytes, str, str]:
        chosen = self.random
        tensor: dict[str, Any] = {
            "name": chosen.choice(["image", "image", "other"]),
            "datatype": chosen.choice(["FP32", "UINT8", "FP64", "BYTES", 5]),
            "shape": chosen.choice(
                [[1, 1, 28, 28], [28, 28], [1, 784], [-1], [2**40, 2**40], [0], "x", [1.5], []]
            ),
            "data": chosen.choice([[0] * 784, [0.5] * 784, [], [[0]], "x", None, [300] * 784, [True] * 784]),
        }
        if chosen.random() < 0.2:
            tensor["parameters"] = {"binary_data_size": chosen.choice([0, -1, 2**63, 3136, "x", True])}
        document: dict[str, Any] = {
            "inputs": chosen.choice([[tensor], [tensor], [tensor] * 2, [], tensor, None])
        }
        if chosen.random() < 0.3:
            document["outputs"] = chosen.choice(
                [
                    [{"name": "logits"}],
                    [{"name": "x"}],
                    5,
                    [5],
                    [{"name": "logits", "parameters": 7}],
                    [{"name": ["logits"]}],
                ]
            )
            document["parameters"] = chosen.choice([None, 5, {"binary_data_output": True}, []])
            document["id"] = chosen.choice(["1", 5, "x" * 5000, None])
        return (
            json.dumps(document).encode(),
            "application/json",
            f"/v2/models/{chosen.choice(['acme', 'acme@1', 'globex', 'a b', '%00'])}/infer",
        )

    def lines(self) -> tuple[bytes, str, str]:
        count = self.random.choice([1, 2, 5])
        return b"\n".join(self.json()[0] for _ in range(count)), "application/x-ndjson", "/predict/stream"

    def damaged(self, body: bytes) -> bytes:
        chosen = self.random
        if not body:
            return body
        start = chosen.randrange(len(body))
        return chosen.choice([
            lambda: body[:start], lambda: body[:start] + chosen.randbytes(4) + body[start + 4:],
            lambda: body + body, lambda: body[start:], lambda: b"\xef\xbb\xbf" + body, lambda: body + b"\0" * 10,
        ])()  # fmt: skip
