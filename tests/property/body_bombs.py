"""Bodies that hold more than they look: multipart, JSON, .npy, and all of them compressed."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from typing import Any, Final

from .image_bombs import JPEGS, PNGS, good_image

__all__ = ["LIMIT", "Body", "image", "json_rows", "lines", "multipart", "npy", "number", "octets", "oip"]

LIMIT: Final = 10**6
"""The planes' limit of a body (``contract/planes.py``); a few bodies are a little longer."""


@dataclass(frozen=True)
class Body:
    """A body and the headers that say what it is."""

    content: bytes
    kind: str
    headers: tuple[tuple[str, str], ...] = ()


def number(chosen: random.Random) -> str:
    """A number as text: of any length, and what Python takes for one and others do not."""
    plain = chosen.choice(
        ["0", "1", "5", "28", "784", "3136", "99999999", str(2**31), str(2**63), str(2**64)]
    )
    return chosen.choice([
        plain, plain, "-" + plain, "+" + plain, "0" * chosen.choice([3, 18, 4299, 4400, 40_000]) + plain,
        plain * chosen.choice([2, 20, 500]), "9" * chosen.choice([19, 20, 21, 4300, 4301, 50_000]), plain + ".0",
        plain + "e3", "1e999999999", "0x10", "1_000", " " + plain, plain + " ", "\xb2", "\xbc", "", ",", "NaN", "inf",
        "1,1,28,28", "1," * 400 + "28", "0,1,28,28", "-1,1,28,28", "2147483647,2147483647,2147483647",
    ])  # fmt: skip


# -- containers


def image(chosen: random.Random) -> Body:
    form = chosen.choice(["png", "jpeg"])
    if chosen.random() < 0.25:
        return Body(good_image(form.upper()), f"image/{form}")
    data = chosen.choice(PNGS if form == "png" else JPEGS)(chosen)
    if chosen.random() < 0.1:
        data = data[: chosen.randrange(len(data))]
    return Body(data, chosen.choice([f"image/{form}", f"image/{form}", "image/png", "IMAGE/JPEG; q=1"]))


