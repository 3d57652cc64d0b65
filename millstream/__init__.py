"""Millstream: train AI agents that already exist, over an event stream."""
