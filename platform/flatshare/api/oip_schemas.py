"""Bodies of the Open Inference Protocol as the OpenAPI shows them; the hot path does not parse with these."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field

from flatshare.api.http import ERROR_REPLIES
from flatshare.codecs.oip import HEADER_LENGTH

__all__ = [
    "HEADER_LENGTH_PARAMETER",
    "INFER_BODY",
    "INFER_REPLY",
    "OIP_ERROR_REPLIES",
    "REF_PARAMETER",
    "TAG",
    "VERSION_PARAMETER",
    "InferReply",
    "InferRequest",
    "LiveReply",
    "ModelMetadata",
    "ModelReadyReply",
    "ReadyReply",
    "ServerReply",
]

TAG: Final = "open inference protocol"

_BINARY_ABOUT: Final = (
    f"The JSON document, then the binary tensors one after the other; the header {HEADER_LENGTH} says how "
    "long the JSON is."
)


class ServerReply(BaseModel):
    """What serves."""

    name: str = "flatshare"
    version: str
    extensions: list[str] = Field(default=["binary_tensor_data"], description="Of the protocol; no others.")


class LiveReply(BaseModel):
    """It answers."""

    live: bool = True


class ReadyReply(BaseModel):
    """It can answer for models."""

    ready: bool = True


class ModelReadyReply(BaseModel):
    """A model can be asked for."""

    name: str = Field(examples=["acme"])
    ready: bool


class TensorMetadata(BaseModel):
    """A tensor that a model takes or gives; -1 is any number of rows."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str = Field(description="The architecture's name.")
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferInput(BaseModel):
    """A tensor in."""

    name: str = Field(examples=["image"])
    datatype: str = Field(description="FP32, model-ready; or UINT8, pixels.", examples=["FP32"])
    shape: list[int] = Field(examples=[[1, 1, 28, 28]])
    data: list[Any] | None = Field(default=None, description="Nested or flat; left out of a binary tensor.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="binary_data_size: bytes of this tensor after the JSON."
    )


class InferOutputWanted(BaseModel):
    """A tensor that is wanted."""

    name: str = Field(description="logits or predicted_label.", examples=["logits"])
    parameters: dict[str, Any] | None = Field(default=None, description="binary_data: after the JSON.")


class InferRequest(BaseModel):
    """An inference request. Parameters of extensions that are not served here are refused."""

    id: str | None = Field(default=None, description="Comes back in the reply.")
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutputWanted] | None = Field(default=None, description="Left out: all.")
    parameters: dict[str, Any] | None = Field(
        default=None, description="binary_data_output: all outputs after the JSON."
    )


class InferOutput(BaseModel):
    """A tensor out."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float] | None = Field(default=None, description="Flat; left out of a binary tensor.")
    parameters: dict[str, Any] | None = None


class InferReply(BaseModel):
    """An inference reply."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]


class OipErrorReply(BaseModel):
    """Every error below ``/v2``."""

    error: str = Field(description="For people; may change.", examples=["there is no tenant acme"])
    code: str = Field(description="Stable; programs may rely on it.", examples=["not_found"])
    request_id: str = Field(description="Also in the x-request-id header; name it to your operator.")


OIP_ERROR_REPLIES: Final[dict[int | str, dict[str, Any]]] = {
    status: {**reply, "model": OipErrorReply} for status, reply in ERROR_REPLIES.items()
}

REF_PARAMETER: Final[dict[str, Any]] = {
    "name": "ref",
    "in": "path",
    "required": True,
    "description": "Model ref: tenant, tenant:alias or tenant@version.",
    "schema": {"type": "string"},
    "example": "acme",
}

VERSION_PARAMETER: Final[dict[str, Any]] = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "One of the tenant's versions.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 99_999_999},
    "example": 1,
}

HEADER_LENGTH_PARAMETER: Final[dict[str, Any]] = {
    "name": HEADER_LENGTH,
    "in": "header",
    "description": "Bytes of the JSON at the body's beginning; needed when binary tensors follow.",
    "schema": {"type": "integer", "minimum": 0},
}

INFER_BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary", "description": _BINARY_ABOUT}
        },
    },
}

INFER_REPLY: Final[dict[str, Any]] = {
    "description": "The answer. application/octet-stream when an output was asked for as binary data.",
    "content": {
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary", "description": _BINARY_ABOUT}
        }
    },
}
