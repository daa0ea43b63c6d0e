"""nginx.conf, its README and the limits of the proxy agree. What nginx does with them: tests/e2e/nginx."""

from __future__ import annotations

import re

from tests.support import documents
from tests.support.documents import ticked
from tests.support.nginx import CONFIGURATION, README
from xgen_proxy import server
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream import http_protocol
from xgen_proxy.downstream.request_id import REQUEST_ID


def directive(name: str) -> str:
    values = re.findall(rf"^\s*{name} ([^;]+);", CONFIGURATION.read_text(), re.MULTILINE)
    assert len(set(values)) == 1, f"{name}: {values}"
    return str(values[0])


def seconds(name: str) -> int:
    return int(directive(name).removesuffix("s"))


def test_the_readme_lists_the_limits() -> None:
    rows = documents.table_rows(README, "directive")
    assert rows
    for names, value, _why in rows:
        for name in ticked(names):
            found = re.findall(rf"^\s*{name} (?:clients )?([^;]+);", CONFIGURATION.read_text(), re.MULTILINE)
            assert ticked(value)[0] in found, (name, value, found)


def test_limits_match_the_proxys() -> None:
    settings = Settings(backends={"vllm": {"urls": ["http://127.0.0.1:1"]}})
    backend = settings.backends["vllm"]
    sizes = re.findall(r"client_max_body_size (\d+);", CONFIGURATION.read_text())
    limits = settings.limits
    assert sizes == [str(limits.body_bytes), str(limits.upload_bytes), "0"], "only the error pages may have another"
    assert f"more than {limits.body_bytes} bytes ({limits.upload_bytes} with audio)" in CONFIGURATION.read_text()
    assert seconds("send_timeout") == http_protocol.STALL_TIMEOUT_S
    assert seconds("client_header_timeout") <= http_protocol.HEAD_TIMEOUT_S
    assert seconds("proxy_read_timeout") > settings.limits.queue_timeout_s + backend.total_timeout_s
    assert seconds("worker_shutdown_timeout") >= seconds("proxy_read_timeout")
    upstream = CONFIGURATION.read_text().partition("upstream proxies {")[2].partition("}")[0]
    kept = re.search(r"keepalive_timeout (\d+)s;", upstream)
    assert kept
    assert int(kept[1]) < server.KEEP_ALIVE_S
    assert f'"~^{REQUEST_ID.pattern.decode()}$"' in CONFIGURATION.read_text()
