"""A page as a reader of HTML sees it: every element with its attributes and text, refused where tags don't match."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = frozenset({"meta"})


@dataclass
class Element:
    """A tag, what is inside it, and the text that isn't inside another tag."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Element]:
        """Every element of this tag inside, in order."""
        found = []
        for child in self.children:
            if child.tag == tag:
                found.append(child)
            found += child.all(tag)
        return found

    def everything(self) -> list[Element]:
        return [self, *(element for child in self.children for element in child.everything())]

    def whole_text(self) -> str:
        return self.text + "".join(child.whole_text() for child in self.children)

    def by_id(self, name: str) -> Element:
        (found,) = [element for element in self.everything() if element.attributes.get("id") == name]
        return found

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def parse(page: str) -> Element:
    """The page's root; AssertionError where its tags don't match."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].tag}> isn't closed"
    return parser.root


def hints(element: Element) -> dict[str, Element]:
    """Return everything inside that stands for a number, by the hint under the pointer."""
    found = [
        (child.whole_text(), one) for one in element.everything() for child in one.children if child.tag == "title"
    ]
    assert len(dict(found)) == len(found), "two marks say the same"
    return dict(found)


def place(mark: Element) -> tuple[float, float]:
    """Where a mark's middle is in its drawing: x to the right, y downwards."""
    x, y = mark.attributes["transform"].removeprefix("translate(").removesuffix(")").split()
    return float(x), float(y)


def cells_of(table: Element) -> list[list[str]]:
    """The cells of a table's body."""
    (body,) = table.all("tbody")
    return [[cell.whole_text() for cell in row.all("td")] for row in body.all("tr")]
