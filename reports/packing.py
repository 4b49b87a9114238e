"""Large parts of a page, and the chart library, as gzip in base64 inside an inert script element.

page.js unpacks them in place as soon as the page is open (DecompressionStream: Chromium 80, Safari
16.4, Firefox 113). A part below PACK_FROM stays plain HTML, so that an ordinary run is read whole
without JavaScript; only a large farm's is not, and says so.
"""

from __future__ import annotations

import base64
import gzip

from markupsafe import Markup

PACK_FROM = 200_000  # characters of HTML
_ELEMENT = (
    '<noscript><p class="note">This part is packed and needs JavaScript; its data are in results.json.</p>'
    '</noscript><script type="application/gzip" class="packed">{}</script>'
)


def packed(html: str, most: int = PACK_FROM) -> Markup:
    """``html``, safe markup already, as it is up to ``most`` characters; else packed."""
    return Markup(html) if len(html) <= most else Markup(_ELEMENT.format(gzipped(html)))


def gzipped(text: str) -> str:
    """UTF-8, gzip, base64; the same text gives the same bytes."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
