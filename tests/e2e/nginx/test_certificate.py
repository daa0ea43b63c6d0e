"""The self-signed certificate that nginx starts with."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.nginx import Nginx, certificate
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    ("name", "others"), [("localhost", []), ("my.example", ["DNS:my.example"]), ("10.1.2.3", ["IP Address:10.1.2.3"])]
)
def test_self_signed_certificate(tmp_path: Path, name: str, others: list[str]) -> None:
    done = certificate(tmp_path / "tls", name)
    assert done.returncode == 0, done.stderr
    chain, key = tmp_path / "tls" / "fullchain.pem", tmp_path / "tls" / "privkey.pem"
    command = ["openssl", "x509", "-in", str(chain), "-noout", "-ext", "subjectAltName"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(each in printed for each in ["DNS:localhost", "IP Address:127.0.0.1", *others])
    if os.getuid() == 0:
        assert (stat.S_IMODE(key.stat().st_mode), key.stat().st_uid) == (0o600, 101)
    made = chain.read_bytes(), key.read_bytes()
    assert certificate(tmp_path / "tls", name).returncode == 0
    assert (chain.read_bytes(), key.read_bytes()) == made, "an existing certificate was replaced"
    key.unlink()
    assert certificate(tmp_path / "tls", name).returncode == 1, "a certificate without its key was replaced"
    assert chain.read_bytes() == made[0]


@pytest.mark.parametrize("name", ["", "a b", "*.example", "x,IP:6.6.6.6", "x/CN=y"])
def test_invalid_names_make_no_certificate(tmp_path: Path, name: str) -> None:
    done = certificate(tmp_path / "tls", name)
    assert done.returncode == (0 if name == "" else 1)  # unset and empty are the same to compose
    assert (tmp_path / "tls" / "fullchain.pem").exists() == (name == "")


def test_a_damaged_certificate_changes_nothing_on_a_reload(bare: Nginx) -> None:
    good = bare.certificate.with_name("good.pem")
    bare.certificate.rename(good)
    bare.certificate.write_text(good.read_text()[:300])  # a new file: nginx caches one whose time and inode stay
    try:
        bare.reload()
        wait_until(lambda: "cannot load certificate" in bare.log.read_text(), 20, "nginx to refuse the certificate")
    finally:
        good.replace(bare.certificate)
    with bare.client() as client:
        assert client.get("/health").status_code == 200
