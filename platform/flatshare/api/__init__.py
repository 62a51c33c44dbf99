"""The data plane's HTTP layer: reads bodies, writes replies, turns errors into statuses."""
