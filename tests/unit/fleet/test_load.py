from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cpu_time import TRIES, slowness, untraced
from xgen_proxy.config.settings import Routing
from xgen_proxy.fleet.load import LearntSlots, Scrape, load_of, parse_metrics
from xgen_proxy.fleet.replica import ANSWER_BYTES

PAGES = Path(__file__).resolve().parents[2] / "fixtures" / "metrics"

RECORDED = [
    ("vllm-0.26.0-metrics.txt", {"running": 4.0, "waiting": 4.0, "kv": 0.005502063273727598, "preemptions": 0.0}),
    ("vllm-0.32.0-metrics-idle.txt", {"running": 0.0, "waiting": 0.0, "kv": 0.0, "preemptions": 0.0}),
    (
        "vllm-0.32.0-metrics-loaded.txt",
        {"running": 4.0, "waiting": 4.0, "kv": 0.005502063273727598, "preemptions": 0.0},
    ),
    ("llama-server-metrics-idle.txt", {"running": 0.0, "waiting": 0.0, "kv": None, "preemptions": None}),
]


@pytest.mark.parametrize(("page", "expected"), RECORDED)
def test_recorded_pages(page: str, expected: dict[str, float | None]) -> None:
    assert parse_metrics((PAGES / page).read_bytes()) == expected


def test_kv_gauge_of_older_vllm() -> None:
    assert parse_metrics(b'vllm:gpu_cache_usage_perc{model_name="m"} 0.25\n')["kv"] == 0.25


def test_requests_of_engines_are_summed_and_kv_is_averaged() -> None:
    page = "".join(
        f'vllm:num_requests_running{{engine="{n}"}} {n}\nvllm:kv_cache_usage_perc{{engine="{n}"}} 0.{n}\n'
        for n in (2, 4)
    )
    parsed = parse_metrics(page.encode())
    assert parsed["running"] == 6
    assert parsed["kv"] == pytest.approx(0.3)


def test_timestamps_and_braces_in_labels() -> None:
    page = (
        'vllm:num_requests_running{model_name="a } b"} 3.0 1700000000000\nllamacpp:requests_deferred 2 1700000000000\n'
    )
    assert parse_metrics(page.encode()) == {"running": 3.0, "waiting": 2.0, "kv": None, "preemptions": None}


def test_missing_gauges_are_none() -> None:
    assert parse_metrics(b"# nothing\nother_metric 5\n") == {
        "running": None,
        "waiting": None,
        "kv": None,
        "preemptions": None,
    }


@given(page=st.binary(max_size=300) | st.floats().map(lambda value: f" {value}".encode()))
def test_any_page_is_parsed(page: bytes) -> None:
    parsed = parse_metrics(b"vllm:num_requests_running" + page + b"\nllamacpp:requests_deferred 2\n")
    assert all(value is None or 0 <= value < math.inf for value in parsed.values())


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1", "x", "", "}"])
def test_gauge_that_is_no_count_is_unknown(value: str) -> None:
    page = f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2\n"
    assert parse_metrics(page.encode()) == {"running": None, "waiting": 2.0, "kv": None, "preemptions": None}


