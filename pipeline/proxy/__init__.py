"""The LLM proxy. `app` serves it, `calls` is the life of a call; the rest is pure, or one thing each."""

from millstream.pipeline.proxy.app import Proxy

__all__ = ["Proxy"]
