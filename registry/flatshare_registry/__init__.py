"""flatshare_registry: who owns which weights, and which of them is in production.

A light package: no ray, no torch, no web framework, so that a training job can register a model.
"""

from flatshare_registry.catalog import Registry
from flatshare_registry.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    InvalidInput,
    InvalidRef,
    InvalidWeights,
    NotFound,
    RegistryError,
    StillReferenced,
    Unavailable,
    UnfitStore,
)
from flatshare_registry.ids import PRODUCTION, AliasName, ModelRef, TenantId
from flatshare_registry.keys import NewKey
from flatshare_registry.records import AuditEntry, Quotas, Scope, TenantHead, TensorRecord, VersionRecord
from flatshare_registry.registration import Registered
from flatshare_registry.stores.base import BlobStore
from flatshare_registry.stores.open import open_store
from flatshare_registry.weights import TensorSpec, WeightsFile, describe, read_weights

__all__ = [
    "PRODUCTION",
    "AliasName",
    "AlreadyExists",
    "AuditEntry",
    "BlobStore",
    "Conflict",
    "Corrupt",
    "InvalidInput",
    "InvalidRef",
    "InvalidWeights",
    "ModelRef",
    "NewKey",
    "NotFound",
    "Quotas",
    "Registered",
    "Registry",
    "RegistryError",
    "Scope",
    "StillReferenced",
    "TenantHead",
    "TenantId",
    "TensorRecord",
    "TensorSpec",
    "Unavailable",
    "UnfitStore",
    "VersionRecord",
    "WeightsFile",
    "describe",
    "open_store",
    "read_weights",
]
