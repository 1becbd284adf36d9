"""An S3 server as a process of its own, which can be killed: `moto`, with one bucket."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BUCKET = "bucket"
# Where S3 clients look for them; nothing here is secret.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_SERVE = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass
class S3Server:
    """A running server.

    Args:
        port: on 127.0.0.1.
        process: ends when its standard input does, so with the test.
    """

    port: int
    process: subprocess.Popen[str]

    def uri(self, prefix: str, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{prefix}?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{self.port}"

    def client(self) -> Any:
        import boto3  # type: ignore[import-untyped]

        names = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **names)

    def objects(self, prefix: str) -> dict[str, int]:
        """Keys below a prefix, and their bytes."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        found = {
            each["Key"].removeprefix(f"{prefix}/"): each["Size"] for page in pages for each in page.get("Contents", [])
        }
        return {key: size for key, size in found.items() if key and not key.endswith("/")}


@contextmanager
def s3_server() -> Iterator[S3Server]:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVE, "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | ENVIRONMENT,
    ) as process:
        try:
            assert process.stdout is not None
            server = S3Server(int(process.stdout.readline()), process)
            server.client().create_bucket(Bucket=BUCKET)
            yield server
        finally:
            process.kill()
