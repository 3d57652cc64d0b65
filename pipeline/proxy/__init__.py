"""The LLM proxy: `app` is its HTTP interface, `calls` the walk of a model call."""

from millstream.pipeline.proxy.app import Proxy

__all__ = ["Proxy"]
