"""Settings of the registry: read once, at the root of a program, from ``FLATSHARE_*``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from flatshare_registry.stores.base import BlobStore
from flatshare_registry.stores.open import open_store
from flatshare_registry.stores.s3 import S3Options

__all__ = ["RegistrySettings"]


class RegistrySettings(BaseSettings):
    """Where the registry's objects are and how to reach them.

    Credentials are not settings: boto3 finds them in AWS's own variables, files or roles.
    """

    model_config = SettingsConfigDict(
        env_prefix="FLATSHARE_",
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # keys are among what may be wrong
    )

    store: str = Field(
        default="",
        description="Store URL: s3://bucket/prefix, file:///path or memory://name.",
    )
    s3_endpoint_url: str | None = Field(
        default=None, description="S3 endpoint; unset means AWS_ENDPOINT_URL or Amazon's own."
    )
    s3_region: str | None = Field(default=None, description="S3 region; unset means AWS_DEFAULT_REGION.")
    s3_sse: Literal["AES256", "aws:kms"] | None = Field(
        default=None, description="Server-side encryption of writes."
    )
    s3_sse_kms_key_id: str | None = Field(default=None, description="KMS key for s3_sse=aws:kms.")
    s3_connect_timeout_s: float = Field(default=2.0, gt=0, description="Seconds to connect, each try.")
    s3_read_timeout_s: float = Field(default=10.0, gt=0, description="Seconds without a byte, each try.")
    s3_max_attempts: int = Field(default=3, ge=1, le=10, description="Tries of one S3 request in all.")

    @property
    def s3_options(self) -> S3Options:
        """The S3 part as one value."""
        return S3Options(
            endpoint_url=self.s3_endpoint_url,
            region=self.s3_region,
            connect_timeout_s=self.s3_connect_timeout_s,
            read_timeout_s=self.s3_read_timeout_s,
            max_attempts=self.s3_max_attempts,
            sse=self.s3_sse,
            sse_kms_key_id=self.s3_sse_kms_key_id,
        )

    def open_store(self) -> BlobStore:
        """Open the configured store.

        Raises
        ------
        InvalidInput
            When ``store`` is not a store URL.
        """
        return open_store(self.store, self.s3_options)
