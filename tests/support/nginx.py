"""A real nginx with the configuration of nginx/nginx.conf, and a name server for the addresses of the proxies.

Only what depends on the machine is replaced: the listening ports, the name server, the port of the proxies and the
folder of the certificate.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support import compose_stack
from tests.support.real_servers import free_port
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "nginx" / "nginx.conf"
README = ROOT / "nginx" / "README.md"
IMAGE = compose_stack.variables()["NGINX_IMAGE"]
NEWEST_WITHOUT_RESOLVE = (1, 27, 2)
OF_BOTH_UPSTREAMS = ("resolver 127.0.0.11 ", "server proxy:8080 ", "valid=2s")
TMP_MB = 64
# As in compose.yaml: only /tmp is writable.
CAGE = ["--user", "101:101", "--read-only", "--tmpfs", f"/tmp:size={TMP_MB}m", "--memory", "256m", "--cap-drop", "ALL"]
CAGE += ["--security-opt", "no-new-privileges"]


class UnavailableError(Exception):
    """This machine has neither Docker with the image nor a recent nginx. Says why."""


def runner() -> str:
    """`docker` once the image exists, else the path of a recent nginx. Raises UnavailableError."""
    try:
        subprocess.run(["docker", "info"], check=True, capture_output=True, timeout=30)
        image = [str(ROOT / "tests" / "support" / "nginx_image.sh"), IMAGE]
        subprocess.run(image, check=True, capture_output=True, text=True, timeout=280)
        return "docker"
    except (OSError, subprocess.SubprocessError) as error:
        why = f"docker: {getattr(error, 'stderr', None) or error}"
    binary = shutil.which("nginx")
    if binary:
        output = subprocess.run([binary, "-v"], capture_output=True, text=True, check=True).stderr
        version = tuple(int(part) for part in re.findall(r"nginx/([\d.]+)", output)[0].split("."))
        if version > NEWEST_WITHOUT_RESOLVE:
            return binary
        why += f"; {output.strip()} is too old"
    raise UnavailableError(f"no Docker and no nginx of 1.27.3 or newer: {why}")


class NameServer:
    """A DNS server that answers each question with A records of `addresses` and a TTL of 0."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                question, client = self.socket.recvfrom(512)
                self.socket.sendto(self._answer(question), client)

    def _answer(self, question: bytes) -> bytes:
        asked = question[12 : question.index(b"\0", 12) + 5]
        found = [socket.inet_aton(address) for address in self.addresses]
        head = question[:2] + struct.pack(">HHHHH", 0x8180 if found else 0x8183, 1, len(found), 0, 0)
        return head + asked + b"".join(b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + each for each in found)


@dataclass
class Nginx:
    """An nginx in front of proxies that listen on `proxy_port` at the addresses of `names`."""

    runner: str
    folder: Path
    proxy_port: int
    names: NameServer
    added: str = ""  # to the http block
    changed: Mapping[str, str] = field(default_factory=dict)  # text in nginx.conf: its replacement
    plain: int = field(default_factory=free_port)
    tls: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.log = self.folder / "nginx.log"  # stdout and stderr: the access log and the error log
        self.certificate = self.folder / "tls" / "fullchain.pem"
        self.container = f"xgen-test-nginx-{uuid.uuid4().hex[:12]}"
        self.url = f"https://localhost:{self.tls}"

    def start(self) -> Nginx:
        certificate(self.folder / "tls")
        conf = self.folder / "nginx.conf"
        folder = "/etc/nginx/tls" if self.runner == "docker" else str(self.folder / "tls")
        conf.write_text(self._configuration(folder))
        command = self._in_docker(conf) if self.runner == "docker" else self._here(conf)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        wait_until(self._answers, 60, f"nginx to answer; its log ends:\n{self.log.read_text()[-2000:]}")
        return self

    def _configuration(self, tls: str) -> str:
        text = CONFIGURATION.read_text()
        for old, new in {
            "listen 80;": f"listen 127.0.0.1:{self.plain};",
            "listen 443 ssl": f"listen 127.0.0.1:{self.tls} ssl",
            "resolver 127.0.0.11 ": f"resolver 127.0.0.1:{self.names.port} ",
            "server proxy:8080 ": f"server proxy:{self.proxy_port} ",
            "ssl_certificate /etc/nginx/tls/": f"ssl_certificate {tls}/",
            "ssl_certificate_key /etc/nginx/tls/": f"ssl_certificate_key {tls}/",
            "pid /tmp/": f"pid {'/tmp' if self.runner == 'docker' else self.folder}/",
            **self.changed,
        }.items():
            times = 2 if old in OF_BOTH_UPSTREAMS else 1
            assert text.count(old) == times, f"{CONFIGURATION} should have this {times} times: {old}"
            text = text.replace(old, new)
        return text.replace("\nhttp {\n", f"\nhttp {{\n{self.added}\n")

    def _in_docker(self, conf: Path) -> list[str]:
        mounts = ["-v", f"{conf}:/etc/nginx/nginx.conf:ro", "-v", f"{self.certificate.parent}:/etc/nginx/tls:ro"]
        command = ["docker", "run", "--rm", "--name", self.container, "--network", "host", *CAGE, *mounts]
        return [*command, "--entrypoint", "nginx", IMAGE, "-g", "daemon off;"]

    def _here(self, conf: Path) -> list[str]:
        return [self.runner, "-e", "stderr", "-p", str(self.folder), "-c", str(conf), "-g", "daemon off;"]

    def _answers(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"nginx ended with {code}; its log:\n{self.log.read_text()}"
        try:
            return httpx.get(f"http://127.0.0.1:{self.plain}/", timeout=5, verify=False).status_code == 308
        except httpx.TransportError:
            return False

    def reload(self) -> None:
        """As `nginx -s reload`."""
        assert self.process is not None
        if self.runner == "docker":
            subprocess.run(["docker", "kill", "--signal", "HUP", self.container], check=True, capture_output=True)
        else:
            self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self.process is None:
            return
        if self.runner == "docker":
            subprocess.run(["docker", "rm", "-f", self.container], capture_output=True, timeout=60)
        else:
            self.process.terminate()
        self.process.wait(30)

    # -- for tests -----------------------------------------------------------------------------------------------------

    def context(self, *protocols: str) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(self.certificate))
        if protocols:
            made.set_alpn_protocols(list(protocols))
        return made

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.context(), timeout=20, **options)

    def connect(self, *protocols: str) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.tls), timeout=30)
        return self.context(*protocols).wrap_socket(plain, server_hostname="localhost")

    def lines(self) -> list[dict[str, Any]]:
        """The access log. Lines that are not JSON belong to the error log."""
        written = self.log.read_text().rpartition("\n")[0]  # the last line may be incomplete
        return [json.loads(line) for line in written.splitlines() if line.startswith("{")]

    def line(self, request_id: str) -> dict[str, Any]:
        """The log line of a request, which is written at its end."""
        return wait_until(
            lambda: next((line for line in self.lines() if line["request_id"] == request_id), None), 5, request_id
        )


def certificate(folder: Path, name: str = "localhost") -> subprocess.CompletedProcess[str]:
    """Run nginx/self-signed.sh, and make its files readable for the user in the container."""
    script = ["sh", str(ROOT / "nginx" / "self-signed.sh"), str(folder)]
    done = subprocess.run(script, env={**os.environ, "SERVER_NAME": name}, capture_output=True, text=True, check=False)
    if os.getuid() != 0 and (folder / "privkey.pem").exists():
        (folder / "privkey.pem").chmod(0o644)
    if folder.exists():
        folder.chmod(0o755)
    return done
