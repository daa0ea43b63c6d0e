from __future__ import annotations

import hashlib
import hmac

import pytest

from xgen_proxy.api.api_keys import check_key, hash_key, new_key
from xgen_proxy.errors import AuthenticationError


def bearer(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"authorization": f"{scheme} {key}".encode()}


def test_new_key_and_its_hash() -> None:
    key, hash = new_key()
    assert key.startswith("sk-")
    assert len(key) > 40
    assert hash == hash_key(key) == hashlib.sha256(key.encode()).hexdigest()
    assert new_key()[0] != key


@pytest.mark.parametrize("said", [None, "none"])
def test_any_request_is_accepted_where_keys_are_unset_or_none(said: str | None) -> None:
    assert check_key({}, said) is None
    assert check_key(bearer("anything"), said) is None


@pytest.mark.parametrize("headers", [{}, bearer(""), bearer("anything")])
def test_an_empty_list_has_no_valid_key(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(AuthenticationError):
        check_key(headers, [])


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_known_key_is_named_by_its_hash(place: int, scheme: str) -> None:
    hashes = [hash_key(f"other-{number}") for number in range(3)]
    hashes[place] = hash_key("sk-mine")
    assert check_key(bearer("sk-mine", scheme), hashes) == hash_key("sk-mine")[:8]
    assert check_key({b"authorization": f"{scheme}  sk-mine ".encode()}, hashes) == hash_key("sk-mine")[:8]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"sk-mine"},
        bearer("sk-mine", "Basic"),
        bearer("sk-min"),
        bearer("sk-mine2"),
        bearer("Sk-mine"),
        bearer(hash_key("sk-mine")),  # the configuration does not reveal a usable key
        {b"authorization": b"Bearer \xff\xfe"},
    ],
)
def test_unknown_key_is_refused(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(AuthenticationError) as error:
        check_key(headers, [hash_key("sk-mine")])
    assert (error.value.status, error.value.code, error.value.retry) == (401, "invalid_api_key", False)
    assert "sk-min" not in error.value.message


def test_a_key_may_be_in_the_header_of_anthropics_clients() -> None:
    hashes = [hash_key("sk-mine"), hash_key("sk-two")]
    mine, two = hash_key("sk-mine")[:8], hash_key("sk-two")[:8]
    assert check_key({b"x-api-key": b" sk-mine "}, hashes) == mine
    assert check_key({b"x-api-key": b"sk-two", **bearer("sk-mine")}, hashes) == mine  # the token names the client
    assert check_key({b"x-api-key": b"sk-two", **bearer("sk-none")}, hashes) == two
    assert check_key({b"x-api-key": b"sk-none", **bearer("sk-mine")}, hashes) == mine
    for headers in ({b"x-api-key": b""}, {b"x-api-key": b"sk-none", **bearer("sk-none")}, bearer("sk-mine", "Basic")):
        with pytest.raises(AuthenticationError):
            check_key(headers, hashes)


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those after the match: the time must not reveal which hash matches, nor how much of it."""
    compared: list[str] = []
    real = hmac.compare_digest

    def recording(given: str, known: str) -> bool:
        compared.append(known)
        return real(given, known)

    monkeypatch.setattr("xgen_proxy.api.api_keys.hmac.compare_digest", recording)
    hashes = [hash_key("sk-mine"), hash_key("second"), hash_key("third")]
    check_key(bearer("sk-mine"), hashes)
    assert compared == hashes
