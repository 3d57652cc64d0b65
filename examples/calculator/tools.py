"""The tools of the agents in this folder."""


def add(a: int, b: int) -> int:
    """a plus b."""
    return a + b


def subtract(a: int, b: int) -> int:
    """a minus b."""
    return a - b


def multiply(a: int, b: int) -> int:
    """a times b."""
    return a * b


TOOLS = {tool.__name__: tool for tool in (add, subtract, multiply)}
