"""Bodies as the OpenAPI shows them. The hot path does not parse with these: see ``payload.py``."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ErrorBody", "ErrorReply", "PredictReply", "PredictRequest"]

MODEL_ID_HEADER: Final = "serve_multiplexed_model_id"


class PredictRequest(BaseModel):
    """Model-ready floats: (N, 1, 28, 28), (N, 28, 28) or (28, 28). Also as the JSON string of this."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": [[[0.0] * 28] * 28]}]})

    image: list[Any] = Field(description="Nested lists of finite numbers.")


class PredictReply(BaseModel):
    """One label a row."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"predicted_label": [7]}]})

    predicted_label: list[int] = Field(description="Most likely class of each row, in order.")


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str = Field(description="Stable; programs may rely on it.")
    message: str = Field(description="For people; may change.")
    request_id: str = Field(description="Also in the x-request-id header; name it to your operator.")


class ErrorReply(BaseModel):
    """Every error of both planes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "code": "not_found",
                        "message": "there is no tenant acme",
                        "request_id": "01JD8ZQ6E4W7YB1R2N9K3M5T0V",
                    }
                }
            ]
        }
    )

    error: ErrorBody
