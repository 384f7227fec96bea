#!/usr/bin/env python
"""Visitors of the try-on page, all at once: how long they wait, that each gets their own person back, and the server's memory.

`app.py` runs in a process of its own, on the demo model. Every visitor is a gradio client that uploads pictures of its own and calls
`/tryon`. Rounds follow one another, so that memory which is not given back shows.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageEnhance


try:
    from gradio_client import Client, handle_file
except ImportError as error:
    raise ImportError("visitors need gradio: pip install -r requirements-app.txt") from error


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "demo" / "examples").iterdir())
PATIENCE = 600  # seconds


@contextmanager
def serve(folder: Path = ROOT) -> Iterator[tuple[str, psutil.Process]]:
    """The address of the page that a folder's `app.py` serves with the demo model, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VTON_")}
    environment |= {"GRADIO_SERVER_PORT": str(address[1]), "PYTHONPATH": ""}
    # Its output is not read: it may stay in a buffer, and a pipe that nobody empties stops who writes into it.
    command = [sys.executable, "app.py"]
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(address, server)
        yield "http://{}:{}".format(*address), psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def wait_for(address: tuple[str, int], server: subprocess.Popen) -> None:
    """Until the server takes connections; RuntimeError where it ends before, or does not within `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(ConnectionRefusedError):
            socket.create_connection(address, timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"app.py takes no connections on port {address[1]}, its exit status is {server.returncode}")


def visit(url: str, number: int, steps: int, folder: Path) -> float:
    """One visitor, from the arrival to the checked result, in seconds."""
    start = time.perf_counter()
    example = EXAMPLES[number % len(EXAMPLES)]
    person = ImageEnhance.Brightness(Image.open(example / "person.png")).enhance(0.6 + 0.01 * number)
    file = folder / f"person-{number}.png"
    person.save(file)
    client = Client(url, verbose=False, download_files=str(folder), httpx_kwargs={"timeout": PATIENCE})
    result, _, _ = client.predict(
        person=handle_file(str(file)),
        cloth=handle_file(str(example / "cloth.png")),
        mask=handle_file(str(example / "mask.png")),
        steps=steps,
        seed=number,
        api_name="/tryon",
    )
    outside = np.asarray(Image.open(example / "mask.png")) < 128
    if not np.array_equal(np.asarray(Image.open(result))[outside], np.asarray(person)[outside]):
        raise RuntimeError(f"visitor {number} got somebody else's picture")
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    with serve() as (url, server), tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.visitors) as crowd:
        visit(url, 0, args.steps, Path(folder))
        print(f"memory after one visitor: {server.memory_info().rss / 2**20:.0f} MiB", flush=True)
        for number in range(1, args.rounds + 1):
            start = time.perf_counter()
            seconds = list(
                crowd.map(lambda visitor: visit(url, visitor, args.steps, Path(folder)), range(args.visitors))
            )
            print(
                f"round {number}: {len(seconds)} visitors served in {time.perf_counter() - start:.1f} s, each waited "
                f"{min(seconds):.1f} to {max(seconds):.1f} s; memory {server.memory_info().rss / 2**20:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=40, help="at once, 64 at most (default 40)")
    parser.add_argument("--rounds", type=int, default=3, help="of them, one after the other (default 3)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default 10)")
    main(parser.parse_args())
