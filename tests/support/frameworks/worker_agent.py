"""A library of an agent's: one worker thread for everybody, started by the first who needs it."""

import queue
import threading
from concurrent.futures import Future

from examples.frameworks.openai_sdk import chat

AT_ONCE = 2
WAIT_S = 30.0

here = threading.Barrier(AT_ONCE)
lock = threading.Lock()
work: "queue.Queue[tuple[str, Future[str]]]" = queue.Queue()
worker: threading.Thread | None = None


def agent(task: dict[str, str]) -> str:
    here.wait(WAIT_S)
    start_worker()
    answer: Future[str] = Future()
    work.put((task["city"], answer))
    text = answer.result(WAIT_S)
    here.wait(WAIT_S)
    return text


def start_worker() -> None:
    global worker
    with lock:
        if worker is None:
            worker = threading.Thread(target=serve, name="shared-worker", daemon=True)
            worker.start()


def serve() -> None:
    while True:
        city, answer = work.get()
        try:
            answer.set_result(chat(city))
        except Exception as error:
            answer.set_exception(error)