def multipart(chosen: random.Random) -> Body:
    """Many files, many fields, many headers, odd charsets and boundaries; files are good pictures or bombs."""
    edge = chosen.choice(["x", "x", "-", "--", "a" * 70, "a" * 5000, "a b", "\\r"])
    made = chosen.choice(
        [
            lambda _: good_image(),
            lambda _: good_image("JPEG"),
            lambda _: b"",
            chosen.choice(PNGS),
            chosen.choice(JPEGS),
        ]
    )
    one = made(chosen)
    named = chosen.choice(
        ['; filename="a.png"', "; filename*=UTF-8''a", "", '; filename="' + "a" * 5000 + '"']
    )
    more = chosen.choice([
        "", "x: y\r\n" * 500, "x" * 9000 + ": y\r\n", "content-type: multipart/mixed; boundary=y\r\n",
        "content-transfer-encoding: base64\r\n", "content-encoding: gzip\r\n", 'content-disposition: form-data; name="b"\r\n',
    ])  # fmt: skip
    name = chosen.choice(["image", "image", "a" * 5000, "", "image" + ";a=b" * 2000])
    part = (
        f'--{edge}\r\ncontent-disposition: form-data; name="{name}"{named}\r\n{more}\r\n'.encode()
        + one
        + b"\r\n"
    )
    if not named and chosen.random() < 0.5:
        text = chosen.choice([b"a-" + b"b" * 1000, b"\\N{SPACE}" * 100, b"xn--" * 1000, b"a" * 900_000])
        part = part.replace(one + b"\r\n", text + b"\r\n") if one else part + text
    count = min(chosen.choice([1, 1, 2, 8, 9, 16, 17, 1000, 10**5]), LIMIT // len(part) or 1)
    content = part * count
    if chosen.random() < 0.15:
        content = (b"\r\n--" + edge.encode()[:-1]) * min(
            200_000, LIMIT // (len(edge) + 4)
        )  # almost a boundary
    elif chosen.random() < 0.15:
        content = content.replace(one, b"--y\r\n\r\n" + part, 1)  # one within another
    charset = chosen.choice(["", "", "", "; charset=punycode", "; charset=idna", "; charset=unicode_escape",
                             "; charset=utf-7", "; charset=undefined", "; charset=rot13", "; charset=" + "x" * 5000])  # fmt: skip
    end = chosen.choice([f"--{edge}--\r\n".encode(), b"", b"--"])
    return Body(content + end, f"multipart/form-data; boundary={edge}{charset}")


def _wrapped(text: str, depth: int) -> str:
    """JSON in a JSON string, again and again: each turn doubles what must be escaped."""
    for _ in range(depth):
        if len(text) > LIMIT // 2:
            break
        text = json.dumps(text)
    return text


def _many(text: str, count: int) -> str:
    return (text + ",") * (count - 1) + text


def _document(chosen: random.Random, key: str) -> str:
    if chosen.random() < 0.3:
        return json.dumps({key: [[0] * 28] * 28})
    wide = chosen.choice([1000, 300_000])
    leaf = chosen.choice(
        ["0", "0.5", "1e999", "9" * 5000, "0." + "1" * 5000, "1e-99999", "-0", '"7"', "true", "null"]
    )
    row = "[" + _many("0", 28) + "]"
    value = chosen.choice([
        "[" + _many(row, 28) + "]", "[" + _many(row, 28).replace("0", leaf, 1) + "]",
        "[" * wide, "[" * 500 + "]" * 500, "[" + _many("[]", wide) + "]", "[" + _many("{}", wide) + "]",
        "[" + _many("[[[[[[[]]]]]]]", wide // 5) + "]", "[" + _many("0.5", wide // 2) + "]",
        "[" + _many(leaf, min(wide, 900_000 // len(leaf))) + "]", '"' + "\\ud83d\\ude00" * (wide // 6) + '"',
        '"' + "\\ud800" * 1000 + '"', "{" + ",".join(f'"{at}":0' for at in range(wide // 4)) + "}",
        '{"a":' * 900 + "0" + "}" * 900, '"' + "x" * wide + '"', leaf,
    ])  # fmt: skip
    again = chosen.choice([1, 1, 1, 20])
    return "{" + ",".join([f'"{key}": {value}'] * min(again, 900_000 // len(value) or 1)) + "}"


def json_rows(chosen: random.Random) -> Body:
    text = _document(chosen, chosen.choice(["image", "image", "image", "x" * 9000]))
    if chosen.random() < 0.3:
        text = _wrapped(text, chosen.choice([1, 2, 5, 18]))
    return Body(text.encode(), chosen.choice(["application/json", "application/json; charset=utf-16", ""]))


def lines(chosen: random.Random) -> Body:
    one = json_rows(chosen).content + b"\n"
    one = chosen.choice([one, one, b"\n", b"{}\n", b" \n"])
    return Body(one * min(chosen.choice([1, 5, 40]), LIMIT // len(one) or 1), "application/x-ndjson")


def oip(chosen: random.Random) -> Body:
    if chosen.random() < 0.3:
        return Body(json_rows(chosen).content, "application/json")
    shape = chosen.choice(
        [[1, 1, 28, 28], [784], [2**62] * 4, [1] * 70, [0, 2**31], [-1], [[1]], "1", [1] * 9000]
    )
    tensor: dict[str, Any] = {
        "name": "image",
        "datatype": chosen.choice(["FP32", "UINT8", "BYTES"]),
        "shape": shape,
    }
    tail = b""
    if chosen.random() < 0.5:
        tail = b"\0" * chosen.choice([0, 784, 3136, 900_000])
        tensor["parameters"] = {
            "binary_data_size": chosen.choice([len(tail), len(tail), 2**63, 10**30, -1, 1.5])
        }
    else:
        tensor["data"] = chosen.choice(
            [[0] * 784, [[]] * 9000, [0.5] * 100_000, [[[[0]]]] * 9000, "x" * 90_000]
        )
    many = chosen.choice([1, 1, 1, 1000])
    document = {"inputs": [tensor] * min(many, 500_000 // len(json.dumps(tensor)) or 1),
                "outputs": [{"name": chosen.choice(["logits", "x"])}] * chosen.choice([0, 1, 2, 9000])}  # fmt: skip
    if chosen.random() < 0.3:
        document = {
            "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "data": [0] * 784}]
        }
    text = json.dumps(document).encode()
    length = chosen.choice([str(len(text)), str(len(text)), "0" * 4400 + str(len(text)), number(chosen)])
    headers = (("inference-header-content-length", length),) if tail or chosen.random() < 0.2 else ()
    return Body(text + tail, "application/json", headers)


def npy(chosen: random.Random) -> Body:
    """Headers of all versions: 70 dimensions, zeros times huge, Fortran order, lengths that lie, odd dtypes."""
    shape = chosen.choice(["(1, 1, 28, 28)", "(28, 28)", "(" + "1," * 70 + ")", "(0, 2147483647, 2147483647, 2147483647)",
                           "(2147483647,) * 9", "(" + "2147483647," * 30 + ")", "(28, 28, 1, 1)", "()", "(-1,)",
                           "(1e9,)", "(" + "9" * 3000 + ",)", "(True, 1, 28, 28)", "(lambda: 0)", "[28, 28]"])  # fmt: skip
    dtype = chosen.choice(["'<f4'", "'|u1'", "'>f8'", "'|O'", "'|S999999999'", "('<f4', (2147483647,))", "'|V0'", "'<c16'",
                           "[('a', '<f4', (99999, 99999))]", "[" + "('a','<f4')," * 150 + "]", "'<f2'", "'<m8[ns]'"])  # fmt: skip
    if chosen.random() < 0.4:  # good, or nearly so
        dtype, shape = (
            chosen.choice(["'<f4'", "'|u1'", "'>f8'"]),
            chosen.choice(["(1, 1, 28, 28)", "(28, 28)", shape]),
        )
    text = chosen.choice([
        f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}",
        f"{{'descr': {dtype}, 'fortran_order': {chosen.choice(['True', 'False', '0', 'None'])}, 'shape': {shape}, }}",
        f"{{'descr': {dtype}, 'fortran_order': True, 'shape': {shape}, }}",
        "(" * 3000, "-" * 4000 + "1", "[" * 2000 + "]" * 2000, "not " * 1000 + "1", "{" + "'a': 1, " * 500 + "}", "\0" * 100,
    ])  # fmt: skip
    header = text.encode() + b" " * 20 + b"\n"
    version = chosen.choice([(1, 0), (1, 0), (1, 0), (2, 0), (3, 0), (4, 0), (255, 255)])
    length = chosen.choice([*[len(header)] * 9, 0, 2**16 - 1, 2**31 - 1, 2**32 - 1])
    packed = struct.pack("<H", length & 0xFFFF) if version[0] == 1 else struct.pack("<I", length)
    data = b"\0" * chosen.choice([0, 4, 784, 3136, 6272, 900_000])
    return Body(
        b"\x93NUMPY" + bytes(version) + packed + header + data,
        chosen.choice(["application/x-npy", "application/x-npy;version=1"]),
    )


def octets(chosen: random.Random) -> Body:
    size = chosen.choice([784, 784, 3136, 0, 783, 784 * 8, 784 * 9, 784 * 1275])
    shape = chosen.choice([None, None, number(chosen), "1,1,28,28", "1," * 49 + "28"])
    headers = (
        []
        if shape is None
        else [
            ("x-tensor-shape", shape),
            ("x-tensor-dtype", chosen.choice(["uint8", "float32", number(chosen)])),
        ]
    )
    kind = chosen.choice(
        ["application/octet-stream", "application/octet-stream; charset=binary", "Application/Octet-Stream"]
    )
    return Body(bytes(size), kind, tuple(headers))