HOSTILE = {
    "one gauge on end": b"vllm:num_requests_running",
    "gauges": b'vllm:num_requests_running{engine="0"} 1\n',
    "gauges without values": b"llamacpp:requests_deferred{\n",
    "nearly gauges": b"vllm:num_requests_runnin",
    "braces": b"vllm:num_requests_running{}}}}}}}} }",
    "line ends": b"\n",
    "spaces": b"vllm:kv_cache_usage_perc      ",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_the_largest_page_takes_no_longer_than_it_must(unit: bytes) -> None:
    page = (unit * (ANSWER_BYTES // len(unit) + 1))[:ANSWER_BYTES]
    with untraced():
        limit = 0.1 * slowness()
        best = math.inf
        for _ in range(TRIES):
            began = time.thread_time()
            parse_metrics(page)
            best = min(best, time.thread_time() - began)
    assert best < limit


def scrapes(*gauges: tuple[float | None, float | None, float | None]) -> list[int | None]:
    """The slots that are learnt after each scrape of running, waiting, KV usage."""
    learnt, found = LearntSlots(), []
    for running, waiting, kv in gauges:
        learnt.observe(Scrape(running, waiting, kv, at=0.0, stale_at=9.0))
        found.append(learnt.slots)
    return found


@pytest.mark.parametrize(
    ("gauges", "expected"),
    [
        ([(16, 3, 0.2)] * 3, 16),
        ([(16, 3, None)] * 3, 16),
        ([(16, 3, 0.2)] * 2, None),
        ([(16, 0, 0.2)] * 9, None),
        ([(0, 5, 0.2)] * 9, None),
        ([(16, 3, 0.95)] * 9, None),
        ([(None, 3, None)] * 9, None),
        ([(50, 20, 0.2), (86, 20, 0.2), (120, 20, 0.2)] * 3, None),
        ([(16, 3, 0.2), (16, 3, 0.2), (16, 0, 0.2), (16, 3, 0.2), (16, 3, 0.2)], None),
        ([*[(16, 3, 0.2)] * 3, (32, 3, 0.2)], 32),
        ([*[(16, 3, 0.2)] * 3, (9, 0, 0.2)], 16),
        ([*[(16, 3, 0.2)] * 3, *[(8, 3, 0.2)] * 3], 8),
        ([(1e9, 3, 0.2)] * 3, 65_536),
    ],
)
def test_slots_are_learnt_when_the_batch_stands_still_while_requests_wait(
    gauges: list[tuple[float | None, float | None, float | None]], expected: int | None
) -> None:
    assert scrapes(*gauges)[-1] == expected


@given(st.lists(st.tuples(*[st.none() | st.floats(0, 1e12)] * 3)))
def test_learnt_slots_are_a_count(gauges: list[tuple[float | None, float | None, float | None]]) -> None:
    assert all(slots is None or 1 <= slots <= 65_536 for slots in scrapes(*gauges))


def load(in_flight: int = 0, scraped: Scrape | None = None, now: float = 0.0) -> float:
    parts = load_of(
        in_flight=in_flight,
        slots=10,
        scraped=scraped,
        now=now,
        routing=Routing(),
    )
    return parts.total


def scrape(
    running: float | None = None, waiting: float | None = None, kv: float | None = None, ours: int = 0
) -> Scrape:
    return Scrape(running, waiting, kv, at=0.0, stale_at=5.0, ours=ours)


PARTS = [
    (0, None, 0.0),
    (5, None, 0.5),  # our own count decides without a scrape
    (5, scrape(), 0.5),  # and without gauges
    (5, scrape(running=5, ours=5), 0.5),  # our requests are on the page too, and count once
    (5, scrape(running=3, ours=5), 0.5),  # the page may lack some of them yet
    (5, scrape(running=8, ours=5), 0.8),  # requests of others are added
    (6, scrape(running=8, ours=5), 0.9),  # and requests that we sent since
    (1, scrape(running=8, ours=5), 0.4),  # requests that have ended since do not count
    (0, scrape(running=2, waiting=2), 0.4),
    (0, scrape(waiting=4), 0.8),
    (0, scrape(waiting=5), 1.0),
    (0, scrape(kv=0.4), 0.5),
    (0, scrape(kv=0.8), 1.0),
    (15, None, 1.5),
]


@pytest.mark.parametrize(("in_flight", "scraped", "expected"), PARTS)
def test_load_is_the_worst_of_its_parts(in_flight: int, scraped: Scrape | None, expected: float) -> None:
    assert load(in_flight, scraped) == pytest.approx(expected)


def test_stale_scrape_means_saturated() -> None:
    assert load(scraped=scrape(running=0), now=5.0) == 0.0
    assert load(scraped=scrape(running=0), now=5.1) == 1.0


def test_only_our_own_count_exceeds_a_stale_scrape() -> None:
    assert load(3, scrape(running=50, waiting=9, kv=1.0), now=5.1) == 1.0
    assert load(15, scrape(running=0), now=5.1) == 1.5


def test_parts_as_dict() -> None:
    parts = load_of(
        in_flight=1,
        slots=4,
        scraped=scrape(2, 1, 0.2, ours=1),
        now=0.5,
        routing=Routing(),
    )
    assert parts.as_dict() == {
        "total": 0.75,
        "in_flight": 3.0,
        "slots": 4,
        "waiting": 1,
        "kv": 0.2,
        "age_s": 0.5,
        "stale": False,
    }
