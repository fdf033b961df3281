"""Experiments about training: contests of ways to train, comparisons of methods, surveys of models."""
