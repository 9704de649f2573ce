"""Selection of FFNs by block: the value of `MoEConfig.layers` or `TrainConfig.train_only`, parsed and checked once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol, TypeVar

from vimoe.errors import ConfigError, SurgeryError, nearest

LAYER_WORDS = ("all", "none", "last:N", "every:N")


class InBlock(Protocol):
    """A module of a model: its name there, and the index of its block among the blocks that hold an FFN."""

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int: ...


Site = TypeVar("Site", bound=InBlock)


@dataclass(frozen=True)
class Layers:
    """Selection of FFNs by block, as `MoEConfig.layers` describes it.

    Attributes:
        written: "all", "none", "last:2", "every:2", a module-name pattern, or a tuple of block indices and patterns.
        word: "all", "none", "last" or "every"; "" for indices and patterns.
        number: N of "last:N" and "every:N", else 0.
        items: block indices and module-name patterns; none for a word.
        setting: name of the setting, for messages.
        words: values that the setting has beside indices and patterns, for messages.

    Example:
        >>> Layers.parse("last:2").number, Layers.parse([3, "blocks.1?.mlp"]).items
        (2, (3, 'blocks.1?.mlp'))
    """

    written: str | tuple[int | str, ...]
    word: str = ""
    number: int = 0
    items: tuple[int | str, ...] = ()
    setting: str = "layers"
    words: tuple[str, ...] = LAYER_WORDS

    @classmethod
    def parse(cls, written: object, setting: str = "layers", words: tuple[str, ...] = LAYER_WORDS) -> Layers:
        """Return the selection that a user wrote.

        Raises:
            ConfigError: if it is neither one of the words, nor block indices or module-name patterns.
        """
        made = partial(cls, setting=setting, words=words)
        listed = isinstance(written, (tuple, list))
        items = tuple(written) if isinstance(written, (tuple, list)) else (written,)
        if not items or not all(_is_item(item, listed) for item in items):
            raise ConfigError(
                f"{setting}={written!r}: expected one of {', '.join(words)}, block indices such as [3, 4], "
                f"or module-name patterns such as 'blocks.1?.mlp'"
            )
        if not isinstance(written, str):
            return made(items, items=items)
        word, colon, number = written.partition(":")
        if not colon:
            return made(written, word=word) if word in words else made(written, items=items)
        if word in ("last", "every") and re.fullmatch(r"[1-9]\d*", number):
            return made(written, word, int(number))
        remedy = nearest(f"{word}:N", words)
        raise ConfigError(f"{setting}={written!r}: expected one of {', '.join(words)} with N of 1 or more; {remedy}")

    def check_names(self, ffn_name: re.Pattern[str], blocks: int | None = None) -> None:
        """Raise an error for a module name that `ffn_name` does not match in full, or for a block that is not there.

        A name with wildcards is left to the model.

        Args:
            ffn_name: names that an FFN may have.
            blocks: number of the model's blocks, which are called blocks.0, blocks.1 and so on; None if unknown.

        Raises:
            ConfigError: if a module name is none.
            SurgeryError: if there are not as many blocks.
        """
        if blocks:
            self._check_number(blocks)
        for item in self.items:
            if isinstance(item, int):
                if blocks:
                    self._check_index(item, blocks)
                continue
            block = re.match(r"blocks\.(\d+)\.", item)
            there = not (block and blocks) or int(block[1]) < blocks
            if any(wild in item for wild in "*?[") or (there and ffn_name.fullmatch(item)):
                continue
            numbers = range(blocks) if blocks else re.findall(r"\d+", item)
            known = [*self.words, *(f"blocks.{number}.mlp" for number in numbers)]
            raise ConfigError(f"{self.setting}={item!r} names no FFN: {as_list(item) or nearest(item, known)}")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the selected ones of all sites of a model, in the order given.

        Raises:
            SurgeryError: if a word, index or pattern selects no site.
        """
        if self.word == "none":
            return []
        if not sites:
            raise SurgeryError(
                "no FFN was found inside the model's blocks: expected a ViT of timm (vit_*, deit*) or transformers, "
                "and not one that fuses the FFN with the attention, as vit_*_xp and vit_*pwee do"
            )
        count = 1 + max(site.block for site in sites)
        self._check_number(count)
        if self.word == "all":
            return list(sites)
        if self.word == "last":
            return [site for site in sites if site.block >= count - self.number]
        if self.word == "every":
            return [site for site in sites if site.block % self.number == self.number - 1]
        selected = {name for item in self.items for name in self._names(item, sites, count)}
        return [site for site in sites if site.name in selected]

    def _check_number(self, count: int) -> None:
        if self.number > count:
            raise SurgeryError(
                f"{self.setting}={self.written!r}: expected at most {count}, the number of blocks with an FFN"
            )

    def _check_index(self, index: int, count: int) -> None:
        if not -count <= index < count:
            raise SurgeryError(f"{self.setting}: no block {index}: expected {-count} to {count - 1}")

    def _names(self, item: int | str, sites: Sequence[InBlock], count: int) -> list[str]:
        """Return the names of the sites in one block, or of those that match a pattern."""
        if isinstance(item, int):
            self._check_index(item, count)
            return [site.name for site in sites if site.block == item % count]
        matching = [site.name for site in sites if fnmatchcase(site.name, item)]
        if not matching:
            known = [*self.words, *(site.name for site in sites)]
            raise SurgeryError(f"{self.setting}={item!r} names no FFN: {as_list(item) or nearest(item, known)}")
        return matching


def as_list(item: str) -> str:
    """Return the remedy for a list that was written without brackets; "" for an item without a comma.

    >>> as_list("10,11"), as_list("blocks.10.mlp, blocks.11.mlp"), as_list("blocks.[0,1].mlp")
    ('write a list: [10, 11]', 'write a list: [blocks.10.mlp, blocks.11.mlp]', '')
    """
    parts = [part.strip() for part in re.sub(r"^[(\[]|[)\]]$", "", item).split(",")]
    listed = len(parts) > 1 and all(re.fullmatch(r"-?\d+|[\w.*?]+", part) for part in parts)
    return f"write a list: [{', '.join(parts)}]" if listed else ""


def _is_item(item: object, listed: bool) -> bool:
    """Return True for a module-name pattern, and in a list for a block index."""
    return bool(item) if isinstance(item, str) else listed and isinstance(item, int) and not isinstance(item, bool)
