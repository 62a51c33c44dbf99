"""The registry's test kit, shipped so that others can check their own backends.

``store_suite.BlobStoreSuite`` is the conformance suite; ``faults`` has stores that fail on
purpose and a clock that stands still; ``files`` writes small safetensors files; ``s3_server`` is
a local S3 over HTTP. Never imported by running code (an import contract checks it).
"""
