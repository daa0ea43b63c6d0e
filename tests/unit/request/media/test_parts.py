from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.support.images import RED, about, data_url, image, png, png_bytes
from tests.unit.request.test_parsing import read
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Features
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.media.parts import IMAGE_TOKENS, check_everywhere

WAV = base64.b64encode(b"RIFF\0\0\0\0WAVEfmt ").decode()
AUDIO = {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}


def features(*parts: Any, **limits: Any) -> Features:
    return read({"messages": about(*parts)}, **limits)


NEEDS: dict[str, tuple[dict[str, Any], str]] = {
    "an image": (image(), "images"),
    "with a detail": (image(detail="low"), "images"),
    "JPEG by its old name": (image(RED.replace("image/png", "image/jpg")), "images"),
    "with a parameter": (image(RED.replace("image/png", "image/png;charset=utf-8")), "images"),
    "fields that are not set": ({**image(), "uuid": None, "input_audio": None}, "images"),
    "audio": (AUDIO, "audio"),
    "audio by URL": ({"type": "audio_url", "audio_url": {"url": data_url(b"fLaC" + bytes(9), "audio/flac")}}, "audio"),
    "video": ({"type": "video_url", "video_url": {"url": data_url(b"\0\0\0\x18ftypisom", "video/mp4")}}, "video"),
    "a file": ({"type": "file", "file": {"file_data": data_url(b"abc", "application/pdf")}}, "files"),
    "a file by its id": ({"type": "file", "file": {"file_id": "file-1", "file_url": None}}, "files"),
    "a file with a name": (
        {
            "type": "file",
            "file": {"file_data": data_url(b"a", "text/plain"), "filename": "a b", "format": "text/plain"},
        },
        "files",
    ),
    "a file by a long id": ({"type": "file", "file": {"file_id": "A_b.9-" + "x" * 250}}, "files"),
}


@pytest.mark.parametrize(("part", "need"), NEEDS.values(), ids=NEEDS)
def test_what_a_part_needs(part: dict[str, Any], need: str) -> None:
    assert features(part).needs == {"generation", need}


def test_the_media_of_all_messages_count() -> None:
    messages = [{"role": "user", "content": [image(), image()]}, {"role": "tool", "content": [image(), AUDIO]}]
    found = read({"messages": messages})
    assert found.needs == {"generation", "images", "audio"}
    assert found.prompt_tokens == 3 * IMAGE_TOKENS
    assert found.prompt_words > 500, "an image takes as long to read as many words"


@pytest.mark.parametrize("extra", [{}, {"cache_control": {"type": "ephemeral"}}, {"uuid": None, "image_url": None}])
def test_text_with_other_fields_needs_nothing(extra: dict[str, Any]) -> None:
    assert features({"type": "text", "text": "x", **extra}).needs == {"generation"}


