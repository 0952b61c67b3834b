"""A real S3 server on the loopback address."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """A client of it, with a bucket; processes that are started meanwhile find it by their environment."""
    from moto.server import ThreadedMotoServer

    from artifacts import s3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            client = s3._file_system()
            if not client.exists(bucket):
                client.mkdir(bucket)
            yield client
    finally:
        server.stop()
