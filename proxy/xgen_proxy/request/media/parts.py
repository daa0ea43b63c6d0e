"""Content parts that are no text: their shapes, how many and how large they may be, and where they may come from.

https://platform.openai.com/docs/guides/images-vision. `audio_url` and `video_url` are vLLM's and llama-server's.
"""

from __future__ import annotations

import re
from base64 import b64decode
from typing import Any, Literal

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json, Need
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.media.file_kind import HEAD, check_kind
from xgen_proxy.request.media.image_size import image_size
from xgen_proxy.request.media.origins import is_listed

# For the context check. Gemma 3 takes 256 for every image, LLaVA 1.5 576, Qwen2.5-VL one for each 28 × 28 pixels. A low
# estimate costs nothing, since the engine counts; a high one would refuse a prompt that fits.
IMAGE_TOKENS = 256

TEXT_PARTS = ("text", "refusal")
# type of a part, and its field → (need, the field within that holds the data or says where it is)
MEDIA: dict[str, tuple[Need, str]] = {
    "image_url": ("images", "url"),
    "input_audio": ("audio", "data"),
    "audio_url": ("audio", "url"),
    "video_url": ("video", "url"),
    "file": ("files", "file_data"),
}
KINDS: dict[Need, Literal["image", "audio", "video"]] = {"images": "image", "audio": "audio", "video": "video"}
# Where engines look for data, each in an order of its own: with two of these, they might take the one not checked.
SOURCES = frozenset({"url", "data", "file_data"})
# A uuid reads vLLM's media cache, also what other clients put there, and makes it load the media of a text part.
NO_CLIENTS = frozenset({
    "uuid", *MEDIA, "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil", "input_image",
    "input_video",
})  # fmt: skip

PARTS_KEYS = NO_CLIENTS - {"uuid", "file"}  # no other JSON is likely to have them
DATA_URL = re.compile(r"data:([a-z]+)/([a-z0-9.+-]{1,40})((?:;[a-z0-9-]+=[A-Za-z0-9.+-]+)*);base64,")
MAX_HEAD = 200  # characters of a data URL before its data
HEAD_CHARACTERS = HEAD * 4 // 3  # of base64
IMAGE_FORMATS = frozenset({"png", "jpeg", "jpg", "webp", "gif"})
FILE_FIELDS = frozenset({"file_id", "file_data", "filename", "format"})
FILE_WORDS = ", ".join(sorted(FILE_FIELDS))
FILE_ID = re.compile(r"[A-Za-z0-9._-]{1,256}")
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class Media:
    """The media of one chat. Pass each part that is not text to `add()`, which raises BadRequestError."""

    def __init__(self, limits: Limits) -> None:
        self.needs: set[Need] = set()
        self.images = 0
        self._pixels = 0
        self._limits = limits

    @property
    def tokens(self) -> int:
        """An estimate; of the other media there is none."""
        return self.images * IMAGE_TOKENS

    def add(self, part: Json, where: str) -> None:
        kind = part["type"]
        if kind not in MEDIA:
            known = ", ".join((*TEXT_PARTS, *MEDIA))
            raise BadRequestError(f"{where}.type must be one of {known}, not {quoted(kind)}", param=f"{where}.type")
        check_sources(part, where, kind)
        need, field = MEDIA[kind]
        holder = part.get(kind)
        name = f"{where}.{kind}"
        if not isinstance(holder, dict):
            raise BadRequestError(f"{name} must be an object with {field}", param=name)
        if SOURCES & holder.keys() - {field}:
            raise BadRequestError(f"{name} must have no source but {field}", param=name)
        self.needs.add(need)
        source = holder.get(field)
        if kind == "file":
            _check_file(holder, name)
            if source is None:
                return
        if not isinstance(source, str):
            raise BadRequestError(f"{name}.{field} must be a string", param=f"{name}.{field}")
        if need == "images":
            self._count(where)
        self._check_data(need, source, f"{name}.{field}")

    def _count(self, where: str) -> None:
        self.images += 1
        if self.images > self._limits.images:
            raise BadRequestError(f"there are more than {self._limits.images} images", param=where)

    def _check_data(self, need: Need, source: str, name: str) -> None:
        if name.endswith(".data"):
            check_kind(b64decode(_check_base64(source, 0, name)[:HEAD_CHARACTERS]), "audio", name)
        elif source.startswith("data:"):
            self._check_data_url(need, source, name)
        elif not is_listed(source, self._limits.media_origins):
            raise BadRequestError(
                f"{name} must be a data URL, such as data:image/png;base64,…: this server fetches nothing from there",
                param=name,
            )

    def _check_data_url(self, need: Need, url: str, name: str) -> None:
        found = DATA_URL.match(url[:MAX_HEAD])
        kind = KINDS.get(need)
        # vLLM reads video/jpeg as a list of images, whose pixels are not counted here
        frames = need == "video" and found is not None and found[2] == "jpeg"
        wrong = found is None or frames or (need == "images" and found[2] not in IMAGE_FORMATS)
        if found is None or wrong or (kind and found[1] != kind):
            wanted = "image/png, image/jpeg, image/webp or image/gif" if need == "images" else f"{kind or 'any'}/…"
            raise BadRequestError(f"{name} must begin with data:TYPE;base64, where TYPE is {wanted}", param=name)
        data = _check_base64(url, found.end(), name)
        if kind == "image":
            self._check_size(data, name)
        elif kind:
            check_kind(b64decode(data[:HEAD_CHARACTERS]), kind, name)

    def _check_size(self, data: str, name: str) -> None:
        size = image_size(data)
        if size is None or 0 in size:
            raise BadRequestError(f"{name} is not a PNG, JPEG, WebP or GIF, or not a well-formed one", param=name)
        self._pixels += size[0] * size[1]
        if self._pixels > self._limits.image_pixels:
            most = self._limits.image_pixels
            raise BadRequestError(
                f"{name} has {size[0]} × {size[1]} pixels, and all images together may have {most}; send smaller ones",
                param=name,
            )


