"""From a request to an answer: admission, batching (to come), the forward pass. No ray, no web framework."""
