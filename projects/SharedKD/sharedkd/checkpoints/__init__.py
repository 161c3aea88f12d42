"""Weights and training states: read from anybody, written so that a kill at any moment loses none."""