URL = "image_url.url"
REFUSED: dict[str, tuple[Any, str, str]] = {
    "no object": ({"type": "image_url", "image_url": RED}, "must be an object with url", "image_url"),
    "nothing": ({"type": "image_url"}, "must be an object with url", "image_url"),
    "no url": ({"type": "image_url", "image_url": {}}, "must be a string", URL),
    "a number": (image(5), "must be a string", URL),  # type: ignore[arg-type]
    "an unknown type": ({"type": "image", "image": RED}, "must be one of text, refusal, image_url", "type"),
    "a remote URL": (image("https://example.org/a.png"), "must be a data URL", URL),
    "a file of the engine's": (image("file:///etc/passwd"), "must be a data URL", URL),
    "bare base64": (image(RED.partition(",")[2]), "must be a data URL", URL),
    "not base64": (image("data:image/png,abc"), "must begin with data:TYPE;base64", URL),
    "SVG": (image(data_url(b"<svg/>", "image/svg+xml")), "where TYPE is image/png, image/jpeg", URL),
    "a PDF": (image(data_url(b"%PDF", "application/pdf")), "where TYPE is image/png, image/jpeg", URL),
    "PostScript by the name of PNG": (image(data_url(b"%!PS" + bytes(50))), "is not a PNG, JPEG, WebP or GIF", URL),
    "no data": (image("data:image/png;base64,"), "no valid base64", URL),
    "base64 of another alphabet": (image(RED[:-8] + "ab_-" + RED[-4:]), "no valid base64", URL),
    "base64 without its end": (image(RED[:-3]), "no valid base64", URL),
    "base64 with line breaks": (image(RED[:80] + "\n" + RED[80:]), "no valid base64", URL),
    "base64 with a byte too many": (image(RED[:-4] + "===="), "no valid base64", URL),
    "base64 of full-width letters": (image(RED[:-4] + "\uff21" * 4), "no valid base64", URL),
    "a second source": (image(data="http://10.0.0.1/"), "no source but url", "image_url"),
    "a cache's key": ({**image(), "uuid": "x"}, "must not have uuid", "uuid"),
    "a second medium": ({**image(), "video_url": {"url": "x"}}, "must not have video_url", "video_url"),
    "text with a medium": (
        {"type": "text", "text": "x", "image_url": {"url": "http://10.0.0.1/"}},
        "must not have image_url",
        "image_url",
    ),
    "text with a cache's key": ({"type": "text", "text": "x", "uuid": "x"}, "must not have uuid", "uuid"),
    "audio from a URL": (
        {"type": "input_audio", "input_audio": {"data": "http://10.0.0.1/", "format": "wav"}},
        "no valid base64",
        "input_audio.data",
    ),
    "audio from two places": (
        {"type": "input_audio", "input_audio": {"data": WAV, "url": "http://10.0.0.1/"}},
        "no source but data",
        "input_audio",
    ),
    "an image as a video": ({"type": "video_url", "video_url": {"url": RED}}, "where TYPE is video/", "video_url.url"),
    "an image as audio": (
        {"type": "input_audio", "input_audio": {"data": RED.partition(",")[2], "format": "wav"}},
        "is an image; it must be audio: WAV, MP3",
        "input_audio.data",
    ),
    "an image as audio by URL": (
        {"type": "audio_url", "audio_url": {"url": data_url(png_bytes(), "audio/wav")}},
        "is an image; it must be audio",
        "audio_url.url",
    ),
    "an image by the name of a video": (
        {"type": "video_url", "video_url": {"url": data_url(png_bytes(), "video/mp4")}},
        "is an image; it must be video",
        "video_url.url",
    ),
    "a file by a URL as its id": (
        {"type": "file", "file": {"file_id": "http://169.254.0.1/"}}, "must have at most 256 letters", "file.file_id"
    ),
    "a file by an id that is too long": (
        {"type": "file", "file": {"file_id": "x" * 257}}, "must have at most 256 letters", "file.file_id"
    ),
    "a file by a number": ({"type": "file", "file": {"file_id": 5}}, "must have at most 256 letters", "file.file_id"),
    "a file with another field": (
        {"type": "file", "file": {"file_url": "http://10.0.0.1/"}}, "must not have 'file_url': it has file_data", "file"
    ),
    "a file from a URL": (
        {"type": "file", "file": {"file_data": "http://10.0.0.1/"}}, "must be a data URL", "file.file_data"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("part", "message", "param"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(part: Any, message: str, param: str) -> None:
    with pytest.raises(BadRequestError, match=message) as refused:
        features(part)
    assert refused.value.param == f"messages.0.content.1.{param}"
    assert len(refused.value.message) < 300


def test_remote_images_of_listed_origins() -> None:
    url = "https://images.example.org/a.png"
    assert features(image(url), media_origins=("https://images.example.org",)).needs == {"generation", "images"}
    with pytest.raises(BadRequestError, match="must be a data URL"):
        features(image("https://example.org/a.png"), media_origins=("https://images.example.org",))


def test_the_number_of_images_is_limited() -> None:
    assert features(image(), image(), images=2)
    with pytest.raises(BadRequestError, match="more than 2 images"):
        features(image(), image(), AUDIO, image(), images=2)


def test_the_pixels_of_all_images_are_limited() -> None:
    assert features(image(png(100, 100)), image(png(100, 50)), image_pixels=15_000)
    with pytest.raises(BadRequestError, match=r"content\.2\.image_url\.url has 100 × 51 pixels, and all .* 15000"):
        features(image(png(100, 100)), image(png(100, 51)), image_pixels=15_000)


def test_a_small_file_of_many_pixels_is_refused_unseen() -> None:
    bomb = bytearray(png_bytes(1, 1))
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    with pytest.raises(BadRequestError, match="30000 × 30000 pixels"):
        features(image(data_url(bytes(bomb))))


def test_embeddings_have_no_messages() -> None:
    """vLLM would take them in place of the input, and fetch their images."""
    with pytest.raises(BadRequestError, match="send the text as input"):
        read({"input": "a", "messages": about(image("http://10.0.0.1/"))}, endpoint="embeddings")


@pytest.mark.parametrize(
    "part",
    [
        image("http://10.0.0.1/"),
        {"image_url": "http://10.0.0.1/"},
        {"type": "text", "text": "x", "uuid": "x", "image_url": {"url": "http://10.0.0.1/"}},
        {"type": "input_image", "image_url": "http://10.0.0.1/"},
    ],
)
def test_bodies_of_an_unknown_shape_name_no_url(part: dict[str, Any]) -> None:
    for body in ({"text_1": {"content": [part]}}, {"documents": [{"content": [part]}]}, {"messages": about(part)}):
        with pytest.raises(BadRequestError):
            check_everywhere(body, Limits())


def test_bodies_of_an_unknown_shape_may_have_anything_else() -> None:
    check_everywhere(
        {"documents": [{"content": [image()]}, {"text": "x", "uuid": "1", "file": "a.txt", "url": "b"}]}, Limits()
    )
