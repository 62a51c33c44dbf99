"""Training the demo's customers: real fine-tunings of one base model on real MNIST digits."""