def check_sources(part: Json, where: str, own: str | None = None) -> None:
    """A part has the medium of its type only, and nothing that engines take from elsewhere. Raises BadRequestError."""
    for field in sorted(NO_CLIENTS & part.keys() - {own}):
        if part[field] is not None:
            raise BadRequestError(f"{where} must not have {field}", param=f"{where}.{field}")


def _check_file(file: Json, name: str) -> None:
    """LiteLLM fetches a file_id that is a URL. Raises BadRequestError."""
    for field in sorted(file.keys() - FILE_FIELDS):
        if file[field] is not None:
            raise BadRequestError(f"{name} must not have {quoted(field)}: it has {FILE_WORDS}", param=name)
    file_id = file.get("file_id")
    if file_id is not None and not (isinstance(file_id, str) and FILE_ID.fullmatch(file_id)):
        raise BadRequestError(
            f"{name}.file_id must have at most 256 letters, digits, dots, hyphens and underscores",
            param=f"{name}.file_id",
        )


def _check_base64(text: str, start: int, name: str) -> str:
    """By length and alphabet: decoding 10 MB would take as long again as parsing them. Returns the part after `start`.
    Raises BadRequestError."""
    data = text[start:] if start else text
    kept = data.rstrip("=")
    good = kept and len(data) % 4 == 0 and len(data) - len(kept) <= 2 and data.isascii()
    if not good or kept.encode().translate(None, BASE64):
        raise BadRequestError(
            f"{name} has no valid base64: letters, digits, + and /, filled up with = to a multiple of four, and no line"
            " breaks",
            param=name,
        )
    return data


def check_everywhere(body: Json, limits: Limits) -> None:
    """For a body whose shape is not checked further, such as that of /v1/score: vLLM fetches what its parts name, too.
    Raises BadRequestError."""
    media = Media(limits)
    level: list[Any] = [body]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            if not PARTS_KEYS.isdisjoint(each):
                _check_part(each, media)
            level.extend(each.values())
        elif isinstance(each, list):
            level.extend(each)


def _check_part(part: Json, media: Media) -> None:
    if isinstance(part.get("type"), str) and part["type"] in MEDIA:
        media.add(part, "part")
    else:
        check_sources(part, "part")
