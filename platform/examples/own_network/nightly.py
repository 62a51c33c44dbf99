"""A training job: train, register with a probe, promote. ``FLATSHARE_STORE=… python nightly.py acme``."""

from __future__ import annotations

import os
import sys
from functools import partial

import torch
from safetensors.torch import save

from flatshare.mnist.digits import load_digits
from flatshare.models.architecture import architecture
from flatshare.models.probe import probe_logits
from flatshare_registry.catalog import Registry
from flatshare_registry.ids import PRODUCTION, TenantId
from flatshare_registry.stores.open import open_store

network = architecture("tiny-mlp")
digits = load_digits()
images = torch.from_numpy(network.preprocess(digits.train_images))
labels = torch.from_numpy(digits.train_labels)

torch.manual_seed(0)
module = network.build().train()
optimizer = torch.optim.Adam(module.parameters(), 1e-3)
for _ in range(3):
    for rows in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images[rows]), labels[rows]).backward()
        optimizer.step()
with torch.inference_mode():
    answers = module.eval()(torch.from_numpy(network.preprocess(digits.test_images)))
accuracy = (answers.argmax(1) == torch.from_numpy(digits.test_labels)).double().mean().item()

registry = Registry(open_store(os.environ["FLATSHARE_STORE"]), actor="nightly")
done = registry.register(
    TenantId(sys.argv[1]),
    save(dict(module.state_dict())),
    network.name,
    network.tensors,
    alias=PRODUCTION,  # in the same step; leave it out to look at the version first
    metadata={"accuracy": f"{accuracy:.4f}"},
    probe=partial(probe_logits, network),  # each replica compares its own answer with this one
    create=True,
)
sys.stdout.write(f"{done.version.name} is in production: {accuracy:.2%} of {len(answers)} digits right\n")
