"""Lines of `name.jpg#0<TAB>caption`, as Flickr8k and Flickr30k have them."""

from __future__ import annotations

import re

from cliptune.data.index import Records, quote
from cliptune.data.text_stream import TextFile
from cliptune.preprocess.image_formats import IMAGE_ENDINGS

_ENDING = "|".join(sorted(ending[1:] for ending in IMAGE_ENDINGS))
# The tag follows the first ending, or a little after it: Flickr8k really holds "2258277193_586949ec62.jpg.1#0".
TOKEN_LINE = re.compile(rf"([^\t]+?\.(?:{_ENDING})[^#\s]{{0,16}})#\S*(.*)", re.IGNORECASE | re.DOTALL)
IMAGE_NAME = re.compile(rf"\.(?:{_ENDING})\b", re.IGNORECASE)


def read_token_lines(found: Records, text: TextFile) -> str:
    """Take each line, which is an image's name with a tag and its caption."""
    found.refuse_caption_key("token")
    found.unit = "line"
    for number, line in enumerate(text.lines(), 1):
        if match := TOKEN_LINE.match(line):
            found.add(number, match[1], match[2])
        elif line.strip():
            found.issue(number, f"not name.jpg#0<TAB>caption: {quote(line.strip())}")
    return "token"
