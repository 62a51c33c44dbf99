"""Blob stores: one narrow protocol, three backends, one conformance suite (in ``testing``)."""
